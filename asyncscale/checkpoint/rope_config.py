"""Rotary position embedding (RoPE) parameters as a checkpoint states them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import msgspec

from asyncscale.errors import ModelLoadError

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn"]


class RopeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Names and meanings are those of transformers' `rope_parameters`.

    original_max_position_embeddings: the context that the model was trained with, before it was scaled.
    low_freq_factor, high_freq_factor: llama3 only. beta_fast and below: yarn only.
    """

    type: RopeType = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_position_embeddings: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @classmethod
    def parse(cls, config: Mapping[str, Any], source: str) -> RopeConfig:
        """From config.json's `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

        Raises ModelLoadError that names `source` and what is not supported.
        """
        stated = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(stated, Mapping) or any(isinstance(value, Mapping) for value in stated.values()):
            raise ModelLoadError(f"{source}: RoPE parameters of this form are not supported: {stated!r}")
        rope_type = stated.get("rope_type", stated.get("type")) or "default"
        if rope_type not in get_args(RopeType):
            raise ModelLoadError(
                f"{source}: RoPE type {rope_type!r} is not supported; supported are {', '.join(get_args(RopeType))}"
            )
        if stated.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1):
            raise ModelLoadError(f"{source}: a partial_rotary_factor other than 1 is not supported")
        return _convert(_fields(config, stated, rope_type), source)


def _fields(config: Mapping[str, Any], stated: Mapping[str, Any], rope_type: str) -> dict[str, Any]:
    fields = {name: stated[name] for name in RopeConfig.__struct_fields__ if stated.get(name) is not None}
    fields["type"] = rope_type
    theta = stated.get("rope_theta", config.get("rope_theta"))
    if theta is not None:
        fields["theta"] = theta
    # Where a config states it outside of the RoPE parameters, transformers lets that win.
    longest = config["max_position_embeddings"]
    original = config.get("original_max_position_embeddings") or fields.get("original_max_position_embeddings")
    # Dynamic scaling sets in beyond max_position_embeddings, whatever else is stated.
    fields["original_max_position_embeddings"] = longest if rope_type == "dynamic" else original or longest
    if rope_type == "yarn" and original and "factor" not in fields:
        fields["factor"] = longest / original
    return fields


_NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}


def _convert(fields: dict[str, Any], source: str) -> RopeConfig:
    missing = [name for name in _NEEDED[fields["type"]] if name not in fields]
    if missing:
        raise ModelLoadError(f"{source}: RoPE type {fields['type']!r} needs {', '.join(missing)}")
    try:
        rope = msgspec.convert(fields, RopeConfig)
    except msgspec.ValidationError as error:
        raise ModelLoadError(f"{source}: bad RoPE parameters: {error}") from error
    if rope.theta <= 0 or rope.factor <= 0 or rope.original_max_position_embeddings < 1:
        raise ModelLoadError(f"{source}: RoPE parameters must be positive: {fields!r}")
    return rope
