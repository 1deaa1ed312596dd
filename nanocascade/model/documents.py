"""Packed documents: how a prompt's state reaches its responses.

Documents of any lengths stand one after another in a row of tokens. Projections, norms and experts
work token by token and need not know where a document ends; the mixers do. A document may continue
another one, its parent: a response continues its prompt, which is then computed once for all of its
responses. Three mixers look back over that boundary, each by reading rows of what the prompt has
computed in the same forward pass:

    attention   the keys of a response are those of its prompt, then its own        (attention.py)
    conv        the inputs before a response's first ones are the prompt's last     (scan.py)
    scan        a response starts from the state at the end of its prompt           (scan.py)

Reading is an indexed copy, so backward adds up the gradients of all responses by itself. The
indices are lists of integers, made once a forward pass from the lengths of the documents.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class Documents:
    """Lengths and parents of packed documents, in the order of the row.

        ids        5 6 7 | 8 9 | 8 4      a prompt and two responses
        lengths    3, 2, 2
        parents    -1, 0, 0               8 9 and 8 4 both continue 5 6 7
        starts     0, 3, 5                place of each document's first token
        inherited  0, 3, 3                tokens of the parent
        positions  0 1 2 | 3 4 | 3 4

    A parent comes before its children and has no parent itself.
    """

    def __init__(self, lengths: list[int], parents: list[int] | None = None):
        self.lengths = lengths
        self.parents = [-1] * len(lengths) if parents is None else parents
        self.num_tokens, self.starts, self.inherited = 0, [], []
        for i, (length, parent) in enumerate(zip(lengths, self.parents, strict=True)):
            assert parent < i and (parent < 0 or self.parents[parent] < 0), (i, parent)
            self.starts.append(self.num_tokens)
            self.inherited.append(lengths[parent] if parent >= 0 else 0)
            self.num_tokens += length

    def places(self, i: int) -> list[int]:
        """Places of document i's tokens in the row; none of document -1."""
        return list(range(self.starts[i], self.starts[i] + self.lengths[i])) if i >= 0 else []

    def positions(self) -> Tensor:
        """Position of each token in its document and parent (n,)."""
        spans = zip(self.inherited, self.lengths, strict=True)
        return torch.tensor([x for first, n in spans for x in range(first, first + n)])


def split_documents(segments: Tensor, parents: list[int] | None) -> Documents:
    """The documents of packed rows (b, t): [[4, 4, 7], [7, 7, 7]] are three, of 2, 1 and 3."""
    changed = torch.ones_like(segments, dtype=torch.bool)  # (b, t)
    changed[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = changed.flatten().nonzero()[:, 0].cpu()  # (o,)
    lengths = torch.diff(starts, append=torch.tensor([segments.numel()]))  # (o,)
    return Documents(lengths.tolist(), parents)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index] over the first axis of x (n, ...). As an embedding: backward then sums the gradients
    of a row that is read many times in a fixed order, in fp32."""
    return F.embedding(index, x.flatten(1)).unflatten(-1, x.shape[1:])
