"""The data: embedded shapes, downloads, folders of any images, and what may be wrong with them."""
import gzip
import math
import os
import pickle
import struct
import threading
import zlib

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import common
from common import UserError, load_dataset, subset

RED, BLUE = (255, 0, 0), (0, 0, 255)


def save(path, colour=RED, size=(40, 40), **options):
    """One image file of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def labelled(root, classes=("cat", "dog"), each=3, splits=("train", "test")):
    """root/split/class/0.png ..., or root/class/0.png ... with splits = ('',)"""
    for split in splits:
        for c, name in enumerate(classes):
            for i in range(each):
                save(root / split / name / f"{i}.png", (100 * c, 20 * i, 0))
    return root


def load(root, tmp_path, **options):
    return load_dataset(str(root), tmp_path / "kept", **options)


def decodings(monkeypatch):
    """The list of files that are decoded from now on."""
    files, real = [], common._decode
    monkeypatch.setattr(common, "_decode",
                        lambda file, size: (files.append(file), real(file, size))[1])
    return files


def near(image, colour, levels=3):
    return (image.float() - torch.tensor(colour).view(3, 1, 1)).abs().max() <= levels


# ------------------------------------------------------------------------------------------------
# The embedded shapes

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


def test_shapes_can_be_drawn_at_another_size():
    small = load_dataset("shapes", image_size=8)
    assert small.train.images.shape == (5000, 3, 8, 8)


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
    assert .4 < common.knn_accuracy(x, y, t, z, k=20) < .85


# ------------------------------------------------------------------------------------------------
# Downloads

SUPERCLASSES = {                          # as published with CIFAR-100
    "aquatic mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food containers": "bottle bowl can cup plate",
    "fruit and vegetables": "apple mushroom orange pear sweet_pepper",
    "electrical devices": "clock keyboard lamp telephone television",
    "furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large carnivores": "bear leopard lion tiger wolf",
    "large outdoor things": "bridge castle house road skyscraper",
    "large outdoor scenes": "cloud forest mountain plain sea",
    "large omnivores and herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium mammals": "fox porcupine possum raccoon skunk",
    "invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles 1": "bicycle bus motorcycle pickup_truck train",
    "vehicles 2": "lawn_mower rocket streetcar tank tractor"}


def test_each_superclass_has_its_five_published_classes():
    fine = sorted(" ".join(SUPERCLASSES.values()).split())
    assert len(fine) == 100 and list(SUPERCLASSES) == list(common.SUPERCLASSES)
    for number, (name, members) in enumerate(SUPERCLASSES.items()):
        assert [f for f, s in zip(fine, common.CIFAR_20) if s == number] == members.split(), name


@pytest.fixture
def tiny_cifar100(tmp_path, monkeypatch):
    """CIFAR-100's own files, with two images of each class for training and one for the test."""
    kind, root = torchvision.datasets.CIFAR100, tmp_path / "cifar-100-python"
    root.mkdir()

    def write(name, content):
        (root / name).write_bytes(pickle.dumps(content))
        return [name, torchvision.datasets.utils.calculate_md5(root / name)]
    pixels = np.random.default_rng(0).integers(0, 256, (200, 3072), dtype=np.uint8)
    fine = sorted(" ".join(SUPERCLASSES.values()).split())
    monkeypatch.setattr(kind, "train_list", [write("train", {
        "data": pixels, "fine_labels": list(range(100)) * 2})])
    monkeypatch.setattr(kind, "test_list", [write("test", {
        "data": pixels[:100], "fine_labels": list(range(100))})])
    name, md5 = write("meta", {"fine_label_names": fine})
    monkeypatch.setattr(kind, "meta", {"filename": name, "key": "fine_label_names", "md5": md5})
    return tmp_path, pixels


def test_cifar_images_keep_their_pixels_and_channel_order(tiny_cifar100):
    # A row of the file: 1024 red values, 1024 green, 1024 blue, each row by row.
    folder, pixels = tiny_cifar100
    data = load_dataset("cifar100", folder)
    assert torch.equal(data.train.images, torch.from_numpy(pixels).view(-1, 3, 32, 32))
    assert data.train.labels.tolist() == list(range(100)) * 2 and data.classes[0] == "apple"
    assert data.train.names[7] == "train/7" and data.test.names[7] == "test/7"


def test_cifar20_is_cifar100_with_superclasses(tiny_cifar100):
    data = load_dataset("cifar20", tiny_cifar100[0])
    assert torch.bincount(data.test.labels).tolist() == [5] * 20
    assert data.classes[data.train.labels[0]] == "fruit and vegetables"         # apple


def test_cifar20_and_cifar100_cannot_be_taken_for_each_other(tiny_cifar100):
    # Same images, other classes: a run of one must not be resumed as the other.
    a, b = (load_dataset(name, tiny_cifar100[0]) for name in ("cifar20", "cifar100"))
    assert a.fingerprint != b.fingerprint


def test_images_are_resized_with_antialiasing(tiny_cifar100):
    folder, pixels = tiny_cifar100
    data = load_dataset("cifar100", folder, image_size=16)
    one = Image.fromarray(pixels[0].reshape(3, 32, 32).transpose(1, 2, 0))
    expected = np.array(one.resize((16, 16), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.abs(data.train.images[0].numpy().astype(int) - expected).max() <= 1


def idx(array):
    """Fashion-MNIST's file format: magic number, sizes, bytes."""
    return gzip.compress(struct.pack(">I", 0x0800 + array.ndim) +
                         struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes())


def fashion_mnist(folder):
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    r = np.random.default_rng(0)
    for part, n in (("train", 20), ("t10k", 10)):
        for kind, array in (("images-idx3", r.integers(1, 256, (n, 28, 28), dtype=np.uint8)),
                            ("labels-idx1", np.arange(n, dtype=np.uint8) % 10)):
            (raw / f"{part}-{kind}-ubyte").write_bytes(gzip.decompress(idx(array)))
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
    raw = fashion_mnist(tmp_path)
    file = raw / "train-images-idx3-ubyte"
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

@pytest.mark.parametrize("wrong, right", [
    ("cifar-10", "cifar10"), ("CIFAR100", "cifar100"), ("shape", "shapes"), ("stl-10", "stl10"),
    ("fashion_mnist", "fashion-mnist"), ("tinyimagenet", "tiny-imagenet")])
def test_an_unknown_dataset_suggests_the_nearest_name(wrong, right, tmp_path):
    with pytest.raises(UserError, match=f"did you mean {right}"):
        load_dataset(wrong, tmp_path)


@pytest.mark.parametrize("name", ["qqq", "/no/such/folder", "~nobody-of-this-name/images",
                                  pytest.param("x" * 5000, id="longer than any path")])
def test_anything_else_lists_the_known_names(name, tmp_path):
    with pytest.raises(UserError, match="cifar10, .*the path of a folder"):
        load_dataset(name, tmp_path)


def test_an_empty_name_is_not_the_folder_one_happens_to_be_in(tmp_path, monkeypatch):
    monkeypatch.chdir(labelled(tmp_path / "pets"))
    with pytest.raises(UserError):
        load_dataset("", tmp_path / "kept")


# ------------------------------------------------------------------------------------------------
# Folders: layouts

def test_a_folder_with_train_and_test_classes(tmp_path):
    data = load(labelled(tmp_path / "pets"), tmp_path)
    assert data.name == "pets" and data.classes == ["cat", "dog"] and data.has_test
    assert data.train.labels.tolist() == data.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.train.names[4] == os.path.join("train", "dog", "1.png")
    assert near(data.train.images[4], (100, 20, 0))


def test_a_folder_with_val_in_place_of_test(tmp_path):
    assert load(labelled(tmp_path / "pets", splits=("train", "val")), tmp_path).has_test


def test_a_folder_of_classes_alone_has_no_test_split(tmp_path):
    data = load(labelled(tmp_path / "pets", splits=("",)), tmp_path)
    assert not data.has_test and data.test is data.train and data.classes == ["cat", "dog"]
    assert "no test split" in common.protocol(data)["linear"]


def test_a_folder_of_images_has_no_labels(tmp_path):
    for i in range(4):
        save(tmp_path / "pets" / f"{i}.png")
    data = load(tmp_path / "pets", tmp_path)
    assert data.classes is None and data.train.labels is None and len(data.train.images) == 4


def test_unlabelled_images_may_have_a_test_split(tmp_path):
    for i in range(4):
        save(tmp_path / "pets" / ("train" if i else "test") / f"{i}.png")
    data = load(tmp_path / "pets", tmp_path)
    assert data.classes is None and (len(data.train.images), len(data.test.images)) == (3, 1)


def test_folders_inside_a_class_belong_to_the_class(tmp_path):
    labelled(tmp_path / "pets", splits=("",))
    save(tmp_path / "pets" / "cat" / "at night" / "asleep" / "9.png")
    assert torch.bincount(load(tmp_path / "pets", tmp_path).train.labels).tolist() == [4, 3]


def test_images_beside_class_folders_are_all_taken_without_labels_and_said_so(tmp_path, capsys):
    save(labelled(tmp_path / "pets", splits=("",)) / "stray.png")
    data = load(tmp_path / "pets", tmp_path)
    assert data.classes is None and len(data.train.images) == 7
    assert "without labels" in capsys.readouterr().out


def test_classes_without_images_are_no_classes_and_other_files_are_counted(tmp_path, capsys):
    root = labelled(tmp_path / "pets", splits=("",))
    (root / "bird").mkdir()
    (root / "bird" / "notes.txt").write_text("none yet")
    assert load(root, tmp_path).classes == ["cat", "dog"]
    assert "1 files that are not images" in capsys.readouterr().out


def test_test_classes_are_numbered_as_in_train(tmp_path):
    # The test split has no cats: its dogs are still class 1.
    root = labelled(tmp_path / "pets", splits=("train",))
    for i in range(3):
        save(root / "test" / "dog" / f"{i}.png")
    assert load(root, tmp_path).test.labels.tolist() == [1, 1, 1]


def test_labels_in_one_split_only_are_refused(tmp_path):
    root = labelled(tmp_path / "pets", splits=("train",))
    save(root / "test" / "0.png")
    with pytest.raises(UserError, match="both train/ and test/"):
        load(root, tmp_path)


def test_a_test_class_that_train_lacks_is_refused_by_name(tmp_path):
    root = labelled(tmp_path / "pets")
    save(root / "test" / "horse" / "0.png")
    with pytest.raises(UserError, match="horse"):
        load(root, tmp_path)


@pytest.mark.parametrize("files", [[], ["notes.txt"], ["train/cat/notes.txt"]])
def test_a_folder_without_images_is_refused(tmp_path, files):
    (tmp_path / "pets").mkdir()
    for name in files:
        (tmp_path / "pets" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pets" / name).write_text("nothing to see")
    with pytest.raises(UserError, match="no images"):
        load(tmp_path / "pets", tmp_path)


def test_one_image_is_not_enough(tmp_path):
    save(tmp_path / "pets" / "0.png")
    with pytest.raises(UserError, match="one usable image"):
        load(tmp_path / "pets", tmp_path)


def test_spaces_and_letters_of_any_script_are_fine_in_names(tmp_path):
    root = tmp_path / "Meine Bilder ü 写真"
    for name in ("große Katze", "犬", "it's, \"odd\"\n"):
        for i in range(2):
            save(root / name / f"№ {i} é.png")
    data = load(root, tmp_path)
    assert sorted(data.classes) == sorted(["große Katze", "犬", "it's, \"odd\"\n"])
    assert "/" not in data.name and " " not in data.name           # usable in the name of a folder
    assert all((root / name).exists() for name in data.train.names)


def test_a_broken_file_with_a_name_that_is_no_text_is_left_out_too(tmp_path):
    root = labelled(tmp_path / "pets", splits=("",))
    with open(os.fsencode(root / "cat") + b"/\xff\xfe.png", "wb") as file:
        file.write(b"no image")
    assert len(load(root, tmp_path).train.images) == 6


def test_a_relative_path_and_a_link_are_the_same_folder(tmp_path, monkeypatch):
    labelled(tmp_path / "pets")
    (tmp_path / "link").symlink_to("pets")
    monkeypatch.chdir(tmp_path)
    full, relative, link = (load(p, tmp_path) for p in (tmp_path / "pets", "pets", "./link"))
    assert full.fingerprint == relative.fingerprint == link.fingerprint
    assert full.train.names == relative.train.names


def test_loops_of_links_end_and_images_are_taken_once(tmp_path):
    root = labelled(tmp_path / "pets", splits=("",))
    (root / "cat" / "again").symlink_to(root / "cat")
    (root / "cat" / "here").symlink_to(".")
    assert len(load(root, tmp_path).train.images) == 6


def test_a_link_to_the_whole_folder_inside_a_class_brings_no_other_classes_into_it(tmp_path):
    root = labelled(tmp_path / "pets", splits=("",))
    (root / "cat" / "everything").symlink_to(root)
    assert torch.bincount(load(root, tmp_path).train.labels).tolist() == [3, 3]


def test_links_to_nowhere_and_to_themselves_are_left_out(tmp_path):
    root = labelled(tmp_path / "pets", splits=("",))
    (root / "cat" / "gone.png").symlink_to("no such file.png")
    (root / "cat" / "self.png").symlink_to("self.png")
    (root / "loop").symlink_to("loop")
    assert len(load(root, tmp_path).train.images) == 6


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_named_pipe_does_not_make_it_wait_for_ever(tmp_path):
    root = labelled(tmp_path / "pets", splits=("",))
    os.mkfifo(root / "cat" / "pipe.png")
    thread = threading.Thread(target=load, args=(root, tmp_path), daemon=True)
    thread.start()
    thread.join(3)
    waiting = thread.is_alive()
    while thread.is_alive():                                       # let it go: a writer that closes
        try:
            os.close(os.open(root / "cat" / "pipe.png", os.O_WRONLY | os.O_NONBLOCK))
        except OSError:                                            # nobody reads at this moment
            thread.join(.05)
    assert not waiting


# ------------------------------------------------------------------------------------------------
# Folders: sizes, odd images, broken images

@pytest.mark.parametrize("sizes, side", [
    ([(28, 28)] * 3, 28), ([(64, 64)] * 3, 64), ([(200, 300)] * 3, 96), ([(70, 100)] * 3, 64),
    ([(20, 20), (21, 21)], 32), ([(40, 40), (300, 500), (50, 60)], 32), ([(1, 1)] * 3, 32)])
def test_the_side_of_a_folder_is_its_own_or_the_largest_that_the_median_image_fills(
    sizes, side, tmp_path):
    for i, size in enumerate(sizes):
        save(tmp_path / "pets" / f"{i}.png", size=size)
    assert load(tmp_path / "pets", tmp_path).train.images.shape[-1] == side
    assert load(tmp_path / "pets", tmp_path, image_size=16).train.images.shape[-1] == 16


def test_images_are_cropped_at_their_centre_not_squeezed(tmp_path):
    # 120 x 40: thirds of blue, red, blue. The centre 40 x 40 is the red third.
    for i in range(2):
        image = Image.new("RGB", (120, 40), BLUE)
        image.paste(RED, (40, 0, 80, 40))
        (tmp_path / "pets").mkdir(exist_ok=True)
        image.save(tmp_path / "pets" / f"{i}.png")
    view = load(tmp_path / "pets", tmp_path, image_size=32).train.images[0]
    assert near(view[:, :, 1:-1], RED)                             # but for the filter at its edges


def odd(mode, path):
    """A red image (grey 76 = .299 x 255 in grey modes) in an unusual form."""
    if mode == "palette":
        Image.new("RGB", (40, 40), RED).convert("P").save(path)
    elif mode == "CMYK":
        Image.new("CMYK", (40, 40), (0, 255, 255, 0)).save(path.with_suffix(".jpg"), quality=100)
    elif mode == "grey of 16 bits":
        Image.fromarray(np.full((40, 40), 76 * 257, np.uint16)).save(path)
    elif mode == "grey of 32 bits":
        Image.fromarray(np.full((40, 40), 76 / 255, np.float32)).save(path.with_suffix(".tif"))
    elif mode == "animated":
        frames = [Image.new("RGB", (40, 40), c) for c in (RED, BLUE)]
        frames[0].save(path.with_suffix(".gif"), save_all=True, append_images=frames[1:])
    elif mode == "webp":
        Image.new("RGB", (40, 40), RED).save(path.with_suffix(".webp"), lossless=True)
    elif mode == "upper case":
        Image.new("RGB", (40, 40), RED).save(path.with_suffix(".PNG"))
    elif mode in ("tiny", "a line"):
        Image.new("RGB", (1, 1) if mode == "tiny" else (1, 3000), RED).save(path)
    else:
        Image.new("RGB", (40, 40), RED).convert(mode).save(path)


@pytest.mark.parametrize("mode, colour", [
    ("palette", RED), ("RGBA", RED), ("CMYK", RED), ("animated", RED), ("webp", RED), ("tiny", RED),
    ("a line", RED), ("upper case", RED), ("L", (76,) * 3), ("LA", (76,) * 3), ("1", None),
    ("grey of 16 bits", (76,) * 3), ("grey of 32 bits", (76,) * 3)])
def test_unusual_images_show_what_a_person_sees(mode, colour, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "odd").mkdir(exist_ok=True)
        odd(mode, tmp_path / "odd" / f"{name}.png")
    images = load(tmp_path / "odd", tmp_path, image_size=32).train.images
    assert images.shape == (2, 3, 32, 32)
    assert colour is None or near(images[0], colour, 4)


def test_transparent_pixels_become_white(tmp_path):
    for i in range(2):
        image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))          # black, but nobody can see it
        (tmp_path / "clear").mkdir(exist_ok=True)
        image.save(tmp_path / "clear" / f"{i}.png")
    assert near(load(tmp_path / "clear", tmp_path).train.images[0], (255, 255, 255))


def test_photographs_are_turned_upright(tmp_path):
    # The file: left half red, right half blue. Orientation 6: turn by 90 degrees clockwise to view,
    # so the left side comes to the top.
    for i in range(2):
        image = Image.new("RGB", (64, 64), BLUE)
        image.paste(RED, (0, 0, 32, 64))
        exif = image.getexif()
        exif[0x0112] = 6
        (tmp_path / "photos").mkdir(exist_ok=True)
        image.save(tmp_path / "photos" / f"{i}.jpg", exif=exif, quality=95)
    image = load(tmp_path / "photos", tmp_path).train.images[0]
    assert near(image[:, :24], RED, 12) and near(image[:, -24:], BLUE, 12)


def bomb():
    """A PNG of a few bytes that claims 12,000 x 12,000 pixels."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + \
                           struct.pack(">I", zlib.crc32(kind + content))
    header = struct.pack(">IIBBBBB", 12000, 12000, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) +
            chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_broken_files_are_named_and_left_out(tmp_path, capsys):
    root = labelled(tmp_path / "pets", splits=("",))
    whole = save(tmp_path / "whole.jpg", size=(200, 200), quality=95).read_bytes()
    rubbish = {"empty.png": b"", "text.jpg": b"no image", "cut.jpg": whole[:len(whole) // 2],
               "cut.png": (root / "cat" / "0.png").read_bytes()[:-30], "bomb.png": bomb()}
    for name, content in rubbish.items():
        (root / "cat" / name).write_bytes(content)
    (root / "cat" / "folder.png").mkdir()
    data = load(root, tmp_path)
    out = capsys.readouterr().out
    assert torch.bincount(data.train.labels).tolist() == [3, 3]    # labels stay with their images
    assert near(data.train.images[3], (100, 0, 0))
    assert data.train.names[3] == os.path.join("dog", "0.png")
    for name in rubbish:
        assert sum(name in line for line in out.splitlines()) == 1, name
    assert "12000 x 12000 pixels" in out


def test_broken_files_are_mentioned_again_when_the_kept_array_is_used(tmp_path, capsys):
    root = labelled(tmp_path / "pets", splits=("",))
    (root / "cat" / "empty.png").write_bytes(b"")
    load(root, tmp_path)
    capsys.readouterr()
    load(root, tmp_path)
    assert "1 unreadable" in capsys.readouterr().out


def test_many_broken_files_do_not_flood_the_terminal(tmp_path, capsys):
    root = labelled(tmp_path / "pets", splits=("",))
    for i in range(50):
        (root / "cat" / f"broken {i}.png").write_bytes(b"")
    load(root, tmp_path)
    out = capsys.readouterr().out
    assert len(out.splitlines()) < 30 and "30 more" in out         # 50 = 20 named + 30


def test_a_folder_with_no_readable_image_is_refused(tmp_path):
    (tmp_path / "pets").mkdir()
    for i in range(3):
        (tmp_path / "pets" / f"{i}.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of its 3 image files"):
        load(tmp_path / "pets", tmp_path)


def test_a_test_split_with_no_readable_image_is_no_test_split(tmp_path):
    root = labelled(tmp_path / "pets", splits=("train",))
    (root / "test" / "cat").mkdir(parents=True)
    (root / "test" / "cat" / "0.png").write_bytes(b"")
    assert not load(root, tmp_path).has_test


def test_more_images_than_one_part_of_the_decoding_keep_their_order(tmp_path):
    # Parts of 512: the colour of image i is (i // 4, i % 4 * 60, 0).
    (tmp_path / "many").mkdir()
    for i in range(600):
        Image.new("RGB", (8, 8), (i // 4, i % 4 * 60, 0)).save(tmp_path / "many" / f"{i:03}.bmp")
    (tmp_path / "many" / "100.bmp").write_bytes(b"")
    data = load(tmp_path / "many", tmp_path)
    numbers = [int(name[:3]) for name in data.train.names]
    assert numbers == [i for i in range(600) if i != 100]
    assert data.train.images[:, :2, 0, 0].tolist() == [[i // 4, i % 4 * 60] for i in numbers]


# ------------------------------------------------------------------------------------------------
# Folders: the kept array

def test_the_second_start_decodes_nothing_and_gives_the_same(tmp_path, monkeypatch):
    root, files = labelled(tmp_path / "pets"), decodings(monkeypatch)
    first = load(root, tmp_path)
    assert len(files) == 12
    second = load(root, tmp_path)
    assert len(files) == 12
    assert torch.equal(first.train.images, second.train.images)
    assert torch.equal(first.test.labels, second.test.labels)
    assert first.train.names == second.train.names and first.fingerprint == second.fingerprint


def change(root, how):
    file = root / "train" / "cat" / "1.png"
    if how == "added":
        save(root / "train" / "cat" / "9.png")
    elif how == "removed":
        file.unlink()
    elif how == "renamed":
        file.rename(file.with_name("7.png"))
    elif how == "moved to another class":
        file.rename(root / "train" / "dog" / "7.png")
    elif how == "moved to another split":
        file.rename(root / "test" / "cat" / "7.png")
    elif how == "replaced":
        save(file, (1, 2, 3), (41, 41))
    elif how == "replaced, same size":
        stat, content = os.stat(file), file.read_bytes()
        for red in range(1, 256):                                  # a red that compresses alike
            if len(save(file, (red, 20, 0)).read_bytes()) == len(content):
                break
        assert len(file.read_bytes()) == len(content) and file.read_bytes() != content
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    elif how == "class renamed":
        (root / "train" / "cat").rename(root / "train" / "kitten")
        (root / "test" / "cat").rename(root / "test" / "kitten")


@pytest.mark.parametrize("how", [
    "added", "removed", "renamed", "moved to another class", "moved to another split", "replaced",
    "replaced, same size", "class renamed"])
def test_a_changed_folder_is_noticed(how, tmp_path):
    root = labelled(tmp_path / "pets")
    before = load(root, tmp_path)
    change(root, how)
    after, fresh = load(root, tmp_path), load_dataset(str(root), tmp_path / "elsewhere")
    assert after.fingerprint != before.fingerprint
    assert torch.equal(after.train.images, fresh.train.images)
    assert torch.equal(after.train.labels, fresh.train.labels)
    assert after.train.names == fresh.train.names and after.classes == fresh.classes


def test_a_damaged_kept_array_is_made_anew(tmp_path, monkeypatch):
    root = labelled(tmp_path / "pets")
    first = load(root, tmp_path)
    (kept,) = (tmp_path / "kept" / "cache").iterdir()
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1
    kept.write_bytes(content)
    files = decodings(monkeypatch)
    assert torch.equal(load(root, tmp_path).train.images, first.train.images) and len(files) == 12


def test_two_folders_of_the_same_name_are_kept_apart(tmp_path):
    a = labelled(tmp_path / "a" / "pets", splits=("",))
    b = labelled(tmp_path / "b" / "pets", ("cow", "pig"), splits=("",))
    assert load(a, tmp_path).classes == load(a, tmp_path).classes == ["cat", "dog"]
    assert load(b, tmp_path).classes == ["cow", "pig"]
    assert len(list((tmp_path / "kept" / "cache").iterdir())) == 2


def test_a_place_that_cannot_be_written_costs_only_the_second_start(tmp_path, capsys):
    root = labelled(tmp_path / "pets")
    (tmp_path / "kept").write_text("a file where the folder should be")
    assert len(load(root, tmp_path).train.images) == 6
    assert "could not be kept" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# ImageNet and its parts

def tiny_imagenet(folder):
    """The original layout: train/<class>/images/*, val/images/* with val_annotations.txt."""
    root, rows = folder / "tiny-imagenet-200", []
    for c, name in enumerate(("n01", "n02", "n03")):
        for i in range(3):
            save(root / "train" / name / "images" / \
                 f"{name}_{i}.JPEG".replace("JPEG", "jpeg"), (c * 80, 0, 0), (64, 64))
        (root / "train" / name / f"{name}_boxes.txt").write_text("boxes")
    for i, name in enumerate(("n03", "n01", "n02", "n03")):
        file = save(root / "val" / "images" / f"val_{i}.jpeg", size=(64, 64))
        rows.append(f"{file.name}\t{name}\t0\t0\t62\t62")
    (root / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")
    return root


def test_tiny_imagenet_in_its_original_layout(tmp_path):
    tiny_imagenet(tmp_path)
    data = load_dataset("tiny-imagenet", tmp_path)
    assert data.train.images.shape == (9, 3, 64, 64) and data.classes == ["n01", "n02", "n03"]
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    # by the annotations, not the names
    assert data.test.labels.tolist() == [2, 0, 1, 2]


@pytest.mark.parametrize("line", ["val_9.jpeg\tn99\t0\t0\t1\t1", "val_9.jpeg", "\tn01"])
def test_an_annotation_that_makes_no_sense_is_no_traceback(line, tmp_path):
    root = tiny_imagenet(tmp_path)
    with open(root / "val" / "val_annotations.txt", "a") as file:
        file.write(line + "\n")
    try:
        assert len(load_dataset("tiny-imagenet", tmp_path).test.images) == 4
    except UserError as error:
        assert "val_annotations.txt" in str(error)


def test_tiny_imagenet_with_an_empty_train_folder_is_refused(tmp_path):
    (tmp_path / "tiny-imagenet-200" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="tiny-imagenet"):
        load_dataset("tiny-imagenet", tmp_path)


@pytest.mark.parametrize("name", ["tiny-imagenet", "imagenet10", "imagenet-dogs"])
def test_a_missing_imagenet_says_what_to_put_where(name, tmp_path):
    with pytest.raises(UserError, match="(?s)train.*--dataset shapes, which needs nothing"):
        load_dataset(name, tmp_path)


def test_the_parts_of_imagenet_have_ten_and_fifteen_classes_in_order():
    # Class ids follow the order of the list: it must be the sorted one.
    for names, count in ((common.IMAGENET_10, 10), (common.IMAGENET_DOGS, 15)):
        assert len(set(names)) == count and list(names) == sorted(names)


def imagenet(root, leave_out=(), val_leaves_out=()):
    for name in (*common.IMAGENET_10, "n09999999"):
        if name not in leave_out:
            save(root / "train" / name / "0.jpeg")
        if name not in leave_out and name not in val_leaves_out:
            save(root / "val" / name / "0.jpeg")
    return root


def test_imagenet10_takes_its_ten_classes_and_no_other(tmp_path):
    data = load_dataset("imagenet10", imagenet(tmp_path), image_size=16)
    assert data.classes == list(common.IMAGENET_10)
    assert data.train.labels.tolist() == data.test.labels.tolist() == list(range(10))


def test_imagenet10_without_one_of_its_classes_names_it(tmp_path):
    missing = common.IMAGENET_10[4]
    with pytest.raises(UserError, match=f"lacks {missing}$"):
        load_dataset("imagenet10", imagenet(tmp_path, leave_out=[missing]), image_size=16)


def test_imagenet10_without_any_of_its_classes_is_refused(tmp_path):
    save(tmp_path / "train" / "n09999999" / "0.jpeg")
    with pytest.raises(UserError, match=common.IMAGENET_10[0]):
        load_dataset("imagenet10", tmp_path, image_size=16)


def test_validation_classes_are_numbered_as_in_train_even_if_one_is_missing(tmp_path):
    root = imagenet(tmp_path, val_leaves_out=[common.IMAGENET_10[0]])
    try:
        data = load_dataset("imagenet10", root, image_size=16)
        assert data.test.labels.tolist() == list(range(1, 10))
    except UserError as error:
        assert common.IMAGENET_10[0] in str(error)


# ------------------------------------------------------------------------------------------------
# Parts of the training images

def cifar_labels(classes, each, seed=0):
    labels = torch.arange(classes).repeat_interleave(each)
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize("classes, each, ratio, total", [
    (10, 5000, 10, 20431), (10, 5000, 50, 13996), (10, 5000, 100, 12406), (100, 500, 100, 10847)])
def test_long_tails_have_the_published_number_of_images(classes, each, ratio, total):
    # n_c = int(n_max r^(-c / (C - 1))): from n_max to n_max / r.
    labels = cifar_labels(classes, each)
    index = subset(labels, len(labels), ratio, None, seed=0)
    counts = torch.bincount(labels[index]).tolist()
    assert len(index) == total == len(set(index.tolist()))
    assert counts[0] == each and counts == sorted(counts, reverse=True)
    assert abs(counts[-1] - each / ratio) <= 1
    assert counts[1] == int(each * ratio ** (-1 / (classes - 1)))


def test_a_long_tail_is_the_same_for_a_seed_and_another_for_the_next():
    labels = cifar_labels(10, 100)
    a, b, c = (subset(labels, 1000, 10, None, seed) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.bincount(labels[a]), torch.bincount(labels[c]))


def test_a_part_is_balanced_sorted_and_without_repetition():
    labels = cifar_labels(10, 100)
    index = subset(labels, 1000, 1, 253, seed=0)
    assert torch.bincount(labels[index]).tolist() == [
                          26, 26, 26, 25, 25, 25, 25, 25, 25, 25]   # 253
    assert index.tolist() == sorted(set(index.tolist()))


def test_all_images_are_the_default():
    assert torch.equal(subset(cifar_labels(10, 10), 100, 1, None, seed=0), torch.arange(100))
    assert torch.equal(subset(None, 100, 1, None, seed=0), torch.arange(100))


def test_a_part_of_unlabelled_images_is_any_part():
    for labels in (None, torch.full((100,), -1), torch.arange(100) % 4 - 1):
        index = subset(labels, 100, 1, 30, seed=0)
        assert len(set(index.tolist())) == 30 and index.max() < 100


@pytest.mark.parametrize("labels", [None, torch.full((100,), -1), torch.arange(100) % 4 - 1])
def test_a_long_tail_needs_labels(labels):
    with pytest.raises(UserError, match="--imbalance"):
        subset(labels, 100, 10, None, seed=0)


def test_more_images_than_there_are_cannot_be_asked_for():
    with pytest.raises(UserError, match="--train-size 101: there are only 100"):
        subset(cifar_labels(10, 10), 100, 1, 101, seed=0)
    lopsided = torch.tensor([0] * 95 + [1] * 5)                    # 50 of each: class 1 has 5
    with pytest.raises(UserError, match="fewer"):
        subset(lopsided, 100, 1, 100 - 1, seed=0)


def test_whole_data_sets_can_be_asked_for_by_their_size():
    assert len(subset(cifar_labels(10, 10), 100, 1, 100, seed=0)) == 100


def test_an_extreme_ratio_leaves_the_rarest_class_with_nothing_and_says_so_in_the_counts():
    labels = cifar_labels(2, 100)
    assert math.isclose(len(subset(labels, 200, 100, None, seed=0)), 101)       # 100 + 1
