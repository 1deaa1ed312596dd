"""Cascade RL: one stage of strictly on-policy GRPO (Nemotron-Cascade 2, Eq. 1).

    python train_rl.py --config toy --stage if_rl --init runs/out/sft --out runs/out/if_rl
    python train_rl.py --config small --init HF_DIR --data ROWS.jsonl --out OUT
    torchrun --nproc_per_node 8 train_rl.py --config full --stage if_rl --init HF_DIR \
        --data ROWS.jsonl --out OUT

A step: draw prompts, sample a group of responses to each from the current policy, score them,
standardise rewards within groups, take ONE gradient step. The stages differ only in their settings,
the rows of nanocascade/stages.py.
"""

from functools import partial

import torch

from nanocascade import stages
from nanocascade.cli import run_main
from nanocascade.data.batch import step_batches
from nanocascade.data.episode import Sampling
from nanocascade.engine.distributed import Dist
from nanocascade.engine.frozen import FrozenModel
from nanocascade.engine.optim import freeze_routers, make_optimizer
from nanocascade.engine.update import Update
from nanocascade.grpo import group_advantages, grpo_loss
from nanocascade.rollouts.groups import (
    collect_groups,
    filter_by_pass_rate,
    mask_overlong,
    mask_unsolved,
    rollout_metrics,
)
from nanocascade.rollouts.rollout import roll_out
from nanocascade.run.evaluate import make_scorer
from nanocascade.run.rows import check_stage
from nanocascade.run.run import Run, launch
from nanocascade.run.settings import Flags
from nanocascade.sampler import step_seed

# ---- Config --------------------------------------------------------------------------------------

# stages.RL_STAGES has the numbers of each stage, stages.RL the meaning of each setting.


def train(flags: Flags, dist: Dist):
    # ---- Setup -----------------------------------------------------------------------------------
    recipe, settings, run = flags.recipe, flags.run, Run(flags, dist)
    shares = dict.fromkeys(recipe.domains, 1.0) or stages.RL_STAGES[recipe.stage]["domains"]
    sampling = Sampling.of(recipe, settings.max_rows)

    # ---- Data ------------------------------------------------------------------------------------
    rows = run.read_rows(shares, sampling)
    check_stage(rows, recipe)
    scorer = make_scorer(settings, rows, run.evaluation, pairing=recipe.pairing)
    if settings.dry_run:
        return run.report(rows)

    # ---- Model -----------------------------------------------------------------------------------
    model = run.load_model()
    # pi_inf is the model itself, with a cache (sampler.py).
    sample_groups = partial(
        roll_out, model, run.tokenizer, sampling=sampling, scorer=scorer, dist=dist
    )
    micro_batches = partial(
        step_batches,
        model,
        dist,
        micro_tokens=settings.micro_tokens,
        replay=recipe.routing_replay,
        share=settings.share_prompts,
    )
    reference = FrozenModel(settings.init, dist) if recipe.kl_coef else None
    if reference and recipe.lora_rank:
        reference.share_base(model, run.base, recipe.lora_rank)
    if not recipe.train_router:
        freeze_routers(model)
    kept = None  # all rows
    if not run.resumes:
        kept = filter_by_pass_rate(sample_groups, rows, recipe, settings.seed, dist)

    # ---- Optimizer -------------------------------------------------------------------------------
    in_host = flags.layout.offload_optimizer
    optimizer = make_optimizer(model, recipe.lr, recipe.betas, recipe.weight_decay, in_host)

    # ---- Resume ----------------------------------------------------------------------------------
    stream, first = run.resume(model, optimizer, rows, shares, kept)
    run.evaluation.before(model, scorer, dist, run.parent)

    # ---- Loop ------------------------------------------------------------------------------------
    for step in run.log.steps(first, recipe.steps, recipe.stage):
        # Rollouts from the current policy, scored.
        seed, dynamic = step_seed(settings.seed, step), recipe.dynamic_filtering
        groups, drawn_metrics = collect_groups(
            sample_groups, stream, recipe.prompts, recipe.rollouts, seed, dist, dynamic
        )
        drawn_metrics |= scorer.judge_metrics(dist)
        mask_overlong(groups, recipe.overlong)
        mask_unsolved(groups, recipe.mask_unsolved)
        run.log.choose(groups)

        # Advantages, Eq. 1. An overlong-filtered response still counts in its group's mean and std.
        rewards = torch.tensor([[x.reward for x in group] for group in groups])  # (p, r)
        rewards = rewards.view(-1, recipe.rollouts)  # also if this rank has no group
        advantages = group_advantages(rewards, normalize=recipe.normalize_std)  # (p, r)
        rollouts = [x for group in groups for x in group]
        for rollout, advantage in zip(rollouts, advantages.flatten().tolist(), strict=True):
            rollout.advantage = advantage

        # One gradient step. The denominator is counted before the first backward.
        num_tokens = max(dist.sum(sum(x.num_loss_tokens for x in rollouts)), 1)
        update = Update(model, optimizer, recipe, step, dist)
        for batch in micro_batches(rollouts):
            ref_logprobs = reference.logprobs(batch, recipe.temperature) if reference else None
            train_logprobs = update.forward(batch, recipe.temperature)
            loss, metrics = grpo_loss(
                train_logprobs,
                batch.advantages,
                batch.mask,
                num_tokens=num_tokens,
                sampler_logprobs=batch.sampler_logprobs,
                ref_logprobs=ref_logprobs,
                kl_coef=recipe.kl_coef,
                gate=(recipe.gate_low, recipe.gate_high) if recipe.gate_low else None,
                max_sequence_error=recipe.max_sequence_error,
                response_ids=batch.response_ids,
            )
            update.backward(loss, metrics, rollouts)
        if reference:
            reference.park()

        # Log, look, save.
        run.log.step(step, rollout_metrics(groups, dist) | update.finish() | drawn_metrics, groups)
        run.save(step + 1, model, optimizer, stream)

    # ---- Finish ----------------------------------------------------------------------------------
    run.finish(model, scorer)


def command():
    run_main(partial(launch, stages.RL, train))


if __name__ == "__main__":
    command()
