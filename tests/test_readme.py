"""What the README says holds: its commands run, its numbers are those of the result files."""

import importlib
import json
import math
import os
import re
import shlex
import subprocess
import sys

import pytest

import common
from conftest import ROOT
from table import METHODS, RESULTS, RHOS, TABLES, cells, mean, seeds
from videos import make_video

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
PROGRAMS = ["python", "torchrun", "pip", "ffmpeg"]
TOY = {f"--{name}": ["1"] for name in "epochs max-steps test-clips test-crops cached-clips".split()}
TOY |= {"--batch-size": ["4"], "--small": [], "--workers": ["0"], "--warmup-epochs": ["0"]}
TOY |= {"--knn-every": ["0"], "--log-every": ["1"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory, ucf101, hmdb51, ssv2, charades, ava):
    """A folder with the scripts, and little data wherever the README's commands look for them."""
    root = tmp_path_factory.mktemp("readme")
    for script in ROOT.glob("*.py"):
        (root / script.name).symlink_to(script)
    made = {"UCF101": ucf101, "HMDB51": hmdb51, "SomethingV2": ssv2, "Charades": charades}
    for name, folder in {**made, "AVA": ava}.items():
        (root / name).symlink_to(folder)
    for name in ("kinetics", "data/demo", "data/one-scene"):
        common.demo_videos(root / name, train=8, val=4)
    (root / "my").mkdir()
    (root / "my" / "videos").symlink_to(root / "kinetics" / "train")
    (root / "videos").mkdir()
    make_video(root / "videos" / "a.mp4", n=10)
    rows = [f"-e_5BBWC4,{second},0.05,0.1,0.45,0.9,,0.95" for second in (902, 904)]
    (root / "detected.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="module")
def commands(place):
    """Each program that the README's blocks call, with its arguments, as bash makes them."""
    log, programs = place / "called", place / "bin"
    (place / ".venv" / "bin").mkdir(parents=True)
    (place / ".venv" / "bin" / "activate").touch()
    programs.mkdir()
    for name in PROGRAMS:
        line = f"printf '%q ' {name} \"$@\" >> {log}; echo >> {log}"
        (programs / name).write_text(f"#!/bin/bash\n{line}\n")
        (programs / name).chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    for block in BLOCKS:
        text = "set -u\n" + block.replace("HOST", "localhost")
        done = subprocess.run(["bash", "-c", text], cwd=place, env={"PATH": path}, text=True)
        assert done.returncode in (0, 1), block  # 1 is diff's
    return [shlex.split(line) for line in log.read_text().splitlines()]


def toy(script, argv):
    """A script's arguments, made small; what the README sets itself stays, but for the batch."""
    recipe = importlib.import_module(script).Recipe
    for flag, value in TOY.items():
        known = flag[2:].replace("-", "_") in {**vars(recipe), **vars(common._Flags)}
        if known and (flag not in argv or flag == "--batch-size"):
            argv = [*argv, flag, *value]
    return argv


def test_every_command_runs(place, commands, monkeypatch):
    """Every call of a script in a command block, in the README's order, at toy size, torchrun's in
    one process: none fails."""
    monkeypatch.chdir(place)
    run = []
    for program, *argv in commands:
        at = next((i for i, word in enumerate(argv) if word.endswith(".py")), None)
        if program == "python" and argv[0] == "-c":
            exec(argv[1], {})
        elif at is not None and "/" in argv[at]:
            assert (ROOT / argv[at]).exists()
        elif at is not None:
            script = argv[at].removesuffix(".py")
            call = [script, *toy(script, argv[at + 1 :])]
            if any(re.search("seed[12]", word) for word in call) or call in run:
                continue  # of three seeds one will do
            run.append(call)
            try:
                importlib.import_module(script).main(call[1:])
            except SystemExit as stop:
                assert stop.code == 0, call
    assert {script for script, *_ in run} == {*METHODS, "eval_linear", "finetune"}
    assert len(run) >= 40


DIFFS = re.findall(r"```diff\n# (\w+)\.py: (.*?)\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("script, name, text", DIFFS, ids=[name for _, name, _ in DIFFS])
def test_classroom_diffs_apply_and_train(script, name, text, small, tmp_path, monkeypatch):
    """The lines that an assignment takes away are in the script once; with those that come instead,
    fewer than 30 in all, it trains to the end."""
    source = (ROOT / f"{script}.py").read_text()
    assert sum(line[0] in "-+" for line in text.splitlines()) < 30
    for hunk in re.split(r"^@@\n", text, flags=re.MULTILINE):
        lines = hunk.splitlines(keepends=True)
        gone, come = ("".join(ln[1:] for ln in lines if ln[0] == sign) for sign in "-+")
        assert source.count(gone) == (1 if gone else len(source) + 1), gone
        source = source.replace(gone, come)
    (tmp_path / "assignment.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "assignment", raising=False)
    importlib.import_module("assignment").main(small)
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 4 and math.isfinite(log[-1]["loss"])


def test_there_are_three_diffs():
    """The two halves of the first assignment, and SimSiam."""
    assert len(DIFFS) == 3


@pytest.mark.parametrize("table", TABLES)
def test_tables_are_those_of_the_result_files(table):
    """Every table of numbers in the README is what tests/table.py makes of the result files."""
    assert table() in README


def test_the_first_table_repeats_the_demo():
    """Its last column has the linear accuracies of the demo's table."""
    linear = cells("linear_top1")
    for method, name in METHODS.items():
        row = next(line for line in README.splitlines() if line.startswith(f"| {name} | `"))
        means = [mean(linear[method, rho]).split(" ")[0] for rho in RHOS]
        assert f"| {' / '.join(means)} |" in row


@pytest.mark.parametrize("method", METHODS)
def test_docstrings_and_first_table_agree(method):
    """The accuracies of the released models are the same in both."""
    said = re.search(r"the released model (.+); not run", (ROOT / f"{method}.py").read_text())[1]
    cells = re.search(rf"^\| {METHODS[method]} \| `.+", README, re.MULTILINE)[0].split(" | ")
    rho2, rho4 = cells[5].split(" / ")
    assert said == f"{rho2} at rho 2" + f", {rho4} at rho 4" * (rho4 != "–")


@pytest.mark.parametrize("method", METHODS)
def test_what_the_readme_says_of_rho(method):
    """In the committed results rho 2 is above rho 1 and random weights in every seed, and rho 4
    above rho 2 in SimCLR and SwAV."""
    linear = cells("linear_top1")
    assert min(linear[method, 2]) > max(linear[method, 1] + seeds("random-seed?", "linear_top1"))
    if method in ("simclr", "swav"):
        assert min(linear[method, 4]) > max(linear[method, 2])


def test_paths_exist():
    """Every file that is named is there, but for those that a reader is told to make."""
    names = set(re.findall(r"`((?:tests/)?\w+\.(?:py|txt))`", README)) - {
        "nopredictor.py",
        "nostopgrad.py",
        "simsiam.py",
    }
    assert names and all((ROOT / name).exists() for name in names)


def test_links_inside():
    """Every link to a heading has one."""
    heads = re.findall(r"^## (.+)$", README, re.MULTILINE)
    there = {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}
    assert set(re.findall(r"\]\(#(.+?)\)", README)) <= there


def test_the_plot(tmp_path, monkeypatch):
    """The five lines that plot a log, on a log of a real run."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code = next(block for block in blocks if "matplotlib" in block)
    assert len(code.strip().splitlines()) <= 5
    folder = tmp_path / "out" / "byol-demo-rho2"
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text((RESULTS / "byol-rho2-seed0.jsonl").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    exec(code, {})
    assert (tmp_path / "log.png").stat().st_size > 1000


def test_slow_tests_wait_to_be_asked(capfd):
    """A plain pytest runs all tests but the slow ones, and -m slow runs these and nothing else."""
    files = [str(ROOT / f"tests/test_{name}.py") for name in ("slow", "readme")]
    collected = {}
    for words in ((), ("-m", "slow")):
        capfd.readouterr()
        assert pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *words, *files]) == 0
        lines = [line for line in capfd.readouterr().out.splitlines() if "::" in line]
        collected[words] = {line.split("::")[0].rpartition("/")[2] for line in lines}
    assert collected == {(): {"test_readme.py"}, ("-m", "slow"): {"test_slow.py"}}


def test_features_block(tmp_path, monkeypatch, capsys):
    """The block that reads features.npz names the five videos most like the first, in order."""
    import numpy as np

    (block,) = (b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "npz" in b)
    monkeypatch.chdir(tmp_path)
    angles = np.array([0.0, 0.5, 0.1, 3.0, 0.3, 0.2, 0.4])
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.arange(1, 8)[:, None]
    np.savez("features.npz", features=features, labels=angles, paths=np.array([*"abcdefg"]))
    exec(block, {})
    assert capsys.readouterr().out == "a ['c' 'f' 'e' 'g' 'b']\n"
