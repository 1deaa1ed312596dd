"""What is held in memory while a model is loaded, refused, or scored, measured from outside."""

import json
import threading
import time
from pathlib import Path

import pytest
import torch
from fixtures import make_parity
from fixtures.machine import allowance

from nanocascade.checkpoint.hf_config import load_config, parse_config
from nanocascade.checkpoint.weights import disk_names, experts_of, load_model, save_model
from nanocascade.model.logprobs import token_logprobs
from nanocascade.model.model import Model

STATUS, MIB = Path("/proc/self/status"), 1 << 20
pytestmark = pytest.mark.skipif(not STATUS.exists(), reason="reads Linux's account of a process")
FULL = make_parity.nemotron(  # Nemotron-3-Nano-30B-A3B
    vocab_size=131072,
    hidden_size=2688,
    num_attention_heads=32,
    head_dim=128,
    mamba_num_heads=64,
    hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    mamba_head_dim=64,
    n_groups=8,
    ssm_state_size=128,
    n_routed_experts=128,
    num_experts_per_tok=6,
    moe_intermediate_size=1856,
    moe_shared_expert_intermediate_size=3712,
)


class Peak:
    """Bytes of anonymous memory (not file pages) above those at entry, looked at every ms."""

    def __enter__(self):
        self.start, self.bytes, self.done = self.resident(), 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()

    def watch(self):
        while not self.done.wait(0.001):
            self.bytes = max(self.bytes, self.resident() - self.start)

    def resident(self):
        return 1024 * int(STATUS.read_text().split("RssAnon:")[1].split()[0])


def write_sparse(path, config, without=()):
    """A directory as published: shards of 5 GB with whole headers and, being holes, no bytes."""
    (path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = Model(load_config(path))
    state, shards, used = model.state_dict(), [{}], 0
    for name, published in disk_names(model).items():
        for key, part in zip(published, experts_of(name, state[name]), strict=True):
            size = 2 * part.numel() * (key not in without)
            if used + size > 5e9:
                shards, used = [*shards, {}], 0
            spans = {"shape": list(part.shape), "data_offsets": [used, used + size]}
            if size:
                shards[-1][key] = {"dtype": "BF16", **spans}
            used += size
    where = {}
    for i, shard in enumerate(shards):
        header = json.dumps(shard).encode()
        end = max(x["data_offsets"][1] for x in shard.values())
        with open(path / f"model-{i}.safetensors", "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + end)
        where |= dict.fromkeys(shard, f"model-{i}.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize(
    "last, words",
    [
        ("E", "1 missing: backbone.layers.51.mixer.experts.77.up_proj.weight$"),
        ("M", r"8 missing: .*; 259 not of this model: backbone.layers.51.mixer.experts.0.down_pr"),
    ],
)
def test_numbers_full_size_refused(last, words, tmp_path):
    """63 GB without an expert, or with a config that calls for another block, are refused
    within 64 MiB, in the time for its header alone."""
    write_sparse(tmp_path, FULL, without=["backbone.layers.51.mixer.experts.77.up_proj.weight"])
    pattern = FULL["hybrid_override_pattern"][:-1] + last
    (tmp_path / "config.json").write_text(json.dumps(FULL | {"hybrid_override_pattern": pattern}))
    began = time.process_time()
    with Peak() as peak, pytest.raises(ValueError, match=words):
        load_model(tmp_path, torch.bfloat16)
    assert time.process_time() - began < allowance(1) and peak.bytes < 64 * MIB


def test_invariance_load_memory(tmp_path):
    """An fp32 file becomes a bf16 model with no more memory than that and one tensor."""
    config = parse_config(
        make_parity.layered(
            "qwen3_moe",
            vocab_size=16384,
            hidden_size=512,
            head_dim=64,
            num_hidden_layers=4,
            moe_intermediate_size=512,
        )
    )
    save_model(Model(config).reset_parameters(0), tmp_path)
    with Peak() as peak:
        model = load_model(tmp_path, torch.bfloat16)
    sizes = [x.numel() * x.itemsize for x in model.state_dict().values()]
    assert sum(sizes) > 60 * MIB and peak.bytes < sum(sizes) + max(sizes) + 16 * MIB


@pytest.mark.nightly
def test_invariance_logprobs_peak():
    """8,192 tokens over 131,072 words: under 256 MiB above activations and the head's gradient."""
    hidden = torch.randn(8192, 256, requires_grad=True)
    weight = torch.randn(131072, 256, requires_grad=True)
    with Peak() as peak:
        logprobs, _ = token_logprobs(hidden, weight, torch.arange(8192))
    assert peak.bytes < 256 * MIB
    with Peak() as peak:
        logprobs.sum().backward()
    own = (hidden.numel() + weight.numel()) * 4  # both gradients
    assert own < peak.bytes + 4 * MIB and peak.bytes - own < 256 * MIB
