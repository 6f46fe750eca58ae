"""Nothing lost, nothing silent: what can go wrong in the middle of a run, for all four scripts.

A `life` is a run in a process of its own: it can be killed, interrupted, or denied its disk."""
import importlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import common

TINY = "--image-size 16 --width 16 --batch-size 50 --epochs 6 --device cpu"
SCRIPTS = {
    "identitize": "",
    "scan": "--epochs 2 --cluster-epochs 2 --cluster-batch 50 --self-label-epochs 2 "
            "--self-label-batch 100 --threshold .11 --neighbours 5",
    "mask_mix": "",
    "scl": "--warmup .5"}
SMALLEST = {"scan": "--cluster-batch 2 --self-label-batch 2"}
ALL = pytest.mark.parametrize("script", SCRIPTS)


def arguments(script, folder, *more):
    return [*TINY.split(), *SCRIPTS[script].split(), "--out", str(folder), *more]


# ------------------------------------------------------------------------------------------------
# Processes. Forked from a server that has only imported torch: a second each, not five.

def few_images():
    everything = common._shapes
    common._shapes = lambda size: everything(size, train=200, test=60)


def live(script, argv, prepare, output):
    """What a process does: `prepare` it (a function and its arguments), then run the script."""
    torch.set_num_threads(1)
    for number in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    few_images()
    common.Run.INTERVAL = 0                                        # a checkpoint after each epoch
    if prepare:
        prepare[0](*prepare[1:])
    importlib.import_module(script).main(argv)


def start(script, folder, *more, prepare=None, output=None):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *SCRIPTS])
    life = context.Process(target=live, args=(
        script, arguments(script, folder, *more), prepare, output or f"{folder}.txt"))
    life.start()
    return life


def finish(script, folder, *more, prepare=None, output=None):
    """-> (exit code, what was printed), minus the number of the signal that killed it."""
    life = start(script, folder, *more, prepare=prepare, output=output)
    life.join()
    with open(output or f"{folder}.txt") as file:
        return life.exitcode, file.read()


def same(a, b):
    """Nested state, equal to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def log_of(folder):
    """Its records, but for the stopwatch."""
    records = [json.loads(line) for line in open(folder / "log.jsonl")]
    return [{k: v for k, v in record.items()
             if k not in ("seconds", "images_per_second")} for record in records]


def assert_equal_runs(one, other):
    """The same files, weights, log and clusters, and nothing temporary left."""
    files = [sorted(f.name for f in folder.rglob("*")) for folder in (one, other)]
    assert {*files[0]} - {"checkpoint.previous.pt"} == {*files[1]} - {"checkpoint.previous.pt"}
    assert not [name for name in files[1] if name.endswith(".tmp")]
    a, b = (common.load_checked(folder / "checkpoint.pt")["state"] for folder in (one, other))
    assert same(a, b)
    assert log_of(one) == log_of(other)
    assert [record["epoch"] for record in log_of(other)] == [1, 2, 3, 4, 5, 6]
    for name in ("clusters.csv", "prototypes.png"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A function: script -> (folder of its run that nothing interrupted, its seconds)."""
    made = {}

    def run(script):
        if script not in made:
            folder = tmp_path_factory.mktemp(script) / "whole"
            finish(script, folder, "--help")                       # the server has started
            began = time.time()
            code, text = finish(script, folder)
            assert code == 0, text
            made[script] = folder, time.time() - began
        return made[script]
    return run


# ------------------------------------------------------------------------------------------------
# Killed

@pytest.mark.slow
@ALL
def test_a_run_killed_twenty_times_ends_as_if_nothing_had_happened(script, whole, tmp_path):
    untouched, seconds = whole(script)
    rng, kills, folder = random.Random(script), 0, tmp_path / "run0"
    while kills < 20:
        life = start(script, folder, "--resume")
        life.join(rng.uniform(0, .6 * seconds))
        if life.exitcode is None:
            life.kill()
            life.join()
            kills += 1
        else:                                                      # it came to its end: a new one
            assert life.exitcode == 0
            assert_equal_runs(untouched, folder)
            folder = tmp_path / f"run{kills}"
    code, text = finish(script, folder, "--resume")
    assert code == 0 and "Traceback" not in text, text
    assert_equal_runs(untouched, folder)


def die_at(operation, count):
    """Kill this process at its count-th call of an operation on files, before, in or after it."""
    real, calls = getattr(os, operation), []

    def deadly(*given):
        calls.append(1)
        if len(calls) == count:
            if operation == "fsync":                               # in the middle of writing
                os.ftruncate(given[0], os.fstat(given[0]).st_size // 2)
            elif count % 2:
                real(*given)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given)
    setattr(os, operation, deadly)


@pytest.mark.slow
@ALL
def test_a_run_killed_at_any_file_operation_ends_as_if_nothing_had_happened(script, whole,
                                                                            tmp_path):
    folder = tmp_path / "run"
    for operation in ("fsync", "replace"):
        for count in (1, 2, 3, 4, 5, 6):
            code, text = finish(script, folder, "--resume", prepare=(die_at, operation, count))
            assert code in (-signal.SIGKILL, 0) and "Traceback" not in text
    code, text = finish(script, folder, "--resume")
    assert code == 0, text
    assert_equal_runs(whole(script)[0], folder)


@pytest.mark.slow
@ALL
def test_the_same_seed_gives_the_same_run_and_another_seed_another(script, whole, tmp_path):
    assert finish(script, tmp_path / "again")[0] == 0
    assert_equal_runs(whole(script)[0], tmp_path / "again")
    assert finish(script, tmp_path / "other", "--seed", "1")[0] == 0
    a, b = (torch.load(folder / "backbone.pt", weights_only=True)
            for folder in (tmp_path / "again", tmp_path / "other"))
    assert not torch.equal(a["conv1.weight"], b["conv1.weight"])


def shuffled_labels():
    """The images of `shapes` under labels drawn by lot."""
    real = common._shapes

    def shapes(size):
        data = real(size)
        order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
        return data._replace(train=data.train._replace(labels=data.train.labels[order]))
    common._shapes = shapes


def tensors(state):
    """Weights, moments, memories, neighbours, without the scores that scan.py keeps beside them."""
    pairs = state.items() if isinstance(state, dict) else enumerate(state)
    return {key: tensors(value) if isinstance(value, (dict, list)) else value
            for key, value in pairs if isinstance(value, (dict, list, torch.Tensor))}


@pytest.mark.slow
@ALL
def test_labels_never_reach_the_training(script, whole, tmp_path):
    code, text = finish(script, tmp_path / "run", prepare=(shuffled_labels,))
    assert code == 0, text
    a, b = (tensors(common.load_checked(folder / "checkpoint.pt")["state"])
            for folder in (whole(script)[0], tmp_path / "run"))
    assert len(a) > 1 and same(a, b)


# ------------------------------------------------------------------------------------------------
# Interrupted, or not alone

def wait_for(path, text=""):
    """Until the file is there and holds the text."""
    limit = time.time() + 120
    while time.time() < limit:
        if os.path.exists(path) and (not text or text in Path(path).read_text()):
            return
        time.sleep(.01)
    raise AssertionError(f"{path} {text}")


def stopped_by(number, script, folder, *more):
    """Stop a life by a signal after its first checkpoint. -> the line with which it ended"""
    life = start(script, folder, *more)
    wait_for(folder / "checkpoint.pt")
    time.sleep(.05)                        # until the run, too, knows that it is there
    os.kill(life.pid, number)
    life.join(60)
    assert life.exitcode == 128 + number
    with open(f"{folder}.txt") as file:
        text = file.read()
    assert "Traceback" not in text and text.count("--resume") == 1
    kept = common.load_checked(folder / "checkpoint.pt")["epoch"]
    assert f"--resume goes on after epoch {kept}" in text.splitlines()[-1]
    return text.splitlines()[-1]


@pytest.mark.slow
@ALL
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_one_line_and_resume_ends_as_if_nothing_had_happened(script, number, whole,
                                                                         tmp_path):
    stopped_by(number, script, tmp_path / "run")
    code, text = finish(script, tmp_path / "run", "--resume")
    assert code == 0, text
    assert_equal_runs(whole(script)[0], tmp_path / "run")


def slowly():
    real = common.Run.save
    common.Run.save = lambda *given, **named: (time.sleep(.5), real(*given, **named))


@pytest.mark.slow
def test_a_run_is_stopped_by_sigterm_and_resumed_but_by_one_process_at_a_time(tmp_path):
    folder = tmp_path / "run"
    stopped_by(signal.SIGTERM, "identitize", folder)
    first = start("identitize", folder, "--resume", prepare=(slowly,), output=f"{folder}1.txt")
    wait_for(f"{folder}1.txt", "resuming")                         # it holds the lock
    code, text = finish("identitize", folder, "--resume", output=f"{folder}2.txt")
    assert code == 2 and "another process" in text.splitlines()[-1], text
    assert first.exitcode is None                                  # it was not disturbed
    first.kill()                                                   # and a kill leaves no lock
    first.join()
    assert finish("identitize", folder, "--resume")[0] == 0
    assert [record["epoch"] for record in log_of(folder)] == [1, 2, 3, 4, 5, 6]


def ignored(number):
    signal.signal(number, signal.SIG_IGN)


@pytest.mark.slow
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(tmp_path):
    # nohup python identitize.py &
    life = start("identitize", tmp_path / "run", prepare=(ignored, signal.SIGHUP))
    wait_for(tmp_path / "run" / "checkpoint.pt")
    os.kill(life.pid, signal.SIGHUP)
    life.join(60)
    assert life.exitcode == 0


@pytest.mark.slow
def test_a_run_with_a_pretext_file_does_not_need_the_file_again(whole, tmp_path):
    shutil.copytree(whole("identitize")[0], tmp_path / "pretext")
    flags = ["--pretext", str(tmp_path / "pretext" / "backbone.pt")]
    stopped_by(signal.SIGTERM, "scan", tmp_path / "run", *flags)
    shutil.rmtree(tmp_path / "pretext")
    code, text = finish("scan", tmp_path / "run", "--resume", *flags)
    assert code == 0, text


# ------------------------------------------------------------------------------------------------
# Two identical runs at the smallest sizes

def understood(script, *flags):
    try:
        return bool(importlib.import_module(script).parse(flags))
    except SystemExit:
        return False


def smallest_width(script):
    """That the script's own parser takes."""
    return next(w for w in range(1, 99) if understood(script, f"--width={w}"))


def precision(name):
    common.fast_dtype = lambda device: getattr(torch, name)


@pytest.mark.parametrize("script, dtype", [("identitize", "bfloat16"), *(
    pytest.param(script, dtype, marks=pytest.mark.slow) for script in SCRIPTS
    for dtype in ("float32", "bfloat16") if script != "identitize" or dtype == "float32")])
def test_two_runs_of_the_smallest_size_are_the_same_to_the_last_bit(script, dtype, tmp_path):
    width = smallest_width(script)
    for folder in ("one", "other"):
        code, text = finish(script, tmp_path / folder, *SMALLEST.get(script, "").split(),
                            *f"""--image-size 8 --width {width} --stem-stride 1 --batch-size 2
                            --clusters 2 --train-size 10 --epochs 1
                            --seed 9223372036854775807""".split(),
                            prepare=(precision, dtype))
        assert code == 0, text
    a, b = (common.load_checked(tmp_path / folder / "checkpoint.pt")["state"]
            for folder in ("one", "other"))
    assert same(a, b) and len(tensors(a)) > 1


def test_the_smallest_width_writes_over_no_foreign_memory():
    # With fewer than 16 channels torch's float32 backward of a strided 1x1 convolution does, on
    # processors with AVX512 from 48 x 48 positions on. glibc's checks notice it at once.
    code = f"""import torch, common
net, x = common.resnet18(96, {smallest_width("identitize")}), torch.randn(2, 3, 96, 96)
for _ in range(5):
    net(x.contiguous(memory_format=torch.channels_last)).sum().backward()"""
    checks = {"LD_PRELOAD": "libc_malloc_debug.so.0", "MALLOC_CHECK_": "3"}
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **checks},
                          capture_output=True, text=True, cwd=Path(common.__file__).parent)
    assert done.returncode == 0, done.stderr


@ALL
@pytest.mark.parametrize("flags", [["--image-size=7"], ["--image-size=8", "--stem-stride=2"],
                                   ["--width=0"], ["--batch-size=1"], ["--train-size=1"]])
def test_smaller_ones_are_refused_and_nothing_is_written(script, flags, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(script).main(arguments(script, tmp_path / "run", *flags))
    err = capsys.readouterr().err
    assert flags[-1].split("=")[0] in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------
# Denied

def files_of_at_most(size, after):
    """From the after-th checkpoint on, no file may grow beyond `size` bytes, as on a full disk."""
    real, calls = common.save_atomically, []

    def save(*given, **named):
        calls.append(1)
        if len(calls) == after:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        real(*given, **named)
    common.save_atomically = save


@pytest.mark.slow
@ALL
def test_a_full_disk_is_one_line_and_the_last_good_state_is_kept(script, whole, tmp_path):
    folder = tmp_path / "run"
    code, text = finish(script, folder, prepare=(files_of_at_most, 8000, 2))
    assert code == 1 and "Traceback" not in text, text
    assert "refused a file" in text.splitlines()[-1] and "--resume" in text.splitlines()[-1]
    kept = [common.load_checked(path)["epoch"] for path in folder.glob("checkpoint*.pt")]
    assert max(kept) >= 1 and not list(folder.glob("*.tmp"))
    assert finish(script, folder, "--resume")[0] == 0
    assert_equal_runs(whole(script)[0], folder)


@ALL
def test_a_folder_that_cannot_be_made_is_one_line(script, few_shapes, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).main(arguments(script, "/proc/nowhere/run"))
    err = capsys.readouterr().err
    assert stop.value.code == 1 and "/proc/nowhere" in err and len(err.strip().splitlines()) == 1


# ------------------------------------------------------------------------------------------------
# Not a number, not enough memory

@ALL
def test_what_is_not_finite_stops_the_run_and_the_checkpoint_before_it_stays(
        script, tmp_path, monkeypatch, few_shapes, capsys):
    module = importlib.import_module(script)
    real, first = module.batches, tmp_path / "run" / "checkpoint.pt"
    monkeypatch.setattr(common.Run, "INTERVAL", 0)

    def batches(*given):
        for index, *views in real(*given):
            if first.exists():                                     # in the second epoch
                views[0][0, 0, 0, 0] = float("inf")
            yield index, *views
    monkeypatch.setattr(module, "batches", batches)
    with pytest.raises(SystemExit) as stop:
        module.main(arguments(script, tmp_path / "run"))
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 1 and len(err.splitlines()) == 1
    assert "epoch 2" in err and "not finite" in err and "epoch 1 is kept" in err
    assert common.load_checked(tmp_path / "run" / "checkpoint.pt")["epoch"] == 1


def test_a_loss_that_is_not_finite_in_the_first_epoch_is_one_line_without_an_epoch_0(
        tmp_path, monkeypatch, few_shapes, capsys):
    module = importlib.import_module("identitize")
    monkeypatch.setattr(module, "identitization_loss", lambda m, _: m.sum() * float("nan"))
    with pytest.raises(SystemExit):
        module.main(arguments("identitize", tmp_path / "run"))
    err = capsys.readouterr().err.strip()
    assert len(err.splitlines()) == 1 and "identity" in err
    assert "epoch 0" not in err and "--resume" not in err          # it would end there again


def test_a_run_stopped_between_two_steps_goes_on_before_any_checkpoint_was_due(
        tmp_path, monkeypatch, few_shapes, capsys):
    module, mine = importlib.import_module("scan"), importlib.import_module("scan").mine

    def stopped(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(common.Run, "INTERVAL", 3600)
    monkeypatch.setattr(module, "mine", stopped)
    with pytest.raises(SystemExit, match="130"):
        module.main(arguments("scan", tmp_path / "run"))
    assert "--resume goes on after epoch 2" in capsys.readouterr().err
    monkeypatch.setattr(module, "mine", mine)
    module.main(arguments("scan", tmp_path / "run", "--resume"))
    assert "resuming" in capsys.readouterr().out
    assert [r["epoch"] for r in log_of(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


@ALL
def test_too_little_memory_is_one_line_that_says_what_to_lower(script, tmp_path, monkeypatch,
                                                               few_shapes, capsys):
    module = importlib.import_module(script)

    def batches(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    monkeypatch.setattr(module, "batches", batches)
    with pytest.raises(SystemExit) as stop:
        module.main(arguments(script, tmp_path / "run"))
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 1 and len(err.splitlines()) == 1
    assert "--batch-size" in err and "--width" in err and "None" not in err
