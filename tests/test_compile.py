"""torch.compile: one graph without a break, the eager result, and no recompilation by a schedule.

The operators are opaque to the compiler, so what can go wrong is Python around them (a graph break, a
number read from a tensor, a branch on the count of ignored rows), a fake implementation that lies about
shapes or dtypes, and a schema that lies about mutation. ``fullgraph=True`` and
``torch.library.opcheck`` find these. Most cases compile with "aot_eager", which runs the whole
front end and the autograd tracing and is quick; one takes the default compiler.
"""

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import tightrope
from helpers import (
    Problem,
    assert_same_bits,
    assert_within,
    class_indices,
    evaluate,
    function_of,
    linear_problem,
    ours,
    rand,
    randn,
    top_k,
)
from tightrope import backends, reference
from tightrope.statistics import empty_partial, empty_sides

# The compiler's own use of deprecated parts of PyTorch.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
N, V, D = 6, 1100, 8


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def focal(stats, gamma):
    ce = stats.lse - stats.target_logit
    return (1 - (-ce).exp()) ** gamma * ce + 0.1 * stats.entropy


def user_loss(*args, gamma, **options):
    return tightrope.linear_vocab_loss(*args, loss_fn=focal, row_args=(gamma,), **options)


def statistics(*args, **options):
    """A number that depends on every floating statistic."""
    stats = tightrope.linear_vocab_stats(*args, **options)
    picked = [x * (i + 1) for i, x in enumerate(stats) if x is not None and x.is_floating_point()]
    return sum(x.tanh().sum() for x in picked) + 0 * stats.argmax.sum()


def built_in(**options):
    problem = linear_problem(N, vocab=V, width=D, ignored=0.4, **options)
    problem.leaves["balance"] = rand(N, seed=8)
    return function_of(problem), problem


def cases():
    linear, problem = built_in()
    with_gamma = Problem({**problem.leaves, "gamma": 1 + rand(N, seed=9)}, problem.target)
    del with_gamma.leaves["balance"]
    bare = Problem({n: problem.leaves[n] for n in ("input", "weight", "bias")}, problem.target)
    logits = Problem({"input": randn(N, V), "balance": rand(N)}, problem.target)
    shifted = Problem(
        {**problem.leaves, "input": randn(2, 3, D), "balance": rand(2, 1)},
        class_indices((2, 3), V, ignored=0.3),
        {"shift": 1, "reality": "squared_error", "label_smoothing": 0.1},
    )
    return {
        "chunked": (linear, problem.but(strategy="chunked")),
        "streaming": (linear, problem.but(strategy="streaming")),
        "none": (linear, problem.but(reduction="none", softcap=5.0)),
        "weighted": (linear, problem.but(row_weight=rand(N), normalizer=torch.tensor(3.0))),
        "masked": (linear, problem.but(skip_ignored=False)),
        "top_k": (linear, Problem(problem.leaves, top_k((N,), V), {"reality": "squared_error"})),
        "shifted": (linear, shifted),
        "logits": (tightrope.reality_creativity_loss, logits),
        "statistics": (statistics, bare),
        "user_loss": (user_loss, with_gamma),
        "user_loss_none": (user_loss, with_gamma.but(reduction="none")),
    }


CASES = cases()


@pytest.mark.parametrize("case", CASES)
def test_compiled_equals_eager(case):
    function, problem = CASES[case]

    def call(*args, **options):
        return function(*args, **options)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    actual, expected = evaluate(compiled, problem), evaluate(function, problem)
    for name in expected:
        assert_within(actual[name], expected[name], 1e-6, 1e-9, name)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the default compiler needs a C++ compiler")
def test_default_compiler_around_a_model():
    """Liger #1338: a silently wrong loss under torch.compile with ignored rows."""
    problem = built_in(reduction="none")[1]

    def step(input, weight, target, bias, balance, **options):
        hidden = torch.nn.functional.gelu(input) * 1.5
        loss = tightrope.linear_reality_creativity_loss(
            hidden, weight, target, bias, balance=balance, **options
        )
        return (loss * 2).tanh()

    actual = evaluate(torch.compile(step, fullgraph=True), problem)
    expected = evaluate(step, problem)
    assert not actual["loss"][problem.target == -100].any()
    for name in expected:
        assert_within(actual[name], expected[name], 1e-5, 1e-8, name)


def test_compiled_module():
    problem = built_in()[1]
    del problem.leaves["balance"]
    options = {"balance": 0.25, "reduction": "sum", "creativity": "collision"}
    module = tightrope.LinearRealityCreativityLoss(**options)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")

    def call(*args, **rest):
        return compiled(*args, **rest)

    actual, expected = evaluate(call, problem), ours(problem, **options)
    for name in expected:
        assert_within(actual[name], expected[name], 1e-6, 1e-9, name)


@pytest.mark.parametrize("case", ["chunked", "streaming", "none", "logits"])
def test_a_schedule_does_not_recompile(case):
    """New values of balance, weights and targets, and another number of ignored rows: one graph."""
    function, problem = CASES[case]
    counter = CompileCounterWithBackend("aot_eager")

    def call(*args, **options):
        return function(*args, **options)

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for step, ignored in enumerate([0.0, 0.3, 0.8, 1.0]):
        problem = Problem(
            {**problem.leaves, "balance": rand(N, seed=step), "row_weight": rand(N, seed=step + 9)},
            class_indices((N,), V, seed=step, ignored=ignored),
            problem.options,
        )
        actual, expected = evaluate(compiled, problem), evaluate(function, problem)
        for name in expected:
            assert_within(actual[name], expected[name], 1e-6, 1e-9, name)
    assert counter.frame_count == 1


def test_scalar_balance_tensor_does_not_recompile():
    counter = CompileCounterWithBackend("eager")
    hidden, weight, target = randn(N, D), randn(V, D), class_indices((N,), V)

    @torch.compile(fullgraph=True, backend=counter)
    def call(balance):
        return tightrope.linear_reality_creativity_loss(hidden, weight, target, balance=balance)

    for value in (0.0, 0.25, 1.0):
        expected = reference.linear_reality_creativity_loss(hidden, weight, target, balance=value)
        assert call(torch.tensor(value)).item() == pytest.approx(expected.item(), rel=1e-5)
    assert counter.frame_count == 1


def test_compiled_without_gradients():
    """Evaluation, as one graph."""
    hidden, weight = randn(N, D), randn(V, D)
    target = class_indices((N,), V, ignored=0.5)
    compiled = torch.compile(tightrope.linear_reality_creativity_loss, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        actual = compiled(hidden, weight, target, balance=0.5)
    expected = tightrope.linear_reality_creativity_loss(hidden, weight, target, balance=0.5)
    assert torch.equal(actual, expected)


class Recorder(TorchDispatchMode):
    """Keeps the calls of operators of this library, by name."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "tightrope":
            kept = tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)
            self.calls.setdefault(function.name(), []).append((function, kept, kwargs or {}))
        return function(*args, **(kwargs or {}))


def second_order(linear):
    """A direction in forward mode, and the derivative of a gradient."""
    leaves = [randn(N, D).requires_grad_(), randn(V, D, seed=1).requires_grad_(), randn(V).requires_grad_()]
    target = class_indices((N,), V, ignored=0.3)
    options = {"temperature": (rand(N, seed=2) + 0.5).requires_grad_(), "softcap": 5.0}
    if linear:
        options["strategy"] = "streaming"  # a chunked loss has a sweep of its own, which is no operator
    else:
        leaves = [randn(N, V).requires_grad_()]

    def function(first, *rest):
        if not linear:
            return tightrope.reality_creativity_loss(first, target, balance=0.5, **options)
        weight, bias = rest
        return tightrope.linear_reality_creativity_loss(first, weight, target, bias, balance=0.5, **options)

    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(leaves[0].detach(), torch.ones_like(leaves[0]))
        function(dual, *(leaf.detach() for leaf in leaves[1:]))
    sources = (*leaves, options["temperature"])
    grads = torch.autograd.grad(function(*leaves), sources, create_graph=True)
    torch.autograd.grad(sum(g.square().sum() for g in grads), sources)


def recorded_calls():
    with Recorder() as recorder:
        for function, problem in CASES.values():
            evaluate(function, problem)
        for linear in (True, False):
            second_order(linear)
        soft = torch.softmax(randn(N, V), -1).requires_grad_()
        tightrope.linear_reality_creativity_loss(randn(N, D), randn(V, D), soft).backward()
        tightrope.reality_creativity_loss(randn(N, V), soft).backward()
    return recorder.calls


def registered():
    names = torch._C._dispatch_get_all_op_names()
    return {name for name in names if name.startswith("tightrope::")}


# Called by the other operators, where no mode sees them; they write into arguments, see below.
PRIMITIVES = {
    f"tightrope::{name}"
    for name in (
        "row_stats",
        "row_sides",
        "row_grad",
        "row_grad_sums",
        "row_loss_grad",
        "row_tangent",
        "row_grad_tangent",
        "column_sums",
        "pairs",
        "pair_product",
        "panels",
        "product",
        "product_stats",
    )
}


def test_every_operator_is_checked():
    assert set(recorded_calls()) | PRIMITIVES == registered()


@pytest.mark.parametrize("name", sorted(registered() - PRIMITIVES))
def test_operators(name):
    """Schema, fake implementation and registration, as PyTorch checks its own operators."""
    for function, args, kwargs in recorded_calls()[name]:
        # The autograd Functions around the operators give the gradients, not a registered formula.
        checks = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(function, args, kwargs, test_utils=checks)


def primitive_arguments(kind):
    """Arguments of a primitive over one tile of 10 rows and 40 entries, dispatched by hand."""
    rows, width = 10, 40
    target = {
        "index": (class_indices((rows,), width), None, None, None),
        "dense": (None, torch.softmax(randn(rows, width), -1), None, None),
        "top_k": (None, None, *top_k((rows,), width)),
    }[kind]
    tail = (0, *target, randn(width, seed=3), torch.arange(rows) % 3 > 0, 0.7, 5.0)
    return rows, randn(rows, width), tail


@pytest.mark.parametrize("kind", ["index", "dense", "top_k"])
@pytest.mark.parametrize("name", sorted(PRIMITIVES))
def test_primitives(name, kind):
    """The primitives write into tensors that the caller gives, as their schema says."""
    if name.endswith("pair_product") and backends.PANEL and not backends.BACKENDS["cpu"].pair_product:
        pytest.skip("this CPU has no products of pairs")
    rows, logits, tail = primitive_arguments(kind)
    partial = empty_partial(rows, torch.float32, torch.device("cpu"))
    if name.endswith("row_stats"):
        args = (logits, *partial, *tail)
    elif name.endswith("product_stats"):
        dense_is_refused = (0, tail[1], None, *tail[3:])
        head, width = randn(logits.shape[1], 8), backends.PANEL or 16
        panels = randn(-(-rows // width), 8, width, seed=4)
        args = (head, panels, torch.full((len(head), rows), torch.nan), *partial, *dense_is_refused)
    elif name.endswith("pairs"):
        args = (randn(8, 6, dtype=torch.bfloat16), torch.full((16, 6, 2), torch.nan, dtype=torch.bfloat16))
    elif name.endswith("pair_product"):
        a, pairs = randn(8, 6, dtype=torch.bfloat16), randn(3, rows, 2, dtype=torch.bfloat16)
        args = (a, pairs, torch.full((8, rows), torch.nan), False)
    elif name.endswith("panels"):
        width = backends.PANEL or 16
        args = (logits, torch.full((-(-logits.shape[1] // width), rows, width), torch.nan))
    elif name.endswith("::product"):
        args = (logits.t(), randn(rows, 6), torch.full((logits.shape[1], 6), torch.nan), False)
    elif name.endswith("column_sums"):
        args = (logits, randn(2, rows), 4.0, torch.full((3, logits.shape[1]), torch.nan))
    elif name.endswith("row_sides"):
        threshold = torch.zeros(rows)
        args = (logits, empty_sides(rows, torch.float32, torch.device("cpu")), 0, threshold, None, *tail[1:])
    elif name.endswith("row_loss_grad"):
        # Whole rows: there is no offset among its arguments.
        args = (logits, torch.empty_like(logits).fill_(float("nan")), *partial, randn(11, rows), *tail[1:])
    elif name.endswith("tangent"):
        norm, place = torch.stack([logits.amax(-1), torch.ones(rows)]), (0, None, None, *tail[1:])
        args = (logits, randn(*logits.shape, seed=4), torch.zeros(7, rows), norm, *place)
        if name.endswith("row_grad_tangent"):
            outs = [torch.empty_like(logits).fill_(float("nan")) for _ in range(2)]
            args = (*args[:2], *outs, norm, randn(1, rows), randn(7, rows), randn(7, rows, seed=5), *place)
    else:
        norm = torch.stack([logits.amax(-1), torch.ones(rows)])
        sums = (randn(2, rows), 4.0, torch.full((3, logits.shape[1]), torch.nan))
        args = (
            logits,
            torch.empty_like(logits).fill_(float("nan")),
            norm,
            randn(7, rows),
            *(sums if name.endswith("row_grad_sums") else ()),
            0,
            None,
            None,
            *tail[1:],
        )
    operator = getattr(torch.ops.tightrope, name.removeprefix("tightrope::")).default
    torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))


def test_recorded_calls_give_the_same_bits():
    """Recording is no special path: the operators give the same bits under a mode."""
    function, problem = CASES["chunked"]
    with Recorder():
        recorded = evaluate(function, problem)
    assert_same_bits(recorded, evaluate(function, problem))
