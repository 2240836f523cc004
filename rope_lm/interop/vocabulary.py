"""A run's tokenizer in the files that transformers.AutoTokenizer reads."""

import json
from typing import Any

from rope_lm.data.tokenizer import BPE, Bytes, Tokenizer, byte_letters

SEPARATOR, MASK = "<|endoftext|>", "<|mask|>"


def files(coder: Tokenizer, length: int, masked: bool) -> dict[str, dict[str, Any]]:
    """Return tokenizer.json and tokenizer_config.json, for texts of `length` tokens; no file for SentencePiece.

    The separator is <|endoftext|>. A `masked` model has one more token, the mask.
    """
    import tokenizers

    if isinstance(coder, BPE):
        spelled = tokenizers.Tokenizer.from_str(coder.model.decode())
    elif isinstance(coder, Bytes):
        byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
        spelled = tokenizers.Tokenizer(tokenizers.models.BPE(byte_of, []))
        spelled.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    else:
        return {}
    spelled.decoder = tokenizers.decoders.ByteLevel()
    special = {"eos_token": SEPARATOR} | ({"mask_token": MASK} if masked else {})
    spelled.add_special_tokens(list(special.values()))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    return {"tokenizer.json": json.loads(spelled.to_str()), "tokenizer_config.json": config}
