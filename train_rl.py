"""Cascade RL: one stage of strictly on-policy GRPO (Nemotron-Cascade 2, Eq. 1).

    python train_rl.py --config toy --stage if_rl --init runs/out/sft --out runs/out/if_rl
    python train_rl.py --config small --init HF_DIR --data ROWS.jsonl --out OUT
    torchrun --nproc_per_node 8 train_rl.py --config full --stage if_rl --init HF_DIR \
        --data ROWS.jsonl --out OUT

A step: draw prompts, sample a group of responses to each from the current policy, score them,
standardise rewards within groups, take ONE gradient step. What differs between the stages is a row
of nanocascade/stages.py. A field left at "none" takes the stage's value.
"""

import time
from dataclasses import dataclass

import torch

from nanocascade import stages
from nanocascade.cli import parse_args, run_main
from nanocascade.data.batch import step_batches
from nanocascade.data.episode import Sampling
from nanocascade.engine import distributed
from nanocascade.engine.forward import new_routing, no_load, score_tokens
from nanocascade.engine.frozen import FrozenModel
from nanocascade.engine.optim import (
    check_finite,
    freeze_routers,
    learning_rate,
    make_optimizer,
    optimizer_step,
)
from nanocascade.grpo import group_advantages, grpo_loss
from nanocascade.importance import masked_mean
from nanocascade.model.moe import load_imbalance, update_correction_bias
from nanocascade.plan import plan
from nanocascade.rewards import kind_of
from nanocascade.rollouts.groups import (
    apply_overlong,
    collect_groups,
    in_reach,
    mask_unsolved,
    rollout_metrics,
)
from nanocascade.rollouts.scoring import Scorer
from nanocascade.run.log import Mean
from nanocascade.run.run import Run
from nanocascade.run.settings import RunConfig, require_flags

# ---- Config --------------------------------------------------------------------------------------


@dataclass
class Config(RunConfig):
    stage: str = "math_rl"  # a row of stages.py
    steps: int | None = None  # optimizer steps
    prompts: int | None = None  # prompts a step, over all ranks
    rollouts: int | None = None  # responses a prompt
    lr: float | None = None  # peak learning rate
    min_lr: float | None = None  # what a linear schedule falls towards
    warmup: int | None = None  # steps of linear warm-up
    schedule: str | None = None  # constant, linear or cosine
    max_new_tokens: int | None = None  # of a response; with tools, of the whole episode
    max_tokens: int | None = None  # of prompt and response together (0 = no limit of its own)
    max_turns: int | None = None  # assistant turns of an episode with tools
    temperature: float | None = None  # of sampling; all log-probs are of logits / temperature
    thinking: bool | None = None  # responses open with a thought, in training and evaluation
    top_p: float | None = None  # nucleus of sampling; the loss scores the full distribution
    overlong: str | None = None  # penalty (cut off = reward 0) or filter (cut off = no loss)
    dynamic_filtering: bool | None = None  # replace groups that are all right or all wrong
    mask_unsolved: float | None = None  # mask prompts none of whose outcomes exceeds this
    max_pass_rate: float | None = None  # drop prompts the initial model solves more often
    keep_unsolved: float | None = None  # share kept of the prompts that it never solves
    pass_samples: int | None = None  # tries a prompt without pass_rate, to find that out
    curriculum: tuple[float, ...] = ()  # draw rows by pass_rate: mean at start, mean at end, std
    kl_coef: float | None = None  # of k3 against the start of the stage
    pairing: str | None = None  # preference rows: all pairs or circle
    normalize_std: bool = True  # divide advantages by the group's standard deviation
    # OURS: no gate unless asked for (the Nano recipe masks tokens; Eq. 1 has no ratio to mask by).
    gate_low: float = 0.0  # masked importance sampling: lowest train/sampler ratio (0 = off)
    gate_high: float = 2.0  # and the highest
    max_sequence_error: float = 0.0  # mask responses of a larger mean exp|train - sampler| (0: off)
    routing_replay: bool = False  # train with the experts chosen while sampling
    train_router: bool = False  # train router weights too (the recipe freezes them in RL)


PRESETS = {
    "toy": {"data": ("toy",), "eval_data": ("toy",)},
    "small": {
        "prompts": 16,
        "rollouts": 8,
        "max_new_tokens": 512,
        "lr": 1e-6,
        "steps": 100,
        "eval_max_new_tokens": 512,
    },
    "full": stages.FULL_LAYOUT | {"eval_max_new_tokens": 49152},
}


def main():
    cfg = parse_args(Config, presets=PRESETS)
    stage = stages.settings(cfg.stage, toy=cfg.config == "toy")
    stages.apply_stage(cfg, stage)
    if cfg.dry_run and not cfg.data:
        return plan.report(cfg)
    require_flags(cfg, cfg.stage)
    with distributed.start(cfg) as dist:
        train(cfg, stage, dist)


def train(cfg: Config, stage: stages.Stage, dist: distributed.Dist):
    # ---- Setup -----------------------------------------------------------------------------------
    run = Run(cfg, cfg.stage, dist)
    tokenizer = run.tokenizer
    sampling = Sampling(
        cfg.max_new_tokens,
        cfg.temperature,
        cfg.top_p,
        max_turns=cfg.max_turns,
        max_rows=cfg.max_rows,
        return_experts=cfg.routing_replay,
        max_tokens=cfg.max_tokens,
        thinking=cfg.thinking,
    )

    # ---- Data ------------------------------------------------------------------------------------
    rows = run.train_rows(tuple(stage.domains), per_domain=cfg.toy_rows)
    scorer = Scorer(run.judge(rows), pairing=cfg.pairing)
    tools = {x["environment"]["name"] for x in rows if "environment" in x}
    if tools and cfg.max_turns < 2:
        raise ValueError(f"--max_turns {cfg.max_turns}: rows with tools ({tools}) need 2 or more")
    check_outcomes(cfg, rows)
    if cfg.dry_run:
        return run.describe(rows)

    # ---- Model -----------------------------------------------------------------------------------
    model = run.model
    reference = FrozenModel(cfg.init, dist) if cfg.kl_coef else None
    if not cfg.train_router:
        freeze_routers(model)
    if (cfg.max_pass_rate < 1 or cfg.keep_unsolved < 1) and not run.resumes:
        rows = in_reach(
            model,
            tokenizer,
            rows,
            sampling,
            scorer,
            cfg.seed,
            dist,
            samples=cfg.pass_samples,
            max_pass_rate=cfg.max_pass_rate,
            keep_unsolved=cfg.keep_unsolved,
        )

    # ---- Optimizer -------------------------------------------------------------------------------
    optimizer = make_optimizer(model, cfg.lr, cfg.betas, cfg.weight_decay, cfg.offload_optimizer)

    # ---- Resume ----------------------------------------------------------------------------------
    rows, stream, first = run.resume(model, optimizer, rows, weights=stage.domains)
    run.evaluate_before(model, scorer, stage.domains)

    # ---- Loop ------------------------------------------------------------------------------------
    for step in run.progress(first, cfg.steps):
        began = time.perf_counter()
        stream.progress = step / max(cfg.steps - 1, 1)
        # Rollouts: pi_inf is the model itself, with a cache (sampler.py).
        groups, timing = collect_groups(
            model,
            tokenizer,
            stream,
            cfg.prompts,
            cfg.rollouts,
            sampling,
            cfg.seed,
            step,
            scorer,
            dist,
            cfg.dynamic_filtering,
        )
        apply_overlong(groups, cfg.overlong)  # the filter; a penalty is the verdict 0 it has got
        mask_unsolved(groups, cfg.mask_unsolved)

        # Advantages, Eq. 1. An overlong-filtered response still counts in its group's mean and std.
        rewards = torch.tensor([x.reward for group in groups for x in group])  # (p*r,)
        rewards = rewards.view(-1, cfg.rollouts)  # (p, r)
        advantages = group_advantages(rewards, normalize=cfg.normalize_std)  # (p, r)
        rollouts = [x for group in groups for x in group]
        for rollout, advantage in zip(rollouts, advantages.flatten().tolist(), strict=True):
            rollout.advantage = advantage

        # One gradient step. The denominator is counted before the first backward.
        num_tokens = max(dist.sum(sum(x.num_loss_tokens for x in rollouts)), 1)
        batches = step_batches(model, dist, rollouts, cfg.micro_tokens, cfg.routing_replay)
        metrics, load = Mean(), no_load(model)
        for batch in batches:
            ref_logprobs = reference.logprobs(batch, cfg.temperature) if reference else None
            routing = new_routing(model, batch)
            train_logprobs, entropy = score_tokens(model, batch, cfg.temperature, routing)
            loss, values = grpo_loss(
                train_logprobs,
                batch.advantages,
                batch.mask,
                num_tokens=num_tokens,
                sampler_logprobs=batch.sampler_logprobs,
                ref_logprobs=ref_logprobs,
                kl_coef=cfg.kl_coef,
                gate=(cfg.gate_low, cfg.gate_high) if cfg.gate_low else None,
                max_sequence_error=cfg.max_sequence_error,
                response_ids=batch.response_ids,
            )
            check_finite(loss, step, batch, rollouts)
            loss.backward()
            values["entropy"] = masked_mean(entropy, batch.mask)
            metrics.add(values, weight=int(batch.mask.sum()))
            load += routing.load(batch.valid, model.config.num_experts)
        if reference:
            reference.park()
        lr = learning_rate(
            step,
            lr=cfg.lr,
            min_lr=cfg.min_lr,
            warmup=cfg.warmup,
            total=cfg.steps,
            shape=cfg.schedule,
        )
        norm = optimizer_step(model, optimizer, lr, cfg.max_norm, dist)
        load = dist.sum(load)
        update_correction_bias(model, load, cfg.bias_rate)

        # Log, look, save.
        values = rollout_metrics(groups, dist) | metrics.result(dist) | timing
        values |= {"grad_norm": norm, "lr": lr, "moe/load_max": load_imbalance(load)}
        run.log_step(step, values, groups, began)
        run.save(step + 1, model, optimizer, stream, rows)

    # ---- Finish ----------------------------------------------------------------------------------
    run.finish(model, scorer, stage.domains)


def check_outcomes(cfg: Config, rows: list[dict]) -> None:
    """Refuse what asks which rollouts are right where nobody can tell: preference rows have an
    outcome only against stored answers of the SFT model."""
    untold = [x["id"] for x in rows if kind_of(x) == "preference" and "reference" not in x]
    asked = {
        "dynamic_filtering": cfg.dynamic_filtering,
        "mask_unsolved": cfg.mask_unsolved >= 0,
        "max_pass_rate": cfg.max_pass_rate < 1,
        "keep_unsolved": cfg.keep_unsolved < 1,
    }
    for name in [name for name, x in asked.items() if x and untold]:
        raise ValueError(
            f"--{name} {getattr(cfg, name)}: preference rows ({untold[0]}, ...) have"
            " no outcome without --references"
        )


if __name__ == "__main__":
    run_main(main)
