"""row_sides and two-sided row_grad of the CUDA kernels, run on the CPU as in test_cuda_host.py."""

from itertools import cycle, product

import pytest
import torch

from row_cases import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    HOSTILE,
    KINDS,
    ROWS,
    SENTINELS,
    TRANSFORMS,
    VOCABULARIES,
    Case,
    placed,
)
from side_cases import (
    EXACT_SETS,
    SETS,
    check_sided_grad,
    check_sided_sentinels,
    check_sides,
    give_set,
    listed_classes,
    sided_bits,
    sided_coefficients,
    sides_of,
)
from simt_rows import Simt, compiler
from tightrope.backends import ops
from tightrope.statistics import empty_sides, summarise_sides
from tightrope.targets import NO_CLASS

pytestmark = [pytest.mark.one_in(4), pytest.mark.skipif(compiler() is None, reason="g++ is not on the path")]

# As in test_cuda_host.py: a row takes one block, or as many as it can.
ONE, MANY = Simt(sms=1, threads=128, clusters=False), Simt(sms=400, threads=128)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_sides_at_every_size(dtype, kind):
    """Fails if sides are swapped, an edge or a run is looked up at the wrong column, or a mass is lost."""
    rest = zip(cycle(SETS), cycle(TRANSFORMS), cycle(range(8)), cycle((0, 1, 5)), cycle((True, False, False)))
    for i, (vocab, (sets, transform, lead, gap, in_place)) in enumerate(zip(VOCABULARIES, rest)):
        for device in (ONE, MANY) if vocab > 2000 else (ONE,):
            case = give_set(Case(dtype, vocab, kind, seed=i, gap=gap, lead=lead, **transform), sets, i)
            norm = check_sides(case, device, tiles=1 + i % 2 * 2)
            check_sided_grad(case, device, norm, "plain", in_place, gap, (lead + (i % 2)) % 8)


@pytest.mark.parametrize("sets", EXACT_SETS)
def test_every_set_past_a_block(sets):
    """Fails if an entry at the threshold is left out, a repeated class counts twice, or padding counts."""
    for dtype, kind, device in zip(DTYPES, KINDS, cycle((ONE, MANY))):
        case = give_set(Case(dtype, 17_000, kind, seed=8, gap=1, lead=3), sets)
        norm = check_sides(case, device)
        assert device.last.runs > 1
        check_sided_grad(case, device, norm, tiles=3)


@pytest.mark.parametrize("how", HOSTILE[1:])
def test_two_sides_of_hostile_rows(how):
    """Fails if a side's sums are relative to the row's maximum, or to 0 where all of the side is -inf."""
    for dtype, kind, device, sets in zip(
        cycle(DTYPES), KINDS * 2, cycle((ONE, MANY, ONE)), cycle(EXACT_SETS)
    ):
        for vocab in (5, 4100):
            case = give_set(Case(dtype, vocab, kind, how, seed=vocab, gap=1, lead=1), sets)
            check_sided_grad(case, device, check_sides(case, device), how)


@pytest.mark.parametrize("how", SENTINELS)
def test_two_sides_of_finite_sentinels(how):
    """Fails if a shift from the lowest to the largest number is not clamped as sides merge."""
    for dtype, sets in product(DTYPES, ("ties", "listed", "mixed", "nothing")):
        for vocab, device in ((9, ONE), (4100, MANY)):
            case = Case(dtype, vocab, "index", how, seed=vocab, gap=1, lead=1)
            check_sided_sentinels(give_set(case, sets), device)


@pytest.mark.parametrize("narrow", [BF16, F16], ids=str)
def test_two_sided_gradients_narrower_than_the_logits(narrow):
    """Fails if the instances that narrow ignore the set."""
    for i, (vocab, sets, kind) in enumerate(zip((7, 257, 4500), ("threshold", "listed", "mixed"), KINDS[1:])):
        case = give_set(Case(F32, vocab, kind, seed=i, lead=i, gap=1), sets)
        check_sided_grad(case, MANY, check_sides(case, MANY), gap=1, lead=i + 3, narrow=narrow)


def test_all_that_is_possible_is_in_the_set():
    """Fails if -inf alone in the rest makes a NaN, of the rest or of the set."""
    for dtype, vocab, device in product(DTYPES, (9, 4100), (ONE, MANY)):
        case = Case(dtype, vocab, None, lead=1)
        case.logits[:, vocab // 2 :] = -torch.inf
        case.classes = torch.arange(vocab // 2).expand(ROWS, -1).contiguous()
        sides = sides_of(case, device.row_sides)
        assert torch.equal(sides[3:], empty_sides(ROWS, case.wide, sides.device)[3:])
        check_sided_grad(case, device, check_sides(case, device), "masked")


@pytest.mark.parametrize("offset", [16, 2**33 + 5])
def test_classes_count_from_the_start_of_the_vocabulary(offset):
    """Fails if a tile's offset is left out of the look-up, or cut to 32 bits."""
    for dtype, kind, device in zip((BF16, F32, F64), KINDS, (ONE, MANY, MANY)):
        case = Case(dtype, 4500, kind, seed=4, lead=1)
        if case.index is not None:
            case.index = case.index + offset
            case.target = (case.index, *case.target[1:])
        give_set(case, "listed", seed=2, offset=offset)
        check_sided_grad(case, device, check_sides(case, device, 3, offset), tiles=3, offset=offset)


def test_entries_at_the_threshold_are_in_the_set():
    """Fails if >= becomes >: the set would lose all that equals the threshold."""
    for dtype, device in product(DTYPES, (ONE, MANY)):
        case = Case(dtype, 3001, None, "constant", lead=1)
        case.threshold = torch.full((ROWS,), -3.0, dtype=case.wide)
        sides = sides_of(case, device.row_sides)
        assert sides[:, 0].tolist() == [-3.0, 3001.0, 0.0, -torch.inf, 0.0, 0.0]


def test_a_class_counts_once_wherever_it_is_repeated():
    """Fails if repeats add up, in one vector, over vectors, or because they fill the list."""
    for dtype, device in product(DTYPES, (ONE, MANY)):
        case = Case(dtype, 3001, None, "constant", lead=1)
        for at in (0, 6, 7, 8, 1500, 3000):
            case.classes = torch.full((ROWS, 70), NO_CLASS)
            case.classes[:, 10:] = at
            sides = sides_of(case, device.row_sides)
            assert sides[:, 0].tolist() == [-3.0, 1.0, 0.0, -3.0, 3000.0, 0.0]


def test_rows_that_do_not_count_keep_what_they_have():
    """Fails if `active` is not asked, in either stage, or in the gradient."""
    for device, kind in product((ONE, MANY), ("listed", "threshold")):
        case = give_set(Case(F32, 9001, "index"), kind)
        case.active = torch.tensor([True, False, True])
        before = torch.full((6, ROWS), -7.0)
        sides = sides_of(case, device.row_sides, before=before)
        assert torch.equal(sides[:, 1], before[:, 1])
        assert not (sides[:, ::2] == before[:, ::2]).all()
        out, _ = case.nan_out()
        norm = torch.ones(4, ROWS)
        device.row_grad(case.logits, out, norm, sided_coefficients(case), *case.sided_tail())
        assert (out[1] == 0).all()
        assert not out[::2].isnan().any()


@pytest.mark.parametrize("device", [ONE, MANY], ids=["one block", "several blocks"])
def test_a_bad_entry_stays_in_its_row_and_side(device):
    """Fails if NaN is taken for small, if it leaves its row, or if what is lost before comes to life."""
    for bad, kind in product((torch.nan, torch.inf), ("listed", "threshold")):
        case = give_set(Case(F32, 9001, "index"), kind)
        good = sides_of(case, device.row_sides)
        case.logits[1, 4321] = bad
        ours, theirs = (sides_of(case, k) for k in (device.row_sides, ops.row_sides))
        assert torch.equal(ours[:, ::2], good[:, ::2])
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert ours.isnan()[:, 1].any()
        grads = [case.nan_out()[0] for _ in range(2)]
        norm = summarise_sides(good)[:4].contiguous()
        norm[0 if kind == "listed" or bad != bad else 2, 1] = torch.nan
        for kernel, out in zip((device.row_grad, ops.row_grad), grads):
            kernel(case.logits, out, norm, sided_coefficients(case), *case.sided_tail())
        assert torch.equal(*(g.isnan() for g in grads))
        assert grads[0][1].isnan().any()
        lost = empty_sides(ROWS, F32, ours.device)
        lost[0, 1] = torch.nan  # as where a set names a class out of range
        ours, theirs = (sides_of(case, k, before=lost) for k in (device.row_sides, ops.row_sides))
        assert torch.equal(ours.isnan(), theirs.isnan())


@pytest.mark.parametrize("sets", ["listed", "threshold"])
@pytest.mark.parametrize("sms", [1, 400])
def test_the_order_of_threads_changes_no_bit_of_a_side(sms, sets):
    """Fails if a sum depends on who comes first."""
    first = sided_bits(Simt(sms=sms, threads=128), sets, BF16, 17_000)
    for seed in range(1, 4):
        again = sided_bits(Simt(sms=sms, threads=128, seed=seed), sets, BF16, 17_000)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize(("kernel", "barriers"), [("row_sides", 1), ("row_grad", 2)])
def test_a_missing_barrier_of_the_sided_kernels_shows(kernel, barriers):
    """Fails if a barrier is not needed, or there is one that no test would miss."""

    def bits(**options):
        case = give_set(Case(F32, 3000, "top_k", seed=2), "listed")
        case.topk_index += torch.arange(5) * 500  # owned by other threads than those that stage them
        case.topk_index %= 3000
        device = Simt(sms=1, threads=256, clusters=False, **options)
        if kernel == "row_sides":
            return sides_of(case, device.row_sides)
        norm = summarise_sides(sides_of(case, ops.row_sides))[:4].contiguous()
        device.row_grad(case.logits, case.logits, norm, sided_coefficients(case), *case.sided_tail())
        return case.logits.clone()

    right = bits()
    for number in range(barriers):
        orders = [bits(skip_barrier=number, seed=seed) for seed in range(6)]
        assert not all(torch.equal(right, x) for x in orders), f"barrier {number} of {kernel} is not missed"
    assert torch.equal(right, bits(skip_barrier=barriers))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_moved_for_each_logit_with_a_set(dtype):
    """What docs/cuda.md says. Fails if a logit is read once for each side."""
    row = 9000 * dtype.itemsize
    for device, kind in product((ONE, MANY), ("listed", "threshold")):
        case = give_set(Case(dtype, 9000, None), kind)
        sides = sides_of(case, device.row_sides)
        assert (device.last.read, device.last.written) == (ROWS * row, 0)
        norm = summarise_sides(sides)[:4].contiguous()
        coef = sided_coefficients(case)
        device.row_grad(case.logits, case.nan_out()[0], norm, coef, *case.sided_tail())
        assert (device.last.read, device.last.written) == (ROWS * row, ROWS * row)


def test_a_set_of_none_that_is_listed_gives_the_gradient_without_a_set():
    """Fails if the two instances of row_grad differ, or an empty list is taken for a set of everything."""
    case = give_set(Case(F32, 4500, "index", lead=1), "listed")
    case.classes[:] = NO_CLASS
    norm, coef = torch.cat([torch.ones(2, ROWS), torch.full((2, ROWS), 9.0)]), sided_coefficients(case)
    outs = [case.nan_out()[0] for _ in range(3)]
    MANY.row_grad(case.logits, outs[0], norm, coef, *case.sided_tail())
    case.classes = case.classes[:, :0]
    MANY.row_grad(case.logits, outs[1], norm, coef, *case.sided_tail())
    case.classes = None
    MANY.row_grad(case.logits, outs[2], norm[:2].contiguous(), coef[:7].contiguous(), *case.sided_tail())
    assert torch.equal(outs[0], outs[2])
    assert torch.equal(outs[1], outs[2])


def test_sets_of_some_rows_do_not_reach_into_others():
    """Fails if a row looks up the list or the threshold of another: each row's alone gives the same bits."""
    values = Case(F32, 700, None).logits.clone()
    classes = listed_classes(700, seed=3)
    for row in range(ROWS):
        together, alone = Case(F32, 700, None), Case(F32, 700, None)
        together.classes, alone.classes = classes, classes[row : row + 1].expand(ROWS, -1).contiguous()
        alone.logits, alone.buffer = placed(values[row : row + 1].expand(ROWS, -1))
        both = [sides_of(case, ONE.row_sides) for case in (together, alone)]
        assert torch.equal(both[0][:, row], both[1][:, 0])
