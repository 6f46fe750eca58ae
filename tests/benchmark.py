"""How fast is training, beside the bare network and beside the usual way of feeding it?

    python tests/benchmark.py                       every script, on the GPU or else on all cores
    python tests/benchmark.py --threads 1 --json    one core, as JSON
    python tests/benchmark.py --profile scan        where an epoch of scan.py goes, kernel by kernel

All rows come from one process, with the bare network timed between the epochs of every script, so
that their ratios mean something:

    bare        the network alone, backbone and head: forward, backward, optimizer step, on resident
                random views, in the passes that the method needs
    script      epochs of the real script: its views, losses, gauges, log and checkpoints
    usual       the same network fed by torchvision's transforms on PIL images in a DataLoader;
                lightly's and kornia's views too, where those packages are installed
    views       two views of an image by the scripts' primitives against torchvision's, on one core
    evaluation  k-means, kNN and linear probe of 60,000 embedded images
"""
import argparse
import contextlib
import importlib.util
import io
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
import torchvision.transforms as T  # noqa: E402
from PIL import Image  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import common  # noqa: E402
import identitize  # noqa: E402
import mask_mix  # noqa: E402
import scan  # noqa: E402
import scl  # noqa: E402

# Stages of a script: its passes of the network, trained and without a gradient (cluster: to choose
# the epoch), each with so many views of every image of the batch.
SCRIPTS = {"identitize": {"": ((2,), ())}, "scl": {"": ((2,), ())},
           "mask_mix": {"": ((2, 2), (2,))},
           "scan": {"pretext": ((2,), ()), "cluster": ((1, 1), (1,)), "self-label": ((1,), (1,))}}
FLAGS = {"scl": "--warmup 0",             # clusters in every epoch
         "scan": "--cluster-epochs {1} --self-label-epochs {1} --neighbours 5 --threshold 0 "
                 "--patience 0 --cluster-batch {0} --self-label-batch {0}"}
PEAK = {"H100": 989, "H200": 989, "A100": 312, "A6000": 155, "4090": 165}   # dense bf16, TFLOP/s


def rate(work, images, device, seconds=6.):
    """Median images/s of work(), called until `seconds` have passed, after two calls of warm-up."""
    def once():
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return images / (time.perf_counter() - began)
    once(), once()
    stop, rates = time.perf_counter() + seconds, []
    while time.perf_counter() < stop or len(rates) < 3:
        rates.append(once())
    return statistics.median(rates)


def network(script, args):
    """Backbone and head of a script, or of one of its stages; None: the backbone alone."""
    backbone, d = common.resnet18(32, args.width, args.stem_stride), 8 * args.width
    if script == "identitize":
        return identitize.Network(backbone, d, 64)
    if script == "scl":
        return torch.nn.Sequential(backbone, scl.Network(backbone, d, 10).head)
    if script == "mask_mix":
        net = mask_mix.Network(backbone, d, 1)
        return torch.nn.Sequential(backbone, net.projector, *net.predictors)
    if script:
        return scan.Network(backbone, scan.projection(d) if script == "scan pretext" else
                            scan.cluster_heads(d, 1, 10))
    return backbone


def training_step(args, device, script=None):
    """-> function of batches of views to train on and batches to pass without a gradient"""
    net = network(script, args).to(device)
    optimizer = torch.optim.Adam(net.parameters(), fused=True)

    def work(trained, free=()):
        with common.autocast(device):
            with torch.no_grad():
                for views in free:
                    net(views)
            out = [net(views).flatten(1) for views in trained]
        optimizer.zero_grad(set_to_none=True)
        torch.cat(out).float().square().mean().backward()
        optimizer.step()
    work.optimizer = optimizer
    return work


def random_views(args, device, passes):
    return [torch.randn(n * args.batch_size, 3, 32, 32, device=device).to(
        memory_format=torch.channels_last) for n in passes]


def bare(script, args, device, trained, free):
    """images/s"""
    work = training_step(args, device, script)
    views = [random_views(args, device, passes) for passes in (trained, free)]
    return rate(lambda: [work(*views) for _ in range(10)], 10 * args.batch_size, device, 2)


def optimizer_share(args, device):
    """Of the time of a bare step."""
    work, views = training_step(args, device), random_views(args, device, (2,))
    whole, last = (rate(lambda: [once() for _ in range(10)], 10 * args.batch_size, device, 2)
                   for once in (lambda: work(views), work.optimizer.step))
    return whole / last


@contextlib.contextmanager
def after_every_epoch(what):
    """Call what(its record) after each epoch that a script ends, outside of its clock."""
    end_epoch = common.Run.end_epoch

    def both(run, record, images, clock, *rest):
        end_epoch(run, record, images, clock, *rest)
        what(run.log[-1])
        clock.read()
    common.Run.end_epoch = both
    try:
        yield
    finally:
        common.Run.end_epoch = end_epoch


def script(name, args, device, epochs, after=lambda record: None):
    """Train with the real script on shapes, without its report. -> its log"""
    module = sys.modules[name]
    report, module.report = module.report, lambda *_: None
    flags = FLAGS.get(name, "").format(args.batch_size, epochs).split()
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), \
                after_every_epoch(after):
            module.main([
                "--out", f"{folder}/run", "--epochs", str(epochs), "--width", str(args.width),
                "--stem-stride", str(args.stem_stride), "--batch-size", str(args.batch_size),
                "--device", device.type, *["--compile"] * args.compile, *flags])
            return [json.loads(line) for line in open(f"{folder}/run/log.jsonl")]
    finally:
        module.report = report


def beside_bare(name, args, device, epochs=8):
    """{stage: (images/s, bare images/s, their ratio, share of views)} of a script, medians over
    epochs. The bare network is timed between the epochs, and an epoch compared with its two
    neighbours: machines change their pace by the second."""
    bounds = []

    def between(record):
        stage = record.get("stage", "")
        bounds.append(bare(f"{name} {stage}".strip(), args, device, *SCRIPTS[name][stage]))
    log = script(name, args, device, epochs, between)
    found = {stage: [] for stage in SCRIPTS[name]}
    for last, record, before, after in zip(log, log[1:], bounds, bounds[1:]):
        stage, bound = record.get("stage", ""), (before + after) / 2
        if stage == last.get("stage", ""):                         # the first epoch warms up
            speed = record["images_per_second"]
            found[stage].append((speed, bound, speed / bound, record["views_share"]))
    return {stage: [statistics.median(column) for column in zip(*rows)]
            for stage, rows in found.items()}


USUAL = T.Compose([T.RandomResizedCrop(32, (.2, 1)), T.RandomHorizontalFlip(),
                   T.RandomApply([T.ColorJitter(.4, .4, .4, .1)], .8), T.RandomGrayscale(.2),
                   T.ToTensor(), T.Normalize((.5,) * 3, (.25,) * 3)])


class TwoViews(torch.utils.data.Dataset):
    def __init__(self, images, two=lambda image: (USUAL(image), USUAL(image))):
        self.images = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images]
        self.two = two

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.two(self.images[i])


def usual(dataset, args, device):
    loader = torch.utils.data.DataLoader(
        dataset, args.batch_size, shuffle=True, drop_last=True, num_workers=args.workers,
        persistent_workers=True, pin_memory=device.type == "cuda")
    work = training_step(args, device)

    def epoch():
        for views in loader:
            work([torch.cat([x.to(device, non_blocking=True) for x in views]).to(
                memory_format=torch.channels_last)])
    return rate(epoch, len(loader) * args.batch_size, device)


def kornia_views(images, args, device):
    import kornia.augmentation as K
    view = torch.nn.Sequential(
        K.RandomResizedCrop((32, 32), (.2, 1.)), K.RandomHorizontalFlip(),
        K.ColorJitter(.4, .4, .4, .1, p=.8), K.RandomGrayscale(p=.2)).to(device)
    work, images = training_step(args, device), images.to(device)

    def steps():
        for _ in range(10):
            x = images[torch.randint(len(images), (args.batch_size,))].float() / 255
            work([torch.cat([view(x), view(x)]).to(memory_format=torch.channels_last)])
    return rate(steps, 10 * args.batch_size, device)


def others(images, args, device):
    """{name: images/s} of the usual pipelines."""
    found = {"torchvision, DataLoader": usual(TwoViews(images), args, device)}
    if importlib.util.find_spec("lightly"):
        from lightly.transforms import SimCLRTransform
        two = SimCLRTransform(input_size=32, cj_strength=.5, gaussian_blur=0.)
        found["lightly, DataLoader"] = usual(TwoViews(images, two), args, device)
    if importlib.util.find_spec("kornia"):
        found["kornia, on the device"] = kornia_views(images, args, device)
    return found


def views_on_one_core(images):
    """images/s of two views each: (ours, torchvision's)"""
    threads, cpu = torch.get_num_threads(), torch.device("cpu")
    torch.set_num_threads(1)
    make = identitize.make_views(32, .2, .5, .2, common.pixel_statistics(images))
    rng, index = common.generator(0, 0, "benchmark"), torch.arange(512)
    ours = rate(lambda: make(common.fetch(images, index, cpu), rng), 512, cpu, 4)
    pairs = TwoViews(images[:256])
    theirs = rate(lambda: [pairs[i] for i in range(256)], 256, cpu, 4)
    torch.set_num_threads(threads)
    return ours, theirs


def evaluation_seconds(args, device):
    """Of the scores of 50,000 + 10,000 features in ten overlapping groups."""
    rng, d = torch.Generator().manual_seed(0), 8 * args.width
    labels = torch.arange(60_000) % 10
    features = torch.randn(10, d, generator=rng)[labels] + 3 * torch.randn(60_000, d, generator=rng)
    features = features.to(device)
    splits = [common.Split(labels[part], labels[part], [])         # evaluate looks at no pixel
              for part in (slice(0, 50_000), slice(50_000, None))]
    data, began = common.Dataset("random", *splits, list("0123456789"), ""), time.perf_counter()
    common.evaluate(features[:50_000], features[50_000:], data, 10, 0)
    return time.perf_counter() - began


def tera_operations(args, device):
    """TFLOP of a training step of two views of an image, by torch's own count."""
    with FlopCounterMode(display=False) as counter:
        training_step(args, device)(random_views(args, device, (2,)))
    return counter.get_total_flops() / args.batch_size / 1e12


def profile(name, args, device):
    """An epoch of the real script, by torch.profiler: operations, kernels and their times."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] * (device.type == "cuda")
    with torch.profiler.profile(activities=kinds) as seen:
        script(name, args, device, epochs=2)
    table = seen.key_averages()
    print(table.table(sort_by=f"self_{device.type}_time_total", row_limit=25,
                      max_name_column_width=50))
    launches = sum(e.count for e in table if e.key in ("cudaLaunchKernel", "cuLaunchKernel"))
    print(f"{sum(e.count for e in table):,} operations, {launches:,} kernel launches")


def measure(args, device):
    """Yields (row, figure) as they are found."""
    gpu = device.type == "cuda"
    images = common.load_dataset("shapes").train.images
    name = torch.cuda.get_device_name() if gpu else "CPU"
    yield from {"device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
                "width": args.width, "stem stride": args.stem_stride, "batch size": args.batch_size,
                "precision": str(common.fast_dtype(device)).removeprefix("torch.")}.items()
    yield "share of the optimizer in bare", optimizer_share(args, device)
    speeds = {}
    for method in SCRIPTS:
        for stage, (speed, bound, ratio, views) in beside_bare(method, args, device).items():
            row = f"{method} {stage}".strip()
            speeds[row] = speed
            yield from {row: speed, f"{row}, bare": bound, f"{row} / bare": ratio,
                        f"{row}, share of views": views}.items()
    for other, speed in others(images, args, device).items():
        yield from {other: speed, f"identitize / {other}": speeds["identitize"] / speed}.items()
    ours, theirs = views_on_one_core(images)
    yield from {"views, one core": ours, "views, torchvision, one core": theirs,
                "views / torchvision": ours / theirs,
                "evaluation of 60,000, seconds": evaluation_seconds(args, device)}.items()
    done = tera_operations(args, device) * speeds["identitize"]
    yield "identitize, TFLOP/s", done
    if gpu:
        peak = next((v for k, v in PEAK.items() if k in name), None)
        if peak:
            yield "identitize, share of the peak", done / peak
        yield "peak memory, GiB", torch.cuda.max_memory_allocated() / 2**30


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, help="64 on a GPU, else 16")
    parser.add_argument("--stem-stride", type=int, help="1 on a GPU, else 2")
    parser.add_argument("--batch-size", type=int, help="512 on a GPU, else 64")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="of torch, on a CPU")
    parser.add_argument("--compile", action="store_true", help="of the scripts")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--profile", choices=SCRIPTS, help="of one script, instead of the table")
    args = parser.parse_args()
    device = common.pick_device(args.device)
    gpu = device.type == "cuda"
    args.width = args.width or (64 if gpu else 16)
    args.stem_stride = args.stem_stride or (1 if gpu else 2)
    args.batch_size = args.batch_size or (512 if gpu else 64)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.workers = os.cpu_count() if gpu else torch.get_num_threads()
    if args.profile:
        profile(args.profile, args, device)
        return
    table = {}
    for key, value in measure(args, device):
        table[key] = value
        if not args.json:
            print(f"{key:36} {value:,.2f}" if isinstance(value, float) else f"{key:36} {value}",
                  flush=True)
    if args.json:
        print(json.dumps(table))


if __name__ == "__main__":
    main()
