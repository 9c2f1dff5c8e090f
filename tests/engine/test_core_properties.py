"""Random adds, aborts, departures and preemptions: nothing leaks, nothing starves, and every token is as if alone."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from asyncscale.config import SimulatedModel

MAX_MODEL_LEN = 48
COSTLESS = {"base_ms": 0, "decode_us": 0, "prefill_us": 0}
MODELS = [
    SimulatedModel(**COSTLESS, vocab_size=1000, mean_output_tokens=12),
    SimulatedModel(**COSTLESS, vocab_size=259, mean_output_tokens=40),  # of two tokens: guesses are right now and then
    SimulatedModel(**COSTLESS, vocab_size=1000, mean_output_tokens=40, output_period=3),
]
CLIENTS = st.sampled_from([b"a", b"b", b"c"])
SHARED_PREFIX = [7] * 24


class EngineMachine(RuleBasedStateMachine):
    """Drives one engine and keeps, beside it, what every client may expect."""

    def __init__(self, make_engine, run_solo):
        super().__init__()
        self.make_engine, self.run_solo = make_engine, run_solo
        self.alive = {}  # (client, id) -> the solo run's outcome
        self.aborted = []  # (client, id)
        self.prompts = {}  # (client, id) -> (prompt, number of prompt_logprobs to come)
        self.next_id = 0
        self.bound = 100
        self.engine = None
        self.model = None

    @initialize(
        block_size=st.sampled_from([1, 3, 4]),
        pool=st.integers(0, 12),
        max_num_seqs=st.integers(1, 5),
        spare_budget=st.integers(0, 12),
        prefix_caching=st.booleans(),
        model=st.sampled_from(MODELS),
        speculation=st.sampled_from(["auto", "ngram", "ngram", "off"]),
    )
    def start(self, block_size, pool, max_num_seqs, spare_budget, prefix_caching, model, speculation):
        self.model = model
        self.engine = self.make_engine(
            model=model,
            speculation=speculation,
            block_size=block_size,
            num_kv_blocks=-(-MAX_MODEL_LEN // block_size) + pool,  # one request always fits, hardly more do
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + spare_budget,
            max_model_len=MAX_MODEL_LEN,
            enable_prefix_caching=prefix_caching,
        )
        self.engine.runner.before_execute = self.check_order

    @rule(
        client=CLIENTS,
        shared=st.integers(0, len(SHARED_PREFIX)),
        suffix=st.lists(st.integers(0, 5), min_size=1, max_size=12),
        n=st.sampled_from([1, 1, 1, 2, 4]),
        priority=st.integers(-1, 1),
        num_given=st.sampled_from([0, 0, 0, 3]),
        fields=st.fixed_dictionaries(
            {
                "max_tokens": st.integers(1, 40),
                "min_tokens": st.integers(0, 10),
                "temperature": st.sampled_from([0.0, 1.0]),
                "seed": st.integers(2**64 - 3, 2**64 - 1),
                "logprobs": st.sampled_from([None, None, 2]),
                "prompt_logprobs": st.sampled_from([None, None, 1]),
            }
        ),
    )
    def add(self, client, shared, suffix, n, priority, num_given, fields):
        prompt = [*SHARED_PREFIX[:shared], *suffix]
        outcomes = [
            self.run_solo(prompt, model=self.model, max_model_len=MAX_MODEL_LEN, choice=choice, **fields)
            for choice in range(n)
        ]
        given = outcomes[0][0][:num_given] if n == 1 and len(outcomes[0][0]) > num_given else []
        self.engine.add(self.next_id, prompt, client=client, n=n, priority=priority, given=given, **fields)
        for choice, (token_ids, reason, stop) in enumerate(outcomes):
            key = client, self.next_id + choice
            self.alive[key] = token_ids[len(given) :], reason, stop
            self.prompts[key] = prompt, 0 if fields["prompt_logprobs"] is None or choice else len(prompt) - 1
            self.bound += 2 * (len(prompt) + len(token_ids))
        self.next_id += n

    @rule(client=CLIENTS)
    def add_what_is_wrong(self, client):
        self.engine.add(self.next_id, [10**6], client=client)
        self.alive[client, self.next_id] = [], "error", None
        self.prompts[client, self.next_id] = [], 0
        self.next_id += 1

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), count=st.integers(1, 5))
    def abort(self, data, count):
        keys = data.draw(st.lists(st.sampled_from(sorted(self.alive)), min_size=1, max_size=count))
        client = keys[0][0]
        ids = [request_id for owner, request_id in keys if owner == client]
        self.engine.core.abort(client, [*ids, 10**9])  # an unknown id does no harm
        for request_id in ids:
            if self.alive.get((client, request_id), ([], ""))[1] != "error":  # a refusal is on its way already
                self.alive.pop((client, request_id), None)
        self.aborted += [(client, request_id) for request_id in ids]

    @precondition(lambda self: self.aborted)
    @rule(data=st.data())
    def abort_again(self, data):
        client, request_id = data.draw(st.sampled_from(self.aborted))
        self.engine.core.abort(client, [request_id, request_id])

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def fail(self, data):
        """Its next step fails: with guesses or without, it alone ends, with the tokens that it has."""
        key = data.draw(st.sampled_from(sorted(self.alive)))
        if self.alive[key][1] != "error":
            self.engine.runner.failures[key] = "on purpose"

    @rule(client=CLIENTS)
    def drop_client(self, client):
        self.engine.core.drop_client(client)
        self.alive = {key: outcome for key, outcome in self.alive.items() if key[0] != client}

    @rule()
    def reset_prefix_cache(self):
        self.engine.core.methods["reset_prefix_cache"]()

    @rule(count=st.integers(1, 12))
    def step(self, count):
        for _ in range(count):
            self.engine.step()
            self.settle()
            self.check_counts()

    @invariant()
    def check_counts(self):
        if self.engine is None:
            return
        queued = [key for key, outcome in self.alive.items() if outcome[1] != "error"]
        by_client = {client: (sum(key[0] == client for key in queued), 0) for client, _ in queued}
        assert self.engine.core.by_client() == by_client
        for client in (b"a", b"b", b"c"):
            load = self.engine.core.load(client)
            assert load.mine == by_client.get(client, (0, 0))[0]
            assert load.running + load.waiting == len(queued)
            assert load.running <= self.engine.config.max_num_seqs
        assert self.engine.core.has_work == bool(self.alive)
        self.engine.core.check_integrity()

    def check_order(self):
        """Where budget is left, nobody waits while a request of a worse class runs."""
        scheduler = self.engine.core._scheduler
        running = list(scheduler.running())
        wanted = sum(int(scheduler._num_remaining(request.row)) for request in running)
        budget = self.engine.config.max_num_batched_tokens - wanted
        if scheduler.num_waiting and budget > 0:
            assert scheduler._waiting.first.priority >= max(request.priority for request in running)

    def settle(self):
        """Compare what has ended with the solo runs; nothing that was aborted may get anything."""
        for key, received in self.engine.received.items():
            if key not in self.alive:
                continue
            token_ids, reason, stop = self.alive[key]
            assert received.token_ids == token_ids[: len(received.token_ids)]
            finished = received.finished
            if finished is not None and finished.error == "on purpose":
                del self.alive[key]
            elif finished is not None:
                assert (received.token_ids, finished.reason, finished.stop_token_id) == (token_ids, reason, stop)
                prompt, num_prompt_logprobs = self.prompts[key]
                scored = [entry.token_ids[0] for entry in received.prompt_logprobs]
                assert scored == (prompt[1:] if num_prompt_logprobs else [])
                del self.alive[key]

    def teardown(self):
        if self.engine is None:
            return
        for _ in range(self.bound):
            if not self.alive:
                break
            self.engine.step()
            self.settle()
        assert not self.alive, f"after {self.bound} steps these had not ended: {sorted(self.alive)}"
        assert not self.engine.core.has_work
        stats = self.engine.core.kv_cache_stats()
        assert stats["free_blocks"] == stats["num_blocks"]
        assert not self.engine.core._stops._num_stopping.any()


@pytest.mark.timeout(300)
def test_any_sequence_of_events_is_as_if_every_request_were_alone(make_engine, run_solo):
    run_state_machine_as_test(
        lambda: EngineMachine(make_engine, run_solo),
        settings=settings(
            max_examples=400,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )
