"""The module's shape: who imports whom, what docstrings say, what importing does, its length."""

import ast
import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import backmatter
import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "minddpm"
FILES = {
    str(path.relative_to(PACKAGE).with_suffix("")).replace("/", "."): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}

# A file imports only from lower ranks. A new file must be given one.
RANKS = [
    ["__init__"],
    ["schedule", "nets.unet", "data", "config", "processes", "log"],
    ["nets.mlp", "process", "viz", "train"],
    ["nets.__init__", "prediction"],
    ["likelihood", "oracle", "published"],
    ["losses", "samplers", "checkpoint", "metrics"],
    ["guidance"],
    ["run", "generate"],
    ["cli"],
    ["__main__"],
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
CORE = [
    "schedule",
    "process",
    "prediction",
    "losses",
    "samplers",
    "likelihood",
    "nets.unet",
    "train",
]

NUMBER = r"(?:[A-Z](?:\.\d+)*|\d+(?:\.\d+)*)"  # an appendix, or 3, or 3.2
TAG = re.compile(rf"{backmatter.PAPER} (?:eq|alg|sec|app|table)\. {NUMBER}(?:, {NUMBER})*(?=[);])")
MATHS = ["schedule", "process", "losses", "likelihood", "samplers"]
HELPERS = {
    "cast",
    "normal_kl",
    "bits_per_dim",
    "squared_error",
    "gaussian",
    "even_grid",
    "sample",
    "sample_path",
}


def module(name):
    return import_module("minddpm." + name.removesuffix(".__init__"))


def imports(name):
    """The files of ours that a file imports, anywhere in it."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "minddpm":
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            continue
        for target in targets:
            parts = target.split(".")
            if parts[0] == "minddpm":
                stems = [".".join(parts[1:n]) for n in range(len(parts), 0, -1)]
                found = [
                    s for stem in stems for s in (stem, f"{stem}.__init__".strip(".")) if s in FILES
                ]
                yield found[0]


def functions(name):
    """(dotted name, node) of every function and method in a file."""
    for node in ast.walk(TREES[name]):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                yield child.name, child


def public(name):
    """The public functions and classes that a file defines."""
    members = vars(module(name)).items()
    kinds = (inspect.isfunction, inspect.isclass)
    return {
        key: value
        for key, value in members
        if not key.startswith("_")
        and any(is_kind(value) for is_kind in kinds)
        and value.__module__ == module(name).__name__
    }


def test_every_file_has_a_rank_and_every_rank_a_file():
    assert set(RANK) == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_imports_go_to_lower_ranks(name):
    assert [other for other in imports(name) if RANK[other] >= RANK[name]] == []


def test_import_reader_sees_each_kind_of_import():
    assert {"schedule", "process"} <= set(imports("prediction"))
    assert {"run", "samplers", "checkpoint", "generate"} <= set(
        imports("cli")
    )  # inside functions too
    assert "nets.__init__" in set(imports("checkpoint"))


@pytest.mark.parametrize("name", [n for n in FILES if n != "__main__"])
def test_public_functions_and_classes_have_docstrings(name):
    assert module(name).__doc__
    assert [key for key, value in public(name).items() if not inspect.getdoc(value)] == []


def docstrings():
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                yield from [(name, text)] if (text := ast.get_docstring(node)) else []


def test_equation_tags_are_well_formed():
    tags = set()
    for name, text in docstrings():
        text = " ".join(text.split())
        found = [match.group() for match in TAG.finditer(text)]
        assert len(found) == len(
            re.findall(r"\b(?:eqs?|algs?|secs?|app|table)\b\.? [A-Z\d]", text)
        ), (name, text)
        tags.update(found)
    assert {"DDPM eq. 6, 7", "DDIM eq. 12", "Improved DDPM eq. 15", "DDPM app. B"} <= tags


@pytest.mark.parametrize("name", MATHS)
def test_functions_of_the_mathematics_name_their_equation(name):
    functions = {k: f for k, f in public(name).items() if inspect.isfunction(f)}
    maths = [k for k in functions if k not in HELPERS and not k.startswith("check_")]
    assert maths and [k for k in maths if not TAG.search(functions[k].__doc__)] == []


def test_every_function_fits_on_a_screen():
    length = {
        (name, key): node.end_lineno - node.lineno + 1
        for name in FILES
        for key, node in functions(name)
        if key != "__init__"
    }
    assert {key: lines for key, lines in length.items() if lines > 40} == {}


def test_module_is_short_enough_to_read():
    lines = {}
    for name, path in FILES.items():
        lines[name] = sum(
            bool(row.strip()) for row in path.read_text(encoding="utf-8").splitlines()
        )
    assert sum(lines[name] for name in CORE) <= 1110
    assert sum(lines.values()) <= 3450


IMPORT_ALL = """
import random, sys, warnings
warnings.simplefilter("error")
import numpy, torch
filters = len(warnings.filters)
def state():
    default, threads = torch.get_default_dtype(), torch.get_num_threads()
    return [torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state()),
            default, threads, torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()]
before = state()
for name in sys.argv[1:]:
    __import__(name)
assert state() == before, "importing changed a global state"
heavy = {"torchvision", "matplotlib", "sklearn", "diffusers", "scipy", "pandas"} & set(sys.modules)
assert not heavy, f"importing pulled in {heavy}"
"""


def test_importing_prints_nothing_seeds_nothing_and_is_light():
    names = [
        "minddpm",
        *(f"minddpm.{n.removesuffix('.__init__')}" for n in FILES if "__main__" not in n),
    ]
    names.remove("minddpm.__init__")
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *names],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
