"""How fast is training, beside the bare network and beside the usual way of feeding it?

    python tests/benchmark.py                       every script, on the GPU or else on all cores
    python tests/benchmark.py --threads 1 --json    one core, as JSON

All rows come from one process and one machine state, so that their ratios mean something:

    bare      forward, backward, optimizer step on resident random views: nothing else
    script    epochs of the real script: its views, losses, gauges, log and checkpoints
    usual     the same network fed by torchvision's transforms on PIL images in a DataLoader
    views     two views of an image by the scripts' primitives against torchvision's, on one core
"""
import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
import torchvision.transforms as T  # noqa: E402
from PIL import Image  # noqa: E402

import common  # noqa: E402
import identitize  # noqa: E402

SCRIPTS = {"identitize": identitize}      # images of two views each


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


def training_step(args, device):
    """-> function of two views that does what any method must: forward, backward, step."""
    net = common.resnet18(32, args.width, args.stem_stride).to(device)
    optimizer = torch.optim.Adam(net.parameters(), fused=True)

    def work(x1, x2):
        with common.autocast(device):
            h = net(torch.cat([x1, x2]))
        optimizer.zero_grad(set_to_none=True)
        h.float().square().mean().backward()
        optimizer.step()
    return work


def bare(args, device):
    views = [torch.randn(args.batch_size, 3, 32, 32, device=device) for _ in range(2)]
    views = [view.to(memory_format=torch.channels_last) for view in views]
    work = training_step(args, device)
    return rate(lambda: [work(*views) for _ in range(10)], 10 * args.batch_size, device)


def script(module, args, device):
    """images/s of epochs 2.. of the real script on shapes, and the share of them spent on views."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        module.main(["--out", f"{folder}/run", "--epochs", "4", "--width", str(args.width),
                     "--stem-stride", str(args.stem_stride), "--batch-size", str(args.batch_size),
                     "--device", device.type])
        log = [json.loads(line) for line in open(f"{folder}/run/log.jsonl")][1:]
    return (statistics.median(r["images_per_second"] for r in log),
            statistics.median(r["views_share"] for r in log))


USUAL = T.Compose([T.RandomResizedCrop(32, (.2, 1)), T.RandomHorizontalFlip(),
                   T.RandomApply([T.ColorJitter(.4, .4, .4, .1)], .8), T.RandomGrayscale(.2),
                   T.ToTensor(), T.Normalize((.5,) * 3, (.25,) * 3)])


class TwoViews(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return USUAL(self.images[i]), USUAL(self.images[i])


def usual(images, args, device):
    loader = torch.utils.data.DataLoader(
        TwoViews(images), args.batch_size, shuffle=True, drop_last=True, num_workers=args.workers,
        persistent_workers=True, pin_memory=device.type == "cuda")
    work = training_step(args, device)

    def epoch():
        for x1, x2 in loader:
            work(*(x.to(device, non_blocking=True).to(memory_format=torch.channels_last)
                   for x in (x1, x2)))
    return rate(epoch, len(loader) * args.batch_size, device)


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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, help="64 on a GPU, else 16")
    parser.add_argument("--stem-stride", type=int, help="1 on a GPU, else 2")
    parser.add_argument("--batch-size", type=int, help="512 on a GPU, else 64")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="of torch, on a CPU")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    device = common.pick_device(args.device)
    gpu = device.type == "cuda"
    args.width = args.width or (64 if gpu else 16)
    args.stem_stride = args.stem_stride or (1 if gpu else 2)
    args.batch_size = args.batch_size or (512 if gpu else 64)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.workers = 16 if gpu else torch.get_num_threads()
    images = common.load_dataset("shapes").train.images
    table = {"device": torch.cuda.get_device_name() if gpu else "CPU",
             "threads": torch.get_num_threads(), "width": args.width,
             "stem_stride": args.stem_stride,
             "batch_size": args.batch_size,
             "precision": str(common.fast_dtype(device))}
    table["bare"] = bare(args, device)
    for name, module in SCRIPTS.items():
        table[name], table[f"{name}: share of views"] = script(module, args, device)
        table[f"{name} / bare"] = table[name] / table["bare"]
    table["usual"] = usual(images, args, device)
    table["views"], table["views, torchvision"] = views_on_one_core(images)
    table["views / torchvision"] = table["views"] / table["views, torchvision"]
    if gpu:
        table["peak memory, GiB"] = torch.cuda.max_memory_allocated() / 2**30
    if args.json:
        print(json.dumps(table))
    else:
        for key, value in table.items():
            print(f"{key:32} {value:,.2f}" if isinstance(value, float) else f"{key:32} {value}")


if __name__ == "__main__":
    main()
