"""Sampling with the trainer's own modules: shared prefill, continuous batching, log-probs.

A prompt is prefilled once and its cache row copied to each of its rollouts. Rows that finish leave
at once, and waiting prompts move in. A draw uses one uniform number per row and position, a hash of
(seed, row id, rollout, position): it depends on neither batch, order nor rank, and leaves no
generator state to save.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from nanocascade.model.cache import Cache
from nanocascade.model.layers import widest
from nanocascade.model.model import Model
from nanocascade.model.moe import Routing

PREFILL_TOKENS = 16384  # prompt tokens of one prefill call
CPU_PREFILL_TOKENS = 2048  # fits a core's cache: 8,192 at once take 1.2 times as long
# For a small product, waking a second CPU thread costs more than it saves. Decoding uses one thread
# where width^2 * min(rows, 8) is at most this (measured for widths 128 to 1,024: up to width 256 at
# any number of rows, and width 512 up to 2 rows).
ONE_THREAD_WORK = 1 << 19


class Sample(NamedTuple):
    """One response: tokens include the stop token, logprobs are of softmax(logits / T), full
    vocabulary (greedy: T = 1). experts (t, l, a) covers prompt and response but the last token."""

    tokens: list[int]
    logprobs: list[float]
    truncated_logprobs: list[float] | None  # under the top-p / top-k distribution it was drawn from
    stop_reason: str  # "stop" | "length"
    experts: Tensor | None


def mix(x: Tensor) -> Tensor:
    """A 64-bit finaliser (xor-shift and multiply, as in splitmix64), x (...) int64 -> (...)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x


def hash_uniform(keys: Tensor, positions: Tensor) -> Tensor:
    """u in [0, 1) for each (key, position), both int64 (b,): (b,) fp64. On mps fp32,
    which may round to 1."""
    bits = mix(keys + positions * 0x1E3779B97F4A7C15)
    return ((bits >> 11) & ((1 << 53) - 1)).to(widest(bits.device)) / (1 << 53)


def sample_keys(seed: int, row_ids: Sequence[int], num_samples: int, device="cpu") -> Tensor:
    """(p, r) int64 keys of all rollouts; `seed` already holds the training step."""
    rows = torch.tensor(list(row_ids), dtype=torch.long, device=device)[:, None]  # (p, 1)
    rollouts = torch.arange(num_samples, device=device)  # (r,)
    base = mix(torch.tensor(seed, device=device) + 0x51ED270B)  # ()
    return mix(mix(mix(base + rows * 0x2545F4914F6CDD1D) + rollouts))


def truncate(p: Tensor, top_p: float, top_k: int) -> Tensor:
    """p (b, v) with everything outside the top-k, then outside the top-p nucleus, set to 0.

    The nucleus is the smallest set of best tokens whose mass reaches top_p; ties go by token id.
    """
    order = p.sort(dim=-1, descending=True, stable=True)
    kept = order.values  # (b, v)
    if top_k:
        kept = kept.where(torch.arange(p.shape[-1], device=p.device) < top_k, 0.0)
    mass_before = kept.cumsum(-1) - kept  # (b, v)
    kept = kept.where(mass_before < top_p * kept.sum(-1, keepdim=True), 0.0)
    return torch.zeros_like(p).scatter(-1, order.indices, kept)


def draw(logits: Tensor, u: Tensor, temperature: float, top_p: float, top_k: int):
    """Token, log-prob and truncated log-prob (each (b,)) for logits (b, v) and uniforms u (b,)."""
    scaled = logits / temperature if temperature > 0 else logits  # (b, v)
    normalizer = scaled.logsumexp(-1, keepdim=True)  # (b, 1)
    if temperature == 0:
        tokens = scaled.argmax(-1)  # (b,)
        logprobs = (scaled.gather(1, tokens[:, None]) - normalizer)[:, 0]
        return tokens, logprobs, None
    p = (scaled - normalizer).exp_()  # (b, v)
    truncated = top_p < 1 or top_k > 0
    if truncated:
        p = truncate(p, top_p, top_k)
    cdf = p.cumsum(-1) if truncated else p.cumsum_(-1)  # (b, v)
    point = u.to(cdf.dtype)[:, None] * cdf[:, -1:]  # (b, 1)
    tokens = torch.searchsorted(cdf, point, right=True)[:, 0]  # (b,) first with cdf > point
    # Rounding may put the point on the very end of the cdf: take the last token with any mass.
    mass = cdf[:, -1:].contiguous()  # (b, 1)
    last = torch.searchsorted(cdf, mass)[:, 0]  # (b,) first with all of it
    tokens = torch.minimum(tokens, last)
    logprobs = (scaled.gather(1, tokens[:, None]) - normalizer)[:, 0]  # (b,)
    within = (p.gather(1, tokens[:, None]) / cdf[:, -1:]).log()[:, 0] if truncated else None
    return tokens, logprobs, within


@contextmanager
def fitting_threads(width: int, rows: int):
    """Use one CPU thread while a model of hidden size `width` decodes `rows` rows."""
    before = torch.get_num_threads()
    if width**2 * min(rows, 8) <= ONE_THREAD_WORK:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Row:
    """A response that is being decoded, in one row of the cache."""

    prompt: int  # index of its prompt
    response: int  # index among those of the prompt
    prompt_tokens: list[int]
    limit: int  # new tokens at most
    key: int  # of its random numbers
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    truncated_logprobs: list[float] = field(default_factory=list)
    experts: list[Tensor] = field(default_factory=list)  # (t, l, a) of what was fed, in host memory

    def sample(self, stopped: bool) -> Sample:
        return Sample(
            self.tokens,
            self.logprobs,
            self.truncated_logprobs or None,
            "stop" if stopped else "length",
            torch.cat(self.experts) if self.experts else None,
        )


class Decoder:
    """The responses that are decoded together: rows[i] is row i of the cache."""

    def __init__(
        self,
        model: Model,
        max_rows: int,
        max_len: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        return_experts: bool = False,
    ):
        self.model, self.return_experts = model, return_experts
        self.draw = partial(draw, temperature=temperature, top_p=top_p, top_k=top_k)
        self.device, self.dtype = model.embed.weight.device, model.embed.weight.dtype
        self.prefill_tokens = CPU_PREFILL_TOKENS if self.device.type == "cpu" else PREFILL_TOKENS
        self.cache = Cache(model.config, max_rows, max_len, self.dtype, self.device)
        self.rows: list[Row] = []

    def tensor(self, values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)

    def new_routing(self) -> Routing | None:
        return Routing(self.model.config.num_moe_layers) if self.return_experts else None

    def admit(self, groups: list[list[Row]]) -> None:
        """Prefill the prompt of each group, packed, and start the group's rows."""
        lengths = [len(group[0].prompt_tokens) for group in groups]
        ids = self.tensor([[x for group in groups for x in group[0].prompt_tokens]])  # (1, n)
        segments = torch.repeat_interleave(self.tensor(lengths))[None]  # (1, n)
        cache = Cache(self.model.config, len(groups), max(lengths), self.dtype, self.device)
        routing = self.new_routing()
        hidden = self.model(ids, cache=cache, segments=segments, routing=routing)  # (1, n, d)
        logits = self.model.logits(hidden[0, self.tensor(lengths).cumsum(0) - 1])  # (p, v)
        source = self.tensor([i for i, group in enumerate(groups) for _ in group])  # (b,)
        rows = [row for group in groups for row in group]
        places = self.tensor(range(len(self.rows), len(self.rows) + len(rows)))  # (b,)
        self.rows += rows
        self.cache.use(len(self.rows))
        self.cache.write(places, cache, source)
        if routing is not None:
            for group, experts in zip(
                groups, routing.experts()[0].cpu().split(lengths), strict=True
            ):
                for row in group:
                    row.experts.append(experts)  # (t, l, a)
        self.draw_next(rows, logits[source])

    def step(self) -> None:
        """Feed every row its last token and draw the next one."""
        last = [[row.tokens[-1]] for row in self.rows]
        if not last:  # another rank has rows: decode padding with it
            self.cache.use(1)
            self.cache.lengths.zero_()
        ids, routing = self.tensor(last or [[0]]), self.new_routing()  # (b, 1)
        with fitting_threads(self.model.config.hidden_size, len(ids)):
            hidden = self.model(ids, cache=self.cache, routing=routing)  # (b, 1, d)
        if routing is not None:
            for row, experts in zip(self.rows, routing.experts().cpu(), strict=False):
                row.experts.append(experts)  # (1, l, a)
        self.draw_next(self.rows, self.model.logits(hidden[:, 0]))

    def draw_next(self, rows: list[Row], logits: Tensor) -> None:
        """Draw the next token of the rows from logits (b, v)."""
        keys = self.tensor([row.key for row in rows])  # (b,)
        positions = self.tensor([len(row.prompt_tokens) + len(row.tokens) for row in rows])  # (b,)
        drawn = self.draw(logits[: len(rows)], hash_uniform(keys, positions))  # (b,) each
        tokens, logprobs, truncated = (None if x is None else x.tolist() for x in drawn)
        for i, row in enumerate(rows):
            row.tokens.append(tokens[i])
            row.logprobs.append(logprobs[i])
            if truncated is not None:
                row.truncated_logprobs.append(truncated[i])

    def finish(self, stop_ids: Sequence[int]) -> list[tuple[Row, Sample]]:
        """Take out the rows that drew a stop token or have reached their limit; the last ones of
        the others move into their places."""
        finished, active = [], []
        for i, row in enumerate(self.rows):
            stopped = row.tokens[-1] in stop_ids
            if stopped or len(row.tokens) >= row.limit:
                finished.append((row, row.sample(stopped)))
            else:
                active.append(i)
        if finished:
            source = [i for i in active if i >= len(active)]
            target = sorted({*range(len(active))} - {*active})
            self.cache.write(self.tensor(target), self.cache, self.tensor(source))
            for i, j in zip(source, target, strict=True):
                self.rows[j] = self.rows[i]
            self.rows = self.rows[: len(active)]
            self.cache.use(len(active))
        return finished


@torch.inference_mode()
def generate(
    model: Model,
    prompts: list[list[int]],
    *,
    num_samples: int = 1,
    max_new_tokens: int | Sequence[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
    return_experts: bool = False,
    row_ids: Sequence[int] | None = None,
    max_rows: int = 512,
    on_sample: Callable[[int, int, Sample], None] | None = None,
    on_token: Callable[[int], None] | None = None,
    keep_going: Callable[[bool], bool] = bool,
) -> list[list[Sample]]:
    """Draw `num_samples` responses to each prompt from pi_inf: samples[p][r].

    Three prompts, two responses each and max_rows 4: the first two prompts are prefilled and their
    four rows decoded together, a token a step; when two rows have finished, the third prompt is
    prefilled and its two rows take the free places.

    max_new_tokens: one limit, or one a prompt. temperature 0 is greedy; top_k 0 and top_p 1 are
    off. row_ids: names of the prompts for the random hash. max_rows: rows decoded at once.
    on_sample gets (p, r, sample) as each response finishes, on_token each token of a single
    response. keep_going(rows are left) returns whether to continue decoding (ranks may have to
    end together).
    """
    limits = max_new_tokens
    if isinstance(limits, int):
        limits = [limits] * len(prompts)
    check_prompts(prompts, limits, model.config.max_position_embeddings)
    names = range(len(prompts)) if row_ids is None else row_ids
    keys = sample_keys(seed, names, num_samples).tolist()  # [p][r]

    # A prompt's responses start together, or, where they are more than the rows, in equal parts.
    part_size, num_rows = split_responses(len(prompts), num_samples, max_rows)
    waiting = deque()
    for p, prompt in enumerate(prompts):
        rows = [Row(p, r, prompt, limits[p], keys[p][r]) for r in range(num_samples)]
        waiting.extend(rows[r : r + part_size] for r in range(0, num_samples, part_size))

    max_len = max((len(x) + n for x, n in zip(prompts, limits, strict=True)), default=1)
    decoder = Decoder(model, num_rows, max_len, temperature, top_p, top_k, return_experts)
    samples = [[None] * num_samples for _ in prompts]
    while keep_going(bool(waiting or decoder.rows)):
        free = num_rows - len(decoder.rows)
        # Start rows only when an eighth of the places is free: each prefill call has a fixed cost.
        if waiting and len(waiting[0]) <= free and free * 8 >= num_rows:
            decoder.admit(take_groups(waiting, free, decoder.prefill_tokens))
        else:
            decoder.step()
        if on_token:
            on_token(decoder.rows[0].tokens[-1])
        for row, sample in decoder.finish(stop_ids):
            samples[row.prompt][row.response] = sample
            if on_sample is not None:
                on_sample(row.prompt, row.response, sample)
    return samples


def split_responses(num_prompts: int, num_samples: int, max_rows: int) -> tuple[int, int]:
    """(responses of a prompt that start together, rows decoded at once): 4 responses and 16 rows
    give (4, 16); of 64 responses and 32 rows, (32, 32), half of them at a time."""
    sizes = range(min(max_rows, num_samples), 0, -1)
    size = next(n for n in sizes if num_samples % n == 0)
    return size, max(min(max_rows, num_prompts * num_samples) // size, 1) * size


def take_groups(waiting: deque, free: int, budget: int) -> list[list[Row]]:
    """The first groups of rows that fit `free` places and, but for the first one, a prefill of
    `budget` prompt tokens."""
    groups, tokens = [], 0
    while waiting and len(waiting[0]) <= free:
        tokens += len(waiting[0][0].prompt_tokens)
        if groups and tokens > budget:
            break
        groups.append(waiting.popleft())
        free -= len(groups[-1])
    return groups


def check_prompts(prompts: list[list[int]], limits: list[int], context: int) -> None:
    for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        if not prompt or limit < 1 or len(prompt) + limit > context:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens; with {limit} new ones, at least 1, "
                f"it must fit the context of {context}, and it must not be empty"
            )


def step_seed(seed: int, step: int) -> int:
    """The sampler's seed of a step: another stream of draws for each (seed, step)."""
    return seed * 1_000_003 + step
