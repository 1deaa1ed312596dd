"""Causal grouped-query attention: the `*` mixer, over packed documents or over a cache."""

import math
from collections import defaultdict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias, causal_lower_right

from nanocascade.model.documents import Documents, take_rows
from nanocascade.model.layers import RMSNorm

CAUSAL_KERNELS = ("cuda",)  # devices that need no mask where all queries are a document's last
# A call has the fixed cost of about 64 tokens, so documents share calls. Lengths up to CALL_SHORT
# are rounded up to multiples of CALL_PADDING.
CALL_PADDING, CALL_SHORT = 16, 128

# ---- Packed documents ----------------------------------------------------------------------------


class AttentionCall(NamedTuple):
    """Documents that attend in one call, padded to one shape: `inherited` keys, then `own`."""

    documents: int
    inherited: int
    own: int
    mask: Tensor | None  # (1 or documents, 1, own, inherited + own), or None for plain causal


class AttentionPlan(NamedTuple):
    queries: Tensor  # (sum of documents * own,) the token of each padded query
    keys: Tensor  # (sum of documents * (inherited + own),)
    unpad: Tensor  # (n,) the place of each token among the padded queries
    calls: list[AttentionCall]


def attention_plan(documents: Documents, dtype, device) -> AttentionPlan:
    """Documents of like shapes share a call; long ones get a call of their own.

    A prompt of 2 tokens and responses of 2 and 1, in calls of (0, 2) and (2, 2) if nothing else is
    padded: queries 0 1 | 2 3 4 4, keys 0 1 | 0 1 2 3 0 1 4 4, unpad 0 1 2 3 4. A padded place
    repeats the document's last token: no real query sees it.
    """
    queries, keys, calls, firsts = [], [], [], {}
    for members in share_calls(list(zip(documents.inherited, documents.lengths, strict=True))):
        inherited = [documents.inherited[i] for i in members]
        longest = max(inherited)
        own = max(documents.lengths[i] for i in members)
        for i in members:
            firsts[i] = len(queries)
            tokens = padded(documents.places(i), own)
            queries += tokens
            keys += padded(documents.places(documents.parents[i]), longest) + tokens
        mask = call_mask(inherited, own, dtype, device)
        calls.append(AttentionCall(len(members), longest, own, mask))
    unpad = [firsts[i] + j for i, n in enumerate(documents.lengths) for j in range(n)]
    indices = (torch.tensor(x, device=device) for x in (queries, keys, unpad))
    return AttentionPlan(*indices, calls)


def padded(tokens: list[int], size: int) -> list[int]:
    """tokens, the last one repeated up to `size`."""
    return tokens + tokens[-1:] * (size - len(tokens))


def share_calls(shapes: list[tuple[int, int]]) -> list[list[int]]:
    """Documents (inherited, own) by call: short sizes are padded to multiples of CALL_PADDING.

    [(0, 30), (30, 5), (0, 2000), (30, 6)] -> [[0], [1, 3], [2]]
    """
    calls = defaultdict(list)
    for i, shape in enumerate(shapes):
        rounded = (-(-n // CALL_PADDING) * CALL_PADDING if n <= CALL_SHORT else n for n in shape)
        calls[tuple(rounded)].append(i)
    return list(calls.values())


def call_mask(inherited: list[int], own: int, dtype, device):
    """Mask added to the scores of a call: 0 on keys that a query sees, -inf on the others.

    inherited: real tokens of each document's parent. None: plain causal attention.
    """
    longest = max(inherited)
    if not longest:
        return None
    if min(inherited) == longest:  # one mask for all documents
        if device.type in CAUSAL_KERNELS:
            return causal_lower_right(own, longest + own)
        inherited = [longest]
    shape = (len(inherited), 1, own, longest + own)  # (o', 1, own, inherited + own)
    seen = torch.ones(shape, dtype=torch.bool, device=device).tril(longest)
    for rows, n in zip(seen, inherited, strict=True):
        rows[..., n:longest] = False  # padding
    return torch.zeros(shape, dtype=dtype, device=device).masked_fill_(~seen, -math.inf)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of q (b, h, t, c) to k and v (b, k, t', c), causal where there is no mask.

    On a GPU only 16-bit numbers without a mask of numbers have a kernel in which query heads share
    a key head. Elsewhere torch would hold a score of every pair, so the key heads are repeated.
    """
    causal = mask is None or isinstance(mask, CausalBias)
    shared = q.device.type == "cpu" or causal and q.itemsize == 2
    if not shared:
        times = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)  # (b, h, t', c)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=shared
    )  # (b, h, t, c)


# ---- Positions -----------------------------------------------------------------------------------


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


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate-half rotary embedding of x (b, t, h, c): (first, second) halves of the channels become
    (first * cos - second * sin, second * cos + first * sin)."""
    cos, sin = rotary
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


# ---- The mixer -----------------------------------------------------------------------------------


class Attention(nn.Module):
    """The `*` mixer. Parameter names and shapes are those on disk."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        d, c = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(d, config.num_heads * c, bias=config.qkv_bias)
        self.k_proj = nn.Linear(d, config.num_kv_heads * c, bias=config.qkv_bias)
        self.v_proj = nn.Linear(d, config.num_kv_heads * c, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_heads * c, d, bias=False)
        norm = (c, config.norm_eps, config.norm_weight_in_fp32)
        self.q_norm = RMSNorm(*norm) if config.qk_norm else None
        self.k_norm = RMSNorm(*norm) if config.qk_norm else None

    def forward(self, x: Tensor, ctx, cached: dict | None = None) -> Tensor:
        """x (b, t, d) -> (b, t, d). `ctx` is the forward's Context, `cached` the block's cache."""
        c = self.config.head_dim
        q = self.q_proj(x).unflatten(-1, (-1, c))  # (b, t, h, c)
        k = self.k_proj(x).unflatten(-1, (-1, c))  # (b, t, k, c)
        v = self.v_proj(x).unflatten(-1, (-1, c))  # (b, t, k, c)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if ctx.rotary is not None:
            q, k = rotate(q, ctx.rotary), rotate(k, ctx.rotary)
        if cached is not None:
            # Indices (b, t) on both sides of a slice put their axes first: (b, t, k, c).
            cached["k"][ctx.rows, :, ctx.slots] = k
            cached["v"][ctx.rows, :, ctx.slots] = v
        if ctx.attention is not None:
            y = self.packed(q, k, v, ctx.attention)  # (b, t, h, c)
        else:
            y = self.step(q, cached, ctx.mask)  # (b, 1, h, c)
        return self.o_proj(y.flatten(2))  # (b, t, d)

    def packed(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
        """Attention of packed documents, each to its parent's keys and its own: (b, t, h, c)."""
        shape = q.shape
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # (n, h | k, c)
        q, k, v = take_rows(q, plan.queries), take_rows(k, plan.keys), take_rows(v, plan.keys)
        q_sizes = [x.documents * x.own for x in plan.calls]
        k_sizes = [x.documents * (x.inherited + x.own) for x in plan.calls]
        pieces = zip(plan.calls, q.split(q_sizes), k.split(k_sizes), v.split(k_sizes), strict=True)
        outputs = []
        for call, *qkv in pieces:
            qkv = [x.unflatten(0, (call.documents, -1)).transpose(1, 2) for x in qkv]
            y = attend(*qkv, call.mask)  # (o', h, own, c)
            outputs.append(y.transpose(1, 2).flatten(0, 1))  # (o'*own, h, c)
        return take_rows(torch.cat(outputs), plan.unpad).view(shape)

    def step(self, q: Tensor, cached: dict, mask: Tensor) -> Tensor:
        """Attention of one token of each row, q (b, 1, h, c), to the t' slots of the row's cache
        that any row fills: (b, 1, h, c)."""
        seen = mask.shape[-1]
        k, v = cached["k"][:, :, :seen], cached["v"][:, :, :seen]  # (b, k, t', c)
        # The queries that share a key head are rows of one product: each key is read once.
        queries = q.reshape(len(q), k.shape[1], -1, q.shape[-1])  # (b, k, h/k, c)
        y = F.scaled_dot_product_attention(queries, k, v, attn_mask=mask)  # (b, k, h/k, c)
        return y.reshape(q.shape)
