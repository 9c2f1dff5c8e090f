from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from asyncscale.config import CheckpointFiles
from asyncscale.errors import InvalidRequestError, ModelLoadError
from asyncscale.tokenization.codec import TextCodec
from asyncscale.tokenization.loading import load_codec

TEXTS = ["Hello world", "  two  spaces 12\n", "naïve 漢字 😀", "<s>in</s> text", "", "\ttabs\r\n"]
CHAT = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "Hello <s>"}]


@pytest.fixture(scope="module")
def backend() -> Tokenizer:
    """A byte-level BPE tokenizer that puts <s> before each text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, show_progress=False, special_tokens=["<s>", "</s>", "<turn>"]
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


@pytest.fixture
def folder(tmp_path: Path, backend: Tokenizer) -> Path:
    backend.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT})
    write(tmp_path / "config.json", {"model_type": "llama", "eos_token_id": 2})
    return tmp_path


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def change(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    write(path, {**(json.loads(path.read_text()) if path.exists() else {}), **values})


def load(folder: Path) -> TextCodec:
    return load_codec(CheckpointFiles(name="small", format="safetensors", path=str(folder)))


def as_it_is(folder: Path) -> None: ...


def objects_as_tokens(folder: Path) -> None:
    content = {"content": "<s>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    change(folder, "tokenizer_config.json", bos_token={"__type": "AddedToken", **content})


def add_flags_that_only_count_without_a_tokenizer_file(folder: Path) -> None:
    change(folder, "tokenizer_config.json", add_bos_token=False, add_eos_token=True)


def no_post_processor(folder: Path) -> None:
    change(folder, "tokenizer.json", post_processor=None)


def truncation_and_padding(folder: Path) -> None:
    truncation = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    change(folder, "tokenizer.json", truncation=truncation)


def template_file(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("file: " + CHAT)


def named_templates(folder: Path) -> None:
    templates = [{"name": "rag", "template": "no"}, {"name": "default", "template": CHAT}]
    change(folder, "tokenizer_config.json", chat_template=templates)


CHANGES = [
    as_it_is, objects_as_tokens, add_flags_that_only_count_without_a_tokenizer_file, no_post_processor,
    truncation_and_padding, template_file, named_templates,
]  # fmt: skip


@pytest.mark.parametrize("changed", CHANGES)
def test_a_folder_is_read_as_transformers_reads_it(folder: Path, changed: Callable[[Path], None]) -> None:
    from transformers import PreTrainedTokenizerFast

    changed(folder)
    codec, reference = load(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    for text in TEXTS:
        token_ids = codec.encode(text)
        assert token_ids == reference(text, truncation=False)["input_ids"]
        for skip in (True, False):
            assert codec.decode(token_ids, skip) == reference.decode(token_ids, skip_special_tokens=skip)
    assert codec.chat(MESSAGES) == reference.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert codec.encode_chat(MESSAGES) == reference.apply_chat_template(
        MESSAGES, return_dict=False, add_generation_prompt=True, truncation=False
    )
    assert codec.vocab_size == len(reference)


def test_the_template_of_an_old_json_file_is_used(folder: Path) -> None:
    write(folder / "chat_template.json", {"chat_template": "old: {{ messages[0].content }}"})
    assert load(folder).chat(MESSAGES) == "old: Hello <s>"


def test_special_tokens_may_be_in_a_file_of_their_own(folder: Path) -> None:
    write(folder / "tokenizer_config.json", {"chat_template": CHAT})
    write(folder / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": {"content": "<turn>"}})
    codec = load(folder)
    assert codec.chat(MESSAGES) == "<s>[user]Hello <s><turn>"
    assert codec.eos_token_ids == {2}


@pytest.mark.parametrize(
    ("generation_config", "expected"),
    [
        (None, {1, 2}),  # config.json's, and the tokenizer's </s>
        ({"eos_token_id": 7}, {1, 7}),
        ({"eos_token_id": [7, 8]}, {1, 7, 8}),
        ({"temperature": 1.0}, {1, 2}),
    ],
)
def test_eos_tokens_are_collected(folder: Path, generation_config: Any, expected: set[int]) -> None:
    if generation_config is not None:
        write(folder / "generation_config.json", generation_config)
    assert load(folder).eos_token_ids == expected


def test_the_checkpoints_own_sampling_defaults_are_taken(folder: Path) -> None:
    assert load(folder).generation_defaults == {}
    sampling = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0, "repetition_penalty": 1.1}
    write(folder / "generation_config.json", {**sampling, "do_sample": True, "max_length": 20, "pad_token_id": 0})
    assert load(folder).generation_defaults == sampling


def test_a_folder_with_only_a_tokenizer_file_will_do(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    (folder / "config.json").unlink()
    codec = load(folder)
    assert codec.eos_token_ids == frozenset()
    assert codec.encode("Hello")[0] == 0
    with pytest.raises(InvalidRequestError, match="the model small has no chat template"):
        codec.chat(MESSAGES)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer.json", '{"model": 5}', "cannot read the tokenizer"),
        ("tokenizer.json", None, "cannot read the tokenizer"),
        ("tokenizer_config.json", "[]", "holds a JSON list"),
        ("generation_config.json", '{"temperature": "hot"}', "temperature of .* must be a number, not 'hot'"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id of .* must be an integer"),
    ],
)
def test_a_damaged_file_is_named(folder: Path, name: str, content: str | None, reason: str) -> None:
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(ModelLoadError, match=reason):
        load(folder)


def test_text_that_is_not_unicode_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be encoded"):
        load(folder).encode("\ud800")


def test_words_that_a_space_does_not_change_are_banned_once(folder: Path) -> None:
    codec = load(folder)
    sequences = codec.encode_bad_words(["Hello", "q"])
    assert [codec.decode(sequence) for sequence in sequences] == ["Hello", "q"]
