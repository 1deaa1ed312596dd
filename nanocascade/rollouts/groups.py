"""Groups of one step: drawn, filtered, masked, and what they say in the log."""

import random
from collections import defaultdict
from operator import itemgetter

import torch

from nanocascade.data.episode import Rollout
from nanocascade.rollouts.rollout import roll_out
from nanocascade.rollouts.scoring import NOT_SCORED
from nanocascade.sampler import step_seed

# OURS: dynamic filtering draws at most 4 times the prompts of a step; the report has no limit.
MAX_DRAWS = 4


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


def in_reach(
    model, tokenizer, rows, sampling, scorer, seed, dist, *, samples, max_pass_rate, keep_unsolved
) -> list[int]:
    """Indices of the rows that are neither too easy nor too hard for the model.

    A row is too easy if the model solves it more often than `max_pass_rate`. Of the rows that it
    never solves, a share `keep_unsolved` is kept. How often is measured in `samples` tries, unless
    the row has a `pass_rate`. The report removes from code RL what a strong model always solves,
    and from agentic SWE RL what is solved 16 of 16 times and nine tenths of what is never solved.
    """
    unknown = dist.shard([i for i, row in enumerate(rows) if "pass_rate" not in row])
    groups, _ = roll_out(
        model,
        tokenizer,
        [rows[i] for i in unknown],
        samples,
        sampling,
        step_seed(seed, -1),
        unknown,
        scorer,
        dist,
    )
    measured = {i: mean(x.outcome for x in group) for i, group in zip(unknown, groups, strict=True)}
    rates = {i: row["pass_rate"] for i, row in enumerate(rows) if "pass_rate" in row}
    for part in dist.gather(measured):
        rates |= part
    kept = []
    for i, row in enumerate(rows):
        lucky = random.Random(f"{seed} {row['id']}").random() < keep_unsolved
        if rates[i] <= max_pass_rate and (rates[i] > 0 or lucky):
            kept.append(i)
    if not kept:
        raise ValueError(
            f"--max_pass_rate {max_pass_rate}, --keep_unsolved {keep_unsolved}: all"
            f" {len(rows)} rows are too easy or too hard"
        )
    return kept


def apply_overlong(groups: list[list[Rollout]], mode: str) -> None:
    """Mask the responses that were cut off at the limit, if mode is "filter".

    They still count in their group's mean and std. In the other modes they stay in the loss: in
    RL as a "penalty", since the verifier or the judge gave them their lowest reward, in MOPD
    ("off") like any response.
    """
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
