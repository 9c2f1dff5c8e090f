"""New weights for an engine that runs: loaded in a thread while it computes, then taken between two of its steps."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from asyncscale.config import ModelSource
from asyncscale.engine.runner import Runner
from asyncscale.errors import ModelLoadError
from asyncscale.messages import Preparation

_log = logging.getLogger(__name__)


class Computing(Protocol):
    """What else depends on the weights."""

    def weights_changed(self, version: int, *, recompute: bool) -> None: ...


class WeightUpdates:
    """What the owner calls for each version, by the names in `methods`::

        updates.prepare_weights(1, model)           # returns at once
        while not updates.prepared_weights(1).done: ...
        updates.use_weights(1, recompute=True)      # or updates.drop_weights(1)

    runner: loads and takes them. computing: is told that it has.
    """

    def __init__(self, runner: Runner, computing: Computing) -> None:
        self._runner = runner
        self._computing = computing
        self._loading: _Loading | None = None
        self.methods: dict[str, Callable[..., object]] = {
            "_prepare_weights": self.prepare_weights,
            "_prepared_weights": self.prepared_weights,
            "_use_weights": self.use_weights,
            "_drop_weights": self.drop_weights,
        }

    def prepare_weights(self, version: int, model: object) -> None:
        """Begin to load the weights of `model`, a ModelSource as plain values; what was loaded before is dropped."""
        self._loading = loading = _Loading(self._runner, version, msgspec.convert(model, ModelSource))
        threading.Thread(target=loading.run, name=f"weights-{version}", daemon=True).start()

    def prepared_weights(self, version: int) -> Preparation:
        """How far that is."""
        return self._get(version).preparation

    def use_weights(self, version: int, recompute: bool) -> None:
        """Compute with them from now on."""
        loading = self._get(version)
        if not loading.preparation.done or loading.preparation.error is not None:
            raise ValueError(f"the weights of version {version} are not loaded")
        self._loading = None
        self._runner.use_weights(loading.weights)
        self._computing.weights_changed(version, recompute=recompute)

    def drop_weights(self, version: int) -> None:
        """They are not wanted any more."""
        if self._loading is not None and self._loading.version == version:
            self._loading = None

    def _get(self, version: int) -> _Loading:
        if self._loading is None or self._loading.version != version:
            raise ValueError(f"this engine was not told of the weights of version {version}")
        return self._loading


class _Loading:
    """preparation: replaced as it goes on; once it is done, `weights` are there."""

    def __init__(self, runner: Runner, version: int, model: ModelSource) -> None:
        self.version = version
        self.weights: Any = None
        self.preparation = Preparation(0.0, done=False)
        self._runner = runner
        self._model = model

    def run(self) -> None:
        error = None
        try:
            self.weights = self._runner.load_weights(self._model, self._on_progress)
        except ModelLoadError as failure:
            error = str(failure)
        except Exception as failure:  # whatever it is, the engine goes on with the weights that it has
            _log.exception("the weights of version %d cannot be loaded", self.version)
            error = f"{type(failure).__name__}: {failure}"
        self.preparation = Preparation(1.0, done=True, error=error)

    def _on_progress(self, fraction: float) -> None:
        self.preparation = Preparation(fraction, done=False)
