"""What the evaluations do: which network and which videos they read, what reaches training, how the
views of a video become one answer, and what fine-tuning trains on."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

import byol
import common
import eval_linear
import finetune
import moco
from conftest import SMALL, result_of, run_ranks
from feed_adapter import (
    NO_WARMUP,
    STILL_TARGET,
    last,
    network_of,
    numbered,
    own_backbone,
    passes_of,
    pixels,
    scores_of,
    shown,
    targets_of,
)
from layouts import CLASSES
from videos import make_video

FRAMES, STRIDE, LENGTH = 4, 4, 60
LAST = (LENGTH - FRAMES * STRIDE) / 30  # the latest start of a clip, in seconds
TINY = """--backbone tiny --frames 4 --stride 4 --size 24 --test-size 27 --workers 0 --augment none
    --batch-size 6 --epochs 3""".split()
TINY += NO_WARMUP


def listed(path, rows):
    """A text list of (path, label)."""
    path.write_text("".join(f"{video}\t{label}\n" for video, label in rows))
    return str(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Numbered videos of 2 s: 0 ... 11 in train/, 20 ... 24 in val/, classes even and odd."""
    root = tmp_path_factory.mktemp("numbered")
    for part, numbers in (("train", range(12)), ("val", range(20, 25))):
        for i in numbers:
            numbered(root / part / ("odd" if i % 2 else "even") / f"{i:02d}.mp4", i, LENGTH)
    return root


def files(root, part):
    return [(path, path.parent.name) for path in sorted((root / part).rglob("*.mp4"))]


@pytest.fixture(scope="module")
def pretrained(root, tmp_path_factory):
    """Folders of runs in which the online network has moved and the target has not."""
    outs = {}
    for method in (byol, moco):
        outs[method] = tmp_path_factory.mktemp(method.__name__)
        flags = ["--data", str(root / "train"), "--out", str(outs[method]), *SMALL, *STILL_TARGET]
        flags += ["--queue", "50"] if method is moco else []
        method.main([*flags, *NO_WARMUP, "--lr", "0.1", "--optimizer", "sgd", "--knn-every", "0"])
    return outs


@pytest.fixture
def argv(root, pretrained, tmp_path):
    flags = ["--weights", str(pretrained[byol] / "backbone.pth"), "--data", str(root)]
    return [*flags, "--out", str(tmp_path / "out"), *TINY]


def equal(one, two):
    """Whether two states are the same to the last bit."""
    assert one.keys() == two.keys()
    return all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def views(passes, size):
    """[(video, its frames)] of all clips of one size that the backbone saw, in order."""
    clips = [clip for each in passes for clip in each.clips if clip.shape[-1] == size]
    found = [shown(clip) for clip in clips]
    assert not any(mirrored for *_, mirrored in found)
    return [(video, tuple(frames)) for video, frames, _ in found]


def views_of(video, clips, crops):
    """Counts of the test views of a video, by frames: clips that begin at i / clips."""
    starts = [i / clips * LAST for i in range(clips)]
    times = [[start + i * STRIDE / 30 for i in range(FRAMES)] for start in starts]
    frames = [tuple(int((t + 1e-3) * 30) for t in row) for row in times]
    return Counter({(video, row): crops for row in frames})


def expected_views(cached):
    """Of all test views of a probe: of the test videos 10 clips x 3 crops, without --cached, and
    for kNN of all videos 4 clips x 1 crop."""
    counts = Counter()
    for video in range(20, 25):
        counts += Counter() if cached else views_of(video, 10, 3)
    for video in [*range(12), *range(20, 25)]:
        counts += views_of(video, 4, 1)
    return counts


def plain_video(path, tones):
    """A video whose frame i has the colour tones[i] all over."""

    def draw(i, width, height):
        return np.tile(np.uint8(tones[i]), (height, width, 1))

    return make_video(path, n=len(tones), size=(32, 32), draw=draw)


# --- which network


@pytest.mark.parametrize("file", ["backbone.pth", "last.pth"])
@pytest.mark.parametrize("method", [byol, moco])
def test_the_online_network_is_read(method, file, pretrained, root, tmp_path):
    """Features of the target network, of a random one, or of BN by the statistics of the batch."""
    out = pretrained[method]
    flags = ["--weights", str(out / file), "--data", str(root / "val"), *TINY]
    flags += ["--out", str(tmp_path / "out"), "--extract", str(tmp_path / "f.npz")]
    passes = passes_of(eval_linear, flags)
    features = {}
    for which in ("online", "target"):
        network = common.backbone("tiny").eval()
        network.load_state_dict(network_of(out, which))
        with torch.no_grad():
            rows = [network(torch.from_numpy(each.clips)).mean(0).numpy() for each in passes]
        features[which] = np.stack(rows)
    found = np.load(tmp_path / "f.npz")["features"]
    np.testing.assert_allclose(found, features["online"], rtol=1e-4, atol=1e-5)
    assert np.abs(found - features["target"]).max() > 0.01 * np.abs(found).max()
    assert not equal(network_of(out, "online"), network_of(out, "target"))


@pytest.mark.parametrize("beside", [True, False])
def test_knn_while_training_is_the_online_networks(beside, root, tmp_path):
    """The kNN curve of the target network or of one in training mode, or queries in their own bank.

    Every labelled training video is read once, and no video of a folder val beside train."""
    out = tmp_path / "out"
    data = str(root / "train") if beside else listed(tmp_path / "l.txt", files(root, "train"))
    flags = ["--data", data, "--out", str(out), *SMALL, *STILL_TARGET, *NO_WARMUP]
    flags += ["--size", "24", "--short-side", "24", "24"]
    passes = passes_of(byol, [*flags, "--knn-every", "2", "--lr", "0.1"])
    weights = {which: [*network_of(out, which).values()][0] for which in ("online", "target")}
    measured = [each for each in passes if not each.training]
    for each in measured:
        np.testing.assert_array_equal(each.weight, weights["online"])
    assert not torch.equal(weights["online"], weights["target"])
    videos = Counter(video for video, _ in views(measured, 24))
    assert videos == Counter(2 * [*range(12)])


# --- the probe


@pytest.mark.parametrize("mode", ["--cached", "--no-cached"])
def test_the_backbone_is_frozen(mode, argv, pretrained, tmp_path):
    """A backbone that is trained by the probe, or whose BN goes by the batch, or follows it."""
    before = network_of(pretrained[byol])
    passes = passes_of(eval_linear, [*argv, mode, "--lr", "50"])
    assert len(passes) > 6 and not any(each.training for each in passes)
    assert all((each.weight == [*before.values()][0].numpy()).all() for each in passes)
    if mode == "--no-cached":
        assert equal(network_of(tmp_path / "out"), before)
        assert last(tmp_path / "out")["encoder.linear.weight"].abs().max() > 0.1
    assert equal(network_of(pretrained[byol]), before)


@pytest.mark.parametrize("ranks", [1, 2])
def test_videos_and_views_of_the_full_protocol(ranks, argv):
    """Training on a test video or on fixed clips; a test video that is left out or counts twice; 4
    clips where 10 x 3 views are due.

    Training: a clip of each training video an epoch, another one in each. Testing: see
    expected_views."""
    if ranks == 1:
        passes = passes_of(eval_linear, [*argv, "--no-cached"])
    else:
        passes = sum(run_ranks(2, passes_of, eval_linear, [*argv, "--no-cached"]), [])
    assert Counter(views(passes, 27)) == expected_views(cached=False)
    assert (result_of(argv)["n"], result_of(argv)["missing"]) == (5, 0)
    trained = views(passes, 24)
    assert Counter(video for video, _ in trained) == Counter([*range(12)] * 3)
    if ranks == 1:
        epochs = [trained[12 * i : 12 * i + 12] for i in range(3)]
        assert all(len({video for video, _ in epoch}) == 12 for epoch in epochs)
    firsts = [frames[0] for _, frames in trained]
    assert len(set(trained)) > 30 and min(firsts) < 10 and max(firsts) > 34


@pytest.mark.parametrize("script", [eval_linear, finetune])
def test_short_sides_in_training_and_testing(script, argv, monkeypatch):
    """A short side that is not drawn from 256 to 320 pixels for crops of 224, or is in testing."""
    sides, opens = {}, common.VideoClips.open

    def noted(self, index, short_side):
        part = self.paths[index].split("/")[-3]
        sides.setdefault(part, []).append(short_side)
        return opens(self, index, short_side)

    monkeypatch.setattr(common.VideoClips, "open", noted)
    flags = ["--no-cached"] if script is eval_linear else ["--dropout", "0.5"]
    script.main([*argv, *flags, "--test-clips", "1", "--test-crops", "1"])
    drawn = sides["train"][:36]  # in 3 epochs; what follows is for kNN
    assert set(sides["val"]) == {27} and set(sides["train"][36:]) <= {27}
    assert min(drawn) in (27, 28) and max(drawn) in (33, 34) and len(set(drawn)) > 4


def test_videos_and_views_of_cached_features(argv):
    """--cached that reads a video twice, more or other clips than 4, or trains on random ones."""
    passes = passes_of(eval_linear, [*argv, "--cached"])
    assert Counter(views(passes, 27)) == expected_views(cached=True) and not views(passes, 24)


def ramp(counter, width, height):
    """A picture that says where it was cut out: twice the distance from the left and the top."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([2 * x, 2 * y, 0 * x], -1).astype(np.uint8)


@pytest.mark.parametrize("size", [(96, 48), (48, 96)])
@pytest.mark.parametrize("mode, places", [("--cached", [24]), ("--no-cached", [0, 24, 48])])
def test_crops_lie_along_the_long_side(mode, places, size, argv, tmp_path):
    """Three times the same crop, crops along the short side, a crop that is not in the middle."""
    path = make_video(tmp_path / "a.mp4", n=20, size=size, draw=ramp)
    data = listed(tmp_path / "list.txt", [(path, "a"), (path, "b")] * 6)
    val = listed(tmp_path / "val.txt", [(path, "a")])
    flags = ["--data", data, "--val", val, mode, "--test-size", "48"]
    passes = passes_of(eval_linear, [*argv, *flags])
    clips = [clip for each in passes for clip in each.clips if clip.shape[-1] == 48]
    corners = [pixels(clip)[0, :3, :3, :2].mean((0, 1)) / 2 - 1 for clip in clips]
    found = {tuple((4 * (corner / 4).round()).tolist()) for corner in corners}
    assert found == {(p, 0) if size[0] > size[1] else (0, p) for p in places}


@pytest.fixture
def tests(root, tmp_path):
    """Several --val beside one --data: that of the fixture, and ones that differ in what must not
    matter for training."""
    white = plain_video(tmp_path / "white.mp4", [(255, 255, 255)] * 30)
    rows = files(root, "val")
    swapped = [(path, "odd" if name == "even" else "even") for path, name in rows]
    lists = {"as it is": rows, "other labels": swapped, "other order": rows[::-1]}
    lists |= {"bright": [*rows, *[(white, "odd")] * 9], "one": rows[:1]}
    return {name: listed(tmp_path / f"{name}.txt", part) for name, part in lists.items()}


@pytest.mark.parametrize("script", [eval_linear, finetune])
def test_nothing_of_the_test_set_reaches_training(script, tests, argv, root, tmp_path):
    """Test videos, their labels, their number or their order in what is trained."""
    flags = [*argv, "--data", str(root / "train"), "--test-clips", "1", "--test-crops", "1"]
    flags += ["--no-cached"] if script is eval_linear else ["--dropout", "0.5"]
    models, results = [], {}
    for name, val in tests.items():
        own = ["--val", val, "--out", str(tmp_path / f"out {name}")]
        script.main([*flags, *own])
        models.append(last(tmp_path / f"out {name}"))
        results[name] = result_of(own)
    assert all(equal(models[0], model) for model in models[1:])
    accuracy = "linear_top1" if script is eval_linear else "top1"
    one, other = results["as it is"][accuracy], results["other labels"][accuracy]
    assert one == results["other order"][accuracy] and one + other == pytest.approx(100)


def test_nothing_of_the_test_set_reaches_cached_features(tests, argv, root, tmp_path):
    """Features that are standardised by the test set's mean, or a classifier that has seen it."""
    scores = {}
    for name, val in tests.items():
        own = ["--data", str(root / "train"), "--val", val, "--out", str(tmp_path / f"out {name}")]
        scores[name], _ = scores_of([*argv, *own, "--cached"])
    common_rows = scores["as it is"]
    assert len(common_rows) == 5 and len({*common_rows[:, 0].tolist()}) == 5
    assert torch.equal(scores["other labels"], common_rows)
    assert torch.allclose(scores["other order"].flip(0), common_rows, rtol=1e-6, atol=1e-7)
    assert torch.allclose(scores["bright"][:5], common_rows, rtol=1e-6, atol=1e-7)
    assert torch.allclose(scores["one"], common_rows[:1], rtol=1e-6, atol=1e-7)


# --- results that follow from the data: a backbone that sees the mean colour, and nothing else


class MeanColour(torch.nn.Module):
    """(B, 3, T, H, W) -> (B, 3)."""

    feature_dim = 3

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x.mean((2, 3, 4)) * self.scale


@pytest.fixture
def colour(tmp_path):
    """Flags of an evaluation on features that are mean colours."""
    with own_backbone("colour", MeanColour):
        flags = "--backbone colour --frames 2 --stride 1 --size 24 --test-size 27 --workers 0"
        flags += " --augment none --batch-size 4 --test-clips 4 --test-crops 1"
        yield [*flags.split(), *NO_WARMUP, "--out", str(tmp_path / "out")]


MODES = {
    "cached": (eval_linear, "--cached --weights random --epochs 60"),
    "clips": (eval_linear, "--no-cached --weights random --epochs 60"),
    "finetune": (finetune, "--optimizer sgd --lr 0.5 --dropout 0 --epochs 60"),
}


def evaluated(mode, flags, train, val, tmp_path):
    """The result.json of a classifier that is trained on one list of (path, label) and tested on
    another."""
    script, own = MODES[mode]
    lists = listed(tmp_path / "train.txt", train), listed(tmp_path / "val.txt", val)
    script.main([*flags, *own.split(), "--data", lists[0], "--val", lists[1]])
    return result_of(flags)


def red_and_blue(folder, n, name):
    """Paths of n red and of n blue videos, all a little different."""
    tones = np.random.default_rng(n).integers(0, 60, (n, 3))
    both = [], []
    for i, (a, b, c) in enumerate(tones):
        for paths, tone in zip(both, [(195 + a, b, c), (b, c, 195 + a)], strict=True):
            path = folder / f"{name}-{i}-{'red' if paths is both[0] else 'blue'}.mp4"
            paths.append(plain_video(path, [tone] * 12))
    return both


@pytest.mark.parametrize("mode", MODES)
def test_the_result_can_be_worked_out(mode, colour, tmp_path):
    """Labels that go with other videos, kNN against the test set, a classifier that has seen it, a
    test video that counts twice or not.

    Six of eight red test videos are called blue, and must be wrong; the order is mixed."""
    red, blue = red_and_blue(tmp_path, 4, "train")
    train = [(path, "red") for path in red] + [(path, "blue") for path in blue]
    red, blue = red_and_blue(tmp_path, 8, "val")
    val = [(path, "blue") for path in red[:6]] + [(path, "red") for path in red[6:]]
    val += [(path, "blue") for path in blue[:3]]
    np.random.default_rng(0).shuffle(val)
    result = evaluated(mode, colour, train, val, tmp_path)
    top1 = result["top1" if mode == "finetune" else "linear_top1"]
    assert (result["n"], result["missing"], result["classes"]) == (11, 0, 2)
    assert top1 == round(100 * 5 / 11, 2)
    assert result["per_class"] == {"blue": round(100 * 3 / 9, 2), "red": 100}
    assert mode == "finetune" or result["knn_top1"] == top1


def test_neighbours_vote_by_their_similarity(colour, tmp_path):
    """The vote of the nearest video alone, or one vote for each of the 20 nearest.

    The nearest of the query is called blue, five others that are like it red; and with one vote
    for each of ten videos blue would have as many."""
    red, blue = red_and_blue(tmp_path, 6, "train")
    train = [(path, "red") for path in red[1:]] + [(path, "blue") for path in [red[0], *blue[:4]]]
    result = evaluated("cached", colour, train, [(red[0], "red")], tmp_path)
    assert result["knn_top1"] == 100


@pytest.mark.parametrize("mode", ["cached", "clips"])
def test_all_views_of_a_video_are_used(mode, colour, tmp_path):
    """kNN or the classifier on the first view of a video.

    The first of four views of each video has the colour of the other class."""
    tones = {"red": (220, 20, 20), "blue": (20, 20, 220)}
    rows = {"train": [], "val": []}
    for name, other in (("red", "blue"), ("blue", "red")):
        for part in ("train", "train", "val"):
            path = tmp_path / f"{part}-{name}-{len(rows[part])}.mp4"
            plain_video(path, [tones[other]] * 8 + [tones[name]] * 32)
            rows[part].append((path, name))
    plain = plain_video(tmp_path / "plain.mp4", [tones["red"]] * 40)
    result = evaluated(mode, colour, rows["train"], [*rows["val"], (plain, "red")], tmp_path)
    assert result["knn_top1"] == result["linear_top1"] == 100


def test_the_knn_curve_can_be_worked_out(colour, tmp_path):
    """A kNN curve in which queries vote for themselves, or with other videos' labels.

    Every fifth of 15 videos is a query: two of eight blue ones, of which one is red, and one of
    seven red ones."""
    red, blue = red_and_blue(tmp_path, 8, "all")
    videos = {"blue": [*blue[:5], red[7], *blue[6:]], "red": red[:7]}
    for label, paths in videos.items():
        for i, path in enumerate(paths):
            place = tmp_path / "set" / label
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{i}.mp4").symlink_to(path)
    flags = ["--data", str(tmp_path / "set"), "--out", str(tmp_path / "out"), "--small"]
    flags += "--backbone colour --frames 2 --stride 1 --size 24 --workers 0 --augment none".split()
    byol.main([*flags, *"--batch-size 4 --epochs 2 --knn-every 2".split(), *NO_WARMUP])
    lines = (tmp_path / "out/log.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["knn_top1"] == pytest.approx(200 / 3, rel=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_classes_are_numbered_as_in_training(mode, colour, tmp_path):
    """A test set that lacks the first class and numbers its own from 0."""
    red, blue = red_and_blue(tmp_path, 4, "train")
    train = [(path, "red") for path in red] + [(path, "blue") for path in blue]
    result = evaluated(mode, colour, train, [(path, "red") for path in red[:2]], tmp_path)
    assert result["per_class"] == {"red": 100} and result["classes"] == 2


@pytest.mark.parametrize("mode", MODES)
def test_softmaxes_are_averaged(mode, colour, tmp_path):
    """The mean of scores before the softmax, the largest view's, or the first view alone.

    Three of four views are dark with some doubt, one is light without any: by the mean of the
    softmaxes the video is dark, by that of the scores light. And with the tones turned round."""
    dark = [plain_video(tmp_path / f"d{i}.mp4", [(50 + i,) * 3] * 12) for i in range(4)]
    light = [plain_video(tmp_path / f"l{i}.mp4", [(150 + i,) * 3] * 12) for i in range(4)]
    train = [(path, "dark") for path in dark] + [(path, "light") for path in light]
    end = plain_video(tmp_path / "end.mp4", [(80,) * 3] * 27 + [(255,) * 3] * 13)
    begin = plain_video(tmp_path / "begin.mp4", [(255,) * 3] * 8 + [(80,) * 3] * 32)
    val = [(end, "dark"), (begin, "dark")]
    assert evaluated(mode, colour, train, val, tmp_path)["per_class"] == {"dark": 100}


# --- fine-tuning


def test_all_layers_are_trained(argv, pretrained, tmp_path):
    """A part of the network that stays, BN in eval in training or by the batch in testing, a start
    from other weights."""
    before = network_of(pretrained[byol])
    passes = passes_of(finetune, [*argv, "--dropout", "0.5"])
    after = network_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert not torch.equal(tensor, before[name]), name
    finetune.main([*argv, "--dropout", "0.5", "--epochs", "1", "--out", str(tmp_path / "short")])
    early = last(tmp_path / "short")  # the classifier, too
    assert not any(torch.equal(t, early[name]) for name, t in last(tmp_path / "out").items())
    first, *_, final = passes
    np.testing.assert_array_equal(first.weight, [*before.values()][0])
    np.testing.assert_array_equal(final.weight, [*after.values()][0])
    assert [each.training for each in passes] == sorted([e.training for e in passes], reverse=True)
    assert sum(each.training for each in passes) == 6


def test_videos_and_views_of_fine_tuning(argv):
    """Training on a test video, a test video that is left out or counts twice, other views than 10
    x 3; the same clip of a video in every epoch."""
    passes = passes_of(finetune, argv)
    counts = sum((views_of(video, 10, 3) for video in range(20, 25)), Counter())
    assert Counter(views(passes, 27)) == counts
    trained = views(passes, 24)
    assert Counter(video for video, _ in trained) == Counter([*range(12)] * 3)
    firsts = [frames[0] for _, frames in trained]
    assert len(set(trained)) > 30 and min(firsts) < 10 and max(firsts) > 34


def test_dropout_is_for_training_alone(argv, root, tmp_path):
    """Dropout that goes on in testing, or that never was.

    A test video is listed twenty times: it is always right or never."""
    models = []
    for share in ("0", "0.8"):
        flags = ["--dropout", share, "--epochs", "2", "--out", str(tmp_path / share)]
        val = [(path, "even") for path, _ in files(root, "val")[:2] for _ in range(20)]
        val += [(path, "odd") for path, _ in files(root, "val")[2:3] for _ in range(20)]
        data = listed(tmp_path / "train.txt", files(root, "train"))
        lists = ["--data", data, "--val", listed(tmp_path / "val.txt", val)]
        views = ["--test-clips", "1", "--test-crops", "1"]
        finetune.main([*argv, *lists, *flags, *views])
        models.append(last(tmp_path / share))
        result = result_of(flags)
        assert result["n"] == 60
        assert result["per_class"]["even"] in (0, 50, 100)
        assert result["per_class"]["odd"] in (0, 100)
    assert not equal(*models)


def official(root, dataset, first, second):
    """Split 2 of UCF101 or HMDB51 in root, of numbered videos; split 1 is the other way round."""
    (root / "lists").mkdir()
    names = {i: f"{'odd' if i % 2 else 'even'}/{i:02d}" for i in [*first, *second]}
    for i, name in names.items():
        numbered(root / f"{name}.avi", i)
    for split, (train, test) in ((1, (second, first)), (2, (first, second))):
        if dataset == "ucf101":
            for part, numbers in (("train", train), ("test", test)):
                text = "".join(f"{names[i]}.avi {i % 2 + 1}\n" for i in numbers)
                (root / f"lists/{part}list{split:02d}.txt").write_text(text)
            continue
        for label in ("even", "odd"):
            rows = [(i, 1) for i in train] + [(i, 2) for i in test]
            rows = [(names[i], use) for i, use in rows if names[i].startswith(label)]
            text = "".join(f"{name.split('/')[1]}.avi {use}\n" for name, use in rows)
            (root / f"lists/{label}_test_split{split}.txt").write_text(text)


@pytest.mark.parametrize("dataset", ["ucf101", "hmdb51"])
def test_split_2_reads_list_2(dataset, tmp_path):
    """--split that is not heard, or the two lists of a split the wrong way round."""
    official(tmp_path, dataset, range(1, 7), range(7, 13))
    flags = ["--dataset", dataset, "--data", str(tmp_path), "--split", "2", *TINY]
    passes = passes_of(finetune, [*flags, "--out", str(tmp_path / "out"), "--test-clips", "1"])
    assert {video for video, _ in views(passes, 24)} == {*range(1, 7)}
    assert {video for video, _ in views(passes, 27)} == {*range(7, 13)}
    assert result_of(["--out", str(tmp_path / "out")])["n"] == 6


def ssv2_of(root, make):
    """The layout of SSv2 with six videos to train on and two to test, made by make(path, i)."""
    (root / "videos").mkdir(parents=True)
    for part, numbers in (("train", range(6)), ("validation", range(6, 8))):
        sides = ["right", "left"]
        rows = [{"id": str(i), "template": f"To [the] {sides[i % 2]}"} for i in numbers]
        (root / f"something-something-v2-{part}.json").write_text(json.dumps(rows))
    labels = {"To the left": "0", "To the right": "1"}
    (root / "something-something-v2-labels.json").write_text(json.dumps(labels))
    for i in range(8):
        make(root / f"videos/{i}.mp4", i)
    return ["--dataset", "ssv2", "--data", str(root), "--out", str(root / "out")]


@pytest.mark.parametrize("small", [[], ["--small"]])
def test_ssv2_is_never_flipped(small, tmp_path):
    """Clips of left and right that are mirrored: by the data set's default or by that of --small.

    Pictures get lighter to the right; with --augment crop,flip, asked for, some do to the left."""

    def make(path, i):
        return make_video(path, n=12, size=(64, 48), draw=ramp)

    flags = [*ssv2_of(tmp_path / "a", make), *TINY, *small, "--epochs", "6"]
    place = flags.index("--augment")
    for own in ([], ["--augment", "crop,flip"]):
        words = [*flags[:place], *flags[place + 2 :], *own]
        words[words.index("--out") + 1] += "-flip" if own else ""
        passes = passes_of(finetune, words)
        trained = np.concatenate([each.clips for each in passes if each.training])
        columns = pixels(trained)[..., 0].mean((1, 2))  # (clips, width)
        slopes = columns[:, -1] - columns[:, 0]
        assert len(slopes) == 36 and np.abs(slopes).min() > 20
        assert 0.2 < np.mean(slopes < 0) < 0.8 if own else slopes.min() > 0


def test_ssv2_sees_the_whole_video(tmp_path):
    """Frames that are neighbours, the same ones in each epoch, or, in testing, others than the
    middles of the parts."""
    flags = [*ssv2_of(tmp_path / "a", lambda path, i: numbered(path, i)), *TINY]
    passes = passes_of(finetune, flags)
    trained, tested = views(passes, 24), views(passes, 27)
    assert Counter(video for video, _ in trained) == Counter([*range(6)] * 3)
    for _, frames in trained:  # a millisecond before the next part its first frame is due
        assert all(15 * i <= frame <= 15 * i + 15 for i, frame in enumerate(frames))
    assert len({frames for _, frames in trained}) == 18
    assert Counter(tested) == Counter([(i, (7, 22, 37, 52)) for i in (6, 7)])


def charades_of(root, train, test):
    """The layout of Charades with {name: text of actions}; the videos are made elsewhere."""
    for part, rows in (("train", train), ("test", test)):
        text = "id,actions\n" + "".join(f"{name},{actions}\n" for name, actions in rows.items())
        (root / f"Charades_v1_{part}.csv").write_text(text)
    return ["--dataset", "charades", "--data", str(root), "--out", str(root / "out"), *NO_WARMUP]


def test_targets_of_charades_are_those_of_the_clip(tmp_path):
    """Targets of another video of the batch, of the whole video, or of another moment."""
    notes = {}
    for i in range(8):
        numbered(tmp_path / f"V{i}.mp4", i, LENGTH)
        notes[i] = [(i, 0.0, 0.55), (100 + i, 0.85, 1.15), (50, 0.05 * i, 0.05 * i + 0.4)]
        notes[i] += [(150, 1.6, 2.0)]
    texts = {i: [f"c{c:03d} {a:.2f} {b:.2f}" for c, a, b in rows] for i, rows in notes.items()}
    lines = {i: ";".join(row) for i, row in texts.items()}
    test = {f"V{i}": lines[i] for i in (6, 7)}
    flags = charades_of(tmp_path, {f"V{i}": lines[i] for i in range(6)}, test)
    passes, targets, _ = targets_of([*flags, *TINY, "--epochs", "12"])
    trained, checked = [each for each in passes if each.training], Counter()
    assert len(trained) == len(targets) == 12
    for each, target in zip(trained, targets, strict=True):
        for clip, row in zip(each.clips, target.reshape(-1, 157), strict=True):
            video, frames, _ = shown(clip)
            for c, begin, end in notes[video]:  # the clip starts while its first frame is shown
                starts = (frames[0] - 0.05) / 30, (frames[0] + 1.05) / 30
                span = (FRAMES - 1) * STRIDE / 30
                seen = {begin <= start + span and end >= start for start in starts}
                if len(seen) == 1:
                    assert row[c] == seen.pop(), (video, frames, c)
                    checked[c // 50, int(row[c])] += 1
            assert {*row.nonzero()[0]} <= {c for c, *_ in notes[video]}
    assert min(checked.values()) > 5 and len(checked) == 8, checked


def test_charades_takes_the_largest_score_of_the_views(colour, tmp_path):
    """The mean of the views in the place of their maximum; the notes of another test video.

    A is light in one of four views and dark in the others, B is grey: A's maximum is above B's,
    its mean below."""
    tones = {"A": [(10,) * 3] * 27 + [(255,) * 3] * 13, "B": [(140,) * 3] * 40}
    tones |= {f"T{i}": [(220 - i if i < 3 else 20 + i,) * 3] * 12 for i in range(6)}
    for name, row in tones.items():
        plain_video(tmp_path / f"{name}.mp4", row)
    train = {f"T{i}": "c003 0.0 9.0" if i < 3 else "c100 0.0 9.0" for i in range(6)}
    test = {"B": "c100 0.0 9.0", "A": "c003 0.0 0.1"}
    flags = [*charades_of(tmp_path, train, test), *colour, "--dropout", "0", "--epochs", "20"]
    finetune.main([*flags, "--optimizer", "sgd", "--lr", "1"])
    assert result_of(flags)["per_class"] == {"c003": 100, "c100": 50}


# --- people in boxes

TONES = {12: (255, 0, 0), 80: (0, 255, 0), 1: (0, 0, 255)}  # of those who do action 12, 80 or 1
PLACES = (0.1, 0.2, 0.45, 0.8), (0.55, 0.3, 0.9, 0.7)  # a tall person, and a short one


def people(video, second):
    """[(place, action)] of a key frame; in some the tall one is not there."""
    tall = (video + second) % 3
    short = (tall + 1 + video % 2) % 3
    both = [(PLACES[0], [*TONES][tall]), (PLACES[1], [*TONES][short])]
    return both if (video + second) % 4 else both[1:]


def ava_of(root):
    """The layout of AVA: six videos to train on, two to test, each with three key frames. In the
    15 frames that a clip may show, the people of its key frame are seen, in the colours of their
    actions."""

    def draw(counter, width, height):
        video, frame = divmod(counter, 1000)
        picture = np.zeros((height, width, 3), np.uint8)
        second, late = divmod(frame + 9, 30)  # a clip of 4 frames begins 8 frames early
        there = people(video, second) if 0 < second < 4 and late < 15 else []
        for (x1, y1, x2, y2), action in there:
            rows = slice(round(y1 * height), round(y2 * height))
            picture[rows, round(x1 * width) : round(x2 * width)] = TONES[action]
        return picture

    for part, videos in (("train", range(6)), ("val", range(6, 8))):
        lines = []
        for video in videos:
            counters = range(1000 * video, 1000 * video + 135)
            path = root / f"v{video}.mp4"
            make_video(path, n=135, size=(80, 80), counters=counters, draw=draw)
            for second in (1, 2, 3):
                for number, (place, action) in enumerate(people(video, second)):
                    box = ",".join(map(str, place))
                    lines.append(f"v{video},{900 + second:04d},{box},{action},{number}")
        (root / f"ava_{part}_v2.2.csv").write_text("\n".join(lines) + "\n")
    (root / "ava_action_list_v2.2_for_activitynet_2019.pbtxt").write_text(CLASSES)
    (root / "ava_val_excluded_timestamps_v2.2.csv").write_text("")
    return ["--dataset", "ava", "--data", str(root), "--out", str(root / "out")]


def test_boxes_and_targets_of_ava_are_those_of_the_clip(tmp_path):
    """Boxes that stay when the picture is flipped or cropped, targets of another person, of another
    key frame, or of a box that only fills up; a clip of another moment.

    Wherever a box is, the picture has there the colour of the box's target, and ends there."""
    words = [word for word in TINY if word not in ("--augment", "none")]
    flags = [*ava_of(tmp_path), *words, "--size", "48", "--test-size", "55", "--epochs", "8"]
    passes, targets, boxes = targets_of(flags)
    trained = [each for each in passes if each.training]
    assert len(trained) == len(targets) == 24 and len(boxes) == len(passes)
    found = Counter()
    for i, (each, (rows, whose)) in enumerate(zip(passes, boxes, strict=True)):
        actions = targets[i].reshape(-1, 80) if each.training else [None] * len(rows)
        for box, clip, target in zip(rows, whose, actions, strict=True):
            frames = pixels(each.clips[clip]).astype(int)  # (T, H, W, 3)
            column, row = ((box[:2] + box[2:]) / 2).astype(int)
            channel = frames[:, row, column].mean(0).argmax()
            if target is not None:
                assert target.nonzero()[0].tolist() == [[*TONES][channel] - 1]
            person = (frames.argmax(-1) == channel) & (frames.max(-1) > 110)  # (T, H, W)
            y, x = person.all(0).nonzero()
            edges = x.min(), y.min(), x.max() + 1, y.max() + 1
            assert np.abs(np.subtract(box, edges)).max() <= 1.5, (box, edges)
            tall, left = box[3] - box[1] > 30, x.mean() < frames.shape[2] / 2
            found[each.training, bool(tall), bool(left)] += 1
    assert min(found[True, tall, left] for tall in (0, 1) for left in (0, 1)) > 20
    assert found[False, True, True] == 4 and found[False, False, False] == 6, found
