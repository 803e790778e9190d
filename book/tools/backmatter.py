"""Write the claims ledger and the equation map from what the book and the code say of themselves.

    python book/tools/backmatter.py           # write book/ledger.md and book/equations.md
    python book/tools/backmatter.py --check   # say what is out of date, and what is unsupported

A sentence of the book carries its support as a comment, `<!-- claim: measured NAME -->`,
`proved LABEL` or `cited KEY, place`; an equation names its source,
`<!-- equation: DDPM eq. 7 -->`; a docstring ends with its tag, `(DDPM eq. 7)`.
In corrections.md a term is an error in circulation, and its definition carries the support of
what is true; there `measured 03:NAME` names a cell of chapter 03.
CONTRIBUTING.md has the rules.
"""

import ast
import re
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import nbformat

ROOT = Path(__file__).resolve().parents[2]
CLAIM = re.compile(r"<!-- claim: (measured|proved|cited) ([^>]+?) -->")
FORECAST = re.compile(r"\W*(?:So |What to )?expect", re.I)
EQUATION = re.compile(r"\((eq-[\w-]+)\)\s*\n\s*<!-- equation: ([^>]+?) -->")
LABEL = re.compile(r"(?:^|\s)\(((?:eq|sec)-[\w-]+)\)(?:=|\s*$)", re.M)
PAPER = (
    r"(Improved DDPM|DDPM|DDIM|Score SDE|NCSN|DPM-Solver\+\+|DPM-Solver|EDM|VDM"
    r"|Flow Matching|Rectified Flow|CFG|ADM|RePaint)"
)
SOURCE = re.compile(PAPER + r" ((?:eq|alg|sec|app|table)\. [\w.]+(?:, (?=\d)[\w.]+)*)")
NUMBER = re.compile(r"\d\.\d|\d\s?%|\d,\d{3}")
STATUSES = ("proved", "measured", "cited")


class Page(NamedTuple):
    """A page of the book: its path from the root, its title, its cells as (kind, source)."""

    path: str
    title: str
    cells: list[tuple[str, str]]


class Claim(NamedTuple):
    """A supported sentence: where it stands, what it says, how it is supported, by what."""

    page: Page
    sentence: str
    status: str
    support: str


@cache
def pages() -> list[Page]:
    """The chapters in order, then the pages of `book/` that are written by hand."""
    found = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = [(c.cell_type, c.source) for c in nbformat.read(path, as_version=4).cells]
        found.append(page(path, cells))
    for path in sorted((ROOT / "book").glob("*.md")):
        if path.name not in ("ledger.md", "equations.md"):
            found.append(page(path, [("markdown", path.read_text(encoding="utf-8"))]))
    return found


def page(path: Path, cells: list[tuple[str, str]]) -> Page:
    """The page at `path`, titled by its first heading."""
    title = next(m[1] for kind, s in cells if (m := re.search(r"^# (.+)$", s, re.M)))
    return Page(str(path.relative_to(ROOT)), title, cells)


def claims(page: Page) -> list[Claim]:
    """The marked sentences of a page, in order."""
    found = []
    for kind, source in page.cells:
        for block in blocks(source) if kind == "markdown" else []:
            term, _, text = block.rpartition("\n: ")
            begin = 0
            for match in CLAIM.finditer(text):
                said = plain(text[begin : match.start()])
                sentence = f"{term}: {said}" if term else last_sentence(said)
                found.append(Claim(page, sentence, match[1], match[2]))
                begin = match.end()
    return found


def plain(text: str) -> str:
    """A passage on one line, without list marks or an equation's label."""
    text = re.sub(r"<!--.*?-->|^\s*(?:[-*]|\d+\.) |<[^>]+>", " ", text, flags=re.S)
    return re.sub(r"\$\$(.+?)\$\$(?:\s*\([\w-]+\))?", r"$\1$", " ".join(text.split())).strip()


def last_sentence(text: str) -> str:
    """The last sentence of a passage."""
    return re.split(r"(?<=[.!?])\s+(?=[A-Z$\[`\"*])", text)[-1]


@cache
def labels() -> dict[str, Page]:
    """Every equation's and section's label of the book, and its page."""
    texts = [(p, s) for p in pages() for kind, s in p.cells if kind == "markdown"]
    return {match[1]: p for p, s in texts for match in LABEL.finditer(s)}


@cache
def keys() -> set[str]:
    """The keys of the bibliography."""
    text = (ROOT / "book" / "references.bib").read_text(encoding="utf-8")
    return set(re.findall(r"^@\w+\{([^,\s]+),", text, re.M))


def home(claim: Claim) -> Page | None:
    """The page with the cell that measures a claim: its own, or chapter 03's for `03:NAME`."""
    chapter, colon, _ = claim.support.partition(":")
    starts = f"notebooks/{chapter}-" if colon else claim.page.path
    return next((p for p in (claim.page, *pages()) if p.path.startswith(starts)), None)


def anchor(claim: Claim) -> str | None:
    """A link target for what supports a claim; None where there is no such thing."""
    if claim.status == "cited":
        key = claim.support.split(",")[0]
        return f"#{key}" if key in keys() and "," in claim.support else None
    if claim.status == "proved":
        return f"#{claim.support}" if claim.support in labels() else None
    if (page := home(claim)) is None:
        return None
    place, name = Path("..", page.path).as_posix(), claim.support.split(":")[-1]
    mark = re.compile(rf"# claim: .*(?<![\w-]){re.escape(name)}(?![\w-])")
    for kind, source in page.cells:
        if kind == "markdown" and (found := re.findall(r"^\((sec-[\w-]+)\)=", source, re.M)):
            place = f"#{found[-1]}"
        if kind == "code" and mark.search(source):
            return place if "assert" in source else None
    return None


def unmarked(page: Page) -> list[str]:
    """Sentences that state a number, and bullets that state a result, without a claim's mark."""
    found, section = [], ""
    for source in (s for kind, s in page.cells if kind == "markdown"):
        for block in blocks(source):
            if heading := re.match(r"#+ (.+)", block):
                section = heading[1]
            if section in ("Exercises", "References") or section.startswith("Exercise "):
                continue
            bullet = section in ("What we saw", "In practice") and re.match(r"\s*[-*] ", block)
            if (bullet or "\n: " in block) and not CLAIM.search(block):
                found.append(" ".join(block.split()))
            found += [s for s in bare(block) if NUMBER.search(s)]
    return found


def blocks(source: str) -> list[str]:
    """The paragraphs and list items of Markdown, without fenced code, tables, and the opening."""
    source = re.sub(r"(?ms)^```.*?^```|^\|.*?$|^\$\$.*?\$\$(?: \([\w-]+\))?$", "", source)
    source = re.sub(r"(?m)^\*\*(?:Time|You need).*(?:\n.+)*", "", source)
    return [b for b in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) |#)", source) if b.strip()]


def bare(block: str) -> list[str]:
    """Its sentences that no mark follows, without formulas, code, terms and citations."""
    kept = re.sub(r"^.*\n: |\[[^]]*\]\(#[a-z]+\d{4}\w*\)|<!-- equation: .*?-->", "", block)
    text = re.sub(r"`[^`]*`|\$[^$]*\$|(?<=\])\([^)]*\)", "", kept)
    text = re.sub(
        r"[^.!?]*(?:\d\.\d[^.!?]*)*[.!?:;]?[)\s*]*" + CLAIM.pattern, "", " ".join(text.split())
    )
    return re.split(r"(?<=[.!?])\s+", text)


def ledger() -> str:
    """The text of book/ledger.md."""
    everything = [c for p in pages() for c in claims(p)]
    counts = ", ".join(f"{sum(c.status == s for c in everything)} {s}" for s in STATUSES)
    lines = [
        "# The claims ledger",
        "",
        "Nothing in this book is merely claimed. Here is every marked sentence with its support:",
        "*proved* where the link leads, *measured* by a cell that asserts the number and tests",
        "replay, or *cited* with the place in the paper. A *forecast* was written down before its",
        "cell ran; whether it held is said on the page, after the cell. The list is generated from",
        "the pages; a test holds that it is complete and that each support exists.",
        f"It has {len(everything)} entries: {counts}.",
    ]
    for p in pages():
        if found := claims(p):
            lines += ["", f"## {p.title}", ""]
            for c in found:
                forecast = c.status == "measured" and FORECAST.match(c.sentence)
                how = "forecast, tested" if forecast else c.status
                lines.append(f"- {c.sentence} *{how}:* [{c.support}]({anchor(c)})")
    return "\n".join(lines) + "\n"


@cache
def functions() -> dict[str, tuple[str, set[str]]]:
    """Qualified name -> (file, tags) of all in the module whose docstring has an equation tag."""
    found = {}
    for path in sorted((ROOT / "minddpm").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        module = ".".join(path.relative_to(ROOT / "minddpm").with_suffix("").parts)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                text = ast.get_docstring(node) or ""
                if tags := tags_in(" ".join(re.findall(r"\(([^()]*\.[^()]*)\)", text))):
                    found[f"{module}.{node.name}"] = (str(path.relative_to(ROOT)), tags)
    return found


def tags_in(text: str) -> set[str]:
    """Tags such as `DDPM eq. 7`; a list such as `DDPM eq. 6, 7` is taken apart."""
    found = set()
    for paper, places in SOURCE.findall(text):
        kind, numbers = places.split(" ", 1)
        found |= {f"{paper} {kind} {n.strip().rstrip('.')}" for n in numbers.split(",")}
    return found


@cache
def tests() -> dict[str, set[str]]:
    """Name used in a test -> the tests that use it, as file::test."""
    found = {}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for part in ast.walk(node):
                    name = getattr(part, "id", None) or getattr(part, "attr", None)
                    found.setdefault(name, set()).add(f"{path.name}::{node.name}")
    return found


def order(tag: str) -> tuple:
    """Papers together, then kinds of place, then numbers as numbers."""
    paper, kind, number = re.fullmatch(PAPER + r" (\w+)\. (.+)", tag).groups()
    return paper, kind, [part.zfill(4) for part in number.split(".")]


def equations() -> str:
    """The text of book/equations.md."""
    home = re.search(r"^  url: (\S+)$", (ROOT / "_config.yml").read_text(), re.M)[1]
    written = {}
    for p in pages():
        for _, source in p.cells:
            for label, tags in EQUATION.findall(source):
                for tag in tags_in(tags):
                    written.setdefault(tag, []).append(label)
    coded = {}
    for name, (file, tags) in functions().items():
        for tag in tags:
            coded.setdefault(tag, []).append((name, file))
    lines = [
        "# The equation map",
        "",
        "From the papers' equations, algorithms and sections to the derivation in this book, the",
        "function that computes it, and the tests that use that function, counted in each file.",
        "An empty place means: no derivation, no function, or no test that calls it. Made from",
        "docstrings and labels, and checked by a test. Numbers are those of the published papers.",
        "ADM is [Dhariwal and Nichol](#dhariwal2021), CFG [Ho and Salimans](#ho2022cfg), RePaint",
        "[Lugmayr et al.](#lugmayr2022), Flow Matching [Lipman et al.](#lipman2023flow),",
        "Rectified Flow [Liu et al.](#liu2023rectified); the other names are on the page of",
        "[notation](#sec-clashes).",
        "",
        "| source | derived in | function | tests |",
        "| --- | --- | --- | --- |",
    ]
    for tag in sorted(written.keys() | coded.keys(), key=order):
        derived = "<br>".join(
            f"[{labels()[label].title}](#{label})" for label in sorted(set(written.get(tag, [])))
        )
        named = [f"[`{n}`]({home}/blob/main/{f})" for n, f in coded.get(tag, [])]
        used = {t for n, _ in coded.get(tag, []) for t in tests().get(n.rsplit(".", 1)[1], ())}
        files = sorted({t.split("::")[0] for t in used})
        cells = (tag, derived, "<br>".join(named), "<br>".join(counted(files, used)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def counted(files: list[str], used: set[str]) -> list[str]:
    """Each test file with the number of its tests in `used`."""
    return [f"`{f}` ({sum(t.startswith(f + '::') for t in used)})" for f in files]


def unsupported() -> list[str]:
    """One line for each claim whose support does not exist."""
    return [
        f"{c.page.path}: nothing supports «{c.sentence}» ({c.status} {c.support})"
        for p in pages()
        for c in claims(p)
        if anchor(c) is None
    ]


def main() -> None:
    """Write both pages, or with --check compare."""
    problems = unsupported()
    for name, text in (("ledger.md", ledger()), ("equations.md", equations())):
        path = ROOT / "book" / name
        if "--check" in sys.argv:
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                problems.append(f"book/{name} is not up to date: run make backmatter")
        else:
            path.write_text(text, encoding="utf-8")
    print("\n".join(problems) or "every claim is supported")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
