"""Long context without a judge: a list of nodes, or one fact, in the last line of the answer.

A row whose `expected_answer` is a JSON list (graph walks: '["a", "b"]') asks for the line
`Final Answer: [a, b]`, compared as a set; any other asks for the fact itself, compared without
case, spacing, quotes and full stop. The marker may be missing; nothing but the last line is read.
# OURS: all or nothing. NeMo Gym pays the F1 of the set times (1 - copied share of the thought).
"""

import json
import re

from nanocascade.rewards.base import Reward

TAIL = 100_000  # characters that are read, from the end


def plain(fact):
    """A fact without what does not count: case, spacing, quotes, a full stop."""
    return " ".join(str(fact).casefold().split()).strip("\"'`\u201c\u201d\u00ab\u00bb").rstrip(".")


def verify_retrieval(row, message):
    """1 if the last line holds the expected set, or the expected fact."""
    lines = [x for x in message["content"][-TAIL:].splitlines() if x.strip("`~ \t")]  # no fence
    line = lines[-1].strip(" \t*`") if lines else ""
    line = re.sub(r"^(?:final )?answer\s?:[*\s]{0,4}", "", line, flags=re.IGNORECASE)
    answer, given = line.strip(" \t*`").rstrip(". *`"), None
    if isinstance(row["wanted"], str):
        given = plain(answer)
    elif answer.startswith("[") and answer.endswith("]"):
        given = {item.strip().strip("\"'`").strip() for item in answer[1:-1].split(",")}
        given = sorted(given - {""})
    if given is None:
        return Reward(0.0, "no list in the last line")
    return Reward(1.0, "correct") if given == row["wanted"] else Reward(0.0, "wrong answer")


def check_retrieval_row(row):
    """The row with what is wanted: sorted nodes, or a fact, which must not be empty."""
    expected = row["expected_answer"]
    if isinstance(expected, str) and expected.strip().startswith("["):
        expected = json.loads(expected)
    if isinstance(expected, list):
        return row | {"wanted": sorted({str(node) for node in expected})}
    if not plain(expected):
        raise ValueError("expected_answer is empty")
    return row | {"wanted": plain(expected)}
