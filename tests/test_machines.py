"""Systems other than Linux: the toy's programs run there, and nothing else does unless allowed."""

import json
import random

import pytest
from fixtures import toy_runs
from fixtures.toy_runs import TINY_EVAL, run_here

from nanocascade.rewards import score
from nanocascade.sandbox import sandbox
from nanocascade.sandbox.sandbox import Sandbox, is_plain
from nanocascade.toy import tasks

sft, refused = toy_runs.sft, toy_runs.refused


@pytest.fixture
def other_system(monkeypatch):
    """This machine, as if its kernel had neither Landlock nor seccomp, with no sandbox started."""
    monkeypatch.setenv("NANOCASCADE_UNCONFINED", "1")
    monkeypatch.setattr(sandbox, "shared", {})


def test_plain_programs():
    """Functions of arithmetic, comparisons, abs, max and min are plain; nothing is that could
    reach the system, loop, or grow."""
    for program in (
        "def f(x):\n    return 2*x+-3",
        "def f(x, y=1):\n    return max(x, 3) if x < y else abs(min(x, 3)) // 2 % 5",
    ):
        assert is_plain(program), program
    for program in (
        "import os",
        "def f(x): return x.real",
        "def f(x): return open(x)",
        "def f(x): return (max if x else min)(1, 2)",
        "def f(x): return max(1, x, key=abs)",
        "def f(x): return [x]",
        "def f(x): return 9**9**9",
        "def f(x): return 1 << 99",
        "def f(x): return 'x' * 10**9",
        "def f(x):\n    while x: pass",
        "def f(x): return f(x)",
        "x = 1",
        "def f(x) return",
        "@breakpoint\ndef f(x): return x",
        "def f(x):\n    return " + "-" * 2000 + "1",
        "\0",
    ):
        assert not is_plain(program), program


def test_other_system_runs_plain_programs(other_system):
    """Where nothing can be confined the sandbox says so and refuses; told to, it runs plain
    programs and gives any other program no result."""
    with pytest.raises(OSError, match="cannot confine files, network, processes, signals.*--allow"):
        Sandbox(1)
    calls = [["f", {"tuple": [3]}, {"dict": []}, None]]
    with Sandbox(1, plain_only=True) as box:
        assert "only plain expressions" in box.describe()
        outcome = box.run_calls({"p": "def f(x):\n    return max(2*x-1, 3)"}, "p", calls)
        assert outcome.ended == "" and outcome.replies == [b'{"value": 5}']
        for program in ("def f(x): return [x]", "import os\ndef f(x): return 5"):
            outcome = box.run_calls({"p": program}, "p", calls)
            assert outcome.ended.startswith("not run") and not outcome.replies
        assert box.run_script({"p": "print(5)"}, "p").stdout == b""


def test_run_toy_elsewhere(other_system, sft, refused, tmp_path, monkeypatch, capsys):
    """The toy's programs are trained on and graded everywhere, and the start says how they are
    contained; rows of files, and a repository's programs, are refused without the flag."""
    args = ("train_rl.py", "--init", sft, "--stage", "code_rl", "--steps", 1, "--prompts", 2)
    args += ("--rollouts", 2, "--max_new_tokens", 40, "--toy_rows", 12, *TINY_EVAL)
    (tmp_path / "rows").write_text(json.dumps(tasks.make_rows("code", 1)[0]))
    refused("cannot confine .*--allow_unprotected", *args, "--data", tmp_path / "rows")
    refused("cannot confine .*--allow_unprotected", *args, "--stage", "swe_agentic_rl")
    run_here(monkeypatch, *args, "--out", tmp_path / "out")
    assert "so only plain expressions" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/manifest.json").read_text())["evaluation"]["code"]["after"]
    for i in range(20):  # right answers earn 1 there too, wrong ones 0
        for task in (tasks.code, tasks.repair):
            row, good, slip = task(random.Random(i))
            assert [score(row, x[-1]["content"]).value for x in (good, slip)] == [1, 0], row
