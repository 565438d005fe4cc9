"""Masks of blocks, which the host draws: the official generators draw for draw, and what is promised of a stream's masks."""

import random

import jax
import numpy as np
import pytest

from mim_jax.masking import BlockMask, GroupMask, RandomMask, RatioMask


@pytest.mark.parametrize("name, grid, count, exact", [
    ("beit_14x14_75", 14, 75, False),
    ("beit2_14x14_75", 14, 75, True),
    ("eva_16x16_105", 16, 105, False),
])  # fmt: skip
def test_masks_are_the_official_ones_after_the_same_seed(golden, name, grid, count, exact):
    arrays, _ = golden("mask_generators")
    mask, rng, fill = BlockMask((grid, grid), count, exact=exact), random.Random(0), np.random.RandomState(0)
    drawn = np.stack([mask.one(rng, fill) for _ in range(1000)]).reshape(1000, grid, grid)
    np.testing.assert_array_equal(drawn[:5], arrays[f"{name}/first5_masks"])
    np.testing.assert_array_equal(drawn.sum((1, 2)), arrays[f"{name}/counts"])
    np.testing.assert_allclose(drawn.mean(0), arrays[f"{name}/position_frequency"], atol=1e-12)


@pytest.mark.parametrize("grid, count, smallest, exact", [(8, 26, 4, False), (8, 26, 4, True), (4, 15, 16, True)])
def test_masks_of_a_stream(grid, count, smallest, exact):
    mask = BlockMask((grid, grid), count, smallest, exact)
    drawn = mask.draw_on_host(7, np.arange(200), 2)["mask"]
    assert drawn.shape == (200, 2, grid**2) and drawn.dtype == bool
    counts = drawn.sum(-1)
    assert counts.max() == count and (counts.min() == count if exact else counts.min() > 0)
    alone = mask.draw_on_host(7, np.array([3, 150]), 2)["mask"]
    np.testing.assert_array_equal(alone, drawn[[3, 150]])
    others = mask.draw_on_host(8, np.arange(200), 2)["mask"]
    different = [np.any(a != b, -1).mean() for a, b in ((drawn, others), (drawn[:, 0], drawn[:, 1]), (drawn[1:], drawn[:-1]))]
    assert min(different) > 0.9


def test_groups_with_the_same_number_of_masked_patches():
    official, exact = GroupMask((14, 14), 8, 2), GroupMask((14, 14), 8, 2, exact=True)
    counts = [mask.draw_on_host(7, np.arange(400), 2)["mask"].reshape(50, -1).sum(-1) for mask in (official, exact)]
    assert official.upper == exact.upper == 507  # of 8 crops, by 15, 20, ... 50 %
    assert counts[0].max() <= 507 and len(set(counts[0].tolist())) > 10
    assert set(counts[1].tolist()) == {507}
    shares = exact.draw_on_host(7, np.arange(400), 2)["mask"].mean(-1)
    assert np.mean(shares == 0) == 0.5 and shares.max() <= 0.5


def test_masks_that_begin_later():
    mask = RatioMask((8, 8), ((0.3, 0.0),), start=100)
    drawn = mask.draw_on_host(7, np.arange(200), 2)["mask"]
    assert not drawn[:100].any() and drawn[100:].any(-1).all()
    later = RatioMask((8, 8), ((0.3, 0.0),)).draw_on_host(7, np.arange(100, 200), 2)["mask"]
    np.testing.assert_array_equal(drawn[100:], later)
    assert mask.examples(3, 2)["mask"].any(-1).all()


@pytest.mark.parametrize("count", [0, 16])
def test_masks_of_nothing_or_all_are_refused(count):
    with pytest.raises(ValueError, match=f"mask.count={count} of 16"):
        BlockMask((4, 4), count)


def test_blocks_that_do_not_fit_the_grid_are_refused():
    with pytest.raises(ValueError, match="mask.smallest=16: .* of mask.count=8 can be masked on a grid of 4 x 4 patches"):
        BlockMask((4, 4), 8, smallest=16)


def test_masks_of_an_oblong_grid():
    """Rows before columns: a block mask of 4 x 8 patches, and squares of 2 x 2 patches."""
    drawn = BlockMask((4, 8), 12, smallest=4).draw_on_host(0, np.arange(50), 1)["mask"].reshape(50, 4, 8)
    assert 0 < drawn.sum((1, 2)).min() and drawn.sum((1, 2)).max() <= 12 and drawn.any(0).all()
    squares = RandomMask((4, 8), 3, square=2).draw(jax.random.key(0), np.arange(50), 1)["mask"]
    cells = np.asarray(squares).reshape(50, 2, 2, 4, 2).swapaxes(2, 3).reshape(50, 8, 4)
    assert (cells.all(-1) == cells.any(-1)).all() and (cells.any(-1).sum(-1) == 3).all()
