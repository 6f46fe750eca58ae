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
from sklearn.metrics import adjusted_rand_score, confusion_matrix, normalized_mutual_info_score
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


def test_permuting_cluster_ids_changes_no_score():
    labels, ids = noisy_labels(300, 6, 6, 1)
    shuffled = np.random.default_rng(0).permutation(6)[ids]
    before, after = cluster_scores(labels, ids), cluster_scores(labels, shuffled)
    assert {k: pytest.approx(v) if k != "rule" else v for k, v in before.items()} == after


def test_permuting_the_images_changes_no_score():
    labels, ids = noisy_labels(300, 6, 9, 1)
    order = np.random.default_rng(0).permutation(300)
    before, after = cluster_scores(labels, ids), cluster_scores(labels[order], ids[order])
    assert before["acc"] == after["acc"]
    assert before["nmi"] == pytest.approx(after["nmi"])


def test_a_perfect_clustering_scores_one_and_a_single_cluster_nothing():
    labels = torch.arange(40) % 4
    perfect = cluster_scores(labels, (labels + 1) % 4)
    assert [perfect[s] for s in ("acc", "nmi", "ari")] == pytest.approx([1, 1, 1])
    collapsed = cluster_scores(labels, torch.zeros(40, dtype=torch.long))
    assert (collapsed["acc"], collapsed["clusters"]) == (.25, 1)
    assert collapsed["nmi"] == pytest.approx(0) and collapsed["ari"] == pytest.approx(0)


def test_random_clusters_score_near_chance_and_ari_near_zero():
    g = rng()
    labels, ids = (torch.randint(0, 10, (5000,), generator=g) for _ in range(2))
    scores = cluster_scores(labels, ids)
    assert scores["acc"] < .13 and scores["nmi"] < .01 and abs(scores["ari"]) < .005


def test_numpy_arrays_tensors_and_lists_score_the_same():
    labels, ids = noisy_labels(50, 4, 4, 2)
    assert cluster_scores(labels, ids) == cluster_scores(labels.tolist(), ids.tolist()) == \
        cluster_scores(torch.tensor(labels), torch.tensor(ids))


def test_more_clusters_than_classes_are_scored_by_majority_vote_and_say_so():
    labels, ids = noisy_labels(300, 4, 11, 3)
    scores = cluster_scores(labels, ids)
    right = sum(max(np.sum(labels[ids == k] == c) for c in range(4)) for k in set(ids.tolist()))
    assert scores["acc"] == pytest.approx(right / 300)
    assert scores["rule"] == "majority vote"


def test_the_vote_favours_many_clusters_which_is_why_its_rule_is_named():
    # Every image its own cluster: all are right by vote, and nothing was learned.
    scores = cluster_scores([0, 1, 0, 1], [0, 1, 2, 3])
    assert (scores["acc"], scores["rule"]) == (1, "majority vote")


def test_empty_cluster_numbers_do_not_turn_matching_into_a_vote():
    # Two clusters are in use, numbered 3 and 9, for two classes: one-to-one still applies.
    scores = cluster_scores([0, 0, 1, 1], [3, 3, 9, 3])
    assert (scores["acc"], scores["rule"], scores["clusters"]) == (.75, "hungarian", 2)


def test_votes_may_come_from_another_split():
    # Train says: cluster 0 is class 1, cluster 1 is class 0, cluster 2 (2 of 3) is class 0.
    votes = [1, 0, 0, 0, 1], [0, 1, 2, 2, 2]
    # Test: image 0 in cluster 0 -> class 1 right; 1 in cluster 1 -> 0 wrong;
    # 2 in cluster 2 -> 0 right.
    scores = cluster_scores([1, 1, 0], [0, 1, 2], votes)
    assert scores["acc"] == pytest.approx(2 / 3) and scores["rule"] == "majority vote"


def test_a_cluster_that_nobody_voted_on_hits_nothing():
    scores = cluster_scores([0, 1, 1], [0, 1, 5], ([0, 1], [0, 1]))
    assert scores["acc"] == pytest.approx(2 / 3)


def test_contingency_counts_like_scikit_learns_confusion_matrix():
    labels, ids = noisy_labels(100, 5, 5, 4)
    assert (common.contingency(labels, ids) == confusion_matrix(labels, ids, labels=range(5))).all()
    assert common.contingency([0], [0], classes=3, clusters=4).shape == (3, 4)


def test_hungarian_match_beats_every_other_permutation():
    table = np.random.default_rng(0).integers(0, 50, (5, 5))
    best = max(sum(table[c, k] for k, c in enumerate(p)) for p in itertools.permutations(range(5)))
    match = common.hungarian_match(table)
    assert sorted(match) == [0, 1, 2, 3, 4]
    assert sum(table[c, k] for k, c in enumerate(match)) == best


def test_hungarian_match_gives_left_over_clusters_no_class():
    assert common.hungarian_match(np.array([[9, 0, 1], [0, 8, 2]])).tolist() == [0, 1, -1]
    assert common.hungarian_match(np.array([[9, 0], [0, 8], [1, 1]])).tolist() == [0, 1]


# ------------------------------------------------------------------------------------------------
# k-means

def inertia(features, assignment, centre):
    return (F.normalize(features, dim=1) - centre[assignment]).square().sum().item()


@pytest.mark.parametrize("noise", [.5, 2., 5.])
def test_kmeans_is_as_good_as_scikit_learns(noise):
    x, _ = blobs(8, 60, noise)
    theirs = KMeans(8, n_init=5, random_state=0).fit(F.normalize(x, dim=1).numpy()).inertia_
    assert inertia(x, *kmeans(x, 8, seed=0)) <= 1.02 * theirs


def test_kmeans_finds_well_separated_blobs():
    x, labels = blobs(10, 40, .1)
    scores = cluster_scores(labels, kmeans(x, 10, seed=0)[0])
    assert (scores["acc"], scores["clusters"]) == (1, 10)


def test_kmeans_assigns_every_point_to_its_nearest_centroid():
    x, _ = blobs(6, 50, 2.)
    assignment, centre = kmeans(x, 6, seed=0)
    by_loop = torch.cdist(F.normalize(x, dim=1).double(), centre.double()).argmin(1)
    assert (assignment == by_loop).float().mean() > .99            # but for ties in float32


def test_kmeans_centroids_are_the_means_of_their_members():
    x, _ = blobs(6, 50, .1)
    assignment, centre = kmeans(x, 6, seed=0)
    for k in range(6):
        mean = F.normalize(x, dim=1)[assignment == k].mean(0)
        assert (centre[k] - mean).abs().max() < 1e-3


def test_kmeans_ignores_the_length_of_features():
    x, _ = blobs(5, 40, 1.)
    stretched = x * torch.rand(len(x), 1, generator=rng()).add(.1)
    same = cluster_scores(kmeans(x, 5, seed=0)[0], kmeans(stretched, 5, seed=0)[0])
    assert same["ari"] > .99


def test_kmeans_repeats_itself_and_other_seeds_start_elsewhere():
    x, _ = blobs(20, 20, 3.)
    first, again, other = (kmeans(x, 20, seed, restarts=1)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_kmeans_does_not_touch_torchs_global_random_state():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    kmeans(blobs(3, 10, 1.)[0], 3, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_more_restarts_are_never_worse():
    x, _ = blobs(15, 20, 2.)
    one, many = (inertia(x, *kmeans(x, 15, seed=0, restarts=r)) for r in (1, 8))
    assert many <= one + 1e-4


def test_an_empty_cluster_takes_the_point_farthest_from_its_centroid(monkeypatch):
    # Four points in two directions and k = 3. Starts drawn at the very first point leave a cluster
    # empty, unless it is filled: in the end all three are used, the lone point among them.
    angles = torch.tensor([0., .01, 1.5, 1.52, 3.])
    x = torch.stack([angles.cos(), angles.sin()], 1)
    monkeypatch.setattr(torch, "searchsorted", lambda *a: torch.zeros(1, dtype=torch.long))
    assignment = kmeans(x, 3, seed=0, restarts=1)[0]
    assert len(set(assignment.tolist())) == 3
    assert (assignment == assignment[4]).sum() == 1


def test_kmeans_takes_k_from_one_to_n():
    x, _ = blobs(3, 4, 1.)
    assert set(kmeans(x, 1, seed=0)[0].tolist()) == {0}
    assert sorted(kmeans(x, 12, seed=0)[0].tolist()) == list(range(12))


def test_more_clusters_than_images_are_refused():
    with pytest.raises(UserError, match="6 clusters of 5 images"):
        kmeans(torch.randn(5, 3), 6, seed=0)


def test_kmeans_of_identical_points_ends():
    assignment, centre = kmeans(torch.ones(10, 4), 3, seed=0)
    assert len(assignment) == 10 and centre.isfinite().all()


def test_nearest_centroid_does_not_depend_on_the_chunk():
    x = F.normalize(torch.randn(100, 8, generator=rng()), dim=1)
    centre = torch.randn(7, 8, generator=rng(1))
    whole, chunks = common.nearest_centroid(x, centre), common.nearest_centroid(x, centre, chunk=13)
    assert torch.equal(whole[0], chunks[0])
    assert (whole[1] - torch.cdist(x, centre).square().amin(1)).abs().max() < 1e-3


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
    ours = knn_accuracy(bank, y, queries, z, k=k, tau=tau)
    assert ours == pytest.approx(knn_by_loop(bank, y, queries, z, k, tau))
    assert .3 < ours < 1                                           # an example that can go wrong


def test_leave_one_out_lets_no_image_vote_for_itself():
    bank, y = blobs(4, 30, 4.)
    without = knn_accuracy(bank, y, bank, y, k=1, leave_one_out=True)
    assert without == pytest.approx(knn_by_loop(bank, y, bank, y, 1, .1, leave_one_out=True))
    assert without < knn_accuracy(bank, y, bank, y, k=1) == 1      # with its own vote: always right


def test_leave_one_out_holds_beyond_the_first_chunk_of_queries():
    bank, y = blobs(4, 600, 6.)                                    # more than 2048
    x = F.normalize(bank, dim=1).double()
    nearest = (x @ x.t()).fill_diagonal_(-2).argmax(1)
    expected = (y[nearest] == y).float().mean().item()
    score = knn_accuracy(bank, y, bank, y, k=1, leave_one_out=True)
    assert score == pytest.approx(expected, abs=2e-3)


def test_similar_neighbours_weigh_more_than_many():
    # Query (1, 0): one neighbour of class 0 at cosine 1 votes e^10 = 22026, two of class 1 at
    # cosine .6 vote e^6 = 403 each. With tau = 10: 1.105 against 2 x 1.062, the many win.
    bank = torch.tensor([[1., 0.], [.6, .8], [.6, -.8], [-1., 0.], [-1., 0.], [-1., 0.]])
    y, query = torch.tensor([0, 1, 1, 0, 0, 1]), torch.tensor([[2., 0.]])
    assert knn_accuracy(bank, y, query, torch.tensor([0]), k=3, tau=.1) == 1
    assert knn_accuracy(bank, y, query, torch.tensor([0]), k=3, tau=10.) == 0


def test_k_is_lowered_to_the_mean_class_size_of_a_small_bank():
    # 4 images of class 0 and 2 of class 1, k = 200 -> 6 / 2 = 3. With all six voting (tau large)
    # class 0 would always win; the three nearest to this query hold both images of class 1.
    bank = torch.tensor([[0., 1.], [.1, 1.], [.2, 1.], [.3, 1.], [1., 0.], [1., .1]])
    y = torch.tensor([0, 0, 0, 0, 1, 1])
    assert knn_accuracy(bank, y, torch.tensor([[1., .05]]), torch.tensor([1]), tau=100.) == 1


# ------------------------------------------------------------------------------------------------
# Linear probe

@pytest.mark.parametrize("noise", [.5, 5.])
def test_the_linear_probe_is_as_good_as_scikit_learns_logistic_regression(noise):
    x, y = blobs(5, 120, noise)
    train = torch.arange(len(x)) % 3 > 0
    probe = (linear_probe(x[train], y[train], x[~train], seed=0) == y[~train]).float().mean().item()
    theirs = LogisticRegression(max_iter=1000).fit(x[train].numpy(), y[train].numpy())
    score = theirs.score(x[~train].numpy(), y[~train].numpy())
    assert abs(probe - score) < .04
    assert probe == 1 if noise == .5 else .5 < probe < 1           # separable, and not


def test_the_probe_standardises_so_scales_and_offsets_of_features_change_nothing():
    x, y = blobs(4, 50, 4.)
    moved = x * torch.logspace(-2, 2, 16) + 100 * torch.arange(16)
    a, b = linear_probe(x, y, x, seed=0), linear_probe(moved, y, moved, seed=0)
    assert (a == b).float().mean() > .98


def test_a_constant_feature_does_not_break_the_probe():
    x, y = blobs(3, 30, .5)
    x[:, 3] = 7.
    assert (linear_probe(x, y, x, seed=0) == y).all()


def test_the_probe_never_sees_the_test_labels_and_repeats_itself():
    x, y = blobs(4, 40, 4.)
    assert torch.equal(linear_probe(x, y, x, seed=0), linear_probe(x, y, x, seed=0))


# ------------------------------------------------------------------------------------------------
# Features

def small_net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten())


def images(n=40, side=16, seed=0):
    return torch.randint(0, 256, (n, 3, side, side), generator=rng(seed), dtype=torch.uint8)


@pytest.mark.parametrize("training", [True, False])
def test_embed_restores_the_mode_of_the_network(training):
    net = small_net().train(training)
    common.embed(net, images(), common.pixel_statistics(images()), CPU)
    assert net.training is training and net[1].training is training


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


def test_fetch_gives_the_asked_images_between_zero_and_one():
    x = images()
    out = common.fetch(x, torch.tensor([5, 3]), CPU)
    assert torch.equal(out, x[[5, 3]].float() / 255)


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
    assert scores["kmeans"]["rule"] == "hungarian" and scores["linear_per_class"] == [1, 1, 1, 1]
    assert len(found.train) == len(x) and len(found.test) == len(t)
    assert 0 <= found.test_confidence.min() and found.test_confidence.max() <= 1


def test_evaluate_without_labels_gives_clusters_and_no_score():
    x, _, t, _ = halves(.1)
    scores, found = common.evaluate(x, t, data_of(x, None, t, None), 4, seed=0)
    assert scores == {}
    assert len(set(found.test.tolist())) == 4


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


def test_without_a_test_split_nothing_is_scored_on_what_it_was_fitted_on():
    # Random labels on random features: a fair figure is near chance, 1/4. kNN that may look at the
    # image itself, or a probe scored on its training images, would come out far above.
    x, y = torch.randn(400, 64, generator=rng()), torch.randint(0, 4, (400,), generator=rng(1))
    scores, _ = common.evaluate(x, x, data_of(x, y), 4, seed=0)
    assert scores["knn"] < .4 and scores["linear"] < .45


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
def test_a_handful_of_images_gives_no_score_that_is_nan():
    # Four images: a fifth of them, held out for the probe, is none.
    x, y = blobs(2, 2, .1)
    scores, _ = common.evaluate(x, x, data_of(x, y, classes=2), 2, seed=0)
    assert all(math.isfinite(v) for v in (scores["knn"], scores["kmeans"]["acc"]))
    assert scores.get("linear") is None or math.isfinite(scores["linear"])


def test_every_score_has_its_protocol_in_words():
    x, y, t, z = halves(.1)
    for data in (data_of(x, y, t, z), data_of(x, y)):
        scores, _ = common.evaluate(x, t if data.has_test else x, data, 4, seed=0)
        words = {k.lower().replace("-", ""): text for k, text in common.protocol(data).items()}
        assert set(scores) - {"linear_per_class"} <= set(words)
        assert ("no test split" in words["knn"]) is not data.has_test


def test_the_printed_table_names_the_rule_of_over_clustering(capsys):
    x, y, t, z = halves(.1)
    data = data_of(x, y, t, z)
    common.print_scores({"four": common.evaluate(x, t, data, 4, seed=0)[0],
                         "eight": common.evaluate(x, t, data, 8, seed=0)[0]}, data)
    lines = capsys.readouterr().out.splitlines()
    assert "majority vote" in next(line for line in lines if line.startswith("eight"))
    assert "majority vote" not in next(line for line in lines if line.startswith("four"))


def test_pixel_features_are_the_pixels_shrunk_to_32():
    x = images(3, side=16)
    assert common.pixel_features(x, CPU).shape == (3, 3 * 16 * 16)
    big = torch.full((2, 3, 64, 64), 51, dtype=torch.uint8)        # 51 / 255 - 1/2 = -.3
    assert common.pixel_features(big, CPU).shape == (2, 3 * 32 * 32)
    assert (common.pixel_features(big, CPU) + .3).abs().max() < 1e-6


def test_more_clusters_or_a_larger_batch_than_images_are_refused():
    x, y, t, z = halves(.1)
    args = SimpleNamespace(dataset="blobs", clusters=None, batch_size=8)
    assert common.check_sizes(args, data_of(x, y, t, z), len(x)) == 4
    with pytest.raises(UserError, match="--batch-size 500: there are only 120"):
        common.check_sizes(SimpleNamespace(dataset="blobs", clusters=None, batch_size=500),
                           data_of(x, y, t, z), len(x))
    with pytest.raises(UserError, match="--clusters 121"):
        common.check_sizes(SimpleNamespace(dataset="blobs", clusters=121, batch_size=8),
                           data_of(x, y, t, z), len(x))


def test_unlabelled_images_need_the_number_of_clusters():
    x, _, t, _ = halves(.1)
    args = SimpleNamespace(dataset="blobs", clusters=None, batch_size=8)
    with pytest.raises(UserError, match="--clusters"):
        common.check_sizes(args, data_of(x, None, t, None), len(x))
