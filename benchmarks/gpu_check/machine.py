"""What is here: found by a process of its own, since a broken torch may take its process with it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

PROBE_SECONDS = 120
# Runs in the child; what is absent is left out.
PROBE = """
import importlib.metadata as metadata, json, platform
facts = {"python": platform.python_version(), "packages": {}}
for name in ("torch", "triton", "setuptools", "ninja", "pybind11", "numpy", "pytest", "hypothesis",
             "expecttest", "transformers", "liger-kernel", "cut-cross-entropy", "psutil"):
    try:
        facts["packages"][name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
try:
    import torch
    facts["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = properties.name
        facts["capability"] = [properties.major, properties.minor]
        facts["memory_gib"] = round(properties.total_memory / 2**30, 1)
except Exception as error:
    facts["error"] = f"{type(error).__name__}: {error}"
print(json.dumps(facts))
"""
TOOLS = ("nvcc", "compute-sanitizer", "ncu")


@dataclass(frozen=True)
class Machine:
    """packages: versions by name. cuda: the CUDA version of torch. tools: paths by name. error: why the
    probe failed."""

    python: str = ""
    packages: dict[str, str] = field(default_factory=dict)
    cuda: str | None = None
    gpu: str | None = None
    capability: tuple[int, int] | None = None
    memory_gib: float | None = None
    tools: dict[str, str] = field(default_factory=dict)
    driver: str | None = None
    commit: str = ""
    error: str | None = None

    @property
    def architecture(self) -> str:
        """What to compile for: the card that is there, or an H100. Of 9.0 on, its own instructions."""
        major, minor = self.capability or (9, 0)
        return f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else "")

    def lacks(self, *names: str) -> str | None:
        """What of the packages and tools is not here, and "gpu" or "cuda"; None where all are."""
        known = {**self.packages, **self.tools}
        words = {"gpu": ("CUDA device", self.gpu), "cuda": ("CUDA build of torch", self.cuda)}
        missing = []
        for name in names:
            word, found = words.get(name, (name, known.get(name)))
            if not found:
                missing.append(word)
        return f"no {', no '.join(missing)}" if missing else None

    def facts(self) -> dict[str, object]:
        return asdict(self)


def find(root: Path) -> Machine:
    """The machine, with the Python that runs this."""
    return Machine(**_probed(), tools=_tools(), driver=_driver(), commit=_commit(root))


def _probed() -> dict[str, object]:
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=PROBE_SECONDS
        )
        facts = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"error": f"importing torch took more than {PROBE_SECONDS} s"}
    except (IndexError, ValueError):
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    if facts.get("capability"):
        facts["capability"] = tuple(facts["capability"])
    return facts


def _tools() -> dict[str, str]:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    path = os.pathsep.join([os.environ.get("PATH", ""), f"{home}/bin", f"{home}/compute-sanitizer"])
    found = {name: shutil.which(name, path=path) for name in TOOLS}
    return {name: place for name, place in found.items() if place}


def _driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=PROBE_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout.split() or [None])[0] if done.returncode == 0 else None


def _commit(root: Path) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", root, "describe", "--always", "--dirty=+"], capture_output=True, text=True
        )
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
