"""The command: how it ends, what it prints, and a whole run on a tiny model made here."""

import errno
import json
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
from tiny_models import COMMAND, TRAIN_EXTRA, assert_one_line, cells, history, run, run_until, save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")  # as in test_train.py


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


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["generate", "--help"], ["info", "--help"]]
)
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
        (["train", "--mode-learning-rate", "-1"], "--mode-learning-rate"),
        (["train", "--target-entropy", "4"], "NAME=VALUE"),
        (["train", "--target-entropy", "wild=4"], "precise, balanced, creative"),
        (["train", "--train", "some"], "lora"),
        (["generate", "--prompt", "a", "--model", "/no/such/folder"], "/no/such/folder"),
        (["generate"], "--prompt"),
        (["generate", "--prompt", "a", "--temperature", "0"], "--temperature"),
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
    """A traceback of the reader's; a weight that is missing, and random in its place."""
    pytest.importorskip("transformers")
    import safetensors.torch

    empty, broken = tmp_path / "empty", tmp_path / "broken"
    for folder in (empty, broken):
        folder.mkdir()
    (broken / "config.json").write_text("{}")
    short, without = save_tiny(tmp_path / "short"), save_tiny(tmp_path / "without")
    os.truncate(short / "model.safetensors", 1000)
    weights = safetensors.torch.load_file(without / "model.safetensors")
    weights.pop("model.norm.weight")
    safetensors.torch.save_file(weights, without / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    for folder in (tmp_path / "absent", empty, broken, short, without):
        result = run(capsys, *small_run(folder, text, tmp_path / "runs"))
        assert_one_line(result, "--model", str(folder))


def test_values_that_do_not_fit_the_model_are_one_line(capsys, tiny, text, tmp_path):
    out = tmp_path / "runs"
    assert_one_line(run(capsys, *small_run(tiny, text, out, blocks=4, train="blocks")), "--blocks", "4")
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
@pytest.mark.parametrize("name", ["samples.md", "summary.md"])
def test_a_full_disk_is_one_line(capsys, monkeypatch, tiny, text, tmp_path, name):
    """A traceback after the training that is lost; two lines, of the failure and of the file's closing."""
    from tightrope.cli import card

    monkeypatch.setattr(card, "FILES", ())  # the link stays
    (tmp_path / name).symlink_to(FULL)
    result = run(capsys, *small_run(tiny, text, tmp_path, steps=1), "--balance", "0")
    assert_one_line(result, "--out", name, "No space left on device")


# Bytes of a file: a model's weights have more, and an optimizer's state.
@pytest.mark.parametrize("limit", [400_000, 700_000])
def test_a_disk_that_fills_up_while_training_is_one_line(text, tmp_path, limit):
    """The writers of checkpoints and models, which raise what they like; an older model that is lost."""
    tiny = save_tiny(tmp_path / "tiny", hidden_size=64, intermediate_size=128)
    before = shutil.copytree(tiny, tmp_path / "out" / "model")
    config = json.loads((before / "config.json").read_text())
    (before / "config.json").write_text(json.dumps(config | {"tightrope": {}}))
    program = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n{COMMAND}"
    arguments = [*small_run(tiny, text, tmp_path / "out"), "--save-steps", 2, "--train", "all"]
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, timeout=240
    )
    assert_one_line((done.returncode, "", done.stderr), "--out", "cannot write to")
    for path in tiny.iterdir():
        kept = (before / path.name).read_bytes()
        assert kept == path.read_bytes() or path.name == "config.json", "the model of the run before"


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
    pytest.importorskip("rich")
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


@pytest.mark.skipif(not os.path.isdir("/sys/kernel"), reason="there is no /sys")
def test_a_folder_that_nobody_may_write_to_is_one_line(capsys, tiny, text):
    assert_one_line(run(capsys, *small_run(tiny, text, "/sys/kernel/runs")), "--out", "/sys/kernel/runs")


def test_a_folder_that_no_run_made_is_not_replaced(capsys, tiny, text, tmp_path):
    """The model to be trained, in a folder called model beside the results."""
    folder = shutil.copytree(tiny, tmp_path / "model")
    result = run(capsys, *small_run(folder, text, tmp_path))
    assert_one_line(result, "--out", str(folder), "another folder")
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in tiny.iterdir())


def test_train_writes_every_file(capsys, tiny, text, tmp_path):
    out = tmp_path / "deep" / "runs"
    arguments = [*small_run(tiny, text, out), "--balance", "exact=0", "--balance", "0.3"]
    for _ in range(2):  # and over what is there
        code, printed, err = run(capsys, *arguments)
        assert (code, err) == (0, "")
        assert sorted(path.name for path in out.iterdir()) == [
            "checkpoints",
            "model",
            "samples.md",
            "summary.md",
        ]

    summary = cells(out / "summary.md")
    assert list(summary) == ["exact", "balance 0.3", "tightrope", "eager PyTorch"]
    for mode, balance in (("exact", "0"), ("balance 0.3", "0.3")):
        assert summary[mode][0] == balance and mode in printed
        # Random weights that have seen six batches.
        assert 0.5 * math.log(300) < float(summary[mode][1]) < math.log(300)
        assert 0 < float(summary[mode][4]) <= float(summary[mode][5]) <= 1
    ours, eager = (float(summary[name][0]) for name in ("tightrope", "eager PyTorch"))
    assert ours == pytest.approx(eager, rel=1e-4)
    samples = (out / "samples.md").read_text()
    assert samples.count("\n## ") == 2 and samples.count("\n- ") == 2 * 16


def test_a_mode_without_a_name_is_called_by_its_balance():
    """Two names for one mode; a name that a table has twice."""
    from tightrope.cli.options import named_share

    assert named_share("0.1") == named_share("0.10") == ("balance 0.1", 0.1)
    assert named_share("bold=0.1") == ("bold", 0.1)


def test_the_loss_is_made_of_its_terms(capsys, not_measured, tiny, text, tmp_path):
    """A balance of another mode; a term that is not the one asked for; a --min-p that does not arrive."""
    # At balance 0 a step's loss is its cross-entropy; of the most likely class alone the entropy is 0.
    plain, halved = tmp_path / "plain", tmp_path / "halved"
    more = ["--balance", "mode=0"]
    assert run(capsys, *small_run(tiny, text, plain), *more)[0] == 0
    for row in history(plain):
        assert row["loss"] == pytest.approx(row["mode/cross_entropy"], rel=1e-5)
    more = ["--creativity", "support_entropy", "--min-p", 1, "--balance", "mode=0.5"]
    assert run(capsys, *small_run(tiny, text, halved), *more)[0] == 0
    for row in history(halved):
        assert row["loss"] == pytest.approx(0.5 * row["mode/cross_entropy"], rel=1e-5)
    more = ["--reality", "squared_error", "--creativity", "entropy", "--balance", "mode=0.5"]
    assert run(capsys, *small_run(tiny, text, tmp_path / "other"), *more)[0] == 0
    for row in history(tmp_path / "other"):
        squared = 2 * row["loss"] + row["mode/entropy"]  # of a nearly flat prediction: (1 + 1/V - 2 p) / 2
        assert squared == pytest.approx(0.5, abs=0.02)


def test_same_seed_gives_the_same_numbers(capsys, not_measured, tiny, text, tmp_path):
    def numbers(name, seed):
        out = tmp_path / name
        assert run(capsys, *small_run(tiny, text, out, seed=seed))[0] == 0
        keys = ("loss", "grad_norm", "creative/entropy")
        losses = [[row.get(key) for key in keys] for row in history(out)]
        modes = [cells(out / "summary.md")[mode] for mode in ("precise", "balanced", "creative")]
        return losses, modes, (out / "samples.md").read_text()

    first = numbers("first", 1)
    assert numbers("again", 1) == first
    assert numbers("other", 2) != first


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_say_what_can_be_gone_on_with(tiny, text, tmp_path, number, code):
    """A traceback; a silent end; a checkpoint that is not there."""
    log = tmp_path / "checkpoints" / "checkpoint-5" / "trainer_state.json"
    arguments = [*small_run(tiny, text, tmp_path, steps=1_000_000), "--save-steps", 5]
    ended, err = run_until(log, number, *arguments)
    assert ended == code
    words = (
        r"tightrope: (interrupted|terminated); written to (.*) so far: nothing; --resume goes on from (.*)\n"
    )
    found = re.fullmatch(words, err)
    assert found, err
    assert found[2] == str(tmp_path) and os.path.isfile(f"{found[3]}/trainer_state.json")
