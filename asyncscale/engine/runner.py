"""What an engine needs from a model: from a batch of sequences to their next tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from asyncscale.config import ModelSource
from asyncscale.engine.batch import Batch, StepResult
from asyncscale.engine.request import Request
from asyncscale.progress import Progress


class Runner(Protocol):
    """Computes batches. Two implementations: checkpoints' models and the simulation. Called from one thread.

    vocab_size, max_model_len, num_blocks (KV-cache blocks that it has room for) and dtype are known once it is made.
    supports_prefix_caching: whether keys and values depend on nothing but the tokens up to their own.
    token_cost: what one more token in a step costs, as a share of what a step costs beside its tokens: a step of n
    tokens takes about (1 + token_cost * n) times as long as one of none could. Drafts are made where they pay by that
    measure. Infinite where logits are not bit by bit the same whatever else is computed beside them: nothing is ever
    drafted then.
    progress: where to tick again and again while a batch is computed, at least once in each layer. It is how a long
    step is told from one that hangs; whoever runs the engine may set it.
    use_weights: computes with other weights from now on, which `load_weights` has returned; those before are freed.
    """

    vocab_size: int
    max_model_len: int
    num_blocks: int
    dtype: str
    supports_prefix_caching: bool
    token_cost: float
    progress: Progress

    def load_weights(self, model: ModelSource, progress: Callable[[float], None]) -> Any:
        """Weights for the same architecture. From any thread; progress is called with the fraction that is loaded.

        Raises ModelLoadError.
        """

    def use_weights(self, weights: Any) -> None: ...

    def add(self, row: int, request: Request) -> None:
        """`request` occupies `row` from now on (also when it comes back after a preemption)."""

    def remove(self, row: int) -> None:
        """The request in `row` finished, was aborted or was preempted."""

    def execute(self, batch: Batch, meanwhile: Callable[[], None]) -> StepResult:
        """Compute the batch's tokens, write their keys and values to the cache, sample where a sequence is complete.

        ::

            points = sample_points(batch)
            token_ids = ...  # one for each point, from the logits there
            kept = find_kept(batch, points, token_ids)
            return StepResult(points.rows[kept], token_ids[kept])

        meanwhile: to be called once, when another device has been set to work, else before the work begins.
        """
