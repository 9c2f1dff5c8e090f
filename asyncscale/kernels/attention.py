"""The door to the attention kernel: finds the library for this CPU, passes it tensors by their addresses."""

from __future__ import annotations

import ctypes
import logging
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

INSTRUCTION_SETS = ("avx512_bf16", "avx512", "avx2", "portable")  # best first

_log = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_UNLIMITED = 1 << 40


class _Plan(ctypes.Structure):
    """attention::Plan of plan.h."""

    _fields_ = (
        ("items", ctypes.c_void_p),
        ("num_items", ctypes.c_int64),
        ("block_table", ctypes.c_void_p),
        ("block_table_stride", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("query_stride", ctypes.c_int64),
        ("output_stride", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("block_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("value_offset", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("num_threads", ctypes.c_int64),
        ("scratch", ctypes.c_void_p),
        ("scratch_bytes", ctypes.c_int64),
        ("scale", ctypes.c_double),
    )


class AttentionKernel:
    """Causal attention over a paged cache, computed in float32 whatever is stored; one instruction set's library.

    ::

        step = load_attention().plan(items, block_table, scale=head_dim**-0.5)
        step.run(queries, layer_cache, output)

    isa: which of INSTRUCTION_SETS it uses.
    """

    def __init__(self, isa: str, library: ctypes.CDLL) -> None:
        self.isa = isa
        self.run = library.asyncscale_attention_run
        self.run.argtypes = [ctypes.POINTER(_Plan)] + [ctypes.c_void_p] * 3
        self.run.restype = None
        self.scratch_bytes = library.asyncscale_attention_scratch_bytes
        self.scratch_bytes.argtypes = [ctypes.POINTER(_Plan), ctypes.c_int64]
        self.scratch_bytes.restype = ctypes.c_int64

    def plan(
        self,
        items: npt.NDArray[np.int64],
        block_table: npt.NDArray[np.int32],
        *,
        scale: float,
        window: int | None = None,
        num_threads: int = 1,
    ) -> PlannedAttention:
        """What all layers of a step have in common.

        items: int64[n, 4], rows of (first token, number of tokens, position of the first in its sequence, row of
        block_table): tokens of one sequence each, whose keys and values up to their own will be in the cache.
        block_table: int32[rows, blocks]; position p is in block p // block_size, slot p % block_size. Its entries and
        the items are trusted. scale: of the scores. window: how many positions a token sees, its own included.
        """
        return PlannedAttention(self, items, block_table, scale, window, num_threads)


class PlannedAttention:
    """Made by AttentionKernel.plan; used from one thread at a time."""

    def __init__(
        self,
        kernel: AttentionKernel,
        items: npt.NDArray[np.int64],
        block_table: npt.NDArray[np.int32],
        scale: float,
        window: int | None,
        num_threads: int,
    ) -> None:
        self._kernel = kernel
        self._arrays = np.ascontiguousarray(items, np.int64), block_table  # kept alive: the plan holds their addresses
        self._most_tokens = int(items[:, 1].max(initial=1))
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._plan = _Plan(
            items=self._arrays[0].ctypes.data,
            num_items=len(items),
            block_table=block_table.ctypes.data,
            block_table_stride=block_table.strides[0] // block_table.itemsize,
            window=_UNLIMITED if window is None else window,
            num_threads=num_threads,
            scale=scale,
        )

    def run(self, queries: Tensor, layer_cache: Tensor, output: Tensor) -> None:
        """Writes the attention of the tokens that the items name; other rows of `output` stay as they are.

        queries, output: [tokens, num_heads, head_dim], a token's heads contiguous. layer_cache: [2 (key, value),
        num_blocks, num_kv_heads, block_size, head_dim], contiguous. All of one dtype: float32, bfloat16 or float16.
        """
        _check(queries, layer_cache, output)
        plan = self._plan
        plan.query_stride, plan.output_stride = queries.stride(0), output.stride(0)
        if not plan.scratch:
            self._fit(queries, layer_cache)
        self._kernel.run(plan, queries.data_ptr(), layer_cache.data_ptr(), output.data_ptr())

    def _fit(self, queries: Tensor, layer_cache: Tensor) -> None:
        plan = self._plan
        plan.dtype = _DTYPES[queries.dtype]
        _, plan.num_heads, plan.head_dim = queries.shape
        plan.num_kv_heads, plan.block_size = layer_cache.shape[2:4]
        plan.value_offset, plan.block_stride, plan.head_stride = layer_cache.stride()[:3]
        plan.scratch_bytes = self._kernel.scratch_bytes(plan, self._most_tokens)
        self._scratch = torch.empty(plan.scratch_bytes * plan.num_threads, dtype=torch.uint8)
        plan.scratch = self._scratch.data_ptr()


def load_attention(isa: str | None = None) -> AttentionKernel | None:
    """The kernel for `isa`, or the best that this CPU has; None when it was not built or cannot run here."""
    for name in INSTRUCTION_SETS if isa is None else (isa,):
        library = _load(name)
        if library is not None and library.asyncscale_attention_supported():
            return AttentionKernel(name, library)
    return None


def _load(isa: str) -> ctypes.CDLL | None:
    for suffix in EXTENSION_SUFFIXES:
        path = _FOLDER / f"_attention_{isa}{suffix}"
        if path.exists():
            try:
                return ctypes.CDLL(str(path))
            except OSError as error:  # built elsewhere, or without a library that it needs
                _log.warning("cannot load %s: %s", path, error)
    return None


def _check(queries: Tensor, layer_cache: Tensor, output: Tensor) -> None:
    if queries.dtype not in _DTYPES or not queries.dtype == layer_cache.dtype == output.dtype:
        raise TypeError(f"no kernel for {queries.dtype} queries, {layer_cache.dtype} cache, {output.dtype} output")
    head_dim = queries.shape[2]
    if queries.shape != output.shape or layer_cache.shape[4] != head_dim or queries.shape[1] % layer_cache.shape[2]:
        raise ValueError(f"shapes do not fit: {queries.shape}, {layer_cache.shape}, {output.shape}")
    if not queries.stride()[1:] == output.stride()[1:] == (head_dim, 1) or not layer_cache.is_contiguous():
        raise ValueError("heads and cache must be contiguous")
