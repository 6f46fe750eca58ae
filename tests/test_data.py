"""The data sets that have a name: embedded shapes, downloads, ImageNet and its parts."""
import pickle
import re
import struct

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import common
from common import SUBSETS, UserError, load_dataset, subset


@pytest.fixture(scope="module")
def shapes():
    return load_dataset("shapes")


def test_shapes_are_ten_balanced_classes_in_two_splits(shapes):
    assert shapes.train.images.shape == (5000, 3, 32, 32)
    assert shapes.train.images.dtype == torch.uint8
    assert torch.bincount(shapes.train.labels).tolist() == [500] * 10
    assert torch.bincount(shapes.test.labels).tolist() == [200] * 10
    assert len(shapes.classes) == 10 and shapes.has_test


def test_shapes_are_the_same_pictures_every_time(shapes):
    again = load_dataset("shapes")
    assert torch.equal(again.train.images, shapes.train.images)
    assert torch.equal(again.test.images, shapes.test.images)
    assert again.fingerprint == shapes.fingerprint


def test_no_test_picture_of_shapes_is_a_training_picture(shapes):
    train = {image.numpy().tobytes() for image in shapes.train.images}
    assert not train & {image.numpy().tobytes() for image in shapes.test.images}


def test_shapes_can_be_drawn_at_another_size(shapes):
    small = load_dataset("shapes", image_size=8)
    assert small.train.images.shape == (5000, 3, 8, 8) and small.fingerprint != shapes.fingerprint


def test_the_shape_is_brighter_than_its_background(shapes):
    # The centre of a disc against the four corners, on average over the discs.
    discs = shapes.train.images[shapes.train.labels == shapes.classes.index("disc")].float().mean(1)
    corners = discs[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean(1)
    assert (discs[:, 14:18, 14:18].mean((1, 2)) > corners).float().mean() > .95


def test_kmeans_on_the_pixels_of_shapes_stays_near_chance(shapes):
    # Chance is .1; a method must do better by what it learns, not by the colours or positions.
    x = shapes.train.images[:2000].flatten(1).float() - 128
    found = common.kmeans(x, 10, seed=0, restarts=1)[0]
    assert common.cluster_scores(shapes.train.labels[:2000], found)["acc"] < .2


def test_pixels_alone_do_not_tell_the_shapes_apart_but_say_something(shapes):
    # Neighbours in pixels: far above chance (.1), far below what a trained network reaches (.95).
    x, y = shapes.train.images.flatten(1).float() - 128, shapes.train.labels
    t, z = shapes.test.images[:500].flatten(1).float() - 128, shapes.test.labels[:500]
    assert .4 < common.knn_accuracy(x, y, t, z, 20)[0] < .85


# ------------------------------------------------------------------------------------------------
# Downloads

@pytest.fixture
def tiny_cifar100(tmp_path, monkeypatch):
    """CIFAR-100's own files, with two images of each class for training and one for the test. Class
    c has superclass (7 c) % 20."""
    kind, root = torchvision.datasets.CIFAR100, tmp_path / "cifar-100-python"
    root.mkdir()

    def write(name, content):
        (root / name).write_bytes(pickle.dumps(content))
        return [name, torchvision.datasets.utils.calculate_md5(root / name)]
    pixels = np.random.default_rng(0).integers(0, 256, (200, 3072), dtype=np.uint8)
    fine, coarse = list(range(100)), [7 * c % 20 for c in range(100)]
    monkeypatch.setattr(kind, "train_list", [write("train", {
        "data": pixels, "fine_labels": fine * 2, "coarse_labels": coarse * 2})])
    monkeypatch.setattr(kind, "test_list", [write("test", {
        "data": pixels[::-1][:100], "fine_labels": fine, "coarse_labels": coarse})])
    name, md5 = write("meta", {"fine_label_names": [f"fine {c}" for c in fine],
                               "coarse_label_names": [f"coarse {c}" for c in range(20)]})
    monkeypatch.setattr(kind, "meta", {"filename": name, "key": "fine_label_names", "md5": md5})
    return tmp_path, pixels


def test_cifar_images_keep_their_pixels_and_channel_order(tiny_cifar100):
    # A row of the file: 1024 red values, 1024 green, 1024 blue, each row by row.
    folder, pixels = tiny_cifar100
    data = load_dataset("cifar100", folder)
    assert torch.equal(data.train.images, torch.from_numpy(pixels).view(-1, 3, 32, 32))
    assert data.train.labels.tolist() == list(range(100)) * 2 and data.classes[9] == "fine 9"
    assert data.train.names[7] == "train/7" and data.test.names[7] == "test/7"


def test_cifar20_is_cifar100_with_the_superclasses_of_its_files(tiny_cifar100):
    data, fine = (load_dataset(name, tiny_cifar100[0]) for name in ("cifar20", "cifar100"))
    assert torch.equal(data.train.images, fine.train.images)
    assert data.classes == [f"coarse {c}" for c in range(20)]
    for coarse, same in ((data.train, fine.train), (data.test, fine.test)):
        assert torch.equal(coarse.labels, same.labels * 7 % 20)


def test_images_are_resized_with_antialiasing(tiny_cifar100):
    folder, pixels = tiny_cifar100
    data = load_dataset("cifar100", folder, image_size=16)
    one = Image.fromarray(pixels[0].reshape(3, 32, 32).transpose(1, 2, 0))
    expected = np.array(one.resize((16, 16), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.abs(data.train.images[0].numpy().astype(int) - expected).max() <= 1


def fashion_mnist(folder):
    """20 training and 10 test images in its file format: magic number, sizes, bytes."""
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    r = np.random.default_rng(0)
    for part, n in (("train", 20), ("t10k", 10)):
        for kind, array in (("images-idx3", r.integers(1, 256, (n, 28, 28), dtype=np.uint8)),
                            ("labels-idx1", np.arange(n, dtype=np.uint8) % 10)):
            (raw / f"{part}-{kind}-ubyte").write_bytes(
                struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) +
                array.tobytes())
    return raw


def test_fashion_mnist_is_padded_to_32_px_and_has_three_equal_channels(tmp_path):
    fashion_mnist(tmp_path)
    images = load_dataset("fashion-mnist", tmp_path).train.images
    assert images.shape == (20, 3, 32, 32)
    assert torch.equal(images[:, 0], images[:, 2])
    assert images[:, :, 2:-2, 2:-2].min() > 0                      # the 28 px of the file
    images[:, :, 2:-2, 2:-2] = 0
    assert images.max() == 0                                       # two black pixels all around


@pytest.mark.parametrize("damage", [b"", b"\0\0\x08\x03\0\0\0\x14", None])
def test_a_damaged_download_is_one_line_that_says_which_files(tmp_path, damage):
    file = fashion_mnist(tmp_path) / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-100] if damage is None else damage)
    with pytest.raises(UserError, match="(?s)fashion-mnist.*FashionMNIST/raw.*--dataset shapes"):
        load_dataset("fashion-mnist", tmp_path)


@pytest.mark.parametrize("name, file", [
    ("cifar10", "cifar-10-python.tar.gz"), ("cifar100", "cifar-100-python.tar.gz"),
    ("cifar20", "cifar-100-python.tar.gz"), ("stl10", "stl10_binary.tar.gz"),
    ("fashion-mnist", "FashionMNIST/raw")])
def test_offline_a_download_says_what_to_put_where(name, file, tmp_path, monkeypatch):
    closed = "http://127.0.0.1:9/"                                 # nobody listens there
    sets = torchvision.datasets
    for kind in (sets.CIFAR10, sets.CIFAR100, sets.STL10):
        monkeypatch.setattr(kind, "url", closed + "x")
    monkeypatch.setattr(sets.FashionMNIST, "mirrors", [closed])
    with pytest.raises(UserError) as caught:
        load_dataset(name, tmp_path / "downloads")
    words = str(caught.value)
    assert name in words and file in words and str(tmp_path / "downloads") in words
    assert "--dataset shapes" in words and "\n" not in words


# ------------------------------------------------------------------------------------------------
# Names

@pytest.mark.parametrize("wrong, words", [
    ("cifar-10", "did you mean cifar10"), ("CIFAR100", "did you mean cifar100"),
    ("shape", "did you mean shapes"), ("fashion_mnist", "did you mean fashion-mnist"),
    ("tinyimagenet", "did you mean tiny-imagenet"), ("qqq", ""), ("/no/such/folder", ""),
    ("~nobody-of-this-name/images", ""), ("", ""), ("x" * 5000, "")])
def test_an_unknown_name_is_answered_by_the_nearest_and_all_known_ones(wrong, words, tmp_path,
                                                                       monkeypatch):
    monkeypatch.chdir(tmp_path)                                    # which an empty name is not
    with pytest.raises(UserError, match=f"{words}.*cifar10, .*the path of a folder"):
        load_dataset(wrong, tmp_path)


# ------------------------------------------------------------------------------------------------
# ImageNet and its parts

def save(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (len(str(path)) * 7 % 256, 0, 0)).save(path)


def tiny_imagenet(folder):
    """The original layout: train/<class>/images/*, val/images/* with val_annotations.txt."""
    root = folder / "tiny-imagenet-200"
    for name in ("n01", "n02", "n03"):
        save(*(root / "train" / name / "images" / f"{name}_{i}.jpeg" for i in range(3)))
        (root / "train" / name / f"{name}_boxes.txt").write_text("boxes")
    rows = [f"val_{i}.jpeg\t{name}\t0\t0\t62\t62\n" for i, name in
            enumerate(("n03", "n01", "n02", "n03"))]
    save(*(root / "val" / "images" / row.split("\t")[0] for row in rows))
    (root / "val" / "val_annotations.txt").write_text("".join(rows))
    return root


def test_tiny_imagenet_in_its_original_layout(tmp_path):
    tiny_imagenet(tmp_path)
    data = load_dataset("tiny-imagenet", tmp_path)
    assert data.train.images.shape == (9, 3, 64, 64) and data.classes == ["n01", "n02", "n03"]
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert data.test.labels.tolist() == [2, 0, 1, 2]               # by the annotations


def test_chosen_classes_of_tiny_imagenet_keep_their_test_images(tmp_path):
    tiny_imagenet(tmp_path)
    (tmp_path / "two.txt").write_text("n03\nn01\n")
    data = load_dataset("tiny-imagenet", tmp_path, classes=str(tmp_path / "two.txt"))
    assert data.classes == ["n01", "n03"] and data.has_test
    assert [data.classes[y] for y in data.test.labels] == [
        {"0": "n03", "1": "n01", "3": "n03"}[name[-6]] for name in data.test.names]
    assert len(data.test.names) == 3


@pytest.mark.parametrize("line", ["val_9.jpeg\tn99\t0\t0\t1\t1", "val_9.jpeg", "\tn01"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_an_annotation_that_makes_no_sense_is_no_traceback(line, encoding, tmp_path):
    file = tiny_imagenet(tmp_path) / "val" / "val_annotations.txt"
    file.write_text(file.read_text() + line + "\n", encoding=encoding)
    try:
        assert load_dataset("tiny-imagenet", tmp_path).test.labels.tolist() == [2, 0, 1, 2]
    except UserError as error:
        assert encoding == "utf-16" and "val_annotations.txt" in str(error)


@pytest.mark.parametrize("name", ["tiny-imagenet", "imagenet10", "imagenet-dogs"])
@pytest.mark.parametrize("empty", [False, True])
def test_a_missing_or_empty_imagenet_says_what_to_put_where(name, empty, tmp_path):
    if empty:
        for place in (tmp_path, tmp_path / "tiny-imagenet-200"):
            (place / "train" / "n01").mkdir(parents=True)
    with pytest.raises(UserError, match=name if empty else re.escape(str(tmp_path))):
        load_dataset(name, tmp_path)


@pytest.mark.parametrize("name, classes", [("imagenet10", 10), ("imagenet-dogs", 15)])
def test_a_part_of_imagenet_takes_its_own_classes_in_order_and_no_other(name, classes, tmp_path):
    names = SUBSETS[name]
    assert len(set(names)) == classes and names == sorted(names)   # class ids follow the order
    save(*(tmp_path / split / c / "0.jpeg" for split in ("train", "val")
           for c in [*names, "n09999999"] if (split, c) != ("val", names[0])))
    data = load_dataset(name, tmp_path, image_size=16)
    assert data.classes == names and data.train.labels.tolist() == list(range(classes))
    assert data.test.labels.tolist() == list(range(1, classes))    # val lacks the first class


def test_tiny_imagenet_inside_the_folder_of_imagenet_is_no_part_of_it(tmp_path):
    names = SUBSETS["imagenet10"]          # Tiny-ImageNet has some of these classes, too
    save(*(tmp_path / split / c / "0.jpeg" for split in ("train", "val") for c in names))
    save(tmp_path / "tiny-imagenet-200" / "train" / names[0] / "images" / "1.jpeg")
    data = load_dataset("imagenet10", tmp_path, image_size=16)
    assert data.classes == names and len(data.train.images) == len(data.test.images) == 10


def test_a_part_of_imagenet_names_the_classes_that_are_missing(tmp_path):
    names = SUBSETS["imagenet10"]
    save(*(tmp_path / "train" / c / "0.jpeg" for c in names[:4] + names[5:]))
    with pytest.raises(UserError, match=f"imagenet10.*{names[4]}"):
        load_dataset("imagenet10", tmp_path, image_size=16)


# ------------------------------------------------------------------------------------------------
# Parts of the training images

LABELS = torch.arange(100) % 10


def test_a_part_is_balanced_sorted_without_repetition_and_another_for_each_seed():
    index, again, other = (subset(LABELS, 100, 53, seed) for seed in (0, 0, 1))
    assert torch.bincount(LABELS[index]).tolist() == [6, 6, 6, 5, 5, 5, 5, 5, 5, 5]     # 53
    assert index.tolist() == sorted(set(index.tolist()))
    assert torch.equal(index, again) and not torch.equal(index, other)


def test_all_images_are_the_default_and_can_be_asked_for_by_their_number():
    for labels, size in ((LABELS, None), (None, None), (LABELS, 100)):
        assert torch.equal(subset(labels, 100, size, seed=0), torch.arange(100))


def test_a_part_of_unlabelled_images_is_any_part():
    for labels in (None, torch.full((100,), -1), torch.arange(100) % 4 - 1):
        index = subset(labels, 100, 30, seed=0)
        assert len(set(index.tolist())) == 30 and index.max() < 100


def test_more_images_than_there_are_cannot_be_asked_for():
    with pytest.raises(UserError, match="--train-size 101: there are only 100"):
        subset(LABELS, 100, 101, seed=0)
    with pytest.raises(UserError, match="only 5"):                 # 50 of each: class 1 has 5
        subset(torch.tensor([0] * 95 + [1] * 5), 100, 99, seed=0)


def test_pixel_statistics_see_the_whole_set():
    images = torch.zeros(20_002, 3, 1, 1, dtype=torch.uint8)       # more than 10,000, in order
    images[10_001:] = 255
    mean, std = common.pixel_statistics(images)
    assert torch.allclose(mean, torch.tensor(.5), atol=.01)
    assert torch.allclose(std, torch.tensor(.5), atol=.01)


def test_stl10_is_learned_from_all_images_and_tested_on_its_test_images(monkeypatch, tmp_path):
    asked = []

    class STL10:
        classes = list("abcdefghij")

        def __init__(self, root, split, download):
            asked.append(split)
            self.data = np.full((4, 3, 96, 96), len(asked), np.uint8)
            self.labels = np.array([0, 1, 2, -1])
    monkeypatch.setattr(common.torchvision.datasets, "STL10", STL10)
    data = common.load_dataset("stl10", tmp_path)
    assert asked == ["train+unlabeled", "test"] and data.train.labels.tolist() == [0, 1, 2, -1]
    assert (data.train.images == 1).all() and (data.test.images == 2).all()


def test_a_batch_of_all_images_and_a_cluster_for_each_are_no_error(monkeypatch):
    images, y = torch.zeros(20, 3, 9, 9, dtype=torch.uint8), torch.arange(20) % 2
    split = common.Split(images, y, ["x"] * 20)
    data = common.Dataset("x", split, split, ["a", "b"], "0")
    monkeypatch.setattr(common, "load_dataset", lambda *a, **b: data)
    args = common.Parser("", 1).parse(["--device=cpu", "--clusters=20"], {})
    args.batch_size = 20
    assert common.prepare(args, {})[3] == 20
