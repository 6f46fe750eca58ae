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


def args(**changed):
    """The defaults of the command line, with changes."""
    values = vars(mask_mix.parse([]))
    return types.SimpleNamespace(**{**values, **changed})


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=rng(seed), dtype=dtype)


def target_of(online):
    target = copy.deepcopy(online).requires_grad_(False)
    target.predictor = nn.Identity()
    return target


def small_networks(dtype=torch.float32):
    """An online network with a backbone of two layers, and its target."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 24), nn.BatchNorm1d(24),
                             nn.ReLU())
    online = mask_mix.Network(backbone, 24, hidden=32, dim=16).to(dtype)
    return online, target_of(online)


def views(b=8, seed=0):
    """2B complete views without a single pixel at the mean."""
    x = normal(2 * b, 3, 16, 16, seed=seed, dtype=torch.float32)
    return x + x.sign() * .01


def masked(v):
    return mask_mix.random_mask(v, .3, 8, rng())


def shares(b=8, seed=0):
    return 1 - torch.rand(b, generator=rng(seed)) / 2


def losses(online, target, v=None, u=None, lam=None, **changed):
    """mask_mix.losses with complete views v, and u the same ones masked."""
    v = views() if v is None else v
    u = masked(v) if u is None else u
    lam = shares(len(v) // 2) if lam is None else lam
    return mask_mix.losses(online, target, v, u, lam, args(**changed))


def neighbour(b):
    """Everybody's partner in a batch of b: the image before it."""
    return torch.arange(b).roll(1)


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
                                  "mixed_regression_loss", "ema_update"])
def test_each_function_runs_when_pasted_alone(name):
    free = {"torch": torch, "F": F, "math": math}
    exec(inspect.getsource(getattr(mask_mix, name)), free)
    p, lam = normal(4, 3), torch.full((4,), .7).double()
    partner = torch.tensor([1, 0, 3, 2])
    call = {"regression_loss": (p, p), "random_mask": (normal(2, 3, 8, 8), .3, 4, rng()),
            "mix_features": (p, lam, partner), "mixed_regression_loss": (p, p, lam, partner),
            "ema_update": (nn.Linear(2, 2), nn.Linear(2, 2), .5)}[name]
    free[name](*call)


# ---- masking

def test_mask_erases_exactly_19_of_64_cells_in_every_image():
    x = views(16)
    erased = masked(x) == 0
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
    u = mask_mix.random_mask(x, .5, 4, rng(), fill=fill)
    assert u.dtype == torch.uint8
    assert [set(u[:, c].unique().tolist()) for c in range(3)] == [{1, 200}, {2, 200}, {3, 200}]


def made(share, n=400, **changed):
    """What make_views gives of n white images: x1, x2, u1, u2, lam."""
    statistics = torch.full((1, 3, 1, 1), .5), torch.full((1, 3, 1, 1), .25)
    make = mask_mix.make_views(args(mask_share=share, jitter=0., gray=0., **changed), statistics)
    return make(torch.ones(n, 3, 16, 16), rng())


def test_half_of_the_views_are_masked_and_each_view_of_an_image_on_its_own():
    x1, x2, u1, u2, _ = made(.5)
    first, second = ((u != x).flatten(1).any(1) for u, x in ((u1, x1), (u2, x2)))
    # 400 fair coins: a standard deviation of .025; both of two independent ones: .25 +- .022
    assert abs(first.float().mean() - .5) < .1 and abs(second.float().mean() - .5) < .1
    assert abs((first & second).float().mean() - .25) < .1


def test_a_masked_view_takes_the_place_of_the_complete_one_and_differs_in_erased_cells_only():
    x1, _, u1, _, _ = made(1., mask_ratio=.3)
    erased = (u1 == 0).all(1)                                      # 0 is the mean colour
    assert (erased.float().mean((1, 2)) == 19 / 64).all()
    kept = ~erased[:, None].expand_as(x1)
    assert torch.equal(u1[kept], x1[kept])


def test_share_0_masks_nothing_and_leaves_the_complete_views_and_lam_as_they_are_with_masks():
    x1, x2, u1, u2, lam = made(0.)
    assert torch.equal(u1, x1) and torch.equal(u2, x2)
    with_masks = made(.5)
    assert torch.equal(x1, with_masks[0]) and torch.equal(x2, with_masks[1])
    assert torch.equal(lam, with_masks[4])


# ---- mixing

def test_lam_lies_between_a_half_and_1_with_mean_three_quarters():
    lam = made(0., n=4000)[4]
    assert .5 <= lam.min() and lam.max() <= 1
    assert abs(lam.mean() - .75) < .01                             # uniform: sd .144 / sqrt(4000)


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
    lam, partner = shares(64).double(), torch.randperm(64, generator=rng())
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

def test_m_rises_from_ema_to_1(tmp_path, monkeypatch, few_shapes):
    used = []
    monkeypatch.setattr(mask_mix, "ema_update", lambda target, online, m: used.append(m))
    monkeypatch.setattr(mask_mix, "report", lambda *_: None)
    mask_mix.main([*SMALL, "--epochs", "3", "--ema", ".9", "--out", str(tmp_path / "run")])
    # 4 steps an epoch; m = 1 - .1 (cos(pi s / 12) + 1) / 2
    expected = [1 - .1 * (math.cos(math.pi * s / 12) + 1) / 2 for s in range(12)]
    assert used == pytest.approx(expected) and used[0] == pytest.approx(.9) and used[-1] > .998


def test_target_is_the_moving_average_and_its_buffers_are_its_own():
    online, target = small_networks(dtype=torch.float64)
    with torch.no_grad():
        for p in online.parameters():
            p.add_(torch.randn_like(p))
    online(views().double())                                       # the online statistics move
    old, buffers = ([t.clone() for t in part()] for part in (target.parameters, target.buffers))
    mask_mix.ema_update(target, online, .97)
    followed = [*online.backbone.parameters(), *online.projector.parameters()]
    assert len(followed) == len(old)                               # the predictor has no target
    for now, before, new in zip(target.parameters(), old, followed):
        assert (now - (.97 * before + .03 * new)).abs().max() < 1e-7
    assert all(torch.equal(a, b) for a, b in zip(buffers, target.buffers()))


def test_no_gradient_reaches_the_target():
    online, target = small_networks()
    losses(online, target)[0].backward()
    assert all(p.grad is None and not p.requires_grad for p in target.parameters())
    assert all(p.grad is not None for p in online.parameters())


def seen_by(module, action):
    """All inputs that a module gets while action runs."""
    inputs = []
    handle = module.register_forward_pre_hook(lambda _, x: inputs.append(x[0].detach().clone()))
    action()
    handle.remove()
    return inputs


def test_the_target_never_sees_a_masked_pixel_and_the_online_network_sees_nothing_else():
    online, target = small_networks()
    v = views()
    u = masked(v)
    given = seen_by(target.backbone, lambda: losses(online, target, v, u))
    assert len(given) == 1 and torch.equal(given[0], v)
    given = seen_by(online.backbone, lambda: losses(online, target, v, u))
    assert len(given) == 1 and torch.equal(given[0], u)            # one pass, whatever is added


def test_targets_normalise_by_their_own_batch_of_complete_views():
    online, target = small_networks()
    v, before = views(), target.backbone[2].running_mean.clone()
    losses(online, target, v)
    mean = target.backbone[1](v.flatten(1)).mean(0)
    assert torch.allclose(target.backbone[2].running_mean, .9 * before + .1 * mean, atol=1e-3)


def test_the_online_network_normalises_masked_and_complete_views_in_one_batch():
    online, target = small_networks()
    v = views()
    u = torch.cat([masked(v)[:8], v[8:]])
    before = online.backbone[2].running_mean.clone()
    losses(online, target, v, u)
    mean = online.backbone[1](u.flatten(1)).mean(0)
    assert torch.allclose(online.backbone[2].running_mean, .9 * before + .1 * mean, atol=1e-3)


def test_mixed_samples_are_a_batch_of_their_own_in_the_head():
    online, target = small_networks()
    complete, mixed = seen_by(online.projector, lambda: losses(online, target, views()))
    assert complete.shape == mixed.shape == (16, 24)
    lam = shares().repeat(2)
    partner = torch.cat([neighbour(8), neighbour(8) + 8])          # of the same view
    expected = mask_mix.mix_features(complete.float(), lam, partner)
    assert torch.allclose(mixed.float(), expected, atol=1e-2)


def passing_on():
    """Networks that pass on what they get: the loss shows whom it compares with whom."""
    online = mask_mix.Network(nn.Identity(), 1)
    online.projector, online.predictor = nn.Identity(), nn.Identity()
    return online, nn.Identity()


def test_predictions_meet_the_target_of_the_other_view():
    # Image i points along axis i in view 1 and along axis B + i in view 2.
    v = torch.eye(8)
    _, terms = losses(*passing_on(), v, v)
    assert terms["byol"].item() == pytest.approx(2, abs=1e-6)      # its own view would give 0
    assert terms["mix"].item() == pytest.approx(2, abs=1e-6)       # so would t1 in place of t2


def test_virtual_samples_meet_the_target_of_the_partners_other_view():
    # Both views of image i point along axis i: only now does the partner's target matter.
    v, lam = torch.eye(4, 8).repeat(2, 1), shares(4)
    _, terms = losses(*passing_on(), v, v, lam)
    # <m, lam t + (1 - lam) t'> / |m| with orthogonal t, t' is |m| = sqrt(lam^2 + (1 - lam)^2)
    expected = sum(2 - 2 * math.hypot(l, 1 - l) for l in lam.tolist()) / 4
    assert terms["mix"].item() == pytest.approx(expected, abs=1e-6)


def test_share_0_and_weight_0_are_plain_byol_with_the_same_gradients():
    online, target = small_networks()
    twin, twin_target = copy.deepcopy(online), copy.deepcopy(target)
    v = views()
    loss, _ = losses(online, target, v, v, mix_weight=0.)
    loss.backward()
    with common.autocast(v.device):                                # plain BYOL, written out
        p1, p2 = twin.predictor(twin.projector(twin.backbone(v))).chunk(2)
        with torch.no_grad():
            t1, t2 = twin_target(v).chunk(2)
    p1, p2, t1, t2 = (F.normalize(x.float(), dim=1) for x in (p1, p2, t1, t2))
    plain = ((2 - 2 * (p1 * t2).sum(1)).mean() + (2 - 2 * (p2 * t1).sum(1)).mean()) / 2
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), abs=1e-6)
    for a, b in zip(online.parameters(), twin.parameters()):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)


def test_the_loss_is_the_weighted_mean_of_its_terms():
    loss, terms = losses(*small_networks(), mix_weight=2.)
    assert loss.item() == pytest.approx((terms["byol"] + 2 * terms["mix"]).item() / 3, rel=1e-6)


def test_a_share_of_1_makes_the_mixed_loss_the_plain_one():
    _, terms = losses(*passing_on(), normal(8, 5).float(), normal(8, 5, seed=1).float(),
                      torch.ones(4))
    assert terms["mix"].item() == pytest.approx(terms["byol"].item(), abs=1e-6)


# ---- collapse, BatchNorm

def test_the_constant_gauge_is_the_loss_of_the_best_prediction_that_ignores_its_input():
    v = normal(500, 8, dtype=torch.float32) + 1
    constant = losses(*passing_on(), v, v)[1]["constant"].item()
    best = F.normalize(v, dim=1).mean(0).expand(500, -1)
    assert mask_mix.regression_loss(best, v).item() == pytest.approx(constant, abs=1e-5)
    assert mask_mix.regression_loss(best + .1 * normal(8).float(), v).item() > constant


def test_the_constant_gauge_is_0_when_all_targets_are_the_same():
    v = normal(1, 8, dtype=torch.float32).expand(8, -1)
    assert losses(*passing_on(), v, v)[1]["constant"].item() == pytest.approx(0, abs=1e-5)


def test_running_statistics_are_those_of_complete_images_when_scores_are_made(
        tmp_path, monkeypatch, few_shapes):
    seen = {}

    def look(backbone, data, statistics, device):
        seen.update(copy.deepcopy(backbone.state_dict()), images=data.train.images,
                    statistics=statistics, net=copy.deepcopy(backbone))
        raise KeyboardInterrupt
    monkeypatch.setattr(mask_mix, "embed_both", look)
    with pytest.raises(SystemExit):
        mask_mix.main([*SMALL, "--epochs", "1", "--out", str(tmp_path / "run")])
    x = common.normalise(seen["images"].float() / 255, seen["statistics"])
    stem = seen["net"].conv1(x)                                    # what the first BatchNorm gets
    some = stem.mean((0, 2, 3))
    # 128 of the 300 images were learned from, and the means are of these.
    assert torch.allclose(seen["bn1.running_mean"], some, atol=.1 * stem.std().item())
    assert seen["bn1.num_batches_tracked"] == 1                    # none of training is left


def spread(z):
    """Standard deviation of unit embeddings times sqrt(D): 1 all around, 0 for a single point."""
    return F.normalize(z.detach().float(), dim=1).std(0).mean().item() * z.shape[1] ** .5


def spread_after(steps, variant, last_norm):
    """A small network trained on 512 shapes. variant: ours; or naive, both branches learn, without
    stop-gradient, moving average and predictor. last_norm: the BatchNorm at the projector's end."""
    torch.manual_seed(0)
    data = common.load_dataset("shapes", image_size=16)
    images, statistics = data.train.images[:512], common.pixel_statistics(data.train.images)
    online = mask_mix.Network(common.resnet18(16, 8, 2), 64, hidden=128, dim=32)
    if not last_norm:
        online.projector = online.projector[:-1]
    target, settings = target_of(online), args(crop=.4, jitter=1., gray=.2)
    make = mask_mix.make_views(settings, statistics)
    optimizer = torch.optim.SGD(online.parameters(), .06, momentum=.9, fused=True)
    index, device = torch.arange(512), torch.device("cpu")
    done, noise = 0, rng()
    while done < steps:
        for _, x1, x2, u1, u2, lam in common.batches(images, index, 64, make, noise, device):
            v = torch.cat([x1, x2])
            if variant == "ours":
                loss, _ = mask_mix.losses(online, target, v, torch.cat([u1, u2]), lam, settings)
            else:
                loss = mask_mix.regression_loss(*online(v).chunk(2))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            mask_mix.ema_update(target, online, 1 - .01 * common.cosine_lr(done, steps))
            done += 1
    return spread(online(v))


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

SMALL = "--image-size 16 --train-size 128 --width 16 --batch-size 32 --device cpu".split()


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", "--mask-share 0 --mix-weight 0", "--mask-share 1"])
def test_a_run_leaves_its_scores_and_pictures(tmp_path, flags, few_shapes):
    run = tmp_path / "run"
    mask_mix.main([*SMALL, "--epochs", "1", "--out", str(run), *flags.split()])
    left = {f.name for f in run.iterdir()}
    assert {"views.png", "mixing.png", "prototypes.png", "confusion.png", "clusters.csv"} <= left
    table = json.loads((run / "result.json").read_text())["scores"]
    for name in ("raw pixels", "random network", "mask_mix"):
        assert all(0 <= table[name][k] <= 1 for k in ("knn", "knn_erased", "knn_erased_otherwise"))


def test_test_images_are_erased_as_in_training_and_with_another_grid_share_and_fill(
        monkeypatch, few_shapes):
    data = common.load_dataset("shapes")
    calls, mask = [], mask_mix.random_mask
    monkeypatch.setattr(mask_mix, "random_mask",
                        lambda *a, **k: calls.append((a, k)) or mask(*a, **k))
    statistics = common.pixel_statistics(data.train.images)
    list(mask_mix.erased_knn(nn.Flatten(), data, statistics, args(), torch.device("cpu")))
    (_, ratio, cells, _), fill = calls[0][0], calls[0][1]["fill"]
    assert (ratio, cells) == (args().mask_ratio, args().mask_grid)
    assert torch.equal(fill, 255 * statistics[0])
    (_, ratio, cells, _), fill = calls[1][0], calls[1][1]["fill"]
    assert ratio != args().mask_ratio and cells != args().mask_grid
    assert len(fill.flatten(1).unique(dim=0)) > 50                 # a colour for each image


@pytest.mark.slow
def test_the_default_run_starts_and_sees_through_masks(tmp_path, two_threads):
    mask_mix.main(["--device", "cpu", "--out", str(tmp_path / "run")])
    scores = json.loads((tmp_path / "run/result.json").read_text())["scores"]
    untrained, ours = scores["random network"], scores["mask_mix"]
    assert ours["knn"] > .85 > untrained["knn"] and ours["linear"] > untrained["linear"] + .15
    assert ours["knn_erased"] > .8 > untrained["knn_erased"]
    last = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])
    assert last["byol"] < .7 * last["constant"]


def test_the_number_of_erased_cells_is_rounded():
    x = torch.ones(20, 1, 16, 16)                                  # .15 of 64 cells: 9.6
    erased = mask_mix.random_mask(x, .15, 8, rng()) == 0
    assert (erased.sum((1, 2, 3)) == 10 * 4).all()


def test_each_masked_view_is_one_of_its_own_complete_view():
    statistics = torch.full((1, 3, 1, 1), .5), torch.full((1, 3, 1, 1), .25)
    args = mask_mix.parse(["--mask-share=1", "--mask-ratio=.3"])
    x = torch.rand(50, 3, 16, 16, generator=rng())
    x1, x2, u1, u2, _ = mask_mix.make_views(args, statistics)(x, rng())
    assert not torch.equal(x1, x2)
    for x, u in ((x1, u1), (x2, u2)):
        assert ((u == x) | (u == 0)).all() and not torch.equal(u, x)


def test_a_mask_that_would_erase_no_cell_is_refused(capsys):
    for flags in (["--mask-ratio=.007"], ["--mask-grid=1"], ["--mask-grid=4", "--mask-ratio=.03"]):
        with pytest.raises(SystemExit, match="^2$"):
            mask_mix.parse(flags)
        assert "erases none" in capsys.readouterr().err
    assert mask_mix.parse(["--mask-ratio", "0"]).mask_ratio == 0   # asked for in so many words
    assert mask_mix.parse(["--mask-grid", "1", "--mask-share", "0"]).mask_grid == 1
