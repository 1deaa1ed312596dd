"""Two processes over gloo compute what one does, however the work falls to them."""

import json

import pytest
import torch
from fixtures import toy_runs
from fixtures.toy_runs import environments, lasting, run_here, start

from nanocascade import distributed
from nanocascade.checkpoint import load_model
from nanocascade.run import RunConfig

rows, sft, skilled = toy_runs.rows, toy_runs.sft, toy_runs.skilled  # fixtures
RL = ("train_rl.py", "--init", "SKILLED", "--data", "ROWS", "--rollouts", 4, "--stage")
MOPD = ("train_mopd.py", "--init", "SKILLED", "--rollouts", 2, "--toy_rows", 20,
        "--teachers", "multi_domain=SFT,preference=SFT",
        "--domains", "mcqa,preference")
CASES = {
    "sft": ("train_sft.py", "--data", "ROWS", "--batch_tokens", 700, "--warmup", 1, "--lr", 3e-4,
            "--eval_data", "ROWS", "--eval_samples", 3),
    "if_rl": (*RL, "if_rl", "--prompts", 5),
    "mopd": (*MOPD, "--prompts", 5),
    "idle": (*RL, "multi_domain_rl", "--prompts", 1),  # the second process has no group at all
    "idle_sft": ("train_sft.py", "--data", "ROWS", "--batch_tokens", 1, "--warmup", 1),
    "idle_mopd": (*MOPD, "--prompts", 1),
}  # fmt: skip


def collectives(rank: int, variables: list[dict]) -> None:
    """One of two processes; an assertion that fails here fails the test."""
    with pytest.MonkeyPatch.context() as patch:
        for name, x in variables[rank].items():
            patch.setenv(name, x)
        with distributed.start(RunConfig(device="cpu")) as dist:
            assert (dist.rank, dist.world_size, dist.is_main) == (rank, 2, rank == 0)
            assert dist.shard([10, 11, 12]) == [[10, 12], [11]][rank] and dist.shard([]) == []
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
    with distributed.start(RunConfig(device="cpu")) as alone:
        assert alone.is_main and alone.shard([1, 2]) == [1, 2] and alone.gather(3) == [3]
        assert alone.sum(4) == 4 and alone.barrier() is None


@pytest.mark.parametrize(
    "case", [pytest.param(x, marks=[pytest.mark.nightly][: i > 3]) for i, x in enumerate(CASES)]
)
def test_invariance_ranks(case, skilled, sft, rows, tmp_path, monkeypatch):
    """Two steps of two processes log the metrics of one and end at its weights, also where
    responses are of unequal length, work is uneven, or one of them has nothing to do.

    Weights are compared tensor by tensor: where a gradient is last-bit noise around 0, Adam makes
    a visible step of it in single elements."""
    script, *args = CASES[case]
    for name, path in {"SKILLED": skilled, "SFT": sft, "ROWS": rows}.items():
        args = [str(x).replace(name, str(path)) for x in args]
    args = ["--steps", 2, "--eval_data", "", *args, "--out"]
    running = [start(script, *args, tmp_path / "two", env=x) for x in environments(2)]
    run_here(monkeypatch, script, *args, tmp_path / "one")
    for process in running:
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors
    one, two = tmp_path / "one", tmp_path / "two"

    pairs = zip(*((x / "metrics.jsonl").open() for x in (one, two)), strict=True)
    for expected, found in (map(json.loads, pair) for pair in pairs):
        assert expected.keys() == found.keys() and len(found["memory/peak_gib"]) == 2
        for name in lasting(expected):
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=2e-6), name
        assert found["grad_norm"] > 0 or case.startswith("idle")
    weights = load_model(one).state_dict()
    for name, x in load_model(two).state_dict().items():
        assert (x - weights[name]).norm() <= 1e-5 * weights[name].norm(), name
    manifests = [json.loads((x / "manifest.json").read_text()) for x in (one, two)]
    assert manifests[0]["evaluation"] == manifests[1]["evaluation"]
