"""Rows of data: read from JSONL, brought to one form, drawn in a fixed order, packed.

The form is NeMo Gym's, plus the solutions that SFT imitates:

    {"id": ..., "domain": "math", "responses_create_params": {"input": [messages], "tools": [...]},
     ...what the verifier needs..., "solutions": {"on": [messages], "off": [messages]}}

on / off: with the thought and without it. A row without a verifier (chat data) has domain "sft".
`python -m nanocascade.data ROWS.jsonl` describes a file and lists the rows that cannot be used.
"""

import gzip
import json
import zlib
from pathlib import Path

from nanocascade.data.forms import gym_form
from nanocascade.environments.loop import equip
from nanocascade.files import read_text
from nanocascade.rewards import checked_row, kind_of, without_nulls
from nanocascade.tokenizer.chat import split_thought
from nanocascade.tokenizer.messages import chat_form


def read_rows(paths, sft: bool | None = False, problems: list[str] | None = None):
    """Yield the rows of JSONL files (.gz too) one by one, checked and in the form above.

    sft=True asks for a solution to imitate, False for a verifier that works on this machine, None
    for either. A bad row raises ValueError "file:line: reason", or is added to `problems`.
    """
    for path in [paths] if isinstance(paths, str | Path) else paths:
        number, empty, opener = 0, True, gzip.open if str(path).endswith(".gz") else open
        try:
            with opener(path, "rb") as lines:
                for number, line in enumerate(lines, 1):
                    row, problem = _read(line, f"{Path(path).name}:{number}", sft)
                    empty = empty and not row and not problem
                    if problem and problems is None:
                        raise ValueError(f"{path}:{number}: {problem}")
                    if problem:
                        problems.append(f"{path}:{number}: {problem}")
                    elif row:
                        yield row
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}:{number + 1}: broken archive: {error}") from None
        if empty:
            raise ValueError(f"{path}: no rows")


def _read(line: bytes, name: str, sft: bool | None):
    """(row, "") of a line, (None, "") of a blank line, (None, reason) of a bad one."""
    try:
        if not line.strip():
            return None, ""
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # fails on a lone surrogate
        row = normalize(row, name)
        if not sft and (sft is False or row["domain"] != "sft"):
            return checked_row(row), ""
        if "solutions" not in row:
            raise ValueError("no solution to imitate")
        return row, ""
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        names = {json.JSONDecodeError: "not JSON", KeyError: "missing field", ValueError: "bad row"}
        return None, f"{names.get(type(error), type(error).__name__)}: {error}"


def normalize(row: dict, name: str) -> dict:
    """Any form of forms.py, or a chat to imitate -> the common one. `name`: the id of a row without
    one. A null key is an absent key."""
    if not isinstance(row, dict):
        raise ValueError(f"not an object but {type(row).__name__}")
    row = without_nulls(row)
    if "responses_create_params" not in row:
        chat = row.get("messages")
        imitated = isinstance(chat, list) and chat and chat[-1].get("role") == "assistant"
        row = (
            from_messages(row)
            if imitated or "expected_answer" not in row and chat
            else gym_form(row)
        )
    params = row["responses_create_params"]
    messages = chat_form(params["input"])
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise ValueError("the prompt must end with a user turn or a tool's result")
    if not 0 <= row.get("pass_rate", 0) <= 1:
        raise ValueError(f"pass_rate {row['pass_rate']} is not within 0 and 1")
    row = {"id": row.get("uuid") or row.get("hash_id") or name} | row
    row = equip(row | {"responses_create_params": params | {"input": messages}})
    return row if "domain" in row else row | {"domain": kind_of(row)}


def imitated(row: dict) -> bool:
    """Whether a row is a chat that ends with the answer to imitate, or has nothing to compare."""
    chat = row.get("messages")
    if not chat or "expected_answer" not in row:
        return bool(chat)
    return isinstance(chat, list) and chat[-1].get("role") == "assistant"


def from_messages(row: dict) -> dict:
    """OpenAI chat form: the messages after the last user turn are the solution."""
    messages, tools = chat_form(row["messages"]), row.get("tools")
    tools = (
        json.loads(tools) if isinstance(tools, str) else tools
    )  # some files have them as a JSON string
    last = max((i for i, x in enumerate(messages) if x["role"] == "user"), default=-1) + 1
    if last == 0 or messages[-1]["role"] != "assistant":
        raise ValueError("messages must hold a user turn and end with the assistant's answer")
    thought, answer, unfinished = split_thought(messages[-1]["content"])
    if unfinished or not answer.strip() and not messages[-1].get("tool_calls"):
        raise ValueError(f"the last answer is {'cut in its thought' if unfinished else 'empty'}")
    on = messages[last:]
    off = [
        {
            key: split_thought(x)[1]
            if key == "content"
            else x  # the thought may be in the content, in tags
            for key, x in message.items()
            if key != "reasoning_content"
        }
        for message in on
    ]
    domain = {} if "expected_answer" in row else {"domain": "sft"}
    row = domain | {key: row[key] for key in row if key not in ("messages", "tools")}
    return row | {
        "solutions": {"on": on, "off": off} if on != off else {"off": off},
        "responses_create_params": {"input": messages[:last], "tools": tools},
    }


def read_references(path: str) -> dict[str, list[str]]:
    """{question: stored answers of the SFT run}; preference answers are compared with these."""
    answers: dict[str, list[str]] = {}
    lines = read_text(path).rstrip("\n").split("\n") if path else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            answers.setdefault(record["question"], []).append(record["answer"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}:{number}: no question and answer: {error!r}") from None
    return answers


def conversation(row: dict) -> tuple[list[dict], list[dict] | None]:
    """(messages, tools) of the prompt."""
    params = row["responses_create_params"]
    return params["input"], params.get("tools") or None


def question_of(row: dict) -> str:
    """The text of the prompt's last message."""
    return conversation(row)[0][-1]["content"]


def sft_conversation(row: dict, thinking: bool) -> list[dict]:
    """Prompt and solution, with the thought if `thinking` is set and the row has one."""
    solutions = {"on": row["solutions"]["off"]} | row["solutions"]
    return conversation(row)[0] + solutions["on" if thinking else "off"]
