"""Tools in the loop: what they answer, what an episode earns, and that nothing of it stays."""

import json
import os
import random
import sys
import time
from copy import deepcopy
from pathlib import Path

import pytest

from nanocascade import environments, tasks
from nanocascade.chat import render_pieces
from nanocascade.data import conversation, normalize
from nanocascade.environments import ENVIRONMENTS, MAX_RESULT, answer
from nanocascade.rewards import check_row, code, score
from nanocascade.rewards.sandbox import Sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="confinement is Linux's")
MAIN = "from a.ops import op\n\n\ndef f(x):\n    return op(x)\n"
TESTS = """import unittest
from a.main import f
def test_f():
    assert f(1) == 2, "one"
class T(unittest.TestCase):
    def test_g(self):
        self.assertEqual(f(2), 3)
"""
FILES = {"a/ops.py": "def op(x):\n    return x - 1\n", "a/main.py": MAIN, "tests/test_f.py": TESTS,
         "b.txt": "x - 1"}  # fmt: skip
HIDDEN = {"fn_name": "f", "inputs": [[1], [5]], "outputs": [2, 6]}
METADATA = {"files": FILES, "entry": "a/main.py", "unit_tests": HIDDEN, "cpu_seconds": 0.5}
ASKED = {"responses_create_params": {"input": "Mend it."}}
REPAIR = ASKED | {"environment": {"name": "repository"}, "verifier_metadata": METADATA}
REPAIR = normalize(REPAIR, "repair")
TIR = normalize(ASKED | {"environment": {"name": "python"}, "expected_answer": "7"}, "tir")
SHOP = tasks.tools(random.Random(1))[0]
MEND = ("edit", {"path": "a/ops.py", "old": "x - 1", "new": "x + 1"})


def play(row, *calls):
    """What the calls of an episode are answered, one by one."""
    played, results = None, []
    for name, arguments in calls:
        played, result = answer(row, played, {"name": name, "arguments": arguments})
        results.append(result)
    return results


@pytest.mark.parametrize(("program", "result"), [
    ("print(3 + 4)", "7"), ("exit()", "no output"),
    ("import os; os._exit(3)", "error: exit status 3"),
    ("x =", "SyntaxError: invalid syntax (program.py, line 1)"),
    ("print('a')\n1 / 0", "a\nZeroDivisionError: division by zero (__main__, line 2)"),
    ("if __name__ == '__main__':\n    print(open('/etc/passwd'))",
     "PermissionError: [Errno 13] Permission denied: '/etc/passwd' (__main__, line 2)"),
    ("import torch", "ModuleNotFoundError: No module named 'torch' (__main__, line 1)"),
    (None, "error: code must be a text of at most 262144 characters"),
])  # fmt: skip
def test_python_tool(program, result):
    """A program's output comes back, its exception with the line; nothing outside is reached."""
    assert play(TIR, ("python", {"code": program})) == [result]


def test_python_tool_is_bounded(monkeypatch):
    """Output is cut in the middle, 100 calls are answered, and of programs that must be stopped
    three are run; every call starts afresh and prints a set in the same order in any sandbox."""
    (flood,) = play(TIR, ("python", {"code": "print('<' + 'x' * 10**5 + '>')"}))
    assert flood[0] == "<" and flood[-1] == ">" and len(flood) < MAX_RESULT + 50
    assert "\n... 92002 characters left out ...\n" in flood
    later = play(TIR, ("python", {"code": "x = 1"}), ("python", {"code": "print(x)"}))[1]
    assert later == "NameError: name 'x' is not defined (__main__, line 1)"
    assert play(TIR, *[("shell", {})] * 101)[99:] == ["error: no such tool", "error: no calls left"]
    monkeypatch.setattr(environments, "LIMITS", environments.LIMITS._replace(test_seconds=0.1))
    stopped = play(TIR, *[("python", {"code": "while 1: pass"})] * 4)
    assert stopped == ["error: time limit"] * 3 + ["error: no time left"]
    with Sandbox(1) as one, Sandbox(1) as other:
        source = {"p": "print(set('abcdefgh'))"}
        assert one.run_script(source, "p").stdout == other.run_script(source, "p").stdout


@pytest.mark.parametrize(("calls", "result"), [
    ([("list", {})],
     "a/main.py (6 lines)\na/ops.py (3 lines)\nb.txt (1 lines)\ntests/test_f.py (8 lines)"),
    ([("list", {"folder": "c"})], "no such files"), ([("read", {"path": "b.txt"})], "x - 1"),
    ([("read", {"path": "a/main.py", "first": 4, "last": "5"})], "def f(x):\n    return op(x)"),
    ([("read", {"path": "b.txt", "first": "-1"})],
     "error: first and last are line numbers from 1 to 1"),
    ([("read", {"path": "/etc/passwd"})], "error: no file /etc/passwd"),
    ([("search", {"text": "x - 1"})], "a/ops.py:2:     return x - 1\nb.txt:1: x - 1"),
    ([("search", {"text": "(a+)+$"})], "not found"), ([("delete", {})], "error: no such tool"),
    ([("test", {})],
     "FAILED tests.test_f: test_f: AssertionError: one (tests.test_f, line 4)\n"
     "FAILED tests.test_f: tests.test_f.T.test_g: AssertionError: 1 != 3 (tests.test_f, line 7)\n"
     "0 passed, 2 failed"),
    ([MEND, ("test", {"path": "tests/test_f.py"})], "2 passed, 0 failed"),
    ([("test", {"path": "b.txt"})], "error: no Python file b.txt"), ([MEND], "edited a/ops.py"),
    ([MEND, ("read", {"path": "a/ops.py"})], "def op(x):\n    return x + 1\n"),
    ([MEND, MEND], "error: old was found 0 times in a/ops.py, not once"),
    ([("edit", {"path": "a/main.py", "old": "op", "new": ""})],
     "error: old was found 3 times in a/main.py, not once"),
    ([("edit", {"path": "n/x.py", "new": "import pytest"}), ("test", {"path": "n/x.py"})],
     "FAILED n.x: n.x: ModuleNotFoundError: No module named 'pytest' (n.x, line 1)\n"
     "0 passed, 1 failed"),
    ([("edit", {"path": "../x", "new": "a"})], "error: no file ../x"),
    ([("edit", {"path": "b.txt", "old": "x", "new": 1})],
     "error: path, old and new are texts of at most 65536 characters"),
])  # fmt: skip
def test_repository_tools(calls, result):
    """List, read, search, edit and test answer to the point; only the repository's paths exist."""
    assert play(REPAIR, *calls)[-1] == result


def said(*calls, text=""):
    """An assistant's turn as the model writes it."""
    message = {"role": "assistant", "content": text, "reasoning_content": "so"}
    message["tool_calls"] = [{"name": name, "arguments": values} for name, values in calls]
    pieces = render_pieces([{"role": "user", "content": "q"}, message])
    return {"role": "assistant", "content": "".join(x.text for x in pieces).split("assistant\n")[1]}


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
        ([said(other), told, said(("edit", {"path": "a/ops.py", "old": "x * 2", "new": "x + 1"}))],
         "all tests pass"),
        ([said(other), told, said(text="Done.")], "wrong output on test 2"),
        ([said(tests), told, said(text="Done.")], "wrong output on test 1"),
        ([said(hide), told, said(text="Done.")], "ended early on test 1"),
        ([said(("test", {})), told, said(text="2 passed, 0 failed")], "nothing was edited"),
        ([said(*[("list", {})] * 200, MEND), told], "nothing was edited"),
    ]:  # fmt: skip
        assert score(REPAIR, turns).reason == reason
        assert score(REPAIR, turns, finished=False).reason == "cut off"
    assert METADATA["files"] == FILES and "x - 1" in FILES["a/ops.py"]


def test_any_call():
    """2,000 random calls of every environment: a text of bounded length that can be encoded, quick,
    and the row is as it was. Half a character, deep lists and giant texts are among the values."""
    rng, began = random.Random(0), time.process_time()
    deep = json.loads("[" * 900 + "]" * 900)
    values = ["a/ops.py", "x", "", "\ud800", "\0", "1", "-1", "9" * 30, 3, -1, 10**40, 0.5, None,
              True, [], {}, deep, "x" * 70_000, "b.txt", "\ud83d\ude00"]  # fmt: skip
    keys = ["path", "old", "new", "text", "folder", "first", "last", "item", "count", "files"]
    for row in (TIR, REPAIR, SHOP):
        before, played = deepcopy(row), None
        tools = [x["function"]["name"] for x in row["responses_create_params"]["tools"]]
        tools = [x for x in (*tools, "\ud800", "") if x not in ("python", "test")]
        for i in range(2000):
            chosen = {key: rng.choice(values) for key in rng.sample(keys, rng.randint(0, 6))}
            call = {"name": rng.choice(tools), "arguments": chosen}
            played, result = answer(row, played if i % 150 else None, call)
            assert len(result.encode()) < 4 * MAX_RESULT + 100
        assert row == before
    assert time.process_time() - began < 20


@pytest.mark.parametrize(("row", "words"), [
    (TIR | {"environment": {"name": "chess"}}, "'chess' is unknown; there are shop, python, repos"),
    (REPAIR | {"verifier_metadata": METADATA | {"entry": "c.py"}}, "entry 'c.py' is no Python"),
    (REPAIR | {"verifier_metadata": METADATA | {"files": {"a/main.py": 1}}}, "path: text"),
])  # fmt: skip
def test_rows_are_checked(row, words):
    """An unknown environment and a repository that cannot be tested are errors when data is read;
    a row gets its environment's tools unless it declares its own."""
    with pytest.raises(ValueError, match=words):
        check_row(normalize(row, "row"))
    assert conversation(REPAIR)[1] == environments.REPOSITORY_TOOLS
    own = REPAIR["responses_create_params"] | {"tools": environments.REPOSITORY_TOOLS[:1]}
    assert len(conversation(normalize(REPAIR | {"responses_create_params": own}, "x"))[1]) == 1
