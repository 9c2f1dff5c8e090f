from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncscale.checkpoint import resolve
from asyncscale.checkpoint.hub import HubModel
from asyncscale.checkpoint.resolve import resolve_model
from asyncscale.config import CheckpointFiles
from asyncscale.errors import ModelLoadError


def test_the_built_in_model_is_found_whatever_the_case(smollm2_files: CheckpointFiles) -> None:
    assert smollm2_files.format == "gguf"
    assert smollm2_files.name == "smollm2-135m-instruct"
    assert resolve_model("SmolLM2-135M-Instruct") == smollm2_files


def test_a_folder_and_a_gguf_file_are_taken_as_they_are(model_folder: Path, gguf_path: Path) -> None:
    assert resolve_model(model_folder) == CheckpointFiles(name="model", format="safetensors", path=str(model_folder))
    assert resolve_model(str(gguf_path)) == CheckpointFiles(name="tiny.gguf", format="gguf", path=str(gguf_path))


def test_a_relative_path_is_made_absolute(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model_folder.parent)
    assert resolve_model("model").path == str(model_folder)


@pytest.mark.parametrize("model", ["", "no-such-model", "a/b/c"])
def test_an_unknown_name_says_what_was_tried(model: str) -> None:
    with pytest.raises(ModelLoadError, match=r"not a path that exists .*smollm2-135m-instruct.*org/name"):
        resolve_model(model)


def test_a_close_name_is_offered() -> None:
    with pytest.raises(ModelLoadError, match="Did you mean 'smollm2-135m-instruct'"):
        resolve_model("smollm2-135m-instuct")


def test_a_model_at_nearly_that_path_is_offered(
    model_folder: Path, gguf_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model_folder.parent / "modal").mkdir()  # no model
    for wrong, meant in [
        (model_folder.with_name("Modell"), model_folder),
        (gguf_path.with_name("tinny.gguf"), gguf_path),
        (model_folder / "config.json" / "x", None),
        (model_folder.parent / "other" / "model", None),
    ]:
        with pytest.raises(ModelLoadError, match="does not exist") as caught:
            resolve_model(wrong)
        assert str(caught.value).endswith(f". Did you mean '{meant}'?") == (meant is not None)
    monkeypatch.chdir(model_folder.parent)
    with pytest.raises(ModelLoadError, match="Did you mean 'model'"):
        resolve_model("modell")


def test_a_folder_of_models_offers_those_inside(model_folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    model_folder.rename(snapshot)
    with pytest.raises(ModelLoadError, match=rf"no config\.json. Did you mean {snapshot}\?"):
        resolve_model(tmp_path / "models--org--name")
    with pytest.raises(ModelLoadError, match=rf"no config\.json. Did you mean {snapshot}\?"):
        resolve_model(snapshot.parent)


def test_a_hub_id_is_left_alone_unless_a_path_is_nearly_that(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: HubModel, progress: object) -> Path:
        raise ModelLoadError(f"no model {model.repo_id}")

    monkeypatch.setattr(resolve, "fetch_from_hub", refuse)
    monkeypatch.chdir(model_folder.parent.parent)
    with pytest.raises(ModelLoadError) as caught:
        resolve_model("HuggingFaceTB/SmolLM2-135M-Instuct")
    assert str(caught.value) == "no model HuggingFaceTB/SmolLM2-135M-Instuct"
    folder = model_folder.parent.name
    with pytest.raises(ModelLoadError, match=f"no model {folder}/modell. Did you mean '{folder}/model'"):
        resolve_model(f"{folder}/modell")


def test_a_path_object_that_does_not_exist_is_a_path_all_the_same(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"absent does not exist"):
        resolve_model(tmp_path / "absent")


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, content: bytes | str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def two_shards_of_three(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00003.safetensors")
    (folder / "model-00003-of-00003.safetensors").write_bytes(
        (folder / "model-00001-of-00003.safetensors").read_bytes()
    )


INDEX = json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}})
OUTSIDE = json.dumps({"weight_map": {"a": "../model.safetensors"}})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (remove("config.json"), "has no config.json"),
        (write("config.json", "{"), "cannot read .*config.json as JSON"),
        (write("config.json", "[]"), "holds a JSON list"),
        (remove("tokenizer.json"), "has no tokenizer.json"),
        (write("tokenizer.json", b"\xff"), "cannot read .*tokenizer.json as JSON"),
        (remove("model.safetensors"), r"no \*.safetensors"),
        (only_pickles, "pytorch_model.bin would have to be unpickled"),
        (two_shards_of_three, "missing: model-00002-of-00003.safetensors"),
        (write("model.safetensors.index.json", INDEX), "missing: model-2.safetensors"),
        (write("model.safetensors.index.json", OUTSIDE), "outside its folder"),
        (write("model.safetensors.index.json", "{}"), "has no weight_map"),
        (cut, "model.safetensors is truncated"),
        (write("model.safetensors", b""), "no safetensors file"),
        (write("model.safetensors", b"\xff" * 100), "no safetensors file"),
        (write("model.safetensors", b"\x04" + b"\0" * 7 + b"[1]]"), "no safetensors file"),
        (write("model.safetensors", b"\x08" + b"\0" * 7 + b'{"a": 1}'), "header is damaged"),
        (write("model.safetensors", b"\x02" + b"\0" * 7 + b"{}x"), "is damaged"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(model_folder: Path, damage: Callable[[Path], None], reason: str) -> None:
    resolve_model(model_folder)
    damage(model_folder)
    with pytest.raises(ModelLoadError, match=reason):
        resolve_model(model_folder)


def test_a_folder_with_only_gguf_files_names_them(tmp_path: Path, gguf_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"pass one of them: .*tiny\.gguf"):
        resolve_model(tmp_path)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, gguf_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ModelLoadError, match="no GGUF file; of a Hugging Face model, pass the folder"):
        resolve_model(tmp_path / "model.safetensors")
    os.truncate(gguf_path, gguf_path.stat().st_size - 100)
    with pytest.raises(ModelLoadError, match="truncated"):
        resolve_model(gguf_path)


def write_gguf(path: Path, **metadata: str) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        writer.add_string(key.replace("__", "."), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_a_gguf_file_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no tokenizer: its metadata has no tokenizer\.ggml\.model"):
        resolve_model(write_gguf(tmp_path / "a.gguf"))
    with pytest.raises(ModelLoadError, match=r"no tokenizer: its metadata has no tokenizer\.ggml\.tokens"):
        resolve_model(write_gguf(tmp_path / "b.gguf", tokenizer__ggml__model="gpt2"))


@pytest.mark.parametrize("path", ["/no/such/folder", "./no-such-file.gguf", "../nothing", "~/nothing"])
def test_what_can_only_be_a_path_is_not_looked_for_elsewhere(path: str) -> None:
    with pytest.raises(ModelLoadError, match=r"the model path .* does not exist"):
        resolve_model(path)


@pytest.mark.parametrize(
    "model",
    [
        "~nobody-of-this-name", "x" * 5000, "a/" + "b" * 5000, "/x" * 3000, "\0", "a/b\0c", "\ud800", "a/\ud800",
        "../\0", "a/..", "a/b@../../x", "a/b@/etc/passwd", "a/b@x/../y", "a/b:../../x.gguf", "a/b:/etc/x.gguf",
        "a/b@-;id", "a/b@x\ny",
    ],
)  # fmt: skip
def test_what_can_be_no_name_is_refused_before_anybody_is_asked(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[HubModel] = []
    monkeypatch.setattr(resolve, "fetch_from_hub", lambda model, progress: asked.append(model))
    with pytest.raises(ModelLoadError):
        resolve_model(model)
    assert asked == []


NAMES = st.text(st.sampled_from("ab./\\:@~-; $`'\"\n\0\ud800é*"), max_size=30) | st.text(max_size=300)


@given(NAMES | st.builds("{}/{}".format, NAMES, NAMES) | st.builds("a/b{}{}".format, st.sampled_from("@:"), NAMES))
def test_whatever_the_name_nothing_leads_outside_the_hubs_cache(model: str) -> None:
    found = HubModel.parse(model)
    for part in (found.repo_id, found.revision, found.file) if found else ():
        if part is not None:
            assert Path("/cache", part).resolve().is_relative_to("/cache")
            assert not set(part) & set("\0\n\\;$`'\"*")
