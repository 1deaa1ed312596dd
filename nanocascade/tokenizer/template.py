"""A model's own chat template, run by jinja2 as transformers runs it.

    text -> split_markup(text) -> Piece("<|im_start|>", special), Piece("user\n2+2?"), ...

Templates come with somebody's model: they run in jinja2's sandbox, and whatever they raise is one
ValueError. Markup in a text stays text: a user who types "<|im_end|>" ends nothing. For that,
protect() puts characters of the private use area into the markup of texts before the template sees
them, split_markup() takes only markup without them for tokens, and removes them.

# OURS: tags in an assistant's content are text, but for one thought at its start (SFT files').
The published templates search all of it: there an answer that mentions </think> is cut.
"""

import json
import re
from datetime import datetime
from functools import cache
from typing import NamedTuple

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

STARTED = datetime.now()  # one date for a whole run, for templates that write it into the prompt


class Piece(NamedTuple):
    text: str
    special: bool = False  # one token of the vocabulary
    loss: bool = False  # written by the model


class Marks(NamedTuple):
    """Private characters that no text of a conversation holds."""

    inside: str  # breaks a tag, so that a template does not find it either
    behind: str  # follows an opening tag: the template finds it, but it is no token
    before: str  # precedes a closing tag

    def remove(self, text: str) -> str:
        """The text without them, also where `tojson` wrote them as escapes."""
        forms = [form for mark in self for form in (mark, json.dumps(mark)[1:-1])]
        return re.sub("|".join(map(re.escape, forms)), "", text)


def readable(text: str) -> str:
    """A text for an error message, without characters of the private use area."""
    return re.sub(r"[\ue000-\uf8ff]", "", text)


class GenerationTag(Extension):
    """{% generation %} ... {% endgeneration %}, which marks answers for trainers: transparent."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class RefusedMessages(TemplateError):
    """raise_exception() of a template."""


def raise_exception(message):
    raise RefusedMessages(message)


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@cache
def compile_template(text: str):
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = STARTED.strftime
    return environment.from_string(text)


def render_template(text: str, messages, tools, **variables) -> str:
    """Render messages and tools by the template `text`. Raises ValueError of one line."""
    messages = [  # some templates read a thought under the other name
        {"thinking": x["reasoning_content"]} | x if "reasoning_content" in x else x
        for x in messages
    ]
    try:
        return compile_template(text).render(messages=messages, tools=tools, **variables)
    except Exception as error:  # a template is a program: it may raise anything
        refused, line = isinstance(error, RefusedMessages), " ".join(str(error).split())
        what = "refuses these messages" if refused else f"fails: {type(error).__name__}"
        raise ValueError(f"the chat template {what}: {readable(line)}") from None


def markup_pattern(tokens) -> re.Pattern:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def protect(messages, tools, markup: re.Pattern):
    """(messages, tools, marks): the markup in their texts marked as text; marks None without any.

    In an assistant's message the tag is broken, so that templates do not find it. Elsewhere it
    stays whole, since templates look for some: Qwen3 takes a user's "<tool_response>...
    </tool_response>" for a tool's result.
    """
    dumped = json.dumps([messages, tools], ensure_ascii=False)
    if not markup.search(dumped):
        return messages, tools, None
    unused = (chr(x) for x in range(0xE000, 0xF900))
    unused = (x for x in unused if x not in dumped and json.dumps(x)[1:-1] not in dumped)
    marks = Marks(next(unused), next(unused), next(unused))

    def break_tag(match):
        return match[0][0] + marks.inside + match[0][1:]

    def mark_tag(match):
        closing = match[0].startswith("</")
        return marks.before + match[0] if closing else match[0] + marks.behind

    def change(x, function):
        if isinstance(x, str):
            return markup.sub(function, x)
        if isinstance(x, list):
            return [change(y, function) for y in x]
        if isinstance(x, dict):
            return {change(key, function): change(y, function) for key, y in x.items()}
        return x

    assistant = {True: break_tag, False: mark_tag}
    messages = [
        change(message, assistant[message["role"] == "assistant"]) | {"role": message["role"]}
        for message in messages
    ]
    return messages, change(tools, mark_tag), marks


def split_markup(text: str, markup: re.Pattern, marks: Marks | None = None, loss=False):
    """Pieces of a rendered text: the template's own markup is special, marked markup is text."""
    pieces, end = [], 0
    for match in markup.finditer(text):
        marked = marks and (
            text.startswith(marks.behind, match.end())
            or text.endswith(marks.before, 0, match.start())
        )
        if not marked:
            pieces += [Piece(text[end : match.start()], loss=loss), Piece(match[0], True, loss)]
            end = match.end()
    pieces.append(Piece(text[end:], loss=loss))
    if marks:
        pieces = [piece._replace(text=marks.remove(piece.text)) for piece in pieces]
    return [piece for piece in pieces if piece.text]


def merge(pieces):
    """Joins neighbouring plain text of equal loss, so that it is encoded as one string."""
    out = []
    for piece in pieces:
        if out and not piece.special and out[-1][1:] == piece[1:]:
            out[-1] = piece._replace(text=out[-1].text + piece.text)
        else:
            out.append(piece)
    return out
