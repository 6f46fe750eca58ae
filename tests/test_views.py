"""The views: every primitive against torchvision's own kernel, image by image, within one level of
255; then what a batch adds to them: a draw of its own for each image."""
import itertools
import math

import pytest
import torch
from scipy.stats import ks_2samp, kstest
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as TV

import common

LEVEL = 1 / 255


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n=24, side=32, seed=0):
    """Noise, the hardest to resize; with white and black corners, grey images, saturated reds."""
    x = torch.rand(n, 3, side, side, generator=rng(seed))
    x[::4, :, :4, :4] = 1
    x[1::4, :, :4, :4] = 0
    x[2::4] = x[2::4, :1]
    x[3::4, 0, 8:16] = 1
    return x


def per_image(values):
    return torch.as_tensor(values, dtype=torch.float32).view(-1, 1, 1, 1)


def boxes(n, side, seed=0):
    """n random crop boxes of whole pixels inside side x side: top, left, height, width."""
    g = rng(seed)
    h, w = (torch.randint(side // 4, side + 1, (n,), generator=g).float() for _ in range(2))
    top, left = ((torch.rand(n, generator=g) * (side - length + 1)).floor() for length in (h, w))
    return top, left, h, w


def drawn_boxes(n, scale, seed, flip=.5):
    """(left, width, flipped) of n crops, read back from what they do to a ramp of column numbers.

    Bilinear sampling of a ramp is exact, so output column j shows left + u w - 1/2 at
    u = (j + 1/2) / 32, or at 1 - u in a mirrored crop: slope gives w, then one value gives left."""
    ramp = torch.arange(32.).expand(n, 3, 32, 32)
    row = common.random_resized_crop(ramp, scale, rng(seed), flip=flip)[:, 0, 16]
    slope = (row[:, 16] - row[:, 15]) * 32
    u = torch.where(slope < 0, 16.5, 15.5) / 32
    width = slope.abs()
    return row[:, 15] + .5 - u * width, width, slope < 0


# ------------------------------------------------------------------------------------------------
# Crops

@pytest.mark.parametrize("side", [8, 28, 32, 65])
def test_a_crop_equals_torchvisions_resized_crop(side):
    # Boxes only ever grow, so torchvision's antialiasing changes nothing.
    x, box = pictures(40, side), boxes(40, side)
    ours = common.resized_crop(x, *box, torch.zeros(40))
    for i, (top, left, h, w) in enumerate(torch.stack(box, 1).int().tolist()):
        theirs = TV.resized_crop(x[i], top, left, h, w, [side, side], antialias=True)
        assert (ours[i] - theirs).abs().max() < LEVEL, (i, top, left, h, w)


def test_a_flipped_crop_is_the_mirror_image_of_the_crop():
    x, box = pictures(8), boxes(8, 32)
    plain, flipped = (common.resized_crop(x, *box, torch.full((8,), on)) for on in (0., 1.))
    assert (flipped - plain.flip(-1)).abs().max() < 1e-4


def test_a_crop_of_the_whole_image_changes_nothing():
    x, zero, side = pictures(8), torch.zeros(8), torch.full((8,), 32.)
    assert (common.resized_crop(x, zero, zero, side, side, zero) - x).abs().max() < 1e-4


@pytest.mark.parametrize("side", [32, 64])
def test_a_crop_takes_nothing_from_outside_its_box(side):
    # Inside the box all pixels are 0, outside all are 1. One leaked share of a pixel would show; an
    # affine_grid without clamping leaks 31 levels of 255 here.
    top, left, h, w = boxes(40, side)
    y = torch.arange(side)[None, :, None]
    x = torch.arange(side)[None, None, :]
    a, b, c, d = (t[:, None, None] for t in (top, left, top + h, left + w))
    outside = ~((y >= a) & (y < c) & (x >= b) & (x < d))
    image = outside[:, None].expand(-1, 3, -1, -1).float()
    assert common.resized_crop(image, top, left, h, w, torch.zeros(40)).max() < LEVEL / 20


def test_every_image_of_a_batch_gets_its_own_crop():
    x = pictures(1).expand(32, -1, -1, -1)
    views = common.random_resized_crop(x, (.2, 1), rng())
    different = [(a - b).abs().max() > LEVEL for a, b in itertools.combinations(views, 2)]
    assert all(different)


@pytest.mark.parametrize("scale", [(.2, 1.), (.08, 1.), (.08, .3)])
def test_crop_boxes_are_distributed_as_torchvisions(scale):
    # Two-sample Kolmogorov-Smirnov tests of left edge, width, middle, area and ratio. Ratios up to
    # 4/3 do not always fit, so this also checks the ten tries before the whole image is taken.
    n, image = 3000, torch.zeros(3, 32, 32)
    torch.manual_seed(0)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3])
                           for _ in range(n)]).float()             # top, left, height, width
    left, width, _ = drawn_boxes(n, scale, 1)
    assert (left - left.round()).abs().max() < .01 and (width - width.round()).abs().max() < .01
    left, width = left.round(), width.round()
    assert (left >= 0).all() and (left + width <= 32).all()
    # A ramp of row numbers gives the heights of the same boxes.
    ramp = torch.arange(32.)[:, None].expand(n, 3, 32, 32)
    column = common.random_resized_crop(ramp, scale, rng(1))[:, 0, :, 16]
    height = ((column[:, 16] - column[:, 15]) * 32).round()
    for ours, other in ((left, theirs[:, 1]), (width, theirs[:, 3]),
                        (left + width / 2, theirs[:, 1] + theirs[:, 3] / 2),
                        (width * height, theirs[:, 2] * theirs[:, 3]),
                        ((width / height).log(), (theirs[:, 3] / theirs[:, 2]).log())):
        assert ks_2samp(ours, other).pvalue > .01


def test_half_of_the_crops_are_mirrored_and_none_or_all_when_asked():
    # 2000 fair coins: mean .5, standard deviation sqrt(.25 / 2000) = .011; four of them are .045.
    assert abs(drawn_boxes(2000, (.2, 1), 3)[2].float().mean() - .5) < .045
    assert not drawn_boxes(50, (.2, 1), 3, flip=0.)[2].any()
    assert drawn_boxes(50, (.2, 1), 3, flip=1.)[2].all()


# ------------------------------------------------------------------------------------------------
# Colours

@pytest.mark.parametrize("ours, theirs", [
    (common.adjust_brightness, TV.adjust_brightness), (common.adjust_contrast, TV.adjust_contrast),
    (common.adjust_saturation, TV.adjust_saturation)])
def test_brightness_contrast_and_saturation_equal_torchvisions(ours, theirs):
    x, factors = pictures(), torch.linspace(0, 2, 24)
    changed = ours(x, per_image(factors))
    for image, factor, out in zip(x, factors.tolist(), changed):
        assert (out - theirs(image, factor)).abs().max() < LEVEL
    assert changed.min() >= 0 and changed.max() <= 1


def test_hue_equals_torchvisions():
    x, turns = pictures(), torch.linspace(-.5, .5, 24)
    changed = common.adjust_hue(x, per_image(turns))
    for image, turn, out in zip(x, turns.tolist(), changed):
        assert (out - TV.adjust_hue(image, turn)).abs().max() < LEVEL


def test_hue_leaves_greys_alone_and_keeps_the_brightest_channels_value():
    x = pictures()
    turned = common.adjust_hue(x, per_image([.37] * 24))
    assert (turned[2::4] - x[2::4]).abs().max() < 1e-6             # the grey ones
    assert (turned.amax(1) - x.amax(1)).abs().max() < 1e-6         # V of HSV
    assert (turned.amin(1) - x.amin(1)).abs().max() < 1e-5         # V - chroma


@pytest.mark.parametrize("adjust, neutral", [
    (common.adjust_brightness, 1), (common.adjust_contrast, 1), (common.adjust_saturation, 1),
    (common.adjust_hue, 0), (common.adjust_hue, 1)])
def test_the_neutral_factor_changes_nothing_and_inputs_are_never_written_to(adjust, neutral):
    x = pictures()
    before = x.clone()
    assert (adjust(x, per_image([neutral] * 24)) - x).abs().max() < 1e-5
    adjust(x, per_image([.3] * 24))
    assert torch.equal(x, before)


def test_color_jitter_is_torchvisions_four_adjustments_in_the_order_it_draws(monkeypatch):
    # What is applied with which factors is written down; torchvision's kernels then do the same.
    kernels, calls = {}, []
    for name in ("brightness", "contrast", "saturation", "hue"):
        ours = getattr(common, f"adjust_{name}")
        kernels[name] = getattr(TV, f"adjust_{name}")
        monkeypatch.setattr(common, f"adjust_{name}", lambda x, factor, name=name, ours=ours: (
            calls.append((name, factor.flatten().tolist())), ours(x, factor))[1])
    x = pictures(32)
    out = common.color_jitter(x, .4, .4, .4, .1, rng(), p=1, groups=8)
    # 8 groups of 4 images, 4 operations; image i is number i // 8 of group i % 8.
    assert len(calls) == 8 * 4
    orders = []
    for i in range(32):
        y, steps = x[i], calls[i % 8 * 4: i % 8 * 4 + 4]
        for name, factors in steps:
            y = kernels[name](y, factors[i // 8])
        assert (out[i] - y).abs().max() < LEVEL
        orders.append(tuple(name for name, _ in steps))
    assert all(len(set(order)) == 4 for order in orders)
    # Neighbours differ: a training batch of eight images holds as many orders as all 32 do.
    assert len(set(orders[:8])) == len(set(orders)) > 2


def test_color_jitter_leaves_one_image_in_five_unchanged():
    # p = .8 on 2000 images: standard deviation sqrt(.8 x .2 / 2000) = .009; four of them are .036.
    x = torch.rand(2000, 3, 4, 4, generator=rng()) * .8 + .1
    same = (common.color_jitter(x, .4, .4, .4, .1, rng(1), p=.8) - x).abs().amax((1, 2, 3)) < 1e-6
    assert abs(same.float().mean() - .2) < .036
    nothing = common.color_jitter(x, .4, .4, .4, .1, rng(1), p=0)
    assert (nothing - x).abs().max() < 1e-5


@pytest.mark.parametrize("strength, low, high", [(.4, .6, 1.4), (1.5, 0, 2.5)])
def test_jitter_factors_are_uniform_around_one_and_never_negative(strength, low, high):
    # A constant grey of .3 times the factor, with nothing else on: the factor can be read off.
    x = torch.full((3000, 3, 2, 2), .3)
    factor = common.color_jitter(x, strength, 0, 0, 0, rng(), p=1)[:, 0, 0, 0] / .3
    assert low <= factor.min() and factor.max() <= high + 1e-4
    assert kstest(factor, "uniform", (low, high - low)).pvalue > .01


def test_hue_shifts_are_uniform_around_zero():
    # Red turned by h < 1/6 of a turn towards yellow has green = 6 h; towards magenta blue = 6 |h|.
    red = torch.tensor([1., 0, 0]).view(1, 3, 1, 1).expand(3000, 3, 2, 2)
    out = common.color_jitter(red, 0, 0, 0, .1, rng(), p=1)[:, :, 0, 0]
    assert kstest((out[:, 1] - out[:, 2]) / 6, "uniform", (-.1, .2)).pvalue > .01


def test_jitter_takes_batches_smaller_than_its_groups():
    assert common.color_jitter(pictures(3), .4, .4, .4, .1, rng(), groups=8).shape == (3, 3, 32, 32)
    assert common.color_jitter(pictures(1), .4, .4, .4, .1, rng(), groups=8).shape == (1, 3, 32, 32)


def test_grey_images_equal_torchvisions():
    x = pictures()
    ours = common.random_grayscale(x, 1, rng())
    for image, out in zip(x, ours):
        assert (out - TV.rgb_to_grayscale(image, num_output_channels=3)).abs().max() < LEVEL
    assert torch.equal(common.random_grayscale(x, 0, rng()), x)


def test_one_image_in_five_becomes_grey():
    x = torch.rand(2000, 3, 4, 4, generator=rng())
    grey = common.random_grayscale(x, .2, rng(1))
    became = (grey[:, 0] == grey[:, 2]).flatten(1).all(1)
    assert abs(became.float().mean() - .2) < .036
    assert torch.equal(grey[~became], x[~became])


# ------------------------------------------------------------------------------------------------
# Randomness, normalisation

def recipe(x, g):
    x = common.random_resized_crop(x, (.2, 1), g)
    return common.random_grayscale(common.color_jitter(x, .4, .4, .4, .1, g), .2, g)


def test_the_same_seed_gives_the_same_views_and_another_seed_others():
    x = pictures(16)
    assert torch.equal(recipe(x, rng(5)), recipe(x, rng(5)))
    assert not torch.equal(recipe(x, rng(5)), recipe(x, rng(6)))


def test_views_stay_in_the_unit_interval_and_leave_the_images_alone():
    x = pictures(64)
    before = x.clone()
    view = recipe(x, rng())
    assert view.min() >= 0 and view.max() <= 1 + 1e-5 and math.isfinite(view.sum())
    assert torch.equal(x, before)


def test_normalised_pixels_have_mean_zero_and_deviation_one_in_each_channel():
    images = torch.randint(0, 256, (50, 3, 8, 8), generator=rng(), dtype=torch.uint8)
    images[:, 1] //= 3
    out = common.normalise(images.float() / 255, common.pixel_statistics(images))
    assert out.mean((0, 2, 3)).abs().max() < 1e-4
    assert (out.std((0, 2, 3)) - 1).abs().max() < 1e-4
    assert out.is_contiguous(memory_format=torch.channels_last)
