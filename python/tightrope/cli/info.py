"""What is installed, what the CPU can do, and which backend serves which device."""

from __future__ import annotations

import platform

import torch

import tightrope
from tightrope import backends


def print_info() -> None:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    lines = {
        "tightrope": tightrope.__version__,
        "torch": torch.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "CUDA device": gpu,
    }
    for name, value in lines.items():
        print(f"{name:<16}{value}")
    print(f"\n{'backend':<16}{'devices':<16}{'available':<12}detail")
    for backend in backends.describe():
        devices = ", ".join(backend["devices"])
        available = "yes" if backend["available"] else "no"
        print(f"{backend['backend']:<16}{devices:<16}{available:<12}{backend['detail']}")
