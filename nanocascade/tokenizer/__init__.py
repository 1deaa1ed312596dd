"""Conversations to token ids with a loss mask, and back."""

from nanocascade.tokenizer.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
