"""Fine-tuning: the official split files, training of all layers, what is reported."""

import json
import os
import signal
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import eval_linear
import finetune
from conftest import run_ranks
from videos import make_video


def clip(path, light):
    """A short noisy video, light or dark."""

    def shade(counter, width, height):
        noise = np.random.default_rng(counter).integers(0, 60, (height, width, 3))
        return (noise + (150 if light else 20)).astype(np.uint8)

    path.parent.mkdir(parents=True, exist_ok=True)
    make_video(path, n=10, size=(40, 30), counters=range(10), draw=shade, codec="mpeg4")


@pytest.fixture(scope="module")
def ucf101(tmp_path_factory):
    """The layout of UCF101: UCF-101/Class/*.avi and ucfTrainTestlist/*.txt, two classes."""
    root = tmp_path_factory.mktemp("UCF101")
    train, test = [], []
    for g in range(1, 7):
        for number, name in enumerate(("LightUp", "Darken"), start=1):
            video = f"{name}/v_{name}_g{g:02d}_c01.avi"
            clip(root / "UCF-101" / video, light=number == 1)
            train.append(f"{video} {number}") if g > 2 else test.append(video)
    lists = root / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 LightUp\r\n2 Darken\r\n")
    (lists / "trainlist01.txt").write_text("\r\n".join(train) + "\r\n")
    (lists / "testlist01.txt").write_text("\r\n".join(test) + "\r\n")
    return root


@pytest.fixture(scope="module")
def hmdb51(tmp_path_factory):
    """The layout of HMDB51: class/*.avi, and a file of each class and split with 0, 1 or 2."""
    root = tmp_path_factory.mktemp("HMDB51")
    splits = root / "testTrainMulti_7030_splits"
    splits.mkdir()
    for name in ("light_up", "darken"):
        lines = []
        for i in range(7):
            video = f"a_video_({i})_{name}_np1.avi"
            clip(root / name / video, light=name == "light_up")
            lines.append(f"{video} {(1, 1, 1, 1, 2, 2, 0)[i]} ")
        (splits / f"{name}_test_split2.txt").write_text("\n".join(lines) + "\n")
    return root


TINY = """--backbone tiny --frames 4 --stride 4 --size 16 --batch-size 4 --epochs 6 --workers 0
    --optimizer adamw --lr 0.02 --test-clips 2 --augment crop,flip --dropout 0.2""".split()


@pytest.fixture
def argv(ucf101, tmp_path):
    return ["--dataset", "ucf101", "--data", str(ucf101), "--out", str(tmp_path / "out"), *TINY]


def result_of(argv):
    return json.loads(Path(argv[argv.index("--out") + 1], "result.json").read_text())


def refused(argv, capfd):
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        finetune.main(argv)
    errors = capfd.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(errors) == 1, errors
    return errors[0]


def test_ucf101_lists(ucf101):
    """Official lists, 1-based labels, CRLF: the class is the folder; 8 to train on, 4 to test."""
    args = Namespace(dataset="ucf101", data=str(ucf101), split=1)
    train, test = finetune.rows(args), finetune.rows(args, "test")
    assert len(train) == 8 and len(test) == 4 and not set(train) & set(test)
    for path, label in train + test:
        assert Path(path).exists() and Path(path).parent.name == label
        assert ("_g01_" in path or "_g02_" in path) == ((path, label) in test)


def test_hmdb51_lists(hmdb51):
    """1 is training, 2 testing, 0 neither; names may hold brackets."""
    args = Namespace(dataset="hmdb51", data=str(hmdb51), split=2)
    train, test = finetune.rows(args), finetune.rows(args, "test")
    assert sorted(Path(path).name[9] for path, _ in train) == sorted("01230123")
    assert sorted(Path(path).name[9] for path, _ in test) == sorted("4545")
    assert all(Path(path).exists() and Path(path).parent.name == label for path, label in train)


@pytest.mark.parametrize("dataset, split", [("ucf101", 1), ("hmdb51", 2)])
def test_from_scratch_on_official_splits(dataset, split, argv, request, tmp_path):
    """Two classes that differ in brightness are learned; all layers move; the result says how."""
    root = request.getfixturevalue(dataset)
    flags = [*argv, "--dataset", dataset, "--data", str(root), "--split", str(split)]
    finetune.main(flags)
    result = result_of(argv)
    assert result["top1"] == 100 and result["n"] == 4 and result["classes"] == 2
    assert result["views"] == 6 and dataset in result["protocol"] and result["split"] == split
    torch.manual_seed(0)
    start = finetune.Classifier(Namespace(backbone="tiny", dropout=0.2, low_memory=False), 2)
    last = torch.load(tmp_path / "out/last.pth", weights_only=True)["model"]
    for name, p in start.named_parameters():
        assert not torch.equal(p, last[name]), name
    probe = ["--weights", str(tmp_path / "out/backbone.pth"), "--data", str(root), "--extract"]
    eval_linear.main(
        [*probe, str(tmp_path / "f.npz"), "--out", str(tmp_path / "p"), "--workers", "0"]
    )
    assert np.load(tmp_path / "f.npz")["features"].shape == (12 if dataset == "ucf101" else 14, 64)


def test_folder_from_weights(argv, ucf101, tmp_path, capfd):
    """--dataset folder, started from another run's backbone: all of its tensors are loaded."""
    finetune.main([*argv, "--epochs", "1"])
    rows = {
        part: finetune.rows(Namespace(dataset="ucf101", data=str(ucf101), split=1), part)
        for part in ("train", "test")
    }
    for part, name in (("train", "a.txt"), ("test", "b.txt")):
        (tmp_path / name).write_text("".join(f"{p}\t{label}\n" for p, label in rows[part]))
    flags = ["--data", str(tmp_path / "a.txt"), "--val", str(tmp_path / "b.txt"), *TINY, "--out"]
    weights = str(tmp_path / "out/backbone.pth")
    finetune.main([*flags, str(tmp_path / "two"), "--weights", weights, "--epochs", "1"])
    assert "weights: 30 of 30 backbone tensors" in capfd.readouterr().out
    assert result_of(["--out", str(tmp_path / "two")])["n"] == 4


def trained(argv, stop=0):
    if stop:
        update, count = common._Run.update, 0

        def counted(*args, **more):
            nonlocal count
            count += 1
            if count == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return update(*args, **more)

        common._Run.update = counted
    finetune.main(argv)


def test_dropout_and_all_resume_bit_equal(argv, tmp_path):
    """Stopped in mid-epoch and continued: weights and result of an undisturbed run."""
    run_ranks(1, trained, argv, 3)
    assert not (tmp_path / "out/result.json").exists()
    run_ranks(1, trained, argv)
    run_ranks(1, trained, [*argv, "--out", str(tmp_path / "whole")])
    states = [torch.load(tmp_path / f"{n}/last.pth", weights_only=True) for n in ("out", "whole")]
    assert all(torch.equal(t, states[1]["model"][k]) for k, t in states[0]["model"].items())
    one, two = (json.loads((tmp_path / f"{n}/result.json").read_text()) for n in ("out", "whole"))
    assert {**one, "command": ""} == {**two, "command": ""}


def test_every_test_video_is_scored_once_on_two_ranks(argv, tmp_path):
    """2 processes, 4 test videos, and 3 of them: n is their number."""
    run_ranks(2, trained, argv)
    assert result_of(argv)["n"] == 4 and result_of(argv)["top1"] == 100


@pytest.mark.parametrize("allowed", [False, True])
def test_a_missing_test_video(allowed, argv, ucf101, tmp_path, capfd):
    """Fatal and named; with --allow-missing left out, named and counted."""
    lists = tmp_path / "lists"
    lists.mkdir()
    for path in (ucf101 / "ucfTrainTestlist").iterdir():
        (lists / path.name).write_bytes(path.read_bytes())
    with open(lists / "testlist01.txt", "a") as file:
        file.write("Darken/v_Darken_g09_c09.avi\n")
    (tmp_path / "UCF-101").symlink_to(ucf101 / "UCF-101")
    for name in ("LightUp", "Darken"):
        (tmp_path / name).symlink_to(ucf101 / "UCF-101" / name)
    flags = [*argv, "--data", str(tmp_path), "--epochs", "1"]
    if allowed:
        finetune.main([*flags, "--allow-missing"])
        assert (result_of(argv)["n"], result_of(argv)["missing"]) == (4, 1)
        assert "v_Darken_g09_c09.avi" in capfd.readouterr().out
    else:
        assert "v_Darken_g09_c09.avi" in refused(flags, capfd)


@pytest.mark.parametrize(
    "wrong", ["--split 3", "--dataset kinetics", "--data nowhere", "--weights no.pth"]
)
def test_wrong_flags(wrong, argv, capfd):
    """One line that names what is wrong, exit code 2, before the work."""
    line = refused([*argv, *wrong.split()], capfd)
    assert wrong.split()[1] in line
