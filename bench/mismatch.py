"""How far apart trainer and sampler are in bf16 at the real model's depth, with and without replay.

    python -m bench.mismatch --steps 91

A nemotron_h with the 52 blocks of the 30B-A3B and a small width learns the toy's tasks for some
steps, for an untrained model's distribution is nearly flat and hides everything. Its weights then
take the way of any checkpoint (written in bf16, read in bf16; router, A_log, D and dt_bias stay
fp32). It samples, token by token with a cache; the trainer's packed forward scores the same tokens.

Printed per precision: mean and largest |log-prob difference|, share of tokens whose probability
ratio is outside MOPD's gate 0.5..2, share of (token, block) pairs whose set of experts differs.
"""

import argparse
import tempfile
import time

import torch

from nanocascade.checkpoint.weights import load_model, save_model
from nanocascade.data.batch import make_batches
from nanocascade.data.episode import Document, Sampling
from nanocascade.data.rows import conversation, sft_conversation
from nanocascade.engine.distributed import Dist
from nanocascade.engine.forward import new_routing, score_tokens
from nanocascade.engine.optim import make_optimizer, optimizer_step
from nanocascade.model.model import Model, ModelConfig
from nanocascade.model.moe import update_correction_bias
from nanocascade.rollouts.rollout import roll_out
from nanocascade.sft import sft_loss
from nanocascade.tokenizer.tokenizer import Tokenizer
from nanocascade.toy import tasks
from nanocascade.toy.start import build_toy_tokenizer

PATTERN = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
DOMAINS = ("math", "if", "structured", "tools")


def small_config(tokenizer) -> ModelConfig:
    """Depth, routing (sigmoid, top 6, scale 2.5) and block order of the 30B-A3B, all else small."""
    return ModelConfig(
        vocab_size=-(-tokenizer.vocab_size // 8) * 8,
        hidden_size=64,
        pattern=PATTERN,
        head_dim=16,
        num_experts=32,
        num_experts_per_tok=6,
        moe_intermediate_size=32,
        mamba_head_dim=16,
        shared_expert_intermediate_size=64,
        routed_scaling_factor=2.5,
        mamba_num_heads=8,
        mamba_n_groups=2,
        ssm_state_size=16,
        chunk_size=32,
        eos_token_ids=tuple(tokenizer.eos_ids),
    )


def train(model, tokenizer, steps: int, batch_tokens: int = 2048) -> None:
    """Supervised steps on the toy's rows; prints the loss as it goes."""
    rows = [row for d in DOMAINS for row in tasks.make_rows(d, 500, "train", "mismatch")]
    generator = torch.Generator().manual_seed(0)
    optimizer = make_optimizer(model, 2e-3, (0.9, 0.95), 0.0)
    for step in range(steps):
        documents, size = [], 0
        while size < batch_tokens:
            row = rows[int(torch.randint(len(rows), (), generator=generator))]
            ids, mask = tokenizer.render(sft_conversation(row, True), conversation(row)[1], True)
            documents.append(Document(row, ids, mask=[bool(x) for x in mask]))
            size += len(ids)
        num_tokens, total = sum(x.num_loss_tokens for x in documents), 0.0
        for batch in make_batches(documents, batch_tokens):
            routing = new_routing(model, batch)
            loss, _ = sft_loss(
                score_tokens(model, batch, routing=routing)[0], batch.mask, num_tokens=num_tokens
            )
            loss.backward()
            total += float(loss.detach())
        optimizer_step(model, optimizer, 2e-3 * min(1, (step + 1) / 20), 1.0, Dist())
        load = routing.tokens_per_expert(batch.copies, model.config.num_experts)  # (l, e)
        update_correction_bias(model, load, 1e-3)
        if step % 25 == 24:
            print(f"step {step + 1}: loss {total:.3f} a token", flush=True)


@torch.no_grad()
def compare(model, tokenizer, prompts: int, replay: bool):
    """(log-prob differences (n,), share of routings that differ) of trainer against sampler."""
    rows = [row for d in DOMAINS for row in tasks.make_rows(d, prompts // len(DOMAINS), "test", 0)]
    sampling = Sampling(64, return_experts=True)
    groups, _ = roll_out(model, tokenizer, rows, 4, sampling, 0, range(len(rows)))
    rollouts = [x for group in groups for x in group]
    gaps, changed = [], []
    for batch in make_batches(rollouts, 4096, replay=True):
        recorded = batch.experts  # (b, t, l, a)
        batch.experts = recorded if replay else None
        routing = new_routing(model, batch)
        logprobs, _ = score_tokens(model, batch, routing=routing)  # (b, t)
        gaps.append((logprobs - batch.sampler_logprobs)[batch.mask].double())
        used = routing.experts().sort(-1).values[batch.valid]  # (n, l, a)
        changed.append((used != recorded.sort(-1).values[batch.valid]).any(-1).float())  # (n, l)
    return torch.cat(gaps), float(torch.cat(changed).mean())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--prompts", type=int, default=64)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        build_toy_tokenizer(folder, tasks.vocabulary())
        tokenizer = Tokenizer(folder)
        model = Model(small_config(tokenizer)).reset_parameters(0)
        print(f"{len(PATTERN)} blocks, {model.config.num_parameters():,} parameters")
        began = time.perf_counter()
        train(model, tokenizer, args.steps)
        print(f"trained {args.steps} steps in {time.perf_counter() - began:.0f} s")
        print("| precision | replay | tokens | mean | largest | outside 0.5..2 | other experts |")
        for dtype in (torch.float32, torch.bfloat16):
            save_model(model, folder, tokenizer, dtype=dtype)
            read = load_model(folder, dtype).eval()
            for replay in (False, True):
                gaps, changed = compare(read, tokenizer, args.prompts, replay)
                outside = float(((gaps.exp() < 0.5) | (gaps.exp() > 2)).double().mean())
                name = str(dtype).removeprefix("torch.")
                print(
                    f"| {name} | {'yes' if replay else 'no'} | {len(gaps):,} | "
                    f"{gaps.abs().mean():.2e} | {gaps.abs().max():.2e} | {outside:.3%} | "
                    f"{changed:.2%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
