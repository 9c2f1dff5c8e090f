from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncscale.client.placement import Place, place_engines
from asyncscale.cpus import Cpu, UsableCpus


def machine(num_cores: int, *, threads: int = 1, nodes: int = 1, quota: float | None = None) -> UsableCpus:
    """As Linux numbers it: the first hardware threads of all cores, then the second ones; nodes have equal parts."""
    cores = [Cpu(core, core, core * nodes // num_cores) for core in range(num_cores)]
    cpus = [Cpu(thread * num_cores + cpu.id, cpu.core, cpu.node) for thread in range(threads) for cpu in cores]
    return UsableCpus(tuple(cpus), quota)


SUBSET = UsableCpus(tuple(Cpu(number, number) for number in (3, 5, 6, 12)))
ONE_CORES_THREADS = UsableCpus((Cpu(1, 1), Cpu(9, 1)))


@pytest.mark.parametrize(
    ("usable", "num_engines", "places"),
    [
        pytest.param(machine(2), 2, [((0,), 1), ((1,), 1)], id="2 cores"),
        pytest.param(machine(2), 1, [((), 2)], id="one engine is bound to nothing"),
        pytest.param(machine(3), 2, [((0, 1), 2), ((2,), 1)], id="no core is left over"),
        pytest.param(machine(2), 3, [((), 1)] * 3, id="fewer cores than engines"),
        pytest.param(machine(4, threads=2), 2, [((0, 4, 1, 5), 2), ((2, 6, 3, 7), 2)], id="whole physical cores"),
        pytest.param(
            machine(2, threads=2), 3, [((0, 2), 1), ((1,), 1), ((3,), 1)], id="more engines than physical cores"
        ),
        pytest.param(machine(2, threads=2), 1, [((), 2)], id="a thread for each physical core"),
        pytest.param(machine(4, nodes=2), 2, [((0, 1), 2), ((2, 3), 2)], id="a node for each"),
        pytest.param(machine(4, nodes=2), 3, [((0,), 1), ((1,), 1), ((2, 3), 2)], id="no engine on two nodes"),
        pytest.param(machine(4, nodes=4), 2, [((0, 1), 2), ((2, 3), 2)], id="whole nodes"),
        pytest.param(SUBSET, 2, [((3, 5), 2), ((6, 12), 2)], id="some CPUs of a machine"),
        pytest.param(ONE_CORES_THREADS, 2, [((1,), 1), ((9,), 1)], id="the two threads of one core"),
        pytest.param(machine(64), 4, [(tuple(range(i, i + 16)), 16) for i in (0, 16, 32, 48)], id="64 cores"),
        pytest.param(machine(64, quota=1.5), 2, [((), 1)] * 2, id="a quota that others use up with us"),
        pytest.param(machine(64, quota=6), 4, [((), 2), ((), 2), ((), 1), ((), 1)], id="a quota is divided"),
        pytest.param(machine(2, quota=0.3), 1, [((), 1)], id="less than one CPU"),
        pytest.param(machine(2, quota=2.0), 2, [((0,), 1), ((1,), 1)], id="a quota of all CPUs is none"),
    ],
)
def test_places_on_machines(usable: UsableCpus, num_engines: int, places: list[tuple[tuple[int, ...], int]]) -> None:
    assert place_engines(usable, num_engines) == tuple(Place(*place) for place in places)


def test_the_number_of_threads_may_be_told_and_binding_switched_off() -> None:
    assert place_engines(machine(4), 2, threads_per_engine=1) == (Place((0, 1), 1), Place((2, 3), 1))
    assert place_engines(machine(4), 2, pin=False) == (Place((), 2), Place((), 2))
    assert place_engines(machine(4), 1, threads_per_engine=2) == (Place((), 2),)
    assert place_engines(machine(4), 2, threads_per_engine=3) == (Place((), 3), Place((), 3))  # no room for them


@given(
    st.builds(
        machine,
        st.integers(1, 24),
        threads=st.integers(1, 2),
        nodes=st.integers(1, 4),
        quota=st.none() | st.just(100.0),
    ),
    st.integers(1, 60),
)
def test_bound_engines_divide_all_cpus_among_them(usable: UsableCpus, num_engines: int) -> None:
    places = place_engines(usable, num_engines)
    assert len(places) == num_engines
    assert all(place.num_threads >= 1 for place in places)
    bound = [cpu for place in places for cpu in place.cpus]
    if 1 < num_engines <= len(usable.cpus):
        assert sorted(bound) == [cpu.id for cpu in usable.cpus]
        assert all(place.cpus for place in places)
    else:
        assert bound == []
    num_cores = len({cpu.core for cpu in usable.cpus})
    if num_engines <= num_cores:
        assert sum(place.num_threads for place in places) == num_cores
