"""identitize.py: the mathematics of its loss, and that it learns."""
import inspect
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import common
import identitize
from identitize import (assignment_correlation, cross_correlation, identitization_cross_entropy,
                        identitization_log_det, identitization_loss, sinkhorn, standardise,
                        swapped_assignment_loss)

TINY = ["--train-size", "200", "--width", "4", "--batch-size", "32", "--clusters-head", "16",
        "--device", "cpu"]


def scores(b=12, k=5, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(b, k, generator=g, dtype=dtype) for _ in range(2)]


def mean_matrix(s1, s2):
    """M of the docstring: the mean of the four correlations of and between two views"""
    return sum(cross_correlation(a, b) for a in (s1, s2) for b in (s1, s2)) / 4


def log_det(s1, s2, epsilon):
    return identitization_log_det(standardise(s1), standardise(s2), epsilon)


# The matrix

def test_cross_correlation_equals_the_double_loop():
    s1, s2 = scores()
    b, k = s1.shape
    c = cross_correlation(s1, s2)
    for i in range(k):
        for j in range(k):
            a, d = s1[:, i], s2[:, j]
            ma, md = sum(a) / b, sum(d) / b
            va, vd = sum((x - ma) ** 2 for x in a) / b, sum((x - md) ** 2 for x in d) / b
            total = sum((x - ma) * (y - md) for x, y in zip(a, d)) / b
            expected = total / math.sqrt((va + 1e-5) * (vd + 1e-5))
            assert math.isclose(c[i, j], expected, abs_tol=1e-12)


def test_identical_views_have_a_diagonal_of_one():
    s, _ = scores()
    # the eps of 1e-5 under the root is all that is missing
    diagonal = cross_correlation(s, s).diagonal()
    assert torch.allclose(diagonal, torch.ones(5, dtype=s.dtype), atol=1e-4)


def test_cross_correlation_ignores_shift_and_scale_of_every_cluster():
    s1, s2 = scores(b=200)
    shift, scale = torch.randn(5).double() * 10, torch.rand(5).double() + .5
    moved = cross_correlation(s1 * scale + shift, s2)
    assert torch.allclose(moved, cross_correlation(s1, s2), atol=1e-4)


def test_permuting_the_clusters_permutes_the_matrix_and_keeps_the_losses():
    s1, s2 = scores()
    order = torch.tensor([3, 0, 4, 1, 2])
    c, permuted = cross_correlation(s1, s2), cross_correlation(s1[:, order], s2[:, order])
    assert torch.allclose(permuted, c[order][:, order])
    assert torch.allclose(identitization_loss(permuted, .1), identitization_loss(c, .1))
    assert torch.allclose(identitization_cross_entropy(permuted, .2),
                          identitization_cross_entropy(c, .2))
    assert torch.allclose(log_det(s1[:, order], s2[:, order], .2), log_det(s1, s2, .2))


def test_swapping_the_views_transposes_the_matrix_and_keeps_the_losses():
    s1, s2 = scores()
    c, swapped = cross_correlation(s1, s2), cross_correlation(s2, s1)
    assert torch.allclose(swapped, c.t())
    assert torch.allclose(identitization_loss(swapped, .1), identitization_loss(c, .1))
    assert torch.allclose(identitization_cross_entropy(swapped, .2),
                          identitization_cross_entropy(c, .2))
    assert torch.allclose(swapped_assignment_loss(s1, s2, 1), swapped_assignment_loss(s2, s1, 1))


def test_a_small_batch_bounds_the_rank_and_keeps_the_identity_out_of_reach():
    s1, s2 = scores(b=4, k=9)
    c = cross_correlation(s1, s2)                  # of rank B - 1 = 3: the columns are centred
    assert torch.linalg.matrix_rank(c) <= 3
    # the nearest matrix of rank 3 to the identity of size 9 misses 9 - 3 unit eigenvalues
    assert (c - torch.eye(9)).square().sum() >= 9 - 3


def test_the_matrix_stays_float32_inside_autocast():
    s1, s2 = scores(b=64, k=32, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = cross_correlation(s1, s2)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, cross_correlation(s1, s2))


def test_the_log_det_is_the_same_inside_autocast():
    n1, n2 = (standardise(s) for s in scores(b=64, k=32, dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        inside = identitization_log_det(n1, n2, .1)
    assert torch.equal(inside, identitization_log_det(n1, n2, .1))


# The losses

def test_square_loss_equals_the_printed_sum():
    c = cross_correlation(*scores())
    expected = sum((1 - c[i, i]) ** 2 for i in range(5)) + .03 * sum(
        c[i, j] ** 2 for i in range(5) for j in range(5) if i != j)
    assert torch.allclose(identitization_loss(c, .03), expected)


def test_square_loss_is_zero_at_the_identity_and_k_at_the_zero_matrix():
    assert identitization_loss(torch.eye(7), .5) == 0
    assert identitization_loss(torch.zeros(7, 7), .5) == 7


def test_cross_entropy_equals_the_printed_sum_over_rows_and_columns():
    c, t = cross_correlation(*scores()), .3
    e = [[math.exp(c[i, j] / t) for j in range(5)] for i in range(5)]
    rows = sum(-math.log(e[i][i] / sum(e[i][j] for j in range(5))) for i in range(5)) / 5
    columns = sum(-math.log(e[i][i] / sum(e[j][i] for j in range(5))) for i in range(5)) / 5
    loss = identitization_cross_entropy(c, t)
    assert math.isclose(loss, (rows + columns) / 2, rel_tol=1e-12)


def test_cross_entropy_at_the_identity_and_at_zero_has_the_stated_values():
    k, t = 6, .25
    at_identity = identitization_cross_entropy(torch.eye(k).double(), t)
    at_zero = identitization_cross_entropy(torch.zeros(k, k).double(), t)
    assert math.isclose(at_identity, math.log(1 + (k - 1) * math.exp(-1 / t)), rel_tol=1e-12)
    assert math.isclose(at_zero, math.log(k), rel_tol=1e-12)


def test_log_det_loss_equals_the_logarithms_of_the_eigenvalues_of_the_mean_matrix():
    s1, s2 = scores(k=4)
    eigenvalues = torch.linalg.eigvalsh(mean_matrix(s1, s2))
    expected = -1.3 / 4 * sum(math.log((v + .3) / 1.3) for v in eigenvalues)
    assert math.isclose(log_det(s1, s2, .3), expected, rel_tol=1e-12)


def test_log_det_loss_is_zero_at_the_identity_and_larger_everywhere_else():
    # the trace is K at most, and the mean of a logarithm is below the logarithm of the mean
    n = math.sqrt(7) * torch.eye(7)
    assert identitization_log_det(n, n, .1) == pytest.approx(0, abs=1e-6)
    for seed in range(20):
        s1, s2 = scores(b=40, k=7, seed=seed)
        for other in (s1, s2):                     # views that agree, that do not
            assert log_det(s1, other, .1) > 0


def test_agreeing_views_with_uncorrelated_clusters_lower_the_log_det():
    s1, s2 = scores(b=4000)
    same = s1[:, :1].expand(-1, 5) + .1 * s1       # every cluster nearly the first
    assert log_det(s1, s1, 1.) < log_det(s1, s1 + s2, 1.) < log_det(s1, s2, 1.)
    assert log_det(s1, s1, 1.) < log_det(same, same, 1.)


def test_a_large_epsilon_leaves_the_log_det_nothing_but_agreement():
    s1, s2 = scores(b=30)
    expected = 1 - mean_matrix(s1, s2).trace() / 5
    assert math.isclose(log_det(s1, s2, 1e6), expected, rel_tol=1e-4)


def test_with_fewer_images_than_clusters_the_log_det_stays_above_its_bound():
    # rank B - 1 = 3 of K = 9: the trace, at most 9, is shared by 3 eigenvalues at best
    bound = -1.1 / 9 * (3 * math.log((9 / 3 + .1) / 1.1) + 6 * math.log(.1 / 1.1))
    assert bound < log_det(*scores(b=4, k=9), .1) < math.inf


def test_swapped_loss_equals_the_printed_sum():
    s1, s2 = scores(b=3, k=4)
    p1, p2 = (s1 / .7).softmax(1), (s2 / .7).softmax(1)
    expected = -sum(p2[b, k] * p1[b, k].log() + p1[b, k] * p2[b, k].log()
                    for b in range(3) for k in range(4)) / 6
    assert torch.allclose(swapped_assignment_loss(s1, s2, .7), expected)


def test_swapped_loss_of_uniform_assignments_is_ln_k():
    zero = torch.zeros(5, 8)
    assert math.isclose(swapped_assignment_loss(zero, zero, 1), math.log(8), rel_tol=1e-6)


def test_swapped_targets_are_detached():
    s1, s2 = (s.requires_grad_() for s in scores())
    gradient, = torch.autograd.grad(swapped_assignment_loss(s1, s2, 1), s1)
    # d/ds of cross-entropy with a constant target q is (p - q) / B; half of it, of two terms
    expected = (s1.softmax(1) - s2.softmax(1)) / len(s1) / 2
    assert torch.allclose(gradient, expected.detach())


def test_the_swap_on_raw_scores_cannot_see_what_the_matrix_ignores():
    # The trap: a constant offset moves every image into one cluster. C does not change, the swap
    # loss on raw scores rewards it, and the same loss on standardised scores is untouched.
    s1, s2 = scores(b=50)
    offset = torch.tensor([20., 0, 0, 0, 0]).double()
    assert torch.allclose(cross_correlation(s1 + offset, s2 + offset), cross_correlation(s1, s2))
    assert ((s1 + offset).argmax(1) == 0).all()
    assert swapped_assignment_loss(s1 + offset, s2 + offset, 1) < .01 * swapped_assignment_loss(
        s1, s2, 1)
    n1, n2 = standardise(s1 + offset), standardise(s2 + offset)
    assert torch.allclose(swapped_assignment_loss(n1, n2, 1),
                          swapped_assignment_loss(standardise(s1), standardise(s2), 1))


@pytest.mark.parametrize("loss", [
    lambda a, b: identitization_loss(cross_correlation(a, b), .1),
    lambda a, b: identitization_cross_entropy(cross_correlation(a, b), .3),
    lambda a, b: log_det(a, b, .2),
    lambda a, b: identitization_loss(assignment_correlation(a.softmax(1), b.softmax(1)), .1)])
def test_gradients_are_those_of_finite_differences(loss):
    assert torch.autograd.gradcheck(loss, [s.requires_grad_() for s in scores(b=6, k=3)])


@pytest.mark.parametrize("size", [1e4, -1e4, 1e-12])
def test_losses_and_gradients_stay_finite_at_extreme_scores(size):
    s1, s2 = (s.mul(size).requires_grad_() for s in scores(dtype=torch.float32))
    c = cross_correlation(s1, s2)
    total = identitization_loss(c, .1) + identitization_cross_entropy(c, .25)
    total = total + log_det(s1, s2, 1e-4)
    total = total + swapped_assignment_loss(s1, s2, 1)
    total.backward()
    assert total.isfinite() and s1.grad.isfinite().all() and s2.grad.isfinite().all()


def test_standardise_makes_mean_zero_and_variance_one():
    n = standardise(scores(b=400)[0] * 3 + 7)
    assert torch.allclose(n.mean(0), torch.zeros(5).double(), atol=1e-12)
    assert torch.allclose(n.var(0, unbiased=False), torch.ones(5).double(), atol=1e-4)


# Reading A: why the others centre

def test_assignments_reach_the_identity_with_clusters_of_any_size():
    p = F.one_hot(torch.tensor([0] * 7 + [1] + [2])).double()           # sizes 7, 1, 1
    assert identitization_loss(assignment_correlation(p, p), 1.) == pytest.approx(0, abs=1e-12)


def test_uniform_assignments_cost_lam_times_k_times_k_minus_one():
    p = torch.full((10, 4), .25).double()                               # every entry of C is 1
    assert identitization_loss(assignment_correlation(p, p), .3) == pytest.approx(.3 * 4 * 3)


def test_one_garbage_cluster_costs_only_two_lam():
    # two equal columns: C is the identity but for C_01 = C_10 = 1
    p = torch.eye(4).double()
    p[:, 1] = p[:, 0]
    assert identitization_loss(assignment_correlation(p, p), .1) == pytest.approx(.1 * 2)


# The rival

def test_sinkhorn_targets_give_equal_mass_to_all_clusters():
    s = F.normalize(torch.randn(256, 16, generator=torch.Generator().manual_seed(0)), dim=1) * .3
    q = sinkhorn(s, epsilon=.05, iterations=50)
    assert torch.allclose(q.sum(1), torch.ones(256), atol=1e-5)
    assert torch.allclose(q.sum(0), torch.full((16,), 256 / 16), rtol=1e-2)


def test_sinkhorn_equals_alternating_normalisation_of_the_exponential():
    s = scores(b=8, k=3)[0].float() * .05
    q = (s / .05).exp()
    for _ in range(3):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdim=True)
    assert torch.allclose(sinkhorn(s), q, atol=1e-6)


# The script

@pytest.mark.parametrize("name", [
    "cross_correlation", "identitization_loss", "identitization_cross_entropy",
    "identitization_log_det", "swapped_assignment_loss", "standardise", "assignment_correlation",
    "sinkhorn"])
def test_every_loss_runs_when_pasted_alone(name):
    space = {"torch": torch, "F": F, "math": math}
    exec(inspect.getsource(getattr(identitize, name)), space)
    arguments = {"identitization_loss": (torch.eye(3), .1), "standardise": scores()[:1],
                 "identitization_cross_entropy": (torch.eye(3), .1), "sinkhorn": scores()[:1],
                 "identitization_log_det": (*scores(), .1),
                 "swapped_assignment_loss": (*scores(), 1.)}.get(name, scores())
    assert space[name](*arguments).isfinite().all()


def test_the_loss_that_the_readme_shows_is_that_of_the_script():
    readme = (Path(identitize.__file__).parent / "README.md").read_text()
    space, n = {"torch": torch}, [standardise(s) for s in scores()]
    exec(re.search(r"```python\n(def identitization_log_det.*?)```", readme, re.S)[1], space)
    assert torch.allclose(space["identitization_log_det"](*n, 2.), identitization_log_det(*n, 2.))


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(tmp_path, monkeypatch,
                                                                     few_shapes):
    command = [*TINY, "--epochs", "4", "--out"]
    identitize.main([*command, str(tmp_path / "whole")])
    real_step, steps = identitize.step, []

    def interrupted(*arguments):                   # Ctrl-C in the third of four epochs
        steps.append(1)
        if len(steps) == 2 * 6 + 3:                # 200 images // 32 = 6 steps an epoch
            raise KeyboardInterrupt
        real_step(*arguments)
    monkeypatch.setattr(identitize, "step", interrupted)
    with pytest.raises(SystemExit) as stop:
        identitize.main([*command, str(tmp_path / "parts")])
    assert stop.value.code == 130
    monkeypatch.setattr(identitize, "step", real_step)
    identitize.main([*command, str(tmp_path / "parts"), "--resume"])
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    a, b = (common.load_checked(run / "checkpoint.pt")["state"] for run in (whole, parts))
    assert str(a) == str(b) and all(torch.equal(a["net"][k], b["net"][k]) for k in a["net"])
    logs = [[json.loads(line) for line in open(run / "log.jsonl")] for run in (whole, parts)]
    for log in logs:
        for record in log:                         # all but the stopwatch must be equal
            for timing in ("seconds", "images_per_second", "views_share"):
                del record[timing]
    assert logs[0] == logs[1] and len(logs[0]) == 4
    assert (whole / "clusters.csv").read_bytes() == (parts / "clusters.csv").read_bytes()


def test_a_run_leaves_everything_it_promises(tmp_path, few_shapes):
    identitize.main([*TINY, "--epochs", "1", "--out", str(tmp_path / "run")])
    left = {f.name for f in (tmp_path / "run").iterdir()}
    assert left == {"log.jsonl", "checkpoint.pt", "backbone.pt", "result.json", "clusters.csv",
                    "views.png", "prototypes.png", "confusion.png", "correlation.png"}
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert set(result["scores"]) == {"raw pixels", "random network", "identitize",
                                     "identitize, its head"}
    assert set(result["protocol"]) == {"k-means", "kNN", "linear", "epoch"}


@pytest.mark.slow
@pytest.mark.parametrize("flags, collapses", [(["--mu", "0"], True), ([], False)])
def test_the_swap_alone_collapses_and_the_identity_prevents_it(flags, collapses, tmp_path, capsys,
                                                               few_shapes):
    # Alike but for L_id. Alone, the swap agrees on giving every image the same assignment.
    identitize.main([*TINY, "--epochs", "50", *flags, "--out", str(tmp_path / "run")])
    assert ("WARNING: collapse" in capsys.readouterr().out) == collapses


@pytest.mark.slow
def test_the_default_run_learns_what_pixels_and_a_random_network_do_not_show(
        tmp_path, two_threads):
    # Two thirds of the default's epochs.
    identitize.main(["--epochs", "8", "--device", "cpu", "--out", str(tmp_path / "run")])
    scores = json.loads((tmp_path / "run/result.json").read_text())["scores"]
    pixels, untrained, ours = (scores[k] for k in ("raw pixels", "random network", "identitize"))
    assert ours["kmeans"]["acc"] > max(pixels["kmeans"]["acc"], untrained["kmeans"]["acc"]) + .5
    assert ours["knn"] > max(pixels["knn"], untrained["knn"]) + .15
    assert ours["linear"] > untrained["linear"] + .35
