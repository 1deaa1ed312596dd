"""What is read is what was written, by us or by transformers, and what is damaged is refused."""

import hashlib
import json
import os
import resource

import pytest
import torch
from fixtures import make_parity, toy_runs
from safetensors.torch import load_file, save_file

from nanocascade.checkpoint.hf_config import load_config
from nanocascade.checkpoint.weights import load_model, save_model
from nanocascade.engine.distributed import Dist
from nanocascade.engine.optim import make_optimizer, optimizer_step
from nanocascade.files import read_json, sha256_of
from nanocascade.model.layers import KEEP_FP32
from nanocascade.model.model import Model, ModelConfig
from nanocascade.tokenizer.tokenizer import Tokenizer

sft = toy_runs.sft
FAMILIES = [
    "nemotron_h-base",
    "nemotron_h-new",
    "qwen2-base",
    "qwen2-tied",
    "qwen3-tied",
    "qwen3_moe-step",
    "llama-scaled",
]
WEIGHTS = "model.safetensors"


@pytest.fixture
def source(request, tmp_path):
    """A published directory, of the configuration that the test is parametrized with."""
    case = getattr(request, "param", "nemotron_h-base")
    make_parity.write_checkpoint(tmp_path / "source", make_parity.CONFIGS[case])
    return tmp_path / "source"


def edit_config(folder, **changes):
    config = read_json(folder / "config.json") | changes
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / WEIGHTS)


def equal(ours, theirs):
    return list(ours) == list(theirs) and all(ours[k].equal(theirs[k]) for k in ours)


@pytest.mark.parametrize("source", list(make_parity.CONFIGS), indirect=True)
def test_parity_round_trip(source, tmp_path):
    """Loaded and saved, tensors keep names, dtype and bits, and the config its meaning."""
    out = tmp_path / "out"
    edit_config(source, _name_or_path="survives")
    save_model(load_model(source), out)
    assert equal(load_file(source / WEIGHTS), load_file(out / WEIGHTS))
    assert load_config(out) == load_config(source)
    assert read_json(out / "config.json")["_name_or_path"] == "survives"


@pytest.mark.parametrize("source", ["nemotron_h-base", "qwen3_moe-base"], indirect=True)
def test_invariance_layout(source):
    """Matrices are loaded by columns, and the fused optimizer, which walks through memory, pairs
    each weight with its own gradient: as plain AdamW where both are held by rows."""
    model = load_model(source)
    rows = [p.detach().clone(memory_format=torch.contiguous_format) for p in model.parameters()]
    assert any(not p.is_contiguous() for p in model.parameters())
    optimizer = make_optimizer(model, 1e-2, (0.9, 0.95), 0.0)
    plain = torch.optim.AdamW(rows, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for start in (2, 12, 22):
        ids = torch.arange(start, start + 10)[None]  # (1, t)
        model.logits(model(ids)).logsumexp(-1).sum().backward()
        for row, p in zip(rows, model.parameters(), strict=True):
            row.grad = p.grad.contiguous()
        optimizer_step(model, optimizer, 1e-2, 1e9, Dist())
        plain.step()
    for row, (name, p) in zip(rows, model.named_parameters(), strict=True):
        assert (p - row).abs().max() < 1e-5, name


@pytest.mark.parametrize("source", FAMILIES, indirect=True)
def test_parity_round_trip_transformers(source, tmp_path):
    """Ours -> transformers -> its save_pretrained -> ours: bit for bit, and its logits are ours."""
    transformers = pytest.importorskip("transformers")
    model = load_model(source)
    save_model(model, tmp_path / "ours", max_shard_bytes=20_000)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report.values()) and theirs.dtype == torch.float32
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_model(tmp_path / "theirs")
    assert equal(again.state_dict(), model.state_dict()) and again.config == model.config
    save_model(again, tmp_path / "last")  # from transformers-5 spelling back to the published one
    assert equal(load_file(tmp_path / "last" / WEIGHTS), load_file(source / WEIGHTS))


def test_parity_fresh_transformers(tmp_path):
    """A model made here, like the toy's, loads in transformers with every tensor."""
    transformers = pytest.importorskip("transformers")
    config = ModelConfig(hidden_size=32, shared_expert_intermediate_size=64, eos_token_ids=(3, 4))
    save_model(Model(config).reset_parameters(0), tmp_path)
    assert load_config(tmp_path) == config
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values())
    assert theirs.generation_config.top_p == 0.95
    assert theirs.generation_config.eos_token_id == [3, 4]


def test_parity_train_script(sft, tmp_path):
    """The directory that a train script leaves, the toy's: transformers loads all of it, computes
    our logits from the ids of our prompt, and what it saves is again the same model."""
    transformers = pytest.importorskip("transformers")
    model, tokenizer = load_model(sft), Tokenizer(sft)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        sft, output_loading_info=True
    )
    assert not any(report.values())
    for module in theirs.modules():
        if hasattr(module, "time_step_limit"):  # 5.23 clamps by time_step_min, see README
            module.time_step_limit = (0.0, float("inf"))
    turns = [{"role": "user", "content": "What is 27+48?"}]
    ids = transformers.AutoTokenizer.from_pretrained(sft).apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    assert ids[0].tolist() == tokenizer.render(turns, None, True, True)[0]
    assert (theirs(ids).logits - model.logits(model(ids))).abs().max() < 1e-4
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_model(tmp_path / "theirs")
    assert equal(again.state_dict(), model.state_dict()) and again.config == model.config
    save_model(again, tmp_path / "last", tokenizer)
    for file in [WEIGHTS, *tokenizer.files]:
        assert (tmp_path / "last" / file).read_bytes() == (sft / file).read_bytes()


@pytest.mark.parametrize("source", ["nemotron_h-base", "qwen3_moe-base"], indirect=True)
def test_parity_stacked_experts(source, tmp_path):
    """Experts stacked as transformers holds them in memory read the same, mtp.* is passed over."""
    expected = load_model(source).state_dict()

    def stack(tensors):
        parts = {}
        for name in [x for x in tensors if ".experts." in x]:
            head, tail = name.split(".experts.")
            parts.setdefault((head, tail.split(".")[1]), []).append((int(tail.split(".")[0]), name))
        stacked = {
            key: torch.stack([tensors.pop(name) for _, name in sorted(names)])
            for key, names in parts.items()
        }
        for (head, proj), x in stacked.items():
            if proj == "up_proj" and (head, "gate_proj") in stacked:
                x, proj = torch.cat([stacked[head, "gate_proj"], x], 1), "gate_up_proj"
            if proj != "gate_proj":
                tensors[f"{head}.experts.{proj}"] = x
        for name in [x for x in tensors if x.startswith("backbone.")]:
            tensors[name.replace("backbone.", "model.")] = tensors.pop(name)
        tensors["mtp.layers.0.norm.weight"] = torch.ones(32)

    edit_weights(source, stack)
    assert equal(load_model(source).state_dict(), expected)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_parity_dtypes(source, stored, tmp_path):
    """Files of any float type are read in any other; the fragile few never go below fp32."""
    edit_weights(source, lambda x: x.update({name: y.to(stored) for name, y in x.items()}))
    exact = load_model(source, torch.float64).state_dict()
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(source, dtype)
        for name, x in model.state_dict().items():
            assert x.dtype == (torch.float32 if name.endswith(KEEP_FP32) else dtype)
            assert x.equal(exact[name].to(x.dtype))
    save_model(model, tmp_path / "out")  # bf16 with an fp32 router, A_log, D and dt_bias
    assert equal(load_model(tmp_path / "out", torch.bfloat16).state_dict(), model.state_dict())


SPELLINGS = {
    "nemotron_h-base": {
        "hybrid_override_pattern": None,
        "layer_norm_epsilon": None,
        "norm_eps": 1e-5,
        "layers_block_type": ["mamba", "moe", "attention", "linear_attention", "mlp", "moe"],
        "time_step_limit": [0.0, {"__float__": "Infinity"}],
        "num_hidden_layers": 6,
    },
    "qwen3_moe-step": {
        "num_experts": None,
        "num_local_experts": 8,
        "rope_theta": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0, 2],
    },
    "llama-scaled": {
        "rope_theta": None,
        "rope_scaling": None,
        "num_key_value_heads": 2,
        "rope_parameters": make_parity.LLAMA3 | {"rope_theta": 50},
        "head_dim": None,
    },
}


@pytest.mark.parametrize("source", list(SPELLINGS), indirect=True)
def test_parity_spellings(source, request):
    """config.json in both spellings means the same; eos ids come from generation_config first."""
    before = load_config(source)
    edit_config(source, **SPELLINGS[request.node.callspec.params["source"]], eos_token_id=2)
    after = load_config(source)
    assert after.eos_token_ids == (2,)
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 11]}')
    assert load_config(source).eos_token_ids == (2, 11)
    after.eos_token_ids = before.eos_token_ids
    assert after == before


YARN = {"rope_type": "yarn", "factor": 4.0}
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
UNSUPPORTED = [
    ("nemotron_h-base", {"model_type": "gpt2"}, "model_type 'gpt2'"),
    ("nemotron_h-base", {"attention_bias": True}, "attention_bias True"),
    ("nemotron_h-base", {"mlp_hidden_act": "gelu"}, "mlp_hidden_act 'gelu'"),
    ("nemotron_h-base", {"use_conv_bias": False}, "use_conv_bias False"),
    ("nemotron_h-base", {"n_routed_experts": None}, "lacks n_routed_experts"),
    ("qwen3_moe-base", {"num_key_value_heads": 0}, "num_key_value_heads is 0, .* at least 1"),
    ("qwen3_moe-base", {"hidden_size": 0}, "hidden_size is 0, expected int, at least 1"),
    ("nemotron_h-base", {"num_local_experts": 4}, "n_routed_experts 8 and num_local_experts 4"),
    ("nemotron_h-base", {"hidden_size": "32"}, "hidden_size is '32'"),
    ("nemotron_h-base", {"hybrid_override_pattern": "MXE"}, "block pattern 'MXE'"),
    ("nemotron_h-base", {"layers_block_type": ["lstm"]}, "lstm"),
    ("nemotron_h-base", {"layers_block_type": ["mlp"]}, "do not describe one list of blocks"),
    ("nemotron_h-base", {"num_experts_per_tok": 9}, "num_experts_per_tok 9 of num_experts 8"),
    ("nemotron_h-base", {"n_groups": 3}, "mamba_num_heads 4 is not a multiple of its n_groups 3"),
    ("nemotron_h-base", {"n_group": 3}, "8 with n_group 3"),
    ("nemotron_h-base", {"n_group": 0}, "n_group is 0, expected int, at least 1"),
    ("nemotron_h-base", {"n_group": 8, "topk_group": 4}, "n_group 8 and topk_group 4"),
    ("nemotron_h-groups", {"topk_group": 5}, "n_group 4 and topk_group 5"),
    ("nemotron_h-groups", {"topk_group": 1}, "num_experts_per_tok 4 .* topk_group 1"),
    ("nemotron_h-base", {"time_step_limit": [0.1]}, r"time_step_limit is \[0.1\]"),
    ("nemotron_h-base", {"time_step_limit": 0.1}, "time_step_limit is 0.1"),
    ("nemotron_h-base", {"pad_token_id": "0"}, "pad_token_id is '0'"),
    ("qwen3_moe-base", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
    ("qwen3_moe-base", {"mlp_only_layers": [2]}, r"mlp_only_layers is \[2\]"),
    ("qwen2-base", {"attention_bias": False}, "attention_bias False is not supported, only True"),
    ("qwen3-base", {"sliding_window": 128, "use_sliding_window": True}, "use_sliding_window"),
    ("llama-base", {"sliding_window": 128}, "sliding_window 128"),
    ("qwen3-base", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("qwen3-base", {"num_attention_heads": 3}, "num_heads 3 is not a multiple of num_kv_heads 2"),
    ("qwen3-base", {"rope_scaling": YARN}, "yarn"),
    ("qwen3-base", {"rope_scaling": YARN, "rope_parameters": DEFAULT}, "yarn"),
    ("qwen3-base", {"rope_parameters": DEFAULT | {"factor": 4.0}}, "'factor': 4.0"),
    ("qwen3-base", {"rope_parameters": {"full_attention": DEFAULT}}, "full_attention"),
    ("qwen2-base", {"partial_rotary_factor": 0.5}, "'partial_rotary_factor': 0.5"),
    ("llama-base", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    ("llama-base", {"rope_theta": "1e6"}, "'rope_theta': '1e6'"),
    ("llama-scaled", {"rope_scaling": make_parity.LLAMA3 | {"low_freq_factor": 4.0}}, "llama3"),
    ("llama-base", {"mlp_bias": True}, "mlp_bias True"),
    ("llama-base", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("llama-base", {"attention_dropout": 0.1}, "attention_dropout 0.1"),
    ("llama-base", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama-base", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 is not"),
    ("llama-base", {"norm_topk_prob": True}, "llama: norm_topk_prob True"),
    ("llama-base", {"eos_token_id": "2"}, r"eos_token_id is \['2'\]"),
    # Values of another type than the key's, which transformers' own classes refuse too.
    ("llama-base", {"model_type": ["llama"]}, r"model_type \['llama'\]"),
    ("llama-base", {"rope_scaling": "yarn"}, "rope_scaling is 'yarn', expected dict"),
    ("qwen3-base", {"rope_parameters": [1]}, r"rope_parameters is \[1\], expected dict"),
    ("qwen3-base", {"rope_scaling": {"rope_type": [1]}}, "rotary embedding"),
    ("qwen3_moe-base", {"mlp_only_layers": 1}, "mlp_only_layers is 1, expected list"),
    ("qwen3_moe-base", {"mlp_only_layers": [[1]]}, "mlp_only_layers is"),
    ("nemotron_h-base", {"layers_block_type": True}, "layers_block_type is True, expected list"),
    ("nemotron_h-base", {"layers_block_type": [["mlp"]]}, "layers_block_type has"),
    ("nemotron_h-base", {"hybrid_override_pattern": 4}, "hybrid_override_pattern is 4"),
]


@pytest.mark.parametrize("source, changes, words", UNSUPPORTED, indirect=["source"])
def test_numbers_unsupported(source, changes, words):
    """What the model does not compute, or we do not know, is refused by name, with the file."""
    edit_config(source, **changes)
    with pytest.raises(ValueError, match=words) as error:
        load_model(source)
    assert "config.json" in str(error.value)


WITHOUT_EFFECT = [
    ("llama-base", {"pretraining_tp": 2, "use_cache": False, "torch_dtype": "float16"}),
    ("llama-base", {"hidden_act": "swish", "bos_token_id": 1, "repetition_penalty": 1.1}),
    ("qwen3-base", {"sliding_window": 8, "use_sliding_window": False, "max_window_layers": 1}),
    ("qwen2-base", {"sliding_window": 8, "layer_types": ["full_attention"] * 2}),
    ("qwen3-base", {"final_logit_softcapping": None}),
    ("qwen3-base", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    ("qwen3_moe-base", {"output_router_logits": True, "router_aux_loss_coef": 0.1}),
    ("nemotron_h-base", {"rope_theta": 5.0, "partial_rotary_factor": 0.5, "expand": 4}),
    ("nemotron_h-base", {"norm_eps": 1e-5, "num_local_experts": 8, "num_nextn_predict_layers": 1}),
]


@pytest.mark.parametrize("source, changes", WITHOUT_EFFECT, indirect=["source"])
def test_numbers_without_effect(source, changes):
    """Keys that change nothing load, and mean the same model."""
    before = load_config(source)
    edit_config(source, **changes)
    assert load_config(source) == before


@pytest.mark.parametrize("source", ["llama-base"], indirect=True)
def test_parity_rope_keys(source):
    """As in transformers rope_scaling replaces rope_parameters, keys beside them are defaults, and
    llama3's original_max_position_embeddings beside them wins."""
    llama3 = make_parity.LLAMA3 | {"original_max_position_embeddings": 8}
    numbers = {key: x for key, x in llama3.items() if key != "rope_type"}
    without = {key: x for key, x in llama3.items() if key != "original_max_position_embeddings"}
    for changes, theta, scaling in (
        ({"rope_parameters": DEFAULT}, 1e4, None),
        ({"rope_parameters": DEFAULT, "rope_scaling": llama3}, 1e6, numbers),
        ({"rope_scaling": llama3 | {"rope_theta": 7}}, 7.0, numbers),
        ({"rope_scaling": make_parity.LLAMA3, "original_max_position_embeddings": 8}, 1e6, numbers),
        ({"rope_scaling": without, "max_position_embeddings": 8}, 1e6, numbers),
        ({"rope_scaling": {}, "rope_parameters": llama3}, 1e6, numbers),
        ({"rope_scaling": {"type": "default"}}, 1e6, None),
    ):
        cleared = {"rope_scaling": None, "original_max_position_embeddings": None}
        cleared["rope_theta"] = 1e6
        edit_config(source, **cleared | {"rope_parameters": None, "max_position_embeddings": 64})
        edit_config(source, **changes)
        config = load_config(source)
        assert (config.rope_theta, config.rope_scaling) == (theta, scaling), changes
        save_model(load_model(source), source)
        assert load_config(source) == config


def test_parity_configs_of_transformers(tmp_path):
    """config.json as transformers writes it, by default or with every key, is read."""
    transformers = pytest.importorskip("transformers")
    for name in ("Llama", "Qwen2", "Qwen3", "Qwen3Moe", "NemotronH"):
        config = getattr(transformers, f"{name}Config")()
        config.save_pretrained(tmp_path)
        before = load_config(tmp_path)
        (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
        assert load_config(tmp_path) == before and before.vocab_size == config.vocab_size


@pytest.mark.parametrize(
    "given, words",
    [
        ({"eos_token_id": [2, 11], "temperature": 0.7, "repetition_penalty": 1.1}, None),
        ({"eos_token_id": [2, 11], "stop_strings": None, "suppress_tokens": []}, None),
        ({"stop_strings": ["###"]}, "stop_strings .* is not supported"),
        ({"suppress_tokens": [5]}, r"suppress_tokens \[5\] is not supported"),
        ({"sampler": "mirostat"}, "sampler 'mirostat' is not supported"),
        ({"eos_token_id": -1}, r"eos_token_id is \[-1\]"),
    ],
)
def test_generation_config(source, given, words):
    """Stop ids come from generation_config.json, or from config.json where it names none; keys that
    change what is sampled in ways we cannot follow are refused."""
    edit_config(source, eos_token_id=0)
    assert load_config(source).eos_token_ids == (0,)
    file = source / "generation_config.json"
    file.write_text(json.dumps(given))
    if words is None:
        assert load_config(source).eos_token_ids == (2, 11)
        return
    with pytest.raises(ValueError, match=words) as error:
        load_config(source)
    assert "generation_config.json" in str(error.value)


@pytest.mark.parametrize("source", ["nemotron_h-base", "qwen2-tied", "llama-tied"], indirect=True)
def test_tied_head_with_its_own_values(source):
    """A file may hold a copy of the embedding as its head where config.json ties them, not another
    head: one of the two would be dropped."""
    edit_config(source, tie_word_embeddings=True)

    def set_head(change):
        def edit(tensors):
            embed = next(x for name, x in tensors.items() if "embed" in name)
            tensors["lm_head.weight"] = embed + change

        edit_weights(source, edit)

    set_head(0.0)
    assert load_model(source).head.weight is not None
    set_head(1e-3)
    with pytest.raises(ValueError, match="lm_head.weight differs from .*embed.*to false"):
        load_model(source)
    edit_config(source, tie_word_embeddings=False)
    assert not load_model(source).head.weight.equal(load_model(source).embed.weight)


def truncate(folder):
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 100)


def flip(folder):
    with open(folder / WEIGHTS, "r+b") as file:
        file.seek(20)
        byte = file.read(1)
        file.seek(20)
        file.write(bytes([byte[0] ^ 255]))


def lose_shard(folder):
    save_model(load_model(folder), folder, max_shard_bytes=20_000)
    next(folder.glob("model-00002-of-*")).unlink()


EXPERT = "backbone.layers.1.mixer.experts.3.up_proj.weight"


def break_map(source):
    (source / WEIGHTS).unlink()
    (source / f"{WEIGHTS}.index.json").write_text('{"weight_map": [1]}')


DAMAGE = {
    "truncated": (truncate, WEIGHTS),
    "flipped": (flip, WEIGHTS),
    "shard": (lose_shard, "model-00002-of-"),
    "map": (break_map, "weight_map must be an object"),
    "gone": (lambda x: (x / WEIGHTS).unlink(), WEIGHTS),
    "adapters": (lambda x: (x / "adapter_config.json").write_text("{}"), "holds adapters"),
    "expert": (lambda x: edit_weights(x, lambda y: y.pop(EXPERT)), f"1 missing: {EXPERT}"),
    "extra": (lambda x: edit_weights(x, lambda y: y.update(extra=torch.ones(1))), "extra"),
    "shape": (lambda x: edit_weights(x, lambda y: y.update({EXPERT: torch.ones(16, 31)})), EXPERT),
    "integer": (
        lambda x: edit_weights(x, lambda y: y.update({EXPERT: y[EXPERT].to(torch.int8)})),
        f"{EXPERT} is I8",
    ),
    "twice": (
        lambda x: edit_weights(
            x, lambda y: y.update({EXPERT.replace("backbone", "model"): y[EXPERT].clone()})
        ),
        "a second time",
    ),
    "other": (lambda x: edit_config(x, hybrid_override_pattern="ME*M-M"), "layers.5.mixer.A_log"),
    "nan": (lambda x: edit_weights(x, lambda y: y[EXPERT].view(-1)[7:8].fill_(torch.nan)), EXPERT),
    "inf": (lambda x: edit_weights(x, lambda y: y[EXPERT].view(-1)[7:8].fill_(-torch.inf)), EXPERT),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_numbers_damaged(source, damage):
    """A damaged directory is refused, file and tensor named."""
    change, words = DAMAGE[damage]
    change(source)
    with pytest.raises(ValueError) as error:
        load_model(source)
    assert words in str(error.value) and str(source) in str(error.value)


def test_run_save_replaces(source):
    """A new save, sharded or not, leaves no weights of the old one, and alone what is not its."""
    model = load_model(source)
    (source / "metrics.jsonl").write_text("{}\n")
    for max_shard_bytes in (20_000, 1_000_000, 30_000):
        save_model(model, source, max_shard_bytes=max_shard_bytes)
        files = sorted(source.glob("model*"))
        assert equal(load_model(source).state_dict(), model.state_dict())
        if max_shard_bytes < 1_000_000:
            index = read_json(source / "model.safetensors.index.json")["weight_map"]
            assert {x.name for x in files} == {*index.values(), "model.safetensors.index.json"}
            assert all(x.stat().st_size < max_shard_bytes + 5_000 for x in files)
        else:
            assert [x.name for x in files] == [WEIGHTS]
            assert sha256_of(source) == hashlib.sha256(files[0].read_bytes()).hexdigest()
    assert (source / "metrics.jsonl").exists() and not (source / ".saving").exists()
    for file in source.iterdir():  # a server under another user can read them
        assert file.stat().st_mode == (source / "config.json").stat().st_mode


def test_run_disk_full(source):
    """A save that cannot be written leaves the old model as it was, and no half-written file."""
    model, before = load_model(source), sorted(source.iterdir())
    expected = sha256_of(source)
    model.embed.weight.data.zero_()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError):
            save_model(model, source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(source.iterdir()) == before and sha256_of(source) == expected
