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


def assistant(thought: str, content: str) -> dict:
    return {"role": "assistant", "content": content, "reasoning_content": thought}


def call_tool(thought: str, result: str, name: str, **arguments) -> list[dict]:
    """An assistant message that calls a tool, in the OpenAI form, and the tool's result."""
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return [assistant(thought, "") | {"tool_calls": [call]}, {"role": "tool", "content": result}]


def user_row(text: str, **fields) -> dict:
    return {"responses_create_params": {"input": [{"role": "user", "content": text}]}, **fields}
