"""The figures of a model on held-out text: each temperature, and what min-p sampling keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..support import Classes, MinP
from .subject import IGNORED, ClassSets, Head, Subject, min_p_mask, nuclei

TEMPERATURES = (0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.45, 1.6)
MIN_PS = (0.02, 0.05, 0.1)


class Row(NamedTuple):
    """One setting of one model, means over the tokens of the text; what a line of evaluate.csv holds.

    Nats and shares. With min_p the figures are those of the kept classes, renormalised, at temperature 1,
    where a token of the text may be missing, so that there is no cross-entropy. The errors are standard
    errors of the mean over windows; None for one window.
    """

    model: str
    temperature: float
    min_p: float | None
    cross_entropy: float | None
    entropy: float
    #: mass outside of the judge's nucleus
    implausible_mass: float
    top1_accuracy: float
    #: of min-p: the mass that it keeps
    kept_mass: float
    cross_entropy_error: float | None
    entropy_error: float | None
    implausible_mass_error: float | None
    tokens: int


@torch.no_grad()
def sweep(
    name: str,
    model: nn.Module | Subject,
    windows: Tensor,
    plausible: ClassSets,
    *,
    temperatures: Sequence[float] = TEMPERATURES,
    min_ps: Sequence[float] = MIN_PS,
    batch_size: int = 4,
) -> Iterator[Row]:
    """Yields the rows of one model: each temperature, then each min-p.

    Args:
        windows: token ids ``(W, L)``, L at least 2; each token but a window's first is scored once.
        plausible: the judge's :func:`nuclei` on these windows.
        temperatures: positive; temperatures by which the logits are divided.
        min_ps: each in (0, 1].
    """
    subject = Subject.of(model)
    hidden, target = subject.rows(windows, batch_size), windows[:, 1:].flatten()
    target = target.to(hidden.device)
    if len(plausible.sizes) != len(target):
        raise ValueError(
            f"plausible: got {len(plausible.sizes)} sets, expected one for each of {len(target)} tokens"
        )

    def each(measure: Callable[..., Sequence[Tensor]]) -> list[Tensor]:
        """What ``measure`` makes of chunks of rows, [W, L - 1] float64 each."""
        start, results = 0, []
        for classes in plausible.chunks():
            stop = start + len(classes)
            results.append(measure(hidden[start:stop], target[start:stop], classes.to(hidden.device)))
            start = stop
        return [torch.cat(parts).double().unflatten(0, (len(windows), -1)) for parts in zip(*results)]

    for temperature in temperatures:
        truth, *others = each(lambda h, t, c, T=temperature: _tempered(subject.head, h, t, c, T))
        yield _row(name, temperature, None, truth, *others)
    for x in min_ps:
        yield _row(name, 1.0, x, None, *each(lambda h, t, c, x=x: _kept(subject.head, h, t, c, x)))


def _tempered(head: Head, hidden: Tensor, target: Tensor, plausible: Tensor, temperature: float):
    stats = head.stats(hidden, target, temperature=temperature, support=Classes(plausible))
    implausible = stats.rest_log_mass.exp()
    hit = stats.argmax == target
    return -stats.target_log_prob, stats.entropy, implausible, hit, torch.ones_like(implausible)


def _kept(head: Head, hidden: Tensor, target: Tensor, plausible: Tensor, x: float):
    stats = head.stats(hidden, target, support=MinP(x))
    outside = min_p_mask(head, hidden, x)
    rows, columns = (plausible != IGNORED).nonzero(as_tuple=True)
    outside[rows, plausible[rows, columns]] = False
    sets = ClassSets()
    sets.append(outside)
    (classes,) = sets.chunks()
    stray = head.stats(hidden, target, support=Classes(classes.to(hidden.device))).support_log_mass
    kept = stats.support_log_mass
    return stats.support_entropy, (stray - kept).exp(), stats.argmax == target, kept.exp()


def _row(name, temperature, min_p, truth, entropy, implausible, hit, kept) -> Row:
    def error(values: Tensor | None) -> float | None:
        if values is None or len(values) < 2:
            return None
        return (values.mean(1).std() / math.sqrt(len(values))).item()

    return Row(
        name,
        temperature,
        min_p,
        None if truth is None else truth.mean().item(),
        entropy.mean().item(),
        implausible.mean().item(),
        hit.mean().item(),
        kept.mean().item(),
        error(truth),
        error(entropy),
        error(implausible),
        entropy.numel(),
    )


def evaluate(
    models: Mapping[str, nn.Module | Subject],
    windows: Tensor,
    judge: nn.Module | Subject,
    *,
    temperatures: Sequence[float] = TEMPERATURES,
    min_ps: Sequence[float] = MIN_PS,
    batch_size: int = 4,
) -> list[Row]:
    """Rows of every model at every temperature and min-p, as `tightrope evaluate` writes them.

        rows = evaluation.evaluate({"plain": model, "creative": other}, windows, judge)
        for line in evaluation.compare(rows, plain="plain"):
            print(line.model, line.implausible_ratio, line.verdict)

    Args:
        models: causal language models of transformers, or :class:`Subject`, by name.
        windows: held-out text that none of them was trained on, token ids ``(W, L)`` of any integer dtype.
        judge: says what is plausible; at best trained longer than the models.
        temperatures, min_ps: as in :func:`sweep`.
        batch_size: windows that go through a model at a time.

    Raises:
        TypeError, ValueError: an argument is not as above, the vocabularies differ, or a model's logits are
            not those of its head on its last hidden states.
    """
    check_settings(windows, temperatures, min_ps)
    if not models:
        raise ValueError("models: got none, expected at least one")
    for name, model in [*models.items(), ("judge", judge)]:
        subject = Subject.of(model)
        check_vocabulary(name, subject, Subject.of(judge))
        if subject is not model:
            subject.check(model, windows[0])
    plausible = nuclei(judge, windows, batch_size=batch_size)
    rows: list[Row] = []
    for name, model in models.items():
        options = {"temperatures": temperatures, "min_ps": min_ps, "batch_size": batch_size}
        rows.extend(sweep(name, model, windows, plausible, **options))
    return rows


def check_settings(windows: Tensor, temperatures: Sequence[float], min_ps: Sequence[float]) -> None:
    """Raise TypeError or ValueError where these are not as :func:`evaluate` says."""
    if not isinstance(windows, Tensor) or windows.is_floating_point() or windows.dtype == torch.bool:
        got = windows.dtype if isinstance(windows, Tensor) else type(windows).__name__
        raise TypeError(f"windows: got {got}, expected a tensor of token ids (W, L)")
    if windows.dim() != 2 or len(windows) < 1 or windows.shape[1] < 2:
        raise ValueError(f"windows: got shape {tuple(windows.shape)}, expected (W, L), L at least 2")
    for temperature in temperatures:
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperatures: got {temperature}, expected positive numbers")
    for x in min_ps:
        if not 0 < x <= 1:
            raise ValueError(f"min_ps: got {x}, expected numbers in (0, 1]")


def check_vocabulary(name: str, subject: Subject, judge: Subject) -> None:
    """Raise ValueError where a class is not the same thing to both, for their heads differ in size."""
    ours, theirs = len(subject.head.weight), len(judge.head.weight)
    if ours != theirs:
        raise ValueError(f"{name}: its head has {ours} classes, expected those of the judge, {theirs}")


@torch.no_grad()
def perplexity(model: nn.Module | Subject, sequences: Tensor, start: int) -> float:
    """What a model, the judge, makes of sampled continuations: e to the mean of -log p, a token.

    Args:
        sequences: token ids ``(B, L)``: prompts of ``start`` tokens, 1 at least, and their continuations.
    """
    return math.exp(-token_log_probs(model, sequences, start).mean().item())


@torch.no_grad()
def token_log_probs(model: nn.Module | Subject, sequences: Tensor, start: int) -> Tensor:
    """Log-probabilities of the tokens from ``start`` on, ``(B, L - start)``, in nats."""
    subject = Subject.of(model)
    hidden = subject.rows(sequences, len(sequences)).unflatten(0, (len(sequences), -1))[:, start - 1 :]
    return subject.head.stats(hidden, sequences[:, start:].to(hidden.device)).target_log_prob
