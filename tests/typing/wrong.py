"""Mistakes of users that a type checker must see: an ignored error that is not one is an error of its own."""

import torch

import tightrope

hidden, weight = torch.randn(3, 4), torch.randn(5, 4)
logits = hidden @ weight.T
target = torch.tensor([0, 1, 2])


# A word that is none of those expected, a type that is none, an option that does not exist.
tightrope.linear_reality_creativity_loss(hidden, weight, target, reduction="meen")  # type: ignore[call-overload]
tightrope.linear_reality_creativity_loss(hidden, weight, target, reality="truth")  # type: ignore[call-overload]
tightrope.linear_reality_creativity_loss(hidden, weight, target, creativity="whim")  # type: ignore[call-overload]
tightrope.linear_reality_creativity_loss(hidden, weight, target, strategy="fast")  # type: ignore[call-overload]
tightrope.linear_reality_creativity_loss(hidden, weight, target, backend="gpu")  # type: ignore[call-overload]
tightrope.linear_reality_creativity_loss(hidden, weight, target, balance="x")  # type: ignore[call-overload]
tightrope.linear_reality_creativity_loss(hidden, weight, target, balnce=0.1)  # type: ignore[call-overload]
tightrope.linear_reality_creativity_loss(hidden, weight)  # type: ignore[call-overload]
tightrope.reality_creativity_loss(logits, target, reduction="meen")  # type: ignore[call-overload]
tightrope.reality_creativity_loss(logits, target, strategy="chunked")  # type: ignore[call-overload]
tightrope.linear_vocab_stats(hidden, weight, target, backend="gpu")  # type: ignore[arg-type]
tightrope.TopKTarget(target)  # type: ignore[call-arg]

# The pair where the loss alone was expected, and the other way round.
tightrope.linear_reality_creativity_loss(hidden, weight, target, return_stats=True).backward()  # type: ignore[attr-defined]
pair: tuple[torch.Tensor, tightrope.RowStats] = tightrope.reality_creativity_loss(logits, target)  # type: ignore[assignment]

# Modules.
tightrope.LinearRealityCreativityLoss(balnce=0.1)  # type: ignore[call-overload]
tightrope.LinearRealityCreativityLoss(balance="x")  # type: ignore[call-overload]
tightrope.LinearRealityCreativityLoss(reduction="meen")  # type: ignore[call-overload]
tightrope.RealityCreativityLoss(strategy="chunked")  # type: ignore[call-overload]
