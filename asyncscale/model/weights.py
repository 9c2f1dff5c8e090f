"""A checkpoint's tensors under Hugging Face's names, checked against the architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt

from asyncscale.checkpoint.experts_config import ExpertsConfig
from asyncscale.checkpoint.gguf_file import GGUFFile
from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.config import CheckpointFiles
from asyncscale.errors import ModelLoadError
from asyncscale.model.expert_exchange import ExpertShare
from asyncscale.model.expert_tensors import expert_of
from asyncscale.model.gguf_weights import read_gguf, read_gguf_rope_factors
from asyncscale.model.safetensors_weights import Readers, find_safetensors, read_safetensors

Float32 = npt.NDArray[np.float32]
Shapes = dict[str, tuple[int, ...]]
Progress = Callable[[float], None]

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"


def read_weights(
    files: CheckpointFiles, config: ModelConfig, progress: Progress | None = None, share: ExpertShare | None = None
) -> Iterator[tuple[str, Float32]]:
    """Every tensor of `files` in float32, one after the other: those of `weight_shapes`, in its order.

    ::

        for name, tensor in read_weights(files, config):
            packed[name] = pack(tensor)

    Of updates, the newest that has a tensor counts; what they replace is not read. `lm_head.weight` is always among
    them; a tied model's is its embedding, again. Tensors may be views of the mapped file, which cannot be written.
    `progress` is called with the fraction that is read. `share`: the experts whose tensors are read, instead of all;
    the others are still checked.
    Raises ModelLoadError, naming file and tensor, where one is missing, of another shape, or not of this architecture,
    and where a file cannot be read; all but defects of the data before the first tensor.
    """
    shapes = weight_shapes(config)
    wanted = [name for name in shapes if share is None or (expert := expert_of(name)) is None or expert in share]
    read = read_gguf if files.format == "gguf" else read_safetensors
    tensors = read(files.path, config, shapes)
    for update in files.updates:
        tensors |= find_update(update.paths, config)
    for count, name in enumerate(wanted, 1):
        tensor = tensors[name]()
        yield name, tensor
        if name == _EMBEDDING and config.tie_word_embeddings:
            yield _HEAD, tensor
        if progress is not None:
            progress(count / len(wanted))


def find_update(paths: Iterable[str], config: ModelConfig) -> Readers:
    """The tensors of an update's safetensors files, each with a function that reads it: some of `weight_shapes`.

    Raises ModelLoadError, naming file and tensor, where one does not fit the architecture, or there is none.
    """
    paths = list(paths)
    found = find_safetensors(paths, config, weight_shapes(config))
    if not found:
        raise ModelLoadError(f"there is no weight of a {config.architecture} in {', '.join(paths)}")
    return found


def read_rope_factors(files: CheckpointFiles, config: ModelConfig) -> Float32 | None:
    """What RoPE's frequencies are divided by, float32[head_dim / 2], if the files say so (Llama 3.1 as GGUF)."""
    return read_gguf_rope_factors(GGUFFile(files.path), config) if files.format == "gguf" else None


def weight_shapes(config: ModelConfig) -> Shapes:
    """Name and shape of every tensor that a model of this configuration has."""
    shapes: Shapes = {_EMBEDDING: (config.vocab_size, config.hidden_size), "model.norm.weight": (config.hidden_size,)}
    if not config.tie_word_embeddings:
        shapes[_HEAD] = (config.vocab_size, config.hidden_size)
    for index in range(config.num_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in _layer_shapes(config, index).items()}
    return shapes


def _layer_shapes(config: ModelConfig, index: int) -> Shapes:
    hidden = config.hidden_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: Shapes = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    shapes |= _linear_shapes("self_attn.q_proj", queries, hidden, config.qkv_bias)
    shapes |= _linear_shapes("self_attn.k_proj", keys, hidden, config.qkv_bias)
    shapes |= _linear_shapes("self_attn.v_proj", keys, hidden, config.qkv_bias)
    shapes |= _linear_shapes("self_attn.o_proj", hidden, queries, config.o_bias)
    if (experts := config.experts_of(index)) is not None:
        shapes |= _experts_shapes(experts, hidden)
    else:
        shapes |= _mlp_shapes("mlp", hidden, config.intermediate_size, config.mlp_bias)
    if config.qk_norm:
        sizes = (queries, keys) if config.qk_norm_spans_heads else (config.head_dim, config.head_dim)
        shapes |= {"self_attn.q_norm.weight": sizes[:1], "self_attn.k_norm.weight": sizes[1:]}
    return shapes


def _linear_shapes(name: str, rows: int, columns: int, bias: bool) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (rows, columns)}
    return shapes | {f"{name}.bias": (rows,)} if bias else shapes


def _mlp_shapes(name: str, hidden: int, inner: int, bias: bool) -> Shapes:
    shapes = _linear_shapes(f"{name}.gate_proj", inner, hidden, bias)
    shapes |= _linear_shapes(f"{name}.up_proj", inner, hidden, bias)
    return shapes | _linear_shapes(f"{name}.down_proj", hidden, inner, bias)


def _experts_shapes(experts: ExpertsConfig, hidden: int) -> Shapes:
    shapes = _linear_shapes("mlp.gate", experts.num_experts, hidden, bias=False)
    for expert in range(experts.num_experts):
        shapes |= _mlp_shapes(f"mlp.experts.{expert}", hidden, experts.intermediate_size, bias=False)
    return shapes
