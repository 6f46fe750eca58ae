"""What mask_mix.py promises, one idea each. Run: pytest tests/test_mask_mix.py"""
import copy
import inspect
import json
import math
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import mask_mix

torch.set_num_threads(1)


def args(**changed):
    """The defaults of the command line, with changes."""
    values = vars(mask_mix.parse([]))
    return types.SimpleNamespace(**{**values, **changed})


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=rng(seed), dtype=dtype)


def small_networks(predictors=1, dtype=torch.float32):
    """An online network with a backbone of two layers, and its target."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 24), nn.BatchNorm1d(24),
                             nn.ReLU())
    online = mask_mix.Network(backbone, 24, predictors, hidden=32, dim=16).to(dtype)
    return online, mask_mix.make_target(online)


def views(b=8, seed=0):
    """2B complete views without a single pixel at the mean."""
    x = normal(2 * b, 3, 16, 16, seed=seed, dtype=torch.float32)
    return x + x.sign() * .01


# ---- the regression loss

def test_regression_loss_is_the_printed_sum():
    p, t = normal(5, 7), normal(5, 7, seed=1)
    total = 0.
    for b in range(5):
        inner = sum(p[b, d].item() * t[b, d].item() for d in range(7))
        p_length, t_length = (math.sqrt(sum(v.item()**2 for v in x[b])) for x in (p, t))
        total += 2 - 2 * inner / (p_length * t_length)
    assert abs(mask_mix.regression_loss(p, t).item() - total / 5) < 1e-12


def test_regression_loss_is_0_for_equal_2_for_orthogonal_4_for_opposite_directions():
    p = torch.tensor([[3., 0.], [0., 2.]])
    for t, value in ((p * 5, 0), (torch.tensor([[0., 1.], [1., 0.]]), 2), (-p, 4)):
        assert mask_mix.regression_loss(p, t).item() == pytest.approx(value, abs=1e-6)


def test_regression_loss_ignores_length_and_the_order_of_the_images():
    p, t, order = normal(6, 4), normal(6, 4, seed=1), torch.randperm(6, generator=rng())
    loss = mask_mix.regression_loss(p, t)
    assert torch.allclose(loss, mask_mix.regression_loss(7 * p, .1 * t), atol=1e-12)
    assert torch.allclose(loss, mask_mix.regression_loss(p[order], t[order]), atol=1e-12)


def test_gradients_of_both_losses_agree_with_finite_differences():
    p, t = normal(4, 3).requires_grad_(), normal(4, 3, seed=1)
    lam, partner = torch.tensor([.5, .6, .8, 1.]).double(), torch.tensor([1, 2, 3, 0])
    assert torch.autograd.gradcheck(lambda p: mask_mix.regression_loss(p, t), p)
    assert torch.autograd.gradcheck(lambda p: mask_mix.mixed_regression_loss(p, t, lam, partner), p)


@pytest.mark.parametrize("scale", [1e4, 0.])
def test_losses_and_gradients_stay_finite_for_huge_and_for_zero_predictions(scale):
    p = (normal(4, 3, dtype=torch.float32) * scale).requires_grad_()
    t, lam = normal(4, 3, seed=1).float() * scale, torch.full((4,), .7)
    loss = mask_mix.regression_loss(p, t)
    loss = loss + mask_mix.mixed_regression_loss(p, t, lam, torch.tensor([1, 0, 3, 2]))
    loss.backward()
    assert loss.isfinite() and p.grad.isfinite().all()


@pytest.mark.parametrize("name", ["regression_loss", "random_mask", "mix_features",
                                  "mixed_regression_loss", "ema_update", "momentum"])
def test_each_function_runs_when_pasted_alone(name):
    free = {"torch": torch, "F": F, "math": math}
    exec(inspect.getsource(getattr(mask_mix, name)), free)
    p, lam = normal(4, 3), torch.full((4,), .7).double()
    partner = torch.tensor([1, 0, 3, 2])
    call = {"regression_loss": (p, p), "random_mask": (normal(2, 3, 8, 8), .3, 4, rng()),
            "mix_features": (p, lam, partner), "mixed_regression_loss": (p, p, lam, partner),
            "ema_update": (nn.Linear(2, 2), nn.Linear(2, 2), .5), "momentum": (1, 10)}[name]
    free[name](*call)


# ---- masking

def test_mask_erases_exactly_19_of_64_cells_in_every_image():
    x = views(16)
    erased = mask_mix.random_mask(x, .3, 8, rng()) == 0
    cells = erased.view(32, 3, 8, 2, 8, 2).float().mean((1, 3, 5))
    assert set(cells.unique().tolist()) == {0., 1.}                # whole cells, in all channels
    assert (cells.sum((1, 2)) == 19).all()                         # round(.3 * 64)


def test_mask_differs_between_images():
    erased = (mask_mix.random_mask(views(16), .3, 8, rng()) == 0)[:, 0].flatten(1)
    assert len(erased.unique(dim=0)) == 32


def test_mask_leaves_all_other_pixels_bit_for_bit():
    x = views()
    u = mask_mix.random_mask(x, .3, 8, rng())
    assert torch.equal(u[u != 0], x[u != 0])


@pytest.mark.parametrize("ratio, left", [(0., 1.), (1., 0.)])
def test_mask_ratio_0_is_the_identity_and_ratio_1_erases_everything(ratio, left):
    x = views()
    assert torch.equal(mask_mix.random_mask(x, ratio, 8, rng()), x * left)


def test_mask_cells_cover_images_whose_side_the_grid_does_not_divide():
    erased = (mask_mix.random_mask(torch.ones(50, 1, 30, 30), .3, 8, rng()) == 0)[:, 0]
    assert erased.any(0).all()                                     # every pixel, in some image
    assert .25 < erased.float().mean() < .35


def test_mask_of_raw_images_takes_the_given_fill():
    x = torch.full((2, 3, 8, 8), 200, dtype=torch.uint8)
    fill = torch.tensor([1, 2, 3], dtype=torch.uint8).view(1, 3, 1, 1)
    u = mask_mix.random_mask(x, .5, 4, rng(), fill)
    assert u.dtype == torch.uint8
    assert [set(u[:, c].unique().tolist()) for c in range(3)] == [{1, 200}, {2, 200}, {3, 200}]


# ---- mixing

def test_lam_lies_between_a_half_and_1_with_mean_three_quarters():
    lam, partner = mask_mix.draw_mixing(20_000, 1., rng())
    assert .5 <= lam.min() and lam.max() <= 1
    assert abs(lam.mean() - .75) < .01                             # the mean of max(U, 1 - U)
    assert torch.equal(partner.sort().values, torch.arange(20_000))


def test_a_large_alpha_mixes_half_and_half():
    assert mask_mix.draw_mixing(1000, 1000., rng())[0].max() < .6


def test_mix_features_is_the_printed_sum():
    h, lam = normal(3, 2), torch.tensor([.5, .75, 1.]).double()
    partner = torch.tensor([2, 0, 1])
    m = mask_mix.mix_features(h, lam, partner)
    assert torch.allclose(m[1], .75 * h[1] + .25 * h[0]) and torch.equal(m[2], h[2])


def test_mixed_loss_is_the_printed_sum():
    p, t, lam = normal(4, 3), normal(4, 3, seed=1), torch.tensor([.5, .6, .8, 1.]).double()
    partner, total = torch.tensor([3, 2, 0, 1]), 0.

    def distance(i, j):
        return 2 - 2 * (p[i] @ t[j] / (p[i].norm() * t[j].norm())).item()
    for b in range(4):
        total += lam[b].item() * distance(b, b) + (1 - lam[b].item()) * distance(b, partner[b])
    assert abs(mask_mix.mixed_regression_loss(p, t, lam, partner).item() - total / 4) < 1e-12


def test_mixed_loss_compares_with_the_mix_of_the_unit_targets():
    p, t = normal(64, 9), normal(64, 9, seed=1)
    lam, partner = mask_mix.draw_mixing(64, 1., rng())
    lam = lam.double()
    virtual = mask_mix.mix_features(F.normalize(t, dim=1), lam, partner)
    other_way = (2 - 2 * (F.normalize(p, dim=1) * virtual).sum(1)).mean()
    assert abs(mask_mix.mixed_regression_loss(p, t, lam, partner) - other_way) < 1e-12


def test_mixed_loss_cannot_reach_0():
    # Orthogonal targets, lam = 3/4: their mix is best, 2 - 2 sqrt(9/16 + 1/16) = .419
    t, lam, partner = torch.eye(2).double(), torch.full((2,), .75).double(), torch.tensor([1, 0])
    best = mask_mix.mix_features(t, lam, partner)
    lowest = mask_mix.mixed_regression_loss(best, t, lam, partner).item()
    assert lowest == pytest.approx(2 - 2 * math.sqrt(.625))
    for seed in range(100):
        p = normal(2, 2, seed=seed)
        assert mask_mix.mixed_regression_loss(p, t, lam, partner).item() >= lowest - 1e-12


def test_lam_1_or_an_image_that_is_its_own_partner_gives_the_plain_loss():
    p, t = normal(8, 5), normal(8, 5, seed=1)
    lam, partner = torch.rand(8, generator=rng()).double(), torch.randperm(8, generator=rng())
    plain = mask_mix.regression_loss(p, t)
    for case in ((torch.ones(8).double(), partner), (lam, torch.arange(8))):
        assert abs(mask_mix.mixed_regression_loss(p, t, *case) - plain) < 1e-12


# ---- target

def test_momentum_runs_from_the_base_to_1():
    values = [mask_mix.momentum(s, 100) for s in range(101)]
    assert values[0] == pytest.approx(.99) and values[50] == pytest.approx(.995)
    assert values[100] == 1 and values == sorted(values)
    assert mask_mix.momentum(0, 7, base=.9) == pytest.approx(.9)


def test_target_is_the_moving_average_and_its_buffers_are_its_own():
    online, target = small_networks(dtype=torch.float64)
    with torch.no_grad():
        for p in online.parameters():
            p.add_(torch.randn_like(p))
    online(views().double())                                       # the online statistics move
    old, buffers = ([t.clone() for t in part()] for part in (target.parameters, target.buffers))
    mask_mix.ema_update(target, online, .97)
    followed = [*online.backbone.parameters(), *online.projector.parameters()]
    assert len(followed) == len(old)
    for now, before, new in zip(target.parameters(), old, followed):
        assert (now - (.97 * before + .03 * new)).abs().max() < 1e-7
    assert all(torch.equal(a, b) for a, b in zip(buffers, target.buffers()))


def test_no_gradient_reaches_the_target():
    online, target = small_networks()
    loss, _, _ = mask_mix.losses(online, target, views(), args(), rng())
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in target.parameters())
    assert all(p.grad is not None for p in online.parameters())


def test_simsiam_sends_no_gradient_through_its_own_targets():
    # With the predictor set to a constant direction every path but the target's is cut off.
    online, _ = small_networks()
    with torch.no_grad():
        online.predictors[0][3].weight.zero_()
    loss, _, _ = mask_mix.losses(online, None, views(), args(base="simsiam"), rng())
    loss.backward()
    assert all(p.grad.abs().max() == 0 for p in online.projector.parameters())


def seen_by(module, action):
    """All inputs that a module gets while action runs."""
    inputs = []
    handle = module.register_forward_pre_hook(lambda _, x: inputs.append(x[0].detach().clone()))
    action()
    handle.remove()
    return inputs


def test_the_target_never_sees_a_masked_pixel_and_the_online_network_does():
    online, target = small_networks()
    v = views()

    def run():
        mask_mix.losses(online, target, v, args(), rng())
    given = seen_by(target.backbone, run)
    assert len(given) == 1 and torch.equal(given[0], v)
    complete, masked = seen_by(online.backbone, run)
    assert torch.equal(complete, v)
    assert (masked == 0).float().mean().item() == pytest.approx(19 / 64)


def test_targets_normalise_by_their_own_batch_of_complete_views():
    online, target = small_networks()
    v, before = views(), target.backbone[2].running_mean.clone()
    mask_mix.losses(online, target, v, args(), rng())
    mean = target.backbone[1](v.flatten(1)).mean(0)
    assert torch.allclose(target.backbone[2].running_mean, .9 * before + .1 * mean, atol=1e-3)


def test_predictions_meet_the_other_view_and_virtual_samples_their_partners_other_view():
    # The networks pass on what they get, so that the loss shows whom it compares with whom: image
    # i points along axis i in view 1 and along axis B + i in view 2.
    b = 4
    online = mask_mix.Network(nn.Identity(), 1, 1)
    online.projector, online.predictors = nn.Identity(), nn.ModuleList([nn.Identity()])
    v = torch.eye(2 * b)
    a = args(mask_weight=0.)
    _, terms, _ = mask_mix.losses(online, nn.Identity(), v, a, rng())
    assert terms["byol"].item() == pytest.approx(2, abs=1e-6)      # its own view would give 0
    assert terms["mix"].item() == pytest.approx(2, abs=1e-6)       # so would t1 in place of t2
    # Both views along one axis: only now does the partner's target matter.
    v = torch.eye(b, 2 * b).repeat(2, 1)
    _, terms, _ = mask_mix.losses(online, nn.Identity(), v, a, rng())
    lam, partner = mask_mix.draw_mixing(b, a.mix_alpha, rng())
    expected = 0.
    for i in range(b):                                             # own share, partner's share
        l = 1. if partner[i] == i else lam[i].item()
        expected += (2 - 2 * math.hypot(l, 1 - l)) / b             # <m, lam t + (1 - lam) t'> / |m|
    assert terms["mix"].item() == pytest.approx(expected, abs=1e-6)


def test_both_weights_at_0_are_plain_byol_with_the_same_gradients():
    online, target = small_networks()
    twin, twin_target = copy.deepcopy(online), copy.deepcopy(target)
    v, a = views(), args(mask_weight=0., mix_weight=0.)
    loss, terms, _ = mask_mix.losses(online, target, v, a, rng())
    loss.backward()
    with common.autocast(v.device):                                # plain BYOL, written out
        p1, p2 = twin.predictors[0](twin.projector(twin.backbone(v))).chunk(2)
        with torch.no_grad():
            t1, t2 = twin_target(v).chunk(2)
    p1, p2, t1, t2 = (F.normalize(x.float(), dim=1) for x in (p1, p2, t1, t2))
    plain = ((2 - 2 * (p1 * t2).sum(1)).mean() + (2 - 2 * (p2 * t1).sum(1)).mean()) / 2
    plain.backward()
    assert set(terms) == {"byol"} and loss.item() == pytest.approx(plain.item(), abs=1e-6)
    for a, b in zip(online.parameters(), twin.parameters()):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)


def test_the_byol_term_is_the_same_with_and_without_the_additions():
    plain = args(mask_weight=0., mix_weight=0.)
    without, both = (mask_mix.losses(*small_networks(), views(), a, rng())[1]["byol"]
                     for a in (plain, args()))
    assert torch.equal(without, both)


def test_the_loss_is_the_weighted_mean_of_its_terms():
    a = args(mask_weight=.5, mix_weight=2.)
    loss, terms, _ = mask_mix.losses(*small_networks(), views(), a, rng())
    expected = (terms["byol"] + .5 * terms["mask"] + 2 * terms["mix"]) / 3.5
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_separate_predictors_each_learn_from_their_own_samples():
    online, target = small_networks(predictors=3)
    for weights, learning in (((1., 0.), [0, 1]), ((0., 1.), [0, 2])):
        online.zero_grad(set_to_none=True)
        a = args(mask_weight=weights[0], mix_weight=weights[1])
        mask_mix.losses(online, target, views(), a, rng())[0].backward()
        learned = [q[0].weight.grad is not None for q in online.predictors]
        assert [i for i, yes in enumerate(learned) if yes] == learning


# ---- collapse, BatchNorm

def test_spread_is_1_for_random_directions_and_0_for_a_single_one():
    assert mask_mix.gauges(normal(5000, 64))["spread"].item() == pytest.approx(1, abs=.02)
    assert mask_mix.gauges(torch.ones(10, 64))["spread"].item() == pytest.approx(0, abs=1e-3)


def test_the_constant_gauge_is_the_loss_of_the_best_prediction_that_ignores_its_input():
    t = normal(500, 8, dtype=torch.float32) + 1
    best = F.normalize(t, dim=1).mean(0).expand(500, -1)
    constant = mask_mix.gauges(t)["constant"].item()
    assert mask_mix.regression_loss(best, t).item() == pytest.approx(constant, abs=1e-5)
    assert mask_mix.regression_loss(best + .1 * normal(8).float(), t).item() > constant


def test_batchnorm_is_re_estimated_on_complete_images_alone():
    online, target = small_networks()
    mask_mix.losses(online, target, 5 + 3 * views(), args(), rng())
    images = torch.randint(256, (64, 3, 16, 16), generator=rng(), dtype=torch.uint8)
    statistics = common.pixel_statistics(images)
    before = [p.clone() for p in online.parameters()]
    index, device = torch.arange(64), torch.device("cpu")
    mask_mix.reestimate_batchnorm(online, images, index, statistics, device)
    x = online.backbone[1](common.normalise(images.float() / 255, statistics).flatten(1))
    norm = online.backbone[2]
    assert torch.allclose(norm.running_mean, x.mean(0), atol=2e-2) and norm.momentum == .1
    assert torch.allclose(norm.running_var, x.var(0), rtol=.05)
    assert all(torch.equal(a, b) for a, b in zip(before, online.parameters()))


def spread_after(steps, variant, last_norm):
    """A small network trained on 512 shapes. variant: ours; or naive, both branches learn, without
    stop-gradient, moving average and predictor. last_norm: the BatchNorm at the projector's end."""
    torch.manual_seed(0)
    data = common.load_dataset("shapes", image_size=16)
    images, statistics = data.train.images[:512], common.pixel_statistics(data.train.images)
    online = mask_mix.Network(common.resnet18(16, 4, 2), 32, 1, hidden=128, dim=32)
    if not last_norm:
        online.projector = online.projector[:-1]
    target = mask_mix.make_target(online)
    make = mask_mix.make_views(16, .4, 1., .2, statistics)
    optimizer = torch.optim.SGD(online.parameters(), .06, momentum=.9, fused=True)
    index, device = torch.arange(512), torch.device("cpu")
    done, noise = 0, rng()
    while done < steps:
        clock = common.Clock(device)
        for _, x1, x2 in common.batches(images, index, 64, make, noise, device, clock):
            if variant == "ours":
                loss, _, z = mask_mix.losses(online, target, torch.cat([x1, x2]), args(), noise)
            else:
                z = online(torch.cat([x1, x2]))
                loss = mask_mix.regression_loss(*z.chunk(2))
            common.step(optimizer, loss)
            mask_mix.ema_update(target, online, mask_mix.momentum(done, steps))
            done += 1
    return mask_mix.gauges(z.detach())["spread"].item()


@pytest.mark.slow
@pytest.mark.parametrize("last_norm", [True, False])
def test_embeddings_stay_spread_in_a_short_run(last_norm):
    assert spread_after(150, "ours", last_norm) > .5


@pytest.mark.slow
def test_without_stop_gradient_and_moving_average_everything_collapses():
    # The last BatchNorm alone would keep the embeddings from a single point, so it is left out here
    # and, for a fair comparison, in one case of the test above.
    assert spread_after(200, "naive", last_norm=False) < .1


# ---- runs

SMALL = "--image-size 16 --train-size 128 --width 4 --batch-size 32 --device cpu".split()


def short_run(folder, *flags):
    return mask_mix.parse([*SMALL, "--out", str(folder), *flags])


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", "--base simsiam --separate-predictors --mix-weight 0",
                                   "--mask-weight 0 --mix-alpha .5"])
def test_a_run_leaves_its_scores_and_pictures(tmp_path, flags):
    run = tmp_path / "run"
    mask_mix.main([*SMALL, "--epochs", "1", "--out", str(run), *flags.split()])
    left = {f.name for f in run.iterdir()}
    assert {"views.png", "mixing.png", "prototypes.png", "confusion.png", "clusters.csv"} <= left
    scores = json.loads((run / "result.json").read_text())["scores"]["mask_mix"]
    assert 0 <= scores["knn"] <= 1 and 0 <= scores["knn_masked"] <= 1


@pytest.mark.slow
def test_on_shapes_it_passes_the_pixels_and_sees_through_masks(tmp_path, two_threads):
    mask_mix.main(["--device", "cpu", "--out", str(tmp_path / "run")])
    scores = json.loads((tmp_path / "run/result.json").read_text())["scores"]
    pixels, ours = scores["raw pixels"], scores["mask_mix"]
    assert ours["knn"] > pixels["knn"] + .05
    assert ours["knn_masked"] > pixels["knn_masked"] + .05
