"""Two processes over gloo compute what one does, however the work falls to them."""

import json
import signal
import time

import pytest
import torch
from fixtures import dying, toy_runs
from fixtures.toy_runs import environments, lasting, run_here, start

from nanocascade.checkpoint.weights import load_model
from nanocascade.engine import distributed

rows, sft, skilled = toy_runs.rows, toy_runs.sft, toy_runs.skilled  # fixtures
RL = ("train_rl.py", "--init", "SKILLED", "--data", "ROWS", "--rollouts", 4, "--stage")
MOPD = (
    "train_mopd.py",
    "--init",
    "SKILLED",
    "--rollouts",
    2,
    "--toy_rows",
    20,
    "--teachers",
    "multi_domain=SFT,preference=SFT",
    "--domains",
    "mcqa,preference",
)
CASES = {
    "sft": (
        "train_sft.py",
        "--data",
        "ROWS",
        "--batch_tokens",
        700,
        "--warmup",
        1,
        "--lr",
        3e-4,
        "--eval_data",
        "ROWS",
        "--eval_samples",
        3,
    ),
    "if_rl": (*RL, "if_rl", "--prompts", 5),
    "mopd": (*MOPD, "--prompts", 5),
    "idle": (*RL, "multi_domain_rl", "--prompts", 1),  # the second process has no group at all
    "idle_sft": ("train_sft.py", "--data", "ROWS", "--batch_tokens", 1, "--warmup", 1),
    "idle_mopd": (*MOPD, "--prompts", 1),
    "tools": (*RL, "multi_domain_rl", "--data", "toy", "--toy_rows", 20, "--prompts", 9),
    "rlhf": (*RL, "rlhf", "--data", "toy", "--toy_rows", 20, "--prompts", 5),
}


def collectives(rank: int, variables: list[dict]) -> None:
    """One of two processes; an assertion that fails here fails the test."""
    with pytest.MonkeyPatch.context() as patch:
        for name, x in variables[rank].items():
            patch.setenv(name, x)
        with distributed.start("cpu") as dist:
            assert (dist.rank, dist.world_size, dist.is_main) == (rank, 2, rank == 0)
            assert dist.shard([10, 11, 12]) == [[10, 12], [11]][rank] and dist.shard([]) == []
            assert dist.shard([1, 7, 6, 2, 9], size=int) == [[1, 6, 9], [7, 2]][rank]
            total = dist.sum(rank + 3)
            assert total == 7 and isinstance(total, int) and dist.sum(rank + 0.5) == 2.0
            mine = torch.tensor([rank, 2])
            assert dist.sum(mine).tolist() == [1, 4] and mine.tolist() == [rank, 2]
            assert dist.gather({"a": [rank] * rank}) == [{"a": []}, {"a": [1]}]
            model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(1, 1))
            model[1].weight.requires_grad_(False)  # as a frozen router's
            model[0].weight.grad = torch.tensor([[1.0 + rank, 5.0]])
            if rank:  # the first process had no token that reached it
                model[1].bias.grad = torch.tensor([4.0])
            dist.sum_gradients(model)
            assert model[0].weight.grad.tolist() == [[3.0, 10.0]]
            assert model[1].bias.grad.tolist() == [4.0] and model[1].weight.grad is None
            dist.barrier()


def test_invariance_collectives():
    """Shares, sums, gathered objects and gradients of two processes; a gradient nobody has counts
    as zero, and what is frozen stays without one."""
    torch.multiprocessing.spawn(collectives, args=(environments(2),), nprocs=2)
    with distributed.start("cpu") as alone:
        assert alone.is_main and alone.shard([1, 2]) == [1, 2] and alone.gather(3) == [3]
        assert alone.sum(4) == 4 and alone.barrier() is None


SPREAD = ("--expert_parallel", 2)
RUNS = [("sft", 2, ()), ("if_rl", 2, SPREAD), ("mopd", 2, ("--shard",))]
RUNS += [
    pytest.param(case, ranks, flags, marks=pytest.mark.nightly)
    for case, ranks, flags in (
        ("if_rl", 2, ()),
        ("mopd", 2, ()),
        ("idle", 2, ()),
        ("idle_sft", 2, ()),
        ("idle_mopd", 2, ()),
        ("sft", 2, ("--shard",)),
        ("if_rl", 2, ("--shard",)),
        ("sft", 2, SPREAD),
        ("mopd", 2, SPREAD),
        ("sft", 4, SPREAD),
        ("if_rl", 4, SPREAD),
        ("mopd", 4, SPREAD),
        ("idle", 4, SPREAD),
        ("idle_sft", 2, SPREAD),
        ("idle_mopd", 2, SPREAD),
        ("tools", 2, SPREAD),
        ("rlhf", 4, (*SPREAD, "--replicas", 2, "--checkpoint_blocks", "--offload_optimizer")),
    )
]


def ended(running) -> None:
    """All processes have come to a good end."""
    for process in running:
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors


@pytest.mark.parametrize("case, ranks, flags", RUNS)
def test_invariance_ranks(case, ranks, flags, skilled, sft, rows, tmp_path, monkeypatch):
    """Two steps of several processes log the metrics of one and end at its weights, also where
    responses are of unequal length, work is uneven, or one of them has nothing to do; plain, in
    shards (FSDP), or with each expert on one of two ranks, and of four, these in shards.

    Weights are compared tensor by tensor, but for one element in 10,000: where a gradient is
    last-bit noise around 0, Adam makes up to a whole step of it, of either sign."""
    script, *args = CASES[case]
    for name, path in {"SKILLED": skilled, "SFT": sft, "ROWS": rows}.items():
        args = [str(x).replace(name, str(path)) for x in args]
    args = ["--steps", 2, "--eval_data", "", *args, "--out"]
    running = [start(script, *args, tmp_path / "two", *flags, env=x) for x in environments(ranks)]
    run_here(monkeypatch, script, *args, tmp_path / "one")
    ended(running)
    one, two = tmp_path / "one", tmp_path / "two"

    pairs = zip(*((x / "metrics.jsonl").open() for x in (one, two)), strict=True)
    for expected, found in (map(json.loads, pair) for pair in pairs):
        assert expected.keys() == found.keys() and len(found["memory/peak_gib"]) == ranks
        for name in lasting(expected):
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=2e-6), name
        assert found["grad_norm"] > 0 or case.startswith("idle")
    manifests = [json.loads((x / "manifest.json").read_text()) for x in (one, two)]
    opposite_steps = 2 * 2 * manifests[0]["config"]["lr"]
    weights = load_model(one).state_dict()
    for name, x in load_model(two).state_dict().items():
        apart = (x - weights[name]).abs().flatten().sort().values
        alike = apart[: len(apart) - len(apart) // 10_000]
        assert alike.norm() <= 1e-5 * weights[name].norm(), name
        assert apart[-1] <= opposite_steps, name
    assert manifests[0]["evaluation"] == manifests[1]["evaluation"]


LONG = (*RL, "if_rl", "--prompts", 5, "--steps", 4, "--save_every", 1, "--eval_data", "")


@pytest.fixture(scope="module")
def long_run(skilled, rows, tmp_path_factory):
    """long_run(ranks): the command line of a run of four steps, and what it leaves if let be."""
    done = {}

    def whole(ranks: int):
        paths = {"SKILLED": skilled, "ROWS": rows}
        args = [str(paths.get(x, x)) for x in (*LONG, *SPREAD)]
        if ranks not in done:
            done[ranks] = tmp_path_factory.mktemp("whole") / "out"
            ended([start(*args, "--out", done[ranks], env=x) for x in environments(ranks)])
        return args, done[ranks]

    return whole


def resumed_equal(args, out, whole, ranks: int) -> None:
    """Resumed on as many ranks, the run in `out` leaves the bits of `whole`."""
    assert not (out / "manifest.json").exists() and not (out / "model.safetensors").exists()
    ended([start(*args, "--out", out, "--resume", env=x) for x in environments(ranks)])
    for name in ("model.safetensors", "rollouts.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    lines = [[lasting(json.loads(x)) for x in (y / "metrics.jsonl").open()] for y in (out, whole)]
    assert lines[0] == lines[1] and len(lines[0]) == 4


@pytest.mark.parametrize(
    "phase, ranks",
    [("training", 2)] + [pytest.param(x, 4, marks=pytest.mark.nightly) for x in dying.PHASES],
)
def test_run_killed_rank(phase, ranks, long_run, tmp_path):
    """One rank dies in its second step: the others end within 60 s in one line, nothing that
    is half written counts, and the resumed run has the bits of one left alone."""
    args, whole = long_run(ranks)
    running = [
        start("tests/fixtures/dying.py", phase, *args, "--out", tmp_path, env=x)
        for x in environments(ranks)
    ]
    assert running[1].wait() == -signal.SIGKILL
    died = time.monotonic()
    for process in running[:1] + running[2:]:
        errors = process.communicate(timeout=60 - (time.monotonic() - died))[1]
        assert process.returncode == 2 and "another process" in errors, errors
    print(f"{phase}: {time.monotonic() - died:.1f} s until the others had ended")
    assert [x.name for x in tmp_path.glob("state/[0-9]*")] == ["0"]
    resumed_equal(args, tmp_path, whole, ranks)


def test_run_preempted(long_run, tmp_path):
    """SIGTERM to one rank: all finish the step, save and exit 0; the resumed run has the bits of
    one left alone."""
    args, whole = long_run(2)
    running = [start(*args, "--out", tmp_path, env=x) for x in environments(2)]
    while not list(tmp_path.glob("state/[0-9]*")):
        assert running[0].poll() is None, running[0].communicate()[1]
        time.sleep(0.002)
    running[1].terminate()
    ended(running)
    saved = len((tmp_path / "metrics.jsonl").read_text().splitlines())
    assert saved < 4 and [x.name for x in tmp_path.glob("state/[0-9]*")] == [str(saved - 1)]
    resumed_equal(args, tmp_path, whole, 2)
