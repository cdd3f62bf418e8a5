"""`isofast reproduce`: the plan, the runs, an interruption, the printed table."""

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from isofast.cli import main, parser_of_all
from isofast.config.load import load_config
from isofast.errors import UserError
from isofast.paper.tables import TABLES

from ..support.runs import ISOFAST, Process, call, opened, wait_for_step

pytestmark = pytest.mark.slow

# a small network and short runs on the digits
SMALL = [
    *("encoder.width=4", "projector.hidden=32", "projector.output=16", "data.threads=1"),
    *("checkpoint.every_steps=3", "logging.every_steps=1", "logging.loggers=[]"),
    *("evaluation.knn_images=100",),
]


def command(root: Path, runs: Path, *more: str, seeds: int = 1) -> list[str]:
    """`isofast reproduce table2 --datasets digits ...` in the digits' data root."""
    where = ["--datasets", "digits", "--root", str(root.parent), "--runs", str(runs)]
    settings = [word for setting in SMALL for word in ("--set", setting)]
    return ["reproduce", "table2", *where, "--seeds", str(seeds), *settings, *more]


def start(arguments: list[str]) -> Process:
    """Start the command in its own process group, on the CPU."""
    own = {"start_new_session": True, "preexec_fn": _hear_signals}
    return opened([*ISOFAST, *arguments], stdout=subprocess.PIPE, **own)


def _hear_signals() -> None:
    """Restore the signals that a shell's background jobs ignore."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def run(arguments: list[str], *, code: int = 0) -> tuple[str, str]:
    done = call([*ISOFAST, *arguments], code=code)
    return done.stdout, done.stderr


@pytest.mark.long
def test_a_killed_table_continues_and_is_printed(digits, tmp_path):
    arguments = command(digits, tmp_path, "--methods", "simsiam", "--epochs", "2", seeds=2)
    first = tmp_path / "table2" / "digits" / "simsiam" / "seed-0"
    victim = start(arguments)
    wait_for_step(6, first, victim)
    table = psutil.Process(victim.pid)
    for process in [table, *table.children(recursive=True)]:
        process.kill()
    printed, _ = victim.communicate()
    assert "[1/2] digits, SimSiam, no EMA, seed 0: starts" in printed and "[2/2]" not in printed
    assert not (first / "summary.json").exists()

    out, err = run(arguments)
    assert "[1/2] digits, SimSiam, no EMA, seed 0: continues" in out and "continuing from" in err
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
    row = f" | {mean:.1f} +- {spread:.1f} | "
    table = (tmp_path / "table2" / "table-digits-simsiam-seeds-2.md").read_text()
    assert table.count("| SimSiam | - | no | - | ") == table.count(row) == 1 and table in out

    # nothing is left to do
    again, _ = run(arguments)
    assert again.count("finished before") == 2 and table in again
    # the settings differ from those of the existing runs
    _, err = run([*arguments, "--set", "train.batch_size=32"], code=2)
    assert "train.batch_size: 64 -> 32" in err and "--runs" in err


@pytest.mark.long
def test_the_small_scale_shows_before_and_after_and_draws_its_figures(digits, tmp_path):
    arguments = command(digits, tmp_path, "--scale", "small", "--methods", "isoloss")
    out, _ = run([*arguments, "--epochs", "1"])
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
        optimizer = config["optimizer"]
        assert (optimizer["name"], optimizer["lr"]) == ("sgd", 0.3)
    drawn = {path.name for path in (folder / "table-digits-isoloss-seeds-1" / "digits").iterdir()}
    assert drawn == {f"figure{number}.{kind}" for number in (3, 7) for kind in ("png", "svg")}


@pytest.mark.long
@pytest.mark.parametrize(
    ("found_first", "what"),
    [
        (["logging.every_steps=1"], "the loss became NaN"),
        (["checkpoint.every_steps=3", "logging.every_steps=50"], "a parameter became NaN"),
    ],
    ids=["record", "checkpoint"],
)
def test_a_run_that_blows_up_is_a_result(found_first, what, digits, tmp_path):
    blown = ("optimizer.name=sgd", "optimizer.lr=1e30", "schedule.warmup_epochs=0")
    more = [word for setting in (*blown, *found_first) for word in ("--set", setting)]
    arguments = command(digits, tmp_path, *more, "--methods", "simsiam")
    out, err = run(arguments)
    assert "seed 0: crashed" in out and what in err and "optimizer.lr below 1e+30" in err
    (row,) = [line.split(" | ") for line in out.splitlines() if line.startswith("| SimSiam")]
    assert row[7:] == ["1 of 1", "- |"]
    assert "seed 0: crashed before" in run(arguments)[0]


@pytest.mark.parametrize(
    ("code", "says"), [(3, "exit code 3\n"), (0, "exit code 0, before its run ended: use srun")]
)
def test_failed_runs_do_not_stop_the_others(code, says, digits, tmp_path, capsys):
    launcher = f"{sys.executable} -c 'import sys; sys.exit({code})'"
    assert main(command(digits, tmp_path, "--launcher", launcher)) == 1
    out, err = capsys.readouterr()
    assert out.count(f"FAILED with {says}") == len(TABLES["table2"]) == 6
    assert "| IsoLoss | 0.5 | no | - | - | - | - | 0 of 0 | - |" in out
    assert "6 of 6 runs failed" in err


def test_the_plan_is_the_table(request_of):
    datasets = ["cifar10", "cifar100", "stl10", "tinyimagenet"]
    runs = request_of(datasets=[], epochs=7, launcher=["deepspeed", "-x"]).plan()
    assert list(dict.fromkeys(run.dataset for run in runs)) == datasets
    assert len(runs) == 4 * 6 * 5 == len({run.run_dir for run in runs})
    for planned in runs:
        method, row = planned.config.method, planned.row
        assert (method.name, method.ema) == (row.method, row.ema)
        assert row.alpha is None or method.alpha == row.alpha
        assert planned.config.train.epochs == 7 and planned.config.seed == planned.seed
        assert planned.config.data.dataset == planned.dataset
        # for runs of 7 epochs
        assert method.decay == (0.99 if row.alpha is None else 0.9 if row.ema else 0.0)
        assert planned.command[:2] == ("deepspeed", "-x")
        assert planned.command[2].endswith("launch/train.py")
    shipped = request_of(table="table3", datasets=["stl10"], seeds=1).plan()
    assert [(run.config.method.alpha, run.config.method.eps) for run in shipped] == [(1, 0.25)] * 4
    assert {run.config.train.epochs for run in shipped} == {1000}
    assert {run.row.ema: run.config.method.decay for run in shipped} == {True: 0.998, False: 0.5}
    # the method and optimizer sections of quickstart.json do not apply to tables
    digits = request_of(methods=["isoloss"]).plan()
    assert {run.config.optimizer.name for run in digits} == {"sgd"}
    assert {run.row.ema: run.config.method.decay for run in digits} == {True: 0.9, False: 0.5}
    for small in request_of(datasets=["cifar10", "tinyimagenet"], scale="small").plan():
        assert (small.config.encoder.width, small.config.train.epochs) == (16, 10)
        assert small.config.evaluation.at_start


def test_a_dry_run_prints_commands_that_work(tmp_path, capsys):
    given = ["reproduce", "table3", "--datasets", "cifar10,digits", "--seeds", "1", "--dry-run"]
    runs = tmp_path / "runs"
    more = ["--root", "data", "--runs", str(runs), "--methods", "isoloss"]
    more += ["--set", "encoder.width=4"]
    assert main([*given, *more, "--launcher", "srun -n 4 python"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 2 * 2 and "IsoLoss alpha 1, EMA, seed 0 (new)" in lines[0]
    assert lines[1].startswith("  srun -n 4 python ") and "seed-0.json --run-dir" in lines[1]
    for line, ema in zip(lines[1::2], (True, False, True, False), strict=True):
        args = parser_of_all().parse_args(["train", *shlex.split(line)[5:]])
        config = load_config(args.config, args.set)
        assert (config.method.name, config.method.ema, config.encoder.width) == ("isoloss", ema, 4)
        assert args.config == args.run_dir.with_suffix(".json") and not args.run_dir.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--datasets", "digits,mnist"], ["mnist", "tinyimagenet"]),
        (["--datasets", "cifar10", "digits"], ["isofast prepare cifar10 --root", "/cifar10"]),
        (["--root", "HERE/only-train"], ["isofast prepare digits --root", "only-train/digits"]),
        (["--root", "HERE/only-val"], ["isofast prepare digits --root", "only-val/digits"]),
        (["--methods", "directcopy"], ["table2 has no directcopy", "byol"]),
        (["--methods", "byol,moco"], ["table2 has no moco;", "directpred"]),
        (["--runs", "/proc/x"], ["cannot write /proc/x", "--runs"]),
        (["--runs", "/dev/null"], ["/dev/null", "--runs"]),
        (["--set", "encoder.widht=8"], ["Did you mean encoder.width"]),
        (["--launcher", "no-such-program"], ["--launcher"]),
        (["--launcher", "srun 'x"], ["argument --launcher", "srun 'x", "invalid split value"]),
        (["--datasets", ","], ["argument --datasets: expected at least one name, got ','"]),
        (["--methods", ","], ["argument --methods: expected at least one name, got ','"]),
        (["--seeds", "0"], ["argument --seeds: expected a whole number of at least 1, got '0'"]),
    ],
)
def test_mistakes_are_refused_before_anything_runs(arguments, words, digits, tmp_path, refused):
    for split in ("train", "val"):
        (tmp_path / f"only-{split}" / "digits" / split).mkdir(parents=True)
    given = [word.replace("HERE", str(tmp_path)) for word in arguments]
    refused([*command(digits, tmp_path / "runs"), *given], *words)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=3", "seed"),
        ("method.alpha=1", "method.alpha"),
        ('method={"name": "byol"}', "method.name"),
        ('method={"name": "isoloss", "ema": false}', "method.ema"),
        ("train.epochs=3", "train.epochs"),
        ("data.dataset=cifar10", "data.dataset"),
        ('data={"dataset": "digits", "root": "/other"}', "data.root"),
    ],
)
def test_the_table_fixes_its_keys(override, key, request_of):
    with pytest.raises(UserError, match=rf"--set {key} is fixed by the table"):
        request_of(methods=["isoloss"], overrides=[override]).plan()
    # a section that agrees with the table is accepted
    agrees = 'method={"name": "byol", "ema_base": 0.98}'
    (run, *_) = request_of(methods=["byol"], overrides=[agrees]).plan()
    assert (run.config.method.name, run.config.method.ema_base) == ("byol", 0.98)


# a launcher that forwards no signals, and its process, which may ignore SIGINT and SIGTERM
LAUNCHER = """
import os, pathlib, signal, subprocess, sys, time
if sys.argv[1] == "launcher":
    command = [sys.executable, __file__, "rank", *sys.argv[2:]]
    sys.exit(subprocess.Popen(command, start_new_session=sys.argv[3] == "own-session").wait())
if sys.argv[2] == "deaf":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
note = pathlib.Path(__file__).with_name("part")
note.write_text(str(os.getpid()))
note.rename(note.with_name("pid"))
try:
    time.sleep(100)
except KeyboardInterrupt:
    time.sleep(1)
    note.with_name("ended").touch()
"""


@pytest.mark.parametrize(
    ("number", "child", "session"),
    [
        (signal.SIGINT, "deaf", "own-session"),
        (signal.SIGTERM, "deaf", "same-session"),
        # a closed terminal
        (signal.SIGHUP, "polite", "same-session"),
    ],
)
def test_an_interruption_leaves_nothing_running(number, child, session, digits, tmp_path):
    script, note = tmp_path / "launcher.py", tmp_path / "pid"
    script.write_text(LAUNCHER)
    launcher = f"{sys.executable} {script} launcher {child} {session}"
    process = start(command(digits, tmp_path, "--launcher", launcher))
    while not note.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    pid = int(note.read_text())
    # an impatient user: the second and third signal cause SIGTERM and SIGKILL at once
    for _ in range(3 if child == "deaf" else 1):
        process.send_signal(number)
        time.sleep(0.5)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted; rerun the same command" in err
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie"
    # a process that received it ended by itself
    assert (tmp_path / "ended").exists() == (child == "polite")
