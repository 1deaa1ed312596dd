"""Chat messages to text and back, in pieces, so that our markup is never confused with quoted text.

Messages are OpenAI dicts: role, content, and for an assistant reasoning_content and tool_calls.

    user "2+2?", assistant "4" -> ..., Piece("<think>", special), Piece("</think>", special),
        Piece("4", loss), Piece("<|im_end|>", special, loss), Piece("\n")

special: one token. Markup inside other text is not recognised: a user who types "<|im_end|>" ends
nothing. loss: what the model writes after the generation prompt, its <|im_end|> included. A piece
ends where a prompt ends, so the ids of a prompt are a prefix of those of prompt and answer. A turn
carries loss if some prompt leads to its form: not one whose thought was removed because a question
follows (the templates' rule), nor a Qwen3 turn without a think block; these are context.
# OURS: tags in an assistant's content are text, but for one thought at its start (SFT files').
The published templates search all of it: there an answer that mentions </think> is cut.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

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
# What the generation prompt writes of the assistant's turn: (style, thinking) -> text.
OPENINGS = {
    ("nemotron3", True): "<think>\n",
    ("nemotron3", False): "<think></think>",
    ("qwen3", False): "<think>\n\n</think>\n\n",
}
# The fixed words around declared tools stand in the formats as data; %s is where the tools go.
TEMPLATES = Path(__file__).with_name("templates")
TEMPLATE = (TEMPLATES / "nemotron3.jinja").read_text("utf-8")
NEMOTRON3_TOOLS = TEMPLATE.split("set tools_text -%}\n")[1].split("\n{%- endset")[0]
QWEN3_TOOLS = (TEMPLATES / "qwen3_tools.txt").read_text("utf-8").rstrip()
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


class Piece(NamedTuple):
    text: str
    special: bool = False  # one token of the vocabulary
    loss: bool = False  # written by the model


FORM = re.compile(f"({'|'.join(map(re.escape, MARKUP))}|%s)")


def fill(form, *texts, loss=False):
    """Pieces of our own form: its markup is special, each %s is the next of texts, verbatim.

    fill("<think>%s</think>", "a <think>") -> <think> (special), "a <think>", </think> (special)
    """
    texts, parts = iter(texts), FORM.split(form)
    return [Piece(next(texts) if part == "%s" else part, part in MARKUP, loss) for part in parts]


def merge(pieces):
    """Joins neighbouring plain text of equal loss, so that it is tokenized as one string."""
    out = []
    for piece in pieces:
        if out and not piece.special and out[-1][1:] == piece[1:]:
            out[-1] = piece._replace(text=out[-1].text + piece.text)
        elif piece.text:
            out.append(piece)
    return out


def render_pieces(
    messages, tools=None, thinking=True, add_generation_prompt=False, style="nemotron3"
):
    """The conversation as pieces, in style nemotron3 (the report's), qwen3 or chatml (SmolLM2's).

    thinking is about the final assistant turn only: the one that the generation prompt opens, or
    else the last message, which False shows without its thought.
    """
    assert style in ("nemotron3", "qwen3", "chatml"), f"no renderer for style {style!r}"
    for message in messages or [{}]:
        if "role" not in message or not isinstance(message.get("content") or "", str):
            raise ValueError(f"a message needs a role and a string as content, got {message}")
        if style == "chatml" and (tools or message.get("tool_calls")):
            raise ValueError(f"SmolLM2's template knows no tools, got {tools or message}")
    roles = [None, *(message["role"] for message in messages), None]
    texts = [message.get("content") or "" for message in messages]
    # Thoughts before the last question are hidden; to Qwen3 a result sent by the user is none.
    asked = [
        i
        for i, text in enumerate(texts)
        if roles[i + 1] == "user"
        and not (style == "qwen3" and text.startswith(RESULT) and text.endswith(RESULT_END))
    ]
    last_asked = asked[-1] if asked else len(messages) if style == "qwen3" else -1
    pieces = _system(texts[0] if roles[1] == "system" else None, tools, style)
    for i, message in enumerate(messages):
        before, role, after = roles[i : i + 3]
        if role == "tool" and style != "chatml":  # neighbouring results share one user turn
            above, below = ("", "\n") if style == "nemotron3" else ("\n", "")
            pieces += fill("<|im_start|>user" + below if before != "tool" else "")
            pieces += fill(f"{above}<tool_response>\n%s\n</tool_response>{below}", texts[i])
            pieces += fill("<|im_end|>\n" if after != "tool" else "")
        elif role != "system" or i > 0:
            body = [Piece(texts[i], loss=role == "assistant")]
            if role == "assistant" and style != "chatml":
                thought, answer, calls = _parts(message)
                shown = thought if after or thinking or add_generation_prompt else ""
                write = _nemotron3_answer if style == "nemotron3" else _qwen3_answer
                body = write(shown, answer, calls, history=i < last_asked, last=not after)
            pieces += fill("<|im_start|>%s\n", role) + body
            pieces += fill("<|im_end|>", loss=body[-1].loss) + fill("\n")
    if add_generation_prompt:
        pieces += fill("<|im_start|>assistant\n" + OPENINGS.get((style, bool(thinking)), ""))
    return merge(pieces)


def _system(text, tools, style):
    """The system block: nemotron3 always has one, qwen3 if there is reason, chatml a default."""
    if style == "qwen3" and text is None and not tools:
        return []
    form, declared = "<|im_start|>system\n%s", ""
    if tools and style == "nemotron3":
        form += ("\n\n" if text else "") + NEMOTRON3_TOOLS
        declared = "".join(_nemotron3_tool(tool.get("function", tool)) for tool in tools)
    elif tools:
        form += ("\n\n" if text is not None else "") + QWEN3_TOOLS
        declared = "".join("\n" + _plain(tool) for tool in tools)
    default = SMOLLM2_SYSTEM if style == "chatml" else ""
    return fill(form + "<|im_end|>\n", default if text is None else text, declared)


def _nemotron3_tool(tool):
    """One function as the template's XML; keys that it does not know follow those it does."""
    schema, fields = tool.get("parameters") or {}, ""
    for name, field in (schema.get("properties") or {}).items():
        field = field if isinstance(field, dict) else {}  # `true` is a schema too
        field = _tags({**field, "name": name}, "name", "type", "description", "enum")
        fields += f"\n<parameter>{field}\n</parameter>"
    rest = {key: schema[key] for key in schema if key not in ("type", "properties", "required")}
    required = {"required": schema["required"]} if "required" in schema else {}
    tool = {**tool, "parameters": fields + _tags(rest | required) + "\n"}
    tool.pop("type", None)
    return f"\n<function>{_tags(tool, 'name', 'description', 'parameters')}\n</function>"


def _tags(item, *first):
    """<key>value</key> lines, the keys of `first` before the rest."""
    form = {"description": lambda value: str(value).strip(), "type": str}
    keys = [k for k in first if k in item] + [k for k in item if k not in first]
    return "".join(f"\n<{k}>{form.get(k, _plain)(item[k])}</{k}>" for k in keys)


def _plain(value):
    """The templates' form of a value: JSON for lists and objects, Python's str for the rest."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)


def _parts(message):
    """(thought or "", answer, [(name, arguments)]); arguments may be the API's JSON string."""
    thought, answer, calls = message.get("reasoning_content"), message.get("content") or "", []
    if thought is None and not split_thought(answer)[2]:
        thought, answer, _ = split_thought(answer)
    for call in message.get("tool_calls") or []:
        call = call.get("function", call)
        given = call.get("arguments") or {}
        calls.append((call["name"], _loads(given) if isinstance(given, str) else given))
        if not isinstance(calls[-1][1], dict):
            raise ValueError(f"the arguments of a call must be an object, got {given!r}")
    return thought if (thought or "").strip() else "", answer, calls


def _nemotron3_answer(thought, answer, calls, history, last):
    """ "<think>", thought, "</think>", answer on lines of their own, or <think></think>answer."""
    loss = not (thought and history)
    if thought and loss:
        answer = ("\n" + answer).rstrip()
        pieces = fill("<think>\n") + fill("%s\n</think>%s", thought, answer, loss=True)
    else:
        # A stripped thought leaves its newline behind, except before a call.
        answer = answer.strip() if history and calls else ("" if loss else "\n") + answer
        pieces = fill("<think></think>") + fill("%s", answer.rstrip(), loss=loss)
    for i, (name, arguments) in enumerate(calls):
        fields = [f"<parameter={k}>\n{_plain(v)}\n</parameter>\n" for k, v in arguments.items()]
        form = "<tool_call>\n<function=%s>\n%s</function>\n</tool_call>\n"
        pieces += fill(form if i else "\n" + form, name, "".join(fields), loss=loss)
    return pieces


def _qwen3_answer(thought, answer, calls, history, last):
    """A think block (in the last turn even if empty), then the answer, then calls as JSON."""
    loss = not history and bool(last or thought)
    shown = answer.lstrip("\n") if loss else answer
    if loss and thought:
        thought = thought.strip("\n")
        pieces = fill("<think>\n%s\n</think>\n\n%s", thought, shown, loss=True)
    else:
        pieces = fill(OPENINGS["qwen3", False] if loss else "") + [Piece(shown, loss=loss)]
    for i, (name, arguments) in enumerate(calls):
        form = '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>'
        pieces += fill("\n" + form if answer or i else form, name, _plain(arguments), loss=loss)
    return pieces


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
    for block in blocks:
        body, closed, after = block.partition(CALL_END)
        readable = closed and body.lstrip().startswith(("{", "<"))  # failing to parse takes longer
        call = _parse_call(body.strip(), tools or []) if readable else None
        if readable and not call and CALL_END in after:  # this tag may stand in a text of the call
            longer, _, rest = block.rpartition(CALL_END)
            call = _parse_call(longer.strip(), tools or [])
            after = rest if call else after
        calls += [{"type": "function", "function": call}] if call else []
        kept.append(after.removeprefix("\n") if call else CALL + block)
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
    call = _loads(body, object_pairs_hook=_distinct)
    if isinstance(call, dict) and isinstance(call.get("name"), str):
        given = call.get("arguments", {})
        call = {
            "name": call["name"],
            "arguments": _loads(given) if isinstance(given, str) else given,
        }
        return call if isinstance(call["arguments"], dict) else None
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
    python = {
        "integer": [int],
        "number": [int, float],
        "boolean": [bool],
        "array": [list],
        "object": [dict],
        "null": [type(None)],
    }
    value = _loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    kinds = [kinds] if isinstance(kinds, str) else kinds or []
    fits = any(type(value) in python.get(kind, []) for kind in kinds)
    return value if fits and "string" not in kinds else text


def _distinct(pairs):
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key that comes twice")
    return dict(pairs)


def _loads(text, **options):
    try:
        return json.loads(text, **options)
    except (ValueError, RecursionError):  # no JSON, an integer too long, or brackets too deep
        return text
