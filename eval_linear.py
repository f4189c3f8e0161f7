"""Linear probe and kNN: what a frozen backbone has learned.

Measures The share of test videos that are classified correctly from the backbone's features, by
         the votes of the nearest training videos, and by a linear classifier.
Protocol Feichtenhofer et al., 2021 (arXiv 2104.14558), section 4: the classifier is trained on one
         random clip per video and epoch, cropped and flipped, and tested on 10 clips x 3 crops a
         video, whose softmax is averaged. --cached: on features of a few clips, extracted once.
kNN      k = 20, cosine similarity s of features that are averaged over views, votes exp(s / 0.07).
Differs  From the released code: BN is in eval, so that the backbone is frozen in every tensor;
         --adapt-bn follows it (batch statistics in training, and running ones that keep moving).
Recipe   python eval_linear.py --weights out/byol-demo-rho2/backbone.pth
         torchrun --nproc_per_node=8 eval_linear.py --weights backbone.pth --data kinetics
"""

import json
import math
import os
import shlex
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common

# --- recipe


class Recipe:  # name = paper, demo  # meaning, which is the text of --help
    weights = "", ""  # file of a backbone, needed, or random: one that has learned nothing
    val = "", ""  # folder or list of the test videos; none: the folder val beside train in --data
    extract = "", ""  # NPZ file: write features, labels, paths of the --data in order, and stop
    allow_missing = False, False  # leave videos out that cannot be read, and say how many
    backbone = "", ""  # network; none: as the weights were trained, as are the next three
    frames = 0, 0  # frames of a clip, 0 = as trained
    stride = 0, 0  # from one frame to the next, in 1/30 s, 0 = as trained
    size = 0, 0  # height and width of a clip in training, in pixels, 0 = as trained
    test_size = 0, 0  # and in testing, 0 = 256/224 of that
    test_clips = 10, 10  # of a video, evenly over its length
    test_crops = 3, 3  # of a clip, evenly along its long side
    cached_clips = 4, 4  # of a video, one crop each, for kNN and --cached
    cached = False, True  # extract features once; train and test the classifier on them
    augment = "crop,flip", "crop,flip"  # in training without --cached; none: the middle
    adapt_bn = False, False  # BN in training mode, as in the released code
    epochs = 60, 60  # passes over the videos
    batch_size = 64, 64  # videos of a step, over all processes
    optimizer = "sgd", "sgd"  # lars, sgd or adamw
    lr = 0.5, 0.5  # per 64 videos
    warmup_epochs = 8.0, 8.0  # of linear warm-up, 0 = none; in proportion to the epochs
    weight_decay = 0.0, 0.0  # 0 = none
    batch_norm = "plain", "plain"  # sync: over all GPUs; plain: over each GPU's share


# --- method


def sample_clips(duration, span, rho, timespan, rng):
    """Start times (seconds) of rho clips: i.i.d. uniform, within `timespan` of each other."""
    first, last = 0.0, max(0.0, duration - span)
    if timespan is not None and timespan < last:
        first = rng.uniform(0.0, last - timespan)
        last = first + timespan
    return rng.uniform(first, last, size=rho).tolist()


class Probe(nn.Module):
    def __init__(self, args, classes):
        super().__init__()
        backbone = common.backbone(args.backbone).requires_grad_(False)
        linear = nn.Linear(backbone.feature_dim, classes)
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        self.encoder = nn.Sequential(OrderedDict(backbone=backbone, linear=linear))

    def forward(self, clips):
        """(B, 1, 3, T, H, W) -> features (B, 1, D), scores of the classes (B, classes)."""
        with torch.no_grad():
            features = common.per_view(self.encoder.backbone, clips)
        with torch.autocast(clips.device.type, enabled=False):  # rounded scores would tie
            return features, self.encoder.linear(features[:, 0])


def assert_frozen(backbone, before, adapt_bn):
    """No tensor of the backbone has moved; with adapt_bn none but BN's statistics."""
    names = dict(backbone.named_parameters()) if adapt_bn else before
    for name, tensor in backbone.state_dict().items():
        assert name not in names or torch.equal(tensor, before[name]), f"{name} has moved"


def cached_probe(args, train, labels, test, classes):
    """Train a linear classifier on rows (n, views, D) of features, standardised by their mean and
    deviation; returns its softmax on others, averaged over their views: (m, classes)."""
    mean, deviation = train.mean((0, 1)), train.std((0, 1)) + 1e-6
    train, test = (train - mean) / deviation, (test - mean) / deviation
    linear = nn.Linear(train.shape[-1], classes)
    nn.init.zeros_(linear.weight)
    optimizer, rng = common.make_optimizer(linear, args), np.random.default_rng(args.seed)
    steps = max(1, len(train) // args.batch_size)  # of an epoch
    for step in range(args.epochs * steps):
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(args, step / steps)
        rows, views = rng.integers(((len(train),), (train.shape[1],)), size=(2, args.batch_size))
        F.cross_entropy(linear(train[rows, views]), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return linear(test).softmax(-1).mean(1).detach()


def test_videos(source, videos):
    """The videos to test on, their classes numbered as in training. Ends the run where a label is
    missing; warns of classes without a test video and of videos that are in both sets."""
    val = common.Videos(source, videos.classes, "--val")
    for name, part in (("--data", videos), ("--val", val)):
        if (part.labels < 0).any():
            first = part[int((part.labels < 0).argmax())]
            common.fail(f"{name} has videos without a label (a class folder, or a tab): {first}")
    if len(videos.classes) < 2:
        common.fail(f"--data has one class, {videos.classes[0]}: there is nothing to tell apart")
    if absent := set(range(len(videos.classes))) - set(val.labels):
        name = videos.classes[min(absent)]
        common.say(f"WARN no test video of class {name} ({len(absent)} such)")
    both = {Path(path).resolve() for path in videos} & {Path(path).resolve() for path in val}
    if both:
        common.say(f"WARN {len(both)} videos are in --data and in --val, such as {min(both)}")
    common.say(f"test: {len(val)} videos")
    return val


def labelled(args, videos, network, clips, crops=1):
    """What a network makes of the videos that can be read, and their labels: (n, ...), (n,)."""
    outputs, problems = common.evaluate(args, videos, network, clips, crops)
    for problem in problems:
        common.say(f"WARN left out: {problem}")
    read = outputs.flatten(1).isfinite().all(1)
    return outputs[read], torch.from_numpy(videos.labels)[read]


def report(args, classes, nearest, scores, labels, expected):
    """Print accuracies in percent of softmax scores (n, classes) and kNN, and write them, with what
    it takes to repeat them, to result.json. n videos of the expected ones could be read."""
    hits = scores.argmax(-1) == labels  # (n,)
    five = (scores.topk(min(5, len(classes))).indices == labels[:, None]).any(-1)
    each = {name: hits[labels == i] for i, name in enumerate(classes) if (labels == i).any()}
    percent = lambda part: round(100 * part.float().mean().item(), 2)  # noqa: E731
    protocol = f"cached features, {args.cached_clips} clips x 1 crop, BN in eval"
    if not args.cached:
        views = f"{args.test_clips} clips x {args.test_crops} crops at {args.test_size}"
        norm = "adapted" if args.adapt_bn else "in eval"
        protocol = f"{args.epochs} epochs of random clips; {views}; BN {norm}"
    result = {"knn_top1": round(nearest, 2), "linear_top1": percent(hits)}
    result |= {"linear_top5": percent(five), "n": len(labels)}
    result["missing"] = expected - len(labels)
    result |= {"classes": len(classes), "protocol": protocol}
    result["views"] = args.cached_clips if args.cached else args.test_clips * args.test_crops
    result |= {name: getattr(args, name) for name in ("weights", "backbone", "seed")}
    result |= {"command": shlex.join(sys.argv), "versions": common.versions()}
    common.say(json.dumps(result))
    result["per_class"] = {name: percent(part) for name, part in each.items()}
    text = json.dumps(result, indent=1) + "\n"
    common.write(f"{args.out}/result.json", lambda file: file.write(text.encode()))
    common.say(f"done: {args.out}/result.json")


def write_features(args, videos, backbone):
    """NPZ of features (n, D), averaged over the views, labels (n,), paths (n,), in list order."""
    path, folder = args.extract, os.path.dirname(args.extract) or "."
    there = os.path.exists(path) and not os.path.isfile(path)  # a folder or a device
    if there or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        common.fail(f"--extract {path}: cannot write a file there")
    features, problems = common.evaluate(args, videos, backbone, args.cached_clips)
    for problem in problems:
        common.say(f"WARN left out: {problem}")
    read = np.flatnonzero(features.flatten(1).isfinite().all(1))
    rows = {"features": features[read].mean(1).numpy(), "labels": videos.labels[read]}
    rows["paths"] = np.array([videos[int(i)] for i in read])
    common.write(path, lambda file: np.savez(file, **rows))
    common.say(f"wrote {path}: features of {len(read)} of {len(videos)} videos")


# --- training


def main(argv=None):
    args, videos = common.start(Recipe, argv)
    for flag in ("adapt-bn", "show-views"):
        if args.cached and getattr(args, flag.replace("-", "_")):
            common.fail(f"--{flag} is about training on clips: it needs --no-cached")
    val = None if args.extract else test_videos(args.val, videos)
    model = Probe(args, max(1, len(videos.classes)))
    common.load(model.encoder.backbone, args)
    network = common.distribute(model, args)
    backbone, optimizer = model.eval().encoder.backbone, common.make_optimizer(model, args)
    if args.extract:
        return write_features(args, videos, backbone)
    if not args.cached:
        before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
        backbone.train(args.adapt_bn)
        chance = math.log(len(videos.classes))
        for step in common.train(args, videos, model, optimizer, sample_clips, chance):
            with step.autocast():
                features, scores = network(step.clips)  # (B, 1, D), (B, classes), float32
            loss = F.cross_entropy(scores, step.labels)
            loss.backward()
            step.update(loss, features=features)
            if step.ends_epoch:
                assert_frozen(backbone, before, args.adapt_bn)
        if not args.finished:
            return
        softmax = lambda x: model(x[:, None])[1].softmax(-1).mean(0)  # noqa: E731
        model.eval()
        tested = labelled(args, val, softmax, args.test_clips, args.test_crops)
        backbone.load_state_dict(before)  # for kNN, as it came
    views = backbone if args.cached else lambda x: backbone(x).mean(0, keepdim=True)
    train, train_labels = labelled(args, videos, views, args.cached_clips)  # (n, views, D), (n,)
    test, labels = labelled(args, val, views, args.cached_clips)
    nearest = common.knn(train.mean(1), train_labels, test.mean(1), labels)
    common.say(f"kNN: {nearest:.2f} % of {len(labels)} videos")
    if args.cached:
        tested = cached_probe(args, train, train_labels, test, len(videos.classes)), labels
    report(args, videos.classes, nearest, *tested, len(val))


if __name__ == "__main__":
    main()
