"""Whether runs/quickstart is a finished run that learned: `python tests/check_quickstart.py`.

Not collected by pytest: it reads what `make quickstart` left.
"""

import json
import sys
from pathlib import Path

RUN = Path(__file__).resolve().parent.parent / "runs" / "quickstart"


def main() -> int:
    """0 if the k-NN accuracy is high, well above its own start, and the files are there."""
    summary = json.loads((RUN / "summary.json").read_text())
    checks = {
        "completed": summary["completed"],
        "k-NN top-1 at least 0.90": summary["knn_top1"] >= 0.90,
        "at least 0.12 above the start": summary["knn_top1"] - summary["knn_top1_initial"] >= 0.12,
        "raw pixels evaluated": summary["knn_top1_pixels"] > 0.9,
        "encoder saved": any(RUN.glob("checkpoints/*/encoder.safetensors")),
        "spectrum saved": (RUN / "spectrum.npz").exists(),
    }
    for name, holds in checks.items():
        sys.stdout.write(f"{'ok ' if holds else 'NOT'}  {name}\n")
    # a busy machine is no fault of the run; five minutes are meant
    sys.stdout.write(f"     {summary['wall_s']:.0f} s\n")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
