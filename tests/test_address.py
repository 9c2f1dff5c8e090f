"""Addresses as text: what is taken for one, and that no key is shown."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncscale.address import Address, CurveKeys, TcpBinding, parse, shown

KEY = "0123456789abcdef" * 4


def test_both_kinds_are_taken_apart() -> None:
    assert parse("ipc:///tmp/a b/coordinator") == Address("ipc:///tmp/a b/coordinator")
    assert parse(f"tcp://10.0.0.1:5555/?key={KEY}") == Address("tcp://10.0.0.1:5555", bytes.fromhex(KEY))
    assert parse(f"tcp://[::1]:65535/?key={KEY.upper()}") == Address("tcp://[::1]:65535", bytes.fromhex(KEY))


@given(host=st.ip_addresses(), port=st.integers(1, 65_535), public=st.binary(min_size=32, max_size=32))
def test_what_a_binding_publishes_can_be_taken_apart(host: object, port: int, public: bytes) -> None:
    binding = TcpBinding("0.0.0.0", str(host), CurveKeys(public, bytes(32)))
    assert parse(binding.address(port)).server_key == public


@pytest.mark.parametrize(
    "address",
    [
        None, 7, b"ipc:///x", "", "ipc", "ipc://", "ipc:///x\0", "ipc:///x\n", "ipc://" + "x" * 108, "ipc:///\ud800",
        "inproc://x", "pgm://1.2.3.4:5", "/tmp/x", f"tcp://10.0.0.1/?key={KEY}", f"tcp://10.0.0.1:0/?key={KEY}",
        f"tcp://10.0.0.1:65536/?key={KEY}", f"tcp://10.0.0.1:*/?key={KEY}", f"tcp://a.example:5/?key={KEY}",
        f"tcp://999.0.0.1:5/?key={KEY}", f"tcp://[::g]:5/?key={KEY}", f"tcp://::1:5/?key={KEY}", "tcp://10.0.0.1:5",
        f"tcp://10.0.0.1:5/?key={KEY[:-1]}", f"tcp://10.0.0.1:5/?key={KEY}0", f"tcp://10.0.0.1:5?key={KEY}",
        f"tcp://10.0.0.1:5/?key={KEY}\n", f" tcp://10.0.0.1:5/?key={KEY}", f"tcp://10.0.0.1:5/?key={KEY}&x=1", KEY,
        f"udp://10.0.0.1:5/?key={KEY}", f"tcp://10.0.0.1:5/key={KEY}", f"10.0.0.1:5/?key={KEY}",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused_without_its_key(address: object) -> None:
    with pytest.raises(ValueError, match="address must be") as caught:
        parse(address)
    assert KEY[:20] not in str(caught.value)


@given(st.text() | st.builds("tcp://{}:{}/?key={}".format, st.text(), st.integers(), st.text()))
def test_whatever_text_it_is_is_taken_or_refused(address: str) -> None:
    with contextlib.suppress(ValueError):
        parse(address)
    assert isinstance(shown(address), str)


def test_keys_are_in_no_repr() -> None:
    keys = CurveKeys(b"public" * 6, b"secret" * 6)
    binding = TcpBinding("127.0.0.1", "127.0.0.1", keys)
    for value in (keys, binding, [binding], parse(binding.address(5).replace(keys.public.hex(), KEY))):
        assert not any(word in f"{value!r} {value}" for word in ("public", "secret'", KEY[:8]))
    assert shown(f"tcp://10.0.0.1:5/?key={KEY}") == "tcp://10.0.0.1:5/?key=..."
