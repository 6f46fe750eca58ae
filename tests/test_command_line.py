"""The command line: what is wrong is said in one line, with exit code 2, and nothing is written."""
import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
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
        return err
    return run


def pictures(folder, count=12, classes=2):
    for i in range(count):
        place = Path(folder) / (f"class {i % classes}" if classes else "")
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (20 * i, 255 - 20 * i, 0)).save(place / f"{i}.png")
    return folder


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
    (number(float, 0, 1), "3", "at least 0 and at most 1")])
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
            values = ["-1", "many", "nan", "1e999", "99999999999999", ""]
            # 1e999 and a huge integer are refused as out of range, 1.5 where whole numbers count.
            if isinstance(action.default, int):
                values += ["1.5"]
        else:
            continue                                               # a path: see below
        yield from ((flag, value) for value in values)


@pytest.mark.parametrize("script, flag, value", [
    (script, *case) for script in SCRIPTS for case in nonsense(script)])
def test_a_flag_with_nonsense_is_refused_by_name(script, flag, value, refused):
    assert flag in refused(script, f"{flag}={value}")


@ALL
@pytest.mark.parametrize("flag", ["--image-size", "--train-size", "--clusters", "--epochs",
                                  "--batch-size", "--width", "--lr"])
def test_none_of_something_is_refused_by_name(script, flag, refused):
    assert flag in refused(script, f"{flag}=0")


@ALL
@pytest.mark.parametrize("arguments, words", [
    (["--epoch", "3"], "--epoch"), (["--no-such-flag"], "--no-such-flag"), (["cifar10"], "cifar10"),
    (["--epochs"], "--epochs"), (["--dataset"], "--dataset"), (["--resume=yes"], "yes")])
def test_flags_are_neither_abbreviated_nor_invented(script, arguments, words, refused):
    assert words in refused(script, *arguments)


def test_a_long_tail_and_a_balanced_part_exclude_each_other(refused):
    assert "--train-size" in refused("identitize", "--imbalance=10", "--train-size=100")


def test_assignments_need_a_matrix_loss_that_takes_them(refused):
    assert "--identity square" in refused("identitize", "--correlate=assignments")


@ALL
def test_help_is_printed_for_every_flag(script, capsys):
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as caught:
        module.main(["--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert all(f"--{name.replace('_', '-')}" in out for name in vars(module.parse([])))


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
    assert words in refused(script, "--dataset", tmp_path / "pets", "--width=2", *flags)


def test_a_long_tail_can_be_too_thin_for_a_batch(refused, tmp_path):
    pictures(tmp_path / "pets")
    assert "--batch-size 12" in refused("identitize", "--dataset", tmp_path / "pets",
                                        "--imbalance=100", "--batch-size=12")


@ALL
def test_unlabelled_images_need_a_number_of_clusters(script, refused, tmp_path):
    pictures(tmp_path / "pets", classes=0)
    assert "--clusters" in refused(script, "--dataset", tmp_path / "pets", "--batch-size=4")


@ALL
@pytest.mark.parametrize("count, content", [
    (0, b""), (3, b""), (3, b"no image"), (3, b"\x89PNG\r\n\x1a\n"), (3, b"\xff\xd8\xff\xe0")])
def test_an_empty_or_unreadable_folder_is_one_line(script, count, content, refused, tmp_path):
    (tmp_path / "pets").mkdir()
    for i in range(count):
        (tmp_path / "pets" / f"{i}.jpg").write_bytes(content)
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
def test_labels_in_one_split_only_are_refused(script, refused, tmp_path):
    pictures(tmp_path / "pets" / "train")
    pictures(tmp_path / "pets" / "test", classes=0)
    assert "test" in refused(script, "--dataset", tmp_path / "pets", "--batch-size=4")


@ALL
@pytest.mark.parametrize("name", ["imagenet10", "imagenet-dogs", "tiny-imagenet"])
def test_a_dataset_that_is_not_there_says_what_to_put_where(script, name, refused):
    assert "data" in refused(script, "--dataset", name)


@ALL
def test_a_missing_gpu_is_one_line(script, capsys):
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="2"):
            importlib.import_module(script).main(["--device", "cuda"])
        assert "--device cuda" in capsys.readouterr().err


@ALL
def test_an_existing_run_is_refused_before_anything_is_done(script, refused, tmp_path):
    pictures(tmp_path / "pets")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "log.jsonl").write_text('{"epoch": 1}\n')
    err = refused(script, "--dataset", tmp_path / "pets", "--batch-size=4",
                  "--out", tmp_path / "mine")
    assert "--resume" in err and "--out" in err
    assert (tmp_path / "mine" / "log.jsonl").read_text() == '{"epoch": 1}\n'


@ALL
def test_a_run_folder_that_is_a_file_is_refused(script, refused, tmp_path):
    pictures(tmp_path / "pets")
    (tmp_path / "file").write_text("mine")
    refused(script, "--dataset", tmp_path / "pets", "--batch-size=4", "--out", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_a_pretext_that_is_none_is_refused(content, refused, tmp_path):
    if content is not None:
        (tmp_path / "b.pt").write_bytes(content)
    pictures(tmp_path / "pets")
    assert "b.pt" in refused("scan", "--dataset", tmp_path / "pets", "--batch-size=4",
                             "--cluster-batch=4", "--self-label-batch=4",
                             "--pretext", tmp_path / "b.pt")


# ------------------------------------------------------------------------------------------------
# Exit codes

ARGS = SimpleNamespace(batch_size=256, width=64)


def ends(error):
    """A train function that ends with an error."""
    def train(args):
        raise error
    return train


@pytest.mark.parametrize("error, code, words", [
    (UserError("put it there"), 2, "put it there"), (KeyboardInterrupt(), 130, "--resume"),
    (NotFinite("scan, epoch 3, step 5"), 1, "scan, epoch 3, step 5"),
    (OSError(28, "No space left on device"), 1, "No space left"),
    (PermissionError(13, "Permission denied", "/x"), 1, "/x"),
    (torch.OutOfMemoryError("CUDA"), 1, "--batch-size (now 256), --width (now 64)"),
    (MemoryError(), 1, "--batch-size")])
def test_expected_failures_are_one_line_with_their_exit_code(error, code, words, capsys):
    with pytest.raises(SystemExit) as caught:
        run_script(ends(error), ARGS)
    err = capsys.readouterr().err
    assert caught.value.code == code and words in err and len(err.strip().splitlines()) == 1


def test_memory_that_the_cpu_has_not_is_one_line_too(capsys):
    with pytest.raises(SystemExit) as caught:
        run_script(lambda args: torch.empty(2**50, dtype=torch.uint8), ARGS)
    assert caught.value.code == 1 and "lower --batch-size" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("a bug"), TypeError("a bug")])
def test_bugs_are_not_hidden(error):
    with pytest.raises(type(error), match="a bug"):
        run_script(ends(error), ARGS)


def test_success_ends_without_an_exit_code():
    assert run_script(lambda args: None, ARGS) is None


def test_a_reader_that_goes_away_makes_no_traceback(tmp_path):
    # identitize.py | head -0: every print fails from the start on.
    pictures(tmp_path / "pets")
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-u", ROOT / "identitize.py", "--dataset", tmp_path / "pets",
               "--width", "2", "--batch-size", "4", "--epochs", "1", "--device", "cpu"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "--resume" in done.stderr


def test_common_does_no_work_when_it_is_imported():
    assert not os.listdir(".") and common.NAMES[0] == "shapes"
