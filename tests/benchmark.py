"""How fast is training, beside the bare network? And all that one GPU should be asked, at once.

    python tests/benchmark.py                  the speed table: the GPU, or the threads torch has
    python tests/benchmark.py --all            the four parts below; meant for one GPU

A part is a file in --out, and a part whose file is there is not run again: after an interruption
the same command goes on. rows.md holds all that was found, as rows for the README.

    check    each script on --dataset, three epochs a step, with --compile, interrupted and resumed
             after the first; what it warns of; how long compiling takes, by the first epoch
    speed    epochs of the script, and the bare network timed between them, so that their ratio
             means something: forward, backward and optimizer, on random views on the device, in the
             passes that the method needs. The peak memory is that of a batch of 512
    views    two views of an image by our primitives, and by torchvision on one core
    run      the four scripts, one after another, with as many epochs as --minutes leave room for

Flags that are not known here go to all four scripts:

    python tests/benchmark.py --all --dataset shapes --minutes 1 --width 16 --stem-stride 2
"""
import argparse
import contextlib
import copy
import importlib
import io
import json
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torchvision.transforms as T  # noqa: E402
from PIL import Image  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import common  # noqa: E402

SCRIPTS = "identitize", "scan", "mask_mix", "scl"
# Views of an image in each pass of the network, with a gradient and without one (in SCAN's step 2,
# to choose the epoch).
PASSES = {"identitize": ((2,), ()), "scl": ((2,), ()), "mask_mix": ((2,), (2,)),
          "scan pretext": ((2,), ()), "scan cluster": ((1, 1), (1,)),
          "scan self-label": ((1,), (1,))}
FLAGS = {"scl": "--warmup 0",             # clusters in every epoch
         "scan": "--cluster-epochs {0} --self-label-epochs {0} --threshold 0 --unsafe go"}
SHARE = {"scan cluster": .2, "scan self-label": .2}                # of the epochs of step 1


class Interrupted(Exception):
    """In place of Ctrl-C."""


# ------------------------------------------------------------------------------------------------
# The parts

def script(name, epochs, folder, args, after=lambda *_: None, report=False, flags=""):
    """Train with the real script, in silence. after(step, record, state, batch) is called at the
    end of each epoch, outside of its time."""
    module, end_epoch = importlib.import_module(name), common.Run.end_epoch

    def both(run, record, images, **state):
        end_epoch(run, record, images, **state)
        stage = record.get("stage", "")
        batch = getattr(run.args, f"{stage.replace('-', '_')}_batch", run.args.batch_size)
        after(f"{name} {stage}".strip(), run.log[-1], state, min(batch, images))
        run.ended = time.time()
    replaced = [(common.Run, "end_epoch", both), (common.Run, "INTERVAL", 0),
                (common, "knn_gauge", lambda *_: {}), (module, "knn_gauge", lambda *_: {})]
    if not report:                         # identitize draws its matrix three times a run
        replaced += [(module, name, lambda *_: torch.eye(2)) for name in ("report", "matrix_now")
                     if hasattr(module, name)]
    with contextlib.ExitStack() as stack, contextlib.redirect_stdout(io.StringIO()):
        for place, thing, value in replaced:
            stack.callback(setattr, place, thing, getattr(place, thing, None))
            setattr(place, thing, value)
        module.main(["--out", folder, "--epochs", str(epochs), "--device", args.device,
                     "--dataset", args.dataset, "--data-dir", args.data_dir, *args.more,
                     *FLAGS.get(name, "").format(epochs).split(), *flags.split()])


def check(name, args, device):
    """-> the seconds of the first and the last epoch of each step, those of the report, warnings"""
    seconds = {}

    def after(step, record, state, batch):
        seconds.setdefault(step, []).append(record["seconds"])
        seconds["ended"] = time.time()
        if record["epoch"] == 1:
            raise Interrupted
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with contextlib.suppress(Interrupted):
            script(name, 3, folder, args, after, True, "--compile")
        script(name, 3, folder, args, after, True, "--compile --resume")
    report = time.time() - seconds.pop("ended")
    return {"report": report, "precision": str(common.fast_dtype(device)),
            "warnings": sorted({str(w.message).splitlines()[0] for w in warned}),
            "steps": {step: {"first": s[0], "last": s[-1]} for step, s in seconds.items()}}


def rate(work, images, device, seconds=2.):
    """Mean images/s of work(), called for `seconds`, after two calls of warm-up. Not the median,
    which leaves out what slows a machine now and then: an epoch of a script has to count it."""
    def once():
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
    once(), once()
    began, calls = time.perf_counter(), 0
    while calls < 3 or time.perf_counter() < began + seconds:
        once()
        calls += 1
    return calls * images / (time.perf_counter() - began)


def bare_step(step, state, batch, size, device):
    """-> function that trains copies of the script's networks once, on random views. state: what
    the script saves after an epoch"""
    net = copy.deepcopy(state.get("net") or state["online"]).train()
    target = copy.deepcopy(state.get("target") or net)
    optimizer = type(state["optimizer"])(net.parameters(), lr=1e-4, fused=True)
    trained, free = ([torch.randn(n * batch, 3, size, size).to(device).contiguous(
        memory_format=torch.channels_last) for n in passes] for passes in PASSES[step])

    def work():
        outputs = []
        with common.autocast(device):
            with torch.no_grad():
                for x in free:
                    target(x)
            for x in trained:
                if step == "mask_mix":     # mixed features pass projector and predictor, too
                    h = net.backbone(x)
                    mixed = (h + h.roll(1, 0)) / 2
                    outputs += [net.predictor(net.projector(f)) for f in (h, mixed)]
                else:
                    out = net(x)
                    outputs += out if isinstance(out, tuple) else [out]
        optimizer.zero_grad()
        sum(out.float().square().mean() for out in outputs).backward()
        optimizer.step()
    return work


def speed(name, args, device):
    """-> {step: its figures}. The first epoch warms up. Each other one is compared with the bare
    network before and after it, since machines change their pace by the second."""
    seen, found = {}, {}

    def after(step, record, state, batch):
        work = bare_step(step, state, batch, args.image_size, device)
        with FlopCounterMode(display=False) as counter:
            work()
        bare = rate(lambda: [work() for _ in range(10)], 10 * batch, device)
        seen.setdefault(step, []).append((record["images_per_second"], bare, record["seconds"],
                                          counter.get_total_flops() / batch / 1e12, batch))
    with tempfile.TemporaryDirectory() as folder:
        script(name, args.epochs, folder, args, after)
    for step, epochs in seen.items():
        ratios = [2 * now[0] / (now[1] + last[1]) for last, now in zip(epochs, epochs[1:])]
        ours, bare, seconds, tera, batch = map(statistics.median, zip(*epochs[1:]))
        found[step] = {"ours": ours, "bare": bare, "ratio": statistics.median(ratios),
                       "seconds": seconds, "TFLOP/s": tera * ours, "batch": batch}
    if device.type == "cuda":

        def peak(step, *_):
            found[step]["GiB"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()
        more = "--cluster-batch 512 --self-label-batch 512" if name == "scan" else ""
        torch.cuda.reset_peak_memory_stats()
        with tempfile.TemporaryDirectory() as folder:
            script(name, 1, folder, args, peak, flags=f"--batch-size 512 {more}")
    return {"steps": found}


def views(args, device):
    """images/s of two views of each image of 32 px: (ours on the device, torchvision's)"""
    identitize, threads = importlib.import_module("identitize"), torch.get_num_threads()
    options, rng = identitize.parse(["--dataset", "cifar10"]), torch.Generator().manual_seed(0)
    images = torch.randint(256, (4096, 3, 32, 32), generator=rng).byte()
    make = identitize.make_views(options, common.pixel_statistics(images))
    chunk = images[:4096 if device.type == "cuda" else 512].to(device).float() / 255
    usual = T.Compose([T.RandomResizedCrop(32, (.2, 1)), T.RandomHorizontalFlip(),
                       T.RandomApply([T.ColorJitter(.4, .4, .4, .1)], .8), T.RandomGrayscale(.2),
                       T.ToTensor(), T.Normalize((.5,) * 3, (.25,) * 3)])
    pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images[:64]]
    ours = rate(lambda: make(chunk, rng), len(chunk), device)
    torch.set_num_threads(1)
    theirs = rate(lambda: [(usual(x), usual(x)) for x in pictures], 64, torch.device("cpu"))
    torch.set_num_threads(threads)
    return {"ours": ours, "torchvision": theirs}


def plan(args, parts):
    """-> {script: its flags}. Each gets a quarter of the minutes that are left; --compile where
    more epochs fit with it."""
    left, flags = 60 * args.minutes - sum(p["took"] for p in parts.values() if p), {}
    for name in SCRIPTS:
        checked, timed = parts[f"check-{name}"], parts[f"speed-{name}"]
        each = left / len(SCRIPTS) - (checked["report"] if checked else 0)
        epochs = compiled = 0
        if timed:
            epochs = each / sum(SHARE.get(step, 1) * row["seconds"]
                                for step, row in timed["steps"].items())
        if checked:
            steps = checked["steps"]
            start = sum(row["first"] - row["last"] for row in steps.values())
            compiled = (each - start) / sum(SHARE.get(step, 1) * row["last"]
                                            for step, row in steps.items())
        most = max(1, int(max(epochs, compiled)))
        flags[name] = f"--epochs {most}" + " --compile" * (compiled > epochs)
        if name == "scan":
            few = max(1, most // 5)
            flags[name] += f" --cluster-epochs {few} --self-label-epochs {few}"
    return flags


def run(name, flags, args):
    """The real script to its end. -> what the table shows of its result.json"""
    folder = Path(args.out) / name
    command = ["--dataset", args.dataset, *args.more, *flags.split()]
    importlib.import_module(name).main([*command, "--data-dir", args.data_dir, "--device",
                                        args.device, "--out", str(folder), "--resume"])
    result = json.loads((folder / "result.json").read_text())
    return {"command": " ".join([f"{name}.py", *command]), "scores": result["scores"],
            "minutes": result["training_seconds"] / 60}


# ------------------------------------------------------------------------------------------------
# The table

def rows(parts):
    """The markdown of all that is known."""
    head = ["step", "images/s", "bare network", "ratio", "TFLOP/s", "batch", "seconds an epoch",
            "with `--compile`", "seconds more in its first epoch", "epochs until that pays",
            "GiB, batch 512"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in SCRIPTS:
        checked = (parts.get(f"check-{name}") or {}).get("steps", {})
        for step, row in (parts[f"speed-{name}"] or {"steps": {}})["steps"].items():
            cells = [step, f"{row['ours']:,.0f}", f"{row['bare']:,.0f}", f"{row['ratio']:.2f}",
                     f"{row['TFLOP/s']:.3g}", f"{row['batch']:.0f}", f"{row['seconds']:.1f}"]
            if step in checked:
                first, last = checked[step]["first"], checked[step]["last"]
                gain = row["seconds"] - last
                pays = f"{max(0, first - last) / gain:,.0f}" if gain > 0 else "never"
                cells += [f"{last:.1f}", f"{first - last:.0f}", pays]
            cells += [""] * (10 - len(cells)) + [f"{row['GiB']:.1f}" if "GiB" in row else ""]
            lines.append("| " + " | ".join(cells) + " |")
    head = ["command", "scores", "ACC", "NMI", "ARI", "kNN", "linear", "minutes"]
    lines += ["", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for found in (parts.get(f"run-{name}") for name in SCRIPTS):
        for name, scores in found["scores"].items() if found else ():
            of = scores.get("kmeans", scores)
            cells = [*map(of.get, ("acc", "nmi", "ari")), *map(scores.get, ("knn", "linear"))]
            cells = ["" if c is None else f"{c:.3f}".lstrip("0") for c in cells]
            lines.append("| " + " | ".join([f"`{found['command']}`", name, *cells,
                                            f"{found['minutes']:.1f}"]) + " |")
    lines += [""] + [f"{name}: {p['precision']}, {p['report']:.0f} s for the report, warnings: "
                     f"{'; '.join(p['warnings']) or 'none'}"
                     for name, p in parts.items() if name.startswith("check") and p]
    if parts.get("views"):
        lines.append("two views of an image, images/s: {ours:,.0f}; torchvision, one core: "
                     "{torchvision:,.0f}".format(**parts["views"]))
    return "\n".join(lines) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--all", action="store_true", help="the four parts, not only speed")
    parser.add_argument("--minutes", type=float, default=25, help="of all parts together")
    parser.add_argument("--dataset", help="of the scripts; else cifar10 with --all, or shapes")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", default="runs/benchmark")
    parser.add_argument("--image-size", type=int, default=32, help="of the images of --dataset")
    parser.add_argument("--epochs", type=int, default=5, help="of each step, for its speed")
    args, args.more = parser.parse_known_args(argv)
    args.dataset = args.dataset or ("cifar10" if args.all else "shapes")
    device, parts = common.pick_device(args.device), {}

    def part(name, work, *more):
        path, began = Path(args.out) / f"{name}.json", time.time()
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            print(f"{name} ...", flush=True)
            try:
                found = {"took": 0, **work(*more)}
                found["took"] = time.time() - began
                common.write_text(path, json.dumps(found, indent=1) + "\n")
            except (Exception, SystemExit) as error:               # the other parts go on
                if isinstance(error, SystemExit) and error.code >= 128:    # not after Ctrl-C
                    raise
                print(f"{name} FAILED: {type(error).__name__}: {error}")
        parts[name] = json.loads(path.read_text()) if path.exists() else None
    for name in SCRIPTS if args.all else ():
        part(f"check-{name}", check, name, args, device)
    for name in SCRIPTS:
        part(f"speed-{name}", speed, name, args, device)
    if args.all:
        part("views", views, args, device)
        part("plan", plan, args, dict(parts))
        for name in SCRIPTS:
            part(f"run-{name}", run, name, parts["plan"][name], args)
    common.write_text(Path(args.out) / "rows.md", rows(parts))
    print("\n" + rows(parts))


if __name__ == "__main__":
    main()
