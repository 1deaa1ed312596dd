"""A conversation as pieces of text with a loss mask, by a model's own chat template.

    chat.pieces([user "2+2?", assistant "4"]) -> ..., Piece("<think>", special),
        Piece("</think>", special), Piece("4", loss), Piece("<|im_end|>", special, loss), ...

loss: what the model writes after the generation prompt, up to its stop token. A piece ends where a
prompt ends, so the ids of a prompt are a prefix of those of prompt and answer. A template under
which an answer would be trained wrongly, or a call could not be read, is refused.
"""

import os.path
import re
from functools import cache, cached_property, partial

from nanocascade.tokenizer.chat import MARKUP, THINK, THINK_END, parse_response, split_thought
from nanocascade.tokenizer.messages import chat_form, tools_form
from nanocascade.tokenizer.template import (
    markup_pattern,
    protect,
    readable,
    render_template,
    split_markup,
)

FEW_TURNS = 4
QUESTION = {"role": "user", "content": "q"}
THOUGHTFUL = [QUESTION, {"role": "assistant", "content": "a", "reasoning_content": "%thought%"}]


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
        messages = self._split_thoughts(chat_form(messages), thinking or add_generation_prompt)
        tools = tools_form(tools)
        if tools or any("tool_calls" in message for message in messages):
            self.check_calls()
        messages, tools, marks = protect(messages, tools, self.protected)
        text = self._write(messages, tools, thinking, add_generation_prompt)
        answers = [] if add_generation_prompt else self._answers(messages, tools, thinking, text)
        pieces, end = [], 0
        for start, stop in answers:
            pieces += split_markup(text[end:start], self.markup, marks)
            pieces += split_markup(text[start:stop], self.markup, marks, loss=True)
            end = stop
        return pieces + split_markup(text[end:], self.markup, marks)

    @cached_property
    def thinks(self):
        """Whether the template shows thoughts; SmolLM2's drops them, so SFT must not use them."""
        return "%thought%" in self._write(THOUGHTFUL, None, True, False)

    def after_answer(self, results, thinking=True):
        """Pieces behind a sampled stop token: the rest of the turn, tools' results, a prompt."""
        call = {"role": "assistant", "content": "a", "reasoning_content": "a"}
        tools = [{"role": "tool", "content": result} for result in results]
        messages = self._split_thoughts([QUESTION, call, *tools])
        messages, _, marks = protect(messages, None, self.protected)
        text = self._write(messages, None, thinking, True)
        done = self._write(messages[:2], None, thinking, False)
        start, _ = self._prompt_of(messages[:1], None, thinking, done)
        stop = self.stops.search(done, start)
        if not start or not stop or not text.startswith(done[: stop.end()]):
            raise ValueError(
                "the chat template rewrites a turn when a tool's result follows, so that no result"
                f" can be added to what was sampled: {readable(done)!r} becomes {readable(text)!r}"
            )
        return split_markup(text[stop.end() :], self.markup, marks)

    def _split_thoughts(self, messages, last_thinks=True):
        """Messages whose thoughts stand in reasoning_content alone, also those that stood in tags
        at the start of a content; last_thinks False removes that of a last answer."""
        if self._thoughts_in == "nowhere":
            return messages
        forms = []
        for i, message in enumerate(messages):
            thought, content = message.get("reasoning_content"), message["content"]
            if thought is None and message["role"] == "assistant":
                thought, content, unfinished = split_thought(content)
                thought, content = (None, message["content"]) if unfinished else (thought, content)
            form = {key: x for key, x in message.items() if key != "reasoning_content"}
            form["content"] = content
            if (thought or "").strip() and (last_thinks or i < len(messages) - 1):
                form["reasoning_content"] = thought
            forms.append(form)
        return forms

    @cached_property
    def _thoughts_in(self):
        """Where the template takes a thought from: "reasoning_content", "content" or "nowhere"."""
        if "%thought%" in self._run_template(THOUGHTFUL, None, True, False):
            return "reasoning_content"
        inline = [QUESTION, inline_form(THOUGHTFUL[1])]
        shown = "%thought%" in self._run_template(inline, None, True, False)
        return "content" if shown and is_open(self.turn(True)[1]) else "nowhere"

    def _write(self, messages, tools, thinking, add_generation_prompt):
        """The template's text of messages. Where the template reads a thought from the content,
        since its prompt has opened it, that of a last answer stands there, and is closed."""
        last = messages[-1] if messages and not add_generation_prompt else {}
        if self._thoughts_in == "content" and last.get("role") == "assistant":
            messages = [*messages[:-1], inline_form(last)]
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
        answer, as most remove its thought, the answer is context. Raises ValueError where an answer
        would be trained wrongly: without its stop token, inside a thought, or the last not at all.
        """
        turns = [i for i, x in enumerate(messages) if x["role"] == "assistant" and i]
        exact = partial(self._answer, messages, tools, thinking, text)
        spans = None
        if len(turns) > FEW_TURNS:  # rendering every prefix would cost the square of their number
            spans = self._answers_one_by_one(messages, tools, thinking, text)
            some = (0, len(turns) // 2, -1)
            if spans and [spans[k] for k in some] != [exact(turns[k]) for k in some]:
                spans = None
        return [span for span in spans or map(exact, turns) if span]

    def _answer(self, messages, tools, thinking, text, i):
        """(start, end) of the answer messages[i] in `text`, None for context."""
        last = i == len(messages) - 1
        done = text if last else self._write(messages[: i + 1], tools, thinking, False)
        start, opening = self._prompt_of(messages[:i], tools, thinking, done)
        if start == 0 and last:
            raise ValueError(
                "the chat template writes the last answer in a form that its generation prompt does"
                f" not begin: {readable(done[-60:])!r} after a prompt that ends in"
                f" {''.join(self.turn(thinking))!r}"
            )
        stop = self.stops.search(done, start)
        body, end = (done[: stop.start()], stop.end()) if stop else (done.rstrip(), len(done))
        if start == 0 or not text.startswith(body):
            return None
        if stop is None or not text.startswith(done[:end]):
            ending = readable(text[max(len(body) - 20, 0) : len(body) + 20])
            raise ValueError(
                f"the chat template ends an answer in {ending!r}, not in a stop token, of which"
                f" there are {self.stop_texts}: a model trained on it would not stop"
            )
        if is_open(opening) and THINK_END not in done[start:end]:
            raise ValueError(
                f"the generation prompt opens a thought, {opening!r}, which the answer does not"
                f" close: {readable(done[start:end])!r}"
            )
        return start, end

    def _answers_one_by_one(self, messages, tools, thinking, text):
        """The same for all answers of a long conversation, each rendered alone behind a question:
        linear, and right for templates that write a turn by itself. None where that fails."""
        header = self.turn(True)[0]
        starts = [x.end() for x in re.finditer(re.escape(header), text)] if header else []
        turns = [x for x in messages if x["role"] == "assistant"]
        if len(starts) != len(turns) or messages[0]["role"] == "assistant":
            return None
        spans = []
        for start, message in zip(starts, turns, strict=True):
            alone = self._write([QUESTION, message], tools, thinking, False)
            form = alone.partition(header)[2]
            openings = [self.turn(mode)[1] for mode in (True, False)]
            opening = max((x for x in openings if form.startswith(x)), key=len, default=None)
            stop = None if opening is None else self.stops.search(form, len(opening))
            if stop is None:
                return None
            trained = text.startswith(form[: stop.end()], start)
            spans.append((start + len(opening), start + stop.end()) if trained else None)
        return spans

    def _prompt_of(self, messages, tools, thinking, done):
        """(length, opening of the answer) of the generation prompt that `done` begins with, in the
        thinking mode with the longer one; (0, "") if neither."""
        found = (0, "")
        for mode in (thinking, not thinking):
            opening = self.turn(mode)[1]
            if found[0] and not opening.startswith(found[1]):
                continue  # it parts from the one that was found
            prompt = self._write(messages, tools, mode, True)
            if done.startswith(prompt) and len(prompt) > found[0]:
                found = (len(prompt), opening)
        return found

    def _read_turn(self, thinking):
        """Header and opening of a turn, which the generation prompt adds to the conversation:
        ("<|im_start|>assistant\\n", "<think>\\n")."""
        question = [QUESTION]
        bare, prompt = (
            split_markup(self._run_template(question, None, thinking, x), self.markup)
            for x in (False, True)
        )
        while bare and prompt and bare[0] == prompt[0]:
            del bare[0], prompt[0]
        shared = 0  # of two texts, which may begin alike; two different tokens may not
        if bare and prompt and not bare[0].special and not prompt[0].special:
            shared = len(os.path.commonprefix([bare[0].text, prompt[0].text]))
        prompt = "".join(piece.text for piece in prompt)[shared:]
        header, think, rest = prompt.partition(THINK)
        return header, think + rest

    def _try_calls(self):
        """Refuse conversations with tools if the template writes a call that we cannot read, or if
        no result can follow a sampled one."""
        fields = {"a": {"type": "integer"}, "b": {"type": "string"}}
        declared = {"name": "f", "parameters": {"type": "object", "properties": fields}}
        tools = tools_form([declared | {"description": "A function."}])
        call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1, "b": "x"}}}
        answer = {
            "role": "assistant",
            "content": "",
            "reasoning_content": "t",
            "tool_calls": [call],
        }
        messages = self._split_thoughts([QUESTION, answer])
        text = self._write(messages, tools, True, False)
        (start, end), *_ = self._answers(messages, tools, True, text)
        written = self.stops.sub("", text[start:end])
        if parse_response(self.turn(True)[1] + written, tools)["tool_calls"] != [call]:
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
