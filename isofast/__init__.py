"""Non-contrastive self-supervised encoders, trained at the speed of the hardware."""

from typing import Any

__all__ = ["fit", "load_config", "load_encoder"]


def __getattr__(name: str) -> Any:
    """Import on first use: torch and DeepSpeed are slow to load."""
    if name == "fit":
        from isofast.training.loop import fit

        return fit
    if name == "load_config":
        from isofast.config.load import load_config

        return load_config
    if name == "load_encoder":
        from isofast.evaluation.encoders import load_encoder

        return load_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
