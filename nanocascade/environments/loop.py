"""Environments: what answers a model's tool calls, turn by turn, in RL and in sample.py.

A row names one, {"environment": {"name": "repository"}, ...}, and carries what it starts from:

    shop         the toy's: stock and orders of environment.state (shop.py)
    python       programs, for any row; what they print comes back, and names stay
    repository   verifier_metadata {"files": {path: text}, "entry": "pkg/module.py", "unit_tests"}:
                 files to list, read, search, edit and test; the tests, which the model never
                 sees, of the entry module are the reward

A step maps (state, call) to (new state, text). States are plain values, never changed in place: no
episode can see another's, and a repository is a dictionary of texts, with no folder on a disk to
protect and to remove. (Python's state is a process of its own, which `end_episode` ends.) A
verifier plays the edits again (rewards/code.py): they are a pure function of row and calls, so that
nothing in a transcript has to be believed or carried along.

Whatever a model asks for, a step returns: programs run in the sandbox under its CPU limit, and a
result has at most MAX_RESULT characters. Not covered: the sandbox has the standard library and the
repository's own modules, no third-party package (not even pytest) and no files; a program that
prints the time or an unseeded random number prints another one when a run is resumed.
"""

from typing import NamedTuple

from nanocascade.environments.base import MAX_RESULT, make_tool
from nanocascade.environments.python import PYTHON_CALLS, close_python, python_step
from nanocascade.environments.repository import REPOSITORY_TOOLS, repository_step
from nanocascade.environments.shop import MAX_CALLS, run_tool

# ---- One loop for all ----------------------------------------------------------------------------


class Environment(NamedTuple):
    tools: list | None  # what a row declares that declares no tools of its own
    start: object  # function row -> state
    step: object  # function (state, name, arguments) -> (state, text)
    max_calls: int  # of an episode
    close: object = lambda state: None  # function state -> None, once the episode is over


ENVIRONMENTS = {
    "shop": Environment(
        None,
        lambda row: row["environment"]["state"],
        lambda state, name, values: run_tool(state, {"name": name, "arguments": values}),
        MAX_CALLS,
    ),
    "python": Environment(
        [make_tool("python", "Run Python code. Returns its output; names stay.", code="string")],
        lambda row: (None, 0),
        python_step,
        PYTHON_CALLS,
        close_python,
    ),
    "repository": Environment(
        REPOSITORY_TOOLS,
        lambda row: (row["verifier_metadata"]["files"], 0),
        repository_step,
        MAX_CALLS,
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


def end_episode(row: dict, played) -> None:
    """Free what the episode's environment holds; `played` as `answer` returned it, or None."""
    if played is not None:
        ENVIRONMENTS[row["environment"]["name"]].close(played[1])
