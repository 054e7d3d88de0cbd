"""What is checked, in which order and for how long: one table of stages, the most telling first.

A stage that needs what is not here says so and is left out, or does the part of its work that needs less. The
limits are such that all of them together end within nine minutes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from . import readings
from .machine import Machine
from .process import Command, Ran
from .readings import Reading

TOTAL_SECONDS = 540
# The names of `cases.GPU_SHAPES` whose speed is measured, and the seconds for each; quick: the first alone.
SPEED = {"llama3-8b": 50, "qwen3-8b": 35, "llama3-8b, half": 20, "qwen3.5-2b": 35}
SANITIZERS = ("memcheck", "racecheck", "initcheck")
SANITIZER_PARTS = 4  # processes a tool: most of their time is compiling
METRICS = (
    "gpu__time_duration.sum",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "launch__registers_per_thread",
)


@dataclass(frozen=True)
class Places:
    """root: the repository. library: where the package is built. scratch: caches. out: where reports go."""

    root: Path
    library: Path
    scratch: Path
    out: Path

    @property
    def logs(self) -> Path:
        return self.out / "logs"

    @property
    def environment(self) -> dict[str, str]:
        """Of every child: the package that was built here, compiled caches of this run, and no network."""
        return {
            "PYTHONPATH": os.pathsep.join(
                [str(self.library), str(self.root / "benchmarks"), *filter(None, [os.getenv("PYTHONPATH")])]
            ),
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "TRITON_CACHE_DIR": str(self.scratch / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.scratch / "inductor"),
            "HF_HUB_OFFLINE": "1",
        }


@dataclass(frozen=True)
class Stage:
    """seconds: its time limit. missing: why it cannot run here, or what of it cannot, if anything."""

    name: str
    says: str
    seconds: float
    commands: Sequence[Command]
    read: Callable[[Sequence[Ran]], Reading]
    missing: str | None = None

    @property
    def runs(self) -> bool:
        return bool(self.commands)

    def without(self, missing: str | None, instead: Stage | None = None) -> Stage:
        """The stage where something is missing: what it does instead, or nothing."""
        if missing is None:
            return self
        return replace(instead or replace(self, commands=()), missing=missing)


@dataclass(frozen=True)
class _Maker:
    """Makes commands of children, all with the same environment."""

    places: Places

    def python(self, name: str, *arguments: str, **environment: str) -> Command:
        return self.tool(name, sys.executable, *arguments, **environment)

    def child(self, name: str, module: str, *arguments: str, **environment: str) -> Command:
        return self.python(name, "-m", f"gpu_check.{module}", *arguments, **environment)

    def tool(self, name: str, *argv: str, **environment: str) -> Command:
        return Command(name, argv, {**self.places.environment, **environment})


def stages(machine: Machine, places: Places, quick: bool) -> list[Stage]:
    """The whole plan, for what is here."""
    make = _Maker(places)
    speed = dict(list(SPEED.items())[:1]) if quick else SPEED
    return [
        _build(machine, make),
        Stage(
            "smoke",
            "ten public calls against the float64 reference",
            40,
            [make.child("smoke", "smoke")],
            readings.recorded,
        ).without(machine.lacks("torch", "gpu")),
        *(_speed(machine, make, shape, seconds) for shape, seconds in speed.items()),
        _tests(machine, make, quick),
        _sanitizers(machine, make, SANITIZERS[:1] if quick else SANITIZERS),
        Stage(
            "kernels",
            "each streaming kernel's share of the rate of its GEMM",
            20,
            [make.child("rates", "rates")],
            readings.recorded,
        ).without(machine.lacks("gpu", "triton")),
        Stage(
            "bandwidth",
            "the row kernels beside a copy",
            15,
            [
                make.python(
                    "bandwidth",
                    str(places.root / "benchmarks" / "bandwidth.py"),
                    *("--rounds", "10", "--megabytes", "256" if quick else "1024"),
                )
            ],
            readings.bandwidth,
        ).without(machine.lacks("gpu", "nvcc")),
        *([] if quick else [_ncu(machine, make)]),
        Stage(
            "predictions",
            "which predictions of docs/gpu.md held",
            30,
            [make.child("judge", "judge", str(places.out / "report.json"))],
            readings.recorded,
        ).without(machine.lacks("torch")),
    ]


def _build(machine: Machine, make: _Maker) -> Stage:
    """The package with the CUDA extension for the card; without one, or without a toolkit, as it is."""

    def command(**environment: str) -> list[Command]:
        return [make.child("build", "build", str(make.places.root), str(make.places.library), **environment)]

    stage = Stage(
        "build",
        f"the CUDA extension for {machine.architecture}, in a temporary folder",
        110,
        command(TIGHTROPE_CUDA="only", TORCH_CUDA_ARCH_LIST=machine.architecture),
        readings.build,
    )
    plain = replace(
        stage, says="the package without its CUDA extension", commands=command(TIGHTROPE_BUILD_EXT="0")
    )
    unbuilt = stage.without(machine.lacks("cuda", "nvcc", "ninja", "pybind11"), plain)
    return unbuilt.without(machine.lacks("setuptools"))


def _speed(machine: Machine, make: _Maker, shape: str, seconds: float) -> Stage:
    name = f"speed {shape}"
    return Stage(
        name,
        "a step beside three bare GEMMs of the same run",
        seconds,
        [make.child(name.replace(" ", "-").replace(",", ""), "speed", shape, str(seconds - 5))],
        readings.recorded,
    ).without(machine.lacks("gpu"))


def _tests(machine: Machine, make: _Maker, quick: bool) -> Stage:
    """tests/gpu, in processes side by side: most of their time is compiling, and the reference on the CPU."""
    tests = make.places.root / "tests" / "gpu"
    cuda, steps, triton = (str(tests / f"test_{name}_gpu.py") for name in ("cuda", "steps", "triton"))
    long = "test_against_the_reference"
    parts = {
        "test-cuda": (cuda,),
        "test-steps": (steps,),
        "test-triton": (triton, "-k", f"not {long}"),
        "test-triton-reference": (triton, "-k", long),
    }
    if quick:
        del parts["test-triton-reference"]
    plain = ("-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(make.places.root))
    stage = Stage(
        "tests",
        "pytest -m gpu tests/gpu",
        60 if quick else 100,
        [
            make.python(name, *plain, "-v", "-m", "gpu", "--tb=short", *arguments)
            for name, arguments in parts.items()
        ],
        readings.pytest,
    )
    collecting = replace(
        stage,
        says="the tests of tests/gpu are collected",
        seconds=120,
        commands=[make.python("collect", *plain, "--collect-only", "-q", str(tests))],
        read=readings.collected,
    )
    return stage.without(machine.lacks("gpu"), collecting).without(machine.lacks("torch", "pytest"))


def _sanitizers(machine: Machine, make: _Maker, tools: Sequence[str]) -> Stage:
    # Each allocation is one of the driver's own, whose ends the sanitizer knows. memcheck has it padded: past
    # the end of one may else be the next one.
    caching = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    own = {"memcheck": ("--padding", str(2**16))}
    # PyTorch and Triton ask the driver for what it may not have, which is no error of ours; ours raise.
    # What compiles beside the program needs no watching.
    options = ("--report-api-errors", "no", "--target-processes", "application-only", "--print-limit", "20")
    path = machine.tools.get("compute-sanitizer", "compute-sanitizer")
    child = (sys.executable, "-m", "gpu_check.kernels")

    def command(tool: str, part: int) -> Command:
        watched = (*child, str(part), str(SANITIZER_PARTS))
        argv = (path, "--tool", tool, *own.get(tool, ()), *options, *watched)
        return make.tool(f"{tool}-{part}", *argv, **caching)

    return Stage(
        "sanitizer",
        f"compute-sanitizer ({', '.join(tools)}) on a small run of every kernel",
        55,
        [command(tool, part) for tool in tools for part in range(SANITIZER_PARTS)],
        readings.sanitizer,
    ).without(machine.lacks("gpu", "compute-sanitizer"))


def _ncu(machine: Machine, make: _Maker) -> Stage:
    argv = (
        machine.tools.get("ncu", "ncu"),
        # Else times come in the unit that suits each, and numbers in the form of the country.
        *("--csv", "--print-units", "base", "--metrics", ",".join(METRICS)),
        *("--kernel-name", "regex:row_|stream_|merge_"),
        *("--launch-count", "24", sys.executable, "-m", "gpu_check.kernels"),
    )
    return Stage(
        "ncu",
        "what bounds each kernel of that small run",
        25,
        [make.tool("ncu", *argv, LC_ALL="C")],
        readings.ncu,
    ).without(machine.lacks("gpu", "ncu"))
