"""The recurrence of Mamba-2: a chunked scan for packed documents, one step for decoding.

A head at a time, with state h (c, s), input x (c), and B, C (s) shared by a group:

    h_t = exp(dt_t * A) h_{t-1} + dt_t * outer(x_t, B_t)          y_t = h_t C_t + D x_t

`chunk_scan` computes the same numbers q positions at a time: within a chunk as masked attention
(a matmul), between chunks by carrying h. The chunk length changes speed, not results. `scan_plan`
says which chunks there are and which chunk continues which.
"""

import math
from itertools import chain, groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from nanocascade.model.documents import Documents, take_rows

SPAN = 8192  # positions of a document that are scanned at once
CPU_CHUNK = 64  # a core's cache holds 64 x 64 weights of all heads; a GPU takes the published 128

# ---- Plan ----------------------------------------------------------------------------------------


class Chunk(NamedTuple):
    """At most q tokens of one document."""

    inputs: list[int]  # w-1+q places: the w-1 tokens before the chunk, then its own; n: no token
    previous: int | None  # the chunk that it continues
    level: int  # number of chunks before it, in its document and the parent


class ScanPart(NamedTuple):
    """Chunks that are scanned at once, z of them, in this order:

        roots    start from zeros and are continued
        levels   continued too; those of a level continue chunks of the level before
        lasts    continue a chunk, and nothing continues them: their end state is not needed
        alone    whole documents: they start from zeros, and nothing continues them

    A document of 3 tokens, its child of 3 and another one of 1, in chunks of 2: 01 is a root, 2 and
    34 are levels of one chunk each, 5 is a last one and 6 is alone.
    """

    inputs: Tensor  # (z, w-1+q) as of each Chunk
    roots: int
    levels: list[Tensor]  # of each level (j,): the place in the level before that each continues
    lasts: Tensor  # (j,) the same for the lasts, counted over all chunks that are continued
    alone: int


class ScanPlan(NamedTuple):
    parts: list[ScanPart]  # each starts from the end states of the last level of the one before
    outputs: Tensor  # (n,) the place of each token among the positions of all chunks
    windows: Tensor  # (o, w-1) the last tokens of each document: what its conv sees next
    end_places: Tensor  # (o,) of each document's last chunk among all continued ones, or empty


def chunk_length(lengths: list[int], limit: int) -> int:
    """The chunk length, at most `limit`, that costs least for documents of these lengths.

    A chunk of q positions costs about (q + limit)^2: the pairs of its positions, and what reads,
    writes and carries its state. So long documents take `limit`, and short ones little padding:
    of 18 tokens with limit 64 chunks of 20 take half the time (measured).
    """

    def cost(q: int) -> int:
        return sum(-(-n // q) for n in lengths) * (q + limit) ** 2

    return min([*range(8, limit, 4), limit], key=cost)


def cut_chunks(documents: Documents, q: int, window: int) -> tuple[list[Chunk], list, list]:
    """All chunks, and for each document its last chunk and its last `window` tokens.

    Documents of 3 and 1 tokens, the second continuing the first, with q 2 and window 1 (4 is none):
    inputs [4 0 1], [1 2 4] and [2 3 4], previous None, 0 and 1, levels 0, 1 and 2, windows [2] and
    [3].
    """
    none = documents.num_tokens
    chunks, last_chunks, windows = [], [], []
    for i, parent in enumerate(documents.parents):
        previous = last_chunks[parent] if parent >= 0 else None
        before = windows[parent] if parent >= 0 else [none] * window
        row = before + documents.places(i) + [none] * q
        for start in range(0, documents.lengths[i], q):
            level = chunks[previous].level + 1 if previous is not None else 0
            chunks.append(Chunk(row[start : start + window + q], previous, level))
            previous = len(chunks) - 1
        last_chunks.append(previous)
        windows.append(row[documents.lengths[i] :][:window])
    return chunks, last_chunks, windows


def scan_plan(documents: Documents, limit: int, window: int, device, keep_ends=False) -> ScanPlan:
    """The plan of packed documents, in chunks of at most `limit` positions.

    keep_ends: the state at the end of every document is wanted. Beyond SPAN positions a document is
    cut into several parts.
    """
    q = chunk_length(documents.lengths, limit)
    chunks, last_chunks, windows = cut_chunks(documents, q, window)
    continued = {x.previous for x in chunks}
    if keep_ends:
        continued.update(last_chunks)
    by_level = sorted(range(len(chunks)), key=lambda i: chunks[i].level)
    places = {}  # of each continued chunk among all of them
    parts, level_before = [], []
    for _, members in groupby(by_level, lambda i: chunks[i].level // max(SPAN // q, 1)):
        levels, lasts, alone = sort_chunks(chunks, list(members), continued)
        places |= {i: len(places) + n for n, i in enumerate(chain(*levels))}
        readable = [level_before, *levels] if level_before else levels  # each continues the former
        previous_of_levels = [
            [places[chunks[i].previous] - places[former[0]] for i in level]
            for former, level in pairwise(readable)
        ]
        first_readable = places[readable[0][0]] if readable else 0
        part = ScanPart(
            inputs=indices([chunks[i].inputs for i in chain(*levels, lasts, alone)], device),
            roots=len(levels[0]) if levels and not level_before else 0,
            levels=[indices(x, device) for x in previous_of_levels],
            lasts=indices([places[chunks[i].previous] - first_readable for i in lasts], device),
            alone=len(alone),
        )
        parts.append(part)
        level_before = readable[-1] if readable else []
    tokens = torch.cat([part.inputs[:, window:].flatten() for part in parts])  # (z*q,)
    outputs = torch.empty(documents.num_tokens + 1, dtype=torch.long, device=device)  # (n+1,)
    outputs[tokens] = torch.arange(len(tokens), device=device)  # the last one: of no token
    end_places = [places[i] for i in last_chunks] if keep_ends else []
    return ScanPlan(parts, outputs[:-1], indices(windows, device), indices(end_places, device))


def sort_chunks(chunks: list[Chunk], members: list[int], continued: set[int]):
    """Of the chunks `members`, ordered by level: those that are continued, a list for each level;
    the last ones of their documents; the whole documents."""
    inner = [i for i in members if i in continued]
    levels = [list(level) for _, level in groupby(inner, lambda i: chunks[i].level)]
    lasts = [i for i in members if i not in continued and chunks[i].previous is not None]
    alone = [i for i in members if i not in continued and chunks[i].previous is None]
    return levels, lasts, alone


def indices(values: list, device) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=device)


# ---- Scan ----------------------------------------------------------------------------------------


def chunk_scan(x, dt, A, B, C, part: ScanPart, state=None):
    """The recurrence above over chunks of q positions (without D x).

    Args:
        x: (z, q, h, c) inputs; dt: (z, q, h), 0 where a position must leave no trace; A: (h,) < 0;
        B, C: (z, q, g, s); part: the order of the chunks; state: (j, h, c, s) that the first level
        continues where there are no roots. All at least fp32.
    Returns: y (z, q, h, c) and the end states of the continued chunks, (j, h, c, s) of each level.
    Source: Mamba-2 (arXiv 2405.21060), section 6, with a tree of chunks of our own.
    """
    z, q, h, c = x.shape
    g, s = B.shape[-2:]
    # A head axis of (g, h/g) lets the heads of a group share B and C by broadcasting.
    xdt = (x * dt[..., None]).view(z, q, g, h // g, c).permute(0, 2, 3, 1, 4)  # (z, g, h/g, q, c)
    B = B.view(z, q, g, 1, s).permute(0, 2, 3, 1, 4)  # (z, g, 1, q, s)
    C = C.view(z, q, g, 1, s).permute(0, 2, 3, 1, 4)  # (z, g, 1, q, s)
    log_decay = (dt * A).view(z, q, g, h // g).permute(0, 2, 3, 1)  # (z, g, h/g, q)
    to_here = log_decay.cumsum(-1)  # (z, g, h/g, q) log decay from the chunk's start

    # Within chunks: attention with weights C_i.B_j * decay(j -> i) for j <= i.
    later = torch.ones(q, q, dtype=torch.bool, device=x.device).triu(1)  # (q, q)
    gap = (to_here[..., :, None] - to_here[..., None, :]).masked_fill(later, -math.inf)
    y = (C @ B.mT * gap.exp()) @ xdt  # (z, g, h/g, q, c)

    # Between chunks: what each continued chunk adds to the state, carried on level by level.
    sizes = [part.roots, *map(len, part.levels)]
    num_continued = sum(sizes)
    carried = to_here[:num_continued]  # (z', g, h/g, q), z' chunks are continued
    to_end = (carried[..., -1:] - carried).exp()  # (z', g, h/g, q)
    added = (xdt[:num_continued] * to_end[..., None]).mT @ B[:num_continued]  # (z', g, h/g, c, s)
    chunk_decay = carried[..., -1].exp()[..., None, None]  # (z', g, h/g, 1, 1)
    # split: the gradient of a slice would be a whole tensor of zeros for every level
    root_ends, *added = added.split(sizes)
    _, *chunk_decay = chunk_decay.split(sizes)
    ends = [root_ends if state is None else state.view(-1, *root_ends.shape[1:])]
    entries = []  # the states that the levels and the lasts continue
    for previous, new, share in zip(part.levels, added, chunk_decay, strict=True):
        entries.append(take_rows(ends[-1], previous))  # (j, g, h/g, c, s)
        ends.append(torch.addcmul(new, entries[-1], share))
    if len(part.lasts):
        entries.append(take_rows(torch.cat(ends), part.lasts))
    if entries:
        reading = slice(part.roots, z - part.alone)
        read = (C[reading] @ torch.cat(entries).mT) * to_here[reading].exp()[..., None]
        y[reading] += read  # (z'', g, h/g, q, c), z'' chunks read a state
    y = y.permute(0, 3, 1, 2, 4).reshape(z, q, h, c)
    return y, [x.view(-1, h, c, s) for x in (ends if state is None else ends[1:])]


def scan_step(x, dt, A, B, C, state):
    """The recurrence above for one position, without D x: the decoding path, and the reference.

    Args: x (b, h, c), dt (b, h), A (h,), B and C (b, g, s), state (b, h, c, s), which is updated in
    place: it is the largest thing that decoding touches. Returns: y (b, h, c).
    """
    b, h, c = x.shape
    g, s = B.shape[-2:]
    decay = (dt * A).exp()[..., None, None]  # (b, h, 1, 1)
    # Heads of a group share B and C: their channels are the rows of one matrix.
    xdt = (x * dt[..., None]).view(b * g, -1, 1)  # (b*g, h/g*c, 1)
    new = state.mul_(decay).view(b * g, -1, s)  # (b*g, h/g*c, s)
    new.baddbmm_(xdt, B.reshape(b * g, 1, s))
    return (new @ C.reshape(b * g, s, 1)).view(b, h, c)
