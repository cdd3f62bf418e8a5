"""What is told of a collapse, and that healthy runs are left in peace."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from isofast.collapse import CollapseWatch, Finding, remedies
from isofast.config import Config
from isofast.settings import validate
from isofast.spectrum import Spectrum

STEPS = (10, 20, 30, 40, 50, 60, 70, 100, 130, 160, 190, 220, 250, 264)
# Effective ranks at STEPS in runs on the digits (ResNet-18 of width 8, D = 128, AdamW, 12 epochs).
RANKS = {
    "isoloss": (3.68, 2.01, 1.67, 1.68, 1.77, 1.9, 2.06, 2.7, 3.45, 4.18, 4.79, 5.2, 5.47, 5.56),
    "directpred": (3.1, 1.65, 1.4, 1.31, 1.3, 1.34, 1.38, 1.57, 1.79, 2.05, 2.29, 2.48, 2.61, 2.65),
    "byol": (5.4, 2.98, 1.76, 1.43, 1.33, 1.31, 1.32, 1.45, 1.65, 1.89, 2.07, 2.25, 2.4, 2.45),
    "simsiam": (5.41, 2.98, 1.76, 1.44, 1.36, 1.41, 1.5, 1.81, 2.13, 2.61, 2.66, 2.55, 2.48, 2.45),
    "isoloss, no EMA": (
        *(3.65, 1.58, 1.27, 1.22, 1.22, 1.23, 1.25, 1.29, 1.32, 1.38, 1.47, 1.55, 1.6, 1.61),
    ),
    # this one ends at chance
    "directpred, no EMA": (
        *(3.1, 1.54, 1.26, 1.2, 1.19, 1.22, 1.26, 1.41, 1.35, 1.29, 1.23, 1.17, 1.12, 1.1),
    ),
    "one dimension from the start": (1.02,) * len(STEPS),
}
HEALTHY = 1 / np.sqrt(128)


def spectrum_of(rank: float, trace: float = 1.0, dim: int = 128) -> Spectrum:
    """Geometric eigenvalues, whose participation ratio is (1 + q) / (1 - q)."""
    values = ((rank - 1) / (rank + 1)) ** np.arange(dim)
    return Spectrum((trace * values / values.sum()).astype(np.float32))


@pytest.fixture
def config(tmp_path: Any) -> Callable[..., Config]:
    """Of the runs above; keyword arguments are the method's, but for the weight decay."""

    def make(*, weight_decay: float = 1e-4, **method: Any) -> Config:
        return validate(
            {
                "data": {"dataset": "digits", "root": str(tmp_path)},
                "method": {"decay": 0.99} | method,
                "projector": {"output": 128},
                "train": {"epochs": 12},
                "optimizer": {"name": "adamw", "lr": 8e-3, "weight_decay": weight_decay},
            }
        )

    return make


def findings(config: Config, name: str, spread: float = HEALTHY) -> list[tuple[int, Finding]]:
    watch = CollapseWatch(config, steps_per_epoch=22)
    found = []
    for step, rank in zip(STEPS, RANKS[name], strict=True):
        spectrum = spectrum_of(rank)
        watch.seen(step, spectrum)
        finding = watch.judge(step, spread, spectrum)
        if finding is not None:
            found.append((step, finding))
    return found


@pytest.mark.parametrize("name", ["isoloss", "directpred", "byol", "simsiam", "isoloss, no EMA"])
def test_a_run_that_learns_is_not_called_collapsed(
    name: str, config: Callable[..., Config]
) -> None:
    assert findings(config(), name) == []


@pytest.mark.parametrize("name", ["directpred, no EMA", "one dimension from the start"])
def test_lost_dimensions_are_told_once_c_has_settled(
    name: str, config: Callable[..., Config]
) -> None:
    found = findings(config(name="directpred", ema=False), name)
    assert [step for step, _ in found] == [220, 250, 264]
    assert {finding.kind for _, finding in found} == {"dimensional"}
    message = found[0][1].message
    assert "few dimensions" in message and "of 128" in message and "step 110" in message
    assert message.index("method.ema true") < message.index("method.name isoloss")


def test_c_has_not_settled_before_two_of_its_time_constants(
    config: Callable[..., Config],
) -> None:
    assert findings(config(decay=0.998), "directpred, no EMA") == []


def test_dimensions_are_not_told_in_the_first_steps_however_short_the_memory_of_c(
    config: Callable[..., Config],
) -> None:
    """The preset without EMA forgets within four steps, and the ranks of a new network fall."""
    short = {"decay": 0.5, "ema": False}
    assert findings(config(**short), "isoloss, no EMA") == []
    found = findings(config(name="directpred", **short), "directpred, no EMA")
    assert [step for step, _ in found] == [220, 250, 264]


def test_a_fall_to_a_fiftieth_of_the_dimensions_is_told(config: Callable[..., Config]) -> None:
    watch = CollapseWatch(config(), steps_per_epoch=22)
    found = {}
    for step, rank in ((100, 9.0), (150, 5.0), (220, 2.8), (240, 2.0)):
        watch.seen(step, spectrum_of(rank))
        finding = watch.judge(step, HEALTHY, spectrum_of(rank))
        found[step] = finding and finding.kind
    assert found == {100: None, 150: None, 220: None, 240: "dimensional"}


def test_one_point_for_all_images_is_told_at_once(config: Callable[..., Config]) -> None:
    (step, finding), *_ = findings(config(), "isoloss", spread=0.005 * HEALTHY)
    assert step == 10 and finding.kind == "complete" and "one point" in finding.message


def test_norms_that_grow_a_thousandfold_are_a_blow_up(config: Callable[..., Config]) -> None:
    watch = CollapseWatch(config(), steps_per_epoch=22)
    # the shares of 1 - decay^step that C has filled by then
    for step, square in ((1, 4.0), (300, 2e6), (301, 5e6), (302, float("inf"))):
        spectrum = spectrum_of(9.0, trace=square * (1 - 0.99**step))
        watch.seen(step, spectrum)
        finding = watch.judge(step, HEALTHY, spectrum)
        assert (finding is not None) == (step > 300)
        assert finding is None or finding.kind == "blow-up"


def test_c_filling_up_from_zero_is_no_growth(config: Callable[..., Config]) -> None:
    watch = CollapseWatch(config(decay=0.9999999), steps_per_epoch=22)
    for step in (1, 10_000_000, 100_000_000):
        spectrum = spectrum_of(9.0, trace=1 - 0.9999999**step)
        watch.seen(step, spectrum)
        assert watch.judge(step, HEALTHY, spectrum) is None


@pytest.mark.parametrize(
    ("method", "kind", "first", "never"),
    [
        ({"name": "directpred", "ema": False}, "complete", "method.ema true", "method.eps"),
        ({"name": "directpred"}, "dimensional", "method.name isoloss", "method.ema"),
        ({"name": "isoloss", "ema": False}, "complete", "method.ema true", "isoloss"),
        ({"name": "isoloss"}, "dimensional", "method.eps 0.25", "method.ema"),
        ({"name": "simsiam"}, "complete", "method.name byol", "method.ema"),
        ({"name": "byol"}, "complete", "optimizer.lr below 0.008", "method."),
        ({"name": "isoloss"}, "blow-up", "optimizer.lr below 0.008", "method."),
    ],
)
def test_what_to_try_fits_the_method(
    method: dict[str, Any], kind: str, first: str, never: str, config: Callable[..., Config]
) -> None:
    tries = remedies(config(**method), kind)
    assert tries[0].startswith(first)
    assert not [text for text in tries if never in text]


def test_weight_decay_is_named_where_it_can_help(config: Callable[..., Config]) -> None:
    """The cosine lets norms grow unseen; the Euclidean loss does not, and below 0 is nothing."""
    for method, kind, words in (
        ({"metric": "cosine"}, "blow-up", "weight_decay above 0.0001"),
        ({"metric": "euclidean"}, "blow-up", None),
        ({}, "complete", "weight_decay below 0.0001"),
        ({"weight_decay": 0.0}, "complete", None),
        ({"weight_decay": 0.0}, "dimensional", None),
    ):
        named = [text for text in remedies(config(**method), kind) if "weight_decay" in text]
        assert named == ([f"optimizer.{words}"] if words else [])
