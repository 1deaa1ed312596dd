"""Parse a model's response: its thought, its text and its tool calls."""

import re
from pathlib import Path

from nanocascade.tokenizer.messages import parse_json

MARKUP = (
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
IM_START, IM_END, THINK, THINK_END, CALL, CALL_END, RESULT, RESULT_END = MARKUP
JSON_TYPES = {
    int: "integer",
    float: "number",
    bool: "boolean",
    list: "array",
    dict: "object",
    type(None): "null",
}
# The chat format of Nemotron 3 Nano and of Nemotron-Cascade 2: the toy's template.
TEMPLATE = (Path(__file__).with_name("templates") / "nemotron3.jinja").read_text("utf-8")


def split_thought(text):
    """(thought or None, answer, unfinished) of "<think>\\nthought\\n</think>\\nanswer"."""
    if not text.lstrip().startswith(THINK):
        return None, text, False
    thought, closed, answer = text.lstrip()[len(THINK) :].partition(THINK_END)
    thought = thought.removeprefix("\n").removesuffix("\n" if closed else "")
    # Nemotron 3 puts one newline before the answer, Qwen3 two.
    return thought, answer.removeprefix("\n").removeprefix("\n"), not closed


def parse_response(text, tools=None):
    """The message in what follows "<|im_start|>assistant\\n", whatever a model wrote; never raises.

    "<think>\\nadd\\n</think>\\n4<|im_end|>" -> content "4", reasoning_content "add", no tool_calls.
    unfinished: <think> was never closed, so there is no answer. A call that does not parse stays in
    the content. XML arguments take the type that `tools` declares if they fit, else stay strings.
    """
    thought, rest, unfinished = split_thought(text.removesuffix("\n").removesuffix(IM_END))
    (first, *blocks), calls = rest.split(CALL), []
    kept = [first]  # joined at the end: thousands of calls must not cost their square
    for block in blocks:  # the closing tag may stand in a text of the call, too
        for body, closed, after in (block.partition(CALL_END), block.rpartition(CALL_END)):
            if call := closed and _parse_call(body.strip(), tools or []):
                calls.append({"type": "function", "function": call})
                kept.append(after.removeprefix("\n"))
                break
        else:
            kept.append(CALL + block)
    content = "".join(kept)
    return {
        "role": "assistant",
        "content": content.strip("\n") if calls else content,
        "reasoning_content": thought if thought and thought.strip() else None,
        "tool_calls": calls,
        "unfinished": unfinished,
    }


def _parse_call(body, tools):
    """{"name", "arguments"} of the inside of a call, in JSON or in Nemotron's XML, or None."""
    if not body.startswith(("{", "<")):  # failing to parse takes longer
        return None
    call = parse_json(body, object_pairs_hook=_distinct)
    if isinstance(call, dict) and isinstance(call.get("name"), str):
        if "arguments" not in call and "parameters" in call:  # Llama 3.1's word: not this form
            return None
        arguments = parse_json(call.get("arguments", {}))
        return {"name": call["name"], "arguments": arguments} if type(arguments) is dict else None
    match = re.fullmatch(r"<function=([^>\n]+)>(.*)</function>", body, re.DOTALL)
    if not match:
        return None
    # A value may contain anything but its own end followed by another parameter, or by the end.
    *fields, rest = re.split(r"\n?</parameter>\s*(?=<parameter=|\Z)", match[2])
    pairs = [re.fullmatch(r"\s*<parameter=([^>\n]+)>\n?(.*)", f, re.DOTALL) for f in fields]
    if rest.strip() or None in pairs or len({p[1] for p in pairs}) < len(pairs):
        return None
    declared = {t.get("name"): t for t in (tool.get("function", tool) for tool in tools)}
    schema = declared.get(match[1], {}).get("parameters") or {}
    types = {
        key: field.get("type")
        for key, field in (schema.get("properties") or {}).items()
        if isinstance(field, dict)
    }  # `true` is a schema too
    return {"name": match[1], "arguments": {p[1]: _coerce(p[2], types.get(p[1])) for p in pairs}}


def _coerce(text, kinds):
    """'2' -> 2 where an integer is declared; a text that is no such value stays a string."""
    value = parse_json({"True": "true", "False": "false", "None": "null"}.get(text, text))
    kinds = [kinds] if isinstance(kinds, str) else kinds or []
    kind = JSON_TYPES.get(type(value))
    fits = kind in kinds or kind == "integer" and "number" in kinds
    return value if fits and "string" not in kinds else text


def _distinct(pairs):
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key that comes twice")
    return dict(pairs)
