"""New weights for all engines at once.

In two phases: every engine loads them while it goes on, and when all have, all of them change between the same two
steps. What goes wrong in the first changes nothing; an engine that misses the second starts again with the new weights.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from asyncscale import messages
from asyncscale.checkpoint.weight_updates import copy_update, remove_copies, update_files
from asyncscale.config import CheckpointFiles, ModelSource, WeightUpdate
from asyncscale.errors import AsyncScaleError, EngineDeadError, EngineError, ModelLoadError

logger = logging.getLogger(__name__)

_METHOD = "update_weights"

_LOOK_INTERVAL_S = 0.02

Results = list[messages.EngineResult]


class Engines(Protocol):
    """How methods are called: of the owner itself, or of engines; see `asyncscale.client.engines`."""

    async def call(self, method: str, args: Sequence[msgspec.Raw]) -> Results: ...


async def update_weights(engines: Engines, path: str | os.PathLike[str], recompute: bool) -> int:
    """Have the owner of these engines change their weights; see `AsyncScaleClient.update_weights`."""
    [result] = await engines.call(_METHOD, _encode(_absolute(path), recompute))
    if result.error is None:
        return msgspec.msgpack.decode(result.value, type=int)
    name, _, text = result.error.partition(": ")
    if name == ModelLoadError.__name__:
        raise ModelLoadError(text)
    raise (EngineDeadError if name == EngineDeadError.__name__ else EngineError)(text, engine_id=result.engine_id)


def _absolute(path: str | os.PathLike[str]) -> str:
    """As the owner, which may work in another folder, is to read it."""
    return os.path.abspath(os.path.expanduser(os.fspath(path)))


class Starter(Protocol):
    """Starts engines again; a Supervisor."""

    folder: str

    def use_weights(self, model: ModelSource, version: int) -> None:
        """For all that start from now on, and those that start already."""

    def restart(self, engine_id: int, verdict: str) -> None:
        """Kill an engine; it comes back."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """An update some of whose tensors are in use. folder: of its files."""

    update: WeightUpdate
    folder: Path
    names: frozenset[str]


class WeightUpdates:
    """The owner's part: one update after the other, whoever wants it::

        updates = WeightUpdates(model, supervisor, call)
        results = await updates.run(args)               # what CollectiveCall is answered with

    version: of the weights in use. call: runs a method on every engine; with `lockstep`, between the same two steps of
    all.
    """

    def __init__(self, model: ModelSource, starter: Starter, call: Callable[..., Awaitable[Results]]) -> None:
        self._base = model
        self._model = model  # with the updates
        self.version = 0
        self._kept: list[_Kept] = []
        self._starter = starter
        self._call = call
        self._lock = asyncio.Lock()

    async def run(self, args: Sequence[msgspec.Raw]) -> Results:
        """The result is the new version."""
        try:
            path, recompute = _decode(args)
            async with self._lock:
                version = await self._update(path, recompute)
        except AsyncScaleError as error:
            engine_id = error.engine_id if isinstance(error, EngineError) else 0
            return [messages.EngineResult(engine_id, error=f"{type(error).__name__}: {error.args[0]}")]
        return [messages.EngineResult(0, msgspec.Raw(messages.encoder.encode(version)))]

    async def _update(self, path: str, recompute: bool) -> int:
        version, started = self.version + 1, time.monotonic()
        kept, model = await self._next_model(path, version)
        try:
            await self._prepare(version, model)
            changed = time.monotonic()
            await self._change(version, model, recompute)
        except BaseException:
            for dropped in kept[-1:]:
                remove_copies(dropped.folder)
            raise
        for old in self._kept:
            if old not in kept:
                remove_copies(old.folder)
        self.version, self._model, self._kept = version, model, kept
        now = time.monotonic()
        logger.info(
            "weights of version %d from %s: loaded in %.2f s, changed in %.3f s",
            version, path, changed - started, now - changed,
        )  # fmt: skip
        return version

    async def _next_model(self, path: str, version: int) -> tuple[list[_Kept], ModelSource]:
        """What is kept, the newest last, and the model with that. Raises ModelLoadError; then nothing has changed."""
        files = await asyncio.to_thread(update_files, path)
        base = self._base
        if not isinstance(base, CheckpointFiles):
            return [], base
        names = await asyncio.to_thread(_tensor_names, files, base)
        folder = Path(self._starter.folder) / f"weights-{version}"
        update = await asyncio.to_thread(copy_update, files, folder)
        kept = [kept for kept in self._kept if not kept.names <= names]
        kept.append(_Kept(update, folder, names))
        return kept, msgspec.structs.replace(base, updates=tuple(entry.update for entry in kept))

    async def _prepare(self, version: int, model: ModelSource) -> None:
        """Have all engines load the weights. Raises what went wrong with that in any of them."""
        _raise_errors(await self._call("_prepare_weights", _encode(version, model)))
        try:
            await self._wait_prepared(version)
        except BaseException:
            await self._call("_drop_weights", _encode(version))
            raise

    async def _wait_prepared(self, version: int) -> None:
        while True:  # an engine answers calls at once, and has no other way to tell the owner something later
            if await self._are_prepared(version):
                return
            await asyncio.sleep(_LOOK_INTERVAL_S)

    async def _are_prepared(self, version: int) -> bool:
        results = await self._call("_prepared_weights", _encode(version))
        preparations = [
            msgspec.msgpack.decode(result.value, type=messages.Preparation)
            for result in results
            if result.error is None
        ]  # an engine that has come since was not told: it is to start again
        for preparation in preparations:
            if preparation.error is not None:
                raise ModelLoadError(preparation.error)
        if not preparations:
            raise _nobody(results)
        return all(preparation.done for preparation in preparations)

    async def _change(self, version: int, model: ModelSource, recompute: bool) -> None:
        self._starter.use_weights(model, version)  # before: who starts meanwhile is to have them as well
        try:
            results = await self._call("_use_weights", _encode(version, recompute), lockstep=True)
            if all(result.error is not None for result in results):
                raise _nobody(results)
        except BaseException:
            self._starter.use_weights(self._model, self.version)
            raise
        for result in results:
            if result.error is not None and not result.died:
                verdict = f"(it could not change to the weights of version {version}: {result.error})"
                self._starter.restart(result.engine_id, verdict)


def _raise_errors(results: Results) -> None:
    for result in results:
        if result.error is not None and not result.died:
            raise EngineError(result.error, engine_id=result.engine_id)
    if all(result.died for result in results):
        raise _nobody(results)


def _nobody(results: Results) -> EngineError:
    for result in results:
        kind = EngineDeadError if result.died else EngineError
        return kind(f"no engine has taken the new weights: {result.error}", engine_id=result.engine_id)
    return EngineDeadError("no engine has taken the new weights: none is there at this moment", engine_id=0)


def _tensor_names(files: Sequence[Path], model: CheckpointFiles) -> frozenset[str]:
    """Raises ModelLoadError unless all that is in the files fits the model."""
    # Imported here: what reads tensors is not needed in an owner otherwise.
    from asyncscale.checkpoint.model_config import ModelConfig
    from asyncscale.model.weights import find_update

    return frozenset(find_update(map(str, files), ModelConfig.load(model)))


def _encode(*args: object) -> list[msgspec.Raw]:
    return [msgspec.Raw(messages.encoder.encode(argument)) for argument in args]


def _decode(args: Sequence[msgspec.Raw]) -> tuple[str, bool]:
    values: list[Any] = [msgspec.msgpack.decode(argument) for argument in args]
    try:
        return msgspec.convert(values, tuple[str, bool])
    except msgspec.ValidationError:
        raise EngineError(f"{_METHOD} takes a path and whether to recompute, got {values!r}", engine_id=0) from None
