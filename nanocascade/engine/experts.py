"""Expert parallelism: each rank of a group computes its own experts on the tokens of all."""

from functools import partial

import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

from nanocascade.engine.distributed import Dist
from nanocascade.model.moe import Experts, group_ends

EXPERT_TOKENS = 8192  # gathered tokens that a rank's experts compute on at once


# ---- Expert parallelism --------------------------------------------------------------------------


class Rows(torch.autograd.Function):
    """Gathered: (n, d) of each rank -> (ep*n, d) on all. Otherwise the reverse, whose gradient it
    is: the sum of all ranks' (ep*n, d), its own n rows on each."""

    @staticmethod
    def forward(ctx, x, group, gathered):
        ctx.group, ctx.gathered = group, gathered
        return move_rows(x, group, gathered)

    @staticmethod
    def backward(ctx, grad):
        return move_rows(grad, ctx.group, not ctx.gathered), None, None


def move_rows(x: Tensor, group, gathered: bool) -> Tensor:
    n = len(x) * group.size() if gathered else len(x) // group.size()
    out = x.new_empty(n, *x.shape[1:])
    move = torch_dist.all_gather_into_tensor if gathered else torch_dist.reduce_scatter_tensor
    move(out, x.contiguous(), group=group)
    return out


def spread_experts(model: nn.Module, dist: Dist, policy: MixedPrecisionPolicy) -> None:
    """Give each rank of an expert group its experts; over the shard axis FSDP cuts their rows."""
    found = [m for m in model.modules() if isinstance(m, Experts)]
    ep, (e, f, d) = dist.expert_parallel, found[0].down_proj.shape if found else (0, 0, 0)
    pieces = dist.world_size // dist.replicas // ep
    if not found or e % ep or f % pieces or d % pieces:
        raise ValueError(
            f"--expert_parallel {ep} on {dist.world_size} ranks: {e} experts of "
            f"({f}, {d}) do not divide into {ep} x {pieces}"
        )
    tokens = [0]  # of the present forward, padded to the group's maximum

    def agree(_, args, kwargs) -> None:
        tokens[0] = dist.reduce(args[0].numel(), torch_dist.ReduceOp.MAX, dist.expert_group)

    model.register_forward_pre_hook(agree, with_kwargs=True)
    axis, place = dist.expert_mesh["expert"], dist.expert_group.rank()
    for experts in found:
        for name, p in list(experts.named_parameters()):
            mine = p.detach().chunk(ep)[place].clone()  # (e/ep, ...): lets go of the others
            mine = DTensor.from_local(mine, axis, [Shard(0)], run_check=False)
            setattr(experts, name, nn.Parameter(mine, requires_grad=p.requires_grad))
        experts.forward = partial(forward_spread, experts, dist.expert_group, e, tokens)
        fully_shard(
            experts, mesh=dist.shard_mesh, mp_policy=policy, shard_placement_fn=lambda p: Shard(1)
        )


def forward_spread(experts, group, num_experts, tokens, x, chosen, weights) -> Tensor:
    """Experts.forward where a rank has some of them: x (n, d), chosen and weights (n, a) -> (n, d).

    Every rank of the group gets all tokens, computes its own experts on them, and the sums go back
    to the tokens' owners. A token needs 4.5 of 8 ranks on average (6 of 128 experts), so this moves
    1.8 times what a deduplicated all-to-all would, in fixed shapes and without a host sync.
    """
    n, a = chosen.shape
    room = (0, 0, 0, tokens[0] - n)
    ids = F.pad(chosen, room, value=num_experts)  # (n, a) padding is routed nowhere
    both = torch.cat([F.pad(weights, room), ids.to(weights.dtype)], 1)  # (n, 2a) ids are exact
    everyone = Rows.apply(F.pad(x, room), group, True)  # (ep*n, d)
    weights, ids = Rows.apply(both, group, True).split(a, 1)  # (ep*n, a) each
    mine = Experts.__new__(Experts)  # a bare one that holds this rank's weights for this call
    nn.Module.__init__(mine)
    for name, p in experts.named_parameters():
        object.__setattr__(mine, name, p.to_local())
    ids = ids.detach().long() - group.rank() * len(mine.up_proj)  # (ep*n, a) mine are 0, 1, ...
    outputs = []
    for part in zip(*(y.split(EXPERT_TOKENS) for y in (everyone, ids, weights)), strict=True):
        if len(everyone) > EXPERT_TOKENS and torch.is_grad_enabled():  # (n*a, f) a chunk at a time
            outputs.append(
                checkpoint(own_experts, mine, *part, use_reentrant=False, preserve_rng_state=False)
            )
        else:
            outputs.append(own_experts(mine, *part))
    out = Rows.apply(torch.cat(outputs), group, False)  # (n, d) and padding
    return out[:n].clone()  # no view: FSDP's hooks get lost on one


def own_experts(mine: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of `mine` over tokens x (n, d); pairs of other ranks' experts add nothing.

    Foreign pairs are sorted behind the last group. There grouped_mm computes nothing and leaves
    memory as it finds it, hence the masks, on inputs too: their gradients pass there.
    """
    e = len(mine.up_proj)
    flat = ids.flatten()  # (n*a,)
    flat = flat.where((flat >= 0) & (flat < e), e)
    order = flat.argsort(stable=True)  # (n*a,)
    ends = group_ends(flat[order], e)  # (e,)
    # Copying what others compute costs more than waiting for a number, but for a decode step's few.
    if x.device.type == "cpu" or len(x) > EXPERT_TOKENS // 4:
        order = order[: max(int(ends[-1]), 1)]
    own = (flat[order] < e)[:, None]  # (n*a, 1)
    token = order // ids.shape[1]  # (n*a,)
    inputs = x[token].where(own, 0.0)  # (n*a, d)
    outputs = mine.products(inputs, ends)  # (n*a, d)
    outputs = outputs.where(own, 0.0) * weights.flatten()[order, None].to(x.dtype)  # (n*a, d)
    return torch.zeros_like(x).index_add(0, token, outputs)  # (n, d)
