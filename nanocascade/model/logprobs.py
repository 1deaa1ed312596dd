"""Log-probs of given tokens in chunks that backward recomputes: no (b, t, v) tensor is held.

At 131,072 words a 49K-token response would need 26 GB of logits, and as much again for their
gradient. Here a chunk's logits live only while its tokens are scored, once forward and once
backward.
"""

import torch
from torch import Tensor

# Bytes of a chunk's fp32 logits; backward holds about three such chunks. A large head gets chunks
# of half its own size: with smaller ones, reading it for each costs more than the products.
CHUNK_BYTES = 32 << 20


class ChunkedLogprobs(torch.autograd.Function):
    """log softmax(W x / T)[target] and the entropy of the distribution, chunk by chunk."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        logprobs = torch.empty_like(hidden[:, 0], dtype=wide(hidden))  # (n,)
        entropy, log_p = torch.empty_like(logprobs), None  # (n,)
        for part in chunks(len(hidden), weight):
            log_p = log_softmax(hidden[part], weight, temperature)  # (q, v)
            logprobs[part] = log_p.gather(1, targets[part, None])[:, 0]
            entropy[part] = -(log_p.exp() * log_p).sum(1)
        small = len(hidden) * len(weight) * 4 <= CHUNK_BYTES  # keep the toy's, do not recompute
        ctx.save_for_backward(hidden, weight, targets, log_p if small else None)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, log_p = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # (n, d)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=wide(weight))  # (v, d)
        for part in chunks(len(hidden), weight):
            # d log p[y] / d logits = (onehot(y) - p) / T
            again = log_softmax(hidden[part], weight, ctx.temperature) if log_p is None else log_p
            delta = again.exp().neg_()  # (q, v)
            rows = torch.arange(len(delta), device=delta.device)
            delta[rows, targets[part]] += 1.0
            delta *= grad[part, None] / ctx.temperature
            delta = delta.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = (delta @ weight).to(hidden.dtype)
            if grad_weight is not None and grad_weight.dtype == hidden.dtype:
                grad_weight.addmm_(delta.T, hidden[part])  # in place: no second (v, d)
            elif grad_weight is not None:
                grad_weight += delta.T @ hidden[part]
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None


def wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def chunks(num_tokens: int, weight: Tensor) -> list[slice]:
    size = max(CHUNK_BYTES, weight.nbytes // 2) // (4 * len(weight))
    return [slice(i, min(i + size, num_tokens)) for i in range(0, num_tokens, size)]


def log_softmax(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """As the sampler computes them: torch's own log_softmax is 2e-5 off at 131,072 tokens (CPU)."""
    logits = (hidden @ weight.T).to(wide(hidden)) / temperature  # (q, v)
    return logits.sub_(logits.logsumexp(-1, keepdim=True))


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0):
    """Log-probs of `targets` under softmax(weight @ hidden / T), over the full vocabulary.

    Args: hidden (..., d), weight (v, d) of the head, targets (...) token ids.
    Returns: log-probs (...) with gradient and entropy (...) in nats without, at least fp32.
    """
    shape = targets.shape
    out = ChunkedLogprobs.apply(hidden.flatten(0, -2), weight, targets.flatten(), temperature)
    return out[0].view(shape), out[1].view(shape)
