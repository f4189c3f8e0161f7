"""Frozen features: backbones and weights from elsewhere, kNN, the linear probe, what it reports."""

import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageDraw
from pytorchvideo.models.resnet import create_resnet
from torch.nn.modules.batchnorm import _BatchNorm

import byol
import common
import conftest
import eval_linear
import moco
import simclr
import swav
from conftest import METHODS, ROOT, SMALL, arguments, result_of, run_ranks
from videos import make_video

# --- backbones and weights


def scrambled(network):
    """The network in eval, all weights and BN statistics random: nothing can agree by accident."""
    torch.manual_seed(5)
    for m in network.modules():
        if isinstance(m, _BatchNorm):
            for tensor in (m.weight, m.running_var):
                torch.nn.init.uniform_(tensor, 0.6, 1.2)
            for tensor in (m.bias, m.running_mean):
                torch.nn.init.normal_(tensor, std=0.1)
    return network.eval()


def pytorchvideo_slow_r50():
    """An independent slow_r50: its head reduced to the global average of the last map."""
    kernels = dict(stem_conv_kernel_size=(1, 7, 7), head_pool_kernel_size=(1, 1, 1))
    network = create_resnet(model_depth=50, model_num_class=7, norm=torch.nn.BatchNorm3d, **kernels)
    return scrambled(network)


def last_map(network, x):
    for block in network.blocks[:-1]:
        x = block(x)
    return x


@pytest.fixture(scope="module")
def theirs():
    return pytorchvideo_slow_r50()


@pytest.mark.parametrize("frames, side", [(2, 224), (2, 256), (16, 64)])
def test_slow_r50_is_pytorchvideos(theirs, frames, side, tmp_path):
    """Random weights mapped from pytorchvideo's names to ours: the same features to 1e-4."""
    torch.save({"model_state": theirs.state_dict()}, tmp_path / "theirs.pyth")
    ours = common.backbone("slow_r50").eval()
    assert eval_linear.load_weights(ours, tmp_path / "theirs.pyth") == 318
    x = torch.randn(1, 3, frames, side, side)
    with torch.no_grad():
        expected = last_map(theirs, x)
        assert (ours.features(x) - expected).abs().max() <= 1e-4 * expected.abs().max()
        torch.testing.assert_close(ours(x), expected.mean((2, 3, 4)), rtol=1e-4, atol=1e-4)


def test_slow_r50_maps_back_to_pytorchvideo(theirs):
    """The other way: our names, put into pytorchvideo's order of layers, give its features."""
    ours = scrambled(common.backbone("slow_r50"))
    both = zip(theirs.state_dict(), ours.state_dict().values(), strict=False)  # but for its head
    twin = pytorchvideo_slow_r50()
    missing, extra = twin.load_state_dict(dict(both), strict=False)
    assert not extra and all(name.startswith("blocks.5.") for name in missing)
    x = torch.randn(1, 3, 4, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.features(x), last_map(twin, x), rtol=1e-4, atol=1e-4)


def test_torchvisions_networks(tmp_path):
    """The trunk of torchvision's network, loaded from its state dict: the same last map."""
    theirs = scrambled(torchvision.models.video.r2plus1d_18())
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    ours = common.backbone("r2plus1d_18").eval()
    count = eval_linear.load_weights(ours, tmp_path / "w.pth")
    assert count == len(ours.state_dict())
    x = torch.randn(1, 3, 16, 64, 64)
    with torch.no_grad():
        stages = [theirs.stem, theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4]
        expected = torch.nn.Sequential(*stages)(x)
        torch.testing.assert_close(ours.features(x), expected)
        torch.testing.assert_close(ours(x), expected.mean((2, 3, 4)))


def test_sizes_of_backbones():
    """Parameters of the trunks, and feature widths that are asked from the module."""
    sizes = {"slow_r50": 31_634_496, "r2plus1d_18": 31_300_125, "s3d_g": 9_098_000}
    for name, size in sizes.items():
        network = common.backbone(name)
        assert sum(p.numel() for p in network.parameters()) == size
        assert network.feature_dim == {"slow_r50": 2048, "r2plus1d_18": 512}.get(name, 1024)


def test_open_gates_make_s3d_g_s3d():
    """Gates that let everything pass, and S3D-G computes torchvision's S3D."""
    network = scrambled(torchvision.models.video.s3d())
    plain, gated = network.features, scrambled(common.backbone("s3d_g"))
    gates = [m for m in gated.modules() if isinstance(m, common.Gate)]
    assert len(gates) == 36  # four branches of nine blocks
    for gate in gates:
        torch.nn.init.zeros_(gate.weight)
        torch.nn.init.constant_(gate.bias, 100.0)
    own_of_gates = re.compile(r"branch\d\.1\.(weight|bias)$")
    rest = [(k, v) for k, v in gated.state_dict().items() if not own_of_gates.search(k)]
    for (_, tensor), (_, own) in zip(plain.state_dict().items(), rest, strict=True):
        own.copy_(tensor)
    x = torch.randn(1, 3, 16, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(gated.features(x), plain(x))


def released_contrastive(trunk):
    """A file as the study released: the query network, its slow copy, heads, queue (recipe: CK)."""
    state = {f"backbone.{name}": tensor for name, tensor in trunk.items()}
    state |= {f"backbone_hist.{name}": tensor + 1 for name, tensor in trunk.items()}
    for i in (0, 2, 4):
        state[f"backbone.head.projection.projection.{i}.weight"] = torch.zeros(3, 3)
    state |= {"queue_x": torch.zeros(8, 4), "ptr": torch.zeros(1), "iter": torch.zeros(1)}
    return {"epoch": 199, "model_state": state, "optimizer_state": {}, "cfg": "MODEL: {}"}


def released_classifier(trunk):
    head = {"head.projection.weight": torch.zeros(7, 2048), "head.projection.bias": torch.zeros(7)}
    return {"epoch": 3, "model_state": {**trunk, **head}, "cfg": ""}


@pytest.mark.parametrize("layout", [released_contrastive, released_classifier])
def test_released_files(layout, tmp_path):
    """SlowFast's files: the query network's trunk, all 318 tensors, whatever else is in them."""
    trunk = scrambled(common.backbone("slow_r50")).state_dict()
    torch.save(layout(trunk), tmp_path / "ssl_checkpoint_epoch_00200.pyth")
    ours = common.backbone("slow_r50")
    assert eval_linear.load_weights(ours, tmp_path / "ssl_checkpoint_epoch_00200.pyth") == 318
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, trunk[name]), name


@pytest.mark.parametrize("script", [simclr, moco, byol, swav])
def test_our_last_pth_gives_the_online_network(script, small, tmp_path):
    """last.pth and backbone.pth hold the same backbone, never the slowly moving one."""
    script.main([*small, "--max-steps", "2", "--lr", "9", "--warmup", "0"])
    loaded = []
    for name in ("last.pth", "backbone.pth"):
        network = common.backbone("tiny")
        eval_linear.load_weights(network, tmp_path / "out" / name)
        loaded.append(network.state_dict())
    model = torch.load(tmp_path / "out/last.pth", weights_only=True)["model"]
    for name, tensor in loaded[0].items():
        assert torch.equal(tensor, loaded[1][name])
        assert torch.equal(tensor, model[f"encoder.backbone.{name}"])
    slow = model.get("target.backbone.stage0.0.weight")
    assert slow is None or not torch.equal(slow, loaded[0]["stage0.0.weight"])


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def wrong_file(kind, path):
    state = common.backbone("tiny").state_dict()
    if kind == "one missing":
        del state["stage3.1.running_var"]
    elif kind == "wrong shape":
        state["stage3.1.running_var"] = torch.zeros(3)
    elif kind == "not finite":
        state["stage3.1.running_var"][2] = math.inf
    elif kind == "foreign":
        state = {"conv1.weight": torch.zeros(3)}
    elif kind == "text":
        return path.write_text("weights")
    elif kind == "hostile":
        state = Hostile()
    elif kind == "list":
        state = [torch.zeros(3)]
    elif kind == "numbers":
        state = dict.fromkeys(state, 1.0)
    elif kind == "numbered":
        state = dict(enumerate(state.values()))
    elif kind == "settings that are a text":
        state = {"state_dict": {}, "config": "size: 32, frames: 8"}
    elif kind == "empty":
        return path.write_bytes(b"")
    elif kind in ("part of the query network", "part of the encoder"):  # the slow one is whole
        fast, slow = {"part of the query network": ("backbone.", "backbone_hist.")}.get(
            kind, ("encoder.backbone.", "target.backbone.")
        )
        whole = {slow + name: tensor for name, tensor in state.items()}
        del state["stage3.1.running_var"]
        state = {"model": {**{fast + name: tensor for name, tensor in state.items()}, **whole}}
    torch.save(state, path)


KINDS = ["one missing", "wrong shape", "not finite", "foreign", "text", "hostile", "list", "absent"]
KINDS += ["numbers", "numbered", "settings that are a text", "empty"]
KINDS += ["part of the query network", "part of the encoder"]


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_weights_are_refused(kind, tmp_path, monkeypatch):
    """All of the backbone's tensors, finite, or a ValueError of one line; no code in it is run."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pth"
    if kind != "absent":
        wrong_file(kind, path)
    with pytest.raises(ValueError) as caught:
        eval_linear.load_weights(common.backbone("tiny"), path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and not Path("ran").exists()
    if kind in ("one missing", "wrong shape", "not finite") or kind.startswith("part"):
        assert "stage3.1.running_var" in message


# --- test views and kNN


@pytest.mark.parametrize("n", [7, 30, 300])
def test_knn_is_its_definition(n):
    """A loop: the 20 most similar, each with a vote of exp(s / 0.07)."""
    rng = torch.Generator().manual_seed(n)
    bank, queries = torch.randn(n, 5, generator=rng), torch.randn(290, 5, generator=rng)
    labels, truth = (torch.randint(4, (k,), generator=rng) for k in (n, 290))
    right = 0
    for q, y in zip(queries, truth, strict=True):
        s = [float(q @ b / q.norm() / b.norm()) for b in bank]
        votes = [0.0] * 4
        for i in sorted(range(n), key=lambda i: -s[i])[:20]:
            votes[labels[i]] += math.exp(s[i] / 0.07)
        right += votes.index(max(votes)) == y
    assert common.knn_accuracy(bank, labels, queries, truth) == pytest.approx(100 * right / 290)


# --- the probe


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two classes that differ in brightness, 12 videos to train on and 7 to test."""
    root = tmp_path_factory.mktemp("data")

    def shade(counter, width, height):
        noise = np.random.default_rng(counter).integers(0, 60, (height, width, 3))
        return (noise + (150 if counter % 2 else 20)).astype(np.uint8)

    for part, n in (("train", 12), ("val", 7)):
        for i in range(n):
            place = root / part / ("light" if i % 2 else "dark")
            place.mkdir(parents=True, exist_ok=True)
            make_video(
                place / f"{part}{i:02d}.mp4", n=12, size=(40, 30), counters=[i % 2] * 12, draw=shade
            )
    return root


@pytest.fixture(scope="module")
def hard(tmp_path_factory):
    """Three classes of colours that overlap, so that no read-out is right or wrong everywhere; 24
    videos to train on and 13 to test."""
    root = tmp_path_factory.mktemp("hard")

    def coloured(counter, width, height):
        video, time = divmod(counter, 100)
        rng = np.random.default_rng(video)
        tone = 80 + 40 * np.eye(3)[video % 3] + rng.normal(0, 25, 3) + time * rng.normal(0, 1, 3)
        noise = np.random.default_rng(counter).normal(0, 20, (height, width, 3))
        return np.clip(tone + noise, 0, 255).astype(np.uint8)

    for part, first, n in (("train", 0, 24), ("val", 24, 13)):
        for video in range(first, first + n):
            place = root / part / "abc"[video % 3]
            place.mkdir(parents=True, exist_ok=True)
            frames = range(100 * video, 100 * video + 24)
            path = place / f"{video:02d}.mp4"
            make_video(path, n=24, size=(32, 24), counters=frames, draw=coloured)
    return root


@pytest.fixture(scope="module")
def weights(data, tmp_path_factory):
    """A backbone of a run of two steps."""
    out = tmp_path_factory.mktemp("weights")
    argv = ["--data", str(data / "train"), "--out", str(out), *SMALL, "--knn-every", "0"]
    byol.main([*argv, "--max-steps", "2"])
    return out / "backbone.pth"


@pytest.fixture
def argv(data, weights, tmp_path):
    flags = ["--weights", str(weights), "--data", str(data), "--out", str(tmp_path / "probe")]
    return [*flags, "--workers", "0", "--batch-size", "4", "--epochs", "6", "--warmup", "0.16"]


def probe(argv):
    eval_linear.main(argv)
    return result_of(argv)


refused = partial(conftest.refused, eval_linear)


def test_cached_probe_end_to_end(argv, weights, data, tmp_path, capfd):
    """result.json has what it takes to repeat it; its kNN equals one on the extracted features."""
    result = probe([*argv, "--cached", "--lr", "0.1"])
    assert "weights: 30 of 30 backbone tensors" in capfd.readouterr().out
    keys = "knn_top1 linear_top1 linear_top5 n missing classes views protocol weights seed command"
    assert set(f"{keys} versions backbone per_class".split()) == set(result)
    assert (result["n"], result["missing"], result["classes"], result["views"]) == (7, 0, 2, 4)
    assert result["linear_top1"] == 100 and result["linear_top5"] == 100
    assert result["per_class"] == {"dark": 100, "light": 100} and "cached" in result["protocol"]
    rows = []
    for part in ("train", "val"):
        out = ["--extract", str(tmp_path / f"{part}.npz"), "--data", str(data / part)]
        eval_linear.main([*argv, *out])
        rows.append(np.load(tmp_path / f"{part}.npz"))
        assert list(rows[-1]["paths"]) == sorted(str(p) for p in (data / part).rglob("*.mp4"))
        assert [Path(p).parent.name == "light" for p in rows[-1]["paths"]] == list(
            rows[-1]["labels"]
        )
    tensors = [torch.from_numpy(rows[i][k]) for i in (0, 1) for k in ("features", "labels")]
    assert common.knn_accuracy(*tensors) == pytest.approx(result["knn_top1"], abs=0.01)


def test_full_protocol_leaves_the_backbone_alone(argv, weights, tmp_path):
    """60 epochs' protocol at toy size: every backbone tensor, BN's too, is bit-equal afterwards."""
    result = probe([*argv, "--no-cached", "--test-clips", "2"])
    assert result["n"] == 7 and result["views"] == 6 and "in eval" in result["protocol"]
    after = torch.load(tmp_path / "probe/last.pth", weights_only=True)["model"]
    for name, tensor in torch.load(weights, weights_only=True)["state_dict"].items():
        assert torch.equal(after[f"encoder.backbone.{name}"], tensor), name
    assert after["encoder.linear.weight"].shape == (2, 64)


def test_a_frozen_tensor_that_moves_is_noticed():
    """The assertion after training can fail."""
    network = common.backbone("tiny")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert eval_linear.moved(network, before) == []
    network[0][1].running_mean += 1
    assert eval_linear.moved(network, before) == ["stage0.1.running_mean"]


@pytest.fixture
def hard_argv(hard, weights, tmp_path):
    flags = ["--weights", str(weights), "--data", str(hard), "--out", str(tmp_path / "probe")]
    return [*flags, "--workers", "0", "--batch-size", "6", "--epochs", "6", "--warmup", "0.16"]


def ranked(argv):
    eval_linear.main(argv)


def scored(argv):
    """Run a probe; what it reports: softmax scores (n, classes), labels (n,) and kNN."""
    report, seen = eval_linear.report, []
    eval_linear.report = lambda *args: (seen.extend(args), report(*args))[1]
    try:
        eval_linear.main(argv)
    finally:
        eval_linear.report = report
    _, _, nearest, scores, labels = seen
    return scores.numpy(), labels.numpy(), nearest


@pytest.mark.parametrize("mode", ["--cached", "--no-cached"])
def test_any_number_of_ranks_scores_every_video_once(mode, hard_argv):
    """1, 2 and 3 processes: 13 of 13 videos and the same scores of each, on every rank; cached, to
    the last bit (else gradients are summed in another order)."""
    results, first = [], None
    for ranks in (1, 2, 3):
        out = f"{hard_argv[5]}-{ranks}"
        for scores, labels, nearest in run_ranks(ranks, scored, [*hard_argv, mode, "--out", out]):
            first = first or (scores, labels, nearest)
            assert scores.shape == (13, 3) and len({*scores[:, 0]}) == 13
            np.testing.assert_allclose(scores, first[0], atol=0 if mode == "--cached" else 1e-5)
            assert list(labels) == list(first[1]) and nearest == first[2]
        results.append({**json.loads(Path(out, "result.json").read_text()), "command": ""})
    assert results[0] == results[1] == results[2]
    assert (results[0]["n"], results[0]["missing"]) == (13, 0)


def extracted(argv, source, npz):
    eval_linear.main([*argv, "--data", str(source), "--extract", str(npz)])


def test_extracted_features_keep_the_order_and_give_the_knn(
    hard, weights, hard_argv, tmp_path, monkeypatch
):
    """A shuffled list: features, labels and paths in its order, bit-equal on 1, 2 and 3 ranks, each
    the backbone's of that video; a loop over them gives the knn_top1 of the result."""
    rows, network = [], common.backbone("tiny").eval()
    eval_linear.load_weights(network, weights)
    for part in ("train", "val"):
        videos = sorted((hard / part).rglob("*.mp4"))
        np.random.default_rng(1).shuffle(videos)
        text = "".join(f"{path}\t{path.parent.name}\n" for path in videos)
        (tmp_path / f"{part}.txt").write_text(text)
        for ranks in (1, 2, 3) if part == "val" else (1,):
            npz = tmp_path / f"{part}-{ranks}.npz"
            run_ranks(ranks, extracted, hard_argv, tmp_path / f"{part}.txt", npz)
            found = np.load(npz)
            assert list(found["paths"]) == [str(path) for path in videos]
            assert ["abc"[i] for i in found["labels"]] == [path.parent.name for path in videos]
            assert np.array_equal(
                found["features"], np.load(npz.with_stem(f"{part}-1"))["features"]
            )
        clips = common.read_clips(videos[3], [i / 4 * 8 / 30 for i in range(4)], 4, 4, 18)
        x = (torch.tensor(clips[:, :, :, 3:21]).permute(0, 4, 1, 2, 3) / 255 - 0.45) / 0.225
        with torch.no_grad():
            np.testing.assert_allclose(found["features"][3], network(x).mean(0), rtol=1e-4)
        rows.append(found)
    (bank, labels), (queries, truth) = ((r["features"], r["labels"]) for r in rows)
    right = 0
    for q, y in zip(queries, truth, strict=True):
        s = [q @ b / np.linalg.norm(q) / np.linalg.norm(b) for b in bank]
        votes = [0.0] * 3
        for i in sorted(range(len(bank)), key=lambda i: -s[i])[:20]:
            votes[labels[i]] += math.exp(s[i] / 0.07)
        right += votes.index(max(votes)) == y
    assert 0 < right < 13
    knn, seen = common.knn_accuracy, []
    monkeypatch.setattr(common, "knn_accuracy", lambda *args: (seen.extend(args), knn(*args))[1])
    assert probe([*hard_argv, "--cached"])["knn_top1"] == round(100 * right / 13, 2)
    for found, used in zip(rows, (seen[0], seen[2]), strict=True):  # those in order of their names
        np.testing.assert_allclose(found["features"][found["paths"].argsort()], used, rtol=1e-5)


def test_result_is_that_of_the_saved_probe(hard, hard_argv, tmp_path):
    """The full protocol's numbers, again, from last.pth: softmax averaged over 10 clips x 3 crops
    of each test video."""
    reported, _, _ = scored([*hard_argv, "--no-cached"])
    result = result_of(hard_argv)
    model = torch.load(tmp_path / "probe/last.pth", weights_only=True)["model"]
    network, right = common.backbone("tiny").eval(), {"a": [], "b": [], "c": []}
    network.load_state_dict(
        {k.removeprefix("encoder.backbone."): v for k, v in model.items() if "backbone" in k}
    )
    for path, row in zip(sorted((hard / "val").rglob("*.mp4")), reported, strict=True):
        last = 24 / 30 - 4 * 4 / 30
        clips = common.read_clips(path, [i / 10 * last for i in range(10)], 4, 4, 18)
        total = torch.zeros(3)
        for left in (0, 3, 6):  # 24 pixels wide
            x = torch.tensor(clips[:, :, :, left : left + 18]).permute(0, 4, 1, 2, 3)
            with torch.no_grad():
                features = network((x / 255 - 0.45) / 0.225)
            scores = features @ model["encoder.linear.weight"].T + model["encoder.linear.bias"]
            total += scores.exp().div(scores.exp().sum(1, keepdim=True)).sum(0)
        np.testing.assert_allclose(row, total / 30, atol=1e-5)
        right[path.parent.name].append(100.0 * ("abc"[total.argmax()] == path.parent.name))
    assert result["per_class"] == {name: round(np.mean(each), 2) for name, each in right.items()}
    assert result["linear_top1"] == round(np.mean(sum(right.values(), [])), 2)
    assert 34 < result["linear_top1"] < 100 and result["views"] == 30


def test_report_counts_hits(tmp_path, capsys):
    """Top 1 and top 5 of eight classes, and each class's own share, counted by hand."""
    scores = torch.arange(8.0, 0, -1).repeat(4, 1)  # the first class is first, the last is last
    names = [f"class {i}" for i in range(8)]
    cfg = arguments(eval_linear, weights="random", seed=3, out=str(tmp_path))
    paths = [str(i) for i in range(6)]
    test = common.VideoClips(cfg, None, videos=(paths, names[:6]))
    test.classes = names
    eval_linear.report(cfg, test, 12.345, scores, torch.tensor([0, 0, 4, 5]))
    line, path = capsys.readouterr().out.splitlines()[-2:]
    assert line == "linear 50.0 %  kNN 12.3 %  (4 videos, 8 classes, chance 12.5 %)"
    assert path == str(tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["linear_top1"], result["linear_top5"]) == (50, 75)
    assert (result["n"], result["missing"], result["classes"]) == (4, 2, 8)
    assert result["per_class"] == {"class 0": 100, "class 4": 0, "class 5": 0}


def test_cached_probe_learns_what_is_there():
    """Classes apart in one of 20 features, whose scale is a millionth of the others': all right;
    shuffled labels: chance. So features are standardised, and nothing else leaks."""
    torch.manual_seed(0)
    labels = torch.arange(300) % 3
    x = torch.randn(300, 2, 20)
    x[..., 7] = 1e-2 * (labels[:, None] + 0.05 * torch.randn(300, 2))
    x[..., :7] = 1e4 * x[..., :7] + 1e5
    cfg = arguments(eval_linear, epochs=40, batch_size=30)

    def accuracy(train_labels):
        scores = eval_linear.cached_probe(cfg, x[:200], train_labels, x[200:], 3)
        torch.testing.assert_close(scores.sum(1), torch.ones(100))
        return (scores.argmax(1) == labels[200:]).float().mean()

    assert accuracy(labels[:200]) > 0.97
    assert 0.1 < accuracy(labels[:200][torch.randperm(200)]) < 0.6


def test_learning_rates_of_the_cached_probe(monkeypatch):
    """A schedule that is a step ahead, or that ends early or late."""
    asked, real = [], common.learning_rate
    monkeypatch.setattr(common, "learning_rate", lambda *args: asked.append(args[1]) or real(*args))
    cfg = arguments(eval_linear, epochs=3, batch_size=5)
    eval_linear.cached_probe(
        cfg, torch.randn(20, 2, 4), torch.arange(20) % 2, torch.ones(1, 2, 4), 2
    )
    assert [*dict.fromkeys(asked)] == pytest.approx([step / 12 for step in range(12)])


def stopped(argv):
    record, count = common.Run.record, 0

    def counted(*args, **more):
        nonlocal count
        count += 1
        if count == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        record(*args, **more)

    common.Run.record = counted
    eval_linear.main(argv)


def test_stop_and_resume_give_the_same_result(argv, tmp_path):
    """SIGTERM in the probe writes no result; the same command ends as an undisturbed run."""
    flags = [*argv, "--no-cached", "--test-clips", "1"]
    run_ranks(1, stopped, flags)
    assert not (tmp_path / "probe/result.json").exists()
    run_ranks(1, ranked, flags)
    run_ranks(1, ranked, [*flags, "--out", str(tmp_path / "whole")])
    one, two = (json.loads((tmp_path / f"{n}/result.json").read_text()) for n in ("probe", "whole"))
    assert {**one, "command": ""} == {**two, "command": ""}
    states = [
        torch.load(tmp_path / f"{n}/last.pth", weights_only=True)["model"]
        for n in ("probe", "whole")
    ]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_retrained_weights_are_not_mixed_with_an_old_probe(argv, weights, tmp_path, capfd):
    """Another file at the same path: the old probe is not continued, as one line says."""
    copy = tmp_path / "w.pth"
    copy.write_bytes(weights.read_bytes())
    flags = [*argv, "--weights", str(copy), "--no-cached", "--test-clips", "1", "--max-steps"]
    eval_linear.main([*flags, "2"])
    saved = torch.load(copy, weights_only=True)
    saved["state_dict"]["stage0.0.weight"] += 1
    torch.save(saved, copy)
    before = (tmp_path / "probe/last.pth").read_bytes()
    assert "w.pth is not what" in refused([*flags, "4"], capfd)
    assert (tmp_path / "probe/last.pth").read_bytes() == before


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_weights_end_the_probe(kind, argv, tmp_path, monkeypatch, capfd):
    """Each is one line on stderr and exit code 2; never a probe of random weights."""
    monkeypatch.chdir(tmp_path)
    if kind != "absent":
        wrong_file(kind, tmp_path / "w.pth")
    assert "w.pth" in refused([*argv, "--weights", "w.pth", "--backbone", "tiny"], capfd)
    assert not (tmp_path / "probe/result.json").exists()


def test_random_weights_are_asked_for(argv, capfd):
    """Without --weights there is no probe; random is the named baseline, and warned of."""
    nothing = [*argv[2:], "--backbone", "tiny", "--size", "16", "--frames", "4", "--stride", "4"]
    assert "--weights" in refused(nothing, capfd)
    assert probe([*nothing, "--weights", "random", "--cached"])["weights"] == "random"
    assert "WARN the backbone starts from random weights" in capfd.readouterr().out


def test_no_test_videos(argv, data, capfd):
    """A folder without val/ beside it: what is missing is said."""
    flags = [*argv, "--data", str(data / "val")]
    assert "no test videos: give --val, or --data with train/ and val/" in refused(flags, capfd)


def test_a_csv_with_splits(argv, data, tmp_path):
    """The rows train are trained on, val or test are tested on, also with the list as --val; a csv
    without splits is all for testing."""
    rows = {part: sorted((data / part).rglob("*.mp4")) for part in ("train", "val")}
    lines = [f"{path},{path.parent.name},{part}" for part in rows for path in rows[part]]
    lines[-1] = lines[-1].removesuffix("val") + "test"
    (tmp_path / "all.csv").write_text("\r\n".join(["path,label,split", *lines]))
    lines = [f"{path},{path.parent.name}" for path in rows["val"]]
    (tmp_path / "val.csv").write_text("\n".join(["path,label", *lines]))
    expected = probe([*argv, "--cached"])
    for flags in ([], ["--val", str(tmp_path / "all.csv")], ["--val", str(tmp_path / "val.csv")]):
        result = probe([*argv, "--cached", "--data", str(tmp_path / "all.csv"), *flags])
        for key in ("knn_top1", "linear_top1", "n", "per_class"):
            assert result[key] == expected[key]


def test_a_finished_probe_goes_on_to_testing(argv, tmp_path, capfd):
    """The same command again trains nothing, and tests: also with other test views."""
    flags = [*argv, "--no-cached", "--test-clips", "1"]
    first = probe(flags)
    saved = (tmp_path / "probe/last.pth").read_bytes()
    capfd.readouterr()
    assert {**probe(flags), "command": ""} == {**first, "command": ""}
    assert "nothing was trained" in capfd.readouterr().out
    assert probe([*flags, "--test-clips", "2"])["views"] == 6
    assert (tmp_path / "probe/last.pth").read_bytes() == saved


@pytest.mark.parametrize("given", [(), ("frames", "size"), ("stride",)])
def test_flags_win_over_the_settings_of_the_weights(given, weights):
    """A clip or crop that is always the weights' own, whatever the flags say, or never."""
    flags = [word for name in given for word in ("--" + name, "24")]
    argv = ["--weights", str(weights), "--data", "x", *flags]
    cfg = common.parse_args(eval_linear.Config, eval_linear.DEMO, argv)
    eval_linear.fill_settings(cfg)
    trained = dict(backbone="tiny", frames=4, stride=4, size=16)
    expected = {name: 24 if name in given else value for name, value in trained.items()}
    assert {name: getattr(cfg, name) for name in trained} == expected
    assert cfg.test_size == round(expected["size"] * 256 / 224)


def test_weights_may_be_a_runs_folder(argv, weights, capfd):
    """The folder, its backbone.pth and its last.pth give the same result, with the settings that
    are in them; a folder without weights is refused."""
    results = []
    for path in (weights, weights.parent, weights.with_name("last.pth")):
        results.append(probe([*argv, "--weights", str(path), "--cached"]))
    assert results[1]["weights"] == str(weights)
    for result in results:
        assert {**result, "weights": "", "command": ""} == {
            **results[0],
            "weights": "",
            "command": "",
        }
    assert "backbone.pth" in refused([*argv, "--weights", str(weights.parent.parent)], capfd)


@pytest.mark.parametrize("mode", ["--cached", "--no-cached"])
def test_neighbours(mode, hard, hard_argv, weights, tmp_path, monkeypatch):
    """A row for each of six test videos: its middle frame, then those of the five training videos
    that are nearest by cosine; class and name below; the result is as without."""
    names, draw = [], ImageDraw.ImageDraw.text

    def text(self, xy, words, **more):
        names.append((words, xy))
        return draw(self, xy, words, **more)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    flags = [*hard_argv, mode, "--epochs", "2", "--neighbours", str(tmp_path / "n.png")]
    assert probe([*flags, "--test-clips", "1"])["n"] == 13
    picture = np.asarray(Image.open(tmp_path / "n.png")).astype(float)
    assert picture.shape == (6 * 174, 6 * 160, 3) and len(names) == 36
    network = common.backbone("tiny").eval()
    eval_linear.load_weights(network, weights)

    def features(path):
        clips = common.read_clips(path, [i / 4 * 8 / 30 for i in range(4)], 4, 4, 18)
        x = (torch.tensor(clips[:, :, :, 3:21]).permute(0, 4, 1, 2, 3) / 255 - 0.45) / 0.225
        with torch.no_grad():
            return network(x).mean(0).numpy()

    bank = {path: features(path) for path in sorted((hard / "train").rglob("*.mp4"))}
    named = {p: f"{p.parent.name}: {p.name}"[:26] for p in hard.rglob("*.mp4")}
    tests = {named[path]: path for path in (hard / "val").rglob("*.mp4")}
    for row in range(6):
        shown = [words for words, _ in names[6 * row : 6 * row + 6]]
        q = features(tests[shown[0]])
        cosine = {p: f @ q / np.linalg.norm(f) / np.linalg.norm(q) for p, f in bank.items()}
        nearest = sorted(bank, key=cosine.get, reverse=True)[:5]
        assert shown[1:] == [named[path] for path in nearest]
        for column, path in enumerate([tests[shown[0]], *nearest]):
            assert names[6 * row + column][1][1] >= 160  # below its picture
            frame = common.read_clips(path, [0.4], 1, 1, 160)[0, 0]  # of 0.8 s, 213 pixels wide
            drawn = picture[174 * row : 174 * row + 160, 160 * column : 160 * column + 160]
            assert np.abs(drawn - frame[:, 26:186]).mean() < 1


def test_neighbours_beside_a_bad_video(hard, hard_argv, tmp_path, monkeypatch):
    """Rows of the features taken for numbers of the videos, in the picture or for the labels: they
    differ after a bad video."""
    names, draw = [], ImageDraw.ImageDraw.text

    def text(self, xy, words, **more):
        names.append(words)
        return draw(self, xy, words, **more)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    flags = [*hard_argv, "--cached", "--epochs", "1", "--neighbours", str(tmp_path / "n.png")]
    result = probe(flags)
    good = names.copy()
    lists = []
    for part in ("train", "val"):
        rows = [(path, path.parent.name) for path in sorted((hard / part).rglob("*.mp4"))]
        rows.insert(0, (tmp_path / "missing.mp4", "a"))
        lists.append(tmp_path / f"{part}.txt")
        lists[-1].write_text("".join(f"{path}\t{label}\n" for path, label in rows))
    names.clear()
    flags += ["--data", str(lists[0]), "--val", str(lists[1]), "--allow-missing"]
    assert {**probe(flags), "missing": 0, "command": ""} == {**result, "command": ""}
    assert names == good and len(names) == 36


def test_labels_that_do_not_fit(argv, data, tmp_path, capfd):
    """Classes only in the test set, or no labels, are errors; an untested class and videos that are
    in both sets are warned of by name."""
    lists = {part: sorted((data / part).rglob("*.mp4")) for part in ("train", "val")}

    def listed(name, rows):
        (tmp_path / name).write_text("".join(f"{path}\t{label}\n" for path, label in rows))
        return str(tmp_path / name)

    train = listed("train.txt", [(p, p.parent.name) for p in lists["train"]])
    strange = listed("strange.txt", [(p, "grey") for p in lists["val"]])
    bare = listed("bare.txt", [(p, "") for p in lists["val"]])
    flags = [*argv, "--cached", "--data", train, "--val"]
    assert "grey" in refused([*flags, strange], capfd)
    assert "without a label" in refused([*flags, bare], capfd)
    dark = listed("dark.txt", [(p, "dark") for p in (data / "val/dark").iterdir()])
    eval_linear.main([*flags, dark])
    assert "no test video of class light" in capfd.readouterr().out
    eval_linear.main([*flags, train, "--out", str(tmp_path / "both")])
    assert "WARN 12 videos are in --data and --val" in capfd.readouterr().out


@pytest.mark.parametrize("kind", ["missing", "unreadable"])
def test_a_bad_test_video_is_fatal_unless_allowed(kind, argv, data, tmp_path, capfd):
    """Exit code 2 that names it; with --allow-missing it is left out, named and counted."""
    bad = tmp_path / "bad.mp4"
    if kind == "unreadable":
        bad.write_text("no video")
    rows = [*sorted((data / "val").rglob("*.mp4"))]
    lines = [f"{path}\t{path.parent.name}" for path in rows] + [f"{bad}\tdark"]
    (tmp_path / "val.txt").write_text("\n".join(lines))
    flags = [*argv, "--cached", "--data", str(data / "train"), "--val", str(tmp_path / "val.txt")]
    assert "bad.mp4" in refused(flags, capfd)
    result = probe([*flags, "--allow-missing"])
    assert (result["n"], result["missing"]) == (7, 1)
    assert capfd.readouterr().out.count("WARN left out: ") == 1
    without = probe([*argv, "--cached"])
    for key in ("knn_top1", "linear_top1", "per_class"):
        assert result[key] == without[key]
    both = ["--data", str(tmp_path / "val.txt"), "--extract", str(tmp_path / "x.npz")]
    assert "bad.mp4" in refused([*argv, *both], capfd)
    eval_linear.main([*argv, *both, "--allow-missing"])
    out, rows = capfd.readouterr().out, np.load(tmp_path / "x.npz")
    assert out.count("bad.mp4") == 1 and "WARN left out: " in out
    assert len(rows["features"]) == len(rows["labels"]) == len(rows["paths"])
    good = np.isfinite(rows["features"]).all(1)
    assert good.sum() == 7 and not any("bad.mp4" in path for path in rows["paths"][good])


@pytest.mark.parametrize(
    "wrong", ["--val nowhere", "--out /dev/null/x", "--test-clips 0", "--extract no/where.npz"]
)
def test_wrong_flags(wrong, argv, capfd):
    """One line, exit code 2, before the work."""
    flag, value = wrong.split()
    error = refused([*argv, flag, value], capfd)
    assert flag in error or value in error


def test_backbone_opens_in_a_fresh_interpreter(weights, data, tmp_path):
    """The README's six lines, beside a common.py and nothing else of ours: the same features."""
    blocks = (ROOT / "README.md").read_text().split("```python\n")[1:]
    code = next(block.split("```")[0] for block in blocks if "load_backbone" in block)
    assert len(code.strip().splitlines()) <= 6
    code = re.sub(r'"out/[^"]*"', repr(str(weights)), code)
    code = re.sub(r'"[^"]*\.mp4"', repr(str(next(data.rglob("*.mp4")))), code)
    code += "import json\nprint(json.dumps([clip.tolist(), features.tolist()]))\n"
    (tmp_path / "common.py").write_bytes((ROOT / "common.py").read_bytes())
    run = [sys.executable, "-c", "import torch; torch.set_num_threads(1)\n" + code]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    clip, features = map(torch.tensor, json.loads(done.stdout))
    network = common.backbone("tiny").eval()
    eval_linear.load_weights(network, weights)
    with torch.no_grad():
        torch.testing.assert_close(features, network(clip))


# --- kNN while training


def curve(out):
    lines = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    return [(line["epoch"], line["knn_top1"]) for line in lines if "knn_top1" in line]


def trained(argv, stop=0):
    byol.main([*argv, *(["--max-steps", str(stop)] if stop else [])])


def monitored(out, bank, queries):
    """kNN accuracy that the last line of a run should have: the saved backbone, 2 clips a video, a
    loop over the definition."""
    network = common.backbone("tiny").eval()
    eval_linear.load_weights(network, out / "backbone.pth")

    def features(path):
        clips = common.read_clips(path, [0, (24 - 16) / 30 / 2], 4, 4, 16)  # 21 pixels wide
        x = torch.tensor(clips[:, :, :, 2:18]).permute(0, 4, 1, 2, 3) / 255
        with torch.no_grad():
            return network((x - 0.45) / 0.225).mean(0).numpy()

    banked = [(features(path), path.parent.name) for path in bank]
    right = 0
    for path in queries:
        q, votes = features(path), dict.fromkeys("abc", 0.0)
        cosines = [(b @ q / np.linalg.norm(b) / np.linalg.norm(q), label) for b, label in banked]
        for s, label in sorted(cosines, reverse=True)[:20]:
            votes[label] += math.exp(s / 0.07)
        right += max(votes, key=votes.get) == path.parent.name
    return 100 * right / len(queries)


def test_knn_curve_is_the_same_after_a_resume(hard, tmp_path):
    """Every 2 epochs and at the end, every fifth video against the others: the same whether stopped
    or not, on 1 process and on 2; the last is that of the saved backbone."""
    argv = ["--data", str(hard / "train"), *SMALL, "--epochs", "5", "--knn-every", "2", "--out"]
    curves = []
    for ranks in (1, 2):
        run_ranks(ranks, trained, [*argv, str(tmp_path / f"whole{ranks}")])
        run_ranks(ranks, trained, [*argv, str(tmp_path / f"parts{ranks}")], 8 * ranks + 1)
        run_ranks(ranks, trained, [*argv, str(tmp_path / f"parts{ranks}")])
        curves.append(curve(tmp_path / f"whole{ranks}"))
        assert [epoch for epoch, _ in curves[-1]] == [2, 4, 5]
        assert curves[-1] == curve(tmp_path / f"parts{ranks}")
        videos = sorted((hard / "train").rglob("*.mp4"))
        bank = [path for i, path in enumerate(videos) if i % 5]
        expected = monitored(tmp_path / f"whole{ranks}", bank, videos[::5])
        assert curves[-1][-1][1] == pytest.approx(expected, rel=1e-4) and 0 < expected < 100


def test_knn_leaves_training_alone(hard, tmp_path):
    """Measured after every epoch or never: the same weights, statistics of BN too."""
    argv = ["--data", str(hard / "train"), *SMALL, "--epochs", "3", "--out"]
    files = []
    for every in ("1", "0"):
        byol.main([*argv, str(tmp_path / every), "--knn-every", every])
        files.append(torch.load(tmp_path / every / "last.pth", weights_only=True)["model"])
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


class Still(torch.nn.BatchNorm3d):
    """BN by running statistics, which stay as they are."""

    def forward(self, x):
        fixed = self.running_mean, self.running_var, self.weight, self.bias
        return torch.nn.functional.batch_norm(x, *fixed, eps=self.eps)


def without_batch_statistics(argv):
    """SimCLR without the one thing that does depend on the number of processes."""
    torch.nn.BatchNorm3d = Still
    simclr.main([*argv, "--no-projector-bn"])


def test_knn_curve_is_the_same_on_ranks(hard, tmp_path):
    """1 and 2 processes, which train the same network: the same accuracy after every epoch."""
    argv = ["--data", str(hard / "train"), *SMALL, "--knn-every", "1", "--lr", "0.03", "--out"]
    for ranks in (1, 2):
        run_ranks(
            ranks, without_batch_statistics, [*argv, str(tmp_path / str(ranks)), "--epochs", "4"]
        )
    one, two = curve(tmp_path / "1"), curve(tmp_path / "2")
    assert one == two and [epoch for epoch, _ in one] == [1, 2, 3, 4]
    assert len({accuracy for _, accuracy in one}) > 1


def _networks_of_knn(argv):
    networks, measure = [], common.Run.measure_knn

    def noted(self):
        state = self.model.encoder.backbone.state_dict()
        networks.append({name: tensor.numpy().copy() for name, tensor in state.items()})
        return measure(self)

    common.Run.measure_knn = noted
    byol.main(argv)
    return networks


def test_all_ranks_measure_one_network(hard, tmp_path):
    """BN statistics of each rank's own: half of the features would be another network's."""
    argv = ["--data", str(hard / "train"), "--out", str(tmp_path / "out"), *SMALL]
    first, second = run_ranks(2, _networks_of_knn, [*argv, "--knn-every", "1"])
    assert len(first) == len(second) == 2
    for one, two in zip(first, second, strict=True):
        assert all(np.array_equal(value, two[name]) for name, value in one.items())


def test_monitoring_changes_nothing(hard, tmp_path):
    """With and without --knn-every: the same weights and BN statistics, bit for bit."""
    for every in ("0", "1"):
        argv = ["--data", str(hard / "train"), *SMALL, "--queue", "50", "--knn-every", every]
        moco.main([*argv, "--out", str(tmp_path / every)])
    models = [torch.load(tmp_path / n / "last.pth", weights_only=True)["model"] for n in "01"]
    assert not curve(tmp_path / "0") and len(curve(tmp_path / "1")) == 2
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())


@pytest.mark.parametrize("method", METHODS)
def test_unlabelled_data_train_without_knn(method, folder, tmp_path):
    """No labels: no kNN, and the run goes on."""
    rows = "".join(f"{path}\n" for path in sorted(folder.rglob("*.mp4")))
    (tmp_path / "list.txt").write_text(rows)
    flags = ["--data", str(tmp_path / "list.txt"), "--out", str(tmp_path / "out"), *SMALL]
    __import__(method).main([*flags, "--max-steps", "2", "--knn-every", "1"])
    assert (tmp_path / "out/log.jsonl").read_text() and not curve(tmp_path / "out")


@pytest.mark.parametrize(
    "weights, data, expected",
    [
        ("runs/byol-demo-rho2/backbone.pth", "", "out/eval_linear-byol-demo-rho2"),
        ("dl/moco.pyth", "sets/tennis", "out/eval_linear-tennis-moco"),
        ("random", "sets/tennis.txt", "out/eval_linear-tennis-random"),
    ],
)
def test_default_folders_do_not_collide(weights, data, expected, tmp_path, monkeypatch):
    """The name has the data and the weights: the run's folder of ours, the file of another's."""
    monkeypatch.chdir(tmp_path)
    if weights != "random":
        Path(weights).parent.mkdir(parents=True)
        torch.save({"state_dict": {}}, weights)
    flags = ["--weights", weights, *(["--data", data] if data else [])]
    cfg = common.parse_args(eval_linear.Config, eval_linear.DEMO, flags)
    eval_linear.fill_settings(cfg)
    assert cfg.out == expected


@pytest.mark.parametrize("script", ["eval_linear", "finetune"])
def test_one_class_is_refused(script, folder, tmp_path, capfd):
    """A classifier of one class would be right and say nothing: one line, exit code 2."""
    videos = sorted(folder.rglob("*.mp4"))
    (tmp_path / "one.txt").write_text("".join(f"{path}\tsame\n" for path in videos))
    flags = ["--data", str(tmp_path / "one.txt"), "--val", str(tmp_path / "one.txt"), "--small"]
    flags += ["--out", str(tmp_path / "out"), "--batch-size", "4"]
    flags += ["--weights", "random"] if script == "eval_linear" else []
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).main(flags)
    assert stop.value.code == 2 and "one class, same" in capfd.readouterr().err


def test_scores_are_exact_under_autocast():
    """The probe's scores are float32 numbers also where the backbone runs in bfloat16."""
    probe = eval_linear.Probe(arguments(eval_linear), 1000).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scores = probe(torch.randn(1, 1, 3, 4, 32, 32))[1]
    assert scores.dtype == torch.float32
    assert (scores.bfloat16().float() != scores).float().mean() > 0.9


@pytest.mark.parametrize("mode", ["--cached", "--no-cached"])
def test_probe_with_every_optimizer(mode, argv, tmp_path):
    """LARS, SGD and AdamW take a probe, whose groups of parameters may be empty."""
    for optimizer in ("lars", "sgd", "adamw"):
        flags = [mode, "--test-clips", "1", "--optimizer", optimizer, "--warmup", "0"]
        flags += ["--out", str(tmp_path / optimizer)]
        eval_linear.main([*argv, *flags])
        assert result_of(flags)["n"] == 7


def test_test_clips_of_a_video_that_is_shorter(tmp_path):
    """Clips that begin before a video that is shorter than they are."""
    path = make_video(tmp_path / "a.mp4", n=6, size=(48, 36))
    cfg = arguments(eval_linear, frames=4, stride=4, size=16)
    videos = common.VideoClips(cfg, None, videos=([str(path)], [""]))
    one, two, three = common.TestClips(videos, 3)[0]["clips"]
    assert torch.equal(one, two) and torch.equal(one, three)


def test_weights_saved_from_ddp(tmp_path):
    """Names that begin with module., as a network in DDP has them."""
    theirs, ours = scrambled(common.backbone("tiny")), common.backbone("tiny")
    state = {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    assert eval_linear.load_weights(ours, tmp_path / "w.pth") == 30
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name


def test_a_probe_is_not_called_collapsed(argv, capfd):
    """Words about pre-training, where features are those of another run."""
    flags = "--no-cached --test-clips 1 --log-every 1 --warmup 0 --lr 1e-6"
    eval_linear.main([*argv, *flags.split()])
    out = capfd.readouterr().out
    assert "collapsed" not in out and "stays at chance" not in out


def test_the_studys_probe():
    """Another recipe than that of the protocol, where no flag is given."""
    cfg = eval_linear.Config()
    assert (cfg.epochs, cfg.batch_size, cfg.lr, cfg.warmup) == (60, 64, 0.5, 8 / 60)
    assert (cfg.weight_decay, cfg.optimizer, cfg.test_clips, cfg.test_crops) == (0, "sgd", 10, 3)


def test_extracted_features_are_means_of_the_views(argv, tmp_path):
    """--extract with --cached (and so in the demo): the features of one view of four."""
    found = []
    for mode in ("--cached", "--no-cached"):
        eval_linear.main([*argv, mode, "--extract", str(tmp_path / "f.npz")])
        found.append(np.load(tmp_path / "f.npz")["features"])
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-6)
