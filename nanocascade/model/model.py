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
from torch import Tensor, nn

from nanocascade.model import scan
from nanocascade.model.attention import Attention, AttentionPlan, attention_plan, rotary_table
from nanocascade.model.cache import Cache
from nanocascade.model.documents import Documents, split_documents
from nanocascade.model.layers import MLP, RMSNorm, upcast
from nanocascade.model.mamba2 import Mamba2
from nanocascade.model.moe import Experts, MoE, Router, Routing
from nanocascade.model.scan import ScanPlan, scan_plan


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


@dataclass
class Context:
    """Facts about the tokens of one forward pass that every block needs, computed once."""

    # Packed documents: how they attend, and their scan.
    attention: AttentionPlan | None = None
    scan: ScanPlan | None = None
    # A decode step: 0 on the cache's slots up to the token's own, -inf beyond.
    mask: Tensor | None = None  # (b, 1, 1, t')
    # With a cache: where each token's key and value are written.
    rows: Tensor | None = None  # (b, t)
    slots: Tensor | None = None  # (b, t)
    # Always.
    rotary: tuple[Tensor, Tensor] | None = None  # cos and sin (b, t, 1, c); None: no positions
    routing: Routing | None = None


def packed_context(config, documents: Documents, dtype, device, keep_ends=False) -> Context:
    """Context of packed documents: a prompt of 3 tokens and its two responses are one attention
    call for the prompt, one for both responses, and a chunk of the scan for each of the three."""
    ctx = Context()
    if "*" in config.pattern:
        ctx.attention = attention_plan(documents, dtype, device)
    if "M" in config.pattern:
        limit = min(config.chunk_size, scan.CPU_CHUNK if device.type == "cpu" else math.inf)
        ctx.scan = scan_plan(documents, limit, config.conv_kernel - 1, device, keep_ends)
    return ctx


def step_context(cache: Cache, dtype) -> Context:
    """Context of one token that joins each row of a cache: after rows of 3 and 1 tokens slots 3 and
    1 are written, and the second token sees slots 0 and 1 of 0 to 3."""
    slots = cache.lengths[:, None].clone()  # (b, 1)
    seen = int(slots.max()) + 1
    assert seen <= cache.max_len, f"{seen} tokens in a cache of {cache.max_len}"
    rows = torch.arange(len(slots), device=slots.device)[:, None]  # (b, 1)
    later = torch.arange(seen, device=slots.device) > slots  # (b, t')
    # Numbers, since attention would turn booleans into them once a block.
    mask = torch.zeros_like(later, dtype=dtype).masked_fill_(later, -math.inf)[:, None, None]
    return Context(mask=mask, rows=rows, slots=slots)


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

    def forward(self, x: Tensor, ctx: Context, cached: dict | None = None) -> Tensor:
        return x + self.mixer(self.norm(x), ctx, cached)


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

        ids alone           each row is a document
        mask                each row is a document; mask (b, t) is False on padding, left or right
        segments            packed rows: segments (b, t) are document ids; attention, conv and SSM
                            state start anew where they change
        segments, parents   parents: for each document the one that it continues, or -1
        segments, cache     a prefill: document i fills row i of the cache, which was empty
        cache (, mask)      the tokens of row i continue row i of the cache

        With a cache there are no gradients. documents.py explains how a prompt's state reaches its
        responses. routing: records the chosen experts, or replays recorded ones.
        """
        assert segments is None or mask is None, "segments name the padding: a document of its own"
        assert cache is None or parents is None, "a cache holds a row for each document"
        if cache is not None and segments is None and (mask is not None or ids.shape[1] > 1):
            assert routing is None, "routing of tokens that join a cache: one token at a time"
            return self.join(ids, cache, torch.ones_like(ids) if mask is None else mask)
        ctx = self.context(ids, cache, mask if segments is None else segments, parents)
        ctx.routing = routing
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            x = self.embed(ids)  # (b, t, d)
            for i, block in enumerate(self.blocks):
                x = block(x, ctx, cache.layers[i] if cache is not None else None)
            return self.norm(x)  # (b, t, d)

    def context(self, ids, cache, segments, parents) -> Context:
        """The Context of a forward pass; a cache's lengths grow by its tokens."""
        config, dtype = self.config, self.embed.weight.dtype
        if cache is not None and segments is None:
            ctx = step_context(cache, dtype)
            positions = ctx.slots  # (b, 1)
            cache.lengths += 1
        else:  # a row is a document, or its real tokens are one and its padding another
            segments = torch.zeros_like(ids) if segments is None else segments
            documents = split_documents(segments, parents)
            ctx = packed_context(config, documents, dtype, ids.device, cache is not None)
            positions = documents.positions().to(ids.device).view_as(ids)  # (b, t)
            if cache is not None:
                cache.lengths.copy_(torch.tensor(documents.lengths))  # a row for each document
                ctx.rows = torch.repeat_interleave(cache.lengths).view_as(ids)
                ctx.slots = positions
        if config.rope_theta is not None:
            ctx.rotary = tuple(x.to(dtype) for x in rotary_table(config, positions))
        return ctx

    def join(self, ids: Tensor, cache: Cache, mask: Tensor) -> Tensor:
        """Hidden states (b, t, d) of tokens that continue the rows of a cache, where mask (b, t) is
        True, one column after the other. For any input; the sampler has no use for it."""
        weight = self.embed.weight
        hidden = weight.new_zeros(*ids.shape, self.config.hidden_size)  # (b, t, d)
        for j in range(ids.shape[1]):
            rows = mask[:, j].nonzero()[:, 0]  # (b',)
            if not len(rows):
                continue
            part_rows = torch.arange(len(rows), device=ids.device)  # (b',)
            part = Cache(self.config, len(rows), cache.max_len, weight.dtype, ids.device)
            part.write(part_rows, cache, rows)
            hidden[rows, j] = self(ids[rows, j, None], cache=part)[:, 0]
            cache.write(rows, part, part_rows)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (..., v) of hidden states (..., d), in at least fp32."""
        return upcast(self.head(hidden))
