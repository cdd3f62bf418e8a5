"""Console output: a long wait, the table of results."""

import time

from isofast.run.progress import Progress
from isofast.run.summary import results_table

SUMMARY = {
    "knn_top1": 0.9123,
    "knn_top1_initial": None,
    "knn_top1_pixels": None,
    "knn_top1_best": 0.95,
    "best_step": 440,
    "val_top1": 0.5,
    "effective_rank": 12.34,
    "epochs": 30.0,
    "steps": 660,
    "images_per_s": 1234.5,
    "wall_s": 3725.2,
}
ENVIRONMENT = {"device": "a machine", "ranks": 2, "batch_norm": "local"}


def test_a_long_wait_is_not_silent(capsys):
    progress = Progress(10, 0, speak=True, line_every_s=0.05)
    with progress.waiting("compiling"):
        time.sleep(0.3)
    progress.close()
    shown = capsys.readouterr().err.splitlines()
    assert 2 <= len(shown) <= 6 and set(shown) == {"compiling, 00:00"}


def test_the_table_shows_what_there_is(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "step_00000660"
    checkpoint.mkdir(parents=True)
    (checkpoint / "encoder.safetensors").touch()
    lines = results_table(tmp_path, SUMMARY, ENVIRONMENT).splitlines()
    shown = dict(line.strip().split("  ", 1) for line in lines if line)
    assert shown["k-NN top-1, end of run"].strip() == "0.912"
    assert "k-NN top-1, before training" not in shown
    assert shown["k-NN top-1, best"].strip() == "0.950 at step 440"
    assert shown["linear probe top-1"].strip() == "0.500"
    assert shown["effective rank of C"].strip() == "12.3"
    assert shown["BatchNorm across processes"].strip() == "local"
    assert shown["wall time"].strip() == "1:02:05"
    assert shown["images/s while training"].strip() == "1,234.5"
    assert shown["encoder weights"].strip() == str(checkpoint / "encoder.safetensors")
    # values are aligned in one column
    assert len({line.index(line.split("  ")[-1].strip()) for line in lines if line}) == 1
