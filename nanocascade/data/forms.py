"""Common forms of rows, converted to NeMo Gym's form. docs/data.md shows a row of each.

{question | problem, answer | solution | expected_answer}    math; refused without a final answer
{messages, expected_answer}                                  math, the prompt as a chat
{messages} that end with the assistant's answer              sft
{question, choices, answer}                                  mcqa
{prompt, instruction_id_list, kwargs}       (IFEval)         if
{prompt, entry_point, test}                 (HumanEval)      code
{text, code, test_list}                     (MBPP)           code
"""

import json
import re

from nanocascade.rewards.math import BOX, last_boxed
from nanocascade.tokenizer.chat import split_thought
from nanocascade.tokenizer.messages import chat_form

BOXED = "\n\nReason step by step and put the final answer inside \\boxed{}."
LETTER = "\n\nPut the letter of the right option inside \\boxed{}."
PROGRAM = "\n\nAnswer with the whole program in one ```python block."
QUESTIONS = ("question", "problem", "prompt", "query", "instruction")
STATED = re.compile(
    r"(?i)\b(?:final\s+)?answer(?:\s+is|\s*:|\s*=)[\s:]*(?P<answer>[^\n]{1,200}?)[.\s]*(?:\n|$)"
)
MAX_FINAL = 80  # maximum characters of an answer without \boxed{}, ####, ...


def gym_form(row: dict) -> dict:
    """Convert a row of one of the forms above to Gym's form. Raises ValueError for others."""
    keys = row.keys()
    if "messages" in keys:
        return from_chat(row)
    if keys >= {"prompt", "instruction_id_list"}:
        return asking(row, row["prompt"], id=row.get("id", row.get("key")))
    if keys >= {"entry_point", "test", "prompt"}:
        if "def check(" not in row["test"]:
            raise ValueError("the test must define check(candidate)")
        tests = [row["test"], f"check({row['entry_point']})"]
        text = f"Complete this function.\n\n```python\n{row['prompt']}\n```{PROGRAM}"
        return program(row, text, tests, row["prompt"] + row.get("canonical_solution", ""))
    if "test_list" in keys:
        tests = list(row["test_list"])
        shown = "\n".join(tests)
        text = f"{row.get('text') or row['prompt']}\n\nYour program must pass these tests:\n\n"
        setup = "\n".join(row.get("test_imports", ())) or row.get("test_setup_code")
        return program(row, text + shown + PROGRAM, [setup, *tests] if setup else tests)
    question = next((row[key] for key in QUESTIONS if isinstance(row.get(key), str)), None)
    if question is not None and keys & {"choices", "options"}:
        return from_choices(row, question)
    if question is not None and keys & {"answer", "solution", "expected_answer"}:
        return from_question(row, question)
    raise ValueError(
        f"no responses_create_params, no messages, no question with an answer: {[*row]}"
    )


def without(row: dict, *keys: str) -> dict:
    return {key: value for key, value in row.items() if key not in keys}


def asking(row: dict, text: str, answer: str | None = None, work: str | None = None, **fields):
    """The row with a prompt of one turn, more fields and, if there is an answer, solutions to
    imitate: the work is the thought ("on"), or is written before the answer ("off")."""
    prompt = {"responses_create_params": {"input": [{"role": "user", "content": text}]}}
    solutions = {}
    if answer is not None:
        turn = {"role": "assistant", "content": answer}
        solutions["off"] = [turn | {"content": f"{work or ''}\n{answer}".strip()}]
        if work is not None:
            solutions["on"] = [turn | {"reasoning_content": work}]
        solutions = {"solutions": solutions}
    return solutions | row | prompt | fields


def program(row: dict, text: str, tests: list[str], gold: str | None = None) -> dict:
    """A row of a program and test code. gold: a right program (default: the row's)."""
    gold = gold or row.get("code")
    answer = f"```python\n{gold.strip()}\n```" if gold else None
    read = ("prompt", "text", "test", "test_list", "code", "canonical_solution", "task_id")
    metadata = {"unit_tests": {"asserts": tests}}
    fields = {"id": row.get("task_id"), "verifier_metadata": metadata}
    return asking(without(row, *read), text, answer, **fields)


def from_question(row: dict, question: str) -> dict:
    """Mathematics: "3+4 = <<3+4=7>>7\\n#### 7" (GSM8K) is the worked solution and 7."""
    final, work = final_answer(row)
    work = re.sub(r"<<[^>]*>>", "", work).strip()  # GSM8K's notes for its calculator
    text = question if BOX in question else question + BOXED
    answer = f"\\boxed{{{final}}}"
    return asking(without(row, "answer"), text, answer, work or None, expected_answer=final)


def final_answer(row: dict) -> tuple[str, str]:
    """(the final answer, the work before it) of a row; ValueError if no final answer is marked.

    A whole solution is never the expected answer. The final answer is the last \\boxed{}, the text
    after #### or "the answer is", or the whole text if that is short.
    """
    short, text = row.get("expected_answer"), row.get("answer", row.get("solution", ""))
    if short is None and "solution" in row:
        short, text = row.get("answer"), row["solution"]
    if isinstance(text if short is None else short, list | dict):
        raise ValueError(f"the answer is not one text or number: {short or text!r:.80}")
    text = str(text).strip()
    work, final = split_answer(text)
    if short is not None and str(short).strip():
        final = split_answer(str(short))[1]
        work = work or ("" if text == final else text)
    if not final:
        raise ValueError(
            f"no final answer found in {short or text!r:.80}: it must stand in \\boxed{{}}, after"
            ' ####, after "the answer is", or alone'
        )
    return final, work


def split_answer(text: str) -> tuple[str, str | None]:
    """(work, final answer or None): "It is 5+2.\\nThe answer is 7." -> ("It is 5+2.", "7")."""
    text = text.strip()
    work, mark, final = text.rpartition("####")
    if mark and final:
        return work.strip(), final.strip()
    if BOX in text:
        return text, last_boxed(text)[0]
    if stated := list(STATED.finditer(text)):
        final = stated[-1]["answer"].strip().strip("*$").strip()
        return text[: stated[-1].start()].strip(), final
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", text)
    if text and "\n" not in text and len(text) <= MAX_FINAL and len(words) <= 4:
        return "", text.rstrip(".")
    return text, None


def from_choices(row: dict, question: str) -> dict:
    """Multiple choice. Choices are texts, {"text": [...], "label": [...]}, {label: text} or a list
    of such; the answer is a label, a letter, the text itself, or an index from 0."""
    choices, labels = row.get("choices", row.get("options")), []
    if isinstance(choices, list) and all(isinstance(x, dict) for x in choices):
        choices = {label: text for x in choices for label, text in x.items()}
    if isinstance(choices, dict):
        if "text" not in choices:
            choices = {"text": [*choices.values()], "label": [*choices]}
        choices, labels = choices["text"], choices.get("label", [])
    letters = [chr(ord("A") + i) for i in range(len(choices))]
    answer = row.get("answer", row.get("answerKey"))
    places = [known.index(answer) for known in (labels, letters, choices) if answer in known]
    place = places[0] if places else answer
    if type(place) is not int or not 0 <= place < len(choices):
        raise ValueError(f"answer {answer!r} is none of the choices {choices!r:.200}")
    options = [{letter: str(text)} for letter, text in zip(letters, choices, strict=True)]
    shown = "\n".join(f"{letter}: {text}" for x in options for letter, text in x.items())
    return asking(
        without(row, "answer", "choices", "options"),
        f"{question}\n{shown}{LETTER}",
        f"\\boxed{{{letters[place]}}}",
        options=options,
        expected_answer=letters[place],
        grading_mode="lenient_boxed",
    )


def from_chat(row: dict) -> dict:
    """A chat in OpenAI's form. If it ends with the assistant's answer, what follows the last user
    turn is imitated; without an expected answer it must."""
    messages, tools = chat_form(row["messages"]), row.get("tools")
    if isinstance(tools, str):  # some files have a JSON string
        tools = json.loads(tools)
    graded, fields, end = "expected_answer" in row, without(row, "messages", "tools"), len(messages)
    answered = messages and messages[-1]["role"] == "assistant"
    if answered or not graded:
        end = max((i for i, x in enumerate(messages, 1) if x["role"] == "user"), default=0)
        if not end or not answered:
            raise ValueError("messages must hold a user turn and end with the assistant's answer")
        fields |= {"solutions": chat_solutions(messages[end:])}
    if not graded:
        fields = {"domain": "sft"} | fields
    return fields | {"responses_create_params": {"input": messages[:end], "tools": tools}}


def chat_solutions(turns: list[dict]) -> dict:
    """{"on": turns with their thoughts, "off": without}, or "off" alone if they have none."""
    thought, answer, unfinished = split_thought(turns[-1]["content"])
    if unfinished or not answer.strip() and not turns[-1].get("tool_calls"):
        raise ValueError(f"the last answer is {'cut in its thought' if unfinished else 'empty'}")
    # A thought may also stand in the content, in tags.
    off = [
        without(turn, "reasoning_content") | {"content": split_thought(turn["content"])[1]}
        for turn in turns
    ]
    return {"on": turns, "off": off} if turns != off else {"off": off}
