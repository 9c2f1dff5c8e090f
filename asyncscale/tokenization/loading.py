"""From a model to its `TextCodec`. What each kind of model needs is imported when one is loaded."""

from __future__ import annotations

from asyncscale.config import ModelSource, SimulatedModel
from asyncscale.tokenization.codec import TextCodec


def load_codec(source: ModelSource) -> TextCodec:
    """The codec of a model; blocks while it reads the files. Raises ModelLoadError."""
    if isinstance(source, SimulatedModel):
        from asyncscale.tokenization.simulated import SimulatedTokenizer

        return SimulatedTokenizer(source)
    from asyncscale.tokenization.tokenizer import Tokenizer

    if source.format == "gguf":
        from asyncscale.tokenization.gguf_tokenizer import read_gguf_tokenizer

        return Tokenizer(read_gguf_tokenizer(source.path), source.name)
    from asyncscale.tokenization.folder_tokenizer import read_folder_tokenizer

    return Tokenizer(read_folder_tokenizer(source.path), source.name)
