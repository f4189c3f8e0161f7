"""The tables of the books, from the files in tests/results.

    python tests/table.py

rewrites, in README.md, tests/classroom.md and tests/results/README.md, each table that follows a
line such as <!-- table demo -->; the word is the name of a function below.
"""

import json
import re
import statistics
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
BOOKS = [ROOT / "README.md", ROOT / "tests/classroom.md", RESULTS / "README.md"]
METHODS = {"simclr": "SimCLR", "moco": "MoCo", "byol": "BYOL", "swav": "SwAV"}
RHOS = (1, 2, 4)
IDEAS = {
    "simclr": "near its own, far from others",
    "moco": "SimCLR against a queue of keys",
    "byol": "predict what a slow copy outputs",
    "swav": "predict the other clip's balanced prototype",
}

# The study's own numbers (arXiv 2104.14558), top-1 in percent: K400 linear, UCF101 fine-tuned.
STUDY = {  # rho -> SimCLR, MoCo, BYOL, SwAV; 200 epochs
    1: ["36.1 / 84.2", "61.0 / 90.8", "60.6 / 91.2", "38.6 / 74.7"],
    2: ["60.5 / 88.9", "65.8 / 91.0", "65.8 / 92.7", "61.6 / 87.3"],
    3: ["62.0 / 87.9", "67.3 / 92.8", "68.3 / 93.8", "62.7 / 89.4"],
    4: ["out of memory", "67.8 / 93.5", "68.9 / 93.8", "out of memory"],
}
EPOCHS = {  # epochs -> the same; rho 2
    50: ["45.7 / 79.7", "52.6 / 84.6", "30.2 / 78.5", "55.9 / 81.4"],
    100: ["57.3 / 85.6", "60.5 / 89.5", "47.6 / 88.6", "59.4 / 85.5"],
    200: ["60.5 / 88.9", "65.8 / 91.0", "65.8 / 92.7", "61.6 / 87.3"],
    400: ["62.0 / 87.9", "67.4 / 92.5", "66.9 / 92.8", "62.9 / 88.3"],
    800: ["61.8 / 88.4", "67.4 / 93.2", "66.2 / 93.6", "63.2 / 89.5"],
}

# Assignment | run | stem of its files.
CLASSROOM = """1 | BYOL | class-byol-rho2
1 | no predictor | class-nopredictor
1 | no stop-gradient | class-nostopgrad
2 | SimCLR, temperature 0.05 | class-temp005
2 | 0.2 | class-simclr-rho2
2 | 1 | class-temp1
3 | MoCo, queue of 40 | class-queue40
3 | 240 | class-moco-rho2
3 | 800 | class-queue800
4 | SimCLR, rho 1, crop,flip | class-nocolour-rho1
4 | rho 1, crop,flip,gray | class-simclr-rho1
4 | rho 1, all five | class-five-rho1
4 | rho 2, crop,flip | class-nocolour-rho2
4 | rho 2, crop,flip,gray | class-simclr-rho2
4 | rho 2, all five | class-five-rho2
5 | SimCLR, timespan 0.25 s | class-span025
5 | 1 s | class-span1
5 | the whole video | class-simclr-rho2
6 | SimCLR, one scene, rho 1 | class-scenes1-rho1
6 | one scene, rho 2 | class-scenes1-rho2
6 | one scene, random weights | class-scenes1-random
6 | four scenes, rho 1 | class-simclr-rho1
6 | four scenes, rho 2 | class-simclr-rho2
7 | SwAV | swav-again-rho2-seed0
7 | no balance | class-sinkhorn0
8 | BYOL | class-byol-rho2
8 | SimSiam | class-simsiam
9 | MoCo, rho 4, one softmax for each positive | class-moco-rho4
9 | MoCo, rho 4, eq. (1) | class-eq1
10 | BYOL, momentum 0.9 to 1 | class-byol-rho2
10 | 0.9, constant | class-constant09
10 | 0.99, constant | class-constant099
11 | SimCLR, gap of 0.5 s | class-gap
12 | playback speed alone | class-speed
13 | SwAV | swav-again-rho2-seed0
13 | SwAV with multi-crop | class-multicrop
14 | SimCLR, i.i.d. clips | class-simclr-rho2
14 | SimCLR, CVRL's sampler | class-cvrl"""
STARTS = """random weights | finetune-scratch | tennis7-finetune-scratch | tennis7-random-rho0
SimCLR, rho 1 | - | - | tennis7-simclr-rho1
SimCLR, rho 2 | finetune-simclr-rho2 | tennis7-finetune-simclr | tennis7-simclr-rho2
MoCo, rho 2 | finetune-moco-rho2 | - | tennis7-moco-rho2
BYOL, rho 2 | finetune-byol-rho2 | tennis7-finetune-byol | tennis7-byol-rho2
SwAV, rho 2 | finetune-swav-rho2 | - | tennis7-swav-rho2"""

SETS = ["games6", "tennis7", "yoga6"]  # of real videos
AUGMENTS = {"crop,flip,gray": "three", "crop,flip,jitter,gray,blur": "five"}


def read(stem):
    return json.loads((RESULTS / f"{stem}.json").read_text())


def log(stem):
    return [json.loads(line) for line in (RESULTS / f"{stem}.jsonl").read_text().splitlines()]


def seeds(pattern, key):
    """A number of result.json, one per seed, of the files that match."""
    return [json.loads(path.read_text())[key] for path in sorted(RESULTS.glob(f"{pattern}.json"))]


def cells(key):
    """{(method, rho): percents, one per seed} of a number of result.json."""
    return {(m, rho): seeds(f"{m}-rho{rho}-seed?", key) for m in METHODS for rho in RHOS}


def mean(percents):
    """Mean, standard deviation over seeds where there are several, and their number."""
    if not percents:
        return "–"
    spread = f" ± {statistics.stdev(percents):.1f}" if len(percents) > 1 else ""
    return f"{statistics.mean(percents):.1f}{spread} ({len(percents)})"


def short(percents):
    """Mean and standard deviation, without spaces."""
    return mean(percents).split(" (")[0].replace(" ", "")


def markdown(heads, rows):
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def first():
    """README: what each method is, the study's numbers and the demo's."""
    linear, rows = cells("linear_top1"), []
    for i, (method, name) in enumerate(METHODS.items()):
        study = [STUDY[rho][i].split(" / ")[0].replace("out of memory", "–") for rho in RHOS]
        here = [short(linear[method, rho]).split("±")[0] for rho in RHOS]
        row = [name, f"`{method}.py`", IDEAS[method], " / ".join(study), " / ".join(here)]
        rows.append(row)
    columns = "Kinetics-400, paper: rho 1 / 2 / 4", "demo, here: rho 1 / 2 / 4"
    return markdown(["method", "file", "idea", *columns], rows)


def demo_short():
    """README: the demo's linear accuracies with their spread."""
    linear, rows = cells("linear_top1"), []
    for method, name in METHODS.items():
        longer = short(seeds(f"{method}-rho2-80epochs-seed?", "linear_top1"))
        rows.append([name, *[short(linear[method, rho]) for rho in RHOS], longer])
    heads = "linear, percent", *[f"rho {rho}" for rho in RHOS], "rho 2, twice the epochs"
    return markdown(heads, rows)


def losses_short():
    """README: losses of four real runs, and of one that collapses."""
    rows = []
    for name, stem in runs_with_logs().items():
        at = {line["step"]: line for line in log(stem)}
        last = at[max(at)]
        rows.append([name, f"{last['chance']:.2f}", *[f"{at[s]['loss']:.2f}" for s in (10, 100)]])
        rows[-1] += [f"{last[key]:.2f}" for key in ("loss", "feature_std")]
    heads = "", "chance", "step 10", "step 100", "the last", "feature_std at the end"
    return markdown(heads, rows)


def runs_with_logs():
    stems = {name: f"{method}-rho2-seed0" for method, name in METHODS.items()}
    return stems | {"BYOL without predictor": "class-nopredictor"}


def demo():
    """Methods by rho, linear and kNN accuracy, and what to hold them against."""
    rows, kinds = [], ("linear_top1", "knn_top1")
    for method, name in METHODS.items():
        rows.append([name, *[mean(cells(kind)[method, rho]) for rho in RHOS for kind in kinds]])
    others = {
        f"{method}-rho{{}}-80epochs": f"{name}, 80 epochs" for method, name in METHODS.items()
    }
    others["swav-queue-rho{}"] = "SwAV with a feature queue"
    others["swav-again-rho{}"] = "SwAV without it, on the same machine"
    for pattern, name in others.items():
        found = [seeds(f"{pattern.format(rho)}-seed?", kind) for rho in RHOS for kind in kinds]
        if any(found):
            rows.append([name, *map(mean, found)])
    for name, pattern in (("random weights", "random"), ("supervised", "supervised")):
        rows.append([name, *[mean(seeds(f"{pattern}-seed?", kind)) for kind in kinds] * len(RHOS)])
    return markdown(["", *[f"rho {r}, {kind}" for r in RHOS for kind in ("linear", "kNN")]], rows)


def losses():
    """What the four logs say at some steps, and the run that collapses."""
    steps, rows = (10, 20, 50, 100, 200), []
    for name, stem in runs_with_logs().items():
        at = {line["step"]: line for line in log(stem)}
        last = max(at)
        near = [line["knn_top1"] for line in at.values() if "knn_top1" in line]
        shown = [f"{at[step]['loss']:.3f}" for step in (*steps, last)]
        rows.append([name, f"{at[10]['chance']:.2f}", *shown])
        rows[-1] += [", ".join(f"{at[s]['feature_std']:.2f}" for s in (10, 100, last))]
        rows[-1] += [", ".join(f"{percent:.1f}" for percent in near)]
    heads = ["", "chance", *[f"loss, step {step}" for step in steps], "the last"]
    return markdown([*heads, "feature_std, step 10, 100, last", "kNN, epoch 10, 20, 30, 40"], rows)


def classroom():
    """What the assignments of the classroom gave."""
    rows = []
    for line in CLASSROOM.splitlines():
        number, what, stem = line.split(" | ")
        if not (RESULTS / f"{stem}.json").exists():
            rows.append([number, what, "not run here", "", "", "", ""])
            continue
        losses = ["–"] * 3  # no log was kept
        if (RESULTS / f"{stem}.jsonl").exists():
            last = log(stem)[-1]
            losses = [f"{last[key]:.3f}" for key in ("loss", "chance", "feature_std")]
        result = read(stem)
        rows.append([number, what, *losses, result["knn_top1"], result["linear_top1"]])
    return markdown(["", "run", "last loss", "chance", "feature_std", "kNN", "linear"], rows)


def halves():
    """The two halves of the label apart: a classifier of coats and one of tricks."""
    rows = []
    names = {"random": "random weights", **{f"simclr-rho{r}": f"SimCLR, rho {r}" for r in RHOS}}
    for stem, name in names.items():
        found = [read(f"half-{stem}-{half}")["linear_top1"] for half in ("coat", "trick")]
        rows.append([name, *found])
    return markdown(["linear, of 4 classes", "coat", "trick"], rows)


def finetuned():
    """All layers trained, and frozen backbones evaluated, from several starts."""
    rows = []
    for line in STARTS.splitlines():
        name, demo, tennis, frozen = line.split(" | ")
        numbers = (demo, "top1"), (tennis, "top1"), (frozen, "linear_top1"), (frozen, "knn_top1")
        rows.append([name, *[mean(seeds(f"{stem}-seed?", key)) for stem, key in numbers]])
    heads = "start | demo, fine-tuned | tennis7, fine-tuned | tennis7, linear | tennis7, kNN"
    return markdown(heads.split(" | "), rows)


def real():
    """Real videos: methods by rho, linear and kNN accuracy, by cross-validation."""
    found, kinds = {}, ("linear", "knn")
    for line in log("real-videos"):
        if line["method"] != "trivial":
            row = line["set"], line["method"], line["augment"]
            for kind in kinds:
                found.setdefault((row, line["rho"], kind), []).append(line[kind][0])
    rows = []
    for row in dict.fromkeys(row for row, _, _ in found):
        name, method, augment = row
        rhos = [0] * len(RHOS) if method == "random" else RHOS
        numbers = [mean(found.get((row, rho, kind), [])) for rho in rhos for kind in kinds]
        what = METHODS.get(method, "random weights")
        rows.append([name, what, AUGMENTS.get(augment, ""), *numbers])
    order = [*METHODS.values(), "random weights"]
    rows.sort(key=lambda row: (SETS.index(row[0]), order.index(row[1]), row[2]))
    heads = [f"rho {rho}, {kind}" for rho in RHOS for kind in ("linear", "kNN")]
    return markdown(["set", "", "augmentation", *heads], rows)


def trivial():
    """Real videos: answers that need no network."""
    answers, rows = ("majority", "mean colour", "mean frame", "motion map"), []
    for line in log("real-videos"):
        if line["method"] == "trivial":
            percents = [f"{line[answer][0]:.1f}" for answer in answers]
            rows.append([line["set"], line["videos"], *percents])
    rows.sort(key=lambda row: SETS.index(row[0]))
    return markdown(["set", "videos", *answers], rows)


def decoding():
    """CPU milliseconds per clip by each reader, from bench-decode.jsonl."""
    rows = []
    for m in log("bench-decode"):
        if "rho" in m:
            torchcodec = min(m["torchcodec_approximate_ms"], m["torchcodec_exact_ms"])
            times = [f"{ms:.1f}" for ms in (m["ours_ms"], torchcodec, m["decord_ms"])]
            file = [m["file"], m["longest_gop"], f"{100 * m['b_frames']:.0f} %", m["rho"]]
            rows.append([*file, *times, f"{m['ours_ms'] / torchcodec:.2f}"])
    heads = "file | longest GOP | B-frames | rho | ours | torchcodec | decord | ours / torchcodec"
    return markdown(heads.split(" | "), rows)


def loading():
    """Videos a second of one core, and cores for one GPU, from bench-loader.jsonl."""
    rows, folder = [], ""
    for m in log("bench-loader"):
        folder = m.get("folder", folder)
        if "files" in m:
            speeds = [
                m[f"{name}_videos_a_second"] for name in ("ours", "torchcodec", "pytorchvideo")
            ]
            rows.append([folder, m["rho"], *[f"{speed:.1f}" for speed in speeds]])
        if "cores" in m and "rho" in m:
            rows[-1].append(f"{m['cores']:.0f}")
    heads = (
        "files",
        "rho",
        "ours",
        "torchcodec + transforms.v2",
        "pytorchvideo",
        "cores for one GPU",
    )
    return markdown(heads, rows)


def compute():
    """Memory, operations and hours that were computed and not measured, from compute.jsonl."""
    rows = []
    for m in log("compute"):
        if "saved_gib" in m:
            parts = "parameters", "gradients", "optimizer", "target_and_buffers", "saved", "total"
            memory = [f"{m[f'{part}_gib']:.2f}" for part in parts]
            low = "yes" if m["low_memory"] else "no"
            numbers = f"{m['step_tflop']:.1f}", f"{m['hours']:.1f}"
            rows.append([METHODS[m["method"]], m["rho"], low, *memory, *numbers])
    heads = "|rho|--low-memory|weights|gradients|optimizer|target|saved|total|TFLOP a step|hours"
    return markdown(heads.split("|"), rows)


def rebuild():
    """Losses of the demo's first steps before and after the rebuild, from rebuild.jsonl."""
    rows = []
    for method, name in METHODS.items():
        at = {line["step"]: line for line in log("rebuild") if line["method"] == method}
        pairs = [f"{at[s]['before']:.4f} / {at[s]['after']:.4f}" for s in (1, 10, 30, 60)]
        differences = [abs(m["after"] / m["before"] - 1) for m in at.values() if m["before"]]
        rows.append([name, *pairs, f"{max(differences):.0e}"])
    heads = "", *[f"step {step}" for step in (1, 10, 30, 60)], "largest relative difference"
    return markdown(heads, rows)


def study_rho():
    return markdown(["rho", *METHODS.values()], [[rho, *row] for rho, row in STUDY.items()])


def study_epochs():
    return markdown(["epochs", *METHODS.values()], [[n, *row] for n, row in EPOCHS.items()])


def tables():
    """{name: table} of all tables."""
    functions = first, demo_short, losses_short, demo, halves, losses, classroom, finetuned
    functions += real, trivial, decoding, loading, compute, rebuild, study_rho, study_epochs
    return {function.__name__: function() for function in functions}


def filled(text):
    """A book's text with its tables made anew, and the names of these."""
    made, names = tables(), []

    def table(match):
        names.append(match[1])
        return f"<!-- table {match[1]} -->\n{made[match[1]]}"

    return re.sub(r"<!-- table (\w+) -->\n(?:\|.*\n)*", table, text), names


if __name__ == "__main__":
    for book in BOOKS:
        text, names = filled(book.read_text())
        book.write_text(text)
        print(book, *names)
