"""torchtitan's own Trainer of a tiny Llama 3, on a CPU, in a process of a test's pool.

torchtitan takes the device at import, and no accelerator for CUDA: so it is imported here under a device
module that is the CPU's, and nowhere but in processes that end with their test's module. What it does that
gloo cannot, or that takes seconds, is replaced; model, loss seam, FSDP and tensor parallel plans are its own.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


class _Cpu:
    """``torch.cpu`` with what torchtitan asks of an accelerator's module."""

    def __getattr__(self, name):
        return getattr(torch.cpu, name)

    def get_device_properties(self, device):
        return SimpleNamespace(total_memory=1 << 30)

    def get_device_name(self, device=None):
        return "cpu"

    def memory_stats(self, device=None):
        return {}

    def set_device(self, device):
        pass

    empty_cache = reset_peak_memory_stats = lambda self: None


os.environ["LOCAL_RANK"] = "0"
with (
    mock.patch("torch._utils._get_available_device_type", return_value="cpu"),
    mock.patch("torch._utils._get_device_module", return_value=_Cpu()),
):
    from torchtitan import trainer as titan
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.components.metrics import MetricsProcessor
    from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
    from torchtitan.components.tokenizer import BaseTokenizer
    from torchtitan.config import ParallelismConfig, TrainingConfig
    from torchtitan.models import llama3
    from torchtitan.models.common.attention import ScaledDotProductAttention

VOCAB, WIDTH, LENGTH, BATCH = 102, 32, 16, 4  # BATCH: sequences of a step, of all ranks

logging.disable(logging.WARNING)  # it has much to say of CPUs
titan.dist_utils.set_pg_timeouts = lambda **_: None  # a barrier on a device that CPUs have not
titan.time = SimpleNamespace(**{**vars(titan.time), "sleep": lambda seconds: None})  # for others to log


class Tokenizer(BaseTokenizer):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config, **_):
        self.eos_id = 0

    def encode(self, *_, **__):
        return []

    def decode(self, *_, **__):
        return ""

    def get_vocab_size(self):
        return VOCAB


class Data(BaseDataLoader):
    """Runs of classes that follow each other, the same for all sizes of the world; some are ignored."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config, *, dp_world_size, dp_rank, local_batch_size, **_):
        self.mine = slice(dp_rank * local_batch_size, (dp_rank + 1) * local_batch_size)
        self.rows = dp_world_size * local_batch_size

    def __iter__(self):
        generator = torch.Generator().manual_seed(5)
        while True:
            first = torch.randint(0, VOCAB, (self.rows, 1), generator=generator)
            tokens = (first + torch.arange(LENGTH + 1)) % VOCAB
            labels = tokens[:, 1:].clone()
            labels[0, :5] = -100
            positions = torch.arange(LENGTH).expand(self.rows, -1).contiguous()
            yield {"input": tokens[self.mine, :-1], "positions": positions[self.mine]}, labels[self.mine]

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def _model(tied: bool) -> llama3.Llama3Model.Config:
    layers = llama3._build_llama3_layers(
        n_layers=2,
        dim=WIDTH,
        n_heads=4,
        hidden_dim=48,
        rope=llama3.ComplexRoPE.Config(dim=WIDTH // 4, max_seq_len=64, theta=500000, scaling="llama"),
        attn_backend="flex",
        fuse_qkv=False,
    )
    for layer in layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()  # flex has no backward on CPUs
    sizes = {"in_features": WIDTH, "out_features": VOCAB}
    embedding = llama3._EMBEDDING_SKIP_INIT if tied else llama3._EMBEDDING_INIT
    return llama3.Llama3Model.Config(
        dim=WIDTH,
        vocab_size=VOCAB,
        tok_embeddings=llama3.Embedding.Config(
            num_embeddings=VOCAB, embedding_dim=WIDTH, param_init=embedding
        ),
        norm=llama3.RMSNorm.Config(normalized_shape=WIDTH, param_init=llama3._NORM_INIT),
        lm_head=llama3.Linear.Config(**sizes, param_init=llama3._output_linear_init(WIDTH)),
        layers=layers,
        enable_weight_tying=tied,
    )


def cross_entropy(num_chunks: int = 4) -> ChunkedLossWrapper.Config:
    """torchtitan's own."""
    inner = CrossEntropyLoss.Config(global_vocab_size=VOCAB)
    return ChunkedLossWrapper.Config(num_chunks=num_chunks, loss_fn=inner)


def config(loss: BaseLoss.Config, backend: str = "spmd_types", tp: int = 1, tied: bool = False, **more):
    """Of a Trainer. more: steps, folder, accumulate, sequence_parallel."""
    folder, batch = more.get("folder", ""), BATCH // (torch.distributed.get_world_size() // tp)
    batch //= more.get("accumulate", 1)
    without_fsdp = backend == "spmd_types" and tp > 1
    spec = llama3.ModelSpec(
        name="llama3",
        flavor="tiny",
        model=_model(tied),
        parallelize_fn=_only_tensor_parallel if without_fsdp else llama3.parallelize_llama,
        pipelining_fn=None,
        post_optimizer_build_fn=None,
        state_dict_adapter=None,
    )
    return titan.Trainer.Config(
        model_spec=spec,
        loss=loss,
        dump_folder=folder,
        hf_assets_path=folder,
        tokenizer=Tokenizer.Config(),
        dataloader=Data.Config(),
        metrics=MetricsProcessor.Config(log_freq=1),
        optimizer=default_adamw(lr=1e-2),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=1),
        training=TrainingConfig(
            local_batch_size=batch,
            global_batch_size=BATCH,
            seq_len=LENGTH,
            steps=more.get("steps", 1),
            disable_cuda_graphs=True,
            mixed_precision_param="float32",
        ),
        parallelism=ParallelismConfig(
            spmd_backend=backend,
            tensor_parallel_degree=tp,
            enable_sequence_parallel=more.get("sequence_parallel", True),
        ),
        activation_checkpoint=None,
    )


def _only_tensor_parallel(model, *, parallel_dims, **_):
    """Under "spmd_types" FSDP over ranks takes a newer torch than there is a release of."""
    model.parallelize(parallel_dims)
    return model


def trainer(*args, **kwargs) -> titan.Trainer:
    """Of `config`, with the same parameters in any number of processes; ``logged``: step, loss, norm."""
    made = titan.Trainer(config(*args, **kwargs))
    made.logged = []
    made.metrics_processor.log = lambda step, loss, most, norm, **_: made.logged.append((step, loss, norm))
    torch.autograd.set_multithreading_enabled(False)  # as init_distributed does
    (model,) = made.model_parts
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no sum with a factor
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for value in model.parameters():
            if not isinstance(value, DTensor) and kwargs.get("tp", 1) > 1:
                continue  # this rank's part of something; as it was made
            whole = torch.randn(value.shape, generator=generator) * (0.3 if value.dim() > 1 else 0.1)
            whole += float(value.dim() == 1)  # of a norm
            if isinstance(value, DTensor):
                whole = distribute_tensor(whole, value.device_mesh, value.placements, src_data_rank=None)
            value.copy_(whole)
    return made


def step(made: titan.Trainer, loss: BaseLoss) -> tuple[Tensor, dict[str, Tensor]]:
    """A forward and backward of the Trainer's with this loss: the loss, and whole gradients by name."""
    (model,) = made.model_parts
    loss.set_lm_head(model.lm_head)
    made.loss_fn = loss
    made.optimizers.zero_grad()
    inputs, labels = next(iter(made.dataloader))
    tokens = (labels != -100).sum()
    if made.parallel_dims.dp_enabled:
        tokens = titan.dist_utils.dist_sum_tensor(tokens, made.parallel_dims.get_mesh("batch"))
    value = made.forward_backward_step(input_dict=inputs, labels=labels, global_valid_tokens=tokens)
    grads = {name: p.grad for name, p in model.named_parameters()}
    return value.detach(), {name: whole(grad).clone() for name, grad in grads.items()}


def here(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
