"""What an answer means where forms leave it open: letters in prose, text or number in XML."""

import json

import pytest

from nanocascade.rewards import check_row, score


@pytest.mark.parametrize(
    "option, answer",
    [
        ("$a = 1, b = 2, c = 3$", "a=1, b=2, c=3"),
        ("ratio v / c", "v/c ratio"),
        ("x=2 and d=3", "x = 2 and d = 3"),
        ("Vitamins C & D", "vitamins C and D"),
    ],
)
def test_choice_of_letters(option, answer):
    """Letters in what an option says, worded or spaced otherwise, name no other option."""
    row = {
        "options": [{"A": "no"}, {"B": option}, {"C": "red"}, {"D": "blue"}],
        "expected_answer": "B",
        "grading_mode": "lenient_boxed",
    }
    check_row(row)
    assert score(row, rf"\boxed{{B. {answer}}}").value == 1
    assert score(row, rf"\boxed{{B. {answer} or C}}").value == 0
    assert score(row, r"\boxed{B and C}").value == 0


@pytest.mark.parametrize(
    ("schema", "content", "reward"),
    [
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "7", 1),
        ({"enum": ["true"]}, "true", 1),
        ({"oneOf": [{"type": "null"}, {"$ref": "#/$defs/text"}]}, "x", 1),
        ({"const": "1"}, "1", 1),
        ({"type": "string"}, "[" * 5000, 1),
        ({"anyOf": [{"const": "auto"}, {"type": "integer"}]}, "1", 1),
        ({"enum": ["auto", 1]}, "1", 1),
        (
            {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}]},
            "abc",
            1,
        ),
        ({"$ref": "#/$defs/both/anyOf/1"}, "7", 1),
        ({"enum": [7]}, "7", 1),
        ({"enum": ["7"]}, "8", 0),
        ({"type": "array", "items": {"$ref": "#/$defs/pet"}}, "<name>7</name>", 1),
        ({"type": "array", "items": {"$ref": "#/$defs/pet"}}, "<p><name>7</name></p>", 1),
    ],
)
def test_xml_values(schema, content, reward):
    """Types stand in alternatives, constants and references too; one item needs no wrapper."""
    pytest.importorskip("jsonschema")
    pet, text = {"type": "object", "properties": {"name": {"type": "string"}}}, {"type": "string"}
    whole = {
        "type": "object",
        "properties": {"v": schema},
        "$defs": {"text": text, "both": {"anyOf": [{"type": "null"}, text]}, "pet": pet},
    }
    row = {"schema_str": json.dumps(whole), "schema_type": "xml"}
    assert score(row, f"<r><v>{content}</v></r>").value == reward
