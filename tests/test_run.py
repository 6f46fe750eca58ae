"""The run folder: nothing is overwritten, nothing lost, nothing damaged or foreign taken in."""
import csv
import io
import json
import os
import pickle
import re
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import common
from common import (Clock, Clustering, Damaged, Run, UserError, load_checked, save_atomically,
                    write_text)

CPU = torch.device("cpu")


def images_of(n=6, m=4, labelled=True, fingerprint="aaaa", name="pets"):
    def split(part, count):
        pixels = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8)
        return common.Split(pixels, torch.arange(count) % 2 if labelled else None,
                            [f"{part}/{i}.png" for i in range(count)])
    train = split("train", n)
    return common.Dataset(name, train, split("test", m) if m else train,
                          ["cat", "dog"] if labelled else None, fingerprint)


def arguments(folder, **other):
    shared = {"dataset": "pets", "data_dir": "data", "epochs": 10, "seed": 0, "width": 4, "lr": .1,
              "batch_size": 2, "clusters": 4, "device": "cpu", "compile": False, "resume": False}
    return SimpleNamespace(**{**shared, "out": str(folder), **other})


def open_run(folder, method="identitize", data=None, **other):
    return Run(arguments(folder, **other), method, data or images_of())


def epoch(run, value, save=True):
    """One finished epoch whose state is a tensor full of `value`."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=.1)
    clock = Clock(CPU)
    with clock():
        pass
    run.end_epoch({"loss": float(value), "clusters": 2}, 6, clock, optimizer,
                  {"net": {"w": torch.full((50,), float(value))}, "matrices": {"0": torch.eye(2)}})
    if save:
        run.flush()


def finished(folder, epochs=3, **other):
    """A run folder after some epochs, each of them on disk at some time."""
    with open_run(folder, **other) as run:
        for i in range(epochs):
            epoch(run, i + 1)
    return folder


def resumed(folder, **other):
    """(last epoch, the number in its state) that --resume would continue from."""
    with open_run(folder, resume=True, **other) as run:
        state = run.load()
        return run.epoch, None if state is None else state["net"]["w"][0].item()


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


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
        assert run.load() is None and run.epoch == 0


def test_an_existing_run_is_refused_and_both_ways_out_are_named(tmp_path):
    finished(tmp_path / "run")
    before = {f.name: f.read_bytes() for f in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError, match="(?s)already holds a run.*--resume.*--out"):
        open_run(tmp_path / "run")
    assert {f.name: f.read_bytes() for f in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize("file", ["checkpoint.pt", "checkpoint.previous.pt",
                         "log.jsonl", "result.json", "backbone.pt"])
def test_any_trace_of_a_run_is_enough_to_refuse(tmp_path, file):
    # Checkpoints are large; who deletes them to save space still wants to keep the results.
    (tmp_path / file).write_text("{}")
    with pytest.raises(UserError, match="already holds a run"):
        open_run(tmp_path)
    assert (tmp_path / file).read_text() == "{}"


def test_resume_continues_after_the_last_epoch(tmp_path):
    finished(tmp_path / "run", epochs=3)
    assert resumed(tmp_path / "run") == (3, 3.)
    with open_run(tmp_path / "run", resume=True) as run:
        epoch(run, 4)
        assert run.epoch == 4
    assert [r["epoch"] for r in log_of(tmp_path / "run")] == [1, 2, 3, 4]
    assert resumed(tmp_path / "run") == (4, 4.)


def test_resume_where_there_is_nothing_yet_starts_from_the_beginning(tmp_path, capsys):
    assert resumed(tmp_path / "run") == (0, None)
    assert "starting from the beginning" in capsys.readouterr().out


def test_a_run_killed_before_its_first_checkpoint_can_be_resumed(tmp_path):
    with open_run(tmp_path / "run"):
        pass                                                       # leaves an empty log alone
    assert resumed(tmp_path / "run") == (0, None)


def test_the_seconds_of_all_parts_are_added_up(tmp_path):
    finished(tmp_path / "run", epochs=2)
    first = sum(r["seconds"] for r in log_of(tmp_path / "run"))
    with open_run(tmp_path / "run", resume=True) as run:
        assert run.seconds == pytest.approx(first)


# ------------------------------------------------------------------------------------------------
# The log

def test_the_log_has_one_object_for_each_epoch(tmp_path):
    records = log_of(finished(tmp_path / "run", epochs=3))
    assert [r["epoch"] for r in records] == [1, 2, 3] and [r["loss"] for r in records] == [1, 2, 3]
    assert all({"lr", "images_per_second", "seconds", "views_share", "clusters"} <= set(r)
               for r in records)
    assert records[0]["lr"] == .1 and records[0]["images_per_second"] * \
        records[0]["seconds"] == pytest.approx(6)


def test_the_terminal_shows_the_epoch_its_terms_and_the_time_left(tmp_path, capsys):
    with open_run(tmp_path / "run") as run:
        epoch(run, 1.25)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert "1/10" in line and "loss 1.25" in line and "clusters 2" in line and line.endswith("left")


def test_on_resuming_the_log_is_cut_back_to_the_checkpoint(tmp_path):
    # Killed after the log line of epoch 4 but before its checkpoint, in the middle of a line 5.
    folder = finished(tmp_path / "run", epochs=3)
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"epoch": 4, "loss": 4.0}\n{"epoch": 5, "lo')
    with open_run(folder, resume=True) as run:
        assert [r["epoch"] for r in log_of(folder)] == [1, 2, 3]
        epoch(run, 4)
    assert [r["epoch"] for r in log_of(folder)] == [1, 2, 3, 4]


def test_on_resuming_a_lost_log_is_written_again(tmp_path):
    folder = finished(tmp_path / "run", epochs=3)
    before = log_of(folder)
    (folder / "log.jsonl").unlink()
    resumed(folder)
    assert log_of(folder) == before


# ------------------------------------------------------------------------------------------------
# What ends a run keeps its finished epochs

@pytest.mark.parametrize("error", [KeyboardInterrupt, common.NotFinite, ValueError, OSError])
def test_whatever_ends_the_run_its_finished_epochs_are_kept(tmp_path, error):
    with pytest.raises(error):
        with open_run(tmp_path / "run") as run:
            run.save_seconds = 1e9                                 # saving seems expensive: wait
            epoch(run, 1, save=False)
            epoch(run, 2, save=False)
            assert not (tmp_path / "run" / "checkpoint.pt").exists()
            raise error("stop")
    assert resumed(tmp_path / "run") == (2, 2.)


def test_a_waiting_state_does_not_change_with_the_network(tmp_path):
    weight = torch.zeros(3)
    with open_run(tmp_path / "run") as run:
        run.save_seconds = 1e9
        run.end_epoch({"loss": 1.}, 6, Clock(CPU), torch.optim.SGD([nn.Parameter(weight)], lr=.1),
                      {"net": {"w": weight}})
        weight += 1                                                # the next epoch has begun
    with open_run(tmp_path / "run", resume=True) as run:
        assert run.load()["net"]["w"].tolist() == [0, 0, 0]


def test_checkpoints_take_a_twentieth_of_the_time_at_most(tmp_path):
    with open_run(tmp_path / "run") as run:
        epoch(run, 1, save=False)                                  # the first is written at once
        assert (tmp_path / "run" / "checkpoint.pt").exists()
        run.save_seconds, run.saved_at = 1., run.saved_at - 19     # 19 s after one that took 1 s
        epoch(run, 2, save=False)
        assert load_checked(run.current)["epoch"] == 1
        run.saved_at -= 2                                          # 21 s
        epoch(run, 3, save=False)
        assert load_checked(run.current)["epoch"] == 3


def test_a_run_folder_that_disappears_is_an_error_and_not_a_silent_loss(tmp_path):
    with pytest.raises(OSError):
        with open_run(tmp_path / "run") as run:
            epoch(run, 1)
            for file in run.folder.iterdir():
                file.unlink()
            run.folder.rmdir()
            epoch(run, 2)


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
    err = capsys.readouterr().err
    assert "WARNING" in err and "checkpoint.pt" in err


@pytest.mark.parametrize("how", DAMAGES[:-1])
def test_two_damaged_checkpoints_are_refused_in_one_line_and_left_as_they_are(tmp_path, how):
    folder = finished(tmp_path / "run", epochs=3)
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        damage(folder / name, how)
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    with pytest.raises(UserError, match="no good checkpoint is left.*--out"):
        open_run(folder, resume=True)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


def test_a_lone_damaged_checkpoint_does_not_start_the_run_anew(tmp_path):
    folder = finished(tmp_path / "run", epochs=1)                  # one epoch: no previous one
    damage(folder / "checkpoint.pt", "truncated")
    with pytest.raises(UserError, match="no good checkpoint"):
        open_run(folder, resume=True)


def test_a_damaged_checkpoint_never_takes_the_place_of_the_good_one_before_it(tmp_path):
    # After falling back, the next save keeps the current file as the previous one. If that is the
    # damaged one, a kill between the two renames leaves nothing to resume from.
    folder = finished(tmp_path / "run", epochs=3)
    damage(folder / "checkpoint.pt", "truncated")
    with open_run(folder, resume=True) as run:
        epoch(run, 3)
        for path in (run.current, run.previous):
            if path.exists():
                load_checked(path)
    (folder / "checkpoint.pt").unlink()                            # the kill
    assert resumed(folder)[0] >= 2


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


def test_the_checksums_are_needed_torch_alone_would_not_notice(tmp_path):
    path = tmp_path / "c.pt"
    save_atomically(path, {"w": torch.full((50,), 3.)})
    damage(path, "a flipped bit in a weight")
    assert torch.load(path, weights_only=True)["w"].ne(3).sum() == 1            # silently wrong
    with pytest.raises(Damaged):
        load_checked(path)


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


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    folder = finished(tmp_path / "run")
    state = load_checked(folder / "checkpoint.pt")
    for other in ({**state, "format": Run.FORMAT + 1}, {"model": torch.zeros(3)}, [1, 2]):
        save_atomically(folder / "checkpoint.pt", other)
        with pytest.raises(UserError, match="not a checkpoint of this version of identitize.py"):
            open_run(folder, resume=True)


# ------------------------------------------------------------------------------------------------
# Foreign checkpoints

@pytest.mark.parametrize("other, words", [
    ({"width": 8}, "--width 4, not 8"), ({"seed": 1}, "--seed 0, not 1"),
    ({"batch_size": 4}, "--batch-size 2, not 4"), ({"lr": .2}, "--lr 0.1, not 0.2"),
    ({"epochs": 20}, "--epochs 10, not 20"), ({"method": "scan"}, "method identitize, not scan")])
def test_a_checkpoint_of_other_settings_is_refused_by_name(tmp_path, other, words):
    folder = finished(tmp_path / "run")
    before = (folder / "log.jsonl").read_bytes()
    with pytest.raises(UserError) as caught:
        open_run(folder, resume=True, **other)
    assert words in str(caught.value) and "--out" in str(caught.value)
    assert (folder / "log.jsonl").read_bytes() == before


def test_a_checkpoint_of_another_dataset_is_refused_by_the_names_of_both(tmp_path):
    folder = finished(tmp_path / "run")
    with pytest.raises(UserError) as caught:
        open_run(folder, resume=True, dataset="cifar10",
                 data=images_of(fingerprint="bbbb", name="cifar10"))
    assert "pets" in str(caught.value) and "cifar10" in str(caught.value)


def test_changed_images_under_the_same_name_are_refused(tmp_path):
    folder = finished(tmp_path / "run")
    with pytest.raises(UserError, match="other images"):
        open_run(folder, resume=True, data=images_of(fingerprint="bbbb"))


def test_a_flag_that_the_checkpoint_does_not_know_is_refused(tmp_path):
    folder = finished(tmp_path / "run")
    with pytest.raises(UserError, match="--new-flag"):
        open_run(folder, resume=True, new_flag=3)


def test_device_place_and_the_spelling_of_the_same_folder_may_change(tmp_path):
    folder = finished(tmp_path / "run")
    moved = folder.rename(tmp_path / "moved")
    assert resumed(moved, dataset="./pets/", device="auto", data_dir="elsewhere",
                   compile=True) == (3, 3.)


# ------------------------------------------------------------------------------------------------
# Writing

def test_a_checkpoint_holds_only_plain_values_and_tensors_on_the_cpu(tmp_path):
    def walk(x):
        if isinstance(x, dict):
            return [kind for k, v in x.items() for kind in (type(k), *walk(v))]
        return [kind for v in x for kind in walk(v)] if isinstance(x, list) else [type(x)]
    saved = torch.load(finished(tmp_path / "run") / "checkpoint.pt", weights_only=True)
    assert set(walk(saved)) <= {str, int, float, bool, type(None), torch.Tensor}


@pytest.mark.parametrize("value", [np.float64(1), np.arange(3), {1, 2}, CPU, SimpleNamespace()])
def test_anything_that_would_not_load_again_is_refused_when_it_is_saved(value):
    with pytest.raises(TypeError, match="plain values"):
        common.on_cpu({"deep": [{"inside": value}]})


def test_an_optimizers_state_survives_the_checkpoint(tmp_path):
    net = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters(), lr=.1, fused=True)
    common.step(optimizer, net(torch.ones(2, 3)).square().sum())
    save_atomically(tmp_path / "c.pt", common.on_cpu(optimizer.state_dict()))
    other = torch.optim.Adam(net.parameters(), lr=.5, fused=True)
    other.load_state_dict(load_checked(tmp_path / "c.pt"))
    assert other.param_groups[0]["lr"] == .1
    assert torch.equal(other.state[net.weight]["exp_avg"], optimizer.state[net.weight]["exp_avg"])


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
        save_atomically(path, {"epoch": 2}, keep=tmp_path / "c.previous.pt")
    assert [f.name for f in tmp_path.iterdir()] == ["c.pt"]
    assert load_checked(path) == {"epoch": 1}


def test_a_file_gets_its_name_only_when_it_is_complete_and_on_the_disk(tmp_path, monkeypatch):
    events, replace, fsync = [], os.replace, os.fsync

    def noted_replace(a, b):
        events.append((os.path.basename(a), os.path.basename(b), zipfile.is_zipfile(a)))
        replace(a, b)
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", noted_replace)
    for i in (1, 2):
        save_atomically(tmp_path / "c.pt", {"epoch": i}, keep=tmp_path / "c.previous.pt")
    assert events == ["fsync", ("c.pt.tmp", "c.pt", True),
                      "fsync", ("c.pt", "c.previous.pt", True), ("c.pt.tmp", "c.pt", True)]


def test_the_previous_checkpoint_is_kept(tmp_path):
    folder = finished(tmp_path / "run", epochs=3)
    assert load_checked(folder / "checkpoint.pt")["epoch"] == 3
    assert load_checked(folder / "checkpoint.previous.pt")["epoch"] == 2


class Killed(BaseException):
    """Stands for SIGKILL: no clean-up code sees it work."""


@pytest.mark.parametrize("renames", [0, 1])
def test_a_kill_before_or_between_the_two_renames_can_be_resumed(tmp_path, monkeypatch, renames):
    folder, replace, done = finished(tmp_path / "run", epochs=2), os.replace, []
    kept = (folder / "checkpoint.pt").read_bytes()

    def killed_at(a, b):
        if len(done) == renames:
            raise Killed
        done.append(replace(a, b))
    with open_run(folder, resume=True) as run:
        monkeypatch.setattr(os, "replace", killed_at)
        with pytest.raises(Killed):
            epoch(run, 3)
        run.pending = None                                         # a kill lets nothing else happen
        monkeypatch.setattr(os, "replace", replace)
        (folder / "checkpoint.pt.tmp").write_bytes(kept[:100])
    assert (folder / "checkpoint.pt").exists() is (renames == 0)
    assert resumed(folder) == (2, 2.)
    assert not list(folder.glob("*.tmp")) and [r["epoch"] for r in log_of(folder)] == [1, 2]
    with open_run(folder, resume=True) as run:
        epoch(run, 3)
    assert resumed(folder) == (3, 3.)


def test_only_its_own_temporary_files_are_cleared_away(tmp_path):
    # --out may name a folder with other things in it.
    (tmp_path / "thesis.tmp").write_text("not ours")
    (tmp_path / "checkpoint.pt.tmp").write_text("ours")
    with open_run(tmp_path):
        pass
    assert (tmp_path / "thesis.tmp").exists() and not (tmp_path / "checkpoint.pt.tmp").exists()


@pytest.mark.parametrize("text", ["plain\n", "ü 写真\n", "a\r\nb\rc\n", "no text: \udcff\n", ""])
def test_text_is_written_byte_for_byte(tmp_path, text):
    write_text(tmp_path / "t.txt", "the old one")
    write_text(tmp_path / "t.txt", text)
    assert (tmp_path / "t.txt").read_bytes() == text.encode("utf-8", "surrogateescape")
    assert [f.name for f in tmp_path.iterdir()] == ["t.txt"]


# ------------------------------------------------------------------------------------------------
# The end of a run

def end(folder, data):
    """A finished run: clusters 0 1 2 3 0 ..., confidence .25 in train, .5 in test. -> network"""
    torch.manual_seed(0)
    net = common.resnet18(32, 2)
    n, m = len(data.train.images), len(data.test.images)
    found = Clustering(torch.arange(n) % 4, torch.arange(m) % 4,
                       torch.full((n,), .25), torch.full((m,), .5))
    with open_run(folder, data=data) as run:
        epoch(run, 1)
        run.finish({"identitize": {"knn": .5}}, net, found, extra=[1, 2])
    return net


def rows_of(folder):
    text = (folder / "clusters.csv").read_bytes().decode("utf-8", "surrogateescape")
    return list(csv.reader(io.StringIO(text, newline="")))


def test_clusters_csv_has_a_row_for_every_image_of_both_splits(tmp_path):
    end(tmp_path / "run", images_of(6, 4))
    header, *rows = rows_of(tmp_path / "run")
    assert header == ["image", "cluster", "confidence"] and len(rows) == 10
    assert rows[5] == ["train/5.png", "1", "0.2500"] and rows[6] == ["test/0.png", "0", "0.5000"]


def test_clusters_csv_without_a_test_split_has_every_image_once(tmp_path):
    end(tmp_path / "run", images_of(6, 0))
    assert [row[0] for row in rows_of(tmp_path / "run")[1:]] == [f"train/{i}.png" for i in range(6)]


def test_clusters_csv_keeps_odd_names(tmp_path):
    data = images_of(5, 0)
    odd = ["a,b.png", 'it"s.png', "two\nlines.png", "写真 ü.png", "no text \udcff.png"]
    data = data._replace(train=data.train._replace(names=odd))
    end(tmp_path / "run", data._replace(test=data.train))
    assert [row[0] for row in rows_of(tmp_path / "run")[1:]] == odd


def test_a_run_ends_by_saying_where_its_time_went(tmp_path, capsys):
    end(tmp_path / "run", images_of())
    assert re.search(r"0s of training, \d+% of it making views, and \ds for the report",
                     capsys.readouterr().out)


def test_result_json_tells_scores_protocol_settings_and_versions(tmp_path):
    end(tmp_path / "run", images_of())
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["scores"] == {"identitize": {"knn": .5}} and result["extra"] == [1, 2]
    assert result["method"] == "identitize" and result["epochs"] == 1
    assert result["settings"]["width"] == 4 and "test" in result["protocol"]["linear"]
    assert result["versions"]["torch"] == torch.__version__
    assert {"command", "device", "training_seconds", "dataset"} <= set(result)


def test_backbone_pt_is_the_state_dict_of_the_backbone(tmp_path):
    net = end(tmp_path / "run", images_of())
    saved = torch.load(tmp_path / "run" / "backbone.pt", weights_only=True)
    assert saved.keys() == net.state_dict().keys()
    assert all(torch.equal(v, saved[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("labelled, m", [(True, 4), (True, 0), (False, 4), (False, 0)])
def test_pictures_are_there_with_labels_and_without(tmp_path, labelled, m):
    end(tmp_path / "run", images_of(8, m, labelled))
    names = {f.name for f in (tmp_path / "run").iterdir()}
    assert {"log.jsonl", "checkpoint.pt", "backbone.pt", "result.json", "clusters.csv",
            "prototypes.png"} <= names
    assert ("confusion.png" in names) is labelled
    assert ("sheets" in names) is ("summary.txt" in names) is not labelled
    assert not [name for name in names if name.endswith(".tmp")]


def test_images_without_labels_end_with_a_sheet_for_each_cluster_and_words(tmp_path, capsys):
    end(tmp_path / "run", images_of(9, 0, labelled=False))         # clusters 0 1 2 3 0 1 2 3 0
    sheets = sorted(f.name for f in (tmp_path / "run" / "sheets").iterdir())
    assert sheets == [f"cluster-{c:03}.png" for c in range(4)]
    text = capsys.readouterr().out
    assert "the largest cluster holds 33%, the smallest 22.2%; 0 of 4 are empty" in text
    assert (tmp_path / "run" / "summary.txt").read_text() in text


def test_a_class_name_that_is_no_text_does_not_cost_the_results(tmp_path):
    data = images_of()._replace(classes=["no text \udcff", "写真"])
    end(tmp_path / "run", data)
    assert (tmp_path / "run" / "confusion.png").exists()


def test_prototypes_are_the_most_confident_images_of_a_cluster():
    data = images_of(6, 0)
    clusters, sure = torch.tensor([0, 1, 0, 0, 1, 2]), torch.tensor([.1, .9, .8, .3, .5, .4])
    row = common.prototypes(data.train, clusters, sure, 0, count=4)
    assert torch.equal(row[:3], data.train.images[[2, 3, 0]])      # .8, .3, .1
    assert (row[3] == 255).all()                                   # filled up with white


def test_a_heatmap_is_white_at_zero_red_above_and_blue_below():
    picture = np.array(common.heatmap([[1., 0.], [-1., .5]], limit=1)).astype(int)
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
