"""The long campaign, `python -m pytest -q -m slow tests`: real commands, killed a hundred times,
stopped by signals, and one run of 2,000 steps. Prints its figures with -s."""

import contextlib
import json
import os
import random
import re
import signal
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import common
from conftest import METHODS, ROOT, SMALL
from jobs import Job
from test_train import assert_same_run, log_of
from test_video import UNREADABLE
from videos import make_video

pytestmark = pytest.mark.slow

BOUND = 60  # seconds in which a job that lost a rank or was told to stop must be gone
TINY = """--frames 4 --stride 4 --size 16 --batch-size 4 --epochs 20 --warmup 0.05
    --log-every 1""".split()


def undisturbed(script, argv, out, ranks):
    """Run it once; returns its number of steps, and the seconds from its first word to its first
    step, of a step, and from the last step to the end."""
    job = Job(script, argv, out, ranks)
    job.until(lambda: job.screen.stat().st_size)
    first = time.monotonic()
    job.until(job.step)
    begun = time.monotonic()
    total = None
    with contextlib.suppress(FileNotFoundError):
        while job.alive():
            if job.step() != total:
                total, last = job.step(), time.monotonic()
            time.sleep(0.002)
    job.finish()
    seconds = begun - first, (last - begun) / total, time.monotonic() - last
    return total, *seconds


def assert_same_files(one, two):
    """Weights, optimizer, log (but timing), backbone.pth and result.json, bit for bit."""
    assert_same_run(one, two)
    a, b = (torch.load(Path(out, "backbone.pth"), weights_only=True) for out in (one, two))
    assert {**a["config"], "out": ""} == {**b["config"], "out": ""}
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for name, tensor in a["state_dict"].items():
        assert torch.equal(tensor, b["state_dict"][name]), name
    results = [Path(out, "result.json") for out in (one, two)]
    assert results[0].exists() == results[1].exists()
    if results[0].exists():
        a, b = (json.loads(path.read_text()) for path in results)
        assert {**a, "command": ""} == {**b, "command": ""}
    assert not list(Path(two).glob("*.tmp"))


def interrupted(script, argv, out, ranks, number, spans, step, chance):
    """A job that runs and is at a random moment soon after a step; after its first word for step 0.
    spans: seconds of what comes after its first word, and after its last step."""
    for attempt in range(5):  # the machine may be faster now than when the spans were measured
        job = Job(script, argv, out, ranks)
        if job.until(partial(job.reached, number)):
            time.sleep(chance.uniform(0, 0.8 * spans.get(number, min(step, 0.2)) / (1 + attempt)))
            if job.alive():
                return job
        job.finish()
    raise AssertionError(f"step {number} was over too soon")


def series(script, argv, tmp_path, ranks, kills, seed):
    """Kill a command at random moments, giving it again after each: one kill before the first step,
    one after the last step of an evaluation, the others in steps, drawn over the whole run; with
    several ranks every second kill takes one rank only, and the job must end by itself with its
    reason. In the end the files must be those of an undisturbed run."""
    chance, whole, out = random.Random(seed), tmp_path / "whole", tmp_path / "out"
    begun = time.monotonic()
    total, start, step, tail = undisturbed(script, argv, whole, ranks)
    tested = script in ("eval_linear", "finetune")
    steps = [chance.randint(1, int(0.8 * total)) for _ in range(kills - 1 - tested)]
    numbers = [0, *sorted(steps), *[total] * tested]
    for i, number in enumerate(numbers):
        alone = ranks > 1 and i % 2
        job = interrupted(script, argv, out, ranks, number, {0: start, total: tail}, step, chance)
        if alone:
            before = time.monotonic()
            os.kill(job.rank_pids()[chance.randrange(ranks)], signal.SIGKILL)
            assert job.wait(BOUND) != 0 and "Signal 9" in job.text()
            print(f"    a rank lost: {time.monotonic() - before:.1f} s to the end")
        else:
            job.kill()
        if (out / "last.pth").exists():
            torch.load(out / "last.pth", weights_only=True)
    final = Job(script, argv, out, ranks).finish()
    assert numbers[-1] < 6 or "going on after step" in final.text()
    assert_same_files(whole, out)
    seconds = time.monotonic() - begun
    print(f"\n  {script} x {ranks}: {kills} kills at {numbers} of {total} steps, {seconds:.0f} s")


@pytest.mark.parametrize("ranks, kills", [(1, 13), (2, 7)])
@pytest.mark.parametrize("method", METHODS)
def test_pretraining_survives_sigkill(method, ranks, kills, folder, tmp_path):
    """80 SIGKILLs over the methods: training with and without workers, mid-epoch, on 1 rank and
    under torchrun, all processes or one rank: the end is an undisturbed run's, bit for bit."""
    argv = ["--data", str(folder), *SMALL, *TINY, "--knn-every", "7", "--rho", "2"]
    argv += ["--workers", "1"] if method in ("byol", "moco") else []
    argv += ["--queue", "31"] if method == "moco" else []
    series(method, argv, tmp_path, ranks, kills, seed=f"{method} {ranks}")


@pytest.mark.parametrize("ranks, kills", [(1, 7), (2, 3)])
@pytest.mark.parametrize("script", ["finetune", "eval_linear"])
def test_evaluations_survive_sigkill(script, ranks, kills, folder, tmp_path):
    """20 SIGKILLs: while features are extracted, trained on, and tested: the same files, result and
    all, as without."""
    argv = ["--data", str(folder), "--val", str(folder), "--small", "--backbone", "tiny", *TINY]
    argv += ["--test-clips", "4", "--workers", "1"]
    argv += ["--weights", "random", "--no-cached"] if script == "eval_linear" else []
    series(script, argv, tmp_path, ranks, kills, seed=f"{script} {ranks}")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_to_real_commands(number, ranks, folder, tmp_path):
    """SIGTERM and SIGINT to a run with workers, and to torchrun, in 3 random steps: everything ends
    in bounded time with a checkpoint and the words that say how to go on, and loses no step."""
    argv = ["--data", str(folder), *SMALL, *TINY, "--workers", "2", "--knn-every", "0"]
    chance, whole, out = random.Random(ranks), tmp_path / "whole", tmp_path / "out"
    total, *_ = undisturbed("byol", argv, whole, ranks)
    for target in sorted(chance.randint(1, int(0.8 * total)) for _ in range(3)):
        job = Job("byol", argv, out, ranks)
        assert job.until(partial(job.reached, target)), job.text()
        os.kill(job.process.pid, number)
        begun = time.monotonic()
        status = job.wait(BOUND)
        print(f"\n  {number.name} x {ranks} at {target} of {total}: ", end="")
        print(f"{time.monotonic() - begun:.1f} s to the end, exit status {status}")
        assert "the same command goes on from there" in job.text()
        assert (status == 0) == (ranks == 1), job.text()  # torchrun's own status is torchrun's
        saved = torch.load(out / "last.pth", weights_only=True)["step"]
        assert f"stopped after step {saved};" in job.text() and saved >= target
        assert saved == log_of(out)[-1]["step"]
    Job("byol", argv, out, ranks).finish()
    assert_same_files(whole, out)


# --- 2,000 steps


def usage(pids):
    """Of these processes: MiB of anonymous and shared memory (what several of them hold counted for
    each: that a page is no longer shared is no growth), open file handles, seconds of CPU time."""
    memory = handles = ticks = 0
    for pid in pids:
        place = Path(f"/proc/{pid}")
        for line in (place / "status").read_text().splitlines():
            if line.startswith(("RssAnon:", "RssShmem:")):
                memory += int(line.split()[1]) / 1024
        handles += len(os.listdir(place / "fd"))
        ticks += sum(map(int, (place / "stat").read_text().rpartition(")")[2].split()[11:13]))
    return memory, handles, ticks / os.sysconf("SC_CLK_TCK")


def test_2000_steps_are_flat(tmp_path):
    """2,000 steps of BYOL on the demo at 2 ranks, kNN and all: after a tenth for the start the last
    tenth has the memory, file handles and step time of the first."""
    argv = "--batch-size 4 --epochs 20 --knn-every 4 --workers 1 --log-every 10".split()
    job = Job("byol", argv, tmp_path / "out", 2, cwd=ROOT)
    assert job.until(lambda: job.step() >= 100), job.text()
    ranks = job.rank_pids().values()
    lasting = [*ranks, *[pid for pid, (_, parent) in job.pids().items() if parent in ranks]]
    assert len(lasting) == 4, lasting  # two ranks, and a worker of each that lives as long
    rows = []
    while job.step() < 1990 and job.alive():
        with contextlib.suppress(OSError):  # a process that ends is seen by finish()
            rows.append((job.step(), *usage(lasting)))
        time.sleep(0.5)
    job.finish()
    log = log_of(tmp_path / "out")
    assert log[-1]["step"] == 2000
    figures = []
    for first, last in ((200, 400), (1800, 2000)):
        part = [row for row in rows if first <= row[0] <= last]
        memory, handles = (statistics.median(row[i] for row in part) for i in (1, 2))
        cpu = (part[-1][3] - part[0][3]) / (part[-1][0] - part[0][0])
        lines = [x for x in log if first < x["step"] <= last and "knn_top1" not in x]
        wall = statistics.median(4 / line["videos_per_second"] for line in lines)
        figures.append((memory, handles, 1000 * cpu, 1000 * wall))
        print(
            f"\n  steps {first} to {last}: {memory:.0f} MiB, {handles:.0f} handles, "
            f"{1000 * cpu:.0f} ms CPU and {1000 * wall:.0f} ms a step, {len(part)} samples",
            end="",
        )
    (memory, handles, cpu, wall), then = figures
    assert then[0] - memory < 20 * len(lasting)
    assert then[1] <= handles
    assert then[2] < 1.15 * cpu
    assert then[3] < 1.5 * wall  # other work on the machine is in it


# --- damaged videos


def test_hundreds_of_damaged_videos_train(tmp_path):
    """500 files with random bytes overwritten, 45 that end at a tenth and all that hold no video,
    among 60 good ones, 4 epochs with 2 workers: the run ends well, names each bad video once, no
    worker dies, hangs or grows."""
    root, kinds = tmp_path / "data", ["mp4", "mkv", "webm", "avi", "ts"]
    root.mkdir()
    codecs = {"webm": "libvpx", "avi": "mpeg4"}
    for kind in kinds:
        good = root / f"good-00.{kind}"
        make_video(good, n=60, size=(96, 64), codec=codecs.get(kind, "libx264"))
        data = good.read_bytes()
        for i in range(1, 12):
            (root / f"good-{i:02d}.{kind}").write_bytes(data)
        for tenth in range(1, 10):
            (root / f"cut-{tenth}.{kind}").write_bytes(data[: len(data) * tenth // 10])
        for seed in range(100):
            rng, noise = np.random.default_rng(seed), np.frombuffer(data, np.uint8).copy()
            noise[rng.integers(0, len(data), 20)] = rng.integers(0, 256, 20)
            (root / f"noise-{seed:02d}.{kind}").write_bytes(noise.tobytes())
    for name in UNREADABLE:
        place = root / name.replace(".", "-")
        place.mkdir()
        UNREADABLE[name](place / name)
    hopeless = [path for path in root.rglob("*") if path.name in UNREADABLE and path.is_file()]
    hopeless = [path for path in hopeless if path.suffix.lower() in common.SUFFIXES]
    argv = ["--data", str(root), *SMALL, "--batch-size", "8", "--epochs", "4", "--workers", "2"]
    job = Job("byol", [*argv, "--knn-every", "0"], tmp_path / "out")
    rows, slowest, moved = [], 0.0, time.monotonic()
    while job.alive() and job.step() < 300:
        workers = [pid for pid, (_, parent) in job.pids().items() if parent == job.process.pid]
        with contextlib.suppress(OSError):  # of one that ends
            rows += [(job.step(), usage(workers)[0])] * (len(workers) == 2)
        before = job.step()
        time.sleep(0.2)
        if job.step() != before:
            slowest, moved = max(slowest, time.monotonic() - moved), time.monotonic()
    job.finish()
    named = re.findall(r"WARN bad video, replaced: (.*?\.\w+): ", job.text())
    assert len(named) == len(set(named)) == log_of(tmp_path / "out")[-1]["bad_videos"]
    assert len(hopeless) > 10 and {str(path) for path in hopeless} <= set(named)
    assert not any("good-" in name for name in named)
    total = log_of(tmp_path / "out")[-1]["step"]
    first = statistics.median(size for step, size in rows if total / 5 < step < total * 2 / 5)
    last = statistics.median(size for step, size in rows if total * 4 / 5 < step)
    print(
        f"\n  {total} steps, {len(named)} bad videos named, longest pause {slowest:.0f} s; "
        f"2 workers: {first:.0f} MiB, then {last:.0f} MiB"
    )
    assert last - first < 30 and slowest < 30
