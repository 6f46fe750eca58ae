"""The command line: what is wrong is said in one line, with exit code 2, and nothing is written."""
import argparse
import csv
import importlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image

import common
from common import NotFinite, UserError, number, run_script

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("identitize", "scan", "mask_mix", "scl")
ALL = pytest.mark.parametrize("script", SCRIPTS)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder, so that all that is written can be seen."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def refused(capsys):
    """A function: script, arguments -> the one line on stderr with which the script ends."""
    def run(script, *arguments):
        with pytest.raises(SystemExit) as caught:
            importlib.import_module(script).main([*map(str, arguments), "--device=cpu"])
        err = capsys.readouterr().err
        assert caught.value.code == 2
        assert len(err.strip().splitlines()) == 1 and "Traceback" not in err
        assert not {"runs", "out"} & set(os.listdir())             # nothing half-written
        return err.strip()
    return run


def pictures(folder, count=12, classes=2):
    for i in range(count):
        place = Path(folder) / (f"class {i % classes}" if classes else "")
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (20 * i, 255 - 20 * i, 0)).save(place / f"{i}.png")
    return folder


SMALL = {script: "--width=16 --batch-size=4 --epochs=1 --image-size=16 --device=cpu".split()
         for script in SCRIPTS}
SMALL["scan"] += """--cluster-epochs=1 --cluster-batch=4 --self-label-epochs=1 --self-label-batch=4
    --neighbours=2 --unsafe=go""".split()


def run(script, folder, out, *more):
    """A whole run on a folder of a dozen pictures."""
    importlib.import_module(script).main([*SMALL[script], f"--dataset={folder}", f"--out={out}",
                                          *more])


# ------------------------------------------------------------------------------------------------
# Numbers

@pytest.mark.parametrize("kind, text", [
    (int, "3"), (int, "1"), (int, str(2**31)), (float, "1"), (float, "2.5"), (float, "1e3")])
def test_numbers_in_range_are_taken(kind, text):
    assert number(kind, 1)(text) == float(text) and type(number(kind, 1)(text)) is kind


@pytest.mark.parametrize("kind, text", [
    (int, "2.5"), (int, "1e3"), (int, "three"), (int, ""), (int, "0"), (int, "-3"), (int, "nan"),
    (int, "inf"), (int, "9" * 30), (int, "9" * 5000), (int, "0x10"), (float, "nan"),
    (float, "inf"), (float, "-inf"), (float, "1e400"), (float, "-1"), (float, "0.5"),
    (float, "one"), (float, ""), (float, "1,5")])
def test_everything_else_is_refused(kind, text):
    with pytest.raises(argparse.ArgumentTypeError):
        number(kind, 1)(text)


def test_limits_belong_to_the_range_unless_it_is_open_below():
    assert number(float, 0, 1)("0") == 0 and number(float, 0, 1)("1") == 1
    for convert, text in ((number(float, 0, above=True), "0"), (number(float, 0, 1), "1.0001")):
        with pytest.raises(argparse.ArgumentTypeError):
            convert(text)


@pytest.mark.parametrize("convert, text, words", [
    (number(int, 2), "1", "'1' is not a whole number of at least 2"),
    (number(float, 0, above=True), "0", "'0' is not a number of more than 0"),
    (number(float, 0, 1), "3", "'3' is not a number of at most 1")])
def test_the_message_names_the_limits(convert, text, words):
    with pytest.raises(argparse.ArgumentTypeError, match=words):
        convert(text)


# ------------------------------------------------------------------------------------------------
# Flags

def flags_of(script):
    """{flag: its argparse action}, of those that take a value."""
    seen = []

    class Listening(common.Parser):
        def parse_args(self, argv=None):
            seen.append(self)
            return super().parse_args(argv)
    module = importlib.import_module(script)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Parser", Listening)
        module.parse([])
    return {action.option_strings[-1]: action for action in seen[0]._actions
            if action.option_strings and action.nargs != 0}


def nonsense(script):
    """(flag, a value that it cannot take): every flag with all that is wrong for its type."""
    for flag, action in flags_of(script).items():
        if action.choices:
            values = ["tpu", "3", ""]
        elif action.type:
            values = ["-1", "nan", "9" * 30, ""]
            # A huge number is refused as out of range, 1.5 where whole numbers count.
            if isinstance(action.default, int):
                values += ["1.5"]
        else:
            continue                                               # a path: see below
        yield from ((flag, value) for value in values)


@pytest.mark.parametrize("script, flag, value", [
    (script, *case) for script in SCRIPTS for case in nonsense(script)])
def test_a_flag_with_nonsense_is_refused_by_name(script, flag, value, refused):
    assert flag in refused(script, f"{flag}={value}")


def strings(script):
    """The flags that take any text: names, paths."""
    return [flag for flag, action in flags_of(script).items()
            if not action.type and not action.choices]


TEXTS = [(script, flag) for script in SCRIPTS for flag in strings(script)]


@pytest.mark.parametrize("script, flag", TEXTS)
@pytest.mark.parametrize("value", ["", " ", "a\0b"])
def test_an_empty_value_or_a_nul_is_refused_by_name(script, flag, value, refused):
    # --pretext "$FILE" with a variable that is not set
    assert flag in refused(script, flag, value)


@pytest.mark.parametrize("script, flag", TEXTS)
def test_a_tilde_is_the_home_folder(script, flag, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    others = {"--weights": ["--pretext=resnet50"], "--against": ["--detect=x"],
              "--assign": ["--dataset=x"]}.get(flag, [])
    args = importlib.import_module(script).parse([f"{flag}=~/x y", *others])
    assert getattr(args, flag.lstrip("-").replace("-", "_")) == f"{tmp_path}/x y"


@ALL
@pytest.mark.parametrize("seed", ["0", "4294967295", "4294967296", str(2**63 - 1)])
def test_every_seed_that_torch_takes_is_taken(script, seed):
    assert importlib.import_module(script).parse(["--seed", seed]).seed == int(seed)
    common.generator(int(seed), 0, "views"), torch.manual_seed(int(seed))


@ALL
@pytest.mark.parametrize("seed, words", [("-1", "at least 0"), (str(2**64), "at most"),
                                         (str(10**30), "at most")])
def test_other_seeds_are_refused_with_the_limit_that_they_break(script, seed, words, refused):
    assert words in refused(script, f"--seed={seed}")


@ALL
@pytest.mark.parametrize("arguments, words", [
    (["--epoch", "3"], "--epoch"), (["--no-such-flag"], "--no-such-flag"), (["cifar10"], "cifar10"),
    (["--epochs"], "--epochs"), (["--dataset"], "--dataset"), (["--resume=yes"], "yes")])
def test_flags_are_neither_abbreviated_nor_invented(script, arguments, words, refused):
    assert words in refused(script, *arguments)


def test_a_long_tail_and_a_balanced_part_exclude_each_other(refused):
    assert "--train-size" in refused("identitize", "--imbalance=10", "--train-size=100")


@ALL
def test_help_is_printed_for_every_flag(script, capsys):
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as caught:
        module.main(["--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert all(f"--{name.replace('_', '-')}" in out for name in vars(module.parse([])))
    assert "Defaults are those of --dataset" in " ".join(out.split())


@ALL
@pytest.mark.parametrize("dataset", [[], ["--dataset", "cifar10"], ["--dataset=pets"]])
def test_help_shows_the_defaults_that_the_command_would_have(script, dataset, capsys):
    parse = importlib.import_module(script).parse
    args = parse(dataset)
    with pytest.raises(SystemExit):
        parse([*dataset, "--help"])
    out = " ".join(capsys.readouterr().out.split())
    for flag in ("epochs", "width", "crop"):
        about = re.search(f" --{flag} [A-Z_]+ (.*?)(?= --|$)", out[out.index("optional" if
                          "optional" in out else "options"):]).group(1)
        assert about.rstrip().endswith(f"(default: {getattr(args, flag)})"), about


@ALL
def test_defaults_of_a_dataset_give_way_to_flags(script):
    parse = importlib.import_module(script).parse
    default, mine = parse([]), parse(["--epochs", "7"])
    assert default.dataset == "shapes" and mine.epochs == 7 and mine.width == default.width


# ------------------------------------------------------------------------------------------------
# What only the data can tell

@ALL
def test_an_unknown_dataset_is_one_line_with_the_nearest_name(script, refused):
    assert "did you mean cifar10?" in refused(script, "--dataset", "cifar-10")


@ALL
@pytest.mark.parametrize("flags, words", [
    (["--clusters=13", "--batch-size=4"], "--clusters 13: there are only 12"),
    (["--batch-size=13"], "--batch-size 13"), (["--train-size=13"], "--train-size 13")])
def test_more_than_there_is_cannot_be_asked_for(script, flags, words, refused, tmp_path):
    pictures(tmp_path / "pets")
    assert words in refused(script, "--dataset", tmp_path / "pets", *flags)


@ALL
def test_unlabelled_images_need_a_number_of_clusters(script, refused, tmp_path):
    pictures(tmp_path / "pets", classes=0)
    assert "--clusters" in refused(script, "--dataset", tmp_path / "pets", "--batch-size=4")


@ALL
@pytest.mark.parametrize("count", [0, 3])
def test_an_empty_or_unreadable_folder_is_one_line(script, count, refused, tmp_path):
    (tmp_path / "pets").mkdir()
    for i in range(count):
        (tmp_path / "pets" / f"{i}.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    assert "pets" in refused(script, "--dataset", tmp_path / "pets", "--clusters=2")


@ALL
@pytest.mark.parametrize("count, classes", [(1, 0), (1, 1), (2, 1)])
def test_a_folder_with_next_to_nothing_in_it_is_refused(script, count, classes, refused, tmp_path):
    pictures(tmp_path / "pets", count, classes)
    refused(script, "--dataset", tmp_path / "pets", "--clusters=2", "--batch-size=4")


@ALL
def test_an_image_given_as_the_dataset_is_refused(script, refused, tmp_path):
    pictures(tmp_path / "pets", classes=0)
    assert "folder" in refused(script, "--dataset", tmp_path / "pets" / "0.png")


@ALL
def test_a_missing_gpu_is_one_line(script, capsys):
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="2"):
            importlib.import_module(script).main(["--device", "cuda"])
        assert "--device cuda" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# The run folder

@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A function: script -> (its arguments before, args after train(args)), of a complete run."""
    made = {}

    def of(script, labelled=True):
        if (script, labelled) not in made:
            place = tmp_path_factory.mktemp(script)
            module = importlib.import_module(script)
            pictures(place / "pets", classes=2 * labelled)
            args = module.parse([*SMALL[script], f"--dataset={place / 'pets'}",
                                 f"--out={place / 'run'}", "--clusters=2"])
            before = dict(vars(args))
            module.train(args)
            made[script, labelled] = before, args
        return made[script, labelled]
    return of


# --resume helps where there is a checkpoint, or nothing that is made after the first one.
# A log.jsonl that is not ours belongs to another program.
GOES_ON = {"checkpoint.pt", "checkpoint.previous.pt", "neighbours.png"}


@pytest.mark.parametrize("script, labelled", [*((script, True) for script in SCRIPTS),
                                              ("identitize", False)])
def test_a_folder_with_any_file_that_a_run_writes_is_refused(script, labelled, complete, refused,
                                                             tmp_path):
    args = complete(script, labelled)[1]
    names = sorted(path.name for path in Path(args.out).glob("[!.]*"))
    assert len(names) > 8 and not [name for name in names if name.endswith(".tmp")]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("mine")
        err = refused(script, *SMALL[script], f"--dataset={args.dataset}", "--clusters=2",
                      f"--out={tmp_path / name}")
        assert name in err and "--out" in err
        assert ("--resume" in err) == (name in GOES_ON)
        assert [path.read_text() for path in (tmp_path / name).iterdir()] == ["mine"]


@ALL
def test_resume_of_a_complete_run_says_so_and_changes_nothing(script, complete, capsys):
    args = complete(script)[1]
    before = {path: path.stat().st_mtime_ns for path in Path(args.out).rglob("*")}
    run(script, args.dataset, args.out, "--clusters=2", "--resume")             # no exit code
    assert "complete" in capsys.readouterr().out.splitlines()[-1]
    assert {path: path.stat().st_mtime_ns for path in Path(args.out).rglob("*")} == before


@ALL
@pytest.mark.parametrize("place", ["file", "file/run", "file/a/b"])
def test_a_run_folder_that_is_a_file_or_under_one_is_refused(script, place, refused, tmp_path):
    pictures(tmp_path / "pets")
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refused(script, *SMALL[script], "--dataset", tmp_path / "pets",
                                  f"--out={tmp_path / place}")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("place", ["gone", "gone/run", "self"])
def test_a_run_folder_that_is_a_link_to_nothing_is_refused(place, refused, tmp_path):
    pictures(tmp_path / "pets")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "self").symlink_to("self")
    assert "broken link" in refused("identitize", *SMALL["identitize"], "--clusters=2", "--dataset",
                                    tmp_path / "pets", f"--out={tmp_path / place}")


# A part of a checkpoint beside its weights, and what it becomes; "absent": it is not there
PARTS = [("identitize", "matrices", "absent"), ("identitize", "matrices", [1]),
         ("identitize", "matrices", {"0": torch.zeros(3)}), ("scl", "memory", "absent"),
         ("scl", "memory", torch.zeros(3, 128)), ("scl", "clusters", torch.zeros(3)),
         ("scl", "joint", None), ("scan", "stage", "absent"), ("scan", "stage", "third"),
         ("scan", "notes", {}), ("scan", "notes", None), ("scan", "notes", "text")]


@pytest.mark.parametrize("script, part, value", PARTS, ids=range(len(PARTS)))
def test_a_checkpoint_without_a_part_that_the_method_needs_is_not_used(
        script, part, value, complete, refused, tmp_path):
    args = complete(script)[1]
    shutil.copytree(args.out, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / "checkpoint.previous.pt").unlink(missing_ok=True)
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    saved["state"].pop(part)
    if not isinstance(value, str) or value != "absent":
        saved["state"][part] = value
    torch.save(saved, tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(UserError, match="no good checkpoint is left"):
        importlib.import_module(script).train(argparse.Namespace(
            **{**vars(args), "out": str(tmp_path / "run"), "resume": True}))


@pytest.mark.parametrize("script, changed", [
    ("identitize", {"clusters_head": 7}), ("scl", {"clusters": 3}), ("scl", {"train_size": 8}),
    ("scan", {"neighbours": 3}), ("scan", {"clusters": 3}), ("mask_mix", {"mask_share": .1})])
def test_a_checkpoint_of_other_settings_is_refused_by_their_name(script, changed, complete,
                                                                 tmp_path, capsys):
    shutil.copytree(complete(script)[1].out, tmp_path / "run")
    args = {**vars(complete(script)[1]), "out": str(tmp_path / "run"), "resume": True, **changed}
    with pytest.raises(UserError, match=f"--{next(iter(changed)).replace('_', '-')} "):
        importlib.import_module(script).train(argparse.Namespace(**args))
    assert "WARNING" not in capsys.readouterr().err                # it is good, but another one


def test_a_checkpoint_of_another_method_is_refused_by_its_name(complete, tmp_path, capsys):
    shutil.copytree(complete("identitize")[1].out, tmp_path / "run")
    args = {**vars(complete("scl")[1]), "out": str(tmp_path / "run"), "resume": True}
    with pytest.raises(UserError, match="the method identitize, not scl"):
        importlib.import_module("scl").train(argparse.Namespace(**args))


# ------------------------------------------------------------------------------------------------
# Sound files that are not ours

def weights(width=16, **changed):
    torch.manual_seed(0)
    return {**common.resnet18(16, width).state_dict(), **changed}


CONV = torch.randn(16, 3, 3, 3)
BACKBONES = {
    "empty": b"", "text": b"no checkpoint", "missing": None, "a list": [1, 2], "a number": 3,
    "no tensors": {"conv1.weight": "x"}, "no names": {1: CONV}, "of another width": weights(32),
    "NaN": weights(**{"conv1.weight": CONV * float("nan")}),
    "infinite": weights(**{"bn1.running_var": torch.full((16,), float("inf"))}),
    "complex": weights(**{"conv1.weight": CONV.to(torch.complex64)}),
    "sparse": weights(**{"conv1.weight": CONV.to_sparse()}),
    "meta": weights(**{"conv1.weight": CONV.to("meta")}),
    "of another shape": weights(**{"layer4.1.bn2.weight": torch.ones(127)}),
    "a part missing": {k: v for k, v in weights().items() if k != "layer4.1.bn2.bias"}}
RESULTS = [b"", b"no json", b"[1, 2]", b"{}", b"3", b'"text"', b"\xff\xfe\0", b"[" * 9999,
           b"[" * 200_000, b'{"settings": 3, "dataset": "pets"}',
           b'{"size": "big", "settings": {"width": 16}}']


def put(path, content):
    path.parent.mkdir(exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", BACKBONES)
def test_a_backbone_that_is_none_is_refused(what, refused, tmp_path):
    put(tmp_path / "other" / "backbone.pt", BACKBONES[what])
    pictures(tmp_path / "pets")
    assert "backbone.pt" in refused("scan", *SMALL["scan"], "--dataset", tmp_path / "pets",
                                    "--pretext", tmp_path / "other" / "backbone.pt")
    (tmp_path / "other" / "result.json").write_text(json.dumps({
        "size": 16, "settings": {"width": 16, "stem_stride": 1}, "mean": [.5] * 3, "std": [1] * 3}))
    assert "other" in refused("mask_mix", "--detect", tmp_path / "other")


@pytest.mark.parametrize("name, value", [("bn1.running_var", -1.), ("bn1.weight", 1e38)])
def test_a_backbone_whose_features_are_no_numbers_ends_in_one_line(name, value, tmp_path, capsys):
    put(tmp_path / "other" / "backbone.pt", weights(**{name: torch.full((16,), value)}))
    with pytest.raises(SystemExit) as caught:
        run("scan", pictures(tmp_path / "pets"), tmp_path / "run", "--clusters=2", "--pretext",
            str(tmp_path / "other" / "backbone.pt"))
    err = capsys.readouterr().err
    assert caught.value.code == 1 and "not finite" in err and len(err.strip().splitlines()) == 1


@pytest.mark.filterwarnings("ignore")
def test_an_old_torch_file_is_checked_as_well(refused, tmp_path):
    torch.save(BACKBONES["NaN"], tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    pictures(tmp_path / "pets")
    assert "b.pt" in refused("scan", *SMALL["scan"], "--dataset", tmp_path / "pets",
                             "--pretext", tmp_path / "b.pt")


@pytest.mark.parametrize("content", RESULTS, ids=range(len(RESULTS)))
def test_a_result_json_of_another_tool_is_passed_over_or_refused(content, refused, tmp_path):
    put(tmp_path / "other" / "backbone.pt", weights())
    put(tmp_path / "other" / "result.json", content)
    pictures(tmp_path / "pets")
    # Refused for its --clusters, which is checked last of all.
    assert "--clusters" in refused("scan", *SMALL["scan"], "--dataset", tmp_path / "pets",
                                   "--clusters=13", "--pretext", tmp_path / "other" / "backbone.pt")
    assert "other" in refused("mask_mix", "--detect", tmp_path / "other")


@pytest.mark.parametrize("name, near", [("resnet5O", "resnet50"), ("ResNet50", "resnet50"),
                                        ("mobilenetv2", "mobilenet_v2"), ("runs/old/b.pt", "")])
def test_a_pretext_that_is_neither_file_nor_model_is_told_before_the_images_are_read(
        name, near, refused, tmp_path, capsys):
    err = refused("scan", "--dataset", pictures(tmp_path / "pets"), "--pretext", name)
    assert name in err and near in err and ("did you mean" in err) == bool(near)
    err = refused("scan", "--dataset", tmp_path / "pets", "--pretext", "resnet50", "--weights",
                  tmp_path)
    assert "--weights" in err and "no such file" in err


@pytest.mark.parametrize("name", ["stl10", "shapes", "cifar10"])
@pytest.mark.parametrize("classes", [0, 2])
def test_a_folder_may_be_called_as_a_built_in_set(name, classes, tmp_path):
    root = pictures(tmp_path / name, classes=classes)
    run("scan", root, tmp_path / "run", "--clusters=2")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["dataset"] == name


@pytest.mark.parametrize("flag", [["--clusters", "3"], ["--image-size", "32"], ["--resume"],
                                  ["--fit", "pad"], ["--pretext", "resnet50"], ["--seed=0"]])
def test_assign_takes_nothing_that_the_run_decides(flag, refused, tmp_path):
    err = refused("scan", "--assign", tmp_path, "--dataset", tmp_path, *flag)
    assert f"--assign and {flag[0].split('=')[0]} exclude" in err


@pytest.mark.parametrize("flag", ["--epochs=3", "--dataset=shapes", "--mask-share=.5"])
def test_detect_takes_no_flag_of_the_training(flag, refused, tmp_path):
    assert f"--detect and {flag.split('=')[0]} exclude" in refused("mask_mix", "--detect", tmp_path,
                                                                  flag)


@pytest.mark.parametrize("pretext, idle", [("x.pt", "--crop, --epochs"),
                                           ("resnet50", "--crop, --epochs, --width")])
def test_flags_of_a_step_that_is_left_out_are_said_to_have_no_effect(pretext, idle, capsys):
    flags = ["--epochs", "5", "--crop=.3", "--width", "16", "--heads", "3"]
    importlib.import_module("scan").parse([*flags, "--pretext", pretext])
    assert capsys.readouterr().out == f"note: without effect beside --pretext: {idle}\n"
    importlib.import_module("scan").parse(flags)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("script, flags, off, idle", [
    ("identitize", ["--lam", ".1", "--correlate=between"], ["--targets", "sinkhorn"],
     "--targets sinkhorn: --correlate, --lam"),
    ("scl", ["--beta", ".5"], ["--alpha", "0"], "--alpha 0: --beta")])
def test_flags_of_a_loss_that_is_switched_off_are_said_to_have_no_effect(script, flags, off, idle,
                                                                         capsys):
    parse = importlib.import_module(script).parse
    parse([*flags, *off])
    assert capsys.readouterr().out == f"note: without effect beside {idle}\n"
    parse(flags), parse(off)
    assert capsys.readouterr().out == ""


def test_what_scan_sets_by_the_data_stays_unset_in_the_arguments_of_the_caller(tmp_path):
    scan = importlib.import_module("scan")
    args = scan.parse(["--dataset", pictures(tmp_path / "pets"), "--neighbours=50", "--width=16"])
    with pytest.raises(UserError, match="--neighbours"):           # found after the batch size
        scan.train(args)
    assert args.batch_size is None


def test_a_note_that_cannot_be_written_ends_in_no_traceback(monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")
    monkeypatch.setattr(sys, "stdout", Full())
    assert importlib.import_module("scl").parse(["--beta", "2", "--alpha", "0"]).beta == 2


def test_arguments_in_a_notebook_may_be_numbers_and_paths(tmp_path):
    args = importlib.import_module("scan").parse(["--dataset", tmp_path, "--epochs", 3, "--lr", .1])
    assert (args.dataset, args.epochs, args.lr) == (str(tmp_path), 3, .1)


def test_a_word_with_control_characters_is_shown_as_one_line(refused):
    err = refused("identitize", "--epochs", "3\n\x1b[2J")
    assert "\x1b" not in err and "--epochs" in err


def test_assign_needs_to_be_told_which_images(refused, tmp_path):
    assert "--assign needs --dataset" in refused("scan", "--assign", tmp_path)


def test_folders_cannot_be_classes_and_no_classes(refused, tmp_path):
    assert "not allowed with" in refused("scl", "--dataset", pictures(tmp_path / "pets"),
                                         "--unlabelled", "--labelled")


def test_a_second_or_an_interrupted_assign_is_not_sent_to_resume(complete, refused, tmp_path,
                                                                  monkeypatch, capsys):
    args = complete("scan")[1]
    flags = ["--assign", args.out, "--dataset", args.dataset, "--out", str(tmp_path / "a")]
    importlib.import_module("scan").main(flags)
    err = refused("scan", *flags)
    assert "--out" in err and "--resume" not in err

    def interrupt(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr("scan.save_clusters", interrupt)
    with pytest.raises(SystemExit, match="^130$"):
        importlib.import_module("scan").main([*flags[:-1], str(tmp_path / "b")])
    assert "--resume" not in capsys.readouterr().err


def test_detect_is_refused_before_it_trains_where_it_cannot_write(complete, refused, tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "--out" in refused("mask_mix", "--detect", complete("mask_mix")[1].out,
                                  "--out", place)


ASSIGNED = [b"", b"text", [1], {}, {"about": 3, "decoding": {}, "statistics": [], "net": {}},
            {"about": {"model": None, "size": 16}, "decoding": 3, "statistics": 4, "net": 5},
            {"about": {}, "decoding": {}, "statistics": [CONV * float("nan")] * 2, "net": {}}]


@pytest.mark.parametrize("content", ASSIGNED, ids=range(len(ASSIGNED)))
def test_a_model_that_is_none_is_refused(content, refused, tmp_path):
    put(tmp_path / "other" / "model.pt", content)
    pictures(tmp_path / "pets")
    assert "other" in refused("scan", "--dataset", tmp_path / "pets",
                              "--assign", tmp_path / "other")


def altered(kept):
    """What the cache of decoded images could also hold: a part gone, empty or of another kind."""
    for key in kept:
        yield {k: v for k, v in kept.items() if k != key}
        yield from ({**kept, key: value} for value in (3, "x", [], {}, [["x"]], [10**9], None)
                    if isinstance(kept[key], torch.Tensor) or value != kept[key])
    for images in (kept["images"].float(), kept["images"][:, :1], kept["images"][:3],
                   kept["images"][..., :4], kept["images"].long()):
        yield {**kept, "images": images}
    yield from ([1], "text", None, CONV)


def test_a_cache_with_other_contents_is_decoded_anew(tmp_path):
    pets = pictures(tmp_path / "pets")
    first = common.load_dataset(str(pets), tmp_path / "kept")
    (cache,) = (tmp_path / "kept").rglob("*.pt")
    kept, wrong = torch.load(cache), []
    for other in altered(kept):
        torch.save(other, cache)
        try:
            again = common.load_dataset(str(pets), tmp_path / "kept")
            good = torch.equal(again.train.images, first.train.images) and \
                torch.equal(again.train.labels, first.train.labels) and \
                again.train.names == first.train.names and again.decoding == first.decoding
        except Exception as error:
            good = repr(error)
        if good is not True:
            other = other if isinstance(other, dict) else {}
            wrong.append((good, {k: str(other.get(k))[:50] for k in kept
                                 if other.get(k) is not kept[k]}))
    assert not wrong, "\n".join(map(str, wrong))


# ------------------------------------------------------------------------------------------------
# Text

ODD = ["two\nlines.png", "tab\tand\x1b[31mred.png", "写真 é.png", "a,b'\".png",
       os.fsdecode(b"caf\xe9.png"), "-rf.png", "%s%d{}.png", "\u202eoverride.png"]


@pytest.fixture
def odd(tmp_path):
    """A folder whose names are hard to print, in two classes, half of its images broken."""
    for c in ("写真\nü", os.fsdecode(b"\xe9t\xe9")):
        (tmp_path / "pets" / c).mkdir(parents=True)
        for i, name in enumerate(ODD):
            Image.new("RGB", (16, 16), (30 * i, 0, 99)).save(tmp_path / "pets" / c / name)
            (tmp_path / "pets" / c / f"broken {name}").write_text("no image")
    return tmp_path / "pets"


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("utf-16", marks=pytest.mark.slow)])
def test_names_that_stdout_cannot_encode_cost_nothing_and_stay_on_their_lines(
        encoding, odd, tmp_path, monkeypatch):
    written = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(written, encoding, write_through=True))
    run("identitize", odd, tmp_path / "run two\nü")
    text = written.getvalue().decode(encoding)
    left_out = [line for line in text.splitlines() if "broken" in line]
    assert len(left_out) == 2 * len(ODD) and all("left out" in line for line in left_out)
    assert "\x1b" not in text and "\t" not in text and "\u202e" not in text
    assert all(line.isprintable() for line in text.splitlines())
    table = (tmp_path / "run two\nü" / "clusters.csv").read_bytes().decode("utf-8")
    assert len(list(csv.reader(io.StringIO(table, newline="")))) == 1 + 2 * len(ODD)


# Where python holds lines back, as it does by default in a pipe, the last ones fail at the end.
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.mark.parametrize("flags, shell, code", [
    ([], "{} | head -0", 0), ([], "{} >&-", 0), ([], "{} >&- 2>&-", 0), (["-OO"], "{}", 0),
    (["-OO"], "{} --help", 0), ([], "{} --no-such-flag >&- 2>&-", 2), ([], "{} > /dev/full", 1)])
@pytest.mark.slow
def test_a_shell_may_close_stdout_and_python_may_leave_out_docstrings(flags, shell, code, tmp_path):
    command = [sys.executable, *flags, str(ROOT / "identitize.py"), *SMALL["identitize"],
               "--dataset", str(pictures(tmp_path / "pets"))]
    done = subprocess.run(["bash", "-c", shell.format(" ".join(command))], capture_output=True,
                          text=True, env=BUFFERED)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["-u"], []])
def test_a_reader_that_goes_away_makes_no_traceback(flags, tmp_path):
    # identitize.py | head -0: every print fails from the start on; without -u all at the end.
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, *flags, ROOT / "identitize.py", *SMALL["identitize"], "--dataset",
               pictures(tmp_path / "pets")]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=BUFFERED)
    os.close(writing)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("target", ["/dev/full", "closed pipe"])
def test_a_finished_run_that_cannot_say_so_ends_quietly(target, complete):
    args = complete("identitize")[1]
    command = [sys.executable, ROOT / "identitize.py", *SMALL["identitize"], "--dataset",
               args.dataset, "--out", args.out, "--clusters", "2", "--resume", "--device", "cpu"]
    reading, closed = os.pipe()
    os.close(reading)
    with open("/dev/full", "w") as full, os.fdopen(closed, "w") as pipe:
        done = subprocess.run(command, stdout=full if target == "/dev/full" else pipe, text=True,
                              stderr=subprocess.PIPE, env=BUFFERED)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) <= 1


@pytest.mark.slow
def test_a_compiler_that_is_not_there_is_one_line_with_the_way_out(tmp_path):
    command = [sys.executable, ROOT / "identitize.py", *SMALL["identitize"], "--dataset",
               pictures(tmp_path / "pets"), "--compile", "--device", "cpu"]
    nowhere = {"CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | nowhere)
    assert done.returncode == 1 and "leave out --compile" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


# ------------------------------------------------------------------------------------------------
# In a notebook

@ALL
def test_train_leaves_the_arguments_as_they_were(script, complete):
    before, args = complete(script)
    assert vars(args) == before


@pytest.mark.parametrize("patience", [None, 7.])
def test_a_download_leaves_no_timeout_behind(patience, refused, monkeypatch):
    seen = []

    class Offline(torchvision.datasets.CIFAR10):
        def __init__(self, root, train=True, download=False):
            seen.append(socket.getdefaulttimeout())
            raise OSError("no network") if download else RuntimeError("not there")
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Offline)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(patience)
    try:
        assert "no network" in refused("scan", "--dataset=cifar10")
        assert socket.getdefaulttimeout() == patience and seen[-1]
    finally:
        socket.setdefaulttimeout(before)


def test_a_run_in_a_thread_needs_no_signals():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(run_script(lambda args: 3, None)))
    thread.start()
    thread.join()
    assert seen == [3]


def test_common_does_no_work_when_it_is_imported():
    assert not os.listdir(".") and common.NAMES[0] == "shapes"


# ------------------------------------------------------------------------------------------------
# Exit codes

def ends(error):
    """A train function that ends with an error."""
    def train(args):
        raise error
    return train


@pytest.mark.parametrize("error, code, words", [
    (UserError("put it there"), 2, "put it there"), (KeyboardInterrupt(), 130, "interrupted"),
    (NotFinite("scan, epoch 3"), 1, "scan, epoch 3"),
    (OSError(28, "No space left on device"), 1, "No space left"),
    (PermissionError(13, "Permission denied", "/x"), 1, "/x"),
    (torch.OutOfMemoryError("CUDA"), 1, "--batch-size"), (MemoryError(), 1, "--batch-size")])
def test_expected_failures_are_one_line_with_their_exit_code(error, code, words, capsys):
    with pytest.raises(SystemExit) as caught:
        run_script(ends(error), None)
    err = capsys.readouterr().err
    assert caught.value.code == code and words in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_ends_with_128_and_its_number_and_its_handler_comes_back(name, capsys):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as caught:
        run_script(lambda args: (os.kill(os.getpid(), number), [None for _ in range(10**8)]), None)
    assert caught.value.code == 128 + number and signal.getsignal(number) == before
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("first, second", [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGINT"),
                                           ("SIGHUP", "SIGINT"), ("SIGINT", "SIGTERM")])
def test_a_second_signal_does_not_interrupt_what_the_first_one_began(first, second, capsys):
    numbers = [getattr(signal, name) for name in (first, second)]
    before, tidied = [signal.getsignal(number) for number in numbers], []

    def train(args):
        try:
            os.kill(os.getpid(), numbers[0])
            [None for _ in range(10**8)]
        finally:
            os.kill(os.getpid(), numbers[1])
            tidied.append(sum(range(10**6)))
    with pytest.raises(SystemExit) as caught:
        run_script(train, None)
    assert caught.value.code == 128 + numbers[0] and tidied
    assert [signal.getsignal(number) for number in numbers] == before
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_signal_that_is_ignored_stays_ignored():
    # nohup python scan.py &
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run_script(lambda args: os.kill(os.getpid(), signal.SIGHUP), None) is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_memory_that_the_cpu_has_not_is_one_line_too(capsys):
    with pytest.raises(SystemExit) as caught:
        run_script(lambda args: torch.empty(2**50, dtype=torch.uint8), None)
    assert caught.value.code == 1 and "lower --batch-size" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("a bug"), TypeError("a bug")])
def test_bugs_are_not_hidden(error):
    with pytest.raises(type(error), match="a bug"):
        run_script(ends(error), None)
