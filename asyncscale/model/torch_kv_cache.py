"""The paged cache of keys and values in torch tensors."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.errors import ModelLoadError


def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Memory of one block: keys and values of `block_size` tokens in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * block_size * config.head_dim * dtype.itemsize


class KVCache:
    """Keys and values, [num_layers, 2 (key, value), num_blocks, num_kv_heads, block_size, head_dim].

    Within a block each head's tokens are contiguous, so that gathered blocks need no copy before they are multiplied.
    Its memory is committed by the operating system when a block is first written.
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_kv_heads = config.num_kv_heads
        shape = (config.num_layers, 2, num_blocks, config.num_kv_heads, block_size, config.head_dim)
        self.data = _lazy_zeros(shape, dtype, device)
        # The same memory as rows of one token's head, to write; and as rows of one block's head, to read.
        self._token_rows = self.data.view(config.num_layers, -1, config.head_dim)
        self._block_rows = self.data.view(config.num_layers, -1, block_size * config.head_dim)

    def write_rows(self, blocks: Tensor, slots: Tensor) -> Tensor:
        """Where `write` puts tokens: of keys, then of values. blocks, slots: int64[tokens]."""
        heads = torch.arange(self.num_kv_heads, device=blocks.device)
        keys = (blocks[:, None] * self.num_kv_heads + heads) * self.block_size + slots[:, None]
        values = keys + self.num_blocks * self.num_kv_heads * self.block_size
        return torch.stack((keys.view(-1), values.view(-1)))

    def write(self, layer: int, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """keys, values: [tokens, num_kv_heads, head_dim]."""
        head_dim = keys.shape[-1]
        self._token_rows[layer].index_copy_(0, rows[0], keys.reshape(-1, head_dim))
        self._token_rows[layer].index_copy_(0, rows[1], values.reshape(-1, head_dim))

    def gather_rows(self, blocks: Tensor) -> Tensor:
        """What `gather` reads. blocks: int64[sequences, blocks of each]."""
        heads = torch.arange(self.num_kv_heads, device=blocks.device)
        keys = blocks[:, None, :] * self.num_kv_heads + heads[:, None]
        return torch.stack((keys, keys + self.num_blocks * self.num_kv_heads)).view(-1)

    def gather(self, layer: int, rows: Tensor, num_sequences: int) -> tuple[Tensor, Tensor]:
        """Keys and values, each [num_sequences * num_kv_heads, tokens, head_dim], contiguous."""
        head_dim = self.data.shape[-1]
        gathered = self._block_rows[layer].index_select(0, rows)
        keys, values = gathered.view(2, num_sequences * self.num_kv_heads, -1, head_dim)
        return keys, values


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # Zeros, because a masked position still enters as 0 * value, which must not be 0 * NaN. An anonymous mapping is
    # zero, and committed page by page as it is written; torch.zeros would write it all, numpy's commits huge pages.
    num_bytes = math.prod(shape) * dtype.itemsize
    try:
        if device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, RuntimeError) as error:
        raise ModelLoadError(f"cannot allocate {num_bytes:,} bytes for the KV cache: {error}") from error
    return torch.frombuffer(memory, dtype=dtype).view(shape)
