r"""SCAN: Learning to Classify Images without Labels

W. Van Gansbeke, S. Vandenhende, S. Georgoulis, M. Proesmans, L. Van Gool. ECCV 2020.
https://arxiv.org/abs/2005.12320

The idea. Features and clusters learned together latch on to colour and texture; so the task is cut
in three. A pretext task brings every image close to its own augmentations. The nearest neighbours
in that space mostly show the same kind of thing: they are taught to fall in the same cluster, while
all clusters stay in use. Last, the network learns from the images it is sure of.

    step 1         image -> two views -> backbone, projection -> z1, z2 -> NT-Xent
                   then the K nearest neighbours of each image are mined, once

    step 2         image ----------- strong -> backbone, head -> softmax p \   <p, q> to 1,
                   its neighbour --- strong -> backbone, head -> softmax q /   mean p to uniform

    step 3         image ----------- as it is -> p, kept where max p > .99 -> pseudo-label y
                         \---------- strong ----> p -> cross-entropy with y

    paper        in the code              shape       meaning
    Phi          backbone, head                       network; its head changes from step to step
    z            z1, z2                   B x 128     embeddings of step 1, unit length
    N_X          neighbours               N x (1+K)   the image itself first; K is --neighbours
    C            clusters                             how many; K where it is a shape
    Phi(X)       p, from anchor logits    B x K       cluster probabilities of an image
    Phi(k)       q, from neighbour logits B x K       ... of one neighbour of it
    lambda       --entropy-weight                     5 everywhere

Differences from the paper, its released code included
    D1  The release keeps the epoch and head of the lowest loss on the test images, without their
        labels. Here the training images choose; --select test does as released.
    D2  The learning rate of step 1 falls to 0 by the step, there to a thousandth by the epoch.
    D3  The strong augmentation's random crop is left out: without padding it crops nothing from an
        image that has the network's size. All the rest of it is as released.
    D4  A batch of step 3 without any confident image is skipped and counted; the release stops with
        an error. Step 3 ends when the confident share has not grown for --patience epochs (paper:
        on a plateau; release: never, which is --patience 0).
    D5  More clusters than classes: each cluster takes the class of most of its training images. In
        the release the surplus clusters silently count as class 0.
    D6  With --pretext, neighbours are mined on backbone features: the file has no projection.
    D7  Every batch is whole. Images are normalised with the dataset's own statistics.
    D8  On `shapes` and folders step 1 uses Adam, on `shapes` also the symmetric loss and more grey
        views, and K is 166, see the note.
    D9  The ImageNet protocol, heads alone on a frozen MoCo backbone, is not here.
    D10 Pseudo-labels come from a pass in eval mode; --weak-pass train does as released, see the
        note.

    python scan.py                                     # shapes, on a laptop
    python scan.py --dataset cifar10                   # 500 + 50 + 200 epochs, as released
    python scan.py --dataset ~/photos --clusters 12    # your own images, without labels

    ACC on test                   shapes, --seed 0, 1, 2    CIFAR-10 (JPEG), 10,000 images (README)
    k-means on the pretext's h    .962   .846   .959        .276
    after the SCAN loss          1.000   .997   .997        .308
    after self-labelling         1.000   .999   .999        .291
    (4 min each on one CPU core; the fresh seed 3: .981, 1.000, 1.000; CIFAR-10 --weak-pass train)

    From an earlier pretext (.284; --pretext RUN/pretext.pt), after step 2: --neighbours 0, 5, 20,
    50 .250 .274 .295 .305, as in the paper, although only 30 % of the 20 are of the same class;
    with --clusters 20, by majority vote, .310; with --true-neighbours .284, unlike the paper, whose
    networks and epochs are far larger.

Note: what self-labelling needs is a right and confident hand-over.
    Right: with the 20 nearest neighbours, discs and squares at times share two clusters and stars
    and crosses two more, each split by something else (ACC .81, seeds 1 and 2), sure of themselves;
    no self-labelling can undo that. With 166 it did not happen; --heads 5, at 20, did not help.
    Confident, in every cluster: else the others swallow it. Step 2 gets there with lr 1e-3 in place
    of the released 1e-4. BatchNorm in train mode normalises plain images by their own statistics,
    not by those of the strong views that the weights know. Default, seed 1: in train mode 52 % of
    the images were above .99 in the first epoch, and .997 fell to .918; in eval mode 75 %, and it
    rose to .999 (D10). A cluster that has hardly an image above .99 is still lost at times: a
    warning tells of it. Weak views (--self-label-views simclr), on the backbone of identitize.py:
    1.000 falls to .997 and does not collapse; with strong ones it stays 1.000.
Not run: the paper's lengths, a GPU.
"""
import copy
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn

from common import (NAMES, Clock, Clustering, Meter, Parser, Run, UserError, adjust_brightness,
                    adjust_contrast, adjust_saturation, autocast, baselines, batches, beside,
                    check_sizes, cluster_scores, color_jitter, cosine_lr, describe, embed, evaluate,
                    fast_dtype, fetch, generator, grid, load_dataset, normalise, number, on_cpu,
                    pick_device, pixel_statistics, print_row, print_scores, random_grayscale,
                    random_resized_crop, read_backbone, resnet18, run_script, save_atomically,
                    save_cluster_pictures, save_picture, save_views, set_lr, step, subset,
                    to_device)

# ------------------------------------------------------------------------------------------------
# 1. The losses (Sec. 2.1, 2.2, 2.3), one for each step


def nt_xent_loss(z1, z2, temperature, symmetric=False):
    """L = -1/B sum_i log[ e(z1_i.z2_i) / (sum_j e(z1_i.z2_j) + sum_{j != i} e(z1_i.z1_j)) ],
    e(s) = exp(s / tau)

    z1, z2: (B, D) embeddings of two views, unit length: one positive, 2(B - 1) negatives. Only view
    1 is an anchor, as released; symmetric: the mean of both sides, as in SimCLR's own paper. Lower
    is better: ln(2B - 1) when all embeddings coincide, ln(1 + 2(B - 1) exp(-1 / tau)) when views
    agree and images are orthogonal."""
    itself = torch.eye(len(z1), dtype=torch.bool, device=z1.device)
    positive = torch.arange(len(z1), device=z1.device)
    across = z1 @ z2.t() / temperature                                          # BxB
    within = (z1 @ z1.t() / temperature).masked_fill(itself, -math.inf)         # BxB
    loss = F.cross_entropy(torch.cat([across, within], 1), positive)
    if symmetric:
        within = (z2 @ z2.t() / temperature).masked_fill(itself, -math.inf)
        loss = (loss + F.cross_entropy(torch.cat([across.t(), within], 1), positive)) / 2
    return loss


def scan_loss(anchor_logits, neighbour_logits, entropy_weight):
    """Eq. (2): L = -1/B sum_i log <p_i, q_i> + lambda sum_c p'_c log p'_c,   p' = 1/B sum_i p_i

    anchor_logits, neighbour_logits: (B, K), before the softmaxes p and q; row i of the second is of
    a neighbour of row i of the first. -> (total, consistency, entropy), total = consistency
    - lambda entropy, consistency >= 0, 0 <= entropy <= ln K. Lower is better, and below zero by
    nature: with lambda 5, -4 ln K where every p is uniform, -5 ln K at best, where neighbours agree
    surely and all clusters are equal. Finite for any finite logits."""
    log_p, log_q = F.log_softmax(anchor_logits, 1), F.log_softmax(neighbour_logits, 1)
    consistency = -(log_p + log_q).logsumexp(1).mean()
    log_mean = log_p.logsumexp(0) - math.log(len(log_p))                        # log p', K
    entropy = -(log_mean.exp() * log_mean).sum()
    return consistency - entropy_weight * entropy, consistency, entropy


def self_label_loss(weak_logits, strong_logits, threshold):
    """L = mean over clusters c present of mean over {i kept, y_i = c} of -log softmax(strong_i)_c

    y_i = argmax softmax(weak_i); i is kept if that maximum > threshold. The same as cross-entropy
    with weights inverse to the counts of the clusters among the kept. weak_logits, strong_logits:
    (B, K); no gradient flows to the weak ones. -> (loss, number kept). Lower is better, >= 0; 0,
    with a zero gradient, where nothing is kept."""
    sure, label = weak_logits.detach().softmax(1).max(1)
    kept = sure > threshold
    member = F.one_hot(label, weak_logits.shape[1]) * kept[:, None]             # BxK
    count = member.sum(0)
    each = F.cross_entropy(strong_logits, label, reduction="none")              # B
    per_cluster = (member * each[:, None]).sum(0) / count.clamp(min=1)          # K
    return per_cluster.sum() / (count > 0).sum().clamp(min=1), kept.sum()


# ------------------------------------------------------------------------------------------------
# 2. The network

class Network(nn.Module):
    """Backbone and the head of a step. Images (B, 3, H, W) -> its output, float32"""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x):
        h = self.backbone(x)
        with torch.autocast(h.device.type, enabled=False):
            return self.head(h.float())


def projection(features, dim=128):
    """Step 1: two layers with biases, no BatchNorm; dropped afterwards. (B, 8w) -> (B, 128)"""
    return nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, dim))


def cluster_heads(features, heads, clusters):
    """Steps 2 and 3: H linear heads in one product. (B, 8w) -> logits (B, H, K)"""
    logits = nn.Linear(features, heads * clusters)
    return nn.Sequential(logits, nn.Unflatten(1, (heads, clusters)))


# ------------------------------------------------------------------------------------------------
# 3. The views, SimCLR's for step 1 and strong ones for steps 2 and 3, and the neighbours. A strong
#    operation takes images (B, 3, H, W) in [0, 1] and a magnitude for each, (B, 1, 1, 1).

def auto_contrast(x, _):
    """Stretch each channel of each image to the whole range; a flat channel stays."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp(min=1e-6), x)


def equalize(x, _):
    """Pillow's integer rule: from its histogram a lookup table for each channel of each image."""
    level = (x * 255).round().long().flatten(2).flatten(0, 1)                   # (3B, HW)
    count = level.new_zeros(len(level), 256).scatter_add_(1, level, torch.ones_like(level))
    last = count.gather(1, level.amax(1, keepdim=True))            # the brightest is not spread
    stride = (count.sum(1, keepdim=True) - last) // 255
    table = (stride // 2 + count.cumsum(1) - count) // stride.clamp(min=1)
    out = table.clamp_(max=255).gather(1, level)
    return (torch.where(stride > 0, out, level).float() / 255).view_as(x)


def solarize(x, threshold):
    """Invert what is at least as bright as threshold, of 256 levels."""
    return torch.where(x * 255 >= threshold, 1 - x, x)


def posterize(x, bits):
    """Keep the leading bits of 8; bits is rounded down."""
    width = 2 ** (8 - bits.floor())
    return ((x * 255).round() / width).floor() * width / 255


def sharpness(x, factor):
    """Blend with the image smoothed by (1 1 1, 1 5 1, 1 1 1) / 13; the border stays."""
    smooth, rows = x.clone(), x[..., :-2] + x[..., 1:-1] + x[..., 2:]
    nine = rows[..., :-2, :] + rows[..., 1:-1, :] + rows[..., 2:, :]
    smooth[..., 1:-1, 1:-1] = (nine + 4 * x[..., 1:-1, 1:-1]) / 13
    return torch.lerp(smooth, x, factor).clamp_(0, 1)


def warp(x, a, b, c, d, e, f):
    """Pixel (u, v) shows input pixel (a u + b v + c, d u + e v + f); nearest, black outside.
    Coefficients: numbers or (B, 1, 1)."""
    _, channels, height, width = x.shape
    u = torch.arange(width, device=x.device) + .5
    v = torch.arange(height, device=x.device)[:, None] + .5
    s, t = (a * u + b * v + c).floor().long(), (d * u + e * v + f).floor().long()   # (B or 1, H, W)
    inside = ((s >= 0) & (s < width) & (t >= 0) & (t < height))[:, None]
    source = (t.clamp(0, height - 1) * width + s.clamp(0, width - 1)).flatten(1)[:, None]
    return x.flatten(2).gather(2, source.expand(-1, channels, -1)).view_as(x) * inside


def rotate(x, degrees):
    """About the centre, counter-clockwise."""
    turn = degrees[:, 0] * (math.pi / 180)
    cos, sin, u, v = turn.cos(), turn.sin(), x.shape[-1] / 2, x.shape[-2] / 2
    return warp(x, cos, -sin, u - cos * u + sin * v, sin, cos, v - sin * u - cos * v)


OPERATIONS = (                            # name, function, range of its magnitude (uniform)
    ("Identity", lambda x, m: x, 0, 0), ("AutoContrast", auto_contrast, 0, 0),
    ("Equalize", equalize, 0, 0), ("Rotate", rotate, -30, 30), ("Solarize", solarize, 0, 256),
    ("Color", adjust_saturation, .05, .95), ("Contrast", adjust_contrast, .05, .95),
    ("Brightness", adjust_brightness, .05, .95), ("Sharpness", sharpness, .05, .95),
    ("ShearX", lambda x, m: warp(x, 1, m[:, 0], 0, 0, 1, 0), -.1, .1),
    ("ShearY", lambda x, m: warp(x, 1, 0, 0, m[:, 0], 1, 0), -.1, .1),
    ("TranslateX", lambda x, m: warp(x, 1, 0, m[:, 0] * x.shape[-1], 0, 1, 0), -.1, .1),
    ("TranslateY", lambda x, m: warp(x, 1, 0, 0, 0, 1, m[:, 0] * x.shape[-2]), -.1, .1),
    ("Posterize", posterize, 4, 8))


def random_operations(x, rng, count=4):
    """`count` operations in a row, each image its own, drawn with replacement. Images that drew the
    same one are worked on together: the only loop is over operations."""
    n, x = len(x), x.clone()
    for _ in range(count):
        drawn, place = torch.randint(14, (n,), generator=rng), torch.rand(n, generator=rng)
        for i, (_, operation, low, high) in enumerate(OPERATIONS):
            rows = (drawn == i).nonzero().flatten()
            if i and len(rows):
                magnitude = (low + (high - low) * place[rows]).to(x.device)
                rows = rows.to(x.device)                           # index_select: faster than []
                some = operation(x.index_select(0, rows), magnitude[:, None, None, None])
                x.index_copy_(0, rows, some)
    return x


def cutout(x, longest, rng):
    """Set a square of each image, side uniform in 1..longest, centre anywhere, to 0. x is
    normalised already, so this is the mean colour and not black."""
    n, _, height, width = x.shape
    side = torch.randint(1, longest + 1, (n, 1), generator=rng)
    top = torch.randint(height, (n, 1), generator=rng) - side // 2
    left = torch.randint(width, (n, 1), generator=rng) - side // 2
    side, top, left = torch.stack([side, top, left]).to(x.device)               # Bx1 each
    v, u = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    rows = (v >= top) & (v < top + side)                                        # BxH
    columns = (u >= left) & (u < left + side)                                   # BxW
    return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


def make_views(args, size, statistics):
    """-> {name: function of (raw images (B, 3, H, W) in [0, 1], generator) -> a view of each}"""
    def none(x, rng):
        return normalise(x, statistics)

    def simclr(x, rng):                                            # no blur, as released
        s, x = args.jitter, random_resized_crop(x, size, (args.crop, 1), rng)   # and flip, p .5
        x = color_jitter(x, .8 * s, .8 * s, .8 * s, .2 * s, rng, p=.8)
        return normalise(random_grayscale(x, args.gray, rng), statistics)

    def strong(x, rng):
        flipped = (torch.rand(len(x), generator=rng) < .5).to(x.device)[:, None, None, None]
        x = random_operations(torch.lerp(x, x.flip(3), flipped.float()), rng)
        return cutout(normalise(x, statistics), args.cutout, rng)
    return {"none": none, "simclr": simclr, "strong": strong}


@torch.no_grad()
def mine(z, k):
    """The k nearest of each row of z (N, D), unit length, by exact inner product. -> (N, 1 + k),
    the row itself first: step 2 draws from all, so at times an image is its own neighbour."""
    rows, found = torch.arange(len(z), device=z.device), []
    for some in rows.split(2048):
        similarity = z[some] @ z.t()
        similarity[some - some[0], some] = -math.inf               # not itself; a twin may be
        found.append(similarity.topk(k, 1).indices)
    return torch.cat([rows[:, None], torch.cat(found)], 1).cpu()


def only_true(neighbours, labels):
    """The neighbours with their anchor's label, repeated to fill the row. (N, 1 + K) -> same"""
    right = labels[neighbours] == labels[:, None]
    order = (~right).int().argsort(dim=1, stable=True)             # the right ones first
    turn = torch.arange(neighbours.shape[1]) % right.sum(1, keepdim=True)
    return neighbours.gather(1, order.gather(1, turn))


# ------------------------------------------------------------------------------------------------
# 4. Hyper-parameters

LARGE = dict(batch_size=256, lr=.2, cluster_epochs=100, self_label_epochs=100, self_label_batch=512)
DEFAULTS = {                              # where they differ from the flags' defaults, CIFAR-10's
    "shapes": dict(epochs=15, batch_size=64, optimizer="adam", lr=2e-3, weight_decay=1e-6,
                   nt_xent="symmetric", width=16, stem_stride=2, crop=.4, jitter=1., gray=.6,
                   cluster_epochs=12, cluster_lr=1e-3, self_label_epochs=15, self_label_batch=250),
    "cifar20": dict(cluster_epochs=100, cluster_batch=512),
    "cifar100": dict(cluster_epochs=100, cluster_batch=512),
    "stl10": dict(cluster_epochs=100, self_label_epochs=100),
    "tiny-imagenet": dict(cluster_epochs=100, cluster_batch=1024),
    "imagenet10": LARGE, "imagenet-dogs": LARGE,
    "folder": dict(epochs=200, batch_size=None, optimizer="adam", lr=1e-3, width=32, stem_stride=2,
                   self_label_epochs=50, self_label_batch=250),
}


def parse(argv=None):
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    # The same in all four scripts.
    add("--dataset", default="shapes", help="shapes, cifar10, cifar100, cifar20, fashion-mnist, "
        "stl10, tiny-imagenet, imagenet10, imagenet-dogs, or the path of a folder of images")
    add("--data-dir", default="data", help="downloads and decoded folders; for imagenet10 and "
        "imagenet-dogs the ImageNet folder")
    add("--image-size", type=number(int, 8, 1024), help="side in pixels; else the dataset's own")
    add("--train-size", type=number(int, 2), help="learn from this many images, a balanced part")
    add("--clusters", type=number(int, 2), help="clusters to report; else the number of classes")
    add("--epochs", type=number(int, 1), default=500, help="passes over the training images")
    add("--batch-size", type=number(int, 2), default=512, help="B, images of a step")
    add("--lr", type=number(float, 0, above=True), default=.4, help="peak learning rate")
    add("--weight-decay", type=number(float, 0), default=1e-4, help="L2 weight decay")
    add("--width", type=number(int, 1, 512), default=64, help="channels of ResNet-18's first stage")
    add("--stem-stride", type=number(int, 1, 2), default=1, help="2: a cheaper stem for laptops")
    add("--seed", type=number(int, 0), default=0, help="of everything random")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
    add("--out", help="run folder; else runs/<method>-<dataset>-seed<seed>")
    add("--resume", action="store_true", help="continue the run in the run folder")
    add("--compile", action="store_true", help="torch.compile the network; slower to start")
    # The method's own. Step 1, whose epochs, batch size and learning rate are those above:
    add("--crop", type=number(float, 0, 1, above=True), default=.2, help="smallest share of area")
    add("--jitter", type=number(float, 0, 1), default=.5, help="s, colour jitter .8s .8s .8s .2s")
    add("--gray", type=number(float, 0, 1), default=.2, help="probability of a grey view")
    add("--temperature", type=number(float, 0, above=True), default=.1, help="tau of NT-Xent")
    add("--optimizer", choices=("sgd", "adam"), default="sgd", help="of step 1; sgd: as released")
    add("--nt-xent", choices=("one-sided", "symmetric"), default="one-sided",
        help="anchors of step 1: view 1 alone, as released, or both")
    add("--pretext", metavar="FILE", help="instead of step 1: the backbone.pt of any script's run")
    # step 2:
    add("--neighbours", type=number(int, 0), help="K, mined for an image; 0: only itself; else 20, "
        "on shapes 200, or a third of the mean cluster if that is less")
    add("--true-neighbours", action="store_true", help="drop false ones BY THEIR LABELS: an upper "
        "bound, no longer unsupervised")
    add("--entropy-weight", type=number(float, 0), default=5., help="lambda of Eq. (2); makes the "
        "loss negative by nature: (1 - lambda) ln K when undecided, -lambda ln K at best")
    add("--heads", type=number(int, 1), default=1, help="cluster heads; the lowest loss is kept")
    add("--select", choices=("train", "test"), default="train", help="images whose loss, without "
        "labels, chooses epoch and head; test: as released (D1)")
    add("--cutout", type=number(int, 1), help="longest side; else half of the image, a third from "
        "65 px on")
    add("--cluster-epochs", type=number(int, 1), default=50, help="epochs of step 2")
    add("--cluster-batch", type=number(int, 2), default=128, help="B of step 2; at most all")
    add("--cluster-lr", type=number(float, 0, above=True), default=1e-4, help="of step 2")
    # step 3:
    add("--threshold", type=number(float, 0, 1), default=.99, help="of confidence, exclusive")
    add("--weak-pass", choices=("eval", "train"), default="eval", help="BatchNorm of the pass that "
        "gives pseudo-labels; train, the batch's own statistics: as released (D10)")
    add("--self-label-views", choices=("strong", "simclr"), default="strong", help="simclr: an "
        "ablation; the paper reports that it collapses")
    add("--self-label-epochs", type=number(int, 0), default=200, help="epochs of step 3, 0: none")
    add("--self-label-batch", type=number(int, 2), default=1000, help="B of step 3; at most all")
    add("--self-label-lr", type=number(float, 0, above=True), default=1e-4, help="of step 3")
    add("--patience", type=number(int, 0), default=10, help="end step 3 when the confident share "
        "has not grown by .001 in so many epochs; 0: never, as released (D4)")
    dataset = parser.parse_known_args(argv)[0].dataset
    parser.set_defaults(**DEFAULTS.get(dataset if dataset in NAMES else "folder", {}))
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------
# 5. Training. `kept` is what a checkpoint holds: the stage, its network and optimizer, and what the
#    stages before it handed over. A resumed run enters the stage that it finds there.

def begin(args, kept, net, optimizer, device):
    """Weights that were handed over or interrupted, if any. -> the network to call, a clock"""
    if "net" in kept:
        net.load_state_dict(kept["net"])
    if "optimizer" in kept:
        optimizer.load_state_dict(kept["optimizer"])
    return torch.compile(net) if args.compile else net, Clock(device)


def pretext(args, run, kept, backbone, images, views, device):
    """Step 1, Eq. (1): an image and its augmentations lie close. -> the network that embeds z"""
    torch.manual_seed(args.seed)
    net = Network(backbone, projection(8 * args.width)).to(device)
    kind, more = {"sgd": (torch.optim.SGD, {"momentum": .9}), "adam": (torch.optim.Adam, {})}[
        args.optimizer]
    optimizer = kind(net.parameters(), args.lr, weight_decay=args.weight_decay, fused=True, **more)
    forward, clock = begin(args, kept, net, optimizer, device)
    index, per_epoch = torch.arange(len(images)), len(images) // args.batch_size

    def two(x, rng):
        return views["simclr"](x, rng), views["simclr"](x, rng)
    for epoch in range(run.epoch, args.epochs):
        meter = Meter(f"pretext, epoch {epoch + 1}", optimizer, per_epoch)
        rng = generator(args.seed, epoch, "pretext")
        for i, (_, x1, x2) in enumerate(
                batches(images, index, args.batch_size, two, rng, device, clock)):
            at = epoch * per_epoch + i
            set_lr(optimizer, args.lr * cosine_lr(at, per_epoch * args.epochs))
            with autocast(device):                                 # one pass: BatchNorm sees both
                z1, z2 = F.normalize(forward(torch.cat([x1, x2])), dim=1).chunk(2)      # BxD each
            loss = nt_xent_loss(z1, z2, args.temperature, args.nt_xent == "symmetric")
            step(optimizer, loss)
            meter.add(loss=loss)
        run.end_epoch({"stage": "pretext", **meter.means()}, per_epoch * args.batch_size, clock,
                      optimizer, {**kept, "net": net.state_dict(),
                                  "optimizer": optimizer.state_dict()})
    return net


@torch.no_grad()
def full_loss(logits, neighbours):
    """Eq. (2) with lambda 1 over all pairs of a split, which chooses epoch and head (D1).
    logits (N, H, K), neighbours (N, J) -> (3, H): total, consistency, entropy of each head"""
    columns = neighbours.to(logits.device).t()
    return torch.stack([torch.stack([torch.stack(scan_loss(one, one[column], 1.))
                                     for column in columns]).mean(0)
                        for one in logits.unbind(1)], 1)


def cluster(args, run, kept, net, images, judge, statistics, views, device):
    """Step 2, Eq. (2): neighbours share a cluster. judge: images, their neighbours and, for print
    alone, labels. -> {"epoch", "head", "loss", "net"} of the lowest loss on those images"""
    optimizer = torch.optim.Adam(net.parameters(), args.cluster_lr, fused=True,
                                 weight_decay=args.weight_decay)
    forward, clock = begin(args, kept, net, optimizer, device)
    best = kept.get("best", {"loss": math.inf})
    batch, neighbours = min(args.cluster_batch, len(images)), kept["neighbours"].long()

    def pair(x, rng):                                              # x (B, 2, 3, H, W)
        return views["strong"](x[:, 0], rng), views["strong"](x[:, 1], rng)
    for epoch in range(run.epoch - kept["began"], args.cluster_epochs):
        meter = Meter(f"cluster, epoch {epoch + 1}", optimizer, len(images) // batch)
        rng = generator(args.seed, epoch, "cluster")
        drawn = torch.randint(neighbours.shape[1], (len(images), 1), generator=rng)
        index = torch.cat([neighbours[:, :1], neighbours.gather(1, drawn)], 1)             # Nx2
        for _, x1, x2 in batches(images, index, batch, pair, rng, device, clock):
            with autocast(device):                                 # two passes: BatchNorm sees
                p, q = forward(x1), forward(x2)                    # each alone;         BxHxK each
            heads = [torch.stack(scan_loss(p[:, h], q[:, h], args.entropy_weight))
                     for h in range(args.heads)]
            loss, consistency, entropy = torch.stack(heads).sum(0)
            step(optimizer, loss)
            meter.add(loss=loss, consistency=consistency, entropy=entropy)
        logits = embed(net, judge[0], statistics, device)                                  # NxHxK
        full = full_loss(logits, judge[1]).cpu()
        head = int(full[0].argmin())
        sure, found = logits[:, head].softmax(1).max(1)
        record = {"stage": "cluster", **meter.means(), "full_loss": full[0, head].item(),
                  "full_consistency": full[1, head].item(), "full_entropy": full[2, head].item(),
                  "confident": (sure > args.threshold).float().mean().item(),
                  "clusters": len(found.unique())}
        if judge[2] is not None:
            record["acc"] = cluster_scores(judge[2], found.cpu())["acc"]
        if record["full_loss"] < best["loss"]:
            best = {"epoch": epoch + 1, "head": head, "loss": record["full_loss"],
                    "net": copy.deepcopy(net.state_dict())}
        run.end_epoch(record, len(images) // batch * batch, clock, optimizer, {
            **kept, "best": best, "net": net.state_dict(), "optimizer": optimizer.state_dict()})
    return best


def plateau(log, patience):
    """Has the confident share not grown by .001 over the last `patience` epochs of step 3?"""
    shares = [record["confident"] for record in log if record["stage"] == "self-label"]
    return 0 < patience < len(shares) and max(shares[-patience:]) < max(shares[:-patience]) + .001


def self_label(args, run, kept, net, images, labels, views, device):
    """Step 3, Sec. 2.3: what the network is sure of teaches it strong views. labels: for print."""
    optimizer = torch.optim.Adam(net.parameters(), args.self_label_lr, fused=True,
                                 weight_decay=args.weight_decay)
    forward, clock = begin(args, kept, net, optimizer, device)
    batch = min(args.self_label_batch, len(images))

    def pair(x, rng):
        return views["none"](x, rng), views[args.self_label_views](x, rng)
    for epoch in range(run.epoch - kept["began"], args.self_label_epochs):
        if plateau(run.log, args.patience):
            return
        meter = Meter(f"self-label, epoch {epoch + 1}", optimizer, len(images) // batch)
        rng, skipped = generator(args.seed, epoch, "self-label"), 0
        found = torch.full((len(images),), -1)
        for part, weak, strong in batches(
                images, torch.arange(len(images)), batch, pair, rng, device, clock):
            with autocast(device):
                net.train(args.weak_pass == "train")               # D10
                with torch.no_grad():
                    weak = forward(weak)[:, 0]                                          # BxK
                net.train()
                strong = forward(strong)[:, 0]                                          # BxK
            loss, confident = self_label_loss(weak, strong, args.threshold)
            if confident:                                          # the one synchronisation
                step(optimizer, loss)
            skipped += int(confident == 0)
            meter.add(loss=loss, confident=confident / batch)
            found[part] = weak.argmax(1).cpu()
        seen = found >= 0
        record = {"stage": "self-label", **meter.means(), "skipped": skipped,
                  "clusters": len(found[seen].unique())}
        if labels is not None:
            record["acc"] = cluster_scores(labels[seen], found[seen])["acc"]
        run.end_epoch(record, len(images) // batch * batch, clock, optimizer, {
            **kept, "net": net.state_dict(), "optimizer": optimizer.state_dict()})


def scored(name, table, net, run, clusters, statistics, device):
    """After a step: -> its Clustering; pictures; with labels a row for the table."""
    data, p = run.data, []
    for split in (data.train, data.test) if data.has_test else (data.train,):
        p.append(embed(net, split.images, statistics, device)[:, 0].softmax(1).max(1))
    p = [p[0], p[-1]]
    found = Clustering(*(q.indices.cpu() for q in p), *(q.values.cpu() for q in p))
    save_cluster_pictures(run.folder, data, found)
    lost = clusters - len(found.train.unique())
    if lost:
        print(f"WARNING: {lost} of {clusters} clusters are empty after step {name}; step 3 cannot "
              f"bring them back. Give step 2 more epochs, or ask for fewer --clusters")
    if data.classes:
        seen, over = data.train.labels >= 0, data.has_test and clusters > len(data.classes)
        votes = (data.train.labels[seen], found.train[seen]) if over else None
        table[name] = cluster_scores(data.test.labels, found.test, votes)
        print_row(name, table[name])
    return found


def warn_of_unsure_clusters(found, clusters, threshold):
    """Before step 3, which may lose a cluster with hardly any confident image: see the note."""
    sure = found.train[found.train_confidence > threshold]
    unsure = (torch.bincount(sure, minlength=clusters)
              < .05 * torch.bincount(found.train, minlength=clusters)).sum()
    if unsure:
        print(f"WARNING: in {unsure} of {clusters} clusters fewer than 5 % of the images are above "
              f"--threshold {threshold}: step 3 may lose them; --self-label-epochs 0 leaves it out")


def hand_over(args, run, net, learn, labels, part, clusters, statistics, device):
    """From step 1 to 2: k-means on the features for comparison, and the neighbours, mined once.
    They live in the checkpoint, so they are never stale. Labels serve print and one ablation."""
    data, kept = run.data, {"neighbour_accuracy": {}}
    h = [embed(net.backbone, s.images, statistics, device) for s in (data.train, data.test)]
    if not args.pretext:                                           # for --pretext: steps 2 and 3
        save_atomically(run.folder / "pretext.pt", on_cpu(net.backbone.state_dict()))
    kept["table"] = {"pretext + k-means": evaluate(*h, data, clusters, args.seed, part)[0]}
    neighbours = mine(F.normalize(embed(net, learn, statistics, device), dim=1), args.neighbours)
    shown = torch.linspace(0, len(learn) - 1, min(12, len(learn))).long()
    images, near = learn.cpu(), neighbours[shown, :6]              # a row each: image, five nearest
    save_picture(run.folder / "neighbours.png", beside(*(
        grid(images[column], 1, 64) for column in near.t())))
    if data.classes:
        print_row("pretext + k-means", kept["table"]["pretext + k-means"]["kmeans"])
    if data.classes and args.neighbours:
        right = (labels[neighbours[:, 1:]] == labels[:, None]).float()
        kept["neighbour_accuracy"] = {f"top-{k}": right[:, :k].mean().item() for k in (1, 5, 20)
                                      if k <= args.neighbours}
        print("neighbours of the same class: " + ", ".join(
            f"{k} {v:.3f}" for k, v in kept["neighbour_accuracy"].items()))
    if args.true_neighbours:
        print("WARNING: --true-neighbours drops false neighbours BY THEIR LABELS: an upper bound "
              "of the method, not a result of it", file=sys.stderr)
        neighbours = only_true(neighbours, labels)
    if args.select == "test":                                      # as released: five of each
        z = F.normalize(embed(net, data.test.images, statistics, device), dim=1)
        kept["judge"] = mine(z, min(5, len(z) - 1)).int()
    return {**kept, "neighbours": neighbours.int()}


def report(args, run, data, untrained, part, clusters, statistics, net, found, kept, views, device):
    """All steps beside two baselines; pictures."""
    table = {}
    if data.classes:
        table = baselines(data, untrained, statistics, clusters, args.seed, part, device)
        table.update(kept["table"])
        print_scores(table, data)
        print("  SCAN loss, + self-label: learned from train without labels, scored on "
              f"{'test' if data.has_test else 'the same images'}")
    raw, rng = fetch(data.train.images, part[:8], torch.device("cpu")), generator(0, 0, "picture")
    fed = [views[name](raw, rng) for name in ("simclr", "simclr", "strong", "strong")]
    save_views(run.folder / "views.png", raw, fed, statistics)
    run.finish(table, net.backbone, found, chosen=kept["chosen"],
               neighbour_accuracy=kept["neighbour_accuracy"])


def train(args):
    # 1. The data, checked before anything is written.
    device = pick_device(args.device)
    data = load_dataset(args.dataset, args.data_dir, args.image_size)
    n, size = len(data.train.images), data.train.images.shape[-1]
    index = subset(data.train.labels, n, 1, args.train_size, args.seed)
    args.batch_size = args.batch_size or max(2, min(256, len(index) // 4))      # of a folder
    args.cutout = args.cutout or (size // 2 if size <= 64 else size // 3)
    clusters = check_sizes(args, data, len(index))
    # STL-10: steps 2 and 3 learn from the 5,000 images of its train split, step 1 from all.
    part = index[data.train.labels[index] >= 0] if data.name == "stl10" else index
    labels = data.train.labels[part] if data.classes else None
    if args.neighbours is None:
        most = 200 if data.name == "shapes" else 20                # D8
        args.neighbours = max(1, min(most, len(part) // (3 * clusters)))
    if args.neighbours >= len(part):
        raise UserError(f"--neighbours {args.neighbours}: an image has {len(part) - 1:,} others")
    if args.true_neighbours and labels is None:
        raise UserError(f"--true-neighbours needs labels, and {args.dataset} has none")
    torch.manual_seed(args.seed)
    backbone = resnet18(size, args.width, args.stem_stride)
    weights = read_backbone(args.pretext, backbone, args, data) if args.pretext else None
    epochs = (0 if args.pretext else args.epochs) + args.cluster_epochs + args.self_label_epochs
    with Run(args, "scan", data, epochs) as run:
        # 2. The network, and the state of an interrupted run.
        backbone, untrained = backbone.to(device), copy.deepcopy(backbone).to(device)
        if args.pretext:
            backbone.load_state_dict(weights, strict=True)
        statistics = pixel_statistics(data.train.images)
        views = make_views(args, size, statistics)
        images = data.train.images if len(index) == n else data.train.images[index]
        images = to_device(images, device)
        learn = images if len(part) == len(index) else to_device(data.train.images[part], device)
        kept = run.load() or {"stage": "pretext"}
        print(f"scan on {data.name}: {len(part):,} images, {clusters} clusters, "
              f"{describe(backbone, size)}; {device}, {fast_dtype(device)}; {run.folder}")
        # 3. Step 1, and the neighbours.
        if kept["stage"] == "pretext":
            net = Network(backbone, nn.Identity()) if args.pretext else \
                pretext(args, run, kept, backbone, images, views, device)
            kept = {"stage": "cluster", "began": run.epoch, **hand_over(
                args, run, net, learn, labels, part, clusters, statistics, device)}
        # 4. Step 2. Its best head goes on alone.
        if kept["stage"] == "cluster":
            torch.manual_seed(args.seed)
            heads = cluster_heads(8 * args.width, args.heads, clusters)
            judge = (learn, kept["neighbours"].long(), labels) if args.select == "train" else \
                (data.test.images, kept["judge"].long(), data.test.labels)
            best = cluster(args, run, kept, Network(backbone, heads).to(device), learn, judge,
                           statistics, views, device)
            rows = slice(best["head"] * clusters, (best["head"] + 1) * clusters)
            state = {k: v[rows] if k.startswith("head.") else v for k, v in best["net"].items()}
            kept = {"stage": "self-label", "began": run.epoch, "net": state, "table": kept["table"],
                    "neighbour_accuracy": kept["neighbour_accuracy"],
                    "chosen": {k: best[k] for k in ("epoch", "head", "loss")}}
            print(f"step 2: epoch {best['epoch']}, head {best['head']} has the lowest loss on "
                  f"{args.select}")
        net = Network(backbone, cluster_heads(8 * args.width, 1, clusters)).to(device)
        if "SCAN loss" not in kept["table"]:
            net.load_state_dict(kept["net"])
            found = scored("SCAN loss", kept["table"], net, run, clusters, statistics, device)
            if args.self_label_epochs:
                warn_of_unsure_clusters(found, clusters, args.threshold)
        # 5. Step 3.
        if args.self_label_epochs:
            self_label(args, run, kept, net, learn, labels, views, device)
            found = scored("+ self-label", kept["table"], net, run, clusters, statistics, device)
        # 6. The report: labels are used from here on, and before it only to be printed.
        report(args, run, data, untrained, part, clusters, statistics, net, found, kept, views,
               device)


def main(argv=None):
    run_script(train, parse(argv))


if __name__ == "__main__":
    main()
