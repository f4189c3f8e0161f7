"""Linear probe and kNN: what a frozen backbone has learned.

Measures Test videos that kNN and a linear classifier on the backbone's features get right.
Protocol Feichtenhofer et al., 2021 (arXiv 2104.14558), section 4: the classifier is trained on one
         random clip per video and epoch, cropped and flipped, and tested on 10 clips x 3 crops,
         whose softmax is averaged. --cached: on features of a few clips, extracted once.
kNN      k = 20 (here), cosine similarity s of features averaged over views, votes exp(s / 0.07).
Differs  BN is in eval (released code: in training mode), so that the whole backbone is frozen.
Recipe   python eval_linear.py --weights out/byol-demo-rho2
         torchrun --nproc_per_node=8 eval_linear.py --weights backbone.pth --data kinetics
"""

import contextlib
import copy
import functools
import json
import math
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import common
from common import arg

# --- config


@dataclass
class Evaluation(common.Config):  # the flags that finetune.py has too
    rho = 1
    timespan = None
    num_views = 1
    sync_bn = False
    short_side = (math.inf, math.inf)  # fill_settings derives it from the size

    weights: str = arg("", "pre-trained backbone or a run's folder; none: from scratch")
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
    weights: str = arg("", "pre-trained backbone, a run's folder, or `random` (required)")
    extract: str = arg("", "NPZ file: write features of the training videos there, and stop")
    neighbours: str = arg("", "PNG file: a picture of six test videos and the nearest in training")
    cached: bool = arg(False, "train and test the classifier on features that are extracted once")
    cached_clips: int = arg(4, "clips per video, one crop each, for kNN and --cached")
    augment: str = arg("crop,flip", "in training without --cached; none: the middle")
    epochs: int = arg(60, "passes over the videos")
    lr: float = arg(0.5, "peak learning rate per 64 videos, scaled with the videos of a step")
    warmup: float = arg(8 / 60, "linear warm-up, as a share of the run")
    weight_decay: float = arg(0.0, "weight decay")


DEMO = dict(backbone="tiny", frames=8, stride=4, size=32, cached=True)


# --- weights


def fill_settings(cfg):
    """Take what the flags do not say from the settings in the file of --weights, which it returns,
    and derive short_side, test_size and out. A run's folder becomes its backbone.pth."""
    name, saved = cfg.weights or "scratch", {}
    if cfg.weights not in ("", "random"):
        path = Path(cfg.weights)
        path = path / "backbone.pth" if path.is_dir() else path
        ours = path.name in ("backbone.pth", "last.pth")
        name = path.absolute().parent.name if ours else path.stem
        cfg.weights = str(path)
        try:
            content = common.read_file(path)
        except ValueError as error:
            common.fail(error)
        if not isinstance(content, dict):
            common.fail(f"{path} holds no state dict")
        found = content.get("config") or content.get("cfg")  # of backbone.pth, of last.pth
        saved = found if isinstance(found, dict) else {}
        if saved.get("finished") is False:
            common.print_main(f"WARN {path} is of an unfinished run, step {saved['step']}")
        for setting in {"backbone", "frames", "stride", "size"} & saved.keys() - cfg.given:
            setattr(cfg, setting, saved[setting])
    cfg.short_side = tuple(round(cfg.size * side / 224) for side in (256, 320))
    cfg.test_size = cfg.test_size or cfg.short_side[0]
    if "out" not in cfg.given:
        data = f"{Path(cfg.data).absolute().stem}-" if cfg.data else ""
        cfg.out = f"out/{cfg.script}-{data}{name}"
    return saved


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
    r"^blocks\.(\d)\.res_blocks\.": lambda match: f"s{int(match[1]) + 1}.pathway0_res",
    r"(branch.)_conv\.": r"\1.",
    r"(branch.)_norm\.": r"\1_bn.",
    r"conv_([abc])\.": r"\1.",
    r"norm_([abc])\.": r"\1_bn.",
}


def load_weights(network, path):
    """Load a backbone of ours, the released .pyth (of contrastive ones the query network),
    pytorchvideo's or torchvision's. Returns the number of tensors; ValueError unless all fit."""
    content = common.read_file(path)
    for key in ("model_state", "state_dict", "model"):
        if isinstance(content, dict) and key in content:
            content = content[key]
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no state dict")
    state = {k: v for k, v in content.items() if isinstance(k, str) and torch.is_tensor(v)}
    if any("res_blocks" in name for name in state):
        for pattern, name in PYTORCHVIDEO.items():
            state = {re.sub(pattern, name, key): tensor for key, tensor in state.items()}
    wanted = network.state_dict()
    found = {}
    for prefix in PREFIXES:
        here = {name: state[prefix + name] for name in wanted if prefix + name in state}
        found = max(found, here, key=len)
    part = f"{path} has {len(found)} of the backbone's {len(wanted)} tensors"
    for name, tensor in wanted.items():
        if name not in found or found[name].shape != tensor.shape:
            raise ValueError(f"{part}; {name} is missing or not of shape {tuple(tensor.shape)}")
        if not found[name].isfinite().all():
            raise ValueError(f"{path}: {name} is not finite")
    network.load_state_dict(found)
    return len(found)


# --- test videos and results


def test_set(cfg, dataset):
    """The videos to test on, in the classes of the training videos; warns if they look wrong."""
    data = common.find_data(cfg)
    beside = data.with_name("val")
    source = cfg.val or (beside if data.name == "train" and beside.is_dir() else "")
    paths, labels = common.list_videos(source or data, "val")
    if not paths and source:  # it has no splits
        paths, labels = common.list_videos(source)
    if not paths:
        common.fail("no test videos: give --val, or --data with train/ and val/ (csv: rows val)")
    if unknown := set(labels) - set(dataset.classes) - {""}:
        common.fail(f"--val has a class that the training videos lack: {min(unknown)}")
    test = common.VideoClips(cfg, None, videos=(paths, labels), classes=dataset.classes)
    for flag, part in (("--data", dataset), ("--val", test)):
        for index in np.flatnonzero(part.labels < 0):
            common.fail(f"{flag} has videos without a label, such as {part.paths[index]}")
    if len(dataset.classes) < 2:
        common.fail(f"--data has one class, {dataset.classes[0]}: at least two are needed")
    if absent := sorted(set(dataset.classes) - set(labels)):
        common.print_main(f"WARN no test video of class {absent[0]} ({len(absent)} such)")
    train = {Path(dataset.paths[index]).resolve() for index in range(len(dataset))}
    if both := train & {Path(path).resolve() for path in paths}:
        common.print_main(f"WARN {len(both)} videos are in --data and --val, such as {min(both)}")
    return test


def labelled_outputs(network, test_clips, allow_missing):
    """Run the network on all readable videos; return outputs (n, ...) and labels (n,)."""
    outputs, indices = common.extract_features(network, test_clips, allow_missing)
    return outputs, torch.from_numpy(test_clips.dataset.labels)[indices]


def accuracies(scores, labels, classes):
    """Percent right of scores (n, classes): {"top1", "top5", "per_class": {name: top 1}}."""
    hits = scores.topk(min(5, len(classes))).indices == labels[:, None]  # (n, 5)

    def percent(hits):
        return round(100 * hits.float().mean().item(), 2)

    result = {"top1": percent(hits[:, 0]), "top5": percent(hits.any(1)), "per_class": {}}
    for number in labels.unique().tolist():
        result["per_class"][classes[number]] = percent(hits[labels == number, 0])
    return result


def write_result(cfg, result, summary):
    """Write result.json, with what it takes to repeat it; print the summary and the path."""
    path = f"{cfg.out}/result.json"
    result = result | {name: getattr(cfg, name) for name in ("weights", "backbone", "seed")}
    result |= {"command": shlex.join(sys.argv), "versions": common.VERSIONS}
    text = json.dumps(result, indent=1) + "\n"
    common.write_file(path, lambda file: file.write(text.encode()))
    common.print_main(f"{summary}\n{path}")


def write_neighbours(path, bank, queries, side=160):
    """Picture of six test videos, a row each, and the five training videos nearest by cosine. bank,
    queries: (videos, features (n, views, D), indices (n,)) of training, of testing."""
    videos, features, indices = bank
    tests, test_features, test_indices = queries
    corner = torch.tensor([[0, side, 1, side + 1]])  # below a picture, where its name begins
    cells = []
    for query in np.linspace(0, len(test_indices) - 1, 6, dtype=int):
        cosine = F.cosine_similarity(test_features[query].mean(0), features.mean(1))  # (n,)
        nearest = indices[cosine.topk(min(5, len(indices))).indices]
        shown = [(tests, test_indices[query]), *((videos, index) for index in nearest)]
        for source, index in shown:
            with contextlib.closing(source.open(index, side)) as reader:
                frames = torch.from_numpy(reader.read([reader.duration / 2]))  # (1, H, W, 3)
            square = common.cut_squares(frames[None], side, 1)[0, :, 0]  # (3, side, side)
            label = source.classes[source.labels[index]]
            name = ascii(f"{label}: {os.path.basename(source.paths[index])}")[1:-1][:26]
            cell = F.pad(square, (0, 0, 0, 14))
            cells.append(torchvision.utils.draw_bounding_boxes(cell, corner, [name], "white") / 255)
    grid = torchvision.utils.make_grid(cells, nrow=len(shown), padding=0)
    save = functools.partial(torchvision.utils.save_image, grid, format="png")
    common.write_file(path, save)
    common.print_main(f"{path}: test videos and their nearest training videos")


def extract(cfg, backbone, videos):
    """Features (n, views, D), without --cached averaged (n, 1, D); labels (n,) and indices (n,)."""

    def encode(views):  # (views, 3, T, S, S) -> (views, D)
        features = backbone(views)
        return features if cfg.cached else features.mean(0, keepdim=True)

    clips = common.TestClips(videos, cfg.cached_clips, size=cfg.test_size)
    features, indices = common.extract_features(encode, clips, cfg.allow_missing)
    return features, torch.from_numpy(videos.labels)[indices], indices


def report(cfg, test, knn, scores, labels):
    """Write and print accuracies: of kNN, and of scores (n, classes), given labels (n,)."""
    views = cfg.cached_clips
    protocol = f"cached features, {views} clips x 1 crop, BN in eval"
    if not cfg.cached:
        views = cfg.test_clips * cfg.test_crops
        crops = f"{cfg.test_clips} clips x {cfg.test_crops} crops at {cfg.test_size}"
        protocol = f"{cfg.epochs} epochs of random clips; {crops}; BN in eval"
    n, classes = scores.shape
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
    write_result(cfg, result, f"linear {linear['top1']:.1f} %  kNN {knn:.1f} %  {size}")


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
        self.encoder = nn.ModuleDict({"backbone": backbone, "linear": linear})

    def forward(self, clips):
        """(B, 1, 3, T, H, W) -> features (B, 1, D), scores of the classes (B, classes), float32."""
        with torch.no_grad():
            features = common.encode_views(self.encoder.backbone, clips)
        with torch.autocast(clips.device.type, enabled=False):  # rounded scores would tie
            return features, self.encoder.linear(features[:, 0])

    def softmax(self, views):
        """Views of a video (views, 3, T, S, S) -> (classes,), the average."""
        _, scores = self(views[:, None])
        return scores.softmax(-1).mean(0)


def moved(backbone, before):  # -> names of tensors
    state = backbone.state_dict()
    return [name for name in state if not torch.equal(state[name], before[name])]


def cached_probe(cfg, train, labels, test, classes):
    """Train on standardised features (n, views, D); return softmax on others, (m, classes)."""
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
    common.fit_to_videos(cfg, len(dataset))
    before = copy.deepcopy(model.encoder.backbone.state_dict())
    network = common.wrap_ddp(model, cfg)
    optimizer = common.make_optimizer(model, cfg)
    run = common.Run(cfg, dataset, model, optimizer, chance=math.log(len(dataset.classes)))
    if moved(model.encoder.backbone, before):  # by a resume
        common.fail(f"{cfg.weights} is not what {cfg.out} began with; choose another --out")
    for batch in run.batches():
        with common.autocast():
            features, scores = network(batch["clips"])  # (B, 1, D), (B, classes), float32
        loss = F.cross_entropy(scores, batch["label"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.record(loss, features=features)
    assert not moved(model.encoder.backbone, before), "the backbone was trained"
    return run.finished


def main(argv=None):
    cfg = common.parse_args(Config, DEMO, argv)
    if not cfg.weights:
        common.fail("--weights is missing: a file, a run's folder, or random")
    if min(cfg.cached_clips, cfg.test_clips, cfg.test_crops) < 1:
        common.fail("--cached-clips, --test-clips and --test-crops must be 1 or more")
    for path in (cfg.extract, cfg.neighbours):
        if not Path(path).absolute().parent.is_dir():
            common.fail(f"cannot write {path}: there is no such folder")
    fill_settings(cfg)
    common.init_distributed(cfg)
    dataset = common.VideoClips(cfg, sample_clips)
    test = None if cfg.extract else test_set(cfg, dataset)
    model = Probe(cfg, max(1, len(dataset.classes))).to(common.device()).eval()
    backbone = model.encoder.backbone
    load(backbone, cfg)
    if cfg.extract:
        features, labels, indices = extract(cfg, backbone, dataset)
        rows = {"features": features.mean(1).numpy(), "labels": labels.numpy()}
        rows |= {"paths": dataset.paths[indices], "classes": dataset.classes}
        common.write_file(cfg.extract, lambda file: np.savez(file, **rows))
        common.print_main(f"{cfg.extract}: features of {len(indices)} of {len(dataset)} videos")
        return
    if not cfg.cached:
        if not probe_on_clips(cfg, dataset, model):
            return
        clips = common.TestClips(test, cfg.test_clips, cfg.test_crops, cfg.test_size)
        scores, labels = labelled_outputs(model.softmax, clips, cfg.allow_missing)
    train, train_labels, train_indices = extract(cfg, backbone, dataset)
    queries, labels, indices = extract(cfg, backbone, test)
    knn = common.knn_accuracy(train.mean(1), train_labels, queries.mean(1), labels)
    if cfg.neighbours:
        bank = dataset, train, train_indices
        write_neighbours(cfg.neighbours, bank, (test, queries, indices))
    if cfg.cached:
        scores = cached_probe(cfg, train, train_labels, queries, len(dataset.classes))
    report(cfg, test, knn, scores, labels)


if __name__ == "__main__":
    main()
