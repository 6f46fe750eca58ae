r"""SCL: deep clustering by semantic contrastive learning

After: Jiabo Huang, Shaogang Gong. Deep Clustering by Semantic Contrastive Learning. BMVC 2022.
https://arxiv.org/abs/2103.02662

This is a RECONSTRUCTION from the abstract. The full text could not be read when it was written. So
no formula here is quoted and no number of the paper is claimed. What we chose is numbered (D1...).
Someone with the paper at hand should be able to correct one function and keep the others.

The idea. Instance discrimination pushes every image away from every other image, also from those of
its own class. So clusters that are found afterwards cut through classes. Here clusters are part of
the training: an image is pushed away only from images of other clusters. Its cluster is predicted
twice, by the images that it resembles and by the boundaries of a classifier. A loss makes the two
agree, and their product chooses the image's cluster for the steps that follow.

         view 1              .--> the batch: pull the other view, push other clusters     L_sem
        /      \      g -> z <
    image       -> f <       '--> the memory M: votes of its clusters -> pv --.
        \      /      |                                                        +- agree  a L_con
         view 2       W --------> boundaries of the classifier -------> ps --<
                                                                              '- spread b L_bal
    after each step, for its images:   M <- M mixed with z;   after the warm-up c <- argmax pv ps

    what the abstract says                            what stands here
    instance discrimination is blind to classes, so   the warm-up; the baseline is --contrast
      clusters found after it miss their boundaries     instance --alpha 0, then k-means
    distances should follow clusters: a contrastive   semantic_contrastive_loss: its negatives
      loss that knows clusters does this                depend on the clusters
    visual similarity of instances and boundaries     visual_prediction, Network.classifier,
      between clusters have to be consistent            consistency_loss
    the classes are guessed by the consensus          consensus, in every step after the warm-up

    symbol    in the code      shape     meaning (B images in a batch, N in all, K clusters)
    h         h                2B x D    features of both views by the backbone f, D = 8 * --width
    z         z                2B x 128  embeddings of both views by the head g, of unit length
    M         memory           N x 128   one row for each training image, of unit length
    c         clusters         N         cluster of each training image, one of K
    e         e                2B x 2B   exp(similarity / tau) to each view of the batch; for pv to
                                         each row of M, 2B x N
    S         votes            2B x K    e, summed over the members of each cluster
    pv, ps    pv, ps           2B x K    visual and boundary prediction: probabilities
    W         classifier       K x D     weights of the classifier, a linear layer on h
    tau       --tau, --memory-tau        temperature in the batch; in the memory
    a, b      --alpha, --beta            weights: L = L_sem + a L_con + b L_bal (see losses)

Choices of ours, which may differ from the paper
    D1  L_sem contrasts the views of a batch. We tried a second L_sem, against the memory, in which
        near rows of the same cluster are pulled, too: slow, and no better clusters (section 6).
    D2  In the warm-up, 70 % of the epochs, each image is its own cluster. Then the schedule of the
        learning rate starts again. The baseline does the same, but keeps one cluster per image.
    D3  The first clusters come from k-means on the memory, which runs once. After that, each step
        chooses the clusters of its batch anew; the other images keep theirs.
    D4  W is fitted to the first clusters, by logistic regression, before it takes part.
    D5  A cluster votes by the mean of its members. By their sum, large clusters win by size.
    D6  L_bal is not in the abstract. Views, head, weights, tau, optimizer, schedule are ours, too.

    python scl.py                                       # ten kinds of shapes, on a laptop
    python scl.py --dataset cifar10                     # 200 epochs: not run; shorter: the README
    shapes, mean of seeds 0 to 4: ACC .992 by pv; .977 by k-means on z of the baseline (section 6)
"""
import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from common import (Meter, Parser, Run, autocast, baselines, batches, clustering, color_jitter,
                    cosine_lr, describe, embed, embed_both, evaluate, fast_dtype, fetch, generator,
                    given, heatmap, kmeans, knn_gauge, logistic_regression, normalise, number,
                    pixel_statistics, prepare, print_scores, random_grayscale,
                    random_resized_crop, resnet18, run_script, save_picture, save_views, score,
                    set_lr, to_device)

# ------------------------------------------------------------------------------------------------
# 1. The loss
# Anchors are the 2B views of the batch. Candidates are the same views for L_sem, and the N rows of
#    the memory for pv. The functions below have A anchors z_i and J candidates y_j.
# Which loss trains what: L_sem trains g. L_con trains g by pv, and W by ps. L_bal trains W. All of
#    them train f. No gradient enters the memory.
# No anchor is its own candidate. In the batch e_ii is not used, because only the other view is
#    pulled and only other clusters are pushed. In training an image's own row of the memory has no
#    vote for it, since it would vote for the cluster that the image already has.
# What prevents collapse: with all images in one cluster nothing is pushed, so L_sem is 0, its
#    minimum. If ps puts them there, too, L_con is 0 and L_bal is ln K, its maximum. So L_bal is the
#    only loss against collapse, and it acts on ps alone. An empty cluster has pv 0 and stays empty
#    in spite of L_bal: a good start (D3) and votes by the mean (D5) matter more.
# Why a memory beside the batch: of 64 images and ten clusters, about six are of the anchor's own
#    cluster. These are too few for votes.
# What it costs: e of the whole memory is kept for the gradient. 1.2 million rows times 512 views
#    take 2.5 GB: calculated.

def exponentials(z, candidates, tau):
    """e_ij = exp(z_i . y_j / tau)

    z: (A, 128) anchors, candidates y: (J, 128), rows of unit length; tau .03 or more, which keeps
    e^(1/tau) and sums of it finite. -> (A, J). Under autocast z_i . y_j is rounded to bfloat16."""
    return (z / tau @ candidates.t()).to(z.dtype).exp()


def cluster_votes(e, clusters, k):
    """S_ik = sum_{j: c_j = k} e_ij

    e (A, J), clusters c (J,) in 0..K-1, k: K. -> (A, K)"""
    return e.new_zeros(len(e), k).index_add(1, clusters, e)


def memory_votes(z, rows, memory, clusters, k, tau, piece=8192):
    """S_ik = sum_{j: c_j = k, j != o_i} e_ij

    z (2B, 128), both views of B images; memory (N, 128); rows (B,), all different: where these
    images stand in the memory. o_i, the row of anchor i's own image, has no vote for it. clusters c
    (N,), k: K. -> (2B, K). It reads `piece` rows at a time, for speed: small arrays fit a cache."""
    others = 1 - torch.eye(len(rows), dtype=z.dtype, device=z.device).repeat(2, 1)          # 2BxB
    batch = cluster_votes(others * exponentials(z, memory[rows], tau), clusters[rows], k)
    rest = clusters.index_fill(0, rows, k)     # here the batch votes for column k, which is cut off
    votes = sum(cluster_votes(exponentials(z, m, tau), c, k + 1)
                for m, c in zip(memory.split(piece), rest.split(piece)))
    return votes[:, :k] + batch


def semantic_contrastive_loss(e, votes, twin, clusters):
    """L_sem = -mean_i log( e_i,t_i / (e_i,t_i + pushed_i) ),   pushed_i = sum_{k != c_i} S_ik

    The anchor's other view t_i is pulled, all members of all other clusters are pushed.

    e         (A, J) from exponentials; votes S (A, K) from cluster_votes: column c_i is not used
    twin      t (A,): the candidate that is the anchor's other view; its cluster is c_i
    clusters  c (J,): cluster of each candidate, in 0..K-1

    -> scalar >= 0, lower is better. Other members of the anchor's cluster are neither pulled nor
    pushed. With one cluster it is 0. With a cluster for each image this is instance discrimination:
    within a batch ln(A - 1) when all views are equally similar."""
    pulled = e.gather(1, twin[:, None]).squeeze(1)                              # A
    pushed = votes.scatter(1, clusters[twin][:, None], 0).sum(1)                # A
    return ((pulled + pushed).log() - pulled.log()).mean()


def visual_prediction(votes, clusters):
    """pv_ik = (S_ik / n_k) / sum_l (S_il / n_l),   n_k: the size of cluster k

    The cluster of an image by what it looks like: how similar it is to the members of each cluster
    in the mean (D5). n_k counts the anchor's own row, too, although it has no vote in training. So
    the same n serves all anchors, and the anchor's own cluster counts too little by a share 1/n_k.
    votes S (A, K), clusters c (J,) of the candidates. -> (A, K), rows sum to 1; an empty cluster
    gets 0."""
    ones = torch.ones_like(clusters, dtype=votes.dtype)
    size = votes.new_zeros(votes.shape[1]).index_add(0, clusters, ones)         # K
    mean = votes / size.clamp(min=1)                                            # AxK
    return mean / mean.sum(1, keepdim=True).clamp(min=torch.finfo(mean.dtype).tiny)


def consistency_loss(pv, ps):
    """L_con = -mean_i log sum_k pv_ik ps_ik

    pv, ps: (A, K) probabilities, the visual and the boundary prediction. -> scalar >= 0, lower is
    better: 0 only where both are one-hot and agree, ln K where either is uniform; at most 18.4, by
    the 1e-8 that keeps it finite where both are sure and differ."""
    return -((pv * ps).sum(1) + 1e-8).log().mean()


def balance_loss(logits):
    """L_bal = ln K - H(q),   q_k = mean_i ps_ik,   H(q) = -sum_k q_k ln q_k,   ps = softmax(logits)

    logits: (A, K). -> scalar in [0, ln K], lower is better: 0 when the batch uses all clusters
    equally, ln K if all images are in one. Log-probabilities keep it finite where q_k is 0."""
    log_q = logits.log_softmax(1).logsumexp(0) - math.log(len(logits))          # K
    return math.log(logits.shape[1]) + (log_q.exp() * log_q).sum()


def update_memory(memory, rows, z, momentum):
    """m_r <- v / ||v||,   v = momentum m_r + (1 - momentum) z_i,   r = rows_i

    memory: (N, 128), changed in place. z: (B, 128), the mean of an image's two views. Rows of both
    have unit length. rows: (B,), where the images stand in the memory, all different. Momentum 0
    keeps the newest, 1 the oldest. No gradient enters the memory."""
    mixed = momentum * memory[rows] + (1 - momentum) * z.detach()
    memory[rows] = F.normalize(mixed, dim=1)


# ------------------------------------------------------------------------------------------------
# 2. The network

class Network(nn.Module):
    """Backbone f, head g, classifier W. Images (B, 3, H, W) -> z (B, 128), logits (B, K)"""

    def __init__(self, backbone, features, clusters):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Sequential(nn.Linear(features, 512, bias=False), nn.BatchNorm1d(512),
                                  nn.ReLU(), nn.Linear(512, 128))
        self.classifier = nn.Linear(features, clusters)

    def embedding(self, h):
        """Features (B, D) -> z (B, 128), of unit length; from here on in float32"""
        return F.normalize(self.head(h).float(), dim=1)

    def forward(self, x):
        h = self.backbone(x)
        return self.embedding(h), self.classifier(h).float()


# ------------------------------------------------------------------------------------------------
# 3. The views, and the hand-over from the warm-up to clusters

def make_views(args, statistics):
    """-> function of (raw images (B, 3, H, W) in [0, 1], generator) -> two views of each (D6)"""
    j = args.jitter

    def view(x, rng):
        x = random_resized_crop(x, (args.crop, 1), rng)            # and flip, p .5
        x = color_jitter(x, .8 * j, .8 * j, .8 * j, .2 * j, rng, p=.8)
        return normalise(random_grayscale(x, args.gray, rng), statistics)
    return lambda x, rng: (view(x, rng), view(x, rng))


@torch.no_grad()
def fit_classifier(classifier, h, clusters):
    """Give W the boundaries of the clusters, in place. h (N, D), clusters (N,). A random W would
    spoil the clusters by its part in the consensus."""
    mean, std = h.mean(0), h.std(0).clamp(min=1e-6)
    w = logistic_regression((h - mean) / std, clusters, classifier.out_features, decay=1e-3)
    classifier.weight.copy_((w[1:] / std[:, None]).t())            # now it takes h as it is
    classifier.bias.copy_(w[0] - mean / std @ w[1:])               # w[0] is the bias


def hand_over(net, images, index, memory, statistics, args):
    """After the warm-up: W is fitted (D4). -> the first clusters (N,) (D3)"""
    clusters = kmeans(memory, net.classifier.out_features, args.seed)[0]
    everything = torch.equal(index, torch.arange(len(images)))     # then no copy is needed
    seen = images if everything else images[index.to(images.device)]
    h = embed(net.backbone, seen, statistics, memory.device)       # un-augmented
    fit_classifier(net.classifier, h, clusters)
    return clusters


# ------------------------------------------------------------------------------------------------
# 4. Hyper-parameters

DEFAULTS = {                              # per dataset, where they differ from the flags' defaults
    "shapes": dict(epochs=10, batch_size=64, width=16, stem_stride=2, crop=.4, jitter=1., gray=.6),
}


def parse(argv=None):
    parser = Parser(__doc__, epochs=200)
    add = parser.training
    add("--batch-size", type=number(int, 2), default=256, help="B, images of a step")
    add("--lr", type=number(float, 0, above=True), default=2e-3, help="peak learning rate, of Adam")
    add("--weight-decay", type=number(float, 0), default=1e-4, help="L2 weight decay")
    add("--crop", type=number(float, 0, 1, above=True), default=.2, help="smallest share of the "
        "area of an image that a view shows")
    add("--jitter", type=number(float, 0, 1), default=.5, help="j: colour jitter .8j .8j .8j .2j")
    add("--gray", type=number(float, 0, 1), default=.2, help="probability of a grey view")
    add = parser.method
    add("--warmup", type=number(float, 0, 1), default=.7, help="share of epochs without "
        "clusters; with 0 the first clusters are random")
    add("--contrast", choices=("semantic", "instance"), default="semantic", help="instance: each "
        "image stays its own cluster in L_sem; with --alpha 0 the baseline")
    add("--alpha", type=number(float, 0), default=1., help="a, weight of L_con; with 0 pv alone "
        "chooses the clusters, and L_bal is off")
    add("--beta", type=number(float, 0), default=2., help="b, weight of L_bal")
    add("--frozen", action="store_true", help="keep the first clusters: no consensus")
    add("--tau", type=number(float, .03), default=.2, help="temperature of L_sem")
    add("--memory-tau", type=number(float, .03), default=.1, help="temperature of the votes")
    add("--momentum", type=number(float, 0, 1), default=.5, help="weight of the old row in the "
        "moving average of the memory")
    args = parser.parse(argv, DEFAULTS)
    if not args.alpha and "--beta" in given(argv):
        parser.note("without effect beside --alpha 0: --beta")
    return args


# ------------------------------------------------------------------------------------------------
# 5. Training

def losses(z, logits, rows, memory, clusters, args):
    """The algorithm in one place. z (2B, 128) and logits (2B, K) of both views; rows (B,) of their
    images in the memory (N, 128); its clusters (N,), None in the warm-up and for the baseline.
    Without clusters, and if alpha is 0, L is L_sem alone.
    -> L, {numbers for the log}, pv and ps (2B, K), None without clusters"""
    b, k = len(rows), logits.shape[1]
    image = torch.arange(b, device=z.device).repeat(2)             # 2B: 0, ..., b - 1, twice
    twin = torch.arange(2 * b, device=z.device).roll(b)            # 2B: the other view of the image
    alone = clusters is None or args.contrast == "instance"        # each image is its own cluster
    c, count = (image, b) if alone else (clusters[rows].repeat(2), k)           # c: 2B
    e = exponentials(z, z, args.tau)                                            # 2Bx2B
    loss = semantic_contrastive_loss(e, cluster_votes(e, c, count), twin, c)
    terms = {"semantic": loss}
    if clusters is None:
        return loss, terms, None, None
    with autocast(z.device):
        votes = memory_votes(z, rows, memory, clusters, k, args.memory_tau,
                             65536 if z.is_cuda else 8192)
    pv, ps = visual_prediction(votes, clusters), logits.softmax(1)              # 2BxK each
    if args.alpha:
        terms["consistency"], terms["balance"] = consistency_loss(pv, ps), balance_loss(logits)
        loss = loss + args.alpha * terms["consistency"] + args.beta * terms["balance"]
    return loss, terms, pv, ps


@torch.no_grad()
def consensus(pv, ps, alpha=1.):
    """argmax_k pv_ik ps_ik, where pv and ps are means over an image's two views. With alpha 0
    nothing trains W, so pv alone decides. pv, ps: (2B, K). -> clusters (B,), and the cells (B,) of
    agreement.png in which the images count, K argmax pv + argmax ps"""
    pv, ps = (sum(p.chunk(2)) / 2 for p in (pv, ps))                            # BxK each
    return (pv * ps if alpha else pv).argmax(1), pv.argmax(1) * pv.shape[1] + ps.argmax(1)


def predictions(net, h, memory, clusters, tau):
    """Features (n, D) of un-augmented images -> pv, ps (n, K). All rows of the memory vote. For a
    training image its own row votes, too, so the image tends a little to its last cluster."""
    k = net.classifier.out_features
    votes = torch.cat([cluster_votes(exponentials(z, memory, tau), clusters, k)
                       for z in net.embedding(h).split(256)])
    return visual_prediction(votes, clusters), net.classifier(h).softmax(1)     # BxK each


@torch.no_grad()
def report(args, run, net, untrained, index, memory, clusters, statistics, views, joint, device):
    """Scores of the frozen network and of both predictions, beside raw pixels and a random network;
    pictures. The abstract does not say which prediction is the result; clusters.csv follows pv."""
    data, table, k = run.data, {}, net.classifier.out_features
    train_h, test_h = embed_both(net.backbone, data, statistics, device)
    net.eval()
    on_h, found = evaluate(train_h, test_h, data, k, args.seed, index)
    on_z, _ = evaluate(net.embedding(train_h), net.embedding(test_h), data, k, args.seed, index,
                       probe=False)
    finals = {}
    if clusters is not None:
        (pv, ps), (test_pv, test_ps) = (predictions(net, h, memory, clusters, args.memory_tau)
                                        for h in (train_h, test_h))
        finals["scl, visual"] = found = clustering(pv, test_pv)    # found: for clusters.csv
        if args.alpha:                                             # otherwise W is not trained
            finals["scl, boundary"] = clustering(ps, test_ps)
        shares, agree = joint / joint.sum(1, keepdim=True).clamp(min=1), joint.trace() / joint.sum()
        save_picture(run.folder / "agreement.png", heatmap(
            shares, title=f"visual (row) x boundary, last epoch: {agree:.0%} agree"))
    if data.classes:
        table = baselines(data, untrained, statistics, k, args.seed, index, device)
        table.update({"k-means, features": on_h, "k-means, embedding": on_z})
        table.update({name: score(data, final, k) for name, final in finals.items()})
        print_scores(table, data)
    raw, rng = fetch(data.train.images, index[:8], device), generator(args.seed, 0, "picture")
    fed = views(raw, rng)
    save_views(run.folder / "views.png", raw, fed, statistics)
    run.finish(table, net.backbone, found, statistics)


def train(args):
    # 1. The data, checked before anything is written. index: the training images to learn from.
    device, data, index, k = prepare(args, DEFAULTS)
    n, size = len(index), data.train.images.shape[-1]

    def fits(state):                       # what a checkpoint holds beside the weights
        clusters = state["clusters"]
        return state["memory"].shape == (n, 128) and state["joint"].numel() == k * k and \
            (clusters is None or clusters.shape == (n,))
    with Run(args, "scl", data, fits=fits) as run:
        # 2. Network, memory and optimizer, and the state of an interrupted run.
        torch.manual_seed(args.seed)
        backbone = resnet18(size, args.width, args.stem_stride)
        net = Network(backbone, 8 * args.width, k).to(device)
        untrained = copy.deepcopy(net.backbone)                    # a baseline of the report
        optimizer = torch.optim.Adam(net.parameters(), args.lr, weight_decay=args.weight_decay,
                                     fused=True)
        images = to_device(data.train.images, device)
        statistics = pixel_statistics(data.train.images)
        views = make_views(args, statistics)
        row = torch.zeros(len(data.train.images), dtype=torch.int64, device=device)
        row[index.to(device)] = torch.arange(n, device=device)     # image -> its row of the memory
        start = torch.randn(n, 128, generator=generator(args.seed, 0, "memory"))
        saved = run.restore(net=net, optimizer=optimizer) or {
            "memory": F.normalize(start, dim=1), "clusters": None}
        memory, clusters = (None if saved[name] is None else saved[name].to(device)
                            for name in ("memory", "clusters"))
        joint = saved.get("joint")                                 # of the last epoch
        forward = torch.compile(net, dynamic=False) if args.compile else net
        print(f"scl on {data.name}: {n:,} images, {k} clusters, {describe(backbone, size)}; "
              f"{device}, {fast_dtype(device)}; {run.folder}")
        # 3. Epochs: from epoch `warm` on with clusters (not for the baseline). In each part the
        #    learning rate rises for a tenth of the steps, then it falls to 0.
        per_epoch, warm = n // args.batch_size, round(args.warmup * args.epochs)
        semantic = args.alpha or args.contrast == "semantic"       # else it is the baseline
        if semantic and warm == args.epochs and args.warmup < 1:
            print(f"note: --warmup {args.warmup} of {warm} epochs is all of them: this run only "
                  f"contrasts images, and its clusters are those of k-means")
        for epoch in range(run.epoch, args.epochs):
            if epoch == warm and semantic:
                clusters = hand_over(net, images, index, memory, statistics, args)
            first, last = (0, warm) if epoch < warm else (warm, args.epochs)
            steps, before = (last - first) * per_epoch, copy.deepcopy(clusters)
            meter = Meter(f"scl, epoch {epoch + 1}", per_epoch)
            joint = torch.zeros(k * k, device=device)              # visual x boundary
            rng = generator(args.seed, epoch, "views")
            for i, (part, x1, x2) in enumerate(
                    batches(images, index, args.batch_size, views, rng, device)):
                at, rows = (epoch - first) * per_epoch + i, row[part]
                set_lr(optimizer, args.lr * cosine_lr(at, steps, warmup=steps // 10))
                with autocast(device):                             # one pass: BatchNorm sees both
                    z, logits = forward(torch.cat([x1, x2]))
                loss, terms, pv, ps = losses(z, logits, rows, memory, clusters, args)
                optimizer.zero_grad()
                loss.backward()
                if clusters is None or not args.alpha:
                    # W is not in the loss. With --compile its gradient is 0 and not None, and Adam
                    # would move it.
                    net.classifier.zero_grad()
                optimizer.step()
                meter.add(loss=loss, **terms)
                if clusters is not None:
                    chosen, cells = consensus(pv, ps, args.alpha)
                    if not args.frozen:
                        clusters[rows] = chosen
                    joint.index_add_(0, cells, torch.ones_like(cells, dtype=joint.dtype))
                mean_z = F.normalize(sum(z.detach().chunk(2)), dim=1)           # Bx128
                update_memory(memory, rows, mean_z, args.momentum)
            # 4. The epoch's line: a collapse is seen when it happens.
            record = meter.means()
            if clusters is not None:                               # moved: changed in this epoch
                joint = joint.view(k, k).cpu()
                sizes = torch.bincount(clusters, minlength=k) / n
                record.update(agreement=(joint.trace() / joint.sum()).item(),
                              moved=(clusters != before).float().mean().item(),
                              clusters=int((sizes > 0).sum()), largest=sizes.max().item())
            record.update(knn_gauge(net.backbone, data, index, statistics, device, epoch, args))
            run.end_epoch(record, per_epoch * args.batch_size, net=net, optimizer=optimizer,
                          memory=memory, clusters=clusters, joint=joint)
            if record.get("largest", 0) > max(.5, 1.8 / k):        # 90 % where K is 2
                print(f"WARNING: collapse: {record['largest']:.0%} of the images in one cluster")
        # 5. The report. Until here labels only served knn_gauge and --train-size.
        report(args, run, net, untrained, index, memory, clusters, statistics, views, joint, device)


def main(argv=None):
    run_script(train, parse(argv))


if __name__ == "__main__":
    main()

# ------------------------------------------------------------------------------------------------
# 6. What was measured
# shapes, test images, seeds 0 to 4, means and the standard deviation of ACC:
#                                                       ACC          NMI   ARI   kNN
#     python scl.py, its clusters by pv                 .992 +- .002  .982  .982
#         by ps                                         .992 +- .001  .982  .981
#         by k-means on h                               .993 +- .003  .985  .985  .995
#     --contrast instance --alpha 0, by k-means on h    .970 +- .016  .952  .938  .985
#         by k-means on z                               .977 +- .005  .957  .950  .987
#     with L_sem against the memory, too (D1), by pv    .969 +- .041  .972  .955
# Parts left out, seeds 0 to 2, ACC by pv: none .993 +- .001; --contrast instance .976 +- .005;
#     --frozen, --beta 0, --alpha 0: .989 +- .002 each. So on shapes clusters in the contrast matter
#     most.
# 10,000 images, options $F and $C of the README, seeds 0 to 2 (CIFAR-10: images saved as JPEG):
#     Fashion-MNIST, by pv                              .632 +- .005  .582  .471
#         baseline, by k-means on h                     .623 +- .008  .558  .441  .777
#         baseline, by k-means on z                     .632 +- .022  .560  .445  .774
#     CIFAR-10, by pv                                   .313 +- .016  .194  .118
#         baseline, by k-means on h                     .306 +- .014  .186  .110  .506
#         baseline, by k-means on z                     .312 +- .012  .186  .113  .501
# So on these two the clusters of SCL are as good as those of k-means, but kNN on h is lower: .766
#     and .475. With 50,000 rows, width 16, on one core: 1,004 images/s without clusters, 389 in
#     the first epoch with them, k-means included.
# CIFAR-10, all 50,000 images, 50 epochs, rows 8 to 10 of the README, one seed:
#     by pv                                             .511          .396  .306
#     by ps                                             .511          .394  .304
#     by k-means on h                                   .510          .394  .301  .661
#     baseline, by k-means on h                         .432          .320  .225  .667
#     baseline, by k-means on z                         .488          .345  .255  .675
# So in a long run the clusters of SCL are better, and kNN is a little lower again.
