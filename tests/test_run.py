"""The run folder: nothing is overwritten, nothing lost, nothing damaged or foreign taken in."""
import copy
import csv
import fcntl
import io
import json
import math
import os
import pickle
import random
import re
import shlex
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import common
from common import Clustering, Damaged, Finished, Run, UserError, load_checked, save_atomically
from common import write_text

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def every_epoch_is_saved(monkeypatch):
    monkeypatch.setattr(Run, "INTERVAL", 0)


def images_of(n=6, m=4, labelled=True, fingerprint="aaaa", name="pets"):
    def split(part, count):
        pixels = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8)
        return common.Split(pixels, torch.arange(count) % 2 if labelled else None,
                            [f"{part}/{i}.png" for i in range(count)])
    train = split("train", n)
    return common.Dataset(name, train, split("test", m) if m else train,
                          ["cat", "dog"] if labelled else None, fingerprint)


def open_run(folder, method="identitize", data=None, **other):
    shared = {"dataset": "pets", "data_dir": "data", "epochs": 10, "seed": 0, "width": 4, "lr": .1,
              "batch_size": 2, "clusters": 4, "device": "cpu", "compile": False, "resume": False}
    args = SimpleNamespace(**{**shared, "out": str(folder), **other})
    return Run(args, method, data or images_of())


def parts(value=0.):
    """A network whose 50 weights are all `value`, and its optimizer with moments."""
    net = nn.Linear(50, 1, bias=False)
    optimizer = torch.optim.Adam(net.parameters(), lr=.1)
    net(torch.ones(1, 50)).sum().backward()
    optimizer.step()
    nn.init.constant_(net.weight, value)
    return {"net": net, "optimizer": optimizer}


def epoch(run, value, **more):
    run.end_epoch({"loss": float(value), "clusters": 2}, 6, **parts(value),
                  matrices={"0": torch.eye(2)}, **more)


def finished(folder, epochs=3, **other):
    """A run folder after some epochs, none of which is the last."""
    with open_run(folder, **other) as run:
        for i in range(epochs):
            epoch(run, i + 1)
    return folder


def resumed(folder, **other):
    """(last epoch, the number in its network) that --resume goes on from."""
    with open_run(folder, resume=True, **other) as run:
        mine = parts()
        run.restore(**mine)
        return run.epoch, mine["net"].weight[0, 0].item()


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def contents(folder):
    return {f.name: f.read_bytes() for f in folder.glob("[!.]*") if f.is_file()}


# ------------------------------------------------------------------------------------------------
# Starting and continuing

def test_the_folder_is_named_after_method_dataset_and_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(open_run("", seed=7).folder) == os.path.join("runs", "identitize-pets-seed7")
    assert open_run(tmp_path / "mine").folder == tmp_path / "mine"


def test_nothing_is_written_before_the_run_starts(tmp_path):
    open_run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_new_run_has_no_state_and_starts_at_epoch_0(tmp_path):
    with open_run(tmp_path / "run") as run:
        assert run.restore(**parts()) == {} and run.epoch == 0


@pytest.mark.parametrize("file", Run.FILES)
def test_a_single_file_of_a_run_is_enough_to_refuse_a_new_one(tmp_path, file):
    (tmp_path / file).write_text("{}")
    with pytest.raises(UserError, match=f"already holds {file}"):
        open_run(tmp_path)
    assert contents(tmp_path) == {file: b"{}"}


def test_two_programs_may_write_the_same_file_at_once(tmp_path):
    path, pid = tmp_path / "cache.pt", os.getpid()
    with common.replacing(path) as ours:
        ours.write(b"ours")
        with pytest.MonkeyPatch.context() as other:
            other.setattr(os, "getpid", lambda: pid + 1)
            with common.replacing(path) as theirs:
                theirs.write(b"theirs")
        assert path.read_bytes() == b"theirs"
    assert path.read_bytes() == b"ours" and contents(tmp_path) == {"cache.pt": b"ours"}


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    for name in ("thesis.tmp", "notes.txt", "checkpoint.pt.7.tmp"):  # the last is one of ours
        (tmp_path / name).write_text("mine")
    end(tmp_path, images_of())
    assert (tmp_path / "thesis.tmp").exists() and (tmp_path / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "checkpoint.pt.7.tmp").exists()


def test_resume_continues_after_the_last_epoch(tmp_path):
    finished(tmp_path / "run", epochs=3)
    seconds = sum(r["seconds"] for r in log_of(tmp_path / "run"))
    with open_run(tmp_path / "run", resume=True) as run:
        rest = run.restore(**parts())
        assert list(rest) == ["matrices"] and torch.equal(rest["matrices"]["0"], torch.eye(2))
        assert run.seconds == pytest.approx(seconds)
        epoch(run, 4)
        assert run.epoch == 4
    assert [r["epoch"] for r in log_of(tmp_path / "run")] == [1, 2, 3, 4]
    assert resumed(tmp_path / "run") == (4, 4.)


def test_resume_where_there_is_nothing_yet_starts_from_the_beginning(tmp_path, capsys):
    assert resumed(tmp_path / "run") == (0, 0.)
    assert "starting from the beginning" in capsys.readouterr().out
    assert resumed(tmp_path / "run") == (0, 0.)                    # with an empty log


def test_an_optimizers_state_and_learning_rate_survive_the_checkpoint(tmp_path):
    finished(tmp_path / "run")
    mine = parts()
    mine["optimizer"].state.clear()
    mine["optimizer"].param_groups[0]["lr"] = 7
    with open_run(tmp_path / "run", resume=True) as run:
        run.restore(**mine)
    other = parts()["optimizer"]
    (a,), (b,) = mine["optimizer"].state.values(), other.state.values()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert mine["optimizer"].param_groups[0]["lr"] == .1


@pytest.mark.parametrize("name", sorted({*Run.FILES} - {"checkpoint.pt", "checkpoint.previous.pt",
                                                        "log.jsonl", "neighbours.png"}))
def test_a_run_whose_checkpoints_were_deleted_is_not_resumed_from_the_beginning(tmp_path, name):
    # Checkpoints are large; who deletes them to save space still wants to keep the results.
    folder = finished(tmp_path / "run")
    for file in ("checkpoint.pt", "checkpoint.previous.pt"):
        (folder / file).unlink()
    (folder / name).write_text("{}")
    before = contents(folder)
    for other in ({}, {"width": 8}):
        with pytest.raises(UserError, match="(?s)no checkpoint.*--out"):
            open_run(folder, resume=True, **other)
    assert contents(folder) == before


@pytest.mark.parametrize("names", [["log.jsonl"], ["neighbours.png"],
                                   ["log.jsonl", "neighbours.png"]])
def test_a_run_stopped_before_its_first_checkpoint_starts_anew(tmp_path, names):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    with pytest.raises(UserError, match="--resume"):
        open_run(folder)
    assert open_run(folder, resume=True).epoch == 0


RECORDS = [{"epoch": i + 1, "seconds": 20.} for i in range(10)]


@pytest.mark.parametrize("records, ours", [
    (RECORDS[:1], True), (RECORDS[:4], True), (RECORDS[:5], False),  # 80 s: a checkpoint was due
    (RECORDS, False), ([{"event": "login"}], False), ([1, 2], False), (["text"], False)])
def test_a_log_of_another_program_or_of_a_longer_run_is_never_begun_anew(records, ours, tmp_path,
                                                                         monkeypatch):
    monkeypatch.setattr(Run, "INTERVAL", 60)
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    before = log.read_bytes()
    if ours:
        assert open_run(tmp_path, resume=True).epoch == 0
    else:
        with pytest.raises(UserError, match="holds log.jsonl but no checkpoint"):
            open_run(tmp_path, resume=True)
    assert log.read_bytes() == before


@pytest.mark.parametrize("flag, value, also", [
    ("pretext", "resnet18", {"batch_size": 5}), ("train_size", 16, {"batch_size": 4}),
    ("labelled", True, {"batch_size": 7, "images": "bbbb"}), ("images", "bbbb", {"batch_size": 7})])
def test_of_several_differences_the_cause_is_named(flag, value, also, tmp_path):
    changed = {flag: value, **also}
    folder = finished(tmp_path / "run", epochs=1)
    data = images_of(fingerprint=changed.pop("images", "aaaa"))
    with pytest.raises(UserError) as caught:
        open_run(folder, data=data, resume=True, **changed)
    words = {"images": "other images"}.get(flag, "--" + flag.replace("_", "-"))
    assert words in str(caught.value) and "batch-size" not in str(caught.value)


@pytest.mark.parametrize("dataset", ["pets/", "./pets", "../here/pets"])
def test_other_images_are_not_blamed_on_another_spelling_of_their_path(dataset, tmp_path,
                                                                       monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = finished(tmp_path / "run", epochs=1)
    with pytest.raises(UserError, match="other images"):
        open_run(folder, data=images_of(fingerprint="bbbb"), resume=True, dataset=dataset)


@pytest.mark.parametrize("flag, told", [("epochs", True), ("cluster_epochs", False)])
def test_only_the_epochs_that_shape_the_learning_rate_are_said_to_do_so(flag, told, tmp_path):
    folder = finished(tmp_path / "run", epochs=1)
    with pytest.raises(UserError) as caught:
        open_run(folder, resume=True, **{flag: 12})
    assert ("learning rate" in str(caught.value)) == told


def test_a_checkpoint_that_does_not_fit_the_method_is_left_for_the_one_before(tmp_path, capsys):
    folder = finished(tmp_path / "run", epochs=3)
    seen = []

    def fits(state):
        seen.append(state["matrices"]["0"].shape)
        return len(seen) > 1
    args = open_run(tmp_path / "other").args
    args.out, args.resume = str(folder), True
    assert Run(args, "identitize", images_of(), fits=fits).epoch == 2 and len(seen) == 2
    assert capsys.readouterr().err.count("WARNING") == 1


def test_without_a_good_checkpoint_no_way_to_go_on_is_promised(tmp_path):
    folder = finished(tmp_path / "run", epochs=3)
    with pytest.raises(UserError, match="no good checkpoint") as caught:
        with open_run(folder, resume=True) as run:
            run.restore(net=nn.Linear(3, 1), optimizer=parts()["optimizer"])
    assert not hasattr(caught.value, "resume")


@pytest.mark.parametrize("lost", [[], ["checkpoint.pt"], ["checkpoint.previous.pt"], ["log.jsonl"]])
def test_resume_of_a_complete_run_says_so_and_changes_nothing(tmp_path, lost, capsys):
    end(tmp_path / "run", images_of(), epochs=2)
    for name in lost:
        (tmp_path / "run" / name).unlink()
    before = contents(tmp_path / "run")
    with pytest.raises(Finished, match="complete"):
        resumed(tmp_path / "run", epochs=2)
    assert contents(tmp_path / "run") == before


def test_a_run_that_was_stopped_in_its_report_is_resumed(tmp_path):
    end(tmp_path / "run", images_of(), epochs=2)
    (tmp_path / "run" / "result.json").unlink()                    # it is written last of all
    assert resumed(tmp_path / "run", epochs=2) == (2, 2.)


# ------------------------------------------------------------------------------------------------
# Two processes, one folder

@pytest.mark.parametrize("resume", [True, False])
def test_a_second_process_is_refused_in_one_line_and_changes_nothing(tmp_path, resume):
    with open_run(tmp_path / "run") as run:
        second = open_run(tmp_path / "run", resume=True) if not resume else None
        epoch(run, 1)
        second = second or open_run(tmp_path / "run", resume=True)
        before = contents(tmp_path / "run")
        with pytest.raises(UserError, match="another process") as caught:
            second.__enter__()
        assert "\n" not in str(caught.value) and contents(tmp_path / "run") == before
        epoch(run, 2)
    assert resumed(tmp_path / "run") == (2, 2.)


def test_a_lock_left_by_a_kill_locks_nothing_and_one_at_a_time_writes_to_the_end(tmp_path):
    folder = finished(tmp_path / "run")
    assert resumed(folder) == (3, 3.) and (folder / ".lock").exists()
    # A third process that opened the lock before the first one ended waits for the second one.
    third = open(folder / ".lock", "a")
    with open_run(folder, resume=True), pytest.raises(BlockingIOError):
        fcntl.flock(third, fcntl.LOCK_EX | fcntl.LOCK_NB)
    third.close()


# ------------------------------------------------------------------------------------------------
# The log

def test_the_log_has_one_object_for_each_epoch(tmp_path):
    records = log_of(finished(tmp_path / "run", epochs=3))
    assert [r["epoch"] for r in records] == [1, 2, 3] and [r["loss"] for r in records] == [1, 2, 3]
    assert all({"lr", "images_per_second", "seconds", "clusters"} <= set(r) for r in records)
    assert records[0]["lr"] == .1 and records[0]["images_per_second"] * \
        records[0]["seconds"] == pytest.approx(6)


def test_the_terminal_shows_the_epoch_its_terms_and_the_time_left(tmp_path, capsys):
    with open_run(tmp_path / "run") as run:
        epoch(run, 1.25)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert "1/10" in line and "loss 1.25" in line and "clusters 2" in line and line.endswith("left")


@pytest.mark.parametrize("tail", ['{"epoch": 4, "loss": 4.0}\n{"epoch": 5, "lo', "", None])
def test_on_resuming_the_log_is_that_of_the_checkpoint(tmp_path, tail):
    # Killed after the log line of epoch 4 but before its checkpoint; or the log was lost.
    folder = finished(tmp_path / "run", epochs=3)
    before = log_of(folder)
    if tail is None:
        (folder / "log.jsonl").unlink()
    else:
        with open(folder / "log.jsonl", "a") as file:
            file.write(tail)
    with open_run(folder, resume=True) as run:
        run.restore(**parts())
        assert log_of(folder) == before
        epoch(run, 4)
    assert [r["epoch"] for r in log_of(folder)] == [1, 2, 3, 4]


# ------------------------------------------------------------------------------------------------
# When a checkpoint is written

def test_at_most_one_checkpoint_in_an_interval_and_one_after_the_last_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "INTERVAL", 60)
    last = lambda: [load_checked(f)["epoch"]                                    # noqa: E731
                    for f in sorted(tmp_path.glob("check*.pt"), key=lambda f: len(f.name))]
    with open_run(tmp_path, epochs=4) as run:
        epoch(run, 1)
        assert last() == []
        monkeypatch.setattr(Run, "INTERVAL", 0)                    # the time is over
        epoch(run, 2)
        assert last() == [2]
        monkeypatch.setattr(Run, "INTERVAL", 60)
        epoch(run, 3)
        assert last() == [2]
        epoch(run, 4)                                              # the last
        assert last() == [4, 2]                                    # and checkpoint.previous.pt


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError, ValueError, OSError])
def test_whatever_ends_the_run_it_says_where_resume_goes_on(tmp_path, monkeypatch, error):
    for interval, epochs, words in ((60, 2, "starts anew"), (0, 2, "after epoch 2")):
        monkeypatch.setattr(Run, "INTERVAL", interval)
        folder = tmp_path / str(interval)
        with pytest.raises(error) as caught:
            with open_run(folder) as run:
                epoch(run, 1)
                epoch(run, 2)
                raise error("stop")
        assert "--resume" in caught.value.resume and words in caught.value.resume
        assert resumed(folder)[0] == (0 if interval else 2)


BAD = {"a term": {"record": math.nan}, "an infinite term": {"record": -math.inf},
       "a weight": {"weight": math.nan}, "an infinite weight": {"weight": math.inf},
       "a statistic of BatchNorm": {"buffer": math.nan}}


@pytest.mark.parametrize("what", BAD)
def test_what_is_not_finite_stops_the_run_before_anything_is_written(tmp_path, what):
    with open_run(tmp_path / "run") as run:
        epoch(run, 1)
        before, state = contents(tmp_path / "run"), parts(2)
        state["net"].register_buffer("mean", torch.tensor([1., BAD[what].get("buffer", 0.)]))
        state["net"].weight.data[0, 17] = BAD[what].get("weight", 0.)
        with pytest.raises(common.NotFinite) as caught:
            run.end_epoch({"loss": 2., "swap": BAD[what].get("record", 0.)}, 6, **state)
        words = str(caught.value)
        assert "epoch 2" in words and "\n" not in words and "epoch 1 is kept" in words
        assert ("swap" if "record" in BAD[what] else "net") in words
        assert contents(tmp_path / "run") == before


def test_large_and_whole_numbers_are_finite(tmp_path):
    with open_run(tmp_path / "run") as run:
        state = parts(1e36)                                        # 50 of them: 5e37
        state["net"].register_buffer("count", torch.tensor(2**62))
        run.end_epoch({"loss": 1e308, "clusters": 2, "rule": "vote"}, 6, **state)


# ------------------------------------------------------------------------------------------------
# Damage

def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[:len(content) // 2]
    elif how == "cut by one byte":
        content = content[:-1]
    elif how == "empty":
        content = b""
    elif how == "text":
        content = b"not a checkpoint\n" * 100
    elif how == "zeros":
        content = bytes(len(content))
    elif how == "a flipped bit in a weight":
        at = content.index(np.float32(3).tobytes() * 10)           # the weights of epoch 3
        content[at + 41] ^= 1
    path.write_bytes(content)


DAMAGES = ["truncated", "cut by one byte", "empty", "text", "zeros", "a flipped bit in a weight"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before_with_a_loud_line(tmp_path, how, capsys):
    folder = finished(tmp_path / "run", epochs=3)
    damage(folder / "checkpoint.pt", how)
    assert resumed(folder) == (2, 2.)
    assert [r["epoch"] for r in log_of(folder)] == [1, 2]
    out, err = capsys.readouterr()
    assert "WARNING" in err and "checkpoint.pt" in err
    assert "after epoch 2" in out and "after epoch 3" not in out


@pytest.mark.parametrize("how", DAMAGES[:-1])
@pytest.mark.parametrize("epochs", [1, 3])                         # 1: there is no previous one
def test_without_a_good_checkpoint_the_folder_is_refused_and_left_as_it_is(tmp_path, how, epochs):
    folder = finished(tmp_path / "run", epochs)
    for path in folder.glob("checkpoint*.pt"):
        damage(path, how)
    before = contents(folder)
    with pytest.raises(UserError, match="no good checkpoint is left.*--out"):
        open_run(folder, resume=True)
    assert contents(folder) == before


def test_a_damaged_checkpoint_never_takes_the_place_of_the_good_one_before_it(tmp_path):
    # After falling back, the next save keeps the current file as the previous one. If that is the
    # damaged one, a kill in the middle of the save leaves nothing to resume from.
    folder = finished(tmp_path / "run", epochs=3)
    damage(folder / "checkpoint.pt", "truncated")
    with open_run(folder, resume=True) as run:
        run.restore(**parts())
        epoch(run, 3)
    if (folder / "checkpoint.previous.pt").exists():
        assert load_checked(folder / "checkpoint.previous.pt")["epoch"] == 2
    (folder / "checkpoint.pt").unlink()                            # the kill
    assert resumed(folder)[0] >= 2


def changed(saved, where, value):
    """saved with the part at a path of keys replaced, or taken out (value None)."""
    saved = copy.deepcopy(saved)
    part = saved
    for key in where[:-1]:
        part = part[key]
    if value is None:
        del part[where[-1]]
    else:
        part[where[-1]] = value
    return saved


WEIGHT, MOMENT = ("state", "net", "weight"), ("state", "optimizer", "state", 0, "exp_avg")
FOREIGN = [
    *[((key,), value) for key in ("settings", "epoch", "seconds", "log", "state")
      for value in (None, "x", [torch.zeros(2)])],
    (("epoch",), -1), (("epoch",), 11), (("epoch",), 2.5), (("seconds",), math.nan),
    (("log",), ["x"]), (("log",), [{}]), (("log",), [{"epoch": "one", "seconds": "two"}]),
    (("state", "net"), None), (("state", "optimizer"), None),
    (("state", "net"), [1, 2]), (("state", "net"), {}), (("state", "optimizer"), {}),
    (WEIGHT, None), (WEIGHT, torch.zeros(2, 50)), (WEIGHT, torch.zeros(50, 1)), (WEIGHT, "x"),
    (("state", "net", "more"), torch.zeros(1)), (WEIGHT, torch.full((1, 50), math.nan)),
    (WEIGHT, torch.full((1, 50), math.inf)), (WEIGHT, torch.ones(1, 50, dtype=torch.complex64)),
    (WEIGHT, torch.ones(1, 50).to_sparse()), (WEIGHT, torch.ones(1, 50, device="meta")),
    (WEIGHT, torch.ones(1, 50).to_sparse_csr()),
    (WEIGHT, torch.quantize_per_tensor(torch.ones(1, 50), .1, 0, torch.qint8)),
    (MOMENT, None), (MOMENT, torch.zeros(1, 49)), (MOMENT, torch.full((1, 50), math.nan)),
    (MOMENT, "x"), (("state", "optimizer", "state", 0, "step"), None),
    (("state", "optimizer", "param_groups"), []), (("state", "optimizer", "param_groups"), "x"),
    (("state", "optimizer", "param_groups", 0, "betas"), None)]


@pytest.mark.parametrize("where, value", FOREIGN, ids=lambda x: re.sub(r"\s+", " ", str(x))[:60])
def test_a_sound_file_whose_parts_do_not_fit_is_left_for_the_one_before(tmp_path, where, value,
                                                                       capsys):
    folder = finished(tmp_path / "run", epochs=3)
    good = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save(changed(good, where, value), folder / "checkpoint.pt")
    with open_run(folder, resume=True) as run:
        mine = parts()
        rest = run.restore(**mine)
        assert (run.epoch, mine["net"].weight[0, 0].item()) == (2, 2.)
        assert list(rest) == ["matrices"]
        mine["optimizer"].step()                                   # it works
        assert mine["net"].weight.isfinite().all()
        epoch(run, 3)
    assert [r["epoch"] for r in log_of(folder)] == [1, 2, 3]
    out, err = capsys.readouterr()
    assert out.count("resuming") == 1 and "after epoch 2" in out
    assert err.count("WARNING") == 1 and len(err.strip().splitlines()) == 1
    assert resumed(folder) == (3, 3.)


def test_no_flipped_byte_of_a_checkpoint_goes_unnoticed_or_makes_a_traceback(tmp_path):
    # One byte at a time, every one of the zip directory (names, sizes, offsets: the checksums do
    # not cover it) and some of the rest. Either the damage is reported, or the byte is one that
    # does not matter (padding, dates) and the content is intact.
    path, noticed = tmp_path / "c.pt", 0
    state = {"epoch": 3, "w": torch.arange(4.), "name": "x", "log": [1.5, None]}
    save_atomically(path, state)
    good = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
    for at in [*range(0, directory, 7), *range(directory, len(good))]:
        path.write_bytes(good[:at] + bytes([good[at] ^ 0xFF]) + good[at + 1:])
        try:
            loaded = load_checked(path)
        except Damaged as error:
            noticed += 1
            assert "\n" not in str(error) and "c.pt" in str(error)
            continue
        assert loaded["w"].tolist() == [0, 1, 2, 3], f"byte {at}"
        assert {**loaded, "w": 0} == {**state, "w": 0}, f"byte {at}"
    assert noticed > 100


class Evil:
    """Unpickling it creates a file."""
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("form", ["torch", "old torch", "pickle"])
def test_a_checkpoint_with_code_in_it_is_never_executed(tmp_path, form):
    folder, trap = finished(tmp_path / "run", epochs=1), tmp_path / "executed"
    with open(folder / "checkpoint.pt", "wb") as file:
        if form == "pickle":
            pickle.dump(Evil(trap), file)
        else:
            torch.save({"state": Evil(trap)}, file, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(UserError, match="no good checkpoint"):
        open_run(folder, resume=True)
    assert not trap.exists()


def test_a_pickle_may_raise_anything_and_is_damaged_all_the_same(tmp_path):
    # Its checksums are right: only the instructions of the pickle are wrong, in a hundred ways.
    path, rng, kinds = tmp_path / "c.pt", random.Random(0), set()
    save_atomically(path, {"epoch": 3, "w": torch.arange(4.), "log": [1.5, None, "x"]})
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in files if name.endswith("data.pkl"))
    code = files[name]
    loop = b"\x80\x02]q\x00h\x00a."                                # a list that holds itself
    for i, words in enumerate([loop, b"", b".", b"(" * 9999, b"]" + b"]a" * 99999 + b".",
                               *[code] * 200]):
        words = bytearray(words)
        for _ in range(rng.randint(1, 3) if i > 4 else 0):
            words[rng.randrange(2, len(words))] = rng.randrange(256)
        with zipfile.ZipFile(path, "w") as archive:
            for key, content in files.items():
                archive.writestr(key, bytes(words) if key == name else content)
            for entry in archive.infolist():                       # as torch writes them
                entry.external_attr = 0
        try:
            load_checked(path)
        except Damaged as error:
            kinds.add(str(error)[-20:])
            assert "\n" not in str(error)
    assert len(kinds) > 10


# ------------------------------------------------------------------------------------------------
# Checkpoints of other settings

@pytest.mark.parametrize("other, words", [
    ({"width": 8}, "--width 4, not 8"), ({"seed": 1}, "--seed 0, not 1"),
    ({"batch_size": 4}, "--batch-size 2, not 4"), ({"lr": .2}, "--lr 0.1, not 0.2"),
    ({"epochs": 20}, "--epochs 10, not 20"), ({"new_flag": 3}, "--new-flag"),
    ({"method": "scan"}, "method identitize, not scan"),
    ({"data": images_of(fingerprint="bbbb")}, "other images"),
    ({"dataset": "cifar10", "data": images_of(fingerprint="bbbb", name="cifar10")}, "cifar10")])
def test_a_checkpoint_of_other_settings_is_refused_by_name(tmp_path, other, words):
    folder = finished(tmp_path / "run")
    before = contents(folder)
    with pytest.raises(UserError) as caught:
        open_run(folder, resume=True, **other)
    assert words in str(caught.value) and "--out" in str(caught.value)
    assert contents(folder) == before


def test_more_epochs_are_refused_with_the_reason(tmp_path):
    with pytest.raises(UserError, match="learning rate.*--out"):
        open_run(finished(tmp_path / "run"), resume=True, epochs=20)


def test_device_place_and_the_spelling_of_the_same_folder_may_change(tmp_path):
    folder = finished(tmp_path / "run")
    moved = folder.rename(tmp_path / "moved")
    assert resumed(moved, dataset="./pets/", device="auto", data_dir="elsewhere",
                   compile=True) == (3, 3.)


# ------------------------------------------------------------------------------------------------
# Writing

@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_in_the_middle_keeps_the_old_file_and_leaves_nothing(
        tmp_path, monkeypatch, error):
    path, real = tmp_path / "c.pt", torch.save
    save_atomically(path, {"epoch": 1})

    def fails(state, file):
        real(state, file)
        file.seek(0)
        file.truncate(20)                                          # half of it is written
        raise error
    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(type(error)):
        save_atomically(path, {"epoch": 2})
    assert [f.name for f in tmp_path.iterdir()] == ["c.pt"]
    assert load_checked(path) == {"epoch": 1}


def test_a_file_gets_its_name_only_when_it_is_complete_and_on_the_disk(tmp_path, monkeypatch):
    events, replace, fsync = [], os.replace, os.fsync

    def noted_replace(a, b):
        events.append((os.path.basename(b), zipfile.is_zipfile(a)))
        replace(a, b)
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", noted_replace)
    save_atomically(tmp_path / "c.pt", {"epoch": 1})
    assert events == ["fsync", ("c.pt", True)]


class Killed(BaseException):
    """Stands for SIGKILL: no clean-up code sees it work."""


@pytest.mark.parametrize("renames", [0, 1])
def test_a_kill_before_or_between_the_renames_of_a_save_can_be_resumed(tmp_path, monkeypatch,
                                                                       renames):
    folder, replace, done = finished(tmp_path / "run", epochs=2), os.replace, []

    def killed_at(a, b):
        if len(done) == renames:
            raise Killed
        done.append(replace(a, b))
    with open_run(folder, resume=True) as run:
        run.restore(**parts())
        monkeypatch.setattr(os, "replace", killed_at)
        with pytest.raises(Killed):
            epoch(run, 3)
        monkeypatch.setattr(os, "replace", replace)
        (folder / "checkpoint.pt.7.tmp").write_bytes(b"half of it")
    assert resumed(folder) == (2, 2.)
    assert not list(folder.glob("*.tmp")) and [r["epoch"] for r in log_of(folder)] == [1, 2]
    with open_run(folder, resume=True) as run:
        run.restore(**parts())
        epoch(run, 3)
    assert resumed(folder) == (3, 3.)


@pytest.mark.parametrize("text", ["plain\n", "ü 写真\n", "a\r\nb\rc\n", "no text: \udcff\n", ""])
def test_text_is_written_byte_for_byte_and_always_as_utf_8(tmp_path, text):
    write_text(tmp_path / "t.txt", "the old one")
    write_text(tmp_path / "t.txt", text)
    assert (tmp_path / "t.txt").read_bytes() == text.encode("utf-8", "backslashreplace")
    assert [f.name for f in tmp_path.iterdir()] == ["t.txt"]


# ------------------------------------------------------------------------------------------------
# The end of a run

def end(folder, data, epochs=1):
    """A finished run: clusters 0 1 2 3 0 ..., confidence .25 in train, .5 in test. -> network"""
    torch.manual_seed(0)
    net = common.resnet18(32, 2)
    n, m = len(data.train.images), len(data.test.images)
    found = Clustering(torch.arange(n) % 4, torch.arange(m) % 4,
                       torch.full((n,), .25), torch.full((m,), .5))
    with open_run(folder, data=data, epochs=epochs) as run:
        for i in range(epochs):
            epoch(run, i + 1)
        run.finish({"identitize": {"knn": .5, "k_neighbours": 3, "kmeans": SCORES}}, net, found,
                   common.pixel_statistics(data.train.images), extra=[1, math.nan])
    return net


SCORES = {"acc": .5, "nmi": .1, "ari": 0., "rule": "hungarian", "clusters": 4, "classes": [0, 1]}


def rows_of(folder):
    text = (folder / "clusters.csv").read_bytes().decode("utf-8")  # pandas reads nothing else
    return list(csv.reader(io.StringIO(text, newline="")))


def test_clusters_csv_has_a_row_for_every_image_of_both_splits(tmp_path):
    end(tmp_path / "run", images_of(6, 4))
    header, *rows = rows_of(tmp_path / "run")
    assert header == ["image", "cluster", "confidence"] and len(rows) == 10
    assert rows[5] == ["train/5.png", "1", "0.2500"] and rows[6] == ["test/0.png", "0", "0.5000"]


def test_clusters_csv_keeps_odd_names_and_is_utf_8(tmp_path):
    data = images_of(5, 0)
    odd = ["a,b.png", 'it"s.png', "two\nlines.png", "写真 ü.png", "no text \udcff.png"]
    data = data._replace(train=data.train._replace(names=odd))
    end(tmp_path / "run", data._replace(test=data.train))
    assert [row[0] for row in rows_of(tmp_path / "run")[1:]] == [*odd[:4], "no text \\xff.png"]


def test_a_run_ends_by_saying_where_its_time_went_and_what_it_holds(tmp_path, capsys):
    end(tmp_path / "run", images_of())
    line = capsys.readouterr().out.splitlines()[-1]
    assert "of training" in line and "for the report" in line
    assert all(name in line for name in contents(tmp_path / "run"))


def test_result_json_tells_scores_protocol_settings_and_versions(tmp_path):
    end(tmp_path / "run", images_of())
    result = json.loads((tmp_path / "run" / "result.json").read_text(),
                        parse_constant=lambda x: pytest.fail(f"{x} is no JSON"))
    assert result["scores"]["identitize"]["knn"] == .5 and result["extra"] == [1, None]
    assert result["method"] == "identitize" and result["epochs"] == 1
    assert result["settings"]["width"] == 4 and "4 test images" in result["protocol"]
    assert result["versions"]["torch"] == torch.__version__ and len(result["mean"]) == 3
    assert {"command", "device", "training_seconds", "dataset", "size"} <= set(result)


def test_the_command_in_result_json_can_be_pasted(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["identitize.py", "--out", "a b\nü", "--dataset", "it's"])
    end(tmp_path / "run", images_of())
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert shlex.split(result["command"]) == sys.argv


def test_backbone_pt_is_the_state_dict_of_the_backbone(tmp_path):
    net = end(tmp_path / "run", images_of())
    saved = torch.load(tmp_path / "run" / "backbone.pt", weights_only=True)
    assert saved.keys() == net.state_dict().keys()
    assert all(torch.equal(v, saved[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("labelled, m", [(True, 4), (True, 0), (False, 4), (False, 0)])
@pytest.mark.parametrize("of_files", [True, False])
def test_a_run_leaves_only_files_that_it_knows(tmp_path, labelled, m, of_files):
    data = images_of(8, m, labelled)
    end(tmp_path / "run", data._replace(decoding={"fit": "crop"} if of_files else {}))
    names = {f.name for f in (tmp_path / "run").glob("[!.]*")}
    assert {"log.jsonl", "checkpoint.pt", "backbone.pt", "result.json", "clusters.csv",
            "prototypes.png", "curves.png"} <= names <= set(Run.FILES)
    assert ("confusion.png" in names) is labelled
    assert ("sheets" in names) is ("summary.txt" in names) is of_files


@pytest.mark.parametrize("labelled", [True, False])                # folders may be years
def test_a_folder_of_images_ends_with_a_sheet_for_each_cluster_and_words(
        labelled, tmp_path, capsys):
    data = images_of(9, 0, labelled)                               # clusters 0 1 2 3 0 1 2 3 0
    end(tmp_path / "run", data._replace(decoding={"fit": "crop"}))
    sheets = sorted(f.name for f in (tmp_path / "run" / "sheets").iterdir())
    assert sheets == [f"cluster-{c:03}.png" for c in range(4)]
    text = capsys.readouterr().out
    assert "the largest cluster holds 33%, the smallest 22.2%; 0 of 4 are empty" in text
    assert (tmp_path / "run" / "summary.txt").read_text() in text


def test_prototypes_are_the_most_confident_images_of_a_cluster(tmp_path):
    # Image i is of grey level 40 i.
    data = images_of(6, 0)
    grey = (40 * torch.arange(6, dtype=torch.uint8))[:, None, None, None].expand(6, 3, 8, 8)
    data = data._replace(train=data.train._replace(images=grey))
    clusters, sure = torch.tensor([0, 1, 0, 0, 1, 2]), torch.tensor([.1, .9, .8, .3, .5, .4])
    found = Clustering(clusters, clusters, sure, sure)
    common.save_clusters(tmp_path, data._replace(test=data.train), found, 3)
    sheet = np.array(Image.open(tmp_path / "prototypes.png"))      # cells of 48 px and 2 between
    first = [[sheet[26 + 50 * row, 26 + 50 * i, 0] for i in range(4)] for row in range(3)]
    assert first == [[80, 120, 0, 255], [40, 160, 255, 255], [200, 255, 255, 255]]    # .8, .3, .1


def test_a_heatmap_is_white_at_zero_red_above_and_blue_below():
    picture = np.array(common.heatmap([[1., 0.], [-1., .5]])).astype(int)
    middle = lambda i, j: picture[24 + 160 * i + 80, 2 + 160 * j + 80]          # noqa: E731
    red, white, blue, pink = middle(0, 0), middle(0, 1), middle(1, 0), middle(1, 1)
    assert white.tolist() == [255, 255, 255]
    assert red[0] > 200 > red[1] and red[2] < 100 and blue[2] > 200 > blue[1] and blue[0] < 100
    assert red[1] < pink[1] < white[1]


def test_a_grid_shows_images_row_by_row():
    images = torch.stack([torch.full((3, 4, 4), v, dtype=torch.uint8) for v in (0, 50, 100, 150)])
    sheet = np.array(common.grid(images, 2, side=8))
    # Cells of 8 px with 2 px between them and around: centres at 2 + 4 and 2 + 8 + 2 + 4.
    assert [sheet[y, x, 0] for y in (6, 16) for x in (6, 16)] == [0, 50, 100, 150]
    assert sheet[0, 0, 0] == 255


@pytest.mark.parametrize("log, panels", [
    ([{"epoch": 1, "loss": 3., "lr": .1, "seconds": 2.}], 2),
    ([{"epoch": i, "loss": 1 / i, "lr": .1, **({"knn": .5} if i % 3 == 0 else {})}
      for i in range(1, 31)], 3),
    ([{"epoch": i, "phase": "clusters", "loss": 0.} for i in (1, 2)], 1),
    ([{"epoch": i, **{f"term{j}": 7. for j in range(7)}} for i in (1, 2)], 7)])
def test_curves_have_a_panel_for_each_term_and_gauge(tmp_path, log, panels):
    common.save_curves(tmp_path / "curves.png", log)
    sheet = np.array(Image.open(tmp_path / "curves.png"))
    # Panels of 320 x 120 px, 8 px apart, three in a row; a curve is blue, the rest black or white.
    drawn = [(sheet[y:y + 120, x:x + 320].std(2) > 20).any() for y in range(0, sheet.shape[0], 128)
             for x in range(0, sheet.shape[1] - 300, 328)]
    assert sum(drawn) == panels and all(drawn[:panels])


def test_the_confusion_shows_the_share_of_each_class_in_each_cluster(tmp_path, monkeypatch):
    shown, real = [], common.heatmap
    monkeypatch.setattr(common, "heatmap", lambda m, *a, **k: shown.append(m) or real(m, *a, **k))
    y, c = torch.tensor([0, 0, 0, 0, 1]), torch.tensor([1, 1, 1, 0, 0])
    split = common.Split(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), y, list("abcde"))
    data = common.Dataset("x", split, split, ["cat", "dog"], "0")
    sure = torch.full((5,), .5)
    common.save_clusters(tmp_path, data, common.Clustering(c, c, sure, sure), 2)
    assert shown[0].tolist() == [[.75, .25], [0, 1]]               # cluster 1 is the cats'


def test_the_log_has_the_rate_without_the_factor_of_its_group(tmp_path):
    net = nn.Linear(2, 1)
    optimizer = torch.optim.SGD([{"params": net.parameters(), "factor": 5}], lr=1)
    common.set_lr(optimizer, .1)
    with open_run(tmp_path / "run") as run:
        run.end_epoch({"loss": 1.}, 6, net=net, optimizer=optimizer)
        assert run.log[-1]["lr"] == pytest.approx(.1)


def test_test_images_are_on_the_sheets_too(tmp_path):
    train = common.Split(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), None, list("abc"))
    test = common.Split(torch.full((2, 3, 8, 8), 200, dtype=torch.uint8), None, list("de"))
    found = common.Clustering(torch.tensor([0, 0, 1]), torch.tensor([0, 1]),
                              torch.tensor([.9, .5, .5]), torch.tensor([.7, .6]))
    common.save_sheets(tmp_path, common.Dataset("x", train, test, None, "0"), found, 2)
    assert "of 5 images" in (tmp_path / "summary.txt").read_text()
    levels = [np.asarray(Image.open(tmp_path / "sheets" / f"cluster-00{c}.png"))[50, 50::98, 0]
              for c in range(2)]
    assert levels[0].tolist() == [0, 200, 0] and levels[1].tolist() == [200, 0]


def test_the_summary_has_size_share_and_confidence_of_each_cluster(tmp_path):
    c, sure = torch.tensor([0, 0, 0, 2]), torch.tensor([.25, .5, .75, 1.])
    split = common.Split(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), None, list("abcd"))
    data = common.Dataset("x", split, split, None, "0")
    common.save_sheets(tmp_path, data, common.Clustering(c, c, sure, sure), 3)
    rows = [line.split() for line in (tmp_path / "summary.txt").read_text().splitlines()[1:4]]
    assert rows == [["0", "3", "75.0%", "0.50"], ["1", "0", "0.0%", "-"],
                    ["2", "1", "25.0%", "1.00"]]
