"""What the three train scripts share: packed batches, the optimizer, schedules, and the log."""

import json
import math
import os
import resource
import subprocess
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor, nn

from nanocascade.data.rows import pack
from nanocascade.model.logprobs import token_logprobs
from nanocascade.model.model import Model
from nanocascade.model.moe import Router, Routing
from nanocascade.rollouts.rollout import Rollout


@dataclass
class Batch:
    """A micro-batch of packed rows; position j of a row predicts targets[:, j].

    mask marks the targets that carry loss, segments the documents (-1 = padding), response_ids the
    document's index in the step's list. Per-token tensors are (b, t).
    """

    ids: Tensor
    targets: Tensor
    segments: Tensor
    response_ids: Tensor
    mask: Tensor
    sampler_logprobs: Tensor
    advantages: Tensor
    experts: Tensor | None = None  # (b, t, l, a) recorded while sampling

    @property
    def valid(self) -> Tensor:
        return self.segments >= 0  # (b, t)


def step_batches(model: Model, dist, rollouts, micro_tokens: int, replay=False, row=256):
    """The micro-batches of this rank's rollouts, and empty ones until every rank has as many.

    A sharded forward is a collective: a rank without work runs it, with a zero loss, all the same.
    """
    batches = make_batches(rollouts, micro_tokens, dist.device, replay, row)
    missing = dist.in_step(len(batches)) - len(batches)
    if missing:
        layers = (model.config.num_moe_layers, model.config.num_experts_per_tok)
        experts = torch.zeros(2, *layers, dtype=torch.long) if replay else None  # (t, l, a)
        nobody = Rollout({"id": ""}, [0, 0], 2, [False] * 2, [0.0] * 2, experts=experts)
        empty = make_batches([nobody], 1, dist.device, replay, 1)[0]
        empty.segments[:] = -1  # padding: in no load either
        batches += [empty] * missing
    return batches


def make_batches(rollouts: list[Rollout], micro_tokens: int, device="cpu", replay=False, row=256):
    """Pack documents into rows of `row` tokens, rows into micro-batches of about `micro_tokens`.

    A document of n tokens is n - 1 predictions. Rows are longer where a document is, and no longer
    than a micro-batch where none is.
    """
    if not rollouts:  # a rank that dynamic filtering left without groups
        return []
    lengths = [len(x.tokens) - 1 for x in rollouts]
    if max(lengths) * len(lengths) <= 1.05 * sum(lengths):  # alike: a row each, nothing to mask
        row = 1
    width = max(max(lengths), min(row, micro_tokens))
    packed = pack(lengths, width)
    per_batch = max(micro_tokens // width, 1)
    layers = rollouts[0].experts.shape[1:] if replay else None
    batches = []
    for first in range(0, len(packed), per_batch):
        rows = packed[first : first + per_batch]
        t = max(sum(lengths[i] for i in members) for members in rows)
        ids, targets, responses = (torch.zeros(len(rows), t, dtype=torch.long) for _ in range(3))
        segments = torch.full((len(rows), t), -1)  # (b, t)
        mask = torch.zeros(len(rows), t, dtype=torch.bool)
        sampler, advantages = torch.zeros(len(rows), t), torch.zeros(len(rows), t)
        experts = torch.zeros(len(rows), t, *layers, dtype=torch.long) if replay else None
        for j, members in enumerate(rows):
            start = 0
            for k, i in enumerate(members):
                x, span = rollouts[i], slice(start, start + lengths[i])
                tokens = torch.tensor(x.tokens)
                ids[j, span], targets[j, span] = tokens[:-1], tokens[1:]
                segments[j, span], responses[j, span] = k, i
                mask[j, span] = torch.tensor(x.mask[1:]) & x.loss
                if x.sampler_logprobs:
                    sampler[j, span] = torch.tensor(x.sampler_logprobs[1:])
                advantages[j, span] = x.advantage
                if replay:
                    experts[j, span] = x.experts[: lengths[i]].cpu()
                start += lengths[i]
        tensors = (ids, targets, segments, responses, mask, sampler, advantages, experts)
        batches.append(Batch(*(None if x is None else x.to(device) for x in tensors)))
    return batches


def score_tokens(model: Model, batch: Batch, temperature: float = 1.0, routing=None):
    """Log-probs (b, t) of the loss tokens under softmax(logits / T), and entropies (b, t)."""
    hidden = model(batch.ids, segments=batch.segments, routing=routing)  # (b, t, d)
    # Only what carries loss meets the head: log-probs of prompts and padding are left 0.
    places = batch.mask.flatten().nonzero()[:, 0]  # (n,)
    wanted = hidden.flatten(0, 1).index_select(0, places)  # (n, d)
    targets = batch.targets.flatten()[places]  # (n,)
    found = token_logprobs(wanted, model.head.weight, targets, temperature)  # (n,) twice
    blank = found[0].new_zeros(batch.mask.numel())  # (b*t,)
    return tuple(blank.index_copy(0, places, x).view(batch.mask.shape) for x in found)


def no_load(model: Model) -> Tensor:
    """Tokens of each expert before the first micro-batch: zeros (l, e)."""
    cfg = model.config
    shape = (cfg.num_moe_layers, cfg.num_experts)
    return torch.zeros(shape, dtype=torch.long, device=model.embed.weight.device)


def new_routing(model: Model, batch: Batch) -> Routing:
    return Routing(model.config.num_moe_layers, batch.experts)


CHOICES = {
    "overlong": ("penalty", "filter"),
    "gate": ("zero", "clamp", "none"),
    "schedule": ("constant", "linear", "cosine"),
    "pairing": ("all", "circle"),
    "denominator": ("response", "token"),
}
# Least value that means something; a flag that is None is set by the stage.
LEAST = dict.fromkeys(
    "prompts rollouts steps batch_tokens row_tokens micro_tokens max_new_tokens eval_max_new_tokens"
    " max_rows max_turns num_samples pass_samples reference_samples toy_rows rounds checks"
    " keep stop_every".split(),
    1,
) | dict.fromkeys(
    "lr min_lr warmup temperature top_k kl_coef weight_decay bias_rate save_every show_every show"
    " show_mask limit log_groups eval_samples own_eval_samples max_tokens".split(),
    0,
)


def check_settings(cfg) -> None:
    """Refuse before any training what would be refused, or divide by zero, in its midst."""
    for name, known in CHOICES.items():
        if getattr(cfg, name, known[0]) not in known:
            raise ValueError(f"--{name} {getattr(cfg, name)}: expected {' or '.join(known)}")
    for name, least in LEAST.items():
        x = getattr(cfg, name, least)
        if not isinstance(x, str) and not x >= least:  # nor is a NaN; sample.py's prompts are text
            raise ValueError(f"--{name} {x}: expected {least} or more")
    if hasattr(cfg, "rollouts") and cfg.temperature == 0:
        raise ValueError("--temperature 0: log-probs of training are of logits / temperature")
    if hasattr(cfg, "stage") and cfg.rollouts < 2:
        raise ValueError("--rollouts 1: a group of one has no advantage")
    if not 0 <= getattr(cfg, "gate_low", 0) < getattr(cfg, "gate_high", 2):
        raise ValueError(f"--gate_low {cfg.gate_low}: expected less than --gate_high")
    if not 0 < getattr(cfg, "top_p", 1) <= 1:
        raise ValueError(f"--top_p {cfg.top_p}: expected more than 0 and at most 1")
    if len(betas := getattr(cfg, "betas", (0, 0))) != 2 or not all(0 <= x < 1 for x in betas):
        raise ValueError(f"--betas {betas}: expected two numbers from 0 to below 1")


def make_optimizer(model: nn.Module, lr: float, betas, weight_decay: float, in_host=False):
    """AdamW; decay on matrices only (norms, biases, A_log, D and dt_bias have one axis).

    in_host: the moments stay in host memory. A fused step takes one mesh at a time.
    """
    groups = {}
    for p in model.parameters():
        mesh = getattr(p, "device_mesh", None)  # of a sharded one
        if p.requires_grad:
            groups.setdefault((p.ndim < 2, mesh), []).append(p)
    groups = [
        {"params": groups[key], "weight_decay": 0.0 if key[0] else weight_decay}
        for key in sorted(groups, key=lambda key: key[0])
    ]
    kind = HostAdamW if in_host else torch.optim.AdamW
    return kind(groups, lr=lr, betas=betas, fused=True)


class HostAdamW(torch.optim.AdamW):
    """AdamW whose moments live in host memory and visit the device one parameter at a time:
    8 bytes a parameter less on the device, for one copy each way a step. Gradients are used up."""

    home = "cpu"

    def step(self):
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        grads = [p.grad for p in params]
        self.zero_grad()  # AdamW passes over a parameter without a gradient: one at a time has its
        for p, grad in zip(params, grads, strict=True):
            p.grad, state = grad, self.state[p]
            state.update({key: x.to(p.device) for key, x in state.items()})
            super().step()
            state.update({key: x.to(self.home) for key, x in state.items()})
            p.grad = None


def freeze_routers(model: nn.Module) -> None:
    """RL and MOPD train no router weights (Nemotron 3 Nano); their correction bias still moves."""
    for module in model.modules():
        if isinstance(module, Router):
            module.weight.requires_grad_(False)


def learning_rate(step: int, *, lr, min_lr, warmup, warmup_from=0.0, total, shape) -> float:
    """Linear warm-up from warmup_from to lr, then "constant", "linear" or "cosine" to min_lr."""
    if step < warmup:
        return warmup_from + (lr - warmup_from) * (step + 1) / warmup
    done = (step - warmup) / max(total - warmup, 1)
    if shape == "constant":
        return lr
    if shape == "linear":
        return lr + (min_lr - lr) * min(done, 1.0)
    if shape != "cosine":
        raise ValueError(f"schedule {shape!r}: expected constant, linear or cosine")
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def optimizer_step(model, optimizer, lr: float, max_norm: float, dist) -> float:
    """Sum over ranks, clip to max_norm (global), step, clear; the norm before clipping.

    A finite loss may have a gradient that is not: then ValueError, the weights left as they were.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    dist.sum_gradients(model)
    norm = dist.clip_gradients(model, max_norm)
    if not math.isfinite(norm):
        taken = max((int(x["step"]) for x in optimizer.state.values()), default=0)
        raise ValueError(f"gradient norm is {norm} after {taken} steps, the loss was finite")
    for p in model.parameters():  # fused AdamW on a CPU walks both through memory, strides unseen
        assert p.grad is None or p.grad.stride() == p.stride(), (p.stride(), p.grad.stride())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


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


def check_finite(loss: Tensor, step: int, batch: Batch, rollouts: list[Rollout]) -> None:
    """Stop before a NaN reaches the weights, naming the rows; the last checkpoint stays good."""
    if not torch.isfinite(loss):
        indices = batch.response_ids[batch.valid].unique().tolist()  # not of padding
        rows = sorted({str(rollouts[i].row.get("id")) for i in indices})
        raise ValueError(f"loss is {loss.item()} at step {step}; rows {', '.join(rows[:20])}")


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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB


def commit() -> str:
    """The commit of this code, or "" outside a repository."""
    command = ["git", "-C", os.path.dirname(__file__), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
