"""LoRA: exact at the start, exact when merged, as expressive as full training at full rank."""

import json

import pytest
import torch
from fixtures import toy_runs
from fixtures.toy_runs import run_here
from torch import nn

from nanocascade.checkpoint import load_model, save_model, state
from nanocascade.engine import frozen, lora
from nanocascade.model import Model, ModelConfig
from nanocascade.run import run as run_module

rows, skilled = toy_runs.rows, toy_runs.skilled  # fixtures
FAMILIES = {
    "nemotron_h": dict(pattern="M*E-", shared_expert_intermediate_size=64),
    "llama": dict(model_type="llama", pattern="*-*-", rope_theta=1e4, gated_mlp=True),
}
IDS = torch.arange(24).view(2, 12)


def make_model(family, seed=0, dtype=torch.float64):
    sizes = dict(hidden_size=32, head_dim=8, mamba_head_dim=8, intermediate_size=48)
    return Model(ModelConfig(**sizes, **FAMILIES[family])).reset_parameters(seed).to(dtype)


def logits(model):
    with torch.no_grad():
        return model.logits(model(IDS))


def disturb(model):
    """Adapters as after some steps: none of them zero."""
    torch.manual_seed(1)
    for x in lora.adapters_of(model).values():
        x.data += 0.1 * torch.randn_like(x)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_new_adapters_change_nothing(family):
    """B = 0: the same bits as the base; only adapters are trained, and each of them is reached."""
    model = make_model(family)
    before = logits(model)
    lora.add_adapters(model, 4, seed=0)
    assert torch.equal(logits(model), before)
    disturb(model)
    model.logits(model(IDS)).square().sum().backward()
    trained = {name for name, x in model.named_parameters() if x.grad is not None}
    assert trained == set(lora.adapters_of(model)) and len(trained) > 8
    assert all(x.grad.abs().max() > 0 for x in lora.adapters_of(model).values())


@pytest.mark.parametrize("family", FAMILIES)
def test_invariance_merged(family, tmp_path):
    """The merged model computes what base and adapters did, and is saved like any other."""
    model = disturb(lora.add_adapters(make_model(family), 4, seed=0))
    before = logits(model)
    assert (before - logits(make_model(family))).abs().max() > 1e-3
    lora.merge_adapters(model)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-9)
    save_model(model, tmp_path, dtype=torch.float32)
    loaded = load_model(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(logits(loaded), before, rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_is_full_training(family):
    """At full rank B A can be any change of W: from its singular vectors the adapters give the
    function of a model whose projections were changed freely."""
    changed, model = make_model(family, 1), make_model(family)
    pairs = zip(lora.layers_of(model, nn.Linear), lora.layers_of(changed, nn.Linear), strict=True)
    differences = [y.weight.data - x.weight.data for (_, _, x), (_, _, y) in pairs]
    others = {k: x for k, x in changed.state_dict().items() if k.split(".")[-2] not in lora.TARGETS}
    model.load_state_dict(others, strict=False)
    width = max(min(x.shape) for x in differences)
    lora.add_adapters(model, width, seed=0)
    for (_, _, layer), change in zip(
        lora.layers_of(model, lora.LoRALinear), differences, strict=True
    ):
        u, s, v = torch.linalg.svd(change / lora.ALPHA, full_matrices=False)
        layer.lora_a.data.zero_()[: len(s)] = v
        layer.lora_b.data.zero_()[:, : len(s)] = u * s
    torch.testing.assert_close(logits(model), logits(changed), rtol=0, atol=1e-9)


def test_adapters_take_turns(tmp_path):
    """A teacher that is adapters of the same base scores as its merged model does, and the
    student's own adapters are back afterwards; a base without adapters scores as itself."""
    base = make_model("llama", dtype=torch.float32)
    save_model(base, tmp_path / "base")
    teacher = disturb(lora.add_adapters(load_model(tmp_path / "base"), 4, seed=3))
    expected = logits(teacher)
    (tmp_path / "teacher").mkdir()
    lora.save_adapters(teacher, tmp_path / "teacher", tmp_path / "base", 4)
    assert lora.base_of(tmp_path / "teacher") == (tmp_path / "base").resolve()
    student = lora.add_adapters(load_model(tmp_path / "base"), 4, seed=5)
    before = logits(student)
    with lora.swapped_adapters(student, lora.read_adapters(student, tmp_path / "teacher")):
        torch.testing.assert_close(logits(student), expected)
    assert torch.equal(logits(student), before)
    with lora.swapped_adapters(disturb(student), lora.read_adapters(student, tmp_path / "base")):
        assert torch.equal(logits(student), before)
    other = lora.add_adapters(load_model(tmp_path / "base"), 2, seed=0)
    with pytest.raises(ValueError, match="--lora_rank 4"):
        lora.read_adapters(other, tmp_path / "teacher")
    save_model(make_model("llama", 9, torch.float32), tmp_path / "base")
    with pytest.raises(ValueError, match="does not hold the weights"):
        lora.base_of(tmp_path / "teacher")


def test_run_lora(skilled, rows, tmp_path, monkeypatch):
    """RL with adapters, cut off and resumed, leaves the bits of an uncut run: a merged model and
    its adapters. MOPD from there with both checkpoints as teachers holds one copy of the base; its
    first reverse KL to its own start is 0."""
    small = ("--lora_rank", 2, "--prompts", 4, "--rollouts", 4, "--eval_data", "", "--data", rows)
    rl = ("train_rl.py", "--stage", "if_rl", "--init", skilled, *small, "--max_new_tokens", 8)
    rl += ("--lr", 0.01, "--steps", 2, "--kl_coef", 0.1, "--dynamic_filtering", "false")
    run_here(monkeypatch, *rl, "--out", tmp_path / "whole", "--save_every", 1)
    real, saved = state.save_state, []

    def cut_off(*args, **kwargs):
        real(*args, **kwargs)
        saved.append(kwargs["extra"]["step"])
        raise SystemExit(0)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(run_module, "save_state", cut_off)
        run_here(monkeypatch, *rl, "--out", tmp_path / "cut", "--save_every", 1)
    run_here(monkeypatch, *rl, "--out", tmp_path / "cut", "--save_every", 1, "--resume")
    assert saved == [1]
    for file in ("model.safetensors", "adapters.safetensors"):
        whole, cut = ((tmp_path / x / file).read_bytes() for x in ("whole", "cut"))
        assert whole == cut, file
    base, merged = load_model(skilled), load_model(tmp_path / "whole")
    assert any(
        not torch.equal(x, y) for x, y in zip(base.parameters(), merged.parameters(), strict=True)
    )
    loads = []
    monkeypatch.setattr(frozen, "load_frozen", lambda *args: loads.append(args))
    teachers = f"if={tmp_path / 'whole'},mcqa={skilled}"
    mopd = ("train_mopd.py", "--init", tmp_path / "whole", "--teachers", teachers, *small)
    run_here(monkeypatch, *mopd, "--max_new_tokens", 8, "--steps", 1, "--out", tmp_path / "mopd")
    metrics = json.loads((tmp_path / "mopd/metrics.jsonl").read_text())
    assert not loads and abs(metrics["mopd/reverse_kl/if"]) < 1e-6
    assert abs(metrics["mopd/reverse_kl/mcqa"]) > 1e-6
