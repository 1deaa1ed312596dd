"""Rollouts against transformers' generate: RL-shaped, and uniform decode at several batch sizes.

    python -m bench.rollout [--short] [--shapes rl equal decode] [--dtypes float32 bfloat16]

RL-shaped: 64 prompts x 8 responses whose lengths are forced from bench/lengths.json. The peer gets
its prompts sorted and runs at the best of its batch sizes; a batch of its costs the longest row.
Ours returns log-probs with the tokens, the peer does not.
"""

import statistics
from contextlib import contextmanager

import torch

from bench import common
from bench.common import EOS, Peak, alternate, device_of, ratios, spread, timed, token_flops
from nanocascade import sampler


class ForcedDecoder(sampler.Decoder):
    """A Decoder whose rows end at lengths given by rollout, and at no stop token."""

    lengths: list[list[int]]  # [p][r]

    def finish(self, stop_ids):
        return super().finish(())

    def admit(self, groups):
        for row in (row for group in groups for row in group):
            row.limit = self.lengths[row.prompt][row.response]
        super().admit(groups)


@contextmanager
def forced_decoder(lengths, rollouts: int):
    plain = sampler.Decoder
    ForcedDecoder.lengths = torch.tensor(lengths).view(-1, rollouts).tolist()
    sampler.Decoder = ForcedDecoder
    try:
        yield
    finally:
        sampler.Decoder = plain


def our_rollouts(model, prompts, rollouts, lengths, **options):
    """samples[p][r] with the given lengths (p*r of them), nothing else changed."""
    with forced_decoder(lengths, rollouts):
        samples = sampler.generate(
            model, prompts, num_samples=rollouts, max_new_tokens=max(lengths), **options
        )
    num_tokens = [len(x.tokens) for group in samples for x in group]
    assert num_tokens == list(lengths), "forced lengths were not kept"
    return samples


def forced_lengths(lengths, width, eos=EOS, pad=0):
    """A logits processor that ends row i of a batch after lengths[i] tokens and not before."""
    from transformers import LogitsProcessor, LogitsProcessorList

    class Forced(LogitsProcessor):
        def __call__(self, ids, scores):
            scores[:, [eos, pad]] = -torch.inf
            ending = (limits == ids.shape[1] - width + 1).to(scores.device)  # (b,)
            scores[ending] = -torch.inf
            scores[ending, eos] = 0.0
            return scores

    limits = torch.tensor(lengths)
    return LogitsProcessorList([Forced()])


@torch.inference_mode()
def their_rollouts(model, prompts, rollouts, lengths, batch):
    """The same prompts and lengths through generate, prompts sorted by length, `batch` rows."""
    rows = [(x, lengths[i * rollouts + j]) for i, x in enumerate(prompts) for j in range(rollouts)]
    rows.sort(key=lambda row: len(row[0]))
    total, device = 0, device_of(model)
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        width = max(len(x) for x, _ in part)
        ids = torch.tensor([[0] * (width - len(x)) + x for x, _ in part])
        valid = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x, _ in part])
        out = model.generate(
            ids.to(device),
            attention_mask=valid.to(device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max(n for _, n in part),
            pad_token_id=0,
            eos_token_id=EOS,
            logits_processor=forced_lengths([n for _, n in part], width),
        )
        total += int((out[:, width:] != 0).sum())
    assert total == sum(lengths), (total, sum(lengths))


def row_steps(prompts, rollouts, lengths, batch) -> int:
    """Row-steps that the peer decodes: every row of a batch goes on to the longest."""
    rows = [
        (len(x), lengths[i * rollouts + j]) for i, x in enumerate(prompts) for j in range(rollouts)
    ]
    rows.sort(key=lambda row: row[0])
    parts = [rows[i : i + batch] for i in range(0, len(rows), batch)]
    return sum(len(part) * max(n for _, n in part) for part in parts)


def compare(name, ours, theirs, prompts, rollouts, lengths, batch, cfg):
    """One row: tokens/s of both, the ratio, and what of it padding explains."""
    peak = Peak(ours.embed.weight.dtype)

    def run_ours():
        our_rollouts(ours, prompts, rollouts, lengths)

    def run_theirs():
        their_rollouts(theirs, prompts, rollouts, lengths, batch)

    our_times, other, cpu = alternate(run_ours, run_theirs, cfg, peak.measure)
    tokens, gain = sum(lengths), ratios(our_times, other)
    seconds = statistics.median(our_times)
    context = sum(map(len, prompts)) / len(prompts) + tokens / len(lengths) / 2
    gflops = tokens / seconds * token_flops(ours.config, context) / 1e9
    padding = row_steps(prompts, rollouts, lengths, batch) / tokens
    common.row(
        name,
        f"{tokens / seconds:,.0f}",
        f"{tokens / statistics.median(other):,.0f} ({batch})",
        spread(gain),
        spread(cpu),
        str(len(gain)),
        f"{padding:.2f}",
        f"{100 * gflops / peak.gflops:.0f} % of {peak.gflops:.0f}",
        f"{peak.gbytes:.1f}",
    )
    return statistics.median(gain)


def best_batch(theirs, prompts, rollouts, lengths, batches) -> int:
    """The batch size at which the peer is fastest on this work."""
    # An eighth of the lengths keeps the share of padding, and takes an eighth of the time.
    lengths = [max(1, n // 8) for n in lengths]
    times = {
        b: timed(lambda b=b: their_rollouts(theirs, prompts, rollouts, lengths, b)) for b in batches
    }
    return min(times, key=times.get)


def main():
    cfg = common.options(
        dtypes=(["float32"], "float32, bfloat16"),
        shapes=(["rl", "equal", "decode"], "what to run"),
        new=(["96"], "tokens of uniform decode"),
        prompts=(["64"], "prompts, of 8 responses each"),
        longest=(["128"], "the longest output of the list, the mean is a quarter"),
        batches=(["16", "64", "256", "512"], "batch sizes of which the peer takes its best"),
    )
    common.table(
        "case",
        "tokens/s",
        "peer (its batch)",
        "ratio",
        "of CPU time",
        "pairs",
        "padding alone",
        "GFLOP/s of matmul's",
        "copy GB/s",
    )
    p, longest = int(cfg.prompts[0]), int(cfg.longest[0])
    r, batches = 8, [int(x) for x in cfg.batches]
    if cfg.short:
        p, r, longest, batches = 4, 2, 12, [8]
    prompts = common.random_prompts(p, 16, 64)
    for family in cfg.families:
        for dtype in cfg.dtypes:
            with common.model_dir(family) as folder:
                ours, theirs = common.ours_and_peer(folder, getattr(torch, dtype))
            common.check_same_model(ours, theirs)
            for shape in cfg.shapes:
                work = (ours, theirs, prompts, r)
                if shape == "decode":
                    decode(f"{family} {dtype}", ours, theirs, cfg)
                else:
                    unequal = common.lengths(p * r, longest)
                    same = [round(sum(unequal) / len(unequal))] * (p * r)
                    wanted = unequal if shape == "rl" else same
                    batch = best_batch(theirs, prompts, r, wanted, batches)
                    compare(f"{family} {dtype} {shape} {p}x{r}", *work, wanted, batch, cfg)


def decode(name, ours, theirs, cfg):
    """Uniform decode after prompts of 32 tokens, at the batch sizes of the table."""
    new, gains = (8, []) if cfg.short else (int(cfg.new[0]), [])
    for batch in (1, 4) if cfg.short else (1, 16, 64, 256):
        prompts = common.random_prompts(batch, 32, 32)
        gains.append(
            compare(f"{name} decode b={batch}", ours, theirs, prompts, 1, [new] * batch, batch, cfg)
        )
    common.row(
        name + " decode: geometric mean, lowest",
        "",
        "",
        f"{statistics.geometric_mean(gains):.2f}, {min(gains):.2f}",
        *[""] * 5,
    )


if __name__ == "__main__":
    main()
