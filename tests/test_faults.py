"""Faults from outside: kills at any moment, a full disk, a rank that dies. Nothing is lost."""

import importlib
import json
import math
import multiprocessing
import os
import random
import re
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
from jobs import Job
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
    argv = [*small, "--epochs", "90", "--log-every", "1", "--workers", "2", "--knn-every", "40"]
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
    flags = ["--weights", str(tmp_path / "out"), "--data", str(folder), "--val", str(folder)]
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
    small = [*small, "--log-every", "1"]
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
    record, steps = common.Run.record, 0

    def dying(*args, **numbers):
        global steps
        steps += 1
        if steps == 3 and common.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        record(*args, **numbers)

    common.Run.record = dying
    byol.main(sys.argv[1:])
"""


def test_a_rank_that_dies(small, tmp_path):
    """Under torchrun the whole job ends within a minute or so and says which signal; the same
    command then ends like an undisturbed run."""
    small = [*small, "--log-every", "1"]
    script = tmp_path / "dying.py"
    script.write_text(textwrap.dedent(DYING.format(root=str(ROOT))))
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    begun = time.monotonic()
    done = subprocess.run([*run, script, *small], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "Signal 9" in done.stderr and time.monotonic() - begun < 100
    assert torch.load(tmp_path / "out/last.pth", weights_only=True)["step"] == 2
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
    """Videos of nothing but black or one tone are videos: finite weights and losses."""
    (tmp_path / "data").mkdir()
    for i in range(6):
        tone = 40 * (i % 3)

        def flat(counter, width, height, tone=tone):
            return np.full((height, width, 3), tone, np.uint8)

        make_video(tmp_path / f"data/{i}.mp4", n=20, size=(48, 36), draw=flat)
    main = importlib.import_module(method).main
    main([*small, "--data", str(tmp_path / "data"), "--epochs", "3"])
    assert_healthy(tmp_path / "out", steps=3)


def assert_healthy(out, steps):
    line = log_of(out)[-1]
    assert line["step"] == steps and math.isfinite(line["loss"])
    state = torch.load(out / "last.pth", weights_only=True)["model"]
    assert all(tensor.isfinite().all() for tensor in state.values())


@pytest.mark.parametrize("method", METHODS)
def test_a_collapsed_network_trains(method, small, tmp_path, monkeypatch):
    """All features exactly 0, which have no direction: loss and weights stay finite."""
    wrap_ddp = common.wrap_ddp

    def collapsed(model, cfg):
        heads = [model.encoder.projector]
        if hasattr(model, "predictor"):
            heads.append(model.predictor)
        for head in heads:
            for parameter in head[-1].parameters():
                parameter.data.zero_()
        return wrap_ddp(model, cfg)

    monkeypatch.setattr(common, "wrap_ddp", collapsed)
    importlib.import_module(method).main(small)
    assert_healthy(tmp_path / "out", steps=4)
    assert log_of(tmp_path / "out")[0]["feature_std"] < 0.2


# --- what is written


def test_log_has_no_hole(small, tmp_path):
    """Lines that were logged after the last checkpoint go when a run goes on, and a log that was
    deleted is begun anew: every byte that is left is a line of JSON, also after another resume."""
    flags = [*small, "--epochs", "4", "--log-every", "100"]
    log = tmp_path / "out/log.jsonl"
    for steps, change in ((2, b'{"step": 99}\n' * 40), (4, None), (6, b""), (8, b"")):
        run_ranks(1, train, [*flags, "--max-steps", str(steps)])
        assert log_of(tmp_path / "out")[-1]["step"] == steps
        assert b"\0" not in log.read_bytes() and b'"step": 99' not in log.read_bytes()
        if change is None:
            log.unlink()
        else:
            log.write_bytes(log.read_bytes() + change)


def _on_a_full_disk(argv):
    def full(*_):
        raise OSError(28, "No space left on device")

    os.replace = full
    eval_linear.main(argv)


@pytest.mark.parametrize("what", ["result.json", "npz", "png"])
def test_full_disk_of_other_files(what, folder, tmp_path, capfd):
    """A result, features or a picture that does not fit: one line, exit code 1; the older file is
    as it was, and nothing half written stays."""
    weights = ["--weights", "random", "--backbone", "tiny", "--cached", "--workers", "0"]
    probe = [*weights, "--data", str(folder), "--val", str(folder), "--out", str(tmp_path / "out")]
    probe += ["--small", "--frames", "2", "--size", "16"]
    argv, file = {
        "result.json": (probe, "out/result.json"),
        "npz": ([*probe, "--extract", str(tmp_path / "f.npz")], "f.npz"),
        "png": ([*probe, "--neighbours", str(tmp_path / "n.png")], "n.png"),
    }[what]
    (tmp_path / "out").mkdir()
    (tmp_path / file).write_text("of an earlier run")
    assert run_ranks(1, _on_a_full_disk, argv) == [1]
    errors = [line for line in capfd.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1 and "cannot write" in errors[0] and "No space left" in errors[0]
    assert (tmp_path / file).read_text() == "of an earlier run"
    assert not list(tmp_path.rglob("*.tmp"))


def test_names_of_torchrun_without_torchrun(small, tmp_path):
    """WORLD_SIZE alone is an error of torch's; a RANK alone means nothing, and the run is that of
    one process."""
    command = [sys.executable, str(ROOT / "byol.py"), *small, "--max-steps", "1"]
    env = {**os.environ, "WORLD_SIZE": "2"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "environment variable RANK expected" in done.stderr
    env = {**os.environ, "RANK": "1", "LOCAL_RANK": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "chance level" in done.stdout
    assert (tmp_path / "out/last.pth").exists()


DYING_WORKER = """
    import os, signal, sys
    sys.path.insert(0, {root!r})
    import torch
    import common, eval_linear

    opens = common.VideoClips.open

    def dying(self, index, short_side):
        if torch.utils.data.get_worker_info() and self.paths[index].endswith("06.mp4"):
            os.kill(os.getpid(), signal.SIGKILL)
        return opens(self, index, short_side)

    common.VideoClips.open = dying
    eval_linear.main()
"""


def test_a_worker_that_dies_in_an_evaluation(folder, tmp_path):
    """A status that is not 0, in time, and no process left behind."""
    script = tmp_path / "dying.py"
    script.write_text(textwrap.dedent(DYING_WORKER.format(root=str(ROOT))))
    argv = ["--weights", "random", "--small", "--data", str(folder), "--val", str(folder)]
    job = Job(script, [*argv, "--workers", "1"], tmp_path / "out")
    assert job.wait(30) == 1, job.text()
    assert re.search("DataLoader worker|Connection", job.text()), job.text()
