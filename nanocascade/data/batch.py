"""Micro-batches: documents packed into rows of tensors."""

import bisect
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from nanocascade.data.episode import Rollout
from nanocascade.model.model import Model


def pack(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices of documents that share a row of at most `budget` tokens, by best fit, longest first:
    [5, 3, 6, 2], 8 -> [[2, 3], [0, 1]]."""
    rows, room = defaultdict(list), []  # room: (tokens left, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[i] > budget:
            raise ValueError(f"document {i} has {lengths[i]} tokens, a row takes {budget}")
        place = bisect.bisect_left(room, (lengths[i], -1))
        left, row = room.pop(place) if place < len(room) else (budget, len(rows))
        rows[row].append(i)
        bisect.insort(room, (left - lengths[i], row))
    return list(rows.values())


@dataclass
class Batch:
    """A micro-batch of packed rows; position j of a row predicts targets[:, j].

    mask marks the targets that carry loss, segments the documents (-1 = padding), response_ids the
    document's index in the step's list. Per-token tensors are (b, t).
    """

    ids: Tensor
    targets: Tensor
    segments: Tensor
    response_ids: Tensor
    mask: Tensor
    sampler_logprobs: Tensor
    advantages: Tensor
    experts: Tensor | None = None  # (b, t, l, a) recorded while sampling

    @property
    def valid(self) -> Tensor:
        return self.segments >= 0  # (b, t)


def step_batches(model: Model, dist, rollouts, micro_tokens: int, replay=False, row=256):
    """The micro-batches of this rank's rollouts, and empty ones until every rank has as many.

    A sharded forward is a collective: a rank without work runs it, with a zero loss, all the same.
    """
    batches = make_batches(rollouts, micro_tokens, dist.device, replay, row)
    missing = dist.in_step(len(batches)) - len(batches)
    if missing:
        layers = (model.config.num_moe_layers, model.config.num_experts_per_tok)
        experts = torch.zeros(2, *layers, dtype=torch.long) if replay else None  # (t, l, a)
        nobody = Rollout({"id": ""}, [0, 0], 2, [False] * 2, [0.0] * 2, experts=experts)
        empty = make_batches([nobody], 1, dist.device, replay, 1)[0]
        empty.segments[:] = -1  # padding: in no load either
        batches += [empty] * missing
    return batches


def make_batches(rollouts: list[Rollout], micro_tokens: int, device="cpu", replay=False, row=256):
    """Pack documents into rows of `row` tokens, rows into micro-batches of about `micro_tokens`.

    A document of n tokens is n - 1 predictions. Rows are longer where a document is, and no longer
    than a micro-batch where none is.
    """
    if not rollouts:  # a rank that dynamic filtering left without groups
        return []
    lengths = [len(x.tokens) - 1 for x in rollouts]
    if max(lengths) * len(lengths) <= 1.05 * sum(lengths):  # alike: a row each, nothing to mask
        row = 1
    width = max(max(lengths), min(row, micro_tokens))
    packed = pack(lengths, width)
    per_batch = max(micro_tokens // width, 1)
    layers = rollouts[0].experts.shape[1:] if replay else None
    batches = []
    for first in range(0, len(packed), per_batch):
        rows = packed[first : first + per_batch]
        t = max(sum(lengths[i] for i in members) for members in rows)
        ids, targets, responses = (torch.zeros(len(rows), t, dtype=torch.long) for _ in range(3))
        segments = torch.full((len(rows), t), -1)  # (b, t)
        mask = torch.zeros(len(rows), t, dtype=torch.bool)
        sampler, advantages = torch.zeros(len(rows), t), torch.zeros(len(rows), t)
        experts = torch.zeros(len(rows), t, *layers, dtype=torch.long) if replay else None
        for j, members in enumerate(rows):
            start = 0
            for k, i in enumerate(members):
                x, span = rollouts[i], slice(start, start + lengths[i])
                tokens = torch.tensor(x.tokens)
                ids[j, span], targets[j, span] = tokens[:-1], tokens[1:]
                segments[j, span], responses[j, span] = k, i
                mask[j, span] = torch.tensor(x.mask[1:]) & x.loss
                if x.sampler_logprobs:
                    sampler[j, span] = torch.tensor(x.sampler_logprobs[1:])
                advantages[j, span] = x.advantage
                if replay:
                    experts[j, span] = x.experts[: lengths[i]].cpu()
                start += lengths[i]
        tensors = (ids, targets, segments, responses, mask, sampler, advantages, experts)
        batches.append(Batch(*(None if x is None else x.to(device) for x in tensors)))
    return batches
