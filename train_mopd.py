"""MOPD: multi-domain on-policy distillation from the cascade's own checkpoints (Eq. 2-4).

    R=runs/out; python train_mopd.py --config toy --init $R/multi_domain_rl --out $R/mopd \
        --teachers math=$R/sft,preference=$R/rlhf_side,multi_domain=$R/if_rl+$R/multi_domain_rl
    torchrun --nproc_per_node 8 train_mopd.py --config full --init HF_DIR --data ROWS.jsonl \
        --teachers math=DIR,preference=DIR,multi_domain=DIR --out OUT

A step: draw prompts, sample responses from the student, let the teacher of each prompt's domain
score the very tokens that were sampled, take one gradient step on the log-ratio. Rewards play no
part in the loss; they are logged where a row has a verifier, or needs a judge and --judge_url names
one. A teacher may be several directories joined by "+": the one whose manifest shows the best
scores in the teacher's domains is taken. default=DIR teaches the domains that have no other
teacher; with the directory of --init it holds them where they were (self-anchor).
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
from nanocascade.engine.optim import (
    check_finite,
    freeze_routers,
    learning_rate,
    make_optimizer,
    optimizer_step,
)
from nanocascade.importance import masked_mean
from nanocascade.model.moe import load_imbalance, update_correction_bias
from nanocascade.mopd import compute_mopd_loss, denominators
from nanocascade.plan import plan
from nanocascade.rollouts.groups import apply_overlong, collect_groups, rollout_metrics
from nanocascade.rollouts.scoring import Scorer
from nanocascade.run.log import Mean
from nanocascade.run.run import Run
from nanocascade.run.settings import RunConfig, require_flags
from nanocascade.teachers import Teachers, token_shares

# ---- Config --------------------------------------------------------------------------------------


@dataclass
class Config(RunConfig):
    teachers: tuple[str, ...] = ()  # NAME=DIR; NAME: a domain, a group of stages.py, or default
    # Steps and rate of NeMo-RL, mopd-cascade. The report: 52 and 3e-6 (table), 40-50 (text).
    steps: int = 52  # optimizer steps
    prompts: int = 128  # prompts a step, over all ranks
    rollouts: int = 4  # responses a prompt (512 x 1 is as good and steadier)
    lr: float = 2e-6  # peak learning rate
    warmup: int = 30  # steps of linear warm-up: the first gradients are large
    warmup_from: float = 2e-7  # learning rate that the warm-up starts from
    schedule: str = "constant"  # after the warm-up: constant, or linear or cosine to min_lr
    min_lr: float = 0.0  # learning rate that the schedule falls towards, unless constant
    domains: tuple[str, ...] = ()  # train on prompts of these domains only (default: all taught)
    balance: bool = False  # draw as many prompts of every domain, however many rows it has
    denominator: str = "response"  # weighs 1: a response (Eq. 4), or a token (NeMo-RL's re-run)
    overlong: str = "off"  # responses cut off at the limit: off (in the loss), filter (no loss)
    max_sequence_error: float = 0.0  # mask responses of a larger mean exp|train - sampler| (0: off)
    gate: str = "zero"  # tokens outside the band: zero (the report), clamp, or none
    gate_low: float = 0.5  # lowest train/sampler ratio inside the band
    gate_high: float = 2.0  # and the highest
    max_new_tokens: int = 96 * 1024  # of a response; with tools, of the whole episode
    max_turns: int = 16  # assistant turns of an episode with tools
    temperature: float = 1.0  # of sampling; all log-probs are of logits / temperature
    top_p: float = 1.0  # nucleus of sampling; the loss scores the full distribution
    routing_replay: bool = False  # train with the experts chosen while sampling
    train_router: bool = False  # train router weights too (the recipe freezes them)


PRESETS = {
    "toy": {  # a rate that falls to 0: at a constant one Adam's noise costs mathematics (LOG.md)
        "data": ("toy",),
        "eval_data": ("toy",),
        "steps": 50,
        "prompts": 768,
        "rollouts": 1,
        "lr": 8e-4,
        "warmup": 8,
        "warmup_from": 8e-5,
        "schedule": "linear",
        "max_new_tokens": 72,
        "max_turns": 4,
        "toy_rows": 4000,
    },
    "small": {
        "prompts": 32,
        "max_new_tokens": 512,
        "lr": 1e-6,
        "warmup_from": 1e-7,
        "eval_max_new_tokens": 512,
    },
    "full": stages.FULL_LAYOUT | {"eval_max_new_tokens": 49152},
}


def main():
    cfg = parse_args(Config, presets=PRESETS)
    if cfg.dry_run and not cfg.data:
        return plan.report(cfg)
    require_flags(cfg, "mopd")
    with distributed.start(cfg) as dist:
        train(cfg, dist)


def train(cfg: Config, dist: distributed.Dist):
    # ---- Setup -----------------------------------------------------------------------------------
    drawn = stages.MOPD_SHARES if cfg.data == ("toy",) else stages.DOMAINS
    teachers = Teachers(cfg.teachers, cfg.domains, drawn, dist)
    run = Run(cfg, "mopd", dist, teachers.manifest)
    teachers.check_tokenizer(run.tokenizer)
    tokenizer = run.tokenizer
    sampling = Sampling(
        cfg.max_new_tokens,
        cfg.temperature,
        cfg.top_p,
        max_turns=cfg.max_turns,
        max_rows=cfg.max_rows,
        return_experts=cfg.routing_replay,
    )

    # ---- Data ------------------------------------------------------------------------------------
    rows = run.train_rows(teachers.domains, per_domain=cfg.toy_rows)
    scorer = Scorer(run.judge(rows, needed=False))
    if cfg.dry_run:
        return run.describe(rows)

    # ---- Model -----------------------------------------------------------------------------------
    model = run.model
    if not cfg.train_router:
        freeze_routers(model)

    # ---- Optimizer -------------------------------------------------------------------------------
    optimizer = make_optimizer(model, cfg.lr, cfg.betas, cfg.weight_decay, cfg.offload_optimizer)

    # ---- Resume ----------------------------------------------------------------------------------
    # Files hold their own proportions; generated prompts come in those of the released file.
    shares = stages.MOPD_SHARES if cfg.data == ("toy",) and not cfg.balance else {}
    weights = {d: shares.get(d, 1) for d in teachers.domains} if cfg.balance or shares else None
    rows, stream, first = run.resume(model, optimizer, rows, weights)
    run.evaluate_before(model, scorer, teachers.domains)

    # ---- Loop ------------------------------------------------------------------------------------
    for step in run.progress(first, cfg.steps):
        began = time.perf_counter()
        # Rollouts: pi_inf is the student itself, with a cache (sampler.py).
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
            dynamic=False,
        )
        apply_overlong(groups, cfg.overlong)
        rollouts = [x for g in groups for x in g]
        taught = teachers.split(rollouts)  # by teacher; response_ids count in this order
        rollouts = [x for _, part in taught for x in part]

        # One gradient step. The denominators are counted before the first backward.
        counts = [x.num_loss_tokens for x in rollouts] + [0]  # an empty last part points at the 0
        num_tokens, num_responses = denominators(
            torch.tensor(counts, device=dist.device),  # (o,)
            dist.sum(sum(counts)),
            dist.sum(sum(x > 0 for x in counts)),
            cfg.denominator,
        )
        metrics, load, start = Mean(), no_load(model), 0
        for name, part in taught:  # one teacher resident at a time
            teacher = teachers.models[name]
            for batch in step_batches(model, dist, part, cfg.micro_tokens, cfg.routing_replay):
                teacher_logprobs = teacher.logprobs(batch, cfg.temperature)
                routing = new_routing(model, batch)
                train_logprobs, entropy = score_tokens(model, batch, cfg.temperature, routing)
                loss, values = compute_mopd_loss(
                    train_logprobs,
                    teacher_logprobs,
                    batch.sampler_logprobs,
                    batch.mask,
                    cfg.gate_low,
                    cfg.gate_high,
                    response_ids=batch.response_ids + start,
                    num_tokens=num_tokens,
                    num_responses=num_responses,
                    gate=cfg.gate,
                    max_sequence_error=cfg.max_sequence_error,
                )
                check_finite(loss, step, batch, part)
                loss.backward()
                values["entropy"] = masked_mean(entropy, batch.mask)
                values[f"mopd/reverse_kl/{name}"] = values["mopd/reverse_kl"]
                metrics.add(values, weight=int(batch.mask.sum()))
                load += routing.load(batch.valid, model.config.num_experts)
            start += len(part)
            teacher.park()
        lr = learning_rate(
            step,
            lr=cfg.lr,
            min_lr=cfg.min_lr,
            warmup=cfg.warmup,
            warmup_from=cfg.warmup_from,
            total=cfg.steps,
            shape=cfg.schedule,
        )
        norm = optimizer_step(model, optimizer, lr, cfg.max_norm, dist)
        load = dist.sum(load)
        update_correction_bias(model, load, cfg.bias_rate)

        # Log, look, save.
        values = rollout_metrics(groups, dist) | metrics.result(dist) | timing
        values |= token_shares(rollouts, dist)
        values |= {"grad_norm": norm, "lr": lr, "moe/load_max": load_imbalance(load)}
        run.log_step(step, values, groups, began)
        run.save(step + 1, model, optimizer, stream, rows)

    # ---- Finish ----------------------------------------------------------------------------------
    run.finish(model, scorer, teachers.domains)


if __name__ == "__main__":
    run_main(main)
