"""Sizes that two cores go through in a minute, and the tensors that the benchmarks share.

pytest benchmarks --benchmark-json=before.json         # at one commit
pytest benchmarks --benchmark-compare=before.json      # at another
"""

import pytest
import torch

ROWS, DIM, VOCAB = 512, 256, 16384


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def logits() -> torch.Tensor:
    """[N, V] float32; peaked in a tenth of the rows, as a trained model's are."""
    logits = torch.randn(ROWS, VOCAB, generator=_generator())
    logits[::10] *= 8
    return logits


@pytest.fixture(scope="session")
def target() -> torch.Tensor:
    return torch.randint(VOCAB, (ROWS,), generator=_generator())


@pytest.fixture(scope="session")
def head() -> torch.Tensor:
    return torch.randn(VOCAB, DIM, generator=_generator()) * DIM**-0.5


@pytest.fixture(scope="session")
def hidden() -> torch.Tensor:
    return torch.randn(ROWS, DIM, generator=_generator())
