"""Tool calls: the calls of all assistant turns against the row's `ground_truth`.

In general they must be the expected calls in their order: same names, same arguments (the XML form
of a call carries text, so "3" is 3 where the tool declares no type). No call is right where none is
expected. A null argument is one that was left out. A call that cannot be read, in any turn, is a 0.

Where only what the calls leave behind counts, an extra look-up is free:
    `environment`        an episode in the toy's shop. Both lists of calls are played from the row's
                         state, and the states compared; results in a transcript are never read
    `environment_name`   a released workplace whose state the row does not carry: the calls that
                         change something must be the expected ones, in any order
Where the expected calls change nothing (only a look-up is asked for) they must be among those made,
or doing nothing would be right.
"""

import json

from nanocascade.environments.shop import MAX_CALLS, name_and_arguments, play
from nanocascade.rewards.base import Reward
from nanocascade.rewards.structured import parse_json, same
from nanocascade.tokenizer.chat import CALL

SPELLED = {"True": "true", "False": "false", "None": "null"}  # Python's spelling in JSON's
LOOKING = {"get", "find", "search", "list", "lookup", "count", "read", "show", "fetch", "query"}
CHANGING = {"create", "update", "delete", "send", "add", "reply", "forward", "plot", "set", "move"}
CHANGING |= {"book", "cancel", "order", "remove", "assign", "make", "insert", "write", "schedule"}


def same_argument(expected, given, declared):
    """Equality of an expected value and one that came typed by the tool's schema, or as text."""
    if isinstance(expected, str):
        return expected.strip() == (given.strip() if isinstance(given, str) else json.dumps(given))
    if isinstance(given, str) and not declared:
        try:
            given = parse_json(SPELLED.get(given.strip(), given))
        except (ValueError, RecursionError):
            return False
    return same(expected, given)


def same_call(expected, given, types):
    """None if two (name, arguments) are one call, or which of the two differs."""
    (name, wanted), (other, got) = expected, given
    if name != other:
        return "wrong tools"
    wanted, got = ({k: v for k, v in x.items() if v is not None} for x in (wanted, got))
    declared = types.get(name, {})
    same_keys = wanted.keys() == got.keys()
    if not same_keys or not all(same_argument(wanted[k], got[k], k in declared) for k in wanted):
        return "wrong arguments"
    return None


def difference(expected, given, types):
    """Why two lists of (name, arguments) differ, or None."""
    if len(expected) != len(given):
        return "wrong tools" if given else "no tool call"
    reasons = [same_call(a, b, types) for a, b in zip(expected, given, strict=True)]
    return next((x for x in ("wrong tools", "wrong arguments") if x in reasons), None)


def looks_only(call):
    """Whether a call of a workplace reads and changes nothing, as its name has it."""
    words = set(call[0].lower().split("_"))
    return not words & CHANGING and bool(words & LOOKING)


def changes_differ(expected, given, types):
    """Why the changes that two lists of calls make in a workplace differ, or None."""
    left = [call for call in given if not looks_only(call)]
    if expected and all(map(looks_only, expected)):
        if left:
            return "wrong tools"
        left = list(given)
    elif len([x for x in expected if not looks_only(x)]) != len(left):
        return "wrong tools" if given else "no tool call"
    else:
        expected = [call for call in expected if not looks_only(call)]
    reason = None
    for call in expected:
        reasons = [same_call(call, other, types) for other in left]
        if None in reasons:
            del left[reasons.index(None)]
        else:
            reason = reason or (
                "wrong arguments" if "wrong arguments" in reasons else "wrong tools"
            )
    return reason


def types_of(row):
    """{tool: names of the arguments whose types the row's tools declare}."""
    tools = (row.get("responses_create_params") or {}).get("tools") or []
    reasons = {}
    for tool in (tool.get("function", tool) for tool in tools):
        fields = (tool.get("parameters") or {}).get("properties") or {}
        typed = {k for k, x in fields.items() if isinstance(x, dict) and x.get("type")}
        reasons[tool.get("name")] = typed
    return reasons


def verify_calls(row, message):
    """1 if the calls are the expected ones, or leave the environment as those would."""
    expected = [name_and_arguments(call) for call in row["ground_truth"]]
    given = [name_and_arguments(call) for call in message["tool_calls"]]
    start, types = (row.get("environment") or {}).get("state"), types_of(row)
    if any(CALL in text for text in message["texts"]):  # where parse_response leaves it
        reason = "malformed call"
    elif len(given) > MAX_CALLS:
        reason = "too many calls"
    elif row.get("environment_name") and start is None:
        reason = changes_differ(expected, given, types)
    elif start is None or same(play(start, expected), play(start, [])):
        reason = difference(expected, given, types)
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
