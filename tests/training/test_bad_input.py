"""What a user may get wrong: exit code 2, a message with the remedy, nothing lost."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from isofast.config.schema import Config
from isofast.run.directory import open_run_dir

from ..support.launcher import launcher_of

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
Write = Callable[..., Path]


@pytest.fixture
def refused(
    launch: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., str]:
    """Runs launch/train.py with arguments that it must refuse; gives the message."""

    def run(*arguments: str | Path, run_dir: Path | None = None) -> str:
        chosen = run_dir or tmp_path / "run"
        code = launch.main([*(str(a) for a in arguments), "--run-dir", str(chosen)])
        message = capsys.readouterr().err
        assert code == 2
        assert "Traceback" not in message
        return message

    return run


def test_unknown_key(refused: Callable[..., str], config_file: Write) -> None:
    message = refused("--config", config_file(), "--set", "method.alhpa=1")
    assert "method.alhpa: unknown key" in message and "method.alpha" in message


def test_wrong_type(refused: Callable[..., str], config_file: Write) -> None:
    assert "train.epochs: got 'many'" in refused(
        "--config", config_file(), "--set", "train.epochs=many"
    )


def test_checkpoint_every_zero_steps(refused: Callable[..., str], config_file: Write) -> None:
    message = refused("--config", config_file(), "--set", "checkpoint.every_steps=0")
    assert "checkpoint.every_steps: got 0" in message and "greater than or equal to 1" in message


def test_missing_config(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "no config file" in refused("--config", tmp_path / "nothing.json")


def test_missing_data_root(refused: Callable[..., str], config_file: Write, tmp_path: Path) -> None:
    message = refused("--config", config_file(), "--set", f"data.root={tmp_path / 'none'}")
    assert str(tmp_path / "none") in message and "isofast prepare" in message
    assert not (tmp_path / "run").exists()


def test_empty_class_folder(
    refused: Callable[..., str], config_file: Write, digits: Path, tmp_path: Path
) -> None:
    root = tmp_path / "digits"
    shutil.copytree(digits, root)
    for image in (root / "train" / "3").iterdir():
        image.unlink()
    message = refused("--config", config_file(), "--set", f"data.root={root}")
    assert str(root / "train" / "3") in message


@pytest.mark.parametrize("content", [b"", b"this is text", None], ids=["empty", "text", "cut"])
def test_a_file_that_is_no_image(
    refused: Callable[..., str],
    config_file: Write,
    digits: Path,
    tmp_path: Path,
    content: bytes | None,
) -> None:
    root = tmp_path / "digits"
    shutil.copytree(digits, root)
    victim = sorted((root / "train" / "5").iterdir())[7]
    victim.write_bytes(victim.read_bytes()[:60] if content is None else content)
    message = refused("--config", config_file(), "--set", f"data.root={root}")
    assert victim.name in message
    assert not (tmp_path / "run" / "config.json").exists()


def test_batch_that_does_not_divide(
    refused: Callable[..., str], config_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = refused("--config", config_file())
    assert "got 64 for 3 processes" in message and "train.batch_size=63" in message


def test_the_launcher_passes_the_exit_code_on(config_file: Write, tmp_path: Path) -> None:
    command = [sys.executable, *launcher_of(2)]
    command += [str(ROOT / "launch/train.py"), "--config", str(config_file())]
    command += ["--set", "train.batch_size=63", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.count("got 63 for 2 processes") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_changed_config_on_a_run_dir(
    refused: Callable[..., str], config_file: Write, tmp_path: Path
) -> None:
    run_dir = tmp_path / "begun"
    run_dir.mkdir()
    stored = json.dumps(json.loads(config_file().read_text()))
    (run_dir / "config.json").write_text(stored)
    message = refused(
        "--config", config_file(), "--set", "optimizer.lr=9", "--set", "seed=4", run_dir=run_dir
    )
    assert "optimizer.lr: 0.004 -> 9" in message and "seed: 0 -> 4" in message
    assert "--fresh" in message
    assert (run_dir / "config.json").read_text() == stored


def test_a_run_dir_that_is_something_else(
    refused: Callable[..., str], config_file: Write, tmp_path: Path
) -> None:
    folder = tmp_path / "holiday"
    folder.mkdir()
    (folder / "photo.jpg").write_bytes(b"x")
    assert "not a run" in refused("--config", config_file(), run_dir=folder)
    assert "is a file" in refused("--config", config_file(), run_dir=folder / "photo.jpg")
    assert [path.name for path in folder.iterdir()] == ["photo.jpg"]


def test_what_an_interrupted_first_second_leaves_is_no_obstacle(
    small_config: Callable[..., Config], tmp_path: Path
) -> None:
    for name in (".lock", ".config.json.123.part"):
        (tmp_path / name).touch()
    open_run_dir(tmp_path, small_config()).close()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("section", [{"flops_profiler": 3}, {"communication_data_type": "xyz"}])
def test_what_deepspeed_refuses(config_file: Write, tmp_path: Path, section: Any) -> None:
    command = [sys.executable, str(ROOT / "launch/train.py")]
    command += ["--config", str(config_file(deepspeed=section)), "--run-dir", str(tmp_path / "r")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "DeepSpeed refused" in done.stderr
    assert str(section) in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_run_dir_that_cannot_be_written(
    refused: Callable[..., str], config_file: Write, tmp_path: Path
) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    assert "cannot write" in refused("--config", config_file(), run_dir=folder / "run")


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"train_batch_size": 3}, "train.batch_size"),
        ({"bf16": {"enabled": True}}, "train.precision"),
        ({"zero_optimization": {"stage": 1}}, "stage must be 0"),
    ],
    ids=["derived", "precision", "zero"],
)
def test_deepspeed_settings_that_isofast_derives(
    refused: Callable[..., str], config_file: Write, section: dict[str, Any], words: str
) -> None:
    assert words in refused("--config", config_file(deepspeed=section))


def test_more_batch_than_images(
    refused: Callable[..., str], config_file: Write, tmp_path: Path
) -> None:
    message = refused("--config", config_file(), "--set", "train.batch_size=2000")
    assert "1442" in message.replace(",", "") and "2000" in message.replace(",", "")
    # nothing was begun, so that the corrected command is not refused
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_port_that_is_taken(config_file: Write, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        env = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        env["MASTER_PORT"] = str(taken.getsockname()[1])
        command = [sys.executable, str(ROOT / "launch/train.py"), "--config", str(config_file())]
        command += ["--run-dir", str(tmp_path / "run")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 2 and "--master_port" in done.stderr
    assert "Traceback" not in done.stderr
