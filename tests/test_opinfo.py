"""PyTorch's own sample inputs for cross_entropy and linear_cross_entropy, through our functions.

The samples are those that PyTorch tests itself with (``op_db``). What its functions say differently is
translated: its class dimension is the second and ours the last; class weights become a weight of each
row, or multiply a target distribution; a head with extra dimensions is one head for each position. What
cannot be said is listed with its reason and counted, and so is what is compared.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.common_methods_invocations import op_db

import tightrope

# Torch 2.11 has no linear_cross_entropy.
NAMES = [
    f"nn.functional.{name}"
    for name in ("cross_entropy", "linear_cross_entropy")
    if hasattr(torch.nn.functional, name)
]
OPERATORS = [op for op in op_db if op.name in NAMES]
IDS = [f"{op.name}-{op.variant_test_name or 'plain'}".removeprefix("nn.functional.") for op in OPERATORS]
# At least this many samples must be compared, for each operator and dtype.
AT_LEAST = {
    ("nn.functional.cross_entropy", ""): 21,
    ("nn.functional.linear_cross_entropy", ""): 119,
    ("nn.functional.linear_cross_entropy", "chunked"): 133,
    ("nn.functional.linear_cross_entropy", "chunked_none"): 70,
}
KNOWN = {"weight", "ignore_index", "reduction", "label_smoothing", "options", "linear_bias"}


class Cannot(Exception):
    """This sample cannot be said in our terms, for a reason."""


def translated(target, kwargs, classes):
    """(target, class dimension last; options of ours; what "mean" divides by) of a sample."""
    if set(kwargs) - KNOWN:
        raise Cannot(f"unknown option {sorted(set(kwargs) - KNOWN)}")
    class_weight, smoothing = kwargs.get("weight"), kwargs.get("label_smoothing", 0.0)
    ignore_index = kwargs.get("ignore_index")
    ignore_index = -100 if ignore_index is None else ignore_index
    options = {"ignore_index": ignore_index, "label_smoothing": smoothing}
    if class_weight is not None and smoothing:
        raise Cannot("class weights apply to each class of a smoothed target, ours to whole rows")
    if target.is_floating_point():
        if class_weight is not None:
            target = target * class_weight
        return target, options, torch.tensor(target.numel() / classes)
    kept = target != ignore_index
    if class_weight is None:
        return target, options, kept.sum()
    options["row_weight"] = class_weight[target * kept]
    total = (options["row_weight"] * kept).sum()
    return target, options, total


def class_last(target):
    return target.movedim(1, -1) if target.is_floating_point() and target.dim() > 1 else target


def cross_entropy(input, target, **kwargs):
    logits = input.movedim(1, -1) if input.dim() > 1 else input
    target, options, total = translated(class_last(target), kwargs, logits.shape[-1])
    if kwargs.get("reduction", "mean") == "mean" and total == 0:
        raise Cannot("the mean of no rows is NaN there and 0 here, on purpose")
    return tightrope.reality_creativity_loss(
        logits, target, reduction=kwargs.get("reduction", "mean"), **options
    )


def linear_cross_entropy(input, linear_weight, target, **kwargs):
    """One head for each position of the extra dimensions, if there are any."""
    classes, extra = linear_weight.shape[0], linear_weight.shape[1:-1]
    target, options, total = translated(class_last(target), kwargs, classes)
    reduction = kwargs.get("reduction", "mean")
    if reduction == "mean":
        if total == 0:
            raise Cannot("the mean of no rows is NaN there and 0 here, on purpose")
        options["normalizer"] = total
    bias = kwargs.get("linear_bias")
    if not extra:
        return tightrope.linear_reality_creativity_loss(
            input, linear_weight, target, bias, reduction=reduction, **options
        )
    heads = linear_weight.flatten(1, -2).unbind(1)
    biases = [None] * len(heads) if bias is None else bias.flatten(1).unbind(1)
    targets = target.flatten(1, len(extra)).unbind(1)
    row_weights = options.pop("row_weight", None)
    row_weights = [None] * len(heads) if row_weights is None else row_weights.flatten(1).unbind(1)
    losses = [
        tightrope.linear_reality_creativity_loss(
            input, head, b, bias, row_weight=row_weight, reduction=reduction, **options
        )
        for head, bias, b, row_weight in zip(heads, biases, targets, row_weights)
    ]
    stacked = torch.stack(losses, -1)
    return stacked.unflatten(-1, extra) if reduction == "none" else stacked.sum()


def differentiated(sample, target=False):
    """By position or name, what has gradients; of class weights ours gives none. target: that as well."""
    arguments = sample.args if target else sample.args[:-1]
    named = {"input": sample.input, **{f"argument {i}": x for i, x in enumerate(arguments)}}
    named["linear_bias"] = sample.kwargs.get("linear_bias")
    return {name: x for name, x in named.items() if x is not None and x.requires_grad}


def gradients(loss, sample, upstream):
    wanted = differentiated(sample, target=True)
    return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values()), upstream, retain_graph=True)))


def derivatives(loss, sample, upstream):
    """Of the gradients, along a direction; not by the target, of which ours gives the first ones."""
    wanted = differentiated(sample)
    grads = torch.autograd.grad(loss, list(wanted.values()), upstream, create_graph=True)
    along = [torch.linspace(-1, 1, g.numel(), dtype=g.dtype).view(g.shape) for g in grads]
    # One class, or one row without weight: a constant gradient.
    moving = [(g, d) for g, d in zip(grads, along) if g.requires_grad]
    if not moving:
        return {name: torch.zeros_like(x) for name, x in wanted.items()}
    outputs, directions = zip(*moving)
    found = torch.autograd.grad(outputs, list(wanted.values()), directions, materialize_grads=True)
    return dict(zip(wanted, found))


@pytest.mark.filterwarnings("ignore")  # the chunked reference warns where it falls back
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("operator", OPERATORS, ids=IDS)
def test_samples(operator, dtype):
    linear = operator.name.endswith("linear_cross_entropy")
    theirs = F.linear_cross_entropy if linear else F.cross_entropy
    function = linear_cross_entropy if linear else cross_entropy
    compared, learned, refused = 0, 0, []
    rtol = 1e-10 if dtype == torch.float64 else 2e-5
    for sample in operator.sample_inputs("cpu", dtype, requires_grad=True):
        try:
            actual = function(sample.input, *sample.args, **sample.kwargs)
        except Cannot as reason:
            refused.append(str(reason))
            continue
        kwargs = {name: value for name, value in sample.kwargs.items() if name != "options"}
        expected = theirs(sample.input, *sample.args, **kwargs)
        close = {"rtol": rtol, "atol": rtol}
        torch.testing.assert_close(actual, expected, **close)
        upstream = torch.linspace(0.5, 1.5, expected.numel(), dtype=dtype).reshape(expected.shape)
        truth = gradients(expected, sample, upstream)
        for name, gradient in gradients(actual, sample, upstream).items():
            torch.testing.assert_close(gradient, truth[name], **close, msg=lambda m, n=name: f"{n}: {m}")
        learned += any(x.requires_grad for x in sample.args[-1:])
        if dtype == torch.float64:
            truth = derivatives(expected, sample, upstream)
            for name, found in derivatives(actual, sample, upstream).items():
                torch.testing.assert_close(found, truth[name], **close, msg=lambda m, n=name: f"d {n}: {m}")
        compared += 1
    print(f"{operator.name}: {compared} compared ({learned} with a target that requires grad)")
    print(f"{len(refused)} refused: {sorted(set(refused))}")
    assert compared >= AT_LEAST[operator.name, operator.variant_test_name]


def test_samples_exist():
    assert {op.name for op in OPERATORS} == set(NAMES)


@pytest.mark.parametrize("name", [name.removeprefix("nn.functional.") for name in NAMES])
def test_what_cannot_be_said_is_refused(name):
    """The translation itself must not silently drop what it does not understand."""
    sample = next(op for op in OPERATORS if op.name.endswith(name)).sample_inputs("cpu", torch.float64)
    sample = next(iter(sample))
    function = {"cross_entropy": cross_entropy, "linear_cross_entropy": linear_cross_entropy}[name]
    weight = torch.ones(sample.args[0].shape[0] if name.startswith("linear") else sample.input.shape[1])
    for kwargs in ({"label_smoothing": 0.1, "weight": weight}, {"size_average": True}):
        with pytest.raises(Cannot):
            function(sample.input, *sample.args, **kwargs)
