"""Groups of one step: drawn, filtered, masked, and their metrics."""

import random
from collections import defaultdict
from operator import itemgetter

import torch

from nanocascade.data.episode import Rollout
from nanocascade.data.rows import conversation
from nanocascade.rollouts.scoring import NOT_SCORED
from nanocascade.sampler import step_seed
from nanocascade.stages import RL

# OURS: dynamic filtering draws at most 4 times the prompts of a step; the report has no limit.
MAX_DRAWS = 4


def collect_groups(play, stream, prompts, num_samples, seed, dist, dynamic=False):
    """The groups of one step, this rank's share of `prompts` of them, and how they were drawn.

    play(rows, num_samples, seed=, row_ids=) is roll_out for a model. With `dynamic` filtering a
    group whose raw outcomes are all equal teaches nothing: it is dropped and the next prompt of the
    stream takes its place, until the batch is full or MAX_DRAWS times the prompts were tried.
    Groups are whole and ordered by prompt index, so it does not matter which answers finished
    first.
    """
    num_useful, tried, collected, outcomes = 0, 0, [], []
    timing = {"time/rollout": 0.0, "time/score": 0.0}
    while num_useful < prompts and tried < MAX_DRAWS * prompts:
        drawn = stream.take(min(prompts - num_useful, MAX_DRAWS * prompts - tried))
        tried += len(drawn)
        # Balance ranks by prompt length: long prompts prefill slower and get longer answers.
        local = dist.shard(drawn, size=lambda x: len(str(conversation(x[1]))))
        rows, positions = [row for _, row in local], [position for position, _ in local]
        groups, spent = play(rows, num_samples, seed=seed, row_ids=positions)
        timing = {name: timing[name] + spent[name] for name in timing}
        outcomes += [[x.outcome for x in group] for group in groups]
        useful = [g for g in groups if not dynamic or len({x.outcome for x in g}) > 1]
        collected += useful
        num_useful += dist.sum(len(useful))
    by_rank = dist.gather((timing, outcomes))
    timing = max((spent for spent, _ in by_rank), key=lambda x: sum(x.values()))  # the slowest
    timing |= {"group/tried": tried} | group_metrics([x for _, part in by_rank for x in part])
    # If every group was filtered out, keep the last ones; their advantages are all zero.
    return collected if num_useful else groups, timing


def group_metrics(outcomes: list[list]) -> dict[str, float]:
    """Shares of the drawn groups, dropped ones included: [[0, 1], [1, 1]] -> all_right 1/2."""
    outcomes = [group for group in outcomes if None not in group]
    metrics = {
        "group/all_right": mean(set(x) == {1.0} for x in outcomes),
        "group/all_wrong": mean(set(x) == {0.0} for x in outcomes),
    }
    if outcomes:
        metrics["outcome/drawn"] = mean(x for group in outcomes for x in group)
    return metrics


def filter_by_pass_rate(play, rows: list[dict], recipe: RL, seed, dist) -> list[int] | None:
    """Indices of the rows that are neither too easy nor too hard for the model; None for all.

    A row is too easy if the model solves it more often than --max_pass_rate. Of the rows that it
    never solves, a share --keep_unsolved is kept. How often is measured in --pass_samples tries,
    unless the row has a `pass_rate`. The report removes from code RL what a strong model always
    solves, and from agentic SWE RL what is solved 16 of 16 times and nine tenths of what is never
    solved.
    """
    highest, share = recipe.max_pass_rate, recipe.keep_unsolved
    if highest == share == 1:
        return None
    unknown = dist.shard([i for i, row in enumerate(rows) if "pass_rate" not in row])
    seed_of_rates = step_seed(seed, -1)
    groups, _ = play(
        [rows[i] for i in unknown], recipe.pass_samples, seed=seed_of_rates, row_ids=unknown
    )
    rates = {i: row["pass_rate"] for i, row in enumerate(rows) if "pass_rate" in row}
    measured = [(i, mean(x.outcome for x in g)) for i, g in zip(unknown, groups, strict=True)]
    for part in dist.gather(measured):
        rates |= part
    kept = []
    for i, row in enumerate(rows):
        lucky = random.Random(f"{seed} {row['id']}").random() < share
        if rates[i] <= highest and (rates[i] > 0 or lucky):
            kept.append(i)
    if not kept:
        raise ValueError(
            f"--max_pass_rate {highest}, --keep_unsolved {share}: all {len(rows)} rows are too easy"
            " or too hard"
        )
    return kept


def mask_overlong(groups: list[list[Rollout]], mode: str) -> None:
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
    records = [
        {
            "domain": x.domain,
            "reward": None if x.reason == NOT_SCORED else x.reward,
            "outcome": x.outcome,
            "length": x.response_length,
            "truncated": x.truncated,
        }
        for group in groups
        for x in group
    ]
    records = [x for part in dist.gather(records) for x in part]
    rewards, outcomes = by_domain(records, "reward"), by_domain(records, "outcome")
    metrics = {"reward/mean": mean(x for part in rewards.values() for x in part)} if rewards else {}
    for domain, values in rewards.items():
        metrics[f"reward/mean/{domain}"] = mean(values)
        metrics[f"reward/std/{domain}"] = float(torch.tensor(values).std(correction=0))
    metrics |= {f"outcome/{domain}": mean(values) for domain, values in outcomes.items()}
    metrics["response/length"] = mean(x["length"] for x in records)
    metrics["response/truncated"] = mean(x["truncated"] for x in records)
    return metrics


def by_domain(records: list[dict], key: str) -> dict[str, list]:
    """{domain: values of the key}, without those that are None."""
    found = defaultdict(list)
    for record in sorted(records, key=itemgetter("domain")):
        if record[key] is not None:
            found[record["domain"]].append(record[key])
    return found


def mean(values) -> float:
    values = list(values)
    return sum(values) / max(len(values), 1)
