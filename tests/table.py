"""The README's tables from the files in tests/results: python tests/table.py"""

import json
import statistics
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
METHODS = {"simclr": "SimCLR", "moco": "MoCo", "byol": "BYOL", "swav": "SwAV"}
RHOS = (1, 2, 4)
CLASSROOM = """1 | BYOL | byol-rho2-seed0
1 | no predictor | class-nopredictor
1 | no stop-gradient | class-nostopgrad
2 | SimCLR, temperature 0.05 | class-temp005
2 | 0.2 | simclr-rho2-seed0
2 | 1 | class-temp1
3 | MoCo, queue of 40 | class-queue40
3 | 240 | moco-rho2-seed0
3 | 800 | class-queue800
4 | SimCLR, rho 1, crop,flip | class-nocolour-rho1
4 | rho 1, crop,flip,gray | simclr-rho1-seed0
4 | rho 1, all five | class-five-rho1
4 | rho 2, crop,flip | class-nocolour-rho2
4 | rho 2, crop,flip,gray | simclr-rho2-seed0
4 | rho 2, all five | class-five-rho2
5 | SimCLR, timespan 0.25 s | class-span025
5 | 1 s | class-span1
5 | the whole video | simclr-rho2-seed0
6 | SimCLR, one scene, rho 1 | class-scenes1-rho1
6 | one scene, rho 2 | class-scenes1-rho2
6 | four scenes, rho 1 | simclr-rho1-seed0
6 | four scenes, rho 2 | simclr-rho2-seed0
7 | SwAV | swav-rho2-seed0
7 | no balance | class-sinkhorn0
8 | BYOL | byol-rho2-seed0
8 | SimSiam | class-simsiam"""
STARTS = """random weights | finetune-scratch | tennis7-finetune-scratch | tennis7-random-rho0
SimCLR, rho 1 | - | - | tennis7-simclr-rho1
SimCLR, rho 2 | finetune-simclr-rho2 | tennis7-finetune-simclr | tennis7-simclr-rho2
MoCo, rho 2 | finetune-moco-rho2 | - | tennis7-moco-rho2
BYOL, rho 2 | finetune-byol-rho2 | tennis7-finetune-byol | tennis7-byol-rho2
SwAV, rho 2 | finetune-swav-rho2 | - | tennis7-swav-rho2"""


def read(stem):
    return json.loads((RESULTS / f"{stem}.json").read_text())


def log(stem):
    return [json.loads(line) for line in (RESULTS / f"{stem}.jsonl").read_text().splitlines()]


def seeds(pattern, key):
    """A number of result.json, one a seed, of the files that match."""
    return [json.loads(path.read_text())[key] for path in sorted(RESULTS.glob(f"{pattern}.json"))]


def cells(key):
    """{(method, rho): percents, one a seed} of a number of result.json."""
    return {(m, rho): seeds(f"{m}-rho{rho}-seed?", key) for m in METHODS for rho in RHOS}


def mean(percents):
    """Mean, deviation over seeds where there are several, and how many there are."""
    spread = f" ± {statistics.stdev(percents):.1f}" if len(percents) > 1 else ""
    return f"{statistics.mean(percents):.1f}{spread} ({len(percents)})" if percents else "–"


def markdown(heads, rows):
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def demo():
    """Methods by rho, linear and kNN accuracy, and what to hold them against."""
    rows, kinds = [], ("linear_top1", "knn_top1")
    for method, name in METHODS.items():
        rows.append([name, *[mean(cells(kind)[method, rho]) for rho in RHOS for kind in kinds]])
    for method, name in METHODS.items():
        longer = [seeds(f"{method}-rho{r}-80epochs-seed?", kind) for r in RHOS for kind in kinds]
        rows += [[f"{name}, 80 epochs", *map(mean, longer)]] * any(longer)
    for name, pattern in (("random weights", "random"), ("supervised", "supervised")):
        rows.append([name, *[mean(seeds(f"{pattern}-seed?", kind)) for kind in kinds] * len(RHOS)])
    return markdown(["", *[f"rho {r}, {kind}" for r in RHOS for kind in ("linear", "kNN")]], rows)


def losses():
    """What the four logs say at some steps, and the run that collapses."""
    steps, rows = (10, 20, 50, 100, 200, 400), []
    stems = {name: f"{method}-rho2-seed0" for method, name in METHODS.items()}
    for name, stem in {**stems, "BYOL without predictor": "class-nopredictor"}.items():
        at = {line["step"]: line for line in log(stem)}
        near = [at[100 * i]["knn_top1"] for i in (1, 2, 3, 4)]
        rows.append([name, f"{at[10]['chance']:.2f}", *[f"{at[s]['loss']:.3f}" for s in steps]])
        rows[-1] += [", ".join(f"{at[s]['feature_std']:.2f}" for s in (10, 100, 400))]
        rows[-1] += [", ".join(f"{percent:.1f}" for percent in near)]
    heads = ["", "chance", *[f"loss, step {step}" for step in steps]]
    return markdown([*heads, "feature_std, step 10, 100, 400", "kNN, epoch 10, 20, 30, 40"], rows)


def classroom():
    """What the assignments of the classroom gave."""
    rows = []
    for line in CLASSROOM.splitlines():
        number, what, stem = line.split(" | ")
        last, result = log(stem)[-1], read(stem)
        numbers = last["loss"], last["chance"], last["feature_std"]
        rows.append([number, what, *[f"{value:.3f}" for value in numbers]])
        rows[-1] += [result["knn_top1"], result["linear_top1"]]
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
    """All layers trained, and the read-outs of frozen ones, from several starts."""
    rows = []
    for line in STARTS.splitlines():
        name, demo, tennis, frozen = line.split(" | ")
        numbers = (demo, "top1"), (tennis, "top1"), (frozen, "linear_top1"), (frozen, "knn_top1")
        rows.append([name, *[mean(seeds(f"{stem}-seed?", key)) for stem, key in numbers]])
    heads = "start | demo, fine-tuned | tennis7, fine-tuned | tennis7, linear | tennis7, kNN"
    return markdown(heads.split(" | "), rows)


def decoding():
    """CPU milliseconds a clip by each reader, from bench-decode.jsonl."""
    heads, rows = "GOP | video | rho | ours | least | torchcodec | decord".split(" | "), []
    for m in log("bench-decode"):
        if "gop" in m:
            times = [f"{m[f'{name}_ms']:.1f}" for name in heads[3:]]
            rows.append([m["gop"], f"{m['seconds']} s", m["rho"], *times])
    return markdown(heads, rows)


TABLES = demo, halves, losses, classroom, finetuned, decoding

if __name__ == "__main__":
    print("\n\n".join(table() for table in TABLES))
