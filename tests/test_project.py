"""The files around the code agree with each other."""

import re
import shutil
import tomllib
from pathlib import Path

import check_site
import execute_notebooks
import pytest
import set_repository
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINS = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
TESTED = ["3.11", "3.12", "3.13"]


def load(name):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_environment_yml_installs_what_pyproject_names():
    *packages, pip = load("environment.yml")["dependencies"]
    python = next(Requirement(package) for package in packages if package.startswith("python"))
    assert "pip" in packages
    assert pip == {"pip": [f"-e .[{','.join(sorted(EXTRAS))}]"]}
    offered = [f"3.{minor}" for minor in range(20) if python.specifier.contains(f"3.{minor}")]
    assert offered == TESTED
    assert SpecifierSet(PROJECT["requires-python"]) == SpecifierSet(f">={TESTED[0]}")


def test_ci_tests_each_python_that_environment_yml_offers():
    jobs = load(".github/workflows/ci.yml")["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == TESTED
    assert {"test", "book"} <= set(jobs["publish"]["needs"])


def test_constraints_are_plain_pins():
    for line in PINS:
        pin = Requirement(line)
        assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(pin.specifier)), f"not a plain pin: {line}"
        assert pin.url is None


@pytest.mark.parametrize("python", TESTED)
def test_constraints_satisfy_pyproject(python):
    place = {"python_version": python, "python_full_version": f"{python}.5"}
    pins = {}
    for pin in map(Requirement, PINS):
        if pin.marker is None or pin.marker.evaluate(place):
            pins[canonicalize_name(pin.name)] = Version(str(pin.specifier).removeprefix("=="))
    for line in [*PROJECT["dependencies"], *EXTRAS["book"], *EXTRAS["test"]]:
        needed = Requirement(line)
        assert needed.specifier.contains(pins[canonicalize_name(needed.name)]), line


def test_citation_and_project_agree():
    citation = load("CITATION.cff")
    assert citation["version"] == PROJECT["version"]
    assert PROJECT["license"] in citation["license"]
    assert citation["repository-code"] == PROJECT["urls"]["Repository"]
    assert citation["url"] == PROJECT["urls"]["Book"]


def test_every_mention_of_the_repository_follows_config():
    assert not set_repository.strays(ROOT), "run: make repository"
    url = load("_config.yml")["repository"]["url"]
    assert url == set_repository.configured_url(ROOT)
    assert PROJECT["urls"]["Repository"] == url


@pytest.mark.parametrize(
    "mention",
    [
        "https://github.com/{0}/blob/main/x.py",
        "git+https://github.com/{0}.git",
        "https://colab.research.google.com/github/{0}/blob/main/notebooks/x.ipynb",
    ],
)
def test_mentions_are_found_in_every_form(mention):
    new = "https://github.com/some-one/elsewhere.py"
    moved = set_repository.follow(mention.format("old/minddpm"), new, {"minddpm"})
    assert moved == mention.format("some-one/elsewhere.py")


def test_mentions_of_pages_follow_and_others_stay():
    new = "https://github.com/someone/else"
    page = "https://{}.github.io/{}/x"
    moved = set_repository.follow(page.format("old", "minddpm"), new, {"minddpm"})
    assert moved == page.format("someone", "else")
    for other in (
        "https://github.com/old/minddpm-extras",
        "https://github.com/hojonathanho/diffusion",
    ):
        assert set_repository.follow(other, new, {"minddpm"}) == other


def test_moving_the_repository_takes_every_mention_along(tmp_path, monkeypatch):
    names = ("_config.yml", "README.md", "CITATION.cff", "pyproject.toml")
    for name in names:
        shutil.copy(ROOT / name, tmp_path / name)
    listing = [tmp_path / name for name in names]
    monkeypatch.setattr(set_repository, "tracked_files", lambda root: listing)
    old = set_repository.configured_url(ROOT)
    set_repository.main(["https://github.com/someone/diffuse.git"], tmp_path)
    assert set_repository.configured_url(tmp_path) == "https://github.com/someone/diffuse"
    assert not any(old in path.read_text(encoding="utf-8") for path in listing)
    set_repository.main([old], tmp_path)
    for name in names:
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes()


def test_a_home_that_is_not_on_github_is_refused():
    with pytest.raises(SystemExit, match="is not of the form"):
        set_repository.owner_and_name("https://example.org/minddpm")


def test_every_page_in_the_table_of_contents_exists():
    contents = load("_toc.yml")
    chapters = [chapter["file"] for part in contents["parts"] for chapter in part["chapters"]]
    for file in [contents["root"], *chapters]:
        assert list(ROOT.glob(f"{file}.*")), f"{file} is in _toc.yml and nowhere else"


def test_bibliography_keys_can_be_link_targets():
    text = (ROOT / "book/references.bib").read_text(encoding="utf-8")
    keys = re.findall(r"(?m)^@\w+\{(.+),$", text)
    assert len(keys) == len(set(keys))
    assert all(re.fullmatch(r"[a-z]+\d{4}[a-z0-9]*", key) for key in keys)


def test_cell_ids_depend_on_the_source_alone():
    cell = {"cell_type": "code", "source": "x = 1"}
    ids = execute_notebooks.cell_ids({"cells": [cell, cell, {**cell, "source": "x = 2"}]})
    assert len(set(ids)) == 3
    assert ids[0] == execute_notebooks.cell_ids({"cells": [cell]})[0]


def test_streams_that_arrive_in_pieces_are_joined():
    def piece(name, text):
        return {"output_type": "stream", "name": name, "text": text}

    outputs = [piece("stdout", "a"), piece("stderr", "!"), piece("stdout", "b")]
    assert execute_notebooks.join_streams(outputs) == [piece("stdout", "ab"), piece("stderr", "!")]


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        ('<script src="https://cdn.example/x.js"></script>', "loads https://cdn.example/x.js"),
        ('<link rel="stylesheet" href="//cdn.example/x.css">', "loads //cdn.example/x.css"),
        ("<style>@import 'https://cdn.example/x'</style>", "loads https://cdn.example/x"),
        ('<p style="background:url(http://cdn.example/x)">', "loads http://cdn.example/x"),
        ('<img src="missing.png">', "misses missing.png"),
        ('<a href="missing.html">x</a>', "links to missing.html"),
        ('<a href="#nowhere">x</a>', "links to #nowhere"),
    ],
)
def test_check_site_finds(tmp_path, page, problem):
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    assert check_site.problems(tmp_path) == [f"page.html {problem}"]


def test_check_site_accepts_links_to_other_hosts(tmp_path):
    page = '<a href="https://arxiv.org">x</a><a href="#here" id="here"></a><img src="data:,">'
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    assert check_site.problems(tmp_path) == []
    assert check_site.problems(tmp_path / "nothing")
