"""Tiny random models of several makes, and a tokenizer for them: what the tests of integrations share.

Nothing is downloaded: the models come from configurations, the tokenizer from twenty words.
"""

import contextlib
from collections.abc import Callable

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tightrope.integrations import fuse

VOCAB = 61
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WORDS = "the cat dog sat ran on a mat hill and saw red blue big small sky under over house door".split()  # noqa: SIM905


def build(model_type: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides):
    """A causal language model of a type that transformers knows, the same for the same seed."""
    config = CONFIG_MAPPING[model_type](**{**SIZES, **overrides})
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def llama(**overrides):
    """Untied, no bias, no cap."""
    return build("llama", **overrides)


def gemma2(**overrides):
    """Tied, with a cap on its logits that they reach."""
    return build("gemma2", **{"head_dim": 8, "final_logit_softcapping": 2.0, **overrides})


def gpt2(**overrides):
    """Tied, with layer norms and without dropout."""
    without = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return build("gpt2", **{**without, **overrides})


def tokenizer() -> PreTrainedTokenizerFast:
    """Words between spaces; every class of VOCAB has a name, so that what a model samples can be read."""
    named = ["<pad>", "<bos>", "<eos>", *WORDS]
    named += [f"w{i}" for i in range(len(named), VOCAB)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(named)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def largest_allocation(step: Callable[[], object]) -> int:
    """Bytes of the largest block of memory that step() takes, in any thread or kernel."""
    with profile(profile_memory=True, acc_events=True) as record:
        step()
    events = record.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


# A fused model beside the same one unfused.


def lively(model, scale: float = 15.0):
    """Its head made larger: as it is drawn, every class is as likely as the next, whatever the tokens."""
    with torch.no_grad():
        model.get_output_embeddings().weight *= scale
    return model


def batch(rows: int = 5, length: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens, of which some labels are ignored: the beginning of the first row, and the third row."""
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[0, : length // 2] = -100
    labels[2:3] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def loss_and_gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of one step: the loss, and the gradient of each parameter that has one, by its name."""
    model.zero_grad()
    with Double() if next(model.parameters()).dtype == torch.float64 else contextlib.nullcontext():
        loss = model(**inputs).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def off(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, relative to a tensor's largest entry; infinite if others have a gradient.

    A gradient that is zero but for rounding is compared with a thousandth of the largest of all.
    """
    if actual.keys() != expected.keys():
        return float("inf")
    floor = 1e-3 * max(value.abs().max() for value in expected.values())
    return max(
        float((actual[name] - value).abs().max() / max(value.abs().max(), floor))
        for name, value in expected.items()
    )


class Double(TorchFunctionMode):
    """float64 for the float32 that models' norms and losses ask for, whatever their parameters are."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        function = Tensor.double if function is Tensor.float else function
        args = [torch.float64 if x is torch.float32 else x for x in args]
        kwargs = {k: torch.float64 if x is torch.float32 else x for k, x in (kwargs or {}).items()}
        return function(*args, **kwargs)


class Watch(TorchDispatchMode):
    """The operations that made a tensor of as many rows as there are tokens that predict, and V columns."""

    def __init__(self, inputs: dict[str, Tensor], vocab: int = VOCAB):
        super().__init__()
        rows, length = inputs["input_ids"].shape
        self.made: list[str] = []
        self._vocab, self._entries = vocab, rows * (length - 1) * vocab

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if not isinstance(value, Tensor) or value.shape[-1:] != (self._vocab,):
                continue
            if value.numel() >= self._entries:
                self.made.append(str(function))
        return result


def twins(make: Callable = llama, balance: float | Tensor = 0.0, **options):
    """A model in float64 as it is, and the handle of the same one fused."""
    return lively(make(dtype=torch.float64)), fuse(lively(make(dtype=torch.float64)), balance, **options)
