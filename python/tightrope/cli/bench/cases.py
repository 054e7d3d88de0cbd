"""What is measured: a shape, a scenario of its use, and where the inputs come from.

A scenario fixes what is given and what is wanted; every competitor computes the same loss of the same
tensors. The default cases go from many rows under a small vocabulary to one row under a huge one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import UserError

SCENARIOS = {
    "pretraining": "every row counts, the head trains",
    "sft": "70 % of the rows are ignored",
    "lora": "the head is frozen",
    "distillation": "targets are a teacher's top 64",
    "teacher": "targets are a teacher's head, of twice the D",
    "divergence": "Jensen-Shannon of the two heads, whatever the loss",
    "rl": "log-probability and entropy of each token, with upstream gradients of their own",
    "curvature": "a Hessian-vector product, at a point whose gradients have their graph",
}
IGNORED_SHARE = 0.7
TEACHER_ENTRIES = 64
REAL_ROWS, REAL_DIM, REAL_VOCAB = 4096, 576, 49152  # of SmolLM2-135M and its text
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Loss:
    """``(1 - balance) * reality + balance * creativity``; creativity is the entropy."""

    name: str
    reality: str
    balance: float


LOSSES = {
    loss.name: loss
    for loss in (
        Loss("cross-entropy + entropy", "cross_entropy", 0.1),
        Loss("cross-entropy", "cross_entropy", 0.0),
        Loss("squared error + entropy", "squared_error", 0.1),
    )
}
# Of two heads, so of one scenario alone.
DIVERGENCE = Loss("Jensen-Shannon", "jensen_shannon", 0.0)
TAUGHT = ("teacher", "divergence")  # scenarios with a teacher's head


@dataclass(frozen=True)
class Case:
    """rows N, dim D and vocab V of a step, and the scenario and inputs that fill it."""

    name: str
    rows: int
    dim: int
    vocab: int
    scenario: str = "pretraining"
    inputs: str = "random"  # or "real": hidden states, head and tokens of SmolLM2
    dtype: str = "float32"
    device: str = "cpu"
    group: str = "shapes"  # or "large shape", "real shape", "scenarios", "against N", "against V"

    @property
    def shape(self) -> str:
        return f"N {self.rows}, D {self.dim}, V {self.vocab}"

    def scored(self, loss: Loss) -> Loss:
        """The loss that a run on that loss takes here."""
        return DIVERGENCE if self.scenario == "divergence" else loss

    @property
    def flops(self) -> float:
        """Of the three GEMMs."""
        return 6.0 * self.rows * self.dim * self.vocab

    @property
    def gradient_bytes(self) -> int:
        """Of the gradients that a step returns; for a Hessian-vector product also of that."""
        entries = self.rows * self.dim + (0 if self.scenario == "lora" else self.vocab * self.dim)
        return entries * DTYPES[self.dtype].itemsize * (2 if self.scenario == "curvature" else 1)


CPU_SHAPES = (
    Case("gpt2", 1024, 768, 50257, group="large shape"),
    Case("smollm2", 2048, REAL_DIM, REAL_VOCAB, inputs="real", group="real shape"),
    Case("small vocabulary", 8192, 64, 2000),
    Case("few wide rows", 16, 4096, 32000),
    Case("one row", 1, 896, 152000),
)
# bfloat16 training steps of 8 B models; the vocabularies of Llama 3, Qwen 3 and SmolLM2.
GPU_SHAPES = (
    Case("llama3-8b", 8192, 4096, 128256),
    Case("qwen3-8b", 8192, 4096, 151936),
    Case("qwen3.5-2b", 16384, 2048, 248320),
    Case("smollm2", 2048, REAL_DIM, REAL_VOCAB, inputs="real"),
    Case("small vocabulary", 65536, 512, 8192),
    Case("few rows", 16, 4096, 151936),
)
SCALES = (1 / 8, 1, 8)


def default_cases(device: str, dtype: str) -> list[Case]:
    """The shapes, then the other scenarios on real inputs, then time and memory against V and against N."""
    gpu = device != "cpu"
    shapes = GPU_SHAPES if gpu else CPU_SHAPES
    real = Case("", REAL_ROWS if gpu else 256, REAL_DIM, REAL_VOCAB, inputs="real", group="scenarios")
    scenarios = [replace(real, name=name, scenario=name) for name in SCENARIOS if name != "pretraining"]
    base = Case("", 8192, 1024, 32768) if gpu else Case("", 256, 64, 32768)
    sweeps = [
        *(_scaled(base, "vocab", scale, "against V") for scale in SCALES),
        *(_scaled(base, "rows", scale, "against N") for scale in SCALES),
    ]
    return [replace(case, device=device, dtype=dtype) for case in (*shapes, *scenarios, *sweeps)]


def _scaled(base: Case, axis: str, scale: float, group: str) -> Case:
    size = round(getattr(base, axis) * scale)
    return replace(base, **{axis: size}, name=f"{group[-1]} {size}", group=group)


def choose(
    *,
    device: str | None,
    dtype: str | None,
    shapes: Sequence[tuple[int, int, int]] | None,
    scenarios: Sequence[str] | None,
    inputs: str,
    names: Sequence[str] | None,
) -> list[Case]:
    """The cases that a command line asks for: the default ones, or every scenario of every shape given."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: got cuda, and PyTorch finds none here")
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    if shapes is None:
        if scenarios or inputs != "random":
            raise UserError("--scenario, --inputs: they fill a --shape, and none is given")
        cases = default_cases(device, dtype)
        unknown = sorted(set(names or ()) - {case.name for case in cases})
        if unknown:
            known = ", ".join(case.name for case in cases)
            raise UserError(f"--case: got {', '.join(unknown)}, expected some of: {known}")
        return [case for case in cases if not names or case.name in names]
    if names:
        raise UserError("--case: it names default cases, and --shape is given")
    for rows, dim, vocab in shapes:
        if inputs == "real" and ((dim, vocab) != (REAL_DIM, REAL_VOCAB) or rows > REAL_ROWS):
            raise UserError(
                f"--shape: got {rows},{dim},{vocab}, expected N,{REAL_DIM},{REAL_VOCAB} with N up to "
                f"{REAL_ROWS} for real inputs"
            )
    return [
        Case(scenario, *shape, scenario=scenario, inputs=inputs, dtype=dtype, device=device)
        for shape in shapes
        for scenario in scenarios or ("pretraining",)
    ]
