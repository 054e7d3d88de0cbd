"""tightrope.EntropyTarget: its rules against hand arithmetic and TRL's own code, and what it steers.

TRL's rule stands in the middle of a method that takes a whole trainer to call. So its statements are cut out
of the source of the installed version and run on a stand-in for the trainer: where TRL changes them, the test
that compares with them finds other statements, or none.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tightrope
from tightrope import BalanceWarning, Classes, EntropyTarget, MinP, RowStats, losses

F64 = torch.float64
VOCAB = 49152


def stats_of(entropy, counted=None, collision=None, support_entropy=None):
    """Statistics of tokens that have these entropies; those that are not counted are ignored ones."""
    entropy = torch.as_tensor(entropy, dtype=F64)
    counted = torch.ones_like(entropy, dtype=torch.bool) if counted is None else torch.as_tensor(counted)
    zeros = torch.zeros_like(entropy)
    fields = dict.fromkeys(RowStats._fields[:10], zeros)
    fields.update(entropy=entropy * counted, argmax=torch.where(counted, 3, -1))
    if collision is not None:
        fields["collision"] = torch.as_tensor(collision, dtype=F64) * counted
    if support_entropy is not None:
        fields["support_entropy"] = torch.as_tensor(support_entropy, dtype=F64) * counted
    return RowStats(**fields)


def balance_of(coefficient):
    return coefficient / (1 + coefficient)


def test_dual_ascent_by_hand():
    """A wrong sign or rate, a clip that is missing, or a balance that is not lam / (1 + lam)."""
    steered = EntropyTarget(2.0, rate=0.1, bounds=(0.0, 0.2))
    assert steered.balance == steered.coefficient == 0.0 and steered.entropy is None
    assert steered.update(1.5) == pytest.approx(balance_of(0.05), rel=1e-12)
    assert steered.coefficient == pytest.approx(0.05, rel=1e-12) and steered.entropy == 1.5
    assert steered.update(2.2) == pytest.approx(balance_of(0.03), rel=1e-12)
    assert steered.update(9.0) == 0.0 and steered.coefficient == 0.0
    assert steered.update(-9.0) == 0.2 and steered.coefficient == 0.25
    assert steered.update(2.0) == 0.2


def test_step_by_hand():
    """A step that is not fixed, a bonus above the target, or one before any entropy is known."""
    steered = EntropyTarget(2.0, rule="step", rate=0.05, bounds=(0.0, 0.2), balance=0.1)
    start = 0.1 / 0.9
    assert steered.balance == 0.0 and steered.coefficient == pytest.approx(start, rel=1e-12)
    assert steered.update(2.0) == pytest.approx(balance_of(start + 0.05), rel=1e-12)
    assert steered.update(2.1) == 0.0 and steered.coefficient == pytest.approx(start, rel=1e-12)
    assert steered.update(0.1) == pytest.approx(balance_of(start + 0.05), rel=1e-12)
    for _ in range(4):
        steered.update(0.1)
    assert steered.balance == 0.2 and steered.coefficient == 0.25


def statements_of_trl():
    """TRL's code that applies the adaptive coefficient, and that which updates it."""
    spec = importlib.util.find_spec("trl")
    if spec is None:
        pytest.skip("trl is not installed")
    tree = ast.parse(Path(spec.origin).with_name("trainer").joinpath("grpo_trainer.py").read_text("utf-8"))
    applied, updated = [], []
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "self.use_adaptive_entropy" in (test := ast.unparse(node.test)):
            if "apply_coef" in ast.unparse(node.body[0]):
                applied.append(node)
            elif "mode == 'train'" in test:
                updated.append(node)
    assert len(applied) == len(updated) == 1, "TRL's adaptive entropy has moved"
    return [compile(ast.Module([node], []), "trl", "exec") for node in (*applied, *updated)]


def test_step_is_that_of_trl():
    """A coefficient or a gate that is not TRL's, also over micro-batches with masked tokens."""
    apply, update = statements_of_trl()
    args = SimpleNamespace(
        entropy_target=1.0, entropy_coef_min=0.0, entropy_coef_max=1.0, entropy_coef_delta=0.3
    )
    accelerator = SimpleNamespace(sync_gradients=False, reduce=lambda tensor, reduction: tensor)
    trainer = SimpleNamespace(
        use_adaptive_entropy=True,
        entropy_coef=0.25,
        args=args,
        accelerator=accelerator,
        _last_world_entropy=math.inf,
        _entropy_window_stats=None,
    )
    steered = EntropyTarget(1.0, rule="step", rate=0.3, bounds=(0.0, 0.5), balance=0.2)
    generator = torch.Generator().manual_seed(0)
    seen = set()
    # Rising and falling, so that both bounds and both sides of the target are met.
    for level in [0.5, 1.6, 0.4, 0.4, 0.4, 0.4, 1.5, 1.5, 1.5, 1.5, 0.6]:
        names = {"self": trainer, "mode": "train", "torch": torch}
        exec(apply, names)
        assert steered.balance == balance_of(names["apply_coef"])
        for micro_batch in range(3):
            names["entropies"] = torch.rand(2, 5, generator=generator, dtype=F64) * 0.2 + level
            mask = torch.rand(2, 5, generator=generator) < 0.7
            names["effective_mask"] = mask.to(F64)
            accelerator.sync_gradients = micro_batch == 2
            exec(update, names)
            steered.observe(stats_of(names["entropies"], mask))
        steered.update()
        assert steered.coefficient == trainer.entropy_coef
        assert steered.entropy == pytest.approx(trainer._last_world_entropy, rel=1e-12)
        seen.add(trainer.entropy_coef)
    assert {0.0, 1.0} < seen


@pytest.mark.parametrize(
    ("creativity", "options", "cliff"),
    [
        ("entropy", {"vocab_size": VOCAB}, 1 / (1 + math.log(VOCAB))),
        ("collision", {}, 1 / 3),
        ("support_entropy", {}, 1 / (1 + math.log(50))),
        ("support_entropy", {"support": MinP(0.05)}, 1 / (1 + math.log(20))),
        ("support_entropy", {"support": Classes(torch.arange(8).reshape(2, 4))}, 1 / (1 + math.log(4))),
    ],
)
def test_default_bounds_end_short_of_the_cliff(creativity, options, cliff):
    """A default bound at which the loss's best model is noise, or that is none."""
    steered = EntropyTarget(5.0, rate=1.0, creativity=creativity, **options)
    assert steered.bounds == (0.0, pytest.approx(0.75 * cliff, rel=1e-12))
    assert 0.75 * cliff * (1 - 1e-12) < steered.update(0.1) <= steered.bounds[1]


def test_the_default_bound_is_not_warned_of(monkeypatch):
    """A controller at its bound whose loss then warns of the balance."""
    monkeypatch.setattr(losses, "_warned", set())
    upper = EntropyTarget(1.0, creativity="collision").bounds[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error", BalanceWarning)
        tightrope.reality_creativity_loss(
            torch.zeros(2, 5), torch.tensor([1, 2]), balance=upper, creativity="collision"
        )


def test_each_token_counts_once():
    """A mean of means, or one that counts ignored tokens."""
    steered = EntropyTarget(2.0, rate=0.1, bounds=(0.0, 0.5))
    steered.observe(stats_of([[1.0, 2.0, 7.0]], [[True, True, False]]))
    steered.observe(torch.tensor(4.0, requires_grad=True), 3)
    steered.observe(0.5, torch.tensor(1))
    steered.observe(math.nan, 0)
    steered.observe(torch.tensor(math.nan), torch.tensor(0))
    steered.update(stats_of([1.0]))
    assert steered.entropy == pytest.approx((1 + 2 + 12 + 0.5 + 1) / 7, rel=1e-12)
    steered.update(1.0)
    assert steered.entropy == 1.0  # nothing is left of the step before


def test_the_statistic_is_that_of_the_creativity():
    """A balance of one creativity that is steered by another, and logs of the collision of ignored tokens."""
    told = stats_of([3.0, 5.0], [True, False], collision=[0.25, 9.0], support_entropy=[0.75, 9.0])

    def seen(creativity, statistic=None):
        steered = EntropyTarget(1.0, creativity=creativity, vocab_size=9, statistic=statistic)
        steered.update(told)
        return steered.entropy

    assert seen("entropy") == 3.0
    assert seen("support_entropy") == 0.75
    assert seen("collision") == pytest.approx(math.log(4), rel=1e-12)
    assert seen("support_entropy", "entropy") == 3.0


def test_nothing_moves_without_tokens_or_with_a_mean_that_is_not_finite():
    """A balance that becomes NaN for good, or that drifts in steps without tokens."""
    steered = EntropyTarget(2.0, bounds=(0.0, 0.5), balance=0.25)
    assert steered.update() == steered.update(stats_of([1.0], [False])) == 0.25
    for broken in (math.nan, math.inf):
        with pytest.warns(RuntimeWarning, match=r"got a mean entropy of .* expected a finite one"):
            assert steered.update(broken) == 0.25
    assert steered.entropy is None
    assert steered.update(2.0) == 0.25


def test_state_round_trip_through_json():
    """A state that lacks what the rule needs, or that a checkpoint changes."""
    there = EntropyTarget(2.0, rule="step", rate=0.01, bounds=(0.0, 0.3), balance=0.1)
    for entropy in (1.1, 2.3, 1.7):
        there.update(entropy)
    here = EntropyTarget(2.0, rule="step", rate=0.01, bounds=(0.0, 0.3))
    here.observe(1e3)
    here.load_state_dict(json.loads(json.dumps(there.state_dict())))
    for entropy in (1.9, 1.1, 2.1, 0.3):
        assert (here.balance, here.coefficient) == (there.balance, there.coefficient)
        assert here.update(entropy) == there.update(entropy)
    tighter = EntropyTarget(2.0, bounds=(0.0, 0.01))
    tighter.load_state_dict(there.state_dict())
    assert tighter.balance == 0.01


def steer(rank, rule):
    """Balances and coefficients of a rank that has tokens of its own, in one step none."""
    steered = EntropyTarget(1.5, rule=rule, rate=0.1, bounds=(0.0, 0.5), balance=0.2)
    moves = []
    for step in range(6):
        for tokens in tokens_of(rank, step):
            steered.observe(stats_of(tokens))
        moves.append((steered.update(), steered.coefficient, steered.entropy))
    return moves


def tokens_of(rank, step):
    """Entropies of the tokens of each micro-batch of a rank: ever more on rank 1, which starts with none."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    sizes = (4, 2) if rank == 0 else (step,) * (step > 0)
    return [torch.rand(size, generator=generator, dtype=F64) * 3 for size in sizes]


@pytest.mark.parametrize("rule", ["dual", "step"])
def test_ranks_have_one_balance(ranks, rule):
    """Ranks whose balances part, a mean of the ranks' means, or a rank without tokens that is waited for."""
    first, second = ranks(2).run(steer, rule)
    alone = EntropyTarget(1.5, rule=rule, rate=0.1, bounds=(0.0, 0.5), balance=0.2)
    for step, move in enumerate(first):
        alone.update(stats_of(torch.cat([*tokens_of(0, step), *tokens_of(1, step)])))
        assert move == pytest.approx((alone.balance, alone.coefficient, alone.entropy), rel=1e-12)
    assert first == second
    assert len({coefficient for _, coefficient, _ in first}) > 2


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("rule", "creativity", "tolerance"),
    [
        ("dual", "entropy", 1e-3),
        ("dual", "collision", 1e-3),
        ("dual", "support_entropy", 1e-3),
        ("step", "entropy", 0.03),
        ("step", "support_entropy", 0.03),
    ],
)
def test_a_model_comes_to_the_target(rule, creativity, tolerance):
    """A loop that runs away from the target, rests beside it, or steers another statistic than it should."""
    truth = torch.randn(1, 12, generator=torch.Generator().manual_seed(0), dtype=F64).mul(2).softmax(-1)
    logits = truth.log().requires_grad_()
    options = {"creativity": creativity, "support": MinP(0.02)}
    plain = tightrope.vocab_stats(logits.detach(), support=MinP(0.02))
    open_by = {"entropy": plain.entropy, "collision": -plain.collision.log()}
    start = open_by.get(creativity, plain.support_entropy).item()
    steered = EntropyTarget(start + 0.1, rule=rule, creativity=creativity, vocab_size=12, rate=0.01)
    optimizer = torch.optim.SGD([logits], lr=1.0)
    means = []
    for _ in range(1200):
        optimizer.zero_grad()
        loss, stats = tightrope.reality_creativity_loss(
            logits, truth, balance=steered.balance, return_stats=True, **options
        )
        loss.backward()
        optimizer.step()
        steered.update(stats)
        means.append(steered.entropy)
    assert means[0] == pytest.approx(start, abs=1e-9)
    assert sum(means[-200:]) / 200 == pytest.approx(start + 0.1, abs=tolerance)
    assert 0.0 < steered.coefficient < steered.bounds[1] / (1 - steered.bounds[1])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"target": 0.0}, ValueError, "target: got 0.0, expected a finite number above 0"),
        ({"target": "high"}, TypeError, "target: got str"),
        ({"rule": "pid"}, ValueError, "rule: got 'pid', expected one of 'dual', 'step'"),
        ({"rate": -1.0}, ValueError, "rate: got -1.0"),
        ({"creativity": "noise"}, ValueError, "creativity: got 'noise'"),
        ({"statistic": "lse"}, ValueError, "statistic: got 'lse'"),
        ({"vocab_size": None}, ValueError, "vocab_size: got None, expected V"),
        ({"vocab_size": 9.5}, TypeError, "vocab_size: got float"),
        ({"support": MinP(0.1)}, ValueError, 'support: got MinP.* expected creativity="support_entropy"'),
        ({"creativity": "support_entropy", "support": MinP(2.0)}, ValueError, "support.x: got 2.0"),
        ({"creativity": "support_entropy", "support": Classes([1])}, TypeError, "support.indices: got list"),
        ({"creativity": "support_entropy", "support": 0.1}, TypeError, "support: got float"),
        ({"bounds": 0.1}, TypeError, "bounds: got 0.1, expected two balances"),
        ({"bounds": (0.2, 0.1)}, ValueError, r"bounds: got \(0.2, 0.1\), expected 0 <= low <= high < 1"),
        ({"bounds": (0.0, 1.0)}, ValueError, r"bounds: got \(0, 1\)"),
        ({"bounds": (-0.1, 0.5)}, ValueError, r"bounds\[0\]: got -0.1"),
        ({"balance": 0.3}, ValueError, "balance: got 0.3, expected one within the bounds, 0 to 0.06"),
    ],
)
def test_arguments_are_refused(arguments, error, words):
    """An argument that is taken for another, or an error that names neither it nor what it should be."""
    with pytest.raises(error, match=words):
        EntropyTarget(**{"target": 2.0, "vocab_size": VOCAB, **arguments})


def test_what_is_observed_is_checked():
    """Entropies of tokens taken for their mean, a statistic that is not there, a mean of minus one tokens."""
    steered = EntropyTarget(2.0, vocab_size=9)
    with pytest.raises(TypeError, match=r"stats: got a tensor of shape \[3\], expected a number"):
        steered.update(torch.ones(3))
    with pytest.raises(TypeError, match="stats: got str"):
        steered.observe("2.0")
    with pytest.raises(TypeError, match="count: got NoneType"):
        steered.observe(2.0, None)
    with pytest.raises(ValueError, match="count: got -1"):
        steered.observe(2.0, -1)
    of_set = EntropyTarget(2.0, creativity="support_entropy")
    with pytest.raises(
        ValueError, match="stats: got no support_entropy, expected those of a loss with support"
    ):
        of_set.observe(stats_of([1.0]))
    assert steered.update() == 0.0 and steered.entropy is None


@pytest.mark.parametrize(
    ("state", "error", "words"),
    [
        ([0.1], TypeError, "state: got list"),
        ({"coefficient": 0.1}, ValueError, "state: got coefficient, expected coefficient and entropy"),
        ({"coefficient": -0.1, "entropy": 1.0}, ValueError, "state.coefficient: got -0.1"),
        ({"coefficient": math.nan, "entropy": 1.0}, ValueError, "state.coefficient: got nan"),
        ({"coefficient": 0.1, "entropy": "low"}, TypeError, "state.entropy: got str"),
    ],
)
def test_a_state_is_checked_before_it_is_taken(state, error, words):
    """A broken checkpoint that is taken, or half of it."""
    steered = EntropyTarget(2.0, bounds=(0.0, 0.5), balance=0.2)
    with pytest.raises(error, match=words):
        steered.load_state_dict(state)
    assert steered.state_dict() == {"coefficient": pytest.approx(0.25), "entropy": None}


def test_repr_says_what_it_does():
    """A repr without what was chosen."""
    shown = repr(EntropyTarget(2.5, vocab_size=VOCAB, rule="step", balance=0.02))
    assert shown == (
        "EntropyTarget(2.5, rule='step', rate=0.005, bounds=(0, 0.06354), statistic='entropy', balance=0)"
    )
