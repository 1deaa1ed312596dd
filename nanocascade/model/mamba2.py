"""Mamba-2: one scan for sequences, one step for decoding, one dt for both (nemotron_h).

The recurrence, a head at a time, with state h (c, s), input x (c), and B, C (s) shared by a group:

    h_t = exp(dt_t * A) h_{t-1} + dt_t * x_t (x) B_t          y_t = h_t C_t + D x_t

`chunk_scan` computes the same numbers q positions at a time: within a chunk as masked attention
(a matmul), between chunks by carrying h. The chunk length changes speed, not results.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanocascade.model.layers import upcast

SPAN = 8192  # positions of a row that are scanned at once
CPU_CHUNK = 64  # a core's cache holds 64 x 64 weights of all heads; a GPU takes the published 128
STEP_BYTES = 1 << 20  # of state that a decoding step works on at once: half a core's cache


def chunk_scan(x, dt, A, B, C, chunk_size, segments=None, state=None):
    """The recurrence above over whole sequences (without D x).

    Args:
        x: (b, t, h, c) inputs; dt: (b, t, h), 0 where a position must leave no trace; A: (h,) < 0;
        B, C: (b, t, g, s); segments: (b, t) document ids, the state is zero again where they
        change; state: (b, h, c, s) of the first document, zeros if None. All at least fp32.
    Returns: y (b, t, h, c) and the state after the last position (b, h, c, s).
    Source: Mamba-2 (arXiv 2405.21060), section 6, with a document mask of our own.
    """
    b, t, h, c = x.shape
    g, s = B.shape[-2:]
    q = min(chunk_size, t)
    tail = -t % q
    if tail:  # dt = 0 on the tail: neither input nor decay
        x, B, C = (F.pad(y, (0, 0, 0, 0, 0, tail)) for y in (x, B, C))
        dt = F.pad(dt, (0, 0, 0, tail))
    z = (t + tail) // q
    # A head axis of (g, h/g) lets the heads of a group share B and C by broadcasting.
    xdt = (x * dt[..., None]).view(b, z, q, g, h // g, c).permute(0, 1, 3, 4, 2, 5)
    B = B.view(b, z, q, g, 1, s).permute(0, 1, 3, 4, 2, 5)  # (b, z, g, 1, q, s)
    C = C.view(b, z, q, g, 1, s).permute(0, 1, 3, 4, 2, 5)  # (b, z, g, 1, q, s)
    log_decay = (dt * A).view(b, z, q, g, h // g).permute(0, 1, 3, 4, 2)  # (b, z, g, h/g, q)
    total = log_decay.cumsum(-1)  # (b, z, g, h/g, q) log decay from the chunk's start to here

    # Which pairs may see each other: j <= i, and in the same document.
    sees = torch.ones(q, q, dtype=torch.bool, device=x.device).tril()  # (q, q)
    to_end = from_start = carry = None
    if segments is not None:
        # A document is contiguous, so equal ids across a chunk's edge mean "not interrupted".
        ids = F.pad(segments, (0, tail), mode="replicate") if tail else segments
        ids = ids.view(b, z, q)
        last = ids[:, :, -1]  # (b, z)
        before = torch.cat([ids[:, :1, 0], last[:, :-1]], 1)  # (b, z) document open at entry
        sees = sees & (ids[..., :, None] == ids[..., None, :])[:, :, None, None]
        to_end = (ids == last[..., None])[:, :, None, None]  # (b, z, 1, 1, q) reaches the end
        from_start = (ids == before[..., None])[:, :, None, None]  # (b, z, 1, 1, q)
        carry = (last == before)[:, :, None, None]  # (b, z, 1, 1)

    # Within chunks: attention with weights C_i.B_j * decay(j -> i).
    gap = (total[..., :, None] - total[..., None, :]).masked_fill(~sees, -math.inf)
    y = (C @ B.mT * gap.exp()) @ xdt  # (b, z, g, h/g, q, c)

    # Between chunks: what each chunk adds to the state, carried on chunk by chunk.
    decay = (total[..., -1:] - total).exp()  # (b, z, g, h/g, q)
    enter, keep = total.exp(), total[..., -1].exp()  # (b, z, g, h/g, q), (b, z, g, h/g)
    if segments is not None:
        decay, enter, keep = decay * to_end, enter * from_start, keep * carry
    added = (xdt * decay[..., None]).mT @ B  # (b, z, g, h/g, c, s)
    state = x.new_zeros(b, h, c, s) if state is None else state
    state = state.view(b, g, h // g, c, s)
    states = []
    # unbind: the gradient of an index would be a whole tensor of zeros for every chunk
    for kept, new in zip(keep[..., None, None].unbind(1), added.unbind(1), strict=True):
        states.append(state)
        state = torch.addcmul(new, state, kept)  # (b, g, h/g, c, s)
    entry = torch.stack(states, 1)  # (b, z, g, h/g, c, s)
    y = y + (C @ entry.mT) * enter[..., None]  # (b, z, g, h/g, q, c)
    y = y.permute(0, 1, 4, 2, 3, 5).reshape(b, t + tail, h, c)[:, :t]  # (b, t, h, c)
    return y, state.reshape(b, h, c, s)


def long_scan(x, dt, A, B, C, chunk_size, segments=None, state=None):
    """chunk_scan, of rows beyond SPAN positions a span at a time.

    Inside a scan of the 30B model 0.3 MB a token live until backward, 15 GB at 49K: of a long row
    each span is computed again in backward, from its inputs and the state at its entry.
    """
    ids = [None] if segments is None else segments.split(SPAN, 1)  # each (b, t')
    spans = [*zip(*(y.split(SPAN, 1) for y in (x, dt, B, C)), strict=True)]
    if len(spans) == 1:
        return chunk_scan(x, dt, A, B, C, chunk_size, segments, state)
    ys = []
    for i, (x, dt, B, C) in enumerate(spans):
        here = None if segments is None else ids[i]
        if i and here is not None:  # chunk_scan takes the state for that of the first document
            goes_on = here[:, 0] == ids[i - 1][:, -1]  # (b,)
            state = state * goes_on[:, None, None, None]
        args = x, dt, A, B, C, chunk_size, here, state
        y, state = checkpoint(chunk_scan, *args, use_reentrant=False, preserve_rng_state=False)
        ys.append(y)
    return torch.cat(ys, 1), state  # (b, t, h, c), (b, h, c, s)


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
    # On a CPU a few rows at a time, so that what was written is read again from the core's cache.
    rows = max(STEP_BYTES // (state[0].numel() * state.element_size()), 1)
    for i in range(0, b, rows if x.device.type == "cpu" else b):
        part = slice(i, i + rows if x.device.type == "cpu" else b)
        new = state[part].mul_(decay[part]).view(-1, h // g * c, s)  # (b*g, h/g*c, s)
        new.baddbmm_(xdt[part].flatten(0, 1), B[part].reshape(-1, 1, s))
        y[part] = (new @ C[part].reshape(-1, s, 1)).view_as(y[part])
    return y.view(b, h, c)


def causal_conv(padded, weight, bias, segments=None):
    """Depthwise causal convolution that starts anew at each document.

    padded (b, w-1+t, m) the inputs after those before them, or zeros; weight (m, 1, w) as on disk,
    bias (m,), segments (b, t). Returns (b, t, m). Written as a sum of w shifted products: the
    document mask then costs one comparison a tap.
    """
    *earlier, now = weight[:, 0].unbind(-1)  # w taps (m,)
    t = padded.shape[1] - len(earlier)
    y = torch.addcmul(bias, padded[:, len(earlier) :], now)  # (b, t, m)
    for i, tap in enumerate(earlier):
        back, shifted = len(earlier) - i, padded[:, i : i + t]  # (b, t, m) x, `back` earlier
        if segments is not None:
            same = F.pad(segments, (back, 0), value=-1)[:, :t] == segments  # (b, t)
            shifted = shifted * same[..., None]
        y = torch.addcmul(y, shifted, tap)
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
        b, t, _ = x.shape
        if ctx.valid is not None:
            x = x * ctx.valid[..., None]  # so that the conv sees zeros on padding
        projected = self.in_proj(x)
        sizes = (cfg.mamba_inner, cfg.conv_dim, cfg.mamba_num_heads)
        gate, xBC, raw_dt = projected.split(sizes, dim=-1)  # (b, t, h*c), (b, t, m), (b, t, h)
        if layer is None:
            padded = F.pad(xBC, (0, 0, cfg.conv_kernel - 1, 0))  # (b, w-1+t, m)
        else:
            padded = self.continued(layer["conv"], xBC, ctx.valid)  # (b, w-1+t, m)
        weight, bias = self.conv1d.weight, self.conv1d.bias
        mixed = F.silu(causal_conv(padded, weight, bias, ctx.segments))  # (b, t, m)
        groups_size = cfg.mamba_n_groups * cfg.ssm_state_size
        xs, B, C = mixed.split((cfg.mamba_inner, groups_size, groups_size), dim=-1)
        xs = upcast(xs).unflatten(-1, (cfg.mamba_num_heads, -1))  # (b, t, h, c)
        B = upcast(B).unflatten(-1, (cfg.mamba_n_groups, -1))  # (b, t, g, s)
        C = upcast(C).unflatten(-1, (cfg.mamba_n_groups, -1))  # (b, t, g, s)
        dt, A = self.dt(raw_dt, ctx.valid), -torch.exp(upcast(self.A_log))
        if layer is not None and t == 1:
            y = scan_step(xs[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], layer["ssm"])[:, None]
        else:
            state = None if layer is None else layer["ssm"]
            q = min(cfg.chunk_size, CPU_CHUNK) if x.device.type == "cpu" else cfg.chunk_size
            y, state = long_scan(xs, dt, A, B, C, q, ctx.segments, state)
            if layer is not None:
                layer["ssm"] = state
        if layer is not None:
            layer["conv"] = self.next_window(padded, ctx.valid)
        y = torch.addcmul(y, xs, upcast(self.D)[:, None])  # (b, t, h, c)
        return self.out_proj(self.gated_norm(y.flatten(-2), gate))  # (b, t, d)

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
