"""Backbone, learning rate, randomness, batches, means, and the same numbers twice."""
import copy
import math

import pytest
import torch
import torchvision
from torch import nn

import common
from common import Meter, UserError, batches, cosine_lr, generator, resnet18

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------
# Backbone

def test_at_width_64_the_weights_load_strictly_into_torchvisions_resnet18():
    reference = torchvision.models.resnet18()
    reference.fc = nn.Identity()
    ours = resnet18(224)
    reference.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (ours.eval()(x) - reference.eval()(x)).abs().max() < 1e-4


def test_small_images_differ_from_torchvisions_resnet18_in_the_stem_alone():
    shapes = {k: v.shape for k, v in torchvision.models.resnet18().state_dict().items()}
    different = [k for k, v in resnet18(32).state_dict().items() if v.shape != shapes[k]]
    assert different == ["conv1.weight"]


@pytest.mark.parametrize("size, kernel, stride, pool", [
    (28, 3, 1, False), (32, 3, 1, False), (64, 3, 1, False), (65, 3, 1, True), (96, 3, 1, True),
    (128, 3, 1, True), (129, 7, 2, True), (224, 7, 2, True)])
def test_the_stem_follows_the_image_size(size, kernel, stride, pool):
    net = resnet18(size, width=4)
    assert (net.conv1.kernel_size[0], net.conv1.stride[0]) == (kernel, stride)
    assert isinstance(net.maxpool, nn.MaxPool2d) is pool
    words = common.describe(net, size)
    assert f"{kernel}x{kernel} stem" in words and ("without max-pool" in words) is not pool


@pytest.mark.parametrize("width", [1, 4, 64])
def test_features_are_eight_times_the_width(width):
    net = resnet18(32, width).eval()
    with torch.no_grad():
        assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 8 * width)


def test_the_last_stage_sees_a_32_px_image_at_4_by_4_positions():
    # 32 px; stem stride 1; stages of stride 1, 2, 2, 2: 32 / 8 = 4.
    # ImageNet's stem would leave 1 x 1.
    sizes = []
    net = resnet18(32, width=2)
    net.layer4.register_forward_hook(lambda module, x, y: sizes.append(y.shape[-1]))
    net(torch.zeros(2, 3, 32, 32))
    resnet18_imagenet = torchvision.models.resnet18()
    resnet18_imagenet.layer4.register_forward_hook(lambda module, x, y: sizes.append(y.shape[-1]))
    resnet18_imagenet(torch.zeros(2, 3, 32, 32))
    assert sizes == [4, 1]


def test_convolutions_start_with_he_initialisation_at_every_width():
    # Fan-out of a 3x3 convolution to 64 channels is 9 x 64: deviation sqrt(2 / 576) = .0589.
    torch.manual_seed(0)
    for width in (16, 64):
        weight = resnet18(32, width).layer1[0].conv1.weight
        assert abs(weight.std().item() / math.sqrt(2 / (9 * width)) - 1) < .1


# ------------------------------------------------------------------------------------------------
# Learning rate, randomness

def test_the_cosine_starts_at_one_and_ends_at_zero():
    assert cosine_lr(0, 100) == 1
    assert cosine_lr(50, 100) == pytest.approx(.5)
    assert cosine_lr(25, 100) == pytest.approx((1 + math.sqrt(.5)) / 2)
    assert cosine_lr(100, 100) == pytest.approx(0)
    assert 0 < cosine_lr(99, 100) < .001                           # the last step that is taken


def test_warm_up_rises_linearly_and_meets_the_cosine_at_one():
    # Steps 0..3 of a warm-up of 4: 1/4, 2/4, 3/4, 4/4; step 4 is the first of the cosine: 1.
    assert [cosine_lr(i, 100, warmup=4) for i in range(5)] == pytest.approx([.25, .5, .75, 1, 1])
    assert cosine_lr(100, 100, warmup=4) == pytest.approx(0)
    falling = [cosine_lr(i, 100, warmup=4) for i in range(4, 101)]
    assert falling == sorted(falling, reverse=True)


def test_parameter_groups_keep_their_own_factor():
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b], "factor": 10}], lr=1)
    common.set_lr(optimizer, .5)
    assert [group["lr"] for group in optimizer.param_groups] == [.5, 5]


def test_seed_epoch_and_purpose_each_change_the_random_numbers():
    keys = [(seed, epoch, purpose) for seed in (0, 1, 11) for epoch in (0, 1, 11)
            for purpose in ("views", "kmeans")]
    draws = {key: torch.rand(8, generator=generator(*key)) for key in keys}
    assert len({tuple(d.tolist()) for d in draws.values()}) == len(keys)
    assert all(torch.equal(torch.rand(8, generator=generator(*key)), d) for key, d in draws.items())


def test_an_unavailable_device_is_refused_in_one_line():
    if torch.cuda.is_available():
        assert common.pick_device("cuda").type == "cuda"
    else:
        with pytest.raises(UserError, match="no CUDA"):
            common.pick_device("cuda")
    assert common.pick_device("cpu") == CPU


# ------------------------------------------------------------------------------------------------
# Batches

def numbered(n):
    """n images whose every pixel is the number of the image, and views that return it."""
    return torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, 2, 2).contiguous()


def view_twice(x, rng):
    return x, x + torch.rand(1, generator=rng)


def one_epoch(n=50, batch_size=8, index=None, seed=0, views=view_twice):
    index = torch.arange(n) if index is None else index
    return list(batches(numbered(n), index, batch_size, views,
                        generator(seed, 0, "views"), CPU))


def test_an_epoch_visits_every_image_once():
    seen = torch.cat([ids for ids, _, _ in one_epoch(n=48)])
    assert sorted(seen.tolist()) == list(range(48))


def test_only_whole_batches_are_given():
    # 50 = 6 x 8 + 2: two images wait for another epoch, other ones each time.
    assert [len(ids) for ids, _, _ in one_epoch(n=50)] == [8] * 6
    left = [set(range(50)) - set(torch.cat([ids for ids, *_ in one_epoch(seed=s)]).tolist())
                for s in (0, 1)]
    assert left[0] != left[1] and all(len(out) == 2 for out in left)


def test_every_view_is_a_view_of_the_image_of_its_index():
    for ids, x1, _ in one_epoch():
        assert torch.equal((x1[:, 0, 0, 0] * 255).round().long(), ids)


def test_only_the_indexed_images_are_visited():
    index = torch.tensor([3, 5, 8, 13, 21, 34])
    assert set(torch.cat([ids for ids, *_ in one_epoch(batch_size=2,
               index=index)]).tolist()) == set(index.tolist())


def test_epochs_are_shuffled_by_the_generator_alone():
    a, b, c = (torch.cat([ids for ids, *_ in one_epoch(seed=s)]) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert not torch.equal(a, a.sort().values)


def test_large_epochs_are_augmented_in_chunks_and_batches_do_not_straddle_them():
    calls = []

    def views(x, rng):
        calls.append(len(x))
        return (x,)
    images = torch.zeros(1100, 3, 2, 2, dtype=torch.uint8)
    made = list(batches(images, torch.arange(1100), 100, views, generator(0, 0, ""), CPU))
    assert [len(ids) for ids, _ in made] == [100] * 11
    assert sum(calls) == 1100 and all(n % 100 == 0 for n in calls) and len(calls) > 1


def test_the_meter_averages_every_term_over_the_epoch():
    meter = Meter("method, epoch 1", steps=120)
    for i in range(120):
        meter.add(loss=torch.tensor(float(i), requires_grad=True), swap=torch.tensor(2.))
    assert meter.means() == pytest.approx({"loss": 59.5, "swap": 2})    # (0 + ... + 119) / 120


def test_the_meter_shows_a_single_nan_of_the_epoch():
    meter = Meter("method, epoch 1", steps=3)
    for value in (1., math.nan, 1.):
        meter.add(loss=torch.tensor(value))
    assert math.isnan(meter.means()["loss"])


# ------------------------------------------------------------------------------------------------
# The smallest sizes: torch's bfloat16 convolution of stride 2 on a 1 x 1 map gives other results
# at each call, so no network may need one.

SIZES = [(8, 1), (9, 1), (15, 1), (9, 2), (10, 2), (16, 2), (17, 2), (65, 1), (65, 2), (129, 1)]


@pytest.mark.parametrize("size, stride", SIZES)
def test_no_strided_convolution_sees_a_single_position(size, stride):
    net, seen = resnet18(size, 2, stride).eval(), []
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.stride[0] > 1:
            module.register_forward_hook(lambda _, x, y: seen.append(x[0].shape[-1]))
    with torch.no_grad():
        net(torch.zeros(1, 3, size, size))
    assert len(seen) >= 6 and min(seen) > 1                        # 3 stages, each with a shortcut


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size, stride", [(8, 1), (9, 2), (16, 2)])
def test_the_same_step_gives_the_same_gradients_at_the_smallest_sizes(
        size, stride, precision, monkeypatch):
    monkeypatch.setattr(common, "fast_dtype", lambda device: precision)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))

    torch.manual_seed(0)
    start = resnet18(size, 1, stride)

    def gradients():
        net = copy.deepcopy(start)
        with common.autocast(CPU):
            h = net(x)
        h.float().square().sum().backward()
        return [h.detach(), *(p.grad for p in net.parameters())]
    first = gradients()
    assert all(g.isfinite().all() for g in first)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients()))


def test_he_initialisation_is_by_fan_out():
    torch.manual_seed(0)
    weight = common.resnet18(32, 64).layer2[0].conv1.weight        # 64 to 128 channels
    assert abs(weight.std().item() / math.sqrt(2 / (9 * 128)) - 1) < .05


@pytest.mark.parametrize("size, stride, side", [(32, 1, 32), (32, 2, 16), (96, 1, 48), (96, 2, 24)])
def test_the_stem_has_the_stride_that_was_asked_for(size, stride, side):
    seen, net = [], common.resnet18(size, 16, stride).eval()
    net.layer1.register_forward_hook(lambda module, x, y: seen.append(y.shape[-1]))
    net(torch.zeros(1, 3, size, size))
    assert net.conv1.stride == (stride, stride) and seen == [side]


def test_the_meter_keeps_no_graph():
    meter = common.Meter("method, epoch 1", steps=1)
    meter.add(loss=torch.ones((), requires_grad=True) * 2)
    assert not meter.total["loss"].requires_grad


def test_the_meter_divides_by_the_steps_that_were_taken():
    meter = common.Meter("method, epoch 1", steps=10)
    meter.add(loss=torch.tensor(1.))
    meter.add(loss=torch.tensor(3.))
    assert meter.means() == {"loss": 2.}
