"""Packed documents: how a prompt's state reaches its responses.

Documents of any lengths stand one after another in a row of tokens. Projections, norms and experts
work token by token and need not know where a document ends; the mixers do. A document may continue
another one, its parent: a response continues its prompt, which is then computed once for all of its
responses. Three mixers look back over that boundary, each by reading rows of what the prompt has
computed in the same forward pass:

    attention   the keys of a response are those of its prompt, then its own   (attention_plan)
    conv        the inputs before a response's first ones are the prompt's last  (ScanPlan.inputs)
    scan        a response starts from the state at the end of its prompt      (ScanPlan.levels)

Reading is an indexed copy, so backward adds up the gradients of all responses by itself. Everything
here is integers, computed once a forward pass from the lengths of the documents:

    ids      5 6 7 | 8 9 | 8 4      a prompt and two responses
    lengths  3, 2, 2
    parents  -1, 0, 0               8 9 and 8 4 both continue 5 6 7
    positions  0 1 2 | 3 4 | 3 4
"""

from collections import defaultdict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

CAUSAL_KERNELS = ("cuda",)  # devices that need no mask where all queries are a document's last
# A call costs as much as 64 tokens: documents share one, sizes up to CALL_SHORT padded.
CALL_PADDING, CALL_SHORT = 16, 128


def gather(x: Tensor, index: Tensor) -> Tensor:
    """x[index] over the first axis of x (n, ...). As an embedding: backward then sums the gradients
    of a row that is read many times in a fixed order, in fp32."""
    return F.embedding(index, x.flatten(1)).unflatten(-1, x.shape[1:])


class Documents:
    """Lengths and parents of packed documents, and what follows from them; all on the CPU.

    lengths (o,): tokens of each document, in the order of the row; parents (o,): the index of the
    document that it continues, or -1. A parent has no parent itself.
    """

    def __init__(self, lengths: Tensor, parents: Tensor):
        assert len(lengths) == len(parents), f"{len(lengths)} documents, {len(parents)} parents"
        self.lengths, self.parents = lengths, parents
        self.starts = lengths.cumsum(0) - lengths  # (o,)
        child = parents >= 0  # (o,)
        assert (parents[parents[child]] < 0).all(), "the parent of a document has a parent"
        self.inherited = lengths[parents].where(child, 0)  # (o,) tokens of the parent
        self.num_tokens = int(lengths.sum())
        self.document = torch.repeat_interleave(lengths)  # (n,) which document a token is of
        self.offsets = torch.arange(self.num_tokens) - self.starts[self.document]  # (n,)
        self.positions = self.offsets + self.inherited[self.document]  # (n,)
        # The token before each, or n where there is none: of a response's first its prompt's last.
        before = torch.arange(-1, self.num_tokens)  # (n+1,)
        last = self.starts[parents] + self.inherited - 1  # (o,)
        before[self.starts] = last.where(child, self.num_tokens)
        before[-1] = self.num_tokens
        self.before = before


# ---- Attention -----------------------------------------------------------------------------------


class AttentionCall(NamedTuple):
    """Documents that attend in one call, padded to one shape: `inherited` keys, then `own`."""

    documents: int
    inherited: int
    own: int
    mask: Tensor | None  # (1 or documents, 1, own, inherited + own), or None for plain causal


class AttentionPlan(NamedTuple):
    queries: Tensor  # (sum of documents * own,) the token of each padded query
    keys: Tensor  # (sum of documents * (inherited + own),)
    answers: Tensor  # (n,) the place of each token among the padded queries
    calls: list[AttentionCall]


def attention_plan(documents: Documents, dtype, device) -> AttentionPlan:
    """Documents of like shapes share a call; long ones get a call of their own."""
    shapes = list(zip(documents.inherited.tolist(), documents.lengths.tolist(), strict=True))
    queries, keys, calls = [], [], []
    answers, size = torch.empty(len(shapes), dtype=torch.long), 0  # (o,) first query of each
    for members in share_calls(shapes):
        inherited = max(shapes[i][0] for i in members)
        own = max(shapes[i][1] for i in members)
        chosen = torch.tensor(members)  # (m,)
        # A padded place repeats the document's last token: no real query sees it.
        steps = torch.minimum(torch.arange(own), documents.lengths[chosen, None] - 1)  # (m, own)
        tokens = documents.starts[chosen, None] + steps  # (m, own)
        answers[chosen] = size + own * torch.arange(len(members))
        size += tokens.numel()
        queries.append(tokens.flatten())
        if inherited:
            parents = documents.parents[chosen, None].clamp(min=0)  # (m, 1)
            steps = torch.minimum(torch.arange(inherited), documents.lengths[parents] - 1)
            tokens = torch.cat([documents.starts[parents] + steps, tokens], 1)
        keys.append(tokens.flatten())
        mask = call_mask(documents.inherited[chosen], own, dtype, device)
        calls.append(AttentionCall(len(members), inherited, own, mask))
    answers = answers[documents.document] + documents.offsets  # (n,)
    queries, keys = torch.cat(queries), torch.cat(keys)
    return AttentionPlan(queries.to(device), keys.to(device), answers.to(device), calls)


def share_calls(shapes: list[tuple[int, int]]) -> list[list[int]]:
    """Documents (inherited, own) by call: short sizes are padded to multiples of CALL_PADDING.

    [(0, 30), (30, 5), (0, 2000), (30, 6)] -> [[0], [1, 3], [2]]
    """
    calls = defaultdict(list)
    for i, shape in enumerate(shapes):
        padded = (-(-n // CALL_PADDING) * CALL_PADDING if n <= CALL_SHORT else n for n in shape)
        calls[tuple(padded)].append(i)
    return list(calls.values())


def call_mask(inherited: Tensor, own: int, dtype, device):
    """Mask added to the scores of a call: 0 on keys that a query sees, -inf on the others.

    inherited (m,): real tokens of each document's parent. None: plain causal attention.
    """
    longest = int(inherited.max())
    if not longest:
        return None
    alike = int(inherited.min()) == longest
    if alike and device.type in CAUSAL_KERNELS:
        return causal_lower_right(own, longest + own)
    inherited = (inherited[:1] if alike else inherited).to(device)[:, None, None]  # (m, 1, 1)
    padding = torch.arange(longest, device=device) >= inherited  # (m, 1, inherited)
    later = torch.ones(own, own, dtype=torch.bool, device=device).triu(1)  # (own, own)
    later, padding = later.expand(len(inherited), -1, -1), padding.expand(-1, own, -1)
    hidden = torch.cat([padding, later], 2)[:, None]  # (m, 1, own, inherited + own)
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)


# ---- Scan ----------------------------------------------------------------------------------------


class ScanPlan(NamedTuple):
    """Chunks of q positions, each of one document, scanned level by level.

    A chunk's level is the number of chunks before it in its document and parent. The chunks are
    in this order, so that each step is a slice:

        continued   by level; the first `roots` of them, those of level 0, start from zeros
        last ones   of their documents, which nothing continues: their end state is not needed;
                    of these the final `lone` are whole documents that continue nothing either

    inputs (k, w-1+q): the token at each position, after the w-1 before it; n where there is none
    levels: for each level of continued chunks but that of the roots (m,), the chunk that each one
    continues, counted in the level before; lasts (m',): the same for the last chunks, counted over
    all continued ones.
    """

    inputs: Tensor
    valid: Tensor  # (k, q) False on padding
    roots: int
    levels: list[Tensor]
    lasts: Tensor
    lone: int


def chunk_length(lengths: Tensor, limit: int) -> int:
    """The chunk length, at most `limit`, that costs least for documents of these lengths (o,).

    A chunk of q positions costs about (q + limit)^2: the pairs of its positions, and what reads,
    writes and carries its state. So long documents take `limit`, and short ones little padding:
    of 18 tokens with limit 64 chunks of 20 take half the time (measured).
    """
    sizes = torch.tensor([*range(8, limit, 4), limit])  # (l,)
    counts = (lengths[:, None] + sizes - 1).div(sizes, rounding_mode="floor").sum(0)  # (l,)
    return int(sizes[(counts * (sizes + limit) ** 2).argmin()])


class Chunks(NamedTuple):
    """All chunks of q positions (k,): the document, the place in it, the chunk before (-1: none),
    and how many there are before it in document and parent."""

    document: Tensor
    place: Tensor
    previous: Tensor
    level: Tensor


def cut_chunks(documents: Documents, q: int) -> Chunks:
    """Two documents of 5 and 3 tokens, the second continuing the first, in chunks of 2: documents
    0 0 0 1 1, places 0 1 2 0 1, previous -1 0 1 2 3, levels 0 1 2 3 4."""
    parents, child = documents.parents, documents.parents >= 0  # (o,)
    counts = (documents.lengths + q - 1).div(q, rounding_mode="floor")  # (o,)
    ends = counts.cumsum(0)  # (o,)
    document = torch.repeat_interleave(counts)  # (k,)
    index = torch.arange(len(document))  # (k,)
    place = index - (ends - counts)[document]  # (k,)
    entry = (ends[parents] - 1).where(child, -1)  # (o,) what the first chunk continues
    previous = (index - 1).where(place > 0, entry[document])  # (k,)
    level = place + counts[parents].where(child, 0)[document]  # (k,)
    return Chunks(document, place, previous, level)


def scan_plans(documents: Documents, limit: int, window: int, span: int, device):
    """The chunks of packed documents: (plans, outputs). Beyond `span` positions a document is cut
    into several plans, each starting from the end states of the one before.

    outputs (n,): the place of each token among all chunks' positions.
    """
    q = chunk_length(documents.lengths, limit)
    chunks = cut_chunks(documents, q)
    document, place, previous, level = chunks
    steps = place[:, None] * q + torch.arange(q)  # (k, q)
    valid = steps < documents.lengths[document, None]  # (k, q)
    tokens = documents.starts[document, None] + steps  # (k, q)
    inputs = tokens.where(valid, documents.num_tokens)  # (k, q)
    for _ in range(window):
        inputs = torch.cat([documents.before[inputs[:, :1]], inputs], 1)  # (k, w-1+q)

    last = torch.ones(len(level), dtype=torch.bool)  # (k,) nothing continues it
    last[previous[previous >= 0]] = False
    lone = last & (previous < 0)  # (k,)
    depth = max(span // q, 1)  # levels of a plan
    top = int(level.max()) + 1
    key = (level // depth * 2 + last) * (top + 1) + level.where(~lone, top)  # (k,)
    order = key.argsort(stable=True)  # (k,)
    rank = order.argsort()  # (k,)
    carried = (~last)[order].cumsum(0)[rank] - 1  # (k,) place among the continued chunks
    sizes = torch.bincount(level[~last], minlength=top)  # (top,) continued chunks of each level
    firsts = sizes.cumsum(0) - sizes  # (top,)
    plans = []
    for low in range(0, top, depth):
        chosen = order[level[order] // depth == low // depth]  # (k',)
        levels = chosen[~last[chosen]].split(sizes[low : low + depth].tolist())
        levels = [
            carried[previous[x]] - firsts[low + j - 1]
            for j, x in enumerate(levels)
            if low + j > 0 and len(x)
        ]
        lasts = chosen[last[chosen] & ~lone[chosen]]
        lasts = carried[previous[lasts]] - firsts[max(low - 1, 0)]
        plan = ScanPlan(
            inputs[chosen].to(device),
            valid[chosen].to(device),
            int(sizes[0]) if low == 0 else 0,
            [x.to(device) for x in levels],
            lasts.to(device),
            int(lone[chosen].sum()),
        )
        plans.append(plan)
    outputs = torch.empty(documents.num_tokens, dtype=torch.long)  # (n,)
    outputs[tokens[valid]] = (rank[:, None] * q + torch.arange(q))[valid]
    return plans, outputs.to(device)
