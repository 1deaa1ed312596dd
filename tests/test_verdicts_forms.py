"""Choices, programs, documents, calls and patches: kinds of verdicts that were wrong, in tables."""

import json

import pytest
from fixtures.machine import needs_landlock

from nanocascade.rewards import check_row, score

METALS = [{"A": "iron"}, {"B": "not iron"}, {"C": "5"}, {"D": "0.5"}, {"E": "Both A and B"}]
LENIENT = {"options": METALS, "grading_mode": "lenient_boxed"}
COLON = {"options": METALS, "grading_mode": "lenient_answer_colon"}
STRICT = {"options": METALS, "grading_mode": "strict_single_letter_boxed"}


def check(row, right, wrong):
    for answers, reward in ((right, 1), (wrong, 0)):
        for answer in answers:
            assert score(row, answer).value == reward, answer


@pytest.mark.parametrize(
    ("row", "right", "wrong"),
    [
        (  # the text of an option inside another text or number
            LENIENT | {"expected_answer": "C"},
            ["5", r"\text{it is } 5", "C", "(C)", "C. 5"],
            [
                "!C",
                "-5",
                "1.5",
                "5/7",
                "5,000",
                r"\pm 5",
                "15",
                r"\text{not } 5",
                "5 or 0.5",
                "C and D",
            ],
        ),
        (
            LENIENT | {"expected_answer": "A"},
            ["iron", r"\text{Iron.}", r"\text{Option A}", r"\text{A: iron}"],
            [
                r"\text{A: not iron}",
                r"\text{it is not iron}",
                r"\text{cast iron pans}",
                r"\text{does iron rust?}",
            ],
        ),
        (  # a letter before its own text, also in the strict mode
            STRICT | {"expected_answer": "B"},
            ["B", r"\text{B: not iron}", "B) not iron", r"\text{Option B}", "\u24b7", "(B)."],
            ["b", "A, B", "B: 5", "not iron", r"\text{B or C}", "A: not iron"],
        ),
    ],
)
def test_choices_in_a_box(row, right, wrong):
    """Only the whole text of an option, alone or in a plain sentence, or its letter names it."""
    check(row, [rf"\boxed{{{x}}}" for x in right], [rf"\boxed{{{x}}}" for x in wrong])


def test_choices_in_an_answer_line():
    """The letter that the line settles on, not one that it refuses; two are none; an article is no
    answer; the last line that names an option counts."""
    right = [
        "C because A is wrong",
        "C, not B",
        "It is not B, the answer is C",
        "(C)",
        "**C**",
        "C rather than A",
        "not A but C",
    ]
    right += ["a safe bet would be C", "option C", "C. 5", "C - the only number"]
    wrong = [
        "C. Alternatively D.",
        "C or D",
        "not C",
        "C, but A is also right",
        "all but C",
        "A lot of them, C too",
        "B",
        "C) and D)",
    ]
    row = COLON | {"expected_answer": "C"}
    check(row, [f"So.\nAnswer: {x}" for x in right], [f"So.\nAnswer: {x}" for x in wrong])
    check(row, ["Answer:\nC", "Answer: C\nI checked the answer: all is well."], ["Answer:\n\nD"])
    check(row | {"grading_mode": "lenient_answer_colon_md"}, ["**Answer: C**"], ["Answer: B"])


def test_choices_by_pattern():
    """Of a pattern's groups the last counts; several patterns are tried in turn; without options
    the letter is compared; where none matches the mode decides; "A lot" is not A."""
    row = STRICT | {"expected_answer": "A"}
    for pattern in (r"(Final )?Pick:\s*(\w)", [r"Choice:\s*(\w)", r"Pick:\s*(\w)"]):
        one = row | {"template_metadata": {"output_regex": pattern}}
        check(
            one,
            ["Pick: A", r"\boxed{A}", "Pick: A because"],
            ["Pick: A lot", "Pick: B", "Pick: A or B"],
        )
    bare = {"options": [], "expected_answer": "A", "template_metadata": {"output_regex": "=(\\w)"}}
    check(bare, ["=A"], ["=B", "A"])


@pytest.mark.parametrize(
    "options",
    [
        [{"A": "red"}, {"B": "blue"}, {"C": None}],
        [{"A": "red", "B": None}, {"A": None, "B": "blue"}],
        {"A": "red", "B": "blue", "C": None},
    ],
)
def test_null_options_are_absent(options):
    """Columnar files give every option every key: a null one is none, and cannot be named."""
    row = {"options": options, "expected_answer": "B", "grading_mode": "lenient_boxed"}
    check(row, [r"\boxed{B}", r"\boxed{blue}"], [r"\boxed{A}", r"\boxed{C}"])


FAST_OUTPUT = """
import sys
class Writer:
    def __init__(self): self.parts = []
    def write(self, text): self.parts.append(text)
    def flush(self): place.write("".join(self.parts)); place.flush()
place, sys.stdout = sys.stdout, Writer()
print(sum(map(int, input().split())))
"""


@needs_landlock
@pytest.mark.parametrize(
    ("tests", "program", "reward"),
    [
        ({"inputs": ["1 2\n"], "outputs": ["3\n"]}, FAST_OUTPUT, 1),
        ({"inputs": ["4 2\n"], "outputs": ["2\n"]}, "print(4 / 2)", 1),
        ({"inputs": ["0\n"], "outputs": ["A\nB\n"]}, "print('A B')", 0),
        (
            {"inputs": ["0\n"], "outputs": ["1\n"]},
            "import resource as r\nr.setrlimit(r.RLIMIT_STACK, (r.RLIM_INFINITY,) * 2)\nprint(1)",
            1,
        ),
        (
            {"inputs": ["[2, 1]"], "outputs": ["1"], "fn_name": "low"},
            "class Solution:\n    def low(self, x: List[int]) -> Optional[int]:\n"
            "        return min(Counter(x)) if x else inf",
            1,
        ),
        ({"inputs": ["3"], "outputs": ["1"], "fn_name": "f"}, "def f(n): return n == 3", 0),
        ({"inputs": ["3"], "outputs": ["true"], "fn_name": "f"}, "def f(n): return 1", 0),
        (
            {"inputs": ["4"], "outputs": ["0.25"], "fn_name": "f"},
            "from fractions import Fraction\ndef f(n): return Fraction(1, n)",
            1,
        ),
    ],
    ids=["own stdout", "whole", "lines", "stack", "starter code", "bool", "int", "fraction"],
)
def test_programs(tests, program, reward):
    """Output is flushed as the interpreter does it; starter code finds the names that judges give;
    whole numbers are equal however they are printed, true is not 1, and a line is a line."""
    row = {"verifier_metadata": {"unit_tests": tests, "cpu_seconds": 2}}
    assert score(row, f"```python\n{program}\n```").value == reward


def document(schema, form="json", **more):
    return {"schema_str": json.dumps(schema), "schema_type": form, **more}


def thing(**properties):
    return {"type": "object", "properties": properties}


NUMBER, TEXT = {"type": "integer"}, {"type": "string"}


@pytest.mark.parametrize(
    ("row", "right", "wrong"),
    [
        (
            document({"allOf": [thing(a=TEXT), thing(b=NUMBER)]}),
            ['{"a": "x", "b": 1}'],
            ['{"a": "x"}', '{"a": "x", "b": 1, "c": 2}'],
        ),
        (
            document(
                {"allOf": [{"$ref": "#/$defs/p"}, thing(b=NUMBER)], "$defs": {"p": thing(a=TEXT)}}
            ),
            ['{"a": "x", "b": 1}'],
            ['{"b": 1}', '{"a": "x", "b": 1, "c": 2}'],
        ),
        (
            document(
                thing(kind={"enum": ["s", "l"]}, size=NUMBER)
                | {
                    "if": {"properties": {"kind": {"const": "l"}}},
                    "then": {"properties": {"size": {"minimum": 9}}},
                }
            ),
            ['{"kind": "s", "size": 1}', '{"kind": "l", "size": 9}'],
            ['{"kind": "l", "size": 1}', '{"kind": "s"}', '{"kind": "s", "size": 1, "x": 1}'],
        ),
        (
            document({"items": thing(a=NUMBER, b=NUMBER), "contains": thing(a={"const": 1})}),
            ['[{"a": 1, "b": 2}, {"a": 2, "b": 2}]'],
            ['[{"a": 2, "b": 2}]', '[{"a": 1}]'],
        ),
        (
            document(
                thing(at={"type": "string", "format": "date"}, n=NUMBER | {"format": "int32"})
            ),
            ['{"at": "2024-02-29", "n": 7}'],
            [
                '{"at": "May 1", "n": 7}',
                '{"at": "2023-02-29", "n": 7}',
                '{"at": "2024-02-29", "n": 3e9}',
            ],
        ),
        (document(thing(a=TEXT | {"nullable": True})), ['{"a": null}', '{"a": "x"}'], ['{"a": 1}']),
        (
            document(thing(a=NUMBER)),
            [
                '\ufeff{"a": 1}',
                '```json {"a": 1} ```',
                '~~~\n{"a": 1}\n~~~',
                '````json\n{"a": 1}\n````',
            ],
            ['``json {"a": 1} ``'],
        ),
    ],
    ids=["allOf", "inherited", "if", "contains", "format", "nullable", "fences"],
)
def test_documents(row, right, wrong):
    """Parts of one object are closed as a whole, conditions keep their meaning, formats hold."""
    pytest.importorskip("jsonschema")
    check_row(row)
    check(row, right, wrong)


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        ("integer", ["+3", "007", "-1"], ["3.5", "three"]),
        ("number", [".5", "5.", "1e3", "2"], ["1,5", "\u0663"]),
        ("boolean", ["1", "0", "true", "False"], ["2", "yes"]),
    ],
)
def test_xml_values(kind, right, wrong):
    """Numbers and truth values as XML Schema writes them."""
    row = document(thing(v={"type": kind}), "xml")
    check(row, [f"<r><v>{x}</v></r>" for x in right], [f"<r><v>{x}</v></r>" for x in wrong])


def test_formats_are_ascii_and_exact():
    """Digits of other scripts are none, and 01 is no part of an address."""
    row = document(thing(at={"type": "string", "format": "ipv4"}))
    check(row, ['{"at": "1.20.0.255"}'], ['{"at": "01.2.3.4"}', '{"at": "1.2.3.\u0664"}'])


def test_xml_nil():
    """xsi:nil is null where null is allowed; another attribute is refused."""
    row = document(thing(v={"type": ["integer", "null"]}), "xml")
    nil = '<r xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"><v xsi:nil="true"/></r>'
    check(row, [nil], [nil.replace("xsi:nil", "nil"), nil.replace("xsi:nil", "xsi:type")])


def test_yaml_as_in_version_1_2():
    """Dates and `on` are texts, exponents numbers, 010 is ten; tags are refused."""
    pytest.importorskip("yaml")
    row = document(thing(on=TEXT, n={"type": "number"}) | {"additionalProperties": False}, "yaml")
    check(
        row,
        ["on: 2024-05-10\nn: 1e3", "on: x\nn: 0o17", "on: off\nn: 010"],
        ["on: true\nn: 1", "true: x\nn: 1"],
    )
    check(document(thing(a=TEXT), "yaml"), ["a: hi"], ["a: !!binary aGk=", "a: !!set {x}"])


SEATS = {
    "type": "function",
    "name": "book",
    "parameters": thing(date=TEXT, seats=NUMBER, note=TEXT),
}


def as_json(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_arguments_of_calls():
    """A text is no number where the tool declares one; arguments may be JSON in a string, hold a
    closing tag, and leave a null out; the same key twice is no call."""
    truth = [{"name": "book", "arguments": '{"date": "</tool_call>", "seats": 2, "note": null}'}]
    row = {"ground_truth": truth, "responses_create_params": {"input": "q", "tools": [SEATS]}}
    right = {"date": "</tool_call>", "seats": 2}
    twice = as_json("book", **right).replace('"seats": 2', '"seats": 1, "seats": 2')
    check(
        row,
        [as_json("book", **right), as_json("book", **right, note=None)],
        [as_json("book", **right | {"seats": "2"}), as_json("book", date="x", seats=2), twice],
    )
    quoted = {"name": "book", "arguments": json.dumps({"date": "x", "seats": 2})}
    row = row | {"ground_truth": [{"name": "book", "arguments": '{"date": "x", "seats": 2}'}]}
    fields = "<parameter=seats>\n%s\n</parameter>\n"
    xml = "<tool_call>\n<function=book>\n<parameter=date>\nx\n</parameter>\n%s</function>\n"
    xml += "</tool_call>"
    check(
        row,
        [f"<tool_call>\n{json.dumps(quoted)}\n</tool_call>", xml % (fields % 2)],
        [xml % (fields % 1 + fields % 2), xml % ""],
    )
    row = row | {"ground_truth": [{"name": "book", "arguments": '{"date": "5"}'}]}
    check(row, [as_json("book", date="5")], [as_json("book", date=5)])  # nor a number a text


def test_look_ups_in_a_workplace_are_free():
    """Where a row names a workplace, what changes something must be asked for, in any order, and
    looking costs nothing; where only a look is asked for, it must be made."""
    calls = [{"name": "email_delete_email", "arguments": json.dumps({"id": x})} for x in "12"]
    row = {"ground_truth": calls, "environment_name": "office"}
    look, other = as_json("email_search_emails", query="x"), as_json("email_send_email", to="x")
    one, two = (as_json("email_delete_email", id=x) for x in "12")
    check(row, [one + two, two + one, look + one + look + two], [one, look, one + two + other, ""])
    seen = row | {"ground_truth": [{"name": "email_search_emails", "arguments": '{"query": "x"}'}]}
    check(seen, [look, look + as_json("find_person", who="y")], ["Nothing.", other, look + other])
    check(row | {"ground_truth": []}, ["Nothing to do.", look], [one])
    check(row | {"environment_name": None}, [one + two], [two + one, look + one + two])


SUMS = "def area(w, h):\n    # area\n    return w + h\n\n\ndef rim(w, h):\n    return w + h\n"
FILES = {"pkg/area.py": SUMS}
BLOCK = "<<<<<<< SEARCH\n    # area\n    return w + h\n=======\n    return w * h\n>>>>>>> REPLACE\n"
HUNK = (
    "--- a/pkg/area.py\n+++ b/pkg/area.py\n@@ -3,1 +3,1 @@\n-    return w + h\n+    return w * h\n"
)


@needs_landlock
def test_patches():
    """A block may name its file as people do; a hunk's line says which of equal lines is meant; a
    patch may add a file; what is nowhere, or nothing, is refused."""
    tests = {"inputs": [[2, 3]], "outputs": [6], "fn_name": "area"}
    metadata = {"files": FILES, "entry": "pkg/area.py", "unit_tests": tests}
    row = {"verifier_metadata": metadata}
    names = [
        "pkg/area.py",
        "### pkg/area.py",
        "**pkg/area.py**",
        "`./pkg/area.py`:",
        "# pkg/area.py",
    ]
    right = [f"So:\n{name}\n{gap}{BLOCK}" for name in names for gap in ("", "\n", "```python\n")]
    right += [right[0].replace("\n", "\r\n"), HUNK, "```diff\n" + HUNK + "```"]
    right += [
        f"In pkg/area.py:\n{BLOCK}",
        f"```python pkg/area.py\n{BLOCK}\n```",
        f"1. a/pkg/area.py\n{BLOCK}",
    ]
    heads = ["./pkg/area.py", '"b/pkg/area.py"', "w/pkg/area.py", "pkg/area.py 2026-01-01 10:00:00"]
    right += [HUNK.replace("b/pkg/area.py", head) for head in heads]
    right += [
        HUNK.partition("@@")[0]
        + "@@ -3,1 +2,0 @@\n-    return w + h\n@@ -3,0 +3,1 @@\n+    return w * h\n"
    ]
    wrong = [
        BLOCK,
        f"other.py\n{BLOCK}",
        HUNK.replace("-3,1", "-7,1"),
        HUNK.replace("-3,1", "-9,1"),
    ]
    check(row, right, [*wrong, HUNK.replace("w * h", "w + h")])
    crlf = {path: text.replace("\n", "\r\n") for path, text in FILES.items()}
    check({"verifier_metadata": metadata | {"files": crlf}}, [right[0], HUNK], wrong[:2])
    gone = HUNK + "--- a/old.py\n+++ /dev/null\n@@ -1 +0,0 @@\n-x = 1\n"
    check({"verifier_metadata": metadata | {"files": {**FILES, "old.py": "x = 1\n"}}}, [gone], [])
    check(row, [], [gone, gone.replace("old.py", "pkg/area.py")])
    entry = {"main.py": "from pkg.area import area\n"}
    adding = {"verifier_metadata": metadata | {"files": entry, "entry": "main.py"}}
    body = "def area(w, h):\n    return w * h\n"
    diff = "--- /dev/null\n+++ b/pkg/area.py\n@@ -0,0 +1,2 @@\n" + body.replace(
        "    ret", "+    ret"
    )
    new = f"pkg/area.py\n<<<<<<< SEARCH\n=======\n{body}>>>>>>> REPLACE\n"
    diff = diff.replace("def", "+def")
    check(adding, [new, diff], [new.replace("pkg/area", "../area")])
    filling = metadata | {"files": {**entry, "pkg/area.py": ""}, "entry": "main.py"}
    check({"verifier_metadata": filling}, [new, diff.replace("/dev/null", "a/pkg/area.py")], [])


def test_forms_of_long_context_answers():
    """Code marks and a fence around the last line are no part of it, nor are a fact's quotes."""
    row = {"problem_type": "bfs", "expected_answer": '["a1", "b2"]'}
    check(
        row,
        [
            "Final Answer: [`a1`, `b2`]",
            "Final Answer: `[a1, b2]`",
            "```\nFinal Answer: [a1, b2]\n```",
        ],
        ["[a1]\n```"],
    )
    check(row | {"expected_answer": "Blue Fox"}, ['"Blue Fox"', "`blue fox`."], ['"Fox"'])


def test_turns_without_text_are_turns():
    """A transcript's content may be null, absent or in parts; it gets a verdict, never an error."""
    row = {"expected_answer": "7"}
    parts = [{"type": "text", "text": "\\boxed"}, {"type": "text", "text": "{7}"}]
    for content, reward in ((None, 0), ("\\boxed{7}", 1), (parts, 1), ([], 0)):
        turns = [{"role": "tool", "content": None}, {"role": "assistant", "content": content}]
        assert score(row, turns).value == reward
    assert score(row, [{"role": "assistant"}]).value == 0


def test_fields_under_verifier_metadata():
    """Newer files keep a verifier's fields in the metadata; any tool may carry a document where the
    row names none."""
    row = {"verifier_metadata": {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [None]}}
    assert check_row(row) == "if"
    check(row, ["Fine."], ["Fine, so."])
    row = document(thing(a=NUMBER), response_mode="tool_call", tool_name=None)
    check(row, [as_json("any", a=1)], [as_json("any", a=1) * 2, '{"a": 1}'])
    check({"verifier_metadata": row}, [as_json("any", a=1)], ['{"a": 1}'])
    choice = {"verifier_metadata": LENIENT | {"expected_answer": "A"}}
    check(choice, [r"\boxed{iron}"], [r"\boxed{not iron}"])
