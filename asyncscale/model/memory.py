"""Under its earlier name."""

from __future__ import annotations

from asyncscale.memory import available_memory as available_memory
