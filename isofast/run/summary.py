"""The results table printed at the end of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from isofast.run.checkpoint import checkpoint_path

Summary = dict[str, Any]


def results_table(run_dir: Path, summary: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    """Return the results of a finished run and the paths of its files, as text."""

    def number(key: str, spec: str) -> str | None:
        return None if summary[key] is None else format(summary[key], spec)

    best_step = summary["best_step"]
    best_is_last = best_step in (None, summary["steps"])
    ranks, batch_norm = environment["ranks"], environment["batch_norm"]
    rows = {
        "k-NN top-1, end of run": number("knn_top1", ".3f"),
        "k-NN top-1, best": None
        if best_is_last
        else f"{summary['knn_top1_best']:.3f} at step {best_step}",
        "k-NN top-1, before training": number("knn_top1_initial", ".3f"),
        "k-NN top-1, raw pixels": number("knn_top1_pixels", ".3f"),
        "linear probe top-1": number("val_top1", ".3f"),
        "effective rank of C": number("effective_rank", ",.1f"),
        "epochs, steps": f"{summary['epochs']:g}, {summary['steps']}",
        "images/s while training": number("images_per_s", ",.1f"),
        "wall time": tqdm.format_interval(summary["wall_s"]),
        "device": f"{environment['device']}, {ranks} process(es)",
        "BatchNorm across processes": batch_norm if ranks > 1 else None,
    }
    checkpoint = checkpoint_path(run_dir / "checkpoints", summary["steps"])
    tensorboard = run_dir / "tensorboard"
    files = {
        "metrics": run_dir / "metrics.jsonl",
        "eigenvalues of C": run_dir / "spectrum.npz",
        "summary": run_dir / "summary.json",
        "encoder weights": checkpoint / "encoder.safetensors",
        "curves": f"tensorboard --logdir {tensorboard}" if tensorboard.exists() else None,
    }
    shown = [{k: v for k, v in part.items() if v is not None} for part in (rows, files)]
    width = max(len(name) for part in shown for name in part)
    return "\n\n".join(
        "\n".join(f"  {name:<{width}}  {value}" for name, value in part.items()) for part in shown
    )
