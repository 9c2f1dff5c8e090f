from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncscale.checkpoint.gguf_file import GGUFFile
from asyncscale.checkpoint.gguf_types import TYPES
from asyncscale.config import CheckpointFiles
from asyncscale.errors import ModelLoadError


def test_metadata_has_pythons_own_values(gguf_path: Path) -> None:
    metadata = GGUFFile(gguf_path).metadata
    assert {key: value for key, value in metadata.items() if key.startswith("a.")} == {
        "a.uint8": 200,
        "a.int8": -5,
        "a.uint16": 60_000,
        "a.int16": -30_000,
        "a.uint32": 4_000_000_000,
        "a.int32": -2_000_000_000,
        "a.uint64": 2**63,
        "a.int64": -(2**62),
        "a.float32": 0.5,
        "a.float64": 0.1,
        "a.bool": True,
        "a.numbers": [1, 2, 3],
    }
    assert metadata["general.architecture"] == "llama"
    assert metadata["tokenizer.ggml.tokens"] == ["é", "bc", "\u2581d"]


def test_tensor_types_are_those_of_the_gguf_package() -> None:
    assert {kind: (type_.name, type_.block_size, type_.block_bytes) for kind, type_ in TYPES.items()} == {
        int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()
    }


def test_tensors_are_dequantized_as_ggufs_own_reader_does(gguf_path: Path) -> None:
    tensors = GGUFFile(gguf_path).tensors
    reference = {tensor.name: tensor for tensor in gguf.GGUFReader(gguf_path).tensors}
    assert tensors.keys() == reference.keys()
    for name, tensor in tensors.items():
        values = tensor.dequantize()
        expected = gguf.quants.dequantize(reference[name].data, reference[name].tensor_type)
        assert tensor.shape == values.shape == (4, 256)
        assert tensor.type.name == name
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, expected)
        values += 1  # a copy of its own, not the file


def test_the_real_file_reads_as_with_ggufs_own_reader(smollm2_files: CheckpointFiles) -> None:
    file, reference = GGUFFile(smollm2_files.path), gguf.GGUFReader(smollm2_files.path)
    fields = {name: field.contents() for name, field in reference.fields.items() if not name.startswith("GGUF.")}
    assert file.metadata == fields
    assert {name: tensor.shape for name, tensor in file.tensors.items()} == {
        tensor.name: tuple(reversed(tensor.shape.tolist())) for tensor in reference.tensors
    }


def test_a_file_cut_anywhere_is_refused(gguf_path: Path, tmp_path: Path) -> None:
    content = gguf_path.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 2000, 7), len(content) // 2, len(content) - 33]:
        cut.write_bytes(content[:length])
        with pytest.raises(ModelLoadError, match=r"cut\.gguf"):
            GGUFFile(cut)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_header_is_read_or_refused_but_never_crashes(gguf_path: Path, data: st.DataObject) -> None:
    content = bytearray(gguf_path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 1500))] = data.draw(st.sampled_from([0, 1, 9, 0x7F, 0x80, 0xFF]))
    damaged = gguf_path.with_name("damaged.gguf")
    damaged.write_bytes(content)
    try:
        file = GGUFFile(damaged)
    except ModelLoadError:
        return
    for key in file.metadata:
        with contextlib.suppress(ModelLoadError):  # a string that is not UTF-8
            assert file.metadata[key] is file.metadata[key]
    for tensor in file.tensors.values():
        assert tensor.name
        assert tensor._raw.nbytes <= len(content)


@pytest.mark.parametrize(
    ("offset", "replacement", "reason"),
    [
        (0, b"GGML", "does not begin with"),
        (4, (1).to_bytes(4, "little"), "version is 1"),
        (4, (3).to_bytes(4, "big"), "big-endian"),
        (8, (2**60).to_bytes(8, "little"), "truncated"),
        (24, (2**62).to_bytes(8, "little"), "reaches beyond its end"),
    ],
)
def test_a_bad_header_is_named(gguf_path: Path, offset: int, replacement: bytes, reason: str) -> None:
    content = gguf_path.read_bytes()
    gguf_path.write_bytes(content[:offset] + replacement + content[offset + len(replacement) :])
    with pytest.raises(ModelLoadError, match=reason):
        GGUFFile(gguf_path)


def test_a_vocabulary_is_read_when_it_is_asked_for_and_its_damage_is_named_then(gguf_path: Path) -> None:
    gguf_path.write_bytes(gguf_path.read_bytes().replace("é".encode(), b"\xff\xfe"))
    metadata = GGUFFile(gguf_path).metadata
    assert metadata["general.architecture"] == "llama"
    assert "tokenizer.ggml.tokens" in metadata
    with pytest.raises(ModelLoadError, match=rf"{gguf_path}.*not UTF-8"):
        metadata["tokenizer.ggml.tokens"]


@pytest.mark.parametrize("length", [2**40, 2**64 - 1])
def test_a_string_of_a_vocabulary_that_is_too_long_is_refused_at_once(gguf_path: Path, length: int) -> None:
    content = gguf_path.read_bytes()
    for text in ("é", "\u2581d"):
        raw = text.encode()
        as_stored = len(raw).to_bytes(8, "little") + raw
        assert content.count(as_stored) == 1
        gguf_path.write_bytes(content.replace(as_stored, length.to_bytes(8, "little") + raw))
        with pytest.raises(ModelLoadError, match=r"truncated or damaged: a string"):
            GGUFFile(gguf_path)


def test_an_unknown_tensor_type_is_refused(gguf_path: Path) -> None:
    content = gguf_path.read_bytes()
    name = content.index(b"\x04\0\0\0\0\0\0\0Q8_0")
    kind = name + 12 + 4 + 2 * 8  # after the name: number of dimensions, two dimensions, type
    gguf_path.write_bytes(content[:kind] + (99).to_bytes(4, "little") + content[kind + 4 :])
    with pytest.raises(ModelLoadError, match="'Q8_0' is of the unknown type 99"):
        GGUFFile(gguf_path)


def test_a_type_that_cannot_be_dequantized_is_named(tmp_path: Path) -> None:
    path = tmp_path / "f64.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("weight", np.zeros((2, 2)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelLoadError, match="'weight' is of type F64, which is not supported"):
        GGUFFile(path).tensors["weight"].dequantize()


def test_no_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises(ModelLoadError, match=str(path)):
            GGUFFile(path)


def test_tensors_outlive_their_file_object(gguf_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy.gguf"
    shutil.copy(gguf_path, path)
    tensor = GGUFFile(path).tensors["F32"]
    path.unlink()
    assert tensor.dequantize()[0, 0] == -2
