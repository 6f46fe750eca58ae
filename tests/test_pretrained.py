"""scan.py on a backbone that others trained: reading their checkpoints, heads alone, --assign."""
import argparse
import json
import os
import re
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import common
import scan

SMALL = "mobilenet_v3_small"


@pytest.fixture(scope="module")
def weights():
    """The state of a small model with its classifier, as torchvision would hand it out."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(SMALL, num_classes=1000)
    for module in model.modules():                                 # as if it had seen images
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-.1, .1)
    return model.state_dict()


def load(state, path, name=SMALL, **options):
    """-> the model without its last layer, loaded from a file with this state; what was found"""
    torch.save(state, path, **options)
    backbone, last, _ = scan.frozen_backbone(name, 32)
    return backbone[1], scan.load_weights(path, backbone[1], last)


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


# ---- the model

@pytest.mark.parametrize("name", ["resnet18", SMALL, "shufflenet_v2_x0_5", "densenet121"])
def test_only_the_last_linear_layer_is_taken_off(name):
    torch.manual_seed(0)
    whole = torchvision.models.get_model(name).eval()
    backbone, last, shape = scan.frozen_backbone(name, 64)
    backbone[1].load_state_dict({k: v for k, v in whole.state_dict().items()
                                 if not k.startswith(last + ".")}, strict=True)
    x = torch.rand(2, 3, 64, 64)
    layer = whole.get_submodule(last)
    assert layer.weight.shape == shape
    with torch.no_grad():
        assert torch.allclose(layer(backbone.eval()(x)), whole(x), atol=1e-5)


def test_a_model_that_does_not_end_in_a_linear_layer_is_refused():
    with pytest.raises(common.UserError, match="squeezenet1_1: .*linear layer"):
        scan.frozen_backbone("squeezenet1_1", 64)


def test_features_of_any_scale_and_offset_give_the_same_heads():
    h = torch.rand(50, 8, generator=torch.Generator().manual_seed(0))
    def scaled(h):
        scale = scan.Scale(8)
        scale.mean, scale.std = h.mean(0), h.std(0)
        return scale(h)
    assert torch.allclose(scaled(h), scaled(1000 * h - 300), atol=1e-3)
    moved = h * torch.logspace(-2, 2, 8) + 10 * torch.arange(8)     # each feature in its own way
    assert torch.allclose(scaled(h), scaled(moved), atol=1e-2)
    assert torch.allclose(scaled(h).norm(dim=1), torch.tensor(10.))


# ---- checkpoints of others

@pytest.mark.parametrize("wrap", [
    lambda s: s,                                                   # torchvision
    lambda s: {"epoch": 3, "state_dict": under("module.", s)},     # DataParallel
    lambda s: {"arch": "x", "state_dict": {                        # MoCo
        **under("module.encoder_q.", s), **under("module.encoder_k.", s),
        "module.queue": torch.zeros(4, 4)}},
    lambda s: {"student": under("module.backbone.", s),            # DINO
               "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
], ids=["torchvision", "DataParallel", "MoCo", "DINO"])
@pytest.mark.parametrize("archive", [True, False], ids=["archive", "older format"])
def test_weights_are_found_under_any_prefix(weights, tmp_path, wrap, archive):
    model, found = load(wrap(weights), tmp_path / "w.pth", _use_new_zipfile_serialization=archive)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert "classifier.3.weight" in found


def test_the_number_of_tensors_and_the_unused_ones_are_printed(weights, tmp_path, capsys):
    state = {**under("module.", weights), "module.projector.0.weight": torch.zeros(2, 2)}
    load(state, tmp_path / "w.pth")
    text = capsys.readouterr().out
    assert f"{sum('num_batches' not in k for k in weights) - 2} tensors loaded from module." in text
    assert "classifier.3.weight" in text and "projector.0.weight" in text


def test_a_missing_tensor_is_refused_by_name(weights, tmp_path):
    less = {k: v for k, v in weights.items() if k != "features.4.block.0.0.weight"}
    with pytest.raises(common.UserError, match="features.4.block.0.0.weight is absent"):
        load(less, tmp_path / "w.pth")


def test_a_tensor_that_is_not_finite_is_refused(weights, tmp_path):
    bad = {**weights, "features.0.0.weight": weights["features.0.0.weight"] * np.nan}
    with pytest.raises(common.UserError, match="not dense, real and finite"):
        load(bad, tmp_path / "w.pth")


def test_weights_of_a_larger_model_of_the_family_are_refused(tmp_path):
    # All names of resnet18 are there in resnet34, in their shapes.
    with pytest.raises(common.UserError, match="layer1.2"):
        load(torchvision.models.resnet34().state_dict(), tmp_path / "w.pth", "resnet18")


def test_a_checkpoint_that_holds_code_is_refused_with_the_way_out(weights, tmp_path):
    with pytest.raises(common.UserError, match="not a file of tensors .*weights_only=False"):
        load({"model": weights, "args": argparse.Namespace(lr=1)}, tmp_path / "w.pth")


def test_without_a_network_the_file_to_fetch_and_its_place_are_named(monkeypatch, tmp_path):
    def offline(*given, **named):
        raise urllib.error.URLError("no route")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(common.UserError, match=f"{SMALL}-.*put it in {tmp_path}.*--weights"):
        scan.train(scan.parse(["--pretext", SMALL, "--out", str(tmp_path / "o")]))
    assert not (tmp_path / "o").exists()


def test_weights_without_a_model_are_refused(capsys):
    with pytest.raises(SystemExit):
        scan.parse(["--weights", "a.pth", "--pretext", "backbone.pt"])
    assert "--weights needs" in capsys.readouterr().err


def test_a_model_has_its_own_defaults_and_flags_override_them():
    args = scan.parse(["--dataset", "cifar10", "--pretext", SMALL, "--heads", "3"])
    assert (args.heads, args.cluster_batch) == (3, 512)
    assert scan.parse(["--dataset", "cifar10"]).heads == 1


# ---- runs

@pytest.fixture
def photos(tmp_path):
    """Three kinds of pictures, twenty of each, larger than thumbnails."""
    rng = np.random.default_rng(0)
    for kind, colour in (("a", (220, 40, 40)), ("b", (40, 220, 40)), ("c", (40, 40, 220))):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for i in range(20):
            pixels = np.array(colour) + rng.integers(-35, 35, (110, 120, 3))
            image = Image.fromarray(pixels.astype(np.uint8))
            image.save(tmp_path / "photos" / kind / f"{i}.png")
    return tmp_path / "photos"


def heads(photos, weights, out, *more):
    torch.save(weights, photos.parent / "w.pth")
    scan.train(scan.parse([
        "--dataset", str(photos), "--data-dir", str(photos.parent / "data"), "--pretext", SMALL,
        "--weights", str(photos.parent / "w.pth"), "--image-size", "104", "--heads", "3",
        "--device", "cpu", "--out", str(out), *more]))
    return json.loads((out / "result.json").read_text())


@pytest.mark.slow
def test_heads_learn_on_features_that_are_computed_once(
        photos, weights, tmp_path, capsys, monkeypatch):
    found = heads(photos, weights, tmp_path / "a")
    text = capsys.readouterr().out
    assert found["labels_seen"] is True and "they learned from labels" in text
    assert {"raw pixels", f"{SMALL} + k-means", "SCAN heads"} <= found["scores"].keys()
    assert "note: step 3 is left out" in text
    # The next run takes the features from the cache: the backbone embeds no image.
    seen, embed = [], common.embed
    monkeypatch.setattr(scan, "embed", lambda net, images, *given, **named: (
        seen.append(len(images)), embed(net, images, *given, **named))[1])
    heads(photos, weights, tmp_path / "b", "--seed", "1")
    assert seen == []


@pytest.mark.slow
def test_only_small_copies_of_the_images_are_kept(photos, weights, tmp_path):
    heads(photos, weights, tmp_path / "a")
    cache, = (photos.parent / "data" / "cache").iterdir()
    kept = common.load_checked(cache)
    assert kept["images"].shape == (60, 3, 96, 96) and kept["features"].shape == (60, 1024)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [0, 365])      # no classifier; one that is not of ImageNet
def test_without_labels_there_are_sheets_and_the_source_of_the_weights_is_not_guessed(
        photos, weights, tmp_path, capsys, classes):
    weights = {k: v[:classes] if k.startswith("classifier.3") else v for k, v in weights.items()
               if classes or not k.startswith("classifier.3")}
    found = heads(photos, weights, tmp_path / "a", "--unlabelled", "--clusters", "3")
    text = capsys.readouterr().out
    assert found["labels_seen"] == "unknown" and "not known here" in text
    assert "ACC" not in text and (tmp_path / "a" / "sheets").is_dir()
    assert "--threshold" not in text               # that of step 3, which heads alone do not have


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_two_models_are_built_without_a_warning_and_for_the_pixels_that_torchvision_gives_them(
        name, recwarn):
    backbone, _, _ = scan.frozen_backbone(name, 96)
    assert not recwarn.list
    # As torchvision builds them with its weights: pixels normalised as for all its models come in.
    assert backbone[1].transform_input


@pytest.mark.parametrize("name", ["vit_b_32", "vit_h_14"])
def test_a_vision_transformer_is_built_for_the_size_of_its_weights(name):
    about = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    with torch.device("meta"):                                     # vit_h_14: 2.5 GB of weights
        backbone, _, _ = scan.frozen_backbone(name, about.crop_size[0])
    assert backbone[1].image_size == about.crop_size[0]


def test_a_model_that_needs_the_version_of_its_state_is_loaded(tmp_path):
    state = torchvision.models.mnasnet0_5().state_dict()
    model, _ = load(state, tmp_path / "w.pth", "mnasnet0_5")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_old_names_in_torchvisions_files_for_densenet_are_understood(tmp_path):
    state = torchvision.models.densenet121().state_dict()
    old = {re.sub(r"(denselayer.*\.(norm|conv))([12])\.", r"\1.\3.", k): v
           for k, v in state.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    model, _ = load(old, tmp_path / "w.pth", "densenet121")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_assign_repeats_the_clusters_of_a_run_for_the_same_images(photos, weights, tmp_path):
    heads(photos, weights, tmp_path / "a")
    scan.main(["--assign", str(tmp_path / "a"), "--dataset", str(photos), "--device", "cpu",
               "--data-dir", str(photos.parent / "data"), "--out", str(tmp_path / "b")])
    before, after = ([line.split(",")[:2] for line in
                      (tmp_path / run / "clusters.csv").read_text().splitlines()] for run in "ab")
    assert before == after
    assert {"sheets", "summary.txt", "prototypes.png"} <= {f.name for f in
                                                           (tmp_path / "b").iterdir()}


@pytest.mark.slow
def test_the_backbone_of_a_run_on_a_model_of_torchvision_is_that_model(photos, weights, tmp_path):
    heads(photos, weights, tmp_path / "a")
    with pytest.raises(common.UserError, match=f"--pretext {SMALL}"):
        scan.train(scan.parse([
            "--dataset", str(photos), "--data-dir", str(photos.parent / "data"), "--device", "cpu",
            "--pretext", str(tmp_path / "a" / "backbone.pt"), "--out", str(tmp_path / "b")]))


@pytest.mark.slow
def test_an_interrupted_run_of_heads_repeats_the_uninterrupted_one(
        photos, weights, tmp_path, monkeypatch):
    whole = common.Run.end_epoch

    def end_epoch(self, *given, **state):
        whole(self, *given, **state)
        if self.epoch == 3:
            raise KeyboardInterrupt
    monkeypatch.setattr(common.Run, "INTERVAL", 0)
    monkeypatch.setattr(common.Run, "end_epoch", end_epoch)
    with pytest.raises(KeyboardInterrupt):
        heads(photos, weights, tmp_path / "a")
    monkeypatch.setattr(common.Run, "end_epoch", whole)
    heads(photos, weights, tmp_path / "a", "--resume")
    heads(photos, weights, tmp_path / "b")
    a, b = (common.load_checked(tmp_path / run / "model.pt")["net"] for run in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_a_size_that_a_model_refuses_is_one_line(tmp_path):
    torch.save(torchvision.models.vit_b_32().state_dict(), tmp_path / "w.pth")
    with pytest.raises(common.UserError, match="--image-size 64: vit_b_32"):
        scan.train(scan.parse(["--pretext", "vit_b_32", "--weights", str(tmp_path / "w.pth"),
                               "--image-size", "64", "--out", str(tmp_path / "o")]))


@pytest.mark.slow
def test_crops_of_twelve_photographs_are_sorted_by_photograph(tmp_path):
    data = pytest.importorskip("skimage.data")
    file = Path(os.environ.get("MOBILENET_V2", Path(torch.hub.get_dir(), "checkpoints",
                                                    "mobilenet_v2-7ebf99e0.pth")))
    if not file.exists():
        pytest.skip("needs weights of mobilenet_v2: name their file in MOBILENET_V2")
    rng = np.random.default_rng(0)
    for name in ("astronaut brick camera cat coffee coins grass gravel hubble_deep_field "
                 "immunohistochemistry retina rocket").split():
        image = Image.fromarray(getattr(data, name)()).convert("RGB")
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(40):
            side = int(min(image.size) * rng.uniform(.5, .9))
            x, y = (int(rng.integers(0, extent - side + 1)) for extent in image.size)
            image.crop((x, y, x + side, y + side)).save(tmp_path / "photos" / name / f"{i}.jpg")
    scan.train(scan.parse([
        "--dataset", str(tmp_path / "photos"), "--data-dir", str(tmp_path), "--device", "cpu",
        "--pretext", "mobilenet_v2", "--weights", str(file), "--out", str(tmp_path / "a")]))
    scores = json.loads((tmp_path / "a" / "result.json").read_text())["scores"]
    assert scores["SCAN heads"]["acc"] >= .95 > scores["raw pixels"]["kmeans"]["acc"]
