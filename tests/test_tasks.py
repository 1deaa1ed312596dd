"""The toy's tasks: the released form, right answers paid, slips not, training apart from test."""

import json
import random
import re

import pytest
from fixtures.machine import confinement

from nanocascade.data.rows import conversation, normalize, question_of
from nanocascade.data.stream import PromptStream
from nanocascade.rewards import check_row, kind_of, score
from nanocascade.sandbox.sandbox import shared_sandbox
from nanocascade.tokenizer.tokenizer import Tokenizer
from nanocascade.toy import tasks
from nanocascade.toy.start import build_toy_tokenizer

GRADED = [x for x in tasks.GENERATORS if x != "preference"]  # that one has no right answer
KINDS = {x: {x} for x in tasks.GENERATORS} | {"verify": {"math"}, "revise": {"math", "code"}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    build_toy_tokenizer(path, tasks.vocabulary())
    return Tokenizer(path)


def turns(tokenizer, row, messages) -> list[dict]:
    """A solution as the model would write it: the text of each turn after its header."""
    prompt, tools = conversation(row)
    text = tokenizer.render_text(prompt + messages, tools)
    parts = text.split("<|im_start|>assistant\n")[1:]
    return [{"role": "assistant", "content": x.split("<|im_end|>")[0]} for x in parts]


def tried_right(row) -> bool:
    """Whether a revision's prompt ends with an attempt that is already right."""
    tried = question_of(row).partition("\nTried: ")[2].rpartition("\nTried: ")[2]
    return bool(tried) and score(row, re.split("\nCheck: |\nScore: ", tried)[0]).value == 1


@pytest.mark.parametrize("domain", GRADED)
def test_rewards_of_solutions(domain, tokenizer):
    """Of 60 problems every good solution earns 1 and every slip 0 from the row's real verifier; a
    revision's slip, which repeats the last attempt, earns what that one scored."""
    if domain == "swe_agentic" and confinement()[0]:
        pytest.skip("programs of a repository need the sandbox")
    shared_sandbox(plain_only=True)
    rng = random.Random(domain)
    for i in range(60):
        row, good, slip = tasks.GENERATORS[domain](rng)
        assert check_row(row | {"id": i}) in KINDS[domain]
        assert score(row, turns(tokenizer, row, good)).value == 1.0, (row, good)
        paid = domain == "revise" and tried_right(row)
        assert score(row, turns(tokenizer, row, slip)).value == float(paid), (row, slip)


@pytest.mark.parametrize("domain", tasks.GENERATORS)
def test_rows_of_a_domain(domain):
    """Rows are JSON in the released form, equal for equal seeds; SFT slips come at their rate; no
    training problem is a test problem, whatever the seeds."""
    rows = tasks.make_rows(domain, 300, "train", 5)
    assert json.loads(json.dumps(rows)) == rows == tasks.make_rows(domain, 300, "train", 5)
    assert all(normalize(x, "x")["domain"] == domain for x in rows)
    assert {kind_of(x) for x in rows} == KINDS[domain] == {x["kind"] for x in rows}
    asked = {conversation(x)[0][-1]["content"] for x in rows}
    test = {conversation(x)[0][-1]["content"] for x in tasks.make_rows(domain, 300, "test", 5)}
    assert asked.isdisjoint(test) != (domain == "preference")
    assert all(x["solutions"].keys() == {"on", "off"} for x in rows)
    assert all(
        y["reasoning_content"] is None
        for x in rows
        for y in x["solutions"]["off"]
        if y["role"] == "assistant"
    )


def test_slips_come_at_their_rate(tokenizer):
    """The share of wrong SFT solutions is that of SLIPS, within four standard errors."""
    for domain in GRADED:
        rows, rate = tasks.make_rows(domain, 600), tasks.SLIPS[domain]
        rows = [x for x in rows if domain != "revise" or not tried_right(x)][:400]
        right = [score(x, turns(tokenizer, x, x["solutions"]["on"])).value for x in rows]
        assert abs(1 - sum(right) / 400 - rate) < 4 * (rate * (1 - rate) / 400) ** 0.5, domain


def test_words_and_lengths(tokenizer):
    """Every word of the vocabulary is one token; retrieval's prompts are five times the others'."""
    assert all(len(tokenizer.encode(word)) == 1 for word in tasks.vocabulary())
    lengths = {}
    for domain in tasks.DOMAINS:
        prompts = [
            tokenizer.render(*conversation(x), True, True)[0] for x in tasks.make_rows(domain, 40)
        ]
        lengths[domain] = sum(map(len, prompts)) / 40
    others = [n for domain, n in lengths.items() if domain != "long_context"]
    assert lengths["long_context"] >= 5 * sum(others) / len(others), lengths


def test_unknown_tasks_are_refused():
    """An unknown domain or split is named; shares of SFT cover the domains there are."""
    for wrong in (("chess", 1), ("math", 1, "dev")):
        with pytest.raises(ValueError, match="chess|dev"):
            tasks.make_rows(*wrong)
    rows = [x for d in tasks.SFT_SHARES for x in tasks.make_rows(d, 3)]
    taken = PromptStream(rows, 0, tasks.SFT_SHARES).take(1000)
    counts = {d: sum(x["domain"] == d for _, x in taken) for d in tasks.DOMAINS}
    assert counts["structured"] > counts["math"] > counts["long_context"] > 0
