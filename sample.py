"""Talk to a checkpoint, sample from it, or evaluate it on a file of tasks.

python sample.py --model runs/out/mopd --prompt "What is 27+48?"
python sample.py --model runs/out/mopd                                   (chat in the terminal)
python sample.py --model runs/out/mopd --prompts FILE.txt                (one prompt a line)
python sample.py --model runs/out/mopd --tasks FILE.jsonl --num_samples 8
python sample.py --model HF_DIR --tasks FILE.jsonl --num_samples 16 --pass_rates RATED.jsonl
python sample.py --model HF_DIR --tasks FILE.jsonl --strategy refine --rounds 4 --num_samples 8
python sample.py --model HF_DIR --tools python --max_turns 101           (its calls run programs)
python sample.py --model HF_DIR --tasks FILE.jsonl --show_mask 1         (loss mask of SFT rows)
"""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from nanocascade.checkpoint.weights import load_model
from nanocascade.cli import Count, NonNegative, Positive, parse_args, run_main
from nanocascade.data.episode import Rollout, Sampling
from nanocascade.data.rows import conversation, read_rows, sft_conversation
from nanocascade.engine.device import find_device
from nanocascade.engine.distributed import DTYPES
from nanocascade.environments.loop import answer, end_episode, equip
from nanocascade.files import read_text
from nanocascade.rewards import compares_groups, name_of, needs_judge, verdict
from nanocascade.rollouts.rollout import roll_out
from nanocascade.rollouts.scoring import Scorer
from nanocascade.rollouts.strategies import STRATEGIES, final_grades
from nanocascade.run.evaluate import mean_interval
from nanocascade.run.log import show_rollout
from nanocascade.sampler import generate, step_seed
from nanocascade.tokenizer.chat import parse_response
from nanocascade.tokenizer.tokenizer import Tokenizer
from nanocascade.toy import tasks
from nanocascade.toy.judge import rule_judge


@dataclass
class Config:
    """What is asked, and how it is answered."""

    model: str = ""  # directory of the checkpoint
    prompt: str = ""  # one user message (without it and --prompts, --tasks: a chat)
    system: str = ""  # system message of prompts and chats
    prompts: str = ""  # text file, one user message a line
    tasks: tuple[str, ...] = ()  # JSONL files of rows with verifiers, or toy:DOMAIN
    num_samples: Positive = 1  # responses to each prompt
    limit: Count = 0  # use only this many rows of the tasks (0 = all)
    pass_rates: str = ""  # output file: the rows of the tasks with their pass rates
    strategy: str = ""  # answer the tasks by single, majority, best-of-n, refine or submit
    rounds: Positive = 4  # rounds of --strategy, with num_samples new answers each
    checks: Positive = 4  # refine: checks of each answer by the model
    keep: Positive = 2  # refine: number of best answers that the next round revises
    shown: Positive = 2  # refine: number of checks in a revision's prompt, worst first
    gradings: Count = 0  # grades of the last answers by the model itself (0 = none)
    tools: Literal["", "python"] = ""  # python: give the model the Python tool
    show: Count = 2  # responses printed in full, for each domain of the tasks
    show_mask: Count = 0  # print this many SFT conversations of the tasks, loss in green, and exit
    thinking: bool = True  # open the answer with a thought
    temperature: NonNegative = 1.0  # 0 = greedy
    top_p: Annotated[float, 1e-3, 1] = 0.95  # nucleus of sampling (the toy's report uses 1)
    top_k: Count = 0  # 0 = off
    max_new_tokens: Positive = 256  # maximum tokens of a response
    max_turns: Positive = 8  # maximum assistant turns of an episode with tools
    seed: int = 0  # seed of sampling
    max_rows: Positive = 256  # rows decoded at once
    dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of the parameters
    device: str = ""  # cuda, mps or cpu (default: the best one found)


def main():
    (cfg,) = parse_args(Config)
    if not cfg.model:
        raise ValueError("--model DIR is needed: the checkpoint to sample from")
    if len(asked := [x for x in ("prompt", "prompts", "tasks") if getattr(cfg, x)]) > 1:
        raise ValueError(f"--{' and --'.join(asked)}: give one of them")
    if not cfg.tasks and (cfg.limit or cfg.pass_rates):
        raise ValueError("--limit and --pass_rates need --tasks FILE")
    tokenizer = Tokenizer(cfg.model)
    if cfg.show_mask:
        return show_mask(cfg, tokenizer)
    if cfg.strategy and (cfg.strategy not in STRATEGIES or not cfg.tasks):
        known = ", ".join(STRATEGIES)
        raise ValueError(f"--strategy {cfg.strategy}: expected {known}, and --tasks")
    model = load_model(cfg.model, DTYPES[cfg.dtype], find_device(cfg.device)).eval()
    tokenizer.check_model(model.config.vocab_size, cfg.model)
    if cfg.strategy:
        evaluate_strategy(cfg, model, tokenizer)
    elif cfg.tasks:
        evaluate_tasks(cfg, model, tokenizer)
    elif cfg.prompts or cfg.prompt:
        prompts = [cfg.prompt]
        if cfg.prompts:
            prompts = [x for x in read_text(cfg.prompts).split("\n") if x.strip()]
            if not prompts:
                raise ValueError(f"{cfg.prompts}: no prompts")
        answer_prompts(cfg, model, tokenizer, prompts)
    else:
        chat(cfg, model, tokenizer)


def messages_for(cfg: Config, text: str) -> list[dict]:
    system = [{"role": "system", "content": cfg.system}] if cfg.system else []
    return [*system, {"role": "user", "content": text}]


def with_tools(cfg: Config, row: dict) -> dict:
    """The row with the tools of --tools, unless it has an environment or tools already."""
    own = "environment" in row or conversation(row)[1]
    return equip(row | {"environment": {"name": cfg.tools}}) if cfg.tools and not own else row


def sample_rows(cfg: Config, model, tokenizer, rows: list[dict], scorer=None):
    """Sample num_samples episodes of each row."""
    sampling = Sampling(
        cfg.max_new_tokens,
        cfg.temperature,
        cfg.top_p,
        cfg.top_k,
        cfg.max_turns,
        cfg.max_rows,
        cfg.thinking,
    )
    rows = [with_tools(cfg, row) for row in rows]
    return roll_out(
        model, tokenizer, rows, cfg.num_samples, sampling, cfg.seed, range(len(rows)), scorer
    )[0]


def answer_prompts(cfg: Config, model, tokenizer, prompts: list[str]) -> None:
    """Print every prompt and its responses."""
    rows = [{"responses_create_params": {"input": messages_for(cfg, x)}} for x in prompts]
    groups = sample_rows(cfg, model, tokenizer, rows)
    for text, group in zip(prompts, groups, strict=True):
        for x in group:
            sampled = tokenizer.decode(x.tokens[x.prompt_length :])
            print(f"> {text}\n{tokenizer.opening(cfg.thinking)}{sampled}\n")


def chat(cfg: Config, model, tokenizer) -> None:
    """Chat in the terminal, streamed. An empty line or the end of input ends it."""
    history = messages_for(cfg, "")[:-1]
    row = with_tools(cfg, {"responses_create_params": {"input": []}})
    tools = conversation(row)[1]
    while text := read_question():
        history.append({"role": "user", "content": text})
        progress = None
        for turn in range(1, cfg.max_turns + 1):  # of one question
            history.append(reply(cfg, model, tokenizer, history, tools))
            calls = history[-1]["tool_calls"]
            if not cfg.tools or not calls or turn == cfg.max_turns:
                break  # calls of the last turn get no answer, as in a rollout
            for call in calls:
                progress, result = answer(row, progress, call["function"])
                history.append({"role": "tool", "content": result})
                print(result)
        end_episode(row, progress)


def read_question() -> str:
    if sys.stdin.isatty():
        print("> ", end="", flush=True)
    return sys.stdin.readline().rstrip("\n")


def reply(cfg: Config, model, tokenizer, history: list[dict], tools) -> dict:
    """The next message of a chat, printed token by token."""
    ids, _ = tokenizer.render(history, tools, cfg.thinking, add_generation_prompt=True)
    print(tokenizer.opening(cfg.thinking), end="", flush=True)
    sampled: list[int] = []

    def stream(token: int) -> None:
        # Decode all tokens and print the new text: a character may span tokens.
        before = tokenizer.decode(sampled)
        sampled.append(token)
        after = tokenizer.decode(sampled)
        if not after.endswith("\ufffd"):
            print(after[len(before.rstrip("\ufffd")) :], end="", flush=True)

    generate(
        model,
        [ids],
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        top_k=cfg.top_k,
        stop_ids=tokenizer.eos_ids,
        seed=cfg.seed + len(history),
        on_token=stream,
    )
    print()
    return parse_response(tokenizer.response_text(sampled, cfg.thinking), tools)


def task_rows(cfg: Config, sft: bool) -> list[dict]:
    """Rows of files, or `toy:DOMAIN` for generated ones of the test split."""
    rows = []
    if not cfg.tasks:
        raise ValueError("--show_mask needs --tasks FILE")
    for source in cfg.tasks:
        if source.startswith("toy:"):
            rows += tasks.make_rows(source[4:], cfg.limit or 256, "test", 0)
        else:
            rows += list(read_rows(source, sft=sft))[: cfg.limit or None]
    for row in () if sft else rows:
        if needs_judge(row) and not compares_groups(row):
            raise ValueError(f"{name_of(row)}: a {row['kind']} row like this needs a judge")
    return rows


def evaluate_tasks(cfg: Config, model, tokenizer) -> None:
    """Print avg@k and pass@k of each domain with 95 % intervals over prompts, and responses."""
    rows = task_rows(cfg, sft=False)
    if any(compares_groups(row) and "reference" not in row for row in rows):
        raise ValueError("preference rows are graded against an answer: each needs a reference")
    groups = sample_rows(cfg, model, tokenizer, rows, Scorer(rule_judge))
    domains = defaultdict(list)
    for group in groups:
        domains[group[0].domain].append(group)
    k = cfg.num_samples
    if cfg.pass_rates:
        with open(cfg.pass_rates, "w") as file:
            for row, group in zip(rows, groups, strict=True):
                rated = row | {"pass_rate": sum(x.outcome for x in group) / k}
                file.write(json.dumps(rated) + "\n")
    print(f"{'domain':<16} {'prompts':>8} {f'avg@{k}':>18} {f'pass@{k}':>18}")
    for domain, found in domains.items():
        average = [sum(x.outcome for x in g) / k for g in found]
        passed = [float(any(x.outcome == 1.0 for x in g)) for g in found]
        print(f"{domain:<16} {len(found):>8} {interval(average):>18} {interval(passed):>18}")
        for group in found[: cfg.show]:
            print(show_rollout(group[0], tokenizer, 0))


def play(cfg: Config, model, tokenizer, rows: list[dict]):
    """(samples a problem so far, outcome of each row's answer) after every round of --strategy."""
    scorer, calls, spent = Scorer(rule_judge), 0, 0
    if any("environment" in row or compares_groups(row) for row in rows):
        raise ValueError(f"--strategy {cfg.strategy}: rows with one answer and a verifier only")

    def ask(rows: list[dict], n: int) -> list[list[str]]:
        nonlocal calls, spent
        if not rows:
            return []
        calls, spent = calls + 1, spent + n * len(rows)
        drawn = replace(cfg, num_samples=n, seed=step_seed(cfg.seed, calls))
        groups = sample_rows(drawn, model, tokenizer, rows)
        # Only the answer is used further; a response that was cut off has none.
        return [
            ["" if x.truncated else x.turns[-1]["parsed"]["content"] for x in group]
            for group in groups
        ]

    def grade(rows: list[dict], answers: list[str]) -> list[float]:
        return [reward.value for reward in scorer.programs.map(verdict, rows, answers)]

    strategy, options = STRATEGIES[cfg.strategy], ("checks", "keep", "shown")
    options = {name: getattr(cfg, name) for name in options}
    for answers in strategy(rows, ask, grade, cfg.rounds, cfg.num_samples, **options):
        yield spent / len(rows), grade(rows, answers)
    if cfg.gradings:
        grades = final_grades(rows, ask, answers, cfg.gradings)
        print(f"the last answers, graded by the model: {interval(grades)}")


def evaluate_strategy(cfg: Config, model, tokenizer) -> None:
    """The score of each domain after each round of a strategy, and what it took."""
    rows = task_rows(cfg, sft=False)
    print(f"{cfg.strategy}, {cfg.num_samples} answers a round")
    print(f"{'domain':<16} {'round':>6} {'samples a problem':>18} {'score':>18}")
    for i, (spent, outcomes) in enumerate(play(cfg, model, tokenizer, rows), 1):
        domains = defaultdict(list)
        for row, outcome in zip(rows, outcomes, strict=True):
            domains[row["domain"]].append(outcome)
        for domain, found in domains.items():
            print(f"{domain:<16} {i:>6} {spent:>18.1f} {interval(found):>18}")


def interval(values: list[float]) -> str:
    """Mean and 95 % interval: "0.512 +- 0.031"."""
    found = mean_interval(values)
    return f"{found['mean']:.3f} +- {found['interval']:.3f}"


def show_mask(cfg: Config, tokenizer) -> None:
    """Print SFT conversations with the loss mask in green."""
    for row in task_rows(cfg, sft=True)[: cfg.show_mask]:
        thinking, tools = cfg.thinking and tokenizer.thinks, conversation(row)[1]
        ids, mask = tokenizer.render(sft_conversation(row, thinking), tools, thinking)
        print(show_rollout(Rollout(row, ids, 0, [bool(x) for x in mask]), tokenizer, 0))


def command():
    run_main(main)


if __name__ == "__main__":
    command()
