"""Strategies at test time, against a scripted model, and through the command line."""

import re

import pytest
from fixtures import toy_runs
from fixtures.toy_runs import run_here

from nanocascade.data.rows import question_of
from nanocascade.rollouts.strategies import (
    STRATEGIES,
    attempt,
    final_grades,
    most_frequent,
    refinement_prompt,
    submission_prompt,
)
from nanocascade.toy.tasks import user_row

skilled, rows = toy_runs.skilled, toy_runs.rows
BOX = "\\boxed{%s}"


def play(name, replies, truth="7", rounds=2, samples=3, rows=None, **options):
    """(answers after each round, prompts with the number of samples asked for, graded answers) of
    one problem "q" whose right answer is `truth`, or of `rows` (then lists of answers); replies are
    dealt out in order."""
    asked, graded, replies = [], [], iter(replies)

    def ask(rows, n):
        asked.extend((question_of(row), n) for row in rows)
        return [[BOX % next(replies) for _ in range(n)] for _ in rows]

    def grade(rows, answers):
        graded.extend(answers)
        return [float(x == BOX % truth) for x in answers]

    found = STRATEGIES[name](rows or [user_row("q")], ask, grade, rounds, samples, **options)
    return [answers if rows else answers[0] for answers in found], asked, graded


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
    ("checks", "mean", "grade"),
    [
        (("1", "1"), 1.0, 1.0),
        (("1", "0"), 0.5, 0.0),
        (("1", "0.5"), 0.75, 0.75),
        (("1", "7", "x"), 1.0, 1.0),
        (("x",), 0.0, 0.0),
        ((), 0.0, 0.0),
        (("-1", "nan"), 0.0, 0.0),
    ],
)
def test_numbers_checks(checks, mean, grade):
    """The search ranks by the mean of the readable checks, (1 + 1/2) / 2 = 3/4; in the final
    grading any 0 makes it 0. Analyses come lowest score first, without those of no verdict."""
    texts = [BOX % x for x in checks]
    found = attempt("a", texts)
    assert found.score == mean and found.answer == "a"
    numbers = [float(x[7:-1]) for x in found.analyses]
    assert numbers == sorted(numbers) and len(numbers) <= len(texts)
    asked = []
    ask = lambda rows, n: asked.append((question_of(rows[0]), n)) or [texts]  # noqa: E731
    assert final_grades([user_row("q")], ask, ["a"], 5) == [grade]
    assert asked[0][0].startswith("q\nTried: a\nIs it right?") and asked[0][1] == 5


def test_numbers_refine():
    """Round 1 has the answers 1, 2, 3, checked three times each: means 2/3, 5/6, 1/3; 2 is given.
    Round 2 revises the two best, 2 and 1, twice each, and shows the texts of their two checks with
    the lowest scores. All checks of 7 say 1, so round 3 asks nothing. No verifier is asked."""
    checks = [*"110", "1", "0.5", "1", *"001"], [*"111", *"000", *"110", *"000"]
    replies = [*"123", *checks[0], *"7456", *checks[1]]
    given, asked, graded = play("refine", replies, rounds=3, checks=3, keep=2, shown=2)
    assert given == [BOX % 2, BOX % 7, BOX % 7] and not graded
    assert [n for _, n in asked] == [3, 3, 3, 3, 2, 2, 3, 3, 3, 3]
    revised = [text for text, _ in asked if "Check: " in text]
    best = (BOX % 2, [BOX % "0.5", BOX % 1]), (BOX % 1, [BOX % 0, BOX % 1])
    assert revised == [refinement_prompt("q", *x) for x in best]
    assert revised[0].count("Tried") == 1 and "Score" not in "".join(revised)
    assert sum("Is it right?" in text for text, _ in asked) == 7


def test_numbers_submit():
    """A round submits its most frequent new answer: 1 of 1, 1, 2; then, 1 being known as wrong, 3
    of 1, 1, 3; then 7. Verdicts stand in later prompts, the last two; what is solved is not asked
    for again."""
    given, asked, graded = play("submit", "112113772", rounds=4)
    assert given == [BOX % 1, BOX % 1, BOX % 7, BOX % 7] and len(asked) == 3
    assert graded == [BOX % 1, BOX % 3, BOX % 7]
    assert asked[2][0] == submission_prompt("q", [(BOX % 1, 0.0), (BOX % 3, 0.0)])
    assert asked[0][0] == "q"


def test_numbers_subtasks():
    """What is accepted for a subtask stands in the prompts of the same problem's other subtasks,
    and in no other problem's."""
    rows = [user_row("a", subtask_of="p"), user_row("b", subtask_of="p"), user_row("c")]
    given, asked, _ = play("submit", "723" + "45", rows=rows, samples=1)
    assert given == [[BOX % x for x in "723"]] * 2
    shown = [
        submission_prompt("b", [(BOX % 2, 0.0)], [BOX % 7]),
        submission_prompt("c", [(BOX % 3, 0)]),
    ]
    assert [text for text, _ in asked] == ["a", "b", "c", *shown]
    assert shown[0] == "b\nAccepted: \\boxed{7}\nTried: \\boxed{2}\nScore: 0"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ((), [9, 21]),
        (("--rounds", 3), [9, 21, 33]),
        (("--checks", 3), [12, 28]),
        (("--keep", 1), [9, 18]),
        (("--gradings", 5), [9, 21]),
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
