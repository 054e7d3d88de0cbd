"""Who holds which part of the vocabulary: what a caller says, and what the ranks agree on.

Every rank of a call must make the same collectives in the same order, so all that decides on them is agreed
on first: one all-gather of a few integers, made whatever happened before it. A rank whose arguments were
refused joins it with an error, so that all ranks raise, and none waits for one that left.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .. import validation
from ..ambient import has_values
from ..arguments import ShardArguments
from . import collectives

ROWS = ("replicated", "sharded")
FACTS = 9  # int64 that each rank tells
_TEXT = 2048  # bytes of the message that travels where ranks differ
_ERRORS = {1: RuntimeError, 2: ValueError, 3: TypeError, 4: IndexError}


def process_group(group: object) -> dist.ProcessGroup:
    """A process group, that of a one-dimensional mesh, or all processes; else TypeError or ValueError."""
    if group is None and dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group: got a DeviceMesh of {group.ndim} dimensions, expected one of them, such as "
                'mesh["tp"]'
            )
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group: got {type(group).__name__}, expected a torch.distributed ProcessGroup of which this "
            "process is a member, or a one-dimensional DeviceMesh"
        )
    return group


@dataclass(frozen=True, eq=False)
class VocabParallel:
    """The ranks of a group hold the vocabulary together: each has some rows of the head.

    Shards may be uneven, padded or empty. Where ``vocab_size`` and ``start`` are None both follow from the
    ranks' rows in rank order, which takes one more small all-gather a call.

    With ``rows="replicated"`` every rank passes the same tokens (tensor parallel), gets the same loss and
    statistics, and the whole gradient of the hidden states. With ``rows="sharded"`` each rank passes tokens
    of its own (sequence parallel, or data-parallel ranks that share one head), as many as it likes, gets
    the loss of these, and their gradients; the head's gradient is that of the sum of all ranks' losses.

    Class and top-k indices are those of the whole vocabulary, as are class weights. ``bias`` has the rank's
    own rows. A dense target has the rank's own classes where rows are replicated, else all of them.

    Args:
        group: a ProcessGroup, a one-dimensional DeviceMesh, or None: all processes.
        vocab_size: classes of the vocabulary. Rows of the head beyond it are padding: they take no
            probability and get zero gradients.
        start: the class of the first row of this rank's head.
        rows: ``"replicated"`` or ``"sharded"``.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    group: dist.ProcessGroup | DeviceMesh | None
    vocab_size: int | None = None
    start: int | None = None
    rows: str = "replicated"
    process_group: dist.ProcessGroup = field(init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "process_group", process_group(self.group))
        if self.vocab_size is not None:
            object.__setattr__(self, "vocab_size", validation.integer("vocab_size", self.vocab_size, low=1))
        if self.start is not None:
            object.__setattr__(self, "start", validation.integer("start", self.start, low=0))
        validation.choice("rows", self.rows, ROWS)


def check_vocab_parallel(value: object) -> None:
    """Raise TypeError where the argument of that name is something else."""
    if value is not None and not isinstance(value, VocabParallel):
        kind = type(value).__name__
        raise TypeError(f"vocab_parallel: got {kind}, expected tightrope.VocabParallel or None")


class Agreement:
    """The ranks' agreement on one call, from its first check to the driver."""

    def __init__(self, parallel: VocabParallel):
        self.group, self.given = parallel.process_group, parallel
        self.size, self.rank = self.group.size(), self.group.rank()
        self.sharded = parallel.rows == "sharded"
        self.settled = self.size == 1  # nothing that is raised from here on concerns the others
        self.spans: list[tuple[int, int]] | None = None  # first class and rows of the head of each rank
        self.start, self.vocab_size = 0, 0
        self.tokens: list[int] | None = None  # of each rank

    @property
    def cuts_sequences(self) -> bool:
        """Whether the next token of a rank's last one may be on another rank."""
        return self.sharded

    def __enter__(self) -> Agreement:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """What was raised before the ranks agreed is raised on all of them."""
        if isinstance(error, Exception) and not self.settled and not torch.compiler.is_compiling():
            self.settled = True
            self._meet([_code(error)], _text_of(error))

    def layout(self, head: Tensor) -> int:
        """The number of classes of the vocabulary, of which those of head [V_local, ...] are here."""
        given, here = self.given, head.shape[0]
        start, vocab_size = given.start, given.vocab_size
        if self.size == 1:
            self.spans, start = [(0, here)], 0
        elif start is None or vocab_size is None:
            if torch.compiler.is_compiling():
                raise ValueError(
                    "vocab_parallel: got vocab_size or start None under torch.compile, expected both: ranks "
                    "cannot talk while a graph is traced"
                )
            own = [0, 1, here, -1 if start is None else start, vocab_size or -1, _print_of(head)]
            met = self._meet(own)
            rows, starts = [facts[2] for facts in met], [facts[3] for facts in met]
            if len({facts[4] for facts in met}) > 1 or len({s < 0 for s in starts}) > 1:
                given = [
                    f"start {s if s >= 0 else None}, vocab_size {max(f[4], 0) or None}"
                    for s, f in zip(starts, met)
                ]
                self._refuse("one vocab_size, and start on all ranks or on none", given)
            if met[0][5] and len({tuple(facts[2:6]) for facts in met}) == 1:
                self._refuse("a part of the vocabulary on each rank", [f"the same {here} rows"] * self.size)
            if start is None:
                starts = [sum(rows[:i]) for i in range(self.size)]
            self.spans, start = list(zip(starts, rows)), starts[self.rank]
        self.start = start
        self.vocab_size = vocab_size or max(first + rows for first, rows in self.spans)
        return self.vocab_size

    def settle(
        self, value: Tensor, width: int, here: int, rows: int | None, options: dict[str, object]
    ) -> ShardArguments:
        """Agree, and give what the driver is told.

        value: what has the tokens. width: D of hidden states, 0 for logits. rows: those that count; None
        where that is not looked at. options: what all ranks must have alike.
        """
        shard = ShardArguments(self.group.group_name, self.start, self.vocab_size, sharded=self.sharded)
        counts = [rows]
        unread = rows is None and self.spans is None
        silent = not has_values(value) or (unread and _device_of(self.group).type != "cpu")
        if self.size > 1 and silent:
            self.settled = True
            return replace(shard, widest=-(-self.vocab_size // self.size))
        tokens = value.shape[:-1].numel()
        if self.size == 1:
            self.tokens = [tokens]
        else:
            text = "\n".join(f"{name}={option}" for name, option in options.items())
            own = [0, 2, here, self.start, self.vocab_size, width, tokens]
            met = self._meet([*own, -1 if rows is None else rows, zlib.crc32(text.encode())], text)
            self.spans = [(facts[3], facts[2]) for facts in met]
            self.tokens, counts = [facts[6] for facts in met], [facts[7] for facts in met]
            self._check(met)
        self.settled = True
        columns = [max(min(size, self.vocab_size - start), 0) for start, size in self.spans]
        layout = [x for (start, _), size in zip(self.spans, columns) for x in (start, size)]
        if not self.sharded:
            counts = None
        elif rows is None:
            counts = self.tokens
        return replace(shard, widest=max(columns), counts=counts, layout=layout)

    def join(self, value: Tensor, rows: int | None) -> None:
        """Agree on nothing but that no rank has an error, where that costs no wait for a device."""
        if has_values(value) and (rows is not None or _device_of(self.group).type == "cpu"):
            self._meet([0])
        self.settled = True

    def total(self, own: Tensor) -> Tensor:
        """What "mean" divides by, where the tokens of this rank alone give this much."""
        return own

    def rows_together(self, own: int) -> int:
        """Tokens that are scored here, where so many are this rank's."""
        if not self.sharded:
            return own
        return own * self.size if self.tokens is None else sum(self.tokens)

    def sum_of_columns(self, dense: Tensor, sums: Callable[[Tensor], Tensor]) -> Tensor:
        """Sums over the classes of a distribution, of which each rank has some."""
        columns = max(min(dense.shape[-1], self.vocab_size - self.start), 0)
        return collectives.over_ranks(sums(dense[..., :columns]), self.group.group_name)

    def _check(self, met: list[list[int]]) -> None:
        """Raise, on all ranks alike, where what they met with does not fit together."""
        if len({facts[4] for facts in met}) > 1:
            self._refuse("one vocab_size", [facts[4] for facts in met])
        if len({facts[5] for facts in met}) > 1:
            self._refuse("hidden states of one D", [facts[5] for facts in met])
        if not self.sharded and len({tuple(facts[6:8]) for facts in met}) > 1:
            tokens = [f"{facts[6]} tokens, {facts[7]} of which count" for facts in met]
            self._refuse('the same tokens on all ranks, or rows="sharded"', tokens)
        whole = [i for i, (_, rows) in enumerate(self.spans) if rows >= self.vocab_size > 1]
        if len(whole) > 1:
            rows = [rows for _, rows in self.spans]
            self._refuse(f"a part of the {self.vocab_size} classes on each rank, not all of them", rows)
        at = 0
        for start, rows in sorted(self.spans):
            if rows and start < self.vocab_size:
                if start != at:
                    spans = [f"rows {a} to {a + n}" for a, n in self.spans]
                    self._refuse(f"heads that follow each other from 0 to {self.vocab_size}", spans)
                at = start + rows
        if at < self.vocab_size:
            self._refuse(f"heads that have {self.vocab_size} rows together", [n for _, n in self.spans])

    def _refuse(self, expected: str, have: list) -> NoReturn:
        self.settled = True
        listed = "; ".join(f"rank {rank}: {value}" for rank, value in enumerate(have))
        raise ValueError(f"vocab_parallel: got {listed}; expected {expected}")

    def _meet(self, facts: list[int], text: str = "") -> list[list[int]]:
        """The facts of each rank. Raises on all of them where one has an error, or other options."""
        device = _device_of(self.group)
        own = torch.tensor(facts + [0] * (FACTS - len(facts)), device=device)
        met = collectives.gather(own, self.group).tolist()
        wrong = [rank for rank, facts in enumerate(met) if facts[0]]
        if not wrong and len({facts[1] for facts in met}) > 1:
            given = ["not both given" if facts[1] == 1 else "both given" for facts in met]
            self._refuse("vocab_size and start given on all ranks, or on none", given)
        other = [rank for rank, facts in enumerate(met) if facts[8] != met[0][8]]
        if not wrong and not other:
            return met
        self.settled = True
        raw = text.encode()[:_TEXT]
        line = torch.frombuffer(bytearray(raw.ljust(_TEXT, b"\0")), dtype=torch.uint8).to(device)
        texts = [
            bytes(t.tolist()).rstrip(b"\0").decode(errors="replace")
            for t in collectives.gather(line, self.group)
        ]
        if wrong:
            rank = wrong[0]
            if self.rank in wrong:
                return met  # which raises its own
            raise _ERRORS[met[rank][0]](f"vocab_parallel: rank {rank} of {self.size} had {texts[rank]}")
        lines = [texts[rank].split("\n") for rank in (0, other[0])]
        first, second = next(((a, b) for a, b in zip(*lines) if a != b), ("other arguments",) * 2)
        raise ValueError(
            f"vocab_parallel: got {first} on rank 0 and {second} on rank {other[0]}, expected the same"
        )


def _code(error: Exception) -> int:
    return next((code for code, kind in _ERRORS.items() if code > 1 and isinstance(error, kind)), 1)


def _print_of(head: Tensor) -> int:
    """A number that two different heads hardly share; 0 for one that may be like others."""
    if head.shape[0] < 2 or not has_values(head):
        return 0
    ends = head.detach()[[0, -1]].double().cpu()
    if torch.equal(*ends):
        return 0
    bits = ends.view(torch.int64).flatten()
    return int((bits * torch.arange(1, 2 * len(bits), 2)).sum())  # wraps


def _text_of(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _device_of(group: dist.ProcessGroup) -> torch.device:
    """A device on which the group's backend can gather: the CPU where it can."""
    kinds = {device.type for device in group._device_types}
    return torch.device("cpu" if "cpu" in kinds or not kinds else kinds.pop())
