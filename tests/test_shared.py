"""A prompt computed once for all its responses gives the numbers of one computed for each."""

import pytest
import torch
from fixtures import make_parity

from nanocascade.checkpoint.weights import load_model
from nanocascade.data.batch import make_batches
from nanocascade.data.episode import Document, Rollout
from nanocascade.engine.distributed import Dist
from nanocascade.engine.forward import new_routing, no_load, score_tokens
from nanocascade.engine.layout import parallelize
from nanocascade.model import attention, scan
from nanocascade.model.attention import share_calls
from nanocascade.model.documents import Documents
from nanocascade.model.scan import chunk_length, cut_chunks

FAMILIES = ["nemotron_h-groups", "qwen3-wide", "qwen3_moe-dense", "llama-scaled"]


def build(case, folder, **layout):
    make_parity.write_checkpoint(folder, make_parity.CONFIGS[case])
    return parallelize(load_model(folder, torch.float64), Dist(**layout))


def rollouts(config, groups) -> list[Rollout]:
    """Random responses [(prompt tokens, [response tokens, ...]), ...], every third token of them a
    tool's; the experts of a group's prompt are the same, as the sampler records them."""
    random = torch.Generator().manual_seed(0)
    top, layers = config.num_experts_per_tok, config.num_moe_layers

    def draw(n):
        tokens = torch.randint(1, 32, (n,), generator=random).tolist()
        scores = torch.rand(n, layers, config.num_experts, generator=random)
        return tokens, scores.argsort(-1)[..., :top] if layers else None  # (n, l, a)

    out = []
    for prompt, responses in groups:
        tokens, experts = draw(prompt)
        for i, n in enumerate(responses):
            more, chosen = draw(n)
            mask = [False] * prompt + [j % 3 != 1 for j in range(n)]
            x = Rollout({}, tokens + more, prompt, mask, [-1.0] * (prompt + n), advantage=i - 1.5)
            x.experts = torch.cat([experts, chosen])[:-1] if layers else None
            out.append(x)
    return out


def one_step(network, episodes, micro_tokens, share, replay=False):
    """Log-probs of every target in the order of the step, gradients of a weighted sum of them, and
    the experts' load."""
    network.zero_grad(set_to_none=True)
    scores, load = {}, no_load(network)
    for batch in make_batches(episodes, micro_tokens, replay=replay, share=share):
        routing = new_routing(network, batch)
        logprobs, entropy = score_tokens(network, batch, 0.7, routing)  # (1, n)
        (logprobs * batch.advantages * batch.targets).sum().backward()
        load += routing.tokens_per_expert(batch.copies, network.config.num_experts)
        for i in batch.response_ids.unique().tolist():
            own = batch.response_ids == i
            assert batch.targets[own].tolist() == episodes[i].tokens[episodes[i].prompt_length :]
            scores[i] = torch.stack([logprobs[own].detach(), entropy[own]])
    grads = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    return torch.cat([scores[i] for i in sorted(scores)], 1), grads, load


GROUPS = {
    "unequal, of 1 token, of one response": [
        (7, [5, 1, 9, 16]),
        (1, [4, 1, 2]),
        (16, [8, 1]),
        (3, [6]),
        (5, [1]),
    ],
    "16 equal": [(9, [4] * 16), (9, [4] * 2)],
    "on the chunks' edges": [(n, [m, m + 1]) for n in (7, 8, 9, 16, 17) for m in (1, 8, 9)],
}


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("micro_tokens", [1000, 40])
@pytest.mark.parametrize("case", FAMILIES)
def test_invariance_shared(case, micro_tokens, groups, tmp_path):
    """Log-probs, entropies, gradients and the experts' load are those of separate documents, also
    where micro-batches cut a group."""
    network = build(case, tmp_path)
    network.config.chunk_size = 8
    episodes = rollouts(network.config, groups)
    (scores, grads, load), (own_scores, own_grads, own_load) = (
        one_step(network, episodes, micro_tokens, share) for share in (True, False)
    )
    assert own_grads.norm() > 1
    assert (scores - own_scores).abs().max() < 1e-9
    assert (grads - own_grads).abs().max() < 1e-9 * own_grads.norm()
    assert load.equal(own_load)


@pytest.mark.parametrize("variant", ["replay", "recomputed", "one by one", "kernels", "spans"])
@pytest.mark.parametrize("case", ["nemotron_h-groups", "qwen3_moe-dense"])
def test_invariance_shared_variants(case, variant, tmp_path, monkeypatch):
    """So they are with replayed experts, recomputed blocks, an attention call for each shape,
    without masks where a device has kernels for that, and with scans cut into spans."""
    layout = {"checkpoint_blocks": True, "offload_blocks": True} if variant == "recomputed" else {}
    plain, network = build(case, tmp_path), build(case, tmp_path, **layout)
    plain.config.chunk_size = network.config.chunk_size = 8
    episodes = rollouts(network.config, GROUPS["unequal, of 1 token, of one response"])
    replay = variant == "replay"
    own_scores, own_grads, own_load = one_step(plain, episodes, 60, False, replay)
    if variant == "kernels":
        monkeypatch.setattr(attention, "CAUSAL_KERNELS", ("cpu",))
    if variant in ("one by one", "kernels"):
        monkeypatch.setattr(attention, "CALL_SHORT", 0)
    if variant == "spans":
        monkeypatch.setattr(scan, "SPAN", 8)
    scores, grads, load = one_step(network, episodes, 60, True, replay)
    assert (scores - own_scores).abs().max() < 1e-9
    assert (grads - own_grads).abs().max() < 1e-9 * own_grads.norm()
    assert load.equal(own_load)


def test_numbers_batch():
    """Two responses [8 9 1] and [4] to the prompt [5 6 7] and a lone document [2 3]: the prompt is
    there once and predicts both first tokens, and a group beyond the budget is cut, its prompt in
    each part."""
    first = Rollout({}, [5, 6, 7, 8, 9, 1], 3, [False] * 3 + [True, False, True], [-2.0] * 6)
    second = Rollout({}, [5, 6, 7, 4], 3, [False] * 3 + [True], [-3.0] * 4, advantage=0.5)
    steps = [first, second, Document({}, [2, 3], mask=[False, True])]
    (batch,) = make_batches(steps, 100)
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9, 2]]
    assert batch.segments.tolist() == [[0, 0, 0, 1, 1, 2]] and batch.parents == [-1, 0, -1]
    assert batch.copies.tolist() == [[2, 2, 2, 1, 1, 1]]
    assert batch.sources.tolist() == [[2, 3, 4, 2, 5]]
    assert batch.targets.tolist() == [[8, 9, 1, 4, 3]]
    assert batch.response_ids.tolist() == [[0, 0, 0, 1, 2]]
    assert batch.mask.tolist() == [[True, False, True, True, True]]
    assert batch.sampler_logprobs.tolist() == [[-2, -2, -2, -3, 0]]
    assert batch.advantages.tolist() == [[0, 0, 0, 0.5, 0]]
    cut = make_batches(steps[:2] * 2, 8)  # 3 + 2 + 0 + 2 = 7 tokens and the next one fits: 0 more
    assert [x.ids.tolist() for x in cut] == [[[5, 6, 7, 8, 9, 8, 9]]]
    cut = make_batches(steps[:2] * 2, 6)
    assert [x.ids.tolist() for x in cut] == [[[5, 6, 7, 8, 9]]] * 2
    assert [x.response_ids.tolist() for x in cut] == [[[0, 0, 0, 1]], [[2, 2, 2, 3]]]
    (apart,) = make_batches(steps[:2], 100, share=False)
    assert apart.ids.tolist() == [[5, 6, 7, 8, 9, 5, 6, 7]] and apart.parents == [-1, -1]


def test_numbers_plans():
    """Documents of like shapes share an attention call, and a chunk knows what it continues."""
    assert share_calls([(0, 30), (30, 5), (0, 2000), (30, 6)]) == [[0], [1, 3], [2]]
    chunks, last_chunks, windows = cut_chunks(Documents([3, 1], [-1, 0]), 2, 1)
    assert [x.inputs for x in chunks] == [[4, 0, 1], [1, 2, 4], [2, 3, 4]]
    assert [x.previous for x in chunks] == [None, 0, 1] and [x.level for x in chunks] == [0, 1, 2]
    assert last_chunks == [1, 2] and windows == [[2], [3]]
    assert chunk_length([18] * 8, 64) == 20  # a whole document a chunk, little padding
    assert chunk_length([6400], 64) == 64
