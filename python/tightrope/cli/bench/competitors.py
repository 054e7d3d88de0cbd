"""Who competes: ours, and its peers; where each takes part, and why it cannot where it cannot.

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
from torch.torch_version import TorchVersion

import tightrope
from tightrope import backends

from . import peers
from .cases import Case, Loss
from .inputs import Step
from .peers import LossOf
from .truth import eager_loss, entropy_bonus

AUTO_CHUNKED = "torch.compile, auto-chunked"
SHAPES = ("large shape", "shapes")
WITHOUT_SWEEPS = (*SHAPES, "real shape", "scenarios")
EVERYWHERE = (*WITHOUT_SWEEPS, "against V", "against N")
HARD_TARGETS = ("pretraining", "sft", "lora")
PER_TOKEN = (*HARD_TARGETS, "rl")
NO_CURVATURE = "no second derivatives"
NO_TEACHER = "no such loss of a teacher's head"
# What a peer has not that does not serve a scenario.
LACKS = {
    "distillation": "no top-k targets",
    "teacher": NO_TEACHER,
    "divergence": NO_TEACHER,
    "rl": "no loss for each token",
    "curvature": NO_CURVATURE,
}
SAMPLED_NOISE = 0.005


@dataclass(frozen=True)
class Competitor:
    """name; the package whose version is reported; the loss of a step; and where it runs.

    refuses: (case, loss) -> the reason why it cannot run there, or None.
    entropy: whether it has the entropy term. fixed_memory: whether its first step's memory is that of any
    step; where it compiles itself in the first, a later one is measured. groups: the groups of cases that it
    takes part in; each case costs a process. noise: the `gradient_noise` that it is allowed; 0: it is exact.
    """

    name: str
    package: str
    loss: LossOf
    refuses: Callable[[Case, Loss], str | None]
    entropy: bool = True
    fixed_memory: bool = True
    groups: tuple[str, ...] = WITHOUT_SWEEPS
    noise: float = 0.0

    def loss_compared(self, loss: Loss) -> Loss:
        """The loss that it is compared on."""
        return loss if self.entropy else Loss("cross-entropy", "cross_entropy", 0.0)

    def version(self) -> str:
        return importlib.metadata.version(self.package)


def ours(step: Step, loss: Loss, **options: object) -> Tensor:
    """options: of the function of Tightrope that the step asks for."""
    if step.advantage is not None:
        stats = tightrope.linear_vocab_stats(step.hidden, step.weight, step.target, **options)
        rows = step.advantage * stats.target_log_prob + entropy_bonus(step, loss) * stats.entropy
        return -rows.sum() / step.normalizer
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
    """Ours with gradients that are drawn; their noise stands beside the time."""

    def refuses(case: Case, loss: Loss) -> str | None:
        if case.device != "cpu":
            return "gradients are sampled on a CPU alone"
        return "second derivatives are made in full" if case.scenario == "curvature" else None

    return Competitor(
        f"tightrope sampled, noise {SAMPLED_NOISE:g}",
        "tightrope",
        functools.partial(ours, gradient_noise=SAMPLED_NOISE),
        refuses,
        noise=SAMPLED_NOISE,
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


def _eager_refuses(case: Case, loss: Loss, chunks: int = 1) -> str | None:
    """The logits, a chunk at a time, and what is made of them must fit; the floor needs one copy of them."""
    need = 6 * case.rows * case.vocab * 4 / chunks
    free = _free_memory(case.device)
    if need > free / 2:
        return f"its logits take {need / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free"
    return None


def _compiled_refuses(case: Case, loss: Loss, chunks: int = 1) -> str | None:
    return NO_CURVATURE if case.scenario == "curvature" else _eager_refuses(case, loss, chunks)


def _free_memory(device: str) -> int:
    if device != "cpu":
        return torch.cuda.mem_get_info()[0]
    import psutil

    return psutil.virtual_memory().available


def _peer(
    name: str,
    package: str,
    module: str,
    loss: LossOf,
    *,
    devices: tuple[str, ...] = ("cpu", "cuda"),
    scenarios: tuple[str, ...] = HARD_TARGETS,
    entropy: bool = False,
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
        if importlib.util.find_spec(module) is None:
            return f"{package} is not installed"
        if case.scenario not in scenarios:
            return "a divergence of two heads alone" if "divergence" in scenarios else LACKS[case.scenario]
        return "no squared error" if loss.reality == "squared_error" else None

    return Competitor(name, package, loss, refuses, entropy, fixed_memory, groups)


def _torch_peer(name: str, loss: LossOf, groups: tuple[str, ...]) -> Competitor:
    has = hasattr(torch.nn.functional, "linear_cross_entropy")
    missing = None if has else f"torch {torch.__version__} has none"
    return _peer(name, "torch", "torch", loss, scenarios=PER_TOKEN, groups=groups, missing=missing)


def _trl_peer(name: str, loss: LossOf, scenarios: tuple[str, ...]) -> Competitor:
    """Its kernels by chunks came with 1.15, what they do without Triton with 1.16."""
    missing = None
    if importlib.util.find_spec("trl") is not None:
        version = importlib.metadata.version("trl")
        if TorchVersion(version) < "1.16":
            missing = f"trl {version} has none for every device, 1.16 has"
    return _peer(name, "trl", "trl", loss, scenarios=scenarios, entropy=True, missing=missing)


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
        Competitor("torch.compile", "torch", peers.compiled, _compiled_refuses, fixed_memory=False),
        Competitor(
            AUTO_CHUNKED,
            "torch",
            peers.auto_chunked,
            functools.partial(_compiled_refuses, chunks=peers.AUTO_CHUNKS),
            fixed_memory=False,
            groups=(*SHAPES, "real shape"),  # it compiles for ten to twenty seconds
        ),
        # By default several times slower than the floor: on a CPU a run would take minutes more.
        _torch_peer("F.linear_cross_entropy", peers.chunked_torch, SHAPES),
        _torch_peer(
            f"F.linear_cross_entropy, {peers.TORCH_CHUNK_ROWS} rows a chunk",
            functools.partial(peers.chunked_torch, batch_chunk_size=peers.TORCH_CHUNK_ROWS),
            WITHOUT_SWEEPS,
        ),
        _trl_peer("TRL", peers.trl, PER_TOKEN),
        _trl_peer("TRL JSD", peers.trl_divergence, ("divergence",)),
        _peer(
            "cut-cross-entropy",
            "cut-cross-entropy",
            "cut_cross_entropy",
            peers.cce,
            scenarios=PER_TOKEN,
            fixed_memory=False,
        ),
        _peer(
            "Liger scaled",
            "liger-kernel",
            "liger_kernel",
            peers.liger_scaled,
            scenarios=PER_TOKEN,
            entropy=True,
            groups=(*SHAPES, "scenarios"),
        ),
        _peer("Liger", "liger-kernel", "liger_kernel", peers.liger, devices=("cuda",)),
        _peer(
            "Liger JSD",
            "liger-kernel",
            "liger_kernel",
            peers.liger_divergence,
            scenarios=("divergence",),
            entropy=True,
            groups=(*SHAPES, "scenarios"),
        ),
        _peer("QuACK", "quack-kernels", "quack", peers.quack, devices=("cuda",)),
    ]
