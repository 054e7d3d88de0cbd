"""Bad input is a clear error before any work: its type, and what its message says.

Each message must name the argument, show what was got and what was expected. The table below is the
contract; a case that is missing from it is a case that nobody has thought of.
"""

import re
from dataclasses import replace

import pytest
import torch

import tightrope
from helpers import BACKENDS
from tightrope import backends

N, V, D = 3, 5, 2
HIDDEN, HEAD, BIAS = torch.zeros(N, D), torch.zeros(V, D), torch.zeros(V)
TARGET = torch.tensor([0, 4, -100])
PAIRS = tightrope.TopKTarget(torch.zeros(N, 2, dtype=torch.int64), torch.zeros(N, 2))
META = torch.device("meta")

# what is passed instead, error, and what the message must hold: the argument, what was got, what was expected
LOSS = {
    "input is a list": ({"input": [1.0]}, TypeError, "input", "list", "tensor"),
    "input is integer": ({"input": HIDDEN.long()}, TypeError, "input", "int64", "float32"),
    "input is complex": ({"input": HIDDEN.cfloat()}, TypeError, "input", "complex64", "float32"),
    "input is a number": ({"input": torch.tensor(1.0)}, ValueError, "input", "0-dim", "D"),
    "input is sparse": ({"input": HIDDEN.to_sparse()}, TypeError, "input", "sparse", "dense"),
    "input width": ({"input": torch.zeros(N, 3)}, ValueError, "input", "3", "2"),
    "weight is None": ({"weight": None}, TypeError, "weight", "None", "tensor"),
    "weight is integer": ({"weight": HEAD.int()}, TypeError, "weight", "int32", "float32"),
    "weight has one dimension": ({"weight": BIAS}, ValueError, "weight", r"\[5\]", r"\(V, D\)"),
    "weight is empty": ({"weight": HEAD[:0]}, ValueError, "weight", r"\[0, 2\]", "at least 1"),
    "weight on another device": ({"weight": HEAD.to(META)}, ValueError, "weight", "meta", "cpu"),
    "bias is a list": ({"bias": [0.0] * V}, TypeError, "bias", "list", "tensor"),
    "bias is integer": ({"bias": BIAS.long()}, TypeError, "bias", "int64", "float32"),
    "bias length": ({"bias": torch.zeros(4)}, ValueError, "bias", r"\[4\]", r"\[5\]"),
    "bias is a column": ({"bias": BIAS[:, None]}, ValueError, "bias", r"\[5, 1\]", r"\[5\]"),
    "bias on another device": ({"bias": BIAS.to(META)}, ValueError, "bias", "meta", "cpu"),
    "target is None": ({"target": None}, TypeError, "target", "None", "tensor"),
    "target is a list": ({"target": [0, 1, 2]}, TypeError, "target", "list", "tensor"),
    "target is a tuple": ({"target": tuple(PAIRS)}, TypeError, "target", "tuple", "TopKTarget"),
    "target is boolean": ({"target": TARGET > 0}, TypeError, "target", "bool", "int64"),
    "target length": ({"target": TARGET[:2]}, ValueError, "target", r"\[2\]", r"\[3\]"),
    "target has a dimension more": (
        {"target": TARGET[:, None]},
        ValueError,
        "target",
        r"\[3, 1\]",
        r"\[3\]",
    ),
    "target of floats is no distribution": (
        {"target": TARGET.float()},
        ValueError,
        "target",
        r"\[3\]",
        r"\[3, 5\]",
    ),
    "distribution over another V": (
        {"target": torch.zeros(N, 4)},
        ValueError,
        "target",
        r"\[3, 4\]",
        r"\[3, 5\]",
    ),
    "target on another device": ({"target": TARGET.to(META)}, ValueError, "target", "meta", "cpu"),
    "class V": ({"target": torch.tensor([0, 5, 1])}, IndexError, "target", "5", r"\[0, 5\)"),
    "class -1": ({"target": torch.tensor([0, -1, 1])}, IndexError, "target", "-1", r"\[0, 5\)"),
    "class -100 is not ignored": ({"ignore_index": -1}, IndexError, "target", "-100", r"\[0, 5\)"),
    "top-k indices are floats": (
        {"target": PAIRS._replace(indices=PAIRS.probs)},
        TypeError,
        "indices",
        "float32",
        "int64",
    ),
    "top-k probs are integers": (
        {"target": PAIRS._replace(probs=PAIRS.indices)},
        TypeError,
        "probs",
        "int64",
        "float32",
    ),
    "top-k probs of another K": (
        {"target": PAIRS._replace(probs=torch.zeros(N, 3))},
        ValueError,
        "probs",
        r"\[3, 3\]",
        r"\[3, 2\]",
    ),
    "top-k for other tokens": (
        {"target": tightrope.TopKTarget(PAIRS.indices[:2], PAIRS.probs[:2])},
        ValueError,
        "indices",
        r"\[2, 2\]",
        r"\[3, ",
    ),
    "top-k class V": (
        {"target": PAIRS._replace(indices=torch.full((N, 2), 5))},
        IndexError,
        "indices",
        "5",
        r"\[0, 5\)",
    ),
    "top-k class -1": (
        {"target": PAIRS._replace(indices=torch.full((N, 2), -1))},
        IndexError,
        "indices",
        "-1",
        r"\[0, 5\)",
    ),
    "top-k class -2": (
        {"target": PAIRS._replace(indices=torch.full((N, 2), -2))},
        IndexError,
        "indices",
        "-2",
        r"\[0, 5\)",
    ),
    "balance above 1": ({"balance": 1.5}, ValueError, "balance", "1.5", "at most 1"),
    "balance below 0": ({"balance": -0.1}, ValueError, "balance", "-0.1", "at least 0"),
    "balance is NaN": ({"balance": float("nan")}, ValueError, "balance", "nan", "at least 0"),
    "balance is a string": ({"balance": "0.5"}, TypeError, "balance", "str", "number"),
    "balance tensor above 1": (
        {"balance": torch.tensor([0.0, 1.0, 1.25])},
        ValueError,
        "balance",
        "1.25",
        r"\[0, 1\]",
    ),
    "balance tensor below 0": (
        {"balance": torch.tensor([0.0, 1.0, -0.5])},
        ValueError,
        "balance",
        "-0.5",
        r"\[0, 1\]",
    ),
    "balance tensor with NaN": (
        {"balance": torch.tensor([0.0, 1.0, float("nan")])},
        ValueError,
        "balance",
        "nan",
        r"\[0, 1\]",
    ),
    "balance shape": ({"balance": torch.zeros(2)}, ValueError, "balance", r"\[2\]", r"\[3\]"),
    "balance on another device": (
        {"balance": torch.zeros(N, device=META)},
        ValueError,
        "balance",
        "meta",
        "cpu",
    ),
    "reality": ({"reality": "hinge"}, ValueError, "reality", "hinge", "squared_error"),
    "creativity": ({"creativity": "chaos"}, ValueError, "creativity", "chaos", "collision"),
    "reduction": ({"reduction": "max"}, ValueError, "reduction", "max", "mean"),
    "reduction is None": ({"reduction": None}, (ValueError, TypeError), "reduction", "None", "mean"),
    "label_smoothing": ({"label_smoothing": 1.1}, ValueError, "label_smoothing", "1.1", "at most 1"),
    "label_smoothing sign": ({"label_smoothing": -0.1}, ValueError, "label_smoothing", "-0.1", "0"),
    "label_smoothing type": ({"label_smoothing": "a"}, TypeError, "label_smoothing", "str", "number"),
    "ignore_index": ({"ignore_index": 1.0}, TypeError, "ignore_index", "float", "integer"),
    "row_weight is a list": ({"row_weight": [1.0]}, TypeError, "row_weight", "list", "tensor"),
    "row_weight shape": (
        {"row_weight": torch.zeros(N, 1)},
        ValueError,
        "row_weight",
        r"\[3, 1\]",
        r"\[3\]",
    ),
    "row_weight on another device": (
        {"row_weight": torch.zeros(N, device=META)},
        ValueError,
        "row_weight",
        "meta",
        "cpu",
    ),
    "logit_scale is NaN": ({"logit_scale": float("nan")}, ValueError, "logit_scale", "nan", "finite"),
    "logit_scale is infinite": ({"logit_scale": float("inf")}, ValueError, "logit_scale", "inf", "finite"),
    "logit_scale is None": ({"logit_scale": None}, TypeError, "logit_scale", "None", "number"),
    "softcap is 0": ({"softcap": 0.0}, ValueError, "softcap", "0.0", "above 0"),
    "softcap is negative": ({"softcap": -5}, ValueError, "softcap", "-5", "above 0"),
    "softcap is a string": ({"softcap": "5"}, TypeError, "softcap", "str", "number"),
    "z_loss": ({"z_loss": float("inf")}, ValueError, "z_loss", "inf", "finite"),
    "z_loss is a string": ({"z_loss": "1"}, TypeError, "z_loss", "str", "number"),
    "logit_l2": ({"logit_l2": float("nan")}, ValueError, "logit_l2", "nan", "finite"),
    "normalizer is negative": ({"normalizer": -1.5}, ValueError, "normalizer", "-1.5", "at least 0"),
    "normalizer is NaN": ({"normalizer": float("nan")}, ValueError, "normalizer", "nan", "at least 0"),
    "normalizer is infinite": ({"normalizer": float("inf")}, ValueError, "normalizer", "inf", "finite"),
    "normalizer tensor is negative": (
        {"normalizer": torch.tensor(-5)},
        ValueError,
        "normalizer",
        "-5",
        "at least 0",
    ),
    "normalizer tensor is NaN": (
        {"normalizer": torch.tensor([float("nan")])},
        ValueError,
        "normalizer",
        "nan",
        "at least 0",
    ),
    "weights of both signs": (
        {"row_weight": torch.tensor([1.0, -0.5, 3.0])},
        ValueError,
        "row_weight",
        "-0.5",
        "normalizer=",
    ),
    "ignore_index of a distribution": (
        {"target": torch.zeros(N, V), "ignore_index": 0},
        ValueError,
        "ignore_index",
        "0",
        "row_weight of 0",
    ),
    "class_weight is a list": ({"class_weight": [1.0] * V}, TypeError, "class_weight", "list", "tensor"),
    "class_weight is integer": ({"class_weight": BIAS.long()}, TypeError, "class_weight", "int64", "float32"),
    "class_weight length": ({"class_weight": torch.ones(4)}, ValueError, "class_weight", r"\[4\]", r"\[5\]"),
    "class_weight on another device": (
        {"class_weight": BIAS.to(META)},
        ValueError,
        "class_weight",
        "meta",
        "cpu",
    ),
    "class_weight requires grad": (
        {"class_weight": torch.ones(V, requires_grad=True)},
        ValueError,
        "class_weight",
        "requires grad",
        "not",
    ),
    "class_weight of the squared error": (
        {"class_weight": torch.ones(V), "reality": "squared_error"},
        ValueError,
        "class_weight",
        "squared_error",
        "cross_entropy",
    ),
    "class V with class_weight": (
        {"target": torch.tensor([0, 5, 1]), "class_weight": torch.ones(V)},
        IndexError,
        "target",
        "5",
        r"\[0, 5\)",
    ),
    "logit_scale overflows float32": ({"logit_scale": 1e40}, ValueError, "logit_scale", r"1e\+40", "float32"),
    "logit_scale of two": (
        {"logit_scale": torch.ones(2)},
        TypeError,
        "logit_scale",
        r"\[2\]",
        "finite number",
    ),
    "logit_scale requires grad": (
        {"logit_scale": torch.ones((), requires_grad=True)},
        ValueError,
        "logit_scale",
        "requires grad",
        "no gradient",
    ),
    "softcap overflows float32": ({"softcap": 1e39}, ValueError, "softcap", r"1e\+39", "float32"),
    "softcap underflows float32": ({"softcap": 1e-46}, ValueError, "softcap", "1e-46", "at least"),
    "z_loss overflows float32": ({"z_loss": 1e39}, ValueError, "z_loss", r"1e\+39", "float32"),
    "workspace_mb is beyond all memory": (
        {"workspace_mb": 1e30},
        ValueError,
        "workspace_mb",
        r"1e\+30",
        "at most",
    ),
    "normalizer is a string": ({"normalizer": "3"}, TypeError, "normalizer", "str", "number"),
    "normalizer shape": ({"normalizer": torch.ones(2)}, ValueError, "normalizer", r"\[2\]", "0-dim"),
    "normalizer requires grad": (
        {"normalizer": torch.tensor(1.0, requires_grad=True)},
        ValueError,
        "normalizer",
        "requires grad",
        "not",
    ),
    "shift is negative": ({"shift": -1}, ValueError, "shift", "-1", "at least 0"),
    "shift is a float": ({"shift": 1.0}, TypeError, "shift", "float", "integer"),
    "shift is a flag": ({"shift": True}, TypeError, "shift", "bool", "integer"),
    "shift of one token": (
        {"shift": 1, "input": HIDDEN[0], "target": TARGET[0]},
        ValueError,
        "shift",
        "1",
        "T",
    ),
    "skip_ignored": ({"skip_ignored": "no"}, TypeError, "skip_ignored", "no", "False"),
    "return_stats": ({"return_stats": 1}, TypeError, "return_stats", "1", "False"),
    "workspace_mb is 0": ({"workspace_mb": 0}, ValueError, "workspace_mb", "0", "above 0"),
    "workspace_mb is negative": ({"workspace_mb": -1.0}, ValueError, "workspace_mb", "-1.0", "above 0"),
    "workspace_mb is NaN": ({"workspace_mb": float("nan")}, ValueError, "workspace_mb", "nan", "above 0"),
    "workspace_mb is a string": ({"workspace_mb": "64"}, TypeError, "workspace_mb", "str", "number"),
    "backend": ({"backend": "fpga"}, ValueError, "backend", "fpga", "eager"),
    "strategy": ({"strategy": "greedy"}, ValueError, "strategy", "greedy", "streaming"),
}
OWN_LOSS = {
    "loss_fn is a name": ({"loss_fn": "focal"}, TypeError, "loss_fn", "str", "callable"),
    "loss_fn gives a number": ({"loss_fn": lambda s: 0.0}, TypeError, "loss_fn", "float", "tensor"),
    "loss_fn gives one loss": (
        {"loss_fn": lambda s: s.lse.sum()},
        ValueError,
        "loss_fn",
        r"\[\]",
        "one loss a row",
    ),
    "row_args is a tensor": ({"row_args": TARGET}, TypeError, "row_args", "Tensor", "tuple"),
    "row_args of a number": ({"row_args": (1.0,)}, TypeError, r"row_args\[0\]", "float", "tensor"),
    "row_args shape": ({"row_args": (torch.zeros(2),)}, ValueError, r"row_args\[0\]", r"\[2\]", r"\[3\]"),
    "row_args on another device": (
        {"row_args": (torch.zeros(N, device=META),)},
        ValueError,
        r"row_args\[0\]",
        "meta",
        "cpu",
    ),
}
LOGITS_ONLY = {
    "logits are a list": ({"logits": [1.0]}, TypeError, "logits", "list", "tensor"),
    "logits are integer": ({"logits": torch.zeros(N, V).int()}, TypeError, "logits", "int32", "float32"),
    "logits of one number": ({"logits": torch.tensor(1.0)}, ValueError, "logits", r"\[\]", r"V"),
    "logits of no classes": ({"logits": torch.zeros(N, 0)}, ValueError, "logits", r"\[3, 0\]", "at least 1"),
}
LINEAR_ONLY = {"input", "weight", "bias", "skip_ignored", "workspace_mb", "strategy"}
TERMS_ONLY = {"balance", "reality", "creativity", "label_smoothing", "class_weight", "z_loss", "logit_l2"}
NOT_STATISTICS = TERMS_ONLY | {"row_weight", "reduction", "normalizer", "return_stats", "strategy"}


def without(names):
    return {case: row for case, row in LOSS.items() if not names & set(row[0])}


def rejects(function, defaults, row):
    changes, error, *parts = row
    with pytest.raises(error) as caught:
        function(**{**defaults, **changes})
    message = str(caught.value)
    for part, what in zip(parts, ("the argument", "what was got", "what was expected")):
        assert re.search(part, message), f"{what} ({part}) is not in: {message}"
    assert message.index(":") < 30, f"the argument does not come first: {message}"


# A loss of one's own may do without a target.
WITHOUT_TERMS = [case for case in without(TERMS_ONLY) if case != "target is None"]
OF_LOGITS = without(LINEAR_ONLY) | OWN_LOSS | LOGITS_ONLY
LINEAR_DEFAULTS = {"input": HIDDEN, "weight": HEAD, "target": TARGET, "bias": BIAS}


@pytest.mark.parametrize("case", LOSS)
def test_linear_loss(case):
    rejects(tightrope.linear_reality_creativity_loss, LINEAR_DEFAULTS, LOSS[case])


@pytest.mark.parametrize("case", without(LINEAR_ONLY) | LOGITS_ONLY)
def test_logits_loss(case):
    defaults = {"logits": torch.zeros(N, V), "target": TARGET}
    rejects(tightrope.reality_creativity_loss, defaults, (LOSS | LOGITS_ONLY)[case])


@pytest.mark.parametrize("case", [case for case in without(NOT_STATISTICS) if case != "target is None"])
def test_statistics(case):
    rejects(tightrope.linear_vocab_stats, LINEAR_DEFAULTS, LOSS[case])


@pytest.mark.parametrize("case", [*WITHOUT_TERMS, *OWN_LOSS])
@pytest.mark.parametrize("strategy", ["chunked", "streaming"])
def test_own_loss(case, strategy):
    defaults = {**LINEAR_DEFAULTS, "loss_fn": lambda stats, *_: stats.lse, "strategy": strategy}
    defaults["input"] = HIDDEN.clone().requires_grad_()
    rejects(tightrope.linear_vocab_loss, defaults, (LOSS | OWN_LOSS)[case])


@pytest.mark.parametrize(
    "case", [case for case in [*WITHOUT_TERMS, *OWN_LOSS, *LOGITS_ONLY] if case in OF_LOGITS]
)
def test_own_loss_of_logits(case):
    """What the linear function refuses is refused for logits too."""
    row = (LOSS | OWN_LOSS | LOGITS_ONLY)[case]
    defaults = {"logits": torch.zeros(N, V), "target": TARGET, "loss_fn": lambda stats, *_: stats.lse}
    rejects(tightrope.vocab_loss, defaults, row)


@pytest.mark.parametrize("case", [c for c in without(NOT_STATISTICS | LINEAR_ONLY) if c != "target is None"])
def test_statistics_of_logits(case):
    """What the linear function refuses is refused for logits too."""
    rejects(tightrope.vocab_stats, {"logits": torch.zeros(N, V), "target": TARGET}, LOSS[case])


def test_own_loss_that_captures_a_parameter():
    """The chunked strategy makes gradients in the forward pass, so this one would silently get none."""
    temperature = torch.ones((), requires_grad=True)
    arguments = (HIDDEN.clone().requires_grad_(), HEAD, TARGET, lambda s: s.lse * temperature)
    with pytest.raises(ValueError, match=r"loss_fn.*requires grad.*row_args"):
        tightrope.linear_vocab_loss(*arguments, strategy="chunked")
    tightrope.linear_vocab_loss(*arguments, strategy="streaming").backward()
    assert temperature.grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("position", [0, 4, 2047])
@pytest.mark.parametrize("bad", [4099, 2**31, 2**40, -(2**40), -1])
def test_class_out_of_range_in_any_row(bad, position, backend):
    """No kernel ever reads past the end: classes are checked first, also those beyond 32 bits."""
    target = torch.zeros(2048, dtype=torch.int64)
    target[position] = bad
    with pytest.raises(IndexError, match=rf"target.*{bad}.*\[0, 4099\)"):
        tightrope.linear_reality_creativity_loss(
            torch.zeros(2048, 1), torch.zeros(4099, 1), target, backend=backend
        )


def test_class_out_of_range_where_shift_drops_it():
    """The first target is scored by nobody under a shift, so its class does not matter."""
    target = torch.tensor([[99, 1, 2]])
    hidden = torch.zeros(1, 3, D)
    options = {"shift": 1, "reduction": "none"}
    loss = tightrope.linear_reality_creativity_loss(hidden, HEAD, target, **options)
    assert loss.shape == (1, 3)
    assert loss[0, 2] == 0


@pytest.mark.parametrize("strategy", ["chunked", "streaming", None])
def test_more_topk_entries_than_the_row_kernels_take(strategy, monkeypatch):
    """Before the first GEMM. The plain backend has no limit, and is given one."""
    limited = replace(backends.BACKENDS["eager"], max_topk=1)
    monkeypatch.setitem(backends.BACKENDS, "eager", limited)
    arguments = (HIDDEN.clone().requires_grad_(), HEAD, PAIRS)
    match = 'target: got 2 top-k entries.*at most 1 .*backend "eager"'
    with pytest.raises(ValueError, match=match):
        tightrope.linear_reality_creativity_loss(*arguments, strategy=strategy, backend="eager")
    with pytest.raises(ValueError, match=match):
        tightrope.linear_vocab_loss(*arguments, lambda s: s.lse, strategy=strategy, backend="eager")
    with pytest.raises(ValueError, match=match):
        tightrope.reality_creativity_loss(torch.zeros(N, V), PAIRS, backend="eager")
    monkeypatch.setitem(backends.BACKENDS, "eager", replace(limited, max_topk=2))
    tightrope.linear_reality_creativity_loss(*arguments, strategy=strategy, backend="eager")


def test_nothing_is_done_before_the_error():
    """The caller's tensors are as they were."""
    hidden = HIDDEN.clone().requires_grad_()
    with pytest.raises(ValueError, match="balance"):
        tightrope.linear_reality_creativity_loss(hidden, HEAD, TARGET, balance=2.0)
    assert hidden.grad is None
    assert not hidden.any()


MODULES = [tightrope.LinearRealityCreativityLoss, tightrope.RealityCreativityLoss]


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"reality": "hinge"}, ValueError, "reality.*hinge.*squared_error"),
        ({"label_smoothing": 2.0}, ValueError, "label_smoothing.*2.0.*at most 1"),
        ({"softcap": -1.0}, ValueError, "softcap.*-1.0.*above 0"),
        ({"reduction": "max"}, ValueError, "reduction.*max.*mean"),
        ({"balance": 1.5}, ValueError, "balance.*1.5.*at most 1"),
        ({"ballance": 0.5}, TypeError, "ballance"),
    ],
)
def test_modules_check_when_they_are_made(module, options, error, match):
    """A wrong option is found where it was written, not at the first batch."""
    with pytest.raises(error, match=match):
        module(**options)
