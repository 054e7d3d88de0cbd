"""What the Triton kernels compile to, and what bounds them, said on paper: no GPU is needed.

    python benchmarks/aot_report.py                     every configuration, as tables
    python benchmarks/aot_report.py --arch sm_90 --dtype bf16 --kind index --no-roofline
    python benchmarks/aot_report.py --json report.json
    python benchmarks/aot_report.py --all               every variant of a launch, summed up: hours

`loop` is the loop over D, for each warp: matrix instructions and all others. `issue` is the share of the
tensor cores' time that issuing the others takes, and `epilogue` the same for what is done to each finished
tile, at D = 4096: the two run beside the tensor cores only as far as other warps have work for them.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import aot_compile
import roofline

WIDTH = 4096  # D of the epilogue's share


def shares(row: dict) -> dict:
    """Issue slots beside the matrix instructions, as shares of the tensor cores' time for the same tile."""
    if not row.get("tensor_core") or "loop_other" not in row:
        return {}
    chip = roofline.CHIPS[row["arch"]]
    m, n, k = (int(x) for x in row["tile"].split("x"))
    # A processor has four schedulers, and the warps of a program spread over them.
    slots = row["warps"] / 4 * chip.issue_cycles
    cycles = 2 * m * n / chip.flops_per_cycle(row["dtype"])
    share = {"epilogue_share": round(row["epilogue"] * slots / (cycles * WIDTH), 3)}
    share["issue_share"] = round(row["loop_other"] * slots / (cycles * k), 3)
    share["flop_per_l2_byte"] = round(2 * m * n / ((m + n) * aot_compile.DTYPES[row["dtype"]]), 1)
    return share


def collect(cases: list, jobs: int) -> list[dict]:
    if jobs <= 1:
        rows = [aot_compile.compile_case(case) for case in cases]
    else:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            rows = list(pool.map(aot_compile.compile_case, cases))
    return [{**row, **shares(row)} for row in rows]


COLUMNS = (
    ("kernel", "kernel", 16),
    ("arch", "arch", 7),
    ("dtype", "dtype", 6),
    ("target", "target", 7),
    ("set", "set", 9),
    ("tile", "tile", 11),
    ("registers", "regs", 5),
    ("spill_bytes", "spill", 6),
    ("shared", "shared", 7),
    ("shared_limit", "limit", 7),
    ("tensor_core", "tensor core", 17),
    ("loop", "loop", 8),
    ("issue_share", "issue", 6),
    ("epilogue_share", "epilogue", 9),
    ("compile_s", "seconds", 7),
)


def print_table(rows: list[dict]) -> None:
    print("".join(f"{title:<{width}} " for _, title, width in COLUMNS))
    for row in rows:
        if "loop_math" in row:
            row = {**row, "loop": f"{row['loop_math']}+{row['loop_other']}"}
        for key in ("issue_share", "epilogue_share"):
            if key in row:
                row = {**row, key: f"{row[key]:.0%}"}
        missing = "none" if row["kernel"].startswith("stream") else ""
        cells = (row.get(key) if row.get(key) is not None else missing for key, _, _ in COLUMNS)
        print("".join(f"{cell!s:<{width}} " for cell, (_, _, width) in zip(cells, COLUMNS)))


def print_summary(rows: list[dict]) -> None:
    """One line for each kernel, architecture and dtype; and every variant that spills."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["arch"], row["dtype"]), []).append(row)
    title = f"{'kernel':<16} {'arch':<7} {'dtype':<6} variants  registers  spilling  shared, at most"
    print(f"{title}  matrix instruction")
    for (kernel, arch, dtype), found in groups.items():
        registers, shared = ([row[key] for row in found] for key in ("registers", "shared"))
        used = {row["tensor_core"] or "none" for row in found if "tensor_core" in row}
        spilling = sum(row["spill_bytes"] > 0 for row in found)
        print(
            f"{kernel:<16} {arch:<7} {dtype:<6} {len(found):>8}  {min(registers):>3} - {max(registers):<3}  "
            f"{spilling:>8}  {max(shared):>15}  {', '.join(sorted(used))}"
        )
    for row in rows:
        if row["spill_bytes"]:
            print("spills:", json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=aot_compile.TARGETS, default=list(aot_compile.TARGETS))
    parser.add_argument("--dtype", nargs="+", choices=aot_compile.DTYPES, default=list(aot_compile.DTYPES))
    parser.add_argument("--kind", nargs="+", choices=aot_compile.KINDS, default=["index", "dense", "topk"])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time")
    parser.add_argument("--no-roofline", action="store_true")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="every variant, summed up")
    which.add_argument("--covering", action="store_true", help="the variants that the tests compile")
    parser.add_argument(
        "--json", metavar="FILE", help="write everything there as JSON ('-': to the terminal)"
    )
    options = parser.parse_args()
    if options.all:
        cases = aot_compile.all_cases(options.arch)
    elif options.covering:
        cases = aot_compile.covering_cases(options.arch)
    else:
        cases = aot_compile.cases(options.arch, options.dtype, options.kind)
    rows = collect(cases, options.jobs)
    paper = [] if options.no_roofline else roofline.table()
    if options.json:
        text = json.dumps({"kernels": rows, "roofline": paper}, indent=1)
        if options.json == "-":
            print(text)
            return
        with open(options.json, "w") as file:
            file.write(text + "\n")
    (print_summary if options.all else print_table)(rows)
    if paper:
        print()
        roofline.print_table(paper)


if __name__ == "__main__":
    main()
