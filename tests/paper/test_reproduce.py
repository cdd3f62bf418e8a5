"""`isofast reproduce`: planned, killed, gone on with, printed."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from isofast.cli import main
from isofast.config.load import load_config
from isofast.errors import UserError
from isofast.paper import reproduce_cli
from isofast.paper.reproduce import Request, check_data, plan
from isofast.paper.results import TABLES
from isofast.run.metrics import read_metrics

pytestmark = pytest.mark.slow

# a small network and short runs on the digits
SMALL = [
    *("encoder.width=4", "projector.hidden=32", "projector.output=16", "data.threads=1"),
    *("checkpoint.every_steps=3", "logging.every_steps=1", "logging.loggers=[]"),
    *("evaluation.knn_images=100",),
]


def command(root: Path, runs: Path, *more: str, small: bool = True) -> list[str]:
    """`isofast reproduce table2 --datasets digits ...` in the digits' data root."""
    settings = [word for setting in SMALL if small for word in ("--set", setting)]
    where = ["--root", str(root.parent), "--runs", str(runs)]
    start = [sys.executable, "-m", "isofast.cli", "reproduce", "table2", "--datasets", "digits"]
    return [*start, *where, *settings, *more]


def start(arguments: list[str]) -> "subprocess.Popen[str]":
    """In a process group of its own, on the CPU."""
    return subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_hear_signals,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def _hear_signals() -> None:
    """What a shell or nohup has started in the background ignores these, and all it starts too."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def run(arguments: list[str]) -> tuple[int, str, str]:
    process = start(arguments)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_until(holds: Callable[[], Any], process: "subprocess.Popen[str]") -> None:
    while not holds():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_a_killed_table_goes_on_and_is_printed(digits: Path, tmp_path: Path) -> None:
    arguments = command(digits, tmp_path, "--methods", "simsiam", "--seeds", "2", "--epochs", "2")
    first = tmp_path / "table2" / "digits" / "simsiam" / "seed-0"
    victim = start(arguments)
    wait_until(lambda: len(read_metrics(first / "metrics.jsonl")) > 5, victim)
    table = psutil.Process(victim.pid)
    for process in [table, *table.children(recursive=True)]:
        process.kill()
    printed, _ = victim.communicate()
    assert "[1/2] digits, SimSiam, no EMA, seed 0: starts" in printed and "[2/2]" not in printed
    assert not (first / "summary.json").exists()

    code, out, err = run(arguments)
    assert code == 0, err
    assert "[1/2] digits, SimSiam, no EMA, seed 0: goes on" in out and "continuing from" in err
    assert "[2/2] digits, SimSiam, no EMA, seed 1: starts" in out
    top1 = []
    for seed in (0, 1):
        folder = first.with_name(f"seed-{seed}")
        summary = json.loads((folder / "summary.json").read_text())
        config = json.loads((folder / "config.json").read_text())
        assert summary["completed"] and summary["epochs"] == 2 and summary["steps"] == 44
        assert config["seed"] == seed and config["encoder"]["width"] == 4
        assert config["method"]["name"] == "simsiam" and not config["method"]["ema"]
        top1.append(100 * summary["val_top1"])
    mean, spread = sum(top1) / 2, abs(top1[0] - top1[1]) / 2**0.5
    row = f"| SimSiam | - | no | {mean:.1f} +- {spread:.1f} (n = 2) | - |"
    table = (tmp_path / "table2" / "table-digits-simsiam-seeds-2.md").read_text()
    assert row in table.splitlines() and table in out

    # nothing is left to do
    code, again, _ = run(arguments)
    assert code == 0 and again.count("finished before") == 2 and table in again
    # what was asked for is not what is there
    code, _, err = run([*arguments, "--set", "train.batch_size=32"])
    assert code == 2 and "train.batch_size: 64 -> 32" in err and "--runs" in err


def test_the_small_scale_says_before_and_after_and_draws_its_figures(
    digits: Path, tmp_path: Path
) -> None:
    arguments = command(digits, tmp_path, "--scale", "small", "--methods", "isoloss")
    code, out, err = run([*arguments, "--epochs", "1"])
    assert code == 0, err
    folder = tmp_path / "table2-small"
    table = (folder / "table-digits-isoloss-seeds-1.md").read_text()
    assert table in out
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| IsoLoss")]
    assert [row[2] for row in rows] == ["yes", "no"]
    for row, name in zip(rows, ("isoloss", "isoloss-no-ema"), strict=True):
        run_dir = folder / "digits" / name / "seed-0"
        summary = json.loads((run_dir / "summary.json").read_text())
        percents = [100 * summary[key] for key in ("knn_top1_initial", "knn_top1", "val_top1")]
        assert row[3:7] == [f"{x:.1f}" for x in (*percents, summary["effective_rank"])]
        config = json.loads((run_dir / "config.json").read_text())
        assert config["method"]["correlation"] == "directions"
        assert config["optimizer"]["name"] == ("adamw" if name == "isoloss" else "sgd")
    drawn = {path.name for path in (folder / "table-digits-isoloss-seeds-1" / "digits").iterdir()}
    assert drawn == {f"figure{number}.{kind}" for number in (3, 7) for kind in ("png", "svg")}


@pytest.mark.parametrize("dataset", ["cifar10", "tinyimagenet"])
def test_the_small_scale_is_a_narrow_network_for_ten_epochs(dataset: str, tmp_path: Path) -> None:
    runs = plan(Request("table2", [dataset], tmp_path, tmp_path, seeds=1, scale="small"))
    assert len(runs) == len(TABLES["table2"])
    assert {(r.config.encoder.width, r.config.train.epochs) for r in runs} == {(16, 10)}
    assert all(r.config.evaluation.at_start for r in runs)


@pytest.mark.parametrize(
    ("found_first", "what"),
    [
        (["logging.every_steps=1"], "the loss became NaN"),
        (["checkpoint.every_steps=3", "logging.every_steps=50"], "a parameter became NaN"),
    ],
    ids=["record", "checkpoint"],
)
def test_a_run_that_blows_up_is_a_result(
    found_first: list[str], what: str, digits: Path, tmp_path: Path
) -> None:
    blown = ("optimizer.name=sgd", "optimizer.lr=1e30", "schedule.warmup_epochs=0")
    more = [word for setting in (*blown, *found_first) for word in ("--set", setting)]
    arguments = command(digits, tmp_path, *more, "--methods", "simsiam", "--seeds", "1")
    code, out, err = run(arguments)
    assert code == 0, err
    assert "seed 0: crashed" in out and what in err and "optimizer.lr below 1e+30" in err
    assert "| SimSiam | - | no | no accuracy (n = 1, 1 crashed) | - |" in out
    assert "seed 0: crashed before" in run(arguments)[1]


def test_failed_runs_do_not_stop_the_others(digits: Path, tmp_path: Path) -> None:
    launcher = f"{sys.executable} -c 'import sys; sys.exit(3)'"
    arguments = command(digits, tmp_path, "--launcher", launcher, "--seeds", "1")
    code, out, err = run(arguments)
    assert code == 1
    assert out.count("FAILED with exit code 3") == len(TABLES["table2"]) == 6
    assert "| IsoLoss | 0.5 | no | - | - |" in out and "6 of 6 runs failed" in err


def test_a_launcher_that_does_not_wait_for_the_run_is_told(
    request_of: Callable[..., Request], capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = request_of(methods=["simsiam"], seeds=1)
    where = ["--root", str(wanted.root), "--runs", str(wanted.runs), "--datasets", "digits"]
    given = ["reproduce", "table2", *where, "--methods", "simsiam", "--seeds", "1"]
    assert main([*given, "--launcher", "true"]) == 1
    out, err = capsys.readouterr()
    assert "FAILED: --launcher ended before the run, with exit code 0" in out and "sbatch" in out
    assert "1 of 1 runs failed" in err
    assert "| SimSiam | - | no | - | - |" in wanted.table_path.with_name(
        "table-digits-simsiam-seeds-1.md"
    ).read_text(encoding="utf-8")


def test_the_plan_is_the_table(request_of: Callable[..., Request]) -> None:
    datasets = ["cifar10", "cifar100", "stl10", "tinyimagenet"]
    runs = plan(request_of(datasets=datasets, seeds=5, epochs=7, launcher=["deepspeed", "-x"]))
    assert len(runs) == 4 * 6 * 5 == len({run.run_dir for run in runs})
    for planned in runs:
        method, row = planned.config.method, planned.row
        assert (method.name, method.ema) == (row.method, row.ema)
        assert row.alpha is None or method.alpha == row.alpha
        assert planned.config.train.epochs == 7 and planned.config.seed == planned.seed
        assert planned.config.data.dataset == planned.dataset
        # the paper's: 0.998 with EMA, 0.5 without, and 0.99 where the predictor is trained
        decay = 0.99 if row.alpha is None else 0.998 if row.ema else 0.5
        assert method.decay == decay
        assert planned.command[:2] == ("deepspeed", "-x")
        assert planned.command[2].endswith("launch/train.py")
    shipped = plan(request_of(table="table3", datasets=["stl10"], seeds=1))
    assert [(run.config.method.alpha, run.config.method.eps) for run in shipped] == [(1, 0.25)] * 4
    assert {run.config.train.epochs for run in shipped} == {1000}


def test_a_shipped_decay_is_of_runs_with_ema_alone(request_of: Callable[..., Request]) -> None:
    """quickstart.json has one for runs of a minute; no EMA leaves no time for a memory of C."""
    runs = plan(request_of(methods=["isoloss"]))
    assert {run.row.ema: run.config.method.decay for run in runs} == {True: 0.99, False: 0.5}


def test_the_command_line_knows_the_tables() -> None:
    assert set(reproduce_cli.TABLES) == set(TABLES)
    known = {name for rows in TABLES.values() for row in rows for name in row.reported}
    assert known == set(reproduce_cli.DATASETS) - {"digits"}


def test_a_root_without_validation_images_is_missing(
    request_of: Callable[..., Request], tmp_path: Path
) -> None:
    (tmp_path / "digits" / "train").mkdir(parents=True)
    request = request_of(root=tmp_path)
    with pytest.raises(UserError, match=f"isofast prepare digits --root {tmp_path / 'digits'}"):
        check_data(request)
    (tmp_path / "digits" / "val").mkdir()
    check_data(request)


def test_a_dry_run_prints_commands_that_can_be_given(
    tmp_path: Path, launch: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["reproduce", "table3", "--datasets", "cifar10,digits", "--seeds", "1", "--dry-run"]
    runs = tmp_path / "runs"
    more = ["--root", "data", "--runs", str(runs), "--methods", "isoloss"]
    more += ["--set", "encoder.width=4"]
    assert main([*given, *more, "--launcher", "srun -n 4 python"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 2 * 2 and "IsoLoss alpha 1, EMA, seed 0 (new)" in lines[0]
    assert lines[1].startswith("  srun -n 4 python ") and "seed-0.json --run-dir" in lines[1]
    for line, ema in zip(lines[1::2], (True, False, True, False), strict=True):
        args = launch.parse_arguments(shlex.split(line)[5:])
        config = load_config(args.config, args.set)
        assert (config.method.name, config.method.ema, config.encoder.width) == ("isoloss", ema, 4)
        assert args.config == args.run_dir.with_suffix(".json") and not args.run_dir.exists()
    assert main([*given, *more, "--set", "train.epochs=1"]) == 2
    assert "use --seeds, --epochs" in capsys.readouterr().err


def test_a_dry_run_leaves_a_run_that_has_begun_its_config(
    request_of: Callable[..., Request], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = request_of(methods=["simsiam"], seeds=2)
    given = ["reproduce", "table2", "--datasets", "digits", "--methods", "simsiam", "--seeds", "2"]
    given += ["--runs", str(wanted.runs), "--dry-run"]
    assert main([*given, "--root", str(wanted.root)]) == 0
    begun, new = plan(wanted)
    begun.run_dir.mkdir()
    (begun.run_dir / "config.json").write_text(begun.config.model_dump_json())
    before = begun.config_path.read_text()
    assert main([*given, "--root", "/moved"]) == 0
    assert begun.config_path.read_text() == before
    assert json.loads(new.config_path.read_text())["data"]["root"] == "/moved/digits"
    printed = capsys.readouterr().out
    assert printed.count("(stopped; its config file differs and stays as it is)") == 1
    begun.config_path.unlink()
    assert main([*given, "--root", str(wanted.root)]) == 0
    assert begun.config_path.read_text() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--datasets", "digits,mnist"], ["mnist", "tinyimagenet"]),
        (["--datasets", "cifar10", "digits"], ["isofast prepare cifar10 --root", "/cifar10"]),
        (["--datasets", "digits", "--methods", "directcopy"], ["table2 has no directcopy", "byol"]),
        (["--datasets", "digits", "--methods", "byol,moco"], ["table2 has no moco;", "directpred"]),
        (["--datasets", "digits", "--runs", "/proc/x"], ["cannot write to /proc/x", "--runs"]),
        (["--datasets", "digits", "--runs", "/dev/null"], ["/dev/null", "--runs"]),
        (["--datasets", "digits", "--set", "encoder.widht=8"], ["Did you mean encoder.width"]),
        (["--datasets", "digits", "--train-script", "no.py"], ["no.py", "--train-script"]),
        (["--datasets", "digits", "--launcher", "no-such-program"], ["--launcher"]),
        (["--datasets", "digits", "--launcher", "srun 'x"], ["srun 'x", "No closing quotation"]),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    arguments: list[str],
    words: list[str],
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    where = ["--root", str(digits.parent), "--runs", str(tmp_path / "runs")]
    where += ["--seeds", "1", "--epochs", "1"]
    assert main(["reproduce", "table2", *where, *arguments]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    for word in words:
        assert word in error


@pytest.mark.parametrize("option", ["--datasets", "--methods"])
def test_a_list_without_names_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["reproduce", "table2", "--root", "data", option, ","])
    assert ended.value.code == 2
    assert f"argument {option}: at least one name is wanted, got ','" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=3", "seed"),
        ("method.alpha=1", "method.alpha"),
        ('method={"name": "isoloss"}', "method.name"),
        ('method={"name": "byol", "ema": false}', "method.ema"),
        ('train={"epochs": 3}', "train.epochs"),
        ('data={"dataset": "digits", "root": "/other"}', "data.root"),
    ],
)
def test_what_the_table_decides_is_not_overridden(
    override: str, key: str, request_of: Callable[..., Request]
) -> None:
    with pytest.raises(UserError, match=rf"--set {key} is what the table decides"):
        plan(request_of(methods=["byol"], overrides=[override]))


def test_a_section_that_agrees_with_the_table_is_taken(
    request_of: Callable[..., Request],
) -> None:
    override = 'method={"name": "byol", "ema_base": 0.98}'
    (run, *_) = plan(request_of(methods=["byol"], overrides=[override]))
    assert (run.config.method.name, run.config.method.ema_base) == ("byol", 0.98)
