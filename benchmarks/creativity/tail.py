"""A language model split in two: the blocks below, frozen, and the tail that trains.

The frozen blocks see the same tokens in every objective and never change, so their output is computed once
and every objective trains on it: on a CPU that saves most of the time of a step. The tail is replayed on the
arguments with which the model itself calls its blocks, caught by hooks; nothing of a particular
architecture is written here but the names of its parts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn


class Tail(nn.Module):
    """The last blocks, the final norm and the head of ``model``: what trains.

    The head is cloned away from the embedding. Most small models tie the two, and then training the
    head would also change the inputs of the frozen blocks, whose outputs are computed only once.
    """

    def __init__(self, model: nn.Module, blocks: int) -> None:
        super().__init__()
        body = model.base_model
        layers, norm = getattr(body, "layers", None), getattr(body, "norm", None)
        head = model.get_output_embeddings()
        if not isinstance(layers, nn.ModuleList) or norm is None or head is None:
            raise ValueError(f"{type(model).__name__} is not laid out as model.layers, model.norm and a head")
        if blocks > len(layers):
            raise ValueError(f"blocks: got {blocks}, the model has {len(layers)}")
        model.requires_grad_(False)
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
        self.blocks = nn.ModuleList(layers[-blocks:])
        self.norm = norm
        self.head = head
        self.requires_grad_(True)
        self._body = [body]  # in a list: the model's other parts are not parts of this module
        self._arguments: list[dict] = []

    @torch.no_grad()
    def trace(self, model: nn.Module, window: Tensor) -> None:
        """Notes the arguments that each trained block is called with, from one window [length].

        They depend on the positions alone, the same in every window, and those of a batch of one
        broadcast. Refuses a model whose logits the tail does not reproduce: one with a softcap, say.
        """
        longest = getattr(model.config, "max_position_embeddings", len(window))
        if len(window) > longest:
            raise ValueError(f"windows: got {len(window)}, the model takes up to {longest}")
        caught = []
        with self._catching(self.blocks, lambda args, kwargs: caught.append((args[0], kwargs))):
            logits = model(window[None], use_cache=False).logits
        self._arguments = [kwargs for _, kwargs in caught]
        ours = self(caught[0][0]) @ self.head.weight.T
        if not torch.allclose(ours, logits, rtol=1e-3, atol=1e-3):
            raise ValueError(
                f"the logits of {type(model).__name__} are not a plain linear head of its last hidden states"
            )

    @torch.no_grad()
    def frozen(self, windows: Tensor, batch_size: int) -> Iterator[Tensor]:
        """What the first trained block is given, [batch, length, D], per batch of token ``windows``."""
        caught = []
        with self._catching(self.blocks[:1], lambda args, kwargs: caught.append(args[0])):
            for batch in windows.split(batch_size):
                self._body[0](batch, use_cache=False)
                yield caught.pop()

    def forward(self, frozen: Tensor) -> Tensor:
        """The hidden states that the head reads, [batch, length, D]."""
        hidden = frozen
        for block, arguments in zip(self.blocks, self._arguments):
            hidden = block(hidden, **arguments)
        return self.norm(hidden)

    @staticmethod
    @contextlib.contextmanager
    def _catching(blocks: Iterable[nn.Module], catch: Callable[[tuple, dict], None]) -> Iterator[None]:
        hooks = [
            block.register_forward_pre_hook(lambda _, args, kwargs: catch(args, kwargs), with_kwargs=True)
            for block in blocks
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
