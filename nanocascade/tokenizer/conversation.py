"""A conversation as pieces of text with a loss mask, by a model's own chat template.

    chat.pieces([user "2+2?", assistant "4"]) -> ..., Piece("<think>", special),
        Piece("</think>", special), Piece("4", loss), Piece("<|im_end|>", special, loss), ...

loss: what the model writes after the generation prompt, up to its stop token. A piece ends where a
prompt ends, so the ids of a prompt are a prefix of those of prompt and answer. A template under
which an answer would be trained wrongly, or a call could not be read, is refused.
"""

import os.path
import re
from functools import cache, cached_property

from nanocascade.tokenizer.chat import MARKUP, THINK, THINK_END, parse_response, split_thought
from nanocascade.tokenizer.messages import chat_form, tools_form
from nanocascade.tokenizer.template import (
    markup_pattern,
    protect,
    render_template,
    split_markup,
    unmark,
)

FEW_TURNS = 4
QUESTION = {"role": "user", "content": "q"}
THOUGHTFUL = [QUESTION, {"role": "assistant", "content": "a", "reasoning_content": "%thought%"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1, "b": "x"}}}
FIELDS = {"a": {"type": "integer"}, "b": {"type": "string"}}
TOOL = {
    "name": "f",
    "description": "A function.",
    "parameters": {"type": "object", "properties": FIELDS},
}


class ChatTemplate:
    """template: of conversations; tool_template: of those with tools. names: bos_token and the like
    for the template. special: texts of special tokens; stops: those that end a turn."""

    def __init__(self, template: str, tool_template: str, names: dict, special, stops):
        self.template, self.tool_template, self.names = template, tool_template, names
        self.markup = markup_pattern(special)
        self.protected = markup_pattern({*special, *MARKUP})
        self.stop_texts = list(stops)
        self.stops = markup_pattern(self.stop_texts)
        self.turn, self.check_calls = cache(self._read_turn), cache(self._try_calls)

    def pieces(self, messages, tools=None, thinking=True, add_generation_prompt=False):
        """Pieces of the conversation; those that an assistant wrote carry loss, but in a prompt."""
        messages, tools = self._prepare(messages), protect(tools_form(tools), self.protected)
        if tools or any("tool_calls" in message for message in messages):
            self.check_calls()
        if messages and self.thinks and not thinking and not add_generation_prompt:
            messages[-1].pop("reasoning_content", None)
        text = self._write(messages, tools, thinking, add_generation_prompt)
        answers = [] if add_generation_prompt else self._answers(messages, tools, thinking, text)
        pieces, end = [], 0
        for start, stop in answers:
            pieces += split_markup(text[end:start], self.markup)
            pieces += split_markup(text[start:stop], self.markup, loss=True)
            end = stop
        return pieces + split_markup(text[end:], self.markup)

    def after_answer(self, results, thinking=True):
        """Pieces behind a sampled stop token: the rest of the turn, tools' results, a prompt."""
        call = {"role": "assistant", "content": "a", "reasoning_content": "a"}
        tools = [{"role": "tool", "content": result} for result in results]
        messages = self._prepare([QUESTION, call, *tools])
        text = self._write(messages, None, thinking, True)
        answer = self._answer(messages[:2], None, thinking, text)
        if answer is None:
            raise ValueError(
                "the chat template rewrites a turn when a tool's result follows, so that no result"
                f" can be added to what was sampled: it writes {unmark(text)!r}"
            )
        return split_markup(text[answer[1] :], self.markup)

    @property
    def thinks(self):
        """Whether the template shows thoughts; SmolLM2's drops them, so SFT must not use them."""
        return bool(self._thoughts_in)

    @cached_property
    def _thoughts_in(self):
        """The field of a message that the template takes a thought from, None if it shows those of
        a content as they stand, "" if it removes them, too."""
        if "%thought%" in self._run_template(THOUGHTFUL, None, True, False):
            return "reasoning_content"
        inline = [QUESTION, inline_form(THOUGHTFUL[1])]
        text = self._run_template(inline, None, True, False)
        if "%thought%" in text and is_open(self.turn(True)[1]):
            return "content"
        plain = [QUESTION, {"role": "assistant", "content": "a"}]
        return "" if text == self._run_template(plain, None, True, False) else None

    def _prepare(self, messages):
        """Messages in chat form whose markup is marked as text, and whose thoughts stand in
        reasoning_content alone, also those that stood in tags at the start of a content."""
        prepared = []
        for message in chat_form(messages):
            thought, answer, unfinished = split_thought(message["content"])
            inline = message["role"] == "assistant" and thought is not None and not unfinished
            taken = self._thoughts_in is not None
            if taken and inline and "reasoning_content" not in message:
                message["content"] = answer
                if thought.strip():
                    message["reasoning_content"] = thought
            role = {"role": message["role"]}
            prepared.append(protect(message, self.protected, message["role"] == "assistant") | role)
        return prepared

    def _write(self, messages, tools, thinking, add_generation_prompt):
        """The template's text of messages. Where the template reads a thought from the content,
        since its prompt has opened it, that of a last answer stands there, and is closed."""
        is_answer = messages and messages[-1]["role"] == "assistant" and not add_generation_prompt
        if is_answer and self._thoughts_in == "content":
            messages = [*messages[:-1], inline_form(messages[-1])]
        return self._run_template(messages, tools, thinking, add_generation_prompt)

    def _run_template(self, messages, tools, thinking, add_generation_prompt):
        template = self.tool_template if tools else self.template
        if not template:
            raise ValueError(
                "no chat template beside tokenizer.json: put there, as chat_template.jinja, the"
                " model's own or nanocascade/tokenizer/templates/nemotron3.jinja"
            )
        return render_template(
            template,
            messages,
            tools,
            enable_thinking=thinking,
            add_generation_prompt=add_generation_prompt,
            **self.names,
        )

    def _answers(self, messages, tools, thinking, text):
        """[(start, end)] in `text` of the answers that are trained.

        An answer is trained if the prompt before it, in either thinking mode, and the conversation
        up to its stop token are both prefixes of the whole. Where a template rewrites an earlier
        answer, as most remove its thought, the answer is context.
        """
        turns = [i for i, x in enumerate(messages) if x["role"] == "assistant" and i]

        def exact(i):
            return self._answer(messages[: i + 1], tools, thinking, text)

        # Writing every prefix costs the square of their number. Most templates write a turn by
        # itself: an answer behind one question then has the text that it has in the conversation.
        header = self.turn(True)[0]
        begins = [x.start() for x in re.finditer(re.escape(header), text)] if header else []
        if len(begins) == len(turns) > FEW_TURNS:
            spans = [
                self._answer([QUESTION, messages[i]], tools, thinking, text, begin)
                for i, begin in zip(turns, begins, strict=True)
            ]
            if all(spans[k] == exact(turns[k]) for k in (0, len(turns) // 2, -1)):
                return [span for span in spans if span]
        return [span for span in map(exact, turns) if span]

    def _answer(self, messages, tools, thinking, text, begin=0):
        """(start, end) in `text` of the answer that ends `messages`, None if it is context.

        begin: 0 where text holds all of messages, or where the answer's turn begins in text.
        Raises ValueError where the answer would be trained wrongly: without its stop token, inside
        a thought, or, as the last of the conversation, not at all.
        """
        alone = self._write(messages, tools, thinking, False)
        start, opening = 0, ""  # of the answer: where the longest prompt before it ends
        for mode in (thinking, not thinking):
            prompt = self._write(messages[:-1], tools, mode, True)
            if alone.startswith(prompt) and len(prompt) > start:
                start, opening = len(prompt), self.turn(mode)[1]
        if start == 0 and alone == text:
            raise ValueError(
                "the chat template writes the last answer in a form that its generation prompt does"
                f" not begin: {unmark(alone[-60:])!r} after a prompt that ends in"
                f" {''.join(self.turn(thinking))!r}"
            )
        stop = self.stops.search(alone, start)
        last = stop.start() if stop else len(alone.rstrip())
        turn = max(alone.find(self.turn(True)[0]), 0) if begin else 0
        if start == 0 or not text.startswith(alone[turn:last], begin):
            return None
        if stop is None or not text.startswith(alone[turn : stop.end()], begin):
            last += begin - turn
            ending = unmark(text[max(last - 20, 0) : last + 20])
            raise ValueError(
                f"the chat template ends an answer in {ending!r}, not in a stop token, of which"
                f" there are {self.stop_texts}: a model trained on it would not stop"
            )
        if is_open(opening) and THINK_END not in alone[start : stop.end()]:
            raise ValueError(
                f"the generation prompt opens a thought, {opening!r}, which the answer does not"
                f" close: {unmark(alone[start : stop.end()])!r}"
            )
        return begin - turn + start, begin - turn + stop.end()

    def _read_turn(self, thinking):
        """Header and opening of a turn, which the generation prompt adds to the conversation:
        ("<|im_start|>assistant\\n", "<think>\\n")."""
        bare, prompt = (
            [
                part  # a token, or a character of a text
                for piece in split_markup(self._write([QUESTION], None, thinking, x), self.markup)
                for part in ([piece.text] if piece.special else piece.text)
            ]
            for x in (False, True)
        )
        added = "".join(prompt[len(os.path.commonprefix([bare, prompt])) :])
        header, think, rest = added.partition(THINK)
        return header, think + rest

    def _try_calls(self):
        """Refuse conversations with tools if the template writes a call that we cannot read, or if
        no result can follow a sampled one."""
        answer = {"role": "assistant", "reasoning_content": "t", "tool_calls": [CALL]}
        messages, tools = self._prepare([QUESTION, answer]), tools_form([TOOL])
        text = self._write(messages, tools, True, False)
        start, end = self._answer(messages, tools, True, text)
        written = self.stops.sub("", text[start:end])
        if parse_response(self.turn(True)[1] + written, tools)["tool_calls"] != [CALL]:
            raise ValueError(
                f"the chat template writes a tool call as {written!r}, which we do not read: rows"
                " with tools need a template that writes <tool_call> with JSON or with Nemotron's"
                " <function=...>"
            )
        self.after_answer(["1"])


def inline_form(message: dict) -> dict:
    """An answer with its thought, or an empty one, in the content, behind a prompt's <think>."""
    thought = message.get("reasoning_content", "")
    form = {key: x for key, x in message.items() if key != "reasoning_content"}
    form["content"] = f"{thought}\n{THINK_END}\n\n{message['content']}".lstrip("\n")
    return form


def is_open(opening: str) -> bool:
    """Whether an opening leaves a thought open."""
    return THINK in opening and THINK_END not in opening
