"""Tool calls: the calls of all assistant turns against the row's `ground_truth`.

In general they must be the expected calls in their order: same names, same arguments (the XML form
of a call carries text, so "3" is 3 where the tool declares no type). Where none is expected, no
call is right. A null argument is one that was left out. A call that cannot be read is a 0.

Where only what the calls leave behind counts, an extra look-up is free:
    `environment`        an episode in the toy's shop. Both lists of calls are played from the row's
                         state, and the states compared; results in a transcript are never read
    `environment_name`   a released workplace whose state the row does not carry: the calls that
                         change something must be the expected ones, in any order
Where the expected calls change nothing (only a look-up is asked for) they must be among those made,
or doing nothing would be right.
"""

import json

from nanocascade.environments.shop import MAX_CALLS, play
from nanocascade.rewards.base import Reward
from nanocascade.rewards.structured import parse_json, same
from nanocascade.tokenizer.chat import CALL

SPELLED = {"True": "true", "False": "false", "None": "null"}  # Python's spelling in JSON's
LOOKING = {"get", "find", "search", "list", "lookup", "count", "read", "show", "fetch", "query"}
CHANGING = {"create", "update", "delete", "send", "add", "reply", "forward", "plot", "set", "move"}
CHANGING |= {"book", "cancel", "order", "remove", "assign", "make", "insert", "write", "schedule"}


def read_call(call):
    """{"name": "order", "arguments": {"item": "pen"}} of a call whose name stands in "function" or
    not, and whose arguments are JSON or an object."""
    call = call.get("function", call)
    name, arguments = call["name"], call.get("arguments") or {}
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError(f"a call has a name and an object of arguments, got {call!r:.200}")
    arguments = {key: value for key, value in arguments.items() if value is not None}
    return {"name": name, "arguments": arguments}


def same_argument(expected, given, declared):
    """Equality of an expected value and one that came typed by the tool's schema, or as text."""
    if isinstance(expected, str):
        if not isinstance(given, str):  # 5 for "5", where nothing says that it is a text
            return not declared and expected.strip() == json.dumps(given)
        return expected.strip() == given.strip()
    if isinstance(given, str) and not declared:
        try:
            given = parse_json(SPELLED.get(given.strip(), given))
        except (ValueError, RecursionError):
            return False
    return same(expected, given)


def same_call(expected, given, types):
    name, wanted, got = expected["name"], expected["arguments"], given["arguments"]
    declared = types.get(name, {})
    return (
        name == given["name"]
        and wanted.keys() == got.keys()
        and all(same_argument(wanted[key], got[key], key in declared) for key in wanted)
    )


def same_calls(expected, given, types):
    return len(expected) == len(given) and all(
        same_call(a, b, types) for a, b in zip(expected, given, strict=True)
    )


def changes(calls):
    """The calls of a workplace that may change something, by the words of their names."""
    words = [(call, set(call["name"].lower().split("_"))) for call in calls]
    return [call for call, x in words if x & CHANGING or not x & LOOKING]


def same_changes(expected, given, types):
    """Whether two lists of calls make the same changes in a workplace, in any order."""
    asked, made = changes(expected), changes(given)
    if len(asked) != len(made):
        return False
    if expected and not asked:  # only look-ups are asked for: they must be made
        asked, made = expected, list(given)
    for call in asked:
        fits = [same_call(call, other, types) for other in made]
        if True not in fits:
            return False
        del made[fits.index(True)]
    return True


def types_of(row):
    """{tool: names of the arguments whose types the row's tools declare}."""
    tools = (row.get("responses_create_params") or {}).get("tools") or []
    types = {}
    for tool in (tool.get("function", tool) for tool in tools):
        fields = (tool.get("parameters") or {}).get("properties") or {}
        typed = {k for k, x in fields.items() if isinstance(x, dict) and x.get("type")}
        types[tool.get("name")] = typed
    return types


def verify_calls(row, message):
    """1 if the calls are the expected ones, or leave the environment as those would."""
    expected, given = row["ground_truth"], [read_call(call) for call in message["tool_calls"]]
    start = (row.get("environment") or {}).get("state")
    if any(CALL in text for text in message["texts"]):  # where parse_response leaves it
        return Reward(0.0, "malformed call")
    if len(given) > MAX_CALLS:
        return Reward(0.0, "too many calls")
    if start and not same(play(start, expected), play(start, [])):
        right, reason = same(play(start, expected), play(start, given)), "wrong final state"
    else:
        compare = same_changes if row.get("environment_name") and not start else same_calls
        right = compare(expected, given, types_of(row))
        named = [[call["name"] for call in calls] for calls in (expected, given)]
        reason = "wrong arguments" if named[0] == named[1] else "wrong tools"
    if right:
        return Reward(1.0, "correct")
    return Reward(0.0, reason if given else "no tool call")


def check_calls_row(row):
    """The row with its expected calls in one form. ValueError unless they can be read, and played
    where there is a state."""
    expected = [read_call(call) for call in row["ground_truth"]]
    if (environment := row.get("environment")) is not None:
        if environment["name"] != "shop":
            raise ValueError(f"environment {environment['name']!r} is unknown; there is 'shop'")
        stock, orders = environment["state"]["stock"], environment["state"].get("orders", [])
        for item, number in [*stock.items(), *orders]:
            if not isinstance(item, str) or type(number) is not int:
                raise ValueError(f"stock and orders must be counts, got {item!r}: {number!r:.80}")
        if play(environment["state"], expected).get("failed"):
            raise ValueError("a call of ground_truth fails in the row's own environment")
    return row | {"ground_truth": expected}
