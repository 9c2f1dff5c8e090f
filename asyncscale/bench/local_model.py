"""A model in this process, for its logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from asyncscale.config import CheckpointFiles, DType, EngineConfig, EngineSpec, Quantization
from asyncscale.engine.batch import Batch, SequenceTable
from asyncscale.engine.core import EngineCore
from asyncscale.messages import Add
from asyncscale.model.runner import ModelRunner
from asyncscale.params import Sampling

Int32 = npt.NDArray[np.int32]
_CLIENT = b"bench"


class LocalModel:
    """::

    model = LocalModel(files, "bfloat16", "int8", num_threads=None)
    for logits in model.logits(token_ids, chunk=128): ...
    texts = model.greedy(prompts, num_tokens=100)
    """

    def __init__(
        self, files: CheckpointFiles, dtype: DType, quantization: Quantization | None, num_threads: int | None
    ) -> None:
        config = EngineConfig(
            dtype=dtype, quantization=quantization, threads_per_engine=num_threads, kv_cache_memory_fraction=0.1
        )
        spec = EngineSpec(engine_id=0, incarnation=0, num_engines=1, folder="", model=files, config=config)
        self._runner = ModelRunner(spec)
        self._config = config
        self.max_model_len = self._runner.max_model_len

    def logits(self, token_ids: Int32, chunk: int) -> Iterator[npt.NDArray[np.float32]]:
        """float32[chunk, vocabulary] after each token, so many at a time; valid until the next."""
        size = self._config.block_size
        table = SequenceTable(1, len(token_ids), size)
        table.token_ids[0] = token_ids
        table.num_tokens[0] = table.num_prompt_tokens[0] = len(token_ids)
        table.block_table[0] = np.arange(-(-len(token_ids) // size))
        for begin in range(0, len(token_ids), chunk):
            count = min(chunk, len(token_ids) - begin)
            table.num_computed_tokens[0] = begin
            self._runner.forward(Batch(table, np.zeros(1, np.int32), np.array([count], np.int32)))
            yield self._runner.decoder.logits(np.arange(count))

    def greedy(self, prompts: Sequence[Int32], num_tokens: int) -> list[list[int]]:
        """The most likely tokens that follow each prompt."""
        core = EngineCore(self._runner, self._config)
        texts: list[list[int]] = [[] for _ in prompts]
        for index, prompt in enumerate(prompts):
            core.add(_CLIENT, Add(index, prompt.astype("<i4").tobytes(), len(prompt), Sampling(max_tokens=num_tokens)))
        while core.has_work:
            for outputs in core.step().values():
                for index, token_id in zip(outputs.request_ids, outputs.token_ids, strict=True):
                    texts[index].append(token_id)
                for finished in outputs.finished:
                    if finished.error is not None:
                        raise ValueError(f"prompt {finished.request_id}: {finished.error}")
        return texts
