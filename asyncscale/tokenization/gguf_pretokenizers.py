"""How text is split into words before byte-level BPE, by the name that a GGUF file gives in tokenizer.ggml.pre.

The names and expressions are part of the format: LLAMA_VOCAB_PRE_TYPE_* in llama.cpp's src/llama-vocab.cpp. Where that
file quotes the original tokenizer's expression and a rewritten one, the original stands here.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

logger = logging.getLogger(__name__)

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED_WORD = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
)


class PreTokenization(msgspec.Struct, frozen=True):
    """What one such name means.

    patterns: each splits further what the ones before it left. ignore_merges: a word in the vocabulary is one token.
    add_bos: whether a prompt begins with the BOS token where the file does not say. nfc: normalize text to NFC first.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False

    def build(self) -> PreTokenizer:
        from tokenizers import Regex
        from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

        splits = [Split(Regex(pattern), behavior="isolated") for pattern in self.patterns]
        return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])


_DEFAULT = PreTokenization((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))
_GPT2_STYLE = PreTokenization((_GPT2,))
_SINGLE_DIGITS = PreTokenization((r"\p{N}", _GPT2))
_LLAMA3 = PreTokenization(
    (rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}",), ignore_merges=True, add_bos=True
)
_QWEN2 = PreTokenization((rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}",), nfc=True)
_TEKKEN = PreTokenization(
    (rf"{_CASED_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",),
    ignore_merges=True,
    add_bos=True,
)

_BY_NAME = {
    "default": _DEFAULT,
    **dict.fromkeys(("gpt-2", "gpt2", "mpt", "olmo", "jais", "phi-2"), _GPT2_STYLE),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _SINGLE_DIGITS
    ),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    "tekken": _TEKKEN,
}


def pre_tokenization(name: object) -> PreTokenization:
    """The one that a file names; the default, with a warning, for a name that is not known."""
    if name not in _BY_NAME:
        logger.warning(
            "the pre-tokenizer %r of the GGUF file is not known; the default one may split text differently", name
        )
        return _DEFAULT
    return _BY_NAME[str(name)]
