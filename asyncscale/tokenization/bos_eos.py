"""The special tokens that a tokenizer puts around each prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers


def add_bos_eos(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
    """From now on `backend` puts the token `bos` before each text and `eos` after it; None puts none."""
    from tokenizers.processors import TemplateProcessing

    ids = [(token, backend.token_to_id(token)) for token in (bos, eos) if token is not None]
    template = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    backend.post_processor = TemplateProcessing(single=template, special_tokens=ids)
