"""runs/small.sh, from a model directory to the report, on tiny random models of two families."""

import gzip
import json
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


def run_small(*words, **variables):
    environment = os.environ | {
        "NANOCASCADE_PYTHON_READY": "1",
        "PATH": str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"],
        "DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    command = ["bash", ROOT / "runs/small.sh", *words]
    return subprocess.run(command, env=environment | variables, capture_output=True, text=True)


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
    out = tmp_path / "out"
    done = run_small(tmp_path / "model", "--short", "--out", out, *flags)
    assert done.returncode == 0, done.stderr
    report = (out / "report.md").read_text()
    assert "| domain | sft | if_rl | choice_rl | mopd |" in report
    assert all(f"\n| {domain} | " in report for domain in ("if", "math", "mcqa", "structured"))
    stages = ("sft", "if_rl", "choice_rl", "mopd")
    assert all((out / stage / "model.safetensors").exists() for stage in stages)
    adapted = [(out / stage / "adapters.safetensors").exists() for stage in stages]
    assert adapted == [bool(flags)] * 4


def test_run_small_on_one_domain(tmp_path):
    """Rows of mathematics alone: the stages that have no rows are left out, MOPD too, whose only
    teacher would be the student; RL's own flags reach it. Rows of no stage end before training."""
    make_directory("nemotron_h", tmp_path / "model")
    rows = [{"question": f"What is {i} and 1?", "answer": str(i + 1)} for i in range(8)]
    texts = ["".join(json.dumps(x) + "\n" for x in part) for part in (rows[:6], rows[6:])]
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(texts[0].encode()))
    (tmp_path / "test.jsonl").write_text(texts[1])
    words = (tmp_path / "model", tmp_path, "--short", "--out", tmp_path / "out")
    done = run_small(*words, RL_FLAGS="--rollouts 3 --steps 1")
    assert done.returncode == 0, done.stderr
    assert [x.parent.name for x in (tmp_path / "out").glob("*/manifest.json")] == ["choice_rl"]
    assert [x in done.stdout for x in ("SFT is left out", "IF-RL is left out")] == [True, True]
    config = json.loads((tmp_path / "out/choice_rl/manifest.json").read_text())["config"]
    assert (config["rollouts"], config["steps"], config["domains"]) == (3, 1, ["math"])
    code = {"text": "Write one().", "code": "def one(): return 1", "test_list": ["assert one()"]}
    (tmp_path / "train.jsonl.gz").unlink()
    (tmp_path / "train.jsonl").write_text(json.dumps(code | {"task_id": 1}) + "\n")
    done = run_small(*words[:-1], tmp_path / "other")
    assert done.returncode == 2 and "no rows of if, math or mcqa" in done.stderr


def test_wrong_words_end_before_training(tmp_path):
    """A wrong flag of a late stage ends the run before the first; paths that do not exist are
    named; --out=DIR is --out DIR."""
    make_directory("nemotron_h", tmp_path / "model")
    words = (tmp_path / "model", "--short", f"--out={tmp_path / 'out'}")
    done = run_small(*words, MOPD_FLAGS="--rolouts 2")
    assert (done.returncode, "unknown flag --rolouts" in done.stderr) == (2, True)
    assert [x.name for x in (tmp_path / "out").iterdir()] == ["rows"]
    rows = {"x": "chats without an expected answer", "y": "train.jsonl:1: bad row: no final answer"}
    for name, words in rows.items():
        (tmp_path / name).mkdir()
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
        row = (
            {"messages": turns}
            if name == "x"
            else {"question": "Why?", "answer": "Because so. " * 9}
        )
        (tmp_path / name / "train.jsonl").write_text(json.dumps(row))
        done = run_small(tmp_path / "model", tmp_path / name, "--out", tmp_path / "out")
        assert done.returncode == 2 and words in done.stderr
    for words in ((tmp_path / "nodir",), (tmp_path / "model", tmp_path / "nodir")):
        done = run_small(*words)
        assert done.returncode == 2 and f"{tmp_path / 'nodir'}" in done.stderr
        assert done.stderr.count("\n") == 1
