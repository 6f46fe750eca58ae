r"""Mask-mix: random image masking and in-batch feature mixing for self-supervised learning

After: Guiyu Li, Jun Yin. Random image masking and in-batch feature mixing for self-supervised
learning. Expert Systems with Applications 264 (2025) 125898. doi 10.1016/j.eswa.2024.125898

This is a RECONSTRUCTION from the abstract. The full text could not be read when it was written, so
no formula here is quoted and no figure of the paper is claimed; what we chose is numbered (D1...).
Someone with the paper at hand should be able to correct one function and keep the rest.

The idea. BYOL learns without negative pairs: from one view an online network predicts what a slowly
moving target network says about the other view. Two additions make its positives harder. Masking:
the online network sees a view with a random part of its cells erased and still has to predict the
target of the complete other view. Mixing: the features of two images of the batch are mixed, and
the prediction of this virtual sample has to lie between the targets of both.

             v1, masked: u1 -> f ----------------> g -> q -> p   meets t2             L_m
           /
    image -- v1 -> f -> h1 ----------------------> g -> q -> p   meets t2             L_g
          |              + h1 of an image pi ----> g -> q -> p   meets t2 and t2[pi]  L_f
           \
             v2 -> f' -> g' -> t2, no gradient                   and all with 1 <-> 2

    what the abstract says                            what stands here
    meaningful representations without negatives      BYOL: predictor, moving target (--base)
    two views stress global invariance; positives     two additions, each can be switched off:
      more intricate, in image and feature space        --mask-weight 0, --mix-weight 0
    random masking of images: local information is    random_mask, of the online network's input
      lost, the model learns from what is left
    virtual positives by mixing within the batch,     mix_features, mixed_regression_loss
      in feature space
    classification and detection downstream           kNN, linear probe; detection is not written

    symbol      in the code         shape           meaning
    v           v = [x1; x2]        2B x 3 x H x W  complete views
    u           u                   2B x 3 x H x W  masked views
    h           h                   2B x 8w         backbone features: what is evaluated
    z, p        z, p                2B x 256        projections g(h), predictions q(g(h))
    t           t                   2B x 256        targets g'(f'(v)), those of the other view
    lam, pi     lam, partner        2B              share of an image in its mix, its partner
    m           momentum()                          of the target: --ema at first, 1 at the end
    w_m, w_f    --mask-weight, --mix-weight         L = (L_g + w_m L_m + w_f L_f) / (1 + w_m + w_f)

Differences from the paper, as far as they can be known: choices of ours
    D1  The base is BYOL; --base simsiam takes the online network itself as the target.
    D2  Masked views go through the online network only. Targets always come from complete views.
    D3  Masks: an 8 x 8 grid at every image size, exactly round(.3 * 64) = 19 cells erased, filled
        with the mean colour. Black would be a mark that the network could learn to look for.
    D4  Mixed are the backbone's features, before the non-linear head: after the last linear layer
        linearity would make mixing trivial. lam ~ Beta(1, 1), folded to [.5, 1], one each;
        lam and pi are the same for both views.
    D5  Views: crop, flip, colour jitter, grey; no blur. Optimizer and schedule are ours.
    D6  BatchNorm: complete, masked and mixed samples are separate batches, so L_g is BYOL's own at
        any weights; the two views are one batch. The target normalises by its own batches and keeps
        its own running statistics. Before the evaluation those are estimated anew on complete
        training images. The projector ends in one without scale and shift, as SimSiam's: targets
        are centred, so that a constant prediction is a poor one.
    D7  One predictor for all three kinds of samples; --separate-predictors gives each its own.
    D8  Detection, the abstract's second task, is not here.

    python mask_mix.py                       # shapes, on a laptop
    python mask_mix.py --dataset cifar10     # meant for one GPU; not run

    shapes, test, seeds 0, 1, 2     ACC          NMI          ARI          kNN          linear
    raw pixels                      .176         .067         .022         .706
    random network                  .188         .075         .029         .434         .542
    mask_mix                     .665 +- .147 .773 +- .063 .603 +- .128 .900 +- .032 .980 +- .011
    and kNN of test images with 30 % of their cells erased: .852 +- .034; raw pixels .648, random
    .320. The settings were chosen by the kNN of other drawings of the same kind; but --lr, raised
    from .1 when seed 2 had started late.

    --lr .1, seeds 0, 1, 2                  kNN             kNN, erased     min, one core
    --mask-weight 0 --mix-weight 0, BYOL    .815 .937 .896  .406 .561 .450  2.4
    --mix-weight 0, + masking               .907 .911 .844  .880 .889 .817  4.4
    --mask-weight 0, + mixing               .933 .920 .935  .547 .484 .469  2.6
    both                                    .957 .915 .604  .922 .880 .564  4.7
    BYOL, --epochs 28, as many passes       .989 .992 .986  .637 .653 .596  4.2

Masking lets the features see through masks: the one large effect. On complete images mixing helps a
little and costs little; at equal compute plain BYOL, trained for longer, is ahead of all.
Note: BYOL starts late, and how late depends on the seed: until then `byol` lies near `constant`
(both, seed 2: until epoch 9 of 16). A larger --lr, a faster target (--ema .7) and mostly grey views
start it sooner; with 60 % grey views it learns colours instead.
"""
import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageDraw
from torch import nn

from common import (Clock, Meter, Parser, Run, autocast, baselines, batches, check_sizes,
                    color_jitter, cosine_lr, describe, embed, evaluate, fast_dtype, fetch,
                    generator, grid, knn_accuracy, load_dataset, normalise, number, pick_device,
                    pixel_features, pixel_statistics, print_scores, random_grayscale,
                    random_resized_crop, resnet18, run_script, save_picture, save_views, set_lr,
                    step, subset, to_device)

# ------------------------------------------------------------------------------------------------
# 1. The loss


def regression_loss(p, t):
    """L = 1/B sum_b D(p_b, t_b),  D(p, t) = 2 - 2 <p, t> / (||p|| ||t||)

    p: (B, D) predictions, t: (B, D) targets, any scale, pass t without gradient. Lower is better:
    0 where all directions agree, 2 where they are orthogonal, 4 where they are opposite."""
    return (2 - 2 * F.cosine_similarity(p, t, dim=1)).mean()


def random_mask(images, ratio, grid, generator, fill=0.):
    """u = images with round(ratio grid^2) of grid x grid cells erased: `fill` in all channels.

    images: (B, C, H, W). fill: their mean colour, 0 for normalised ones; black would be a mark of
    its own. Every image draws its own cells, and exactly that many. generator: a CPU one.
    -> (B, C, H, W), all other pixels bit for bit as they were."""
    b, _, height, width = images.shape
    erased = torch.rand(b, grid * grid, generator=generator).argsort(1) < round(ratio * grid * grid)
    cells = erased.view(b, 1, grid, grid).to(images.device, non_blocking=True)
    row, column = (torch.arange(n, device=images.device) * grid // n for n in (height, width))
    return torch.where(cells[:, :, row][..., column], torch.as_tensor(fill).to(images), images)


def mix_features(h, lam, partner):
    """m_b = lam_b h_b + (1 - lam_b) h_partner(b)

    h: (B, D) features, lam: (B,) in [0, 1], partner: (B,) a permutation. -> (B, D) virtual samples.
    lam = 1, or every image its own partner, changes nothing."""
    return lam[:, None] * h + (1 - lam)[:, None] * h[partner]


def mixed_regression_loss(p, t, lam, partner):
    """L = 1/B sum_b [ lam_b D(p_b, t_b) + (1 - lam_b) D(p_b, t_partner(b)) ],  D as above

    p: (B, D) predictions of virtual samples; t: (B, D) targets of the images that were mixed, of
    the OTHER view; lam, partner: (B,). Lower is better. With unit vectors p^, t^ each summand is
    2 - 2 <p^, lam t^_b + (1 - lam) t^_partner>: the positive is the mix of the unit targets. Its
    minimum 2 - 2 ||lam t^_b + (1 - lam) t^_partner|| is above 0, .42 for orthogonal targets at
    lam = .75: this loss never reaches 0, and that is no under-fitting."""
    own, other = F.cosine_similarity(p, t, dim=1), F.cosine_similarity(p, t[partner], dim=1)
    return (lam * (2 - 2 * own) + (1 - lam) * (2 - 2 * other)).mean()


@torch.no_grad()
def ema_update(target, online, m):
    """target <- m target + (1 - m) online, for every parameter of two networks of the same shape.

    m in [0, 1]; 1 leaves the target as it is. Buffers are left alone: the target's BatchNorm counts
    its own batches."""
    for old, new in zip(target.parameters(), online.parameters()):
        old.lerp_(new, 1 - m)


def momentum(step, steps, base=.99):
    """m = 1 - (1 - base) (cos(pi s / S) + 1) / 2: from base at step 0 to 1 at the end."""
    return 1 - (1 - base) * (math.cos(math.pi * step / steps) + 1) / 2


# ------------------------------------------------------------------------------------------------
# 2. The network

def mlp(features, hidden, out):
    return nn.Sequential(nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(),
                         nn.Linear(hidden, out))


class Network(nn.Module):
    """Backbone f, projector g, predictors q. Images (B, 3, H, W) -> projections (B, 256).

    predictors: 0 for a target, 1 shared by all kinds of samples, or 3: complete, masked, mixed."""

    def __init__(self, backbone, features, predictors, hidden=1024, dim=256):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp(features, hidden, dim).append(nn.BatchNorm1d(dim, affine=False))
        self.predictors = nn.ModuleList(mlp(dim, hidden, dim) for _ in range(predictors))

    def predict(self, h, kind):
        """Features (B, D) -> predictions q(g(h)) (B, 256). kind: 0 complete, 1 masked, 2 mixed."""
        return self.predictors[min(kind, len(self.predictors) - 1)](self.projector(h))

    def forward(self, x):
        return self.projector(self.backbone(x))


def make_target(online):
    """A copy of backbone and projector that no gradient reaches; it moves by ema_update alone."""
    target = copy.deepcopy(online)
    target.predictors = nn.ModuleList()
    return target.requires_grad_(False)


# ------------------------------------------------------------------------------------------------
# 3. The views

def make_views(size, crop, jitter, gray, statistics):
    """-> function of (raw images (B, 3, H, W) in [0, 1], generator) -> two views of each (D5)"""
    def view(x, rng):
        x = random_resized_crop(x, size, (crop, 1), rng)           # and flip, p .5
        x = color_jitter(x, .8 * jitter, .8 * jitter, .8 * jitter, .2 * jitter, rng, p=.8)
        return normalise(random_grayscale(x, gray, rng), statistics)
    return lambda x, rng: (view(x, rng), view(x, rng))


def draw_mixing(n, alpha, rng):
    """-> lam (n,) ~ Beta(alpha, alpha), folded so that an image keeps at least half of itself (else
    its partner's mix would be drawn twice), and partner (n,), a permutation. Mean lam .75."""
    seed = torch.randint(2**31, (1,), generator=rng).item()
    lam = torch.from_numpy(np.random.default_rng(seed).beta(alpha, alpha, n)).float()
    return torch.maximum(lam, 1 - lam), torch.randperm(n, generator=rng)


# ------------------------------------------------------------------------------------------------
# 4. Hyper-parameters

DEFAULTS = {                              # per dataset, where they differ from the flags' defaults
    "shapes": dict(epochs=16, batch_size=64, width=16, stem_stride=2, crop=.5, jitter=.8, gray=.9,
                   lr=.2, ema=.7, predictor_lr=5.),
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
    add("--epochs", type=number(int, 1), default=200, help="passes over the training images")
    add("--batch-size", type=number(int, 2), default=256, help="B, images of a step")
    add("--lr", type=number(float, 0, above=True), default=.1, help="peak learning rate")
    add("--weight-decay", type=number(float, 0), default=5e-4, help="L2 weight decay")
    add("--width", type=number(int, 1, 512), default=64, help="channels of ResNet-18's first stage")
    add("--stem-stride", type=number(int, 1, 2), default=1, help="2: a cheaper stem for laptops")
    add("--seed", type=number(int, 0), default=0, help="of everything random")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
    add("--out", help="run folder; else runs/<method>-<dataset>-seed<seed>")
    add("--resume", action="store_true", help="continue the run in the run folder")
    add("--compile", action="store_true", help="torch.compile the network; slower to start")
    # The method's own.
    add("--crop", type=number(float, 0, 1, above=True), default=.2, help="smallest share of area")
    add("--jitter", type=number(float, 0, 1), default=.5, help="s, colour jitter .8s .8s .8s .2s")
    add("--gray", type=number(float, 0, 1), default=.2, help="probability of a grey view")
    add("--base", choices=("byol", "simsiam"), default="byol", help="simsiam: no moving target")
    add("--ema", type=number(float, 0, 1), default=.99, help="m of the target at first; 1 at last")
    add("--predictor-lr", type=number(float, 0, above=True), default=1., help="of q, times --lr")
    add("--mask-weight", type=number(float, 0), default=1., help="w_m, weight of L_m; 0: none")
    add("--mask-ratio", type=number(float, 0, 1), default=.3, help="share of the cells erased")
    add("--mask-grid", type=number(int, 1, 64), default=8, help="cells across an image, and down")
    add("--mix-weight", type=number(float, 0), default=1., help="w_f, weight of L_f; 0: none")
    add("--mix-alpha", type=number(float, 0, above=True), default=1., help="lam ~ Beta(a, a)")
    add("--separate-predictors", action="store_true", help="one for each kind of sample (D7)")
    dataset = parser.parse_known_args(argv)[0].dataset
    parser.set_defaults(**DEFAULTS.get(dataset, {}))
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------
# 5. Training

def losses(online, target, v, args, rng):
    """Complete views v (2B, 3, H, W), x1 above x2 -> L, its terms, z: the algorithm in one place.

    target: a network, or None: the online one (simsiam). Means over 2B are 1/2 [... + ...]."""
    half, device, p = len(v) // 2, v.device, {}
    with autocast(device):
        h = online.backbone(v)                                                  # 2Bx8w
        z = online.projector(h)                                                 # 2Bx256
        p["byol"] = online.predictors[0](z)
        with torch.no_grad():                                      # targets of COMPLETE views only
            t = z.detach() if target is None else target(v)                     # 2Bx256
        if args.mask_weight:
            u = random_mask(v, args.mask_ratio, args.mask_grid, rng)
            p["mask"] = online.predict(online.backbone(u), 1)
        if args.mix_weight:
            lam, partner = (x.to(device) for x in draw_mixing(half, args.mix_alpha, rng))
            lam, partner = lam.repeat(2), torch.cat([partner, partner + half])
            p["mix"] = online.predict(mix_features(h.float(), lam, partner), 2)
    t = t.float().roll(half, 0)                                    # t2 above t1: the OTHER view
    terms = {"byol": regression_loss(p["byol"].float(), t)}
    loss = terms["byol"]
    if args.mask_weight:
        terms["mask"] = regression_loss(p["mask"].float(), t)
        loss = loss + args.mask_weight * terms["mask"]
    if args.mix_weight:
        terms["mix"] = mixed_regression_loss(p["mix"].float(), t, lam, partner)
        loss = loss + args.mix_weight * terms["mix"]
    return loss / (1 + args.mask_weight + args.mix_weight), terms, z.detach()


def gauges(z):
    """What to watch, from embeddings z (B, D) made unit length:

    spread     their standard deviation times sqrt(D): 1 for directions all around, 0 when all are
               the same, the collapse of methods without negatives
    constant   2 - 2 ||mean||: what byol comes to when the prediction ignores its input. Above or
               near it nothing is being learned, however steadily the loss falls"""
    z = F.normalize(z.float(), dim=1)
    return {"spread": z.std(0).mean() * z.shape[1] ** .5, "constant": 2 - 2 * z.mean(0).norm()}


@torch.no_grad()
def reestimate_batchnorm(net, images, index, statistics, device, batch_size=512):
    """Running statistics from complete, un-augmented images[index] alone: those of training count
    erased cells and mixed features too, which no evaluated image has (D6)."""
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None                                       # a plain mean over the batches
    batch_size = min(batch_size, len(index))
    for part in index[:len(index) // batch_size * batch_size].split(batch_size):
        with autocast(device):
            h = net.backbone(normalise(fetch(images, part, device), statistics))
            net.predict(h, 2) if net.predictors else net.projector(h)
    for norm in norms:
        norm.momentum = .1


@torch.no_grad()
def masked_knn(backbones, data, statistics, seed, device):
    """kNN of TEST images with 30 % of their cells erased, whatever was trained with; the bank is
    complete. backbones: {name: function of uint8 images -> features} -> {name: accuracy}"""
    fill, seen = (statistics[0] * 255).round().byte(), data.train.labels >= 0
    masked = random_mask(data.test.images, .3, 8, generator(seed, 0, "masked test"), fill)
    return {name: knn_accuracy(features(data.train.images[seen]), data.train.labels[seen],
                               features(masked), data.test.labels)
            for name, features in backbones.items()}


@torch.no_grad()
def mixing_picture(online, target, images, views, args, statistics, device):
    """A row for each of six training images: a view, then masked; both sources of a virtual sample,
    with their shares; the four training images whose targets are nearest to its prediction."""
    mean, std = (s.to(device) for s in statistics)
    rng = generator(args.seed, 0, "mixing picture")
    some = torch.randperm(len(images), generator=rng)[:6]
    raw, partner = fetch(images, some, device), torch.arange(len(some)).roll(1).to(device)
    v = views(raw, rng)[0]
    u = random_mask(v, args.mask_ratio, args.mask_grid, rng)
    lam = draw_mixing(len(some), args.mix_alpha, rng)[0].to(device)
    h = embed(online.backbone, images[some], statistics, device)
    online.eval()
    p = online.predict(mix_features(h, lam, partner), 2)
    t = embed(target or online, images, statistics, device)                     # Nx256
    nearest = (F.normalize(p, dim=1) @ F.normalize(t, dim=1).t()).topk(min(4, len(t)), 1).indices
    near = fetch(images, nearest.cpu(), device)                                 # Bx4x3xHxW
    rows = torch.cat([torch.stack([v * std + mean, u * std + mean, raw, raw[partner]], 1), near], 1)
    sheet = grid(rows.flatten(0, 1), rows.shape[1], side=64)
    pen = ImageDraw.Draw(sheet)
    for i, share in enumerate(lam.tolist()):
        names = ["view", "masked", f"{share:.2f} of", f"{1 - share:.2f} of"]
        names += [f"nearest {j + 1}" for j in range(nearest.shape[1])]
        for j, name in enumerate(names):
            x, y = 2 + 66 * j, 2 + 66 * i
            pen.rectangle((x, y, x + pen.textlength(name) + 3, y + 12), fill="black")
            pen.text((x + 2, y), name, fill="white")
    return sheet


def report(args, run, data, online, target, untrained, index, clusters, statistics, views, device):
    """Scores of the frozen backbone beside two baselines; complete and masked images; pictures."""
    images = data.train.images
    for net in (online, target):
        if net is not None:
            reestimate_batchnorm(net, images, index, statistics, device)
    table = baselines(data, untrained, statistics, clusters, args.seed, index, device)
    train_h = embed(online.backbone, images, statistics, device)
    test_h = train_h
    if data.has_test:
        test_h = embed(online.backbone, data.test.images, statistics, device)
    table["mask_mix"], found = evaluate(train_h, test_h, data, clusters, args.seed, index)
    if data.classes:
        print_scores(table, data)
    if data.classes and data.has_test:
        scores = masked_knn({"raw pixels": lambda x: pixel_features(x, device),
                             "random network": lambda x: embed(untrained, x, statistics, device),
                             "mask_mix": lambda x: embed(online.backbone, x, statistics, device)},
                            data, statistics, args.seed, device)
        for name, score in scores.items():
            table[name]["knn_masked"] = score
        print("  knn, test images with 30 % of their cells erased: " +
              ", ".join(f"{name} {score:.3f}" for name, score in scores.items()))
    save_picture(run.folder / "mixing.png", mixing_picture(
        online, target, images, views, args, statistics, device))
    raw, rng = fetch(images, index[:8], torch.device("cpu")), generator(args.seed, 0, "picture")
    fed = views(raw, rng)
    if args.mask_weight:
        fed += tuple(random_mask(x, args.mask_ratio, args.mask_grid, rng) for x in fed)
    save_views(run.folder / "views.png", raw, fed, statistics)
    run.finish(table, online.backbone, found)


def train(args):
    # 1. The data, checked before anything is written.
    device = pick_device(args.device)
    data = load_dataset(args.dataset, args.data_dir, args.image_size)
    n = len(data.train.images)
    index = subset(data.train.labels, n, 1, args.train_size, args.seed)
    clusters, size = check_sizes(args, data, len(index)), data.train.images.shape[-1]
    with Run(args, "mask_mix", data) as run:
        # 2. Networks and optimizer, and the state of an interrupted run.
        torch.manual_seed(args.seed)
        backbone = resnet18(size, args.width, args.stem_stride)
        online = Network(backbone, 8 * args.width, 3 if args.separate_predictors else 1).to(device)
        target = make_target(online) if args.base == "byol" else None
        untrained = copy.deepcopy(online.backbone)                 # a baseline of the report
        rest = [*online.backbone.parameters(), *online.projector.parameters()]
        optimizer = torch.optim.SGD(
            [{"params": rest}, {"params": online.predictors.parameters(),
                                "factor": args.predictor_lr}],
            args.lr, momentum=.9, weight_decay=args.weight_decay, fused=True)
        images = to_device(data.train.images, device)
        statistics = pixel_statistics(data.train.images)
        views = make_views(size, args.crop, args.jitter, args.gray, statistics)
        nets = {"online": online} if target is None else {"online": online, "target": target}
        saved = run.load()
        if saved:
            for name, net in nets.items():
                net.load_state_dict(saved[name])
            optimizer.load_state_dict(saved["optimizer"])
        if args.compile:
            for net in nets.values():
                net.backbone.compile()
        print(f"mask_mix on {data.name}: {len(index):,} images, {describe(backbone, size)}; "
              f"{device}, {fast_dtype(device)}; {run.folder}")
        # 3. Epochs.
        per_epoch = len(index) // args.batch_size
        steps, clock = per_epoch * args.epochs, Clock(device)
        for epoch in range(run.epoch, args.epochs):
            meter = Meter(f"mask_mix, epoch {epoch + 1}", optimizer, per_epoch)
            rng = generator(args.seed, epoch, "views")
            own = generator(args.seed, epoch, "masks and mixes")   # views do not depend on weights
            for i, (_, x1, x2) in enumerate(
                    batches(images, index, args.batch_size, views, rng, device, clock)):
                at = epoch * per_epoch + i
                set_lr(optimizer, args.lr * cosine_lr(at, steps, warmup=steps // 20))
                loss, terms, z = losses(online, target, torch.cat([x1, x2]), args, own)
                step(optimizer, loss)
                if target is not None:
                    ema_update(target, online, momentum(at, steps, args.ema))
                meter.add(loss=loss, **terms, **gauges(z))
            # 4. The epoch's line: a collapse is seen when it happens.
            record = meter.means()
            run.end_epoch(record, per_epoch * args.batch_size, clock, optimizer, {
                **{name: net.state_dict() for name, net in nets.items()},
                "optimizer": optimizer.state_dict()})
            if record["spread"] < .1:
                print(f"WARNING: collapse: all embeddings are nearly the same "
                      f"(spread {record['spread']:.3f})")
        # 5. The report. Labels are used from here on and never before.
        report(args, run, data, online, target, untrained, index, clusters, statistics, views,
               device)


def main(argv=None):
    run_script(train, parse(argv))


if __name__ == "__main__":
    main()
