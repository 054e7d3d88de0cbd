"""torch.func, torch.autograd.functional and forward mode, against the dense loss under the same transform.

The library's Functions have a rule of their own for batches (vmap), for tangents (jvp) and for derivatives of
each; a rule that is wrong or missing shows in one of these.
"""

import pytest
import torch
import torch.utils._pytree as pytree
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import tightrope
from helpers import assert_within, class_indices, rand, randn

# PyTorch's own: forward mode uses what it deprecates.
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
N, V, D, BATCH = 4, 7, 3, 5
F64 = torch.float64
HIDDEN, HEAD = randn(N, D, dtype=F64), randn(V, D, seed=1, dtype=F64)
SOME, HEADS = randn(BATCH, N, D, seed=2, dtype=F64), randn(BATCH, V, D, seed=3, dtype=F64)
TARGET, TARGETS = torch.tensor([1, -100, 3, 0]), class_indices((BATCH, N), V, seed=4, ignored=0.2)
ALONG, HEAD_ALONG = randn(N, D, seed=5, dtype=F64), randn(V, D, seed=6, dtype=F64)
OPTIONS = {"balance": 0.3, "creativity": "collision", "z_loss": 0.1}


def built_in(hidden, weight, target=TARGET, reduction="mean", **options):
    options = {**OPTIONS, **options}
    return tightrope.linear_reality_creativity_loss(hidden, weight, target, reduction=reduction, **options)


def of_logits(hidden, weight, target=TARGET, reduction="mean", **options):
    options = {**OPTIONS, **options}
    return tightrope.reality_creativity_loss(hidden @ weight.t(), target, reduction=reduction, **options)


def own(hidden, weight, target=TARGET, reduction="mean", *, balance=0.3):
    def loss_fn(stats, balance):
        collision = stats.collision.log()
        return (1 - balance) * -stats.target_log_prob + balance * collision + 0.1 * stats.lse**2

    row_args = (torch.as_tensor(balance, dtype=F64).expand(N),)
    return tightrope.linear_vocab_loss(
        hidden, weight, target, loss_fn, row_args=row_args, reduction=reduction
    )


def dense(hidden, weight, target=TARGET, reduction="mean", *, balance=0.3):
    """What the others say, in operations that vmap has rules for."""
    log_p = (hidden @ weight.t()).log_softmax(-1)
    lse = (hidden @ weight.t()).logsumexp(-1)
    b = target.unsqueeze(-1) == torch.arange(V)
    valid = target != -100
    loss = -(1 - balance) * (log_p * b).sum(-1) + balance * (2 * log_p).logsumexp(-1) + 0.1 * lse**2
    loss = torch.where(valid, loss, 0.0)
    return loss if reduction == "none" else loss.sum() / valid.sum().clamp_min(1)


OURS = {"built in": built_in, "of logits": of_logits, "own": own}


def each(f):
    return lambda hidden, weight: f(hidden, weight, reduction="none")


TRANSFORMS = {
    "grad": lambda f: grad(f, argnums=(0, 1))(HIDDEN, HEAD),
    "vjp": lambda f: vjp(each(f), HIDDEN, HEAD)[1](torch.arange(N, dtype=F64)),
    "jvp": lambda f: jvp(f, (HIDDEN, HEAD), (ALONG, HEAD_ALONG)),
    "jvp of each": lambda f: jvp(each(f), (HIDDEN, HEAD), (ALONG, HEAD_ALONG)),
    "jacrev": lambda f: jacrev(each(f), argnums=(0, 1))(HIDDEN, HEAD),
    "jacfwd": lambda f: jacfwd(each(f), argnums=(0, 1))(HIDDEN, HEAD),
    "hessian": lambda f: hessian(f, argnums=(0, 1))(HIDDEN, HEAD),
    "forward over reverse": lambda f: jvp(grad(f, argnums=(0, 1)), (HIDDEN, HEAD), (ALONG, HEAD_ALONG)),
    "reverse over reverse": lambda f: vjp(grad(f, argnums=(0, 1)), HIDDEN, HEAD)[1]((ALONG, HEAD_ALONG)),
    "reverse over forward": lambda f: grad(
        lambda h, w: jvp(f, (h, w), (ALONG, HEAD_ALONG))[1], argnums=(0, 1)
    )(HIDDEN, HEAD),
    "by a balance": lambda f: hessian(lambda b: f(HIDDEN, HEAD, balance=b))(torch.tensor(0.3, dtype=F64)),
    "by a balance and the head": lambda f: jacfwd(grad(lambda w, b: f(HIDDEN, w, balance=b)), argnums=1)(
        HEAD, torch.full((N,), 0.3, dtype=F64)
    ),
    "vmap": lambda f: vmap(lambda h, t: f(h, HEAD, t))(SOME, TARGETS),
    "vmap of another dimension": lambda f: vmap(lambda h, t: f(h, HEAD, t), in_dims=(1, 1))(
        SOME.movedim(0, 1), TARGETS.t()
    ),
    "vmap over heads": lambda f: vmap(f)(SOME, HEADS),
    "vmap over heads alone": lambda f: vmap(f, in_dims=(None, 0))(HIDDEN, HEADS),
    "vmap of vmap": lambda f: vmap(vmap(f, in_dims=(0, None)), in_dims=(None, 0))(SOME, HEADS),
    "gradients of each sample's hidden states": lambda f: vmap(grad(lambda h, t: f(h, HEAD, t)))(
        SOME, TARGETS
    ),
    "gradients of the head by each sample": lambda f: vmap(
        grad(lambda w, h, t: f(h, w, t)), in_dims=(None, 0, 0)
    )(HEAD, SOME, TARGETS),
    "vmap of hessian": lambda f: vmap(hessian(lambda h, t: f(h, HEAD, t)))(SOME, TARGETS),
    "vmap over directions": lambda f: vmap(lambda v: jvp(grad(lambda h: f(h, HEAD)), (HIDDEN,), (v,))[1])(
        SOME
    ),
    "functional.hessian": lambda f: torch.autograd.functional.hessian(f, (HIDDEN, HEAD)),
    "functional.hessian, vectorised": lambda f: torch.autograd.functional.hessian(
        lambda h: f(h, HEAD), HIDDEN, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "functional.vhp": lambda f: torch.autograd.functional.vhp(f, (HIDDEN, HEAD), (ALONG, HEAD_ALONG)),
    "functional.hvp": lambda f: torch.autograd.functional.hvp(f, (HIDDEN, HEAD), (ALONG, HEAD_ALONG)),
    "functional.jvp": lambda f: torch.autograd.functional.jvp(f, (HIDDEN, HEAD), (ALONG, HEAD_ALONG)),
}


@pytest.mark.parametrize("function", OURS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_equals_the_dense_loss(transform, function):
    """A rule of a Function that is missing, or wrong."""
    actual = pytree.tree_leaves(TRANSFORMS[transform](OURS[function]))
    expected = pytree.tree_leaves(TRANSFORMS[transform](dense))
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected):
        assert_within(one, other, 1e-11, 1e-12)


def of_statistics(hidden, weight, target, **options):
    stats = tightrope.linear_vocab_stats(hidden, weight, target, **options)
    return torch.stack([x for x in stats if x is not None and x.is_floating_point()])


KINDS = {
    "top_k": lambda i: tightrope.TopKTarget(
        class_indices((BATCH, N, 3), V, seed=7)[i], rand(BATCH, N, 3, seed=8, dtype=F64)[i]
    ),
    "dense": lambda i: rand(BATCH, N, V, seed=9, dtype=F64)[i],
    "index": lambda i: TARGETS[i],
}


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("support", [None, "classes", "min_p"])
@pytest.mark.parametrize("kind", KINDS)
def test_vmap_of_every_target_is_a_loop(kind, support, shift):
    """Rows of one of the batch that are scored against the target, set or temperature of another."""
    target, classes = KINDS[kind](slice(None)), class_indices((BATCH, N, 2), V, seed=10)
    temperature = 0.5 + rand(BATCH, N, seed=11, dtype=F64)

    def one(hidden, target, classes, temperature):
        sets = {"classes": tightrope.Classes(classes), "min_p": tightrope.MinP(0.2), None: None}[support]
        return of_statistics(
            hidden, HEAD, target, support=sets, temperature=temperature, shift=shift, softcap=3.0
        )

    actual = vmap(one, out_dims=1)(SOME, target, classes, temperature)
    loop = [one(SOME[i], KINDS[kind](i), classes[i], temperature[i]) for i in range(BATCH)]
    torch.testing.assert_close(actual, torch.stack(loop, 1), rtol=1e-12, atol=1e-12)


def test_vmap_is_one_call(monkeypatch):
    """A Python loop over the batch, where the rows could have gone by together."""
    from tightrope.strategies import ops

    rows, given = [], ops.linear_stats
    monkeypatch.setattr(
        ops, "linear_stats", lambda input, *rest: (rows.append(input.shape[0]), given(input, *rest))[1]
    )
    vmap(grad(lambda h, t: built_in(h, HEAD, t)))(SOME, TARGETS)
    assert rows == [BATCH * N]


def test_functional_call_of_a_module():
    """Per-sample gradients of a model's parameters, as influence functions and private training take them."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Linear(D, D, dtype=F64)
            self.head = torch.nn.Linear(D, V, dtype=F64)

        def forward(self, x, target, of=tightrope.linear_reality_creativity_loss):
            return of(self.body(x).tanh(), self.head.weight, target, self.head.bias, balance=0.2)

    def plain(hidden, weight, target, bias, balance):
        log_p = (hidden @ weight.t() + bias).log_softmax(-1)
        b, valid = target.unsqueeze(-1) == torch.arange(V), target != -100
        loss = -(1 - balance) * (log_p * b).sum(-1) + balance * (log_p.exp() * log_p).sum(-1)
        return torch.where(valid, loss, 0.0).sum() / valid.sum().clamp_min(1)

    model = Model()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def of_samples(**options):
        def loss(parameters, x, target):
            return functional_call(model, parameters, (x, target), options)

        return vmap(grad(loss), in_dims=(None, 0, 0))(parameters, SOME, TARGETS)

    actual, expected = of_samples(), of_samples(of=plain)
    for name, value in expected.items():
        assert_within(actual[name], value, 1e-11, what=name)


def test_tangents_of_forward_mode():
    """A tangent of any tensor that a call takes, by the dual numbers of torch.autograd.forward_ad."""
    balance, weight = 0.2 + rand(N, seed=12, dtype=F64) / 2, 1 + rand(N, seed=13, dtype=F64)
    inputs = (HIDDEN, HEAD, balance, weight)
    moved = [randn(*x.shape, seed=14 + i, dtype=F64) for i, x in enumerate(inputs)]

    def function(hidden, head, balance, weight):
        return tightrope.linear_reality_creativity_loss(
            hidden, head, TARGET, balance=balance, row_weight=weight
        )

    for which in range(4):
        with torch.autograd.forward_ad.dual_level():
            duals = [
                torch.autograd.forward_ad.make_dual(x, v) if i == which else x
                for i, (x, v) in enumerate(zip(inputs, moved))
            ]
            tangent = torch.autograd.forward_ad.unpack_dual(function(*duals)).tangent
        leaf = inputs[which].clone().requires_grad_()
        values = [leaf if i == which else x for i, x in enumerate(inputs)]
        (gradient,) = torch.autograd.grad(function(*values), leaf)
        assert_within(tangent, (gradient * moved[which]).sum(), 1e-12)


def test_a_tangent_of_an_upstream_gradient():
    """Where only it moves: a chunked loss, made before, scales its gradients by it."""
    hidden = HIDDEN.clone().requires_grad_()
    loss = built_in(hidden, HEAD, strategy="chunked")
    (gradient,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    with torch.autograd.forward_ad.dual_level():
        upstream = torch.autograd.forward_ad.make_dual(
            torch.ones((), dtype=F64), torch.tensor(3.0, dtype=F64)
        )
        (dual,) = torch.autograd.grad(loss, hidden, upstream)
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    assert_within(tangent, 3 * gradient, 1e-14)


@pytest.mark.parametrize("function", OURS)
def test_what_is_not_offered(function):
    """Forward mode of forward mode, and third order: an error that says what is."""

    def along(f):
        return lambda h: jvp(f, (h,), (ALONG,))[1]

    def loss(h):
        return OURS[function](h, HEAD)

    with pytest.raises(RuntimeError, match=r"tightrope.*forward mode.*jacfwd\(jacrev"):
        along(along(loss))(HIDDEN)
    with pytest.raises(RuntimeError, match=r"tightrope.*third order"):
        grad(lambda h: grad(lambda h: grad(loss)(h).square().sum())(h).sum())(HIDDEN)
