"""What the tests share: a data set of little videos, and a way to run code in several processes."""

import dataclasses
import json
import multiprocessing
import os
import socket
import sys
import traceback
from pathlib import Path

import pytest
import torch

from layouts import ava, charades, hmdb51, ssv2, ucf101  # noqa: F401
from videos import make_video

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
# Children are forked, because importing torch takes seconds: no thread pool may exist by then.
torch.set_num_threads(1)
# Autograd starts a thread for each device at its first backward pass, which must not come where a
# test pretends that there is a GPU.
torch.ones((), requires_grad=True).backward()

METHODS = ["simclr", "moco", "byol", "swav"]
SMALL = """--small --backbone tiny --frames 4 --stride 4 --size 16 --batch-size 6 --epochs 2
    --warmup 0.25 --workers 0 --log-every 2""".split()


def pytest_configure(config):
    """Without an -m of its own, a command runs all but the slow tests."""
    config.addinivalue_line("markers", "slow: 20 minutes of kills and a long run (-m slow)")
    config.option.markexpr = config.option.markexpr or "not slow"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """13 videos of 1 s in two class folders."""
    root = tmp_path_factory.mktemp("videos")
    for i in range(13):
        place = root / ("odd" if i % 2 else "even")
        place.mkdir(exist_ok=True)
        make_video(place / f"{i:02d}.mp4", n=30, size=(48, 36), counters=range(50 * i, 50 * i + 30))
    return root


@pytest.fixture
def small(folder, tmp_path):
    """Arguments of a run of two seconds, its output in tmp_path/out."""
    return ["--data", str(folder), "--out", str(tmp_path / "out"), *SMALL]


def arguments(script, **changes):
    """The Config of a script's demo with some fields changed, without a command line."""
    cfg = script.Config(**{**script.DEMO, **changes})
    cfg.given = {field.name for field in dataclasses.fields(cfg)}  # nothing is chosen for it
    cfg.script = script.__name__
    return cfg


def result_of(argv):
    """The result.json of an evaluation with these arguments."""
    return json.loads(Path(argv[argv.index("--out") + 1], "result.json").read_text())


def refused(script, argv, capfd):
    """The one line with which a script refuses its arguments."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        script.main(argv)
    errors = capfd.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(errors) == 1, (argv[-2:], errors)
    assert " error: " in errors[0]
    return errors[0]


def run_ranks(n, function, *args, timeout=120):
    """Call function(*args) in n processes that know each other; returns the n results.

    With n = 1 also in a process of its own, so that nothing of it stays in this one.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ends, processes = [], []
    for rank in range(n):
        ours, theirs = context.Pipe()
        process = context.Process(target=_rank, args=(theirs, rank, n, port, function, args))
        process.start()
        theirs.close()
        ends.append(ours)
        processes.append(process)
    try:
        answers = []
        for end in ends:
            assert end.poll(timeout), "a process did not answer in time"
            answers.append(end.recv())
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    for error, _ in answers:
        assert error is None, error
    return [result for _, result in answers]


def _rank(end, rank, n, port, function, args):
    names = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=n, LOCAL_WORLD_SIZE=n, MASTER_PORT=port)
    if n > 1:
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    try:
        answer = None, function(*args)
    except SystemExit as stop:
        answer = (None, stop.code)
    except BaseException:
        answer = traceback.format_exc(), None
    end.send(answer)
    os._exit(0)
