"""Checks of what a caller passes. Each error names the argument, what came and what was expected.

Nothing here reads the values of a tensor on a device that would have to be waited for, and nothing at all
while torch.compile traces; `ambient.may_read` and the operators say where the values are looked at.

A number is a Python or numpy number, or a tensor of one element, as Trainer and data loaders make them; it is
given back as a Python number.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from .ambient import may_read
from .arguments import NoiseArguments, Transform
from .backends import BACKENDS
from .losses import CREATIVITY, REALITY, RealityCreativity
from .support import Classes, MinP

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGER = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)
REDUCTIONS = ("none", "mean", "sum")
STRATEGIES = ("chunked", "streaming")
# The default of ignore_index.
NOTHING_IGNORED = -100
# 4 EiB: what a count of bytes in 64 bits can still hold.
MOST_WORKSPACE_MB = 2**42


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def tensor(name: str, value: object, dtypes: Sequence[torch.dtype] = FLOATING) -> Tensor:
    """``value`` as a tensor of one of ``dtypes``, else TypeError."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor ({_names(dtypes)})")
    if value.dtype not in dtypes:
        raise TypeError(
            f"{name}: got dtype {str(value.dtype).removeprefix('torch.')}, expected one of {_names(dtypes)}"
        )
    if value.layout != torch.strided:
        raise TypeError(f"{name}: got layout {value.layout}, expected a dense (strided) tensor")
    return value


def choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, allowed))}")


def _one_element(name: str, value: object, expected: str) -> object:
    """The element of a tensor or numpy array of one; what is neither as it is."""
    if not isinstance(value, Tensor):
        return value.item() if getattr(value, "size", 0) == 1 and hasattr(value, "item") else value
    if value.numel() != 1:
        raise TypeError(f"{name}: got a tensor of shape {list(value.shape)}, expected {expected}")
    if value.requires_grad:
        raise ValueError(
            f"{name}: got a tensor that requires grad, expected {expected}: this option has no gradient"
        )
    return value.item()


def number(
    name: str,
    value: object,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: bool = False,
    dtype: torch.dtype = torch.float64,
) -> float:
    """A finite real number in [low, high], or in (low, high] with ``above``, that ``dtype`` can hold."""
    most = torch.finfo(dtype).max
    expected = "a finite number"
    if low > -math.inf:
        expected += f" {'above' if above else 'of at least'} {low:g}"
    if high < math.inf:
        expected += f" and at most {high:g}"
    value = _one_element(name, value, expected)
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected {expected}")
    if not isinstance(value, (int, float)):
        value = float(value)  # of numpy: a comparison in its own dtype could overflow
    if not (low <= value <= high) or (above and value == low) or abs(value) == math.inf:
        raise ValueError(f"{name}: got {value!r}, expected {expected}")
    if abs(value) > most:
        largest = f"at most {most:.5g}, the largest of {_names([dtype])}"
        raise ValueError(f"{name}: got {value!r}, expected {largest}")
    return float(value)


def integer(name: str, value: object, *, low: int | None = None) -> int:
    expected = "an integer" + ("" if low is None else f" of at least {low}")
    value = _one_element(name, value, expected)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: got {type(value).__name__}, expected {expected}")
    if low is not None and value < low:
        raise ValueError(f"{name}: got {value}, expected {expected}")
    return operator.index(value)


def flag(name: str, value: object, allowed: Sequence[bool | None]) -> None:
    if value not in allowed or (value is not None and not isinstance(value, bool)):
        raise TypeError(f"{name}: got {value!r}, expected one of {', '.join(map(str, allowed))}")


def same_device(reference: str, expected: torch.device, **others: Tensor | None) -> None:
    for name, t in others.items():
        if t is not None and t.device != expected:
            raise ValueError(
                f"{name}: got a tensor on {t.device}, expected {expected}, the device of {reference}"
            )


def head(input: object, weight: object, bias: object, least: int = 1) -> None:
    """Hidden states (..., D), vocabulary head (V, D) with V of at least ``least``, bias (V) or None."""
    tensor("input", input)
    tensor("weight", weight)
    if input.dim() < 1:
        raise ValueError("input: got a 0-dimensional tensor, expected (..., D)")
    if weight.dim() != 2 or weight.shape[0] < least:
        raise ValueError(
            f"weight: got shape {list(weight.shape)}, expected (V, D) with V of at least {least}"
        )
    if input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"input: got last dimension {input.shape[-1]}, expected D = {weight.shape[1]}, that of weight "
            f"{list(weight.shape)}"
        )
    if bias is not None:
        tensor("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"bias: got shape {list(bias.shape)}, expected [{weight.shape[0]}], the V of weight"
            )
    same_device("input", input.device, weight=weight, bias=bias)


def logits(value: object, least: int = 1) -> None:
    tensor("logits", value)
    if value.dim() < 1 or value.shape[-1] < least:
        raise ValueError(
            f"logits: got shape {list(value.shape)}, expected (..., V) with V of at least {least}"
        )


def per_token(name: str, value: object, tokens: torch.Size, device: torch.device) -> None:
    """A real tensor that broadcasts to the tokens."""
    tensor(name, value, (*FLOATING, *INTEGER, torch.bool))
    same_device("the tokens", device, **{name: value})
    if value.dim() > len(tokens) or any(
        have not in (1, want) for have, want in zip(reversed(value.shape), reversed(tokens))
    ):
        raise ValueError(
            f"{name}: got shape {list(value.shape)}, expected one that broadcasts to {list(tokens)}"
        )


def class_weight(value: object, vocab_size: int, device: torch.device, reality: str) -> None:
    """Weights (V) of the classes."""
    tensor("class_weight", value)
    same_device("input", device, class_weight=value)
    if value.shape != (vocab_size,):
        raise ValueError(f"class_weight: got shape {list(value.shape)}, expected {[vocab_size]}, one a class")
    if value.requires_grad:
        raise ValueError("class_weight: got a tensor that requires grad, expected one that does not")
    if reality != "cross_entropy":
        raise ValueError(f'class_weight: got reality={reality!r}, expected "cross_entropy"')


def loss_function(loss_fn: object, row_args: object, tokens: torch.Size, device: torch.device) -> None:
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn: got {type(loss_fn).__name__}, expected a callable (stats, *row_args) -> Tensor"
        )
    if not isinstance(row_args, (tuple, list)):
        raise TypeError(f"row_args: got {type(row_args).__name__}, expected a tuple of tensors")
    for i, arg in enumerate(row_args):
        name = f"row_args[{i}]"
        if isinstance(arg, Tensor) and arg.shape[: len(tokens)] == tokens:
            same_device("input", device, **{name: arg})
        else:
            per_token(name, arg, tokens, device)


def balance(value: object, tokens: torch.Size, device: torch.device) -> float | Tensor:
    if not isinstance(value, Tensor):
        return number("balance", value, low=0.0, high=1.0)
    if value.numel() == 1:
        value = value.reshape(())
    per_token("balance", value, tokens, device)
    if may_read(value) and value.numel():
        low, high = value.detach().aminmax()
        if not (low >= 0 and high <= 1):
            raise ValueError(f"balance: got values from {low.item()} to {high.item()}, expected [0, 1]")
    return value


def normalizer(value: object) -> float | Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor):
        return number("normalizer", value, low=0.0)
    tensor("normalizer", value, (*FLOATING, *INTEGER))
    if value.numel() != 1:
        raise ValueError(
            f"normalizer: got shape {list(value.shape)}, expected a number or a tensor of one element "
            "(0-dimensional)"
        )
    if value.requires_grad:
        raise ValueError("normalizer: got a tensor that requires grad, expected one that does not")
    if may_read(value):
        number("normalizer", value.item(), low=0.0)
    return value


def weights_of_one_sign(weight: Tensor) -> None:
    """Weights of both signs have a sum near 0, which is nothing to divide by."""
    if not may_read(weight) or not weight.numel():
        return
    low, high = weight.detach().aminmax()
    if low < 0 < high:
        raise ValueError(
            f"row_weight: got weights from {low.item():g} to {high.item():g}, expected weights of one sign "
            'with reduction="mean", which divides by their sum; or give normalizer=, such as their number'
        )


def shift(value: object, tokens: torch.Size) -> int:
    value = integer("shift", value, low=0)
    if value and not tokens:
        raise ValueError(f"shift: got {value} for a single token, expected 0, or tokens of shape (..., T)")
    return value


def ignore_index(value: object, target: object) -> int:
    value = integer("ignore_index", value)
    if value != NOTHING_IGNORED and isinstance(target, Tensor) and target.is_floating_point():
        raise ValueError(
            f"ignore_index: got {value} with a distribution as target, expected class indices or a "
            "TopKTarget; to ignore tokens of a distribution give them a row_weight of 0"
        )
    return value


def transform(
    logit_scale: object, softcap: object, dtype: torch.dtype = torch.float64, temperature: object = 1.0
) -> Transform:
    """``logit_scale``, ``softcap`` and a temperature that is a number, for an arithmetic of ``dtype``.

    ``cap tanh(s x / cap) / T`` is the transform whose scale is ``s / T`` and whose softcap is ``cap / T``.
    """
    limits = torch.finfo(dtype)
    scale = number("logit_scale", logit_scale, dtype=dtype)
    temperature = number("temperature", temperature, low=0.0, above=True, dtype=dtype)
    cap = None
    if softcap is not None:
        cap = number("softcap", softcap, low=0.0, above=True, dtype=dtype)
        if cap < limits.tiny:
            raise ValueError(f"softcap: got {cap!r}, expected at least {limits.tiny:.5g}")
    if temperature == 1.0:
        return Transform(scale, cap)
    ends = [abs(x) / temperature for x in (scale, cap) if x]
    if not all(limits.tiny <= x <= limits.max for x in ends):
        raise ValueError(
            f"temperature: got {temperature!r}, expected one by which logit_scale ({scale:g}) and softcap "
            f"({cap}) can be divided in {_names([dtype])}"
        )
    return Transform(scale / temperature, None if cap is None else cap / temperature)


def temperature(value: object, tokens: torch.Size, device: torch.device) -> object | Tensor:
    """A number as it came, or a tensor that broadcasts to the tokens."""
    if not isinstance(value, Tensor):
        return value
    if value.numel() == 1:
        if not value.requires_grad and not torch.compiler.is_compiling():
            return value
        value = value.reshape(())
    tensor("temperature", value)
    per_token("temperature", value, tokens, device)
    return value


def temperatures(rows: Tensor) -> None:
    """Temperatures [N] of the rows that count, and 1 of the others."""
    if not may_read(rows) or not rows.numel():
        return
    low, high = rows.detach().aminmax()
    if not (low > 0 and high < math.inf):
        raise ValueError(
            f"temperature: got values from {low.item():g} to {high.item():g}, expected finite ones above 0"
        )


def support(value: object, tokens: torch.Size, device: torch.device, owner: str) -> None:
    """A set of classes, or None; ``owner`` is what has the tokens."""
    if value is None:
        return
    if isinstance(value, MinP):
        number("support.x", value.x, low=0.0, high=1.0, above=True)
    elif isinstance(value, Classes):
        indices = tensor("support.indices", value.indices, INTEGER)
        if indices.dim() < 1 or indices.shape[:-1] != tokens or indices.shape[-1] < 1:
            raise ValueError(
                f"support.indices: got shape {list(indices.shape)}, expected {[*tokens, 'K']} with K of at "
                "least 1"
            )
        same_device(owner, device, **{"support.indices": indices})
    else:
        raise TypeError(
            f"support: got {type(value).__name__}, expected tightrope.MinP(x), tightrope.Classes(indices) or "
            "None"
        )


def loss_terms(
    vocab_size: int,
    reality: object,
    creativity: object,
    label_smoothing: object,
    z_loss: object,
    logit_l2: object,
    dtype: torch.dtype = torch.float64,
) -> RealityCreativity:
    """The built-in loss that these name."""
    choice("reality", reality, REALITY)
    choice("creativity", creativity, CREATIVITY)
    return RealityCreativity(
        vocab_size,
        reality,
        creativity,
        number("label_smoothing", label_smoothing, low=0.0, high=1.0),
        number("z_loss", z_loss, low=0.0, dtype=dtype),
        number("logit_l2", logit_l2, low=0.0, dtype=dtype),
    )


def gradient_noise(value: object) -> NoiseArguments:
    """One number in [0, 1) for both gradients, or a pair of them."""
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(
            f"gradient_noise: got {len(pair)} numbers, expected one, or two: of the gradients of input and "
            "weight"
        )
    numbers = [number("gradient_noise", x, low=0.0) for x in pair]
    for x in numbers:
        if x >= 1:
            raise ValueError(f"gradient_noise: got {x:g}, expected a number below 1: a share of the gradient")
    return NoiseArguments(*numbers)


def run_options(
    backend: object, workspace_mb: object = None, strategy: object = None, skip_ignored: object = None
) -> float | None:
    """Checks them; gives workspace_mb as a number."""
    if backend is not None:
        choice("backend", backend, tuple(BACKENDS))
    if strategy is not None:
        choice("strategy", strategy, STRATEGIES)
    flag("skip_ignored", skip_ignored, (None, True, False))
    if workspace_mb is None:
        return None
    return number("workspace_mb", workspace_mb, low=0.0, high=MOST_WORKSPACE_MB, above=True)
