"""MOPD: multi-domain on-policy distillation from the cascade's own checkpoints (Eq. 2-4).

    R=runs/out; python train_mopd.py --config toy --init $R/multi_domain_rl --out $R/mopd \
        --teachers math=$R/sft,preference=$R/rlhf_side,multi_domain=$R/if_rl+$R/multi_domain_rl
    torchrun --nproc_per_node 8 train_mopd.py --config full --init HF_DIR --data ROWS.jsonl \
        --teachers math=DIR,preference=DIR,multi_domain=DIR --out OUT

A step: draw prompts, sample responses from the student, let the teacher of each prompt's domain
score the sampled tokens, take one gradient step on the log-ratio. The loss has no rewards; they are
logged if a row has a verifier, or needs a judge and --judge_url names one. A teacher may be several
directories joined by "+": the one with the best scores in the teacher's domains, by their
manifests, is used. default=DIR teaches the domains without a teacher of their own; with the
directory of --init it keeps these domains from drifting (self-anchor).
"""

from functools import partial

import torch

from nanocascade import stages
from nanocascade.cli import run_main
from nanocascade.data.batch import step_batches
from nanocascade.data.episode import Sampling
from nanocascade.engine.distributed import Dist
from nanocascade.engine.optim import freeze_routers, make_optimizer
from nanocascade.engine.update import Update
from nanocascade.mopd import compute_mopd_loss, denominators
from nanocascade.rollouts.groups import collect_groups, mask_overlong, rollout_metrics
from nanocascade.rollouts.rollout import roll_out
from nanocascade.run.evaluate import make_scorer
from nanocascade.run.run import Run, launch
from nanocascade.run.settings import TOY, Flags
from nanocascade.sampler import step_seed
from nanocascade.teachers import Teachers, token_shares

# ---- Config --------------------------------------------------------------------------------------

# stages.MOPD_STAGE has the numbers, stages.MOPD the meaning of each setting.


def train(flags: Flags, dist: Dist):
    # ---- Setup -----------------------------------------------------------------------------------
    recipe, settings = flags.recipe, flags.run
    domains_drawn = stages.MOPD_SHARES if settings.data == (TOY,) else stages.DOMAINS
    teachers = Teachers(recipe.teachers, recipe.domains, domains_drawn, dist)
    run = Run(flags, dist, teachers.manifest)
    teachers.check_tokenizer(run.tokenizer, run.model_config.vocab_size)
    sampling = Sampling.of(recipe, settings.max_rows)

    # ---- Data ------------------------------------------------------------------------------------
    rows = run.read_rows(teachers.domains, sampling)
    scorer = make_scorer(settings, rows, run.evaluation, needed=False)
    if settings.dry_run:
        return run.report(rows)

    # ---- Model -----------------------------------------------------------------------------------
    model = run.load_model()
    if recipe.lora_rank:
        teachers.share_base(model, run.base, recipe.lora_rank)
    # pi_inf is the student itself, with a cache (sampler.py).
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
    if not recipe.train_router:
        freeze_routers(model)

    # ---- Optimizer -------------------------------------------------------------------------------
    in_host = flags.layout.offload_optimizer
    optimizer = make_optimizer(model, recipe.lr, recipe.betas, recipe.weight_decay, in_host)

    # ---- Resume ----------------------------------------------------------------------------------
    # Rows of files keep their proportions; generated prompts have those of the released file.
    shares = stages.MOPD_SHARES if settings.data == (TOY,) and not recipe.balance else {}
    weights = {d: shares.get(d, 1) for d in teachers.domains} if recipe.balance or shares else None
    stream, first = run.resume(model, optimizer, rows, weights)
    run.evaluation.before(model, scorer, dist, run.parent)

    # ---- Loop ------------------------------------------------------------------------------------
    for step in run.log.steps(first, recipe.steps, recipe.stage):
        # Rollouts from the student, scored if there is a verifier.
        seed = step_seed(settings.seed, step)
        groups, drawn_metrics = collect_groups(
            sample_groups, stream, recipe.prompts, recipe.rollouts, seed, dist
        )
        drawn_metrics |= scorer.judge_metrics(dist)
        mask_overlong(groups, recipe.overlong)
        run.log.choose(groups)
        rollouts = [x for group in groups for x in group]

        # One gradient step. The denominators are counted before the first backward.
        counts = [x.num_loss_tokens for x in rollouts]
        totals = dist.sum(sum(counts)), dist.sum(sum(x > 0 for x in counts))
        update = Update(model, optimizer, recipe, step, dist)
        for name, part in teachers.split(rollouts):  # one teacher on the device at a time
            teacher = teachers.models[name]
            own = torch.tensor([x.num_loss_tokens for x in part] or [0], device=dist.device)  # (o,)
            num_tokens, num_responses = denominators(own, *totals, recipe.denominator)
            for batch in micro_batches(part):
                teacher_logprobs = teacher.logprobs(batch, recipe.temperature)
                train_logprobs = update.forward(batch, recipe.temperature)
                loss, metrics = compute_mopd_loss(
                    train_logprobs,
                    teacher_logprobs,
                    batch.sampler_logprobs,
                    batch.mask,
                    recipe.gate_low,
                    recipe.gate_high,
                    response_ids=batch.response_ids,
                    num_tokens=num_tokens,
                    num_responses=num_responses,
                    gate=recipe.gate,
                    max_sequence_error=recipe.max_sequence_error,
                )
                metrics[f"mopd/reverse_kl/{name}"] = metrics["mopd/reverse_kl"]
                update.backward(loss, metrics, part, teacher_logprobs)
            teacher.park()

        # Log, look, save.
        values = rollout_metrics(groups, dist) | update.finish() | drawn_metrics
        run.log.step(step, values | token_shares(rollouts, dist), groups)
        run.save(step + 1, model, optimizer, stream)

    # ---- Finish ----------------------------------------------------------------------------------
    run.finish(model, scorer)


def command():
    run_main(partial(launch, stages.MOPD, train))


if __name__ == "__main__":
    command()
