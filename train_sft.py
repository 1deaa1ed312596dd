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
from nanocascade.cli import run_main
from nanocascade.data.batch import step_batches
from nanocascade.data.episode import Sampling
from nanocascade.engine.distributed import Dist
from nanocascade.engine.optim import make_optimizer
from nanocascade.engine.update import Update
from nanocascade.run.evaluate import make_scorer
from nanocascade.run.rows import sft_document
from nanocascade.run.run import Run, launch
from nanocascade.run.settings import TOY, Flags
from nanocascade.sft import sft_loss
from nanocascade.toy import tasks

# ---- Config --------------------------------------------------------------------------------------

# stages.SFT_STAGE has the numbers, stages.SFT the meaning of each setting.


def train(flags: Flags, dist: Dist):
    # ---- Setup -----------------------------------------------------------------------------------
    recipe, settings, run = flags.recipe, flags.run, Run(flags, dist)
    tokenizer = run.tokenizer
    sampling = Sampling(flags.evaluation.eval_max_new_tokens, max_rows=settings.max_rows)

    # ---- Data ------------------------------------------------------------------------------------
    rows = run.read_rows(tuple(tasks.SFT_SHARES), sampling)
    scorer = make_scorer(settings, (), run.evaluation)
    if settings.dry_run:
        return run.report(rows)

    # ---- Model -----------------------------------------------------------------------------------
    model = run.load_model()

    # ---- Optimizer -------------------------------------------------------------------------------
    in_host = flags.layout.offload_optimizer
    optimizer = make_optimizer(model, recipe.lr, recipe.betas, recipe.weight_decay, in_host)

    # ---- Resume ----------------------------------------------------------------------------------
    shares = tasks.SFT_SHARES if settings.data == (TOY,) else None
    stream, first = run.resume(model, optimizer, rows, shares)

    # ---- Loop ------------------------------------------------------------------------------------
    for step in run.log.steps(first, recipe.steps, recipe.stage):
        # Documents, until the batch is full; all ranks draw the same ones and take their share.
        documents, size = [], 0
        while size < recipe.batch_tokens:
            position, row = stream.take(1)[0]
            stripped = random.Random(f"{settings.seed} {position}").random() < recipe.strip_thinking
            # If the template cannot show thoughts, train on `off` solutions, which show the work.
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
        run.save(step + 1, model, optimizer, stream)

    # ---- Finish ----------------------------------------------------------------------------------
    references = run.out / "references.jsonl"
    run.evaluation.store_references(model, scorer, dist, references, recipe.reference_samples)
    run.finish(model, scorer)


def command():
    run_main(partial(launch, stages.SFT, train))


if __name__ == "__main__":
    command()
