"""The door to the native library: finds the one for this CPU; its structures and functions as ctypes sees them."""

from __future__ import annotations

import ctypes
import logging
from ctypes import POINTER, c_double, c_int64, c_void_p
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, Literal

INSTRUCTION_SETS = ("avx512_bf16", "avx512_vnni", "avx512", "avx2", "portable")  # best first

Format = Literal["float32", "bfloat16", "float16", "int8"]
FORMATS: dict[Format, int] = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3}

_log = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent


class Linear(ctypes.Structure):
    """kernels::Linear of model.h."""

    _fields_ = (
        ("weights", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("num_outputs", c_int64),
        ("num_inputs", c_int64),
        ("format", c_int64),
    )


class Experts(ctypes.Structure):
    """kernels::Experts of model.h."""

    _fields_ = (
        ("router", Linear),
        ("num_experts", c_int64),
        ("num_held", c_int64),
        ("num_experts_per_token", c_int64),
        ("normalizes", c_int64),
    )


class Layer(ctypes.Structure):
    """kernels::Layer of model.h."""

    _fields_ = (
        ("qkv", Linear),
        ("output", Linear),
        ("gate_up", Linear),
        ("down", Linear),
        ("experts", Experts),
        ("input_norm", c_void_p),
        ("post_attention_norm", c_void_p),
        ("qk_norm", c_void_p),
        ("window", c_int64),
    )


class Model(ctypes.Structure):
    """kernels::Model of model.h."""

    _fields_ = (
        ("layers", POINTER(Layer)),
        ("num_layers", c_int64),
        ("hidden_size", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("embedding", c_void_p),
        ("embedding_format", c_int64),
        ("norm", c_void_p),
        ("head", Linear),
        ("eps", c_double),
        ("qkv_limit", c_double),
        ("qk_norm_spans_heads", c_int64),
    )


class Cache(ctypes.Structure):
    """kernels::Cache of model.h."""

    _fields_ = (
        ("data", c_void_p),
        ("format", c_int64),
        ("num_layers", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("block_size", c_int64),
    )


DispatchFunction = ctypes.CFUNCTYPE(c_int64, c_void_p, c_int64, c_void_p, c_int64, c_int64)
CombineFunction = ctypes.CFUNCTYPE(c_int64, c_void_p, c_int64)


class Exchange(ctypes.Structure):
    """kernels::Exchange of model.h."""

    _fields_ = (
        ("dispatch", DispatchFunction),
        ("combine", CombineFunction),
        ("received", c_void_p),
        ("received_first", c_void_p),
        ("room", c_void_p),
        ("results", c_void_p),
        ("succeeded", c_int64),
    )


class Step(ctypes.Structure):
    """kernels::Step of model.h."""

    _fields_ = (
        ("num_tokens", c_int64),
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("rows", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("block_table", c_void_p),
        ("block_table_stride", c_int64),
        ("items", c_void_p),
        ("num_items", c_int64),
        ("most_tokens", c_int64),
        ("hidden", c_void_p),
        ("workspace", c_void_p),
        ("ticks", c_void_p),
        ("durations", c_void_p),
        ("exchange", POINTER(Exchange)),
    )


_STRUCTURES = (Layer, Model, Cache, Exchange, Step)  # as structures.cpp has them

# What a step's time goes to, as Step.durations counts it.
PHASES = (
    "norms",
    "qkv",
    "rotary",
    "attention",
    "output",
    "gate_up",
    "activation",
    "down",
    "router",
    "dispatch",
    "exchange_out",
    "experts_gate_up",
    "experts_down",
    "exchange_back",
    "combine",
    "head",
)

_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "team_new": (c_void_p, (c_int64,)),
    "team_size": (c_int64, (c_void_p,)),
    "team_delete": (None, (c_void_p,)),
    "block_bytes": (c_int64, (POINTER(Cache),)),
    "workspace_bytes": (c_int64, (POINTER(Model), c_int64, c_int64, c_int64)),
    "forward": (c_int64, (POINTER(Model), POINTER(Cache), POINTER(Step), c_void_p)),
    "best": (
        None,
        (POINTER(Model), POINTER(Step), c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
    ),
    "logits": (None, (POINTER(Model), POINTER(Step), c_void_p, c_int64, c_void_p, c_void_p)),
}


@dataclass(frozen=True)
class Library:
    """The native functions for one instruction set; see decoder.cpp for what they take. isa: of INSTRUCTION_SETS."""

    isa: str
    cdll: ctypes.CDLL

    def __post_init__(self) -> None:
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(self.cdll, f"asyncscale_{name}")
            function.restype, function.argtypes = result, arguments

    @property
    def multiplies_bfloat16(self) -> bool:
        """Whether the CPU has dot products of bfloat16."""
        return self.isa == "avx512_bf16"


def load_library(isa: str | None = None) -> Library | None:
    """The library for `isa`, or the best that this CPU has; None when it was not built or cannot run here."""
    for name in INSTRUCTION_SETS if isa is None else (isa,):
        cdll = _load(name)
        if cdll is not None and cdll.asyncscale_supported() and _is_current(cdll):
            return Library(name, cdll)
    return None


def _is_current(cdll: ctypes.CDLL) -> bool:
    """Whether its structures are as large as those here: a library that was built from older sources would crash."""
    sizes = (c_int64 * len(_STRUCTURES))()
    if hasattr(cdll, "asyncscale_structure_sizes"):
        cdll.asyncscale_structure_sizes(sizes)
    if list(sizes) == [ctypes.sizeof(structure) for structure in _STRUCTURES]:
        return True
    _log.warning("%s was built from other sources: build it again (python setup.py build_ext --inplace)", cdll._name)
    return False


def _load(isa: str) -> ctypes.CDLL | None:
    for suffix in EXTENSION_SUFFIXES:
        path = _FOLDER / f"_kernels_{isa}{suffix}"
        if path.exists():
            try:
                return ctypes.CDLL(str(path))
            except OSError as error:  # built elsewhere, or without a library that it needs
                _log.warning("cannot load %s: %s", path, error)
    return None
