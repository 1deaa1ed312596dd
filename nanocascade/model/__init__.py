"""One model for all families, on one device, with and without a cache."""

from nanocascade.model.model import Model, ModelConfig

__all__ = ["Model", "ModelConfig"]
