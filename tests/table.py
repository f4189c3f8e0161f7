"""The README's tables from the files in tests/results: python tests/table.py"""

import json
import re
import statistics
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
METHODS = {"simclr": "SimCLR", "moco": "MoCo", "byol": "BYOL", "swav": "SwAV"}


def cells(key):
    """{(method, rho): percents, one a seed} of a number of result.json."""
    found = {}
    for path in sorted(RESULTS.glob("*.json")):
        if name := re.fullmatch(r"(\w+)-rho(\d)-seed\d", path.stem):
            percent = json.loads(path.read_text())[key]
            found.setdefault((name[1], int(name[2])), []).append(percent)
    return found


def mean(percents):
    """Mean, deviation over seeds where there are several, and how many there are."""
    spread = f" ± {statistics.stdev(percents):.1f}" if len(percents) > 1 else ""
    return f"{statistics.mean(percents):.1f}{spread} ({len(percents)})"


def table():
    """Lines of markdown: methods by rho, linear and kNN accuracy."""
    linear, nearest = cells("linear_top1"), cells("knn_top1")
    rhos = sorted({rho for _, rho in linear})
    heads = [f"rho {rho}, {kind}" for rho in rhos for kind in ("linear", "kNN")]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for method, name in METHODS.items():
        row = [mean(part[method, rho]) for rho in rhos for part in (linear, nearest)]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    random = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("random-*.json"))]
    values = [mean([r[key] for r in random]) for key in ("linear_top1", "knn_top1")]
    lines.append(f"| random weights | {' | '.join(values * len(rhos))} |")
    return lines


def decoding():
    """Lines of markdown: CPU milliseconds a clip by each reader, from bench-decode.jsonl."""
    heads = "GOP | video | rho | ours | least | torchcodec | decord".split(" | ")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for line in (RESULTS / "bench-decode.jsonl").read_text().splitlines():
        if "gop" in (m := json.loads(line)):
            times = [f"{m[f'{name}_ms']:.1f}" for name in heads[3:]]
            row = [m["gop"], f"{m['seconds']} s", m["rho"], *times]
            lines.append("| " + " | ".join(map(str, row)) + " |")
    return lines


if __name__ == "__main__":
    print("\n".join([*table(), "", *decoding()]))
