"""Environments answer a model's tool calls, turn by turn, in RL and in sample.py.

A row names its environment, {"environment": {"name": "repository"}, ...}, and has its start state:

    shop         the toy's shop: stock and orders of environment.state (shop.py)
    python       programs, for any row; their output is the result, and variables persist
    repository   verifier_metadata {"files": {path: text}, "entry": "pkg/module.py", "unit_tests"}:
                 files to list, read, search, edit and test; the tests, which the model never
                 sees, of the entry module are the reward

A step maps (state, call) to (new state, text). States are plain values that are never changed in
place, so episodes cannot see each other, and a repository is a dictionary of texts without a folder
on the disk. (Python's state is a process, which `end_episode` ends.) The edits are a pure function
of row and calls: a verifier repeats them (rewards/code.py) and need not trust the transcript.

A step always returns: programs run in the sandbox under its CPU limit, and a result has at most
MAX_RESULT characters. Limits of this: the sandbox has the standard library and the
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
    tools: list | None  # default tools, for a row that declares none
    start: object  # function row -> state of a new episode
    step: object  # function (state, name, arguments) -> (state, text)
    max_calls: int  # calls of an episode that are answered
    close: object = lambda state: None  # function state -> None, once the episode is over


ENVIRONMENTS = {
    "shop": Environment(
        None,
        lambda row: row["environment"]["state"],
        run_tool,
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
    """The row with its environment's tools if it declares none. Raises ValueError for an unknown
    environment and for a row without the start state that it needs."""
    if "environment" not in row:
        return row
    name = row["environment"]["name"]
    if name not in ENVIRONMENTS:
        raise ValueError(f"environment {name!r} is unknown; there are {', '.join(ENVIRONMENTS)}")
    ENVIRONMENTS[name].start(row)
    params = row["responses_create_params"]
    declared = params.get("tools") or ENVIRONMENTS[name].tools
    return row | {"responses_create_params": params | {"tools": declared}}


def answer(row: dict, progress, call: dict):
    """((number of calls, state) after one more call, its result).

    progress: the pair before the call, None before the first."""
    environment = ENVIRONMENTS[row["environment"]["name"]]
    number, state = progress or (0, environment.start(row))
    if number == environment.max_calls:
        return (number, state), "error: no calls left"
    state, text = environment.step(state, call["name"], call["arguments"])
    if (more := len(text) - MAX_RESULT) > 0:
        half = MAX_RESULT // 2
        text = f"{text[:half]}\n... {more} characters left out ...\n{text[-half:]}"
    # JSON can hold a lone surrogate, which cannot be encoded for the tokenizer.
    return (number + 1, state), text.encode(errors="replace").decode()


def end_episode(row: dict, progress) -> None:
    """Close the episode's environment. progress: as `answer` returned it, or None."""
    if progress is not None:
        ENVIRONMENTS[row["environment"]["name"]].close(progress[1])
