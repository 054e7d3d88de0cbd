"""Hypothesis strategies: problems that a caller could have, and hostile ones that broke others.

A problem is drawn as a seed and a handful of choices, so that a failure prints short and can be
repeated. Vocabularies stand around the sizes of vector registers, kernel blocks and tiles, and so do
numbers of rows; strides are those of transposed, sliced and broadcast tensors; per-token tensors come
in every shape that broadcasts to the tokens.
"""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from helpers import Problem, class_indices, dense, rand, randn, top_k

VOCABULARIES = (1, 2, 3, 7, 15, 16, 17, 31, 64, 127, 257, 1021, 1023, 1024, 1025, 2049, 3001)
LEADS = ((), (1,), (2,), (13,), (16,), (33,), (2, 5), (3, 1, 2), (1, 7), (5, 13), (0,), (2, 0))
WIDTHS = (1, 2, 5, 16, 33)
MASKED = float("-inf")


def strided(tensor: torch.Tensor, how: str) -> torch.Tensor:
    """The same values (or, for "expanded", the first row of them repeated) under other strides."""
    if how == "transposed" and tensor.dim() > 1:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == "sliced" and tensor.dim() > 0:
        gap = 77 if not tensor.is_floating_point() else float("nan")
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), gap)
        wide[..., 1::2] = tensor
        return wide[..., 1::2]
    if how == "expanded" and tensor.dim() > 0 and tensor.shape[0] > 1:
        return tensor[:1].expand(tensor.shape)
    if how == "strided_rows" and tensor.dim() > 1:
        return torch.stack([tensor, tensor + 1], -2).flatten(-3, -2)[..., ::2, :]
    return tensor


STRIDES = st.sampled_from(["contiguous", "transposed", "sliced", "expanded", "strided_rows"])


@st.composite
def targets(draw, lead, vocab, dtype, seed):
    """(target, options): class indices, distributions or top-k pairs, some of them ignored."""
    kind = draw(st.sampled_from(["index", "index", "int32", "dense", "top_k"]))
    ignore_index = draw(st.sampled_from([-100, -1, 0])) if vocab > 1 else -100
    ignored = draw(st.sampled_from([0.0, 0.4, 1.0]))
    options = {} if ignore_index == -100 else {"ignore_index": ignore_index}
    if kind == "dense":
        rows = torch.softmax(randn(*lead, vocab, seed=seed), -1) * draw(st.sampled_from([1.0, 1.5]))
        return strided(rows.to(draw(st.sampled_from([torch.float32, dtype]))), draw(STRIDES)), {}
    if kind == "top_k":
        pairs = top_k(lead, vocab, k=draw(st.sampled_from([1, 3])), seed=seed)
        dropped = rand(*pairs.indices.shape, seed=seed + 1) < ignored * 0.7
        indices = strided(pairs.indices.masked_fill(dropped, ignore_index), draw(STRIDES))
        return pairs._replace(indices=indices), options
    target = class_indices(lead, vocab, seed=seed, ignored=ignored, ignore_index=ignore_index)
    target = target.to(torch.int32 if kind == "int32" else torch.int64)
    return strided(target, draw(STRIDES)), options


@st.composite
def per_token(draw, lead, seed):
    """Numbers in [1/4, 1) in the tokens' shape, or in one that broadcasts to it."""
    shape = lead
    if draw(st.booleans()):
        shape = tuple(n if draw(st.booleans()) else 1 for n in lead)
        shape = shape[draw(st.integers(0, len(shape))) :]
    values = rand(*shape, seed=seed, dtype=draw(st.sampled_from([torch.float32, torch.float64])))
    return 0.25 + 0.75 * values


@st.composite
def terms(draw):
    """Which loss, and what is done to the logits."""
    options = {
        "reality": draw(st.sampled_from(["cross_entropy", "squared_error"])),
        "creativity": draw(st.sampled_from(["entropy", "collision"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1])),
        "logit_scale": draw(st.sampled_from([1.0, 1.0, 0.5, -1.5])),
        "softcap": draw(st.sampled_from([None, None, 4.0])),
        "z_loss": draw(st.sampled_from([0.0, 0.01])),
        "logit_l2": draw(st.sampled_from([0.0, 0.001])),
        "reduction": draw(st.sampled_from(["none", "mean", "sum"])),
    }
    if options["reduction"] == "mean":
        options["normalizer"] = draw(st.sampled_from([None, None, 7.5, torch.tensor(3.25)]))
    return options


@st.composite
def problems(draw, dtypes, linear=True):
    """A problem with ordinary values: logits of a standard deviation of about 2."""
    seed = 10 * draw(st.integers(0, 10_000))
    lead, vocab = draw(st.sampled_from(LEADS)), draw(st.sampled_from(VOCABULARIES))
    input_dtype, weight_dtype, bias_dtype = (draw(st.sampled_from(dtypes)) for _ in range(3))
    if linear:
        width = draw(st.sampled_from(WIDTHS))
        leaves = {
            "input": strided(randn(*lead, width, seed=seed, dtype=input_dtype), draw(STRIDES)),
            "weight": strided(
                (randn(vocab, width, seed=seed + 1) * 2 / width**0.5).to(weight_dtype), draw(STRIDES)
            ),
        }
        if draw(st.booleans()):
            leaves["bias"] = strided(randn(vocab, seed=seed + 2, dtype=bias_dtype), draw(STRIDES))
    else:
        logits = randn(*lead, vocab, seed=seed, dtype=input_dtype) * 2
        leaves = {"input": strided(logits, draw(STRIDES))}
    options = draw(terms())
    if draw(st.booleans()):
        leaves["balance"] = draw(per_token(lead, seed + 3))
    else:
        options["balance"] = draw(st.sampled_from([0.0, 0.3, 1.0]))
    if draw(st.booleans()):
        leaves["row_weight"] = draw(per_token(lead, seed + 4))
    target, target_options = draw(targets(lead, vocab, input_dtype, seed + 5))
    options.update(target_options)
    if lead and lead[-1]:
        options["shift"] = draw(st.sampled_from([0, 0, 1, lead[-1]]))
    if linear:
        options["workspace_mb"] = draw(st.sampled_from([None, 1e-6, 0.01, 0.2]))
        options["skip_ignored"] = draw(st.sampled_from([None, False, True]))
    return Problem(leaves, target, options)


HOSTILE_LINEAR = ("peaked", "copied", "offset", "negative", "masked", "constant", "huge")
HOSTILE_LOGITS = ("peaked", "offset", "negative", "masked", "constant", "huge")


@st.composite
def hostile_logits(draw, among=HOSTILE_LOGITS, largest=3001):
    """Rows [N, V] of float32 logits that break careless arithmetic."""
    how = draw(st.sampled_from(among))
    seed = 10 * draw(st.integers(0, 10_000))
    rows, vocab = (
        draw(st.sampled_from([1, 5, 18])),
        draw(st.sampled_from([v for v in VOCABULARIES[3:] if v <= largest])),
    )
    logits = randn(rows, vocab, seed=seed) * 2
    sign = draw(st.sampled_from([1, -1]))
    if how == "peaked":
        logits[::2] *= 20
    elif how == "offset":
        logits += sign * 1e4
    elif how == "negative":
        logits = -logits.abs() - 50
    elif how == "masked":
        logits[:, rand(vocab, seed=seed + 1) < 0.5] = MASKED
        logits[:, 3] = 1.0
    elif how == "constant":
        logits = torch.full_like(logits, 3.0 * sign)
    elif how == "huge":
        logits[:, ::2] *= 1e30
    target = torch.full((rows,), 3) if how == "masked" else class_indices((rows,), vocab, seed=seed)
    return how, Problem({"input": logits}, target)


@st.composite
def hostile_linear(draw):
    """Hidden states and a head, float32, whose logits break careless arithmetic."""
    how = draw(st.sampled_from(HOSTILE_LINEAR))
    seed = 10 * draw(st.integers(0, 10_000))
    rows, width = draw(st.sampled_from([1, 5, 18])), draw(st.sampled_from([4, 24]))
    vocab = draw(st.sampled_from(VOCABULARIES[3:]))
    hidden, weight = randn(rows, width, seed=seed), randn(vocab, width, seed=seed + 1)
    bias = randn(vocab, seed=seed + 2)
    target = class_indices((rows,), vocab, seed=seed + 3)
    sign = draw(st.sampled_from([1, -1]))
    if how == "peaked":
        hidden[::2] *= 20
    elif how == "copied":
        hidden = weight[target] * draw(st.sampled_from([1.0, 5.0]))
    elif how == "offset":
        bias += sign * 1e4
    elif how == "negative":
        bias = -bias.abs() - 60
    elif how == "masked":
        bias[rand(vocab, seed=seed + 4) < 0.5] = MASKED
        bias[3], target = 0.0, torch.full((rows,), 3)
    elif how == "constant":
        hidden, bias = torch.zeros_like(hidden), torch.zeros_like(bias)
    elif how == "huge":
        weight[::2] *= 1e15
        hidden *= 1e10
    return how, Problem({"input": hidden, "weight": weight, "bias": bias}, target)


def as_distribution(problem: Problem, vocab: int, masked: bool) -> Problem:
    """The same problem with a distribution that spreads over the vocabulary, where that is defined."""
    one_hot = dense(problem.target, vocab, torch.float32)
    if not masked:
        one_hot = 0.5 * one_hot + 0.5 / vocab
    return Problem(problem.leaves, one_hot, problem.options)
