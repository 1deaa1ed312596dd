"""Rewards: one folder, one signature. `score(row, response) -> Reward(value, reason)`.

A row's verifier is chosen by what the row carries (NeMo Gym form). Three rules
hold for all of them:
1. The thought is never graded: only what follows `</think>` can earn anything.
2. A response may be anything, so it gets a Reward and never an exception; a 0 has a reason. A row
   comes from somebody's file, so a malformed one is a ValueError that names it.
3. No model, no device, no config, and no evaluation of model output in this process.
"""

import re

from nanocascade.rewards import choice, code, instruct, math, proof, retrieval, structured, tools
from nanocascade.rewards.base import Reward
from nanocascade.rewards.preference import grade, reference_of, score_group
from nanocascade.tokenizer.chat import THINK, THINK_END, parse_response

__all__ = ["Reward", "VERIFIERS", "check_row", "kind_of", "needs_judge", "score", "score_group"]

# kind -> (what a row of it carries, function (row, message) -> Reward with the message that
# parse_response returns and the calls and texts of all turns, function (row) that raises for what
# cannot be graded on this machine).
# Of several kinds that fit, the first. Preference rows are compared in groups, by score_group.
VERIFIERS = {
    "if": ({"instruction_id_list"}, instruct.verify_instructions, instruct.check_row),
    "mcqa": ({"options"}, choice.verify_choice, choice.check_choice_row),
    "structured": ({"schema_str"}, structured.verify_structured, structured.check_schema_row),
    "tools": ({"ground_truth"}, tools.verify_calls, tools.check_calls_row),
    "proof": ({"formal_statement"}, proof.verify_proof, proof.check_proof_row),
    "swe_agentic": (
        {"verifier_metadata.files", "environment.repository"},
        code.verify_episode,
        code.check_files,
    ),
    "swe": ({"verifier_metadata.files"}, code.verify_repair, code.check_files),
    "code": ({"verifier_metadata.unit_tests"}, code.verify_program, code.check_tests),
    "long_context": (
        {"problem_type", "expected_answer"},
        retrieval.verify_retrieval,
        retrieval.check_retrieval_row,
    ),
    "math": ({"expected_answer"}, math.verify_math, math.check_math_row),
    "preference": ({"genrm"}, None, None),
}
MALFORMED = (ValueError, TypeError, KeyError, AttributeError, re.error)  # what a bad row leads to
MAX_RESPONSE = 2_000_000  # characters of all turns; the report's longest are 256K tokens


def name_of(row):
    """What an error calls a row: its id where it has one, else its beginning."""
    ids = [row[key] for key in ("id", "uuid", "hash_id", "source_record_id") if key in row]
    return f"row {ids[0]!r}" if ids else f"row without id {str(row)[:80]}..."


def kind_of(row):
    """Which verifier a row asks for.

    {"options": [...], "expected_answer": "B"} -> "mcqa"; {"expected_answer": "32"} -> "math".
    """
    carried = {*row, *(f"verifier_metadata.{key}" for key in row.get("verifier_metadata") or ())}
    agent = str((row.get("agent_ref") or {}).get("name"))
    if "genrm" in agent:
        carried.add("genrm")
    carried.add(f"environment.{(row.get('environment') or {}).get('name')}")
    if "llm_judge" in agent:  # a question about the long text before it
        carried.add("problem_type")
    for kind, (needed, _, _) in VERIFIERS.items():
        if needed <= carried:
            return kind
    raise ValueError(f"{name_of(row)} fits no verifier; its keys are {sorted(row)}")


def read_turn(text, tools=None):
    """What parse_response returns of a turn, without thoughts that come late, again or nested.

    "So. <think>\\boxed{4}</think> It is 5." -> "So.  It is 5."; what stands before a </think> that
    closes nothing was a thought too.
    """
    tags = list(re.finditer(f"{THINK}|{THINK_END}", text))
    if [x[0] for x in tags] in ([], [THINK, THINK_END]) and text.lstrip().startswith(THINK) == bool(
        tags
    ):
        return parse_response(text, tools)
    kept, depth, start = [], 0, 0
    for tag in tags:
        if depth == 0:
            kept = [*kept, text[start : tag.start()]] if tag[0] == THINK else []
        depth = depth + 1 if tag[0] == THINK else max(depth - 1, 0)
        start = tag.end()
    message = parse_response("".join([*kept, text[start:]]).lstrip("\n"), tools)
    return message | {"unfinished": depth > 0}


def needs_judge(row):
    """Whether no program can tell: pairs of a group, and answers beside a reference."""
    return kind_of(row) == "preference" or reference_of(row) is not None


def check_row(row):
    """The row's kind; ValueError if it cannot be graded here. Run when data is read: a missing
    extra (math-verify, jsonschema, PyYAML) shows before the first step of a run."""
    kind = kind_of(row)
    try:
        if check := VERIFIERS[kind][2]:
            check(row)
    except MALFORMED as error:
        raise ValueError(f"{name_of(row)} ({kind}): {type(error).__name__}: {error}") from error
    return kind


def score(row, response, *, finished=True, judge=None):
    r"""Grade one response: the text after "<|im_start|>assistant\n", or the list of turns.

    finished=False: generation stopped at the length limit. It is a 0 here; whether it then stays in
    the loss is the stage's choice (overlong penalty or filtering). Of several assistant turns the
    last is the answer; tool calls count from all of them, in order. judge: for rows that have a
    reference and no program to compare with it (preference.EndpointJudge).
    """
    kind, judged = check_row(row), reference_of(row) is not None
    if judged and not hasattr(judge, "grade"):
        raise ValueError(f"{name_of(row)}: a {kind} row like this needs a judge")
    verify = VERIFIERS[kind][1]
    if verify is None:
        raise ValueError(f"{name_of(row)}: {kind} rows are scored in groups, by score_group")
    if not finished:
        return Reward(0.0, "cut off")
    turns = [{"role": "assistant", "content": response}] if isinstance(response, str) else response
    if sum(len(turn["content"]) for turn in turns) > MAX_RESPONSE:
        return Reward(0.0, "response too long")
    declared = (row.get("responses_create_params") or {}).get("tools")
    said = [read_turn(x["content"], declared) for x in turns if x["role"] == "assistant"]
    if not said or any(message["unfinished"] for message in said):
        return Reward(0.0, "unfinished thought" if said else "no response")
    if judged:
        reason = kind == "swe" and code.repaired(row, said[-1])[1]  # what applies nowhere
        return Reward(0.0, reason) if reason else grade(row, said[-1]["content"], judge)
    calls = [call for message in said for call in message["tool_calls"]]
    texts = [message["content"] for message in said]
    return verify(row, {**said[-1], "tool_calls": calls, "texts": texts})
