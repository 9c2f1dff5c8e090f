"""How large an engine's KV cache is."""

from __future__ import annotations

from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.config import EngineSpec
from asyncscale.errors import ModelLoadError


def bytes_per_block(model: ModelConfig, block_size: int, itemsize: int) -> int:
    """Memory of one block: keys and values of `block_size` tokens in all layers, of `itemsize` bytes each."""
    return 2 * model.num_layers * model.num_kv_heads * block_size * model.head_dim * itemsize


def num_cache_blocks(
    spec: EngineSpec, model: ModelConfig, max_model_len: int, itemsize: int, available_bytes: int
) -> int:
    """As many as the configuration allows and sequences can use; available_bytes: for the caches of all engines.

    Raises ModelLoadError where there is no room for one.
    """
    config = spec.config
    if config.num_kv_blocks is not None:
        return config.num_kv_blocks
    room = config.kv_cache_memory_bytes
    if room is None:
        room = int(available_bytes * config.kv_cache_memory_fraction) // spec.num_engines
    block = bytes_per_block(model, config.block_size, itemsize)
    if room < block:
        raise ModelLoadError(
            f"not enough memory for one KV block: {room:,} bytes are allowed for the KV cache of an engine, "
            f"a block of {config.block_size} tokens needs {block:,}"
        )
    usable = config.max_num_seqs * -(-max_model_len // config.block_size)
    return min(room // block, usable)
