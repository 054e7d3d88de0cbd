"""What transformers' and accelerate's trainers leave behind in a process does not reach the next test."""

import os
import sys

import pytest


@pytest.fixture(autouse=True)
def _restore_accelerate():
    """TrainingArguments write to the environment, and accelerate keeps the first state that it had."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
