"""Multi-domain on-policy distillation: the loss of Nemotron-Cascade 2, Eq. 2-4, as one function.

The student samples; the teacher of the prompt's domain scores the very tokens that were sampled;
each token's advantage is how much likelier the teacher finds it. Nothing else is needed: no reward,
no group, no full-vocabulary distribution. The expected gradient is that of the reverse KL.
"""

import torch
from torch import Tensor

from nanocascade.importance import importance_weight, masked_mean, mismatch_metrics


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
) -> tuple[Tensor, dict[str, Tensor]]:
    """Nemotron-Cascade 2, Eq. 2 and Eq. 4:

        a_t = log pi_i(y_t|s_t) - log pi_train(y_t|s_t)                                        (2)
        L = - E[ 1/|V(y)| * sum over valid response tokens of w_t * sg[a_t] * log pi_train ]   (4)

    The inner mean is over all valid tokens of one response, those outside the band included; the
    outer one over the responses. (`(w * a * logp).mean()` over a batch is this only where all
    responses have the same length.)

    Args:
        student_logprobs: (b, t) pi_train, with gradient. teacher_logprobs: (b, t) pi_i.
        inf_logprobs: (b, t) pi_inf, as the sampler returned them. mask: (b, t) True on response
        tokens, all by default. response_ids: (b, t) which response a token belongs to, where rows
        are packed; by default a row is a response. num_tokens: (o,) valid tokens of each response
        and num_responses: responses of the whole step, for when a response or the step spans
        micro-batches or ranks; counted from the arguments by default.
    Returns: the loss () and metrics, each a mean (or max) over this call's valid tokens ().
    """
    valid = torch.ones_like(student_logprobs) if mask is None else mask.to(student_logprobs.dtype)
    if response_ids is None:
        rows = torch.arange(len(valid), device=valid.device)  # (b,)
        response_ids = rows[:, None].expand_as(valid)  # (b, t)
    if num_tokens is None:
        num_tokens = valid.new_zeros(int(response_ids.max()) + 1)  # (o,)
        num_tokens = num_tokens.scatter_add(0, response_ids.flatten(), valid.flatten())  # (o,)
    if num_responses is None:
        num_responses = (num_tokens > 0).sum().clamp(min=1)  # ()

    # where(), so that an infinite log-prob on a position without loss cannot become NaN * 0
    student_logprobs = student_logprobs.where(valid > 0, 0.0)  # (b, t)
    teacher_advantage = (teacher_logprobs - student_logprobs).detach()  # (b, t) a_t
    weight, ratio = importance_weight(student_logprobs, inf_logprobs, eps_low, eps_high, gate)
    per_token = weight * teacher_advantage * student_logprobs  # (b, t)
    share = valid / num_tokens.clamp(min=1)[response_ids]  # (b, t) 1/|V(y)| on valid tokens
    loss = -per_token.where(valid > 0, 0.0).mul(share).sum() / num_responses  # ()

    outside = (ratio < eps_low) | (ratio > eps_high)  # (b, t)
    metrics = {
        "mopd/reverse_kl": masked_mean(-teacher_advantage, valid),  # E_student[log student/teacher]
        **mismatch_metrics(student_logprobs.detach(), inf_logprobs, valid),
        "gate/out_of_band": masked_mean(outside.to(valid.dtype), valid),
    }
    return loss, metrics
