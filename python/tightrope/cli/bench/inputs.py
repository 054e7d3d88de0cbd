"""The tensors of a step: random ones, or hidden states, head and next tokens of SmolLM2 on real text.

Random hidden states meet a random head in flat distributions. A trained model's are peaked, tokens repeat,
and logits have offsets: what a loss meets in use. The real ones are computed once and kept outside the
repository.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..output import writing
from .cases import DTYPES, IGNORED_SHARE, REAL_ROWS, TAUGHT, TEACHER_ENTRIES, Case

IGNORE_INDEX = -100
WINDOW = 256
TEACHER_TEMPERATURE = 2.0


@dataclass(frozen=True)
class Step:
    """hidden [N, D] and weight [V, D], leaves that require grad as the scenario says, and what is scored.

    target: [N] int64 with -100 where ignored, or with `probs` the entries [N, K] of a teacher's top K; or
    of no interest with `teacher`: hidden states [N, 2 D] and head [V, 2 D].
    advantage: [N], the upstream gradient of each token's log-probability (reinforcement learning).
    direction: of hidden and weight, for a Hessian-vector product in the place of a gradient.
    normalizer: the rows that count, which the mean divides by.
    """

    hidden: Tensor
    weight: Tensor
    target: Tensor
    probs: Tensor | None
    advantage: Tensor | None
    normalizer: int
    direction: tuple[Tensor, Tensor] | None = None
    teacher: tuple[Tensor, Tensor] | None = None

    def rows(self, start: int, stop: int) -> Step:
        def cut(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[start:stop]

        return replace(
            self,
            hidden=cut(self.hidden),
            target=cut(self.target),
            probs=cut(self.probs),
            advantage=cut(self.advantage),
            direction=None if self.direction is None else (cut(self.direction[0]), self.direction[1]),
            teacher=self.teacher and (self.teacher[0][start:stop], self.teacher[1]),
        )

    def forget_gradients(self) -> None:
        self.hidden.grad = self.weight.grad = None


def make_step(case: Case) -> Step:
    """The tensors of a case, the same each time, on its device and in its dtype."""
    # On a GPU a head of half a billion random entries takes no time.
    generator = torch.Generator(case.device).manual_seed(0)
    here = {"generator": generator, "device": case.device}
    if case.inputs == "real":
        hidden, weight, target = _real(case)
    else:
        hidden = torch.randn(case.rows, case.dim, **here)
        weight = torch.randn(case.vocab, case.dim, **here).mul_(case.dim**-0.5)
        target = torch.randint(case.vocab, (case.rows,), **here)
    probs = advantage = direction = teacher = None
    if case.scenario == "sft":
        target = target.masked_fill(torch.rand(case.rows, **here) < IGNORED_SHARE, IGNORE_INDEX)
    elif case.scenario == "distillation":
        entries = min(TEACHER_ENTRIES, case.vocab)
        largest = torch.softmax(hidden @ weight.T / TEACHER_TEMPERATURE, -1).topk(entries)
        target, probs = largest.indices, largest.values / largest.values.sum(-1, keepdim=True)
    elif case.scenario in TAUGHT:
        # It sees what the student sees, and as much more.
        more = torch.randn(hidden.shape, **here)
        more_weight = torch.randn(weight.shape, **here).mul_(case.dim**-0.5)
        teacher = torch.cat([hidden, more], 1), torch.cat([weight, more_weight], 1)
        teacher = tuple(t.to(DTYPES[case.dtype]) for t in teacher)
    elif case.scenario == "rl":
        advantage = torch.randn(case.rows, **here)
    dtype = DTYPES[case.dtype]
    if case.scenario == "curvature":
        direction = tuple((torch.randn(x.shape, **here) * x.std()).to(dtype) for x in (hidden, weight))
    return Step(
        hidden.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(case.scenario != "lora"),
        target,
        probs,
        advantage,
        max(1, case.rows if probs is not None else int((target != IGNORE_INDEX).sum())),
        direction,
        teacher,
    )


def _real(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    stored = torch.load(real_inputs())
    hidden, target = stored["hidden"][: case.rows].clone(), stored["target"][: case.rows].clone()
    return hidden.to(case.device), stored["weight"].to(case.device), target.to(case.device)


def cache_file() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "tightrope" / f"smollm2-{REAL_ROWS}.pt"


@torch.no_grad()
def real_inputs() -> Path:
    """The file of hidden [4096, 576], weight [49152, 576], target [4096], made now where it is missing."""
    path = cache_file()
    if path.is_file():
        return path
    from .. import data, model

    network, tokenizer = model.load(None)
    tokens = tokenizer(data.read_text(None), add_special_tokens=False, verbose=False)["input_ids"]
    windows = torch.tensor(tokens[: REAL_ROWS // WINDOW * (WINDOW + 1)]).view(-1, WINDOW + 1)
    hidden = [network.base_model(batch[:, :-1], use_cache=False)[0] for batch in windows.split(4)]
    stored = {
        "hidden": torch.cat(hidden).flatten(0, 1).contiguous(),
        "weight": network.get_output_embeddings().weight.detach().clone(),
        "target": windows[:, 1:].flatten().contiguous(),
    }
    partial = path.with_suffix(".partial")  # a run that is cut short leaves no broken file
    with writing(path.parent, "XDG_CACHE_HOME"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                torch.save(stored, file)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return path
