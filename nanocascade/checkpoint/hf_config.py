"""config.json of the five families to ModelConfig and back.

Every key of the file is in one of three lists: FIELDS and STRUCTURE fill ModelConfig, FIXED keys
must have the value that the model computes, and WITHOUT_EFFECT keys change no number of ours. A key
in none of them is refused by name: another architecture may hide behind it. null means absent.
"""

import math
import re
from dataclasses import fields
from pathlib import Path

import torch

from nanocascade.files import read_json
from nanocascade.model.model import ModelConfig
from nanocascade.tokenizer.stops import read_stop_ids

CLASSES = {
    "nemotron_h": "NemotronH",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
    "llama": "Llama",
}
# Fields of ModelConfig by the blocks that need them ("" = every model). OPTIONAL ones may be
# absent; ModelConfig's default then holds, which is transformers' too, or read_values derives one.
FIELDS = {
    "": "vocab_size hidden_size norm_eps max_position_embeddings tie_word_embeddings"
    " initializer_range",
    "*": "num_heads num_kv_heads head_dim",
    "-": "intermediate_size",
    "E": "num_experts num_experts_per_tok moe_intermediate_size norm_topk_prob",
    "M": "mamba_num_heads mamba_head_dim mamba_n_groups ssm_state_size conv_kernel chunk_size"
    " time_step_min time_step_max time_step_floor",
}
NEMOTRON_EXPERTS = "shared_expert_intermediate_size routed_scaling_factor n_group topk_group"
OPTIONAL = set(
    "max_position_embeddings tie_word_embeddings initializer_range num_kv_heads head_dim chunk_size"
    " time_step_min time_step_max time_step_floor routed_scaling_factor n_group topk_group".split()
)
BLOCKS = {"nemotron_h": "ME*-", "qwen2": "*-", "qwen3": "*-", "qwen3_moe": "*E-", "llama": "*-"}
# The keys of config.json whose names differ from ModelConfig's, and other spellings of a key.
KEYS = {
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
}
NEMOTRON_KEYS = {
    "norm_eps": "layer_norm_epsilon",
    "num_experts": "n_routed_experts",
    "shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
    "mamba_n_groups": "n_groups",
}
SYNONYMS = {
    "qwen3_moe": {"num_local_experts": "num_experts"},
    "nemotron_h": {
        "norm_eps": "layer_norm_epsilon",
        "rms_norm_eps": "layer_norm_epsilon",
        "num_local_experts": "n_routed_experts",
        "attention_head_dim": "head_dim",
        "layer_types": "layers_block_type",
    },
}
# transformers' value where a config.json leaves max_position_embeddings out.
POSITIONS = {"nemotron_h": 4096, "llama": 2048}
KINDS = {
    "linear_attention": "M",
    "mamba": "M",
    "moe": "E",
    "full_attention": "*",
    "attention": "*",
    "mlp": "-",
}  # layers_block_type of transformers 5, new and old
# Read by the functions below, since they need more than a look-up.
STRUCTURE = set(
    "model_type num_hidden_layers eos_token_id pad_token_id rope_theta rope_scaling rope_parameters"
    " partial_rotary_factor original_max_position_embeddings layer_types".split()
)
STRUCTURE_OF = {
    "nemotron_h": {"hybrid_override_pattern", "layers_block_type", "time_step_limit"},
    "qwen3_moe": {"decoder_sparse_step", "mlp_only_layers"},
}
SILU = ("silu", "swish")
# Values that the model computes with. Another value in config.json is another model.
FIXED = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "hidden_act": SILU,
    "attention_dropout": (0,),
    "use_sliding_window": (False,),
    "sliding_window": (None,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "quantization_config": (None,),
}
FIXED_OF = {
    "qwen2": {"attention_bias": (True,)},  # of q, k and v, with no key for it in published files
    "nemotron_h": {
        "hidden_act": SILU,
        "mlp_hidden_act": ("relu2",),
        "mamba_hidden_act": SILU,
        "use_bias": (False,),
        "mamba_proj_bias": (False,),
        "use_conv_bias": (True,),
        "hidden_dropout": (0,),
        "residual_in_fp32": (False,),
        "n_shared_experts": (1,),
        "moe_latent_size": (None,),
    },
}
# Names, numeric types and task heads; flags of transformers' outputs, caches and kernels; splits
# and chunks that compute the same; its auxiliary loss and multi-token prediction, which we do not
# train; defaults of its generate() in files of version 4, where our sampling flags decide.
WITHOUT_EFFECT = set(
    "_name_or_path architectures auto_map dtype torch_dtype transformers_version _commit_hash"
    " attn_implementation _attn_implementation _attn_implementation_autoset"
    " _attn_implementation_internal unsloth_version unsloth_fixed model_name"
    " id2label label2id num_labels problem_type finetuning_task task_specific_params"
    " tokenizer_class prefix bos_token_id sep_token_id decoder_start_token_id is_decoder"
    " cross_attention_hidden_size tie_encoder_decoder tf_legacy_loss torchscript use_bfloat16"
    " output_attentions output_hidden_states output_router_logits return_dict use_return_dict"
    " use_cache pretraining_tp chunk_size_feed_forward router_aux_loss_coef"
    " max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty"
    " temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size"
    " encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores"
    " return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values"
    " exponential_decay_length_penalty suppress_tokens begin_suppress_tokens".split()
)
WINDOW = {"sliding_window", "max_window_layers"}  # nothing, once use_sliding_window is False
WITHOUT_EFFECT_OF = {
    "qwen2": WINDOW,
    "qwen3": WINDOW,
    "qwen3_moe": WINDOW,
    "nemotron_h": set(
        "expand mamba_ssm_cache_dtype use_mamba_kernels num_logits_to_keep"
        " num_nextn_predict_layers mtp_layers_block_type mtp_hybrid_override_pattern"
        " rescale_prenorm_residual moe_shared_expert_overlap".split()
    ),
}
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def load_config(path) -> ModelConfig:
    """ModelConfig of a directory's config.json, in published or in transformers-5 spelling."""
    path = Path(path)
    try:
        config = parse_config(read_json(path / "config.json"))
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'}: {error}") from None
    config.eos_token_ids = read_stop_ids(path)
    return config


def parse_config(raw: dict) -> ModelConfig:
    """ModelConfig of a config.json's object, without eos ids; what is wrong is named by its key."""
    family = raw.get("model_type")
    if family not in CLASSES:
        raise ValueError(f"model_type {family!r} is none of {', '.join(CLASSES)}")
    given = one_spelling(family, {key: x for key, x in raw.items() if x is not None})
    check_keys(family, given)
    nemotron = family == "nemotron_h"
    pattern = read_pattern(given)
    values = read_values(family, pattern, given)
    theta, scaling = (None, None) if nemotron else read_rope(given)
    pad = given.get("pad_token_id", 0)
    if type(pad) is not int:
        raise ValueError(f"pad_token_id is {pad!r}, expected a token id")
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
        time_step_limit=read_time_step_limit(given),
        pad_token_id=pad,
        source=raw,
        **values,
    )


def fields_of(family: str) -> dict[str, tuple[str, str]]:
    """{field of ModelConfig: (its key, the block that needs it)} of a family."""
    nemotron = family == "nemotron_h"
    names = KEYS | (NEMOTRON_KEYS if nemotron else {})
    groups = [(block, FIELDS[block]) for block in ("", *BLOCKS[family])]
    groups += [("E", NEMOTRON_EXPERTS)] if nemotron else []
    return {x: (names.get(x, x), block) for block, group in groups for x in group.split()}


def one_spelling(family: str, given: dict) -> dict:
    """The keys in the spelling that is written; two spellings must not disagree."""
    given = dict(given)
    for other, key in SYNONYMS.get(family, {}).items():
        if other in given and given.setdefault(key, given[other]) != given[other]:
            raise ValueError(
                f"{key} {given[key]!r} and {other} {given[other]!r} are one key, but differ"
            )
        given.pop(other, None)
    return given


def check_keys(family: str, given: dict) -> None:
    """Raise ValueError for a key that we do not know, or whose value the model cannot follow."""
    fixed = FIXED | FIXED_OF.get(family, {})
    ignored = WITHOUT_EFFECT | WITHOUT_EFFECT_OF.get(family, set())
    known = {key for key, _ in fields_of(family).values()}
    known |= STRUCTURE | STRUCTURE_OF.get(family, set()) | set(fixed) | ignored
    for key, allowed in fixed.items():
        if key in given and key not in ignored and given[key] not in allowed:
            raise ValueError(f"{key} {given[key]!r} is not supported, only {allowed[0]!r}")
    if unknown := sorted(set(given) - known):
        raise ValueError(
            f"unknown key {', '.join(unknown)} for a {family}: if the model does not depend on it,"
            " delete it from the file"
        )


def read_values(family: str, pattern: str, given: dict) -> dict:
    """{field of ModelConfig: value} of the keys that FIELDS names, types checked."""
    types = {field.name: type(field.default) for field in fields(ModelConfig)}
    values, missing = {}, []
    for name, (key, block) in fields_of(family).items():
        if key not in given:
            missing += [key] if block in pattern and name not in OPTIONAL else []
            continue
        want, x = types[name], given[key]
        # type() and not isinstance(): true is no number
        if type(x) not in ((int, float) if want is float else (want,)) or x < 0:
            raise ValueError(f"{key} is {x!r}, expected {want.__name__}, not negative")
        values[name] = want(x)
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    if heads := values.get("num_heads"):  # older files leave these out
        values.setdefault("num_kv_heads", heads)
        values.setdefault("head_dim", values["hidden_size"] // heads)
    values.setdefault("max_position_embeddings", POSITIONS.get(family, 32768))
    return values


def read_pattern(given: dict) -> str:
    """One character a block: nemotron_h writes it out, a layer of the others is two blocks."""
    layers, kinds = given.get("num_hidden_layers"), given.get("layers_block_type", ())
    if given["model_type"] == "nemotron_h":
        if unknown := set(kinds) - set(KINDS):
            raise ValueError(f"layers_block_type has {sorted(unknown)}, known are {list(KINDS)}")
        written = given.get("hybrid_override_pattern", "")
        pattern = "".join(KINDS[x] for x in kinds) or written
        if not pattern or written not in ("", pattern) or layers not in (None, len(pattern)):
            raise ValueError(
                f"hybrid_override_pattern {written!r}, layers_block_type {list(kinds)} and"
                f" num_hidden_layers {layers} do not describe one list of blocks"
            )
        return pattern
    if not isinstance(layers, int) or layers < 1:
        raise ValueError(f"num_hidden_layers is {layers!r}")
    types = given.get("layer_types", ["full_attention"] * layers)
    if types != ["full_attention"] * layers:
        raise ValueError(f"layer_types {types} is not supported, only {layers} x 'full_attention'")
    # Qwen3-MoE: every step-th layer has experts, unless it is listed as dense.
    step, dense = given.get("decoder_sparse_step", 1), given.get("mlp_only_layers", ())
    sparse = given["model_type"] == "qwen3_moe"
    if sparse and (type(step) is not int or step < 1):
        raise ValueError(f"decoder_sparse_step is {step!r}, expected 1 or more")
    if sparse and not set(dense) <= set(range(layers)):
        raise ValueError(f"mlp_only_layers is {dense}, expected some of {layers} layers")
    return "".join(
        "*E" if sparse and i not in dense and (i + 1) % step == 0 else "*-" for i in range(layers)
    )


def read_rope(given: dict) -> tuple[float, dict | None]:
    """theta and Llama 3's scaling. As in transformers rope_scaling, where it is given, replaces
    rope_parameters, and keys beside the object are its defaults, but for llama3's
    original_max_position_embeddings, which wins there."""
    rope = {
        key: x
        for key, x in (given.get("rope_scaling") or given.get("rope_parameters") or {}).items()
        if x is not None
    }
    kind = rope.pop("rope_type", rope.get("type", "default"))  # "type" in older files
    rope.pop("type", None)
    theta = rope.pop("rope_theta", given.get("rope_theta", 10000.0))
    partial = rope.pop("partial_rotary_factor", given.get("partial_rotary_factor", 1))
    if kind == "llama3":
        here, beside = LLAMA3[-1], given.get(LLAMA3[-1])
        longest = given.get("max_position_embeddings")
        rope[here] = beside or rope.get(here) or longest
    wanted = {"default": (), "llama3": LLAMA3}.get(kind)
    numbers = [theta, *rope.values()]
    if (
        wanted is None
        or set(rope) != set(wanted)
        or partial != 1
        or not all(type(x) in (int, float) and x > 0 for x in numbers)
        or rope.get("low_freq_factor", 0) == rope.get("high_freq_factor", 1)
    ):
        rope |= {"rope_type": kind, "rope_theta": theta, "partial_rotary_factor": partial}
        raise ValueError(f"rotary embedding {rope}: only default and llama3 with {LLAMA3} work")
    return float(theta), rope or None


def read_time_step_limit(given: dict) -> tuple[float, float]:
    """The range that dt is clamped to; transformers writes infinity as {"__float__": "Infinity"}"""
    limit = given.get("time_step_limit", (0.0, math.inf))
    try:
        low, high = (float(x["__float__"] if isinstance(x, dict) else x) for x in limit)
    except (TypeError, ValueError, KeyError):
        raise ValueError(f"time_step_limit is {limit!r}, expected two numbers") from None
    return low, high


def config_json(config: ModelConfig, dtype: torch.dtype) -> dict:
    """config.json in published spelling; keys without effect of the file it came from survive."""
    family, pattern, stops = config.model_type, config.pattern, config.eos_token_ids
    nemotron, layers = family == "nemotron_h", pattern[1::2]  # "E-E" of "*E*-*E"
    # One spelling of each key is written; auto_map names code files that are not copied.
    dropped = {"layers_block_type", "layer_types", "rope_parameters", "dtype", "auto_map"}
    dropped |= {"original_max_position_embeddings", "partial_rotary_factor"}
    dropped |= set(SYNONYMS.get(family, ()))
    out = {key: x for key, x in config.source.items() if key not in dropped}
    out |= {"architectures": [CLASSES[family] + "ForCausalLM"], "model_type": family}
    out["torch_dtype"] = str(dtype).removeprefix("torch.")
    out |= {key: getattr(config, field) for field, (key, _) in fields_of(family).items()}
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
