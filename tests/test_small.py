"""runs/small.sh, from a model directory to the report, on tiny random models of two families."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanocascade.checkpoint import save_model
from nanocascade.model import Model, ModelConfig
from nanocascade.tokenizer import Tokenizer
from nanocascade.toy.start import build_toy_tokenizer

ROOT = Path(__file__).parents[1]
FAMILIES = {
    "nemotron_h": dict(pattern="ME*-"),
    "qwen3_moe": dict(
        model_type="qwen3_moe",
        pattern="*E*E",
        rope_theta=1e4,
        qk_norm=True,
        gated_mlp=True,
        router="softmax",
        norm_weight_in_fp32=False,
    ),
}


def make_directory(family, path):
    """A random model of 100,000 parameters whose tokenizer has a token for every byte."""
    build_toy_tokenizer(path)
    tokenizer = Tokenizer(path)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        head_dim=8,
        mamba_head_dim=8,
        moe_intermediate_size=32,
        max_position_embeddings=2048,
        eos_token_ids=tuple(tokenizer.eos_ids),
        **FAMILIES[family],
    )
    save_model(Model(config).reset_parameters(0), path, tokenizer)


@pytest.mark.parametrize(
    "family, flags",
    [
        ("nemotron_h", ()),
        ("qwen3_moe", ("--lora_rank", "2")),
        pytest.param("nemotron_h", ("--lora_rank", "2"), marks=pytest.mark.nightly),
        pytest.param("qwen3_moe", (), marks=pytest.mark.nightly),
    ],
)
def test_run_small(family, flags, tmp_path):
    """Every stage runs, each from the one before it; the report has their scores; with adapters all
    stages share the first base."""
    make_directory(family, tmp_path / "model")
    out, path = tmp_path / "out", str(Path(sys.executable).parent)
    environment = os.environ | {
        "NANOCASCADE_PYTHON_READY": "1",
        "PATH": path + os.pathsep + os.environ["PATH"],
        "DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    command = ["bash", ROOT / "runs/small.sh", tmp_path / "model", "--short", "--out", out, *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = (out / "report.md").read_text()
    assert "| domain | sft | if_rl | choice_rl | mopd |" in report
    assert all(f"\n| {domain} | " in report for domain in ("if", "math", "mcqa", "structured"))
    stages = ("sft", "if_rl", "choice_rl", "mopd")
    assert all((out / stage / "model.safetensors").exists() for stage in stages)
    adapted = [(out / stage / "adapters.safetensors").exists() for stage in stages]
    assert adapted == [bool(flags)] * 4
