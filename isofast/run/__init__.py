"""Run folders: metrics, spectra, checkpoints, progress, collapse detection."""
