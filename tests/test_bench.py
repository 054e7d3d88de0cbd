"""`tightrope bench`: its arithmetic, its truth, its memory probe, and a whole run on tiny shapes."""

import csv
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch

import tightrope
from tightrope import reference
from tightrope.cli import main

for package in ("matplotlib", "psutil", "rich"):
    pytest.importorskip(package)
import psutil

from tightrope.cli.bench import cases, competitors, figures, inputs, measure, peers, process, truth

TINY = cases.Case("tiny", 24, 16, 130)
LOSSES = list(cases.LOSSES.values())


def competitor(name):
    return next(c for c in competitors.all_competitors() if c.name == name)


# Arithmetic


def test_the_median_of_ratios_cancels_what_both_saw():
    base = [1.0, 3.0, 2.0, 10.0, 1.0]  # a machine that is slower at times
    assert figures.ratio([0.5 * x for x in base], base) == 0.5
    assert figures.ratio([2.0, 3.0, 8.0], [1.0, 1.0, 2.0]) == 3.0
    with pytest.raises(ValueError, match="got 2 and 1 rounds"):
        figures.ratio([1.0, 2.0], [1.0])


def test_spread_is_relative_to_the_median():
    assert figures.spread([2.0, 1.0, 4.0]) == 1.5
    assert figures.spread([3.0]) == 0.0


@pytest.mark.parametrize(
    ("seconds", "budget", "rounds"),
    [(1.0, 4.5, 4), (4.0, 2.0, 3), (5.0, 2.0, 2), (9.0, 2.0, 1), (0.001, 4.0, 15), (0.0, 4.0, 15)],
)
def test_rounds_fill_the_budget(seconds, budget, rounds):
    assert figures.rounds_for(seconds, budget) == rounds


def test_summary_has_milliseconds_and_both_ratios():
    found = figures.summary(
        {"gemms": [1.0, 2.0, 1.0], "ours": [0.5, 1.0, 0.5], "competitor": [2.0, 4.0, 3.0]}
    )
    assert found == {
        "ms": 3000.0,
        "spread": 2 / 3,
        "gemms_ms": 1000.0,
        "x_gemms": 2.0,
        "x_ours": 4.0,
        "rounds": 3,
    }


def test_works_take_turns_and_none_always_follows_another():
    step, calls = inputs.make_step(TINY), []
    works = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = measure.take_turns(works, step, budget=4.0)
    assert {name: len(samples) for name, samples in seconds.items()} == {"a": 15, "b": 15, "c": 15}
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert rounds == ["abc", "bca", "cab"] * 5


def test_gradients_are_dropped_before_each_step():
    step = inputs.make_step(TINY)
    loss = LOSSES[0]
    once = inputs.make_step(TINY)
    measure.step_of(competitors.ours, once, loss)
    measure.take_turns({"ours": lambda: measure.step_of(competitors.ours, step, loss)}, step, 0.0)
    assert torch.equal(step.weight.grad, once.weight.grad)


# Memory


def test_memory_is_what_a_step_takes_beyond_its_gradients():
    """A competitor that holds a known number of bytes while it works; its gradients are not counted."""
    case = cases.Case("memory", 64, 256, 40_000)  # gradients of 41 MB
    held = 200_000_000

    def greedy(step, loss):
        if step.weight.shape[0] == case.vocab:
            torch.ones(held // 4)
        return (step.hidden.sum() + step.weight.sum()) * 1.0

    rival = competitors.Competitor("greedy", "torch", greedy, lambda case, loss: None)
    found, _ = measure.first_step(inputs.make_step(case), rival, LOSSES[0], case)
    # The block is gone before the gradients come, so up to their size of it is counted as theirs.
    assert held - case.gradient_bytes - 5e6 < found < held + 20e6


def test_memory_of_a_step_that_holds_nothing_is_small():
    case = cases.Case("memory", 64, 256, 40_000)
    rival = competitors.Competitor(
        "frugal", "torch", lambda step, loss: step.hidden.sum() + step.weight.sum(), lambda case, loss: None
    )
    assert measure.first_step(inputs.make_step(case), rival, LOSSES[0], case)[0] < 20e6


# Truth


@pytest.mark.parametrize("scenario", cases.SCENARIOS)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_the_truth_is_the_reference(scenario, loss, monkeypatch):
    monkeypatch.setattr(truth, "KEPT_ROWS", 10)
    monkeypatch.setattr(truth, "KEPT_HEAD_ROWS", 20)
    case = cases.Case("", 24, 16, 130, scenario=scenario)
    step, loss = inputs.make_step(case), case.scored(loss)
    found = truth.truths(step, list({*LOSSES, loss}))[loss.name]
    kept, kept_head = truth.sample(step)
    assert len(kept) == 10 and 20 <= len(kept_head) <= 40
    hidden, weight = (t.detach().double().requires_grad_() for t in (step.hidden, step.weight))
    target = step.target if step.probs is None else tightrope.TopKTarget(step.target, step.probs.double())
    if step.teacher is not None:
        teacher_hidden, teacher_weight = (t.double() for t in step.teacher)
        target = torch.softmax(teacher_hidden @ teacher_weight.T, -1)
    if scenario == "rl":
        b, _ = reference.dense_target(target, case.vocab, dtype=torch.float64)
        stats = reference.row_stats(reference.logits(hidden, weight), b)
        bonus = truth.ENTROPY_BONUS * (loss.balance > 0)
        exact = -(step.advantage * stats.target_log_prob + bonus * stats.entropy).mean()
    elif scenario == "divergence":
        p = torch.softmax(hidden @ weight.T, -1)
        mixed = torch.special.xlogy(p + target, (p + target) / 2)
        exact = (torch.special.xlogy(p, p) + torch.special.xlogy(target, target) - mixed).sum(-1).mean() / 2
    else:
        exact = reference.linear_reality_creativity_loss(
            hidden, weight, target, balance=loss.balance, reality=loss.reality
        )
    wanted = torch.autograd.grad(exact, (hidden, weight), create_graph=step.direction is not None)
    if step.direction is not None:
        wanted = torch.autograd.grad(wanted, (hidden, weight), [d.double() for d in step.direction])
    assert found["loss"] == pytest.approx(exact.item(), rel=1e-12)
    torch.testing.assert_close(found["hidden"], wanted[0][kept], rtol=1e-10, atol=1e-15)
    if scenario == "lora":
        assert "weight" not in found
    else:
        torch.testing.assert_close(found["weight"], wanted[1][kept_head], rtol=1e-10, atol=1e-15)


def test_the_truth_goes_by_blocks_of_rows(monkeypatch):
    step = inputs.make_step(TINY)
    whole = truth.truths(step, LOSSES)
    monkeypatch.setattr(truth, "LOGITS_AT_A_TIME", 7 * TINY.vocab)
    torch.testing.assert_close(whole, truth.truths(step, LOSSES), rtol=1e-12, atol=1e-16)


def test_errors_are_relative_and_see_a_wrong_gradient():
    step = inputs.make_step(TINY)
    exact = truth.truths(step, LOSSES[:1])[LOSSES[0].name]
    value = measure.step_of(competitors.ours, step, LOSSES[0])
    assert all(error < 1e-5 for error in truth.errors(value, step, exact).values())
    step.hidden.grad *= 1.01
    step.weight.grad *= 0.98
    found = truth.errors(value * 1.1, step, exact)
    assert list(found.values()) == pytest.approx([0.1, 0.01, 0.02], rel=1e-3)


def test_the_graph_of_a_product_is_made_outside_of_the_time():
    """A product timed together with the loss and its gradients, which who takes many makes once."""
    case = cases.Case("tiny", 24, 16, 130, scenario="curvature")
    calls = []

    def counted(step, loss):
        calls.append(step)
        return truth.eager_loss(step, loss)

    step = inputs.make_step(case)
    work = measure.StepOf(counted, step, LOSSES[0]).prepared()
    assert len(calls) == 1 and step.weight.grad is None
    value = work()
    assert len(calls) == 1
    exact = truth.truths(step, LOSSES[:1])[LOSSES[0].name]
    assert all(error < 1e-5 for error in truth.errors(value, step, exact).values())


# Processes


def fails():
    print("not to be seen")
    raise RuntimeError("first line\nsecond line")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((fails,), "RuntimeError: first line"),
        ((os._exit, 3), "exit code 3"),
        ((time.sleep, 60), "more than 0.5 s"),
    ],
    ids=["raises", "dies", "hangs"],
)
def test_a_process_that_ends_badly_says_how(capfd, arguments, words):
    process.call(os.getpid)  # the server is up
    seconds = 0.5 if arguments[0] is time.sleep else 60
    with pytest.raises(process.Failed, match=f"^{words}$"):
        process.call(*arguments, seconds=seconds)
    assert capfd.readouterr() == ("", "")


def test_each_call_has_a_process_of_its_own():
    assert len({os.getpid(), process.call(os.getpid), process.call(os.getpid)}) == 3


# A whole run


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_whole_run(capsys, tmp_path):
    """Every competitor that runs here computes the same loss in the same scenario; the others say why not."""
    scenarios = ("sft", "distillation", "rl", "curvature", "divergence")
    arguments = ["bench", "--shape", "24,16,130", "--out", str(tmp_path), "--seconds", "0.01"]
    for scenario in scenarios:
        arguments += ["--scenario", scenario]
    for name in ("tightrope", "eager", "QuACK", "F.linear"):
        arguments += ["--competitor", name]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    rows = read_csv(tmp_path / "bench.csv")
    ran = [row for row in rows if not row["skipped"]]
    for scenario in scenarios:
        names = {row["competitor"] for row in ran if row["scenario"] == scenario}
        assert "eager PyTorch" in names and "tightrope streaming [eager]" in names
        assert ("tightrope chunked [eager]" in names) == (scenario != "rl")
        has_chunks = hasattr(torch.nn.functional, "linear_cross_entropy") and scenario in ("sft", "rl")
        assert ("F.linear_cross_entropy" in names) == has_chunks
        assert scenario in printed
    for row in ran:
        assert float(row["ms"]) > 0 and float(row["x_gemms"]) > 0 and float(row["memory_mb"]) >= 0
        for column in ("loss_error", "hidden_grad_error", "weight_grad_error"):
            assert 0 <= float(row[column]) < 1e-5
        own = "cross-entropy" if "F.linear" in row["competitor"] else LOSSES[0].name
        assert row["loss"] == ("Jensen-Shannon" if row["scenario"] == "divergence" else own)
        assert row["versions"] and row["machine"] and row["date"]
    quack = [row["skipped"] for row in rows if row["competitor"] == "QuACK"]
    assert len(quack) == len(scenarios) and all("cuda" in reason for reason in quack)
    assert (tmp_path / "floor.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("against-*")), "one shape shows no growth"
    assert "against" not in printed.splitlines()[-1]
    text = (tmp_path / "bench.md").read_text()
    assert "three bare GEMMs" in text and "QuACK: runs on cuda" in text


def test_the_heads_of_trl_have_the_loss_and_gradients():
    """A peer whose ignored rows count, or with its entropy or its mixture the wrong way round."""
    pytest.importorskip("trl", minversion="1.16")
    for name, scenario in (("TRL", "sft"), ("TRL", "lora"), ("TRL", "rl"), ("TRL JSD", "divergence")):
        case = cases.Case("", 24, 16, 130, scenario=scenario)
        step, loss, peer = inputs.make_step(case), case.scored(LOSSES[0]), competitor(name)
        assert peer.refuses(case, loss) is None and peer.loss_compared(loss) == loss
        value = measure.step_of(peer.loss, step, loss)
        found = truth.errors(value, step, truth.truths(step, [loss])[loss.name])
        assert all(error is None or error < 1e-5 for error in found.values()), (name, scenario, found)


def test_where_the_auto_chunker_cuts_nothing_its_line_fails(monkeypatch):
    """Plain torch.compile under its name: inductor says nothing where it leaves a head whole."""
    metrics = pytest.importorskip("torch._inductor.metrics")
    monkeypatch.setattr(metrics, "num_auto_chunking", 0, raising=False)
    monkeypatch.setattr(peers, "_compile_chunked", lambda: truth.eager_loss)
    auto_chunked = competitor(competitors.AUTO_CHUNKED).loss
    with pytest.raises(RuntimeError, match="nothing to cut"):
        auto_chunked(inputs.make_step(TINY), LOSSES[0])


def test_the_noise_of_drawn_gradients_is_that_of_all_entries():
    """The errors of the rows that are compared with float64, which are mostly of targets and so exact; or
    none, beside a time that is below the floor."""
    step, loss = inputs.make_step(cases.Case("", 128, 64, 4000)), LOSSES[1]
    generator = torch.Generator().manual_seed(1)
    with (
        torch.no_grad()
    ):  # peaked, few classes frequent, tokens as likely as they are: so few columns are drawn
        common = torch.randn(64, generator=generator)
        frequent = -torch.log1p(torch.arange(4000.0))
        step.hidden.add_(common)
        step.weight.mul_(6).add_(frequent.unsqueeze(-1) * common / common.square().sum())
        p = torch.softmax(step.hidden @ step.weight.T, -1)
    step = replace(step, target=torch.multinomial(p, 1, generator=generator).squeeze(-1))
    noise = 0.05
    sampled = replace(
        next(c for c in competitors.all_competitors() if c.noise),
        loss=partial(competitors.ours, gradient_noise=noise),
        noise=noise,
    )
    torch.manual_seed(0)
    found = measure.noise_found(sampled, step, loss)
    assert found["sampled_share"] < 0.5
    for name in ("hidden", "weight"):
        assert 0 < found[f"{name}_noise_expected"] <= noise
        assert found[f"{name}_noise"] == pytest.approx(found[f"{name}_noise_expected"], rel=0.3)
    later = replace(step, advantage=torch.ones(128))
    assert list(measure.noise_found(sampled, later, loss)) == ["hidden_noise", "weight_noise"]


def test_a_line_of_drawn_gradients_shows_their_noise():
    """A sampled step that looks like an exact one in the table."""
    from tightrope.cli.bench import report

    row = asdict(TINY) | {"competitor": "sampled", "loss": "l", "skipped": "", "spread": 0.0}
    row |= dict.fromkeys(("ms", "gemms_ms", "x_gemms", "x_ours", "memory_mb"), 1.0)
    row |= dict.fromkeys(("loss_error", "hidden_grad_error", "weight_grad_error"), 1e-7)
    noise = {"hidden_noise": 0.0048, "hidden_noise_expected": 0.0047, "weight_noise": 0.0031}
    (_, _, line, exact) = report._lines([row | noise | {"sampled_share": 0.091}, row])
    assert line[0] == "sampled, 9.1% of the columns" and line[-2:] == ["0.48% (0.47%)", "0.31%"]
    assert exact[0] == "sampled" and exact[-2:] == ["1e-07", "1e-07"]


@pytest.mark.parametrize("name", ["TRL", "TRL JSD", "cut-cross-entropy", "Liger scaled", "Liger JSD"])
def test_a_peer_that_is_not_installed_says_so_in_every_scenario(name, monkeypatch):
    """One that says so in some scenarios, and in others that it has no such loss."""
    monkeypatch.setattr(competitors.importlib.util, "find_spec", lambda module: None)
    peer = competitor(name)
    for scenario in cases.SCENARIOS:
        case = cases.Case("", 24, 16, 130, scenario=scenario)
        assert peer.refuses(case, case.scored(LOSSES[0])) == f"{peer.package} is not installed"


def test_a_peer_of_two_heads_is_in_their_divergence_alone(monkeypatch):
    """A divergence that is refused as every other loss of a teacher's head is."""
    monkeypatch.setattr(
        competitors.importlib.util, "find_spec", lambda module: None if module == "trl" else 1
    )
    for scenario in cases.SCENARIOS:
        case = cases.Case("", 24, 16, 130, scenario=scenario)
        reason = competitor("Liger JSD").refuses(case, case.scored(LOSSES[0]))
        wanted = None if scenario == "divergence" else "a divergence of two heads alone"
        assert reason == wanted, scenario


def test_an_old_trl_says_which_one_has_the_head(monkeypatch):
    monkeypatch.setattr(competitors.importlib.util, "find_spec", lambda module: 1)
    monkeypatch.setattr(competitors.importlib.metadata, "version", lambda package: "1.15.0")
    assert competitor("TRL").refuses(TINY, LOSSES[0]) == "trl 1.15.0 has none for every device, 1.16 has"


def test_a_picture_is_drawn_where_it_shows_something(tmp_path):
    """Empty axes, or a single point, for one value of a variable; and the picture of a whole sweep."""
    from tightrope.cli.bench import report

    def written(*chosen):
        rows = [
            asdict(case)
            | {"competitor": "a", "loss": "l", "skipped": "", "memory_mb": 1.0, "spread": 0.0}
            | {"loss_error": None, "hidden_grad_error": None, "weight_grad_error": None}
            | dict.fromkeys(("ms", "gemms_ms", "x_gemms", "x_ours"), 1.0)
            for case in chosen
        ]
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        report.write(folder, rows, {})
        return sorted(path.name for path in folder.glob("*.png"))

    sweep = [case for case in cases.default_cases("cpu", "float32") if case.group == "against V"]
    assert written(*sweep[:1]) == []
    assert written(TINY, sweep[0]) == ["floor.png"]
    assert written(*sweep) == ["against-V.png"]
    assert written() == []


def test_sigterm_ends_a_run_with_one_line(tmp_path):
    """A bench that leaves its processes and says nothing where a scheduler ends it."""
    options = ["--shape", "256,64,9000", "--competitor", "eager PyTorch", "--seconds", "1000"]
    running = subprocess.Popen(
        [sys.executable, "-m", "tightrope", "bench", *options, "--out", str(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    children = []
    while not children or not (tmp_path / "bench.csv").exists():
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
        children = psutil.Process(running.pid).children(recursive=True)
    running.terminate()
    _, err = running.communicate(timeout=60)
    assert running.returncode == 143
    assert err == f"tightrope: terminated; written to {tmp_path} so far: bench.csv\n"
    assert not psutil.wait_procs(children, timeout=30)[1]


def test_a_competitor_that_fails_says_so_and_the_others_go_on(tmp_path, monkeypatch):
    from tightrope.cli.bench import runner

    def call(function, *arguments):
        if arguments[0] == "eager PyTorch":
            raise process.Failed("RuntimeError: no memory")
        return {}

    monkeypatch.setattr(runner.process, "call", call)
    chosen = [competitor("eager PyTorch"), competitor("torch.compile")]
    rows = dict(runner._measured(TINY, LOSSES[0], chosen, 1.0, tmp_path))
    assert rows["eager PyTorch"]["skipped"] == "failed: RuntimeError: no memory"
    assert rows["torch.compile"]["skipped"] == ""


def test_without_a_truth_nothing_is_measured(tmp_path, monkeypatch):
    from tightrope.cli.bench import runner

    def call(function, *arguments):
        raise process.Failed("exit code -9")

    monkeypatch.setattr(runner.process, "call", call)
    rows = dict(runner._measured(TINY, LOSSES[0], [competitor("eager PyTorch")], 1.0, tmp_path))
    assert rows["eager PyTorch"]["skipped"] == "no truth to compare with: exit code -9"


def test_where_nobody_competes_nothing_is_computed(tmp_path, monkeypatch):
    from tightrope.cli.bench import runner

    def call(function, *arguments):
        raise AssertionError("a process was started")

    monkeypatch.setattr(runner.process, "call", call)
    rows = dict(runner._measured(TINY, LOSSES[0], [competitor("QuACK")], 1.0, tmp_path))
    assert "cuda" in rows["QuACK"]["skipped"]


def test_eager_is_skipped_where_its_logits_do_not_fit():
    reason = competitor("eager PyTorch").refuses(cases.Case("", 10**6, 64, 10**6), LOSSES[0])
    assert "24000 GB" in reason


def test_default_cases_are_those_that_the_documentation_names():
    chosen = cases.default_cases("cpu", "float32")
    assert {case.scenario for case in chosen} == set(cases.SCENARIOS)
    shapes = [case for case in chosen if "shape" in case.group]
    assert (1024, 768, 50257) in [(c.rows, c.dim, c.vocab) for c in shapes]
    assert any(c.rows == 1 and c.vocab > 150_000 for c in shapes)
    for axis, group in (("vocab", "against V"), ("rows", "against N")):
        sizes = [getattr(case, axis) for case in chosen if case.group == group]
        assert sizes == sorted(sizes) and sizes[-1] == 64 * sizes[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "8,8"], ["--shape", "N,D,V"]),
        (["--shape", "8,0,8"], ["--shape", "'0'", "whole number"]),
        (["--shape", "8,8,8", "--inputs", "real"], ["--shape", "8,8,8", "576,49152"]),
        (["--shape", "9000,576,49152", "--inputs", "real"], ["--shape", "4096"]),
        (["--case", "nonsense"], ["--case", "nonsense", "gpt2"]),
        (["--case", "gpt2", "--shape", "8,8,8"], ["--case", "--shape"]),
        (["--scenario", "rl"], ["--scenario", "--shape"]),
        (["--shape", "8,8,8", "--competitor", "nonsense"], ["--competitor", "nonsense", "QuACK"]),
        (["--loss", "nonsense"], ["--loss", "nonsense"]),
        (["--seconds", "0"], ["--seconds", "positive"]),
        pytest.param(
            ["--device", "cuda"],
            ["--device", "cuda"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_bad_arguments_are_one_line(capsys, tmp_path, arguments, words):
    try:
        code = main(["bench", *arguments, "--out", str(tmp_path / "out")])
    except SystemExit as end:
        code = end.code
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1, err
    assert all(word in err for word in words), err


def test_an_output_folder_that_cannot_be_is_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    arguments = ["bench", "--shape", "8,8,8", "--out", str(tmp_path / "file")]
    assert main(arguments) == 2
    assert "--out" in capsys.readouterr().err
