"""Judged rewards: a group's responses compared two by two (Nemotron-Cascade 2, RLHF), or each one
with a reference, where no program can tell (long-context answers, patches without tests).

A judge is any callable judge(conversation, response_1, response_2) -> {"score_1", "score_2",
"ranking"}: how good each one is, 1..5, and which is better, from 1 (the first, by far) to 6 (the
second, by far). EndpointJudge asks a generative reward model behind an HTTP endpoint; rule_judge is
the toy's, a pure function of the texts. Judges see answers, never thoughts.

Grading asks judge.grade(conversation, solution_1, solution_2) -> 0..1, how much the two agree.

    matches -> base (mean score) -> + length control -> + conciseness bonus = reward

# OURS: a response cut off in its thought or answer is not judged and earns the lowest score (1).
Or the group's lowest reward if that is lower still: tie-breaks and length control can pass below 1.
"""

from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import numpy as np

from nanocascade.rewards.base import Reward, read_turn

LOWEST, MIDDLE, NO_DIFFERENCE = 1.0, 3.0, 3.5  # of the scores 1..5 and of the ranking 1..6


def score_group(
    row,
    responses,
    judge,
    *,
    pairing="all",
    both_orders=False,
    length_coef=0.5,
    conciseness_bonus=0.5,
    finished=None,
    thought_lengths=None,
    answer_lengths=None,
):
    """One Reward for each response of a prompt's group: a text after the header, or a turn.

    pairing: "all" pairs (the report) or "circle", each with its successor (Nano). both_orders asks
    about every pair twice, places swapped, which cancels a judge's liking for a place. finished:
    False where generation stopped at the limit. Lengths: tokens; by default characters.
    """
    messages = [read_turn(response) for response in responses]
    finished = finished or [True] * len(messages)
    judged = [
        i
        for i, (message, done) in enumerate(zip(messages, finished, strict=True))
        if done and not message["unfinished"]
    ]
    pairs = make_pairs(len(judged), pairing, both_orders)
    verdicts = _ask_all(judge, row, [messages[i]["content"] for i in judged], pairs)
    matches = {(judged[i], judged[j]): x for (i, j), x in zip(pairs, verdicts, strict=True)}
    lengths = (
        thought_lengths or [len(x["reasoning_content"] or "") for x in messages],
        answer_lengths or [len(x["content"]) for x in messages],
    )
    return group_rewards(judged, matches, lengths, length_coef, conciseness_bonus)


def group_rewards(judged, matches, lengths, length_coef=0.5, conciseness_bonus=0.5):
    """One Reward for each response of a group from its matches, {(i, j): verdict}.

    judged: indices of the responses that took part. lengths: those of all thoughts, of all answers.
    """
    places = {i: place for place, i in enumerate(judged)}
    pairs = [(places[i], places[j]) for i, j in matches]
    base = base_rewards(len(judged), pairs, matches.values())
    shaping = np.zeros((2, len(judged)))  # length control, conciseness bonus
    for counts in lengths:
        counts = [counts[i] for i in judged]
        shaping += length_control(counts, length_coef), conciseness(counts, base, conciseness_bonus)
    totals = (base + shaping.sum(0)).tolist()
    rewards = [Reward(min([LOWEST, *totals]), "cut off, not judged")] * len(lengths[0])
    for i, total, score, (control, bonus) in zip(judged, totals, base, shaping.T, strict=True):
        reason = f"judged {score:.2f}, length {control:+.2f}, conciseness {bonus:+.2f}"
        rewards[i] = Reward(total, reason)
    return rewards


def win_rate(row, response, reference_response, judge) -> float:
    """1 if the judge prefers `response` to the reference, 0 if the reference, 1/2 for neither.

    Both orders are asked and their scores added. Who was cut off in the thought loses.
    """
    ours, other = read_turn(response), read_turn(reference_response)
    first, second = other["unfinished"], ours["unfinished"]
    if not first and not second:
        pairs = make_pairs(2, "all", both_orders=True)
        verdicts = _ask_all(judge, row, [ours["content"], other["content"]], pairs)
        first, second = base_rewards(2, pairs, verdicts)
    return 0.5 + 0.5 * ((first > second) - (first < second))


def reference_of(row):
    """What a judge compares answers with: a repair's patch if it has no tests, the expected answer
    if the row's agent is an LLM judge; None for rows that need no judge."""
    metadata = row.get("verifier_metadata") or {}
    if "files" in metadata and "unit_tests" not in metadata and "environment" not in row:
        return metadata["patch"]
    agent = str((row.get("agent_ref") or {}).get("name"))
    return row.get("expected_answer") if "llm_judge" in agent else None


def grade(row, answer: str, judge) -> Reward:
    """The judge's score of an answer beside the reference: the lower one of both orders, so that a
    judge which likes a place, or whatever comes last, gives nothing away."""
    if not answer.strip():
        return Reward(0.0, "blank answer")
    texts = str(reference_of(row)), answer
    scores = [judge.grade(conversation_of(row), *order) for order in (texts, texts[::-1])]
    return Reward(min(scores), "judged %.2f and, places swapped, %.2f" % tuple(scores))


def make_pairs(num: int, pairing: str, both_orders: bool = False) -> list[tuple[int, int]]:
    """3, "all" -> (0,1), (0,2), (1,2); 3, "circle" -> (0,1), (1,2), (2,0). One has no match."""
    if pairing not in ("all", "circle"):
        raise ValueError(f"pairing {pairing!r}: expected 'all' or 'circle'")
    circle = [(i, (i + 1) % num) for i in range(num if num > 1 else 0)]
    pairs = circle if pairing == "circle" else list(combinations(range(num), 2))
    return pairs + [(j, i) for i, j in pairs] if both_orders else pairs


def break_tie(verdict: dict) -> tuple[float, float]:
    """(s_i, s_j) of a match. On equal scores: s_i += 3.5 - rank, s_j += rank - 3.5."""
    first, second = verdict["score_1"], verdict["score_2"]
    shift = NO_DIFFERENCE - verdict["ranking"] if first == second else 0
    return first + shift, second - shift


def base_rewards(num: int, pairs, verdicts) -> list[float]:
    """Mean of a response's scores over its matches; without any, the middle of the scale."""
    scores = [[] for _ in range(num)]
    for pair, verdict in zip(pairs, verdicts, strict=True):
        for i, score in zip(pair, break_tie(verdict), strict=True):
            scores[i].append(score)
    return [sum(x) / len(x) if x else MIDDLE for x in scores]


def length_control(lengths, coef: float = 0.5) -> list[float]:
    """coef * (w_i - mean w), w_i = 1 - (l_i - l_min) / (l_max - l_min); all zero if all are equal.

    [10, 20, 40] -> w = [1, 2/3, 0], mean 5/9 -> 0.5 * [4/9, 1/9, -5/9].
    """
    shortest, longest = min(lengths, default=0), max(lengths, default=0)
    w = [1 - (length - shortest) / ((longest - shortest) or 1) for length in lengths]
    return [coef * (x - sum(w) / len(w)) for x in w]


def conciseness(lengths, base, bonus: float = 0.5) -> list[float]:
    """bonus for the shortest if its base reward >= the group's 80th percentile (linear), else 0.

    # OURS: equally short ones are all the shortest, so that the order of rollouts never matters.
    """
    bar = np.percentile(base or [0], 80) - 1e-9  # rounding must not cost equals their bonus
    return [bonus * (n == min(lengths) and x >= bar) for n, x in zip(lengths, base, strict=True)]


def conversation_of(row):
    asked = row["responses_create_params"]["input"]
    return [{"role": "user", "content": asked}] if isinstance(asked, str) else asked


def _ask_all(judge, row, answers, pairs) -> list[dict]:
    """The verdicts of all matches in order; as many at a time as the judge's `workers` says."""
    asked = conversation_of(row)
    with ThreadPoolExecutor(getattr(judge, "workers", 1)) as pool:
        return list(pool.map(lambda pair: judge(asked, *(answers[i] for i in pair)), pairs))
