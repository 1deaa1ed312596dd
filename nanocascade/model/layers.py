"""Layers that all mixers share: RMSNorm, the MLP, and the parts kept in at least fp32."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def upcast(x: Tensor) -> Tensor:
    """At least fp32: the precision of the islands (router, dt, A, state, logits), fp64 kept."""
    return x if x.dtype.itemsize >= 4 else x.float()


def activate(up: Tensor, gate: Tensor | None = None) -> Tensor:
    """relu(up)^2 (nemotron_h) or SwiGLU silu(gate) * up (qwen3, llama)."""
    return F.relu(up).square() if gate is None else F.silu(gate) * up


class MLP(nn.Module):
    """down(act(up x)): the dense `-` mixer and the shared expert."""

    def __init__(self, width: int, hidden: int, gated: bool):
        super().__init__()
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.gate_proj = nn.Linear(width, hidden, bias=False) if gated else None
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, ctx=None, cached=None) -> Tensor:
        gate = None if self.gate_proj is None else self.gate_proj(x)  # (b, t, f)
        return self.down_proj(activate(self.up_proj(x), gate))  # (b, t, d)


class Normalize(torch.autograd.Function):
    """x / rms(x) * weight, its gradient in closed form: half of autograd's passes over x."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()  # (..., 1)
        scale = (square / x.shape[-1] + eps).rsqrt()  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        # scale depends on x: d scale / d x = -scale^3 x / d
        both = (grad * x).reshape(-1, len(weight))  # (n, d)
        pull = (both @ weight).view(scale.shape) * scale**3 / -len(weight)  # (..., 1)
        grad_x = (grad * weight).mul_(scale).addcmul_(x, pull)
        return grad_x, scale.flatten() @ both, None


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, computed in at least fp32."""

    def __init__(self, width: int, eps: float, weight_in_fp32: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.weight_in_fp32 = eps, weight_in_fp32

    def forward(self, x: Tensor) -> Tensor:
        wide = upcast(x)
        if self.weight_in_fp32 or x.dtype == wide.dtype:  # the two agree where nothing is cast
            if torch.is_grad_enabled():
                return Normalize.apply(wide, upcast(self.weight), self.eps).to(x.dtype)
            return F.rms_norm(wide, wide.shape[-1:], upcast(self.weight), self.eps).to(x.dtype)
        return F.rms_norm(wide, wide.shape[-1:], None, self.eps).to(x.dtype) * self.weight


# Small parameters that must not be rounded: at least fp32 in memory and on disk.
KEEP_FP32 = (".gate.weight", ".e_score_correction_bias", ".A_log", ".D", ".dt_bias")


def widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # which mps does not know
