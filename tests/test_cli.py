"""The command: how it ends, what it prints, and a whole run on a tiny model made here."""

import errno
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from tightrope import __version__
from tightrope.cli.errors import UserError
from tiny_models import TEXT, TRAIN_EXTRA, assert_one_line, read_csv, run, run_until, save_tiny


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a random Llama of three blocks, tied head, and a byte-level tokenizer."""
    for name in TRAIN_EXTRA:
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder)
    return folder


def small_run(tiny, text, out, **changes):
    options = {"steps": 6, "batch-size": 2, "sequence-length": 16, "learning-rate": 0.01} | changes
    arguments = ["train", "--model", tiny, "--text", text, "--out", out]
    return arguments + [x for name, value in options.items() for x in (f"--{name}", value)]


def test_info_lists_versions_and_backends(capsys):
    code, out, err = run(capsys, "info")
    assert (code, err) == (0, "")
    assert torch.__version__ in out
    assert torch.backends.cpu.get_cpu_capability() in out
    for word in ("cpu", "eager", "devices", "available"):
        assert word in out


def test_version(capsys):
    """An option that `--help` names and that fails, or a version of its own."""
    assert run(capsys, "--version") == (0, f"tightrope {__version__}\n", "")


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["info", "--help"]])
def test_help(capsys, arguments):
    code, out, err = run(capsys, *arguments)
    assert (code, err) == (0, "")
    assert out.startswith("usage: tightrope")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "COMMAND"),
        (["fly"], "fly"),
        (["train", "--steps", "0"], "--steps"),
        (["train", "--steps", "many"], "many"),
        (["train", "--sequence-length", "1"], "--sequence-length"),
        (["train", "--learning-rate", "0"], "--learning-rate"),
        (["train", "--learning-rate", "inf"], "--learning-rate"),
        (["train", "--seed", "-1"], "--seed"),
        (["train", "--balance", "1.5"], "1.5"),
        (["train", "--balance", "nan"], "nan"),
        (["train", "--balance", "=0.5"], "NAME=VALUE"),
        (["train", "--balance", "bold=high"], "high"),
        (["train", "--balance", "a=0", "--balance", "a=0.1"], "called a"),
        (["train", "--balance", "untrained=0.1"], "untrained"),
        (["train", "--reality", "truth"], "--reality"),
        (["train", "--creativity", "whim"], "--creativity"),
        (["train", "--min-p", "0"], "--min-p"),
        (["train", "--creativity", "entropy", "--min-p", "0.1"], "--min-p"),
        (["train", "--text", "/no/such/file"], "/no/such/file"),
    ],
)
def test_bad_value_is_one_line(capsys, arguments, word):
    assert_one_line(run(capsys, *arguments), word)


def test_missing_extra_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert_one_line(run(capsys, "train"), "tightrope[train]")


def test_unreadable_text_is_one_line(capsys, tiny, tmp_path):
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00\x81" * 100)
    for path in (binary, tmp_path):
        assert_one_line(run(capsys, *small_run(tiny, path, tmp_path / "runs")), "--text", str(path))


def test_short_text_is_one_line(capsys, tiny, tmp_path):
    for content in ("", "A fox."):
        short = tmp_path / "short.txt"
        short.write_text(content)
        assert_one_line(run(capsys, *small_run(tiny, short, tmp_path / "runs")), "too short")


def test_bad_model_is_one_line(capsys, text, tmp_path):
    pytest.importorskip("transformers")
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    for folder in (empty, broken):
        folder.mkdir()
    (broken / "config.json").write_text("{}")
    for folder in (tmp_path / "absent", empty, broken):
        result = run(capsys, *small_run(folder, text, tmp_path / "runs"))
        assert_one_line(result, "--model", str(folder))


def test_values_that_do_not_fit_the_model_are_one_line(capsys, tiny, text, tmp_path):
    out = tmp_path / "runs"
    assert_one_line(run(capsys, *small_run(tiny, text, out, blocks=4)), "--blocks", "4")
    long = small_run(tiny, text, out, **{"sequence-length": 129})
    assert_one_line(run(capsys, *long), "--sequence-length", "129")


def test_a_model_without_its_tokenizer_is_one_line(capsys, tiny, text, tmp_path):
    """The reader's advice of many lines, of which the first says nothing."""
    folder = shutil.copytree(tiny, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    result = run(capsys, *small_run(folder, text, tmp_path / "runs"))
    assert_one_line(result, "--model", str(folder), "no tokenizer.json")


def test_a_vocabulary_smaller_than_the_tokenizers_is_one_line(capsys, tiny, text, tmp_path):
    """A tokenizer of another model: an index out of range deep in the embedding."""
    import transformers

    folder = shutil.copytree(tiny, tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(280)
    model.save_pretrained(folder)
    capsys.readouterr()
    result = run(capsys, *small_run(folder, text, tmp_path / "runs"))
    assert_one_line(result, "--model", str(folder), "300 tokens", "280")


# A file that is opened there can be written to, and no byte of it has room.
FULL = "/dev/full"
needs_full = pytest.mark.skipif(not os.path.exists(FULL), reason=f"there is no {FULL}")


@needs_full
@pytest.mark.parametrize("name", ["cost.csv", "steps.csv", "samples.md", "summary.md", "tradeoff.png"])
def test_a_full_disk_is_one_line(capsys, monkeypatch, tiny, text, tmp_path, name):
    """A traceback after the training that is lost; two lines, of the failure and of the file's closing."""
    from tightrope.cli import report

    monkeypatch.setattr(report, "FILES", ())  # the link stays
    (tmp_path / name).symlink_to(FULL)
    result = run(capsys, *small_run(tiny, text, tmp_path, steps=1), "--balance", "0")
    assert_one_line(result, "--out", name, "No space left on device")


@pytest.mark.parametrize("place", ["tempfile.TemporaryDirectory", "torch.save"])
def test_a_full_temporary_folder_is_one_line(capsys, monkeypatch, tiny, text, tmp_path, place):
    """A disk that nobody named: the variable that chooses it is not obvious."""

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(place, fail)
    result = run(capsys, *small_run(tiny, text, tmp_path))
    assert_one_line(result, "TMPDIR", "No space left on device")


def test_a_csv_file_on_a_full_disk_ends_with_a_whole_line(tmp_path):
    """Half a line, which reads as a number with fewer digits."""
    pytest.importorskip("matplotlib")
    from tightrope.cli.report import CsvLog

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)  # beyond it writing fails as on a full disk
    path = tmp_path / "steps.csv"
    with CsvLog(path, ("step", "loss")) as log:
        log.write((0, 1.2345678))
        log.write((1, 1.2345678))
        resource.setrlimit(resource.RLIMIT_FSIZE, (40, limits[1]))
        try:
            with pytest.raises(UserError, match=r"^--out: .*steps\.csv"):
                log.write((2, 1.2345678))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "step,loss\n0,1.2345678\n1,1.2345678\n"


@needs_full
def test_a_standard_output_without_room_is_one_line():
    """Python's own complaint at its end, beside ours."""
    with open(FULL, "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "tightrope", "info"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (1, "tightrope: cannot print: No space left on device\n")


def test_output_that_cannot_be_written_is_one_line(capsys, tiny, text):
    assert_one_line(run(capsys, *small_run(tiny, text, text)), "--out", str(text))


def test_train_writes_every_file(capsys, tiny, text, tmp_path):
    out = tmp_path / "deep" / "runs"
    arguments = [*small_run(tiny, text, out), "--balance", "exact=0", "--balance", "0.3"]
    code, printed, err = run(capsys, *arguments)
    assert (code, err) == (0, "")
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["cost.csv", "samples.md", "steps.csv", "summary.csv", "summary.md", "tradeoff.png"]
    )

    steps = read_csv(out / "steps.csv")
    assert [row["mode"] for row in steps] == ["exact"] * 6 + ["balance 0.3"] * 6
    for row in steps:
        balance = float(row["balance"])
        loss = (1 - balance) * float(row["reality"]) - balance * float(row["entropy"])
        assert float(row["loss"]) == pytest.approx(loss, abs=1e-5)
    first = [row for row in steps if row["step"] == "1"]
    assert first[0]["reality"] == first[1]["reality"], "the modes start from the same weights"

    summary = {row["mode"]: row for row in read_csv(out / "summary.csv")}
    assert list(summary) == ["untrained", "exact", "balance 0.3"]
    truth = {mode: float(row["cross_entropy"]) for mode, row in summary.items()}
    assert truth["untrained"] == pytest.approx(math.log(300), rel=0.05)  # random weights
    assert truth["exact"] < truth["untrained"] - 0.1
    assert float(summary["exact"]["entropy"]) < float(summary["balance 0.3"]["entropy"])
    for row in summary.values():
        assert 0 < float(row["distinct_1"]) <= float(row["distinct_2"]) <= 1

    ours, eager = read_csv(out / "cost.csv")
    assert float(ours["loss"]) == pytest.approx(float(eager["loss"]), rel=1e-4)
    samples = (out / "samples.md").read_text()
    assert samples.count("\n## ") == 3 and samples.count("\n- ") == 3 * 16
    assert (out / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    for mode in summary:
        assert mode in (out / "summary.md").read_text() and mode in printed


def test_a_mode_is_labelled_with_its_balance_once():
    """ "balance 0.1 (balance 0.1)" in the picture."""
    pytest.importorskip("matplotlib")
    from tightrope.cli import _mode, report

    def label(mode):
        return report.Row(*_mode(mode), 1.0, 1.0, 1.0, 1.0, 1.0).label

    assert label("0.1") == label("0.10") == "balance 0.1"
    assert label("bold=0.1") == "bold (balance 0.1)"
    assert label("balance high=0.1") == "balance high (balance 0.1)"
    assert report.Row("untrained", None, 1.0, 1.0, 1.0, 1.0, None).label == "untrained"


def test_other_terms_of_the_loss(capsys, tiny, text, tmp_path):
    arguments = small_run(tiny, text, tmp_path, reality="squared_error", creativity="collision")
    code, _, err = run(capsys, *arguments, "--balance", "0")
    assert (code, err) == (0, "")
    for row in read_csv(tmp_path / "steps.csv"):
        assert float(row["loss"]) == pytest.approx(float(row["reality"]), abs=1e-6)


def test_the_set_of_the_support_entropy(capsys, tiny, text, tmp_path):
    """A --min-p that does not arrive: of the most likely class alone the entropy is 0."""
    arguments = small_run(tiny, text, tmp_path, **{"min-p": 1})
    code, _, err = run(capsys, *arguments, "--balance", "0.5")
    assert (code, err) == (0, "")
    for row in read_csv(tmp_path / "steps.csv"):
        assert float(row["loss"]) == pytest.approx(0.5 * float(row["reality"]), abs=1e-6)


def test_same_seed_gives_the_same_numbers(capsys, tiny, text, tmp_path):
    def numbers(name, seed):
        out = tmp_path / name
        assert run(capsys, *small_run(tiny, text, out, seed=seed))[0] == 0
        times = ("step_seconds", "tokens_per_second")
        rows = read_csv(out / "steps.csv") + read_csv(out / "summary.csv")
        return [{k: v for k, v in row.items() if k not in times} for row in rows], (
            out / "samples.md"
        ).read_text()

    first = numbers("first", 1)
    assert numbers("again", 1) == first
    assert numbers("other", 2) != first


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_leave_what_was_written(tiny, text, tmp_path, number, code):
    """A traceback; a silent end; a line that names files that are not there."""
    log = tmp_path / "steps.csv"
    ended, err = run_until(log, number, *small_run(tiny, text, tmp_path, steps=1_000_000))
    assert ended == code
    assert re.fullmatch(r"tightrope: (interrupted|terminated); written to (.*) so far: (.*)\n", err), err
    assert str(tmp_path) in err
    files = err.strip().split(": ")[-1].split(", ")
    assert sorted(files) == sorted(path.name for path in tmp_path.iterdir()) and "steps.csv" in files
    assert log.read_text().endswith("\n")
    rows = read_csv(log)
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    assert all(math.isfinite(float(row["tokens_per_second"])) for row in rows)
