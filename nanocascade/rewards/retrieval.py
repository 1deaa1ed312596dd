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


def nodes_of(row):
    """The expected answer as a set of nodes, or None where a single fact is expected."""
    expected = row["expected_answer"]
    if isinstance(expected, str) and expected.strip().startswith("["):
        expected = json.loads(expected)
    return {str(node) for node in expected} if isinstance(expected, list) else None


def verify_retrieval(row, message):
    """1 if the last line holds the expected set, or the expected fact."""
    lines = [x for x in message["content"][-TAIL:].splitlines() if x.strip("`~ \t")]  # no fence
    line = lines[-1].strip(" \t*`") if lines else ""
    line = re.sub(r"^(?:final )?answer\s?:[*\s]{0,4}", "", line, flags=re.IGNORECASE)
    answer, wanted = line.strip().rstrip("."), nodes_of(row)
    if wanted is None:
        wanted, given = (
            " ".join(str(x).casefold().split()).strip("\"'`\u201c\u201d").rstrip(".")
            for x in (row["expected_answer"], answer)
        )
    elif answer.startswith("[") and answer.endswith("]"):
        given = {item.strip().strip("\"'`").strip() for item in answer[1:-1].split(",")} - {""}
    else:
        return Reward(0.0, "no list in the last line")
    return Reward(1.0, "correct") if given == wanted else Reward(0.0, "wrong answer")


def check_retrieval_row(row):
    """ValueError unless the expected answer is a list or a fact that is not empty."""
    if nodes_of(row) is None and not str(row["expected_answer"]).strip(". \n\t"):
        raise ValueError("expected_answer is empty")
