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

from nanocascade.rewards.base import Reward
from nanocascade.rewards.structured import parse_json, same
from nanocascade.tokenizer.chat import CALL

MAX_CALLS = 200  # played in an episode
SPELLED = {"True": "true", "False": "false", "None": "null"}  # Python's spelling in JSON's


def name_and_arguments(call):
    """("order", {"item": "pen"}) from a call: flat or in "function", arguments as JSON or dict."""
    call = call.get("function", call)
    arguments = call.get("arguments") or {}
    return call["name"], json.loads(arguments) if isinstance(arguments, str) else arguments


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


def run_tool(state, call):
    """(new state, result text) of one call in the shop; the old state is not changed.

    {"stock": {"pen": 4}, "orders": []}, order(item="pen", count=3)
        -> {"stock": {"pen": 1}, "orders": [["pen", 3]]}, "done"
    A failed order stays in the state ("failed": 1) and its message tells nothing of the stock:
    trying counts until one fits must not end where looking first does.
    """
    name, arguments = name_and_arguments(call)
    item, count = (str(arguments.get(key, "")).strip() for key in ("item", "count"))
    stock = state["stock"]
    if name == "lookup":
        return state, str(stock[item]) if item in stock else "error: no such item"
    if name != "order":
        return state, "error: no such tool"
    number = int(count) if count.isascii() and count.isdigit() and len(count) < 10 else 0
    if not 0 < number <= stock.get(item, 0):
        return state | {"failed": state.get("failed", 0) + 1}, "error: not possible"
    orders = [*state.get("orders", []), [item, number]]
    return state | {"stock": stock | {item: stock[item] - number}, "orders": orders}, "done"


def play(state, calls):
    """The state after the calls; in which order the orders were placed does not matter."""
    for name, arguments in calls:
        state, _ = run_tool(state, {"name": name, "arguments": arguments})
    return state | {"orders": sorted(state.get("orders", []))}


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
