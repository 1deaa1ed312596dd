"""The model computes what transformers computes, and the same however its tokens are laid out."""

import pytest
import torch
from fixtures import make_parity
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from nanocascade.checkpoint.weights import disk_names, experts_of, load_model
from nanocascade.engine.distributed import Dist
from nanocascade.engine.layout import parallelize
from nanocascade.model import attention, logprobs
from nanocascade.model.cache import Cache
from nanocascade.model.logprobs import token_logprobs
from nanocascade.model.moe import Routing
from nanocascade.sampler import generate

STORED = load_file(make_parity.FIXTURE)
CASES = list(make_parity.CONFIGS)
FAMILIES = ["nemotron_h-groups", "qwen2-tied", "qwen3-wide", "qwen3_moe-dense", "llama-scaled"]


def build(case, folder, dtype=torch.float64):
    make_parity.write_checkpoint(folder, make_parity.CONFIGS[case])
    return load_model(folder, dtype)


def our_numbers(network):
    """The same numbers and gradients as make_parity.reference, from our code."""
    ids = make_parity.training_ids()
    hidden = network(ids)  # (b, t, d)
    loss = -token_logprobs(hidden[:, :-1], network.head.weight, ids[:, 1:])[0].mean()
    loss.backward()
    parameters, gradients = dict(network.named_parameters()), {}
    for name, published in disk_names(network).items():
        if name in parameters:  # and not the correction bias, which is a buffer
            parts = experts_of(name, parameters[name].grad)
            gradients |= dict(zip(published, parts, strict=True))
    with torch.no_grad():
        samples = generate(
            network, make_parity.PROMPTS, temperature=0, max_new_tokens=make_parity.NEW_TOKENS
        )
    greedy = torch.tensor([group[0].tokens for group in samples])  # (p, t)
    return {"logits": network.logits(hidden), "loss": loss, "greedy": greedy}, gradients


def check_numbers(ours, theirs):
    assert (ours["logits"] - theirs["logits"]).abs().max() < 1e-4
    assert abs(ours["loss"] - theirs["loss"]) < 1e-5
    assert ours["greedy"].equal(theirs["greedy"])


@pytest.mark.parametrize("case", CASES)
def test_parity_stored(case, tmp_path):
    """Logits, loss, every gradient and greedy decoding of unequal prompts are transformers'."""
    numbers, gradients = our_numbers(build(case, tmp_path, torch.float32))
    check_numbers(numbers, {key: STORED[f"{case}/{key}"] for key in numbers})
    rows = STORED[f"{case}/gradients"].double()  # a gradient's norm, then its projections
    assert rows[:, 0].min() > 1e-3  # every parameter matters, those of each expert too
    for name, (norm, *projected) in zip(sorted(gradients), rows, strict=True):
        gap = make_parity.project(name, gradients[name]) - torch.stack(projected)
        assert gap.square().mean().sqrt() <= 1e-4 * norm, name


@pytest.mark.parametrize("case", CASES)
def test_parity_live(case, tmp_path):
    """The same against the installed transformers, gradients compared in full."""
    pytest.importorskip("transformers")
    ours, our_gradients = our_numbers(build(case, tmp_path, torch.float32))
    theirs, gradients = make_parity.reference(tmp_path)
    check_numbers(ours, theirs)
    assert set(gradients) == set(our_gradients)
    for name, gradient in gradients.items():
        gap = (our_gradients[name] - gradient).norm()
        assert gap <= 1e-4 * gradient.norm(), name


def texts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 32, (n,), generator=generator) for n in (5, 1, 13, 8, 2)]


def gradients_of(network, hidden):
    """Gradients of a fixed scalar of hidden (t, d), flattened; the network's are cleared."""
    network.zero_grad(set_to_none=True)
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


@pytest.mark.parametrize("call_short", [attention.CALL_SHORT, 0])
@pytest.mark.parametrize("case", FAMILIES)
def test_invariance_packing(case, call_short, tmp_path, monkeypatch):
    """Packed documents see nothing of each other, in one attention call and one by one alike."""
    monkeypatch.setattr(attention, "CALL_SHORT", call_short)
    network, parts = build(case, tmp_path), texts()
    alone = torch.cat([network(x[None])[0] for x in parts])  # (t, d)
    ids = torch.stack([torch.cat(parts), torch.cat(parts[::-1])])  # two rows, other boundaries
    segments = [
        torch.repeat_interleave(torch.arange(5), torch.tensor([len(x) for x in row]))
        for row in (parts, parts[::-1])
    ]
    packed = network(ids, segments=torch.stack(segments))  # (b, t, d)
    assert (packed[0] - alone).abs().max() < 1e-9
    ends = packed[1].split([len(x) for x in parts[::-1]])
    assert (torch.cat(ends[::-1]) - alone).abs().max() < 1e-9
    expected = gradients_of(network, alone)
    assert (gradients_of(network, packed[0]) - expected).abs().max() < 1e-9


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", FAMILIES)
def test_invariance_padding(case, side, tmp_path):
    """Padding on either side changes nothing, whatever ids stand there."""
    network, parts = build(case, tmp_path), texts()
    ids, mask = torch.full((5, 16), 7), torch.zeros(5, 16, dtype=torch.bool)
    spans = [slice(0, len(x)) if side == "right" else slice(16 - len(x), 16) for x in parts]
    for i, (x, span) in enumerate(zip(parts, spans, strict=True)):
        ids[i, span], mask[i, span] = x, True
    hidden = network(ids, mask=mask)  # (b, t, d)
    for i, (x, span) in enumerate(zip(parts, spans, strict=True)):
        assert (hidden[i, span] - network(x[None])[0]).abs().max() < 1e-9


@pytest.mark.parametrize("case", FAMILIES)
def test_invariance_prefill(case, tmp_path):
    """Packed documents fill a cache's rows, and single tokens continue them: as one forward."""
    network, sizes = build(case, tmp_path), (4, 1, 11)
    ids = torch.randint(1, 32, (3, 14), generator=torch.Generator().manual_seed(1))
    full, cache = network(ids), Cache(network.config, 3, 14, torch.float64)  # (b, t, d)
    prompts = torch.cat([row[:n] for row, n in zip(ids, sizes, strict=True)])[None]
    segments = torch.repeat_interleave(torch.tensor(sizes))[None]
    hidden = network(prompts, cache=cache, segments=segments)[0].split(sizes)
    pieces = [[x] for x in hidden]
    for step in range(3):
        single = torch.stack([row[n + step] for row, n in zip(ids, sizes, strict=True)])
        hidden = network(single[:, None], cache=cache)  # (b, 1, d)
        for piece, x in zip(pieces, hidden, strict=True):
            piece.append(x)
    for i, n in enumerate(sizes):
        assert (torch.cat(pieces[i]) - full[i, : n + 3]).abs().max() < 1e-9


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", FAMILIES)
def test_invariance_cache(case, side, tmp_path):
    """Unequal prompts, unequal chunks, none among them, then single tokens: as one forward."""
    network = build(case, tmp_path)
    ids = torch.randint(1, 32, (3, 24), generator=torch.Generator().manual_seed(1))
    full, cache = network(ids), Cache(network.config, 3, 24, torch.float64)  # (b, t, d)
    pieces, starts = [[], [], []], [0, 0, 0]
    for sizes in ((4, 11, 1), (2, 0, 5), (5, 5, 5), (1, 1, 1), (1, 1, 1)):
        t = max(sizes)
        chunk, mask = torch.full((3, t), 7), torch.zeros(3, t, dtype=torch.bool)
        for i, n in enumerate(sizes):
            span = slice(0, n) if side == "right" else slice(t - n, t)
            chunk[i, span], mask[i, span] = ids[i, starts[i] : starts[i] + n], True
        hidden = network(chunk, cache=cache, mask=None if mask.all() else mask)  # (b, t, d)
        for i, n in enumerate(sizes):
            pieces[i].append(hidden[i][mask[i]])
            starts[i] += n
    for i, n in enumerate(starts):
        assert (torch.cat(pieces[i]) - full[i, :n]).abs().max() < 1e-9


def test_invariance_chunk_size(tmp_path):
    """The chunk length of the scan is speed, not arithmetic; lengths need not be multiples."""
    network = build("nemotron_h-base", tmp_path)
    expected = network(make_parity.training_ids())
    for chunk_size in (1, 2, 7, 21, 64):
        network.config.chunk_size = chunk_size
        assert (network(make_parity.training_ids()) - expected).abs().max() < 1e-9


@pytest.mark.parametrize("case", ["nemotron_h-groups", "qwen3_moe-unnormed"])
def test_parity_replay(case, tmp_path):
    """Replaying one's own choices changes no value and no gradient; other choices do count."""
    network, ids = build(case, tmp_path), make_parity.training_ids()
    layers = network.config.num_moe_layers
    routing = Routing(layers)
    hidden = network(ids, routing=routing)
    expected = gradients_of(network, hidden)
    replayed = network(ids, routing=Routing(layers, routing.experts()))
    assert (replayed - hidden).abs().max() == 0
    assert (gradients_of(network, replayed) - expected).abs().max() < 1e-9
    shifted = (routing.experts() + 1) % network.config.num_experts  # (b, t, l, a)
    other = Routing(layers, shifted)
    assert (network(ids, routing=other) - hidden).abs().max() > 1e-2
    assert other.experts().equal(shifted)


@pytest.mark.parametrize("case", FAMILIES)
def test_invariance_checkpointed_blocks(case, tmp_path):
    """Blocks that are recomputed in backward, their inputs in host memory or not, give the bits of
    kept ones and count a token's experts once."""
    ids, found = make_parity.training_ids(), []
    for options in (
        {},
        {"checkpoint_blocks": True},
        {"checkpoint_blocks": True, "offload_blocks": True},
    ):
        network = parallelize(build(case, tmp_path), Dist(**options))
        routing = Routing(network.config.num_moe_layers)
        network.logits(network(ids, routing=routing)).square().mean().backward()
        load = routing.tokens_per_expert(
            torch.ones_like(ids, dtype=torch.bool), network.config.num_experts
        )
        found.append([load, *(p.grad for p in network.parameters())])
    for other in found[1:]:
        assert all(x.equal(y) for x, y in zip(found[0], other, strict=True))


def test_invariance_frozen_router(tmp_path):
    """A frozen router gets no gradient and changes nobody else's."""
    network, ids = build("nemotron_h-base", tmp_path), make_parity.training_ids()
    network.logits(network(ids)).square().mean().backward()
    expected = {name: p.grad for name, p in network.named_parameters()}
    network.zero_grad(set_to_none=True)
    for name, p in network.named_parameters():
        p.requires_grad_(not name.endswith(".gate.weight"))
    network.logits(network(ids)).square().mean().backward()
    for name, p in network.named_parameters():
        assert (p.grad is None) == name.endswith(".gate.weight")
        assert p.grad is None or (p.grad - expected[name]).abs().max() < 1e-12


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_parity_logprobs(dtype, tolerance, monkeypatch):
    """Chunked log-probs, entropy and gradients are those of the whole (t, v) matrix."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 27, 8, dtype=dtype), torch.randn(50, 8, dtype=dtype)
    targets, slope = torch.randint(50, (2, 27)), torch.randn(2, 27, dtype=dtype)
    hidden.requires_grad_(), weight.requires_grad_()
    log_p = (hidden @ weight.T / 0.7).log_softmax(-1)  # (b, t, v)
    expected = log_p.gather(-1, targets[..., None])[..., 0]
    entropies = -(log_p.exp() * log_p).sum(-1)
    gradients = torch.autograd.grad((expected * slope).sum(), (hidden, weight))
    for num_bytes in (1, 4 * 50 * 20, 1 << 20):  # as large as the head, 20 tokens, all at once
        monkeypatch.setattr(logprobs, "CHUNK_BYTES", num_bytes)
        ours, entropy = token_logprobs(hidden, weight, targets, 0.7)
        assert (ours - expected).abs().max() < tolerance
        assert (entropy - entropies).abs().max() < tolerance and not entropy.requires_grad
        for x, y in zip(
            torch.autograd.grad((ours * slope).sum(), (hidden, weight)), gradients, strict=True
        ):
            assert (x - y).abs().max() < 10 * tolerance


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


def test_invariance_logprobs_memory(monkeypatch):
    """No tensor of tokens x vocabulary ever exists, forward or backward."""
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", 4 * 1000 * 8)  # eight tokens' logits
    hidden = torch.randn(100, 4, requires_grad=True)
    weight = torch.randn(1000, 4, requires_grad=True)
    with Largest() as largest:
        token_logprobs(hidden, weight, torch.arange(100))[0].sum().backward()
    assert largest.numel == 8 * 1000
