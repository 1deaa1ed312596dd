"""Shared by the verifiers: the type of a reward, and the parsed turns of a response."""

import re
from typing import NamedTuple

from nanocascade.tokenizer.chat import THINK, THINK_END, parse_response


class Reward(NamedTuple):
    """The reward of a response and its reason, one short line for rollouts.jsonl."""

    value: float  # 1.0 or 0.0 for binary verifiers; preference scores may take any value
    reason: str


def read_turn(turn, tools=None):
    """parse_response of a turn, without thoughts that come late, are repeated or nested.

    "So. <think>\\boxed{4}</think> It is 5." -> "So.  It is 5."; what stands before a </think> that
    closes nothing was a thought too. turn: its text, or a message; the message of a rollout was
    parsed when it was sampled, and carries the result as "parsed".
    """
    if not isinstance(turn, str) and "parsed" in turn:
        return turn["parsed"]
    text = text_of(turn)
    tags = list(re.finditer(f"{THINK}|{THINK_END}", text))
    simple = [x[0] for x in tags] in ([], [THINK, THINK_END])
    if simple and text.lstrip().startswith(THINK) == bool(tags):
        return parse_response(text, tools)
    visible, depth, start = [], 0, 0
    for tag in tags:
        if depth == 0 and tag[0] == THINK:
            visible.append(text[start : tag.start()])
        elif depth == 0:
            visible = []
        depth = depth + 1 if tag[0] == THINK else max(depth - 1, 0)
        start = tag.end()
    message = parse_response("".join([*visible, text[start:]]).lstrip("\n"), tools)
    return message | {"unfinished": depth > 0}


def text_of(turn):
    """The content of a turn as one text: it may be null, absent, or in parts."""
    content = turn if isinstance(turn, str) else turn.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
