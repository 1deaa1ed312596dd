"""Expert parallelism: each rank of a group holds some experts and applies them to all tokens."""

from functools import partial

import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

from nanocascade.engine.distributed import Dist
from nanocascade.model.moe import Experts, MoE, group_ends

CHUNK_TOKENS = 8192  # gathered tokens that the experts of a rank compute on at once
# The new names of torch 2.13, where the old ones are deprecated; 2.11 has the old ones only.
if hasattr(torch_dist, "all_gather_single"):
    gather_rows = torch_dist.all_gather_single
    sum_and_scatter_rows = torch_dist.reduce_scatter_single
else:
    gather_rows = torch_dist.all_gather_into_tensor
    sum_and_scatter_rows = torch_dist.reduce_scatter_tensor


# ---- Collectives with gradients ------------------------------------------------------------------


def all_gather(x: Tensor, group) -> Tensor:
    """(n, d) of each rank -> (ep*n, d) on every rank."""
    out = x.new_empty(group.size() * len(x), *x.shape[1:])
    gather_rows(out, x.contiguous(), group=group)
    return out


def reduce_scatter(x: Tensor, group) -> Tensor:
    """(ep*n, d) of each rank -> their sum, of which each rank gets its own n rows (n, d)."""
    out = x.new_empty(len(x) // group.size(), *x.shape[1:])
    sum_and_scatter_rows(out, x.contiguous(), group=group)
    return out


class Collective(torch.autograd.Function):
    """One of the two above, with the other one as its gradient."""

    @staticmethod
    def forward(ctx, x, group, collective, gradient):
        ctx.group, ctx.gradient = group, gradient
        return collective(x, group)

    @staticmethod
    def backward(ctx, grad):
        return ctx.gradient(grad, ctx.group), None, None, None


# ---- Experts over ranks --------------------------------------------------------------------------


class PaddedLength:
    """The number of tokens of the current forward, padded to the maximum over the expert group.

    A forward pre-hook of the model: the ranks agree once a forward, not once a block.
    """

    def __init__(self, dist: Dist):
        self.dist = dist
        self.num_tokens = 0

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        group = self.dist.expert_group
        self.num_tokens = self.dist.reduce(args[0].numel(), torch_dist.ReduceOp.MAX, group)


class SpreadExperts(Experts):
    """Experts of which this rank holds e/ep: takes the place, and the parameter names, of Experts.

    Every rank of the group gets all tokens, computes its own experts on them, and the sums go back
    to the tokens' owners. A token needs 4.5 of 8 ranks on average (6 of 128 experts), so this moves
    1.8 times what a deduplicated all-to-all would, in fixed shapes and without a host sync.
    """

    def __init__(self, experts: Experts, dist: Dist, length: PaddedLength):
        nn.Module.__init__(self)  # Experts.__init__ would allocate all experts
        self.group, self.length = dist.expert_group, length
        self.num_experts = len(experts.up_proj)
        self.num_local = self.num_experts // dist.expert_parallel
        self.first_local = self.num_local * self.group.rank()
        for name, parameter in experts.named_parameters():
            local = parameter.detach().narrow(0, self.first_local, self.num_local)
            local = local.clone()  # (e/ep, ...) without the memory of the other experts
            mesh = dist.expert_mesh["expert"]
            sharded = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
            setattr(self, name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))

    def matrices(self) -> tuple[Tensor, Tensor]:
        return self.up_proj.to_local(), self.down_proj.to_local()

    def sort_pairs(self, experts: Tensor) -> tuple[Tensor, Tensor]:
        """As of Experts. Pairs of other ranks' experts are sorted behind the last group."""
        ids = experts.flatten() - self.first_local  # (n*a,)
        ids = ids.where((ids >= 0) & (ids < self.num_local), self.num_local)
        order = ids.argsort(stable=True)  # (n*a,)
        ends = group_ends(ids[order], self.num_local)  # (e/ep,)
        # Drop those pairs. This costs one host sync, so skip it in decoding.
        if ids.device.type == "cpu" or len(experts) > CHUNK_TOKENS // 4:
            order = order[: max(int(ends[-1]), 1)]
        return order, ends

    def products(self, inputs: Tensor, ends: Tensor) -> Tensor:
        """grouped_mm writes nothing behind the last group. Masks make these rows 0 in the outputs,
        and in the inputs for their gradients."""
        is_local = (torch.arange(len(inputs), device=ends.device) < ends[-1])[:, None]  # (n*a, 1)
        outputs = super().products(inputs.where(is_local, 0.0), ends)  # (n*a, d)
        return outputs.where(is_local, 0.0)

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """x (n, d), experts and weights (n, a) -> (n, d), like Experts.forward."""
        n = len(x)
        padding = (0, 0, 0, self.length.num_tokens - n)
        experts = F.pad(experts, padding, value=self.num_experts)  # (m, a) padding has no expert
        experts = all_gather(experts, self.group)  # (ep*m, a)
        x = Collective.apply(F.pad(x, padding), self.group, all_gather, reduce_scatter)  # (ep*m, d)
        weights = F.pad(weights, padding)  # (m, a)
        weights = Collective.apply(weights, self.group, all_gather, reduce_scatter)  # (ep*m, a)
        outputs = []
        for chunk in zip(*(y.split(CHUNK_TOKENS) for y in (x, experts, weights)), strict=True):
            run = super().forward
            if len(x) > CHUNK_TOKENS and torch.is_grad_enabled():
                # Recompute in backward: only one chunk's inner activations are kept at a time.
                run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
            outputs.append(run(*chunk))
        out = torch.cat(outputs)  # (ep*m, d)
        out = Collective.apply(out, self.group, reduce_scatter, all_gather)  # (m, d)
        return out[:n].clone()  # (n, d) not a view, on which FSDP's hooks would be lost


def spread_experts(model: nn.Module, dist: Dist, policy: MixedPrecisionPolicy) -> None:
    """Replace all Experts by SpreadExperts; FSDP shards their rows over the shard axis.

    Raises ValueError if the experts do not divide over the ranks.
    """
    blocks = [x for x in model.modules() if isinstance(x, MoE)]
    e, f, d = blocks[0].experts.down_proj.shape if blocks else (0, 0, 0)
    ep = dist.expert_parallel
    num_shards = dist.world_size // dist.replicas // ep
    if not blocks or e % ep or f % num_shards or d % num_shards:
        raise ValueError(
            f"--expert_parallel {ep} on {dist.world_size} ranks: {e} experts of "
            f"({f}, {d}) do not divide into {ep} x {num_shards}"
        )
    length = PaddedLength(dist)
    model.register_forward_pre_hook(length, with_kwargs=True)
    for block in blocks:
        block.experts = SpreadExperts(block.experts, dist, length)
        fully_shard(
            block.experts,
            mesh=dist.shard_mesh,
            mp_policy=policy,
            shard_placement_fn=lambda parameter: Shard(1),
        )
