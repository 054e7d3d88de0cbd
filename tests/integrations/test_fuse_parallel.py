"""A fused model under DDP and FSDP2: two processes are one process on both batches, and send no more.

FSDP changes the classes of modules, as `fuse` does, and brings weights together in hooks of their calls. So
each wrapper is put on before `fuse` and after it, and its sharded units are the model, its layers, its head.
"""

from __future__ import annotations

import functools
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported

import pytest
import tiny
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from tightrope.integrations import Handle, fuse

EXACT = 1e-11
WHEN = ["before", "after"]


def plain(model_type: str = "llama", dtype: torch.dtype = torch.float64) -> nn.Module:
    if model_type == "lora":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        return peft.get_peft_model(plain(dtype=dtype), config)
    return tiny.lively(getattr(tiny, model_type)(dtype=dtype))


@functools.cache
def mesh_of(size: int) -> DeviceMesh:
    return init_device_mesh("cpu", (size,))


def wrapped(model: nn.Module, wrap: str, **settings) -> nn.Module:
    """In DDP, or sharded in the units that the words name, and the root, which may be resharded too."""
    if "ddp" in wrap:
        return DistributedDataParallel(model, find_unused_parameters="unused" in wrap)
    shard = functools.partial(fully_shard, mesh=mesh_of(dist.get_world_size()), **settings)
    if "layers" in wrap:
        for layer in (m for m in model.modules() if type(m).__name__ in ("LlamaDecoderLayer", "GPT2Block")):
            shard(layer)
    if "norm" in wrap:
        shard([model.base_model.norm, model.get_output_embeddings()])
    elif "head" in wrap:
        shard(model.get_output_embeddings())
    if "only" in wrap:
        return model
    return shard(model, reshard_after_forward=True if "resharded" in wrap else None)


def fused(wrap: str, when: str, model_type: str = "llama", balance: float = 0.0, **settings) -> nn.Module:
    dtype = settings.pop("dtype", torch.float64)
    model = plain(model_type, dtype)
    if when == "before":
        fuse(model, balance)
        return wrapped(model, wrap, **settings)
    model = wrapped(model, wrap, **settings)
    fuse(model, balance)
    return model


def joined() -> dict[str, Tensor]:
    """What the ranks have, rows after rows, of which some have fewer tokens; and the number of all tokens."""
    batch = tiny.batch(rows=8)
    return {**batch, "num_items_in_batch": (batch["labels"][:, 1:] != -100).sum()}


def part(rank: int) -> dict[str, Tensor]:
    """A rank's, where gradients are averaged over ranks."""
    batch, size = joined(), dist.get_world_size()
    count = batch.pop("num_items_in_batch") / size
    return {**{name: value.chunk(size)[rank] for name, value in batch.items()}, "num_items_in_batch": count}


def step(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """As `tiny.loss_and_gradients`, with whole gradients, and the loss averaged over ranks."""
    got = tiny.loss_and_gradients(model, batch)
    dist.all_reduce(got["loss"])
    got["loss"] /= dist.get_world_size()
    return {name.removeprefix("module."): whole(value) for name, value in got.items()}


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def trained(rank: int, wrap: str, when: str, model_type: str) -> tuple[float, list[str], bool]:
    """How far a step is from one process's; what made logits; whether statistics are those of the rank."""
    model, batch = fused(wrap, when, model_type), part(rank)
    with tiny.Watch(batch) as watch:
        got = step(model, batch)
    handle = Handle.of(model)
    counted = (handle.stats.argmax >= 0).sum() == (batch["labels"][:, 1:] != -100).sum()
    return (
        tiny.off(got, tiny.loss_and_gradients(plain(model_type), joined())),
        [*watch.made, *handle.materialized],
        bool(counted),
    )


WRAPPED = [
    *[("llama", wrap) for wrap in ("ddp", "ddp unused", "root", "layers", "layers, head", "norm and head")],
    *[("llama", "resharded"), ("lora", "ddp unused"), ("lora", "layers")],
    # A tied head is no unit of its own: FSDP takes no parameter of two.
    *[("gpt2", wrap) for wrap in ("ddp", "root", "layers")],
]


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize(("model_type", "wrap"), WRAPPED)
def test_two_processes_are_one(ranks, model_type, wrap, when):
    """Would catch peers' gradients that are lost, a class that the other wrapper does not know, logits."""
    for error, made, counted in ranks(2).run(trained, wrap, when, model_type):
        assert error < EXACT
        assert made == [] and counted


def evaluated(rank: int, wrap: str, when: str) -> tuple[float, float, int]:
    """How far the loss and logits of an evaluation are from those unfused, and how many there are before."""
    model, batch, reference = fused(wrap, when).eval(), part(rank), plain().eval()
    with torch.no_grad(), tiny.Double():
        expected = reference(**batch)
        with tiny.Watch(batch) as watch:
            output = model(**batch)
        errors = (output.loss - expected.loss, output.logits - expected.logits)
    return (*[float(error.abs().max()) for error in errors], len(watch.made))


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("wrap", ["ddp", "root", "layers, head", "resharded, head", "resharded"])
def test_evaluation(ranks, wrap, when):
    """Would catch logits that are read when the head's weight is away, or made though nobody reads them."""
    for loss, logits, made in ranks(2).run(evaluated, wrap, when):
        assert max(loss, logits) < EXACT and made == 0


def sent(rank: int, wrap: str, when: str | None) -> tuple[dict[str, int], dict[str, int]]:
    """The collectives of a forward, and those of its backward."""
    model = wrapped(plain(), wrap) if when is None else fused(wrap, when)
    batch = part(rank)
    with CommDebugMode() as forward:
        loss = model(**batch).loss
    with CommDebugMode() as backward:
        loss.backward()
    return tuple({str(n): c for n, c in mode.get_comm_counts().items()} for mode in (forward, backward))


@pytest.mark.parametrize("wrap", ["root", "layers, head", "norm and head", "only head"])
def test_nothing_is_sent_that_is_not_sent_unfused(ranks, wrap):
    """Would catch a head that is gathered for its record, and again for its loss."""
    expected = ranks(2).run(sent, wrap, None)
    for when in WHEN:
        assert ranks(2).run(sent, wrap, when) == expected


POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def mixed(rank: int, wrap: str, when: str) -> tuple[float, float, str]:
    """The loss in bfloat16, and how far its gradients are from float32's."""
    model = fused(wrap, when, balance=0.1, dtype=torch.float32, mp_policy=POLICY)
    reference = plain(dtype=torch.float32)
    fuse(reference, 0.1)
    got, expected = step(model, part(rank)), tiny.loss_and_gradients(reference, joined())
    return got["loss"].item(), tiny.off(got, expected), str(got["loss"].dtype)


@pytest.mark.parametrize("when", WHEN)
def test_mixed_precision(ranks, when):
    """Would catch a product of two dtypes, and a balance that is cast to bfloat16 on its way to the head."""
    results = [ranks(2).run(mixed, wrap, when)[0] for wrap in ("root", "layers", "layers, head")]
    for loss, error, dtype in results:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        assert error < 0.1 and dtype == "torch.float32"


def restored(rank: int, wrap: str, when: str) -> None:
    model = fused(wrap, when)
    handle = Handle.of(model)
    if when == "before" and "ddp" not in wrap:
        with pytest.raises(RuntimeError, match="restore: got a FSDPLlamaForCausalLM whose class was changed"):
            handle.restore()
        handle = Handle.of(model)  # it is fused still
    else:
        handle.restore()
        assert Handle.find(model) is None
    expected = tiny.loss_and_gradients(plain(), joined())
    assert tiny.off(step(model, part(rank)), expected) < EXACT
    if when == "before" and "ddp" not in wrap:
        assert handle.stats is not None


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("wrap", ["ddp", "root", "layers, head"])
def test_restoring(ranks, wrap, when):
    """Would catch a restored model that is neither the one nor the other, under a class that is not ours."""
    ranks(2).run(restored, wrap, when)
