"""Faults from outside: kills at any moment, a full disk, a rank that dies. Nothing is lost."""

import copy
import hashlib
import importlib
import io
import json
import math
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import byol
import common
import eval_linear
from conftest import METHODS, ROOT, run_ranks
from test_train import assert_same_run, log_of
from videos import make_video


def train(argv):
    byol.main(argv)


def probe(argv):
    eval_linear.main(argv)


def killed(function, argv, seconds):
    """Run a script in a process of its own, and kill it with its workers after a while."""

    def own_group():
        os.setpgrp()
        function(argv)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=own_group)
    process.start()
    process.join(seconds)
    alive = process.is_alive()
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return alive


def test_sigkill_at_random_moments(small, tmp_path):
    """Ten kills anywhere in training with workers; each time the same command; the end is that of
    an undisturbed run, bit for bit."""
    argv = [*small, "--epochs", "150", "--log-every", "3", "--workers", "2", "--knn-every", "40"]
    run_ranks(1, train, [*argv, "--out", str(tmp_path / "whole")])
    chance, alive = random.Random(1), 0
    for _ in range(10):
        alive += killed(train, argv, chance.uniform(0.2, 1.5))
    run_ranks(1, train, argv)
    assert alive >= 3
    assert_same_run(tmp_path / "whole", tmp_path / "out")


def test_sigkill_of_an_evaluation(folder, small, tmp_path):
    """Killed while features are extracted or the classifier trains: the same result in the end."""
    run_ranks(1, train, [*small, "--max-steps", "2"])
    flags = [
        "--weights",
        str(tmp_path / "out/backbone.pth"),
        "--data",
        str(folder),
        "--val",
        str(folder),
    ]
    flags += "--no-cached --epochs 8 --batch-size 4 --test-clips 1 --workers 1 --out".split()
    run_ranks(1, probe, [*flags, str(tmp_path / "whole")])
    chance = random.Random(2)
    for _ in range(5):
        killed(probe, [*flags, str(tmp_path / "probe")], chance.uniform(0.3, 2.0))
    run_ranks(1, probe, [*flags, str(tmp_path / "probe")])
    one, two = (json.loads((tmp_path / f"{n}/result.json").read_text()) for n in ("whole", "probe"))
    assert {**one, "command": ""} == {**two, "command": ""}


def with_little_disk(argv):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    byol.main(argv)


def test_full_disk(small, tmp_path, capfd):
    """A save that does not fit: exit code 1, one line; the last good checkpoint continues."""
    run_ranks(1, train, [*small, "--max-steps", "2"])
    before = (tmp_path / "out/last.pth").read_bytes()
    capfd.readouterr()
    assert run_ranks(1, with_little_disk, small) == [1]
    errors = [line for line in capfd.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1 and "cannot write" in errors[0]
    assert (tmp_path / "out/last.pth").read_bytes() == before
    assert not list((tmp_path / "out").glob("*.tmp"))
    run_ranks(1, train, small)
    run_ranks(1, train, [*small, "--out", str(tmp_path / "whole")])
    assert_same_run(tmp_path / "whole", tmp_path / "out")


DYING = """
    import os, signal, sys
    sys.path.insert(0, {root!r})
    import byol, common
    update, steps = common._Run.update, 0

    def dying(*args, **more):
        global steps
        steps += 1
        if steps == 3 and common.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(*args, **more)

    common._Run.update = dying
    byol.main(sys.argv[1:])
"""


def test_a_rank_that_dies(small, tmp_path):
    """Under torchrun the whole job ends within a minute or so and says which signal; the same
    command then ends like an undisturbed run."""
    script = tmp_path / "dying.py"
    script.write_text(textwrap.dedent(DYING.format(root=str(ROOT))))
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    begun = time.monotonic()
    done = subprocess.run([*run, script, *small], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "Signal 9" in done.stderr and time.monotonic() - begun < 100
    assert torch.load(tmp_path / "out/last.pth", weights_only=True)["number"] == 2
    run_ranks(2, train, small)
    run_ranks(2, train, [*small, "--out", str(tmp_path / "whole")])
    assert_same_run(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize(
    "command", ["byol.py --rho 0", "eval_linear.py", "finetune.py --dataset ucf101"]
)
def test_a_mistake_is_one_line_in_a_real_process(command, tmp_path):
    """No traceback, no demo made first: one line on stderr, exit code 2."""
    done = subprocess.run(
        [sys.executable, str(ROOT / command.split()[0]), *command.split()[1:]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not Path(tmp_path, "data").exists()


# --- numbers


@pytest.mark.parametrize("method", METHODS)
def test_black_and_constant_videos_train(method, small, tmp_path):
    """Videos of nothing but black or one tone are videos: finite weights, no step skipped."""
    (tmp_path / "data").mkdir()
    for i in range(6):
        tone = 40 * (i % 3)
        flat = lambda counter, w, h, tone=tone: np.full((h, w, 3), tone, np.uint8)  # noqa: E731
        make_video(tmp_path / f"data/{i}.mp4", n=20, size=(48, 36), draw=flat)
    main = importlib.import_module(method).main
    main([*small, "--data", str(tmp_path / "data"), "--epochs", "3"])
    assert_healthy(tmp_path / "out", steps=3)


def assert_healthy(out, steps):
    line = log_of(out)[-1]
    assert line["skipped_steps"] == 0 and line["step"] == steps and math.isfinite(line["loss"])
    state = torch.load(out / "last.pth", weights_only=True)["model"]
    assert all(tensor.isfinite().all() for tensor in state.values())


@pytest.mark.parametrize("method", METHODS)
def test_a_collapsed_network_trains(method, small, tmp_path, monkeypatch):
    """All features exactly 0, which have no direction: loss and gradient are finite, and steps are
    taken."""
    distribute = common.distribute

    def collapsed(model, args):
        for head in (model.encoder.projector, getattr(model, "predictor", None)):
            for parameter in head[-1].parameters() if head else []:
                parameter.data.zero_()
        return distribute(model, args)

    monkeypatch.setattr(common, "distribute", collapsed)
    importlib.import_module(method).main(small)
    assert_healthy(tmp_path / "out", steps=4)
    assert log_of(tmp_path / "out")[0]["feature_std"] < 0.2


SPOILED = {1: math.nan, 2: math.inf, 3: 3e38}  # what a clip of rank 1 is in these steps


def spoiled(method, argv):
    """At the begin of each step: a digest of the whole state, and one of the weights."""
    begin, seen = common._Run.begin, []

    def digest(content):
        file = io.BytesIO()
        torch.save(content, file)
        return hashlib.sha256(file.getvalue()).hexdigest()

    def spoil(self, *batch):
        begin(self, *batch)
        model, optimizer = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))
        for group in optimizer["param_groups"]:
            group["lr"] = 0  # of the step that begins
        seen.append((digest([model, optimizer]), digest([*self.model.parameters()])))
        if common.rank() == 1 and self.number in SPOILED:
            self.clips[0] = SPOILED[self.number]

    common._Run.begin = spoil
    importlib.import_module(method).main(argv)
    return seen


@pytest.mark.parametrize("method", METHODS)
def test_guard_on_two_ranks(method, folder, small, tmp_path):
    """A clip of NaN, of infinity, and of numbers that overflow, on one rank only: on both, weights,
    buffers, target, queue, optimizer and their counters stay as they were, and training goes on."""
    rows = "".join(f"{path}\n" for path in sorted(folder.rglob("*.mp4")) * 3)
    (tmp_path / "list.txt").write_text(rows)
    argv = [*small, "--data", str(tmp_path / "list.txt"), "--batch-size", "4", "--max-steps", "6"]
    ranks = run_ranks(2, spoiled, method, argv)
    for states in ranks:
        whole = [state for state, _ in states]
        assert whole[1] == whole[2] == whole[3] == whole[4]
        assert len(set(whole)) == 3  # before the first step, after it, after the fifth
    assert [weights for _, weights in ranks[0]] == [weights for _, weights in ranks[1]]
    assert log_of(tmp_path / "out")[-1]["skipped_steps"] == 3


def test_weights_that_overflow_are_not_saved(small, tmp_path, monkeypatch, capfd):
    """A finite gradient whose step leaves weights that are not: exit code 1 in words, and last.pth
    is that of before."""
    byol.main([*small, "--max-steps", "2"])
    files = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.pth")}
    step = torch.optim.AdamW.step

    def overflow(self, *args, **more):
        step(self, *args, **more)
        self.param_groups[0]["params"][0].data.mul_(1e38).mul_(1e38)

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    with pytest.raises(SystemExit) as stop:
        byol.main(small)
    assert stop.value.code == 1 and "weights are not finite" in capfd.readouterr().err
    assert len(files) == 2 and all(path.read_bytes() == was for path, was in files.items())


@pytest.mark.parametrize("ranks, batch", [(1, 1), (2, 2), (4, 4), (4, 7)])
def test_a_batch_of_one_video_a_rank(ranks, batch, small, monkeypatch, capfd):
    """BN has nothing to normalise with one video: refused with the number of videos that it needs;
    so is a batch that does not divide, with one that does."""
    monkeypatch.setattr(common, "world_size", lambda: ranks)
    monkeypatch.setattr(common, "_take_part", lambda args: None)
    with pytest.raises(SystemExit) as stop:
        byol.main([*small, "--batch-size", str(batch)])
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and f"--batch-size {batch}" in line
    assert "needs 2 videos for BN" in line if batch == ranks else "try 8" in line


# --- what is written


def test_log_has_no_hole(small, tmp_path):
    """Lines that were logged after the last checkpoint go when a run goes on, and a log that was
    deleted is begun anew: every byte that is left is a line of JSON, also after another resume."""
    flags = [*small, "--epochs", "4", "--log-every", "100"]
    log = tmp_path / "out/log.jsonl"
    for steps, change in ((2, b'{"step": 99}\n' * 40), (4, None), (6, b""), (8, b"")):
        run_ranks(1, train, [*flags, "--max-steps", str(steps)])
        if change is None:
            log.unlink()
        elif change:
            log.write_bytes(log.read_bytes() + change)
    assert [line["step"] for line in log_of(tmp_path / "out")][-1] == 8
    assert b"\0" not in log.read_bytes() and b"99" not in log.read_bytes()


def _on_a_full_disk(script, argv):
    real = os.fsync

    def full(file):
        if os.fstat(file).st_size:
            raise OSError(28, "No space left on device")
        real(file)

    os.fsync = full
    importlib.import_module(script).main(argv)


@pytest.mark.parametrize("what", ["result.json", "npz", "clean.txt", "png"])
def test_full_disk_of_other_files(what, folder, small, tmp_path, capfd):
    """A result, features, a list or a picture that does not fit: one line, exit code 1; the older
    file is as it was, and nothing half written stays."""
    weights = ["--weights", "random", "--backbone", "tiny", "--cached", "--workers", "0"]
    probe = [*weights, "--data", str(folder), "--val", str(folder), "--out", str(tmp_path / "out")]
    probe += ["--small", "--frames", "2", "--size", "16"]
    script, argv, file = {
        "result.json": ("eval_linear", probe, "out/result.json"),
        "npz": ("eval_linear", [*probe, "--extract", str(tmp_path / "f.npz")], "f.npz"),
        "clean.txt": ("byol", [*small, "--check-data"], "out/clean.txt"),
        "png": ("byol", [*small, "--show-views", str(tmp_path / "v.png")], "v.png"),
    }[what]
    (tmp_path / "out").mkdir()
    (tmp_path / file).write_text("of an earlier run")
    assert run_ranks(1, _on_a_full_disk, script, argv) == [1]
    errors = [line for line in capfd.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1 and "cannot write" in errors[0] and "No space left" in errors[0]
    assert (tmp_path / file).read_text() == "of an earlier run"
    assert not list(tmp_path.rglob("*.tmp"))


def test_nobody_reads_the_output(small, tmp_path):
    """`byol.py | head -1`: the run goes on to its end."""
    command = [sys.executable, str(ROOT / "byol.py"), *small, "--log-every", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        errors = process.stderr.read().decode()
    assert "Traceback" not in errors and log_of(tmp_path / "out")[-1]["step"] == 4


@pytest.mark.parametrize("names", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "4", "RANK": "3"}])
def test_names_of_torchrun_without_torchrun(names, small, tmp_path):
    """One line, exit code 2; a RANK alone means nothing, and the run is that of one process."""
    command = [sys.executable, str(ROOT / "byol.py"), *small, "--max-steps", "1"]
    done = subprocess.run(command, env={**os.environ, **names}, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "WORLD_SIZE" in done.stderr
    env = {**os.environ, "RANK": "1", "LOCAL_RANK": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "chance level" in done.stdout
    assert (tmp_path / "out/last.pth").exists()


def _killed_while_reading(argv):
    reader = common.VideoReader

    def dying(path, *args, **more):
        if torch.utils.data.get_worker_info() and path.endswith("06.mp4"):
            os.kill(os.getpid(), signal.SIGKILL)
        return reader(path, *args, **more)

    common.VideoReader = dying
    eval_linear.main(argv)


def test_a_worker_that_dies_in_an_evaluation(folder, tmp_path, capfd):
    """Exit code 1, and one line that names the video."""
    flags = ["--weights", "random", "--small", "--data", str(folder), "--val", str(folder)]
    flags += ["--workers", "1", "--out", str(tmp_path / "out")]
    assert run_ranks(1, _killed_while_reading, flags) == [1]
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert "06.mp4" in line and " error: " in line
