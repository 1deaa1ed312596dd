"""bench.gpu, true: what --dry_run predicts against what the device does.

Peak memory of a training step and of rollouts of one model against the plan of the same run; then
one block of each kind of the 30B-A3B, with 8,192 tokens forward and backward and with one decode
step of 64 rows, against the plan's seconds for the same operations. On a CPU, where there is no
account of a device, the peak is that of the allocations that the plan's meter sees.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from bench import common
from bench.gpu_common import BF16, Finding, Setup, measure_peaks
from bench.gpu_fast import directory, dtype_of, name_of
from bench.train_step import documents
from nanocascade.checkpoint.hf_config import load_config
from nanocascade.checkpoint.weights import load_model
from nanocascade.data.batch import make_batches
from nanocascade.engine import distributed
from nanocascade.engine.distributed import Layout
from nanocascade.engine.forward import score_tokens
from nanocascade.engine.layout import load
from nanocascade.engine.optim import make_optimizer, optimizer_step
from nanocascade.model.cache import Cache
from nanocascade.model.layers import KEEP_FP32
from nanocascade.model.model import Model
from nanocascade.plan import meter, plan, report, seconds
from nanocascade.sampler import generate

# Shares of the plan that a measured peak or time may be. Peaks are planned high on purpose.
PEAKS, TIMES = (0.75, 1.05), (0.5, 2.0)  # times: of a GPU only
BLOCK_TOKENS, BLOCK_ROWS, BLOCK_CONTEXT = 8192, 64, 2048


def compared(check: str, seen: float, planned: float, unit: str, limits=None) -> Finding:
    share = seen / planned
    text = f"{seen:.3g} {unit}, planned {planned:.3g}: {share:.2f} of it"
    if limits is None:
        return Finding(check, text)
    return Finding(check, text, f"{limits[0]} to {limits[1]}", limits[0] <= share <= limits[1])


class DevicePeak:
    """Bytes of the device beyond those at entry, at the worst moment since; on a CPU, bytes of
    the tensors made since."""

    def __init__(self, setup: Setup):
        self.setup, self.meter = setup, None if setup.is_cuda else meter.Meter()

    def __enter__(self):
        if self.meter is not None:
            self.meter.__enter__()
            return self
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *error):
        if self.meter is not None:
            self.meter.__exit__(*error)
            self.bytes = self.meter.peak
        else:
            self.bytes = torch.cuda.max_memory_allocated() - self.before


# ---- Memory --------------------------------------------------------------------------------------

LAYOUTS = {
    "fp32": {},
    "fp32, recomputed blocks, moments in host memory": {
        "checkpoint_blocks": True,
        "offload_optimizer": True,
    },
    "bf16 FSDP2": {"shard": True, "dtype": "bfloat16"},
    "bf16 FSDP2, recomputed blocks": {
        "shard": True,
        "dtype": "bfloat16",
        "checkpoint_blocks": True,
    },
}


def training_peaks(setup: Setup) -> Iterator[Finding]:
    """Two steps on documents of one length, weights and moments included."""
    length, count = (256, 4) if setup.small else (1024, 4)
    for family in ("qwen3", "nemotron_h"):
        with directory(setup, family) as folder:
            for name, flags in LAYOUTS.items():
                if flags.get("offload_optimizer") and not setup.is_cuda:
                    continue  # host memory is not apart there
                seen = peak_of_steps(setup, folder, [length + 1] * count, flags)
                work = plan.Work(length, length, length * count, length * count)
                with meter.imaginary_node():
                    whole = plan.Plan(load_config(folder), work, Layout(**flags), 1)
                    planned = sum(whole.bytes()["training"].values())
                title = f"peak of training, {name_of(setup, family)}, {name}"
                yield compared(title, seen / 1e9, planned / 1e9, "GB", PEAKS)


def peak_of_steps(setup: Setup, folder: str, sizes: list[int], flags: dict) -> float:
    layout = Layout(**flags)
    with DevicePeak(setup) as peak, distributed.start(setup.device, layout) as dist:
        model = load(folder, dist)
        optimizer = make_optimizer(model, 1e-4, (0.9, 0.95), 0.0, dist.offload_optimizer)
        for _ in range(2):
            for batch in make_batches(documents(sizes), sum(sizes), dist.device):
                logprobs, _ = score_tokens(model, batch)
                (-logprobs.sum() / sum(sizes)).backward()
            optimizer_step(model, optimizer, 1e-4, 1.0, dist)
        setup.synchronize()
    return peak.bytes


def rollout_peaks(setup: Setup) -> Iterator[Finding]:
    """What sampling holds beyond the weights: caches, and a prefill or a step."""
    rows, prompt, new = (4, 32, 8) if setup.small else (64, 512, 32)
    for family in ("qwen3", "nemotron_h"):
        with directory(setup, family) as folder:
            config, model = load_config(folder), load_model(folder, dtype_of(setup), setup.device)
        prompts = common.random_prompts(rows, prompt, prompt)
        with DevicePeak(setup) as peak:
            generate(model, prompts, max_new_tokens=new, max_rows=rows)
        work = plan.Work(prompt + new, 256, 4096, 4096)
        dtype = str(dtype_of(setup)).removeprefix("torch.")
        with meter.imaginary_node():
            layout = Layout(dtype=dtype, shard=not setup.small)
            whole = plan.Plan(config, work, layout, 1)
            found = whole.sampling(plan.Sampling(rows, prompt, new))
        planned = found["kept"] + found["block"]
        limits = None if setup.small else PEAKS  # a plan's prefill is a full one
        title = f"peak of {rows} rows at {prompt + new} tokens, {name_of(setup, family)}"
        yield compared(title, peak.bytes / 1e9, planned / 1e9, "GB", limits)


# ---- Blocks of the 30B-A3B -----------------------------------------------------------------------


def block_model(setup: Setup, config, kind: str) -> Model:
    """One block of the model and a vocabulary of 8, bf16 but for what stays in fp32."""
    with torch.device(setup.device):
        model = Model(replace(config, pattern=kind, vocab_size=8)).reset_parameters(0)
    for name, p in model.named_parameters():
        p.data = p.data if name.endswith(KEEP_FP32) else p.data.to(BF16)
    return model


def block_seconds(setup: Setup) -> Iterator[Finding]:
    """Forward and backward of 8,192 tokens, and a decode step of 64 rows at 2,048 tokens."""
    small = load_config_of_family("nemotron_h")
    config = small if setup.small else load_config(report.FULL)
    tokens, rows, context = BLOCK_TOKENS, BLOCK_ROWS, BLOCK_CONTEXT
    if setup.small:
        tokens, rows, context = 256, 4, 32
    peaks = measure_peaks(setup)
    hardware = seconds.Hardware(0, peaks.matmul[BF16], peaks.copy)
    layout, limits = Layout(shard=True, dtype="bfloat16"), TIMES if setup.is_cuda else None
    for kind in dict.fromkeys(config.pattern):
        model = block_model(setup, config, kind)
        with meter.imaginary_node():
            train = meter.trace_block(config, kind, layout, 1, tokens)
            decode = meter.trace_decoding(config, kind, layout, rows, context)
        seen = setup.seconds(train_block(setup, model, tokens))
        title = f"block {kind}, {tokens} tokens, forward and backward"
        yield compared(title, 1e3 * seen, 1e3 * seconds.roofline(train, hardware), "ms", limits)
        seen = setup.seconds(decode_block(setup, model, rows, context))
        title = f"block {kind}, a decode step of {rows} rows at {context} tokens"
        yield compared(title, 1e3 * seen, 1e3 * seconds.roofline(decode, hardware), "ms", limits)


def load_config_of_family(family: str):
    with common.model_dir(family) as folder:
        return load_config(folder)


def train_block(setup: Setup, model: Model, tokens: int):
    """A function that runs the block forward and backward on random hidden states."""
    ids = torch.zeros(1, tokens, dtype=torch.long, device=setup.device)  # (b, t)
    x = torch.randn(1, tokens, model.config.hidden_size, device=setup.device).to(BF16)  # (b, t, d)
    gradient = torch.randn_like(x)
    x.requires_grad_()

    def run():
        context = model.context(ids, None, ids, None)
        model.blocks[0](x, context).backward(gradient)
        model.zero_grad(set_to_none=True)

    return run


def decode_block(setup: Setup, model: Model, rows: int, context: int):
    """A function that runs the block on one token of each row, at a cache of `context` tokens."""
    cache = Cache(model.config, rows, context + 1, BF16, setup.device)
    ids = torch.zeros(rows, 1, dtype=torch.long, device=setup.device)  # (b, t)
    x = torch.randn(rows, 1, model.config.hidden_size, device=setup.device).to(BF16)  # (b, t, d)

    @torch.inference_mode()
    def run():
        cache.lengths.fill_(context - 1)
        model.blocks[0](x, model.context(ids, cache, None, None), cache.layers[0])

    return run


MEMORY = (training_peaks, rollout_peaks)
BLOCKS = (block_seconds,)
