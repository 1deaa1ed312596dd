"""Multi-domain on-policy distillation: the loss of Nemotron-Cascade 2, Eq. 2-4, as one function.

The student samples; the teacher of the prompt's domain scores the very tokens that were sampled;
each token's advantage is how much likelier the teacher finds it. Nothing else is needed: no reward,
no group, no full-vocabulary distribution. The expected gradient is that of the reverse KL.
"""

import torch
from torch import Tensor

from nanocascade.importance import (
    ids_of_rows,
    importance_weight,
    masked_mean,
    mismatch_metrics,
    sequence_mask,
    sum_by_response,
)


def denominators(num_tokens: Tensor, all_tokens: int, all_responses: int, per: str):
    """(num_tokens, num_responses) of compute_mopd_loss, from the counts of a step.

    num_tokens: (o,) valid tokens of this rank's responses. all_tokens, all_responses: valid tokens
    and responses with any, over all ranks. per="response" is Eq. 4: a mean over each response's own
    tokens, then over responses. per="token" weighs all tokens alike, as NeMo-RL's mopd-cascade does
    (token_level_loss): [3, 1], 4, 2 -> [4, 4], 1, so that every token is divided by 4.
    """
    if per == "token":
        return torch.full_like(num_tokens, all_tokens), 1
    return num_tokens, max(all_responses, 1)


def compute_mopd_loss(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    inf_logprobs: Tensor,
    mask: Tensor | None = None,
    eps_low: float = 0.5,
    eps_high: float = 2.0,
    *,
    response_ids: Tensor | None = None,
    num_tokens: Tensor | None = None,
    num_responses: int | Tensor | None = None,
    gate: str = "zero",
    max_sequence_error: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Nemotron-Cascade 2, Eq. 2 and Eq. 4:

        a_t = log pi_i(y_t|s_t) - log pi_train(y_t|s_t)                                        (2)
        L = - E[ 1/|V(y)| * sum over valid response tokens of w_t * sg[a_t] * log pi_train ]   (4)

    The inner mean is over all valid tokens of one response, those outside the band included; the
    outer one over the responses. (`(w * a * logp).mean()` over a batch is this only where all
    responses have the same length.)

    student_logprobs and inf_logprobs, elsewhere train_logprobs and sampler_logprobs, keep the names
    of a published sketch of this loss, so that checks written for it run here.

    Args:
        student_logprobs: (b, t) pi_train, with gradient.
        teacher_logprobs: (b, t) pi_i.
        inf_logprobs: (b, t) pi_inf, as the sampler returned them.
        mask: (b, t) True on response tokens; all by default.
        eps_low, eps_high: the band of w_t, Eq. 3.
        response_ids: (b, t) which response a token belongs to; by default a row is a response.
        num_tokens: (o,) valid tokens of each response; counted here by default. Needed where a
            response spans micro-batches, which max_sequence_error does not permit.
        num_responses: responses of the whole step; counted here by default. Needed where the step
            has several micro-batches or ranks.
        gate: importance_weight's.
        max_sequence_error: mask responses as sequence_mask does (0 = off).
    Returns: the loss () and metrics, each a mean (or max) over this call's valid tokens ().
    """
    valid = torch.ones_like(student_logprobs) if mask is None else mask.to(student_logprobs.dtype)
    if response_ids is None:
        response_ids = ids_of_rows(valid)  # (b, t)
    if num_tokens is None:
        num_tokens = sum_by_response(valid, response_ids)  # (o,)
    if num_responses is None:
        num_responses = (num_tokens > 0).sum().clamp(min=1)  # ()

    # where(), so that an infinite log-prob on a position without loss cannot become NaN * 0
    student_logprobs = student_logprobs.where(valid > 0, 0.0)  # (b, t)
    teacher_advantage = (teacher_logprobs - student_logprobs).detach()  # (b, t) a_t
    weight, ratio = importance_weight(student_logprobs, inf_logprobs, eps_low, eps_high, gate)
    per_token = weight * teacher_advantage * student_logprobs  # (b, t)
    share = valid / num_tokens.clamp(min=1)[response_ids]  # (b, t) 1/|V(y)| on valid tokens
    kept = sequence_mask(
        student_logprobs, inf_logprobs, valid, response_ids, max_sequence_error
    )  # (b, t)
    loss = -per_token.where(kept, 0.0).mul(share).sum() / num_responses  # ()

    outside = (ratio < eps_low) | (ratio > eps_high)  # (b, t)
    metrics = {
        "mopd/reverse_kl": masked_mean(-teacher_advantage, valid),  # E_student[log student/teacher]
        **mismatch_metrics(student_logprobs.detach(), inf_logprobs, valid),
        "gate/out_of_band": masked_mean(outside.to(valid.dtype), valid),
    }
    if max_sequence_error:
        metrics["mismatch/masked"] = masked_mean(1.0 - kept.to(valid.dtype), valid)
    return loss, metrics
