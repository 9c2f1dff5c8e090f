"""`python -m asyncscale.bench model`: what each part of a step takes, beside what this machine can do at most."""

from __future__ import annotations

import argparse

import numpy as np

from asyncscale.bench.model_engine import Int32, MeasuredEngine, measured_engine
from asyncscale.bench.model_report import PYTHON_BATCH, Measured, Workload, summarize, summary, table, title
from asyncscale.bench.model_work import StepWork
from asyncscale.bench.workload import corpus
from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.checkpoint.resolve import resolve_model
from asyncscale.config import CheckpointFiles, EngineConfig
from asyncscale.errors import ModelLoadError
from asyncscale.kernels.library import Library, load_library
from asyncscale.kernels.limits import PLAIN_FORMATS, Limits, best_limits, measure_limits
from asyncscale.model.native_decoder import formats
from asyncscale.params import Sampling
from asyncscale.tokenization.loading import load_codec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `model`."""
    parser.add_argument("--model", default="smollm2-135m-instruct", help="any model (%(default)s)")
    parser.add_argument("--dtype", default="auto", help="of weights and KV cache (%(default)s)")
    parser.add_argument("--quantization", choices=("int8",), help="of weights")
    parser.add_argument("--threads", type=int, help="that compute (as many as there are cores)")
    parser.add_argument("--batches", type=_integers, default=[1, 8, 32, 64], help="sequences decoded (1,8,32,64)")
    parser.add_argument("--context", type=int, default=256, help="tokens of each sequence decoded (%(default)s)")
    parser.add_argument("--long-context", type=int, default=2048, help="of one more alone (%(default)s)")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of the prompt computed (%(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="decoded of each batch (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark; returns the exit code."""
    library = load_library()
    if library is None:
        raise ModelLoadError("the native kernels are not built; install asyncscale where there is a C++ compiler")
    files = resolve_model(arguments.model)
    config = EngineConfig(
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        threads_per_engine=arguments.threads,
        max_num_seqs=max(arguments.batches),
        max_num_batched_tokens=max(512, *arguments.batches),
        speculation="off",
    )
    work = StepWork(ModelConfig.load(files), *formats(config, library))
    with measured_engine(files, config) as engine:
        known = {*PLAIN_FORMATS, *formats(config, library)}
        limits = measure_limits(library, engine.decoder.num_threads, known)
        text = np.array(load_codec(files).encode(corpus()), np.int32)
        workloads = _workloads(arguments, engine.max_model_len)
        measured = [_measure(engine, workload, work, text) for workload in workloads]
        # Again: whatever else the machine did may have been in the way.
        limits = best_limits(limits, measure_limits(library, engine.decoder.num_threads, known))
    _print_header(files, config, library, limits)
    for one in measured:
        print(f"\n{title(one)}\n\n{table(one, limits)}")
    print(f"\n{summary(measured, work, limits)}")
    return 0


def _workloads(arguments: argparse.Namespace, max_model_len: int) -> list[Workload]:
    steps = arguments.steps
    longest = max_model_len - steps - 3
    prompt = min(arguments.prompt, longest)
    workloads = [Workload(f"prefill of {prompt} tokens", 1, prompt, 0, Sampling(max_tokens=2))]
    for batch in arguments.batches:
        # The first ones decode while the others' prompts are computed.
        num_chunks = batch * arguments.context // 512 + 1
        context = min(arguments.context, longest - num_chunks)
        sampling = Sampling(max_tokens=steps + num_chunks + 2)
        workloads.append(Workload(f"decode, batch {batch}", batch, context, batch, sampling))
        if batch == PYTHON_BATCH:
            sampling = Sampling(max_tokens=steps + num_chunks + 2, temperature=0.8, top_p=0.95)
            workloads.append(Workload(f"decode, batch {batch}, top_p 0.95", batch, context, batch, sampling))
    if arguments.long_context:
        context = min(arguments.long_context, longest)
        workloads.append(Workload("decode, batch 1", 1, context, 1, Sampling(max_tokens=steps + 2)))
    return workloads


def _measure(engine: MeasuredEngine, workload: Workload, work: StepWork, text: Int32) -> Measured:
    rng = np.random.default_rng(0)

    def prompts() -> list[Int32]:
        starts = rng.integers(len(text) - workload.prompt_length, size=workload.num_prompts)
        return [text[start : start + workload.prompt_length] for start in starts]

    if workload.num_decodes:
        steps = engine.run(prompts(), workload.sampling)
        runs = [[step] for step in steps if step.num_decodes == len(step.counts) == workload.num_decodes]
    else:
        runs = [engine.run(prompts(), workload.sampling) for _ in range(6)]
        runs = [[step for step in steps if step.num_decodes == 0] for steps in runs]
    return summarize(workload, runs, work)


def _print_header(files: CheckpointFiles, config: EngineConfig, library: Library, limits: Limits) -> None:
    weights, cache = formats(config, library)
    print(f"{files.name}, weights {weights}, KV cache {cache}, {limits.num_threads} threads, {library.isa}")
    peaks = ", ".join(f"{peak / 1e9:,.0f} GFLOP/s in {name}" for name, peak in limits.operations_per_s.items())
    print(f"This machine at most: {limits.bytes_per_s / 1e9:.1f} GB/s read from memory, {peaks}.")


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
