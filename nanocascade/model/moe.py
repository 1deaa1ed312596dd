"""Mixture of experts: two routers, two equivalent products, the balancing bias.

nemotron_h: sigmoid scores, a correction bias that enters the CHOICE of experts only, one shared
expert. qwen3_moe: softmax over all experts, none shared.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanocascade.model.layers import MLP, activate, upcast


class Routing:
    """The experts of one forward pass: those to use (`replay`), and those that were used.

    replay: (b, t, l, a) recorded choices, or None to let the router choose; chosen: one (b, t, a)
    a mixture-of-experts block, in block order. Assigned by index, so that a forward recomputed for
    activation checkpointing writes the same again.
    """

    def __init__(self, num_layers: int, replay: Tensor | None = None):
        self.replay = replay
        self.chosen: list[Tensor | None] = [None] * num_layers

    def experts(self) -> Tensor:
        if not self.chosen:
            raise ValueError("routing replay: this model is dense, it has no experts to replay")
        return torch.stack(self.chosen, 2)  # (b, t, l, a)

    def tokens_per_expert(self, copies: Tensor, num_experts: int) -> Tensor:
        """Tokens of each expert (l, e), a token counted copies (b, t) times: 0 on padding, and on
        a shared prompt the number of its responses."""
        if not self.chosen:  # a dense model
            return torch.zeros(0, num_experts, dtype=torch.long, device=copies.device)
        chosen = self.experts().flatten(0, 1).transpose(0, 1)  # (l, n, a)
        counts = copies.long().view(1, -1, 1).expand_as(chosen).flatten(1)  # (l, n*a)
        load = counts.new_zeros(len(chosen), num_experts)  # (l, e)
        return load.scatter_add_(1, chosen.flatten(1), counts)


def fused_mm(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """x (n, d), sorted by group, and weights (e, d, f) of the groups, which end at `ends` (e,):
    each row times the matrix of its group (n, f), without a host sync."""
    return F.grouped_mm(x, weights, offs=ends.to(torch.int32))


def looped_mm(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """The same (n, f) in a loop; unbind, as the gradient of an index would be of all weights."""
    groups = zip(x.tensor_split(ends[:-1].tolist()), weights.unbind(0), strict=True)
    return torch.cat([rows @ weight for rows, weight in groups if len(rows)])


class Experts(nn.Module):
    """All routed experts, stacked and input first: up (e, d, u, f), down (e, f, d).

    With a gate u = 2, gate and up in one product, else 1. On a CPU a product with few rows, as
    decoding makes them, takes up to half the time in this layout; the published one is (f, d).
    """

    def __init__(self, config):
        super().__init__()
        e, f, d = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.up_proj = nn.Parameter(torch.empty(e, d, 1 + config.gated_mlp, f))
        self.down_proj = nn.Parameter(torch.empty(e, f, d))

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """x (n, d), experts and weights (n, a) -> (n, d), the weighted sum of each token's experts.

        The (token, expert) pairs are sorted by expert, so that each expert multiplies its tokens
        at once.
        """
        order, ends = self.sort_pairs(experts)  # (n*a,), (e,)
        token = order // experts.shape[1]  # (n*a,) whose pair this is
        inputs = x.index_select(0, token)  # (n*a, d); x[token] would be slower backward
        outputs = self.products(inputs, ends)  # (n*a, d)
        shares = weights.flatten().index_select(0, order)  # (n*a,)
        outputs = outputs * shares[:, None].to(x.dtype)  # (n*a, d)
        return torch.zeros_like(x).index_add(0, token, outputs)  # (n, d)

    def sort_pairs(self, experts: Tensor) -> tuple[Tensor, Tensor]:
        """The order (n*a,) of pairs by their expert, and the place where each expert's end (e,)."""
        ids = experts.flatten()  # (n*a,)
        order = ids.argsort(stable=True)  # (n*a,)
        return order, group_ends(ids[order], len(self.up_proj))

    def matrices(self) -> tuple[Tensor, Tensor]:
        """up_proj and down_proj; under expert parallelism only this rank's (engine/experts.py)."""
        return self.up_proj, self.down_proj

    def products(self, inputs: Tensor, ends: Tensor) -> Tensor:
        """inputs (n*a, d), sorted by expert, through their experts: (n*a, d)."""
        up_proj, down_proj = self.matrices()
        up = self.multiply(inputs, up_proj.flatten(2), ends)  # (n*a, u*f)
        hidden = activate(*up.chunk(up_proj.shape[2], -1))  # (n*a, f) of up, and gate
        return self.multiply(hidden, down_proj, ends)

    def multiply(self, x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        # grouped_mm takes neither fp64 nor rows whose bytes are no multiple of 16.
        odd = any(n * x.itemsize % 16 for n in weights.shape[1:])
        # On a CPU it visits all experts: decoding one row then takes 1.2 times as long.
        few = x.device.type == "cpu" and len(x) < len(weights)
        product = looped_mm if odd or few or x.dtype == torch.float64 else fused_mm
        return product(x, weights, ends)


def group_ends(sorted_experts: Tensor, num_experts: int) -> Tensor:
    """Where each expert's run ends in sorted expert ids (n,): (e,). A search in sorted data is
    cheaper than counting by scatter, and needs no host sync."""
    ids = torch.arange(num_experts, device=sorted_experts.device)  # (e,)
    return torch.searchsorted(sorted_experts, ids, right=True)


class Router(nn.Module):
    """Scores of the experts, and the choice of `a` of them for each token, in at least fp32."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        if config.router == "sigmoid":
            bias = torch.zeros(config.num_experts)  # fp32 whatever the model's dtype; no gradient
            self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x: Tensor, replay: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (n, d) -> experts (n, a) and their weights (n, a).

        With `replay` (n, a) the recorded experts are used with the current scores as weights.
        """
        cfg = self.config
        logits = F.linear(upcast(x), upcast(self.weight))  # (n, e)
        if cfg.router == "sigmoid":
            scores = logits.sigmoid()  # (n, e)
            selection = scores.detach() + self.e_score_correction_bias  # (n, e)
            if cfg.n_group > 1:
                selection = self.limit_groups(selection)
        else:  # the chosen experts' shares of all, by their sum, are the softmax of the chosen
            scores = logits if cfg.norm_topk_prob else logits.softmax(-1)  # (n, e)
            selection = scores.detach()
        experts = selection.topk(cfg.num_experts_per_tok).indices if replay is None else replay
        weights = scores.gather(1, experts)  # (n, a) without the bias
        if cfg.norm_topk_prob and cfg.router == "sigmoid":
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        elif cfg.norm_topk_prob:
            weights = weights.softmax(-1)
        factor = cfg.routed_scaling_factor
        return experts, weights if factor == 1 else weights * factor

    def limit_groups(self, selection: Tensor) -> Tensor:
        """Scores (n, e) with -inf outside the topk_group groups whose two best sum highest."""
        cfg = self.config
        groups = selection.unflatten(1, (cfg.n_group, -1))  # (n, n_group, e/n_group)
        best = groups.topk(2).values.sum(-1).topk(cfg.topk_group).indices  # (n, topk_group)
        keep = torch.zeros_like(groups[..., 0]).scatter(1, best, 1.0).bool()  # (n, n_group)
        # -inf and not 0: with the correction bias a kept score may be negative
        return groups.masked_fill(~keep[..., None], -math.inf).flatten(1)  # (n, e)


class MoE(nn.Module):
    """The `E` mixer: routed experts plus, in nemotron_h, one shared expert that is always on."""

    def __init__(self, config, index: int):
        super().__init__()
        self.index = index  # among the mixture-of-experts blocks: row of Routing
        self.gate = Router(config)
        self.experts = Experts(config)
        shared = config.shared_expert_intermediate_size
        self.shared_experts = MLP(config.hidden_size, shared, config.gated_mlp) if shared else None

    def forward(self, x: Tensor, ctx, cached=None) -> Tensor:
        """x (b, t, d) -> (b, t, d). Records the chosen experts in ctx.routing, or replays them."""
        flat = x.flatten(0, 1)  # (n, d)
        routing, replay = ctx.routing, None
        if routing is not None and routing.replay is not None:
            replay = routing.replay[:, :, self.index].flatten(0, 1)  # (n, a)
        experts, weights = self.gate(flat, replay)
        if routing is not None:
            routing.chosen[self.index] = experts.view(*x.shape[:2], -1)  # (b, t, a)
        y = self.experts(flat, experts, weights).view_as(x)  # (b, t, d)
        return y if self.shared_experts is None else y + self.shared_experts(x)


@torch.no_grad()
def update_correction_bias(model: nn.Module, load: Tensor, rate: float) -> None:
    """b += rate * sign(mean load - load), once after an optimizer step; load (l, e) of all ranks.

    Auxiliary-loss-free balancing (Nemotron 3 Nano): an expert with less than its share becomes
    easier to choose, and nothing enters the loss. A softmax router has no such bias.
    """
    routers = [m for m in model.modules() if isinstance(m, Router)]
    if not rate or model.config.router != "sigmoid":
        return
    for router, counts in zip(routers, load.float(), strict=True):
        router.e_score_correction_bias += rate * torch.sign(counts.mean() - counts)


def load_imbalance(load: Tensor) -> float:
    """moe/load_max: the busiest expert's load over the mean load, in the worst block (1 = even);
    load (l, e)."""
    if not load.numel():
        return 1.0
    return float((load.amax(1) / load.float().mean(1).clamp(min=1e-9)).max())
