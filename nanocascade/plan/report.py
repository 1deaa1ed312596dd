"""--dry_run: what a run holds and takes, and a layout that fits if it does not.

`fit_memory` chooses, before a run, the settings with which it fits the device.
"""

import os
import re
from dataclasses import replace
from pathlib import Path

import torch

from nanocascade.checkpoint.hf_config import load_config
from nanocascade.cli import describe
from nanocascade.engine.device import find_device
from nanocascade.engine.distributed import Layout
from nanocascade.plan.meter import NODE, imaginary_node
from nanocascade.plan.plan import Plan, usable, work_of
from nanocascade.plan.seconds import (
    HARDWARE,
    Hardware,
    moved_bytes,
    step_seconds,
    verdict_seconds,
)
from nanocascade.stages import SFT, Stage

FULL = Path(__file__).parent / "nemotron3_nano"  # config.json of the 30B-A3B, without weights
PROMPT = 2048  # tokens of the longest prompt, where no data say
GB = 1e9
# Ways to make a run smaller, from the fastest to the smallest: flags that are switched on.
ONE_DEVICE = (
    (),
    ("checkpoint_blocks",),
    ("offload_optimizer",),
    ("checkpoint_blocks", "offload_optimizer"),
)
CLUSTER = (  # of a layout that recomputes blocks
    (),
    ("offload_optimizer",),
    ("offload_blocks",),
    ("offload_blocks", "offload_optimizer"),
)


def num_ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def read_cluster(text: str, device: str) -> tuple[int, str, Hardware]:
    """(ranks, name, numbers) of "16xH100", or of this machine and torchrun's processes."""
    if text:
        found = re.fullmatch(r"([1-9]\d*)x(\w+)", text)
        if not found or found[2] not in HARDWARE:
            raise ValueError(f"--cluster {text}: expected RANKSxNAME, NAME one of {[*HARDWARE]}")
        return int(found[1]), found[2], HARDWARE[found[2]]
    if device.startswith("cuda"):
        card = torch.cuda.get_device_properties(device)
        known = next((x for name, x in HARDWARE.items() if name in card.name), Hardware(0))
        return num_ranks(), card.name, known._replace(memory=card.total_memory)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return num_ranks(), f"this machine's {device}", Hardware(memory / num_ranks())


def plan_of(
    recipe: Stage, run, layout: Layout, evaluation, config, ranks: int, prompt: int
) -> Plan:
    """The plan of a script's settings."""
    work = work_of(recipe, run, evaluation, config, ranks, prompt)
    train_router = isinstance(recipe, SFT) or recipe.train_router
    return Plan(config, work, layout, ranks, train_router, recipe.lora_rank)


# ---- Settings that fit ---------------------------------------------------------------------------


def flags_of(changes: dict) -> str:
    """Flags as they are typed: {"shard": True, "max_rows": 9} -> " --shard --max_rows 9"."""
    return "".join(
        f" --{name}" + ("" if value is True else f" {value}")
        for name, value in changes.items()
        if value
    )


def fitting(plan: Plan, memory: float, ways) -> tuple[int, int, dict] | None:
    """(tokens of a micro-batch, rows decoded at once, changes of the layout): the first of the
    ways in which the plan fits, if need be with less at once; None if there is none."""
    for flags in ways:
        changes = dict.fromkeys(flags, True)
        other = replace(plan, layout=replace(plan.layout, **changes))
        micro, least = plan.work.micro, plan.work.sequence
        while micro > least and not other.trains(micro, memory):
            micro = max(micro // 2, least)
        rows = other.most_rows(memory)
        if other.trains(micro, memory) and (rows or not plan.work.sampling):
            return micro, rows, changes
    return None


def fit_memory(recipe: Stage, run, layout: Layout, evaluation) -> None:
    """Lower --micro_tokens and --max_rows, then recompute blocks and move moments to host memory,
    in place, until the plan fits --memory_gb. Flags are upper limits: nothing is raised.

    Without --memory_gb, --config small takes the memory of the GPU. Raises ValueError if nothing
    fits.
    """
    device = find_device(run.device)
    wanted = run.memory_gb or device.startswith("cuda") and run.config == "small"
    if not wanted or not run.init or run.cluster:
        return
    memory = run.memory_gb * GB or torch.cuda.get_device_properties(device).total_memory
    config = load_config(run.init)
    with imaginary_node(gpu=device != "cpu"):
        plan = plan_of(recipe, run, layout, evaluation, config, num_ranks(), PROMPT // 2)
        found = fitting(plan, memory, ONE_DEVICE)
    if found is None:
        raise ValueError(
            f"{run.init} does not fit {memory / GB:.3g} GB in any layout of one device: take a "
            "smaller one, --lora_rank, or more devices with --shard"
        )
    micro, rows, changes = found
    run.micro_tokens = min(run.micro_tokens, micro)
    run.max_rows = min(run.max_rows, rows or run.max_rows)
    for name, value in changes.items():
        setattr(layout, name, value)
    if os.environ.get("RANK", "0") == "0":
        chosen = {"micro_tokens": run.micro_tokens, "max_rows": run.max_rows} | changes
        print(f"fits {memory / GB:.3g} GB with{flags_of(chosen)}")


def name_layout(plan: Plan, name: str, memory: float) -> str:
    """The first layout that fits, on the fewest devices, as flags."""
    for ranks in (plan.ranks * x for x in (1, 2, 4, 8)):
        spread = "E" in plan.config.pattern and ranks % NODE == 0 and not plan.lora_rank
        layout = replace(
            plan.layout,
            shard=not plan.lora_rank,
            expert_parallel=NODE if spread else 1,
            replicas=1,
            checkpoint_blocks=True,
            offload_blocks=False,
            offload_optimizer=False,
        )
        if found := fitting(replace(plan, ranks=ranks, layout=layout), memory, CLUSTER):
            micro, rows, changes = found
            most = max((x.rows for x in plan.work.sampling.values()), default=0)
            at_once = {"micro_tokens": micro, "max_rows": min(rows, most)}
            flags = flags_of(vars(layout) | changes | at_once)
            return f"{ranks} x {name} with{flags} hold it"
    return (
        f"nor do {ranks} x {name} in any layout: a document is never cut over ranks "
        "(context parallelism is not implemented)"
    )


# ---- What --dry_run prints -----------------------------------------------------------------------


def report(recipe: Stage, run, layout: Layout, evaluation, config=None, prompt: int = PROMPT):
    """Print the resolved run, what it holds and takes; ValueError, with a layout that fits, if this
    one does not. config: the model's, --init or the 30B-A3B if None; prompt: tokens of the longest.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    device = find_device(run.device)
    ranks, name, hardware = read_cluster(run.cluster, device)
    if run.memory_gb:
        hardware = hardware._replace(memory=run.memory_gb * GB)
    if ranks < layout.expert_parallel * layout.replicas and not run.cluster:
        raise ValueError(
            f"--dry_run of --expert_parallel {layout.expert_parallel} --replicas {layout.replicas} "
            f"needs --cluster, for example 8xH200: this machine has {ranks} rank(s)"
        )
    print(describe(recipe, run, layout, evaluation))
    config = config or load_config(run.init or FULL)
    with imaginary_node(gpu=bool(run.cluster or run.memory_gb) or device != "cpu"):
        plan = plan_of(recipe, run, layout, evaluation, config, ranks, prompt)
        print_memory(plan, name, hardware.memory)
        if hardware.flops:
            workers = run.score_workers * ranks or os.cpu_count() or 1
            rate = run.judge_seconds / (run.judge_concurrency * ranks)
            print_seconds(plan, hardware, verdict_seconds(recipe, workers, rate))


def print_memory(plan: Plan, name: str, memory: float) -> None:
    work, phases = plan.work, plan.bytes()
    active = plan.config.num_parameters(active=True)
    print(f"parameters: {plan.parameters.total:,} in all, {active:,} active a token")
    rows = "".join(f", {x.rows} rows at once in {phase}" for phase, x in work.sampling.items())
    print(
        f"a step: {work.tokens:,.0f} tokens in micro-batches of {work.micro:,} a rank, "
        f"documents up to {work.sequence:,}{rows}"
    )
    kinds = dict.fromkeys(kind for x in phases.values() for kind in x)
    title = f"GB a rank, {plan.ranks} x {name}"
    print(f"{title:<28}" + "".join(f"{x:>12}" for x in (*kinds, "sum")))
    for phase, x in phases.items():
        cells = [x.get(kind, 0.0) for kind in kinds] + [sum(x.values())]
        print(f"{phase:<28}" + "".join(f"{y / GB:>12.3f}" for y in cells))
    if plan.peak() > usable(memory):
        raise ValueError(
            f"{plan.peak() / GB:.1f} GB and {(memory - usable(memory)) / GB:.0f} in reserve are "
            f"more than the {memory / GB:.0f} GB of {name}; {name_layout(plan, name, memory)}"
        )
    rows = plan.most_rows(memory)
    print(
        f"fits; documents of up to {plan.longest_document(memory):,} tokens would"
        + f", {rows} rows" * bool(rows)
    )


def print_seconds(plan: Plan, hardware: Hardware, verdicts: dict[str, float]) -> None:
    """verdicts: seconds of programs and judge calls, which run while sampling goes on."""
    moves = ", ".join(f"{kind} {x / GB:,.0f}" for kind, x in moved_bytes(plan).items())
    print(f"GB that a rank moves in training: {moves}")
    seconds = step_seconds(plan, hardware) | verdicts
    print("seconds a step, predicted: " + ", ".join(f"{k} {x:,.3g}" for k, x in seconds.items()))
    before = max((x for kind, x in seconds.items() if kind != "training"), default=0.0)
    largest = max(seconds, key=seconds.get)
    print(f"a step takes {before + seconds['training']:,.3g} s; its largest part is {largest}")
