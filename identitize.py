r"""Identitize: self-supervised learning with no negative pairs and no cluster-balancing

After: Jian-Ping Mei, Shixiang Wang, Miaoqi Yu. Self-supervised learning from images: No negative
pairs, no cluster-balancing. Pattern Recognition 159 (2025) 111081. doi 10.1016/j.patcog.2024.111081

This is a RECONSTRUCTION from the abstract. The full text could not be read when it was written, so
no formula here is quoted and no figure of the paper is claimed; what we chose is numbered (D1...).
Someone with the paper at hand should be able to correct one function and keep the rest.

The idea. Two views of an image are softly assigned to K clusters. Over a batch, the K x K
cross-correlation of the two assignments is pushed to the identity: the diagonal to 1 (both views
of an image use the same clusters), the rest to 0 (no two clusters do the same job). That alone
keeps the clusters alive: no negative pairs, no rule about their sizes, no predictor, no momentum
network, no memory. Beside it, the assignments of one view are the targets of the other.

             view 1
           /        \
    image             f -> h -> g -> s -> n -> C = n1' n2 / B -> M -> identity          L_id
           \        /                     n -> P1 <-> P2                                L_swap
             view 2

    what the abstract says                            what stands here
    non-contrastive, clustering-based                 soft assignments as targets, no negatives
    no special architecture, no memory bank           backbone, one head
    no explicit constraint on cluster size            no Sinkhorn, no entropy of the mean (but D3)
    consistency and decorrelation, by tweaking the    cross_correlation, identitization_log_det
      batch-wise cross-correlation to the identity      (or _loss, or _cross_entropy)
    assignments of two views as mutual targets        swapped_assignment_loss
    more robust to imbalance than cluster balancing,  --imbalance; --targets sinkhorn is the rival
      and learns from small batches                   --batch-size

    symbol    in the code                  shape    meaning
    h         h                            B x 8w   backbone features: what is evaluated
    s         s1, s2                       B x K    cluster scores of two views, of any scale
    n         n1, n2                       B x K    s standardised over the batch, per cluster
    C         c                            K x K    cross-correlation of the two views
    M         m                            K x K    mean of C, its transpose, and each view's own
    P         p1, p2                       B x K    assignments, softmax(n / tau)
    mu, w     --mu, --swap-weight                   weights: L = mu L_id + w L_swap
    eps       --ridge                               weight of consistency in the log-determinant
    lam       --lam                                 weight of the off-diagonal in the squares
    t, tau    --temperature, --swap-temperature     of C in the cross-entropy; of P

Differences from the paper, as far as they can be known: choices of ours
    D1  What is correlated: cluster scores, standardised over the batch. The abstract says cluster
        space. Probabilities with columns of unit length (--correlate assignments, reading A) have
        an identity that any one-hot agreement reaches. By squares they learn faster than scores do,
        but not as fast as the default (below).
    D2  How C is pushed to the identity: by -ln det M, in which each view's own correlations stand
        beside C. It is 0 at the identity alone, and its gradient, an inverse matrix, is largest in
        the directions that the clusters hardly use. Squares (--identity square, the literal
        reading) and a cross-entropy look at entries, or at rows and columns, one by one and learn
        more slowly (below). No image is compared with another; but det(M + eps I) is, but for a
        constant, det(n n' / B + eps I) of B x B: what spreads the clusters spreads the images.
        Relatives: the coding rate of MCR^2 and EMP-SSL; of the squares, Barlow Twins.
    D3  Standardising every cluster over the batch is itself a mild balancing: a cluster that
        nothing uses has no variance. "No cluster-balancing" holds for the loss, not quite for this.
    D4  L_swap takes n, not s. C ignores a constant added to a column of s, so a swap on s can push
        all images into one cluster (a test shows it) while L_id looks fine.
    D5  Views: crop, flip, colour jitter, grey; no blur. The head, K, eps, w, optimizer and
        schedule are ours. On `shapes` 60 % of the views are grey, since colour is a nuisance there.

    python identitize.py --seed 0        (and 1, 2: mean +- standard deviation of three seeds;
                                          settings were chosen on these images and these seeds)

    shapes, test                    ACC          NMI          ARI          kNN          linear
    raw pixels                      .176         .067         .022         .706
    random network                  .188         .075         .029         .434         .542
    identitize                   .994 +- .004 .987 +- .007 .986 +- .009 .996 +- .002 .999 +- .001
    its head, 64 clusters, vote  .792 +- .025 .643 +- .021 .395 +- .053
    a fresh seed, 3                 .993         .985         .984         .996         .998

    the same, --epochs 8 --seed 0:                  ACC     kNN     linear
    default                                         .973    .981    .996
    --swap-weight 0, L_id alone                     .972    .984    .996    the swap does not help,
    --swap-weight 1                                 .809    .934    .988    and when heavy it harms
    --mu 0 --swap-weight 1, L_swap alone            .135    .200    .277    collapses: P uniform
    --ridge 1                                       .809    .972    .993
    --ridge 100                                     .685    .915    .989
    --identity cross-entropy                        .738    .907    .980
    --identity square                               .303    .583    .839
    --correlate assignments --identity square
      --lam .1 --mu 1, reading A                    .656    .832    .941

Against cluster balancing: --targets sinkhorn --swap-weight 0, whose --epsilon was tuned (.05 and
.02 can collapse to uniform targets, .01 does not). shapes, kNN and linear, means of seeds 0-2:

                                                      identitize         sinkhorn
    --epochs 8                                        .986    .997       .957    .994
    --epochs 8 --batch-size 16                        .992    .997       .966    .995
    --epochs 8 --batch-size 128                       .895    .964       .612    .756
    --epochs 8 --batch-size 512                       .679    .788       .231    .353
    --epochs 20 --imbalance 10                        .975    .995       .945    .991
    --epochs 33 --imbalance 100                       .919    .991       .760    .886
    --epochs 33 --train-size 1230, as few, balanced   .987    .996       .943    .992

    The first and the last three take about 1,250 steps, all at --lr 2e-3. As the abstract says,
    it learns from small batches, and a long tail harms it less than the balanced rival, which in
    one of three seeds (2) hardly learns under the tail of 100 (kNN .481).
On 10,000 images of CIFAR-10 (JPEG) it reaches kNN .468 and linear .497 in 16 epochs, SimCLR (step 1
of scan.py) .447 and .481; with --epochs 10 on two cores .455 in 92 seconds, SimCLR .427 in 102.
Not run: a GPU, 200 epochs of CIFAR-10.
"""
import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import (Clock, Meter, Parser, Run, autocast, baselines, batches, beside, check_sizes,
                    cluster_scores, color_jitter, cosine_lr, describe, embed, evaluate, fast_dtype,
                    fetch, generator, heatmap, load_dataset, normalise, number, pick_device,
                    pixel_statistics, print_scores, random_grayscale, random_resized_crop, resnet18,
                    run_script, save_picture, save_views, set_lr, step, subset, to_device)

# ------------------------------------------------------------------------------------------------
# 1. The loss


def cross_correlation(s1, s2):
    """C_kl = 1/B sum_b n1_bk n2_bl,   n = (s - mean_b s) / sqrt(var_b s + 1e-5)

    s1, s2: (B, K) cluster scores of two views, any scale. -> C (K, K) in [-1, 1].
    A shift or scale of a column changes nothing; permuting clusters permutes C; swapping views
    transposes it; rank(C) <= min(B - 1, K). Float32 also under autocast: bfloat16 would spoil a
    centred matrix."""
    with torch.autocast(s1.device.type, enabled=False):
        s1, s2 = (s if s.dtype == torch.float64 else s.float() for s in (s1, s2))
        n1, n2 = ((s - s.mean(0)) / (s.var(0, unbiased=False) + 1e-5).sqrt() for s in (s1, s2))
        return n1.t() @ n2 / len(n1)                                            # KxK


def identitization_log_det(n1, n2, epsilon):
    """L_id = -(1 + eps) / K ln det[(M + eps I) / (1 + eps)],   M = (C_11 + C_12 + C_21 + C_22) / 4

    n1, n2: (B, K) scores of two views, standardised over the batch. M, the mean of the correlations
    of and between the views, is that of n = (n1 + n2) / 2: no eigenvalue is below 0, M_kk =
    (1 + C_kk) / 2. Lower is better: 0 at M = I alone, where the views agree and no two clusters are
    correlated. The larger eps > 0, the more agreement counts: to first order L_id is 1 - tr M / K.
    With B <= K images the rank of M is below B; eps keeps the logarithm finite."""
    with torch.autocast(n1.device.type, enabled=False):
        n = (n1 + n2) / 2
        n = n if n.dtype == torch.float64 else n.float()
        m = n.t() @ n / len(n)                                                  # KxK
        eye = torch.eye(len(m), device=m.device, dtype=m.dtype)
        root = torch.linalg.cholesky_ex((m + epsilon * eye) / (1 + epsilon)).L  # ln det = 2 tr ln L
        return -2 * (1 + epsilon) * root.diagonal().log().mean()


def identitization_loss(c, off_diagonal_weight):
    """L_id = sum_k (1 - C_kk)^2 + lam sum_{k != l} C_kl^2

    c: (K, K) cross-correlation; lam = off_diagonal_weight. Lower is better: 0 at C = I, K at C = 0.
    With B <= K images the identity is out of reach: ||C - I||^2 >= K - B + 1."""
    consistency = (1 - c.diagonal()).square().sum()
    decorrelation = c.square().sum() - c.diagonal().square().sum()
    return consistency + off_diagonal_weight * decorrelation


def identitization_cross_entropy(c, temperature):
    """L_id = 1/2 [ CE(C / t, I) + CE(C^T / t, I) ]: each row and each column of C / t is a softmax
    over clusters whose target is the diagonal.

    c: (K, K) cross-correlation. Lower is better: ln K at C = 0; at C = I it is
    ln(1 + (K - 1) exp(-1 / t)), not 0."""
    target = torch.arange(len(c), device=c.device)
    rows = F.cross_entropy(c / temperature, target)
    columns = F.cross_entropy(c.t() / temperature, target)
    return (rows + columns) / 2


def swapped_assignment_loss(s1, s2, temperature):
    """L_swap = -1/(2B) sum_bk [ sg(P2_bk) log P1_bk + sg(P1_bk) log P2_bk ],  P = softmax(s / tau)

    s1, s2: (B, K) scores, used as given; no gradient through the targets sg(P). Lower is better: 0
    for equal one-hot assignments, ln K for uniform ones."""
    log_p1, log_p2 = F.log_softmax(s1 / temperature, 1), F.log_softmax(s2 / temperature, 1)
    p1, p2 = log_p1.detach().exp(), log_p2.detach().exp()
    return -(p2 * log_p1 + p1 * log_p2).sum(1).mean() / 2


def standardise(s):
    """n = (s - mean_b s) / sqrt(var_b s + 1e-5), for each cluster. (B, K) -> (B, K)"""
    return (s - s.mean(0)) / (s.var(0, unbiased=False) + 1e-5).sqrt()


def assignment_correlation(p1, p2):
    """C_kl = sum_b P1_bk P2_bl / (||P1_k|| ||P2_l||): reading A (D1), columns not centred.

    p1, p2: (B, K) probabilities. -> (K, K) in [0, 1]; the identity exactly when both views are
    one-hot, agree, and use every cluster, whatever the sizes of the clusters."""
    return F.normalize(p1, dim=0).t() @ F.normalize(p2, dim=0)


@torch.no_grad()
def sinkhorn(s, epsilon=.05, iterations=3):
    """The rival's targets (SwAV): exp(s / epsilon), scaled until all clusters have the mass B / K.

    s: (B, K) scores. -> (B, K); rows sum to 1, columns nearly to B / K. In logarithms: no
    overflow."""
    q = s.float() / epsilon
    for _ in range(iterations):
        q = q - q.logsumexp(0, keepdim=True)
        q = q - q.logsumexp(1, keepdim=True)
    return q.exp()


# ------------------------------------------------------------------------------------------------
# 2. The network

class Network(nn.Module):
    """Backbone f, head g. Images (B, 3, H, W) -> cluster scores s (B, K)

    cosine: for the rival. Then s are cosines, of the head's 128 outputs to K prototypes."""

    def __init__(self, backbone, features, clusters, cosine=False):
        super().__init__()
        self.backbone, self.cosine = backbone, cosine
        self.head = nn.Sequential(nn.Linear(features, 512, bias=False), nn.BatchNorm1d(512),
                                  nn.ReLU())
        if cosine:
            self.head.append(nn.Linear(512, 128))
        self.clusters = nn.Linear(128 if cosine else 512, clusters, bias=False)
        if cosine:                         # long prototypes turn slowly: short ones are unstable
            nn.init.normal_(self.clusters.weight)

    def scores(self, h):
        """Features (B, 8w) -> s (B, K), in float32 from here on."""
        z = self.head(h)                                                        # Bx512, or Bx128
        with torch.autocast(h.device.type, enabled=False):
            if self.cosine:
                return F.normalize(z.float(), dim=1) @ F.normalize(self.clusters.weight, dim=1).t()
            return self.clusters(z.float())

    def forward(self, x):
        return self.scores(self.backbone(x))


# ------------------------------------------------------------------------------------------------
# 3. The views

def make_views(size, crop, jitter, gray, statistics):
    """-> function of (raw images (B, 3, H, W) in [0, 1], generator) -> two views of each (D5)"""
    def view(x, rng):
        x = random_resized_crop(x, size, (crop, 1), rng)           # and flip, p .5
        x = color_jitter(x, .8 * jitter, .8 * jitter, .8 * jitter, .2 * jitter, rng, p=.8)
        return normalise(random_grayscale(x, gray, rng), statistics)
    return lambda x, rng: (view(x, rng), view(x, rng))


# ------------------------------------------------------------------------------------------------
# 4. Hyper-parameters

DEFAULTS = {                              # per dataset, where they differ from the flags' defaults
    "shapes": dict(epochs=12, batch_size=32, width=16, stem_stride=2, crop=.4, jitter=1., gray=.6,
                   clusters_head=64, epsilon=.01),
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
    add("--lr", type=number(float, 0, above=True), default=2e-3, help="peak learning rate")
    add("--weight-decay", type=number(float, 0), default=1e-6, help="L2 weight decay")
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
    add("--clusters-head", type=number(int, 2), default=256, help="K, clusters in the loss")
    add("--identity", choices=("log-det", "cross-entropy", "square"), default="log-det",
        help="how C is pushed to the identity (D2)")
    add("--lam", type=number(float, 0), default=.01, help="lam, weight of the off-diagonal, square")
    add("--temperature", type=number(float, 0, above=True), default=.25, help="t, cross-entropy")
    add("--ridge", type=number(float, 1e-4), default=10.,
        help="eps, log-det; the larger, the more agreement of the views counts")
    add("--mu", type=number(float, 0), help="mu, weight of L_id; else 1, for square 10/K")
    add("--swap-weight", type=number(float, 0), default=.1, help="w, weight of L_swap")
    add("--swap-temperature", type=number(float, 0, above=True), default=1., help="tau of P")
    add("--correlate", choices=("scores", "assignments"), default="scores",
        help="what C correlates; assignments: probabilities, reading A (D1)")
    add("--targets", choices=("identity", "sinkhorn"), default="identity",
        help="sinkhorn: SwAV's equal-size targets in place of L_id, the rival with balancing")
    add("--epsilon", type=number(float, 1e-4), default=.05, help="of the rival: sharper when small")
    add("--imbalance", type=number(float, 1), default=1., help="r: learn from a long tail, "
        "n_c = n_max r^(-c/(C-1)); hold it against --train-size of as many images")
    dataset = parser.parse_known_args(argv)[0].dataset
    parser.set_defaults(**DEFAULTS.get(dataset, {}))
    args = parser.parse_args(argv)
    if args.mu is None:
        args.mu = 10 / args.clusters_head if args.identity == "square" else 1.
    if args.correlate == "assignments" and args.identity == "log-det":
        parser.error("--correlate assignments goes with --identity square or cross-entropy")
    if args.imbalance != 1 and args.train_size:
        parser.error("--imbalance and --train-size exclude each other")
    return args


# ------------------------------------------------------------------------------------------------
# 5. Training

def losses(s1, s2, args):
    """Scores (B, K) of two views -> L, {its terms and gauges}, P1: the algorithm in one place."""
    n1, n2 = standardise(s1), standardise(s2)                                   # BxK each
    p1, p2 = ((n / args.swap_temperature).softmax(1) for n in (n1, n2))
    c = cross_correlation(s1, s2) if args.correlate == "scores" else assignment_correlation(p1, p2)
    if args.targets == "sinkhorn":                                 # codes of the other view
        q1, q2 = sinkhorn(s1, args.epsilon), sinkhorn(s2, args.epsilon)
        log_p1, log_p2 = (F.log_softmax(s / .1, 1) for s in (s1, s2))           # SwAV's temperature
        identity = -(q2 * log_p1 + q1 * log_p2).sum(1).mean() / 2
    elif args.identity == "square":
        identity = identitization_loss(c, args.lam)
    elif args.identity == "cross-entropy":
        identity = identitization_cross_entropy(c, args.temperature)
    else:
        identity = identitization_log_det(n1, n2, args.ridge)
    swap = swapped_assignment_loss(n1, n2, args.swap_temperature)               # of n, not s: D4
    loss = args.mu * identity + args.swap_weight * swap
    off = (c - torch.diag(c.diagonal())).square().sum() / (c.numel() - len(c))
    return loss, {"identity": identity, "swap": swap, "diagonal": c.diagonal().mean(),
                  "off_diagonal": off.sqrt(), "confidence": p1.amax(1).mean()}, p1


@torch.no_grad()
def matrix_now(net, images, views, seed, device):
    """C (K, K) of two views of about 2,000 training images, as training sees it (BatchNorm takes
    the statistics of the batch; the network itself is left alone): for correlation.png."""
    net, scores, rng = copy.deepcopy(net), [], generator(seed, 0, "correlation")
    for part in torch.arange(0, len(images), max(1, len(images) // 2000)).split(256):
        with autocast(device):
            scores.append([net(x) for x in views(fetch(images, part, device), rng)])
    return cross_correlation(*(torch.cat(s) for s in zip(*scores))).cpu()


def thirds(accuracy, counts):
    """Mean accuracy of the classes with many, medium, few training images; both lists by class."""
    order = sorted(range(len(counts)), key=lambda c: -counts[c])
    return {name: float(np.mean([accuracy[c] for c in part]))
            for name, part in zip(("many", "medium", "few"), np.array_split(order, 3))}


@torch.no_grad()
def report(args, run, data, net, untrained, index, clusters, statistics, views, matrices, device):
    """Scores of the frozen backbone and of the head's clusters beside two baselines; pictures."""
    table = baselines(data, untrained, statistics, clusters, args.seed, index, device)
    train_h = embed(net.backbone, data.train.images, statistics, device)
    test_h = embed(net.backbone, data.test.images, statistics, device) if data.has_test else train_h
    with torch.enable_grad():                                      # the probe is trained
        table["identitize"], found = evaluate(train_h, test_h, data, clusters, args.seed, index)
    net.eval()
    s = net.scores(train_h)
    mean, std = s[index.to(device)].mean(0), s[index.to(device)].std(0)
    own, head = (((s - mean) / std).argmax(1).cpu() for s in (s, net.scores(test_h)))
    more = {}
    if data.classes:                                               # K > C clusters: a vote of train
        seen = data.train.labels >= 0
        votes = data.train.labels[seen], own[seen]
        table["identitize, its head"] = cluster_scores(data.test.labels, head, votes)
        print_scores(table, data)
        if args.imbalance != 1:
            more["images_per_class"] = torch.bincount(data.train.labels[index]).tolist()
            more["linear_thirds"] = thirds(table["identitize"]["linear_per_class"],
                                           more["images_per_class"])
            print(f"  linear, by class frequency: {more['linear_thirds']}")
    save_picture(run.folder / "correlation.png", beside(*(
        heatmap(matrices[e], limit=1, title=f"C after {e} epochs")
        for e in sorted(matrices, key=int))))
    raw = fetch(data.train.images, index[:8], torch.device("cpu"))
    fed = views(raw, generator(args.seed, 0, "picture"))
    save_views(run.folder / "views.png", raw, fed, statistics)
    run.finish(table, net.backbone, found, **more)


def train(args):
    # 1. The data, checked before anything is written.
    device = pick_device(args.device)
    data = load_dataset(args.dataset, args.data_dir, args.image_size)
    n, k = len(data.train.images), args.clusters_head
    index = subset(data.train.labels, n, args.imbalance, args.train_size, args.seed)
    clusters, size = check_sizes(args, data, len(index)), data.train.images.shape[-1]
    with Run(args, "identitize", data) as run:
        # 2. Network and optimizer, and the state of an interrupted run.
        torch.manual_seed(args.seed)
        backbone = resnet18(size, args.width, args.stem_stride)
        net = Network(backbone, 8 * args.width, k, args.targets == "sinkhorn").to(device)
        untrained = copy.deepcopy(net.backbone)                    # a baseline of the report
        optimizer = torch.optim.Adam(net.parameters(), args.lr, weight_decay=args.weight_decay,
                                     fused=True)
        images = to_device(data.train.images, device)
        statistics = pixel_statistics(data.train.images)
        views = make_views(size, args.crop, args.jitter, args.gray, statistics)
        saved = run.load()
        if saved:
            net.load_state_dict(saved["net"])
            optimizer.load_state_dict(saved["optimizer"])
        matrices = saved["matrices"] if saved else {
            "0": matrix_now(net, images, views, args.seed, device)}
        forward = torch.compile(net) if args.compile else net
        print(f"identitize on {data.name}: {len(index):,} images, {describe(backbone, size)}; "
              f"{device}, {fast_dtype(device)}; {run.folder}")
        if args.targets == "identity" and args.batch_size <= k:
            print(f"note: a batch of {args.batch_size} gives C a rank of {args.batch_size - 1} at "
                  f"most: with K = {k} it can come near the identity only over many batches")
        # 3. Epochs.
        per_epoch = len(index) // args.batch_size
        steps, clock = per_epoch * args.epochs, Clock(device)
        for epoch in range(run.epoch, args.epochs):
            meter = Meter(f"identitize, epoch {epoch + 1}", optimizer, per_epoch)
            use = torch.zeros(2, k, device=device)                 # mean P and share of hits
            rng = generator(args.seed, epoch, "views")
            for i, (_, x1, x2) in enumerate(
                    batches(images, index, args.batch_size, views, rng, device, clock)):
                at = epoch * per_epoch + i
                set_lr(optimizer, args.lr * cosine_lr(at, steps, warmup=steps // 20))
                with autocast(device):                             # one pass: BatchNorm sees both
                    s1, s2 = forward(torch.cat([x1, x2])).chunk(2)              # BxK each
                loss, terms, p = losses(s1, s2, args)
                step(optimizer, loss)
                meter.add(loss=loss, **terms)
                hits = torch.bincount(p.detach().argmax(1), minlength=k)
                use += torch.stack([p.detach().mean(0), hits / len(p)]) / per_epoch
            # 4. The epoch's line: a collapse is seen when it happens.
            p, hits = use.double().cpu()
            record = {**meter.means(),
                      "effective_clusters": torch.special.entr(p).sum().exp().item(),
                      "clusters": int((hits > 0).sum()), "largest": hits.max().item()}
            if epoch + 1 in (args.epochs // 2, args.epochs):
                matrices[str(epoch + 1)] = matrix_now(net, images, views, args.seed, device)
            run.end_epoch(record, per_epoch * args.batch_size, clock, optimizer, {
                "net": net.state_dict(), "optimizer": optimizer.state_dict(), "matrices": matrices})
            if record["largest"] > .5 or record["confidence"] < 1.1 / k:
                print(f"WARNING: collapse: {record['largest']:.0%} of the images in one cluster, "
                      f"mean confidence {record['confidence']:.3f} (1/K is {1 / k:.3f})")
        # 5. The report. Labels are used from here on and never before.
        report(args, run, data, net, untrained, index, clusters, statistics, views, matrices,
               device)


def main(argv=None):
    run_script(train, parse(argv))


if __name__ == "__main__":
    main()
