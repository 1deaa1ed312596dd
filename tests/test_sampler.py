"""Sampling: what is drawn, with which log-probs, and that batch and order play no part in it."""

from collections import deque
from functools import partial

import pytest
import torch
from fixtures import make_parity

from nanocascade import sampler
from nanocascade.checkpoint.weights import load_model
from nanocascade.data.batch import make_batches
from nanocascade.data.episode import Rollout
from nanocascade.engine.forward import new_routing, score_tokens
from nanocascade.model.moe import Routing
from nanocascade.sampler import (
    Decoder,
    Row,
    draw,
    generate,
    hash_uniform,
    sample_keys,
    split_responses,
    take_groups,
    truncate,
)

FAMILIES = ["nemotron_h-groups", "qwen3_moe-base"]
LENGTHS = (1, 5, 17, 3, 9, 2, 12)
STOPS = (3, 8, 21)


def build(case, folder, dtype=torch.float64):
    make_parity.write_checkpoint(folder, make_parity.CONFIGS[case])
    return load_model(folder, dtype)


def tokens_of(samples):
    return [[x.tokens for x in group] for group in samples]


def prompts_of(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 32, (n,), generator=generator).tolist() for n in lengths]


def episodes(prompts, samples):
    """The samples as rollouts, one after another."""
    rollouts = []
    for prompt, group in zip(prompts, samples, strict=True):
        for x in group:
            rollouts.append(Rollout({}, [], len(prompt), experts=x.experts))
            rollouts[-1].extend(prompt), rollouts[-1].extend(x.tokens, x.logprobs)
    return rollouts


def gaps(model, prompts, samples, temperature=1.0, replay=False):
    """|training log-prob - sampler log-prob| of every sampled token, from packed micro-batches."""
    rollouts, pieces = episodes(prompts, samples), []
    for batch in make_batches(rollouts, 64, replay=replay):
        routing = new_routing(model, batch)
        with torch.no_grad():
            scored, _ = score_tokens(model, batch, temperature, routing)  # (b, t)
        for i in batch.response_ids[batch.mask].unique().tolist():
            own, start = batch.mask & (batch.response_ids == i), rollouts[i].prompt_length
            assert batch.targets[own].tolist() == rollouts[i].tokens[start:]
            sampled = torch.tensor(rollouts[i].sampler_logprobs[start:], dtype=torch.float64)
            pieces.append((scored[own] - sampled).abs())
            assert (batch.sampler_logprobs[own] - sampled).abs().max() < 1e-5
    return torch.cat(pieces)


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (1.3, 0.8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", FAMILIES)
def test_parity_training_logprobs(case, dtype, temperature, top_p, tmp_path):
    """The sampler's log-probs are the trainer's, with unequal prompts, shared prefills, early stops
    and refilled places; those of top-p differ by the log of the mass it keeps."""
    model, prompts = build(case, tmp_path, dtype), prompts_of()
    samples = generate(
        model,
        prompts,
        num_samples=3,
        max_new_tokens=15,
        temperature=temperature,
        top_p=top_p,
        stop_ids=STOPS,
        seed=1,
        max_rows=7,
    )
    sizes = {len(x.tokens) for group in samples for x in group}
    assert len(sizes) > 5 and {x.stop_reason for g in samples for x in g} == {"stop", "length"}
    gap = gaps(model, prompts, samples, temperature)
    assert len(gap) == sum(len(x.tokens) for g in samples for x in g)
    assert gap.mean() < (1e-5 if dtype == torch.float32 else 1e-9)
    assert gap.max() < (1e-4 if dtype == torch.float32 else 1e-9)
    for group in samples if top_p < 1 else ():
        kept = torch.tensor([x.logprobs[0] - x.truncated_logprobs[0] for x in group]).exp()  # (r,)
        assert kept.max() - kept.min() < 1e-6 and top_p <= kept[0] < 1


def test_parity_replay(tmp_path):
    """Experts cover prompt and response but the last token, and replayed they give the log-probs of
    sampling, even after the correction bias has moved and other experts would be chosen."""
    model, prompts = build("nemotron_h-groups", tmp_path), prompts_of()
    config, options = model.config, {"num_samples": 2, "stop_ids": STOPS, "max_rows": 4}
    samples = generate(model, prompts, max_new_tokens=9, return_experts=True, **options)
    for prompt, group in zip(prompts, samples, strict=True):
        for x in group:
            n = len(prompt) + len(x.tokens) - 1
            assert x.experts.shape == (n, config.num_moe_layers, config.num_experts_per_tok)
            routing = Routing(config.num_moe_layers)
            model(torch.tensor([(prompt + x.tokens)[:-1]]), routing=routing)
            assert x.experts.sort().values.equal(routing.experts()[0].sort().values)
    for name, bias in model.named_buffers():
        assert name.endswith("e_score_correction_bias")
        bias += torch.linspace(-1, 1, len(bias))
    assert gaps(model, prompts, samples, replay=True).max() < 1e-9
    assert gaps(model, prompts, samples).max() > 1e-2
    assert generate(model, prompts[:1], max_new_tokens=2)[0][0].experts is None


def test_invariance_company(tmp_path):
    """A row's tokens depend on the seed and its own id: not on max_rows, order or neighbours."""
    model, prompts = build("nemotron_h-base", tmp_path), prompts_of()
    options = {"num_samples": 3, "max_new_tokens": 10, "stop_ids": STOPS, "seed": 5}
    expected = tokens_of(generate(model, prompts, **options))
    for max_rows in (1, 3, 6, 11):
        assert tokens_of(generate(model, prompts, max_rows=max_rows, **options)) == expected
    ids = range(len(prompts))[::-1]
    assert tokens_of(generate(model, prompts[::-1], row_ids=ids, **options))[::-1] == expected
    alone = tokens_of(generate(model, prompts[2:3], row_ids=[2], **options | {"num_samples": 2}))
    assert alone == [expected[2][:2]]
    assert tokens_of(generate(model, prompts, **options | {"seed": 6})) != expected
    same = tokens_of(generate(model, [prompts[2]] * 2, **options))
    assert len({tuple(x) for group in same for x in group}) == 6, "rows and rollouts draw apart"


def test_numbers_parts():
    """(rows of a part, rows at once): whole groups where they fit, else equal parts, never more."""
    assert (
        split_responses(10, 4, 16) == (4, 16)
        and split_responses(2, 4, 512) == (4, 8)
        and split_responses(0, 4, 16) == (4, 4)
    )
    assert (
        split_responses(5, 64, 32) == (32, 32)
        and split_responses(3, 6, 4) == (3, 3)
        and split_responses(3, 7, 4) == (1, 4)
    )


def test_numbers_groups():
    """Groups of 2 rows with prompts of 3, 4 and 9 tokens: as many as fit the free places and the
    budget of a prefill, and one at least."""
    groups = [[Row(i, r, [1] * n, 5, 0) for r in range(2)] for i, n in enumerate((3, 4, 9))]
    for free, budget, taken in ((6, 16, 3), (5, 16, 2), (6, 15, 2), (2, 16, 1), (6, 1, 1)):
        waiting = deque(groups)
        assert take_groups(waiting, free, budget) == groups[:taken]
        assert list(waiting) == groups[taken:]


def test_numbers_uniform():
    """u is uniform (chi-square of 64 bins), uncorrelated along seeds, rows, rollouts, positions."""
    keys = torch.stack([sample_keys(seed, range(20), 10) for seed in (0, 1, 2, 1_000_003)])
    u = hash_uniform(keys[..., None], torch.arange(50))  # (seeds, p, r, t)
    assert u.unique().numel() == u.numel() and u.min() >= 0 and u.max() < 1
    counts, expected = torch.histc(u, 64, 0, 1), u.numel() / 64  # chi-square: 63, std sqrt(126)
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 6 * 126**0.5
    for dim in range(4):
        a, b = u.narrow(dim, 0, u.shape[dim] - 1), u.narrow(dim, 1, u.shape[dim] - 1)
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert correlation.abs() < 5 / a.numel() ** 0.5, dim


@pytest.mark.parametrize(
    "temperature, top_p, top_k", [(1, 1, 0), (0.6, 1, 0), (1, 0.9, 0), (2, 1, 4)]
)
def test_numbers_draw_frequencies(temperature, top_p, top_k):
    """20,000 draws have the frequencies of the (truncated) softmax, by chi-square."""
    logits = torch.tensor([0.3, 1.5, -0.7, 2.0, 0.0, 1.1, -3.0])
    p = truncate((logits / temperature).softmax(-1)[None], top_p, top_k)[0]  # (v,)
    p = p / p.sum()
    u = hash_uniform(sample_keys(3, [0], 1)[0], torch.arange(20_000))  # (b,)
    tokens, logprobs, within = draw(logits.expand(len(u), -1), u, temperature, top_p, top_k)
    counts, inside = torch.bincount(tokens, minlength=7), p > 0
    assert (counts[~inside] == 0).all() and inside.sum() > 3
    expected, n = 20_000 * p[inside], inside.sum()
    assert ((counts[inside] - expected) ** 2 / expected).sum() < n + 6 * (2 * n) ** 0.5
    full = (logits / temperature).log_softmax(-1)
    torch.testing.assert_close(logprobs, full[tokens])
    assert (within is None) == (inside.all() and not top_k)
    if within is not None:
        torch.testing.assert_close(within, p.log()[tokens])


def test_numbers_truncate():
    """p = 1/2, 1/4, 1/8, 1/8: the smallest set that reaches top_p, ties by id; top-k comes first,
    and of 2 kept tokens the better one has 2/3 of the mass."""
    p = torch.tensor([[0.125, 0.5, 0.125, 0.25]])
    for top_p, top_k, kept in (
        (1.0, 0, "1111"),
        (0.75, 0, "0101"),
        (0.76, 0, "1101"),
        (0.5, 0, "0100"),
        (1e-9, 0, "0100"),
        (1.0, 3, "1101"),
        (1.0, 1, "0100"),
        (0.66, 2, "0100"),
        (0.67, 2, "0101"),
    ):
        mask = torch.tensor([[float(x) for x in kept]])
        assert truncate(p, top_p, top_k).equal(p * mask), (top_p, top_k)


def test_numbers_draw_edges():
    """p = 0, 1/2, 1/2, 0: u below 1/2 is token 1, from 1/2 on token 2, never a token of mass 0."""
    logits = torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf])
    u = torch.tensor([0.0, 0.25, 0.5 - 2**-20, 0.5, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits.expand(6, -1), u, 1.0, 1.0, 0)[0].tolist() == [1, 1, 1, 2, 2, 2]
    tokens, logprobs, within = draw(logits.expand(6, -1), u, 1.0, 1.0, 1)
    assert (tokens == 1).all() and (within == 0).all()  # and the full log-prob stays ln 1/2
    torch.testing.assert_close(logprobs, torch.full((6,), 0.5).log())


def test_parity_greedy(tmp_path):
    """Temperature 0 takes the best token of a full forward and reports its log-prob at T = 1."""
    model, prompts = build("nemotron_h-base", tmp_path), prompts_of()
    samples = generate(model, prompts, max_new_tokens=6, temperature=0, top_p=0.5, seed=9)
    assert gaps(model, prompts, samples).max() < 1e-9
    for prompt, (sample,) in zip(prompts, samples, strict=True):
        logits = model.logits(model(torch.tensor([prompt + sample.tokens])))[0]  # (t, v)
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == sample.tokens
        assert sample.truncated_logprobs is None


def test_invariance_stops(tmp_path):
    """A response ends with its first stop token or at its own limit; each is announced once."""
    model, prompts, limits = build("nemotron_h-base", tmp_path), prompts_of(), range(3, 10)
    heard = {}

    def hear(p, r, sample):
        heard.setdefault((p, r), []).append(sample)

    options = {"num_samples": 4, "max_new_tokens": limits, "stop_ids": STOPS, "max_rows": 8}
    samples = generate(model, prompts, on_sample=hear, **options)
    assert heard == {(p, r): [x] for p, group in enumerate(samples) for r, x in enumerate(group)}
    for (p, _), (x,) in heard.items():
        assert not set(x.tokens[:-1]) & set(STOPS) and len(x.logprobs) == len(x.tokens)
        assert (x.tokens[-1] in STOPS) == (x.stop_reason == "stop") and len(x.tokens) <= limits[p]
        assert x.tokens[-1] in STOPS or len(x.tokens) == limits[p]


def test_invariance_rows_come_and_go(tmp_path, monkeypatch):
    """Places are refilled while others decode, and nobody's place is decoded."""
    model, events = build("nemotron_h-base", tmp_path), []

    def watch(name):
        method = getattr(Decoder, name)

        def watched(self, *args):
            events.append((name, len(args[0]) if args else len(self.rows), len(self.rows)))
            return method(self, *args)

        monkeypatch.setattr(Decoder, name, watched)

    watch("step"), watch("admit")
    options = {"num_samples": 2, "max_new_tokens": 20, "stop_ids": STOPS, "max_rows": 16}
    samples = generate(model, prompts_of((4,) * 24), **options)
    rows = [x[1] for x in events if x[0] == "step"]
    admitted = [x for x in events if x[0] == "admit"]
    assert rows[0] == 16 and rows[-1] <= 4
    assert sum(x[1] for x in admitted) == 24 and any(x[2] > 0 for x in admitted[1:])
    assert sum(len(x.tokens) - 1 for group in samples for x in group) == sum(rows)  # but the last


@pytest.mark.parametrize("prompt, words", [([], "0 tokens"), ([1] * 60, "60 tokens")])
def test_bad_prompts(prompt, words, tmp_path):
    """An empty prompt, or one too long for the context, is a ValueError that names it."""
    model = build("nemotron_h-base", tmp_path)
    model.config.max_position_embeddings = 64
    assert len(generate(model, [[1] * 59], max_new_tokens=5)[0][0].tokens) == 5
    with pytest.raises(ValueError, match=f"prompt 1 has {words}"):
        generate(model, [[1], prompt], max_new_tokens=5)
    assert generate(model, [], max_new_tokens=5) == []


def test_invariance_threads(tmp_path, monkeypatch):
    """A small model is decoded on one thread, a large one on all; both draw the same tokens,
    and the caller's threads are given back."""
    model, before, seen = build(FAMILIES[1], tmp_path), torch.get_num_threads(), []
    model.blocks[0].register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    draw_one = partial(generate, model, [[5, 6, 7]], max_new_tokens=6, seed=1)
    torch.set_num_threads(2)
    try:
        few = draw_one()[0][0].tokens
        assert seen == [2, 1, 1, 1, 1, 1] and torch.get_num_threads() == 2  # the first: prefill
        monkeypatch.setattr(sampler, "ONE_THREAD_WORK", 0)
        assert draw_one()[0][0].tokens == few and set(seen[6:]) == {2}
    finally:
        torch.set_num_threads(before)
