"""SFT: the first stage of the cascade. Rows are packed, the loss is on assistant tokens.

    python train_sft.py --config toy --out runs/out/sft
    python train_sft.py --config small --init HF_DIR --data ROWS.jsonl --out OUT
    torchrun --nproc_per_node 8 train_sft.py --config full --init HF_DIR --data ROWS.jsonl --out OUT

A step: draw conversations until they hold batch_tokens tokens, pack them into micro-batches of
micro_tokens (attention, convolution and SSM state start anew at each document), take one gradient
step. The loss tokens of all ranks are counted before the first backward.
"""

import random
from functools import partial

from nanocascade import stages
from nanocascade.cli import merge, run_main
from nanocascade.data.batch import step_batches
from nanocascade.data.episode import Sampling
from nanocascade.engine import distributed
from nanocascade.engine.optim import make_optimizer
from nanocascade.engine.update import Update
from nanocascade.plan.report import report
from nanocascade.rollouts.scoring import Scorer
from nanocascade.run.evaluate import find_judge
from nanocascade.run.rows import (
    check_conversations,
    check_sandbox,
    read_training_rows,
    sft_document,
)
from nanocascade.run.run import Run, launch
from nanocascade.run.settings import TOY, EvalSettings, RunSettings
from nanocascade.sft import sft_loss
from nanocascade.toy import tasks

# ---- Config --------------------------------------------------------------------------------------

# stages.SFT_STAGE has the numbers, stages.SFT the meaning of each setting.


def train(
    recipe: stages.SFT,
    settings: RunSettings,
    layout: distributed.Layout,
    eval_settings: EvalSettings,
    dist: distributed.Dist,
):
    # ---- Setup -----------------------------------------------------------------------------------
    run = Run(recipe.stage, settings, merge(recipe, settings, layout, eval_settings), dist)
    tokenizer = run.tokenizer
    sampling = Sampling(eval_settings.eval_max_new_tokens, max_rows=settings.max_rows)

    # ---- Data ------------------------------------------------------------------------------------
    domains = tuple(tasks.SFT_SHARES)
    evaluation = run.read_evaluation(domains, sampling, eval_settings)
    rows = read_training_rows(settings, recipe.stage, domains, dist)
    if settings.data != (TOY,):
        check_conversations(rows, tokenizer, recipe.row_tokens, recipe.strip_thinking)
    check_sandbox(evaluation.all_rows(), settings, eval_settings.eval_data, dist)
    judge = find_judge(settings, (), evaluation)
    scorer = Scorer(judge, settings.score_workers, settings.judge_concurrency)
    if settings.dry_run:
        longest = run.longest_prompt(rows)
        return report(recipe, settings, layout, eval_settings, run.model_config, longest)

    # ---- Model -----------------------------------------------------------------------------------
    model = run.load_model(recipe.lora_rank)

    # ---- Optimizer -------------------------------------------------------------------------------
    optimizer = make_optimizer(
        model, recipe.lr, recipe.betas, recipe.weight_decay, layout.offload_optimizer
    )

    # ---- Resume ----------------------------------------------------------------------------------
    shares = tasks.SFT_SHARES if settings.data == (TOY,) else None
    stream, first = run.resume(model, optimizer, rows, evaluation, shares)

    # ---- Loop ------------------------------------------------------------------------------------
    for step in run.log.steps(first, recipe.steps, recipe.stage):
        # Documents, until the batch is full; all ranks draw the same ones and take their share.
        documents, size = [], 0
        while size < recipe.batch_tokens:
            position, row = stream.take(1)[0]
            stripped = random.Random(f"{settings.seed} {position}").random() < recipe.strip_thinking
            # If the template cannot show thoughts, train on answers with the work.
            thinking = tokenizer.thinks and not stripped
            documents.append(sft_document(row, tokenizer, thinking, recipe.row_tokens))
            size += len(documents[-1].tokens)
        num_tokens = sum(x.num_loss_tokens for x in documents)
        documents = dist.shard(documents)

        # One gradient step. The denominator was counted over all micro-batches and ranks.
        update = Update(model, optimizer, recipe, step, dist)
        for batch in step_batches(model, dist, documents, settings.micro_tokens):
            train_logprobs = update.forward(batch)
            loss, metrics = sft_loss(train_logprobs, batch.mask, num_tokens=num_tokens)
            update.backward(loss, metrics, documents)

        # Log, save.
        run.log.step(step, update.finish() | {"batch/tokens": size})
        run.save(step + 1, model, optimizer, stream, evaluation)

    # ---- Finish ----------------------------------------------------------------------------------
    references = run.out / "references.jsonl"
    evaluation.store_references(model, scorer, dist, references, recipe.reference_samples)
    run.finish(model, scorer, evaluation, recipe.lora_rank)


def command():
    run_main(partial(launch, stages.SFT, train))


if __name__ == "__main__":
    command()
