"""What a benchmark asks for and when: requests with ShareGPT-like lengths over real text, or a file of prompts."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

_MIN_LENGTH, _MAX_LENGTH = 4, 1024
_PROMPT_SIGMA, _OUTPUT_SIGMA = 1.0, 0.8
_CORPUS_FILES, _CORPUS_CHARACTERS = 80, 600_000


@dataclass(frozen=True, slots=True)
class WorkloadRequest:
    """arrival_s: seconds from the start of the run. sampling: keyword arguments of `generate`."""

    arrival_s: float
    prompt: str | list[int]
    num_prompt_tokens: int
    sampling: dict[str, Any]


def corpus() -> str:
    """600,000 characters of text that every machine with the same Python has: the standard library's source."""
    folder = Path(os.__file__).parent
    paths = sorted(str(path) for path in folder.rglob("*.py"))[:_CORPUS_FILES]
    text = "\n".join(Path(path).read_text(encoding="utf8", errors="ignore") for path in paths)
    return text[:_CORPUS_CHARACTERS]


def lognormal_requests(
    token_ids: Sequence[int], num_prompts: int, rate: float, mean_in: float, mean_out: float, seed: int
) -> list[WorkloadRequest]:
    """Requests with lognormal numbers of prompt and output tokens, greedy, none ended early.

    token_ids: at least 1,025, of which prompts are slices. rate: mean requests per second of a Poisson process;
    infinity is all at once. mean_in, mean_out: tokens, before they are cut to 4..1024. The same arguments give the same
    requests.
    """
    rng = random.Random(seed)
    requests, arrival = [], 0.0
    for _ in range(num_prompts):
        prompt_length = _lognormal(rng, mean_in, _PROMPT_SIGMA)
        output_length = _lognormal(rng, mean_out, _OUTPUT_SIGMA)
        start = rng.randrange(len(token_ids) - prompt_length)
        sampling = {"max_tokens": output_length, "ignore_eos": True, "temperature": 0.0}
        prompt = list(token_ids[start : start + prompt_length])
        requests.append(WorkloadRequest(arrival, prompt, prompt_length, sampling))
        arrival += _pause(rng, rate)
    return requests


def file_requests(
    path: Path, num_prompts: int | None, rate: float, seed: int, count_tokens: Callable[[str], int]
) -> list[WorkloadRequest]:
    """The first `num_prompts` (None: all) requests of a file.

    Each line is a JSON object: "prompt", text or token ids, and any sampling parameters, such as "max_tokens".
    count_tokens: of a text.
    Raises ValueError, naming the line, and OSError.
    """
    rng = random.Random(seed)
    requests, arrival = [], 0.0
    for prompt, sampling in islice(_read_prompts(path), num_prompts):
        num_prompt_tokens = count_tokens(prompt) if isinstance(prompt, str) else len(prompt)
        requests.append(WorkloadRequest(arrival, prompt, num_prompt_tokens, sampling))
        arrival += _pause(rng, rate)
    if not requests:
        raise ValueError(f"{path} has no prompts")
    return requests


def _read_prompts(path: Path) -> Iterator[tuple[str | list[int], dict[str, Any]]]:
    with path.open(encoding="utf8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str | list):
                raise ValueError(f'{path}, line {number}: expected {{"prompt": text or token ids, ...}}')
            yield entry.pop("prompt"), entry


def _lognormal(rng: random.Random, mean: float, sigma: float) -> int:
    mu = math.log(mean) - sigma * sigma / 2
    return max(_MIN_LENGTH, min(_MAX_LENGTH, int(rng.lognormvariate(mu, sigma))))


def _pause(rng: random.Random, rate: float) -> float:
    return 0.0 if math.isinf(rate) else rng.expovariate(rate)
