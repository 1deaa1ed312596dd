"""Memory of a run: bytes of a rank by phase and kind.

Weights, gradients and moments are counted from shapes; what blocks need on top is metered by
meter.py and added up here. tests/test_plan.py holds the sums against real steps, and against a step
of the whole sharded model on imagined ranks; bench/gpu.py holds them against a GPU.
"""

from bisect import bisect_left
from collections import Counter
from dataclasses import astuple, dataclass, field, replace

import torch
from torch import nn

from nanocascade.engine.distributed import Dist, Layout
from nanocascade.engine.lora import layers_of
from nanocascade.model.cache import Cache
from nanocascade.model.layers import KEEP_FP32
from nanocascade.model.model import Model, ModelConfig
from nanocascade.model.scan import SPAN
from nanocascade.plan.meter import HEAD, NODE, Trace, trace_block, trace_decoding
from nanocascade.sampler import PREFILL_TOKENS, split_responses
from nanocascade.stages import RL, SFT, TEACHER_OF, Stage

MEAN = 0.5  # mean length of a response as a share of its limit: assumed
RESERVE = 4e9  # bytes of a device left to its runtime, collectives, fragmentation; or an eighth
TRACED = 2 * SPAN, 3 * SPAN  # a trace of more tokens is the line through the traces of these


@dataclass(frozen=True)
class Sampling:
    """What a rank samples, in the rollouts of a step or in an evaluation."""

    rows: int  # decoded at once
    prompt: int  # tokens of the longest prompt
    new: int  # tokens that a response may have
    replay: bool = False  # the chosen experts are recorded


@dataclass(frozen=True)
class Work:
    """The work of a step and of evaluations."""

    sequence: int  # tokens of the longest document
    width: int  # tokens of a packed row
    micro: int  # tokens of a micro-batch of a rank
    tokens: float  # tokens of a step, all ranks
    rollouts: int = 0  # responses of a step, all ranks
    frozen: int = 0  # teachers, or the KL reference: in host memory but one, and that in training
    sampling: dict[str, Sampling] = field(default_factory=dict)  # by phase


def work_of(recipe: Stage, run, evaluation, config: ModelConfig, ranks: int, prompt: int) -> Work:
    """The work of a script's settings. prompt: tokens of the longest prompt."""
    context, sampling = config.max_position_embeddings, {}
    new = getattr(recipe, "max_new_tokens", 0)
    longest = min(prompt + new, getattr(recipe, "max_tokens", 0) or context)
    prompt = min(prompt, longest)
    if new:
        rows = split_responses(-(-recipe.prompts // ranks), recipe.rollouts, run.max_rows)[1]
        sampling["rollout"] = Sampling(rows, prompt, longest - prompt, recipe.routing_replay)
    if evaluation.eval_data:
        prompts = max(evaluation.own_eval_samples, evaluation.eval_samples)  # of one domain
        rows = min(run.max_rows, -(-prompts // ranks))
        response = min(max(evaluation.eval_max_new_tokens, new), context - prompt)
        sampling["evaluation"] = Sampling(rows, prompt, response)
    if isinstance(recipe, SFT):
        width = recipe.row_tokens
        micro = max(width, min(run.micro_tokens, recipe.batch_tokens // ranks))
        return Work(width, width, micro, recipe.batch_tokens, sampling=sampling)
    response = MEAN * max(longest - prompt, 1)  # mean tokens of one
    together = 1  # responses that share their prompt: those of a group in one micro-batch
    if run.share_prompts:
        together = max(int((max(run.micro_tokens, longest) - prompt) / response), 1)
    rollouts = recipe.prompts * recipe.rollouts
    tokens = recipe.prompts * -(-recipe.rollouts // together) * prompt + rollouts * response
    if isinstance(recipe, RL):
        frozen = int(recipe.kl_coef > 0)
    else:  # one of each directory
        frozen = len({x.partition("=")[2] for x in recipe.teachers} or {*TEACHER_OF.values()})
    return Work(
        sequence=longest,
        width=max(longest, 256),
        micro=max(longest, min(run.micro_tokens, int(tokens / ranks))),
        tokens=tokens,
        rollouts=rollouts,
        frozen=frozen,
        sampling=sampling,
    )


@dataclass
class Parameters:
    """Numbers of parameters: of the model, and of what one rank does with them."""

    total: int
    local: float  # that a rank holds between steps
    trained: float  # that a rank has gradients and moments of
    gathered: float  # that a rank computes with: all, but of the experts only its own
    received: float  # of the gathered ones, those that other ranks hold
    outside_blocks: float  # embedding, head and last norm
    largest_block: float  # as gathered


def count_parameters(config, dist: Dist, train_router: bool, lora_rank: int) -> Parameters:
    with torch.device("meta"):
        model = Model(config)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    total = sum(sizes.values())
    islands = sum(n for name, n in sizes.items() if name.endswith(KEEP_FP32))  # never in shards
    sharded = (total - islands) / shards_of(dist)
    computed = Counter()  # by block; "": outside of blocks
    for name, n in sizes.items():
        block = name.split(".")[1] if name.startswith("blocks.") else ""
        computed[block] += n / (dist.expert_parallel if ".experts." in name else 1)
    gathered = computed.total() - islands
    trained = sharded + islands
    if lora_rank:
        layers = [layer for *_, layer in layers_of(model, nn.Linear)]
        trained = lora_rank * sum(x.in_features + x.out_features for x in layers)
    elif not train_router:
        trained -= sum(n for name, n in sizes.items() if name.endswith("gate.weight"))
    return Parameters(
        total=total,
        local=sharded + islands,
        trained=trained,
        gathered=gathered,
        received=gathered - sharded,
        outside_blocks=computed.pop(""),
        largest_block=max(computed.values()),
    )


def shards_of(dist: Dist) -> int:
    """Ranks that share one copy of the weights."""
    return dist.world_size // dist.replicas if dist.sharded else 1


def stretched(short: Trace, long: Trace, tokens: int) -> Trace:
    """The trace of so many tokens, on the line through those of TRACED."""
    steps, times = (tokens - TRACED[0]) / (TRACED[1] - TRACED[0]), tokens / TRACED[1]
    return Trace(
        kept=short.kept + (long.kept - short.kept) * steps,
        peak=short.peak + (long.peak - short.peak) * steps,
        operations=[(flops * times, size * times) for flops, size in long.operations],
    )


def usable(memory: float) -> float:
    """Bytes of a device that a plan may fill."""
    return memory - min(RESERVE, memory / 8)


@dataclass
class Plan:
    """A run in one layout. Plans that replace() makes of each other share the traces of blocks."""

    config: ModelConfig
    work: Work
    layout: Layout
    ranks: int
    train_router: bool = True
    lora_rank: int = 0
    traces: dict[tuple, Trace] = field(default_factory=dict)

    def __post_init__(self):
        experts, expert_parallel = self.config.num_experts, self.layout.expert_parallel
        if experts % expert_parallel or expert_parallel > NODE:
            raise ValueError(
                f"--expert_parallel {expert_parallel}: {experts} experts, {NODE} a node"
            )
        self.dist = Dist(0, self.ranks, "cpu", self.lora_rank > 0, **vars(self.layout))
        self.parameters = count_parameters(
            self.config, self.dist, self.train_router, self.lora_rank
        )
        self.itemsize = self.dist.dtype.itemsize

    def with_work(self, **changes) -> "Plan":
        return replace(self, work=replace(self.work, **changes))

    def with_rows(self, rows: int) -> "Plan":
        """The plan with so many rows decoded at once, in rollouts and in evaluations."""
        sampling = {phase: replace(x, rows=rows) for phase, x in self.work.sampling.items()}
        return self.with_work(sampling=sampling)

    # ---- Traces ----

    def traced(self, trace, kind: str, *sizes) -> Trace:
        """trace(config, kind, layout, *sizes), made once for all layouts that do not change it."""
        layout = replace(self.layout, replicas=1, offload_blocks=False, offload_optimizer=False)
        if kind != "E":
            layout.expert_parallel = 1
        key = trace, kind, sizes, astuple(layout)
        if key not in self.traces:
            self.traces[key] = trace(self.config, kind, layout, *sizes)
        return self.traces[key]

    def block(self, kind: str, tokens: int, grad=True) -> Trace:
        """A block or the head on a micro-batch: forward and, with grad, backward."""
        if tokens > TRACED[1]:
            return stretched(*(self.block(kind, n, grad) for n in TRACED), tokens)
        width = min(self.work.width, tokens)
        return self.traced(trace_block, kind, tokens // width, width, grad)

    def decoding(self, kind: str, rows: int, context: int) -> Trace:
        """A step of decoding in a block, or in the head with the draw."""
        return self.traced(trace_decoding, kind, rows, context)

    # ---- Bytes ----

    def bytes(self) -> dict[str, dict[str, float]]:
        """{phase: {kind: bytes}} of a rank's device in each phase of a run, and of its host."""
        dist, counts, work = self.dist, self.parameters, self.work
        weights, moments = 4 * counts.local, 8 * counts.trained
        one_frozen = self.itemsize * counts.total / shards_of(dist)  # without fp32 master weights
        if self.lora_rank:  # the base is frozen, and serves teachers and reference too
            weights, one_frozen = self.itemsize * counts.local + 4 * counts.trained, 0
        static = {"weights": weights, "moments": 0 if dist.offload_optimizer else moments}
        # Plain data parallelism sums the gradients in one flat copy.
        copies = 1 if dist.sharded or self.ranks == 1 else 2
        gradients = {"gradients": 4 * counts.trained * copies}
        frozen = {"frozen": one_frozen * (work.frozen > 0)}
        phases = {"training": static | gradients | frozen | self.activations()}
        for phase, sampling in work.sampling.items():
            phases[phase] = static | self.sampling(sampling)
        phases["host"] = {
            "moments": moments * dist.offload_optimizer,
            "frozen": one_frozen * work.frozen,
            "kept": self.block_input() * len(self.config.pattern) * dist.offload_blocks,
        }
        return phases

    def block_input(self) -> int:
        """Bytes of the hidden states of a micro-batch."""
        return self.work.micro * self.config.hidden_size * self.itemsize

    def activations(self) -> dict[str, float]:
        """The worst block's peak, while what all others keep for their backward is there."""
        dist, pattern, micro = self.dist, self.config.pattern, self.work.micro
        traces = {kind: self.block(kind, micro) for kind in {*pattern}}
        kept = {kind: trace.kept for kind, trace in traces.items()}
        if dist.checkpoint_blocks:
            kept = dict.fromkeys(traces, self.block_input())
        worst = max(trace.peak - kept[kind] for kind, trace in traces.items())
        stored = sum(kept[kind] for kind in pattern)
        if dist.offload_blocks:  # two blocks at a time are on the device
            stored = 2 * max(kept.values())
        # FSDP: embedding and head with its gradient; the block that is fetched while one computes,
        # and the fp32 sum of the last one's gradients. The block's own weights are in its peak.
        counts, itemsize = self.parameters, self.itemsize
        gathered = 1.5 * itemsize * counts.outside_blocks + (itemsize + 4) * counts.largest_block
        # No block makes the embedded tokens and the final norm's hidden states.
        head = self.block(HEAD, micro).peak + 2 * self.block_input()
        return {"gathered": gathered * dist.sharded, "kept": stored, "block": max(worst, head)}

    def sampling(self, work: Sampling) -> dict[str, float]:
        """Gathered weights, the rows' caches, and the larger of a decode step and a prefill."""
        config, kinds, prompt = self.config, {*self.config.pattern}, work.prompt
        sequence = prompt + work.new
        row = self.cache_bytes(sequence) + 16 * work.new
        row += work.replay * work.new * 8 * config.num_moe_layers * config.num_experts_per_tok
        step = max(self.decoding(kind, work.rows, sequence).peak for kind in {*kinds, HEAD})
        prefill = max(min(PREFILL_TOKENS, work.rows * prompt), prompt)
        fill = max(self.block(kind, prefill, grad=False).peak for kind in kinds)
        fill += prefill // prompt * self.cache_bytes(prompt)  # copied into the rows afterwards
        gathered = self.itemsize * self.parameters.gathered * self.dist.sharded
        return {"gathered": gathered, "kept": work.rows * row, "block": max(step, fill)}

    def cache_bytes(self, tokens: int) -> int:
        return Cache(self.config, 1, tokens, self.dist.dtype, "meta").bytes

    # ---- What fits ----

    def peak(self) -> float:
        """Bytes of the device in the worst phase."""
        return max(sum(x.values()) for phase, x in self.bytes().items() if phase != "host")

    def trains(self, micro: int, memory: float) -> bool:
        """Whether micro-batches of so many tokens fit."""
        return self.with_work(micro=micro, sampling={}).peak() <= usable(memory)

    def longest_document(self, memory: float) -> int:
        """Tokens of the longest document that can be trained on, in steps of 256."""
        lengths = range(256, 256 << 12, 256)
        return 256 * bisect_left(lengths, True, key=lambda n: not self.trains(n, memory))

    def most_rows(self, memory: float) -> int:
        """The most rows that can be decoded at once, in rollouts and in evaluations."""
        most = []
        one_row, many_rows = (self.with_rows(n).bytes() for n in (1, 65))
        for phase in self.work.sampling:
            one = sum(one_row[phase].values())
            per_row = (sum(many_rows[phase].values()) - one) / 64  # activations aside this is exact
            most.append(max(int((usable(memory) - one) / per_row) + 1, 0))
        return min(most, default=0)
