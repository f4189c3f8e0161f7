"""What people give wrongly: flags, lists, checkpoints and folders. Each is one line on stderr and
exit code 2, before any work, or does what its test says."""

import copy
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
from conftest import SMALL, arguments, refused, run_ranks
from test_train import assert_same_run, log_of
from videos import make_video

METHODS = [simclr, moco, byol, swav]
SCRIPTS = [*METHODS, eval_linear, finetune]


@pytest.fixture
def argv(folder, tmp_path):
    """Of a script: arguments that work, for as little as possible."""

    def make(script):
        flags = ["--data", str(folder), "--out", str(tmp_path / "out"), *SMALL]
        if script in METHODS:
            return flags
        if script is eval_linear:
            flags += ["--weights", "random"]
        return [*flags, "--val", str(folder)]

    return make


# --- flags


def wrong_values(name, default, choices):
    """Argument lists, each a wrong value of a flag."""
    flag = "--" + name.replace("_", "-")
    if isinstance(default, bool):
        return [[f"{flag}=yes"], [flag, "1"]]
    if choices:
        return [[flag], [flag, "nothing"], [flag, ""]]
    if isinstance(default, str):
        return [[flag], [flag, "a", "b"]]
    number = default[0] if isinstance(default, tuple) else default
    wrong = [[flag], [flag, "x"], [flag, ""], [flag, "1", "x"]]
    if isinstance(number, int):
        wrong.append([flag, "0.5"])
    return wrong


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_with_wrong_values(script, argv, capfd, monkeypatch, tmp_path):
    """No value, a text, nothing, a fraction where whole numbers go, two values where one does,
    names that do not exist: argparse's word, in one line."""
    monkeypatch.chdir(tmp_path)
    good, tried = argv(script), 0
    for name, field in script.Config.__dataclass_fields__.items():
        for wrong in wrong_values(name, field.default, field.metadata.get("choices")):
            line = refused(script, [*good, *wrong], capfd)
            assert name.replace("_", "-") in line or wrong[-1] in line, (wrong, line)
            tried += 1
    for wrong in (["--no-such-flag", "1"], ["--back", "tiny"]):  # no guesses at what is meant
        assert wrong[0] in refused(script, [*good, *wrong], capfd)
    assert tried > 60 and not list(tmp_path.rglob("*.pth")) and not Path("data").exists()


WRONG = """--rho 0|--frames 0|--stride 0|--size 0|--epochs 0|--log-every 0|--epochs -1|--lr 0
    |--lr nan|--lr inf|--lr -1|--warmup 1|--warmup -0.1|--warmup nan|--short-side 8 8
    |--short-side 20 18|--short-side 20|--short-side 20 20 20|--batch-size 1|--batch-size 0
    |--batch-size 14|--augment crop,wobble|--data nowhere|--out /dev/null/out"""


@pytest.mark.parametrize("wrong", [line.strip() for line in WRONG.split("|")])
def test_values_that_cannot_work(wrong, argv, capfd, tmp_path):
    """Numbers out of their range, a crop that is larger than its frame, a batch that is larger than
    the data, names and places that are not there: the line names the flag or its value."""
    line = refused(byol, [*argv(byol), *wrong.split()], capfd)
    flag, *values = wrong.split()
    assert flag in line or values[-1] in line, line
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.parametrize("script, flag", [(byol, "--augment none"), (simclr, "--crop-area 0 0")])
def test_values_that_look_wrong(script, flag, argv, tmp_path):
    """No augmentation, no resized crop: settings that people ask for."""
    script.main([*argv(script), *flag.split(), "--max-steps", "1"])
    assert log_of(tmp_path / "out")[-1]["step"] == 1


@pytest.mark.parametrize("script", [byol, finetune])
def test_any_seed_will_do(script, argv, tmp_path):
    """A date, a hash of 60 bits: another seed is another run."""
    states = []
    for name, seed in (("a", 20261231), ("b", 2**60 + 1), ("c", 1)):
        out = f"{tmp_path}/{name}"
        script.main([*argv(script), "--seed", str(seed), "--max-steps", "1", "--out", out])
        states.append(torch.load(tmp_path / name / "last.pth", weights_only=True)["model"])
    for one, two in ((0, 1), (1, 2), (0, 2)):
        assert any(not torch.equal(states[one][name], states[two][name]) for name in states[0])


def test_flags_before_the_demo_is_made(tmp_path, monkeypatch, capfd):
    """Settings that cannot work are refused before half a minute goes into the demo's videos."""
    monkeypatch.chdir(tmp_path)
    for wrong in ("--warmup 35", "--rho 0", "--augment wobble", "--short-side 8 8"):
        assert wrong.split()[0] in refused(byol, wrong.split(), capfd)
    assert not (tmp_path / "data").exists()


def test_the_least_that_s3d_takes():
    """5 frames of 17 pixels go through; 4 frames or 16 pixels would not."""
    network = common.backbone("s3d_g").eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 5, 17, 17)).shape == (1, network.feature_dim)
        for shape in ((4, 17, 17), (5, 16, 16)):
            with pytest.raises(RuntimeError):
                network(torch.zeros(1, 3, *shape))


# --- folders


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
        assert "chance level" not in printed and "kNN " not in printed
    assert not list((open_place / "out").iterdir())


def _locked_on_the_way(argv, place):
    record = common.Run.record

    def lock(self, *args, **numbers):
        place.chmod(0o555)
        record(self, *args, **numbers)

    os.chown(place, 65534, 65534)
    common.Run.record = lock
    _as_nobody(byol, argv)


def test_output_folder_that_becomes_read_only(argv, open_place, tmp_path, capfd):
    """A save that is refused ends the run with exit code 1 and one line, and loses nothing: once it
    is writable again, the same command ends like an undisturbed run."""
    flags = [*argv(byol), "--data", str(open_place / "data"), "--log-every", "1"]
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


def test_a_folder_in_the_place_of_a_file(argv, tmp_path, capfd):
    """Features go to a file; a folder in its place stays, and one line says so."""
    (tmp_path / "folder.npz").mkdir()
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        eval_linear.main([*argv(eval_linear), "--extract", f"{tmp_path}/folder.npz"])
    (line,) = [line for line in capfd.readouterr().err.splitlines() if " error: " in line]
    assert stop.value.code and "folder.npz" in line
    assert not list((tmp_path / "folder.npz").iterdir())
    assert not list(tmp_path.glob("*.tmp"))


# --- lists


def test_lists_as_people_write_them(tmp_path, small, capfd):
    """Blanks, quotes, umlauts, bytes that are no UTF-8, CRLF, a byte order mark, and a line twice:
    the path is the line less the white space around it, and nothing else; a video that is listed
    twice counts twice."""
    names = ["a b.mp4", '"c".mp4', "'d'.mp4", "ü日本.mp4", "e,f.mp4"]
    names.insert(4, os.fsdecode(b"\xe9t\xe9.mp4"))
    for name in names:
        make_video(tmp_path / name, n=10, size=(48, 36))
    lines = [b"  " + os.fsencode(name) + b" \t one class " for name in names]
    text = b"\xef\xbb\xbf#\r\n \t \r\n" + b"\r\n\r\n".join([*lines, lines[0]]) + b"\r\n"
    (tmp_path / "list.txt").write_bytes(text)
    paths, labels = common.list_videos(tmp_path / "list.txt")
    assert paths == [str(tmp_path / name) for name in [*names, names[0]]]
    assert labels == ["one class"] * 7
    byol.main([*small, "--data", str(tmp_path / "list.txt"), "--epochs", "1", "--knn-every", "0"])
    assert log_of(tmp_path / "out")[-1]["bad_videos"] == 0
    assert "bad video" not in capfd.readouterr().err


def test_a_folder_is_listed_in_the_order_of_names(folder, monkeypatch):
    """The order in which a disk lists its files: a copy of the data would be another run."""
    paths, labels = common.list_videos(folder)
    assert len(paths) == 13 and paths == sorted(paths) and labels == sorted(labels)
    listed = common.glob.iglob
    monkeypatch.setattr(common.glob, "iglob", lambda *a, **how: [*listed(*a, **how)][::-1])
    assert common.list_videos(folder) == (paths, labels)


def test_lists_without_labels(tmp_path):
    """A path alone has the label ""; in a folder the label is the folder in it."""
    (tmp_path / "list.txt").write_text("a.mp4\n/b/c.mp4\tx\nd/e.mp4\t\n")
    paths, labels = common.list_videos(tmp_path / "list.txt")
    assert paths == [f"{tmp_path}/a.mp4", "/b/c.mp4", f"{tmp_path}/d/e.mp4"]
    assert labels == ["", "x", ""]
    for name in ("z.mp4", "b/x/1.MOV", "b/x/0.mkv", "a/1.mp4", "a/no.txt"):
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).touch()
    paths, labels = common.list_videos(tmp_path / "folder")
    names = ["a/1.mp4", "b/x/0.mkv", "b/x/1.MOV", "z.mp4"]
    assert paths == [f"{tmp_path}/folder/{name}" for name in names]
    assert labels == ["a", "b/x", "b/x", ""]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_lists(end, tmp_path):
    """A header names the columns, in any order, among others; quotes are csv's; a byte order mark
    is no part of a name. Training takes the rows train, testing val and test."""
    rows = ["split,label,fps,path", "train,cat,30,a.mp4", 'train,"dog, big",25,"b,c.mp4"']
    rows += ["val,cat,30,sub/d.mp4", "test,dog,30,/e.mp4", "none,dog,30,f.mp4", ""]
    (tmp_path / "list.csv").write_bytes(b"\xef\xbb\xbf" + end.join(rows).encode())
    listed = {split: common.list_videos(tmp_path / "list.csv", split) for split in ("train", "val")}
    train = [f"{tmp_path}/a.mp4", f"{tmp_path}/b,c.mp4"]
    assert listed["train"] == (train, ["cat", "dog, big"])
    assert listed["val"] == ([f"{tmp_path}/sub/d.mp4", "/e.mp4"], ["cat", "dog"])
    paths, labels = common.list_videos(tmp_path / "list.csv")
    assert len(paths) == 5 and labels[-1] == "dog"


def test_csv_without_splits(tmp_path, capfd):
    """Without a column split all rows are for training; without one label they have none; without a
    column path the file is refused."""
    (tmp_path / "list.csv").write_text("path\na.mp4\nb.mp4\n")
    expected = [f"{tmp_path}/a.mp4", f"{tmp_path}/b.mp4"], ["", ""]
    assert common.list_videos(tmp_path / "list.csv") == expected
    assert common.list_videos(tmp_path / "list.csv", "train") == expected
    assert common.list_videos(tmp_path / "list.csv", "val") == ([], [])
    (tmp_path / "list.csv").write_text("a.mp4,cat\nb.mp4,dog\n")
    with pytest.raises(SystemExit) as stop:
        common.list_videos(tmp_path / "list.csv")
    assert stop.value.code == 2
    assert "must be a header: path, and maybe label, split" in capfd.readouterr().err


def test_training_on_a_csv(folder, argv, tmp_path, capfd):
    """Pre-training takes the rows train of a csv alone."""
    rows = ["path,label,split"]
    for i, path in enumerate(sorted(folder.rglob("*.mp4"))):
        rows.append(f"{path},{path.parent.name},{'val' if i < 4 else 'train'}")
    (tmp_path / "list.csv").write_text("\r\n".join(rows))
    byol.main([*argv(byol), "--data", str(tmp_path / "list.csv"), "--max-steps", "1"])
    assert "data: 9 videos, 2 classes" in capfd.readouterr().out
    source = common.find_data(arguments(byol, data=str(tmp_path / "list.csv")))
    assert len(common.list_videos(source, "train")[0]) == 9
    assert len(common.list_videos(source, "val")[0]) == 4


def test_one_video_file(folder, argv, capfd):
    """A video file is a list of one; its name may be in capitals. It is too little to train on."""
    path = str(folder / "even/00.mp4")
    assert common.list_videos(path) == ([path], [""])
    assert common.list_videos(path, "train") == ([path], [""])
    assert common.list_videos(path, "val") == ([], [])
    assert "all 1 videos" in refused(byol, [*argv(byol), "--data", path], capfd)


class Frames:
    """A reader of a folder of pictures, 30 a second."""

    def __init__(self, folder, short_side):
        self.pictures = [np.load(path) for path in sorted(Path(folder).glob("*.npy"))]
        if not self.pictures:
            raise common.BadVideo(f"{folder}: no pictures")
        self.duration = len(self.pictures) / 30

    def read(self, times):
        last = len(self.pictures) - 1
        return np.stack([self.pictures[min(last, int(t * 30 + 0.03))] for t in times])

    def close(self):
        pass


class FolderClips(common.VideoClips):
    def open(self, index, short_side):
        return Frames(self.paths[index], short_side)


def test_a_line_that_names_a_folder(tmp_path, argv, capfd, monkeypatch):
    """A listed folder is a path like any other: a reader of one's own reads its pictures, also for
    kNN; one that is empty is a bad video."""
    for i in range(12):
        (tmp_path / f"video{i}").mkdir()
        for t in range(20):
            np.save(tmp_path / f"video{i}/{t:02d}.npy", np.full((16, 20, 3), 10 * t + i, np.uint8))
    (tmp_path / "empty").mkdir()
    lines = [*[f"video{i}\t{i % 2}" for i in range(12)], "empty\t0"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    paths, labels = common.list_videos(tmp_path / "list.txt")
    assert paths == [str(tmp_path / line.split("\t")[0]) for line in lines]
    assert labels[:4] == ["0", "1", "0", "1"]
    cfg = arguments(byol, size=16, short_side=(16, 16), frames=4, augment="none", batch_size=6)
    dataset = FolderClips(cfg, byol.sample_clips, videos=(paths, labels))
    item = dataset[0, 3]
    pictures = ((item["clips"] * 0.225 + 0.45) * 255).round()  # (2, 3, 4, 16, 16)
    first = (item["starts"] * 30 + 0.03).int()
    times = torch.minimum(first[:, None] + torch.arange(4) * cfg.stride, torch.tensor(19))
    assert (pictures[:, 0, :, 0, 0] - (10 * times + 3)).abs().max() <= 10  # of a neighbour at most
    monkeypatch.setattr(common, "VideoClips", FolderClips)
    flags = ["--data", str(tmp_path / "list.txt"), "--knn-every", "1"]
    byol.main([*argv(byol), *flags])
    line = log_of(tmp_path / "out")[-1]
    assert line["bad_videos"] == 1 and 0 <= line["knn_top1"] <= 100
    out, err = capfd.readouterr()
    assert err.count(f"{tmp_path}/empty: no pictures") == 1
    assert "left out" not in out  # by kNN, each time it is measured


def bad_lines(folder):
    return [str(folder), "missing.mp4", f'"{folder}/even/00.mp4"', "http://a.b/c.mp4"]


def test_lines_that_name_no_video(folder, tmp_path, small, capfd):
    """A directory, a missing file, a quoted path and an address among good lines: each is a bad
    video that is named once."""
    bad = bad_lines(folder)
    good = [str(path) for path in sorted(folder.rglob("*.mp4"))]
    (tmp_path / "list.txt").write_text("".join(f"{line}\tall\n" for line in [*good, *bad]))
    flags = [*small, "--data", str(tmp_path / "list.txt"), "--epochs", "4", "--knn-every", "0"]
    byol.main(flags)
    errors = capfd.readouterr().err
    assert errors.count("WARN bad video") == len(bad) == log_of(tmp_path / "out")[-1]["bad_videos"]
    for line in bad:
        assert f"{os.path.join(tmp_path, line)}: " in errors


@pytest.mark.parametrize("line", bad_lines("somewhere")[:2])
def test_an_evaluation_ends_with_a_line_that_names_no_video(line, folder, tmp_path, capfd):
    """It names the first video that cannot be read."""
    good = [str(path) for path in sorted(folder.rglob("*.mp4"))]
    (tmp_path / "train.txt").write_text("".join(f"{path}\t{path[-5]}\n" for path in good))
    (tmp_path / "val.txt").write_text(f"{good[0]}\t0\n{line}\t1\n")
    flags = ["--weights", "random", "--small", "--workers", "0", "--out", str(tmp_path / "probe")]
    flags += ["--data", str(tmp_path / "train.txt"), "--val", str(tmp_path / "val.txt")]
    assert os.path.join(tmp_path, line) in refused(eval_linear, flags, capfd)


@pytest.mark.parametrize("kind", ["empty", "comments", "binary", "utf-16", "directory", "absent"])
def test_lists_that_are_none(kind, folder, tmp_path, small, capfd):
    """A list of nothing, of bytes, of UTF-16, a folder without videos: one line (with binary data
    perhaps after the names of what was tried), exit code 2."""
    path = tmp_path / "list.txt"
    if kind == "directory":
        path.mkdir()
    elif kind != "absent":
        lines = f"{folder}/even/00.mp4\n" * 13
        whole = {"empty": b"", "binary": np.random.default_rng(0).bytes(9999)}
        whole |= {"utf-16": lines.encode("utf-16"), "comments": b"# nothing\n\n"}
        path.write_bytes(whole[kind])
    with pytest.raises(SystemExit) as stop:
        byol.main([*small, "--data", str(path)])
    errors = capfd.readouterr().err.strip().split("\n")
    assert stop.value.code == 2 and " error: " in errors[-1] and "Traceback" not in str(errors)
    assert len(errors) == 1 or all("WARN bad video" in line for line in errors[:-1])
    assert not (tmp_path / "out/last.pth").exists()


def test_an_unreadable_list(argv, open_place, capfd):
    """A list that this user may not read: one line that names it, exit code 2."""
    path = open_place / "list.txt"
    path.write_text("a.mp4\n")
    path.chmod(0)
    (open_place / "out").chmod(0o777)
    flags = [*argv(byol), "--out", str(open_place / "out"), "--data", str(path)]
    capfd.readouterr()
    assert run_ranks(1, _as_nobody, byol, flags) == [2]
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert " error: " in line and str(path) in line


def test_videos_of_any_name(tmp_path, small, capfd):
    """Names that are no UTF-8, of good videos and of a bad one: they train, and the bad one is
    named; a list of them is read byte for byte."""
    (tmp_path / "data").mkdir()
    names = [os.fsdecode(b"%d-\xe9.mp4" % i) for i in range(6)]
    for name in names:
        make_video(tmp_path / "data" / name, n=10, size=(48, 36))
    (tmp_path / "data/\udcff.mp4").write_text("no video")
    byol.main([*small, "--data", str(tmp_path / "data"), "--knn-every", "0", "--epochs", "3"])
    assert log_of(tmp_path / "out")[-1]["bad_videos"] == 1
    assert capfd.readouterr().err.count("WARN bad video") == 1
    text = b"".join(os.fsencode(f"data/{name}\n") for name in names)
    (tmp_path / "list.txt").write_bytes(text)
    out = ["--out", str(tmp_path / "list")]
    byol.main([*small, "--data", str(tmp_path / "list.txt"), *out, "--max-steps", "1"])
    assert log_of(tmp_path / "list")[-1]["bad_videos"] == 0


# --- checkpoints


@pytest.fixture(scope="module")
def checkpoints(folder, tmp_path_factory):
    """last.pth after two steps of each method."""
    out, found = tmp_path_factory.mktemp("checkpoints"), {}
    for script in METHODS:
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
    changed("optimizer without groups")["optimizer"] = {"state": {}, "param_groups": []}
    changed("no optimizer").pop("optimizer")
    changed("no step").pop("step")
    changed("no log").pop("log_bytes")
    changed("settings that are a list")["cfg"] = [1]
    several |= {"a list": [content], "a tensor": torch.zeros(3), "a text": "last", "empty": {}}
    return several


@pytest.mark.filterwarnings("ignore:Using a non-tuple")
def test_checkpoints_of_another_kind(checkpoints, argv, tmp_path, capfd):
    """Extra, missing and wrongly shaped entries, in the optimizer too, and wrong types: one line,
    exit code 2, and checkpoint and log stay as they are."""
    out = tmp_path / "out"
    shutil.copytree(checkpoints["byol"].parent, out)
    content, log = torch.load(out / "last.pth", weights_only=True), (out / "log.jsonl").read_bytes()
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
    assert f"last.pth was made with --script {other}, not byol" in line
    assert (tmp_path / "out/last.pth").read_bytes() == checkpoints[other].read_bytes()
    changed = "--backbone s3d", "--rho 3"
    shutil.copytree(checkpoints["byol"].parent, tmp_path / "own")
    for change in changed:
        flags = [*argv(byol), "--out", str(tmp_path / "own"), *change.split()]
        assert change.split()[0] in refused(byol, flags, capfd)


# --- what looks right


def test_another_folder_of_the_same_names(checkpoints, argv, tmp_path, folder, capfd):
    """A resume with --data of other videos that are called the same, or by another name of the
    same folder: refused, both are named."""
    shutil.copytree(folder, tmp_path / "copy")
    byol.main([*argv(byol), "--max-steps", "1"])
    line = refused(byol, [*argv(byol), "--data", str(tmp_path / "copy")], capfd)
    assert f"--data {folder}, not {tmp_path / 'copy'}" in line
    assert "--data" in refused(byol, [*argv(byol), "--data", f"{folder}/"], capfd)


def test_a_folder_of_train_and_val(folder, argv, tmp_path, capfd):
    """Pre-training takes the folder train of such a root, as the evaluations do, and leaves val; so
    it does when it is given the folder train."""
    shutil.copytree(folder, tmp_path / "root/train")
    shutil.copytree(folder / "odd", tmp_path / "root/val/odd")
    for i, data in enumerate((tmp_path / "root", tmp_path / "root/train")):
        out = ["--out", str(tmp_path / f"{i}")]
        byol.main([*argv(byol), "--data", str(data), "--max-steps", "1", *out])
        assert "data: 13 videos, 2 classes" in capfd.readouterr().out
        cfg = arguments(eval_linear, data=str(data))
        dataset = common.VideoClips(cfg, None)
        test = eval_linear.test_set(cfg, dataset)
        assert Path(dataset.paths[0]).is_relative_to(tmp_path / "root/train")
        assert Path(test.paths[0]).is_relative_to(tmp_path / "root/val") and len(test) > 0
    assert common.find_data(arguments(byol, data=str(folder))) == folder


@pytest.mark.parametrize("classes", ["odd new", "new", ""])
def test_a_sibling_val_of_other_classes(classes, folder, argv, tmp_path):
    """A folder val beside train, of known classes, of others or empty: it ends no run, and there is
    a kNN curve."""
    shutil.copytree(folder, tmp_path / "train")
    (tmp_path / "val").mkdir()
    for name in classes.split():
        shutil.copytree(folder / "odd", tmp_path / "val" / name)
    flags = [*argv(byol), "--data", str(tmp_path / "train"), "--knn-every", "1"]
    byol.main([*flags, "--epochs", "1", "--warmup", "0"])
    assert 0 <= log_of(tmp_path / "out")[-1]["knn_top1"] <= 100


def test_no_labels_no_knn(folder, argv, tmp_path):
    """Videos without labels train, without kNN accuracy."""
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in folder.rglob("*.mp4")))
    flags = ["--data", str(tmp_path / "list.txt"), "--knn-every", "1"]
    byol.main([*argv(byol), *flags])
    assert "knn_top1" not in log_of(tmp_path / "out")[-1]


# --- videos of a phone


def test_turned_videos(argv, tmp_path, capfd):
    """Files that a player turns by 90, 180 or 270 degrees train, are tested and read by load_clip;
    what is fed is upright."""
    for i, turn in enumerate([0, 90, 180, 270] * 3):
        path = tmp_path / f"turned/{'ab'[i % 2]}/{i}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        make_video(path, n=30, size=(64, 48), rotation=turn)
    flags = ["--data", str(tmp_path / "turned"), "--workers", "0"]
    byol.main([*argv(byol), *flags, "--max-steps", "1"])
    eval_linear.main([*argv(eval_linear), *flags, "--val", flags[1], "--out", str(tmp_path / "e")])
    assert "(12 videos, 2 classes" in capfd.readouterr().out
    _, cfg = common.load_backbone(tmp_path / "out")
    clips = [common.load_clip(tmp_path / f"turned/{'ab'[i % 2]}/{i}.mp4", cfg) for i in range(4)]
    for clip in clips[1:]:
        assert (clip - clips[0]).abs().mean() < 0.1
        assert (clip.flip(-1) - clips[0]).abs().mean() > 0.3
