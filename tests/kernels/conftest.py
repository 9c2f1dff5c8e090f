"""A native decoder of weights that are in no file."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from tiny_models import MAX_LEN, Array, Model, packed

from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.config import CheckpointFiles, EngineConfig, EngineSpec
from asyncscale.kernels.library import load_library
from asyncscale.model import native_decoder
from asyncscale.model.expert_exchange import RowGroup
from asyncscale.model.native_decoder import NativeDecoder
from asyncscale.model.weight_cache import PackedWeights

MakeModel = Callable[..., Model]


@pytest.fixture
def make_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeModel]:
    """make_model(isa, config, weights, format="float32", threads=1, block_size=16, num_blocks=64, dtype=None,
                  group=None)

    dtype: of the cache, where the format is int8. group: that the experts are dealt out to.
    """
    made: list[NativeDecoder] = []

    def make(
        isa: str,
        config: ModelConfig,
        weights: dict[str, Array],
        format: str = "float32",
        threads: int = 1,
        block_size: int = 16,
        num_blocks: int = 64,
        dtype: str = "float32",
        group: RowGroup | None = None,
    ) -> Model:
        tensors = packed(config, weights, format)
        monkeypatch.setattr(native_decoder, "packed_weights", lambda *arguments: PackedWeights(tensors, None))
        engine = EngineConfig(
            dtype=dtype if format == "int8" else format,  # type: ignore[arg-type]
            quantization="int8" if format == "int8" else None,
            block_size=block_size,
            num_kv_blocks=num_blocks,
            threads_per_engine=threads,
        )
        files = CheckpointFiles(name="tiny", format="safetensors", path="")
        spec = EngineSpec(engine_id=0, incarnation=0, num_engines=1, folder="", model=files, config=engine)
        library = load_library(isa)
        assert library is not None
        made.append(NativeDecoder(library, spec, files, config, MAX_LEN, lambda stage, fraction: None, group))
        return Model(made[-1], config, block_size)

    yield make
    for decoder in made:
        decoder._library.cdll.asyncscale_team_delete(decoder._team)
