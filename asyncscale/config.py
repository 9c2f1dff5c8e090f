"""What an engine is told at start: which model, and how to run it. Frozen; derived values are properties."""

from __future__ import annotations

from typing import Literal

import msgspec

from asyncscale.address import TcpBinding

_MAX_NUM_SEQS = 65_536

DType = Literal["auto", "float32", "bfloat16", "float16"]

Quantization = Literal["int8"]

Speculation = Literal["auto", "ngram", "off"]

Fault = Literal["error", "raise", "exit", "kill", "segfault", "hang"]


class SimulatedModel(msgspec.Struct, frozen=True, kw_only=True, tag="simulated", forbid_unknown_fields=True):
    """A `model=` that sleeps a modelled step time instead of computing; needs no weights and no torch.

    ::

        client = AsyncScaleClient(SimulatedModel(base_ms=8, decode_us=35, prefill_us=10))

    A step takes `base_ms` milliseconds, plus `decode_us` microseconds for each token decoded (or guessed) in it,
    plus `prefill_us` microseconds for each prompt token computed in it. Token ids are a fixed function of prompt,
    seed (when sampling) and position. About one token in `mean_output_tokens` is the end-of-sequence token.
    output_period: other tokens come again after so many; such text is easy to guess. 0 is never.

    replies: what is said to a prompt, chats included, that contains a text: the first that fits, a token for each byte,
    then the end. {"": "Fine."} fits every prompt.

    faults: what happens to the engine in a step that computes a request whose prompt holds this token id, for tests of
    what a program does then: "error" (the request fails, and nothing else), "raise" (an exception), "exit" (code 3),
    "kill" (by SIGKILL, as when memory runs out), "segfault", "hang" (the step never ends).

    lockstep: the engines step together, as those of a model that is spread over them do (see `enable_expert_parallel`),
    and every request fails with what happened when one of them steps alone.
    """

    base_ms: float = 1.0
    decode_us: float = 10.0
    prefill_us: float = 2.0
    vocab_size: int = 32_000
    max_model_len: int = 8192
    num_kv_blocks: int = 65_536
    mean_output_tokens: int = 64
    output_period: int = 0
    load_s: float = 0.0
    replies: dict[str, str] = {}
    faults: dict[int, Fault] = {}
    lockstep: bool = False

    def __post_init__(self) -> None:
        for name in ("base_ms", "decode_us", "prefill_us", "load_s", "output_period"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name, low in (("vocab_size", 258), ("max_model_len", 2), ("num_kv_blocks", 1), ("mean_output_tokens", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")


class WeightUpdate(msgspec.Struct, frozen=True, kw_only=True):
    """Tensors that take the place of a checkpoint's.

    paths: of safetensors files that nobody changes any more. sha256: tells their content from any other.
    """

    paths: tuple[str, ...]
    sha256: str


class CheckpointFiles(msgspec.Struct, frozen=True, kw_only=True, tag="checkpoint"):
    """A model on local disk.

    `path` is a Hugging Face folder (config.json, *.safetensors, tokenizer.json) or a GGUF file. updates: what has
    changed since, the newest last.
    """

    name: str
    format: Literal["safetensors", "gguf"]
    path: str
    updates: tuple[WeightUpdate, ...] = ()


ModelSource = CheckpointFiles | SimulatedModel


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How each engine runs its model. The names are vLLM's where the meaning is the same.

    dtype: of weights and KV cache; "auto" is bfloat16 where the CPU multiplies it natively, else float32.
    quantization: "int8" holds the weights of linear layers in 8 bits, a scale for each output, and rounds their inputs
        to 8 bits as they come, a scale for every 64 of a token. Half the memory of bfloat16 and 1.6 times the speed of
        its products; docs/benchmarks.md has what it costs in quality. The KV cache stays in `dtype`.
    max_model_len: longest prompt + output in tokens; None takes the model's own.
    max_num_seqs: most requests that run (hold KV blocks) at once on one engine.
    max_num_batched_tokens: most tokens computed in one step; a longer prompt is computed in chunks.
    block_size: tokens per KV-cache block.
    kv_cache_memory_fraction: share of the free memory at start that the KV caches of all engines together may use
        (committed as it is touched); kv_cache_memory_bytes: per engine, instead of that; num_kv_blocks: exact,
        instead of both.
    enable_prefix_caching: reuse the KV blocks of a prompt's beginning that an earlier request computed.
    threads_per_engine: compute threads of each engine; None divides the usable cores over the engines.
    pin_engines: bind each engine to cores of its own where engines divide the usable ones among them.
    speculation: guess the next tokens from where the text repeats itself, and check the guesses in one step. Tokens are
        the same with and without. "auto" does so where it pays (few requests, guesses that come true), "ngram" whenever
        there is something to guess.
    num_speculative_tokens: most tokens guessed for a request in one step.
    enable_expert_parallel: deal the experts of a mixture-of-experts model out to the engines, which then step together;
        see docs/tandem.md.
    """

    dtype: DType = "auto"
    quantization: Quantization | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    block_size: int = 16
    kv_cache_memory_fraction: float = 0.4
    kv_cache_memory_bytes: int | None = None
    num_kv_blocks: int | None = None
    enable_prefix_caching: bool = True
    threads_per_engine: int | None = None
    pin_engines: bool = True
    speculation: Speculation = "auto"
    num_speculative_tokens: int = 8
    enable_expert_parallel: bool = False

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size", "num_speculative_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_model_len", "kv_cache_memory_bytes", "num_kv_blocks", "threads_per_engine"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {value}")
        if self.max_num_seqs > _MAX_NUM_SEQS:
            raise ValueError(f"max_num_seqs must be at most {_MAX_NUM_SEQS}, got {self.max_num_seqs}")
        if not 0 < self.kv_cache_memory_fraction <= 1:
            raise ValueError(f"kv_cache_memory_fraction must be in (0, 1], got {self.kv_cache_memory_fraction}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): every running request decodes one token per step"
            )


def step_in_tandem(model: ModelSource, config: EngineConfig, num_engines: int) -> bool:
    """Whether such engines compute each step together."""
    is_spread = model.lockstep if isinstance(model, SimulatedModel) else config.enable_expert_parallel
    return is_spread and num_engines > 1


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that one engine process needs to know. `incarnation` counts its restarts: each has an address of its own.

    folder: private to the owner and its engines, for sockets and logs; it is gone when they are.
    tcp: where it listens instead of in the folder, and with which keys: so a spec goes over private pipes only.
    weight_version: of the weights of `model`: how often they were changed.
    cpus: which it runs on; empty: on those that its owner may use.
    log_levels: from which level on its owner wants to hear of which loggers.
    """

    engine_id: int
    incarnation: int
    num_engines: int
    folder: str
    model: ModelSource
    config: EngineConfig
    tcp: TcpBinding | None = None
    weight_version: int = 0
    cpus: tuple[int, ...] = ()
    log_levels: dict[str, int] = {}

    @property
    def in_tandem(self) -> bool:
        """Whether the engines step together."""
        return step_in_tandem(self.model, self.config, self.num_engines)

    @property
    def name(self) -> str:
        """Unlike that of any other incarnation of any engine of the owner."""
        return f"engine-{self.engine_id}.{self.incarnation}"

    @property
    def address(self) -> str:
        """Where it binds its socket, unless over tcp."""
        return f"ipc://{self.folder}/{self.name}"

    @property
    def stderr_path(self) -> str:
        """Where it writes its stderr."""
        return f"{self.folder}/{self.name}.stderr"

    @property
    def progress_path(self) -> str:
        """Where it shows its progress: see `asyncscale.progress`."""
        return f"{self.folder}/{self.name}.progress"

    @property
    def counters_path(self) -> str:
        """Where it counts what it does: see `asyncscale.metrics.engine_counters`."""
        return f"{self.folder}/{self.name}.counters"
