"""Micro-batches: documents packed into rows of tensors, a prompt once for all its responses."""

import bisect
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from nanocascade.data.episode import Document
from nanocascade.model.model import Model


def pack(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices of items that share a row of at most `budget` tokens, by best fit, longest first:
    [5, 3, 6, 2], 8 -> [[2, 3], [0, 1]]."""
    rows, room = defaultdict(list), []  # room: (tokens left, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[i] > budget:
            raise ValueError(f"item {i} has {lengths[i]} tokens, a row takes {budget}")
        place = bisect.bisect_left(room, (lengths[i], -1))
        left, row = room.pop(place) if place < len(room) else (budget, len(rows))
        rows[row].append(i)
        bisect.insort(room, (left - lengths[i], row))
    return list(rows.values())


@dataclass
class Batch:
    """A micro-batch: t tokens of packed documents, and n predictions of tokens that follow them.

    A prompt and two responses of it, [5 6 7] + [8 9 1] and [5 6 7] + [4]:

        ids      5 6 7 8 9      segments 0 0 0 1 1      parents -1, 0      copies 2 2 2 1 1
        targets  8 9 1 4        sources  2 3 4 2        response_ids 0 0 0 1

    segments (1, t): the document of each token; parents: for each document the one it continues, or
    -1; copies (1, t): responses that a token belongs to, 0 for padding. sources (1, n): the token
    whose hidden state predicts the target; response_ids (1, n): index in the step's list; mask
    (1, n): targets that carry loss. experts (1, t, l, a): recorded while sampling.
    """

    ids: Tensor
    segments: Tensor
    parents: list[int]
    copies: Tensor
    sources: Tensor
    targets: Tensor
    response_ids: Tensor
    mask: Tensor
    sampler_logprobs: Tensor
    advantages: Tensor
    experts: Tensor | None = None

    @property
    def valid(self) -> Tensor:
        return self.copies > 0  # (1, t)

    def to(self, device) -> "Batch":
        tensors = {k: x.to(device) for k, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **tensors)


class Group(NamedTuple):
    """Documents of a step that share a prompt."""

    prompt: int  # its length (0: no shared prompt)
    members: list[int]  # indices in the step's list
    size: int  # tokens of the prompt, once, and of all that follows it


def step_batches(
    model: Model, dist, documents, micro_tokens: int, replay=False, share=True
) -> list[Batch]:
    """The micro-batches of this rank's documents, and empty ones until every rank has as many.

    A sharded forward is a collective: a rank without work runs it too, with a zero loss.
    """
    batches = make_batches(documents, micro_tokens, dist.device, replay, share)
    missing = dist.in_step(len(batches)) - len(batches)
    if missing:
        layers = (model.config.num_moe_layers, model.config.num_experts_per_tok)
        experts = torch.zeros(1, *layers, dtype=torch.long) if replay else None  # (t, l, a)
        empty = Document({}, [0, 0], mask=[False, False], experts=experts)
        batch = make_batches([empty], 1, dist.device, replay)[0]
        batch.copies[:] = 0  # padding: in no load either
        batches += [batch] * missing
    return batches


def make_batches(
    documents: Sequence[Document], micro_tokens: int, device="cpu", replay=False, share=True
) -> list[Batch]:
    """Pack groups into micro-batches of `micro_tokens`, or of the longest document if it is longer.

    A document of n tokens is n - 1 inputs. share: documents with the same prompt form a group, and
    the prompt is in the micro-batch once; a group that is too large is cut, with its prompt in each
    part.
    """
    if not documents:  # a rank that dynamic filtering left without groups
        return []
    budget = max(micro_tokens, max(len(x.tokens) - 1 for x in documents))
    groups = make_groups(documents, budget, share)
    rows = pack([x.size for x in groups], budget)
    return [fill(documents, [groups[i] for i in row], replay).to(device) for row in rows]


def make_groups(documents: Sequence[Document], budget: int, share: bool) -> list[Group]:
    """Groups of at most `budget` tokens, in the order of their first members."""
    same_prompt, groups = defaultdict(list), []
    for i, x in enumerate(documents):
        prompt = tuple(x.tokens[: x.prompt_length]) if share else ()
        same_prompt[prompt or i].append(i)
    for members in same_prompt.values():
        prompt = documents[members[0]].prompt_length
        part, size = [], 0
        for i in members:
            response = len(documents[i].tokens) - 1 - prompt
            if part and size + response > budget:
                groups.append(Group(prompt, part, size))
                part, size = [], 0
            size += response if part else prompt + response
            part.append(i)
        groups.append(Group(prompt, part, size))
    return [x if len(x.members) > 1 else x._replace(prompt=0) for x in groups]


def fill(documents: Sequence[Document], groups: list[Group], replay: bool) -> Batch:
    """The micro-batch of some groups, token by token and target by target."""
    ids, segments, copies, parents, experts = [], [], [], [], []
    sources, targets, response_ids, mask, logprobs, advantages = [], [], [], [], [], []

    def add_tokens(x: Document, start: int, end: int, parent: int, num_copies: int) -> None:
        """Append tokens start .. end of x, as one document of the micro-batch."""
        length = end - start
        ids.extend(x.tokens[start:end])
        segments.extend([len(parents)] * length)
        copies.extend([num_copies] * length)
        parents.append(parent)
        if replay:
            experts.append(x.experts[start:end].cpu())

    for prompt, members, _ in groups:
        parent = len(parents) if prompt else -1
        if prompt:
            add_tokens(documents[members[0]], 0, prompt, -1, len(members))
        prompt_end = len(ids) - 1
        for i in members:
            x = documents[i]
            offset = len(ids) - prompt  # from a token's place in x to its place in the micro-batch
            last = len(x.tokens) - 1
            if prompt < last:  # a response of one token is predicted by its prompt alone
                add_tokens(x, prompt, last, parent, 1)
            first = max(x.prompt_length, 1)  # nothing predicts token 0
            places = list(range(offset + first - 1, offset + last))
            if prompt:
                places[0] = prompt_end
            sources.extend(places)
            targets.extend(x.tokens[first:])
            response_ids.extend([i] * len(places))
            mask.extend(flag and x.loss for flag in x.mask[first:])
            logprobs.extend(x.sampler_logprobs[first:] or [0.0] * len(places))  # SFT has none
            advantages.extend([x.advantage] * len(places))
    return Batch(
        ids=torch.tensor([ids]),
        segments=torch.tensor([segments]),
        parents=parents,
        copies=torch.tensor([copies]),
        sources=torch.tensor([sources]),
        targets=torch.tensor([targets]),
        response_ids=torch.tensor([response_ids]),
        mask=torch.tensor([mask]),
        sampler_logprobs=torch.tensor([logprobs]),
        advantages=torch.tensor([advantages]),
        experts=torch.cat(experts)[None] if replay else None,
    )
