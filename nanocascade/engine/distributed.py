"""The processes of a run as one context object that does nothing at one rank, and the model's
parts laid out over them from outside: the model files know one device.

Plain (the toy): every rank holds the whole model, gradients are summed. Sharded (--shard, or
--expert_parallel, --replicas, --dtype bfloat16): FSDP2, on a mesh of replicas x shards x experts.
Either way losses carry global denominators, so that summing gives the gradient of one process.
"""

import os
import re
import signal
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from itertools import count

import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

from nanocascade.checkpoint.weights import KEEP_FP32, load_model
from nanocascade.cli import find_device
from nanocascade.model.moe import Experts, group_ends

# A rank that dies is noticed at once: gloo sees its connection close, torchrun its process end. So
# the limit of a collective only has to be longer than any honest wait for a slow rank.
TIMEOUT = timedelta(hours=1)
LOST = re.compile("(closed|reset) by peer|Broken pipe|Socket closed")
ASK_EVERY = 16  # decode steps between two questions whether any rank of the group still samples
EXPERT_TOKENS = 8192  # gathered tokens that a rank's experts compute on at once
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUT = (
    "shard",
    "expert_parallel",
    "replicas",
    "dtype",
    "checkpoint_blocks",
    "offload_blocks",
    "offload_optimizer",
)


class Dist:
    """Rank, world size and the few collectives the scripts use; all of them no-ops at one rank."""

    def __init__(
        self,
        rank=0,
        world_size=1,
        device="cpu",
        *,
        shard=False,
        expert_parallel=1,
        replicas=1,
        dtype="float32",
        checkpoint_blocks=False,
        offload_blocks=False,
        offload_optimizer=False,
    ):
        self.rank, self.world_size, self.device = rank, world_size, device
        self.expert_parallel, self.replicas = expert_parallel, replicas
        self.checkpoint_blocks, self.offload_blocks = checkpoint_blocks, offload_blocks
        self.offload_optimizer = offload_optimizer
        self.stop_asked = False  # SIGTERM came: finish the step, save, leave
        if dtype not in DTYPES:
            raise ValueError(f"--dtype {dtype}: expected {' or '.join(DTYPES)}")
        self.dtype = DTYPES[dtype]
        if min(expert_parallel, replicas) < 1 or world_size % (replicas * expert_parallel):
            raise ValueError(
                f"{world_size} ranks do not divide into --replicas {replicas} of "
                f"groups of --expert_parallel {expert_parallel}"
            )
        # Why not FSDP always: over gloo a collective costs 4 ms however small it is, and a step of
        # the toy would need two a block and micro-batch instead of one.
        self.sharded = shard or max(expert_parallel, replicas) > 1 or dtype != "float32"

    def make_meshes(self) -> None:
        """Two views of the same ranks: (replica, data) for what all ranks share, and (replica,
        shard, expert) for experts, of which a rank holds num_experts / expert_parallel."""
        kind, outer, ep = self.device.split(":")[0], self.replicas, self.expert_parallel
        inner = self.world_size // outer
        dense = init_device_mesh(kind, (outer, inner), mesh_dim_names=("replica", "data"))
        names = ("replica", "shard", "expert")
        self.expert_mesh = init_device_mesh(kind, (outer, inner // ep, ep), mesh_dim_names=names)
        self.data_group = dense.get_group("data")  # one whole copy of the weights
        self.expert_group = self.expert_mesh.get_group("expert")
        # Without replicas FSDP gets one axis: a second one of size 1 would still be all-reduced.
        self.dense_mesh = dense if outer > 1 else dense["data"]
        self.shard_mesh = self.expert_mesh[("replica", "shard") if outer > 1 else "shard"]

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def shard(self, items: list, size=None) -> list:
        """This rank's share: every world_size-th item, in order of size(item) where it is given, so
        that all have as much to do."""
        order = sorted(range(len(items)), key=lambda i: -size(items[i]) if size else i)
        return [items[i] for i in sorted(order[self.rank :: self.world_size])]

    def sum(self, x):
        """Sum over ranks of a number or tensor."""
        return self.reduce(x, torch_dist.ReduceOp.SUM)

    def reduce(self, x, op, group=None):
        if self.world_size == 1:
            return x
        total = torch.as_tensor(x, device=self.device).clone()
        torch_dist.all_reduce(total, op, group)
        return total if isinstance(x, Tensor) else total.item()

    def gather(self, obj) -> list:
        """Every rank's object, in rank order, on every rank."""
        if self.world_size == 1:
            return [obj]
        out = [None] * self.world_size
        torch_dist.all_gather_object(out, obj)
        return out

    def barrier(self) -> None:
        if self.world_size > 1:
            torch_dist.barrier()

    # ---- Ranks in step: sharded forwards contain collectives, so all run as many of them ----

    def in_step(self, n: int) -> int:
        """How many micro-batches every rank runs, where this one has n of its own."""
        return self.reduce(n, torch_dist.ReduceOp.MAX) if self.sharded else n

    def keep_going(self):
        """For the sampler: asks whether its decode loop goes on, given whether this rank still
        samples. Where experts are spread over ranks their loops end together, so a rank that is
        done decodes padding until all are."""
        if self.expert_parallel == 1:
            return bool
        calls = count()
        return lambda active: True if next(calls) % ASK_EVERY else self.together(active)

    def together(self, x) -> bool:
        """Whether x holds here, or on any rank of those whose decode loops end together."""
        if self.expert_parallel == 1:
            return bool(x)
        return self.reduce(int(bool(x)), torch_dist.ReduceOp.MAX, self.expert_group) > 0

    # ---- Gradients ----

    def sum_gradients(self, model: nn.Module) -> None:
        """Gradients of the whole batch on every rank; a rank without tokens adds zeros.

        What FSDP shards it has summed in backward: left are the fp32 islands, or the whole model.
        """
        if self.world_size == 1:
            return
        params = [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
        if not params:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        # One collective for all: over gloo a call costs 4 ms however small it is.
        flat = torch.cat([g.flatten() for g in grads])
        torch_dist.all_reduce(flat)
        for p, g, total in zip(params, grads, flat.split([g.numel() for g in grads]), strict=True):
            p.grad = torch.empty_like(p).copy_(total.view_as(g))

    @torch.no_grad()
    def clip_gradients(self, model: nn.Module, max_norm: float) -> float:
        """Scale all gradients to a global norm of at most max_norm; the norm before.

        The shards of a replica are disjoint, whichever mesh they are of, so their squares add up
        over its ranks; what every rank holds whole counts once. (torch's clip_grad_norm_ refuses
        parameters of two meshes.)
        """
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        shards = [g.to_local() for g in grads if isinstance(g, DTensor)]
        whole = [g for g in grads if not isinstance(g, DTensor)]
        norm = nn.utils.get_total_norm(whole)  # ()
        if self.sharded:
            square = nn.utils.get_total_norm([x for x in shards if x.numel()]).square()
            square = torch.as_tensor(square, device=self.device)
            norm = norm.square() + self.reduce(square, torch_dist.ReduceOp.SUM, self.data_group)
            norm = norm.sqrt()
        if float(norm) > max_norm:
            torch._foreach_mul_(whole + shards, max_norm / norm)
        return float(norm)


# ---- Layout of a model ---------------------------------------------------------------------------


def parallelize(model: nn.Module, dist: Dist) -> nn.Module:
    """Lay the model out over the ranks, in place; on the meta device nothing is allocated.

    Each block is gathered before its forward and freed after it. Products are of dist.dtype;
    master weights, gradients and their sums are fp32. The policy would round every parameter in
    forward, so the fp32 islands (router, A_log, D, dt_bias) stay out of it: whole on every rank.
    Raises ValueError for a model that does not divide.
    """
    if dist.checkpoint_blocks:
        for block in model.blocks:
            block.forward = partial(checkpointed, block.forward, dist.offload_blocks)
    if not dist.sharded:
        return model
    islands = {p for name, p in model.named_parameters() if name.endswith(KEEP_FP32)}
    # Inputs are not cast: they are of the right dtype, and casting would copy the cache's dict.
    policy = MixedPrecisionPolicy(
        param_dtype=None if dist.dtype == torch.float32 else dist.dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    if dist.expert_parallel > 1:
        spread_experts(model, dist, policy)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=dist.dense_mesh, mp_policy=policy, ignored_params=islands)
    for module in fsdp_modules(model):
        module.set_gradient_divide_factor(1.0)  # denominators are global: sum, do not average
        module.set_force_sum_reduction_for_comms(True)
    return model


def load(path, dist: Dist, frozen=False) -> nn.Module:
    """The model of a directory, laid out, each rank reading its shards; frozen: teachers."""
    dtype = dist.dtype if frozen else torch.float32
    model = load_model(path, dtype, dist.device, partial(parallelize, dist=dist))
    return model.requires_grad_(False).eval() if frozen else model


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [x for x in model.modules() if isinstance(x, FSDPModule)]


def checkpointed(forward, offload: bool, x: Tensor, ctx, layer=None) -> Tensor:
    """A block's forward of which backward keeps the input x (b, t, d) only, and recomputes."""
    if not torch.is_grad_enabled():
        return forward(x, ctx, layer)
    host = save_on_cpu(pin_memory=x.is_cuda) if offload else nullcontext()
    with host:
        return checkpoint(forward, x, ctx, layer, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def unsharded(model: nn.Module):
    """Weights whole on every rank for a phase without gradients (experts: this rank's own).

    Outside inference mode, which the sampler enters: inference tensors could not be trained on.
    """
    modules = fsdp_modules(model)
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()
            # the root's weights are needed first in backward (and by the loss, beside forward)
            module.set_reshard_after_forward(module is not model, recurse=False)


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
    move = torch_dist.all_gather_single if gathered else torch_dist.reduce_scatter_single
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


# ---- Processes -----------------------------------------------------------------------------------


@contextmanager
def start(cfg):
    """The Dist of this process: under torchrun one of several, otherwise the only one.

    cfg: the run's flags; of them --device and those in LAYOUT matter here.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = find_device(cfg.device)
    if cfg.dry_run:  # whose plan imagines the ranks
        yield Dist(rank, device=device)
        return
    dist = Dist(rank, size, device, **{name: getattr(cfg, name) for name in LAYOUT})
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    if size > 1:
        torch_dist.init_process_group(backend, timeout=TIMEOUT)
    elif dist.sharded:  # one rank in bf16: FSDP keeps the fp32 masters, with nobody to talk to
        alone = torch_dist.HashStore()
        torch_dist.init_process_group(backend, store=alone, rank=0, world_size=1)
    before = signal.signal(signal.SIGTERM, lambda *_: setattr(dist, "stop_asked", True))
    try:
        if dist.sharded:
            dist.make_meshes()
        yield dist
    except RuntimeError as error:
        if not LOST.search(str(error)):
            raise
        # What it said must not drown in the tracebacks of those that waited for it.
        raise ConnectionError("another process of this run stopped and said why") from None
    finally:
        signal.signal(signal.SIGTERM, before)
        if torch_dist.is_initialized():
            torch_dist.destroy_process_group()
