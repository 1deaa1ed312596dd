"""The Python tool: programs that share their names, in one session an episode."""

from nanocascade.environments.base import MAX_LATE, MAX_PROGRAM, TOLD
from nanocascade.sandbox.sandbox import shared_sandbox
from nanocascade.sandbox.session import Session

PYTHON_CALLS = 100  # the report's tool-integrated reasoning


def python_step(state, name: str, arguments: dict):
    """Run a program where the episode's earlier ones left their names.

    state: (Session or None, programs that had to be stopped). A program that is stopped ends its
    session: the next one starts without names, and after MAX_LATE none is run any more.
    """
    session, late = state
    program = arguments.get("code")
    if name != "python":
        return state, "error: no such tool"
    if not isinstance(program, str) or len(program) > MAX_PROGRAM:
        return state, f"error: code must be a text of at most {MAX_PROGRAM} characters"
    if late == MAX_LATE:
        return state, "error: no time left"
    session = session or Session(shared_sandbox(), TOLD)
    printed, ended = session.run(program)
    if ended:
        session, late = None, late + (ended in ("time limit", "asleep"))
    text = printed.rstrip("\n") + f"\nerror: {ended}; all names are lost" * bool(ended)
    return (session, late), text.strip("\n") or "no output"


def close_python(state) -> None:
    if state[0] is not None:
        state[0].close()
