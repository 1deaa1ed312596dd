"""Supervised fine-tuning loss: next-token cross-entropy on what the assistant wrote."""

from torch import Tensor

from nanocascade.importance import masked_mean


def sft_loss(train_logprobs: Tensor, mask: Tensor, *, num_tokens) -> tuple[Tensor, dict]:
    """L = - 1/N * sum over assistant tokens of log pi(y_t | s_t)   (Nemotron-Cascade 2, SFT).

    train_logprobs: (b, t) of the tokens that follow; mask: (b, t) True on assistant tokens (the end
    of turn included); num_tokens: N, over all micro-batches and ranks. Returns the loss () and
    metrics, each a mean over this call's assistant tokens ().
    """
    valid = mask.to(train_logprobs.dtype)  # (b, t)
    train_logprobs = train_logprobs.where(valid > 0, 0.0)  # (b, t)
    loss = -train_logprobs.sum() / num_tokens  # ()
    return loss, {"loss/token": masked_mean(-train_logprobs.detach(), valid)}
