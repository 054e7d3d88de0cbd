"""TRL on Tightrope: the same losses, metrics and gradients as with TRL's own kernel, and no logits.

Dense float64 mathematics is the judge of the kernel, TRL itself of what its trainers make of it.
"""

import copy
import re

import pytest
import tiny
import torch

trl = pytest.importorskip("trl", reason="trl is not installed")
from trl.trainer import utils
from trl_trainers import WARNINGS, V, dpo, grpo, history, kto, largest_allocation, sft

from tightrope.integrations import trl as integration
from tightrope.strategies import workspace

pytestmark = [
    pytest.mark.one_in(4),
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(WARNINGS),
]

OPTIONAL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.fixture
def installed():
    integration.install()
    yield
    integration.uninstall()


# The kernel.


def dense(hidden, weight, bias, targets, temperature, softcap, scale):
    """Log-probability, entropy, log of the collision probability, mean logit, and whether first."""
    z = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    z = z * scale
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    log_p = z.log_softmax(-1)
    return (
        log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1),
        -(log_p.exp() * log_p).sum(-1),
        log_p.exp().square().sum(-1).log(),
        z.mean(-1),
        z.argmax(-1) == targets,
    )


def inputs(dtype, bias=True):
    leaves = [torch.randn(37, 16) * 2, torch.randn(101, 16), torch.randn(101) if bias else None]
    leaves = [None if x is None else x.to(dtype).requires_grad_() for x in leaves]
    targets = torch.randint(101, (37,))
    targets[::3] = (leaves[0] @ leaves[1].T)[::3].argmax(-1)  # so that some are first
    return leaves, targets


def gradients(outputs, upstream, leaves):
    pairs = [(o, u.to(o.dtype)) for o, u in zip(outputs, upstream)]
    return torch.autograd.grad(
        [o for o, _ in pairs], [x for x in leaves if x is not None], [u for _, u in pairs]
    )


CASES = [(False, None, 1.0, 1.0), (True, 3.0, 0.5, 0.7), (True, None, 2.0, 1.3)]


@pytest.mark.parametrize(("bias", "softcap", "scale", "temperature"), CASES)
def test_kernel_is_the_mathematics(bias, softcap, scale, temperature):
    """A softcap, scale or temperature in the wrong order, or a wrong gradient of any of the four outputs."""
    leaves, targets = inputs(torch.float64, bias)
    got = integration._LogProbs.apply(*leaves, targets, temperature, 32768, softcap, scale, OPTIONAL)
    expected = dense(*leaves, targets, temperature, softcap, scale)
    upstream = torch.randn(4, 37)
    assert torch.equal(got[4], expected[4]) and 5 < got[4].sum() < 37
    torch.testing.assert_close(got[:4], expected[:4], rtol=1e-12, atol=1e-12)
    for one, other in zip(gradients(got[:4], upstream, leaves), gradients(expected[:4], upstream, leaves)):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("bias", "softcap", "scale", "temperature"), CASES)
def test_kernel_is_trls(bias, softcap, scale, temperature, autocast):
    """Another meaning of an argument or an output than TRL's, in float32 and under autocast."""
    leaves, targets = inputs(torch.float32, bias)
    upstream, results = torch.randn(2, 37), []
    for kernel in (utils._ChunkedLogProbFunction, integration._LogProbs):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = kernel.apply(*leaves, targets, temperature, 64, softcap, scale, OPTIONAL)
        results.append((outputs, gradients(outputs[:2], upstream, leaves)))
    (theirs, their_gradients), (ours, our_gradients) = results
    limit = 5e-2 if autocast else 1e-5  # TRL rounds logits and their gradients to bfloat16 there
    assert autocast or torch.equal(ours[4], theirs[4])
    for one, other in zip((*ours[:4], *our_gradients), (*theirs[:4], *their_gradients)):
        assert one.dtype == other.dtype
        assert (one - other).norm() <= limit * other.norm()


def test_only_what_is_asked_for_is_returned():
    """An output that TRL did not ask for: its trainers take None for a field that is not there."""
    leaves, targets = inputs(torch.float32)
    got = integration._LogProbs.apply(*leaves, targets, 1.0, 64, None, 1.0, ("log_probs", "is_top1"))
    assert [x is None for x in got] == [False, True, True, True, False]


def test_stage_3_heads_are_left_to_trls_kernel(installed):
    """A head that DeepSpeed takes away after the forward: Tightrope's backward would find nothing there."""
    leaves, targets = inputs(torch.float32)
    leaves[1].ds_id = 0
    got = integration._LogProbs.apply(*leaves, targets, 1.0, 64)
    assert "ChunkedLogProbFunction" in type(got[0].grad_fn).__name__


# The head of a model.


def scored(model, labels, **options):
    """All fields, and the gradients of the parameters, of a model that is given a fused head."""
    model = copy.deepcopy(model)
    utils.add_fused_lm_head(model, outputs=("log_probs", *OPTIONAL), **options)
    output = model(input_ids=labels.clamp(min=3), labels=labels, fused_lm_head=True)
    loss = (
        output.loss
        + (output.entropy * torch.linspace(-1, 1, output.entropy.numel()).view_as(output.entropy)).sum()
    )
    loss.backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


MODELS = {
    "llama": (lambda: tiny.llama(), {"temperature": 0.7}),
    "gemma2": (lambda: tiny.gemma2(), {"temperature": 1.3}),
    "phi": (lambda: tiny.build("phi"), {}),  # a bias
    "cohere": (lambda: tiny.build("cohere", logit_scale=0.25), {"temperature": 0.7}),
    "half": (lambda: tiny.llama(dtype=torch.bfloat16), {"cast_lm_head_to_fp32": True}),
}


@pytest.mark.parametrize("ignored", ["some", "none", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_a_models_head_is_trls(name, ignored):
    """A field or a gradient that differs where labels are ignored, or the head has a bias, cap or scale."""
    make, options = MODELS[name]
    model = make()
    if name == "half":  # what GRPOTrainer does, with cast_lm_head_to_fp32
        model.lm_head.float()
    labels = torch.randint(3, tiny.VOCAB, (3, 12))
    if ignored != "none":
        labels[:, : {"some": 5, "all": 12}[ignored]] = -100
    theirs, their_gradients = scored(model, labels, **options)
    try:
        integration.install()
        ours, our_gradients = scored(model, labels, **options)
    finally:
        integration.uninstall()
    assert list(ours) == list(theirs) and list(our_gradients) == list(their_gradients)
    for field in ours:
        torch.testing.assert_close(ours[field], theirs[field], rtol=1e-5, atol=1e-5)
    for parameter, gradient in our_gradients.items():
        other, limit = their_gradients[parameter], 1e-2 if gradient.dtype == torch.bfloat16 else 1e-5
        assert (gradient - other).norm() <= limit * other.norm() + 1e-12, parameter


def test_ignored_tokens_cost_nothing(installed, monkeypatch):
    """Prompts that go through the head on a CPU, as TRL has them do."""
    rows = []

    def watch(hidden, *args, **options):
        rows.append(hidden.shape)
        return stats(hidden, *args, **options)

    stats = integration.linear_vocab_stats
    monkeypatch.setattr(integration, "linear_vocab_stats", watch)
    labels = torch.randint(3, tiny.VOCAB, (3, 12))
    labels[:, :9] = -100
    scored(tiny.llama(), labels)
    assert rows == [(9, 32)]


# The trainers.


ADAPTIVE = {"use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_coef_delta": 0.05}
RUNS = {
    "sft": (sft, {}),
    "sft_dft": (sft, {"loss_type": "dft"}),
    "dpo": (dpo, {}),
    "dpo_wpo": (dpo, {"use_weighting": True}),
    "kto": (kto, {}),
    "rloo": (grpo, {"kind": "RLOO", "beta": 0.0}),
    "grpo": (grpo, {}),
    "grpo_bonus": (grpo, {"entropy_coef": 0.1}),
    "grpo_raised": (grpo, {**ADAPTIVE, "entropy_target": 5.0, "entropy_coef_max": 1.0}),
    "grpo_lowered": (grpo, {**ADAPTIVE, "entropy_target": 0.1}),
}


@pytest.mark.parametrize("name", RUNS)
def test_trainers_log_the_same(name, tmp_path):
    """A loss, a metric or a gradient's norm of a trainer that install() changes, under a softcap."""
    make, options = RUNS[name]
    theirs = make(tiny.gemma2(), tmp_path, **options)
    expected = history(theirs)
    try:
        integration.install()
        ours = make(tiny.gemma2(), tmp_path, **options)
        got = history(ours)
    finally:
        integration.uninstall()
    assert len(got) == 3 and got[0]["grad_norm"] > 0
    for one, other in zip(got, expected, strict=True):
        assert one == pytest.approx(other, rel=2e-5, abs=2e-6)
    if name == "grpo_raised":
        assert [entry["entropy_coef"] for entry in got[:2]] == pytest.approx([0.15, 0.2])


@pytest.mark.parametrize("name", ["sft", "dpo_wpo", "kto", "grpo_bonus", "grpo_raised"])
def test_trainers_make_no_logits(name, tmp_path, small_tiles, monkeypatch):
    """N x V numbers in a trainer's step, in an entropy bonus, say: TRL's own kernel makes them of this V."""
    monkeypatch.setattr(workspace, "_LARGEST_KEPT", 0)  # a block that is allocated for its size alone
    make, options = RUNS[name]
    model = tiny.gemma2(vocab_size=V)
    logits = largest_allocation(make(copy.deepcopy(model), tmp_path, **options).train)
    integration.install()
    try:
        largest = largest_allocation(make(model, tmp_path, **options).train)
    finally:
        integration.uninstall()
    assert largest <= model.lm_head.weight.nbytes < logits / 4


# The seam.


def test_trl_has_not_moved():
    """TRL's private names are not as `install` needs them. The failure says what moved."""
    assert integration._moved() == [], f"trl {trl.__version__}"


def test_uninstall_gives_trls_objects_back():
    """A second install that takes Tightrope's kernel for TRL's, or an uninstall that leaves something."""
    before = dict(vars(utils))
    integration.uninstall()
    integration.install()
    integration.install()
    assert integration.installed()
    changed = {name for name, value in vars(utils).items() if before[name] is not value}
    assert changed == {"_ChunkedLogProbFunction", "_use_triton"}
    integration.uninstall()
    assert not integration.installed()
    assert vars(utils) == before


class OtherKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets):
        return hidden


def other_head(model, temperature=1.0, cast_lm_head_to_fp32=False, outputs=()):
    return OtherKernel.apply


MOVES = {
    "kernel": (
        "_ChunkedLogProbFunction",
        OtherKernel,
        "(hidden, weight, targets), expected (hidden, weight, bias",
    ),
    "no_kernel": (
        "_ChunkedLogProbFunction",
        None,
        "looks up (_use_triton), expected (_ChunkedLogProbFunction",
    ),
    "head": ("add_fused_lm_head", other_head, "looks up (), expected (_ChunkedLogProbFunction, _use_triton)"),
    "arguments": ("add_fused_lm_head", lambda model: None, "takes (model), expected (model, temperature"),
    "output": ("FusedCausalLMOutput", dict, "FusedCausalLMOutput has (), expected (loss, log_probs"),
}


@pytest.mark.parametrize("name", MOVES)
def test_a_moved_seam_is_an_error_that_says_so(name, monkeypatch):
    """A kernel put where TRL does not call it any more, or calls it otherwise."""
    attribute, value, said = MOVES[name]
    if value is None:
        monkeypatch.delattr(utils, attribute)
    else:
        monkeypatch.setattr(utils, attribute, value)
    before = dict(vars(utils))
    with pytest.raises(RuntimeError, match=re.escape(said)) as error:
        integration.install()
    assert f"trl {trl.__version__}" in str(error.value)
    assert vars(utils) == before and not integration.installed()
