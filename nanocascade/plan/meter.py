"""Meter the memory and time of a block by running its code on fake tensors, without memory.

Fake tensors have shapes and no data, and the other ranks are a process group that does not exist,
so a block of the 30B model runs here as the engine lays it out. plan.py adds up blocks to a run.
"""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from weakref import WeakValueDictionary

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from nanocascade.engine.distributed import DTYPES, Dist, Layout
from nanocascade.engine.experts import CHUNK_TOKENS
from nanocascade.engine.layout import parallelize, unsharded
from nanocascade.model import scan
from nanocascade.model.cache import Cache
from nanocascade.model.documents import Documents
from nanocascade.model.logprobs import token_logprobs
from nanocascade.model.model import Context, Model, packed_context
from nanocascade.model.moe import fused_mm
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
        self.number, self.before = number, 0
        self.storages = WeakValueDictionary()  # by id: those made inside that are not freed yet
        self.peak, self.operations = 0, []

    def restart(self) -> None:
        """Record from here on; what is alive already does not count."""
        self.before = self.alive()
        self.peak, self.operations = 0, []

    def trace(self, kept: float = 0) -> Trace:
        return Trace(kept, self.peak - self.before, self.operations)

    def alive(self) -> int:
        # Their present sizes: FSDP frees what it gathered by resizing it to 0.
        return sum(x.nbytes() for x in self.storages.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, aten, flops = kwargs or {}, torch.ops.aten, 0.0
        inputs = tensors((args, kwargs))
        is_fake = bool(inputs) and isinstance(inputs[0], FakeTensor)
        if is_fake and func is aten._local_scalar_dense.default:
            return self.number
        if is_fake and func is aten._grouped_mm.default:  # has no fake form in fp32
            out, flops = fake_grouped_mm(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
            if formula := flop_registry.get(func._overloadpacket):
                flops = float(formula(*args, **kwargs, out_val=out))
        known = {id(x.untyped_storage()) for x in inputs}
        outputs = {id(x): x for x in (y.untyped_storage() for y in tensors(out))}
        self.storages |= {key: x for key, x in outputs.items() if key not in known}
        self.peak = max(self.peak, self.alive())
        if func.namespace == "aten" and not func.is_view and "unsafe_view" not in func.name():
            touched = inputs + tensors(out)
            if func is aten.index_put_.default:  # a cache: only what is written counts
                touched = [args[2]] * 2
            self.operations.append((flops, float(sum(x.nbytes for x in touched))))
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
    before = scan.CPU_CHUNK
    torch_dist.init_process_group("fake", rank=0, world_size=NODE, store=FakeStore())
    if gpu:
        scan.CPU_CHUNK = 1 << 30
    try:
        yield
    finally:
        scan.CPU_CHUNK = before
        torch_dist.destroy_process_group()


class ImaginaryDist(Dist):
    """Rank 0 of the imaginary node; the ranks that do not exist have its numbers."""

    def __init__(self, layout: Layout):
        super().__init__(0, NODE, "cpu", **vars(layout))
        if self.sharded:
            self.make_meshes()

    def reduce(self, x, op, group=None):
        return x

    def busiest_pairs(self, config, num_tokens: int) -> int:
        """(token, expert) pairs that the busiest rank of an expert group computes at once."""
        share = min(IMBALANCE / self.expert_parallel, 1.0)
        tokens = min(num_tokens * self.expert_parallel, CHUNK_TOKENS)
        return int(share * tokens * config.num_experts_per_tok)


# ---- Traces --------------------------------------------------------------------------------------


@contextmanager
def fake_block(config, kind: str, layout: Layout, num_tokens: int):
    """(model of one block on rank 0 of NODE, meter): fake, and metered from here on."""
    dist = ImaginaryDist(layout)
    with torch.device("meta"):
        model = Model(replace(config, pattern=kind, vocab_size=8))
        model = parallelize(model, dist)
        if kind == "E":  # a loop over experts would slice by numbers that fake tensors lack
            model.blocks[0].mixer.experts.multiply = fused_mm
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        with Meter(dist.busiest_pairs(config, num_tokens)) as meter:
            yield model, meter


@contextmanager
def fake_head(config, layout: Layout, tokens: int):
    """(hidden states (n, d), weight of the head (v, d), meter): fake, and metered from here on."""
    dtype = DTYPES[layout.dtype]
    with FakeTensorMode(), Meter() as meter:
        hidden = torch.empty(tokens, config.hidden_size, dtype=dtype, requires_grad=True)
        weight = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, requires_grad=True)
        yield hidden, weight, meter


def trace_block(config, kind: str, layout: Layout, rows: int, width: int, grad=True) -> Trace:
    """A block, or the head with its log-probs, on (rows, width) tokens: forward, and with grad
    backward."""
    if kind == HEAD:
        return trace_head(config, layout, rows * width, grad)
    ids = torch.zeros(rows, width, dtype=torch.long)  # (b, t)
    context = packed_rows(config, ids, DTYPES[layout.dtype])
    with fake_block(config, kind, layout, ids.numel()) as (model, meter):
        model.context = lambda *_: context
        alive = []  # before and after the block, and again where it is recomputed
        model.blocks[0].register_forward_pre_hook(lambda *_: alive.append(meter.alive()))
        model.blocks[0].register_forward_hook(lambda *_: alive.append(meter.alive()))
        meter.restart()
        with torch.set_grad_enabled(grad):
            y = model(ids)  # (b, t, d)
            if grad:
                y.backward(torch.empty_like(y))
        return meter.trace(alive[1] - alive[0])


def trace_head(config, layout: Layout, tokens: int, grad: bool) -> Trace:
    with fake_head(config, layout, tokens) as (hidden, weight, meter):
        ids = torch.zeros(1, tokens, dtype=torch.long)  # (b, t)
        meter.restart()
        with torch.set_grad_enabled(grad):
            logprobs = token_logprobs(hidden[None], weight, ids)[0]  # (b, t)
            if grad:
                logprobs.backward(torch.empty_like(logprobs))
        return meter.trace()


def trace_decoding(config, kind: str, layout: Layout, rows: int, seen: int) -> Trace:
    """A block, or the head with the draw, on one token of each of `rows` rows, which attend to a
    cache of `seen` slots."""
    if kind == HEAD:
        return trace_draw(config, layout, rows)
    ids = torch.zeros(rows, 1, dtype=torch.long)  # (b, t)
    dtype = DTYPES[layout.dtype]
    context = cached_rows(config, ids, seen, dtype)
    with fake_block(config, kind, layout, rows) as (model, meter), torch.no_grad():
        model.context = lambda *_: context
        cache = Cache(model.config, rows, seen, dtype)
        with unsharded(model):
            meter.restart()  # neither the cache nor gathering the weights is part of a step
            model(ids, cache=cache)
        return meter.trace()


def trace_draw(config, layout: Layout, rows: int) -> Trace:
    with fake_head(config, layout, rows) as (hidden, weight, meter), torch.no_grad():
        uniform = torch.empty(rows, dtype=torch.double)  # (b,)
        meter.restart()
        draw((hidden @ weight.T).float(), uniform, 1.0, 1.0, 0)
        return meter.trace()


# Model.context asks tensors for their numbers, which fake ones lack. These contexts are real.


def packed_rows(config, ids: Tensor, dtype) -> Context:
    """The context of packed rows (b, t), each of which is one document."""
    rows, width = ids.shape
    documents = Documents([width] * rows)
    context = packed_context(config, documents, dtype, ids.device)
    context.rotary = rotary(config, ids, dtype)
    return context


def cached_rows(config, ids: Tensor, seen: int, dtype) -> Context:
    """The context of rows (b, 1) that continue a cache of `seen` slots."""
    return Context(
        rows=torch.arange(len(ids))[:, None],  # (b, 1)
        slots=torch.zeros_like(ids),  # (b, t)
        mask=torch.zeros(len(ids), 1, 1, seen, dtype=dtype),  # (b, 1, t, t')
        rotary=rotary(config, ids, dtype),
    )


def rotary(config, ids: Tensor, dtype) -> tuple[Tensor, Tensor] | None:
    if config.rope_theta is None:
        return None
    table = torch.empty(*ids.shape, 1, config.head_dim, dtype=dtype)  # (b, t, 1, c)
    return table, table
