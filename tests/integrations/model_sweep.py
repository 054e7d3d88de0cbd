"""Fused against unfused, for any model type: the same tiny model and batch, its loss and every gradient.

The types are tried in processes, which are made anew where one crashes or hangs: that is a row of the table,
and not the end of the sweep.
"""

import copy
import inspect
import multiprocessing
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from tiny import Watch, loss_and_gradients, off
from tiny_configs import VOCAB, model_class, tiny_batch, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

import tightrope.integrations

# Of differences relative to a tensor's largest entry. float32 is for the types that do not run in float64.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}
# Seconds, for one type, and for a new process to import.
TIME_LIMIT, IMPORTING = 60.0, 60.0

TRAINS = "trains"
TABLE = Path(__file__).resolve().parents[2] / "docs" / "models.md"

FUSED, MATERIALISED = "fused", "materialised"
WRONG, CRASHED, SILENT = "wrong", "crashed", "silent"
UNTRAINED = "unfused does not train"
FAILURES = (WRONG, CRASHED, SILENT)


class Result(NamedTuple):
    """What came of a type."""

    model_type: str
    status: str
    remark: str = ""
    error: float = 0.0  #: the largest difference from the unfused model, relative


Trains = Callable[[], None]
Check = Callable[[str, Trains], tuple[str, str, float]]


def sweep(
    types: Iterable[str], workers: int = 2, time_limit: float = TIME_LIMIT, check: Check | None = None
) -> Iterator[Result]:
    """A result for each type, in the order in which they end.

    check: tries one type, in place of `compare`; a function of a module that a new process can import.
    """
    waiting = list(types)[::-1]
    idle = [_Worker(check or compare, time_limit) for _ in range(min(workers, len(waiting)))]
    busy: list[_Worker] = []
    try:
        while waiting or busy:
            while waiting and idle:
                busy.append(idle.pop())
                busy[-1].start(waiting.pop())
            soonest = min(worker.deadline for worker in busy)
            wait([worker.pipe for worker in busy], timeout=max(0.0, soonest - time.monotonic()))
            for worker in list(busy):
                result = worker.result()
                if result is not None:
                    busy.remove(worker)
                    idle.append(worker)
                    yield result
    finally:
        for worker in busy + idle:
            worker.kill()


class _Worker:
    """A process that tries one type after another, and is made anew where one takes it down."""

    def __init__(self, check: Check, time_limit: float):
        self._check, self._time_limit = check, time_limit
        self._process = None

    def start(self, model_type: str) -> None:
        self._model_type, self._trains = model_type, False
        seconds = self._time_limit
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self._process = context.Process(target=_work, args=(self._check, theirs), daemon=True)
            self._process.start()
            theirs.close()
            seconds += IMPORTING
        self.pipe.send(model_type)
        self.deadline = time.monotonic() + seconds

    def result(self) -> Result | None:
        """The result of the type, where there is one by now."""
        try:
            while self.pipe.poll():
                said = self.pipe.recv()
                if said != TRAINS:
                    return Result(self._model_type, *said)
                self._trains = True
        except (EOFError, ConnectionError):
            self._process.join(IMPORTING)
            return self._lost(f"its process died, exit code {self._process.exitcode}")
        if time.monotonic() < self.deadline:
            return None
        return self._lost(f"no end within {self._time_limit:.0f} s")

    def _lost(self, how: str) -> Result:
        self.kill()
        return Result(self._model_type, CRASHED if self._trains else UNTRAINED, how)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self.pipe.close()
            self._process = None


def _work(check: Check, pipe: Connection) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    warnings.simplefilter("ignore")
    with suppress(EOFError):
        while True:
            pipe.send(check(pipe.recv(), lambda: pipe.send(TRAINS)))


def compare(model_type: str, trains: Trains) -> tuple[str, str, float]:
    """A status, a remark and the largest difference, of a type. Calls ``trains()`` if it trains unfused."""
    if "labels" not in inspect.signature(model_class(model_type).forward).parameters:
        return UNTRAINED, "its forward takes no labels", 0.0
    for dtype in TOLERANCE:
        try:
            model, batch = _model_and_batch(model_type, dtype)
            unfused = copy.deepcopy(model)
            expected = _step(unfused, batch)
        except Exception as error:
            failed = _in_a_line(error)
        else:
            break
    else:
        return UNTRAINED, failed, 0.0
    trains()
    try:
        handle = tightrope.integrations.fuse(model)
        with Watch(batch, VOCAB) as watch:
            found = _step(model, batch)
    except Exception as error:
        return CRASHED, _in_a_line(error), 0.0
    error = off(found, expected)
    if not error <= TOLERANCE[dtype]:
        return WRONG, f"differs by {error:.1e} in {dtype}", error
    if handle.materialized:
        remark = "because of " + ", ".join(name for name in handle.materialized if name != "loss")
        return MATERIALISED, remark if handle.stats else f"{remark}; without a balance only", error
    if watch.made or handle.stats is None:
        return SILENT, f"no warning, and logits from {watch.made}", error
    return FUSED, "" if dtype is torch.float64 else f"compared in {dtype}", error


def _model_and_batch(model_type: str, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = tiny_model(model_type).to(dtype)
    if dtype is torch.float64:
        model.set_experts_implementation("eager")  # others have no float64
    batch = tiny_batch(model)
    return model, {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()}


def _step(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(1)
    step = loss_and_gradients(model, batch)
    if not step["loss"].isfinite():
        raise ArithmeticError(f"its loss is {step['loss']}")
    return step


def _in_a_line(error: Exception) -> str:
    """Its first sentence: what transformers says of a missing library goes on for several."""
    text = " ".join(str(error).split()).split(". ")[0]
    return f"{type(error).__name__}: {text[:120]}".replace("|", "/")


def totals(results: list[Result]) -> str:
    """How many types have each status, in a sentence."""
    count = Counter(result.status for result in results)
    trained = len(results) - count[UNTRAINED]
    share = 100 * count[FUSED] / max(trained, 1)
    others = ", ".join(f"{count[status]} {status}" for status in (MATERIALISED, *FAILURES))
    return (
        f"{len(results)} types, of which {trained} train unfused on the CPU; of those {count[FUSED]} are "
        f"fused ({share:.1f} %), {others}."
    )


def as_markdown(results: list[Result]) -> str:
    """The page `TABLE`, of results for every type."""
    cells = [(r.model_type, model_class(r.model_type).__name__, r.status, r.remark) for r in sorted(results)]
    versions = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"
    return _PAGE.format(
        versions=versions, totals=totals(results), rows="\n".join(f"| {' | '.join(row)} |" for row in cells)
    )


def recorded() -> dict[str, str]:
    """The status of each type, as `TABLE` has it."""
    rows = (line.strip("| ").split(" | ") for line in TABLE.read_text(encoding="utf-8").splitlines())
    return {row[0]: row[2] for row in rows if len(row) >= 3 and row[0] not in ("Type", "---")}


_PAGE = """# Model types

What `tightrope.integrations.fuse` does with each model type of transformers' `AutoModelForCausalLM`, tried on
tiny random models: the loss and every gradient beside those of the same model unfused, in float64 to 1e-12 of
a tensor's largest entry. `python scripts/sweep_models.py --write` wrote this page, with {versions}.

{totals}

- **fused**: equal, and no logits were made.
- **materialised**: equal, and a warning named the operation that needed the logits.
- **unfused does not train**: there is nothing to compare with.

| Type | Class | Status | Remark |
| --- | --- | --- | --- |
{rows}
"""
