"""Test-time strategies: sample several answers to a problem, and choose the one to give.

A strategy plays rounds, all problems at once, and yields after each round the answer it would give
now, one text a problem. It sees the problems through two functions: ask(rows, n) samples n answers
to each row, [[text] * n] * p; grade(rows, answers) is the rows' own verifier, [score] * p, which
only best_of_n and submit may call: the others choose without it.
Source: Nemotron-Cascade 2, IMO (refine) and IOI / ICPC (submit).
"""

from collections import Counter, defaultdict
from typing import NamedTuple

from nanocascade.data.rows import question_of
from nanocascade.rewards.math import last_boxed

TRIED, SCORE, ANALYSIS, ACCEPTED = "\nTried: ", "\nScore: ", "\nCheck: ", "\nAccepted: "
CHECK = "\nIs it right? Check each step, then say \\boxed{1} if it is right and \\boxed{0} if not."
SHOWN = 2  # submissions, or accepted programs, in a prompt, as in the toy's SFT rows
CERTAIN = 0.99999  # an answer with this mean score is not refined any more


def asking(row: dict, prompt: str) -> dict:
    """The row with another last message: its system message, tools and verifier stay."""
    params = row["responses_create_params"]
    *before, last = params["input"]
    messages = [*before, last | {"content": prompt}]
    return row | {"responses_create_params": params | {"input": messages}}


def verification_prompt(question: str, answer: str) -> str:
    return question + TRIED + answer + CHECK


def refinement_prompt(question: str, answer: str, analyses: list[str]) -> str:
    return question + TRIED + answer + "".join(ANALYSIS + x for x in analyses)


def submission_prompt(question: str, submissions: list[tuple[str, float]], accepted=()) -> str:
    """submissions: (answer, its score), oldest first. accepted: answers to other subtasks."""
    past = [f"{TRIED}{answer}{SCORE}{score:.3g}" for answer, score in submissions]
    return question + "".join([*(ACCEPTED + x for x in accepted), *past])


def final(answer: str) -> str:
    """The part that equal answers share: the last box, else the whole text."""
    return last_boxed(answer)[0] or answer.strip()


def most_frequent(answers: list[str]) -> str:
    """An answer of the largest group with the same final; the earliest of equally large ones.
    One that was cut off, "", only if there is no other."""
    count = Counter(map(final, answers))
    return max(answers, key=lambda x: (x != "", count[final(x)]))


def single(rows, ask, grade, rounds, samples, **_):
    """One sample a round; the answer is the last one. The baseline of the others."""
    for _ in range(rounds):
        yield [answers[0] for answers in ask(rows, 1)]


def majority(rows, ask, grade, rounds, samples, **_):
    """The most frequent final answer of all samples so far."""
    pools = [[] for _ in rows]
    for _ in range(rounds):
        for pool, answers in zip(pools, ask(rows, samples), strict=True):
            pool += answers
        yield [most_frequent(pool) for pool in pools]


def best_of_n(rows, ask, grade, rounds, samples, **_):
    """The best of all samples so far by the verifier: pass@n where verdicts are 0 or 1."""
    best = [("", -1.0) for _ in rows]
    for _ in range(rounds):
        for answers in zip(*ask(rows, samples), strict=True):  # the n-th answers to all rows
            scored = zip(answers, grade(rows, answers), strict=True)
            best = [max(pair, key=lambda x: x[1]) for pair in zip(best, scored, strict=True)]
        yield [answer for answer, _ in best]


def verdict(text: str) -> float | None:
    """The number between 0 and 1 in the last box of a check; None if there is none."""
    try:
        score = float(last_boxed(text)[0] or "")
    except ValueError:
        return None
    return score if 0 <= score <= 1 else None


class Attempt(NamedTuple):
    answer: str
    score: float  # mean of its checks
    analyses: list[str]  # texts of its checks, lowest score first


def attempt(answer: str, checks: list[str]) -> Attempt:
    """An answer and its checks; those without a verdict do not count, and none at all score 0."""
    found = [(score, x) for x in checks if (score := verdict(x)) is not None]
    found.sort(key=lambda x: x[0])
    mean = sum(score for score, _ in found) / max(len(found), 1)
    return Attempt(answer, mean, [text for _, text in found])


def final_grades(rows, ask, answers, gradings: int) -> list[float]:
    """Grades of the answers that a strategy gave: any 0 makes it 0, else the mean.

    A separate, harder judgement at the end, as in the report's ProofBench: no search sees it.
    """
    grades = []
    for texts in ask(verifications(rows, answers), gradings):
        scores = [x for x in map(verdict, texts) if x is not None]
        grades.append(sum(scores) / len(scores) if scores and min(scores) > 0 else 0.0)
    return grades


def verifications(rows, answers) -> list[dict]:
    return [
        asking(row, verification_prompt(question_of(row), x))
        for row, x in zip(rows, answers, strict=True)
    ]


def refine(rows, ask, grade, rounds, samples, checks, keep, shown, **_):
    """Generate - verify - refine: the `keep` best answers are revised in the next round.

    The model itself checks each answer `checks` times; the mean of the scores ranks the answers. A
    revision sees the answer and the texts of its `shown` lowest-scored checks. A problem with an
    answer of mean CERTAIN is finished. The report: 128 proofs, 64 checks, the best 32 revised 4
    times each, 8 analyses shown, at most 8 rounds.
    """
    pools: list[list[Attempt]] = [[] for _ in rows]
    for turn in range(rounds):
        owners, prompts = [], []
        for i, row in enumerate(rows):
            best = sorted(pools[i], key=lambda x: -x.score)[:keep]
            if turn == 0:
                texts = [question_of(row)]
            elif best[0].score >= CERTAIN:
                texts = []
            else:
                texts = [
                    refinement_prompt(question_of(row), x.answer, x.analyses[:shown]) for x in best
                ]
            owners += [i] * len(texts)
            prompts += [asking(row, text) for text in texts]
        groups = ask(prompts, samples if turn == 0 else -(-samples // keep))
        found = [(i, x) for i, group in zip(owners, groups, strict=True) for x in group]
        asked = verifications([rows[i] for i, _ in found], [x for _, x in found])
        for (i, answer), texts in zip(found, ask(asked, checks), strict=True):
            pools[i].append(attempt(answer, texts))
        yield [most_frequent(best_answers(pool)) for pool in pools]


def best_answers(pool: list[Attempt]) -> list[str]:
    best = max(x.score for x in pool)
    return [x.answer for x in pool if x.score == best]


def submit(rows, ask, grade, rounds, samples, **_):
    """Generate - select - submit: a round's most frequent new answer goes to the hidden tests.

    The next prompt holds the last submissions with their scores and, for rows that share a
    "subtask_of", the last answers that were accepted for the problem's other subtasks. The report:
    50 rounds of 40 candidates.
    """
    sent = [[] for _ in rows]  # of (answer, score)
    accepted = defaultdict(list)  # problem -> (subtask, answer)
    for _ in range(rounds):
        open_ = [i for i, past in enumerate(sent) if not any(score == 1 for _, score in past)]
        prompts = []
        for i in open_:
            others = [x for j, x in accepted[rows[i].get("subtask_of")] if j != i]
            text = submission_prompt(question_of(rows[i]), sent[i][-SHOWN:], others[-SHOWN:])
            prompts.append(asking(rows[i], text))
        chosen = []
        for i, answers in zip(open_, ask(prompts, samples), strict=True):
            old = {final(x) for x, _ in sent[i]}
            new = [x for x in answers if x and final(x) not in old]
            chosen.append(most_frequent(new or answers))
        scores = grade([rows[i] for i in open_], chosen)
        for i, answer, score in zip(open_, chosen, scores, strict=True):
            sent[i].append((answer, score))
            if score == 1 and "subtask_of" in rows[i]:
                accepted[rows[i]["subtask_of"]].append((i, answer))
        yield [max(past, key=lambda x: x[1])[0] for past in sent]


STRATEGIES = {
    "single": single,
    "majority": majority,
    "best-of-n": best_of_n,
    "refine": refine,
    "submit": submit,
}
