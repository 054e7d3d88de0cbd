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
OCCUPANCY = {
    "row_stats": (256, 4, 2),
    "row_sides": (256, 4, 2),
    "row_grad": (256, 4, 2),
    "row_loss_grad": (512, 2, 1),
}
REGISTERS = 65536  # of an SM

pytestmark = [pytest.mark.one_in(6), pytest.mark.skipif(NVCC is None, reason="nvcc is not on the path")]


@dataclass
class Kernel:
    name: str
    plain: bool
    lean: bool  # holds to 64 registers
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
        plain = "Lb1" in symbol
        kernels.append(Kernel(kind, plain, plain and name != "fp64", report, ptx[symbol], sass.get(symbol)))
    writers = {"row_grad", "row_loss_grad"}
    second = {"row_stats_merge", "row_sides_merge"}
    assert {k.name for k in kernels} == (writers if name == "narrow" else {*OCCUPANCY, *second})
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
            whole = r"\.global(\.nc)?\.(v4\.[bfu]32|v2\.[bfu]64)"
            code, load, store = kernel.ptx, "ld" + whole, "st" + whole
            half = r"st\.global\.(v4\.[bu]16|v2\.[bu]32|[bu]64)"
        else:
            code, load, store, half = kernel.sass, r"LDG\.E\.128", r"STG\.E\.128", r"STG\.E\.64"
        if name == "narrow":  # what 16 bytes become
            store = half
        three = kernel.name == "row_loss_grad" or (kernel.name == "row_sides" and name in ("bf16", "fp16"))
        ahead = 2 if name == "fp64" else 3 if three else 4
        assert len(re.findall(load, code)) >= ahead, f"{kernel.name}: loads"
        if kernel.name not in ("row_stats", "row_sides"):
            assert re.search(store, code), f"{kernel.name}: stores"
        if kernel.name == "row_loss_grad" and kernel.sass is not None:
            assert re.search(r"STS(\.E)?\.128", code), "the row is kept by 16-byte stores"
            assert re.search(r"LDS(\.E)?\.128", code), "and read back by 16-byte loads"


def test_clusters_are_used_from_sm_90_on():
    for arch in ARCHITECTURES:
        fused = [k for k in build("bf16", arch) if k.name == "row_loss_grad"]
        assert all(("barrier.cluster" in k.ptx) == (arch != "sm_80") for k in fused)


@pytest.mark.parametrize("name", TYPES)
def test_plain_gradients_know_nothing_of_sets(name):
    """Fails if an instance that serves rows without a set reads what tells a set: they would pay for it."""
    for kernel in build(name, "sm_90a"):
        if kernel.name == "row_grad":
            reads = re.search(r"ld\.param[^;]*_param_1\b", kernel.ptx) is not None
            assert reads != kernel.plain
