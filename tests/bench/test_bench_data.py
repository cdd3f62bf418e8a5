"""`bench/data.py`: its generated files, and the notes of its table."""

from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from isofast.config.presets import VIEWS_OF_DATASET
from isofast.config.schema import Config
from isofast.data.recipe import recipe_for

from ..conftest import load_script

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, as Python finds it when it is run."""
    monkeypatch.syspath_prepend(str(BENCH))
    module = load_script(BENCH / "data.py")
    monkeypatch.setattr(module, "GENERATED", 20)
    return module


@pytest.mark.parametrize(
    "side", sorted({recipe_for(name).crop for name in VIEWS_OF_DATASET} | {600})
)
def test_pictures_are_made_in_the_size_of_every_recipe(
    tmp_path: Path, bench: ModuleType, side: int
) -> None:
    """Also where the photographs, 640 x 427 pixels, have no four times larger square, or none."""
    bench.generate(tmp_path, side)
    files = sorted(tmp_path.glob("train/class?/*.jpg"))
    assert len(files) == 20
    assert len({path.read_bytes() for path in files}) > 15
    for path in files:
        with Image.open(path) as image:
            assert image.size == (side, side)


def test_the_notes_have_the_paired_ratio(bench: ModuleType) -> None:
    """When rounds slow down together, the ratio of medians is not the median of ratios."""
    first, second = (
        bench.Contender(name, lambda: None, note, times_ms)
        for name, note, times_ms in (
            ("first", "", [10.0, 30.0, 60.0, 70.0, 80.0]),
            ("second", "decoded before", [5.0, 10.0, 15.0, 14.0, 80.0]),
        )
    )
    bench.add_speeds([first, second], 64)
    assert first.note == "1,067 images/s"
    ratio = "x3.00 [1.40, 4.60] of first (paired)"
    assert second.note == f"4,571 images/s; {ratio}; decoded before"


def test_the_batch_is_that_of_the_presets(
    bench: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        bench.main(["--help"])
    default = f"images per batch (default: {Config(data={'root': 'x'}).train.batch_size})"
    assert default in " ".join(capsys.readouterr().out.split())
