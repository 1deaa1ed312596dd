"""The processes of a run, as one context object that does nothing at one rank.

Data parallelism as it stands: each rank samples and trains on its share of the prompts, losses
carry global denominators, so summing gradients over ranks gives the gradient of one process.
"""

import os
from contextlib import contextmanager

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn


class Dist:
    """Rank, world size and the few collectives the scripts use; all of them no-ops at one rank."""

    def __init__(self, rank: int, world_size: int, device: str):
        self.rank, self.world_size, self.device = rank, world_size, device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def shard(self, items: list) -> list:
        """This rank's share: every world_size-th item, so that long and short ones mix."""
        return items[self.rank :: self.world_size]

    def sum(self, x):
        """Sum over ranks of a number or tensor."""
        if self.world_size == 1:
            return x
        total = torch.as_tensor(x, device=self.device).clone()
        torch_dist.all_reduce(total)
        return total if isinstance(x, Tensor) else total.item()

    def gather(self, obj) -> list:
        """Every rank's object, in rank order, on every rank."""
        if self.world_size == 1:
            return [obj]
        out = [None] * self.world_size
        torch_dist.all_gather_object(out, obj)
        return out

    def sum_gradients(self, model: nn.Module) -> None:
        """Gradients of the whole batch on every rank; a rank without tokens adds zeros."""
        if self.world_size == 1:
            return
        params = [p for p in model.parameters() if p.requires_grad]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        # One collective for all: over gloo a call costs 4 ms however small it is.
        flat = torch.cat([g.flatten() for g in grads])
        torch_dist.all_reduce(flat)
        for p, g, total in zip(params, grads, flat.split([g.numel() for g in grads]), strict=True):
            p.grad = total.view_as(g).to(p.dtype)

    def barrier(self) -> None:
        if self.world_size > 1:
            torch_dist.barrier()


def find_device(name: str) -> str:
    """The device asked for, or the best there is: cuda, mps, cpu."""
    if name and name.split(":")[0] not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {name}: expected cuda, mps or cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this torch finds no such device")
    if name and name != "cuda":  # of several processes each takes its own
        return name
    if torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@contextmanager
def start(device: str = ""):
    """The Dist of this process: under torchrun one of several, otherwise the only one."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = find_device(device)
    if size == 1:
        yield Dist(0, 1, device)
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    torch_dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Dist(rank, size, device)
    finally:
        torch_dist.destroy_process_group()
