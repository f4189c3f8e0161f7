"""Fine-tuning: all layers trained on labelled videos, from weights or from scratch.

Measures The share of test videos that a backbone classifies rightly after supervised training.
Protocol Feichtenhofer et al., 2021 (arXiv 2104.14558), section 4, for UCF101 and HMDB51: one random
         clip a video and epoch, crop, flip and tint; tested on 10 clips x 3 crops a video, whose
         softmax is averaged. After MoCo the study uses --lr 0.005 --weight-decay 1e-4
         --dropout 0.5 --batch-norm plain, after the others these defaults.
Data     folder: two class folders or labelled lists, --data and --val. ucf101, hmdb51: the official
         split files and the videos, anywhere in --data.
Scratch  Without --weights: the supervised baseline; its backbone.pth feeds the other scripts.
Differs  From the released code: BN statistics over all ranks, frames 8 apart, not 9.
Recipe   python finetune.py --weights backbone.pth --dataset ucf101 --data UCF101
"""

import json
import math
import sys
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import common

# --- recipe


class Recipe:  # name = paper, demo  # meaning, which is the text of --help
    weights = "", ""  # file of a backbone to start from; none: from scratch
    dataset = "folder", "folder"  # folder, ucf101 or hmdb51: what says which videos are in --data
    split = 1, 1  # of ucf101 and hmdb51: 1, 2 or 3
    val = "", ""  # folder or list of the test videos; none: the folder val beside train in --data
    allow_missing = False, False  # leave videos out that cannot be read, and say how many
    backbone = "", ""  # network; none: as the weights were trained, as are the next three
    frames = 0, 0  # frames of a clip, 0 = as trained
    stride = 0, 0  # distance of two frames in 1/30 s, 0 = as trained
    size = 0, 0  # height and width of a clip in training, in pixels, 0 = as trained
    test_size = 0, 0  # and in testing, 0 = 256/224 of that
    test_clips = 10, 4  # of a video, evenly over its length
    test_crops = 3, 1  # of a clip, evenly along its long side
    augment = "crop,flip,tint", "crop,flip"  # operators, or none
    dropout = 0.8, 0.0  # before the classifier, 0 = none, 1 = all
    epochs = 200, 40  # passes over the videos
    batch_size = 64, 40  # videos of a step, over all processes
    optimizer = "sgd", "adamw"  # lars, sgd or adamw
    lr = 0.01, 4.8e-3  # per 64 videos
    warmup_epochs = 0.0, 3.0  # of linear warm-up, 0 = none
    weight_decay = 0.0, 1e-4  # but for BN, 0 = none
    batch_norm = "sync", "sync"  # sync: over all GPUs; plain: over each GPU's share


# --- method


def sample_clips(duration, span, rho, timespan, rng):
    """Start times (seconds) of rho clips: i.i.d. uniform, within `timespan` of each other."""
    first, last = 0.0, max(0.0, duration - span)
    if timespan is not None and timespan < last:
        first = rng.uniform(0.0, last - timespan)
        last = first + timespan
    return rng.uniform(first, last, size=rho).tolist()


class Classifier(nn.Module):
    def __init__(self, args, classes):
        super().__init__()
        backbone, dropout = common.backbone(args.backbone), nn.Dropout(args.dropout)
        linear = nn.Linear(backbone.feature_dim, classes)
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        layers = OrderedDict(backbone=backbone, dropout=dropout, linear=linear)
        self.encoder, self.low_memory = nn.Sequential(layers), args.low_memory

    def forward(self, clips):
        """(B, 1, 3, T, H, W) -> features (B, 1, D), scores of the classes (B, classes)."""
        backbone, dropout, linear = self.encoder
        features = common.per_view(backbone, clips, self.low_memory)
        return features, linear(dropout(features[:, 0])).float()


def rows(args, part="train"):
    """(path, class) of the videos of a part, "train" or "test", of --dataset; None for a folder."""
    parsers = {"ucf101": ucf101, "hmdb51": hmdb51}
    if args.dataset == "folder":
        return None
    if args.dataset not in parsers:
        common.fail(f"--dataset {args.dataset}: one of folder, {', '.join(parsers)}")
    found = parsers[args.dataset](args, part) if args.data else []
    if not found:
        common.fail(f"--data {args.data} has no {part} list of {args.dataset}, split {args.split}")
    first = found[0][0]  # names are relative to the folder, at some depth, that has this one
    path = str(next(Path(args.data).rglob(first), Path(args.data, first)))
    return [(path[: -len(first)] + name, label) for name, label in found]


def ucf101(args, part):
    """trainlist01.txt: lines `Class/name.avi 1`; testlist01.txt: lines `Class/name.avi`."""
    lists = sorted(Path(args.data).rglob(f"{part}list{args.split:02d}.txt"))
    lines = lists[0].read_text().splitlines() if lists else []
    names = [line.split()[0] for line in lines if line.strip()]
    return [(name, name.split("/")[0]) for name in names]


def hmdb51(args, part):
    """class_test_split1.txt for each class: lines `name.avi 1`, 1 in training, 2 in testing."""
    found, code, ending = [], {"train": "1", "test": "2"}[part], f"_test_split{args.split}.txt"
    for path in sorted(Path(args.data).rglob(f"*{ending}")):
        label = path.name[: -len(ending)]
        lines = [line.rsplit(maxsplit=1) for line in path.read_text().splitlines() if line.strip()]
        found += [(f"{label}/{name}", label) for name, use in lines if use == code]
    return found


def test_videos(source, videos):
    """The videos to test on, their classes numbered as in training. Ends the run where a label is
    missing; warns of classes without a test video and of videos that are in both sets."""
    val = common.Videos(source, videos.classes, "--val")
    for name, part in (("--data", videos), ("--val", val)):
        if (part.labels < 0).any():
            first = part[int((part.labels < 0).argmax())]
            common.fail(f"{name} has videos without a label (a class folder, or a tab): {first}")
    if absent := set(range(len(videos.classes))) - set(val.labels):
        common.say(
            f"WARN no test video of class {videos.classes[min(absent)]} ({len(absent)} such)"
        )
    both = {Path(path).resolve() for path in videos} & {Path(path).resolve() for path in val}
    if both:
        common.say(f"WARN {len(both)} videos are in --data and in --val, such as {min(both)}")
    common.say(f"test: {len(val)} videos")
    return val


def labelled(args, videos, network, clips, crops=1):
    """What a network makes of the videos that can be read, and their labels: (n, ...), (n,)."""
    rows, problems = common.evaluate(args, videos, network, clips, crops)
    for problem in problems:
        common.say(f"WARN left out: {problem}")
    read = rows.flatten(1).isfinite().all(1)
    return rows[read], torch.from_numpy(videos.labels)[read]


def report(args, classes, scores, labels, n):
    """Print accuracies in percent of softmax scores (m, classes), and write them, with what it
    takes to repeat them, to result.json. n: videos in the test set, m of which could be read."""
    right = scores.argmax(-1) == labels  # (m,)
    five = (scores.topk(min(5, len(classes))).indices == labels[:, None]).any(-1)
    each = {name: right[labels == i] for i, name in enumerate(classes) if (labels == i).any()}
    percent = lambda hits: round(100 * hits.float().mean().item(), 2)  # noqa: E731
    protocol = f"{args.dataset}, {args.epochs} epochs of random clips, last epoch; "
    protocol += f"{args.test_clips} clips x {args.test_crops} crops at {args.test_size}"
    result = {"top1": percent(right), "top5": percent(five), "n": len(labels)}
    result |= {"missing": n - len(labels), "classes": len(classes), "protocol": protocol}
    result |= {"views": args.test_clips * args.test_crops}
    result |= {name: getattr(args, name) for name in ("weights", "backbone", "split", "seed")}
    result |= {"command": " ".join(sys.argv), "versions": common.versions()}
    common.say(json.dumps(result))
    result["per_class"] = {name: percent(part) for name, part in each.items()}
    if common.rank() == 0:
        Path(args.out, "result.json").write_text(json.dumps(result, indent=1) + "\n")
    common.say(f"done: {args.out}/result.json")


# --- training


def main(argv=None):
    args, videos = common.start(Recipe, argv, rows)
    val = test_videos(rows(args, "test") or args.val, videos)
    model = Classifier(args, len(videos.classes))
    common.load(model.encoder.backbone, args)
    network = common.distribute(model, args)
    optimizer = common.make_optimizer(model, args)
    chance = math.log(len(videos.classes))
    for step in common.train(args, videos, model, optimizer, sample_clips, chance):
        with step.autocast():
            features, scores = network(step.clips)  # (B, 1, D), (B, classes), float32
        loss = F.cross_entropy(scores, step.labels)
        loss.backward()
        step.update(loss, features=features)
    if args.finished:
        network = model.eval().encoder
        softmax = lambda x: network(x).softmax(-1).mean(0)  # noqa: E731
        scores, labels = labelled(args, val, softmax, args.test_clips, args.test_crops)
        report(args, videos.classes, scores, labels, len(val))


if __name__ == "__main__":
    main()
