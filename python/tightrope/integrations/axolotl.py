"""A plugin of axolotl: its YAML trains on the reality-creativity loss.

The model is fused once it is complete, with adapters on and embeddings resized; from there on axolotl's
trainer, which is transformers', passes labels as ever. What would leave the loss as it was, another fused
cross-entropy or a trainer that passes no labels, would go unseen, and so is an error of the config.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, Field, model_validator
from torch import nn

from ..control import EntropyTarget
from ..support import MinP
from .callback import TightropeCallback
from .fuse import fuse
from .handle import Handle

if TYPE_CHECKING:
    from transformers import Trainer

_INSTEAD = {
    "cut_cross_entropy": "computes the loss without the head",
    "chunked_cross_entropy": "replaces the loss",
    "liger_cross_entropy": "replaces the loss",
    "liger_fused_linear_cross_entropy": "computes the loss without the head",
    "use_eaft": "takes the labels away from the model",
    "rl": "has a loss of its own (tightrope.integrations.trl is for TRL's trainers)",
}


class TightropeArgs(BaseModel):
    """What the plugin reads of axolotl's YAML.

    Fields:
        tightrope_balance: weight of creativity against reality, in [0, 1].
        tightrope_creativity: "entropy", "collision" or "support_entropy"; default "entropy".
        tightrope_min_p: what min-p sampling keeps is the set of "support_entropy", whose default is 0.02.
        tightrope_entropy_target: the wanted mean over tokens, in nats, of what creativity names; the balance
            is steered to it, from tightrope_balance on (tightrope.EntropyTarget).
    """

    tightrope_balance: float = Field(default=0.0, ge=0.0, le=1.0)
    tightrope_creativity: Literal["entropy", "collision", "support_entropy"] = "entropy"
    tightrope_min_p: float | None = Field(default=None, gt=0.0, le=1.0)
    tightrope_entropy_target: float | None = Field(default=None, gt=0.0)

    @model_validator(mode="before")
    @classmethod
    def _nothing_else_has_the_loss(cls, data: dict[str, Any]) -> dict[str, Any]:
        for name, effect in _INSTEAD.items():
            if data.get(name):
                raise ValueError(
                    f"{name}: got {data[name]} beside tightrope.integrations.axolotl.TightropePlugin, "
                    f"expected it not set: it {effect}"
                )
        return data


class TightropePlugin(BasePlugin):
    """``plugins: [tightrope.integrations.axolotl.TightropePlugin]`` in axolotl's YAML; see `TightropeArgs`.

    The Trainer logs entropy, reality, token accuracy and the balance (`TightropeCallback`).
    """

    def get_input_args(self) -> str:
        return f"{TightropeArgs.__module__}.{TightropeArgs.__qualname__}"

    def post_model_load(self, cfg: Any, model: nn.Module) -> None:
        fuse(model, cfg.tightrope_balance, **_options(cfg))

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Trainer) -> list[TightropeCallback]:
        handle, target = Handle.of(trainer.model), None
        if cfg.tightrope_entropy_target is not None:
            target = EntropyTarget(
                cfg.tightrope_entropy_target,
                balance=cfg.tightrope_balance,
                vocab_size=handle.model.get_output_embeddings().weight.shape[0],
                **_options(cfg),
            )
        return [TightropeCallback(handle, target)]


def _options(cfg: Any) -> dict[str, Any]:
    options = {"creativity": cfg.tightrope_creativity}
    if cfg.tightrope_min_p is not None:
        options["support"] = MinP(cfg.tightrope_min_p)
    return options
