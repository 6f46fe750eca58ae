"""identitize.py: the mathematics of its loss, what the loss prevents, that the script learns."""
import inspect
import json
import math

import pytest
import torch
import torch.nn.functional as F

import common
import identitize
from identitize import (cross_correlation, draw_matrix, identitization_loss, long_tail, losses,
                        mean_correlation, rms_off_diagonal, sinkhorn, standardise,
                        swapped_assignment_loss)

# 16 is the smallest width (see test_faults.py).
TINY = ["--width", "16", "--batch-size", "32", "--clusters-head", "16", "--device", "cpu"]


def scores(b=12, k=5, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(b, k, generator=g, dtype=dtype) for _ in range(2)]


def standardised(*args, **kwargs):
    return [standardise(s) for s in scores(*args, **kwargs)]


def loss_of(s1, s2, lam=.1):
    return identitization_loss(mean_correlation(standardise(s1), standardise(s2)), lam)


# The matrices

def test_standardise_makes_mean_zero_and_variance_one():
    n = standardise(scores(b=400)[0] * 3 + 7)
    assert torch.allclose(n.mean(0), torch.zeros(5).double(), atol=1e-12)
    assert torch.allclose(n.var(0, unbiased=False), torch.ones(5).double(), atol=1e-4)


def test_standardise_is_float32_also_for_bfloat16_scores_and_under_autocast():
    s = scores(b=64, dtype=torch.float32)[0] + 50  # in bfloat16, numbers near 50 are .25 apart
    with torch.autocast("cpu", torch.bfloat16):
        inside = standardise(s)
        assert standardise(s.bfloat16()).dtype == torch.float32
    assert torch.equal(inside, standardise(s))
    assert torch.allclose(standardise(s).double(), standardise(s.double()), atol=1e-4)


def test_the_scores_of_the_head_are_float32_under_autocast():
    net = identitize.Network(torch.nn.Flatten(), 12, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(torch.randn(4, 3, 2, 2)).dtype == torch.float32


def test_cross_correlation_equals_the_double_loop_over_raw_scores():
    s1, s2 = scores()
    b, k = s1.shape
    c = cross_correlation(standardise(s1), standardise(s2))
    for i in range(k):
        for j in range(k):
            x, y = s1[:, i].tolist(), s2[:, j].tolist()
            mx, my = sum(x) / b, sum(y) / b
            vx, vy = sum((a - mx) ** 2 for a in x) / b, sum((a - my) ** 2 for a in y) / b
            total = sum((p - mx) * (q - my) for p, q in zip(x, y)) / b
            expected = total / math.sqrt((vx + 1e-5) * (vy + 1e-5))
            assert math.isclose(c[i, j], expected, abs_tol=1e-12)


def test_mean_correlation_equals_the_printed_sum():
    n1, n2 = standardised()
    m = mean_correlation(n1, n2)
    for i in range(5):
        for j in range(5):
            expected = sum((n1[b, i] + n2[b, i]) / 2 * (n1[b, j] + n2[b, j]) / 2
                           for b in range(12)) / 12
            assert math.isclose(m[i, j], expected, abs_tol=1e-12)


def test_m_is_the_mean_of_the_four_correlations_of_two_views():
    views = standardised()
    four = [cross_correlation(a, b) for a in views for b in views]
    assert torch.allclose(mean_correlation(*views), sum(four) / 4)


def test_m_is_symmetric_and_has_no_eigenvalue_below_zero():
    for seed in range(5):
        m = mean_correlation(*standardised(b=6, k=9, seed=seed))
        assert torch.allclose(m, m.t(), atol=1e-15)
        assert torch.linalg.eigvalsh(m).min() > -1e-12


def test_the_diagonal_of_m_is_half_of_one_plus_that_of_c():
    n1, n2 = standardised(b=200)
    expected = (1 + cross_correlation(n1, n2).diagonal()) / 2
    assert torch.allclose(mean_correlation(n1, n2).diagonal(), expected, atol=1e-4)  # eps 1e-5


def test_m_and_the_products_of_images_have_the_same_eigenvalues():
    # M is n' n / B over clusters, n n' / B is over images: what spreads clusters spreads images.
    n1, n2 = standardised(b=6, k=4)
    n = (n1 + n2) / 2
    images = torch.linalg.eigvalsh(n @ n.t() / 6)
    assert torch.allclose(images[-4:], torch.linalg.eigvalsh(mean_correlation(n1, n2)))


def test_both_matrices_ignore_shift_and_scale_of_every_cluster():
    s1, s2 = scores(b=200)
    g = torch.Generator().manual_seed(1)
    shift = torch.randn(5, generator=g).double() * 10
    moved = s1 * (torch.rand(5, generator=g).double() + .5) + shift
    for matrix in (cross_correlation, mean_correlation):
        before = matrix(standardise(s1), standardise(s2))
        assert torch.allclose(matrix(standardise(moved), standardise(s2)), before, atol=1e-4)


def test_permuting_the_clusters_permutes_the_matrices_and_keeps_the_loss():
    n1, n2 = standardised()
    order = torch.tensor([3, 0, 4, 1, 2])
    for matrix in (cross_correlation, mean_correlation):
        m, permuted = matrix(n1, n2), matrix(n1[:, order], n2[:, order])
        assert torch.allclose(permuted, m[order][:, order])
        assert torch.allclose(identitization_loss(permuted, .1), identitization_loss(m, .1))


def test_swapping_the_views_transposes_c_and_changes_neither_m_nor_a_loss():
    n1, n2 = standardised()
    assert torch.allclose(cross_correlation(n2, n1), cross_correlation(n1, n2).t())
    assert torch.allclose(mean_correlation(n2, n1), mean_correlation(n1, n2))
    assert torch.allclose(identitization_loss(cross_correlation(n2, n1), .1),
                          identitization_loss(cross_correlation(n1, n2), .1))
    assert torch.allclose(swapped_assignment_loss(n2, n1), swapped_assignment_loss(n1, n2))


def test_shuffling_the_images_changes_nothing():
    s1, s2 = scores()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(loss_of(s1[order], s2[order]), loss_of(s1, s2))


def test_a_small_batch_bounds_the_rank_and_keeps_the_identity_out_of_reach():
    for matrix in (cross_correlation, mean_correlation):
        m = matrix(*standardised(b=4, k=9))        # of rank B - 1 = 3: the columns are centred
        assert torch.linalg.matrix_rank(m) <= 3
        # The nearest matrix of rank 3 to the identity of size 9 misses 9 - 3 unit eigenvalues.
        assert (m - torch.eye(9)).square().sum() >= 9 - 3


@pytest.mark.parametrize("matrix", [cross_correlation, mean_correlation])
def test_the_matrices_are_float32_under_autocast(matrix):
    n1, n2 = standardised(b=64, k=32, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = matrix(n1, n2)
    assert inside.dtype == torch.float32 and torch.equal(inside, matrix(n1, n2))


# Why M and not C: two views that have nothing in common, and two clusters that copy each other.
#   view 1 scores the four images (1, 1, -1, -1), view 2 (1, -1, 1, -1), both clusters alike.
#   C = 0 everywhere. n = (1, 0, 0, -1), so every entry of M is (1 + 0 + 0 + 1) / 4 = 1/2.

def copied_clusters():
    first, second = torch.tensor([1., 1, -1, -1]), torch.tensor([1., -1, 1, -1])
    return [x.double()[:, None].expand(4, 2) for x in (first, second)]


def test_copied_clusters_look_uncorrelated_on_c_where_the_views_disagree_but_not_on_m():
    n1, n2 = copied_clusters()
    assert torch.equal(cross_correlation(n1, n2), torch.zeros(2, 2).double())
    assert torch.equal(mean_correlation(n1, n2), torch.full((2, 2), .5).double())


def test_decorrelation_pushes_copied_clusters_apart_on_m_and_is_blind_to_them_on_c():
    for matrix, blind in ((cross_correlation, True), (mean_correlation, False)):
        n = [x.clone().requires_grad_() for x in copied_clusters()]
        m = matrix(*n)
        (identitization_loss(m, 1.) - identitization_loss(m, 0.)).backward()
        assert (n[0].grad.abs().max() < 1e-12) == blind


# The loss

def test_the_loss_equals_the_printed_sum():
    m = mean_correlation(*standardised())
    expected = sum(1 - m[i, i] for i in range(5)) / 5 + .03 / 5 * sum(
        m[i, j] ** 2 for i in range(5) for j in range(5) if i != j)
    assert torch.allclose(identitization_loss(m, .03), expected)


def test_the_loss_is_0_at_the_identity_1_at_zero_and_lam_times_k_minus_1_for_copies():
    assert identitization_loss(torch.eye(7), .5) == 0
    assert identitization_loss(torch.zeros(7, 7), .5) == 1
    assert identitization_loss(torch.ones(7, 7), .5) == .5 * (7 - 1)


def test_the_loss_is_above_zero_everywhere_but_at_the_identity():
    for seed in range(20):
        s1, s2 = scores(b=40, k=7, seed=seed)
        assert loss_of(s1, s1) > 0 and loss_of(s1, s2) > 0


def test_uncorrelated_clusters_on_which_the_views_agree_reach_zero():
    # Columns of a Hadamard matrix: mean 0, variance 1, no two correlated. eps is all that is left.
    h = torch.tensor([[1., 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]).double()
    assert loss_of(h, h, 1.) == pytest.approx(0, abs=2e-5)


def test_one_minus_the_diagonal_is_a_quarter_of_the_squared_difference_of_the_views():
    n1, n2 = standardised(b=500)
    quarter = (n1 - n2).square().mean() / 4
    loss = identitization_loss(mean_correlation(n1, n2), 0.)
    assert math.isclose(loss, quarter, rel_tol=1e-4)


def test_disagreement_and_copies_both_raise_the_loss():
    s1, s2 = scores(b=4000)
    copies = s1[:, :1] + .1 * s1                   # every cluster nearly the first
    assert loss_of(s1, s1) < loss_of(s1, s1 + s2) < loss_of(s1, s2)
    assert loss_of(s1, s1) < loss_of(copies, copies)


def test_equal_scores_for_all_images_cost_one_and_no_nan():
    constant = torch.full((8, 5), 3.)
    assert loss_of(constant, constant) == 1


@pytest.mark.parametrize("matrix", [cross_correlation, mean_correlation])
def test_gradients_are_those_of_finite_differences(matrix):
    def loss(s1, s2):
        return identitization_loss(matrix(standardise(s1), standardise(s2)), .1)
    assert torch.autograd.gradcheck(loss, [s.requires_grad_() for s in scores(b=6, k=3)])


@pytest.mark.parametrize("size", [1e4, -1e4, 1e-12])
def test_losses_and_gradients_stay_finite_at_extreme_scores(size):
    s1, s2 = (s.mul(size).requires_grad_() for s in scores(dtype=torch.float32))
    total = loss_of(s1, s2) + swapped_assignment_loss(s1, s2)
    total.backward()
    assert total.isfinite() and s1.grad.isfinite().all() and s2.grad.isfinite().all()


# The swap

def test_the_swap_equals_the_printed_sum():
    s1, s2 = scores(b=3, k=4)
    p1, p2 = s1.softmax(1), s2.softmax(1)
    expected = -sum(p2[b, k] * p1[b, k].log() + p1[b, k] * p2[b, k].log()
                    for b in range(3) for k in range(4)) / 6
    assert torch.allclose(swapped_assignment_loss(s1, s2), expected)


def test_the_swap_is_ln_k_for_uniform_and_0_for_equal_one_hot_assignments():
    zero, sure = torch.zeros(5, 8), 1e4 * torch.eye(8)
    assert math.isclose(swapped_assignment_loss(zero, zero), math.log(8), rel_tol=1e-6)
    assert swapped_assignment_loss(sure, sure) == 0


def test_the_targets_of_the_swap_get_no_gradient():
    s1, s2 = (s.requires_grad_() for s in scores())
    gradient, = torch.autograd.grad(swapped_assignment_loss(s1, s2), s1)
    # d/ds of cross-entropy with a constant target q is (p - q) / B; half of it, of two terms
    expected = (s1.softmax(1) - s2.softmax(1)) / len(s1) / 2
    assert torch.allclose(gradient, expected.detach())


def test_the_swap_on_raw_scores_rewards_one_cluster_for_all_and_no_matrix_sees_it():
    # A constant added to one cluster puts every image there. M does not change, the swap on raw
    # scores falls to nearly 0, and the swap on standardised scores is untouched.
    s1, s2 = scores(b=50)
    moved1, moved2 = (s + torch.tensor([20., 0, 0, 0, 0]).double() for s in (s1, s2))
    assert (moved1.argmax(1) == 0).all()
    assert torch.allclose(loss_of(moved1, moved2), loss_of(s1, s2))
    assert swapped_assignment_loss(moved1, moved2) < .01 * swapped_assignment_loss(s1, s2)
    assert torch.allclose(swapped_assignment_loss(standardise(moved1), standardise(moved2)),
                          swapped_assignment_loss(standardise(s1), standardise(s2)))


# The rival

def test_sinkhorn_targets_give_equal_mass_to_all_clusters():
    # As on shapes: a batch of 32, cosines, epsilon .01. Half of the images are near one prototype.
    rng = torch.Generator().manual_seed(0)
    prototypes = F.normalize(torch.randn(16, 128, generator=rng), dim=1)
    near = prototypes[torch.arange(32) % 16 * (torch.arange(32) >= 16)]
    z = F.normalize(near + .1 * torch.randn(32, 128, generator=rng), dim=1)
    q = sinkhorn(z @ prototypes.t(), epsilon=.01, iterations=100)
    assert torch.allclose(q.sum(1), torch.ones(32), atol=1e-5)
    assert torch.allclose(q.sum(0), torch.full((16,), 32 / 16), rtol=.1)


def test_sinkhorn_equals_alternating_normalisation_of_the_exponential():
    s = scores(b=8, k=3)[0].float() * .05
    q = (s / .05).exp()
    for _ in range(3):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdim=True)
    assert torch.allclose(sinkhorn(s), q, atol=1e-6)


# What a step puts together

def losses_of(*flags, seed=0):
    args = identitize.parse(["--clusters-head", "5", *flags])
    return losses(*scores(dtype=torch.float32, seed=seed), args)


def test_the_whole_loss_is_the_weighted_sum_of_its_terms():
    total, terms, _ = losses_of("--mu", ".3", "--swap-weight", "7")
    assert torch.allclose(total, .3 * terms["identity"] + 7 * terms["swap"])


def test_the_default_trains_m_and_between_trains_c():
    n1, n2 = standardised(dtype=torch.float32)
    for flag, matrix in (("both", mean_correlation), ("between", cross_correlation)):
        _, terms, _ = losses_of("--correlate", flag, "--lam", ".2")
        assert torch.allclose(terms["identity"], identitization_loss(matrix(n1, n2), .2))


def test_the_printed_gauges_are_those_of_c():
    c = cross_correlation(*standardised(dtype=torch.float32))
    _, terms, _ = losses_of()
    others = [c[i, j] ** 2 for i in range(5) for j in range(5) if i != j]
    assert torch.allclose(terms["diagonal"], c.diagonal().mean())
    assert torch.allclose(terms["off_diagonal"], (sum(others) / 20).sqrt())


def test_the_terms_of_the_rival_are_named_after_it():
    assert set(losses_of("--targets", "sinkhorn")[1]) >= {"sinkhorn", "swap"}


@pytest.mark.parametrize("function, arguments", [
    (standardise, scores()[:1]), (cross_correlation, scores()), (mean_correlation, scores()),
    (identitization_loss, (torch.eye(3), .1)), (swapped_assignment_loss, scores()),
    (sinkhorn, scores()[:1])], ids=lambda value: getattr(value, "__name__", ""))
def test_every_loss_runs_when_pasted_alone(function, arguments):
    space = {"torch": torch, "F": F, "math": math}
    exec(inspect.getsource(function), space)
    assert torch.equal(space[function.__name__](*arguments), function(*arguments))


# The picture

def test_the_picture_of_m_puts_copies_side_by_side(monkeypatch):
    shown = []
    monkeypatch.setattr(identitize, "heatmap", lambda m, **words: shown.append((m, words)))
    groups = torch.tensor([0, 1, 0, 1, 0])         # clusters 0, 2, 4 copy each other; so do 1, 3
    draw_matrix((groups[:, None] == groups).float(), "6")
    (m, words), = shown
    sizes = [2, 3] if m[0, 2] == 0 else [3, 2]
    assert torch.equal(m, torch.block_diag(*(torch.ones(s, s) for s in sizes)))
    # 8 of the 20 entries beside the diagonal are 1: their root mean square is sqrt(.4) = .63
    assert "diagonal 1.00" in words["title"] and "elsewhere 0.63" in words["title"]


def test_the_root_mean_square_leaves_out_the_diagonal():
    assert rms_off_diagonal(torch.tensor([[9., 3], [4, 9]])) == math.sqrt((9 + 16) / 2)


def test_the_root_mean_square_stays_a_number_beside_a_far_larger_diagonal():
    rng = torch.Generator().manual_seed(0)
    for k in (3, 5, 15):
        for _ in range(100):
            m = torch.rand(k, generator=rng).diag() + 1e-5 * (1 - torch.eye(k))
            assert rms_off_diagonal(m).item() == pytest.approx(1e-5, rel=1e-4)


# The long tail

@pytest.mark.parametrize("classes, each, ratio, total", [
    (10, 5000, 10, 20431), (10, 5000, 50, 13996), (10, 5000, 100, 12406), (100, 500, 100, 10847)])
def test_the_long_tail_has_the_published_sizes_of_cifar(classes, each, ratio, total):
    labels = torch.arange(classes).repeat_interleave(each)
    index = long_tail(labels, ratio, seed=0)
    assert len(index) == total == len(index.unique())
    counts = torch.bincount(labels[index])
    assert counts[0] == each and counts[-1] == each // ratio


def test_the_long_tail_passes_over_a_class_without_images():
    labels = torch.tensor([0] * 50 + [2] * 50 + [3] * 2)
    counts = torch.bincount(labels[long_tail(labels, 2, seed=0)])
    assert counts.tolist() == [50, 0, 31, 2]       # 50 / 2^(2/3) = 31.5; class 3 has only two


# The script

def run(folder, *flags):
    """A tiny run. -> its result.json, which must be valid JSON, without NaN"""
    identitize.main([*TINY, *flags, "--out", str(folder)])

    def refuse(word):
        raise ValueError(word)
    return json.loads((folder / "result.json").read_text(), parse_constant=refuse)


@pytest.fixture
def short_report(monkeypatch, few_shapes):
    """Runs on 300 shapes whose report leaves out the baselines: they take most of its time."""
    monkeypatch.setattr(identitize, "baselines", lambda *arguments: {})


def test_a_run_leaves_everything_it_promises(tmp_path, few_shapes):
    result = run(tmp_path / "run", "--epochs", "1")
    left = {f.name for f in (tmp_path / "run").iterdir()}
    assert left >= {"log.jsonl", "checkpoint.pt", "backbone.pt", "result.json", "clusters.csv",
                    "views.png", "prototypes.png", "confusion.png", "correlation.png"}
    assert set(result["scores"]) == {"raw pixels", "random network", "identitize"}


@pytest.mark.parametrize("flags", [
    ["--correlate", "between"], ["--targets", "sinkhorn", "--swap-weight", "0"],
    ["--clusters-head", "2"]], ids=" ".join)
def test_the_other_readings_run_too(flags, tmp_path, short_report):
    assert run(tmp_path / "run", "--epochs", "1", *flags)["scores"]["identitize"]["knn"] > 0


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(tmp_path, monkeypatch,
                                                                 short_report):
    monkeypatch.setattr(common.Run, "INTERVAL", 0)                 # a checkpoint after each epoch
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, "--epochs", "3")
    steps = []

    def interrupted(*arguments):                   # Ctrl-C in the last of three epochs
        steps.append(1)
        if len(steps) == 2 * 9 + 3:                # 300 images // 32 = 9 steps an epoch
            raise KeyboardInterrupt
        return losses(*arguments)
    monkeypatch.setattr(identitize, "losses", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(parts, "--epochs", "3")
    assert stop.value.code == 130
    monkeypatch.setattr(identitize, "losses", losses)
    run(parts, "--epochs", "3", "--resume")
    a, b = (common.load_checked(folder / "checkpoint.pt")["state"] for folder in (whole, parts))
    assert str(a) == str(b) and a["matrices"].keys() == {"0", "1", "3"}
    for part in ("net", "matrices"):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    logs = [[json.loads(line) for line in open(folder / "log.jsonl")] for folder in (whole, parts)]
    for log in logs:
        for record in log:                         # all but the stopwatch must be equal
            del record["seconds"], record["images_per_second"]
    assert logs[0] == logs[1] and len(logs[0]) == 3
    assert (whole / "clusters.csv").read_bytes() == (parts / "clusters.csv").read_bytes()


def test_labels_never_reach_the_training(tmp_path, monkeypatch, short_report):
    run(tmp_path / "true", "--epochs", "1")
    real = identitize.prepare

    def shuffled(*arguments):                      # the same images, their labels in another order
        device, data, index, clusters = real(*arguments)
        order = torch.randperm(300, generator=torch.Generator().manual_seed(3))
        train = data.train._replace(labels=data.train.labels[order])
        return device, data._replace(train=train), index, clusters
    monkeypatch.setattr(identitize, "prepare", shuffled)
    run(tmp_path / "shuffled", "--epochs", "1")
    a, b = ((tmp_path / name / "backbone.pt") for name in ("true", "shuffled"))
    a, b = common.load_checked(a), common.load_checked(b)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("missing", ["train", "test"])
def test_a_long_tail_reports_also_where_a_class_has_no_image_in_a_split(
        missing, tmp_path, monkeypatch, short_report):
    real = identitize.prepare

    def without_a_class(*arguments):
        device, data, index, clusters = real(*arguments)
        split = getattr(data, missing)
        keep = split.labels != 9
        split = common.Split(split.images[keep], split.labels[keep],
                             [name for name, k in zip(split.names, keep) if k])
        return device, data._replace(**{missing: split}), index, clusters
    monkeypatch.setattr(identitize, "prepare", without_a_class)
    result = run(tmp_path / "run", "--epochs", "1", "--imbalance", "4")
    assert result["scores"]["identitize"]["knn"] > 0


def test_a_tail_that_leaves_too_few_images_is_refused_before_anything_is_written(
        tmp_path, capsys, few_shapes):
    with pytest.raises(SystemExit, match="^2$"):
        run(tmp_path / "run", "--imbalance", "100", "--batch-size", "128")
    assert "--imbalance leaves 72 images" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# Collapse

@pytest.mark.slow
@pytest.mark.parametrize("flags, collapses", [(["--mu", "0"], True), ([], False)])
def test_the_swap_alone_collapses_and_the_identity_prevents_it(flags, collapses, tmp_path, capsys,
                                                               short_report):
    # Alike but for L_id. Alone, the swap lets the scores shrink until all assignments are uniform.
    run(tmp_path / "run", "--epochs", "50", *flags)
    assert ("WARNING: collapse" in capsys.readouterr().out) == collapses


def test_two_clusters_are_no_collapse(tmp_path, capsys, short_report):
    # One of two clusters always holds half of the images or more.
    run(tmp_path / "run", "--epochs", "2", "--clusters-head", "2")
    assert "WARNING" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_default_run_learns_what_pixels_and_a_random_network_do_not_show(
        tmp_path, two_threads):
    # Half of the default's epochs.
    identitize.main(["--epochs", "6", "--device", "cpu", "--out", str(tmp_path / "run")])
    found = json.loads((tmp_path / "run/result.json").read_text())["scores"]
    pixels, untrained, ours = (found[k] for k in ("raw pixels", "random network", "identitize"))
    assert ours["kmeans"]["acc"] > max(pixels["kmeans"]["acc"], untrained["kmeans"]["acc"]) + .4
    assert ours["knn"] > max(pixels["knn"], untrained["knn"]) + .15
    assert ours["linear"] > untrained["linear"] + .25


def test_the_rival_has_no_swapped_assignments(capsys):
    assert identitize.parse(["--targets", "sinkhorn"]).swap_weight == 0
    with pytest.raises(SystemExit, match="^2$"):
        identitize.parse(["--targets", "sinkhorn", "--swap-weight", ".1"])
    assert "leave out --swap-weight" in capsys.readouterr().err


@pytest.mark.parametrize("n, shown", [(6000, 2000), (300, 300)])
def test_the_matrix_for_the_picture_is_of_images_of_all_classes(n, shown, monkeypatch):
    seen = []

    def batches(images, index, *_):
        seen.append(index)
        raise KeyboardInterrupt
    monkeypatch.setattr(identitize, "batches", batches)
    with pytest.raises(KeyboardInterrupt):
        identitize.matrix_now(torch.nn.Identity(), None, torch.arange(n), None,
                              identitize.parse([]), None)
    index, = seen
    assert len(index.unique()) == shown
    assert set((index % 10).tolist()) == set(range(10))            # shapes come in the order 0 to 9
