"""The toy's shop: stock to look up, orders to place."""

import json

MAX_CALLS = 200  # calls of an episode that are answered


def name_and_arguments(call):
    """("order", {"item": "pen"}) from a call: flat or in "function", arguments as JSON or dict."""
    call = call.get("function", call)
    arguments = call.get("arguments") or {}
    return call["name"], json.loads(arguments) if isinstance(arguments, str) else arguments


def run_tool(state, call):
    """(new state, result text) of one call in the shop; the old state is not changed.

    {"stock": {"pen": 4}, "orders": []}, order(item="pen", count=3)
        -> {"stock": {"pen": 1}, "orders": [["pen", 3]]}, "done"
    A failed order is recorded in the state ("failed": 1), and its message does not show the stock:
    guessing counts until one fits must not reach the state of an order after a look-up.
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
    """The state after the calls, with its orders sorted: their order does not matter."""
    for name, arguments in calls:
        state, _ = run_tool(state, {"name": name, "arguments": arguments})
    return state | {"orders": sorted(state.get("orders", []))}
