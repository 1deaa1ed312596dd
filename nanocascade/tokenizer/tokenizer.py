"""The tokenizer of a model directory: conversations to ids with a loss mask, and back.

    tokenizer = Tokenizer("runs/out/sft")
    ids, mask = tokenizer.render([{"role": "user", "content": "2+2?"}], add_generation_prompt=True)
    message = tokenizer.parse(ids + sampled)             # content, reasoning_content, tool_calls

The directory's own chat template writes the text (conversation.py). Ids are made piece by piece:
markup that the template writes is one special token, and what the model writes begins a piece, so
that the ids of a prompt are a prefix of those of prompt and answer. What would be trained or
sampled wrongly is refused when it is rendered, which is when rows are read.
"""

import hashlib
import json
from functools import cache, lru_cache
from pathlib import Path

from nanocascade.files import check_types, present, read_json, read_text
from nanocascade.tokenizer.chat import IM_END, parse_response
from nanocascade.tokenizer.conversation import THOUGHTFUL, ChatTemplate
from nanocascade.tokenizer.read import NAMES, check_config, read_spec, read_templates
from nanocascade.tokenizer.stops import read_stop_ids

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)


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

        given = present(older) | present(config)
        names = {key: given[key] for key in NAMES if key in given}
        names = {key: x.get("content") if isinstance(x, dict) else x for key, x in names.items()}
        template, tool_template = read_templates(path, config, self.files)
        check_types(str(path), names, dict.fromkeys(names, str))
        for key, token in names.items():  # transformers would add it, with an id of its own
            if token not in vocabulary and key in template:
                raise ValueError(
                    f"{path}: tokenizer.json lacks the {key} {token!r} of its template"
                )
        named = [self.special_ids.get(x) for x in (IM_END, names.get("eos_token"))]
        self.eos_ids = [x for x in dict.fromkeys([*named, *stops]) if x is not None]
        if not self.eos_ids:
            raise ValueError(f"{path} names no end of a turn: no <|im_end|>, no eos_token")
        ends = [text for text, i in self.special_ids.items() if i in self.eos_ids]
        self.chat_template = ChatTemplate(template, tool_template, names, self.special_ids, ends)
        self._check_template = cache(self._try_template)

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

    def _pieces(self, *conversation):
        self._check_template()
        return self.chat_template.pieces(*conversation)

    def _ids(self, pieces):
        """(ids, mask) of pieces, each encoded by itself."""
        ids, mask = [], []
        for piece in pieces:
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
        text, (header, _) = self._without_stop(ids), self.chat_template.turn(True)
        return parse_response(text.rpartition(header)[2] if header else text, tools)

    def opening(self, thinking=True):
        """The first text of an answer, written by the prompt: "<think>\\n" for Nemotron 3."""
        return self.chat_template.turn(thinking)[1]

    def response_text(self, ids, thinking=True):
        """An assistant's turn as text: its opening and sampled ids, without the stop token."""
        return self.opening(thinking) + self._without_stop(ids)

    def _without_stop(self, ids):
        return self.decode(ids[:-1] if ids and ids[-1] in self.eos_ids else ids)

    @property
    def thinks(self):
        """Whether the template shows thoughts; SmolLM2's drops them, so SFT must not use them."""
        return self.chat_template.thinks

    def tool_result_ids(self, results, thinking=True):
        """What follows a sampled stop token: the rest of the turn, the results, the next prompt."""
        return self._ids(self.chat_template.after_answer(results, thinking))[0]

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
        pieces = self.chat_template.pieces([*turns, turns[0]], None, True, True)
        text = "".join(piece.text for piece in pieces)
        self._tokenizer.encode_special_tokens = False
        whole = self._tokenizer.encode(text, add_special_tokens=False).ids
        self._tokenizer.encode_special_tokens = True
        if whole != self._ids(pieces)[0]:
            raise ValueError(
                f"the tokenizer encodes its own chat template's {text!r} as {self.decode(whole)!r},"
                " since special tokens change the text beside them; this is not supported"
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
        if self.chat_template.template:
            turns = [*THOUGHTFUL, THOUGHTFUL[0]]
            known += [self.render_text(turns, None, x, True) for x in (True, False)]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()
