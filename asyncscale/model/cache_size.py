"""How large an engine's KV cache is."""

from __future__ import annotations

from asyncscale.config import EngineSpec
from asyncscale.errors import ModelLoadError


def num_cache_blocks(spec: EngineSpec, max_model_len: int, block_bytes: int, available_bytes: int) -> int:
    """As many as the configuration allows and sequences can use.

    block_bytes: of one block, in all layers. available_bytes: for the caches of all engines. Raises
    ModelLoadError where there is no room for one.
    """
    config = spec.config
    if config.num_kv_blocks is not None:
        return config.num_kv_blocks
    room = config.kv_cache_memory_bytes
    if room is None:
        room = int(available_bytes * config.kv_cache_memory_fraction) // spec.num_engines
    if room < block_bytes:
        raise ModelLoadError(
            f"not enough memory for one KV block: {room:,} bytes are allowed for the KV cache of an engine, "
            f"a block of {config.block_size} tokens needs {block_bytes:,}"
        )
    usable = config.max_num_seqs * -(-max_model_len // config.block_size)
    return min(room // block_bytes, usable)
