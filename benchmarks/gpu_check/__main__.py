"""The options, and the order of a run."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

# A folder that is run has itself on the path, not its parent.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_check import machine, process, report
from gpu_check.plan import TOTAL_SECONDS, Places, Stage, stages
from gpu_check.report import FAILED, OK, SKIPPED, Outcome

ROOT = Path(__file__).resolve().parents[2]


def run_stage(stage: Stage, places: Places, left: float) -> Outcome:
    """left: seconds that the whole check still has."""
    begin = time.monotonic()

    def outcome(status: str, line: str, **rest) -> Outcome:
        seconds = time.monotonic() - begin
        return Outcome(stage.name, stage.says, status, seconds, line, stage.missing, **rest)

    if not stage.runs:
        return outcome(SKIPPED, "")
    if left <= 0:
        return outcome(FAILED, "no time was left")
    try:
        ran = process.run(stage.commands, min(stage.seconds, left), places.root, places.logs)
        reading = stage.read(ran)
    except Exception as error:  # of output that a reader has not seen before: the others shall still report
        return outcome(FAILED, f"{type(error).__name__}: {error}")
    return outcome(OK if reading.ok else FAILED, reading.line, rows=reading.rows, tail=reading.tail)


def check(out: Path, quick: bool) -> list[Outcome]:
    """Run the plan, and write the report as it grows."""
    begin, here = time.monotonic(), machine.find(ROOT)
    out.mkdir(parents=True, exist_ok=True)
    for name in report.FILES:
        (out / name).unlink(missing_ok=True)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        places = Places(ROOT, Path(scratch, "library"), Path(scratch), out.resolve())
        places.logs.mkdir(exist_ok=True)
        for stage in stages(here, places, quick):
            outcome = run_stage(stage, places, TOTAL_SECONDS - (time.monotonic() - begin))
            outcomes.append(outcome)
            said = "; ".join(filter(None, [outcome.line, outcome.missing]))
            print(f"{outcome.status:>8} {outcome.seconds:5.0f} s  {stage.name}: {said}", flush=True)
            report.write(out, here, outcomes, quick)
    return outcomes


def dry_run(quick: bool) -> None:
    here = machine.find(ROOT)
    places = Places(ROOT, Path("LIBRARY"), Path("SCRATCH"), Path("OUT"))
    for stage in stages(here, places, quick):
        print(f"{stage.name}: {stage.says}; at most {stage.seconds:.0f} s")
        for command in stage.commands:
            print("    " + " ".join(command.argv))
        if stage.missing:
            print(f"    {stage.missing}")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="gpu-check", description="Build, test, sanitise and measure on the GPU that is here, and report."
    )
    parser.add_argument("--quick", action="store_true", help="one shape, fewer tests, one sanitizer")
    parser.add_argument("--dry-run", action="store_true", help="print what would run here, and run nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-check", help="default: %(default)s")
    options = parser.parse_args()
    if options.dry_run:
        dry_run(options.quick)
        return 0
    outcomes = check(options.out, options.quick)
    print(f"written to {options.out}: {', '.join(report.FILES)}")
    return int(any(outcome.status == FAILED for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
