"""Chat rendering, loss masks, parsing, and the tokenizer that turns pieces into ids."""

import json
import os
import random
import time
from pathlib import Path

import pytest
from fixtures.machine import allowance

from nanocascade.tokenizer import conversation
from nanocascade.tokenizer.chat import MARKUP, TEMPLATE, parse_response
from nanocascade.tokenizer.messages import chat_form
from nanocascade.tokenizer.tokenizer import Tokenizer
from nanocascade.toy.start import build_toy_tokenizer

GOLDEN = Path(__file__).parents[2] / "shared" / "data" / "chat" / "nemotron3_nano.jsonl"
# Our conversations as the published templates of Nemotron 3 Nano, Qwen3 and SmolLM2 render them.
FIXED, *ROWS = map(json.loads, (Path(__file__).parent / "fixtures" / "chat.jsonl").open())
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


def written(tokenizer, messages, thinking=True):
    ids, mask = tokenizer.render(messages, None, thinking)
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


def with_template(path, template, eos=END, **changes):
    """A toy tokenizer with another chat template and eos_token."""
    return read(
        path,
        tokenizer_config=lambda x: x.update(chat_template=template, eos_token=eos),
        **changes,
    )


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


def test_parity_stored_strings(toy):
    """Every stored conversation is rendered as Nemotron 3 Nano's published template renders it."""
    for row in ROWS:
        tools = FIXED["tools"] if row["tools"] else None
        want = row["nemotron3"].replace("%TOOLS%", FIXED["nemotron3"])
        assert toy.render_text(row["messages"], tools) == want
        for thinking, opening in ((True, "<think>\n"), (False, "<think></think>")):
            prompt = toy.render_text(row["messages"], tools, thinking, True)
            assert prompt == want + "<|im_start|>assistant\n" + opening


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


SOURCES = [
    ("toy", "nemotron3"),
    ("nemotron_3_nano.jinja", "nemotron3"),
    ("qwen3.jinja", "qwen3"),
    ("qwen2_5.jinja", None),
    ("NANOCASCADE_QWEN3", "qwen3"),
    ("NANOCASCADE_QWEN25", None),
    ("NANOCASCADE_LLAMA3", None),
    ("NANOCASCADE_SMOLLM2", "chatml"),
]


@pytest.mark.parametrize("source, style", SOURCES)
def test_parity_transformers(source, style, toy, tmp_path):
    """Text and ids are those of the directory's own template, run live by transformers.

    Ids may differ where markup is quoted (there it becomes special), texts where an assistant's
    answer quotes a think tag (the published templates cut it there).
    """
    auto = pytest.importorskip("transformers").AutoTokenizer
    published(source, toy, tmp_path)
    ours, theirs = Tokenizer(tmp_path), auto.from_pretrained(tmp_path)
    assert source != "toy" or ours.fingerprint() == toy.fingerprint()
    equal_texts = equal_ids = 0
    for row in ROWS:
        turns, tools = row["messages"], FIXED["tools"] if row["tools"] else None
        if style in (None, "chatml") and (
            tools or any("tool_calls" in x or x["role"] == "tool" for x in turns)
        ):
            continue
        for modes in ((True, True), (False, True)):
            text = theirs.apply_chat_template(
                turns,
                tools,
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=modes[0],
            )
            rendered = ours.render_text(turns, tools, *modes)
            if style in row:
                assert text == row[style].replace("%TOOLS%", FIXED.get(style, "")) + (
                    "<|im_start|>assistant\n" + ours.opening(modes[0])
                )
                assert rendered == text
            equal_texts += rendered == text
            ids = theirs(text, add_special_tokens=False)["input_ids"]
            quoted = any(x in json.dumps(turns) for x in (*ours.special_ids, *MARKUP))
            if not quoted:
                assert rendered == text and ours.render(turns, tools, *modes)[0] == ids
                equal_ids += 1
    assert min(equal_texts, equal_ids) >= 40, (equal_texts, equal_ids)


QWEN3 = """{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.last %}
{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}
{%- endif %}
{{- m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    "template, thought, want",
    [
        (TEMPLATE, "add", "add\n</think>\n4<|im_end|>"),
        (TEMPLATE, None, "4<|im_end|>"),
        (QWEN3, "add", "<think>\nadd\n</think>\n\n4<|im_end|>"),
        (QWEN3, None, "4<|im_end|>"),
        (CHATML, "add", "4<|im_end|>"),
    ],
)
def test_numbers_mask(template, thought, want, tmp_path):
    """Loss lies on what follows the prompt up to <|im_end|>, and the prompt is a prefix."""
    tokenizer = with_template(tmp_path, template)
    turns = [USER, said("4", thought)]
    ids, mask = tokenizer.render(turns)
    prompt, no_loss = tokenizer.render([USER], None, thought is not None, True)
    assert ids[: len(prompt)] == prompt and not any(no_loss)
    assert tokenizer.decode(ids[len(prompt) :]) == want + "\n"
    assert written(tokenizer, turns) == want


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
    assert toy.render_text(turns, None, False).endswith(f"<think></think>six{END}\n")
    assert written(toy, turns, False).endswith(f"\n{form}{END}six{END}")


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


def test_invariance_parse_render(toy):
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
                text = toy.render_text([USER, message], tools)
                got = parse_response(text.rpartition("assistant\n")[2], tools)
                assert got == message | {"unfinished": False}
    asked = toy.render_text([USER], tools)  # z's schema, `true`, says nothing
    assert "<name>z</name>\n</parameter>" in asked


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
        assert toy.opening(thinking) == ("<think>\n" if thinking else "<think></think>")
    assert toy.parse(ids) == said("", "c", [("f", {"a": "1"})]) | {"unfinished": False}


@pytest.mark.parametrize("template", [TEMPLATE, QWEN3, CHATML])
def test_invariance_long_conversations(template, tmp_path, monkeypatch):
    """The answers of a long conversation, rendered one by one, carry the loss that rendering every
    prefix gives, also where earlier ones lost their thought or quote markup."""
    tokenizer = with_template(tmp_path, template)
    result = {"role": "tool", "content": "7 <|im_end|>"}
    turns = [USER, said("", "a", [CALL]), result, said("<think>", "b", [CALL]), result, said("4")]
    if template != TEMPLATE:
        turns = [{k: x for k, x in turn.items() if k != "tool_calls"} for turn in turns]
    turns = [*turns, *turns, USER, said("5", "c"), USER, said("6"), *turns[:3], said("7", "d")]
    for thinking in (True, False):
        apart = tokenizer.render(turns, None, thinking)
        monkeypatch.setattr(conversation, "FEW_TURNS", 100)
        assert tokenizer.render(turns, None, thinking) == apart
        monkeypatch.undo()
    assert sum(apart[1]) > 0


def test_several_templates(tmp_path):
    """Of several templates "default" is used, and "tool_use" where tools are declared."""
    both = [{"name": "tool_use", "template": TEMPLATE}, {"name": "default", "template": CHATML}]
    tokenizer = with_template(tmp_path, both)
    assert tokenizer.chat_template.template == CHATML and "2+2?" in tokenizer.render_text([USER])
    assert "<name>f</name>" in tokenizer.render_text([USER], [{"name": "f"}])
    with pytest.raises(ValueError, match="'tool_use'. none is the default"):
        with_template(tmp_path, both[:1])
    bare = with_template(tmp_path, None)
    with pytest.raises(ValueError, match="no chat template"):
        bare.render([USER])
    (tmp_path / "additional_chat_templates").mkdir()
    with pytest.raises(ValueError, match="additional_chat_templates"):
        Tokenizer(tmp_path)


USER_TURN = "{% if m.role == 'user' %}{{ '<|im_start|>' + m.content }}{% else %}"
LOOP = "{% for m in messages %}" + USER_TURN
PROMPT = "{% endfor %}{% if add_generation_prompt %}%s{% endif %}"
HEADER = "{{ '<tool_call>' + m.content"  # any token will do as the header of an answer
EOS_AT_THE_END = (
    LOOP
    + HEADER
    + " }}{% endif %}"
    + PROMPT.replace("%s", "{{ '<tool_call>' }}{% else %}{{ eos_token }}")
)
REFUSED_ANSWERS = {
    "nothing ends a turn": (
        LOOP + HEADER + " }}{% endif %}" + PROMPT.replace("%s", "{{ '<tool_call>' }}"),
        "not in a stop token",
    ),
    "the next header ends a turn": (
        "{% for m in messages %}{{ '<tool_call>' + m.role + m.content }}"
        + PROMPT.replace("%s", "{{ '<tool_call>assistant' }}"),
        "not in a stop token",
    ),
    "only the end of the conversation has one": (EOS_AT_THE_END, "not in a stop token"),
    "the prompt opens a thought that no answer has": (
        LOOP
        + "{{ '<tool_call>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}"
        + PROMPT.replace("%s", "{{ '<tool_call><think>' }}"),
        "does not begin",
    ),
    "it does not parse": (CHATML + "{% if %}", "TemplateSyntaxError"),
    "it names what is not there": (CHATML + "{{ nobody.knows }}", "'nobody' is undefined"),
    "it refuses": (CHATML + "{{ raise_exception('no such role') }}", "refuses .*no such role"),
    "its code fails": (CHATML + "{{ 1 + 'a' }}", "TypeError"),
}


@pytest.mark.parametrize("kind", REFUSED_ANSWERS)
def test_refused_templates(kind, tmp_path):
    """A template under which an answer would be trained without its stop token, or not at all, and
    every error of jinja2's, are one ValueError of one line."""
    template, words = REFUSED_ANSWERS[kind]
    tokenizer = with_template(tmp_path, template, eos="<|endoftext|>")
    with pytest.raises(ValueError, match=words) as error:
        tokenizer.render([USER, said("4"), USER, said("5")])
    assert "\n" not in str(error.value)


def test_end_of_answers(tmp_path):
    """Loss ends with the stop token, whatever the template writes behind it; a conversation's one
    answer may end with the conversation."""
    spaced = CHATML.replace("<|im_end|>\\n", "<|im_end|> \\n")
    turns = [USER, said("4"), USER, said("5")]
    assert written(with_template(tmp_path, spaced), turns) == f"4{END}5{END}"
    tokenizer = with_template(tmp_path, EOS_AT_THE_END, eos="<|endoftext|>")
    assert written(tokenizer, turns[:2]) == "4<|endoftext|>"
    with pytest.raises(ValueError, match="not in a stop token"):
        tokenizer.tool_result_ids(["1"])


def test_prompt_that_opens_a_thought(tmp_path):
    """A template that reads no reasoning_content, but opens <think> in its prompt: the thought goes
    into the content and is closed there, an empty one too, so that no answer is trained inside."""
    template = (
        LOOP
        + "{% if loop.last %}{{ '<tool_call><think>\\n' + m.content + eos_token }}{% else %}"
        + "{{ '<tool_call>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endif %}"
        + PROMPT.replace("%s", "{{ '<tool_call><think>\\n' }}")
    )
    tokenizer = with_template(tmp_path, template)
    assert tokenizer.thinks and tokenizer.opening() == "<think>\n"
    for message, want in (
        (said("4", "so"), "so\n</think>\n\n4"),
        (said("<think>\nso\n</think>\n4"), "so\n</think>\n\n4"),
        (said("4"), "</think>\n\n4"),
        (said("a </think>"), "</think>\n\na </think>"),
    ):
        assert written(tokenizer, [USER, message]) == want + END
        answer = parse_response(tokenizer.opening() + want)
        assert answer["content"] == message["content"].rpartition("</think>\n")[2]
        assert not answer["unfinished"]
    assert written(tokenizer, [USER, said("4", "so")], False) == f"</think>\n\n4{END}"


def test_template_that_removes_thoughts(tmp_path):
    """A thought at the start of a content is removed by a template that removes it, as R1's does
    from the history, and is neither shown as text nor trained."""
    cut = CHATML.replace("m.content", "m.content.split('</think>')[-1].lstrip('\\n')")
    tokenizer = with_template(tmp_path, cut)
    assert not tokenizer.thinks and cut != CHATML
    inline = [USER, said("<think>\nt\n</think>\n\n4", None)]
    for more in ([], [USER]):
        assert tokenizer.render([*inline, *more]) == tokenizer.render(
            [USER, said("4", None), *more]
        )


def test_generation_tag_and_date(tmp_path):
    """{% generation %} is transparent, and strftime_now gives one date, as in transformers."""
    marked = CHATML.replace("m.role +", "m.role }}{% generation %}{{")
    marked = marked.replace("{% endfor %}", "{% endgeneration %}{% endfor %}")
    turns = [USER, said("4")]
    plain = with_template(tmp_path, CHATML).render(turns)
    assert with_template(tmp_path, marked).render(turns) == plain
    dated = "{{ strftime_now('%Y-%m-%d') if strftime_now is defined else 'never' }}" + CHATML
    date = with_template(tmp_path, dated).render_text([USER]).split("<")[0]
    assert time.strptime(date, "%Y-%m-%d")


CALLS = "{% for c in m.tool_calls or [] %}%s{% endfor %}"
JSON_CALL = (
    """{{ '{"name": "' + c.function.name + '", "arguments": ' + (c.function.arguments | tojson)"""
)
FORMS = {
    "<tool_call> with JSON": ("{{ '<tool_call>' }}" + JSON_CALL + " + '}</tool_call>' }}", True),
    "bare JSON": (JSON_CALL + " + '}' }}", False),
    "another tag": ("{{ '<TOOLCALL>[' }}" + JSON_CALL + " + '}]</TOOLCALL>' }}", False),
    "parameters": (
        "{{ '<tool_call>' }}"
        + JSON_CALL.replace('arguments":', 'parameters":')
        + " + '}</tool_call>' }}",
        False,
    ),
    "none": ("", False),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_calls(form, tmp_path):
    """Conversations with tools need a template whose calls are read back; arguments as a JSON
    string, as the API has them, are the same call."""
    call, readable = FORMS[form]
    template = CHATML.replace(
        "m.role + '\\n' +", "m.role + '\\n' }}" + CALLS.replace("%s", call) + "{{"
    )
    tokenizer = with_template(tmp_path, template)
    assert tokenizer.render([USER, said("4")])
    turns = [USER, said("", None, [("f", '{"a": 1}')]), {"role": "tool", "content": "7"}]
    if not readable:
        with pytest.raises(ValueError, match="a tool call as .* which we do not read"):
            tokenizer.render(turns)
        return
    assert tokenizer.render(turns) == tokenizer.render([USER, said("", None, [CALL]), turns[2]])
    ids, mask = tokenizer.render(turns)
    call = tokenizer.parse([i for i, m in zip(ids, mask, strict=True) if m])["tool_calls"]
    assert call == said("", None, [CALL])["tool_calls"]


@pytest.mark.parametrize(
    "stem, change, words",
    [
        (
            "tokenizer",
            lambda x: x["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
            "add a space",
        ),
        (
            "tokenizer",
            lambda x: x.update(normalizer={"type": "Prepend", "prepend": "_"}),
            "add a space",
        ),
        (
            "tokenizer",
            lambda x: x.update(
                normalizer={"type": "Strip", "strip_left": True, "strip_right": True}
            ),
            "or strip it",
        ),
        ("tokenizer", lambda x: x["model"].update(dropout=0.1), "dropout 0.1 is random"),
        (
            "tokenizer",
            lambda x: [t.update(rstrip=True) for t in x["added_tokens"]],
            "the text beside them",
        ),
        ("tokenizer_config", lambda x: x.update(add_prefix_space=True), "add_prefix_space True"),
        (
            "tokenizer_config",
            lambda x: x.update(split_special_tokens=True),
            "split_special_tokens True",
        ),
        (
            "tokenizer_config",
            lambda x: x.update(strip_accents=True),
            "strip_accents True is not supported",
        ),
        (
            "tokenizer_config",
            lambda x: x.update(added_tokens_decoder={"9999": {"content": "<new>"}}),
            "added_tokens_decoder 9999",
        ),
        (
            "tokenizer_config",
            lambda x: x.update(bos_token="<s>", chat_template="{{ bos_token }}" + CHATML),
            "lacks the bos_token '<s>'",
        ),
        ("tokenizer_config", lambda x: x.update(pad_token=["<s>"]), "pad_token is .* expected str"),
        ("tokenizer_config", lambda x: x.update(pad_token={"id": 1}), "pad_token is None"),
        ("tokenizer_config", lambda x: x.update(chat_template=3), "chat_template is 3, expected a"),
        ("tokenizer_config", lambda x: x.update(chat_template=[{"name": "a"}]), "chat_template is"),
        (
            "tokenizer_config",
            lambda x: x.update(added_tokens_decoder=[1]),
            "added_tokens_decoder is .* expected dict",
        ),
        (
            "tokenizer_config",
            lambda x: x.update(added_tokens_decoder={"a": "<new>"}),
            "added_tokens_decoder a is <new>",
        ),
        (
            "tokenizer_config",
            lambda x: x.update(add_bos_token=True, legacy=True, errors="replace"),
            None,
        ),
        (
            "tokenizer_config",
            lambda x: x.update(bos_token="<s>", clean_up_tokenization_spaces=True),
            None,
        ),
    ],
)
def test_refused_tokenizers(stem, change, words, tmp_path, toy):
    """A tokenizer under which prompts have other ids than their text as one is refused, and what
    tokenizer_config.json says beyond it is used, refused by name, or known to change nothing."""
    if words is None:
        assert read(tmp_path, **{stem: change}).render([USER]) == toy.render([USER])
        return
    with pytest.raises(ValueError, match=words):
        read(tmp_path, **{stem: change}).render([USER])


def test_messages():
    """Every field of a message is used, refused by name, or known to change no text."""
    for item, want in (
        ({"role": "developer", "content": "s"}, {"role": "system", "content": "s"}),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}, {"content": "ab"}),
        ({"content": "4", "reasoning": "so"}, {"reasoning_content": "so"}),
        ({"content": "4", "thinking": "so", "reasoning": None}, {"reasoning_content": "so"}),
        ({"content": None, "refusal": None, "annotations": [], "id": "x"}, {"content": ""}),
        (
            {"tool_calls": [{"name": "f", "arguments": '{"a": 1}'}]},
            {
                "tool_calls": [
                    {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
                ]
            },
        ),
        ({"role": "tool", "content": "7", "tool_call_id": "x", "name": "f"}, {"name": "f"}),
    ):
        (message,) = chat_form([{"role": "assistant"} | item])
        assert message == {"role": "assistant", "content": ""} | message | want
        assert chat_form([message]) == [message]
    for item, words in (
        ({"role": "ipython"}, "role 'ipython'"),
        ({"role": "user"}, "has no content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "must be text"),
        ({"role": "user", "content": "a", "reasoning": "so"}, "of the user"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"refusal": "No."}, "refusal"),
        ({"content": "4", "weight": 0}, "weight 0"),
        ({"content": "4", "reasoning": "a", "thinking": "b"}, "one string"),
        ({"tool_calls": [{"name": "f", "arguments": "{"}]}, "object as arguments"),
        ({"tool_calls": [{"name": "f", "arguments": "[1]"}]}, "object as arguments"),
    ):
        with pytest.raises(ValueError, match=words):
            chat_form([{"role": "assistant"} | item])


def test_stops(toy, tmp_path):
    """Stop ids come from the markup, the tokenizer's eos_token, and generation_config.json or else
    config.json; ids that the model has no embedding for are refused."""
    end = toy.special_ids[END]
    more = read(tmp_path, generation_config=lambda c: c.update(eos_token_id=[2, 1]))
    assert more.eos_ids == [end, 2, 1] and toy.eos_ids == [end]
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    assert Tokenizer(tmp_path).eos_ids == [end, 2, 1]
    (tmp_path / "generation_config.json").unlink()
    assert Tokenizer(tmp_path).eos_ids == [end, 5]
    assert toy.vocab_size == 256 + len(WORDS) + 7
    toy.check_model(toy.vocab_size, "m")
    with pytest.raises(ValueError, match=f"m: .* ids up to {toy.vocab_size - 1}, the model only"):
        toy.check_model(toy.vocab_size - 1, "m")
