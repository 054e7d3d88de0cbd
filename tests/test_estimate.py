"""`tightrope.distributed.estimate` without ranks: sizes, seconds, errors, the table of the documentation."""

from __future__ import annotations

import contextlib
import io
import re

import pytest
import torch

from helpers import ROOT
from tightrope.distributed import estimate


def sums(part) -> dict[str, int]:
    """Bytes by what travels."""
    found: dict[str, int] = {}
    for collective in part:
        found[collective.carries] = found.get(collective.carries, 0) + collective.bytes
    return found


N, D, V, P = 8192, 4096, 128256, 8
BIG = {"ranks": P, "rows": N, "hidden": D, "vocab_size": V, "dtype": torch.bfloat16}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("strategy", ["chunked", "streaming"])
def test_replicated_rows_send_what_the_design_says(strategy, device):
    """Would catch statistics that grew, or a reduction of dh that moves more than a ring's all-reduce."""
    cost = estimate(**BIG, strategy=strategy, device=device)
    sent = sums(cost.forward + cost.backward)
    assert sent["statistics"] == 48 * (P - 1) * N == 2_752_512
    assert sent["gradients"] == 2 * (P - 1) * N * D * 4 // P
    assert set(sent) == {"agreement", "statistics", "gradients"} and sent["agreement"] == 72 * (P - 1)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sharded_rows_send_what_the_design_says(device):
    """Would catch rows that are gathered twice where once is enough, or more than 36 bytes published."""
    cost = estimate(**BIG, mode="sharded", strategy="chunked", device=device)
    sent = sums(cost.forward)
    assert sent["rows"] == (P - 1) * N * (2 * D + 8)
    assert sent["statistics"] == 48 * (P - 1) * N and sent["coefficients"] == 36 * (P - 1) * N
    assert sent["gradients"] == 4 * (P - 1) * N * D
    assert sums(cost.backward) == {"upstream gradient": 4 * (P - 1)}
    streaming = estimate(**BIG, mode="sharded", strategy="streaming", device=device)
    assert sums(streaming.backward)["rows"] == sums(streaming.forward)["rows"] == sent["rows"]


@pytest.mark.parametrize("ranks", [8, 64])
def test_bytes_do_not_depend_on_how_rows_are_cut(ranks):
    """Would catch filling that grows with the number of chunks where every rank has as many rows."""
    for mode in ("replicated", "sharded"):
        few, many = (
            estimate(**{**BIG, "ranks": ranks}, mode=mode, strategy="chunked", workspace_mb=mb, device="cuda")
            for mb in (4096.0, 64.0)
        )
        assert many.calls > few.calls and many.bytes <= 1.01 * few.bytes


def test_seconds_are_messages_and_bytes():
    """Would catch steps that are counted for one collective, or bytes for one pass."""
    cost = estimate(**BIG, mode="sharded", strategy="streaming")
    calls = sum(part.calls for part in (*cost.forward, *cost.backward))
    assert cost.calls == calls and cost.steps == 7 * calls
    assert cost.seconds(1e-6, 1e-10) == pytest.approx(1e-6 * 7 * calls + 1e-10 * cost.bytes, rel=1e-12)


def test_one_rank_sends_nothing():
    """Would catch an agreement that is counted where there is nobody to agree with."""
    for mode in ("replicated", "sharded"):
        cost = estimate(ranks=1, rows=5, hidden=4, vocab_size=10, mode=mode, given=False)
        assert cost.calls == cost.bytes == cost.steps == 0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"ranks": 0}, ValueError, "ranks: got 0"),
        ({"rows": [1, 2]}, ValueError, 'rows: got 2 numbers, expected an integer with mode="replicated"'),
        ({"rows": [1, 2], "mode": "sharded"}, ValueError, "rows: got 2 numbers, expected one of each of 8"),
        ({"rows": 1.5}, TypeError, "rows: got float"),
        ({"hidden": 0}, ValueError, "hidden: got 0"),
        ({"hidden": None, "mode": "sharded"}, ValueError, 'mode: got "sharded" for logits'),
        ({"mode": "rows"}, ValueError, "mode: got 'rows'"),
        ({"strategy": "fast"}, ValueError, "strategy: got 'fast'"),
        ({"dtype": torch.int64}, TypeError, "dtype: got torch.int64"),
        ({"target": "topk"}, ValueError, "target: got 'topk'"),
        ({"support": "classes"}, ValueError, "support: got 'classes'"),
        ({"support": 0}, ValueError, "support: got 0"),
        ({"gradients": ("head",)}, ValueError, "gradients: got 'head'"),
        ({"tokens": 5}, ValueError, "tokens: got 5"),
        ({"workspace_mb": 0}, ValueError, "workspace_mb: got 0"),
    ],
)
def test_errors_name_the_argument(changes, error, message):
    """Would catch a bad argument that gives a wrong figure instead of an error."""
    with pytest.raises(error, match=message.replace("(", r"\(")):
        estimate(**{**BIG, **changes})


def test_the_table_of_the_documentation_is_what_its_code_prints():
    """Would catch a table that is left behind when what travels changes."""
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(import torch\n.*?estimate.*?)```\n", page, re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code[1], {})
    table = page[code.end() :].strip().partition("\n\n")[0]
    assert table == printed.getvalue().strip()
