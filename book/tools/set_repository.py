"""Make every mention of the project's home follow the one in `_config.yml`.

    python book/tools/set_repository.py                                # follow it
    python book/tools/set_repository.py https://github.com/NAME/REPO   # move there, then follow

Links to GitHub, Colab and Pages are found by their form, so a mention that strayed comes home.
"""

import re
import subprocess
import sys
from pathlib import Path

import execute_notebooks

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "_config.yml"
HOME = re.compile(r"https://github\.com/([\w-]+)/([\w.-]+?)(?:\.git)?/?")
SETTING = re.compile(r"(?m)^(repository:\n  url: )(\S+)$")
TEXT = {"", ".bib", ".cff", ".css", ".ipynb", ".js", ".md", ".py", ".toml", ".yml"}


def configured_url(root: Path = ROOT) -> str:
    """The home of the project, as `_config.yml` has it."""
    return SETTING.search((root / CONFIG).read_text(encoding="utf-8"))[2]


def owner_and_name(url: str) -> tuple[str, str]:
    """The two words of a GitHub address; one clear line for anything else."""
    match = HOME.fullmatch(url)
    if not match:
        raise SystemExit(f"{url} is not of the form https://github.com/OWNER/NAME.")
    return match[1], match[2]


def mention_patterns(names: set[str]) -> list[tuple[re.Pattern, str]]:
    """What a mention of a repository of one of these names looks like, and its replacement."""
    name = "(?:" + "|".join(sorted(map(re.escape, names))) + r")(?![\w-])"
    return [
        (re.compile(rf"\bgithub\.com/[\w-]+/{name}"), "github.com/{owner}/{name}"),
        (re.compile(rf"\bresearch\.google\.com/github/[\w-]+/{name}"),
         "research.google.com/github/{owner}/{name}"),
        (re.compile(rf"\b[\w-]+\.github\.io/{name}"), "{owner}.github.io/{name}"),
    ]  # fmt: skip


def tracked_files(root: Path) -> list[Path]:
    """The text files that git tracks or would track; those of tests/ move addresses for play."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=root, capture_output=True, check=True, text=True).stdout
    names = (name for name in listing.split("\0") if name and not name.startswith("tests/"))
    paths = (root / name for name in names)
    return [path for path in paths if path.suffix in TEXT and path.is_file()]


def follow(text: str, url: str, names: set[str]) -> str:
    """The text, every mention in it naming `url`."""
    owner, name = owner_and_name(url)
    for pattern, replacement in mention_patterns(names | {name}):
        text = pattern.sub(replacement.format(owner=owner, name=name), text)
    return text


def renew_ids(text: str) -> str:
    """A notebook whose source changed has new cell ids, as `make notebooks` gives them."""
    import nbformat

    notebook = nbformat.reads(text, as_version=4)
    execute_notebooks.normalize(notebook)
    return nbformat.writes(notebook).rstrip("\n") + "\n"


def strays(root: Path = ROOT) -> list[Path]:
    """Files that mention another home than `_config.yml` does."""
    versions = _versions(root, configured_url(root))
    return [path for path, before, after in versions if before != after]


def _versions(root: Path, url: str, old: str | None = None):
    """(path, text, text that names `url`) of every file."""
    names = {"minddpm", owner_and_name(old or url)[1]}
    for path in tracked_files(root):
        before = path.read_text(encoding="utf-8")
        yield path, before, follow(before, url, names)


def main(arguments: list[str], root: Path = ROOT) -> None:
    """Move to the URL given, if any, and rewrite the files that name another."""
    old = configured_url(root)
    url = "https://github.com/{}/{}".format(*owner_and_name(arguments[0] if arguments else old))
    config = (root / CONFIG).read_text(encoding="utf-8")
    (root / CONFIG).write_text(SETTING.sub(rf"\g<1>{url}", config), encoding="utf-8", newline="\n")
    for path, before, after in _versions(root, url, old):
        if before != after:
            after = renew_ids(after) if path.suffix == ".ipynb" else after
            path.write_text(after, encoding="utf-8", newline="\n")
            print(f"{path.relative_to(root)} now names {url}")


if __name__ == "__main__":
    main(sys.argv[1:])
