"""Tool calls: the calls of all assistant turns against the row's `ground_truth`.

Without an environment they must be the expected calls in their order: same names, same arguments
(the XML form of a call carries text, so "3" is 3 where 3 is expected). No call is right where none
is expected. With `environment` the row is an episode in the toy's shop: both lists of calls are
played from the row's state and what they leave behind is compared, so an extra look-up is free; the
results in the transcript are never read. Where the expected calls change nothing (only a look-up is
asked for) the calls themselves are compared, or doing nothing would be right. A call that cannot
be read, in any turn, is a 0.
"""

import json

from nanocascade.environments.shop import MAX_CALLS, name_and_arguments, play
from nanocascade.rewards.base import Reward
from nanocascade.rewards.structured import parse_json, same
from nanocascade.tokenizer.chat import CALL

SPELLED = {"True": "true", "False": "false", "None": "null"}  # Python's spelling in JSON's


def same_argument(expected, given):
    """Equality of an expected value and one that came as text, or typed by the tool's schema."""
    if isinstance(expected, str):
        return expected.strip() == (given.strip() if isinstance(given, str) else json.dumps(given))
    if isinstance(given, str):
        try:
            given = parse_json(SPELLED.get(given.strip(), given))
        except (ValueError, RecursionError):
            return False
    return same(expected, given)


def difference(expected, given):
    """Why two lists of (name, arguments) differ, or None."""
    if [name for name, _ in expected] != [name for name, _ in given]:
        return "wrong tools" if given else "no tool call"
    for (_, wanted), (_, got) in zip(expected, given, strict=True):
        if wanted.keys() != got.keys() or not all(same_argument(wanted[k], got[k]) for k in wanted):
            return "wrong arguments"
    return None


def verify_calls(row, message):
    """1 if the calls are the expected ones, or leave the environment as those would."""
    expected = [name_and_arguments(call) for call in row["ground_truth"]]
    given = [name_and_arguments(call) for call in message["tool_calls"]]
    start = (row.get("environment") or {}).get("state")
    if any(CALL in text for text in message["texts"]):  # where parse_response leaves it
        reason = "malformed call"
    elif start is None or same(play(start, expected), play(start, [])):
        reason = difference(expected, given)
    elif len(given) > MAX_CALLS:
        reason = "too many calls"
    else:
        reached = same(play(start, expected), play(start, given))
        reason = None if reached else "wrong final state" if given else "no tool call"
    return Reward(0.0, reason) if reason else Reward(1.0, "correct")


def check_calls_row(row):
    """ValueError unless the expected calls can be read, and played where there is a state."""
    expected = [name_and_arguments(call) for call in row["ground_truth"]]
    if not all(isinstance(n, str) and isinstance(x, dict) for n, x in expected):
        raise ValueError(f"ground_truth needs names and objects, got {expected!r:.200}")
    if (environment := row.get("environment")) is not None:
        if environment["name"] != "shop":
            raise ValueError(f"environment {environment['name']!r} is unknown; there is 'shop'")
        stock, orders = environment["state"]["stock"], environment["state"].get("orders", [])
        for item, number in [*stock.items(), *orders]:
            if not isinstance(item, str) or type(number) is not int:
                raise ValueError(f"stock and orders must be counts, got {item!r}: {number!r:.80}")
        if play(environment["state"], expected).get("failed"):
            raise ValueError("a call of ground_truth fails in the row's own environment")
