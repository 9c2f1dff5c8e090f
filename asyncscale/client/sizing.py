"""How many engines `num_engines="auto"` means."""

from __future__ import annotations

from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.checkpoint.weight_counts import WeightCounts
from asyncscale.config import EngineConfig

# More copies of a model than this only pay where memory bandwidth is ample: ask for them by number.
_MAX_ENGINES = 4


def auto_num_engines(num_cores: int, config: EngineConfig, model: ModelConfig | None, available_bytes: int) -> int:
    """One engine for each core, at most four, and no more than there is memory for: at least one.

    An engine of one thread waits for no other. Threads of one engine meet hundreds of times in a step, and as soon as
    anything else runs on one of their cores, all wait for it: docs/engines.md has figures. Each engine is to have room
    for a request that fills the model's context, beside the weights, which they share.
    model: None for a simulated one, which needs no memory.
    """
    most = min(num_cores, _MAX_ENGINES)
    if model is None or config.num_kv_blocks is not None or config.kv_cache_memory_bytes is not None:
        return most
    itemsize = 4 if config.dtype == "float32" else 2
    length = min(config.max_model_len or model.max_model_len, model.max_model_len)
    longest_request = 2 * itemsize * model.num_layers * model.num_kv_heads * model.head_dim * length
    room = config.kv_cache_memory_fraction * (available_bytes - itemsize * WeightCounts.of(model).total)
    return max(1, min(most, int(room / longest_request)))
