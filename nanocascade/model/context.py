"""The context of a forward pass, computed once for all blocks: positions, masks, indices.

There are two kinds of passes. Training and scoring read packed documents (documents.py); sampling
reads rows of tokens that continue a cache (cache.py).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nanocascade.model.cache import Cache
from nanocascade.model.documents import AttentionPlan, Documents, ScanPlan, attention_plan
from nanocascade.model.mamba2 import plan_scan
from nanocascade.model.moe import Routing


@dataclass
class Context:
    """Facts about the tokens of one forward pass that every block needs, computed once.

    Of packed documents: how they attend, and the plans of their scan (documents.py). Of rows that
    continue a cache: valid (b, t), False on padding, or None; rows (b, 1) and slots (b, t), where
    in the cache each token is written; seen: cache slots that attention reads; mask (b, 1, t, t'),
    or None for plain causal (or, for single tokens of equally long rows, everything).
    rotary: cos and sin (b, t, 1, c), or None.
    """

    attention: AttentionPlan | None = None
    scans: list[ScanPlan] | None = None
    scan_outputs: Tensor | None = None
    valid: Tensor | None = None
    rows: Tensor | None = None
    slots: Tensor | None = None
    seen: int = 0
    mask: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    routing: Routing | None = None


def split_documents(segments: Tensor, parents: list[int] | None) -> Documents:
    """The documents of packed rows (b, t): [[4, 4, 7], [7, 7, 7]] are three, of 2, 1 and 3."""
    changed = torch.ones_like(segments, dtype=torch.bool)  # (b, t)
    changed[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = changed.flatten().nonzero()[:, 0].cpu()  # (o,)
    lengths = torch.diff(starts, append=torch.tensor([segments.numel()]))  # (o,)
    return Documents(lengths, torch.tensor([-1] * len(lengths) if parents is None else parents))


def packed_context(config, documents: Documents, dtype, device) -> Context:
    """Context of packed documents: a prompt of 3 tokens and its two responses are one attention
    call for the prompt, one for both responses, and a chunk of the scan for each of the three."""
    ctx = Context()
    if "*" in config.pattern:
        ctx.attention = attention_plan(documents, dtype, device)
    if "M" in config.pattern:
        ctx.scans, ctx.scan_outputs = plan_scan(config, documents, device)
    return ctx


def cached_context(ids: Tensor, cache: Cache, mask: Tensor | None, dtype):
    """Context and positions (b, t) of tokens that continue the rows of a cache.

    Rows that hold 3 and 1 tokens get 5 6 and, padded on the left, 7: positions 3 4 and 0 1,
    slots 3 4 and bin 1 (a slot that is never read), and the 7 sees slots 0 and 1.
    """
    b, t = ids.shape
    valid = mask.bool() if mask is not None else None
    ctx = Context(valid=valid)
    steps = torch.arange(t, device=ids.device).expand(b, t)  # (b, t)
    if valid is not None:
        steps = valid.long().cumsum(1) - 1  # (b, t) counts real tokens only
    # Right padding comes after all that real tokens may see: plain causal attention skips it.
    right = valid is None or bool(valid[:, 0].all())
    positions = cache.lengths[:, None] + steps  # (b, t)
    bin_slot = cache.max_len  # padding writes there
    ctx.rows = torch.arange(b, device=ids.device)[:, None]  # (b, 1)
    ctx.slots = positions if valid is None else positions.where(valid, bin_slot)
    shortest, longest = (int(x) for x in cache.lengths.aminmax())
    last = longest + t - 1 if valid is None else int(positions[:, -1].max())
    assert last < cache.max_len, f"{last + 1} tokens in a cache of {cache.max_len}"
    if longest or not right:
        ctx.seen = last + 1
        if t > 1 or shortest < longest or not right:
            ctx.mask = cache_mask(positions, ctx.seen, dtype)
    return ctx, positions


def cache_mask(positions: Tensor, seen: int, dtype) -> Tensor:
    """0 on the slots up to a token's own, -inf beyond (b, 1, t, t'): added in one operation,
    where attention would turn booleans into this once a block."""
    slots = torch.arange(seen, device=positions.device)  # (t',)
    hidden = slots > positions.clamp(min=0)[..., None]  # (b, t, t')
    zeros = torch.zeros_like(hidden, dtype=dtype)  # (b, t, t')
    return zeros.masked_fill_(hidden, -math.inf)[:, None]


def rotary_table(config, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos (b, t, 1, c) and sin, its first half negated, of the rotary embedding of positions."""
    half = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    frequency = 1.0 / config.rope_theta ** (half / config.head_dim)  # (c/2,)
    scaling = config.rope_scaling
    if scaling:  # Llama 3: long wavelengths are stretched, with a smooth step between the bands
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)  # (c/2,)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        smooth = ((turns - low) / (high - low)).clamp(0, 1)  # (c/2,)
        frequency = frequency * (smooth + (1 - smooth) / scaling["factor"])
    angle = positions[..., None, None].float() * frequency  # (b, t, 1, c/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
