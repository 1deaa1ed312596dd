"""A training step against transformers': packed documents here, a padded batch there.

    python -m bench.train_step [--short] [--pairs 7]

The work is 64 documents (prompt and response) whose lengths come from bench/lengths.json, or are
all equal: next-token cross-entropy, backward, clipping, AdamW (fused on both sides). The peer runs
right-padded batches of the documents as they come, and ("sorted") in the order of their lengths,
at the better of two batch sizes. nemotron_h in transformers carries its state over packed
boundaries, so padding is what it can do.
"""

import statistics

import torch
import torch.nn.functional as F

from bench import common
from bench.common import Peak, alternate, device_of, ratios, spread, timed, token_flops
from nanocascade.data.batch import make_batches
from nanocascade.data.episode import Rollout
from nanocascade.engine.distributed import Dist
from nanocascade.engine.forward import score_tokens
from nanocascade.engine.optim import make_optimizer, optimizer_step

MICRO = 4096  # tokens of a micro-batch


def documents(sizes: list[int]) -> list[Rollout]:
    """Random documents, every token but the first with loss."""
    generator = torch.Generator().manual_seed(1)
    rollouts = []
    for n in sizes:
        tokens = torch.randint(2, common.VOCAB, (n,), generator=generator).tolist()
        rollouts.append(Rollout({}, tokens, 1, [False] + [True] * (n - 1), [0.0] * n))
    return rollouts


def our_step(model, optimizer, rollouts, dist=None) -> float:
    """Packing included: mean cross-entropy of all tokens, one update."""
    total, loss_sum = sum(x.num_loss_tokens for x in rollouts), 0.0
    for batch in make_batches(rollouts, MICRO, device_of(model)):
        logprobs, _ = score_tokens(model, batch)
        loss = -(logprobs * batch.mask).sum() / total
        loss.backward()
        loss_sum += loss.item()
    optimizer_step(model, optimizer, 1e-5, 1.0, dist or Dist())
    return loss_sum


def their_step(model, optimizer, rollouts, rows) -> float:
    """The same on right-padded rows, `rows` a micro-batch."""
    total, loss_sum = sum(x.num_loss_tokens for x in rollouts), 0.0
    for start in range(0, len(rollouts), rows):
        part = [x.tokens for x in rollouts[start : start + rows]]
        width = max(map(len, part))
        ids = [x + [0] * (width - len(x)) for x in part]
        ids = torch.tensor(ids, device=device_of(model))  # (b, t)
        valid = [[1] * len(x) + [0] * (width - len(x)) for x in part]
        valid = torch.tensor(valid, device=device_of(model))  # (b, t)
        logits = model(ids, attention_mask=valid, use_cache=False).logits  # (b, t, v)
        labels = ids[:, 1:].masked_fill(valid[:, 1:] == 0, -100)
        loss = (
            F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten(), reduction="sum")
            / total
        )
        loss.backward()
        loss_sum += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss_sum


def padded_share(sizes: list[int], rows: int) -> float:
    """Positions of the peer's batches over real tokens."""
    parts = [sizes[i : i + rows] for i in range(0, len(sizes), rows)]
    return sum(len(x) * max(x) for x in parts) / sum(sizes)


def compare(name, ours, theirs, sizes, cfg):
    rollouts, peak = documents(sizes), Peak()
    our_optimizer = make_optimizer(ours, 1e-5, (0.9, 0.95), 0.0)
    other = torch.optim.AdamW(theirs.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    losses = (
        our_step(ours, our_optimizer, rollouts),
        their_step(theirs, other, rollouts, len(sizes)),
    )
    assert abs(losses[0] - losses[1]) < 2e-2, losses  # nemotron_h: padding moves its last states
    choices = {
        b: timed(lambda b=b: their_step(theirs, other, rollouts, b))
        for b in sorted({max(len(sizes) // 4, 1), len(sizes)})
    }
    rows = min(choices, key=choices.get)
    *times, cpu = alternate(
        lambda: our_step(ours, our_optimizer, rollouts),
        lambda: their_step(theirs, other, rollouts, rows),
        cfg,
        peak.measure,
    )
    tokens, seconds = sum(sizes) - len(sizes), [statistics.median(x) for x in times]
    gflops = 3 * tokens * token_flops(ours.config, tokens / len(sizes) / 2) / seconds[0] / 1e9
    common.row(
        name,
        f"{tokens / seconds[0]:,.0f}",
        f"{tokens / seconds[1]:,.0f} ({rows} rows)",
        spread(ratios(*times)),
        spread(cpu),
        str(len(cpu)),
        f"{padded_share(sizes, rows):.2f}",
        f"{100 * gflops / peak.gflops:.0f} % of {peak.gflops:.0f}",
    )


def main():
    cfg = common.options(
        shapes=(["unequal", "sorted", "equal", "wide"], "what to run"),
        longest=(["256"], "the longest of the 64 documents"),
    )
    common.table(
        "case",
        "real tokens/s",
        "peer (its batch)",
        "ratio",
        "of CPU time",
        "pairs",
        "padding alone",
        "GFLOP/s of matmul's",
    )
    count, longest = (8, 24) if cfg.short else (64, int(cfg.longest[0]))
    unequal = [x + 8 for x in common.lengths(count, longest)]
    for family in cfg.families:
        with common.model_dir(family) as folder:
            for shape in [x for x in cfg.shapes if x != "wide"]:
                ours, theirs = common.ours_and_peer(folder)
                theirs.train()
                sizes = [sum(unequal) // count] * count if shape == "equal" else unequal
                sizes = sorted(sizes) if shape == "sorted" else sizes
                compare(f"{family} {shape}", ours, theirs, sizes, cfg)
        if "wide" in cfg.shapes and not cfg.short:  # where matmuls dominate
            wide = {
                "hidden_size": 1024,
                "moe_intermediate_size": 1024,
                "num_attention_heads": 16,
                "num_key_value_heads": 4,
            }
            wide |= (
                {"num_hidden_layers": 2, "num_experts": 8}
                if family == "qwen3_moe"
                else {
                    "num_hidden_layers": 4,
                    "hybrid_override_pattern": "ME*E",
                    "mamba_num_heads": 32,
                    "moe_shared_expert_intermediate_size": 1024,
                    "n_routed_experts": 8,
                }
            )
            with common.model_dir(family, **wide) as folder:
                ours, theirs = common.ours_and_peer(folder)
                theirs.train()
                compare(f"{family} wide", ours, theirs, [256] * 8, cfg)


if __name__ == "__main__":
    main()
