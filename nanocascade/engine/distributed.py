"""Distributed training: a Dist object, a no-op on one process, and the context that starts it.

Models are laid out over the processes from outside (layout.py): their files know one device.

Plain (the toy): every rank holds the whole model, gradients are summed. Sharded (--shard, or
--expert_parallel, --replicas, --dtype bfloat16): FSDP2, on a mesh of replicas x shards x experts.
Either way losses carry global denominators, so that summing gives the gradient of one process.
"""

import os
import re
import signal
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import timedelta
from itertools import count
from typing import Literal

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from nanocascade.cli import Positive
from nanocascade.engine.device import find_device
from nanocascade.model.layers import widest

# A dead rank is noticed at once: gloo sees its connection close, torchrun its process end. So the
# timeout of a collective only has to be longer than the wait for a slow rank.
TIMEOUT = timedelta(hours=1)
LOST = re.compile("(closed|reset) by peer|Broken pipe|Socket closed")
ASK_EVERY = 16  # decode steps between two checks whether any rank of the group still samples
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Layout:
    """Memory and speed"""

    shard: bool = False  # FSDP2: shard weights, gradients and optimizer state over the ranks
    expert_parallel: Positive = 1  # ranks that share the experts (use at most the GPUs of a node)
    replicas: Positive = 1  # copies of the sharded weights (several nodes: one copy for each group)
    dtype: Literal["float32", "bfloat16"] = "float32"  # of products; weights stay float32
    checkpoint_blocks: bool = False  # activation checkpointing: recompute blocks in backward
    offload_blocks: bool = False  # keep what --checkpoint_blocks saves in host memory
    offload_optimizer: bool = False  # keep AdamW's moments in host memory


LAYOUT = tuple(field.name for field in fields(Layout))


class Dist:
    """Rank, world size and the collectives of the scripts; all are no-ops on one rank."""

    def __init__(self, rank=0, world_size=1, device="cpu", frozen_base=False, **layout):
        layout = Layout(**layout)
        self.rank, self.world_size, self.device = rank, world_size, device
        self.expert_parallel, self.replicas = layout.expert_parallel, layout.replicas
        self.checkpoint_blocks = layout.checkpoint_blocks
        self.offload_blocks = layout.offload_blocks
        self.offload_optimizer = layout.offload_optimizer
        self.stop_asked = False  # whether this process got SIGTERM
        self.stopping = False  # whether any did: all ranks save after this step and exit
        self.dtype = DTYPES[layout.dtype]
        several = max(self.expert_parallel, self.replicas) > 1
        copies = self.replicas * self.expert_parallel
        if world_size % copies:
            raise ValueError(
                f"{world_size} ranks do not divide into --replicas {self.replicas} of "
                f"groups of --expert_parallel {self.expert_parallel}"
            )
        # FSDP is not always used: over gloo a collective costs 4 ms however small it is, and a step
        # of the toy would need two for each block and micro-batch instead of one.
        self.sharded = layout.shard or several or self.dtype != torch.float32
        if frozen_base:  # no fp32 master weights: each rank holds the base in --dtype
            if layout.shard or several:
                raise ValueError(
                    "--lora_rank keeps one copy of the base on each rank: it cannot be combined "
                    "with --shard, --expert_parallel and --replicas"
                )
            self.sharded = False

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
        """This rank's share: every world_size-th item. With `size` the items are first sorted
        by it, so that all ranks have about the same work."""
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
        """Micro-batches that every rank runs: the largest n over the ranks. n: this rank's own."""
        return self.reduce(n, torch_dist.ReduceOp.MAX) if self.sharded else n

    def keep_going(self):
        """The function that ends the sampler's decode loop, given whether this rank still samples.
        With expert parallelism the loops of a group end together: finished ranks decode padding."""
        if self.expert_parallel == 1:
            return bool
        calls = count()
        return lambda active: True if next(calls) % ASK_EVERY else self.together(active)

    def together(self, x) -> bool:
        """Whether x is true on any rank of this expert-parallel group."""
        if self.expert_parallel == 1:
            return bool(x)
        return self.reduce(int(bool(x)), torch_dist.ReduceOp.MAX, self.expert_group) > 0

    def end_step(self, tokens: int, memory: float) -> tuple[float, list[float]]:
        """The tokens of all ranks and each rank's memory; sets `stopping` on all ranks at once.

        All in one collective, since over gloo each costs 4 ms however small it is.
        """
        device = torch.device(self.device)
        report = torch.zeros(2 + self.world_size, dtype=widest(device), device=device)
        report[0], report[1], report[2 + self.rank] = tokens, self.stop_asked, memory
        tokens, stop, *memories = self.sum(report).tolist()
        self.stopping = stop > 0
        return tokens, memories

    # ---- Gradients ----

    def sum_gradients(self, model: nn.Module) -> None:
        """Gradients of the whole batch on every rank; a rank without tokens adds zeros.

        FSDP has summed its sharded parameters in backward. The rest is the fp32 islands, or all.
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
        """Scale all gradients to a global norm of at most max_norm. Returns the norm before.

        The shards of a replica are disjoint, whichever mesh they are of, so their squares add up
        over its ranks; parameters that every rank holds count once. (torch's clip_grad_norm_
        refuses parameters of two meshes.)
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


# ---- Processes -----------------------------------------------------------------------------------


def lower_memory(error: torch.OutOfMemoryError) -> str:
    """Error message that names the flag to lower: that of sampling, or that of training."""
    doing = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    flag = "--max_rows" if "generate" in doing else "--micro_tokens (or --checkpoint_blocks)"
    return f"out of memory: lower {flag}, and go on with --resume; {error}"


@contextmanager
def start(device: str, layout: Layout | None = None, dry_run=False, frozen_base=False):
    """The Dist of this process: under torchrun one of several, otherwise the only one.

    frozen_base: only adapters are trained (engine/lora.py).
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = find_device(device)
    if dry_run:  # the plan needs no other processes
        yield Dist(rank, device=device)
        return
    dist = Dist(rank, size, device, frozen_base, **vars(layout or Layout()))
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    if size > 1:
        torch_dist.init_process_group(backend, timeout=TIMEOUT)
    elif dist.sharded:  # one rank in bf16: FSDP keeps the fp32 masters, without other ranks
        alone = torch_dist.HashStore()
        torch_dist.init_process_group(backend, store=alone, rank=0, world_size=1)
    before = signal.signal(signal.SIGTERM, lambda *_: setattr(dist, "stop_asked", True))
    try:
        if dist.sharded:
            dist.make_meshes()
        yield dist
    except torch.OutOfMemoryError as error:
        raise ValueError(lower_memory(error)) from error
    except RuntimeError as error:
        if not LOST.search(str(error)):
            raise
        # Only the process that failed prints its error, not those that waited for it.
        raise ConnectionError(
            "another process of this run failed; its error is printed above"
        ) from None
    finally:
        signal.signal(signal.SIGTERM, before)
        if torch_dist.is_initialized():
            torch_dist.destroy_process_group()
