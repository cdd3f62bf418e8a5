"""Non-contrastive self-supervised encoders, trained at the speed of the hardware."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isofast.config.load import load_config
    from isofast.evaluation.encoders import load_encoder
    from isofast.training.loop import fit

__all__ = ["fit", "load_config", "load_encoder"]

_MODULES = {
    "fit": "training.loop",
    "load_config": "config.load",
    "load_encoder": "evaluation.encoders",
}


def __getattr__(name: str) -> Any:
    """Import on first use: torch and DeepSpeed are slow to load."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"isofast.{_MODULES[name]}"), name)
