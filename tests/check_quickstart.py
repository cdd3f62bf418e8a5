"""Check that runs/quickstart finished and learned: `python tests/check_quickstart.py`.

Not collected by pytest: it reads the output of `make quickstart`.
"""

import json
from pathlib import Path

RUN = Path(__file__).resolve().parent.parent / "runs" / "quickstart"
summary = json.loads((RUN / "summary.json").read_text())
assert summary["completed"], summary
assert summary["knn_top1"] >= 0.90, summary
# better than before training
assert summary["knn_top1"] - summary["knn_top1_initial"] >= 0.12, summary
assert summary["knn_top1_pixels"] > 0.9, summary
assert any(RUN.glob("checkpoints/*/encoder.safetensors")), "no encoder was saved"
assert (RUN / "spectrum.npz").exists(), "no spectrum was saved"
