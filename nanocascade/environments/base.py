"""Shared by the environments: declare a tool, run a program that the model wrote."""

from nanocascade.sandbox.sandbox import LIMITS, read_reply, shared_sandbox

MAX_RESULT = 8_000  # characters of one result
MAX_LATE = 3  # programs of an episode that may exceed their time; after that none is run


def make_tool(name: str, description: str, optional=(), **parameters: str) -> dict:
    """A function in the API's form; parameters: {name: JSON type}."""
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    required = [key for key in parameters if key not in optional]
    schema = {"type": "object", "properties": properties, "required": required}
    function = {"name": name, "description": description, "parameters": schema}
    return {"type": "function", "function": function}


# ---- Programs ------------------------------------------------------------------------------------

# Source of error_text(error), run in the sandbox beside the model's program: the text of an
# exception, with the line of the program that raised it.
ERROR_TEXT = """
def error_text(error):
    trace, place = error.__traceback__, ""
    while trace:
        frame, line = trace.tb_frame, trace.tb_lineno
        if frame.f_code.co_filename in ("program.py", "<string>"):
            place = f" ({frame.f_globals['__name__']}, line {line})"
        trace = trace.tb_next
    return f"{type(error).__name__}: {error}{place}"
"""


def run(modules: dict, entry: str, late: int):
    """Run modules[entry]: (late, plus 1 if the program was stopped; its output and its end)."""
    if late == MAX_LATE:
        return late, "error: no time left"
    outcome = shared_sandbox().run_script(modules, entry, limits=LIMITS)
    printed = outcome.stdout.decode(errors="replace").rstrip("\n")
    failed = outcome.ended or read_reply(outcome, 0)[1]
    text = "\n".join(filter(None, [printed, f"error: {failed}" if failed else ""])) or "no output"
    return late + (outcome.ended in ("time limit", "asleep")), text


MAX_PROGRAM = 1 << 18  # characters; Codeforces takes 65,536 bytes
