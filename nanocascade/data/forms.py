"""Common forms of rows, converted to NeMo Gym's form. docs/data.md shows a row of each.

{question | problem, answer | solution | expected_answer}    math; refused without a final answer
{messages, expected_answer}                                  math, the prompt as a chat
{question, choices, answer}                                  mcqa
{prompt, instruction_id_list, kwargs}       (IFEval)         if
{prompt, entry_point, test}                 (HumanEval)      code
{text, code, test_list}                     (MBPP)           code
"""

import re

from nanocascade.rewards.math import BOX, last_boxed

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
    if "messages" in row:
        return from_chat(row)
    question = next((row[key] for key in QUESTIONS if isinstance(row.get(key), str)), None)
    if row.keys() >= {"prompt", "instruction_id_list"}:
        return asking(row, row["prompt"], id=row.get("id", row.get("key")))
    if row.keys() >= {"entry_point", "test", "prompt"}:
        tests = [row["test"], f"check({row['entry_point']})"]
        text = f"Complete this function.\n\n```python\n{row['prompt']}\n```{PROGRAM}"
        return program(row, text, tests, row["prompt"] + (row.get("canonical_solution") or ""))
    if "test_list" in row:
        text = row.get("text") or row["prompt"]
        tests = list(row["test_list"])
        setup = "\n".join(row.get("test_imports") or []) or row.get("test_setup_code") or ""
        shown = "\n".join(tests)
        text = f"{text}\n\nYour program must pass these tests:\n\n{shown}{PROGRAM}"
        return program(row, text, [setup, *tests] if setup else tests, row.get("code"))
    if question is not None and row.keys() & {"choices", "options"}:
        return from_choices(row, question)
    if question is not None and row.keys() & {"answer", "solution", "expected_answer"}:
        return from_question(row, question)
    raise ValueError(
        f"no responses_create_params, no messages, no question with an answer: {[*row]}"
    )


def asking(row: dict, text: str, answer: str | None = None, work: str = "", **fields) -> dict:
    """The row with a prompt of one turn and, if there is an answer to imitate, its solutions."""
    params = {"input": [{"role": "user", "content": text}]}
    fields = {key: value for key, value in fields.items() if value is not None}
    solutions = {"solutions": solution(answer, work)} if answer is not None else {}
    return {**fields, **solutions, **row, "responses_create_params": params, **fields}


def solution(answer: str, work: str) -> dict:
    """What SFT imitates: the work as a thought ("on"), or written before the answer ("off")."""
    turn = {"role": "assistant", "content": answer}
    off = [turn | {"content": f"{work}\n{answer}".strip()}]
    return {"on": [turn | {"reasoning_content": work}], "off": off} if work else {"off": off}


def program(row: dict, text: str, tests: list[str], gold: str | None) -> dict:
    """A row of a program and test code."""
    read = ("prompt", "text", "test", "test_list", "code", "canonical_solution", "task_id")
    rest = {key: value for key, value in row.items() if key not in read}
    answer = f"```python\n{gold.strip()}\n```" if gold else None
    metadata = {"unit_tests": {"asserts": tests}}
    return asking(rest, text, answer, id=row.get("task_id"), verifier_metadata=metadata)


def from_question(row: dict, question: str) -> dict:
    """Mathematics: "3+4 = <<3+4=7>>7\\n#### 7" (GSM8K) is the worked solution and 7."""
    final, work = final_answer(row)
    work = re.sub(r"<<[^>]*>>", "", work).strip()  # GSM8K's notes for its calculator
    row = {key: value for key, value in row.items() if key != "answer"}
    text = question if BOX in question else question + BOXED
    return asking(row, text, f"\\boxed{{{final}}}", work, expected_answer=final)


def final_answer(row: dict) -> tuple[str, str]:
    """(the final answer, the work before it) of a row; ValueError if no final answer is marked.

    A whole solution is never the expected answer. The final answer is the last \\boxed{}, the text
    after #### or "the answer is", or the whole text if that is short.
    """
    short, long = row.get("expected_answer"), row.get("solution")
    text = row.get("answer")
    if short is None and long is not None:
        short, text = text, long
    elif text is None:
        text = long
    text = "" if text is None else str(text)
    work, final = split_answer(text)
    if short is not None and str(short).strip():
        given, inside = split_answer(str(short))
        final = inside or str(short).strip()
        if given and not inside:
            raise ValueError(f"no final answer found in {str(short)!r:.80}")
        return final, work or ("" if text.strip() == final else text.strip())
    if final is None:
        raise ValueError(
            f"no final answer found in {text!r:.80}: it must stand in \\boxed{{}}, after ####,"
            ' after "the answer is", or alone'
        )
    return final, work


def split_answer(text: str) -> tuple[str, str | None]:
    """(work, final answer or None): "It is 5+2.\\nThe answer is 7." -> ("It is 5+2.", "7")."""
    text = text.strip()
    work, mark, final = text.rpartition("####")
    if mark and final.strip():
        return work.strip(), final.strip()
    if BOX in text:
        final = last_boxed(text)[0]
        return text, final
    if stated := list(STATED.finditer(text)):
        final = stated[-1]["answer"].strip().strip("*$").strip()
        return text[: stated[-1].start()].strip(), final
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", text)
    if text and "\n" not in text and len(text) <= MAX_FINAL and len(words) <= 4:
        return "", text.rstrip(".")
    return text, None


def from_choices(row: dict, question: str) -> dict:
    """Multiple choice: choices are texts, or {"text": [...], "label": [...]}; the answer is a
    letter, an index from 0, or the text itself."""
    choices = row.get("choices", row.get("options"))
    labels = None
    if isinstance(choices, dict) and "text" in choices:
        choices, labels = choices["text"], choices.get("label")
    elif isinstance(choices, dict):
        labels, choices = [*choices], [*choices.values()]
    elif all(isinstance(x, dict) for x in choices):
        labels = [key for x in choices for key in x]
        choices = [text for x in choices for text in x.values()]
    letters = [chr(ord("A") + i) for i in range(len(choices))]
    answer = row.get("answer", row.get("answerKey"))
    for known in (labels or [], letters, choices):
        if answer in known:
            place = [*known].index(answer)
            break
    else:
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise ValueError(f"answer {answer!r} is none of the choices {choices!r:.200}")
        place = answer
    shown = "\n".join(f"{a}: {text}" for a, text in zip(letters, choices, strict=True))
    row = {key: x for key, x in row.items() if key not in ("answer", "choices", "options")}
    return asking(
        row,
        f"{question}\n{shown}{LETTER}",
        f"\\boxed{{{letters[place]}}}",
        options=[{a: str(text)} for a, text in zip(letters, choices, strict=True)],
        expected_answer=letters[place],
        grading_mode="lenient_boxed",
    )


def from_chat(row: dict) -> dict:
    """{messages, expected_answer}: a chat that ends with the question. Its other forms, which end
    with an answer to imitate, are read by rows.from_messages."""
    rest = {key: x for key, x in row.items() if key not in ("messages", "tools")}
    params = {"input": row["messages"], "tools": row.get("tools")}
    return {**rest, "responses_create_params": params}
