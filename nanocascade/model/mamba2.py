"""Mamba-2, the mixer of nemotron_h: projections, a short convolution, and the scan of scan.py."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanocascade.model.documents import take_rows
from nanocascade.model.layers import upcast
from nanocascade.model.scan import ScanPart, ScanPlan, chunk_scan, scan_step


def causal_conv(padded, weight, bias):
    """Depthwise causal convolution of inputs after those before them: padded (b, w-1+t, m), weight
    (m, 1, w) as on disk, bias (m,). Returns (b, t, m). Written as a sum of w shifted products."""
    *earlier, now = weight[:, 0].unbind(-1)  # w taps (m,)
    t = padded.shape[1] - len(earlier)
    y = torch.addcmul(bias, padded[:, len(earlier) :], now)  # (b, t, m)
    for i, tap in enumerate(earlier):
        y = torch.addcmul(y, padded[:, i : i + t], tap)
    return y


class Mamba2(nn.Module):
    """The `M` mixer of nemotron_h. Parameter names and shapes are those on disk."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        h, m, inner = config.mamba_num_heads, config.conv_dim, config.mamba_inner
        self.in_proj = nn.Linear(config.hidden_size, inner + m + h, bias=False)
        self.conv1d = nn.Conv1d(m, m, config.conv_kernel, groups=m)  # holds weight and bias only
        self.dt_bias = nn.Parameter(torch.zeros(h))
        self.A_log = nn.Parameter(torch.zeros(h))
        self.D = nn.Parameter(torch.ones(h))
        self.norm = nn.Module()  # a name on disk
        self.norm.weight = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def reset_parameters(self, std: float) -> None:
        """As nemotron_h: A = -(1..h), D = 1, dt log-uniform in [time_step_min, time_step_max]."""
        cfg = self.config
        nn.init.normal_(self.in_proj.weight, std=std)
        nn.init.kaiming_uniform_(self.conv1d.weight, a=math.sqrt(5))
        nn.init.zeros_(self.conv1d.bias)
        nn.init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(len(cfg.pattern))
            self.A_log.copy_(torch.arange(1, cfg.mamba_num_heads + 1).log())
            self.D.fill_(1.0)
            self.norm.weight.fill_(1.0)
            low, high = math.log(cfg.time_step_min), math.log(cfg.time_step_max)
            dt = torch.exp(torch.rand(cfg.mamba_num_heads) * (high - low) + low)
            dt = dt.clamp(min=cfg.time_step_floor)
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus

    def dt(self, raw: Tensor) -> Tensor:
        """Step sizes (b, t, h) from in_proj's raw ones, for the scan and for the step alike.

        softplus in bf16 alone costs about 0.4 KL between trainer and sampler, so fp32.
        """
        dt = F.softplus(upcast(raw) + upcast(self.dt_bias))  # (b, t, h)
        low, high = self.config.time_step_limit  # published models: (0, inf), no clamp
        return dt if (low, high) == (0.0, math.inf) else dt.clamp(low, high)

    def gated_norm(self, y: Tensor, gate: Tensor) -> Tensor:
        """RMS norm over each of g groups of y * silu(gate), both (b, t, h*c), times the weight."""
        cfg = self.config
        y = upcast(y) * F.silu(upcast(gate))  # (b, t, h*c)
        groups = y.unflatten(-1, (cfg.mamba_n_groups, -1))  # (b, t, g, h*c/g)
        groups = F.rms_norm(groups, groups.shape[-1:], None, cfg.norm_eps)
        return groups.flatten(-2).to(gate.dtype) * self.norm.weight  # (b, t, h*c)

    def forward(self, x: Tensor, ctx, cached: dict | None = None) -> Tensor:
        """x (b, t, d) -> (b, t, d). `ctx` is the forward's Context, `cached` the block's cache."""
        cfg = self.config
        gate, inputs = self.in_proj(x).tensor_split([cfg.mamba_inner], dim=-1)  # (b, t, h*c), ...
        if ctx.scan is not None:
            y = self.packed(inputs.flatten(0, 1), ctx.scan, cached).view_as(gate)  # (b, t, h*c)
        else:
            y = self.step(inputs, cached)  # (b, 1, h*c)
        return self.out_proj(self.gated_norm(y, gate))  # (b, t, d)

    def packed(self, inputs: Tensor, plan: ScanPlan, cached: dict | None) -> Tensor:
        """inputs (n, m+h) of packed documents -> (n, h, c). The end state of document i goes to
        row i of a cache.

        Inside a scan of the 30B model 0.3 MB a token live until backward, 15 GB at 49K. So the
        parts of long documents are recomputed in backward, from their inputs and the states that
        they continue.
        """
        inputs = F.pad(inputs, (0, 0, 0, 1))  # (n+1, m+h) the last row stands for no token
        run = self.scan_part
        if len(plan.parts) > 1:
            run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        ys, states = [], [None]
        for part in plan.parts:
            y, ends = run(inputs, part, states[-1])
            ys.append(y.flatten(0, 1))
            states = [*states, *ends] if cached is not None else ends  # (j, h, c, s) of each level
        if cached is not None:
            cached["conv"].copy_(inputs[plan.windows][..., : self.config.conv_dim])  # (o, w-1, m)
            cached["ssm"].copy_(torch.cat(states[1:])[plan.end_places])  # (o, h, c, s)
        y = ys[0] if len(ys) == 1 else torch.cat(ys)  # (z*q, h, c)
        return take_rows(y, plan.outputs)

    def scan_part(self, inputs: Tensor, part: ScanPart, state: Tensor | None):
        """inputs (n+1, m+h) -> y (z, q, h, c) of the part's chunks, and chunk_scan's end states."""
        chunks = take_rows(inputs, part.inputs)  # (z, w-1+q, m+h)
        padded, raw_dt = chunks.split([self.config.conv_dim, self.config.mamba_num_heads], -1)
        x, B, C = self.conv_xBC(padded)
        window = self.config.conv_kernel - 1
        real = part.inputs[:, window:] < len(inputs) - 1  # (z, q)
        # Padding gets dt = 0: softplus(dt_bias) would still decay the state.
        dt = self.dt(raw_dt[:, window:]) * real[..., None]  # (z, q, h)
        y, ends = chunk_scan(x, dt, self.decay_rate, B, C, part, state)
        return torch.addcmul(y, x, upcast(self.D)[:, None]), ends

    def step(self, inputs: Tensor, cached: dict) -> Tensor:
        """inputs (b, 1, m+h), one token of each row of a cache, which is updated -> (b, 1, h*c)."""
        xBC, raw_dt = inputs.split([self.config.conv_dim, self.config.mamba_num_heads], -1)
        padded = torch.cat([cached["conv"], xBC], 1)  # (b, w, m)
        cached["conv"].copy_(padded[:, 1:])
        x, B, C = self.conv_xBC(padded)
        dt = self.dt(raw_dt)  # (b, 1, h)
        y = scan_step(x[:, 0], dt[:, 0], self.decay_rate, B[:, 0], C[:, 0], cached["ssm"])[:, None]
        return torch.addcmul(y, x, upcast(self.D)[:, None]).flatten(-2)

    @property
    def decay_rate(self) -> Tensor:
        return -torch.exp(upcast(self.A_log))  # A (h,)

    def conv_xBC(self, padded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Conv inputs (b, w-1+t, m) -> x (b, t, h, c), B and C (b, t, g, s) of the scan."""
        cfg = self.config
        y = F.silu(causal_conv(padded, self.conv1d.weight, self.conv1d.bias))  # (b, t, m)
        groups_size = cfg.mamba_n_groups * cfg.ssm_state_size
        x, B, C = upcast(y).split((cfg.mamba_inner, groups_size, groups_size), dim=-1)
        x = x.unflatten(-1, (cfg.mamba_num_heads, -1))  # (b, t, h, c)
        groups = (cfg.mamba_n_groups, -1)
        return x, B.unflatten(-1, groups), C.unflatten(-1, groups)
