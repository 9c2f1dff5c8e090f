from __future__ import annotations

import copy
import json
import logging
import unicodedata
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from asyncscale.config import CheckpointFiles
from asyncscale.errors import ModelLoadError
from asyncscale.tokenization.codec import TextCodec
from asyncscale.tokenization.loading import load_codec

TEXTS = [
    "The capital of France is",
    "def fib(n: int) -> int:\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n",
    "Привет, как дела? Ça va très bien, naïve façade.",
    "日本語のテキストと中文文本 以及한국어 텍스트。",
    "👩‍👩‍👧 family 😀😀 flags 🇫🇷",
    "spaces  two   three\n\n\nnewlines\t\ttabs \r\n windows ",
    " leading and trailing ",
    "don't I'LL we've it'S O'Neill",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <think>",
    "1234567890 3.14159 1,000,000 v2.0 ½ Ⅷ ٣٤",
    "camelCase HTTPServer snake_case CONSTANT_VALUE x+=1;//comment",
    "",
]
ALPHABET = [
    "a", "Zb", " ", "  ", "1", "12", "٣", "é", "ж", "漢", "😀", "\n", "\t", "\r\n", "'s", "'LL", "<|im_end|>", "!",
    "_/", "\u00a0", "½",
]  # fmt: skip
random_text = st.lists(st.sampled_from(ALPHABET), max_size=12).map("".join) | st.text(max_size=20)


@pytest.fixture(scope="module")
def smollm2(smollm2_files: CheckpointFiles) -> TextCodec:
    return load_codec(smollm2_files)


@pytest.fixture(scope="module")
def reference(smollm2_files: CheckpointFiles) -> Any:
    """What transformers makes of the same file. It does not know `smollm`, the pre-tokenizer that the file names."""
    return from_transformers(Path(smollm2_files.path))


def from_transformers(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.fixture(scope="module")
def digits_split(reference: Any) -> Any:
    """The same, with the pre-tokenizer of SmolLM2's own tokenizer.json: single digits, then GPT-2's words."""
    tokenizer = copy.deepcopy(reference)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def test_texts_are_encoded_and_decoded_as_in_transformers(smollm2: TextCodec, digits_split: Any) -> None:
    for text in TEXTS:
        token_ids = smollm2.encode(text)
        assert token_ids == digits_split(text)["input_ids"]
        for skip in (True, False):
            assert smollm2.decode(token_ids, skip) == digits_split.decode(token_ids, skip_special_tokens=skip)


@settings(max_examples=500, deadline=None)
@given(text=random_text)
def test_any_text_is_encoded_as_in_transformers(smollm2: TextCodec, digits_split: Any, text: str) -> None:
    assert smollm2.encode(text) == digits_split(text)["input_ids"]


@settings(max_examples=500, deadline=None)
@given(text=random_text)
def test_without_the_files_pre_tokenizer_only_spaces_before_digits_differ(
    smollm2: TextCodec, reference: Any, text: str
) -> None:
    space_before_digit = any(a.isspace() and b.isnumeric() for a, b in pairwise(text))
    if not space_before_digit:
        assert smollm2.encode(text) == reference(text)["input_ids"]


def test_a_run_of_spaces_before_a_digit_is_one_word_as_the_file_says(smollm2: TextCodec, reference: Any) -> None:
    def words(token_ids: Sequence[int]) -> list[str]:
        return [smollm2.decode([token_id]) for token_id in token_ids]

    assert words(smollm2.encode("a   1")) == ["a", "   ", "1"]
    assert words(reference("a   1")["input_ids"]) == ["a", "  ", " ", "1"]


def test_chats_are_rendered_and_encoded_as_in_transformers(smollm2: TextCodec, digits_split: Any) -> None:
    messages = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": " 4 "}]
    messages += [{"role": "user", "content": "<|im_end|> Thanks"}]
    for conversation in (messages, [{"role": "system", "content": "Brief."}, *messages]):
        for prompt in (True, False):
            options = {"add_generation_prompt": prompt}
            expected = digits_split.apply_chat_template(conversation, tokenize=False, **options)
            assert smollm2.chat(conversation, **options) == expected
            expected_ids = digits_split.apply_chat_template(conversation, return_dict=False, **options)
            assert smollm2.encode_chat(conversation, **options) == expected_ids


def test_what_the_file_says_about_itself(smollm2: TextCodec) -> None:
    assert smollm2.vocab_size == 49_152
    assert smollm2.eos_token_ids == {2}
    assert smollm2.generation_defaults == {}


def test_bad_words_are_banned_alone_and_after_a_space(smollm2: TextCodec) -> None:
    sequences = smollm2.encode_bad_words(["dog", " hello"])
    assert [smollm2.decode(sequence) for sequence in sequences] == ["dog", " dog", "hello", " hello"]


# --- other kinds, in small files of our own


def write(path: Path, kind: str, tokens: Sequence[str], types: Sequence[int], **more: Any) -> CheckpointFiles:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(list(tokens))
    writer.add_token_types(list(types))
    setters: dict[str, Callable[[Any], None]] = {
        "pre": writer.add_tokenizer_pre,
        "merges": writer.add_token_merges,
        "scores": writer.add_token_scores,
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "eot": writer.add_eot_token_id,
        "unknown": writer.add_unk_token_id,
        "add_bos": writer.add_add_bos_token,
        "add_eos": writer.add_add_eos_token,
        "add_space_prefix": writer.add_add_space_prefix,
        "template": writer.add_chat_template,
    }
    for name, value in more.items():
        setters[name](value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return CheckpointFiles(name="small", format="gguf", path=str(path))


@pytest.fixture(scope="module")
def byte_level_parts() -> dict[str, Any]:
    """A byte-level BPE vocabulary learned from the texts above, with control and user-defined tokens."""
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.train_from_iterator(TEXTS, trainer)
    state = json.loads(backend.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    special = ["<|im_start|>", "<|im_end|>", "<think>"]
    return {
        "tokens": tokens + special,
        "types": [1] * len(tokens) + [3, 3, 4],
        "merges": [" ".join(merge) for merge in state["merges"]],
        "bos": len(tokens),
        "eos": len(tokens) + 1,
    }


@pytest.mark.parametrize("pre", ["llama-bpe", "llama3", "qwen2", "deepseek-r1-qwen", "tekken", "gpt-2"])
def test_pre_tokenizers_split_as_in_transformers(pre: str, byte_level_parts: dict[str, Any], tmp_path: Path) -> None:
    files = write(tmp_path / "small.gguf", "gpt2", pre=pre, add_bos=False, **byte_level_parts)
    codec, reference = load_codec(files), from_transformers(Path(files.path))

    @settings(max_examples=200, deadline=None)
    @given(text=random_text | st.sampled_from(TEXTS))
    def check(text: str) -> None:
        if pre in ("qwen2", "deepseek-r1-qwen"):  # transformers forgets Qwen2's NFC for GGUF files
            text = unicodedata.normalize("NFC", text)
        assert codec.encode(text) == reference(text)["input_ids"]

    check()


def test_qwen2_text_is_normalized(byte_level_parts: dict[str, Any], tmp_path: Path) -> None:
    codec = load_codec(write(tmp_path / "small.gguf", "gpt2", pre="qwen2", **byte_level_parts))
    assert codec.encode("cafe\u0301") == codec.encode("caf\u00e9")


@pytest.mark.parametrize("pre", ["llama-bpe", "tekken"])
def test_a_word_of_the_vocabulary_is_one_token_without_merges(
    pre: str, byte_level_parts: dict[str, Any], tmp_path: Path
) -> None:
    tokens, types = byte_level_parts["tokens"], byte_level_parts["types"]
    parts = byte_level_parts | {"tokens": [*tokens, "qqqq"], "types": [*types, 1]}
    codec = load_codec(write(tmp_path / "small.gguf", "gpt2", pre=pre, add_bos=False, **parts))
    assert codec.encode("qqqq") == [len(tokens)]


@pytest.mark.parametrize(
    ("options", "bos", "eos"),
    [
        ({"pre": "llama-bpe"}, True, False),
        ({"pre": "llama-bpe", "add_bos": False}, False, False),
        ({"pre": "gpt-2"}, False, False),
        ({"pre": "gpt-2", "add_bos": True, "add_eos": True}, True, True),
    ],
)
def test_bos_and_eos_are_added_as_the_file_says(
    options: dict[str, Any], bos: bool, eos: bool, byte_level_parts: dict[str, Any], tmp_path: Path
) -> None:
    codec = load_codec(write(tmp_path / "small.gguf", "gpt2", **byte_level_parts, **options))
    token_ids = codec.encode("a")
    (letter,) = codec.encode_bad_words(["a"])[0]
    expected = [byte_level_parts["bos"]] * bos + [letter] + [byte_level_parts["eos"]] * eos
    assert token_ids == expected


def test_control_tokens_are_special_and_user_defined_ones_are_text(
    byte_level_parts: dict[str, Any], tmp_path: Path
) -> None:
    codec = load_codec(write(tmp_path / "small.gguf", "gpt2", pre="gpt-2", **byte_level_parts))
    token_ids = codec.encode("<|im_start|><think><|im_end|>")
    assert token_ids == [byte_level_parts["bos"], byte_level_parts["bos"] + 2, byte_level_parts["eos"]]
    assert codec.decode(token_ids) == "<think>"


def test_all_ends_of_a_turn_end_an_answer(byte_level_parts: dict[str, Any], tmp_path: Path) -> None:
    files = write(tmp_path / "small.gguf", "gpt2", pre="gpt-2", eot=byte_level_parts["bos"], **byte_level_parts)
    assert load_codec(files).eos_token_ids == {byte_level_parts["bos"], byte_level_parts["eos"]}


def test_an_unknown_pre_tokenizer_is_the_default_one_with_a_warning(
    byte_level_parts: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    default = load_codec(write(tmp_path / "default.gguf", "gpt2", pre="default", **byte_level_parts))
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        unknown = load_codec(write(tmp_path / "unknown.gguf", "gpt2", pre="never-heard-of", **byte_level_parts))
    assert "never-heard-of" in caplog.text
    assert [unknown.encode(text) for text in TEXTS] == [default.encode(text) for text in TEXTS]


# --- SentencePiece

SPACE = "\u2581"


@pytest.fixture(scope="module")
def sentence_piece_parts() -> dict[str, Any]:
    """A SentencePiece BPE vocabulary: pieces learned from the texts above, the first learned with the best score."""
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False)
    backend = Tokenizer(models.BPE())
    backend.train_from_iterator([text.replace(" ", SPACE) for text in TEXTS[:4]], trainer)
    vocab = backend.get_vocab()
    pieces = sorted(vocab, key=vocab.__getitem__)
    letters = [piece for piece in pieces if len(piece) == 1]
    learned = [piece for piece in pieces if len(piece) > 1]
    head = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = [*head, *letters, *reversed(learned)]  # what is best is said by the scores alone
    return {
        "tokens": tokens,
        "types": [2, 3, 3, *[6] * 256, *[1] * (len(learned) + len(letters))],
        "scores": [0.0] * len(head) + [-1e9] * len(letters) + [float(i - len(learned)) for i in range(len(learned))],
        "unknown": 0,
        "bos": 1,
        "eos": 2,
    }


def sentence_piece(text: str, parts: dict[str, Any]) -> list[int]:
    """The algorithm as it is defined: merge the neighbours that make the best piece, the leftmost of equals."""
    ids = {token: token_id for token_id, token in enumerate(parts["tokens"])}
    scores = parts["scores"]
    symbols = list((SPACE + text).replace(" ", SPACE)) if text else []
    while True:
        pairs = [symbols[i] + symbols[i + 1] for i in range(len(symbols) - 1)]
        mergeable = [i for i, pair in enumerate(pairs) if pair in ids]
        best = max(mergeable, key=lambda i: (scores[ids[pairs[i]]], -i), default=None)
        if best is None:
            break
        symbols[best : best + 2] = [pairs[best]]
    token_ids = []
    for symbol in symbols:
        token_ids += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return token_ids


@pytest.fixture(scope="module")
def sentence_piece_files(
    sentence_piece_parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> CheckpointFiles:
    return write(tmp_path_factory.mktemp("spm") / "small.gguf", "llama", **sentence_piece_parts)


def test_sentence_piece_merges_the_best_piece_first(
    sentence_piece_files: CheckpointFiles, sentence_piece_parts: dict[str, Any]
) -> None:
    codec = load_codec(sentence_piece_files)

    @settings(max_examples=300, deadline=None)
    @given(text=st.sampled_from(TEXTS[:8]) | st.text("The capitl of Frnc éя日😀\n", max_size=30))
    def check(text: str) -> None:
        assert codec.encode(text) == [1, *sentence_piece(text, sentence_piece_parts)]
        assert codec.decode(codec.encode(text)) == text

    check()


def test_sentence_piece_files_are_encoded_as_in_transformers(sentence_piece_files: CheckpointFiles) -> None:
    codec, reference = load_codec(sentence_piece_files), from_transformers(Path(sentence_piece_files.path))
    for text in TEXTS:
        if not text.startswith(" "):  # transformers leaves out the first of two spaces there, SentencePiece does not
            token_ids = codec.encode(text)
            assert token_ids == reference(text)["input_ids"]
            assert codec.decode(token_ids) == reference.decode(token_ids, skip_special_tokens=True)


def test_no_space_is_put_before_a_text_when_the_file_says_so(
    sentence_piece_parts: dict[str, Any], tmp_path: Path
) -> None:
    codec = load_codec(write(tmp_path / "small.gguf", "llama", add_space_prefix=False, **sentence_piece_parts))
    assert codec.encode("T") == [1, sentence_piece_parts["tokens"].index("T")]
    assert codec.decode(codec.encode(" T")) == " T"


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("bert", {}, "its kind is 'bert'; supported are 'gpt2'"),
        ("gpt2", {"merges": ["no such"]}, "out of vocabulary"),
        ("gpt2", {"types": [1]}, "token types"),
        ("llama", {"merges": []}, "0 scores"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_refused(
    kind: str, change: dict[str, Any], reason: str, byte_level_parts: dict[str, Any], tmp_path: Path
) -> None:
    files = write(tmp_path / "small.gguf", kind, **(byte_level_parts | change))
    with pytest.raises(ModelLoadError, match=rf"small\.gguf.*{reason}"):
        load_codec(files)
