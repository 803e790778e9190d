"""Every bug of chapter 15 is killed: on a copy of the package with that one line, its test fails.

The bugs stand in the notebook alone. Run as a script with a folder, this file makes such copies
there and runs the tests on them, in children forked after the slow imports.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.xdist_group("zoo")  # one process makes the copies for all of them
ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "15-find-the-bug.ipynb"
SLOW = "diffusers.models.unets.unet_2d diffusers.schedulers safetensors.torch scipy.stats "
SLOW += "sklearn.datasets torch.distributions torch.optim.swa_utils torch.testing tqdm"


@cache
def zoo():
    """{number: Bug}, from the cells of the notebook that define it."""
    space = {"re": re, "NamedTuple": NamedTuple}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if source.startswith(("class Bug(", "def read_zoo(", "# @title Spoilers")):
            exec(source, space)
    return space["read_zoo"](space["ZOO"])


def copy_of(folder, bug=None):
    """A folder that holds the package, with a bug's line in it."""
    shutil.copytree(ROOT / "minddpm", folder / "minddpm")
    if bug:
        file = folder / "minddpm" / (bug.module.replace(".", "/") + ".py")
        text = file.read_text(encoding="utf-8")
        assert text.count(bug.right) == 1, f"{bug.right!r} stands {text.count(bug.right)} times"
        file.write_text(text.replace(bug.right, bug.wrong), encoding="utf-8")
    return folder


class Witness:
    """A pytest plugin that notes the type of each failure, and how many tests ran."""

    def __init__(self):
        self.errors, self.ran = set(), 0

    def pytest_runtest_makereport(self, call):
        self.ran += call.when == "call"
        if call.excinfo:
            self.errors.add(call.excinfo.type.__name__)


def judge(folder, tests):
    """What pytest says of the tests on the package in a folder, from a child process."""
    reading, writing = os.pipe()
    if child := os.fork():
        os.close(writing)
        with os.fdopen(reading) as pipe:
            said = pipe.read()
        os.waitpid(child, 0)
        return json.loads(said or '{"errors": ["the child died"]}')
    witness = Witness()
    sys.path.insert(0, str(folder))
    options = ["-c", os.devnull, "--rootdir", str(ROOT), "--noconftest", "-x", "--tb=no"]
    options += ["-p", "no:cacheprovider", *(f"{ROOT}/tests/{test}" for test in tests)]
    with open(folder / "log", "w") as log, contextlib.redirect_stdout(log):
        code = pytest.main(options, plugins=[witness])
    seen = {"code": int(code), "errors": sorted(witness.errors), "ran": witness.ran}
    seen["origin"] = str(Path(sys.modules["minddpm"].__file__).parents[1])
    os.write(writing, json.dumps(seen).encode())
    os._exit(0)


def main(folder):
    """Print {number: verdict} of all bugs, and of the healthy package as 0."""
    for name in SLOW.split():
        __import__(name)
    verdicts = {0: judge(copy_of(folder / "0"), sorted({bug.test for bug in zoo().values()}))}
    for number, bug in zoo().items():
        verdicts[number] = judge(copy_of(folder / str(number), bug), [bug.test])
    print(json.dumps(verdicts))


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    folder = tmp_path_factory.mktemp("zoo")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # they cost more than the tests
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = {int(k): v for k, v in json.loads(done.stdout.splitlines()[-1]).items()}
    for number, verdict in found.items():
        assert verdict["origin"] == str(folder / str(number)), "another package was tested"
    return found


def test_all_its_tests_pass_on_the_package_as_it_is(verdicts):
    assert verdicts[0]["code"] == 0 and verdicts[0]["errors"] == []
    assert verdicts[0]["ran"] >= len({bug.test for bug in zoo().values()})


@pytest.mark.parametrize("number", zoo(), ids=lambda n: zoo()[n].name)
def test_the_bug_is_killed(number, verdicts):
    """By an assertion: a bug that only crashes would need no test."""
    found = verdicts[number]
    assert found["code"] == 1 and found["ran"] > 0
    assert found["errors"] and set(found["errors"]) <= {"AssertionError", "Failed"}, found


def test_each_bug_is_one_line_that_stands_once():
    assert list(zoo()) == list(range(1, len(zoo()) + 1)) and len(zoo()) >= 40
    assert len({(bug.module, bug.right, bug.wrong) for bug in zoo().values()}) == len(zoo())
    for bug in zoo().values():
        assert "\n" not in bug.right + bug.wrong and bug.right != bug.wrong


if __name__ == "__main__":
    main(Path(sys.argv[1]))
