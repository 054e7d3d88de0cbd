"""Builds the CPU extension, once per instruction set; all other settings are in pyproject.toml.

``TIGHTROPE_BUILD_EXT=0`` installs without it: the package then runs on plain PyTorch over the same chunks.
"""

import os
import platform
import shutil
import sys

from setuptools import setup

# at::vec compiles to scalar code, and says nothing, unless both CPU_CAPABILITY macros are set.
INSTRUCTION_SETS = {
    "base": ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"],
    "avx2": ["-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2", "-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        "-DCPU_CAPABILITY=AVX512",
        "-DCPU_CAPABILITY_AVX512",
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mfma",
        "-mf16c",
    ],
}

# What PyTorch's and gcc 12's own headers warn of: unknown pragmas, undefined AVX512 registers.
QUIET = ["-Wno-unknown-pragmas", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]


def fail(missing: str, remedy: str) -> None:
    sys.exit(
        f"\ntightrope: cannot build the CPU extension: {missing}.\n  {remedy}\n"
        "  Or set TIGHTROPE_BUILD_EXT=0 to install without it (slower, same results).\n"
    )


def extensions() -> dict:
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        fail(
            "PyTorch is not installed in the environment that builds",
            "Run `pip install torch ninja pybind11` first, and install with `--no-build-isolation`.",
        )
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        fail(
            f"no C++ compiler (`{compiler}`) is on the path",
            "Install one (Debian, Ubuntu: `apt install g++`; Fedora: `dnf install gcc-c++`; "
            "macOS: `xcode-select --install`), or point CXX at it.",
        )
    # Compiled with OpenMP but not linked to it: the symbols resolve to the runtime that PyTorch has loaded.
    # A second runtime would bring a second pool of threads, blind to torch.set_num_threads.
    threads = ["-fopenmp"] if sys.platform.startswith("linux") else []
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    modules = []
    for name, flags in INSTRUCTION_SETS.items():
        if name != "base" and not x86:
            continue
        modules.append(
            CppExtension(
                f"tightrope._C_{name}",
                [f"csrc/cpu/ext_{name}.cpp"],
                depends=[
                    "csrc/row_math.h",
                    *(f"csrc/cpu/{h}.h" for h in ("common", "rows", "columns", "extension")),
                ],
                extra_compile_args=[
                    "-O3",
                    "-std=c++20",
                    "-fvisibility=hidden",
                    *QUIET,
                    *threads,
                    *flags,
                ],
            )
        )
    return {"ext_modules": modules, "cmdclass": {"build_ext": BuildExtension}}


setup(**(extensions() if os.environ.get("TIGHTROPE_BUILD_EXT", "1") != "0" else {}))
