"""Runs of the scripts: what they write, how they stop and go on, what they refuse."""

import contextlib
import importlib
import io
import json
import math
import multiprocessing
import os
import random
import signal
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import byol
import common
import conftest
from conftest import METHODS, ROOT, run_ranks
from videos import make_video

TIMING = {"videos_per_second", "data_wait"}


def run(method, argv):
    importlib.import_module(method).main(argv)


def refused(argv, capfd, method="byol"):
    return conftest.refused(importlib.import_module(method), argv, capfd)


def log_of(out):
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def assert_same_run(a, b):
    """Weights, optimizer and log of two runs are bit for bit the same, timing aside."""
    one, two = (torch.load(Path(out, "last.pth"), weights_only=True) for out in (a, b))
    assert one["number"] == two["number"] and one["losses"] == two["losses"]
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, two["model"][name]), name
    for key, state in one["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), two["optimizer"]["state"][key][name]), name
    lines = [[{k: v for k, v in x.items() if k not in TIMING} for x in log_of(o)] for o in (a, b)]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("rho", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_at_every_rho(method, rho, small, tmp_path, capfd):
    """Each runs, with --low-memory to the same numbers, and says in order what it does."""
    own = ["--queue", "50"] if method == "moco" else []
    run(method, [*small, *own, "--rho", str(rho), "--max-steps", "2"])
    out, err = capfd.readouterr()
    marks = ["torch", "options: ", "data: 13", "model: tiny", "batch: 6", "lr: ", "chance", "{"]
    places = [out.index(mark) for mark in [*marks, "done, 2 of 4 steps"]]
    assert places == sorted(places) and "\r" not in out + err
    assert Path(tmp_path, "out/backbone.pth").exists()
    (line,) = log_of(tmp_path / "out")
    assert line["step"] == 2 and math.isfinite(line["loss"]) and line["feature_std"] > 0
    small[small.index("--out") + 1] = str(tmp_path / "low")
    run(method, [*small, *own, "--rho", str(rho), "--max-steps", "2", "--low-memory"])
    assert_same_run(tmp_path / "out", tmp_path / "low")


@pytest.mark.parametrize("low_memory", [False, True])
def test_bn_statistics_are_updated_once_a_view(low_memory):
    """Also where activations are computed again; the gradient is that of the plain forward."""
    torch.manual_seed(0)
    network = common.backbone("tiny")
    before = network.state_dict()["stage0.1.running_mean"].clone()
    clips = torch.randn(3, 4, 3, 4, 8, 8)
    common.per_view(network, clips, low_memory).square().sum().backward()
    state = network.state_dict()
    assert state["stage0.1.num_batches_tracked"] == 4
    assert not torch.equal(before, state["stage0.1.running_mean"])
    torch.manual_seed(0)
    twin = common.backbone("tiny")
    torch.stack([twin(clip) for clip in clips.unbind(1)], 1).square().sum().backward()
    for a, b in zip(network.parameters(), twin.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() <= 1e-3 * b.grad.abs().max()
    for name, tensor in twin.state_dict().items():
        torch.testing.assert_close(state[name], tensor)


def saved_bytes(low_memory, views):
    """Bytes that autograd keeps for backward, over one forward pass of `views` views."""
    network, kept = common.backbone("tiny"), {}
    clips = torch.randn(2, views, 3, 8, 32, 32)

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = common.per_view(network, clips, low_memory)
    assert features.requires_grad
    return sum(kept.values()), clips.numel() * 4


def test_low_memory_keeps_inputs_only():
    """--low-memory: what is kept grows with rho by the inputs, not by the activations."""
    full = saved_bytes(False, 8)[0] - saved_bytes(False, 2)[0]
    (two, two_inputs), (eight, eight_inputs) = (saved_bytes(True, views) for views in (2, 8))
    assert full > 4 * (eight - two)
    assert eight - two <= 1.1 * (eight_inputs - two_inputs)


def stop_after(method, argv, steps, number):
    """Run a script that gets a signal in its step number `steps`."""
    update, count = common._Run.update, 0

    def counted(*args, **more):
        nonlocal count
        count += 1
        if count == steps:
            os.kill(os.getpid(), number)
        return update(*args, **more)

    common._Run.update = counted
    run(method, argv)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_stopped_and_resumed_is_bit_equal(method, ranks, small, tmp_path):
    """SIGTERM or SIGINT in mid-epoch and in mid-interval of the log, then the same command."""
    extra = ["--rho", "3", "--epochs", "3", "--log-every", "4"]
    extra += ["--queue", "31"] if method == "moco" else []
    extra += ["--workers", "1"] if method == "byol" else []
    whole = [*small, *extra, "--out", str(tmp_path / "whole")]
    run_ranks(ranks, run, method, whole)
    for number, steps in ((signal.SIGTERM, 1), (signal.SIGINT, 2)):
        run_ranks(ranks, stop_after, method, [*small, *extra], steps, number)
    last = torch.load(tmp_path / "out/last.pth", weights_only=True)
    assert last["number"] == 3
    run_ranks(ranks, run, method, [*small, *extra, "--log-every", "4"])
    assert_same_run(tmp_path / "whole", tmp_path / "out")


def test_max_steps_then_more_is_one_run(small, tmp_path):
    """--max-steps may cut an interval of the log; going on writes the whole one."""
    run("byol", [*small, "--out", str(tmp_path / "whole")])
    run("byol", [*small, "--max-steps", "1"])
    assert [line["step"] for line in log_of(tmp_path / "out")] == [1]
    run("byol", [*small, "--max-steps", "3", "--log-every", "2"])
    run("byol", small)
    assert_same_run(tmp_path / "whole", tmp_path / "out")


def test_finished_run_says_so(small, tmp_path, capfd):
    """The same command on a finished run ends at once, changes nothing and says done."""
    run("byol", small)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    capfd.readouterr()
    run("byol", small)
    assert "done, 4 of 4 steps" in capfd.readouterr().out
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def slow_saves(argv):
    fsync = os.fsync

    def slow(file):
        time.sleep(0.03)
        fsync(file)

    os.fsync = slow
    run("byol", argv)


def test_kill_during_saves_loses_nothing(small, tmp_path):
    """SIGKILL at 12 random moments in or near a save: there is always a good last.pth, and in the
    end the run is that of an undisturbed one."""
    argv = [*small, "--batch-size", "12", "--epochs", "30", "--log-every", "5", "--knn-every", "0"]
    run_ranks(1, run, "byol", [*argv, "--out", str(tmp_path / "whole")])
    chance, numbers = random.Random(0), []
    out = tmp_path / "out"

    def files():
        return {(path.name, path.stat().st_mtime_ns) for path in out.glob("*.pth*")}

    for _ in range(12):
        process = multiprocessing.get_context("fork").Process(target=slow_saves, args=(argv,))
        before = files()
        process.start()
        while process.is_alive():
            with contextlib.suppress(FileNotFoundError):  # a temporary file that was renamed
                if files() != before:
                    break
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.4))
        process.kill()
        process.join()
        if (out / "last.pth").exists():
            numbers.append(torch.load(out / "last.pth", weights_only=True)["number"])
    assert numbers == sorted(numbers) and numbers[0] < numbers[-1] < 30
    run_ranks(1, run, "byol", argv)
    assert_same_run(tmp_path / "whole", out)
    assert not list(out.glob("*.tmp"))


def killed_in_a_worker(argv):
    reader = common.VideoReader

    def fatal(path, *args):
        if path.endswith("07.mp4"):
            os.kill(os.getpid(), signal.SIGKILL)
        return reader(path, *args)

    common.VideoReader = fatal
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.suppress(SystemExit):
        run("byol", argv)
    return err.getvalue()


def test_a_worker_that_dies_is_an_error_that_names_its_file(small):
    """Killed in the middle of a file: the run ends in one line with that path, without a hang."""
    (err,) = run_ranks(1, killed_in_a_worker, [*small, "--workers", "1"], timeout=60)
    (line,) = [line for line in err.splitlines() if "error: " in line]
    assert "07.mp4" in line and "worker" in line


@pytest.fixture
def bad_folder(tmp_path):
    """16 good videos and five that cannot be read."""
    root = tmp_path / "data"
    root.mkdir()
    for i in range(16):
        make_video(root / f"good {i:02d}.mp4", n=20, size=(48, 36))
    whole = (root / "good 00.mp4").read_bytes()
    (root / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (root / "empty.mp4").write_bytes(b"")
    (root / "text.mp4").write_text("this is no video")
    (root / "noise.webm").write_bytes(bytes(range(256)) * 9)
    (root / "gone.mp4").symlink_to(root / "nowhere.mp4")
    return root


BAD = {"cut.mp4", "empty.mp4", "text.mp4", "noise.webm", "gone.mp4"}


def test_bad_videos_are_named_counted_and_replaced(bad_folder, small, tmp_path, capfd):
    """Training goes on, names each bad video once, counts it, and is the same for the same seed."""
    argv = [*small, "--epochs", "4", "--data", str(bad_folder)]
    run("byol", argv)
    err = capfd.readouterr().err
    assert all(err.count(name) == 1 for name in BAD) and err.count("bad video") == len(BAD)
    assert log_of(tmp_path / "out")[-1]["bad_videos"] == len(BAD)
    run("byol", [*argv, "--out", str(tmp_path / "again"), "--workers", "2"])
    assert_same_run(tmp_path / "out", tmp_path / "again")


def test_two_ranks_count_the_bad_videos_of_both(bad_folder, small, tmp_path):
    """At the end of an epoch the log counts what any rank has met."""
    argv = [*small, "--epochs", "4", "--data", str(bad_folder), "--log-every", "100"]
    run_ranks(2, byol.main, argv)
    assert log_of(tmp_path / "out")[-1]["bad_videos"] == len(BAD)


def test_all_bad_is_an_error(bad_folder, small, capfd):
    """Nothing readable: exit code 2 and the first path, in less than 10 s."""
    for path in bad_folder.glob("good*"):
        path.write_text("nor is this")
    begun = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        run("byol", [*small, "--data", str(bad_folder)])
    errors = capfd.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and time.monotonic() - begun < 10
    assert "error: " in errors[-1] and str(bad_folder) in errors[-1]


def test_check_data_lists_the_good_ones(bad_folder, small, tmp_path, capfd):
    """--check-data names the bad, and its list trains."""
    with pytest.raises(SystemExit) as stop:
        run("byol", [*small, "--data", str(bad_folder), "--check-data"])
    out = capfd.readouterr().out
    assert stop.value.code == 0 and all(out.count(f"{name}: ") == 1 for name in BAD)
    clean = tmp_path / "out/clean.txt"
    assert len(clean.read_text().splitlines()) == 16
    run("byol", [*small, "--data", str(clean), "--max-steps", "1"])


def test_list_forms(folder, tmp_path):
    """CRLF, a byte order mark, blanks, comments, spaces, umlauts, labels: paths as they are."""
    odd = tmp_path / "ein Ordner mit Ü"
    odd.mkdir()
    make_video(odd / "clip one.mp4", n=5, size=(48, 36))
    absolute = folder / "even/00.mp4"
    text = f"# comment\r\n\r\nein Ordner mit Ü/clip one.mp4\tjump rope\r\n{absolute}\tsit\r\n"
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    videos = common.Videos(tmp_path / "list.txt")
    assert [videos[i] for i in range(2)] == [str(odd / "clip one.mp4"), str(absolute)]
    assert videos.classes == ["jump rope", "sit"] and videos.labels.tolist() == [0, 1]
    (tmp_path / "plain.txt").write_text("a.mp4\nb c.mp4\n")
    assert common.Videos(tmp_path / "plain.txt").labels.tolist() == [-1, -1]


def test_folder_classes_and_no_file_opened(folder, monkeypatch):
    """The folder that a video lies in is its class; nothing is opened to find that out."""
    monkeypatch.setattr(common.av, "open", None)
    videos = common.Videos(folder)
    assert len(videos) == 13 and videos.classes == ["even", "odd"]
    assert videos[0].endswith("even/00.mp4") and videos.labels.tolist() == [0] * 7 + [1] * 6


@pytest.mark.parametrize(
    "wrong",
    [
        "--data nowhere",
        "--rho 0",
        "--rho two",
        "--batch-size 14",
        "--batch-size 1",
        "--epochs 0",
        "--lr -1",
        "--lr nan",
        "--backbone resnet",
        "--optimizer adam",
        "--augment crop,wobble",
        "--warmup-epochs 3",
        "--projector a",
        "--momentum 2",
        "--unknown 3",
        "--batch-norm both",
        "--crop-area 0.5",
        "--crop-area 0.5 2",
        "--short-side 20 18",
        "--short-side 8 18",
        "--projector 0",
        "--workers -2",
        "--out /dev/null/out",
    ],
)
def test_wrong_values_are_one_line(wrong, small, capfd):
    """Each is one line on stderr that names the flag, and exit code 2."""
    line = refused([*small, *wrong.split()], capfd)
    assert wrong.split()[0].strip("-") in line or "/dev/null" in line


def test_kinetics_annotations_are_recognised(tmp_path, small, capfd):
    """The CSV of Kinetics is no list of paths; the message says what a line must be."""
    (tmp_path / "train.csv").write_text("label,youtube_id,time_start\nabseiling,abc,3\n")
    assert "PATH<TAB>LABEL" in refused([*small, "--data", str(tmp_path / "train.csv")], capfd)


@pytest.mark.parametrize("change", ["--rho 3", "--batch-size 4", "--lr 1", "--seed 1", "--size 24"])
def test_a_changed_recipe_does_not_resume(change, small, capfd):
    """What would make another run is refused, both values named; workers may change."""
    run("byol", [*small, "--max-steps", "1"])
    line = refused([*small, *change.split()], capfd)
    assert change.split()[0] in line and f"not {change.split()[1]}" in line
    run("byol", [*small, "--max-steps", "2", "--workers", "1"])


def test_other_data_does_not_resume(small, folder, tmp_path, capfd):
    """Videos that came or went make another run."""
    run("byol", [*small, "--max-steps", "1"])
    for video in folder.glob("even/*.mp4"):
        (tmp_path / video.name).symlink_to(video)
    assert "--data" in refused([*small, "--data", str(tmp_path)], capfd)


@pytest.mark.parametrize("kind", ["cut", "text", "empty", "pickle"])
def test_damaged_checkpoint_is_left_alone(kind, small, tmp_path, capfd):
    """Exit code 2 and one line; the file stays as it is, and no code in it is run."""
    run("byol", [*small, "--max-steps", "1"])
    path = tmp_path / "out/last.pth"
    whole = path.read_bytes()
    if kind == "pickle":
        torch.save(Hostile(tmp_path / "ran"), path)
    else:
        path.write_bytes({"cut": whole[: len(whole) // 2], "text": b"hello", "empty": b""}[kind])
    damaged = path.read_bytes()
    log = (tmp_path / "out/log.jsonl").read_bytes()
    assert "last.pth" in refused(small, capfd)
    assert path.read_bytes() == damaged and not (tmp_path / "ran").exists()
    assert (tmp_path / "out/log.jsonl").read_bytes() == log


@pytest.mark.parametrize("kind", ["keys", "model", "nan", "shape", "list"])
def test_checkpoint_of_something_else_is_refused(kind, small, tmp_path, capfd):
    """Missing entries, another network, NaN, another shape: one line, nothing overwritten."""
    run("byol", [*small, "--max-steps", "1"])
    path = tmp_path / "out/last.pth"
    content = torch.load(path, weights_only=True)
    name = next(iter(content["model"]))
    if kind == "keys":
        del content["optimizer"]
    elif kind == "model":
        del content["model"][name]
    elif kind == "nan":
        content["model"][name][0] = math.nan
    elif kind == "shape":
        content["model"][name] = content["model"][name][:1].clone()
    torch.save([1, 2] if kind == "list" else content, path)
    damaged, log = path.read_bytes(), (tmp_path / "out/log.jsonl").read_bytes()
    assert "last.pth" in refused(small, capfd)
    assert path.read_bytes() == damaged and (tmp_path / "out/log.jsonl").read_bytes() == log


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_two_runs_on_one_folder(small, tmp_path, capfd):
    """The second is refused while the first runs."""
    import fcntl

    (tmp_path / "out").mkdir()
    with open(tmp_path / "out/log.jsonl", "ab") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        assert "another run" in refused(small, capfd)


def test_show_views(small, tmp_path, capfd):
    """--show-views writes a picture, rows of views and columns of frames, and trains nothing."""
    png = tmp_path / "views.png"
    run("byol", [*small, "--rho", "3", "--show-views", str(png)])
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with common.av.open(str(png)) as container:
        picture = next(container.decode(video=0))
    assert picture.height > 4 * 3 * 96 and picture.width > 4 * 96
    assert not (tmp_path / "out").exists()


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("method", METHODS)
def test_guard_puts_everything_back(method, small, monkeypatch):
    """A step that is not finite leaves weights, BN, target, queue and optimizer as they were."""
    script = importlib.import_module(method)
    loss = {"simclr": "nt_xent", "moco": "info_nce", "byol": "regression_loss"}.get(
        method, "swapped_prediction"
    )
    right, update, seen = getattr(script, loss), common._Run.update, []

    def wrong_in_the_second(*args):
        return right(*args) * (math.nan if len(seen) == 1 else 1)

    def watched(self, *args, **more):
        taken = update(self, *args, **more)
        seen.append((taken, state_of(self.model), str(self.optimizer.state_dict())))
        return taken

    monkeypatch.setattr(script, loss, wrong_in_the_second)
    monkeypatch.setattr(common._Run, "update", watched)
    after_first = []
    begin = common._Run.begin
    monkeypatch.setattr(
        common._Run,
        "begin",
        lambda self, *a: (after_first.append(state_of(self.model)), begin(self, *a))[1],
    )
    run(method, [*small, "--max-steps", "3"])
    assert [taken for taken, _, _ in seen] == [True, False, True]
    for name, tensor in after_first[2].items():  # at the begin of the third, after the second
        assert torch.equal(tensor, after_first[1][name]), name
    assert seen[1][2].replace(" ", "") != "" and all(
        t.isfinite().all() for t in seen[2][1].values()
    )


def test_ten_bad_steps_end_the_run(small, tmp_path, monkeypatch, capfd):
    """Ten in a row: exit code 1, and the last good checkpoint is kept."""
    run("byol", [*small, "--epochs", "20", "--max-steps", "2"])
    monkeypatch.setattr(byol, "regression_loss", lambda q, k: (q * math.inf).sum())
    with pytest.raises(SystemExit) as stop:
        run("byol", [*small, "--epochs", "20"])
    assert stop.value.code == 1 and "10 such steps" in capfd.readouterr().err
    state = torch.load(tmp_path / "out/last.pth", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def diagnosed(features, small, monkeypatch, capfd, loss=None):
    """What a run of 8 steps prints where the network's features are replaced for the log."""
    update = common._Run.update
    monkeypatch.setattr(
        common._Run,
        "update",
        lambda self, value, **more: update(self, value, **{**more, "features": features}),
    )
    run("byol", [*small, "--epochs", "6", "--log-every", "1"])
    return capfd.readouterr().out


def test_constant_features_are_called_collapsed(small, monkeypatch, capfd):
    """All features the same: feature_std 0 and one warning in words."""
    out = diagnosed(torch.ones(6, 2, 64), small, monkeypatch, capfd)
    assert out.count("WARN collapsed") == 1


def test_gaussian_features_are_healthy(small, monkeypatch, tmp_path, capfd):
    """Features that are spread over the sphere: std x sqrt(D) near 1 and no warning of it."""
    features = torch.randn(100, 2, 64, generator=torch.Generator().manual_seed(0))
    out = diagnosed(features, small, monkeypatch, capfd)
    assert "collapsed" not in out
    assert all(0.9 < line["feature_std"] < 1.1 for line in log_of(tmp_path / "out"))


def test_backbone_file_opens_with_torch_alone(small, tmp_path):
    """backbone.pth: plain tensors and settings; the backbone in last.pth, and no prefix."""
    run("byol", [*small, "--max-steps", "1"])
    saved = torch.load(tmp_path / "out/backbone.pth", weights_only=True)
    backbone = common.backbone(saved["config"]["backbone"])
    backbone.load_state_dict(saved["state_dict"])
    last = torch.load(tmp_path / "out/last.pth", weights_only=True)["model"]
    for name, tensor in saved["state_dict"].items():
        assert torch.equal(tensor, last[f"encoder.backbone.{name}"])
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in last)


def test_quiet_ranks(small, capfd):
    """Rank 1 of two prints nothing; every line of the log is JSON."""
    run_ranks(2, run, "byol", [*small, "--max-steps", "2"])
    out = capfd.readouterr().out
    assert out.count("chance level") == 1 and out.count('"step"') == 1


def test_ctrl_c_before_training_is_no_traceback(small, monkeypatch, capfd):
    """Ctrl-C while the data are found: exit code 130 and no traceback."""
    monkeypatch.setattr(common, "Videos", lambda source: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) as stop, contextlib.suppress(AttributeError):
        run("byol", small)
    assert stop.value.code == 130


def test_a_network_without_bn(small, tmp_path, monkeypatch):
    """A backbone of one's own need not have BN: it trains, and a step that is not finite is put
    back."""

    def plain():
        network = common._tiny()
        for stage in network:
            stage[1] = torch.nn.Identity()
        return network

    right = byol.regression_loss
    losses = iter([1, math.nan, 1, 1])
    monkeypatch.setitem(common._BACKBONES, "tiny", plain)
    monkeypatch.setattr(byol, "regression_loss", lambda q, k: right(q, k) * next(losses))
    monkeypatch.setattr(common, "mlp", lambda widths, bn: torch.nn.Linear(widths[0], widths[-1]))
    run("byol", small)
    assert log_of(tmp_path / "out")[-1]["skipped_steps"] == 1


@pytest.mark.parametrize(
    "line, words",
    [
        ((1.0, 0.9, 0.0), "the loss stays at chance"),
        ((0.5, 0.1, 0.0), "collapsed"),
        ((0.5, 0.9, 0.5), "waiting for data"),
        ((0.9, 0.9, 0.1), ""),
    ],
)
def test_warnings(line, words, capsys):
    """Each is said once, after 15 lines of (loss / chance, feature_std, data_wait) like this one;
    but for waiting none in warm-up or in an evaluation."""

    def said(**settings):
        run = object.__new__(common._Run)
        run.args = Namespace(warmup_epochs=1, **settings)
        run.lines, run.warned, run.epoch = [line] * 15, set(), 2
        for _ in range(2):
            run.warn(*zip(*run.lines, strict=True))
        return [text for text in capsys.readouterr().out.splitlines() if "WARN" in text]

    assert len(said(rho=2)) == bool(words) and all(words in text for text in said(rho=2))
    assert bool(said()) == ("waiting" in words)


def test_a_changed_script_is_said(small, tmp_path, monkeypatch, capfd):
    """Of a run that goes on with another text of its script a warning says so."""
    for number in (1, 2):
        (tmp_path / "mine.py").write_text((ROOT / "byol.py").read_text() + "\n" * number)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "mine", raising=False)
        importlib.invalidate_caches()
        importlib.import_module("mine").main([*small, "--max-steps", str(number)])
        assert ("mine.py is not what it was" in capfd.readouterr().out) == (number == 2)


def test_a_loss_that_is_no_number_is_null(small, tmp_path, monkeypatch):
    """A line whose steps were all put back is JSON that anything can read, and no loss of 0."""
    right, calls = byol.regression_loss, []

    def wrong_at_first(q, k):
        calls.append(1)
        return right(q, k) * (math.nan if len(calls) <= 2 else 1)

    monkeypatch.setattr(byol, "regression_loss", wrong_at_first)
    run("byol", small)
    assert "NaN" not in (tmp_path / "out" / "log.jsonl").read_text()
    first, second = log_of(tmp_path / "out")
    assert first["loss"] is None and first["skipped_steps"] == 2 and second["loss"] > 0


@pytest.mark.parametrize(
    "script, flags, expected",
    [
        ("byol", "--data x", 35),
        ("byol", "--data x --epochs 100", 17.5),
        ("byol", "--epochs 80", 6),
        ("byol", "--epochs 80 --warmup-epochs 1", 1),
        ("eval_linear", "--weights x --epochs 30", 4),
        ("finetune", "--epochs 20", 1.5),
    ],
)
def test_warm_up_in_proportion(script, flags, expected):
    """Warm-up that is not given is the same share of any number of epochs."""
    args = common._parse(importlib.import_module(script).Recipe, flags.split())
    assert args.warmup_epochs == pytest.approx(expected)


def test_the_last_line_evaluates_the_same_data(small, folder, tmp_path, capfd):
    """Of one's own data the command that is printed says so."""
    run("byol", small)
    last = capfd.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("evaluate: python eval_linear.py") and f"--data {folder}" in last
    config = torch.load(tmp_path / "out/backbone.pth", weights_only=True)["config"]
    assert config["finished"] is True


@pytest.mark.parametrize("flags", ["", "--low-memory"])
@pytest.mark.parametrize("method", METHODS)
def test_compile(method, flags, small, tmp_path, monkeypatch):
    """--compile, with --low-memory too, gives the run without it but for rounding, and goes on from
    it. (With the compiler that generates no code: what is traced and cut is what is tested.)"""
    plain = torch.nn.Module.compile
    compiled = []

    def traced(self):
        compiled.append(self)
        plain(self, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    run(method, [*small, *flags.split(), "--max-steps", "2"])
    run(method, [*small, *flags.split(), "--compile"])
    run(method, [*small, "--out", str(tmp_path / "whole")])
    assert len(compiled) == 1 + (method in ("moco", "byol"))
    one, two = (torch.load(tmp_path / f"{n}/last.pth", weights_only=True) for n in ("out", "whole"))
    assert one["model"].keys() == two["model"].keys()
    for name, tensor in one["model"].items():
        torch.testing.assert_close(tensor, two["model"][name], atol=1e-3, rtol=1e-2)


def _compiled_on_ranks(argv):
    plain = torch.nn.Module.compile
    torch.nn.Module.compile = lambda self: plain(self, backend="aot_eager")
    byol.main(argv)


@pytest.mark.slow
def test_compile_with_low_memory_on_two_ranks(small, tmp_path):
    """A network of many of DDP's buckets: what is traced in forward is what is computed again in
    backward."""
    words = """--backbone slow_r50 --frames 1 --size 32 --short-side 32 36 --batch-size 4
        --max-steps 1 --low-memory --knn-every 0"""
    flags = [*small, *words.split()]
    run_ranks(2, _compiled_on_ranks, [*flags, "--compile"], timeout=300)
    run_ranks(2, byol.main, [*flags, "--out", str(tmp_path / "plain")], timeout=300)
    one, two = (torch.load(tmp_path / f"{n}/last.pth", weights_only=True) for n in ("out", "plain"))
    assert one["number"] == two["number"] == 1
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-3)
