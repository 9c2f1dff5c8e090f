"""The tokenizer of a Hugging Face model folder: tokenizer.json, and what the files beside it say about its use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asyncscale.checkpoint.integrity import read_json_object
from asyncscale.errors import ModelLoadError
from asyncscale.tokenization.chat import ChatTemplate
from asyncscale.tokenization.tokenizer import TokenizerParts

if TYPE_CHECKING:
    import tokenizers

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SAMPLING_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def read_folder_tokenizer(path: str) -> TokenizerParts:
    """Raises ModelLoadError when a file is missing or damaged."""
    folder = Path(path)
    config = _read_optional(folder / "tokenizer_config.json")
    special_tokens = _special_tokens({**_read_optional(folder / "special_tokens_map.json"), **config})
    backend = _read_backend(folder / "tokenizer.json")
    generation_config = _read_optional(folder / "generation_config.json")
    template = _chat_template(folder, config)
    return TokenizerParts(
        backend=backend,
        chat_template=None if template is None else ChatTemplate(template, special_tokens),
        eos_token_ids=_eos_token_ids(
            folder, generation_config, backend.token_to_id(special_tokens.get("eos_token", ""))
        ),
        generation_defaults=_generation_defaults(folder, generation_config),
    )


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises this class itself
        raise ModelLoadError(f"cannot read the tokenizer {path}: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Name -> string; in the files it is a string or an object that has it as "content"."""
    tokens = {}
    for name in _NAMED_TOKENS:
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            tokens[name] = content
    return tokens


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelLoadError(f"cannot read {path}: {error}") from error
    template = _read_optional(folder / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _eos_token_ids(folder: Path, generation_config: Mapping[str, Any], eos_token: int | None) -> frozenset[int]:
    """generation_config.json's (config.json's where it has none), and the tokenizer's own."""
    ids = generation_config.get("eos_token_id")
    if ids is None:
        ids = _read_optional(folder / "config.json").get("eos_token_id")
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(isinstance(token_id, int) for token_id in listed):
        raise ModelLoadError(
            f"eos_token_id of {folder} must be an integer or a list of integers, not {json.dumps(ids)}"
        )
    return frozenset(listed) | (frozenset() if eos_token is None else {eos_token})


def _generation_defaults(folder: Path, generation_config: Mapping[str, Any]) -> dict[str, float | int]:
    defaults = {name: generation_config[name] for name in _SAMPLING_DEFAULTS if generation_config.get(name) is not None}
    for name, value in defaults.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ModelLoadError(f"{name} of {folder / 'generation_config.json'} must be a number, not {value!r}")
    return defaults
