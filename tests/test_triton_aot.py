"""What the Triton kernels compile to, for GPUs that are not there.

Compilation runs in other processes, which TRITON_INTERPRET does not reach.
"""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from functools import cache

import pytest

from helpers import ROOT, child_environment
from tightrope.kernels import configs

HAS_TRITON = importlib.util.find_spec("triton") is not None
pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
ARCHITECTURES = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
# The configurations are chosen for Triton 3.9. What 3.6 spills in a few variants is in docs/gpu.md.
NEWEST = HAS_TRITON and tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) >= (3, 9)


def allowed_spills(row: dict) -> int:
    """The most bytes that a variant may spill."""
    if NEWEST:
        return 0
    if row["arch"] == "gfx942":
        return 1272
    return 96 if row["dtype"] == "fp64" else 48


def run(*command) -> str:
    environment = child_environment(TRITON_DEFAULT_FP_FUSION="1")
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@cache
def report(arch: str) -> dict:
    """What `aot_report.py` says of one architecture; it takes half a minute."""
    options = ("--covering", "--arch", arch, "--jobs", "2", "--json", "-")
    return json.loads(run(ROOT / "benchmarks" / "aot_report.py", *options))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiled_variants(arch):
    """Would catch a kernel that spills, or asks for more shared memory than there is.

    A covering part of what `aot_report.py --all` compiles; docs/gpu.md has what that gave.
    """
    rows = report(arch)["kernels"]
    for kernel in ("row_stats", "row_grad", "row_tangent", "row_grad_tangent", "stream_stats", "stream_grad"):
        found = [row for row in rows if row["kernel"] == kernel and row["set"] == "none"]
        for key, values in {
            "dtype": {"bf16", "fp16", "fp32"},
            "target": {"none", "index", "dense", "topk"},
            "aligned": {"all", "operands", "none"},
            "softcap": {True, False},
            "bias": {True, False},
            "active": {True, False},
        }.items():
            assert {row[key] for row in found} >= values, (kernel, key)
    for kernel in ("row_sides", "row_grad", "row_tangent", "row_grad_tangent"):
        found = [row for row in rows if row["kernel"] == kernel and row["set"] != "none"]
        assert {row["set"] for row in found} == {"threshold", "listed"}
        assert {row["dtype"] for row in found} == {"bf16", "fp16", "fp32", "fp64"}
    assert {row["target"] for row in rows if row["kernel"] == "row_grad_sums"} == {
        "none",
        "index",
        "dense",
        "topk",
    }
    for kernel in ("drawn_columns", "drawn_by_head", "drawn_by_hidden"):
        found = {(row["dtype"], row["aligned"]) for row in rows if row["kernel"] == kernel}
        assert found == {(d, a) for d in ("bf16", "fp32", "fp64") for a in ("all", "none")}
    # A Hessian-vector product of frozen parts has no use for the gradient itself.
    assert "none" in {row["out"] for row in rows if row["kernel"] == "row_grad_tangent"}
    table = configs.ARCHITECTURES[arch]
    shipped = (
        table.half,
        table.single,
        table.half_unaligned,
        table.single_unaligned,
        table.drawn_half,
        table.drawn_single,
        configs.DRAWN_UNALIGNED,
        configs.DRAWN_DOUBLE,
        *table.special.values(),
    )
    tiles = {f"{c.block_m}x{c.block_n}x{c.block_k}" for c in shipped}
    assert {row["tile"] for row in rows if "tile" in row} == tiles
    for row in rows:
        assert row["spill_bytes"] <= allowed_spills(row), row
        assert row["shared"] <= row["shared_limit"], row
    streaming = [row for row in rows if row["kernel"].startswith("stream")]
    assert len(streaming) == 2 * 8
    products = [row for row in rows if row["kernel"].startswith("drawn_by") and row["dtype"] != "fp64"]
    for row in streaming + products:  # in every dtype, float32 as well
        assert row["tensor_core"] == ARCHITECTURES[arch], row
        assert row["loop_math"] > 0, row


def test_the_roofline_has_every_shape_strategy_and_chip():
    rows = report("sm_90")["roofline"]
    assert len(rows) == 3 * 3 * len(ARCHITECTURES)
    for row in rows:
        gemms = 4 if row["strategy"] == "streaming" else 3
        assert row["teraflop"] == pytest.approx(gemms * 2e-12 * row["n"] * row["d"] * row["v"], abs=0.01)
        assert row["floor_ms"] >= row["three_gemms_ms"] * gemms / 3 * 0.999


def test_changing_a_coefficient_compiles_nothing_new():
    for strategy, counts in json.loads(run(ROOT / "tests" / "triton_recompile.py")).items():
        first = counts.pop("first")
        if strategy == "chunked":
            # On a CPU its logits are transposed; those of one row have another stride.
            counts.pop("one token")
        assert first > 0, "nothing was compiled: the test measures nothing"
        assert set(counts.values()) == {first}, (strategy, counts)
