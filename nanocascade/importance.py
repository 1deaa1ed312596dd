"""Importance weights between trainer and sampler (Eq. 3), shared by the losses."""

import torch
from torch import Tensor


def importance_weight(train_logprobs, sampler_logprobs, low, high, gate="zero"):
    """The gate of Nemotron-Cascade 2, Eq. 3:

        r_t = pi_train(y_t|s_t) / pi_inf(y_t|s_t);   w_t = sg[r_t] * 1[low <= r_t <= high]

    A token outside the band gets weight 0: it is not clamped to the band (gate="clamp" does that,
    gate="none" keeps r_t; both for comparison). All (b, t). Returns (w_t, r_t), without gradient.
    Raises ValueError for another gate.
    """
    ratio = (train_logprobs.detach() - sampler_logprobs).exp()  # (b, t)
    if gate == "zero":  # where(), since infinity, of a log ratio beyond 88, times 0 is NaN
        return ratio.where((ratio >= low) & (ratio <= high), 0.0), ratio
    if gate == "clamp":
        return ratio.clamp(low, high), ratio
    if gate == "none":
        return ratio, ratio
    raise ValueError(f"gate {gate!r}: expected zero, clamp or none")


def sequence_mask(train_logprobs, sampler_logprobs, valid, response_ids, max_error: float):
    """Mask of the valid tokens (b, t) without the responses that train and sampler disagree on.

    A response stays if exp|train - sampler log-prob|, averaged over its valid tokens, is at most
    max_error: ratios 1, 2, 4 have the mean 7/3, so max_error = 2 masks all three tokens. 0 = off,
    as in the report; Nemotron 3 Nano and NeMo-RL, mopd-cascade, use 2.
    # OURS: a masked response leaves the loss but not its denominator, which is counted before the
    forward pass that finds it. NeMo-RL scores the tokens in an extra pass, masks, and then counts.
    """
    if not max_error:
        return valid > 0
    gap = (train_logprobs.detach() - sampler_logprobs).where(valid > 0, 0.0)  # (b, t)
    errors = sum_by_response(gap.abs().exp() * valid, response_ids)  # (o,)
    num_tokens = sum_by_response(valid, response_ids)  # (o,)
    return (valid > 0) & (errors <= max_error * num_tokens)[response_ids]


def ids_of_rows(valid: Tensor) -> Tensor:
    """(b, t) response ids of unpacked rows: a row is a response."""
    return torch.arange(len(valid), device=valid.device)[:, None].expand_as(valid)


def sum_by_response(x: Tensor, response_ids: Tensor) -> Tensor:
    """(b, t) -> (o,): the sum of x over the tokens of each response."""
    num_responses = int(response_ids.max()) + 1 if response_ids.numel() else 0
    sums = x.new_zeros(num_responses)  # (o,)
    return sums.scatter_add(0, response_ids.flatten(), x.flatten())


def masked_mean(x: Tensor, valid: Tensor) -> Tensor:
    """Mean () of x (b, t) where valid (b, t) is above 0; 0 of nothing."""
    return x.where(valid > 0, 0.0).sum() / valid.sum().clamp(min=1)


def mismatch_metrics(train_logprobs, sampler_logprobs, valid) -> dict[str, Tensor]:
    """How far the trainer's distribution is from the sampler's on the sampled tokens, (b, t) each.

    mismatch/prob_error = mean exp|train - sampler| - 1; mismatch/k3 = mean r - 1 - log r, an
    estimate of KL(sampler || train) that is never negative; ratio/mean and ratio/max of r.
    """
    gap = (train_logprobs - sampler_logprobs).where(valid > 0, 0.0)  # (b, t) log r
    ratio = gap.exp()  # (b, t)
    return {
        "mismatch/prob_error": masked_mean(gap.abs().exp() - 1, valid),
        "mismatch/k3": masked_mean(ratio - 1 - gap, valid),
        "ratio/mean": masked_mean(ratio, valid),
        "ratio/max": ratio.where(valid > 0, 0.0).max(),
    }
