"""AdamW, its learning rate, and one step of it over all ranks."""

import math

import torch
from torch import nn

from nanocascade.model.moe import Router
from nanocascade.stages import Stage


def make_optimizer(model: nn.Module, lr: float, betas, weight_decay: float, in_host=False):
    """AdamW with weight decay on matrices only: norms, biases, A_log, D and dt_bias have one axis.

    in_host: keep the moments in host memory. Parameters are grouped by mesh, as fused steps need.
    """
    groups = {}
    for p in model.parameters():
        mesh = getattr(p, "device_mesh", None)  # None if not sharded
        if p.requires_grad:
            groups.setdefault((p.ndim < 2, mesh), []).append(p)
    groups = [
        {"params": groups[key], "weight_decay": 0.0 if key[0] else weight_decay}
        for key in sorted(groups, key=lambda key: key[0])
    ]
    kind = HostAdamW if in_host else torch.optim.AdamW
    return kind(groups, lr=lr, betas=betas, fused=True)


class HostAdamW(torch.optim.AdamW):
    """AdamW whose moments are in host memory and are copied to the device one parameter at a time.
    Saves 8 bytes a parameter on the device for one copy each way a step. Clears the gradients."""

    home = "cpu"

    def step(self):
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        grads = [p.grad for p in params]
        self.zero_grad()  # AdamW skips parameters whose grad is None, so we set one at a time
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


def learning_rate(step: int, stage: Stage) -> float:
    """Linear warm-up to the peak, then constant, or a linear or cosine decay to min_lr."""
    peak, low, warmup = stage.lr, stage.min_lr, stage.warmup
    if step < warmup:
        return stage.warmup_from + (peak - stage.warmup_from) * (step + 1) / warmup
    if stage.schedule == "constant":
        return peak
    done = (step - warmup) / max((stage.schedule_steps or stage.steps) - warmup, 1)
    if stage.schedule == "linear":
        return peak + (low - peak) * min(done, 1.0)
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def optimizer_step(model, optimizer, lr: float, max_norm: float, dist) -> float:
    """Sum gradients over ranks, clip to max_norm, step, clear. Returns the norm before clipping.

    Raises ValueError for a gradient that is not finite, before any weight changes.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    dist.sum_gradients(model)
    norm = dist.clip_gradients(model, max_norm)
    if not math.isfinite(norm):
        taken = max((int(x["step"]) for x in optimizer.state.values()), default=0)
        raise ValueError(f"gradient norm is {norm} after {taken} steps, the loss was finite")
    for p in model.parameters():  # the fused CPU kernel ignores strides
        assert p.grad is None or p.grad.stride() == p.stride(), (p.stride(), p.grad.stride())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
