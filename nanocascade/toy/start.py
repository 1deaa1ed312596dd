"""The toy's tokenizer, built from its own words, and its hybrid model of a million parameters."""

import re
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from nanocascade.files import write_json_atomic
from nanocascade.model.model import ModelConfig
from nanocascade.tokenizer.chat import MARKUP, TEMPLATE


def build_toy_tokenizer(path, words=()):
    """Write a tokenizer to path: 256 bytes (id = byte), one token for each word, and the markup.

    words: any strings, also " the" or ".\\n"; the longest match wins. A word that begins or ends
    with a letter or digit matches at word boundaries only: "the" does not match in "then". Any text
    round-trips, and a digit is one token unless it is part of a word.
    """
    # GPT-2's byte-to-character map: visible bytes stay, the others are U+0100 and up.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    others = (char for char in alphabet if ord(char) > 255)
    chars = [chr(byte) if chr(byte) in alphabet else next(others) for byte in range(256)]
    vocab = {char: byte for byte, char in enumerate(chars)}
    words = sorted({*words} - {""}, key=lambda word: (-len(word), word))
    for word in words:
        vocab.setdefault("".join(chars[byte] for byte in word.encode()), len(vocab))
    # Words are split off first and looked up whole (ignore_merges); other text becomes bytes.
    cut = "|".join(
        r"(?<!\w)" * w[0].isalnum() + re.escape(w) + r"(?!\w)" * w[-1].isalnum() for w in words
    )
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(cut or "(?!)"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ("<|endoftext|>", *MARKUP[:6])
    tokenizer.add_special_tokens([AddedToken(x, normalized=False, special=True) for x in special])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    write_json_atomic(Path(path) / "tokenizer_config.json", config)
    tokenizer.save(str(Path(path) / "tokenizer.json"))


def toy_model_config(vocab_size: int, eos_ids) -> ModelConfig:
    """A real hybrid of a million parameters: Mamba-2, attention, 8 experts and a shared one."""
    return ModelConfig(
        vocab_size=-(-vocab_size // 8) * 8,
        hidden_size=128,
        pattern="MEM*E",
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
        mamba_num_heads=4,
        mamba_head_dim=32,
        ssm_state_size=32,
        chunk_size=32,
        max_position_embeddings=1024,
        eos_token_ids=tuple(eos_ids),
    )
