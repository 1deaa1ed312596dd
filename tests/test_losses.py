"""The three losses, their advantages and their metrics, against numbers worked by hand."""

import itertools
from functools import partial
from math import log

import pytest
import torch
from fixtures import make_parity
from torch import float32, float64

from nanocascade.checkpoint.weights import load_model
from nanocascade.data.batch import make_batches
from nanocascade.data.episode import Rollout
from nanocascade.engine.distributed import Dist
from nanocascade.engine.forward import score_tokens
from nanocascade.engine.update import Mean
from nanocascade.grpo import group_advantages, grpo_loss
from nanocascade.importance import importance_weight, mismatch_metrics, sequence_mask
from nanocascade.model.logprobs import token_logprobs
from nanocascade.mopd import compute_mopd_loss, denominators
from nanocascade.sft import sft_loss

LN2 = log(2)


def f64(*rows):
    return torch.tensor(rows, dtype=float64)


def logs(*rows):
    return f64(*rows).log()


def near(x, expected):
    torch.testing.assert_close(x, torch.as_tensor(expected, dtype=x.dtype), rtol=0, atol=1e-12)


def run(loss_of, logp, *args, **options):
    """(loss, its gradient by logp, metrics)."""
    logp = logp.detach().clone().requires_grad_()
    loss, metrics = loss_of(logp, *args, **options)
    loss.backward()
    return loss.detach(), logp.grad, metrics


def test_numbers_group_advantages():
    """(1, 0, 0, 1): mean 1/2, std 1/2. (0, 0, 3, 1): mean 1, population variance (1+1+4+0)/4."""
    rewards, root = f64([1, 0, 0, 1], [0, 0, 3, 1]), 1.5**0.5
    near(group_advantages(rewards, eps=0), f64([1, -1, -1, 1], [-1 / root, -1 / root, 2 / root, 0]))
    near(group_advantages(rewards, eps=0.5)[0], [0.5, -0.5, -0.5, 0.5])  # (1/2) / (1/2 + eps)
    near(group_advantages(rewards, normalize=False), f64([0.5, -0.5, -0.5, 0.5], [-1, -1, 2, 0]))


def test_numbers_equal_rewards():
    """Equal rewards give exactly 0, even where their mean is rounded; nearly equal ones do not."""
    rounded = False
    for value, r in itertools.product((0.0, 1.0, 0.1, 0.7, 1 / 3, -2.3), (1, 3, 5, 7, 16)):
        rewards = torch.full((2, r), value)  # (p, r)
        rounded |= bool((rewards.mean(1) != rewards[:, 0]).any())
        assert (group_advantages(rewards) == 0).all(), (value, r)
        assert (group_advantages(rewards, normalize=False) == 0).all(), (value, r)
    assert rounded, "the cases test nothing"
    assert (group_advantages(torch.tensor([[0.5, 0.5, 0.500001]])) != 0).all()


def test_numbers_grpo():
    """N = 4 (one loss token is elsewhere): L = -(2 ln 1/2 + 2 ln 1/4 - ln 1/8) / 4 = 3/4 ln 2.

    Gradient -A/N on the three tokens of the mask: -2/4, -2/4, 1/4.
    """
    logp, mask = logs([0.5, 0.25, 0.8], [0.125, 0.5, 0.2]), f64([1, 1, 0], [1, 0, 0]).bool()
    loss, grad, _ = run(grpo_loss, logp, f64([2, 2, 2], [-1, -1, -1]), mask, num_tokens=4)
    near(loss, 0.75 * LN2)
    near(grad, [[-0.5, -0.5, 0], [0.25, 0, 0]])


def test_numbers_grpo_kl():
    """k3 = x - 1 - ln x with x = reference/train: 1 - ln 2 at x = 2 and ln 2 - 1/2 at x = 1/2.

    Their sum is 1/2, so L = 0.1 * (1/2) / 5 and the mean over the two loss tokens is 1/4; the
    gradient is 0.1 * (1 - x) / 5. Where train = reference both are exactly 0.
    """
    logp, reference = logs([0.25, 0.5, 0.125]), logs([0.5, 0.25, 0.9])
    zero, mask = f64([0, 0, 0]), f64([1, 1, 0]).bool()
    penalty = partial(grpo_loss, num_tokens=5, ref_logprobs=reference, kl_coef=0.1)
    loss, grad, metrics = run(penalty, logp, zero, mask)
    near(loss, 0.01)
    near(grad, [[-0.02, 0.01, 0]])
    near(metrics["kl/reference"], 0.25)
    loss, grad, _ = run(penalty, reference, zero, mask)
    assert loss == 0 and (grad == 0).all()


def test_numbers_grpo_gate():
    """r = 1/2, 2, 1/4, 4 and the band (0.4, 3): weights 1/2, 2, 0, 0 without gradient; N = 4."""
    logp, sampler = logs([0.25, 0.5, 0.125, 0.5]), logs([0.5, 0.25, 0.5, 0.125])
    gated = partial(grpo_loss, num_tokens=4, sampler_logprobs=sampler, gate=(0.4, 3.0))
    loss, grad, metrics = run(gated, logp, f64([1] * 4), f64([1] * 4).bool())
    near(loss, (0.5 * log(4) + 2 * LN2) / 4)
    near(grad, [[-0.125, -0.5, 0, 0]])
    near(metrics["gate/out_of_band"], 0.5)


# Two responses, of 3 and of 1 valid tokens. Ratios r = train/inf, advantages a = ln teacher/train:
#     response 1:  r = 1, 2, 4    a = ln 2, -ln 2, 2 ln 2    ln train = -ln 2, -ln 2, -2 ln 2
#     response 2:  r = 1/2        a = -ln 2                  ln train = -ln 2
# What stands at the two positions without loss is extreme on purpose.
MASK = f64([1, 1, 1], [1, 0, 0]).bool()
STUDENT = logs([0.5, 0.5, 0.25], [0.5, 0.9, 1e-30])
TEACHER = logs([1.0, 0.25, 1.0], [0.25, 1e-30, 1.0])
SAMPLER = logs([0.5, 0.25, 0.0625], [1.0, 1e-30, 1e-30])
MOPD = partial(compute_mopd_loss, eps_low=0.4, eps_high=3.0)


@pytest.mark.parametrize("gate, third", [("zero", 0), ("clamp", 3), ("none", 4)])
def test_numbers_mopd(gate, third):
    """Weights 1, 2, w | 1/2; r = 4 is out of the band (0.4, 3): w = 0 (zero), 3 (clamp), 4 (none).

    L = -1/2 [1/3 (-1 + 2 - 4w) + 1/1 (1/2)] ln2^2, so -5/12 ln2^2 for w = 0: the token out of the
    band stays in the 3. Gradient -w_t a_t / (|V(y)| * 2), nothing through w and a.
    """
    teacher = TEACHER.clone().requires_grad_()
    loss, grad, metrics = run(MOPD, STUDENT, teacher, SAMPLER, MASK, gate=gate)
    near(loss, -(LN2**2) / 2 * ((1 - 4 * third) / 3 + 0.5))
    near(grad, [[-LN2 / 6, LN2 / 3, -third * 2 * LN2 / 6], [LN2 / 4, 0, 0]])
    near(metrics["gate/out_of_band"], 0.25)
    assert teacher.grad is None
    with pytest.raises(ValueError, match="'clip'"):
        run(MOPD, STUDENT, teacher, SAMPLER, MASK, gate="clip")


def test_sequence_mask_of_no_tokens():
    """A rank may have no responses in a micro-batch."""
    none = torch.zeros(1, 0)
    assert sequence_mask(none, none, none, none.long(), 2.0).shape == (1, 0)


@pytest.mark.parametrize(
    "limit, kept", [(0.0, (1, 1)), (2.0, (0, 1)), (2.4, (1, 1)), (1.9, (0, 0))]
)
def test_numbers_sequence_mask(limit, kept):
    """exp|ln r| is 1, 2, 4 in response 1, mean 7/3, and 2 in response 2: the limit 2 masks the
    first, 1.9 both, 2.4 neither. A masked response has no gradient and stays in the denominators:
    the other's is as without the mask. Three of the four tokens are masked, or all, or none."""
    rows = f64(*[[x] * 3 for x in kept])  # (b, t)
    _, plain, _ = run(MOPD, STUDENT, TEACHER, SAMPLER, MASK, gate="none")
    masked = partial(MOPD, gate="none", max_sequence_error=limit)
    _, grad, metrics = run(masked, STUDENT, TEACHER, SAMPLER, MASK)
    near(grad, plain * rows)
    packed = [x.flatten()[None] for x in (STUDENT, TEACHER, SAMPLER, MASK)]
    ids = torch.tensor([[0, 0, 0, 1, 1, 1]])
    near(run(masked, *packed, response_ids=ids)[1], (plain * rows).flatten()[None])
    share = 1 - (3 * kept[0] + kept[1]) / 4
    assert metrics.get("mismatch/masked", 0) == share and ("mismatch/masked" in metrics) == (
        limit > 0
    )
    args = f64([1] * 3, [1] * 3), MASK  # advantages: gradient -1/4 a token, and the KL term's 1/8
    kl = {"ref_logprobs": STUDENT + LN2, "kl_coef": 0.5}  # x = 2: 0.5 * (1 - 2) / 4
    options = {"num_tokens": 4, "sampler_logprobs": SAMPLER, "max_sequence_error": limit}
    _, grad, metrics = run(grpo_loss, STUDENT, *args, **options, **kl)
    near(grad, -3 / 8 * MASK * rows)
    assert metrics.get("mismatch/masked", 0) == share
    flat = [x.flatten()[None] for x in (STUDENT, *args)]
    options["sampler_logprobs"] = packed[2]
    near(run(grpo_loss, *flat, **options, response_ids=ids)[1], (MASK * rows / -4).flatten()[None])


def test_numbers_denominators():
    """Responses of 3 and 1 tokens: by response each has its own and there are 2, so weights are
    1/6 and 1/2 a token (Eq. 4); by token all four weigh 1/4. Empty steps divide by 1."""
    counts = torch.tensor([3, 1])
    for per, expected in (("response", [1 / 6, 1 / 2]), ("token", [1 / 4, 1 / 4])):
        num_tokens, num_responses = denominators(counts, 4, 2, per)
        near(1 / (num_tokens * num_responses).double(), expected)
        given = {"num_tokens": num_tokens, "num_responses": num_responses, "gate": "none"}
        loss, _, _ = run(MOPD, STUDENT, STUDENT + 1, STUDENT, MASK, **given)  # w = a = 1
        near(loss, 4 * LN2 * expected[0] + LN2 * expected[1])  # ln train: -(1 + 1 + 2), -1
    assert denominators(torch.tensor([0]), 0, 0, "response")[1] == 1


def test_numbers_mopd_metrics():
    """Means over the four valid tokens, whose r are 1, 2, 4, 1/2.

    mopd/reverse_kl = mean -a = -ln2/4; prob_error = mean exp|ln r| - 1 = (0+1+3+1)/4; k3 = mean of
    r - 1 - ln r = (0 + 1-ln2 + 3-2ln2 + ln2-1/2)/4; ratio/mean = 7.5/4, ratio/max = 4. Where the
    student is its teacher reverse_kl and the gradient are exactly 0, whatever the sampler was.
    """
    metrics = run(MOPD, STUDENT, TEACHER, SAMPLER, MASK)[2]
    near(metrics["mopd/reverse_kl"], -LN2 / 4)
    near(metrics["mismatch/prob_error"], 1.25)
    near(metrics["mismatch/k3"], (3.5 - 2 * LN2) / 4)
    near(metrics["ratio/mean"], 1.875)
    near(metrics["ratio/max"], 4)
    assert not any(x.requires_grad or x.shape for x in metrics.values())
    _, grad, metrics = run(MOPD, STUDENT, STUDENT, SAMPLER, MASK, gate="none")  # its own teacher
    assert (grad == 0).all() and metrics["mopd/reverse_kl"] == 0
    low = mismatch_metrics(logs([0.25, 0.9]), logs([0.5, 0.1]), f64([1, 0]))  # r = 1/2 alone
    near(low["ratio/max"], 0.5)
    near(low["mismatch/prob_error"], 1)


@pytest.mark.parametrize("dtype", [float32, float64])
@pytest.mark.parametrize("sign, edge", [(-1, 0.5), (1, 2.0)])
def test_numbers_band_edges(dtype, sign, edge):
    """A ratio of exactly 0.5 or 2.0 keeps its weight, the next number further out has weight 0.

    Nine tokens of advantage 1: gradient -r/9 in the default band, and 0 outside.
    """
    train = torch.full((1, 9), -2 * LN2 if sign < 0 else -LN2, dtype=dtype)  # (b, t)
    for beyond in (0, 4 * torch.finfo(dtype).eps):
        sampler = train - sign * (torch.tensor(LN2, dtype=dtype) + beyond)  # (b, t)
        ratio = (train - sampler).exp()  # (b, t)
        assert (sign * (ratio - edge) > 0).all() if beyond else (ratio == edge).all()
        _, grad, metrics = run(compute_mopd_loss, train, train + 1, sampler)
        torch.testing.assert_close(grad, torch.full_like(train, 0 if beyond else -edge / 9))
        assert metrics["gate/out_of_band"] == (beyond > 0)


@pytest.mark.parametrize("gap, ratio", [(80.0, 5.54e34), (89.0, float("inf")), (1e4, float("inf"))])
def test_numbers_gate_overflow(gap, ratio):
    """A ratio beyond fp32's range weighs 0 like any other outside the band, and is not NaN.

    Two tokens of ln train = -1/2; the first has r = 1 and advantage 1/5, the second r = exp(gap):
    L = -(1/5)(-1/2)/2 = 1/20, gradient -(1/5)/2 and 0; GRPO with advantage 1: L = (1/2)/2.
    """
    train = torch.full((1, 2), -0.5)
    sampler = train - torch.tensor([[0.0, gap]])
    weight, found = importance_weight(train, sampler, 0.5, 2.0)
    assert weight.tolist() == [[1, 0]] and found[0, 1].item() == pytest.approx(ratio, rel=1e-3)
    loss, grad, _ = run(compute_mopd_loss, train, train + 0.2, sampler)
    torch.testing.assert_close(loss, torch.tensor(0.05))
    torch.testing.assert_close(grad, torch.tensor([[-0.1, 0.0]]))
    gated = partial(grpo_loss, num_tokens=2, sampler_logprobs=sampler, gate=(0.5, 2.0))
    loss, grad, _ = run(gated, train, torch.ones(1, 2), torch.ones(1, 2).bool())
    torch.testing.assert_close(loss, torch.tensor(0.25))
    torch.testing.assert_close(grad, torch.tensor([[-0.5, 0.0]]))


def test_numbers_mopd_layouts():
    """Packed into one row, or a column a call with the step's counts: equal loss and gradient."""
    expected, expected_grad, _ = run(MOPD, STUDENT, TEACHER, SAMPLER, MASK)
    order = [3, 0, 1, 2]  # response 2 comes first
    packed = [x.flatten()[order][None] for x in (STUDENT, TEACHER, SAMPLER)]
    loss, grad, _ = run(MOPD, *packed, response_ids=torch.tensor([[1, 0, 0, 0]]))
    near(loss, expected)
    near(grad[0], expected_grad.flatten()[order])
    counts = {"num_tokens": torch.tensor([3, 1]), "num_responses": 2}
    columns = zip(*(x.split(1, dim=1) for x in (STUDENT, TEACHER, SAMPLER, MASK)), strict=True)
    calls = [run(MOPD, *x, response_ids=torch.tensor([[0], [1]]), **counts) for x in columns]
    near(sum(x[0] for x in calls), expected)
    near(torch.cat([x[1] for x in calls], 1), expected_grad)


def test_numbers_sft():
    """N = 8: L = -(ln 1/2 + ln 1/4) / 8 = 3/8 ln 2, gradient -1/8; the metric is a mean over 2."""
    mask = f64([1, 1, 0]).bool()
    loss, grad, metrics = run(sft_loss, logs([0.5, 0.25, 1e-30]), mask, num_tokens=8)
    near(loss, 3 / 8 * LN2)
    near(grad, [[-0.125, -0.125, 0]])
    near(metrics["loss/token"], 1.5 * LN2)


@pytest.mark.parametrize("kind", ["grpo", "mopd"])
def test_numbers_masked_infinity(kind):
    """An infinite log-prob where there is no loss spoils neither the loss nor its gradient."""
    mask, zero, inf = f64([1, 0]).bool(), f64([0, 0]), float("inf")
    for mine, other in ((-inf, -1.0), (-1.0, -inf), (-inf, -inf)):
        logp, other = f64([-1.0, mine]), f64([-1.0, other])
        kl = partial(grpo_loss, num_tokens=1, ref_logprobs=other, kl_coef=1.0)
        args = (kl, logp, zero, mask) if kind == "grpo" else (MOPD, logp, other, zero, mask)
        loss, grad, _ = run(*args)
        assert loss.isfinite() and grad.isfinite().all() and grad[0, 1] == 0


def test_numbers_entropy_and_means():
    """Logits (ln 3, 0): p = 3/4, 1/4; at T = 1/2 p = 9/10, 1/10; H = -p ln p - (1-p) ln (1-p).

    Micro-batches of 1 and 3 tokens: (2*1 + 6*3) / 4 = 5; the larger of two maxima.
    """
    for t, p in ((1.0, 0.75), (0.5, 0.9)):
        logp, entropy = token_logprobs(f64([log(3)]), f64([1.0], [0.0]), torch.tensor([1]), t)
        near(logp, [log(1 - p)])
        near(entropy, [-p * log(p) - (1 - p) * log(1 - p)])
    mean = Mean()
    mean.add({"x": 2.0, "ratio/max": 5.0}, 1)
    mean.add({"x": 6.0, "ratio/max": 3.0, "y": 1.5}, 3)
    assert mean.result(Dist(0, 1, "cpu")) == {"x": 5.0, "ratio/max": 5.0, "y": 1.5}


def toy_rollouts():
    """Six episodes of unequal lengths, tool tokens between their own; one carries no loss."""
    generator, rollouts = torch.Generator().manual_seed(0), []
    for i, n in enumerate((5, 23, 9, 14, 3, 30)):
        tokens = torch.randint(0, 32, (n,), generator=generator).tolist()
        noise = (0.8 * torch.randn(n, generator=generator) - 3.5).tolist()
        mask = [j > 1 and j % 7 != 3 for j in range(n)]
        rollouts.append(Rollout({}, tokens, 2, mask, noise, advantage=0.3 * i - 0.7, loss=i != 2))
    return rollouts


@pytest.mark.parametrize("name", ["sft", "grpo", "mopd"])
def test_invariance_micro_batch(name, tmp_path):
    """Loss and gradient of a step do not depend on how its tokens are cut into micro-batches."""
    models, rollouts, results = [], toy_rollouts(), {}
    for case in ("nemotron_h-base", "nemotron_h-groups"):
        make_parity.write_checkpoint(tmp_path / case, make_parity.CONFIGS[case])
        models.append(load_model(tmp_path / case, float64))
    num_tokens = torch.tensor([x.num_loss_tokens for x in rollouts])  # (o,)
    total, gated = int(num_tokens.sum()), partial(grpo_loss, gate=(0.5, 2.0))
    counts = {"num_tokens": num_tokens, "num_responses": int((num_tokens > 0).sum())}
    for micro_tokens in (9999, 64, 30):
        losses, batches = models[0].zero_grad() or [], make_batches(rollouts, micro_tokens)
        assert sum(int(x.mask.sum()) for x in batches) == total
        for x in batches:
            (logp, _), (taught, _) = (score_tokens(model, x) for model in models)  # (b, t)
            inf, ids = x.sampler_logprobs, x.response_ids  # (b, t)
            if name == "sft":
                loss, _ = sft_loss(logp, x.mask, num_tokens=total)
            elif name == "grpo":
                loss, _ = gated(logp, x.advantages, x.mask, sampler_logprobs=inf, num_tokens=total)
            else:
                loss, _ = compute_mopd_loss(logp, taught, inf, x.mask, response_ids=ids, **counts)
            loss.backward()
            losses.append(loss.detach())
        grad = torch.cat([p.grad.flatten() for p in models[0].parameters()])
        results[len(losses)] = sum(losses), grad
    (loss, grad), *others = results.values()  # of 1, 2 and 3 micro-batches
    assert list(results) == [1, 2, 3] and grad.norm() > 1e-3
    for other_loss, other_grad in others:
        near(other_loss, loss)
        torch.testing.assert_close(other_grad, grad, rtol=1e-9, atol=1e-10)
