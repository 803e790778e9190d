"""The form of a chapter, held for every notebook: see CONTRIBUTING.md, "A chapter"."""

import ast
import re
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import median

import execute_notebooks
import nbformat
import pytest
import set_repository
import yaml
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_LINES, MAX_MEDIAN, MAX_COLUMNS, MAX_DEF = 25, 8, 88, 15
INSTALL = '''import importlib.util

if importlib.util.find_spec("minddpm") is None:
    %pip install -q "git+{url}"'''
OPENING = ("you will", "you will learn", "you need", "time and hardware")
SECTIONS = ("What we saw", "Exercises", "In practice", "References")
SOLUTION = re.compile(r"# @title Solution (\d+)\b")
IMAGES = ("image/png", "image/jpeg", "image/svg+xml", "image/gif", "image/webp")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@cache
def read(path):
    return nbformat.read(path, as_version=4)


def cells(path, kind):
    return [cell for cell in read(path).cells if cell.cell_type == kind]


def prose(path):
    return "\n\n".join(cell.source for cell in cells(path, "markdown"))


def tree(cell):
    """The syntax tree of a cell, magics included."""
    return ast.parse(TransformerManager().transform_cell(cell.source))


def solutions(path):
    """Number of the exercise -> the code cell that solves it."""
    found = {}
    for cell in cells(path, "code"):
        if match := SOLUTION.match(cell.source):
            assert int(match[1]) not in found, f"two cells named {match[0]}"
            found[int(match[1])] = cell
    return found


def exercises(path):
    """The Markdown from `## Exercises` up to the next section."""
    return re.split(r"(?m)^## ", prose(path).split("\n## Exercises", 1)[-1], maxsplit=1)[0]


def is_assertion(statement):
    """Whether it is an `assert`, or a call such as `torch.testing.assert_close(...)`."""
    if not isinstance(statement, ast.Expr):
        return isinstance(statement, ast.Assert)
    call = statement.value
    name = ast.unparse(call.func).rsplit(".", 1)[-1] if isinstance(call, ast.Call) else ""
    return name.startswith("assert_")


@each_notebook
def test_name_is_number_verb_object(path):
    assert re.fullmatch(r"\d\d(-[a-z0-9]+){2,}", path.stem)


@each_notebook
def test_is_listed_in_the_table_of_contents(path):
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    files = [chapter["file"] for part in contents["parts"] for chapter in part["chapters"]]
    assert f"notebooks/{path.stem}" in files


@each_notebook
def test_metadata_and_cell_ids_are_the_fixed_ones(path):
    notebook = read(path)
    assert notebook.metadata == execute_notebooks.METADATA
    assert [cell.id for cell in notebook.cells] == execute_notebooks.cell_ids(notebook)
    for cell in notebook.cells:
        assert set(cell.metadata) <= execute_notebooks.CELL_METADATA


@each_notebook
def test_first_code_cell_installs_on_colab(path):
    first = cells(path, "code")[0]
    assert first.source == INSTALL.format(url=set_repository.configured_url(ROOT))
    assert "hide-input" in first.metadata.get("tags", [])


@each_notebook
def test_opening_says_what_to_expect(path):
    before_code = []
    for cell in read(path).cells:
        if cell.cell_type == "code" and cell is not cells(path, "code")[0]:
            break
        before_code.append(cell.source if cell.cell_type == "markdown" else "")
    text = "\n".join(before_code)
    assert re.match(r"# \S+ ", text), "the first line is the title: a verb and its object"
    assert text.lower().count("you will") >= 2
    missing = [phrase for phrase in OPENING if phrase not in text.lower()]
    assert not missing, f"the opening does not say {missing}"


@each_notebook
def test_closing_sections_are_there_in_order(path):
    headings = re.findall(r"(?m)^## (.+?)\s*$", prose(path))
    assert [heading for heading in headings if heading in SECTIONS] == list(SECTIONS)


@each_notebook
def test_headings_go_down_one_level_at_a_time(path):
    without_code = re.sub(r"(?ms)^```.*?^```", "", prose(path))
    levels = [len(hashes) for hashes in re.findall(r"(?m)^(#+) ", without_code)]
    assert levels.count(1) == 1
    assert all(lower - upper <= 1 for upper, lower in pairwise(levels))


@each_notebook
def test_code_cells_are_short(path):
    lengths = {cell.id: cell.source.count("\n") + 1 for cell in cells(path, "code")[1:]}
    too_long = {cell: length for cell, length in lengths.items() if length > MAX_LINES}
    assert not too_long, f"cells of more than {MAX_LINES} lines: {too_long}"
    assert median(lengths.values()) <= MAX_MEDIAN


@each_notebook
def test_lines_of_code_fit_the_page(path):
    lines = [line for cell in cells(path, "code") for line in cell.source.split("\n")]
    assert not [line for line in lines if len(line) > MAX_COLUMNS]


@each_notebook
def test_functions_are_short(path):
    for cell in cells(path, "code"):
        for node in ast.walk(tree(cell)):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= MAX_DEF, f"{node.name} has {length} lines: move it to minddpm"


def test_no_function_is_defined_twice_in_the_book():
    names = Counter()
    for path in NOTEBOOKS:
        for cell in cells(path, "code"):
            kinds = (ast.FunctionDef, ast.ClassDef)
            names.update(node.name for node in tree(cell).body if isinstance(node, kinds))
    assert not [name for name, count in names.items() if count > 1]


@each_notebook
def test_is_run_from_top_to_bottom_without_error_or_warning(path):
    code = cells(path, "code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]


@each_notebook
def test_outputs_load_nothing_and_hold_no_widget(path):
    for cell in cells(path, "code"):
        for output in cell.outputs:
            data = output.get("data", {})
            assert "application/vnd.jupyter.widget-view+json" not in data
            assert "<script" not in data.get("text/html", "")
            assert not re.search(r"""(?:src|href)=["']https?:""", data.get("text/html", ""))


@each_notebook
def test_proves_something(path):
    statements = [node for cell in cells(path, "code") for node in ast.walk(tree(cell))]
    assert any(is_assertion(node) for node in statements if isinstance(node, ast.stmt))


@each_notebook
def test_pictures_have_alternative_text(path):
    for cell in cells(path, "code"):
        stored = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        for output in cell.outputs:
            data = output.get("data", {})
            for tag in re.findall(r"<img\b[^>]*>", data.get("text/html", "")):
                assert re.search(r"""\balt=["'][^"']{10,}""", tag), f"{cell.id}: an img without alt"
            if set(data) & set(IMAGES) and "text/html" not in data:
                assert len(stored) >= 10, f"{cell.id}: a picture without mystnb.image.alt"
    for text in re.findall(r"!\[([^\]]*)\]\(", prose(path)):
        assert len(text) >= 10, "a picture in the prose without alternative text"


@each_notebook
def test_exercises_have_folded_solutions(path):
    numbers = [int(n) for n in re.findall(r"(?m)^(?:### |\*\*)Exercise (\d+)\b", exercises(path))]
    assert 3 <= len(numbers) <= 6
    assert numbers == list(range(1, len(numbers) + 1))
    folds = re.findall(r"<summary>\s*(?:<\w+>)?Solution (\d+)\b", prose(path))
    assert sorted(map(int, folds)) == numbers, "each exercise has one fold named Solution N"
    assert set(solutions(path)) <= set(numbers)
    assert len(solutions(path)) >= len(numbers) / 2, "half of the exercises are solved in code"


@each_notebook
def test_solutions_are_proved_and_hidden(path):
    for number, cell in solutions(path).items():
        assert is_assertion(tree(cell).body[-1]), f"solution {number} does not end in an assert"
        assert cell.metadata.get("cellView") == "form"
        assert "hide-cell" in cell.metadata.get("tags", [])


@each_notebook
def test_folds_work_on_colab_and_in_the_book(path):
    """Blank lines around the tags let Markdown through; a heading inside would tear the page."""
    for cell in cells(path, "markdown"):
        assert cell.source.count("<details") == cell.source.count("</details>")
        for fold in re.findall(r"(?s)<details[^>]*>.*?</details>", cell.source):
            assert re.match(r"(?s)<details[^>]*>\s*<summary>[^\n]+</summary>\n\n", fold)
            assert fold.endswith("\n\n</details>")
            assert "$" not in fold.split("</summary>")[0], "no mathematics in a summary"
            assert not re.search(r"(?m)^#+ ", fold), "no heading in a fold"


@each_notebook
def test_roles_and_directives_stay_out(path):
    """They show as raw text on Colab; links and `$$` do what they would."""
    assert not re.findall(r"\{[a-z:]+\}`|^```\{|^:::", prose(path), flags=re.MULTILINE)
