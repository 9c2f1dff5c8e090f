"""What keeps engines in tandem, on the wire; members of the unions in `asyncscale.messages`.

Each says how things are, not what to do, and is numbered: so each may come late, twice, or before an earlier one. Waves
are numbered within a generation, generations from 1.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

Number = Annotated[int, msgspec.Meta(ge=0)]


class GroupState(msgspec.Struct, frozen=True, array_like=True, tag="group-state"):
    """Coordinator to every engine and client: all that is decided.

    version: grows with every change; what is older than the newest is to be ignored. generation: of the group, 0 before
    the first. whole: all its engines live, so far as is known; else the next one is waited for. wave: the one that
    runs, or the one to come. running: once it is, the wave has begun for every engine of the generation, and ends only
    by their agreement. held: waves end though there is work, and none begins.
    """

    version: Number = 0
    generation: Number = 0
    whole: bool = False
    wave: Number = 0
    running: bool = False
    held: bool = False


class Met(msgspec.Struct, frozen=True, array_like=True, tag="met"):
    """Engine to its owner: all engines are in this generation, or enter it before they do anything else."""

    generation: Number


class Paused(msgspec.Struct, frozen=True, array_like=True, tag="paused"):
    """Engine to coordinator: it pauses before this wave, so all earlier ones have ended.

    has_work: so it wants this one to begin.
    """

    generation: Number
    wave: Number
    has_work: bool


class Broken(msgspec.Struct, frozen=True, array_like=True, tag="broken"):
    """Engine to coordinator: this generation cannot go on, as a collective operation failed."""

    generation: Number


class Wake(msgspec.Struct, frozen=True, array_like=True, tag="wake"):
    """Client to coordinator: it has sent a request to an engine that, as far as it knows, pauses before this wave."""

    generation: Number
    wave: Number


FromTandemEngine = Met | Paused | Broken
