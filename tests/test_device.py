"""On a device that only pretends: nothing of the CPU meets a tensor of it, and how often the host
waits for it is counted. What a GPU computes and how fast, bench/gpu.py asks a GPU."""

import pytest
import torch
from fixtures import make_parity
from fixtures.pretend import NAME, pretend_device

from nanocascade.checkpoint.hf_config import parse_config
from nanocascade.data.batch import step_batches
from nanocascade.data.episode import Rollout
from nanocascade.engine import distributed
from nanocascade.engine.distributed import Dist
from nanocascade.engine.forward import new_routing, no_load, score_tokens
from nanocascade.engine.layout import parallelize
from nanocascade.engine.optim import make_optimizer, optimizer_step
from nanocascade.grpo import grpo_loss
from nanocascade.model.model import Model
from nanocascade.model.moe import load_imbalance, update_correction_bias
from nanocascade.sampler import Decoder, Row, generate

PROMPTS = [[5, 17, 3], [9, 2, 30, 7, 7, 21, 4]]
CONFIGS = {
    "nemotron_h": make_parity.nemotron(),
    "qwen3": make_parity.layered("qwen3"),
    "qwen3_moe": make_parity.layered("qwen3_moe"),
    "llama": make_parity.layered("llama", rope_scaling=make_parity.LLAMA3),
}


def sample_and_train(family: str, device: str, in_host: bool):
    """(tokens, gradient norm) of rollouts with recorded experts and a GRPO step on them."""
    model = Model(parse_config(CONFIGS[family])).reset_parameters(0).to(device)
    groups = generate(
        model,
        PROMPTS,
        num_samples=3,
        max_new_tokens=6,
        max_rows=4,
        stop_ids=[7, 8],
        top_p=0.95,
        return_experts=model.config.num_moe_layers > 0,
    )
    rollouts = []
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for i, x in enumerate(group):
            mask = [False] * len(prompt) + [True] * len(x.tokens)
            logprobs = [0.0] * len(prompt) + x.logprobs
            rollout = Rollout({"id": i}, prompt + x.tokens, len(prompt), mask, logprobs)
            rollout.experts, rollout.advantage = x.experts, i - 1.0
            rollouts.append(rollout)
    dist = Dist(device=device, checkpoint_blocks=in_host)
    parallelize(model, dist)
    optimizer, load = make_optimizer(model, 1e-3, (0.9, 0.95), 0.1, in_host), no_load(model)
    for batch in step_batches(model, dist, rollouts, 32, replay=model.config.num_moe_layers > 0):
        routing = new_routing(model, batch)
        train_logprobs, _ = score_tokens(model, batch, 1.0, routing)
        gap = (train_logprobs - batch.sampler_logprobs)[batch.mask].abs().max()
        assert float(gap.detach()) < 1e-4
        loss, _ = grpo_loss(
            train_logprobs,
            batch.advantages,
            batch.mask,
            num_tokens=sum(x.num_loss_tokens for x in rollouts),
            sampler_logprobs=batch.sampler_logprobs,
            gate=(0.5, 2.0),
        )
        loss.backward()
        load += routing.tokens_per_expert(batch.copies, model.config.num_experts)
    norm = optimizer_step(model, optimizer, 1e-3, 1.0, dist)
    update_correction_bias(model, load, 1e-3)
    assert load_imbalance(load) >= 1
    return [x.tokens for group in groups for x in group], norm


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("in_host", [False, True])
def test_invariance_device(family, in_host):
    """Rollouts and a GRPO step run on a device of their own, moments in host memory or not: the
    same tokens and gradient norm as on the CPU."""
    expected = sample_and_train(family, "cpu", in_host)
    with pretend_device():
        tokens, norm = sample_and_train(family, NAME, in_host)
    assert tokens == expected[0] and norm == pytest.approx(expected[1], rel=1e-4)


def test_numbers_waits():
    """A decode step lets the host wait three times: for the longest row, the drawn tokens and their
    log-probs."""
    with pretend_device() as device:
        model = Model(parse_config(CONFIGS["qwen3"])).reset_parameters(0).to(NAME)
        decoder = Decoder(model, 2, 32)
        decoder.admit([[Row(i, 0, prompt, 16, i)] for i, prompt in enumerate(PROMPTS)])
        device.waits.clear()
        decoder.step()
        decoder.finish([8])
        assert device.waits == {"_local_scalar_dense": 1, "_to_copy": 2}


def test_errors_mixed_devices():
    """The pretended device refuses what a GPU refuses: operands and indices of two devices."""
    with pretend_device():
        here, host = torch.ones(3, device=NAME), torch.ones(3)
        index = torch.tensor([0, 2])
        assert (here * 2).sum().item() == 6 and here[index].tolist() == [1, 1]
        with pytest.raises(RuntimeError, match="a tensor of the CPU meets"):
            here + host
        with pytest.raises(RuntimeError, match="indices of pretend"):
            host[index.to(NAME)]


def test_errors_out_of_memory():
    """An out-of-memory is one line that names the flag to lower: rows where the program sampled,
    tokens of a micro-batch where it trained."""

    def generate():
        raise torch.OutOfMemoryError("tried to allocate 3 GiB")

    with pytest.raises(ValueError, match="lower --max_rows, .* tried to allocate 3 GiB"):
        with distributed.start("cpu"):
            generate()
    with pytest.raises(ValueError, match="lower --micro_tokens"):
        with distributed.start("cpu"):
            raise torch.OutOfMemoryError("tried to allocate 3 GiB")
