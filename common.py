"""What the four scripts share: data, views, backbone, evaluation, run folder, pictures.

Nothing here belongs to one paper. A loss, a head, a recipe of augmentations, a memory: each stands
in the script of its method. The rule that decides: does the paper have a sentence about it? Then it
is in the script. Is it standard, and do the scripts use it identically? Then it is here.

    1. Failing well    one clear line instead of a traceback
    2. Randomness      one generator for each (seed, epoch, purpose); the device
    3. Data            the whole dataset as one uint8 tensor on the device
    4. Views           batched augmentations, a random draw of its own for each image
    5. Backbone        torchvision's ResNet-18 with the right stem for the image size
    6. Training        learning rate, batches, a step that never takes in a NaN
    7. Evaluation      clusters, k-means, kNN, linear probe
    8. Run folder      log, checkpoints, result, clusters.csv
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


class Damaged(Exception):
    """A file is not what was written."""


def run_script(train, args):
    """Call train(args) and turn every expected failure into one line on stderr and an exit code:
    2 what the user can put right, 1 what the machine or the numbers did, 130 Ctrl-C."""
    memory = (f"out of memory: lower --batch-size (now {args.batch_size}), --width (now "
              f"{args.width}) or --image-size")
    try:
        return train(args)
    except UserError as error:
        code, line = 2, str(error)
    except NotFinite as error:
        code, line = 1, str(error)
    except KeyboardInterrupt as stop:
        code, line = 130, str(stop) or ("interrupted; finished epochs are kept, --resume continues "
                                        "after them")
    except (torch.OutOfMemoryError, MemoryError):
        code, line = 1, memory
    except BrokenPipeError:                                         # the reader of our output left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code, line = 1, "nobody reads the output any more; stopped, --resume continues"
    except OSError as error:                                        # a full disk, a removed folder
        code, line = 1, f"the machine refused a file: {error}"
    except RuntimeError as error:                                   # the CPU has no class for it
        if "can't allocate memory" not in str(error):
            raise
        code, line = 1, memory
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    raise SystemExit(code)


class Parser(argparse.ArgumentParser):
    """argparse that answers a wrong argument with one line and takes no abbreviated flags."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists every flag)\n")


def number(kind, low, high=2**31, above=False):
    """An argparse type: an int or a float from low (above=True: more than low) to high."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (value > low if above else value >= low) or not value <= high:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {'a whole number' if kind is int else 'a number'} of "
                f"{'more than' if above else 'at least'} {low}"
                f"{'' if high == 2**31 else f' and at most {high}'}")
        return value
    return convert


def progress(what, done, total, started):
    """A live line, rewritten in place; on a terminal only, so that log files stay readable."""
    if sys.stdout.isatty():
        left = (time.time() - started) * (total - done) / max(done, 1)
        line = f"  {what} {done:,}/{total:,}, {clock_text(left)} left"
        print("\r" + (line.ljust(78) if done < total else " " * 78 + "\r"), end="", flush=True)


def clock_text(seconds):
    """75 -> '1m15s'"""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


# ------------------------------------------------------------------------------------------------
# 2. Randomness and the device

def generator(seed, epoch, purpose):
    """A CPU generator that depends on (seed, epoch, purpose) alone. No random state has to be
    saved: a resumed epoch draws the numbers that the uninterrupted run would have drawn."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def pick_device(name):
    """'auto', 'cpu' or 'cuda' -> torch.device. Raises UserError when there is no such device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA GPU; leave the flag out to use the CPU")
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def fast_dtype(device):
    """bfloat16 where the device multiplies it natively (CPUs: AVX512-BF16 or AMX), else float32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = any(getattr(torch.cpu, question, bool)() for question in
                   ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return torch.bfloat16 if fast else torch.float32


def autocast(device):
    """Mixed precision for the network: float32 weights, bfloat16 convolutions and products where
    that is fast. Losses are computed outside it, in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=fast_dtype(device) == torch.bfloat16)


# ------------------------------------------------------------------------------------------------
# 3. Data: the whole dataset is one uint8 tensor on the device. There is no DataLoader and no
#    worker: CIFAR takes 0.15 GB, Tiny-ImageNet 1.2 GB, STL-10 with its unlabelled images 2.9 GB.

class Split(NamedTuple):
    images: torch.Tensor                  # (N, 3, H, W) uint8
    labels: Optional[torch.Tensor]        # (N,) int64, -1 where unknown; None: no labels at all
    names: list                           # N strings: the path of a file, or 'train/17'


class Dataset(NamedTuple):
    name: str                             # usable in the name of a folder
    train: Split
    test: Split                           # the train split itself where there is no other
    classes: Optional[list]               # C names; None: unlabelled
    fingerprint: str                      # changes when the images do

    @property
    def has_test(self):
        return self.test is not self.train


NAMES = ("shapes", "cifar10", "cifar100", "cifar20", "fashion-mnist", "stl10", "tiny-imagenet",
         "imagenet10", "imagenet-dogs")
NEEDS_NOTHING = "or use --dataset shapes, which needs nothing"
IMAGE_FILES = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm",
               ".pgm"}
MAX_PIXELS = 100_000_000                  # a larger picture is refused: it may be a bomb
# The classes of the ImageNet subsets of the clustering literature.
IMAGENET_10 = ("n02056570 n02085936 n02128757 n02690373 n02692877 n03095699 n04254680 n04285008 "
               "n04467665 n07747607").split()
IMAGENET_DOGS = ("n02085936 n02086646 n02088238 n02091467 n02097130 n02099601 n02101388 n02101556 "
                 "n02102177 n02105056 n02105412 n02105855 n02107142 n02110958 n02112137").split()
# The superclass of each of CIFAR-100's classes, in their alphabetical order.
CIFAR_20 = np.array([
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3,
    15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0,
    17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13, 16, 19,
    2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13])
SUPERCLASSES = (
    "aquatic mammals,fish,flowers,food containers,fruit and vegetables,electrical devices,"
    "furniture,insects,large carnivores,large outdoor things,large outdoor scenes,large omnivores "
    "and herbivores,medium mammals,invertebrates,people,reptiles,small mammals,trees,vehicles 1,"
    "vehicles 2").split(",")


def load_dataset(name, data_dir="data", image_size=None):
    """A dataset by name, or a folder of images by path. -> Dataset, on the CPU

    name        one of NAMES, or a folder: DIR/train/<class>/* with DIR/test/<class>/*;
                or DIR/<class>/*; or images directly in DIR (no labels)
    data_dir    where downloads and decoded folders are kept; for imagenet10 and imagenet-dogs the
                ImageNet folder with its train/ and val/
    image_size  side in pixels: antialiased resize of the shorter side, centre crop;
                None: the dataset's own (of a folder: see _folder_size)

    Raises UserError, one line, for an unknown name, an unusable folder, a failed download."""
    data_dir, folder = Path(data_dir), Path(os.path.expanduser(name))           # never raises
    if name == "shapes":
        loaded = _shapes(image_size or 32)
    elif name in ("tiny-imagenet", "imagenet10", "imagenet-dogs"):
        loaded = _imagenet(name, data_dir, image_size)
    elif name in NAMES:
        loaded = _torchvision(name, data_dir, image_size)
    elif name and os.path.isdir(folder):
        loaded = _folder(folder.resolve(), data_dir, image_size)
    else:
        near = difflib.get_close_matches(name.lower(), NAMES, 1)
        near = f" did you mean {near[0]}?" if near else ""
        raise UserError(f"--dataset {name}:{near} It is one of {', '.join(NAMES)}, or the path of "
                        f"a folder of images")
    if len(loaded.train.images) < 2:
        raise UserError(f"--dataset {name}: one usable image is not enough to learn from")
    return loaded


def _shapes(size, train=5000, test=2000):
    """The embedded dataset, drawn in two seconds: small pictures of ten kinds of shapes. The kind
    is the class; colour, position, size, rotation, background and noise are nuisances, so that
    k-means on the pixels stays near chance. Always the same pictures."""
    kinds = ["disc", "square", "triangle", "star", "cross", "ring", "crescent", "heart", "bar", "T"]
    rng, n = np.random.default_rng(2025), train + test
    labels = np.arange(n) % len(kinds)

    def uniform(low, high, shape):
        return rng.uniform(low, high, shape).astype(np.float32)
    # A pixel grid in the frame of each shape: centred, rotated up to 20 degrees, unit radius.
    side = (np.arange(size, dtype=np.float32) + .5) / size
    radius, angle = uniform(.30, .42, (n, 1, 1)), uniform(-.35, .35, (n, 1, 1))
    x = (side[None, None, :] - .5 - uniform(-.1, .1, (n, 1, 1))) / radius
    y = (side[None, :, None] - .5 - uniform(-.1, .1, (n, 1, 1))) / radius
    x, y = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    distance = np.empty((n, size, size), np.float32)               # to the outline, negative inside
    for kind, name in enumerate(kinds):
        rows = labels == kind
        distance[rows] = _signed_distance(name, x[rows], y[rows])
    cover = np.clip(.5 - distance * radius * size, 0, 1)[:, None]  # antialiased over one pixel
    # Colours are independent; only the brightness is ordered, the shape above its background.
    # With either order the clusters found are those of (shape, order).
    back, fore = uniform(0, .6, (n, 3, 1, 1)), uniform(.3, 1, (n, 3, 1, 1))
    fore += np.clip(.25 - (fore.mean(1) - back.mean(1)), 0, None)[:, None]
    slope = uniform(-.05, .05, (2, n, 3, 1, 1))
    back = back + slope[0] * (side[None, :] - .5) + slope[1] * (side[:, None] - .5)
    image = back + cover * (fore - back)
    image += .04 * rng.standard_normal(image.shape, dtype=np.float32)
    image = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    return _splits("shapes", image[:train], labels[:train], image[train:], labels[train:], kinds)


def _signed_distance(kind, x, y):
    """About the distance to the outline of a shape of radius 1, negative inside. y points down."""
    def box(u, v, a, b):
        return np.maximum(np.abs(u) - a, np.abs(v) - b)
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
        return .328 * (r * np.cos(a) - 1) + .945 * r * np.sin(a)       # the edge from tip to notch
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
    return np.minimum(box(x, y + .6, .85, .25), box(x, y - .1, .25, .9))        # T


def _splits(name, train_x, train_y, test_x, test_y, classes):
    """Arrays to a Dataset whose images are named by split and index."""
    splits = [Split(torch.as_tensor(x).contiguous(), torch.as_tensor(np.asarray(y)).long(),
                    [f"{split}/{i}" for i in range(len(x))])
              for split, x, y in (("train", train_x, train_y), ("test", test_x, test_y))]
    some = splits[0].images[::max(1, len(train_x) // 64)].numpy()
    fingerprint = hashlib.sha256(name.encode() + some.tobytes()).hexdigest()[:16]
    return Dataset(name, *splits, list(classes), fingerprint)


def _torchvision(name, data_dir, image_size):
    """The sets that torchvision downloads and verifies."""
    sets = torchvision.datasets
    kind = {"cifar10": sets.CIFAR10, "cifar100": sets.CIFAR100, "cifar20": sets.CIFAR100,
            "fashion-mnist": sets.FashionMNIST, "stl10": sets.STL10}[name]
    parts = [{"train": True}, {"train": False}]
    if name == "stl10":                                       # 5,000 labelled, 100,000 not
        parts = [{"split": "train+unlabeled"}, {"split": "test"}]
    try:
        try:
            both = [kind(data_dir, download=False, **part) for part in parts]
        except RuntimeError:                                       # not there, or damaged: fetch it
            print(f"{name}: not complete in {data_dir}, downloading it there")
            socket.setdefaulttimeout(30)
            both = [kind(data_dir, download=True, **part) for part in parts]
    except (OSError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile) as error:
        files = "its four .gz files" if name == "fashion-mnist" else kind.filename
        place = data_dir / "FashionMNIST/raw" if name == "fashion-mnist" else data_dir
        raise UserError(f"{name} could not be downloaded ({_one_line(error)}); put {files} in "
                        f"{place} and start again, {NEEDS_NOTHING}") from None
    arrays = []
    for part in both:
        x, y = torch.as_tensor(part.data), part.labels if name == "stl10" else part.targets
        if name.startswith("cifar"):                               # (N, H, W, 3)
            x = x.permute(0, 3, 1, 2)
        elif name == "fashion-mnist":                              # grey 28 px, padded to 32
            x = F.pad(x, (2, 2, 2, 2))[:, None].expand(-1, 3, -1, -1)
        arrays += [_resized(x, image_size), CIFAR_20[y] if name == "cifar20" else y]
    return _splits(name, *arrays, SUPERCLASSES if name == "cifar20" else both[0].classes)


def _one_line(error):
    """The first line of what an exception says, or its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _resized(images, size):
    """(N, 3, H, W) uint8 -> (N, 3, size, size) uint8, antialiased; as it is when size is None."""
    if size is None or images.shape[-1] == size:
        return images
    return torch.cat([F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True)
                      .round_().clamp_(0, 255).byte() for part in images.split(4096)])


def _imagenet(name, data_dir, image_size):
    """Tiny-ImageNet in its original layout, or the ImageNet subsets from the user's ImageNet."""
    tiny = name == "tiny-imagenet"
    root = data_dir / "tiny-imagenet-200" if tiny else data_dir
    wanted = {"imagenet10": IMAGENET_10, "imagenet-dogs": IMAGENET_DOGS}.get(name)
    if not (root / "train").is_dir():
        todo = f"unpack tiny-imagenet-200.zip in {data_dir}" if tiny else \
            "give the ImageNet folder, which holds train/ and val/, as --data-dir"
        raise UserError(f"{name}: there is no {root / 'train'}; {todo}, {NEEDS_NOTHING}")
    train, classes = _list_images(root / "train", wanted)
    missing = sorted(set(wanted or []) - set(classes or []))
    if not classes:
        missing = missing or ["class folders with images"]
    if missing:
        raise UserError(f"{name}: {root / 'train'} lacks {', '.join(missing)}")
    annotations, test = root / "val/val_annotations.txt", []
    if annotations.is_file():                                      # image <tab> class <tab> box
        rows = [line.split("\t") for line in annotations.read_text().splitlines() if line.strip()]
        bad = next((row for row in rows if len(row) < 2 or row[1] not in classes), None)
        if bad:
            raise UserError(f"{annotations}: {bad[:2]} does not name an image and its class")
        test = [(root / "val/images" / row[0], classes.index(row[1])) for row in rows]
    elif (root / "val").is_dir():
        test, names = _list_images(root / "val", classes)
        test = [(f, classes.index(names[c])) for f, c in test]     # numbered as in train
    return _decoded(name, root, train, test, classes, image_size or (64 if tiny else 224),
                    data_dir / "cache")


def _folder(root, data_dir, image_size):
    """The user's own images. Sub-folders are classes; images directly in DIR have no labels."""
    has_split = (root / "train").is_dir()
    train_root = root / "train" if has_split else root
    test_root = next((root / t for t in ("test", "val") if has_split and (root / t).is_dir()), None)
    train, classes = _list_images(train_root)
    if not train:
        raise UserError(f"{train_root}: no images there (known endings: "
                        f"{' '.join(sorted(IMAGE_FILES))})")
    test = []
    if test_root:
        test, test_classes = _list_images(test_root)
        if test and (classes is None) != (test_classes is None):
            raise UserError(f"{root}: either both train/ and {test_root.name}/ have class folders, "
                            f"or neither has")
        unknown = sorted(set(test_classes or []) - set(classes or []))
        if unknown:
            raise UserError(f"{test_root}: classes that {train_root} lacks: "
                            f"{', '.join(unknown[:5])}")
        if classes:                                                # numbered as in train
            test = [(f, classes.index(test_classes[c])) for f, c in test]
    name = "".join(c if c.isalnum() or c in "._-" else "_" for c in root.name) or "folder"
    return _decoded(name, root, train, test, classes,
                    image_size or _folder_size([f for f, _ in train]), data_dir / "cache")


def _list_images(root, wanted=None):
    """All image files below root, sorted. -> ([(path, class id or -1)], class names or None)

    Sub-folders (those in `wanted`, if given) are classes. Images directly in root mean that there
    are no classes."""
    def is_image(file):
        return file.suffix.lower() in IMAGE_FILES and not file.is_fifo()        # a pipe would block

    def walk(top):
        seen, found, others = {os.path.realpath(root)}, [], 0
        for place, folders, names in os.walk(top, followlinks=True):
            real = os.path.realpath(place)
            if real in seen:                                       # a loop of symbolic links
                folders.clear()
                continue
            seen.add(real)
            images = [f for n in names if is_image(f := Path(place, n))]
            found, others = found + images, others + len(names) - len(images)
        return sorted(found), others
    entries = sorted(os.scandir(root), key=lambda e: e.name)
    folders = {e.name: walk(e.path) for e in entries
               if os.path.isdir(e) and (wanted is None or e.name in wanted)}
    direct = [f for e in entries if not os.path.isdir(e) and is_image(f := Path(e.path))]
    others = sum(not os.path.isdir(e) for e in entries) - len(direct)
    others += sum(o for _, o in folders.values())
    classes = sorted(name for name, (files, _) in folders.items() if files)
    if others and wanted is None:
        print(f"{root}: {others:,} files that are not images, by their ending, are left out")
    if wanted is None and (direct or not classes):
        if classes:
            print(f"{root}: images lie in it and in its sub-folders: all are taken, without labels")
        return [(f, -1) for f in direct + sum((folders[c][0] for c in classes), [])], None
    return [(f, i) for i, c in enumerate(classes) for f in folders[c][0]], classes


def _folder_size(files):
    """A side in pixels for a folder of any images: their own where that is small and the same for
    all, else the largest of 32, 64, 96 that the median image fills. --image-size overrides it."""
    sizes = []
    for file in files[::max(1, len(files) // 64)]:
        with contextlib.suppress(Exception), Image.open(file) as image:
            sizes.append(image.size)
    if len(set(sizes)) == 1 and 8 <= sizes[0][0] == sizes[0][1] <= 64:
        return sizes[0][0]
    median = np.median([min(s) for s in sizes]) if sizes else 32
    return max((s for s in (32, 64, 96) if s <= median), default=32)


def _decode(file, size):
    """One image file -> (3, size, size) uint8, or in words why not."""
    try:
        with Image.open(file) as image:
            if image.width * image.height > MAX_PIXELS:
                return f"{image.width} x {image.height} pixels are too many"
            image.draft("RGB", (size, size))                       # JPEG: decode near the target
            image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":                              # grey of 16 or 32 bits
                grey = np.asarray(image, np.float64)
                top = 65535 if grey.max() > 255 else 255 if grey.max() > 1 else 1
                image = Image.fromarray((grey / top * 255).clip(0, 255).astype(np.uint8))
            if "A" in image.mode or "transparency" in image.info:  # transparent becomes white
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
            if image.size != (size, size):
                image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    except Exception as error:                                     # Pillow raises many kinds
        return _one_line(error)


def _decoded(name, root, train, test, classes, size, cache_dir):
    """Decode files once and keep the array; a changed folder is decoded anew. -> Dataset"""
    digest = hashlib.sha256(f"{size}|{classes}|{len(train)}".encode())
    for file, label in train + test:
        with contextlib.suppress(OSError):
            stat = os.stat(file)
            digest.update(os.fsencode(f"{os.path.relpath(file, root)}|{label}|{stat.st_size}|"
                                      f"{stat.st_mtime_ns}\n"))
    fingerprint = digest.hexdigest()[:16]
    place = hashlib.sha256(os.fsencode(str(root))).hexdigest()[:8]
    cache = Path(cache_dir) / f"{name}-{place}-{size}px.pt"
    try:
        kept = load_checked(cache)
    except (OSError, Damaged):
        kept = {}
    if kept.get("fingerprint") != fingerprint:
        kept = {"fingerprint": fingerprint, **_decode_all(name, train + test, size)}
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            save_atomically(cache, kept)
        except OSError as error:
            print(f"  the decoded images could not be kept for the next start: {error}")
    elif kept["bad"]:
        print(f"{name}: {kept['bad']:,} unreadable image files are left out, as before")
    good, files = kept["good"], train + test
    edge = sum(i < len(train) for i in good)
    if not edge:
        raise UserError(f"{root}: none of its {len(train):,} image files can be read")
    names = [os.path.relpath(files[i][0], root) for i in good]
    labels = torch.tensor([files[i][1] for i in good])
    both = [Split(kept["images"][part], labels[part] if classes else None, names[part])
            for part in (slice(0, edge), slice(edge, None))]
    return Dataset(name, both[0], both[1] if edge < len(good) else both[0], classes, fingerprint)


def _decode_all(name, files, size):
    """Decode [(path, label)] with all cores; name the unreadable ones.
    -> {'images' (N, 3, size, size) uint8, 'good': which files they are, 'bad': how many are not}"""
    print(f"{name}: decoding {len(files):,} images to {size} x {size} px, once")
    images, good, bad, started = [], [], [], time.time()
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files), 512):                    # in parts: Ctrl-C is heard
            part = [f for f, _ in files[start:start + 512]]
            for i, image in enumerate(pool.map(_decode, part, [size] * len(part)), start):
                if isinstance(image, str):
                    path = os.fsencode(files[i][0]).decode(errors="replace")
                    bad.append(f"  left out {path}: {image}")
                else:
                    images.append(image)
                    good.append(i)
            progress("decoding", start + len(part), len(files), started)
    print("\n".join(bad[:20] + [f"  left out {len(bad) - 20:,} more"] * (len(bad) > 20)),
          end="\n" if bad else "")
    images = torch.stack(images) if images else torch.empty(0, 3, size, size, dtype=torch.uint8)
    return {"images": images, "good": good, "bad": len(bad)}


def subset(labels, n, imbalance, size, seed):
    """Indices of the training images to learn from: all, a long tail, or a balanced part.

    labels (N,) or None; imbalance r >= 1: class c keeps int(n_max r^(-c / (C - 1))) images, the
    exponential profile of long-tailed CIFAR; size: that many images, equally many of each class
    (of any, where there are no labels). -> (n,) int64, sorted"""
    if imbalance == 1 and size is None:
        return torch.arange(n)
    if size is not None and size > n:
        raise UserError(f"--train-size {size}: there are only {n:,} training images")
    order = torch.randperm(n, generator=generator(seed, 0, "subset"))
    if labels is None or (labels < 0).any():
        if imbalance != 1:
            raise UserError("--imbalance needs a label for every training image")
        return order[:size].sort().values
    counts = torch.bincount(labels).tolist()
    classes = len(counts)
    if size is None:
        keep = [int(max(counts) * imbalance ** (-c / max(classes - 1, 1))) for c in range(classes)]
    else:
        keep = [size // classes + (c < size % classes) for c in range(classes)]
    if any(k > have for k, have in zip(keep, counts)):
        raise UserError(f"a subset with {max(keep):,} images of a class: some class has fewer")
    return torch.cat([order[labels[order] == c][:k] for c, k in enumerate(keep)]).sort().values


def check_sizes(args, data, n):
    """The number of clusters of the report. Raises UserError when n training images are too few
    for --batch-size or --clusters, or when nobody can know the number of clusters."""
    if args.clusters is None and data.classes is None:
        raise UserError(f"{args.dataset} has no labels: say how many clusters, e.g. --clusters 10")
    clusters = args.clusters or len(data.classes)
    for flag, value in (("--batch-size", args.batch_size), ("--clusters", clusters)):
        if value > n:
            raise UserError(f"{flag} {value}: there are only {n:,} training images")
    return clusters


def to_device(images, device):
    """Move a uint8 dataset to the device; where it does not fit, leave it in pinned memory."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        if images.nbytes > .5 * free:
            print(f"the images ({images.nbytes / 2**30:.1f} GiB) stay in host memory: the device "
                  f"has {free / 2**30:.1f} GiB free")
            return images.pin_memory()
    return images.to(device)


def fetch(images, index, device):
    """images[index] as float in [0, 1] on the device. images (N, 3, H, W) uint8, index (B,) or
    (B, n) on the CPU."""
    rows = index.flatten()                                         # index_select: faster than []
    if images.device.type == device.type:
        picked = images.index_select(0, rows.to(device, non_blocking=True))
    else:
        picked = images.index_select(0, rows).pin_memory().to(device, non_blocking=True)
    return picked.unflatten(0, index.shape).float().div_(255)


def pixel_statistics(images):
    """(mean, std) over images and pixels, (1, 3, 1, 1) each, of at most 10,000 images in [0, 1]."""
    part = images[::math.ceil(len(images) / 10_000)].float().div_(255)
    return part.mean((0, 2, 3), keepdim=True), part.std((0, 2, 3), keepdim=True).clamp_(min=1e-3)


# ------------------------------------------------------------------------------------------------
# 4. Views. Batched, on the device; every image gets its own draw. Inputs are (B, 3, H, W) float in
#    [0, 1]. Random numbers come from a CPU generator, so a seed gives the same views everywhere.

def random_resized_crop(x, size, scale, rng, ratio=(3 / 4, 4 / 3), flip=.5):
    """torchvision's RandomResizedCrop and RandomHorizontalFlip for a batch. -> (B, 3, size, size)

    scale: range of the share of the area; flip: its probability (it costs nothing: the coordinates
    of the crop are reversed)."""
    n, _, height, width = x.shape
    area = height * width * torch.empty(10, n).uniform_(*scale, generator=rng)
    aspect = torch.empty(10, n).uniform_(*map(math.log, ratio), generator=rng).exp()
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (0 < w) & (w <= width) & (0 < h) & (h <= height)        # like torchvision: ten tries,
    first = fits.int().argmax(0, keepdim=True)
    w = torch.where(fits.any(0), w.gather(0, first)[0], width)     # then the whole image
    h = torch.where(fits.any(0), h.gather(0, first)[0], height)
    left = (torch.rand(n, generator=rng) * (width - w + 1)).floor()
    top = (torch.rand(n, generator=rng) * (height - h + 1)).floor()
    return resized_crop(x, top, left, h, w, size, torch.rand(n, generator=rng) < flip)


def resized_crop(x, top, left, h, w, size, flipped):
    """Cut the box (top, left, h, w) from each image, resize it to (size, size), mirror it where
    flipped; all five (B,). Equal to torchvision's resized_crop: boxes that grow are sampled at
    coordinates clamped to the box, those that may shrink go through antialiasing filters."""
    boxes = torch.stack([top, left, h, w, flipped.float()]).to(x.device, non_blocking=True)
    top, left, h, w, flipped = boxes[:, :, None]                   # Bx1 each
    u = (torch.arange(size, device=x.device) + .5) / size
    across = torch.where(flipped > 0, 1 - u, u)                    # BxS, in shares of the box
    if max(x.shape[-2:]) > size:
        rows = _filter(u.expand(len(x), -1), top, h, x.shape[-2])
        columns = _filter(across, left, w, x.shape[-1])
        return rows[:, None] @ x @ columns.transpose(1, 2)[:, None]
    i = (u * h - .5).clamp(min=0).minimum(h - 1) + top             # BxS, in pixels of x
    j = (across * w - .5).clamp(min=0).minimum(w - 1) + left
    i, j = (2 * i + 1) / x.shape[-2] - 1, (2 * j + 1) / x.shape[-1] - 1     # grid_sample's units
    grid = torch.stack(torch.broadcast_tensors(j[:, None, :], i[:, :, None]), -1)
    return F.grid_sample(x, grid, align_corners=False)


def _filter(u, start, length, pixels):
    """(B, S, pixels) weights of a triangle filter that resizes [start, start + length) to S."""
    j = torch.arange(pixels, device=u.device)
    centre = (u * length + start - .5)[:, :, None]
    start, length = start[:, :, None], length[:, :, None]
    weight = (1 - (j - centre).abs() / (length / u.shape[1]).clamp(min=1)).clamp_(min=0)
    weight = weight * ((j >= start) & (j < start + length))
    return weight / weight.sum(-1, keepdim=True)


def grey(x):
    """(B, 3, H, W) -> (B, 1, H, W) luminance, with torchvision's weights."""
    return x[:, :1] * .2989 + x[:, 1:2] * .587 + x[:, 2:] * .114


def adjust_brightness(x, factor):
    """factor (B, 1, 1, 1); 1 changes nothing. Clamped to [0, 1], like contrast and saturation."""
    return (x * factor).clamp_(0, 1)


def adjust_contrast(x, factor):
    """Blend with the mean grey of the image."""
    mean = grey(x).flatten(1).mean(1)[:, None, None, None]
    return (x - mean).mul_(factor).add_(mean).clamp_(0, 1)         # lerp, with fast broadcasting


def adjust_saturation(x, factor):
    """Blend with the grey image."""
    return torch.lerp(grey(x), x, factor).clamp_(0, 1)


def adjust_hue(x, shift):
    """Turn the hue by shift (B, 1, 1, 1), in whole turns (-.5 to .5), through HSV."""
    r, g, b = x.split(1, 1)
    low, high = (f(f(r, g), b) for f in (torch.minimum, torch.maximum))
    chroma = high - low
    # A choice by the brightest channel, as lerp by 0 or 1: on a CPU far faster than where.
    hue = torch.lerp(b - r + 2 * chroma, r - g + 4 * chroma, (high - g).sign())
    hue = torch.lerp(g - b, hue, (high - r).sign()).div_(chroma.clamp(min=1e-8)).add_(6 * shift)
    hue -= 6 * (hue / 6).floor_()                                  # 0 to 6
    y = hue - torch.tensor([3., 2., 4.], device=x.device).view(1, 3, 1, 1)
    y = y.abs_().neg_().add_(2).clamp_(0, 1)                       # peaks opposite red, at G, at B
    y[:, :1].neg_().add_(1)
    return y.mul_(chroma).add_(low)


def color_jitter(x, brightness, contrast, saturation, hue, rng, p=.8, groups=8):
    """torchvision's ColorJitter, applied to each image with probability p. -> (B, 3, H, W)

    Factors are uniform in [1 - strength, 1 + strength] and hue in [-hue, hue], drawn per image.
    torchvision also shuffles the order of the four operations per image. Here image i belongs to
    group i modulo `groups`, and each group has its own order: a training batch, which is a run of
    neighbours, holds all of these orders."""
    n, ops = len(x), []
    on = torch.rand(n, generator=rng) < p
    for adjust, strength, same in (
            (adjust_brightness, brightness, 1), (adjust_contrast, contrast, 1),
            (adjust_saturation, saturation, 1), (adjust_hue, hue, 0)):
        low = max(0, same - strength) if same else -strength
        amount = torch.empty(n).uniform_(low, same + strength, generator=rng)
        amount = torch.where(on, amount, same).to(x.device, non_blocking=True)
        ops.append((adjust, amount[:, None, None, None]))
    out = torch.empty_like(x)
    for group in range(min(groups, n)):
        part = x[group::groups]
        for i in torch.randperm(4, generator=rng).tolist():
            adjust, amount = ops[i]
            part = adjust(part, amount[group::groups])
        out[group::groups] = part
    return out


def random_grayscale(x, p, rng):
    """Each image becomes grey (three equal channels) with probability p."""
    on = (torch.rand(len(x), generator=rng) < p).to(x.device, non_blocking=True)
    return torch.lerp(x, grey(x), on[:, None, None, None].to(x.dtype))


def normalise(x, statistics):
    """(x - mean) / std, in the memory order that convolutions like best."""
    mean, std = (s.to(x.device) for s in statistics)
    return (x - mean).div_(std).contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------
# 5. Backbone

def resnet18(image_size, width=64, stem_stride=1):
    """torchvision's ResNet-18 without its classifier. (B, 3, H, W) -> (B, 8 * width) features

    width        channels of the first stage: 64 is ResNet-18, 16 is for laptops and tests. At 64
                 the state_dict loads into torchvision.models.resnet18 (up to 128 px: not the stem)
    stem_stride  2 makes the 3x3 stem halve the image: about 3x faster, for laptops and tests

    The stem decides. ImageNet's 7x7 one leaves an image of 32 px with 8 x 8 positions before the
    first block and a single one at the end; used there it costs many points, silently."""
    net = torchvision.models.resnet18()
    if image_size <= 128:                 # 3x3; with a max-pool above 64 px, as SCAN has on STL-10
        net.conv1 = nn.Conv2d(3, width, 3, stem_stride, 1, bias=False)
        net.maxpool = nn.Identity() if image_size <= 64 else net.maxpool
    else:
        net.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
    net.inplanes, net.bn1, net.fc = width, nn.BatchNorm2d(width), nn.Identity()
    for i in range(4):
        stage = net._make_layer(BasicBlock, width * 2**i, 2, stride=min(2, i + 1))
        setattr(net, f"layer{i + 1}", stage)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net.to(memory_format=torch.channels_last)


def describe(net, image_size):
    """'ResNet-18, width 16, 3x3 stem of stride 2 without max-pool (images of 32 px)'"""
    stem, pool = net.conv1, "without" if isinstance(net.maxpool, nn.Identity) else "with"
    return (f"ResNet-18, width {stem.out_channels}, {stem.kernel_size[0]}x{stem.kernel_size[0]} "
            f"stem of stride {stem.stride[0]} {pool} max-pool (images of {image_size} px)")


# ------------------------------------------------------------------------------------------------
# 6. Training

def cosine_lr(step, steps, warmup=0):
    """Factor of the learning rate at a step: linear from 0 over `warmup` steps, then half a cosine
    from 1 to 0 at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    return .5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def set_lr(optimizer, lr):
    """lr for all parameter groups, times the group's own `factor` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("factor", 1)


def batches(images, index, batch_size, views, rng, device, clock):
    """One epoch: shuffle, then yield (batch of index, view, ...), whole batches only.

    views(x, rng) makes a tuple of views of raw images x in [0, 1]. It is called for several hundred
    images of 32 px at a time on a CPU (they stay in its cache), several thousand on a GPU (there a
    view costs kernel launches, not arithmetic); training batches are slices of what it returns."""
    order = index[torch.randperm(len(index), generator=rng)]
    order = order[:len(order) // batch_size * batch_size]
    limit = (4096 if device.type == "cuda" else 512) * 32**2 // max(32, images.shape[-1])**2
    chunk = max(1, limit // batch_size) * batch_size               # fewer of larger images
    for part in order.split(chunk):
        with clock():
            made = views(fetch(images, part, device), rng)
        for i in range(0, len(part), batch_size):
            yield part[i:i + batch_size], *(view[i:i + batch_size] for view in made)


def step(optimizer, loss):
    """Backward and optimizer step. From the first loss or gradient on that is not finite, the
    device itself leaves steps out (`found_inf` of the fused optimizers): the weights stay good
    without a synchronisation in every step. Meter reports it."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    grads = [p.grad for group in optimizer.param_groups for p in group["params"]
             if p.grad is not None]
    good = torch.isfinite(loss.detach()) & torch.isfinite(torch.nn.utils.get_total_norm(grads))
    bad = 1 - good.float()
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
        """Raise NotFinite if a step was not finite; no weight was updated with it or after it."""
        if not self.rows:
            return
        rows = torch.stack(self.rows).cpu()
        broken = (~rows.isfinite().all(1)).nonzero().flatten().tolist()
        if broken or getattr(self.optimizer, "found_inf", torch.zeros(())).item():
            at = broken[0] if broken else len(rows) - 1
            what = "" if broken else "or a gradient of the 50 steps before it, "
            terms = ", ".join(f"{n} {v:.4g}" for n, v in zip(self.names, rows[at].tolist()))
            raise NotFinite(f"{self.where}, step {len(self.done) + at + 1}, {what}is not finite "
                            f"({terms}): stopped before the optimizer used it; the checkpoint of "
                            f"the last good epoch is kept")
        self.done, self.rows = self.done + rows.tolist(), []
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
        """-> (seconds, of which making views) since the last read"""
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
    images (N, 3, H, W) uint8 -> (N, D) float32 on the device"""
    was_training, out = network.training, []
    network.eval()
    for part in torch.arange(len(images)).split(batch_size):
        with autocast(device):
            out.append(network(normalise(fetch(images, part, device), statistics)).float())
    network.train(was_training)
    return torch.cat(out)


def contingency(labels, assignments, classes=0, clusters=0):
    """Counts of each (class, cluster). labels, assignments (N,) integers >= 0, numpy or torch.
    -> (C, K) int64; C and K as large as the numbers found, or as asked for"""
    labels, assignments = np.asarray(labels), np.asarray(assignments)
    shape = max(classes, labels.max() + 1), max(clusters, assignments.max() + 1)
    table = np.zeros(shape, np.int64)
    np.add.at(table, (labels, assignments), 1)
    return table


def hungarian_match(table):
    """The one-to-one map of clusters to classes with the most hits. table (C, K) counts.
    -> (K,) the class of each cluster, -1 where clusters are left over"""
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

    def entropy(counts):
        p = counts[counts > 0] / n
        return -(p * np.log(p)).sum()

    def pairs(counts):
        return (counts * (counts - 1.) / 2).sum()
    both = entropy(a) + entropy(b)
    nmi = 2 * (both - entropy(table)) / both if both > 0 else 1.
    chance, limit = pairs(a) * pairs(b) / max(pairs(n), 1), (pairs(a) + pairs(b)) / 2
    ari = (pairs(table) - chance) / (limit - chance) if limit != chance else 1.
    return {"acc": float((match[np.asarray(assignments)] == np.asarray(labels)).mean()),
            "nmi": float(nmi), "ari": float(ari), "rule": rule, "clusters": int((b > 0).sum())}


@torch.no_grad()
def kmeans(features, k, seed, restarts=20, iterations=100):
    """k-means of L2-normalised features with k-means++ starts; the best of several restarts.

    features (N, D), any device. -> (assignments (N,), centroids (K, D)). An empty cluster takes the
    point farthest from its centroid. Raises UserError when k > N."""
    x = F.normalize(features.float(), dim=1)
    n, best = len(x), (math.inf, None, None)
    if k > n:
        raise UserError(f"{k} clusters of {n} images: there are more clusters than images")
    uniform = torch.rand(restarts, k, generator=generator(seed, 0, "kmeans")).tolist()
    for first, *others in uniform:
        centre = x[int(first * n)][None]
        nearest = (2 - 2 * x @ centre[0]).clamp_(min=0)            # squared, of unit vectors
        for u in others:                                           # the next: probability ~ d^2
            cumulative = nearest.double().cumsum(0)
            pick = torch.searchsorted(cumulative, u * cumulative[-1:]).clamp_(max=n - 1)
            centre = torch.cat([centre, x[pick]])
            nearest = torch.minimum(nearest, (2 - 2 * x @ x[pick[0]]).clamp_(min=0))
        inertia = math.inf
        for _ in range(iterations):
            assignment, distance = nearest_centroid(x, centre)     # |x| = 1
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
    """Unit vectors x (N, D), any centre (K, D) -> (nearest (N,), squared distance to it (N,))"""
    parts = [torch.addmm(centre.square().sum(1), part, centre.t(), alpha=-2).min(1)
             for part in x.split(chunk)]
    distance = torch.cat([p.values for p in parts]) + 1
    return torch.cat([p.indices for p in parts]), distance.clamp_(min=0)


@torch.no_grad()
def knn_accuracy(bank, bank_labels, queries, labels, k=200, tau=.1, leave_one_out=False):
    """Weighted kNN: each of the k most similar bank images votes exp(cosine / tau) for its class.

    bank (N, D), queries (M, D) features, bank_labels (N,), labels (M,); k is lowered to the mean
    class size of a small bank. leave_one_out: the queries are the bank, and none votes for itself.
    -> accuracy in [0, 1]"""
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    bank_labels, labels = bank_labels.to(bank.device), labels.to(bank.device)
    classes = int(bank_labels.max()) + 1
    k = max(1, min(k, len(bank) // classes, len(bank) - 1))
    hits = torch.zeros((), device=bank.device)
    for rows in torch.arange(len(queries), device=bank.device).split(2048):
        similarity = queries[rows] @ bank.t()
        if leave_one_out:
            similarity[rows - rows[0], rows] = -2
        value, index = similarity.topk(k, 1)
        votes = torch.zeros(len(value), classes, device=bank.device)
        votes.scatter_add_(1, bank_labels[index], (value / tau).exp())
        hits += (votes.argmax(1) == labels[rows]).sum()
    return hits.item() / len(queries)


def linear_probe(features, labels, test_features, seed):
    """Logistic regression on frozen, standardised features, by L-BFGS. The weight decay is chosen
    on a fifth of the training features that is held out; then all of them are used.

    features (N, D), labels (N,), test_features (M, D) -> predicted classes (M,) on the CPU"""
    labels = labels.to(features.device)
    mean, std = features.mean(0), features.std(0).clamp_(min=1e-6)
    x, t = (features - mean) / std, (test_features - mean) / std

    def fit(x, y, decay):
        w = x.new_zeros(x.shape[1] + 1, int(labels.max()) + 1).requires_grad_()
        solver = torch.optim.LBFGS([w], max_iter=100, tolerance_grad=1e-5,
                                   line_search_fn="strong_wolfe")

        def closure():
            solver.zero_grad()
            loss = F.cross_entropy(x @ w[1:] + w[0], y) + decay * w[1:].square().sum()
            loss.backward()
            return loss
        solver.step(closure)
        return w.detach()

    def predict(w, x):
        return (x @ w[1:] + w[0]).argmax(1)

    def held_out_hits(decay):
        return (predict(fit(x[kept], labels[kept], decay), x[held]) == labels[held]).sum().item()
    order = torch.randperm(len(x), generator=generator(seed, 0, "probe")).to(x.device)
    held, kept = order[:len(x) // 5], order[len(x) // 5:]
    decay = max((1e-2, 1e-3, 1e-4, 1e-5), key=held_out_hits)
    return predict(fit(x, labels, decay), t).cpu()


class Clustering(NamedTuple):
    train: torch.Tensor                   # (N,) cluster of each training image
    test: torch.Tensor                    # (M,) of each test image; the same without a test split
    train_confidence: torch.Tensor        # in [0, 1]
    test_confidence: torch.Tensor


def evaluate(train_features, test_features, data, clusters, seed, index=None, probe=True,
             restarts=20):
    """The standard scores of frozen features (N, D) and (M, D). -> (scores, Clustering by k-means)

    k-means is fitted on train_features[index], the images learned from (None: all), and applied to
    both splits; its confidence is softmax(cosine to the centroids / 0.1). kNN and the linear probe
    use all labelled training images. protocol() says it in words.
    probe=False leaves the linear probe out; restarts: of k-means."""
    fit = train_features if index is None else train_features[index.to(train_features.device)]
    centre = F.normalize(kmeans(fit, clusters, seed, restarts)[1], dim=1)
    p = [(F.normalize(x, dim=1) @ centre.t() / .1).softmax(1).max(1)
         for x in (train_features, test_features)]
    found = Clustering(*(q.indices.cpu() for q in p), *(q.values.cpu() for q in p))
    if data.test.labels is None:
        return {}, found
    seen = data.train.labels >= 0
    y, bank = data.train.labels[seen], train_features[seen.to(train_features.device)]
    target, held = data.test.labels, test_features
    over = data.has_test and clusters > len(data.classes)
    vote_from = (y, found.train[seen]) if over else None
    scores = {"kmeans": cluster_scores(target, found.test, vote_from),
              "knn": knn_accuracy(bank, y, held, target, leave_one_out=not data.has_test)}
    if probe and len(y) >= 10:                                     # a fifth is held out, twice
        if not data.has_test:                                      # never on what it was fitted on
            order = torch.randperm(len(y), generator=generator(seed, 0, "halves"))
            a, b = order[len(y) // 5:], order[:len(y) // 5]
            bank, y, held, target = bank[a], y[a], bank[b], y[b]
        right = (linear_probe(bank, y, held, seed) == target).float()
        per_class = [right[target == c] for c in range(len(data.classes))]
        scores["linear"] = right.mean().item()
        scores["linear_per_class"] = [r.mean().item() if len(r) else None for r in per_class]
    return scores, found


def protocol(data):
    """For each score: fitted on what, scored on what."""
    n, m = len(data.train.images), len(data.test.images)
    if data.has_test:
        return {"k-means": f"fitted on L2-normalised train features, scored on test ({m:,} images)",
                "kNN": f"weighted, k 200, tau 0.1, bank train, scored on test ({m:,} images)",
                "linear": f"logistic regression on frozen features of train, scored on test "
                          f"({m:,} images)",
                "epoch": "the last"}
    return {"k-means": f"fitted and scored on the same {n:,} images (no test split)",
            "kNN": "weighted, k 200, tau 0.1, each image by all the others (no test split)",
            "linear": "logistic regression fitted on a random 80 %, scored on the other 20 % (no "
                      "test split)",
            "epoch": "the last"}


def pixel_features(images, device):
    """Raw pixels, shrunk to 32 px. (N, 3, H, W) uint8 -> (N, 3 * 32 * 32) float"""
    parts = [fetch(images, part, device) for part in torch.arange(len(images)).split(4096)]
    return torch.cat([(F.adaptive_avg_pool2d(p, 32) if p.shape[-1] > 32 else p).flatten(1)
                      for p in parts]).sub_(.5)


def baselines(data, untrained, statistics, clusters, seed, index, device):
    """What any score must be held against: {'raw pixels': scores, 'random network': scores}"""
    table = {}
    for name, features in (("raw pixels", lambda x: pixel_features(x, device)),
                           ("random network", lambda x: embed(untrained, x, statistics, device))):
        train = features(data.train.images)
        test = features(data.test.images) if data.has_test else train
        raw = {"probe": False, "restarts": 5} if name == "raw pixels" else {}   # 3,072 dimensions
        table[name] = evaluate(train, test, data, clusters, seed, index, **raw)[0]
    return table


def print_scores(table, data):
    """table {name: scores of evaluate or of cluster_scores} as aligned lines, and the protocol."""
    print(f"\n{'':24}{'ACC':>8}{'NMI':>8}{'ARI':>8}{'kNN':>8}{'linear':>8}")
    for name, scores in table.items():
        of = scores.get("kmeans", scores)
        cells = [of.get(s) for s in ("acc", "nmi", "ari")]
        cells += [scores.get("knn"), scores.get("linear")]
        print(f"{name:24}" + "".join(f"{'-' if c is None else f'{c:.3f}':>8}" for c in cells)
              + ("   majority vote" if of.get("rule") == "majority vote" else ""))
    print("".join(f"  {score}: {words}\n" for score, words in protocol(data).items()), end="")


def print_row(name, scores):
    """One line: the scores of a clustering."""
    print(f"{name}: ACC {scores['acc']:.3f}  NMI {scores['nmi']:.3f}  ARI {scores['ari']:.3f}  "
          f"({scores['rule']})")


# ------------------------------------------------------------------------------------------------
# 8. Run folder. Nothing is lost: a file is complete before it gets its name.

@contextlib.contextmanager
def replacing(path):
    """The name of a temporary file beside path: renamed to it at the end, removed on a failure."""
    temporary = Path(path).with_name(Path(path).name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_atomically(path, state, keep=None):
    """torch.save, fsync, rename. keep: where the file that was there before goes."""
    with replacing(path) as temporary:
        with open(temporary, "wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:                          # of a full disk torch's writer
                raise error.__context__ or error                   # tells only what followed
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and Path(path).exists():
            os.replace(path, keep)


def load_checked(path):
    """What save_atomically wrote. Raises Damaged: torch.load alone does not notice a flipped bit,
    the checksums of the zip archive do. Only tensors and plain values are ever unpickled."""
    try:
        with zipfile.ZipFile(path) as archive:
            # Checksums do not cover the attributes: torch takes bit 0x10 for "a folder" and
            # returns uninitialised memory.
            broken = archive.testzip() or next(
                (entry.filename for entry in archive.infolist() if entry.external_attr), None)
        if broken:
            raise Damaged(f"{path}: {broken} fails its checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except (OSError, zipfile.BadZipFile, RuntimeError, EOFError, ValueError, KeyError, IndexError,
            NotImplementedError, zipfile.zlib.error, pickle.UnpicklingError) as error:
        raise Damaged(f"{path}: {_one_line(error)}") from None


def read_backbone(path, backbone, args, data):
    """-> weights for `backbone` from a backbone.pt. Strict: a tensor that is missing, left over or
    of another shape is refused, and so is another dataset. Weights that silently stay random are a
    known accident."""
    try:
        weights = load_checked(path)
        about = Path(path).with_name("result.json")
        made = json.loads(about.read_text()) if about.exists() else None
    except (OSError, Damaged, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    weights = weights if isinstance(weights, dict) else {}
    shapes = {k: tuple(getattr(v, "shape", ())) for k, v in weights.items()}
    own = {k: tuple(v.shape) for k, v in backbone.state_dict().items()}
    wrong = [k for k in {**own, **shapes} if own.get(k) != shapes.get(k)]
    if wrong:
        there, here = (s.get(wrong[0], "absent") for s in (shapes, own))
        raise UserError(f"{path}: {len(wrong)} tensors do not fit, {wrong[0]} is {there}, here "
                        f"{here}; is it a backbone.pt of the same --width?")
    mine = {"dataset": data.name, "stem_stride": args.stem_stride, "image_size": args.image_size}
    for key, value in mine.items() if made else ():                # what the shapes cannot show
        theirs = made["dataset"] if key == "dataset" else made["settings"].get(key)
        if theirs != value:
            raise UserError(f"{path}: it was made with --{key.replace('_', '-')} {theirs}, not "
                            f"{value}")
    print(f"backbone: all {len(weights)} tensors of {path} fit" + (
        f", made by {made['method']}" if made else "; no result.json beside it tells its dataset"))
    return weights


def write_text(path, text):
    """Write a small file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")


def on_cpu(state):
    """A copy of nested state whose tensors lie on the CPU and never change again. Anything but
    tensors and plain values is refused: it would not load again with weights_only."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: on_cpu(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [on_cpu(value) for value in state]
    if type(state) not in (int, float, str, bool, type(None)):
        raise TypeError(f"a checkpoint holds tensors and plain values, not {type(state)}")
    return state


class Run:
    """The folder of a run. Used as a context: whatever ends the run, its finished epochs are kept.

        with Run(args, "identitize", data) as run:
            saved = run.load()                     # None at a new start
            for epoch in range(run.epoch, args.epochs):
                ...
                run.end_epoch({"loss": ...}, images, clock, optimizer, {"net": net.state_dict()})
            run.finish(scores, backbone, found)

    epochs: how many there are in all, where a method has more than args.epochs."""
    FORMAT = 1
    FREE = ("resume", "out", "device", "data_dir", "compile")             # may change on resuming

    def __init__(self, args, method, data, epochs=None):
        self.args, self.method, self.data = args, method, data
        self.epochs = epochs or args.epochs
        self.folder = Path(args.out or f"runs/{method}-{data.name}-seed{args.seed}")
        self.settings = {"method": method,
                         **{k: v for k, v in vars(args).items() if k not in self.FREE},
                         "images": data.fingerprint}
        self.epoch, self.log, self.pending = 0, [], None
        self.seconds = 0.                                          # of training, all parts together
        self.saved_at, self.save_seconds, self.ended = time.time(), 0., time.time()
        self.current = self.folder / "checkpoint.pt"
        self.previous = self.folder / "checkpoint.previous.pt"
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--out {self.folder}: a file, not a folder")
        kept = [f for f in (self.current, self.previous) if f.exists()]
        held = [name for name in ("log.jsonl", "result.json", "backbone.pt")
                if (self.folder / name).exists()]
        if (kept or held) and not args.resume:
            raise UserError(f"{self.folder} already holds a run: continue it with --resume, or "
                            f"choose another folder with --out")
        self.saved = self._read(kept) if kept else None
        if args.resume and self.saved is None:
            print(f"{self.folder} holds no checkpoint yet: starting from the beginning")

    def _read(self, kept):
        """The newest good checkpoint, if it is of a run with these settings."""
        self.damaged = None
        for path in kept:
            try:
                saved = load_checked(path)
                break
            except Damaged as error:
                self.damaged = path
                print(f"WARNING: {error}; falling back to the one before it", file=sys.stderr)
        else:
            raise UserError(f"{self.folder}: no good checkpoint is left; choose another folder "
                            f"with --out")
        if not isinstance(saved, dict) or saved.get("format") != self.FORMAT:
            raise UserError(f"{path}: not a checkpoint of this version of {self.method}.py")
        theirs = saved["settings"]
        for key in [*self.settings, *(k for k in theirs if k not in self.settings)]:
            mine = self.settings.get(key)
            if key == "dataset" and theirs.get("images") == self.data.fingerprint:
                continue                                           # the same, spelt otherwise
            if theirs.get(key) != mine:
                flag = {"method": "the method", "images": "other images,"}.get(
                    key, "--" + key.replace("_", "-"))
                raise UserError(f"{self.folder} was made with {flag} {theirs.get(key)}, not "
                                f"{mine}: give the same, or choose another folder with --out")
        return saved

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("checkpoint.pt", "log.jsonl", "backbone.pt", "result.json", "clusters.csv"):
            (self.folder / f"{name}.tmp").unlink(missing_ok=True)  # --out may hold others' files
        if self.saved and self.damaged:                            # never moved over the good one
            self.damaged.unlink(missing_ok=True)
        if self.saved:
            self.epoch, self.log = self.saved["epoch"], self.saved["log"]
            self.seconds = self.saved["seconds"]
            print(f"resuming {self.folder} after epoch {self.epoch}")
        write_text(self.folder / "log.jsonl", "".join(json.dumps(r) + "\n" for r in self.log))
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
        self.epoch, self.seconds = self.epoch + 1, self.seconds + seconds
        group = optimizer.param_groups[0]
        self.log = self.log + [{
            "epoch": self.epoch, **record, "lr": group["lr"] / group.get("factor", 1),
            "images_per_second": images / seconds, "seconds": seconds,
            "views_share": views / seconds}]
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(self.log[-1]) + "\n")
        recent = [r["seconds"] for r in self.log[-5:]]
        left = clock_text(sum(recent) / len(recent) * (self.epochs - self.epoch))
        values = "  ".join(f"{k.replace('_', ' ')} {f'{v:.3g}' if isinstance(v, float) else v}"
                           for k, v in record.items())
        print(f"epoch {self.epoch:>{len(str(self.epochs))}}/{self.epochs}  {values}  "
              f"{images / seconds:,.0f} images/s  {left} left", flush=True)
        self.pending = {"format": self.FORMAT, "settings": self.settings, "epoch": self.epoch,
                        "seconds": self.seconds, "log": on_cpu(self.log), "state": on_cpu(state)}
        if time.time() - self.saved_at >= 20 * self.save_seconds:
            self.flush()
        self.ended = time.time()

    def flush(self):
        """Write the state of the last finished epoch, if it is not on disk yet."""
        if self.pending is not None:
            began = time.time()
            save_atomically(self.current, self.pending, keep=self.previous)
            self.pending, self.saved_at = None, time.time()
            self.save_seconds = self.saved_at - began

    def __exit__(self, kind, error, trace):
        try:
            self.flush()
        except KeyboardInterrupt:                                  # the second Ctrl-C
            raise KeyboardInterrupt("interrupted while saving; --resume continues after the "
                                    "checkpoint before") from None

    def finish(self, scores, backbone, found, **more):
        """The end of a run: result.json, backbone.pt, clusters.csv, prototypes.png and, with
        labels, confusion.png, without them a contact sheet for each cluster.

        scores: {name: scores}; found: the Clustering to write; more: entries of result.json"""
        self.flush()
        save_atomically(self.folder / "backbone.pt", on_cpu(backbone.state_dict()))
        device = next(backbone.parameters()).device
        result = {"method": self.method, "dataset": self.data.name, "scores": scores, **more,
                  "protocol": protocol(self.data), "epochs": self.epoch,
                  "training_seconds": round(self.seconds, 1), "command": " ".join(sys.argv),
                  "settings": self.settings,
                  "device": torch.cuda.get_device_name() if device.type == "cuda" else
                  f"CPU, {torch.get_num_threads()} threads",
                  "versions": {"python": sys.version.split()[0], "torch": torch.__version__,
                               "torchvision": torchvision.__version__}}
        write_text(self.folder / "result.json", json.dumps(result, indent=1) + "\n")
        table = io.StringIO(newline="")
        rows = csv.writer(table, lineterminator="\n")
        rows.writerow(["image", "cluster", "confidence"])
        parts = [(self.data.train, found.train, found.train_confidence)]
        if self.data.has_test:
            parts.append((self.data.test, found.test, found.test_confidence))
        for split, cluster, sure in parts:
            rows.writerows((name, c, f"{p:.4f}") for name, c, p in
                           zip(split.names, cluster.tolist(), sure.tolist()))
        write_text(self.folder / "clusters.csv", table.getvalue())
        save_cluster_pictures(self.folder, self.data, found)
        if not self.data.classes:
            save_sheets(self.folder, self.data, found, self.args.clusters)
        views = sum(r["seconds"] * r["views_share"] for r in self.log) / max(self.seconds, 1e-9)
        print(f"\n{clock_text(self.seconds)} of training, {views:.0%} of it making views, and "
              f"{clock_text(time.time() - self.ended)} for the report. {self.folder} holds "
              f"{', '.join(sorted(f.name for f in self.folder.iterdir()))}")


# ------------------------------------------------------------------------------------------------
# 9. Pictures

def save_picture(path, image):
    """A PIL image as PNG, written atomically."""
    with replacing(path) as temporary:
        image.save(temporary, "PNG")


def grid(images, columns, side=48):
    """(N, 3, H, W) uint8, or float in [0, 1] -> one PIL image, row by row, each `side` px wide"""
    images = images.cpu().float() / (255 if images.dtype == torch.uint8 else 1)
    larger = side >= images.shape[-1]
    images = F.interpolate(images, (side, side), mode="nearest" if larger else "area")
    sheet = torchvision.utils.make_grid(images, nrow=columns, padding=2, pad_value=1)
    return Image.fromarray((sheet.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def heatmap(matrix, rows=None, columns=None, title="", limit=None):
    """A matrix as a PIL image, from blue (-limit) over white (0) to red (limit, by default the
    largest absolute value), with names of rows and columns."""
    m = np.asarray(matrix, np.float64)
    v = np.clip(m / (limit or max(np.abs(m).max(), 1e-12)), -1, 1)
    colour = np.stack([1 - .85 * np.clip(-v, 0, 1), 1 - .8 * np.abs(v),
                       1 - .85 * np.clip(v, 0, 1)], -1)
    cell, top, font = max(2, 320 // max(m.shape)), 24, ImageFont.load_default(12)
    pixels = (colour.repeat(cell, 0).repeat(cell, 1) * 255).round().astype(np.uint8)
    left, below = (int(max(font.getlength(str(n)) for n in names)) + 8 if names else 2
                   for names in (rows, columns))
    height, width = pixels.shape[:2]
    sheet = Image.new("RGB", (max(left + width, int(font.getlength(title)) + 4) + 2,
                              top + height + below), "white")
    sheet.paste(Image.fromarray(pixels), (left, top))
    pen = ImageDraw.Draw(sheet)
    pen.text((2, 4), title, fill="black", font=font)
    pen.rectangle((left - 1, top - 1, left + width, top + height), outline="grey")
    for i, name in enumerate(rows or []):
        at = (left - 4, top + (i + .5) * cell)
        pen.text(at, str(name), fill="black", font=font, anchor="rm")
    for j, name in enumerate(columns or []):                       # written upwards
        label = Image.new("RGB", (below, 14), "white")
        ImageDraw.Draw(label).text((below - 4, 7), str(name), fill="black", font=font, anchor="rm")
        sheet.paste(label.rotate(90, expand=True),
                    (int(left + (j + .5) * cell - 7), top + height + 1))
    return sheet


def beside(*pictures):
    """PIL images in a row on white."""
    size = sum(p.width + 8 for p in pictures) - 8, max(p.height for p in pictures)
    sheet, x = Image.new("RGB", size, "white"), 0
    for picture in pictures:
        sheet.paste(picture, (x, 0))
        x += picture.width + 8
    return sheet


def save_views(path, raw, views, statistics, count=8):
    """What the network was fed: a column for each image, the raw one on top, its views below."""
    mean, std = (s.to(raw.device) for s in statistics)
    rows = [raw[:count]] + [view[:count].float() * std + mean for view in views]
    save_picture(path, grid(torch.cat(rows), min(count, len(raw)), side=64))


def prototypes(split, assignments, confidence, cluster, count=10):
    """The most confident images of a cluster, (count, 3, H, W) uint8, filled up with white."""
    members = (assignments == cluster).nonzero().flatten()
    best = members[confidence[members].argsort(descending=True, stable=True)[:count]]
    row = torch.full((count, *split.images.shape[1:]), 255, dtype=torch.uint8)
    row[:len(best)] = split.images[best]
    return row


def save_cluster_pictures(folder, data, found):
    """prototypes.png: the ten most confident images of each cluster, a row each, up to 40 clusters.
    confusion.png, where there are labels: each class's share in each cluster."""
    split, clusters = data.test, int(max(found.train.max(), found.test.max())) + 1
    rows = [prototypes(split, found.test, found.test_confidence, c)
            for c in range(min(clusters, 40))]
    save_picture(folder / "prototypes.png", grid(torch.cat(rows), 10))
    if split.labels is not None and clusters <= 200:
        table = contingency(split.labels, found.test, len(data.classes), clusters)
        order = np.lexsort((-table.max(0), table.argmax(0)))       # clusters beside their class
        share = table[:, order] / table.sum(1, keepdims=True).clip(1)
        save_picture(folder / "confusion.png", heatmap(
            share, rows=data.classes if len(data.classes) <= 32 else None, limit=1,
            columns=order.tolist() if clusters <= 32 else None,
            title="share of each class (row) in each cluster (column)"))


def save_sheets(folder, data, found, clusters):
    """For images without labels: sheets/cluster-*.png, the hundred most confident training images
    of each cluster, and summary.txt, how balanced and how confident the clusters are, printed too.
    There is nothing to score them by."""
    sure, lines = found.train_confidence, ["cluster  images   share  mean confidence"]
    size = torch.bincount(found.train, minlength=clusters)
    share = size / size.sum()
    (folder / "sheets").mkdir(exist_ok=True)
    for c in range(clusters):
        members = (found.train == c).nonzero().flatten()
        members = members[sure[members].argsort(descending=True, stable=True)]
        mean = f"{sure[members].mean():.2f}" if len(members) else "-"
        lines.append(f"{c:7}{len(members):8,}{share[c]:8.1%}{mean:>17}")
        if len(members):
            picture = grid(data.train.images[members[:100]], min(10, len(members)), 96)
            save_picture(folder / "sheets" / f"cluster-{c:03}.png", picture)
    lines += ["", f"Balance: of {len(sure):,} images the largest cluster holds {share.max():.0%}, "
              f"the smallest {share.min():.1%}; {(size == 0).sum()} of {clusters} are empty. As "
              f"even as {torch.special.entr(share).sum().exp():.1f} equal ones. If your groups "
              f"are of unequal size, take more --clusters and merge by eye.",
              f"Confidence: {(sure > .9).float().mean():.0%} of the images are above .9, "
              f"{(sure < .5).float().mean():.0%} below .5. It says how decided, not how right.",
              f"Look at {folder / 'sheets'}, then at {folder / 'clusters.csv'}."]
    write_text(folder / "summary.txt", "\n".join(lines) + "\n")
    print("\n" + "\n".join(lines))
