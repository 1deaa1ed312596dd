"""SFT: the first stage of the cascade, packed rows, loss on what the assistant wrote.

    python train_sft.py --config toy --out runs/out/sft
    python train_sft.py --config small --init HF_DIR --data ROWS.jsonl --out OUT
    torchrun --nproc_per_node 8 train_sft.py --config full --init HF_DIR --data ROWS.jsonl --out OUT

A step: draw conversations until they hold batch_tokens tokens, pack them into rows of row_tokens,
or of micro_tokens if these are fewer (attention, convolution and SSM state start anew at each
document), take one gradient step. The tokens that carry loss are counted before ranks share them.
"""

import random
import time
from dataclasses import dataclass

from nanocascade import stages
from nanocascade.cli import parse_args, run_main
from nanocascade.data.batch import step_batches
from nanocascade.data.episode import Rollout
from nanocascade.data.rows import conversation, sft_conversation
from nanocascade.engine import distributed
from nanocascade.engine.forward import new_routing, no_load, score_tokens
from nanocascade.engine.optim import check_finite, learning_rate, make_optimizer, optimizer_step
from nanocascade.importance import masked_mean
from nanocascade.model.moe import load_imbalance, update_correction_bias
from nanocascade.plan import plan
from nanocascade.rollouts.scoring import Scorer
from nanocascade.run.log import Mean
from nanocascade.run.run import Run
from nanocascade.run.settings import RunConfig, require_flags
from nanocascade.sft import sft_loss
from nanocascade.toy import tasks

# ---- Config --------------------------------------------------------------------------------------


@dataclass
class Config(RunConfig):
    steps: int = 33000  # optimizer steps to take
    batch_tokens: int = 64 * 262144  # tokens a step, over all ranks
    row_tokens: int = 262144  # of a packed row, and so of the longest conversation
    schedule_steps: int = 40000  # steps of the cosine (the report stops before its end)
    lr: float = 5e-5  # peak learning rate
    min_lr: float = 5e-6  # at the end of the cosine
    warmup: int = 200  # steps of linear warm-up
    # OURS: no thought is cut short (the Nano recipe does so to 3 % of them, for budget control).
    strip_thinking: float = 0.1  # share of conversations shown without their thought
    stop_score: float = 0.0  # stop once the mean score over domains is this high (0 = never)
    stop_every: int = 50  # steps between looks at that score
    betas: tuple[float, ...] = (0.9, 0.98)  # of AdamW
    weight_decay: float = 0.1  # of matrices
    reference_samples: int = 2000  # preference answers stored for later comparison


PRESETS = {
    "toy": {
        "data": ("toy",),
        "eval_data": ("toy",),
        "steps": 800,
        "schedule_steps": 800,
        "batch_tokens": 4096,
        "row_tokens": 256,
        "micro_tokens": 8192,
        "lr": 3e-3,
        "min_lr": 3e-4,
        "warmup": 20,
        "betas": (0.9, 0.95),
        "toy_rows": 8000,
        "save_every": 50,
    },
    "small": {
        "steps": 200,
        "schedule_steps": 200,
        "batch_tokens": 16384,
        "row_tokens": 2048,
        "micro_tokens": 4096,
        "lr": 2e-5,
        "min_lr": 2e-6,
        "warmup": 10,
        "eval_max_new_tokens": 512,
    },
    "full": stages.FULL_LAYOUT | {"eval_max_new_tokens": 49152},
}


def main():
    cfg = parse_args(Config, presets=PRESETS)
    if cfg.dry_run and not cfg.data:
        return plan.report(cfg)
    require_flags(cfg, "sft")
    with distributed.start(cfg) as dist:
        train(cfg, dist)


def train(cfg: Config, dist: distributed.Dist):
    # ---- Setup -----------------------------------------------------------------------------------
    run = Run(cfg, "sft", dist)
    tokenizer = run.tokenizer

    # ---- Data ------------------------------------------------------------------------------------
    rows = run.train_rows(tuple(tasks.SFT_SHARES), per_domain=cfg.toy_rows, sft=True)
    scorer = Scorer(run.judge(()))
    if cfg.stop_score and not run.evaluation_rows(tasks.DOMAINS):
        raise ValueError(f"--stop_score {cfg.stop_score}: --eval_data has no rows to score")
    if cfg.dry_run:
        return run.describe(rows)

    # ---- Model -----------------------------------------------------------------------------------
    model = run.model

    # ---- Optimizer -------------------------------------------------------------------------------
    optimizer = make_optimizer(model, cfg.lr, cfg.betas, cfg.weight_decay, cfg.offload_optimizer)

    # ---- Resume ----------------------------------------------------------------------------------
    weights = tasks.SFT_SHARES if cfg.data == ("toy",) else None
    rows, stream, first = run.resume(model, optimizer, rows, weights)
    thinks = tokenizer.thinks  # a template without thoughts is taught the worked answers instead

    # ---- Loop ------------------------------------------------------------------------------------
    for step in run.progress(first, cfg.steps):
        # Stop where the score is what RL should start from; asked here, so that a resumed run does.
        looked = {}
        if cfg.stop_score and step and step % cfg.stop_every == 0:
            scores = run.evaluate(model, scorer, tasks.DOMAINS)
            looked = {"score": sum(x["mean"] for x in scores.values()) / len(scores)}
            if looked["score"] > cfg.stop_score:
                break
        began = time.perf_counter()
        # Documents, until the batch is full; all ranks draw the same ones and take their share.
        documents, size = [], 0
        while size < cfg.batch_tokens:
            position, row = stream.take(1)[0]
            thinking = random.Random(f"{cfg.seed} {position}").random() >= cfg.strip_thinking
            document = render(tokenizer, row, thinking and thinks, cfg.row_tokens)
            documents.append(document)
            size += len(document.tokens)
        num_tokens = sum(x.num_loss_tokens for x in documents)
        documents = dist.shard(documents)

        # One gradient step. The denominator was counted over all micro-batches and ranks.
        metrics, load = Mean(), no_load(model)
        for batch in step_batches(model, dist, documents, cfg.micro_tokens, row=cfg.row_tokens):
            routing = new_routing(model, batch)
            train_logprobs, entropy = score_tokens(model, batch, routing=routing)
            loss, values = sft_loss(train_logprobs, batch.mask, num_tokens=num_tokens)
            check_finite(loss, step, batch, documents)
            loss.backward()
            values["entropy"] = masked_mean(entropy, batch.mask)
            metrics.add(values, weight=int(batch.mask.sum()))
            load += routing.load(batch.valid, model.config.num_experts)
        lr = learning_rate(
            step,
            lr=cfg.lr,
            min_lr=cfg.min_lr,
            warmup=cfg.warmup,
            total=cfg.schedule_steps,
            shape="cosine",
        )
        norm = optimizer_step(model, optimizer, lr, cfg.max_norm, dist)
        load = dist.sum(load)
        update_correction_bias(model, load, cfg.bias_rate)

        # Log, save.
        values = metrics.result(dist) | looked | {"batch/tokens": size}
        values |= {"grad_norm": norm, "lr": lr, "moe/load_max": load_imbalance(load)}
        run.log_step(step, values, [], began)
        run.save(step + 1, model, optimizer, stream)

    # ---- Finish ----------------------------------------------------------------------------------
    run.finish(model, scorer, tasks.DOMAINS)


def render(tokenizer, row: dict, thinking: bool, longest: int) -> Rollout:
    """A conversation as ids and loss mask, up to the last token that carries loss."""
    ids, mask = tokenizer.render(sft_conversation(row, thinking), conversation(row)[1], thinking)
    end = max((i for i, x in enumerate(mask) if x), default=-1) + 1
    if not 1 < end <= longest:
        raise ValueError(f"row {row['id']}: {end} tokens to the last answer, rows hold {longest}")
    return Rollout(row, ids[:end], 0, mask[:end], [])


if __name__ == "__main__":
    run_main(main)
