"""The tokenizer.json of a model directory: conversations to ids with a loss mask, and back.

    tokenizer = Tokenizer("runs/out/sft")
    ids, mask = tokenizer.render([{"role": "user", "content": "2+2?"}], add_generation_prompt=True)
    message = tokenizer.parse(ids + sampled)             # content, reasoning_content, tool_calls

Ids are made piece by piece (chat.py): markup that we write is one special token, markup in any
text stays text. The style follows from the directory's chat template; one that STYLES does not
know is rendered by jinja2, and then markup in text does become special, as in transformers.
"""

import hashlib
import json
import re
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path

import tokenizers

from nanocascade.files import read_json, read_text
from nanocascade.tokenizer.chat import MARKUP, Piece, merge, parse_response, render_pieces

# Style <- texts that, all together, only templates of this very behaviour contain. (Nemotron 3
# Ultra has no newline after </think>, other descendants of Qwen3 another rule for history.)
STYLES = (
    ("nemotron3", ("nanocascade nemotron3",)),  # ours, of toy directories
    (
        "nemotron3",
        (
            "truncate_history_thinking",
            "<function=example_function_name>",
            r'~ "\n</think>\n" ~',
            '"<think></think>" ~ c | trim',
        ),
    ),
    (
        "qwen3",
        (
            "enable_thinking is false",
            "<args-json-object>",
            "if loop.index0 > ns.last_query_index %}",
            r"\n</think>\n\n' + content.lstrip",
        ),
    ),
    (
        "chatml",
        (
            "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
            "{{'<|im_start|>' + message['role'] + '",
        ),
    ),
)
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
        self.files = {
            name: read_text(file) for name in FILES if (file := Path(path) / name).exists()
        }
        if "tokenizer.json" not in self.files:
            raise ValueError(f"{path} has no tokenizer.json")
        spec, config, sampling = (
            read_json(Path(path) / name) if name in self.files else {} for name in FILES[:3]
        )
        spec |= {"truncation": None, "padding": None}
        try:
            for token in spec["added_tokens"]:
                # Qwen3 declares <think> an ordinary token; special here: never made from text.
                token["special"] = token["special"] or token["content"] in MARKUP
            self.special_ids = {t["content"]: t["id"] for t in spec["added_tokens"] if t["special"]}
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path}/tokenizer.json is damaged: {error!r}") from None
        self._tokenizer.encode_special_tokens = True
        # Conversations repeat most of their pieces ("user\n", tool declarations).
        self._cached_ids = lru_cache(4096)(
            lambda text: self._tokenizer.encode(text, add_special_tokens=False).ids
        )
        self._turn = cache(self._read_turn)
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)

        template = config.get("chat_template") or ""
        if isinstance(template, list):  # several by name: [{"name": ..., "template": ...}, ...]
            several = {x["name"]: x["template"] for x in template}
            if "default" not in several:
                raise ValueError(f"{path}: of the chat templates {[*several]} none is the default")
            template = several["default"]
        self.template = self.files.get("chat_template.jinja") or template
        self.style = next(
            (style for style, marks in STYLES if all(mark in self.template for mark in marks)), None
        )
        names = {key: config.get(key) or "" for key in ("bos_token", "eos_token", "pad_token")}
        self.names = {k: v["content"] if isinstance(v, dict) else v for k, v in names.items()}
        stops = sampling.get("eos_token_id")
        named = [self.special_ids.get(text) for text in ("<|im_end|>", self.names["eos_token"])]
        stops = dict.fromkeys([*named, *(stops if isinstance(stops, list) else [stops])])
        self.eos_ids = [stop for stop in stops if stop is not None]
        if not self.eos_ids:
            raise ValueError(f"{path} names no end of a turn: no <|im_end|>, no eos_token")
        pads = [self.special_ids.get(text) for text in (self.names["pad_token"], "<|endoftext|>")]
        self.pad_id = next((pad for pad in pads if pad is not None), self.eos_ids[0])

    def render(self, messages, tools=None, thinking=True, add_generation_prompt=False):
        """(ids, mask) of a conversation; mask is 1 on what assistants write, <|im_end|> included.

        thinking: what the generation prompt asks for, or, without one, whether the last answer
        shows its thought. A prompt's ids are a prefix of the ids of prompt and answer.
        """
        return self._ids(self._pieces(messages, tools, thinking, add_generation_prompt))

    def render_text(self, messages, tools=None, thinking=True, add_generation_prompt=False):
        """The text of render, as the directory's own chat template would write it."""
        pieces = self._pieces(messages, tools, thinking, add_generation_prompt)
        return "".join(piece.text for piece in pieces)

    def _pieces(self, messages, tools, thinking, add_generation_prompt):
        if self.style:
            return render_pieces(messages, tools, thinking, add_generation_prompt, self.style)
        if not self.template:
            raise ValueError(
                "no chat template beside tokenizer.json: put there, as"
                " chat_template.jinja, the model's own or nanocascade/nemotron3.jinja"
            )
        render = partial(_jinja(self.template).render, tools=tools, **self.names)
        pieces = _jinja_pieces(render, messages, thinking, add_generation_prompt)
        markup = f"({'|'.join(map(re.escape, self.special_ids))})"
        return [
            Piece(text, text in self.special_ids, piece.loss)
            for piece in pieces
            for text in re.split(markup, piece.text)
        ]

    def _ids(self, pieces):
        """Markup that the vocabulary lacks (<think> in SmolLM2's) is text like its neighbours."""
        pieces = merge(p._replace(special=p.special and p.text in self.special_ids) for p in pieces)
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
        """Header and opening of a turn: ("<|im_start|>assistant\\n", "<think>\\n")."""
        question = [{"role": "user", "content": ""}]
        bare, prompt = (self.render_text(question, None, thinking, x) for x in (False, True))
        header, think, rest = prompt[len(bare) :].partition("<think>")
        return header, think + rest

    @cached_property
    def thinks(self):
        """Whether the template shows thoughts; SmolLM2's drops them, so SFT must not use them."""
        answer = {"role": "assistant", "content": "a", "reasoning_content": "%thought%"}
        return "%thought%" in self.render_text([{"role": "user", "content": "q"}, answer])

    def tool_result_ids(self, results, thinking=True):
        """What follows a sampled <|im_end|>: its newline, the results, the next prompt."""
        call = {"role": "assistant", "content": "a", "reasoning_content": "a"}
        tools = [{"role": "tool", "content": result} for result in results]
        messages = [{"role": "user", "content": "q"}, call, *tools]
        pieces = self._pieces(messages, None, thinking, add_generation_prompt=True)
        end = max(i for i, piece in enumerate(pieces) if piece.loss)
        return self._ids(pieces[end + 1 :])[0]

    def save(self, path):
        """Writes the files this was read from, unchanged."""
        Path(path).mkdir(parents=True, exist_ok=True)
        for name, text in self.files.items():
            (Path(path) / name).write_text(text, "utf-8")

    def fingerprint(self):
        """Equal for tokenizers under which a teacher's and a student's ids mean the same."""
        vocab = sorted(self._tokenizer.get_vocab(with_added_tokens=True).items())
        known = json.dumps([vocab, sorted(self.special_ids.items()), self.style or self.template])
        return hashlib.sha256(known.encode()).hexdigest()


@cache
def _jinja(template):
    """A chat template as transformers reads it; sandboxed, for it comes with somebody's model."""
    try:
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ValueError(
            "this chat template is none of nemotron3, qwen3 and chatml and needs"
            " jinja2: pip install jinja2"
        ) from error

    def raise_exception(message):
        raise ValueError(f"the chat template refuses these messages: {message}")

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template)


def _jinja_pieces(render, messages, thinking, add_generation_prompt):
    """The rendered conversation, cut where loss begins and ends; found by rendering its prefixes.

    A turn carries loss if the prompt before it, in either thinking mode, and the conversation up to
    its end are both prefixes of the whole: where a template rewrites history it carries none.
    """
    if not thinking and not add_generation_prompt and messages[-1]["role"] == "assistant":
        messages = [*messages[:-1], messages[-1] | {"reasoning_content": ""}]
    text = render(
        messages=messages, enable_thinking=thinking, add_generation_prompt=add_generation_prompt
    )
    pieces, at = [], 0
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and i > 0:
            done = render(messages=messages[: i + 1], enable_thinking=thinking).rstrip("\n")
            prompts = [
                render(messages=messages[:i], add_generation_prompt=True, enable_thinking=mode)
                for mode in (True, False)
            ]
            start = max((len(prompt) for prompt in prompts if done.startswith(prompt)), default=0)
            if start and text.startswith(done):
                pieces += [Piece(text[at:start]), Piece(text[start : len(done)], loss=True)]
                at = len(done)
    return [*pieces, Piece(text[at:])]
