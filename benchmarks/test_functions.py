"""The public functions, forward and backward where they have one, at [512, 256] x [16384, 256] float32."""

import pytest
import torch

import tightrope


@pytest.fixture
def leaves(hidden, head):
    return hidden.clone().requires_grad_(), head.clone().requires_grad_()


def _step(loss_of, leaves):
    def step():
        for leaf in leaves:
            leaf.grad = None
        loss = loss_of(*leaves)
        loss.backward()
        return loss

    return step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("strategy", ["chunked", "streaming"])
def test_linear_loss(benchmark, strategy, dtype, hidden, head, target):
    benchmark.group = "linear_reality_creativity_loss"
    leaves = [t.to(dtype).requires_grad_() for t in (hidden, head)]
    loss = benchmark(
        _step(
            lambda h, w: tightrope.linear_reality_creativity_loss(
                h, w, target, balance=0.1, strategy=strategy
            ),
            leaves,
        )
    )
    assert loss.isfinite()


@pytest.mark.parametrize("reality", ["cross_entropy", "squared_error"])
def test_loss_of_logits(benchmark, reality, logits, target):
    benchmark.group = "reality_creativity_loss"
    leaf = logits.clone().requires_grad_()
    loss = benchmark(
        _step(lambda z: tightrope.reality_creativity_loss(z, target, balance=0.1, reality=reality), [leaf])
    )
    assert loss.isfinite()


def test_top_k_target(benchmark, leaves, target):
    benchmark.group = "linear_reality_creativity_loss"
    indices = torch.stack([(target + 257 * k) % len(leaves[1]) for k in range(64)], -1)
    top = tightrope.TopKTarget(indices, torch.full(indices.shape, 1 / 64))
    loss = benchmark(
        _step(lambda h, w: tightrope.linear_reality_creativity_loss(h, w, top, balance=0.1), leaves)
    )
    assert loss.isfinite()


def test_statistics(benchmark, leaves, target):
    benchmark.group = "linear_vocab_stats"

    def policy_loss(h, w):
        stats = tightrope.linear_vocab_stats(h, w, target)
        return -(stats.target_log_prob + 0.01 * stats.entropy).sum()

    assert benchmark(_step(policy_loss, leaves)).isfinite()


def test_statistics_without_gradients(benchmark, hidden, head, target):
    benchmark.group = "linear_vocab_stats"
    stats = benchmark(tightrope.linear_vocab_stats, hidden, head, target)
    assert stats.lse.isfinite().all()


def test_custom_loss(benchmark, leaves, target):
    benchmark.group = "linear_vocab_loss"

    def focal(stats):
        ce = -stats.target_log_prob
        return (1 - (-ce).exp()) ** 2 * ce

    loss = benchmark(_step(lambda h, w: tightrope.linear_vocab_loss(h, w, target, focal), leaves))
    assert loss.isfinite()
