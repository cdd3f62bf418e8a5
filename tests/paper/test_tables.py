"""What a table of `isofast reproduce` says of runs that have ended, failed or crashed."""

import json
from collections.abc import Callable
from typing import Any

from isofast.paper.reproduce import PlannedRun, Request, plan
from isofast.paper.results import DATASETS, TABLES
from isofast.paper.tables import markdown_table

# Of the paper's tables: CIFAR-10, CIFAR-100, STL-10 and TinyImageNet by method and EMA.
PAPER = {
    ("table2", "byol", True): "92.6 70.5 91.7 38.3",
    ("table2", "simsiam", False): "90.7 66.3 87.5 39.8",
    ("table2", "directpred", True): "92.0 66.6 88.8 40.1",
    ("table2", "directpred", False): "12.1 1.6 10.4 1.3",
    ("table2", "isoloss", True): "91.5 69.0 89.0 44.8",
    ("table2", "isoloss", False): "91.5 64.3 87.4 40.4",
    ("table3", "directcopy", True): "91.3 68.7 89.3 45.3",
    ("table3", "directcopy", False): "12.1 1.5 10.3 0.6",
    ("table3", "isoloss", True): "91.5 69.3 89.1 45.6",
    ("table3", "isoloss", False): "91.4 63.0 86.9 38.5",
}


def test_every_number_is_the_papers() -> None:
    known = {
        (table, row.method, row.ema): row.reported for table, rows in TABLES.items() for row in rows
    }
    assert known.keys() == PAPER.keys()
    names = ["cifar10", "cifar100", "stl10", "tinyimagenet"]
    for place, cells in PAPER.items():
        reported = known[place]
        assert [reported[name].partition(" ")[0] for name in names] == cells.split(), place
        crashed = {name for name in names if "crashed" in reported[name]}
        assert crashed == ({"cifar10"} if cells.startswith("12.1") else set()), place


def test_a_part_of_the_table_has_a_file_of_its_own(request_of: Callable[..., Request]) -> None:
    paper = [*DATASETS]
    for changes, name in (
        ({"datasets": paper[::-1]}, "table.md"),
        ({"datasets": paper, "methods": ["isoloss", "byol"]}, "table-byol-isoloss.md"),
        ({"datasets": ["stl10", "digits"]}, "table-digits-stl10.md"),
        ({"datasets": paper, "seeds": 1}, "table-seeds-1.md"),
    ):
        request = request_of(**changes)
        assert request.table_path == request.folder / name


def test_notes_say_whose_numbers_the_papers_are(request_of: Callable[..., Request]) -> None:
    def table(*datasets: str, **changes: Any) -> str:
        return markdown_table("table2", plan(request_of(datasets=datasets, seeds=1, **changes)))

    assert "table2 has the trained predictors and alpha 0.5, table3 has alpha 1" in table("digits")
    assert "BYOL on CIFAR are solo-learn's" in table("cifar100")
    assert "solo-learn" not in table("stl10") + table("cifar10", methods=["isoloss"])


def test_notes_say_how_long_and_on_what_the_runs_were(request_of: Callable[..., Request]) -> None:
    runs = plan(request_of(seeds=2, epochs=2, methods=["byol"]))
    bare = markdown_table("table2", runs)
    assert "on the validation images at the end of 2 epochs: mean" in bare
    assert "Made on" not in bare
    for run, device in zip(runs, ("CPU", "H100"), strict=True):
        run.run_dir.mkdir(parents=True)
        made = {"device": device, "ranks": 2, "versions": {"torch": "2.14", "isofast": "1.0"}}
        (run.run_dir / "environment.json").write_text(json.dumps(made))
    lines = markdown_table("table2", runs).splitlines()
    of_two = "2 process(es), torch 2.14, isofast 1.0."
    assert lines[-2:] == [f"Made on CPU, {of_two}", f"Made on H100, {of_two}"]
    short = plan(request_of(seeds=1, epochs=1, methods=["byol"]))
    assert "at the end of 1 epoch:" in markdown_table("table2", short)


def test_a_cell_is_of_the_seeds_that_have_ended(request_of: Callable[..., Request]) -> None:
    runs = plan(request_of(seeds=4, methods=["directpred"]))
    with_ema, without = runs[:4], runs[4:]
    for planned, top1 in zip(with_ema, (0.5, 0.6, 0.7), strict=False):
        _leave(planned, completed=True, val_top1=top1, collapse=None)
    _leave(without[0], completed=True, val_top1=0.1, collapse="few dimensions")
    nan = "the loss became NaN"
    _leave(without[1], completed=False, val_top1=None, failure=nan, collapse=nan)
    _leave(without[2], completed=False, val_top1=0.9, failure="a rank is lost", collapse=None)
    (without[1].run_dir / "metrics.jsonl").write_text('{"step": 1, "epoch": 1, "val_top1": 0.3}\n')
    assert [planned.state() for planned in without] == ["finished", "crashed", "stopped", "new"]
    table = markdown_table("table2", runs)
    assert "| DirectPred | 0.5 | yes | 60.0 +- 10.0 (n = 3) | - |" in table
    assert "| DirectPred | 0.5 | no | 20.0 +- 14.1 (n = 2, 2 crashed) | - |" in table


def test_a_run_that_fails_after_a_warning_has_not_crashed(
    request_of: Callable[..., Request],
) -> None:
    """on_collapse=warn keeps the last warning, whatever the run then ends by."""
    runs = plan(request_of(seeds=1, methods=["directpred"]))
    few = "the embeddings have collapsed to few dimensions"
    _leave(runs[0], completed=False, val_top1=0.2, failure="no space is left", collapse=few)
    _leave(runs[1], completed=False, val_top1=0.2, failure=few, collapse=few)
    assert [planned.state() for planned in runs] == ["stopped", "crashed"]
    table = markdown_table("table2", runs)
    assert "| DirectPred | 0.5 | yes | - | - |" in table
    assert "| DirectPred | 0.5 | no | 20.0 (n = 1, 1 crashed) | - |" in table


def _leave(run: PlannedRun, **summary: Any) -> None:
    """What a run leaves in its folder."""
    run.run_dir.mkdir(parents=True)
    (run.run_dir / "config.json").write_text(run.config.model_dump_json())
    (run.run_dir / "summary.json").write_text(json.dumps(summary))


def test_raised_steps_are_trained(request_of: Callable[..., Request]) -> None:
    methods = ["simsiam"]
    (short,) = plan(request_of(seeds=1, methods=methods, overrides=["train.max_steps=5"]))
    _leave(short, completed=True, val_top1=0.2, collapse=None)
    assert short.state() == "finished"
    (longer,) = plan(request_of(seeds=1, methods=methods))
    assert longer.state() == "stopped"
