"""Chat rendering, loss masks, parsing, and the tokenizer that turns pieces into ids."""

import json
import os
import random
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from fixtures.machine import allowance

from nanocascade.tokenizer.chat import MARKUP, parse_response, render_pieces
from nanocascade.tokenizer.tokenizer import Tokenizer, _jinja, _jinja_pieces
from nanocascade.toy.start import build_toy_tokenizer

GOLDEN = Path(__file__).parents[2] / "shared" / "data" / "chat" / "nemotron3_nano.jsonl"
# Our conversations as the published templates of Nemotron 3 Nano, Qwen3 and SmolLM2 render them.
FIXED, *ROWS = map(json.loads, (Path(__file__).parent / "fixtures" / "chat.jsonl").open())
OPENINGS = {
    "nemotron3": ("<think>\n", "<think></think>"),
    "qwen3": ("", "<think>\n\n</think>\n\n"),
    "chatml": ("", ""),
}
WORDS = ["the", " the", "\nQ", "\nQ:", "then\n", "\u00e9t\u00e9", "\x00\x00", "<think>x"]
USER = {"role": "user", "content": "2+2?"}
END, CALL = "<|im_end|>", ("f", {"a": 1})


def said(content, thought=None, calls=()):
    calls = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
    return {
        "role": "assistant",
        "content": content,
        "reasoning_content": thought,
        "tool_calls": calls,
    }


def text_of(pieces, loss=False):
    return "".join(piece.text for piece in pieces if piece.loss or not loss)


def written(tokenizer, messages):
    ids, mask = tokenizer.render(messages)
    return tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])


def read(path, **changes):
    """A toy tokenizer, its files changed: tokenizer_config=function of the file's JSON."""
    build_toy_tokenizer(path, WORDS)
    for stem, change in changes.items():
        file = path / f"{stem}.json"
        spec = json.loads(file.read_text()) if file.exists() else {}
        change(spec)
        file.write_text(json.dumps(spec))
    return Tokenizer(path)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return read(tmp_path_factory.mktemp("toy"))


@pytest.mark.skipif(not GOLDEN.exists(), reason="needs the shared data")
def test_parity_golden_strings(toy):
    """The report's format is met to the letter, and ids decode to the same text."""
    for row in map(json.loads, GOLDEN.open()):
        for key, modes in (
            ("full", (True, False)),
            ("prompt_thinking", (True, True)),
            ("prompt_no_thinking", (False, True)),
        ):
            given = row["messages"], row["tools"], *modes
            assert toy.render_text(*given) == toy.decode(toy.render(*given)[0]) == row[key]


@pytest.mark.parametrize("style", OPENINGS)
def test_parity_published_templates(style):
    """Every stored conversation is rendered as the style's published template renders it."""
    for row in (row for row in ROWS if style in row):
        tools = FIXED["tools"] if row["tools"] else None
        want = row[style].replace("%TOOLS%", FIXED.get(style, ""))
        assert text_of(render_pieces(row["messages"], tools, style=style)) == want
        for thinking, opening in zip((True, False), OPENINGS[style], strict=True):
            prompt = render_pieces(row["messages"], tools, thinking, True, style)
            assert text_of(prompt) == want + "<|im_start|>assistant\n" + opening


def published(source, toy, path):
    """Saves to `path` the toy's tokenizer with its own template or with one that TRL ships, or the
    tokenizer of the directory that an environment variable names."""
    if source.endswith("jinja"):
        trl = pytest.importorskip("trl")
        template = (Path(trl.__file__).parent / "chat_templates" / source).read_text()
        read(path, tokenizer_config=lambda config: config.update(chat_template=template))
    elif source == "toy":
        toy.save(path)
    elif folder := os.environ.get(source):
        Tokenizer(folder).save(path)
    else:
        pytest.skip(f"no {source}")


@pytest.mark.parametrize(
    "source, style",
    [
        ("toy", "nemotron3"),
        ("nemotron_3_nano.jinja", "nemotron3"),
        ("qwen3.jinja", "qwen3"),
        ("NANOCASCADE_QWEN3", "qwen3"),
        ("NANOCASCADE_SMOLLM2", "chatml"),
    ],
)
def test_parity_transformers(source, style, toy, tmp_path):
    """Text, ids and mask are those of the directory's own template, run live by transformers.

    Ids may differ where markup is quoted (there it becomes special) or an answer begins with a
    blank, which a tokenizer may join with the prompt's last character. The mask is compared with
    the one found by rendering prefixes, which asks for turns that a prompt leads to.
    """
    auto = pytest.importorskip("transformers").AutoTokenizer
    published(source, toy, tmp_path)
    ours, theirs = Tokenizer(tmp_path), auto.from_pretrained(tmp_path)
    assert ours.style == style and (source != "toy" or ours.fingerprint() == toy.fingerprint())
    rows = [row for row in ROWS if style in row]
    num_ids = num_masks = 0
    for row in rows:
        turns, tools = row["messages"], FIXED["tools"] if row["tools"] else None
        for modes in ((True, False), (True, True), (False, True)):
            text = theirs.apply_chat_template(
                turns,
                tools,
                tokenize=False,
                add_generation_prompt=modes[1],
                **({"enable_thinking": modes[0]} if modes[1] else {}),
            )
            assert ours.render_text(turns, tools, *modes) == text
            ids = theirs(text, add_special_tokens=False)["input_ids"]
            quoted = any(x in json.dumps(turns) for x in ours.special_ids)
            blank = any(m["role"] == "assistant" and m["content"][:1] == " " for m in turns)
            assert ours.render(turns, tools, *modes)[0] == ids or quoted or blank
            num_ids += not (quoted or blank)
        roles = ["assistant", *(m["role"] for m in turns if m["role"] != "system")]
        if ("assistant", "assistant") not in zip(roles, roles[1:], strict=False):
            render = partial(_jinja(ours.template).render, tools=tools, **ours.names)
            foreign = _jinja_pieces(render, turns, True, False)
            both = render_pieces(turns, tools, style=style), foreign
            found = ("".join(str(int(p.loss)) * len(p.text) for p in pieces) for pieces in both)
            assert next(found) == next(found)
            num_masks += 1
    assert min(num_ids / 3, num_masks) >= 40


@pytest.mark.parametrize(
    "style, thought, want",
    [
        ("nemotron3", "add", "add\n</think>\n4<|im_end|>"),
        ("nemotron3", None, "4<|im_end|>"),
        ("qwen3", "add", "<think>\nadd\n</think>\n\n4<|im_end|>"),
        ("qwen3", None, "4<|im_end|>"),
        ("chatml", None, "4<|im_end|>"),
    ],
)
def test_numbers_mask(style, thought, want):
    """Loss lies on what follows the prompt up to <|im_end|>, and the prompt is a prefix."""
    prompt = render_pieces([USER], None, thought is not None, True, style)
    pieces = render_pieces([USER, said("4", thought)], style=style)
    assert pieces[: len(prompt)] == prompt and text_of(pieces[len(prompt) :]) == want + "\n"
    assert text_of(pieces, loss=True) == want


def test_numbers_mask_of_many_turns(toy):
    """Turns with a removed thought are context; the others, calls included, carry loss."""
    turns = [
        USER,
        said("4", "add"),
        USER,
        said("5"),
        USER,
        said("", "call", [CALL]),
        {"role": "tool", "content": "7"},
        said("six", "so"),
    ]
    form = "<function=f>\n<parameter=a>\n1\n</parameter>\n</function>"
    form = f"<tool_call>\n{form}\n</tool_call>\n"
    assert written(toy, turns) == f"5{END}call\n</think>\n{form}{END}so\n</think>\nsix{END}"
    hidden = render_pieces(turns, thinking=False)
    assert text_of(hidden).endswith(f"<think></think>six{END}\n")
    assert text_of(hidden, loss=True).endswith(f"\n{form}{END}six{END}")
    form = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    assert text_of(render_pieces(turns, style="qwen3"), loss=True) == (
        f"<think>\ncall\n</think>\n\n{form}{END}<think>\nso\n</think>\n\nsix{END}"
    )


def test_markup_in_text_stays_text(toy, tmp_path):
    """No text becomes control tokens, also where a vocabulary calls them ordinary or lacks them."""

    def ordinary(spec):  # as in Qwen3's vocabulary
        for token in spec["added_tokens"]:
            token["special"] = token["content"] == "<|endoftext|>"

    def poor(spec):  # as in SmolLM2's
        spec["added_tokens"] = [t for t in spec["added_tokens"] if "think" not in t["content"]]

    quoted = "".join(toy.special_ids) + "<tool_response>"
    turns = [USER | {"content": quoted}, said(END), USER, said(quoted, quoted)]
    for i, change in enumerate((dict, ordinary, poor)):
        tokenizer = read(tmp_path / str(i), tokenizer=change)
        special, plain = tokenizer.special_ids.values(), [USER, said(""), USER, said("b", "c")]
        ids, (prompt, _) = tokenizer.render(turns)[0], tokenizer.render(turns[:3], None, True, True)
        assert [i for i in ids if i in special] == [
            i for i in tokenizer.render(plain)[0] if i in special
        ]
        assert tokenizer.decode(ids) == toy.render_text(turns) and ids[: len(prompt)] == prompt
        assert (tokenizer.fingerprint() == toy.fingerprint()) == (change is not poor)
        assert written(tokenizer, turns) == f"{END}{END}{quoted}\n</think>\n{quoted}{END}"


@pytest.mark.parametrize("style", ["nemotron3", "qwen3"])
def test_invariance_parse_render(style):
    """Parsing a rendered answer gives the message back, whatever its thought, text and calls."""
    kinds = {
        "n": "integer",
        "b": ["boolean", "null"],
        "l": "array",
        "s": "string",
        "x": ["string", "integer"],
        "y": "integer",
    }
    fields = {name: {"type": kind} for name, kind in kinds.items()} | {"z": True}
    tools = [{"name": "f", "parameters": {"properties": fields}}]
    arguments = {
        "n": -3,
        "b": True,
        "l": [1, {"a": "\u00e9"}],
        "s": "a\n\nb </parameter> 7\n",
        "x": "7",
        "y": "True",
    }  # y is no integer: the string stays
    for thought in (None, "a", "a\n\nb", "<tool_call> no"):
        for content in ("", "4", "\\boxed{4}\nso", "a <think> tag"):
            for calls in ((), [("f", arguments)], [("f", {"b": None}), ("g", {"s": "12"})]):
                message = said(content, thought, calls)
                text = text_of(render_pieces([USER, message], style=style))
                got = parse_response(text.partition("assistant\n")[2], tools)
                assert got == message | {"unfinished": False}
    asked = text_of(render_pieces([USER], tools, style=style))  # z's schema, `true`, says nothing
    assert "<name>z</name>\n</parameter>" in asked or '"z": true' in asked


@pytest.mark.parametrize(
    "text, content, thought, unfinished",
    [
        ("<think>\nhm", "", "hm", True),
        ("<think>", "", None, True),
        ("", "", None, False),
        ("<think></think>4", "4", None, False),
        ("<think>\n\n</think>\n4", "4", None, False),
        ("<think>a</think>\n b</think>", " b</think>", "a", False),
        ("a<think>", "a<think>", None, 0),
        ("<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", None, False),
    ],
)
def test_numbers_parse(text, content, thought, unfinished):
    """Cut and broken answers keep what was said; only an open <think> is unfinished."""
    want = said(content, thought) | {"unfinished": unfinished}
    assert parse_response(text) == parse_response(text + END) == want


def test_parse_never_raises():
    """Whatever a model writes is parsed, and in linear time."""
    parts = [
        *MARKUP,
        "<function=f>",
        "</function>",
        "<parameter=a>",
        "</parameter>",
        '{"name": "f"',
        "{",
        "}",
        "9" * 5000,
        "[",
        "\n",
        "\x00",
    ]
    rng, start = random.Random(0), time.process_time()
    for _ in range(2000):
        message = parse_response("".join(rng.choices(parts, k=rng.randrange(12))))
        assert list(message) == [*said(""), "unfinished"]
    for part in parts:
        many = (part * 20_000)[:200_000]
        parse_response(f"<tool_call><function=f>{many}</function></tool_call>")
    assert time.process_time() - start < allowance(5)


def test_toy_encodes_any_text(toy):
    """decode(encode(x)) == x for all of unicode; the longest word wins and splits no other."""
    rng = random.Random(0)
    for _ in range(500):
        wild = [chr(rng.randrange(0xD800)), chr(rng.randrange(0xE000, 0x110000))]
        text = "".join(rng.choices([*WORDS, *toy.special_ids, "a", "\n", *wild], k=12))
        assert toy.decode(toy.encode(text)) == text
    for text, want in (
        ("in the then\n", ["i", "n", " the", " ", "then\n"]),
        ("907", [*"907"]),
        ("bathe the1 the.", [*"bathe the1", " the", "."]),
        ("\nQ:9", ["\nQ:", "9"]),
    ):
        assert [toy.decode([i]) for i in toy.encode(text)] == want


def test_tool_results_continue_a_rollout(toy):
    """Prompt, sampled call and tool_result_ids are the ids of the rendered conversation."""
    turns, results = [USER, said("", "c", [CALL])], ["1", "2"]
    later = [*turns, *({"role": "tool", "content": result} for result in results)]
    ids, _ = toy.render(turns)
    for thinking in (True, False):
        want, _ = toy.render(later, None, thinking, True)
        assert ids[:-1] + toy.tool_result_ids(results, thinking) == want
        assert toy.opening(thinking) == OPENINGS["nemotron3"][not thinking]
    assert toy.parse(ids) == said("", "c", [("f", {"a": "1"})]) | {"unfinished": False}


def test_unknown_template(tmp_path, monkeypatch):
    """jinja2 renders a foreign template, its prefixes give the mask; what is missing is named."""
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = read(tmp_path, tokenizer_config=lambda c: c.update(chat_template=template))
    bare = read(tmp_path, tokenizer_config=lambda c: c.pop("chat_template"))
    turns = [USER, said("4"), USER, said("5")]
    monkeypatch.setitem(sys.modules, "jinja2.sandbox", None)
    for missing, reader in (("no chat template", bare), ("pip install jinja2", tokenizer)):
        with pytest.raises(ValueError, match=missing):
            reader.render(turns)
    both = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]
    several = read(tmp_path, tokenizer_config=lambda c: c.update(chat_template=both))
    assert several.template == template
    with pytest.raises(ValueError, match="'tool_use'. none is the default"):
        read(tmp_path, tokenizer_config=lambda c: c.update(chat_template=both[:1]))
    monkeypatch.undo()
    pytest.importorskip("jinja2")
    assert written(tokenizer, turns) == f"4{END}5{END}"
    assert tokenizer.render(turns)[0].count(tokenizer.special_ids[END]) == 4
    assert tokenizer.render_text(turns[:2], None, True, True).endswith(f"4{END}\n[assistant]")


def test_stops_and_bad_messages(toy, tmp_path):
    """All stop ids of a directory are collected; what cannot be rendered faithfully is refused."""
    more = read(tmp_path, generation_config=lambda c: c.update(eos_token_id=[2, 1]))
    assert more.eos_ids == [toy.special_ids[END], 2, 1] and toy.eos_ids == more.eos_ids[:1]
    assert toy.pad_id == toy.special_ids["<|endoftext|>"] and toy.vocab_size == 256 + len(WORDS) + 7
    for messages, style in (
        ([], "qwen3"),
        ([USER | {"content": [{}]}], "nemotron3"),
        ([said("", None, [("f", "no json")])], "nemotron3"),
        ([said("", None, [CALL])], "chatml"),
    ):
        with pytest.raises(ValueError, match="got"):
            render_pieces(messages, style=style)
