"""What the four scripts share. Whatever a paper describes stands in the script of that paper.

     1. Failing well      one clear line instead of a traceback; the flags that all scripts share
     2. Randomness        one generator for each (seed, epoch, purpose); the device
     3. Data              the whole dataset as one uint8 tensor on the device
     4. Folders           the user's own images: which are classes, how they become pixels
     5. Views             batched augmentations; each image has its own random draw
     6. Backbone          torchvision's ResNet-18 with the right stem for the image size
     7. Training          learning rate, batches, means of the loss terms
     8. Evaluation        clusters, k-means, kNN, linear probe
     9. Run folder        log, checkpoints, result
    10. Pictures          clusters.csv, grids of images, matrices, curves

Shapes: N images, B of a batch, H x W pixels, D feature dimensions, K clusters, C classes.
"""
import argparse
import atexit
import contextlib
import copy
import csv
import difflib
import hashlib
import io
import json
import math
import os
import pickle
import re
import shlex
import signal
import socket
import sys
import time
import unicodedata
import warnings
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from scipy.optimize import linear_sum_assignment, minimize
from scipy.special import comb
from scipy.stats import entropy
from torch import nn
from torchvision.models.resnet import BasicBlock
from torchvision.transforms.functional import rgb_to_grayscale as grey

# ------------------------------------------------------------------------------------------------
# 1. Failing well, and the flags that all scripts share

class UserError(Exception):
    """Something the user can put right: shown as one line, exit code 2."""
    code = 2


class NotFinite(UserError):
    code = 1                              # a loss term or a weight became NaN or infinite


class Finished(UserError):
    code = 0                              # there is nothing left to do


class Damaged(Exception):
    """A file is not what was written."""


def run_script(train, args):
    """Call train(args). An expected failure becomes one line and an exit code: 2 for what the user
    can put right, 1 for what the machine or the numbers did, 128 + n for signal n."""
    before = {}

    def stop(number, _):
        for sign in before:                # a second one must not interrupt what the first began
            signal.signal(sign, signal.SIG_IGN)
        raise KeyboardInterrupt(number)
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        with contextlib.suppress(AttributeError, ValueError):      # Windows; not the main thread
            sign = getattr(signal, name)
            if signal.getsignal(sign) != signal.SIG_IGN:           # nohup
                before[sign] = signal.signal(sign, stop)
                atexit.register(signal.signal, sign, signal.SIG_IGN)    # Python's end takes seconds
    with contextlib.suppress(AttributeError):                      # a notebook's streams lack it
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="backslashreplace")          # letters the terminal lacks
    try:
        result = train(copy.copy(args))
        print(end="", flush=True)                                  # a full disk shows here
        return result
    except BaseException as error:
        code, line = 1, str(error)
        if isinstance(error, UserError):
            code = error.code
        elif isinstance(error, KeyboardInterrupt):                 # Ctrl-C gives no number: 2
            code, line = 128 + (error.args or (2,))[0], "interrupted"
        elif isinstance(error, (MemoryError, torch.OutOfMemoryError)) or \
                "can't allocate memory" in line:                   # on a CPU a RuntimeError
            line = "out of memory: lower --batch-size, --width or --image-size"
        elif isinstance(error, OSError):                           # a full disk
            line = f"the machine refused a file: {one_line(error)}"
        elif type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            line = f"torch.compile fails here, leave out --compile: {one_line(error)}"
        else:
            raise
        line += getattr(error, "resume", "")                       # set by a Run: how to go on
        try:
            print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr if code else sys.stdout)
            print(end="", flush=True)
        except OSError:                    # "| head" has ended, or the disk is full: say no more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = code or 1
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)
    if code:
        raise SystemExit(code)


class Parser(argparse.ArgumentParser):
    """argparse with the flags that all scripts share. A wrong argument is answered by one line.
    A script adds its own flags with training(...) and method(...)."""

    def __init__(self, doc, epochs):
        super().__init__(description=(doc or "").split("\n")[0], allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                         epilog="Defaults are those of --dataset; of shapes where it is not given.")
        add = self.add_argument_group("what most people need").add_argument
        add("--dataset", default="shapes", help=f"{', '.join(NAMES)}, or a folder of images")
        add("--clusters", type=number(int, 2), help="how many to look for; else as many as classes")
        add("--epochs", type=number(int, 1), default=epochs, help="passes over data (SCAN: step 1)")
        add("--out", help="run folder; else runs/<method>-<dataset>-seed<seed>")
        add("--resume", action="store_true", help="continue the run in that folder")
        group = self.add_argument_group("where and on what")
        add, either = group.add_argument, group.add_mutually_exclusive_group().add_argument
        add("--data-dir", default="data", help="downloads, decoded images; where ImageNet is")
        add("--classes", metavar="FILE", help="the class folders to keep, a name a line")
        either("--unlabelled", action="store_true", help="folders (e.g. years) are no classes")
        either("--labelled", action="store_true", help="leave out images beside class folders")
        add("--image-size", type=number(int, 8, 1024), help="side in pixels; else the dataset's")
        add("--fit", choices=("crop", "pad", "squeeze"), default="crop", help="how to get a square")
        add("--train-size", type=number(int, 2), help="learn from so many, equally of each class")
        add("--width", type=number(int, 16, 512), default=64, help="channels of the first stage")
        add("--stem-stride", type=number(int, 1, 2), default=1, help="2: faster, for up to 128 px")
        add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of everything random")
        add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
        add("--compile", action="store_true", help="torch.compile: slow to start")
        self.training = self.add_argument_group("training").add_argument
        self.method = self.add_argument_group("the method").add_argument

    def parse(self, argv, defaults):
        """The arguments. defaults: {dataset: {flag: value}}, those that differ from the flags' own
        defaults; 'folder' stands for any path."""
        name = given(argv).get("--dataset", "shapes")              # also for --help
        self.set_defaults(**defaults.get(name if name in NAMES else "folder", {}))
        args = self.parse_args(argv if argv is None else [*map(str, argv)])
        for flag, value in vars(args).items():
            if isinstance(value, str):
                if not value.strip() or "\0" in value:             # of an unset shell variable
                    self.error(f"--{flag.replace('_', '-')}: {value!r} is no value")
                setattr(args, flag, os.path.expanduser(value))     # the shell leaves --out=~/x
        return args

    def format_help(self):                                         # without empty defaults
        return re.sub(r"\s+\(default:\s+(None|False)\)", "", super().format_help())

    def error(self, message):
        self.exit(2, f"{self.prog}: {one_line(message)} (--help lists every flag)\n")

    def note(self, message):
        with contextlib.suppress(OSError):                         # run_script will meet it again
            print(f"note: {message}")


def given(argv):
    """The flags that were typed, and what follows each: {'--epochs': '3', '--resume': '', ...}.
    argv: a list; None: the command line"""
    words = []
    for part in map(str, sys.argv[1:] if argv is None else argv):
        words += part.split("=", 1) if part.startswith("--") else [part]
    return {flag: value for flag, value in zip(words, [*words[1:], ""]) if flag.startswith("--")}


def number(kind, low, high=2**31, above=False):
    """An argparse type: an int or a float from low (above=True: more than low) to high."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan                                       # fails every comparison
        if low < value <= high or (value == low and not above):
            return value
        limit = f"more than {low}" if above else f"at least {low}"
        if value > high:
            limit = f"at most {high}"
        noun = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {noun} of {limit}")
    return convert


def progress(what, done, total, started):
    """A live line, rewritten in place; on a terminal only, so that log files stay readable."""
    if sys.stdout and sys.stdout.isatty():
        left = duration((time.time() - started) * (total - done) / done)
        line = f"  {what} {done:,}/{total:,}, {left} left" if done < total else ""
        print(f"\r{line:78}", end="" if line else "\r", flush=True)


def duration(seconds):
    return str(timedelta(seconds=round(seconds)))                  # 75 -> '0:01:15'


def one_line(text):
    """A path or what an exception says, as one printable line."""
    if isinstance(text, BaseException):
        text = (str(text).splitlines() or [type(text).__name__])[0]
    text = os.fsencode(text).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


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
        fast = any(getattr(torch.cpu, question, bool)() for question in    # bool() is False
                   ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return torch.bfloat16 if fast else torch.float32


def autocast(device):
    """For networks and other large products: bfloat16 where that is fast; weights stay float32.
    Losses are computed outside it, in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=fast_dtype(device) == torch.bfloat16)


# ------------------------------------------------------------------------------------------------
# 3. Data: the whole dataset is one uint8 tensor on the device, without DataLoader and workers.
#    CIFAR takes 0.15 GB, Tiny-ImageNet 1.2 GB, STL-10 with its unlabelled images 2.9 GB.

class Split(NamedTuple):
    images: torch.Tensor                  # (N, 3, H, W) uint8
    labels: Optional[torch.Tensor]        # (N,) int64, -1 where unknown; None: no labels at all
    names: list                           # N strings: the path of a file, or 'train/17'
    features: Optional[torch.Tensor] = None       # (N, D), where a frozen network made them


class Dataset(NamedTuple):
    name: str                             # usable in the name of a folder
    train: Split
    test: Split                           # the train split itself where there is no other
    classes: Optional[list]               # C names; None: unlabelled
    fingerprint: str                      # a hash of the training pixels
    decoding: dict = {}                   # how files were read: the arguments of decode()

    @property
    def has_test(self):
        return self.test is not self.train


NAMES = ("shapes", "cifar10", "cifar100", "cifar20", "fashion-mnist", "stl10", "tiny-imagenet",
         "imagenet10", "imagenet-dogs")
IN_MEMORY = {"shapes", "cifar10", "cifar100", "cifar20", "fashion-mnist", "stl10"}  # others: files
NEEDS_NOTHING = "or use --dataset shapes, which needs nothing"
SUBSETS = {                               # of ImageNet, in the clustering literature
    "imagenet10": "n02056570 n02085936 n02128757 n02690373 n02692877 n03095699 n04254680 n04285008 "
                  "n04467665 n07747607".split(),
    "imagenet-dogs": "n02085936 n02086646 n02088238 n02091467 n02097130 n02099601 n02101388 "
                     "n02101556 n02102177 n02105056 n02105412 n02105855 n02107142 n02110958 "
                     "n02112137".split()}


def load_dataset(name, data_dir="data", image_size=None, **options):
    """A dataset by name, or a folder of images by path. -> Dataset, on the CPU

    data_dir: for downloads and decoded images; for imagenet10 and imagenet-dogs ImageNet itself.
    image_size: side in pixels; None: the dataset's own. options: see _folder and read_files. Raises
    UserError for an unknown name, an unusable folder, a failed download."""
    data_dir, folder = Path(data_dir), Path(os.path.expanduser(name))
    narrowed = [flag for flag in ("classes", "unlabelled", "labelled") if options.get(flag)]
    if name in IN_MEMORY and narrowed:
        raise UserError(f"--{narrowed[0]} is for folders of images, not for {name}")
    if name == "shapes":
        data = _shapes(image_size or 32)
    elif name == "tiny-imagenet":
        place = data_dir / "tiny-imagenet-200"
        data = _folder(place, data_dir, image_size or 64, name, **options)
    elif name in SUBSETS:
        data = _folder(data_dir, data_dir, image_size or 224, name, SUBSETS[name], **options)
    elif name in NAMES:
        data = _torchvision(name, data_dir, image_size)
    elif name and os.path.isdir(folder):
        data = _folder(folder, data_dir, image_size, **options)
    else:
        near = difflib.get_close_matches(name.lower(), NAMES, 1)
        near = f" did you mean {near[0]}?" if near else ""
        near = " that is a file, not a folder." if os.path.isfile(folder) else near
        raise UserError(f"--dataset {one_line(name)}:{near} It is one of {', '.join(NAMES)}, or "
                        f"the path of a folder of images")
    return data._replace(fingerprint=look_over(data))


def look_over(data):
    """Warn of flat images and of copies. -> the fingerprint, a hash of the training pixels"""
    train, test = ([hashlib.blake2b(image, digest_size=16).digest() for image in s.images.numpy()]
                   for s in (data.train, data.test))
    parts, seen = [("training", data.train, train), ("test", data.test, test)], set(train)
    for word, split, found in parts[:1 + data.has_test]:
        n, x, copies = len(found), split.images, len(found) - len(set(found))
        flat = (x.amax((2, 3)) - x.amin((2, 3)) <= 2).all(1).sum().item()
        for count, what in ((flat, "are one flat colour"), (copies, "are copies of others")):
            if count > .1 * n:
                print(f"WARNING: {count:,} of {n:,} {word} images {what}")
    twins = sum(h in seen for h in test) if data.has_test else len(train) - len(seen)
    what = "test images are copies of training images" if data.has_test else \
        "images are copies of others"
    if twins and data.classes:
        print(f"WARNING: {twins:,} of {len(test):,} {what}: kNN is too high")
    return hashlib.sha256(b"".join(train)).hexdigest()[:16]


def _shapes(size, train=5000, test=2000):
    """The embedded dataset, drawn in two seconds: small pictures of ten kinds of shapes. The kind
    is the class; colour, position, size, rotation, background and noise are nuisances, so that
    k-means on the pixels stays near chance. Always the same pictures."""
    rng, n = np.random.default_rng(2025), train + test
    labels = np.arange(n) % len(OUTLINES)

    def uniform(low, high, shape):
        return rng.uniform(low, high, shape).astype(np.float32)
    # A pixel grid in the frame of each shape: centred, rotated up to 20 degrees, unit radius.
    side = (np.arange(size, dtype=np.float32) + .5) / size
    radius, angle = uniform(.30, .42, (n, 1, 1)), uniform(-.35, .35, (n, 1, 1))
    x = (side[None, None, :] - .5 - uniform(-.1, .1, (n, 1, 1))) / radius
    y = (side[None, :, None] - .5 - uniform(-.1, .1, (n, 1, 1))) / radius
    x, y = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    distance = np.empty((n, size, size), np.float32)               # to the outline, negative inside
    for kind, outline in enumerate(OUTLINES.values()):
        rows = labels == kind
        distance[rows] = outline(x[rows], y[rows])
    cover = np.clip(.5 - distance * radius * size, 0, 1)[:, None]  # antialiased over one pixel
    # Colours are independent, but a shape is brighter than its background, by about .25 or more. If
    # some shapes were darker, the clusters found would be pairs (shape, darker or brighter).
    back, fore = uniform(0, .6, (n, 3, 1, 1)), uniform(.3, 1, (n, 3, 1, 1))
    fore += np.clip(.25 - (fore.mean(1) - back.mean(1)), 0, None)[:, None]
    slope = uniform(-.05, .05, (2, n, 3, 1, 1))
    back = back + slope[0] * (side[None, :] - .5) + slope[1] * (side[:, None] - .5)
    image = back + cover * (fore - back)
    image += .04 * rng.standard_normal(image.shape, dtype=np.float32)
    image = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    return _dataset("shapes", image[:train], labels[:train], image[train:], labels[train:],
                    OUTLINES)


def _box(u, v, a, b):
    return np.maximum(np.abs(u) - a, np.abs(v) - b)


def _star(x, y, turn=2 * np.pi / 5):
    a = np.abs((np.arctan2(x, -y) + turn / 2) % turn - turn / 2)   # folded into half a point
    r = np.hypot(x, y)
    return .328 * (r * np.cos(a) - 1) + .945 * r * np.sin(a)       # the edge from tip to notch


def _heart(x, y):
    lobes = np.hypot(np.abs(x) - .42, y + .3) - .48
    return np.minimum(lobes, np.maximum(.74 * np.abs(x) + .67 * y - .6, -y - .3))


# The approximate distance to the outline of a shape of radius 1, negative inside; y points down.
OUTLINES = {
    "disc": lambda x, y: np.hypot(x, y) - .9,
    "square": lambda x, y: _box(x, y, .75, .75),
    "triangle": lambda x, y: np.maximum(y - .6, .866 * np.abs(x) - .5 * y - .5),
    "star": _star,
    "cross": lambda x, y: np.minimum(_box(x, y, .95, .3), _box(x, y, .3, .95)),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - .7) - .22,
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - .95, .75 - np.hypot(x - .45, y)),
    "heart": _heart,
    "bar": lambda x, y: _box(x, y, .95, .3),
    "T": lambda x, y: np.minimum(_box(x, y + .6, .85, .25), _box(x, y - .1, .25, .9))}


def _dataset(name, train_x, train_y, test_x, test_y, classes):
    """Arrays to a Dataset whose images are named by split and index."""
    splits = [Split(torch.as_tensor(x).contiguous(), torch.as_tensor(np.asarray(y)).long(),
                    [f"{split}/{i}" for i in range(len(x))])
              for split, x, y in (("train", train_x, train_y), ("test", test_x, test_y))]
    return Dataset(name, *splits, list(classes), "")


def _torchvision(name, data_dir, image_size):
    """The sets that torchvision downloads and verifies."""
    sets = torchvision.datasets
    kind = {"cifar10": sets.CIFAR10, "cifar100": sets.CIFAR100, "cifar20": sets.CIFAR100,
            "fashion-mnist": sets.FashionMNIST, "stl10": sets.STL10}[name]
    parts = [{"train": True}, {"train": False}]
    if name == "stl10":                                            # 5,000 labelled, 100,000 not
        parts = [{"split": "train+unlabeled"}, {"split": "test"}]
    patience = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(30)
        both = [kind(data_dir, download=True, **part) for part in parts]
    except (OSError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile) as error:
        files = getattr(kind, "filename", "its four .gz files, below FashionMNIST/raw,")
        raise UserError(f"{name} could not be downloaded ({one_line(error)}); put {files} in "
                        f"{data_dir} and start again, {NEEDS_NOTHING}") from None
    finally:
        socket.setdefaulttimeout(patience)
    arrays, classes = [], both[0].classes
    for part, file in zip(both, ("train", "test")):
        x, y = torch.as_tensor(part.data), part.labels if name == "stl10" else part.targets
        if name.startswith("cifar"):                               # (N, H, W, 3)
            x = x.permute(0, 3, 1, 2)
        elif name == "fashion-mnist":                              # grey 28 px, padded to 32
            x = F.pad(x, (2, 2, 2, 2))[:, None].expand(-1, 3, -1, -1)
        if name == "cifar20":                                      # the superclasses of CIFAR-100
            folder = Path(part.root, part.base_folder)             # torchvision checked the files
            y = pickle.loads((folder / file).read_bytes(), encoding="latin1")["coarse_labels"]
            classes = pickle.loads((folder / "meta").read_bytes())["coarse_label_names"]
        arrays += [_resized(x, image_size), y]
    return _dataset(name, *arrays, classes)


def _resized(images, size):
    """(N, 3, H, W) uint8 -> (N, 3, size, size) uint8, antialiased; as it is when size is None."""
    if size is None or images.shape[-1] == size:
        return images
    return torch.cat([F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True)
                      .round_().clamp_(0, 255).byte() for part in images.split(4096)])


def read_data(args, **options):
    """load_dataset with the user's flags; options replace flags or add to them. -> Dataset"""
    options = {"image_size": args.image_size, "classes": args.classes, "fit": args.fit,
               "unlabelled": args.unlabelled, "labelled": args.labelled, "out": args.out, **options}
    return load_dataset(args.dataset, args.data_dir, **options)


def prepare(args, defaults, **options):
    """How every script starts: what can be checked is checked before the run folder is made.

    options: see load_dataset. -> device, Dataset, index (n,) of the training images to learn from,
    number of clusters. Prints the settings that `defaults` chose. Raises UserError for what the
    data cannot give."""
    device, data = pick_device(args.device), read_data(args, **options)
    chosen = defaults.get(args.dataset if args.dataset in NAMES else "folder", {})
    chosen = [f"--{k.replace('_', '-')} {v}" for k, v in chosen.items() if v == getattr(args, k) and
              v is not None]
    if chosen:
        print(f"settings for {data.name}: {' '.join(chosen)}")
    # At 8 px the last stride would act on 1 x 1 positions, where torch's kernel for CPUs fails.
    if args.stem_stride == 2 and data.train.images.shape[-1] <= 8:
        raise UserError("--stem-stride 2 needs more than 8 px: give --stem-stride 1 or a larger "
                        "--image-size")
    index = subset(data.train.labels, len(data.train.images), args.train_size, args.seed)
    if args.clusters is None and data.classes is None:
        raise UserError(f"{data.name} has no labels: say how many clusters, e.g. --clusters 10")
    clusters = args.clusters or len(data.classes)
    for flag, value in (("--batch-size", args.batch_size), ("--clusters", clusters)):
        if value and value > len(index):
            raise UserError(f"{flag} {value}: there are only {len(index):,} training images, give "
                            f"{flag} {len(index)} or less")
    return device, data, index, clusters


def subset(labels, n, size, seed):
    """Indices of the training images to learn from: all n, or `size` of them, equally many of each
    class (any, where labels (N,) is None or has unknown ones). -> (size,) int64, sorted"""
    if size is None:
        return torch.arange(n)
    if size > n:
        raise UserError(f"--train-size {size}: there are only {n:,} training images")
    if labels is None or (labels < 0).any():
        labels = torch.zeros(n, dtype=torch.int64)                 # as if all were of one class
    order, classes = torch.randperm(n, generator=generator(seed, 0, "subset")), labels.max() + 1
    share = [size // classes + (c < size % classes) for c in range(classes)]
    parts = [order[labels[order] == c][:share[c]] for c in range(classes)]
    index = torch.cat(parts).sort().values
    if len(index) < size:
        raise UserError(f"--train-size {size}: one class has only {min(map(len, parts)):,} images")
    return index


def to_device(images, device):
    """Move a uint8 dataset to the device; where it does not fit, it stays in host memory."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
    if images.nbytes > .5 * free:
        print(f"the images ({images.nbytes / 2**30:.1f} GiB) stay in host memory: the device has "
              f"{free / 2**30:.1f} GiB free")
        return images
    return images.to(device)


def fetch(images, index, device):
    """images[index] as float in [0, 1] on the device. images (N, 3, H, W) uint8, index (B,) or
    (B, n) on the CPU."""
    rows = index.flatten().to(images.device, non_blocking=True)
    picked = images.index_select(0, rows)                          # faster than images[rows]
    if images.device.type != device.type:
        picked = picked.pin_memory().to(device, non_blocking=True)
    return picked.unflatten(0, index.shape).float().div_(255)


def pixel_statistics(images):
    """(mean, std) over images and pixels, (1, 3, 1, 1) each, of at most 10,000 images in [0, 1]."""
    part = images[::math.ceil(len(images) / 10_000)].float().div_(255)
    return part.mean((0, 2, 3), keepdim=True), part.std((0, 2, 3), keepdim=True).clamp_(min=1e-3)


# ------------------------------------------------------------------------------------------------
# 4. Folders: the user's own images. The rules, in this order, for the files that can be read:
#      hidden and system files, folders that hold a run, --out and --data-dir are never data;
#      a folder whose images all lie in one of its folders is read from that one;
#      train, test and val are splits where no other folder lies beside them, otherwise classes;
#      test is used, else val; if the training images have class folders, it must have them, too;
#      a single class means no labels.
#    What was understood and what is left out is printed at every start.

ENDINGS = set(".jpg .jpeg .jfif .png .bmp .gif .webp .tif .tiff .ppm .pgm".split())
SYSTEM = {"__macosx", "__pycache__", "system volume information", "lost+found", "$recycle.bin",
          "@eadir", "@recycle", "@tmp", "#recycle", "#snapshot", "@recently-snapshot", "lost.dir",
          "recycler", "recycled", "found.000", "network trash folder", "temporary items"}
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "val": "val",
          "valid": "val", "validation": "val"}
TURNS = dict(zip(range(2, 9), map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2))))   # EXIF orientation
MAX_PIXELS = 100_000_000                  # larger ones are refused, as a small file can be huge; a
                                          # JPEG is not: it is decoded at a fraction of its size
Image.MAX_IMAGE_PIXELS = None             # so Pillow need not warn
warnings.filterwarnings("ignore", module="PIL")                    # of damaged EXIF data


def find_files(root, skip):
    """All image files below root, each as a tuple of names below root, sorted. skip: folders that
    are not data. Links to folders come last, so that a folder found twice has its real name."""
    skip = {os.path.realpath(path) for path in skip}
    files, others, seen, folders, links, opened = [], Counter(), {*skip}, [((), root)], [], []
    while folders or links:
        parts, place = (folders or links).pop()
        real = os.path.realpath(place)
        if real in seen or Path(real) in Path(root).parents:
            why = "--out or --data-dir (give another, if your images are there)" if real in skip \
                else "read already, or above the data set"
            print(f"  left out, {why}: {one_line(place)}")
            continue
        seen.add(real)
        try:
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except OSError as error:
            print(f"  left out, cannot be opened: {one_line(error)}")
            continue
        names = {entry.name for entry in entries}
        ours = names & {"log.jsonl", "checkpoint.pt", "backbone.pt", "clusters.csv",
                        "detection.json"}
        if parts and ours:
            print(f"  left out, holds {min(ours)} of a run: {one_line(place)}")
            continue
        if ours:                           # the run lies in the folder of the images itself
            print(f"  left out, as of a run: {', '.join(sorted(names.intersection(Run.FILES)))}")
            entries = [entry for entry in entries if entry.name not in Run.FILES]
        opened.append(parts)
        for entry in entries:
            inner = (*parts, entry.name)
            if entry.name[0] == "." or entry.name.lower() in SYSTEM:
                continue
            if os.path.isdir(entry.path):
                (links if entry.is_symlink() else folders).append((inner, entry.path))
            elif Path(entry.name).suffix.lower() in ENDINGS and (  # not a pipe, which would block
                    os.path.isfile(entry.path) or not os.path.exists(entry.path)):
                files.append(inner)
            elif not os.path.exists(entry.path):
                print(f"  left out, a link to nothing, or closed: {one_line(entry.path)}")
            else:
                others[Path(entry.name).suffix.lower() or "without"] += 1
    if others:
        endings = ", ".join(f"{n:,} {one_line(ending)}" for ending, n in others.most_common(6))
        more = ", ..." * (len(others) > 6)
        print(f"  left out, not images by their ending: {others.total():,} ({endings}{more})")
    full = {file[:i] for file in files for i in range(len(file))} | {()}
    bare = [parts for parts in opened if parts not in full and parts[:-1] in full]
    if bare:
        names = one_line(", ".join(os.sep.join(parts) for parts in sorted(bare)[:6]))
        print(f"  folders without images: {len(bare):,} ({names}{', ...' * (len(bare) > 6)})")
    return sorted(files)


def role(folder):
    """'train', 'test' or 'val' for a folder of such a name, else None"""
    return SPLITS.get(folder.strip().lower())


def shared_depth(files, depth=0, known=()):
    """How many folders to step into first, since they hold all the files. depth: where to begin;
    known: folders that are never stepped into."""
    while len(files[0]) > depth + 1 and files[0][depth] not in known and \
            len({f[depth:depth + 1] for f in files}) == 1:
        depth += 1
    return depth


def class_of(files, depth, labelled, known):
    """{file: the name of its class folder, or None where there are no classes}"""
    depth = shared_depth(files, depth, known)
    inside = [f for f in files if len(f) > depth + 1]
    loose = len(files) - len(inside)
    if inside and loose and labelled:
        print(f"  left out, beside the class folders: {loose:,} images")
        files = inside
    elif inside and loose:
        print("  images lie beside folders: all are taken, without labels (--labelled: only those "
              "in the folders, which are the classes)")
    classes = len(files) == len(inside)
    return {f: f[depth] if classes else None for f in files}


def layout(root, files, labelled, known):
    """What each readable file below root is, by the rules above.
    -> {file: (split, class or None)}, without those that are left out"""
    depth = shared_depth(files, 0, known)
    tops = sorted({f[depth] for f in files if len(f) > depth + 1})
    role_of = {top: role(top) for top in tops}
    named, shown = [top for top in tops if role_of[top]], one_line(", ".join(tops))
    alike = [top for top in tops if re.search("train|test|val", top.lower())]
    for i, part in enumerate(files[0][:depth]):                    # into test, beside train?
        with contextlib.suppress(OSError):
            if role(part) in ("test", "val") and \
                    "train" in map(role, os.listdir(os.path.join(root, *files[0][:i]))):
                raise UserError(f"{one_line(root)}: no image of its train folder can be used")
    groups = {"train": files}
    if named and named == tops:
        groups = {role_of[top]: [f for f in files if f[depth] == top] for top in tops}
        loose = len(files) - sum(len(group) for group in groups.values())
        if "train" not in groups or len(groups) < len(tops):
            raise UserError(f"{one_line(root)} has the folders {shown}: name exactly one "
                            f"of them train and no two the same, or give --unlabelled")
        if loose:
            print(f"  left out, beside {shown}: {loose:,} images")
        depth += 1
    elif named:
        print(f"  taken as classes, not as splits, since other folders lie there too: "
              f"{one_line(', '.join(named))}")
    elif len(alike) > 1 and any("train" in top.lower() for top in alike):
        print(f"  taken as classes, not as splits, which are folders named train, test or val: "
              f"{one_line(', '.join(alike))}")
    classes, chosen = class_of(groups["train"], depth, labelled, known), None
    names = set(classes.values()) - {None}
    if len(names) == 1:
        print(f"  all training images are in one folder, {one_line(*names)}: that is no label")
        classes, names = dict.fromkeys(classes), set()
    deeper = {part for f, label in classes.items() if names
              for part in f[f.index(label, depth) + 1:-1] if role(part)}
    if deeper:                             # cats/train, cats/test, dogs/train, ...
        print(f"  inside class folders, not taken as splits: {one_line(', '.join(sorted(deeper)))}")
    found = {f: ("train", label) for f, label in classes.items()}
    for split in [split for split in ("test", "val") if split in groups]:
        inner = class_of(groups[split], depth, labelled or bool(names), names)
        where, has = groups[split][0][depth - 1], set(inner.values()) != {None}
        if chosen or (names and not has):
            why = f"{chosen} is used" if chosen else "it has no class folders, unlike train"
            print(f"  left out, {one_line(where)}: {len(groups[split]):,} images: {why}")
            continue
        if has and not names:
            print(f"  class folders of {one_line(where)} are not used, as train has no classes")
        strange = sorted(set(inner.values()) - names) if names else ()
        chosen = where if set(inner.values()) - set(strange) else None
        if strange:
            lost = sum(label in strange for label in inner.values())
            print(one_line(f"  left out, {lost:,} images of {where}, as train lacks these classes: "
                           f"{', '.join(strange)}"))
        found.update({f: ("test", label if names else None) for f, label in inner.items()
                      if label not in strange})
    return found


def wanted_classes(files, lines, source):
    """The names of folders of files that lines begin with. What follows a name is ignored."""
    folders = {part for f in files for part in f[:-1]}
    lines = [unicodedata.normalize("NFC", line.strip()) for line in lines if line.strip()]
    other_case = {folder.lower() for folder in folders}            # is missing, then
    names = {line if line in folders or line.lower() in other_case else line.split()[0]
             for line in lines}
    missing = ", ".join(one_line(name) for name in sorted(names - folders))
    if not names:
        raise UserError(f"{one_line(source)} names no class")
    if missing:
        raise UserError(f"{one_line(source)} names {missing}, of which there are no images")
    return names


def read_lines(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{one_line(path)} cannot be read: {one_line(error)}") from None


def _folder(root, data_dir, size, name=None, only=None, unlabelled=False, labelled=False, out=None,
            classes=None, **options):
    """A folder of images, by the rules above. -> Dataset

    name, only   for the built-in sets: their names, and the class folders that they take
    classes      a file that names the class folders to keep, at the start of its lines"""
    root, known = Path(os.path.realpath(root)), ()
    if name and not (root / "train").is_dir():
        raise UserError(f"{name}: there is no {root / 'train'}: put the data set there, or say"
                        f" where it is with --data-dir, {NEEDS_NOTHING}")
    if out and os.path.realpath(out) == str(root):
        raise UserError(f"--out {one_line(out)} is the folder of the images: choose another one")
    print(f"reading {one_line(root)}")
    skip = [p for p in (out, data_dir) if p and root in Path(os.path.realpath(p)).parents]
    files = find_files(root, skip)
    if name:                               # another built-in set may lie in ImageNet's folder
        files = [f for f in files if role(f[0])]
    only = read_lines(classes) if classes else only
    # Tiny-ImageNet's validation images are seen as if they lay in the folders of their classes;
    # accents, which Unicode writes in two ways, in one way.
    boxes = root / "val/val_annotations.txt"                       # image <tab> class <tab> box
    rows = [line.split("\t") for line in (read_lines(boxes) if name and boxes.is_file() else ())]
    moved = {("val", "images", row[0]): ("val", row[1], row[0]) for row in rows if len(row) > 1}

    def seen(file):
        return tuple(unicodedata.normalize("NFC", part) for part in moved.get(file, file))
    if only:
        known = wanted_classes([seen(f) for f in files], only, classes or name)
        files = [f for f in files if known & set(seen(f)[:-1])]
    if not files:
        raise UserError(f"{one_line(root)}: no images there (endings: {' '.join(sorted(ENDINGS))})")
    plain = "".join(c if c.isalnum() or c in "._-" else "_" for c in root.name)
    name = name or plain[:60] or "folder"  # file systems allow 255 bytes, with all that is added
    kept = read_files(name, root, files, data_dir, size, **options)
    good = [seen(files[i]) for i in kept["good"]]
    if not good:
        raise UserError(f"{one_line(root)}: none of its image files can be read")
    found = {f: ("train", None) for f in good} if unlabelled else \
        layout(root, good, labelled, known)
    names = sorted({label for _, label in found.values()} - {None})
    if only and set(names) - known:
        raise UserError(f"{one_line(classes or name)}: some folders that it names are not classes; "
                        f"the classes are {one_line(', '.join(names))}")
    splits, number_of = [], {label: i for i, label in enumerate(names)}
    for split in ("train", "test"):
        rows = [row for row, f in enumerate(good) if f in found and found[f][0] == split]
        y = torch.tensor([number_of[found[good[row]][1]] for row in rows]) if names else None
        where = [os.sep.join(files[kept["good"][row]]) for row in rows]
        features = None if kept["features"] is None else kept["features"][rows]
        splits.append(Split(kept["images"][rows], y, where, features))
    n, m = (len(split.names) for split in splits)
    shown = one_line(", ".join(names[:12])) + ", ..." * (len(names) > 12)
    classes = f"{len(names)} classes ({shown})" if names else "no labels"
    print(f"  {n:,} training images, {f'{m:,} test images' if m else 'no test split'}, {classes}, "
          f"{kept['how']['size']} px")
    return Dataset(name, splits[0], splits[1] if m else splits[0], names or None, "", kept["how"])


def read_files(name, root, files, data_dir, size=None, fit="crop", decoding=None, network=None):
    """Decode files (tuples of names below root), or take them from the cache of data_dir.

    decoding   of another Dataset: its grey and ground are used again; else they are measured
    network    (a name for the cache, a function (B, 3, size, size) uint8 -> (B, D)): what it
               returns is kept as 'features', and of the images thumbnails of 96 px at most
    -> what decode_all returns"""
    # The key changes with every change that `stat` can see, also when two files swap their names.
    paths = [os.path.join(root, *f) for f in files]
    about = [size, fit, network and network[0], decoding]
    digest = hashlib.sha256(f"2{about}".encode())                  # 2: the version of decode()
    for file, path in zip(files, paths):
        with contextlib.suppress(OSError):
            s = os.stat(path)
            stamp = s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_dev, s.st_ino
            digest.update(os.fsencode(f"{os.sep.join(file)}{stamp}\n"))
    place = hashlib.sha256(os.fsencode(str(root))).hexdigest()[:8]
    cache = "-".join(str(part) for part in (name, place, *about[:3]) if part)
    cache, key = Path(data_dir) / "cache" / f"{cache}.pt", digest.hexdigest()
    try:
        kept = load_checked(cache)
        images, n = kept["images"], len(kept["good"])
        side = images.shape[-1] if network else kept["how"]["size"]
        rows = sorted([*kept["good"], *(i for i, _ in kept["bad"])])
        good = kept["key"] == key and rows == list(range(len(paths))) and \
            images.dtype == torch.uint8 and images.shape == (n, 3, side, side) and \
            (len(kept["features"]) == n if network else kept["features"] is None) and \
            isinstance(kept["lines"], list) and all(isinstance(x, str) for x in kept["lines"])
        for i, _ in kept["bad"] if good else ():                   # it may be readable by now
            good = good and isinstance(decode(paths[i], **kept["how"]), str)
    except (OSError, Damaged, LookupError, TypeError, ValueError, AttributeError):
        good = False
    if not good:
        kept = {"key": key, **decode_all(name, paths, size, fit, decoding or {}, network)}
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            save_atomically(cache, kept)
        except OSError as error:
            print(f"  the decoded images could not be kept for the next start: {one_line(error)}")
    bad = [f"left out, {why}: {one_line(os.sep.join(files[i]))}" for i, why in kept["bad"]]
    more = [f"left out, not readable: {len(bad) - 20:,} more files"] if len(bad) > 20 else []
    print("".join(f"  {line}\n" for line in kept["lines"] + bad[:20] + more), end="")
    return kept


def levels(image, path):
    """(H, W) or (H, W, 3) levels of an image of more than 8 bits; None for any other image"""
    if image.mode[0] in "IF":
        full = np.array(image, np.float64)
        full[np.isfinite(full) & (abs(full) > 1e37)] = math.nan    # "no value", in many rasters
        with contextlib.suppress(AttributeError, TypeError, ValueError):
            full[full == float(image.tag_v2.get(42113))] = math.nan             # the same, by GDAL
        return full
    if "16B" in str(image.tile):           # colour PNG: Pillow would keep the upper 8 of 16 bits
        with contextlib.suppress(AttributeError, RuntimeError):
            data = torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.uint8)
            full = torchvision.io.decode_image(data, torchvision.io.ImageReadMode.UNCHANGED)
            if len(full) % 2 == 0 and full[-1].int().min() == 65535:   # nothing is transparent
                full = full[:-1]
            if len(full) % 2:              # else 8 bits of Pillow will do
                return full.double().permute(1, 2, 0).squeeze(2).numpy()
    return None


def look(path):
    """-> (width, height, some levels of an image of more than 8 bits, some visible levels of a
    transparent image, what will be lost of it), or None for a file that cannot be read"""
    try:
        with Image.open(path) as image:
            deep, visible, fits = [], [], image.width * image.height <= MAX_PIXELS
            sixteen = re.search(";16[BLN]|65535", str(image.tile))     # PNG and TIFF; PPM
            several = getattr(image, "is_animated", False) and image.format != "MPO"
            full = levels(image, path) if fits else None
            if full is not None:
                deep = full[np.isfinite(full)]
            elif fits and image.has_transparency_data:
                grey, alpha = np.moveaxis(np.asarray(image.convert("RGBA").convert("LA")), 2, 0)
                visible = grey[alpha > 127] if alpha.min() < 255 else []
            some = [x[np.random.default_rng(0).integers(len(x), size=1000)] if len(x) else []
                    for x in (deep, visible)]
            lost = ["the lower 8 of 16 bits of colour"] * bool(sixteen and full is None) + \
                ["all pages or frames but the first"] * several
            return *image.size, *some, lost
    except Exception:                                              # Pillow raises many kinds
        return None


def decode(path, size, fit, grey, ground):
    """One image file -> (3, size, size) uint8, or in words why not. grey: [low, high], the levels
    of images of more than 8 bits that become 0 and 255; ground: the level behind transparency."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (size, size))                       # JPEG: decode near the target
            if image.width * image.height > MAX_PIXELS:
                return f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}"
            deep, square, turn = levels(image, path), (size, size), None
            image.load()                   # now, since Pillow then turns a TIFF itself
            with contextlib.suppress(Exception):                   # a broken EXIF block
                turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
            if deep is not None:
                low, high = grey or (0, 65535)                     # None: no level was finite
                deep = np.nan_to_num((deep - low) / (high - low) * 255, nan=0, posinf=255, neginf=0)
                image = Image.fromarray(deep.clip(0, 255).round().astype(np.uint8))
            if turn is not None:
                image = image.transpose(turn)
            if image.has_transparency_data:
                level = 255 if ground is None else ground
                back = Image.new("RGBA", image.size, (level, level, level, 255))
                image = Image.alpha_composite(back, image.convert("RGBA"))
            image = image.convert("RGB")
            if image.size != square:
                to = {"crop": ImageOps.fit, "pad": ImageOps.pad, "squeeze": Image.Image.resize}
                image = to[fit](image, square, Image.Resampling.BILINEAR)
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    except UnidentifiedImageError:
        return "broken, or of a kind that is not read"
    except Exception as error:
        return one_line(error)


def decode_all(name, paths, size, fit, decoding, network):
    """Decode files with all cores. A look at every file decides first what all images share: their
    size, the scale of grey levels, the ground behind transparency.
    -> what read_files keeps: images or thumbnails, features, good, bad, lines, how"""
    lines, started = [], time.time()
    images, features, good, bad = [], [], [], []
    with ThreadPoolExecutor() as pool:
        seen = [s for s in pool.map(look, paths) if s] or [(32, 32, [], [], [])]
        # Their own size where it is small and the same for all, else one that fits the median.
        if size is None:
            width, height = seen[0][:2]
            same = width == height and {s[:2] for s in seen} == {(width, height)}
            median = np.median([min(s[:2]) for s in seen])
            fits = [side for side in (32, 64, 96) if side <= median]
            size = width if same and 8 <= width <= 64 else max(fits, default=32)
        cut = np.median([1 - min(s[:2]) / max(s[:2]) for s in seen])
        if fit == "crop" and cut >= .2:
            lines.append(f"--fit crop cuts {cut:.0%} off the median image; pad and squeeze do not")
        grey, ground = decoding.get("grey"), decoding.get("ground")
        deep, visible = (np.concatenate([[], *(s[i] for s in seen)]) for i in (2, 3))
        if len(deep):
            if grey is None:
                low, high = np.percentile(deep, (.1, 99.9)).tolist()
                grey = [low, high if high > low else low + 1]
            lines.append(f"16-bit and float images: the levels {grey[0]:.6g} to {grey[1]:.6g} "
                         f"become 0 to 255, in all of them")
        if len(visible):
            if ground is None:     # the level that the fewest visible pixels are near to
                ground = min((255, 0, 128, 64, 192), key=lambda g: (abs(visible - g) < 48).sum())
            lines.append(f"transparent images lie on the grey level {ground} (255 is white)")
        for what, n in Counter(what for s in seen for what in s[4]).items():
            lines.append(f"lost, in {n:,} images: {what}")
        how = {"size": size, "fit": fit, "grey": grey, "ground": ground}
        print(f"  decoding {len(paths):,} images to {size} x {size} px, once")
        for start in range(0, len(paths), 512):                    # in parts: Ctrl-C is heard
            found = list(pool.map(lambda path: decode(path, **how), paths[start:start + 512]))
            bad += [[i, why] for i, why in enumerate(found, start) if isinstance(why, str)]
            good += [i for i, image in enumerate(found, start) if not isinstance(image, str)]
            part = [image for image in found if not isinstance(image, str)]
            if part and network:
                part = torch.stack(part)
                features.append(network[1](part).cpu())
                part = _resized(part, min(size, 96))
            images += part
            progress(f"{name}: decoding", start + len(found), len(paths), started)
    images = torch.stack(images) if images else torch.empty(0, 3, size, size, dtype=torch.uint8)
    return {"images": images, "features": torch.cat(features) if features else None, "good": good,
            "bad": bad, "lines": lines, "how": how}


# ------------------------------------------------------------------------------------------------
# 5. Views of a batch (B, 3, H, W) in [0, 1], on its device. The CPU draws, for each image anew: a
#    seed gives the same views on every CPU; others on a GPU, since batches() draws more at once.

def random_resized_crop(x, scale, rng, flip=.5):
    """torchvision's RandomResizedCrop and RandomHorizontalFlip for a batch. -> (B, 3, H, W)
    scale: range of the share of the area; flip: its probability."""
    n, _, height, width = x.shape
    area = height * width * torch.empty(10, n).uniform_(*scale, generator=rng)
    aspect = torch.empty(10, n).uniform_(*map(math.log, (3 / 4, 4 / 3)), generator=rng).exp()
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    # Like torchvision: the first of ten tries that fits, else the whole image.
    fits = (0 < w) & (w <= width) & (0 < h) & (h <= height)
    first = fits.int().argmax(0, keepdim=True)
    w = torch.where(fits.any(0), w.gather(0, first)[0], width)
    h = torch.where(fits.any(0), h.gather(0, first)[0], height)
    left = (torch.rand(n, generator=rng) * (width - w + 1)).floor()
    top = (torch.rand(n, generator=rng) * (height - h + 1)).floor()
    return resized_crop(x, top, left, h, w, torch.rand(n, generator=rng) < flip)


def resized_crop(x, top, left, h, w, flipped):
    """Cut the box (top, left, h, w) from each image, resize it to the image's own size, mirror it
    where flipped; all five (B,). Equal to torchvision's resized_crop, because the coordinates are
    clamped to the box: without that, pixels from outside leak in at its edges."""
    boxes = torch.stack([top, left, h, w, flipped.float()]).to(x.device, non_blocking=True)
    top, left, h, w, flipped = boxes[:, :, None]                   # Bx1 each
    height, width = x.shape[-2:]
    u = (torch.arange(width, device=x.device) + .5) / width        # in shares of the box
    v = (torch.arange(height, device=x.device) + .5) / height
    u = torch.where(flipped > 0, 1 - u, u)                         # BxW
    i = (v * h - .5).clamp(min=0).minimum(h - 1) + top             # BxH, in pixels of x
    j = (u * w - .5).clamp(min=0).minimum(w - 1) + left
    i, j = (2 * i + 1) / height - 1, (2 * j + 1) / width - 1       # grid_sample's units
    grid = torch.stack(torch.broadcast_tensors(j[:, None, :], i[:, :, None]), -1)
    return F.grid_sample(x, grid, align_corners=False)


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
    """Turn the hue by shift (B, 1, 1, 1) from -.5 to .5, where 1 is a full turn, through HSV."""
    r, g, b = x.split(1, 1)
    low, high = torch.minimum(torch.minimum(r, g), b), torch.maximum(torch.maximum(r, g), b)
    chroma = high - low
    # A choice by the brightest channel, as lerp by 0 or 1: on a CPU far faster than where.
    hue = torch.lerp(b - r + 2 * chroma, r - g + 4 * chroma, (high - g).sign())
    hue = torch.lerp(g - b, hue, (high - r).sign()).div_(chroma.clamp(min=1e-8)).add_(6 * shift)
    hue -= 6 * (hue / 6).floor_()                                  # 0 to 6
    y = torch.cat([hue - 3, hue - 2, hue - 4], 1)
    y = y.abs_().neg_().add_(2).clamp_(0, 1)                       # peaks opposite red, at G, at B
    y[:, :1].neg_().add_(1)
    return y.mul_(chroma).add_(low)


def color_jitter(x, brightness, contrast, saturation, hue, rng, p=.8, groups=8):
    """torchvision's ColorJitter, applied to each image with probability p. -> (B, 3, H, W)
    Factors are uniform in [1 - strength, 1 + strength] and hue in [-hue, hue], drawn per image.
    torchvision also shuffles the four operations per image. Here images i, i + groups, ... share an
    order: a training batch, which is a run of neighbours, holds all `groups` orders."""
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
    mean, std = (s.to(x.device, non_blocking=True) for s in statistics)
    return (x - mean).div_(std).contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------
# 6. Backbone

def resnet18(image_size, width=64, stem_stride=1):
    """torchvision's ResNet-18 without its classifier. (B, 3, H, W) -> (B, 8 * width) features

    width: channels of the first stage, 16 or more: with fewer torch's backward writes over foreign
    memory on some CPUs. At 64 the names and shapes of the weights are those of torchvision's
    resnet18, but for the stem up to 128 px. stem_stride, up to 128 px: 2 halves the image, about 3x
    faster. ImageNet's 7x7 stem would shrink 32 px to a map of 1 x 1, which costs many points."""
    net = torchvision.models.resnet18()
    if image_size <= 128:                 # 3x3; above 64 px with the 2x2 max-pool of SCAN's STL-10
        net.conv1 = nn.Conv2d(3, width, 3, stem_stride, 1, bias=False)
        net.maxpool = nn.Identity() if image_size <= 64 else nn.MaxPool2d(2, 2)
    else:
        net.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
    net.inplanes, net.bn1, net.fc = width, nn.BatchNorm2d(width), nn.Identity()
    for i in range(4):
        stage = net._make_layer(BasicBlock, width * 2**i, 2, stride=2 if i else 1)
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
# 7. Training

def cosine_lr(step, steps, warmup=0):
    """Factor of the learning rate at a step: rising linearly to 1 over `warmup` steps, then half a
    cosine from 1 to 0 at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    return .5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def set_lr(optimizer, lr):
    """lr for all parameter groups, times the group's own `factor` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("factor", 1)


def batches(images, index, batch_size, views, rng, device):
    """One epoch: shuffle, then yield (batch of index, view, ...), whole batches only.
    views(x, rng) makes a tuple of views of raw images x in [0, 1], for several batches at once:
    hundreds of small images on a CPU (they fit its cache), thousands on a GPU (few launches)."""
    order = index[torch.randperm(len(index), generator=rng)]
    order = order[:len(order) // batch_size * batch_size]
    limit = (4096 if device.type == "cuda" else 512) * 32**2 // max(32, images.shape[-1])**2
    chunk = max(1, limit // batch_size) * batch_size
    for part in order.split(chunk):
        made = views(fetch(images, part, device), rng)
        part = part.to(device, non_blocking=True)
        for i in range(0, len(part), batch_size):
            yield part[i:i + batch_size], *(view[i:i + batch_size] for view in made)


class Meter:
    """Means of the loss terms over an epoch of `steps`. The device is read once, at the end."""

    def __init__(self, where, steps):
        self.where, self.steps, self.began = where, steps, time.time()
        self.done, self.total = 0, {}

    def add(self, **terms):                                        # scalar tensors on the device
        for name, value in terms.items():
            self.total[name] = self.total.get(name, 0) + value.detach().float()
        self.done += 1
        progress(f"{self.where}: step", self.done, self.steps, self.began)

    def means(self):
        values = torch.stack(list(self.total.values())) / self.done
        return dict(zip(self.total, values.tolist()))


# ------------------------------------------------------------------------------------------------
# 8. Evaluation, the same for all four. No loss uses labels.

@torch.compiler.set_stance("force_eager")                          # --compile is for training
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


def embed_both(network, data, statistics, device):
    """embed for the training and the test images; without a test split twice the same tensor"""
    train = embed(network, data.train.images, statistics, device)
    test = embed(network, data.test.images, statistics, device) if data.has_test else train
    return train, test


def contingency(labels, assignments, classes=0, clusters=0):
    """Counts of each (class, cluster). labels, assignments (N,) integers >= 0, numpy or torch.
    -> (C, K) int64; C and K as large as the numbers found, or as asked for"""
    labels, assignments = np.asarray(labels), np.asarray(assignments)
    shape = max(classes, labels.max() + 1), max(clusters, assignments.max() + 1)
    return np.histogram2d(labels, assignments, shape, [(0, n) for n in shape])[0].astype(np.int64)


def cluster_scores(labels, assignments, vote_from=None):
    """ACC, NMI and ARI of a clustering. labels, assignments (N,): integers >= 0, numpy or torch.

    ACC is the accuracy after the best one-to-one map of clusters to classes ('hungarian'). With
    vote_from = (labels, assignments) of the images that vote, each cluster takes the class of most
    of its members ('majority vote'). NMI is divided by the arithmetic mean of both entropies.
    -> {'acc', 'nmi', 'ari', 'rule', 'clusters': how many are not empty, 'classes': the class of
    each cluster up to the last that is not empty, -1 for none}"""
    table = contingency(labels, assignments)
    a, b = table.sum(1), table.sum(0)
    if vote_from is None:
        rule, match = "hungarian", np.full(len(b), -1)
        rows, columns = linear_sum_assignment(table, maximize=True)
        match[columns] = rows
    else:
        voters = contingency(*vote_from, clusters=len(b))
        rule, match = "majority vote", np.where(voters.sum(0) > 0, voters.argmax(0), -1)
    both = entropy(a) + entropy(b)
    nmi = 2 * (both - entropy(table.ravel())) / both if both > 0 else 1.
    pairs, of_a, of_b, of_all = (comb(x, 2).sum() for x in (table, a, b, a.sum()))
    chance, limit = of_a * of_b / max(of_all, 1), (of_a + of_b) / 2
    ari = (pairs - chance) / (limit - chance) if limit != chance else 1.
    return {"acc": float((match[np.asarray(assignments)] == np.asarray(labels)).mean()),
            "nmi": float(nmi), "ari": float(ari), "rule": rule, "clusters": int((b > 0).sum()),
            "classes": match.tolist()}


class Clustering(NamedTuple):
    train: torch.Tensor                   # (N,) cluster of each training image
    test: torch.Tensor                    # (M,) of each test image; the same without a test split
    train_confidence: torch.Tensor        # in [0, 1]
    test_confidence: torch.Tensor


def clustering(train_p, test_p):
    """Probabilities (N, K) and (M, K) of the clusters -> Clustering, on the CPU"""
    (train_sure, train), (test_sure, test) = train_p.cpu().max(1), test_p.cpu().max(1)
    return Clustering(train, test, train_sure, test_sure)


def score(data, found, clusters):
    """cluster_scores of a Clustering on the test images. One rule for all rows of a table: with
    more clusters than classes the training images vote."""
    seen = data.train.labels >= 0
    votes = data.train.labels[seen], found.train[seen]
    return cluster_scores(data.test.labels, found.test,
                          votes if clusters > len(data.classes) else None)


@torch.no_grad()
def kmeans(features, k, seed, restarts=20, iterations=300):
    """k-means of L2-normalised features (N, D) with k-means++ starts; the best of several restarts.
    -> (assignments (N,), centroids (K, D)). An empty cluster takes a point that is far from its
    centroid. Raises UserError when k > N."""
    x = F.normalize(features.float(), dim=1)
    n, best = len(x), (math.inf, None, None)
    if k > n:
        raise UserError(f"{k} clusters of {n} images: there are more clusters than images")
    # k uniform numbers choose the k starts.
    for first, *others in torch.rand(restarts, k, generator=generator(seed, 0, "kmeans")).tolist():
        centre = x[int(first * n)][None]
        nearest = (2 - 2 * x @ centre[0]).clamp_(min=0)            # squared, of unit vectors
        for u in others:                                           # the next: probability ~ d^2
            cumulative = nearest.double().cumsum(0)
            pick = torch.searchsorted(cumulative, u * cumulative[-1:]).clamp_(max=n - 1)
            centre = torch.cat([centre, x[pick]])
            nearest = torch.minimum(nearest, (2 - 2 * x @ x[pick].flatten()).clamp_(min=0))
        before = math.inf
        for i in range(iterations):
            parts = [torch.addmm(centre.square().sum(1), part, centre.t(), alpha=-2).min(1)
                     for part in x.split(65536)]                   # far faster than torch.cdist
            distance = torch.cat([p.values for p in parts]) + 1    # squared; |x| = 1
            assignment = torch.cat([p.indices for p in parts])
            if i % 5 == 4:                                         # a look waits for the device
                inertia = distance.sum().item()
                if before - inertia <= 1e-6 * inertia + 1e-6:
                    break
                before = inertia
            total = torch.zeros_like(centre).index_add_(0, assignment, x)
            ones = torch.ones(n, 1, device=x.device)
            count = torch.zeros(k, 1, device=x.device).index_add_(0, assignment, ones)
            far = x[distance.topk(k).indices]
            centre = torch.where(count > 0, total / count.clamp(min=1), far)
        best = min(best, (distance.sum().item(), assignment, centre), key=lambda found: found[0])
    return best[1:]


@torch.no_grad()
def knn_accuracy(bank, bank_labels, queries, labels, k_neighbours=200, tau=.1, leave_one_out=False):
    """Weighted kNN: each of the nearest bank images votes exp(cosine / tau) for its class.

    bank (N, D), queries (M, D), bank_labels (N,), labels (M,). A small bank lowers k_neighbours to
    its mean class size. leave_one_out: the queries are the bank, and none votes for itself.
    -> (accuracy in [0, 1], the k_neighbours used)"""
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    bank_labels, labels = bank_labels.to(bank.device), labels.to(bank.device)
    classes = int(bank_labels.max()) + 1
    k_neighbours = max(1, min(k_neighbours, len(bank) // classes, len(bank) - 1))
    hits = torch.zeros((), device=bank.device)
    for rows in torch.arange(len(queries), device=bank.device).split(max(1, 2**26 // len(bank))):
        similarity = queries[rows] @ bank.t()
        if leave_one_out:
            similarity[rows - rows[0], rows] = -2
        value, index = similarity.topk(k_neighbours, 1)
        votes = torch.zeros(len(value), classes, device=bank.device)
        votes.scatter_add_(1, bank_labels[index], (value / tau).exp())
        hits += (votes.argmax(1) == labels[rows]).sum()
    return hits.item() / len(queries), k_neighbours


def knn_gauge(backbone, data, index, statistics, device, epoch, args):
    """{'knn': accuracy} in ten epochs of a run, else {}: 1,000 training images by 5,000 others, the
    same ones each time. Never the test images. {} also without labels. No weight is changed."""
    tenth = (epoch + 1) * 10 // args.epochs > epoch * 10 // args.epochs
    if data.classes is None or not tenth:
        return {}
    index = index[data.train.labels[index] >= 0]
    index = index[torch.randperm(len(index), generator=generator(args.seed, 0, "knn"))[:6000]]
    h = embed(backbone, data.train.images[index], statistics, device)
    y, some = data.train.labels[index], len(index) // 6
    return {"knn": knn_accuracy(h[some:], y[some:], h[:some], y[:some])[0]} if some else {}


@torch.no_grad()
def logistic_regression(x, y, classes, decay, iterations=100):
    """min over w of mean cross-entropy(x w[1:] + w[0], y) + decay ||w[1:]||^2, by at most
    `iterations` steps of scipy's L-BFGS.

    x (N, D), best standardised; y (N,) classes. The device computes the loss and its gradient.
    -> w (D + 1, C), the bias first"""
    target = F.one_hot(y, classes).to(x.dtype)

    def loss_and_gradient(flat):
        w = torch.as_tensor(flat, dtype=x.dtype).to(x.device).view(-1, classes)
        log_p = F.log_softmax(torch.addmm(w[0], x, w[1:]), 1)
        error = (log_p.exp() - target) / len(x)
        loss = -(log_p * target).sum() / len(x) + decay * w[1:].square().sum()
        gradient = torch.cat([error.sum(0)[None], x.t() @ error + 2 * decay * w[1:]])
        both = torch.cat([loss[None], gradient.flatten()]).double().cpu().numpy()
        return both[0], both[1:]                                   # one wait for the device
    start = np.zeros((x.shape[1] + 1) * classes)
    found = minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B",
                     options={"maxiter": iterations})
    return torch.as_tensor(found.x, dtype=x.dtype).to(x.device).view(-1, classes)


def linear_probe(features, labels, test_features, classes, seed):
    """Logistic regression on standardised features (N, D) with labels (N,); its weight decay is
    chosen on a held-out fifth of them. test_features (M, D) -> predicted classes (M,) on the CPU"""
    labels = labels.to(features.device)
    mean, std = features.mean(0), features.std(0).clamp_(min=1e-6)
    x, t = (features - mean) / std, (test_features - mean) / std
    order = torch.randperm(len(x), generator=generator(seed, 0, "probe")).to(x.device)
    held, kept = order[:len(x) // 5], order[len(x) // 5:]

    def held_out_hits(decay):
        w = logistic_regression(x[kept], labels[kept], classes, decay)
        return ((x[held] @ w[1:] + w[0]).argmax(1) == labels[held]).sum().item()
    w = logistic_regression(x, labels, classes, max((1e-2, 1e-3, 1e-4, 1e-5), key=held_out_hits))
    return (t @ w[1:] + w[0]).argmax(1).cpu()


def evaluate(train_h, test_h, data, clusters, seed, index=None, probe=True, restarts=20):
    """Scores of frozen features (N, D) and (M, D); {} without labels. -> (scores, Clustering)

    k-means is fitted on train_h[index], the images learned from (None: all); then each image of
    both splits goes to its nearest centroid. kNN and the linear probe use all labelled training
    images. Without a test split, kNN classifies each image by all the others; there is no probe.
    Raises NotFinite if a feature is not finite: weights of another program can lead to that."""
    if not (train_h.isfinite().all() and test_h.isfinite().all()):
        raise NotFinite("the features of some images are not finite")
    fit = train_h if index is None else train_h[index.to(train_h.device)]
    centre = kmeans(fit, clusters, seed, restarts)[1]
    # (1 - |x - c|^2) / 2 = x . c - |c|^2 / 2. Its softmax, at .1, is the confidence.
    near = (F.normalize(h, dim=1) @ centre.t() - centre.square().sum(1) / 2
            for h in (train_h, test_h))
    found = clustering(*((n / .1).softmax(1) for n in near))
    if data.classes is None:
        return {}, found
    seen = data.train.labels >= 0
    y, bank = data.train.labels[seen], train_h[seen.to(train_h.device)]
    scores = {"kmeans": score(data, found, clusters)}
    scores["knn"], scores["k_neighbours"] = knn_accuracy(
        bank, y, test_h, data.test.labels, leave_one_out=not data.has_test)
    if probe and data.has_test:
        right = linear_probe(bank, y, test_h, len(data.classes), seed) == data.test.labels
        scores["linear"] = right.float().mean().item()
    return scores, found


def baselines(data, untrained, statistics, clusters, seed, index, device):
    """What any score must be held against: {'raw pixels': scores, 'random network': scores}, the
    latter if there is an untrained network."""
    side = min(32, data.train.images.shape[-1])                    # larger images are shrunk
    pixels = nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Flatten())
    raw = embed_both(pixels, data, (torch.tensor(.5), torch.tensor(1.)), device)
    table = {"raw pixels": evaluate(*raw, data, clusters, seed, index, probe=False, restarts=5)[0]}
    if untrained:
        random = embed_both(untrained, data, statistics, device)
        table["random network"] = evaluate(*random, data, clusters, seed, index)[0]
    return table


def print_scores(table, data):
    """table {name: scores of evaluate or of cluster_scores} as aligned lines, and the protocol."""
    print(f"\n{'':24}{'ACC':>8}{'NMI':>8}{'ARI':>8}{'kNN':>8}{'linear':>8}")
    for name, scores in table.items():
        scores = {**scores, **scores.get("kmeans", {})}
        cells = [scores.get(key) for key in ("acc", "nmi", "ari", "knn", "linear")]
        print(f"{name:24}" + "".join(f"{'-' if c is None else f'{c:.3f}':>8}" for c in cells))
    print(f"  {protocol(table, data)}")


def protocol(table, data):
    """In words: fitted on what, scored on what."""
    if not any(table.values()):
        return "no labels, no scores"
    rules = " or ".join(sorted({s.get("kmeans", s)["rule"] for s in table.values()}))
    k = max(scores.get("k_neighbours", 0) for scores in table.values())
    where = f"scored on {len(data.test.images):,} test images" if data.has_test else \
        f"fitted and scored on the same {len(data.train.images):,} images (kNN: by all others)"
    return f"learned from train, {where}; ACC by {rules}; kNN with {k} neighbours; last epoch"


# ------------------------------------------------------------------------------------------------
# 9. Run folder. Nothing is lost: a file (but log.jsonl, which restore() repairs) is complete before
#    it gets its name.

@contextlib.contextmanager
def replacing(path):
    """A temporary file beside path, open for bytes. At the end it is on the disk and gets the name
    path; after a failure it is removed. Another process has a temporary file of its own."""
    temporary = Path(path).with_name(f"{Path(path).name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path, text):
    with replacing(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def save_atomically(path, state):
    with replacing(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:      # after a full disk; the OSError itself is its context
            raise error.__context__ or error


def load_checked(path, older=False):
    """What save_atomically wrote: plain values and dense, finite tensors. Raises Damaged for all
    else, also for a flipped bit: the zip archive's checksums notice one, torch.load does not.
    older: a file of torch's format before zip archives will do, too."""
    def check(value):
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.is_complex() or not value.isfinite().all():
                raise ValueError("it holds a tensor that is not dense, real and finite")
        elif isinstance(value, (dict, list, tuple)):
            for part in value.values() if isinstance(value, dict) else value:
                check(part)
    try:
        if not older or zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # Checksums do not cover the attributes: torch takes bit 0x10 for "a folder" and
                # returns uninitialised memory.
                marked = (entry.filename for entry in archive.infolist() if entry.external_attr)
                broken = archive.testzip() or next(marked, None)
            if broken:
                raise ValueError(f"{broken} fails its checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        check(state)
        return state
    except pickle.UnpicklingError:
        raise Damaged(f"{one_line(path)}: not a file of tensors") from None
    except Exception as error:                                     # a pickle can raise anything
        raise Damaged(f"{one_line(path)}: {one_line(error)}") from None


def try_step(optimizer):
    """One step of a copy of an optimizer, with gradients of 0. load_state_dict takes any state: a
    part that is missing or foreign would show only later. Raises what the step raises."""
    for p, kept in optimizer.state.items():
        if any(t.numel() > 1 and t.shape != p.shape for t in kept.values()):
            raise ValueError("the optimizer's state is of another shape")
    trial = copy.deepcopy(optimizer)
    for group in trial.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    trial.step()


def locked(folder):
    """Keep a second process from writing to a folder. -> the lock; close() or a kill frees it."""
    lock = open(folder / ".lock", "a")                             # the file stays
    with contextlib.suppress(ImportError):                         # on Windows nothing locks
        import fcntl
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{one_line(folder)}: another process writes to it") from None
    return lock


class Run:
    """The folder of a run, used as a context. epochs: of all steps, where that is not args.epochs.
    fits: is the state of a checkpoint complete? What restore() loads need not be looked at.
    A checkpoint is written at the end of an epoch, but at most one in INTERVAL seconds, and at the
    last epoch: a kill costs at most a minute and one epoch of work."""
    INTERVAL = 60
    FREE = ("resume", "out", "device", "data_dir", "compile")             # may change on resuming
    FILES = ("log.jsonl checkpoint.pt checkpoint.previous.pt backbone.pt pretext.pt model.pt "
             "result.json clusters.csv summary.txt sheets views.png curves.png prototypes.png "
             "confusion.png correlation.png neighbours.png mixing.png agreement.png "
             "detection.json detection.png").split()

    def __init__(self, args, method, data, epochs=None, fits=lambda state: True):
        self.args, self.method, self.data, self.epochs = args, method, data, epochs or args.epochs
        self.fits = fits
        self.folder = Path(args.out or f"runs/{method}-{data.name}-seed{args.seed}")
        self.settings = {k: v for k, v in vars(args).items() if k not in self.FREE}
        self.settings.update(method=method, images=data.fingerprint)
        self.epoch, self.saved, self.log, self.state, self.seconds = 0, 0, [], {}, 0.
        self.name, other = one_line(self.folder), "choose another folder with --out"
        for place in (self.folder, *self.folder.parents):
            if os.path.lexists(place) and not place.is_dir():
                raise UserError(f"--out {self.name}: {one_line(place)} is a file or a broken link")
        held = [file for file in self.FILES if (self.folder / file).exists()]
        self.usable = [self.folder / file for file in held if file.startswith("checkpoint")]
        new = set(held) <= {"log.jsonl", "neighbours.png"} and self.no_checkpoint_was_due()
        if held and not args.resume:
            go_on = "continue that run with --resume, or " * bool(self.usable or new)
            raise UserError(f"{self.name} already holds {held[0]}: {go_on}{other}")
        if self.usable:
            self.read()
        elif not new:
            raise UserError(f"{self.name} holds {held[-1]} but no checkpoint: {other}")
        elif args.resume:
            print(f"{self.name} holds no checkpoint yet: starting from the beginning")
        if "result.json" in held:
            raise Finished(f"{self.name}: this run is complete; nothing was changed")

    def no_checkpoint_was_due(self):
        """Is log.jsonl, if there is one, of a run that was stopped before its first checkpoint?"""
        try:
            text = (self.folder / "log.jsonl").read_text()
            seconds = [json.loads(line)["seconds"] for line in text.splitlines()]
            return len(seconds) < self.epochs and sum(seconds[:-1]) <= self.INTERVAL
        except (OSError, ValueError, LookupError, TypeError) as error:
            return isinstance(error, FileNotFoundError)            # else it is of another program

    def read(self):
        """Take the newest good checkpoint. Raises UserError if none has these settings."""
        kinds = {"settings": dict, "epoch": int, "seconds": float, "log": list, "state": dict}
        while self.usable:
            try:
                saved = load_checked(self.usable[0])
                if any(not isinstance(saved[key], kind) for key, kind in kinds.items()) or \
                        [r["epoch"] for r in saved["log"]] != list(range(1, saved["epoch"] + 1)) \
                        or not math.isfinite(saved["seconds"]):
                    raise TypeError("a part of it is of another kind")
                self.compare(saved["settings"])
                if not self.fits(saved["state"]):
                    raise TypeError("a part of it does not fit the method")
                break
            except (OSError, Damaged, LookupError, TypeError, ValueError, AttributeError) as error:
                self.drop(error)
        else:
            raise UserError(f"{self.name}: no good checkpoint is left; choose another folder with "
                            f"--out")
        self.epoch = self.saved = saved["epoch"]
        self.seconds, self.log, self.state = saved["seconds"], saved["log"], saved["state"]

    def compare(self, theirs):
        """Raise UserError if these settings, of a checkpoint, are not those of this run. The first
        difference is named; those that may be the cause of others come first."""
        mine = self.settings
        paths = {os.path.realpath(str(settings.get("dataset"))) for settings in (theirs, mine)}
        if theirs.get("images") == mine["images"] or len(paths) == 1:
            theirs["dataset"] = mine.get("dataset")                # it may be written otherwise
        causes = "method pretext dataset unlabelled labelled classes fit image_size train_size"
        for key in dict.fromkeys([*causes.split(), "images", *sorted({*mine, *theirs})]):
            if theirs.get(key) != mine.get(key):
                flag = {"method": "the method", "images": "other images,"}.get(
                    key, "--" + key.replace("_", "-"))
                why = " (it shapes the learning rate)" if key == "epochs" else ""
                there, here = ("unset" if value is None or value is False else value
                               for value in (theirs.get(key), mine.get(key)))
                raise UserError(f"{self.name} was made with {flag} {there}, not {here}{why}: give "
                                f"the same, or start a new run in another folder with --out")

    def drop(self, error):
        bad = one_line(self.usable.pop(0))
        print(f"WARNING: {bad} is not good: {one_line(error).removeprefix(f'{bad}: ')}",
              file=sys.stderr)

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = locked(self.folder)
        for name in self.FILES:
            for left_by_a_kill in self.folder.glob(f"{name}.[0-9]*.tmp"):
                left_by_a_kill.unlink(missing_ok=True)
        self.saved_at = self.ended = time.time()
        return self

    def __exit__(self, kind, error, trace):
        self.lock.close()
        if error is not None and self.method != "assign" and not isinstance(error, NotFinite) and \
                (self.usable or not self.saved):                   # else no checkpoint is good
            error.resume = f"; --resume goes on after epoch {self.saved}" if self.usable else \
                "; no checkpoint was due yet, --resume starts anew"

    def restore(self, **parts):
        """Load the checkpoint into parts (networks, optimizers) by their names. -> what else it
        holds; {} at a new start. A checkpoint that does not fit is left for the one before it."""
        while self.state:
            try:
                for name, part in parts.items():
                    part.load_state_dict(self.state[name])
                    if isinstance(part, torch.optim.Optimizer):
                        try_step(part)
                break
            except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
                self.drop(error)
                self.read()
        if self.saved:
            print(f"resuming {self.name} after epoch {self.epoch}")
        write_text(self.folder / "log.jsonl", "".join(json.dumps(r) + "\n" for r in self.log))
        self.ended = time.time()
        return {name: value for name, value in self.state.items() if name not in parts}

    def end_epoch(self, record, images, **state):
        """Check, print and log the epoch, and save a checkpoint if one is due. Raises NotFinite.

        record: {loss term or gauge: value}; images: how many this epoch took in; state: networks,
        `optimizer`, tensors, plain values, all that restore() will need"""
        bad = [k for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)]
        bad += [f"a weight of {name}" for name, part in state.items() if isinstance(part, nn.Module)
                and not all(t.isfinite().all() for t in part.state_dict().values())]
        if bad:
            raise NotFinite(f"{self.method}, epoch {self.epoch + 1}: {', '.join(bad)} not finite" +
                            f"; the checkpoint after epoch {self.saved} is kept" * bool(self.saved))
        seconds, group = time.time() - self.ended, state["optimizer"].param_groups[0]
        self.epoch, self.seconds = self.epoch + 1, self.seconds + seconds
        lr = group["lr"] / group.get("factor", 1)                  # without the factor of set_lr
        self.log.append({"epoch": self.epoch, **record, "lr": lr,
                         "images_per_second": images / seconds, "seconds": seconds})
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(self.log[-1]) + "\n")
        shown = {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in record.items()}
        values = "  ".join(f"{k.replace('_', ' ')} {v}" for k, v in shown.items())
        left = duration(seconds * (self.epochs - self.epoch))
        print(f"epoch {self.epoch:>{len(str(self.epochs))}}/{self.epochs}  {values}  "
              f"{images / seconds:,.0f} images/s  {left} left", flush=True)
        if self.epoch == self.epochs or time.time() - self.saved_at >= self.INTERVAL:
            self.save(**state)
        self.ended = time.time()

    def save(self, **state):
        """Write a checkpoint now; the good one before it is kept."""
        current = self.folder / "checkpoint.pt"
        if current in self.usable:
            os.replace(current, self.folder / "checkpoint.previous.pt")
        state = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in state.items()}
        save_atomically(current, {"settings": self.settings, "epoch": self.epoch, "log": self.log,
                                  "seconds": self.seconds, "state": state})
        self.saved, self.saved_at, self.usable = self.epoch, time.time(), [current]

    def finish(self, scores, backbone, found, statistics, **more):
        """The end of a run: pictures, clusters.csv, backbone.pt and, last of all, result.json.
        scores: {name: scores}; found: the Clustering to write; more: entries of result.json"""
        save_clusters(self.folder, self.data, found, self.args.clusters or len(self.data.classes))
        save_curves(self.folder / "curves.png", self.log)
        save_atomically(self.folder / "backbone.pt", backbone.state_dict())
        device = next(backbone.parameters()).device
        result = {"method": self.method, "dataset": self.data.name, "scores": scores, **more,
                  "protocol": protocol(scores, self.data), "epochs": self.epoch,
                  "training_seconds": round(self.seconds, 1), "command": shlex.join(sys.argv),
                  "settings": self.settings, "decoding": self.data.decoding,
                  "mean": statistics[0].flatten().tolist(), "std": statistics[1].flatten().tolist(),
                  "size": self.data.train.images.shape[-1],
                  "device": torch.cuda.get_device_name() if device.type == "cuda" else
                  f"CPU, {torch.get_num_threads()} threads",
                  "versions": {"python": sys.version.split()[0], "torch": torch.__version__,
                               "torchvision": torchvision.__version__}}
        valid = json.loads(json.dumps(result), parse_constant=lambda _: None)     # no NaN in JSON
        write_text(self.folder / "result.json", json.dumps(valid, indent=1) + "\n")
        files = sorted(f.name for f in self.folder.glob("[!.]*"))
        print(f"\n{duration(self.seconds)} of training, {duration(time.time() - self.ended)} for "
              f"the report. {self.name} holds {', '.join(files)}")


# ------------------------------------------------------------------------------------------------
# 10. Pictures, and clusters.csv

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


def heatmap(matrix, rows=(), title=""):
    """A matrix as a PIL image, from blue (-1) over white (0) to red (1), with names of rows."""
    m = np.asarray(matrix, np.float64)
    cell, top, font = max(2, 320 // max(m.shape)), 24, ImageFont.load_default(12)
    picture = Image.fromarray((127 + 128 * m).clip(0, 255).astype(np.uint8))
    picture = picture.resize((m.shape[1] * cell, m.shape[0] * cell), Image.Resampling.NEAREST)
    left = int(max((font.getlength(str(name)) for name in rows), default=0)) + 8
    width = max(left + picture.width, int(font.getlength(title))) + 6
    sheet = Image.new("RGB", (width, top + picture.height + 2), "white")
    sheet.paste(ImageOps.colorize(picture, "#2633ff", "#ff3326", "white"), (left, top))
    pen = ImageDraw.Draw(sheet)
    pen.text((2, 4), title, fill="black", font=font)
    for i, name in enumerate(rows):
        pen.text((left - 4, top + (i + .5) * cell), str(name), fill="black", font=font, anchor="rm")
    return sheet


def beside(*pictures, columns=None):
    """PIL images on white, in rows of `columns` (by default all in one row)."""
    columns = columns or len(pictures)
    width, height = (max(side) + 8 for side in zip(*(picture.size for picture in pictures)))
    across, down = min(columns, len(pictures)), math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (across * width - 8, down * height - 8), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet


def save_views(path, raw, views, statistics):
    """What the network was fed: a column for each image, the raw one on top, its views below."""
    mean, std = (s.to(raw.device) for s in statistics)
    rows = [raw] + [view.float() * std + mean for view in views]
    save_picture(path, grid(torch.cat(rows), len(raw), side=64))


def surest(clusters, confidence, c):
    """Indices of the images in cluster c, the most confident first. clusters, confidence (N,)"""
    members = (clusters == c).nonzero().flatten()
    return members[confidence[members].argsort(descending=True, stable=True)]


def save_clusters(folder, data, found, clusters):
    """clusters.csv: the cluster of every image. prototypes.png: the ten most confident test images
    of each cluster, a row each, up to 40 clusters. With labels confusion.png, each class's share in
    each cluster. For a folder of images sheets/ and summary.txt."""
    table = io.StringIO(newline="")
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["image", "cluster", "confidence"])
    parts = [(data.train, found.train, found.train_confidence),
             (data.test, found.test, found.test_confidence)]
    for split, cluster, sure in parts[:1 + data.has_test]:
        names = [os.fsencode(name).decode("utf-8", "backslashreplace") for name in split.names]
        rows.writerows(zip(names, cluster.tolist(), (f"{p:.4f}" for p in sure.tolist())))
    write_text(folder / "clusters.csv", table.getvalue())
    sheet = data.test.images.new_full((min(clusters, 40), 10, *data.test.images.shape[1:]), 255)
    for c, row in enumerate(sheet):
        best = surest(found.test, found.test_confidence, c)[:10]
        row[:len(best)] = data.test.images[best]
    save_picture(folder / "prototypes.png", grid(sheet.flatten(0, 1), 10))
    if data.decoding:
        save_sheets(folder, data, found, clusters)
    if data.classes and clusters <= 200:
        table = contingency(data.test.labels, found.test, len(data.classes), clusters)
        order = np.lexsort((-table.max(0), table.argmax(0)))       # clusters beside their class
        share = table[:, order] / table.sum(1, keepdims=True).clip(1)
        save_picture(folder / "confusion.png", heatmap(
            share, data.classes if len(data.classes) <= 32 else (),
            title="share of each class (row) in each cluster (column)"))


def save_sheets(folder, data, found, clusters):
    """sheets/cluster-*.png, the hundred most confident images of each cluster, or all that it has,
    and summary.txt, how balanced and how confident the clusters are. Test images are among them."""
    train, lines = data.train.images, ["cluster  images   share  mean confidence"]
    sure, cluster = found.train_confidence, found.train
    if data.has_test:
        sure, cluster = torch.cat([sure, found.test_confidence]), torch.cat([cluster, found.test])
    size = torch.bincount(cluster, minlength=clusters)
    share = size / size.sum()
    (folder / "sheets").mkdir(exist_ok=True)
    for c in range(clusters):
        best = surest(cluster, sure, c)
        mean = f"{sure[best].mean():.2f}" if len(best) else "-"
        lines.append(f"{c:7}{len(best):8,}{share[c]:8.1%}{mean:>17}")
        if len(best):
            shown = [(train[i] if i < len(train) else data.test.images[i - len(train)])
                     for i in best[:100].tolist()]
            picture = grid(torch.stack(shown), min(10, len(best)), 96)
            save_picture(folder / "sheets" / f"cluster-{c:03}.png", picture)
    lines += ["", f"Balance: of {len(sure):,} images the largest cluster holds {share.max():.0%}, "
              f"the smallest {share.min():.1%}; {(size == 0).sum()} of {clusters} are empty.",
              "Are groups mixed? Train again with more --clusters, and join sheets by eye.",
              "Confidence says how decided a cluster is, not how right.",
              f"Look at {folder / 'sheets'}, then at {folder / 'clusters.csv'}."]
    write_text(folder / "summary.txt", "\n".join(lines) + "\n")
    print("\n" + "\n".join(lines))


def save_curves(path, log, width=320, height=120):
    """A small panel for each loss term and gauge of the log, epoch by epoch."""
    panels, font = [], ImageFont.load_default(11)
    for name in dict.fromkeys(k for r in log for k in r if k not in ("epoch", "seconds")):
        points = [(r["epoch"], r[name]) for r in log if isinstance(r.get(name), (int, float))]
        if not points:
            continue
        panel = Image.new("RGB", (width, height), "white")
        pen, values = ImageDraw.Draw(panel), [v for _, v in points]
        low, high = min(values), max(values)
        xy = [(6 + (e - log[0]["epoch"]) / max(1, len(log) - 1) * (width - 12),
               height - 8 - (v - low) / max(high - low, 1e-12) * (height - 34)) for e, v in points]
        pen.line(xy, fill="steelblue", width=2)
        for x, y in xy if len(xy) <= 20 else ():
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill="steelblue")
        pen.text((6, 3), f"{name.replace('_', ' ')}: {low:.4g} to {high:.4g}, at last "
                 f"{values[-1]:.4g}", fill="black", font=font)
        panels.append(panel)
    save_picture(path, beside(*panels, columns=3))
