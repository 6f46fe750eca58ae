"""Folders of the user's own images: read as a person would read them, and nothing in silence."""
import builtins
import errno
import functools
import os
import re
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, TiffImagePlugin

import common
import identitize
from common import UserError, load_dataset

RED, BLUE, WHITE, BLACK, GREY = (255, 0, 0), (0, 0, 255), (255,) * 3, (0,) * 3, (128,) * 3


def noise(seed, size=(12, 12)):
    """An image like no other."""
    random = np.random.default_rng(zlib.crc32(str(seed).encode()))
    return Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def make(root, files):
    """Draw a folder: {path: an image, an array, the bytes of a file, the target of a link, or a
    number of images in a folder; a negative number: of broken files}"""
    for name, content in files.items():
        path = root / name
        (path if isinstance(content, int) else path.parent).mkdir(parents=True, exist_ok=True)
        if isinstance(content, int):
            for i in range(abs(content)):
                make(path, {f"{i}.png": noise(f"{name} {i}") if content > 0 else b"no image"})
        elif isinstance(content, str):
            path.symlink_to(content)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            (Image.fromarray(content) if isinstance(content, np.ndarray) else content).save(path)
    return root


def tree(text):
    """What `make` draws, in words: cat=2 (two images in cat), =2 (in the folder itself), dog=-1 (a
    broken one), * (cat=2 dog=3), train/* (the same in train), a.png, a.txt (files), a>b (a link)"""
    files = {}
    for word in re.sub(r"(\S*)\*", r"\1cat=2 \1dog=3", text).split():
        name, sign, content = re.fullmatch("(.*?)(?:([=>])(.*))?", word).groups()
        drawn = noise(name) if name.endswith(".png") else b"text"
        files[name or "."] = int(content) if sign == "=" else content if sign else drawn
    return files


def load(root, tmp_path, **options):
    return load_dataset(str(root), tmp_path / "kept", **options)


def count(split, classes):
    """{class: images}, or the number of images where there are no labels"""
    if classes is None:
        assert split.labels is None
        return len(split.images)
    numbers = torch.bincount(split.labels, minlength=len(classes)).tolist()
    return {name: n for name, n in zip(classes, numbers) if n}


def near(image, colour, levels=3):
    return (image.float() - torch.as_tensor(colour).view(3, 1, 1)).abs().max() <= levels


# ------------------------------------------------------------------------------------------------
# Which folders are classes

SYSTEM = ["__MACOSX", "@eaDir", ".git", ".ipynb_checkpoints", "$RECYCLE.BIN", ".Trash-1000",
          "System Volume Information", "lost+found", ".@__thumb", "#recycle", "@Recycle",
          ".AppleDouble", "__pycache__", "$Recycle.Bin", "LOST.DIR", "FOUND.000", "RECYCLER",
          "@Recently-Snapshot", "Network Trash Folder", "Temporary Items"]

# The folder, as in `tree`, and flags | training images | test images | what one printed line says
LAYOUTS = """
  *                                                         | *
  =5                                                        | 5        |       | no labels
  train/* test/cat=1 test/dog=2                             | *        | cat=1 dog=2
  train=4 val=2                                             | 4        | 2     | no labels
  cat/at/night=2 cat=1 dog/train=1 dog/test=1               | cat=3 dog=2 |  | class&test&train
  cat/Train=1 cat/val=1 dog/Train=2 dog/val=1               | *        |       | splits&Train&val
  * cat/a.txt b.pdf                                         | *        |       | 2 (1 .pdf, 1 .txt)
  * cat/a.heic cat/b.HEIC dog/LICENSE                       | *      |     | 3 (2 .heic, 1 without)
  * emu/a.heic owl/old=0                                    | *        |       | images: 2&emu
  * cat/more.png=1 dog/none.jpg=0                           | cat=3 dog=3

  net=2 test=3 racket=2                                     | net=2 racket=2 test=3 | | test&class
  Training=2 VAL=2 none=3                                   | same |         | Training&VAL&class
  training_set=2 test_set=3                                 | same     |       | splits&test_set
  seg_train/* seg_test/* seg_pred=1              | seg_pred=1 seg_test=5 seg_train=5 | | named train
  trainset=2 testset=3                                      | same     |       | splits&testset
  XTrain=2 XValid=3                                         | same     |       | splits&XTrain
  train=4 test/cat=1 test/dog=2                             | 4   | 3  | of test are not used
  train/good=3 val/good=1 val/broken=2                      | 3   | 3  | of val are not used
  train/* test/* xray/train/*                               | test=5 train=5 xray=5 | | train&class
  train/* test/* docs/a.txt labels/1.json new=0             | *        | *
  train/* test/* drafts=-2                                  | *        | *     | drafts
  train/* test/* =1                                         | *        | *     | left out&1
  train/* test/* test=3                                     | *        | *     | left out&3
  train/* val/* val/a.png test/cat=1 test=2                 | *        | cat=1 | left out&2
  Train/* Test/* __MACOSX/Train/* @eaDir/Train/cat=1        | *        | *
  train/train=2 train/test=1 test/train=1 test/test=2       | test=1 train=2 | test=2 train=1
  train/* train/ant=-1 test/*                               | *        | *     | ant
  train/* test/cat=1 test/emu=1                             | *        | cat=1 | left out&emu
  train/* test/cat=-2 test/dog=-1                           | *        |       | left out&test/
  train/* tEsTiNg/*                                         | *        | *
  TRAINING/* Validation/*                                   | *        | *

  v2/* __MACOSX/v2/cat=-2 README.md                         | *
  a/b/train/d/*                                             | *
  data/v2/TRAIN/* data/v2/Validation/*                      | *        | *
  dog/train/* dog/val/*                                     | *        | *
  train/images/* test/*                                     | *        | *
  train/cat/images=2 train/dog/images=3 val/dog/images=1    | *        | dog=1
  photos=4                                                  | 4        |       | no labels
  train/scan=4 test/scan=2                                  | 4        | 2     | no labels
  ok=4 bad=-2                                               | 4        |       | bad
  * emu=-50                                                 | *        |       | 30&more

  training/* Test/all=3 valid/cat=2 valid/dog=1             | *    | cat=2 dog=1 | left out&Test&3
  train/* testing=3                                         | *        |       | left out&testing&3
  train/* test/* val=2                                      | *        | *     | left out&val&2
  train/* test/* Valid/dog=2                                | *        | *     | left out&Valid&2
  train/* test/cat=-2 test/dog=-1 val/*                     | *        | *     | left out&test/
  train/* test/Cat=2 test/emu=1 val/*                       | *        | *     | left out&Cat, emu
  train/* test/Cat=2 test/emu=1                             | *        |       | left out&Cat, emu
  test/train=2 test/car=3 test/bus=1                        | bus=1 car=3 train=2
  photos/val/training=2 photos/val/match=3                  | match=3 training=2
  train/Ka\u0308fer=2 train/dog=3 test/K\u00e4fer=1         | K\u00e4fer=2 dog=3 | K\u00e4fer=1

  2019/06=2 2019/07=1 2020=3 =1 @eaDir=2 --unlabelled       | 7        |       | no labels
  train/* test/* new=1 --unlabelled                         | 11
  * =4                                                      | 9        |       | --labelled
  * =4 --labelled                                           | *        |       | left out&4
  train/* train=1 test/* --labelled                         | *        | *     | left out&1

  Katze_ä=2 犬=1 собака=2 קטן=1 it's,"odd"=1 Cat=1 cat=2 | same    |       | собака
  @alice=2 #dogs=1 $100=1 _x=1                              | same
  #1.png @me.png =3                                         | 5
  * SYSTEM Thumbs.db .DS_Store cat/._0.png .x.png           | *

  ../a=2 cat>../a dog=3 dog/9.png>../../a/1.png             | cat=2 dog=4
  * cat/gone.png>no.png cat/self.png>self.png o>o emu>none  | *        |       | nothing&emu
  * cat/again>../cat cat/here>. dog/all>.. dog/b>../cat     | *
  ../other/* cat=2 dog=3 dog/up>../..                       | *
  * kitten>cat                                              | *        |       | kitten
  train/* test>train                                        | *        |       | left out&test
  ../d1/* ../d2/cat=1 train>../d1 test>../d2                | *        | cat=1

  =0                                                        | refused  |       | no images
  cat/a.txt dog=0                                           | refused  |       | no images
  @eaDir=2 .x=1 ._0.png                                     | refused  |       | no images
  cat=-2 dog=-1                                             | refused  |       | none of
  test/* val/*                                              | refused  |       | train
  test/* Train/cat=-2                                       | refused  |       | its train folder
  test/* train=0                                            | refused  |       | its train folder
  a/val/* a/training/cat/1.heic                             | refused  |       | its train folder
  test/* train>/mnt/not-there                               | refused  |       | its train folder
  test/* train                                              | refused  |       | its train folder
  =5 test=2                                                 | refused  |       | --unlabelled
  train/* Training/*                                        | refused  |       | Training&train
"""


@pytest.mark.parametrize("line", [*filter(None, map(str.strip, LAYOUTS.splitlines()))])
def test_a_folder_is_read_as_a_person_would_read_it(line, tmp_path, capsys):
    text, train, test, words = [*map(str.strip, line.split("|")), "", "", ""][:4]
    text, *flag = text.split(" --")
    files = tree(text.replace("SYSTEM", ""))
    system = SYSTEM if "SYSTEM" in text else ()
    root = make(tmp_path / "pets", files)
    make(root, {name: 2 for name in system} | {f"cat/{name}/sub": 1 for name in system})
    options = {name: True for name in flag}
    if train == "refused":
        with pytest.raises(UserError, match=words.replace("&", ".*")):
            load(root, tmp_path, **options)
        return
    expected = [int(n) if n.isdigit() else tree(n) if n else None
                for n in (text if train == "same" else train, test)]
    for start in ("first", "from what is kept"):
        data = load(root, tmp_path, **options)
        out = capsys.readouterr().out.replace(str(tmp_path), "")
        lines = out.splitlines()
        found = [count(data.train, data.classes)]
        found += [count(data.test, data.classes) if data.has_test else None]
        assert found == expected and len(lines) < 30, (start, out)
        assert any(all(word in line for word in words.split("&")) for line in lines), (start, out)
        for said in (f"{len(data.train.images)} training", *(data.classes or [])):
            assert said in out


@pytest.mark.parametrize("name", ["@photos", ".cache", "__MACOSX", "train", "写真 é",
                                  "a" * 250, "写" * 80])
def test_the_given_folder_itself_may_have_any_name(name, tmp_path):
    data = load(make(tmp_path / ".hidden" / name, tree("*")), tmp_path)
    assert data.classes == ["cat", "dog"] and not set(data.name) & set("/ ")
    assert list((tmp_path / "kept" / "cache").iterdir())           # its own name is not too long


@pytest.mark.parametrize("text, classes", [
    ("dog\nemu", ["dog", "emu"]), ("\ufeffpug mix\r\n\r\ndog\r\n", ["dog", "pug mix"]),
    ("  dog \nemu\nemu\n", ["dog", "emu"]), ("emu Dromaius\ndog Canis lupus", ["dog", "emu"]),
    ("dog\nyak", None), ("\n \n", None)])
def test_the_classes_named_in_a_file_are_kept_and_no_other(text, classes, tmp_path):
    files = tree("train/* test/* train/emu=2 train/pug=1") | {"train/pug mix": 2}
    root, listed = make(tmp_path / "pets", files), tmp_path / "list.txt"
    listed.write_bytes(text.encode())
    if classes:
        data = load(root, tmp_path, classes=str(listed))
        assert data.classes == classes and count(data.test, classes) == {"dog": 3}
    else:
        with pytest.raises(UserError, match="yak" if "yak" in text else "list.txt"):
            load(root, tmp_path, classes=str(listed))


@pytest.mark.parametrize("text", ["cat dog", "animals rose", "plants tulip cat"])
def test_named_folders_that_turn_out_to_be_no_classes_are_refused(text, tmp_path):
    root = make(tmp_path / "pets", tree("animals/* plants/rose=2 plants/tulip=2"))
    (tmp_path / "list.txt").write_text(text.replace(" ", "\n") + "\nrose")
    with pytest.raises(UserError, match="list.txt.*the classes are animals, plants"):
        load(root, tmp_path, classes=str(tmp_path / "list.txt"))


def test_the_accents_of_a_list_of_classes_may_be_spelled_in_the_other_way(tmp_path):
    root = make(tmp_path / "pets", tree("a=1 Ka\u0308fer=2 M\u00f6we=3"))
    (tmp_path / "list.txt").write_text("K\u00e4fer\nMo\u0308we")
    data = load(root, tmp_path, classes=str(tmp_path / "list.txt"))
    assert count(data.train, data.classes) == {"K\u00e4fer": 2, "M\u00f6we": 3}


def test_a_name_in_another_case_is_not_cut_to_another_class(tmp_path):
    root = make(tmp_path / "pets", {"golden": 2, "golden retriever": 2, "cat": 2})
    (tmp_path / "list").write_text("golden Retriever\ncat")
    with pytest.raises(UserError, match="names golden Retriever, of which"):
        load(root, tmp_path, classes=tmp_path / "list")


def test_a_split_may_end_with_a_space(tmp_path):
    root = make(tmp_path / "pets", {"train /cat": 2, "train /dog": 2, "TEST /cat": 1})
    data = load(root, tmp_path)
    assert data.classes == ["cat", "dog"] and len(data.test.images) == 1


@pytest.mark.parametrize("name", ["shapes", "cifar10", "stl10"])
@pytest.mark.parametrize("flag", ["classes", "unlabelled", "labelled"])
def test_a_set_in_memory_refuses_what_only_folders_have(name, flag, tmp_path):
    with pytest.raises(UserError, match=f"--{flag}.*{name}"):
        load_dataset(name, tmp_path, **{flag: "list.txt"})


def test_names_are_sorted_paths_that_keep_their_image_and_label(tmp_path):
    root = make(tmp_path / "pets", tree("train/* test/*"))
    data = load(root, tmp_path)
    assert data.name == "pets" and data.classes == ["cat", "dog"]
    for part, split in (("train", data.train), ("test", data.test)):
        assert split.names == sorted(split.names) and len(split.names) == 5
        for name, image, label in zip(split.names, split.images, split.labels):
            assert name.split(os.sep)[:2] == [part, data.classes[label]]
            assert (image.permute(1, 2, 0).numpy() == np.array(Image.open(root / name))).all()


def test_more_images_than_one_part_of_the_decoding_keep_their_order(tmp_path):
    # Parts of 512: the colour of image i is (i // 4, i % 4 * 60, 0).
    colours = {f"{i:03}.bmp": Image.new("RGB", (8, 8), (i // 4, i % 4 * 60, 0)) for i in range(520)}
    data = load(make(tmp_path / "many", {**colours, "100.bmp": b""}), tmp_path)
    numbers = [int(name[:3]) for name in data.train.names]
    assert numbers == [i for i in range(520) if i != 100]
    assert data.train.images[:, :2, 0, 0].tolist() == [[i // 4, i % 4 * 60] for i in numbers]


# ------------------------------------------------------------------------------------------------
# Files and folders that cannot be read

def deny(monkeypatch, module, function, name, code):
    """From now on, module.function fails on every path that ends with `name`."""
    real = getattr(module, function)

    def failing(path=".", *args, **options):
        if isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path).endswith(name):
            raise OSError(code, os.strerror(code), path)
        return real(path, *args, **options)
    monkeypatch.setattr(module, function, failing)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_named_pipe_is_not_opened_since_that_would_wait_for_ever(tmp_path, monkeypatch, capsys):
    root = make(tmp_path / "pets", tree("*"))
    os.mkfifo(root / "cat" / "pipe.png")
    deny(monkeypatch, builtins, "open", "pipe.png", errno.EDEADLK)
    assert count(load(root, tmp_path).train, ["cat", "dog"]) == tree("*")
    assert os.strerror(errno.EDEADLK) not in capsys.readouterr().out


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch, capsys):
    root = make(tmp_path / "pets", tree("* emu=2"))
    for function in ("scandir", "listdir"):
        deny(monkeypatch, os, function, "emu", errno.EACCES)
    assert load(root, tmp_path).classes == ["cat", "dog"]
    assert re.search("left out.*emu", capsys.readouterr().out)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_file_that_becomes_readable_comes_in(code, tmp_path, monkeypatch, capsys):
    root = make(tmp_path / "pets", tree("*"))
    with monkeypatch.context() as for_now:
        deny(for_now, builtins, "open", "dog/1.png", code)
        assert count(load(root, tmp_path).train, ["cat", "dog"]) == tree("cat=2 dog=2")
        assert "dog/1.png" in capsys.readouterr().out
    assert count(load(root, tmp_path).train, ["cat", "dog"]) == tree("*")


def png(width, height, bits, data, kind=2):
    """A file that says it is a colour image of this size, whatever the data are."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + \
                           struct.pack(">I", zlib.crc32(kind + content))
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) +
            chunk(b"IEND", b""))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_broken_files_are_named_at_every_start_and_left_out(tmp_path, capsys):
    make(tmp_path, {"whole.jpg": noise(0, (90, 90)), "whole.png": noise(0)})
    jpg, whole = ((tmp_path / f"whole.{kind}").read_bytes() for kind in ("jpg", "png"))
    rubbish = {"empty.png": b"", "text.jpg": b"no image", "cut.jpg": jpg[:len(jpg) // 2],
               "cut.png": whole[:-30], "two\nlines.png": b"x", os.fsdecode(b"\xfcbel.png"): b"x",
               "bomb.png": png(12000, 12000, 8, zlib.compress(b""))}
    root = make(make(tmp_path / "pets", tree("*")) / "cat", rubbish).parent
    for start in range(2):
        data = load(root, tmp_path)
        lines = capsys.readouterr().out.encode().decode().splitlines()           # UTF-8
        assert count(data.train, data.classes) == tree("*")
        for name in rubbish:
            end = re.split("[\n\udcfc]", name)[-1]                  # what is printable in any case
            assert sum(end in line and "left out" in line for line in lines) == 1
        assert any("12000 x 12000" in line for line in lines)


# ------------------------------------------------------------------------------------------------
# Pixels

@pytest.mark.parametrize("sizes, side", [
    ([(28, 28)] * 3, 28), ([(64, 64)] * 3, 64), ([(200, 300)] * 3, 96), ([(70, 100)] * 3, 64),
    ([(20, 20), (21, 21)], 32), ([(40, 40), (300, 500), (50, 60)], 32), ([(1, 1)] * 3, 32)])
def test_the_side_of_a_folder_is_its_own_or_the_largest_that_the_median_image_fills(
        sizes, side, tmp_path):
    root = make(tmp_path / "pets", {f"{i}.png": noise(i, size) for i, size in enumerate(sizes)})
    assert load(root, tmp_path).train.images.shape[-1] == side
    assert load(root, tmp_path, image_size=16).train.images.shape[-1] == 16


def red(mode="RGB", size=(40, 40), **options):
    return lambda path: Image.new("RGB", size, RED).convert(mode).save(path, **options)


def frames(path):
    red(save_all=True, append_images=[Image.new("RGB", (40, 40), BLUE)])(path)


def turned(path, broken=False):
    """Left half red, right half blue; to be viewed after a quarter turn clockwise: red on top.
    broken: with a width of -1, of a type that Pillow cannot write."""
    image = Image.new("RGB", (64, 64), BLUE)
    image.paste(RED, (0, 0, 32, 64))
    width = struct.pack("<HHIi", 0x100, 9, 1, -1) if broken else b""
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1 + broken) + width + struct.pack(
        "<HHIII", 0x112, 3, 1, 6, 0)
    image.save(path, exif=exif, quality=95)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_a_deep_image_is_turned_as_its_orientation_says(orientation, ending, tmp_path):
    pixels = ramp(0, 65535, "uint16")
    pixels[:20, :20] = 65535                                       # no symmetry
    root = make(tmp_path / "deep", {f"b.{ending}": pixels})
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(root / f"a.{ending}", exif=exif)
    seen, plain = load(root, tmp_path, image_size=64).train.images
    plain = Image.fromarray(plain[0].numpy())
    plain.getexif()[0x0112] = orientation
    assert np.array_equal(seen[0].numpy(), np.asarray(ImageOps.exif_transpose(plain)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_a_photo_is_turned_once_as_its_orientation_says(orientation, ending, tmp_path):
    image = noise(0, (64, 64))
    image.getexif()[0x0112] = orientation
    (tmp_path / "odd").mkdir()
    image.save(tmp_path / "odd" / f"a.{ending}", exif=image.getexif())
    seen = load(tmp_path / "odd", tmp_path, image_size=64).train.images[0].permute(1, 2, 0)
    assert np.array_equal(seen.numpy(), np.asarray(ImageOps.exif_transpose(image)))


@pytest.mark.parametrize("name, write, colour", [
    ("a.png", red("P"), RED), ("a.png", red(exif=b"Exif\0\0MM"), RED),
    ("a.webp", red(lossless=True, exif=b"\0" * 20), RED), ("a.PNG", red(), RED),
    ("a.webp", red(lossless=True), RED),
    ("a.Jpeg", red("CMYK", quality=100), RED), ("a.gif", frames, RED), ("a.png", red("RGBA"), RED),
    ("a.png", red("L"), (76,) * 3), ("a.png", red("LA"), (76,) * 3), ("a.jpg", turned, RED),
    ("a.tiff", red("YCbCr", compression="jpeg"), RED), ("a.png", red(size=(1, 900)), RED),
    ("a.jpg", functools.partial(turned, broken=True), RED)])
def test_unusual_images_show_what_a_person_sees(name, write, colour, tmp_path):
    for folder in ("x", "y"):
        (tmp_path / "odd" / folder).mkdir(parents=True)
        write(tmp_path / "odd" / folder / name)
    images = load(tmp_path / "odd", tmp_path, image_size=32).train.images
    assert images.shape == (2, 3, 32, 32) and near(images[0, :, :14], colour, 12)


def ramp(low, high, dtype="float32", rows=64, columns=64):
    """Pixels from low to high, row by row."""
    return np.linspace(low, high, rows * columns).reshape(rows, columns).astype(dtype)


@pytest.mark.parametrize("ending, dtype, low, high", [
    ("png", "uint16", 0, 4095), ("tif", "uint16", 0, 1023), ("png", "uint16", 0, 65535),
    ("tif", "uint16", 29000, 31500), ("png", "uint16", 29000, 31500), ("tif", "int32", -5, 100000),
    ("tif", "float32", -420, 8848), ("tif", "float32", 0, 1), ("tif", "float32", -60, -5),
    ("tif", "float32", 1e-9, 5e-8), ("tif", "float32", 0, 1e30)])
def test_files_of_more_than_8_bits_share_one_scale_and_keep_their_grey_levels(
        ending, dtype, low, high, tmp_path, capsys):
    # b holds the lower half of the scale: it must come out half as bright as a, not as bright as a.
    middle = low + (high - low) / 2
    root = make(tmp_path / "deep", {
        f"train/a.{ending}": ramp(low, high, dtype), f"train/b.{ending}": ramp(low, middle, dtype),
        f"train/c.{ending}": ramp(high, low, dtype), f"test/b.{ending}": ramp(low, middle, dtype)})
    for start in range(2):
        data = load(root, tmp_path)
        assert re.search(r"16-bit.*\d", capsys.readouterr().out)
    a, b, c = data.train.images[:, 0].float()
    assert len(a.unique()) > 200 and a.min() < 10 and a.max() > 245
    assert (a.diff(dim=1) >= 0).all() and (a + c - 255).abs().max() <= 12
    assert abs(b.mean() - a.mean() / 2) < 10 and torch.equal(data.test.images[0, 0].float(), b)


HOT, EDGE, HOLES = ramp(0, 4095, "uint16"), ramp(0, 4095, "uint16", 1000, 20), ramp(0, 9)
HOT[5, 5], EDGE[:, 0], HOLES[20:23, 30:33] = 65535, 0, [np.nan, np.inf, -np.inf]
COLOUR = np.repeat(ramp(0, 4095, ">u2")[:, :, None], 3, 2)         # a camera of 12 bits
COLOUR = png(64, 64, 16, zlib.compress(b"".join(b"\0" + row.tobytes() for row in COLOUR)))


def test_the_hidden_colour_of_a_transparent_image_of_16_bits_stays_hidden(tmp_path):
    # Blue, but for a red square whose colour is kept behind full transparency.
    pixels = np.zeros((64, 64, 4), ">u2")
    pixels[..., 2:] = 65535
    pixels[16:48, 16:48] = 65535, 0, 0, 0
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    seen = Image.new("RGB", (64, 64), BLUE)
    make(tmp_path / "deep", {"a.png": png(64, 64, 16, zlib.compress(rows), 6), "b.png": seen})
    images = load(tmp_path / "deep", tmp_path, image_size=64).train.images
    red, _, blue = images[0, :, 32, 32].tolist()
    assert red == blue and near(images[0, :, :8], BLUE)


@pytest.mark.parametrize("channels, kind", [(2, 4), (4, 6)])
def test_an_opaque_image_of_16_bits_keeps_its_levels_whatever_its_alpha(channels, kind, tmp_path):
    pixels = np.full((64, 64, channels), 65535, ">u2")
    pixels[..., :-1] = ramp(0, 4095, "uint16")[..., None]          # a camera of 12 bits
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    make(tmp_path / "deep", {"a.png": png(64, 64, 16, zlib.compress(rows), kind)})
    make(tmp_path / "deep", {"b.png": ramp(0, 4095, "uint16")})
    images = load(tmp_path / "deep", tmp_path, image_size=64).train.images
    assert len(images[0].unique()) > 200 and torch.equal(images[0], images[1])


def tiff(pixels):
    """The bytes of a colour TIFF of 16 bits, which Pillow cannot write."""
    height, width, n = pixels.shape
    values = {256: width, 257: height, 258: 134, 259: 1, 262: 2, 273: 140, 277: n, 278: height,
              279: pixels.nbytes}
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag != 258 else 3, 3 if tag == 258 else 1, v)
                       for tag, v in values.items())
    head = b"II*\0" + struct.pack("<IH", 8, len(values)) + entries + bytes(4)
    return head.ljust(134, b"\0") + struct.pack("<HHH", 16, 16, 16) + pixels.tobytes()


def test_what_is_lost_of_an_image_is_said(tmp_path, capsys):
    camera = np.repeat(ramp(0, 4095, "<u2")[..., None], 3, 2)
    root = make(tmp_path / "odd", {"a.tif": tiff(camera), "b.tif": tiff(camera), "c.png": noise(0)})
    frames(root / "d.gif")
    for start in range(2):
        assert len(load(root, tmp_path, image_size=64).train.images) == 4
        out = capsys.readouterr().out
        assert "lost, in 2 images: the lower 8 of 16 bits" in out
        assert "lost, in 1 images: all pages or frames but the first" in out


def test_a_photo_of_two_hundred_megapixels_is_decoded_small(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "MAX_PIXELS", 5000)
    root = make(tmp_path / "big", {"a.jpg": noise("a", (400, 400)), "b.png": noise("b")})
    assert len(load(root, tmp_path, image_size=32).train.images) == 2


def test_a_picture_with_too_many_pixels_is_one_line_at_every_start(tmp_path, monkeypatch, capsys,
                                                                  recwarn):
    monkeypatch.setattr(common, "MAX_PIXELS", 5000)
    root = make(tmp_path / "big", {"a.png": noise("a", (100, 100)), "b.png": noise("b"),
                                   "c.png": noise("c")})
    assert common.Image.MAX_IMAGE_PIXELS is None                   # or Pillow warns in its words
    for start in range(2):
        assert len(load(root, tmp_path).train.images) == 2
        lines = [x for x in capsys.readouterr().out.splitlines() if "a.png" in x]
        assert len(lines) == 1 and "10" in lines[0] and not recwarn


@pytest.mark.parametrize("name, content", [
    ("hot pixel.png", HOT), ("dark first column.png", EDGE), ("dark first row.png", EDGE.T),
    ("colour.png", COLOUR), ("holes.tif", HOLES), ("flat.tif", ramp(7, 7)),
    ("nan.tif", np.full_like(HOLES, np.nan)), ("inf.tif", np.full_like(HOLES, np.inf))])
def test_a_hostile_deep_image_costs_neither_itself_nor_others_their_levels(name, content, tmp_path,
                                                                           capsys):
    others = {"y.png": EDGE[::-1]} if "dark" in name else {"y.png": ramp(4095, 0, "uint16")}
    if name.endswith("tif"):
        others = {"y.tif": ramp(0, 9)}
    others["z.png"] = noise("z", (64, 64))
    root = make(tmp_path / "deep", {name: content, **others})
    *deep, eight = load(root, tmp_path, image_size=64, fit="squeeze").train.images
    levels = [len(image.unique()) for image in deep]
    poor = name in ("flat.tif", "nan.tif", "inf.tif") or "16 bits" in capsys.readouterr().out
    assert levels[1] > 50 and (levels[0] > 50 or poor), levels
    assert (eight.permute(1, 2, 0).numpy() == np.array(others["z.png"])).all()   # 8 bits: as it is


def drawing(colour, form="RGBA", hidden=None, opacity=255):
    """A square of one colour on a ground that is transparent, and of the same colour beneath."""
    hidden = colour if hidden is None else hidden
    if form in ("RGBA", "LA"):
        image = Image.new("RGBA", (32, 32), (*hidden, 0))
        image.paste((*colour, opacity), (8, 8, 24, 24))
        return image.convert(form)
    key = 0 if form == "P" else tuple(abs(c - 1) for c in colour)  # the colour that is transparent
    image = Image.new(form, (32, 32), key)
    if form == "P":
        image.putpalette([*hidden, *colour])
    image.paste(1 if form == "P" else colour, (8, 8, 24, 24))
    image.info["transparency"] = key
    return image


@pytest.mark.parametrize("colours, form, ending", [
    *[((colour,) * 3, form, "png") for form in ("RGBA", "LA", "P", "RGB")
      for colour in (WHITE, BLACK)],
    ((WHITE, BLACK, WHITE), "RGBA", "webp"), ((WHITE, GREY, BLACK), "RGBA", "tif"),
    ((RED, BLUE, (0, 255, 0)), "RGBA", "png"), ((GREY,) * 3, "LA", "png"),
    ((WHITE, BLACK, WHITE), "P", "gif")])
def test_drawings_on_a_transparent_ground_stay_visible_on_one_ground(colours, form, ending,
                                                                     tmp_path, capsys):
    files = {f"train/{i}.{ending}": drawing(colour, form) for i, colour in enumerate(colours)}
    opaque = noise(1, (32, 32))
    files.update({"train/opaque.png": opaque.convert("RGBA"), "test/0.png": drawing(colours[0])})
    data = load(make(tmp_path / "icons", files), tmp_path)
    assert re.search("transparent.*grey level", capsys.readouterr().out)
    for image in (*data.train.images[:3].int(), data.test.images[0].int()):
        assert (image[:, 16, 16] - image[:, 2, 2]).abs().max() > 40
        assert near(image[:, :4, :4], data.train.images[0, :, 2, 2], 2)
    assert (data.train.images[3].permute(1, 2, 0).numpy() == np.array(opaque)).all()


def test_hidden_colours_do_not_bleed_and_half_transparency_mixes(tmp_path):
    # Hidden red under a white square, shrunk to a quarter: no pixel may turn reddish.
    root = make(tmp_path / "icons", {"a.png": drawing(WHITE, hidden=RED),
                                     "b.png": drawing(WHITE, opacity=128)})
    x = load(root, tmp_path, image_size=8).train.images.int()
    assert (x[0, 0] - x[0, 1]).abs().max() <= 8
    assert (2 * x[1, :, 4, 4] - 255 - x[1, :, 0, 0]).abs().max() <= 8


@pytest.mark.parametrize("fit, low, high", [("crop", 0, 0), ("pad", 5, 12), ("squeeze", 60, 64)])
@pytest.mark.parametrize("upright", [True, False])
def test_the_ends_of_a_strip_are_lost_only_to_the_crop(fit, low, high, upright, tmp_path, capsys):
    # 30 x 200 with a red end of 30 x 20. At 64 px: 30 / 200 x 64 = 9.6 wide, or squeezed to 64.
    strip = Image.new("RGB", (30, 200), BLUE)
    strip.paste(RED, (0, 180, 30, 200))
    strip = strip if upright else strip.transpose(Image.Transpose.TRANSPOSE)
    root = make(tmp_path / "strips", {f"{i}.png": strip for i in range(3)})
    for other in ("squeeze", "crop"):                              # what was kept is not mixed up
        load(root, tmp_path, image_size=64, fit=other)
    capsys.readouterr()
    image = load(root, tmp_path, image_size=64, fit=fit).train.images[0].int()
    assert low <= ((image[0] - image[2]) > 50).any(0 if upright else 1).sum() <= high
    said = capsys.readouterr().out
    assert ("85%" in said and "--fit" in said) == (fit == "crop")  # 1 - 30 / 200


FLAT = [Image.new("RGB", (12, 12), (20 * i, 250 - 20 * i, 7)) for i in range(9)]
MANY = [noise(i) for i in range(29)]


@pytest.mark.parametrize("images, words", [
    (FLAT + MANY[:3], "9 of 12 .*flat"), ([noise(0)] * 10 + MANY[1:3], "(9|10) of 12 .*cop"),
    ([Image.new("RGB", (12, 12))] * 5, "5 of 5 .*flat"), (MANY + FLAT[:1], None), (MANY, None),
    ([noise(i).point(lambda v: v // 128) for i in range(6)], "6 of 6 .*flat"),
    ([noise(0, (40, 44)), noise(1, (41, 40)), noise(2, (20, 200))], None)])      # median: 9% lost
def test_what_is_wrong_with_many_images_is_said_at_every_start(images, words, tmp_path, capsys):
    root = make(tmp_path / "pets", {f"{i:02}.png": image for i, image in enumerate(images)})
    for start in range(2):
        load(root, tmp_path)
        out = capsys.readouterr().out
        assert re.search(words, out) if words else "WARNING" not in out and "--fit" not in out


def test_test_images_that_are_training_images_are_counted_by_their_pixels(tmp_path, capsys):
    x, y = noise("x"), noise("y")                                  # other names, kinds and classes
    root = make(tmp_path / "pets", tree("train/*") | {
        "train/cat/x.png": x, "train/dog/y.png": y, "test/cat/a.png": x, "test/dog/b.bmp": x,
        "test/dog/c.png": y, "test/dog/d.png": noise("z")})
    for start in range(2):
        load(root, tmp_path)
        assert re.search("3 of 4 test images.*train", capsys.readouterr().out)


@pytest.mark.parametrize("drawn, words", [
    (lambda i: Image.new("RGB", (12, 12), (20 * i, 0, 0)), "3 of 3 test images are one flat"),
    (lambda i: noise("one"), "2 of 3 test images are copies of others")])
def test_a_test_split_that_shows_nothing_is_told(drawn, words, tmp_path, capsys):
    files = {f"test/cat/{i}.png": drawn(i) for i in range(3)}
    load(make(tmp_path / "pets", tree("train/*") | files), tmp_path)
    assert words in capsys.readouterr().out


@pytest.mark.parametrize("text, told", [("*", True), ("test/* train/*", False), ("=20", False)])
def test_copies_that_help_knn_are_told_where_images_are_scored_by_each_other(text, told, tmp_path,
                                                                             capsys):
    place = {"*": "cat/", "=20": ""}.get(text, "train/cat/")
    twice = {f"{place}{name}.png": noise("one") for name in "ab"}
    load(make(tmp_path / "pets", tree(text) | {f"{place}more": 20} | twice), tmp_path)
    assert ("are copies of others: kNN is too high" in capsys.readouterr().out) == told


# ------------------------------------------------------------------------------------------------
# The program's own output

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder of photos in which somebody ran a script: runs/ and data/ lie in it."""
    root = make(tmp_path_factory.mktemp("own") / "photos", tree("=6"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        identitize.main("--dataset . --clusters 2 --epochs 1 --width 16 --image-size 8 "
                        "--batch-size 3 --device cpu".split())
    return root


@pytest.mark.parametrize("gone", ["", "*.pt", "*.pt result.json", "*.pt *.json*",
                                  "*.pt *.csv result.json",        # deleted to save space
                                  "log.jsonl *.csv result.json"])  # stopped in its first epoch
@pytest.mark.parametrize("place", ["runs/identitize-pets-seed0", "my run", "cat/older"])
def test_a_folder_that_holds_a_run_is_no_data(finished, gone, place, tmp_path, capsys):
    root = make(tmp_path / "pets", tree("* dog/result.json"))
    shutil.copytree(next((finished / "runs").iterdir()), root / place)
    for pattern in gone.split():
        for file in (root / place).glob(pattern):
            file.unlink()
    data = load(root, tmp_path)
    assert count(data.train, data.classes) == tree("*")
    assert place.split("/")[0] in capsys.readouterr().out


@pytest.mark.parametrize("files", ["detection.json detection.png", "backbone.pt result.json"])
def test_a_folder_with_some_of_the_files_of_a_run_is_no_data(files, tmp_path, capsys):
    own = " ".join(f"out/{file}" for file in files.split())
    data = load(make(tmp_path / "pets", tree(f"* out/views.png {own}")), tmp_path)
    assert count(data.train, data.classes) == tree("*")
    assert re.search("left out, holds .* of a run: .*out", capsys.readouterr().out)


@pytest.mark.parametrize("mark", ["log.jsonl", "clusters.csv", "backbone.pt"])
def test_a_run_that_lies_among_the_photos_is_no_data_and_the_photos_are(mark, tmp_path, capsys):
    own = f"{mark} curves.png prototypes.png sheets=2"
    data = load(make(tmp_path / "pets", tree(f"raw/* {own}")), tmp_path)
    assert count(data.train, data.classes) == tree("*")
    assert re.search("left out, as of a run: .*curves.png.*sheets", capsys.readouterr().out)
    with pytest.raises(UserError, match="no images"):              # and a run alone is no data set
        load(make(tmp_path / "run", tree(own)), tmp_path)


def test_pictures_with_names_of_a_run_are_data_where_there_is_no_run(tmp_path):
    data = load(make(tmp_path / "pets", tree("views.png curves.png =2")), tmp_path)
    assert len(data.train.images) == 4


def test_a_second_run_inside_the_photos_sees_the_same_photos(finished, monkeypatch):
    monkeypatch.chdir(finished)
    for options in ({}, {"unlabelled": True}, {"out": "runs/other"}):
        assert len(load_dataset(".", "data", **options).train.images) == 6


@pytest.mark.parametrize("out, data_dir, place", [
    ("pets/results", "kept", "results/sheets"), ("pets/a/b", "kept", "a/b"),
    ("pets/../pets/results", "kept", "results"), ("link/results", "kept", "results"),
    (None, "pets/downloads", "downloads/x"), (None, "pets/cat/d", "cat/d"), (None, ".", None),
    (".", "kept", None), ("pets-results", "kept", None), (None, "pets", None)])
@pytest.mark.parametrize("unlabelled", [False, True])
def test_out_and_data_dir_below_the_data_set_are_no_data(out, data_dir, place, unlabelled, tmp_path,
                                                        monkeypatch, capsys):
    own = {f"pets/{place}": 2} if place else {}
    monkeypatch.chdir(make(tmp_path, {**tree("pets/* link>pets"), **own}))
    data = load_dataset("pets", data_dir, out=out, unlabelled=unlabelled)
    assert count(data.train, data.classes) == (5 if unlabelled else tree("*"))
    assert ("left out, --out or --data-dir " in capsys.readouterr().out) == bool(own)


# ------------------------------------------------------------------------------------------------
# What is kept, and the identity of a data set

def bitmaps(root, seed=""):
    """Files that are all of the same size and of the same time."""
    root = make(root, {f"{split}/{name}/{i}.bmp": noise(f"{seed}{split}{name}{i}") for i in range(3)
                       for name in ("cat", "dog") for split in ("train", "test")})
    for file in root.rglob("*.bmp"):
        os.utime(file, (10**9, 10**9))
    return root


def swap(root, a, b):
    (root / a).rename(root / "third")
    (root / b).rename(root / a)
    (root / "third").rename(root / b)


def edit(root):
    """Other pixels; size and time of the file as before."""
    content = (root / "train/cat/1.bmp").read_bytes()
    (root / "train/cat/1.bmp").write_bytes(content[:-100] + bytes(100))
    os.utime(root / "train/cat/1.bmp", (10**9, 10**9))


def move(root, a, b):
    (root / a).rename(root / b)


@pytest.mark.parametrize("change", [
    lambda root: make(root, {"train/cat/9.png": noise("new")}),
    lambda root: make(root, {"train/cat/9.tif": ramp(0, 9)}),
    lambda root: make(root, {"train/cat/1.bmp": noise("new", (12, 13))}),
    lambda root: (root / "train/cat/1.bmp").unlink(), edit,
    lambda root: bitmaps(root.with_name("new"), "other") and move(root, "train", "../old") or
    (root / "train").symlink_to("../new/train"),
    lambda root: move(root, "train/cat/1.bmp", "train/dog/7.bmp"),
    lambda root: move(root, "train/cat/1.bmp", "test/cat/7.bmp"),
    lambda root: swap(root, "train/cat/1.bmp", "train/cat/2.bmp"),
    lambda root: swap(root, "train/cat/1.bmp", "train/dog/1.bmp"),
    lambda root: swap(root, "train/cat", "train/dog"), lambda root: swap(root, "train", "test"),
    lambda root: bitmaps(root.with_name("new"), "other") and swap(root.parent, "pets", "new")])
def test_a_changed_folder_is_noticed(change, tmp_path):
    root = bitmaps(tmp_path / "pets")
    before = load(root, tmp_path)
    change(root)
    after, fresh = load(root, tmp_path), load_dataset(str(root), tmp_path / "elsewhere")
    assert after.fingerprint == fresh.fingerprint != before.fingerprint
    for a, b in ((after.train, fresh.train), (after.test, fresh.test)):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        assert a.names == b.names


@pytest.mark.parametrize("change", [
    lambda root: [os.utime(file, (1, 1)) for file in root.rglob("*")] and root,
    lambda root: Path(shutil.copytree(root, f"{root} 2", copy_function=shutil.copyfile)),
    lambda root: root.rename(root.with_name("Ünd anderswo")),
    lambda root: root.with_name("link").symlink_to("pets") or root.with_name("link"),
    lambda root: Path(shutil.move(root, root.with_name("x") / "y")).parent,
    lambda root: make(root, {"notes.txt": b"x", "train/cat/broken.png": b"x"}),
    lambda root: make(root, {"test/cat/9.png": noise(9)})])
def test_the_same_training_pixels_are_the_same_data_set(change, tmp_path):
    root = bitmaps(tmp_path / "pets")
    (tmp_path / "x").mkdir()
    before = load(root, tmp_path)
    assert load(change(root), tmp_path).fingerprint == before.fingerprint


def test_the_second_start_decodes_nothing_and_gives_the_same(tmp_path, monkeypatch):
    files, real = [], common.decode
    monkeypatch.setattr(common, "decode", lambda path, *how, **more: (
        files.append(Path(path).name), real(path, *how, **more))[1])
    root = make(bitmaps(tmp_path / "pets"), {"train/cat/broken.png": b""})
    make(root, {"train/cat/deep.tif": ramp(0, 1)})
    first = load(root, tmp_path)
    assert len(files) == 14
    second = load(root, tmp_path)                                  # but for the broken file, which
    assert set(files[14:]) <= {"broken.png"}                       # may be sound by now
    assert torch.equal(first.train.images, second.train.images)
    assert torch.equal(first.test.labels, second.test.labels) and first.decoding == second.decoding
    assert first.train.names == second.train.names and first.fingerprint == second.fingerprint


@pytest.mark.parametrize("damage", [
    lambda kept, other: kept[:len(kept) // 2], lambda kept, other: b"", lambda kept, other: other,
    lambda kept, other: b"\x80\x04N.",
    lambda kept, other: kept[:1500] + bytes([kept[1500] ^ 1]) + kept[1501:]])
def test_a_kept_file_that_is_damaged_or_of_another_folder_is_not_taken(damage, tmp_path):
    root, other = bitmaps(tmp_path / "a/pets"), bitmaps(tmp_path / "b/pets", "other")
    first, second = load(root, tmp_path), load_dataset(str(other), tmp_path / "other")
    assert not torch.equal(first.train.images, second.train.images)
    mine, theirs = (next((tmp_path / place).rglob("*.*")) for place in ("kept", "other"))
    mine.write_bytes(damage(mine.read_bytes(), theirs.read_bytes()))
    assert torch.equal(load(root, tmp_path).train.images, first.train.images)


def test_a_place_that_cannot_be_written_costs_only_the_second_start(tmp_path, capsys):
    (tmp_path / "kept").write_text("a file where the folder should be")
    assert len(load(make(tmp_path / "pets", tree("*")), tmp_path).train.images) == 5
    assert "could not be kept" in capsys.readouterr().out


@pytest.mark.parametrize("flat, n, warned", [(1, 10, False), (2, 10, True)])
def test_a_tenth_of_flat_images_is_not_yet_worth_a_warning(flat, n, warned, tmp_path, capsys):
    files = {f"{i}.png": FLAT[i] if i < flat else noise(i) for i in range(n)}
    root = make(tmp_path / "pets", files)
    load(root, tmp_path)
    assert ("WARNING" in capsys.readouterr().out) == warned


def test_an_image_with_one_flat_channel_is_not_flat(tmp_path, capsys):
    pixels = [np.array(noise(i)) for i in range(6)]
    for image in pixels:
        image[..., 2] = 7
    load(make(tmp_path / "pets", {f"{i}.png": image for i, image in enumerate(pixels)}), tmp_path)
    assert "WARNING" not in capsys.readouterr().out


def test_holes_of_a_float_image_are_black_but_plus_infinity(tmp_path):
    make(tmp_path / "deep", {"a.tif": HOLES, "b.tif": ramp(0, 9)})  # rows 20 to 22: nan, inf, -inf
    image = load(tmp_path / "deep", tmp_path, image_size=64).train.images[0, 0, 20:23, 30:33]
    assert image.tolist() == [[0, 255, 0]] * 3


@pytest.mark.parametrize("level, tag", [(-3.4e38, None), (-9999, "-9999"), (-32768, "-32768 ")])
def test_pixels_without_a_value_do_not_set_the_scale(level, tag, tmp_path):
    raster, info = ramp(100, 900), TiffImagePlugin.ImageFileDirectory_v2()
    raster[:8] = level
    if tag:
        info[42113] = tag                                          # GDAL_NODATA
    root = make(tmp_path / "deep", {"b.tif": ramp(100, 900)})
    Image.fromarray(raster).save(root / "a.tif", tiffinfo=info)
    image = load(root, tmp_path, image_size=64).train.images[0, 0]
    assert (image[:8] == 0).all() and len(image[8:].unique()) > 200


def test_a_colour_ppm_of_16_bits_is_said_to_lose_some(tmp_path, capsys):
    camera = np.repeat(ramp(0, 4095, ">u2")[..., None], 3, 2).tobytes()
    make(tmp_path / "deep", {"a.ppm": b"P6 64 64 65535\n" + camera, "b.ppm": noise(0, (64, 64))})
    load(tmp_path / "deep", tmp_path)
    assert "lost, in 1 images: the lower 8 of 16 bits" in capsys.readouterr().out


def test_one_hot_pixel_does_not_set_the_scale(tmp_path):
    seen = np.bincount(np.random.default_rng(0).integers(4096, size=1000), minlength=4096)
    hot = ramp(0, 4095, "uint16")
    hot.flat[np.argmax(seen == 1)] = 65535                         # one that the look meets, once
    make(tmp_path / "deep", {"a.png": hot, "b.png": ramp(4095, 0, "uint16")})
    assert all(len(image.unique()) > 200 for image in
               load(tmp_path / "deep", tmp_path, image_size=64).train.images)


def test_opaque_images_with_an_alpha_channel_are_not_called_transparent(tmp_path, capsys):
    make(tmp_path / "icons", {f"{i}.png": noise(i).convert("RGBA") for i in range(3)})
    load(tmp_path / "icons", tmp_path)
    assert "transparent" not in capsys.readouterr().out


@pytest.mark.parametrize("size, side", [((64, 100), 64), ((96, 130), 96)])
def test_a_median_image_of_exactly_a_side_fills_it(size, side, tmp_path):
    root = make(tmp_path / "pets", {f"{i}.png": noise(i, size) for i in range(3)})
    assert load(root, tmp_path).train.images.shape[-1] == side
