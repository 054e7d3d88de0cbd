"""A fused model under torch.compile: one graph, whatever its balance is, and the same as without.

Graphs are counted and run by a backend that compiles nothing: what is tested is what can be traced.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported

import pytest
import tiny
import torch
import torch.nn.functional as F
from tiny import VOCAB
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import Trainer, TrainingArguments

from tightrope.integrations import fuse

pytestmark = [
    pytest.mark.one_in(4),
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore:.*should not be instantiated:DeprecationWarning"
    ),  # the compiler's own
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # and of torch 2.11
]


@pytest.fixture
def counter():
    """What counts and differentiates graphs."""
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


def llama():
    """One layer of it, as tracing takes its time."""
    return tiny.lively(tiny.llama(num_hidden_layers=1))


def inputs():
    return {**tiny.batch(), "use_cache": False}


def step(call, model, **more):
    """Loss and gradients of a model by way of what calls it."""
    model.zero_grad()
    loss = call(**inputs(), **more).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def close(compiled, handle, reference):
    """Whether a step of a fused model that is compiled is the reference's."""
    return tiny.off(step(compiled, handle.model), step(reference, reference)) < 1e-5


def test_one_graph(counter):
    """A break, which costs time at each step; a balance that stays as it was traced, or costs a graph."""
    handle, reference = fuse(llama()), fuse(llama())
    compiled = torch.compile(handle.model, backend=counter, fullgraph=True)
    graphs = []
    for balance in (0.05, 0.08, 0.0, 1):
        handle.balance = reference.balance = balance
        handle.stats = None
        assert close(compiled, handle, reference.model)
        torch.testing.assert_close(handle.stats.entropy, reference.stats.entropy)
        assert torch.equal(handle.stats.argmax, reference.stats.argmax)
        graphs.append(counter.frame_count)
    for count in (torch.tensor(0), torch.tensor(17), torch.tensor(23)):
        actual, expected = (m(**inputs(), num_items_in_batch=count).loss for m in (compiled, reference.model))
        torch.testing.assert_close(actual, expected)
        graphs.append(counter.frame_count)
    assert len(set(graphs[:4])) == len(set(graphs[4:])) == 1
    assert handle.materialized == []


def test_a_number_for_one_call(counter):
    """A number beside the labels that stays as it was traced, or cannot be traced at its second value."""
    handle, reference = fuse(llama()), fuse(llama())
    compiled = torch.compile(handle.model, backend=counter, fullgraph=True)
    for balance in (0.05, 0.08, 0.02, 0.07):
        reference.balance = balance
        actual, expected = (
            step(compiled, handle.model, balance=balance),
            step(reference.model, reference.model),
        )
        assert tiny.off(actual, expected) < 1e-5


def test_balances_of_tokens(counter):
    """Balances that stay as they were traced, or cost a graph for each step."""
    each = torch.linspace(0, 0.1, 45).view(5, 9)
    handle, reference = fuse(llama(), each), fuse(llama(), each)
    compiled = torch.compile(handle.model, backend=counter, fullgraph=True)
    graphs = []
    for balance in (each, each.flip(0)):
        handle.balance = reference.balance = balance
        assert close(compiled, handle, reference.model)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1]


def test_evaluation(counter):
    """Logits that are no tensors where there is no loss, or where they are all that is wanted."""
    plain, handle = llama(), fuse(llama())
    compiled = torch.compile(handle.model, backend=counter, fullgraph=True)
    expected = plain(**inputs())
    with torch.no_grad():
        output = compiled(**inputs())
    torch.testing.assert_close(output.loss, expected.loss)
    assert isinstance(output.logits, torch.Tensor) and not output.logits.requires_grad
    torch.testing.assert_close(output.logits, expected.logits)
    unlabelled = {name: value for name, value in inputs().items() if name != "labels"}
    output = compiled(**unlabelled)
    assert output.loss is None and type(output.logits) is torch.Tensor and output.logits.requires_grad
    torch.testing.assert_close(output.logits, expected.logits)
    logits = compiled(**inputs()).logits  # of a step of training: a record, which knows its shape
    assert logits.shape == expected.logits.shape
    torch.testing.assert_close(logits.argmax(-1), expected.logits.argmax(-1))


def test_autocast(counter):
    """Hidden states, or logits made of them later, of another dtype than the model was traced with."""
    plain, handle = llama(), fuse(llama())
    compiled = torch.compile(handle.model, backend=counter, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        actual, expected = compiled(**inputs()), plain(**inputs())
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-3, atol=0)
    assert actual.logits.dtype == torch.bfloat16
    torch.testing.assert_close(actual.logits, expected.logits)


def test_compiled_in_place(counter):
    """``model.compile()``, whose graph begins inside the call that sets up the loss."""
    handle, reference = fuse(llama()), fuse(llama())
    handle.model.compile(backend=counter, fullgraph=True)
    graphs = []
    for balance in (0.05, 0.08):
        handle.balance = reference.balance = balance
        assert close(handle.model, handle, reference.model)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1] and handle.stats is not None


def test_compiled_before(counter):
    """A graph from before the model was fused, that is run again."""
    model, reference = llama(), fuse(llama(), balance=0.05)
    compiled = torch.compile(model, backend=counter)
    assert tiny.off(step(compiled, model), step(model, model)) < 1e-5
    handle = fuse(compiled, balance=0.05)
    assert handle.model is model and close(compiled, handle, reference.model)
    assert handle.stats is not None


def masked(logits, labels, vocab_size, **kwargs):
    logits = logits.masked_fill(torch.arange(VOCAB) < 3, -1e4) * torch.tensor(0.5)
    return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))


def test_logits_that_are_made(counter):
    """A change to the logits that is traced away, or that breaks the graph."""
    plain, handle = llama(), fuse(llama())
    plain.loss_function = handle.model.loss_function = masked
    compiled = torch.compile(handle.model, backend=counter, fullgraph=True)
    with pytest.warns(UserWarning, match="because of masked_fill"):
        assert close(compiled, handle, plain)
    assert handle.materialized == ["masked_fill"] and handle.stats is not None


def nll(logits, labels, vocab_size, **kwargs):
    return F.nll_loss(logits[:, :-1].log_softmax(-1).reshape(-1, VOCAB), labels[:, 1:].reshape(-1))


@pytest.mark.filterwarnings("ignore:.*because of log_softmax:UserWarning")
def test_a_loss_of_another_kind(counter):
    """A balance that is lost without a word."""
    handle = fuse(llama(), balance=0.05)
    handle.model.loss_function = nll
    with pytest.raises(RuntimeError, match="its loss is its own, without the balance"):
        torch.compile(handle.model, backend=counter)(**inputs())


@pytest.mark.filterwarnings("ignore:.*speedups for torchdynamo:UserWarning")
def test_trainer(tmp_path):
    """Another training than without the compiler, by way of how accelerate compiles."""
    torch._dynamo.reset()
    counters.clear()
    data = [{"input_ids": row, "labels": row} for row in torch.randint(3, VOCAB, (8, 10))]
    weights = []
    for model, compile_it in ((llama(), False), (fuse(llama()).model, True)):
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=0.05,
            optim="sgd",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            torch_compile=compile_it,
            torch_compile_backend="aot_eager" if compile_it else None,
        )
        training = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
        training.train()
        assert bool(counters["stats"]) == compile_it
        weights.append({**model.state_dict(), "loss": torch.tensor(training.evaluate()["eval_loss"])})
    assert tiny.off(*weights[::-1]) < 1e-5
