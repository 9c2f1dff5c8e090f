"""What a step's parts took, in Markdown beside what this machine can do at most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from asyncscale.bench.model_engine import PARTS, PYTHON_PARTS, MeasuredStep
from asyncscale.bench.model_work import StepWork, Work, total_work
from asyncscale.kernels.limits import Limits
from asyncscale.params import Sampling

_PYTHON_GOAL_MS = 0.3
PYTHON_BATCH = 32

# What the parts are called; those of experts, where a model has any.
_EXPERTS = {
    "router": "experts: router",
    "dispatch": "experts: tokens to experts",
    "experts_gate_up": "experts: gate and up",
    "experts_down": "experts: down",
    "combine": "experts: weighted sum",
}
_NAMES = {
    "qkv": "linear: qkv",
    "output": "linear: output",
    "gate_up": "linear: gate and up",
    "down": "linear: down",
    **_EXPERTS,
    "head": "linear: head",
    "attention": "attention",
    "norms": "norms",
    "rotary": "rotary, cache write",
    "activation": "activation, rounding",
    "calls": "calls, waking threads",
    "sampling": "sampling",
    "batch": "Python: the batch's arrays",
    "scheduling": "Python: scheduling",
    "messages": "Python: messages",
}


@dataclass(frozen=True, slots=True)
class Workload:
    """num_prompts prompts of prompt_length tokens at once. num_decodes: of the steps that count, those that decode so
    many sequences and nothing else; 0: those that compute prompts, together."""

    name: str
    num_prompts: int
    prompt_length: int
    num_decodes: int
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Measured:
    """Means of a workload. num_tokens: that a step makes, or of the prompt."""

    workload: Workload
    num_tokens: int
    context: float
    seconds: dict[str, float]
    works: dict[str, Work]

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def python_s(self) -> float:
        """All but the kernels and their calls."""
        return sum(self.seconds[part] for part in PYTHON_PARTS)


def summarize(workload: Workload, runs: Sequence[Sequence[MeasuredStep]], work: StepWork) -> Measured:
    """Means of the middle half, by how long they took, of `runs`, each of which is one step or several."""
    if not runs:
        raise ValueError(f"no step of {workload.name!r} was seen: let there be more steps")
    runs = sorted(runs, key=lambda run: sum(step.total_s for step in run))
    runs = runs[len(runs) // 4 : len(runs) - len(runs) // 4]
    steps = [step for run in runs for step in run]
    works = total_work(work.of(step.starts, step.counts, step.num_logits) for step in steps)
    return Measured(
        workload,
        int(sum(step.counts.sum() for step in runs[0])),
        float(np.mean([step.starts.mean() for step in steps])),
        {part: sum(step.seconds[part] for step in steps) / len(runs) for part in PARTS},
        {name: Work(w.operations / len(runs), w.num_bytes / len(runs), w.format) for name, w in works.items()},
    )


def table(measured: Measured, limits: Limits) -> str:
    """In Markdown: of each part its time, its share, and what it reaches of what the machine can do."""
    lines = [
        "| part | ms | share | GFLOP/s | of the most | GB/s | of the most | least time / time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for part, name in _NAMES.items():
        if part in _EXPERTS and "router" not in measured.works:
            continue
        seconds = measured.seconds[part]
        cells = [name, f"{1000 * seconds:.3f}", _percent(seconds / measured.total_s)]
        work = measured.works.get(part)
        lines.append(_line(cells + (["", "", "", "", ""] if work is None else _reached(work, seconds, limits))))
    lines.append(_line(["all", f"{1000 * measured.total_s:.3f}", "100 %", "", "", "", "", ""]))
    return "\n".join(lines)


def _reached(work: Work, seconds: float, limits: Limits) -> list[str]:
    if not seconds:
        return [""] * 5
    return [
        f"{work.operations / seconds / 1e9:.0f}",
        _percent(work.arithmetic_seconds(limits) / seconds),
        f"{work.num_bytes / seconds / 1e9:.1f}",
        _percent(work.num_bytes / limits.bytes_per_s / seconds),
        _percent(work.least_seconds(limits) / seconds),
    ]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def title(measured: Measured) -> str:
    where = f", {measured.context:.0f} tokens of context" if measured.workload.num_decodes else ""
    return (
        f"**{measured.workload.name}{where}: {1000 * measured.total_s:.2f} ms, "
        f"{measured.num_tokens / measured.total_s:,.0f} tokens/s**"
    )


def summary(measured: Sequence[Measured], work: StepWork, limits: Limits) -> str:
    """Of one token's decode, and of Python."""
    limit_s = work.weight_bytes / limits.bytes_per_s
    lines = [
        f"Limit of one token's decode: {work.weight_bytes / 1e6:.0f} MB of weights at "
        f"{limits.bytes_per_s / 1e9:.1f} GB/s are {1000 * limit_s:.2f} ms, {1 / limit_s:.0f} tokens/s."
    ]
    for one in measured:
        if one.workload.num_decodes == 1:
            share = _percent(limit_s / one.total_s)
            lines.append(f"Batch 1 with {one.context:.0f} tokens of context reaches {share} of it.")
        if one.workload.num_decodes == PYTHON_BATCH:
            milliseconds = 1000 * one.python_s
            met = "met" if milliseconds < _PYTHON_GOAL_MS else "missed"
            lines.append(
                f"Python of a step, all but the kernels ({one.workload.name}): {milliseconds:.3f} ms "
                f"(aim {_PYTHON_GOAL_MS} ms: {met})."
            )
    return "\n".join(lines)
