"""nvcc compiles the CUDA row kernels: no spills, the registers that their occupancy needs, 16-byte accesses.

Needs nvcc and no GPU. The machine code is read with cuobjdump and nvdisasm (of the CUDA toolkit, the
``test`` extra or Triton); where they are absent the PTX is read instead.
"""

import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
NVCC = shutil.which("nvcc")
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Werror", "all-warnings", "-Xptxas", "-v"]
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
TYPES = ("bf16", "fp16", "fp32", "fp64", "narrow")  # narrow: gradients of float32 logits in 16 bits
# Threads a block and blocks an SM, as stated beside the kernels: lean instances, and the others.
OCCUPANCY = {"row_stats": (256, 4, 2), "row_grad": (256, 4, 2), "row_loss_grad": (512, 2, 1)}
REGISTERS = 65536  # of an SM

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not on the path")


@dataclass
class Kernel:
    name: str
    lean: bool
    report: str  # ptxas's
    ptx: str
    sass: str | None

    def number(self, pattern: str) -> int:
        found = re.search(pattern, self.report)
        return int(found[1]) if found else 0


def disassembler() -> dict[str, str] | None:
    """The environment in which cuobjdump runs and finds nvdisasm, or None."""
    site = Path(sysconfig.get_path("purelib"))
    places = [site / "nvidia" / "cu13" / "bin", site / "triton" / "backends" / "nvidia" / "bin"]
    path = os.pathsep.join([os.environ["PATH"], *map(str, places)])
    found = shutil.which("cuobjdump", path=path) and shutil.which("nvdisasm", path=path)
    return {**os.environ, "PATH": path} if found else None


def sections(text: str, pattern: str) -> dict[str, str]:
    """Text cut at each match of the pattern, by the name of the kernel that it finds."""
    pieces = re.split(pattern, text)
    return dict(zip(pieces[1::2], pieces[2::2]))


@cache
def build(name: str, arch: str) -> list[Kernel]:
    with TemporaryDirectory() as folder:
        cubin = Path(folder) / "rows.cubin"
        command = [NVCC, *FLAGS, f"-arch={arch}", "-cubin", "--keep", "--keep-dir", folder]
        done = subprocess.run(
            [*command, str(CSRC / f"rows_{name}.cu"), "-o", str(cubin)],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        ptx = sections(next(Path(folder).glob("*.ptx")).read_text(), r"\.entry (\w+)\(")
        reports = sections(done.stderr, r"Compiling entry function '(\w+)'")
        sass, tools = {}, disassembler()
        if tools is not None:
            dump = subprocess.run(
                ["cuobjdump", "-sass", str(cubin)], env=tools, capture_output=True, text=True, check=True
            )
            sass = sections(dump.stdout, r"Function : (\w+)")
    kernels = []
    for symbol, report in reports.items():
        kind = re.search(r"\d(row_[a-z_]+?)_kernel", symbol)[1]
        lean = "Lb1" in symbol and name != "fp64"
        kernels.append(Kernel(kind, lean, report, ptx[symbol], sass.get(symbol)))
    writers = {"row_grad", "row_loss_grad"}
    assert {k.name for k in kernels} == (writers if name == "narrow" else {*OCCUPANCY, "row_stats_merge"})
    return kernels


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", TYPES)
def test_kernels_keep_to_their_registers(name, arch):
    for kernel in build(name, arch):
        where = f"{kernel.name}, lean: {kernel.lean}: {kernel.report[:500]}"
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in kernel.report, where
        assert kernel.number(r"(\d+) bytes smem") == 0, where  # shared memory is counted by the launch plan
        if kernel.name in OCCUPANCY:
            threads, lean, general = OCCUPANCY[kernel.name]
            blocks = lean if kernel.lean else general
            used = -(-kernel.number(r"Used (\d+) registers") // 8) * 8  # given out eight at a time
            assert 0 < used * threads * blocks <= REGISTERS, where


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", TYPES)
def test_logits_move_in_16_byte_accesses(name, arch):
    """Each kernel has as many 128-bit loads as it keeps in flight, and stores of all that one becomes."""
    for kernel in build(name, arch):
        if kernel.name not in OCCUPANCY:
            continue
        if kernel.sass is None:
            code, load, store = kernel.ptx, r"ld\.global(\.nc)?\.v4\.[bu]32", r"st\.global\.v4\.[bu]32"
        else:
            code, load, store = kernel.sass, r"LDG\.E\.128", r"STG\.E\.128"
        if name == "narrow":  # what 16 bytes become
            store = store.replace("v4", "v2").replace("128", "64")
        ahead = 2 if name == "fp64" else 3 if kernel.name == "row_loss_grad" else 4
        assert len(re.findall(load, code)) >= ahead, f"{kernel.name}: loads"
        if kernel.name != "row_stats":
            assert re.search(store, code), f"{kernel.name}: stores"
        if kernel.name == "row_loss_grad" and kernel.sass is not None:
            assert re.search(r"STS(\.E)?\.128", code), "the row is kept by 16-byte stores"
            assert re.search(r"LDS(\.E)?\.128", code), "and read back by 16-byte loads"


def test_clusters_are_used_from_sm_90_on():
    for arch in ARCHITECTURES:
        fused = [k for k in build("bf16", arch) if k.name == "row_loss_grad"]
        assert all(("barrier.cluster" in k.ptx) == (arch != "sm_80") for k in fused)
