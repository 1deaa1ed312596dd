"""Rows of data: read from JSONL, brought to one form, drawn in a fixed order, packed.

The form is NeMo Gym's, whatever the file held, plus what SFT imitates:

    {"id": ..., "domain": "math", "responses_create_params": {"input": [messages], "tools": [...]},
     ...what the verifier needs..., "solutions": {"on": [messages], "off": [messages]}}

on / off: with the thought and without it. A row without a verifier (chat data) has domain "sft".
`python -m nanocascade.data ROWS.jsonl` says what a file holds and which rows cannot be used.
"""

import bisect
import gzip
import json
import math
import random
import re
import zlib
from collections import Counter, defaultdict
from functools import lru_cache
from pathlib import Path

from nanocascade.checkpoint.state import read_text
from nanocascade.environments.loop import equip
from nanocascade.rewards import check_row, kind_of
from nanocascade.tokenizer.chat import split_thought

BOXED = "\n\nReason step by step and put the final answer inside \\boxed{}."


def read_rows(paths, sft: bool | None = False, problems: list[str] | None = None):
    """Yield the rows of JSONL files (.gz too) one by one, checked and in the form above.

    sft=True asks for a solution to imitate, False for a verifier that works on this machine, None
    for either. A row that will not do is a ValueError "file:line: why", or an entry of `problems`.
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
    """(row, "") of a line, (None, "") of a blank one, or (None, what is wrong with it)."""
    try:
        if not line.strip():
            return None, ""
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # fails on half a character
        row = normalize(row, name)
        if not sft and (sft is False or row["domain"] != "sft"):
            check_row(row)
        elif "solutions" not in row:
            raise ValueError("no solution to imitate")
        return row, ""
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        names = {json.JSONDecodeError: "not JSON", KeyError: "missing field", ValueError: "bad row"}
        return None, f"{names.get(type(error), type(error).__name__)}: {error}"


def normalize(row: dict, name: str) -> dict:
    """Any of the three forms -> the common one. `name` is the id of a row that has none."""
    if not isinstance(row, dict):
        raise ValueError(f"not an object but {type(row).__name__}")
    if "messages" in row and "responses_create_params" not in row:
        row = from_messages(row)
    elif row.keys() & {"answer", "expected_answer"} and "responses_create_params" not in row:
        row = from_question(row)
    elif "responses_create_params" not in row:
        raise ValueError(f"no responses_create_params, messages, question and answer: {[*row]}")
    messages = conversation(row)[0]
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise ValueError("the prompt must end with a user turn or a tool's result")
    if not 0 <= row.get("pass_rate", 0) <= 1:
        raise ValueError(f"pass_rate {row['pass_rate']} is not within 0 and 1")
    row = {"id": row.get("uuid") or row.get("hash_id") or name} | equip(row)
    return row if "domain" in row else row | {"domain": kind_of(row)}


def from_messages(row: dict) -> dict:
    """OpenAI chat form: what follows the last user turn is the solution."""
    messages, tools = chat_form(row["messages"]), row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools  # some files quote them
    last = max((i for i, x in enumerate(messages) if x["role"] == "user"), default=-1) + 1
    if last == 0 or messages[-1]["role"] != "assistant":
        raise ValueError("messages must hold a user turn and end with the assistant's answer")
    on = messages[last:]
    off = [
        {
            key: split_thought(x)[1] if key == "content" else x  # it may stand there, in its tags
            for key, x in message.items()
            if key != "reasoning_content"
        }
        for message in on
    ]
    row = {"domain": "sft"} | {key: row[key] for key in row if key not in ("messages", "tools")}
    return row | {
        "solutions": {"on": on, "off": off} if on != off else {"off": off},
        "responses_create_params": {"input": messages[:last], "tools": tools},
    }


def from_question(row: dict) -> dict:
    """{question, answer}, as in GSM8K: "3+4 = <<3+4=7>>7\\n#### 7" is the worked solution and 7;
    an answer without #### is the solution, where there is an expected_answer, or else final."""
    answer, expected = (row.get(key) for key in ("answer", "expected_answer"))
    work, marked, final = str(expected if answer is None else answer).rpartition("####")
    if not marked and expected is not None and final.strip() != str(expected).strip():
        work, final = final, str(expected)
    work = re.sub(r"<<[^>]*>>", "", work).strip()  # GSM8K's notes for its calculator
    final, prompt = final.strip(), {"role": "user", "content": row["question"] + BOXED}
    boxed = {"role": "assistant", "content": f"\\boxed{{{final}}}"}
    off = [boxed | {"content": f"{work}\n{boxed['content']}".strip()}]
    on = {"on": [boxed | {"reasoning_content": work}]} if work else {}
    return {
        "expected_answer": final,
        "solutions": {**on, "off": off},
        **row,
        "responses_create_params": {"input": [prompt]},
    }


def read_references(path: str) -> dict[str, list[str]]:
    """{question: stored answers} that preference answers are compared with, of the SFT run."""
    found: dict[str, list[str]] = {}
    lines = read_text(path).rstrip("\n").split("\n") if path else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            found.setdefault(record["question"], []).append(record["answer"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}:{number}: no question and answer: {error!r}") from None
    return found


def chat_form(items) -> list[dict]:
    """Messages whose content is one string, from such messages, ones in text parts, or a string."""
    messages = []
    for item in [{"role": "user", "content": items}] if isinstance(items, str) else items:
        role = {"developer": "system"}.get(item.get("role"), item.get("role"))
        if role not in ("system", "user", "assistant", "tool"):
            raise ValueError(f"a message of role {role!r} and type {item.get('type')!r}")
        content = item.get("content") or ""
        if role == "user" and item.get("content") is None:
            raise ValueError("a user's message has no content")
        if not isinstance(content, str):  # parts, which must be text: an image has no such key
            content = "".join(part["text"] for part in content)
        messages.append({**item, "role": role, "content": content})
    return messages


def conversation(row: dict) -> tuple[list[dict], list[dict] | None]:
    """(messages, tools) of the prompt, in chat form."""
    params = row["responses_create_params"]
    return chat_form(params["input"]), params.get("tools") or None


def sft_conversation(row: dict, thinking: bool) -> list[dict]:
    """Prompt and solution; a row that has no thought gives its answer without one."""
    solutions = {"on": row["solutions"]["off"]} | row["solutions"]
    return conversation(row)[0] + solutions["on" if thinking else "off"]


@lru_cache(16)
def shuffled(num: int, seed: str) -> list[int]:
    order = list(range(num))
    random.Random(seed).shuffle(order)
    return order


class PromptStream:
    """An endless, deterministic order of prompts: a new shuffle of the rows every epoch.

    weights: {domain: share} (multi-domain RL: 55/30/15) holds in every batch by largest remainder,
    and what rounding took from a domain comes back in the next; each domain has its own epochs.

    curriculum (first mean, last mean, std): instead of epochs, draws whose `pass_rate` is Gaussian,
    around a mean that moves with `progress` from 0 to 1.
    """

    def __init__(
        self,
        rows: list[dict],
        seed: int,
        weights: dict[str, float] | None = None,
        curriculum: tuple[float, ...] = (),
    ):
        self.rows, self.seed, self.curriculum, self.progress = rows, seed, curriculum, 0.0
        if curriculum and (len(curriculum) != 3 or curriculum[2] <= 0):
            raise ValueError(f"--curriculum {curriculum}: expected first mean, last mean, std")
        if curriculum and (lacking := [x for x in rows if "pass_rate" not in x]):
            raise ValueError(
                f"--curriculum: row {lacking[0]['id']} has no pass_rate, as"
                " sample.py --tasks ROWS --pass_rates OUT writes it"
            )
        self.members = defaultdict(list)  # domain -> indices of its rows
        for i, row in enumerate(rows):
            self.members[row["domain"] if weights else "all"].append(i)
        weights = weights or {"all": 1.0}
        if not weights.keys() <= self.members.keys() or min(weights.values()) <= 0:
            raise ValueError(f"{len(rows)} rows of {[*self.members]} cannot be drawn by {weights}")
        self.shares = {domain: x / sum(weights.values()) for domain, x in weights.items()}
        self.taken = dict.fromkeys(weights, 0)

    def take(self, n: int) -> list[tuple[int, dict]]:
        """The next n of (position in the stream, row)."""
        drawn, end, chances = [], sum(self.taken.values()) + n, {}
        if self.curriculum:
            first, last, std = self.curriculum
            mean = first + (last - first) * self.progress
            chances = {
                domain: curriculum_weights([self.rows[i]["pass_rate"] for i in x], mean, std)
                for domain, x in self.members.items()
            }
        for position in range(end - n, end):
            domain = max(self.shares, key=lambda x: self.shares[x] * end - self.taken[x])
            members = self.members[domain]
            epoch, place = divmod(self.taken[domain], len(members))
            if chances:
                draw = random.Random(f"{self.seed} {domain} {self.taken[domain]}")
                chosen = draw.choices(members, chances[domain])[0]
            else:
                chosen = members[shuffled(len(members), f"{self.seed} {domain} {epoch}")[place]]
            drawn.append((position, self.rows[chosen]))
            self.taken[domain] += 1
        return drawn

    def state(self) -> dict:
        return {"taken": dict(self.taken), "rows": len(self.rows), "seed": self.seed}

    def load_state(self, state: dict) -> None:
        if state | {"taken": set(state["taken"])} != self.state() | {"taken": set(self.taken)}:
            raise ValueError(f"the run drew from other data: {state}, these are {self.state()}")
        self.taken = dict(state["taken"])


def curriculum_weights(pass_rates: list[float], mean: float, std: float) -> list[float]:
    """Probabilities of rows whose draws have Gaussian pass rates (Nemotron 3 Nano's curriculum).

    Rows of one rate share the Gaussian's value there: [1, 1, 0], 0.5, 1 -> [0.25, 0.25, 0.5].
    """
    alike = Counter(pass_rates)
    logs = {rate: -0.5 * ((rate - mean) / std) ** 2 for rate in alike}
    largest = max(logs.values())  # taken off, so that a mean far from every rate still works
    values = {rate: math.exp(log - largest) for rate, log in logs.items()}
    total = sum(values.values())
    return [values[rate] / total / alike[rate] for rate in pass_rates]


def pack(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices of documents that share a row of at most `budget` tokens, by best fit, longest first:
    [5, 3, 6, 2], 8 -> [[2, 3], [0, 1]]."""
    rows, room = defaultdict(list), []  # room: (tokens left, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[i] > budget:
            raise ValueError(f"document {i} has {lengths[i]} tokens, a row takes {budget}")
        place = bisect.bisect_left(room, (lengths[i], -1))
        left, row = room.pop(place) if place < len(room) else (budget, len(rows))
        rows[row].append(i)
        bisect.insort(room, (left - lengths[i], row))
    return list(rows.values())
