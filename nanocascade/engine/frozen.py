"""A frozen model that computes log-probs: a teacher, or the KL reference."""

from pathlib import Path

import torch
from torch import Tensor

from nanocascade.data.batch import Batch
from nanocascade.engine.distributed import Dist
from nanocascade.engine.forward import score_tokens
from nanocascade.engine.layout import load_frozen
from nanocascade.engine.lora import base_of, read_adapters, swapped_adapters
from nanocascade.model.model import Model


class FrozenModel:
    """The checkpoint at `path`, loaded at its first use and sharded over the ranks like the policy.

    `logprobs` moves it to the device, `park` to host memory. Call `park` before another model needs
    the memory, at the latest before the next rollouts.
    """

    def __init__(self, path, dist: Dist):
        self.path, self.dist = path, dist
        self.model, self.parked = None, True
        self.adapters = None  # LoRA adapters, if it shares the policy's base

    def share_base(self, policy: Model, base: Path, rank: int) -> None:
        """Use the policy's frozen base, if this checkpoint is LoRA adapters on the same base."""
        if base_of(self.path, rank) == base:
            self.model, self.adapters = policy, read_adapters(policy, self.path)

    @torch.no_grad()
    def logprobs(self, batch: Batch, temperature: float) -> Tensor:
        """Log-probs (b, t) of the batch's loss tokens under softmax(logits / temperature)."""
        if self.adapters is not None:
            with swapped_adapters(self.model, self.adapters):
                return score_tokens(self.model, batch, temperature)[0]
        if self.model is None:
            self.model = load_frozen(self.path, self.dist)
        elif self.parked:
            self.model.to(self.dist.device)
        self.parked = False
        return score_tokens(self.model, batch, temperature)[0]

    def park(self) -> None:
        if self.model is not None and self.adapters is None:
            self.model.cpu()
        self.parked = True
