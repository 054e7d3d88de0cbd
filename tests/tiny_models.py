"""Tiny models in folders, and the command, run in this process or another: what its tests share."""

import csv
import json
import subprocess
import sys
import time

import torch

from tightrope.cli import main

TEXT = "The quick brown fox jumps over the lazy dog, and the dog says nothing at all of it.\n" * 120
TRAIN_EXTRA = ("transformers", "tokenizers", "accelerate", "peft", "gguf", "psutil", "rich")

# The command in a process of its own, without the further one that measures the loss for train. A parent that
# ignores SIGINT, as shells make of background jobs, hands that down; undo it.
COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from tightrope.cli import main, probe
probe.measure = lambda *_: []
sys.exit(main())
"""


def run(capsys, *arguments):
    """Exit code, stdout and stderr of the command."""
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as end:  # argparse
        code = end.code
    out, err = capsys.readouterr()
    return code, out, err


def run_until(log, number, *arguments):
    """The command in a process of its own, sent a signal once log has six lines; (exit code, stderr)."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > 5):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def assert_one_line(result, *words):
    code, _, err = result
    assert code == 2
    assert err.startswith("tightrope") and err.count("\n") == 1, err
    for word in words:
        assert word in err


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def history(out):
    """What a run of train logged, of every step and evaluation."""
    state = json.loads((out / "checkpoints" / "trainer_state.json").read_text())
    return [row for row in state["log_history"] if "loss" in row or "eval_loss" in row]


def cells(path):
    """The lines of a file's Markdown tables by their first cell."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {name: values for name, *values in rows if name not in ("---", "mode", "implementation")}


def make_tokenizer(size=300):
    """A byte-level tokenizer of `TEXT`."""
    import tokenizers
    import transformers

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(
        [TEXT],
        tokenizers.trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=["<end>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>")


def make_model(kind="Llama", *, seed=0, vocab_size=300, **changes):
    """A random model of three blocks."""
    import transformers

    options = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if kind == "GPT2":
        del options["num_key_value_heads"], options["intermediate_size"]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**options | changes)
    return getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config).eval()


def save_tiny(folder, kind="Llama", tokens=300, **changes):
    """Puts a random model and its tokenizer into a folder."""
    tokenizer = make_tokenizer(tokens)
    make_model(kind, vocab_size=len(tokenizer), **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
