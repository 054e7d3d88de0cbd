"""row_sides, and row_grad of two sides, in the interpreter, against plain PyTorch in float64.

Logits and biases are small multiples of a power of two (and an offset), so float32 and float64 agree on
which entries are in a set, ties with its threshold included.
"""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1; test_triton_interpreter.py runs it", allow_module_level=True)

from dataclasses import dataclass, replace

import torch

from helpers import EPS32, assert_no_worse, class_indices, rand, randn, top_k
from tightrope.arguments import SideArguments, TileArguments
from tightrope.backends import ops
from tightrope.backends import triton as backend
from tightrope.kernels import configs
from tightrope.statistics import empty_partial, empty_sides, summarise_sides
from tightrope.targets import NO_CLASS
from triton_bounds import checked_bounds
from triton_cases import HOSTILE, KINDS, OFFSET, SENTINELS, unwritten_parts

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.one_in(12)]
NAN, INF = float("nan"), float("inf")
SETS = ("threshold", "classes")
CPU = torch.device("cpu")
both = pytest.mark.parametrize("which", SETS)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks and segments in a small row."""
    for kernel in ("ROW", "SIDES"):
        monkeypatch.setattr(configs, f"{kernel}_BLOCK", 64)
        monkeypatch.setattr(configs, f"{kernel}_BLOCKS", 2)
    monkeypatch.setattr(configs, "SET_GRAD_BLOCK", 64)
    unwritten_parts(monkeypatch, backend)


@dataclass
class Tile:
    """A tile of logits, its set and what else the primitives take."""

    logits: torch.Tensor
    sides: SideArguments
    arguments: TileArguments
    offset: int = OFFSET

    @property
    def tail(self) -> tuple:
        return self.offset, *self.sides.flat(), *self.arguments.flat()

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.logits.dtype, torch.float32)

    @property
    def live(self):
        active = self.arguments.active
        return slice(None) if active is None else active

    def to(self, dtype) -> "Tile":
        """The same, for an arithmetic of this dtype."""

        def convert(group):
            return type(group)(
                *(x.to(dtype) if hasattr(x, "dtype") and x.is_floating_point() else x for x in group.flat())
            )

        return Tile(self.logits.to(dtype), convert(self.sides), convert(self.arguments), self.offset)

    def columns(self, start, stop) -> "Tile":
        """A narrower tile of a row without a target."""
        arguments = replace(self.arguments, bias=self.arguments.bias[start:stop])
        return Tile(self.logits[:, start:stop], self.sides, arguments, self.offset + start)

    def empty(self) -> torch.Tensor:
        return empty_sides(len(self.logits), self.dtype, CPU)


def tile(rows, columns, kind, which, *, how="plain", softcap=None, masked_rows=False, seed=0) -> Tile:
    raw = (randn(rows, columns, seed=seed) * 32).round() / 16
    bias = (randn(columns, seed=seed + 1) * 16).round() / 16
    index = class_indices((rows,), columns, seed=seed + 2)
    if how == "peaked":
        raw[::2] *= 16
    elif how == "offset":
        bias += 1e4
    elif how == "negative":
        bias -= 1e4
    elif how == "masked":
        bias[rand(columns, seed=seed + 3) < 0.5] = -INF
        bias[0] = 0.0
    elif how == "constant":
        raw.zero_(), bias.zero_()
    elif how in SENTINELS:
        kept = [columns // 2, columns - 1, 2]
        mask = torch.full_like(bias, torch.finfo(torch.float32).min)
        if how == "lowest and -inf":
            mask[1::2], mask[: columns // 2] = -INF, -INF  # whole blocks, too
        mask[kept] = bias[kept]
        if how == "lowest and largest":
            mask[columns - 1] = torch.finfo(torch.float32).max
        bias, index = mask, index * 0 + 2
    given = {}
    if kind == "index":
        given["index"] = index + OFFSET
    elif kind == "dense":
        given["dense"] = torch.softmax(randn(rows, columns, seed=seed + 4), -1)
    elif kind == "topk":
        pairs = top_k((rows,), columns, k=5, seed=seed + 5)
        given.update(topk_index=pairs.indices.sort(-1).values + OFFSET, topk_prob=pairs.probs)
    active = torch.arange(rows) % 3 != 1 if masked_rows else None
    arguments = TileArguments(**given, bias=bias, active=active, logit_scale=0.5, softcap=softcap)
    if which == "classes":
        # Some twice, some of other tiles, some ignored.
        classes = class_indices((rows, 12), columns + 2 * OFFSET, seed=seed + 6)
        classes[:, 1] = classes[:, 0] = index + OFFSET
        classes[:, 2] = NO_CLASS
        return Tile(raw, SideArguments(classes=classes.sort(-1).values), arguments)
    z = ops.to_logits(raw, bias, replace(arguments, softcap=None))
    # The value of an entry of the row, so that some are equal to it; with a softcap between two, since its
    # tanh is not exact.
    threshold = z.sort(-1).values[:, -max(1, min(columns // 4, 20))].contiguous()
    if how == "lowest and largest":
        threshold[:] = z[:, columns // 2]
    if softcap is not None:
        threshold = softcap * torch.tanh((threshold - 1 / 64) / softcap)
    return Tile(raw, SideArguments(threshold), arguments)


def check_sides(t: Tile) -> torch.Tensor:
    """row_sides into what is known of other entries; gives the sides of the tile alone."""
    exact, rough, sides = t.to(torch.float64).empty(), t.empty(), t.empty()
    ops.row_sides(t.logits.double(), exact, *t.to(torch.float64).tail)
    ops.row_sides(t.logits, rough, *t.tail)
    with checked_bounds() as counted:
        backend.row_sides(t.logits, sides, *t.tail)
    assert counted["loads"] >= t.logits[t.live].numel()
    for field, got, want, usual in zip(range(6), sides, exact, rough):
        finite = want[want.isfinite()]
        floor = 16 * EPS32 * (1 + (finite.abs().max().item() if len(finite) else 0))
        assert_no_worse(got[t.live], want[t.live], usual[t.live], floor, f"sides[{field}]")
    if t.arguments.active is not None:
        assert torch.equal(sides[:, ~t.live], t.empty()[:, ~t.live]), "a row that does not count was touched"
    return sides


def parameters(t: Tile, sides: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm [4, R], coef [14, R]): each coefficient another number."""
    norm = summarise_sides(sides)[:4].contiguous()
    coef = randn(14, len(t.logits), seed=60, dtype=t.dtype)
    z = ops.to_logits(t.logits, t.arguments.bias, t.arguments)
    if z.abs().max() > 1e30:  # of such a logit only the infinity is left
        coef[[5, 12]] = 0.0
    return norm, coef


def check_grad(t: Tile, sides: torch.Tensor) -> None:
    """row_grad into NaN and in place, in bounds."""
    norm, coef = parameters(t, sides)
    exact = torch.empty(t.logits.shape, dtype=torch.float64)
    rough, out, again = torch.empty_like(t.logits), torch.full_like(t.logits, NAN), t.logits.clone()
    ops.row_grad(t.logits.double(), exact, norm.double(), coef.double(), *t.to(torch.float64).tail)
    ops.row_grad(t.logits, rough, norm, coef, *t.tail)
    with checked_bounds():
        backend.row_grad(t.logits, out, norm, coef, *t.tail)
        backend.row_grad(again, again, norm, coef, *t.tail)
    assert torch.equal(out, again), "in place differs"
    z = ops.to_logits(t.logits, t.arguments.bias, t.arguments)
    size = 1 + exact.abs().max().item()
    if z.abs().max() < 1e30:
        size += z.abs().max().item()
    assert_no_worse(out, exact, rough, 16 * EPS32 * size, "gradient")
    if t.arguments.active is not None:
        assert (out[~t.live] == 0).all()


@both
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", [*HOSTILE, *SENTINELS])
def test_hostile(kind, which, how):
    """Fails if an entry is on the wrong side (> for >=), sides are swapped, or a shift or a sum overflows."""
    t = tile(2, 197, kind, which, how=how)
    check_grad(t, check_sides(t))


@both
@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (64, 2), (65, 3), (127, 1), (257, 2)])
def test_tails_softcap_and_masked_rows(which, columns, rows):
    """Fails if what lies past the end of a row counts on a side, or a row that does not count is written."""
    kind = KINDS[columns % 4]
    for t in (
        tile(rows, columns, kind, which, softcap=5.0, masked_rows=True, seed=columns),
        tile(rows, columns, kind, which, seed=columns),
    ):
        check_grad(t, check_sides(t))
    bare = Tile(t.logits, t.sides, TileArguments())
    check_grad(bare, check_sides(bare))


@both
def test_float64(which):
    """Fails if a sum, a threshold or a coefficient goes through float32."""
    t = tile(3, 301, "topk", which, softcap=5.0).to(torch.float64)
    exact, sides = t.empty(), t.empty()
    ops.row_sides(t.logits, exact, *t.tail)
    backend.row_sides(t.logits, sides, *t.tail)
    torch.testing.assert_close(sides, exact, rtol=1e-12, atol=1e-12)
    norm, coef = parameters(t, sides)
    want, out = torch.empty_like(t.logits), torch.full_like(t.logits, NAN)
    ops.row_grad(t.logits, want, norm, coef, *t.tail)
    backend.row_grad(t.logits, out, norm, coef, *t.tail)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_and_a_narrower_output(which, dtype):
    """Fails if arithmetic, or the comparison with a threshold, is in the dtype of the logits."""
    t = tile(3, 130, "index", which)
    logits = t.logits.to(dtype)
    results = []
    for given in (logits, logits.float()):
        sides, out = t.empty(), torch.full_like(logits, NAN)
        backend.row_sides(given, sides, *t.tail)
        backend.row_grad(given, out, *parameters(t, sides), *t.tail)
        results.append((sides, out))
    for half, single in zip(*results):
        assert torch.equal(half, single)


@both
def test_logits_of_another_layout(which):
    """Fails if a stride of logits, gradients or members is taken for the width: gaps hold NaN."""
    t = tile(3, 130, "dense", which)
    plain = t.empty()
    backend.row_sides(t.logits, plain, *t.tail)
    norm, coef = parameters(t, plain)
    grad = torch.empty_like(t.logits)
    backend.row_grad(t.logits, grad, norm, coef, *t.tail)
    gaps = torch.full((3, 150), NAN)[:, 5:135]
    for logits in (gaps.copy_(t.logits), t.logits.t().contiguous().t()):
        sides, out = t.empty(), torch.empty_like(logits) if logits is gaps else torch.full_like(logits, NAN)
        with checked_bounds():
            backend.row_sides(logits, sides, *t.tail)
            backend.row_grad(logits, out, norm, coef, *t.tail)
        assert torch.equal(sides, plain)
        assert torch.equal(out, grad)


@both
@pytest.mark.parametrize("how", ["peaked", "lowest and -inf"])
def test_tiles_merge_into_what_is_known(which, how):
    """Fails if a tile's offset does not reach its set, or a merge with nothing or with a far maximum errs."""
    t = tile(4, 300, "none", which, how=how)
    whole, parts = t.empty(), t.empty()
    backend.row_sides(t.logits, whole, *t.tail)
    for span in ((0, 70), (70, 71), (71, 300)):
        part = t.columns(*span)
        backend.row_sides(part.logits, parts, *part.tail)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-4)


def test_empty_sets_and_sets_that_hold_everything():
    """Fails if an empty side gets a maximum, or the full one differs from the row's own statistics."""
    t = tile(3, 130, "none", "classes")
    partial, argmax = empty_partial(3, torch.float32, CPU)
    backend.row_stats(t.logits, partial, argmax, OFFSET, *t.arguments.flat())
    everything = torch.arange(-1, 140).expand(3, -1) + OFFSET
    nothing = torch.tensor([[NO_CLASS, OFFSET - 1, OFFSET + 130]]).expand(3, -1)
    for side, sets in (
        (0, SideArguments(classes=everything)),
        (0, SideArguments(threshold=torch.full((3,), -INF))),
        (3, SideArguments(classes=nothing)),
        (3, SideArguments(threshold=torch.full((3,), INF))),
    ):
        case = replace(t, sides=sets)
        sides = check_sides(case)
        torch.testing.assert_close(sides[side : side + 3], partial[:3], rtol=1e-6, atol=1e-6)
        assert torch.equal(sides[3 - side : 6 - side], t.empty()[:3])
        check_grad(case, sides)


def test_of_two_equal_sides_the_gradient_is_that_without_a_set():
    """Fails if the kernel with a set computes anything else than the plain one, or reads beside its rows."""
    t = tile(3, 130, "topk", "threshold", softcap=5.0)
    norm, coef = randn(2, 3), randn(7, 3, seed=1)
    norm[0] += 4
    plain = torch.empty_like(t.logits)
    backend.row_grad(t.logits, plain, norm, coef, OFFSET, None, None, *t.arguments.flat())
    out = torch.empty_like(plain)
    backend.row_grad(t.logits, out, norm.repeat(2, 1), coef.repeat(2, 1), *t.tail)
    assert torch.equal(out, plain)


@both
def test_bits_depend_neither_on_the_batch_nor_on_the_run(which):
    """Fails if how a row is cut or merged depends on the number of rows."""
    t = tile(4, 197, "index", which, softcap=4.0)
    norm, coef = randn(4, 4), randn(14, 4, seed=1)

    def run(rows):
        sides = SideArguments(*(None if x is None else x[rows] for x in t.sides.flat()))
        part = Tile(t.logits[rows], sides, replace(t.arguments, index=t.arguments.index[rows]))
        found, out = part.empty(), torch.empty_like(part.logits)
        backend.row_sides(part.logits, found, *part.tail)
        backend.row_grad(part.logits, out, *(x[:, rows].contiguous() for x in (norm, coef)), *part.tail)
        return found.t(), out

    for whole, repeated, single in zip(run([*range(4)]), run([*range(4)]), run([3])):
        assert torch.equal(whole, repeated)
        assert torch.equal(whole[3:4], single)


@both
def test_a_nan_stays_in_its_row_and_on_its_side(which):
    """Fails if a maximum, which on a GPU drops a NaN, hides it, or if it reaches what it should not."""
    t = tile(4, 200, "none", which)
    clean = t.empty()
    backend.row_sides(t.logits, clean, *t.tail)
    t.logits[2, 150] = NAN
    if which == "classes":
        t.sides.classes[2, -1] = 150 + OFFSET
        t.sides.classes[2] = t.sides.classes[2].sort().values
    sides, expected = t.empty(), t.empty()
    # A set of which nothing can be known, as the drivers say it of one that names a class out of range.
    sides[0, 3] = expected[0, 3] = NAN
    backend.row_sides(t.logits, sides, *t.tail)
    ops.row_sides(t.logits, expected, *t.tail)
    torch.testing.assert_close(sides, expected, rtol=1e-6, atol=1e-5, equal_nan=True)
    hit = slice(0, 3) if which == "classes" else slice(3, 6)
    assert sides[hit, 2].isnan().all()
    assert sides[0, 3].isnan()
    assert torch.equal(sides[:, :2], clean[:, :2])
    norm, coef = clean.view(2, 3, 4)[:, :2].flip(0).reshape(4, 4).contiguous(), randn(14, 4)
    out = torch.empty_like(t.logits)
    backend.row_grad(t.logits, out, norm, coef, *t.tail)
    assert out.isnan().nonzero().tolist() == [[2, 150]]
