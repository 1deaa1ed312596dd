"""metrics.jsonl, rollouts.jsonl and the console."""

import json
import os
import resource
import subprocess
import sys
import time
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import torch
from tqdm import tqdm

from nanocascade.data.episode import Rollout
from nanocascade.engine.distributed import Dist
from nanocascade.files import write_text_atomic
from nanocascade.run.records import rollout_record
from nanocascade.run.settings import RunSettings
from nanocascade.run.track import Trackers


class Log:
    """The log of a run: metrics.jsonl (a line a step), rollouts.jsonl (a line a rollout), progress
    bar, clock. All ranks call it, the main rank writes."""

    def __init__(self, settings: RunSettings, tokenizer, dist: Dist):
        self.out, self.tokenizer, self.dist = settings.out, tokenizer, dist
        self.log_groups, self.show_every = settings.log_groups, settings.show_every
        self.earlier, self.started = 0.0, time.perf_counter()
        self.shown: list[Rollout] = []  # of this step, one of each domain
        self.logged: list[tuple[int, Rollout]] = []  # (group of its domain, rollout) of this step

    @property
    def elapsed(self) -> float:
        """Seconds of this run, including those before it was resumed."""
        return self.earlier + time.perf_counter() - self.started

    def begin(self, step: int, earlier: float, trackers: Trackers) -> None:
        """Start at a step, `earlier` seconds into the run. When resuming, drop the log lines of
        steps that will run again."""
        self.earlier, self.trackers = earlier, trackers
        for name in ("metrics.jsonl", "rollouts.jsonl") if self.dist.is_main else ():
            path = Path(self.out) / name
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            lines = [x for x in lines if x.endswith("\n") and json.loads(x)["step"] < step]
            write_text_atomic(path, "".join(lines))

    def steps(self, first: int, total: int, name: str):
        """The steps left to do. After SIGTERM (preemption) the loop ends with the saved step."""
        self.bar = tqdm(
            range(first, total),
            initial=first,
            total=total,
            desc=name,
            disable=not self.dist.is_main,
            dynamic_ncols=True,
        )
        for step in self.bar:
            self.step_started = time.perf_counter()
            yield step
            if self.dist.stopping:
                raise SystemExit(0)

    def choose(self, groups: list[list[Rollout]]) -> None:
        """Choose what `step` will show and write: the main rank's first groups of each domain.
        Update.backward stores the per-token values of the rollouts that are written."""
        by_domain: dict[str, list[list[Rollout]]] = {}
        for group in groups if self.dist.is_main else ():
            by_domain.setdefault(group[0].domain, []).append(group)
        self.shown = [first[0] for first, *_ in by_domain.values()]
        chosen = [pair for x in by_domain.values() for pair in enumerate(x[: self.log_groups])]
        self.logged = [(i, rollout) for i, group in chosen for rollout in group]
        for _, rollout in self.logged:
            rollout.token_values = {}

    def step(self, step: int, values: dict, groups=()) -> None:
        """Write metrics.jsonl and rollouts.jsonl, update the bar, print a rollout if it is time."""
        seconds = time.perf_counter() - self.step_started
        tokens = sum(len(x.tokens) for group in groups for x in group)
        tokens, memories = self.dist.end_step(tokens, peak_gib(self.dist.device))
        tokens = values.get("batch/tokens", tokens)  # SFT has no groups
        values["memory/peak_gib"] = memories
        values["tokens_per_s"] = tokens / seconds
        values["time/train"] = seconds - values.get("time/rollout", 0) - values.get("time/score", 0)
        values["time/elapsed"] = self.elapsed
        if not self.dist.is_main:
            return
        append_lines(os.path.join(self.out, "metrics.jsonl"), [{"step": step, **values}])
        shown = ("outcome/drawn", "reward/mean", "mopd/reverse_kl", "loss/token")
        self.bar.set_postfix({k: f"{values[k]:.3g}" for k in shown if k in values})
        records = [rollout_record(x, step, i, self.tokenizer) for i, x in self.logged]
        append_lines(os.path.join(self.out, "rollouts.jsonl"), records)
        self.trackers.call("step", step, values, records)
        for x in self.shown:
            if self.show_every and step % self.show_every == 0:
                tqdm.write(show_rollout(x, self.tokenizer, step))


def append_lines(path: str, records: list[dict]) -> None:
    with open(path, "a") as file:
        file.writelines(json.dumps(x) + "\n" for x in records)


def show_rollout(x: Rollout, tokenizer, step: int) -> str:
    """The text of an episode with its verdict; tokens with a loss are green."""
    text = ""
    losses = [x.loss and trained for trained in x.mask]
    for trained, run in groupby(zip(losses, x.tokens, strict=True), key=itemgetter(0)):
        part = tokenizer.decode([token for _, token in run])  # a character may span tokens
        text += f"\033[32m{part}\033[0m" if trained else part
    verdict = f"reward {x.reward:.2f} ({x.reason}), advantage {x.advantage:+.2f}, {x.stop_reason}"
    return f"--- step {step}, {x.domain}: {verdict}\n{text}"


def evaluation_table(evaluation: dict[str, dict]) -> str:
    """Text table of the scores before and after, by domain."""
    lines = [f"{'domain':<14} {'before':>16} {'after':>16}"]
    for domain, x in evaluation.items():
        cells = [
            f"{y['mean']:.3f} +- {y['interval']:.3f}" if y else "-"
            for y in (x.get("before"), x.get("after"))
        ]
        lines.append(f"{domain:<14} {cells[0]:>16} {cells[1]:>16}")
    return "\n".join(lines)


def peak_gib(device: str) -> float:
    """Peak memory of this process in GiB: of its GPU, else resident."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def commit() -> str:
    """The commit of this code, or "" outside a repository."""
    command = ["git", "-C", os.path.dirname(__file__), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
