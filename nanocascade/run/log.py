"""metrics.jsonl, rollouts.jsonl, the console, and means over micro-batches and ranks."""

import json
import os
import resource
import subprocess
import sys
from itertools import groupby
from operator import itemgetter

import torch

from nanocascade.data.episode import Rollout


class Mean:
    """Metrics of a step over micro-batches and ranks: means weighted by tokens, maxima by max."""

    def __init__(self):
        self.totals: dict[str, float] = {}
        self.weights: dict[str, float] = {}

    def add(self, metrics: dict, weight: float) -> None:
        for name, x in metrics.items():
            x = float(x)
            if name.endswith("max"):
                self.totals[name] = max(self.totals.get(name, x), x)
                self.weights[name] = 1.0
            else:
                self.totals[name] = self.totals.get(name, 0.0) + x * weight
                self.weights[name] = self.weights.get(name, 0.0) + weight

    def result(self, dist) -> dict[str, float]:
        everyone = Mean()
        for totals, weights in dist.gather((self.totals, self.weights)):
            for name, x in totals.items():
                everyone.add({name: x / max(weights[name], 1e-9)}, weights[name])
        return {name: x / max(everyone.weights[name], 1e-9) for name, x in everyone.totals.items()}


class Log:
    """metrics.jsonl and rollouts.jsonl of a run, one object a step or rollout, and the console."""

    def __init__(self, out: str, start: int):
        self.out = out
        for name in ("metrics.jsonl", "rollouts.jsonl"):  # resuming: later lines never happened
            path = os.path.join(out, name)
            kept = []
            if os.path.exists(path):
                with open(path) as lines:
                    kept = [x for x in lines if x.endswith("\n") and json.loads(x)["step"] < start]
            with open(path + ".part", "w") as file:
                file.writelines(kept)
            os.replace(path + ".part", path)

    def metrics(self, step: int, values: dict) -> None:
        with open(os.path.join(self.out, "metrics.jsonl"), "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def rollouts(self, step: int, rollouts: list[Rollout], tokenizer) -> None:
        with open(os.path.join(self.out, "rollouts.jsonl"), "a") as file:
            for x in rollouts:
                record = {
                    "step": step,
                    "domain": x.domain,
                    "prompt": tokenizer.decode(x.tokens[: x.prompt_length]),
                    "response": tokenizer.decode(x.tokens[x.prompt_length :]),
                    "reward": x.reward,
                    "reason": x.reason,
                    "advantage": x.advantage,
                    "stop_reason": x.stop_reason,
                }
                file.write(json.dumps(record) + "\n")


def show_rollout(x: Rollout, tokenizer, step: int) -> str:
    """One whole episode with its verdict; what carries loss is printed in green."""
    text = ""
    for trained, run in groupby(zip(x.mask, x.tokens, strict=True), key=itemgetter(0)):
        part = tokenizer.decode([token for _, token in run])  # a character may span tokens
        text += f"\033[32m{part}\033[0m" if trained else part
    verdict = f"reward {x.reward:.2f} ({x.reason}), advantage {x.advantage:+.2f}, {x.stop_reason}"
    return f"--- step {step}, {x.domain}: {verdict}\n{text}"


def evaluation_table(evaluation: dict[str, dict]) -> str:
    """Before and after by domain, as text."""
    lines = [f"{'domain':<14} {'before':>16} {'after':>16}"]
    for domain, x in evaluation.items():
        cells = [
            f"{y['mean']:.3f} +- {y['interval']:.3f}" if y else "-"
            for y in (x.get("before"), x.get("after"))
        ]
        lines.append(f"{domain:<14} {cells[0]:>16} {cells[1]:>16}")
    return "\n".join(lines)


def peak_gib(device: str) -> float:
    """The most memory this process has used: of its device, or resident."""
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
