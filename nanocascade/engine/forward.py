"""Log-probs of packed batches: one forward of the model, one pass of the output head."""

import torch
from torch import Tensor

from nanocascade.data.batch import Batch
from nanocascade.model.logprobs import token_logprobs
from nanocascade.model.model import Model
from nanocascade.model.moe import Routing


def score_tokens(model: Model, batch: Batch, temperature: float = 1.0, routing=None):
    """Log-probs (b, t) of the loss tokens under softmax(logits / T), and entropies (b, t)."""
    hidden = model(batch.ids, segments=batch.segments, routing=routing)  # (b, t, d)
    # Only what carries loss meets the head: log-probs of prompts and padding are left 0.
    places = batch.mask.flatten().nonzero()[:, 0]  # (n,)
    wanted = hidden.flatten(0, 1).index_select(0, places)  # (n, d)
    targets = batch.targets.flatten()[places]  # (n,)
    found = token_logprobs(wanted, model.head.weight, targets, temperature)  # (n,) twice
    blank = found[0].new_zeros(batch.mask.numel())  # (b*t,)
    return tuple(blank.index_copy(0, places, x).view(batch.mask.shape) for x in found)


def no_load(model: Model) -> Tensor:
    """Tokens of each expert before the first micro-batch: zeros (l, e)."""
    cfg = model.config
    shape = (cfg.num_moe_layers, cfg.num_experts)
    return torch.zeros(shape, dtype=torch.long, device=model.embed.weight.device)


def new_routing(model: Model, batch: Batch) -> Routing:
    return Routing(model.config.num_moe_layers, batch.experts)
