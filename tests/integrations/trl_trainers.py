"""TRL's trainers on tiny models and data, and what their steps log and allocate: for the tests of TRL."""

import copy
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported

import tiny
import trl
from datasets import Dataset
from torch.profiler import profile

from tightrope.strategies import workspace

# transformers' own use of its old names, and TRL's.
WARNINGS = "ignore:.*gradient_checkpointing.* is deprecated and will be removed:FutureWarning"
TEXTS = [[tiny.WORDS[(7 * i + 3 * j) % len(tiny.WORDS)] for j in range(4 + i)] for i in range(8)]
NOT_REPEATABLE = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "step_time"}
# Of models whose logits shall be the largest thing by far.
V = 8192


def arguments(config, tmp_path, **options):
    common = {
        "output_dir": str(tmp_path),
        "max_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    return config(**{**common, **options})


def words(lists):
    return [" ".join(one) for one in lists]


def completions():
    return Dataset.from_dict(
        {"prompt": words(t[:2] for t in TEXTS), "completion": words(["", *t[2:]] for t in TEXTS)}
    )


def sft(model, path, kind=trl.SFTTrainer, **options):
    own = {k: options.pop(k) for k in ("balance", "loss_fn", "loss_options", "peft_config") if k in options}
    data = {"train_dataset": completions(), "eval_dataset": completions()}
    args = arguments(trl.SFTConfig, path, **options)
    return kind(model, args, **data, processing_class=tiny.tokenizer(), **own)


def dpo(model, path, **options):
    columns = {
        "prompt": TEXTS,
        "chosen": [["", *t] for t in TEXTS[::-1]],
        "rejected": [["", *t] for t in TEXTS],
    }
    data = Dataset.from_dict({name: words(lists) for name, lists in columns.items()})
    args = arguments(trl.DPOConfig, path, **options)
    reference = copy.deepcopy(model)
    return trl.DPOTrainer(model, reference, args, train_dataset=data, processing_class=tiny.tokenizer())


def kto(model, path, **options):
    columns = {"prompt": TEXTS, "completion": [["", *t] for t in TEXTS[::-1]]}
    data = {name: words(lists) for name, lists in columns.items()} | {"label": [True, False] * 4}
    args = arguments(trl.KTOConfig, path, **options)
    reference, data = copy.deepcopy(model), Dataset.from_dict(data)
    return trl.KTOTrainer(model, reference, args, train_dataset=data, processing_class=tiny.tokenizer())


def reward(completions, **_):
    return [float(len(text) % 7) for text in completions]


def grpo(model, path, kind="GRPO", **options):
    sampling = {"temperature": 0.7, "num_generations": 4, "max_completion_length": 8}
    args = arguments(getattr(trl, f"{kind}Config"), path, **{**sampling, **options})
    given = {
        "train_dataset": Dataset.from_dict({"prompt": words(TEXTS)}),
        "processing_class": tiny.tokenizer(),
    }
    return getattr(trl, f"{kind}Trainer")(model, reward, args=args, **given)


def history(trainer):
    trainer.train()
    return [
        {k: v for k, v in entry.items() if k not in NOT_REPEATABLE} for entry in trainer.state.log_history
    ]


def largest_allocation(step) -> int:
    """Bytes of the largest block of memory that step() takes, in any thread or kernel."""
    workspace.release()
    with profile(profile_memory=True, acc_events=True) as record:
        step()
    events = record.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")
