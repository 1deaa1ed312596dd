"""Strictly on-policy GRPO: group advantages and the token-level loss, as pure functions.

Each step samples r responses to each of p prompts from the current policy and takes ONE gradient
step on them, so the importance ratio is 1 and no clipping acts.
"""

import torch
from torch import Tensor

from nanocascade.importance import (
    ids_of_rows,
    importance_weight,
    masked_mean,
    mismatch_metrics,
    sequence_mask,
)


def group_advantages(rewards: Tensor, eps: float = 1e-6, normalize: bool = True) -> Tensor:
    """A_i = (r_i - mean(r)) / std(r) within a prompt's group (Nemotron-Cascade 2, RL common).

    rewards (p, r) -> (p, r). A group whose rewards are all equal teaches nothing: it gets exact
    zeros, found by comparison and not by a small std. normalize=False leaves the division out.
    # OURS: population std and eps 1e-6; the report names neither. NeMo-RL divides by r - 1.
    """
    if not len(rewards):  # a rank that dynamic filtering left without groups
        return rewards
    centred = rewards - rewards.mean(1, keepdim=True)  # (p, r)
    if normalize:
        centred = centred / (rewards.std(1, correction=0, keepdim=True) + eps)  # (p, r)
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)  # (p, 1)
    return centred.masked_fill(equal, 0.0)


def grpo_loss(
    train_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    num_tokens: int | Tensor,
    sampler_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    gate: tuple[float, float] | None = None,
    max_sequence_error: float = 0.0,
    response_ids: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The negative of Nemotron-Cascade 2, Eq. 1, as a REINFORCE surrogate:

        J = E[ 1/sum_i|o_i| * sum_i sum_t A_i,t ],     grad J = E[ 1/N * sum A_i,t grad log pi ]

    Every token of the batch weighs the same, whatever the length of its response.
    # OURS: N is one count of loss tokens over the whole batch; the report prints it per group.

    With a gate each token has its weight w_t of Eq. 3. The KL term has no weight; a response that
    the sequence mask takes out loses it too.

    Args:
        train_logprobs: (b, t) with gradient.
        advantages: (b, t) a response's value on each of its tokens.
        mask: (b, t) True where a token carries loss.
        num_tokens: N, over all micro-batches and ranks.
        sampler_logprobs: (b, t) for the mismatch metrics, the gate and the sequence mask.
        ref_logprobs: (b, t) of the reference model, for the KL term.
        kl_coef: adds kl_coef * k3 of train against reference (RLHF), over the same N.
        gate: (low, high) weighs tokens as in Eq. 3, as the Nano recipe does; None = off.
        max_sequence_error: mask responses as sequence_mask does (0 = off).
        response_ids: (b, t) which response a token belongs to; by default a row is a response.
    Returns: the loss () and metrics, each a mean (or max) over this call's loss tokens ().
    """
    valid = mask.to(train_logprobs.dtype)  # (b, t)
    # where(), so that an infinite log-prob on a position without loss cannot become NaN * 0
    train_logprobs = train_logprobs.where(valid > 0, 0.0)  # (b, t)
    weight, metrics = torch.ones_like(train_logprobs), {}  # (b, t)
    if sampler_logprobs is not None:
        metrics |= mismatch_metrics(train_logprobs.detach(), sampler_logprobs, valid)
    if gate is not None:
        assert sampler_logprobs is not None, "the gate compares with sampler_logprobs"
        weight, ratio = importance_weight(train_logprobs, sampler_logprobs, *gate)
        outside = (ratio < gate[0]) | (ratio > gate[1])  # (b, t)
        metrics["gate/out_of_band"] = masked_mean(outside.to(valid.dtype), valid)
    assert not max_sequence_error or sampler_logprobs is not None, "the mask compares with them"
    ids = ids_of_rows(valid) if response_ids is None else response_ids  # (b, t)
    kept = sequence_mask(train_logprobs, sampler_logprobs, valid, ids, max_sequence_error)  # (b, t)
    if max_sequence_error:
        metrics["mismatch/masked"] = masked_mean(1.0 - kept.to(valid.dtype), valid)
    per_token = -weight * advantages * train_logprobs  # (b, t)
    if kl_coef:
        assert ref_logprobs is not None, "the KL term needs ref_logprobs"
        # OURS: the k3 estimator of the KL term; the report gives only its coefficient.
        gap = ref_logprobs - train_logprobs  # (b, t)
        k3 = gap.exp() - 1 - gap  # (b, t) >= 0
        per_token = per_token + kl_coef * k3  # (b, t)
        metrics["kl/reference"] = masked_mean(k3.detach(), valid)
    loss = per_token.where(kept, 0.0).sum() / num_tokens  # ()
    return loss, metrics
