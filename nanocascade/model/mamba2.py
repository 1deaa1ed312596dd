"""Mamba-2: one scan for sequences, one step for decoding, one dt for both (nemotron_h).

The recurrence, a head at a time, with state h (c, s), input x (c), and B, C (s) shared by a group:

    h_t = exp(dt_t * A) h_{t-1} + dt_t * x_t (x) B_t          y_t = h_t C_t + D x_t

`chunk_scan` computes the same numbers q positions at a time: within a chunk as masked attention
(a matmul), between chunks by carrying h. The chunk length changes speed, not results.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanocascade.model.documents import Documents, ScanPlan, gather, scan_plans
from nanocascade.model.layers import upcast

SPAN = 8192  # positions of a row that are scanned at once
CPU_CHUNK = 64  # a core's cache holds 64 x 64 weights of all heads; a GPU takes the published 128
STEP_BYTES = 1 << 20  # of state that a decoding step works on at once: half a core's cache


def chunk_scan(x, dt, A, B, C, roots, levels, lasts, lone=0, state=None):
    """The recurrence above over chunks of q positions (without D x).

    Args:
        x: (k, q, h, c) inputs; dt: (k, q, h), 0 where a position must leave no trace; A: (h,) < 0;
        B, C: (k, q, g, s); roots, levels, lasts, lone: the order of the chunks and what each of
        them continues, see ScanPlan; state: (m, h, c, s) that the first level continues where it
        has no roots. All at least fp32.
    Returns: y (k, q, h, c) and the states after the last level of continued chunks (m, h, c, s).
    Source: Mamba-2 (arXiv 2405.21060), section 6, with a tree of chunks of our own.
    """
    k, q, h, c = x.shape
    g, s = B.shape[-2:]
    # A head axis of (g, h/g) lets the heads of a group share B and C by broadcasting.
    xdt = (x * dt[..., None]).view(k, q, g, h // g, c).permute(0, 2, 3, 1, 4)  # (k, g, h/g, q, c)
    B = B.view(k, q, g, 1, s).permute(0, 2, 3, 1, 4)  # (k, g, 1, q, s)
    C = C.view(k, q, g, 1, s).permute(0, 2, 3, 1, 4)  # (k, g, 1, q, s)
    log_decay = (dt * A).view(k, q, g, h // g).permute(0, 2, 3, 1)  # (k, g, h/g, q)
    total = log_decay.cumsum(-1)  # (k, g, h/g, q) log decay from the chunk's start to here

    # Within chunks: attention with weights C_i.B_j * decay(j -> i) for j <= i.
    later = torch.ones(q, q, dtype=torch.bool, device=x.device).triu(1)  # (q, q)
    gap = (total[..., :, None] - total[..., None, :]).masked_fill(later, -math.inf)
    y = (C @ B.mT * gap.exp()) @ xdt  # (k, g, h/g, q, c)

    # Between chunks: what each continued chunk adds to the state, carried on level by level.
    sizes = [roots, *map(len, levels)]
    into = total[: sum(sizes)]  # (k', g, h/g, q)
    decay, keep = (into[..., -1:] - into).exp(), into[..., -1].exp()[..., None, None]
    added = (xdt[: len(into)] * decay[..., None]).mT @ B[: len(into)]  # (k', g, h/g, c, s)
    # split: the gradient of a slice would be a whole tensor of zeros for every level
    (first, *added), (_, *keep) = added.split(sizes), keep.split(sizes)
    ends = [first if state is None else state.view(-1, *first.shape[1:])]  # (m, g, h/g, c, s)
    entries = []  # the state that each chunk continues, in their order without roots and lone ones
    for index, new, kept in zip(levels, added, keep, strict=True):
        entries.append(gather(ends[-1], index))  # (m, g, h/g, c, s)
        ends.append(torch.addcmul(new, entries[-1], kept))
    if len(lasts):
        entries.append(gather(torch.cat(ends), lasts))
    if entries:
        before, after, alone = y.split([roots, k - roots - lone, lone])
        part = slice(roots, k - lone)
        read = (C[part] @ torch.cat(entries).mT) * total[part].exp()[..., None]
        y = torch.cat([before, after + read, alone])  # (k, g, h/g, q, c)
    y = y.permute(0, 3, 1, 2, 4).reshape(k, q, h, c)
    return y, ends[-1].reshape(-1, h, c, s)


def row_scan(x, dt, A, B, C, chunk_size, state):
    """The recurrence over rows of equal length, each from its own state (b, h, c, s): the sampler's
    prefill. x (b, t, h, c), dt (b, t, h), B and C (b, t, g, s). Returns y (b, t, h, c), state."""
    b, t = dt.shape[:2]
    q = min(chunk_size, t)
    same = torch.arange(b, device=x.device)  # (b,) each row's chunks continue its own
    span, ys = max(SPAN // q, 1) * q, []
    for parts in zip(*(y.split(span, 1) for y in (x, dt, B, C)), strict=True):
        tail = -parts[0].shape[1] % q  # filled with dt = 0: neither input nor decay
        chunks = [F.pad(y, (0, 0) * (y.ndim - 2) + (0, tail)) for y in parts]
        chunks = [y.unflatten(1, (-1, q)).transpose(0, 1).flatten(0, 1) for y in chunks]
        levels = [same] * (len(chunks[0]) // b)
        x, dt, B, C = chunks  # (z*b, q, ...)
        y, state = chunk_scan(x, dt, A, B, C, 0, levels, same[:0], state=state)
        ys.append(y.unflatten(0, (-1, b)).transpose(0, 1).flatten(1, 2))  # (b, z*q, h, c)
    return torch.cat(ys, 1)[:, :t], state  # (b, t, h, c), (b, h, c, s)


def scan_step(x, dt, A, B, C, state):
    """The recurrence above for one position, without D x: the decoding path, and the reference.

    Args: x (b, h, c), dt (b, h), A (h,), B and C (b, g, s), state (b, h, c, s), which is updated in
    place: it is the largest thing that decoding touches. Returns: y (b, h, c).
    """
    b, h, c = x.shape
    g, s = B.shape[-2:]
    decay = (dt * A).exp()[..., None, None]  # (b, h, 1, 1)
    # Heads of a group share B and C: their channels are the rows of one matrix.
    xdt = (x * dt[..., None]).view(b, g, -1, 1)  # (b, g, h/g*c, 1)
    y = torch.empty_like(xdt)  # (b, g, h/g*c, 1)
    # On a CPU some rows at a time, so that the new state is still in the core's cache when read.
    rows = max(STEP_BYTES // (state[0].numel() * state.element_size()), 1)
    for i in range(0, b, rows if x.device.type == "cpu" else b):
        part = slice(i, i + rows if x.device.type == "cpu" else b)
        new = state[part].mul_(decay[part]).view(-1, h // g * c, s)  # (b*g, h/g*c, s)
        new.baddbmm_(xdt[part].flatten(0, 1), B[part].reshape(-1, 1, s))
        y[part] = (new @ C[part].reshape(-1, s, 1)).view_as(y[part])
    return y.view(b, h, c)


def causal_conv(padded, weight, bias):
    """Depthwise causal convolution of inputs after those before them: padded (b, w-1+t, m), weight
    (m, 1, w) as on disk, bias (m,). Returns (b, t, m). Written as a sum of w shifted products."""
    *earlier, now = weight[:, 0].unbind(-1)  # w taps (m,)
    t = padded.shape[1] - len(earlier)
    y = torch.addcmul(bias, padded[:, len(earlier) :], now)  # (b, t, m)
    for i, tap in enumerate(earlier):
        y = torch.addcmul(y, padded[:, i : i + t], tap)
    return y


def chunk_limit(config, device: torch.device) -> int:
    return min(config.chunk_size, CPU_CHUNK) if device.type == "cpu" else config.chunk_size


def plan_scan(config, documents: Documents, device: torch.device):
    """(plans, outputs) of packed documents for a config's scan, see scan_plans."""
    limit = chunk_limit(config, device)
    return scan_plans(documents, limit, config.conv_kernel - 1, SPAN, device)


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
        self.norm = nn.Module()
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

    def dt(self, raw: Tensor, valid: Tensor | None) -> Tensor:
        """Step sizes (b, t, h) from in_proj's raw ones, for the scan and for the step alike.

        softplus in bf16 alone costs about 0.4 KL between trainer and sampler, so fp32. Padding gets
        dt = 0: softplus(dt_bias) would still decay the state.
        """
        dt = F.softplus(upcast(raw) + upcast(self.dt_bias))  # (b, t, h)
        low, high = self.config.time_step_limit  # published models: (0, inf), no clamp
        if (low, high) != (0.0, math.inf):
            dt = dt.clamp(low, high)
        return dt if valid is None else dt * valid[..., None]

    def gated_norm(self, y: Tensor, gate: Tensor) -> Tensor:
        """RMS over each of g groups of y * silu(gate), both (b, t, h*c)."""
        cfg = self.config
        y = upcast(y) * F.silu(upcast(gate))  # (b, t, h*c)
        groups = y.unflatten(-1, (cfg.mamba_n_groups, -1))  # (b, t, g, h*c/g)
        groups = F.rms_norm(groups, groups.shape[-1:], None, cfg.norm_eps)
        return groups.flatten(-2).to(gate.dtype) * self.norm.weight  # (b, t, h*c)

    def forward(self, x: Tensor, ctx, layer: dict | None = None) -> Tensor:
        """x (b, t, d) -> (b, t, d). `ctx` is the forward's Context, `layer` the block's cache."""
        cfg = self.config
        if ctx.valid is not None:
            x = x * ctx.valid[..., None]  # so that the conv sees zeros on padding
        gate, inputs = self.in_proj(x).tensor_split([cfg.mamba_inner], dim=-1)  # (b, t, h*c), ...
        if layer is None:
            y = self.packed(inputs, ctx.scans, ctx.scan_outputs)  # (b, t, h*c)
        else:
            y = self.cached(inputs, ctx.valid, layer)  # (b, t, h*c)
        return self.out_proj(self.gated_norm(y, gate))  # (b, t, d)

    def packed(self, inputs: Tensor, plans: list[ScanPlan], outputs: Tensor) -> Tensor:
        """inputs (b, t, m+h) of packed documents, by the plans of their chunks -> (b, t, h*c).

        Inside a scan of the 30B model 0.3 MB a token live until backward, 15 GB at 49K: of long
        documents each plan is computed again in backward, from its inputs and the states it
        continues.
        """
        tokens = F.pad(inputs.flatten(0, 1), (0, 0, 0, 1))  # (n+1, m+h) the last one: nothing there
        run = self.scan_plan
        if len(plans) > 1:
            run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        ys, state = [], None
        for plan in plans:
            y, state = run(tokens, plan, state)
            ys.append(y.flatten(0, 1))
        y = ys[0] if len(ys) == 1 else torch.cat(ys)  # (k*q, h, c)
        return gather(y, outputs).view(*inputs.shape[:2], -1)

    def scan_plan(self, tokens: Tensor, plan: ScanPlan, state: Tensor | None):
        chunks = gather(tokens, plan.inputs)  # (k, w-1+q, m+h)
        padded, raw_dt = chunks.split([self.config.conv_dim, self.config.mamba_num_heads], -1)
        x, B, C = self.mixed(padded)
        dt = self.dt(raw_dt[:, self.config.conv_kernel - 1 :], plan.valid)  # (k, q, h)
        order = plan.roots, plan.levels, plan.lasts, plan.lone
        y, state = chunk_scan(x, dt, self.decay_rate, B, C, *order, state)
        return torch.addcmul(y, x, upcast(self.D)[:, None]), state

    def cached(self, inputs: Tensor, valid: Tensor | None, layer: dict) -> Tensor:
        """inputs (b, t, m+h) that continue the rows of a cache, which is updated -> (b, t, h*c)."""
        xBC, raw_dt = inputs.split([self.config.conv_dim, self.config.mamba_num_heads], -1)
        padded = self.continued(layer["conv"], xBC, valid)  # (b, w-1+t, m)
        layer["conv"] = self.next_window(padded, valid)
        x, B, C = self.mixed(padded)
        dt, A = self.dt(raw_dt, valid), self.decay_rate  # (b, t, h), (h,)
        if x.shape[1] == 1:
            y = scan_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], layer["ssm"])[:, None]
        else:
            y, layer["ssm"] = row_scan(
                x, dt, A, B, C, chunk_limit(self.config, x.device), layer["ssm"]
            )
        return torch.addcmul(y, x, upcast(self.D)[:, None]).flatten(-2)

    @property
    def decay_rate(self) -> Tensor:
        return -torch.exp(upcast(self.A_log))  # A (h,)

    def mixed(self, padded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Conv inputs (b, w-1+t, m) -> x (b, t, h, c), B and C (b, t, g, s) of the scan."""
        cfg = self.config
        y = F.silu(causal_conv(padded, self.conv1d.weight, self.conv1d.bias))  # (b, t, m)
        groups_size = cfg.mamba_n_groups * cfg.ssm_state_size
        x, B, C = upcast(y).split((cfg.mamba_inner, groups_size, groups_size), dim=-1)
        x = x.unflatten(-1, (cfg.mamba_num_heads, -1))  # (b, t, h, c)
        groups = (cfg.mamba_n_groups, -1)
        return x, B.unflatten(-1, groups), C.unflatten(-1, groups)

    def continued(self, window: Tensor, xBC: Tensor, valid: Tensor | None) -> Tensor:
        """xBC (b, t, m), each row's first valid input right after its window (b, w-1, m)."""
        padded = torch.cat([window, xBC], 1)  # (b, w-1+t, m)
        if valid is None:
            return padded
        start = valid.byte().argmax(1)  # (b,) inputs of left padding
        index = start[:, None] + torch.arange(window.shape[1], device=valid.device)  # (b, w-1)
        return padded.scatter_(1, index[..., None].expand_as(window), window)

    def next_window(self, padded: Tensor, valid: Tensor | None) -> Tensor:
        """The last w-1 valid conv inputs of each row (b, w-1, m); padding may be on either side."""
        keep = self.config.conv_kernel - 1
        if valid is None:
            return padded[:, -keep:]
        # One past each row's last valid token; a row without any keeps its window.
        ends = (valid * torch.arange(1, valid.shape[1] + 1, device=valid.device)).amax(1)  # (b,)
        index = ends[:, None] + torch.arange(keep, device=valid.device)  # (b, w-1)
        return padded.gather(1, index[..., None].expand(-1, -1, padded.shape[-1]))
