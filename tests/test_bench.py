"""The benchmarks run, and compare the same work; how fast anything is, no test decides."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu_common import Finding, below

nightly = pytest.mark.nightly
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "name, needs, flags, lines",
    [
        ("rollout", "transformers", ("--shapes", "rl", "decode"), 4),
        ("train_step", "transformers", ("--shapes", "unequal"), 1),
        ("grpo_step", "trl", ("--shapes", "unequal"), 4),
        ("growth", "matplotlib", (), 0),
    ],
)
def test_run_bench(name, needs, flags, lines, tmp_path):
    """The short form ends well: forced lengths were kept, both sides had the same logits or loss,
    and every comparison printed its ratio."""
    pytest.importorskip(needs)
    command = [sys.executable, "-m", f"bench.{name}", "--short", *flags]
    command += ["--out", str(tmp_path / "x")] if name == "growth" else ["--families", "qwen3_moe"]
    run = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("\n| qwen3_moe ") == lines, run.stdout
    if name == "growth":
        curves = (tmp_path / "x.csv").read_text().splitlines()
        assert (tmp_path / "x.png").exists() and len(curves) == 1 + 6 * 2 and "hybrid" in curves[1]


@pytest.mark.parametrize(
    "sections",
    [
        ("models", "blocks"),
        pytest.param(("training", "runs", "decode", "rollouts", "steps", "memory"), marks=nightly),
    ],
)
def test_run_gpu(sections, tmp_path):
    """The script for a GPU runs on a CPU in toy sizes: every section ends, every check of what is
    right holds there, and the JSON has the table's rows."""
    pytest.importorskip("transformers")
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--small", "--out", str(out)]
    run = subprocess.run(
        [*command, "--only", *sections],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    rows = json.loads(out.read_text())["rows"]
    assert {x["section"] for x in rows} == set(sections)
    assert not [x for x in rows if "traceback" in x or x["status"] == "FAILED"]
    assert run.stdout.count("\n| ") == len(rows) + 2  # the titles and the rule under them


def test_run_gpu_failure(monkeypatch, tmp_path, capsys):
    """A check that raises is a row of the table, those after it run, and the exit code is 1."""
    from bench import gpu

    def broken(setup):
        yield Finding("before", "1")
        raise RuntimeError("the card is gone")

    def sound(setup):
        yield below("after", 1.0, 2.0)
        yield below("not a number", float("nan"), 2.0)

    monkeypatch.setitem(gpu.CHECKS, "models", (broken, sound))
    flags = ("--device", "cpu", "--small", "--only", "models", "--out", str(tmp_path / "gpu.json"))
    monkeypatch.setattr(sys, "argv", ["gpu", *flags])
    with pytest.raises(SystemExit) as stopped:
        gpu.main()
    assert stopped.value.code == 1
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    found = [(x["check"], x["status"]) for x in rows]
    assert found == [
        ("before", "measured"),
        ("broken", "FAILED"),
        ("after", "ok"),
        ("not a number", "FAILED"),
    ]
    assert rows[1]["result"] == "RuntimeError: the card is gone"
