"""The tokenizer that a GGUF file carries in its metadata.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#tokenizer; their meaning: llama.cpp's
src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from asyncscale.checkpoint.gguf_file import GGUFFile
from asyncscale.errors import ModelLoadError
from asyncscale.tokenization.chat import ChatTemplate
from asyncscale.tokenization.gguf_pretokenizers import pre_tokenization
from asyncscale.tokenization.tokenizer import TokenizerParts

if TYPE_CHECKING:
    import tokenizers

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # of tokenizer.ggml.token_type
_SPACE = "\u2581"  # SentencePiece writes a space so
_NAMED_TOKENS = {
    "bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "sep_token": "seperator", "pad_token": "padding",
    "cls_token": "cls", "mask_token": "mask",
}  # fmt: skip


def read_gguf_tokenizer(path: str) -> TokenizerParts:
    """Raises ModelLoadError when the file has no tokenizer, or one of a kind that is not supported."""
    metadata = GGUFFile(path).metadata
    try:
        return _Vocabulary(metadata).build()
    except _UnusableError as error:
        raise ModelLoadError(f"the tokenizer of {path} cannot be used: {error}") from error


class _UnusableError(Exception):
    """Why, without the file's name."""


class _Vocabulary:
    """The tokenizer part of a file's metadata."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata
        self.tokens: list[str] = self._list("tokens", str)
        if not self.tokens:
            raise _UnusableError("it has no tokens")
        self.ids = {token: token_id for token_id, token in enumerate(self.tokens)}
        self.types: list[int] = self._list("token_type", int) or [1] * len(self.tokens)
        if len(self.types) != len(self.tokens):
            raise _UnusableError(f"it has {len(self.tokens)} tokens, but {len(self.types)} token types")

    def build(self) -> TokenizerParts:
        kind = self.get("model")
        if kind == "gpt2":
            backend, add_bos = _byte_level_bpe(self)
        elif kind == "llama":
            backend, add_bos = _sentence_piece(self), True
        else:
            raise _UnusableError(
                f"its kind is {kind!r}; supported are 'gpt2' (byte-level BPE) and 'llama' (SentencePiece)"
            )
        _add_special_tokens(backend, self)
        named = {name: token for name, key in _NAMED_TOKENS.items() if (token := self.token(f"{key}_token_id"))}
        _add_bos_eos(
            backend,
            named.get("bos_token") if self.get("add_bos_token", add_bos) else None,
            named.get("eos_token") if self.get("add_eos_token", False) else None,
        )
        template = self._metadata.get("tokenizer.chat_template")
        eos = (self.token(f"{key}_token_id") for key in ("eos", "eot", "eom"))
        return TokenizerParts(
            backend=backend,
            chat_template=ChatTemplate(template, named) if isinstance(template, str) else None,
            eos_token_ids=frozenset(self.ids[token] for token in eos if token is not None),
            generation_defaults={},
        )

    def get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{key}", default)

    def token(self, key: str) -> str | None:
        """The token whose id is under `key`; None where there is none (some writers put -1 or 2**32 - 1)."""
        token_id = self.get(key)
        return self.tokens[token_id] if isinstance(token_id, int) and 0 <= token_id < len(self.tokens) else None

    def merges(self) -> list[tuple[str, str]]:
        return [(left, right) for left, _, right in (merge.partition(" ") for merge in self._list("merges", str))]

    def scores(self) -> list[float]:
        scores: list[float] = self._list("scores", float)
        if len(scores) != len(self.tokens):
            raise _UnusableError(f"it has {len(self.tokens)} tokens, but {len(scores)} scores")
        return scores

    def _list(self, key: str, kind: type) -> list[Any]:
        values = self.get(key, [])
        if not isinstance(values, list) or (values and not isinstance(values[0], kind)):
            raise _UnusableError(f"tokenizer.ggml.{key} is not a list of {kind.__name__}")
        return values


def _byte_level_bpe(vocabulary: _Vocabulary) -> tuple[tokenizers.Tokenizer, bool]:
    """The tokenizer, and whether it begins a prompt with BOS where the file does not say."""
    from tokenizers import decoders, normalizers

    rules = pre_tokenization(vocabulary.get("pre", "default"))
    backend = _bpe(vocabulary.ids, vocabulary.merges(), ignore_merges=rules.ignore_merges)
    backend.pre_tokenizer = rules.build()
    backend.decoder = decoders.ByteLevel()
    if rules.nfc:
        backend.normalizer = normalizers.NFC()
    return backend, rules.add_bos


def _sentence_piece(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    from tokenizers import decoders, normalizers

    merges = _merges_from_scores(vocabulary.ids, vocabulary.scores())
    backend = _bpe(
        vocabulary.ids, merges, unk_token=vocabulary.token("unknown_token_id"), fuse_unk=True, byte_fallback=True
    )
    add_space = vocabulary.get("add_space_prefix", True)
    prepend = [normalizers.Prepend(_SPACE)] if add_space else []
    strip = [decoders.Strip(" ", left=1, right=0)] if add_space else []
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", _SPACE)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _bpe(vocab: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> tokenizers.Tokenizer:
    import tokenizers

    if not merges:
        raise _UnusableError("it has no merges")
    try:
        return tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, **options))
    except Exception as error:  # the library raises this class itself
        raise _UnusableError(str(error)) from error


def _merges_from_scores(ids: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best piece first: SentencePiece merges the pair of the best score."""
    merges = []
    for piece, token_id in ids.items():
        score = -scores[token_id]
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                merges.append((score, token_id, ids[left], ids[right], left, right))
    merges.sort()
    return [merge[4:] for merge in merges]


def _add_special_tokens(backend: tokenizers.Tokenizer, vocabulary: _Vocabulary) -> None:
    """Control tokens have no text of their own; user-defined ones are text that is never split."""
    from tokenizers import AddedToken

    by_type: dict[int, list[AddedToken]] = {_UNKNOWN: [], _CONTROL: [], _USER_DEFINED: []}
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if kind in by_type and token:
            by_type[kind].append(AddedToken(token, normalized=False, special=kind != _USER_DEFINED))
    backend.add_special_tokens(by_type[_UNKNOWN] + by_type[_CONTROL])
    backend.add_tokens(by_type[_USER_DEFINED])


def _add_bos_eos(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
    """From now on `backend` puts the token `bos` before each text and `eos` after it; None puts none."""
    from tokenizers.processors import TemplateProcessing

    ids = [(token, backend.token_to_id(token)) for token in (bos, eos) if token is not None]
    template = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    backend.post_processor = TemplateProcessing(single=template, special_tokens=ids)
