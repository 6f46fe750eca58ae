"""scan.py: its three losses, its augmentations, its mining, and a short run of all three steps."""
import csv
import inspect
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps

import common
import scan

torch.set_num_threads(1)


def logits(*shape, seed=0, scale=2.):
    rng = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=rng, dtype=torch.float64)


# ---- the SCAN loss, Eq. (2)

def test_scan_loss_is_the_printed_sum():
    a, n, lam = logits(6, 4), logits(6, 4, seed=1), 5.
    p, q = a.softmax(1).tolist(), n.softmax(1).tolist()
    consistency = -sum(math.log(sum(p[i][c] * q[i][c] for c in range(4))) for i in range(6)) / 6
    mean = [sum(p[i][c] for i in range(6)) / 6 for c in range(4)]
    negative_entropy = sum(m * math.log(m) for m in mean)
    total, first, entropy = scan.scan_loss(a, n, lam)
    assert math.isclose(first.item(), consistency, rel_tol=1e-12)
    assert math.isclose(entropy.item(), -negative_entropy, rel_tol=1e-12)
    assert math.isclose(total.item(), consistency + lam * negative_entropy, rel_tol=1e-12)


@pytest.mark.parametrize("k, value", [(10, -9.2103), (20, -11.9829)])
def test_scan_loss_of_undecided_clusters_is_minus_four_ln_k(k, value):
    # consistency = -ln(k / k^2) = ln k, entropy = ln k: ln k - 5 ln k
    total, consistency, entropy = scan.scan_loss(torch.zeros(8, k), torch.zeros(8, k), 5.)
    assert abs(total.item() - value) < 1e-3
    assert abs(consistency.item() - math.log(k)) < 1e-5 and abs(entropy.item() - math.log(k)) < 1e-5


def test_scan_loss_is_lowest_when_neighbours_agree_surely_and_clusters_are_equal():
    sure = 1e4 * torch.eye(10).repeat(3, 1)
    assert abs(scan.scan_loss(sure, sure, 5.)[0].item() + 5 * math.log(10)) < 1e-4
    for seed in range(5):
        total = scan.scan_loss(logits(30, 10, seed=seed), logits(30, 10, seed=seed + 9), 5.)[0]
        assert total > -5 * math.log(10)


def test_scan_loss_of_one_single_cluster_is_zero():
    one = torch.zeros(8, 10)
    one[:, 3] = 1e4                                                # agrees, but entropy 0
    assert scan.scan_loss(one, one, 5.)[0].abs() < 1e-6


def test_scan_loss_does_not_care_for_the_names_of_clusters_or_the_order_of_images():
    a, n = logits(9, 5), logits(9, 5, seed=1)
    rows, columns = torch.randperm(9), torch.randperm(5)
    expected = scan.scan_loss(a, n, 5.)[0]
    assert torch.allclose(scan.scan_loss(a[:, columns], n[:, columns], 5.)[0], expected)
    assert torch.allclose(scan.scan_loss(a[rows], n[rows], 5.)[0], expected)


def test_gradients_of_the_scan_loss_flow_through_both_arguments_and_are_right():
    a, n = logits(4, 3).requires_grad_(), logits(4, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, n: scan.scan_loss(a, n, 5.)[0], (a, n))
    scan.scan_loss(a, n, 5.)[0].backward()
    assert a.grad.abs().min() > 0 and n.grad.abs().min() > 0


def test_losses_stay_finite_at_extreme_logits():
    a, n = 1e4 * logits(8, 5).sign().float(), -1e4 * logits(8, 5).sign().float()
    for loss in (lambda a, n: scan.scan_loss(a, n, 5.)[0],
                 lambda a, n: scan.self_label_loss(a, n, .99)):
        x, y = a.clone().requires_grad_(), n.clone().requires_grad_()
        value = loss(x, y)
        value.backward()
        assert value.isfinite() and y.grad.isfinite().all()
        assert x.grad is None or x.grad.isfinite().all()


# ---- NT-Xent

def naive_nt_xent(z1, z2, tau):
    """The one-sided sum: anchors of view 1 against 2B - 1 others."""
    total = 0.
    for i in range(len(z1)):
        others = [math.exp(float(z1[i] @ z2[j]) / tau) for j in range(len(z2))]
        others += [math.exp(float(z1[i] @ z1[j]) / tau) for j in range(len(z1)) if j != i]
        total -= math.log(others[i] / sum(others))
    return total / len(z1)


def test_nt_xent_is_the_naive_sum_in_both_forms():
    z1, z2 = (F.normalize(logits(5, 3, seed=s), dim=1) for s in (0, 1))
    ours = scan.nt_xent_loss(z1, z2, .1).item()
    assert math.isclose(ours, naive_nt_xent(z1, z2, .1), rel_tol=1e-10)
    both = (naive_nt_xent(z1, z2, .1) + naive_nt_xent(z2, z1, .1)) / 2
    assert math.isclose(scan.nt_xent_loss(z1, z2, .1, symmetric=True).item(), both, rel_tol=1e-10)


def test_nt_xent_at_its_extremes():
    same = F.normalize(torch.ones(8, 16), dim=1)
    assert abs(scan.nt_xent_loss(same, same, .1).item() - math.log(15)) < 1e-5      # ln(2B - 1)
    z = torch.eye(8)                                               # ln(1 + 14 e^-10)
    assert abs(scan.nt_xent_loss(z, z, .1).item() - math.log1p(14 * math.exp(-10))) < 1e-6


def test_only_the_symmetric_nt_xent_ignores_the_order_of_the_views():
    z1, z2 = (F.normalize(logits(5, 3, seed=s), dim=1) for s in (0, 1))
    assert torch.allclose(scan.nt_xent_loss(z1, z2, .1, True), scan.nt_xent_loss(z2, z1, .1, True))
    assert not torch.allclose(scan.nt_xent_loss(z1, z2, .1), scan.nt_xent_loss(z2, z1, .1))


# ---- self-labelling

def test_self_label_loss_is_cross_entropy_weighted_inversely_to_the_cluster_counts():
    weak, strong = logits(40, 4, scale=6.), logits(40, 4, seed=1)
    sure, label = weak.softmax(1).max(1)
    kept = sure > .9
    present = label[kept].unique()
    members = [kept & (label == c) for c in present]
    macro = sum(F.cross_entropy(strong[m], label[m]) for m in members) / len(present)
    weight = 1 / torch.bincount(label[kept], minlength=4).clamp(min=1).double()
    loss = scan.self_label_loss(weak, strong, .9)
    assert 0 < kept.sum() < 40
    assert torch.allclose(loss, macro)
    assert torch.allclose(loss, F.cross_entropy(strong[kept], label[kept], weight))


def test_the_threshold_is_strict():
    weak = torch.zeros(1, 2)                                       # maximum .5, exactly
    assert scan.self_label_loss(weak, weak, .5) == 0
    assert scan.self_label_loss(weak, weak, .4999) == pytest.approx(math.log(2))


def test_without_a_confident_image_the_loss_and_its_gradient_are_zero():
    strong = logits(8, 4).requires_grad_()
    loss = scan.self_label_loss(torch.zeros(8, 4), strong, .99)
    loss.backward()
    assert loss == 0 and (strong.grad == 0).all()


def test_no_gradient_reaches_the_weak_view():
    weak, strong = logits(8, 4, scale=9.).requires_grad_(), logits(8, 4, seed=1).requires_grad_()
    scan.self_label_loss(weak, strong, .5).backward()
    assert weak.grad is None and strong.grad.abs().sum() > 0
    assert torch.autograd.gradcheck(lambda s: scan.self_label_loss(weak, s, .5), strong)


@pytest.mark.parametrize("loss", [scan.nt_xent_loss, scan.scan_loss, scan.self_label_loss])
def test_each_loss_runs_when_pasted_alone(loss):
    names = {"torch": torch, "F": F, "math": math}
    exec(inspect.getsource(loss), names)
    a, b = (F.normalize(logits(6, 4, seed=s), dim=1) for s in (0, 1))
    pasted, here = names[loss.__name__](a, b, .1), loss(a, b, .1)
    assert torch.equal(torch.hstack(pasted if isinstance(pasted, tuple) else [pasted]),
                       torch.hstack(here if isinstance(here, tuple) else [here]))


# ---- mining

def test_mining_finds_what_brute_force_finds_and_never_the_image_itself():
    z = F.normalize(logits(50, 8), dim=1)
    z[7] = z[3]                                                    # twins: still not themselves
    found = scan.mine(z, 5)
    assert found.shape == (50, 6) and torch.equal(found[:, 0], torch.arange(50))
    for i in range(50):
        others = sorted((j for j in range(50) if j != i), key=lambda j: -float(z[i] @ z[j]))
        assert set(found[i, 1:].tolist()) == set(others[:5])
    assert found[7, 1] == 3 and found[3, 1] == 7


def test_without_neighbours_an_image_has_itself_alone():
    assert torch.equal(scan.mine(F.normalize(logits(5, 3), dim=1), 0), torch.arange(5)[:, None])


def test_full_loss_is_the_mean_over_all_pairs_of_an_image_and_a_neighbour():
    out, near = logits(20, 2, 3), scan.mine(F.normalize(logits(20, 4), dim=1), 4)
    p = out.softmax(2)
    for h in range(2):
        pairs = [-math.log(float(p[i, h] @ p[j, h])) for i in range(20) for j in near[i].tolist()]
        mean = p[:, h].mean(0)
        total = scan.full_loss(out, near)[h].item()
        assert math.isclose(total, np.mean(pairs) + float((mean * mean.log()).sum()), rel_tol=1e-9)


# ---- the strong augmentation: each operation against Pillow's own

def pictures(n=6, size=32):
    """Smooth random pictures, 8 bits: (n, 3, size, size) in [0, 1] and as PIL images."""
    x = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x = (F.interpolate(x, (size, size), mode="bicubic").clamp(0, 1) * 200 + 20).round()
    x[0, 1] = 77                                                   # a flat channel
    return x / 255, [Image.fromarray(i.byte().permute(1, 2, 0).numpy()) for i in x]


def affine(image, *matrix):
    return image.transform(image.size, Image.AFFINE, matrix)


PILLOW = {
    "Identity": lambda i, m: i,
    "AutoContrast": lambda i, m: ImageOps.autocontrast(i),
    "Equalize": lambda i, m: ImageOps.equalize(i),
    "Rotate": lambda i, m: i.rotate(m),
    "Solarize": lambda i, m: ImageOps.solarize(i, m),
    "Color": lambda i, m: ImageEnhance.Color(i).enhance(m),
    "Contrast": lambda i, m: ImageEnhance.Contrast(i).enhance(m),
    "Brightness": lambda i, m: ImageEnhance.Brightness(i).enhance(m),
    "Sharpness": lambda i, m: ImageEnhance.Sharpness(i).enhance(m),
    "ShearX": lambda i, m: affine(i, 1, m, 0, 0, 1, 0),
    "ShearY": lambda i, m: affine(i, 1, 0, 0, m, 1, 0),
    "TranslateX": lambda i, m: affine(i, 1, 0, m * i.size[0], 0, 1, 0),
    "TranslateY": lambda i, m: affine(i, 1, 0, 0, 0, 1, m * i.size[1]),
    "Posterize": lambda i, m: ImageOps.posterize(i, int(m)),
}


@pytest.mark.parametrize("name, low, high, operation", scan.OPERATIONS)
def test_each_operation_is_pillows_with_a_magnitude_for_each_image(name, low, high, operation):
    x, images = pictures()
    place = torch.tensor([.03, .21, .48, .66, .87, .99])
    magnitude = low + (high - low) * place
    ours = (operation(x, magnitude[:, None, None, None]) * 255).round()
    for i, image in enumerate(images):
        theirs = np.array(PILLOW[name](image, float(magnitude[i])))
        theirs = torch.from_numpy(theirs).permute(2, 0, 1)
        off = (ours[i] - theirs).abs()
        # Pillow truncates, and rounds ties its way
        assert (off <= 2).float().mean() > .995, (name, i, off.max())


def test_there_are_fourteen_operations_drawn_evenly():
    assert [o[0] for o in scan.OPERATIONS] == list(PILLOW) and len(PILLOW) == 14


def test_images_of_a_batch_are_augmented_differently_and_a_seed_repeats_them():
    x = pictures(1)[0].repeat(40, 1, 1, 1)
    one, two = (scan.random_operations(x, common.generator(0, 0, "a")) for _ in range(2))
    assert torch.equal(one, two)
    assert len({tuple(i.flatten().tolist()) for i in one}) > 35
    assert one.min() >= 0 and one.max() <= 1


def test_the_input_of_the_augmentation_is_left_alone():
    x = pictures()[0]
    before = x.clone()
    scan.random_operations(x, common.generator(0, 0, "a"))
    assert torch.equal(x, before)


def test_cutout_is_a_square_of_even_side_clipped_at_the_border():
    x = torch.ones(2000, 3, 32, 32)
    hole = scan.cutout(x, 16, common.generator(0, 0, "c"))[:, 0] == 0
    rows, columns = hole.any(2).sum(1), hole.any(1).sum(1)
    assert torch.equal(hole.flatten(1).sum(1), rows * columns)     # a rectangle
    border = [hole[:, 0], hole[:, -1], hole[:, :, 0], hole[:, :, -1]]
    inside = torch.stack([side.sum(1).eq(0) for side in border]).all(0)
    assert torch.equal(rows[inside], columns[inside])
    assert set(rows[inside].tolist()) == {0, 2, 4, 6, 8, 10, 12, 14, 16}


def test_cutout_erases_as_much_as_the_released_one_and_at_times_nothing():
    # The side is 2 (l // 2), l uniform in 1..16: with l = 1, of 16 draws, nothing is erased. The
    # mean share of 6.8 % at 32 px is that of the released code.
    x = torch.ones(20000, 1, 32, 32)
    erased = (scan.cutout(x, 16, common.generator(0, 0, "c")) == 0).float().flatten(1).mean(1)
    assert abs(erased.mean() - .068) < .001
    assert abs((erased == 0).float().mean() - 1 / 16) < .006


def test_cutout_keeps_the_memory_order_that_convolutions_like():
    x = torch.rand(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    out = scan.cutout(x, 8, torch.Generator().manual_seed(0))
    assert out.is_contiguous(memory_format=torch.channels_last) and (out == 0).any()


def test_cutout_comes_after_normalising():
    statistics = (torch.full((1, 3, 1, 1), .2), torch.full((1, 3, 1, 1), .5))
    strong = scan.make_views(scan.parse([]), 32, statistics)["strong"]
    view = strong(torch.rand(200, 3, 32, 32), common.generator(0, 0, "v"))
    # the mean colour; black would be -.4
    assert (view == 0).all(1).flatten(1).any(1).float().mean() > .85


def test_the_stem_for_96_px_pools_two_by_two_without_overlap():
    x = torch.rand(2, 3, 96, 96)
    assert torch.equal(common.resnet18(96).maxpool(x), F.max_pool2d(x, 2, 2))
    assert not torch.equal(F.max_pool2d(x, 3, 2, 1), F.max_pool2d(x, 2, 2))     # of equal size


# ---- what is wrong with a clustering

def clustering(clusters, confidence):
    c, p = torch.tensor(clusters), torch.tensor(confidence)
    return common.Clustering(c, c, p, p)


def test_a_good_clustering_has_nothing_wrong():
    assert scan.complaint(clustering([0, 1, 2], [.999, .999, .999]), 3, .99) == ""


def test_empty_clusters_and_unsure_ones_are_counted_apart():
    found = clustering([0, 0, 1, 1, 4], [.999, .5, .5, .6, .999])
    text = scan.complaint(found, 5, .99)                           # 2 and 3 empty, 1 unsure
    assert "2 of 5 clusters are empty" in text and "in 1 of 5 clusters fewer than 5 %" in text


# ---- the script

TINY = ["--width", "16", "--image-size", "16", "--batch-size", "64", "--epochs", "2",
        "--cluster-epochs", "2", "--cluster-batch", "50", "--self-label-epochs", "2",
        "--self-label-batch", "100", "--threshold", ".11", "--neighbours", "5", "--device", "cpu",
        "--unsafe", "go"]


def run(out, *more):
    scan.train(scan.parse([*TINY, "--out", str(out), *more]))
    return common.load_checked(out / "checkpoint.pt")["state"]


def result(out):
    return json.loads((out / "result.json").read_text())


def records(out, stage):
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["stage"] == stage]


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def stop_after(monkeypatch):
    """stop_after(epoch): runs end there as by a kill, after a checkpoint."""
    def at(epoch):
        whole = common.Run.end_epoch

        def end_epoch(self, *given, **state):
            whole(self, *given, **state)
            if self.epoch == epoch:
                raise KeyboardInterrupt
        monkeypatch.setattr(common.Run, "INTERVAL", 0)
        monkeypatch.setattr(common.Run, "end_epoch", end_epoch)
        return whole
    return at


@pytest.mark.slow
def test_a_run_leaves_its_pictures_and_rows_for_all_steps(few_shapes, tmp_path):
    run(tmp_path / "a")
    left = {f.name for f in (tmp_path / "a").iterdir()}
    assert {"neighbours.png", "prototypes.png", "confusion.png", "views.png", "backbone.pt",
            "pretext.pt", "model.pt", "clusters.csv"} <= left
    found = result(tmp_path / "a")
    rows = {"raw pixels", "pretext + k-means", "SCAN loss", "+ self-label"}
    assert rows <= found["scores"].keys() and len(found["map"]) == 10
    assert found["neighbour_accuracy"].keys() == {"top-1", "top-5"}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_without_a_confident_image_step_3_changes_no_weight(
        few_shapes, tmp_path, capsys, monkeypatch, mode):
    given, stage = {}, scan.self_label

    def self_label(args, run, net, *more):
        given.update({k: v.clone() for k, v in net.backbone.state_dict().items()})
        return stage(args, run, net, *more)
    monkeypatch.setattr(scan, "self_label", self_label)
    run(tmp_path / "a", "--threshold", "1", "--weak-pass", mode)
    assert [r["skipped"] for r in records(tmp_path / "a", "self-label")] == [3, 3]
    assert "as step 2 left them" in capsys.readouterr().out
    after = torch.load(tmp_path / "a" / "backbone.pt", weights_only=True)
    changed = {k for k in given if not torch.equal(given[k], after[k])}
    # In train mode the pass for pseudo-labels moves the statistics of BatchNorm, as released.
    assert (not changed) if mode == "eval" else changed == {
        k for k in given if "running" in k or "num_batches" in k}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_pseudo_labels_come_from_a_pass_in_the_mode_that_was_asked_for(
        few_shapes, tmp_path, monkeypatch, mode):
    seen, whole, stage = [], scan.Network.forward, scan.self_label

    def forward(net, x):
        seen.append((torch.is_grad_enabled(), net.training))
        return whole(net, x)

    def self_label(*given):
        monkeypatch.setattr(scan.Network, "forward", forward)
        notes = stage(*given)
        monkeypatch.setattr(scan.Network, "forward", whole)
        return notes
    monkeypatch.setattr(scan, "self_label", self_label)
    run(tmp_path / "a", "--weak-pass", mode, "--threshold", "0")
    assert seen == [(False, mode == "train"), (True, True)] * 6    # 2 epochs of 3 steps


@pytest.mark.slow
def test_an_unsafe_hand_over_stops_before_step_3_by_default(few_shapes, tmp_path, capsys):
    run(tmp_path / "a", "--threshold", "1", "--unsafe", "stop")
    text = capsys.readouterr().out
    assert text.count("step 3 is left out (--unsafe go runs it)") == 1
    assert not records(tmp_path / "a", "self-label")
    found = result(tmp_path / "a")
    assert found["left_out"] and "+ self-label" not in found["scores"]


@pytest.mark.slow
def test_a_run_interrupted_in_step_3_repeats_neither_scores_nor_warnings(
        few_shapes, tmp_path, capsys, monkeypatch, stop_after):
    whole = stop_after(5)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", "--threshold", ".2")
    first = capsys.readouterr().out
    assert first.count("after step 2") == 1
    monkeypatch.setattr(common.Run, "end_epoch", whole)
    resumed = run(tmp_path / "a", "--threshold", ".2", "--resume")
    assert "after step 2" not in capsys.readouterr().out
    assert same_weights(resumed["net"], run(tmp_path / "b", "--threshold", ".2")["net"])
    assert result(tmp_path / "a")["scores"] == result(tmp_path / "b")["scores"]


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [1, 3])
def test_a_run_made_with_a_pretext_file_goes_on_without_the_file(
        few_shapes, tmp_path, monkeypatch, stop_after, epoch):
    run(tmp_path / "a")
    file = tmp_path / "pretext.pt"
    file.write_bytes((tmp_path / "a" / "pretext.pt").read_bytes())
    given = ["--pretext", str(file)]
    whole = stop_after(epoch)                                      # in step 2; in step 3
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", *given)
    monkeypatch.setattr(common.Run, "end_epoch", whole)
    uninterrupted = run(tmp_path / "c", *given)["net"]
    file.unlink()
    assert same_weights(run(tmp_path / "b", *given, "--resume")["net"], uninterrupted)


@pytest.mark.slow
def test_more_clusters_than_classes_are_scored_by_majority_vote(few_shapes, tmp_path):
    run(tmp_path / "a", "--clusters", "20", "--heads", "3")
    found = result(tmp_path / "a")
    assert found["scores"]["SCAN loss"]["rule"] == "majority vote" and len(found["map"]) == 20


@pytest.mark.slow
def test_a_backbone_of_another_shape_stem_or_size_is_refused(few_shapes, tmp_path):
    run(tmp_path / "a")
    file = str(tmp_path / "a" / "backbone.pt")
    for more, word in ((["--width", "32"], "width"), (["--stem-stride", "1"], "stem-stride"),
                       (["--image-size", "32"], "image-size")):
        with pytest.raises(common.UserError, match=word):
            run(tmp_path / "c", "--pretext", file, *more)
    weights = torch.load(file, weights_only=True)
    weights.pop("layer2.0.bn1.weight")
    torch.save(weights, tmp_path / "part.pt")
    (tmp_path / "broken.pt").write_bytes(b"nothing")
    for name, word in (("part.pt", "layer2.0.bn1.weight is absent"), ("broken.pt", "broken.pt"),
                       ("none.pt", "none.pt")):
        with pytest.raises(common.UserError, match=word):
            run(tmp_path / "d", "--pretext", str(tmp_path / name))
    assert not (tmp_path / "c").exists() and not (tmp_path / "d").exists()


@pytest.mark.slow
@pytest.mark.parametrize("text", ["[1, 2]", "{\"settings\": 3, \"dataset\": 4}", "no JSON"])
def test_a_result_of_another_tool_beside_the_pretext_file_is_ignored(few_shapes, tmp_path, text):
    run(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.pt").write_bytes((tmp_path / "a" / "backbone.pt").read_bytes())
    (tmp_path / "b" / "result.json").write_text(text)
    run(tmp_path / "c", "--pretext", str(tmp_path / "b" / "mine.pt"))


@pytest.mark.slow
def test_assign_gives_the_images_of_a_run_the_clusters_that_the_run_gave_them(
        few_shapes, tmp_path, capsys):
    run(tmp_path / "a")
    scan.main(["--assign", str(tmp_path / "a"), "--dataset", "shapes", "--out",
               str(tmp_path / "b"), "--device", "cpu"])
    same = [(tmp_path / name / "clusters.csv").read_text() for name in "ab"]
    assert same[0] == same[1]
    text, found = capsys.readouterr().out, result(tmp_path / "b")
    assert "cluster 0 is mostly" in text and found["map"] == result(tmp_path / "a")["map"]
    assert abs(found["acc"] - result(tmp_path / "a")["scores"]["+ self-label"]["acc"]) < 1e-6
    assert (tmp_path / "b" / "prototypes.png").exists()


def test_a_step_does_not_go_on_from_the_checkpoint_of_another_step():
    run = SimpleNamespace(name="run", state={"stage": "self-label"})
    run.restore = lambda **parts: run.state.update(stage="cluster") or {"notes": {}}
    with pytest.raises(common.UserError, match="remove checkpoint.pt"):
        scan.enter(run, "self-label", None, None, notes={})


def test_assign_needs_a_finished_run(tmp_path):
    flags = ["--assign", str(tmp_path), "--dataset", "shapes", "--out", str(tmp_path / "o")]
    for content, why in ((None, "no finished run"), (b"nothing", "model.pt: File is not a zip")):
        if content:
            (tmp_path / "model.pt").write_bytes(content)
        with pytest.raises(common.UserError, match=f"--assign.*{why}"):
            scan.assign(scan.parse(flags))


@pytest.mark.parametrize("part, value", [
    ("decoding", []), ("decoding", None), ("map", None), ("map", ["cat"]), ("map", [1, 2, 3]),
    ("statistics", 3), ("statistics", [torch.zeros(2)] * 2), ("build", ["", 0, 16, 2, 3]),
    ("build", ["", 32, 16, 0, 3]), ("build", ["", 32, 16, 2, 4]), ("build", "text")])
def test_assign_refuses_a_model_whose_parts_do_not_fit(part, value, tmp_path):
    net = scan.build_network("", 32, 16, 2, 3)
    torch.save({"build": ["", 32, 16, 2, 3], "net": net.state_dict(), "decoding": {}, "map": [],
                "statistics": [torch.ones(1, 3, 1, 1)] * 2, part: value}, tmp_path / "model.pt")
    with pytest.raises(common.UserError, match="--assign"):
        scan.assign(scan.parse(["--assign", str(tmp_path), "--dataset", "shapes"]))


@pytest.mark.slow
def test_a_folder_without_labels_ends_with_a_sheet_for_each_cluster_and_no_score(tmp_path, capsys):
    rng, photos = np.random.default_rng(0), tmp_path / "photos"
    photos.mkdir()
    for i in range(60):
        pixels = rng.integers(0, 256, (30 + i % 7, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{i}.png")
    (photos / "broken.jpg").write_bytes(b"not a picture")
    scan.train(scan.parse(["--dataset", str(photos), "--data-dir", str(tmp_path), "--clusters",
                           "3", "--width", "16", "--epochs", "1", "--cluster-epochs", "2",
                           "--self-label-epochs", "1", "--unsafe", "go", "--out",
                           str(tmp_path / "out"), "--device", "cpu"]))
    text = capsys.readouterr().out
    assert "ACC" not in text and "broken.jpg" in text and "Balance" in text and "Confidence" in text
    with open(tmp_path / "out" / "clusters.csv") as file:
        rows = list(csv.DictReader(file))
    assert {r["image"] for r in rows} == {f"{i}.png" for i in range(60)}
    sheets = {f.name for f in (tmp_path / "out" / "sheets").iterdir()}
    assert sheets == {f"cluster-{int(r['cluster']):03}.png" for r in rows}
    assert not (tmp_path / "out" / "confusion.png").exists()


@pytest.mark.slow
def test_on_shapes_the_scan_step_finds_most_shapes_and_self_labelling_keeps_them(
        tmp_path, two_threads):
    short = "--epochs 10 --cluster-epochs 4 --self-label-epochs 2 --unsafe go --device cpu".split()
    scan.train(scan.parse([*short, "--out", str(tmp_path / "a")]))
    scores = result(tmp_path / "a")["scores"]
    assert scores["SCAN loss"]["acc"] > .9 > .3 > scores["raw pixels"]["kmeans"]["acc"]
    assert scores["+ self-label"]["acc"] > scores["SCAN loss"]["acc"] - .02


def test_mining_is_exact_beyond_the_first_chunk_of_rows():
    rng = torch.Generator().manual_seed(0)
    z = F.normalize(torch.randn(8400, 4, generator=rng), dim=1)    # chunks of 2^26 / N = 7989 rows
    near = scan.mine(z, 1)
    assert (near[:, 0] == torch.arange(8400)).all() and (near[:, 1] != near[:, 0]).all()


@pytest.mark.parametrize("n, clusters, most, chosen", [
    (5000, 10, 200, 166), (50000, 10, 20, 20), (20, 10, 20, 1)])
def test_neighbours_are_at_most_a_third_of_a_cluster(n, clusters, most, chosen):
    args = SimpleNamespace(neighbours=None)
    scan.choose_neighbours(args, n, clusters, most)
    assert args.neighbours == chosen


def test_an_image_has_one_neighbour_less_than_there_are_images():
    scan.choose_neighbours(SimpleNamespace(neighbours=19), 20, 2, 20)
    with pytest.raises(common.UserError, match="has 19 others"):
        scan.choose_neighbours(SimpleNamespace(neighbours=20), 20, 2, 20)


def test_neighbours_are_mined_by_cosine_and_their_accuracy_is_that_of_the_nearest_k(tmp_path):
    # Directions on a circle, of any length; the two nearest of an image are those beside it.
    angle = torch.arange(8) * .1 + torch.arange(8) ** 2 * .001
    z = torch.stack([angle.cos(), angle.sin()], 1) * torch.logspace(0, 3, 8)[:, None]
    labels = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])
    near, shares = scan.mine_neighbours(
        SimpleNamespace(neighbours=6), SimpleNamespace(folder=tmp_path), z,
        torch.zeros(8, 3, 4, 4, dtype=torch.uint8), labels)
    unit = F.normalize(z.double(), dim=1)
    order = (unit @ unit.t()).fill_diagonal_(-2).argsort(1, descending=True)
    assert torch.equal(near[:, 1:].long(), order[:, :6])
    right = (labels[order] == labels[:, None]).double()
    assert shares == {"top-1": pytest.approx(right[:, :1].mean().item()),
                      "top-5": pytest.approx(right[:, :5].mean().item())}
    assert shares["top-1"] != pytest.approx(shares["top-5"])


def test_full_loss_takes_the_image_and_its_five_nearest():
    g = torch.Generator().manual_seed(0)
    out = torch.randn(20, 1, 3, generator=g, dtype=torch.float64)
    near = scan.mine(F.normalize(torch.randn(20, 4, generator=g, dtype=torch.float64), dim=1), 9)
    p = out[:, 0].softmax(1)
    pairs = [-math.log(float(p[i] @ p[j])) for i in range(20) for j in near[i, :6].tolist()]
    expected = np.mean(pairs) + float((p.mean(0) * p.mean(0).log()).sum())
    assert scan.full_loss(out, near)[0].item() == pytest.approx(expected, rel=1e-9)


def found(clusters, confidence):
    c, p = torch.tensor(clusters), torch.tensor(confidence)
    return common.Clustering(c, c, p, p)


def test_a_cluster_is_unsure_below_five_percent_above_the_threshold():
    assert scan.complaint(found([0] * 20, [.9] + [.1] * 19), 1, .5) == ""       # 5 %
    assert "in 1 of 1" in scan.complaint(found([0] * 21, [.9] + [.1] * 20), 1, .5)
    assert "in 1 of 1" in scan.complaint(found([0] * 20, [.5] * 20), 1, .5)     # not above it


def test_four_operations_are_drawn_for_each_image(monkeypatch):
    monkeypatch.setattr(scan, "OPERATIONS", (("Identity", 0, 0, lambda x, m: x),
                                             ("Add", 0, 0, lambda x, m: x + 1)))
    rng = torch.Generator().manual_seed(0)
    made = scan.random_operations(torch.zeros(300, 3, 2, 2), rng)[:, 0, 0, 0]
    assert set(made.tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("size, longest", [(32, 16), (64, 32), (65, 21), (96, 32)])
def test_a_strong_view_is_mirrored_half_of_the_time_and_cut_by_the_released_size(
        size, longest, monkeypatch):
    cut = []
    monkeypatch.setattr(scan, "random_operations", lambda x, rng: x)
    monkeypatch.setattr(scan, "cutout", lambda x, longest, rng: cut.append(longest) or x)
    statistics = torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).expand(200, -1, -1, -1)
    strong = scan.make_views(scan.parse([]), size, statistics)["strong"]
    out = strong(x, torch.Generator().manual_seed(1))
    mirrored = (out == x.flip(3)).flatten(1).all(1)
    assert (mirrored | (out == x).flatten(1).all(1)).all() and cut == [longest]
    assert abs(mirrored.float().mean() - .5) < .15


@pytest.mark.slow
def test_with_a_backbone_the_settings_of_step_1_are_neither_printed_nor_in_the_way(
        few_shapes, tmp_path, capsys):
    torch.save(common.resnet18(32, 16, 2).state_dict(), tmp_path / "backbone.pt")
    scan.train(scan.parse([
        "--pretext", str(tmp_path / "backbone.pt"), "--train-size", "30", "--cluster-epochs", "1",
        "--self-label-epochs", "0", "--device", "cpu", "--out", str(tmp_path / "a")]))
    line, = re.findall("^settings for .*$", capsys.readouterr().out, re.M)
    assert "--cluster-epochs" not in line and "--cluster-lr" in line   # the first was given
    assert not re.search("--(epochs|batch-size|lr|optimizer|crop|nt-xent) ", line)
