"""The table of `isofast reproduce` for runs that finished, failed or crashed."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from isofast.errors import UserError
from isofast.paper.reproduce import render, reproduce, run_command
from isofast.paper.tables import DATASETS, TABLES, PlannedRun

# table, method, EMA, then CIFAR-10, CIFAR-100, STL-10 and TinyImageNet
PAPER = """
table2 byol True 92.6 70.5 91.7 38.3
table2 simsiam False 90.7 66.3 87.5 39.8
table2 directpred True 92.0 66.6 88.8 40.1
table2 directpred False 12.1 (crashed) 1.6 10.4 1.3
table2 isoloss True 91.5 69.0 89.0 44.8
table2 isoloss False 91.5 64.3 87.4 40.4
table3 directcopy True 91.3 68.7 89.3 45.3
table3 directcopy False 12.1 (crashed) 1.5 10.3 0.6
table3 isoloss True 91.5 69.3 89.1 45.6
table3 isoloss False 91.4 63.0 86.9 38.5
"""


def test_every_number_is_the_papers():
    lines = PAPER.splitlines()[1:]
    for table, row in ((name, row) for name, rows in TABLES.items() for row in rows):
        reported = [row.reported[name] for name in ("cifar10", "cifar100", "stl10", "tinyimagenet")]
        assert " ".join([table, row.method, str(row.ema), *reported]) == lines.pop(0)
        trained = row.method in ("byol", "simsiam")
        assert row.alpha == (None if trained else {"table2": 0.5, "table3": 1.0}[table])
    assert lines == []


def test_a_part_of_the_table_has_its_own_file(request_of):
    part = {"datasets": ["stl10", "digits"], "methods": ["isoloss", "byol"]}
    assert request_of(**part).table_path.name == "table-digits-stl10-byol-isoloss.md"
    request = request_of(datasets=[*DATASETS][::-1])
    assert request.table_path == request.folder / "table.md"


def test_a_dataset_has_a_section_with_the_papers_numbers(request_of):
    request = request_of(datasets=["cifar100", "digits"], methods=["directpred"])
    lines = render(request, request.plan()).splitlines()
    assert lines[0] == "# Table 2"
    sections = [lines.index(name) for name in ("## CIFAR-100", "## digits")]
    rows = [[line for line in lines[at:] if line.startswith("| Direct")][:2] for at in sections]
    nothing = "- | - | - | - | 0 of 0"
    for (with_ema, without), papers in zip(rows, (("66.6", "1.6"), ("-", "-")), strict=True):
        assert with_ema == f"| DirectPred | 0.5 | yes | {nothing} | {papers[0]} |"
        assert without == f"| DirectPred | 0.5 | no | {nothing} | {papers[1]} |"


def test_notes_tell_how_long_and_where_the_runs_were_made(request_of):
    request = request_of(seeds=2, epochs=2, methods=["byol"])
    runs = request.plan()
    bare = render(request, runs)
    assert "2 epochs" in bare and "table3 has alpha 1" in bare and "Made on" not in bare
    for run, device in zip(runs, ("CPU", "H100"), strict=True):
        run.run_dir.mkdir(parents=True)
        made = {"device": device, "ranks": 2, "versions": {"torch": "2.14", "isofast": "1.0"}}
        (run.run_dir / "environment.json").write_text(json.dumps(made))
    lines = render(request, runs).splitlines()
    of_two = "2 process(es), torch 2.14, isofast 1.0."
    assert lines[-2:] == [f"Made on CPU, {of_two}", f"Made on H100, {of_two}"]


def test_only_short_runs_warn_of_a_comparison(request_of):
    for dataset, epochs, warns in (("cifar10", None, False), ("cifar10", 9, True)):
        request = request_of(datasets=[dataset], epochs=epochs, seeds=1)
        table = render(request, request.plan())
        assert ("--set method.correlation=embeddings uses the paper's" in table) == warns


def test_a_cell_is_the_mean_of_the_seeds_that_ended(request_of):
    request = request_of(seeds=4, methods=["directpred"])
    runs = request.plan()
    with_ema, without = runs[:4], runs[4:]
    for planned, top1 in zip(with_ema, (0.5, 0.6, 0.85), strict=False):
        _leave(planned, val_top1=top1)
    few, nan = "few dimensions", "the loss became NaN"
    knn = {"knn_top1_initial": 0.15, "knn_top1": 0.2}
    _leave(without[0], val_top1=0.1, **knn, effective_rank=1.5, collapse=few)
    _leave(without[1], failure=nan, collapse=nan)
    # on_collapse=warn keeps the last warning, whatever ends the run
    _leave(without[2], val_top1=0.9, failure="a rank is lost", collapse=few)
    # the last accuracy of a run that crashed
    (without[1].run_dir / "metrics.jsonl").write_text(
        "".join(f'{{"step": {step}, "epoch": 1, "val_top1": {step / 10}}}\n' for step in (1, 3))
    )
    assert [planned.state() for planned in without] == ["finished", "crashed", "stopped", "new"]
    table = render(request, runs)
    assert "| DirectPred | 0.5 | yes | - | - | 65.0 +- 18.0 | - | 0 of 3 | - |" in table
    assert "| DirectPred | 0.5 | no | 15.0 | 20.0 | 20.0 +- 14.1 | 1.5 | 2 of 2 | - |" in table


def test_more_steps_are_trained(request_of):
    methods = ["simsiam"]
    (short,) = request_of(seeds=1, methods=methods, overrides=["train.max_steps=5"]).plan()
    _leave(short, val_top1=0.2)
    assert short.state() == "finished"
    (longer,) = request_of(seeds=1, methods=methods).plan()
    assert longer.state() == "stopped"
    other = request_of(seeds=1, methods=methods, overrides=["train.batch_size=32"])
    with pytest.raises(UserError, match=r"train\.batch_size: 64 -> 32(?s:.*)--runs"):
        other.plan()


def test_figures_are_of_the_first_seed(request_of, monkeypatch):
    drawn: list[Any] = []

    def draw(number: int, folders: list[Path], output: Path) -> list[Path]:
        drawn.append((number, folders))
        return []

    monkeypatch.setattr("isofast.paper.reproduce.draw", draw)
    request = request_of(seeds=2, methods=["simsiam", "isoloss"], scale="small")
    for run in request.plan():
        _leave(run, val_top1=0.5)
    reproduce(request, lambda text: None)
    first = [run.run_dir for run in request.plan() if run.seed == 0]
    assert drawn == [(3, first), (7, first[1:])]


def test_a_run_under_nohup_ignores_hang_ups():
    hang_up = "import os, signal, time; os.kill(os.getppid(), signal.SIGHUP); time.sleep(0.1)"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run_command([sys.executable, "-c", hang_up]) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def _leave(run: PlannedRun, **summary: Any) -> None:
    """Write what a run leaves in its folder."""
    summary = {"failure": None, "collapse": None, **summary}
    summary["completed"] = summary["failure"] is None
    run.run_dir.mkdir(parents=True)
    (run.run_dir / "config.json").write_text(run.config.model_dump_json())
    (run.run_dir / "summary.json").write_text(json.dumps(summary))
