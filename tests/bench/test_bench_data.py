"""What `bench/data.py` times and writes down: files for every recipe, and the paired ratio."""

import statistics
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


def test_the_record_has_the_paired_ratio(bench: ModuleType) -> None:
    """Of rounds that grow slower together, the medians' ratio is not the median of the ratios."""
    first = bench.Feeder("first", iter(()), times_ms=[10.0, 30.0, 60.0, 70.0, 80.0])
    second = bench.Feeder("second", iter(()), "decoded before", [5.0, 10.0, 15.0, 14.0, 80.0])
    timings = bench.timings_of([first, second], "question", 64, recipe_for("cifar10"))
    assert [timing.note for timing in timings] == [
        "1,067 images/s",
        "4,571 images/s; x3.00 [1.40, 4.60] of first (paired); decoded before",
    ]
    assert timings[1].median_ms == statistics.median(second.times_ms)
    assert "x3.00 [1.40, 4.60]  decoded before" in bench.show([first, second], 64)


def test_the_batch_is_what_the_presets_train_with(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read where it is used, with all that takes time left out."""
    asked: list[int] = []

    class Asked(Exception):
        pass

    def feeders(dataset: object, recipe: object, batch: int, *_: object) -> None:
        asked.append(batch)
        raise Asked

    monkeypatch.setattr(bench.harness, "tests_pass", lambda paths: True)
    monkeypatch.setattr(bench, "feeders", feeders)
    monkeypatch.setattr("sys.argv", ["data.py", "--dry"])
    with pytest.raises(Asked):
        bench.main()
    assert asked == [Config(data={"root": "x"}).train.batch_size]
