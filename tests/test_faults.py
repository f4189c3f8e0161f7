"""Faults from outside: kills at any moment, a full disk, a rank that dies. Nothing is lost."""

import json
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
import eval_linear
from conftest import ROOT, run_ranks
from test_train import assert_same_run
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


def test_black_videos_train(small, tmp_path):
    """Videos of nothing but black are videos: finite weights, nothing skipped."""
    (tmp_path / "data").mkdir()
    for i in range(6):
        black = lambda counter, w, h: np.zeros((h, w, 3), np.uint8)  # noqa: E731
        make_video(tmp_path / f"data/{i}.mp4", n=20, size=(48, 36), draw=black)
    byol.main([*small, "--data", str(tmp_path / "data"), "--epochs", "2"])
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert lines[-1]["skipped_steps"] == 0
    state = torch.load(tmp_path / "out/last.pth", weights_only=True)["model"]
    assert all(tensor.isfinite().all() for tensor in state.values())
