"""A model's own chat template, run by jinja2 as transformers runs it.

    text -> split_markup(text) -> Piece("<|im_start|>", special), Piece("user\n2+2?"), ...

Templates come with somebody's model: they run in jinja2's sandbox, and whatever they raise is one
ValueError. Markup in a text stays text: a user who types "<|im_end|>" ends nothing. For that,
protect() marks the markup of texts before the template sees them, and split_markup() takes only
unmarked markup for tokens.

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
# The marks are two of Unicode's noncharacters, which are reserved for such use inside a program.
BEFORE, BEHIND = "\ufdd0", "\ufdd1"


class Piece(NamedTuple):
    text: str
    special: bool = False  # one token of the vocabulary
    loss: bool = False  # written by the model


def unmark(text: str) -> str:
    return text.replace(BEFORE, "").replace(BEHIND, "")


class GenerationTag(Extension):
    """{% generation %} ... {% endgeneration %}, which marks answers for trainers: transparent."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message):
    raise TemplateError(message)


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    text = json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    for mark in (BEFORE, BEHIND):  # which ensure_ascii escapes
        text = text.replace(json.dumps(mark)[1:-1], mark)
    return text


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
        refused = type(error) is TemplateError  # by raise_exception
        what = "refuses these messages" if refused else f"fails: {type(error).__name__}"
        line = unmark(" ".join(str(error).split()))
        raise ValueError(f"the chat template {what}: {line}") from None


def markup_pattern(tokens) -> re.Pattern:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def protect(x, markup: re.Pattern, of_assistant: bool = False):
    """x, of strings, lists and dicts, with the markup in its strings marked as text.

    In an assistant's message the tag is broken, so that templates do not find it. Elsewhere it
    stays whole, since templates look for some: Qwen3 takes a user's "<tool_response>...
    </tool_response>" for a tool's result. So a closing tag is marked before it, others behind.
    """

    def mark(match):
        tag = match[0]
        if of_assistant:
            return tag[0] + BEFORE + tag[1:]
        return BEFORE + tag if tag.startswith("</") else tag + BEHIND

    if isinstance(x, str):
        return markup.sub(mark, unmark(x))
    if isinstance(x, list):
        return [protect(y, markup, of_assistant) for y in x]
    if isinstance(x, dict):
        return {
            protect(key, markup, of_assistant): protect(y, markup, of_assistant)
            for key, y in x.items()
        }
    return x


def split_markup(text: str, markup: re.Pattern, loss=False) -> list[Piece]:
    """Pieces of a rendered text: the template's own markup is special, marked markup is text."""
    pieces, end = [], 0
    for match in markup.finditer(text):
        marked = text.startswith(BEHIND, match.end()) or text.endswith(BEFORE, 0, match.start())
        if not marked:
            plain = unmark(text[end : match.start()])
            pieces += [Piece(plain, loss=loss), Piece(match[0], True, loss)]
            end = match.end()
    pieces.append(Piece(unmark(text[end:]), loss=loss))
    return [piece for piece in pieces if piece.text]
