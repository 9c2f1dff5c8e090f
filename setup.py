"""Native kernels, each compiled once per instruction set; all else is in setup.cfg.

The engine loads the best one that its CPU has. A library that cannot be built is left out with a warning.
"""

from __future__ import annotations

import copy
import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class BuildBesideSources(build_ext):
    """Leaves a copy in the source tree: `python -m asyncscale` there imports that, and not what was installed."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or True

    def build_extension(self, ext: Extension) -> None:
        # All are made of the same sources, side by side: each has its objects in a folder of its own.
        own = copy.copy(self)
        own.build_temp = os.path.join(self.build_temp, ext.name)
        super(BuildBesideSources, own).build_extension(ext)

    def run(self) -> None:
        super().run()
        if not self.inplace:
            try:
                self.copy_extensions_to_source()
            except OSError as error:
                self.warn(f"the source tree stays without the native kernels: {error}")


_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
_X86_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": _AVX512,
    "avx512_vnni": [*_AVX512, "-mavx512vnni"],
    "avx512_bf16": [*_AVX512, "-mavx512vnni", "-mavx512bf16"],
}
_KERNELS = Path(__file__).parent / "asyncscale" / "kernels"


def _kernels(isa: str, flags: list[str]) -> Extension:
    return Extension(
        f"asyncscale.kernels._kernels_{isa}",
        sorted(f"asyncscale/kernels/{path.name}" for path in _KERNELS.glob("*.cpp")),
        depends=sorted(f"asyncscale/kernels/{path.name}" for path in _KERNELS.glob("*.h")),
        extra_compile_args=[
            "-std=c++20",
            "-O3",
            "-g0",
            # The standard says nothing of fused multiplications, so compilers have to be told that they may.
            "-ffp-contract=fast",
            "-fvisibility=hidden",
            "-Wno-maybe-uninitialized",  # of GCC's own headers for AVX-512
            "-pthread",
            *flags,
        ],
        extra_link_args=["-pthread"],
        language="c++",
        optional=True,
    )


_is_x86 = platform.machine().lower() in ("x86_64", "amd64")
setup(
    cmdclass={"build_ext": BuildBesideSources},
    ext_modules=[_kernels(isa, flags) for isa, flags in {"portable": [], **(_X86_FLAGS if _is_x86 else {})}.items()],
)
