"""The plan of a run against what runs hold: parameters, peaks of memory; the full settings."""

import re
from dataclasses import replace

import pytest
import torch
from fixtures.toy_runs import run_here, sft  # noqa: F401
from torch._subclasses.fake_tensor import FakeTensorMode

from nanocascade import stages
from nanocascade.checkpoint.hf_config import load_config
from nanocascade.engine.distributed import Dist, Layout
from nanocascade.engine.layout import parallelize
from nanocascade.model import scan
from nanocascade.model.logprobs import token_logprobs
from nanocascade.model.model import Model, ModelConfig
from nanocascade.plan import meter, plan, report, seconds
from nanocascade.run.settings import EvalSettings, RunSettings, read_settings
from nanocascade.sampler import generate

SMALL = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    pattern="MEM*E",
    head_dim=16,
    num_experts=16,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    shared_expert_intermediate_size=64,
    mamba_num_heads=8,
    mamba_head_dim=16,
    ssm_state_size=16,
    rope_theta=1e4,
)
PLAIN = Layout()
SHARDED = Layout(shard=True, dtype="bfloat16", checkpoint_blocks=True)
FULL = load_config(report.FULL)


@pytest.fixture
def node():
    with meter.imaginary_node():
        yield


@pytest.fixture
def cpu_node():
    with meter.imaginary_node(gpu=False):
        yield


@pytest.fixture
def short_spans(monkeypatch):
    """Traces of 3,072 tokens instead of 24,576: a few seconds instead of twenty."""
    monkeypatch.setattr(scan, "SPAN", 1024)
    monkeypatch.setattr(plan, "TRACED", (2048, 3072))


def full(recipe, stage):
    """The settings of a stage with --config full."""
    argv = ["--config", "full"] + (["--stage", stage] if recipe is stages.RL else [])
    return read_settings(recipe, argv=argv)


def planned(config, work, layout, ranks=8):
    """Bytes of a training step beyond weights and moments, by the plan."""
    found = plan.Plan(config, work, layout, ranks).bytes()["training"]
    return sum(found.values()) - found["weights"] - found["moments"]


def one_step(model, ids, segments=None):
    logprobs = token_logprobs(model(ids, segments=segments), model.head.weight, ids)[0]  # (b, t)
    logprobs.sum().backward()


@pytest.mark.parametrize("checkpoint_blocks", [False, True])
@pytest.mark.parametrize("rows, width", [(4, 256), (1, 2500)])
def test_parity_real_step(rows, width, checkpoint_blocks, cpu_node):
    """A second micro-batch with real tensors peaks where the plan says, or up to 17 % below."""
    model = Model(SMALL).reset_parameters(0)
    model = parallelize(model, Dist(checkpoint_blocks=checkpoint_blocks))
    ids = torch.zeros(rows, width, dtype=torch.long)  # (b, t)
    with meter.Meter() as real:
        for _ in range(2):
            one_step(model, ids, torch.zeros_like(ids))
    layout = Layout(checkpoint_blocks=checkpoint_blocks)
    found = planned(SMALL, plan.Work(width, width, rows * width, rows * width), layout, 1)
    assert 0.99 < found / real.peak < 1.2


def test_parity_real_rollout(cpu_node):
    """Sampling with real tensors peaks where the plan says, or up to a fifth on either side: caches
    of rows and of the prompts that are prefilled, and a prefill or a step."""
    model = Model(SMALL).reset_parameters(0)
    prompts = [[1 + i] * 192 for i in range(8)]  # three chunks of the scan, without padding
    with meter.Meter() as real:
        generate(model, prompts, max_new_tokens=8, max_rows=8)
    work = plan.Work(200, 192, 256, 256)
    found = plan.Plan(SMALL, work, PLAIN, 1).sampling(plan.Sampling(8, 192, 8))
    assert 0.8 < (found["kept"] + found["block"]) / real.peak < 1.2


def trace_whole(config, layout, width):
    """(parameters of rank 0, peak beyond weights) of two micro-batches of a model on 8 ranks."""
    dist = meter.ImaginaryDist(layout)
    with torch.device("meta"):
        model = parallelize(Model(config), dist)
    ids = torch.zeros(1, width, dtype=torch.long)  # (b, t)
    context = meter.packed_rows(config, ids, dist.dtype)
    model.context = lambda *_: context
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        with meter.Meter(dist.busiest_pairs(config, width)) as whole:
            for _ in range(2):
                one_step(model, ids)
    locals_ = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    return sum(p.numel() for p in locals_), whole.peak


@pytest.mark.parametrize("expert_parallel", [1, 8])
def test_parity_sharded_step(expert_parallel, node):
    """The whole sharded model, traced, has the plan's parameters a rank, and its peak or less."""
    layout = replace(SHARDED, expert_parallel=expert_parallel)
    work = plan.Work(512, 512, 512, 8 * 512)
    parameters, peak = trace_whole(SMALL, layout, 512)
    assert parameters == plan.Plan(SMALL, work, layout, 8).parameters.local
    assert 0.99 < planned(SMALL, work, layout) / peak < 1.2


@pytest.mark.nightly
@pytest.mark.parametrize("ranks, name", [(8, "H200"), (16, "H100")])
def test_numbers_49k(ranks, name, node):
    """A stage of 49K tokens fits on 8 x 141 GB and on 16 x 80 GB, training and rollout."""
    found = report.plan_of(*full(stages.RL, "if_rl"), FULL, ranks, report.PROMPT)
    assert found.peak() < plan.usable(seconds.HARDWARE[name].memory)


@pytest.mark.nightly
def test_parity_sharded_30b(node):
    """So has the 30B model, 8 experts' ranks, of which all is traced here (minutes)."""
    layout, work = replace(SHARDED, expert_parallel=8), plan.Work(2048, 2048, 2048, 8 * 2048)
    parameters, peak = trace_whole(FULL, layout, 2048)
    assert parameters == plan.Plan(FULL, work, layout, 8).parameters.local
    assert 0.99 < planned(FULL, work, layout) / peak < 1.2


def test_numbers_parallel(node):
    """A parameter costs 4 bytes of weight, 4 of gradient and 8 of moments; of 8 ranks each has an
    eighth, but for router, A_log, D and dt_bias, which are whole on all of them."""
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in Model(SMALL).named_parameters()}
    total = sum(sizes.values())
    islands = sum(n for x, n in sizes.items() if re.search(r"gate\.weight|A_log|\.D$|dt_bias", x))
    work = plan.Work(256, 256, 256, 2048)
    alone = plan.Plan(SMALL, work, PLAIN, 1).bytes()["training"]
    alone = [alone[x] for x in ("weights", "gradients", "moments")]
    assert alone == [4 * total, 4 * total, 8 * total]
    layout = replace(SHARDED, offload_optimizer=True)
    phases = plan.Plan(SMALL, replace(work, frozen=3), layout, 8).bytes()
    mine = (total - islands) / 8 + islands
    assert phases["training"]["weights"] == 4 * mine and phases["training"]["moments"] == 0
    assert phases["host"] == {"moments": 8 * mine, "frozen": 3 * 2 * total / 8, "kept": 0}
    assert phases["training"]["frozen"] == 2 * total / 8  # one teacher at a time


@pytest.mark.parametrize("layout", [PLAIN, SHARDED])
@pytest.mark.parametrize("width", [64, 66])
def test_numbers_decoding(width, layout, node):
    """A step of decoding is planned in fp32 and bf16: it reads rotary tables where there are some,
    and the weights of experts of any width."""

    def touched(kind, **changes):
        found = meter.trace_decoding(replace(SMALL, **changes), kind, layout, 8, 64)
        return sum(x for _, x in found.operations)

    assert touched("*") > touched("*", rope_theta=None)
    assert touched("E", moe_intermediate_size=width) > touched("E", moe_intermediate_size=32)


def test_numbers_cache(node):
    """The 30B model's row at 49,152 tokens: 6,144 bytes a token and 49 MB of state; 11.7 GB of
    bf16 weights a rank at 8 ranks of experts (Nemotron 3 Nano, config.json)."""
    work = plan.Work(49152, 49152, 49152, 1e6)
    found = plan.Plan(FULL, work, replace(SHARDED, expert_parallel=8), 8)
    found.traced = lambda *_: meter.Trace(0, 0, [])
    found = found.sampling(plan.Sampling(1, 48152, 1000))
    assert found["kept"] - 16 * 1000 == pytest.approx(6144 * 49153 + 49e6, rel=2e-3)
    assert found["gathered"] == pytest.approx(11.73e9, rel=1e-3)


REPORT = {  # PAPER.md's table: prompts, rollouts, tokens, total tokens, steps, top-p, filter, KL
    "if_rl": (128, 16, 49152, 0, 180, 1.0, "penalty", 0.0),
    "multi_domain_rl": (128, 16, 49152, 0, 70, 1.0, "filter", 0.0),
    "rlhf": (128, 16, 16384, 0, 25, 1.0, "penalty", 0.03),
    "long_context_rl": (128, 16, 49152, 49152, 30, 1.0, "penalty", 0.0),
    "code_rl": (128, 16, 118784, 0, 22, 0.95, "filter", 0.0),
    "swe_rl": (128, 16, 98304, 98304, 45, 1.0, "penalty", 0.0),
}


def test_numbers_settings():
    """The full settings are the report's (our choice where it prints two), stage by stage."""
    for name, row in REPORT.items():
        x = full(stages.RL, name)[0]
        assert row == (
            x.prompts,
            x.rollouts,
            x.max_new_tokens,
            x.max_tokens,
            x.steps,
            x.top_p,
            x.overlong,
            x.kl_coef,
        ), name
        assert (x.lr, x.schedule, x.temperature) == (3e-6, "constant", 1.0)
        assert x.dynamic_filtering == (name == "if_rl")
    agentic = full(stages.RL, "swe_agentic_rl")[0]
    assert (agentic.prompts, agentic.rollouts, agentic.max_turns) == (16, 64, 200)
    assert (agentic.lr, agentic.min_lr, agentic.warmup) == (3e-6, 0.0, 10)
    assert (agentic.temperature, agentic.schedule) == (0.8, "linear")
    stage, mopd = full(stages.SFT, "sft")[0], full(stages.MOPD, "mopd")[0]
    assert (mopd.prompts, mopd.rollouts, mopd.max_new_tokens, mopd.steps) == (128, 4, 98304, 52)
    assert (mopd.lr, mopd.warmup, mopd.warmup_from, mopd.betas) == (2e-6, 30, 2e-7, (0.9, 0.95))
    assert (mopd.gate, mopd.gate_low, mopd.gate_high) == ("zero", 0.5, 2.0)
    assert (stage.batch_tokens, stage.row_tokens, stage.steps) == (64 * 262144, 262144, 33000)
    assert (stage.lr, stage.min_lr, stage.warmup, stage.schedule_steps) == (5e-5, 5e-6, 200, 40000)
    assert (stage.betas, stage.weight_decay, stage.strip_thinking) == ((0.9, 0.98), 0.1, 0.1)


@pytest.mark.parametrize("max_rows, prompts, rows", [(50, 128, 48), (9, 128, 8), (112, 9, 32)])
def test_numbers_rows(max_rows, prompts, rows):
    """Of 16 rollouts a prompt, on 8 ranks: whole groups, equal parts of one, or all that there are,
    as the sampler decodes them."""
    recipe = stages.RL(steps=1, lr=0.0, prompts=prompts, rollouts=16, max_new_tokens=64)
    run = RunSettings(micro_tokens=256, max_rows=max_rows)
    work = plan.work_of(recipe, run, EvalSettings(), FULL, 8, report.PROMPT)
    assert work.sampling["rollout"].rows == rows


def test_run_dry_full(short_spans, monkeypatch, capsys):
    """The 30B-A3B on 8 H200: 31,577,937,344 parameters, 3.58 B active, with neither checkpoint nor
    data; the plan's parts add up to its sums, and a stage of 49K tokens fits."""
    run_here(
        monkeypatch,
        "train_rl.py",
        "--stage",
        "if_rl",
        "--config",
        "full",
        "--dry_run",
        "--cluster",
        "8xH200",
    )
    out = capsys.readouterr().out
    assert "parameters: 31,577,937,344 in all, 3,580,073,408 active a token" in out
    for phase in ("training", "rollout", "host"):
        *parts, total = map(float, re.search(rf"^{phase} +(.*)$", out, re.M)[1].split())
        assert sum(parts) == pytest.approx(total, abs=0.01)
    longest = re.search(r"^fits; documents of up to ([\d,]+) tokens would", out, re.M)[1]
    assert int(longest.replace(",", "")) > 49152 + report.PROMPT


def test_run_dry_refused(short_spans, monkeypatch, capsys):
    """Where a layout does not fit, the message names one that does: it is taken at its word."""
    short = ("--row_tokens", 1024, "--micro_tokens", 1024)
    script = ("train_sft.py", "--config", "full", "--dry_run", *short, "--cluster")
    with pytest.raises(SystemExit):
        run_here(
            monkeypatch, *script, "4xH100", "--offload_optimizer", "false", "--expert_parallel", 4
        )
    line = capsys.readouterr().err
    named = re.search(r"more than the 80 GB of H100; (\d+) x H100 with (.*) hold it", line)
    ranks, flags = named.groups()
    run_here(monkeypatch, *script, f"{ranks}xH100", *flags.split())
    assert "fits; " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_here(monkeypatch, *script[:-1])
    assert "--expert_parallel 8 --replicas 1 needs --cluster" in capsys.readouterr().err
    for wrong in ("8xA1", "H100", "0xH100"):
        with pytest.raises(SystemExit):
            run_here(monkeypatch, *script, wrong)
        assert f"--cluster {wrong}: expected" in capsys.readouterr().err


def test_numbers_evaluation(node):
    """Evaluations decode up to max_rows rows of one response each, as long as their own limit or
    the stage's; the plan counts their caches, and the phase may be the worst."""
    recipe = stages.RL(steps=1, lr=0.0, prompts=2, rollouts=4, max_new_tokens=64)
    run, evaluation = RunSettings(micro_tokens=256), EvalSettings(("x",), 300, 200, 32)
    work = plan.work_of(recipe, run, evaluation, SMALL, 1, 100)
    assert work.sampling["rollout"] == plan.Sampling(8, 100, 64)
    assert work.sampling["evaluation"] == plan.Sampling(300, 100, 64)
    phases = plan.Plan(SMALL, work, PLAIN, 1).bytes()
    row = 2 * 2 * 16 * 4 * 165  # keys and values of a slot, fp32: two heads of 16
    few, many = (phases[x]["kept"] for x in ("rollout", "evaluation"))
    assert many / 300 == few / 8  # a row costs the same
    assert many > 300 * row and sum(phases["evaluation"].values()) > sum(phases["rollout"].values())
    work = plan.work_of(recipe, run, EvalSettings(), SMALL, 1, 100)
    assert work.sampling.keys() == {"rollout"}


def test_numbers_lora(node):
    """Adapters of rank 2 on the q, k, v, o, in and out projections and the shared expert: the base
    in the dtype of products, gradients and moments of the adapters only."""
    work = plan.Work(256, 256, 256, 2048, frozen=1)
    found = plan.Plan(SMALL, work, Layout(dtype="bfloat16"), 1, lora_rank=2)
    attention = 2 * (64 + 64) + 2 * (64 + 32)  # q and o; k and v
    mamba = 64 + (128 + 160 + 8) + 128 + 64
    adapters = 2 * (attention + 2 * mamba + 2 * 2 * (64 + 64))
    training = found.bytes()["training"]
    assert found.parameters.trained == adapters
    assert training["weights"] == 2 * found.parameters.total + 4 * adapters
    assert (training["gradients"], training["moments"]) == (4 * adapters, 8 * adapters)
    assert training["frozen"] == 0  # the reference shares the base


def test_invariance_fitting(cpu_node):
    """What is chosen for a memory fits it, less memory raises no micro-batch unless blocks are
    recomputed, the least needs moments in host memory too, and where nothing fits, nothing is
    chosen."""
    work = plan.Work(256, 256, 4096, 4096, 64, sampling={"rollout": plan.Sampling(64, 192, 64)})
    planned = plan.Plan(SMALL, work, PLAIN, 1)
    least, before = planned.parameters.local * 8, (4096, 1 << 30)
    seen = set()
    for memory in (1e9, 4e7, 2e7, 1e7, 6e6, 4e6, least):
        if found := report.fitting(planned, memory, report.ONE_DEVICE):
            micro, rows, changes = found
            assert micro <= before[0] or "checkpoint_blocks" in changes
            chosen = replace(planned, layout=Layout(**changes)).with_work(micro=micro)
            assert chosen.with_rows(min(rows, 64)).peak() <= plan.usable(memory)
            before = micro, rows
        seen.add(None if found is None else tuple(found[2]))
    assert {None, (), ("checkpoint_blocks", "offload_optimizer")} <= seen


def test_numbers_verdicts():
    """A step of 2,048 programs on 8 cores, at 70 a second and core; of RLHF 128 x 120 pairs, each
    2 seconds of a judge, one after the other. MOPD and SFT wait for neither."""
    code, rlhf = (full(stages.RL, x)[0] for x in ("code_rl", "rlhf"))
    assert seconds.verdict_seconds(code, 8, 2.0) == {"programs": 2048 / (8 * 70.0)}
    assert seconds.verdict_seconds(rlhf, 8, 2.0) == {"judge": 128 * 120 * 2.0}
    assert seconds.verdict_seconds(rlhf, 8, 0.0) == {}
    assert seconds.verdict_seconds(full(stages.MOPD, "mopd")[0], 8, 2.0) == {}


def test_run_dry_code(short_spans, monkeypatch, capsys):
    """A dry run of code RL names the seconds of its programs and the largest part of a step."""
    script = ("train_rl.py", "--stage", "code_rl", "--config", "full", "--dry_run")
    short = ("--max_new_tokens", 1024, "--micro_tokens", 2048, "--cluster", "8xH200")
    run_here(monkeypatch, *script, *short)
    out = capsys.readouterr().out
    assert re.search(r"predicted: rollout [\d.,]+, training [\d.,]+, programs [\d.,]+\n", out)
    assert re.search(r"its largest part is (rollout|programs|training)\n", out)


def test_run_dry_memory(sft, monkeypatch, capsys):  # noqa: F811
    """--memory_gb lowers what --dry_run prints, and a device that holds nothing is refused."""
    script = ("train_rl.py", "--config", "small", "--init", sft, "--dry_run", "--memory_gb")
    run_here(monkeypatch, *script, 0.25)
    out = capsys.readouterr().out
    found = re.match(r"fits 0.25 GB with --micro_tokens (\d+) --max_rows (\d+)", out)
    micro, rows = map(int, found.groups())
    assert f"micro_tokens         = {micro}\n" in out and f"max_rows             = {rows}\n" in out
    assert rows < 512 and "fits; documents" in out
    with pytest.raises(SystemExit):
        run_here(monkeypatch, *script, 0.01)
    assert "does not fit 0.01 GB" in capsys.readouterr().err
