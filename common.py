"""What the four scripts share: data, views, backbone, evaluation, run folder, pictures.

Nothing here belongs to one paper. A loss, a head, a recipe of augmentations, a memory: each stands
in the script of its method. The rule that decides: does the paper have a sentence about it? Then it
is in the script. Is it standard, and do the scripts use it identically? Then it is here.

    1. Failing well    UserError, exit codes, one clear line instead of a traceback
    2. Randomness      one generator for each (seed, epoch, purpose)
    3. Data            the whole dataset as one uint8 tensor on the device
    4. Views           batched augmentations, a random draw of its own for each image
    5. Backbone        torchvision's ResNet-18 with the right stem for the image size
    6. Training        learning rate, batches, a step that never takes in a NaN
    7. Evaluation      clusters, k-means, kNN, linear probe
    8. Run folder      log, checkpoints, results, clusters.csv
    9. Pictures        grids of images, matrices

Shapes: N images, B of a batch, H x W pixels, D feature dimensions, K clusters, C classes.
"""
import argparse
import contextlib
import csv
import difflib
import hashlib
import io
import json
import math
import os
import pickle
import socket
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from scipy.optimize import linear_sum_assignment
from torch import nn
from torchvision.models.resnet import BasicBlock

# ------------------------------------------------------------------------------------------------
# 1. Failing well


class UserError(Exception):
    """Something the user can put right: shown as one line, exit code 2."""


class NotFinite(Exception):
    """The loss or a gradient became NaN or infinite: shown as one line, exit code 1."""


def run_script(train, args):
    """Call train(args) and turn every expected failure into one line on stderr and an exit code:
    2 what the user can put right, 1 what the machine or the numbers did, 130 Ctrl-C."""
    script = Path(sys.argv[0]).name
    try:
        train(args)
        return
    except UserError as error:
        code, line = 2, str(error)
    except NotFinite as error:
        code, line = 1, str(error)
    except KeyboardInterrupt:
        code, line = 130, "interrupted; the last finished epoch is kept, --resume continues from it"
    except torch.OutOfMemoryError:
        code, line = 1, (f"the device is out of memory: lower --batch-size (now {args.batch_size}), "
                         f"--width (now {args.width}) or --image-size")
    except BrokenPipeError:                                         # whoever read our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code, line = 1, "nobody reads the output any more; stopped, --resume continues"
    except OSError as error:                                        # a full disk, a removed folder
        code, line = 1, f"the machine refused a file: {error}"
    print(f"\n{script}: {line}" if sys.stderr.isatty() else f"{script}: {line}", file=sys.stderr)
    raise SystemExit(code)


class Parser(argparse.ArgumentParser):
    """argparse that answers a wrong argument with one line and takes no abbreviated flags."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists every flag)\n")


def number(kind, low, high=None, above=False):
    """An argparse type: an int or a finite float that is at least low (above=True: more than low)
    and at most high."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        good = (value > low if above else value >= low) and value <= (2**31 if high is None else high)
        if not good:
            limits = f"{'more than' if above else 'at least'} {low}" + (f", at most {high}" if high else "")
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {'a whole number' if kind is int else 'a number'} of {limits}")
        return value
    return convert


def progress(what, done, total, started):
    """A live line, rewritten in place; on a terminal only, so that log files stay readable."""
    if sys.stdout.isatty():
        left = (time.time() - started) * (total - done) / max(done, 1)
        line = f"  {what} {done:,}/{total:,}, {clock_text(left)} left"
        print("\r" + (line.ljust(78) if done < total else " " * 78 + "\r"), end="", flush=True)


def clock_text(seconds):
    """75 -> '1m15s'."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else \
        f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


# ------------------------------------------------------------------------------------------------
# 2. Randomness

def generator(seed, epoch, purpose):
    """A CPU generator that depends on (seed, epoch, purpose) alone. No random state has to be saved:
    a resumed epoch draws the very numbers that the uninterrupted run would have drawn."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def pick_device(name):
    """'auto', 'cpu' or 'cuda' -> torch.device. Raises UserError when there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA GPU here; leave the flag out to use the CPU")
    torch.backends.cudnn.benchmark = True
    return torch.device(name)


def fast_dtype(device):
    """bfloat16 where the device multiplies it natively (on CPUs: AVX512-BF16 or AMX), else float32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = any(getattr(torch.cpu, asks, bool)() for asks in
                   ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return torch.bfloat16 if fast else torch.float32


def autocast(device):
    """Mixed precision for the network: float32 weights, bfloat16 convolutions and products where
    that is fast. Losses are computed outside it, in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=fast_dtype(device) == torch.bfloat16)


# ------------------------------------------------------------------------------------------------
# 3. Data: the whole dataset is one uint8 tensor on the device. There is no DataLoader and no worker;
#    CIFAR takes 0.15 GB, Tiny-ImageNet 1.2 GB, STL-10 with its unlabelled images 2.9 GB.

class Split(NamedTuple):
    images: torch.Tensor                  # (N, 3, H, W) uint8
    labels: Optional[torch.Tensor]        # (N,) int64, -1 where unknown; None: no labels at all
    names: list                           # N strings: the path of a file, or 'train/17'


class Dataset(NamedTuple):
    name: str                             # short, usable in a folder name
    train: Split
    test: Split                           # the train split itself where there is no other
    classes: Optional[list]               # C names, or None: unlabelled
    fingerprint: str                      # changes when the images do

    @property
    def has_test(self):
        return self.test is not self.train


NAMES = ("shapes", "cifar10", "cifar100", "cifar20", "fashion-mnist", "stl10", "tiny-imagenet",
         "imagenet10", "imagenet-dogs")
IMAGE_FILES = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm",
               ".pgm"}
MAX_PIXELS = 100_000_000                  # a larger picture is refused: it may be a bomb
# The classes of the ImageNet subsets that the clustering literature uses.
IMAGENET_10 = ("n02056570 n02085936 n02128757 n02690373 n02692877 n03095699 n04254680 n04285008 "
               "n04467665 n07747607").split()
IMAGENET_DOGS = ("n02085936 n02086646 n02088238 n02091467 n02097130 n02099601 n02101388 n02101556 "
                 "n02102177 n02105056 n02105412 n02105855 n02107142 n02110958 n02112137").split()
# Superclass of each of the 100 classes of CIFAR-100, in their alphabetical order.
CIFAR_20 = [4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13,
            15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4,
            17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9,
            13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13]
SUPERCLASSES = ("aquatic mammals,fish,flowers,food containers,fruit and vegetables,electrical "
                "devices,furniture,insects,large carnivores,large outdoor things,large outdoor "
                "scenes,large omnivores and herbivores,medium mammals,invertebrates,people,reptiles,"
                "small mammals,trees,vehicles 1,vehicles 2").split(",")


def load_dataset(name, data_dir="data", image_size=None):
    """A dataset by name, or a folder of images by path. -> Dataset, on the CPU.

    name        one of NAMES, or a folder: DIR/train/<class>/* with DIR/test/<class>/*;
                or DIR/<class>/*; or images directly in DIR (no labels)
    data_dir    where downloads and decoded folders are kept; for imagenet10 and imagenet-dogs the
                ImageNet folder with its train/ and val/
    image_size  side in pixels after an antialiased resize of the shorter side and a centre crop;
                None: the dataset's own (folders: see _folder_size)

    Raises UserError, one line, for an unknown name, a missing or unusable folder, a failed download.
    """
    data_dir = Path(data_dir)
    if name in NAMES:
        if name == "shapes":
            loaded = _shapes(image_size or 32)
        elif name in ("tiny-imagenet", "imagenet10", "imagenet-dogs"):
            loaded = _imagenet(name, data_dir, image_size)
        else:
            loaded = _torchvision(name, data_dir, image_size)
    elif Path(name).expanduser().is_dir():
        loaded = _folder(Path(name).expanduser(), data_dir, image_size)
    else:
        close = difflib.get_close_matches(name, NAMES, 1)
        hint = f"did you mean {close[0]}?" if close else "no such folder either"
        raise UserError(f"--dataset {name}: {hint} Known: {', '.join(NAMES)}, or the path of a folder "
                        f"of images")
    if len(loaded.train.images) < 2:
        raise UserError(f"--dataset {name}: {len(loaded.train.images)} usable image; two at least are "
                        f"needed")
    return loaded


def _shapes(size, train=5000, test=2000):
    """The embedded dataset, drawn in two seconds: small pictures of ten kinds of shapes. The kind is
    the class; colour, position, size, rotation, background and noise are nuisances, so k-means on
    the pixels stays near chance. Always the same pictures."""
    kinds = ["disc", "square", "triangle", "star", "cross", "ring", "crescent", "heart", "bar", "T"]
    rng = np.random.default_rng(2025)
    n = train + test
    labels = np.arange(n) % len(kinds)
    uniform = lambda low, high: rng.uniform(low, high, (n, 1, 1)).astype(np.float32)  # noqa: E731
    # A pixel grid in the frame of each shape: centred, rotated up to 20 degrees, unit radius.
    grid = (np.arange(size, dtype=np.float32) + .5) / size
    radius, angle = uniform(.30, .42), uniform(-20, 20) * np.pi / 180
    x, y = grid[None, None, :] - .5 - uniform(-.1, .1), grid[None, :, None] - .5 - uniform(-.1, .1)
    x, y = (x * np.cos(angle) + y * np.sin(angle)) / radius, (y * np.cos(angle) - x * np.sin(angle)) / radius
    distance = np.empty((n, size, size), np.float32)               # signed, negative inside
    for kind, name in enumerate(kinds):
        rows = labels == kind
        distance[rows] = _signed_distance(name, x[rows], y[rows])
    cover = np.clip(.5 - distance * radius * size, 0, 1)[:, None]  # antialiased over one pixel
    # Colours are independent; only the brightness is ordered, the shape above its background.
    back, fore = rng.uniform(0, .6, (n, 3, 1, 1)), rng.uniform(.3, 1, (n, 3, 1, 1))
    fore += np.clip(.25 - (fore.mean(1) - back.mean(1)), 0, None)[:, None]
    back, fore = back.astype(np.float32), fore.astype(np.float32)
    slope = rng.uniform(-.15, .15, (2, n, 3, 1, 1)).astype(np.float32)
    back = back + slope[0] * (grid[None, None, None, :] - .5) + slope[1] * (grid[None, None, :, None] - .5)
    wave = np.sin(grid[None, None, :, None] * uniform(5, 30)[:, None] + grid * uniform(5, 30)[:, None])
    image = back + .04 * wave + cover * (fore - back)
    image += rng.normal(0, .04, image.shape).astype(np.float32)
    images = torch.from_numpy((np.clip(image, 0, 1) * 255).round().astype(np.uint8))
    return _splits("shapes", images[:train], labels[:train], images[train:], labels[train:], kinds)


def _signed_distance(kind, x, y):
    """(distance to the outline of a shape of radius about 1 in its own frame, negative inside)"""
    box = lambda u, v, a, b: np.maximum(np.abs(u) - a, np.abs(v) - b)              # noqa: E731
    r = np.hypot(x, y)
    if kind == "disc":
        return r - .9
    if kind == "square":
        return box(x, y, .75, .75)
    if kind == "triangle":
        return np.maximum(y - .6, .866 * np.abs(x) - .5 * y - .5)
    if kind == "star":
        turn = 2 * np.pi / 5
        a = np.abs((np.arctan2(x, -y) + turn / 2) % turn - turn / 2)   # folded into half a point
        u, v = r * np.cos(a), r * np.sin(a)
        return .328 * (u - 1) + .945 * v                               # edge from tip to notch
    if kind == "cross":
        return np.minimum(box(x, y, .95, .3), box(x, y, .3, .95))
    if kind == "ring":
        return np.abs(r - .7) - .22
    if kind == "crescent":
        return np.maximum(r - .95, .75 - np.hypot(x - .45, y))
    if kind == "heart":
        lobes = np.hypot(np.abs(x) - .42, y + .3) - .48
        return np.minimum(lobes, np.maximum(.74 * np.abs(x) + .67 * y - .6, -y - .3))
    if kind == "bar":
        return box(x, y, .95, .3)
    return np.minimum(box(x, y + .6, .85, .25), box(x, y - .1, .25, .9))       # T


def _splits(name, train_x, train_y, test_x, test_y, classes):
    """Arrays to a Dataset whose images are named by split and index."""
    train_x, test_x = torch.as_tensor(train_x), torch.as_tensor(test_x)
    splits = [Split(x.contiguous(), torch.as_tensor(np.asarray(y), dtype=torch.int64),
                    [f"{split}/{i}" for i in range(len(x))])
              for split, x, y in (("train", train_x, train_y), ("test", test_x, test_y))]
    digest = hashlib.sha256(train_x[:: max(1, len(train_x) // 64)].numpy().tobytes()).hexdigest()
    return Dataset(name, *splits, list(classes), digest[:16])


def _torchvision(name, data_dir, image_size):
    """The sets that torchvision downloads and verifies."""
    sets = torchvision.datasets
    kind = {"cifar10": sets.CIFAR10, "cifar100": sets.CIFAR100, "cifar20": sets.CIFAR100,
            "fashion-mnist": sets.FashionMNIST, "stl10": sets.STL10}[name]
    parts = [{"split": "train+unlabeled"}, {"split": "test"}] if name == "stl10" else \
        [{"train": True}, {"train": False}]

    def read(download):
        return [kind(data_dir, download=download, **part) for part in parts]
    try:
        try:
            train, test = read(download=False)
        except RuntimeError:                                       # not there, or damaged: fetch it
            print(f"{name}: not complete in {data_dir}, downloading it there")
            socket.setdefaulttimeout(30)
            train, test = read(download=True)
    except (OSError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile) as error:
        where = {"fashion-mnist": f"its four .gz files in {data_dir}/FashionMNIST/raw"}.get(
            name, f"{getattr(kind, 'filename', 'its archive')} in {data_dir}")
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{name} could not be downloaded ({reason}); put {where} and start again, or "
                        f"use --dataset shapes, which needs nothing") from None
    arrays = []
    for part in (train, test):
        x = torch.as_tensor(np.asarray(part.data))
        if name.startswith("cifar"):                               # (N, H, W, 3)
            x = x.permute(0, 3, 1, 2)
        elif name == "fashion-mnist":                              # grey 28 px, padded to 32
            x = F.pad(x, (2, 2, 2, 2))[:, None].expand(-1, 3, -1, -1)
        arrays += [resize_images(x, image_size), part.labels if name == "stl10" else part.targets]
    classes = train.classes
    if name == "cifar20":
        arrays[1], arrays[3] = (np.array(CIFAR_20)[y] for y in (arrays[1], arrays[3]))
        classes = SUPERCLASSES
    return _splits(name, *arrays, classes)


def resize_images(images, size):
    """(N, 3, H, W) uint8 -> (N, 3, size, size) uint8, antialiased; unchanged when size is None."""
    if size is None or images.shape[-2:] == (size, size):
        return images
    return torch.cat([F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True)
                      .round_().clamp_(0, 255).byte() for part in images.split(4096)])


def _imagenet(name, data_dir, image_size):
    """Tiny-ImageNet in its original layout, or the ImageNet subsets from the user's ImageNet."""
    tiny = name == "tiny-imagenet"
    root = data_dir / "tiny-imagenet-200" if tiny else data_dir
    wanted = {"imagenet10": IMAGENET_10, "imagenet-dogs": IMAGENET_DOGS}.get(name)
    if not (root / "train").is_dir():
        raise UserError(f"{name}: there is no {root / 'train'}; " + (
            f"unpack tiny-imagenet-200.zip in {data_dir}" if tiny else
            "give the ImageNet folder, which holds train/ and val/, as --data-dir") +
            ", or use --dataset shapes, which needs nothing")
    train, classes = _by_class(root / "train", wanted)
    if wanted and classes != wanted:
        raise UserError(f"{name}: {root / 'train'} lacks {', '.join(sorted(set(wanted) - set(classes)))}")
    annotations = root / "val" / "val_annotations.txt"
    if annotations.is_file():                                      # image <tab> class <tab> box
        rows = [line.split("\t")[:2] for line in annotations.read_text().splitlines() if line.strip()]
        test = [(root / "val" / "images" / file, classes.index(c)) for file, c in rows if c in classes]
    else:
        test = _by_class(root / "val", wanted)[0] if (root / "val").is_dir() else []
    return _decoded(name, root, train, test, classes, image_size or (64 if tiny else 224),
                    data_dir / "cache")


def _folder(root, data_dir, image_size):
    """The user's own images. Sub-folders are classes; images directly in DIR have no labels."""
    name = "".join(c if c.isalnum() or c in "._-" else "_" for c in root.resolve().name) or "folder"
    test_root = next((root / t for t in ("test", "val") if (root / t).is_dir()), None)
    has_split = (root / "train").is_dir()
    train_root = root / "train" if has_split else root
    train, classes = _by_class(train_root)
    test = []
    if has_split and test_root:
        test, test_classes = _by_class(test_root)
        if (classes is None) != (test_classes is None):
            raise UserError(f"{root}: train/ and {test_root.name}/ must both have class folders, or "
                            f"neither")
        if classes and set(test_classes) - set(classes):
            raise UserError(f"{test_root}: the classes {sorted(set(test_classes) - set(classes))[:5]} "
                            f"are not in {train_root}")
        if classes:                                                # test ids by the train classes
            test = [(f, classes.index(test_classes[c])) for f, c in test]
    if not train:
        raise UserError(f"{train_root}: no images there (looked for {' '.join(sorted(IMAGE_FILES))})")
    size = image_size or _folder_size([f for f, _ in train])
    return _decoded(name, root.resolve(), train, test, classes, size, data_dir / "cache")


def _by_class(root, wanted=None):
    """All image files under root -> ([(path, class id or -1)], class names or None)."""
    direct, folders, others = [], [], 0
    for entry in sorted(os.scandir(root), key=lambda e: e.name):
        if entry.is_dir() and (wanted is None or entry.name in wanted):
            folders.append(Path(entry.path))
        elif Path(entry.name).suffix.lower() in IMAGE_FILES:
            direct.append(Path(entry.path))
        elif not entry.is_dir():
            others += 1
    inside = {}
    for folder in folders:
        seen, files = set(), []
        for place, subfolders, names in os.walk(folder, followlinks=True):
            real = os.path.realpath(place)
            if real in seen:                                       # a loop of symbolic links
                subfolders.clear()
                continue
            seen.add(real)
            found = [Path(place, n) for n in names if Path(n).suffix.lower() in IMAGE_FILES]
            files, others = files + found, others + len(names) - len(found)
        if files:
            inside[folder.name] = sorted(files)
    if others and wanted is None:
        print(f"{root}: {others:,} files that are not images (by their ending) are left out")
    if direct or not inside:                                       # no class structure
        if inside:
            print(f"{root}: images lie both in it and in its sub-folders: taken together, unlabelled")
        return [(f, -1) for f in direct + sum(inside.values(), [])], None
    classes = sorted(inside)
    return [(f, c) for c, name in enumerate(classes) for f in inside[name]], classes


def _folder_size(files):
    """A side in pixels for a folder of any images: their own where that is small and the same for
    all, else the largest of 32, 64, 96 that the median image still fills. --image-size overrides."""
    sides = []
    for file in files[:: max(1, len(files) // 64)]:
        with contextlib.suppress(Exception):
            with Image.open(file) as image:
                sides.append(image.size)
    if sides and len(set(sides)) == 1 and sides[0][0] == sides[0][1] <= 64:
        return sides[0][0]
    median = np.median([min(s) for s in sides]) if sides else 32
    return max((s for s in (32, 64, 96) if s <= median), default=32)


def _decode(file, size):
    """One image file -> (3, size, size) uint8, or the reason why not."""
    try:
        with Image.open(file) as image:
            if image.width * image.height > MAX_PIXELS:
                return f"{image.width} x {image.height} pixels is too large"
            image.draft("RGB", (size, size))                       # JPEG: decode near the target size
            image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":                              # 16 or 32 bits, grey
                grey = np.asarray(image, np.float64)
                top = 65535 if grey.max() > 255 else 255 if grey.max() > 1 else 1
                image = Image.fromarray((grey / top * 255).clip(0, 255).astype(np.uint8))
            if "A" in image.mode or "transparency" in image.info:  # transparent becomes white
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
            if image.size != (size, size):
                image = ImageOps.fit(image, (size, size), Image.BILINEAR)
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    except Exception as error:                                     # Pillow raises many kinds
        return str(error).splitlines()[0] if str(error) else type(error).__name__


def _decoded(name, root, train, test, classes, size, cache_dir):
    """Decode files once, several at a time, and keep the array; a changed folder is decoded anew."""
    print_of = hashlib.sha256(f"{size}|{classes}".encode())
    for split, files in (("train", train), ("test", test)):
        for file, label in files:
            stat = os.stat(file) if os.path.exists(file) else None
            mark = (stat.st_size, stat.st_mtime_ns) if stat else None
            print_of.update(os.fsencode(f"{split}|{file.relative_to(root)}|{label}|{mark}"))
    fingerprint = print_of.hexdigest()[:16]
    place = hashlib.sha256(os.fsencode(str(root))).hexdigest()[:8]
    cache = Path(cache_dir) / f"{name}-{place}-{size}px.pt"
    try:
        kept = load_checked(cache)
    except (OSError, Damaged):
        kept = {}
    if kept.get("fingerprint") != fingerprint:
        images, good, bad, started = [], [], [], time.time()
        print(f"{name}: decoding {len(train) + len(test):,} images to {size} x {size} px, once")
        with ThreadPoolExecutor() as pool:
            files = [f for f, _ in train + test]
            for i, image in enumerate(pool.map(lambda f: _decode(f, size), files, chunksize=64)):
                if isinstance(image, str):
                    bad.append((str(files[i]), image))
                else:
                    images.append(image)
                    good.append(i)
                if i % 500 == 0 or i + 1 == len(files):
                    progress("decoding", i + 1, len(files), started)
        for file, reason in bad[:20]:
            print(f"  left out {file}: {reason}")
        if len(bad) > 20:
            print(f"  left out {len(bad) - 20:,} more")
        if not images:
            raise UserError(f"{root}: none of its {len(files):,} image files can be read")
        kept = {"fingerprint": fingerprint, "images": torch.stack(images), "good": good,
                "bad": len(bad)}
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            save_atomically(cache, kept)
        except OSError as error:
            print(f"  the decoded images could not be kept in {cache.parent} ({error})")
    elif kept["bad"]:
        print(f"{name}: {kept['bad']:,} unreadable image files are left out, as before")
    entries, good = train + test, kept["good"]
    edge = sum(i < len(train) for i in good)
    names = [os.fspath(entries[i][0].relative_to(root)) for i in good]
    labels = torch.tensor([entries[i][1] for i in good])

    def split(part):
        return Split(kept["images"][part], labels[part] if classes else None, names[part])
    train_split = split(slice(0, edge))
    return Dataset(name, train_split, split(slice(edge, None)) if edge < len(good) else train_split,
                   classes, fingerprint)


def subset(labels, n, imbalance, size, seed):
    """Indices of the training images to learn from: all, a long tail, or a balanced part.

    labels (N,) or None; imbalance r >= 1: class c keeps int(n_max r^(-c / (C - 1))) images, the
    exponential profile of long-tailed CIFAR; size: that many images, equally many of each class
    (of any, without labels). At most one of the two. -> (n,) int64, sorted."""
    rng = generator(seed, 0, "subset")
    order = torch.randperm(n, generator=rng)
    if imbalance == 1 and size is None:
        return torch.arange(n)
    if size is not None and not 2 <= size <= n:
        raise UserError(f"--train-size {size}: there are {n:,} training images")
    if labels is None or (labels < 0).all():
        if imbalance != 1:
            raise UserError("--imbalance needs labelled images")
        return order[:size].sort().values
    classes = int(labels.max()) + 1
    counts = torch.bincount(labels[labels >= 0], minlength=classes)
    if size is None:
        keep = [int(int(counts.max()) * imbalance ** (-c / max(classes - 1, 1))) for c in range(classes)]
    else:
        keep = [size // classes + (c < size % classes) for c in range(classes)]
    if any(k > have for k, have in zip(keep, counts.tolist())):
        raise UserError(f"the wanted subset needs {max(keep):,} images of a class, which has fewer")
    return torch.cat([order[labels[order] == c][:k] for c, k in enumerate(keep)]).sort().values


def check_sizes(args, data, n):
    """The number of clusters of the report. Raises UserError when the n training images are too few
    for --batch-size or --clusters, or when nobody can know the number of clusters."""
    if args.clusters is None and data.classes is None:
        raise UserError(f"{args.dataset} has no labels: say how many clusters you want, --clusters 10")
    clusters = args.clusters or len(data.classes)
    for flag, value in (("--batch-size", args.batch_size), ("--clusters", clusters)):
        if value > n:
            raise UserError(f"{flag} {value}: there are only {n:,} training images")
    return clusters


def to_device(images, device):
    """Move a uint8 dataset to the device; where it does not fit, leave it in pinned host memory."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        if images.nbytes > .5 * free:
            print(f"the images ({images.nbytes / 2**30:.1f} GiB) stay in host memory: the device has "
                  f"{free / 2**30:.1f} GiB free")
            return images.pin_memory()
    return images.to(device)


def fetch(images, index, device):
    """images[index] as float in [0, 1] on the device. images (N, 3, H, W) uint8, index (B,) on the CPU."""
    if images.device != device:
        images = images[index].pin_memory().to(device, non_blocking=True)
    else:
        images = images[index.to(device, non_blocking=True)]
    return images.float().div_(255)


def pixel_statistics(images):
    """(mean, std) over images and pixels, each (1, 3, 1, 1) in [0, 1], from at most 10,000 images."""
    part = images[:: max(1, len(images) // 10_000)].float().div_(255)
    return part.mean((0, 2, 3), keepdim=True), part.std((0, 2, 3), keepdim=True).clamp_(min=1e-3)


# ------------------------------------------------------------------------------------------------
# 4. Views. Batched, on the device; every image gets its own draw. Inputs are (B, 3, H, W) float in
#    [0, 1]. Random numbers are drawn by a CPU generator, so a seed gives the same views everywhere.

def draw(n, low, high, rng, device):
    """n uniform numbers in [low, high), (n, 1, 1, 1), to be broadcast over the pixels of n images."""
    return torch.empty(n).uniform_(low, high, generator=rng).to(device, non_blocking=True)[:, None, None, None]


def random_resized_crop(x, size, scale, rng, ratio=(3 / 4, 4 / 3), flip=.5):
    """torchvision's RandomResizedCrop and RandomHorizontalFlip for a batch. -> (B, 3, size, size)

    scale: range of the share of the area; flip: probability (free of cost: the coordinates of the
    crop are reversed). Crops that are enlarged are sampled at coordinates clamped to the crop box;
    those that may shrink go through antialiasing filters. Equal to torchvision's kernels."""
    n, _, height, width = x.shape
    area = height * width * torch.empty(10, n).uniform_(*scale, generator=rng)
    aspect = torch.empty(10, n).uniform_(np.log(ratio[0]), np.log(ratio[1]), generator=rng).exp()
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (0 < w) & (w <= width) & (0 < h) & (h <= height)        # torchvision: 10 tries,
    first = fits.int().argmax(0, keepdim=True)
    whole = ~fits.any(0)                                           # then the whole image
    w = torch.where(whole, width, w.gather(0, first)[0])
    h = torch.where(whole, height, h.gather(0, first)[0])
    left = (torch.rand(n, generator=rng) * (width - w + 1)).floor()
    top = (torch.rand(n, generator=rng) * (height - h + 1)).floor()
    flipped = torch.rand(n, generator=rng) < flip
    return resized_crop(x, top, left, h, w, size, flipped)


def resized_crop(x, top, left, h, w, size, flipped):
    """Crop box (top, left, h, w) of each image, resized to (size, size), mirrored where flipped.
    All five (B,) on the CPU. The deterministic half of random_resized_crop."""
    top, left, h, w, flipped = torch.stack([top, left, h, w, flipped.float()]).to(x.device, non_blocking=True)
    u = (torch.arange(size, device=x.device) + .5) / size
    across = torch.where(flipped[:, None] > 0, 1 - u, u)           # (B, size)
    if max(x.shape[-2:]) > size:                                   # some crops shrink: antialias
        rows = _filter(u.expand(len(x), -1), top, h, x.shape[-2])
        columns = _filter(across, left, w, x.shape[-1])
        return rows[:, None] @ x @ columns.transpose(1, 2)[:, None]
    y = (u * h[:, None] - .5).clamp(min=0).minimum(h[:, None] - 1) + top[:, None]
    z = (across * w[:, None] - .5).clamp(min=0).minimum(w[:, None] - 1) + left[:, None]
    y, z = (2 * y + 1) / x.shape[-2] - 1, (2 * z + 1) / x.shape[-1] - 1
    grid = torch.stack([z[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], -1)
    return F.grid_sample(x, grid, align_corners=False)


def _filter(u, start, length, pixels):
    """(B, size, pixels) weights of a triangle filter that resizes [start, start + length)."""
    scale = (length / u.shape[1]).clamp(min=1)[:, None, None]
    j = torch.arange(pixels, device=u.device)
    centre = (u * length[:, None] + start[:, None] - .5)[:, :, None]
    inside = (j >= start[:, None, None]) & (j < (start + length)[:, None, None])
    weight = (1 - (j - centre).abs() / scale).clamp_(min=0) * inside
    return weight / weight.sum(-1, keepdim=True)


def grey(x):
    """(B, 3, H, W) -> (B, 1, H, W) luminance, ITU-R 601 as in torchvision."""
    return x[:, :1] * .2989 + x[:, 1:2] * .587 + x[:, 2:] * .114


def adjust_brightness(x, factor):
    """factor (B, 1, 1, 1); 1 changes nothing. Clamped to [0, 1], like the three below."""
    return (x * factor).clamp_(0, 1)


def adjust_contrast(x, factor):
    """Blend with the mean grey of the image."""
    mean = grey(x).flatten(1).mean(1)[:, None, None, None]
    return torch.lerp(mean, x, factor).clamp_(0, 1)


def adjust_saturation(x, factor):
    """Blend with the grey image."""
    return torch.lerp(grey(x), x, factor).clamp_(0, 1)


def adjust_hue(x, shift):
    """Turn the hue by shift (B, 1, 1, 1), in turns (-.5 to .5), through HSV."""
    r, g, b = x.split(1, 1)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    sextant = torch.where(value == r, g - b, torch.where(value == g, b - r + 2 * chroma, r - g + 4 * chroma))
    sextant = sextant / chroma.clamp(min=1e-8) + 6 * shift
    k = sextant + torch.tensor([5., 3., 1.], device=x.device).view(1, 3, 1, 1)
    k -= 6 * (k / 6).floor_()                                      # (red, green, blue), modulo 6
    return torch.addcmul(value, chroma, torch.minimum(k, 4 - k).clamp_(0, 1), value=-1)


def color_jitter(x, brightness, contrast, saturation, hue, rng, p=.8, groups=8):
    """torchvision's ColorJitter, applied to each image with probability p. -> (B, 3, H, W)

    Factors are uniform in [1 - strength, 1 + strength], hue in [-hue, hue], one draw per image.
    torchvision also shuffles the order of the four operations per image; here each of `groups`
    runs of neighbouring images has its own order (the images of a batch are shuffled already)."""
    n = len(x)
    on = (torch.rand(n, generator=rng) < p).to(x.device, non_blocking=True)[:, None, None, None]
    ops = [(adjust, torch.where(on, draw(n, max(0, middle - s), middle + s, rng, x.device), middle))
           for adjust, s, middle in ((adjust_brightness, brightness, 1.), (adjust_contrast, contrast, 1.),
                                     (adjust_saturation, saturation, 1.))]
    ops.append((adjust_hue, torch.where(on, draw(n, -hue, hue, rng, x.device), 0.)))
    edges = torch.linspace(0, n, min(groups, n) + 1).long().tolist()
    out = []
    for a, b in zip(edges[:-1], edges[1:]):
        part = x[a:b]
        for i in torch.randperm(4, generator=rng).tolist():
            adjust, amount = ops[i]
            part = adjust(part, amount[a:b])
        out.append(part)
    return torch.cat(out)


def random_grayscale(x, p, rng):
    """Each image becomes grey (three equal channels) with probability p."""
    on = (torch.rand(len(x), generator=rng) < p).to(x.device, non_blocking=True)[:, None, None, None]
    return torch.where(on, grey(x), x)


def normalise(x, statistics):
    """(x - mean) / std, in the memory order that convolutions like best."""
    mean, std = (s.to(x.device) for s in statistics)
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------
# 5. Backbone

def resnet18(image_size, width=64, stem_stride=1):
    """torchvision's ResNet-18 without its classifier. (B, 3, H, W) -> (B, 8 * width) features.

    width        channels of the first stage: 64 is ResNet-18, 16 is for laptops and tests. At 64 the
                 state_dict loads into torchvision.models.resnet18 (for large images, stem included)
    stem_stride  2 makes the 3x3 stem halve the image: about 3x faster, for laptops and tests

    The stem decides. The 7x7 one of ImageNet leaves an image of 32 px with 8 x 8 positions before
    the first block and one at the end; used there by mistake it costs many points of accuracy."""
    net = torchvision.models.resnet18()
    if image_size <= 128:
        net.conv1 = nn.Conv2d(3, width, 3, stem_stride, 1, bias=False)
        if image_size <= 64:
            net.maxpool = nn.Identity()
    else:
        net.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
    if width != 64:
        net.inplanes, net.bn1 = width, nn.BatchNorm2d(width)
        for i in range(4):
            setattr(net, f"layer{i + 1}",
                    net._make_layer(BasicBlock, width * 2**i, 2, stride=1 if i == 0 else 2))
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    net.fc = nn.Identity()
    return net.to(memory_format=torch.channels_last)


def describe(net, image_size):
    """'ResNet-18, width 16, 3x3 stem of stride 2 without max-pool (images of 32 px)'"""
    stem, pool = net.conv1, "without" if isinstance(net.maxpool, nn.Identity) else "with"
    return (f"ResNet-18, width {stem.out_channels}, {stem.kernel_size[0]}x{stem.kernel_size[0]} stem of "
            f"stride {stem.stride[0]} {pool} max-pool (images of {image_size} px)")


# ------------------------------------------------------------------------------------------------
# 6. Training

def cosine_lr(step, steps, warmup=0):
    """Factor of the learning rate at a step: linear from 0 over `warmup` steps, then half a cosine
    from 1 to 0 at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    return .5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def set_lr(optimizer, lr):
    """lr of all parameter groups, times the group's own `factor` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("factor", 1)


def batches(images, index, batch_size, views, rng, device, clock):
    """One epoch: shuffle, then yield (batch of index, view, ...) with whole batches only.

    views(x, rng) makes a tuple of views of raw images x in [0, 1]. It is called for several hundred
    images at a time on a CPU (they stay in its cache) and several thousand on a GPU (there a view
    costs kernel launches, not arithmetic), and training batches are slices of its results."""
    order = index[torch.randperm(len(index), generator=rng)]
    order = order[:len(order) // batch_size * batch_size]
    chunk = max(1, (4096 if device.type == "cuda" else 512) // batch_size) * batch_size
    for part in order.split(chunk):
        with clock():
            made = views(fetch(images, part, device), rng)
        for i in range(0, len(part), batch_size):
            yield part[i:i + batch_size], *(view[i:i + batch_size] for view in made)


def step(optimizer, loss):
    """Backward and optimizer step. From the first loss or gradient on that is not finite the device
    itself leaves steps out (the fused optimizers' found_inf), so that weights stay good without a
    synchronisation in every step; Meter reports it."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    bad = 1 - (torch.isfinite(loss.detach()) & torch.isfinite(norm)).float()
    optimizer.found_inf = torch.maximum(bad, getattr(optimizer, "found_inf", bad))
    optimizer.step()


class Meter:
    """Means of the loss terms over an epoch of `steps`, read from the device every 50 steps."""

    def __init__(self, where, optimizer, steps):
        self.where, self.optimizer, self.steps, self.names = where, optimizer, steps, ()
        self.rows, self.done, self.began = [], [], time.time()

    def add(self, **terms):
        """One step's terms, scalar tensors on the device."""
        self.names = tuple(terms)
        self.rows.append(torch.stack([t.detach().float() for t in terms.values()]))
        if len(self.rows) == 50:
            self.read()

    def read(self):
        """Raise NotFinite if a step was not finite; its weights were never updated with it."""
        if not self.rows:
            return
        bad = getattr(self.optimizer, "found_inf", torch.zeros(()))
        rows = torch.stack(self.rows).cpu()
        broken = (~rows.isfinite().all(1)).nonzero().flatten().tolist()
        if broken or bad.item():
            first = broken[0] if broken else len(rows) - 1
            terms = ", ".join(f"{n} {v:.4g}" for n, v in zip(self.names, rows[first].tolist()))
            what = f"step {len(self.done) + first + 1}: {terms}" if broken else \
                f"within {len(rows)} steps to {len(self.done) + len(rows)}: a gradient; {terms}"
            raise NotFinite(f"{self.where}, {what} is not finite; stopped before the optimizer used it, "
                            f"the last good checkpoint is kept")
        self.done += rows.tolist()
        self.rows = []
        progress(f"{self.where}: step", len(self.done), self.steps, self.began)

    def means(self):
        """{term: mean over the epoch}"""
        self.read()
        return dict(zip(self.names, np.mean(self.done, 0).tolist()))


class Clock:
    """Where the time of an epoch goes: `with clock(): ...` counts as making views, the rest as the
    network's. On a GPU by events, without synchronising."""

    def __init__(self, device):
        self.cuda, self.spans, self.began = device.type == "cuda", [], time.perf_counter()

    @contextlib.contextmanager
    def __call__(self):
        start = self._now()
        yield
        self.spans.append((start, self._now()))

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self):
        """-> (seconds, of which making views) since the last read."""
        if self.cuda:
            torch.cuda.synchronize()
        views = sum(a.elapsed_time(b) / 1000 if self.cuda else b - a for a, b in self.spans)
        now = time.perf_counter()
        seconds, self.began, self.spans = now - self.began, now, []
        return seconds, views


# ------------------------------------------------------------------------------------------------
# 7. Evaluation, the same for all four. Labels are used here and nowhere else.

@torch.no_grad()
def embed(network, images, statistics, device, batch_size=512):
    """network on un-augmented images in eval mode; its own mode is restored afterwards.
    images (N, 3, H, W) uint8 -> (N, D) float32 on the device."""
    was_training = network.training
    network.eval()
    out = []
    for part in torch.arange(len(images)).split(batch_size):
        with autocast(device):
            out.append(network(normalise(fetch(images, part, device), statistics)).float())
    network.train(was_training)
    return torch.cat(out)


def contingency(labels, assignments, classes=0, clusters=0):
    """Counts of each (class, cluster). labels, assignments (N,) integers >= 0, numpy or torch.
    -> (C, K) int64; C and K as large as the numbers found, or as asked for."""
    labels, assignments = np.asarray(labels), np.asarray(assignments)
    table = np.zeros((max(classes, labels.max() + 1), max(clusters, assignments.max() + 1)), np.int64)
    np.add.at(table, (labels, assignments), 1)
    return table


def hungarian_match(table):
    """The one-to-one map of clusters to classes with the most hits. table (C, K) counts.
    -> (K,) the class of each cluster, -1 where clusters are left over."""
    match = np.full(table.shape[1], -1)
    rows, columns = linear_sum_assignment(table, maximize=True)
    match[columns] = rows
    return match


def cluster_scores(labels, assignments, vote_from=None):
    """ACC, NMI and ARI of a clustering. labels, assignments (N,): integers >= 0, numpy or torch.

    ACC   accuracy after the best map of clusters to classes. One to one ('hungarian') up to as many
          clusters as classes; else every cluster takes the class of most of its members ('majority
          vote'), counted on vote_from = (labels, assignments) of another split if that is given.
          The vote favours many clusters: `rule` stands beside the figure
    NMI   mutual information / arithmetic mean of both entropies
    ARI   adjusted Rand index
    -> {'acc', 'nmi', 'ari', 'rule', 'clusters': how many are not empty}"""
    table = contingency(labels, assignments)
    n, a, b = table.sum(), table.sum(1), table.sum(0)
    if vote_from is None and (b > 0).sum() <= (a > 0).sum():
        rule, match = "hungarian", hungarian_match(table)
    else:
        voters = table if vote_from is None else contingency(*vote_from, clusters=table.shape[1])
        rule, match = "majority vote", np.where(voters.sum(0) > 0, voters.argmax(0), -1)
    hits = (match[np.asarray(assignments)] == np.asarray(labels)).mean()
    entropy = lambda counts: -(counts[counts > 0] / n * np.log(counts[counts > 0] / n)).sum()  # noqa: E731
    pairs = lambda counts: (counts * (counts - 1.) / 2).sum()                                   # noqa: E731
    both = entropy(a) + entropy(b)
    chance, limit = pairs(a) * pairs(b) / max(pairs(n), 1), (pairs(a) + pairs(b)) / 2
    return {"acc": float(hits), "nmi": float(2 * (both - entropy(table)) / both) if both > 0 else 1.,
            "ari": float((pairs(table) - chance) / (limit - chance)) if limit != chance else 1.,
            "rule": rule, "clusters": int((b > 0).sum())}


@torch.no_grad()
def kmeans(features, k, seed, restarts=5, iterations=100):
    """k-means of L2-normalised features with k-means++ starts; the best of several restarts.

    features (N, D), any device. -> (assignments (N,), centroids (K, D)). An empty cluster takes the
    point farthest from its centroid. Raises UserError when k > N."""
    x = F.normalize(features.float(), dim=1)
    n, best = len(x), (float("inf"), None, None)
    if k > n:
        raise UserError(f"{k} clusters of {n} images: there are more clusters than images")
    uniform = torch.rand(restarts, k, generator=generator(seed, 0, "kmeans")).tolist()
    for first, *others in uniform:
        centre = x[int(first * n)][None]
        nearest = (x - centre).square().sum(1)
        for u in others:                                           # the next, with probability ~ d^2
            cumulative = nearest.double().cumsum(0)
            pick = torch.searchsorted(cumulative, u * cumulative[-1:]).clamp_(max=n - 1)
            centre = torch.cat([centre, x[pick]])
            nearest = torch.minimum(nearest, (x - x[pick]).square().sum(1))
        inertia = float("inf")
        for _ in range(iterations):
            assignment, distance = nearest_centroid(x, centre)
            before, inertia = inertia, distance.sum().item()
            if before - inertia <= 1e-4 * inertia:
                break
            member = F.one_hot(assignment, k).to(x.dtype)
            count = member.sum(0)
            empty = (count == 0).nonzero().flatten()
            centre = member.t() @ x / count.clamp(min=1)[:, None]
            centre[empty] = x[distance.topk(len(empty)).indices]
        if inertia < best[0]:
            best = inertia, assignment, centre
    return best[1:]


def nearest_centroid(x, centre, chunk=16384):
    """x (N, D), centre (K, D) -> (nearest centroid (N,), squared distance to it (N,))"""
    parts = []
    for part in x.split(chunk):
        parts.append(torch.addmm(centre.square().sum(1), part, centre.t(), alpha=-2).min(1))
    distance = torch.cat([p.values for p in parts]) + x.square().sum(1)
    return torch.cat([p.indices for p in parts]), distance.clamp_(min=0)


@torch.no_grad()
def knn_accuracy(bank, bank_labels, queries, labels, k=200, tau=.1, leave_one_out=False, chunk=2048):
    """Weighted kNN: each of the k most similar bank images votes exp(cosine / tau) for its class.

    bank (N, D), queries (M, D) features, bank_labels (N,), labels (M,); k is lowered to the mean
    class size of a small bank. leave_one_out: the queries are the bank, and none votes for itself.
    -> accuracy in [0, 1]"""
    device = bank.device
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    bank_labels, labels = bank_labels.to(device), labels.to(device)
    classes = int(bank_labels.max()) + 1
    k = max(1, min(k, len(bank) // classes, len(bank) - 1))
    hits = torch.zeros((), device=device)
    for start in range(0, len(queries), chunk):
        similarity = queries[start:start + chunk] @ bank.t()
        if leave_one_out:
            rows = torch.arange(len(similarity), device=device)
            similarity[rows, rows + start] = -2
        value, index = similarity.topk(k, 1)
        votes = torch.zeros(len(value), classes, device=device)
        votes.scatter_add_(1, bank_labels[index], (value / tau).exp())
        hits += (votes.argmax(1) == labels[start:start + chunk]).sum()
    return hits.item() / len(queries)


def linear_probe(features, labels, test_features, seed):
    """Logistic regression on frozen, standardised features, by L-BFGS. The weight decay is chosen on
    a fifth of the training features that is held out; then all of them are used.

    features (N, D), labels (N,), test_features (M, D) -> predicted classes (M,) on the CPU"""
    labels = labels.to(features.device)
    mean, std = features.mean(0), features.std(0).clamp_(min=1e-6)
    x, t = (features - mean) / std, (test_features - mean) / std

    def fit(x, y, decay):
        w = x.new_zeros(x.shape[1] + 1, int(labels.max()) + 1).requires_grad_()
        solver = torch.optim.LBFGS([w], max_iter=100, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

        def closure():
            solver.zero_grad()
            loss = F.cross_entropy(x @ w[1:] + w[0], y) + decay * w[1:].square().sum()
            loss.backward()
            return loss
        solver.step(closure)
        return w.detach()

    def predict(w, x):
        return (x @ w[1:] + w[0]).argmax(1)
    order = torch.randperm(len(x), generator=generator(seed, 0, "probe")).to(x.device)
    held, kept = order[:len(x) // 5], order[len(x) // 5:]
    decay = max((1e-2, 1e-3, 1e-4, 1e-5), key=lambda decay: (
        predict(fit(x[kept], labels[kept], decay), x[held]) == labels[held]).float().mean().item())
    return predict(fit(x, labels, decay), t).cpu()


class Clustering(NamedTuple):
    train: torch.Tensor                   # (N,) cluster of each training image
    test: torch.Tensor                    # (M,) of each test image; the same where there is no test split
    train_confidence: torch.Tensor        # in [0, 1]
    test_confidence: torch.Tensor


def evaluate(train_features, test_features, data, clusters, seed, index=None, probe=True):
    """The standard scores of frozen features (N, D) and (M, D). -> (scores, Clustering by k-means)

    k-means is fitted on train_features[index], the images learned from (None: all), and applied to
    both splits; its confidence is softmax(cosine to the centroids / 0.1). kNN and the linear probe
    use all labelled training images. protocol() says it in words."""
    fit = train_features if index is None else train_features[index.to(train_features.device)]
    centre = F.normalize(kmeans(fit, clusters, seed)[1], dim=1)
    p = [(F.normalize(x, dim=1) @ centre.t() / .1).softmax(1).max(1) for x in (train_features, test_features)]
    found = Clustering(p[0].indices.cpu(), p[1].indices.cpu(), p[0].values.cpu(), p[1].values.cpu())
    if data.test.labels is None:
        return {}, found
    seen = data.train.labels >= 0
    y, bank = data.train.labels[seen], train_features[seen.to(train_features.device)]
    over = data.has_test and clusters > len(data.classes)
    scores = {"kmeans": cluster_scores(data.test.labels, found.test, (y, found.train[seen]) if over else None)}
    target, held = data.test.labels, test_features
    scores["knn"] = knn_accuracy(bank, y, held, target, leave_one_out=not data.has_test)
    if probe:
        if not data.has_test:                                      # never scored on what it was fitted on
            order = torch.randperm(len(y), generator=generator(seed, 0, "halves"))
            a, b = order[len(y) // 5:], order[:len(y) // 5]
            bank, y, held, target = bank[a], y[a], bank[b], y[b]
        right = (linear_probe(bank, y, held, seed) == target).float()
        scores["linear"] = right.mean().item()
        scores["linear_per_class"] = [right[target == c].mean().item() if (target == c).any() else None
                                      for c in range(len(data.classes))]
    return scores, found


def protocol(data):
    """For each score: fitted on what, scored on what."""
    n, m = len(data.train.images), len(data.test.images)
    if data.has_test:
        return {"kmeans": f"fitted on train, scored on test ({m:,} images)",
                "knn": f"weighted, k 200, tau 0.1: bank train, scored on test ({m:,} images)",
                "linear": f"logistic regression on frozen features of train, scored on test ({m:,} images)",
                "epoch": "last"}
    return {"kmeans": f"fitted and scored on the same {n:,} images: there is no test split",
            "knn": "weighted, k 200, tau 0.1: each image by all the others (no test split)",
            "linear": "logistic regression fitted on a random 80 %, scored on the other 20 % (no test split)",
            "epoch": "last"}


def pixel_features(images, device):
    """The baseline: raw pixels, shrunk to 32 px. (N, 3, H, W) uint8 -> (N, 3 * 32 * 32) float."""
    parts = [fetch(images, part, device) for part in torch.arange(len(images)).split(4096)]
    return torch.cat([(F.adaptive_avg_pool2d(p, 32) if p.shape[-1] > 32 else p).flatten(1)
                      for p in parts]).sub_(.5)


def baselines(data, untrained, statistics, clusters, seed, index, device):
    """What any score must be held against: {'raw pixels': scores, 'random network': scores}."""
    table = {}
    for name, features in (("raw pixels", lambda x: pixel_features(x, device)),
                           ("random network", lambda x: embed(untrained, x, statistics, device))):
        train = features(data.train.images)
        test = features(data.test.images) if data.has_test else train
        table[name] = evaluate(train, test, data, clusters, seed, index, probe=name != "raw pixels")[0]
    return table


def print_scores(table, data):
    """table {name: scores of evaluate} as aligned lines, then the protocol."""
    print(f"\n{'':24}{'ACC':>8}{'NMI':>8}{'ARI':>8}{'kNN':>8}{'linear':>8}")
    for name, s in table.items():
        cells = [s.get("kmeans", s).get(key) for key in ("acc", "nmi", "ari")] + [s.get("knn"), s.get("linear")]
        rule = "" if s.get("kmeans", s).get("rule") != "majority vote" else "   majority vote"
        print(f"{name:24}" + "".join(f"{c:8.3f}" if c is not None else f"{'-':>8}" for c in cells) + rule)
    for score, words in protocol(data).items():
        print(f"  {score}: {words}")


# ------------------------------------------------------------------------------------------------
# 8. Run folder. Written so that nothing is lost: a checkpoint is complete before it gets its name.

class Damaged(Exception):
    """A file is not what was written."""


def save_atomically(path, state, keep=None):
    """torch.save to a temporary file beside it, fsync, rename. keep: where the old one goes."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_checked(path):
    """What save_atomically wrote. Raises Damaged: torch.load alone does not notice a flipped bit,
    the checksums of the zip archive do. Nothing but tensors and plain values is ever unpickled."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken:
            raise Damaged(f"{path}: {broken} fails its checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise Damaged(f"{path}: {str(error).splitlines()[0] if str(error) else 'not a checkpoint'}")


def write_text(path, text):
    """Write a small file atomically."""
    temporary = Path(path).with_name(Path(path).name + ".tmp")
    temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
    os.replace(temporary, path)


def on_cpu(state):
    """A copy of nested state whose tensors lie on the CPU and never change again."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: on_cpu(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [on_cpu(value) for value in state]
    if type(state) not in (int, float, str, bool, type(None)):     # would not load with weights_only
        raise TypeError(f"a checkpoint holds plain values and tensors, not {type(state)}")
    return state


class Run:
    """The folder of a run. Use as a context: whatever ends the run, the last finished epoch is saved.

        with Run(args, "identitize", data) as run:
            saved = run.load()                     # None at a new start
            for epoch in range(run.epoch, args.epochs):
                ...
                run.end_epoch({"loss": ...}, {"model": model.state_dict(), ...})
            run.finish(scores, ...)
    """
    FORMAT = 1
    FREE = ("resume", "out", "device", "data_dir", "compile")             # may change on resuming

    def __init__(self, args, method, data):
        self.args, self.method, self.data = args, method, data
        self.folder = Path(args.out or f"runs/{method}-{data.name}-seed{args.seed}")
        self.settings = {"method": method, "images": data.fingerprint,
                         **{k: v for k, v in vars(args).items() if k not in self.FREE}}
        self.epoch, self.log, self.pending = 0, [], None
        self.seconds = 0.                                           # of training, over all resumptions
        self.saved_at, self.save_seconds = time.time(), 0.
        self.current, self.previous = self.folder / "checkpoint.pt", self.folder / "checkpoint.previous.pt"
        held = [f.name for f in (self.current, self.previous, self.folder / "log.jsonl") if f.exists()]
        if held and not args.resume:
            raise UserError(f"{self.folder} already holds a run: continue it with --resume, or choose "
                            f"another folder with --out")
        self.saved = self._read(held) if held else None
        if args.resume and self.saved is None:
            print(f"{self.folder} holds no checkpoint yet: starting from the beginning")

    def _read(self, held):
        """The newest good checkpoint, checked against this run's settings."""
        saved = None
        for path in (self.current, self.previous):
            try:
                saved = load_checked(path)
                break
            except FileNotFoundError:
                continue
            except Damaged as error:
                print(f"WARNING: {error}. Falling back to the checkpoint before it.", file=sys.stderr)
        if saved is None:
            if "log.jsonl" in held and len(held) == 1:
                return None                                        # killed before the first checkpoint
            raise UserError(f"{self.folder}: no good checkpoint is left; choose another folder with --out")
        if not isinstance(saved, dict) or saved.get("format") != self.FORMAT:
            raise UserError(f"{self.current}: not a checkpoint of this version of {self.method}.py")
        for key, mine in self.settings.items():
            theirs = saved["settings"].get(key)
            if theirs != mine and not (key == "dataset" and saved["settings"]["images"] == self.data.fingerprint):
                raise UserError(f"{self.folder} was made with {key.replace('_', '-')} {theirs}, not "
                                f"{mine}; give the same, or choose another folder with --out")
        return saved

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob("*.tmp"):
            leftover.unlink()
        log = self.saved["log"] if self.saved else []
        write_text(self.folder / "log.jsonl", "".join(json.dumps(r) + "\n" for r in log))
        if self.saved:
            self.epoch, self.log = self.saved["epoch"], log
            self.seconds = self.saved["seconds"]
            print(f"resuming {self.folder} after epoch {self.epoch}")
        return self

    def load(self):
        """The state of end_epoch at the last good checkpoint; None at a new start."""
        return self.saved["state"] if self.saved else None

    def end_epoch(self, record, images, clock, optimizer, state):
        """Print and log the epoch, and checkpoint it, unless checkpoints would take over 5 % of the
        time (then the state waits in memory and is written later, or when the run ends in any way).

        record   {loss terms, gauges}; images: how many this epoch took in
        state    nested state_dicts, all that load() will return"""
        seconds, views = clock.read()
        self.epoch += 1
        self.seconds += seconds
        lr = optimizer.param_groups[0]["lr"] / optimizer.param_groups[0].get("factor", 1)
        self.log = self.log + [{"epoch": self.epoch, **record, "lr": lr, "images_per_second": images / seconds,
                                "seconds": seconds, "views_share": views / seconds}]
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(self.log[-1]) + "\n")
        recent = [r["seconds"] for r in self.log[-5:]]
        left = sum(recent) / len(recent) * (self.args.epochs - self.epoch)
        print(f"epoch {self.epoch:>{len(str(self.args.epochs))}}/{self.args.epochs}  " +
              "  ".join(f"{k.replace('_', ' ')} {v:.3f}" if isinstance(v, float) else f"{k} {v}"
                        for k, v in record.items()) +
              f"  {images / seconds:,.0f} images/s  {clock_text(left)} left", flush=True)
        self.pending = {"format": self.FORMAT, "settings": self.settings, "epoch": self.epoch,
                        "seconds": self.seconds, "log": on_cpu(self.log), "state": on_cpu(state)}
        if time.time() - self.saved_at >= 20 * self.save_seconds:
            self.flush()

    def flush(self):
        """Write the state of the last finished epoch, if it is not on disk yet."""
        if self.pending is not None:
            began = time.time()
            save_atomically(self.current, self.pending, keep=self.previous)
            self.pending, self.saved_at = None, time.time()
            self.save_seconds = self.saved_at - began

    def __exit__(self, kind, error, trace):
        self.flush()

    def finish(self, scores, backbone, found, **more):
        """The end of a run: result.json, backbone.pt, clusters.csv, prototypes.png, confusion.png.

        scores: {name: scores}; found: the Clustering to write; more: further entries of result.json"""
        self.flush()
        save_atomically(self.folder / "backbone.pt", on_cpu(backbone.state_dict()))
        device = next(backbone.parameters()).device
        result = {"method": self.method, "dataset": self.data.name, "scores": scores, **more,
                  "protocol": protocol(self.data), "epochs": self.epoch,
                  "training_seconds": round(self.seconds, 1), "command": " ".join(sys.argv),
                  "settings": self.settings, "device": torch.cuda.get_device_name() if device.type == "cuda"
                  else f"CPU, {torch.get_num_threads()} threads",
                  "versions": {"python": sys.version.split()[0], "torch": torch.__version__,
                               "torchvision": torchvision.__version__}}
        write_text(self.folder / "result.json", json.dumps(result, indent=1) + "\n")
        table = io.StringIO(newline="")
        writer = csv.writer(table)
        writer.writerow(["image", "cluster", "confidence"])
        for split, cluster, sure in ((self.data.train, found.train, found.train_confidence),
                                     (self.data.test, found.test, found.test_confidence)):
            writer.writerows((n, c, f"{p:.4f}") for n, c, p in
                             zip(split.names, cluster.tolist(), sure.tolist()))
            if not self.data.has_test:
                break
        write_text(self.folder / "clusters.csv", table.getvalue())
        save_cluster_pictures(self.folder, self.data, found)
        print(f"\n{self.seconds:.0f} s of training; everything is in {self.folder}: "
              f"{', '.join(sorted(f.name for f in self.folder.iterdir()))}")


# ------------------------------------------------------------------------------------------------
# 9. Pictures

def save_picture(path, image):
    """A PIL image, written atomically as PNG."""
    temporary = Path(path).with_name(Path(path).name + ".tmp")
    image.save(temporary, "PNG")
    os.replace(temporary, path)


def grid(images, columns, side=48):
    """(N, 3, H, W) uint8 or float in [0, 1] -> one PIL image, row by row, each `side` px wide."""
    images = images.cpu()
    if images.dtype == torch.uint8:
        images = images.float() / 255
    images = F.interpolate(images, (side, side), mode="nearest" if side >= images.shape[-1] else "area")
    sheet = torchvision.utils.make_grid(images, nrow=columns, padding=2, pad_value=1)
    return Image.fromarray((sheet.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def heatmap(matrix, rows=None, columns=None, title="", limit=None):
    """A matrix as a PIL image, from blue (-limit) over white (0) to red (limit, default: its largest
    absolute value), with names of rows and columns."""
    m = np.asarray(matrix, np.float64)
    v = np.clip(m / (limit or max(np.abs(m).max(), 1e-12)), -1, 1)
    colour = np.stack([1 - .85 * np.clip(-v, 0, 1), 1 - .8 * np.abs(v), 1 - .85 * np.clip(v, 0, 1)], -1)
    cell, top = max(2, 320 // max(m.shape)), 24
    picture = Image.fromarray((colour.repeat(cell, 0).repeat(cell, 1) * 255).round().astype(np.uint8))
    font = ImageFont.load_default(12)
    left, below = (int(max(font.getlength(str(n)) for n in names)) + 8 if names else 2 for names in (rows, columns))
    width = max(left + picture.width, int(font.getlength(title)) + 4) + 2
    sheet = Image.new("RGB", (width, top + picture.height + below), "white")
    sheet.paste(picture, (left, top))
    pen = ImageDraw.Draw(sheet)
    pen.text((2, 4), title, fill="black", font=font)
    pen.rectangle((left - 1, top - 1, left + picture.width, top + picture.height), outline="grey")
    for i, name in enumerate(rows or []):
        pen.text((left - 4, top + (i + .5) * cell), str(name), fill="black", font=font, anchor="rm")
    for j, name in enumerate(columns or []):                       # written upwards
        label = Image.new("RGB", (below, 14), "white")
        ImageDraw.Draw(label).text((below - 4, 7), str(name), fill="black", font=font, anchor="rm")
        sheet.paste(label.rotate(90, expand=True), (int(left + (j + .5) * cell - 7), top + picture.height + 1))
    return sheet


def beside(*pictures):
    """PIL images in a row on white."""
    sheet = Image.new("RGB", (sum(p.width + 8 for p in pictures), max(p.height for p in pictures)), "white")
    x = 0
    for picture in pictures:
        sheet.paste(picture, (x, 0))
        x += picture.width + 8
    return sheet


def save_views(path, raw, views, statistics, count=8):
    """What the network was fed: a column for each image, the raw one on top, its views below."""
    mean, std = (t.to(raw.device) for t in statistics)
    rows = [raw[:count]] + [view[:count].float() * std + mean for view in views]
    save_picture(path, grid(torch.cat(rows), min(count, len(raw)), side=64))


def save_cluster_pictures(folder, data, found):
    """prototypes.png: the ten most confident images of each cluster, a row each, up to 40 clusters.
    confusion.png, where there are labels: each class's share in each cluster."""
    assignments, confidence, split = found.test, found.test_confidence, data.test
    clusters = int(max(found.train.max(), found.test.max())) + 1
    rows = []
    for c in range(min(clusters, 40)):
        members = (assignments == c).nonzero().flatten()
        best = members[confidence[members].argsort(descending=True)[:10]]
        row = torch.full((10, *split.images.shape[1:]), 255, dtype=torch.uint8)
        row[:len(best)] = split.images[best]
        rows.append(row)
    save_picture(folder / "prototypes.png", grid(torch.cat(rows), 10))
    if split.labels is not None and clusters <= 200:
        table = contingency(split.labels, assignments, len(data.classes), clusters)
        order = np.lexsort((-table.max(0), table.argmax(0)))       # clusters beside their class
        share = table[:, order] / table.sum(1, keepdims=True).clip(1)
        save_picture(folder / "confusion.png", heatmap(
            share, rows=data.classes if len(data.classes) <= 32 else None,
            columns=order.tolist() if clusters <= 32 else None, limit=1,
            title="share of each class (row) in each cluster (column)"))
