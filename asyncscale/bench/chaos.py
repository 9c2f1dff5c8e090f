"""`python -m asyncscale.bench chaos`: kill, stop and poison engines and clients, and count what is lost."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine

import uvloop

from asyncscale import AsyncScaleClient, AsyncScaleError, SimulatedModel
from asyncscale.bench.chaos_client import ChaosClient, Orders, start_client
from asyncscale.bench.chaos_requests import Catalogue, Load, Tally
from asyncscale.bench.measure import engine_pids
from asyncscale.config import Fault

_FAULTS: dict[int, Fault] = {300: "raise", 301: "exit", 302: "segfault", 303: "kill", 304: "hang"}
_MODEL = SimulatedModel(base_ms=2.0, decode_us=10.0, prefill_us=5.0, num_kv_blocks=4096, faults=_FAULTS)
_HANG_TIMEOUT_S = 2.0
_SETTLE_S = 20.0
# A client that is stopped stays so for longer than engines keep its requests.
_STOP_CLIENT_S = 3.0
_ENDLESS = 1_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `chaos`."""
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (%(default)s)")
    parser.add_argument("--num-engines", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--num-clients", type=int, default=2, help="attached ones, beside the owner (%(default)s)")
    parser.add_argument("--num-in-flight", type=int, default=24, help="requests of each client (%(default)s)")
    parser.add_argument("--interval", type=float, default=1.0, help="mean seconds between disturbances (%(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of requests and disturbances (random)")


def run(arguments: argparse.Namespace) -> int:
    """Run it; returns 0 when nothing was lost, repeated or changed, else 1."""
    seed = random.randrange(2**32) if arguments.seed is None else arguments.seed
    print(f"seed {seed}, {arguments.seconds:g} s", file=sys.stderr)
    chaos = Chaos(arguments, seed)
    uvloop.run(chaos.run())
    print(chaos.report())
    return 0 if chaos.is_clean else 1


class Chaos:
    """One run: load, disturbances, and the count of what came of it."""

    def __init__(self, arguments: argparse.Namespace, seed: int) -> None:
        self._arguments = arguments
        self._seed = seed
        self._draw = random.Random(seed)
        self._catalogue = Catalogue(seed)
        self._expected: list[bytes] = []
        self._clients: list[ChaosClient] = []
        self._background: set[asyncio.Task[None]] = set()
        self._num_clients_started = 0
        self.counts: Counter[str] = Counter()
        self.tally = Tally()
        self.leftovers: list[str] = []

    @property
    def is_clean(self) -> bool:
        """Whether nothing was lost, repeated, changed or left over."""
        return not (self.tally.lost or self.tally.repeated or self.tally.changed or self.leftovers)

    async def run(self) -> None:
        async with AsyncScaleClient(_MODEL, num_engines=1, progress=False) as client:
            self._expected = await self._catalogue.expect(client)
        async with AsyncScaleClient(
            _MODEL,
            num_engines=self._arguments.num_engines,
            hang_timeout=_HANG_TIMEOUT_S,
            max_restarts=_ENDLESS,
            max_num_seqs=32,
            progress=False,
        ) as owner:
            load = Load(owner, self._catalogue, self._expected, self._seed)
            running = asyncio.ensure_future(load.run(self._arguments.num_in_flight))
            for _ in range(self._arguments.num_clients):
                await self._add_client(owner)
            await self._disturb(owner)
            load.stop()
            await running
            self.tally.add(load.tally)
            for task in list(self._background):
                await task
            for client_ in self._clients:
                await client_.end()
                self.tally.add(client_.tally)
            await self._look_for_leftovers(owner)

    # --- disturbances

    async def _disturb(self, owner: AsyncScaleClient) -> None:
        kinds: list[Callable[[AsyncScaleClient], Awaitable[None]]] = [
            self._kill_engine,
            self._kill_engine,
            self._stop_engine,
            self._poison_engine,
        ]
        if self._arguments.num_clients:
            kinds += [self._kill_client, self._stop_client]
        deadline = time.monotonic() + self._arguments.seconds
        while time.monotonic() < deadline:
            await asyncio.sleep(self._draw.expovariate(1 / self._arguments.interval))
            await self._draw.choice(kinds)(owner)

    async def _kill_engine(self, owner: AsyncScaleClient) -> None:
        await self._signal_engine(owner, signal.SIGKILL)

    async def _stop_engine(self, owner: AsyncScaleClient) -> None:
        await self._signal_engine(owner, signal.SIGSTOP)

    async def _signal_engine(self, owner: AsyncScaleClient, number: signal.Signals) -> None:
        try:
            pids = await asyncio.wait_for(engine_pids(owner), 1.0)
        except (TimeoutError, AsyncScaleError):
            return  # one is down or hangs at this moment
        if pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._draw.choice(pids), number)
                self.counts[f"engines hit by {number.name}"] += 1

    async def _poison_engine(self, owner: AsyncScaleClient) -> None:
        token_id = self._draw.choice(list(_FAULTS))
        engine_id = self._draw.randrange(self._arguments.num_engines)

        async def ask() -> None:
            with contextlib.suppress(AsyncScaleError):
                await owner.generate([token_id], engine=engine_id, max_tokens=3)

        self._do(ask())
        self.counts[f"engines told to {_FAULTS[token_id]}"] += 1

    async def _kill_client(self, owner: AsyncScaleClient) -> None:
        victim = self._draw.choice(self._clients)
        self._clients.remove(victim)
        os.kill(victim.pid, signal.SIGKILL)
        await victim.end()
        self.tally.add(victim.tally)
        self.counts["clients killed"] += 1
        await self._add_client(owner)

    async def _stop_client(self, owner: AsyncScaleClient) -> None:
        victim = self._draw.choice(self._clients)
        self._clients.remove(victim)  # nobody else disturbs it meanwhile
        os.kill(victim.pid, signal.SIGSTOP)
        self.counts["clients stopped and continued"] += 1
        await self._add_client(owner)

        async def go_on() -> None:
            await asyncio.sleep(_STOP_CLIENT_S)
            os.kill(victim.pid, signal.SIGCONT)
            await victim.end()
            self.tally.add(victim.tally)

        self._do(go_on())

    def _do(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _add_client(self, owner: AsyncScaleClient) -> None:
        self._num_clients_started += 1
        orders = Orders(
            owner.address,
            self._seed,
            self._seed + self._num_clients_started,
            self._arguments.num_in_flight,
            self._expected,
        )
        self._clients.append(await start_client(orders))

    # --- afterwards

    async def _look_for_leftovers(self, owner: AsyncScaleClient) -> None:
        """Every engine is back, with no request aboard and no block in use."""
        try:
            async with asyncio.timeout(_SETTLE_S):
                async for loads in owner.watch_loads():
                    if len(loads) == self._arguments.num_engines and not any(load.in_flight for load in loads):
                        break
        except TimeoutError:
            self.leftovers.append(f"after {_SETTLE_S:g} s, loads are {owner.engine_loads()}")
            return
        for engine_id, stats in enumerate(await owner.collective_rpc("kv_cache_stats")):
            if stats["used_blocks"]:
                self.leftovers.append(f"engine {engine_id} has {stats['used_blocks']} blocks in use")
        self.counts["restarts"] = sum(engine.restarts for engine in owner.health())

    def report(self) -> str:
        """The figures, for people."""
        tally = self.tally
        lines = [f"{count:8,}  {what}" for what, count in sorted(self.counts.items())]
        pauses = sorted(tally.pauses)
        lines += [
            f"{tally.complete:8,}  requests complete, as in an undisturbed run ({tally.moved:,} of them moved)",
            f"{tally.cancelled:8,}  cancelled on purpose",
            f"{tally.unlucky:8,}  failed alone, aboard at two deaths",
        ]
        if pauses:
            worst, median = 1000 * pauses[-1], 1000 * statistics.median(pauses)
            lines.append(
                f"{median:8,.0f}  ms: longest wait for a token of those that moved, median ({worst:,.0f} worst)"
            )
        lines += [
            f"{tally.lost:8,}  lost",
            f"{tally.repeated:8,}  tokens repeated",
            f"{tally.changed:8,}  changed",
            *tally.errors,
            *self.leftovers,
        ]
        return "\n".join(lines)
