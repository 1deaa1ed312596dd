"""tokenizer.json, tokenizer_config.json and chat templates of a directory, read and checked."""

import json
from pathlib import Path

import tokenizers

from nanocascade.files import check_keys, check_types, present
from nanocascade.tokenizer.chat import MARKUP

# tokenizer_config.json: what we read, ...
NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
USED = {"chat_template", "added_tokens_decoder", *NAMES}
# ... what must have the value that our encoding has, ...
FIXED = dict.fromkeys(("split_special_tokens", "do_lower_case", "add_prefix_space"), (False,))
# ... and what changes no id of a chat: names, lengths, padding, the classes and settings from which
# transformers made tokenizer.json, tokens added around plain texts, the spelling of decoded text.
WITHOUT_EFFECT = set(
    "tokenizer_class name_or_path processor_class auto_map backend is_local use_fast from_slow"
    " tokenizer_file vocab_file merges_file special_tokens_map_file trust_remote_code"
    " local_files_only"
    " model_max_length max_length max_len padding padding_side truncation truncation_side stride"
    " truncation_strategy pad_to_multiple_of pad_token_type_id model_input_names"
    " model_specific_special_tokens additional_special_tokens extra_special_tokens init_inputs"
    " add_bos_token add_eos_token legacy sp_model_kwargs errors fix_mistral_regex verbose"
    " clean_up_tokenization_spaces spaces_between_special_tokens use_default_system_prompt"
    " trim_offsets response_schema response_template unk_id".split()
)


def read_spec(path, spec: dict, stops) -> tokenizers.Tokenizer:
    """The library's tokenizer of a tokenizer.json. Its added tokens become special in spec, too,
    where they are markup or end a response: they are never made from a text."""
    spec |= {"truncation": None, "padding": None}
    try:
        for token in spec["added_tokens"]:
            # Qwen3 declares <think> an ordinary token.
            token["special"] |= token["content"] in MARKUP or token["id"] in stops
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path}/tokenizer.json is damaged: {error!r}") from None
    if spec["model"].get("dropout"):
        raise ValueError(f"{path}/tokenizer.json: dropout {spec['model']['dropout']} is random")
    tokenizer.encode_special_tokens = True
    return tokenizer


def check_config(path, config: dict, added: list[dict]) -> None:
    """Refuse what tokenizer_config.json says beyond tokenizer.json, or what we do not know."""
    file, given = f"{path}/tokenizer_config.json", present(config)
    check_keys(file, given, USED, WITHOUT_EFFECT, FIXED)
    check_types(file, given, {"added_tokens_decoder": dict})
    known = {str(token["id"]): token for token in added}
    for number, token in given.get("added_tokens_decoder", {}).items():
        ours, compared = known.get(number, {}), ("content", "lstrip", "rstrip", "single_word")
        if type(token) is not dict or any(
            ours.get(x) != token.get(x, ours.get(x)) for x in compared
        ):
            raise ValueError(
                f"{file}: added_tokens_decoder {number} is {token}, tokenizer.json has {ours}"
            )


def read_templates(path, config: dict, files: dict) -> tuple[str, str]:
    """(template, template of conversations with tools): one, or two of those in a list."""
    if (Path(path) / "additional_chat_templates").exists():
        raise ValueError(f"{path}/additional_chat_templates is not supported: choose one template")
    template = files.get("chat_template.jinja") or config.get("chat_template") or ""
    if isinstance(template, str):
        return template, template
    try:
        several = {x["name"]: x["template"] + "" for x in template}
    except (TypeError, KeyError):
        what = f"chat_template is {template!r:.99}, expected a text, or a list of them with names"
        raise ValueError(f"{path}: {what}") from None
    if "default" not in several:
        raise ValueError(f"{path}: of the chat templates {[*several]} none is the default")
    return several["default"], several.get("tool_use", several["default"])
