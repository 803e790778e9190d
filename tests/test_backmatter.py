"""The claims ledger and the equation map: complete, supported, up to date."""

import backmatter
import pytest

each_page = pytest.mark.parametrize("page", backmatter.pages(), ids=lambda page: page.path)


@each_page
def test_every_claim_is_supported(page):
    assert not [c for c in backmatter.claims(page) if backmatter.anchor(c) is None]


@each_page
def test_every_stated_number_is_marked(page):
    if page.path.startswith("notebooks/"):
        assert not backmatter.unmarked(page)


@pytest.mark.parametrize("name", ["ledger", "equations"])
def test_generated_page_is_up_to_date(name):
    written = (backmatter.ROOT / "book" / f"{name}.md").read_text(encoding="utf-8")
    assert written == getattr(backmatter, name)(), "run make backmatter"


def page(text):
    return backmatter.Page("notebooks/x.ipynb", "X", [("markdown", text)])


@pytest.mark.parametrize(
    "text",
    [
        "The share is 0.95.",
        "It is here. The share is 95 % of it. <!-- claim: measured a -->\nAnd 3.5 is not.",
        "## What we saw\n\n- The noise wins.",
        "A table of 1,797 images.",
    ],
)
def test_a_bare_number_or_result_is_found(text):
    assert backmatter.unmarked(page(text))


@pytest.mark.parametrize(
    "text",
    [
        "The share is 0.95. <!-- claim: measured a -->",
        "First. Then $x = 0.5$ and `0.25`. It is 0.5, not 2.5. <!-- claim: cited b, c -->",
        "## What we saw\n\n- The noise wins. <!-- claim: measured a -->",
        "## Exercises\n\nTake 0.5.",
        "| 0.5 | 0.7 |",
    ],
)
def test_a_marked_number_passes(text):
    assert not backmatter.unmarked(page(text))


def test_a_claim_without_support_is_found():
    code = ("code", "assert x == 1  # claim: known")
    text = "A. <!-- claim: measured known --> B. <!-- claim: measured unknown -->"
    both = backmatter.Page("notebooks/x.ipynb", "X", [("markdown", text), code])
    known, unknown = backmatter.claims(both)
    assert (known.sentence, unknown.sentence) == ("A.", "B.")
    assert backmatter.anchor(known) == "../notebooks/x.ipynb"
    assert backmatter.anchor(unknown) is None
