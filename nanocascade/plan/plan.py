"""What a run costs before it starts: bytes a rank by kind, a layout that holds it, seconds a step.

Weights, gradients and moments are counted from shapes, what blocks need on top is metered by
meter.py and added up here; tests/test_plan.py holds the sums against real steps, and against a step
of the whole sharded model on imagined ranks. Times are a roofline of the metered operations: a
guess.
"""

import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nanocascade.checkpoint.hf_config import load_config
from nanocascade.cli import describe
from nanocascade.engine.device import find_device
from nanocascade.engine.distributed import Dist, Layout
from nanocascade.model.cache import Cache
from nanocascade.model.layers import KEEP_FP32
from nanocascade.model.mamba2 import SPAN
from nanocascade.model.model import Model
from nanocascade.plan.meter import (
    BYTES_REACHED,
    FLOPS_REACHED,
    NODE,
    Hardware,
    Trace,
    imaginary_node,
    trace,
)
from nanocascade.sampler import PREFILL_TOKENS, parts
from nanocascade.stages import RL, SFT, TEACHER_OF

FULL = Path(__file__).parent / "nemotron3_nano"  # config.json of the 30B-A3B, without weights
PROMPT = 2048  # tokens of the longest prompt, where no data say
MEAN = 0.5  # mean length of a response as a share of its limit: assumed, for times only
RESERVE = 4e9  # bytes of a device left to its runtime, to collectives and to fragmentation
TRACED = 2 * SPAN, 3 * SPAN  # tokens of the traces that the line of a longer one goes through
HARDWARE = {
    "H100": Hardware(80e9, 989e12, 3.35e12, 450e9, 50e9, 64e9),
    "H200": Hardware(141e9, 989e12, 4.8e12, 450e9, 50e9, 64e9),
}


@dataclass
class Work:
    """What a rank holds and does in a step, from the flags of a script."""

    sequence: int  # tokens of the longest document
    width: int  # of a packed row
    micro: int  # of a micro-batch
    tokens: float  # of a step, all ranks
    new: int = 0  # tokens a response may have; 0: no rollouts
    rollouts: int = 0  # responses of a step, all ranks
    rows: int = 0  # decoded at once by a rank
    frozen: int = 0  # teachers, or the KL reference: in host memory but one, and that in training
    replay: bool = False  # chosen experts are recorded


def work_of(
    recipe, micro_tokens: int, max_rows: int, config, ranks: int, prompt: int, share=True
) -> Work:
    if isinstance(recipe, SFT):
        width = recipe.row_tokens
        micro = max(width, min(micro_tokens, recipe.batch_tokens // ranks))
        return Work(width, width, micro, recipe.batch_tokens)
    limit = config.max_position_embeddings
    if isinstance(recipe, RL):
        limit, frozen = recipe.max_tokens or limit, int(recipe.kl_coef > 0)
    else:
        copies = {x.partition("=")[2] for x in recipe.teachers}  # one a directory
        frozen = len(copies) or len({*TEACHER_OF.values()})
    longest = min(prompt + recipe.max_new_tokens, limit)
    new = min(recipe.max_new_tokens, longest)
    rollouts = recipe.prompts * recipe.rollouts
    # A group's prompt is computed once in each micro-batch that has responses of the group.
    fitting = max(int((max(micro_tokens, longest) - prompt) / (MEAN * new)), 1) if share else 1
    tokens = recipe.prompts * -(-recipe.rollouts // fitting) * prompt + rollouts * MEAN * new
    rows = parts(-(-recipe.prompts // ranks), recipe.rollouts, max_rows)[1]
    micro = max(longest, min(micro_tokens, int(tokens / ranks)))
    return Work(
        sequence=longest,
        width=max(longest, 256),
        micro=micro,
        tokens=tokens,
        new=new,
        rollouts=rollouts,
        rows=rows,
        frozen=frozen,
        replay=recipe.routing_replay,
    )


class Plan:
    """Bytes of a run in one layout; `traces` of blocks are shared with plans of other layouts."""

    def __init__(self, config, work: Work, layout: dict, ranks: int, router=True, traces=None):
        self.config, self.work, self.layout, self.ranks = config, work, layout, ranks
        self.traces, self.router = {} if traces is None else traces, router
        self.dist = dist = Dist(0, ranks, "cpu", **layout)
        if config.num_experts % (ep := dist.expert_parallel) or ep > NODE:
            raise ValueError(f"--expert_parallel {ep}: {config.num_experts} experts, {NODE} a node")
        with torch.device("meta"):
            sizes = {name: p.numel() for name, p in Model(config).named_parameters()}
        self.total = sum(sizes.values())
        self.shards = ranks // dist.replicas if dist.sharded else 1  # ranks of one copy
        blocks = Counter()  # parameters of each that a rank computes with; "" is what is no block
        for name, n in sizes.items():
            block = name.split(".")[1] if name.startswith("blocks.") else ""
            blocks[block] += n / (ep if ".experts." in name else 1)
        self.root = blocks.pop("")
        self.block = max(blocks.values())
        experts = sum(n for name, n in sizes.items() if ".experts." in name)
        islands = sum(n for name, n in sizes.items() if name.endswith(KEEP_FP32))  # never cut
        dense = self.total - experts - islands
        self.mine = (dense + experts) / self.shards + islands
        routers = sum(n for name, n in sizes.items() if name.endswith("gate.weight"))
        self.trained = self.mine - (0 if router else routers)
        self.whole = dense + experts / ep  # what a rank computes with
        self.fetched = dense * (1 - 1 / self.shards) + experts / ep * (1 - ep / self.shards)
        self.size = dist.dtype.itemsize

    def of(self, kind: str, tokens: int, **how) -> Trace:
        """The trace of so many tokens; beyond TRACED, the line through two shorter ones."""
        if tokens > TRACED[1] and "seen" not in how:
            short, long = (self.of(kind, x, **how) for x in TRACED)
            grow, times = (tokens - TRACED[0]) / (TRACED[1] - TRACED[0]), tokens / TRACED[1]
            ends = (x + (y - x) * grow for x, y in zip(short[:2], long[:2], strict=True))
            return Trace(*ends, [(x * times, y * times) for x, y in long.ops])
        width = 1 if "seen" in how else min(self.work.width, tokens)
        dist, ep = self.dist, self.dist.expert_parallel if kind == "E" else 1
        key = kind, tokens, width, ep, dist.dtype, dist.sharded, dist.checkpoint_blocks
        key += (*how.items(),)
        if key not in self.traces:
            shape = max(tokens // width, 1), width
            self.traces[key] = trace(self.config, kind, self.layout, *shape, **how)
        return self.traces[key]

    def bytes(self, work: Work) -> dict[str, dict[str, float]]:
        """{phase: {kind: bytes}} of a rank's device in training and rollout, and of its host."""
        dist, moments = self.dist, 8 * self.trained
        model = self.size * self.total / self.shards  # a frozen one: no fp32 masters
        static = {"weights": 4 * self.mine}
        static["moments"] = 0 if dist.offload_optimizer else moments
        # Plain data parallelism sums the gradients in one flat copy.
        gradients = 4 * self.trained * (1 if dist.sharded or self.ranks == 1 else 2)
        training = static | {"gradients": gradients, "frozen": model * (work.frozen > 0)}
        training |= self.activations(work)
        inputs = work.micro * self.config.hidden_size * self.size * len(self.config.pattern)
        host = {
            "moments": moments * dist.offload_optimizer,
            "frozen": model * work.frozen,
            "kept": inputs * dist.offload_blocks,
        }
        rollout = {"rollout": static | self.sampling(work)} if work.new else {}
        return {"training": training, **rollout, "host": host}

    def activations(self, work: Work) -> dict[str, float]:
        """The worst block's peak, while what all others keep for their backward is there."""
        dist, kinds, micro = self.dist, self.config.pattern, work.micro
        found = {kind: self.of(kind, micro) for kind in {*kinds}}
        kept = {kind: x.kept for kind, x in found.items()}
        if dist.checkpoint_blocks:
            kept = dict.fromkeys(found, micro * self.config.hidden_size * self.size)
        block = max(found[k].peak - kept[k] for k in found)
        stored = sum(kept[k] for k in kinds)
        if dist.offload_blocks:  # of two blocks at a time
            stored = 2 * max(kept.values())
        # Embedding and head with its gradient; the block that is fetched while one computes, and
        # the fp32 sum of the last one's gradients. The block's own weights are in its peak.
        gathered = 1.5 * self.size * self.root + (self.size + 4) * self.block
        # No block makes the embedded tokens and the final norm's hidden states.
        hidden = 2 * micro * self.config.hidden_size * self.size
        return {
            "gathered": gathered * dist.sharded,
            "kept": stored,
            "block": max(block, self.of("head", micro).peak + hidden),
        }

    def sampling(self, work: Work) -> dict[str, float]:
        """Gathered weights, the rows' caches, and the larger of a decode step and a prefill."""
        config = self.config
        row = Cache(config, 1, work.sequence, self.dist.dtype, "meta").bytes + 16 * work.new
        row += work.replay * work.new * 8 * config.num_moe_layers * config.num_experts_per_tok
        kinds = {*config.pattern}
        step = max(self.of(k, work.rows, seen=work.sequence).peak for k in kinds | {"head"})
        fill = max(self.of(k, PREFILL_TOKENS, grad=False).peak for k in kinds)
        gathered = self.size * self.whole * self.dist.sharded
        return {"gathered": gathered, "kept": work.rows * row, "block": max(step, fill)}

    def peak(self, **changes) -> float:
        phases = self.bytes(replace(self.work, **changes))
        return max(sum(x.values()) for phase, x in phases.items() if phase != "host")

    def most(self, memory: float) -> tuple[int, int]:
        """The longest document that can be trained on, and the most rows decoded at once."""
        room = memory - RESERVE
        tokens = largest(lambda n: self.peak(sequence=n, micro=n, new=0) <= room, 256, 1 << 20)
        if not self.work.new:
            return tokens, 0
        one, few = (self.bytes(replace(self.work, rows=n))["rollout"] for n in (1, 65))
        grow = (sum(few.values()) - sum(one.values())) / 64  # activations aside this is exact
        return tokens, max(int((room - sum(one.values())) / grow) + 1, 0)

    # ---- Times ----

    @property
    def micros(self) -> int:
        return -(-int(self.work.tokens) // (self.ranks * self.work.micro))

    def moved(self) -> dict[str, float]:
        """Bytes that a rank receives in the training part of a step, by what they are."""
        work, dist, config = self.work, self.dist, self.config
        # Gathered for forward and for backward, gradients summed once in fp32.
        weights = self.micros * self.fetched * (2 * self.size + 4) * dist.sharded
        # The group's tokens come in, sums go out: in forward, recomputation and backward.
        x = work.micro * config.hidden_size * self.size
        tokens = 6 * (dist.expert_parallel - 1) * x * config.num_moe_layers
        host = 16 * self.trained * dist.offload_optimizer
        host += 2 * self.micros * x * len(config.pattern) * dist.offload_blocks
        return {"weights": weights, "tokens": self.micros * tokens, "host": host}

    def seconds(self, hw: Hardware) -> dict[str, float]:
        """Predicted seconds of a step, where responses have MEAN times their limit."""
        work, config, kinds = self.work, self.config, self.config.pattern
        once = self.of("head", work.micro).seconds(hw)
        once += sum(kinds.count(k) * self.of(k, work.micro).seconds(hw) for k in {*kinds})
        if work.frozen:  # scores the same tokens
            score = {k: self.of(k, work.micro, grad=False).seconds(hw) for k in {*kinds}}
            once += sum(score[k] for k in kinds)
        # Attention grows with the square: two products, half of (t, t'); forward twice, backward.
        square = 2 * work.micro * work.sequence * config.num_heads * config.head_dim * 4.5
        once += kinds.count("*") * square / (hw.flops * FLOPS_REACHED)
        links = (hw.nvlink if self.ranks <= NODE else hw.network), hw.nvlink, hw.host
        moves = sum(x / y for x, y in zip(self.moved().values(), links, strict=True))
        update = 28 * self.trained / hw.hbm  # AdamW reads 16 bytes and writes 12
        train = self.micros * once + (moves + update) / BYTES_REACHED
        if not work.new:
            return {"training": train}
        mean = int(MEAN * work.new)
        step = {
            k: self.of(k, work.rows, seen=work.sequence - work.new + mean).seconds(hw)
            for k in {*kinds, "head"}
        }
        step = sum(step[k] for k in kinds) + step["head"]
        # Rows are refilled; at the end the longest response is waited for.
        steps = work.rollouts / self.ranks * mean / work.rows + work.new - mean
        return {"rollout": steps * step, "training": train, "decode step": step}


def largest(holds, step: int, limit: int) -> int:
    """The largest multiple of `step` up to `limit` that holds; 0 if none does."""
    low, high = 0, limit // step
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle * step) else (low, middle - 1)
    return low * step


# ---- What --dry_run prints -----------------------------------------------------------------------


def read_cluster(text: str, device: str) -> tuple[int, str, Hardware]:
    """(ranks, name, numbers) of "16xH100", or of this machine and torchrun's processes."""
    ranks, _, name = text.partition("x")
    if text:
        if not ranks.isdigit() or int(ranks) < 1 or name not in HARDWARE:
            raise ValueError(f"--cluster {text}: expected RANKSxNAME, NAME one of {[*HARDWARE]}")
        return int(ranks), name, HARDWARE[name]
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if device.startswith("cuda"):
        found = torch.cuda.get_device_properties(device)
        known = next((hw for name, hw in HARDWARE.items() if name in found.name), Hardware(0))
        return ranks, found.name, known._replace(memory=found.total_memory)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return ranks, f"this machine's {device}", Hardware(memory / ranks)


def best(plan: Plan, name: str, hw: Hardware) -> str:
    """The fastest layout that fits, on the fewest devices, as flags."""
    for ranks in (plan.ranks * x for x in (1, 2, 4, 8)):
        found = []
        for blocks, moments in ((0, 0), (0, 1), (1, 0), (1, 1)):
            layout = plan.layout | {
                "shard": True,
                "checkpoint_blocks": True,
                "replicas": 1,
                "offload_blocks": bool(blocks),
                "offload_optimizer": bool(moments),
                "expert_parallel": NODE if "E" in plan.config.pattern and ranks % NODE == 0 else 1,
            }
            other = Plan(plan.config, plan.work, layout, ranks, plan.router, plan.traces)
            rows = min(other.most(hw.memory)[1], plan.work.rows)
            other.work = replace(plan.work, rows=rows)
            if (rows or not plan.work.new) and other.peak() <= hw.memory - RESERVE:
                times = other.seconds(hw) if hw.flops else {}
                flags = layout | {"max_rows": rows if rows < plan.work.rows else False}
                found.append((times.get("rollout", 0) + times.get("training", 0), flags))
        if found:
            flags = min(found, key=lambda x: x[0])[1].items()
            words = (f"--{k}" + ("" if x is True else f" {x}") for k, x in flags if x is not False)
            return f"{ranks} x {name} with {' '.join(words)} hold it"
    return (
        f"nor do {ranks} x {name} in any layout: a document is never cut over ranks "
        "(context parallelism is not implemented)"
    )


def report(recipe, run, layout: Layout, evaluation, config=None, prompt: int = PROMPT) -> None:
    """Print the resolved run, what it holds and takes; ValueError, with a layout that fits, if this
    one does not. config: the model's, --init or the 30B-A3B if None; prompt: tokens of the longest.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    ranks, name, hw = read_cluster(run.cluster, find_device(run.device))
    expert_parallel, replicas = layout.expert_parallel, layout.replicas
    if ranks < expert_parallel * replicas and not run.cluster:
        raise ValueError(
            f"--dry_run of --expert_parallel {expert_parallel} --replicas {replicas} needs "
            f"--cluster, for example 8xH200: this machine has {ranks} rank(s)"
        )
    print(describe(recipe, run, layout, evaluation))
    config = config or load_config(run.init or FULL)
    work = work_of(recipe, run.micro_tokens, run.max_rows, config, ranks, prompt, run.share_prompts)
    with imaginary_node():
        train_router = isinstance(recipe, SFT) or recipe.train_router
        plan = Plan(config, work, vars(layout), ranks, train_router)
        print(
            f"parameters: {plan.total:,} in all, "
            f"{config.num_parameters(active=True):,} active a token"
        )
        print(
            f"a step: {work.tokens:,.0f} tokens in micro-batches of {work.micro:,} a rank, "
            f"documents up to {work.sequence:,}, {work.rows} rows decoded at once"
        )
        phases = plan.bytes(work)
        kinds = dict.fromkeys(kind for x in phases.values() for kind in x)
        title = f"GB a rank, {ranks} x {name}"
        print(f"{title:<28}" + "".join(f"{x:>12}" for x in (*kinds, "sum")))
        for phase, x in phases.items():
            cells = [x.get(kind, 0.0) for kind in kinds] + [sum(x.values())]
            print(f"{phase:<28}" + "".join(f"{y / 1e9:>12.3f}" for y in cells))
        if plan.peak() > hw.memory - RESERVE:
            raise ValueError(
                f"{plan.peak() / 1e9:.1f} GB and {RESERVE / 1e9:.0f} in reserve are "
                f"more than the {hw.memory / 1e9:.0f} GB of {name}; "
                f"{best(plan, name, hw)}"
            )
        tokens, rows = plan.most(hw.memory)
        print(f"fits; documents of up to {tokens:,} tokens would" + f", {rows} rows" * bool(rows))
        moves = ", ".join(f"{key} {x / 1e9:,.0f}" for key, x in plan.moved().items())
        print(f"GB that a rank moves in training: {moves}")
        if hw.flops:
            times = ", ".join(f"{key} {x:,.3g}" for key, x in plan.seconds(hw).items())
            print(f"seconds a step, predicted: {times}")
