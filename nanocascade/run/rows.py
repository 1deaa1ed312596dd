"""The rows of a run, read or generated, and their checks before training starts."""

import json
from collections import defaultdict
from functools import cached_property

from nanocascade.data.episode import Document, Sampling
from nanocascade.data.rows import (
    conversation,
    question_of,
    read_rows,
    sft_conversation,
)
from nanocascade.engine.distributed import Dist
from nanocascade.files import read_text
from nanocascade.rewards import compares_groups
from nanocascade.run.settings import TOY, EvalSettings, RunSettings
from nanocascade.sandbox.sandbox import shared_sandbox
from nanocascade.stages import RL, SFT
from nanocascade.tokenizer.tokenizer import Tokenizer
from nanocascade.toy import tasks


def read_training_rows(settings: RunSettings, stage: str, domains, dist: Dist) -> list[dict]:
    """The rows of --data that the stage trains on, or generated ones of its domains."""
    if settings.data == (TOY,):
        # Each stage draws its own problems.
        options = settings.toy_rows, "train", f"{settings.seed} {stage}", stage == "sft"
        return [row for domain in domains for row in tasks.make_rows(domain, *options)]
    if stage == "sft":
        return list(read_rows(settings.data, sft=True))
    rows = list(read_rows(settings.data))
    present = {row["domain"] for row in rows}
    if not present & set(domains):
        raise ValueError(f"stage {stage} trains {tuple(domains)}; --data holds {present}")
    if (others := sorted(present - set(domains))) and dist.is_main:
        print("not used, since this stage does not train them: rows of", ", ".join(others))
    return [row for row in rows if row["domain"] in domains]


def read_eval_rows(settings: EvalSettings, domains) -> dict[str, list[dict]]:
    """Held-out rows by domain: --own_eval_samples of `domains`, --eval_samples of the others."""

    def limit(domain: str) -> int:
        return settings.own_eval_samples if domain in domains else settings.eval_samples

    if settings.eval_data == (TOY,):
        names = [d for d in dict.fromkeys((*tasks.DOMAINS, *domains)) if limit(d)]
        return {d: tasks.make_rows(d, limit(d), "test", 0) for d in names}
    rows: dict[str, list[dict]] = {}
    for row in read_rows(settings.eval_data):
        domain = row["domain"]
        if len(rows.get(domain, ())) < limit(domain):
            rows.setdefault(domain, []).append(row)
    return rows


# ---- Lengths -------------------------------------------------------------------------------------


def check_prompts(rows: list[dict], tokenizer: Tokenizer, sampling: Sampling, context: int) -> None:
    """Raise ValueError for a prompt that is too long: all new tokens must fit in the model's
    context or, with --max_tokens, at least one token within that limit."""
    limit, new_tokens, name = context, sampling.max_new_tokens, "the model's context"
    if sampling.max_tokens > context:
        raise ValueError(f"--max_tokens {sampling.max_tokens}: the model's context is {context}")
    if sampling.max_tokens:
        limit, new_tokens, name = sampling.max_tokens, 1, "--max_tokens"
    for row in rows:
        prompt = (*conversation(row), sampling.thinking, True)
        if num_bytes(row, tokenizer, *prompt) + new_tokens > limit:
            check_size(row, len(tokenizer.render(*prompt)[0]), new_tokens, limit, name)


def check_conversations(rows: list[dict], tokenizer: Tokenizer, recipe: SFT) -> None:
    """Raise ValueError for an SFT row that is too long, with or without its thought, in the forms
    that training may draw."""
    share, limit = recipe.strip_thinking, recipe.row_tokens
    forms = {x and tokenizer.thinks for x in (share < 1, share == 0)}
    for row in rows:
        for thinking in forms:
            if num_bytes(row, tokenizer, *sft_arguments(row, thinking)) > limit:
                sft_document(row, tokenizer, thinking, limit)


def sft_document(row: dict, tokenizer: Tokenizer, thinking: bool, row_tokens: int) -> Document:
    """A conversation as ids and loss mask, up to the last token that carries loss."""
    ids, mask = tokenizer.render(*sft_arguments(row, thinking))
    size = max((i for i, has_loss in enumerate(mask, 1) if has_loss), default=0)
    check_size(row, size, 0, row_tokens, "--row_tokens")
    return Document(row, ids[:size], mask=[bool(x) for x in mask[:size]])


def sft_arguments(row: dict, thinking: bool) -> tuple:
    return sft_conversation(row, thinking), conversation(row)[1], thinking


def num_bytes(row: dict, tokenizer: Tokenizer, *arguments) -> int:
    """Bytes of a conversation's text: no fewer than its tokens, and found without encoding. An
    error of the chat template names the row."""
    try:
        return len(tokenizer.render_text(*arguments).encode())
    except ValueError as error:
        raise ValueError(f"row {row['id']}: {error}") from None


def check_size(row: dict, size: int, new_tokens: int, limit: int, name: str) -> None:
    if not 1 < size + new_tokens <= limit:
        raise ValueError(
            f"row {row['id']}: {size} tokens + {new_tokens} new ones; {name} is {limit}"
        )


# ---- Verdicts ------------------------------------------------------------------------------------


def check_sandbox(rows: list[dict], settings: RunSettings, eval_data, dist: Dist) -> None:
    """If the rows run programs, print how these are confined, or raise OSError before training
    starts. The toy's arithmetic functions run on every system (see Sandbox)."""
    run_programs = {"code", "swe", "swe_agentic"}
    rows = [x for x in rows if x["kind"] in run_programs or "python" in str(x.get("environment"))]
    if rows:
        toy = settings.data == (TOY,) and eval_data in ((), (TOY,))
        plain = toy and not any("environment" in x for x in rows)
        sandbox = shared_sandbox(
            settings.score_workers,
            allow_unprotected=settings.allow_unprotected,
            plain_only=plain,
        )
        if dist.is_main:
            print(sandbox.describe())


def check_stage(rows: list[dict], recipe: RL) -> None:
    """Reject options that the rows cannot serve: one turn for rows with tools, or options that need
    right and wrong outcomes for preference rows without reference answers."""
    tools = {x["environment"]["name"] for x in rows if "environment" in x}
    if tools and recipe.max_turns < 2:
        raise ValueError(
            f"--max_turns {recipe.max_turns}: rows with tools ({tools}) need 2 or more"
        )
    needs_outcomes = {
        "dynamic_filtering": recipe.dynamic_filtering,
        "mask_unsolved": recipe.mask_unsolved >= 0,
        "max_pass_rate": recipe.max_pass_rate < 1,
        "keep_unsolved": recipe.keep_unsolved < 1,
    }
    without = [x["id"] for x in rows if compares_groups(x) and "reference" not in x]
    for name in [name for name, on in needs_outcomes.items() if on and without]:
        raise ValueError(
            f"--{name}: preference rows ({without[0]}, ...) have no outcome without --references"
        )


class References:
    """The SFT model's answers to preference questions; later answers are compared with them."""

    def __init__(self, path: str):
        self.path = path

    @cached_property
    def answers(self) -> dict[str, list[str]]:
        """{question: its stored answers}, read when they are first needed."""
        answers = defaultdict(list)
        lines = read_text(self.path).splitlines() if self.path else []
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                answers[record["question"]].append(record["answer"])
            except (ValueError, TypeError, KeyError) as error:
                place = f"{self.path}:{number}"
                raise ValueError(f"{place}: no question and answer: {error!r}") from None
        return answers

    def add_to(self, rows: list[dict]) -> list[dict]:
        """Add a stored answer to each preference row whose question has some, chosen by the row's
        position."""
        found = []
        for i, row in enumerate(rows):
            answers = compares_groups(row) and self.answers.get(question_of(row))
            found.append(row | {"reference": answers[i % len(answers)]} if answers else row)
        return found
