"""Whether runs/quickstart is a finished run that learned: `python tests/check_quickstart.py`.

Not collected by pytest: it reads what `make quickstart` left.
"""

import json
from pathlib import Path

RUN = Path(__file__).resolve().parent.parent / "runs" / "quickstart"
summary = json.loads((RUN / "summary.json").read_text())
assert summary["completed"], summary
assert summary["knn_top1"] >= 0.90, summary
# above its own start
assert summary["knn_top1"] - summary["knn_top1_initial"] >= 0.12, summary
assert summary["knn_top1_pixels"] > 0.9, summary
assert any(RUN.glob("checkpoints/*/encoder.safetensors")), "no encoder is saved"
assert (RUN / "spectrum.npz").exists(), "no spectrum is saved"
