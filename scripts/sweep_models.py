"""Fuses tiny models of every type of AutoModelForCausalLM and compares them with the unfused: docs/models.md.

The work is that of `tests/integrations/model_sweep.py`, which the tests run on a sample of the types.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "integrations"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", help="of these alone: a,b,c")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--write", action="store_true", help="write docs/models.md")
    arguments = parser.parse_args()
    if arguments.write and arguments.types:
        parser.error("--write: got it beside --types, expected every type: the page is of all of them")

    # Not above: the processes of the sweep run that again.
    import model_sweep
    from tiny_configs import causal_types

    types = causal_types()
    if arguments.types:
        asked = arguments.types.split(",")
        if unknown := sorted(set(asked) - set(types)):
            parser.error(f"--types: got {', '.join(unknown)}, expected types of AutoModelForCausalLM")
        types = asked
    results = []
    for result in model_sweep.sweep(types, workers=arguments.workers):
        results.append(result)
        remark = f"  {result.remark}" if result.remark else ""
        print(f"[{len(results):3d}/{len(types)}] {result.model_type:26s} {result.status}{remark}", flush=True)
    print(model_sweep.totals(results))
    if arguments.write:
        model_sweep.TABLE.write_text(model_sweep.as_markdown(results), encoding="utf-8")
        print(f"wrote {model_sweep.TABLE.relative_to(ROOT)}")
    return any(result.status in model_sweep.FAILURES for result in results)


if __name__ == "__main__":
    raise SystemExit(main())
