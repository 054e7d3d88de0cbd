"""docs/recipes.md: each of its blocks runs as it stands there, and means what plain PyTorch says.

A block is run after the page's first, in float32 and in float64. Its ``loss`` and the gradients of every
leaf are then compared with those of the function below that has the section's name, which makes all
logits, on float64 copies of the leaves.
"""

import copy
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import tightrope
from helpers import ROOT, assert_within, child_environment

PAGE = ROOT / "docs" / "recipes.md"
F64, F32 = torch.float64, torch.float32
TOLERANCE = {F32: 2e-5, F64: 1e-11}


def blocks() -> dict[str, str]:
    """The page's Python by heading, behind empty lines that make a traceback's line numbers the page's."""
    found, heading, code, inside = {}, "", [], False
    for number, line in enumerate(PAGE.read_text(encoding="utf-8").splitlines()):
        if inside and line == "```":
            assert heading not in found, f"two blocks under {heading!r}"
            found[heading], inside = "\n".join(code), False
        elif inside:
            code.append(line)
        elif line == "```python":
            code, inside = [""] * (number + 1), True
        elif re.match("#+ ", line):
            heading = line.lstrip("# ")
    return found


BLOCKS = blocks()


def run(heading: str, names: dict) -> None:
    exec(compile(BLOCKS[heading], PAGE, "exec"), names)


def preamble(dtype=F64) -> dict:
    torch.set_default_dtype(dtype)
    names = {}
    run("Recipes", names)
    # A random model is never right: let the likeliest class be the label of every other token.
    label, likeliest = names["labels"][:, 1:], names["lm_head"](names["hidden"])[:, :-1].argmax(-1)
    right = (label != -100) & (torch.arange(15) % 2 == 0)
    label[right] = likeliest[right]
    return names


def leaves(names: dict) -> list[torch.Tensor]:
    """All tensors of a block that take gradients, in one order."""
    found = []
    for value in names.values():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, torch.nn.Module):
                found += item.parameters()
            elif isinstance(item, torch.Tensor) and item.is_leaf and item.requires_grad:
                found.append(item)
    return found


def twin(value):
    """A float64 copy of a leaf, of a module or of a list of modules; numbers and statistics as they are."""
    if isinstance(value, (int, float, tuple)):
        return value
    if isinstance(value, list):
        return [twin(item) for item in value]
    if isinstance(value, torch.nn.Module):
        return copy.deepcopy(value).double()
    if isinstance(value, torch.Tensor) and value.is_leaf:
        copied = value.detach().clone()
        return copied.double().requires_grad_(value.requires_grad) if value.is_floating_point() else copied
    return None


def twins(names: dict) -> SimpleNamespace:
    return SimpleNamespace(**{name: twin(value) for name, value in names.items()})


def predictions(s, hidden=None, weight=None):
    """Log-probabilities [n, V] at the positions that predict a token that counts, and its class [n]."""
    hidden, weight = s.hidden if hidden is None else hidden, s.lm_head.weight if weight is None else weight
    label = s.labels[:, 1:]
    return (hidden @ weight.T).log_softmax(-1)[:, :-1][label != -100], label[label != -100]


def label_log_probs(s, hidden=None):
    log_p, label = predictions(s, hidden)
    return log_p.gather(1, label[:, None])[:, 0]


def entropy_of(log_p):
    return -(log_p.exp() * log_p).sum(-1)


def packed_documents(s):
    """A token that predicts across the boundary, or one too many that is dropped."""
    z, k = s.lm_head(s.hidden), s.k
    logits = [z[:, start : stop - k].flatten(0, 1) for start, stop in ((0, 7), (7, 16))]
    target = [s.labels[:, start + k : stop].flatten() for start, stop in ((0, 7), (7, 16))]
    return F.cross_entropy(torch.cat(logits), torch.cat(target))


def multi_token_prediction(s):
    """A distance off by one, or a mean over all distances' tokens instead of the mean of means."""
    losses = [
        F.cross_entropy(s.lm_head(layer(s.hidden))[:, :-k].flatten(0, 1), s.labels[:, k:].flatten())
        for k, layer in zip((1, 2, 3), s.layers)
    ]
    return torch.stack(losses).mean()


def mean_over_sequences(s):
    """Lengths that count ignored tokens, or weights at the token instead of where it is predicted."""
    z = s.lm_head(s.hidden)[:, :-1]
    return torch.stack([F.cross_entropy(logits, y[1:]) for logits, y in zip(z, s.labels)]).mean()


def gradient_accumulation(s):
    """A mean of means."""
    log_p, label = predictions(s)
    return F.nll_loss(log_p, label)


def class_weights(s):
    """A mean that divides by the tokens, or smoothing that spreads evenly."""
    z, y = s.lm_head(s.hidden)[:, :-1].flatten(0, 1), s.labels[:, 1:].flatten()
    return F.cross_entropy(z, y, s.class_weight, label_smoothing=0.1)


def mask_of_a_distribution(s):
    """0 times NaN."""
    log_p = s.lm_head(s.hidden).log_softmax(-1)[s.mask]
    return F.cross_entropy(log_p, s.teacher[s.mask])


def weights_of_both_signs(s):
    """A divisor that follows the weights."""
    z, y = s.lm_head(s.hidden)[:, :-1], s.labels[:, 1:]
    loss = F.cross_entropy(z.transpose(1, 2), y, reduction="none")
    return (s.advantage * loss).sum() / (y != -100).sum()


def numbers_to_log(s):
    """Averages over all positions, or over targets that are not those of the position."""
    log_p, label = predictions(s)
    z = s.lm_head(s.hidden)[:, :-1][s.labels[:, 1:] != -100]
    ce, entropy = F.cross_entropy(z, label), entropy_of(log_p).mean()
    z_loss = 1e-4 * z.logsumexp(-1).square().mean()
    numbers = {
        "accuracy": (z.argmax(-1) == label).double().mean(),
        "cross_entropy": ce,
        "perplexity": ce.exp(),
        "entropy": entropy,
        "z_loss": z_loss,
    }
    return 0.9 * ce - 0.1 * entropy + z_loss, numbers


def entropy_bonus(s):
    """A wrong factor."""
    log_p, label = predictions(s)
    return F.nll_loss(log_p, label) - 0.1 * entropy_of(log_p).mean()


def clamped_bonus(s):
    """An entropy that is not renormalised, or one of the whole vocabulary."""
    log_p, _ = predictions(s)
    inside = log_p >= log_p.detach().amax(-1, keepdim=True) + math.log(0.05)
    log_r = log_p.masked_fill(~inside, -math.inf)
    log_r = log_r - log_r.logsumexp(-1, keepdim=True)
    entropy = -(log_r.exp() * log_r.masked_fill(~inside, 0.0)).sum(-1)
    advantage = s.advantage.expand(4, 15)[s.labels[:, 1:] != -100]
    return (-advantage * label_log_probs(s) - 0.01 * entropy).mean()


def open_and_clean(s):
    """A price on the rest's mass in the place of the set's, or a set that is found in other logits."""
    log_p, label = predictions(s)
    inside = log_p >= log_p.detach().amax(-1, keepdim=True) + math.log(1e-4)
    log_kept = log_p.masked_fill(~inside, -math.inf)
    log_mass = log_kept.logsumexp(-1, keepdim=True)
    entropy = entropy_of((log_kept - log_mass).masked_fill(~inside, -1e4))
    return 0.938 * F.nll_loss(log_p, label) - 0.062 * entropy.mean() - 0.35 * log_mass.mean()


def unlikelihood(s):
    """Candidates of another position, or the right token among them."""
    keep = s.labels[:, 1:] != -100
    log_p, _ = predictions(s)
    loss = []
    for row, (i, t) in zip(log_p, keep.nonzero().tolist()):
        before = {int(s.tokens[i, j]) for j in (t - 1, t) if t >= 1} - {int(s.tokens[i, t + 1])}
        loss.append(-row[[c for c in range(500) if c not in before]].logsumexp(-1))
    return torch.stack(loss).mean()


def gem(s):
    """A scale on the wrong side, of the logits or of the loss: the gradient is written down here."""
    label = s.labels[:, 1:][s.labels[:, 1:] != -100]
    z = s.lm_head(s.hidden)[:, :-1][s.labels[:, 1:] != -100]
    gradient = (z.detach() / 0.7).softmax(-1) - F.one_hot(label, 500)
    value = 0.7 * F.cross_entropy(z.detach() / 0.7, label)
    return value + ((z - z.detach()) * gradient).sum() / len(label)


def focal(s):
    """A wrong power, or a gradient that stops at the gate."""
    log_p = label_log_probs(s)
    return -((1 - log_p.exp()).square() * log_p).mean()


def dft(s):
    """A gradient through the gate."""
    log_p = label_log_probs(s)
    return -(log_p.exp().detach() * log_p).mean()


def entropy_gate(s):
    """A gradient through the gate, or one that is not between 0 and 1."""
    log_p, label = predictions(s)
    return (entropy_of(log_p).detach() / math.log(500) * F.nll_loss(log_p, label, reduction="none")).mean()


def one_target(s):
    """Teacher and label of different positions, a lost mass, or a token that counts without a label."""
    keep = s.labels[:, 1:] != -100
    log_p, label = predictions(s)
    teacher, indices = s.teacher_probs[:, :-1][keep], s.teacher_indices[:, :-1][keep]
    distillation = -(teacher * log_p.gather(1, indices)).sum(-1).mean()
    return 0.5 * F.nll_loss(log_p, label) + 0.5 * distillation


def reverse_kl(s):
    """KL the other way round, or averaged over tokens that weigh nothing."""
    log_p, _ = predictions(s)
    log_b = s.teacher_log_probs[:, :-1][s.labels[:, 1:] != -100]
    return F.kl_div(log_b, log_p, log_target=True, reduction="batchmean")


def reverse_kl_top_k(s):
    """The rest counted for the wrong tokens, or left out."""
    keep = s.labels[:, 1:] != -100
    log_p, _ = predictions(s)
    top, indices = s.log_probs[:, :-1][keep], s.indices[:, :-1][keep]
    share = (1 - top.exp().sum(-1, keepdim=True)) / (500 - 8)
    log_b = share.log().expand_as(log_p).scatter(1, indices, top)
    assert torch.allclose(log_b.exp().sum(-1), torch.ones(len(log_b)).double())
    return F.kl_div(log_b, log_p, log_target=True, reduction="batchmean")


def _top_k(s):
    """The student's log-probabilities of the top k, the teacher's, all the student's, and the classes."""
    keep = s.labels[:, 1:] != -100
    log_p, _ = predictions(s)
    indices = s.indices[:, :-1][keep]
    return log_p.gather(1, indices), s.probs[:, :-1][keep].double(), log_p, indices


def with_tail(s):
    """A tail that is free, or one found by subtraction."""
    top, probs, log_p, indices = _top_k(s)
    outside = torch.ones_like(log_p, dtype=torch.bool).scatter(1, indices, False)
    tail = log_p.masked_fill(~outside, -math.inf).logsumexp(-1)
    return -((probs * top).sum(-1) + (1 - probs.sum(-1)) * tail).mean()


def renormalised(s):
    """A student that is not renormalised."""
    top, probs, _, _ = _top_k(s)
    return -(probs * top.log_softmax(-1)).sum(-1).mean()


def replayed(s):
    """Kept classes of another position, or a temperature that is left out."""
    keep = s.labels[:, 1:] != -100
    logits = (s.hidden @ s.lm_head.weight.T / 0.8)[:, :-1][keep]
    kept = s.kept[:, 1:][keep]
    inside = torch.zeros_like(logits, dtype=torch.bool).scatter(1, kept, True)
    log_p = logits.masked_fill(~inside, -math.inf).log_softmax(-1)
    log_p = log_p.gather(1, s.labels[:, 1:][keep][:, None])[:, 0]
    return (-s.advantage.expand(4, 15)[keep] * log_p).mean()


def kl_to_reference(s):
    """The ratio upside down, or a divisor that counts ignored tokens."""
    log_ratio = label_log_probs(s, s.reference_hidden).detach() - label_log_probs(s)
    return (log_ratio.exp() - 1 - log_ratio).mean()


def taught(s):
    """(log p of the student, log b of the teacher) of the tokens that count."""
    keep = F.pad(s.labels[:, 1:] != -100, (0, 1))
    return s.lm_head(s.hidden[keep]), s.teacher_hidden[keep].double() @ s.teacher_head.weight.detach().t()


def whole_teacher(s):
    """A teacher at the student's temperature, an entropy of other tokens, or a gradient to the teacher."""
    z, t = taught(s)
    log_p, log_b = ((x / 2).log_softmax(-1) for x in (z, t))
    kl = (log_b.exp() * (log_b - log_p)).sum(-1).mean()
    return -(log_b.exp() * log_p).sum(-1).mean(), {"kl": kl.detach()}


def reverse_kl_to_whole_teacher(s):
    """A smoothing that is the student's, or none."""
    z, t = taught(s)
    b = 0.99 * t.softmax(-1) + 0.01 / 500
    return (z.softmax(-1) * (z.log_softmax(-1) - b.log())).sum(-1).mean()


def jensen_shannon(s):
    """A mixture of other tokens, or the gradient of one of its two parts."""
    z, t = taught(s)
    p, b = z.softmax(-1), t.softmax(-1)
    m = (p + b) / 2
    return 0.5 * ((p * (p / m).log()).sum(-1) + (b * (b / m).log()).sum(-1)).mean()


def grpo(s):
    """A clip on the wrong side for one sign of the advantage, or row_args at another position."""
    keep, log_p = s.labels[:, 1:] != -100, label_log_probs(s)
    old, reference = (s.row_args[i][:, :-1][keep].double() for i in (0, 1))
    advantage = s.advantage.expand(4, 15)[keep]
    ratio = (log_p - old).exp()
    policy = torch.where(advantage > 0, ratio.clamp(max=1.2) * advantage, ratio.clamp(min=0.8) * advantage)
    assert (ratio > 1.2).any() and (ratio < 0.8).any(), "both clips must be at work"
    log_ratio = reference - log_p
    return (0.04 * (log_ratio.exp() - 1 - log_ratio) - policy).mean()


def gspo(s):
    """A mean that counts ignored tokens, or a ratio for each token."""
    losses = []
    for i in range(4):
        keep = s.labels[i, 1:] != -100
        log_p = s.lm_head(s.hidden[i, :-1][keep]).log_softmax(-1).gather(1, s.labels[i, 1:][keep][:, None])
        log_ratio = (log_p[:, 0] - s.old.target_log_prob[i, :-1][keep].double()).mean()
        ratio, a = log_ratio.exp(), s.advantage[i, 0]
        losses.append(-torch.minimum(ratio * a, ratio.clamp(1 - 3e-4, 1 + 4e-4) * a))
    return torch.stack(losses).mean()


def lora(s):
    """A scale or a column in the wrong half, or a view that the optimizer would step for nothing."""
    log_p, label = predictions(s, weight=s.lm_head.weight.detach() + s.scale * s.lora_b @ s.lora_a)
    return F.nll_loss(log_p, label)


REFERENCES = {
    "Packed documents": packed_documents,
    "Multi-token prediction": multi_token_prediction,
    "Each sequence weighs the same": mean_over_sequences,
    "Gradient accumulation": gradient_accumulation,
    "Class weights": class_weights,
    "A mask where the target is a distribution": mask_of_a_distribution,
    "Weights of both signs": weights_of_both_signs,
    "Numbers to log": numbers_to_log,
    "An entropy bonus": entropy_bonus,
    "The entropy of what is plausible": clamped_bonus,
    "Open within, and clean outside": open_and_clean,
    "Unlikelihood of several candidates": unlikelihood,
    "GEM": gem,
    "Focal loss": focal,
    "DFT": dft,
    "Entropy gate": entropy_gate,
    "Cross-entropy and distillation in one target": one_target,
    "A whole teacher": whole_teacher,
    "Reverse KL to a whole teacher": reverse_kl_to_whole_teacher,
    "Jensen-Shannon to a whole teacher": jensen_shannon,
    "Reverse KL": reverse_kl,
    "Reverse KL to a teacher's top k": reverse_kl_top_k,
    "The top k and the tail as one bucket": with_tail,
    "The top k renormalised": renormalised,
    "Replay of top-k and top-p sampling": replayed,
    "KL to a reference policy": kl_to_reference,
    "PPO and GRPO": grpo,
    "A loss over a sequence: GSPO": gspo,
    "LoRA on the head": lora,
}


def test_every_block_has_a_test():
    """A section that was added without a reference."""
    assert BLOCKS.keys() == REFERENCES.keys() | {"Recipes", "Data parallel"}


def compare(names: dict, reference) -> None:
    dtype = names["hidden"].dtype
    exact = twins(names)
    truth = reference(exact)
    truth, numbers = truth if isinstance(truth, tuple) else (truth, {})
    found = leaves(names)
    if names["hidden"].grad is None:  # else the block went backward itself
        names["loss"].backward()
    assert names["hidden"].grad.any()
    for name, number in {"loss": truth, **numbers}.items():
        assert_within(names[name], number, TOLERANCE[dtype], what=name)
    grads = torch.autograd.grad(truth, leaves(vars(exact)), allow_unused=True)
    assert len(grads) == len(found)
    for leaf, grad in zip(found, grads):
        actual, wanted = (torch.zeros_like(leaf) if g is None else g for g in (leaf.grad, grad))
        assert_within(actual, wanted, TOLERANCE[dtype], what=f"gradient of {list(leaf.shape)}")


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("heading", REFERENCES)
def test_recipe(heading, dtype):
    """A recipe that says what it does not do: each reference names what it would catch."""
    names = preamble(dtype)
    run(heading, names)
    compare(names, REFERENCES[heading])


@pytest.mark.parametrize("k", [2, 3])
def test_packed_documents_at_other_shifts(k, monkeypatch):
    """A rule that holds for the next token alone."""
    code = BLOCKS["Packed documents"]
    assert "\nk = 1\n" in code
    monkeypatch.setitem(BLOCKS, "Packed documents", code.replace("\nk = 1\n", f"\nk = {k}\n"))
    names = preamble()
    run("Packed documents", names)
    compare(names, packed_documents)


def test_data_parallel(monkeypatch):
    """Ranks that count differently and are averaged: a mean of means, or one too small by the world size."""
    ranks = [preamble(), preamble()]
    ranks[1]["lm_head"] = copy.deepcopy(ranks[0]["lm_head"])
    ranks[1]["labels"][0] = -100
    counts = [(names["labels"][:, 1:] != -100).sum().item() for names in ranks]
    assert counts[0] != counts[1]
    own = tightrope.distributed.token_count

    def token_count(targets):
        assert own(targets).item() in counts
        return torch.tensor(sum(counts))

    monkeypatch.setattr(tightrope.distributed, "token_count", token_count)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for names in ranks:
        run("Data parallel", names)
        names["loss"].backward()
    s = twins(ranks[0])
    s.hidden, s.labels = (torch.cat([names[name] for names in ranks]) for name in ("hidden", "labels"))
    truth = gradient_accumulation(s)
    truth.backward()
    average = torch.stack([names["lm_head"].weight.grad for names in ranks]).mean(0)
    assert_within(torch.stack([names["loss"] for names in ranks]).mean(), truth, 1e-11)
    assert_within(average, s.lm_head.weight.grad, 1e-11)


def test_wide_head_keeps_small_updates():
    """What the page says of bfloat16: W + B A loses a small update, the wide head does not."""
    bf16 = torch.bfloat16
    h, w, a = (torch.randn(n, 64).to(bf16) for n in (128, 1000, 8))
    w, a, b = w / 8, a / 8, (0.03 * torch.randn(1000, 8)).to(bf16)
    target = torch.randint(1000, (128,))
    exact = F.cross_entropy(h.double() @ (w.double() + b.double() @ a.double()).T, target, reduction="none")

    def error(hidden, weight):
        loss = tightrope.linear_reality_creativity_loss(hidden, weight, target, reduction="none")
        return (loss - exact).norm().item()

    assert 5 * error(torch.cat([h, h @ a.T], -1), torch.cat([w, b], -1)) < error(h, w + b @ a)


def test_reverse_kl_of_an_impossible_token():
    """What the page says: an entry of -inf spoils that token's gradient, and no other's."""
    hidden, weight = torch.randn(2, 8, requires_grad=True), torch.randn(20, 8)
    log_b = torch.randn(2, 20).log_softmax(-1)
    log_b[0, 3] = -math.inf
    loss = tightrope.linear_vocab_loss(
        hidden, weight, log_b, lambda s: -s.entropy - s.target_prob, reduction="none"
    )
    assert loss[0] == math.inf and loss[1].isfinite()
    loss.sum().backward()
    assert hidden.grad[0].isnan().all() and hidden.grad[1].isfinite().all()


FORKS = """
import os, signal
import torch, tightrope

def step():
    hidden, weight = torch.randn(512, 64, requires_grad=True), torch.randn(5000, 64)
    tightrope.linear_reality_creativity_loss(hidden, weight, torch.randint(5000, (512,))).backward()

def child(threads=None):
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)  # a child that hangs is killed
        if threads:
            torch.set_num_threads(threads)
        step()
        os._exit(0)
    return os.waitpid(pid, 0)[1]

torch.set_num_threads(2)
print(child(), step(), child(threads=1))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what a fork leaves differs between systems")
def test_forks_that_are_safe():
    """Threads that are started at import, or that a child with one thread would wait for."""
    done = subprocess.run(
        [sys.executable, "-c", FORKS], env=child_environment(), capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "0 None 0", done.stderr
