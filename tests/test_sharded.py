"""A model in shards over ranks computes, samples, saves and loads what it does on one."""

import json
import os
import threading
from types import SimpleNamespace

import pytest
import torch
from fixtures import make_parity
from fixtures.toy_runs import environments
from torch.distributed.tensor import DTensor

from nanocascade.checkpoint.hf_config import load_config
from nanocascade.checkpoint.state import load_state, save_state
from nanocascade.checkpoint.weights import load_model, save_model
from nanocascade.data.batch import step_batches
from nanocascade.data.episode import Rollout
from nanocascade.engine import distributed
from nanocascade.engine import layout as placing
from nanocascade.engine.distributed import Dist
from nanocascade.engine.forward import new_routing, no_load
from nanocascade.engine.forward import score_tokens as score
from nanocascade.engine.optim import make_optimizer, optimizer_step
from nanocascade.grpo import grpo_loss
from nanocascade.model.mamba2 import Mamba2
from nanocascade.model.model import Model
from nanocascade.model.moe import Router, update_correction_bias
from nanocascade.sampler import generate

PLAIN = {"shard": True}
SPREAD = {"expert_parallel": 2}
THRIFTY = {"checkpoint_blocks": True, "offload_blocks": True, "offload_optimizer": True}
nightly = pytest.mark.nightly


def spawn(size: int, work, *args) -> None:
    """work(rank, environments, *args) in each of `size` processes; a failure there fails here."""
    if size == 1:  # that is this one
        return work(0, [{}], *args)
    torch.multiprocessing.spawn(work, args=(environments(size), *args), nprocs=size)


def enter(rank: int, variables: list[dict], layout: dict):
    if variables[rank]:  # a process of its own
        torch.set_num_threads(1)
        os.environ.update(variables[rank])
    return distributed.start("cpu", distributed.Layout(**layout))


def documents(n: int) -> list[Rollout]:
    """n stored responses of very unequal length to two prompts, in turns, with the sampler's
    log-probs and advantages."""
    random = torch.Generator().manual_seed(5)
    found, texts = [], ([7, 9], [4, 4, 30, 1, 12])
    for i in range(n):
        prompt, new = texts[i % 2], 1 + 11 * i * (i % 2)
        tokens = prompt + torch.randint(1, 32, (new,), generator=random).tolist()
        mask = [False] * len(prompt) + [True] * new
        x = Rollout({"id": i}, tokens, len(prompt), mask, [-3.0] * len(tokens))
        x.advantage = 1.5 - i % 3
        found.append(x)
    return found


def train(model, optimizer, dist, rollouts, share=True) -> dict:
    """One step of GRPO on stored tokens as train_rl.py takes it: loss, norm and gradients."""
    num_tokens = sum(x.num_loss_tokens for x in rollouts)
    total, load = 0.0, no_load(model)
    for batch in step_batches(model, dist, dist.shard(rollouts), 40, share=share):
        routing = new_routing(model, batch)
        logprobs, _ = score(model, batch, 0.7, routing)
        loss, _ = grpo_loss(
            logprobs,
            batch.advantages,
            batch.mask,
            num_tokens=num_tokens,
            sampler_logprobs=batch.sampler_logprobs,
        )
        loss.backward()
        total += float(loss.detach())
        load += routing.tokens_per_expert(batch.copies, model.config.num_experts)
    dist.sum_gradients(model)
    grads = {name: whole(p.grad).clone() for name, p in model.named_parameters()}
    alone, dist.sum_gradients = dist.sum_gradients, lambda model: None  # they are summed already
    norm = optimizer_step(model, optimizer, 1e-2, 0.5, dist)
    dist.sum_gradients = alone
    load = dist.sum(load)
    update_correction_bias(model, load, 1e-2)
    return {"loss": dist.sum(total), "norm": norm, "load": load, "grads": grads}


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def weights(model) -> dict:
    return {name: whole(x).clone() for name, x in model.state_dict().items()}


def close(found: dict, expected: dict, tolerance=1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, x in found.items():
        error, size = float((x - expected[name]).norm()), float(expected[name].norm())
        assert error <= tolerance * size + 1e-9, f"{name}: off by {error} of {size}"


def prompts(n: int) -> list[list[int]]:
    return [[1 + i % 30, 5, 2 + i % 7] * (1 + i % 3) for i in range(n)]


def sample(model, mine: list[int], dist) -> dict[int, list]:
    texts = [prompts(9)[i] for i in mine]
    with placing.unsharded(model):
        out = generate(
            model,
            texts,
            num_samples=2,
            max_new_tokens=[4 + 9 * (i % 3) for i in mine],
            stop_ids=[3],
            row_ids=mine,
            max_rows=4,
            keep_going=dist.keep_going(),
        )
    return {i: [(x.tokens, x.logprobs) for x in group] for i, group in zip(mine, out, strict=True)}


def compare(rank, variables, path, layout, out) -> None:
    """What test_invariance_layouts asserts, on one of its ranks."""
    expected = load_model(path, torch.float64)  # fp32 would add noise of its own, up to 1e-5
    wanted = make_optimizer(expected, 1e-2, (0.9, 0.95), 0.1)
    one = Dist()
    with enter(rank, variables, layout) as dist:
        model = placing.load(path, dist)
        optimizer = make_optimizer(model, 1e-2, (0.9, 0.95), 0.1, dist.offload_optimizer)
        ep = dist.expert_parallel
        for name, p in model.named_parameters():
            held = p.to_local().numel() if isinstance(p, DTensor) else p.numel()
            shares = dist.world_size // dist.replicas if isinstance(p, DTensor) else 1
            assert held * shares == p.numel() or p.shape[0] % shares, name
        close(weights(model), weights(expected), 0)
        for step in range(2):  # in the second the first rank has all the work
            # 14 tokens: over 3, the gradient of q_proj has 7e-6 of noise in fp32 itself
            rollouts = documents(7) if step == 0 else documents(2)[1:]
            found = train(model, optimizer, dist, rollouts)
            known = train(expected, wanted, one, rollouts, share=False)
            assert found["loss"] == pytest.approx(known["loss"], rel=1e-5)
            assert found["norm"] == pytest.approx(known["norm"], rel=1e-5)
            assert found["load"].equal(known["load"])
            close(found["grads"], known["grads"])
            close(weights(model), weights(expected))
            expected.load_state_dict(weights(model))  # the next step starts from the same bits
        idle = dist.world_size > 1  # the first rank samples nothing
        mine = [i for i in range(9) if i % (dist.world_size - idle) == rank - idle]
        parts = dist.gather(sample(model, mine, dist))
        drawn = {i: x for part in parts for i, x in part.items()}
        for i, group in sample(expected, list(range(9)), one).items():
            for (tokens, logprobs), (known, wanted_logprobs) in zip(drawn[i], group, strict=True):
                assert tokens == known and logprobs == pytest.approx(wanted_logprobs, abs=1e-4)
        close(weights(model), weights(expected), 0)  # back in shards
        train(model, optimizer, dist, documents(3))  # and trainable
        train(expected, wanted, one, documents(3))
        close(weights(model), weights(expected))
        save_state(out, model=model, optimizer=optimizer, extra={"step": 3})
        save_model(model, out / "model", max_shard_bytes=40_000)
        dist.barrier()
        close(load_model(out / "model").state_dict(), weights(model), 0)
        assert all(x.device.type == "cpu" for s in optimizer.state.values() for x in s.values())
    assert ep == layout.get("expert_parallel", 1)


def resume(rank, variables, path, layout, out) -> None:
    """The state that other ranks left, on this layout: the same weights, moments and next step."""
    with enter(rank, variables, layout) as dist:
        model = placing.load(path, dist)
        optimizer = make_optimizer(model, 1e-2, (0.9, 0.95), 0.1)
        assert load_state(out, model, optimizer) == {"step": 3}
        close(weights(model), load_model(out / "model").state_dict(), 0)
        train(model, optimizer, dist, documents(3))
        after = weights(model)
        if rank == 0 and not (out / "after.pt").exists():
            torch.save(after, out / "after.pt")
        dist.barrier()
        close(after, torch.load(out / "after.pt"))


LAYOUTS = [
    (2, PLAIN | THRIFTY, "nemotron_h-base", [(1, {})]),
    (2, SPREAD, "nemotron_h-base", [(1, {})]),
    pytest.param(2, PLAIN, "qwen3-tied", [(1, PLAIN)], marks=nightly),
    pytest.param(2, SPREAD | THRIFTY, "qwen3_moe-base", [(2, {})], marks=nightly),
    pytest.param(1, PLAIN | THRIFTY, "nemotron_h-base", [(2, PLAIN)], marks=nightly),
    pytest.param(
        4, SPREAD | THRIFTY, "nemotron_h-base", [(2, PLAIN), (2, SPREAD), (1, {})], marks=nightly
    ),
    pytest.param(4, SPREAD | {"replicas": 2}, "nemotron_h-base", [(2, SPREAD)], marks=nightly),
    pytest.param(4, {"replicas": 2}, "qwen3-base", [(4, PLAIN)], marks=nightly),
    pytest.param(4, {"expert_parallel": 4}, "qwen3_moe-base", [(2, SPREAD)], marks=nightly),
]


@pytest.mark.parametrize("size, layout, case, others", LAYOUTS)
def test_invariance_layouts(size, layout, case, others, tmp_path):
    """Losses, gradients, their norm, loads, updated weights, samples and checkpoints of ranks are
    those of one process that computes a prompt for each response, with unequal lengths and a rank
    without work; what they saved, other numbers of ranks go on from."""
    make_parity.write_checkpoint(tmp_path / "start", make_parity.CONFIGS[case])
    spawn(size, compare, tmp_path / "start", layout, tmp_path)
    for ranks, other in others:
        spawn(ranks, resume, tmp_path / "start", other, tmp_path)


def islands(rank, variables, path) -> None:
    """What test_numbers_islands asserts, on one rank."""
    seen, exact = [], load_model(path).state_dict()
    with enter(rank, variables, {"dtype": "bfloat16", "checkpoint_blocks": True}) as dist:
        model = placing.load(path, dist)

        def look(module, args) -> None:
            names = {Router: ("weight",), Mamba2: ("A_log", "D", "dt_bias")}[type(module)]
            for name in names:
                kept = exact[f"{places[module]}.{name}"]
                assert getattr(module, name).equal(kept), name
                assert not kept.bfloat16().float().equal(kept), f"{name} would not show a rounding"
            if isinstance(module, Mamba2):
                assert module.in_proj.weight.dtype == args[0].dtype == torch.bfloat16
            seen.append(type(module))

        places = {m: n for n, m in model.named_modules() if type(m) in (Router, Mamba2)}
        for module in places:
            module.register_forward_pre_hook(look)
        optimizer = make_optimizer(model, 1e-2, (0.9, 0.95), 0.0)
        sample(model, [0, 1], dist)
        sampled = len(seen)
        train(model, optimizer, dist, documents(1))
        assert {*seen[:sampled]} == {*seen[sampled:]} == {Router, Mamba2}
        assert all(p.dtype == torch.float32 for p in model.parameters())  # masters, and islands
        held = [x for s in optimizer.state.values() for x in s.values()]
        assert held and all(x.dtype == torch.float32 for x in held)


def test_numbers_islands(tmp_path):
    """Under the bf16 policy router, A_log, D and dt_bias keep their fp32 bits inside forward, of
    trainer and sampler alike, while products are of bf16; master weights and moments are fp32."""
    make_parity.write_checkpoint(tmp_path, make_parity.CONFIGS["nemotron_h-base"])
    spawn(1, islands, tmp_path)


def test_errors_layouts(tmp_path):
    """Ranks that do not divide, and experts that do not, are refused."""
    for words, layout in (
        ("4 ranks do not divide", {"expert_parallel": 3}),
        ("4 ranks do not divide", {"replicas": 8}),
    ):
        with pytest.raises(ValueError, match=words):
            Dist(0, 4, "cpu", **layout)
    model = SimpleNamespace(modules=list, blocks=[], named_parameters=list)
    with pytest.raises(ValueError, match="0 experts of .* do not divide into 2 x 2"):
        placing.parallelize(model, Dist(0, 4, "cpu", **SPREAD))


def anonymous() -> int:
    """Resident anonymous bytes of this process."""
    with open("/proc/self/status") as lines:
        return next(int(x.split()[1]) for x in lines if x.startswith("RssAnon")) * 1024


def load_large(rank, variables, path, layout, out) -> None:
    with enter(rank, variables, layout) as dist:
        before, most, done = anonymous(), [0], threading.Event()

        def watch() -> None:
            while not done.wait(0.002):
                most[0] = max(most[0], anonymous())

        watcher = threading.Thread(target=watch)
        watcher.start()
        model = placing.load(path, dist)
        done.set()
        watcher.join()
        held = sum(
            4 * (p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters()
        )
        found = dist.gather({"shard": held, "rise": most[0] - before, "end": anonymous() - before})
        if dist.is_main:
            out.write_text(json.dumps(found))


@nightly
@pytest.mark.parametrize("layout", [PLAIN, SPREAD], ids=["shard", "spread"])
def test_run_large_checkpoint(layout, tmp_path):
    """2 GiB of bf16 in 50 files load on four ranks in no more anonymous memory a rank than its fp32
    shard and 200 MiB above what it had."""
    config = make_parity.nemotron(
        vocab_size=32768,
        hidden_size=1024,
        hybrid_override_pattern="MEME*EME*E",
        head_dim=64,
        num_attention_heads=16,
        mamba_num_heads=32,
        mamba_head_dim=64,
        ssm_state_size=64,
        n_routed_experts=64,
        num_experts_per_tok=6,
        moe_intermediate_size=1456,
        moe_shared_expert_intermediate_size=1024,
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = Model(load_config(tmp_path))
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for p in (*model.parameters(), *model.buffers()):
            p.fill_(0.01)
    total = 2 * sum(p.numel() for p in model.parameters())
    save_model(model, tmp_path, dtype=torch.bfloat16, max_shard_bytes=total // 49)
    del model
    files = list(tmp_path.glob("model-*.safetensors"))
    size = sum(x.stat().st_size for x in files)
    assert 48 <= len(files) <= 52 and 1.9 * 2**30 < size < 2.1 * 2**30, (len(files), size)
    spawn(4, load_large, tmp_path, layout, tmp_path / "found.json")
    for x in json.loads((tmp_path / "found.json").read_text()):
        print({key: f"{n / 2**20:.0f} MiB" for key, n in x.items()})
        assert x["rise"] <= x["shard"] + (200 << 20) and x["end"] >= 0.9 * x["shard"], x
