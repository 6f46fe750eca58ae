"""scl.py: what its losses, its memory and its training must do."""
import inspect
import json
import math

import pytest
import torch
import torch.nn.functional as F

import common
import scl

torch.set_num_threads(1)
LOSSES = (scl.semantic_contrastive_loss, scl.visual_prediction, scl.consistency_loss,
          scl.balance_loss, scl.update_memory)


def gaussian(*shape, seed=2):
    """Float64 normal numbers, the same each time."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def sample(anchors=6, candidates=20, k=3, dim=8, seed=0):
    """Cosines (B, N) in float64, the anchors' own columns, and a cluster for each candidate."""
    rng = torch.Generator().manual_seed(seed)
    unit = F.normalize(gaussian(anchors + candidates, dim, seed=seed), dim=1)
    similarity = unit[:anchors] @ unit[anchors:].t()
    own = torch.randperm(candidates, generator=rng)[:anchors]
    return similarity, own, torch.randint(0, k, (candidates,), generator=rng)


# ------------------------------------------------------------------------------------------------
# Semantic contrast

@pytest.mark.parametrize("positives", [0, 1, 3, 50])
def test_semantic_contrast_is_the_printed_sum(positives):
    similarity, own, clusters = sample()
    total = 0.
    for i, o in enumerate(own.tolist()):
        e = [math.exp(s / .3) for s in similarity[i].tolist()]
        mates = [j for j in range(len(e)) if clusters[j] == clusters[o] and j != o]
        pulled = {o, *sorted(mates, key=lambda j: -e[j])[:positives]}
        pushed = [j for j in range(len(e)) if clusters[j] != clusters[o]]
        up = sum(e[j] for j in pulled)
        total -= math.log(up / (up + sum(e[j] for j in pushed))) / len(own)
    got = scl.semantic_contrastive_loss(similarity, own, clusters, .3, positives)
    assert got.item() == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize("positives", [0, 5])
def test_with_every_image_its_own_cluster_it_is_instance_discrimination(positives):
    similarity, own, _ = sample()
    alone = torch.arange(similarity.shape[1])
    got = scl.semantic_contrastive_loss(similarity, own, alone, .1, positives)
    assert torch.allclose(got, F.cross_entropy(similarity / .1, own))


def test_within_a_batch_of_two_views_it_is_nt_xent_when_every_image_is_its_own_cluster():
    z = F.normalize(gaussian(10, 4), dim=1)
    twin, image = torch.arange(10).roll(5), torch.arange(5).repeat(2)
    logits = (z @ z.t() / .2).fill_diagonal_(-math.inf)             # NT-Xent: never against itself
    got = scl.semantic_contrastive_loss(z @ z.t(), twin, image, .2)
    assert torch.allclose(got, F.cross_entropy(logits, twin))


@pytest.mark.parametrize("positives", [0, 4, 100])
def test_with_a_single_cluster_it_is_zero_and_so_is_its_gradient(positives):
    similarity, own, clusters = sample()
    similarity.requires_grad_()
    loss = scl.semantic_contrastive_loss(similarity, own, torch.zeros_like(clusters), .1, positives)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-15)              # in float64
    assert similarity.grad.abs().max() < 1e-15


def test_equal_similarities_cost_the_logarithm_of_the_number_of_candidates():
    own, alone = torch.tensor([3, 0]), torch.arange(20)
    loss = scl.semantic_contrastive_loss(torch.zeros(2, 20), own, alone, .1)
    assert loss.item() == pytest.approx(math.log(20))


def test_members_of_the_own_cluster_that_are_no_positives_are_neither_pulled_nor_pushed():
    similarity, own, clusters = sample()
    similarity.requires_grad_()
    scl.semantic_contrastive_loss(similarity, own, clusters, .1, positives=1).backward()
    for i, o in enumerate(own.tolist()):
        mates = (clusters == clusters[o]).nonzero().flatten().tolist()
        nearest = max((j for j in mates if j != o), key=lambda j: similarity[i, j].item())
        for j in range(similarity.shape[1]):
            pull = -similarity.grad[i, j].item()
            if j in (o, nearest):
                assert pull > 0
            elif j in mates:
                assert pull == 0
            else:
                assert pull < 0


def test_a_wrongly_placed_neighbour_costs_more_than_a_rightly_placed_one():
    similarity = torch.tensor([[1., .9, -.5]])    # its own row, a near one, a far one
    cost = [scl.semantic_contrastive_loss(similarity, torch.tensor([0]), torch.tensor(c), .1).item()
            for c in ([0, 0, 1], [0, 1, 0])]
    assert cost[0] < 1e-6 < .1 < cost[1]


# ------------------------------------------------------------------------------------------------
# The two predictions

def test_visual_prediction_is_the_printed_sum():
    similarity, own, clusters = sample()
    for without in (None, own):
        got = scl.visual_prediction(similarity, clusters, 3, .2, without)
        for i, o in enumerate(own.tolist()):
            e = [0. if without is not None and j == o else math.exp(s / .2)
                 for j, s in enumerate(similarity[i].tolist())]
            for c in range(3):
                share = sum(v for j, v in enumerate(e) if clusters[j] == c) / sum(e)
                assert got[i, c].item() == pytest.approx(share, abs=1e-12)


def test_visual_prediction_sums_to_one_over_clusters_also_when_some_are_empty():
    similarity, own, clusters = sample(k=3)
    p = scl.visual_prediction(similarity, clusters, 7, .1, own)
    assert torch.allclose(p.sum(1), torch.ones(len(p), dtype=p.dtype))
    assert (p[:, 3:] == 0).all()


def test_visual_prediction_follows_the_members_that_look_alike():
    similarity, clusters = torch.tensor([[1., .9, -1., -1., -1.]]), torch.tensor([0, 2, 1, 1, 1])
    p = scl.visual_prediction(similarity, clusters, 3, .1, own=torch.tensor([0]))
    assert p.argmax().item() == 2 and p[0, 0] == 0                  # its own vote does not count


def test_by_the_mean_a_large_cluster_does_not_win_for_being_large():
    similarity = torch.tensor([[.5, .4, .4, .4, .4]])   # one near member, four less near ones
    clusters = torch.tensor([0, 1, 1, 1, 1])
    # T = .1: e^5 = 148 against e^4 = 55 each, so 148 to 218 by the sum, 148 to 55 by the mean
    by_sum = scl.visual_prediction(similarity, clusters, 2, .1, vote="sum")
    by_mean = scl.visual_prediction(similarity, clusters, 3, .1, vote="mean")
    near, far = math.exp(5), math.exp(4)
    assert by_sum[0, 1].item() == pytest.approx(4 * far / (4 * far + near), abs=1e-6)
    assert by_mean[0, 0].item() == pytest.approx(near / (near + far), abs=1e-6)
    assert by_mean[0, 2] == 0                                       # empty


def test_the_consensus_is_where_the_product_of_both_predictions_is_largest():
    args = scl.parse([])
    memory = torch.eye(3)[[0, 0, 1, 1, 2, 2]]                       # three pairs of look-alikes
    own, clusters = torch.tensor([0, 2]), torch.tensor([2, 0, 0, 1, 2, 2])
    unsure = torch.zeros(4, 3)                                      # W has no opinion:
    new, _ = scl.consensus(memory, own, clusters, unsure, args)     # each goes where its twin is
    assert new.tolist() == [0, 0, 1, 1, 2, 2]
    sure = torch.tensor([[0., 0., 99.], [0., 0., 99.]]).repeat(2, 1)
    new, votes = scl.consensus(memory, own, clusters, sure, args)   # W outvotes the looks
    assert new.tolist() == [2, 0, 2, 1, 2, 2]
    assert votes.tolist() == [0 * 3 + 2, 1 * 3 + 2]                 # (visual 0, boundary 2), (1, 2)


def test_consistency_is_the_printed_sum():
    pv, ps = torch.tensor([[.9, .1], [.5, .5]]), torch.tensor([[.8, .2], [1., 0.]])
    # -(ln(.9 * .8 + .1 * .2) + ln(.5 * 1 + .5 * 0)) / 2 = -(ln .74 + ln .5) / 2
    expected = -(math.log(.74) + math.log(.5)) / 2
    assert scl.consistency_loss(pv, ps).item() == pytest.approx(expected, abs=1e-6)


def test_consistency_is_lowest_when_both_predictions_are_sure_and_agree():
    sure = torch.eye(4)
    assert scl.consistency_loss(sure, sure).item() == pytest.approx(0, abs=1e-6)
    assert scl.consistency_loss(sure, torch.full((4, 4), .25)).item() == pytest.approx(math.log(4))
    assert math.isfinite(scl.consistency_loss(sure, sure.roll(1, 0)).item())    # sure and opposed


def test_balance_is_zero_for_even_use_and_ln_k_for_a_single_cluster():
    assert scl.balance_loss(torch.full((5, 4), .25)).item() == pytest.approx(0, abs=1e-6)
    assert scl.balance_loss(torch.eye(4)).item() == pytest.approx(0, abs=1e-6)  # each one sure
    assert scl.balance_loss(torch.eye(4)[:1].expand(5, -1)).item() == pytest.approx(math.log(4))


def test_balance_is_the_printed_sum():
    ps = torch.tensor([[.7, .2, .1], [.1, .2, .7]], dtype=torch.float64)
    # means .4, .2, .4
    entropy = -(2 * .4 * math.log(.4) + .2 * math.log(.2))
    assert scl.balance_loss(ps).item() == pytest.approx(math.log(3) - entropy)


# ------------------------------------------------------------------------------------------------
# All of them

def all_losses(similarity, own, clusters, logits, k, positives=2):
    pv, ps = scl.visual_prediction(similarity, clusters, k, .1, own), logits.softmax(1)
    return torch.stack([scl.semantic_contrastive_loss(similarity, own, clusters, .1, positives),
                        scl.consistency_loss(pv, ps), scl.balance_loss(ps)])


def test_permuting_cluster_ids_changes_nothing():
    similarity, own, clusters = sample(k=4)
    logits = gaussian(len(own), 4)
    order = torch.tensor([2, 0, 3, 1])                              # cluster c becomes order[c]
    permuted = all_losses(similarity, own, order[clusters], logits[:, order.argsort()], 4)
    assert torch.allclose(permuted, all_losses(similarity, own, clusters, logits, 4))


def test_permuting_the_images_changes_nothing():
    similarity, own, clusters = sample(k=4)
    logits = gaussian(len(own), 4)
    rows, columns = torch.randperm(len(own)), torch.randperm(len(clusters))
    permuted = all_losses(similarity[rows][:, columns], columns.argsort()[own[rows]],
                          clusters[columns], logits[rows], 4)
    assert torch.allclose(permuted, all_losses(similarity, own, clusters, logits, 4))


def test_gradients_are_those_of_the_formulas():
    similarity, own, clusters = sample()
    logits = gaussian(len(own), 3)
    inputs = (similarity.requires_grad_(), logits.requires_grad_())
    assert torch.autograd.gradcheck(lambda s, l: all_losses(s, own, clusters, l, 3), inputs)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_losses_and_gradients_are_finite_at_extreme_inputs(scale):
    similarity, own, clusters = sample()
    s = (similarity.float() * scale).requires_grad_()
    logits = (gaussian(len(own), 3).float() * scale).requires_grad_()
    losses = all_losses(s, own, clusters, logits, 3)
    losses.sum().backward()
    assert losses.isfinite().all() and s.grad.isfinite().all() and logits.grad.isfinite().all()


@pytest.mark.parametrize("function", LOSSES, ids=lambda f: f.__name__)
def test_each_function_runs_when_pasted_alone(function):
    alone = {"torch": torch, "F": F, "math": math}
    exec(inspect.getsource(function), alone)
    similarity, own, clusters = sample()
    p = similarity.softmax(1)
    arguments = {"semantic_contrastive_loss": (similarity, own, clusters, .1, 2),
                 "visual_prediction": (similarity, clusters, 3, .1, own),
                 "consistency_loss": (p, p), "balance_loss": (p,),
                 "update_memory": (similarity, torch.tensor([4, 1]), similarity[:2], .5)}
    given = arguments[function.__name__]
    assert torch.equal(alone[function.__name__](*given), function(*given))


# ------------------------------------------------------------------------------------------------
# The memory

def test_memory_rows_stay_unit_and_only_the_rows_of_the_batch_change():
    rng = torch.Generator().manual_seed(0)
    memory, x = (F.normalize(torch.randn(n, 5, generator=rng), dim=1) for n in (9, 3))
    own = torch.tensor([7, 2, 4])
    new = scl.update_memory(memory, own, x, .5)
    assert torch.allclose(new.norm(dim=1), torch.ones(9))
    untouched = [0, 1, 3, 5, 6, 8]
    assert torch.equal(new[untouched], memory[untouched])
    assert torch.allclose(new[7], F.normalize(memory[7] + x[0], dim=0))    # .5: the bisector


def test_momentum_zero_keeps_the_newest_and_one_the_oldest_embedding():
    memory, x = torch.eye(3), torch.eye(3).roll(1, 0)
    rows = torch.arange(3)
    assert torch.equal(scl.update_memory(memory, rows, x, 0.), x)
    assert torch.equal(scl.update_memory(memory, rows, x, 1.), memory)


def test_the_memory_carries_no_gradient():
    x = F.normalize(torch.randn(2, 3), dim=1).requires_grad_()
    assert not scl.update_memory(torch.eye(3), torch.tensor([0, 1]), x, .5).requires_grad


# ------------------------------------------------------------------------------------------------
# The classifier and the data

def test_a_fitted_classifier_votes_for_the_clusters_it_was_given():
    rng = torch.Generator().manual_seed(0)
    clusters = torch.arange(300) % 3
    features = 5 + 3 * torch.randn(3, 6, generator=rng)[clusters]
    features += .1 * torch.randn(300, 6, generator=rng)
    classifier = torch.nn.Linear(6, 3)
    scl.fit_classifier(classifier, features, clusters)
    assert torch.equal(classifier(features).argmax(1), clusters)


def split_of(n, labels, name):
    return common.Split(torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8), labels,
                        [f"{name}/{i}" for i in range(n)])


def test_split_all_joins_train_and_test_and_leaves_out_what_cannot_be_scored():
    data = common.Dataset("d", split_of(4, torch.tensor([0, -1, 1, -1]), "train"),
                          split_of(2, torch.tensor([1, 0]), "test"), ["a", "b"], "")
    both = scl.together(data)
    assert not both.has_test
    assert both.train.labels.tolist() == [0, 1, 1, 0]
    assert both.train.names == ["train/0", "train/2", "test/0", "test/1"]
    assert torch.equal(both.train.images, torch.cat([data.train.images[[0, 2]], data.test.images]))


def test_split_all_takes_every_image_where_there_are_no_labels():
    data = common.Dataset("d", split_of(4, None, "train"), split_of(2, None, "test"), None, "")
    assert len(scl.together(data).train.images) == 6 and scl.together(data).train.labels is None


# ------------------------------------------------------------------------------------------------
# Whole runs, on 300 images

TINY = ("--width 2 --batch-size 32 --image-size 16 --epochs 4 --warmup .5 --positives 3 "
        "--device cpu").split()


def trained(folder, *flags):
    scl.train(scl.parse([*TINY, "--out", str(folder), *flags]))
    return common.load_checked(folder / "checkpoint.pt")


@pytest.mark.slow
@pytest.mark.usefixtures("few_shapes")
def test_a_run_leaves_its_scores_its_pictures_and_its_clusters(tmp_path):
    folder = tmp_path / "run"
    state = trained(folder)["state"]
    assert torch.allclose(state["memory"].norm(dim=1), torch.ones(300))
    assert state["clusters"].shape == (300,) and set(state["clusters"].tolist()) <= set(range(10))
    result = json.loads((folder / "result.json").read_text())
    assert {"scl, visual", "scl, boundary", "scl, both"} <= result["scores"].keys()
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert "agreement" not in log[1] and 0 <= log[2]["agreement"] <= 1 and log[2]["clusters"] >= 1
    for name in ("agreement.png", "views.png", "prototypes.png", "confusion.png", "clusters.csv",
                 "backbone.pt"):
        assert (folder / name).stat().st_size > 0


@pytest.mark.slow
@pytest.mark.usefixtures("few_shapes")
def test_the_baseline_is_instance_discrimination_to_the_end(tmp_path):
    state = trained(tmp_path / "run", "--contrast", "instance", "--alpha", "0")["state"]
    assert state["clusters"] is None
    assert not (tmp_path / "run" / "agreement.png").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("few_shapes")
@pytest.mark.parametrize("flags", [
    "--split all", "--train-size 100", "--clusters 23", "--alpha 0 --positives 0",
    "--contrast instance", "--assign both --vote sum", "--warmup 0", "--warmup 1"])
def test_every_variant_runs_to_its_report(tmp_path, flags):
    trained(tmp_path / "run", *flags.split())
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert all(0 <= s.get("kmeans", s)["acc"] <= 1 for s in result["scores"].values())
