"""Verifiers of mathematics, choices, documents, tool calls and look-ups: right is 1, all else is 0.

Tables hold answers as a model would write them. Rows are our own, in the forms of the released
data; the released example rows are graded too where they are at hand.
"""

import json
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
from fixtures.machine import allowance, confinement

from nanocascade.data.rows import read_rows
from nanocascade.environments.shop import run_tool
from nanocascade.rewards import Reward, check_row, score
from nanocascade.rewards.math import latex_equal
from nanocascade.sandbox.worker import worker

FIXTURES = Path(__file__).with_name("fixtures") / "rows.jsonl"
DATA = Path(__file__).parents[2] / "shared" / "data" / "nemo_gym"
CPU = "nanocascade.sandbox.worker.CPU_SECONDS"
GOOD = '{"name": "Ann", "age": 7, "tags": ["x", "y"], "pet": null}'
XML = "<p><name>Ann</name><age>7</age>%s<pet/></p>"
YAML = "name: %s\nage: %s\ntags: %s\npet: null"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "pet": {"type": ["string", "null"]},
    },
}
ROWS = {
    "math": {"expected_answer": "42"},
    "mcqa": {"options": [{"A": "red"}, {"B": "dark red"}, {"C": "17"}], "expected_answer": "B"},
    "structured": {"schema_str": json.dumps(PERSON)},
    "tools": {"ground_truth": [{"name": "f", "arguments": '{"x": 3, "s": "5", "b": true}'}]},
    "long_context": {"problem_type": "bfs", "expected_answer": '["a1", "b2"]'},
    "if": {
        "instruction_id_list": ["length_constraints:number_sentences", "copy:repeat_phrase"],
        "kwargs": [
            {"num_sentences": 2, "relation": "less than"},
            {"phrase": "Time flies when having fun", "small_n": 2},
        ],
    },
}


def needs(module):
    return pytest.mark.skipif(not find_spec(module), reason=f"the extra {module} is not installed")


def value(row, response):
    """The reward, after a look at what every verdict keeps to."""
    reward = score(row, response)
    assert isinstance(reward, Reward) and reward.value in (0.0, 1.0) and reward.reason
    return reward.value


def check(row, right, wrong):
    """Every right answer earns 1 and every wrong one 0."""
    for answer, reward in [(x, 1) for x in right] + [(x, 0) for x in wrong]:
        assert value(row, answer) == reward, answer[:100]


def call(name, **arguments):
    """A tool call in the form Nemotron models write it."""
    fields = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in arguments.items())
    return f"<tool_call>\n<function={name}>\n{fields}</function>\n</tool_call>"


def turns(*contents):
    return [{"role": "assistant", "content": content} for content in contents]


def test_the_last_box_counts():
    """Only the last complete box is read; none, an empty and an unfinished one earn nothing."""
    check(
        ROWS["math"],
        [
            r"\boxed{42}",
            r"\boxed{ 42. }",
            r"\boxed{042}",
            r"\boxed{+42.00}",
            r"\boxed{84/2}",
            r"$\boxed{\text{42}}$",
            r"\boxed{\dfrac{84}{2}}",
            r"\boxed{41} no, \boxed{42}",
            r"\boxed{\boxed{42}}",
            r"\boxed{42} \boxed{42}",
        ],
        [
            r"\boxed{43}",
            r"\boxed{41} \boxed{42}",
            r"\boxed{42} no, \boxed{41}",
            "42",
            r"\boxed{}",
            r"\boxed{42",
            r"\boxed 42",
            r"\boxed{42} or \boxed{4",
            r"\boxed{-42}",
            r"\boxed{41}, \boxed{42}",
            r"\boxed{" + "0" * 3000 + "42}",
        ],
    )


def test_numbers_compare_exactly():
    """Plain numbers are exact rationals, however they are written."""
    for expected, answer in (
        ("-0.5", r"-\frac{1}{2}"),
        (r"\(\frac{1}{2}\)", r"\frac12"),
        (7, "7"),
        ("1234", "1,234"),
        ("1234", "1{,}234"),
        ("$.5$", r"\frac{1}{2}"),
        ("1000", "1 000"),
        ("1000.99", "1000,99"),
    ):
        assert value({"expected_answer": expected}, rf"\boxed{{{answer}}}") == 1, answer
    assert value({"expected_answer": "1.5"}, r"\boxed{15}") == 0


@needs("math_verify")
@pytest.mark.parametrize(
    ("expected", "answer", "reward"),
    [
        (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", 1),
        (r"\{1,2,3\}", r"\{3,1,2\}", 1),
        ("(1,2)", "(1, 2)", 1),
        ("[0,1)", r"\left[0, 1\right)", 1),
        ("50\\%", "0.5", 1),
        ("x^2+2x+1", "(x+1)^2", 1),
        (r"\frac{1}{3}", "0.333333", 1),
        ("5", "x=5", 1),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\ \frac{4}{2}\end{bmatrix}", 1),
        ("1, 2", r"1} and \boxed{2", 1),
        ("32349", "32, 349", 0),
        ("[0,1)", "[0,1]", 0),
        ("(3,3), (1,1)", r"(3, 3)} \text{ for part (a) and } \boxed{(1, 1)", 1),
        ("y_1=2x, y_2=x", r"2x} \) and \( y_2 = \boxed{x", 1),
        ("2, 1", r"2} and not \boxed{1", 0),
        (r"\boxed{1} papers and \boxed{2} bins", "1,2", 1),
        ("2", r"1} and y = \boxed{2", 0),
        ("11/2", "1 1/2", 0),
        ("3/2", r"1\frac{1}{2}", 1),
        ("(1,2)", "(2,1)", 0),
        (r"\sqrt{2}", "1.5", 0),
        ("5", r"\{5,6\}", 0),
    ],
)
def test_mathematics_beyond_numbers(expected, answer, reward):
    """Roots, sets, tuples, intervals, percents, matrices and terms are equal by meaning."""
    assert value({"expected_answer": expected}, rf"so \boxed{{{answer}}}") == reward


def test_missing_extra_is_an_error_when_data_is_read(monkeypatch):
    """Without math-verify a number is still graded, and any other expected answer is refused."""
    for module in ("rewards.math", "sandbox.worker"):
        monkeypatch.setattr(f"nanocascade.{module}.find_spec", lambda name: None)
    assert score(ROWS["math"], r"\boxed{6\cdot 7}") == Reward(1.0, "correct")
    assert score(ROWS["math"], r"\boxed{\log_2 2^{42}}") == Reward(0.0, "answer not understood")
    with pytest.raises(ValueError, match="pip install math-verify"):
        check_row({"expected_answer": r"\log_2 7"})


@needs("math_verify")
def test_helper_is_killed_restarted_and_shared_by_threads(monkeypatch):
    """A tower of powers is cut off, later jobs from threads are right, and no start is loud."""
    monkeypatch.setattr(CPU, 1.0)
    row = {"expected_answer": r"\sqrt{2}"}
    assert value(row, r"\boxed{9^{9^{9^{9^{9^9}}}}+\sqrt{2}^{9^{9^9}}}") == 0
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(value, [row] * 4, [r"\boxed{2^{1/2}}"] * 4)) == [1.0] * 4
    with pytest.raises(RuntimeError, match="no_such_extra"):
        worker.run(latex_equal, "no_such_extra", "2", "1+1")
    assert worker.run(latex_equal, "math_verify", "2", "1+1") is True


@pytest.mark.parametrize(
    ("mode", "right", "wrong"),
    [
        (
            "strict_single_letter_boxed",
            [
                r"\boxed{B}",
                r"\boxed{\text{(B)}}",
                r"\boxed{\textbf{\mathrm{B}}}",
                r"\boxed{A} no, \boxed{B}",
            ],
            [
                r"\boxed{A} \boxed{B}",
                r"\boxed{b}",
                r"\boxed{A, B}",
                "B",
                r"\boxed{dark red}",
                r"\boxed{D}",
                r"\boxed{A}",
            ],
        ),
        (
            "lenient_boxed",
            [
                r"\boxed{b}",
                r"\boxed{Dark  Red.}",
                r"\boxed{B. dark red}",
                r"\boxed{B: a shade}",
                r"\boxed{\text{it is dark red}}",
            ],
            [
                r"\boxed{red}",
                r"\boxed{A, B}",
                r"\boxed{B: 17}",
                r"\boxed{dark red and 17}",
                "dark red",
                r"\boxed{171}",
                r"\boxed{(B) or (C)}",
                r"\boxed{B: x, or a}",
            ],
        ),
        (
            "lenient_answer_colon",
            [
                "Answer: B",
                "Answer:\nB",
                "**Answer:** (B)",
                "answer: dark red",
                "Answer: A\nAnswer: B",
            ],
            [
                "Answer: A or B",
                "B",
                "Answer: C",
                "Answer: B) or C)",
                "Answer: (B), C",
                "Answer: B. dark red. A) red",
            ],
        ),
    ],
)
def test_choices(mode, right, wrong):
    """Each mode finds the one option an answer names; naming two pays nothing."""
    check(ROWS["mcqa"] | {"grading_mode": mode}, right, wrong)

    row = ROWS["mcqa"] | {"options": [{"A": "+"}, {"B": "*"}, {"C": "Neither (A) nor (B)."}]}
    row |= {"grading_mode": "lenient_boxed"}  # all of B's text is markup; C's speaks of the others
    check(row, [r"\boxed{*}"], [r"\boxed{I don't know!}", r"\boxed{C: neither (A) nor (B)}"])
    check(row | {"expected_answer": "C"}, [r"\boxed{C: neither (A) nor (B)}"], [r"\boxed{C) or A}"])


def test_choice_by_the_rows_own_pattern(monkeypatch):
    """output_regex wins over the mode where it finds something, takes the last match, and is killed
    if it backtracks."""
    row = ROWS["mcqa"] | {"template_metadata": {"output_regex": r"Option Selected:\s*(\w)"}}
    right = ["option selected: A. Option Selected: B", r"\boxed{B}"]
    check(row, right, [r"\boxed{B} Option Selected: A"])
    monkeypatch.setattr(CPU, 0.3)
    bomb = row | {"template_metadata": {"output_regex": "(a+)+:(B)"}}
    assert score(bomb, "a" * 60) == Reward(0.0, "search took too long")


@pytest.mark.parametrize(
    ("form", "right", "wrong"),
    [
        (
            "json",
            [GOOD, f"\n```json\n{GOOD}\n```\n", f"```\n{GOOD}\n```", GOOD.replace("7", "7.0")],
            [
                f"Here: {GOOD}",
                f"[{GOOD}]",
                "",
                "[" * 100_000,
                GOOD.replace('"y"', "2"),
                *(GOOD.replace("7", age) for age in ('"7"', "true", "1e999", "NaN", "7.5")),
                GOOD.replace(', "pet": null', ""),
                GOOD[:-1] + ', "more": 1}',
                GOOD[:-1] + ', "age": 7}',
            ],
        ),
        (
            "toml",
            ['name = "Ann"\nage = 7\ntags = []\npet = "Rex"'],
            ['name = "Ann"\nage = 7\nage = 8\ntags = []\npet = "Rex"', "a." * 90_000 + "b = 1"],
        ),
        (
            "xml",
            [
                XML % "<tags>x</tags><tags>y</tags>",
                XML % "<tags><t>x</t><t>y</t></tags>",
                XML % "<tags/>",
            ],
            [
                XML % "",
                XML % "<tags/><more/>",
                XML % "<tags/>" * 2,
                "<p><name></p>",
                "<a>" * 50_000,
                '<!DOCTYPE p [<!ENTITY n "">]>' + XML % "<tags>&n;</tags>",
            ],
        ),
        pytest.param(
            "yaml",
            [YAML % ("Ann", "7", "[x]"), YAML % ("2020-01-01", "7", "[]")],
            [
                YAML % ("Ann", "'7'", "[]"),
                YAML % ("Ann", "7\nage: 8", "[]"),
                "{" * 9000,
                YAML % ("&n Ann", "7", "[*n]"),
                YAML % ("!!python/name:os.system", "7", "[]"),
                "a: &a [x]\n" + "".join(f"b{i}: &b{i} [*a,*a]\n" for i in range(50)),
            ],
            marks=needs("yaml"),
        ),
    ],
)
def test_documents(form, right, wrong, monkeypatch):
    """A document earns 1 only if all of the answer is one, safe to read, and fits the schema."""
    monkeypatch.setattr(CPU, 0.5)
    check(ROWS["structured"] | {"schema_type": form}, right, wrong)


def test_schema_values():
    """const and enum compare JSON values: 1 is 1.0 and true is not 1."""
    check({"schema_str": '{"enum": [1, [true]]}'}, ["1", "1.0", "[true]"], ["true", "[1]"])
    check({"schema_str": '{"items": {"const": {"a": 1}}}'}, ['[{"a": 1.0}]'], ['[{"a": true}]'])


@needs("jsonschema")
def test_schema_beyond_the_subset(monkeypatch):
    """Other keywords go to jsonschema, whose patterns cannot hang us; a bad schema is an error."""
    monkeypatch.setattr(CPU, 1.0)
    row = {"schema_str": json.dumps({"anyOf": [{"type": "null"}, {"pattern": "^(a+)+$"}]})}
    check(row, ["null", '"aa"'], ['"b"'])
    assert score(row, json.dumps("a" * 60 + "b")).reason == "parsing took too long"
    bounds = {"name": {"minLength": 1}, "age": {"maximum": 150}, "tags": {"maxItems": 2}}
    bounded = {key: item | bounds.get(key, {}) for key, item in PERSON["properties"].items()}
    check(
        {"schema_str": json.dumps(PERSON | {"properties": bounded})},
        [GOOD],
        [
            GOOD.replace("Ann", ""),
            GOOD.replace("7", "151"),
            GOOD.replace('"y"', '"y", "z"'),
            GOOD.replace("7", '"7"'),
            GOOD[:-1] + ', "more": 1}',
        ],
    )
    for bad in (
        '{"type": "text"}',
        '{"items": {"minItems": "2"}}',
        '{"enum": 3}',
        '{"items": 1}',
        '{"$ref": "#/$defs/a"}',
        '{"items": {"$ref": "https://x.org/a"}}',
    ):
        with pytest.raises(ValueError, match="row 5"):
            check_row({"id": 5, "schema_str": bad})


def test_document_as_tool_call():
    """In tool_call mode the payload is the one argument of the one call to the named tool."""
    row = ROWS["structured"] | {"response_mode": "tool_call", "tool_name": "save"}
    check(
        row | {"tool_payload_key": "data"},
        [call("save", data=GOOD), "<think>\nyes\n</think>\nDone." + call("save", data=GOOD)],
        [
            GOOD,
            call("keep", data=GOOD),
            call("save", info=GOOD),
            call("save", data=GOOD) * 2,
            call("save", data=GOOD, more=1),
            call("save", data="{}"),
            call("save"),
        ],
    )


def test_calls_without_environment():
    """Names, argument names, values and order must be the expected ones; text stands for values."""
    as_json = '<tool_call>{"name": "f", "arguments": {"b": true, "s": "5", "x": 3.0}}</tool_call>'
    check(
        ROWS["tools"],
        [call("f", x="3", s="5", b="True"), as_json],
        [
            "f(3)",
            call("g", x=3, s=5, b="true"),
            call("f", x=4, s=5, b="true"),
            call("f", x=3),
            call("f", x=3, s=5, b=1),
            call("f", x=3, s=5, b="true", y=1),
            as_json * 2,
            call("f", x="[" * 9999, s=5, b="true"),
        ],
    )
    two = {"ground_truth": [{"name": name, "arguments": "{}"} for name in "ab"]}
    check(two, [call("a") + call("b"), turns(call("a"), call("b"))], [call("b") + call("a")])
    lost = '<tool_call>{"name": "a", "arguments": [1]}</tool_call>'
    check({"ground_truth": []}, ["No tool fits."], [call("a"), lost])
    check(two, [], [turns(lost, call("a"), call("b")), call("a") + lost + call("b")])


def test_calls_in_the_shop():
    """The final state decides; results are recomputed, failed tries remain, looking is free."""
    state = {"stock": {"pen": 4, "cup": 2}, "orders": []}
    truth = [("lookup", {"item": "pen"}), ("order", {"item": "pen", "count": 4})]
    calls = [{"name": name, "arguments": json.dumps(x)} for name, x in truth]
    row = {"environment": {"name": "shop", "state": state}, "ground_truth": calls}
    look, order = call("lookup", item="pen"), call("order", item="pen", count=4)
    told = [*turns(look), {"role": "tool", "content": "9"}, *turns(order, "Done.")]
    tries = turns(*(call("order", item="pen", count=n) for n in (9, 8, 7, 6, 5, 4)))
    ones = turns(*[call("order", item="pen", count=1)] * 4)
    check(
        row,
        [told, order, turns(look, look, order)],
        [look, tries, ones, order + call("order", item="cup", count=1), "Done."],
    )
    check(row | {"ground_truth": calls[:1]}, [look], ["4", order])  # a look changes no state
    after, text = run_tool(state, "order", {"item": "pen", "count": "3"})
    assert after == {"stock": {"pen": 1, "cup": 2}, "orders": [["pen", 3]]} and text == "done"
    assert run_tool(state, *truth[0]) == (state, "4") and state["orders"] == []


def test_retrieval():
    """A set of nodes or a fact, in the last line only."""
    row = ROWS["long_context"]
    check(
        row,
        ["Final Answer: [a1, b2]", "so\n\nFinal Answer: ['b2', \"a1\", a1]\n", "[b2,a1]."],
        ["Final Answer: [a1]", "[a1, b2]\nI hope so.", "a1, b2", "[a1, b2, c3]", "", "[]"],
    )
    check(row | {"expected_answer": "[]"}, ["Final Answer: []"], ["[a]", "none"])
    row = row | {"expected_answer": "Blue Fox"}
    check(row, ["It is:\nblue  fox.", "Answer: Blue Fox"], ["fox", "blue fox or cat"])


def test_thoughts_earn_nothing_and_cut_responses_say_so():
    """An answer inside the thought, an open thought and a cut response are 0, with a reason."""
    row = ROWS["math"]
    assert value(row, "<think>\n\\boxed{41}\n</think>\n\\boxed{42}") == 1
    assert score(row, "<think>\n\\boxed{42}\n</think>\n42").reason == "no boxed answer"
    assert score(row, "<think>\n\\boxed{42}").reason == "unfinished thought"
    assert score(row, "\\boxed{42}", finished=False) == Reward(0.0, "cut off")
    assert score(row, []).reason == "no response"


def test_malformed_rows_are_errors_with_their_id():
    """What is wrong with a row is said with its id, before any response is looked at."""
    bad = [
        {},
        {"expected_answer": None},
        {"expected_answer": ""},
        ROWS["mcqa"] | {"options": []},
        ROWS["mcqa"] | {"expected_answer": "D"},
        ROWS["mcqa"] | {"grading_mode": "kind"},
        ROWS["mcqa"] | {"template_metadata": {"output_regex": "("}},
        {"schema_str": "{"},
        ROWS["structured"] | {"schema_type": "ini"},
        {"ground_truth": [{"arguments": "{}"}]},
        ROWS["structured"] | {"response_mode": "call"},
        {"ground_truth": 3},
        {"ground_truth": [], "environment": {"name": "bank", "state": {}}},
        *(
            {"ground_truth": [], "environment": {"name": "shop", "state": state}}
            for state in ({"stock": {"pen": "4"}}, {"stock": {"pen": 4}, "orders": [["pen", "1"]]})
        ),
        *(ROWS["mcqa"] | {"options": [{"A": x}, {"B": "b"}]} for x in (17, " ")),
    ]
    for row in bad:
        with pytest.raises(ValueError, match="row 'r7'"):
            score(row | {"id": "r7"}, "x")
    with pytest.raises(ValueError, match="score_group"):
        score({"agent_ref": {"name": "genrm_simple_agent"}}, "x")


def example(schema):
    """A small value that fits a schema of types, objects and lists."""
    kind = schema["type"] if isinstance(schema["type"], str) else schema["type"][0]
    if kind == "object":
        return {key: example(item) for key, item in schema["properties"].items()}
    return [example(schema["items"])] if kind == "array" else {"string": "a"}.get(kind, 1)


RIGHT = {  # file of released rows -> (kind, the right answer of a row, a wrong one)
    "mcqa": ("mcqa", lambda row: rf"\boxed{{{row['expected_answer']}}}", r"\boxed{D}"),
    "lc_niah": ("long_context", lambda row: "Final Answer: []", "Final Answer: [8f14e45fce]"),
    "math_with_judge": ("math", lambda row: rf"\boxed{{{row['expected_answer']}}}", r"\boxed{33}"),
    "workplace_assistant": (
        "tools",
        lambda row: "".join(
            call(x["name"], **json.loads(x["arguments"])) for x in row["ground_truth"]
        ),
        "Done.",
    ),
    "structured_outputs": (
        "structured",
        lambda row: call(
            row["tool_name"],
            **{row["tool_payload_key"]: json.dumps(example(json.loads(row["schema_str"])))},
        ),
        "{}",
    ),
}


@needs("math_verify")
@pytest.mark.skipif(not DATA.exists(), reason="the released example rows are not here")
@pytest.mark.parametrize("file", RIGHT)
def test_released_rows(file, monkeypatch):
    """Every released example row is read as its kind, pays a right answer and not a wrong one."""
    monkeypatch.setattr(CPU, 1.0)
    kind, right, wrong = RIGHT[file]
    for row in map(json.loads, (DATA / f"{file}.jsonl").read_text().splitlines()):
        assert check_row(row) == kind
        check(row, ["<think>\nhm\n</think>\n" + right(row)], [wrong])


OWN = [json.loads(line) for line in FIXTURES.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("number", range(len(OWN)))
def test_own_rows(number, tmp_path):
    """Our rows of every form, as a data file holds them: their right answers earn 1, wrong ones 0;
    Lean is refused. Skipped where a row needs an extra, coqc or the sandbox."""
    tmp_path.joinpath("rows.jsonl").write_text(json.dumps(OWN[number]), "utf-8")
    try:
        row = next(read_rows(tmp_path / "rows.jsonl", sft=None))
    except ValueError as refusal:
        if "only Coq can be checked" in str(refusal):
            return
        assert any(x in str(refusal) for x in ("pip install", "need coqc", "Landlock")), refusal
        pytest.skip(str(refusal))
    if row["domain"] in ("code", "swe", "proof") and not confinement()[1]:
        pytest.skip("needs the sandbox with Landlock")
    check(row, row["right"], row["wrong"])


SEEDS = {
    "math": [r"\boxed{42}", r"<think>\boxed{1}</think>\boxed{\frac{84}{2}}", r"\boxed{\{", "{}"],
    "mcqa": [r"\boxed{\text{B}}", "Answer: **B**", r"\boxed{A, B}", "(B). dark red"],
    "structured": [GOOD, f"```json\n{GOOD}\n```", '{"a":' * 30, "[[[[" + "1e9,"],
    "tools": [call("f", x=3, s=5, b="true"), "<tool_call>{}</tool_call>", "<tool_call><function="],
    "long_context": ["Final Answer: [a1, b2]", "answer: []", "[,,']", "\n\n"],
    "if": ["Time flies when having fun. Time runs when having fun", 'Dr. A. Low... so?" (a).'],
}


@pytest.mark.parametrize("num", [2000, pytest.param(100_000, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("kind", SEEDS)
def test_fuzz(kind, num, monkeypatch):
    """2,000 (nightly: 100,000) mutated answers a verifier: a verdict each, fast, in flat memory."""
    if num > 2000:
        monkeypatch.setattr(CPU, 0.2)
    rng, start, sizes = random.Random(kind), time.process_time(), []
    pieces = ["\x00", "\ud800", "{", "}", "\\", "<think>", "</think>", "9" * 50, "\u202e", "```"]
    for i in range(num):
        text = rng.choice(SEEDS[kind])
        for _ in range(rng.randint(1, 4)):
            at, end = sorted(rng.randrange(len(text) + 1) for _ in range(2))
            text = text[:at] + rng.choice([*pieces, text[at:end] * 2, ""]) + text[end:]
        value(ROWS[kind], text)
        if i * 5 % num == 0 and sys.platform == "linux":
            sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
    assert time.process_time() - start < allowance(10 * num / 2000)
    assert not sizes or sizes[-1] - sizes[1] < 32 << 20  # bytes; the first fifth fills caches


@pytest.mark.parametrize("kind", SEEDS)
def test_large_and_strange_answers_are_quick(kind):
    """Megabytes, depth, lone surrogates and null bytes cost a verifier little time."""
    second = allowance(1)
    for text in (
        "\\boxed{" * 250_000,
        "{" * 1_900_000,
        '{"a":' * 300_000,
        "\ud800\x00" * 900_000,
        "a" * 10_000_000,
        "\\boxed{" + "9" * 1_900_000 + "}",
        "Answer:" * 250_000,
        "[" + "1," * 900_000 + "1]",
        " \t" * 900_000,
        "```\n" * 400_000,
        "\\boxed{1}," * 190_000,
        "<think></think>" + "\n " * 900_000,
    ):
        start = time.process_time()
        assert value(ROWS[kind], text) == 0
        assert time.process_time() - start < second, text[:10]


def test_rewards_need_no_torch():
    """The helper process imports the verifiers under a limit of address space that the libraries of
    a CUDA build alone exceed, so nothing that they import may import torch."""
    code = "import sys, nanocascade.rewards; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1])
    assert done.returncode == 0
