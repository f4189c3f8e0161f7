"""Fine-tuning: all layers trained on labelled videos, from weights or from scratch.

Measures What a backbone classifies correctly after supervised training: the share of test videos
         (top 1 and 5), or, where a video has several actions, mean average precision.
Protocol Feichtenhofer et al., 2021 (arXiv 2104.14558), section 4, for UCF101 and HMDB51: one random
         clip per video and epoch, crop, flip, tint; tested on the mean softmax of 10 clips x 3
         crops. After MoCo --lr 0.005 --weight-decay 1e-4 --dropout 0.5 --batch-norm plain.
Data     folder: two folders of class folders, or two labelled lists, --data and --val. The others:
         the official files and the videos, anywhere in --data, whatever their names end in.
         ssv2: a frame from each of 8 parts of a video. charades: 157 sigmoids, the maximum over
         views. ava: 80 sigmoids of each person's box; frame mAP at IoU 0.5.
Scratch  Without --weights: the supervised baseline; its backbone.pth feeds the other scripts.
Differs  From the released code: BN statistics over all ranks, frames 8 apart, not 9; short sides
         are drawn uniformly. ssv2: RGB and a crop in the middle, not BGR and on the left (SSV:220).
         ava: trained on annotated boxes alone; equal scores share a threshold.
Recipe   python finetune.py --weights backbone.pth --dataset ucf101 --data UCF101
"""

import argparse
import csv
import glob
import json
import math
import os
import re
import shlex
import sys
from collections import OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import box_iou, roi_align

import common

# --- recipe


class Recipe:  # name = paper, demo  # meaning, which is the text of --help
    weights = "", ""  # file of a backbone to start from; none: from scratch
    dataset = "folder", "folder"  # folder, ucf101, hmdb51, ssv2, charades or ava: lists of videos
    split = 1, 1  # of ucf101 and hmdb51: 1, 2 or 3
    val = "", ""  # folder or list of the test videos; none: the folder val beside train in --data
    boxes = "", ""  # of ava, to test on: csv of detected ones with scores; none: the annotated
    allow_missing = False, False  # leave videos out that cannot be read, and say how many
    backbone = "", ""  # network; none: as the weights were trained, as are the next three
    frames = 0, 0  # frames of a clip, 0 = as trained
    stride = 0, 0  # from one frame to the next, in 1/30 s, 0 = as trained
    size = 0, 0  # height and width of a clip in training, in pixels, 0 = as trained
    test_size = 0, 0  # and in testing, 0 = 256/224 of that
    test_clips = 10, 4  # of a video, evenly over its length
    test_crops = 3, 1  # of a clip, evenly along its long side
    augment = "crop,flip,tint", "crop,flip"  # in training; tint: gray and colours; none: the middle
    dropout = 0.8, 0.0  # before the classifier, 0 = none, 1 = all
    epochs = 200, 40  # passes over the videos
    batch_size = 64, 40  # videos of a step, over all processes
    optimizer = "sgd", "adamw"  # lars, sgd or adamw
    lr = 0.01, 4.8e-3  # per 64 videos
    lr_steps = (0.0,), (0.0,)  # epochs after which lr falls to a tenth, 0 = half a cosine instead
    warmup_epochs = 0.0, 3.0  # of linear warm-up, 0 = none; in proportion to the epochs
    weight_decay = 0.0, 1e-4  # on all weights but those of BN, 0 = none
    batch_norm = "sync", "sync"  # sync: over all GPUs; plain: over each GPU's share


SETTINGS = {  # the study's where not UCF101's; a flag wins; {numbers} go with --epochs, the first
    "ssv2": """--epochs 22 --lr 0.12 --lr-steps {14} {18} --warmup-epochs {0.19} --weight-decay 1e-6
        --dropout 0.5 --augment crop --test-clips 1 --test-crops 1""",
    # SlowFast's configs/Charades/SLOWFAST_16x8_R50 (0.0375 per 16 videos), its warm-up unverified
    "charades": """--epochs 57 --lr 0.15 --lr-steps {41} {49} --warmup-epochs {4}
        --weight-decay 1e-4 --dropout 0.5 --augment crop,flip""",
    "ava": """--epochs 32 --lr 0.3 --lr-steps {16} {24} {28} --warmup-epochs {5.3}
        --weight-decay 1e-7 --dropout 0.5 --augment crop,flip --test-clips 1 --test-crops 1""",
}


def with_settings(argv):
    """The command line after the SETTINGS of its --dataset: of two equal flags the last counts."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error, argv = common.fail, sys.argv[1:] if argv is None else argv
    parser.add_argument("--dataset")
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--small", action="store_true")
    known, _ = parser.parse_known_args(argv)
    small = ["--augment", "crop"] * (known.dataset == "ssv2")  # where left and right are classes
    settings = SETTINGS.get(known.dataset, "")
    share = known.epochs / float(settings.split()[1]) if known.epochs and settings else 1
    settings = re.sub(r"{(.*?)}", lambda number: f"{share * float(number[1]):g}", settings)
    return (small if known.small else settings.split()) + argv


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
    ones, or for testing, without rng, 1/2n, 3/2n, ... into each part, of n test clips (SSV:159)."""
    share = (np.arange(args.test_clips)[:, None] + 0.5) / args.test_clips
    share = share if rng is None else rng.random((rho, args.frames))
    return ((np.arange(args.frames) + share) * duration / args.frames).tolist()  # (clips, T)


def around(duration, span, rho=1, timespan=None, rng=None, moment=0.0):
    """Start (seconds) of a clip with a moment of a film in its middle (DU:55). A video of less than
    20 minutes is a cut of the film, from 900 s on (AVH:121)."""
    return [moment - 900 * (duration < 1200) - span / 2] * rho


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
        with torch.autocast(clips.device.type, enabled=False):  # rounded scores would tie
            return features, linear(dropout(features[:, 0]))


class Detector(Classifier):
    def __init__(self, args, classes):
        super().__init__(args, classes)
        dilate(self.encoder.backbone)

    def forward(self, clips, boxes):
        """(B, 1, 3, T, H, W), boxes (B, 1, M, 4) in pixels -> features (B, 1, D), scores of the
        classes for each box (B, M, classes); HEAD:20."""
        backbone, dropout, linear = self.encoder
        maps = common.per_view(nn.Sequential(*backbone), clips, self.low_memory)  # B, 1, D, T, H, W
        maps = maps[:, 0].mean(2)  # (B, D, H, W)
        scale = 2.0 ** round(math.log2(maps.shape[-1] / clips.shape[-1]))  # 1/16 in slow_r50
        parts = roi_align(maps, [*boxes[:, 0].float()], 7, scale, sampling_ratio=0, aligned=True)
        with torch.autocast(clips.device.type, enabled=False):
            scores = linear(dropout(parts.amax((2, 3))))  # (B * M, classes)
        return maps.mean((2, 3))[:, None], scores.unflatten(0, (len(boxes), -1))


def dilate(backbone):
    """Make the last stage's map as fine as its input: no stride, 3x3 convolutions dilated by 2."""
    convolutions = [m for m in [*backbone][-1].modules() if isinstance(m, nn.Conv3d)]
    for conv in convolutions if any(m.stride[2] == 2 for m in convolutions) else []:
        conv.stride = (conv.stride[0], 1, 1)
        if conv.kernel_size[2] == 3:
            conv.dilation, conv.padding = (1, 2, 2), (conv.padding[0], 2, 2)


def rows(args, part="train"):
    """(path, class) of the videos of a part, "train" or "test", of --dataset, class "" where there
    are several; None for a folder. Ends the run if a test video is not there."""
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
    """What the official files say of a part: (name, class) of each video, or (name, note), see
    charades and ava; None for a folder."""
    parsers = {parser.__name__: parser for parser in (ucf101, hmdb51, ssv2, charades, ava)}
    if args.dataset == "folder":
        return None
    if args.dataset not in parsers:
        common.fail(f"--dataset {args.dataset}: one of folder, {', '.join(parsers)}")
    if not args.data:
        common.fail(f"--data is missing: {args.dataset} has no demo")
    try:
        found = parsers[args.dataset](args, part)
    except (OSError, LookupError, AttributeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        common.fail(f"--data {args.data}: cannot read a list of {args.dataset}: {reason}")
    return found or common.fail(f"--data {args.data}: a list of {args.dataset} is empty")


def official(args, *names):
    """The text of the first file of one of these names in --data; ends the run if there is none."""
    for name in names:
        for path in sorted(glob.glob(f"**/{name}", root_dir=args.data, recursive=True)):
            return Path(args.data, path).read_text(encoding="utf-8-sig")
    common.fail(f"--data {args.data} has no {' or '.join(names)} ({args.dataset})")


def within(text, least, most):
    """An integer from least to most, or ValueError."""
    if not least <= int(text) <= most:
        raise ValueError(f"{text} is not one of {least} to {most}")
    return int(text)


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
    return [*dict.fromkeys(found)]  # a list may lie there twice


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
        actions = [(within(name[1:], 0, 156), float(a), float(b)) for name, a, b in actions]
        found.append((f"{line['id']}.mp4", actions))
    return found


def ava(args, part):
    """ava_train_v2.2.csv, ava_val_v2.2.csv: see key_frames. -> (name, (second, boxes, actions of
    each box)) of each key frame; in testing its boxes are those of args.boxes, if given."""
    text = official(args, f"ava_{'train' if part == 'train' else 'val'}_v2.2.csv")
    left_out = excluded(args) if part == "test" else set()
    frames = key_frames(text, left_out)
    if part == "test" and args.boxes:
        frames = key_frames(Path(args.boxes).read_text(), left_out, 0.9)
    notes = {k: ([box[:4] for box in boxes], [*boxes.values()]) for k, boxes in frames.items()}
    return [(f"{video}.mp4", (second, *note)) for (video, second), note in notes.items()]


def excluded(args):
    """{(video, second)} of ava_val_excluded_timestamps_v2.2.csv, lines `video,second`."""
    lines = csv.reader(official(args, "ava_val_excluded_timestamps_v2.2.csv").splitlines())
    return {(line[0], int(line[1])) for line in lines if line}


def key_frames(text, left_out=(), least=0.0):
    """Lines `video,second,x1,y1,x2,y2,action,person`; a box of several actions has a line for each.

    {(video, second): {(x1, y1, x2, y2, person): [actions, from 0]}}. Of a detector the last column
    is the score, at least so much (AVH:63), the action empty or -1.
    """
    frames = {}
    for video, second, *rest in csv.reader(text.splitlines()):
        key = video, int(float(second))
        if not rest or key in left_out:  # nobody is there
            continue
        *box, action, last = rest
        x1, y1, x2, y2 = map(float, box)
        if least and float(last) < least:
            continue
        if not (-0.1 < x1 < x2 < 1.1 and -0.1 < y1 < y2 < 1.1):
            raise ValueError(f"a box of {video} is none in shares of width and height: {box}")
        boxes = frames.setdefault(key, {})
        actions = boxes.setdefault((x1, y1, x2, y2, "" if least else last), [])
        actions += [within(action, 1, 80) - 1] if action not in ("", "-1") else []
    return frames


def ava_classes(args):
    """{action, from 0: name} of the 60 that count: `label { name: "stand" label_id: 12 ... }`."""
    text = official(args, "ava_action_list_v2.2_for_activitynet_2019.pbtxt")
    found = re.findall(r'name: "(.*)"\s+(?:label_)?id: (\d+)', text)
    return {int(number) - 1: name for name, number in found}


def annotate(args, videos, part):
    """The notes of the videos of a data set with several actions a video; a video's label becomes
    the number of its note, and AVA's get their moments and boxes."""
    if args.dataset == "ava" and "rotate" in args.augment:
        common.fail("--augment rotate: boxes do not follow it")
    notes = [note for _, note in listed(args, part)]
    videos.labels = np.arange(len(videos))
    if args.dataset == "ava":
        seconds, boxes, notes = zip(*notes, strict=True)
        videos.moments = np.array(seconds)
        videos.boxes = np.zeros((len(boxes), max(map(len, boxes)), 4), np.float32)
        for i, found in enumerate(boxes):
            videos.boxes[i, : len(found)] = found
    common.say(f"{part}: {len(videos)} videos or key frames with notes")
    return notes


def multi_hot(numbers, classes):
    """(classes,) float: 1 at the numbers."""
    return torch.tensor([float(c in numbers) for c in range(classes)])


def active(actions, start=0.0, end=math.inf):
    """(157,): the actions of Charades that overlap a stretch of time (CHA:209)."""
    return multi_hot([c for c, first, last in actions if first <= end and last >= start], 157)


def targets(args, notes, step):
    """Charades: (B, 157), the actions during each clip. AVA: (B, M, 80), NaN where is no box."""
    numbers, times = step.labels.tolist(), step.starts[:, 0].tolist()
    if args.dataset == "charades":
        span = (args.frames - 1) * args.stride / 30
        clips = zip(numbers, times, strict=True)
        return torch.stack([active(notes[i], start, start + span) for i, start in clips])
    target = torch.full((*step.boxes.shape[::2], 80), math.nan)
    for b, i in enumerate(numbers):
        target[b, : len(notes[i])] = torch.stack([multi_hot(actions, 80) for actions in notes[i]])
    return target


def multi_label_loss(scores, target):
    """Mean binary cross entropy of scores (..., classes), but where the target is NaN."""
    known = target.isfinite()
    return F.binary_cross_entropy_with_logits(scores[known], target[known])


def prior_entropy(args, notes):
    """The multi-label loss of what knows how frequent each class is, and no more."""
    if args.dataset == "charades":
        marks = [active(actions) for actions in notes]
    else:
        marks = [multi_hot(actions, 80) for boxes in notes for actions in boxes]
    shares = torch.stack(marks).mean(0)
    return F.binary_cross_entropy(shares, shares).item()


def average_precision(scores, positive, total=None, best=False):
    """Area under the steps of precision over recall of scores (n,), of which some are positive
    (n,); equal scores come in together. total: positives to be found, by default those here; best:
    precision is the best at this recall or more. NaN if there are no positives."""
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)[: len(scores)]  # of equal scores
    hits, seen = np.cumsum(positive[order])[last], np.flatnonzero(last) + 1
    total, precision = positive.sum() if total is None else total, hits / seen
    if best:
        precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(hits, prepend=0) * precision) / total) if total else math.nan


def right(boxes, scores, people, marks, least=0.5):
    """Which scores (k, classes) of boxes (k, 4) are right, (k, classes) bool, given people (m, 4)
    and marks (m, classes) bool: by falling score, a box is right about a class if, of the people
    with the class, the one that it overlaps most, at IoU `least` or more, is free."""
    found = np.zeros(scores.shape, bool)
    overlap = box_iou(torch.as_tensor(boxes).double(), torch.as_tensor(people).double()).numpy()
    for c in np.flatnonzero(marks.any(0) & (len(boxes) > 0)):
        mine, taken = np.flatnonzero(marks[:, c]), set()
        for box in np.argsort(-scores[:, c], kind="stable"):
            person = mine[overlap[box, mine].argmax()]
            if overlap[box, person] >= least and person not in taken:
                taken.add(person)
                found[box, c] = True
    return found


def frame_precisions(frames):
    """Average precision at IoU 0.5 of each class, (classes,), NaN where nobody has it; of frames
    (boxes, scores, people, marks), see right. Precision is the best at a recall or more."""
    scores = np.concatenate([scores for _, scores, _, _ in frames])
    found = np.concatenate([right(*frame) for frame in frames])
    totals = sum(marks.sum(0) for *_, marks in frames)
    columns = zip(scores.T, found.T, totals, strict=True)
    return np.array([average_precision(*column, best=True) for column in columns])


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


def test_classes(args, model, val, classes):
    """Accuracies in percent, and of how many videos."""
    clips = partial(segments, args) if args.dataset == "ssv2" else args.test_clips
    softmax = lambda x: model(x[:, None])[1].softmax(-1).mean(0)  # noqa: E731
    scores, labels = labelled(args, val, softmax, clips, args.test_crops)  # (m, classes), (m,)
    hits = scores.argmax(-1) == labels
    five = (scores.topk(min(5, len(classes))).indices == labels[:, None]).any(-1)
    percent = lambda hits: round(100 * hits.float().mean().item(), 2)  # noqa: E731
    each = ((name, labels == i) for i, name in enumerate(classes))
    per_class = {name: percent(hits[mine]) for name, mine in each if mine.any()}
    return {"top1": percent(hits), "top5": percent(five), "per_class": per_class}, len(scores)


def test_charades(args, model, val, classes):
    """Mean average precision in percent, and of how many videos."""
    notes = annotate(args, val, "test")
    most = lambda x: model(x[:, None])[1].sigmoid().amax(0)  # noqa: E731
    scores, which = labelled(args, val, most, args.test_clips, args.test_crops)
    marks = torch.stack([active(notes[i]) for i in which]).numpy() > 0  # (m, classes)
    columns = zip(scores.numpy().T, marks.T, strict=True)
    return mean_precision(classes, [average_precision(*column) for column in columns]), len(scores)


def test_ava(args, model, val, classes):
    """Mean frame precision in percent, and of how many key frames. One without boxes counts as
    missed, one that could not be read does not count."""
    annotate(args, val, "test")
    sigmoid = lambda x, boxes: model(x[None], boxes[None, None])[1][0].sigmoid()  # noqa: E731
    scores, which = labelled(args, val, sigmoid, around, crops=0)  # (m, M, 80), (m,)
    scores = dict(zip(which.tolist(), scores[:, :, [*classes]].numpy(), strict=True))
    text, frames = official(args, "ava_val_v2.2.csv"), []
    people = key_frames(text, excluded(args))
    for i, (name, (second, boxes, _)) in enumerate(listed(args, "test")):
        there = people.pop((name.removesuffix(".mp4"), second), {})
        if i in scores:
            frames.append((boxes, scores[i][: len(boxes)], *marked(there, classes)))
    nothing = np.zeros((0, 4)), np.zeros((0, len(classes)))
    frames += [(*nothing, *marked(there, classes)) for there in people.values()]
    return mean_precision(classes.values(), frame_precisions(frames)), len(scores)


def marked(people, classes):
    """Boxes (m, 4) of the people of a key frame, and which of the classes are theirs."""
    boxes = np.array([box[:4] for box in people]).reshape(-1, 4)
    marks = [np.isin([*classes], actions) for actions in people.values()]
    return boxes, np.array(marks, bool).reshape(-1, len(classes))


def mean_precision(classes, values):
    """In percent, over the classes that occur; the value of another is NaN."""
    each = {name: 100 * v for name, v in zip(classes, values, strict=True) if not math.isnan(v)}
    mean = round(sum(each.values()) / len(each), 2) if each else None
    return {"map": mean, "per_class": {name: round(value, 2) for name, value in each.items()}}


def report(args, classes, expected, numbers, n):
    """Print the numbers, and write them, with what it takes to repeat them, to result.json. n
    videos (or key frames) of the expected ones could be read."""
    per_class = numbers.pop("per_class")
    views, at = args.test_clips * args.test_crops, args.test_size
    protocol = f"{args.test_clips} clips x {args.test_crops} crops at {at}"
    if args.dataset == "ava":
        views, boxes = 1, args.boxes or "annotated"
        protocol = f"1 clip a key frame, whole pictures at {at}, boxes: {boxes}"
    protocol = f"{args.dataset}, {args.epochs} epochs of random clips, last epoch; {protocol}"
    result = {**numbers, "n": n, "missing": expected - n, "classes": len(classes)}
    result |= {"protocol": protocol, "views": views}
    result |= {name: getattr(args, name) for name in ("weights", "backbone", "split", "seed")}
    result |= {"command": shlex.join(sys.argv), "versions": common.versions()}
    common.say(json.dumps(result))
    text = json.dumps({**result, "per_class": per_class}, indent=1) + "\n"
    common.write(f"{args.out}/result.json", lambda file: file.write(text.encode()))
    common.say(f"done: {args.out}/result.json")


# --- training


def main(argv=None):
    args, videos = common.start(Recipe, with_settings(argv), rows)
    is_ava, is_folder = args.dataset == "ava", args.dataset == "folder"
    for flag, fits in (("boxes", is_ava), ("val", is_folder), ("compile", not is_ava)):
        if getattr(args, flag) and not fits:
            common.fail(f"--{flag} does not go with --dataset {args.dataset}")
    several, sample, classes = args.dataset in ("charades", "ava"), sample_clips, videos.classes
    if args.dataset == "ssv2":
        sample = partial(segments, args)
    elif args.dataset == "charades":
        classes = [f"c{i:03d}" for i in range(157)]
    elif args.dataset == "ava":
        sample, classes = around, ava_classes(args)
    test = rows(args, "test") or args.val
    val = common.Videos(test) if several else test_videos(test, videos)
    notes = annotate(args, videos, "train") if several else []
    model = Detector(args, 80) if args.dataset == "ava" else Classifier(args, len(classes))
    common.load(model.encoder.backbone, args)
    network = common.distribute(model, args)
    optimizer = common.make_optimizer(model, args)
    chance = prior_entropy(args, notes) if several else math.log(len(classes))
    for step in common.train(args, videos, model, optimizer, sample, chance):
        boxes = [step.boxes.to(step.clips)] if args.dataset == "ava" else []
        with step.autocast():
            features, scores = network(step.clips, *boxes)  # (B, 1, D), (B, ..., classes), float32
        if several:
            loss = multi_label_loss(scores, targets(args, notes, step).to(scores))
        else:
            loss = F.cross_entropy(scores, step.labels)
        loss.backward()
        step.update(loss, features=features)
    if args.finished:
        tests = {"charades": test_charades, "ava": test_ava}
        tested = tests.get(args.dataset, test_classes)(args, model.eval(), val, classes)
        report(args, classes, len(val), *tested)


if __name__ == "__main__":
    main()
