"""The evaluation: every metric against scikit-learn, a for-loop, or brute force."""
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch import nn

import common
from common import UserError, cluster_scores, kmeans, knn_accuracy, linear_probe

CPU = torch.device("cpu")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def noisy_labels(n, classes, clusters, seed):
    """Labels, and cluster ids that agree with them about half of the time."""
    r = np.random.default_rng(seed)
    labels = r.integers(0, classes, n)
    labels[:classes] = range(classes)                              # no class is empty
    ids = np.where(r.random(n) < .5, labels * 7 % clusters, r.integers(0, clusters, n))
    return labels, ids


def blobs(centres, per_blob, noise, dim=16, seed=0):
    """Points around random directions, one blob after the other. -> (features, labels)"""
    middle = torch.randn(centres, dim, generator=rng(seed)) * 3
    labels = torch.arange(centres).repeat_interleave(per_blob)
    return middle[labels] + noise * torch.randn(len(labels), dim, generator=rng(seed + 1)), labels


# ------------------------------------------------------------------------------------------------
# Scores of a clustering

@pytest.mark.parametrize("seed", range(5))
def test_accuracy_is_the_best_over_all_maps_of_clusters_to_classes(seed):
    labels, ids = noisy_labels(60, 5, 5, seed)
    best = max(np.mean(np.array(p)[ids] == labels) for p in itertools.permutations(range(5)))
    scores = cluster_scores(labels, ids)
    assert scores["acc"] == pytest.approx(best) and scores["rule"] == "hungarian"


@pytest.mark.parametrize("classes, clusters", [(5, 5), (5, 3), (5, 12), (2, 2), (1, 4), (4, 1)])
def test_nmi_and_ari_equal_scikit_learns(classes, clusters):
    labels, ids = noisy_labels(200, classes, clusters, 0)
    scores = cluster_scores(labels, ids)
    assert scores["nmi"] == pytest.approx(normalized_mutual_info_score(labels, ids), abs=1e-9)
    assert scores["ari"] == pytest.approx(adjusted_rand_score(labels, ids), abs=1e-9)


def test_scores_of_a_hand_made_example():
    # Clusters {a a b}, {b b c}, {c}: the map 0 -> a, 1 -> b, 2 -> c hits 2 + 2 + 1 = 5 of 7.
    # Pairs together in both: aa and bb = 2; in classes 1 + 3 + 1 = 5; in clusters 3 + 3 = 6; of 21.
    # ARI = (2 - 30/21) / (5.5 - 30/21) = (12/21) / (85.5/21) = 12 / 85.5.
    scores = cluster_scores([0, 0, 1, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1, 2])
    assert scores["acc"] == pytest.approx(5 / 7)
    assert scores["ari"] == pytest.approx(12 / 85.5)
    assert scores["clusters"] == 3


def test_a_perfect_clustering_scores_one_and_a_single_cluster_nothing():
    labels = torch.arange(40) % 4
    perfect = cluster_scores(labels, (labels + 1) % 4)
    assert [perfect[s] for s in ("acc", "nmi", "ari")] == pytest.approx([1, 1, 1])
    collapsed = cluster_scores(labels, torch.zeros(40, dtype=torch.long))
    assert (collapsed["acc"], collapsed["clusters"]) == (.25, 1)
    assert collapsed["nmi"] == pytest.approx(0) and collapsed["ari"] == pytest.approx(0)


def test_votes_come_from_the_images_that_vote():
    # The voters say: cluster 0 is class 1, cluster 1 is class 0, cluster 2 (2 of 3) is class 0.
    votes = [1, 0, 0, 0, 1], [0, 1, 2, 2, 2]
    # Scored: an image of class 1 in cluster 0 is right, of class 1 in cluster 1 wrong, of class 0
    # in cluster 2 right; in cluster 3, on which nobody voted, nothing is right.
    scores = cluster_scores([1, 1, 0, 0], [0, 1, 2, 3], votes)
    assert scores["acc"] == pytest.approx(2 / 4) and scores["rule"] == "majority vote"
    assert scores["classes"] == [1, 0, 0, -1]


@pytest.mark.parametrize("classes, clusters", [(5, 7), (7, 5), (4, 4)])
def test_one_to_one_leaves_clusters_or_classes_over(classes, clusters):
    labels, ids = noisy_labels(100, classes, clusters, 0)
    scores = cluster_scores(labels, ids)
    used = [c for c in scores["classes"] if c >= 0]
    assert len(used) == len(set(used)) == min(classes, clusters) and scores["rule"] == "hungarian"


# ------------------------------------------------------------------------------------------------
# k-means

def inertia(features, assignment, centre):
    return (F.normalize(features, dim=1) - centre[assignment]).square().sum().item()


@pytest.mark.parametrize("noise", [.5, 2., 5.])
def test_kmeans_is_as_good_as_scikit_learns(noise):
    x, _ = blobs(8, 60, noise)
    theirs = KMeans(8, n_init=5, random_state=0).fit(F.normalize(x, dim=1).numpy()).inertia_
    assert inertia(x, *kmeans(x, 8, seed=0)) <= 1.02 * theirs


@pytest.mark.parametrize("seed", range(4))
def test_kmeans_finds_the_best_of_all_partitions(seed):
    # Nine points in three clusters: 3^9 = 19,683 assignments, most of them counted several times.
    x = torch.randn(9, 2, generator=rng(seed))
    unit = F.normalize(x, dim=1).double()
    every = torch.tensor(list(itertools.product(range(3), repeat=9)))
    member = F.one_hot(every, 3).double()                                       # all x 9 x 3
    centre = member.mT @ unit / member.sum(1).clamp(min=1)[..., None]           # all x 3 x 2
    distance = (unit[None, :, None] - centre[:, None]).square().sum(-1)         # all x 9 x 3
    best = (distance * member).sum((1, 2)).min().item()
    assert inertia(x, *kmeans(x, 3, seed=0)) == pytest.approx(best, rel=1e-4)


def test_kmeans_ends_where_nearest_centroids_and_means_of_members_agree():
    x, _ = blobs(6, 50, .1)
    assignment, centre = kmeans(x, 6, seed=0)
    unit = F.normalize(x, dim=1)
    assert torch.equal(assignment, torch.cdist(unit, centre).argmin(1))
    for k in range(6):
        assert (centre[k] - unit[assignment == k].mean(0)).abs().max() < 1e-3


def test_kmeans_ignores_the_length_of_features():
    x, _ = blobs(5, 40, 1.)
    stretched = x * torch.rand(len(x), 1, generator=rng()).add(.1)
    same = cluster_scores(kmeans(x, 5, seed=0)[0], kmeans(stretched, 5, seed=0)[0])
    assert same["ari"] > .99


def test_an_empty_cluster_takes_a_point(monkeypatch):
    # Starts drawn at the very first point leave clusters empty, unless they are filled.
    x = torch.randn(12, 4, generator=rng())
    monkeypatch.setattr(torch, "searchsorted", lambda *a: torch.zeros(1, dtype=torch.long))
    assert len(set(kmeans(x, 3, seed=0, restarts=1)[0].tolist())) == 3


def test_kmeans_takes_k_from_one_to_n():
    x, _ = blobs(3, 4, 1.)
    assert set(kmeans(x, 1, seed=0, restarts=2)[0].tolist()) == {0}
    assert sorted(kmeans(x, 12, seed=0, restarts=2)[0].tolist()) == list(range(12))


def test_more_clusters_than_images_are_refused():
    with pytest.raises(UserError, match="6 clusters of 5 images"):
        kmeans(torch.randn(5, 3), 6, seed=0)


def test_kmeans_of_identical_points_ends():
    assignment, centre = kmeans(torch.ones(10, 4), 3, seed=0)
    assert len(assignment) == 10 and centre.isfinite().all()


# ------------------------------------------------------------------------------------------------
# Weighted kNN

def knn_by_loop(bank, bank_labels, queries, labels, k, tau, leave_one_out=False):
    bank, queries = F.normalize(bank.double(), dim=1), F.normalize(queries.double(), dim=1)
    hits = 0
    for i, query in enumerate(queries):
        similarity = [(float(query @ other), j) for j, other in enumerate(bank)
                      if not (leave_one_out and i == j)]
        votes = {}
        for cosine, j in sorted(similarity, reverse=True)[:k]:
            votes[int(bank_labels[j])] = votes.get(int(bank_labels[j]), 0) + math.exp(cosine / tau)
        hits += max(votes, key=votes.get) == int(labels[i])
    return hits / len(queries)


@pytest.mark.parametrize("k, tau", [(1, .1), (5, .1), (20, .1), (20, 10.)])
def test_knn_accuracy_equals_a_loop_over_the_queries(k, tau):
    bank, y = blobs(4, 30, 4.)
    queries, z = blobs(4, 10, 4., seed=5)[0] + bank[::3], y[::3]
    ours = knn_accuracy(bank, y, queries, z, k_neighbours=k, tau=tau)[0]
    assert ours == pytest.approx(knn_by_loop(bank, y, queries, z, k, tau))
    assert .3 < ours < 1                                           # an example that can go wrong


def test_leave_one_out_lets_no_image_vote_for_itself():
    bank, y = blobs(4, 30, 4.)
    without = knn_accuracy(bank, y, bank, y, 1, leave_one_out=True)[0]
    assert without == pytest.approx(knn_by_loop(bank, y, bank, y, 1, .1, leave_one_out=True))
    assert without < knn_accuracy(bank, y, bank, y, 1)[0] == 1


def test_k_is_lowered_to_the_mean_class_size_of_a_small_bank_and_told():
    # 4 images of class 0 and 2 of class 1, k = 200 -> 6 / 2 = 3. With all six voting (tau large)
    # class 0 would always win; the three nearest to this query hold both images of class 1.
    bank = torch.tensor([[0., 1.], [.1, 1.], [.2, 1.], [.3, 1.], [1., 0.], [1., .1]])
    y, query = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([[1., .05]])
    assert knn_accuracy(bank, y, query, torch.tensor([1]), tau=100.) == (1, 3)


# ------------------------------------------------------------------------------------------------
# kNN while training

class Watched(nn.Module):
    """A network that notes what it is shown and would learn from it, had it its way."""

    def __init__(self):
        super().__init__()
        self.norm, self.shown = nn.BatchNorm2d(3), []

    def forward(self, x):
        self.shown.append(x.clone())
        return self.norm(x).flatten(1)


def gauge(data, epoch=0, epochs=10, index=None, seed=0):
    net = Watched()
    index = torch.arange(len(data.train.images)) if index is None else index
    statistics = torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    found = common.knn_gauge(net, data, index, statistics, CPU, epoch,
                             SimpleNamespace(epochs=epochs, seed=seed))
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    return found, torch.cat(net.shown) if net.shown else torch.empty(0, 3, 2, 2)


def coloured(n=120, m=30, labelled=True):
    """Training images darker than 128, test images brighter; the class is the colour."""
    y, z = torch.arange(n) % 3, torch.arange(m) % 3
    pixels = torch.zeros(n, 3, 2, 2, dtype=torch.uint8)
    pixels[torch.arange(n), y] = 60 + torch.arange(n, dtype=torch.uint8)[:, None, None] % 60
    other = torch.full((m, 3, 2, 2), 200, dtype=torch.uint8)
    train = common.Split(pixels, y if labelled else None, [str(i) for i in range(n)])
    test = common.Split(other, z if labelled else None, [str(i) for i in range(m)])
    return common.Dataset("colours", train, test, ["r", "g", "b"] if labelled else None, "0")


@pytest.mark.parametrize("epochs, times", [(10, 10), (25, 10), (200, 10), (3, 3), (1, 1), (11, 10)])
def test_the_gauge_is_read_ten_times_a_run_and_after_the_last_epoch(epochs, times):
    data = coloured()
    read = [bool(gauge(data, epoch, epochs)[0]) for epoch in range(epochs)]
    assert sum(read) == times and read[-1]


def test_the_gauge_looks_at_the_same_training_images_each_time_and_at_no_test_image():
    data = coloured()
    (found, first), (_, again) = gauge(data, 0), gauge(data, 9)
    assert found == {"knn": 1} and torch.equal(first, again)
    assert 0 < first.max() < 128 / 255
    assert not torch.equal(first, gauge(data, 0, seed=1)[1])


def test_the_gauge_looks_only_at_images_that_are_learned_from_and_have_a_label():
    data = coloured()
    data = data._replace(train=data.train._replace(labels=torch.where(
        torch.arange(120) < 60, data.train.labels, -1)))
    shown = gauge(data, index=torch.arange(30, 90))[1]
    wanted = data.train.images[30:60].float() / 255
    key = lambda x: sorted(x.flatten(1).tolist())                               # noqa: E731
    assert key(shown) == key(wanted)


def test_there_is_no_gauge_without_labels():
    assert gauge(coloured(labelled=False)) == ({}, pytest.approx(torch.empty(0, 3, 2, 2)))


@pytest.mark.parametrize("n", [1, 2, 5, 6, 7])
def test_the_gauge_takes_a_handful_of_images(n):
    assert all(0 <= v <= 1 for v in gauge(coloured(), index=torch.arange(n))[0].values())


# ------------------------------------------------------------------------------------------------
# Linear probe

@pytest.mark.parametrize("decay", [1e-1, 1e-2, 1e-4])
def test_logistic_regression_finds_scikit_learns_weights(decay):
    # Ours: mean cross-entropy + decay ||w||^2. Theirs: C sum of cross-entropies + ||w||^2 / 2, so
    # C = 1 / (2 N decay). A bias shared by all classes changes no probability.
    x, y = blobs(3, 80, 6., dim=4)
    x = ((x - x.mean(0)) / x.std(0)).double()
    w = common.logistic_regression(x, y, 3, decay, iterations=1000)
    theirs = LogisticRegression(C=1 / (2 * len(x) * decay), max_iter=10_000, tol=1e-8).fit(
        x.numpy(), y.numpy())
    assert np.abs(w[1:].t().numpy() - theirs.coef_).max() < .01 * np.abs(theirs.coef_).max()
    assert np.abs((w[0] - w[0].mean()).numpy() - theirs.intercept_).max() < .01
    p = (x @ w[1:] + w[0]).softmax(1).numpy()
    assert np.abs(p - theirs.predict_proba(x.numpy())).max() < .005


@pytest.mark.parametrize("noise", [.5, 5.])
def test_the_linear_probe_is_as_good_as_scikit_learns_logistic_regression(noise):
    x, y = blobs(5, 120, noise)
    train = torch.arange(len(x)) % 3 > 0
    hits = linear_probe(x[train], y[train], x[~train], 5, seed=0) == y[~train]
    probe = hits.float().mean().item()
    theirs = LogisticRegression(max_iter=1000).fit(x[train].numpy(), y[train].numpy())
    assert abs(probe - theirs.score(x[~train].numpy(), y[~train].numpy())) < .04
    assert probe == 1 if noise == .5 else .5 < probe < 1           # separable, and not


def test_the_probe_standardises_so_scales_and_offsets_of_features_change_nothing():
    x, y = blobs(4, 50, 4.)
    moved = x * torch.logspace(-2, 2, 16) + 100 * torch.arange(16)
    a, b = linear_probe(x, y, x, 4, seed=0), linear_probe(moved, y, moved, 4, seed=0)
    assert (a == b).float().mean() > .98


def test_evaluation_repeats_itself_and_leaves_torchs_global_random_state_alone():
    x, y = blobs(4, 40, 4.)
    before = torch.get_rng_state()
    assert torch.equal(linear_probe(x, y, x, 4, seed=0), linear_probe(x, y, x, 4, seed=0))
    assert torch.equal(kmeans(x, 4, seed=0)[0], kmeans(x, 4, seed=0)[0])
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------------
# Features

def small_net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten())


def images(n=40, side=16, seed=0):
    return torch.randint(0, 256, (n, 3, side, side), generator=rng(seed), dtype=torch.uint8)


def test_embed_does_not_depend_on_the_batch_size_and_leaves_batch_norm_alone():
    # In train mode BatchNorm would see each batch's own mean, and remember it.
    net, x = small_net().train(), images()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    statistics = common.pixel_statistics(x)
    a, b = (common.embed(net, x, statistics, CPU, batch_size=size) for size in (7, 40))
    assert a.shape == (40, 8) and a.dtype == torch.float32 and not a.requires_grad
    assert (a - b).abs().max() < 1e-2 * a.abs().max()              # bfloat16 on some processors
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_embed_is_the_network_on_normalised_unaugmented_images():
    net, x = small_net().eval(), images()
    mean, std = common.pixel_statistics(x)
    with torch.no_grad():
        plain = net((x.float() / 255 - mean) / std)
    assert (common.embed(net, x, (mean, std), CPU) - plain).abs().max() < .02 * plain.abs().max()


# ------------------------------------------------------------------------------------------------
# evaluate: the protocol

def data_of(train, y, test=None, z=None, classes=4):
    """A Dataset around labels; its images only have to be counted."""
    split = common.Split(torch.zeros(len(train), 3, 2, 2, dtype=torch.uint8), y,
                         [f"train/{i}" for i in range(len(train))])
    other = split if test is None else common.Split(
        torch.zeros(len(test), 3, 2, 2, dtype=torch.uint8), z,
        [f"test/{i}" for i in range(len(test))])
    names = None if y is None else [str(c) for c in range(classes)]
    return common.Dataset("blobs", split, other, names, "0")


def halves(noise):
    x, y = blobs(4, 60, noise)
    part = torch.arange(len(x)) % 2 == 0
    return x[part], y[part], x[~part], y[~part]


def test_evaluate_scores_separated_blobs_perfectly_on_the_test_split():
    x, y, t, z = halves(.1)
    scores, found = common.evaluate(x, t, data_of(x, y, t, z), 4, seed=0)
    assert scores["kmeans"]["acc"] == scores["knn"] == scores["linear"] == 1
    assert scores["kmeans"]["rule"] == "hungarian"
    assert len(found.train) == len(x) and len(found.test) == len(t)
    assert 0 <= found.test_confidence.min() and found.test_confidence.max() <= 1


def test_every_image_goes_to_the_centroid_that_kmeans_itself_would_take():
    # Many directions around few centres: the centroids differ in length, so the most similar one,
    # by the cosine, is often not the nearest one.
    x = torch.rand(400, 6, generator=rng()) ** 4
    y, t = torch.arange(400) % 4, torch.rand(200, 6, generator=rng(1)) ** 4
    assignment, centre = kmeans(x, 5, 0)
    unit = F.normalize(t, dim=1)
    by_cosine = (unit @ F.normalize(centre, dim=1).t()).argmax(1)
    nearest = torch.cdist(unit, centre).argmin(1)
    assert (by_cosine != nearest).any()
    _, found = common.evaluate(x, t, data_of(x, y, t, torch.arange(200) % 4), 5, 0, probe=False)
    assert torch.equal(found.train, assignment) and torch.equal(found.test, nearest)


def test_clusters_never_depend_on_labels():
    x, y, t, z = halves(3.)
    shuffled = y[torch.randperm(len(y), generator=rng())]
    (_, a), (_, b) = (common.evaluate(x, t, data_of(x, labels, t, z), 4, seed=0)
                      for labels in (y, shuffled))
    assert torch.equal(a.train, b.train) and torch.equal(a.test, b.test)


def test_scores_never_see_the_test_labels_but_to_count_hits():
    # Test labels that are all wrong: every figure but the clusters' own best map falls to nothing.
    x, y, t, z = halves(.1)
    scores, _ = common.evaluate(x, t, data_of(x, y, t, (z + 1) % 4), 4, seed=0)
    assert scores["knn"] == scores["linear"] == 0
    assert scores["kmeans"]["acc"] == 1                            # permuted names: still clusters


def test_more_clusters_than_classes_are_voted_on_by_the_training_split():
    # Test labels renamed: a vote among the test images would still be perfect, the vote of the
    # training images is always wrong.
    x, y, t, z = halves(.1)
    right, _ = common.evaluate(x, t, data_of(x, y, t, z), 8, seed=0)
    wrong, _ = common.evaluate(x, t, data_of(x, y, t, (z + 1) % 4), 8, seed=0)
    assert right["kmeans"]["acc"] == 1 and right["kmeans"]["rule"] == "majority vote"
    assert wrong["kmeans"]["acc"] == 0


@pytest.mark.parametrize("kept", [2, 3, 4])
@pytest.mark.parametrize("clusters, rule", [(4, "hungarian"), (5, "majority vote")])
def test_classes_missing_from_the_test_images_do_not_change_the_rule(kept, clusters, rule):
    x, y, t, z = halves(.1)
    data = data_of(x, y, t[z < kept], z[z < kept])
    scores, _ = common.evaluate(x, t[z < kept], data, clusters, seed=0)
    assert scores["kmeans"]["rule"] == rule


def test_without_a_test_split_no_image_votes_for_itself_and_there_is_no_linear_probe():
    # Random labels on random features: kNN that may look at the image itself would be far above
    # chance, 1/4; so would a linear probe scored on its training images.
    x, y = torch.randn(400, 64, generator=rng()), torch.randint(0, 4, (400,), generator=rng(1))
    scores, _ = common.evaluate(x, x, data_of(x, y), 4, seed=0)
    assert scores["knn"] < .4 and "linear" not in scores


def test_images_without_a_label_take_part_in_clusters_but_in_no_score():
    # Like STL-10: two thirds of the training images are unlabelled (-1).
    x, y, t, z = halves(.1)
    y = torch.where(torch.arange(len(y)) % 3 > 0, -1, y)
    scores, found = common.evaluate(x, t, data_of(x, y, t, z), 4, seed=0)
    assert scores["kmeans"]["acc"] == scores["knn"] == scores["linear"] == 1
    assert len(found.train) == len(x)


def test_clusters_are_fitted_on_the_images_learned_from():
    # Blobs 2 and 3 are not among them: no centroid lies there, so of 4
    # clusters two share each blob.
    x, y, t, z = halves(.1)
    index = (y < 2).nonzero().flatten()
    _, found = common.evaluate(x, t, data_of(x, y, t, z), 4, seed=0, index=index)
    assert len(set(found.train[index].tolist())) == 4


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("per_class", [1, 2, 4])
def test_a_handful_of_images_gives_no_score_that_is_nan(per_class):
    # A fifth of the training images, held out for the probe, may be none.
    x, y = blobs(2, per_class, .1)
    for data in (data_of(x, y, classes=2), data_of(x, y, x, y, classes=2)):
        scores, _ = common.evaluate(x, x, data, 2, seed=0)
        assert all(math.isfinite(scores[s]) for s in scores if s != "kmeans")
        assert math.isfinite(scores["kmeans"]["acc"])


@pytest.mark.parametrize("clusters, rule", [(4, "hungarian"), (8, "majority vote")])
@pytest.mark.parametrize("test", [True, False])
def test_the_printed_table_names_rule_neighbours_and_splits(test, clusters, rule, capsys):
    x, y, t, z = halves(.1)                                        # 120 of 4 classes: k is 30
    data = data_of(x, y, t, z) if test else data_of(x, y)
    scores, _ = common.evaluate(x, t if test else x, data, clusters, seed=0)
    common.print_scores({"ours": scores, "its head": scores["kmeans"]}, data)
    *_, ours, head, words = capsys.readouterr().out.splitlines()
    assert ours.startswith("ours") and head.split()[-2:] == ["-", "-"]
    assert rule in words and "30 neighbours" in words
    assert ("120 test images" in words) is test and ("same 120 images" in words) is not test


@pytest.mark.parametrize("flags, words", [
    ({"batch_size": 500}, "--batch-size 500: there are only 120"),
    ({"clusters": 121}, "--clusters 121: there are only 120"),
    ({"train_size": 20, "batch_size": 21}, "--batch-size 21: there are only 20"),
    ({"labels": None}, "--clusters"), ({"labels": None, "clusters": 4}, None), ({}, None)])
def test_what_the_data_cannot_give_is_refused_before_anything_is_written(flags, words, monkeypatch):
    x, y, t, z = halves(.1)
    flags = {"labels": y, "clusters": None, "batch_size": 8, "train_size": None, **flags}
    labels = flags.pop("labels")
    data = data_of(x, labels, t, None if labels is None else z)
    monkeypatch.setattr(common, "load_dataset", lambda *a, **b: data)
    args = common.Parser("", 1).parse(["--device=cpu"], {})
    vars(args).update(flags)
    if words:
        with pytest.raises(UserError, match=words):
            common.prepare(args, {})
    else:
        device, same, index, clusters = common.prepare(args, {})
        assert (device, same, len(index), clusters) == (CPU, data, 120, 4)


def test_embed_compiles_nothing():
    def backend(*_):
        raise AssertionError("compiled")
    net, statistics = small_net(), (torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1))
    net.compile(backend=backend)
    assert common.embed(net, images(), statistics, CPU).shape == (40, 8)


@pytest.mark.parametrize("training", [True, False])
def test_embed_gives_the_network_back_in_its_own_mode(training):
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192)).train(training)
    statistics = torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    common.embed(net, images(32, 8), statistics, CPU)
    assert net.training == net[1].training == training


def test_kmeans_draws_its_starts_by_the_squared_distance(monkeypatch):
    seen, search = [], torch.searchsorted
    monkeypatch.setattr(torch, "searchsorted", lambda c, u: seen.append(c) or search(c, u))
    x = F.normalize(torch.randn(30, 4, generator=rng()), dim=1)
    common.kmeans(x, 2, seed=0, restarts=1)
    weights = seen[0].diff(prepend=torch.zeros(1).double())
    squared = torch.cdist(x.double(), x.double()).square()
    assert (weights - squared).abs().amax(1).min() < 1e-5


def test_empty_clusters_take_points_that_are_far(monkeypatch):
    # All starts at one point of the first ten: clusters 1 and 2 are empty. Three points lie apart.
    x = torch.eye(3)[[0] * 10 + [1] * 3] + .01 * torch.rand(13, 3, generator=rng())
    start = torch.rand(1, 3, generator=common.generator(0, 0, "kmeans"))[0, 0] * 13
    x = x.roll(int(start), 0)                                      # the first ten begin there
    monkeypatch.setattr(torch, "searchsorted", lambda *a: torch.tensor([int(start)]))
    found = common.kmeans(x, 3, seed=0, restarts=1, iterations=2)[0]
    found = found.roll(-int(start))
    assert (found[:10] == found[0]).all() and found[0] not in found[10:]


def test_by_default_200_neighbours_vote_by_the_exponential_of_the_cosine_over_a_tenth():
    # One image of class 0 at the query, 20 of class 1 at 1 - d: e^10 against 20 e^(10 - 10 d), so
    # class 1 wins below d = ln(20) / 10 = .2996. Far images make the classes large.
    for d, wins in ((.28, 1), (.32, 0)):
        near = torch.tensor([[1., 0.]] + [[1 - d, math.sqrt(1 - (1 - d) ** 2)]] * 20)
        bank = torch.cat([near, torch.tensor([[-1., 0.]]).expand(600, 2)])
        y = torch.cat([torch.tensor([0] + [1] * 20), torch.arange(600) % 2])
        query = torch.tensor([[1., 0.]])
        assert common.knn_accuracy(bank, y, query, torch.tensor([wins])) == (1, 200)


def test_leave_one_out_holds_in_every_chunk_of_queries():
    # Chunks of 2^26 / N = 7989 rows. Near twins of the other class: who votes for itself is right.
    x = torch.randn(4200, 8, generator=rng()).repeat(2, 1)
    x[4200:] += .01 * torch.randn(4200, 8, generator=rng(1))
    y = torch.tensor([0, 1]).repeat_interleave(4200)
    assert common.knn_accuracy(x, y, x, y, 1, leave_one_out=True)[0] < .01


def gauged(n, monkeypatch, epoch=0):
    data, asked, knn = data_of(range(n), torch.arange(n) % 4), [], common.knn_accuracy
    monkeypatch.setattr(common, "knn_accuracy", lambda *a: asked.append(a) or knn(*a))
    statistics = torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    common.knn_gauge(nn.Flatten(), data, torch.arange(n), statistics, CPU, epoch,
                     SimpleNamespace(epochs=10, seed=0))
    return asked[0]


@pytest.mark.parametrize("n, bank, queries", [
    (120, 100, 20), (6000, 5000, 1000), (7000, 5000, 1000)])
def test_five_sixths_of_the_gauge_vote_for_one_sixth(n, bank, queries, monkeypatch):
    assert [len(a) for a in gauged(n, monkeypatch)] == [bank, bank, queries, queries]


def test_the_probe_chooses_its_decay_on_a_held_out_fifth_and_then_takes_all(monkeypatch):
    calls = []

    def fit(x, y, classes, decay, iterations=100):                 # only 1e-3 is any good
        calls.append((len(x), decay))
        w = torch.zeros(x.shape[1] + 1, classes)
        w[0, 0 if decay == 1e-3 else 1] = 1
        return w
    monkeypatch.setattr(common, "logistic_regression", fit)
    x, y = torch.randn(50, 4, generator=rng()), torch.zeros(50, dtype=torch.long)
    assert (common.linear_probe(x, y, x, 2, seed=0) == 0).all()
    assert {n for n, _ in calls[:-1]} == {40} and calls[-1] == (50, 1e-3)


def test_what_the_probe_says_of_an_image_does_not_depend_on_the_other_test_images():
    x = torch.randn(200, 4, generator=rng()) + 3 * torch.eye(4)[torch.arange(200) % 4]
    y = torch.arange(200) % 4
    alone = common.linear_probe(x, y, x[y == 0], 4, seed=0)
    assert torch.equal(alone, common.linear_probe(x, y, x, 4, seed=0)[y == 0])


def test_confidence_is_the_softmax_of_the_distances_at_a_temperature_of_a_tenth():
    x, y = torch.randn(60, 4, generator=rng()), torch.arange(60) % 2
    _, found = common.evaluate(x, x, data_of(x, y), 3, seed=0)
    centre, unit = common.kmeans(x, 3, 0)[1], F.normalize(x, dim=1)
    p = (-torch.cdist(unit, centre).square() / 2 / .1).softmax(1)
    assert torch.allclose(found.train_confidence, p.amax(1), atol=1e-4)


def test_the_baselines_are_centred_pixels_and_the_untrained_network(monkeypatch):
    data, given = coloured(), []
    monkeypatch.setattr(common, "evaluate", lambda *a, **k: given.append(a) or ({}, None))
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    statistics = common.pixel_statistics(data.train.images)
    common.baselines(data, net, statistics, 2, 0, None, CPU)
    pixels = data.train.images.float().flatten(1) / 255 - .5
    assert torch.allclose(given[0][0], pixels, atol=1e-6)
    expected = common.embed_both(net, data, statistics, CPU)
    assert all(torch.equal(a, b) for a, b in zip(given[1], expected))
