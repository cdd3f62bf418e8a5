"""What the lines of the toy networks' figures hold, against simulations set up here."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray

from isofast.cli import main
from isofast.paper.toy import Toy, Trajectory, initial_weights, randn, simulate, stream

pytestmark = pytest.mark.slow

STEPS, SAMPLES = 3, 20
# what a title promises
PROMISES: dict[str, dict[str, Any]] = {
    "no stop-gradient": {"stop_gradient": False},
    "no stop-gradient, paper's derivative": {"stop_gradient": False, "paper_gradient": True},
    "no predictor": {"predictor": False},
    "stop-gradient and predictor": {},
    "IsoLoss": {},
}
DIVERGES = "no stop-gradient, paper's derivative"
METRICS = ("euclidean", "cosine")


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command and gives the picture that it saved, {(row, column): axes}."""
    saved: list[Figure] = []
    write = Figure.savefig

    def savefig(picture: Figure, *args: Any, **kwargs: Any) -> None:
        saved.append(picture)
        write(picture, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)

    def draw(
        figure: str, *, seed: int = 0, steps: int = STEPS, samples: int = SAMPLES
    ) -> dict[tuple[int, int], Axes]:
        settings = {"steps": steps, "samples": samples, "seed": seed}
        options = [f"--{name}={value}" for name, value in settings.items()]
        assert main(["theory", figure, "--output", str(tmp_path), *options]) == 0
        places = {axes: axes.get_subplotspec() for axes in saved[0].axes}
        return {(place.rowspan.start, place.colspan.start): axes for axes, place in places.items()}

    return draw


def lines_of(axes: Axes) -> tuple[NDArray[Any], NDArray[Any]]:
    """x and y of the solid lines, (lines, T)."""
    solid = [line for line in axes.lines if line.get_linestyle() == "-"]
    return np.array([x.get_xdata() for x in solid]), np.array([x.get_ydata() for x in solid])


def title_of(axes: Axes) -> str:
    return axes.get_title().replace("\n", " ")


def toy_of(metric: str, title: str, **settings: Any) -> Toy:
    loss = f"iso_{metric}" if title == "IsoLoss" else metric
    return Toy(loss=loss, steps=STEPS, **PROMISES[title], **settings)


def plane_of(toy: Toy, start: torch.Tensor | None = None) -> Trajectory:
    candidates = randn((5000, 6), stream(toy.seed, 2))
    longest = candidates.norm(dim=-1).argsort(descending=True)[:20]
    return simulate(toy, start, points_PN=candidates[longest], records=STEPS + 1)


def assert_plane(axes: Axes, points_TPM: NDArray[Any]) -> None:
    """Paths as lines, circles where they begin, dots where they end."""
    x, y = lines_of(axes)
    np.testing.assert_allclose(x, points_TPM[..., 0].T, rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(y, points_TPM[..., 1].T, rtol=1e-7, atol=1e-12)
    first, last = axes.collections
    np.testing.assert_allclose(first.get_offsets(), points_TPM[0], rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(last.get_offsets(), points_TPM[-1], rtol=1e-7, atol=1e-12)
    assert len(first.get_facecolor()) == 0 and len(last.get_facecolor()) == 1
    low, high = axes.get_xlim()
    assert low <= points_TPM.min() and points_TPM.max() <= high


def assert_spectrum(axes: Axes, values_TM: NDArray[Any]) -> None:
    """An eigenvalue a line over the steps, the larger the lighter, on a logarithmic axis."""
    x, y = lines_of(axes)
    assert (x == np.arange(STEPS + 1)).all()
    np.testing.assert_allclose(y, values_TM.T, rtol=1e-7)
    assert axes.get_yscale() == "log"
    light = [sum(to_rgb(line.get_color())) for line in axes.lines if line.get_linestyle() == "-"]
    assert (np.diff(light) < 0).all()


@pytest.mark.parametrize(("figure", "seed"), [("figure2", 1), ("figure6", 0)])
def test_every_panel_shows_the_loss_its_title_and_row_name(
    drawn: Any, figure: str, seed: int
) -> None:
    axes = drawn(figure, seed=seed)
    relu = figure == "figure6"
    seen, ends = set(), []
    for row, metric in enumerate(METRICS):
        assert axes[2 * row, 0].get_ylabel().startswith(metric.capitalize())
        assert axes[2 * row + 1, 0].get_ylabel().startswith(f"{metric.capitalize()}\neigenvalues")
        for column in range(5):
            above, below = axes[2 * row, column], axes[2 * row + 1, column]
            if not above.axison:
                continue
            title = title_of(above)
            seen.add((metric, title))
            own = {"relu": relu, "seed": seed}
            plane = toy_of(metric, title, inputs=6, outputs=2, lr=0.01, samples=200, **own)
            assert_plane(above, plane_of(plane).points[:, 0])
            toy = toy_of(metric, title, samples=SAMPLES, **own)
            ends.append(simulate(toy, records=STEPS + 1).eigenvalues[:, 0])
            assert_spectrum(below, ends[-1])
            dotted = [line for line in below.lines if line.get_linestyle() == ":"]
            assert len(dotted) == (metric == "euclidean" and not relu)
            assert all(list(line.get_ydata()) == [1, 1] for line in dotted)
    assert len(seen) == len(ends) == 9
    for index, values in enumerate(ends):
        others = ends[:index] + ends[index + 1 :]
        assert not any(np.allclose(values, other, rtol=1e-6) for other in others), (
            "panels alike could be swapped unseen"
        )


@pytest.mark.parametrize("figure", ["figure2", "figure6"])
def test_the_free_column_says_how_the_paper_and_the_relu_differ(drawn: Any, figure: str) -> None:
    axes = drawn(figure)
    free = [place for place, panel in axes.items() if not panel.axison]
    assert free == [(0, 1), (1, 1)]
    assert title_of(axes[2, 1]) == "no stop-gradient, paper's derivative"
    (note,) = axes[0, 1].texts
    assert "App. C.2" in note.get_text()
    assert ("IsoLoss: views below 0.1" in note.get_text()) == (figure == "figure6")


@pytest.mark.parametrize("seed", [0, 1])
def test_figure5_shows_each_start_in_its_column_and_its_colour(drawn: Any, seed: int) -> None:
    axes = drawn("figure5", seed=seed)
    v0 = initial_weights(Toy(inputs=6, outputs=2, seed=seed))
    starts = {"V0": v0, "2 V0": 2 * v0, "randn / 2": randn((1, 2, 6), stream(seed, 3)) / 2}
    limits = {axes[row, column].get_xlim() for row in (0, 1) for column in (0, 1, 2)}
    assert limits == {axes[0, 0].get_ylim()}
    for row, metric in enumerate(METRICS):
        assert axes[row, 0].get_ylabel().startswith(metric.capitalize())
        toy = Toy(loss=metric, steps=STEPS, samples=200, inputs=6, outputs=2, lr=0.01, seed=seed)
        lines = iter(axes[row, 3].lines)
        for column, (name, start) in enumerate(starts.items()):
            assert title_of(axes[row, column]) == f"from {name}"
            track = plane_of(toy, start)
            assert_plane(axes[row, column], track.points[:, 0])
            values_TM = track.eigenvalues[:, 0]
            larger, smaller, expected = next(lines), next(lines), next(lines)
            assert larger.get_label() == name and larger.get_color() == smaller.get_color()
            np.testing.assert_allclose(larger.get_ydata(), values_TM[:, 0], rtol=1e-7)
            np.testing.assert_allclose(smaller.get_ydata(), values_TM[:, 1], rtol=1e-7)
            end = 1 if metric == "euclidean" else values_TM[0].mean()
            np.testing.assert_allclose(expected.get_ydata(), end, rtol=1e-7)
            assert expected.get_linestyle() == ":"
        assert next(lines, None) is None


def test_what_diverges_has_its_own_scale_and_the_others_share_theirs(drawn: Any) -> None:
    """Of this seed's few samples the paper's derivative leaves both scales within 140 steps."""
    axes = drawn("figure2", seed=6, steps=140, samples=1)
    limits = {}
    for (row, column), panel in axes.items():
        if panel.axison and row in (0, 2):
            assert panel.get_xlim() == panel.get_ylim()
            high = panel.get_ylim()[1]
            limits[METRICS[row // 2], title_of(panel)] = high
            assert high >= max(abs(line.get_ydata()).max() for line in panel.lines)
        elif panel.axison and panel.lines:
            low, high = panel.get_ylim()
            top = lines_of(panel)[1].max()
            assert low == 0.01 and high >= max(top, 10)
            own = (row, title_of(axes[row - 1, column])) == (3, DIVERGES)
            assert (high > 10) == (top > 10) == own
    diverged = limits.pop(("cosine", DIVERGES))
    for metric in METRICS:
        (shared,) = {limit for (of, _), limit in limits.items() if of == metric}
        assert metric == "euclidean" or diverged > 10 * shared
