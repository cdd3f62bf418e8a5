"""Methods of self-supervised learning: each computes a loss from two views' embeddings."""

from isofast.config.plugins import method_class
from isofast.config.schema import MethodConfig, ProjectorConfig
from isofast.methods.base import Method, Views

__all__ = ["Method", "Views", "make_method"]


def make_method(config: MethodConfig, projector: ProjectorConfig) -> Method:
    """Return the method ``config.name``, initialised with torch's global generator."""
    method: Method = method_class(config.name)(config, projector)
    return method
