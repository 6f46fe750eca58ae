"""scl.py: what its losses, its memory and its training must do."""
import inspect
import json
import math

import pytest
import torch
import torch.nn.functional as F

import common
import scl

LOSSES = (scl.exponentials, scl.cluster_votes, scl.memory_votes, scl.semantic_contrastive_loss,
          scl.visual_prediction, scl.consistency_loss, scl.balance_loss, scl.update_memory)


def gaussian(*shape, seed=2):
    """Float64 normal numbers, the same each time."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def sample(anchors=6, candidates=20, k=3, dim=8, seed=0):
    """Unit rows in float64: anchors (B, D), candidates (N, D); the candidate that shows each
    anchor's own image; a cluster for each candidate."""
    rng = torch.Generator().manual_seed(seed)
    z, memory = F.normalize(gaussian(anchors + candidates, dim, seed=seed), dim=1).split(
        [anchors, candidates])
    own = torch.randperm(candidates, generator=rng)[:anchors]
    return z, memory, own, torch.randint(0, k, (candidates,), generator=rng)


def contrast(z, memory, own, clusters, tau):
    """L_sem from the embeddings."""
    e = scl.exponentials(z, memory, tau)
    votes = scl.cluster_votes(e, clusters, int(clusters.max()) + 1)
    return scl.semantic_contrastive_loss(e, votes, own, clusters)


def looks(z, memory, clusters, k, tau):
    """pv from the embeddings."""
    e = scl.exponentials(z, memory, tau)
    return scl.visual_prediction(scl.cluster_votes(e, clusters, k), clusters)


# ------------------------------------------------------------------------------------------------
# Semantic contrast

def test_semantic_contrast_is_the_printed_sum():
    z, memory, own, clusters = sample()
    total = 0.
    for i, o in enumerate(own.tolist()):
        e = [math.exp(z[i].dot(m).item() / .3) for m in memory]
        pushed = [j for j in range(len(e)) if clusters[j] != clusters[o]]
        total -= math.log(e[o] / (e[o] + sum(e[j] for j in pushed))) / len(own)
    assert contrast(z, memory, own, clusters, .3).item() == pytest.approx(total, abs=1e-12)


def test_with_every_image_its_own_cluster_it_is_instance_discrimination():
    z, memory, own, _ = sample()
    e, each = scl.exponentials(z, memory, .1), torch.arange(len(memory))
    expected = F.cross_entropy(z @ memory.t() / .1, own)
    assert torch.allclose(scl.semantic_contrastive_loss(e, e, own, each), expected)


def test_within_a_batch_of_two_views_it_is_nt_xent_when_every_image_is_its_own_cluster():
    z = F.normalize(gaussian(10, 4), dim=1)
    twin, image = torch.arange(10).roll(5), torch.arange(5).repeat(2)
    logits = (z @ z.t() / .2).fill_diagonal_(-math.inf)             # NT-Xent: never against itself
    assert torch.allclose(contrast(z, z, twin, image, .2), F.cross_entropy(logits, twin))


def test_with_a_single_cluster_it_is_zero_and_so_is_its_gradient():
    z, memory, own, clusters = sample()
    z.requires_grad_()
    loss = contrast(z, memory, own, torch.zeros_like(clusters), .1)
    loss.backward()
    assert loss.item() == 0 and z.grad.abs().max() < 1e-15          # in float64


def test_equal_similarities_cost_the_logarithm_of_the_number_of_candidates():
    z, memory = torch.eye(2, 5), torch.eye(5)[[4] * 20]             # all at right angles
    loss = contrast(z, memory, torch.tensor([3, 0]), torch.arange(20), .1)
    assert loss.item() == pytest.approx(math.log(20))


def test_other_members_of_the_own_cluster_are_neither_pulled_nor_pushed():
    z, memory, own, clusters = sample()
    e = scl.exponentials(z, memory, .1).requires_grad_()
    votes = scl.cluster_votes(e, clusters, 3)
    scl.semantic_contrastive_loss(e, votes, own, clusters).backward()
    for i, o in enumerate(own.tolist()):
        for j, pull in enumerate((-e.grad[i]).tolist()):
            if clusters[j] != clusters[o]:
                assert pull < 0
            elif j == o:
                assert pull > 0
            else:
                assert pull == 0


def test_the_loss_is_exact_at_the_smallest_tau_that_the_flags_allow():
    with pytest.raises(SystemExit):
        scl.parse(["--tau", ".029"])
    tau = scl.parse(["--tau", ".03"]).tau
    # Two images, each with two opposite views: e_i,t_i is as far below e_ii as it can be.
    z = torch.tensor([[1., 0], [0, 1], [-1, 0], [0, -1]], requires_grad=True)
    clusters, twin = torch.tensor([0, 1, 0, 1]), torch.tensor([2, 3, 0, 1])
    e = scl.exponentials(z, z, tau)
    loss = scl.semantic_contrastive_loss(e, scl.cluster_votes(e, clusters, 2), twin, clusters)
    assert loss.item() == pytest.approx(math.log(1 + 2 * math.exp(1 / tau)), rel=1e-5)
    loss.backward()
    assert (z.grad.norm(dim=1) > .4 / tau).all()                    # it still pulls


# ------------------------------------------------------------------------------------------------
# The two predictions

def test_visual_prediction_is_the_printed_sum():
    z, memory, own, clusters = sample()
    sizes = torch.bincount(clusters).tolist()
    got = looks(z, memory, clusters, 3, .2)
    for i in range(len(z)):
        e = [math.exp(z[i].dot(m).item() / .2) for m in memory]
        mean = [sum(v for j, v in enumerate(e) if clusters[j] == c) / sizes[c] for c in range(3)]
        assert torch.allclose(got[i], torch.tensor(mean, dtype=got.dtype) / sum(mean))


@pytest.mark.parametrize("piece", [1, 7, 20, 8192])
def test_votes_of_the_memory_are_the_printed_sum_in_pieces_of_any_size(piece):
    z, memory, own, clusters = sample()
    rows = own[:3]                                                  # 6 anchors: 3 images, two views
    got = scl.memory_votes(z, rows, memory, clusters, 4, .2, piece)
    for i, o in enumerate(rows.tolist() * 2):
        expected = [0.] * 4
        for j, m in enumerate(memory):
            expected[clusters[j]] += math.exp(z[i].dot(m).item() / .2) * (j != o)
        assert torch.allclose(got[i], torch.tensor(expected, dtype=got.dtype))


def test_votes_of_the_memory_are_finite_at_the_smallest_tau_that_the_flags_allow():
    z = torch.eye(4)[[0, 0]].requires_grad_()
    memory = torch.cat([torch.eye(4)[[0] * 30], -torch.eye(4)[[0] * 30]])     # as near and far as
    votes = scl.memory_votes(z, torch.tensor([0]), memory,                    # it gets
                             (torch.arange(60) >= 30).long(), 2, .03)
    assert torch.allclose(votes[0], torch.tensor([29 * math.exp(1 / .03), 30 * math.exp(-1 / .03)]))
    votes.log().sum().backward()
    assert z.grad.isfinite().all()


def test_under_autocast_only_the_cosines_of_the_memory_lose_digits():
    z, memory, own, clusters = (t.float() if t.is_floating_point() else t for t in
                                sample(64, 500, dim=128))
    exact = scl.memory_votes(z, own[:32], memory, clusters, 3, .1)
    with torch.autocast("cpu", torch.bfloat16):
        fast = scl.memory_votes(z, own[:32], memory, clusters, 3, .1)
    assert fast.dtype == torch.float32 and not torch.equal(fast, exact)
    assert torch.allclose(fast, exact, rtol=.005)       # a sum in bfloat16 would be off by far more


def test_an_empty_cluster_gets_nothing_and_the_others_sum_to_one():
    z, memory, own, clusters = sample(k=3)
    p = looks(z, memory, clusters, 7, .1)
    assert torch.allclose(p.sum(1), torch.ones(len(p), dtype=p.dtype))
    assert (p[:, 3:] == 0).all()


def test_an_image_has_no_vote_on_its_own_cluster():
    memory = torch.eye(3)[[0, 0, 1]]
    clusters = torch.tensor([0, 2, 1])
    votes = scl.memory_votes(memory[[0, 0]], torch.tensor([0]), memory, clusters, 3, .1)
    p = scl.visual_prediction(votes, clusters)
    assert (p.argmax(1) == 2).all() and (p[:, 0] == 0).all()


def test_a_large_cluster_does_not_win_for_being_large():
    s = torch.tensor([.5, .4, .4, .4, .4])              # one near member, four less near ones
    memory, clusters = torch.stack([s, (1 - s**2).sqrt()], 1), torch.tensor([0, 1, 1, 1, 1])
    # tau = .1: e^5 = 148 against e^4 = 55 each: 148 to 55 by the mean, 148 to 218 by the sum
    p = looks(torch.tensor([[1., 0.]]), memory, clusters, 2, .1)
    assert p[0, 0].item() == pytest.approx(math.exp(5) / (math.exp(5) + math.exp(4)), abs=1e-6)


def test_the_consensus_is_where_the_product_of_both_predictions_is_largest():
    # Two images, two views each, the second views below. Means of pv: (.6, .4), (.4, .6).
    pv = torch.tensor([[.7, .3], [.4, .6], [.5, .5], [.4, .6]])
    ps = torch.tensor([[.5, .5], [.9, .1], [.5, .5], [.5, .5]])     # means: (.5, .5), (.7, .3)
    chosen, pair = scl.consensus(pv, ps)                            # .30 > .20, .28 > .18
    assert chosen.tolist() == [0, 0]
    assert pair.tolist() == [0 * 2 + 0, 1 * 2 + 0]                  # visual 0 and 1, boundary 0
    alone, _ = scl.consensus(pv, ps, alpha=0)                       # without the classifier
    assert alone.tolist() == [0, 1]


def test_consistency_is_the_printed_sum():
    pv, ps = torch.tensor([[.9, .1], [.5, .5]]), torch.tensor([[.8, .2], [1., 0.]])
    # -(ln(.9 * .8 + .1 * .2) + ln(.5 * 1 + .5 * 0)) / 2 = -(ln .74 + ln .5) / 2
    expected = -(math.log(.74) + math.log(.5)) / 2
    assert scl.consistency_loss(pv, ps).item() == pytest.approx(expected, abs=1e-6)


def test_consistency_is_lowest_when_both_predictions_are_sure_and_agree():
    sure = torch.eye(4)
    assert scl.consistency_loss(sure, sure).item() == pytest.approx(0, abs=1e-6)
    assert scl.consistency_loss(sure, torch.full((4, 4), .25)).item() == pytest.approx(math.log(4))
    assert scl.consistency_loss(sure, sure.roll(1, 0)).item() == pytest.approx(18.4, abs=.1)


def test_balance_is_the_printed_sum():
    logits = torch.tensor([[.7, .2, .1], [.1, .2, .7]], dtype=torch.float64).log() + 5
    entropy = -(2 * .4 * math.log(.4) + .2 * math.log(.2))          # means .4, .2, .4
    assert scl.balance_loss(logits).item() == pytest.approx(math.log(3) - entropy)


def test_balance_is_zero_for_even_use_and_ln_k_for_a_single_cluster():
    sure = 40 * torch.eye(4)
    assert scl.balance_loss(torch.zeros(5, 4)).item() == pytest.approx(0, abs=1e-6)
    assert scl.balance_loss(sure).item() == pytest.approx(0, abs=1e-6)          # each one sure
    assert scl.balance_loss(sure[:1].expand(5, -1)).item() == pytest.approx(math.log(4))


@pytest.mark.parametrize("gap", [10., 90., 110., 1e4])
def test_balance_has_a_finite_gradient_when_all_images_are_sure_of_one_cluster(gap):
    logits = torch.zeros(5, 3)
    logits[:, 1] = gap
    logits.requires_grad_()
    scl.balance_loss(logits).backward()
    assert logits.grad.isfinite().all()
    if gap == 10:                                                   # and it still points out
        assert (logits.grad[:, 1] > 0).all() and (logits.grad[:, [0, 2]] < 0).all()


# ------------------------------------------------------------------------------------------------
# All of them

def all_losses(z, memory, own, clusters, logits, k):
    e = scl.exponentials(z, memory, .1)
    pv = scl.visual_prediction(
        scl.memory_votes(z, own[:len(z) // 2], memory, clusters, k, .1), clusters)
    votes = scl.cluster_votes(e, clusters, k)
    return torch.stack([scl.semantic_contrastive_loss(e, votes, own, clusters),
                        scl.consistency_loss(pv, logits.softmax(1)), scl.balance_loss(logits)])


def test_permuting_cluster_ids_changes_nothing():
    z, memory, own, clusters = sample(k=4)
    logits, order = gaussian(len(own), 4), torch.tensor([2, 0, 3, 1])   # c becomes order[c]
    permuted = all_losses(z, memory, own, order[clusters], logits[:, order.argsort()], 4)
    assert torch.allclose(permuted, all_losses(z, memory, own, clusters, logits, 4))


def test_permuting_anchors_and_candidates_changes_nothing():
    z, memory, own, clusters = sample(k=4)
    logits = gaussian(len(own), 4)
    images, columns = torch.randperm(len(own) // 2), torch.randperm(len(clusters))
    rows = torch.cat([images, images + len(images)])                # both views of each
    now = columns.argsort()                                         # where a candidate went
    permuted = all_losses(z[rows], memory[columns], now[own[rows]], clusters[columns],
                          logits[rows], 4)
    assert torch.allclose(permuted, all_losses(z, memory, own, clusters, logits, 4))


def test_gradients_are_those_of_the_formulas():
    z, memory, own, clusters = sample()
    inputs = (z.requires_grad_(), gaussian(len(own), 3).requires_grad_())
    assert torch.autograd.gradcheck(
        lambda z, logits: all_losses(z, memory, own, clusters, logits, 3), inputs)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_losses_and_gradients_are_finite_at_extreme_inputs(scale):
    z, memory, own, clusters = sample()
    z = z.float().requires_grad_()                                  # always of unit length
    logits = (gaussian(len(own), 3).float() * scale).requires_grad_()
    losses = all_losses(z, memory.float(), own, clusters, logits, 3)
    losses.sum().backward()
    assert losses.isfinite().all() and z.grad.isfinite().all() and logits.grad.isfinite().all()


@pytest.mark.parametrize("function", LOSSES, ids=lambda f: f.__name__)
def test_each_function_runs_when_pasted_alone(function):
    alone = {"torch": torch, "F": F, "math": math, "exponentials": scl.exponentials,
             "cluster_votes": scl.cluster_votes}
    exec(inspect.getsource(function), alone)
    z, memory, own, clusters = sample()
    e = scl.exponentials(z, memory, .1)
    votes = scl.cluster_votes(e, clusters, 3)
    given = {"exponentials": (z, memory, .1), "cluster_votes": (e, clusters, 3),
             "memory_votes": (z, own[:3], memory, clusters, 3, .1),
             "semantic_contrastive_loss": (e, votes, own, clusters),
             "visual_prediction": (votes, clusters), "consistency_loss": (e, e),
             "balance_loss": (e,), "update_memory": (memory, own, z, .5)}[function.__name__]
    results = alone[function.__name__](*given), function(*given)
    assert results == (None, None) or torch.equal(*results)


# ------------------------------------------------------------------------------------------------
# One step: which loss trains what

def one_step(*flags, clusters=True):
    """losses() of 4 images in two views against a memory of 12 rows, 3 clusters."""
    z = F.normalize(gaussian(8, 5).float(), dim=1).requires_grad_()
    logits = gaussian(8, 3, seed=5).float().requires_grad_()
    memory = F.normalize(gaussian(12, 5, seed=7).float(), dim=1)
    given = torch.arange(12) % 3 if clusters else None
    rows = torch.tensor([7, 2, 4, 9])
    return z, logits, scl.losses(z, logits, rows, memory, given, scl.parse([*flags]))


def test_the_warm_up_is_instance_discrimination_in_the_batch():
    z, _, (loss, terms, pv, ps) = one_step(clusters=False)
    in_batch = (z @ z.t() / .2).fill_diagonal_(-math.inf)
    expected = F.cross_entropy(in_batch, torch.arange(8).roll(4))
    assert torch.allclose(loss, expected) and terms.keys() == {"semantic"}
    assert pv is None and ps is None


def test_with_clusters_images_of_the_own_cluster_are_no_negatives():
    z, _, (_, terms, _, _) = one_step()
    clusters = torch.tensor([7, 2, 4, 9] * 2) % 3
    in_batch = (z @ z.t() / .2).fill_diagonal_(-math.inf)
    twin = F.one_hot(torch.arange(8).roll(4)).bool()
    others = in_batch.masked_fill((clusters[:, None] == clusters) & ~twin, -math.inf)
    assert torch.allclose(terms["semantic"], F.cross_entropy(others, torch.arange(8).roll(4)))


def test_the_loss_is_the_weighted_sum_of_its_terms():
    loss, terms, _, _ = one_step("--alpha", "2", "--beta", "5")[2]
    assert torch.allclose(loss, terms["semantic"] + 2 * terms["consistency"]
                          + 5 * terms["balance"])


@pytest.mark.parametrize("term, trained", [
    ("semantic", "z"), ("consistency", "z and logits"), ("balance", "logits")])
def test_each_term_trains_what_the_text_says(term, trained):
    z, logits, (_, terms, _, _) = one_step()
    terms[term].backward()
    assert (z.grad is not None) == ("z" in trained.split())
    assert (logits.grad is not None) == ("logits" in trained.split())


def test_without_the_consistency_condition_the_classifier_learns_nothing():
    _, logits, (loss, terms, _, _) = one_step("--alpha", "0")
    loss.backward()
    assert logits.grad is None and terms.keys() == {"semantic"}


# ------------------------------------------------------------------------------------------------
# The memory and the classifier

def test_memory_rows_stay_unit_and_only_the_rows_of_the_batch_change():
    memory, z = (F.normalize(gaussian(n, 5), dim=1) for n in (9, 3))
    new = memory.clone()
    scl.update_memory(new, torch.tensor([7, 2, 4]), z, .5)
    assert torch.allclose(new.norm(dim=1), torch.ones(9, dtype=new.dtype))
    untouched = [0, 1, 3, 5, 6, 8]
    assert torch.equal(new[untouched], memory[untouched])
    assert torch.allclose(new[7], F.normalize(memory[7] + z[0], dim=0))        # .5: the bisector


def test_momentum_zero_keeps_the_newest_and_one_the_oldest_embedding():
    old, z = torch.eye(3), torch.eye(3).roll(1, 0)
    for momentum, expected in (0., z), (1., old):
        memory = old.clone()
        scl.update_memory(memory, torch.arange(3), z, momentum)
        assert torch.equal(memory, expected)


def test_the_memory_carries_no_gradient():
    z = F.normalize(torch.randn(2, 3), dim=1).requires_grad_()
    memory = torch.eye(3)
    scl.update_memory(memory, torch.tensor([0, 1]), z, .5)
    assert not memory.requires_grad


def test_a_fitted_classifier_votes_for_the_clusters_it_was_given():
    rng = torch.Generator().manual_seed(0)
    clusters = torch.arange(300) % 3
    features = 5 + 3 * torch.randn(3, 6, generator=rng)[clusters]
    features += .1 * torch.randn(300, 6, generator=rng)
    classifier = torch.nn.Linear(6, 3)
    scl.fit_classifier(classifier, features, clusters)
    assert torch.equal(classifier(features).argmax(1), clusters)
    assert classifier.weight.requires_grad                          # and goes on learning


# ------------------------------------------------------------------------------------------------
# Whole runs, on 300 images

TINY = ("--width 16 --stem-stride 2 --batch-size 32 --image-size 16 --epochs 4 --warmup .5 "
        "--device cpu").split()


def trained(folder, *flags):
    scl.train(scl.parse([*TINY, "--out", str(folder), *flags]))
    return common.load_checked(folder / "checkpoint.pt")["state"]


def results(folder):
    return json.loads((folder / "result.json").read_text())["scores"]


@pytest.mark.slow
@pytest.mark.usefixtures("few_shapes")
def test_a_run_leaves_its_scores_its_pictures_and_its_clusters(tmp_path):
    folder = tmp_path / "run"
    state = trained(folder)
    assert torch.allclose(state["memory"].norm(dim=1), torch.ones(300))
    assert state["clusters"].shape == (300,) and set(state["clusters"].tolist()) <= set(range(10))
    assert {"scl, visual", "scl, boundary", "k-means, embedding"} <= results(folder).keys()
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert "agreement" not in log[1] and 0 <= log[2]["agreement"] <= 1 and log[2]["clusters"] >= 1
    for name in ("agreement.png", "views.png", "prototypes.png", "confusion.png", "clusters.csv",
                 "backbone.pt"):
        assert (folder / name).stat().st_size > 0


@pytest.mark.slow
@pytest.mark.usefixtures("few_shapes")
def test_the_baseline_is_instance_discrimination_to_the_end(tmp_path):
    assert trained(tmp_path / "run", "--contrast", "instance", "--alpha", "0")["clusters"] is None
    assert not (tmp_path / "run" / "agreement.png").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("few_shapes")
def test_frozen_clusters_stay_those_of_the_hand_over(tmp_path, monkeypatch):
    first, hand_over = [], scl.hand_over

    def spy(*given):
        first.append(hand_over(*given))
        return first[0]
    monkeypatch.setattr(scl, "hand_over", spy)
    assert torch.equal(trained(tmp_path / "run", "--frozen")["clusters"], first[0])


@pytest.mark.slow
@pytest.mark.usefixtures("few_shapes")
@pytest.mark.parametrize("flags, rows", [
    ("--train-size 100", 2), ("--clusters 23", 2), ("--alpha 0", 1),
    ("--contrast instance", 2), ("--warmup 0", 2), ("--warmup 1", 0)])
def test_every_variant_runs_to_its_report(tmp_path, flags, rows):
    trained(tmp_path / "run", *flags.split())
    scores = results(tmp_path / "run")
    assert sum(name.startswith("scl, ") for name in scores) == rows
    assert all(0 <= s.get("kmeans", s)["acc"] <= 1 for s in scores.values())


def test_balance_is_of_probabilities_whatever_the_offset_of_an_images_logits():
    p = torch.tensor([[.7, .2, .1], [.1, .2, .7]], dtype=torch.float64)
    logits = p.log() + torch.tensor([[5.], [-3.]])
    entropy = -(2 * .4 * math.log(.4) + .2 * math.log(.2))          # means .4, .2, .4
    assert scl.balance_loss(logits).item() == pytest.approx(math.log(3) - entropy)


def test_the_consensus_is_a_product_and_not_a_sum():
    # Products .03, .075, .07; sums .65, .55, .8.
    pv, ps = torch.tensor([[.6, .3, .1]] * 2), torch.tensor([[.05, .25, .7]] * 2)
    assert scl.consensus(pv, ps)[0].tolist() == [1]


@pytest.mark.slow
@pytest.mark.usefixtures("few_shapes")
@pytest.mark.parametrize("flags, noted", [
    ("--epochs 1 --warmup .7", True), ("--epochs 2 --warmup .3", False), ("--warmup 1", False),
    ("--epochs 1 --warmup .7 --contrast instance --alpha 0", False)])
def test_a_run_too_short_for_clusters_says_so(tmp_path, capsys, flags, noted):
    trained(tmp_path / "run", *flags.split())
    assert ("its clusters are those of k-means" in capsys.readouterr().out) == noted
