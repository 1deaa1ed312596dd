"""bench.gpu, fast: decoding, rollouts and training steps against transformers, same random weights.

Two models: the shape of Qwen3-0.6B, and a nemotron_h of about a billion parameters (11 Mamba-2, 11
mixture-of-experts and 4 attention blocks). A decode step's kernels and host syncs are counted, and
its time is held against the bytes it must read at the bandwidth that a plain copy reaches.
"""

import statistics
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile

from bench import common
from bench.common import timed
from bench.gpu_common import BF16, FP32, Finding, Setup, measure_peaks
from bench.grpo_step import Ours
from bench.rollout import our_rollouts, their_rollouts
from bench.train_step import documents, our_step, their_step
from nanocascade.checkpoint.weights import load_model
from nanocascade.engine import distributed
from nanocascade.engine.distributed import Layout
from nanocascade.engine.layout import load
from nanocascade.engine.optim import make_optimizer
from nanocascade.model.cache import Cache
from nanocascade.sampler import Decoder, Row
from nanocascade.tokenizer.tokenizer import Tokenizer
from nanocascade.toy.start import build_toy_tokenizer
from nanocascade.toy.tasks import make_rows, vocabulary

LARGE = {
    "qwen3": {
        "vocab_size": 151936,
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
    },
    "nemotron_h": {
        "vocab_size": 131072,
        "hidden_size": 1024,
        "num_hidden_layers": 26,
        "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEM*E",
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "mamba_num_heads": 32,
        "mamba_head_dim": 64,
        "n_groups": 8,
        "ssm_state_size": 128,
        "n_routed_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 768,
        "moe_shared_expert_intermediate_size": 1024,
    },
}
NAMES = {"qwen3": "Qwen3-0.6B's shape", "nemotron_h": "nemotron_h of 1B"}


def name_of(setup: Setup, family: str) -> str:
    return f"toy {family}" if setup.small else NAMES[family]


def dtype_of(setup: Setup) -> torch.dtype:
    return FP32 if setup.small else BF16


@contextmanager
def directory(setup: Setup, family: str, seed=0):
    """Random weights and the toy's tokenizer, whose words are the first of a larger vocabulary."""
    with tempfile.TemporaryDirectory() as scratch:
        build_toy_tokenizer(scratch, vocabulary())
        tokenizer = Tokenizer(scratch)
    size = {"num_hidden_layers": 2} if setup.small and family == "qwen3" else {}
    size = size if setup.small else LARGE[family]
    end, pad = list(tokenizer.eos_ids), tokenizer.special_ids["<|endoftext|>"]
    ids = {"eos_token_id": end, "pad_token_id": pad}
    options = {"seed": seed, "device": setup.device, "dtype": dtype_of(setup)}
    with common.model_dir(family, tokenizer, **options, **size, **ids) as folder:
        yield folder


def against(ours: float, theirs: float, unit: str, amount: float) -> str:
    """ "1,200 tokens/s, transformers 800: 1.50 times" from seconds of the same amount of work."""
    return (
        f"{amount / ours:,.0f} {unit}, transformers {amount / theirs:,.0f}: "
        f"{theirs / ours:.2f} times"
    )


def in_turns(setup: Setup, ours, theirs) -> tuple[float, float]:
    """Median seconds of each side, in turns; both have been warmed up."""
    pairs = [(timed(ours), timed(theirs)) for _ in range(1 if setup.small else 2)]
    return tuple(statistics.median(x) for x in zip(*pairs, strict=True))


# ---- Decoding ------------------------------------------------------------------------------------


def decoder_of(model, rows: int, context: int, new: int) -> Decoder:
    """A Decoder with `rows` rows in the midst of decoding, each `context` tokens long."""
    decoder = Decoder(model, rows, context + new + 1)
    size = max(decoder.prefill_tokens // context, 1)
    prompts = common.random_prompts(rows, context, context)
    groups = [[Row(i, 0, prompt, new, i)] for i, prompt in enumerate(prompts)]
    for i in range(0, rows, size):
        decoder.admit(groups[i : i + size])
    return decoder


def step_bytes(model, rows: int, context: int) -> float:
    """Bytes that a decode step must read: weights (of experts those that some row chose, for random
    choices), each row's keys and values, and its SSM state, which is written too."""
    config, total = model.config, 0.0
    missed = (1 - config.num_experts_per_tok / max(config.num_experts, 1)) ** rows
    for name, p in model.named_parameters():
        if name != "embed.weight" or config.tie_word_embeddings:
            total += p.numel() * p.itemsize * (1 - missed if ".experts." in name else 1)
    for layer in Cache(config, 1, context, model.embed.weight.dtype, "meta").layers:
        total += rows * sum(x.nbytes * (2 if name == "ssm" else 1) for name, x in layer.items())
    return total


@torch.inference_mode()
def decode_tokens_a_second(setup: Setup) -> Iterator[Finding]:
    """Uniform decoding at several numbers of rows, prompts of 32 tokens."""
    new, counts = (4, (1, 2)) if setup.small else (64, (1, 16, 64, 256))
    for family in LARGE:
        with directory(setup, family) as folder:
            ours, theirs = common.ours_and_peer(folder, dtype_of(setup), setup.device)
        common.check_same_model(ours, theirs)
        for rows in counts:
            decode_in_turns(setup, ours, theirs, rows, 4)  # warms up
            text = decode_in_turns(setup, ours, theirs, rows, new)
            yield Finding(f"decode {name_of(setup, family)}, {rows} rows", text)


def decode_in_turns(setup: Setup, ours, theirs, rows: int, new: int) -> str:
    prompts, lengths = common.random_prompts(rows, 32, 32), [new] * rows
    seconds = in_turns(
        setup,
        lambda: our_rollouts(ours, prompts, 1, lengths, max_rows=rows),
        lambda: their_rollouts(theirs, prompts, 1, lengths, rows),
    )
    return against(*seconds, "tokens/s", rows * new)


@torch.inference_mode()
def anatomy_of_a_step(setup: Setup) -> Iterator[Finding]:
    """Kernels, host syncs, the share of time the device works, and the share of bandwidth."""
    peaks = measure_peaks(setup)
    yield Finding("plain copy", f"{peaks.copy / 1e9:,.1f} GB/s, read and written")
    for dtype, rate in peaks.matmul.items():
        yield Finding(f"plain matmul, {str(dtype)[6:]}", f"{rate / 1e12:,.3f} TFLOP/s")
    context, steps = (16, 2) if setup.small else (512, 8)
    for family in LARGE:
        with directory(setup, family) as folder:
            model = load_model(folder, dtype_of(setup), setup.device)
        for rows in (2,) if setup.small else (1, 64, 256):
            decoder = decoder_of(model, rows, context, 8 * steps)

            def step(decoder=decoder):
                for _ in range(steps):  # as generate does them
                    decoder.step()
                    decoder.finish([0])

            seconds = setup.seconds(step) / steps
            share = step_bytes(model, rows, context) / seconds / peaks.copy
            name = f"{name_of(setup, family)}, {rows} rows at {context} tokens"
            kernels, busy = count_kernels(setup, step)
            yield Finding(
                f"decode step, {name}",
                f"{1e3 * seconds:.2f} ms, {kernels / steps:.0f} kernels, device busy "
                f"{busy / steps / seconds:.0%}, {syncs_a_step(setup, step, steps)}, "
                f"{share:.1%} of the copy's bandwidth",
            )


def count_kernels(setup: Setup, function) -> tuple[int, float]:
    """(kernels launched, seconds that the device worked); on a CPU operations and their time."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * setup.is_cuda
    with profile(activities=activities) as found:
        function()
        setup.synchronize()
    if not setup.is_cuda:
        leaves = [x for x in found.events() if not x.cpu_children]
        return len(leaves), sum(x.self_cpu_time_total for x in leaves) / 1e6
    kernels = [x for x in found.events() if x.device_type == torch.autograd.DeviceType.CUDA]
    return len(kernels), sum(x.self_device_time_total for x in kernels) / 1e6


def syncs_a_step(setup: Setup, function, steps: int) -> str:
    """How often the host waited for the device, as torch's sync debug mode sees it."""
    if not setup.is_cuda:
        return "host syncs not counted"
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = sum("synchroniz" in str(x.message) for x in caught)
    return f"{found / steps:.1f} host syncs"


# ---- Rollouts ------------------------------------------------------------------------------------


def rollouts_as_in_rl(setup: Setup) -> Iterator[Finding]:
    """Groups of 8 responses of very unequal length: rows that finish make room at once, a batch of
    transformers goes on to its longest."""
    p, r, longest, batches = (2, 2, 6, (4,)) if setup.small else (32, 8, 256, (64, 256))
    lengths, prompts = common.lengths(p * r, longest), common.random_prompts(p, 32, 200)
    for family in LARGE:
        with directory(setup, family) as folder:
            ours, theirs = common.ours_and_peer(folder, dtype_of(setup), setup.device)
        work = (setup, ours, theirs, prompts, r)
        turns_of_rollouts(*work, [max(1, x // 16) for x in lengths], batches)  # warms up
        text = turns_of_rollouts(*work, lengths, batches)
        name = f"rollouts {name_of(setup, family)}, {p} x {r} up to {longest} tokens"
        yield Finding(name, text)


def turns_of_rollouts(setup: Setup, ours, theirs, prompts, r, lengths, batches) -> str:
    """Our rollouts against transformers at the best of several batch sizes."""
    our_seconds = timed(lambda: our_rollouts(ours, prompts, r, lengths, max_rows=256))
    others = {b: timed(lambda b=b: their_rollouts(theirs, prompts, r, lengths, b)) for b in batches}
    best = min(others, key=others.get)
    text = against(our_seconds, others[best], "tokens/s", sum(lengths))
    return f"{text} (theirs by {best} rows)"


# ---- Steps ---------------------------------------------------------------------------------------


def layout_of(setup: Setup) -> Layout:
    """bf16 products with fp32 master weights, on one rank; in toy sizes plain fp32."""
    return Layout() if setup.small else Layout(shard=True, dtype="bfloat16")


def training_tokens_a_second(setup: Setup) -> Iterator[Finding]:
    """Cross-entropy, backward, clipping, fused AdamW on unequal documents; transformers' model has
    fp32 weights and runs under autocast."""
    count, longest = (4, 12) if setup.small else (32, 512)
    sizes = [x + 8 for x in common.lengths(count, longest)]
    rollouts = documents(sizes)
    for family in LARGE:
        with directory(setup, family) as folder:
            seconds = training_in_turns(setup, folder, rollouts, max(count // 4, 1))
        text = against(*seconds, "tokens/s", sum(sizes))
        yield Finding(
            f"training {name_of(setup, family)}, {count} documents up to {longest + 8}", text
        )


def training_in_turns(setup: Setup, folder: str, rollouts, rows: int) -> tuple[float, float]:
    theirs = common.peer(folder, FP32, setup.device).train()
    other = torch.optim.AdamW(theirs.parameters(), lr=1e-5, fused=True)

    def their_turn():
        with torch.autocast(setup.device.split(":")[0], BF16, enabled=not setup.small):
            their_step(theirs, other, rollouts, rows)

    with distributed.start(setup.device, layout_of(setup)) as dist:
        ours = load(folder, dist)
        our_optimizer = make_optimizer(ours, 1e-5, (0.9, 0.95), 0.0)
        work = (lambda: our_step(ours, our_optimizer, rollouts, dist), their_turn)
        in_turns(setup, *work)  # warms up
        return in_turns(setup, *work)


def whole_steps(setup: Setup) -> Iterator[Finding]:
    """A step of GRPO and one of MOPD as the scripts take them: rollouts, verdicts, update."""
    p, r, longest = (2, 2, 6) if setup.small else (16, 8, 128)
    lengths = common.lengths(p * r, longest)
    for family in LARGE:
        with directory(setup, family) as folder, directory(setup, family, seed=1) as teacher:
            for loss, path in (("GRPO", None), ("MOPD", teacher)):
                with distributed.start(setup.device, layout_of(setup)) as dist:
                    step = Ours(folder, path, make_rows("math", p), r, lengths, dist)
                    step()
                    seconds = min(timed(step) for _ in range(1 if setup.small else 2))
                    del step
                name = f"{loss} step {name_of(setup, family)}, {p} x {r} up to {longest} tokens"
                yield Finding(name, f"{seconds:.2f} s, {sum(lengths) / seconds:,.0f} tokens/s")


DECODE = (anatomy_of_a_step, decode_tokens_a_second)
ROLLOUTS = (rollouts_as_in_rl,)
STEPS = (training_tokens_a_second, whole_steps)
