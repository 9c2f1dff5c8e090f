"""GGUF files that are written here from the same weights as a folder give the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.config import CheckpointFiles, WeightUpdate
from asyncscale.errors import ModelLoadError
from asyncscale.model.weights import read_weights

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "Llama", {"tie_word_embeddings": True}),
    "llama-linear": ("llama", "Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama-llama3": (
        "llama",
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": ("llama", "Mistral", {"sliding_window": 9, "head_dim": 32}),
    "qwen2": ("qwen2", "Qwen2", {}),
    "qwen2-yarn": (
        "qwen2",
        "Qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
            }
        },
    ),
    "qwen3": ("qwen3", "Qwen3", {"head_dim": 32}),
}  # fmt: skip
PROMPTS = [[5, 250, 17], list(range(40, 120))]


def _write(
    path: Path, arch: str, model: Any, skip: tuple[str, ...] = (), extra: dict[str, np.ndarray] | None = None
) -> CheckpointFiles:
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    _write_rope(writer, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    for name, parameter in model.state_dict().items():
        stored = names.get_name(name, (".weight", ".bias"))
        if stored in skip or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        writer.add_tensor(str(stored), _permuted(parameter, name, arch, config).numpy())
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return CheckpointFiles(name="tiny", format="gguf", path=str(path))


def _write_rope(writer: gguf.GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "llama3":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        plain = rope["rope_theta"] ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / frequencies).numpy())


def _permuted(tensor: torch.Tensor, name: str, arch: str, config: Any) -> torch.Tensor:
    """Llama files hold a head's rows in the order 0, d/2, 1, d/2 + 1, ..."""
    if arch != "llama" or not ("q_proj" in name or "k_proj" in name):
        return tensor
    half = torch.arange(config.head_dim // 2)
    order = torch.stack((half, half + config.head_dim // 2), 1).flatten()
    return tensor.view(-1, config.head_dim, *tensor.shape[1:])[:, order].reshape(tensor.shape).contiguous()


@pytest.mark.parametrize("case", CASES)
def test_a_file_gives_the_same_tokens_as_a_folder(
    case: str,
    tmp_path: Path,
    make_model: Callable[..., Any],
    save: Callable[..., CheckpointFiles],
    make_runner: Callable[..., Any],
    drive: Any,
) -> None:
    arch, architecture, config = CASES[case]
    model = make_model(architecture, **config)
    of_file = make_runner(_write(tmp_path / "m.gguf", arch, model))
    of_folder = make_runner(save(model))
    assert of_file.max_model_len == of_folder.max_model_len
    outputs = [drive(runner, 2).generate(PROMPTS, 32, top=1) for runner in (of_file, of_folder)]
    assert outputs[0] == outputs[1]


def test_a_quantized_file_is_near_to_its_folder(tmp_path: Path, make_model: Callable[..., Any]) -> None:
    model = make_model("Llama")
    stored = model.model.layers[0].mlp.up_proj.weight.detach().numpy()
    quantized = gguf.quants.quantize(stored, gguf.GGMLQuantizationType.Q8_0)
    files = _write(tmp_path / "m.gguf", "llama", model, skip=("blk.0.ffn_up.weight",))
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    reader = gguf.GGUFReader(files.path)
    for name, field in reader.fields.items():
        if name.startswith("llama."):
            writer.add_key_value(name, field.contents(), field.types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.add_tensor("blk.0.ffn_up.weight", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    files = CheckpointFiles(name="q", format="gguf", path=str(tmp_path / "q.gguf"))
    tensors = dict(read_weights(files, ModelConfig.load(files)))
    np.testing.assert_allclose(tensors["model.layers.0.mlp.up_proj.weight"], stored, atol=0.01)


def test_an_update_of_a_gguf_file_has_hugging_faces_names(
    tmp_path: Path, make_model: Callable[..., Any], make_runner: Callable[..., Any], drive: Any
) -> None:
    base, other = make_model("Llama"), make_model("Llama", seed=1)
    files = _write(tmp_path / "m.gguf", "llama", base)
    save_file({name: tensor.clone() for name, tensor in other.state_dict().items()}, tmp_path / "u.safetensors")
    update = WeightUpdate(paths=(str(tmp_path / "u.safetensors"),), sha256="u")
    updated = make_runner(msgspec.structs.replace(files, updates=(update,)))
    whole = make_runner(_write(tmp_path / "other.gguf", "llama", other))
    tokens = [drive(runner, max_num_seqs=4).generate(PROMPTS, 20) for runner in (updated, whole)]
    assert tokens[0] == tokens[1]


def test_a_missing_tensor_is_named_as_in_the_file(tmp_path: Path, make_model: Callable[..., Any]) -> None:
    files = _write(tmp_path / "m.gguf", "llama", make_model("Llama"), skip=("blk.2.ffn_gate.weight",))
    with pytest.raises(ModelLoadError, match=r"m\.gguf: tensor 'blk\.2\.ffn_gate\.weight' is missing"):
        next(read_weights(files, ModelConfig.load(files)))


def test_a_tensor_that_the_architecture_does_not_have_is_named(tmp_path: Path, make_model: Callable[..., Any]) -> None:
    extra = {"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}
    files = _write(tmp_path / "m.gguf", "llama", make_model("Llama"), extra=extra)
    with pytest.raises(ModelLoadError, match=r"'blk\.0\.attn_q_norm\.weight' is not part of a LlamaForCausalLM"):
        next(read_weights(files, ModelConfig.load(files)))


def test_a_tensor_of_another_shape_is_named(tmp_path: Path, make_model: Callable[..., Any]) -> None:
    extra = {"output_norm.weight": np.ones(63, np.float32)}
    files = _write(tmp_path / "m.gguf", "llama", make_model("Llama"), skip=("output_norm.weight",), extra=extra)
    with pytest.raises(ModelLoadError, match=r"'output_norm\.weight' has the shape \(63,\), expected \(64,\)"):
        next(read_weights(files, ModelConfig.load(files)))
