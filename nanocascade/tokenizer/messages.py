"""Chat messages and tools in the one form that chat templates are given.

    {"role": "assistant", "content": "4", "reasoning_content": "two and two",
     "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]}

Every field of a message is used, or is known to change no text; another one is refused by name,
since what it holds would be lost without a word.
"""

import json

from nanocascade.files import check_keys, present

THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # one thing under the names of servers
USED = {"role", "content", "tool_calls", "tool_call_id", "name", *THOUGHTS}
WITHOUT_EFFECT = {"id", "status", "index", "annotations", "logprobs", "finish_reason"}
WITHOUT_EFFECT |= {"unfinished"}  # of parse_response, on an answer that was cut in its thought
# OpenAI's weight 0 would mean: do not train this turn.
FIXED = {"type": ("message",), "weight": (1,)}
ROLES = ("system", "user", "assistant", "tool")
TEXT_PARTS = ("text", "input_text", "output_text")


def chat_form(items) -> list[dict]:
    """Messages in the form above, of a list of messages or of one question as a string."""
    items = [{"role": "user", "content": items}] if isinstance(items, str) else items
    return [message_form(item) for item in items]


def message_form(item: dict) -> dict:
    """One message: its content as a string, its thought as reasoning_content, its calls as objects.

    Raises ValueError for a role, field or part of the content that no template would be given.
    """
    given = present(item)
    role = {"developer": "system"}.get(item.get("role"), item.get("role"))
    if role not in ROLES:
        raise ValueError(f"a message of role {role!r} and type {item.get('type')!r}")
    check_keys("a message", given, USED, WITHOUT_EFFECT, FIXED)
    if role == "user" and item.get("content") is None:
        raise ValueError("a user's message has no content")
    message = {"role": role, "content": text_of(given.get("content", ""))}
    message |= {key: given[key] for key in ("name", "tool_call_id") if key in given}
    thoughts = [given[key] for key in THOUGHTS if key in given]
    calls = given.get("tool_calls", [])
    if role != "assistant" and (thoughts or calls):
        raise ValueError(f"a thought or a call of the {role}: {item}")
    if any(x != thoughts[0] or not isinstance(x, str) for x in thoughts):
        raise ValueError(f"the thought must be one string, got {thoughts}")
    if thoughts and thoughts[0].strip():
        message["reasoning_content"] = thoughts[0]
    if calls:
        message["tool_calls"] = [call_form(call) for call in calls]
    return message


def text_of(content) -> str:
    """A content as one string: text parts are joined, other parts are refused."""
    if isinstance(content, str):
        return content
    parts = [{"text": part} if isinstance(part, str) else part for part in content]
    for part in parts:
        if part.get("type", "text") not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise ValueError(f"a part of a content must be text, got {part}")
    return "".join(part["text"] for part in parts)


def call_form(call: dict) -> dict:
    """A tool call with its arguments as an object; the API writes them as a JSON string."""
    function = call.get("function", call)
    name, arguments = function.get("name"), parse_json(function.get("arguments") or {})
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError(f"a call needs a name, and an object as arguments, got {call}")
    form = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return form | ({"id": call["id"]} if call.get("id") else {})


def parse_json(x, **options):
    """The value of a JSON string; x itself if it is none."""
    try:
        return json.loads(x, **options) if isinstance(x, str) else x
    except (ValueError, RecursionError):  # no JSON, an integer too long, or brackets too deep
        return x


def tools_form(tools) -> list[dict] | None:
    """Declared tools as {"type": "function", "function": {...}}; some rows leave the level out."""
    forms = []
    for tool in tools or []:
        if "function" not in tool:
            inner = {key: x for key, x in tool.items() if key != "type"}
            tool = {"type": "function", "function": inner}
        forms.append(tool)
    return forms or None
