"""What environments share: how a tool is declared, and a program run for the model."""

from nanocascade.sandbox.sandbox import LIMITS, read_reply, shared_sandbox

MAX_RESULT = 8_000  # characters of one result
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


def run(modules: dict, entry: str, late: int):
    """(late, one more if it had to be stopped; what modules[entry] printed and how it was ended)"""
    if late == MAX_LATE:
        return late, "error: no time left"
    outcome = shared_sandbox().run_script(modules, entry, limits=LIMITS)
    printed = outcome.stdout.decode(errors="replace").rstrip("\n")
    failed = outcome.ended or read_reply(outcome, 0)[1]
    text = "\n".join(filter(None, [printed, f"error: {failed}" if failed else ""])) or "no output"
    return late + (outcome.ended in ("time limit", "asleep")), text


MAX_PROGRAM = 1 << 18  # characters; Codeforces takes 65,536 bytes
