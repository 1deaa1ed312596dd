"""One gradient step over micro-batches and ranks, and its logged metrics."""

import torch
from torch import Tensor

from nanocascade.data.batch import Batch
from nanocascade.engine.distributed import Dist
from nanocascade.engine.forward import new_routing, no_load, score_tokens
from nanocascade.engine.optim import learning_rate, optimizer_step
from nanocascade.importance import masked_mean
from nanocascade.model.moe import load_imbalance, update_correction_bias
from nanocascade.stages import Stage


class Update:
    """For each micro-batch call `forward`, compute a loss, call `backward`; at the end `finish`.

    Losses are divided by the denominators of the whole step, so the gradients of micro-batches and
    ranks are summed.
    """

    def __init__(self, model, optimizer, stage: Stage, step: int, dist: Dist):
        self.model, self.optimizer, self.stage = model, optimizer, stage
        self.step, self.dist = step, dist
        self.metrics, self.load = Mean(), no_load(model)

    def forward(self, batch: Batch, temperature: float = 1.0) -> Tensor:
        """Log-probs (b, t) of the batch's loss tokens under softmax(logits / temperature)."""
        self.batch, self.routing = batch, new_routing(self.model, batch)
        logprobs, self.entropy = score_tokens(self.model, batch, temperature, self.routing)
        self.logprobs = logprobs.detach()  # (1, n)
        return logprobs

    def backward(self, loss: Tensor, metrics: dict, documents: list, teacher_logprobs=None):
        """Add the gradients of the last forward's loss. documents: those its response_ids index."""
        self.check_finite(loss, documents)
        loss.backward()
        log_ratio = self.logprobs - self.batch.sampler_logprobs  # (1, n)
        values = {"logprob": self.logprobs, "log_ratio": log_ratio, "entropy": self.entropy}
        if teacher_logprobs is not None:
            values["teacher"] = teacher_logprobs
        keep_token_values(self.batch, documents, values)
        mask = self.batch.mask
        entropy = masked_mean(self.entropy, mask)
        self.metrics.add(metrics | {"entropy": entropy}, weight=int(mask.sum()))
        self.load += self.routing.tokens_per_expert(
            self.batch.copies, self.model.config.num_experts
        )

    def check_finite(self, loss: Tensor, documents: list) -> None:
        """Raise ValueError with the rows before a NaN reaches the weights or a checkpoint."""
        if not torch.isfinite(loss):
            indices = self.batch.response_ids[self.batch.mask].unique().tolist()
            rows = sorted({str(documents[i].row.get("id")) for i in indices})
            raise ValueError(
                f"loss is {loss.item()} at step {self.step}; rows {', '.join(rows[:20])}"
            )

    def finish(self) -> dict[str, float]:
        """Sum the gradients over ranks, clip, step, move the correction bias; return metrics."""
        lr = learning_rate(self.step, self.stage)
        norm = optimizer_step(self.model, self.optimizer, lr, self.stage.max_norm, self.dist)
        load = self.dist.sum(self.load)
        update_correction_bias(self.model, load, self.stage.bias_rate)
        own = {"grad_norm": norm, "lr": lr, "moe/load_max": load_imbalance(load)}
        return self.metrics.result(self.dist) | own


def keep_token_values(batch: Batch, documents: list, values: dict[str, Tensor]) -> None:
    """Store per-token values (1, n) of a batch in its rollouts that will be logged: one value for
    each token of the response."""
    for i, x in enumerate(documents):
        if x.token_values is not None:
            places = batch.response_ids == i  # (1, n)
            if batch.mask[places].any():
                x.token_values = {name: value[places].tolist() for name, value in values.items()}


class Mean:
    """Metrics of a step over micro-batches and ranks: token-weighted means; maxima for */max."""

    def __init__(self):
        self.totals: dict[str, float] = {}
        self.weights: dict[str, float] = {}

    def add(self, metrics: dict, weight: float) -> None:
        for name, x in metrics.items():
            x = float(x)
            if name.endswith("max"):
                self.totals[name] = max(self.totals.get(name, x), x)
                self.weights[name] = 1.0
            else:
                self.totals[name] = self.totals.get(name, 0.0) + x * weight
                self.weights[name] = self.weights.get(name, 0.0) + weight

    def result(self, dist: Dist) -> dict[str, float]:
        total = Mean()
        for totals, weights in dist.gather((self.totals, self.weights)):
            for name, x in totals.items():
                total.add({name: x / max(weights[name], 1e-9)}, weights[name])
        return {name: x / max(total.weights[name], 1e-9) for name, x in total.totals.items()}
