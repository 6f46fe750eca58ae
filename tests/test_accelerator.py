"""All four scripts on a simulated accelerator (see accelerator.py): nothing stays on the CPU, and
no training step waits. Faults planted in every training loop prove that they would be found."""
import types

import benchmark
import pytest
import torch
import torchvision
from accelerator import DEVICE, ROOT, Accelerator

import common

TINY = "--batch-size 32 --width 16 --stem-stride 2 --epochs {0}"
FLAGS = {"identitize": TINY + " --clusters-head 16", "mask_mix": TINY + " --mask-share .5",
         "scl": TINY, "scan": TINY + " --cluster-epochs {0} --self-label-epochs {0} --threshold .1 "
                                     "--unsafe go"}
LOOPS = [("identitize", 0), ("mask_mix", 0), ("scl", 0), ("scan", 0), ("scan", 1), ("scan", 2)]


class Interrupted(Exception):
    """In place of Ctrl-C."""


@pytest.fixture
def device(monkeypatch, few_shapes):
    """An Accelerator that every script takes; its waits are those of training steps alone. Reports
    do only a little of each thing: an operation on the device costs some 0.1 ms here."""
    device, kmeans, fit = Accelerator(), common.kmeans, common.logistic_regression
    device.waits = []

    class Watched(common.Meter):                                   # it sees every step of an epoch
        def __init__(self, *args):
            super().__init__(*args)
            device.recent.clear()

        def add(self, **terms):
            super().add(**terms)
            device.waits += device.recent
            device.recent.clear()
    monkeypatch.setattr(common, "Meter", Watched)
    monkeypatch.setattr(common, "pick_device", lambda _: DEVICE)
    monkeypatch.setattr(common, "kmeans", lambda x, k, seed, *_: kmeans(x, k, seed, 2, 10))
    monkeypatch.setattr(common, "logistic_regression", lambda *args, **more: fit(
        *args, **more, iterations=3))
    with device:
        yield device


def load(name, source=None):
    """A script as a module of its own, so that its source may be another."""
    path, script = ROOT / f"{name}.py", types.ModuleType(name)
    exec(compile(source or path.read_text(), path, "exec"), vars(script))
    return script


def interrupt_every_epoch(monkeypatch):
    end_epoch = common.Run.end_epoch

    def interrupted(self, *args, **state):
        end_epoch(self, *args, **state)
        if self.epoch < self.epochs:
            raise Interrupted
    monkeypatch.setattr(common.Run, "INTERVAL", 0)
    monkeypatch.setattr(common.Run, "end_epoch", interrupted)


# ------------------------------------------------------------------------------------------------
# The simulation

def test_the_device_refuses_what_a_gpu_refuses():
    with Accelerator():
        x = torch.ones(3, device=DEVICE)
        for wrong in (lambda: x + torch.ones(3), lambda: torch.stack([x, torch.ones(3)]),
                      lambda: torch.ones(3)[x.long()], lambda: x.index_select(0, torch.arange(3)),
                      lambda: x.numpy(), lambda: x.uniform_(generator=torch.Generator()),
                      lambda: torch.rand(3, device=DEVICE, generator=torch.Generator())):
            with pytest.raises((RuntimeError, TypeError), match="device"):
                wrong()


def test_the_device_computes_like_the_cpu_and_takes_what_a_gpu_takes():
    with Accelerator():
        x = torch.arange(3., device=DEVICE).requires_grad_()
        y = (x * torch.tensor(2.))[torch.tensor([2, 1])]           # number and index on the CPU
        y.square().sum().backward()                                # d/dx (2x)^2 = 8x
        assert y.device == DEVICE and y.tolist() == [4, 2] and x.grad.tolist() == [0, 8, 16]


def test_the_device_notices_every_wait():
    with Accelerator() as device:
        x = torch.arange(3., device=DEVICE)
        for wait in (lambda: x.sum().item(), lambda: x.cpu(), lambda: x.tolist(), lambda: x[x > 1],
                     lambda: x.nonzero(), lambda: x.long().bincount(), lambda: x.unique(),
                     lambda: bool(x[0] > 1), lambda: torch.ones(3).to(DEVICE),
                     lambda: torch.tensor([1.], device=DEVICE), lambda: x[torch.tensor([1])]):
            before = len(device.recent)
            wait()
            assert len(device.recent) == before + 1
        before = len(device.recent)
        torch.ones(3).to(DEVICE, non_blocking=True) + x.where(x > 1, 0).softmax(0)
        x.index_add_(0, x.long(), x + 1)[1:] = 0
        assert len(device.recent) == before


def test_the_scores_read_the_device_some_thousand_times_not_some_ten_thousand():
    # L-BFGS, six times in each of at most 100 iterations of five fits, reads most.
    y, rng = torch.arange(60) % 3, torch.Generator().manual_seed(0)
    features = torch.randn(60, 8, generator=rng) + 2 * torch.eye(3, 8)[y]
    splits = [common.Split(y[part], y[part], []) for part in (slice(0, 40), slice(40, 60))]
    data = common.Dataset("three groups", *splits, list("abc"), "")
    with Accelerator() as device:
        scores, _ = common.evaluate(features[:40].to(DEVICE), features[40:].to(DEVICE), data, 3, 0)
    assert scores["linear"] > .8
    assert sum(what != "copy to the device" for what, _ in device.recent) < 5000


# ------------------------------------------------------------------------------------------------
# The scripts

@pytest.mark.slow
@pytest.mark.parametrize("name", FLAGS)
def test_a_script_runs_on_the_device_resumes_and_never_waits_in_a_step(name, device, tmp_path,
                                                                       monkeypatch):
    interrupt_every_epoch(monkeypatch)
    script, argv = load(name), ["--out", str(tmp_path), "--resume", *FLAGS[name].format(2).split()]
    while not (tmp_path / "result.json").exists():
        try:
            script.main(argv)
        except Interrupted:
            continue
    waits = {}
    for wait in device.waits:
        waits[wait] = waits.get(wait, 0) + 1
    if name == "scan":                     # self-labelling may look whether anything is confident,
        assert list(waits.values()) == [2]                         # once a step
    else:
        assert not waits


@pytest.mark.slow
def test_a_run_serves_detection_clustering_and_other_images_on_the_device(device, tmp_path):
    mask_mix, scan = load("mask_mix"), load("scan")
    vars(mask_mix).update(SCHEDULES={8: 1}, TEST_SCENES=2)
    mask_mix.main(["--out", f"{tmp_path}/a", *FLAGS["mask_mix"].format(1).split()])
    mask_mix.main(["--detect", f"{tmp_path}/a"])
    scan.main(["--out", f"{tmp_path}/b", *FLAGS["scan"].format(1).split(),
               "--pretext", f"{tmp_path}/a/backbone.pt"])
    scan.main(["--assign", f"{tmp_path}/b", "--dataset", "shapes", "--out", f"{tmp_path}/c"])
    assert (tmp_path / "a/detection.json").exists() and (tmp_path / "c/clusters.csv").exists()


@pytest.mark.slow
def test_heads_on_a_frozen_backbone_learn_on_the_device_without_a_wait(device, tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "weights.pt")
    load("scan").main(["--out", f"{tmp_path}/a", "--cluster-epochs", "2", "--image-size", "32",
                       "--pretext", "resnet18", "--weights", f"{tmp_path}/weights.pt"])
    assert (tmp_path / "a/result.json").exists() and not device.waits


def planted(name, loop, fault):
    """A script's source with a fault in place of the loop's backward pass, and the fault's line."""
    parts = (ROOT / f"{name}.py").read_text().split("loss.backward()")
    before, after = ("loss.backward()".join(p) for p in (parts[:loop + 1], parts[loop + 1:]))
    return before + fault + after, before.count("\n") + 1


@pytest.mark.slow
@pytest.mark.parametrize("name, loop", LOOPS)
def test_a_tensor_left_on_the_cpu_is_found_in_every_loop(name, loop, device, tmp_path):
    script = load(name, planted(name, loop, "(loss + torch.zeros(2)).sum().backward()")[0])
    script.report = lambda *_: None
    with pytest.raises(RuntimeError, match="same device"):
        script.main(["--out", str(tmp_path), *FLAGS[name].format(1).split()])


@pytest.mark.slow
@pytest.mark.parametrize("name, loop", LOOPS)
def test_a_wait_is_found_in_every_loop(name, loop, device, tmp_path):
    source, line = planted(name, loop, "loss.item(), loss.backward()")
    script = load(name, source)
    script.report = lambda *_: None
    script.main(["--out", str(tmp_path), *FLAGS[name].format(1).split()])
    assert ("_local_scalar_dense", f"{name}.py:{line}") in device.waits


@pytest.mark.slow
def test_one_command_fills_every_row_of_the_benchmark_and_goes_on_where_it_stopped(
        device, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "rate", lambda work, images, device: (work(), images)[1])
    argv = ["--all", "--dataset", "shapes", "--minutes", "0", "--epochs", "2", "--out",
            str(tmp_path), "--width", "16", "--stem-stride", "2", "--batch-size", "100"]
    benchmark.main(argv)
    table = (tmp_path / "rows.md").read_text()
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[1:7]] == ["| " + step for step in (
        "identitize", "scan pretext", "scan cluster", "scan self-label", "mask_mix", "scl")]
    assert all(all(row[:9]) for row in rows[1:7])
    assert all(f"`{name}.py --dataset shapes" in table for name in benchmark.SCRIPTS)
    for name in ("speed-scl.json", "rows.md"):
        (tmp_path / name).unlink()
    for part in ("check", "views", "run"):
        monkeypatch.setattr(benchmark, part, None)                 # would fail when called
    benchmark.main(argv)
    assert (tmp_path / "rows.md").exists() and (tmp_path / "speed-scl.json").exists()
