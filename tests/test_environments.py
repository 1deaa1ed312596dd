"""Tools in the loop: what they answer, what an episode earns, and that nothing of it stays."""

import io
import json
import os
import random
import sys
import time
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import median

import packaging
import pytest
from fixtures import toy_runs
from fixtures.machine import allowance, needs_landlock
from fixtures.toy_runs import run_here, start

from nanocascade import sampler
from nanocascade.data.rows import conversation, normalize
from nanocascade.environments import loop as environments
from nanocascade.environments import python
from nanocascade.environments.base import MAX_RESULT
from nanocascade.environments.loop import answer, end_episode
from nanocascade.rewards import check_row, score
from nanocascade.rollouts import rollout
from nanocascade.sampler import Sample
from nanocascade.sandbox.sandbox import LIMITS, Sandbox, shared_sandbox
from nanocascade.sandbox.session import Session
from nanocascade.tokenizer.chat import TEMPLATE
from nanocascade.tokenizer.template import render_template
from nanocascade.tokenizer.tokenizer import Tokenizer
from nanocascade.toy import tasks
from nanocascade.toy.words import assistant, call_tool

pytestmark = needs_landlock  # which implies the rest; tests import modules that are not loaded yet
MAIN = "from a.ops import op\n\n\ndef f(x):\n    return op(x)\n"
TESTS = """import unittest
from a.main import f
def test_f():
    assert f(1) == 2, "one"
class T(unittest.TestCase):
    def test_g(self):
        self.assertEqual(f(2), 3)
"""
FILES = {
    "a/ops.py": "def op(x):\n    return x - 1\n",
    "a/main.py": MAIN,
    "tests/test_f.py": TESTS,
    "b.txt": "x - 1",
}
HIDDEN = {"fn_name": "f", "inputs": [[1], [5]], "outputs": [2, 6]}
METADATA = {"files": FILES, "entry": "a/main.py", "unit_tests": HIDDEN, "cpu_seconds": 0.5}
ASKED = {"responses_create_params": {"input": "Mend it."}}
REPAIR = ASKED | {"environment": {"name": "repository"}, "verifier_metadata": METADATA}
REPAIR = normalize(REPAIR, "repair")
TIR = normalize(ASKED | {"environment": {"name": "python"}, "expected_answer": "7"}, "tir")
SHOP = tasks.tools(random.Random(1))[0]
sft, refused = toy_runs.sft, toy_runs.refused
MEND = ("edit", {"path": "a/ops.py", "old": "x - 1", "new": "x + 1"})


def play(row, *calls):
    """What the calls of an episode are answered, one by one."""
    progress, results = None, []
    for name, arguments in calls:
        progress, result = answer(row, progress, {"name": name, "arguments": arguments})
        results.append(result)
    end_episode(row, progress)
    return results


@pytest.mark.parametrize(
    ("program", "result"),
    [
        ("print(3 + 4)", "7"),
        ("exit()", "no output"),
        ("import os; os._exit(3)", "error: process ended; all names are lost"),
        ("x =", "SyntaxError: invalid syntax (program.py, line 1)"),
        ("print('a')\n1 / 0", "a\nZeroDivisionError: division by zero (__main__, line 2)"),
        (
            "if __name__ == '__main__':\n    print(open('/etc/passwd'))",
            "PermissionError: [Errno 13] Permission denied: '/etc/passwd' (__main__, line 2)",
        ),
        ("import torch", "ModuleNotFoundError: No module named 'torch' (__main__, line 1)"),
        (None, "error: code must be a text of at most 262144 characters"),
    ],
)
def test_python_tool(program, result):
    """A program's output comes back, its exception with the line; nothing outside is reached."""
    assert play(TIR, ("python", {"code": program})) == [result]


def test_python_tool_is_bounded(monkeypatch):
    """Output is cut in the middle, 100 calls are answered, and of programs that must be stopped
    three are run; a set is printed in the same order in any sandbox."""
    (flood,) = play(TIR, ("python", {"code": "print('<' + 'x' * 10**5 + '>')"}))
    assert flood[0] == "<" and flood[-1] == ">" and len(flood) < MAX_RESULT + 50
    assert "\n... 92002 characters left out ...\n" in flood
    assert play(TIR, *[("shell", {})] * 101)[99:] == ["error: no such tool", "error: no calls left"]
    short = partial(Session, limits=LIMITS._replace(test_seconds=0.1))
    monkeypatch.setattr(python, "Session", short)
    stopped = play(TIR, *[("python", {"code": "while 1: pass"})] * 4)
    assert stopped == ["error: time limit; all names are lost"] * 3 + ["error: no time left"]
    with Sandbox(1) as one, Sandbox(1) as other:
        source = {"p": "print(set('abcdefgh'))"}
        assert one.run_script(source, "p").stdout == other.run_script(source, "p").stdout


def test_python_names_stay():
    """A name defined in one call is there three calls later, after an exception and an exit too;
    another episode does not see it, and a program that has to be stopped takes it along."""
    codes = ("def double(y): return 2 * y", "1 / 0", "exit()", "print(double(21))")
    talk = [("python", {"code": code}) for code in codes]
    assert play(TIR, *talk)[3] == "42"
    missing = "NameError: name 'double' is not defined (__main__, line 1)"
    assert play(TIR, talk[3]) == [missing]
    died = ("python", {"code": "import os; os.abort()"})
    lost, later = play(TIR, talk[0], died, talk[3])[1:]
    assert lost == "error: process ended; all names are lost" and later == missing
    (one, _), (other, _) = (
        answer(TIR, None, {"name": "python", "arguments": x}) for _, x in talk[:2]
    )
    assert answer(TIR, one, {"name": "python", "arguments": talk[3][1]})[1] == "42"  # side by side
    assert answer(TIR, other, {"name": "python", "arguments": talk[3][1]})[1] == missing
    for progress in (one, other):
        end_episode(TIR, progress)


@pytest.mark.parametrize(
    ("calls", "result"),
    [
        (
            [("list", {})],
            "a/main.py (6 lines)\na/ops.py (3 lines)\nb.txt (1 lines)\ntests/test_f.py (8 lines)",
        ),
        ([("list", {"folder": "c"})], "no such files"),
        ([("read", {"path": "b.txt"})], "x - 1"),
        ([("read", {"path": "a/main.py", "first": 4, "last": "5"})], "def f(x):\n    return op(x)"),
        (
            [("read", {"path": "b.txt", "first": "-1"})],
            "error: first and last are line numbers from 1 to 1",
        ),
        ([("read", {"path": "/etc/passwd"})], "error: no file /etc/passwd"),
        ([("search", {"text": "x - 1"})], "a/ops.py:2:     return x - 1\nb.txt:1: x - 1"),
        ([("search", {"text": "(a+)+$"})], "not found"),
        ([("delete", {})], "error: no such tool"),
        (
            [("test", {})],
            "FAILED tests.test_f: test_f: AssertionError: one (tests.test_f, line 4)\n"
            "FAILED tests.test_f: tests.test_f.T.test_g: AssertionError: 1 != 3 "
            "(tests.test_f, line 7)\n"
            "0 passed, 2 failed",
        ),
        ([MEND, ("test", {"path": "tests/test_f.py"})], "2 passed, 0 failed"),
        ([("test", {"path": "b.txt"})], "error: no Python file b.txt"),
        ([MEND], "edited a/ops.py"),
        ([MEND, ("read", {"path": "a/ops.py"})], "def op(x):\n    return x + 1\n"),
        ([MEND, MEND], "error: old was found 0 times in a/ops.py, not once"),
        (
            [("edit", {"path": "a/main.py", "old": "op", "new": ""})],
            "error: old was found 3 times in a/main.py, not once",
        ),
        (
            [("edit", {"path": "n/x.py", "new": "import pytest"}), ("test", {"path": "n/x.py"})],
            "FAILED n.x: n.x: ModuleNotFoundError: No module named 'pytest' (n.x, line 1)\n"
            "0 passed, 1 failed",
        ),
        ([("edit", {"path": "../x", "new": "a"})], "error: no file ../x"),
        (
            [("edit", {"path": "b.txt", "old": "x", "new": 1})],
            "error: path, old and new are texts of at most 65536 characters",
        ),
    ],
)
def test_repository_tools(calls, result):
    """List, read, search, edit and test answer to the point; only the repository's paths exist."""
    assert play(REPAIR, *calls)[-1] == result


def said(*calls, text=""):
    """An assistant's turn as the model writes it."""
    message = {"role": "assistant", "content": text, "reasoning_content": "so"}
    message["tool_calls"] = [{"name": name, "arguments": values} for name, values in calls]
    text = render_template(TEMPLATE, [{"role": "user", "content": "q"}, message], None)
    return {"role": "assistant", "content": text.split("assistant\n")[1]}


def test_rewards_of_episodes():
    """Hidden tests judge the files that the edits leave, however many turns they took; neither
    words, nor visible tests that pass, nor results that the transcript claims, earn anything."""
    told = {"role": "tool", "content": "2 passed, 0 failed"}
    other = ("edit", MEND[1] | {"new": "x * 2"})  # passes the first hidden test
    tests = ("edit", {"path": "tests/test_f.py", "old": "assert f(1) == 2", "new": "assert True"})
    hide = ("edit", {"path": "a/main.py", "old": "return op(x)", "new": "import os; os._exit(0)"})
    for turns, reason in [
        ([said(MEND), told, said(text="Done.")], "all tests pass"),
        ([said(("list", {}), MEND), told, said(("test", {}))], "all tests pass"),
        (
            [
                said(other),
                told,
                said(("edit", {"path": "a/ops.py", "old": "x * 2", "new": "x + 1"})),
            ],
            "all tests pass",
        ),
        ([said(other), told, said(text="Done.")], "wrong output on test 2"),
        ([said(tests), told, said(text="Done.")], "wrong output on test 1"),
        ([said(hide), told, said(text="Done.")], "ended early on test 1"),
        ([said(("test", {})), told, said(text="2 passed, 0 failed")], "nothing was edited"),
        ([said(*[("list", {})] * 200, MEND), told], "nothing was edited"),
    ]:
        assert score(REPAIR, turns).reason == reason
        assert score(REPAIR, turns, finished=False).reason == "cut off"
    assert METADATA["files"] == FILES and "x - 1" in FILES["a/ops.py"]


def test_a_real_package():
    """The files of a package as it is installed (pytest needs it), with a bug planted: found by
    search, mended by an edit, judged by a function that it exports; the same loop as the toy's."""
    folder = Path(packaging.__file__).parent
    files = {f"packaging/{x.name}": x.read_text("utf-8") for x in folder.glob("*.py")}
    files["packaging/utils.py"] += (
        "\n\n_name = canonicalize_name\n\n\ndef canonicalize_name(name):\n"
        "    return _name(name).capitalize()  # shouting\n"
    )
    files["test_names.py"] = (
        "from packaging import utils, version\n\n\ndef test_name():\n"
        "    assert utils.canonicalize_name('A.b') == 'a-b', version.Version('1.0')\n"
    )
    tests = {"fn_name": "canonicalize_name", "inputs": [["Foo.Bar_x"]], "outputs": ["foo-bar-x"]}
    row = {"files": files, "entry": "packaging/utils.py", "unit_tests": tests}
    row = normalize(REPAIR | {"verifier_metadata": row}, "real")
    mend = ("edit", {"path": "packaging/utils.py", "old": ".capitalize()  # shouting", "new": ""})
    found, failed, _, passed = play(
        row, ("search", {"text": "# shouting"}), ("test", {}), mend, ("test", {})
    )
    assert found.startswith("packaging/utils.py:") and found.endswith("capitalize()  # shouting")
    assert "AssertionError: 1.0 (test_names, line 5)\n0 passed, 1 failed" in failed
    assert passed == "1 passed, 0 failed"
    assert score(row, [said(mend), said(text="Done.")]).value == 1
    assert score(row, [said(("list", {})), said(text="Done.")]).value == 0


def test_any_call():
    """2,000 random calls of every environment: a text of bounded length that can be encoded, quick,
    and the row is as it was. Half a character, deep lists and giant texts are among the values."""
    rng, began = random.Random(0), time.process_time()
    deep = json.loads("[" * 900 + "]" * 900)
    values = [
        "a/ops.py",
        "x",
        "",
        "\ud800",
        "\0",
        "1",
        "-1",
        "9" * 30,
        3,
        -1,
        10**40,
        0.5,
        None,
        True,
        [],
        {},
        deep,
        "x" * 70_000,
        "b.txt",
        "\ud83d\ude00",
    ]
    keys = ["path", "old", "new", "text", "folder", "first", "last", "item", "count", "files"]
    for row in (TIR, REPAIR, SHOP):
        before, progress = deepcopy(row), None
        tools = [x["function"]["name"] for x in row["responses_create_params"]["tools"]]
        tools = [x for x in (*tools, "\ud800", "") if x not in ("python", "test")]
        for i in range(2000):
            chosen = {key: rng.choice(values) for key in rng.sample(keys, rng.randint(0, 6))}
            call = {"name": rng.choice(tools), "arguments": chosen}
            progress, result = answer(row, progress if i % 150 else None, call)
            assert len(result.encode()) < 4 * MAX_RESULT + 100
        assert row == before
    assert time.process_time() - began < allowance(20)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            TIR | {"environment": {"name": "chess"}},
            "'chess' is unknown; there are shop, python, repos",
        ),
        (REPAIR | {"verifier_metadata": METADATA | {"entry": "c.py"}}, "entry 'c.py' is no Python"),
        (REPAIR | {"verifier_metadata": METADATA | {"files": {"a/main.py": 1}}}, "path: text"),
    ],
)
def test_rows_are_checked(row, words):
    """An unknown environment and a repository that cannot be tested are errors when data is read;
    a row gets its environment's tools unless it declares its own."""
    with pytest.raises(ValueError, match=words):
        check_row(normalize(row, "row"))
    assert conversation(REPAIR)[1] == environments.REPOSITORY_TOOLS
    own = REPAIR["responses_create_params"] | {"tools": environments.REPOSITORY_TOOLS[:1]}
    assert len(conversation(normalize(REPAIR | {"responses_create_params": own}, "x"))[1]) == 1


@pytest.fixture
def speak(sft, monkeypatch, capsys):
    """speak(messages, args): what sample.py prints if the model writes these, one a turn."""
    tokenizer = Tokenizer(sft)

    def run(messages, *args):
        turns = iter(messages)

        def fake(model, prompts, *, on_token=None, on_sample=None, **_):
            turn = [{"role": "user", "content": "q"}, next(turns)]
            ids, mask = tokenizer.render(turn)
            ids = [x for x, own in zip(ids, mask, strict=True) if own]
            for token in ids if on_token else ():
                on_token(token)
            if on_sample:
                on_sample(0, 0, Sample(ids, [-1.0] * len(ids), None, "stop", None))

        monkeypatch.setattr(sampler, "generate", fake)
        monkeypatch.setattr(rollout, "generate", fake)
        run_here(monkeypatch, "sample.py", "--model", sft, *args)
        return capsys.readouterr().out

    return run


def test_run_tools_in_sample(speak, monkeypatch, tmp_path):
    """With --tools python a program called in a chat, a prompt or a task is run and its output
    read, for as many turns as allowed; without it, or in a row with tools of its own, it is not."""
    program, _ = call_tool("run", "", "python", code="print(20 * 11 + 5)")
    talk = [program, program, assistant("so", "\\boxed{%s}" % 225)]
    told = "<tool_response>\n225\n</tool_response>"
    with_tool = ("--tools", "python", "--prompt", "15 * 15?")
    for args, times in ((with_tool, 2), ((*with_tool, "--max_turns", 2), 1), (with_tool[2:], 0)):
        assert speak(talk, *args).count(told) == times
    row = {"question": "15 * 15?", "answer": "225"}
    (tmp_path / "rows").write_text(json.dumps(row))
    task = ("--tasks", tmp_path / "rows", "--show", 0)
    assert "math" in speak(talk, *task) and " 1.000 " in speak(talk, *task, "--tools", "python")
    assert " 0.000 " in speak(talk, *task)
    assert " 0.000 " in speak(talk, "--tasks", "toy:tools", "--limit", 1, "--tools", "python")
    monkeypatch.setattr(sys, "stdin", io.StringIO("15 * 15?\n\n"))
    chat = speak(talk, "--tools", "python")
    assert chat.count("\n225\n") == 2 and chat.endswith("\\boxed{225}<|im_end|>\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("15 * 15?\nagain\n\n"))  # two turns for each
    assert speak([program] * 4, "--tools", "python", "--max_turns", 2).count("\n225\n") == 2
    with pytest.raises(SystemExit):
        speak(talk, "--tools", "shell")


def test_run_rl_with_python(sft, refused, tmp_path, monkeypatch, capsys):
    """Rows with the Python tool train in any stage that allows turns, in the sandbox; the prompt
    declares the tool, and a stage of one turn refuses them."""
    row = {"question": "1+1?", "answer": "2", "environment": {"name": "python"}}
    (tmp_path / "rows").write_text(json.dumps(row))
    args = ("train_rl.py", "--stage", "math_rl", "--init", sft, "--data", tmp_path / "rows")
    refused(r"--max_turns 1: rows with tools \({'python'}\) need 2", *args, "--max_turns", 1)
    run_here(
        monkeypatch,
        *args,
        "--out",
        tmp_path / "out",
        "--max_turns",
        2,
        "--steps",
        1,
        "--prompts",
        1,
        "--rollouts",
        2,
        "--max_new_tokens",
        8,
        "--eval_data",
        "",
    )
    assert "Sandbox: seccomp" in capsys.readouterr().out
    (rollout, _) = (json.loads(x) for x in (tmp_path / "out" / "rollouts.jsonl").open())
    assert "<name>python</name>" in rollout["prompt"] and rollout["domain"] == "math"


# ---- Nothing stays -------------------------------------------------------------------------------


def resident(process="self"):
    """KiB of memory of a process; 0 once it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int((status.partition("VmRSS:")[2].split() or [0])[0])


def alive(process):
    """Whether it is there, and not only its exit status, which nobody may ever ask for."""
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def descendants(process):
    """Processes that it started and that are there, those of their own included."""
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *descendants(child)]
    return found


def test_nothing_stays():
    """120 episodes with hostile programs leave no process but the sandbox's servers, no open file,
    and no memory growth."""
    hostile = [
        "import os\nos.dup(1)\nos.pipe()",
        "import threading\nfor i in range(9):\n    "
        "threading.Thread(target=print, daemon=True).start()",
        "x = ['y'] * 10**7",
        "1 / 0",
        "print('x' * 10**6)",
        "import os; os.abort()",
    ]

    def episodes(number):
        for i in range(number):
            play(TIR, ("python", {"code": f"{hostile[i % len(hostile)]}  # {i}"}))
            edit = ("edit", {"path": "n.py", "new": f"# {i}" + "x" * 10_000})
            assert "0 passed, 2 failed" in play(REPAIR, edit, ("test", {}))[1]
            assert score(REPAIR, [said(edit)]).value == 0
        return len(os.listdir("/proc/self/fd")), len(descendants("self")), resident()

    servers = [x for x in shared_sandbox().idle.queue if x]
    others = len(descendants("self")) - len(servers)  # of tests before this one
    episodes(20)  # what is loaded and started once
    files, processes, memory = episodes(20)
    assert processes == len(servers) + others
    later = episodes(80)
    assert later[:2] == (files, processes) and later[2] < memory + 4096


STAGES = {  # rows, and flags so small that 200 steps take two minutes
    "code_rl": ("code", "--max_new_tokens", 40, "--max_pass_rate", 1),
    "multi_domain_rl": ("tools", "--max_new_tokens", 72),
    "swe_agentic_rl": ("swe_agentic", "--max_new_tokens", 200),
}


@pytest.fixture(scope="session")
def worker(tmp_path_factory):
    """A model that writes programs and calls, rarely right; and the rows it learned from."""
    out = tmp_path_factory.mktemp("worker")
    rows = {stage: tasks.make_rows(x[0], 100) for stage, x in STAGES.items()}
    for stage, part in rows.items():
        (out / stage).write_text("".join(json.dumps(row) + "\n" for row in part))
    data = ",".join(str(out / x) for x in rows)
    toy_runs.run(
        "train_sft.py",
        "--out",
        out / "sft",
        "--data",
        data,
        "--eval_data",
        "",
        "--row_tokens",
        512,
        "--steps",
        120,
        "--batch_tokens",
        2048,
        "--lr",
        3e-3,
        "--warmup",
        5,
        "--schedule_steps",
        120,
    )
    return out


# What malloc keeps for later moves by tens of MiB; so told, it gives back what is not in use.
GIVEN_BACK = {
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}


@pytest.mark.nightly
@pytest.mark.parametrize("stage", STAGES)
def test_run_leaves_nothing(stage, worker, tmp_path):
    """200 steps of RL on programs and tools: in the second half no process is started, no file
    opened and no memory taken that was not in the first; afterwards no process and no file is
    left but the run's own."""
    (tmp_path / "tmp").mkdir()
    process = start(
        "train_rl.py",
        "--stage",
        stage,
        "--init",
        worker / "sft",
        "--data",
        worker / stage,
        "--out",
        tmp_path / "out",
        "--steps",
        200,
        "--prompts",
        2,
        "--rollouts",
        4,
        "--eval_data",
        "",
        "--show_every",
        0,
        "--lr",
        1e-5,
        *STAGES[stage][1:],
        env={"TMPDIR": tmp_path / "tmp", **GIVEN_BACK},
    )
    seen, metrics = {}, tmp_path / "out" / "metrics.jsonl"
    while process.poll() is None:
        step = metrics.read_text().count("\n") if metrics.exists() else 0
        if step and step < 199 and step not in seen:
            family = [process.pid, *descendants(process.pid)]
            memory = {x: resident(x) for x in family}
            seen[step] = len(os.listdir(f"/proc/{process.pid}/fd")), memory
        time.sleep(0.05)
    assert process.returncode == 0, process.communicate()[1]
    first, second = ([seen[x] for x in seen if a < x <= b] for a, b in ((50, 125), (125, 199)))
    files, families = ([[x[i] for x in half] for half in (first, second)] for i in range(2))
    # Programs come and go in processes of their own: what counts is who outlives 30 steps.
    stayed = set.intersection(*map(set, families[1][-30:]))
    memory = [[sum(x.get(pid, 0) for pid in stayed) for x in half] for half in families]
    print(stage, files, [[len(x) for x in half] for half in families], memory)
    assert len(seen) > 100 and min(files[1]) <= min(files[0])  # more while a line is written
    assert stayed <= {pid for x in families[0] for pid in x}
    # Medians: where in a step a sample falls moves it, a leak moves them all.
    assert median(memory[1]) < median(memory[0]) + 4096
    ended = time.monotonic()
    while left := {x for _, family in seen.values() for x in family if alive(x)}:
        assert time.monotonic() < ended + 60, left
    left = [x for x in (tmp_path / "tmp").iterdir() if not x.name.startswith("torchinductor_")]
    assert not left  # but for torch's own cache folder, one a user and empty here
    assert not (tmp_path / "out" / "state").exists()
