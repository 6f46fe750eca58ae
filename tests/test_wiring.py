"""What the scripts hand to their functions, step by step."""
import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import identitize
import mask_mix
import scan
import scl

CPU = torch.device("cpu")
SCRIPTS = [scan, identitize, mask_mix, scl]
SMALL = "--image-size 16 --width 16 --batch-size 50 --epochs 2 --device cpu".split()
OWN = {"scan": "--cluster-epochs 2 --cluster-batch 50 --self-label-epochs 1 --self-label-batch 100 "
               "--threshold .11 --neighbours 5 --unsafe go".split(), "scl": "--warmup .5".split()}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def raw(n=32):
    return torch.randint(0, 256, (n, 3, 8, 8), generator=rng(), dtype=torch.uint8)


def tiny(module, folder, *more):
    module.main([*SMALL, *OWN.get(module.__name__, []), "--out", str(folder), *more])


# ------------------------------------------------------------------------------------------------
# All four

@pytest.mark.parametrize("module", SCRIPTS, ids=lambda m: m.__name__)
def test_the_random_network_of_the_report_is_the_untrained_one(
        module, tmp_path, monkeypatch, few_shapes):
    kept = []

    def look(data, untrained, *_):
        kept.append(copy.deepcopy(untrained.state_dict()))
        raise KeyboardInterrupt
    monkeypatch.setattr(module, "baselines", look)
    with pytest.raises(SystemExit):
        tiny(module, tmp_path / "run", "--seed", "3")
    torch.manual_seed(3)
    fresh = common.resnet18(16, 16, 2).state_dict()
    assert all(torch.equal(v, kept[0][k]) for k, v in fresh.items())


@pytest.mark.parametrize("module", SCRIPTS, ids=lambda m: m.__name__)
def test_the_log_tells_knn_of_training_images_while_features_are_learned(
        module, tmp_path, monkeypatch, few_shapes):
    monkeypatch.setattr(module, "evaluate", lambda *_: 1 / 0)      # what comes later
    with pytest.raises(ZeroDivisionError):
        tiny(module, tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(log) == 2 and all(0 < record["knn"] <= 1 for record in log)


@pytest.mark.parametrize("module", [identitize, mask_mix, scl], ids=lambda m: m.__name__)
def test_epochs_are_shuffled_anew_views_differ_and_rates_follow_the_schedule(
        module, tmp_path, monkeypatch, few_shapes):
    order, rates, views, real, set_lr = [], [], [], module.batches, module.set_lr

    def batches(images, index, size, make, *more):
        for rows, x1, x2, *rest in real(images, index, size, make, *more):
            order.append(rows)
            views.append((x1.clone(), x2.clone()))
            yield rows, x1, x2, *rest
    monkeypatch.setattr(module, "batches", batches)
    monkeypatch.setattr(module, "set_lr", lambda o, lr: rates.append(lr) or set_lr(o, lr))
    monkeypatch.setattr(module, "report", lambda *_: None)
    if module is identitize:
        monkeypatch.setattr(identitize, "matrix_now", lambda *_: torch.eye(2))
    warm, flags = (3, ["--lr-warmup", ".25"]) if module is mask_mix else (0, [])
    tiny(module, tmp_path / "run", "--lr", ".01", *flags)
    assert len(order) == len(rates) == 12                          # 300 images, 2 epochs of 6
    assert not torch.equal(order[0], order[6])
    assert not any(torch.equal(a, b) for a, b in views)
    parts = [6, 6] if module is scl else [12]                      # scl: the warm-up, the rest
    expected = [.01 * (s + 1) / warm if s < warm else
                .01 * (1 + math.cos(math.pi * (s - warm) / (n - warm))) / 2
                for n in parts for s in range(n)]
    assert rates == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------
# scan.py

class Notebook:
    """Stands for the Run of a step: it keeps what it is told, on no disk."""

    def __init__(self):
        self.epoch, self.saved, self.state, self.log, self.kept = 0, 0, {"stage": "before"}, [], []

    def save(self, **state):
        pass

    def end_epoch(self, record, images, **state):
        self.epoch += 1
        self.log.append(record)
        self.kept.append(copy.deepcopy(state["net"].state_dict()))


def step_1(monkeypatch, loss=scan.nt_xent_loss, *flags):
    """-> arguments of the loss, learning rates, images as they were shown"""
    seen, rates, shown, set_lr = [], [], [], scan.set_lr
    monkeypatch.setattr(scan, "nt_xent_loss", lambda *a: seen.append(a) or loss(*a))
    monkeypatch.setattr(scan, "set_lr", lambda o, lr: rates.append(lr) or set_lr(o, lr))
    views = {"simclr": lambda x, rng: shown.append(x) or x + torch.rand(x.shape, generator=rng)}
    args = scan.parse(["--batch-size=8", "--epochs=3", "--width=16", "--lr=.1", "--optimizer=sgd",
                       "--nt-xent=one-sided", *flags])
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 128))
    scan.pretext(args, Notebook(), net, raw(), views, lambda epoch: {}, CPU)
    return seen, rates, shown


def test_step_1_contrasts_two_simclr_views_of_unit_length(monkeypatch):
    seen, _, _ = step_1(monkeypatch)
    for z1, z2, tau, symmetric in seen:
        assert (tau, symmetric) == (.1, False) and not torch.equal(z1, z2)
        assert torch.allclose(torch.cat([z1, z2]).float().norm(dim=1), torch.ones(16), atol=1e-2)


def test_the_rate_of_step_1_is_half_a_cosine_over_all_steps(monkeypatch):
    rates = step_1(monkeypatch)[1]                                 # 4 steps an epoch
    assert rates == pytest.approx([.1 * (1 + math.cos(math.pi * s / 12)) / 2 for s in range(12)])


def test_step_1_shuffles_anew_in_each_epoch(monkeypatch):
    shown = step_1(monkeypatch)[2]                                 # all images, twice, 3 epochs
    assert len(shown) == 6 and not torch.equal(shown[0], shown[2])


def test_step_1_follows_the_gradient_of_one_batch_alone(monkeypatch):
    norms, step, losses = [], torch.optim.SGD.step, []

    def spy(self, *a):
        norms.append(sum(p.grad.abs().sum().item() for g in self.param_groups for p in g["params"]))
        return step(self, *a)
    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    step_1(monkeypatch, lambda z1, z2, *_: losses.append(1) or (z1 * z2).sum() * (len(losses) == 1))
    assert norms[0] > 0 and norms[1:] == [0] * 11


def step_2(monkeypatch, losses, images=12, heads=2, k=3):
    """scan.cluster on features; full_loss gives `losses`, a row for each epoch.
    -> the weights, notes, what the network was after each epoch, the drawn pairs"""
    given, seen, drawn = iter(losses), [], []
    monkeypatch.setattr(scan, "full_loss", lambda *_: torch.tensor(next(given)))
    args = scan.parse(["--pretext=x", f"--heads={heads}", f"--cluster-epochs={len(losses)}",
                       "--cluster-batch=6", "--cluster-lr=.1"])
    x = torch.randn(images, 4, generator=rng())
    near = scan.mine(F.normalize(x, dim=1), 2)
    torch.manual_seed(0)
    net = scan.Network(nn.Identity(), scan.cluster_heads(4, heads, k))

    def pairs(index, batch, rng):
        drawn.append(index)
        for rows in index.split(batch):
            yield rows, x[rows[:, 0]], x[rows[:, 1]]

    def logits_of(net):
        seen.append(copy.deepcopy(net.state_dict()))
        return net(x).detach()
    weights, notes = scan.cluster(args, Notebook(), net, near, {}, pairs, logits_of, None)
    return weights, notes, seen, drawn


def test_step_2_keeps_the_best_head_of_the_best_epoch(monkeypatch):
    weights, notes, seen, _ = step_2(monkeypatch, [[5., 4.], [3., 1.], [2., 6.]])
    assert notes["chosen"] == {"epoch": 2, "head": 1, "loss": 1.}
    for name in ("head.0.weight", "head.0.bias"):
        assert torch.equal(weights[name], seen[1][name][3:])       # rows 3 to 5: the second head


def test_step_2_draws_the_image_itself_or_a_neighbour_anew_in_each_epoch(monkeypatch):
    drawn = step_2(monkeypatch, [[1.]] * 20, heads=1)[3]
    assert all(torch.equal(d[:, 0], torch.arange(12)) for d in drawn)
    near, other = drawn[0][:, 0], torch.stack([d[:, 1] for d in drawn])
    assert not torch.equal(other[0], other[1])
    assert {len(set(column.tolist())) for column in other.t()} == {3}       # itself and two
    assert (other == near).any(0).all()


def step_3(flags, weak=1., n=16):
    """scan.self_label on images and a network with BatchNorm; its weak views are scaled by `weak`.
    -> the network before, the Notebook"""
    args = scan.parse(["--pretext=x", "--cluster-epochs=1", "--self-label-epochs=2",
                       "--self-label-batch=8", "--self-label-lr=.01", *flags])
    torch.manual_seed(0)
    net = scan.Network(nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.BatchNorm1d(6)),
                       scan.cluster_heads(6, 1, 3))
    before, run = copy.deepcopy(net.state_dict()), Notebook()
    run.epoch = 1
    views = {"weak": lambda x, rng: x * weak, "strong": lambda x, rng: 1 - x}
    scan.self_label(args, run, net, {"left_out": False}, raw(n), None, views, CPU)
    return before, run


def test_step_3_skips_a_batch_without_a_confident_image():
    before, run = step_3(["--threshold=1"])
    assert [r["skipped"] for r in run.log] == [2, 2]
    assert all(torch.equal(v, kept[k]) for kept in run.kept for k, v in before.items())


def test_step_3_labels_weak_views_in_eval_mode_and_trains_on_strong_ones(monkeypatch):
    seen, forward = [], scan.Network.forward
    monkeypatch.setattr(scan.Network, "forward", lambda net, x: seen.append(
        (net.training, x)) or forward(net, x))
    step_3(["--threshold=0"])
    assert [training for training, _ in seen] == [False, True] * 4
    for (_, weak), (_, strong) in zip(seen[::2], seen[1::2]):
        assert torch.allclose(strong, 1 - weak)


def test_step_3_has_the_weight_decay_of_all_steps(monkeypatch):
    decays, adam = [], torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda *a, **k: decays.append(
        k.get("weight_decay")) or adam(*a, **k))
    step_3(["--threshold=0", "--weight-decay=.5"])
    assert decays == [.5]


def test_step_2_shows_the_strong_view_of_an_image_and_that_of_its_neighbour(
        tmp_path, monkeypatch, few_shapes):
    kept, given = common.load_dataset("shapes", image_size=16).train.images.float() / 255, []
    same = {"simclr": lambda x, rng: x + torch.rand(x.shape, generator=rng),
            "strong": lambda x, rng: x, "weak": lambda x, rng: 1 - x}
    monkeypatch.setattr(scan, "make_views", lambda *_: same)

    def cluster(args, run, net, neighbours, notes, pairs, logits_of, labels):
        given.append(pairs)
        raise KeyboardInterrupt
    monkeypatch.setattr(scan, "cluster", cluster)
    with pytest.raises(SystemExit):
        tiny(scan, tmp_path / "run")
    index = torch.stack([torch.arange(300), torch.arange(300).flip(0)], 1)
    seen = list(given[0](index, 50, rng()))
    assert sorted(torch.cat([rows[:, 0] for rows, *_ in seen]).tolist()) == list(range(300))
    for rows, x1, x2 in seen:
        assert torch.equal(x1, kept[rows[:, 0]]) and torch.equal(x2, kept[rows[:, 1]])


def test_heads_mine_their_neighbours_on_raw_features(tmp_path, monkeypatch, few_shapes):
    backbone = nn.Sequential(nn.Identity(), nn.Sequential(nn.AvgPool2d(8), nn.Flatten()))
    statistics, mined = (torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)), []
    monkeypatch.setattr(scan, "load_frozen", lambda *_: (backbone, False, statistics, 32, "key"))

    def mine_neighbours(args, run, z, images, labels):
        mined.append(z)
        raise KeyboardInterrupt
    monkeypatch.setattr(scan, "mine_neighbours", mine_neighbours)
    with pytest.raises(SystemExit):
        scan.main(["--pretext", "resnet50", "--cluster-batch", "50", "--device", "cpu",
                   "--out", str(tmp_path / "run")])
    expected = nn.AvgPool2d(8)(common.load_dataset("shapes").train.images.float() / 255).flatten(1)
    assert torch.allclose(mined[0], expected, atol=1e-2)


def test_assign_reads_images_as_the_run_read_its_own(tmp_path, monkeypatch):
    decoding = {"size": 16, "fit": "pad", "grey": [3., 7.], "ground": 0}
    common.save_atomically(tmp_path / "model.pt", {
        "build": ["", 16, 16, 2, 3], "net": scan.build_network("", 16, 16, 2, 3).state_dict(),
        "statistics": [torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)], "decoding": decoding,
        "map": []})
    asked = []

    def read_data(args, **options):
        asked.append(options)
        raise KeyboardInterrupt
    monkeypatch.setattr(scan, "read_data", read_data)
    with pytest.raises(KeyboardInterrupt):
        scan.assign(scan.parse(["--assign", str(tmp_path), "--dataset=shapes", "--device", "cpu"]))
    assert asked[0]["fit"] == "pad" and asked[0]["decoding"] == decoding
    assert asked[0]["image_size"] == 16


@pytest.mark.parametrize("name, later", [("stl10", 20), ("cifar10", 60)])
def test_on_stl10_steps_2_and_3_learn_from_its_labelled_split_alone(name, later, monkeypatch):
    y = torch.where(torch.arange(60) < 20, torch.arange(60) % 2, -1)
    split = common.Split(torch.zeros(60, 3, 16, 16, dtype=torch.uint8), y, ["x"] * 60)
    data, asked = common.Dataset(name, split, split, ["a", "b"], "0"), []
    monkeypatch.setattr(common, "load_dataset", lambda *a, **b: data)

    def choose(args, n, *_):
        asked.append(n)
        raise KeyboardInterrupt
    monkeypatch.setattr(scan, "choose_neighbours", choose)
    with pytest.raises(KeyboardInterrupt):
        scan.train(scan.parse(["--dataset", name, "--batch-size", "8", "--device", "cpu"]))
    assert asked == [later]


# ------------------------------------------------------------------------------------------------
# scl.py

def batch_of_scl():
    z = F.normalize(torch.randn(8, 5, generator=rng()), dim=1)
    memory = F.normalize(torch.randn(12, 5, generator=rng(7)), dim=1)
    return z, torch.randn(8, 3, generator=rng(5)), torch.tensor([7, 2, 4, 9]), memory


def test_pv_is_voted_on_by_the_memory_but_not_by_the_images_own_row():
    z, logits, rows, memory = batch_of_scl()
    clusters = torch.arange(12) % 3
    args = scl.parse(["--tau", ".9", "--memory-tau", ".3"])
    pv = scl.losses(z, logits, rows, memory, clusters, args)[2]
    for i, own in enumerate([7, 2, 4, 9] * 2):
        e = [math.exp(z[i] @ m / .3) * (j != own) for j, m in enumerate(memory)]
        mean = torch.tensor([sum(e[c::3]) / 4 for c in range(3)])
        assert torch.allclose(pv[i], mean / mean.sum(), atol=2e-3)  # bfloat16 cosines


def test_the_instance_contrast_has_no_clusters_in_l_sem():
    z, logits, rows, memory = batch_of_scl()
    clusters, args = torch.arange(12) % 3, scl.parse(["--contrast", "instance"])
    _, terms, _, _ = scl.losses(z, logits, rows, memory, clusters, args)
    in_batch = (z @ z.t() / .2).fill_diagonal_(-math.inf)
    expected = F.cross_entropy(in_batch, torch.arange(8).roll(4))
    assert torch.allclose(terms["semantic"], expected)


@pytest.mark.parametrize("flags, moves", [("--warmup 1", False), ("--warmup 0 --alpha 0", False),
                                          ("--warmup 0", True)])
def test_the_classifier_of_scl_rests_while_no_loss_needs_it_also_when_compiled(
        flags, moves, tmp_path, monkeypatch, capsys, few_shapes):
    def compiled(net, **_):                                        # as torch.compile does: a
        def forward(x):                                            # gradient of 0 in place of none
            z, logits = net(x)
            return z + 0 * logits.sum(), logits
        return forward
    seen, end_epoch = [], common.Run.end_epoch

    def spy(run, record, images, net, **state):
        seen.append(net.classifier.weight.detach().clone())
        end_epoch(run, record, images, net=net, **state)
    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(common.Run, "end_epoch", spy)
    monkeypatch.setattr(scl, "report", lambda *_: None)
    tiny(scl, tmp_path / "run", *flags.split(), "--compile", "--epochs", "2")
    assert torch.equal(*seen) != moves


def test_a_run_of_scl_keeps_its_memory_and_chooses_its_clusters_anew(
        tmp_path, monkeypatch, capsys, few_shapes):
    steps, updates, losses, update = [], [], scl.losses, scl.update_memory

    def spy(z, logits, rows, memory, clusters, args):
        out = losses(z, logits, rows, memory, clusters, args)
        steps.append((z.detach(), rows, copy.deepcopy(clusters), *out[2:]))
        return out
    monkeypatch.setattr(scl, "losses", spy)
    monkeypatch.setattr(scl, "update_memory", lambda *a: updates.append(a) or update(*a))
    monkeypatch.setattr(scl, "report", lambda *_: None)
    tiny(scl, tmp_path / "run", "--epochs", "4", "--warmup", ".25", "--batch-size", "80",
         "--momentum", ".3")
    assert len(steps) == len(updates) == 12                        # 300 // 80 = 3 in an epoch
    assert [step[2] is None for step in steps] == [True] * 3 + [False] * 9      # the warm-up
    for (z, rows, *_), (_, same, mean, momentum) in zip(steps, updates):
        assert momentum == .3 and torch.equal(rows, same)
        assert torch.allclose(mean, F.normalize(z[:80] + z[80:], dim=1), atol=1e-6)
    for (_, rows, before, pv, ps), (_, _, after, *_) in zip(steps[3:], steps[4:]):
        expected = before.clone()
        expected[rows] = scl.consensus(pv, ps)[0]
        assert torch.equal(after, expected)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    for epoch in (1, 2):                                           # the last end is not seen here
        first, last = (steps[3 * e][2] for e in (epoch, epoch + 1))
        assert log[epoch]["moved"] == pytest.approx((first != last).float().mean().item())
        agree = [(pv[:80] + pv[80:]).argmax(1) == (ps[:80] + ps[80:]).argmax(1)
                 for *_, pv, ps in steps[3 * epoch:3 * epoch + 3]]
        assert log[epoch]["agreement"] == pytest.approx(torch.cat(agree).float().mean().item())
    warned = capsys.readouterr().out.count("WARNING: collapse")
    assert warned == sum(r.get("largest", 0) > .5 for r in log)
    assert max(r.get("largest", 0) for r in log) > .18             # above 1.8 / 10


def test_the_first_clusters_are_those_of_the_memory(monkeypatch):
    memory = F.normalize(torch.randn(32, 128, generator=rng()), dim=1)
    net = scl.Network(nn.Sequential(nn.Flatten(), nn.Linear(192, 8)), 8, 3)
    given = []
    monkeypatch.setattr(scl, "fit_classifier", lambda *a: given.append(a))
    statistics = torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    index = torch.arange(31, -1, -1)                               # rows of the memory: this order
    clusters = scl.hand_over(net, raw(), index, memory, statistics, SimpleNamespace(seed=0))
    assert torch.equal(clusters, common.kmeans(memory, 3, 0)[0])
    classifier, h, same = given[0]
    assert classifier is net.classifier and torch.equal(clusters, same)
    assert torch.allclose(h, common.embed(net.backbone, raw().flip(0), statistics, CPU))


# ------------------------------------------------------------------------------------------------
# identitize.py

def two_scores(b=12, k=5):
    return [torch.randn(b, k, generator=rng(s)) for s in (0, 1)]


def cosines(b=12, k=5):
    return [F.normalize(s, dim=1) for s in two_scores(b, k)]


def test_the_rivals_loss_is_swavs_with_swapped_targets_without_gradient():
    s1, s2 = (s.requires_grad_() for s in cosines())
    args = identitize.parse(["--targets=sinkhorn", "--sinkhorn-epsilon=.2", "--swap-weight=0"])
    loss, terms, _ = identitize.losses(s1, s2, args)
    q1, q2 = (identitize.sinkhorn(s.detach(), .2) for s in (s1, s2))
    p1, p2 = ((s / .1).softmax(1) for s in (s1, s2))
    expected = -sum(q2[b, k] * p1[b, k].log() + q1[b, k] * p2[b, k].log()
                    for b in range(12) for k in range(5)) / 24
    assert torch.allclose(terms["sinkhorn"], expected) and torch.allclose(loss, expected)
    ours, = torch.autograd.grad(loss, s1)
    assert torch.allclose(ours, ((p1 - q2) / .1 / 24).detach(), atol=1e-6)


def test_the_rivals_scores_are_cosines():
    net = identitize.Network(nn.Flatten(), 12, 7, cosine=True).eval()
    z = net.head(torch.randn(4, 3, 2, 2, generator=rng()).flatten(1))
    s = net(torch.randn(4, 3, 2, 2, generator=rng()))
    assert torch.allclose(s, F.cosine_similarity(z[:, None], net.clusters.weight[None], dim=2),
                          atol=1e-5)


def test_the_swap_of_a_step_takes_standardised_scores():
    s1, s2 = two_scores()
    s1, s2 = 3 * s1 + 1, 3 * s2 + 1
    terms, p1 = identitize.losses(s1, s2, identitize.parse([]))[1:]
    n1, n2 = identitize.standardise(s1), identitize.standardise(s2)
    assert torch.allclose(terms["swap"], identitize.swapped_assignment_loss(n1, n2))
    assert torch.allclose(p1, n1.softmax(1))
    assert torch.allclose(terms["confidence"], n1.softmax(1).amax(1).mean())


def test_the_matrix_of_the_picture_leaves_the_network_as_it_is():
    net = identitize.Network(nn.Sequential(nn.Flatten(), nn.Linear(192, 12)), 12, 7).eval()
    before = copy.deepcopy(net.state_dict())
    args = SimpleNamespace(seed=0, batch_size=8)
    identitize.matrix_now(net, raw(), torch.arange(32), lambda x, rng: (x, x.flip(3)), args, CPU)
    assert not net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def identitize_run(folder, monkeypatch, change=lambda out: out):
    """-> what losses gave in each step, the log"""
    steps, losses = [], identitize.losses

    def spy(*a):
        steps.append(change(losses(*a)))
        return steps[-1]
    monkeypatch.setattr(identitize, "losses", spy)
    monkeypatch.setattr(identitize, "report", lambda *_: None)
    monkeypatch.setattr(identitize, "matrix_now", lambda *_: torch.eye(2))
    tiny(identitize, folder)
    return steps, [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_log_counts_clusters_in_use_and_the_share_of_the_largest(
        tmp_path, monkeypatch, few_shapes):
    steps, log = identitize_run(tmp_path / "run", monkeypatch)
    for epoch in (0, 1):
        p = torch.cat([out[2] for out in steps[6 * epoch:6 * epoch + 6]])
        share = torch.bincount(p.argmax(1), minlength=16) / len(p)
        assert log[epoch]["largest"] == pytest.approx(share.max().item())
        assert log[epoch]["clusters"] == (share > 0).sum()


@pytest.mark.parametrize("extra, warned", [(.002, True), (.02, False)])
def test_uniform_assignments_are_a_collapse(
        extra, warned, tmp_path, monkeypatch, few_shapes, capsys):
    def uniform(out):                              # 1/16 = .0625: 3 % above it, and 30 %
        p = torch.full_like(out[2], 1 / 16)
        p[torch.arange(len(p)), torch.arange(len(p)) % 16] += extra
        return out[0], {**out[1], "confidence": p.amax(1).mean()}, p
    identitize_run(tmp_path / "run", monkeypatch, uniform)
    assert ("WARNING: collapse" in capsys.readouterr().out) == warned


def test_each_step_of_identitize_follows_its_own_gradient(tmp_path, monkeypatch, few_shapes):
    norms, step, done = [], torch.optim.Adam.step, []

    def first_only(out):
        done.append(1)
        return out[0] * (len(done) == 1), *out[1:]

    def spy(self, *a):
        norms.append(sum(p.grad.abs().sum().item() for g in self.param_groups for p in g["params"]))
        return step(self, *a)
    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    identitize_run(tmp_path / "run", monkeypatch, first_only)
    assert norms[0] > 0 and norms[1:] == [0] * 11


# ------------------------------------------------------------------------------------------------
# mask_mix.py and its detection

def mask_mix_run(folder, monkeypatch, *flags):
    """-> what happened in a run, in order; what optimizer and restore were given"""
    events, losses, ema, restore = [], mask_mix.losses, mask_mix.ema_update, common.Run.restore
    sgd, made, parts = torch.optim.SGD, [], []
    weight = lambda net: net.backbone.conv1.weight.detach().clone()             # noqa: E731
    monkeypatch.setattr(mask_mix, "losses", lambda online, *a: events.append(
        ("losses", weight(online))) or losses(online, *a))
    monkeypatch.setattr(mask_mix, "ema_update", lambda target, online, m: events.append(
        ("ema", weight(online))) or ema(target, online, m))
    monkeypatch.setattr(torch.optim, "SGD", lambda *a, **k: made.append(sgd(*a, **k)) or made[-1])
    monkeypatch.setattr(common.Run, "restore", lambda self, **p: parts.append({*p}) or
                        restore(self, **p))
    monkeypatch.setattr(mask_mix, "report", lambda *_: None)
    tiny(mask_mix, folder, *flags)
    return events, made[0], parts[0]


def test_the_target_follows_the_step_and_the_optimizer_is_as_its_flags_say(
        tmp_path, monkeypatch, few_shapes):
    events, optimizer, parts = mask_mix_run(
        tmp_path / "run", monkeypatch, "--predictor-lr", "5", "--weight-decay", ".001")
    assert [name for name, _ in events] == ["losses", "ema"] * 12
    for (_, before), (_, after), (_, later) in zip(events[::2], events[1::2], events[2::2]):
        assert not torch.equal(before, after) and torch.equal(after, later)
    slow, fast = optimizer.param_groups
    assert slow["momentum"] == fast["momentum"] == .9 and slow["weight_decay"] == .001
    assert fast["lr"] == pytest.approx(5 * slow["lr"]) and slow["lr"] > 0
    assert parts == {"online", "target", "optimizer"}


def test_the_erased_images_are_what_knn_is_asked_about(monkeypatch, few_shapes):
    data, seen = common.load_dataset("shapes"), []
    embed = mask_mix.embed
    monkeypatch.setattr(mask_mix, "embed", lambda net, images, *a: seen.append(images) or
                        embed(net, images, *a))
    statistics = common.pixel_statistics(data.train.images)
    args = mask_mix.parse(["--mask-ratio=.5"])
    list(mask_mix.erased_knn(nn.Flatten(), data, statistics, args, CPU))
    assert torch.equal(seen[0], data.train.images)
    for images in seen[1:]:
        kept = (images == data.test.images).all(1).float().mean()
        assert .4 < kept < .7


def test_the_mixing_picture_looks_for_predictions_not_projections():
    torch.manual_seed(0)
    online = mask_mix.Network(nn.Sequential(nn.Flatten(), nn.Linear(192, 8)), 8, hidden=8, dim=4)
    target, asked = copy.deepcopy(online), []
    target.predictor = nn.Identity()
    online.predictor.register_forward_hook(lambda *a: asked.append(a[2]))
    statistics = torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    picture = mask_mix.mixing_picture(online, target, raw(), statistics, 0, CPU)
    assert len(asked) == 1 and picture.size[0] == 6 * 66 + 2       # image, partner, four nearest
