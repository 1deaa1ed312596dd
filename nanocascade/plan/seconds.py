"""How long a step takes, predicted: a roofline of the metered operations, and rates of verdicts.

bench/gpu.py holds the predictions of single blocks against a GPU. Verdicts and judge calls run
while sampling goes on: a step takes the longest of the three, then its training.
"""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from nanocascade.plan.meter import HEAD, NODE, Trace
from nanocascade.plan.plan import MEAN, Plan
from nanocascade.stages import RL, RL_STAGES, Stage

FLOPS_REACHED, BYTES_REACHED = 0.4, 0.7  # shares of the vendor's numbers: assumed
LAUNCH = 6e-6  # seconds that PyTorch takes for any operation, however small: assumed
PROGRAMS = 70.0  # programs a second and core: MBPP gold solutions (docs/rewards.md)
RUN_PROGRAMS = {"code", "swe", "swe_agentic"}  # domains whose verdict runs a program


class Hardware(NamedTuple):
    """The vendor's numbers of a device: bytes, and FLOP or bytes a second; links are one way."""

    memory: float
    flops: float = 0.0  # bf16, dense
    hbm: float = 0.0
    nvlink: float = 0.0  # to the others of its node
    network: float = 0.0  # to other nodes, its share
    host: float = 0.0  # PCIe


HARDWARE = {
    "H100": Hardware(80e9, 989e12, 3.35e12, 450e9, 50e9, 64e9),
    "H200": Hardware(141e9, 989e12, 4.8e12, 450e9, 50e9, 64e9),
}


def roofline(trace: Trace, hardware: Hardware) -> float:
    """Seconds of the operations of a trace."""
    flops, hbm = hardware.flops * FLOPS_REACHED, hardware.hbm * BYTES_REACHED
    return sum(max(x / flops, y / hbm, LAUNCH) for x, y in trace.operations)


def model_seconds(plan: Plan, trace_of: Callable[[str], Trace], hardware: Hardware) -> float:
    """Seconds of all blocks and the head, whose traces trace_of(kind) returns."""
    counts = Counter([*plan.config.pattern, HEAD])
    return sum(n * roofline(trace_of(kind), hardware) for kind, n in counts.items())


def moved_bytes(plan: Plan) -> dict[str, float]:
    """Bytes that a rank receives in the training part of a step, by what they are."""
    dist, config = plan.dist, plan.config
    # Gathered for forward and for backward, gradients summed once in fp32.
    weights = plan.parameters.received * (2 * plan.itemsize + 4) * dist.sharded
    # The group's tokens come in, sums go out: in forward, recomputation and backward.
    tokens = 6 * (dist.expert_parallel - 1) * plan.block_input() * config.num_moe_layers
    inputs = 2 * plan.block_input() * len(config.pattern) * dist.offload_blocks
    moments = 16 * plan.parameters.trained * dist.offload_optimizer
    batches = micro_batches(plan)
    return {
        "weights": batches * weights,
        "tokens": batches * tokens,
        "host": batches * inputs + moments,
    }


def micro_batches(plan: Plan) -> int:
    return -(-int(plan.work.tokens) // (plan.ranks * plan.work.micro))


def training_seconds(plan: Plan, hardware: Hardware) -> float:
    work, config = plan.work, plan.config
    batch = model_seconds(plan, lambda kind: plan.block(kind, work.micro), hardware)
    if work.frozen:  # scores the same tokens
        batch += model_seconds(plan, lambda kind: plan.block(kind, work.micro, False), hardware)
    # Attention grows with the square: two products, half of (t, t'); forward twice, backward.
    square = 2 * work.micro * work.sequence * config.num_heads * config.head_dim * 4.5
    batch += config.pattern.count("*") * square / (hardware.flops * FLOPS_REACHED)
    moved = moved_bytes(plan)
    network = hardware.nvlink if plan.ranks <= NODE else hardware.network
    moves = moved["weights"] / network + moved["tokens"] / hardware.nvlink
    moves += moved["host"] / hardware.host
    update = 28 * plan.parameters.trained / hardware.hbm  # AdamW reads 16 bytes and writes 12
    return micro_batches(plan) * batch + (moves + update) / BYTES_REACHED


def rollout_seconds(plan: Plan, hardware: Hardware) -> float:
    """Rows are refilled; at the end the longest response is waited for."""
    sampling = plan.work.sampling["rollout"]
    mean, rows = int(MEAN * sampling.new), sampling.rows
    context = sampling.prompt + mean
    step = model_seconds(plan, lambda kind: plan.decoding(kind, rows, context), hardware)
    return step * (plan.work.rollouts / plan.ranks * mean / rows + sampling.new - mean)


def step_seconds(plan: Plan, hardware: Hardware) -> dict[str, float]:
    """Predicted seconds of the parts of a step, where responses have MEAN times their limit."""
    seconds = {}
    if "rollout" in plan.work.sampling:
        seconds["rollout"] = rollout_seconds(plan, hardware)
    return seconds | {"training": training_seconds(plan, hardware)}


def verdict_seconds(recipe: Stage, workers: int, judge_seconds: float) -> dict[str, float]:
    """Seconds of the programs, `workers` at a time, and of the judge calls, of `judge_seconds` each
    (divided by how many run at once). Only RL waits for them."""
    if not isinstance(recipe, RL):
        return {}
    shares, group = RL_STAGES[recipe.stage]["domains"], recipe.rollouts
    pairs = group if recipe.pairing == "circle" else group * (group - 1) / 2
    programs = recipe.prompts * group * sum(shares.get(x, 0) for x in RUN_PROGRAMS)
    calls = recipe.prompts * pairs * shares.get("preference", 0)
    seconds = {"programs": programs / (workers * PROGRAMS), "judge": calls * judge_seconds}
    return {kind: x for kind, x in seconds.items() if x}
