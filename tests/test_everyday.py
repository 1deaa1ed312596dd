"""Generated rows for real models: their solutions earn the reward, their splits share no prompt."""

import json
from collections import Counter

import pytest

from nanocascade.data import everyday
from nanocascade.data.rows import read_rows
from nanocascade.rewards import language, score


def prompt_of(row):
    return row["responses_create_params"]["input"][0]["content"]


@pytest.mark.parametrize("domain", ["math", "mcqa", "structured"])
def test_solutions_are_right(domain):
    """What SFT imitates earns 1, with the thought and without it; the row of another one does not
    pay for it."""
    rows = everyday.make_rows(domain, 40, test=False)
    for row, other in zip(rows, rows[1:], strict=False):
        plain, thought = row["solutions"]["off"][0], row["solutions"]["on"][0]
        assert score(row, plain["content"]).value == 1
        assert score(row, f"<think>\n\n</think>\n{thought['content']}").value == 1
        expected = [x.get("expected_answer", x.get("schema_str")) for x in (row, other)]
        assert expected[0] == expected[1] or score(other, plain["content"]).value == 0


def test_instructions_can_be_followed(monkeypatch):
    """Pairs never contradict each other: an answer written for each id obeys every row."""
    monkeypatch.setattr(language, "langdetect", None)  # it takes short lines for other languages
    seen = Counter()
    for row in everyday.make_rows("if", 400, test=False):
        kwargs = dict(zip(row["instruction_id_list"], row["kwargs"], strict=True))
        seen.update(kwargs.keys())
        words = "Cats like to sleep in a big box".split()
        if bound := kwargs.get("length_constraints:number_words"):
            at_least = bound["relation"] == "at least"
            words += ["today"] * bound["num_words"] * at_least
        words += kwargs.get("keywords:existence", {}).get("keywords", [])
        words += ["[name]"] * kwargs.get("detectable_content:number_placeholders", {}).get(
            "num_placeholders", 0
        )
        words[:1] = [kwargs.get("first_word:first_word_answer", {}).get("first_word", "Cats")]
        answer = " ".join(words) + "."
        if "detectable_format:title" in kwargs:
            answer = "<<Cats>>\n" + answer
        if "startend:end_checker" in kwargs:
            answer += " " + kwargs["startend:end_checker"]["end_phrase"]
        if bullets := kwargs.get("detectable_format:number_bullet_lists"):
            points = "\n* Cats sleep" * (bullets["num_bullets"] - 1)
            answer = f"* {answer}{points}"
        if "startend:quotation" in kwargs:
            answer = f'"{answer}"'
        if "change_case:english_lowercase" in kwargs:
            answer = answer.lower()
        if "change_case:english_capital" in kwargs:
            answer = answer.upper()
        reward = score(row, answer)
        assert reward.value == 1, (prompt_of(row), answer, reward)
        assert score(row, "").value == 0
    assert len(seen) == 12


def test_run_everyday(tmp_path, monkeypatch):
    """The command writes both files, every row can be read, and no prompt stands in both."""
    monkeypatch.setattr("sys.argv", ["everyday", str(tmp_path), "--rows", "30", "--test_rows", "9"])
    everyday.main()
    files = [tmp_path / "train.jsonl", tmp_path / "test.jsonl"]
    train, test = ([*read_rows(file)] for file in files)
    assert len([*read_rows(tmp_path / "sft.jsonl", sft=True)]) == 90
    assert Counter(x["domain"] for x in test) == dict.fromkeys(everyday.GENERATORS, 9)
    assert not {prompt_of(x) for x in train} & {prompt_of(x) for x in test}
    before = files[0].read_text()
    everyday.main()
    assert files[0].read_text() == before  # the same rows from the same seed
    assert json.loads(before.split("\n")[0])["id"] == "if-0"
