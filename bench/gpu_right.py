"""bench.gpu, right: the same numbers on the device as on a CPU, and runs that end as they should.

Reference is the CPU in fp32. fp32 on the device must agree to rounding; bf16 has weights that are
bf16 numbers, and must be no further from fp32 on these weights than twice what the CPU's own bf16
is. Where experts are chosen the reference's choice is replayed, since a near tie may fall
differently.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bench import common
from bench.gpu_common import BF16, FP32, Finding, Setup, below
from bench.train_step import documents
from nanocascade.checkpoint.weights import load_model
from nanocascade.data.batch import make_batches
from nanocascade.data.episode import Rollout
from nanocascade.engine import distributed
from nanocascade.engine.distributed import Layout
from nanocascade.engine.forward import new_routing, score_tokens
from nanocascade.engine.layout import load
from nanocascade.engine.optim import make_optimizer, optimizer_step
from nanocascade.model.cache import Cache
from nanocascade.model.model import Model
from nanocascade.model.moe import Experts, Routing, fused_mm, looped_mm
from nanocascade.sampler import draw, generate, hash_uniform

ROOT = Path(__file__).parents[1]
TINY = {"hidden_size": 64, "head_dim": 16}  # of --small


@contextmanager
def directory(setup: Setup, family: str):
    """Random weights of a family: width 256, or 64 where --small."""
    with common.model_dir(family, **(TINY if setup.small else {})) as folder:
        yield folder


# ---- Models --------------------------------------------------------------------------------------


def gradients(model: Model, batch, replay=None):
    """(log-probs (b, t), loss, {name: gradient}, experts) of one packed batch, on the CPU."""
    batch.experts = None if replay is None else replay.to(batch.ids.device)
    routing = new_routing(model, batch)
    logprobs, _ = score_tokens(model, batch, routing=routing)  # (b, t)
    loss = -(logprobs * batch.mask).sum() / batch.mask.sum()
    loss.backward()
    grads = {name: p.grad.float().cpu() for name, p in model.named_parameters()}
    experts = routing.experts().cpu() if routing.chosen else None
    model.zero_grad(set_to_none=True)
    return logprobs.detach().float().cpu(), float(loss.detach()), grads, experts


def distance(grads: dict, reference: dict) -> float:
    """|g - reference| / |reference| over all parameters together."""
    square = sum(float((grads[name] - x).square().sum()) for name, x in reference.items())
    return (square / sum(float(x.square().sum()) for x in reference.values())) ** 0.5


def packed_forward_and_backward(setup: Setup) -> Iterator[Finding]:
    """Log-probs, loss and gradients of packed rows: short documents under one mask and long ones
    one by one."""
    sizes = [9, 40, 17, 33, 120, 5] if setup.small else [9, 300, 70, 33, 700, 5, 130]
    for family in common.FAMILIES:
        with directory(setup, family) as folder:
            cpu = make_batches(documents(sizes), 4096)[0]
            here = make_batches(documents(sizes), 4096, setup.device)[0]
            logprobs, loss, grads, experts = gradients(load_model(folder), cpu)
            found = gradients(load_model(folder, FP32, setup.device), here, experts)
            rounded = load_model(folder, BF16).float()
            reference = gradients(rounded, cpu, experts)
            host = gradients(load_model(folder, BF16), cpu, experts)
            half = gradients(load_model(folder, BF16, setup.device), here, experts)
        gap = float((found[0] - logprobs).abs().max())
        yield below(f"{family} fp32: largest log-prob difference", gap, 1e-4)
        yield below(f"{family} fp32: loss difference", abs(found[1] - loss), 1e-5)
        yield below(f"{family} fp32: gradients, relative", distance(found[2], grads), 1e-3)
        own = (host[0] - reference[0]).abs()
        gap = (half[0] - reference[0]).abs()
        limit = 2 * float(own.mean()) + 1e-4
        yield below(f"{family} bf16: mean log-prob difference from fp32", float(gap.mean()), limit)
        limit = 2 * distance(host[2], reference[2]) + 1e-3
        yield below(f"{family} bf16: gradients, relative", distance(half[2], reference[2]), limit)


@torch.no_grad()
def cached_decoding(setup: Setup) -> Iterator[Finding]:
    """Prefill and single steps with a cache give the logits of one whole forward."""
    for family in common.FAMILIES:
        with directory(setup, family) as folder:
            for dtype, limit in ((FP32, 1e-4), (BF16, 0.2)):
                model = load_model(folder, dtype, setup.device)
                ids = torch.tensor(common.random_prompts(3, 24, 24), device=setup.device)  # (b, t)
                whole = Routing(model.config.num_moe_layers)
                expected = model.logits(model(ids, routing=whole))  # (b, t, v)
                cache = Cache(model.config, 3, 32, dtype, setup.device)
                gap, start = 0.0, 0
                for stop in (10, *range(11, 25)):
                    experts = whole.experts()[:, start:stop] if whole.chosen else None
                    routing = Routing(model.config.num_moe_layers, experts)
                    part = ids[:, start:stop]
                    rows = torch.arange(3, device=setup.device)[:, None].expand_as(part)
                    segments = rows if start == 0 else None  # a prefill, then steps
                    hidden = model(part, cache=cache, segments=segments, routing=routing)
                    seen = model.logits(hidden) - expected[:, start:stop]  # (b, t, v)
                    gap, start = max(gap, float(seen.abs().max())), stop
                name = str(dtype).removeprefix("torch.")
                yield below(f"{family} {name}: cached against whole logits", gap, limit)


def sampler_against_trainer(setup: Setup) -> Iterator[Finding]:
    """The log-probs that the sampler returns are those of the trainer's packed forward, with the
    recorded experts; without replay few choices differ."""
    prompts = common.random_prompts(4, 5, 40)
    for family in common.FAMILIES:
        with directory(setup, family) as folder:
            for dtype, mean, most in ((FP32, 1e-5, 1e-4), (BF16, 2e-2, 5e-1)):
                model = load_model(folder, dtype, setup.device)
                groups = generate(
                    model,
                    prompts,
                    num_samples=4,
                    max_new_tokens=8 if setup.small else 48,
                    stop_ids=[3],
                    max_rows=6,
                    return_experts=model.config.num_moe_layers > 0,
                )
                pairs = zip(prompts, groups, strict=True)
                rollouts = [as_rollout(prompt, x) for prompt, group in pairs for x in group]
                name = f"{family} {str(dtype).removeprefix('torch.')}"
                replay = model.config.num_moe_layers > 0
                gap, changed = compare_rollouts(model, rollouts, setup.device, replay)
                yield below(f"{name}: sampler against trainer, mean", float(gap.mean()), mean)
                yield below(f"{name}: sampler against trainer, largest", float(gap.max()), most)
                if replay:
                    share = 1e-3 if dtype == FP32 else 0.2
                    yield below(f"{name}: experts that differ without replay", changed, share)


def as_rollout(prompt: list[int], sample) -> Rollout:
    n, m = len(prompt), len(sample.tokens)
    logprobs = [0.0] * n + sample.logprobs
    mask = [False] * n + [True] * m
    return Rollout({"id": ""}, prompt + sample.tokens, n, mask, logprobs, experts=sample.experts)


@torch.no_grad()
def compare_rollouts(model, rollouts, device, replay: bool):
    """(|log-prob differences| (n,), share of (token, layer) pairs whose experts differ)."""
    gaps, changed = [], []
    for batch in make_batches(rollouts, 4096, device, replay):
        recorded = batch.experts  # (b, t, l, a)
        logprobs, _ = score_tokens(model, batch, routing=new_routing(model, batch))
        gaps.append((logprobs - batch.sampler_logprobs)[batch.mask].abs().float().cpu())
        if replay:
            batch.experts = None
            routing = new_routing(model, batch)
            score_tokens(model, batch, routing=routing)
            used = routing.experts().sort(-1).values[batch.valid]  # (n, l, a)
            other = (used != recorded.sort(-1).values[batch.valid]).any(-1)  # (n, l)
            changed.append(other.float().mean())
    return torch.cat(gaps), float(torch.stack(changed).mean()) if changed else 0.0


def grouped_experts(setup: Setup) -> Iterator[Finding]:
    """One grouped product against a loop over experts, most of them without tokens, where freed
    memory is full of NaN: what a kernel leaves unwritten shows."""
    with directory(setup, "nemotron_h") as folder:
        config = load_model(folder).config
    for dtype, limit in ((FP32, 1e-5), (BF16, 2e-2)):
        torch.manual_seed(0)
        experts = Experts(config)
        for p in experts.parameters():
            torch.nn.init.normal_(p, std=0.05)
        experts.to(setup.device, dtype)
        x = torch.randn(96, config.hidden_size).to(setup.device, dtype).requires_grad_()  # (n, d)
        chosen = torch.tensor([[1, 9], [9, 14], [1, 14]] * 32, device=setup.device)  # (n, a)
        shares = torch.rand(96, 2, device=setup.device)  # (n, a)
        results = []
        for product in (looped_mm, fused_mm):
            experts.multiply = product
            for size in (1 << 16, 1 << 20, 1 << 22):
                torch.full((size,), float("nan"), dtype=dtype, device=setup.device)
            y = experts(x, chosen, shares)
            y.square().sum().backward()
            results.append([y.detach(), x.grad, *(p.grad for p in experts.parameters())])
            x.grad = None
            experts.zero_grad(set_to_none=True)
        pairs = zip(*results, strict=True)
        gap = max(float((b - a).float().norm() / a.float().norm()) for a, b in pairs)
        name = str(dtype).removeprefix("torch.")
        yield below(f"experts {name}: grouped against looped, output and gradients", gap, limit)


def sampling_arithmetic(setup: Setup) -> Iterator[Finding]:
    """The hash of a draw has the same bits; no token outside the nucleus is ever drawn."""
    keys = torch.arange(-500, 500) * 0x1234567890ABCD  # (b,)
    places = torch.arange(1000)  # (b,)
    there = hash_uniform(keys.to(setup.device), places.to(setup.device)).cpu()
    same = torch.equal(there, hash_uniform(keys, places))
    yield Finding("hash of 1,000 draws", "equal bits" if same else "other bits", "equal bits", same)
    rows, width, calls = (64, 500, 2) if setup.small else (1024, 32000, 20)
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(rows, width, generator=generator).to(setup.device)  # (b, v)
    outside = 0
    for i in range(calls):
        u = torch.rand(rows, dtype=torch.double, generator=generator).to(setup.device)  # (b,)
        within = draw(logits, u, 1.0, 0.9, 50 if i % 2 else 0)[2]  # (b,)
        outside += int(torch.isinf(within).sum())
    text = f"{outside} of {rows * calls:,}"
    yield Finding("draws outside the nucleus or the top k", text, "0", outside == 0)


# ---- Training ------------------------------------------------------------------------------------


def train(folder: str, device: str, steps: int, sizes: list[int], **flags):
    """(losses, gradient norms, weights) of some steps of next-token loss, laid out as flags say."""
    with distributed.start(device, Layout(**flags)) as dist:
        model = load(folder, dist)
        optimizer = make_optimizer(model, 1e-3, (0.9, 0.95), 0.1, dist.offload_optimizer)
        losses, norms, rollouts = [], [], documents(sizes)
        total = sum(x.num_loss_tokens for x in rollouts)
        for _ in range(steps):
            loss_sum = 0.0
            for batch in make_batches(rollouts, 512, dist.device):
                logprobs, _ = score_tokens(model, batch)
                loss = -(logprobs * batch.mask).sum() / total
                loss.backward()
                loss_sum += float(loss.detach())
            losses.append(loss_sum)
            norms.append(optimizer_step(model, optimizer, 1e-3, 1.0, dist))
        state = {k: getattr(p, "full_tensor", lambda p=p: p)() for k, p in model.named_parameters()}
        return losses, norms, {k: p.detach().float().cpu() for k, p in state.items()}


LAYOUTS = {  # fp32 layouts must take the same steps; bf16 about the same
    "fused AdamW": {},
    "moments in host memory": {"offload_optimizer": True},
    "recomputed blocks": {"checkpoint_blocks": True},
    "offloaded block inputs": {"checkpoint_blocks": True, "offload_blocks": True},
    "FSDP2 on one rank": {"shard": True},
    "FSDP2, all of these": {
        "shard": True,
        "checkpoint_blocks": True,
        "offload_blocks": True,
        "offload_optimizer": True,
    },
}


def optimizer_and_layouts(setup: Setup) -> Iterator[Finding]:
    """Three AdamW steps in each layout, against the plain one on a CPU; the longest document is
    scanned in spans, so that nested recomputation is part of it."""
    sizes = [30, 9, 60, 44] if setup.small else [300, 90, 450, 200, 31]
    for family in ("nemotron_h", "qwen3_moe"):
        with directory(setup, family) as folder:
            start = {k: p.detach() for k, p in load_model(folder).named_parameters()}
            losses, norms, weights = train(folder, "cpu", 3, sizes)
            moved = {k: x - start[k] for k, x in weights.items()}
            for name, flags in LAYOUTS.items():
                found = train(folder, setup.device, 3, sizes, **flags)
                gap = max(abs(a - b) for a, b in zip(found[0], losses, strict=True))
                yield below(f"{family}, {name}: loss difference in 3 steps", gap, 1e-3)
                update = {k: x - start[k] for k, x in found[2].items()}
                # AdamW divides by the gradient's size: rounding turns tiny ones around.
                yield below(f"{family}, {name}: update, relative", distance(update, moved), 5e-2)
            found = train(folder, setup.device, 3, sizes, dtype="bfloat16", shard=True)
            gap = max(abs(a / b - 1) for a, b in zip(found[1], norms, strict=True))
            yield below(f"{family}, FSDP2 bf16: gradient norm, relative", gap, 5e-2)


# ---- Runs ----------------------------------------------------------------------------------------


def command(script: str, out: Path, device: str, *flags) -> list[str]:
    flags = [str(x) for x in ("--out", out, "--device", device, "--eval_samples", 0, *flags)]
    return [sys.executable, str(ROOT / script), *flags]


def metrics(out: Path, *names: str) -> list[tuple]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [tuple(json.loads(line)[name] for name in names) for line in lines]


def kill_and_resume(setup: Setup) -> Iterator[Finding]:
    """A toy SFT run that is killed goes on to the metrics of one that was not."""
    flags = ("--steps", 5, "--batch_tokens", 512, "--toy_rows", 12, "--save_every", 1)
    flags += ("--own_eval_samples", 0, "--reference_samples", 1)
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Path(folder) / "whole", Path(folder) / "cut"
        subprocess.run(command("train_sft.py", whole, setup.device, *flags), check=True)
        process = subprocess.Popen(command("train_sft.py", cut, setup.device, *flags))
        while process.poll() is None and not list((cut / "state").glob("[1-9]")):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        steps = len(metrics(cut, "step"))
        again = command("train_sft.py", cut, setup.device, *flags, "--resume")
        subprocess.run(again, check=True)
        names = ("loss/token", "grad_norm")
        pairs = [*zip(metrics(whole, *names), metrics(cut, *names), strict=True)]
    gap = max(abs(a / b - 1) for x, y in pairs for a, b in zip(x, y, strict=True))
    yield below(f"killed after {steps} steps: metrics of 5, relative", gap, 1e-3)
    bits = "yes" if all(x == y for x, y in pairs) else "no (atomic sums on a GPU vary)"
    yield Finding("killed and resumed: the same bits", bits)


def toy_in_short(setup: Setup) -> Iterator[Finding]:
    """Every kind of stage of the toy for two steps, in this process: SFT, GRPO with and without a
    reference model, MOPD from three teachers."""
    common_flags = ("--toy_rows", 24, "--show_every", 0, "--eval_samples", 0)
    common_flags += ("--own_eval_samples", 2, "--eval_max_new_tokens", 8, "--device", setup.device)
    rl = ("--steps", 2, "--prompts", 4, "--rollouts", 4, *common_flags)
    with tempfile.TemporaryDirectory() as folder:
        out = {name: os.path.join(folder, name) for name in ("sft", "if_rl", "rlhf", "mopd")}
        sft = ("--steps", 2, "--batch_tokens", 512, "--reference_samples", 2, *common_flags)
        teachers = f"math={out['sft']},preference={out['rlhf']},multi_domain={out['if_rl']}"
        from_sft = ("--init", out["sft"], *rl)
        runs = {
            "sft": ("train_sft.py", *sft),
            "if_rl": ("train_rl.py", "--stage", "if_rl", *from_sft),
            "rlhf": ("train_rl.py", "--stage", "rlhf", *from_sft),
            "mopd": ("train_mopd.py", "--teachers", teachers, "--init", out["if_rl"], *rl),
        }
        for name, (script, *flags) in runs.items():
            sys.argv = [script, "--out", out[name], *map(str, flags)]
            began = time.perf_counter()
            runpy.run_path(str(ROOT / script), run_name="__main__")
            norms = [x for (x,) in metrics(Path(out[name]), "grad_norm")]
            good = len(norms) == 2 and all(0 <= x < 1e6 for x in norms)
            text = f"gradient norms {norms[0]:.3g}, {norms[1]:.3g}"
            yield Finding(f"toy {name}, {time.perf_counter() - began:.0f} s", text, "2 steps", good)


MODELS = (
    packed_forward_and_backward,
    cached_decoding,
    sampler_against_trainer,
    grouped_experts,
    sampling_arithmetic,
)
TRAINING = (optimizer_and_layouts,)
RUNS = (toy_in_short, kill_and_resume)
