"""The random numbers: known answers, guarantees about order, and distributions."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import ColorJitter, RandomResizedCrop

from isofast.config.schema import ViewConfig
from isofast.data.draw import colour_matrices, draw, epoch_order, philox
from isofast.data.recipe import recipe_for

# significance level of every statistical test here; draws are fixed, so none of them is flaky
P = 1e-3


def test_philox_gives_the_published_answer():
    """The authors' test vector for philox4x32-10 whose words all differ."""
    counter = np.array([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], np.uint64)
    result = philox(counter, 0xA4093822 | 0x299F31D0 << 32)
    assert result.tolist() == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("changed", ["view", "seed", "epoch"])
def test_views_seeds_and_epochs_draw_independently(changed):
    n = 4000
    row = ViewConfig(jitter_p=1.0)
    recipe, sizes = replace(recipe_for("stl10"), view1=row, view2=row), np.full((n, 2), 96)

    def brightness(view: int = 1, seed: int = 0, epoch: int = 0) -> np.ndarray:
        return draw(recipe, view, sizes, np.arange(n), seed=seed, epoch=epoch).brightness_N

    other = brightness(**{changed: 2 if changed == "view" else 1})
    assert stats.pearsonr(brightness(), other).pvalue > P


def test_parameters_have_the_distributions_of_the_table():
    n = 20_000
    row = ViewConfig(blur_p=0.3, solarize_p=0.2, degrees=10, translate=0.1)
    recipe = replace(recipe_for("stl10"), view1=row)
    view = draw(recipe, 1, np.full((n, 2), 96), np.arange(n), seed=1, epoch=0)
    jittered = view.hue_N != 0
    for name, happened, p in (
        ("jitter", jittered, row.jitter_p),
        ("gray", view.gray_N, row.gray_p),
        ("blur", view.blur_sigma_N > 0, row.blur_p),
        ("solarize", view.solarize_N, row.solarize_p),
        ("flip", view.flip_N, row.flip_p),
    ):
        assert stats.binomtest(int(happened.sum()), n, p).pvalue > P, name
    for name, values, low, high in (
        ("brightness", view.brightness_N[jittered], 0.6, 1.4),
        ("contrast", view.contrast_N[jittered], 0.6, 1.4),
        ("saturation", view.saturation_N[jittered], 0.8, 1.2),
        ("hue", view.hue_N[jittered], -0.1, 0.1),
        ("sigma", view.blur_sigma_N[view.blur_sigma_N > 0], 0.1, 2.0),
        ("angle", np.degrees(np.arcsin(view.affine_N23[:, 0, 1])), -10, 10),
    ):
        assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > P, name
    assert np.all(view.brightness_N[~jittered] == 1)
    # flags are drawn independently of each other
    flags = np.stack([jittered, view.gray_N, view.blur_sigma_N > 0, view.solarize_N, view.flip_N])
    correlations = np.corrcoef(flags)[np.triu_indices(5, 1)]
    assert np.abs(correlations).max() < 4 / np.sqrt(n)


@pytest.mark.parametrize("size", [(64, 64), (48, 200)], ids=str)
def test_crop_windows_follow_torchvision(size):
    n = 3000
    recipe = recipe_for("tinyimagenet")
    view = draw(recipe, 1, np.tile(size, (n, 1)), np.arange(n), seed=0, epoch=0)
    torch.manual_seed(0)
    blank = torch.empty(3, *size)
    theirs = np.array(
        [RandomResizedCrop.get_params(blank, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)]
    )
    ours = view.window_N4
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= size).all()
    for k, name in enumerate(("top", "left", "height", "width")):
        assert stats.ks_2samp(ours[:, k], theirs[:, k]).pvalue > P, name
    for of in (np.divide, np.multiply):
        values = [of(w[:, 3], w[:, 2]) for w in (ours, theirs)]
        assert stats.ks_2samp(*values).pvalue > P


def test_jitter_follows_torchvision():
    """Factors and the order of operations have the distributions of torchvision's draws."""
    n = 6000
    row = ViewConfig(jitter_p=1.0)
    recipe = replace(recipe_for("tinyimagenet"), view1=row)
    view = draw(recipe, 1, np.full((n, 2), 64), np.arange(n), seed=2, epoch=0)
    torch.manual_seed(0)
    jitter = ColorJitter(row.brightness, row.contrast, row.saturation, row.hue)
    params = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    theirs = [ColorJitter.get_params(*params) for _ in range(n)]
    ours = (view.brightness_N, view.contrast_N, view.saturation_N, view.hue_N)
    for k, values in enumerate(ours):
        assert stats.ks_2samp(values, [drawn[1 + k] for drawn in theirs]).pvalue > P

    orders = list(permutations(range(4)))
    counts = np.zeros((2, len(orders)))
    for mine, drawn in zip(view.order_N4.tolist(), theirs, strict=True):
        counts[0, orders.index(tuple(mine))] += 1
        counts[1, orders.index(tuple(drawn[0].tolist()))] += 1
    assert stats.chi2_contingency(counts).pvalue > P
    assert stats.chisquare(counts[0]).pvalue > P
    # the order is independent of the strengths, the window and the flags
    first = view.order_N4[:, 0]
    for values in (*ours, view.window_N4[:, 2]):
        groups = [values[first == operation] for operation in range(4)]
        assert stats.kruskal(*groups).pvalue > P
    for flag in (view.gray_N, view.flip_N):
        assert stats.chi2_contingency([np.bincount(first[flag == x]) for x in (0, 1)]).pvalue > P


def test_no_number_has_moved():
    """An image's augmentation stays the same from release to release."""
    view = draw(recipe_for("stl10"), 2, np.array([[96, 96]]), np.array([1234]), seed=7, epoch=3)
    assert view.window_N4.tolist() == [[1, 6, 92, 89]]
    assert view.order_N4.tolist() == [[3, 0, 2, 1]]
    values = (view.brightness_N, view.contrast_N, view.saturation_N, view.hue_N)
    assert np.allclose(
        [value[0] for value in values],
        [1.240372896, 1.317097425, 1.152617335, 0.058824949],
        rtol=1e-6,
    )
    flags = (view.gray_N, view.blur_sigma_N > 0, view.solarize_N, view.flip_N)
    assert [bool(flag[0]) for flag in flags] == [False, False, False, True]
    assert epoch_order(9, seed=7, epoch=3).tolist() == [3, 6, 4, 2, 0, 7, 5, 1, 8]
    # each from its own place, which independent flags alone don't show
    row = ViewConfig(blur_p=0.5, solarize_p=0.5)
    recipe = replace(recipe_for("stl10"), view1=row)
    view = draw(recipe, 1, np.full((16, 2), 96), np.arange(16), seed=7, epoch=3)
    flags = (view.gray_N, view.blur_sigma_N > 0, view.solarize_N, view.flip_N)
    assert [np.packbits(flag).tobytes().hex() for flag in flags] == ["8050", "9ec9", "d89e", "2cb2"]


@pytest.mark.parametrize("size", [(10, 4000), (4000, 10), (1, 1), (1, 50)], ids=str)
def test_thin_images_get_the_central_window(size):
    recipe = recipe_for("imagefolder")
    recipe = replace(recipe, view1=ViewConfig(crop_scale=(0.5, 1.0)))
    view = draw(recipe, 1, np.array([size]), np.array([0]), seed=0, epoch=0)
    transform = RandomResizedCrop(224, scale=(0.5, 1.0))
    theirs = transform.get_params(torch.empty(3, *size), [0.5, 1.0], [3 / 4, 4 / 3])
    # torchvision's height is never 0 pixels here; 1 x 1 fits at the first draw
    assert tuple(view.window_N4[0]) == tuple(theirs)


def test_colour_matrices_keep_white_and_gray():
    recipe = recipe_for("tinyimagenet")
    view = draw(recipe, 1, np.full((500, 2), 64), np.arange(500), seed=0, epoch=0)
    colour, of_mean = colour_matrices(view)
    # in an image of one gray, only the brightness changes a pixel
    gray = np.ones(3, np.float32)
    expected = view.brightness_N[:, None] * gray
    assert np.allclose((colour + of_mean) @ gray, expected, atol=1e-5)
    rows = colour[view.gray_N]
    assert np.allclose(rows, rows[:, :1], atol=1e-6), "gray images have three equal channels"
