"""The words and messages that the toy's rows are made of."""

ANIMALS = ("cat", "dog", "fox", "owl")
COLORS = ("red", "blue", "green", "gold")
FOODS = ("apple", "bread", "corn", "plum")
THINGS = ("boat", "lamp", "drum", "coin")
NAMES = ("Tom", "Ann", "Max", "Eva")
CATEGORIES = {"an animal": ANIMALS, "a color": COLORS, "a food": FOODS, "a thing": THINGS}
NOUNS = ANIMALS + COLORS + FOODS + THINGS
LETTERS = "ABCD"
FACTS = (
    "is kind",
    "is quick",
    "is old",
    "is quiet",
    "can swim",
    "can sing",
    "likes corn",
    "likes rain",
    "sleeps well",
    "lives far",
)
CLOSING = " I hope this helps."


def tool_call(name: str, **arguments) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def assistant(thought: str, content: str, calls: list[dict] | None = None) -> dict:
    """An assistant message in the OpenAI form."""
    message = {"role": "assistant", "content": content, "reasoning_content": thought}
    return message | ({"tool_calls": calls} if calls else {})


def user_row(text: str, **fields) -> dict:
    return {"responses_create_params": {"input": [{"role": "user", "content": text}]}, **fields}
