"""The README's pictures, as PNG files in tests/results.

    python tests/figures.py                             finding.png, curves.png: from the results
    python tests/figures.py neighbours RHO1 RHO2        neighbours.png: from two runs' folders
    python tests/figures.py views OUT.png byol.py ...   what a script's model sees, with its flags

finding     rho against accuracy: the study's Kinetics-400 beside the demo, four methods.
curves      loss (as a share of chance) and kNN accuracy of the four and of a collapsed BYOL.
neighbours  six test videos of the demo and their five nearest training videos, at rho 1 and rho 2.
"""

import functools
import importlib
import math
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import torchvision

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
from table import METHODS, RESULTS, cells, log  # noqa: E402

# Okabe and Ito's colors, which colour-blind people can tell apart; markers for black and white
STYLES = {
    "simclr": ("#0072B2", "o"),
    "moco": ("#D55E00", "s"),
    "byol": ("#009E73", "^"),
    "swav": ("#CC79A7", "D"),
}
# K400 linear, 200 epochs, at rho 1, 2, 3, 4 (the paper's table; see tests/results/README.md)
STUDY = {
    "simclr": (36.1, 60.5, 62.0),
    "moco": (61.0, 65.8, 67.3, 67.8),
    "byol": (60.6, 65.8, 68.3, 68.9),
    "swav": (38.6, 61.6, 62.7),
}


def finding():
    """Two plots side by side, each method a line."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    found = cells("linear_top1")
    for method, name in METHODS.items():
        color, marker = STYLES[method]
        style = {"color": color, "marker": marker, "label": name, "linewidth": 1.5}
        numbers = STUDY[method]
        left.plot(range(1, len(numbers) + 1), numbers, **style)
        seeds = {rho: found[method, rho] for rho in (1, 2, 4)}
        means = [statistics.mean(values) for values in seeds.values()]
        spread = [statistics.stdev(values) for values in seeds.values()]
        right.errorbar(list(seeds), means, spread, capsize=3, **style)
    left.set(
        title="the paper: Kinetics-400, linear", ylabel="top-1 in percent", xticks=[1, 2, 3, 4]
    )
    right.set(title="here: the demo, linear, 3 seeds", xticks=[1, 2, 4])
    for axes in (left, right):
        axes.set_xlabel("rho, clips per video")
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False)
    save(figure, "finding.png")


def curves():
    """Loss as a share of chance, and kNN accuracy, of rho 2 on the demo, seed 0."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    runs = {name: (f"{method}-rho2-seed0", *STYLES[method]) for method, name in METHODS.items()}
    runs["BYOL without predictor"] = ("class-nopredictor", "#000000", "x")
    for name, (stem, color, marker) in runs.items():
        lines = log(stem)
        epochs = [line["epoch"] for line in lines]
        share = [line["loss"] / line["chance"] for line in lines]
        style = {"color": color, "marker": marker, "label": name, "linewidth": 1.5}
        left.plot(epochs, share, **style, markevery=8)
        measured = [line for line in lines if "knn_top1" in line]
        knn = [line["knn_top1"] for line in measured]
        right.plot([line["epoch"] for line in measured], knn, **style)
    left.set(title="loss / chance", xlabel="epoch", ylim=(0, None))
    right.set(title="kNN accuracy in percent (chance 6.2)", xlabel="epoch", ylim=(0, None))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    save(figure, "curves.png")


def save(figure, name):
    figure.savefig(RESULTS / name, dpi=100)
    print(RESULTS / name)


def neighbours(*folders):
    """Side by side for each run's folder: a test video, then its five nearest training videos."""
    import eval_linear

    draw = eval_linear.write_neighbours
    eval_linear.write_neighbours = functools.partial(draw, side=64)  # the size of the demo's videos
    pictures = []
    for folder in folders:
        path = RESULTS / "part.png"
        argv = ["--weights", folder, "--cached", "--neighbours", str(path)]
        eval_linear.main([*argv, "--out", f"{folder}-neighbours"])
        pictures.append(plt.imread(path)[..., :3])  # (H, W, 3)
        path.unlink()
        pictures.append(np.ones((len(pictures[0]), 24, 3)))  # a gap
    plt.imsave(RESULTS / "neighbours.png", np.concatenate(pictures[:-1], axis=1))


def views(path, script, *argv):
    """A row for each view of up to four videos, a column for each frame."""
    module = importlib.import_module(Path(script).stem)
    cfg = common.parse_args(module.Config, module.DEMO, [*argv, "--workers", "0"])
    common.init_distributed(cfg)
    dataset = common.VideoClips(cfg, module.sample_clips)
    sampler = iter(common.TrainSampler(cfg, len(dataset), 0, 1))
    items = [dataset[key] for key in next(sampler)[:4]]
    clips = torch.stack([item["clips"] for item in items])  # (4, V, 3, T, H, W)
    pictures = clips * common.STD + common.MEAN
    pictures = pictures.transpose(2, 3).flatten(0, 2).clamp(0, 1)  # (4 * V * T, 3, H, W)
    pictures = F.interpolate(pictures, scale_factor=math.ceil(96 / cfg.size))
    torchvision.utils.save_image(pictures, path, nrow=cfg.frames)
    for item in items:
        name = dataset.paths[item["index"]]
        print(name, "clips start at", [f"{start:.2f} s" for start in item["starts"].tolist()])


if __name__ == "__main__":
    if sys.argv[1:]:
        {"neighbours": neighbours, "views": views}[sys.argv[1]](*sys.argv[2:])
    else:
        finding()
        curves()
