"""A script as a user starts it, in real processes that the tests can find, kill and wait for."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).parent.parent


class Job:
    """A script, with torchrun if it has several ranks.

    All of its processes are known by a mark in their environment, as torchrun gives each rank a
    session of its own. script: byol, or the path of a file. names: of its environment."""

    def __init__(self, script, argv, out, ranks=1, cwd=None, **names):
        self.mark, self.ranks, self.out = f"RHO_TEST={uuid.uuid4()}", ranks, Path(out)
        how = [sys.executable]
        if ranks > 1:
            how += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        path = Path(script)
        if not path.suffix:
            path = ROOT / f"{script}.py"
        self.screen = self.out.with_suffix(f".{self.mark[-36:]}.screen")
        environment = {**os.environ, **names, "OMP_NUM_THREADS": "1", "RHO_TEST": self.mark[9:]}
        with open(self.screen, "wb") as screen:
            self.process = subprocess.Popen(
                [*how, path, *argv, "--out", out],
                stdout=screen,
                stderr=screen,
                cwd=cwd,
                env=environment,
                start_new_session=True,
            )

    def alive(self):
        return self.process.poll() is None

    def pids(self):
        """Of all its processes that run: {pid: (rank, parent)}."""
        found = {}
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                names = (place / "environ").read_bytes().decode(errors="replace").split("\0")
                if self.mark in names:
                    rank = [int(name[5:]) for name in names if name.startswith("RANK=")]
                    parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
                    found[int(place.name)] = (rank or [0])[0], parent
        return found

    def rank_pids(self):
        """Of its ranks, without torchrun itself and without their workers: {rank: pid}."""
        if self.ranks == 1:
            return {0: self.process.pid}
        return {rank: p for p, (rank, parent) in self.pids().items() if parent == self.process.pid}

    def kill(self):
        """SIGKILL to every process of it; returns when none is left."""
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.poll()
        self.process.wait()

    def wait(self, seconds):
        """Its exit status; it and all of its processes must be gone in time."""
        limit = time.monotonic() + seconds
        try:
            status = self.process.wait(seconds)
            while self.pids():
                assert time.monotonic() < limit, f"a process was left behind\n{self.text()}"
                time.sleep(0.05)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not over after {seconds} s\n{self.text()}") from None
        finally:
            self.kill()
        return status

    def finish(self):
        assert self.wait(600) == 0, self.text()
        return self

    def text(self):
        return self.screen.read_text()

    def step(self):
        """The last one that it has printed, 0 at first; the log may be an earlier job's."""
        steps = 0
        for line in self.text().split("\n")[:-1]:
            words = line.split()
            if len(words) == 6 and words[0].isdigit():  # a row of the table
                steps = int(words[0])
        return steps

    def reached(self, number):
        """Whether that step is over; 0: it has said something."""
        return self.step() >= number and self.screen.stat().st_size > 0

    def until(self, reached):
        """Wait until reached(); returns whether it was before the end."""
        while self.alive() and not reached():
            time.sleep(0.002)
        return self.alive()
