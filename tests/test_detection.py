"""The detection transfer of mask_mix.py: scenes, average precision, loaded backbones, a run."""
import json

import numpy as np
import pytest
import torch

import common
import mask_mix
from mask_mix import average_precision, draw_scenes, make_detector

STATISTICS = [.4] * 3, [.25] * 3


def found_boxes(*boxes):
    """(label, score, x1, y1, x2, y2), ... of one image."""
    table = torch.tensor(boxes).view(-1, 6)
    return {"labels": table[:, 0].long(), "scores": table[:, 1], "boxes": table[:, 2:]}


def true_boxes(*boxes):
    """(label, x1, y1, x2, y2), ... of one image."""
    table = torch.tensor(boxes).view(-1, 5)
    return {"labels": table[:, 0].long(), "boxes": table[:, 1:].float()}


# ---- the scenes

def test_a_scene_shows_one_to_four_shapes_and_all_kinds_occur():
    _, truth = draw_scenes(200, 96, 3)
    assert {len(t["labels"]) for t in truth} == {1, 2, 3, 4}
    assert set(torch.cat([t["labels"] for t in truth]).tolist()) == set(range(1, 11))


class Quiet:
    """numpy's generator without noise."""

    def __init__(self, seed):
        self.rng = np.random.Generator(np.random.PCG64(seed))

    def __getattr__(self, name):
        return getattr(self.rng, name)

    def standard_normal(self, shape, dtype):
        return np.zeros(shape, dtype)


def test_boxes_are_tight_and_no_shape_is_outside_of_them(monkeypatch):
    monkeypatch.setattr(np.random, "default_rng", Quiet)
    images, truth = draw_scenes(60, 96, 1)
    for image, t in zip(images.float().mean(1), truth):
        # A shape is at least .25 = 64 levels above its ground, its pixels at the edge half of that.
        # The slope of the ground is at most .05 = 13 levels from end to end, in both directions.
        outside = torch.ones(96, 96, dtype=torch.bool)
        for x1, y1, x2, y2 in t["boxes"].int().tolist():
            outside[y1 - 2:y2 + 2, x1 - 2:x2 + 2] = False          # tips fade out over two pixels
        ground = image[outside].median()
        assert (image[outside] - ground).abs().max() < 14
        for x1, y1, x2, y2 in t["boxes"].int().tolist():
            shape = image[y1:y2, x1:x2] > ground + 16
            assert all(edge.any() for edge in (shape[0], shape[-1], shape[:, 0], shape[:, -1]))


def test_boxes_lie_in_the_scene_and_differ_in_size():
    _, truth = draw_scenes(200, 96, 2)
    boxes = torch.cat([t["boxes"] for t in truth])
    assert boxes.min() >= 0 and boxes.max() <= 96
    longest = (boxes[:, 2:] - boxes[:, :2]).amax(1)
    assert longest.min() < 16 and longest.max() > 30


def test_a_seed_draws_the_same_scenes_and_another_seed_other_ones():
    first, again, other = (draw_scenes(4, 96, seed)[0] for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)


# ---- average precision

def slow_average_precision(found, truth, threshold):
    """Loops over the definition: at each of the recalls 1/n, 2/n, ..., 1 take the best precision
    that any cut of the ranking reaches with at least that recall; then their mean."""
    def iou(a, b):
        w = min(a[2], b[2]) - max(a[0], b[0])
        h = min(a[3], b[3]) - max(a[1], b[1])
        both = max(0, w) * max(0, h)
        return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)
    result = []
    for c in {label for t in truth for label in t["labels"].tolist()}:
        true = {i: [b for b, label in zip(t["boxes"].tolist(), t["labels"].tolist()) if label == c]
                for i, t in enumerate(truth)}
        n = sum(map(len, true.values()))
        ranking = sorted(((s, i, b) for i, f in enumerate(found) for s, b, label in zip(
            f["scores"].tolist(), f["boxes"].tolist(), f["labels"].tolist()) if label == c),
            key=lambda entry: -entry[0])
        right, used = [], set()
        for _, i, box in ranking:
            overlaps = [iou(box, b) for b in true[i]]
            best = max(overlaps, default=0)
            j = overlaps.index(best) if overlaps else None
            right.append(best >= threshold and (i, j) not in used)
            if right[-1]:
                used.add((i, j))
        cuts = [(sum(right[:k]) / n, sum(right[:k]) / k) for k in range(1, len(right) + 1)]
        result.append(sum(max((p for r, p in cuts if r >= m / n - 1e-9), default=0)
                          for m in range(1, n + 1)) / n)
    return sum(result) / len(result)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("threshold", [.5, .75])
def test_average_precision_equals_the_loops_over_its_definition(seed, threshold):
    g = torch.Generator().manual_seed(seed)
    found, truth = [], []
    for _ in range(15):
        n = int(torch.randint(0, 4, (1,), generator=g))
        low = 40 * torch.rand(n, 2, generator=g)
        boxes = torch.cat([low, low + 10 + 20 * torch.rand(n, 2, generator=g)], 1)
        labels = torch.randint(1, 4, (n,), generator=g)
        truth.append({"boxes": boxes, "labels": labels})
        near = boxes.repeat(3, 1) + 1.5 * torch.randn(3 * n, 4, generator=g)   # several each
        far = torch.tensor([[0., 0., 9., 9.]])
        found.append({"boxes": torch.cat([near, far]),
                      "labels": torch.cat([labels.repeat(3), torch.tensor([1])]),
                      "scores": torch.rand(3 * n + 1, generator=g)})
    expected = slow_average_precision(found, truth, threshold)
    assert average_precision(found, truth, threshold) == pytest.approx(expected, abs=1e-9)
    assert .02 < expected < .98                                    # neither all nor none is right


def test_average_precision_is_1_for_the_true_boxes_and_0_without_any():
    truth = [true_boxes((1, 0, 0, 9, 9), (2, 20, 20, 40, 40)), true_boxes((1, 5, 5, 9, 9))]
    perfect = [{**t, "scores": torch.rand(len(t["labels"]))} for t in truth]
    assert average_precision(perfect, truth, .95) == pytest.approx(1)
    assert average_precision([found_boxes(), found_boxes()], truth, .5) == 0


def test_a_second_box_on_the_same_shape_is_wrong():
    truth = [true_boxes((1, 0, 0, 10, 10), (1, 50, 50, 60, 60))]
    found = [found_boxes((1, .9, 0, 0, 10, 10), (1, .8, 0, 0, 10, 10), (1, .7, 50, 50, 60, 60))]
    # right, wrong, right: precision 1 at recall 1/2, and 2/3 at recall 1
    assert average_precision(found, truth, .5) == pytest.approx((1 + 2 / 3) / 2)


def test_a_box_of_the_wrong_kind_or_in_another_scene_is_wrong():
    truth = [true_boxes((1, 0, 0, 10, 10)), true_boxes((2, 50, 50, 60, 60))]
    found = [found_boxes((2, .9, 0, 0, 10, 10)), found_boxes((1, .9, 0, 0, 10, 10))]
    assert average_precision(found, truth, .5) == 0


def test_precision_at_a_recall_is_the_best_at_that_recall_or_more():
    truth = [true_boxes((1, 0, 0, 10, 10), (1, 30, 0, 40, 10))]
    found = [found_boxes((1, .9, 60, 0, 70, 10), (1, .8, 0, 0, 10, 10), (1, .7, 30, 0, 40, 10))]
    # wrong, right, right: 1/2 at recall 1/2 and 2/3 at recall 1, so 2/3 counts at both
    assert average_precision(found, truth, .5) == pytest.approx(2 / 3)


# ---- the backbone in the detector

def finished_run(folder, without=()):
    """The two files of a finished run that a detector is built from. -> the backbone's tensors"""
    state = common.resnet18(32, 16, 2).state_dict()
    saved = {k: v for k, v in state.items() if k not in without}
    common.save_atomically(folder / "backbone.pt", saved)
    (folder / "result.json").write_text(json.dumps({
        "size": 32, "settings": {"width": 16, "stem_stride": 2}, "mean": [.1, .2, .3],
        "std": [.4, .5, .6]}))
    return state


def test_the_backbone_of_a_run_is_read_whole_with_the_mean_and_std_of_its_images(tmp_path):
    state = finished_run(tmp_path)
    net, statistics = mask_mix.read_backbone(tmp_path)
    assert all(torch.equal(net.state_dict()[k], tensor) for k, tensor in state.items())
    assert statistics == ([.1, .2, .3], [.4, .5, .6])


def test_the_random_network_has_the_shape_of_the_backbone_and_none_of_its_weights(tmp_path):
    state = finished_run(tmp_path)
    net = mask_mix.read_backbone(tmp_path, trained=False)[0]
    assert net.conv1.weight.shape == state["conv1.weight"].shape
    assert not torch.equal(net.conv1.weight, state["conv1.weight"])


def test_a_backbone_file_that_lacks_a_tensor_is_refused(tmp_path):
    finished_run(tmp_path, without=["layer4.1.bn2.bias"])
    with pytest.raises(common.UserError, match="is not a finished run"):
        mask_mix.read_backbone(tmp_path)


def test_a_detector_holds_every_tensor_of_its_backbone_and_trains_all_of_them():
    backbone = common.resnet18(32, 16, 2)
    with torch.no_grad():
        for tensor in backbone.state_dict().values():              # buffers too
            tensor.add_(1 if tensor.dtype == torch.int64 else torch.rand_like(tensor))
    model = make_detector(backbone, STATISTICS)
    inside = model.backbone.body.state_dict()
    assert inside.keys() == backbone.state_dict().keys()
    assert all(torch.equal(inside[k], tensor) for k, tensor in backbone.state_dict().items())
    assert all(p.requires_grad for p in model.backbone.body.parameters())


def test_batchnorm_of_the_backbone_is_trained_not_frozen():
    model = make_detector(common.resnet18(32, 16, 2), STATISTICS).train()
    images, truth = draw_scenes(2, 96, 0)
    before = model.backbone.body.bn1.running_mean.clone()
    sum(model(list(images.float() / 255), truth).values()).backward()
    norm = model.backbone.body.bn1
    assert not torch.equal(norm.running_mean, before)
    assert norm.weight.grad.abs().max() > 0


def test_every_parameter_of_the_backbone_gets_a_gradient():
    model = make_detector(common.resnet18(32, 16, 2), STATISTICS).train()
    images, truth = draw_scenes(2, 96, 0)
    sum(model(list(images.float() / 255), truth).values()).backward()
    without = [k for k, p in model.backbone.body.named_parameters()
               if p.grad is None or not p.grad.abs().max() > 0]
    assert without == []


# ---- runs

SMALL = ("--image-size 32 --train-size 64 --width 16 --batch-size 32 --epochs 1 --device cpu "
         "--stem-stride 2").split()


@pytest.fixture
def small_run(tmp_path, few_shapes, monkeypatch):
    """A finished run, and a short schedule for detectors."""
    monkeypatch.setattr(mask_mix, "SCHEDULES", {8: 1, 16: 1})
    monkeypatch.setattr(mask_mix, "TEST_SCENES", 8)
    mask_mix.main([*SMALL, "--out", str(tmp_path / "run")])
    return tmp_path / "run"


@pytest.mark.slow
def test_detect_compares_the_run_the_other_run_and_a_random_network(small_run, tmp_path, capsys):
    other, out = tmp_path / "other", tmp_path / "detection"
    mask_mix.main([*SMALL, "--mask-share", "0", "--mix-weight", "0", "--out", str(other)])
    mask_mix.main(["--detect", str(small_run), "--against", str(other), "--out", str(out),
                   "--device", "cpu"])
    table = json.loads((out / "detection.json").read_text())
    assert list(table) == [str(small_run), str(other), "random network"]
    for rows in table.values():
        assert set(rows) == {"8", "16"}
        assert all(0 <= row["ap"] <= row["ap50"] <= 1 for row in rows.values())
    assert (out / "detection.png").stat().st_size > 10_000
    assert "random network" in capsys.readouterr().out


@pytest.mark.slow
def test_detect_writes_into_the_run_folder_once_and_never_over_itself(small_run, capsys):
    mask_mix.main(["--detect", str(small_run), "--device", "cpu"])
    before = (small_run / "detection.json").read_bytes()
    with pytest.raises(SystemExit, match="^2$"):
        mask_mix.main(["--detect", str(small_run), "--device", "cpu"])
    assert (small_run / "detection.json").read_bytes() == before
    assert "--out" in capsys.readouterr().err


def test_detect_never_writes_over_a_picture(small_run, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "detection.png").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        mask_mix.main(["--detect", str(small_run), "--out", str(tmp_path / "mine")])
    assert "detection.png" in capsys.readouterr().err
    assert (tmp_path / "mine" / "detection.png").read_text() == "mine"


def test_two_detections_do_not_write_into_one_folder(small_run, tmp_path, capsys):
    (tmp_path / "both").mkdir()
    with common.locked(tmp_path / "both"), pytest.raises(SystemExit, match="2"):
        mask_mix.main(["--detect", str(small_run), "--out", str(tmp_path / "both")])
    assert "another process" in capsys.readouterr().err


@pytest.mark.parametrize("std", [["a", "b", "c"], 3, None])
def test_detect_of_a_run_with_strange_statistics_is_one_line(std, small_run, tmp_path, capsys):
    result = json.loads((small_run / "result.json").read_text())
    (small_run / "result.json").write_text(json.dumps({**result, "std": std}))
    with pytest.raises(SystemExit, match="2"):
        mask_mix.main(["--detect", str(small_run), "--out", str(tmp_path / "out")])
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_detect_of_a_folder_that_is_no_run_is_one_line_and_exit_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        mask_mix.main(["--detect", str(tmp_path)])
    line = capsys.readouterr().err
    assert "is not a finished run" in line and line.count("\n") == 1


def test_against_without_detect_is_refused(capsys):
    with pytest.raises(SystemExit, match="^2$"):
        mask_mix.parse(["--against", "runs/other"])
    assert "--against needs --detect" in capsys.readouterr().err


def test_detect_trains_on_scenes_of_its_own_from_the_same_start(tmp_path, monkeypatch):
    state = finished_run(tmp_path)
    drawn, thresholds, fed, starts, draw = [], [], [], [], mask_mix.draw_scenes
    monkeypatch.setattr(mask_mix, "SCHEDULES", {8: 1, 16: 1})
    monkeypatch.setattr(mask_mix, "TEST_SCENES", 3)
    monkeypatch.setattr(mask_mix, "draw_scenes", lambda n, side, seed: drawn.append((n, seed)) or
                        draw(n, side, seed))
    monkeypatch.setattr(mask_mix, "average_precision",
                        lambda found, truth, t: thresholds.append(t) or 0.)
    nothing = {"boxes": torch.empty(0, 4), "labels": torch.empty(0).long(),
               "scores": torch.empty(0)}

    def train(model, *_):
        first = model.backbone.body.conv1.weight
        starts.append(first.detach().clone())
        first.data.add_(1)
        model.forward = lambda x: fed.append(x[0]) or [nothing]
    monkeypatch.setattr(mask_mix, "train_detector", train)
    for seed in ("0", "1"):
        mask_mix.main(["--detect", str(tmp_path), "--seed", seed, "--device", "cpu", "--out",
                       str(tmp_path / seed)])
    (_, a), (_, tested), (_, b), (_, again) = drawn
    assert tested == again and tested not in (a, b) and a != b
    assert thresholds[:10] == pytest.approx([.5 + .05 * i for i in range(10)])
    assert len(thresholds) == 2 * 2 * 2 * 10
    assert max(x.max() for x in fed) <= 1
    run, same, untrained, twin = starts[:4]                        # 8 and 16 scenes, two networks
    assert torch.equal(run, state["conv1.weight"]) and torch.equal(run, same)
    assert torch.equal(untrained, twin) and not torch.equal(untrained, run)


def test_boxes_of_little_confidence_count_for_the_average_precision():
    model = make_detector(common.resnet18(32, 16, 2), STATISTICS)
    assert model.roi_heads.score_thresh == .05


def test_a_box_is_right_at_the_very_threshold():
    truth = [{"boxes": torch.tensor([[0., 0, 10, 10]]), "labels": torch.tensor([1])}]
    found = [{"boxes": torch.tensor([[0., 0, 10, 5]]), "labels": torch.tensor([1]),
              "scores": torch.tensor([.9])}]                       # IoU 50 / 100
    assert average_precision(found, truth, .5) == 1


def test_a_trained_detector_is_in_eval_mode():
    model = make_detector(common.resnet18(32, 16, 2), STATISTICS)
    images, truth = mask_mix.draw_scenes(8, 96, 0)
    device = torch.device("cpu")
    assert not mask_mix.train_detector(model, images, truth, 1, 0, device, "x").training
