"""Log-probs of packed batches: one forward of the model, one pass of the output head."""

import torch
from torch import Tensor

from nanocascade.data.batch import Batch
from nanocascade.model.documents import take_rows
from nanocascade.model.logprobs import token_logprobs
from nanocascade.model.model import Model
from nanocascade.model.moe import Routing


def score_tokens(model: Model, batch: Batch, temperature: float = 1.0, routing=None):
    """Log-probs (1, n) of the batch's targets under softmax(logits / T), and entropies (1, n).

    Only targets with a loss go through the output head; the values of the others stay 0.
    """
    hidden = model(
        batch.ids, segments=batch.segments, parents=batch.parents, routing=routing
    )  # (1, t, d)
    places = batch.mask[0].nonzero()[:, 0]  # (m,)
    wanted = take_rows(hidden[0], batch.sources[0, places])  # (m, d)
    targets = batch.targets[0, places]  # (m,)
    found = token_logprobs(wanted, model.head.weight, targets, temperature)  # (m,) twice
    blank = found[0].new_zeros(batch.mask.shape)  # (1, n)
    return tuple(blank.index_copy(1, places, x[None]) for x in found)


def no_load(model: Model) -> Tensor:
    """Token counts of the experts before the first micro-batch: zeros (l, e)."""
    cfg = model.config
    shape = (cfg.num_moe_layers, cfg.num_experts)
    return torch.zeros(shape, dtype=torch.long, device=model.embed.weight.device)


def new_routing(model: Model, batch: Batch) -> Routing:
    return Routing(model.config.num_moe_layers, batch.experts)
