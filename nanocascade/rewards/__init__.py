"""Rewards: verifiers with one signature, `score(row, response) -> Reward(value, reason)`.

The keys of a row (NeMo Gym form) choose its verifier. Three rules hold for all verifiers:
1. The thought is never graded, only the text outside of <think> ... </think>.
2. Every response gets a Reward and never raises; a 0 has a reason. A malformed row raises a
   ValueError that names the row.
3. No model, no device, no config, and no evaluation of model output in this process.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from nanocascade.rewards import choice, code, instruct, math, proof, retrieval, structured, tools
from nanocascade.rewards.base import Reward, read_turn, text_of
from nanocascade.rewards.preference import grade, reference_of, score_group

__all__ = ["Reward", "VERIFIERS", "check_row", "kind_of", "needs_judge", "score", "score_group"]


class Verifier(NamedTuple):
    """keys: the keys of a row of this kind. check(row) raises if it cannot be graded here; it may
    return the row in the form that verify reads. verify(row, message) -> Reward of one answer;
    None if groups are compared (score_group). agents: pattern that the name of the row's server
    must match, if the row has one."""

    keys: set
    check: Callable
    verify: Callable | None
    agents: str = ""


# The first kind that fits is taken.
VERIFIERS = {
    "if": Verifier({"instruction_id_list"}, instruct.check_row, instruct.verify_instructions),
    "mcqa": Verifier({"options"}, choice.check_choice_row, choice.verify_choice),
    "structured": Verifier(
        {"schema_str"}, structured.check_schema_row, structured.verify_structured
    ),
    "tools": Verifier({"ground_truth"}, tools.check_calls_row, tools.verify_calls),
    "proof": Verifier({"formal_statement"}, proof.check_proof_row, proof.verify_proof),
    "swe_agentic": Verifier(
        {"verifier_metadata.files", "environment.repository"}, code.check_files, code.verify_episode
    ),
    "swe": Verifier({"verifier_metadata.files"}, code.check_files, code.verify_repair),
    "code": Verifier({"verifier_metadata.unit_tests"}, code.check_tests, code.verify_program),
    "long_context": Verifier(
        {"problem_type", "expected_answer"},
        retrieval.check_retrieval_row,
        retrieval.verify_retrieval,
        "lc|niah|long|graph|judge",
    ),
    "math": Verifier({"expected_answer"}, math.check_math_row, math.verify_math, "math|gsm8k"),
    "preference": Verifier({"genrm"}, lambda row: None, None),
}
# Keys that some files have in verifier_metadata and others in the row itself.
LIFTED = (
    "instruction_id_list kwargs options expected_answer grading_mode template_metadata"
    " schema_str schema_type response_mode tool_name"
).split()
MALFORMED = (ValueError, TypeError, KeyError, AttributeError, RecursionError, re.error)
MAX_RESPONSE = 2_000_000  # characters of all turns; the report's longest are 256K tokens


def name_of(row):
    """Name of a row in an error: its id if it has one, else its beginning."""
    ids = [row[key] for key in ("id", "uuid", "hash_id", "source_record_id") if key in row]
    return f"row {ids[0]!r}" if ids else f"row without id {str(row)[:80]}..."


def without_nulls(row):
    """The row without null keys, in dictionaries of any depth: a null key is an absent one."""
    if not isinstance(row, dict):
        return row
    return {key: without_nulls(value) for key, value in row.items() if value is not None}


def find_kind(row):
    """The first kind of verifier whose keys a canonical row carries."""
    metadata, environment = (row.get(key) or {} for key in ("verifier_metadata", "environment"))
    agent = str((row.get("agent_ref") or {}).get("name", ""))
    carried = {*row, *(f"verifier_metadata.{key}" for key in metadata)}
    carried.add(f"environment.{environment.get('name')}")
    carried |= {
        key for word, key in (("genrm", "genrm"), ("llm_judge", "problem_type")) if word in agent
    }
    for kind, verifier in VERIFIERS.items():
        if verifier.keys <= carried:
            if agent and not re.search(verifier.agents, agent):
                raise ValueError(f"{name_of(row)} is for {agent!r}, which is no verifier of ours")
            return kind
    raise ValueError(f"{name_of(row)} fits no verifier; its keys are {sorted(row)}")


def canonical(row):
    """The row without null keys, and with the LIFTED keys of its metadata."""
    clean = without_nulls(row)
    metadata = clean.get("verifier_metadata")
    lifted = LIFTED if isinstance(metadata, dict) else []
    return {key: metadata[key] for key in lifted if key in metadata} | clean


def checked_row(row):
    """The row as `verdict` takes it, with its "kind"; ValueError if it cannot be graded here.

    Run when data is read: a missing extra (math-verify, jsonschema, PyYAML) shows before the first
    step of a run.
    """
    objects = isinstance(row, dict) and isinstance(row.get("responses_create_params") or {}, dict)
    if not objects:
        raise ValueError(f"a row and its responses_create_params are objects, got {row!r:.80}")
    clean, kind = canonical(row), ""
    try:
        kind = find_kind(clean)
        clean = VERIFIERS[kind].check(clean) or clean
    except MALFORMED as error:
        if not kind and isinstance(error, ValueError):
            raise
        raise ValueError(f"{name_of(row)} ({kind}): {type(error).__name__}: {error}") from error
    return clean | {"kind": kind}


def check_row(row):
    """The row's kind; ValueError if it cannot be graded here."""
    return checked_row(row)["kind"]


def kind_of(row):
    """The kind of verifier of a row, even if this machine cannot grade it.

    {"options": [...], "expected_answer": "B"} -> "mcqa"; {"expected_answer": "32"} -> "math".
    """
    return find_kind(canonical(row))


def compares_groups(row):
    """Whether the verifier of a checked row compares the responses of a group (score_group)."""
    return VERIFIERS[row["kind"]].verify is None


def needs_judge(row):
    """Whether a checked row needs a judge: for pairs of a group, or an answer and a reference."""
    return compares_groups(row) or reference_of(row) is not None


def score(row, response, *, finished=True, judge=None):
    """`verdict` on a row as it stands in its file."""
    return verdict(checked_row(row), response, finished=finished, judge=judge)


def verdict(row, response, *, finished=True, judge=None):
    r"""Grade one response to a checked row: the text after "<|im_start|>assistant\n", or the list
    of turns.

    finished=False: generation stopped at the length limit. It is a 0 here; whether it then stays in
    the loss is the stage's choice (overlong penalty or filtering). Of several assistant turns the
    last is the answer; tool calls count from all of them, in order. judge: for rows that have a
    reference and no program to compare with it (judge.EndpointJudge).
    """
    kind, judged = row["kind"], reference_of(row) is not None
    if judged and not hasattr(judge, "grade"):
        raise ValueError(f"{name_of(row)}: a {kind} row like this needs a judge")
    verify = VERIFIERS[kind].verify
    if verify is None:
        raise ValueError(f"{name_of(row)}: {kind} rows are scored in groups, by score_group")
    if not finished:
        return Reward(0.0, "cut off")
    alone = isinstance(response, str)
    turns = [response] if alone else [turn for turn in response if turn["role"] == "assistant"]
    if sum(len(text_of(turn)) for turn in turns) > MAX_RESPONSE:
        return Reward(0.0, "response too long")
    declared = (row.get("responses_create_params") or {}).get("tools")
    messages = [read_turn(turn, declared) for turn in turns]
    if not messages or any(message["unfinished"] for message in messages):
        return Reward(0.0, "unfinished thought" if messages else "no response")
    if judged:
        reason = kind == "swe" and code.repaired(row, messages[-1])[1]  # what applies nowhere
        return Reward(0.0, reason) if reason else grade(row, messages[-1]["content"], judge)
    calls = [call for message in messages for call in message["tool_calls"]]
    texts = [message["content"] for message in messages]
    return verify(row, {**messages[-1], "tool_calls": calls, "texts": texts})
