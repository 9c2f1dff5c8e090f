"""The running sequences of one engine as rows of arrays, shared by scheduler and runner (same process, same thread).

What is the same for every running request in a step is done once for all rows, with numpy, instead of per request.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from asyncscale.messages import TokenLogprobs

Int32 = npt.NDArray[np.int32]


class SequenceTable:
    """State of up to `max_num_seqs` running sequences. The scheduler owns and writes it; runners read it.

    token_ids:           int32[max_num_seqs, max_model_len]  prompt, then generated tokens
    num_tokens:          int32[max_num_seqs]  how many of token_ids are known
    num_prompt_tokens:   int32[max_num_seqs]  how many of them are the prompt
    num_computed_tokens: int32[max_num_seqs]  how many have their keys and values in the cache
    block_table:         int32[max_num_seqs, ceil(max_model_len / block_size)]  cache block of each block_size positions
    num_blocks:          int32[max_num_seqs]  how many entries of block_table are in use
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        max_blocks = -(-max_model_len // block_size)
        self.block_size = block_size
        # np.zeros of this size is not committed by the OS until a row is written.
        self.token_ids: Int32 = np.zeros((max_num_seqs, max_model_len), np.int32)
        self.num_tokens: Int32 = np.zeros(max_num_seqs, np.int32)
        self.num_prompt_tokens: Int32 = np.zeros(max_num_seqs, np.int32)
        self.num_computed_tokens: Int32 = np.zeros(max_num_seqs, np.int32)
        self.block_table: Int32 = np.zeros((max_num_seqs, max_blocks), np.int32)
        self.num_blocks: Int32 = np.zeros(max_num_seqs, np.int32)


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work. Row rows[i] computes num_new_tokens[i] tokens, from its num_computed_tokens on.

    The table is as of before the step: blocks for the new positions are allocated, num_computed_tokens is not yet
    advanced. The first num_decodes rows decode: they compute one token, their last known one, and get the next.
    Position p of row r lives in cache block block_table[r, p // block_size], slot p % block_size.

    num_drafts: int32 per row, or None when it is 0 for all. A decoding row with d drafts computes 1 + d tokens: after
    its last known one the d that are guessed to follow, token_ids[r, num_tokens : num_tokens + d]. It gets 1 to 1 + d
    tokens, the same that it would get one by one. Where to sample is `verification.sample_points`, how many of the
    samples count `verification.find_kept`. No row drafts that asks for anything that depends on the tokens before:
    penalties, bad words, a min_tokens that is not reached; nor one with logit_bias or log-probabilities.
    """

    table: SequenceTable
    rows: Int32
    num_new_tokens: Int32
    num_decodes: int = 0
    num_drafts: Int32 | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a runner made of a batch. `rows` are those whose known tokens are all computed now; each got one next token,
    and is there once; or, with drafts, as often as it got tokens, side by side in order.

    logprobs: row -> of its new token, for rows that asked. prompt_logprobs: row -> of the next prompt positions, for
    rows that asked; from position 1 on since `add`, without gaps (the value at p belongs to the token at p, and comes
    from the logits at p - 1). errors: row -> why that row alone failed; it may be left out of `rows`.
    """

    rows: Int32
    token_ids: Int32
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)

    def newest(self, batch: Batch) -> tuple[Int32, Int32]:
        """Each row once, and its last token."""
        if batch.num_drafts is None:
            return self.rows, self.token_ids
        last = np.flatnonzero(np.diff(self.rows, append=-1))
        return self.rows[last], self.token_ids[last]
