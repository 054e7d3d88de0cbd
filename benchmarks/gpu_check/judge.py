"""Which predictions held: the report of what was measured, held against `predictions`.

python -m gpu_check.judge REPORT.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from .predictions import predictions
from .record import record


def verdicts(stages: list[dict]) -> Iterator[dict]:
    """A record a prediction; "held" is None where nothing was measured."""
    rows = {stage["name"]: stage["rows"] for stage in stages}
    for prediction in predictions():
        measured = prediction.measured(rows.get(prediction.stage, []))
        yield {
            "name": prediction.words,
            "stage": prediction.stage,
            "field": prediction.field,
            "predicted": prediction.value,
            "low": prediction.low,
            "high": prediction.high,
            "measured": measured,
            "held": None if measured is None else prediction.holds(measured),
        }


def main() -> None:
    for verdict in verdicts(json.loads(Path(sys.argv[1]).read_text())["stages"]):
        record(**verdict)


if __name__ == "__main__":
    main()
