"""What the README says holds: its commands parse, its numbers are those of the result files."""

import importlib
import json
import re
import shlex

import pytest

import common
from conftest import ROOT
from table import METHODS, RESULTS, cells, decoding, mean, table

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]


def test_commands_parse():
    """Every script and flag in a command block exists, for every method of a loop."""
    seen = 0
    for line in COMMANDS:
        if run := re.search(r"(?:python|torchrun .*?) (\S+)\.py\b(.*?)(?:#|;|$)", line):
            names = ["simclr", "moco", "byol", "swav"] if "$" in run[1] else [run[1]]
            rest = re.sub(r"\$\w+", "1", run[2])
            for name in names:
                common._parse(importlib.import_module(name).Recipe, shlex.split(rest))
                seen += 1
    assert seen >= 6


def test_paths_exist():
    """Every file of the repository that is named is there."""
    names = set(re.findall(r"`((?:tests/)?\w+\.(?:py|txt))`", README))
    assert names and all((ROOT / name).exists() for name in names)


def test_the_table_is_that_of_the_result_files():
    """The demo's table is what tests/table.py makes; the first table repeats its linear column."""
    assert "\n".join(table()) in README and "\n".join(decoding()) in README
    linear = cells("linear_top1")
    for method, name in METHODS.items():
        row = next(line for line in README.splitlines() if line.startswith(f"| {name} | `"))
        for rho in (1, 2, 4):
            assert mean(linear[method, rho]).split(" ")[0] in row


@pytest.mark.parametrize("method", METHODS)
def test_what_the_readme_says_of_rho(method):
    """In the committed results rho 2 is above rho 1 and random weights in every seed, and rho 4
    above rho 2 in SimCLR and SwAV."""
    linear = cells("linear_top1")
    random = [json.loads(path.read_text())["linear_top1"] for path in RESULTS.glob("random-*.json")]
    assert min(linear[method, 2]) > max(linear[method, 1] + random)
    if method in ("simclr", "swav"):
        assert min(linear[method, 4]) > max(linear[method, 2])


def test_slow_tests_wait_to_be_asked(capfd):
    """A plain pytest runs all tests but the slow ones, and -m slow runs these and nothing else."""
    files = [str(ROOT / f"tests/test_{name}.py") for name in ("slow", "readme")]
    collected = {}
    for words in ((), ("-m", "slow")):
        capfd.readouterr()
        assert pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *words, *files]) == 0
        lines = [line for line in capfd.readouterr().out.splitlines() if "::" in line]
        collected[words] = {line.split("::")[0].rpartition("/")[2] for line in lines}
    assert collected == {(): {"test_readme.py"}, ("-m", "slow"): {"test_slow.py"}}
