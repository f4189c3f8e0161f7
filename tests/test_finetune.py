"""Fine-tuning: the official split files, training of all layers, what is reported."""

import json
import os
import signal
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

import common
import eval_linear
import finetune
from conftest import run_ranks
from videos import make_video, read_counters


def clip(path, light, n=10, fps=30, codec="mpeg4"):
    """A short noisy video, light or dark; or light for the first `light` frames."""

    def shade(counter, width, height):
        noise = np.random.default_rng(counter).integers(0, 60, (height, width, 3))
        return (noise + (150 if counter < light * (1 if light > 1 else n) else 20)).astype(np.uint8)

    path.parent.mkdir(parents=True, exist_ok=True)
    make_video(path, n=n, fps=fps, size=(40, 30), draw=shade, codec=codec)


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


TEMPLATES = ["Dimming [something] with [something]", "Lighting [something]"]


@pytest.fixture(scope="module")
def ssv2(tmp_path_factory):
    """The layout of Something-Something v2: id.webm (one is an mp4 here), three json files."""
    root = tmp_path_factory.mktemp("ssv2")
    names = [template.replace("[", "").replace("]", "") for template in TEMPLATES]
    for part, first in (("train", 100), ("validation", 200)):
        entries = []
        for i in range(first, first + 6):
            ending = "mp4" if i == 100 else "webm"
            clip(root / "videos" / f"{i}.{ending}", i % 2, codec="libvpx" if i > 100 else "mpeg4")
            entry = {"id": str(i), "label": "a caption", "template": TEMPLATES[i % 2]}
            entries.append({**entry, "placeholders": ["a lamp"]})
        (root / f"something-something-v2-{part}.json").write_text(json.dumps(entries))
    labels = {name: str(number) for number, name in enumerate(names)}
    (root / "something-something-v2-labels.json").write_text(json.dumps(labels))
    return root


@pytest.fixture(scope="module")
def charades(tmp_path_factory):
    """The layout of Charades: c003 when it is light, c100 when dark, c050 never, in videos of 2 s
    that are light, then dark; commas and semicolons in quoted columns."""
    root = tmp_path_factory.mktemp("charades")
    columns = "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions"
    for part, first in (("train", 0), ("test", 50)):
        lines = [f"{columns},length"]
        for i in range(first, first + 6):
            light = (60, 0, 30)[i % 3]
            clip(root / "Charades_v1_480" / f"V{i:04d}.mp4", light, n=60)
            actions = [f"c003 0.00 {light / 30:.2f}"] * (light > 0)
            actions += [f"c100 {light / 30:.2f} 2.00"] * (light < 60)
            texts = f'A,Attic,6,7,Yes,"A, then B; ""C""",lamp,"one\ntwo",{";".join(actions)},2.0'
            lines.append(f"V{i:04d},{texts}")
        (root / f"Charades_v1_{part}.csv").write_text("\n".join(lines) + "\n")
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
    args = Namespace(dataset="ucf101", data=str(ucf101), split=1, allow_missing=False)
    train, test = finetune.rows(args), finetune.rows(args, "test")
    assert len(train) == 8 and len(test) == 4 and not set(train) & set(test)
    for path, label in train + test:
        assert Path(path).exists() and Path(path).parent.name == label
        assert ("_g01_" in path or "_g02_" in path) == ((path, label) in test)


def test_hmdb51_lists(hmdb51):
    """1 is training, 2 testing, 0 neither; names may hold brackets."""
    args = Namespace(dataset="hmdb51", data=str(hmdb51), split=2, allow_missing=False)
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
        part: finetune.rows(
            Namespace(dataset="ucf101", data=str(ucf101), split=1, allow_missing=False), part
        )
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


def test_ssv2_lists(ssv2, tmp_path):
    """Templates without their brackets are the classes; both releases' names of the files."""
    args = Namespace(dataset="ssv2", data=str(ssv2), allow_missing=False)
    found = finetune.rows(args) + finetune.rows(args, "test")
    assert len(found) == 12 and all(Path(path).exists() for path, _ in found)
    for path, label in found:
        lights = int(Path(path).stem) % 2
        assert label == ("Lighting something" if lights else "Dimming something with something")
    for path in ssv2.glob("*.json"):
        short = path.name.removeprefix("something-something-v2-")
        (tmp_path / short).write_bytes(path.read_bytes())
    assert finetune.listed(Namespace(dataset="ssv2", data=str(tmp_path)), "test") == [
        (f"{i}.webm", found[i % 2][1]) for i in range(200, 206)
    ]


def test_segments_cover_the_whole_video(tmp_path):
    """Of 80 frames one from each ten, at random; without randomness the middle one; from two clips
    the frames at a quarter and three quarters."""
    path = make_video(tmp_path / "a.mp4", n=80, fps=24, size=(96, 64))
    args = Namespace(frames=8, test_clips=1)
    seen = set()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        starts = partial(finetune.segments, args, span=0, rho=1, rng=rng)
        (clip,) = common.read_clips(path, starts, 8, 99)
        numbers = read_counters(clip)
        assert [number // 10 for number in numbers] == [*range(8)]
        seen |= {number % 10 for number in numbers}
    assert seen == set(range(10))
    for clips, within in ((1, [5]), (2, [2, 7])):
        args.test_clips = clips
        pictures = common.read_clips(path, partial(finetune.segments, args, span=0), 8, 99)
        assert [read_counters(clip) for clip in pictures] == [
            [10 * part + i for part in range(8)] for i in within
        ]


def test_charades_lists(charades):
    """Every action with its times; the videos have no single class."""
    args = Namespace(dataset="charades", data=str(charades), allow_missing=False)
    train, test = finetune.listed(args, "train"), finetune.listed(args, "test")
    both = [(3, 0.0, 1.0), (100, 1.0, 2.0)]
    assert [actions for _, actions in train] == 2 * [[(3, 0.0, 2.0)], [(100, 0.0, 2.0)], both]
    assert [name for name, _ in test] == [f"V{i:04d}.mp4" for i in range(50, 56)]
    assert all(Path(path).exists() and not label for path, label in finetune.rows(args))


def test_targets_are_the_actions_during_the_clip():
    """Clips of 8 frames 4 apart last 28/30 s: an action counts if they meet, ends included."""
    args = Namespace(frames=8, stride=4)
    notes = [[], [(5, 1.0, 2.0), (6, 3.0, 4.0), (5, 9.0, 9.5)], [(0, 0.0, 0.5), (156, 0.0, 30.0)]]
    cases = [(1, 1.2, {5}), (1, 0.0, set()), (1, 2.0, {5}), (1, 2.1, {6}), (1, 9.4, {5})]
    cases += [(1, 0.07, {5}), (2, 0.5, {0, 156}), (2, 20.0, {156}), (0, 1.0, set())]
    starts = torch.tensor([[start] for _, start, _ in cases])
    step = Namespace(labels=torch.tensor([i for i, _, _ in cases]), starts=starts)
    found = finetune.targets(args, notes, step)
    assert found.shape == (9, 157)
    assert [{*row.nonzero()[:, 0].tolist()} for row in found] == [case[2] for case in cases]
    assert finetune.active(notes[1]).sum() == 2


@pytest.mark.parametrize("levels", [3, 10**6])
def test_average_precision(levels):
    """Equals scikit-learn's and a loop over all thresholds, with equal scores and without."""
    rng = np.random.default_rng(levels)
    for n in (1, 2, 40):
        scores = rng.integers(0, levels, n) / levels
        positive = rng.random(n) < 0.3
        positive[0] = True
        expected, recall = 0.0, 0.0
        for threshold in sorted({*scores}, reverse=True):
            chosen = positive[scores >= threshold]
            expected += (chosen.sum() / positive.sum() - recall) * chosen.mean()
            recall = chosen.sum() / positive.sum()
        ours = finetune.average_precision(scores, positive)
        assert ours == pytest.approx(expected, abs=1e-12)
        assert ours == pytest.approx(average_precision_score(positive, scores), abs=1e-12)
    assert np.isnan(finetune.average_precision(scores, positive & False))


def test_map_is_over_the_classes_that_occur():
    """A class without positives is no 0 in the mean."""
    scores = torch.tensor([[0.9, 0.1, 0.4], [0.2, 0.8, 0.6]])
    truth = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    numbers = finetune.precisions(["a", "b", "c"], scores, truth)
    assert numbers == {"map": 75.0, "per_class": {"a": 100.0, "c": 50.0}}


def test_ssv2_end_to_end(argv, ssv2, tmp_path):
    """One view of the whole video; 100 % on two classes of brightness; they can be shown."""
    flags = [*argv, "--dataset", "ssv2", "--data", str(ssv2), "--test-clips", "1"]
    finetune.main([*flags, "--show-views", str(tmp_path / "views.png")])
    assert (tmp_path / "views.png").read_bytes()[1:4] == b"PNG"
    finetune.main(flags)
    result = result_of(argv)
    assert result["top1"] == 100 and result["n"] == 6 and result["classes"] == 2


def test_charades_end_to_end(argv, charades):
    """The two actions that occur are told apart; a video may have both; views are 2 x 3."""
    flags = ["--dataset", "charades", "--data", str(charades), "--lr-steps", "9", "--epochs", "12"]
    finetune.main([*argv, *flags])
    result = result_of(argv)
    assert result["map"] > 90 and set(result["per_class"]) == {"c003", "c100"}
    assert result["n"] == 6 and result["classes"] == 157 and result["views"] == 6
    assert "top1" not in result


def test_charades_on_two_ranks_is_charades_on_one(argv, charades, tmp_path):
    """6 test videos on 2 processes: each scored once, and the same mAP from the same weights."""
    flags = [*argv, "--dataset", "charades", "--data", str(charades), "--dropout", "0"]
    run_ranks(2, trained, [*flags, "--warmup-epochs", "0", "--epochs", "1"])
    two = result_of(argv)
    (tmp_path / "out/result.json").unlink()
    run_ranks(1, trained, [*flags, "--warmup-epochs", "0", "--epochs", "1"])
    one = result_of(argv)  # of the finished run, scored again
    assert {**one, "command": ""} == {**two, "command": ""} and two["n"] == 6


def test_settings_of_a_data_set_and_flags_that_win():
    """A data set brings the study's numbers, a flag wins wherever it stands; --small wins."""
    parse = lambda words: common._parse(finetune.Recipe, finetune.with_settings(words.split()))  # noqa: E731
    args = parse("--lr 3 --dataset ssv2 --data x")
    assert (args.lr, args.epochs, args.lr_steps, args.augment) == (3, 22, (14, 18), "crop")
    assert (args.test_clips, args.test_crops) == (1, 1)
    args = parse("--data x --dataset=charades --lr-steps 5")
    assert (args.lr, args.epochs, args.lr_steps, args.dropout) == (0.15, 57, (5,), 0.5)
    args = parse("--data x --dataset ucf101")
    assert (args.lr, args.epochs, args.lr_steps, args.dropout) == (0.01, 200, (0,), 0.8)
    assert parse("--data x --dataset ssv2 --small").epochs == 40


def test_learning_rate_in_steps():
    """A tenth from each step on, after a linear warm-up; SSv2's numbers."""
    args = Namespace(lr=0.12, batch_size=64, views=1, epochs=22, warmup_epochs=0.2)
    args.lr_steps = (14.0, 18.0)
    at = {0.1: 0.06006, 0.2: 0.12, 13.9: 0.12, 14: 0.012, 17.9: 0.012, 18: 0.0012, 22: 0.0012}
    for epoch, rate in at.items():
        assert common.learning_rate(args, epoch) == pytest.approx(rate, rel=1e-9)


@pytest.mark.parametrize("dataset", ["ssv2", "charades"])
def test_lists_that_are_damaged(dataset, request, argv, tmp_path, capfd):
    """A template without a label, an action without times, a missing test video: named, exit 2."""
    root = request.getfixturevalue(dataset)
    flags = [*argv, "--dataset", dataset, "--data", str(tmp_path)]
    for path in root.iterdir():
        (tmp_path / path.name).symlink_to(path)
    name = {"ssv2": "something-something-v2-train.json", "charades": "Charades_v1_train.csv"}
    path = tmp_path / name[dataset]
    text = path.read_text()
    path.unlink()
    path.write_text(text.replace("Lighting", "Burning").replace("c003 0.00", "c003"))
    assert {"ssv2": "Burning something", "charades": "unpack"}[dataset] in refused(flags, capfd)
    path.write_text(text)
    name = {"ssv2": "something-something-v2-validation.json", "charades": "Charades_v1_test.csv"}
    path = tmp_path / name[dataset]
    text = path.read_text()
    path.unlink()
    path.write_text(text.replace('"201"', '"777"').replace("V0051", "V0777"))
    line = refused(flags, capfd)
    assert "1 of 6 test videos" in line and "777" in line
    assert not (tmp_path / "out/last.pth").exists()
