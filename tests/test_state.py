"""A killed run goes on with the same bits, and only in its own directory."""

import os
import signal
import time

import pytest
import torch
from fixtures import make_parity

from nanocascade.checkpoint.state import check_out_dir, load_state, save_state, state_dirs
from nanocascade.checkpoint.weights import load_model
from nanocascade.model.moe import Routing, update_correction_bias


def train(model, optimizer, steps):
    for step in steps:
        ids = torch.randint(1, 32, (2, 9), generator=torch.Generator().manual_seed(step))
        routing = Routing(model.config.num_moe_layers)
        model.logits(model(ids, routing=routing)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if model.config.router == "sigmoid":
            load = routing.tokens_per_expert(
                torch.ones_like(ids, dtype=torch.bool), model.config.num_experts
            )
            update_correction_bias(model, load, 1e-2)


@pytest.mark.parametrize("case", ["nemotron_h-base", "qwen3-tied"])
def test_run_resume(case, tmp_path):
    """Weights, correction bias and moments come back so that later steps have the same bits."""
    make_parity.write_checkpoint(tmp_path / "model", make_parity.CONFIGS[case])

    def start():
        model = load_model(tmp_path / "model")
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)

    model, optimizer = start()
    assert load_state(tmp_path, model, optimizer) is None
    train(model, optimizer, range(3))
    save_state(tmp_path, model=model, optimizer=optimizer, extra={"step": 3, "cursor": [1, 2]})
    resumed, other = start()
    assert load_state(tmp_path, resumed, other) == {"step": 3, "cursor": [1, 2]}
    train(model, optimizer, range(3, 6))
    train(resumed, other, range(3, 6))
    expected = model.state_dict()
    assert all(x.equal(expected[name]) for name, x in resumed.state_dict().items())


def test_run_killed(tmp_path):
    """Killed at forty instants while saving, a run always has a whole state: the newest or the
    one before, never a mixture."""
    model = torch.nn.Linear(40, 40)
    optimizer = torch.optim.AdamW(model.parameters())
    began, last = time.monotonic(), 0
    save_state(tmp_path / "other", model=model, optimizer=optimizer, extra={})
    took = time.monotonic() - began
    for kill in range(40):
        before, child = state_dirs(tmp_path), os.fork()
        if child == 0:
            step = last
            while True:
                step += 1
                for parameter in model.parameters():
                    parameter.data.fill_(step)
                save_state(tmp_path, model=model, optimizer=optimizer, extra={"step": step})
        while kill % 2 and state_dirs(tmp_path) == before:
            time.sleep(0.001)  # every other one lives to save once
        time.sleep(took * kill / 20)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        extra = load_state(tmp_path, model, optimizer)
        step = extra["step"] if extra else 0
        assert step >= last and (not extra or all((p == step).all() for p in model.parameters()))
        last = step
    assert last > 10


def test_run_out_dir(tmp_path):
    """--out is refused before training when it holds another run or model, or cannot be written."""
    out, identity = tmp_path / "a" / "out", {"stage": "sft", "data": ("x",)}
    assert check_out_dir(out, False, identity) is False
    assert check_out_dir(out, False, identity) is False  # stopped before there was a state
    model = torch.nn.Linear(2, 2)
    save_state(out, model=model, optimizer=torch.optim.AdamW(model.parameters()), extra={})
    assert check_out_dir(out, True, identity) is True
    for resume, other, words in (
        (False, {}, "go on with --resume"),
        (True, {"stage": "mopd"}, "stage was 'sft' and is 'mopd'"),
    ):
        with pytest.raises(ValueError, match=words):
            check_out_dir(out, resume, identity | other)
    (out / "manifest.json").write_text("{}")
    make_parity.write_checkpoint(tmp_path / "model", make_parity.CONFIGS["llama-base"])
    for path, words in (
        (out, "finished run"),
        (tmp_path / "model", "not of this run"),
        (out / "manifest.json" / "x", "cannot be written"),
    ):
        with pytest.raises(ValueError, match=words):
            check_out_dir(path, True, identity)
