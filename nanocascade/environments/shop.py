"""The toy's shop: stock to look up, orders to place."""

MAX_CALLS = 200  # calls of an episode that are answered


def run_tool(state, name, arguments):
    """(new state, result text) of one call in the shop; the old state is not changed.

    {"stock": {"pen": 4}, "orders": []}, order(item="pen", count=3)
        -> {"stock": {"pen": 1}, "orders": [["pen", 3]]}, "done"
    A failed order is recorded in the state ("failed": 1), and its message does not show the stock:
    guessing counts until one fits must not reach the state of an order after a look-up.
    """
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
    for call in calls:
        state, _ = run_tool(state, call["name"], call["arguments"])
    return state | {"orders": sorted(state.get("orders", []))}
