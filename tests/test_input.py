"""What people give wrongly: flags, lists, checkpoints and folders, to all six scripts. Each is one
line on stderr and exit code 2, before any work, or does what its test says."""

import copy
import functools
import inspect
import math
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import byol
import common
import eval_linear
import finetune
import moco
import simclr
import swav
from conftest import SMALL, refused, run_ranks
from test_train import assert_same_run, log_of
from videos import make_video

SCRIPTS = [simclr, moco, byol, swav, eval_linear, finetune]
WORDS = {  # a wrong value of each flag that is a word
    "data": "nowhere",
    "out": "/dev/null/out",
    "show_views": "/dev/null/views.png",
    "backbone": "resnet",
    "augment": "crop,wobble",
    "optimizer": "adam",
    "batch_norm": "both",
    "weights": "nowhere.pth",
    "val": "nowhere",
    "extract": "/dev/null/features.npz",
    "dataset": "kinetics",
    "boxes": "nowhere.csv",
}


@pytest.fixture
def argv(folder, tmp_path):
    """Of a script: arguments that work, for as little as possible."""

    def make(script):
        flags = ["--data", str(folder), "--out", str(tmp_path / "out"), *SMALL]
        if hasattr(script.Recipe, "rho"):
            return flags
        if script is eval_linear:
            flags += ["--weights", "random"]
        return [*flags, "--val", str(folder)]

    return make


def wrong_values(name, paper):
    """Argument lists, each a wrong value of a flag."""
    flag, kind = "--" + name.replace("_", "-"), float if paper is None else type(paper)
    if kind is bool:
        return [[f"{flag}=yes"], [flag, "1"]]
    if kind is str:
        return [[flag], [flag, WORDS[name]]]
    number = type(paper[0]) if kind is tuple else kind
    wrong = [[flag], [flag, "x"], [flag, ""], [flag, "-2"], [flag, "nan"], [flag, "inf"]]
    wrong += [[flag, "0.5"]] * (number is int) + [[flag, "1", "x"]]
    return wrong


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_with_wrong_values(script, argv, capfd, monkeypatch, tmp_path):
    """No value, a text, nothing, a number below its range, nan, inf, a fraction where whole numbers
    go, two values where one does, paths that are not there, names that do not exist."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common.inspect, "getsource", functools.cache(inspect.getsource))
    monkeypatch.setattr(common.inspect, "getmodule", functools.cache(inspect.getmodule))
    good, tried = argv(script), 0
    flags = {**vars(script.Recipe), **vars(common._Flags)}
    flags = {name: value[0] for name, value in flags.items() if not name.startswith("_")}
    for name, paper in flags.items():
        for wrong in wrong_values(name, paper):
            line = refused(script, [*good, *wrong], capfd)
            assert name.replace("_", "-") in line or wrong[-1] in line, (wrong, line)
            tried += 1
    assert tried > 150 and not list(tmp_path.rglob("*.pth")) and not Path("data").exists()


@pytest.mark.parametrize("script", [byol, finetune])
def test_any_seed_will_do(script, argv, tmp_path):
    """A date, a hash of 80 bits: any whole number from 0 on is a seed, and another one another
    run."""
    states = []
    for name, seed in (("a", 20261231), ("b", 2**80 + 1), ("c", 1)):
        script.main(
            [*argv(script), "--seed", str(seed), "--max-steps", "1", "--out", f"{tmp_path}/{name}"]
        )
        states.append(torch.load(tmp_path / name / "last.pth", weights_only=True)["model"])
    for one, two in ((0, 1), (1, 2), (0, 2)):
        assert any(not torch.equal(states[one][name], states[two][name]) for name in states[0])


def _as_nobody(script, argv):
    if os.getuid() == 0:  # permissions do not bind root
        os.setuid(65534)
    script.main(argv)


@pytest.fixture
def open_place(folder):
    """A folder that any user may read, with the videos and an output folder in it."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    shutil.copytree(folder, place / "data")
    (place / "data").chmod(0o755)
    (place / "out").mkdir()
    yield place
    (place / "out").chmod(0o755)
    shutil.rmtree(place)


@pytest.mark.parametrize("script", SCRIPTS)
def test_read_only_output_folder(script, argv, open_place, capfd):
    """A folder that this user may not write to (tests as root become nobody for it): one line, exit
    code 2, before any work. The same for a folder that cannot be made, below /proc."""
    flags = argv(script)
    for flag in ("--data", "--val"):
        if flag in flags:
            flags[flags.index(flag) + 1] = str(open_place / "data")
    (open_place / "out").chmod(0o555)
    for out in (open_place / "out", open_place / "out/deeper", Path("/proc/rho/out")):
        capfd.readouterr()
        assert run_ranks(1, _as_nobody, script, [*flags, "--out", str(out)]) == [2]
        printed, errors = capfd.readouterr()
        assert len(errors.strip().splitlines()) == 1 and str(out.parent) in errors
        assert '"step"' not in printed and "kNN:" not in printed
    assert not list((open_place / "out").iterdir())


def _locked_on_the_way(argv, place):
    update = common._Run.update

    def lock(self, *args, **more):
        place.chmod(0o555)
        return update(self, *args, **more)

    os.chown(place, 65534, 65534)
    common._Run.update = lock
    _as_nobody(byol, argv)


def test_output_folder_that_becomes_read_only(argv, open_place, tmp_path, capfd):
    """A save that is refused ends the run with exit code 1 and one line, and loses nothing: once it
    is writable again, the same command ends like an undisturbed run."""
    flags = [*argv(byol), "--data", str(open_place / "data")]
    here = [*flags, "--out", str(open_place / "out")]
    byol.main([*here, "--max-steps", "2"])
    before = (open_place / "out/last.pth").read_bytes()
    (open_place / "out/log.jsonl").chmod(0o666)
    capfd.readouterr()
    assert run_ranks(1, _locked_on_the_way, here, open_place / "out") == [1]
    errors = [line for line in capfd.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1 and "cannot write" in errors[0]
    assert (open_place / "out/last.pth").read_bytes() == before
    (open_place / "out").chmod(0o755)
    byol.main(here)
    byol.main([*flags, "--out", str(tmp_path / "whole")])
    assert_same_run(tmp_path / "whole", open_place / "out")


# --- lists


def test_lists_as_people_write_them(tmp_path, small, capfd):
    """Blanks, quotes, umlauts, bytes that are no UTF-8, and a line twice: the path is the line less
    the white space around it, and nothing else; a video that is listed twice counts twice."""
    names = ["a b.mp4", '"c".mp4', "'d'.mp4", "ü日本.mp4", "e,f.mp4"]
    names.insert(4, os.fsdecode(b"\xe9t\xe9.mp4"))
    for name in names:
        make_video(tmp_path / name, n=10, size=(48, 36))
    lines = [b"  " + os.fsencode(name) + b" \t one class " for name in names]
    text = b"\xef\xbb\xbf#\r\n \t \r\n" + b"\r\n\r\n".join([*lines, lines[0]]) + b"\r\n"
    (tmp_path / "list.txt").write_bytes(text)
    videos = common.Videos(tmp_path / "list.txt")
    assert [*videos] == [str(tmp_path / name) for name in [*names, names[0]]]
    assert videos.classes == ["one class"] and videos.labels.tolist() == [0] * 7
    byol.main([*small, "--data", str(tmp_path / "list.txt"), "--epochs", "1", "--knn-every", "0"])
    assert log_of(tmp_path / "out")[-1]["bad_videos"] == 0
    assert "bad video" not in capfd.readouterr().err


def test_lines_that_name_no_video(folder, tmp_path, small, capfd):
    """A directory, a missing file, a quoted path, a NUL and an address among good lines: each is a
    bad video that is named once; an evaluation ends with its name."""
    bad = [str(folder), "missing.mp4", f'"{folder}/even/00.mp4"', "nul\0.mp4", "http://a.b/c.mp4"]
    good = [str(path) for path in sorted(folder.rglob("*.mp4"))]
    (tmp_path / "list.txt").write_text("".join(f"{line}\tall\n" for line in [*good, *bad]))
    flags = [*small, "--data", str(tmp_path / "list.txt"), "--epochs", "4", "--knn-every", "0"]
    byol.main(flags)
    errors = capfd.readouterr().err
    assert errors.count("WARN bad video") == len(bad) == log_of(tmp_path / "out")[-1]["bad_videos"]
    for line in bad:
        assert f"{os.path.join(tmp_path, line)}: " in errors
    for line in bad[:2]:
        (tmp_path / "val.txt").write_text(f"{good[0]}\tall\n{line}\tall\n")
        flags = ["--weights", "random", "--small", "--data", str(folder), "--workers", "0"]
        flags += ["--val", str(tmp_path / "val.txt"), "--out", str(tmp_path / "probe")]
        rows = [*[f"{path}\tall\n" for path in good], f"{good[0]}\tother\n"]
        (tmp_path / "train.txt").write_text("".join(rows))
        line_of_it = refused(eval_linear, [*flags, "--data", str(tmp_path / "train.txt")], capfd)
        assert os.path.join(tmp_path, line) in line_of_it


@pytest.mark.parametrize("kind", ["empty", "comments", "binary", "utf-16", "video", "directory"])
def test_lists_that_are_none(kind, folder, tmp_path, small, capfd):
    """A list of nothing, of bytes, of UTF-16, a video in its place, a folder without videos: one
    line (with binary data after the names of what was tried), exit code 2."""
    path = tmp_path / "list.txt"
    if kind == "directory":
        path.mkdir()
    elif kind == "video":
        path = folder / "even/00.mp4"
    else:
        text = "# nothing\n\n" if kind == "comments" else f"{folder}/even/00.mp4\n" * 13
        whole = {"empty": b"", "binary": np.random.default_rng(0).bytes(9999)}
        whole |= {"utf-16": text.encode("utf-16"), "comments": text.encode()}
        path.write_bytes(whole[kind])
    with pytest.raises(SystemExit) as stop:
        byol.main([*small, "--data", str(path)])
    errors = capfd.readouterr().err.strip().split("\n")
    assert stop.value.code == 2 and " error: " in errors[-1] and "Traceback" not in str(errors)
    assert len(errors) == 1 or all("WARN bad video" in line for line in errors[:-1])
    assert not (tmp_path / "out/last.pth").exists()


# --- checkpoints


@pytest.fixture(scope="module")
def checkpoints(folder, tmp_path_factory):
    """last.pth after two steps of each method."""
    out, found = tmp_path_factory.mktemp("checkpoints"), {}
    for script in (simclr, moco, byol, swav):
        place = out / script.__name__
        script.main(["--data", str(folder), *SMALL, "--out", str(place), "--max-steps", "2"])
        found[script.__name__] = place / "last.pth"
    return found


def _unsuitable(content):
    """{name: a checkpoint that is not one of this run}."""
    first, several = next(iter(content["model"])), {}

    def changed(name):
        several[name] = copy.deepcopy(content)
        return several[name]

    changed("extra tensor")["model"]["extra"] = torch.zeros(2)
    del changed("missing tensor")["model"][first]
    changed("another shape")["model"][first] = torch.zeros(3, 3)
    changed("a number for a tensor")["model"][first] = 1.0
    changed("nan weight")["model"][first][-1, -1, -1] = math.nan
    changed("infinite weight")["model"][first][0, 0, 0] = math.inf
    for name in ("nan", "inf"):
        state = changed(f"{name} in the optimizer")["optimizer"]["state"]
        state[0]["exp_avg"][0, 0, 0] = float(name)
    changed("optimizer without groups")["optimizer"] = {"state": {}, "param_groups": []}
    changed("no optimizer").pop("optimizer")
    changed("no number").pop("number")
    changed("number that is a word")["number"] = "two"
    changed("negative number")["number"] = -1
    changed("more steps than there are")["number"] = 10**9
    changed("no log")["log_bytes"] = -1
    changed("log that is a word")["log_bytes"] = "all"
    changed("args that are a list")["args"] = [1]
    several |= {"a list": [content], "a tensor": torch.zeros(3), "a text": "last", "empty": {}}
    return several


@pytest.mark.filterwarnings("ignore:Using a non-tuple")
def test_checkpoints_of_another_kind(checkpoints, argv, tmp_path, capfd):
    """Extra, missing, wrongly shaped, infinite and NaN entries, in the optimizer too, wrong types
    and numbers: one line, exit code 2, and checkpoint and log stay as they are."""
    out = tmp_path / "out"
    shutil.copytree(checkpoints["byol"].parent, out)
    content, log = torch.load(out / "last.pth", weights_only=True), (out / "log.jsonl").read_bytes()
    content["args"]["out"] = str(out)
    several = _unsuitable(content)
    for name, wrong in several.items():
        torch.save(wrong, out / "last.pth")
        before = (out / "last.pth").read_bytes()
        line = refused(byol, argv(byol), capfd)
        assert "last.pth" in line, (name, line)
        assert (out / "last.pth").read_bytes() == before, name
        assert (out / "log.jsonl").read_bytes() == log, name
    torch.save(content, out / "last.pth")
    byol.main(argv(byol))
    assert log_of(out)[-1]["step"] == 4


def test_checkpoint_that_ends_at_any_tenth(checkpoints, argv, tmp_path, capfd):
    """Truncated, or with a block of noise: refused in one line, and not touched."""
    out = tmp_path / "out"
    shutil.copytree(checkpoints["byol"].parent, out)
    whole = (out / "last.pth").read_bytes()
    for tenth in range(10):
        place = len(whole) * tenth // 10
        (out / "last.pth").write_bytes(whole[:place])
        assert "last.pth" in refused(byol, argv(byol), capfd)
        assert (out / "last.pth").stat().st_size == place
    assert (out / "log.jsonl").read_bytes() == (
        checkpoints["byol"].parent / "log.jsonl"
    ).read_bytes()


@pytest.mark.parametrize("other", ["simclr", "moco", "swav"])
def test_checkpoint_of_another_method(other, checkpoints, argv, tmp_path, capfd):
    """One line that says what differs, and both values."""
    (tmp_path / "out").mkdir()
    shutil.copy(checkpoints[other], tmp_path / "out/last.pth")
    line = refused(byol, argv(byol), capfd)
    assert "last.pth was made with --" in line
    assert (tmp_path / "out/last.pth").read_bytes() == checkpoints[other].read_bytes()
    changed = "--backbone s3d", "--rho 3"
    shutil.copytree(checkpoints["byol"].parent, tmp_path / "own")
    for change in changed:
        flags = [*argv(byol), "--out", str(tmp_path / "own"), *change.split()]
        content = torch.load(tmp_path / "own/last.pth", weights_only=True)
        content["args"]["out"] = str(tmp_path / "own")
        torch.save(content, tmp_path / "own/last.pth")
        assert change.split()[0] in refused(byol, flags, capfd)


# --- what looks right


def test_another_folder_of_the_same_names(checkpoints, argv, tmp_path, folder, capfd):
    """A resume with --data of other videos that are called the same: refused, both are named; a
    slash at the end is no other folder."""
    shutil.copytree(folder, tmp_path / "copy")
    byol.main([*argv(byol), "--max-steps", "1"])
    line = refused(byol, [*argv(byol), "--data", str(tmp_path / "copy")], capfd)
    assert f"--data {folder}, not {tmp_path / 'copy'}" in line
    byol.main([*argv(byol), "--data", f"{folder}/", "--max-steps", "2"])


def test_a_folder_of_train_and_val(folder, argv, tmp_path, capfd):
    """Pre-training takes the folder train of such a root, as the evaluations do, and leaves val."""
    shutil.copytree(folder, tmp_path / "root/train")
    shutil.copytree(folder / "odd", tmp_path / "root/val/odd")
    flags = ["--data", str(tmp_path / "root"), "--max-steps", "1"]
    byol.main([*argv(byol), *flags])
    assert f"data: 13 videos, {tmp_path / 'root/train'}" in capfd.readouterr().out


@pytest.mark.parametrize("classes, expected", [("odd new", 6), ("new", 3), ("", 3)])
def test_a_sibling_val_of_other_classes(classes, expected, folder, argv, tmp_path):
    """The kNN curve is of the videos of the folder val beside train whose class is known; if there
    are none, of every fifth training video. It ends no run."""
    shutil.copytree(folder, tmp_path / "train")
    (tmp_path / "val").mkdir()
    for name in classes.split():
        shutil.copytree(folder / "odd", tmp_path / "val" / name)
    (_, _), (_, queries) = common._held_out(common.Videos(tmp_path / "train"))
    assert len(queries) == expected
    flags = [*argv(byol), "--data", str(tmp_path / "train"), "--knn-every", "1"]
    byol.main([*flags, "--epochs", "1", "--warmup-epochs", "0"])
    assert "knn_top1" in log_of(tmp_path / "out")[-1]


def test_flags_before_the_demo_is_made(tmp_path, monkeypatch, capfd):
    """Settings that cannot work are refused before half a minute goes into the demo's videos."""
    monkeypatch.chdir(tmp_path)
    assert "--batch-size 1" in refused(byol, ["--batch-size", "1"], capfd)
    assert "5 or more --frames" in refused(byol, ["--backbone", "s3d", "--frames", "4"], capfd)
    assert "--size of 17" in refused(byol, ["--backbone", "s3d_g", "--size", "16"], capfd)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", ["s3d", "s3d_g"])
def test_the_least_that_s3d_takes(name):
    """5 frames of 17 pixels go through; 4 frames or 16 pixels, which are refused, would not."""
    network = common.backbone(name).eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 5, 17, 17)).shape == (1, network.feature_dim)
        for shape in ((4, 17, 17), (5, 16, 16)):
            with pytest.raises(RuntimeError):
                network(torch.zeros(1, 3, *shape))


def test_check_data_of_any_name(tmp_path, small, capfd):
    """A name that is no UTF-8, of a good video and of a bad one: the list has it byte for byte, and
    trains."""
    (tmp_path / "data").mkdir()
    for i in range(6):
        make_video(tmp_path / f"data/{os.fsdecode(b'%d-' % i)}\udce9.mp4", n=10, size=(48, 36))
    (tmp_path / "data/\udcff.mp4").write_text("no video")
    flags = [*small, "--data", str(tmp_path / "data")]
    with pytest.raises(SystemExit) as stop:
        byol.main([*flags, "--check-data"])
    assert stop.value.code == 0 and "\\udcff.mp4" in capfd.readouterr().out
    clean = (tmp_path / "out/clean.txt").read_bytes()
    assert clean.count(b"\xe9.mp4") == 6 and b"\xff" not in clean
    byol.main([*flags, "--data", str(tmp_path / "out/clean.txt"), "--max-steps", "1"])


def test_files_that_are_devices(argv, tmp_path, capfd):
    """Features and pictures go to files; a device in their place is refused, and stays."""
    line = refused(eval_linear, [*argv(eval_linear), "--extract", "/dev/full"], capfd)
    assert "cannot write a file there" in line and not Path("/dev/full").is_file()
    with pytest.raises(SystemExit) as stop:
        byol.main([*argv(byol), "--show-views", "/dev/full"])
    assert stop.value.code == 1 and "cannot write /dev/full" in capfd.readouterr().err
    assert not Path("/dev/full").is_file()


def test_an_unreadable_list(argv, open_place, capfd):
    """A list that this user may not read, and a name too long for any file: one line, exit 2."""
    (open_place / "list.txt").write_text("a.mp4\n")
    (open_place / "list.txt").chmod(0)
    for data in (str(open_place / "list.txt"), "x" * 5000):
        capfd.readouterr()
        assert run_ranks(1, _as_nobody, byol, [*argv(byol), "--data", data]) == [2]
        (line,) = capfd.readouterr().err.strip().splitlines()
        assert " error: --data" in line
