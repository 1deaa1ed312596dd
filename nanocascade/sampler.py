"""Sampling with the trainer's own modules: shared prefill, continuous batching, log-probs.

A prompt is prefilled once and its cache row copied to each of its rollouts. Rows that finish free
their place at once; waiting prompts move in, and when none wait the batch shrinks. A draw uses one
uniform number per row and position, a hash of (seed, row id, rollout, position): it depends on
neither batch, order nor rank, and leaves no generator state to save.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from nanocascade.model.cache import Cache
from nanocascade.model.layers import widest
from nanocascade.model.model import Model
from nanocascade.model.moe import Routing

PREFILL_TOKENS = 16384  # padded prompt tokens of one prefill call
CPU_PREFILL_TOKENS = 2048  # fits a core's cache: 8,192 at once take 1.2 times as long
# Waking a second CPU thread takes longer than its half of a small product. Decoding uses one thread
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
    """A 64-bit finaliser (xor-shift and multiply, as in splitmix64) over int64 tensors."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x


def hash_uniform(keys: Tensor, positions: Tensor) -> Tensor:
    """u in [0, 1) for each (key, position), both int64 (b,): (b,) fp64 (on mps fp32, to 1)."""
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


class Decoder:
    """The rows being decoded: their cache, their tokens so far, and the rollout of each row."""

    def __init__(self, model: Model, rows: int, max_len: int, max_new: int, options: dict):
        self.model, self.max_new, self.options = model, max_new, options
        weight = model.embed.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.prefill = CPU_PREFILL_TOKENS if self.device.type == "cpu" else PREFILL_TOKENS
        self.cache = Cache(model.config, rows, max_len, self.dtype, self.device)
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.state = {  # per row; everything of a row moves together when the batch shrinks
            "owner": torch.full((rows,), -1, device=self.device),  # flat rollout index, -1 = idle
            "key": torch.zeros(rows, dtype=torch.long, device=self.device),
            "count": torch.zeros(rows, dtype=torch.long, device=self.device),
            "limit": torch.zeros(rows, dtype=torch.long, device=self.device),
            "last": torch.zeros(rows, dtype=torch.long, device=self.device),
            "tokens": torch.zeros(rows, max_new, dtype=torch.long, device=self.device),
            "logprobs": torch.zeros(rows, max_new, dtype=wide, device=self.device),
            "within": torch.zeros(rows, max_new, dtype=wide, device=self.device),
        }
        if options["return_experts"]:
            shape = (rows, max_new, model.config.num_moe_layers, model.config.num_experts_per_tok)
            self.state["experts"] = torch.zeros(shape, dtype=torch.long, device=self.device)

    def routing(self) -> Routing | None:
        wanted = self.options["return_experts"]
        return Routing(self.model.config.num_moe_layers) if wanted else None

    def admit(self, prompts: list[list[int]], owners, keys, limits) -> list[Tensor]:
        """Prefill `prompts` and start owners, keys (p, r) of them in idle rows; limits (p,) tokens.

        Returns the experts (t, l, a) of each prompt's tokens, where they are asked for.
        """
        lengths = torch.tensor([len(x) for x in prompts], device=self.device)  # (p,)
        width = int(lengths.max())
        ids = torch.tensor([x + [0] * (width - len(x)) for x in prompts], device=self.device)
        valid = torch.arange(width, device=self.device) < lengths[:, None]  # (p, t)
        cache = Cache(self.model.config, len(prompts), width, self.dtype, self.device)
        routing = self.routing()
        hidden = self.model(ids, cache=cache, mask=valid, routing=routing)  # (p, t, d)
        ends = hidden[torch.arange(len(prompts), device=self.device), lengths - 1]  # (p, d)
        source = torch.arange(len(prompts), device=self.device).repeat_interleave(owners.shape[1])
        rows = (self.state["owner"] < 0).nonzero()[: len(source), 0]  # (p*r,)
        self.cache.write(rows, cache, source)
        self.state["owner"][rows] = owners.flatten()
        self.state["key"][rows] = keys.flatten()
        self.state["count"][rows] = 0
        self.state["limit"][rows] = limits[source]
        self.draw_next(rows, self.model.logits(ends)[source])
        if routing is None:
            return []
        return [x[:n] for x, n in zip(routing.experts(), lengths.tolist(), strict=True)]

    def step(self) -> None:
        """Feed every row its last token and draw the next one. Idle rows decode padding."""
        self.cache.lengths = self.cache.lengths.where(self.state["owner"] >= 0, 0)
        routing = self.routing()
        with fitting_threads(self.model.config.hidden_size, self.cache.rows):
            hidden = self.model(self.state["last"][:, None], cache=self.cache, routing=routing)
        if routing is not None:
            rows = torch.arange(self.cache.rows, device=self.device)
            at = (self.state["count"] - 1).clamp(0, self.max_new - 1)  # idle rows write anywhere
            self.state["experts"][rows, at] = routing.experts()[:, 0]
        self.draw_next(slice(None), self.model.logits(hidden[:, -1]))

    def draw_next(self, rows, logits: Tensor) -> None:
        """Draw the next token of `rows` from logits (b, v) and store it."""
        state, opt = self.state, self.options
        u = hash_uniform(state["key"][rows], self.cache.lengths[rows])  # (b,)
        drawn = draw(logits, u, opt["temperature"], opt["top_p"], opt["top_k"])
        count = state["count"][rows].clamp(max=self.max_new - 1)  # (b,)
        index = torch.arange(self.cache.rows, device=self.device)[rows]  # (b,)
        for name, values in zip(("tokens", "logprobs", "within"), drawn, strict=True):
            if values is not None:
                state[name][index, count] = values.to(state[name].dtype)
        state["last"][rows] = drawn[0]
        state["count"][rows] += 1

    def finished(self, stop_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Rows that are done, and which of them drew a stop token (others reached their limit)."""
        active = self.state["owner"] >= 0  # (b,)
        stopped = torch.isin(self.state["last"], stop_ids) & active  # (b,)
        done = stopped | (active & (self.state["count"] >= self.state["limit"]))
        rows = done.nonzero()[:, 0]
        return rows, stopped[rows]

    def collect(self, rows: Tensor, stopped: Tensor) -> list[tuple[int, Sample]]:
        """Take finished rows out: (owner, Sample) of each; the rows become idle."""
        take = {name: x[rows].tolist() for name, x in self.state.items() if name != "experts"}
        truncated = self.options["top_p"] < 1 or self.options["top_k"] > 0
        truncated = truncated and self.options["temperature"] > 0
        out = []
        for i, (owner, n, stop) in enumerate(
            zip(take["owner"], take["count"], stopped.tolist(), strict=True)
        ):
            within = take["within"][i][:n] if truncated else None
            experts = None
            if self.options["return_experts"]:
                experts = self.state["experts"][rows[i], : n - 1]  # the last token was never fed
            reason = "stop" if stop else "length"
            sample = Sample(take["tokens"][i][:n], take["logprobs"][i][:n], within, reason, experts)
            out.append((owner, sample))
        self.state["owner"][rows] = -1
        return out

    def shrink(self) -> None:
        """Drop idle rows: the last active ones move into the places of finished ones."""
        active = self.state["owner"] >= 0  # (b,)
        rows = int(active.sum())
        target = (~active[:rows]).nonzero()[:, 0]  # free places among the first
        source = active[rows:].nonzero()[:, 0] + rows  # as many rows beyond them
        self.cache.shrink(rows, source, target)
        for name, x in self.state.items():
            x[target] = x[source]
            self.state[name] = x[:rows]


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

    max_new_tokens: one limit, or one a prompt. temperature 0 is greedy; top_k 0 and top_p 1 are
    off. row_ids: names of the prompts for the random hash. max_rows: rows decoded at once.
    on_sample gets (p, r, sample) as each response finishes, on_token each token of a single
    response. keep_going(rows are left) returns whether to continue decoding (ranks may have to
    end together).
    """
    num_prompts, longest = len(prompts), max(map(len, prompts), default=0)
    limits = max_new_tokens
    if isinstance(limits, int):
        limits = [limits] * num_prompts
    check_prompts(prompts, limits, model.config.max_position_embeddings)
    options = dict(temperature=temperature, top_p=top_p, top_k=top_k, return_experts=return_experts)
    max_len = max((len(x) + n for x, n in zip(prompts, limits, strict=True)), default=1)
    part_size, num_rows = parts(num_prompts, num_samples, max_rows)
    decoder = Decoder(model, num_rows, max_len, max(limits, default=1), options)
    device = decoder.device

    # A prompt's responses start together, or, where they are more than the rows, in equal parts.
    parts_each = num_samples // part_size
    names = range(num_prompts) if row_ids is None else row_ids
    keys = sample_keys(seed, names, num_samples, device).view(-1, part_size)  # (parts, rows)
    owners = torch.arange(keys.numel(), device=device).view(-1, part_size)  # (parts, rows)
    part_prompts = [x for x in prompts for _ in range(parts_each)]
    part_limits = torch.tensor(limits, dtype=torch.long).repeat_interleave(parts_each).to(device)

    stops = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
    samples = [[None] * num_samples for _ in prompts]
    prompt_experts = []  # of each part: (t, l, a)
    started, active = 0, 0  # parts that have started, rows that are decoding
    while keep_going(started < len(part_prompts) or active > 0):
        waiting, free = len(part_prompts) - started, num_rows - active
        # Start parts only when an eighth of the rows is free: each prefill call has a fixed cost.
        if waiting and free >= part_size and (free * 8 >= num_rows or not active):
            fitting = max(decoder.prefill // longest, 1)
            end = started + min(free // part_size, fitting, waiting)
            chosen = slice(started, end)
            prompt_experts += decoder.admit(
                part_prompts[chosen], owners[chosen], keys[chosen], part_limits[chosen]
            )
            active += (end - started) * part_size
            started = end
        else:
            decoder.step()
        done, stopped = decoder.finished(stops)
        if on_token:
            on_token(int(decoder.state["last"][0]))
        for owner, sample in decoder.collect(done, stopped) if len(done) else ():
            if return_experts:
                experts = torch.cat([prompt_experts[owner // part_size], sample.experts])
                experts = experts.cpu()  # device memory holds only those of the rows being decoded
                sample = sample._replace(experts=experts)  # (t, l, a)
            prompt, response = divmod(owner, num_samples)
            samples[prompt][response] = sample
            if on_sample is not None:
                on_sample(prompt, response, sample)
        active -= len(done)
        if started == len(part_prompts) and active and len(done):
            decoder.shrink()
    return samples


def parts(num_prompts: int, num_samples: int, max_rows: int) -> tuple[int, int]:
    """(responses of a prompt that start together, rows decoded at once): 4 responses and 16 rows
    give (4, 16); of 64 responses and 32 rows, (32, 32), half of them at a time."""
    sizes = range(min(max_rows, num_samples), 0, -1)
    size = next(n for n in sizes if num_samples % n == 0)
    return size, max(min(max_rows, num_prompts * num_samples) // size, 1) * size


def check_prompts(prompts: list[list[int]], limits: list[int], context: int) -> None:
    for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        if not prompt or len(prompt) + limit > context:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens; with {limit} new ones it must fit "
                f"the context of {context}, and it must not be empty"
            )


def step_seed(seed: int, step: int) -> int:
    """The sampler's seed of a step: another stream of draws for each (seed, step)."""
    return seed * 1_000_003 + step
