"""Who competes: how each computes the loss of a step, and why it cannot where it cannot.

A peer without the entropy term is compared on cross-entropy alone; then ours is too, beside it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import tightrope
from tightrope import backends

from .cases import TAUGHT, Case, Loss
from .inputs import IGNORE_INDEX, Step
from .truth import ENTROPY_BONUS, eager_loss

LossOf = Callable[[Step, Loss], Tensor]
HAS_CHUNKED_TORCH = hasattr(torch.nn.functional, "linear_cross_entropy")
AUTO_CHUNKED = "torch.compile, auto-chunked"
SHAPES = ("large shape", "shapes")
WITHOUT_SWEEPS = (*SHAPES, "real shape", "scenarios")
EVERYWHERE = (*WITHOUT_SWEEPS, "against V", "against N")
NO_CURVATURE = "no second derivatives"
SAMPLED_NOISE = 0.005


@dataclass(frozen=True)
class Competitor:
    """name; the package whose version is reported; the loss of a step; and where it runs.

    refuses: (case, loss) -> the reason why it cannot run there, or None.
    entropy: whether it has the entropy term. fixed_memory: whether its first step's memory is that of any
    step; where it compiles itself in the first, a later one is measured. groups: the groups of cases that it
    takes part in; each case costs a process.
    """

    name: str
    package: str
    loss: LossOf
    refuses: Callable[[Case, Loss], str | None]
    entropy: bool = True
    fixed_memory: bool = True
    groups: tuple[str, ...] = WITHOUT_SWEEPS

    def loss_compared(self, loss: Loss) -> Loss:
        """The loss that it is compared on."""
        return loss if self.entropy else Loss("cross-entropy", "cross_entropy", 0.0)

    def version(self) -> str:
        return importlib.metadata.version(self.package)


def ours(step: Step, loss: Loss, **options: object) -> Tensor:
    """options: of the function of Tightrope that the step asks for."""
    if step.advantage is not None:
        stats = tightrope.linear_vocab_stats(step.hidden, step.weight, step.target, **options)
        bonus = ENTROPY_BONUS * (loss.balance > 0)
        return -(step.advantage * stats.target_log_prob + bonus * stats.entropy).sum() / step.normalizer
    target = step.target if step.probs is None else tightrope.TopKTarget(step.target, step.probs)
    if step.teacher is not None:
        target = tightrope.TeacherTarget(*step.teacher)
    return tightrope.linear_reality_creativity_loss(
        step.hidden,
        step.weight,
        target,
        balance=loss.balance,
        reality=loss.reality,
        **options,
    )


def _sampled() -> Competitor:
    """Ours with gradients that are noisy: by how much stands beside its time, as the errors of dh and dW."""

    def refuses(case: Case, loss: Loss) -> str | None:
        return None if case.device == "cpu" else "gradients are sampled on a CPU alone"

    return Competitor(
        f"tightrope sampled, noise {SAMPLED_NOISE:g}",
        "tightrope",
        lambda step, loss: ours(step, loss, gradient_noise=SAMPLED_NOISE),
        refuses,
    )


def _ours(backend: str, devices: list[str], available: bool, strategy: str) -> Competitor:
    def refuses(case: Case, loss: Loss) -> str | None:
        if "any" not in devices and case.device not in devices:
            return f"the {backend} backend serves {' and '.join(devices)}"
        if not available:
            return f"the {backend} backend is not available here (see `tightrope info`)"
        if case.scenario == "rl" and strategy == "chunked":
            return "upstream gradients of each token are known only in the backward pass: streaming"
        return None

    def of_step(step: Step, loss: Loss) -> Tensor:
        options = {} if step.advantage is not None else {"strategy": strategy}
        return ours(step, loss, backend=backend, **options)

    return Competitor(
        f"tightrope {strategy} [{backend}]",
        "tightrope",
        of_step,
        refuses,
        groups=EVERYWHERE if backend != "eager" else ("shapes",),
    )


@functools.cache
def _compile(function: LossOf) -> LossOf:
    return torch.compile(function, dynamic=False, fullgraph=True)


def _compiled(step: Step, loss: Loss) -> Tensor:
    return _compile(eager_loss)(step, loss)


@functools.cache
def _compile_chunked() -> LossOf:
    return torch.compile(eager_loss, dynamic=False, fullgraph=True, options={"auto_chunker.enable": True})


def _compiled_in_chunks(step: Step, loss: Loss) -> Tensor:
    return _compile_chunked()(step, loss)


def _chunker_refuses(case: Case, loss: Loss) -> str | None:
    """On a CPU a run would take minutes more."""
    return _eager_refuses(case, loss) if case.device == "cuda" else "runs on cuda"


def _eager_refuses(case: Case, loss: Loss) -> str | None:
    """The logits and what is made of them must fit; the floor needs one copy of them."""
    need = 6 * case.rows * case.vocab * 4
    free = _free_memory(case.device)
    if need > free / 2:
        return f"its logits take {need / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free"
    return None


def _compiled_refuses(case: Case, loss: Loss) -> str | None:
    return NO_CURVATURE if case.scenario == "curvature" else _eager_refuses(case, loss)


def _free_memory(device: str) -> int:
    if device != "cpu":
        return torch.cuda.mem_get_info()[0]
    import psutil

    return psutil.virtual_memory().available


def _chunked_torch(step: Step, loss: Loss) -> Tensor:
    return torch.nn.functional.linear_cross_entropy(
        step.hidden, step.weight, step.target, options=torch.nn.LinearCrossEntropyOptions()
    )


def _cce(step: Step, loss: Loss) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    kind = "torch_compile" if step.hidden.device.type == "cpu" else "cce"
    per_token = step.advantage is not None
    value = linear_cross_entropy(
        step.hidden, step.weight, step.target, impl=kind, reduction="none" if per_token else "mean"
    )
    return (step.advantage * value).sum() / step.normalizer if per_token else value


def _liger(step: Step, loss: Loss) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(step.weight, step.hidden, step.target)


def _liger_scaled(step: Step, loss: Loss) -> Tensor:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(
        step.hidden, step.weight, step.target, 1.0, IGNORE_INDEX, 1, True
    )
    if step.advantage is not None:
        rows = step.advantage * nll - ENTROPY_BONUS * (loss.balance > 0) * entropy
    else:
        rows = (1 - loss.balance) * nll - loss.balance * entropy
    return rows.sum() / step.normalizer


def _liger_divergence(step: Step, loss: Loss) -> Tensor:
    """On a CPU its chunks of rows in plain PyTorch: the Triton kernels do not run there.

    Not compiled: that took two minutes, more than a line of the bench has.
    """
    if step.hidden.device.type == "cuda":
        from liger_kernel.transformers import LigerFusedLinearJSD

        divergence = LigerFusedLinearJSD()
    else:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        divergence = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=False)
    return divergence(step.hidden, step.weight, *step.teacher, step.target)


def _liger_divergence_refuses(case: Case, loss: Loss) -> str | None:
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return None if case.scenario == "divergence" else "a divergence of two heads alone"


def _quack(step: Step, loss: Loss) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(step.hidden, step.weight, step.target, ignore_index=IGNORE_INDEX)


def _peer(
    name: str,
    package: str,
    module: str,
    loss: LossOf,
    *,
    devices: tuple[str, ...] = ("cpu", "cuda"),
    entropy: bool = False,
    per_token: bool = False,
    fixed_memory: bool = True,
    groups: tuple[str, ...] = WITHOUT_SWEEPS,
    missing: str | None = None,
) -> Competitor:
    """missing: what this version of the package has not, though it is installed."""

    def refuses(case: Case, loss: Loss) -> str | None:
        if missing is not None:
            return missing
        if case.device not in devices:
            return f"runs on {' and '.join(devices)}"
        if importlib.util.find_spec(module.split(".")[0]) is None:
            return f"{package} is not installed"
        if loss.reality != "cross_entropy":
            return "no squared error"
        if case.scenario == "distillation":
            return "no top-k targets"
        if case.scenario == "curvature":
            return NO_CURVATURE
        if case.scenario in TAUGHT:
            return "no such loss of a teacher's head"
        if case.scenario == "rl" and not per_token:
            return "no loss for each token"
        return None

    return Competitor(name, package, loss, refuses, entropy, fixed_memory, groups)


def all_competitors() -> list[Competitor]:
    """Ours on every backend, then the peers."""
    mine = [
        _ours(row["backend"], row["devices"], row["available"], strategy)
        for row in backends.describe()
        for strategy in ("chunked", "streaming")
    ]
    return [
        *mine,
        _sampled(),
        Competitor("eager PyTorch", "torch", eager_loss, _eager_refuses, groups=EVERYWHERE),
        Competitor("torch.compile", "torch", _compiled, _compiled_refuses, fixed_memory=False),
        Competitor(AUTO_CHUNKED, "torch", _compiled_in_chunks, _chunker_refuses, fixed_memory=False),
        # Several times slower than the floor: on a CPU a run would take minutes more.
        _peer(
            "F.linear_cross_entropy",
            "torch",
            "torch",
            _chunked_torch,
            groups=SHAPES,
            missing=None if HAS_CHUNKED_TORCH else f"torch {torch.__version__} has none",
        ),
        _peer(
            "cut-cross-entropy",
            "cut-cross-entropy",
            "cut_cross_entropy",
            _cce,
            per_token=True,
            fixed_memory=False,
        ),
        _peer(
            "Liger scaled",
            "liger-kernel",
            "liger_kernel",
            _liger_scaled,
            entropy=True,
            per_token=True,
            groups=(*SHAPES, "scenarios"),
        ),
        _peer("Liger", "liger-kernel", "liger_kernel", _liger, devices=("cuda",)),
        Competitor(
            "Liger JSD",
            "liger-kernel",
            _liger_divergence,
            _liger_divergence_refuses,
            groups=(*SHAPES, "scenarios"),
        ),
        _peer("QuACK", "quack-kernels", "quack", _quack, devices=("cuda",)),
    ]
