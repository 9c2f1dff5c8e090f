"""`python -m asyncscale.bench quality`: what bfloat16 and int8 cost in quality, on real text."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from asyncscale.bench.local_model import LocalModel
from asyncscale.checkpoint.resolve import resolve_model
from asyncscale.tokenization.loading import load_codec

_VARIANTS = ("float32", "bfloat16", "int8")
_PAIRS = (("bfloat16", "float32"), ("int8", "float32"), ("int8", "bfloat16"))
_CHUNK = 128  # positions whose logits are held at once, of every variant

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]


@dataclass(slots=True)
class Difference:
    """Between two variants. divergences: Kullback-Leibler's of each position, in nats. num_equal: of greedy tokens
    before the first that differs, of each prompt."""

    divergences: list[float] = field(default_factory=list)
    same_first: list[bool] = field(default_factory=list)
    num_equal: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Quality:
    """surprises: by variant, minus the log-probability of each token of the text. differences: (variant, reference)."""

    num_tokens: int = 0
    surprises: dict[str, list[float]] = field(default_factory=dict)
    differences: dict[tuple[str, str], Difference] = field(default_factory=dict)

    def perplexity(self, variant: str) -> float:
        return float(np.exp(np.mean(self.surprises[variant])))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `quality`."""
    parser.add_argument("--model", default="smollm2-135m-instruct", help="any model (%(default)s)")
    parser.add_argument("--text", type=Path, help="a file (the documentation that is part of Python: help('topics'))")
    parser.add_argument("--tokens", type=int, default=16_384, help="of the text, at most (%(default)s)")
    parser.add_argument("--window", type=int, default=1024, help="tokens seen together (%(default)s)")
    parser.add_argument("--prompts", type=int, default=20, help="of greedy texts, from the same text (%(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="of each prompt (%(default)s)")
    parser.add_argument("--output-tokens", type=int, default=128, help="of each greedy text (%(default)s)")
    parser.add_argument("--threads", type=int, help="that compute (as many as there are cores)")


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark; returns the exit code."""
    files = resolve_model(arguments.model)
    token_ids = np.array(load_codec(files).encode(_text(arguments.text)), np.int32)
    models = {
        "float32": LocalModel(files, "float32", None, arguments.threads),
        "bfloat16": LocalModel(files, "bfloat16", None, arguments.threads),
        "int8": LocalModel(files, "bfloat16", "int8", arguments.threads),
    }
    window = min(arguments.window, models["float32"].max_model_len)
    windows = list(_windows(token_ids[: arguments.tokens], window))
    step = max((len(token_ids) - arguments.prompt_tokens) // arguments.prompts, 1)
    starts = range(0, len(token_ids) - arguments.prompt_tokens, step)[: arguments.prompts]
    prompts = [token_ids[start : start + arguments.prompt_tokens] for start in starts]
    quality = measure(models, windows, prompts, arguments.output_tokens)
    source = arguments.text or "Python's documentation"
    print(
        f"{files.name}; {quality.num_tokens:,} tokens of {source} in windows of {window}; {len(prompts)} greedy texts\n"
    )
    print(table(quality, arguments.output_tokens))
    return 0


def measure(
    models: dict[str, LocalModel], windows: Sequence[Int32], prompts: Sequence[Int32], num_output_tokens: int
) -> Quality:
    """models: by variant, of equal weights. windows: texts, each seen by itself, of at least two tokens."""
    quality = Quality(differences={pair: Difference() for pair in _PAIRS})
    quality.surprises = {variant: [] for variant in models}
    for window in windows:
        _compare_window(models, window, quality)
    texts = {variant: model.greedy(prompts, num_output_tokens) for variant, model in models.items()}
    for (variant, reference), difference in quality.differences.items():
        difference.num_equal = list(map(num_equal, texts[variant], texts[reference]))
    return quality


def _compare_window(models: dict[str, LocalModel], window: Int32, quality: Quality) -> None:
    """A part of the window at a time: logits are large."""
    streams = {variant: model.logits(window, _CHUNK) for variant, model in models.items()}
    for begin in range(0, len(window), _CHUNK):
        log_probabilities = {variant: log_softmax(next(stream)) for variant, stream in streams.items()}
        following = window[begin + 1 : begin + _CHUNK + 1]
        quality.num_tokens += len(following)
        for variant, values in log_probabilities.items():
            quality.surprises[variant] += (-values[np.arange(len(following)), following]).tolist()
        for (variant, reference), difference in quality.differences.items():
            ours, theirs = log_probabilities[variant], log_probabilities[reference]
            difference.divergences += (np.exp(theirs) * (theirs - ours)).sum(1).tolist()
            difference.same_first += (ours.argmax(1) == theirs.argmax(1)).tolist()


def log_softmax(logits: Float32) -> npt.NDArray[np.float64]:
    """Of each row."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(1, keepdims=True))
    return shifted


def num_equal(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    pairs = zip(first, second, strict=True)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), len(first))


def table(quality: Quality, num_output_tokens: int) -> str:
    """In Markdown."""
    lines = [
        "| weights | perplexity | beside | KL divergence, nats | same most likely token | equal greedy tokens, "
        f"of {num_output_tokens} |",
        "|---|---|---|---|---|---|",
        f"| float32 | {quality.perplexity('float32'):.3f} | | | | |",
    ]
    for (variant, reference), difference in quality.differences.items():
        lines.append(
            f"| {variant} | {quality.perplexity(variant):.3f} | {reference} | {np.mean(difference.divergences):.5f} "
            f"| {100 * np.mean(difference.same_first):.1f} % | {np.mean(difference.num_equal):.0f} |"
        )
    return "\n".join(lines)


def _windows(token_ids: Int32, size: int) -> Iterator[Int32]:
    for start in range(0, len(token_ids), size):
        if len(token_ids) - start > 1:
            yield token_ids[start : start + size]


def _text(path: Path | None) -> str:
    """What is to be measured with; without a file, what every Python has, of the same version the same."""
    if path is not None:
        return path.read_text(encoding="utf8")
    from pydoc_data.topics import topics

    return "\n".join(text for _, text in sorted(topics.items()))
