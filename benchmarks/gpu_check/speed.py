"""The entries of `entries` at one shape, each in turns with the three bare GEMMs: time, and the allocator's
peak.

    python -m gpu_check.speed SHAPE SECONDS

How a step is made, measured and timed is `tightrope bench`'s. Entries come in the table's order for as long
as the seconds last; one that fails, or has no memory, leaves the others their turn.
"""

from __future__ import annotations

import math
import sys
import time
import traceback
import warnings
from dataclasses import replace

import torch

from tightrope.cli.bench.cases import LOSSES, Case
from tightrope.cli.bench.figures import ratio, spread
from tightrope.cli.bench.inputs import Step, make_step
from tightrope.cli.bench.measure import StepOf, first_step, take_turns, three_gemms

from .entries import ENTRIES, SHAPES, Entry
from .record import record

LOSS = LOSSES["cross-entropy + entropy"]
ROUND_SECONDS = 1.0  # of rounds for an entry
LEAST_SECONDS = 3.0  # that are left for an entry to begin


def figures(entry: Entry, case: Case, step: Step) -> dict:
    """Of an entry that ran; "skipped" and why, where it does not take part."""
    competitor = entry.competitor()
    reason = competitor.refuses(case, LOSS)
    if reason is not None:
        return {"skipped": reason}
    loss = competitor.loss_compared(LOSS)
    memory, value = first_step(step, competitor, loss, case)
    works = {
        "gemms": lambda: three_gemms(step),
        "entry": StepOf(competitor.loss, step, loss),
    }
    for work in works.values():
        work()
    seconds = take_turns(works, step, ROUND_SECONDS)
    ordered = sorted(seconds["entry"])
    return {
        "ok": math.isfinite(value.item()),
        "x_gemms": ratio(seconds["entry"], seconds["gemms"]),
        "ms": 1e3 * ordered[len(ordered) // 2],
        "gemms_ms": 1e3 * sorted(seconds["gemms"])[len(ordered) // 2],
        "spread": spread(seconds["entry"]),
        "rounds": len(ordered),
        "memory_mb": memory / 1e6,
        "loss": value.item(),
        "on": loss.name,
    }


def attempt(entry: Entry, case: Case, step: Step) -> dict:
    """`figures`; where it fails, why. What a peer cannot do is not our failure."""
    try:
        return figures(entry, case, step)
    except torch.OutOfMemoryError:
        return {"skipped": "out of memory"}
    except Exception as error:  # of a kernel or of a peer's own code: anything
        traceback.print_exc()
        words = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return {"skipped": words} if entry.peer else {"ok": False, "error": words}


def main(name: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    warnings.simplefilter("ignore")  # the peers' own
    shape = next(case for case in SHAPES if case.name == name)
    step, made = None, None
    for entry in ENTRIES:
        case = replace(shape, scenario=entry.scenario)
        if time.monotonic() > end - LEAST_SECONDS:
            found = {"skipped": "no time was left"}
        else:
            if made != entry.scenario:
                step = None  # free the head first
                step, made = make_step(case), entry.scenario
            found = attempt(entry, case, step)
            step.forget_gradients()
            torch.cuda.empty_cache()
        record(shape=name, name=entry.name, **found)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
