"""`tightrope.evaluation`: figures beside dense float64 logits, and the comparison with temperature."""

import math
import re
from pathlib import Path

import pytest
import torch

from tightrope import evaluation
from tightrope.evaluation import BEATEN, Curve, Head, Row, Subject

F64 = torch.float64
TEMPERATURES, MIN_PS = (0.7, 1.0, 1.6), (0.02, 0.3)


def subject(seed, windows=4, length=9, vocab=400, width=16, scale=0.6, **head):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(windows, length, width, generator=draw)
    weight = scale * torch.randn(vocab, width, generator=draw)
    return Subject(hidden, Head(weight, torch.randn(vocab, generator=draw), **head))


def tokens(windows=4, length=9, vocab=400):
    return torch.randint(vocab, (windows, length), generator=torch.Generator().manual_seed(9))


def dense(one):
    """The logits that predict, [W, L - 1, V] float64, written out."""
    head = one.head
    z = head.logit_scale * (one.hidden[:, :-1].to(F64) @ head.weight.to(F64).T + head.bias.to(F64))
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def dense_nucleus(judge, mass=0.999):
    p = dense(judge).softmax(-1)
    order = p.argsort(-1, descending=True)
    keep = torch.zeros_like(p, dtype=torch.bool)
    for w, t in torch.cartesian_prod(torch.arange(p.shape[0]), torch.arange(p.shape[1])).tolist():
        held = 0.0
        for j in order[w, t].tolist():
            if held >= mass:
                break
            keep[w, t, j] = True
            held += p[w, t, j].item()
    return keep


@pytest.fixture(params=[{}, {"softcap": 5.0, "logit_scale": 0.5}], ids=["plain head", "softcap and scale"])
def pair(request):
    return subject(1, **request.param), subject(2, scale=0.8)


def test_figures_are_those_of_dense_float64_logits(pair):
    model, judge = pair
    windows = tokens()
    rows = evaluation.evaluate({"m": model}, windows, judge, temperatures=TEMPERATURES, min_ps=MIN_PS)
    keep, z, target = dense_nucleus(judge), dense(model), windows[:, 1:]
    assert [(r.temperature, r.min_p) for r in rows] == [(t, None) for t in TEMPERATURES] + [
        (1.0, x) for x in MIN_PS
    ]
    for row in rows:
        log_p = (z / row.temperature).log_softmax(-1)
        kept_mass = torch.tensor(1.0)
        if row.min_p is not None:
            kept = log_p >= log_p.amax(-1, keepdim=True) + math.log(row.min_p)
            kept_mass = (log_p.exp() * kept).sum(-1)
            log_p = log_p.masked_fill(~kept, -torch.inf).log_softmax(-1)
            assert row.cross_entropy is None and row.cross_entropy_error is None
        else:
            truth = -log_p.gather(-1, target[..., None]).squeeze(-1)
            assert row.cross_entropy == pytest.approx(truth.mean().item(), rel=1e-5)
            error = truth.mean(1).std().item() / 2
            assert row.cross_entropy_error == pytest.approx(error, rel=1e-4)
        p = log_p.exp()
        entropy = -torch.special.xlogy(p, p).sum(-1).mean().item()
        assert row.entropy == pytest.approx(entropy, rel=1e-5)
        assert row.kept_mass == pytest.approx(kept_mass.mean().item(), rel=1e-5)
        assert row.implausible_mass == pytest.approx((p * ~keep).sum(-1).mean().item(), rel=1e-4)
        assert row.top1_accuracy == pytest.approx((z.argmax(-1) == target).double().mean().item())
        assert row.tokens == target.numel()


def test_a_judge_finds_a_thousandth_of_its_own_mass_implausible():
    judge = subject(2)
    (row,) = evaluation.evaluate({"m": judge}, tokens(), judge, temperatures=[1.0], min_ps=[])
    assert 0 < row.implausible_mass <= 0.001


def test_the_size_of_chunks_and_batches_changes_nothing(monkeypatch):
    from tightrope.evaluation import subject as module

    judge, windows = subject(2), tokens()
    states = subject(1)
    calls = []

    def hidden(batch):
        calls.append(len(batch))
        start = sum(calls) - len(batch)
        return states.hidden[start : start + len(batch)]

    expected = evaluation.evaluate({"m": states}, windows, judge)
    monkeypatch.setattr(module, "CHUNK_LOGITS", 400 * 5)  # five rows of logits at a time
    one = Subject(hidden, states.head)
    found = list(evaluation.sweep("m", one, windows, evaluation.nuclei(judge, windows), batch_size=3))
    assert calls == [3, 1]
    for ours, theirs in zip(found, expected):
        for a, b in zip(ours, theirs):
            assert a == b if a is None or isinstance(a, str) else a == pytest.approx(b, rel=1e-5)


def test_no_more_logits_at_a_time_than_said(monkeypatch):
    """Sorting all of a text's logits at once."""
    from tightrope.evaluation import subject as module

    monkeypatch.setattr(module, "CHUNK_LOGITS", 400 * 5)
    seen = []
    logits = Head.logits
    monkeypatch.setattr(Head, "logits", lambda head, h: seen.append(len(h)) or logits(head, h))
    evaluation.evaluate({"m": subject(1)}, tokens(), subject(2))
    assert max(seen) == 5


def test_a_window_alone_has_no_error():
    (row,) = evaluation.evaluate(
        {"m": subject(1, windows=1)}, tokens(1), subject(2, windows=1), temperatures=[1.0], min_ps=[]
    )
    assert row.cross_entropy_error is row.entropy_error is row.implausible_mass_error is None


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Llama", {}),
        ("GPT2", {}),
        ("Gemma2", {"final_logit_softcapping": 3.0, "head_dim": 8}),
        ("Cohere", {"logit_scale": 0.25}),
        ("Granite", {"logits_scaling": 4.0}),
    ],
)
def test_models_of_transformers_in_a_notebook(kind, options):
    """Their softcaps and scales, and the figures beside those of their own logits."""
    pytest.importorskip("transformers")
    from tiny_models import make_model

    model, judge = (make_model(kind, seed=s, initializer_range=0.3, **options) for s in (1, 2))
    windows = tokens(3, 12, 300)
    rows = evaluation.evaluate(
        {"plain": judge, "m": model}, windows, judge, temperatures=[1.0, 2.0], min_ps=[]
    )
    assert len(rows) == 4
    with torch.no_grad():
        z, zj = (m(windows).logits[:, :-1].to(F64) for m in (model, judge))
    keep = dense_nucleus_of(zj)
    for row in rows[2:]:
        log_p = (z / row.temperature).log_softmax(-1)
        truth = -log_p.gather(-1, windows[:, 1:, None]).mean().item()
        assert row.cross_entropy == pytest.approx(truth, rel=1e-4)
        assert row.entropy == pytest.approx(-(log_p.exp() * log_p).sum(-1).mean().item(), rel=1e-4)
        implausible = (log_p.exp() * ~keep).sum(-1).mean().item()
        assert row.implausible_mass == pytest.approx(implausible, rel=1e-2, abs=1e-6)
    assert [c.model for c in evaluation.compare(rows, "plain")] == ["m"]


def dense_nucleus_of(z, mass=0.999):
    p, order = z.softmax(-1).sort(-1, descending=True)
    return torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, p.cumsum(-1) - p < mass)


def test_a_model_that_changes_its_logits_is_an_error():
    """Figures of another model, without a word."""
    pytest.importorskip("transformers")
    from tiny_models import make_model

    model = make_model()
    head = model.lm_head
    model.lm_head = torch.nn.Sequential(head, torch.nn.Softplus())
    model.lm_head.weight = head.weight
    with pytest.raises(ValueError, match="logits of LlamaForCausalLM are not its head"):
        evaluation.evaluate({"m": model}, tokens(vocab=300), make_model())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"windows": tokens().float()}, TypeError, r"windows: got torch.float32, expected"),
        ({"windows": [[1, 2]]}, TypeError, r"windows: got list, expected"),
        ({"windows": tokens()[0]}, ValueError, r"windows: got shape \(9,\)"),
        ({"windows": tokens()[:, :1]}, ValueError, r"windows: got shape \(4, 1\)"),
        ({"temperatures": [0.0]}, ValueError, r"temperatures: got 0.0, expected positive"),
        ({"temperatures": [math.nan]}, ValueError, "temperatures: got nan"),
        ({"min_ps": [1.5]}, ValueError, r"min_ps: got 1.5, expected"),
        ({"models": {}}, ValueError, "models: got none"),
        ({"models": {"m": "a name"}}, TypeError, "model: got str, expected a causal"),
        ({"models": {"m": subject(1, vocab=300)}}, ValueError, "m: its head has 300 classes, .* 400"),
    ],
)
def test_bad_arguments(changes, error, message):
    arguments = {"models": {"m": subject(1)}, "windows": tokens(), "judge": subject(2)} | changes
    with pytest.raises(error, match=message):
        evaluation.evaluate(**arguments)


def test_nuclei_of_another_text_are_an_error():
    sets = evaluation.nuclei(subject(2), tokens())
    with pytest.raises(ValueError, match="got 32 sets, expected one for each of 16 tokens"):
        next(evaluation.sweep("m", subject(1, windows=2), tokens(2), sets))


def point(entropy, cross_entropy, implausible, model="plain", temperature=1.0, min_p=None):
    return Row(
        model, temperature, min_p, cross_entropy, entropy, implausible, 0.5, 1.0, None, None, None, 100
    )


CURVE = [point(4.0, 3.0, 0.01, temperature=1.2), point(2.0, 2.0, 0.0001, temperature=0.8)]


def test_a_curve_between_two_temperatures():
    middle = Curve(CURVE).at(3.0)
    assert middle.temperature == pytest.approx(1.0)
    assert middle.cross_entropy == pytest.approx(2.5)
    assert middle.implausible_mass == pytest.approx(0.001), "its logarithm is what is linear"
    assert Curve(CURVE).at(4.0).cross_entropy == 3.0 and Curve(CURVE).at(2.0).cross_entropy == 2.0
    assert Curve(CURVE).at(1.9) is None and Curve(CURVE).at(4.1) is None
    assert Curve([*CURVE, point(3.0, None, 0.5, min_p=0.1)]).at(3.0) == middle
    empty = [point(2.0, 2.0, 0.0), point(4.0, 3.0, 0.01)]
    assert Curve(empty).at(3.0).implausible_mass == pytest.approx(0.005), "no logarithm of 0"


def test_a_curve_that_bends():
    """A chord, by which a mode that is temperature itself gains on temperature."""
    model, judge = subject(1), subject(2)
    options = {"min_ps": [], "temperatures": (0.8, 0.9, 1.0, 1.1, 1.2, 1.3)}
    rows = evaluation.evaluate({"plain": model}, tokens(), judge, **options)
    (exact,) = evaluation.evaluate({"m": model}, tokens(), judge, min_ps=[], temperatures=[1.05])
    found = Curve(rows).at(exact.entropy)
    assert found.temperature == pytest.approx(1.05, abs=2e-4)
    assert found.cross_entropy == pytest.approx(exact.cross_entropy, abs=2e-4)
    assert found.implausible_mass == pytest.approx(exact.implausible_mass, rel=1e-3)


@pytest.mark.parametrize(
    ("cross_entropy", "implausible", "verdict"),
    [
        (2.6, 0.002, BEATEN),
        (2.4, 0.0005, "better than temperature on both"),
        (2.6, 0.0005, "fewer implausible, for 0.100 nats"),
        (2.4, 0.002, "truer, and more implausible"),
    ],
)
def test_verdicts(cross_entropy, implausible, verdict):
    (line,) = evaluation.compare([*CURVE, point(3.0, cross_entropy, implausible, "m")], "plain")
    assert line.verdict == verdict
    assert line.cross_entropy_difference == pytest.approx(cross_entropy - 2.5)
    assert line.implausible_ratio == pytest.approx(implausible / 0.001)


def test_a_model_beyond_the_plain_models_temperatures():
    (line,) = evaluation.compare([*CURVE, point(5.0, 2.6, 0.1, "m")], "plain")
    assert line.plain_temperature is line.implausible_ratio is line.cross_entropy_difference is None
    assert "no plain temperature" in line.verdict


def test_a_comparison_without_the_plain_model():
    with pytest.raises(ValueError, match=r"plain: got 'other', expected one of \['plain'\]"):
        evaluation.compare(CURVE, "other")


def test_perplexity_is_of_the_continuation():
    judge = subject(2)
    windows = tokens()
    log_p = dense(judge).log_softmax(-1).gather(-1, windows[:, 1:, None]).squeeze(-1)[:, 2:]
    assert evaluation.perplexity(judge, windows, 3) == pytest.approx((-log_p.mean()).exp().item(), rel=1e-5)


def test_the_notebook_of_the_docs(capsys):
    pytest.importorskip("transformers")
    page = (Path(__file__).parents[1] / "docs" / "evaluate.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(code, {})
    assert "other" in capsys.readouterr().out
