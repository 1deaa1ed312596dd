r"""Programs: the last ```python block of an answer against `unit_tests`; repair: a patch, a diff or
the edits of an episode in a repository (environments/).

unit_tests takes one of three forms, and every test must pass: the reward is 1 or 0.

    {"inputs": ["1 2\n"], "outputs": ["3\n"]}                            a program: stdin -> stdout
    {"inputs": [[[1, 2], 3]], "outputs": [5], "fn_name": "f"}            f([1, 2], 3) == 5
    {"asserts": ["from math import isclose", "assert isclose(f(2), 4)"]} test code that calls it

Programs run in the sandbox; verdicts are made here, on plain data, or for test code in a process
that the program cannot touch. `verifier_metadata` may set "cpu_seconds" for a test (4); all tests
together get ten times that. Verdicts are remembered, since the answers of a group repeat.

Not covered in test code, where a function of the program is a call into another process: what is no
plain data (methods of what it returns; functions, bytes or objects as its arguments), an argument
that it changes in place, and modules beside the library and the program's own.
"""

import hashlib
import json
import math
import re
import threading
from decimal import Decimal

from nanocascade.environments.base import MAX_PROGRAM
from nanocascade.environments.repository import HUNK, edited, modules_of, patched
from nanocascade.environments.shop import MAX_CALLS
from nanocascade.rewards.base import Reward
from nanocascade.rewards.unit_tests import (
    check_seconds,
    check_unit_tests,
    foreign_names,
    read_calls,
)
from nanocascade.sandbox.jail import encode
from nanocascade.sandbox.sandbox import Limits, read_reply, shared_sandbox

PYTHON = ("python", "py", "python3")
MAX_VERDICTS = 20_000
NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?", re.ASCII)
FENCE = re.compile(r"(\s*)(`{3,}|~{3,})[ \t]*([\w+#.-]*)(?!.*\2)")  # indentation, marks, language

lock, verdicts = threading.Lock(), {}  # digest of a program and its tests -> Reward, oldest first


def last_program(text, languages=PYTHON):
    """(program, None) of the last block in one of the languages, or (None, reason).

    Blocks of other languages are passed over; one without a language counts where there is none of
    ours. A block that is never closed is the last one: the answer was cut short, and an earlier
    draft is not what it would have ended with.
    """
    fence, language, indent, lines, programs = "", "", 0, [], {}  # of the block that we are in
    for line in re.split("\r?\n", text):
        match = FENCE.match(line)
        if not fence and match:
            fence, language, lines = match[2], match[3].lower(), []
            indent = len(match[1].expandtabs())
        elif fence and match and match[2].startswith(fence) and match[3].lower() not in languages:
            programs[language if language not in languages else languages[0]] = "\n".join(lines)
            fence = ""
        elif fence:
            lines.append(line[min(indent, len(line) - len(line.lstrip())) :])
    if fence and language in languages:
        return None, "unfinished code block"
    program = programs.get(languages[0], programs.get(""))
    if program is None:
        return None, "no code block"
    return (program, None) if len(program) <= MAX_PROGRAM else (None, "program too long")


def close(a, b):
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-6)


def same_token(expected, printed):
    """The same text, or numbers one of which is written with a point: whole ones are equal, others
    nearly. "2" is "2.000", "0.5" is "0.5000001"."""
    if expected == printed or len(printed) > 100:
        return expected == printed
    numbers = NUMBER.fullmatch(expected) and NUMBER.fullmatch(printed)
    if not numbers or not re.search("[.eE]", expected + printed):
        return False
    a, b = float(expected), float(printed)
    if math.isinf(a) or a.is_integer() and (b.is_integer() or not re.search("[.eE]", expected)):
        return Decimal(expected) == Decimal(printed)
    return close(a, b)


def same_output(expected, printed):
    """Line by line, token by token; blank lines do not count, indentation only where expected."""
    texts = expected, printed
    wanted, given = ([x.rstrip() for x in text.split("\n") if x.strip()] for text in texts)
    if len(wanted) != len(given):
        return False
    drawn = any(line[:1].isspace() for line in wanted)
    for a, b in zip(wanted, given, strict=True):
        if drawn and len(a) - len(a.lstrip()) != len(b) - len(b.lstrip()):
            return False
        a, b = a.split(), b.split()
        if len(a) != len(b) or not all(map(same_token, a, b)):
            return False
    return True


def same_value(expected, data):
    """A JSON value and what a function returned, as jail.encode writes it, forged or not.

    Tuples are lists, whole keys text, floats may differ a little. No set or dictionary is made of
    the program's own numbers, which it could choose to collide.
    """
    if isinstance(data, dict):
        ((kind, data),) = data.items()
        if kind == "int":
            data = int(data, 16)
        elif kind == "dict":
            data = {str(key): item for key, item in data}
            return (
                isinstance(expected, dict)
                and expected.keys() == data.keys()
                and all(same_value(expected[key], data[key]) for key in expected)
            )
        elif kind != "tuple":
            return False
    if isinstance(expected, list) and isinstance(data, list):
        return len(expected) == len(data) and all(map(same_value, expected, data))
    if isinstance(expected, float) and isinstance(data, float):
        return expected == data or close(expected, data)
    return expected == data and isinstance(expected, bool) == isinstance(data, bool)


def judge_calls(sandbox, modules, entry, tests, limits):
    """Reasons, one a test (None: passed), of function tests: one child answers all the calls."""
    calls, outputs = read_calls(tests)
    lines = [[tests["fn_name"], *map(encode, (args, {}, other))] for args, other in calls]
    limits = limits._replace(output=limits.output + 8 * len(json.dumps(outputs)))
    outcome = sandbox.run_calls(modules, entry, lines, limits)
    for number, accepted in enumerate(outputs):
        data, reason = read_reply(outcome, number)
        try:
            wrong = reason is None and not any(same_value(value, data) for value in accepted)
        except (ValueError, TypeError):  # forged, and badly
            wrong = True
        last = number == len(outputs) - 1  # all may be right, and yet over a limit
        yield "wrong output" if wrong else reason or (outcome.ended if last else None)


def judge_scripts(sandbox, modules, entry, tests, limits):
    """The same for programs that read and print: each test has its own child."""
    left = limits.total_seconds
    for stdin, expected in zip(tests["inputs"], tests["outputs"], strict=True):
        limits = limits._replace(total_seconds=left, output=(1 << 16) + 4 * len(expected))
        stdin = stdin.encode(errors="surrogatepass")
        outcome = sandbox.run_script(modules, entry, stdin, limits)
        left -= outcome.cpu_seconds
        reason = outcome.ended or (read_reply(outcome, 0)[1] if outcome.replies else None)
        if reason is None and not same_output(expected, outcome.stdout.decode(errors="replace")):
            reason = "wrong output"
        yield reason if left > 0 else "time limit"


def judge_asserts(sandbox, modules, entry, tests, limits):
    """The same for test code, in a process that no program has touched."""
    names, imports = foreign_names(tests["asserts"], modules[entry])
    sources = ["".join(f"import {x}\n" for x in imports) + tests["asserts"][0]]
    sources += tests["asserts"][1:]
    program, checks = sandbox.run_tests(modules, entry, sources, sorted(names), limits)
    for number in range(len(tests["asserts"])):
        _, reason = read_reply(checks, number)
        if reason == "crashed: EOFError":
            reason = program.ended or "ended early"
        yield "wrong output" if reason == "crashed: AssertionError" else reason


def judge(modules, entry, row):
    """Run a program against its row's tests, or remember how that went. Safe in threads."""
    tests = row["verifier_metadata"]["unit_tests"]
    seconds = row["verifier_metadata"].get("cpu_seconds", 4.0)
    key = hashlib.sha256(json.dumps([modules, entry, tests, seconds]).encode()).digest()
    if known := verdicts.get(key):
        return known
    judges = judge_calls if tests.get("fn_name") else judge_scripts
    judges = judge_asserts if "asserts" in tests else judges
    limits, reward = Limits(seconds, 10 * seconds, output=1 << 16), Reward(1.0, "all tests pass")
    for number, reason in enumerate(judges(shared_sandbox(), modules, entry, tests, limits), 1):
        if reason:
            where = "" if reason == "syntax error" else f" on test {number}"
            reward = Reward(0.0, reason + where)
            break
    if not reward.reason.startswith("asleep"):  # all else would happen again
        with lock:
            verdicts[key] = reward
            if len(verdicts) > MAX_VERDICTS:
                del verdicts[next(iter(verdicts))]
    return reward


def check_tests(row):
    """ValueError for a row whose unit_tests cannot be run, or tell nothing of a program."""
    metadata = row["verifier_metadata"]
    check_seconds(metadata)
    entry = metadata["entry"] if "files" in metadata else "solution.py"
    check_unit_tests(metadata["unit_tests"], modules_of({entry: ""})[1][entry])


def verify_program(row, message):
    """The last ```python block of the answer against the row's unit_tests."""
    program, reason = last_program(message["content"])
    return Reward(0.0, reason) if reason else judge({"solution": program}, "solution", row)


def judge_files(files, row):
    """The entry module of a repository against the row's tests."""
    modules, names = modules_of(files)
    return judge(modules, names[row["verifier_metadata"]["entry"]], row)


def repaired(row, message):
    """(the row's files with the answer's patch, or its ```python block as the entry file; None), or
    (None, reason)."""
    metadata, text = row["verifier_metadata"], message["content"]
    if "<<<<<<< SEARCH" in text or HUNK.search(text) or "entry" not in metadata:
        return patched(metadata["files"], text)
    program, reason = last_program(text)
    return (None, reason) if reason else ({**metadata["files"], metadata["entry"]: program}, None)


def verify_repair(row, message):
    """What the row's tests say to its files as the answer repairs them."""
    files, reason = repaired(row, message)
    return Reward(0.0, reason) if reason else judge_files(files, row)


def verify_episode(row, message):
    """A repository after the edits of an episode, played again, against tests it never saw."""
    files = before = row["verifier_metadata"]["files"]
    for call in message["tool_calls"][:MAX_CALLS]:
        if call["function"]["name"] == "edit":
            files, _ = edited(files, call["function"]["arguments"])
    return judge_files(files, row) if files != before else Reward(0.0, "nothing was edited")


def check_files(row):
    """ValueError for a repository whose files are no texts, or lack the module to be tested, or the
    patch that a judge compares with where there are no tests."""
    metadata = row["verifier_metadata"]
    if not all(isinstance(x, str) for x in metadata["files"].values()):
        raise ValueError("files must be {path: text}")
    if "unit_tests" not in metadata and "environment" not in row:
        metadata["patch"]
        return
    entry = metadata["entry"]
    if entry not in metadata["files"] or not entry.endswith(".py"):
        raise ValueError(f"entry {entry!r} is no Python file of {sorted(metadata['files'])}")
    check_tests(row)
