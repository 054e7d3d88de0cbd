"""What ``make gpu-check`` makes of what its stages print: on output as the tools print it, without a GPU."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers import child_environment

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import bandwidth
from gpu_check import __main__ as main
from gpu_check import plan, process, readings, report
from gpu_check.machine import Machine
from gpu_check.plan import Places, Stage
from gpu_check.process import Command, Ran

EVERYTHING = dict.fromkeys(
    ("torch", "triton", "setuptools", "ninja", "pybind11", "pytest", "hypothesis", "transformers"), "1"
)
H100 = Machine(
    python="3.12.3",
    packages=EVERYTHING,
    cuda="13.0",
    gpu="NVIDIA H100",
    capability=(9, 0),
    memory_gib=79.2,
    tools={name: f"/usr/local/cuda/bin/{name}" for name in ("nvcc", "compute-sanitizer", "ncu")},
)
LAPTOP = Machine(python="3.11.7", packages=EVERYTHING)
BARE = Machine(python="3.12.3", error="ModuleNotFoundError: No module named 'torch'")


@pytest.fixture
def places(tmp_path):
    found = Places(ROOT, tmp_path / "library", tmp_path, tmp_path / "out")
    found.logs.mkdir(parents=True)
    return found


def ran(output, code=0, name="it", seconds=3.0):
    return [Ran(name, code, seconds, output)]


# Reading


PYTEST = """\
============================= test session starts ==============================
collecting ... collected 4 items

tests/gpu/test_triton_gpu.py::test_float64[dtype0] PASSED                [ 25%]
tests/gpu/test_triton_gpu.py::test_graph[a b] FAILED                     [ 50%]
tests/gpu/test_triton_gpu.py::test_devices SKIPPED (needs two CUDA de...) [ 75%]
tests/gpu/test_triton_gpu.py::test_memory ERROR                          [100%]

=========================== short test summary info ============================
SKIPPED [1] tests/gpu/test_triton_gpu.py:172: needs two CUDA devices
FAILED tests/gpu/test_triton_gpu.py::test_graph[a b] - AssertionError: assert False
ERROR tests/gpu/test_triton_gpu.py::test_memory - RuntimeError: out of memory
============= 1 failed, 1 passed, 1 skipped, 1 error in 3.21s ==============
"""


def test_the_verdicts_of_pytest():
    """Fails if a failure in a parametrised test, or an error, is not counted, or one is counted twice."""
    reading = readings.pytest(ran(PYTEST, code=1))
    assert not reading.ok
    assert "1 passed, 1 failed, 1 skipped, 1 error of 4" in reading.line
    assert [row["name"].partition("::")[2] for row in reading.rows] == ["test_graph[a b]", "test_memory"]
    assert "out of memory" in reading.tail


def test_a_pytest_that_passes():
    """Fails if a good run is not taken as good; tests that -k leaves out are not waited for."""
    passed = PYTEST.replace("FAILED", "PASSED").replace("ERROR", "PASSED")
    assert readings.pytest(ran(passed)).ok
    some = passed.replace("collected 4 items", "collected 285 items / 281 deselected / 4 selected")
    assert "of 4" in readings.pytest(ran(some)).line
    assert readings.pytest(ran(some)).ok


@pytest.mark.parametrize(
    ("output", "code"),
    [
        (PYTEST.partition("tests/gpu/test_triton_gpu.py::test_graph")[0], None),  # ended for its time
        (PYTEST.partition("tests/gpu/test_triton_gpu.py::test_graph")[0], 0),
        (PYTEST.partition("tests/gpu/test_triton_gpu.py::test_graph")[0], -signal.SIGSEGV),
        ("ImportError while loading conftest\n", 4),
        ("", 0),
    ],
)
def test_a_pytest_that_ended_early_is_not_good(output, code):
    """Fails if tests that never ran count as passed; what did run is still said."""
    reading = readings.pytest(ran(output, code))
    assert not reading.ok
    assert ("1 passed of 4" if "PASSED" in output else "no verdict of 0") in reading.line


def test_collecting():
    """Fails if a collection with an import error, or of nothing, passes as one of tests."""
    good = "tests/gpu/test_cuda_gpu.py::test_a\n\n285 tests collected in 1.57s\n"
    assert readings.collected(ran(good)).ok
    assert "285 tests collected" in readings.collected(ran(good)).line
    assert not readings.collected(ran("ERROR tests/gpu/test_cuda_gpu.py\n1 error in 0.5s", 2)).ok
    assert not readings.collected(ran("no tests ran in 0.01s\n", 5)).ok


MEMCHECK = """\
========= COMPUTE-SANITIZER
cuda row_stats bfloat16 index
========= Invalid __global__ read of size 16 bytes
=========     at void tightrope::cuda::row_stats_kernel<__nv_bfloat16, (bool)1>(RowArgs, int)+0x3a0
=========     by thread (31,0,0) in block (6,0,0)
=========     Access at 0x7f2c3e3ffff0 is out of bounds
=========     and is 16 bytes after the nearest allocation at 0x7f2c3e3f0000 of size 65,520 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: cudaLaunchKernel [0x6f5b] in _C_cuda.so
=========
========= Invalid __global__ read of size 16 bytes
=========     at void tightrope::cuda::row_grad_kernel<float, float, (bool)1>(RowArgs)+0x3a0
=========
========= Target application returned an error
========= ERROR SUMMARY: 32 errors
========= ERROR SUMMARY: 12 errors were not printed. Use --print-limit option
"""
RACECHECK = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at row_stats_kernel(RowArgs)+0x9b0 in row_stats.cuh:60
=========     and Read access at row_stats_kernel(RowArgs)+0xa10 in row_stats.cuh:71 [248 hazards]
=========
========= Potential invalid __shared__ read of size 4 bytes
=========     at row_loss_grad_kernel(RowArgs)+0x170 in row_loss_grad.cuh:60
=========     Address 0x1000400 is located in a block that might have already exited
=========
========= RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)
"""


def test_the_summaries_of_compute_sanitizer():
    """Fails if errors of any tool are not found or counted twice, or a warning counts as an error."""
    clean = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
    warned = "========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)\n"
    tools = [*ran(clean, name="memcheck"), *ran(warned, name="racecheck"), *ran(clean, name="initcheck")]
    assert readings.sanitizer(tools).ok
    assert "racecheck: 0 errors, 2 warnings" in readings.sanitizer(tools).line
    bad = readings.sanitizer([*ran(MEMCHECK, name="memcheck"), *ran(RACECHECK, name="racecheck")])
    assert not bad.ok
    assert [row["errors"] for row in bad.rows] == [32, 1]
    assert bad.rows[0]["what"] == [
        "Invalid __global__ read of size 16 bytes",
        "Target application returned an error",
    ]
    assert [what.partition(" at ")[0] for what in bad.rows[1]["what"]] == [
        "Error: Race reported between Write access",
        "Potential invalid __shared__ read of size 4 bytes",
    ]


def test_a_sanitizer_in_parts():
    """Fails if errors in a part are lost, or a part that ended early hides behind the others."""
    clean = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
    parts = [*ran(clean, name="memcheck-0"), *ran(clean, name="memcheck-1")]
    assert readings.sanitizer(parts).line == "memcheck: 0 errors"
    assert [
        row["errors"] for row in readings.sanitizer([*parts, *ran(MEMCHECK, name="memcheck-2")]).rows
    ] == [32]
    cut = readings.sanitizer([*parts, *ran("========= COMPUTE-SANITIZER\n", name="memcheck-2")])
    assert not cut.ok
    assert cut.line == "memcheck: 0 errors; memcheck-2: no summary"


def test_a_sanitizer_without_a_summary_found_out_nothing():
    """Fails if a tool that could not run, or whose program crashed, passes."""
    crashed = "========= COMPUTE-SANITIZER\n========= Target application returned an error\n"
    assert "no summary" in readings.sanitizer(ran(crashed, code=0)).line
    assert not readings.sanitizer(ran(crashed, code=0)).ok
    clean = "========= ERROR SUMMARY: 0 errors\n"
    assert not readings.sanitizer(ran(clean, code=1)).ok


NCU = """\
==PROF== Connected to process 4242 (/usr/bin/python3.12)
cuda row_stats bfloat16 index
==PROF== Profiling "row_stats_kernel" - 0: 0%....50%....100% - 1 pass
==PROF== Disconnected from process 4242
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size",\
"Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"
"0","42","python3.12","127.0.0.1","void row_stats_kernel<bf16, (bool)1>(RowArgs<bf16>, int (*)(int))",\
"1","7","(256, 1, 1)","(7, 1, 1)","0","9.0","Command line profiler metrics","gpu__time_duration.sum",\
"ns","1,234.50"
"0","42","python3.12","127.0.0.1","void row_stats_kernel<bf16, (bool)1>(RowArgs<bf16>, int (*)(int))",\
"1","7","(256, 1, 1)","(7, 1, 1)","0","9.0","Command line profiler metrics","launch__registers_per_thread",\
"register/thread","64"
"1","42","python3.12","127.0.0.1","stream_stats","1","7","(256, 1, 1)",\
"(7, 1, 1)","0","9.0","Command line profiler metrics","gpu__time_duration.sum","ns","99"
"1","42","python3.12","127.0.0.1","stream_stats","1","7","(256, 1, 1)",\
"(7, 1, 1)","0","9.0","Command line profiler metrics",\
"dram__throughput.avg.pct_of_peak_sustained_elapsed","","n/a"
"""


def test_the_table_of_ncu():
    """Fails if commas or casts in names or numbers shift a column or cut a name, if a program's own lines are
    taken for rows, or a counter that the card has not costs the others."""
    reading = readings.ncu(ran(NCU))
    assert reading.ok
    assert reading.rows == [
        {
            "name": "void row_stats_kernel<bf16, (bool)1>",
            "gpu__time_duration.sum": 1234.5,
            "launch__registers_per_thread": 64.0,
        },
        {"name": "stream_stats", "gpu__time_duration.sum": 99.0},
    ]


def test_ncu_that_may_not_read_counters():
    """Fails if the usual refusal of a shared machine passes, or is not said in words."""
    refusal = (
        "==PROF== Connected to process 4242 (/usr/bin/python3.12)\n==ERROR== ERR_NVGPUCTRPERM - The user "
        "does not have permission to access NVIDIA GPU Performance Counters on the target device 0.\n"
        "==PROF== Disconnected from process 4242\n==WARNING== No kernels were profiled.\n"
    )
    reading = readings.ncu(ran(refusal, code=1))
    assert not reading.ok
    assert "administrators" in reading.line


BANDWIDTH = """\
NVIDIA H100 80GB HBM3, torch 2.11.0+cu130, _C_cuda, for 9.0a
 bfloat16 V   32000 x  16777  copy                    0.740 ms     2902 GB/s   1.00 of copy
 bfloat16 V   32000 x  16777  row_stats               0.400 ms     2684 GB/s   0.92 of copy
  float32 V  262144 x   1024  row_stats + row_grad    1.400 ms     2301 GB/s   0.79 of copy
"""


def test_the_lines_of_bandwidth():
    """Fails if a kernel whose name has blanks is lost, or the copy itself is called the slowest."""
    reading = readings.bandwidth(ran(BANDWIDTH))
    assert reading.ok
    assert [row["name"] for row in reading.rows] == ["copy", "row_stats", "row_stats + row_grad"]
    assert reading.rows[2] == {
        "dtype": "float32",
        "vocab": 262144,
        "name": "row_stats + row_grad",
        "ms": 1.4,
        "gb_per_s": 2301.0,
        "of_copy": 0.79,
    }
    assert "0.79" in reading.line
    assert not readings.bandwidth(ran("bandwidth: needs a CUDA device", code=1)).ok


def test_the_format_of_bandwidth_is_the_one_that_is_read():
    """Fails if benchmarks/bandwidth.py prints other lines than the recorded ones."""
    result = {"dtype": "float32", "vocab": 128256, "rows": 8371, "kernel": "fused, to bfloat16", "ms": 1.0}
    result |= {"gb_per_s": 2900.0, "of_copy": 0.97}
    (row,) = readings.bandwidth(ran(bandwidth.line(result) + "\n")).rows
    assert (row["name"], row["vocab"], row["of_copy"]) == ("fused, to bfloat16", 128256, 0.97)


def test_records_of_a_child():
    """Fails if a record that was cut off in the middle, or what a library prints, breaks the others."""
    good = '@ {"name": "chunked", "ok": true, "ms": 46.1}'
    output = f'warning: something\n{good}\n@ {{"name": "str'
    reading = readings.recorded(ran(output, code=None, seconds=45))
    assert reading.rows == [{"name": "chunked", "ok": True, "ms": 46.1}]
    assert not reading.ok
    assert "took more than 45 s" in reading.line
    assert readings.recorded(ran(good)).ok


def test_a_wrong_record_is_named_and_a_peer_that_is_absent_is_not_wrong():
    """Fails if an error within one call is lost among the others, or a missing peer fails the stage."""
    absent = '@ {"name": "Liger", "skipped": "liger-kernel is not installed"}'
    wrong = '@ {"name": "top-k", "ok": false, "error": "CUDA error"}'
    assert readings.recorded(ran(f'@ {{"name": "a", "ok": true}}\n{absent}')).ok
    reading = readings.recorded(ran(f"{absent}\n{wrong}"))
    assert not reading.ok
    assert "1 wrong: top-k" in reading.line and "1 not run" in reading.line
    assert not readings.recorded(ran("")).ok


# Running


def python(name, code):
    return Command(name, (sys.executable, "-c", code))


def test_a_command_that_hangs_is_ended_with_its_children(places):
    """Fails if a hang outlasts its limit, takes its report with it, or leaves a child on the GPU."""
    child = "import time; time.sleep(60)"
    code = (
        "import subprocess, sys, time; print('before', flush=True);"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid, flush=True); time.sleep(60)"
    )
    begin = time.monotonic()
    hung, quick = process.run(
        [python("hangs", code), python("quick", "print(1)")], 4, places.root, places.logs
    )
    assert time.monotonic() - begin < 40
    assert hung.timed_out and hung.code is None
    assert hung.output.startswith("before")
    assert (quick.code, quick.output) == (0, "1\n")
    pid = hung.output.split()[1]
    status = Path(f"/proc/{pid}/stat")
    deadline = time.monotonic() + 10
    while status.exists() and status.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not status.exists() or status.read_text().split()[2] == "Z"


def test_a_command_that_is_not_there(places):
    """Fails if a missing tool takes the whole check down."""
    (result,) = process.run([Command("tool", ("/no/such/tool", "-x"))], 5, places.root, places.logs)
    assert result.code == 127
    assert "No such file" in result.output


def stage(commands, read=readings.recorded, **rest):
    return Stage("a stage", "what it says", 20, commands, read, **rest)


def test_stages_fail_alone(places):
    """Fails if an exit code, a crash or a reader that stumbles is not reported as that stage's failure."""
    good = python("good", 'print(\'@ {"name": "x", "ok": true}\')')
    crash = python("crash", "import os; os.abort()")

    def stumbles(_):
        raise KeyError("a column")

    outcomes = [
        main.run_stage(stage([good]), places, 100),
        main.run_stage(stage([crash]), places, 100),
        main.run_stage(stage([good], read=stumbles), places, 100),
        main.run_stage(stage([good]), places, 0),
        main.run_stage(stage((), missing="no CUDA device"), places, 100),
    ]
    assert [o.status for o in outcomes] == ["ok", "failed", "failed", "failed", "not run"]
    assert f"code {-signal.SIGABRT}" in outcomes[1].line
    assert "KeyError" in outcomes[2].line
    assert outcomes[3].line == "no time was left"
    assert outcomes[4].missing == "no CUDA device"


def test_the_time_that_is_left_ends_a_stage(places):
    """Fails if a stage may use its whole limit when the check as a whole has less."""
    begin = time.monotonic()
    outcome = main.run_stage(stage([python("slow", "import time; time.sleep(60)")]), places, 1.0)
    assert outcome.status == "failed"
    assert time.monotonic() - begin < 15


# The plan


@pytest.mark.parametrize("quick", [False, True])
def test_everything_on_a_gpu_fits_the_time(quick, places):
    """Fails if a limit grows until the whole no longer ends within nine minutes, or a stage is left out."""
    stages = plan.stages(H100, places, quick)
    assert sum(s.seconds for s in stages) <= plan.TOTAL_SECONDS
    assert all(s.runs and s.missing is None for s in stages)
    names = [s.name for s in stages]
    assert names[:3] == ["build", "smoke", "speed llama3-8b"]
    assert names[-1] == "predictions"
    assert ("ncu" in names) != quick
    logs = [c.name for s in stages for c in s.commands]
    assert len(set(logs)) == len(logs)  # a log of one is not written over by another


def test_quick_is_quicker(places):
    """Fails if --quick does not spare time."""
    whole, quick = (sum(s.seconds for s in plan.stages(H100, places, q)) for q in (False, True))
    assert quick < 0.75 * whole


def test_without_a_gpu(places):
    """Fails if what needs no GPU is left out, or what needs one is started."""
    stages = {s.name: s for s in plan.stages(LAPTOP, places, False)}
    assert [name for name, s in stages.items() if s.runs] == ["build", "tests", "predictions"]
    assert stages["build"].commands[0].environment["TIGHTROPE_BUILD_EXT"] == "0"
    assert "--collect-only" in stages["tests"].commands[0].argv
    assert all("no CUDA" in s.missing for name, s in stages.items() if name != "predictions")


def test_a_toolkit_without_a_gpu_still_builds(places):
    """Fails if the extension is not compiled where it can be, as on a machine that only builds."""
    builder = Machine(packages=EVERYTHING, cuda="13.0", tools={"nvcc": "/usr/local/cuda/bin/nvcc"})
    build = plan.stages(builder, places, False)[0]
    assert build.missing is None
    assert build.commands[0].environment["TIGHTROPE_CUDA"] == "only"
    assert build.commands[0].environment["TORCH_CUDA_ARCH_LIST"] == "9.0a"


def test_without_torch_nothing_runs_and_all_say_why(places):
    """Fails if a Python without packages ends in tracebacks instead of a line a stage."""
    stages = plan.stages(BARE, places, False)
    assert not any(s.runs for s in stages)
    assert all(s.missing for s in stages)


@pytest.mark.parametrize(
    ("capability", "expected"), [((9, 0), "9.0a"), ((8, 0), "8.0"), ((12, 0), "12.0"), (None, "9.0a")]
)
def test_the_architecture_that_is_compiled_for(capability, expected):
    """Fails if clusters, which 9.0a has, are compiled out on an H100, or another card gets its code."""
    assert Machine(capability=capability).architecture == expected


# The report


def outcome(name, status="ok", **rest):
    fields = {"says": "what it says", "seconds": 12.3, "line": "said", "missing": None} | rest
    return report.Outcome(name, status=status, **fields)


def test_the_report_of_a_good_run(tmp_path):
    """Fails if a figure, the card, or what could not be checked does not reach the page or the JSON."""
    speed = {"shape": "llama3-8b", "name": "chunked, fused", "ok": True, "x_gemms": 1.2345, "ms": 46.04}
    held = {"name": "a", "field": "x_gemms", "predicted": 1.2, "low": 1.0, "high": 1.4, "measured": 1.23}
    rows = [held | {"held": True}, held | {"name": "b", "measured": 2.0, "held": False}]
    rows.append(held | {"name": "c", "measured": None, "held": None})
    outcomes = [
        outcome("build"),
        outcome("speed llama3-8b", rows=[speed, {"name": "Liger", "skipped": "not | installed"}]),
        outcome("ncu", status="not run", line="", missing="no ncu"),
        outcome("tests", status="failed", tail="assert 1 == 2"),
        outcome("predictions", rows=rows),
    ]
    report.write(tmp_path, H100, outcomes, quick=False)
    whole = json.loads((tmp_path / "report.json").read_text())
    assert whole["machine"]["gpu"] == "NVIDIA H100"
    assert whole["stages"][1]["rows"][0] == speed
    page = (tmp_path / "report.md").read_text()
    assert "**NVIDIA H100** (9.0, 79.2 GiB)" in page
    assert "| chunked, fused | 1.23 | 46 |" in page
    assert "not \\| installed" in page
    assert "| ncu: what it says | not run | 12 | no ncu |" in page
    assert "assert 1 == 2" in page
    assert "| a, x_gemms | 1.20 (1.00 to 1.40) | 1.23 | held |" in page
    assert "| b, x_gemms | 1.20 (1.00 to 1.40) | 2.00 | **did not hold** |" in page
    assert "1 of 2 predictions held; 1 were not measured." in page


def test_the_report_without_a_gpu(tmp_path):
    """Fails if the page breaks where nothing was measured."""
    row = {
        "name": "a",
        "field": "x",
        "predicted": 1.0,
        "low": 0.5,
        "high": 2.0,
        "measured": None,
        "held": None,
    }
    report.write(tmp_path, BARE, [outcome("predictions", rows=[row])], quick=True)
    page = (tmp_path / "report.md").read_text()
    assert "**no GPU**" in page
    assert "No module named 'torch'" in page
    assert "0 of 0 predictions held; 1 were not measured." in page


def test_a_whole_run_where_one_stage_fails(tmp_path, monkeypatch, capsys):
    """Fails if the check does not end in 1, stops at a failure, or leaves no report of what it knew."""
    good = python("good", 'print(\'@ {"name": "x", "ok": true}\')')
    bad = python("bad", "raise SystemExit(3)")
    made = [stage([bad]), stage([good]), stage((), missing="no CUDA device")]
    monkeypatch.setattr(main, "stages", lambda *_: made)
    monkeypatch.setattr(main.machine, "find", lambda root: LAPTOP)
    monkeypatch.setattr(sys, "argv", ["gpu-check", "--out", str(tmp_path / "out")])
    assert main.main() == 1
    assert [s["status"] for s in json.loads((tmp_path / "out" / "report.json").read_text())["stages"]] == [
        "failed",
        "ok",
        "not run",
    ]
    said = capsys.readouterr().out
    assert "bad ended with code 3" in said and "no CUDA device" in said
    made[0] = made[1]
    assert main.main() == 0


# Predictions


@pytest.fixture(scope="module")
def predicted():
    from gpu_check import entries, judge, predictions

    return SimpleNamespace(entries=entries, judge=judge, predictions=predictions)


def test_the_table_in_the_documentation(predicted):
    """Fails if docs/gpu.md promises other figures than those that are checked."""
    assert predicted.predictions.table() in (ROOT / "docs" / "gpu.md").read_text()


def test_a_prediction_is_held_against_its_own_record(predicted):
    """Fails if a figure of another shape or entry decides, or one out of the band is called held."""
    first = next(predicted.predictions.predictions())
    own = first.names | {"x_gemms": first.value * 1.01}
    other = own | {"shape": "qwen3-8b", "x_gemms": 99.0}

    def verdict(*rows):
        stages = [{"name": first.stage, "rows": list(rows)}]
        return next(predicted.judge.verdicts(stages))

    assert verdict(other, own)["held"] is True
    assert verdict(own | {"x_gemms": first.high * 1.01})["held"] is False
    assert verdict(own | {"x_gemms": float("nan")})["held"] is False
    assert verdict(other)["held"] is None
    assert verdict(first.names | {"skipped": "out of memory"})["held"] is None


SPEED = """\
@ {"shape": "llama3-8b", "name": "chunked, fused", "ok": true, "x_gemms": 1.19, "ms": 45.1, "gemms_ms": 37.9}
@ {"shape": "llama3-8b", "name": "sampled, made in full", "ok": true, "x_gemms": 1.2, "ms": 45.2}
@ {"shape": "llama3-8b", "name": "teacher's head", "ok": true, "x_gemms": 2.41, "ms": 91.3, "gemms_ms": 37.9}
@ {"shape": "llama3-8b", "name": "Hessian-vector product", "skipped": "out of memory"}
@ {"shape": "qwen3.5-2b", "name": "Hessian-vector product", "ok": true, "x_gemms": 3.4, "ms": 251.0}
"""


def test_predictions_of_what_is_not_a_plain_step(predicted):
    """Fails if a sampled step, a teacher's head or a Hessian-vector product is measured and not judged, or
    held against another shape's."""
    stages = [
        {"name": f"speed {shape}", "rows": readings.recorded(ran(SPEED)).rows}
        for shape in ("llama3-8b", "qwen3.5-2b")
    ]
    held = {row["name"]: row["held"] for row in predicted.judge.verdicts(stages) if row["held"] is not None}
    assert held == {
        "llama3-8b, chunked, fused": True,
        "llama3-8b, sampled, made in full": False,
        "llama3-8b, teacher's head": True,
        "qwen3.5-2b, Hessian-vector product": True,
    }


def test_an_entry_is_measured_in_its_scenario(predicted, monkeypatch):
    """Fails if the loss of an entry does not take what its scenario gives, or a Hessian-vector product is
    none."""
    from gpu_check import speed
    from tightrope.cli.bench.inputs import make_step

    monkeypatch.setattr(speed, "ROUND_SECONDS", 0.01)
    entries = {entry.name: entry for entry in predicted.entries.ENTRIES}
    for name in ("sampled", "sampled, made in full", "teacher's head", "Hessian-vector product"):
        entry = entries[name]
        entry = replace(entry, options={k: v for k, v in entry.options.items() if k != "backend"})
        case = replace(
            predicted.entries.SHAPES[0],
            rows=64,
            dim=32,
            vocab=500,
            dtype="float32",
            device="cpu",
            scenario=entry.scenario,
        )
        step = make_step(case)
        found = speed.attempt(entry, case, step)
        assert found["ok"] is True, found
        assert found["x_gemms"] > 0
        assert (step.direction is not None) == (name == "Hessian-vector product")


def test_predictions_follow_from_bytes_and_flops(predicted):
    """Fails if a phase is lost: fewer bytes, a frozen head and fewer rows cost less, a fourth GEMM more."""
    p, case = predicted.predictions, predicted.entries.SHAPES[0]
    times = {entry.name: p.times_gemms(entry, case) for entry in predicted.entries.ENTRIES}
    assert 1.0 < times["chunked, fused"] < times["chunked, two kernels"] < times["streaming"]
    assert times["frozen head"] < 1.0
    assert times["70 % ignored"] < 0.5
    # What is gained where few columns are drawn; and what it costs where all of them are.
    assert 1 / 3 < times["sampled"] < times["chunked, fused"] < times["sampled, made in full"]
    assert 5 / 3 < times["teacher's head"] < 7 / 3 < times["Hessian-vector product"] < 4
    floor = p.seconds(predicted.entries.three_gemms(case))
    assert floor == pytest.approx(6 * case.rows * case.dim * case.vocab / p.GEMM, rel=0.05)


def test_every_smoke_call_runs(predicted):
    """Fails if a call is not one that the functions take, or the errors that are allowed are too small."""
    from gpu_check import smoke

    assert len(smoke.CALLS) == 10
    for call in smoke.CALLS:
        assert smoke.check(call, "cpu")["ok"], call.name


def test_the_children_need_torch_alone():
    """Fails if a child imports a package that a machine with torch, Triton and pytest need not have."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('psutil', 'rich', 'matplotlib', 'transformers')));"
        "import gpu_check.smoke, gpu_check.speed, gpu_check.kernels, gpu_check.judge"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_smoke_call_that_is_wrong():
    """Fails if a wrong gradient, a NaN, or an exception passes."""
    from gpu_check import smoke

    call = smoke.CALLS[-2]

    def wrong(factor):
        def loss(module, leaves, target, options):
            value = call.loss(module, leaves, target, options)
            return value if module is smoke.reference else factor * value

        return smoke.check(replace(call, loss=loss), "cpu")

    assert wrong(1.0)["ok"] is True
    assert wrong(1.001)["ok"] is False
    assert wrong(float("nan"))["ok"] is False
    assert smoke.check(replace(call, options={"no_such": 1}), "cpu")["ok"] is False


def test_every_kernel_is_launched_by_the_small_run():
    """Fails if the run for sanitizers calls what no primitive takes, or leaves a kernel out."""
    code = (
        "from gpu_check import kernels; kernels.DEVICE = 'cpu'; kernels.VOCAB, kernels.ROWS = 100, 3;"
        "kernels.WIDTH = 16; kernels.main()"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=child_environment(TRITON_INTERPRET="1", OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    words = [line.split() for line in done.stdout.splitlines()]
    launched = {first if first not in ("cuda", "triton") else kernel for first, kernel, *_ in words}
    # The fused kernel is the CUDA extension's alone.
    first_order = {"row_stats", "row_grad", "row_sides", "stream_stats", "stream_grad"}
    assert launched == first_order | {"row_tangent", "row_grad_tangent"}


def test_every_measured_entry_has_a_stage(predicted, places):
    """Fails if a shape is predicted that no stage measures, or a stage measures an unknown shape."""
    names = {s.name for s in plan.stages(H100, places, False)}
    assert {p.stage for p in predicted.predictions.predictions()} <= names
    assert set(plan.SPEED) == {case.name for case in predicted.entries.SHAPES}
