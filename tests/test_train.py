"""`tightrope train` and `tightrope generate` on tiny models: one model, several modes, saved and resumed."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from tiny_models import COMMAND, TRAIN_EXTRA, assert_one_line, history, make_tokenizer, run, save_tiny

for name in TRAIN_EXTRA:
    pytest.importorskip(name)

KINDS = ("lora", "blocks", "all")
# Of tiny models, beside another process of tests: teams of threads would take ten times as long.
pytestmark = pytest.mark.usefixtures("one_thread", "not_measured")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def command(model, text, out, *more, **changes):
    options = {"steps": 8, "batch-size": 4, "sequence-length": 16, "learning-rate": 0.01} | changes
    arguments = ["train", "--model", model, "--text", text, "--out", out, *more]
    return arguments + [x for name, value in options.items() for x in (f"--{name}", value)]


@pytest.fixture(scope="module")
def trained(tiny, text, tmp_path_factory):
    """A run's folder, whose model has modes."""
    out = tmp_path_factory.mktemp("trained")
    done = subprocess.run(
        [sys.executable, "-m", "tightrope", *map(str, command(tiny, text, out, steps=30))],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return out


def test_a_run_leaves_a_model_with_modes(trained):
    """A model that transformers alone cannot load; modes that are lost; a card without figures."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(trained / "model")
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    modes = model.config.tightrope["modes"]
    assert sorted(modes) == ["balanced", "creative", "precise"]
    tokens = [i for name in ("precise", "balanced", "creative") for i in modes[name]["tokens"]]
    assert tokens == list(range(300, 324)) == model.generation_config.suppress_tokens
    assert tokenizer.convert_ids_to_tokens(tokens[:1]) == ["<|precise:1|>"]
    assert tokenizer("<|creative:1|>a")["input_ids"][0] == modes["creative"]["tokens"][0]
    card = (trained / "model" / "README.md").read_text()
    for word in (*modes, "cross-entropy", "support entropy", "0.12"):
        assert word in card
    assert (trained / "samples.md").read_text().count("\n- ") == 3 * 16
    assert not list(trained.glob("model/*.bin"))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("how", ["lora", "blocks"])
@pytest.mark.parametrize("kind", ["GPT2", "Phi", "Gemma2", "Granite", "Cohere"])
def test_models_of_every_kind(capsys, text, tmp_path, kind, how):
    """A layout that is written down: the head's bias, its softcap or scale, what blocks are called."""
    folder = save_tiny(tmp_path / "model", kind)
    capsys.readouterr()  # transformers' bar of what it writes
    code, _, err = run(capsys, *command(folder, text, tmp_path / "out", steps=2), "--train", how)
    assert (code, err) == (0, "")


@pytest.mark.parametrize("how", KINDS)
def test_what_trains(capsys, tiny, text, tmp_path, how):
    """Frozen weights that move; rows of the modes that do not, or not by their own learning rate."""
    from transformers import AutoModelForCausalLM

    rates = {"learning-rate": 1e-4, "mode-learning-rate": 1e-2}
    assert run(capsys, *command(tiny, text, tmp_path, "--train", how, steps=3, **rates))[0] == 0
    before = AutoModelForCausalLM.from_pretrained(tiny).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    moved = {
        name: not torch.equal(value, after[name][: len(value)])
        for name, value in before.items()
        if name != "lm_head.weight"
    }
    first = "model.layers.0.self_attn.q_proj.weight"
    assert moved[first] == (how != "blocks") and moved["model.layers.2.mlp.up_proj.weight"]
    assert moved["model.embed_tokens.weight"] == (how == "all")
    assert moved["model.norm.weight"] == (how != "lora")
    rows = after["model.embed_tokens.weight"][300:] - before["model.embed_tokens.weight"][[0]]
    assert rows.abs().max() > 1e-3, "three steps of at most a hundredth, not of a ten-thousandth"


def test_accumulated_batches_are_one_batch(capsys, tiny, text, tmp_path):
    """A mean of means; a balance of another micro-batch."""
    for name, sizes in {"one": (6, 1), "two": (3, 2)}.items():
        more = {"batch-size": sizes[0], "accumulate": sizes[1], "balance": "a=0.1"}
        arguments = command(tiny, text, tmp_path / name, "--balance", "b=0.3", steps=3, **more)
        assert run(capsys, *arguments)[0] == 0
    one, two = (history(tmp_path / name) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a["a/entropy"] == pytest.approx(b["a/entropy"], rel=1e-5)


def test_reports_and_evaluation(capsys, tiny, text, tmp_path):
    """A mode that is not evaluated; figures that no report gets; a target that steers nothing."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = ["--eval-steps", 4, "--report-to", "tensorboard", "--bf16", "--target-entropy", "creative=1"]
    assert run(capsys, *command(tiny, text, tmp_path, *more))[0] == 0
    (events,) = tmp_path.glob("checkpoints/runs/*/events*")
    tags = EventAccumulator(str(events)).Reload().Tags()["scalars"]
    for mode in ("precise", "balanced", "creative"):
        assert {f"train/{mode}/entropy", f"train/{mode}/balance", f"eval/{mode}/cross_entropy"} <= set(tags)
    rows = history(tmp_path)
    assert [row["step"] for row in rows if "eval_loss" in row] == [4, 8]
    balances = [row["creative/balance"] for row in rows if "loss" in row]
    assert balances[-1] < balances[0] <= 0.25, "the entropy is above 1"
    assert balances == sorted(balances, reverse=True)
    result = run(capsys, *command(tiny, text, tmp_path, "--report-to", "carrier pigeons"))
    assert_one_line(result, "--report-to", "carrier pigeons", "tensorboard")


def test_gradient_noise_reaches_the_loss(capsys, monkeypatch, tiny, text, tmp_path):
    """An option that nothing comes of; a number that is taken for another; a card that keeps it quiet."""
    from tightrope.cli import job

    given, fuse = [], job.fuse

    def and_look(*args, **options):
        given.append(options["gradient_noise"])
        return fuse(*args, **options)

    monkeypatch.setattr(job, "fuse", and_look)
    for i, values in enumerate(((), ("0.05",), ("0.05", "0"))):
        noise = ("--gradient-noise", *values) if values else ()
        assert run(capsys, *command(tiny, text, tmp_path / str(i), *noise, steps=1))[0] == 0
        card = (tmp_path / str(i) / "model" / "README.md").read_text()
        assert ("--gradient-noise 0.05" in card) == bool(values)
    assert given == [(0.0, 0.0), 0.05, (0.05, 0.0)]
    for values, words in ((("1",), ("'1'", "below 1")), (("0.1", "0.1", "0.1"), ("3 numbers",))):
        result = run(capsys, *command(tiny, text, tmp_path / "no", "--gradient-noise", *values))
        assert_one_line(result, "--gradient-noise", *words)


def test_resumed_after_a_kill_it_ends_as_if_it_had_not_been(tiny, text, tmp_path):
    """A resumed run that takes other batches, forgets its optimizer or its balances, or starts anew."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    more = ("--save-steps", 2, "--target-entropy", "creative=5.5")
    program = [sys.executable, "-c", COMMAND]
    arguments = [str(x) for x in command(tiny, text, whole, *more, steps=14)]
    assert subprocess.run([*program, *arguments], timeout=240).returncode == 0
    arguments = [str(x) for x in command(tiny, text, cut, *more, steps=14)]
    process = subprocess.Popen([*program, *arguments])
    deadline = time.monotonic() + 120
    while not (cut / "checkpoints" / "checkpoint-4" / "trainer_state.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    shutil.copytree(cut / "checkpoints" / "checkpoint-4", cut / "checkpoints" / "checkpoint-99")
    (cut / "checkpoints" / "checkpoint-99" / "trainer_state.json").write_text("")  # cut short
    arguments.append("--resume")
    assert subprocess.run([*program, *arguments], timeout=240).returncode == 0
    expected, resumed = ([(row["step"], row["loss"]) for row in history(out)] for out in (whole, cut))
    assert resumed == expected and [step for step, _ in expected] == list(range(1, 15))


class _Runs:
    """Pickles to code that leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_checkpoint_executes_nothing(capsys, tiny, text, tmp_path):
    """A pickle out of a folder that somebody else had his hands on."""
    arguments = command(tiny, text, tmp_path, "--save-steps", 4)
    assert run(capsys, *arguments)[0] == 0
    checkpoint, ran = tmp_path / "checkpoints" / "checkpoint-4", tmp_path / "ran"
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-8")
    torch.save(_Runs(ran), checkpoint / "training_args.bin")  # nobody's business
    assert run(capsys, *arguments, "--resume")[0] == 0
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-8")
    # Each is one that resuming reads, or would, were it there.
    for name in ("scheduler.pt", "rng_state.pth", "optimizer.pt", "pytorch_model.bin"):
        kept = (checkpoint / name).read_bytes() if (checkpoint / name).exists() else None
        torch.save(_Runs(ran), checkpoint / name)
        assert_one_line(run(capsys, *arguments, "--resume"), "--resume", "checkpoint-4", "not run")
        (checkpoint / name).unlink() if kept is None else (checkpoint / name).write_bytes(kept)
    assert not ran.exists()
    for name in ("optimizer.pt", "adapter_model.safetensors"):
        kept = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(kept[: len(kept) // 2])
        assert_one_line(run(capsys, *arguments, "--resume"), "--resume", "checkpoint-4", "damaged")
        (checkpoint / name).write_bytes(kept)


PROGRAM = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, out = sys.argv[1:]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
mode = tokenizer.decode(model.config.tightrope["modes"]["creative"]["tokens"])
torch.save(model(**tokenizer(mode + "The quick brown", return_tensors="pt")).logits, out)
assert "tightrope" not in sys.modules
"""


@pytest.mark.parametrize("how", ["lora", "all"])
def test_the_saved_model_has_the_logits_that_training_ended_with(
    capsys, monkeypatch, tiny, text, tmp_path, how
):
    """Weights that were not saved, or not tied as they were; adapters merged wrongly; other ids of a mode."""
    from tightrope.cli import job, modes

    ended = {}
    train = job.ModeTrainer.train

    def and_look(self, *args, **options):
        train(self, *args, **options)
        known = modes.of(self.model)["creative"]
        ids = [*known.tokens, *make_tokenizer()("The quick brown")["input_ids"]]
        self.model.eval()
        self.handle.restore()
        with torch.no_grad():
            ended["logits"] = self.model(torch.tensor([ids])).logits

    monkeypatch.setattr(job.ModeTrainer, "train", and_look)
    assert run(capsys, *command(tiny, text, tmp_path, "--train", how))[0] == 0
    arguments = [sys.executable, "-c", PROGRAM, str(tmp_path / "model"), str(tmp_path / "logits.pt")]
    subprocess.run(arguments, check=True, timeout=120, capture_output=True)
    loaded = torch.load(tmp_path / "logits.pt")
    if how == "lora":  # merged, which rounds
        torch.testing.assert_close(loaded, ended["logits"], rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(loaded, ended["logits"])


def test_what_cannot_be_resumed_is_one_line(capsys, tiny, text, tmp_path, trained):
    """A run that goes on with other options, or begins where nothing was."""
    assert_one_line(run(capsys, *command(tiny, text, tmp_path, "--resume")), "--resume", "no run to resume")
    changed = command(tiny, text, trained, "--resume", steps=31)
    assert_one_line(run(capsys, *changed), "--resume", "--steps 30", "31")


JSONL = [{"prompt": "the fox", "response": " jumps", "mode": "bold"}, {"text": "the dog says nothing"}]


def test_prompts_are_not_trained_on(tmp_path):
    """A loss over prompts; a response without its end; a mode that is not the line's."""
    from tightrope.cli import data, modes
    from tightrope.cli.train import Collator, Turns

    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in JSONL * 4))
    names = ["plain", "bold"]
    split = data.make_sequences(
        tokenizer, path.read_text(), path, length=16, batch_size=2, seed=0, modes=names
    )
    known = {name: modes.Mode(name, 0.1, (300 + i, 310 + i)) for i, name in enumerate(names)}
    answer = next(s for s in split.train if s.prompt)
    assert tokenizer.decode(answer.ids) == "the fox jumps<end>" and answer.mode == "bold"
    turns = Turns([answer], names)
    batch = Collator(tokenizer, known)([turns[0], (data.Sequence([5, 6, 7, 8, 9, 10, 11]), 0)])
    assert batch["mode"].tolist() == [1, 0]
    assert batch["input_ids"][:, :2].tolist() == [[301, 311], [300, 310]]
    labels = batch["labels"][0]
    asked = labels[labels != -100].tolist()
    assert tokenizer.decode(asked) == " jumps<end>"
    assert (batch["labels"][1] != -100).sum() == 7


def test_sequences_take_turns_in_modes():
    """A sequence that is only ever seen in one mode."""
    from tightrope.cli.data import Sequence
    from tightrope.cli.train import Turns

    turns = Turns([Sequence([i]) for i in range(6)], ["a", "b", "c"], 18)
    seen = [(turns[i][0].ids[0], turns[i][1]) for i in range(18)]
    assert len(set(seen)) == 18


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ["line 1", "not JSON"]),
        ("[1]", ["line 1", "list", "expected text"]),
        ('{"text": 3}', ["line 1", "text", "int"]),
        ('{"prompt": "a"}', ["line 1", "prompt"]),
        ('{"prompt": "", "response": "a"}', ["empty prompt"]),
        ('{"text": "a b c", "mode": "wild"}', ["mode", "wild", "precise"]),
    ],
)
def test_a_bad_line_is_one_line(capsys, tiny, tmp_path, line, words):
    path = tmp_path / "lines.jsonl"
    path.write_text(line)
    assert_one_line(run(capsys, *command(tiny, path, tmp_path / "out")), "--text", *words)


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({path!r}).write_text("")
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_a_model_runs_only_where_it_is_trusted(capsys, monkeypatch, text, tmp_path):
    """A folder that runs what it likes."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    ran, folder = tmp_path / "ran", save_tiny(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE.format(path=str(ran)))
    capsys.readouterr()
    result = run(capsys, *command(folder, text, tmp_path / "out"))
    assert_one_line(result, "--model", "--trust-remote-code")
    assert not ran.exists()
    assert run(capsys, *command(folder, text, tmp_path / "out", "--trust-remote-code"))[0] == 0
    assert ran.exists()


def test_a_model_with_modes_is_not_given_more(capsys, trained, text, tmp_path):
    result = run(capsys, *command(trained / "model", text, tmp_path))
    assert_one_line(result, "--model", "has modes already")


def test_generate_in_every_mode(capsys, trained):
    """A mode that is not shown; tokens of modes in the text; another text from the same seed."""
    arguments = ["generate", "--model", trained / "model", "--prompt", "The quick", "--tokens", 8]
    code, out, err = run(capsys, *arguments)
    assert (code, err) == (0, "")
    for name in ("precise", "balanced", "creative"):
        assert f"{name}: The quick" in out
    assert "<|" not in out and run(capsys, *arguments)[1] == out
    code, one, _ = run(capsys, *arguments, "--mode", "creative")
    assert code == 0 and one.startswith("The quick")
    code, between, _ = run(capsys, *arguments, "--balance", 0.2)
    assert code == 0 and between.startswith("The quick")


def test_generate_says_what_it_cannot_do(capsys, trained, tiny):
    arguments = ["generate", "--model", trained / "model", "--prompt", "The quick"]
    names = ["precise", "balanced", "creative"]
    assert_one_line(run(capsys, *arguments, "--mode", "wild"), "--mode", "wild", *names)
    assert_one_line(run(capsys, *arguments, "--balance", 0.9), "--balance", "0.9", "creative 0.25")
    assert_one_line(run(capsys, *arguments, "--balance", 0.1, "--mode", "precise"), "--balance", "--mode")
    assert_one_line(run(capsys, *arguments, "--tokens", 1000), "--tokens", "1000")
    plain = ["generate", "--model", tiny, "--prompt", "The quick"]
    assert_one_line(run(capsys, *plain, "--mode", "creative"), "--mode", "no modes")
    assert run(capsys, *plain, "--tokens", 3)[0] == 0


def test_the_dial_between_two_modes():
    """Embeddings of the wrong two modes, or mixed the wrong way round."""
    from tightrope.cli.modes import Mode, dialled

    table = torch.tensor([[0.0], [1.0], [3.0]])
    modes = {n: Mode(n, b, (i,)) for i, (n, b) in enumerate((("a", 0.0), ("b", 0.2), ("c", 0.4)))}
    for balance, expected in ((0.0, 0.0), (0.05, 0.25), (0.2, 1.0), (0.3, 2.0), (0.4, 3.0)):
        assert math.isclose(dialled(modes, balance, table).item(), expected, abs_tol=1e-6)


def test_evaluate_takes_each_mode_for_a_model(capsys, trained, text, tmp_path):
    """One row for a model with modes; modes that are judged as if none had been asked for."""
    arguments = ["evaluate", "--model", trained / "model", "--text", text, "--out", tmp_path, "--quick"]
    code, _, err = run(capsys, *arguments, "--sequence-length", 16)
    assert (code, err) == (0, "")
    written = (tmp_path / "evaluate.csv").read_text()
    for name in ("precise", "balanced", "creative"):
        assert f",{name}," in written
