"""Tiny random models of any transformers type: the class's own configuration, its sizes shrunk by name.

A sweep over two hundred types needs no table of types: the fields of the configurations carry the same few
names (`hidden_size`, `num_experts`, `layer_types`), so a table of names shrinks them, and what a class
derives from others (a rank, a list of layers) it derives again from the small ones. What that cannot guess
stands in `OVERRIDES`.

Weights and options are such that a loss notices what a model does to its logits: these are of order one, caps
are low, scales are not one, and no bias is zero.
"""

import dataclasses
import functools
import re
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

# A prime, above the chunks that linear attention is computed in: no other dimension is as long by chance.
VOCAB = 101
# Of the ids, the first and the last are special tokens, and no part of a batch.
SPECIAL = 4
# Reformer wants sequences of whole chunks.
BATCH, SEQUENCE = 3, 16

# Sizes by the name of the field, which the pattern matches as a whole; the first that does. A default that is
# smaller stays, and None stays for the class to derive.
SIZES: list[tuple[str, int]] = [
    (r"unpadded_vocab_size", VOCAB - 2),
    (r"encoder_hash_byte_group_vocab|ngram_vocab_size_base|codebook_size", 64),
    (r"(task_)?type_vocab_size", 4),
    (r"\w*vocab_size(_per_layer_input)?|n_words", VOCAB),
    # Widths
    (r"\w*hidden_size(_global)?|n_embd|d_model|dim|emb_dim|\w*embedding_(dim|size)|lru_width", 32),
    (r"word_embed_proj_dim|\w+_embed_dim|input_size", 32),
    (r"\w*intermediate_size(_mlp)?|\w*ffn_dim|\w*ffn_hidden_size|feed_forward_size", 48),
    (r"d_ff|dff|dim_ff|n_inner|d_inner|mlp_dim", 48),
    (r"hidden_size_per_layer_input|router_hidden_size|d_rel|\w*_mid_dim", 8),
    (r"\w*head_dim|mamba_d_head|mamba_headdim|dim_head|d_head|d_kv|kv_channels|attention_head_size", 8),
    (r"rotary_dim|\w*_rank|hc_lowrank|\w*state_size|mamba_d_state", 8),
    (r"mamba_d_ssm", 64),
    # Counts
    (r"\w*(key_heads|key_value_heads|kv_heads|kv_n_heads)", 2),
    (r"mamba_n(um)?_heads", 8),
    (r"\w*heads|n_head|num_query_groups", 4),
    (r"n_groups?|topk_group|num_expert_group|mamba_n_?groups|o_groups", 1),
    (r"\w*(experts_per_tok|experts_per_token|top_?k)|moe_k", 2),
    (r"\w*experts|zero_expert_num", 4),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    # Lengths
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|\w*_positions|context_length", 128),
    (r"\w*chunk_(size|length)|block_size", 8),
    (r"\w*sliding_window|\w*window_size|local_attention|index_topk", 6),
    (r"image_size", 32),
    (r"patch_size", 16),
]
LAYERS = r"\w*layers|n_layer|depth|num_blocks"
TOKENS = r"\w*_token_(id|index)|\w+_index"
DROPPED = r"\w*(drop|jitter)\w*|\w*pdrop"
# What changes logits between the head and the loss, or the loss after it: by default most change nothing.
CHANGES: list[tuple[str, float | bool]] = [
    (r"final_logit_softcapping|logits_soft_cap|output_logit_soft_cap", 5.0),
    (r"logits_scaling|logit_scale|lm_head_multiplier|output_multiplier|logits_mup_width_multiplier", 0.5),
    (r"output_router_logits", True),
    # and how a training loop has a model
    (r"is_decoder", True),
    (r"use_cache", False),
]

# By `model_type`, of a configuration or of one inside it.
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
OVERRIDES: dict[str, dict[str, Any]] = {
    # Not the vocabulary of the model itself, so that its logits are no logits to a watch.
    "blt_patcher": {"vocab_size": VOCAB - 1},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _MROPE}},
    "dbrx": {"attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 1e4}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {"num_hidden_layers": 4, "n_input_layers": 1, "n_output_layers": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {
        "head_dim": 16,
        "swa_head_dim": 16,
        "swa_kv_lora_rank": 8,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 8,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "inkling_text": {"unpadded_vocab_size": VOCAB - 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [4, 4],
        "hash_seed": 0,
        "num_buckets": 2,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention"] * 2 + ["hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
}


def causal_types() -> list[str]:
    """The model types of AutoModelForCausalLM, sorted."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def model_class(model_type: str) -> type[PreTrainedModel]:
    return MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]


def tiny_config(model_type: str) -> PreTrainedConfig:
    """What the type's model class takes, small, with as many layers as show each kind that the default has.

    Where a class takes a part of a composite configuration, it is that part's.
    """
    cls, wanted = CONFIG_MAPPING[model_type], model_class(model_type).config_class
    if not issubclass(cls, wanted):
        parts = (type(part) for part in vars(_default(cls)).values())
        cls = next((part for part in parts if issubclass(part, wanted)), cls)
    for layers in range(2, 13):
        config = _shrink(cls, layers)
        if _kinds_of_layer(config) >= _kinds_of_layer(_default(cls)):
            break
    return config


def tiny_model(model_type: str) -> PreTrainedModel:
    """A model of the type, in training, without dropout. Draws its weights from torch's generator."""
    return _enliven(model_class(model_type)(tiny_config(model_type)).train())


def tiny_batch(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Sequences with labels, one of them padded. Drawn from torch's generator."""
    input_ids = torch.randint(SPECIAL, VOCAB - SPECIAL, (BATCH, SEQUENCE))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, -3:] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[0, :4] = -100
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    config = model.config
    if getattr(model, "num_codebooks", None) and hasattr(model, "lm_heads"):
        # As Musicgen has them: the codebooks of a sequence follow each other in the batch.
        codes = torch.randint(SPECIAL, VOCAB - SPECIAL, (BATCH, SEQUENCE, model.num_codebooks))
        batch |= {"input_ids": codes.movedim(-1, 1).flatten(0, 1), "labels": codes.clone()}
        batch["labels"][0, :4] = -100
    if config.model_type == "git":
        size = config.vision_config.image_size
        batch["pixel_values"] = torch.randn(BATCH, config.vision_config.num_channels, size, size)
    return batch


@torch.no_grad()
def _enliven(model: PreTrainedModel) -> PreTrainedModel:
    """Noise for parameters that are set rather than drawn; a head whose logits are of order one."""
    for parameter in model.parameters():
        if parameter.numel() > 1 and parameter.std() == 0:
            parameter += 0.1 * torch.randn_like(parameter)
    batch = tiny_batch(model)
    del batch["labels"]
    spread = model(**batch).logits.std()
    for parameter in model.get_output_embeddings().parameters():
        parameter *= max(1.0, 2 / float(spread))
    return model


def _shrink(
    cls: type[PreTrainedConfig], layers: int, given: dict[str, Any] | None = None
) -> PreTrainedConfig:
    default = {f.name: _default_of(f) for f in dataclasses.fields(cls) if f.name not in _COMMON}
    values = {name: _small(name, value, layers) for name, value in default.items()}
    heads = default.get("num_attention_heads")
    if heads is not None and heads == default.get("num_key_value_heads"):
        values["num_key_value_heads"] = values["num_attention_heads"]
    given = OVERRIDES.get(cls.model_type, {}) | (given or {})
    for name, part in cls.sub_configs.items():
        part = type(getattr(_default(cls), name, None))
        if issubclass(part, PreTrainedConfig):
            values[name] = _shrink(part, layers, given.get(name))
            given = {key: value for key, value in given.items() if key != name}
    values |= given
    return cls(**{name: value for name, value in values.items() if value is not default.get(name)})


def _default_of(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@functools.cache
def _default(cls: type[PreTrainedConfig]) -> PreTrainedConfig:
    return cls()


def _small(name: str, value: Any, layers: int) -> Any:
    for pattern, changed in CHANGES:
        if re.fullmatch(pattern, name):
            return changed
    if name == "head_dim" and value is None:
        return 8
    if re.fullmatch(DROPPED, name) and isinstance(value, int | float):
        return type(value)(0)
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if re.fullmatch(TOKENS, name):
        return value if value < SPECIAL else VOCAB - 1 - value % SPECIAL
    if re.fullmatch(LAYERS, name):
        return min(value, layers)
    for pattern, size in SIZES:
        if re.fullmatch(pattern, name):
            return min(value, size)
    return value


def _kinds_of_layer(config: PreTrainedConfig) -> set[str]:
    """What the lists with an entry for each layer say, of a configuration and of those inside it."""
    kinds = set()
    for name, value in [*vars(config).items(), ("layer_types", getattr(config, "layer_types", None))]:
        if isinstance(value, PreTrainedConfig):
            kinds |= {f"{name}.{kind}" for kind in _kinds_of_layer(value)}
        elif isinstance(value, list | tuple) and len(value) == getattr(config, "num_hidden_layers", None):
            kinds |= {f"{name}={kind}" for kind in value if isinstance(kind, str)}
    return kinds


_COMMON = {field.name for field in dataclasses.fields(PreTrainedConfig)}
