"""The claims ledger, the corrections and the equation map: complete, supported, up to date."""

import re

import backmatter
import pytest

each_page = pytest.mark.parametrize("page", backmatter.pages(), ids=lambda page: page.path)
CORRECTIONS = next(p for p in backmatter.pages() if p.path == "book/corrections.md")


@each_page
def test_every_claim_is_supported(page):
    assert not [c for c in backmatter.claims(page) if backmatter.anchor(c) is None]


@each_page
def test_no_line_begins_with_a_mark(page):
    # Markdown would take the whole line for HTML, links and formulas included.
    text = "\n".join(source for kind, source in page.cells if kind == "markdown")
    assert not re.findall(r"(?m)^ *<!-- claim:.*", text)


@each_page
def test_every_stated_number_is_marked(page):
    if page.path.startswith("notebooks/") or page is CORRECTIONS:
        assert not backmatter.unmarked(page)


@pytest.mark.parametrize("name", ["ledger", "equations"])
def test_generated_page_is_up_to_date(name):
    written = (backmatter.ROOT / "book" / f"{name}.md").read_text(encoding="utf-8")
    assert written == getattr(backmatter, name)(), "run make backmatter"


def leads_to(link, claim):
    """Whether a link in the text goes where a claim's support is, or to its chapter."""
    if claim.status == "cited":
        return link == f"#{claim.support.split(',')[0]}"
    if claim.status == "proved":
        return link == f"#{claim.support}"
    target = backmatter.labels().get(link[1:])
    path = target.path if target else link.removeprefix("../").split("#")[0]
    return path == backmatter.home(claim).path


def test_every_correction_links_to_its_evidence_and_is_in_the_ledger():
    blocks = [b for _, s in CORRECTIONS.cells for b in backmatter.blocks(s) if "\n: " in b]
    ledger = backmatter.ledger()
    assert len(blocks) > 50
    for block in blocks:
        found = backmatter.claims(CORRECTIONS._replace(cells=[("markdown", block)]))
        links = re.findall(r"\]\(([^)]+)\)", block)
        assert found, block
        for claim in found:
            assert any(leads_to(link, claim) for link in links), claim
            assert claim.sentence in ledger


@pytest.mark.parametrize(
    "support",
    [
        "measured 03:no-such",
        "measured 99:ranked",
        "measured ranked",
        "proved eq-no-such",
        "cited nobody1900, Table 1",
        "cited ho2020",
    ],
)
def test_a_correction_without_evidence_is_found(support):
    text = f'"It is so"\n: It is not. <!-- claim: {support} --> See there.'
    (claim,) = backmatter.claims(CORRECTIONS._replace(cells=[("markdown", text)]))
    assert claim.sentence == '"It is so": It is not.'
    assert backmatter.anchor(claim) is None


def page(text):
    return backmatter.Page("notebooks/x.ipynb", "X", [("markdown", text)])


@pytest.mark.parametrize(
    "text",
    [
        "The share is 0.95.",
        "It is here. The share is 95 % of it. <!-- claim: measured a -->\nAnd 3.5 is not.",
        "## What we saw\n\n- The noise wins.",
        "A table of 1,797 images.",
        '"It is so"\n: It is not.',
        '"It is 0.5"\n: It is not. <!-- claim: cited b, c --> It is 0.6.',
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
        '"It is 0.5"\n: It is 0.6. <!-- claim: cited b, c --> Source: [D, Section 3.1](#d2020).',
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
