"""Every build of the CPU extension, and the library without it.

An extension is compiled for each instruction set and the one for this CPU is loaded, so on a given
machine the others would never run. ``ATEN_CPU_CAPABILITY`` makes PyTorch, and so the library, take a
lesser one; it is read once in a process, so each gets a child process that compares a handful of
problems with the reference and reports which extension it had. Without an extension the library must
warn, exactly once, and give the same results.
"""

import json
import subprocess
import sys

import pytest
import torch

from helpers import (
    BACKENDS,
    Problem,
    assert_no_worse,
    assert_within,
    child_environment,
    class_indices,
    linear_problem,
    oracle,
    ours,
    randn,
    top_k,
)
from tightrope import backends

# Around the numbers of lanes of every vector width, for rows and for entries.
ROWS_AND_VOCABULARIES = [(5, v) for v in (1, 2, 7, 8, 9, 15, 17, 33, 255, 257, 1023, 1025, 2051)]
ROWS_AND_VOCABULARIES += [(n, 300) for n in (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 65)]
CAPABILITIES = ["default", "avx2", "avx512"]
LOADED = {"default": "_C_base", "avx2": "_C_avx2", "avx512": "_C_avx512"}


def compare() -> None:
    """A compact comparison that touches every branch of the kernels; run in the child."""
    terms = {
        "cross_entropy": {},
        "mixed": {"balance": 0.4, "z_loss": 0.01, "logit_l2": 1e-3, "label_smoothing": 0.1},
        "squared": {"reality": "squared_error", "creativity": "collision", "balance": 0.3},
        "capped": {"softcap": 3.0, "logit_scale": 0.7, "balance": 1.0},
    }
    for vocab in (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 1000, 1023, 1025, 2051):
        for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            base = linear_problem(5, vocab=vocab, dtype=dtype, ignored=0.2)
            targets = [base.target, torch.softmax(randn(5, vocab), -1), top_k((5,), vocab)]
            for i, options in enumerate(terms.values()):
                problem = Problem(
                    base.leaves, targets[i % 3], {**options, "reduction": ("none", "sum")[i % 2]}
                )
                actual, exact = ours(problem), oracle(problem)
                for name in exact:
                    assert_within(actual[name], exact[name], rtol, 20 * rtol, f"V={vocab} {name}")
    for offset in (0.0, 1e4, -1e4):
        logits, target = 3 * randn(6, 1030) + offset, class_indices((6,), 1030)
        logits[0] *= 20
        logits[1, 100:] = -float("inf")
        target[1] = 3
        for dtype in (torch.float32, torch.bfloat16):
            problem = Problem({"input": logits.to(dtype)}, target, {"reduction": "none", "balance": 0.5})
            actual, exact, rough = ours(problem), oracle(problem), oracle(problem, torch.float32)
            assert_no_worse(actual["loss"], exact["loss"], rough["loss"], 1e-5, f"offset {offset} loss")
            floor = 1e-6 if dtype == torch.float32 else 2.0**-8
            assert_no_worse(actual["input"], exact["input"], rough["input"], floor, f"offset {offset}")


def compare_exponential() -> None:
    """e^x to two units in the last place, in both layouts: gradients with only the coefficient of p, 1."""
    x = torch.cat([torch.linspace(-104, 88, 40_000), torch.tensor([0.0, -0.0, -1e30, -float("inf")])])
    exact = x.double().exp()
    norm, coef = torch.zeros(2, 1), torch.zeros(7, 1)
    coef[0] = 1
    for logits in (x[None], x[:, None].expand(-1, 2).contiguous()[:, :1].t()):
        out = torch.empty_like(logits)
        nothing = [None] * 8
        torch.ops.tightrope.row_grad(logits, out, norm, coef, 0, *nothing, 1.0, None)
        error = (out[0].double() - exact).abs()
        assert (error <= 2**-22 * exact + 2**-149).all(), (error / exact).max()
    logits = torch.tensor([[float("nan"), 0.0]])
    torch.ops.tightrope.row_grad(logits, logits, norm, coef, 0, *nothing, 1.0, None)
    assert logits[0, 0].isnan() and logits[0, 1] == 1


CHILD = """
import json, warnings, torch
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import tightrope, test_isa
    test_isa.compare()
    test_isa.compare_exponential()
seen = [str(w.message) for w in seen if "tightrope" in str(w.message)]
capability = torch.backends.cpu.get_cpu_capability()
table = {row["backend"]: row for row in tightrope.backends.describe()}
print(json.dumps({"table": table, "warnings": seen, "capability": capability}))
"""


def in_child(**changes):
    command = [sys.executable, "-c", CHILD]
    done = subprocess.run(
        command, env=child_environment(**changes), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("backend", BACKENDS[:1])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_instruction_set(capability, backend):
    ours_has = torch.backends.cpu.get_cpu_capability().lower()
    if capability not in CAPABILITIES[: CAPABILITIES.index(ours_has) + 1 if ours_has in CAPABILITIES else 1]:
        pytest.skip(f"this CPU has {ours_has}, not {capability}")
    found = in_child(ATEN_CPU_CAPABILITY=capability)
    assert found["capability"].lower() == capability
    assert found["table"][backend]["available"]
    assert LOADED[capability] in found["table"][backend]["detail"]
    assert found["warnings"] == []


def test_without_the_extension():
    found = in_child(TIGHTROPE_DISABLE_EXT="1")
    assert not found["table"]["cpu"]["available"]
    assert "TIGHTROPE_DISABLE_EXT" in found["table"]["cpu"]["detail"]
    assert len(found["warnings"]) == 1, found["warnings"]
    assert "extension" in found["warnings"][0]


def test_description_names_what_serves_a_cpu():
    rows = {row["backend"]: row for row in backends.describe()}
    assert set(rows) >= {"cpu", "eager"}
    assert rows["eager"]["available"]
    assert all({"backend", "devices", "available", "detail"} <= set(row) for row in rows.values())
