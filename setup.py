"""Builds the extensions; all other settings are in pyproject.toml.

The CPU extension is built once per instruction set, the CUDA extension where nvcc and a CUDA build of torch
are present. ``TIGHTROPE_BUILD_EXT=0`` installs without either: the package then runs on plain PyTorch over
the same chunks. ``TIGHTROPE_CUDA=0`` leaves the CUDA extension out, ``TIGHTROPE_CUDA=1`` insists on it,
``TIGHTROPE_CUDA=only`` builds it alone, and ``TORCH_CUDA_ARCH_LIST`` names its architectures.

A compiled extension loads with the torch minor version that it was built for and no other, so what has one
requires that version; without extensions, and in an sdist, which compiles nothing, it is the range below.
"""

import glob
import os
import platform
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path

from setuptools import setup

TORCH = "torch>=2.11"

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
QUIET = ["-Wno-psabi", "-Wno-unknown-pragmas", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]


# A100 and what else runs code for 8.0, H100, B200, RTX 50; PTX for what comes after.
CUDA_ARCHITECTURES = "8.0;9.0a;10.0;12.0+PTX"


def fail(missing: str, remedy: str) -> None:
    sys.exit(
        f"\ntightrope: cannot build the CPU extension: {missing}.\n  {remedy}\n"
        "  Or set TIGHTROPE_BUILD_EXT=0 to install without it (slower, same results).\n"
    )


def missing_for_cuda() -> tuple[str, str] | None:
    """What the CUDA extension lacks, and the remedy; None where it can be built."""
    import torch
    from torch.utils import cpp_extension

    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is not a CUDA build",
            f"Install a CUDA build of torch {torch.__version__.partition('+')[0]}.",
        )
    # torch takes the folder above the nvcc on the path, which need not be the toolkit: nvcc may be a script.
    homes = [home for home in (cpp_extension.CUDA_HOME, "/usr/local/cuda") if home]
    found = [home for home in homes if (Path(home) / "include" / "cuda_runtime.h").exists()]
    if not found:
        return (
            f"no CUDA toolkit in {' or '.join(homes)}",
            f"Install the CUDA {torch.version.cuda} toolkit, or point CUDA_HOME at it.",
        )
    cpp_extension.CUDA_HOME = found[0]
    return None


def cuda_extensions() -> list:
    """The CUDA extension, or nothing and one line that says why."""
    wish = os.environ.get("TIGHTROPE_CUDA", "")
    if wish == "0":
        return []
    lack = missing_for_cuda()
    if lack is not None:
        if wish in ("1", "only"):
            sys.exit(
                f"\ntightrope: TIGHTROPE_CUDA={wish}, but the CUDA extension cannot be built: {lack[0]}.\n"
                f"  {lack[1]}\n"
            )
        print(f"tightrope: building without the CUDA extension: {lack[0]}")
        return []
    from torch.utils.cpp_extension import CUDAExtension

    architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
    return [
        CUDAExtension(
            "tightrope._C_cuda",
            ["csrc/cuda/bindings.cpp", *sorted(glob.glob("csrc/cuda/*.cu"))],
            depends=["csrc/row_math.h", *glob.glob("csrc/cuda/*.h"), *glob.glob("csrc/cuda/*.cuh")],
            define_macros=[("TIGHTROPE_CUDA_ARCHITECTURES", f'"{architectures}"')],
            extra_compile_args={
                "cxx": ["-O3", "-std=c++20", "-fvisibility=hidden"],
                "nvcc": ["-O3", "-std=c++17", "--expt-relaxed-constexpr"],
            },
        )
    ]


def extensions() -> dict:
    try:
        import torch
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
    sets = {} if os.environ.get("TIGHTROPE_CUDA") == "only" else INSTRUCTION_SETS
    for name, flags in sets.items():
        if name != "base" and not x86:
            continue
        modules.append(
            CppExtension(
                f"tightrope._C_{name}",
                [f"csrc/cpu/ext_{name}.cpp"],
                depends=[
                    "csrc/row_math.h",
                    *glob.glob("csrc/cpu/*.h"),
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
    modules += cuda_extensions()

    class Build(BuildExtension):
        """Builds the extensions side by side, and leaves beside them a note of the torch that they are for.

        Objects of another torch look as new as the sources are, and must not be taken for this one's.
        """

        def run(self) -> None:
            note = Path(self.build_lib, "tightrope", "_C_torch.txt")
            if not note.exists() or note.read_text() != torch.__version__:
                self.force = True
                shutil.rmtree(self.build_temp, ignore_errors=True)
            # Each is one source, which ninja cannot divide, and has a build.ninja, so a folder, of its own.
            parts = []
            for extension in self.extensions:
                part = copy(self)
                part.extensions = [extension]
                part.build_temp = str(Path(self.build_temp, extension.name))
                parts.append(part)
            jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
            with ThreadPoolExecutor(jobs) as pool:
                for _ in pool.map(BuildExtension.run, parts):
                    pass
            note.write_text(torch.__version__)
            if self.inplace:
                shutil.copy(note, Path(self.get_ext_fullpath(modules[0].name)).parent)

    minor = ".".join(torch.__version__.split(".")[:2])
    return {
        "ext_modules": modules,
        "cmdclass": {"build_ext": Build},
        "install_requires": [f"torch=={minor}.*"],
    }


def compiles() -> bool:
    """Not where it is switched off, and not for an sdist, which is made where torch need not be installed.

    ``egg_info`` is how pip and build ask, in the same places, what a build needs.
    """
    if os.environ.get("TIGHTROPE_BUILD_EXT", "1") == "0":
        return False
    words = set(sys.argv[1:])
    return not words & {"sdist", "egg_info"} or bool(words & {"build", "build_ext", "bdist_wheel"})


setup(**(extensions() if compiles() else {"install_requires": [TORCH]}))
