"""Test-time strategies: several answers to one problem, and which of them is given.

A strategy plays rounds, all problems at once, and yields after each round the answer it would give
now, one text a problem. It sees the problems through two functions: ask(rows, n) samples n answers
to each row, [[text] * n] * p; grade(rows, answers) is the rows' own verifier, [score] * p, which
only best_of_n and submit may call: the others choose without knowing.
Source: Nemotron-Cascade 2, IMO (refine) and IOI / ICPC (submit).
"""

from collections import Counter

from nanocascade.rewards.math import last_boxed

TRIED, SCORE = "\nTried: ", "\nScore: "
CHECK = "\nIs it right? Check each step, then say \\boxed{1} if it is right and \\boxed{0} if not."
SHOWN = 2  # earlier attempts in a prompt: as many as the toy's SFT rows have


def text_of(row: dict) -> str:
    return row["responses_create_params"]["input"][-1]["content"]


def asking(row: dict, prompt: str) -> dict:
    """The row with another last message: its system message, tools and verifier stay."""
    params = row["responses_create_params"]
    messages = [*params["input"][:-1], params["input"][-1] | {"content": prompt}]
    return row | {"responses_create_params": params | {"input": messages}}


def verification_prompt(question: str, answer: str) -> str:
    return question + TRIED + answer + CHECK


def revision_prompt(question: str, attempts: list[tuple[str, float]]) -> str:
    """attempts: (answer, score), the last one nearest to the new answer."""
    return question + "".join(f"{TRIED}{x}{SCORE}{score:.3g}" for x, score in attempts)


def final(answer: str) -> str:
    """What two answers must share to be the same one: the last box, else the whole text."""
    return last_boxed(answer)[0] or answer.strip()


def most_frequent(answers: list[str]) -> str:
    """An answer of the largest group with the same final; the earliest of equally large ones.
    One that was cut off, "", only if there is no other."""
    count = Counter(map(final, answers))
    return max(answers, key=lambda x: (x != "", count[final(x)]))


def single(rows, ask, grade, rounds, samples, **_):
    """One sample a round, the last one given: what the others are measured against."""
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
        groups = ask(rows, samples)
        for n in range(samples):
            answers = [group[n] for group in groups]
            scores = grade(rows, answers)
            best = [
                max(old, new, key=lambda x: x[1])
                for old, new in zip(best, zip(answers, scores, strict=True), strict=True)
            ]
        yield [answer for answer, _ in best]


def verdict(text: str) -> float | None:
    """The number between 0 and 1 in the last box of a check; None if there is none."""
    try:
        score = float(last_boxed(text)[0] or "")
    except ValueError:
        return None
    return score if 0 <= score <= 1 else None


def believed(checks: list[str]) -> float:
    """Any 0 makes it 0, else the mean; checks without a verdict do not count, none at all is 0."""
    scores = [x for x in map(verdict, checks) if x is not None]
    return sum(scores) / len(scores) if scores and min(scores) > 0 else 0.0


def refine(rows, ask, grade, rounds, samples, checks, keep, **_):
    """Generate - verify - refine: the `keep` best answers are revised in the next round.

    Each answer is checked `checks` times by the model itself (`believed`). The answer given is the
    most frequent of those believed most, over all rounds. The report: 128 proofs, 64 checks, 32.
    """
    pools = [[] for _ in rows]  # of (answer, belief)
    for turn in range(rounds):
        if turn == 0:
            groups = ask(rows, samples)
        else:
            kept = [sorted(pool, key=lambda x: -x[1])[:keep] for pool in pools]
            prompts = [
                asking(row, revision_prompt(text_of(row), [x]))
                for row, best in zip(rows, kept, strict=True)
                for x in best
            ]
            groups = regroup(ask(prompts, -(-samples // keep)), map(len, kept))
        asked = [
            asking(row, verification_prompt(text_of(row), x))
            for row, group in zip(rows, groups, strict=True)
            for x in group
        ]
        beliefs = iter([believed(x) for x in ask(asked, checks)])
        for pool, group in zip(pools, groups, strict=True):
            pool += [(x, next(beliefs)) for x in group]
        yield [
            most_frequent([x for x, b in pool if b == max(b for _, b in pool)]) for pool in pools
        ]


def regroup(groups, sizes):
    """Consecutive groups joined, `sizes` of them each time."""
    groups = iter(groups)
    return [[x for _ in range(n) for x in next(groups)] for n in sizes]


def submit(rows, ask, grade, rounds, samples, **_):
    """Generate - select - submit: a round's most frequent answer that was not submitted before goes
    to the hidden tests, and what earlier ones scored stands in the next prompt."""
    sent = [[] for _ in rows]  # of (answer, score)
    for _ in range(rounds):
        open_ = [i for i, past in enumerate(sent) if not any(score == 1 for _, score in past)]
        prompts = [
            asking(rows[i], revision_prompt(text_of(rows[i]), sent[i][-SHOWN:])) for i in open_
        ]
        chosen = []
        for i, answers in zip(open_, ask(prompts, samples), strict=True):
            old = {final(x) for x, _ in sent[i]}
            new = [x for x in answers if x and final(x) not in old]
            chosen.append(most_frequent(new or answers))
        scores = grade([rows[i] for i in open_], chosen)
        for i, x, score in zip(open_, chosen, scores, strict=True):
            sent[i].append((x, score))
        yield [max(past, key=lambda x: x[1])[0] for past in sent]


STRATEGIES = {
    "single": single,
    "majority": majority,
    "best-of-n": best_of_n,
    "refine": refine,
    "submit": submit,
}
