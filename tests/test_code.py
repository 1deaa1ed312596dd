"""Programs and repairs: what passes its tests earns 1, and nothing else does, whatever it tries."""

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from fixtures.machine import allowance, needs_landlock

from nanocascade.rewards import code
from nanocascade.sandbox.jail import encode
from nanocascade.sandbox.sandbox import Outcome

pytestmark = needs_landlock  # which implies the rest; programs import modules
DATA = Path(__file__).parents[2] / "shared" / "data" / "nemo_gym" / "code_gen.jsonl"
RIGHT = "all tests pass"
ADD = {"inputs": [[1, 2], [-3, 3]], "outputs": [3, 0], "fn_name": "add"}
SUM = {"inputs": ["1 2\n", "-3 3\n"], "outputs": ["3\n", "0\n"]}
CHECK = {
    "asserts": [
        "def check(f):\n    for x in range(9): assert f(x, 1) == x + 1",
        "check(add)",
        "assert all(map(lambda x: add(x, x) == 2 * x, range(9)))",
    ]
}
PATCH = "a/ops.py\n<<<<<<< SEARCH\n%s\n=======\n%s\n>>>>>>> REPLACE\n"
DIFF = """--- a/a/ops.py
+++ b/a/ops.py
@@ -4,2 +4,2 @@ numbers do not count
 def op(x):
-    return x - 1
+    return x + 1
"""
EQUAL = "class E(%s):\n    __eq__ = lambda *a: True\n    __hash__ = None\nadd = lambda x, y: E()"
FORGE = "import os\nfor x in %r: os.write(5, x.encode() + b'\\n')\nos._exit(%d)"


def block(program):
    return f"So:\n```python\n{program}\n```\nDone."


def grade(tests, program, cpu_seconds=0.5):
    row = {"verifier_metadata": {"unit_tests": tests, "cpu_seconds": cpu_seconds}}
    code.check_tests(row)
    return code.verify_program(row, {"content": block(program)})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("```python\na\n```\n```python\nb\nc\n```", ("b\nc", None)),
        ("```py\n  a\n```", ("  a", None)),
        ("```Python \na\n  ```\n```text\n```python\nb\n```", ("a", None)),
        ("```python\na\n```\n```python\nb", (None, "unfinished code block")),
        ("a", (None, "no code block")),
        ("```\na\n```", ("a", None)),
        ("```python\na\n```\n```\n1 2\n```", ("a", None)),
        ("```text\na\n```", (None, "no code block")),
        ("````python title=x\na\n```\nb\n````", ("a\n```\nb", None)),
        ("~~~python\na\n~~~", ("a", None)),
        ("1. So:\n   ```python\n   if a:\n     b\n   ```", ("if a:\n  b", None)),
        ("```python\r\na\r\n``` That is it.", ("a", None)),
        ("```python a ```", (None, "no code block")),
        (block("#" * (1 << 19)), (None, "program too long")),
    ],
    ids=range(14),
)
def test_last_program(text, expected):
    """The last closed ```python block counts; a last block that is not closed leaves no answer."""
    assert code.last_program(text) == expected


def test_outputs_compared():
    """Lines of tokens: whole numbers are equal however they are written, others to 1e-6. Blank
    lines and outer spaces do not count, but the indentation of a drawing does."""
    for pair in [
        ("1 2\n", " 1   2 "),
        ("1\n2", "1\n\n2\n"),
        ("0.5", ".5000004"),
        ("1e9", "1000000000.0"),
        ("", "\n"),
        ("2", "2.0"),
        ("2.0", "2"),
        ("7\n", "7.000000"),
        ("1" + "0" * 20, "1e20"),
        (" *\n***", " *\n***\n"),
    ]:
        assert code.same_output(*pair), pair
    for pair in [
        ("1 2\n", "1\n2"),
        ("1\n2", "1 2"),
        (" *\n***", "*\n***"),
        ("2", "2.0000001"),
        ("123456789012.0", "123456789013.0"),
        ("1" + "0" * 20, "1" + "0" * 19 + "1.0"),
        ("1.0", "1.00001"),
        ("1 2", "12"),
        ("YES", "Yes"),
        ("1", "1 1"),
        ("1.5", "nan"),
        ("1.5", "1_5e-1"),
        ("0.5", "\uff10.\uff15"),
        ("1e400", "1e999"),
    ]:
        assert not code.same_output(*pair), pair


def test_values_compared():
    """Tuples are lists and whole keys text; nothing else changes its type."""
    for pair in [([1, [2.0]], (1, [2.0000001])), ({"1": [0]}, {1: (0,)}), (2.0, 2)]:
        assert code.same_value(pair[0], encode(pair[1])), pair
    for pair in [
        (1, 1.0000001),
        ([1], 1),
        ("1", 1),
        ([1], {1}),
        ({"a": 1}, {"a": 1, 2: 3}),
        (0.5, float("nan")),
        (None, 0),
        ([], None),
        ({"1": 1}, {1 << 9999: 1}),
    ]:
        assert not code.same_value(pair[0], encode(pair[1])), pair


@pytest.mark.parametrize(
    ("inputs", "outputs", "program"),
    [
        (["[1, 2]\n3"], ["5"], "def f(x, y): return sum(x) - 1 + y"),  # an argument a line
        (["[1, 2]", "[3]"], ["3", "3"], "def f(x): return sum(x)"),
        (["[1, 2]", "[3, 0]"], ["3", "3"], "def f(x): return sum(x)"),  # or a list of arguments
        (["[1, 2]", "[3, 0]"], ["3", "3"], "def f(x, y): return x + y"),
        ([[[1, 2]], [[3]]], [[3], [3]], "def f(x): return sum(x)"),  # APPS: a result in a list
        ([[[1, 2]], [[3]]], [[3], [3]], "def f(x): return [sum(x)]"),
        ([[1]], ["1"], "class Solution:\n    def f(self, x): return str(x)"),
        ([[{"a": [None]}]], [{"a": [None]}], "f = dict"),
        ([[0]], [10**30], "f = lambda x: 10**30"),
    ],
)
def test_forms_of_function_tests(inputs, outputs, program):
    """Every way in which the data sets write arguments and results."""
    assert grade({"inputs": inputs, "outputs": outputs, "fn_name": "f"}, program).reason == RIGHT


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("def add(x, y): return x + y", RIGHT),
        ("def add(x, y): return 3", "wrong output on test 2"),
        ("def add(x, y) return 3", "syntax error"),
        ("add = z", "crashed: NameError on test 1"),
        ("def add(x): return x", "crashed: TypeError on test 1"),
        ("def add(x, y): return [0] * 10**12", "memory on test 1"),
        ("def add(x, y): return 1 << 10**5", "wrong output on test 1"),  # giant integers
        ("def add(x, y): return 1 << 10**8", "crashed: NoReply on test 1"),
        ("def add(x, y): return 10 ** 10 ** 10", "time limit on test 1"),
        ("def add(x, y):\n    while x < 0: pass\n    return x + y", "time limit on test 2"),
        # what must not help: objects that equal all, leaving early, patches, forged replies
        (EQUAL % "int", "wrong output on test 1"),
        (EQUAL % "", "wrong output on test 1"),
        ("exit(0)", "crashed: SystemExit on test 1"),
        (FORGE % ("", 0), "ended early on test 1"),
        (
            "import builtins, json\nbuiltins.all = json.dumps = lambda *a: 'true'\nadd = print",
            "crashed: NoReply on test 1",
        ),
        (
            "print('x' * 10**6)\nadd = lambda x, y: x + y",
            RIGHT,
        ),  # what a function prints is nothing
        (FORGE % (["true"], 0), "crashed: NoReply on test 1"),
        (FORGE % (['{"value": true}'], 0), "wrong output on test 1"),
        (FORGE % (['{"value": {"int": 3}}'], 0), "wrong output on test 1"),
        (FORGE % (["[" * 9999], 0), "crashed: NoReply on test 1"),
        (FORGE % (['{"value": 3}'], 0), "ended early on test 2"),
        (FORGE % (['{"value": 3}', '{"value": 0}'], 3), "exit status 3 on test 2"),
        ("import os\nos.closerange(0, 99)\nwhile 1: pass", "crashed: SIGKILL on test 1"),
    ],
)
def test_function_verdicts(program, reason):
    """Each way to pass or fail, and each trick, with the reason given for it."""
    assert grade(ADD, program).reason == reason


def test_script_verdicts():
    """Programs are judged by what they print, test by test; leaving early earns nothing."""
    read = "x, y = map(int, input().split())\n"
    for program, reason in [
        (read + "print(x + y)\nexit()", RIGHT),
        (read + "print(3)", "wrong output on test 2"),
        ("exit()", "wrong output on test 1"),
        ("while 1: pass", "time limit on test 1"),
        (read + "if x < 0: exit(1)\nprint(3)", "crashed: SystemExit on test 2"),
        ("import os\nos._exit(4)", "exit status 4 on test 1"),
        ("print(3", "syntax error"),
        ("while 1: print(1)", "output limit on test 1"),
    ]:
        assert grade(SUM, program).reason == reason, program


def test_expected_answers_are_out_of_reach():
    """Neither memory, frames, modules nor open files of a program hold what is expected of it."""
    search = (
        "import gc, os, sys\ngc.unfreeze()\nfound = [*gc.get_objects(), os.environ]\n"
        "x = sys._getframe()\nwhile x: found += [x.f_locals, x.f_globals]; x = x.f_back\n"
        "texts = [repr(x)[:99999] for x in found]\n"
        "for file in range(7):\n    try: texts.append(repr(os.pread(file, 1 << 20, 0)))\n"
        "    except OSError: pass\n"
        "word = 'QX7-'.lower()\nhits = [t[t.find(word):][:10] for t in texts if word in t]\n"
    )
    f = "f = lambda x: ''.join(hits)"
    for tests, use in [
        ({"inputs": ["1"], "outputs": ["qx7-answer"]}, "print(*hits)"),
        ({"inputs": [[1]], "outputs": ["qx7-answer"], "fn_name": "f"}, f),
        ({"asserts": ["assert f(1) == 'qx7-answer'"]}, f),
    ]:
        # All objects are printed: on a busy machine that takes more than grade's half a second.
        assert grade(tests, search + use, 5).reason == "wrong output on test 1"


def test_assert_verdicts():
    """Test code runs beside the program, not in it: no exception, object or patch passes it."""
    for program, reason in [
        ("def add(x, y): return x + y", RIGHT),
        ("def add(", "syntax error"),
        ("def add(x, y): return min(x + y, 9)", "wrong output on test 3"),
        ("def add(x, y): raise StopIteration", "crashed: RuntimeError on test 2"),
        ("exit()", "crashed: RuntimeError on test 2"),
        (FORGE % ("", 0), "ended early on test 2"),
        (EQUAL % "", "wrong output on test 2"),
        (EQUAL % "int", "wrong output on test 2"),
        ("__builtins__['all'] = abs\nadd = lambda x, y: x + 1", "wrong output on test 3"),
        ("while 1: pass", "time limit on test 2"),
    ]:
        assert grade(CHECK, program).reason == reason, program
    types = [
        "assert f((1, {2}), b=[None]) == ((1, {2, 3}), {(1, 2): 0.5})",
        "assert f",
        "try:\n    f()\n    assert 0\nexcept TypeError:\n    pass",
    ]
    program = "def f(a, b):\n    a[1].add(3)\n    return a, {(1, 2): 0.5}"
    assert grade({"asserts": types}, program).reason == RIGHT


def test_assert_values():
    """Tests may pass complex numbers, ask whether an object is true, use a module that only the
    program imports, and call what the program names as a built-in; but no other is replaced."""
    half = "import re, sys\ndef f(x): return x * 0.5j if x else re.search('a', 'b')\n"
    tests = ["assert f(2j) == -1 and sys.maxsize > f(2) .imag", "assert not f(0)"]
    assert grade({"asserts": tests}, half).reason == RIGHT
    found = "import re\ndef f(x): return re.search('a', x)"
    assert grade({"asserts": ["assert f('a')", "assert f('a') != 1"]}, found).reason == RIGHT
    assert grade({"asserts": ["assert f('b')"]}, found).reason == "wrong output on test 1"
    counts = "def f(n):\n    yield from range(n)\ndef g(n): return range(n)"
    assert grade({"asserts": ["assert list(f(2)) == [*g(2)] == [0, 1]"]}, counts).reason == RIGHT
    assert grade({"asserts": ["assert f(2) == [0, 1]"]}, counts).value == 0
    product = "def sum(a, b): return a * b\nf = sum\ndef set(x): return 1"
    assert grade({"asserts": ["assert sum(2, 3) == 6"]}, product).reason == RIGHT
    for test in ("assert set(f(1, 2)) == set([5])", "assert sum(set([2, 3])) == 1"):
        assert grade({"asserts": [test]}, product).value == 0


def test_repair():
    """A patch or diff applies where its lines stand exactly once; then the entry file is tested."""
    main = "from a.ops import op\nfrom .ops import no\nf = lambda x: op(no(x))"
    ops = "def op(x):\n    return x - 1\n\n\ndef no(x):\n    return x"
    tests = {"inputs": [[1]], "outputs": [2], "fn_name": "f"}
    metadata = {"files": {"a/ops.py": ops, "a/main.py": main}, "entry": "a/main.py"}
    row = {"verifier_metadata": {**metadata, "unit_tests": tests}}
    imported = {"asserts": ["from a.main import f", "assert f(1) == 2"]}
    asserted = {"verifier_metadata": {**metadata, "unit_tests": imported}}
    code.check_files(asserted)
    good = PATCH % ("    return x - 1", "    return x + 1")
    absent, wrong = "patch of a file that is not there", "wrong output on test 1"
    for answer, reason in [
        (good, RIGHT),
        (f"```\n{good}```", RIGHT),
        (block("def f(x): return x + 1"), RIGHT),
        (PATCH % ("    return x", "    return x + 2"), RIGHT),
        (PATCH % ("    return x - 1", "    return x + 2"), "wrong output on test 1"),
        (PATCH % ("return x - 1", "return x + 1"), "lines to replace found 0 times"),
        (PATCH % ("", "    return x + 1"), "lines to replace found 2 times"),
        (good.replace("    return x - 1\n", ""), "lines to replace found 0 times"),
        (good + good, "lines to replace found 0 times"),
        (good[:60], "unfinished patch"),
        (DIFF, RIGHT),
        (f"```diff\n{DIFF}```\n", RIGHT),
        (DIFF.replace("+ 1", "+ 2"), wrong),
        (DIFF.replace("4,2", "4,9") + "end", "unfinished patch"),
        (DIFF.replace(" def op(x):", " def up(x):"), "lines to replace found 0 times"),
        (DIFF.replace("b/a/", "b/"), absent),
        (DIFF.replace("@@", "@"), "no code block"),
        ("x + 1", "no code block"),
        (good.replace("a/", "b/"), absent),
        (good[9:], absent),
    ]:
        assert code.verify_repair(row, {"content": answer}).reason == reason, answer
    assert code.verify_repair(asserted, {"content": good}).reason == RIGHT


def test_verdicts_are_remembered(monkeypatch):
    """The same program on the same tests is not run again, on other tests it is; threads agree."""
    program = f"def add(x, y): return x + y  # {random.random()}"
    with ThreadPoolExecutor(4) as threads:
        assert {x.value for x in threads.map(lambda _: grade(ADD, program), range(4))} == {1}
    assert grade({**ADD, "outputs": [3, 1]}, program).value == 0
    monkeypatch.setattr(code, "judge_calls", None)
    assert grade(ADD, program).value == 1


UNITTEST = (
    "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n"
    "        self.assertEqual(add(1, 2), 3)\n"
)


def test_rows_checked():
    """Tests that cannot be run, or that every program or none would pass, are errors of the row."""
    one, check = {"inputs": ["1"], "outputs": ["1"]}, "def check(f):\n    assert f(1, 2) == 3"
    for change, words in [
        ({"outputs": []}, "1 inputs and 0"),
        ({"inputs": [], "outputs": []}, "lists"),
        ({"inputs": ["{"], "fn_name": "f"}, "Expecting"),
        ({"outputs": [3]}, "got 3"),
        ({"inputs": [["1", "2"]]}, "got .'1', '2'"),
        ({"inputs": "1"}, "got '1'"),
        ({"inputs": [7], "fn_name": "f"}, "got 7"),
        ({"fn_name": 7}, "got 7"),
        *(
            ({"asserts": x}, "no assertion")
            for x in (
                [],
                [check],
                ["# soon"],
                ["add(1, 2) == 3"],
                ["def test_a():\n    assert add(1, 2)"],
                [UNITTEST],
                [UNITTEST + "unittest.main(exit=False)"],
            )
        ),
        *(
            ({"asserts": [f"{x}\nassert add(1, 2)"]}, words)
            for x, words in (
                ("(", "no Python"),
                ("import numpy as np", "numpy"),
                ("from a.b import add", "a.b"),
                ("from .solution import add", "import .solution"),
            )
        ),
        ({"asserts": "assert add(1, 2)"}, "list of texts"),
    ]:
        with pytest.raises(ValueError, match=words):
            code.check_tests({"verifier_metadata": {"unit_tests": one | change}})
    for seconds in (None, "4", 0, float("inf")):
        with pytest.raises(ValueError, match=f"cpu_seconds .* got {seconds!r}"):
            code.check_tests({"verifier_metadata": {"unit_tests": ADD, "cpu_seconds": seconds}})


@pytest.mark.parametrize(
    "tests",
    [
        ["def check(f):\n    assert f(1, 2) == 3", "check(add)"],
        [UNITTEST + "unittest.main()"],
        ["from solution import *\nfrom solution import add as plus", "assert plus(1, 2) == 3"],
        ["import solution\nif solution.add(1, 2) != 3: raise ValueError"],
        [
            "def test_a():\n    assert add(1, 2) == 3\nfor x in [*globals()]:\n"
            "    if x.startswith('test'): globals()[x]()"
        ],
        [
            "def test_a():\n    assert add(1, 2) == 3\nfor x, f in [*locals().items()]:\n"
            "    if x.startswith('test'): f()"
        ],
        [UNITTEST + "unittest.main(exit=True)"],
        ["import sys\nif add(1, 2) != 3: sys.exit(1)"],
        ["try:\n    import numpy\nexcept ImportError:\n    pass\nassert add(1, 2) == 3"],
    ],
)
def test_forms_of_test_code(tests):
    """Test code may call its functions, hand them to unittest, and import the program."""
    assert grade({"asserts": tests}, "def add(x, y): return x + y").reason == RIGHT
    assert grade({"asserts": tests}, "def add(x, y): return 4").value == 0


@pytest.mark.parametrize("num", [2000, pytest.param(100_000, marks=pytest.mark.nightly)])
def test_any_text(num):
    """2,000 (nightly: 100,000) random answers and replies, and a long one, are read in peace."""
    pieces = [
        "```",
        "```python",
        "\n",
        " ",
        "x = 1",
        "<<<<<<< SEARCH",
        "=======",
        "a.py",
        ">>>>>>> REPLACE",
        "\0",
        "\ud800",
        "`",
        "@@ -1 +1 @@",
        "-",
        "+++ a.py",
    ]
    rng, begin = random.Random(0), time.process_time()
    for length in [30] * num + [300_000]:
        text = "".join(rng.choices(pieces, k=length))
        for found, reason in (code.last_program(text), code.patched({"a.py": "x = 1"}, text)):
            assert (found is None) != (reason is None)
    tokens = ['{"value": ', "{", "[", "]", "}", '"int": ', '"dict": ', '"x"', "1", '{"error": ']
    row = {"inputs": [[0]], "outputs": [{"x": [2]}], "fn_name": "f"}
    for _ in range(num):
        reply = Outcome(b"", ["".join(rng.choices(tokens, k=rng.randint(2, 8))).encode()], "", 0.0)
        box = SimpleNamespace(run_calls=lambda *_, reply=reply: reply)
        assert next(code.judge_calls(box, {}, "", row, code.Limits()))
    assert time.process_time() - begin < allowance(20 * num / 2000)


WORDS = """
for _ in range(int(input())):
    words = [input() for _ in range(int(input()))]
    kinds = {kind: [i for i, x in enumerate(words, 1) if x[0] + x[-1] == kind] for kind in KINDS}
    up, down, known = kinds["01"], kinds["10"], set(words)
    if not up + down and kinds["00"] and kinds["11"]:
        print(-1)
        continue
    more = max(up, down, key=len)
    free = [i for i in more if words[i - 1][::-1] not in known]
    free = free[: abs(len(up) - len(down)) // 2]
    print(len(free))
    print(*free)"""
PATHS = """
for _ in range(int(input())):
    n, m, k = map(int, input().split())
    print(-1 if max(n, m) > k else k - 1 if (n + m) % 2 else k - 2 * ((k - n) % 2))"""


@pytest.mark.skipif(not DATA.exists(), reason="needs the released example rows")
def test_released_rows():
    """For each released row a right program earns 1, the same with one sign changed 0."""
    rows = map(json.loads, DATA.read_text().splitlines())
    words = 'KINDS = ("00", "01", "10", "11")' + WORDS
    for row, program, sign in zip(rows, (words, PATHS), ("len(down)) //", "k - 2"), strict=True):
        wrong = program.replace(sign, sign.replace("//", "+").replace("-", "+"))
        for text, value in ((program, 1), (wrong, 0)):
            assert code.verify_program(row, {"content": block(text)}).value == value, text
