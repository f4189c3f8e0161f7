"""Fine-tuning: all layers are trained on labelled videos, from pre-trained weights or from scratch.

Measures What a backbone classifies correctly after supervised training: top-1 and top-5 accuracy,
         or mean average precision where a video has several actions.
Protocol Feichtenhofer et al., 2021 (arXiv 2104.14558), sections 4 and B: one random clip per video
         and epoch; tested on the mean softmax of 10 clips x 3 crops, after the last epoch. SETTINGS
         in the file says whose the numbers of a data set are; --recipe released takes the released
         code's (SlowFast at commit 287ec00) for ucf101, hmdb51, charades and ava.
Data     folder, kinetics: class folders in train/ and val/, or lists with labels, --data and --val.
         The others: the official files, and the videos anywhere in --data, whatever their names end
         in. ssv2: a frame from each of T equal parts of a video. charades: 157 sigmoids, the
         maximum over views. ava: 80 sigmoids for each person's box; frame mAP at IoU 0.5.
Scratch  Without --weights: the supervised baseline. Its backbone.pth feeds the other scripts.
Differs  From the released code: BN statistics are of all ranks; frames are 8/30 s apart, not 9/30
         (ucf101) or 8 frames whatever the rate (charades); short sides are uniform. ssv2: RGB and
         the centre crop, not BGR and the left one. ava: trained on annotated boxes alone.
Recipe   python finetune.py --weights backbone.pth --dataset ucf101 --data UCF101
"""

import contextlib
import csv
import dataclasses
import glob
import json
import math
import os
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import default_collate
from torchvision.ops import box_iou, roi_align
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes

import common
import eval_linear
from common import arg

# --- config


# The paper's numbers but where a comment says another's; lr is per 64 videos. A flag wins.
SETTINGS = {
    "folder": {},  # as in Config
    "ucf101": {},
    "hmdb51": {},
    # of the released Kinetics/SLOW_8x8_R50
    "kinetics": dict(epochs=196, lr=0.1, lr_steps=(), warmup=34 / 196, recipe="released")
    | dict(weight_decay=1e-4, dropout=0.5),
    "ssv2": dict(epochs=22, lr=0.12, lr_steps=(14 / 22, 18 / 22), augment="crop")
    | dict(warmup=0.19 / 22, weight_decay=1e-6, dropout=0.5)  # released
    | dict(test_clips=1, test_crops=1),
    "charades": dict(epochs=60, lr=0.2, lr_steps=(40 / 60, 50 / 60), warmup=5 / 60)
    | dict(weight_decay=1e-4, dropout=0.5)  # released
    | dict(frames=16, stride=8),
    "ava": dict(epochs=32, lr=0.3, lr_steps=(16 / 32, 24 / 32, 28 / 32))
    | dict(warmup=5.3 / 32, weight_decay=1e-7, dropout=0.5),  # released
}
RELEASED = dict.fromkeys(  # here, for a folder and hmdb51: they have no config
    ("folder", "ucf101", "hmdb51"), dict(lr=0.01, lr_steps=(), augment="crop,flip,tint")
)
RELEASED["ava"] = dict(box_score=0.9)
# Charades/SLOWFAST_16x8_R50, lr 0.0375 per 16 videos; its warm-up is unverified
RELEASED["charades"] = dict(epochs=57, lr=0.15, lr_steps=(41 / 57, 49 / 57), warmup=4 / 57)


@dataclasses.dataclass
class Config(eval_linear.Evaluation):  # the paper's numbers for UCF101 and HMDB51
    dataset: str = arg("folder", "the data set", choices=tuple(SETTINGS))
    recipe: str = arg("paper", "whose settings", choices=("paper", "released"))
    split: int = arg(1, "of ucf101 and hmdb51: 1, 2 or 3")
    boxes: str = arg("", "ava: csv of detected boxes to test on; none: the annotated ones")
    box_score: float = arg(0.8, "ava: least score of a detected box")
    augment: str = arg("crop,flip", "also tint (gray and color jitter), or none")
    dropout: float = arg(0.8, "before the classifier (released)")
    epochs: int = arg(200, "passes over the videos")
    lr: float = arg(0.025, "peak learning rate per 64 videos")
    lr_steps: tuple[float, ...] = arg((0.3, 0.6, 0.9), "shares of the run: lr / 10; 0: cosine")
    warmup: float = arg(0.0, "linear warm-up, as a share of the run (released)")
    weight_decay: float = arg(0.0, "weight decay, on all weights but BN's (released)")
    sync_bn: bool = arg(True, "on GPUs: BN over all ranks (released)")


# here: what learns in seconds on a CPU
DEMO = dict(backbone="tiny", stride=4, size=32, test_clips=4, test_crops=1, dropout=0.0, epochs=40)
DEMO |= dict(batch_size=40, optimizer="adamw", lr=4.8e-3, warmup=0.075, weight_decay=1e-4)
DEMO |= dict(lr_steps=())


def use_settings(cfg, weights):
    """Take the settings of the data set and of the recipe where no flag was given; weights: the
    settings with which they were trained."""
    if cfg.boxes and cfg.dataset != "ava":
        common.fail(f"--boxes does not go with --dataset {cfg.dataset}")
    for name in {"rotate", "noise", "sobel"} & set(cfg.augment.split(",")):
        if cfg.dataset == "ava":
            common.fail(f"--augment {name} does not go with --dataset ava: boxes cannot follow")
    if cfg.val and cfg.dataset in PARSERS:
        common.fail(f"--val does not go with --dataset {cfg.dataset}")
    if not cfg.data and cfg.dataset in PARSERS:
        common.fail(f"--data is missing: {cfg.dataset} has no demo")
    settings = SETTINGS[cfg.dataset]
    if cfg.recipe == "released":
        settings = settings | RELEASED.get(cfg.dataset, {})
    if cfg.dataset == "ava" and weights.get("script") == "finetune":
        settings = settings | {"lr": 0.05}  # paper: from supervised weights
    if cfg.small or not cfg.data:
        settings = {"augment": "crop"} if cfg.dataset == "ssv2" else {}  # left, right are classes
        cfg.recipe = "demo"
    for name in settings.keys() - cfg.given:
        setattr(cfg, name, settings[name])
    if cfg.lr_steps == (0.0,):
        cfg.lr_steps = ()  # half a cosine
    if max(cfg.lr_steps, default=0) >= 1:
        common.fail(f"--lr-steps {cfg.lr_steps}: shares of the run, below 1")
    if weights.get("script") == "moco" and cfg.sync_bn:
        words = "--no-sync-bn (ucf101: and --weight-decay 1e-4 --dropout 0.5)"
        common.print_main(f"after MoCo the released configs have {words}")


# --- data sets


def segments(cfg, duration, clip_seconds=0, rho=1, timespan=None, rng=None):
    """Times (seconds) of a clip's frames, one in each of T equal parts of the video, (1, T): random
    ones, or for testing, without rng, 1/2n, 3/2n, ... into each part, of n test clips, (n, T)
    (released ssv2.py, line 159)."""
    shares = (np.arange(cfg.test_clips)[:, None] + 0.5) / cfg.test_clips
    if rng is not None:
        shares = rng.random((rho, cfg.frames))
    return (np.arange(cfg.frames) + shares) * duration / cfg.frames


def official(cfg, *names):
    """The text of the first file of one of these names in --data; ends the process without one."""
    for name in names:
        for path in sorted(glob.glob(f"**/{name}", root_dir=cfg.data, recursive=True)):
            return Path(cfg.data, path).read_text(encoding="utf-8-sig")
    common.fail(f"--data {cfg.data} has no {' or '.join(names)} ({cfg.dataset})")


def int_in_range(text, least, most):
    """An integer from least to most, or ValueError."""
    if int(text) not in range(least, most + 1):
        raise ValueError(f"{text} is not one of {least} to {most}")
    return int(text)


def ucf101(cfg, part):
    """trainlist01.txt: lines `Class/name.avi 1`; testlist01.txt: lines `Class/name.avi`."""
    lines = official(cfg, f"{part}list{cfg.split:02d}.txt").splitlines()
    names = [line.split()[0] for line in lines if line.strip()]
    return [(name, name.split("/")[0]) for name in names]


def hmdb51(cfg, part):
    """class_test_split1.txt for each class: lines `name.avi 1`, 1 in training, 2 in testing."""
    ending = f"_test_split{cfg.split}.txt"
    official(cfg, f"*{ending}")
    found = {}  # a list may lie there twice
    for path in sorted(glob.glob(f"**/*{ending}", root_dir=cfg.data, recursive=True)):
        label = os.path.basename(path).removesuffix(ending)
        lines = Path(cfg.data, path).read_text().splitlines()
        for name, use in [line.rsplit(maxsplit=1) for line in lines if line.strip()]:
            if use == {"train": "1", "test": "2"}[part]:
                found[f"{label}/{name}"] = label
    return list(found.items())


def ssv2(cfg, part):
    """train.json and validation.json: [{"id", "template"}], a template with [brackets]; labels.json
    has it without, numbered from "0". Older releases: something-something-v2-train.json and so on.
    """
    entries, labels = (
        json.loads(official(cfg, f"something-something-v2-{name}.json", f"{name}.json"))
        for name in ("train" if part == "train" else "validation", "labels")
    )
    templates = [entry["template"].replace("[", "").replace("]", "") for entry in entries]
    if unknown := set(templates) - set(labels):
        raise ValueError(f"no label {min(unknown)}")
    return [(f"{e['id']}.webm", label) for e, label in zip(entries, templates, strict=True)]


def charades(cfg, part):
    """Charades_v1_train.csv, Charades_v1_test.csv: a video's id and its actions, such as
    "c092 11.90 21.20;c147 0.00 12.60" -> [(92, 11.9, 21.2), (147, 0.0, 12.6)]."""
    found = []
    for line in csv.DictReader(official(cfg, f"Charades_v1_{part}.csv").splitlines(True)):
        actions = [action.split() for action in line["actions"].split(";") if action.strip()]
        actions = [(int_in_range(name[1:], 0, 156), float(a), float(b)) for name, a, b in actions]
        found.append((f"{line['id']}.mp4", actions))
    return found


def ava(cfg, part):
    """ava_train_v2.2.csv, ava_val_v2.2.csv, in testing --boxes if given: see read_people. -> (name,
    ((film, second), boxes, labels)) of each key frame, see person_labels."""
    text = official(cfg, f"ava_{'train' if part == 'train' else 'val'}_v2.2.csv")
    if part == "test" and cfg.boxes:
        frames = read_people(Path(cfg.boxes).read_text(), cfg.box_score)
    else:
        frames = read_people(text)
    if part == "test":  # lines `film,second`
        text = official(cfg, "ava_val_excluded_timestamps_v2.2.csv")
        for film, second in filter(None, csv.reader(text.splitlines())):
            frames.pop((film, int(second)), None)
    return [(f"{key[0]}.mp4", (key, *person_labels(people))) for key, people in frames.items()]


def read_people(text, least=0.0):
    """Lines `film,second,x1,y1,x2,y2,action,person`; a box of several actions has a line for each.

    {(film, second): {(x1, y1, x2, y2, person): [actions, from 0]}}. Of a detector the last column
    is the score, at least so much (released ava_helper.py, line 63), the action empty or -1."""
    frames = {}
    for film, second, *rest in csv.reader(text.splitlines()):
        if not rest:  # nobody is there
            continue
        *box, action, person = rest
        x1, y1, x2, y2 = map(float, box)
        if least and float(person) < least:
            continue
        if not (-0.1 < x1 < x2 < 1.1 and -0.1 < y1 < y2 < 1.1):
            raise ValueError(f"a box of {film} is none in shares of width and height: {box}")
        people = frames.setdefault((film, int(float(second))), {})
        actions = people.setdefault((x1, y1, x2, y2, "" if least else person), [])
        if action not in ("", "-1"):
            actions.append(int_in_range(action, 1, 80) - 1)
    return frames


def person_labels(people):
    """Boxes (m, 4) of the people of a key frame, in shares of its sides, and which of the actions
    are theirs, (m, 80) bool."""
    boxes = np.array([box[:4] for box in people]).reshape(-1, 4)
    labels = [np.isin(range(80), actions) for actions in people.values()]
    return boxes, np.array(labels)


def ava_classes(cfg):
    """{action, from 0: name} of the 60 that count: `label { name: "stand" label_id: 12 ... }`."""
    text = official(cfg, "ava_action_list_v2.2_for_activitynet_2019.pbtxt")
    found = re.findall(r'name: "(.*)"\s+(?:label_)?id: (\d+)', text)
    return {int(number) - 1: name for name, number in found}


PARSERS = {"ucf101": ucf101, "hmdb51": hmdb51, "ssv2": ssv2, "charades": charades, "ava": ava}


def listed(cfg, part):
    """What the official files say of a part, "train" or "test": [(name, class or note)]."""
    try:
        found = PARSERS[cfg.dataset](cfg, part)
    except (OSError, LookupError, AttributeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        common.fail(f"--data {cfg.data}: cannot read a list of {cfg.dataset}: {reason}")
    if not found:
        common.fail(f"--data {cfg.data}: a list of {cfg.dataset} is empty")
    return found


def listed_videos(cfg, part):
    """Paths of the videos of a part, and their classes or notes. Ends the process if a test video
    is not there, but for --allow-missing."""
    names, notes = zip(*listed(cfg, part), strict=True)
    keys = [Path(name).with_suffix("").parts for name in names]
    paths = common.list_videos(cfg.data)[0]
    there = {Path(path).with_suffix("").parts[-len(keys[0]) :]: path for path in paths}
    if lost := [name for name, key in zip(names, keys, strict=True) if key not in there]:
        words = f"{len(lost)} of {len(names)} {part} videos are not in {cfg.data}: {lost[0]} ..."
        if part == "test" and not cfg.allow_missing:
            common.fail(f"{words}; --allow-missing leaves such videos out")
        common.print_main(f"WARN {words}")
    return [there.get(key, f"{cfg.data}/{'/'.join(key)}") for key in keys], notes


class Annotated(common.VideoClips):
    """Videos, or key frames of videos, with a note of several actions each."""

    def __init__(self, cfg, paths, notes):
        super().__init__(cfg, eval_linear.sample_clips, videos=(paths, [""] * len(paths)))
        self.notes = notes


class Charades(Annotated):
    """A clip's target (157,) is 1 for the actions that overlap with it."""

    def target(self, index, start=0.0, end=math.inf):
        """(157,): the actions between two moments of a video (released charades.py, line 209)."""
        target = torch.zeros(157)
        for action, first, last in self.notes[index]:
            if first <= end and last >= start:
                target[action] = 1.0
        return target

    def item(self, index, rng):
        item = super().item(index, rng)
        start = item["starts"][0].item()
        end = start + (self.cfg.frames - 1) * self.cfg.stride / 30
        return {**item, "target": self.target(index, start, end)}


class AVA(Annotated):
    """Clips with a key frame in the middle, boxes of the M people in it, (M, 4) in pixels, which
    follow crop and flip, and their targets (M, 80)."""

    def target(self, index):
        return torch.from_numpy(self.notes[index][2]).float()

    def whole(self, index, short_side):
        """Whole pictures (T, 3, H, W) uint8 and boxes (M, 4) in pixels. A video of less than 20
        minutes is a cut of the film, from 900 s on (released ava_helper.py, line 121)."""
        (_, second), boxes, _ = self.notes[index]
        with contextlib.closing(self.open(index, short_side)) as reader:
            middle = second - 900 if reader.duration < 1200 else second
            start = np.array([middle - self.cfg.clip_seconds / 2])
            times = common.frame_times(start, self.cfg.frames, self.cfg.stride)  # (1, T)
            clip = torch.from_numpy(reader.read(times)[0]).permute(0, 3, 1, 2)
        height, width = clip.shape[2:]
        boxes = torch.from_numpy(boxes * (width, height, width, height)).float()
        return clip, BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width))

    def item(self, index, rng):
        clip, boxes = self.whole(index, int(rng.integers(*self.cfg.short_side, endpoint=True)))
        torch.default_generator.manual_seed(int(rng.integers(2**62)))  # the transforms draw from it
        clip, boxes = self.crop(clip, boxes)
        clip, boxes = self.color(v2.functional.to_dtype(clip, scale=True), boxes)
        return {
            "clips": common.normalize(clip).transpose(0, 1)[None],  # (1, 3, T, S, S)
            "boxes": boxes,
            "target": self.target(index),
            "index": index,
            "starts": torch.zeros(1),
        }

    @staticmethod
    def collate(items):
        """The people of all clips in a row: boxes (K, 5), of which the first number is the clip's
        row in the batch, and target (K, 80)."""
        boxes = [F.pad(item.pop("boxes"), (1, 0), value=i) for i, item in enumerate(items)]
        target = [item.pop("target") for item in items]
        return {**default_collate(items), "boxes": torch.cat(boxes), "target": torch.cat(target)}


class WholeClips(common.TestClips):
    """Of AVA: whole pictures (1, 3, T, H, W) uint8 and "more", [boxes (M, 5) in pixels]."""

    def __getitem__(self, index):
        try:
            clip, boxes = self.dataset.whole(index, self.size)
        except common.BadVideo as error:
            return {"index": index, "bad": str(error)}
        clips, boxes = clip.transpose(0, 1)[None], F.pad(boxes, (1, 0))
        return {"clips": clips, "more": [boxes], "index": index, "bad": ""}


def make_datasets(cfg):
    """The training videos and the test videos of --dataset."""
    if cfg.dataset not in PARSERS:
        dataset = common.VideoClips(cfg, eval_linear.sample_clips)
        return dataset, eval_linear.test_set(cfg, dataset)
    train, test = (listed_videos(cfg, part) for part in ("train", "test"))
    if kind := {"charades": Charades, "ava": AVA}.get(cfg.dataset):
        return kind(cfg, *train), kind(cfg, *test)
    sample = partial(segments, cfg) if cfg.dataset == "ssv2" else eval_linear.sample_clips
    dataset = common.VideoClips(cfg, sample, videos=train)
    if unknown := set(test[1]) - set(dataset.classes):
        common.fail(f"--data {cfg.data}: no training video of class {min(unknown)}")
    return dataset, dataset.subset(*test)


# --- method


class Classifier(eval_linear.Probe):
    """A linear probe with dropout whose backbone is trained too."""

    def __init__(self, cfg, classes):
        super().__init__(cfg, classes)
        self.requires_grad_(True)
        self.dropout = nn.Dropout(cfg.dropout)
        self.low_memory = cfg.low_memory

    def forward(self, clips, boxes=None):
        """(B, 1, 3, T, H, W) -> features (B, 1, D), scores of the classes (B, classes), float32."""
        features = common.encode_views(self.encoder.backbone, clips, self.low_memory)
        return features, self.classify(features[:, 0])

    def classify(self, features):
        with torch.autocast(features.device.type, enabled=False):  # rounded scores would tie
            return self.encoder.linear(self.dropout(features))


class Detector(Classifier):
    """A classifier of boxes (released head_helper.py, line 20)."""

    def __init__(self, cfg, classes):
        super().__init__(cfg, classes)
        dilate(self.encoder.backbone)

    def forward(self, clips, boxes):
        """(B, 1, 3, T, H, W), boxes (K, 5), row of the clip and corners in pixels -> features
        (B, 1, D), scores of the classes for each box (K, classes), float32."""
        stages = nn.Sequential(*self.encoder.backbone)  # without the average at the end
        maps = common.encode_views(stages, clips, self.low_memory)  # (B, 1, D, T, H, W)
        maps = maps[:, 0].mean(2)  # (B, D, H, W)
        scale = 2.0 ** round(math.log2(maps.shape[-1] / clips.shape[-1]))  # 1/16 in slow_r50
        parts = roi_align(maps, boxes, 7, scale, sampling_ratio=0, aligned=True)  # (K, D, 7, 7)
        return maps.mean((2, 3))[:, None], self.classify(parts.amax((2, 3)))


def dilate(backbone):
    """Keep the last stage's map as fine as its input: no stride, 3x3 convolutions dilated by 2."""
    convolutions = [m for m in list(backbone)[-1].modules() if isinstance(m, nn.Conv3d)]
    if all(conv.stride[2] == 1 for conv in convolutions):
        return
    for conv in convolutions:
        conv.stride = (conv.stride[0], 1, 1)
        if conv.kernel_size[2] == 3:
            conv.dilation = (1, 2, 2)
            conv.padding = (conv.padding[0], 2, 2)


def chance_level(dataset):
    """The loss of a model that knows how frequent each class is, or how many there are."""
    if dataset.classes:
        return math.log(len(dataset.classes))
    targets = [torch.atleast_2d(dataset.target(index)) for index in range(len(dataset))]
    shares = torch.cat(targets).mean(0)  # (classes,)
    return F.binary_cross_entropy(shares, shares).item()


# --- testing


def average_precision(scores, positive, total=None, best=False):
    """Average precision of scores (n,), of which some are positive (n,); tied scores share one
    threshold. total: positives to be found, by default those here; best: precision is the best at
    this recall or more. NaN if there are no positives."""
    total = positive.sum() if total is None else total
    order = np.argsort(-scores, kind="stable")
    last_of_tie = np.append(np.diff(scores[order]) != 0, True)[: len(scores)]
    hits = np.cumsum(positive[order])[last_of_tie]
    precision = hits / (np.flatnonzero(last_of_tie) + 1)
    if best:
        precision = np.maximum.accumulate(precision[::-1])[::-1]
    area = np.sum(np.diff(hits, prepend=0) * precision)
    return float(area / total) if total else math.nan


def match_detections(boxes, scores, people, labels):
    """Which scores (k, classes) of boxes (k, 4) are right, (k, classes) bool, given people (m, 4)
    and their labels (m, classes) bool: by falling score, a box is right about a class if, of the
    people with the class, the one that it overlaps most, at IoU 0.5 or more, is free."""
    right = np.zeros(scores.shape, bool)
    overlap = box_iou(torch.as_tensor(boxes), torch.as_tensor(people)).numpy()  # (k, m)
    for c in np.flatnonzero(labels.any(0)):
        candidates = np.flatnonzero(labels[:, c])
        taken = set()
        for box in np.argsort(-scores[:, c], kind="stable"):
            person = candidates[overlap[box, candidates].argmax()]
            if overlap[box, person] >= 0.5 and person not in taken:
                taken.add(person)
                right[box, c] = True
    return right


def frame_precisions(frames):
    """Average precision at IoU 0.5 of each class, NaN where nobody has it; of frames (boxes,
    scores, people, labels), see match_detections."""
    scores = np.concatenate([frame[1] for frame in frames])
    right = np.concatenate([match_detections(*frame) for frame in frames])
    totals = sum(frame[3].sum(0) for frame in frames)
    columns = zip(scores.T, right.T, totals, strict=True)
    return [average_precision(*column, best=True) for column in columns]


def mean_precision(classes, values):
    """In percent, over the classes that occur; the value of another is NaN."""
    found = {name: 100 * v for name, v in zip(classes, values, strict=True) if not math.isnan(v)}
    mean = round(sum(found.values()) / len(found), 2) if found else None
    return {"map": mean, "per_class": {name: round(value, 2) for name, value in found.items()}}


def score_views(cfg, model, dataset, join):
    """Scores (n, classes) of the n videos that can be read, and their indices (n,). join(scores of
    the test views (views, classes)) -> (classes,)."""
    clips = partial(segments, cfg) if cfg.dataset == "ssv2" else cfg.test_clips
    test_clips = common.TestClips(dataset, clips, cfg.test_crops, cfg.test_size)

    def score(views):  # (views, 3, T, S, S)
        return join(model(views[:, None])[1])

    return common.extract_features(score, test_clips, cfg.allow_missing)


def test_classes(cfg, model, dataset):
    """Top 1 and top 5, of the mean softmax over views."""
    scores, indices = score_views(cfg, model, dataset, lambda views: views.softmax(-1).mean(0))
    labels = torch.from_numpy(dataset.labels)[indices]
    result = eval_linear.accuracies(scores, labels, dataset.classes)
    return {**result, "n": len(scores), "classes": len(dataset.classes)}


def test_charades(cfg, model, dataset):
    """Mean average precision, of the largest sigmoid over views."""
    scores, indices = score_views(cfg, model, dataset, lambda views: views.sigmoid().amax(0))
    labels = torch.stack([dataset.target(index) for index in indices])
    columns = zip(scores.numpy().T, labels.numpy().T > 0, strict=True)
    values = [average_precision(*column) for column in columns]
    result = mean_precision([f"c{i:03d}" for i in range(157)], values)
    return {**result, "n": len(scores), "classes": 157}


def test_ava(cfg, model, dataset):
    """Mean frame precision. A key frame without boxes counts as missed, one that cannot be read
    does not count."""
    most = max(len(boxes) for _, boxes, _ in dataset.notes)

    def sigmoid(clips, boxes):  # (1, 3, T, H, W), (M, 5)
        scores = model(clips[None], boxes)[1].sigmoid()
        return F.pad(scores, (0, 0, 0, most - len(scores)))  # as many rows for all

    views = WholeClips(dataset, clips=1, size=cfg.test_size)
    scores, indices = common.extract_features(sigmoid, views, cfg.allow_missing)
    classes = ava_classes(cfg)
    numbers = list(classes)
    scores = dict(zip(indices.tolist(), scores[:, :, numbers].numpy(), strict=True))
    truth = {}
    for _, (key, people, labels) in ava(dataclasses.replace(cfg, boxes=""), "test"):
        truth[key] = people, labels[:, numbers]
    nobody = np.zeros((0, 4)), np.zeros((0, len(classes)))
    frames = []
    for index, (key, boxes, _) in enumerate(dataset.notes):
        there = truth.pop(key, nobody)
        if index in scores:
            frames.append((boxes, scores[index][: len(boxes)], *there))
    frames += [(*nobody, *there) for there in truth.values()]
    result = mean_precision(classes.values(), frame_precisions(frames))
    return {**result, "n": len(scores), "classes": len(classes)}


def report(cfg, dataset, result):
    """Print the result, and write it, with what it takes to repeat it, to result.json."""
    test = f"{cfg.test_clips} clips x {cfg.test_crops} crops at {cfg.test_size}"
    if cfg.dataset == "ava":
        test = f"whole pictures at {cfg.test_size}, boxes: {cfg.boxes or 'annotated'}"
    result |= {
        "missing": len(dataset) - result["n"],
        "protocol": f"{cfg.dataset}, {cfg.epochs} epochs of random clips, last epoch; {test}",
        "views": 1 if cfg.dataset == "ava" else cfg.test_clips * cfg.test_crops,
        "recipe": cfg.recipe,
        "split": cfg.split,
    }
    name, value = next(iter(result.items()))  # top1 or map
    size = f"({result['n']} videos, {result['classes']} classes, recipe: {cfg.recipe})"
    eval_linear.write_result(cfg, result, f"{name} {value} %  {size}")


# --- training


def main(argv=None):
    cfg = common.parse_args(Config, DEMO, argv)
    use_settings(cfg, weights=eval_linear.fill_settings(cfg))
    common.init_distributed(cfg)
    dataset, test_data = make_datasets(cfg)
    common.fit_to_videos(cfg, len(dataset))
    if cfg.dataset == "ava":
        model, test = Detector(cfg, 80), test_ava
    elif cfg.dataset == "charades":
        model, test = Classifier(cfg, 157), test_charades
    else:
        model, test = Classifier(cfg, len(dataset.classes)), test_classes
    eval_linear.load(model.encoder.backbone, cfg)
    model.to(common.device())
    network = common.wrap_ddp(model, cfg)
    optimizer = common.make_optimizer(model, cfg)
    run = common.Run(cfg, dataset, model, optimizer, chance_level(dataset))
    for batch in run.batches():
        with common.autocast():
            features, scores = network(batch["clips"], batch.get("boxes"))  # (B, 1, D), (B, C)
        if "target" in batch:
            loss = F.binary_cross_entropy_with_logits(scores, batch["target"])
        else:
            loss = F.cross_entropy(scores, batch["label"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.record(loss, features=features)
    if run.finished:
        report(cfg, test_data, test(cfg, model.eval(), test_data))


if __name__ == "__main__":
    main()
