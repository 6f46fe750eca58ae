"""DOC"""
import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import (Clock, Meter, Parser, Run, autocast, baselines, batches, beside, check_sizes, cluster_scores,
                    color_jitter, cosine_lr, describe, embed, evaluate, fast_dtype, fetch, generator, heatmap, load_dataset,
                    normalise, number, pick_device, pixel_statistics, print_scores, random_grayscale,
                    random_resized_crop, resnet18, run_script, save_picture, save_views, set_lr, step, subset,
                    to_device)

# ------------------------------------------------------------------------------------------------
# 1. The loss


def cross_correlation(s1, s2):
    """C_kl = 1/B sum_b n1_bk n2_bl,  n = (s - mean_b s) / sqrt(var_b s + 1e-5)

    s1, s2: (B, K) cluster scores of the two views, any scale. -> C (K, K) in [-1, 1], float32 also
    under autocast: bfloat16 would spoil a centred matrix by up to .07. Unchanged when a column of
    s1 or s2 is shifted or scaled; permuting the clusters permutes it; swapping the views
    transposes it; rank at most min(B - 1, K)."""
    with torch.autocast(s1.device.type, enabled=False):
        n1, n2 = ((s - s.mean(0)) / (s.var(0, unbiased=False) + 1e-5).sqrt()
                  for s in (s1 if s1.dtype == torch.float64 else s1.float(),
                            s2 if s2.dtype == torch.float64 else s2.float()))
        return n1.t() @ n2 / len(s1)                                            # KxK


def identitization_loss(c, off_diagonal_weight):
    """L_id = sum_k (1 - C_kk)^2 + lam sum_{k != l} C_kl^2                        (square)

    c: (K, K) cross-correlation. lam = off_diagonal_weight. Lower is better: 0 at C = I. For B <= K it
    stays above lam (K - B + 1): the rank of C is at most B - 1."""
    diagonal = c.diagonal()
    consistency = (1 - diagonal).square().sum()
    decorrelation = c.square().sum() - diagonal.square().sum()
    return consistency + off_diagonal_weight * decorrelation


def identitization_cross_entropy(c, temperature):
    """L_id = 1/2 [ CE(C / t, I) + CE(C^T / t, I) ]                          (cross-entropy)

    c: (K, K) cross-correlation. Each row and each column of C / t is a softmax over clusters whose
    target is the diagonal. Lower is better: ln K at C = 0; for C = I it is
    ln(1 + (K - 1) exp(-1/t)), not 0."""
    target = torch.arange(len(c), device=c.device)
    rows = F.cross_entropy(c / temperature, target)
    columns = F.cross_entropy(c.t() / temperature, target)
    return (rows + columns) / 2


def swapped_assignment_loss(s1, s2, temperature):
    """L_swap = -1/(2B) sum_b sum_k [ sg(P2_bk) log P1_bk + sg(P1_bk) log P2_bk ],  P = softmax(s / tau)

    s1, s2: (B, K) scores, used as given. Gradients stop at both targets. Lower is better: at least
    the mean entropy of the assignments, ln K when all are uniform."""
    log_p1, log_p2 = F.log_softmax(s1 / temperature, 1), F.log_softmax(s2 / temperature, 1)
    p1, p2 = log_p1.detach().exp(), log_p2.detach().exp()
    return -(p2 * log_p1 + p1 * log_p2).sum(1).mean() / 2


def standardise(s):
    """n = (s - mean_b s) / sqrt(var_b s + 1e-5) for each cluster. (B, K) -> (B, K)"""
    return (s - s.mean(0)) / (s.var(0, unbiased=False) + 1e-5).sqrt()


def assignment_correlation(p1, p2):
    """C_kl = sum_b p1_bk p2_bl / (||p1_k|| ||p2_l||), columns not centred: reading A, which fails.

    p1, p2: (B, K) assignment probabilities. -> (K, K) in [0, 1]. It is the identity exactly when both
    views are one-hot and agree, and use every cluster, whatever the sizes of the clusters."""
    return F.normalize(p1, dim=0).t() @ F.normalize(p2, dim=0)


@torch.no_grad()
def sinkhorn(s, epsilon=.05, iterations=3):
    """The rival: SwAV's targets, exp(s / epsilon) scaled until all clusters have equal mass B / K.

    s: (B, K) scores. -> (B, K) targets; rows sum to 1, columns nearly to B / K."""
    q = s.float() / epsilon
    for _ in range(iterations):                                    # in logarithms: never overflows
        q = q - q.logsumexp(0, keepdim=True)
        q = q - q.logsumexp(1, keepdim=True)
    return q.exp()


# ------------------------------------------------------------------------------------------------
# 2. The network

class Network(nn.Module):
    """Backbone f, head g, prototypes W. Images (B, 3, H, W) -> cluster scores (B, K), cosines."""

    def __init__(self, backbone, features, clusters, dim=128):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Sequential(nn.Linear(features, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU(),
                                  nn.Linear(512, dim))
        self.prototypes = nn.Parameter(torch.randn(clusters, dim))

    def scores(self, h):
        """Features (B, D) -> s = z W^T (B, K), both sides unit length, float32."""
        z = self.head(h)
        with torch.autocast(h.device.type, enabled=False):
            return F.normalize(z.float(), dim=1) @ F.normalize(self.prototypes, dim=1).t()

    def forward(self, x):
        return self.scores(self.backbone(x))


# ------------------------------------------------------------------------------------------------
# 3. The views

def make_views(size, crop, jitter, gray, statistics):
    """-> function of (raw images (B, 3, H, W) in [0, 1], generator) that makes two views (D5)."""
    def view(x, rng):
        x = random_resized_crop(x, size, (crop, 1), rng)           # and flip, p .5
        x = color_jitter(x, .8 * jitter, .8 * jitter, .8 * jitter, .2 * jitter, rng, p=.8)
        return normalise(random_grayscale(x, gray, rng), statistics)
    return lambda x, rng: (view(x, rng), view(x, rng))


# ------------------------------------------------------------------------------------------------
# 4. Hyper-parameters

DEFAULTS = {                              # what differs from the defaults of the flags below (D6)
    "shapes": dict(epochs=40, batch_size=64, width=16, stem_stride=2, crop=.4, gray=.2),
}


def parse(argv=None):
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    # The same in all four scripts.
    add("--dataset", default="shapes", help="shapes, cifar10, cifar100, cifar20, fashion-mnist, stl10, "
        "tiny-imagenet, imagenet10, imagenet-dogs, or the path of a folder of images")
    add("--data-dir", default="data", help="downloads and decoded folders; the ImageNet folder for "
        "imagenet10 and imagenet-dogs")
    add("--image-size", type=number(int, 8, 1024), help="side in pixels; default: the dataset's own")
    add("--train-size", type=number(int, 2), help="learn from this many images, a balanced part")
    add("--clusters", type=number(int, 2), help="clusters of the report; default: the number of classes")
    add("--epochs", type=number(int, 1), default=200, help="passes over the training images")
    add("--batch-size", type=number(int, 2), default=256, help="B, images of a step")
    add("--lr", type=number(float, 0, above=True), default=2e-3, help="peak learning rate")
    add("--weight-decay", type=number(float, 0), default=1e-6, help="L2 weight decay")
    add("--width", type=number(int, 1, 512), default=64, help="channels of ResNet-18's first stage")
    add("--stem-stride", type=number(int, 1, 2), default=1, help="2: a cheaper stem for laptops")
    add("--seed", type=number(int, 0), default=0, help="of everything random")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
    add("--out", help="run folder; default: runs/<method>-<dataset>-seed<seed>")
    add("--resume", action="store_true", help="continue the run in the run folder")
    add("--compile", action="store_true", help="torch.compile the backbone: a minute slower to start")
    # The method's own.
    add("--crop", type=number(float, 0, 1, above=True), default=.2, help="smallest share of the area")
    add("--jitter", type=number(float, 0, 1), default=.5, help="strength s of the colour jitter: .8s, .8s, .8s, .2s")
    add("--gray", type=number(float, 0, 1), default=.2, help="probability of a grey view")
    add("--clusters-head", type=number(int, 2), default=128, help="K, clusters in the loss")
    add("--correlate", choices=("scores", "assignments"), default="scores",
        help="what C correlates: standardised scores, or probabilities (reading A, which fails)")
    add("--identity", choices=("square", "cross-entropy"), default="cross-entropy",
        help="how C is pushed to the identity: L_id")
    add("--lam", type=number(float, 0), default=.01, help="lam, weight of the off-diagonal (square)")
    add("--temperature", type=number(float, 0, above=True), default=.25, help="t (cross-entropy)")
    add("--mu", type=number(float, 0), help="mu, weight of L_id; default: 1, for square 10/K")
    add("--swap-weight", type=number(float, 0), default=.3, help="w, weight of L_swap")
    add("--swap-temperature", type=number(float, 0, above=True), default=1., help="tau of P")
    add("--targets", choices=("identity", "sinkhorn"), default="identity",
        help="sinkhorn: SwAV's equal-size targets in place of L_id, the rival with cluster balancing")
    add("--imbalance", type=number(float, 1), default=1., help="r: learn from a long tail, "
        "n_c = n_max r^(-c/(C-1)); set it beside --train-size of the same number of images")
    dataset = parser.parse_known_args(argv)[0].dataset
    parser.set_defaults(**DEFAULTS.get(dataset, {}))
    args = parser.parse_args(argv)
    if args.mu is None:
        args.mu = 1. if args.identity == "cross-entropy" else 10 / args.clusters_head
    if args.imbalance != 1 and args.train_size:
        parser.error("--imbalance and --train-size exclude each other")
    return args


# ------------------------------------------------------------------------------------------------
# 5. Training

def losses(s1, s2, args):
    """Scores (B, K) of two views -> (L, its terms, C, P1): one pass through the algorithm."""
    n1, n2 = standardise(s1), standardise(s2)                                   # BxK each
    p1, p2 = ((n / args.swap_temperature).softmax(1) for n in (n1, n2))
    c = cross_correlation(s1, s2) if args.correlate == "scores" else assignment_correlation(p1, p2)
    if args.targets == "sinkhorn":                                 # SwAV: codes of one view, predictions of the other
        q1, q2 = sinkhorn(s1), sinkhorn(s2)
        identity = -(q2 * (s1 / .1).log_softmax(1) + q1 * (s2 / .1).log_softmax(1)).sum(1).mean() / 2
    elif args.identity == "square":
        identity = identitization_loss(c, args.lam)
    else:
        identity = identitization_cross_entropy(c, args.temperature)
    swap = swapped_assignment_loss(n1, n2, args.swap_temperature)               # of n, not of s: D4
    return args.mu * identity + args.swap_weight * swap, {"identity": identity, "swap": swap}, c, p1


def gauges(c, p):
    """What to watch for collapse: mean diagonal and rms off-diagonal of C, mean largest probability."""
    off = c - torch.diag(c.diagonal())
    return {"diagonal": c.diagonal().mean(), "off_diagonal": (off.square().sum() / (c.numel() - len(c))).sqrt(),
            "confidence": p.amax(1).mean()}


@torch.no_grad()
def matrix_now(net, images, views, seed, device):
    """C over two views of up to 2,000 training images, in eval mode: what correlation.png shows."""
    net.eval()
    part = torch.arange(0, len(images), max(1, len(images) // 2000))[:2000]
    scores = []
    for some in part.split(250):
        with autocast(device):
            scores.append([net(x) for x in views(fetch(images, some, device), generator(seed, 0, f"C{some[0]}"))])
    net.train()
    return cross_correlation(*(torch.cat(s) for s in zip(*scores))).cpu()


def thirds(accuracy, counts):
    """Mean accuracy of the classes with many, medium and few training images. Two lists by class."""
    order = sorted(range(len(counts)), key=lambda c: -counts[c])
    parts = np.array_split(order, 3)
    return {name: float(np.mean([accuracy[c] for c in part])) for name, part in zip(("many", "medium", "few"), parts)}


def report(args, run, data, net, untrained, index, clusters, statistics, matrices, device):
    """Scores of the frozen backbone and of the head's clusters, beside two baselines; pictures."""
    train_f = embed(net.backbone, data.train.images, statistics, device)
    test_f = embed(net.backbone, data.test.images, statistics, device) if data.has_test else train_f
    ours, found = evaluate(train_f, test_f, data, clusters, args.seed, index)
    with torch.no_grad():                                          # the head: standardised over train, then argmax
        net.eval()
        s_train, s_test = net.scores(train_f), net.scores(test_f)
        mean, std = s_train[index.to(device)].mean(0), s_train[index.to(device)].std(0)
        own, head = (((s - mean) / std).argmax(1).cpu() for s in (s_train, s_test))
    table = baselines(data, untrained, statistics, clusters, args.seed, index, device)
    table["identitize"] = ours
    more = {}
    if data.classes:
        table["identitize, its head"] = cluster_scores(data.test.labels, head, (data.train.labels[own >= 0], own))
        counts = torch.bincount(data.train.labels[index], minlength=len(data.classes)).tolist()
        if args.imbalance != 1:
            more["linear_thirds"] = thirds(ours["linear_per_class"], counts)
        print_scores(table, data)
    save_picture(run.folder / "correlation.png", beside(*(
        heatmap(matrices[e], limit=1, title=f"C after {e} epochs") for e in sorted(matrices, key=int))))
    raw = fetch(to_device(data.train.images, device), index[:8], device)
    save_views(run.folder / "views.png", raw, make_views(raw.shape[-1], args.crop, args.jitter, args.gray, statistics)(
        raw, generator(args.seed, 0, "picture")), statistics)
    run.finish(table, net.backbone, found, **more)


def train(args):
    # 1. The data, checked before anything is written.
    device = pick_device(args.device)
    data = load_dataset(args.dataset, args.data_dir, args.image_size)
    size, k = data.train.images.shape[-1], args.clusters_head
    index = subset(data.train.labels, len(data.train.images), args.imbalance, args.train_size, args.seed)
    clusters = check_sizes(args, data, len(index))
    with Run(args, "identitize", data) as run:
        # 2. Network, optimizer, and the state of an interrupted run.
        torch.manual_seed(args.seed)
        net = Network(resnet18(size, args.width, args.stem_stride), 8 * args.width, k).to(device)
        untrained = copy.deepcopy(net.backbone)                    # a baseline of the report
        optimizer = torch.optim.Adam(net.parameters(), args.lr, weight_decay=args.weight_decay, fused=True)
        images, statistics = to_device(data.train.images, device), pixel_statistics(data.train.images)
        views = make_views(size, args.crop, args.jitter, args.gray, statistics)
        saved = run.load()
        if saved:
            net.load_state_dict(saved["net"])
            optimizer.load_state_dict(saved["optimizer"])
        else:
            saved = {"matrices": {"0": matrix_now(net, images, views, args.seed, device)}}
        matrices = saved["matrices"]
        forward = torch.compile(net) if args.compile else net
        print(f"identitize on {data.name}: {len(index):,} images, {describe(net.backbone, size)}; {device}, "
              f"{fast_dtype(device)}; {run.folder}")
        if args.targets == "identity" and args.batch_size <= k:
            print(f"note: C has rank {args.batch_size - 1} at most, so with K = {k} it cannot be the identity")
        # 3. Epochs.
        per_epoch = len(index) // args.batch_size
        steps, clock = per_epoch * args.epochs, Clock(device)
        for epoch in range(run.epoch, args.epochs):
            meter = Meter(f"identitize, epoch {epoch + 1}", optimizer, per_epoch)
            use = torch.zeros(2, k, device=device)                 # mean probability and hits of each cluster
            rng = generator(args.seed, epoch, "views")
            for i, (_, x1, x2) in enumerate(batches(images, index, args.batch_size, views, rng, device, clock)):
                set_lr(optimizer, args.lr * cosine_lr(epoch * per_epoch + i, steps, warmup=steps // 20))
                with autocast(device):
                    s1, s2 = forward(torch.cat([x1, x2])).chunk(2)              # one pass: BatchNorm sees both views
                loss, terms, c, p = losses(s1, s2, args)
                step(optimizer, loss)
                with torch.no_grad():
                    use += torch.stack([p.mean(0), torch.bincount(p.argmax(1), minlength=k) / len(p)]) / per_epoch
                    meter.add(loss=loss, **terms, **gauges(c, p))
            # 4. The epoch's line: a collapse is seen when it happens.
            p, hits = use.double().cpu()
            record = {**meter.means(), "effective_clusters": torch.special.entr(p).sum().exp().item(),
                      "clusters": int((hits > 0).sum()), "largest": hits.max().item()}
            if epoch + 1 in (args.epochs // 2, args.epochs):
                matrices[str(epoch + 1)] = matrix_now(net, images, views, args.seed, device)
            run.end_epoch(record, per_epoch * args.batch_size, clock, optimizer, {
                          "net": net.state_dict(), "optimizer": optimizer.state_dict(), "matrices": matrices})
            if record["largest"] > .5:
                print(f"WARNING: collapse: {record['largest']:.0%} of the images are in one cluster")
        # 5. The report: labels are used from here on, and never before.
        report(args, run, data, net, untrained, index, clusters, statistics, matrices, device)


def main(argv=None):
    run_script(train, parse(argv))


if __name__ == "__main__":
    main()
