"""Rows of data: read from JSONL, brought to one form, checked.

The form is NeMo Gym's, plus the solutions that SFT imitates:

    {"id": ..., "domain": "math", "kind": "math", ...what the verifier needs...,
     "responses_create_params": {"input": [messages], "tools": [...]},
     "solutions": {"on": [messages], "off": [messages]}}

kind: the row's verifier, for rows that are graded. Messages are in the form of
tokenizer/messages.py. on / off: with the thought and without it. A row without a verifier (chat
data) has domain "sft". `python -m nanocascade.data ROWS.jsonl` describes a file and lists the rows
that cannot be used.
"""

import gzip
import json
import zlib
from pathlib import Path

from nanocascade.data.forms import gym_form
from nanocascade.environments.loop import equip
from nanocascade.rewards import checked_row, kind_of, without_nulls
from nanocascade.tokenizer.messages import chat_form

# What reading a row may raise, and how the message begins where the type alone says too little.
BAD_ROW = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
REASONS = {json.JSONDecodeError: "not JSON", KeyError: "missing field", ValueError: "bad row"}


def read_rows(paths, sft: bool | None = False, problems: list[str] | None = None):
    """Yield the rows of JSONL files (.gz too) one by one, checked and in the form above.

    sft=True asks for a solution to imitate, False for a verifier that works on this machine, None
    for either. A bad row raises ValueError "file:line: reason", or is added to `problems`.
    """
    for path in [paths] if isinstance(paths, str | Path) else paths:
        number, empty = 0, True
        try:
            with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as lines:
                for number, line in enumerate(lines, 1):
                    if not line.strip():
                        continue
                    empty = False
                    try:
                        row = read_row(line, f"{Path(path).name}:{number}", sft)
                    except BAD_ROW as error:
                        reason = REASONS.get(type(error), type(error).__name__)
                        problem = f"{path}:{number}: {reason}: {error}"
                        if problems is None:
                            raise ValueError(problem) from None
                        problems.append(problem)
                    else:
                        yield row
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}:{number + 1}: broken archive: {error}") from None
        if empty:
            raise ValueError(f"{path}: no rows")


def read_row(line: bytes, name: str, sft: bool | None) -> dict:
    """The row of a line of JSON; `name` is its id if it has none. sft: as in read_rows."""
    row = json.loads(line)
    json.dumps(row, ensure_ascii=False).encode()  # fails on a lone surrogate
    row = normalize(row, name)
    if not sft and (sft is False or row["domain"] != "sft"):
        return checked_row(row)
    if "solutions" not in row:
        raise ValueError("no solution to imitate")
    return row


def normalize(row: dict, name: str) -> dict:
    """Any form of forms.py -> the common one. `name`: the id of a row without one. A null key is an
    absent key."""
    if not isinstance(row, dict):
        raise ValueError(f"not an object but {type(row).__name__}")
    row = without_nulls(row)
    if "responses_create_params" not in row:
        row = gym_form(row)
    params = row["responses_create_params"]
    messages = chat_form(params["input"])
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise ValueError("the prompt must end with a user turn or a tool's result")
    if not 0 <= row.get("pass_rate", 0) <= 1:
        raise ValueError(f"pass_rate {row['pass_rate']} is not within 0 and 1")
    if row.get("id") is None:  # nor does the form's own key say one
        row = row | {"id": row.get("uuid") or row.get("hash_id") or name}
    row = equip(row | {"responses_create_params": params | {"input": messages}})
    return row if "domain" in row else row | {"domain": kind_of(row)}


def conversation(row: dict) -> tuple[list[dict], list[dict] | None]:
    """(messages, tools) of the prompt."""
    params = row["responses_create_params"]
    return params["input"], params.get("tools") or None


def question_of(row: dict) -> str:
    """The text of the prompt's last message."""
    return conversation(row)[0][-1]["content"]


def sft_conversation(row: dict, thinking: bool) -> list[dict]:
    """Prompt and solution, with the thought if `thinking` is set and the row has one."""
    solutions = row["solutions"]
    with_thought = thinking and "on" in solutions
    return conversation(row)[0] + solutions["on" if with_thought else "off"]
