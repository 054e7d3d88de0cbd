"""Which implementation of the row primitives serves a device: one table, and loading the extensions."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from . import ops, second

_EXTENSIONS = {"DEFAULT": "_C_base", "AVX2": "_C_avx2", "AVX512": "_C_avx512"}


def _import_extension(name: str) -> tuple[ModuleType | None, str]:
    """An extension, or None and why. One of another minor version of torch may load, and crash later."""
    spec = importlib.util.find_spec(f"tightrope.{name}")
    if spec is None or spec.origin is None:
        return None, "not built"
    note = Path(spec.origin).with_name("_C_torch.txt")  # setup.py leaves it
    built = note.read_text() if note.is_file() else torch.__version__
    if built.split(".")[:2] != torch.__version__.split(".")[:2]:
        return None, f"{name} was built for torch {built}, this is {torch.__version__}: build tightrope again"
    try:
        return importlib.import_module(f"tightrope.{name}"), ""
    except ImportError as error:
        return None, f"{name} does not load: {error}"


def _load_extension() -> tuple[ModuleType | None, str]:
    """The CPU extension for the best instruction set that this CPU has and that was built; and why."""
    if os.environ.get("TIGHTROPE_DISABLE_EXT") == "1":
        return None, "switched off by TIGHTROPE_DISABLE_EXT=1"
    capability = torch.backends.cpu.get_cpu_capability()
    name = _EXTENSIONS.get(capability, "_C_base")
    reasons = []
    for candidate in dict.fromkeys((name, "_C_base")):
        module, reason = _import_extension(candidate)
        if module is not None:
            return module, f"{candidate}, {module.lanes} float32 lanes"
        reasons.append(reason)
    return None, next((reason for reason in reasons if reason != "not built"), "not built")


_extension, _extension_detail = _load_extension()


# Inner entries of what `ops.pairs` writes are a multiple of this.
PAIR_MULTIPLE = 32
# Columns in a panel of the CPU extension's own products (`ops.panels`); None where there is none.
PANEL: int | None = getattr(_extension, "panel", None)


def _load_cuda_extension() -> tuple[ModuleType | None, str]:
    """The CUDA extension, and what it was built for, or why it is not here."""
    if os.environ.get("TIGHTROPE_DISABLE_EXT") == "1":
        return None, "switched off by TIGHTROPE_DISABLE_EXT=1"
    if torch.version.cuda is None:
        return None, "this torch is not a CUDA build"
    module, reason = _import_extension("_C_cuda")
    return module, reason if module is None else f"_C_cuda, for {module.architectures}"


_cuda_extension, _cuda_extension_detail = _load_cuda_extension()


@dataclass(frozen=True)
class Backend:
    """An implementation of the row primitives; their contract is at the top of ``ops.py``.

    The streaming ones, fused with the GEMM, are optional; theirs is at the top of ``triton.py``.
    """

    name: str
    devices: tuple[str, ...]  # empty: any
    available: bool
    detail: str
    row_stats: Callable[..., None]
    row_grad: Callable[..., None]
    row_sides: Callable[..., None]
    row_loss_grad: Callable[..., None] = ops.row_loss_grad
    # Of second order; their contract is at the top of ``second.py``.
    row_tangent: Callable[..., None] = second.row_tangent
    row_grad_tangent: Callable[..., None] = second.row_grad_tangent
    # (rows, vocab_size, sparse targets a row, dtype of logits, device) -> whether row_loss_grad beats the two
    # others for such whole rows, and may write a narrower gradient into the memory of the logits.
    fuses: Callable[..., bool] = lambda rows, vocab_size, sparse, dtype, device: False
    stream_stats: Callable[..., None] | None = None
    stream_grad: Callable[..., None] | None = None
    serves_stream: Callable[..., bool] = lambda hidden, weight: False
    narrows: bool = False  # row_grad writes to an out of a narrower dtype than the logits
    max_topk: int | None = None  # entries of a top-k target that the row primitives take; None: any number
    column_sums: Callable[..., None] = torch.ops.tightrope.column_sums
    row_grad_sums: Callable[..., None] = torch.ops.tightrope.row_grad_sums
    # Of columns that a device has drawn, whose number nothing waits for.
    drawn_columns: Callable[..., None] = ops.drawn_columns
    drawn_by_head: Callable[..., None] = ops.drawn_by_head
    drawn_by_hidden: Callable[..., None] = ops.drawn_by_hidden
    draws: bool = False  # these take the time of the columns that were drawn, not of all
    # (a, pairs, out, add), where the CPU has instructions for products of bfloat16 with a float32 result
    pair_product: Callable[..., None] | None = None
    product_stats: Callable[..., None] | None = None  # where it makes logits by products of its own
    on_request: tuple[str, ...] = ()  # devices that it serves where it is asked for by name

    def serves(self, device: torch.device, asked: bool = False) -> bool:
        devices = self.devices + (self.on_request if asked else ())
        return self.available and (not self.devices or device.type in devices)


def _cuda_fuses(rows: int, vocab_size: int, sparse: int, dtype: torch.dtype, device: torch.device) -> bool:
    return _cuda_extension.fuses(rows, vocab_size, sparse, dtype == torch.float64, device.index)


def _triton(primitive: str, module: str = "triton") -> Callable:
    """A primitive of the Triton backend, whose module is imported when it is first called."""

    def call(tensor, *args):
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device_of(tensor):
            return getattr(importlib.import_module(f"{__name__}.{module}"), primitive)(tensor, *args)

    return call


def _find_triton() -> tuple[bool, str]:
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True, 'on the CPU too, by backend="triton", as TRITON_INTERPRET=1'
    return True, "on the CPU under TRITON_INTERPRET=1 only"


_has_triton, _triton_detail = _find_triton()
_STREAMING = {name: _triton(name) for name in ("stream_stats", "stream_grad", "serves_stream") if _has_triton}
_DRAWN = {
    name: _triton(name, "triton_drawn")
    for name in ("row_grad_sums", "drawn_columns", "drawn_by_head", "drawn_by_hidden")
    if _has_triton
}
_DRAWN |= {"column_sums": ops.column_sums, "draws": _has_triton}
_SECOND = {
    name: _triton(name, "triton_second") for name in ("row_tangent", "row_grad_tangent") if _has_triton
}


# In order of preference.
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            "cpu",
            ("cpu",),
            _extension is not None,
            _extension_detail,
            torch.ops.tightrope.row_stats,
            torch.ops.tightrope.row_grad,
            torch.ops.tightrope.row_sides,
            row_tangent=torch.ops.tightrope.row_tangent,
            row_grad_tangent=torch.ops.tightrope.row_grad_tangent,
            pair_product=torch.ops.tightrope.pair_product if getattr(_extension, "pairs", False) else None,
            product_stats=torch.ops.tightrope.product_stats,
        ),
        # Its own row kernels, and Triton's streaming ones, those of second order and of sampled gradients.
        Backend(
            "cuda",
            ("cuda",),
            _cuda_extension is not None,
            _cuda_extension_detail,
            torch.ops.tightrope.row_stats,
            torch.ops.tightrope.row_grad,
            torch.ops.tightrope.row_sides,
            torch.ops.tightrope.row_loss_grad,
            fuses=_cuda_fuses,
            **_STREAMING,
            **_SECOND,
            **_DRAWN,
            narrows=True,
            max_topk=getattr(_cuda_extension, "max_topk", None),
        ),
        Backend(
            "triton",
            ("cuda",),
            _has_triton,
            _triton_detail,
            _triton("row_stats"),
            _triton("row_grad"),
            _triton("row_sides"),
            **_STREAMING,
            **_SECOND,
            **_DRAWN,
            narrows=True,
            on_request=("cpu",) if os.environ.get("TRITON_INTERPRET") == "1" else (),
        ),
        Backend(
            "eager",
            (),
            True,
            "plain PyTorch, same chunks",
            ops.row_stats,
            ops.row_grad,
            ops.row_sides,
            narrows=True,
            column_sums=ops.column_sums,
            row_grad_sums=ops.row_grad_sums,
        ),
    )
}
_warned = False


def resolve(name: str | None, device: torch.device) -> Backend:
    """The backend called ``name``, or the preferred one of a device.

    Raises:
        ValueError: no backend has that name, or it does not serve that device.
    """
    global _warned
    if name is not None:
        if name not in BACKENDS:
            raise ValueError(f"backend: got {name!r}, expected one of {sorted(BACKENDS)} or None")
        if not BACKENDS[name].serves(device, asked=True):
            backend = BACKENDS[name]
            raise ValueError(
                f"backend: {name!r} does not serve tensors on {device} here ({backend.detail}; "
                f"devices: {', '.join(backend.devices) or 'any'})"
            )
        return BACKENDS[name]
    found = next(backend for backend in BACKENDS.values() if backend.serves(device))
    if device.type == "cpu" and found.name == "eager" and not _warned:
        _warned = True
        warnings.warn(
            f"tightrope: the CPU extension is not in use ({_extension_detail}); running on plain PyTorch, "
            "slower and with the same results. Reinstall with a C++ compiler present to build it.",
            RuntimeWarning,
            stacklevel=2,
        )
    return found


def describe() -> list[dict[str, object]]:
    """The table, for ``tightrope info``: backend, devices, available, detail."""
    return [
        {
            "backend": backend.name,
            "devices": list(backend.devices) or ["any"],
            "available": backend.available,
            "detail": backend.detail,
        }
        for backend in BACKENDS.values()
    ]
