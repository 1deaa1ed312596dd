"""Reading rows of every form, errors with file and line, the prompt stream, packing."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from nanocascade.data import rows as data
from nanocascade.data.__main__ import main as data_main
from nanocascade.data.batch import pack
from nanocascade.data.rows import conversation, read_rows, sft_conversation
from nanocascade.data.stream import PromptStream

SHARED = Path(__file__).parents[2] / "shared" / "data"
GSM = {"question": "3+4?", "answer": "It is 3+4=<<3+4=7>>7.\n#### 7"}
USER, BOX = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "\\boxed{7}"}
GYM = {"responses_create_params": {"input": "Hi", "tools": []}, "expected_answer": "7", "id": 5}


def write(path, *rows):
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def test_three_forms_become_one(tmp_path):
    """Gym, question and messages rows, from plain and gzipped files, keep what they carry."""
    parts = [{"type": "text", "text": "<think>\nwhy\n</think>\nHo"}]
    said = {"role": "assistant", "content": parts, "reasoning_content": "why"}
    chat = {"messages": [USER, said], "tools": "[]"}
    paths = [write(tmp_path / "a.jsonl", GYM, "", GSM), write(tmp_path / "b.jsonl.gz", chat)]
    gym, gsm, sft = read_rows(paths, sft=None)
    assert conversation(gym) == ([USER], None) and (gym["id"], gym["domain"]) == (5, "math")
    assert (gsm["id"], gsm["expected_answer"], gsm["domain"]) == ("a.jsonl:3", "7", "math")
    assert sft_conversation(gsm, True)[1:] == [BOX | {"reasoning_content": "It is 3+4=7."}]
    assert sft_conversation(gsm, False)[1]["content"] == "It is 3+4=7.\n\\boxed{7}"
    both = [
        data.normalize({"question": "2+2?", "answer": answer, "expected_answer": 4}, "x")
        for answer in ("Two and two.", "4", None)
    ]
    assert [x["solutions"]["off"][0]["content"] for x in both] == [
        "Two and two.\n\\boxed{4}",
        "\\boxed{4}",
        "\\boxed{4}",
    ]
    assert sft["domain"] == "sft" and sft_conversation(sft, True)[1]["content"] == parts[0]["text"]
    assert sft_conversation(sft, False) == [USER, {"role": "assistant", "content": "Ho"}]


@pytest.mark.parametrize(
    "row, sft, words",
    [
        ("{not", False, "not JSON"),
        ("[1]", False, "not an object"),
        ({"a": 1}, False, "messages"),
        ({"responses_create_params": {}}, False, "missing field: 'input'"),
        (GYM, True, "no solution"),
        ({"responses_create_params": {"input": "Hi"}}, False, "fits no verifier"),
        (GYM | {"responses_create_params": {"input": [BOX]}}, False, "must end with a user"),
        ({"messages": [USER]}, True, "answer"),
        ({"messages": [USER, BOX]}, False, "fits no verifier"),
        ({"question": "2+2?", "answer": ["4"]}, False, "not one text or number"),
        ({"prompt": "", "entry_point": "f", "test": "assert f()"}, False, "define check"),
        ({"prompt": "Q", "instruction_id_list": ["no"]}, False, "row 'rows.jsonl:2' .if"),
        (GYM | {"pass_rate": 2}, False, "pass_rate 2 is not"),
        (GYM | {"environment": {"name": "chess"}}, False, "environment 'chess' is unknown"),
        ({"messages": [{"role": "robot", "content": "x"}, BOX]}, True, "robot"),
        ({"messages": [USER, BOX | {"content": [{"image": "x"}]}]}, True, "must be text"),
        ('{"question": "\\ud800", "answer": "1"}', True, "surrogates"),
        ("[" * 100_000, True, "Recurs"),
    ],
)
def test_errors_carry_file_and_line(row, sft, words, tmp_path, capsys):
    """A row that cannot be used is a ValueError with its place and reason; main lists it."""
    path = write(tmp_path / "rows.jsonl", GSM, row)
    with pytest.raises(ValueError, match="rows.jsonl:2: .*" + words):
        list(read_rows(path, sft))
    data_main([path])
    assert sft or "math: 1 rows" in capsys.readouterr().out


def test_empty_and_broken_files(tmp_path):
    """A file without rows and a cut archive are errors that name the file."""
    cut = write(tmp_path / "cut.jsonl.gz", GSM)
    cut.write_bytes(cut.read_bytes()[:-9])
    for path, words in ((write(tmp_path / "a.jsonl", "", ""), "a.jsonl: no rows"), (cut, "broken")):
        with pytest.raises(ValueError, match=words):
            list(read_rows(path))
    with pytest.raises(ValueError, match="no file"):
        data_main([])


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data is not here")
def test_released_rows_are_read():
    """Two real rows of each kind are recognised; tools stay with the prompt."""
    pytest.importorskip("math_verify")  # one expected answer is an expression in LaTeX
    pytest.importorskip("jsonschema")
    rows = list(read_rows(sorted((SHARED / "nemo_gym").glob("*.jsonl"))))
    kinds = ["code", "preference", "if", "long_context", "math", "mcqa", "structured", "tools"]
    assert [row["domain"] for row in rows] == [kind for kind in kinds for _ in range(2)]
    assert len(conversation(rows[-1])[1]) == 27 and len(conversation(rows[2])[0]) == 5


def test_stream_is_resumed_in_the_middle_of_an_epoch():
    """Every epoch shows each row once in a new order; a saved state continues it exactly."""
    rows = [{"domain": "math", "id": i} for i in range(10)]
    stream, other = PromptStream(rows, seed=1), PromptStream(rows, seed=1)
    drawn = stream.take(7) + stream.take(33)
    epochs = [[row["id"] for _, row in drawn[i : i + 10]] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1]
    assert [position for position, _ in drawn] == list(range(40))
    assert [row["id"] for _, row in PromptStream(rows, seed=2).take(10)] != epochs[0]
    other.load_state(json.loads(json.dumps(stream.state())))
    assert other.take(25) == stream.take(25)
    with pytest.raises(ValueError, match="other data"):
        PromptStream(rows[:9], seed=1).load_state(stream.state())


def test_numbers_weights():
    """55/30/15 of 128 is 70.4, 38.4, 19.2: 71, 38, 19 by largest remainder; nothing is lost."""
    rows = [{"domain": x} for x in ("mcqa", "tools", "structured", "unused") for _ in range(5)]
    stream = PromptStream(rows, 0, {"mcqa": 55, "tools": 30, "structured": 15})
    counts = Counter(row["domain"] for _, row in stream.take(128))
    assert counts == {"mcqa": 71, "tools": 38, "structured": 19}
    for _ in range(124):
        counts.update(row["domain"] for _, row in stream.take(3))  # dynamic filtering asks for few
    assert counts == {"mcqa": 275, "tools": 150, "structured": 75}
    with pytest.raises(ValueError, match="cannot be drawn"):
        PromptStream(rows, 0, {"mcqa": 1, "math": 1})


def test_pack():
    """Best fit: every document once, no row over budget, rows nearly full; too long is an error."""
    assert pack([5, 3, 6, 2], 8) == [[2, 3], [0, 1]] and pack([], 8) == []
    rows = pack(lengths := [i * 37 % 100 + 1 for i in range(1000)], 128)
    assert sorted(i for row in rows for i in row) == list(range(1000))
    assert max(sum(lengths[i] for i in x) for x in rows) <= 128 < sum(lengths) / len(rows) * 1.01
    with pytest.raises(ValueError, match="item 1 has 9 tokens"):
        pack([3, 9], 8)
