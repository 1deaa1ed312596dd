"""config.json of the five families to ModelConfig and back: one table of keys serves both ways."""

import math
import re
from dataclasses import fields
from pathlib import Path

import torch

from nanocascade.files import read_json
from nanocascade.model.model import ModelConfig

CLASSES = {
    "nemotron_h": "NemotronH",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
    "llama": "Llama",
}

# field=key|key: a field of ModelConfig and its spellings in config.json, by the block that needs it
# ("" all, "S" the E of nemotron_h). All are read; nemotron_h writes the first, the others the last.
# A field with ? may be absent and then has ModelConfig's default.
KEYS = {
    "": "vocab_size hidden_size norm_eps=layer_norm_epsilon|norm_eps|rms_norm_eps "
    "tie_word_embeddings? initializer_range? max_position_embeddings?",
    "*": "num_heads=num_attention_heads num_kv_heads?=num_key_value_heads head_dim?",
    "-": "intermediate_size",
    "E": "num_experts=n_routed_experts|num_local_experts|num_experts num_experts_per_tok "
    "moe_intermediate_size norm_topk_prob",
    "S": "shared_expert_intermediate_size=moe_shared_expert_intermediate_size "
    "routed_scaling_factor? n_group? topk_group?",
    "M": "mamba_num_heads mamba_head_dim mamba_n_groups=n_groups|mamba_n_groups ssm_state_size "
    "conv_kernel chunk_size? time_step_min? time_step_max? time_step_floor?",
}
FIELDS = [
    (kind, name, (keys or name.strip("?")).split("|"))  # ("E", "num_experts", [3 keys])
    for kind, entries in KEYS.items()
    for name, _, keys in (entry.partition("=") for entry in entries.split())
]
KINDS = {
    "linear_attention": "M",
    "mamba": "M",
    "moe": "E",
    "full_attention": "*",
    "attention": "*",
    "mlp": "-",
}  # layers_block_type of transformers 5, new and old
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# What the model computes, and transformers takes where a key is absent: anything else is refused.
FIXED = {
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "mamba_proj_bias": False,
    "use_conv_bias": True,
    "hidden_act": "silu",
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "attention_dropout": 0,
    "hidden_dropout": 0,
    "use_sliding_window": False,
    "sliding_window": None,
    "residual_in_fp32": False,
    "n_shared_experts": 1,
    "moe_latent_size": None,
    "pretraining_tp": 1,
    "quantization_config": None,
}


def load_config(path) -> ModelConfig:
    """ModelConfig of a directory's config.json, in published or in transformers-5 spelling."""
    path = Path(path)
    raw, generation = read_json(path / "config.json"), path / "generation_config.json"
    try:
        config = parse_config(raw)
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'}: {error}") from None
    stops = read_json(generation).get("eos_token_id") if generation.exists() else None
    stops = raw.get("eos_token_id") if stops is None else stops  # the other file often lists more
    stops = stops if isinstance(stops, list) else [stops]
    config.eos_token_ids = tuple(x for x in stops if x is not None)
    return config


def parse_config(raw: dict) -> ModelConfig:
    """ModelConfig of a config.json's object, without eos ids; what is wrong is named by its key."""
    family, read = raw.get("model_type"), {key: x for key, x in raw.items() if x is not None}
    if family not in CLASSES:
        raise ValueError(f"model_type {family!r} is none of {', '.join(CLASSES)}")
    if read.get("use_sliding_window") is False:  # then the width of the window means nothing
        read.pop("sliding_window", None)
    for key, value in FIXED.items():
        if read.get(key, value) != value:
            raise ValueError(f"{key} {read[key]!r} is not supported, only {value!r}")
    nemotron, pattern, values, missing = family == "nemotron_h", read_pattern(read), {}, []
    types = {field.name: type(field.default) for field in fields(ModelConfig)}
    for kind, name, keys in FIELDS:
        key = next((key for key in keys if key in read), None)  # the spelling used here
        if key:
            want, x = types[name.strip("?")], read[key]
            # type() and not isinstance(): true is no number
            if type(x) not in ((int, float) if want is float else (want,)) or x < 0:
                raise ValueError(f"{key} is {x!r}, expected {want.__name__}, not negative")
            values[name.strip("?")] = want(x)
        elif kind in pattern + "S" * (nemotron and "E" in pattern) and name[-1] != "?":
            missing.append(" or ".join(keys))
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    if heads := values.get("num_heads"):  # older files leave these two out
        values = {"num_kv_heads": heads, "head_dim": values["hidden_size"] // heads} | values
    theta, scaling = (None, None) if nemotron else read_rope(read)
    limit = read.get("time_step_limit", (0.0, math.inf))
    try:  # transformers: {"__float__": "Infinity"}
        low, high = (float(x["__float__"] if isinstance(x, dict) else x) for x in limit)
    except (TypeError, ValueError, KeyError):
        raise ValueError(f"time_step_limit is {limit!r}, expected two numbers") from None
    return ModelConfig(
        model_type=family,
        pattern=pattern,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_weight_in_fp32=nemotron,
        gated_mlp=not nemotron,
        qk_norm=family.startswith("qwen3"),
        qkv_bias=family == "qwen2",
        router="sigmoid" if nemotron else "softmax",
        time_step_limit=(low, high),
        pad_token_id=read.get("pad_token_id", 0),
        source=raw,
        **values,
    )


def read_pattern(raw: dict) -> str:
    """One character a block: nemotron_h writes it out, a layer of the others is two blocks."""
    layers = raw.get("num_hidden_layers")
    if raw["model_type"] == "nemotron_h":
        kinds = raw.get("layers_block_type", ())
        if unknown := set(kinds) - set(KINDS):
            raise ValueError(f"layers_block_type has {sorted(unknown)}, known are {list(KINDS)}")
        pattern = "".join(KINDS[x] for x in kinds) or raw.get("hybrid_override_pattern", "")
        if not pattern or layers not in (None, len(pattern)):
            raise ValueError(f"hybrid_override_pattern {pattern!r}, num_hidden_layers {layers}")
        return pattern
    if not isinstance(layers, int) or layers < 1:
        raise ValueError(f"num_hidden_layers is {layers!r}")
    # Qwen3-MoE: every step-th layer has experts, unless it is listed as dense.
    step, dense = raw.get("decoder_sparse_step", 1), raw.get("mlp_only_layers", ())
    sparse = raw["model_type"] == "qwen3_moe"
    if sparse and (not isinstance(step, int) or step < 1):
        raise ValueError(f"decoder_sparse_step is {step!r}, expected 1 or more")
    return "".join(
        "*E" if sparse and i not in dense and (i + 1) % step == 0 else "*-" for i in range(layers)
    )


def read_rope(raw: dict) -> tuple[float, dict | None]:
    """theta and Llama 3's scaling, from rope_parameters or from rope_theta and rope_scaling."""
    rope = {"rope_theta": raw.get("rope_theta", 10000.0)}
    rope |= raw.get("rope_scaling", {}) | raw.get("rope_parameters", {})
    kind = rope.get("rope_type", rope.get("type", "default"))  # "type" in older files
    lacks = set(LLAMA3) - set(rope) if kind == "llama3" else set()
    if kind not in ("default", "llama3") or lacks or rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"rotary embedding {rope}: only default and llama3 with {LLAMA3} work")
    return float(rope["rope_theta"]), {key: rope[key] for key in LLAMA3 if kind == "llama3"} or None


def config_json(config: ModelConfig, dtype: torch.dtype) -> dict:
    """config.json in published spelling; unknown keys of the file it was read from survive."""
    family, pattern, stops = config.model_type, config.pattern, config.eos_token_ids
    nemotron, layers = family == "nemotron_h", pattern[1::2]  # "E-E" of "*E*-*E"
    # One spelling of each key is written; auto_map names code files that are not copied.
    dropped = {"layers_block_type", "layer_types", "rope_parameters", "dtype", "auto_map"}
    dropped |= {key for *_, keys in FIELDS for key in keys}
    out = {key: x for key, x in config.source.items() if key not in dropped}
    out |= {"architectures": [CLASSES[family] + "ForCausalLM"], "model_type": family}
    out["torch_dtype"] = str(dtype).removeprefix("torch.")
    for kind, name, keys in FIELDS:
        if nemotron or kind in pattern + "-":  # qwen3_moe wants intermediate_size in any case
            out[keys[0 if nemotron else -1]] = getattr(config, name.strip("?"))
    if nemotron:  # of its mtp.* tensors none was read
        out |= {"hybrid_override_pattern": pattern, "num_nextn_predict_layers": 0}
        if config.time_step_limit != (0.0, math.inf):  # the default, for which JSON has no number
            out["time_step_limit"] = config.time_step_limit
    else:
        if not re.fullmatch(r"(\*[E-])+", pattern):
            raise ValueError(f"a {family} layer is *- or *E, this pattern is {pattern!r}")
        scaling = config.rope_scaling and {"rope_type": "llama3", **config.rope_scaling}
        out |= {"rope_theta": config.rope_theta, "rope_scaling": scaling}
    if family == "qwen3_moe":
        dense = [i for i, kind in enumerate(layers) if kind == "-"]
        out |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    out["num_hidden_layers"] = len(pattern) if nemotron else len(layers)
    # Where the source has no padding, none is invented: transformers never trains that embedding.
    if not config.source or out.get("pad_token_id") is not None:
        out["pad_token_id"] = config.pad_token_id
    out["eos_token_id"] = stops[0] if len(stops) == 1 else list(stops) or None
    return out
