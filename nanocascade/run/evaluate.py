"""Scores of held-out rows, with intervals."""

import torch

from nanocascade.engine.distributed import Dist
from nanocascade.rollouts.groups import mean
from nanocascade.rollouts.rollout import roll_out


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
