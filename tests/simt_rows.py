"""The CUDA row kernels on the CPU, with the signatures of ``tightrope.backends.ops``.

``library`` compiles csrc/cuda with g++ behind tests/simt/simt.h; a `Simt` calls the kernels as they would be
launched on a device of the given size. ``threads`` makes blocks smaller than planned, which is quicker here
and puts a row past one block's reach sooner.
"""

from __future__ import annotations

import atexit
import ctypes
import shutil
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
from torch import Tensor

from row_cases import DTYPES
from tightrope.arguments import TileArguments

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "tests" / "simt" / "rows_host.cpp"
FLAGS = ["-std=c++20", "-fno-strict-aliasing", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas"]
KERNELS = ("row_stats", "row_grad", "row_loss_grad", "row_sides")


def compiler() -> str | None:
    """A g++, or None."""
    return shutil.which("g++")


def compile(output: Path, *flags: str) -> Path:
    subprocess.run([compiler(), *FLAGS, *flags, str(SOURCE), "-o", str(output)], check=True, timeout=300)
    return output


class Call(ctypes.Structure):
    """`Call` of tests/simt/rows_host.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("dtype", "out_dtype", "seed", "skip_barrier")),
        *((name, ctypes.c_int64) for name in ("sms", "shared_per_sm", "shared_per_block", "clusters")),
        ("threads", ctypes.c_int64),
        ("logits", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("stride", "rows", "cols", "offset")),
        ("bias", ctypes.c_void_p),
        ("logit_scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
        ("index", ctypes.c_void_p),
        ("dense", ctypes.c_void_p),
        ("dense_stride", ctypes.c_int64),
        ("topk_index", ctypes.c_void_p),
        ("topk_prob", ctypes.c_void_p),
        ("topk", ctypes.c_int64),
        ("active", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("norm", "coef", "upstream", "partial", "argmax")),
        ("threshold", ctypes.c_void_p),
        ("classes", ctypes.c_void_p),
        ("listed", ctypes.c_int64),
        ("sides", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("read", "written", "runs", "kept", "shared", "fuses")),
    )


@cache
def library_path() -> Path:
    """Compiled once in a process, removed when it ends."""
    folder = Path(mkdtemp(prefix="tightrope-simt-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return compile(folder / "rows.so", "-O2", "-shared", "-fPIC")


@cache
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(library_path()))


@dataclass
class Simt:
    """A device of ``sms`` multiprocessors; ``last`` is the call made last, with the plan and the traffic."""

    sms: int = 1
    shared_per_sm: int = 233_472
    shared_per_block: int = 232_448
    clusters: bool = True
    threads: int = 0
    seed: int = 0
    skip_barrier: int = -1
    last: Call | None = field(default=None, repr=False)

    def _run(self, kernel: str, logits: Tensor, tail: tuple, **tensors: Tensor | None) -> None:
        offset, tile = tail[0], TileArguments(*tail[1:])
        assert all(t is None or t.is_contiguous() for t in (tensors.get("threshold"), tensors.get("classes")))
        assert logits.stride(1) == 1 or logits.shape[1] == 1
        tensors |= {"logits": logits}
        tensors |= {name: t for name, t in vars(tile).items() if t is None or isinstance(t, Tensor)}
        call = Call(
            dtype=DTYPES.index(logits.dtype),
            out_dtype=DTYPES.index(tensors["out"].dtype if "out" in tensors else logits.dtype),
            **{name: getattr(self, name) for name in ("seed", "skip_barrier", "sms", "shared_per_sm")},
            **{name: getattr(self, name) for name in ("shared_per_block", "clusters", "threads")},
            **{name: t.data_ptr() for name, t in tensors.items() if t is not None},
            stride=logits.stride(0),
            rows=logits.shape[0],
            cols=logits.shape[1],
            offset=offset,
            logit_scale=tile.logit_scale,
            softcap=tile.softcap or 0.0,
            dense_stride=0 if tile.dense is None else tile.dense.stride(0),
            topk=0 if tile.topk_index is None else tile.topk_index.shape[1],
            listed=0 if tensors.get("classes") is None else tensors["classes"].shape[1],
            out_stride=tensors["out"].stride(0) if "out" in tensors else 0,
        )
        library().simt_run(KERNELS.index(kernel), ctypes.byref(call))
        self.last = call

    def row_stats(self, logits, partial, argmax, *tail) -> None:
        self._run("row_stats", logits, tail, partial=partial, argmax=argmax)

    def row_sides(self, logits, sides, offset, threshold, classes, *tail) -> None:
        which = {"threshold": threshold, "classes": classes}
        self._run("row_sides", logits, (offset, *tail), sides=sides, **which)

    def row_grad(self, logits, out, norm, coef, offset, threshold, classes, *tail) -> None:
        which = {"threshold": threshold, "classes": classes}
        self._run("row_grad", logits, (offset, *tail), out=out, norm=norm, coef=coef, **which)

    def row_loss_grad(self, logits, out, partial, argmax, upstream, *tail) -> None:
        tensors = {"out": out, "partial": partial, "argmax": argmax, "upstream": upstream}
        self._run("row_loss_grad", logits, (0, *tail), **tensors)

    def plan_loss(self, dtype: torch.dtype, rows: int, cols: int, sparse: int) -> Call:
        """The plan of row_loss_grad: runs (blocks of a cluster), kept (vectors), shared (bytes a block).

        And fuses: whether that kernel is the better way.
        """
        names = ("sms", "shared_per_sm", "shared_per_block", "clusters")
        call = Call(dtype=DTYPES.index(dtype), rows=rows, cols=cols, topk=sparse)
        for name in names:
            setattr(call, name, getattr(self, name))
        library().simt_plan_loss(ctypes.byref(call))
        return call
