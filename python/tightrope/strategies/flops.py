"""What FlopCounterMode is told of the operators, which are opaque to it."""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from types import ModuleType

import torch
from torch import Tensor

from ..ambient import has_values
from ..support import RowSets
from . import (
    ops,
    soft_ops,  # noqa: F401
    tangent_ops,  # noqa: F401  (registers operators)
    tangents,
)


def _products(rows: int, weight: Tensor, count: int) -> int:
    """FLOPs of so many products of rows, D and V."""
    vocab_size, width = weight.shape
    return 2 * rows * width * vocab_size * count


def _counted(input: Tensor, arguments) -> int:
    """Rows that go through the products."""
    valid = arguments.valid
    if valid is None or not arguments.skip or not has_values(valid):
        return input.shape[0]
    return int(valid.sum())


def _of_teacher(rows: int, weight: Tensor, arguments, count: int, mixed: int = 1) -> int:
    """FLOPs of so many passes over a teacher's logits, or over both heads' for their mixture."""
    if arguments.teacher_weight is None:
        return 0
    if arguments.teacher_form != "mixture":
        return _products(rows, arguments.teacher_weight, count)
    return _products(rows, arguments.teacher_weight, mixed) + _products(rows, weight, mixed)


def _linear_stats(input, weight, bias, arguments):
    # For a set of classes the logits are made twice; so are a teacher's, which are normalised first.
    rows = _counted(input, arguments)
    of_teacher = _of_teacher(rows, weight, arguments, 2, 3)
    return of_teacher + _products(rows, weight, 1 if RowSets.of(arguments) is None else 2)


def _linear_stats_backward(summary, coef, needs, input, weight, bias, arguments):
    rows = _counted(input, arguments)
    of_teacher = _of_teacher(rows, weight, arguments, 1)
    return of_teacher + _products(rows, weight, 1 + needs.input_grad + needs.weight_grad)


def _linear_loss(row_scale, balance, target_square, family, needs, input, weight, bias, arguments):
    rows = _counted(input, arguments)
    of_teacher = _of_teacher(rows, weight, arguments, 1, 2)
    return of_teacher + _products(rows, weight, 1 + needs.input_grad + needs.weight_grad)


def _chunk_stats(memory, span, input, weight, bias, arguments):
    rows = span.stop - span.start
    return _of_teacher(rows, weight, arguments, 1) + _products(rows, weight, 1)


def _chunk_gradients(
    memory, summary, coef, span, to_input, to_weight, to_bias, to_temperature, input, weight, bias, arguments
):
    return _products(span.stop - span.start, weight, (to_input is not None) + (to_weight is not None))


def _moved(direction) -> int:
    """Products that the direction of a tile of logits takes."""
    return (direction.input_tangent is not None) + (direction.weight_tangent is not None)


def _linear_tangent(summary, direction, input, weight, bias, arguments):
    rows = _counted(input, arguments)
    return _of_teacher(rows, weight, arguments, 1) + _products(rows, weight, 1 + _moved(direction))


def _linear_curvature(
    summary, grads, named, grads_tangent, named_tangent, direction, needs, input, weight, bias, arguments
):
    rows, moves_head = _counted(input, arguments), direction.weight_tangent is not None
    held = tangents.holds_chunks(rows, weight.shape[0], summary.dtype, arguments.budget, input.device)
    count = (1 if held else 2) * (1 + _moved(direction))
    count += needs.input_grad * (1 + moves_head)
    count += needs.weight_grad * (1 + (direction.input_tangent is not None))
    return _of_teacher(rows, weight, arguments, 2) + _products(rows, weight, count)


def _linear_target_grad(summary, slopes, input, weight, bias, arguments):
    return _products(_counted(input, arguments), weight, 1)


_FORMULAS = {
    "linear_stats": _linear_stats,
    "linear_stats_backward": _linear_stats_backward,
    "linear_loss": _linear_loss,
    "chunk_stats": _chunk_stats,
    "chunk_gradients": _chunk_gradients,
    "linear_target_grad": _linear_target_grad,
    "linear_tangent": _linear_tangent,
    "linear_curvature": _linear_curvature,
}


def _register(flop_counter: ModuleType) -> None:
    for name, formula in _FORMULAS.items():

        def flat(*arguments, out_val=None, signature=ops.SIGNATURES[name], formula=formula, **_):
            return formula(*signature.unflatten(*arguments))

        flop_counter.register_flop_formula(getattr(torch.ops.tightrope, name), get_raw=True)(flat)


class _WhenImported(MetaPathFinder):
    """Registers the formulas when the counter is imported, which brings all of Triton: 60 MiB."""

    def find_spec(self, name, path, target=None):
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _register(module)

        spec.loader.exec_module = exec_module
        return spec


_COUNTER = "torch.utils.flop_counter"
if _COUNTER in sys.modules:
    _register(sys.modules[_COUNTER])
else:
    sys.meta_path.insert(0, _WhenImported())
