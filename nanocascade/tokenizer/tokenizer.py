"""The tokenizer of a model directory: conversations to ids with a loss mask, and back.

    tokenizer = Tokenizer("runs/out/sft")
    ids, mask = tokenizer.render([{"role": "user", "content": "2+2?"}], add_generation_prompt=True)
    message = tokenizer.parse(ids + sampled)             # content, reasoning_content, tool_calls

The directory's own chat template writes the text (template.py). Ids are made piece by piece: markup
that the template writes is one special token, and what the model writes begins a piece, so that the
ids of a prompt are a prefix of those of prompt and answer. What would be trained or sampled wrongly
is refused when it is rendered, which is when rows are read.
"""

import hashlib
import json
import os.path
from functools import cache, cached_property, lru_cache
from pathlib import Path

from nanocascade.checkpoint.stops import read_stop_ids
from nanocascade.files import read_json, read_text
from nanocascade.tokenizer.chat import MARKUP, THINK, THINK_END, parse_response, split_thought
from nanocascade.tokenizer.messages import chat_form, tools_form
from nanocascade.tokenizer.read import NAMES, check_config, read_spec, read_templates
from nanocascade.tokenizer.template import (
    markup_pattern,
    merge,
    protect,
    readable,
    render_template,
    split_markup,
)

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)


THOUGHTFUL = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a", "reasoning_content": "%thought%"},
]


class Tokenizer:
    """Reads a directory's tokenizer; save writes the same files again."""

    def __init__(self, path):
        path = Path(path)
        self.files = {name: read_text(path / name) for name in FILES if (path / name).exists()}
        if "tokenizer.json" not in self.files:
            raise ValueError(f"{path} has no tokenizer.json")
        spec, config, older = (
            read_json(path / name) if name in self.files else {}
            for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
        )
        stops = read_stop_ids(path)
        self._tokenizer = read_spec(path, spec, stops)
        check_config(path, config, spec["added_tokens"])
        self.special_ids = {t["content"]: t["id"] for t in spec["added_tokens"] if t["special"]}
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocabulary.values())
        # Conversations repeat most of their pieces ("user\n", tool declarations).
        self._cached_ids = lru_cache(4096)(
            lambda text: self._tokenizer.encode(text, add_special_tokens=False).ids
        )
        self._check_texts(path)

        names = {key: config.get(key) or older.get(key) for key in NAMES}
        names = {key: x["content"] if isinstance(x, dict) else x for key, x in names.items() if x}
        self.template, self.tool_template = read_templates(path, config, self.files)
        for key, token in names.items():  # transformers would add it, with an id of its own
            if token not in vocabulary and key in self.template:
                raise ValueError(
                    f"{path}: tokenizer.json lacks the {key} {token!r} of its template"
                )
        self.names = names
        self._markup = markup_pattern(self.special_ids)
        self._protected = markup_pattern({*self.special_ids, *MARKUP})
        named = [self.special_ids.get(x) for x in ("<|im_end|>", names.get("eos_token"))]
        self.eos_ids = [x for x in dict.fromkeys([*named, *stops]) if x is not None]
        if not self.eos_ids:
            raise ValueError(f"{path} names no end of a turn: no <|im_end|>, no eos_token")
        self._stops = markup_pattern(x for x, i in self.special_ids.items() if i in self.eos_ids)
        pads = [self.special_ids.get(x) for x in (names.get("pad_token"), "<|endoftext|>")]
        self.pad_id = next((pad for pad in pads if pad is not None), self.eos_ids[0])
        self._turn, self._check_template = cache(self._read_turn), cache(self._try_template)
        self._check_calls = cache(self._try_calls)

    def render(self, messages, tools=None, thinking=True, add_generation_prompt=False):
        """(ids, mask) of a conversation; mask is 1 on what assistants write, up to the stop token.

        thinking: what the generation prompt asks for, or, without one, whether the last answer
        shows its thought. A prompt's ids are a prefix of the ids of prompt and answer.
        """
        return self._ids(self._pieces(messages, tools, thinking, add_generation_prompt))

    def render_text(self, messages, tools=None, thinking=True, add_generation_prompt=False):
        """The text of render, as the directory's own chat template writes it."""
        pieces = self._pieces(messages, tools, thinking, add_generation_prompt)
        return "".join(piece.text for piece in pieces)

    def _pieces(self, messages, tools, thinking, add_generation_prompt):
        """Pieces of the conversation; those that an assistant wrote carry loss, but in a prompt."""
        messages = self._split_thoughts(chat_form(messages), thinking or add_generation_prompt)
        tools = tools_form(tools)
        self._check_template()
        if tools or any("tool_calls" in message for message in messages):
            self._check_calls()
        messages, tools, marks = protect(messages, tools, self._protected)
        text = self._write(messages, tools, thinking, add_generation_prompt)
        answers = [] if add_generation_prompt else self._answers(messages, tools, thinking, text)
        pieces, end = [], 0
        for start, stop in answers:
            pieces += split_markup(text[end:start], self._markup, marks)
            pieces += split_markup(text[start:stop], self._markup, marks, loss=True)
            end = stop
        return pieces + split_markup(text[end:], self._markup, marks)

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
        """[(start, end)] in `text` of the answers that are trained, found by rendering prefixes.

        An answer is trained if the prompt before it, in either thinking mode, and the conversation
        up to its stop token are both prefixes of the whole. Where a template rewrites an earlier
        answer, as most remove its thought, the answer is context. Raises ValueError where an answer
        would be trained wrongly: without its stop token, inside a thought, or the last not at all.
        """
        answers = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or i == 0:
                continue
            last = i == len(messages) - 1
            done = text if last else self._write(messages[: i + 1], tools, thinking, False)
            start, opening = self._prompt_of(messages[:i], tools, thinking, done)
            if start == 0 and last:
                raise ValueError(
                    "the chat template writes the last answer in a form that its generation prompt"
                    f" does not begin: {readable(done[-60:])!r} after a prompt that ends in"
                    f" {''.join(self._turn(thinking))!r}"
                )
            stop = self._stops.search(done, start)
            body, end = (done[: stop.start()], stop.end()) if stop else (done.rstrip(), len(done))
            if start == 0 or not text.startswith(body):
                continue
            if stop is None or not text.startswith(done[:end]):
                ending = readable(text[max(len(body) - 20, 0) : len(body) + 20])
                raise ValueError(
                    f"the chat template ends an answer in {ending!r}, not in a stop token, of which"
                    f" there are {self.decode(self.eos_ids)}: a model trained on it would not stop"
                )
            if is_open(opening) and THINK_END not in done[start:end]:
                raise ValueError(
                    f"the generation prompt opens a thought, {opening!r}, which the answer does not"
                    f" close: {readable(done[start:end])!r}"
                )
            answers.append((start, end))
        return answers

    def _prompt_of(self, messages, tools, thinking, done):
        """(length, opening of the answer) of the longer of the two generation prompts, with and
        without thinking, that `done` begins with; (0, "") if neither."""
        found = (0, "")
        for mode in (thinking, not thinking):
            prompt = self._write(messages, tools, mode, True)
            if done.startswith(prompt) and len(prompt) > found[0]:
                found = (len(prompt), self._turn(mode)[1])
        return found

    def _ids(self, pieces):
        """(ids, mask) of pieces; neighbouring text of equal loss is encoded as one string."""
        ids, mask = [], []
        for piece in merge(pieces):
            new = [self.special_ids[piece.text]] if piece.special else self.encode(piece.text)
            ids += new
            mask += [int(piece.loss)] * len(new)
        return ids, mask

    def encode(self, text):
        """Ids of plain text: "<|im_end|>" in it becomes the tokens of its characters."""
        return list(self._cached_ids(text))

    def decode(self, ids):
        """Text of ids, special tokens shown."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def parse(self, ids, tools=None):
        """The message that ids end with: a conversation, or just what follows its last header."""
        text, (header, _) = self._without_stop(ids), self._turn(True)
        return parse_response(text.rpartition(header)[2] if header else text, tools)

    def opening(self, thinking=True):
        """What the generation prompt writes of the answer: "<think>\\n" for Nemotron 3."""
        return self._turn(thinking)[1]

    def said(self, ids, thinking=True):
        """An assistant's turn as text: its opening and sampled ids, without the stop token."""
        return self.opening(thinking) + self._without_stop(ids)

    def _without_stop(self, ids):
        return self.decode(ids[:-1] if ids and ids[-1] in self.eos_ids else ids)

    def _read_turn(self, thinking):
        """Header and opening of a turn, which the generation prompt adds to the conversation:
        ("<|im_start|>assistant\\n", "<think>\\n")."""
        question = [{"role": "user", "content": "q"}]
        bare, prompt = (
            split_markup(self._run_template(question, None, thinking, x), self._markup)
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

    @cached_property
    def _thoughts_in(self):
        """Where the template takes a thought from: "reasoning_content", "content" or "nowhere"."""
        if "%thought%" in self._run_template(THOUGHTFUL, None, True, False):
            return "reasoning_content"
        inline = [THOUGHTFUL[0], inline_form(THOUGHTFUL[1])]
        shown = "%thought%" in self._run_template(inline, None, True, False)
        return "content" if shown and is_open(self.opening(True)) else "nowhere"

    @cached_property
    def thinks(self):
        """Whether the template shows thoughts; SmolLM2's drops them, so SFT must not use them."""
        return "%thought%" in self._write(THOUGHTFUL, None, True, False)

    def tool_result_ids(self, results, thinking=True):
        """What follows a sampled stop token: the rest of the turn, the results, the next prompt."""
        call = {"role": "assistant", "content": "a", "reasoning_content": "a"}
        tools = [{"role": "tool", "content": result} for result in results]
        messages = self._split_thoughts([{"role": "user", "content": "q"}, call, *tools])
        messages, _, marks = protect(messages, None, self._protected)
        text = self._write(messages, None, thinking, True)
        done = self._write(messages[:2], None, thinking, False)
        start, _ = self._prompt_of(messages[:1], None, thinking, done)
        stop = self._stops.search(done, start)
        if not start or not stop or not text.startswith(done[: stop.end()]):
            raise ValueError(
                "the chat template rewrites a turn when a tool's result follows, so that no result"
                f" can be added to what was sampled: {done!r} becomes {text!r}"
            )
        return self._ids(split_markup(text[stop.end() :], self._markup, marks))[0]

    # ---- Checks ----

    def check_model(self, vocab_size: int, path) -> None:
        """Raise ValueError if a model of vocab_size embeddings cannot take every id."""
        if self.vocab_size > vocab_size:
            raise ValueError(
                f"{path}: the tokenizer has ids up to {self.vocab_size - 1}, the model only"
                f" {vocab_size} embeddings (vocab_size of config.json)"
            )

    def _check_texts(self, path):
        """Refuse a tokenizer whose ids of a text depend on where the text is cut: one that puts a
        space before it, as Llama 2's, or strips it. Prompt and answer are encoded apart."""
        for text in ("the 4", "4", " the"):
            whole, parts = self.encode("\n" + text), self.encode("\n") + self.encode(text)
            if whole != parts or self.decode(whole) != "\n" + text:
                raise ValueError(
                    f"{path}/tokenizer.json encodes {text!r} after a newline as"
                    f" {self.decode(parts)!r} {parts} and both at once as {whole}: tokenizers that"
                    " add a space to a text, or strip it, are not supported"
                )

    def _try_template(self):
        """Refuse a tokenizer that encodes a rendered prompt otherwise than we do by pieces: one
        whose special tokens swallow the spaces beside them."""
        turns = [
            {"role": "user", "content": "Is it 4?"},
            {"role": "assistant", "content": "4 it is."},
        ]
        text = self._write([*turns, turns[0]], None, True, True)
        pieces = split_markup(text, self._markup)
        self._tokenizer.encode_special_tokens = False
        whole = self._tokenizer.encode(text, add_special_tokens=False).ids
        self._tokenizer.encode_special_tokens = True
        if whole != self._ids(pieces)[0]:
            raise ValueError(
                f"the tokenizer encodes its own chat template's {text!r} as {self.decode(whole)!r},"
                " since special tokens change the text beside them; this is not supported"
            )

    def _try_calls(self):
        """Refuse conversations with tools if the template writes a call that we cannot read."""
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
        messages = self._split_thoughts([{"role": "user", "content": "q"}, answer])
        text = self._write(messages, tools, True, False)
        (start, end), *_ = self._answers(messages, tools, True, text)
        written = self._stops.sub("", text[start:end])
        if parse_response(self.opening(True) + written, tools)["tool_calls"] != [call]:
            raise ValueError(
                f"the chat template writes a tool call as {written!r}, which we do not read: rows"
                " with tools need a template that writes <tool_call> with JSON or with Nemotron's"
                " <function=...>"
            )

    def save(self, path):
        """Writes the files this was read from, unchanged."""
        Path(path).mkdir(parents=True, exist_ok=True)
        for name, text in self.files.items():
            (Path(path) / name).write_text(text, "utf-8")

    def fingerprint(self):
        """Equal for tokenizers under which a teacher's and a student's ids mean the same, and whose
        templates write the same conversation."""
        vocab = sorted(self._tokenizer.get_vocab(with_added_tokens=True).items())
        known = [vocab, sorted(self.special_ids.items())]
        if self.template:
            answer = {"role": "assistant", "content": "a", "reasoning_content": "t"}
            turns = self._split_thoughts([{"role": "user", "content": "q"}, answer])
            known += [self._write([*turns, turns[0]], None, x, True) for x in (True, False)]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def inline_form(message: dict) -> dict:
    """An answer with its thought, or an empty one, in the content, behind a prompt's <think>."""
    thought = message.get("reasoning_content", "")
    form = {key: x for key, x in message.items() if key != "reasoning_content"}
    form["content"] = f"{thought}\n{THINK_END}\n\n{message['content']}".lstrip("\n")
    return form


def is_open(opening: str) -> bool:
    """Whether an opening leaves a thought open."""
    return THINK in opening and THINK_END not in opening
