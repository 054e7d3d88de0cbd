"""Is a model more creative than temperature would make it? What `tightrope evaluate` measures, as functions.

A balance raises a model's entropy, and so does a temperature, for nothing. So a figure says something only
beside the plain model's at the same entropy: how well the text is predicted there, and how much is given to
classes that a judge, a model trained longer, holds for impossible. All of it follows from Tightrope's row
statistics; only the judge's nucleus, and what min-p keeps, are looked for in logits, some rows at a time.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .functional import linear_vocab_stats
from .statistics import RowStats
from .support import Classes, MinP

TEMPERATURES = (0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.45, 1.6)
MIN_PS = (0.02, 0.05, 0.1)
# The judge's nucleus: the smallest set of most likely classes that holds this much.
NUCLEUS = 0.999
# Logits that exist at a time, 64 MB in float32; sorting them takes a few times that.
CHUNK_LOGITS = 2**24
CHUNK_ROWS = 512
IGNORED = -100


@dataclass(frozen=True)
class Head:
    """A vocabulary head, as Tightrope's functions take it: weight (V, D), bias (V), and their transform."""

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Head:
        """The head of a model of transformers, scaled and capped as its config says.

        Raises:
            ValueError: it has none.
        """
        head = model.get_output_embeddings()
        if getattr(head, "weight", None) is None:
            raise ValueError(f"{type(model).__name__} has no output embeddings: expected a vocabulary head")
        config = model.config.get_text_config()
        scale = _number(config, "logit_scale", 1.0) / _number(config, "logits_scaling", 1.0)
        softcap = _number(config, "final_logit_softcapping", None)
        bias = getattr(head, "bias", None)
        return cls(head.weight.detach(), None if bias is None else bias.detach(), scale, softcap)

    @property
    def chunk(self) -> int:
        """How many rows of logits may exist at a time."""
        return max(1, min(CHUNK_ROWS, CHUNK_LOGITS // len(self.weight)))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D): for a few rows."""
        z = nn.functional.linear(hidden, self.weight, self.bias) * self.logit_scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def stats(self, hidden: Tensor, target: Tensor | None, **options: object) -> RowStats:
        """`tightrope.linear_vocab_stats` of hidden states (..., D) under this head."""
        return linear_vocab_stats(
            hidden,
            self.weight,
            target,
            self.bias,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            **options,
        )


def _number(config: object, name: str, default: float | None) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, (int, float)) and value else default


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a head, and the hidden states that it reads.

    Args:
        hidden: hidden states ``(W, L, D)`` of all windows where they exist already, or a function that makes
            those of a batch of windows, ``(B, L)`` token ids to ``(B, L, D)``.
        head: the :class:`Head`.
    """

    hidden: Tensor | Callable[[Tensor], Tensor]
    head: Head

    @classmethod
    def of(cls, model: nn.Module | Subject) -> Subject:
        """A causal language model of transformers as a subject; a subject is one already.

        Raises:
            TypeError: it is neither.
            ValueError: a model without a head.
        """
        if isinstance(model, Subject):
            return model
        if not hasattr(model, "get_output_embeddings") or not hasattr(model, "base_model"):
            raise TypeError(
                f"model: got {type(model).__name__}, expected a causal language model of "
                "transformers or a Subject"
            )
        return cls(lambda windows: model.base_model(windows, use_cache=False)[0], Head.of(model))

    @torch.no_grad()
    def rows(self, windows: Tensor, batch_size: int) -> Tensor:
        """The hidden states that predict, [W * (L - 1), D], of windows (W, L), made a batch at a time."""
        if isinstance(self.hidden, Tensor):
            return self.hidden[:, :-1].flatten(0, 1)
        device = self.head.weight.device
        batches = [self.hidden(w.to(device))[:, :-1].flatten(0, 1) for w in windows.split(batch_size)]
        return torch.cat(batches).to(self.head.weight.dtype)

    @torch.no_grad()
    def check(self, model: nn.Module, window: Tensor) -> None:
        """Compare with the model's own logits on one window (L).

        Raises:
            ValueError: they differ, so no statistic here would be that of the model.
        """
        window = window[None].to(self.head.weight.device)
        expected, got = model(window, use_cache=False).logits, self.head.logits(self.hidden(window))
        if expected.shape != got.shape or not torch.allclose(got, expected, rtol=1e-3, atol=1e-3):
            raise ValueError(
                f"the logits of {type(model).__name__} are not its head on its last hidden states, "
                "with the softcap and the scale that its config names"
            )


class ClassSets:
    """A set of classes for each of N rows, kept without padding."""

    def __init__(self) -> None:
        self._classes: list[Tensor] = []
        self._sizes: list[Tensor] = []

    def append(self, mask: Tensor) -> None:
        """Adds rows, [n, V] bool: which classes are in their sets."""
        self._sizes.append(mask.sum(-1).cpu())
        self._classes.append(mask.nonzero()[:, 1].int().cpu())

    @property
    def sizes(self) -> Tensor:
        """How many classes each row has, [N]."""
        return torch.cat(self._sizes)

    def chunks(self) -> Iterator[Tensor]:
        """Padded with `IGNORED`, [n, K] int64, a chunk of rows for each `append`."""
        for classes, sizes in zip(self._classes, self._sizes):
            padded = torch.full((len(sizes), max(1, int(sizes.max()))), IGNORED)
            padded[torch.arange(padded.shape[1]) < sizes[:, None]] = classes.long()
            yield padded


@torch.no_grad()
def nuclei(
    judge: nn.Module | Subject, windows: Tensor, *, mass: float = NUCLEUS, batch_size: int = 4
) -> ClassSets:
    """The judge's nucleus at each position that predicts, of windows (W, L): W * (L - 1) sets.

    The smallest set of most likely classes whose mass reaches ``mass``, in (0, 1). It takes 4 bytes a class
    to keep, and the logits of a chunk of rows to find.
    """
    judge = Subject.of(judge)
    sets = ClassSets()
    for hidden in judge.rows(windows, batch_size).split(judge.head.chunk):
        probs, order = judge.head.logits(hidden).softmax(-1).sort(-1, descending=True)
        before = probs.cumsum(-1) - probs
        sets.append(torch.zeros_like(before, dtype=torch.bool).scatter_(1, order, before < mass))
    return sets


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


def min_p_mask(head: Head, hidden: Tensor, x: float) -> Tensor:
    """The classes with ``p >= x max p``, [n, V] bool, of a few rows of hidden states [n, D]."""
    z = head.logits(hidden)
    return z >= z.amax(-1, keepdim=True) + math.log(x)


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


class Curve:
    """The plain model's figures by entropy: its temperatures, and what lies between them.

    Args:
        rows: of one model, at two temperatures at least; those of min-p are left out.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = sorted((r for r in rows if r.min_p is None), key=lambda r: r.entropy)

    def at(self, entropy: float) -> Row | None:
        """The figures at an entropy, in nats; None where no two temperatures lie around it.

        Linear in the entropy, and for the implausible mass, which grows by magnitudes, its logarithm is.
        """
        place = bisect_right([row.entropy for row in self.rows], entropy)
        if place == len(self.rows) and self.rows and entropy == self.rows[-1].entropy:
            return self.rows[-1]
        if place in (0, len(self.rows)):
            return None
        low, high = self.rows[place - 1], self.rows[place]
        share = (entropy - low.entropy) / (high.entropy - low.entropy)

        def mean(a: float, b: float) -> float:
            return a + share * (b - a)

        masses = low.implausible_mass, high.implausible_mass
        mass = math.exp(mean(*map(math.log, masses))) if min(masses) > 0 else mean(*masses)
        return low._replace(
            temperature=mean(low.temperature, high.temperature),
            cross_entropy=mean(low.cross_entropy, high.cross_entropy),
            entropy=entropy,
            implausible_mass=mass,
            top1_accuracy=mean(low.top1_accuracy, high.top1_accuracy),
            cross_entropy_error=None,
            entropy_error=None,
            implausible_mass_error=None,
        )


class Comparison(NamedTuple):
    """A setting of a model beside the plain model at the same entropy, by temperature alone."""

    model: str
    min_p: float | None
    entropy: float
    #: of the plain model; None, and the others with it, where its temperatures do not reach this entropy
    plain_temperature: float | None
    cross_entropy: float | None
    plain_cross_entropy: float | None
    #: ours less the plain model's, nats: negative is better
    cross_entropy_difference: float | None
    implausible_mass: float
    plain_implausible_mass: float | None
    #: ours over the plain model's: below 1 is better
    implausible_ratio: float | None
    verdict: str


def compare(rows: Sequence[Row], plain: str) -> list[Comparison]:
    """Each other model as it is, at temperature 1, and each min-p, beside the plain model's temperatures.

    Raises:
        ValueError: there are no rows of ``plain``.
    """
    curve = Curve([row for row in rows if row.model == plain])
    if not curve.rows:
        raise ValueError(f"plain: got {plain!r}, expected one of {sorted({row.model for row in rows})}")
    chosen = [r for r in rows if r.min_p is not None or (r.model != plain and r.temperature == 1)]
    return [_compared(row, curve.at(row.entropy)) for row in chosen]


def _compared(row: Row, plain: Row | None) -> Comparison:
    if plain is None:
        verdict = "no plain temperature has this entropy"
        return Comparison(
            row.model, row.min_p, row.entropy, None, row.cross_entropy, None, None, row.implausible_mass,
            None, None, verdict,
        )  # fmt: skip
    difference = None if row.cross_entropy is None else row.cross_entropy - plain.cross_entropy
    ratio = row.implausible_mass / plain.implausible_mass if plain.implausible_mass else math.nan
    return Comparison(
        row.model,
        row.min_p,
        row.entropy,
        plain.temperature,
        row.cross_entropy,
        plain.cross_entropy,
        difference,
        row.implausible_mass,
        plain.implausible_mass,
        ratio,
        _verdict(difference, ratio),
    )


def _verdict(difference: float | None, ratio: float) -> str:
    if difference is None:
        return (
            "fewer implausible than temperature" if ratio < 1 else "temperature alone has fewer implausible"
        )
    if difference > 0 and ratio > 1:
        return "temperature alone is better on both"
    if difference <= 0 and ratio <= 1:
        return "better than temperature on both"
    if ratio < 1:
        return f"fewer implausible, for {difference:.3f} nats"
    return "truer, and more implausible"


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
