"""A tokenizer of any vocabulary size, and the words a load generator may safely use.

A model that is known only by its `config.json` has no tokenizer. Serving it without one would skip the
tokenising and detokenising that a real deployment pays for, so one is generated: a byte-level BPE whose
tokens are the bytes, then every word of one to four letters with a space before it, reached by real merges.
"""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Iterator, Mapping
from typing import Any

# The space as byte-level BPE (GPT-2's table) and SentencePiece write it.
SPACE_MARKS = ("Ġ", "▁")
END_OF_TEXT = "<|endoftext|>"
_BYTE_TOKENS = 256
_WORD = re.compile(r"[a-z]{2,12}\Z")


def _byte_symbols() -> list[str]:
    """The printable stand-ins of the 256 bytes in GPT-2's byte-level BPE, in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_in = {byte: chr(byte) for byte in printable}
    spare = itertools.count(256)
    return [stand_in[byte] if byte in stand_in else chr(next(spare)) for byte in range(_BYTE_TOKENS)]


def _merges() -> Iterator[tuple[str, str]]:
    """Merges in rank order: space+letter, then every longer prefix, so each word is one token."""
    shorter = [SPACE_MARKS[0]]
    while True:
        longer = []
        for prefix in shorter:
            for letter in string.ascii_lowercase:
                yield prefix, letter
                longer.append(prefix + letter)
        shorter = longer


def build_tokenizer(vocab_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of `tokenizer.json` and `tokenizer_config.json` for a vocabulary of `vocab_size` tokens.

    Raises ValueError when the vocabulary cannot hold the bytes, the end-of-text token and some words.
    """
    words = vocab_size - _BYTE_TOKENS - 1
    if words < 100:
        raise ValueError(f"a vocabulary of {vocab_size} tokens is too small for a byte-level tokenizer (at least 357)")
    merges = list(itertools.islice(_merges(), words))
    tokens = [*_byte_symbols(), *(a + b for a, b in merges), END_OF_TEXT]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": vocab_size - 1,
                "content": END_OF_TEXT,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [f"{a} {b}" for a, b in merges],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "model_max_length": 10**9,
        "clean_up_tokenization_spaces": False,
    }
    return tokenizer, config


def ids_of(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Words that are one token each when a space stands before them, from a `tokenizer.json`, with that token's id.

    Plain lower-case words only: the pre-tokenizers in use split before such a word and keep it whole, so a
    text of n of them is n tokens (and whatever the tokenizer adds at the start). Sorted, so that the same
    tokenizer always gives the same order. Raises ValueError when there are too few to make unique prompts.
    """
    vocab = tokenizer.get("model", {}).get("vocab", {})
    # A list of pieces with their scores, or ids by name.
    named = vocab.items() if isinstance(vocab, Mapping) else ((entry[0], at) for at, entry in enumerate(vocab))
    found = {
        name[1:]: int(number)
        for name, number in named
        if isinstance(name, str) and name[:1] in SPACE_MARKS and _WORD.match(name[1:])
    }
    if len(found) < 100:
        raise ValueError(f"the tokenizer holds only {len(found)} plain words that are one token each; 100 are needed")
    return dict(sorted(found.items()))


def words_of(tokenizer: Mapping[str, Any]) -> list[str]:
    """The words of `ids_of`."""
    return list(ids_of(tokenizer))
