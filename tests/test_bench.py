"""The benchmarks run, and compare the same work; how fast anything is, no test decides."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "name, needs, flags, lines",
    [
        ("rollout", "transformers", ("--shapes", "rl", "decode"), 4),
        ("train_step", "transformers", ("--shapes", "unequal"), 1),
        ("grpo_step", "trl", ("--shapes", "unequal"), 2),
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
