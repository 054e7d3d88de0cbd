"""`tightrope bench --processes`: every way to share a step gives one step's gradients; a whole tiny run."""

import csv
import math
import subprocess
import sys
import time

import pytest
import torch

from helpers import child_environment
from tightrope.cli import main

for package in ("matplotlib", "psutil", "rich"):
    pytest.importorskip(package)

from tightrope.cli.bench import cases, inputs, parallel, process, ways
from tightrope.cli.bench.traffic import Traffic

TINY = cases.Case("tiny", 21, 16, 131)
LIMIT = 300  # seconds of a whole run, on a busy machine


def shared_step(rank: int, name: str, size: int) -> dict:
    """What a rank of a way gives: its loss, its gradients, and what it sent."""
    loss = ways.WAYS[name].loss_compared(cases.LOSSES["cross-entropy + entropy"])
    shared = ways.WAYS[name].share(inputs.make_step(TINY), ways.Rank(rank, size, 1, "cpu"), loss)
    with Traffic(size) as seen:
        value = shared.work().item() * shared.weight
    grads = [getattr(leaf.grad, "_local_tensor", leaf.grad) for leaf in shared.leaves]
    return {
        "loss": value,
        "grads": [grad.tolist() for grad in grads],
        "calls": dict(seen.calls),
        "bytes": sum(seen.bytes.values()),
    }


@pytest.mark.parametrize("name", ways.WAYS)
def test_a_way_to_share_gives_the_gradients_of_one_process(ranks, name):
    """Would catch a peer that is timed on less than the step: a gradient not reduced, a part of the loss."""
    size = 2
    loss = ways.WAYS[name].loss_compared(cases.LOSSES["cross-entropy + entropy"])
    one = ways.WAYS["one process"].share(inputs.make_step(TINY), ways.Rank(0, 1, 1, "cpu"), loss)
    truth = one.work().item()
    found = ranks(size).run(shared_step, name, size, limit=LIMIT)
    assert sum(part["loss"] for part in found) == pytest.approx(truth, rel=1e-6)
    hidden, weight = (leaf.grad for leaf in one.leaves)
    parts = [part["grads"] for part in found if part["grads"]]
    own = name in ("tightrope sharded", "FSDP2")
    if own:
        # FSDP2 averages over the ranks, so each is given its loss times their number.
        times = size if name == "FSDP2" else 1
        parts[0][0] = [[x / times for x in row] for part in parts for row in part[0]]
    for got, want in ((parts[0][0], hidden), ([row for part in parts for row in part[1]], weight)):
        torch.testing.assert_close(torch.tensor(got), want, rtol=1e-5, atol=1e-7)


def test_peers_send_what_they_are_said_to(ranks):
    """Would catch a head that FSDP2 gathers twice, or an estimate of ours that is not what is sent."""
    for name, mode in (("tightrope replicated", "replicated"), ("tightrope sharded", "sharded")):
        cost = ways.estimated(mode, TINY, 2)
        for part in ranks(2).run(shared_step, name, 2, limit=LIMIT):
            assert (sum(part["calls"].values()), part["bytes"]) == (cost.calls, cost.bytes)
    head = 66 * 16 * 4  # the larger part of 131 rows
    for part in ranks(2).run(shared_step, "FSDP2", 2, limit=LIMIT):
        assert part["calls"] == {"all_gather": 1, "reduce_scatter": 1} and part["bytes"] == 2 * head


@pytest.mark.parametrize("total", [0, 1, 2, 7, 8, 131])
def test_shares_cover_everything_once(total):
    """Would catch a token or a class that no rank has, or two have."""
    for size in (1, 2, 3, 8):
        spans = [ways.Rank(rank, size, 1, "cpu").share(total) for rank in range(size)]
        assert [i for start, stop in spans for i in range(start, stop)] == list(range(total))


def test_a_whole_run_says_what_each_way_took(tmp_path):
    """Would catch a run that hangs, and figures that are missing or those of another way."""
    options = ["--processes", "2", "--shape", "21,16,131", "--seconds", "0.05", "--out", str(tmp_path)]
    running = subprocess.Popen(
        [sys.executable, "-m", "tightrope", "bench", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=child_environment(),
    )
    try:
        out, err = running.communicate(timeout=LIMIT)
    finally:
        running.terminate()  # it ends its own processes
        running.wait(30)
    assert running.returncode == 0, err
    with (tmp_path / "parallel.csv").open(newline="", encoding="utf-8") as file:
        rows = {row["way"]: row for row in csv.DictReader(file)}
    page = (tmp_path / "parallel.md").read_text(encoding="utf-8")
    assert list(rows) == list(ways.WAYS)
    for name, row in rows.items():
        assert row["skipped"] == "" and name in out and name in page
        assert float(row["ms"]) > 0 and float(row["x_ours"]) > 0 and float(row["memory_mb"]) >= 0
        assert float(row["loss_error"]) < 1e-5
    cost = ways.estimated("sharded", TINY, 2)
    assert float(rows["tightrope sharded"]["sent_mb"]) == cost.bytes / 1e6
    assert float(rows["FSDP2"]["sent_mb"]) > 0 == float(rows["one process"]["sent_mb"])


def test_a_way_that_fails_says_so_and_the_others_go_on(tmp_path, monkeypatch):
    """Would catch a peer that takes the whole run with it, or is left out without a word."""

    def call_all(function, each):
        if each[0][3] == "FSDP2":
            raise process.Failed("RuntimeError: no memory")
        return [dict.fromkeys(parallel.COLUMNS[8:15], 1.0)]

    monkeypatch.setattr(parallel.process, "call_all", call_all)
    monkeypatch.setattr(parallel.process, "call", lambda *arguments: None)
    chosen = ["FSDP2", "loss_parallel"]
    lines = parallel._measured(TINY, cases.LOSSES["cross-entropy"], chosen, 2, 1.0, tmp_path)
    rows = {row["way"]: row for row in lines}
    assert rows["FSDP2"]["skipped"] == "failed: RuntimeError: no memory"
    assert rows["loss_parallel"]["skipped"] == ""


def test_processes_that_run_together_give_their_results_in_order():
    """Would catch results that stand with another rank."""
    assert process.call_all(math.sqrt, [(4.0,), (9.0,), (1.0,)]) == [2.0, 3.0, 1.0]


def test_one_that_fails_ends_the_others():
    """Would catch a group that waits for ranks whose peer is gone."""
    process.call(math.sqrt, 1.0)  # the server is up
    begin = time.monotonic()
    with pytest.raises(process.Failed, match="ValueError: sleep length must be non-negative"):
        process.call_all(time.sleep, [(50,), (-1,), (50,)])
    with pytest.raises(process.Failed, match=r"more than 0\.2 s"):
        process.call_all(time.sleep, [(0,), (50,)], 0.2)
    assert time.monotonic() - begin < 40


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--processes", "0"], "argument --processes: got '0', expected a whole number from 1"),
        (["--processes", "2", "--case", "gpt2"], "--case, --scenario, --inputs: expected none with --proc"),
        (["--processes", "2", "--inputs", "real"], "--case, --scenario, --inputs: expected none with --proc"),
        (["--processes", "2", "--competitor", "nobody"], "--competitor: got 'nobody', expected parts of: "),
    ],
)
def test_bad_arguments_are_one_line(capsys, tmp_path, arguments, words):
    """Would catch a traceback, or an option that is silently of no effect."""
    try:
        code = main(["bench", *arguments, "--out", str(tmp_path / "out")])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and words in err and err.count("\n") == 1


def test_a_pytorch_without_the_backend_is_one_line(capsys, tmp_path, monkeypatch):
    """Would catch a traceback out of P processes where one line says it."""
    monkeypatch.setattr(parallel.dist, "is_backend_available", lambda backend: False)
    assert main(["bench", "--processes", "2", "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        "tightrope: --processes: this PyTorch has no torch.distributed with gloo\n"
    )


def test_more_processes_than_cores_is_a_warning(capsys, monkeypatch):
    """Would catch times of processes in each other's way that nobody is told of, or an error instead."""
    monkeypatch.setattr(parallel.os, "sched_getaffinity", lambda process: {0}, raising=False)
    console = parallel.new_console()
    parallel._check(2, "cpu", console)
    assert "warning: 2 processes take turns on 1 cores" in capsys.readouterr().out
    parallel._check(1, "cpu", console)
    assert capsys.readouterr().out == ""
