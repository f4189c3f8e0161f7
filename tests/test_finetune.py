"""Fine-tuning: the official split files, training of all layers, what is reported."""

import json
import math
import os
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score

import common
import conftest
import eval_linear
import finetune
from conftest import result_of, run_ranks
from videos import make_video, read_counters

TINY = """--backbone tiny --frames 4 --stride 4 --size 16 --batch-size 4 --epochs 6 --workers 0
    --optimizer adamw --lr 0.02 --test-clips 2 --augment crop,flip --dropout 0.2""".split()


@pytest.fixture
def argv(ucf101, tmp_path):
    return ["--dataset", "ucf101", "--data", str(ucf101), "--out", str(tmp_path / "out"), *TINY]


refused = partial(conftest.refused, finetune)


def settings(**given):
    """The settings of finetune.py with these flags, without a command line."""
    cfg = finetune.Config(**given)
    cfg.given = set(given)
    return cfg


def listed(cfg, part):
    """What the official files say of a part: [(name, class or note)]."""
    return finetune.PARSERS[cfg.dataset](cfg, part)


def key_frame(second, people):
    """A note of AVA: people {box: actions from 0} of a key frame, whose boxes are scored."""
    boxes = np.array([*people])
    labels = np.array([np.isin(range(80), actions) for actions in people.values()])
    return second, boxes, boxes, labels


def test_ucf101_lists(ucf101):
    """Official lists, 1-based labels, CRLF: the class is the folder; 8 to train on, 4 to test."""
    cfg = settings(dataset="ucf101", data=str(ucf101))
    parts = [finetune.listed_videos(cfg, part) for part in ("train", "test")]
    train, test = ([*zip(*part, strict=True)] for part in parts)
    assert len(train) == 8 and len(test) == 4 and not set(train) & set(test)
    for path, label in train + test:
        assert Path(path).exists() and Path(path).parent.name == label
        assert ("_g01_" in path or "_g02_" in path) == ((path, label) in test)


def test_hmdb51_lists(hmdb51):
    """1 is training, 2 testing, 0 neither; names may hold brackets."""
    cfg = settings(dataset="hmdb51", data=str(hmdb51), split=2)
    (train, labels), (test, _) = (finetune.listed_videos(cfg, part) for part in ("train", "test"))
    assert sorted(Path(path).name[9] for path in train) == sorted("01230123")
    assert sorted(Path(path).name[9] for path in test) == sorted("4545")
    assert all(Path(path).exists() for path in train)
    assert [Path(path).parent.name for path in train] == list(labels)


@pytest.mark.parametrize("dataset, split", [("ucf101", 1), ("hmdb51", 2)])
def test_from_scratch_on_official_splits(dataset, split, argv, request, tmp_path):
    """Two classes that differ in brightness are learned; all layers move; the result says how."""
    root = request.getfixturevalue(dataset)
    flags = [*argv, "--dataset", dataset, "--data", str(root), "--split", str(split)]
    finetune.main(flags)
    result = result_of(argv)
    assert result["top1"] == 100 and result["n"] == 4 and result["classes"] == 2
    assert result["views"] == 6 and dataset in result["protocol"] and result["split"] == split
    assert result["recipe"] == "paper"
    torch.manual_seed(0)
    start = finetune.Classifier(settings(backbone="tiny", dropout=0.2), 2)
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
    cfg = settings(dataset="ucf101", data=str(ucf101))
    for part, name in (("train", "a.txt"), ("test", "b.txt")):
        rows = zip(*finetune.listed_videos(cfg, part), strict=True)
        (tmp_path / name).write_text("".join(f"{path}\t{label}\n" for path, label in rows))
    flags = ["--data", str(tmp_path / "a.txt"), "--val", str(tmp_path / "b.txt"), *TINY, "--out"]
    weights = str(tmp_path / "out/backbone.pth")
    finetune.main([*flags, str(tmp_path / "two"), "--weights", weights, "--epochs", "1"])
    assert "weights: 30 of 30 backbone tensors" in capfd.readouterr().out
    assert result_of(["--out", str(tmp_path / "two")])["n"] == 4


def trained(argv, stop=0):
    if stop:
        record, count = common.Run.record, 0

        def counted(*args, **more):
            nonlocal count
            count += 1
            if count == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return record(*args, **more)

        common.Run.record = counted
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


def _dropped(argv):
    masks, forward = [], torch.nn.Dropout.forward

    def noted(self, x):
        x = forward(self, x)
        if self.training:
            masks.append((x != 0).numpy().tobytes())
        return x

    torch.nn.Dropout.forward = noted
    finetune.main(argv)
    return masks


def test_chance_level():
    """A chance level of another number of classes, or of actions that are all equally frequent."""
    data = SimpleNamespace(classes=["a", "b", "c", "d", "e"])
    assert finetune.chance_level(data) == pytest.approx(math.log(5))
    targets = [torch.tensor([1.0, 0.0]), torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])]

    class Actions(SimpleNamespace):
        __len__ = targets.__len__

    data = Actions(classes=[], target=targets.__getitem__)  # shares 2/4 and 1/4
    entropies = [-sum(p * math.log(p) for p in (share, 1 - share)) for share in (1 / 2, 1 / 4)]
    assert finetune.chance_level(data) == pytest.approx(sum(entropies) / 2)


def test_dropout_is_drawn_for_every_step_and_rank(argv):
    """The same features dropped in every step, or on every rank."""
    flags = ["--dropout", "0.5", "--epochs", "3", "--test-clips", "1", "--test-crops", "1"]
    masks = sum(run_ranks(2, _dropped, [*argv, *flags]), [])
    assert len(masks) == len(set(masks)) == 12


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
        assert "v_Darken_g09_c09" in capfd.readouterr().out
    else:
        assert "v_Darken_g09_c09" in refused(flags, capfd)


@pytest.mark.parametrize(
    "wrong", ["--split 3", "--dataset k700", "--data nowhere", "--weights no.pth"]
)
def test_wrong_flags(wrong, argv, capfd):
    """One line that names what is wrong, exit code 2, before the work."""
    line = refused([*argv, *wrong.split()], capfd)
    assert wrong.split()[1] in line


def test_ssv2_lists(ssv2, tmp_path):
    """Templates without their brackets are the classes; both releases' names of the files."""
    cfg = settings(dataset="ssv2", data=str(ssv2))
    parts = [finetune.listed_videos(cfg, part) for part in ("train", "test")]
    found = [pair for part in parts for pair in zip(*part, strict=True)]
    assert len(found) == 12 and all(Path(path).exists() for path, _ in found)
    for path, label in found:
        lights = int(Path(path).stem) % 2
        assert label == ("Lighting something" if lights else "Dimming something with something")
    for path in ssv2.glob("*.json"):
        short = path.name.removeprefix("something-something-v2-")
        (tmp_path / short).write_bytes(path.read_bytes())
    assert listed(settings(dataset="ssv2", data=str(tmp_path)), "test") == [
        (f"{i}.webm", found[i % 2][1]) for i in range(200, 206)
    ]


def test_segments_cover_the_whole_video(tmp_path):
    """Of 80 frames one from each ten, at random; without randomness the middle one; from two clips
    the frames at a quarter and three quarters."""
    path = make_video(tmp_path / "a.mp4", n=80, fps=24, size=(96, 64))
    duration = common.VideoReader(path).duration

    def numbers(test_clips=1, **changes):
        cfg = settings(frames=8, test_clips=test_clips)
        times = finetune.segments(cfg, duration, **changes)
        return [read_counters(clip) for clip in common.read_clips(path, times, 8, 99)]

    seen = set()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        (clip,) = numbers(clip_seconds=0, rho=1, timespan=None, rng=rng)
        assert [number // 10 for number in clip] == [*range(8)]
        seen |= {number % 10 for number in clip}
    assert seen == set(range(10))
    assert numbers() == [[10 * part + 5 for part in range(8)]]
    assert numbers(test_clips=2) == [[10 * part + i for part in range(8)] for i in (2, 7)]


def test_charades_lists(charades):
    """Every action with its times; the videos have no single class."""
    cfg = settings(dataset="charades", data=str(charades))
    train, test = listed(cfg, "train"), listed(cfg, "test")
    both = [(3, 0.0, 1.0), (100, 1.0, 2.0)]
    assert [actions for _, actions in train] == 2 * [[(3, 0.0, 2.0)], [(100, 0.0, 2.0)], both]
    assert [name for name, _ in test] == [f"V{i:04d}.mp4" for i in range(50, 56)]
    dataset = finetune.Charades(cfg, *finetune.listed_videos(cfg, "train"))
    assert all(Path(dataset.paths[i]).exists() for i in range(6)) and (dataset.labels == -1).all()


def test_targets_are_the_actions_during_the_clip(monkeypatch):
    """Clips of 8 frames 4 apart last 28/30 s: an action counts if they meet, ends included."""
    notes = [[], [(5, 1.0, 2.0), (6, 3.0, 4.0), (5, 9.0, 9.5)], [(0, 0.0, 0.5), (156, 0.0, 30.0)]]
    cases = [(1, 1.2, {5}), (1, 0.0, set()), (1, 2.0, {5}), (1, 2.1, {6}), (1, 9.4, {5})]
    cases += [(1, 0.07, {5}), (2, 0.5, {0, 156}), (2, 20.0, {156}), (0, 1.0, set())]
    cfg = settings(dataset="charades", frames=8, stride=4)
    dataset = finetune.Charades(cfg, ["a", "b", "c"], notes)
    for index, start, expected in cases:
        item = {"starts": torch.tensor([start], dtype=torch.float64)}
        monkeypatch.setattr(common.VideoClips, "item", lambda *_, item=item: item)
        target = dataset.item(index, None)["target"]
        assert target.shape == (157,) and {*target.nonzero()[:, 0].tolist()} == expected
    assert dataset.target(1).sum() == 2


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
        ours = finetune.average_precision(scores, positive, positive.sum())
        assert ours == pytest.approx(expected, abs=1e-12)
        assert ours == pytest.approx(average_precision_score(positive, scores), abs=1e-12)


def test_map_is_over_the_classes_that_occur():
    """A class without positives is no 0 in the mean, a column without a name is not in it."""
    scores = np.tile([[0.9], [0.8]], 4)
    positive = np.array([[1, 0, 0, 1], [0, 0, 1, 1]])
    classes = {0: "a", 1: "b", 2: "c"}
    numbers = finetune.mean_precision(classes, scores, positive, positive.sum(0))
    assert numbers == {"map": 75.0, "per_class": {"a": 100.0, "c": 50.0}}


def test_ssv2_end_to_end(argv, ssv2):
    """One view of the whole video; 100 % on two classes of brightness."""
    flags = [*argv, "--dataset", "ssv2", "--data", str(ssv2), "--test-clips", "1"]
    finetune.main(flags)
    result = result_of(argv)
    assert result["top1"] == 100 and result["n"] == 6 and result["classes"] == 2


def test_charades_end_to_end(argv, charades):
    """The two actions that occur are told apart; a video may have both; views are 2 x 3."""
    flags = [
        "--dataset",
        "charades",
        "--data",
        str(charades),
        "--lr-steps",
        "0.75",
        "--epochs",
        "12",
    ]
    finetune.main([*argv, *flags])
    result = result_of(argv)
    assert result["map"] > 90 and set(result["per_class"]) == {"c003", "c100"}
    assert result["n"] == 6 and result["classes"] == 157 and result["views"] == 6
    assert "top1" not in result


def test_charades_on_two_ranks_is_charades_on_one(argv, charades, tmp_path):
    """6 test videos on 2 processes: each scored once, and the same mAP from the same weights."""
    flags = [*argv, "--dataset", "charades", "--data", str(charades), "--dropout", "0"]
    run_ranks(2, trained, [*flags, "--warmup", "0", "--epochs", "1"])
    two = result_of(argv)
    (tmp_path / "out/result.json").unlink()
    run_ranks(1, trained, [*flags, "--warmup", "0", "--epochs", "1"])
    one = result_of(argv)  # of the finished run, scored again
    assert {**one, "command": ""} == {**two, "command": ""} and two["n"] == 6


def parsed(words):
    cfg = common.parse_args(finetune.Config, finetune.DEMO, words.split())
    finetune.use_settings(cfg, eval_linear.fill_settings(cfg))
    return cfg


def test_settings_of_a_data_set_and_flags_that_win():
    """A data set brings the paper's numbers, --recipe released the released code's; a flag wins
    wherever it stands; --small wins over the data set."""
    cfg = parsed("--lr 3 --dataset ssv2 --data x")
    assert (cfg.lr, cfg.epochs, cfg.augment) == (3, 22, "crop")
    assert cfg.lr_steps == (14 / 22, 18 / 22)
    assert (cfg.test_clips, cfg.test_crops, cfg.weight_decay, cfg.dropout) == (1, 1, 1e-6, 0.5)
    cfg = parsed("--data x --dataset=charades --lr-steps 0.5")
    assert (cfg.lr, cfg.epochs, cfg.lr_steps, cfg.dropout) == (0.2, 60, (0.5,), 0.5)
    assert (cfg.frames, cfg.stride, cfg.test_clips, cfg.test_crops) == (16, 8, 10, 3)
    cfg = parsed("--data x --dataset charades --recipe released")
    assert (cfg.lr, cfg.epochs, cfg.lr_steps) == (0.15, 57, (41 / 57, 49 / 57))
    for dataset in ("ucf101", "hmdb51"):
        cfg = parsed(f"--data x --dataset {dataset}")
        assert (cfg.lr, cfg.epochs, cfg.lr_steps) == (0.025, 200, (0.3, 0.6, 0.9))
        assert (cfg.augment, cfg.dropout) == ("crop,flip", 0.8)
        assert (cfg.weight_decay, cfg.sync_bn) == (0.0, True)
        cfg = parsed(f"--data x --dataset {dataset} --recipe released")
        assert (cfg.lr, cfg.epochs, cfg.lr_steps) == (0.01, 200, ())
        assert (cfg.augment, cfg.dropout) == ("crop,flip,tint", 0.8)
        assert (cfg.weight_decay, cfg.sync_bn) == (0.0, True)
    cfg = parsed("--data x --dataset kinetics")
    assert (cfg.lr, cfg.epochs, cfg.lr_steps, cfg.warmup) == (0.1, 196, (), 34 / 196)
    assert (cfg.weight_decay, cfg.dropout, cfg.sync_bn) == (1e-4, 0.5, False)
    assert parsed("--data x --dataset ucf101 --lr-steps 0").lr_steps == ()
    cfg = parsed("--data x --dataset ssv2 --small")
    assert (cfg.epochs, cfg.augment) == (40, "crop")  # left and right are classes
    assert parsed("--data x --small --recipe released").recipe == "demo"
    cfg = parsed("--data x --dataset ssv2 --small --augment crop,flip")
    assert cfg.augment == "crop,flip"
    cfg = parsed("--data x --dataset ava --epochs 8")  # steps are shares of the run
    assert (cfg.lr_steps, cfg.warmup, cfg.epochs) == ((0.5, 0.75, 0.875), 5.3 / 32, 8)
    assert (cfg.lr, cfg.box_score, cfg.weight_decay) == (0.3, 0.8, 1e-7)
    assert parsed("--data x --dataset ava --lr-steps 0.5").lr_steps == (0.5,)
    assert parsed("--data x --dataset ava --recipe released").box_score == 0.9


@pytest.mark.parametrize("script, lr", [("finetune", 0.05), ("moco", 0.3)])
def test_what_weights_say(script, lr, tmp_path, capfd):
    """From supervised weights AVA starts at 0.05 (paper). After MoCo the released BN is a hint,
    which changes nothing, and is not there where the flag is given. 16x8 clips of Charades from
    8x8 weights; another data set has the weights' clips."""
    path = tmp_path / "backbone.pth"
    config = {"script": script, "backbone": "tiny", "frames": 4, "stride": 2, "size": 32}
    torch.save({"state_dict": {}, "config": config}, path)
    cfg = parsed(f"--data x --dataset ava --weights {path}")
    assert (cfg.lr, cfg.sync_bn, cfg.backbone) == (lr, True, "tiny")
    assert ("--no-sync-bn" in capfd.readouterr().out) == (script == "moco")
    assert parsed(f"--data x --dataset ava --weights {path} --lr 1").lr == 1
    capfd.readouterr()
    cfg = parsed(f"--data x --dataset charades --weights {path} --no-sync-bn")
    assert (cfg.frames, cfg.stride, cfg.size, cfg.short_side) == (16, 8, 32, (37, 46))
    assert "--no-sync-bn" not in capfd.readouterr().out
    cfg = parsed(f"--data x --dataset ucf101 --weights {path}")
    assert (cfg.frames, cfg.stride) == (4, 2)


def test_learning_rate_in_steps():
    """A tenth from each step on, after a linear warm-up; SSv2's numbers."""
    cfg = settings(lr=0.12, batch_size=64, warmup=0.2 / 22, lr_steps=(14 / 22, 18 / 22))
    at = {0.1: 0.06006, 0.2: 0.12, 13.9: 0.12, 14: 0.012, 17.9: 0.012, 18: 0.0012, 22: 0.0012}
    for epoch, rate in at.items():
        assert common.learning_rate(cfg, epoch / 22) == pytest.approx(rate, rel=1e-9)


def test_steps_in_epochs_are_refused(capfd):
    """--lr-steps are shares of the run: a step in epochs would never come."""
    with pytest.raises(SystemExit):
        parsed("--data x --dataset ucf101 --lr-steps 60 120")
    assert "shares of the run" in capfd.readouterr().err


@pytest.mark.parametrize("dataset", ["ssv2", "charades"])
def test_lists_that_are_damaged(dataset, request, argv, tmp_path, capfd):
    """A template that differs from those of the test videos, an action without times, a missing
    test video: named, exit 2."""
    root = request.getfixturevalue(dataset)
    flags = [*argv, "--dataset", dataset, "--data", str(tmp_path)]
    for path in root.iterdir():
        (tmp_path / path.name).symlink_to(path)
    name = {"ssv2": "something-something-v2-train.json", "charades": "Charades_v1_train.csv"}
    path = tmp_path / name[dataset]
    text = path.read_text()
    path.unlink()
    path.write_text(text.replace("Lighting", "Burning").replace("c003 0.00", "c003"))
    assert {"ssv2": "Lighting something", "charades": "unpack"}[dataset] in refused(flags, capfd)
    path.write_text(text)
    name = {"ssv2": "something-something-v2-validation.json", "charades": "Charades_v1_test.csv"}
    path = tmp_path / name[dataset]
    text = path.read_text()
    path.unlink()
    path.write_text(text.replace('"201"', '"777"').replace("V0051", "V0777"))
    line = refused(flags, capfd)
    assert "1 of 6 test videos" in line and "777" in line
    assert not (tmp_path / "out/last.pth").exists()


def test_ava_lists(ava):
    """A key frame has its boxes, a box all of its actions, from 0; excluded and empty ones are not
    there; the classes that count are those of the list."""
    cfg = settings(dataset="ava", data=str(ava))
    train, test = listed(cfg, "train"), listed(cfg, "test")
    assert len(train) == 12
    assert all(Path(path).exists() for path in finetune.listed_videos(cfg, "train")[0])
    left, right = (0.05, 0.1, 0.45, 0.9), (0.55, 0.1, 0.95, 0.9)
    name, (second, boxes, people, labels) = train[0]
    assert name == "-a_5BBWC4.mp4" and second == 902 and boxes is people
    assert boxes.tolist() == [[*left], [*right]] and labels.shape == (2, 80)
    assert np.argwhere(labels).tolist() == [[0, 11], [0, 63], [1, 79]]
    assert np.argwhere(train[3][1][3]).tolist() == [[0, 79], [1, 11], [1, 63]]
    keys = [(name[1], second) for name, (second, *_) in test]
    assert keys == [("e", 902), ("e", 904), ("f", 902), ("f", 903), ("f", 904)]
    names = {11: "stand", 79: "watch (a person)", 0: "bend/bow (at the waist)"}
    assert finetune.ava_classes(cfg) == names


@pytest.mark.parametrize("least", [0.8, 0.9])
def test_ava_detections(least, ava, tmp_path):
    """Boxes with a score of 0.8 or more (the released code's 0.9), whatever their action column
    says; no others. Key frames without one keep their people, who are missed."""
    lines = ["-e_5BBWC4,0902,0.1,0.1,0.4,0.9,,0.950000", "-e_5BBWC4,902,0.2,0.1,0.4,0.9,,0.79"]
    lines += ["-e_5BBWC4,0903,0.1,0.1,0.4,0.9,,0.99", "-e_5BBWC4,0902,0.6,0.1,0.9,0.9,-1,0.9"]
    lines += ["-e_5BBWC4,0902,0.5,0.1,0.9,0.9,-1,0.8"]
    (tmp_path / "boxes.csv").write_text("\n".join(lines) + "\n")
    boxes = str(tmp_path / "boxes.csv")
    cfg = settings(dataset="ava", data=str(ava), boxes=boxes, box_score=least)
    (name, (second, boxes, people, labels)), *others = listed(cfg, "test")
    assert (name, second) == ("-e_5BBWC4.mp4", 902)
    expected = [[0.1, 0.1, 0.4, 0.9], [0.6, 0.1, 0.9, 0.9], [0.5, 0.1, 0.9, 0.9]]
    expected = expected[: 2 if least == 0.9 else 3]
    assert boxes.tolist() == expected
    assert people.tolist() == [[0.05, 0.1, 0.45, 0.9], [0.55, 0.1, 0.95, 0.9]]
    assert np.argwhere(labels).tolist() == [[0, 11], [0, 63], [1, 79]]
    assert [(name[1], second) for name, (second, *_) in others] == [
        ("e", 904),
        ("f", 902),
        ("f", 903),
        ("f", 904),
    ]
    assert all((len(boxes), len(people)) == (0, 2) for _, (_, boxes, people, _) in others)


def test_detections_where_nobody_is_annotated(ava, tmp_path):
    """They are wrong, not left out."""
    (tmp_path / "boxes.csv").write_text("-e_5BBWC4,0905,0.1,0.1,0.4,0.9,,0.95\n")
    cfg = settings(dataset="ava", data=str(ava), boxes=str(tmp_path / "boxes.csv"))
    (name, (second, boxes, people, labels)), *others = listed(cfg, "test")
    assert (name, second, len(boxes), len(others)) == ("-e_5BBWC4.mp4", 905, 1, 5)
    assert people.shape == (0, 4) and labels.shape == (0, 80)


def test_key_frame_is_in_the_middle_of_its_clip(tmp_path):
    """Second 902 of a cut is its frame 60 at 30 a second, frames c - 32, c - 24, ... c + 24 are
    taken; the same second of a whole film is at 902 s."""
    cut = make_video(tmp_path / "cut.mp4", n=150, fps=30)
    film = make_video(tmp_path / "film.mp4", n=1300, fps=1, size=(48, 32), codec="mpeg4")
    note = key_frame(902, {(0.1, 0.1, 0.9, 0.9): [5]})
    cfg = settings(dataset="ava", frames=8, stride=8)
    dataset = finetune.AVA(cfg, [str(cut), str(film)], [note, note])
    clips = [dataset.whole(i, 32)[0].permute(0, 2, 3, 1).numpy() for i in (0, 1)]
    assert read_counters(clips[0]) == [*range(28, 92, 8)]
    assert read_counters(clips[1]) == [900, 901, 901, 901, 902, 902, 902, 902]


@pytest.mark.parametrize("augment", ["crop,flip", "crop,flip,rotate,tint"])
def test_boxes_follow_the_picture(augment, tmp_path):
    """In 12 random views, some of them flipped or rotated, the box is where the light rectangle is,
    cut at the edges; a whole picture has it at its shares."""

    def rectangle(counter, width, height):
        picture = np.zeros((height, width, 3), np.uint8)
        picture[height // 4 : height // 2, width // 10 : width // 2] = 255
        return picture

    path = make_video(tmp_path / "a.mp4", n=10, size=(160, 96), draw=rectangle)
    cfg = settings(dataset="ava", frames=2, stride=1, size=64, augment=augment)
    cfg.short_side = (72, 90)
    note = key_frame(900, {(0.1, 0.25, 0.5, 0.5): [3, 5]})
    dataset = finetune.AVA(cfg, [str(path)], [note])
    lefts = []
    for epoch in range(12):
        item = dataset[epoch, 0]
        clip = item["clips"][0]  # (3, T, H, W)
        light = (clip[0, 0] > 0).nonzero()
        (y1, x1), (y2, x2) = light.amin(0).tolist(), (light.amax(0) + 1).tolist()
        found = item["boxes"][0].tolist()
        assert np.abs(np.subtract(found, [x1, y1, x2, y2])).max() <= 1.5, (epoch, found)
        assert item["target"].nonzero().tolist() == [[0, 3], [0, 5]]
        lefts.append(x1)
    assert min(lefts) == 0 and max(lefts) > 20  # cut at the left edge, and in the right half
    assert all(torch.equal(dataset[11, 0][name], item[name]) for name in ("clips", "boxes"))
    assert dataset.whole(0, 96)[1].tolist()[0] == [16, 24, 80, 48]


@pytest.mark.parametrize("name", ["noise", "sobel"])
def test_pictures_that_boxes_cannot_follow(name, tmp_path):
    """A transform that knows pictures alone is an error, and does nothing to boxes."""
    path = make_video(tmp_path / "a.mp4", n=10, size=(64, 64))
    cfg = settings(dataset="ava", frames=2, stride=1, size=32, augment=f"crop,{name}")
    cfg.short_side = (36, 36)
    dataset = finetune.AVA(cfg, [str(path)], [key_frame(900, {(0.1, 0.2, 0.5, 0.5): [3]})])
    with pytest.raises(TypeError, match="argument"):
        dataset[0, 0]


def test_detector_on_slow_r50():
    """res5 has stride 1 and dilation 2, so that a map cell is 16 pixels, also of pictures whose
    width is no multiple; names and shapes of the weights stay; a box gets the maximum of its 7 x 7
    samples."""
    model = finetune.Detector(settings(backbone="slow_r50", dropout=0.5), 80).eval()
    backbone, plain = model.encoder.backbone, common.backbone("slow_r50").state_dict()
    assert {k: v.shape for k, v in backbone.state_dict().items()} == {
        k: v.shape for k, v in plain.items()
    }
    for i, block in enumerate(backbone.s5):
        assert (block.branch2.b.dilation, block.branch2.b.stride) == ((1, 2, 2), (1, 1, 1))
        if i == 0:  # the other blocks have no convolution in their shortcut
            assert block.branch1.stride == (1, 1, 1)
    assert backbone.s4[0].branch2.b.stride == (1, 2, 2)
    clips = torch.randn(1, 1, 3, 2, 64, 72)
    boxes = torch.tensor([[0.0, 8, 8, 56, 40], [0, 0, 0, 72, 64]])
    with torch.no_grad():
        maps = backbone.features(clips[:, 0])
        features, scores = model(clips, boxes)
        assert maps.shape == (1, 2048, 2, 4, 5) and features.shape == (1, 1, 2048)
        inner = (torch.arange(7) + 0.5) / 7  # of 3 x 2 cells from (0.5, 0.5), centres at 0.5
        x, y = 2 * (3 * inner) / (5 - 1) - 1, 2 * (2 * inner) / (4 - 1) - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None]
        samples = F.grid_sample(maps.mean(2), grid, align_corners=True)  # (1, 2048, 7, 7)
        expected = model.encoder.linear(samples.amax((2, 3)))
    assert scores.shape == (2, 80)
    torch.testing.assert_close(scores[:1], expected, rtol=1e-4, atol=1e-5)


BOX, FAR = [0.0, 0.0, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9]
HALF, LESS = [0.0, 0.0, 0.4, 0.2], [0.0, 0.0, 0.4, 0.19]  # of BOX, at IoU 0.5 and 0.475


def frame_precisions(frames, classes):
    """Average precision at IoU 0.5 in percent, {name: value}, of the classes that occur."""
    matches = finetune.match_detections(frames)
    return finetune.mean_precision(classes, *matches, best=True)["per_class"]


@pytest.mark.parametrize(
    "detections, people, expected",
    [
        ([(BOX, 0.9)], [BOX], 1),
        ([(BOX, 0.9), (BOX, 0.8)], [BOX], 1),  # the duplicate comes after full recall
        ([(BOX, 0.9), (BOX, 0.8), (FAR, 0.7)], [BOX, FAR], (1 + 2 / 3) / 2),  # and here before
        ([(HALF, 0.9), (BOX, 0.8)], [BOX], 1),  # the first one takes the person
        ([(LESS, 0.9), (BOX, 0.8)], [BOX], 1 / 2),
        ([(HALF, 0.9)], [BOX], 1),
        ([(LESS, 0.9)], [BOX], 0),
        ([(BOX, 0.9)], [BOX, FAR], 1 / 2),  # a miss
        ([], [BOX], 0),
        ([(FAR, 0.9), (BOX, 0.8)], [BOX], 1 / 2),
        ([(LESS, 0.9), (BOX, 0.8), (FAR, 0.7)], [BOX, FAR], 2 / 3),  # precision 0, 1/2, 2/3
        ([(LESS, 0.9), (BOX, 0.9)], [BOX], 1 / 2),  # equal scores, in both orders
        ([(BOX, 0.9), (LESS, 0.9)], [BOX], 1 / 2),
        ([(BOX, 0.9), (HALF, 0.8)], [BOX, HALF], 1),
        ([(BOX, 0.9), (BOX, 0.8)], [BOX, HALF], 1 / 2),  # BOX overlaps HALF, but is taken
        ([(BOX, 0.9)], [], float("nan")),
    ],
)
def test_frame_precision_by_hand(detections, people, expected):
    """Average precision at IoU 0.5 of one class; another class of the same boxes has nobody.

    What is expected is NaN where nobody has the class."""
    boxes = np.array([box for box, _ in detections]).reshape(-1, 4)
    scores = np.array([[score, score] for _, score in detections]).reshape(-1, 2)
    marks = np.array([[True, False] for _ in people], bool).reshape(-1, 2)
    frame = boxes, scores, np.array(people).reshape(-1, 4), marks
    found = frame_precisions([frame], {0: "first", 1: "other"})
    assert found == ({} if math.isnan(expected) else {"first": round(100 * expected, 2)})


def test_frame_precision_is_over_all_frames():
    """Frames are ranked together; a box in a frame without people is wrong, people in a frame
    without boxes are missed."""
    yes, nobody = np.ones((1, 1), bool), (np.zeros((0, 4)), np.zeros((0, 1), bool))
    frames = [(np.array([BOX]), np.array([[0.9]]), np.array([BOX]), yes)]
    frames += [(np.array([BOX]), np.array([[0.8]]), *nobody)]
    frames += [(np.array([FAR]), np.array([[0.7]]), np.array([FAR]), yes)]
    frames += [(np.zeros((0, 4)), np.zeros((0, 1)), np.array([FAR]), yes)]
    assert frame_precisions(frames, {0: "stand"}) == {"stand": round(100 * (1 + 2 / 3) / 3, 2)}


AVA = "--size 32 --epochs 20 --dropout 0 --batch-size 6 --lr 0.06".split()


def test_ava_counts_the_best_precision(monkeypatch):
    """At each recall the best precision of this recall or more: by falling score a wrong box, then
    two right ones are (2/3 + 2/3) / 2, and not (1/2 + 2/3) / 2."""
    boxes = np.array([[0.0, 0.0, 0.1, 0.1], [0.2, 0.2, 0.4, 0.4], [0.6, 0.6, 0.9, 0.9]])
    labels = np.zeros((2, 80), bool)
    labels[:, 11] = True
    views = mock.Mock()
    views.dataset.notes = [(902, boxes, boxes[1:], labels)]
    scores = torch.zeros(1, 3, 80)
    scores[0, :, 11] = torch.tensor([0.9, 0.8, 0.7])
    monkeypatch.setattr(common, "extract_features", lambda *_: (scores, torch.tensor([0])))
    monkeypatch.setattr(finetune, "ava_classes", lambda _: {11: "stand"})
    result, frames, classes = finetune.test_ava(mock.Mock(), None, views)
    assert (result["map"], frames, classes) == (66.67, 1, 1)


def test_ava_end_to_end(ava, argv):
    """Two people in each picture, told apart by their boxes; classes without people are no 0."""
    finetune.main([*argv, "--dataset", "ava", "--data", str(ava), *AVA])
    result = result_of(argv)
    assert result["map"] > 90 and set(result["per_class"]) == {"stand", "watch (a person)"}
    assert (result["n"], result["missing"], result["classes"]) == (5, 0, 3)
    assert "annotated" in result["protocol"] and result["views"] == 1


def test_ava_with_detected_boxes_on_two_ranks(ava, argv, tmp_path):
    """One of five key frames lacks boxes, so recall is at most 80 %; on 2 processes and on 1."""
    lines = (ava / "ava_val_v2.2.csv").read_text().splitlines()
    lines = [line.rsplit(",", 2)[0] + ",,0.97" for line in lines if "0905" not in line]
    boxes = tmp_path / "boxes.csv"
    boxes.write_text("\n".join(line for line in lines if "-f_5BBWC4,0903" not in line))
    flags = [*argv, "--dataset", "ava", "--data", str(ava), *AVA, "--boxes", str(boxes)]
    run_ranks(2, trained, flags)
    two = result_of(argv)
    (tmp_path / "out/result.json").unlink()
    run_ranks(1, trained, flags)
    assert two == result_of(argv) and (two["n"], two["missing"]) == (5, 0)
    assert 70 < two["map"] <= 80 and str(boxes) in two["protocol"]


def test_ava_without_a_test_video(ava, argv, tmp_path, capfd):
    """Its 3 key frames are named before the work; with --allow-missing they do not count."""
    for path in ava.iterdir():
        if path.name != "clips":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "clips").mkdir()
    for path in (ava / "clips").iterdir():
        if "-f" not in path.name:
            (tmp_path / "clips" / path.name).symlink_to(path)
    flags = [*argv, "--dataset", "ava", "--data", str(tmp_path), *AVA, "--epochs", "10"]
    assert "3 of 5 test videos" in refused(flags, capfd)
    finetune.main([*flags, "--allow-missing"])
    result = result_of(argv)
    assert (result["n"], result["missing"]) == (2, 3) and result["map"] > 80  # at most 40 with them
    bad = tmp_path / "boxes.csv"
    for text, reason in (("-e_5BBWC4,0902,0.1,0.2,0.3,12,0\n", "unpack"), ("", "is empty")):
        bad.write_text(text)
        assert reason in refused([*flags, "--boxes", str(bad)], capfd)
    assert "none.csv" in refused([*flags, "--boxes", "none.csv"], capfd)


def test_ava_loss_is_over_real_boxes():
    """A batch has the boxes of all its clips in a row, each with its clip's row, and their targets:
    the loss is that of a loop over the three boxes and 80 classes."""
    box, other = (0.1, 0.1, 0.9, 0.9), (0.2, 0.1, 0.9, 0.9)
    notes = [key_frame(1, {box: [0, 79], other: []}), key_frame(1, {box: [5]})]
    dataset = finetune.AVA(settings(dataset="ava"), ["a", "b"], notes)
    items = []
    for i in (1, 0):
        target = dataset.target(i)
        boxes = torch.full((len(target), 4), float(i))
        items.append({"clips": torch.zeros(1), "bad": "", "boxes": boxes, "target": target})
    batch = dataset.collate(items)
    assert batch["boxes"].tolist() == [[0, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0]]
    assert batch["clips"].shape == (2, 1) and batch["target"].shape == (3, 80)
    scores, terms = torch.randn(3, 80), []
    for k, actions in enumerate([[5], [0, 79], []]):
        for c in range(80):
            p = 1 / (1 + np.exp(-scores[k][c].item()))
            terms.append(-np.log(p if c in actions else 1 - p))
    loss = F.binary_cross_entropy_with_logits(scores, batch["target"])
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-5)


@pytest.mark.parametrize("action", ["c157 1.0 2.0", "c-1 1.0 2.0", "stand 1 2", "c004"])
def test_a_damaged_action_is_one_line(action, tmp_path, capfd):
    """An action that does not exist, or is no number, is an error that names the data set."""
    (tmp_path / "Charades_v1_train.csv").write_text(f"id,actions\nABC12,{action}\n")
    cfg = settings(dataset="charades", data=str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        finetune.listed_videos(cfg, "train")
    errors = capfd.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(errors) == 1 and "charades" in errors[0]


@pytest.mark.parametrize("action", ["0", "81"])
def test_ava_has_80_actions(action):
    """Numbers outside of 1 to 80 are refused."""
    with pytest.raises(ValueError):
        finetune.read_people(f"film,900,0.1,0.1,0.5,0.5,{action},1\n")


@pytest.mark.parametrize("box", ["10,10,50,50", "0.5,0.1,0.4,0.2", "0.1,0.1,0.1,0.2"])
def test_boxes_in_pixels_are_refused(box):
    """AVA's boxes are shares of width and height; others would be a wrong number in silence."""
    with pytest.raises(ValueError, match="is none in shares"):
        finetune.read_people(f"F1,902,{box},12,1\n")
    assert len(finetune.read_people("F1,902,-0.01,0.1,0.4,1.02,12,1\n")) == 1  # of a detector


def test_lists_that_lie_there_twice(hmdb51, argv):
    """HMDB51's split files in two folders: each video counts once."""
    cfg = settings(dataset="hmdb51", data=str(hmdb51))
    once = finetune.hmdb51(cfg, "train")
    deeper = hmdb51 / "again"
    deeper.mkdir()
    for path in hmdb51.rglob("*_test_split1.txt"):
        if path.parent != deeper:
            (deeper / path.name).write_text(path.read_text())
    assert sorted(finetune.hmdb51(cfg, "train")) == sorted(once)


def test_no_precision_is_no_number():
    """mAP over no class is none, not 0."""
    nothing = np.zeros((3, 2))
    numbers = finetune.mean_precision({0: "a", 1: "b"}, nothing, nothing, [0, 0])
    assert numbers == {"map": None, "per_class": {}}


def test_flags_that_do_not_go_with_a_data_set(argv, tmp_path, capfd):
    """Official lists say what is tested: a --val beside them is refused, not ignored."""
    assert "--dataset ucf101" in refused([*argv, "--val", str(tmp_path)], capfd)
    line = refused(["--dataset", "ava", "--out", str(tmp_path / "out")], capfd)
    assert "needs --data" in line and "no demo" in line


@pytest.mark.parametrize("kind", ["Classifier", "Detector"])
def test_scores_are_exact_under_autocast(kind):
    """In bfloat16 many of a thousand scores would tie, and mean average precision takes equal
    scores as one; the classifier works in float32."""
    model = getattr(finetune, kind)(settings(backbone="tiny", dropout=0.0), 1000).eval()
    boxes = torch.tensor([[0, 2.0, 2.0, 20.0, 20.0]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scores = model(torch.randn(1, 1, 3, 4, 32, 32), boxes)[1].flatten()
    assert scores.dtype == torch.float32
    assert (scores.bfloat16().float() != scores).float().mean() > 0.9


@pytest.mark.parametrize(
    "words, share",
    [("ssv2", 0.19 / 22), ("charades", 5 / 60), ("charades --recipe released", 4 / 57)],
)
def test_warm_ups_are_shares_of_the_run(words, share):
    """Epochs of warm-up taken for a share, or the other way round."""
    assert parsed(f"--data x --dataset {words}").warmup == share


def test_a_cut_of_a_quarter_of_an_hour(tmp_path):
    """The official cuts, seconds 900 to 1800 of a film, taken for whole films."""
    path = make_video(tmp_path / "cut.mp4", n=905, fps=1, size=(48, 32), codec="mpeg4")
    cfg = settings(dataset="ava", frames=2, stride=30)
    dataset = finetune.AVA(cfg, [str(path)], [key_frame(902, {(0.1, 0.1, 0.9, 0.9): [5]})])
    clip = dataset.whole(0, 32)[0].permute(0, 2, 3, 1).numpy()
    assert read_counters(clip) == [1, 2]


def test_ava_scores_beside_a_missing_video(ava, argv, tmp_path):
    """The notes of the first key frames, of a film that is missing, taken for those of others."""
    for path in ava.iterdir():
        if path.name != "clips":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "clips").mkdir()
    for path in (ava / "clips").iterdir():
        if "-e" not in path.name:
            (tmp_path / "clips" / path.name).symlink_to(path)
    match = finetune.match_detections
    with mock.patch.object(finetune, "match_detections", wraps=match) as called:
        flags = [*argv, "--dataset", "ava", "--data", str(tmp_path), *AVA, "--epochs", "1"]
        finetune.main([*flags, "--allow-missing"])
    notes = listed(settings(dataset="ava", data=str(ava)), "test")
    expected = [labels for name, (*_, labels) in notes if "-f" in name]
    frames = called.call_args.args[0]
    assert all((frame[3] == one).all() for frame, one in zip(frames, expected, strict=True))


def test_charades_targets_beside_a_missing_video(charades, argv, tmp_path):
    """The actions of the first video, which is missing, taken for those of the second."""
    for path in charades.rglob("*"):
        if path.is_file() and "V0050" not in path.name:
            (tmp_path / path.name).symlink_to(path)
    precision = finetune.mean_precision
    with mock.patch.object(finetune, "mean_precision", wraps=precision) as called:
        flags = [*argv, "--dataset", "charades", "--data", str(tmp_path), "--epochs", "1"]
        finetune.main([*flags, "--allow-missing"])
    cfg = settings(dataset="charades", data=str(charades))
    expected = [{action for action, *_ in actions} for _, actions in listed(cfg, "test")[1:]]
    assert [{*row.nonzero()[0].tolist()} for row in called.call_args.args[2]] == expected


def test_official_classes_are_numbered_as_in_training(ucf101, argv, tmp_path):
    """Classes of the test videos numbered anew, where one of them is not tested."""
    for path in ucf101.rglob("*"):
        if path.is_file():
            place = tmp_path / "data" / path.relative_to(ucf101)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path)
    tested = next((tmp_path / "data").rglob("testlist01.txt"))
    rows = [row for row in tested.read_text().splitlines() if "LightUp" in row]
    tested.unlink()
    tested.write_text("\n".join(rows))
    finetune.main([*argv, "--data", str(tmp_path / "data")])
    assert result_of(argv)["per_class"] == {"LightUp": 100} and result_of(argv)["classes"] == 2


def test_dropout_comes_before_the_classifier():
    """Scores that are dropped, instead of features: then a class would be missing at random."""
    model = finetune.Classifier(settings(backbone="tiny", dropout=1.0), 5).train()
    torch.nn.init.ones_(model.encoder.linear.bias)
    _, scores = model(torch.randn(2, 1, 3, 4, 16, 16))
    assert (scores == 1).all()
