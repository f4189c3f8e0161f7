"""The four scripts are one family: what differs between two of them is the method."""

import ast
import difflib
import itertools
import re
from pathlib import Path

import pytest

from conftest import METHODS, ROOT

EVALUATIONS = ["eval_linear", "finetune"]
SOURCE = {n: (ROOT / f"{n}.py").read_text() for n in [*METHODS, *EVALUATIONS, "common"]}
PAIRS = list(itertools.combinations(METHODS, 2))
HEADINGS = ["# --- recipe", "# --- method", "# --- training"]
FIELDS = ["Paper", "Idea", "Loss", "rho", "Differs", "Recipe"]
SHARED = """rho timespan backbone frames stride short_side size augment crop_area epochs batch_size
    optimizer lr warmup_epochs weight_decay knn_every batch_norm projector projector_bn""".split()


def functions(name):
    """{name of a top-level function or class: its source}, decorators included."""
    lines, parts = SOURCE[name].split("\n"), {}
    for node in ast.parse(SOURCE[name]).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            parts[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return parts


def recipe(name):
    """{name of a recipe line: its comment}, in order."""
    return dict(re.findall(r"^    (\w+) = .*?  # (.+)$", functions(name)["Recipe"], re.MULTILINE))


@pytest.mark.parametrize("name", METHODS)
def test_one_skeleton(name):
    """Docstring of six fields, three headings, class Recipe, a main, an entry: in this order."""
    source = SOURCE[name]
    assert re.findall(r"^# --- \w+$", source, re.MULTILINE) == HEADINGS
    doc = ast.get_docstring(ast.parse(source))
    assert re.findall(r"^(\w+) {2,}\S", doc, re.MULTILINE) == FIELDS
    assert list(recipe(name))[: len(SHARED)] == SHARED
    assert source.endswith('if __name__ == "__main__":\n    main()\n')
    names = list(functions(name))
    assert names[:2] == ["Recipe", "sample_clips"] and names[-1] == "main"
    first = source[: source.index("# --- method")].count("\n") + 1
    assert first <= 60, "the method is not on the second screen"


@pytest.mark.parametrize("a, b", PAIRS)
def test_what_is_shared_is_the_same(a, b):
    """Shared flags have the same comments; functions of the same name are equal byte for byte."""
    comments = recipe(a), recipe(b)
    for flag in set(comments[0]) & set(comments[1]) - {"temperature"}:
        assert comments[0][flag] == comments[1][flag], flag
    parts = functions(a), functions(b)
    for name in set(parts[0]) & set(parts[1]) - {"Recipe", "main"}:
        assert parts[0][name] == parts[1][name], name
    imports = [
        [line for line in SOURCE[name].split("\n") if line.startswith(("import", "from"))]
        for name in (a, b)
    ]
    assert set(imports[0]) ^ set(imports[1]) <= {"import copy", "import math"}


@pytest.mark.parametrize("name", ["sample_clips", "test_videos", "labelled"])
def test_the_evaluations_share_what_they_can(name):
    """A function that both evaluations, or an evaluation and a method, have is the same."""
    copies = {functions(script)[name] for script in EVALUATIONS}
    copies |= {functions(script)[name] for script in METHODS if name in functions(script)}
    assert len(copies) == 1


@pytest.mark.parametrize("a, b", PAIRS)
def test_training_differs_in_few_lines(a, b):
    """Two mains differ in the class, the chance level, forward, loss, and what follows a step."""
    mains = [functions(name)["main"].split("\n") for name in (a, b)]
    changes = [line for line in difflib.ndiff(*mains) if line.startswith(("- ", "+ "))]
    assert max(sum(c.startswith(sign) for c in changes) for sign in "-+") <= 20
    for main in mains:
        text = "\n".join(main)
        start = "args, videos = common.start(Recipe, argv)\n    model = "
        order = [start, "common.distribute(model, args)", "common.make_optimizer(model, args)"]
        order += [
            "chance = ",
            "for step in common.train(",
            "with step.autocast():",
            "network(step.",
        ]
        order += ["loss = ", "backward()", "step.update(loss, features="]
        places = [text.index(mark) for mark in order]
        assert places == sorted(places) and text.count("backward()") == 1


@pytest.mark.parametrize("name", METHODS)
def test_a_script_knows_common_and_no_other(name):
    """Imports: the standard library, torch and common."""
    modules = set(re.findall(r"^(?:import|from) (\w+)", SOURCE[name], re.MULTILINE))
    assert modules <= {"copy", "math", "collections", "torch", "common"}


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_is_a_pure_function(name):
    """The objective takes tensors and numbers; it is called outside autocast."""
    loss = {
        "simclr": "nt_xent",
        "moco": "info_nce",
        "byol": "regression_loss",
        "swav": "swapped_prediction",
    }[name]
    parts = functions(name)
    assert not re.search(r"\b(self|args|common|dist)\b", parts[loss])
    for line in parts["main"].split("\n"):
        if loss in line:
            assert line.startswith(" " * 8 + "loss = "), "not at the level of the loop"


def test_common_knows_no_method():
    """No method, and no noun of one, in common.py."""
    nouns = r"queue|prototype|predictor|negative|simclr|moco|byol|swav|sinkhorn"
    assert not re.findall(nouns, SOURCE["common"], re.IGNORECASE)
    assert not re.search(r"^\s*\w*loss\w*\.backward\(", SOURCE["common"], re.MULTILINE)


def test_nothing_in_common_is_unused():
    """A public name is used by two scripts or fixed by the design, a private one in common."""
    fixed = {"read_clips", "backbone", "LARS", "load_weights", "demo_videos", "Videos"}
    fixed |= {"knn"}  # common uses it too
    tree = ast.parse(SOURCE["common"])
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in fixed:
            scripts = [*METHODS, *EVALUATIONS]
            users = sum(f"common.{node.name}(" in SOURCE[name] for name in scripts)
            inside = len(re.findall(rf"\b{node.name}\b", SOURCE["common"])) - 1
            assert users >= 2 or inside, f"{node.name} is used by {users} scripts"


@pytest.mark.parametrize("name", SOURCE)
def test_small_pieces(name):
    """Functions of at most 40 lines; methods of at most 170 lines; bounds that are seen to move."""
    for node in ast.walk(ast.parse(SOURCE[name])):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 40, node.name
    assert SOURCE[name].count("\n") <= {"common": 1440, "eval_linear": 230, "finetune": 550}.get(
        name, 170
    )


def test_no_frameworks():
    """No hooks, registries, trainers or config files; video is decoded by av alone."""
    words = r"Trainer|callback|register_forward|register_hook|yaml|torchvision\.io|av\.AVError"
    for name, source in SOURCE.items():
        assert not re.search(words, source), name
    known = set("README.md LICENSE requirements.txt tests data out".split())
    scripts = {f"{name}.py" for name in [*SOURCE, "eval_linear", "finetune"]}
    tops = {path.name for path in Path(ROOT).iterdir() if not path.name.startswith((".", "__"))}
    assert tops <= known | scripts
