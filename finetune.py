"""Fine-tuning: all layers are trained on labelled videos, from pre-trained weights or from scratch.

Measures Top-1 and top-5 accuracy, or mean average precision where a video has several actions.
Protocol Feichtenhofer et al., 2021 (arXiv 2104.14558), sections 4 and B: train on one random clip
         per video and epoch, then test on 10 clips x 3 crops. --recipe released: the settings of
         the released code (SlowFast at commit 287ec00).
Data     folder, kinetics: class folders in train/ and val/, or lists with labels, --data and --val.
         The others: the official files, and the videos anywhere in --data, whatever their endings.
Differs  From the released code: BN statistics are of all ranks; frames are 8/30 s apart, not 9/30
         (ucf101) or 8 frames whatever the rate (charades); short sides are uniform. ssv2: RGB and
         the centre crop, not BGR and the left one. ava: trained on annotated boxes alone.
Recipe   python finetune.py --weights backbone.pth --dataset ucf101 --data UCF101
"""

import contextlib
import csv
import glob
import json
import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import default_collate
from torchvision.ops import box_iou, roi_align
from torchvision.tv_tensors import BoundingBoxes

import common
import eval_linear
from common import arg

# --- config


# The paper's numbers unless a comment says otherwise; lr is per 64 videos. A flag wins.
SETTINGS = {
    "folder": {},  # as in Config
    "ucf101": {},
    "hmdb51": {},
    "kinetics": dict(epochs=196, lr=0.1, lr_steps=(), warmup=34 / 196, recipe="released")
    | dict(weight_decay=1e-4, dropout=0.5, sync_bn=False),  # released Kinetics/SLOW_8x8_R50
    "ssv2": dict(epochs=22, lr=0.12, lr_steps=(14 / 22, 18 / 22), test_clips=1, test_crops=1)
    | dict(augment="crop", warmup=0.19 / 22, weight_decay=1e-6, dropout=0.5),  # released (not crop)
    "charades": dict(epochs=60, lr=0.2, lr_steps=(40 / 60, 50 / 60), warmup=5 / 60)
    | dict(frames=16, stride=8, weight_decay=1e-4, dropout=0.5),  # the last two: released
    "ava": dict(epochs=32, lr=0.3, lr_steps=(0.5, 0.75, 0.875))
    | dict(warmup=5.3 / 32, weight_decay=1e-7, dropout=0.5),  # released
}
TINTED = dict(lr=0.01, lr_steps=(), augment="crop,flip,tint")
RELEASED = {  # charades: SLOWFAST_16x8_R50, lr 0.0375 per 16 videos
    "folder": TINTED,  # here: no config was released for a folder and hmdb51
    "ucf101": TINTED,
    "hmdb51": TINTED,
    "charades": dict(epochs=57, lr=0.15, lr_steps=(41 / 57, 49 / 57), warmup=4 / 57),
    "ava": dict(box_score=0.9),
}


@dataclass
class Config(eval_linear.Evaluation):  # the paper's numbers for UCF101 and HMDB51
    dataset: str = arg("folder", "the data set", choices=SETTINGS)
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
DEMO = dict(backbone="tiny", stride=4, size=32, test_clips=4, test_crops=1, dropout=0, warmup=0.075)
DEMO |= dict(epochs=40, batch_size=40, optimizer="adamw", lr=4.8e-3, lr_steps=(), weight_decay=1e-4)


def use_settings(cfg, weights):
    """Set what no flag sets, by data set and recipe; weights: settings of their training."""
    if cfg.dataset in PARSERS and (cfg.val or not cfg.data):
        common.fail(f"--dataset {cfg.dataset} needs --data, has no demo and takes no --val")
    settings = dict(SETTINGS[cfg.dataset])
    if cfg.recipe == "released":
        settings |= RELEASED.get(cfg.dataset, {})
    if cfg.dataset == "ava" and weights.get("script") == "finetune":
        settings["lr"] = 0.05  # paper: from supervised weights
    if cfg.small or not cfg.data:
        settings = {"augment": "crop"} if cfg.dataset == "ssv2" else {}
        cfg.recipe = "demo"
    for name in settings.keys() - cfg.given:
        setattr(cfg, name, settings[name])
    if cfg.lr_steps == (0.0,):
        cfg.lr_steps = ()  # half a cosine
    if max(cfg.lr_steps, default=0) >= 1:
        common.fail(f"--lr-steps {cfg.lr_steps}: shares of the run, below 1")
    if weights.get("script") == "moco" and cfg.sync_bn:
        common.print_main(
            "after MoCo the released configs have --no-sync-bn "
            "(ucf101: and --weight-decay 1e-4 --dropout 0.5)"
        )


# --- data sets


def segments(cfg, duration, clip_seconds=0, rho=1, timespan=None, rng=None):
    """Seconds of frames, one in each of T equal parts of the video: random ones (rho, T), or of n
    test clips, without rng, 1/2n, 3/2n, ... into each part, (n, T) (released ssv2.py, line 159)."""
    shares = (np.arange(cfg.test_clips)[:, None] + 0.5) / cfg.test_clips
    if rng is not None:
        shares = rng.random((rho, cfg.frames))
    return (np.arange(cfg.frames) + shares) * duration / cfg.frames


def official_files(cfg, pattern):
    """Files in --data, at any depth, whose name fits a pattern; ends the process without one."""
    paths = glob.glob(f"**/{pattern}", root_dir=cfg.data, recursive=True)
    if not paths:
        common.fail(f"--data {cfg.data} has no {pattern} ({cfg.dataset})")
    return [Path(cfg.data, path) for path in sorted(paths)]


def official(cfg, pattern):
    return official_files(cfg, pattern)[0].read_text(encoding="utf-8-sig")


def ucf101(cfg, part):
    """trainlist01.txt: lines `Class/name.avi 1`; testlist01.txt: lines `Class/name.avi`."""
    lines = official(cfg, f"{part}list{cfg.split:02d}.txt").splitlines()
    names = [line.split()[0] for line in lines if line.strip()]
    return [(name, name.split("/")[0]) for name in names]


def hmdb51(cfg, part):
    """class_test_split1.txt for each class: lines `name.avi 1`, 1 in training, 2 in testing."""
    ending = f"_test_split{cfg.split}.txt"
    wanted = {"train": "1", "test": "2"}[part]
    found = {}  # a list may lie there twice
    for path in official_files(cfg, f"*{ending}"):
        label = path.name.removesuffix(ending)
        for line in path.read_text().splitlines():
            name, _, use = line.strip().rpartition(" ")
            if use == wanted:
                found[f"{label}/{name}"] = label
    return found.items()


def ssv2(cfg, part):
    """train.json, validation.json: [{"id", "template"}]; a class is a template without brackets."""
    name = "train" if part == "train" else "validation"
    found = []
    for entry in json.loads(official(cfg, f"*{name}.json")):
        label = entry["template"].replace("[", "").replace("]", "")
        found.append((f"{entry['id']}.webm", label))
    return found


def charades(cfg, part):
    """Charades_v1_train.csv, Charades_v1_test.csv: a video's id and its actions, such as
    "c092 11.90 21.20;c147 0.00 12.60" -> [(92, 11.9, 21.2), (147, 0.0, 12.6)]."""
    found = []
    for line in csv.DictReader(official(cfg, f"Charades_v1_{part}.csv").splitlines(True)):
        actions = []
        for action in filter(None, line["actions"].split(";")):
            name, start, end = action.split()
            number = range(157).index(int(name[1:]))  # ValueError if out of range
            actions.append((number, float(start), float(end)))
        found.append((f"{line['id']}.mp4", actions))
    return found


def ava(cfg, part):
    """Notes of key frames: the second, boxes (k, 4) that are scored, people (m, 4) who are there,
    their labels (m, 80). The boxes are people, or in testing those of --boxes if given."""
    name = "train" if part == "train" else "val"
    people = read_people(official(cfg, f"ava_{name}_v2.2.csv"))
    found = people
    excluded = []
    if part == "test":
        excluded = official(cfg, "ava_val_excluded_timestamps_v2.2.csv").split()
        if cfg.boxes:
            found = read_people(Path(cfg.boxes).read_text(), cfg.box_score)
    keys = found | people
    for line in excluded:  # `film,second`
        film, second = line.split(",")
        keys.pop((film, int(second)), None)
    nobody = np.zeros((0, 4)), np.zeros((0, 80), bool)
    notes = []
    for key in keys:
        film, second = key
        boxes, _ = found.get(key, nobody)
        notes.append((f"{film}.mp4", (second, boxes, *people.get(key, nobody))))
    return notes


def read_people(text, least=0.0):
    """`film,second,x1,y1,x2,y2,action,person (or score)`, a line an action, as {(film, second):
    (boxes (m, 4) in shares of width, height, labels (m, 80))} (released ava_helper.py, line 63)."""
    frames = {}
    for film, second, *rest in csv.reader(text.splitlines()):
        if not rest:  # nobody is there
            continue
        *box, action, score = rest
        x1, y1, x2, y2 = map(float, box)
        if least and float(score) < least:
            continue
        if not (-0.1 < x1 < x2 < 1.1 and -0.1 < y1 < y2 < 1.1):
            raise ValueError(f"a box of {film} is none in shares of width and height: {box}")
        people = frames.setdefault((film, int(float(second))), {})
        labels = people.setdefault((x1, y1, x2, y2), np.zeros(80, bool))
        if action not in ("", "-1"):
            labels[range(1, 81).index(int(action))] = True  # ValueError if out of range
    if not frames:
        raise ValueError("a list of people is empty")
    for key, people in frames.items():
        frames[key] = np.array(list(people)), np.array(list(people.values()))
    return frames


def ava_classes(cfg):
    """{action, from 0: name} of the 60 that count: `label { name: "stand" label_id: 12 ... }`."""
    text = official(cfg, "ava_action_list_v2.2_for_activitynet_2019.pbtxt")
    found = re.findall(r'name: "(.*)"\s+(?:label_)?id: (\d+)', text)
    return {int(number) - 1: name for name, number in found}


PARSERS = {"ucf101": ucf101, "hmdb51": hmdb51, "ssv2": ssv2, "charades": charades, "ava": ava}


def listed_videos(cfg, part):
    """Paths of the videos of a part, "train" or "test", and their classes or notes. A test video
    that is not there ends the process, unless --allow-missing leaves it out."""
    try:
        names, notes = zip(*PARSERS[cfg.dataset](cfg, part), strict=True)
    except (OSError, LookupError, ValueError) as error:
        common.fail(f"--data {cfg.data}: cannot read a list of {cfg.dataset}: {error}")
    keys = [Path(name).with_suffix("").parts for name in names]  # ("class", "name") or ("name",)
    paths = common.list_videos(cfg.data)[0]
    there = {Path(path).with_suffix("").parts[-len(keys[0]) :]: path for path in paths}
    lost = [key for key in keys if key not in there]
    if lost and part == "test" and not cfg.allow_missing:
        common.fail(
            f"{len(lost)} of {len(keys)} test videos are not in {cfg.data}: {lost[0][-1]} ...; "
            "--allow-missing leaves such videos out"
        )
    return [there.get(key, "/".join((cfg.data, *key))) for key in keys], notes


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
        item["target"] = self.target(index, start, end)
        return item


class AVA(Annotated):
    """Clips around key frames, boxes (M, 4) in pixels of the M people, and targets (M, 80)."""

    def target(self, index):
        return torch.from_numpy(self.notes[index][3]).float()

    def whole(self, index, short_side):
        """Whole pictures (T, 3, H, W) uint8 and boxes (M, 4) in pixels. A video of less than 20
        minutes is a cut of the film, from 900 s on (released ava_helper.py, line 121)."""
        second, boxes, *_ = self.notes[index]
        frames = np.arange(self.cfg.frames) - self.cfg.frames / 2
        with contextlib.closing(self.open(index, short_side)) as reader:
            if reader.duration < 1200:
                second -= 900
            pictures = reader.read(second + frames * self.cfg.stride / 30)
        clip = torch.from_numpy(pictures).permute(0, 3, 1, 2)
        height, width = clip.shape[2:]
        boxes = torch.from_numpy(boxes * (width, height, width, height)).float()
        return clip, BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width))

    def item(self, index, rng):
        short_side = int(rng.integers(*self.cfg.short_side, endpoint=True))
        torch.default_generator.manual_seed(int(rng.integers(2**62)))  # the transforms draw from it
        clip, boxes = self.crop(*self.whole(index, short_side))
        clip, boxes = self.color(clip * (1 / 255), boxes)
        clip = (clip - common.MEAN) / common.STD  # (T, 3, S, S)
        return {
            "clips": clip.transpose(0, 1)[None],  # (1, 3, T, S, S)
            "boxes": boxes,
            "target": self.target(index),
            "index": index,
            "starts": torch.zeros(1),
        }

    @staticmethod
    def collate(items):
        """People of all clips: boxes (K, 5), each with its clip's row, and their target (K, 80)."""
        boxes = [F.pad(item.pop("boxes"), (1, 0), value=i) for i, item in enumerate(items)]
        target = [item.pop("target") for item in items]
        return default_collate(items) | {"boxes": torch.cat(boxes), "target": torch.cat(target)}


class WholeClips(common.TestClips):
    """Of AVA: whole pictures (1, 3, T, H, W) uint8 and "more", [boxes (M, 5) in pixels]."""

    def __getitem__(self, index):
        try:
            clip, boxes = self.dataset.whole(index, self.size)
        except common.BadVideo as error:
            return {"index": index, "bad": str(error)}
        return {
            "clips": clip.transpose(0, 1)[None],
            "more": [F.pad(boxes, (1, 0))],  # column 0: the clip's row, 0
            "index": index,
            "bad": "",
        }


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
        last = self.encoder.backbone[-1].modules()
        convolutions = [module for module in last if isinstance(module, nn.Conv3d)]
        if all(conv.stride[2] == 1 for conv in convolutions):
            return
        for conv in convolutions:  # finer maps: 3x3 convolutions dilated by 2, without stride
            conv.stride = (conv.stride[0], 1, 1)
            if conv.kernel_size[2] == 3:
                conv.dilation = (1, 2, 2)
                conv.padding = (conv.padding[0], 2, 2)

    def forward(self, clips, boxes):
        """Clips (B, 1, 3, T, H, W), boxes (K, 5): row of the clip, corners in pixels -> features
        (B, 1, D), scores of the classes for each box (K, classes), float32."""
        stages = nn.Sequential(*self.encoder.backbone)  # without the average at the end
        maps = common.encode_views(stages, clips, self.low_memory)  # (B, 1, D, T, H, W)
        maps = maps[:, 0].mean(2)  # (B, D, H, W)
        scale = 2.0 ** round(math.log2(maps.shape[-1] / clips.shape[-1]))  # 1/16 in slow_r50
        parts = roi_align(maps, boxes, 7, scale, sampling_ratio=0, aligned=True)  # (K, D, 7, 7)
        return maps.mean((2, 3))[:, None], self.classify(parts.amax((2, 3)))


def chance_level(dataset):
    """The loss of a model that knows how frequent each class is, or how many there are."""
    if dataset.classes:
        return math.log(len(dataset.classes))
    targets = [torch.atleast_2d(dataset.target(index)) for index in range(len(dataset))]
    shares = torch.cat(targets).mean(0)  # (classes,)
    return F.binary_cross_entropy(shares, shares).item()


# --- testing


def average_precision(scores, positive, total, best=False):
    """Average precision of scores (n,), of which some are positive (n,), of a total to be found;
    tied scores share one threshold. best: precision is the best at this recall or more."""
    _, rank = np.unique(-scores, return_inverse=True)  # (n,), equal where scores are
    hits = np.bincount(rank, positive)
    precision = hits.cumsum() / np.bincount(rank).cumsum()
    if best:
        precision = np.maximum.accumulate(precision[::-1])[::-1]
    return hits @ precision / total


def mean_precision(classes, scores, positive, totals, best=False):
    """Mean average precision, percent, of scores (n, C), over classes {column: name} that occur."""
    found = {}
    for c, name in classes.items():
        if totals[c] > 0:
            found[name] = 100 * average_precision(scores[:, c], positive[:, c], totals[c], best)
    mean = None
    if found:
        mean = round(sum(found.values()) / len(found), 2)
    return {"map": mean, "per_class": {name: round(value, 2) for name, value in found.items()}}


def match_detections(frames):
    """Of frames (boxes (k, 4), scores (k, C), people (m, 4), labels (m, C)): all scores (n, C),
    which are right (n, C), and how many people have a class (C,). By falling score, a box is right
    about a class if, of its people, the one it overlaps most, at IoU 0.5 or more, is free."""
    found = []
    for boxes, scores, people, labels in frames:
        right = np.zeros(scores.shape, bool)
        overlap = box_iou(torch.as_tensor(boxes), torch.as_tensor(people)).numpy()  # (k, m)
        for c in np.flatnonzero(labels.any(0)):
            iou = overlap[:, labels[:, c]]
            order = np.argsort(-scores[:, c], kind="stable")
            order = order[iou[order].max(1) >= 0.5]
            _, first = np.unique(iou[order].argmax(1), return_index=True)  # of each person's boxes
            right[order[first], c] = True
        found.append((scores, right, labels.sum(0)))
    scores, right, totals = zip(*found, strict=True)
    return np.concatenate(scores), np.concatenate(right), sum(totals)


def test_classes(cfg, model, views):
    """Top 1 and top 5, of the mean softmax over views."""
    scores, labels = eval_linear.labelled_outputs(model.softmax, views, cfg.allow_missing)
    result = eval_linear.accuracies(scores, labels, views.dataset.classes)
    return result, len(scores), len(views.dataset.classes)


def test_charades(cfg, model, views):
    """Mean average precision, of the largest sigmoid over views."""
    scores, indices = common.extract_features(
        lambda clips: model(clips[:, None])[1].sigmoid().amax(0), views, cfg.allow_missing
    )
    labels = torch.stack([views.dataset.target(index) for index in indices]).numpy()
    classes = {c: f"c{c:03d}" for c in range(157)}
    result = mean_precision(classes, scores.numpy(), labels, labels.sum(0))
    return result, len(scores), len(classes)


def test_ava(cfg, model, views):
    """Mean frame precision over the key frames that can be read."""
    notes = views.dataset.notes
    most = max(len(note[1]) for note in notes)

    def sigmoid(clips, boxes):  # (1, 3, T, H, W), (k, 5)
        _, scores = model(clips[None], boxes)
        return F.pad(scores.sigmoid(), (0, 0, 0, most - len(scores)))  # as many rows for all

    scores, indices = common.extract_features(sigmoid, views, cfg.allow_missing)
    frames = []
    for index, rows in zip(indices, scores.numpy(), strict=True):
        _, boxes, people, labels = notes[index]
        frames.append((boxes, rows[: len(boxes)], people, labels))
    classes = ava_classes(cfg)
    result = mean_precision(classes, *match_detections(frames), best=True)
    return result, len(scores), len(classes)


def report(cfg, dataset, result, n, classes):
    """Print the result, and write it, with what it takes to repeat it, to result.json."""
    name = "map" if "map" in result else "top1"
    summary = f"{name} {result[name]} %  ({n} videos, {classes} classes, recipe: {cfg.recipe})"
    views = cfg.test_clips * cfg.test_crops
    test = f"{cfg.test_clips} clips x {cfg.test_crops} crops at {cfg.test_size}"
    if cfg.dataset == "ava":
        views = 1
        test = f"whole pictures at {cfg.test_size}, boxes: {cfg.boxes or 'annotated'}"
    result |= {
        "n": n,
        "classes": classes,
        "missing": len(dataset) - n,
        "protocol": f"{cfg.dataset}, {cfg.epochs} epochs of random clips, last epoch; {test}",
        "views": views,
        "recipe": cfg.recipe,
        "split": cfg.split,
    }
    eval_linear.write_result(cfg, result, summary)


# --- training


def build(cfg):
    """The training videos of --dataset, the views of its test videos, the model and its test."""
    sample = eval_linear.sample_clips
    clips = cfg.test_clips
    if cfg.dataset == "ssv2":
        sample = clips = partial(segments, cfg)
    if cfg.dataset in PARSERS:
        train = listed_videos(cfg, "train")
        tested = listed_videos(cfg, "test")
    if cfg.dataset == "ava":
        views = WholeClips(AVA(cfg, *tested), 1, 1, cfg.test_size)
        return AVA(cfg, *train), views, Detector(cfg, 80), test_ava
    if cfg.dataset == "charades":
        views = common.TestClips(Charades(cfg, *tested), clips, cfg.test_crops, cfg.test_size)
        return Charades(cfg, *train), views, Classifier(cfg, 157), test_charades
    if cfg.dataset in PARSERS:
        dataset = common.VideoClips(cfg, sample, videos=train)
        test_data = common.VideoClips(cfg, sample, videos=tested, classes=dataset.classes)
        unknown = set(tested[1]) - set(dataset.classes)
        if unknown:
            common.fail(f"--data {cfg.data}: no training video of class {min(unknown)}")
    else:
        dataset = common.VideoClips(cfg, sample)
        test_data = eval_linear.test_set(cfg, dataset)
    views = common.TestClips(test_data, clips, cfg.test_crops, cfg.test_size)
    return dataset, views, Classifier(cfg, len(dataset.classes)), test_classes


def main(argv=None):
    cfg = common.parse_args(Config, DEMO, argv)
    use_settings(cfg, eval_linear.fill_settings(cfg))
    common.init_distributed(cfg)
    dataset, views, model, test = build(cfg)
    common.fit_to_videos(cfg, len(dataset))
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
        report(cfg, views.dataset, *test(cfg, model.eval(), views))


if __name__ == "__main__":
    main()
