"""How a step of the native decoder exchanges rows with the engines that hold other experts."""

from __future__ import annotations

import ctypes
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from asyncscale.kernels import library as native
from asyncscale.model.expert_exchange import ExpertExchange
from asyncscale.tandem.collective_errors import CollectiveError


class NativeExchange:
    """An ExpertExchange as kernels::Exchange, which the library calls in each layer with experts::

        exchange = NativeExchange(ExpertExchange(group, num_experts))
        step = native.Step(exchange=ctypes.pointer(exchange.structure))
        if not library.cdll.asyncscale_forward(model, cache, step, team):
            exchange.raise_failure()

    Nothing is copied between the library's memory and tensors. What a row's 4-byte words are is the library's matter:
    they are moved as integers. An exception cannot pass through the library: it is kept, and the step given up.
    """

    def __init__(self, exchange: ExpertExchange) -> None:
        torch.set_num_threads(1)  # it only moves rows here; the cores are the library's threads'
        self._exchange = exchange
        self._received = torch.empty((0, 0), dtype=torch.int32)
        self._received_first = torch.zeros(len(exchange.share) + 1, dtype=torch.int64)
        self._room = torch.empty(1, dtype=torch.float32)
        self._results = torch.empty((0, 0), dtype=torch.int32)
        self._failure: BaseException | None = None
        self.structure = native.Exchange(
            dispatch=native.DispatchFunction(self._dispatch),
            combine=native.CombineFunction(self._combine),
            received_first=self._received_first.data_ptr(),
        )

    def raise_failure(self) -> NoReturn:
        """Raise what made the last step fail."""
        failure, self._failure = self._failure, None
        if failure is None:  # it came before it could be kept, as an interrupt may
            failure = CollectiveError("a step was interrupted while it exchanged rows")
        raise failure

    def _dispatch(self, rows: int, num_words: int, first_rows: int, num_experts: int, room_words: int) -> bool:
        try:
            cells = (ctypes.c_int64 * (num_experts + 1)).from_address(first_rows)
            first = np.ndarray(num_experts + 1, np.int64, memoryview(cells))
            counts = torch.from_numpy(np.diff(first))
            received, counts = self._exchange.dispatch(_words(rows, int(first[-1]), num_words), counts)
            torch.cumsum(counts, 0, out=self._received_first[1:])
            self._received = received.contiguous()
            self._reserve(len(received) * room_words)
            self.structure.received = self._received.data_ptr()
        except BaseException as failure:
            self._failure = failure
        return self._failure is None

    def _combine(self, results: int, num_words: int) -> bool:
        try:
            self._results = self._exchange.combine(_words(results, len(self._received), num_words)).contiguous()
            self.structure.results = self._results.data_ptr()
        except BaseException as failure:
            self._failure = failure
        return self._failure is None

    def _reserve(self, num_words: int) -> None:
        """Make room; it is kept, as the next layers need about as much."""
        if num_words > len(self._room) or not self.structure.room:
            self._room = torch.empty(max(num_words, 1), dtype=torch.float32)
            self.structure.room = self._room.data_ptr()


def _words(address: int, num_rows: int, num_words: int) -> Tensor:
    """The rows at an address, not copied: int32[num_rows, num_words]."""
    memory = (ctypes.c_int32 * (num_rows * num_words)).from_address(address)
    return torch.from_numpy(np.ndarray((num_rows, num_words), np.int32, memoryview(memory)))
