"""AdamW, its learning rate, and one step of it over all ranks."""

import math

import torch
from torch import Tensor, nn

from nanocascade.data.batch import Batch
from nanocascade.data.episode import Rollout
from nanocascade.model.moe import Router


def make_optimizer(model: nn.Module, lr: float, betas, weight_decay: float, in_host=False):
    """AdamW; decay on matrices only (norms, biases, A_log, D and dt_bias have one axis).

    in_host: the moments stay in host memory. A fused step takes one mesh at a time.
    """
    groups = {}
    for p in model.parameters():
        mesh = getattr(p, "device_mesh", None)  # of a sharded one
        if p.requires_grad:
            groups.setdefault((p.ndim < 2, mesh), []).append(p)
    groups = [
        {"params": groups[key], "weight_decay": 0.0 if key[0] else weight_decay}
        for key in sorted(groups, key=lambda key: key[0])
    ]
    kind = HostAdamW if in_host else torch.optim.AdamW
    return kind(groups, lr=lr, betas=betas, fused=True)


class HostAdamW(torch.optim.AdamW):
    """AdamW whose moments live in host memory and visit the device one parameter at a time:
    8 bytes a parameter less on the device, for one copy each way a step. Gradients are used up."""

    home = "cpu"

    def step(self):
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        grads = [p.grad for p in params]
        self.zero_grad()  # AdamW passes over a parameter without a gradient: one at a time has its
        for p, grad in zip(params, grads, strict=True):
            p.grad, state = grad, self.state[p]
            state.update({key: x.to(p.device) for key, x in state.items()})
            super().step()
            state.update({key: x.to(self.home) for key, x in state.items()})
            p.grad = None


def freeze_routers(model: nn.Module) -> None:
    """RL and MOPD train no router weights (Nemotron 3 Nano); their correction bias still moves."""
    for module in model.modules():
        if isinstance(module, Router):
            module.weight.requires_grad_(False)


def learning_rate(step: int, *, lr, min_lr, warmup, warmup_from=0.0, total, shape) -> float:
    """Linear warm-up from warmup_from to lr, then "constant", "linear" or "cosine" to min_lr."""
    if step < warmup:
        return warmup_from + (lr - warmup_from) * (step + 1) / warmup
    done = (step - warmup) / max(total - warmup, 1)
    if shape == "constant":
        return lr
    if shape == "linear":
        return lr + (min_lr - lr) * min(done, 1.0)
    if shape != "cosine":
        raise ValueError(f"schedule {shape!r}: expected constant, linear or cosine")
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def optimizer_step(model, optimizer, lr: float, max_norm: float, dist) -> float:
    """Sum over ranks, clip to max_norm (global), step, clear; the norm before clipping.

    A finite loss may have a gradient that is not: then ValueError, the weights left as they were.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    dist.sum_gradients(model)
    norm = dist.clip_gradients(model, max_norm)
    if not math.isfinite(norm):
        taken = max((int(x["step"]) for x in optimizer.state.values()), default=0)
        raise ValueError(f"gradient norm is {norm} after {taken} steps, the loss was finite")
    for p in model.parameters():  # fused AdamW on a CPU walks both through memory, strides unseen
        assert p.grad is None or p.grad.stride() == p.stride(), (p.stride(), p.grad.stride())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def check_finite(loss: Tensor, step: int, batch: Batch, rollouts: list[Rollout]) -> None:
    """Stop before a NaN reaches the weights, naming the rows; the last checkpoint stays good."""
    if not torch.isfinite(loss):
        indices = batch.response_ids[batch.valid].unique().tolist()  # not of padding
        rows = sorted({str(rollouts[i].row.get("id")) for i in indices})
        raise ValueError(f"loss is {loss.item()} at step {step}; rows {', '.join(rows[:20])}")
