"""The results table printed at the end of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isofast.run.checkpoint import checkpoint_path
from isofast.run.progress import duration

Summary = dict[str, Any]


def results_table(run_dir: Path, summary: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    """The results of a finished run and where its files are, as text."""
    several = environment["ranks"] > 1
    rows = [
        ("k-NN top-1, end of run", _fraction(summary["knn_top1"])),
        ("k-NN top-1, before training", _fraction(summary["knn_top1_initial"])),
        ("k-NN top-1, raw pixels", _fraction(summary["knn_top1_pixels"])),
        ("linear probe top-1", _fraction(summary["val_top1"])),
        ("effective rank of C", _number(summary["effective_rank"])),
        ("epochs, steps", f"{summary['epochs']:g}, {summary['steps']}"),
        ("images/s while training", _number(summary["images_per_s"])),
        ("wall time", duration(summary["wall_s"])),
        ("device", f"{environment['device']}, {environment['ranks']} process(es)"),
        ("BatchNorm across processes", environment["batch_norm"] if several else "-"),
    ]
    files = [
        ("metrics", run_dir / "metrics.jsonl"),
        ("eigenvalues of C", run_dir / "spectrum.npz"),
        ("summary", run_dir / "summary.json"),
        (
            "encoder weights",
            checkpoint_path(run_dir / "checkpoints", summary["steps"]) / "encoder.safetensors",
        ),
    ]
    files = [(name, path) for name, path in files if path.exists()]
    shown = [row for row in rows if row[1] != "-"]
    width = max(len(name) for name, _ in [*shown, *files])
    lines = [f"  {name:<{width}}  {value}" for name, value in shown]
    lines += ["", *(f"  {name:<{width}}  {path}" for name, path in files)]
    if (run_dir / "tensorboard").exists():
        command = f"tensorboard --logdir {run_dir / 'tensorboard'}"
        lines.append(f"  {'curves':<{width}}  {command}")
    return "\n".join(lines)


def _fraction(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"
