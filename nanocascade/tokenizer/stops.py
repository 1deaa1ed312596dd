"""generation_config.json: the ids that end a response, and what else may stand there."""

from pathlib import Path

from nanocascade.files import check_keys, present, read_json

# Recommendations for sampling and limits, where our own flags decide (training samples from the
# model's own distribution); outputs, caches and speculative decoding, which change no distribution.
WITHOUT_EFFECT = set(
    "_from_model_config transformers_version bos_token_id pad_token_id decoder_start_token_id"
    " do_sample temperature top_k top_p top_h min_p typical_p epsilon_cutoff eta_cutoff"
    " repetition_penalty encoder_repetition_penalty length_penalty diversity_penalty"
    " no_repeat_ngram_size encoder_no_repeat_ngram_size penalty_alpha dola_layers low_memory"
    " num_beams num_beam_groups num_return_sequences early_stopping max_length max_new_tokens"
    " min_length min_new_tokens max_time remove_invalid_values renormalize_logits trust_remote_code"
    " use_cache cache_implementation cache_config max_cache_len return_legacy_cache compile_config"
    " disable_compile continuous_batching_config prefill_chunk_size return_dict_in_generate"
    " output_attentions output_hidden_states output_logits output_scores is_assistant use_mtp"
    " num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold"
    " assistant_early_exit assistant_ensemble_weight assistant_lookbehind target_lookbehind"
    " prompt_lookup_num_tokens max_matching_ngram_size speculation_type chat_format"
    " max_window_size".split()
)
FIXED = {"token_healing": (False,), "guidance_scale": (1,)}


def read_stop_ids(path) -> tuple[int, ...]:
    """Ids that end a response: generation_config.json's, which often lists more, or config.json's.

    Raises ValueError for a key of generation_config.json that we do not know or cannot follow.
    """
    file, stops = Path(path) / "generation_config.json", None
    if file.exists():
        given = present(read_json(file))
        check_keys(str(file), given, {"eos_token_id"}, WITHOUT_EFFECT, FIXED)
        stops = given.get("eos_token_id")
    if stops is None and (Path(path) / "config.json").exists():
        file = Path(path) / "config.json"
        stops = read_json(file).get("eos_token_id")
    stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    if not all(type(x) is int and x >= 0 for x in stops):
        raise ValueError(f"{file}: eos_token_id is {stops}, expected token ids")
    return tuple(dict.fromkeys(stops))
