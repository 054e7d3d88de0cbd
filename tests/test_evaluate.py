"""`tightrope evaluate`: what it writes and how it ends, on tiny models made here."""

import importlib.util
import math
import os
import re
import shutil
import signal

import pytest
import torch

from tightrope import evaluation
from tiny_models import TEXT, assert_one_line, make_model, read_csv, run, run_until, save_tiny

for package in ("transformers", "tokenizers", "accelerate", "gguf", "matplotlib", "rich", "nltk"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'tightrope[evaluate]'", allow_module_level=True)

FILES = ["evaluate.csv", "evaluate.md", "frontier.png", "samples.md"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders by name: a plain model, a flatter one of another kind, and a judge."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny(folder / "plain", initializer_range=0.2)
    save_tiny(folder / "flat", "GPT2", initializer_range=0.15, seed=1)
    save_tiny(folder / "judge", initializer_range=0.25, seed=2)
    return {name: folder / name for name in ("plain", "flat", "judge")}


def command(models, text, out, *more, quick=True):
    """The three models, on little text."""
    arguments = ["evaluate", "--text", text, "--out", out, "--sequence-length", 16]
    for name, folder in models.items():
        arguments += ["--model", f"{name}={folder}"]
    return [*arguments, *["--quick"] * quick, *more]


def test_evaluate_writes_every_file(capsys, models, text, tmp_path):
    out = tmp_path / "deep" / "out"
    few = ["--windows", 4, "--min-p", 0.05, *(x for t in (0.8, 1.3, 1.6) for x in ("--temperature", t))]
    code, printed, err = run(capsys, *command(models, text, out, *few, quick=False))
    assert (code, err) == (0, "")
    assert sorted(path.name for path in out.iterdir()) == FILES

    lines = read_csv(out / "evaluate.csv")
    of_text = [line for line in lines if line["of"] == "text"]
    settings = [(line["temperature"], line["min_p"]) for line in of_text]
    assert settings == 3 * [("0.8", ""), ("1.0", ""), ("1.3", ""), ("1.6", ""), ("1.0", "0.05")]
    assert [line["model"] for line in of_text[::5]] == list(models)
    assert {line["tokens"] for line in of_text} == {str(4 * 15)}
    for line in of_text:
        assert (line["cross_entropy"] == "") == (line["min_p"] != "")
        assert 0 <= float(line["implausible_mass"]) < 1 and 0 < float(line["entropy"]) < math.log(301)
        assert float(line["entropy_error"]) > 0 and line["self_bleu"] == ""

    sampled = [line for line in lines if line["of"] == "samples"]
    assert [line["model"] for line in sampled if line["temperature"] == "1.0"] == list(models)
    for line in sampled:
        assert 0 < float(line["distinct_1"]) <= float(line["distinct_2"]) <= 1
        assert 0 <= float(line["self_bleu"]) < 1 < float(line["judge_perplexity"])
        assert line["entropy"] == ""
    matched = [float(line["temperature"]) for line in sampled if line["temperature"] != "1.0"]
    rows = [row_of(line) for line in of_text]
    compared = [c for c in evaluation.compare(rows, "plain") if c.min_p is None]
    assert [c.model for c in compared] == ["flat", "judge"]
    assert matched == [c.plain_temperature for c in compared if c.plain_temperature is not None]

    tables = (out / "evaluate.md").read_text(encoding="utf-8")
    for c in compared:
        assert c.verdict in tables and f"{c.implausible_mass:.2%}" in tables and c.model in printed
    for word in ("60 tokens", "top-1 accuracy", "min-p", "self-BLEU", "judge's perplexity", "±"):
        assert word.lower() in tables.lower()
    samples = (out / "samples.md").read_text(encoding="utf-8")
    assert samples.count("\n## ") == len(sampled) and samples.count("\n- ") == 16 * len(sampled)
    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG")


def row_of(line):
    """A line of evaluate.csv as the library has it."""
    values = (line[name] for name in evaluation.Row._fields[1:])
    return evaluation.Row(line["model"], *(float(v) if v else None for v in values))


def test_the_command_and_the_library_give_the_same_figures(capsys, models, text, tmp_path):
    import transformers

    from tightrope.cli import data

    more = ["--windows", 3, "--temperature", 1.5, "--min-p", 0.2, "--seed", 3]
    assert run(capsys, *command(models, text, tmp_path, *more, quick=False))[0] == 0
    lines = [line for line in read_csv(tmp_path / "evaluate.csv") if line["of"] == "text"]
    loaded = {n: transformers.AutoModelForCausalLM.from_pretrained(f).eval() for n, f in models.items()}
    tokenizer = transformers.AutoTokenizer.from_pretrained(models["plain"])
    cut = data.make_windows(tokenizer, TEXT, length=16, batch_size=1)
    rows = evaluation.evaluate(
        loaded, cut.held_out[:3], loaded["judge"], temperatures=[1.0, 1.5], min_ps=[0.2]
    )
    capsys.readouterr()
    assert len(rows) == len(lines) == 9
    for row, line in zip(rows, lines):
        assert row.model == line["model"]
        assert row.entropy == pytest.approx(float(line["entropy"]), rel=1e-6)
        assert row.implausible_mass == pytest.approx(float(line["implausible_mass"]), rel=1e-4, abs=1e-9)


def test_a_mode_that_temperature_beats_is_called_that(tmp_path):
    """Also in print, whatever else a table says."""
    from tightrope.cli.evaluate import report

    def row(model, temperature, cross_entropy, entropy, implausible):
        return evaluation.Row(
            model, temperature, None, cross_entropy, entropy, implausible, 0.5, 1.0, 0.1, 0.1, 1e-4, 100
        )

    rows = [
        row("plain", 1.0, 3.0, 3.0, 0.001),
        row("plain", 1.5, 3.4, 5.0, 0.1),
        row("noisy", 1.0, 3.3, 4.0, 0.02),
        row("$good", 1.0, 3.1, 4.0, 0.005),
    ]
    compared = evaluation.compare(rows, "plain")
    report.write(tmp_path, "plain", rows, compared, [], torch.tensor([3, 5]))
    text = (tmp_path / "evaluate.md").read_text(encoding="utf-8")
    assert (
        "| noisy | 4.000 | 1.250 | 3.300 (3.200) | +0.100 | 2.00% (1.00%) | 2.00 | "
        "temperature alone is better on both |" in text
    )
    assert "| $good | 4.000 | 1.250 | 3.100 (3.200) | -0.100 | 0.50% (1.00%) | 0.50 | better than" in text
    assert "Of noisy: temperature alone is better on both." in text
    assert "4 classes in the mean" in text and "Samples" not in text


@pytest.mark.parametrize("plain", [None, "flat"])
def test_who_is_plain(capsys, models, text, tmp_path, plain):
    """And a first look takes no samples."""
    more = ["--plain", plain] if plain else []
    assert run(capsys, *command(models, text, tmp_path, *more))[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({*FILES} - {"samples.md"})
    assert f"beside {plain or 'plain'} at the same entropy" in (tmp_path / "evaluate.md").read_text("utf-8")


def test_a_model_called_judge_is_not_the_plain_one(capsys, models, text, tmp_path):
    order = {name: models[name] for name in ("judge", "flat")}
    assert run(capsys, *command(order, text, tmp_path))[0] == 0
    assert "beside flat at the same entropy" in (tmp_path / "evaluate.md").read_text("utf-8")


def test_one_model_alone(capsys, models, text, tmp_path):
    """Nothing to compare it with, but for its own min-p."""
    arguments = ["evaluate", "--model", models["plain"], "--judge", models["judge"], "--text", text]
    code, _, err = run(capsys, *arguments, "--out", tmp_path, "--quick", "--sequence-length", 16)
    assert (code, err) == (0, "")
    text = (tmp_path / "evaluate.md").read_text("utf-8")
    assert "As they are" not in text and "| plain | 0.05 |" in text


def test_nobody_to_judge_is_one_line(capsys, models, text, tmp_path):
    others = {name: models[name] for name in ("plain", "flat")}
    out = tmp_path / "out"
    assert_one_line(run(capsys, *command(others, text, out)), "--judge: got none", "plain, flat", "expected")
    assert_one_line(run(capsys, "evaluate", "--out", out), "--model: got none", "[NAME=]FOLDER")
    assert not out.exists(), "before any work"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--temperature", "0"], ["--temperature", "'0'", "positive"]),
        (["--temperature", "inf"], ["--temperature", "inf"]),
        (["--min-p", "1.5"], ["--min-p", "1.5"]),
        (["--min-p", "0"], ["--min-p", "above 0"]),
        (["--windows", "0"], ["--windows"]),
        (["--windows", "100000"], ["--windows", "100000", "of 16 tokens"]),
        (["--sequence-length", "1"], ["--sequence-length"]),
        (["--sequence-length", "129"], ["--sequence-length", "129", "128"]),
        (["--plain", "nobody"], ["--plain", "nobody", "plain, flat, judge"]),
        (["--model", "=x"], ["--model", "NAME=FOLDER"]),
        (["--model", "flat=x"], ["--model", "called flat"]),
        (["--model", "none=/no/such/folder"], ["--model none", "/no/such/folder"]),
        (["--judge", "/no/such/folder"], ["--judge", "/no/such/folder"]),
        (["--text", "/no/such/file"], ["--text", "/no/such/file"]),
    ],
)
def test_bad_values_are_one_line(capsys, models, text, tmp_path, more, words):
    out = tmp_path / "out"
    assert_one_line(run(capsys, *command(models, text, out, *more)), *words)
    assert not out.exists()


def test_a_text_that_is_too_short_or_no_text_is_one_line(capsys, models, tmp_path):
    short, binary = tmp_path / "short", tmp_path / "binary"
    short.write_text("A fox.")
    binary.write_bytes(b"\xff\xfe\x00\x81" * 100)
    assert_one_line(run(capsys, *command(models, short, tmp_path / "out")), "too short")
    assert_one_line(run(capsys, *command(models, binary, tmp_path / "out")), "--text", "not UTF-8")


def test_models_that_cannot_be_loaded_are_one_line(capsys, models, text, tmp_path):
    empty, broken, dumb = (tmp_path / name for name in ("empty", "broken", "dumb"))
    for folder in (empty, broken):
        folder.mkdir()
    (broken / "config.json").write_text("{}")
    shutil.copytree(models["plain"], dumb)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (dumb / name).unlink()
    for folder in (empty, broken, dumb):
        result = run(capsys, *command(models | {"bad": folder}, text, tmp_path / "out"))
        assert_one_line(result, "--model bad", str(folder))
        result = run(capsys, *command(models, text, tmp_path / "out", "--judge", folder))
        assert_one_line(result, "--judge", str(folder))
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_is_one_line(capsys, models, text, tmp_path):
    """The judge's nucleus of other words."""
    other = save_tiny(tmp_path / "other", tokens=280)
    capsys.readouterr()
    result = run(capsys, *command(models | {"other": other}, text, tmp_path / "out"))
    assert_one_line(result, "--model other", "tokenizer", "280 tokens", "300", "same vocabulary")


def test_another_head_is_one_line(capsys, models, text, tmp_path):
    """The same tokens, and a head that is padded to another number of rows."""
    padded = shutil.copytree(models["plain"], tmp_path / "padded")
    make_model(vocab_size=320).save_pretrained(padded)
    capsys.readouterr()
    result = run(capsys, *command(models | {"padded": padded}, text, tmp_path / "out"))
    assert_one_line(result, "--model padded", "320 classes", "300")


def test_logits_that_tightrope_does_not_make_are_one_line(capsys, monkeypatch, models, text, tmp_path):
    import transformers

    forward = transformers.GPT2LMHeadModel.forward

    def scaled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = 2 * output.logits
        return output

    monkeypatch.setattr(transformers.GPT2LMHeadModel, "forward", scaled)
    result = run(capsys, *command(models, text, tmp_path / "out"))
    assert_one_line(result, "--model flat", "logits of GPT2LMHeadModel are not its head")


def test_a_missing_extra_is_one_line(capsys, monkeypatch, models):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run(capsys, "evaluate", "--model", models["plain"], "--judge", models["judge"])
    assert_one_line(result, "tightrope[evaluate]")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_is_one_line(capsys, monkeypatch, models, text, tmp_path, name):
    from tightrope.cli.evaluate import report

    monkeypatch.setattr(report, "FILES", ())  # the link stays
    (tmp_path / name).symlink_to("/dev/full")
    few = {name: models[name] for name in ("plain", "judge")}
    more = ["--windows", 1, "--temperature", 1, "--min-p", 0.1]
    result = run(capsys, *command(few, text, tmp_path, *more, quick=name != "samples.md"))
    assert_one_line(result, "--out", name, "No space left on device")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_leave_what_was_written(models, text, tmp_path, number, code):
    temperatures = [x for i in range(5000) for x in ("--temperature", 1 + i / 5000)]
    log = tmp_path / "evaluate.csv"
    ended, err = run_until(log, number, *command(models, text, tmp_path, *temperatures))
    assert ended == code
    assert re.fullmatch(
        r"tightrope: (interrupted|terminated); written to (.*) so far: evaluate\.csv\n", err
    ), err
    assert log.read_text().endswith("\n") and len({len(line) for line in read_csv(log)}) == 1
