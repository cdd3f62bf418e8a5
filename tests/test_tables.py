"""What a table of `isofast reproduce` says of runs that have ended, failed or crashed."""

import json
from collections.abc import Callable
from typing import Any

from isofast.paper import DATASETS
from isofast.reproduce import PlannedRun, Request, plan
from isofast.reproduce_table import markdown_table


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
