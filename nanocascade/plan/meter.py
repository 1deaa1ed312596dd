"""Meter the memory and time of a block by running its code on fake tensors, without memory.

Fake tensors have shapes and no data, and the other ranks are a process group that does not exist,
so a block of the 30B model runs here as the engine lays it out. plan.py adds up blocks to a run.
"""

import weakref
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from nanocascade.engine.distributed import DTYPES, Dist
from nanocascade.engine.experts import CHUNK_TOKENS
from nanocascade.engine.layout import parallelize, unsharded
from nanocascade.model import mamba2
from nanocascade.model.cache import Cache
from nanocascade.model.context import Context, packed_context
from nanocascade.model.documents import Documents
from nanocascade.model.logprobs import token_logprobs
from nanocascade.model.model import Model
from nanocascade.sampler import draw

NODE = 8  # devices of a node
IMBALANCE = 2  # the busiest rank of an expert group computes this many times its share
HEAD = "head"  # beside the characters of a pattern: the output head and what follows it


@dataclass
class Trace:
    """What one block, or the head, did: bytes that it keeps for backward, bytes at its peak, and
    (FLOPs, bytes touched) of every operation."""

    kept: float
    peak: float
    operations: list[tuple[float, float]]


class Meter(TorchDispatchMode):
    """Records the bytes alive, their peak, and the operations that run inside.

    number: what the host reads where it asks a fake tensor for its number.
    """

    def __init__(self, number: int = 0):
        super().__init__()
        self.number, self.peak, self.operations = number, 0, []
        self.storages: dict[int, weakref.ref] = {}

    def restart(self) -> None:
        self.operations, self.peak = [], 0

    def alive(self) -> int:
        found = {key: ref() for key, ref in self.storages.items()}
        self.storages = {key: weakref.ref(x) for key, x in found.items() if x is not None}
        # Their present sizes: FSDP frees what it gathered by resizing it to 0.
        return sum(x.nbytes() for x in found.values() if x is not None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, aten, flops = kwargs or {}, torch.ops.aten, 0.0
        inputs = tensors((args, kwargs))
        if func is aten._local_scalar_dense.default:
            return self.number if is_fake(inputs[0]) else func(*args)
        if func is aten._grouped_mm.default and is_fake(inputs[0]):  # has no fake form in fp32
            out, flops = fake_grouped_mm(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
            if formula := flop_registry.get(func._overloadpacket):
                flops = float(formula(*args, **kwargs, out_val=out))
        known = {id(x.untyped_storage()) for x in inputs}
        made = [x.untyped_storage() for x in tensors(out)]
        self.storages |= {id(x): weakref.ref(x) for x in made if id(x) not in known}
        self.peak = max(self.peak, self.alive())
        if func.namespace == "aten" and not func.is_view and "unsafe_view" not in func.name():
            touched = inputs + tensors(out)
            if func is aten.index_put_.default:  # a cache: only what is written counts
                touched = [args[2]] * 2
            size = sum(x.numel() * x.itemsize for x in touched)
            self.operations.append((flops, float(size)))
        return out


def tensors(tree) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def fake_grouped_mm(a: Tensor, b: Tensor, offs: Tensor, **_):
    """Output and FLOPs of a grouped product: (n*a, f) of (n*a, d) and (e, d, f), or, as the
    gradient of the weights, (e, d, f) of (d, n*a) and (n*a, f)."""
    shape = (len(a), b.shape[-1])
    out = a.new_empty(shape if b.ndim == 3 else (len(offs), *shape))
    return out, 2.0 * a.numel() * b.shape[-1]


@contextmanager
def imaginary_node(gpu: bool = True):
    """A process group of NODE ranks of which only this one exists; nothing is communicated.

    gpu: plan for GPUs. Fake tensors say that they are of a CPU (fake cuda tensors have no backward
    without a GPU), where Mamba-2 works on less at a time: meanwhile it does not.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not torch_dist.is_initialized(), "a plan has no ranks but imagined ones"
    before = mamba2.CPU_CHUNK, mamba2.STEP_BYTES
    torch_dist.init_process_group("fake", rank=0, world_size=NODE, store=FakeStore())
    if gpu:
        mamba2.CPU_CHUNK, mamba2.STEP_BYTES = 1 << 30, 1 << 60
    try:
        yield
    finally:
        mamba2.CPU_CHUNK, mamba2.STEP_BYTES = before
        torch_dist.destroy_process_group()


# ---- Traces --------------------------------------------------------------------------------------


@contextmanager
def fake_block(config, kind: str, layout: dict, num_tokens: int):
    """(model of one block on rank 0 of NODE, its dtype, meter): fake, and metered from here on."""
    layout = layout | {"replicas": 1, "offload_blocks": False}  # fake host memory is no other
    if kind != "E":
        layout["expert_parallel"] = 1
    dist = Dist(0, NODE, "cpu", **layout)
    if dist.sharded:
        dist.make_meshes()
        dist.reduce = lambda x, *_: x  # the ranks that do not exist have our numbers
    with torch.device("meta"):
        model = Model(replace(config, pattern=kind, vocab_size=8))
        if kind == "E":  # a loop over experts would slice by numbers that fake tensors lack
            model.blocks[0].mixer.experts.products = model.blocks[0].mixer.experts.grouped
        model = parallelize(model, dist)
    share = min(IMBALANCE / dist.expert_parallel, 1.0)  # of the (token, expert) pairs it is shown
    pairs = min(num_tokens * dist.expert_parallel, CHUNK_TOKENS) * config.num_experts_per_tok
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        with Meter(int(share * pairs)) as meter:
            yield model, dist.dtype, meter


def trace_block(config, kind: str, layout: dict, rows: int, width: int, grad=True) -> Trace:
    """A block forward, and with grad backward, on (rows, width) tokens."""
    with fake_block(config, kind, layout, rows * width) as (model, dtype, meter):
        ids = torch.zeros(rows, width, dtype=torch.long)  # (b, t)
        context = fake_context(config, ids, 0, dtype)
        model.context = lambda *_: context
        alive = []  # before and after the block, and again where it is recomputed
        model.blocks[0].register_forward_pre_hook(lambda *_: alive.append(meter.alive()))
        model.blocks[0].register_forward_hook(lambda *_: alive.append(meter.alive()))
        meter.restart()
        before = meter.alive()
        with torch.set_grad_enabled(grad):
            y = model(ids)  # (b, t, d)
            if grad:
                y.backward(torch.empty_like(y))
    return Trace(alive[1] - alive[0], meter.peak - before, meter.operations)


def trace_decoding(config, kind: str, layout: dict, rows: int, context: int) -> Trace:
    """A block on one token of each of `rows` rows, which attend to a cache of `context` slots."""
    with fake_block(config, kind, layout, rows) as (model, dtype, meter), torch.no_grad():
        ids = torch.zeros(rows, 1, dtype=torch.long)  # (b, t)
        fake = fake_context(config, ids, context, dtype)
        model.context = lambda *_: fake
        cache = Cache(model.config, rows, context, dtype)
        with unsharded(model):
            meter.restart()  # neither the cache nor gathering the weights is part of a step
            before = meter.alive()
            model(ids, cache=cache)
    return Trace(0, meter.peak - before, meter.operations)


def trace_head(config, layout: dict, tokens: int) -> Trace:
    """Log-probs of the head, forward and backward, on so many hidden states."""
    dtype = DTYPES[layout["dtype"]]
    with FakeTensorMode(), Meter() as meter:
        hidden = torch.empty(1, tokens, config.hidden_size, dtype=dtype, requires_grad=True)
        weight = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, requires_grad=True)
        ids = torch.zeros(1, tokens, dtype=torch.long)  # (b, t)
        meter.restart()
        before = meter.alive()
        logprobs = token_logprobs(hidden, weight, ids)[0]  # (b, t)
        logprobs.backward(torch.empty_like(logprobs))
    return Trace(0, meter.peak - before, meter.operations)


def trace_draw(config, layout: dict, rows: int) -> Trace:
    """The next tokens of `rows` rows: logits, and a draw from them."""
    dtype = DTYPES[layout["dtype"]]
    with FakeTensorMode(), Meter() as meter, torch.no_grad():
        hidden = torch.empty(rows, config.hidden_size, dtype=dtype)  # (b, d)
        weight = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype)  # (v, d)
        uniform = torch.empty(rows, dtype=torch.double)  # (b,)
        meter.restart()
        before = meter.alive()
        draw((hidden @ weight.T).float(), uniform, 1.0, 1.0, 0)
    return Trace(0, meter.peak - before, meter.operations)


def fake_context(config, ids: Tensor, seen: int, dtype) -> Context:
    """Model.context, whose numbers fake tensors lack: a packed row, or a step of decoding."""
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
