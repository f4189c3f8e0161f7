"""Fine-tuning: all layers trained on labelled videos, from weights or from scratch.

Measures What a backbone classifies rightly after supervised training: the share of test videos
         (top 1 and 5), or, where a video has several actions, mean average precision.
Protocol Feichtenhofer et al., 2021 (arXiv 2104.14558), section 4, for UCF101 and HMDB51: one random
         clip a video and epoch, crop, flip and tint; tested on 10 clips x 3 crops a video, whose
         softmax is averaged. After MoCo the study uses --lr 0.005 --weight-decay 1e-4
         --dropout 0.5 --batch-norm plain, after the others these defaults.
Data     folder: two class folders or labelled lists, --data and --val. The others: the official
         files and the videos, anywhere in --data, whatever their names end in.
         ucf101, hmdb51: the split files. ssv2: json files; a frame from each of 8 parts of a video.
         charades: csv files; 157 sigmoids, the maximum over views.
Scratch  Without --weights: the supervised baseline; its backbone.pth feeds the other scripts.
Differs  From the released code: BN statistics over all ranks, frames 8 apart, not 9; short sides
         are drawn uniformly. ssv2: RGB and a crop in the middle, not BGR and on the left (SSV:220).
Recipe   python finetune.py --weights backbone.pth --dataset ucf101 --data UCF101
"""

import argparse
import csv
import glob
import json
import math
import os
import sys
from collections import OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common

# --- recipe


class Recipe:  # name = paper, demo  # meaning, which is the text of --help
    weights = "", ""  # file of a backbone to start from; none: from scratch
    dataset = "folder", "folder"  # folder, ucf101, hmdb51, ssv2 or charades: what lists the videos
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
    lr_steps = (0.0,), (0.0,)  # epochs after which lr falls to a tenth, 0 = half a cosine instead
    warmup_epochs = 0.0, 3.0  # of linear warm-up, 0 = none
    weight_decay = 0.0, 1e-4  # but for BN, 0 = none
    batch_norm = "sync", "sync"  # sync: over all GPUs; plain: over each GPU's share


SETTINGS = {  # the study's where they are not the above, UCF101's; any flag given wins
    "ssv2": """--epochs 22 --lr 0.12 --lr-steps 14 18 --warmup-epochs 0.19 --weight-decay 1e-6
        --dropout 0.5 --augment crop --test-clips 1 --test-crops 1""",
    # SlowFast's configs/Charades/SLOWFAST_16x8_R50 (0.0375 per 16 videos): the study's is not known
    "charades": """--epochs 57 --lr 0.15 --lr-steps 41 49 --warmup-epochs 4 --weight-decay 1e-4
        --dropout 0.5 --augment crop,flip""",
}


def with_settings(argv):
    """The command line after the SETTINGS of its --dataset: of two equal flags the last counts."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error, argv = common.fail, sys.argv[1:] if argv is None else argv
    parser.add_argument("--dataset")
    parser.add_argument("--small", action="store_true")
    known, _ = parser.parse_known_args(argv)
    return ([] if known.small else SETTINGS.get(known.dataset, "").split()) + argv


# --- method


def sample_clips(duration, span, rho, timespan, rng):
    """Start times (seconds) of rho clips: i.i.d. uniform, within `timespan` of each other."""
    first, last = 0.0, max(0.0, duration - span)
    if timespan is not None and timespan < last:
        first = rng.uniform(0.0, last - timespan)
        last = first + timespan
    return rng.uniform(first, last, size=rho).tolist()


def segments(args, duration, span, rho=0, timespan=None, rng=None):
    """Times (seconds) of all frames of a clip, one from each of T equal parts of the video: random
    ones, or of args.test_clips clips without rng the middles of equal parts of those (SSV:159)."""
    within = (np.arange(args.test_clips)[:, None] + 0.5) / args.test_clips
    within = within if rng is None else rng.random((rho, args.frames))
    return ((np.arange(args.frames) + within) * duration / args.frames).tolist()  # (clips, T)


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
    """(path, class) of the videos of a part, "train" or "test", of --dataset; None for a folder.

    The class is "" where there are several. Ends the run if a test video is not there.
    """
    found = listed(args, part)
    if found is None:
        return None
    depth = found[0][0].count("/") + 1  # of a name
    key = lambda path: "/".join(os.path.splitext(path)[0].split("/")[-depth:])  # noqa: E731
    there = {key(path): path for path in common.Videos(args.data)}
    lost = [name for name, _ in found if key(name) not in there]
    words = f"{len(lost)} of {len(found)} {part} videos are not in {args.data}: {lost[:1]} ..."
    if lost and part == "test" and not args.allow_missing:
        common.fail(f"{words}; --allow-missing leaves such videos out")
    if lost:
        common.say(f"WARN {words}")
    labels = [label if isinstance(label, str) else "" for _, label in found]
    paths = [there.get(key(name), os.path.join(args.data, name)) for name, _ in found]
    return [*zip(paths, labels, strict=True)]


def listed(args, part):
    """What the official files say of a part: (name, class) of each video, or (name, actions), see
    charades; None for a folder."""
    parsers = {"ucf101": ucf101, "hmdb51": hmdb51, "ssv2": ssv2, "charades": charades}
    if args.dataset == "folder":
        return None
    if args.dataset not in parsers:
        common.fail(f"--dataset {args.dataset}: one of folder, {', '.join(parsers)}")
    if not args.data:
        common.fail(f"--data is missing: {args.dataset} has no demo")
    try:
        found = parsers[args.dataset](args, part)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        common.fail(f"--data {args.data}: a list of {args.dataset} is damaged: {error!r}")
    return found or common.fail(f"--data {args.data}: a list of {args.dataset} is empty")


def official(args, *names):
    """The text of the first file of one of these names in --data; ends the run if there is none."""
    for name in names:
        for path in sorted(glob.glob(f"**/{name}", root_dir=args.data, recursive=True)):
            return Path(args.data, path).read_text(encoding="utf-8-sig")
    common.fail(f"--data {args.data} has no {' or '.join(names)} ({args.dataset})")


def ucf101(args, part):
    """trainlist01.txt: lines `Class/name.avi 1`; testlist01.txt: lines `Class/name.avi`."""
    lines = official(args, f"{part}list{args.split:02d}.txt").splitlines()
    names = [line.split()[0] for line in lines if line.strip()]
    return [(name, name.split("/")[0]) for name in names]


def hmdb51(args, part):
    """class_test_split1.txt for each class: lines `name.avi 1`, 1 in training, 2 in testing."""
    found, code, ending = [], {"train": "1", "test": "2"}[part], f"_test_split{args.split}.txt"
    official(args, f"*{ending}")
    for path in sorted(glob.glob(f"**/*{ending}", root_dir=args.data, recursive=True)):
        label = os.path.basename(path)[: -len(ending)]
        lines = Path(args.data, path).read_text().splitlines()
        pairs = [line.rsplit(maxsplit=1) for line in lines if line.strip()]
        found += [(f"{label}/{name}", label) for name, use in pairs if use == code]
    return found


def ssv2(args, part):
    """train.json and validation.json: [{"id", "template"}], a template with [brackets]; labels.json
    has it without, numbered from "0". Older releases: something-something-v2-train.json and so on.
    """
    words = ("train" if part == "train" else "validation", "labels")
    names = [(f"something-something-v2-{word}.json", f"{word}.json") for word in words]
    entries, labels = (json.loads(official(args, *pair)) for pair in names)
    templates = [entry["template"].replace("[", "").replace("]", "") for entry in entries]
    if unknown := set(templates) - set(labels):
        raise ValueError(f"no label {min(unknown)}")
    return [(f"{e['id']}.webm", label) for e, label in zip(entries, templates, strict=True)]


def charades(args, part):
    """Charades_v1_train.csv, Charades_v1_test.csv: a video's id and its actions, such as
    "c092 11.90 21.20;c147 0.00 12.60" -> [(92, 11.9, 21.2), (147, 0.0, 12.6)]."""
    found = []
    for line in csv.DictReader(official(args, f"Charades_v1_{part}.csv").splitlines(True)):
        actions = [action.split() for action in line["actions"].split(";") if action.strip()]
        actions = [(int(name[1:]), float(start), float(end)) for name, start, end in actions]
        found.append((f"{line['id']}.mp4", actions))
    return found


def active(actions, start=0.0, end=math.inf, classes=157):
    """(classes,) float: 1 for the actions that overlap a stretch of time (CHA:209)."""
    target = torch.zeros(classes)
    target[[number for number, first, last in actions if first <= end and last >= start]] = 1
    return target


def targets(args, notes, step):
    """(B, classes): the actions during each clip."""
    times = step.starts[:, 0].tolist()
    span = (args.frames - 1) * args.stride / 30
    clips = zip(step.labels.tolist(), times, strict=True)
    return torch.stack([active(notes[i], start, start + span) for i, start in clips])


def prior_entropy(marks):
    """Mean binary cross entropy (...) of what knows how frequent each class is, and no more."""
    shares = marks.mean(0)
    return F.binary_cross_entropy(shares, shares).item()


def average_precision(scores, positive):
    """Area under the steps of precision over recall of scores (n,), of which some are positive
    (n,); equal scores come in together. NaN if none is positive."""
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # of equal scores
    hits, seen = np.cumsum(positive[order])[last], np.flatnonzero(last) + 1
    if not positive.any():
        return math.nan
    return float(np.sum(np.diff(hits, prepend=0) / hits[-1] * hits / seen))


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


def accuracies(classes, scores, labels):
    """In percent, of softmax scores (m, classes)."""
    right = scores.argmax(-1) == labels  # (m,)
    five = (scores.topk(min(5, len(classes))).indices == labels[:, None]).any(-1)
    each = {name: right[labels == i] for i, name in enumerate(classes) if (labels == i).any()}
    percent = lambda hits: round(100 * hits.float().mean().item(), 2)  # noqa: E731
    per_class = {name: percent(part) for name, part in each.items()}
    return {"top1": percent(right), "top5": percent(five), "per_class": per_class}


def precisions(classes, scores, truth):
    """Mean average precision in percent of scores (m, classes), over the classes that occur in the
    truth (m, classes)."""
    columns = zip(scores.numpy().T, truth.numpy().T > 0, strict=True)
    each = dict(zip(classes, [100 * average_precision(*column) for column in columns], strict=True))
    per_class = {name: round(value, 2) for name, value in each.items() if not math.isnan(value)}
    return {"map": round(float(np.nanmean([*each.values()])), 2), "per_class": per_class}


def report(args, numbers, classes, n, read):
    """Print the numbers, and write them, with what it takes to repeat them, to result.json. n:
    videos in the test set, of which so many could be read."""
    per_class = numbers.pop("per_class")
    protocol = f"{args.dataset}, {args.epochs} epochs of random clips, last epoch; "
    protocol += f"{args.test_clips} clips x {args.test_crops} crops at {args.test_size}"
    result = {**numbers, "n": read, "missing": n - read, "classes": len(classes)}
    result |= {"protocol": protocol, "views": args.test_clips * args.test_crops}
    result |= {name: getattr(args, name) for name in ("weights", "backbone", "split", "seed")}
    result |= {"command": " ".join(sys.argv), "versions": common.versions()}
    common.say(json.dumps(result))
    if common.rank() == 0:
        text = json.dumps({**result, "per_class": per_class}, indent=1) + "\n"
        Path(args.out, "result.json").write_text(text)
    common.say(f"done: {args.out}/result.json")


# --- training


def main(argv=None):
    args, videos = common.start(Recipe, with_settings(argv), rows)
    sample, clips = sample_clips, args.test_clips
    if args.dataset == "ssv2":
        sample = clips = partial(segments, args)
    several, classes = args.dataset == "charades", videos.classes
    if several:
        notes, truth = ([label for _, label in listed(args, part)] for part in ("train", "test"))
        val, classes = common.Videos(rows(args, "test")), [f"c{i:03d}" for i in range(157)]
        videos.labels, val.labels = np.arange(len(videos)), np.arange(len(val))  # of the notes
        chance = prior_entropy(torch.stack([active(actions) for actions in notes]))
    else:
        val = test_videos(rows(args, "test") or args.val, videos)
        chance = math.log(len(classes))
    model = Classifier(args, len(classes))
    common.load(model.encoder.backbone, args)
    network = common.distribute(model, args)
    optimizer = common.make_optimizer(model, args)
    for step in common.train(args, videos, model, optimizer, sample, chance):
        with step.autocast():
            features, scores = network(step.clips)  # (B, 1, D), (B, classes), float32
        if several:
            loss = F.binary_cross_entropy_with_logits(scores, targets(args, notes, step).to(scores))
        else:
            loss = F.cross_entropy(scores, step.labels)
        loss.backward()
        step.update(loss, features=features)
    if args.finished:
        network = model.eval().encoder
        if several:
            views = lambda x: network(x).sigmoid().amax(0)  # noqa: E731
            scores, labels = labelled(args, val, views, clips, args.test_crops)
            truth = torch.stack([active(truth[i]) for i in labels])
            numbers = precisions(classes, scores, truth)
        else:
            views = lambda x: network(x).softmax(-1).mean(0)  # noqa: E731
            scores, labels = labelled(args, val, views, clips, args.test_crops)
            numbers = accuracies(classes, scores, labels)
        report(args, numbers, classes, len(val), len(scores))


if __name__ == "__main__":
    main()
