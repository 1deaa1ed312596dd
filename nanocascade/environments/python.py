"""The Python tool: the programs of an episode share variables, in one sandboxed session."""

from nanocascade.environments.base import ERROR_TEXT, MAX_LATE, MAX_PROGRAM
from nanocascade.sandbox.sandbox import shared_sandbox
from nanocascade.sandbox.session import Session

PYTHON_CALLS = 100  # calls of an episode, as in the report's tool-integrated reasoning


def python_step(state, name: str, arguments: dict):
    """Run a program with the variables that the episode's earlier programs left.

    state: (Session or None, number of programs that were stopped at their limit). Stopping a
    program ends its session: the next one starts without variables. After MAX_LATE none is run.
    """
    session, late = state
    program = arguments.get("code")
    if name != "python":
        return state, "error: no such tool"
    if not isinstance(program, str) or len(program) > MAX_PROGRAM:
        return state, f"error: code must be a text of at most {MAX_PROGRAM} characters"
    if late == MAX_LATE:
        return state, "error: no time left"
    session = session or Session(shared_sandbox(), ERROR_TEXT)
    printed, ended = session.run(program)
    if ended:
        session, late = None, late + (ended in ("time limit", "asleep"))
    text = printed.rstrip("\n") + f"\nerror: {ended}; all names are lost" * bool(ended)
    return (session, late), text.strip("\n") or "no output"


def close_python(state) -> None:
    if state[0] is not None:
        state[0].close()
