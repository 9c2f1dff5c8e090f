"""The decoder against transformers, through the runner: same greedy tokens and log-probabilities, however batched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from asyncscale.kernels.library import load_library
from asyncscale.model import decoder

NUM_TOKENS = 40
PROMPT_LENGTHS = (1, 19, 70, 45)


def _scaled(rope_type: str, **parameters: object) -> dict[str, Any]:
    """RoPE scaling of a context of 64 tokens, which prompts and output exceed."""
    return {"max_position_embeddings": 64, "rope_parameters": {"rope_type": rope_type, "rope_theta": 1e4} | parameters}


_YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3}
_OLMOE = {"eos_token_id": None}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "seed": 1}),
    "llama-mha": ("Llama", {"num_key_value_heads": 4, "num_hidden_layers": 2}),
    "llama-mqa-wide-heads": ("Llama", {"num_key_value_heads": 1, "head_dim": 32}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-theta": ("Llama", {"seed": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}),
    "llama-linear": ("Llama", _scaled("linear", factor=4.0) | {"max_position_embeddings": 256}),
    "llama-dynamic": ("Llama", _scaled("dynamic", factor=4.0)),
    "llama-llama3": (
        "Llama",
        _scaled("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
        | {"max_position_embeddings": 512},
    ),
    "llama-yarn": ("Llama", _scaled("yarn", **_YARN)),
    "llama-yarn-mscale": (
        "Llama",
        _scaled("yarn", **_YARN, mscale=0.7, mscale_all_dim=1.0, beta_fast=16, truncate=False),
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 9, "head_dim": 32}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen2-tied-yarn": ("Qwen2", {"tie_word_embeddings": True} | _scaled("yarn", **_YARN)),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3-tied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True}),
    "qwen3-window": (
        "Qwen3",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 5}),
    "mixtral-window": ("Mixtral", {"num_local_experts": 8, "sliding_window": 9, "tie_word_embeddings": True}),
    "mixtral-one-of-one": ("Mixtral", {"num_local_experts": 1, "num_experts_per_tok": 1}),
    "qwen3-moe": ("Qwen3Moe", _EXPERTS | {"head_dim": 32, "moe_intermediate_size": 40, "seed": 8}),
    "qwen3-moe-normalized": (
        "Qwen3Moe",
        _EXPERTS | {"norm_topk_prob": True, "moe_intermediate_size": 120, "attention_bias": True},
    ),
    "qwen3-moe-with-plain-layers": (
        "Qwen3Moe",
        _EXPERTS
        | {"num_hidden_layers": 5, "decoder_sparse_step": 2, "mlp_only_layers": [3], "moe_intermediate_size": 32}
        | {"use_sliding_window": True, "sliding_window": 11},
    ),
    "olmoe": ("Olmoe", _EXPERTS | _OLMOE),
    "olmoe-limited": ("Olmoe", _EXPERTS | _OLMOE | {"clip_qkv": 0.7, "norm_topk_prob": True, "attention_bias": True}),
}


@pytest.fixture(params=["native", "torch"])
def either_decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs with the native kernels, and without."""
    if request.param == "torch":
        monkeypatch.setattr(decoder, "load_library", lambda: None)
    elif load_library() is None:
        pytest.skip("the kernels were not built")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = np.random.default_rng(1)
    return [generator.integers(0, 300, length).tolist() for length in PROMPT_LENGTHS]


def _reference(model: Any, prompt: list[int]) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """Greedy tokens, their log-probabilities, those of the prompt's tokens from the second on."""
    with torch.no_grad():
        _forget_lengths(model)
        of_prompt = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
        _forget_lengths(model)
        output = model.generate(
            torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    tokens = output.sequences[0, len(prompt) :]
    logits = torch.cat(output.logits)
    first, second = logits.topk(2).values.T
    assert (first - second).min() > 1e-4, "a near tie: the comparison of tokens would mean nothing"
    assert len(set(tokens.tolist())) > NUM_TOKENS // 4, "the output does not vary"
    chosen = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return tokens.tolist(), chosen, of_prompt.gather(1, torch.tensor(prompt[1:], dtype=torch.long)[:, None])[:, 0]


def _forget_lengths(model: Any) -> None:
    """A model's dynamic RoPE remembers the longest sequence that it has seen."""
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)


@pytest.mark.usefixtures("either_decoder")
@pytest.mark.parametrize("case", CASES)
def test_tokens_and_logprobs_are_those_of_transformers(
    case: str,
    prompts: list[list[int]],
    make_model: Callable[..., Any],
    save: Callable[..., Any],
    make_runner: Callable[..., Any],
    drive: Any,
) -> None:
    architecture, config = CASES[case]
    model = make_model(architecture, **config)
    runner = make_runner(save(model))
    reference = [_reference(model, prompt) for prompt in prompts]
    driver = drive(runner, len(prompts))
    assert driver.generate(prompts, NUM_TOKENS, top=1) == [tokens for tokens, _, _ in reference]
    for row, (_, of_tokens, of_prompt) in enumerate(reference):
        np.testing.assert_allclose([entry[0] for entry in driver.logprobs[row]], of_tokens, atol=1e-4)
        np.testing.assert_allclose([entry[0] for entry in driver.prompt_logprobs[row]], of_prompt, atol=1e-4)


@pytest.mark.usefixtures("either_decoder")
@pytest.mark.parametrize("case", ["llama", "llama-dynamic", "mistral-window", "qwen2-window", "qwen3", "olmoe"])
def test_tokens_do_not_depend_on_chunks_company_or_blocks(
    case: str,
    prompts: list[list[int]],
    make_model: Callable[..., Any],
    save: Callable[..., Any],
    make_runner: Callable[..., Any],
    drive: Any,
) -> None:
    architecture, config = CASES[case]
    runner = make_runner(save(make_model(architecture, **config)))
    alone = [drive(runner, 1).generate([prompt], NUM_TOKENS)[0] for prompt in prompts]
    for seed, (chunk, wave) in enumerate([(1, 4), (3, 1), (16, 2), (33, 1)]):
        together = drive(runner, len(prompts), seed)
        assert together.generate(prompts, NUM_TOKENS, chunk, wave, top=1) == alone
        assert [len(entries) for entries in together.prompt_logprobs.values()] == [n - 1 for n in PROMPT_LENGTHS]


def test_a_sequence_resumed_with_its_generated_tokens_continues_the_same_beyond_the_original_context(
    make_model: Callable[..., Any], save: Callable[..., Any], make_runner: Callable[..., Any], drive: Any
) -> None:
    architecture, config = CASES["llama-dynamic"]
    runner = make_runner(save(make_model(architecture, **config)))
    prompt = list(range(40))
    tokens = drive(runner, 1).generate([prompt], NUM_TOKENS)[0]
    for generated in (5, 30):
        resumed = drive(runner, 1).generate([prompt + tokens[:generated]], NUM_TOKENS - generated, num_prompt_tokens=40)
        assert resumed[0] == tokens[generated:]


@pytest.mark.usefixtures("either_decoder")
def test_many_sequences_of_very_different_lengths_decode_as_each_alone(
    make_model: Callable[..., Any], save: Callable[..., Any], make_runner: Callable[..., Any], drive: Any
) -> None:
    runner = make_runner(save(make_model("Llama", max_position_embeddings=2048)), num_kv_blocks=4096, max_num_seqs=40)
    generator = np.random.default_rng(2)
    lengths = [1500, 900, *generator.integers(1, 60, 38).tolist()]
    many = [generator.integers(0, 300, length).tolist() for length in lengths]
    together = drive(runner, len(many)).generate(many, 6)
    alone = [drive(runner, 1).generate([prompt], 6)[0] for prompt in many]
    assert together == alone


@pytest.mark.usefixtures("either_decoder")
def test_a_window_at_the_end_of_the_context_decodes_beside_one_at_its_beginning(
    make_model: Callable[..., Any], save: Callable[..., Any], make_runner: Callable[..., Any], drive: Any
) -> None:
    runner = make_runner(save(make_model("Mistral", sliding_window=10)))
    generator = np.random.default_rng(3)
    # The first one's window reaches over four blocks, the second's over the last three that there can be.
    both = [generator.integers(0, 300, length).tolist() for length in (16, runner.max_model_len - 3)]
    assert drive(runner, 2).generate(both, 3) == [drive(runner, 1).generate([prompt], 3)[0] for prompt in both]
