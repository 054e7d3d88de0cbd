"""What is offered for logits that exist is what the linear functions offer, and says the same."""

import inspect
import typing

import pytest
import torch
import torch.nn.functional as F

import tightrope
from helpers import BACKENDS, assert_within, class_indices, plain, rand, randn, top_k
from tightrope import options, reference
from tightrope.statistics import OF_CALL, OF_SUPPORT, OF_TEACHER

F64 = torch.float64
SHAPE, VOCAB = (3, 5), 41
backends = pytest.mark.parametrize("backend", BACKENDS)


def target_of(kind):
    indices = class_indices(SHAPE, VOCAB, ignored=0.3)
    return {
        "index": indices,
        "top_k": top_k(SHAPE, VOCAB, dtype=F64),
        "dense": torch.softmax(randn(*SHAPE, VOCAB, seed=4, dtype=F64), -1),
        "none": None,
    }[kind]


def identity():
    return torch.eye(VOCAB, dtype=F64)


@backends
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("kind", ["index", "top_k", "dense", "none"])
@pytest.mark.parametrize("support", [None, tightrope.MinP(0.1)], ids=["", "support"])
def test_statistics(support, kind, shift, backend):
    """Every field and its gradient: those of the linear function, whose head is the identity.

    And of the reference, for a term that is lost in what the two share.
    """
    logits = randn(*SHAPE, VOCAB, dtype=F64).requires_grad_()
    settings = {"logit_scale": 0.7, "softcap": 5.0, "shift": shift, "backend": backend, "support": support}
    ours = tightrope.vocab_stats(logits, target_of(kind), **settings)
    theirs = tightrope.linear_vocab_stats(logits, identity(), target_of(kind), **settings)
    assert torch.equal(ours.argmax, theirs.argmax)
    z = reference.transform(logits, logit_scale=0.7, softcap=5.0)
    b, valid = None, ours.argmax >= 0
    if kind != "none":
        b, valid = reference.dense_target(plain(target_of(kind)), VOCAB, dtype=F64, shift=shift)
    exact = reference.row_stats(z, b)._asdict()
    exact |= zip(OF_SUPPORT, reference.set_stats(z, reference.members(z, 0.1)))
    for name in ours._fields:
        a, b = getattr(ours, name), getattr(theirs, name)
        missing = name in OF_TEACHER + OF_CALL
        missing |= (kind == "none" and name.startswith("target_")) or (support is None and name in OF_SUPPORT)
        assert (a is None) == (b is None) == missing
        if a is not None and name != "argmax":
            upstream = rand(*SHAPE, seed=7, dtype=F64)
            truth = torch.where(valid, exact[name], 0.0)
            got = torch.autograd.grad(a, logits, upstream, retain_graph=True)[0]
            for other in (b, truth):
                assert_within(a, other, 1e-12, what=name)
                want = torch.autograd.grad(other, logits, upstream, retain_graph=True)[0]
                assert_within(got, want, 1e-12, what=f"gradient of {name}")


@backends
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_a_loss_of_ones_own(reduction, backend):
    """Gate, weights, shift and statistics go along as in the linear function."""
    logits = randn(*SHAPE, VOCAB, dtype=F64).requires_grad_()
    gate = rand(SHAPE[0], 1, seed=3, dtype=F64).requires_grad_()

    def loss_fn(stats, gate):
        return -gate * stats.target_log_prob + stats.entropy.square()

    settings = {
        "row_args": (gate,),
        "row_weight": rand(*SHAPE, seed=5, dtype=F64),
        "reduction": reduction,
        "shift": 1,
        "return_stats": True,
        "backend": backend,
    }
    results = []
    for head in ((), (identity(),)):
        function = tightrope.linear_vocab_loss if head else tightrope.vocab_loss
        loss, stats = function(logits, *head, target_of("index"), loss_fn, **settings)
        results.append((loss, *torch.autograd.grad(loss.sum(), (logits, gate)), stats.entropy))
    for a, b in zip(*results):
        assert_within(a, b, 1e-12)


def test_half_precision_logits():
    """Statistics and losses are float32, where F.cross_entropy would round to eight bits."""
    logits = (randn(64, VOCAB) * 4).bfloat16()
    target = class_indices((64,), VOCAB)
    loss = tightrope.vocab_loss(logits, target, lambda s: -s.target_log_prob)
    assert loss.dtype == torch.float32
    assert_within(loss, F.cross_entropy(logits.double(), target), 1e-6)


SIGNATURES = {
    tightrope.linear_reality_creativity_loss: options.LinearLossOptions,
    tightrope.reality_creativity_loss: options.LogitsLossOptions,
    tightrope.linear_vocab_loss: options.OwnLinearLossOptions,
    tightrope.vocab_loss: options.OwnLogitsLossOptions,
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__name__)
def test_type_checkers_are_told_every_option(function):
    """An option that is added to a function and not to its overloads cannot be used under mypy."""
    parameters = inspect.signature(function).parameters.values()
    named = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - {"return_stats"}
    assert named == set(typing.get_type_hints(SIGNATURES[function]))


MODULES = {
    tightrope.LinearRealityCreativityLoss: tightrope.linear_reality_creativity_loss,
    tightrope.RealityCreativityLoss: tightrope.reality_creativity_loss,
}


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_modules_have_the_options_of_their_function(module):
    """Names, order, defaults and types stand once in the function and once in the module."""
    of_function = inspect.signature(MODULES[module]).parameters
    of_module = list(inspect.signature(module).parameters.values())
    assert of_module == [p for p in of_function.values() if p.kind is p.KEYWORD_ONLY]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_a_parameter_that_is_an_option_is_the_modules(module):
    """It was in no optimizer, on no device that .to() names, and in no state dict."""
    learned = torch.nn.Parameter(torch.tensor(0.25, dtype=F64))
    weights = rand(VOCAB, dtype=F64)
    made = module(balance=learned, class_weight=weights, shift=1)
    assert dict(made.named_parameters()) == {"balance": learned}
    assert set(made.state_dict()) == {"balance", "class_weight"}
    assert "balance=" in repr(made) and "shift=1" in repr(made) and "softcap" not in repr(made)
    logits = randn(*SHAPE, VOCAB, dtype=F64)
    arguments = (logits,) if module is tightrope.RealityCreativityLoss else (logits, identity())
    target = class_indices(SHAPE, VOCAB)
    made(*arguments, target).backward()
    assert learned.grad is not None
    assert next(iter(made.to(torch.float32).parameters())).dtype == torch.float32
    replaced = made(*arguments, target, balance=0.5, row_weight=torch.ones(SHAPE), normalizer=3)
    assert not replaced.requires_grad
