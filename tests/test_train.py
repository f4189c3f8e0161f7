"""Runs of the scripts: what they write, how they stop and go on, what they refuse."""

import contextlib
import importlib
import json
import math
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

import byol
import common
import conftest
from conftest import METHODS, run_ranks
from videos import make_video

TIMING = {"videos_per_second", "data_wait"}
LOSSES = dict(simclr="nt_xent", moco="info_nce", byol="regression_loss", swav="swapped_prediction")


def run(method, argv):
    importlib.import_module(method).main(argv)


def refused(argv, capfd, method="byol"):
    return conftest.refused(importlib.import_module(method), argv, capfd)


def log_of(out):
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def last_of(out):
    return torch.load(Path(out, "last.pth"), weights_only=True)


def assert_same_run(a, b):
    """Weights, optimizer and log of two runs are bit for bit the same, timing aside."""
    one, two = last_of(a), last_of(b)
    assert one["step"] == two["step"]
    assert one["model"].keys() == two["model"].keys()
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
    marks = ["torch", "not the defaults", "backbone tiny", "data: 13", "chance", "feature std"]
    places = [out.index(mark) for mark in [*marks, "2 of 4 steps"]]
    assert places == sorted(places)
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
    common.encode_views(network, clips, low_memory).square().sum().backward()
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
        features = common.encode_views(network, clips, low_memory)
    assert features.requires_grad
    return sum(kept.values()), clips.numel() * 4


def test_low_memory_keeps_inputs_only():
    """--low-memory: what is kept grows with rho by the inputs, not by the activations."""
    full = saved_bytes(False, 8)[0] - saved_bytes(False, 2)[0]
    (two, two_inputs), (eight, eight_inputs) = (saved_bytes(True, views) for views in (2, 8))
    assert full > 4 * (eight - two)
    assert eight - two <= 1.1 * (eight_inputs - two_inputs)


def stop_after(method, argv, steps, number):
    """Run a script that gets a signal in its step number `steps`, on the last rank only."""
    record, count = common.Run.record, 0

    def counted(*args, **numbers):
        nonlocal count
        count += 1
        if count == steps and common.rank() == common.world_size() - 1:
            os.kill(os.getpid(), number)
        record(*args, **numbers)

    common.Run.record = counted
    run(method, argv)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_stopped_and_resumed_is_bit_equal(method, ranks, small, tmp_path, capfd):
    """SIGTERM or SIGINT in mid-epoch, then the same command, with another number of workers: the
    run without a stop."""
    extra = ["--rho", "3", "--epochs", "3", "--log-every", "1"]
    extra += ["--queue", "31"] if method == "moco" else []
    extra += ["--feature-queue", "7", "--queue-from", "1"] if method == "swav" else []
    extra += ["--workers", "1"] if method == "byol" else []
    whole = [*small, *extra, "--out", str(tmp_path / "whole")]
    run_ranks(ranks, run, method, whole)
    for number, steps in ((signal.SIGTERM, 1), (signal.SIGINT, 2)):
        capfd.readouterr()
        assert run_ranks(ranks, stop_after, method, [*small, *extra], steps, number) == (
            [None] * ranks
        )
        assert "the same command goes on from there" in capfd.readouterr().out
    assert last_of(tmp_path / "out")["step"] == 3
    workers = {"byol": "2", "moco": "1"}.get(method, "0")
    run_ranks(ranks, run, method, [*small, *extra, "--workers", workers])
    assert_same_run(tmp_path / "whole", tmp_path / "out")


def test_max_steps_then_more_is_one_run(small, tmp_path):
    """A run that is cut by --max-steps writes a line of the log there, of the steps since the line
    before; the next line has the others, and the weights are those of an undisturbed run."""
    run("byol", [*small, "--out", str(tmp_path / "whole"), "--log-every", "1"])
    run("byol", [*small, "--max-steps", "1"])
    assert [line["step"] for line in log_of(tmp_path / "out")] == [1]
    run("byol", [*small, "--max-steps", "3", "--log-every", "2"])
    run("byol", small)
    assert [line["step"] for line in log_of(tmp_path / "out")] == [1, 2, 3, 4]
    assert_same_run(tmp_path / "whole", tmp_path / "out")


def slow_saves(argv):
    replace = os.replace

    def slow(*paths):
        time.sleep(0.03)
        replace(*paths)

    os.replace = slow
    run("byol", argv)


def test_signals_after_training(small):
    """A stop signal that is only noted, as in training, while an evaluation is at its testing."""
    before = signal.getsignal(signal.SIGTERM)
    byol.main([*small, "--max-steps", "1"])
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(SystemExit) as stop:
        signal.raise_signal(signal.SIGINT)
    assert stop.value.code == 130


def test_long_epochs_are_saved_on_the_way(small, monkeypatch):
    """Checkpoints at the ends of epochs alone, which of large data are hours apart."""
    steps, save = [], common.Run.save
    monkeypatch.setattr(common.Run, "save", lambda run: steps.append(run.step) or save(run))
    monkeypatch.setattr(common, "SAVE_EVERY", 4)
    byol.main([*small, "--batch-size", "2"])
    assert steps == [4, 6, 8, 12]


def test_kill_during_saves_loses_nothing(small, tmp_path):
    """SIGKILL at 12 random moments in or near a save: there is always a good last.pth, and in the
    end the run is that of an undisturbed one."""
    argv = [*small, "--batch-size", "12", "--epochs", "30", "--log-every", "1", "--knn-every", "0"]
    run_ranks(1, run, "byol", [*argv, "--out", str(tmp_path / "whole")])
    chance, steps = random.Random(0), []
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
            steps.append(last_of(out)["step"])
    assert steps == sorted(steps) and steps[0] < steps[-1] < 30
    run_ranks(1, run, "byol", argv)
    assert_same_run(tmp_path / "whole", out)
    assert not list(out.glob("*.tmp"))


# --- bad videos


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


def test_bad_videos_are_named_once_in_a_run_that_goes_on(bad_folder, small, tmp_path, capfd):
    """Stopped and resumed: each is named and counted as without a stop."""
    argv = [*small, "--epochs", "4", "--data", str(bad_folder), "--log-every", "1"]
    run("byol", [*argv, "--out", str(tmp_path / "whole")])
    capfd.readouterr()
    for steps in ("2", "5", "12"):
        run("byol", [*argv, "--max-steps", steps])
    err = capfd.readouterr().err
    assert all(err.count(name) == 1 for name in BAD)
    assert_same_run(tmp_path / "whole", tmp_path / "out")


def test_two_ranks_count_the_bad_videos_of_both(bad_folder, small, tmp_path):
    """The log counts what any rank has met, also after a resume."""
    argv = [*small, "--epochs", "4", "--data", str(bad_folder), "--log-every", "1"]
    run_ranks(2, byol.main, [*argv, "--out", str(tmp_path / "whole")])
    assert log_of(tmp_path / "whole")[-1]["bad_videos"] == len(BAD)
    run_ranks(2, byol.main, [*argv, "--max-steps", "4"])
    run_ranks(2, byol.main, argv)
    assert_same_run(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize("workers", ["0", "1"])
def test_all_bad_is_an_error(workers, bad_folder, small, capfd):
    """Nothing readable: one line that names a path, exit code 2, within seconds."""
    for path in bad_folder.glob("good*"):
        path.write_text("nor is this")
    begun = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        run("byol", [*small, "--data", str(bad_folder), "--workers", workers])
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and time.monotonic() - begun < 30
    assert "error: ten videos in a row cannot be read" in line and str(bad_folder) in line


# --- what is refused


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
        "--warmup 3",
        "--projector a",
        "--unknown 3",
        "--bat 4",
        "--short-side 20 18",
        "--short-side 8 18",
        "--out /dev/null/out",
    ],
)
def test_wrong_values_are_one_line(wrong, small, capfd):
    """Each is one line on stderr that names the flag, and exit code 2."""
    line = refused([*small, *wrong.split()], capfd)
    assert wrong.split()[0].strip("-") in line or "/dev/null" in line or "nowhere" in line


@pytest.mark.parametrize("ranks, batch", [(1, 1), (2, 2), (4, 4), (4, 7)])
def test_a_batch_that_ranks_cannot_share(ranks, batch, small, monkeypatch, capfd):
    """One video a rank gives BN nothing to normalise with, and all slices have the same size:
    refused with what it must be."""
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    cfg = common.parse_args(byol.Config, byol.DEMO, [*small, "--batch-size", str(batch)])
    with pytest.raises(SystemExit) as stop:
        common.fit_to_videos(cfg, 13)
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert f"--batch-size {batch}" in line and "multiple of" in line and str(ranks) in line


def test_kinetics_annotations_are_recognised(tmp_path, small, capfd):
    """The CSV of Kinetics is no list of paths; the message says what the columns must be."""
    (tmp_path / "train.csv").write_text("label,youtube_id,time_start\nabseiling,abc,3\n")
    line = refused([*small, "--data", str(tmp_path / "train.csv")], capfd)
    assert "train.csv" in line and "path" in line


@pytest.mark.parametrize("change", ["--rho 3", "--batch-size 4", "--lr 1", "--seed 1", "--size 24"])
def test_a_changed_recipe_does_not_resume(change, small, tmp_path, capfd):
    """What would make another run is refused, both values named; workers may change."""
    run("byol", [*small, "--max-steps", "1"])
    before = (tmp_path / "out/last.pth").read_bytes()
    line = refused([*small, *change.split()], capfd)
    flag, value = change.split()
    was = torch.load(tmp_path / "out/last.pth", weights_only=True)["cfg"]
    assert f"{flag} {was[flag[2:].replace('-', '_')]}, not {value}" in line
    assert before == (tmp_path / "out/last.pth").read_bytes()
    run("byol", [*small, "--max-steps", "2", "--workers", "1"])


def test_other_data_does_not_resume(small, folder, tmp_path, capfd):
    """Another folder, or videos that came or went, make another run."""
    data = tmp_path / "data"
    data.mkdir()
    for video in sorted(folder.rglob("*.mp4")):
        (data / video.name).symlink_to(video)
    run("byol", [*small, "--data", str(data), "--max-steps", "1"])
    assert "--data" in refused(small, capfd)
    (data / "00.mp4").unlink()
    line = refused([*small, "--data", str(data)], capfd)
    assert "videos 13, not 12" in line


def test_another_script_does_not_resume(small, capfd):
    """A folder of BYOL is no folder of MoCo."""
    run("byol", [*small, "--max-steps", "1"])
    line = refused(small, capfd, method="simclr")
    assert "byol" in line and "simclr" in line


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


@pytest.mark.parametrize("kind", ["keys", "model", "shape", "list"])
def test_checkpoint_of_something_else_is_refused(kind, small, tmp_path, capfd):
    """Missing entries, another network, another shape: one line, nothing overwritten."""
    run("byol", [*small, "--max-steps", "1"])
    path = tmp_path / "out/last.pth"
    content = last_of(tmp_path / "out")
    name = next(iter(content["model"]))
    if kind == "keys":
        del content["optimizer"]
    elif kind == "model":
        del content["model"][name]
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


def test_ctrl_c_before_training_is_no_traceback(small, monkeypatch, capfd):
    """Ctrl-C while the data are found: exit code 130 and no traceback."""
    monkeypatch.setattr(common, "list_videos", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) as stop, contextlib.suppress(TypeError):
        run("byol", small)
    assert stop.value.code == 130


# --- numbers that are not finite


def spoil(method, monkeypatch, step):
    """Make the loss of one step NaN."""
    script, calls = importlib.import_module(method), []
    right = getattr(script, LOSSES[method])

    def spoiled(*args):
        calls.append(1)
        return right(*args) * (math.nan if len(calls) == step else 1)

    monkeypatch.setattr(script, LOSSES[method], spoiled)


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_not_finite_ends_the_run(method, small, tmp_path, monkeypatch, capfd):
    """One line with the step, exit code 1; the checkpoint is that of before, and good. The same
    command with a lower --lr goes on from there to the end; nothing else that is changed does."""
    argv = [*small, "--log-every", "1"]
    out = tmp_path / "out"
    run(method, [*argv, "--max-steps", "2"])
    files = {path: path.read_bytes() for path in out.glob("*.pth")}
    lr = last_of(out)["cfg"]["lr"]
    assert "--lr" in refused([*argv, "--lr", str(lr / 2)], capfd, method)  # not yet
    spoil(method, monkeypatch, 2)
    with pytest.raises(SystemExit) as stop:
        run(method, argv)
    monkeypatch.undo()
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert stop.value.code == 1 and "step 4" in line and "--lr" in line
    assert len(files) == 2 and all(path.read_bytes() == was for path, was in files.items())
    assert "NaN" not in (out / "log.jsonl").read_text()
    assert "--lr" in refused([*argv, "--lr", str(lr * 2)], capfd, method)
    assert "--size" in refused([*argv, "--lr", str(lr / 2), "--size", "12"], capfd, method)
    run(method, [*argv, "--lr", str(lr / 2)])
    assert "going on after step 2" in capfd.readouterr().out
    assert [line["step"] for line in log_of(out)] == [1, 2, 3, 4]
    assert last_of(out)["cfg"]["lr"] == lr / 2
    refused([*argv, "--lr", str(lr / 4)], capfd, method)  # that was for once


def _spoiled_on_one_rank(argv):
    right, calls = byol.regression_loss, []

    def spoiled(q, k):
        calls.append(1)
        return right(q, k) * (math.nan if len(calls) == 3 and common.rank() == 1 else 1)

    byol.regression_loss = spoiled
    byol.main(argv)


def test_a_loss_that_is_not_finite_on_one_rank_ends_both(small, tmp_path, capfd):
    """The step is named, exit code 1 on both, and the checkpoint is that of before."""
    argv = [*small, "--log-every", "1"]
    assert run_ranks(2, _spoiled_on_one_rank, argv) == [1, 1]
    errors = capfd.readouterr().err.strip().splitlines()
    assert len(set(errors)) == 1 and "step 3" in errors[0]
    saved = last_of(tmp_path / "out")
    assert saved["step"] == 2
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


def test_a_loss_that_is_not_finite_between_two_log_lines(small, tmp_path, monkeypatch, capfd):
    """It is found at the next log line or save, and its own step is named."""
    spoil("byol", monkeypatch, 3)
    with pytest.raises(SystemExit) as stop:
        run("byol", [*small, "--batch-size", "2", "--log-every", "5"])
    assert stop.value.code == 1 and "step 3" in capfd.readouterr().err
    assert not (tmp_path / "out/last.pth").exists()


@pytest.mark.parametrize("what", ["weights", "moments"])
def test_weights_that_overflow_are_not_saved(what, small, tmp_path, monkeypatch, capfd):
    """A finite loss whose step leaves weights, or only the optimizer's moments, that are not: exit
    code 1 in words, and the files are those of before."""
    byol.main([*small, "--max-steps", "2"])
    files = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.pth")}
    step, taken = torch.optim.AdamW.step, []

    def overflow(self, *args, **more):
        step(self, *args, **more)
        taken.append(1)
        if len(taken) == 2:  # the last step before the save
            weight = self.param_groups[0]["params"][0]
            wrong = weight.data if what == "weights" else self.state[weight]["exp_avg_sq"]
            wrong.fill_(math.inf)

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    with pytest.raises(SystemExit) as stop:
        byol.main(small)
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert stop.value.code == 1 and "weights are not finite" in line
    assert len(files) == 2 and all(path.read_bytes() == was for path, was in files.items())


# --- what is said and written


def test_backbone_file_opens_with_torch_alone(small, tmp_path):
    """backbone.pth: plain tensors and settings; the backbone in last.pth, and no prefix."""
    run("byol", [*small, "--max-steps", "1"])
    saved = torch.load(tmp_path / "out/backbone.pth", weights_only=True)
    backbone = common.backbone(saved["config"]["backbone"])
    backbone.load_state_dict(saved["state_dict"])
    last = last_of(tmp_path / "out")["model"]
    for name, tensor in saved["state_dict"].items():
        assert torch.equal(tensor, last[f"encoder.backbone.{name}"])
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in last)


def test_quiet_ranks(small, capfd):
    """Rank 1 of two prints nothing, and nobody a warning of torch's."""
    run_ranks(2, run, "byol", [*small, "--max-steps", "2"])
    out, err = capfd.readouterr()
    assert out.count("chance level") == 1 and out.count("feature std") == 1
    assert "FutureWarning" not in out + err


def diagnosed(small, monkeypatch, capfd, features, loss=0.5, warmup=0.0, steps=17, seconds=0.0):
    """Warnings of a run with these features (B, V, D) and this loss in the log.

    warmup: as a share of 18 steps. seconds: more for each step."""
    record = common.Run.record

    def recorded(run, _, **numbers):
        time.sleep(seconds)
        record(run, torch.tensor(loss), **{**numbers, "features": features})

    monkeypatch.setattr(common.Run, "record", recorded)
    settings = f"--epochs 9 --max-steps {steps} --log-every 1 --knn-every 0 --warmup {warmup}"
    run("byol", [*small, *settings.split()])
    return [line for line in capfd.readouterr().out.splitlines() if line.startswith("WARN")]


SPREAD = torch.randn(100, 2, 64, generator=torch.Generator().manual_seed(0))
SAME = torch.ones(6, 2, 64)


@pytest.mark.parametrize(
    "features, loss, warmup, said",
    [
        (SAME, 0.5, 0.0, ["collapsed"]),
        (SAME, 0.5, 0.95, []),
        (SPREAD, 2.0, 0.0, ["the loss stays at chance"]),
        (SPREAD, 1.9, 0.0, []),
        (SAME, 2.0, 0.0, ["collapsed", "the loss stays at chance"]),
    ],
)
def test_warnings(features, loss, warmup, said, small, tmp_path, monkeypatch, capfd):
    """Features that are all the same, and a loss that stays at chance: each is said once in words;
    of neither in the warm-up."""
    found = diagnosed(small, monkeypatch, capfd, features, loss, warmup)
    for words in ("collapsed", "the loss stays at chance"):
        assert sum(words in line for line in found) == (words in said), found
    stds = [line["feature_std"] for line in log_of(tmp_path / "out")]
    if features is SPREAD:
        assert all(0.9 < std < 1.1 for std in stds)
    else:
        assert max(stds) < 1e-3


@pytest.mark.parametrize("read_seconds, step_seconds, said", [(0.02, 0.0, 1), (0.0, 0.6, 0)])
def test_waiting_for_data(read_seconds, step_seconds, said, small, monkeypatch, capfd):
    """Slow reading is said once; slow steps are not."""
    opens = common.VideoClips.open

    def slow(*args):
        time.sleep(read_seconds)
        return opens(*args)

    monkeypatch.setattr(common.VideoClips, "open", slow)
    found = diagnosed(small, monkeypatch, capfd, SPREAD, steps=4, seconds=step_seconds)
    assert sum("waiting for data" in line for line in found) == said, found


def test_the_speed_of_a_resumed_run(small, tmp_path, monkeypatch):
    """Videos per second are those since the last line, or since the run went on."""
    argv = [*small, "--epochs", "6", "--log-every", "10"]
    run("byol", [*argv, "--max-steps", "9"])
    record = common.Run.record

    def slow(run, *args, **numbers):
        time.sleep(0.2)
        record(run, *args, **numbers)

    monkeypatch.setattr(common.Run, "record", slow)
    run("byol", argv)
    speeds = [line["videos_per_second"] for line in log_of(tmp_path / "out")]
    assert len(speeds) == 3 and max(speeds[1:]) < 6 / 0.2, speeds


def test_a_network_without_bn(small, tmp_path, monkeypatch):
    """A backbone of one's own need not have BN: it trains."""

    def plain():
        network = common.tiny()
        for stage in network:
            stage[1] = torch.nn.Identity()
        return network

    monkeypatch.setitem(common.BACKBONES, "tiny", plain)
    monkeypatch.setattr(common, "mlp", lambda widths, bn: torch.nn.Linear(widths[0], widths[-1]))
    run("byol", [*small, "--low-memory"])
    assert log_of(tmp_path / "out")[-1]["step"] == 4


def test_a_warning_needs_lines_in_a_row(small, monkeypatch, capfd):
    """Two lines that look collapsed and one that does not, again and again: nothing is said."""
    record, calls = common.Run.record, []

    def recorded(run, loss, features, **numbers):
        calls.append(1)
        record(run, loss, SAME if len(calls) % 3 else SPREAD, **numbers)

    monkeypatch.setattr(common.Run, "record", recorded)
    flags = "--epochs 9 --max-steps 12 --log-every 1 --knn-every 0 --warmup 0"
    run("byol", [*small, *flags.split()])
    assert len(calls) == 12 and "collapsed" not in capfd.readouterr().out


@pytest.mark.parametrize("spread, said", [(0.1, True), (0.3, False)])
def test_collapsed_is_below_a_fifth(spread, said, small, tmp_path, monkeypatch, capfd):
    """Features that are nearly the same are collapsed, too."""
    found = diagnosed(small, monkeypatch, capfd, 1 + spread * SPREAD, steps=4)
    assert log_of(tmp_path / "out")[-1]["feature_std"] == pytest.approx(spread, rel=0.1)
    assert any("collapsed" in line for line in found) == said


@pytest.mark.parametrize("change", ["--epochs 3", "--weight-decay 0.5", "--warmup 0.5"])
def test_a_changed_schedule_does_not_resume(change, small, capfd):
    """Another length or decay continued as if it were the same run."""
    run("byol", [*small, "--max-steps", "1"])
    assert change.split()[0] in refused([*small, *change.split()], capfd)


def test_what_may_change_in_a_resume(small, tmp_path):
    """What is no part of the recipe refused."""
    run("byol", [*small, "--max-steps", "1"])
    free = "--low-memory --knn-every 7 --log-every 3 --workers 1 --max-steps 2"
    run("byol", [*small, *free.split()])
    assert last_of(tmp_path / "out")["step"] == 2


def test_bad_videos_and_knn(folder, small, tmp_path):
    """A labelled video that cannot be read ends the run at its kNN, or shifts the labels."""
    root = tmp_path / "data"
    for path in folder.rglob("*.mp4"):
        place = root / path.parent.name
        place.mkdir(parents=True, exist_ok=True)
        (place / path.name).symlink_to(path)
    (root / "even/00a.mp4").write_text("no video")
    run("byol", [*small, "--data", str(root), "--knn-every", "1"])
    assert 0 <= log_of(tmp_path / "out")[-1]["knn_top1"] <= 100


def test_the_seed_of_the_weights(small):
    """Another --seed begins with the same weights."""
    starts = []
    for seed in ("0", "1", "1"):
        common.init_distributed(common.parse_args(byol.Config, byol.DEMO, [*small, "--seed", seed]))
        starts.append(common.backbone("tiny")[0][0].weight)
    assert torch.equal(*starts[1:]) and not torch.equal(*starts[:2])


def test_a_kill_between_the_two_files(small, tmp_path, monkeypatch):
    """A backbone.pth of an earlier step beside a finished last.pth: nothing would renew it."""
    write, paths = common.write_file, []

    def killed(path, save):
        paths.append(path)
        if len(paths) == 4:
            raise InterruptedError
        write(path, save)

    monkeypatch.setattr(common, "write_file", killed)
    with pytest.raises(InterruptedError):
        run("byol", small)
    monkeypatch.undo()
    run("byol", small)
    saved = torch.load(tmp_path / "out/backbone.pth", weights_only=True)
    assert (saved["config"]["step"], saved["config"]["finished"]) == (4, True)


def test_knn_of_the_labelled_videos(folder, small, tmp_path):
    """Videos without a label among those of the kNN."""
    rows = [f"{path}\t{path.parent.name}" for path in sorted(folder.rglob("*.mp4"))]
    rows[2] = rows[2].split("\t")[0]
    (tmp_path / "list.txt").write_text("\n".join(rows))
    run("byol", [*small, "--data", str(tmp_path / "list.txt"), "--knn-every", "1"])
    assert 0 <= log_of(tmp_path / "out")[-1]["knn_top1"] <= 100


def test_epochs_are_counted_in_parts(small, tmp_path):
    """Whole epochs in the log, and for --freeze-prototypes 0.5."""
    run("byol", [*small, "--log-every", "1"])
    assert [line["epoch"] for line in log_of(tmp_path / "out")] == [0.5, 1, 1.5, 2]


def test_random_numbers_of_a_step_are_the_seeds(small, monkeypatch):
    """Dropout that is the same whatever --seed says."""
    record, drawn = common.Run.record, []

    def recorded(*args, **numbers):
        drawn.append(torch.rand(1).item())
        record(*args, **numbers)

    monkeypatch.setattr(common.Run, "record", recorded)
    for seed in ("0", "1"):
        run("byol", [*small, "--max-steps", "2", "--seed", seed, "--out", f"{small[3]}{seed}"])
    assert len(set(drawn)) == 4
