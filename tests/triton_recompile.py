"""Counts what the Triton backend compiles, without a GPU: run by test_triton_aot.py in its own process.

A driver that pretends to be an sm_90 lets the just-in-time compiler do all that it does before a launch, and
`run` stops there. So results are garbage here, and what is counted is exact. Prints one number for each step.
"""

import dataclasses
import json
import warnings

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import jit

import tightrope
from tightrope import backends

warnings.simplefilter("ignore")
compiled = []


class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def run_without_launch(self, *args, **options):
    return launch(self, *args, **{**options, "warmup": True})


def counted_compile(source, *args, **options):
    compiled.append(source.name)
    return compile_source(source, *args, **options)


triton.runtime.driver.set_active(Driver())
launch, jit.JITFunction.run = jit.JITFunction.run, run_without_launch
compile_source, triton.compiler.compile = triton.compiler.compile, counted_compile
jit.compile = counted_compile
backends.BACKENDS["triton"] = dataclasses.replace(backends.BACKENDS["triton"], on_request=("cpu",))


def step(tokens=48, strategy="streaming", **options):
    hidden = torch.randn(tokens, 64).bfloat16().requires_grad_()
    weight = torch.randn(272, 64).bfloat16().requires_grad_()
    target = torch.randint(272, (tokens,))
    loss = tightrope.linear_reality_creativity_loss(
        hidden, weight, target, backend="triton", strategy=strategy, **options
    )
    loss.backward()
    return len(compiled)


STEPS = {
    "first": {"balance": 0.1, "softcap": 30.0},
    "the same": {"balance": 0.1, "softcap": 30.0},
    "balance": {"balance": 0.7, "softcap": 30.0},
    "balance 1": {"balance": 1.0, "softcap": 30.0},
    "balance per token": {"balance": torch.rand(48), "softcap": 30.0},
    "label smoothing": {"label_smoothing": 0.1, "softcap": 30.0},
    "z-loss": {"z_loss": 1e-4, "softcap": 30.0},
    "other terms": {"reality": "squared_error", "creativity": "collision", "logit_l2": 1e-4, "softcap": 30.0},
    "softcap": {"softcap": 15.0},
    "logit scale": {"logit_scale": 0.5, "softcap": 30.0},
    "tokens": {"tokens": 37, "softcap": 30.0},
    "one token": {"tokens": 1, "softcap": 30.0},
}
counts = {
    strategy: {name: step(strategy=strategy, **options) for name, options in STEPS.items()}
    for strategy in ("streaming", "chunked")
}
print(json.dumps(counts))
