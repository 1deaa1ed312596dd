"""Chat messages and tools in the one form that chat templates are given.

    {"role": "assistant", "content": "4", "reasoning_content": "two and two",
     "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]}

Every field of a message is used, or is known to change no text; another one is refused by name,
since what it holds would be lost without a word. A null or empty field counts as absent.
"""

import json

THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # one thing under the names of servers
USED = {"role", "content", "tool_calls", "tool_call_id", "name", *THOUGHTS}
WITHOUT_EFFECT = {"id", "type", "status", "index", "annotations", "logprobs", "finish_reason"}
WITHOUT_EFFECT |= {"unfinished"}  # of parse_response, on an answer that was cut in its thought
FIXED = {"type": "message", "weight": 1}  # OpenAI's weight 0 would mean: do not train this turn
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
    given = {key: x for key, x in item.items() if x not in (None, [], {}, "")}
    role = {"developer": "system"}.get(item.get("role"), item.get("role"))
    if role not in ROLES:
        raise ValueError(f"a message of role {role!r} and type {item.get('type')!r}")
    for key, value in FIXED.items():
        if given.get(key, value) != value:
            raise ValueError(f"{key} {given[key]!r} of a message is not supported")
    if unknown := sorted(set(given) - USED - WITHOUT_EFFECT - set(FIXED)):
        raise ValueError(f"a message holds {', '.join(unknown)}, which would be lost: {item}")
    if role == "user" and item.get("content") is None:
        raise ValueError("a user's message has no content")
    message = {"role": role, "content": text_of(item.get("content"))}
    message |= {key: given[key] for key in ("name", "tool_call_id") if key in given}
    thoughts = [item[key] for key in THOUGHTS if item.get(key) is not None]
    if any(thoughts) and role != "assistant" or given.get("tool_calls") and role != "assistant":
        raise ValueError(f"a thought or a call of the {role}: {item}")
    if any(x != thoughts[0] or not isinstance(x, str) for x in thoughts):
        raise ValueError(f"the thought must be one string, got {thoughts}")
    if thoughts:
        message["reasoning_content"] = thoughts[0]
    if calls := given.get("tool_calls"):
        message["tool_calls"] = [call_form(call) for call in calls]
    return message


def text_of(content) -> str:
    """A content as one string: null is "", text parts are joined, other parts are refused."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        if part.get("type", "text") not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise ValueError(f"a part of a content must be text, got {part}")
        texts.append(part["text"])
    return "".join(texts)


def call_form(call: dict) -> dict:
    """A tool call with its arguments as an object; the API writes them as a JSON string."""
    function = call.get("function", call)
    name, given = function.get("name"), function.get("arguments") or {}
    try:
        arguments = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        arguments = None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError(f"a call needs a name, and an object as arguments, got {call}")
    form = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return form | ({"id": call["id"]} if call.get("id") else {})


def tools_form(tools) -> list[dict] | None:
    """Declared tools as {"type": "function", "function": {...}}; some rows leave the level out."""
    forms = []
    for tool in tools or []:
        if "function" not in tool:
            inner = {key: x for key, x in tool.items() if key != "type"}
            tool = {"type": "function", "function": inner}
        forms.append(tool)
    return forms or None
