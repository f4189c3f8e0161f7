"""The four scripts are one family: what differs between two of them is the method."""

import ast
import dataclasses
import difflib
import importlib
import io
import itertools
import re
import sys
import tokenize
from pathlib import Path

import pytest

import common
from conftest import METHODS, ROOT

EVALUATIONS = ["eval_linear", "finetune"]
SOURCE = {n: (ROOT / f"{n}.py").read_text() for n in [*METHODS, *EVALUATIONS, "common"]}
PAIRS = list(itertools.combinations(METHODS, 2))
HEADINGS = ["# --- config", "# --- method", "# --- training"]
FIELDS = ["Paper", "Idea", "Loss", "rho", "Recipe"]
LOSSES = dict(simclr="nt_xent", moco="info_nce", byol="regression_loss", swav="swapped_prediction")
SHARED = """rho timespan backbone frames stride short_side size augment crop_area color_strength
    epochs batch_size optimizer lr warmup weight_decay knn_every sync_bn projector
    projector_bn""".split()
BOUNDS = {  # lines, syntax nodes, nodes on a line of code: bounds, not what the files have
    "common": (1150, 6800, 7.8),
    "simclr": (180, 925, 7.8),
    "moco": (180, 925, 7.8),
    "byol": (180, 925, 7.8),
    "swav": (215, 1100, 7.8),
    "eval_linear": (400, 2500, 7.8),
    "finetune": (560, 3600, 7.8),
}


def functions(name):
    """{name of a top-level function or class: its source}, decorators included."""
    lines, parts = SOURCE[name].split("\n"), {}
    for node in ast.parse(SOURCE[name]).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            parts[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return parts


def sections(name):
    """The docstring, imports and three sections of a method: {heading: source}."""
    doc = ast.parse(SOURCE[name]).body[0]
    lines = SOURCE[name].split("\n")
    heading, parts = "docstring", {}
    for number, line in enumerate(lines, start=1):
        if number == doc.end_lineno + 1:
            heading = "imports"
        if line in HEADINGS:
            heading = line
        parts.setdefault(heading, []).append(line)
    return {heading: "\n".join(part) for heading, part in parts.items()}


def own_fields(name):
    """{flag of the recipe: its field}, in order, without the flags of every run."""
    config = importlib.import_module(name).Config
    return {
        field.name: field
        for field in dataclasses.fields(config)
        if field.name not in common.Config.__dataclass_fields__
    }


@pytest.mark.parametrize("name", METHODS)
def test_one_skeleton(name):
    """Docstring of five fields, three headings, Config, DEMO, a main, an entry: in this order."""
    source = SOURCE[name]
    assert re.findall(r"^# --- \w+$", source, re.MULTILINE) == HEADINGS
    doc = ast.get_docstring(ast.parse(source))
    assert re.findall(r"^(\w+) {2,}\S", doc, re.MULTILINE) == FIELDS
    assert list(own_fields(name))[: len(SHARED)] == SHARED
    assert source.endswith('if __name__ == "__main__":\n    main()\n')
    names = list(functions(name))
    assert names[:2] == ["Config", "sample_clips"] and names[-1] == "main"
    parts = sections(name)
    assert "class Config(common.Config):" in parts["# --- config"]
    assert re.search(r"^DEMO = ", parts["# --- config"], re.MULTILINE)
    assert "def sample_clips(" in parts["# --- method"] and LOSSES[name] in parts["# --- method"]
    assert list(functions(name)) == re.findall(
        r"^(?:def|class) (\w+)", parts["# --- config"] + parts["# --- method"], re.MULTILINE
    ) + ["main"]


@pytest.mark.parametrize("name", METHODS)
def test_demo_is_of_flags(name):
    """Every entry of DEMO replaces a flag by a value of the same kind."""
    script = importlib.import_module(name)
    fields = script.Config.__dataclass_fields__
    for flag, value in script.DEMO.items():
        assert type(value) is type(fields[flag].default), flag
        assert type(getattr(script.Config(**script.DEMO), flag)) is type(value)


@pytest.mark.parametrize("a, b", PAIRS)
def test_what_is_shared_is_the_same(a, b):
    """Shared flags have the same type, help text and choices, in the same order; functions of the
    same name are equal byte for byte."""
    fields = own_fields(a), own_fields(b)
    both = [flag for flag in fields[0] if flag in fields[1]]
    assert both == [flag for flag in fields[1] if flag in fields[0]]
    for flag in set(both) - {"temperature"}:  # of another softmax in SwAV
        one, other = (part[flag] for part in fields)
        assert one.type == other.type, flag
        assert explained(one) == explained(other), flag
    parts = functions(a), functions(b)
    for name in set(parts[0]) & set(parts[1]) - {"Config", "main"}:
        assert parts[0][name] == parts[1][name], name
    imports = [sections(name)["imports"].split("\n") for name in (a, b)]
    assert set(imports[0]) ^ set(imports[1]) <= {"import copy", "import math"}


def explained(field):
    """What --help says of a flag, without its default, and the values that it may take."""
    return field.metadata["help"].split(" [")[0], field.metadata.get("choices")


@pytest.mark.parametrize("a, b", PAIRS)
def test_every_difference_is_the_method(a, b):
    """Hunks of a diff lie in the docstring, config and DEMO, method, or few lines of main; imports
    are the same but for two modules."""
    one, other = sections(a), sections(b)
    assert list(one) == list(other) == ["docstring", "imports", *HEADINGS]
    for line in changes(one["imports"], other["imports"]):
        assert line[2:] in ("import copy", "import math")
    for line in changes(one["# --- config"], other["# --- config"]):
        assert re.match(r"    \w+: .+ = arg\(|    \w+=|DEMO \|?= |\)$", line[2:]), line
    training = changes(one["# --- training"], other["# --- training"])
    assert max(sum(line.startswith(sign) for line in training) for sign in "-+") <= 22
    changed_main = changes(functions(a)["main"], functions(b)["main"])
    assert training == changed_main  # nothing but main differs there


def changes(one, other):
    difference = difflib.ndiff(one.split("\n"), other.split("\n"))
    return [line for line in difference if line[:2] in ("- ", "+ ") and line[2:].strip()]


@pytest.mark.parametrize("name", METHODS)
def test_the_step_is_written_out(name):
    """main: config, data, model, optimizer, run; then forward under autocast, loss, zero_grad,
    backward, the optimizer's step, record: each once and in this order."""
    main = functions(name)["main"]
    marks = """cfg = common.parse_args(Config, DEMO, argv)|common.init_distributed(cfg)
        |dataset = common.VideoClips(cfg, sample_clips)|model = |common.wrap_ddp(model, cfg)
        |common.make_optimizer(model, cfg)|run = common.Run(cfg, dataset, model, optimizer, chance
        |for batch in run.batches():|with common.autocast():|network(batch["clips"])
        | loss = |optimizer.zero_grad()|.backward()|optimizer.step()|run.record(loss, features="""
    places = []
    for mark in marks.split("|"):
        mark = mark.rstrip()
        assert main.count(mark) == 1, mark
        places.append(main.index(mark))
    assert places == sorted(places)


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_is_a_pure_function(name):
    """The objective takes tensors and numbers; it is called in the loop, outside autocast."""
    parts = functions(name)
    assert not re.search(r"\b(self|cfg|args|common|dist)\b", parts[LOSSES[name]])
    (line,) = [line for line in parts["main"].split("\n") if LOSSES[name] in line]
    assert line.startswith(" " * 8 + "loss = "), "not at the level of the loop"
    inside = re.search(r"        with common.autocast\(\):\n((?:            .*\n)+)", parts["main"])
    assert "network(" in inside[1] and inside[1].count("\n") == 1


@pytest.mark.parametrize("name", METHODS)
def test_a_script_knows_common_and_no_other(name):
    """Imports: the standard library, torch and common."""
    modules = imported(name) - {"torch", "common"}
    assert modules <= set(sys.stdlib_module_names)


def imported(name):
    """The top-level names of all modules that a file imports, anywhere in it."""
    modules = set()
    for node in ast.walk(ast.parse(SOURCE[name])):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module.split(".")[0])
    return modules


def test_who_knows_whom():
    """common imports no script, finetune may import eval_linear; nothing else is needed but torch,
    torchvision, av, numpy, tqdm."""
    packages = {"torch", "torchvision", "av", "numpy", "tqdm", *sys.stdlib_module_names}
    for name, scripts in [("common", set()), ("eval_linear", {"common"})]:
        assert imported(name) <= packages | scripts, name
    assert imported("finetune") <= packages | {"common", "eval_linear"}


def test_common_knows_no_method():
    """No method, and no noun of one, in common.py; no step of an optimizer and no backward pass."""
    nouns = r"queue|prototype|predictor|negative|simclr|moco|byol|swav|sinkhorn"
    assert not re.findall(nouns, SOURCE["common"], re.IGNORECASE)
    assert not re.search(r"\w\.backward\(|optimizer\.step\(|zero_grad\(", SOURCE["common"])


@pytest.mark.parametrize("name", SOURCE)
def test_public_names_of_torch_alone(name):
    """No torch._anything, no inspect.getsource, no handler of a signal but SIGTERM and SIGINT."""
    source = SOURCE[name]
    assert not re.search(r"\btorch(\.\w+)*\._\w|from torch(\.\w+)*\._|import _|inspect\.", source)
    assert set(re.findall(r"\bsignal\.(SIG\w+)", source)) <= {"SIGTERM", "SIGINT", "SIG_IGN"}
    assert not re.findall(r"\bcommon\._\w", source), "a script needs a private name"


def test_the_evaluations_copy_nothing():
    """finetune may import eval_linear: no function is written in both."""
    one, other = (functions(name) for name in EVALUATIONS)
    for name in set(one) & set(other):
        assert one[name] != other[name], f"{name} is a copy"


def test_nothing_in_common_is_unused():
    """A function or class of common.py is used in it, by a script, or for anyone's own script."""
    for_others = {"load_clip", "load_backbone", "read_clips", "VideoReader", "leave"}
    for node in ast.parse(SOURCE["common"]).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in for_others:
            users = [name for name in SOURCE if f"common.{node.name}" in SOURCE[name]]
            inside = len(re.findall(rf"\b{node.name}\b", SOURCE["common"])) - 1
            assert users or inside, f"{node.name} is not used"


@pytest.mark.parametrize("name", BOUNDS)
def test_sizes(name):
    """Lines, syntax nodes and nodes on a line of code stay in their bounds."""
    lines, nodes, density = size(SOURCE[name])
    most_lines, most_nodes, most_density = BOUNDS[name]
    assert lines <= most_lines and nodes <= most_nodes and round(density, 1) <= most_density, (
        f"{name}.py: {lines} lines, {nodes} nodes, {density:.2f} nodes a line"
    )


def size(source):
    """(lines, syntax nodes, nodes on a line of code): packing lines does not change the second."""
    tree, documented, code = ast.parse(source), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    names = "COMMENT NL NEWLINE INDENT DEDENT ENDMARKER".split()
    blank = {getattr(tokenize, name) for name in names}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in blank:
            code |= set(range(token.start[0], token.end[0] + 1))
    free = ast.expr_context | ast.operator | ast.unaryop | ast.cmpop | ast.boolop
    nodes = sum(not isinstance(node, free) for node in ast.walk(tree))
    return source.count("\n"), nodes, nodes / len(code - documented)


def test_size_counts():
    """A line that is packed has as many nodes as two; docstrings and comments are no code."""
    loose = '"""Doc."""\n\nx = 1  # one\n\n# two\ny = [\n    2,\n]\n'
    packed = "x = 1; y = [2]\n"
    assert size(loose)[:2] == (8, 10) and size(packed)[1] == 8
    assert size(loose)[2] == 10 / 4 and size(packed)[2] == 8


def test_no_frameworks():
    """No hooks, registries, trainers or config files; video is decoded by av alone; nothing else
    lies at the top."""
    words = r"Trainer|callback|register_forward|register_hook|yaml|torchvision\.io|av\.AVError"
    for name, source in SOURCE.items():
        assert not re.search(words, source), name
    known = set("README.md LICENSE requirements.txt tests data out".split())
    scripts = {f"{name}.py" for name in SOURCE}
    tops = {path.name for path in Path(ROOT).iterdir() if not path.name.startswith((".", "__"))}
    assert tops <= known | scripts
