"""Rows as people have them: the domain of each form, its verdicts, its solution, the split."""

import json
from collections import Counter

import pytest

from nanocascade.data.__main__ import is_test_row
from nanocascade.data.__main__ import main as data_main
from nanocascade.data.rows import conversation, normalize, read_rows, sft_conversation
from nanocascade.rewards import check_row, kind_of, score

WORKED = "Each box holds 4, so 3 boxes hold 3 * 4 = 12 pens."
CHOICES = {"question": "Which is wet?", "choices": ["sand", "rain", "dust"]}
HUMAN_EVAL = {
    "task_id": "Own/0",
    "prompt": 'def twice(n):\n    """Two times n."""\n',
    "entry_point": "twice",
    "canonical_solution": "    return 2 * n\n",
    "test": "def check(f):\n    assert f(4) == 8\n",
}
MBPP = {
    "task_id": 7,
    "text": "Write a function that halves a number.",
    "code": "def half(n):\n    return n / 2",
    "test_list": ["assert half(8) == 4"],
    "test_setup_code": "",
    "challenge_test_list": [],
}


@pytest.mark.parametrize(
    ("row", "final"),
    [
        ({"question": "Q", "answer": f"{WORKED}\n#### 12"}, "12"),
        ({"problem": "Q", "solution": f"{WORKED} So \\boxed{{12}}."}, "12"),
        (
            {"problem": "Q", "solution": f"{WORKED} Thus \\(\\boxed{{\\frac{{1}}{{2}}}}\\)."},
            "\\frac{1}{2}",
        ),
        ({"problem": "Q", "solution": WORKED, "answer": "12"}, "12"),
        ({"question": "Q", "answer": f"{WORKED}\nThe answer is 12."}, "12"),
        ({"question": "Q", "answer": f"{WORKED}\n**Answer: 12**"}, "12"),
        ({"prompt": "Q", "answer": f"{WORKED}\nThe final answer is: $12$."}, "12"),
        ({"question": "Q", "answer": 12}, "12"),
        ({"question": "Q", "answer": "x = 3"}, "x = 3"),
        ({"question": "Q", "answer": "blue whale"}, "blue whale"),
        ({"question": "Q", "expected_answer": "12", "solution": None, "options": None}, "12"),
        ({"question": "Q", "answer": "\\boxed{12}", "expected_answer": 12}, "12"),
    ],
    ids=str,
)
def test_a_final_answer_is_found(row, final):
    """The last box, what follows #### or "the answer is", or an answer that stands alone."""
    row = normalize(row, "rows:1")
    assert (row["domain"], row["expected_answer"]) == ("math", final)
    text = sft_conversation(row, False)[-1]["content"]
    assert text.endswith(f"\\boxed{{{final}}}") and score(row, text).value == 1
    assert "\\boxed{}" in conversation(row)[0][-1]["content"]


@pytest.mark.parametrize(
    "row",
    [
        {"problem": "Q", "solution": WORKED},
        {"question": "Q", "answer": WORKED},
        {"problem": "Q", "solution": "A long proof.\nThen it ends.", "answer": WORKED},
        {"question": "Q", "answer": ""},
        {"question": "Q", "answer": "12\nmore"},
        {"question": "Q", "choices": ["a", "b"], "answer": "c"},
        {"question": "Q", "choices": ["a", "b"], "answer": 2},
        {"question": "Q"},
        {"text": "Q", "answer": "1"},
    ],
    ids=str,
)
def test_what_has_no_final_answer_is_refused(row):
    """A whole solution is never the expected answer, nor is a choice that is none."""
    with pytest.raises(ValueError, match="no final answer|none of the choices|no question"):
        check_row(normalize(row, "rows:1"))


@pytest.mark.parametrize(
    "row",
    [
        CHOICES | {"answer": 1},
        CHOICES | {"answer": "B"},
        CHOICES | {"answer": "rain"},
        {
            "question": "Which is wet?",
            "choices": {"text": ["sand", "rain", "dust"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
        CHOICES | {"choices": None, "options": {"A": "sand", "B": "rain"}, "answer": "B"},
    ],
    ids=str,
)
def test_choices(row):
    """The answer is a letter, an index from 0, a label or a text; the prompt shows the options."""
    row = normalize(row, "rows:1")
    assert (row["domain"], check_row(row)) == ("mcqa", "mcqa")
    assert "B: rain" in conversation(row)[0][0]["content"]
    assert [score(row, rf"\boxed{{{x}}}").value for x in ("B", "rain", "A")] == [1, 1, 0]
    assert score(row, sft_conversation(row, False)[-1]["content"]).value == 1


def test_instructions_of_ifeval():
    """IFEval's own line becomes a row of `if` with its key as id; null kwargs are absent."""
    row = {"key": 1000, "prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"]}
    row = normalize(row | {"kwargs": [{"num_words": None}]}, "rows:1")
    assert (row["id"], row["domain"]) == (1000, "if")
    assert conversation(row)[0] == [{"role": "user", "content": "No commas."}]
    assert [score(row, x).value for x in ("Fine.", "Fine, so.")] == [1, 0]


@pytest.mark.parametrize("row", [HUMAN_EVAL, MBPP], ids=["HumanEval", "MBPP"])
def test_programs(row):
    """HumanEval's and MBPP's rows become `code`; the gold program is what SFT imitates."""
    row = normalize(row, "rows:1")
    assert (row["domain"], check_row(row)) == ("code", "code")
    gold = sft_conversation(row, False)[-1]["content"]
    assert gold.startswith("```python\n") and "canonical_solution" not in row
    tests = row["verifier_metadata"]["unit_tests"]["asserts"]
    assert any("assert" in x for x in tests)


def test_chats_with_an_expected_answer():
    """A chat that ends with the question is a row of mathematics; one that ends with the answer
    has it to imitate as well; null keys of columnar files change nothing."""
    ask, say = {"role": "user", "content": "3+4?"}, {"role": "assistant", "content": "\\boxed{7}"}
    row = {"messages": [ask], "expected_answer": "7", "tools": None, "options": None}
    asked = normalize(row, "rows:1")
    assert asked["domain"] == kind_of(asked) == "math" and conversation(asked) == ([ask], None)
    both = normalize(row | {"messages": [ask, say]}, "rows:1")
    assert both["domain"] == "math" and sft_conversation(both, False)[-1] == say
    assert normalize({"messages": [ask, say], "expected_answer": None}, "x")["domain"] == "sft"


def test_null_keys_are_absent_keys(tmp_path):
    """In a columnar file every row has every key: nulls, nested ones too, choose no verifier."""
    nulls = dict.fromkeys(
        ["options", "instruction_id_list", "schema_str", "ground_truth", "environment", "genrm"]
    )
    nulls |= {"problem_type": None, "verifier_metadata": {"unit_tests": None, "files": None}}
    row = {"responses_create_params": {"input": "2+2?", "tools": None}, "expected_answer": "4"}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(nulls | row | {"agent_ref": {"name": None}}))
    (read,) = read_rows(path)
    assert read["domain"] == "math" and score(read, "\\boxed{4}").value == 1
    assert score(nulls | row, "\\boxed{4}").value == 1


def test_rows_of_servers_that_we_have_not_are_refused(tmp_path, capsys):
    """An expected answer is mathematics only where no other server is named; such are counted."""
    row = {"responses_create_params": {"input": "Where?"}, "expected_answer": "Oslo"}
    names = [None, "math_with_judge_simple_agent", "quiz_agent", "quiz_agent", "search_agent"]
    rows = [row | {"agent_ref": {"name": name}} for name in names]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="rows.jsonl:3: .*'quiz_agent', which is no verifier"):
        list(read_rows(path))
    data_main([path])
    shown = capsys.readouterr().out
    assert "math: 2 rows" in shown and "2 rows are for 'quiz_agent'" in shown
    assert "3 rows cannot be used" in shown


def test_split(tmp_path, capsys):
    """Equal prompts stay together, a share near the one asked for is test, nothing is lost, and the
    parts are read as the whole was."""
    rows = [{"question": f"{i % 400}+1?", "answer": str(i % 400 + 1)} for i in range(800)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [*rows, {"question": "Q"}])))
    data_main([path, "--split", "0.25"])
    parts = [list(read_rows(f"{path}.{name}", sft=None)) for name in ("train", "test")]
    asked = [Counter(conversation(x)[0][0]["content"] for x in part) for part in parts]
    assert sum(map(len, parts)) == 800 and not asked[0].keys() & asked[1].keys()
    assert {*asked[0].values(), *asked[1].values()} == {2} and 70 < len(asked[1]) < 130
    assert all(is_test_row(x, 0.25) for x in parts[1]) and parts[1][0]["domain"] == "math"
    assert "1 rows cannot be used" in capsys.readouterr().out
    for wrong in (["--split"], ["--split", "2"], ["--split", "x"]):
        with pytest.raises(ValueError, match="--split"):
            data_main([path, *wrong])
