"""Model directories in and out: weights, config.json, and the state of an unfinished run."""

from nanocascade.checkpoint.weights import load_model, save_model

__all__ = ["load_model", "save_model"]
