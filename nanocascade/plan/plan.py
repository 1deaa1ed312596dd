"""Memory of a run: bytes of a rank by phase and kind.

Weights, gradients and moments are counted from shapes; what blocks need on top is metered by
meter.py and added up here. tests/test_plan.py holds the sums against real steps, and against a step
of the whole sharded model on imagined ranks; bench/gpu.py holds them against a GPU.
"""

from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import nn

from nanocascade.engine.distributed import Dist
from nanocascade.engine.lora import layers_of
from nanocascade.model.cache import Cache
from nanocascade.model.layers import KEEP_FP32
from nanocascade.model.mamba2 import SPAN
from nanocascade.model.model import Model, ModelConfig
from nanocascade.plan.meter import (
    HEAD,
    NODE,
    Trace,
    trace_block,
    trace_decoding,
    trace_draw,
    trace_head,
)
from nanocascade.sampler import PREFILL_TOKENS, parts
from nanocascade.stages import RL, SFT, TEACHER_OF, Stage

MEAN = 0.5  # mean length of a response as a share of its limit: assumed
RESERVE = 4e9  # bytes of a device left to its runtime, collectives, fragmentation; or an eighth
TRACED = 2 * SPAN, 3 * SPAN  # a trace of more tokens is the line through the traces of these


@dataclass
class Work:
    """The work of a rank in a step and in evaluations."""

    sequence: int  # tokens of the longest document
    width: int  # tokens of a packed row
    micro: int  # tokens of a micro-batch
    tokens: float  # tokens of a step, all ranks
    prompt: int = 1  # tokens of the longest prompt
    new: int = 0  # tokens that a response may have; 0: no rollouts
    rollouts: int = 0  # responses of a step, all ranks
    rows: int = 0  # rows decoded at once by a rank
    frozen: int = 0  # teachers, or the KL reference: in host memory but one, and that in training
    replay: bool = False  # the chosen experts are recorded
    eval_sequence: int = 0  # tokens of the longest evaluated document; 0: no evaluation
    eval_rows: int = 0  # rows decoded at once in evaluations


def work_of(
    recipe: Stage,
    config: ModelConfig,
    ranks: int,
    prompt: int,
    micro_tokens: int,
    max_rows: int,
    share_prompts: bool = True,
    eval_tokens: int = 0,
    eval_prompts: int = 1 << 20,
) -> Work:
    """prompt: tokens of the longest prompt. eval_tokens: new tokens of a response in evaluations,
    0 without them; eval_prompts: of one domain."""
    context, new = config.max_position_embeddings, getattr(recipe, "max_new_tokens", 0)
    evaluation = {}
    if eval_tokens:
        longest = min(prompt + max(eval_tokens, new), context)
        evaluation = {
            "eval_sequence": longest,
            "eval_rows": min(max_rows, -(-eval_prompts // ranks)),
        }
    if isinstance(recipe, SFT):
        width = recipe.row_tokens
        micro = max(width, min(micro_tokens, recipe.batch_tokens // ranks))
        return Work(width, width, micro, recipe.batch_tokens, prompt, **evaluation)
    if isinstance(recipe, RL):
        limit, frozen = recipe.max_tokens or context, int(recipe.kl_coef > 0)
    else:
        copies = {x.partition("=")[2] for x in recipe.teachers}  # one of each directory
        limit, frozen = context, len(copies) or len({*TEACHER_OF.values()})
    longest = min(prompt + new, limit)
    rollouts = recipe.prompts * recipe.rollouts
    response = MEAN * max(min(new, longest - prompt), 1)  # mean tokens of one
    together = 1  # responses that share their prompt: those of a group in one micro-batch
    if share_prompts:
        together = max(int((max(micro_tokens, longest) - prompt) / response), 1)
    tokens = recipe.prompts * -(-recipe.rollouts // together) * prompt + rollouts * response
    return Work(
        sequence=longest,
        width=max(longest, 256),
        micro=max(longest, min(micro_tokens, int(tokens / ranks))),
        tokens=tokens,
        prompt=min(prompt, longest),
        new=min(new, longest),
        rollouts=rollouts,
        rows=parts(-(-recipe.prompts // ranks), recipe.rollouts, max_rows)[1],
        frozen=frozen,
        replay=recipe.routing_replay,
        **evaluation,
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


def count_parameters(
    config: ModelConfig, dist: Dist, train_router: bool, lora_rank: int
) -> Parameters:
    shards = shards_of(dist)
    with torch.device("meta"):
        model = Model(config)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    computed = Counter()  # by block
    for name, n in sizes.items():
        block = name.split(".")[1] if name.startswith("blocks.") else ""
        computed[block] += n / (dist.expert_parallel if ".experts." in name else 1)
    total = sum(sizes.values())
    experts = sum(n for name, n in sizes.items() if ".experts." in name)
    islands = sum(n for name, n in sizes.items() if name.endswith(KEEP_FP32))  # never in shards
    dense, per_rank = total - experts - islands, experts / dist.expert_parallel
    local = (dense + experts) / shards + islands
    trained = local
    if lora_rank:
        layers = [layer for *_, layer in layers_of(model, nn.Linear)]
        trained = lora_rank * sum(x.in_features + x.out_features for x in layers)
    elif not train_router:
        trained -= sum(n for name, n in sizes.items() if name.endswith("gate.weight"))
    return Parameters(
        total=total,
        local=local,
        trained=trained,
        gathered=dense + per_rank,
        received=dense * (1 - 1 / shards) + per_rank * (1 - dist.expert_parallel / shards),
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


class Plan:
    """Bytes of a run in one layout; `traces` of blocks are shared with plans of other layouts."""

    def __init__(
        self,
        config: ModelConfig,
        work: Work,
        layout: dict,
        ranks: int,
        train_router=True,
        lora_rank=0,
        traces: dict | None = None,
    ):
        self.config, self.work, self.layout, self.ranks = config, work, layout, ranks
        self.train_router, self.lora_rank = train_router, lora_rank
        self.traces: dict[tuple, Trace] = {} if traces is None else traces
        expert_parallel = layout["expert_parallel"]
        if config.num_experts % expert_parallel or expert_parallel > NODE:
            raise ValueError(
                f"--expert_parallel {expert_parallel}: {config.num_experts} experts, {NODE} a node"
            )
        self.dist = Dist(0, ranks, "cpu", lora_rank > 0, **layout)
        self.parameters = count_parameters(config, self.dist, train_router, lora_rank)
        self.itemsize = self.dist.dtype.itemsize

    def changed(self, **changes) -> "Plan":
        """A plan with other work, layout or ranks."""
        values = {"work": self.work, "layout": self.layout, "ranks": self.ranks} | changes
        options = self.train_router, self.lora_rank, self.traces
        return Plan(self.config, values["work"], values["layout"], values["ranks"], *options)

    # ---- Traces ----

    def traced(self, function, kind: str, *sizes: int, **options) -> Trace:
        """The trace of a block or the head, made once for all layouts that do not change it."""
        layout = self.layout | {"offload_optimizer": False, "offload_blocks": False, "replicas": 1}
        key = function, kind, sizes, *options.items(), *layout.items()
        if key not in self.traces:
            blocks = (kind,) if kind != HEAD else ()
            self.traces[key] = function(self.config, *blocks, layout, *sizes, **options)
        return self.traces[key]

    def block(self, kind: str, tokens: int, grad=True) -> Trace:
        """A block on a micro-batch, or the head: forward and, with grad, backward."""
        if tokens > TRACED[1]:
            return stretched(*(self.block(kind, n, grad) for n in TRACED), tokens)
        if kind == HEAD:
            return self.traced(trace_head, HEAD, tokens)
        width = min(self.work.width, tokens)
        return self.traced(trace_block, kind, max(tokens // width, 1), width, grad=grad)

    def decoding(self, kind: str, rows: int, context: int) -> Trace:
        """A step of decoding in a block, or in the head with the draw."""
        if kind == HEAD:
            return self.traced(trace_draw, HEAD, rows)
        return self.traced(trace_decoding, kind, rows, context)

    # ---- Bytes ----

    def bytes(self, work: Work) -> dict[str, dict[str, float]]:
        """{phase: {kind: bytes}} of a rank's device in each phase of a run, and of its host."""
        dist, counts = self.dist, self.parameters
        moments = 8 * counts.trained
        one_frozen = self.itemsize * counts.total / shards_of(dist)  # without fp32 master weights
        weights = 4 * counts.local
        if self.lora_rank:  # the base is frozen, and serves teachers and reference too
            weights, one_frozen = self.itemsize * counts.local + 4 * counts.trained, 0
        static = {"weights": weights, "moments": 0 if dist.offload_optimizer else moments}
        # Plain data parallelism sums the gradients in one flat copy.
        copies = 1 if dist.sharded or self.ranks == 1 else 2
        training = static | {"gradients": 4 * counts.trained * copies}
        training["frozen"] = one_frozen * (work.frozen > 0)
        inputs = work.micro * self.config.hidden_size * self.itemsize * len(self.config.pattern)
        phases = {"training": training | self.activations(work)}
        if work.new:
            rollout = self.sampling(work.rows, work.sequence, work.prompt, work.replay)
            phases["rollout"] = static | rollout
        if work.eval_sequence:
            evaluation = self.sampling(work.eval_rows, work.eval_sequence, work.prompt)
            phases["evaluation"] = static | evaluation
        phases["host"] = {
            "moments": moments * dist.offload_optimizer,
            "frozen": one_frozen * work.frozen,
            "kept": inputs * dist.offload_blocks,
        }
        return phases

    def activations(self, work: Work) -> dict[str, float]:
        """The worst block's peak, while what all others keep for their backward is there."""
        dist, pattern, micro = self.dist, self.config.pattern, work.micro
        traces = {kind: self.block(kind, micro) for kind in {*pattern}}
        kept = {kind: trace.kept for kind, trace in traces.items()}
        if dist.checkpoint_blocks:
            kept = dict.fromkeys(traces, micro * self.config.hidden_size * self.itemsize)
        worst = max(trace.peak - kept[kind] for kind, trace in traces.items())
        stored = sum(kept[kind] for kind in pattern)
        if dist.offload_blocks:  # two blocks at a time are on the device
            stored = 2 * max(kept.values())
        # FSDP: embedding and head with its gradient; the block that is fetched while one computes,
        # and the fp32 sum of the last one's gradients. The block's own weights are in its peak.
        counts, itemsize = self.parameters, self.itemsize
        # No block makes the embedded tokens and the final norm's hidden states.
        hidden = 2 * micro * self.config.hidden_size * itemsize
        gathered = 1.5 * itemsize * counts.outside_blocks + (itemsize + 4) * counts.largest_block
        return {
            "gathered": gathered * dist.sharded,
            "kept": stored,
            "block": max(worst, self.block(HEAD, micro).peak + hidden),
        }

    def sampling(self, rows: int, sequence: int, prompt: int, replay=False) -> dict[str, float]:
        """Gathered weights, the rows' caches, and the larger of a decode step and a prefill."""
        config, kinds, new = self.config, {*self.config.pattern}, sequence - prompt
        row = self.cache_bytes(sequence) + 16 * new
        row += replay * new * 8 * config.num_moe_layers * config.num_experts_per_tok
        step = max(self.decoding(kind, rows, sequence).peak for kind in {*kinds, HEAD})
        prefill = max(min(PREFILL_TOKENS, rows * prompt), prompt)
        fill = max(self.block(kind, prefill, grad=False).peak for kind in kinds)
        fill += prefill // prompt * self.cache_bytes(prompt)  # copied into the rows afterwards
        gathered = self.itemsize * self.parameters.gathered * self.dist.sharded
        return {"gathered": gathered, "kept": rows * row, "block": max(step, fill)}

    def cache_bytes(self, tokens: int) -> int:
        return Cache(self.config, 1, tokens, self.dist.dtype, "meta").bytes

    def peak(self, **changes) -> float:
        """Bytes of the device in the worst phase, with other work where asked."""
        phases = self.bytes(replace(self.work, **changes))
        return max(sum(x.values()) for phase, x in phases.items() if phase != "host")

    def training_peak(self, **changes) -> float:
        return self.peak(new=0, eval_sequence=0, **changes)

    def longest_document(self, memory: float) -> int:
        """Tokens of the longest document that can be trained on."""
        low, high = 0, 1 << 12  # times 256
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.training_peak(sequence=256 * middle, micro=256 * middle) <= usable(memory)
            low, high = (middle, high) if fits else (low, middle - 1)
        return 256 * low

    def most_rows(self, memory: float) -> int:
        """The most rows that can be decoded at once, in rollouts and in evaluations."""
        most = []
        one_row, many_rows = (self.bytes(replace(self.work, rows=n, eval_rows=n)) for n in (1, 65))
        for phase in {"rollout", "evaluation"} & {*one_row}:
            one = sum(one_row[phase].values())
            per_row = (sum(many_rows[phase].values()) - one) / 64  # activations aside this is exact
            most.append(max(int((usable(memory) - one) / per_row) + 1, 0))
        return min(most, default=0)
