"""Linear probe and kNN: what a frozen backbone has learned.

Measures The share of test videos that are classified correctly from the backbone's features: by
         the votes of the nearest training videos, and by a linear classifier.
Protocol Feichtenhofer et al., 2021 (arXiv 2104.14558), section 4: the classifier is trained on one
         random clip per video and epoch, cropped and flipped, and tested on 10 clips x 3 crops per
         video, whose softmax is averaged. --cached trains and tests it on the features of a few
         clips per video, which are extracted once.
kNN      k = 20, cosine similarity s of features averaged over views, votes exp(s / 0.07).
Differs  In the released code BN runs in training mode while the classifier is trained (--adapt-bn).
         Here it runs in eval, so that every tensor of the backbone is frozen.
Recipe   python eval_linear.py --weights out/byol-demo-rho2
         torchrun --nproc_per_node=8 eval_linear.py --weights backbone.pth --data kinetics
"""

import copy
import functools
import json
import math
import os
import re
import shlex
import sys
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw
from torch import nn

import common
from common import arg

# --- config


@dataclass
class Evaluation(common.Config):
    """The flags that eval_linear.py and finetune.py share."""

    rho = 1
    timespan = None
    num_views = 1
    short_side = (math.inf, math.inf)  # fill_settings derives it from the size

    weights: str = arg("", "pre-trained backbone or a run's folder")
    val: str = arg("", "folder or list of the test videos; else found in or beside --data")
    allow_missing: bool = arg(False, "leave out videos that cannot be read, and count them")
    backbone: str = arg("slow_r50", "the network; else as trained", choices=common.BACKBONES)
    frames: int = arg(8, "frames per clip; else as trained")
    stride: int = arg(8, "temporal stride, in frames at 30 fps; else as trained")
    size: int = arg(224, "crop size in training, in pixels; else as trained")
    test_size: int = arg(0, "crop size in testing, in pixels (0: 256/224 of --size)")
    test_clips: int = arg(10, "clips per test video, evenly over its length")
    test_crops: int = arg(3, "crops per test clip, evenly along its long side")
    batch_size: int = arg(64, "global batch size, in videos")
    optimizer: str = arg("sgd", "the optimizer", choices=common.OPTIMIZERS)


@dataclass
class Config(Evaluation):
    sync_bn = False

    weights: str = arg("", "pre-trained backbone, a run's folder, or `random` (required)")
    extract: str = arg("", "NPZ file: write features, labels and paths of --data there, and stop")
    neighbours: str = arg("", "PNG file: a picture of six test videos and the nearest in training")
    cached: bool = arg(False, "train and test the classifier on features that are extracted once")
    cached_clips: int = arg(4, "clips per video, one crop each, for kNN and --cached")
    augment: str = arg("crop,flip", "in training without --cached; none: the middle")
    adapt_bn: bool = arg(False, "BN in training mode without --cached, as in the released code")
    epochs: int = arg(60, "passes over the videos")
    lr: float = arg(0.5, "peak learning rate per 64 videos, scaled with the videos of a step")
    warmup: float = arg(8 / 60, "linear warm-up, as a share of the run")
    weight_decay: float = arg(0.0, "weight decay")


DEMO = dict(backbone="tiny", frames=8, stride=4, size=32, cached=True)


# --- weights


def fill_settings(cfg):
    """Take what the flags do not say from the settings in the file of --weights, and derive
    short_side, test_size and out. A run's folder becomes its backbone.pth."""
    if cfg.weights not in ("", "random"):
        if Path(cfg.weights).is_dir():
            cfg.weights = os.path.join(cfg.weights, "backbone.pth")
        for name, value in saved_settings(cfg.weights).items():
            if name in ("backbone", "frames", "stride", "size") and name not in cfg.given:
                setattr(cfg, name, value)
        if cfg.backbone not in common.BACKBONES:
            common.fail(f"{cfg.weights} is of a backbone that is not in common.py: {cfg.backbone}")
    cfg.short_side = tuple(round(cfg.size * side / 224) for side in (256, 320))
    cfg.test_size = cfg.test_size or common.test_size(cfg.size)
    if "out" not in cfg.given:
        data = [common.data_name(cfg)] if cfg.data else []
        cfg.out = "out/" + "-".join([cfg.script, *data, weights_name(cfg)])


def saved_settings(path):
    """The settings in a file of weights, {} if it has none; ends the process if unreadable."""
    try:
        content = common.read_file(path)
    except ValueError as error:
        common.fail(error)
    for key in ("config", "cfg"):  # of our backbone.pth, last.pth
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            return content[key]
    return {}


def weights_name(cfg):
    """A short name of --weights, for folders: a run's is that of its folder."""
    if cfg.weights in ("", "random"):
        return cfg.weights or "scratch"
    path = Path(cfg.weights).resolve()
    if path.name in ("backbone.pth", "last.pth"):
        return path.parent.name
    return path.stem


def load(network, cfg):
    """Load --weights into a backbone; "" and "random" leave it as it is."""
    if cfg.weights in ("", "random"):
        common.print_main(f"WARN the backbone starts from random weights (seed {cfg.seed})")
        return
    try:
        count = load_weights(network, cfg.weights)
    except ValueError as error:
        common.fail(error)
    common.print_main(f"weights: {count} of {count} backbone tensors from {cfg.weights}")


PREFIXES = ("", "backbone.", "encoder.backbone.", "features.", "module.")  # in the files we read
PYTORCHVIDEO = {  # its names -> the released code's
    r"^blocks\.0\.conv\.": "s1.pathway0_stem.conv.",
    r"^blocks\.0\.norm\.": "s1.pathway0_stem.bn.",
    r"^blocks\.1\.res_blocks\.": "s2.pathway0_res",
    r"^blocks\.2\.res_blocks\.": "s3.pathway0_res",
    r"^blocks\.3\.res_blocks\.": "s4.pathway0_res",
    r"^blocks\.4\.res_blocks\.": "s5.pathway0_res",
    r"(branch.)_conv\.": r"\1.",
    r"(branch.)_norm\.": r"\1_bn.",
    r"conv_([abc])\.": r"\1.",
    r"norm_([abc])\.": r"\1_bn.",
}


def load_weights(network, path):
    """Load a backbone from our backbone.pth or last.pth, the released contrastive .pyth (its query
    network) or classifier, pytorchvideo's slow_r50, or torchvision's r2plus1d_18 or s3d.

    Returns the number of tensors, which is all of the backbone's; raises ValueError, one line, if
    one is missing, of another shape, or not finite."""
    content = state_dict(path)
    wanted = network.state_dict()
    found = {}
    for prefix in PREFIXES:
        here = {name: content[prefix + name] for name in wanted if prefix + name in content}
        found = max(found, here, key=len)
    part = f"{path} has {len(found)} of the backbone's {len(wanted)} tensors"
    for name, tensor in wanted.items():
        if name not in found:
            raise ValueError(f"{part}; {name} is missing")
        if found[name].shape != tensor.shape:
            raise ValueError(f"{part}; {name} is of shape {(*found[name].shape,)}")
        if not found[name].isfinite().all():
            raise ValueError(f"{path}: {name} is not finite")
    network.load_state_dict(found)
    return len(found)


def state_dict(path):
    """The tensors in a file of weights, {name: tensor}, in the released code's names."""
    content = common.read_file(path)
    for key in ("model_state", "state_dict", "model"):
        if isinstance(content, dict) and key in content:
            content = content[key]
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no state dict")
    tensors = {}
    for name, tensor in content.items():
        if isinstance(name, str) and torch.is_tensor(tensor):
            tensors[name] = tensor
    if not any("res_blocks" in name for name in tensors):
        return tensors
    for pattern, name in PYTORCHVIDEO.items():
        tensors = {re.sub(pattern, name, key): tensor for key, tensor in tensors.items()}
    return tensors


# --- test videos and results


def test_set(cfg, dataset):
    """The videos to test on, with the classes of the training videos `dataset`.

    Ends the process if there are none, or where labels do not fit; warns of classes without a test
    video and of videos that are in both sets."""
    source = cfg.val or common.find_data(cfg)[1]
    if not source:
        common.fail("no test videos: give --val, or --data with train/ and val/")
    paths, labels = common.list_videos(source, "val")
    if not paths:  # a list without splits
        paths, labels = common.list_videos(source)
    if not paths:
        common.fail(f"--val: no videos in {source}")
    if unknown := set(labels) - set(dataset.classes) - {""}:
        common.fail(f"--val has a class that the training videos lack: {min(unknown)}")
    test = dataset.subset(paths, labels)
    for flag, part in (("--data", dataset), ("--val", test)):
        for index in np.flatnonzero(part.labels < 0):
            words = "has videos without a label (a class folder, or a column of a list)"
            common.fail(f"{flag} {words}: {part.path(index)}")
    if len(dataset.classes) < 2:
        words = "at least two classes are needed"
        common.fail(f"--data has one class, {dataset.classes[0]}: {words}")
    if absent := sorted(set(dataset.classes) - set(labels)):
        common.print_main(f"WARN no test video of class {absent[0]} ({len(absent)} such)")
    train = {Path(dataset.path(index)).resolve() for index in range(len(dataset))}
    if both := train & {Path(path).resolve() for path in paths}:
        words = f"{len(both)} videos are in --data and in --val, such as {min(both)}"
        common.print_main(f"WARN {words}")
    common.print_main(f"test: {len(test)} videos")
    return test


def labelled_outputs(network, test_clips, allow_missing):
    """Run the network on all readable videos; return outputs (n, ...) and labels (n,)."""
    outputs, indices = common.extract_features(network, test_clips, allow_missing)
    return outputs, torch.from_numpy(test_clips.dataset.labels)[indices]


def accuracies(scores, labels, classes):
    """Accuracies in percent of scores (n, classes), given labels (n,) and the classes' names:
    {"top1", "top5", "per_class": {name: top 1} of the classes that occur}."""
    hits = scores.argmax(-1) == labels  # (n,)
    five = scores.topk(min(5, len(classes))).indices  # (n, 5)
    result = {"top1": percent(hits), "top5": percent((five == labels[:, None]).any(-1))}
    result["per_class"] = {}
    for number, name in enumerate(classes):
        if (labels == number).any():
            result["per_class"][name] = percent(hits[labels == number])
    return result


def percent(hits):
    return round(100 * hits.double().mean().item(), 2)


def write_result(cfg, result, summary):
    """Write a result, with what it takes to repeat it, to result.json; print a line of summary and
    the path."""
    result = result | {name: getattr(cfg, name) for name in ("weights", "backbone", "seed")}
    result |= {"command": shlex.join(sys.argv), "versions": common.versions()}
    text = json.dumps(result, indent=1) + "\n"
    path = f"{cfg.out}/result.json"
    common.write_file(path, lambda file: file.write(text.encode()))
    common.print_main(summary)
    common.print_main(path)


def write_features(cfg, dataset):
    """Write an NPZ of features (n, D), averaged over the views, labels (n,) and paths (n,), in the
    order of the list."""
    backbone = common.backbone(cfg.backbone).to(common.device()).eval()
    load(backbone, cfg)
    clips = common.TestClips(dataset, cfg.cached_clips, size=cfg.test_size)
    features, indices = common.extract_features(backbone, clips, cfg.allow_missing)
    rows = {"features": features.mean(1).numpy(), "labels": dataset.labels[indices]}
    rows["paths"] = np.array([dataset.path(index) for index in indices])
    common.write_file(cfg.extract, functools.partial(np.savez, **rows))
    words = f"features of {len(indices)} of {len(dataset)} videos"
    common.print_main(f"{cfg.extract}: {words}")


NEIGHBOURS = 5  # in the picture


def write_neighbours(cfg, bank, queries):
    """Write a picture: in each row a test video of another class, then the nearest training videos
    by cosine of their features. bank, queries: (data set, its features (n, D), indices (n,))."""
    dataset, features, indices = bank
    test, test_features, test_indices = queries
    similarity = F.normalize(test_features, dim=-1) @ F.normalize(features, dim=-1).T  # (m, n)
    nearest = similarity.topk(min(NEIGHBOURS, len(indices))).indices  # (m, 5)
    _, first = np.unique(test.labels[test_indices], return_index=True)  # of each class
    tiles = []
    for row in first[:6]:
        tiles.append(tile(test, test_indices[row]))
        tiles += [tile(dataset, index) for index in indices[nearest[row]]]
    grid = torchvision.utils.make_grid(torch.stack(tiles), nrow=1 + nearest.shape[1])  # (3, H, W)
    picture = Image.fromarray(grid.permute(1, 2, 0).numpy())
    common.write_file(cfg.neighbours, functools.partial(picture.save, format="PNG"))
    common.print_main(f"{cfg.neighbours}: test videos and their nearest training videos")


def tile(dataset, index, side=160):
    """The middle frame of a video, its class and its file's name below: (3, side + 28, side)."""
    reader = dataset.open(index, side)
    frames = torch.from_numpy(reader.read([reader.duration / 2]))[None]  # (1, 1, H, W, 3)
    reader.close()
    square = common.cut_squares(frames, side, 1)[0, :, 0]  # (3, side, side)
    picture = Image.new("RGB", (side, side + 28))
    picture.paste(Image.fromarray(square.permute(1, 2, 0).numpy()))
    names = dataset.classes[dataset.labels[index]], os.path.basename(dataset.path(index))
    text = "\n".join(name[-26:].encode("ascii", "replace").decode() for name in names)
    ImageDraw.Draw(picture).text((2, side), text, font_size=11)
    return torchvision.transforms.v2.functional.pil_to_tensor(picture)


# --- method


def sample_clips(duration, clip_seconds, rho, timespan, rng):
    """Start times (seconds) of rho clips: i.i.d. uniform."""
    return rng.uniform(0.0, max(0.0, duration - clip_seconds), size=rho)


class Probe(nn.Module):
    def __init__(self, cfg, classes):
        super().__init__()
        backbone = common.backbone(cfg.backbone).requires_grad_(False)
        linear = nn.Linear(backbone.feature_dim, classes)
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        self.encoder = nn.Sequential(OrderedDict(backbone=backbone, linear=linear))

    def forward(self, clips):
        """(B, 1, 3, T, H, W) -> features (B, 1, D), scores of the classes (B, classes), float32."""
        with torch.no_grad():
            features = common.encode_views(self.encoder.backbone, clips)
        with torch.autocast(clips.device.type, enabled=False):  # rounded scores would tie
            return features, self.encoder.linear(features[:, 0])


def assert_frozen(backbone, before, adapt_bn):
    """No tensor of the backbone has moved; with adapt_bn none but BN's running statistics."""
    weights = dict(backbone.named_parameters())
    for name, tensor in backbone.state_dict().items():
        if name in weights or not adapt_bn:
            assert torch.equal(tensor, before[name]), f"{name} has moved"


def cached_probe(cfg, train, labels, test, classes):
    """Train a linear classifier on features (n, views, D), standardised by their mean and standard
    deviation; return its softmax on the test features, averaged over their views: (m, classes)."""
    mean = train.mean((0, 1))
    std = train.std((0, 1)) + 1e-6
    train = (train - mean) / std
    test = (test - mean) / std
    linear = nn.Linear(train.shape[-1], classes)
    nn.init.zeros_(linear.weight)
    optimizer = common.make_optimizer(linear, cfg)
    rng = np.random.default_rng(cfg.seed)
    steps = cfg.epochs * max(1, len(train) // cfg.batch_size)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(cfg, step / steps)
        rows = rng.integers(len(train), size=cfg.batch_size)
        views = rng.integers(train.shape[1], size=cfg.batch_size)
        loss = F.cross_entropy(linear(train[rows, views]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return linear(test).softmax(-1).mean(1).detach()


def probe_on_clips(cfg, dataset, model):
    """Train the classifier on clips, the backbone frozen; return whether training is finished."""
    backbone = model.encoder.backbone
    backbone.train(cfg.adapt_bn)
    network = common.wrap_ddp(model, cfg)
    optimizer = common.make_optimizer(model, cfg)
    chance = math.log(len(dataset.classes))
    run = common.Run(cfg, dataset, model, optimizer, chance)
    for batch in run.batches():
        with common.autocast():
            features, scores = network(batch["clips"])  # (B, 1, D), (B, classes), float32
        loss = F.cross_entropy(scores, batch["label"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.record(loss, features=features)
    model.eval()
    return run.finished


# --- evaluation


def test_on_clips(cfg, model, test):
    """Softmax (n, classes), averaged over the test views of each video, and labels (n,)."""

    def softmax(views):  # (views, 3, T, S, S)
        _, scores = model(views[:, None])
        return scores.softmax(-1).mean(0)

    clips = common.TestClips(test, cfg.test_clips, cfg.test_crops, cfg.test_size)
    return labelled_outputs(softmax, clips, cfg.allow_missing)


def report(cfg, test, knn, scores, labels):
    """Write and print the accuracies of kNN and of softmax scores (n, classes), labels (n,), where
    n of the test videos could be read."""
    views = cfg.cached_clips
    protocol = f"cached features, {views} clips x 1 crop, BN in eval"
    if not cfg.cached:
        views = cfg.test_clips * cfg.test_crops
        crops = f"{cfg.test_clips} clips x {cfg.test_crops} crops at {cfg.test_size}"
        norm = "adapted" if cfg.adapt_bn else "in eval"
        protocol = f"{cfg.epochs} epochs of random clips; {crops}; BN {norm}"
    n, classes = len(labels), len(test.classes)
    linear = accuracies(scores, labels, test.classes)
    result = {
        "knn_top1": round(knn, 2),
        "linear_top1": linear["top1"],
        "linear_top5": linear["top5"],
        "n": n,
        "missing": len(test) - n,
        "classes": classes,
        "protocol": protocol,
        "views": views,
        "per_class": linear["per_class"],
    }
    size = f"({n} videos, {classes} classes, chance {100 / classes:.1f} %)"
    summary = f"linear {linear['top1']:.1f} %  kNN {knn:.1f} %  {size}"
    write_result(cfg, result, summary)


def check(cfg):
    """End the process if the flags cannot work."""
    if not cfg.weights:
        common.fail("--weights is missing: a file, a run's folder, or random")
    if cfg.adapt_bn and cfg.cached:
        common.fail("--adapt-bn is about training on clips: it needs --no-cached")
    for name in ("cached_clips", "test_clips", "test_crops"):
        if getattr(cfg, name) < 1:
            common.fail(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be 1 or more")
    for name in ("extract", "neighbours"):
        path = Path(getattr(cfg, name))
        usable = path.is_file() or not path.exists()
        if path != Path() and not (usable and os.access(path.parent, os.W_OK)):
            common.fail(f"--{name} {path}: cannot write a file there")


def main(argv=None):
    cfg = common.parse_args(Config, DEMO, argv)
    check(cfg)
    fill_settings(cfg)
    common.init_distributed(cfg)
    dataset = common.VideoClips(cfg, sample_clips)
    if cfg.extract:
        write_features(cfg, dataset)
        return
    test = test_set(cfg, dataset)
    classes = dataset.classes
    model = Probe(cfg, len(classes)).to(common.device()).eval()
    backbone = model.encoder.backbone
    load(backbone, cfg)
    if not cfg.cached:
        before = copy.deepcopy(backbone.state_dict())
        finished = probe_on_clips(cfg, dataset, model)
        assert_frozen(backbone, before, cfg.adapt_bn)
        if not finished:
            return
        scores, labels = test_on_clips(cfg, model, test)
        backbone.load_state_dict(before)  # kNN is of the backbone as it came

    def encode(views):
        """(views, 3, T, S, S) -> (views, D); without --cached their mean, (1, D)."""
        features = backbone(views)
        return features if cfg.cached else features.mean(0, keepdim=True)

    sets = [
        common.TestClips(videos, cfg.cached_clips, size=cfg.test_size) for videos in (dataset, test)
    ]
    bank, indices = common.extract_features(encode, sets[0], cfg.allow_missing)
    queries, test_indices = common.extract_features(encode, sets[1], cfg.allow_missing)
    bank_labels = torch.from_numpy(dataset.labels)[indices]
    labels = torch.from_numpy(test.labels)[test_indices]
    knn = common.knn_accuracy(bank.mean(1), bank_labels, queries.mean(1), labels)
    if cfg.neighbours:
        write_neighbours(
            cfg, (dataset, bank.mean(1), indices), (test, queries.mean(1), test_indices)
        )
    if cfg.cached:
        scores = cached_probe(cfg, bank, bank_labels, queries, len(classes))
    report(cfg, test, knn, scores, labels)


if __name__ == "__main__":
    main()
