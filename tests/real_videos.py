"""The finding on real videos: linear and kNN accuracy over rho, by cross-validation over groups.

    nice -n 19 python tests/real_videos.py DATA WORK --sets games6 --methods simclr --rhos 1 2

DATA/<set> holds videos and labels.csv (path, label, group, fold). Once, the videos are scaled down
into WORK/<set>, and WORK/<set>.csv lists them without labels. A run pre-trains on all of them with
--small: the test videos of every fold are seen, their labels are not. Then a linear classifier and
kNN, both as in eval_linear.py --cached, learn from the labels of all folds but one and are tested
on that one; accuracies are of the videos of all folds together. Videos of a group (a recording, a
game) are in the same fold.

Random weights and four answers that need no network stand beside:
majority      the most frequent class
mean colour   the class of the video whose average over all frames and pixels is nearest
mean frame    ... whose average over all frames is nearest (16 x 16 pixels)
motion map    ... whose average change from a frame to the next is nearest (16 x 16 pixels)

Each run appends a line of JSON to tests/results/real-videos.jsonl; a run that has one is left out.
--methods without a name measures only the baselines.
"""

import argparse
import csv
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import av
import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import eval_linear  # noqa: E402
from bench import cpu_name  # noqa: E402

RESULTS = ROOT / "tests" / "results" / "real-videos.jsonl"
THREE = "crop,flip,gray"  # the demo's
FIVE = "crop,flip,jitter,gray,blur"  # the paper's, at the released strength
KEY = ["set", "method", "rho", "seed", "augment"]  # what makes a run
LAST = ["step", "loss", "chance", "feature_std", "clip_distance"]  # of the last line of its log


# --- videos


def scale(job):
    """Write a video again, not compressed, with a short side of 64 pixels: all its frames with
    their time stamps. To decode it then costs next to nothing."""
    source, target = job
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    building = target.with_suffix(".tmp")
    with av.open(str(source)) as video, av.open(str(building), "w", format="mov") as copy:
        stream = video.streams.video[0]
        factor = 64 / min(stream.width, stream.height)
        width, height = round(stream.width * factor), round(stream.height * factor)
        out = copy.add_stream("rawvideo", rate=stream.average_rate)
        out.width, out.height, out.pix_fmt = width, height, "rgb24"
        out.codec_context.time_base = stream.time_base
        for frame in video.decode(stream):
            smaller = frame.reformat(width, height, "rgb24", interpolation="AREA")
            smaller.pts, smaller.time_base = frame.pts, stream.time_base
            copy.mux(out.encode(smaller))
        copy.mux(out.encode())
    building.rename(target)


def prepare(data, work, name, jobs):
    """Scale a set's videos, list them without labels; return the rows of its labels.csv."""
    with open(data / name / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["small"] = Path(name, row["path"]).with_suffix(".mov")
    pairs = [(data / name / row["path"], work / row["small"]) for row in rows]
    with ProcessPoolExecutor(jobs) as pool:
        list(pool.map(scale, pairs, chunksize=8))
    lines = ["path", *[str(row["small"]) for row in rows]]
    (work / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return rows


def choose_stride(paths):
    """The largest, up to the demo's, at which a clip is at most a third of the median video, so
    that the clips of a video can differ."""
    durations = []
    for path in paths:
        with common.VideoReader(path) as reader:
            durations.append(reader.duration)
    median = statistics.median(durations)
    fitting = [s for s in range(1, common.DEMO["stride"] + 1) if 8 * s / 30 <= median / 3]
    return max(fitting, default=1)


# --- evaluation


def cross_validate(labels, folds, accuracy):
    """[percent of all videos, percents of the folds]; accuracy(train, test) is the percent of the
    test rows that are classified correctly by what the train rows teach."""
    percents, right = [], 0.0
    for fold in np.unique(folds):
        train = np.flatnonzero(folds != fold)
        test = np.flatnonzero(folds == fold)
        percent = float(accuracy(train, test))
        percents.append(round(percent, 2))
        right += percent * len(test)
    return [round(right / len(labels), 2), percents]


def network_accuracies(argv, labels, folds, groups):
    """Those of the linear classifier and of kNN, as in eval_linear.py with the flags argv; and the
    percent of videos whose nearest other video is of the same group."""
    cfg = common.parse_args(eval_linear.Config, eval_linear.DEMO, argv)
    eval_linear.fill_settings(cfg)
    torch.manual_seed(cfg.seed)
    videos = common.VideoClips(cfg, eval_linear.sample_clips)
    backbone = common.backbone(cfg.backbone).eval()
    eval_linear.load(backbone, cfg)
    features, _, _ = eval_linear.extract(cfg, backbone, videos)  # (n, views, D)
    means = features.mean(1)
    labels = torch.from_numpy(labels)
    classes = int(labels.max()) + 1

    def linear(train, test):
        bank, queries = features[train], features[test]
        scores = eval_linear.cached_probe(cfg, bank, labels[train], queries, classes)
        return 100 * (scores.argmax(-1) == labels[test]).float().mean()

    def knn(train, test):
        return common.knn_accuracy(means[train], labels[train], means[test], labels[test])

    unit = torch.nn.functional.normalize(means)
    nearest = (unit @ unit.T).fill_diagonal_(-1).argmax(1)
    found = {"linear": cross_validate(labels, folds, linear)}
    found |= {"knn": cross_validate(labels, folds, knn)}
    same = groups[nearest.numpy()] == groups
    return found | {"same_group": round(100 * float(same.mean()), 2)}


def trivial_accuracies(paths, labels, folds):
    """Those of answers that need no network."""
    colours, frames, motions = [], [], []
    for path in paths:
        with av.open(str(path)) as video:
            pictures = [frame.reformat(16, 16, "rgb24") for frame in video.decode(video=0)]
        clip = np.stack([picture.to_ndarray() for picture in pictures]).astype(np.float32)
        colours.append(clip.mean((0, 1, 2)))
        frames.append(clip.mean(0).ravel())
        motions.append(np.abs(np.diff(clip, axis=0)).mean((0, 3)).ravel())

    def majority(train, test):
        return 100 * (labels[test] == np.bincount(labels[train]).argmax()).mean()

    def nearest(vectors):
        vectors = torch.from_numpy(np.stack(vectors))

        def accuracy(train, test):
            neighbours = torch.cdist(vectors[test], vectors[train]).argmin(1)
            return 100 * (labels[test] == labels[train][neighbours]).mean()

        return accuracy

    answers = {"majority": majority, "mean colour": nearest(colours)}
    answers |= {"mean frame": nearest(frames), "motion map": nearest(motions)}
    return {name: cross_validate(labels, folds, answer) for name, answer in answers.items()}


# --- runs


def finished(run):
    """Whether the results have a line of this run."""
    if not RESULTS.exists():
        return False
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    return any(all(line[key] == run[key] for key in KEY) for line in lines)


def write(run, **numbers):
    """Append a line of JSON."""
    line = run | numbers | {"versions": common.VERSIONS, "cpu": cpu_name()}
    with open(RESULTS, "a") as file:
        file.write(json.dumps(line) + "\n")


def measure(job):
    """Do one run, in the folder that the lists lie in."""
    run, work, paths, labels, folds, groups = job
    os.chdir(work)
    torch.set_num_threads(1)
    if run["method"] == "trivial":
        write(run, videos=len(paths), **trivial_accuracies(paths, labels, folds))
        return
    stride = choose_stride(paths)
    flags = ["--data", f"{run['set']}.csv", "--small", "--stride", str(stride)]
    flags += ["--seed", str(run["seed"]), "--workers", "0"]
    name = "-".join(str(run[key]) for key in KEY)
    weights, more = "random", {}
    if run["method"] != "random":
        weights = f"out/{name}"
        how = ["--rho", str(run["rho"]), "--augment", run["augment"], "--out", weights]
        words = [f"{run['method']}.py", *flags, *how]
        with open(f"{name}.txt", "w") as screen:
            command = [sys.executable, ROOT / words[0], *words[1:]]
            subprocess.run(command, check=True, stdout=screen, stderr=screen)
        last = json.loads(Path(weights, "log.jsonl").read_text().splitlines()[-1])
        more = {key: last[key] for key in LAST}
        more["command"] = shlex.join(["python", *words])
    argv = ["--weights", weights, *flags, "--out", f"out/eval-{name}"]
    found = network_accuracies(argv, labels, folds, groups)
    write(run, stride=stride, **found, **more)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of the sets")
    parser.add_argument("work", type=Path, help="folder to work in, outside the repository")
    parser.add_argument("--sets", nargs="+", default=["games6", "tennis7", "yoga6"])
    parser.add_argument("--methods", nargs="*", default=["simclr", "byol"])
    parser.add_argument("--rhos", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--augments", nargs="+", default=[THREE, FIVE])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each in one thread")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    jobs = []
    for name in args.sets:
        rows = prepare(args.data, args.work, name, args.jobs)
        paths = [row["small"] for row in rows]
        names = sorted({row["label"] for row in rows})
        labels = np.array([names.index(row["label"]) for row in rows])
        folds = np.array([int(row["fold"]) for row in rows])
        groups = np.array([row["group"] for row in rows])
        runs = [("trivial", 0, 0, ""), *[("random", 0, seed, "") for seed in args.seeds]]
        for seed, *rest in itertools.product(args.seeds, args.methods, args.rhos, args.augments):
            method, rho, augment = rest
            runs.append((method, rho, seed, augment))
        for values in runs:
            run = dict(zip(KEY, (name, *values), strict=True))
            if not finished(run):
                jobs.append((run, args.work, paths, labels, folds, groups))
    with ProcessPoolExecutor(args.jobs) as pool:
        for _ in pool.map(measure, jobs):
            pass


if __name__ == "__main__":
    main()
