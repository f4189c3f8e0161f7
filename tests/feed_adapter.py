"""What tests/test_feed.py and tests/test_witness.py ask of the code, in one place.

The tests go through script.main(argv) and the files that it writes. What neither shows, the
functions here record: another shape of common.py changes this file and no test.
"""

import contextlib
import importlib
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import common
import eval_linear
import finetune
from videos import make_video, read_counter

NO_WARMUP = ["--warmup", "0"]
STILL_TARGET = ["--target-momentum", "1"]  # BYOL's and MoCo's second network stays as it began
NETWORKS = {"online": "encoder.backbone.", "target": "target.backbone."}  # names in last.pth
MEAN, STD = 0.45, 0.225  # of a pixel, as a network sees it

Batch = namedtuple("Batch", "epoch indices labels clips starts")
Pass = namedtuple("Pass", "clips training weight")


@contextlib.contextmanager
def replaced(place, **values):
    """Attributes of a module or class, put back at the end."""
    before = {name: getattr(place, name) for name in values}
    for name, value in values.items():
        setattr(place, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(place, name, value)


def batches_of(method, argv):
    """Run a script; what it was fed, step by step: epoch from 0, numbers and labels of the videos
    (B,), clips (B, V, 3, T, H, W), starts in seconds, (B, V) or (B, V, T); numpy arrays."""
    found, batches = [], common.Run.batches

    def recorded(run):
        for batch in batches(run):
            arrays = [batch[name] for name in ("index", "label", "clips", "starts")]
            found.append(Batch(int(run.epoch), *(x.numpy().copy() for x in arrays)))
            yield batch

    with replaced(common.Run, batches=recorded):
        importlib.import_module(method).main(argv)
    return found


def passes_of(script, argv):
    """Run a script; what its backbones were called with, in order: clips (N, 3, T, H, W), whether
    in training mode, the weight of the first layer; numpy arrays."""
    found, make = [], common.backbone

    def note(stage, inputs):
        (clips,) = inputs
        weight = next(stage.parameters()).detach().numpy().copy()
        found.append(Pass(clips.detach().numpy().copy(), stage.training, weight))

    def spied(name):
        network = make(name)
        next(network.children()).register_forward_pre_hook(note)
        return network

    with replaced(common, backbone=spied):
        script.main(argv)
    return found


@contextlib.contextmanager
def own_backbone(name, make):
    """A further --backbone."""
    common.BACKBONES[name] = make
    try:
        yield
    finally:
        del common.BACKBONES[name]


def scores_of(argv):
    """Run eval_linear.py; scores (n, classes) of the test videos, and their labels (n,)."""
    found, accuracies = [], eval_linear.accuracies

    def recorded(scores, labels, classes):
        found.extend([scores, labels])
        return accuracies(scores, labels, classes)

    with replaced(eval_linear, accuracies=recorded):
        eval_linear.main(argv)
    return found


def targets_of(argv):
    """Run finetune.py on videos of several actions. Returns the passes, the targets of each step's
    loss, flat, and, of AVA, of each pass the boxes (N, 4) in pixels and whose they are: (N,), the
    number of a clip in the pass."""
    targets, boxes = [], []
    entropy, align = F.binary_cross_entropy_with_logits, finetune.roi_align

    def recorded_entropy(scores, target, *args, **more):
        targets.append(target.flatten().numpy().copy())
        return entropy(scores, target, *args, **more)

    def recorded_align(maps, parts, *args, **more):
        boxes.append((parts[:, 1:].numpy().copy(), parts[:, 0].int().numpy().copy()))
        return align(maps, parts, *args, **more)

    with (
        replaced(F, binary_cross_entropy_with_logits=recorded_entropy),
        replaced(finetune, roi_align=recorded_align),
    ):
        passes = passes_of(finetune, argv)
    return passes, targets, boxes


def last(out):
    """The tensors of a run's last.pth."""
    return torch.load(Path(out, "last.pth"), weights_only=True)["model"]


def network_of(out, which="online"):
    """The state of a backbone in a run's last.pth, without its prefix."""
    prefix = NETWORKS[which]
    tensors = last(out).items()
    return {k.removeprefix(prefix): tensor for k, tensor in tensors if k.startswith(prefix)}


# --- videos that say what they are


def pixels(clips):
    """(..., 3, T, H, W), as a network sees them -> (..., T, H, W, 3) uint8."""
    x = np.moveaxis(np.asarray(clips), -4, -1) * STD + MEAN
    return (x * 255).round().clip(0, 255).astype(np.uint8)


def numbered(path, number, frames=60):
    """A square video of 30 frames a second, whose frame i shows 100 * number + i."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = range(100 * number, 100 * number + frames)
    return make_video(path, n=frames, size=(48, 48), counters=shown)


def shown(clip):
    """A view (3, T, H, W) of a numbered video -> its number, the numbers of its frames, and whether
    it is mirrored."""
    frames, mirrored = pixels(clip), False
    try:
        read_counter(frames[0])
    except ValueError:
        frames, mirrored = frames[:, :, ::-1], True
    counters = [read_counter(frame) for frame in frames]
    numbers = {counter // 100 for counter in counters}
    assert len(numbers) == 1, counters
    return numbers.pop(), [counter % 100 for counter in counters], mirrored
