"""Rollouts: from rows of data to scored groups of responses, tool calls included.

A rollout is one episode: the prompt, what the model wrote, and, where the row has an environment
(environments.py), the tool results in between. Only what the model wrote carries loss.
"""

import random
import time
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter

import torch
from torch import Tensor

from nanocascade.data.rows import conversation
from nanocascade.engine.distributed import Dist, unsharded
from nanocascade.environments.loop import answer
from nanocascade.rewards import Reward, kind_of, needs_judge, score, score_group
from nanocascade.rewards.preference import rule_judge, win_rate
from nanocascade.sampler import generate
from nanocascade.tokenizer.chat import parse_response

MAX_DRAWS = 4  # dynamic filtering tries at most this many times the prompts of a step
NOT_SCORED = "not scored: no judge"


@dataclass
class Sampling:
    """How pi_inf is drawn from: every log-prob of a stage is of logits / temperature."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_turns: int = 4  # assistant turns of an episode with tools
    max_rows: int = 512
    thinking: bool = True
    return_experts: bool = False  # routing replay
    max_tokens: int = 0  # of prompt and response together (0 = no limit of its own)

    def room(self, prompt: int) -> int:
        """Tokens that may follow a prompt of so many."""
        total = self.max_tokens or prompt + self.max_new_tokens
        return min(self.max_new_tokens, total - prompt)

    @property
    def limits(self) -> dict[str, int]:
        """What a score depends on, to be stored with it."""
        return {k: getattr(self, k) for k in ("max_new_tokens", "max_tokens", "max_turns")}


@dataclass
class Rollout:
    """One episode. tokens, mask and sampler_logprobs have one entry a token, prompt included.

    turns: [{"role": "assistant" | "tool", "content": text}, ...]; reward is what the group's
    advantage is made of, outcome the raw verdict before any shaping.
    """

    row: dict
    tokens: list[int]
    prompt_length: int
    mask: list[bool] = field(default_factory=list)
    sampler_logprobs: list[float] = field(default_factory=list)
    turns: list[dict] = field(default_factory=list)
    stop_reason: str = ""
    experts: Tensor | None = None
    played: tuple | None = None  # (number of calls, state) of the row's environment
    reward: float = 0.0
    outcome: float | None = 0.0  # None: no judge, or no stored answer to compare with
    reason: str = ""
    advantage: float = 0.0
    loss: bool = True  # False: masked out (overlong filter, a prompt nobody solved)

    @property
    def domain(self) -> str:
        return self.row["domain"]

    @property
    def num_loss_tokens(self) -> int:
        return sum(self.mask) if self.loss else 0

    @property
    def response_length(self) -> int:
        return sum(self.mask)

    @property
    def truncated(self) -> bool:
        return self.stop_reason == "length"

    def extend(self, tokens, logprobs=None) -> None:
        """Add what the model wrote, or, without logprobs, what a tool or the prompt said."""
        self.tokens += tokens
        self.mask += [logprobs is not None] * len(tokens)
        self.sampler_logprobs += [0.0] * len(tokens) if logprobs is None else logprobs

    def remember(self, experts: Tensor | None) -> None:
        """The experts (t, l, a) of a turn; earlier turns' stay as chosen when they were sampled."""
        if self.experts is not None:
            experts = torch.cat([self.experts, experts[len(self.experts) :]])
        self.experts = experts


class Scorer:
    """Verdicts, computed in worker threads while sampling goes on (programs run in processes)."""

    def __init__(self, judge=rule_judge, workers: int = 2, **group_options):
        self.judge, self.group_options = judge, group_options
        self.pool = ThreadPoolExecutor(workers)

    def grades(self, row: dict) -> bool:
        return self.judge is not None or not needs_judge(row)

    def submit(self, rollout: Rollout) -> Future:
        options = {"finished": rollout.stop_reason == "stop", "judge": self.judge}
        return self.pool.submit(score, rollout.row, rollout.turns, **options)

    def group(self, rollouts: list[Rollout], encode) -> list[Reward]:
        """Pairwise rewards of one prompt's rollouts; lengths are counted in tokens."""
        responses = [x.turns[-1]["content"] for x in rollouts]
        parts = [parse_response(text) for text in responses]
        return score_group(
            rollouts[0].row,
            responses,
            self.judge,
            thought_lengths=[len(encode(x["reasoning_content"] or "")) for x in parts],
            answer_lengths=[len(encode(x["content"])) for x in parts],
            finished=[x.stop_reason == "stop" for x in rollouts],
            **self.group_options,
        )


def roll_out(model, tokenizer, rows, num_samples, sampling, seed, row_ids, scorer=None, dist=None):
    """`num_samples` episodes of each row: groups[p][r], scored where a scorer is given.

    seed already holds the training step, row_ids name the rows for the sampler's hash. Returns the
    groups and {"time/rollout", "time/score"} in seconds.
    """
    start, dist = time.perf_counter(), dist or Dist()
    prompts = [tokenizer.render(*conversation(x), sampling.thinking, True)[0] for x in rows]
    groups = [
        [
            Rollout(row, list(ids), len(ids), [False] * len(ids), [0.0] * len(ids))
            for _ in range(num_samples)
        ]
        for row, ids in zip(rows, prompts, strict=True)
    ]
    verdicts: dict[int, Future] = {}

    calls_tool = partial(wants_tool, sampling=sampling)

    def scored(rollout: Rollout) -> bool:
        graded = scorer is not None and scorer.grades(rollout.row)
        return graded and kind_of(rollout.row) != "preference"

    def finish(p: int, r: int, sample) -> None:
        """Book a turn; a finished episode goes to the scorer while others are still sampled."""
        rollout = groups[p][r]
        rollout.extend(sample.tokens, sample.logprobs)
        rollout.stop_reason = sample.stop_reason
        rollout.remember(sample.experts)
        text = tokenizer.said(sample.tokens, sampling.thinking)
        rollout.turns.append({"role": "assistant", "content": text})
        if scored(rollout) and not calls_tool(rollout):
            verdicts[id(rollout)] = scorer.submit(rollout)

    options = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "stop_ids": tokenizer.eos_ids,
        "max_rows": sampling.max_rows,
        "seed": seed,
        "return_experts": sampling.return_experts,
        "keep_going": dist.keep_going(),
    }
    with unsharded(model):
        generate(
            model,
            prompts,
            num_samples=num_samples,
            max_new_tokens=[sampling.room(len(x)) for x in prompts],
            row_ids=row_ids,
            on_sample=finish,
            **options,
        )
        pending = [(p, r) for p in range(len(rows)) for r in range(num_samples)]
        while dist.together(pending := [(p, r) for p, r in pending if calls_tool(groups[p][r])]):
            # the next turn of every episode whose last one called a tool
            answer_calls([groups[p][r] for p, r in pending], tokenizer, sampling)
            pending = [(p, r) for p, r in pending if not groups[p][r].truncated]
            texts = [groups[p][r] for p, r in pending]
            left = [sampling.room(x.prompt_length) - len(x.tokens) + x.prompt_length for x in texts]
            generate(
                model,
                [x.tokens for x in texts],
                max_new_tokens=left,
                # a name of its own for each episode; positions differ from turn to turn
                row_ids=[(row_ids[p] + 1) * (1 << 20) + r for p, r in pending],
                on_sample=lambda i, _, sample, who=tuple(pending): finish(*who[i], sample),
                **options,
            )
    sampled = time.perf_counter()
    for group in groups if scorer is not None else ():
        book_rewards(group, verdicts, scorer, tokenizer)
    spent = {"time/rollout": sampled - start, "time/score": time.perf_counter() - sampled}
    return groups, spent


def wants_tool(rollout: Rollout, sampling: Sampling) -> bool:
    """Whether the episode's last turn calls a tool and there is a turn left to read the result."""
    more = len(rollout.turns) < 2 * sampling.max_turns - 1  # turns alternate with results
    if "environment" not in rollout.row or not more or rollout.truncated:
        return False
    return bool(parse_response(rollout.turns[-1]["content"])["tool_calls"])


def run_calls(rollout: Rollout) -> list[str]:
    """The results of the calls of the last turn; the environment goes on where it was."""
    results = []
    tools = conversation(rollout.row)[1]
    for call in parse_response(rollout.turns[-1]["content"], tools)["tool_calls"]:
        rollout.played, result = answer(rollout.row, rollout.played, call["function"])
        results.append(result)
    return results


def answer_calls(rollouts: list[Rollout], tokenizer, sampling: Sampling) -> None:
    """What the tools say to the last turns, without loss, up to where the next turns begin."""
    with ThreadPoolExecutor(2) as threads:  # each waits for a process where programs are run
        called = list(threads.map(run_calls, rollouts))
    for rollout, results in zip(rollouts, called, strict=True):
        told = tokenizer.tool_result_ids(results, sampling.thinking)
        room = sampling.room(rollout.prompt_length)
        if len(rollout.tokens) + len(told) - rollout.prompt_length >= room:
            rollout.stop_reason = "length"  # no room to answer: the episode ends with its call
            continue
        rollout.extend(told)
        rollout.turns.append({"role": "tool", "content": "\n".join(results)})


def book_rewards(group: list[Rollout], verdicts, scorer: Scorer, tokenizer) -> None:
    if not scorer.grades(group[0].row):  # in MOPD, whose loss has no rewards
        for rollout in group:
            rollout.outcome, rollout.reason = None, NOT_SCORED
        return
    if kind_of(group[0].row) == "preference":
        rewards = scorer.group(group, tokenizer.encode)
        reference = group[0].row.get("reference")
        for rollout, reward in zip(group, rewards, strict=True):
            rollout.reward, rollout.reason = reward
            # The domain's score: 0, 1/2 or 1 against the SFT answer; cut off, the response loses.
            rollout.outcome = None if reference is None else 0.0
            if reference is not None and rollout.stop_reason == "stop":
                answer = rollout.turns[-1]["content"]
                rollout.outcome = win_rate(rollout.row, answer, reference, scorer.judge)
        return
    # Some ran out of turns or tokens while a call was open: they are scored only now.
    found = [verdicts.get(id(x)) or scorer.submit(x) for x in group]
    for rollout, verdict in zip(group, found, strict=True):
        rollout.reward, rollout.reason = verdict.result()
        rollout.outcome = rollout.reward


def collect_groups(
    model, tokenizer, stream, prompts, num_samples, sampling, seed, step, scorer, dist, dynamic
):
    """The groups of one step, this rank's share of `prompts` of them, and how they were drawn.

    With `dynamic` filtering a group whose raw outcomes are all right or all wrong teaches nothing:
    it is dropped and the next prompt of the stream takes its place, until the batch is full or
    MAX_DRAWS times the prompts were tried. Whole groups, by prompt index: which answers finished
    first plays no part.
    """
    kept, collected, tried = 0, [], 0
    timing, outcomes = {"time/rollout": 0.0, "time/score": 0.0}, []
    while kept < prompts and tried < MAX_DRAWS * prompts:
        drawn = stream.take(min(prompts - kept, MAX_DRAWS * prompts - tried))
        tried += len(drawn)
        # What is asked at length is thought about at length, and prefilled at length in any case.
        mine = dist.shard(drawn, size=lambda x: len(str(x[1].get("responses_create_params"))))
        groups, spent = roll_out(
            model,
            tokenizer,
            [row for _, row in mine],
            num_samples,
            sampling,
            step_seed(seed, step),
            [i for i, _ in mine],
            scorer,
            dist,
        )
        timing = {name: timing[name] + spent[name] for name in timing}
        outcomes += [[x.outcome for x in group] for group in groups]
        useful = [g for g in groups if not dynamic or len({x.outcome for x in g}) > 1]
        collected += useful
        kept += dist.sum(len(useful))
    everyone = dist.gather((timing, outcomes))
    slowest = max((spent for spent, _ in everyone), key=lambda x: sum(x.values()))
    found = [x for _, part in everyone for x in part if None not in x]  # of all drawn groups
    timing = slowest | {"group/tried": tried}
    timing["group/all_right"] = mean(set(x) == {1.0} for x in found)
    timing["group/all_wrong"] = mean(set(x) == {0.0} for x in found)
    if found:
        timing["outcome/drawn"] = mean(x for part in found for x in part)
    # Where no group anywhere teaches anything the last ones are kept: all alike, they move little.
    return collected if kept else groups, timing


def step_seed(seed: int, step: int) -> int:
    """The sampler's seed of a step: another stream of draws for each (seed, step)."""
    return seed * 1_000_003 + step


def in_reach(
    model, tokenizer, rows, sampling, scorer, seed, dist, *, samples, max_pass_rate, keep_unsolved
):
    """Rows that the model solves at most `max_pass_rate` of the time and, but for a share
    `keep_unsolved` of the others, at least once: in `samples` tries, or as their `pass_rate` says.

    The report removes from code RL what a strong model always solves, and from agentic SWE RL what
    is solved 16 of 16 times and nine tenths of what is never solved.
    """
    unknown = [i for i, row in enumerate(rows) if "pass_rate" not in row]
    mine = dist.shard(unknown)
    groups, _ = roll_out(
        model,
        tokenizer,
        [rows[i] for i in mine],
        samples,
        sampling,
        step_seed(seed, -1),
        mine,
        scorer,
        dist,
    )
    rates = {i: mean(x.outcome for x in group) for i, group in zip(mine, groups, strict=True)}
    rates = {i: rate for part in dist.gather(rates) for i, rate in part.items()}
    kept = []
    for i, row in enumerate(rows):
        rate = rates.get(i, row.get("pass_rate"))
        lucky = random.Random(f"{seed} {row['id']}").random() < keep_unsolved
        if rate <= max_pass_rate and (rate > 0 or lucky):
            kept.append(row)
    if not kept:
        raise ValueError(
            f"--max_pass_rate {max_pass_rate}, --keep_unsolved {keep_unsolved}: all"
            f" {len(rows)} rows are too easy or too hard"
        )
    return kept


def apply_overlong(groups: list[list[Rollout]], mode: str) -> None:
    """What a response cut off at the limit costs: "penalty" = reward 0 (the verifier's own verdict,
    or the judge's lowest), "filter" = it leaves the loss, and still counts in its group's mean."""
    if mode not in ("penalty", "filter"):
        raise ValueError(f"--overlong {mode}: expected penalty or filter")
    for rollout in (x for group in groups for x in group):
        if mode == "filter" and rollout.truncated:
            rollout.loss = False


def mask_unsolved(groups: list[list[Rollout]], threshold: float) -> None:
    """SWE RL: a prompt none of whose outcomes exceeds the threshold is masked."""
    for group in groups:
        outcomes = [x.outcome for x in group if x.outcome is not None]
        if outcomes and max(outcomes) <= threshold:
            for rollout in group:
                rollout.loss = False


def rollout_metrics(groups: list[list[Rollout]], dist) -> dict[str, float]:
    """Rewards, outcomes and lengths of a step's batch, over all ranks."""
    flat = [
        (
            x.domain,
            None if x.reason == NOT_SCORED else x.reward,
            x.outcome,
            x.response_length,
            x.truncated,
        )
        for group in groups
        for x in group
    ]
    everyone = [x for part in dist.gather(flat) for x in part]
    rewards, outcomes = defaultdict(list), defaultdict(list)
    for domain, reward, outcome, _, _ in sorted(everyone, key=itemgetter(0)):
        if reward is not None:
            rewards[domain].append(reward)
        if outcome is not None:
            outcomes[domain].append(outcome)
    out = {"reward/mean": mean(x for part in rewards.values() for x in part)} if rewards else {}
    for domain, found in rewards.items():
        out[f"reward/mean/{domain}"] = mean(found)
        out[f"reward/std/{domain}"] = float(torch.tensor(found).std(correction=0))
    out |= {f"outcome/{domain}": mean(found) for domain, found in outcomes.items()}
    out["response/length"] = mean(x[3] for x in everyone)
    out["response/truncated"] = mean(x[4] for x in everyone)
    return out


def mean(values) -> float:
    values = list(values)
    return sum(values) / max(len(values), 1)


def evaluate(model, tokenizer, rows, num_samples, sampling, seed, scorer, dist=None):
    """({domain: {"mean", "n", "interval"}}, this rank's groups): mean outcome, 95 % interval.

    The interval is 1.96 standard errors of the mean over prompts: a prompt's samples are averaged
    first, since they are not independent.
    """
    dist = dist or Dist()
    indices = dist.shard(list(range(len(rows))))
    mine = [rows[i] for i in indices]
    groups, _ = roll_out(model, tokenizer, mine, num_samples, sampling, seed, indices, scorer, dist)
    outcomes = [
        (g[0].domain, mean(x.outcome for x in g)) for g in groups if g[0].outcome is not None
    ]
    outcomes = [x for part in dist.gather(outcomes) for x in part]
    result = {}
    for domain in sorted({d for d, _ in outcomes}):
        found = sorted(x for d, x in outcomes if d == domain)  # whatever the number of ranks
        means = torch.tensor(found, dtype=torch.float64)  # (p,)
        error = float(means.std() / len(means) ** 0.5) if len(means) > 1 else 1.0
        result[domain] = {"mean": float(means.mean()), "n": len(means), "interval": 1.96 * error}
    return result, groups
