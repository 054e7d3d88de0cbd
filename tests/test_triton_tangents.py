"""The Triton primitives of second order in the interpreter, against plain PyTorch in float64.

The problems and their judging are those of test_row_tangents.py, which holds plain PyTorch itself against
autograd of the reference. Every access is checked to be in bounds, and what is not written is NaN.
"""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1; test_triton_interpreter.py runs it", allow_module_level=True)

import torch

from helpers import assert_within
from row_cases import HOSTILE, KINDS, SENTINELS, TRANSFORMS
from test_row_tangents import SETS, Moving, check, check_hostile
from tightrope import backends
from tightrope.backends import second, triton_second
from tightrope.kernels import configs
from triton_bounds import checked_bounds
from triton_cases import unwritten_parts

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy warns where a GPU is silent
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # PyTorch's own forward mode
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.one_in(12),
]
F32, F64, NAN = torch.float32, torch.float64, float("nan")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks and segments in a small row."""
    for name in ("TANGENT", "GRAD", "SET_GRAD"):
        monkeypatch.setattr(configs, f"{name}_BLOCK", 64)
    monkeypatch.setattr(configs, "TANGENT_BLOCKS", 2)
    monkeypatch.setattr(configs, "TOPK_BLOCK", 4)
    unwritten_parts(monkeypatch, triton_second)


@pytest.mark.parametrize("of_set", SETS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_target_and_set(kind, of_set):
    """A sum or a coefficient of the other side, a tile's offset that is lost, an entry out of bounds."""
    i = KINDS.index(kind) + SETS.index(of_set)
    how = ("apart", "in place", "derivative alone")[i % 3]
    with checked_bounds() as counted:
        moving = Moving(F32, 130, kind, of_set=of_set, seed=i, **TRANSFORMS[i % len(TRANSFORMS)])
        check(moving, "triton", tiles=1 + i % 2 * 2, transposed=i % 2 == 0, how=how)
    assert counted["loads"] >= 4 * moving.case.logits.numel()


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_every_transform(transform):
    """The bend of a softcap, a scale or a bias that one of the two kernels leaves out."""
    check(Moving(F32, 130, "dense", of_set="threshold", **transform), "triton", tiles=3)


@pytest.mark.parametrize(("vocab", "kind"), [(1, "index"), (64, "top_k"), (65, "dense"), (257, None)])
def test_tails(vocab, kind):
    """What lies past the end of a row, in a last block that is full, nearly empty, or the only one."""
    with checked_bounds():
        check(Moving(F32, vocab, kind, bias=True, softcap=8.0), "triton")
        check(Moving(F32, vocab, kind, of_set="listed"), "triton", how="in place")


@pytest.mark.parametrize("of_set", [None, "threshold", "listed"])
def test_float64(of_set):
    """A sum, a scalar or a coefficient that goes through float32."""
    for kind in ("top_k", "dense"):
        moving = Moving(F64, 197, kind, of_set=of_set, bias=True, softcap=8.0)
        sums = moving.sums(backends.BACKENDS["triton"].row_tangent, tiles=3)
        assert_within(sums, moving.sums(second.row_tangent), 1e-12)
        ours = moving.gradients(backends.BACKENDS["triton"].row_grad_tangent, tiles=3)
        for one, true in zip(ours, moving.gradients(second.row_grad_tangent)):
            assert_within(one, true, 1e-12)


@pytest.mark.parametrize("of_set", [None, "threshold", "listed"])
@pytest.mark.parametrize("how", [*HOSTILE, *SENTINELS])
def test_hostile_rows(how, of_set):
    """Peaked rows, offsets of 1e4, impossible entries, numbers near the largest: no NaN, no worse."""
    kind = ("index", "dense", "top_k")[(HOSTILE + SENTINELS).index(how) % 3]
    check_hostile(Moving(F32, 130, kind, how, of_set), "triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_and_narrower_outputs(dtype):
    """Arithmetic in the dtype of the logits, or an output that is rounded twice."""
    moving = Moving(dtype, 130, "index", of_set="threshold", logit_scale=0.5)
    device, tail = backends.BACKENDS["triton"], moving.case.sided_tail()
    results = []
    for given in (
        (moving.case.logits, moving.direction),
        (moving.case.logits.float(), moving.direction.float()),
    ):
        sums, outs = torch.zeros(14, 3), [torch.full((3, 130), NAN, dtype=dtype) for _ in range(2)]
        device.row_tangent(*given, sums, moving.norm, *tail)
        scalars = moving.norm, moving.norm_tangent, moving.coef, moving.coef_tangent
        device.row_grad_tangent(*given, *outs, *scalars, *tail)
        results.append((sums, *outs))
    for half, single in zip(*results):
        assert torch.equal(half, single)


@pytest.mark.parametrize("of_set", [None, "threshold"])
def test_rows_that_do_not_count(of_set):
    """They are not read (here they are NaN), keep their sums and get zeros."""
    moving = Moving(F32, 130, "index", of_set=of_set)
    case, device = moving.case, backends.BACKENDS["triton"]
    case.active = torch.tensor([True, False, True])
    case.logits[1] = moving.direction[1] = NAN
    sums = moving.sums(device.row_tangent)
    assert not sums[:, 1].any()
    assert sums[0, ::2].all()
    known = torch.full_like(sums, 7.0)
    device.row_tangent(case.logits, moving.direction, known, moving.norm, *case.sided_tail())
    torch.testing.assert_close(known, sums + 7.0)
    for out in moving.gradients(device.row_grad_tangent):
        assert not out[1].any()
        assert out[::2].isfinite().all()


def test_rows_with_gaps_and_a_direction_that_all_rows_share():
    """A stride of one operand taken for another's: gaps hold NaN, the direction's rows are one."""
    moving, device = Moving(F32, 130, "dense", of_set="listed"), backends.BACKENDS["triton"]
    moving.direction[:] = moving.direction[:1].clone()
    expected = moving.sums(device.row_tangent), *moving.gradients(device.row_grad_tangent)
    gaps = [torch.full((3, 130 + i), NAN)[:, 5:135] for i in (7, 8, 9)]
    z, out, out_tangent = gaps
    z.copy_(moving.case.logits)
    along, tail = moving.direction[:1].expand(3, -1), moving.case.sided_tail()
    sums = torch.zeros(14, 3)
    with checked_bounds():
        device.row_tangent(z, along, sums, moving.norm, *tail)
        scalars = moving.norm, moving.norm_tangent, moving.coef, moving.coef_tangent
        device.row_grad_tangent(z, along, out, out_tangent, *scalars, *tail)
    for one, other in zip((sums, out, out_tangent), expected):
        assert torch.equal(one, other)


@pytest.mark.parametrize("of_set", [None, "listed"])
@pytest.mark.parametrize("kind", ["index", "dense"])
def test_bits_depend_neither_on_the_batch_nor_on_the_run(kind, of_set):
    """How a row is cut or merged depends on the number of rows."""
    moving, device = Moving(F32, 301, kind, of_set=of_set, softcap=4.0), backends.BACKENDS["triton"]
    case, scalars = moving.case, (moving.norm_tangent, moving.coef, moving.coef_tangent)

    def run(rows):
        norm, *others = (x[:, rows].contiguous() for x in (moving.norm, *scalars))
        tail = [x[rows] if torch.is_tensor(x) and x is not case.bias else x for x in case.sided_tail()]
        z, v = case.logits[rows], moving.direction[rows]
        sums, outs = torch.zeros(len(moving.coef), len(z)), [torch.full_like(z, NAN) for _ in range(2)]
        device.row_tangent(z, v, sums, norm, *tail)
        device.row_grad_tangent(z, v, *outs, norm, *others, *tail)
        return sums.t(), *outs

    everyone = torch.arange(3)
    for whole, repeated, single in zip(run(everyone), run(everyone), run(torch.tensor([1]))):
        assert torch.equal(whole, repeated)
        assert torch.equal(whole[1:2], single)


def test_a_nan_stays_in_its_row():
    """A sum or a gradient that reads beside its row."""
    moving, device = Moving(F32, 130, "top_k", of_set="threshold"), backends.BACKENDS["triton"]
    clean = moving.sums(device.row_tangent), *moving.gradients(device.row_grad_tangent)
    moving.case.logits[2, 100] = NAN
    sums, *outs = moving.sums(device.row_tangent), *moving.gradients(device.row_grad_tangent)
    assert sums[0, 2].isnan()
    assert torch.equal(sums[:, :2], clean[0][:, :2])
    for out, before in zip(outs, clean[1:]):
        assert out.isnan().nonzero().tolist() == [[2, 100]]
        assert torch.equal(out[:2], before[:2])
