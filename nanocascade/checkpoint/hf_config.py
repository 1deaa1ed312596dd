"""config.json of the five families to ModelConfig and back.

Every key of the file is used (FIELDS and STRUCTURE fill ModelConfig), has the one value that the
model computes (FIXED), or changes no number of ours (WITHOUT_EFFECT). Another key is refused by
name: another architecture may hide behind it. A Family holds what one model_type adds to these.
"""

import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from nanocascade.files import check_keys, check_types, present, read_json
from nanocascade.model.model import ModelConfig
from nanocascade.tokenizer.stops import read_stop_ids

# Fields of ModelConfig that the file gives, by the blocks that need them ("" = every model).
FIELDS = {
    "": "vocab_size hidden_size norm_eps max_position_embeddings tie_word_embeddings"
    " initializer_range",
    "*": "num_heads num_kv_heads head_dim",
    "-": "intermediate_size",
    "E": "num_experts num_experts_per_tok moe_intermediate_size norm_topk_prob",
    "M": "mamba_num_heads mamba_head_dim mamba_n_groups ssm_state_size conv_kernel chunk_size"
    " time_step_min time_step_max time_step_floor",
}
# Absent, these have ModelConfig's default, which is transformers' too, or read_values derives one.
OPTIONAL = set(
    "max_position_embeddings tie_word_embeddings initializer_range num_kv_heads head_dim chunk_size"
    " time_step_min time_step_max time_step_floor routed_scaling_factor n_group topk_group".split()
)
# Read by the functions below, since they need more than a look-up.
STRUCTURE = set(
    "model_type num_hidden_layers eos_token_id pad_token_id rope_theta rope_scaling rope_parameters"
    " partial_rotary_factor original_max_position_embeddings layer_types".split()
)
TYPES = dict.fromkeys(("rope_scaling", "rope_parameters"), dict)
TYPES |= dict.fromkeys(("layer_types", "layers_block_type", "mlp_only_layers"), list)
TYPES |= {"hybrid_override_pattern": str}
SILU = ("silu", "swish")
FIXED = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "hidden_act": SILU,
    "attention_dropout": (0,),
    "use_sliding_window": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
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


@dataclass
class Family:
    """One model_type: what its config.json has beside, or other than, the tables above."""

    name: str  # of transformers' classes
    blocks: str = "*-"  # the kinds of blocks that it may have
    expert_fields: str = ""
    keys: dict = field(default_factory=dict)  # field of ModelConfig -> key of another name
    synonyms: dict = field(default_factory=dict)  # other spelling of a key -> the one we write
    structure: str = ""  # added to STRUCTURE
    fixed: dict = field(default_factory=dict)  # added to FIXED
    without_effect: str = ""  # added to WITHOUT_EFFECT
    max_positions: int = 32768  # transformers' value where the file has none

    def __post_init__(self):
        names = {"num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads"}
        names |= {"norm_eps": "rms_norm_eps"} | self.keys
        # {field of ModelConfig: (its key, the block that needs it)}
        self.fields = {
            name: (names.get(name, name), block)
            for block in ("", *self.blocks)
            for name in (FIELDS[block] + self.expert_fields * (block == "E")).split()
        }
        self.used = STRUCTURE | {*self.structure.split()}
        self.used |= {key for key, _ in self.fields.values()}
        self.fixed = FIXED | self.fixed
        self.ignored = WITHOUT_EFFECT | {*self.without_effect.split()}


WINDOW = "sliding_window max_window_layers"  # without effect, as use_sliding_window is False
FAMILIES = {
    "llama": Family("Llama", max_positions=2048),
    "qwen2": Family(
        "Qwen2",
        # The biases are those of q, k and v; published files have no key for them.
        fixed={"attention_bias": (True,)},
        without_effect=WINDOW,
    ),
    "qwen3": Family("Qwen3", without_effect=WINDOW),
    "qwen3_moe": Family(
        "Qwen3Moe",
        blocks="*E-",
        synonyms={"num_local_experts": "num_experts"},
        structure="decoder_sparse_step mlp_only_layers",
        without_effect=WINDOW,
    ),
    "nemotron_h": Family(
        "NemotronH",
        blocks="ME*-",
        expert_fields=" shared_expert_intermediate_size routed_scaling_factor n_group topk_group",
        keys={
            "norm_eps": "layer_norm_epsilon",
            "num_experts": "n_routed_experts",
            "shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
            "mamba_n_groups": "n_groups",
        },
        synonyms={
            "norm_eps": "layer_norm_epsilon",
            "rms_norm_eps": "layer_norm_epsilon",
            "num_local_experts": "n_routed_experts",
            "attention_head_dim": "head_dim",
            "layer_types": "layers_block_type",
        },
        structure="hybrid_override_pattern layers_block_type time_step_limit",
        fixed={
            "mlp_hidden_act": ("relu2",),
            "mamba_hidden_act": SILU,
            "use_bias": (False,),
            "mamba_proj_bias": (False,),
            "use_conv_bias": (True,),
            "hidden_dropout": (0,),
            "residual_in_fp32": (False,),
            "n_shared_experts": (1,),
        },
        without_effect="expand mamba_ssm_cache_dtype use_mamba_kernels num_logits_to_keep"
        " num_nextn_predict_layers mtp_layers_block_type mtp_hybrid_override_pattern"
        " rescale_prenorm_residual moe_shared_expert_overlap",
        max_positions=4096,
    ),
}
KINDS = {
    "linear_attention": "M",
    "mamba": "M",
    "moe": "E",
    "full_attention": "*",
    "attention": "*",
    "mlp": "-",
}  # layers_block_type of transformers 5, new and old
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def load_config(path) -> ModelConfig:
    """ModelConfig of a directory's config.json, in published or in transformers-5 spelling."""
    path = Path(path)
    if (path / "adapter_config.json").exists():  # transformers would apply them
        raise ValueError(f"{path} holds adapters (adapter_config.json): merge them first")
    try:
        config = parse_config(read_json(path / "config.json"))
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'}: {error}") from None
    config.eos_token_ids = read_stop_ids(path)
    return config


def parse_config(raw: dict) -> ModelConfig:
    """ModelConfig of a config.json's object, without eos ids; what is wrong is named by its key."""
    model_type = raw.get("model_type")
    if model_type not in list(FAMILIES):  # a list, for what has no hash
        raise ValueError(f"model_type {model_type!r} is none of {', '.join(FAMILIES)}")
    family, nemotron = FAMILIES[model_type], model_type == "nemotron_h"
    given = present(raw)
    unify_spellings(family, given)
    check_types(model_type, given, TYPES)
    check_keys(model_type, given, family.used, family.ignored, family.fixed)
    pattern = read_pattern(given) if nemotron else read_layers(given)
    theta, scaling = (None, None) if nemotron else read_rope(given)
    pad = given.get("pad_token_id", 0)
    if type(pad) is not int:
        raise ValueError(f"pad_token_id is {pad!r}, expected a token id")
    return ModelConfig(
        model_type=model_type,
        pattern=pattern,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_weight_in_fp32=nemotron,
        gated_mlp=not nemotron,
        qk_norm=model_type.startswith("qwen3"),
        qkv_bias=model_type == "qwen2",
        router="sigmoid" if nemotron else "softmax",
        time_step_limit=read_time_step_limit(given),
        pad_token_id=pad,
        source=raw,
        **read_values(family, pattern, given),
    )


def unify_spellings(family: Family, given: dict) -> None:
    """Rename keys to the spelling that is written; two spellings must not disagree."""
    for other, key in family.synonyms.items():
        x = given.pop(other, given.get(key))
        if x is not None and given.setdefault(key, x) != x:
            raise ValueError(f"{key} {given[key]!r} and {other} {x!r} are one key, but differ")


def read_values(family: Family, pattern: str, given: dict) -> dict:
    """{field of ModelConfig: value} of the keys that FIELDS names, types checked."""
    types = {field.name: type(field.default) for field in fields(ModelConfig)}
    values, missing = {}, []
    for name, (key, block) in family.fields.items():
        want, x = types[name], given.get(key)
        # A size may be 0 where no block needs it; no shared expert has size 0.
        least = int(want is int and block in pattern and name != "shared_expert_intermediate_size")
        if x is None:
            missing += [key] if block in pattern and name not in OPTIONAL else []
        # type() and not isinstance(): true is no number
        elif type(x) not in ((int, float) if want is float else (want,)) or x < least:
            raise ValueError(f"{key} is {x!r}, expected {want.__name__}, at least {least}")
        else:
            values[name] = want(x)
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    if heads := values.get("num_heads"):  # older files leave these out
        values.setdefault("num_kv_heads", heads)
        values.setdefault("head_dim", values["hidden_size"] // heads)
    values.setdefault("max_position_embeddings", family.max_positions)
    return values


def read_pattern(given: dict) -> str:
    """The blocks of a nemotron_h, one character each: written out, or listed by kind."""
    kinds, written = given.get("layers_block_type", []), given.get("hybrid_override_pattern", "")
    if unknown := [x for x in kinds if x not in list(KINDS)]:
        raise ValueError(f"layers_block_type has {unknown}, known are {list(KINDS)}")
    pattern = "".join(KINDS[x] for x in kinds) or written
    layers = given.get("num_hidden_layers", len(pattern))
    if not pattern or written not in ("", pattern) or layers != len(pattern):
        raise ValueError(
            f"hybrid_override_pattern {written!r}, layers_block_type {kinds} and"
            f" num_hidden_layers {layers} do not describe one list of blocks"
        )
    return pattern


def read_layers(given: dict) -> str:
    """The blocks of the other families: a layer is attention and an MLP, `*-`, or experts, `*E`."""
    layers = given.get("num_hidden_layers")
    if not isinstance(layers, int) or layers < 1:
        raise ValueError(f"num_hidden_layers is {layers!r}")
    types = given.get("layer_types", ["full_attention"] * layers)
    if types != ["full_attention"] * layers:
        raise ValueError(f"layer_types {types} is not supported, only {layers} x 'full_attention'")
    if given["model_type"] != "qwen3_moe":
        return "*-" * layers
    # Every step-th layer has experts, unless it is listed as dense.
    step, dense = given.get("decoder_sparse_step", 1), given.get("mlp_only_layers", [])
    if type(step) is not int or step < 1:
        raise ValueError(f"decoder_sparse_step is {step!r}, expected 1 or more")
    if not all(type(i) is int and 0 <= i < layers for i in dense):
        raise ValueError(f"mlp_only_layers is {dense}, expected some of {layers} layers")
    return "".join("*-" if i in dense or (i + 1) % step else "*E" for i in range(layers))


def read_rope(given: dict) -> tuple[float, dict | None]:
    """theta and Llama 3's scaling. As in transformers rope_scaling, where it is given, replaces
    rope_parameters, and keys beside the object are its defaults, but for llama3's
    original_max_position_embeddings, which wins there."""
    rope = present(given.get("rope_scaling") or given.get("rope_parameters") or {})
    kind = rope.pop("rope_type", rope.pop("type", "default"))  # "type" in older files
    theta = rope.pop("rope_theta", given.get("rope_theta", 10000.0))
    partial = rope.pop("partial_rotary_factor", given.get("partial_rotary_factor", 1))
    wanted = {"default": (), "llama3": LLAMA3}.get(str(kind))
    if kind == "llama3":
        longest = LLAMA3[-1]
        inside = rope.get(longest, given.get("max_position_embeddings"))
        rope[longest] = given.get(longest, inside)
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
    """config.json in published spelling; what has no effect survives from the file it came from."""
    family, pattern, stops = FAMILIES[config.model_type], config.pattern, config.eos_token_ids
    surviving = {"pad_token_id", *family.fixed, *family.ignored}
    surviving -= {"dtype", "auto_map"}  # auto_map names code that is not copied
    out = {key: x for key, x in config.source.items() if key in surviving}
    out |= {"architectures": [family.name + "ForCausalLM"], "model_type": config.model_type}
    out["torch_dtype"] = str(dtype).removeprefix("torch.")
    out |= {key: getattr(config, field) for field, (key, _) in family.fields.items()}
    if config.model_type == "nemotron_h":  # of its mtp.* tensors none was read
        out |= {"hybrid_override_pattern": pattern, "num_nextn_predict_layers": 0}
        out["num_hidden_layers"] = len(pattern)
        if config.time_step_limit != (0.0, math.inf):  # the default, for which JSON has no number
            out["time_step_limit"] = config.time_step_limit
    else:
        if not re.fullmatch(r"(\*[E-])+", pattern):
            raise ValueError(f"a layer of this family is *- or *E, this pattern is {pattern!r}")
        scaling = config.rope_scaling and {"rope_type": "llama3", **config.rope_scaling}
        out |= {"rope_theta": config.rope_theta, "rope_scaling": scaling}
        out["num_hidden_layers"] = len(pattern) // 2
    if config.model_type == "qwen3_moe":
        dense = [i for i, kind in enumerate(pattern[1::2]) if kind == "-"]  # "E-E" of "*E*-*E"
        out |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    if not config.source:  # else as there: transformers never trains the embedding of padding
        out["pad_token_id"] = config.pad_token_id
    out["eos_token_id"] = stops[0] if len(stops) == 1 else list(stops) or None
    return out
