"""Compiles the Triton kernels for GPUs that are not there, and reads what came out.

Each shipped configuration (kernels/configs.py) is compiled for its architecture in the variants that the
launcher can ask for: dtype, kind of target, softcap or none, bias or none, masked rows or none, and how the
operands of a GEMM are read. Registers, spills and shared memory come from the binary; the disassembly of the
loop over D says how many instructions are issued beside the tensor-core ones, and what the epilogue adds. Run
it without TRITON_INTERPRET.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tightrope.kernels import configs, drawn, rows, stream, tangent_rows

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KINDS = {"none": 0, "index": 1, "dense": 2, "topk": 3}
SETS = {"none": 0, "threshold": 1, "listed": 2}
KERNELS = {
    "row_stats": rows.row_stats,
    "merge_parts": rows.merge_parts,
    "row_sides": rows.row_sides,
    "merge_sides": rows.merge_sides,
    "row_grad": rows.row_grad,
    "row_tangent": tangent_rows.row_tangent,
    "merge_sums": tangent_rows.merge_sums,
    "row_grad_tangent": tangent_rows.row_grad_tangent,
    "stream_stats": stream.stream_stats,
    "stream_grad": stream.stream_grad,
    "row_grad_sums": drawn.row_grad_sums,
    "drawn_columns": drawn.drawn_columns,
    "drawn_by_head": drawn.drawn_by_head,
    "drawn_by_hidden": drawn.drawn_by_hidden,
}
MERGES = ("merge_parts", "merge_sides", "merge_sums")
SECOND = ("row_tangent", "row_grad_tangent")
# Of sampled gradients: products, and all that know neither target nor transform.
PRODUCTS = ("drawn_by_head", "drawn_by_hidden")
DRAWN = ("drawn_columns", *PRODUCTS)
# Columns of a block, without a set and with one; of kernels that have a BLOCK.
BLOCKS = {
    "row_stats": (configs.ROW_BLOCK,) * 2,
    "row_sides": (configs.SIDES_BLOCK,) * 2,
    "row_grad": (configs.GRAD_BLOCK, configs.SET_GRAD_BLOCK),
    "row_tangent": (configs.TANGENT_BLOCK,) * 2,
    "row_grad_tangent": (configs.GRAD_BLOCK, configs.SET_GRAD_BLOCK),
    "row_grad_sums": (configs.SUMS_BLOCK,) * 2,
    "drawn_columns": (configs.DRAWN_BLOCK,) * 2,
}
ROWS = {"row_grad_sums": configs.SUMS_ROWS, "drawn_columns": configs.DRAWN_ROWS}
# Blocks of a segment that one program takes.
SEGMENT_BLOCKS = {
    "row_stats": configs.ROW_BLOCKS,
    "row_sides": configs.SIDES_BLOCKS,
    "row_tangent": configs.TANGENT_BLOCKS,
}
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
ROW_DTYPES = {**DTYPES, "fp64": 8}
# In the assembly, and in the disassembly of the binary.
TENSOR_CORE = {
    "sm_80": ("mma.sync", r"HMMA"),
    "sm_90": ("wgmma.mma_async", r"HGMMA"),
    "sm_100": ("tcgen05.mma", r"UTC\w*MMA"),
    "gfx942": ("v_mfma", r"v_mfma"),
}
FUSED_MULTIPLY_ADD = r"\bFFMA2?\b"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Case:
    """A variant of a kernel. The defaults are the most that one does for operands as they mostly are."""

    kernel: str
    arch: str
    dtype: str  # of logits, or of hidden states and head
    kind: str  # of target
    capped: bool = True
    bias: bool = True
    active: bool = True  # some rows are masked
    # What is a multiple of 16: "all" sizes and addresses, those of the "operands" of a GEMM only, or "none".
    aligned: str = "all"
    out: str | None = None  # dtype of a gradient that is narrower than its logits; "none": not asked for
    sets: str = "none"  # how the set of a row is told from the rest

    @property
    def streams(self) -> bool:
        return self.kernel.startswith("stream")

    @property
    def multiplies(self) -> bool:
        return self.streams or self.kernel in PRODUCTS

    @property
    def config(self) -> configs.StreamConfig | None:
        table = configs.ARCHITECTURES[self.arch]
        if self.kernel in PRODUCTS:
            return table.drawn(ROW_DTYPES[self.dtype], self.aligned == "all")
        if not self.streams:
            return None
        if self.aligned == "none":
            return table.unaligned(DTYPES[self.dtype])
        return table.stream(self.kernel, self.kind, DTYPES[self.dtype])


def cases(archs, dtypes, kinds=("index", "dense", "topk")) -> list[Case]:
    """The variant of each kernel that does most, and of those that may have a set the one without."""
    found = []
    for arch, kernel in product(archs, KERNELS):
        known = ("threshold", "listed") if kernel == "row_sides" else ("none",)
        known += ("threshold", "listed") if kernel in ("row_grad", "row_grad_sums", *SECOND) else ()
        has_target = kernel not in (*MERGES, *DRAWN, "row_sides")
        for dtype in dtypes if kernel not in MERGES else ("fp32",):
            for kind, sets in product(kinds if has_target else ("none",), known):
                found.append(Case(kernel, arch, dtype, kind, sets=sets))
    return found


def all_cases(archs) -> list[Case]:
    """Every variant that the launcher can ask for, but that masked rows, which add a load, are always on."""
    found = []
    switch = (True, False)
    for arch in archs:
        found += [Case(kernel, arch, dtype, "none") for kernel in MERGES for dtype in ("fp32", "fp64")]
        found += drawn_cases(arch)
        for kind, capped, bias, aligned in product(KINDS, switch, switch, ("all", "operands", "none")):
            variant = {"kind": kind, "capped": capped, "bias": bias, "aligned": aligned}
            for dtype, kernel in product(DTYPES, ("stream_stats", "stream_grad")):
                found.append(Case(kernel, arch, dtype, **variant))
            for dtype in ROW_DTYPES if aligned != "operands" else ():
                found.append(Case("row_stats", arch, dtype, **variant))
                narrower = ("bf16", "fp16") if dtype == "fp32" else ()
                for out, sets in product((None, *narrower), SETS):
                    found.append(Case("row_grad", arch, dtype, out=out, sets=sets, **variant))
                if dtype in ("fp32", "fp64"):
                    found += [Case("row_grad_sums", arch, dtype, sets=sets, **variant) for sets in SETS]
                for sets in SETS:
                    found.append(Case("row_tangent", arch, dtype, sets=sets, **variant))
                    found += [
                        Case("row_grad_tangent", arch, dtype, out=out, sets=sets, **variant)
                        for out in (None, "none")
                    ]
                if kind == "none":
                    found += [
                        Case("row_sides", arch, dtype, sets=s, **variant) for s in ("threshold", "listed")
                    ]
    return found


def covering_cases(archs) -> list[Case]:
    """The variants that tests compile: of each kernel every value of every switch, and most pairs of them."""
    # Each row is a kind, then capped, bias, active, aligned and the dtype.
    plan = (
        ("index", True, True, True, "all", "bf16"),
        ("dense", True, True, False, "operands", "bf16"),
        ("dense", True, False, False, "none", "bf16"),
        ("topk", True, False, True, "operands", "fp16"),
        ("none", False, False, False, "none", "fp16"),
        ("dense", False, True, True, "operands", "fp32"),
        ("topk", False, True, True, "all", "fp32"),
        ("index", False, False, True, "none", "fp32"),
    )
    # Fewer of the row kernels with a set, among them those that hold most.
    sets_plan = (
        ("topk", True, True, True, "all", "fp64", "threshold"),
        ("topk", True, True, True, "none", "fp32", "listed"),
        ("none", False, False, False, "none", "fp16", "threshold"),
        ("dense", True, True, True, "all", "fp64", "listed"),
        ("index", False, True, True, "none", "bf16", "threshold"),
    )
    found = []
    for arch in archs:
        found += [Case(kernel, arch, dtype, "none") for kernel in MERGES for dtype in ("fp32", "fp64")]
        found += drawn_cases(arch)
        for kind, capped, bias, active, aligned, dtype in plan:
            variant = {"kind": kind, "capped": capped, "bias": bias, "active": active, "aligned": aligned}
            found += [Case(kernel, arch, dtype, **variant) for kernel in ("stream_stats", "stream_grad")]
            found.append(Case("row_stats", arch, dtype if active else "fp64", **variant))
            found.append(Case("row_grad", arch, dtype, out="bf16" if dtype == "fp32" else None, **variant))
            found.append(Case("row_tangent", arch, dtype if active else "fp64", **variant))
            wide = "fp64" if dtype == "bf16" else "fp32"
            found.append(Case("row_grad_sums", arch, wide, **variant))
            out = None if capped else "none"
            found.append(Case("row_grad_tangent", arch, dtype if active else "fp64", out=out, **variant))
        for kind, capped, bias, active, aligned, dtype, sets in sets_plan:
            variant = {"capped": capped, "bias": bias, "active": active, "aligned": aligned, "sets": sets}
            found.append(Case("row_sides", arch, dtype, "none", **variant))
            found += [Case(kernel, arch, dtype, kind, **variant) for kernel in ("row_grad", *SECOND)]
            found.append(Case("row_grad_sums", arch, "fp64" if dtype == "fp64" else "fp32", kind, **variant))
    return found


def drawn_cases(arch: str) -> list[Case]:
    """Every variant of the kernels of drawn columns."""
    kinds = product(DRAWN, ("bf16", "fp32", "fp64"), ("all", "none"))
    return [Case(kernel, arch, dtype, "none", aligned=aligned) for kernel, dtype, aligned in kinds]


def _source(case: Case) -> tuple[ASTSource, dict]:
    """What the launcher of tightrope.backends.triton would compile, and with which options."""
    kernel, config = KERNELS[case.kernel], case.config
    wide = "fp64" if case.dtype == "fp64" else "fp32"
    options = {"num_warps": configs.ROW_WARPS if case.kernel not in (*MERGES, "drawn_columns") else 4}
    constants = {
        "TARGET": KINDS[case.kind],
        "SET": SETS[case.sets],
        "CAPPED": case.capped,
        "BLOCK": BLOCKS.get(case.kernel, (None, None))[case.sets != "none"],
        "BLOCKS": SEGMENT_BLOCKS.get(case.kernel),
        "TOPK_BLOCK": configs.TOPK_BLOCK,
        "ROWS": ROWS.get(case.kernel, 8),
        "RANK": 2,
        "SPLITS": configs.MERGE_TILE // 8,
    }
    operand = {}
    if config:
        options = config.options
        constants |= config.constants | {"SEGMENTS": configs.ARCHITECTURES[case.arch].segments}
    if case.streams:
        operand = {"hidden": config.block_m, "weight": config.block_n}
    types = {
        **dict.fromkeys(("logits", "tangent", "out_tangent"), f"*{case.dtype}"),
        "out": None if case.out == "none" else f"*{case.out or case.dtype}",
        "best": "*i64",
        "argmax": "*i64",
        "active": "*i1" if case.active else None,
        "target": {"index": "*i64", "dense": f"*{wide}", "topk": "*i64", "none": None}[case.kind],
        "members": {"threshold": f"*{wide}", "listed": "*i1", "none": None}[case.sets],
        "target_prob": f"*{wide}" if case.kind == "topk" else None,
        "bias": f"*{wide}" if case.bias else None,
        "logit_scale": "fp64",
        "softcap": "fp64",
        **dict.fromkeys(("parts", "partial", "sides", "sums", "norm", "coef"), f"*{wide}"),
        **dict.fromkeys(("norm_tangent", "coef_tangent"), f"*{wide}"),
        **dict.fromkeys(("along", "basis", "factor", "grad"), f"*{wide}"),
        **dict.fromkeys(("part", "weight", "hidden"), f"*{case.dtype}"),
        **dict.fromkeys(("index", "count"), "*i64"),
        "scale": "*fp64",
    }
    if case.kernel in PRODUCTS:
        types["out"] = f"*{wide}"
    for name, block in operand.items():
        types[name] = f"*{case.dtype}"
        if config.descriptors:
            types[name] = f"tensordesc<{case.dtype}[{block},{config.block_k}]>"
    multiples = {
        "none": ("part_stride",),
        "operands": ("hidden", "weight", "width", "hidden_stride", "weight_stride"),
        "all": [n for n in kernel.arg_names if n.endswith("stride") or n in ("width", "columns")],
    }[case.aligned]
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        kind = "constexpr" if name.isupper() else types.get(name, "i32")
        signature[name] = kind or "constexpr"
        if kind is None or kind == "constexpr":
            values[(i,)] = constants.get(name)
        elif name in multiples or (case.aligned == "all" and kind.startswith("*")):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, values, attributes), options


def compile_case(case: Case) -> dict:
    """One row of the report."""
    source, options = _source(case)
    start = time.perf_counter()
    compiled = triton.compile(source, target=TARGETS[case.arch], options=options)
    row = {
        "kernel": case.kernel,
        "arch": case.arch,
        "dtype": case.dtype,
        "target": case.kind,
        "set": case.sets,
        "aligned": case.aligned,
        "softcap": case.capped,
        "bias": case.bias,
        "active": case.active,
        "out": case.out or case.dtype,
        "compile_s": round(time.perf_counter() - start, 2),
        "shared": compiled.metadata.shared,
        "shared_limit": configs.ARCHITECTURES[case.arch].shared_memory,
        "warps": options["num_warps"],
    }
    if case.config:
        c = case.config
        row["tile"] = f"{c.block_m}x{c.block_n}x{c.block_k}"
        row["descriptors"] = c.descriptors
    read = _read_amd if case.arch.startswith("gfx") else _read_nvidia
    row.update(read(case, compiled))
    return row


def _read_nvidia(case: Case, compiled) -> dict:
    assembly = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", cubin.name)
        code = _run("nvdisasm", "-c", cubin.name) if case.multiplies else ""
    # Spilled registers live on the stack, which nothing else here uses.
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups()
    return {
        "registers": int(registers),
        "spill_bytes": int(stack) + int(local),
        **_tensor_core(case, assembly, code),
    }


def _read_amd(case: Case, compiled) -> dict:
    assembly = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly).group(1))

    return {
        "registers": field("vgpr_count") + field("agpr_count"),
        # Scalar registers spill into lanes of vector ones, not to memory.
        "spill_bytes": field("private_segment_fixed_size") + 4 * field("vgpr_spill_count"),
        **_tensor_core(case, assembly, assembly if case.multiplies else ""),
    }


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


def _tensor_core(case: Case, assembly: str, code: str) -> dict:
    """Which matrix instruction there is, and what the loop around it issues for each warp."""
    if not case.multiplies or case.dtype == "fp64":  # which is for checks
        return {}
    name, machine = TENSOR_CORE[case.arch]
    found = assembly.count(name)
    loops = _loops(code, machine if found else FUSED_MULTIPLY_ADD)
    row = {"tensor_core": name if found else None}
    if loops:
        row["loop_math"], row["loop_other"] = loops[0]
        # Of stream_stats, what else the loop over tiles does; stream_grad has no such loop.
        whole = [sum(bool(_is_instruction(line)) for line in code.splitlines())]
        around = loops[-1] if case.kernel == "stream_stats" and len(loops) > 1 else whole
        row["epilogue"] = sum(around) - sum(loops[0])
    return row


def _is_instruction(line: str) -> bool:
    line = line.strip()
    if line.startswith("/*"):  # nvdisasm: an address before each instruction
        return ";" in line
    return bool(re.match(r"[a-z]+_\w+", line)) and not line.endswith(":")


def _loops(code: str, machine: str) -> list[tuple[int, int]]:
    """(matching, other) instructions of the loops that hold the matching ones, from the innermost out."""
    lines = code.splitlines()
    labels = {}
    for i, line in enumerate(lines):
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label.group(1)] = i
    spans = set()
    # Past the end of the program stand blocks that wait and jump back into it: no loops.
    ends = [i for i, line in enumerate(lines) if re.search(r"\bEXIT\b|s_endpgm", line)]
    for i, line in enumerate(lines[: max(ends, default=len(lines))]):
        jump = re.search(r"(?:BRA|s_c?branch\w*)\b.*?(\.L\w+)", line)
        if jump and labels.get(jump.group(1), i) < i:
            spans.add((labels[jump.group(1)], i))
    counted = []
    for first, last in sorted(spans, key=lambda span: span[1] - span[0]):
        body = [line for line in lines[first : last + 1] if _is_instruction(line)]
        matching = sum(bool(re.search(machine, line)) for line in body)
        if matching:
            counted.append((first, last, matching, len(body) - matching))
    innermost = [
        loop
        for loop in counted
        if not any(loop != o and loop[0] <= o[0] and o[1] <= loop[1] for o in counted)
    ]
    if not innermost:
        return []
    # Of several, the others are its remainders.
    inner = max(innermost, key=lambda loop: loop[2])
    around = [loop for loop in counted if loop[0] <= inner[0] and inner[1] <= loop[1]]
    return [loop[2:] for loop in around]
