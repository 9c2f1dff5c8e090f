from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.config import CheckpointFiles
from asyncscale.errors import ModelLoadError
from asyncscale.model import content_digest, weight_cache, weight_cache_room, weight_file
from asyncscale.model.file_lock import exclusive_file
from asyncscale.model.packing import Packer, WeightFormat, packed_specs
from asyncscale.model.weight_cache import PackedWeights, packed_weights
from asyncscale.model.weights import read_weights, weight_shapes

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "vocab_size": 300, "hidden_size": 48, "intermediate_size": 72,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}  # fmt: skip
Load = Callable[..., PackedWeights]


def write_checkpoint(folder: Path, seed: int) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    generator = np.random.default_rng(seed)
    shapes = weight_shapes(ModelConfig.parse(CONFIG, "test"))
    tensors = {name: generator.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "new")
    os.replace(folder / "new", folder / "model.safetensors")


@pytest.fixture
def files(tmp_path: Path) -> CheckpointFiles:
    folder = tmp_path / "model"
    folder.mkdir()
    write_checkpoint(folder, 0)
    return CheckpointFiles(name="tiny", format="safetensors", path=str(folder))


@pytest.fixture
def cache(weight_cache_folder: Path) -> Path:
    return weight_cache_folder


class Builds:
    """Counts how often a checkpoint is read."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *args: Any) -> Iterator[Any]:
        self.count += 1
        return read_weights(*args)


@pytest.fixture(autouse=True)
def builds(monkeypatch: pytest.MonkeyPatch) -> Builds:
    counter = Builds()
    monkeypatch.setattr(weight_cache, "read_weights", counter)
    return counter


@pytest.fixture
def load(files: CheckpointFiles) -> Load:
    def load_files(weight_format: WeightFormat = "int8") -> PackedWeights:
        return packed_weights(files, ModelConfig.load(files), weight_format)

    return load_files


def packed_in_memory(files: CheckpointFiles, weight_format: WeightFormat) -> dict[str, Any]:
    config = ModelConfig.load(files)
    tensors = {name: np.zeros(spec.shape, spec.dtype) for name, spec in packed_specs(config, weight_format).items()}
    packer = Packer(config, weight_format, tensors)
    for name, values in read_weights(files, config):
        packer.write(name, values)
    return tensors


def assert_equal(weights: PackedWeights, expected: dict[str, Any]) -> None:
    assert weights.tensors.keys() == expected.keys()
    for name, tensor in weights.tensors.items():
        assert tensor.dtype == expected[name].dtype
        assert np.array_equal(tensor, expected[name]), name


def the_file(cache: Path) -> Path:
    (path,) = cache.glob("*.weights")
    return path


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in cache.rglob("*") if path.is_file() and path.suffix not in (".weights", ".json")]


@pytest.mark.parametrize("weight_format", ["float32", "bfloat16", "float16", "int8"])
def test_weights_are_made_once_and_mapped_from_then_on(
    weight_format: WeightFormat, files: CheckpointFiles, load: Load, builds: Builds, cache: Path
) -> None:
    expected = packed_in_memory(files, weight_format)
    for _ in range(3):
        assert_equal(load(weight_format), expected)
    assert builds.count == 1
    assert leftovers(cache) == []


def test_arrays_are_aligned_for_the_kernels_and_cannot_be_written(load: Load) -> None:
    for tensor in load().tensors.values():
        assert tensor.ctypes.data % 64 == 0
        with pytest.raises(ValueError, match="read-only"):
            tensor[...] = 0


def test_each_format_has_a_file_of_its_own(load: Load, builds: Builds, cache: Path) -> None:
    load("int8")
    load("bfloat16")
    assert builds.count == 2
    assert len(list(cache.glob("*.weights"))) == 2


def test_factors_of_rope_are_kept_beside_the_tensors(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load("float32").rope_factors is None
    factors = np.arange(1, 7, dtype=np.float32)
    monkeypatch.setattr(weight_cache, "read_rope_factors", lambda files, config: factors)
    for _ in range(2):
        weights = load("int8")
        assert weights.rope_factors is not None
        assert weights.rope_factors.tolist() == factors.tolist()
        assert "rope_factors" not in weights.tensors


def test_progress_ends_with_all(files: CheckpointFiles) -> None:
    for _ in range(2):
        fractions: list[float] = []
        packed_weights(files, ModelConfig.load(files), "int8", fractions.append)
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1


# -- damage --


def damaged_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """What may become of a file, each with its name."""
    whole = path.read_bytes()
    header_bytes = 48 + int.from_bytes(whole[12:16], "little")
    data = json.loads(whole[48:header_bytes])["data_offset"]
    generator = np.random.default_rng(0)
    positions = [*range(8, 48, 13), *generator.integers(48, header_bytes, 10)]
    positions += generator.integers(data, len(whole), 60).tolist()
    for position in positions:
        flipped = bytearray(whole)
        flipped[position] ^= 1 << int(generator.integers(8))
        yield f"a bit of byte {position}", bytes(flipped)
    sector = slice(data, data + 512), slice(data + 512 * 7, data + 512 * 8)
    swapped = bytearray(whole)
    swapped[sector[0]], swapped[sector[1]] = whole[sector[1]], whole[sector[0]]
    yield "two sectors swapped", bytes(swapped)
    yield "a page of zeros", whole[:data] + bytes(4096) + whole[data + 4096 :]
    yield "a header and nothing else", whole[:data] + bytes(len(whole) - data)
    yield "one byte less", whole[:-1]
    yield "a page more", whole + bytes(4096)
    yield "the beginning", whole[:30]
    yield "half of the header", whole[: header_bytes // 2]
    yield "nothing", b""
    yield "another version", whole[:8] + b"\x07" + whole[9:]


def test_every_kind_of_damage_is_found(load: Load, cache: Path) -> None:
    load()
    path = the_file(cache)
    for what, content in damaged_files(path):
        (path.parent / "copy").write_bytes(content)
        with (path.parent / "copy").open("rb") as file:
            try:
                weight_file.map_weight_file(file.fileno(), path.stem)
            except weight_file.DamagedFileError:
                continue
        pytest.fail(f"not found: {what}")


def test_a_damaged_file_is_made_again_with_one_warning(
    files: CheckpointFiles, load: Load, builds: Builds, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load()
    path = the_file(cache)
    with path.open("r+b") as file:
        file.seek(-5000, os.SEEK_END)
        file.write(b"damage")
    assert_equal(load(), packed_in_memory(files, "int8"))
    assert builds.count == 2
    (record,) = caplog.records
    assert "are made again: its checksum is wrong" in record.getMessage()
    load()
    assert builds.count == 2


def test_a_file_of_other_content_is_not_taken(files: CheckpointFiles, load: Load, cache: Path) -> None:
    load("bfloat16")
    other = the_file(cache)
    load("int8")
    (path,) = set(cache.glob("*.weights")) - {other}
    shutil.copy(other, path)
    assert_equal(load("int8"), packed_in_memory(files, "int8"))


# -- several processes --

CHILD = """
import hashlib, os, signal, sys
from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.config import CheckpointFiles
from asyncscale.model import weight_cache

files = CheckpointFiles(name="tiny", format="safetensors", path=sys.argv[1])
read_weights = weight_cache.read_weights

def reading(*args):
    os.write(1, b"building\\n")
    for count, entry in enumerate(read_weights(*args)):
        if count == 5 and sys.argv[2] == "wait":
            sys.stdin.read(1)
        if count == 5 and sys.argv[2] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        yield entry

weight_cache.read_weights = reading
if sys.argv[2] == "start":
    sys.stdin.read(1)
weights = weight_cache.packed_weights(files, ModelConfig.load(files), "int8")
os.write(1, hashlib.sha256(b"".join(weights.tensors.values())).hexdigest().encode() + b"\\n")
if sys.argv[2] == "use":
    sys.stdin.read(1)
"""


@pytest.fixture
def spawn(files: CheckpointFiles) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    processes = []

    def start(how: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CHILD, files.path, how]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_processes_that_start_at_once_make_it_once(spawn: Callable[[str], subprocess.Popen[str]], cache: Path) -> None:
    processes = [spawn("start") for _ in range(3)]
    for process in processes:
        assert process.stdin
        process.stdin.write("g")
        process.stdin.flush()
    lines = [process.communicate()[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sum(line.count("building") for line in lines) == 1
    assert len({line[-1] for line in lines}) == 1
    assert leftovers(cache) == []


def test_what_a_killed_process_left_does_not_disturb_the_next(
    spawn: Callable[[str], subprocess.Popen[str]], files: CheckpointFiles, load: Load, cache: Path
) -> None:
    assert spawn("die").wait() == -signal.SIGKILL
    assert [Path(name).suffix for name in leftovers(cache)] == [".building"]
    assert_equal(load(), packed_in_memory(files, "int8"))
    assert leftovers(cache) == []


def test_who_waits_for_a_process_that_is_killed_makes_it(
    spawn: Callable[[str], subprocess.Popen[str]], files: CheckpointFiles, load: Load, builds: Builds
) -> None:
    builder = spawn("wait")
    assert builder.stdout
    assert builder.stdout.readline() == "building\n"
    with ThreadPoolExecutor() as threads:
        weights = threads.submit(load)
        builder.kill()
        assert_equal(weights.result(), packed_in_memory(files, "int8"))
    assert builds.count == 1


def test_remains_of_another_model_are_removed_unless_somebody_works_on_them(
    spawn: Callable[[str], subprocess.Popen[str]], load: Load, cache: Path
) -> None:
    assert spawn("die").wait() == -signal.SIGKILL
    load("bfloat16")
    assert leftovers(cache) == []
    builder = spawn("wait")
    assert builder.stdout
    assert builder.stdout.readline() == "building\n"
    load("float16")
    assert len(leftovers(cache)) == 1


# -- room --


def test_what_was_used_least_recently_is_removed_first(
    load: Load, builds: Builds, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load("float32")
    large = the_file(cache)
    large_bytes = large.stat().st_size
    large.unlink()
    paths = {}
    for age, name in enumerate(("float16", "bfloat16", "int8")):
        before = set(cache.glob("*.weights"))
        load(name)
        (paths[name],) = set(cache.glob("*.weights")) - before
        os.utime(paths[name], ns=(0, age))
    load("float16")  # used last now
    limit = large_bytes + paths["float16"].stat().st_size
    monkeypatch.setenv(weight_cache_room.LIMIT_VARIABLE, str(limit / 2**30))
    load("float32")
    assert sorted(cache.glob("*.weights")) == sorted([large, paths["float16"]])
    large.unlink()
    load("bfloat16")  # fits beside it
    assert paths["float16"].exists()


def test_what_another_process_uses_is_not_removed(
    spawn: Callable[[str], subprocess.Popen[str]], load: Load, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = spawn("use")
    assert user.stdout
    assert user.stdout.readline() == "building\n"
    assert len(user.stdout.readline()) == 65
    used = the_file(cache)
    load("float32")
    (large,) = set(cache.glob("*.weights")) - {used}
    monkeypatch.setenv(weight_cache_room.LIMIT_VARIABLE, str(large.stat().st_size / 2**30))
    large.unlink()
    load("float32")
    assert used.exists()
    large.unlink()
    user.kill()
    user.wait()
    load("float32")
    assert not used.exists()


def test_what_this_process_uses_is_not_removed(
    load: Load, builds: Builds, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = load("int8")
    mapped = load("int8")
    used = the_file(cache)
    load("float32")
    (large,) = set(cache.glob("*.weights")) - {used}
    monkeypatch.setenv(weight_cache_room.LIMIT_VARIABLE, str(large.stat().st_size / 2**30))
    for user in (weights, mapped):
        large.unlink()
        load("float32")
        assert used.exists()
        user.tensors.clear()


def test_a_model_larger_than_the_limit_is_not_cached(
    files: CheckpointFiles, load: Load, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(weight_cache_room.LIMIT_VARIABLE, "0")
    assert_equal(load(), packed_in_memory(files, "int8"))
    assert list(cache.glob("*.*")) == []
    assert "exceed the limit that ASYNCSCALE_WEIGHT_CACHE_GIB sets" in caplog.text


@pytest.mark.parametrize("stated", ["much", "nan", "-1"])
def test_a_limit_that_is_no_size_is_an_error(stated: str, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(weight_cache_room.LIMIT_VARIABLE, stated)
    with pytest.raises(ModelLoadError, match=f"ASYNCSCALE_WEIGHT_CACHE_GIB must be a number of GiB, got '{stated}'"):
        load()


# -- folders that cannot be used --


def test_without_a_usable_folder_weights_are_the_engines_own(
    files: CheckpointFiles, load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file")
    assert_equal(load(), packed_in_memory(files, "int8"))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "Not a directory" in record.getMessage()
    assert "ASYNCSCALE_CACHE" in record.getMessage()


def test_a_full_disk_is_noticed_before_anything_is_written_and_nothing_is_left(
    files: CheckpointFiles, load: Load, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fallocate(descriptor: int, start: int, size: int) -> None:
        if os.fstat(descriptor).st_dev == cache.stat().st_dev:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    ftruncate = os.ftruncate
    monkeypatch.setattr(
        os, "posix_fallocate", lambda fd, start, size: fallocate(fd, start, size) or ftruncate(fd, size)
    )
    assert_equal(load(), packed_in_memory(files, "int8"))
    assert "No space left on device" in caplog.text
    assert [path for path in cache.rglob("*") if path.is_file()] == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_can_only_be_read_is_used_if_it_has_the_file(
    load: Load, builds: Builds, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load()
    cache.chmod(0o555)
    try:
        load()
        assert builds.count == 1
        assert caplog.records == []
        load("bfloat16")
        assert "Permission denied" in caplog.text
    finally:
        cache.chmod(0o755)


def test_a_checkpoint_that_cannot_be_read_leaves_nothing(files: CheckpointFiles, load: Load, cache: Path) -> None:
    config = json.loads((Path(files.path) / "config.json").read_text())
    (Path(files.path) / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))
    with pytest.raises(ModelLoadError, match="has the shape"):
        load()
    assert leftovers(cache) == []
    assert list(cache.glob("*.weights")) == []


# -- content --


def test_a_model_that_is_replaced_under_its_name_gives_its_own_weights(
    files: CheckpointFiles, load: Load, builds: Builds
) -> None:
    load()
    path = Path(files.path) / "model.safetensors"
    stat = path.stat()
    write_checkpoint(path.parent, seed=1)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert_equal(load(), packed_in_memory(files, "int8"))
    assert builds.count == 2


class Hashes:
    """Counts how often a file is hashed."""

    def __init__(self) -> None:
        self.count = 0
        self._hash = content_digest.sha256_of

    def __call__(self, path: Path) -> str:
        self.count += 1
        return self._hash(path)


@pytest.fixture
def hashes(monkeypatch: pytest.MonkeyPatch) -> Hashes:
    counter = Hashes()
    monkeypatch.setattr(content_digest, "sha256_of", counter)
    return counter


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that were just written have not been changed for a while."""
    now = time.time_ns
    monkeypatch.setattr(content_digest.time, "time_ns", lambda: now() + 10_000_000_000)


@pytest.mark.usefixtures("later")
def test_a_file_that_has_not_changed_is_hashed_once(load: Load, hashes: Hashes) -> None:
    load()
    load()
    assert hashes.count == 1


def test_a_file_that_was_changed_just_before_is_hashed_again(load: Load, hashes: Hashes) -> None:
    load()
    load()
    assert hashes.count == 2


@pytest.mark.usefixtures("later")
def test_a_file_that_is_changed_in_place_is_hashed_again(
    files: CheckpointFiles, load: Load, hashes: Hashes, builds: Builds
) -> None:
    load()
    path = Path(files.path) / "model.safetensors"
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    load()
    assert hashes.count == builds.count == 2


@pytest.mark.usefixtures("later")
def test_a_memory_that_cannot_be_read_is_made_again(load: Load, hashes: Hashes, cache: Path) -> None:
    load()
    (memory,) = (cache / "digests").iterdir()
    memory.write_text("{")
    load()
    load()
    assert hashes.count == 2


def test_a_file_that_changes_while_it_is_packed_is_an_error_and_not_cached(
    files: CheckpointFiles, load: Load, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reading(*args: Any) -> Iterator[Any]:
        write_checkpoint(Path(files.path), seed=1)
        return read_weights(*args)

    monkeypatch.setattr(weight_cache, "read_weights", reading)
    with pytest.raises(ModelLoadError, match=r"model.safetensors was changed while it was read; start again"):
        load()
    assert list(cache.glob("*.weights")) == []


@pytest.mark.usefixtures("later")
def test_no_more_digests_are_remembered_than_useful(
    files: CheckpointFiles, load: Load, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content_digest, "_MOST_REMEMBERED", 2)
    for seed in range(4):
        write_checkpoint(Path(files.path), seed)
        load()
        (Path(files.path) / "model.safetensors").rename(Path(files.path) / f"{seed}.old")  # keeps its inode
    assert len(list((cache / "digests").iterdir())) == 2


def test_who_waits_goes_on_when_the_file_was_renamed_and_stays_locked(tmp_path: Path) -> None:
    """As where the builder maps what it built, for as long as it lives."""
    building = tmp_path / "x.building"
    began, ended = threading.Event(), threading.Event()

    def wait() -> None:
        began.set()
        with exclusive_file(building):
            ended.set()

    waiter = threading.Thread(target=wait, daemon=True)
    with exclusive_file(building) as descriptor:
        waiter.start()
        began.wait(10)
        building.rename(tmp_path / "x")
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        assert ended.wait(10)
        waiter.join(10)
