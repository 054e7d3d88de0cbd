"""The models that a patch of transformers gets wrong first, tiny and random, each with a batch of its own.

Their code does something to its logits, has a loss of its own, a head of another name, images, or a second
loss. V is large and all else small, so that a step's logits would be its largest tensor by far.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import tiny
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from helpers import randn

V, BATCH, LENGTH = 2053, 2, 32
SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "head_dim": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
EXPERTS = {
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "experts_implementation": "eager",  # the other one has no float64
}
MAMBA = {
    "mamba_d_ssm": 16,
    "mamba_n_heads": 4,
    "mamba_d_head": 4,
    "mamba_d_state": 4,
    "mamba_chunk_size": 8,
}
THREE_LAYERS = {"num_hidden_layers": 3}  # one of each kind
# The last of the vocabulary stand for images.
IMAGE, VIDEO, START, END = range(V - 1, V - 5, -1)


class Case(NamedTuple):
    """A model and a batch of it."""

    model: PreTrainedModel
    batch: dict[str, Tensor]
    shift: int = 1  #: of the labels, by the model itself

    def step(self, loss_of: Callable[[Any], Tensor] = lambda output: output.loss, **extra: Any):
        """The output for the batch, and the loss of it with every gradient."""
        parameters = dict(self.model.named_parameters())
        torch.manual_seed(1)  # dropout
        with tiny.Double() if self.model.dtype == torch.float64 else contextlib.nullcontext():
            output = self.model(**self.batch, **extra)
            loss = loss_of(output)
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        found = {name: g for name, g in zip(parameters, gradients) if g is not None}
        return output, {"loss": loss.detach(), **found}

    def dense(self, loss_fn: Callable[..., Tensor], *per_token: Tensor) -> dict[str, Tensor]:
        """The unfused model's step with ``loss_fn(logits [N, V], labels [N], ...)`` for its cross-entropy."""

        def loss_of(output):
            scored = output.logits[:, : output.logits.shape[1] - self.shift].flatten(0, 1)
            rows = [x[:, : x.shape[1] - self.shift].flatten() for x in per_token]
            loss = loss_fn(scored, self.batch["labels"][:, self.shift :].flatten(), *rows)
            if getattr(output, "aux_loss", None) is not None:
                loss = loss + self.model.router_aux_loss_coef * output.aux_loss
            return loss

        return self.step(loss_of)[1]

    def labels(self) -> Tensor:
        """What each position predicts, ``[N]``: the rows of the model's statistics."""
        return F.pad(self.batch["labels"], (0, self.shift), value=-100)[:, self.shift :].flatten()


def causal(model_type: str, **overrides) -> Case:
    model = tiny.build(model_type, **{**SIZES, **overrides})
    return Case(model, _labelled(_token_ids()))


def seq2seq(model_type: str, **sizes) -> Case:
    config = CONFIG_MAPPING[model_type](vocab_size=V, d_model=16, pad_token_id=0, **sizes)
    model = AutoModelForSeq2SeqLM.from_config(config)
    batch = _labelled(_token_ids())
    return Case(model, {**batch, "input_ids": _token_ids(seed=5)[:, :20]}, shift=0)


def with_image(model_type: str, text: dict[str, Any], tokens=4, size=16, **parts) -> Case:
    """Text around an image, which is so many tokens and ``size`` pixels wide."""
    config = CONFIG_MAPPING[model_type](**text, **parts)
    ids = _token_ids(tokens)
    ids[:, 2 : 2 + tokens] = IMAGE
    pixels = randn(BATCH, 3, size, size, seed=4)
    return Case(AutoModelForImageTextToText.from_config(config), {**_labelled(ids), "pixel_values": pixels})


def llava() -> Case:
    text, vision = _part("llama"), _part("clip_vision_model", **VISION, projection_dim=16)
    parts = {"image_token_index": IMAGE, "image_seq_length": 4}
    return with_image("llava", {"text_config": text}, vision_config=vision, vision_feature_layer=-1, **parts)


def gemma3() -> Case:
    vision = _part("siglip_vision_model", **VISION)
    tokens = {"image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END}
    case = with_image(
        "gemma3", {"text_config": _part("gemma3_text")}, vision_config=vision, mm_tokens_per_image=4, **tokens
    )
    case.batch["token_type_ids"] = (case.batch["input_ids"] == IMAGE).long()
    return case


def cohere2_vision() -> Case:
    """Its text part names a scale, which the forward of the whole does not apply."""
    text = _part("cohere2", logit_scale=0.5)
    vision = _part("siglip_vision_model", **{**VISION, "image_size": 32})
    others = {"image_token_id": IMAGE, "alignment_intermediate_size": 24}
    return with_image("cohere2_vision", {"text_config": text}, size=32, vision_config=vision, **others)


def qwen2_5_vl() -> Case:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 8}
    vision |= {"out_hidden_size": 16, "window_size": 32, "fullatt_block_indexes": [0]}
    tokens = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    tokens |= {"vision_start_token_id": START, "vision_end_token_id": END}
    text = {**tiny.SIZES, **SIZES, "rope_parameters": rope}
    case = with_image("qwen2_5_vl", {"text_config": text}, vision_config=vision, **tokens)
    case.batch["pixel_values"] = randn(BATCH * 16, 3 * 2 * 8 * 8, seed=4)  # two frames of each patch
    case.batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * BATCH)
    case.batch["mm_token_type_ids"] = (case.batch["input_ids"] == IMAGE).int()
    return case


def chameleon() -> Case:
    """It writes the lowest number over the logits of its image tokens."""
    image = {"embed_dim": 8, "num_embeddings": 8, "latent_channels": 8, "resolution": 16, "base_channels": 32}
    image |= {"channel_multiplier": [1, 1], "num_res_blocks": 1}
    names = {"<image>": IMAGE, **{f"IMGIMG{letter}Z": 1000 + i for i, letter in enumerate("ABCDEFGH")}}
    return with_image("chameleon", {**tiny.SIZES, **SIZES}, tokens=64, vq_config=image, vocabulary_map=names)


BUILDERS: dict[str, Callable[[], Case]] = {
    "llama": lambda: causal("llama"),
    "qwen3": lambda: causal("qwen3"),
    "gpt2": lambda: causal("gpt2"),  # tied
    "phi": lambda: causal("phi"),  # a bias
    "gemma2": lambda: causal("gemma2", final_logit_softcapping=2.0),
    "gemma3_text": lambda: causal("gemma3_text", final_logit_softcapping=2.0),
    "recurrent_gemma": lambda: causal("recurrent_gemma", lru_width=16, logits_soft_cap=2.0, **THREE_LAYERS),
    "cohere2": lambda: causal("cohere2", logit_scale=0.5),
    "granite": lambda: causal("granite", logits_scaling=2.0),  # divides
    "hyperclovax": lambda: causal("hyperclovax", logits_scaling=0.5),  # multiplies
    "falcon_h1": lambda: causal("falcon_h1", lm_head_multiplier=0.5, **MAMBA),
    "mixtral": lambda: causal("mixtral", **EXPERTS),
    "qwen3_moe": lambda: causal("qwen3_moe", **EXPERTS),
    # Its head is no lm_head, and has a bias.
    "modernbert-decoder": lambda: causal("modernbert-decoder", cls_token_id=1, sep_token_id=2),
    "t5": lambda: seq2seq("t5", d_kv=4, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0),
    "bart": lambda: seq2seq(
        "bart",
        **{"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24},
        **{"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24},
    ),
    "llava": llava,
    "gemma3": gemma3,
    "qwen2_5_vl": qwen2_5_vl,
    "cohere2_vision": cohere2_vision,
    "chameleon": chameleon,
}


def _part(model_type: str, **overrides):
    if "vision" in model_type:
        return CONFIG_MAPPING[model_type](**overrides)
    return CONFIG_MAPPING[model_type](**{**tiny.SIZES, **SIZES, **overrides})


def _token_ids(more: int = 0, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, V - 4, (BATCH, LENGTH + more), generator=generator)


def _labelled(ids: Tensor) -> dict[str, Tensor]:
    """With labels for most of what is not image, more of one sequence than of the other."""
    labels = ids.masked_fill(ids == IMAGE, -100)
    labels[0, :5] = labels[1, -3:] = -100
    return {"input_ids": ids, "labels": labels}


@functools.cache
def case_of(name: str, dtype: torch.dtype = torch.float64) -> Case:
    """In training, with weights that let a loss notice what is done to logits: none is 0 or tiny."""
    torch.manual_seed(0)
    case = BUILDERS[name]()
    model = case.model.to(dtype).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        model.get_output_embeddings().weight *= 2
        if hasattr(model, "final_logits_bias"):  # BART's, a buffer
            model.final_logits_bias += torch.randn_like(model.final_logits_bias)
    batch = {name: x.to(dtype) if x.is_floating_point() else x for name, x in case.batch.items()}
    return case._replace(model=model, batch=batch)
