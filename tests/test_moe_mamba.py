"""Experts under every distribution of tokens, and the scan at every length."""

import pytest
import torch
import torch.nn.functional as F

from nanocascade.model import moe, scan
from nanocascade.model.documents import Documents
from nanocascade.model.mamba2 import Mamba2
from nanocascade.model.model import Context, ModelConfig
from nanocascade.model.moe import Experts, Router, load_imbalance, update_correction_bias
from nanocascade.model.scan import chunk_scan, scan_plan, scan_step


def scan_inputs(t, dtype=torch.float64):
    """x (1, t, h, c), dt (1, t, h), A (h,), B and C (1, t, g, s) for h = 4, c = 3, g = 2, s = 2."""
    generator = torch.Generator().manual_seed(t)
    x, B, C = (
        torch.randn(1, t, n, m, generator=generator, dtype=dtype)
        for n, m in ((4, 3), (2, 2), (2, 2))
    )
    dt = torch.rand(1, t, 4, generator=generator, dtype=dtype)
    return x, dt, -torch.tensor([1e-4, 0.01, 1.0, 8.0], dtype=dtype), B, C


@pytest.mark.parametrize("t, chunk_size", [(8192, 128), (8191, 256), (1, 128), (130, 128)])
def test_parity_scan(t, chunk_size):
    """The chunked scan is the recurrence, over 8,192 tokens, from zeros and from the state at the
    end of another document."""
    x, dt, A, B, C = scan_inputs(5 + t)
    state, outputs = torch.zeros(1, 4, 3, 2, dtype=torch.float64), []
    for i in range(5 + t):
        outputs.append(scan_step(x[:, i], dt[:, i], A, B[:, i], C[:, i], state))
    plan = scan_plan(Documents([5, t], [-1, 0]), chunk_size, 0, x.device, keep_ends=True)
    scanned, states = [], [None]
    for part in plan.parts:
        inputs = [F.pad(y[0].flatten(1), (0, 0, 0, 1))[part.inputs] for y in (x, dt, B, C)]
        x_part, dt_part, B_part, C_part = (
            y.unflatten(-1, z.shape[2:]) for y, z in zip(inputs, (x, dt, B, C), strict=True)
        )
        y, ends = chunk_scan(x_part, dt_part, A, B_part, C_part, part, states[-1])
        scanned.append(y.flatten(0, 1))
        states += ends
    scanned = torch.cat(scanned)[plan.outputs]  # (t, h, c)
    assert (scanned - torch.cat(outputs)).abs().max() < 1e-9
    assert (torch.cat(states[1:])[plan.end_places[1]] - state).abs().max() < 1e-9


def one_by_one(experts, x, chosen, weights):
    """Every token through its experts, straight from the definition."""
    rows = []
    for token, picks, shares in zip(x, chosen.tolist(), weights, strict=True):
        row = 0
        for k, share in zip(picks, shares, strict=True):
            halves = [token @ w for w in experts.up_proj[k].unbind(1)]  # (f,) up, and gate
            row = row + share * (moe.activate(*halves) @ experts.down_proj[k])
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    "n, top, d, f",
    [(40, 8, 16, 8), (40, 3, 16, 8), (40, 2, 16, 8), (1, 8, 16, 8), (40, 8, 16, 6), (40, 8, 18, 8)],
)
def test_parity_experts(gated, n, top, d, f, monkeypatch):
    """grouped_mm and the loop are every expert on its own, in value and gradient, also in widths
    that grouped_mm does not take.

    Experts from `top` on stay empty; with top = 2 all tokens go to the same two.
    """
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=d, num_experts=8, moe_intermediate_size=f, gated_mlp=gated)
    experts = Experts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    chosen = torch.rand(n, top).argsort(1)[:, :2]  # (n, a)
    x, weights = torch.randn(n, d, requires_grad=True), torch.rand(n, 2, requires_grad=True)
    inputs = [x, weights, *experts.parameters()]
    results = []
    for form, product in (
        (one_by_one, moe.fused_mm),
        (Experts.__call__, moe.fused_mm),
        (Experts.__call__, moe.looped_mm),
    ):
        monkeypatch.setattr(moe, "fused_mm", product)
        y = form(experts, x, chosen, weights)  # (n, d)
        slope = torch.linspace(-1, 1, y.numel()).view_as(y)
        results.append([y, *torch.autograd.grad((y * slope).sum(), inputs)])
    for other in results[1:]:
        for ours, theirs in zip(other, results[0], strict=True):
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_numbers_group_limit():
    """Only experts of the best groups are chosen, even if every choice score is negative."""
    router = Router(
        ModelConfig(hidden_size=2, num_experts=6, n_group=3, topk_group=1, num_experts_per_tok=2)
    )
    with torch.no_grad():
        router.weight.zero_()  # all scores 0.5, so the bias decides
        # sums of two: -2.1, -1.1 and -1.9; the best single expert is in the last group
        router.e_score_correction_bias.copy_(torch.tensor([-1.5, -1.6, -1.0, -1.1, -0.9, -2.0]))
    experts, weights = router(torch.ones(1, 2))
    assert sorted(experts[0].tolist()) == [2, 3]
    assert weights.tolist() == [[0.5, 0.5]]  # by scores, to which the bias does not belong


@pytest.mark.parametrize("router", ["sigmoid", "softmax"])
def test_numbers_replay(router):
    """Recorded experts are weighted by the current scores, normalised over them, and learn so."""
    torch.manual_seed(0)
    gate = Router(
        ModelConfig(
            hidden_size=4,
            num_experts=5,
            router=router,
            num_experts_per_tok=2,
            routed_scaling_factor=2.5,
        )
    )
    torch.nn.init.normal_(gate.weight)
    x, recorded = torch.randn(3, 4), torch.tensor([[0, 4], [2, 1], [3, 0]])  # (n, d), (n, a)
    _, weights = gate(x, recorded)
    logits = x @ gate.weight.T  # (n, e)
    scores = logits.sigmoid() if router == "sigmoid" else logits.softmax(-1)
    picked = torch.stack([scores[i, row] for i, row in enumerate(recorded.tolist())])
    expected = 2.5 * picked / picked.sum(1, keepdim=True)
    assert torch.allclose(weights, expected, atol=1e-6)
    ours, theirs = (torch.autograd.grad(y[:, 0].sum(), gate.weight)[0] for y in (weights, expected))
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_invariance_balance():
    """Bias updates alone bring a lopsided router to within a fifth of an even load."""
    torch.manual_seed(0)
    router = Router(ModelConfig(hidden_size=16, num_experts=8, num_experts_per_tok=2))
    torch.nn.init.normal_(router.weight, std=0.5)
    x, worst = torch.randn(2000, 16) + 0.5, []  # an offset that favours some experts
    for _ in range(300):
        load = torch.bincount(router(x)[0].flatten(), minlength=8)[None]  # (l, e)
        worst.append(load_imbalance(load))
        update_correction_bias(router, load, 5e-3)
    assert worst[0] > 1.5 and worst[-1] < 1.2


def test_invariance_spans(monkeypatch):
    """A scan in spans gives output and gradients of one scan, also of a document that continues
    another one over a span's edge (fp64)."""
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=12, mamba_num_heads=4, mamba_head_dim=3, mamba_n_groups=2)
    mixer = Mamba2(config).double()
    mixer.reset_parameters(0.5)
    documents = Documents([20, 20, 30, 70], [-1, 0, -1, -1])
    packed = torch.randn(2, 70, 12, dtype=torch.float64, requires_grad=True)  # (b, t, d)
    found = []
    for span in (1000, 16):
        monkeypatch.setattr(scan, "SPAN", span)
        plan = scan_plan(documents, 8, config.conv_kernel - 1, packed.device)
        assert len(plan.parts) == (1 if span == 1000 else 5)
        y = mixer(packed, Context(scan=plan))
        found.append([y, *torch.autograd.grad(y.square().sum(), [packed, *mixer.parameters()])])
    for one, spans in zip(*found, strict=True):
        assert (one - spans).abs().max() < 1e-13 * one.abs().max()
