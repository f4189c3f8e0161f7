"""What a user meets: nothing hangs, no false success, own videos, output for people, macOS, no wait
for the GPU in a step, ranks that do not share a disk."""

import importlib
import json
import os
import re
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

import byol
import common
import conftest
import eval_linear
from conftest import METHODS, ROOT, run_ranks
from jobs import Job
from test_train import log_of

# --- nothing hangs

BROKEN = """
    import functools, os, signal, sys
    sys.path.insert(0, {root!r})
    import torch
    import byol, common

    what = os.environ["FAULT"]
    sample, open_video, record = byol.sample_clips, common.VideoClips.open, common.Run.record
    calls = 0

    def meets_it(name):
        # the third call of such a function, on the last rank
        global calls
        calls += name == what
        return name == what and calls == 3 and common.rank() == common.world_size() - 1

    def sampler(*args):
        if meets_it("sampler"):
            raise KeyError("a mistake in the sampler")
        return sample(*args)

    def augmentation(clip):
        if meets_it("augmentation"):
            raise KeyError("a mistake in the augmentation")
        return clip[..., :16, :16] / 255

    def opens(*args):
        if meets_it("worker"):
            os.kill(os.getpid(), signal.SIGKILL)
        return open_video(*args)

    def records(self, loss, features, **numbers):
        if meets_it("record"):
            raise KeyError("a mistake in the record")
        if meets_it("number"):
            numbers["own"] = torch.ones(2)
        record(self, loss, features, **numbers)

    byol.sample_clips, common.VideoClips.open, common.Run.record = sampler, opens, records
    if what == "augmentation":
        common.VideoClips = functools.partial(common.VideoClips, transform=augmentation)
    if __name__ == "__main__":
        byol.main()
"""
REASONS = {
    "sampler": "a mistake in the sampler",
    "augmentation": "a mistake in the augmentation",
    "record": "a mistake in the record",
    "number": "only one element tensors",
    "worker": "DataLoader worker|Connection",
}


@pytest.mark.parametrize("ranks, seconds", [(1, 20), (2, 45)])
def test_nothing_hangs(ranks, seconds, small, tmp_path):
    """A mistake in a sampler, in an augmentation, at record(), in a number for the log, and a
    worker that dies, on one rank: the run ends in time with the traceback and a status that is not
    0, and leaves no process behind."""
    script = tmp_path / "broken.py"
    script.write_text(textwrap.dedent(BROKEN.format(root=str(ROOT))))
    settings = "--workers 2 --batch-size 4 --epochs 40 --log-every 3"
    argv = [*small[:-4], *settings.split()]
    faults = REASONS if ranks == 1 else ["sampler", "record", "worker"]
    for fault in faults:
        job = Job(script, argv, tmp_path / fault, ranks, FAULT=fault)
        job.until(lambda job=job: "batch: " in job.text())  # what is timed is not torch's import
        status = job.wait(seconds)
        assert status != 0, (fault, job.text())
        assert "Traceback" in job.text(), (fault, job.text())
        assert re.search(REASONS[fault], job.text()), (fault, job.text())


def _pauses_before_forks(argv):
    pauses, forks, sleep = [], [], time.sleep
    os.register_at_fork(before=lambda: forks.append(len(pauses)))  # runs after those added later
    common.time.sleep = lambda seconds: (pauses.append(seconds), sleep(seconds))
    byol.main(argv)
    return pauses, forks


def test_a_pause_before_each_fork(small):
    """On several ranks no worker is forked right after a collective: a thread of gloo's may hold
    the lock of Python's list of threads then, and the worker would wait for it for ever. (CPython
    before 3.13. Forks after all_gather_object on a busy machine: 6 of 8,000 hung, and 0 of 6,000
    after a pause of 0.01 s.)"""
    argv = [*small, "--batch-size", "4", "--workers", "1", "--max-steps", "3", "--knn-every", "1"]
    for pauses, forks in run_ranks(2, _pauses_before_forks, argv):
        assert len(forks) == 2 and forks == [1, 2] and min(pauses) >= 0.1


# --- no false success


def copy_of(script, tmp_path, monkeypatch, extra=""):
    """A module `mine`: a script with a line more at its end."""
    (tmp_path / "mine.py").write_text((ROOT / f"{script}.py").read_text() + extra)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    importlib.invalidate_caches()
    return importlib.import_module("mine")


def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_a_finished_run_says_so(small, tmp_path, capfd):
    """The same command again: nothing was trained, how to train anew, exit code 0, and every file
    is as it was."""
    byol.main(small)
    before = files_of(tmp_path / "out")
    assert "done, 4 of 4 steps" in capfd.readouterr().out
    byol.main(small)
    out = capfd.readouterr().out
    assert "nothing was trained" in out and "to train anew" in out and "--out" in out
    assert "done, " not in out
    assert before == files_of(tmp_path / "out")


def test_a_finished_run_of_other_code(small, tmp_path, monkeypatch, capfd):
    """Finished, and the script has changed since: exit code 2, one line that names it."""
    copy_of("byol", tmp_path, monkeypatch).main(small)
    before = files_of(tmp_path / "out")
    changed = copy_of("byol", tmp_path, monkeypatch, extra="# changed\n")
    assert "mine.py" in conftest.refused(changed, small, capfd)
    assert before == files_of(tmp_path / "out")


def test_an_interrupted_run_of_other_code(small, tmp_path, monkeypatch, capfd):
    """Interrupted, and the script has changed since: a WARN that names it, and it goes on."""
    copy_of("byol", tmp_path, monkeypatch).main([*small, "--max-steps", "1"])
    assert "WARN mine.py" not in capfd.readouterr().out
    changed = copy_of("byol", tmp_path, monkeypatch, extra="# changed\n")
    changed.main([*small, "--max-steps", "3"])
    out = capfd.readouterr().out
    assert "WARN mine.py has changed" in out and "WARN common.py" not in out
    assert log_of(tmp_path / "out")[-1]["step"] == 3


def test_a_run_stopped_by_max_steps_is_interrupted(small, tmp_path, monkeypatch, capfd):
    """Other code refused as if --max-steps, where the run has stopped, were its end."""
    copy_of("byol", tmp_path, monkeypatch).main([*small, "--max-steps", "2"])
    changed = copy_of("byol", tmp_path, monkeypatch, extra="# changed\n")
    changed.main([*small, "--max-steps", "2"])
    out = capfd.readouterr().out
    assert "WARN mine.py has changed" in out and "nothing was trained" in out


def _with_common_of(folder, argv):
    for name in ("common", "byol"):
        sys.modules.pop(name, None)
    sys.path.insert(0, str(folder))
    importlib.import_module("byol").main(argv)


def test_a_changed_common_is_other_code(small, tmp_path, capfd):
    """So it is with common.py: named in a WARN, and an error once the run is finished."""
    for name in ("byol.py", "common.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    run_ranks(1, _with_common_of, tmp_path, [*small, "--max-steps", "1"])
    with open(tmp_path / "common.py", "a") as file:
        file.write("# changed\n")
    run_ranks(1, _with_common_of, tmp_path, small)
    assert "WARN common.py has changed" in capfd.readouterr().out
    (tmp_path / "common.py").write_text((ROOT / "common.py").read_text())
    assert run_ranks(1, _with_common_of, tmp_path, small) == [2]
    assert "common.py has changed" in capfd.readouterr().err


def test_max_steps_is_not_finished(small, tmp_path, capfd):
    """A run that --max-steps has stopped says where; neither its file nor the same command calls it
    finished, and without --max-steps it goes on."""
    byol.main([*small, "--max-steps", "2"])
    out = capfd.readouterr().out
    assert "2 of 4 steps" in out
    saved = torch.load(tmp_path / "out/backbone.pth", weights_only=True)
    assert saved["config"]["finished"] is False
    byol.main([*small, "--max-steps", "2"])
    assert "nothing was trained" in capfd.readouterr().out
    byol.main(small)
    assert "done, 4 of 4 steps" in capfd.readouterr().out
    saved = torch.load(tmp_path / "out/backbone.pth", weights_only=True)
    assert saved["config"]["finished"] is True


# --- own videos


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("videos", [8, 13, 50, 160, 1000, 1170, 16_000, 50_000])
def test_batch_and_epochs_of_own_videos(videos, ranks, monkeypatch, capfd):
    """--small alone: the batch is the largest multiple of W up to min(40, n / 4), at least 2 W; at
    least 400 steps, and more than 1000 only if an epoch has more; both are printed."""
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("LOCAL_RANK", "0")
    cfg = common.parse_args(byol.Config, byol.DEMO, ["--data", "x", "--small"])
    common.fit_to_videos(cfg, videos)
    most = max(min(40, videos / 4), 2 * ranks)
    assert cfg.batch_size % ranks == 0 and 2 * ranks <= cfg.batch_size <= most
    assert cfg.batch_size + ranks > most
    epoch = videos // cfg.batch_size
    assert cfg.epochs * epoch >= 400
    assert cfg.epochs * epoch <= 1000 or cfg.epochs == 1
    out = capfd.readouterr().out
    assert f"--batch-size {cfg.batch_size} " in out and f"--epochs {cfg.epochs}" in out


def test_a_given_batch_or_number_of_epochs_stays(capfd):
    """What a flag says is not chosen; without --small nothing is."""
    for argv, batch, epochs in (
        ("--small --batch-size 8", 8, 67),
        ("--small --epochs 3", 12, 3),
        ("", 64, 200),
    ):
        cfg = common.parse_args(byol.Config, byol.DEMO, ["--data", "x", *argv.split()])
        common.fit_to_videos(cfg, 50 if argv else 100)
        assert (cfg.batch_size, cfg.epochs) == (batch, epochs)


def warnings_of(argv, capfd):
    capfd.readouterr()
    byol.main(argv)
    return [line for line in capfd.readouterr().out.splitlines() if line.startswith("WARN")]


def test_warnings_about_own_videos(small, folder, capfd):
    """Too few steps, videos that an epoch leaves out: said, and only where it is so."""
    few, left = "WARN only 4 steps", "WARN each epoch leaves out 1 videos"
    found = warnings_of([*small, "--max-steps", "1"], capfd)
    assert any(line.startswith(few) for line in found)
    assert any(line.startswith(left) for line in found)
    rows = [str(path) for path in sorted(folder.rglob("*.mp4"))][:12]
    (folder / "twelve.txt").write_text("\n".join(rows))
    argv = [*small, "--data", str(folder / "twelve.txt"), "--out", f"{small[3]}2"]
    found = warnings_of([*argv, "--epochs", "100", "--max-steps", "1"], capfd)
    assert not any("steps" in line or "leaves out" in line for line in found)


@pytest.mark.parametrize("rho, stride, said", [(2, 16, 1), (2, 4, 0), (1, 16, 0)])
def test_clips_that_start_at_the_same_time(rho, stride, said, small, capfd):
    """Videos of 1 s are too short for two clips of 2 s from different times: said once."""
    argv = [*small, "--rho", str(rho), "--stride", str(stride), "--log-every", "1"]
    found = warnings_of([*argv, "--epochs", "3"], capfd)
    assert sum("same time" in line for line in found) == said


def test_a_csv_trains(small, folder, tmp_path, capfd):
    """Columns path, label, split, Windows line ends: its rows train, with its classes."""
    rows = [
        f"{path},{path.parent.name},{'train' if i < 8 else 'val'}"
        for i, path in enumerate(sorted(folder.rglob("*.mp4")))
    ]
    csv = tmp_path / "videos.csv"
    csv.write_bytes("\r\n".join(["path,label,split", *rows]).encode())
    byol.main([*small, "--data", str(csv), "--batch-size", "4", "--max-steps", "1"])
    assert "data: 8 videos, 2 classes" in capfd.readouterr().out
    assert log_of(tmp_path / "out")[-1]["step"] == 1


# --- output for people

KEYS = """step epoch loss chance lr feature_std videos_per_second data_wait clip_distance
    bad_videos""".split()
OWN = {"simclr": [], "swav": [], "byol": ["target_momentum"]}
OWN["moco"] = ["target_momentum", "queue_filled"]


@pytest.mark.parametrize("method", METHODS)
def test_the_terminal_and_the_log(method, small, tmp_path, capfd):
    """A header with the chance level, aligned rows, no JSON and no carriage return on what is no
    terminal; the options that differ in one line; JSON in the file, with its keys."""
    own = ["--queue", "50"] if method == "moco" else []
    argv = [*small, *own, "--knn-every", "1", "--seed", "3"]
    importlib.import_module(method).main(argv)
    out, err = capfd.readouterr()
    assert "\r" not in out + err and "{" not in out
    lines = out.splitlines()
    (header,) = [i for i, line in enumerate(lines) if "feature std" in line]
    log = log_of(tmp_path / "out")
    assert f"{log[0]['chance']:.4f}" in lines[header - 1]
    rows = [line for line in lines[header + 1 :] if re.match(r" *\d+ ", line)]
    assert [int(row.split()[0]) for row in rows] == [line["step"] for line in log]

    def ends(line):
        return [word.end() for word in re.finditer(r"\S+( \S+)*", line)]

    assert all(ends(row) == ends(lines[header]) for row in rows), lines[header:]
    words = [word.group() for word in re.finditer(r"\S+( \S+)*", lines[header])]
    assert words == ["step", "epoch", "loss", "feature std", "kNN", "videos/s"]
    (differ,) = [line for line in lines if "seed 3" in line]
    assert "size 16" in differ and "rho" not in differ
    for line in log:
        knn = ["knn_top1"] if "knn_top1" in line else []
        assert [*line] == [*KEYS, *OWN[method], *knn]
    assert any("knn_top1" in line for line in log)
    saved = torch.load(tmp_path / "out/last.pth", weights_only=True)["cfg"]
    assert saved["rho"] == 2 and saved["seed"] == 3


class Terminal:
    """A stderr that says that it is a terminal."""

    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_the_bar_of_a_resumed_run(small, monkeypatch):
    """On a terminal a bar shows the loss and the time that is left; it begins at the resumed
    step."""
    byol.main([*small, "--epochs", "10", "--max-steps", "8"])
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    byol.main([*small, "--epochs", "10", "--log-every", "1"])
    bars = [bar for bar in terminal.text.split("\r") if "/20" in bar]
    assert " 8/20" in bars[0] and not any(re.search(r" [0-7]/20", bar) for bar in bars)
    assert " 20/20" in bars[-1] and re.search(r"loss \d\.\d+", bars[-1])
    assert re.search(r"<\d\d:\d\d", bars[-1]), bars[-1]  # tqdm's [elapsed<left


# --- macOS

MACOS = """
    import importlib.util, multiprocessing, os, sys

    del os.sched_getaffinity
    sys.modules["fcntl"] = None  # an import is an ImportError
    if multiprocessing.parent_process() is None:
        multiprocessing.set_start_method(os.environ["START"])
"""


@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_macos(start, small, folder, tmp_path):
    """Without sched_getaffinity and fcntl, under the start methods spawn and forkserver, the real
    commands train and evaluate with workers."""
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(MACOS))
    names = {"START": start, "PYTHONPATH": str(tmp_path)}
    argv = [*small, "--workers", "1", "--max-steps", "3", "--log-every", "1"]
    job = Job("byol", argv, tmp_path / "out", **names)
    assert job.wait(120) == 0, job.text()
    assert log_of(tmp_path / "out")[-1]["step"] == 3, job.text()
    argv = ["--weights", str(tmp_path / "out"), "--data", str(folder), "--val", str(folder)]
    argv += "--small --cached-clips 1 --epochs 2 --workers 1".split()
    job = Job("eval_linear", argv, tmp_path / "probe", **names)
    assert job.wait(120) == 0, job.text()
    assert json.loads((tmp_path / "probe/result.json").read_text())["n"] == 13


# --- the GPU

WAITS = """item tolist __bool__ __float__ __int__ __index__ cpu numpy nonzero masked_select unique
    equal allclose""".split()


class Waits(TorchFunctionMode):
    """Counts what would wait for a GPU: a look at numbers that the device may not have yet.

    Integers are left out: counts, seeds and flags are on the CPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        looks = getattr(function, "__name__", "") in WAITS
        if looks and (args[0].is_floating_point() or args[0].dtype == torch.bool):
            self.count += 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
@pytest.mark.parametrize("method", METHODS)
def test_no_step_waits_for_the_gpu(method, optimizer, small, monkeypatch):
    """Between two steps nothing looks at a number of the device but where a line is logged or a
    checkpoint is written. (AdamW counts its steps on the CPU, which cannot be told apart here.)"""
    waits, counts, record = Waits(), {}, common.Run.record

    def recorded(run, *args, **numbers):
        record(run, *args, **numbers)
        counts[run.step] = waits.count

    monkeypatch.setattr(common.Run, "record", recorded)
    own = ["--queue", "6"] if method == "moco" else []
    argv = [*small, *own, "--optimizer", optimizer, "--workers", "1", "--batch-size", "2"]
    with waits:
        importlib.import_module(method).main([*argv, "--log-every", "4", "--lr", "0.01"])
    waited = [step for step in range(1, 12) if counts[step] > counts[step - 1]]
    assert waited == [4, 6, 8]  # 6: the end of an epoch, which saves


# --- ranks


def _with_folder_of_its_own(folder, argv):
    byol.main([*argv, "--out", f"{folder}/{common.rank()}"])


def test_ranks_that_resume_at_different_steps(small, tmp_path, capfd):
    """A disk that is not shared: one line with both steps, exit code 2, on both ranks."""
    byol.main([*small, "--max-steps", "2", "--out", f"{tmp_path}/0"])
    before = files_of(tmp_path / "0")
    capfd.readouterr()
    assert run_ranks(2, _with_folder_of_its_own, tmp_path, small) == [2, 2]
    errors = set(capfd.readouterr().err.strip().splitlines())
    assert len({error.replace("/1/", "/0/") for error in errors}) == 1, errors
    assert "2" in errors.pop() and before == files_of(tmp_path / "0")


def test_weights_of_an_unfinished_run(small, folder, tmp_path, capfd):
    """Ctrl-C or --max-steps, then the next command of a chain: it says that the run is not done."""
    argv = ["--weights", str(tmp_path / "out"), "--data", str(folder), "--val", str(folder)]
    argv += ["--small", "--epochs", "1", "--out", str(tmp_path / "probe"), "--workers", "0"]
    for steps, said in (("1", True), ("0", False)):
        byol.main([*small, "--max-steps", steps])
        capfd.readouterr()
        eval_linear.main(argv)
        assert ("unfinished run, step 1" in capfd.readouterr().out) == said
