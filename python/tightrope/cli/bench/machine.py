"""What a figure was taken on: machine, versions and commit."""

from __future__ import annotations

import datetime
import platform
import subprocess
from pathlib import Path

import torch

import tightrope

from .competitors import Competitor


def describe(competitors: list[Competitor]) -> dict[str, str]:
    versions = {}
    for competitor in competitors:
        try:
            versions[competitor.package] = competitor.version()
        except ModuleNotFoundError:  # importlib.metadata.PackageNotFoundError
            continue
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "versions": " ".join(f"{name} {version}" for name, version in sorted(versions.items())),
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def _commit() -> str:
    """The commit of the working tree that this file stands in, with a + where it was changed since."""
    folder = Path(tightrope.__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
