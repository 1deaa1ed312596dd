"""Environments: what answers a model's tool calls, turn by turn, in RL and in sample.py.

A row names one, {"environment": {"name": "repository"}, ...}, and carries what it starts from:

    shop         the toy's: stock and orders of environment.state (rewards/tools.py)
    python       a program a call, for any row; what it prints comes back
    repository   verifier_metadata {"files": {path: text}, "entry": "pkg/module.py", "unit_tests"}:
                 files to list, read, search, edit and test; the tests, which the model never
                 sees, of the entry module are the reward

A step maps (state, call) to (new state, text). States are plain values, never changed in place: no
episode can see another's, and a repository is a dictionary of texts, with no folder on a disk to
protect and to remove. A verifier plays the edits again (rewards/code.py): they are a pure function
of row and calls, so that nothing in a transcript has to be believed or carried along.

Whatever a model asks for, a step returns: programs run in the sandbox under its CPU limit, and a
result has at most MAX_RESULT characters. Not covered: the sandbox has the standard library and the
repository's own modules, no third-party package (not even pytest) and no files; a program that
prints the time or an unseeded random number prints another one when a run is resumed.
"""

import re
from typing import NamedTuple

from nanocascade.rewards import code, tools
from nanocascade.sandbox.sandbox import LIMITS

MAX_RESULT = 8_000  # characters of one result
PYTHON_CALLS = 100  # the report's tool-integrated reasoning
MAX_LATE = 3  # programs of an episode that had to be stopped; then none is run any more


def make_tool(name: str, description: str, optional=(), **parameters: str) -> dict:
    """A function in the API's form; parameters: {name: JSON type}."""
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    required = [key for key in parameters if key not in optional]
    schema = {"type": "object", "properties": properties, "required": required}
    function = {"name": name, "description": description, "parameters": schema}
    return {"type": "function", "function": function}


# ---- What runs programs --------------------------------------------------------------------------

# Our own text, run in the sandbox around the model's: an exception, with its place, is output.
TOLD = """
def told(error):
    trace, place = error.__traceback__, ""
    while trace:
        frame, line = trace.tb_frame, trace.tb_lineno
        if frame.f_code.co_filename in ("program.py", "<string>"):
            place = f" ({frame.f_globals['__name__']}, line {line})"
        trace = trace.tb_next
    return f"{type(error).__name__}: {error}{place}"
"""
PROGRAM = (
    TOLD
    + """
try:
    exec(compile(%r, "program.py", "exec"), {"__name__": "__main__"})
except SystemExit:
    pass
except BaseException as error:
    print(told(error))
"""
)
TESTS = (
    TOLD
    + """
import importlib, sys
passed = failed = 0
for name in %r:
    found = {name: lambda: importlib.import_module(name)}
    try:
        values = vars(importlib.import_module(name)).items()
        found = {k: v for k, v in values if k.startswith("test") and callable(v)}
        if unittest := sys.modules.get("unittest"):
            for case in [v for _, v in values if isinstance(v, type)]:
                if issubclass(case, unittest.TestCase):
                    suite = unittest.defaultTestLoader.loadTestsFromTestCase(case)
                    found.update({test.id(): test.debug for test in suite})
    except BaseException as error:
        pass  # importing it again fails again, as a test
    for test, run in found.items():
        try:
            run()
            passed += 1
        except BaseException as error:
            failed += 1
            print(f"FAILED {name}: {test}: {told(error)}")
print(f"{passed} passed, {failed} failed")
"""
)


def run(modules: dict, entry: str, late: int):
    """(late, one more if it had to be stopped; what modules[entry] printed and how it was ended)"""
    if late == MAX_LATE:
        return late, "error: no time left"
    outcome = code.shared_sandbox().run_script(modules, entry, limits=LIMITS)
    printed = outcome.stdout.decode(errors="replace").rstrip("\n")
    failed = outcome.ended or code.read_reply(outcome, 0)[1]
    text = "\n".join(filter(None, [printed, f"error: {failed}" if failed else ""])) or "no output"
    return late + (outcome.ended in ("time limit", "asleep")), text


def python_step(late: int, name: str, arguments: dict):
    """One program, which starts afresh: nothing of an earlier call is left but its output."""
    program = arguments.get("code")
    if name != "python":
        return late, "error: no such tool"
    if not isinstance(program, str) or len(program) > code.MAX_PROGRAM:
        return late, f"error: code must be a text of at most {code.MAX_PROGRAM} characters"
    return run({"main": PROGRAM % program}, "main", late)


# ---- Repositories --------------------------------------------------------------------------------


def list_files(files: dict, folder: str = "") -> str:
    sizes = {x: files[x].count("\n") + 1 for x in sorted(files) if x.startswith(folder)}
    return "\n".join(f"{path} ({n} lines)" for path, n in sizes.items()) or "no such files"


def read_file(files: dict, path: str = "", first: str = "1", last: str = "") -> str:
    if path not in files:
        return f"error: no file {path}"
    lines = files[path].split("\n")
    if not all(re.fullmatch(r"\d{1,9}", x) for x in (first, last or "0")):
        return f"error: first and last are line numbers from 1 to {len(lines)}"
    return "\n".join(lines[max(int(first) - 1, 0) : int(last or len(lines))])


def search(files: dict, text: str = "") -> str:
    """Lines that contain a text as it stands: a pattern of the model's could take for ever."""
    found = [
        f"{path}:{i}: {line}"
        for path in sorted(files)
        if text in files[path] and text
        for i, line in enumerate(files[path].split("\n"), 1)
        if text in line
    ]
    return "\n".join(found) or "not found"


def run_tests(files: dict, late: int, path: str = ""):
    """Functions called test* and unittest's cases of one file, or of all that are called tests."""
    modules, names = code.modules_of(files)
    tests = [x for x in sorted(names) if re.search(r"(^|/)test_[^/]*$|_test\.py$", x)]
    if path and path not in names:
        return late, f"error: no Python file {path}"
    chosen = [names[x] for x in ([path] if path else tests)]
    if not chosen:
        return late, "no tests"
    return run({**modules, "run tests": TESTS % chosen}, "run tests", late)


LOOKING = {"list": list_files, "read": read_file, "search": search}
REPOSITORY_TOOLS = [
    make_tool("list", "Paths of the files.", ("folder",), folder="string"),
    make_tool(
        "read",
        "Lines of a file.",
        ("first", "last"),
        path="string",
        first="integer",
        last="integer",
    ),
    make_tool("search", "Lines that contain a text.", text="string"),
    make_tool(
        "edit",
        "Replace a text that occurs once; an empty old makes a new file.",
        path="string",
        old="string",
        new="string",
    ),
    make_tool("test", "Run the tests of a file, or all.", ("path",), path="string"),
]


def repository_step(state: tuple, name: str, arguments: dict):
    """(files, late) after a call, and what it says; only an edit changes the files."""
    files, late = state
    if name == "edit":
        files, text = code.edited(files, arguments)
        return (files, late), text
    declared = {x["function"]["name"]: x["function"]["parameters"] for x in REPOSITORY_TOOLS}
    if name not in declared:
        return state, "error: no such tool"
    known = {
        k: str(v)
        for k, v in arguments.items()
        if k in declared[name]["properties"] and type(v) in (str, int)
    }
    if name == "test":
        late, text = run_tests(files, late, **known)
        return (files, late), text
    return state, LOOKING[name](files, **known)


# ---- One loop for all ----------------------------------------------------------------------------


class Environment(NamedTuple):
    tools: list | None  # what a row declares that declares no tools of its own
    start: object  # function row -> state
    step: object  # function (state, name, arguments) -> (state, text)
    max_calls: int  # of an episode


ENVIRONMENTS = {
    "shop": Environment(
        None,
        lambda row: row["environment"]["state"],
        lambda state, name, values: tools.run_tool(state, {"name": name, "arguments": values}),
        tools.MAX_CALLS,
    ),
    "python": Environment(
        [make_tool("python", "Run a program; what it prints comes back.", code="string")],
        lambda row: 0,
        python_step,
        PYTHON_CALLS,
    ),
    "repository": Environment(
        REPOSITORY_TOOLS,
        lambda row: (row["verifier_metadata"]["files"], 0),
        repository_step,
        tools.MAX_CALLS,
    ),
}


def equip(row: dict) -> dict:
    """The row, with the tools of its environment where it declares none; ValueError if it names an
    environment that there is not, or lacks what that one starts from."""
    if "environment" not in row:
        return row
    name = row["environment"]["name"]
    if name not in ENVIRONMENTS:
        raise ValueError(f"environment {name!r} is unknown; there are {', '.join(ENVIRONMENTS)}")
    ENVIRONMENTS[name].start(row)
    params = row["responses_create_params"]
    declared = params.get("tools") or ENVIRONMENTS[name].tools
    return row | {"responses_create_params": params | {"tools": declared}}


def answer(row: dict, played, call: dict):
    """((number of calls, state) after one more call, its result); played: that before, or None."""
    environment = ENVIRONMENTS[row["environment"]["name"]]
    number, state = played or (0, environment.start(row))
    if number == environment.max_calls:
        return (number, state), "error: no calls left"
    state, text = environment.step(state, call["name"], call["arguments"])
    if (more := len(text) - MAX_RESULT) > 0:
        half = MAX_RESULT // 2
        text = f"{text[:half]}\n... {more} characters left out ...\n{text[-half:]}"
    # Half a character, which JSON can carry, is none that a tokenizer reads.
    return (number + 1, state), text.encode(errors="replace").decode()
