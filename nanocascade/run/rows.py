"""The rows of a run, read or generated, and their checks before training starts."""

from nanocascade.data.episode import Document, Sampling
from nanocascade.data.rows import (
    conversation,
    question_of,
    read_references,
    read_rows,
    sft_conversation,
)
from nanocascade.engine.distributed import Dist
from nanocascade.rewards import compares_groups
from nanocascade.run.settings import TOY, EvalSettings, RunSettings
from nanocascade.sandbox.sandbox import shared_sandbox
from nanocascade.tokenizer.tokenizer import Tokenizer
from nanocascade.toy import tasks


def read_training_rows(settings: RunSettings, stage: str, domains, dist: Dist) -> list[dict]:
    """The rows of --data that the stage trains on, or generated ones of its domains."""
    if settings.data == (TOY,):
        seed = f"{settings.seed} {stage}"  # each stage draws its own problems
        return [x for d in domains for x in tasks.make_rows(d, settings.toy_rows, "train", seed)]
    if stage == "sft":
        return list(read_rows(settings.data, sft=True))
    rows = list(read_rows(settings.data))
    present = {row["domain"] for row in rows}
    if not present & set(domains):
        raise ValueError(f"stage {stage} trains {tuple(domains)}; --data holds {present}")
    if (others := present - set(domains)) and dist.is_main:
        print(
            f"not used, since this stage does not train them: rows of {', '.join(sorted(others))}"
        )
    return [row for row in rows if row["domain"] in domains]


def read_eval_rows(settings: EvalSettings, domains) -> dict[str, list[dict]]:
    """Held-out rows by domain: --own_eval_samples of `domains`, --eval_samples of the others."""
    rows: dict[str, list[dict]] = {}
    if settings.eval_data == (TOY,):
        for domain in dict.fromkeys((*tasks.DOMAINS, *domains)):
            limit = settings.own_eval_samples if domain in domains else settings.eval_samples
            if limit:
                rows[domain] = tasks.make_rows(domain, limit, "test", 0)
        return rows
    for row in read_rows(settings.eval_data):
        limit = settings.own_eval_samples if row["domain"] in domains else settings.eval_samples
        if len(rows.get(row["domain"], ())) < limit:
            rows.setdefault(row["domain"], []).append(row)
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
        prompt = (*conversation(row), True, True)
        # A token has at least one byte, so a text of fewer bytes is short enough without encoding.
        if len(rendered_text(row, tokenizer, *prompt).encode()) + new_tokens > limit:
            size = len(tokenizer.render(*prompt)[0])
            check_size(row, size, new_tokens, limit, name)


def check_conversations(
    rows: list[dict], tokenizer: Tokenizer, row_tokens: int, strip_thinking: float
) -> None:
    """Raise ValueError for an SFT row that is too long, with or without its thought, in the forms
    that training may draw."""
    forms = {x and tokenizer.thinks for x in (strip_thinking < 1, strip_thinking == 0)}
    for row in rows:
        for thinking in forms:
            text = rendered_text(
                row, tokenizer, sft_conversation(row, thinking), conversation(row)[1], thinking
            )
            if len(text.encode()) > row_tokens:
                sft_document(row, tokenizer, thinking, row_tokens)


def sft_document(row: dict, tokenizer: Tokenizer, thinking: bool, row_tokens: int) -> Document:
    """A conversation as ids and loss mask, up to the last token that carries loss."""
    ids, mask = tokenizer.render(sft_conversation(row, thinking), conversation(row)[1], thinking)
    size = max((i for i, has_loss in enumerate(mask) if has_loss), default=-1) + 1
    check_size(row, size, 0, row_tokens, "--row_tokens")
    return Document(row, ids[:size], mask=[bool(x) for x in mask[:size]])


def rendered_text(row: dict, tokenizer: Tokenizer, *conversation) -> str:
    """The text of a row's conversation; an error of the chat template names the row."""
    try:
        return tokenizer.render_text(*conversation)
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


def check_outcomes(rows: list[dict], **options: bool) -> None:
    """Reject options that need right and wrong outcomes when preference rows have no reference
    answers. options: whether each flag is on."""
    without = [x["id"] for x in rows if compares_groups(x) and "reference" not in x]
    for name in [name for name, on in options.items() if on and without]:
        raise ValueError(
            f"--{name}: preference rows ({without[0]}, ...) have no outcome without --references"
        )


class References:
    """The SFT model's answers to preference questions; later answers are compared with them."""

    def __init__(self, path: str):
        self.path, self.answers = path, None

    def add_to(self, rows: list[dict]) -> list[dict]:
        """Add a stored answer to each row whose question has some, chosen by the row's position.

        The file is read only if there are preference rows: without them the file of a parent need
        not exist.
        """
        if all(not compares_groups(row) for row in rows):
            return rows
        if self.answers is None:
            self.answers = read_references(self.path)
        found = [self.answers.get(question_of(row)) for row in rows]
        return [
            row | {"reference": answers[i % len(answers)]} if answers else row
            for i, (row, answers) in enumerate(zip(rows, found, strict=True))
        ]
