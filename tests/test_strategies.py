"""Strategies at test time, against a scripted model, and through the command line."""

import re

import pytest
from fixtures import toy_runs
from fixtures.toy_runs import run_here

from nanocascade.rollouts.strategies import (
    STRATEGIES,
    believed,
    most_frequent,
    revision_prompt,
    text_of,
)
from nanocascade.toy.tasks import user_row

skilled, rows = toy_runs.skilled, toy_runs.rows
BOX = "\\boxed{%s}"


def play(name, replies, truth="7", rounds=2, samples=3, **options):
    """(answers after each round, prompts with the number of samples asked for, graded answers) of
    one problem "q" whose right answer is `truth`; replies are dealt out in order."""
    asked, graded, replies = [], [], iter(replies)

    def ask(rows, n):
        asked.extend((text_of(row), n) for row in rows)
        return [[BOX % next(replies) for _ in range(n)] for _ in rows]

    def grade(rows, answers):
        graded.extend(answers)
        return [float(x == BOX % truth) for x in answers]

    found = STRATEGIES[name]([user_row("q")], ask, grade, rounds, samples, **options)
    return [answers[0] for answers in found], asked, graded


def test_numbers_majority():
    """Votes add up over rounds: 1, 2, 2 gives 2; 1, 1, 3 more gives 1, three votes of six. A blank
    answer wins against nothing, and no verifier is asked."""
    given, asked, graded = play("majority", "122113")
    assert given == [BOX % 2, BOX % 1] and asked == [("q", 3)] * 2 and not graded
    assert most_frequent(["", "", "a"]) == "a" and most_frequent(["a", "b"]) == "a"


def test_numbers_best_of_n():
    """The verifier's choice: nothing right among three, then the fifth of six is."""
    given, _, graded = play("best-of-n", "123475")
    assert given == [BOX % 1, BOX % 7] and len(graded) == 6
    assert play("single", "12", samples=3)[:2] == ([BOX % 1, BOX % 2], [("q", 1)] * 2)


@pytest.mark.parametrize(
    ("checks", "expected"),
    [
        (("1", "1"), 1.0),
        (("1", "0"), 0.0),
        (("1", "0.5"), 0.75),
        (("1", "7", "x"), 1.0),
        (("x",), 0.0),
        ((), 0.0),
        (("-1", "nan"), 0.0),
    ],
)
def test_numbers_belief(checks, expected):
    """Any 0 makes it 0, else the mean of the readable ones: (1 + 1/2) / 2 = 3/4."""
    assert believed([BOX % x for x in checks]) == expected
    assert believed(["no box at all", BOX % 1]) == 1.0


def test_numbers_refine():
    """Round 1 has the answers 1, 2, 3, checked twice each as (1, 0), (1, 1/2), (0, 0): 2 is given
    for its 3/4. Round 2 revises the two best, 2 and (the first zero) 1, twice each: 2, 7, 4, 5;
    only 7 is believed fully. The verifier is never asked."""
    checks = ["1", "0", "1", "0.5", "0", "0"], ["1", "0.5", "1", "1", "0", "1", "1", "0"]
    replies = [*"123", *checks[0], *"2745", *checks[1]]
    given, asked, graded = play("refine", replies, checks=2, keep=2)
    assert given == [BOX % 2, BOX % 7] and not graded
    assert [n for _, n in asked] == [3, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    revised = [text for text, _ in asked if "Score" in text]
    assert revised == [revision_prompt("q", [x]) for x in ((BOX % 2, 0.75), (BOX % 1, 0))]
    assert sum("Is it right?" in text for text, _ in asked) == 7


def test_numbers_submit():
    """A round submits its most frequent new answer: 1 of 1, 1, 2; then, 1 being known as wrong, 3
    of 1, 1, 3; then 7. Verdicts stand in later prompts, the last two; what is solved is not asked
    for again."""
    given, asked, graded = play("submit", "112113772", rounds=4)
    assert given == [BOX % 1, BOX % 1, BOX % 7, BOX % 7] and len(asked) == 3
    assert graded == [BOX % 1, BOX % 3, BOX % 7]
    assert asked[2][0] == revision_prompt("q", [(BOX % 1, 0.0), (BOX % 3, 0.0)])
    assert asked[0][0] == "q"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ((), [9, 21]),
        (("--rounds", 3), [9, 21, 33]),
        (("--checks", 3), [12, 28]),
        (("--keep", 1), [9, 18]),
        (("--strategy", "majority"), [3, 6]),
    ],
)
def test_run_strategies(change, expected, skilled, rows, monkeypatch, capsys):
    """sample.py prints score and cost after each round: 3 answers and 2 checks of each are 9
    samples, then 2 new answers to each of the 2 best and their checks 12 more."""
    words = (
        "--tasks",
        rows,
        "--limit",
        4,
        "--num_samples",
        3,
        "--max_new_tokens",
        12,
        "--strategy",
        "refine",
        "--rounds",
        2,
        "--checks",
        2,
        "--keep",
        2,
    )
    run_here(monkeypatch, "sample.py", "--model", skilled, *words, *change)
    spent = [float(x) for x in re.findall(r"if +\d+ +(\d+\.\d) +\d", capsys.readouterr().out)]
    assert spent == expected
