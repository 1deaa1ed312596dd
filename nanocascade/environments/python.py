"""The Python tool: a program a call."""

from nanocascade.environments.base import MAX_PROGRAM, TOLD, run

PYTHON_CALLS = 100  # the report's tool-integrated reasoning
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


def python_step(late: int, name: str, arguments: dict):
    """One program, which starts afresh: nothing of an earlier call is left but its output."""
    program = arguments.get("code")
    if name != "python":
        return late, "error: no such tool"
    if not isinstance(program, str) or len(program) > MAX_PROGRAM:
        return late, f"error: code must be a text of at most {MAX_PROGRAM} characters"
    return run({"main": PROGRAM % program}, "main", late)
