"""Shared by the environments: their limits, the form of a tool, the text of an exception."""

MAX_PROGRAM = 1 << 18  # characters; Codeforces takes 65,536 bytes
MAX_RESULT = 8_000  # characters of one result
MAX_LATE = 3  # programs of an episode that may exceed their time; after that none is run


def make_tool(name: str, description: str, optional=(), **parameters: str) -> dict:
    """A function in the API's form; parameters: {name: JSON type}."""
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    required = [key for key in parameters if key not in optional]
    schema = {"type": "object", "properties": properties, "required": required}
    function = {"name": name, "description": description, "parameters": schema}
    return {"type": "function", "function": function}


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
