"""The toy's judge: a rule on the text, in place of a generative reward model."""

import re
from functools import lru_cache
from itertools import pairwise

from nanocascade.rewards.preference import NO_DIFFERENCE

CLOSING = "I hope this helps."


@lru_cache(4096)  # a group of 16 shows each answer to the judge 15 times
def quality(question: str, answer: str) -> float:
    """Quality of an answer between 0 and 1: the weighted sum of five criteria over its maximum.

    "Tell me about the cat.", "The cat is old. It can swim." -> topic 1, detail 1/2, fresh 1,
    whole 1, polite 0: (2 + 1 + 1 + 0.5) / 6.5.
    """
    topic = (re.findall(r"[a-z]+", question.lower()) or [""])[-1].removesuffix("s")
    body, ending = answer.strip().removesuffix(CLOSING), answer.strip()[-len(CLOSING) :]
    statements = [re.findall(r"[a-z]+", x) for x in re.split(r"[.!?]\s*", body.lower()) if x]
    distinct = {
        tuple(words[-2:])
        for words in statements  # different statements that repeat no word
        if len(words) >= 3 and all(a != b for a, b in pairwise(words))
    }
    return (
        2.0 * any(word.removesuffix("s") == topic for words in statements for word in words)
        + 2.0 * min(len(distinct), 4) / 4  # detail: four statements are enough
        + 1.0 * len(distinct) / max(len(statements), 1)  # fresh: no statement twice
        + 0.5 * ending.endswith(".")  # whole: ends with a full stop
        + 1.0 * (bool(body) and ending == CLOSING)  # polite: ends with the closing phrase
    ) / 6.5


def rule_judge(conversation, response_1: str, response_2: str) -> dict:
    """The verdict of a generative reward model, computed from `quality`: no randomness, no position
    bias.

    Each score is the quality as an integer from 1 to 5. The ranking is finer; a tie is 3.5.
    """
    first, second = (quality(conversation[-1]["content"], x) for x in (response_1, response_2))
    lead = abs(first - second)
    steps = 0.0 if lead < 1e-9 else 0.5 if lead < 0.1 else 1.5 if lead < 0.3 else 2.5
    ranking = NO_DIFFERENCE - steps if first > second else NO_DIFFERENCE + steps
    return {"score_1": int(1.5 + 4 * first), "score_2": int(1.5 + 4 * second), "ranking": ranking}
