"""What a block's code does with memory and time, seen without either: it runs on fake tensors.

Fake tensors have shapes and no data, and the ranks are a process group that does not exist, so the
blocks of the 30B model run here as distributed.py lays them out, within seconds. plan.py adds up.
"""

import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from nanocascade.engine.distributed import Dist
from nanocascade.engine.experts import CHUNK_TOKENS
from nanocascade.engine.layout import parallelize, unsharded
from nanocascade.model import mamba2
from nanocascade.model.cache import Cache
from nanocascade.model.context import Context, packed_context
from nanocascade.model.documents import Documents
from nanocascade.model.logprobs import token_logprobs
from nanocascade.model.model import Model
from nanocascade.model.moe import Experts
from nanocascade.sampler import draw

NODE = 8  # devices of a node, all of them imagined
IMBALANCE = 2  # the busiest rank of an expert group computes this many times its share
FLOPS_REACHED, BYTES_REACHED = 0.4, 0.7  # assumed shares of what the vendor says
LAUNCH = 6e-6  # seconds PyTorch takes for any operation, however small: assumed


class Hardware(NamedTuple):
    """The vendor's numbers of a device: bytes, and FLOP or bytes a second; links are one way."""

    memory: float
    flops: float = 0.0  # bf16, dense
    hbm: float = 0.0
    nvlink: float = 0.0  # to the others of its node
    network: float = 0.0  # to other nodes, its share
    host: float = 0.0  # PCIe


class Meter(TorchDispatchMode):
    """Bytes alive and their peak, and (FLOPs, bytes touched) of every operation that runs inside.

    number: what is read where the host asks for a number, which a fake tensor does not have.
    """

    def __init__(self, number: int = 0):
        super().__init__()
        self.number, self.peak, self.ops = number, 0, []
        self.storages: dict[int, weakref.ref] = {}

    def live(self) -> int:
        found = {key: ref() for key, ref in self.storages.items()}
        self.storages = {key: weakref.ref(x) for key, x in found.items() if x is not None}
        # their present sizes: FSDP frees what it gathered by resizing it to 0
        return sum(x.nbytes() for x in found.values() if x is not None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, aten, flops = kwargs or {}, torch.ops.aten, 0.0
        given = tensors((args, kwargs))
        if func is aten._local_scalar_dense.default:
            return self.number if is_fake(given[0]) else func(*args)
        if func is aten._grouped_mm.default and is_fake(given[0]):  # no fake form exists in fp32
            a, b = args[:2]
            shape = (len(a), b.shape[-1])  # (n*a, f) of (n*a, d) and (e, d, f)
            if b.ndim == 2:  # the gradient of the weights: (e, d, f) of (d, n*a) and (n*a, f)
                shape = (len(kwargs["offs"] if "offs" in kwargs else args[2]), *shape)
            out, flops = a.new_empty(shape), 2.0 * a.numel() * b.shape[-1]
        else:
            out = func(*args, **kwargs)
            if formula := flop_registry.get(func._overloadpacket):
                flops = float(formula(*args, **kwargs, out_val=out))
        known = {id(x.untyped_storage()) for x in given}
        made = [x.untyped_storage() for x in tensors(out)]
        self.storages |= {id(x): weakref.ref(x) for x in made if id(x) not in known}
        self.peak = max(self.peak, self.live())
        if func.namespace == "aten" and not func.is_view and "unsafe_view" not in func.name():
            touched = given + tensors(out)
            if func is aten.index_put_.default:  # a cache: of it only what is written
                touched = [args[2]] * 2
            self.ops.append((flops, float(sum(x.numel() * x.itemsize for x in touched))))
        return out


def tensors(tree) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


class Trace(NamedTuple):
    """Of one block or the head: bytes kept for backward, peak bytes, and all its operations."""

    kept: float
    peak: float
    ops: list[tuple[float, float]]

    def seconds(self, hw: Hardware) -> float:
        flops, hbm = hw.flops * FLOPS_REACHED, hw.hbm * BYTES_REACHED
        return sum(max(x / flops, y / hbm, LAUNCH) for x, y in self.ops)


@contextmanager
def imaginary_node():
    """A process group of NODE ranks of which only this one exists; nothing is communicated."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not torch_dist.is_initialized(), "a dry run has no ranks but imagined ones"
    torch_dist.init_process_group("fake", rank=0, world_size=NODE, store=FakeStore())
    try:
        yield
    finally:
        torch_dist.destroy_process_group()


def trace(config, kind: str, layout: dict, rows: int, width: int, seen=0, grad=True) -> Trace:
    """What one block of `kind`, or the "head", does with (rows, width) tokens on one of NODE ranks.

    grad False: forward only; seen: decode one token a row, attending to a cache of so many slots.
    """
    head, grad = kind == "head", grad and not seen
    layout = layout | {"replicas": 1, "offload_blocks": False}  # fake host memory is no other
    dist = Dist(0, NODE, "cpu", **layout | ({} if kind == "E" else {"expert_parallel": 1}))
    if dist.sharded:
        dist.make_meshes()
        dist.reduce = lambda x, *_: x  # the ranks that do not exist have our numbers
    small = replace(config, pattern="*" if head else kind, vocab_size=8)
    with torch.device("meta"):
        model = parallelize(Model(small), dist)
    share = min(IMBALANCE / dist.expert_parallel, 1.0)  # of the (token, expert) pairs it is shown
    pairs = min(rows * width * dist.expert_parallel, CHUNK_TOKENS) * config.num_experts_per_tok
    meter = Meter(int(share * pairs))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.set_grad_enabled(grad):
        model.to_empty(device="cpu")
        ids = torch.zeros(rows, width, dtype=torch.long)  # (b, t)
        like = {"dtype": dist.dtype, "requires_grad": grad}
        x = torch.empty(rows, width, config.hidden_size, **like)  # (b, t, d)
        weight = torch.empty(config.vocab_size, config.hidden_size, **like)  # (v, d)
        with as_on_gpu() if dist.sharded else nullcontext():
            ctx = fake_context(config, ids, seen, dist.dtype)
        model.context = lambda *_: ctx
        marks = [0, 0]  # bytes alive before and after the block
        model.blocks[0].register_forward_pre_hook(lambda *_: marks.append(meter.live()))
        model.blocks[0].register_forward_hook(lambda *_: marks.append(meter.live()))
        # A loop over experts would slice by numbers that nobody knows.
        alike = patch.object(Experts, "looped", Experts.grouped)
        with meter, alike, as_on_gpu() if dist.sharded else nullcontext():
            if head and seen:
                u = torch.empty(rows, dtype=torch.double)  # (b,)
                draw((x[:, 0] @ weight.T).float(), u, 1.0, 1.0, 0)
            elif head:
                y = token_logprobs(x, weight, ids)[0]  # (b, t)
            elif seen:
                cache = Cache(small, rows, seen, dist.dtype)
                with unsharded(model):  # neither gathering nor the cache is part of the step
                    meter.ops, meter.peak, before = [], 0, meter.live()
                    model(ids, cache=cache)
                meter.peak -= before
            else:
                y = model(ids)  # (b, t, d)
            if grad:
                y.backward(torch.empty_like(y))
    return Trace(marks[-1] - marks[-2], meter.peak, meter.ops)


def as_on_gpu():
    """Sizes that Mamba-2 takes on a CPU because of its caches, as they are on a GPU."""
    return patch.multiple(mamba2, CPU_CHUNK=1 << 30, STEP_BYTES=1 << 60)


def fake_context(config, ids: Tensor, seen: int, dtype) -> Context:
    """Model.context, whose numbers nobody knows here: a packed row, or a step of decoding."""
    rows, width = ids.shape
    with unset_fake_temporarily():
        lengths = torch.full((rows,), width)  # (o,)
        documents = Documents(lengths, torch.full((rows,), -1))
        cpu = torch.device("cpu")
        ctx = Context() if seen else packed_context(config, documents, dtype, cpu)
    if config.rope_theta is not None:
        table = torch.empty(rows, width, 1, config.head_dim, dtype=dtype)  # (b, t, 1, c)
        ctx.rotary = table, table
    if seen:
        ctx.rows = torch.arange(rows)[:, None]  # (b, 1)
        ctx.slots, ctx.seen = torch.zeros_like(ids), seen  # (b, t)
        ctx.mask = torch.zeros(rows, 1, 1, seen, dtype=dtype)  # (b, 1, t, t')
    return ctx
