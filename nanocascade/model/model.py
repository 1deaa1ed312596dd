"""One Model for all families: a pattern string names the mixer of each block.

Every block is x + mixer(rmsnorm(x)), with mixer M = Mamba-2, E = mixture of experts, * = attention,
- = dense MLP. nemotron_h is written in this alphabet; a Qwen3 or Llama layer is two blocks, `*-` or
`*E`. The sampler runs these same modules with a cache, so the distribution it samples from is the
one that is scored. The semantics are those of the published models: tests/test_model.py compares
with transformers. Nothing here knows about ranks or devices.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias

from nanocascade.model.cache import Cache
from nanocascade.model.context import (
    Context,
    cached_context,
    packed_context,
    rotary_table,
    split_documents,
)
from nanocascade.model.documents import AttentionPlan, gather
from nanocascade.model.layers import MLP, RMSNorm, upcast
from nanocascade.model.mamba2 import Mamba2
from nanocascade.model.moe import Experts, MoE, Router, Routing


@dataclass
class ModelConfig:
    """The differences between the families. checkpoint/hf_config.py fills it from config.json.

    pattern: one character a block. rope_theta None: no position signal (nemotron_h).
    norm_weight_in_fp32: multiply by the norm weight before the cast (nemotron_h), or after it.
    """

    model_type: str = "nemotron_h"  # nemotron_h | qwen2 | qwen3 | qwen3_moe | llama
    vocab_size: int = 512
    hidden_size: int = 128
    pattern: str = "ME*E"
    tie_word_embeddings: bool = False
    norm_eps: float = 1e-5
    norm_weight_in_fp32: bool = True
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    rope_theta: float | None = None
    rope_scaling: dict | None = None  # llama3's {factor, low_freq_factor, high_freq_factor, ...}
    qk_norm: bool = False
    qkv_bias: bool = False  # biases on q, k and v (qwen2); the output projection has none
    intermediate_size: int = 256
    gated_mlp: bool = False  # SwiGLU with a gate projection, or relu(x)^2 without
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 128
    shared_expert_intermediate_size: int = 0  # 0 = no shared expert
    router: str = "sigmoid"  # sigmoid (with correction bias) | softmax
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    mamba_num_heads: int = 8
    mamba_head_dim: int = 32
    mamba_n_groups: int = 1
    ssm_state_size: int = 32
    conv_kernel: int = 4
    chunk_size: int = 128
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    initializer_range: float = 0.02
    max_position_embeddings: int = 262144
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0
    source: dict = field(default_factory=dict, compare=False)  # config.json as it was read

    def __post_init__(self):
        unknown = set(self.pattern) - set("ME*-")
        if unknown or not self.pattern:
            raise ValueError(f"block pattern {self.pattern!r}: want characters of 'M E * -'")
        if "*" in self.pattern and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if "M" in self.pattern and self.mamba_num_heads % self.mamba_n_groups:
            raise ValueError(
                f"mamba_num_heads {self.mamba_num_heads} is not a multiple of its n_groups"
                f" {self.mamba_n_groups}"
            )
        kept, size = self.topk_group, self.num_experts // max(self.n_group, 1)  # experts a group
        possible = 1 <= kept <= self.n_group and size * self.n_group == self.num_experts
        possible &= (size > 1 or self.n_group == 1) and 1 <= self.num_experts_per_tok <= kept * size
        if "E" in self.pattern and not possible:
            raise ValueError(
                f"impossible: num_experts_per_tok {self.num_experts_per_tok} of num_experts "
                f"{self.num_experts} with n_group {self.n_group} and topk_group {kept}"
            )

    @property
    def mamba_inner(self) -> int:
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        return self.mamba_inner + 2 * self.mamba_n_groups * self.ssm_state_size

    @property
    def num_moe_layers(self) -> int:
        return self.pattern.count("E")

    def num_parameters(self, active: bool = False) -> int:
        """Parameters in all, or active: those that a token uses, its own experts only."""
        with torch.device("meta"):
            model = Model(self)
        total = sum(p.numel() for p in model.parameters())
        if active:
            experts = [m for m in model.modules() if isinstance(m, Experts)]
            idle = 1 - self.num_experts_per_tok / max(self.num_experts, 1)
            total -= round(sum(p.numel() for m in experts for p in m.parameters()) * idle)
        return total


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate-half rotary embedding of x (b, t, h, c): (first, second) halves of the channels become
    (first * cos - second * sin, second * cos + first * sin)."""
    cos, sin = rotary
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


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


class Attention(nn.Module):
    """Causal grouped-query attention: the `*` mixer."""

    def __init__(self, config: ModelConfig):
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

    def forward(self, x: Tensor, ctx: Context, layer: dict | None = None) -> Tensor:
        """x (b, t, d) -> (b, t, d); with `layer`, the block's cache, keys and values join it."""
        c = self.config.head_dim
        q = self.q_proj(x).unflatten(-1, (-1, c))  # (b, t, h, c)
        k = self.k_proj(x).unflatten(-1, (-1, c))  # (b, t, k, c)
        v = self.v_proj(x).unflatten(-1, (-1, c))  # (b, t, k, c)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if ctx.rotary is not None:
            q, k = rotate(q, ctx.rotary), rotate(k, ctx.rotary)
        if layer is None:
            y = self.packed(q, k, v, ctx.attention)  # (b, t, h, c)
        else:
            y = self.cached(q, k, v, ctx, layer)  # (b, t, h, c)
        return self.o_proj(y.flatten(2))  # (b, t, d)

    def packed(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
        """Attention of packed documents, each to its parent's keys and its own: (b, t, h, c)."""
        shape = q.shape
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # (n, h | k, c)
        q, k, v = gather(q, plan.queries), gather(k, plan.keys), gather(v, plan.keys)
        q_sizes = [x.documents * x.own for x in plan.calls]
        k_sizes = [x.documents * (x.inherited + x.own) for x in plan.calls]
        pieces = zip(plan.calls, q.split(q_sizes), k.split(k_sizes), v.split(k_sizes), strict=True)
        answers = []
        for call, *qkv in pieces:
            qkv = [x.unflatten(0, (call.documents, -1)).transpose(1, 2) for x in qkv]
            y = attend(*qkv, call.mask)  # (m, h, own, c)
            answers.append(y.transpose(1, 2).flatten(0, 1))  # (m*own, h, c)
        return gather(torch.cat(answers), plan.answers).view(shape)

    def cached(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, layer: dict) -> Tensor:
        """Attention of tokens (b, t, h | k, c) that join the rows of a cache: (b, t, h, c)."""
        b, t, h, c = q.shape
        layer["k"][ctx.rows, :, ctx.slots] = k
        layer["v"][ctx.rows, :, ctx.slots] = v
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (b, h | k, t, c)
        if ctx.seen:  # 0: the cache was empty, and a prompt sees only itself
            k, v = layer["k"][:, :, : ctx.seen], layer["v"][:, :, : ctx.seen]  # (b, k, t', c)
        if t == 1:
            # The queries that share a key head are rows of one product: each key is read once.
            q = q.reshape(b, k.shape[1], -1, c)  # (b, k, h/k, c)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=ctx.mask)  # (b, k, h/k, c)
            return y.reshape(b, 1, h, c)
        return attend(q, k, v, ctx.mask).transpose(1, 2)


class Block(nn.Module):
    """x + mixer(rmsnorm(x))."""

    def __init__(self, config: ModelConfig, kind: str, moe_index: int):
        super().__init__()
        self.kind = kind
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, config.norm_weight_in_fp32)
        if kind == "M":
            self.mixer = Mamba2(config)
        elif kind == "*":
            self.mixer = Attention(config)
        elif kind == "E":
            self.mixer = MoE(config, moe_index)
        else:
            self.mixer = MLP(config.hidden_size, config.intermediate_size, config.gated_mlp)

    def forward(self, x: Tensor, ctx: Context, layer: dict | None = None) -> Tensor:
        return x + self.mixer(self.norm(x), ctx, layer)


class Model(nn.Module):
    """Embedding, blocks and final norm; `logits` is separate: (b, t, v) need not exist."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # nn.Embedding(v, d) would draw random numbers, for which torch loads its compiler on meta.
        table = torch.empty(config.vocab_size, config.hidden_size)  # (v, d)
        self.embed = nn.Embedding.from_pretrained(table, freeze=False)
        kinds = config.pattern
        self.blocks = nn.ModuleList(
            Block(config, kind, kinds[:i].count("E")) for i, kind in enumerate(kinds)
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, config.norm_weight_in_fp32)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.head.weight = self.embed.weight

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> "Model":
        """Random weights: normal(initializer_range), norms 1, biases 0, Mamba's own."""
        torch.manual_seed(seed)
        std = self.config.initializer_range
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding, Router)):
                nn.init.normal_(module.weight, std=std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Experts):
                for weight in module.parameters():
                    nn.init.normal_(weight, std=std)
        for module in self.modules():  # after the Linears inside them
            if isinstance(module, Mamba2):
                module.reset_parameters(std)
        return self

    def forward(
        self,
        ids: Tensor,
        *,
        cache: Cache | None = None,
        segments: Tensor | None = None,
        parents: list[int] | None = None,
        mask: Tensor | None = None,
        routing: Routing | None = None,
    ) -> Tensor:
        """Hidden states (b, t, d) of ids (b, t), after the final norm.

        segments (b, t): document ids of packed rows; attention, conv and SSM state start anew where
        they change. parents: for each document the one that it continues, or -1; documents.py
        explains how a prompt's state reaches its responses. mask (b, t): False on padding, left or
        right. cache: the tokens continue its rows, and are added to it. routing: records the chosen
        experts, or replays recorded ones.
        """
        assert cache is None or segments is None, "packed rows have no cache"
        ctx = self.context(ids, cache, segments, parents, mask, routing)
        x = self.embed(ids)  # (b, t, d)
        for i, block in enumerate(self.blocks):
            x = block(x, ctx, cache.layers[i] if cache is not None else None)
        if cache is not None:
            added = ids.shape[1] if mask is None else mask.sum(1)  # (b,) or int
            cache.lengths = cache.lengths + added
        return self.norm(x)  # (b, t, d)

    def context(self, ids, cache, segments, parents, mask, routing) -> Context:
        """The Context of a forward pass, computed once for all blocks."""
        config, dtype = self.config, self.embed.weight.dtype
        if cache is not None:
            ctx, positions = cached_context(ids, cache, mask, dtype)
        else:  # a row is a document, or its real tokens are one and its padding another
            segments = mask if segments is None else segments
            segments = torch.zeros_like(ids) if segments is None else segments
            documents = split_documents(segments, parents)
            ctx = packed_context(config, documents, dtype, ids.device)
            positions = documents.positions.to(ids.device).view_as(ids)  # (b, t)
        if config.rope_theta is not None:
            ctx.rotary = tuple(x.to(dtype) for x in rotary_table(config, positions))
        ctx.routing = routing
        return ctx

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (..., v) of hidden states (..., d), in at least fp32."""
        return upcast(self.head(hidden))
