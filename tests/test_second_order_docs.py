"""The recipes of docs/second-order.md, run as they are printed."""

import re

import pytest
import torch

from helpers import ROOT, assert_within

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, of forward mode


def test_the_recipes():
    """A recipe that does not run, or whose product is not that of the Hessian."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "second-order.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    names = {}
    for block in blocks:
        exec(compile(block, "second-order.md", "exec"), names)
    weight, target = names["weight"].detach(), names["target"]

    def dense(hidden):
        log_p = (hidden @ weight.t()).log_softmax(-1)
        ce = -log_p.gather(-1, target[:, None])[:, 0]
        return (0.8 * ce + 0.2 * (2 * log_p).logsumexp(-1)).mean()

    model, parameters = names["model"], names["parameters"]
    states = model(names["inputs"]).detach()
    jacobian = torch.func.jacrev(names["outputs"])(parameters)
    moved = sum(torch.tensordot(j, names["along"][n], names["along"][n].dim()) for n, j in jacobian.items())
    curved = torch.autograd.functional.hvp(dense, states, moved)[1]
    product = names["gauss_newton"](parameters, names["along"])
    for name, j in jacobian.items():
        assert_within(product[name], torch.tensordot(curved, j, 2), 1e-10, what=name)
    # The mean over signs; z * (H z) of a quadratic is exact but for what is off the diagonal.
    scale = torch.arange(1.0, 4.0, dtype=torch.float64)
    (estimate,) = names["diagonal"](
        lambda x: (scale * x * x).sum() / 2, (torch.ones(3, dtype=torch.float64, requires_grad=True),), 2
    )
    assert_within(estimate, scale, 1e-14)
