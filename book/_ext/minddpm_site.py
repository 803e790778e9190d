"""What `_config.yml` cannot say.

- Options of the theme: in `_config.yml` they would replace those that Jupyter Book sets.
- REPOSITORY_URL and REPOSITORY_BRANCH, where set, stand in for the repository in `_config.yml`.
- MathJax travels with the site, so that no page asks another host for anything.
- Jupyter Book always adds thebe, which names a script on another host; here it goes.
- A folded cell is named by its first line: `# @title Solution 1`, as on Colab.
- Bibliography keys and glossary terms are targets of plain Markdown links, which unlike roles also
  read well on Colab: `[Ho et al. (2020)](#ho2020)`, `[bound](#term-variational-bound)`.
"""

import importlib.util
import os
import shutil
from pathlib import Path

from docutils import nodes

THEME_OPTIONS = {
    "logo": {"text": "minddpm", "alt_text": "minddpm: a digit dissolving into noise"},
    "use_fullscreen_button": False,
}
MATHJAX_PARTS = ("tex-chtml.js", "input/tex/extensions", "output/chtml/fonts/woff-v2")


def set_theme_options(app, config):
    """Options of the theme; the environment may name the repository that buttons lead to."""
    config.html_theme_options.update(THEME_OPTIONS)
    for option in ("repository_url", "repository_branch"):
        if value := os.environ.get(option.upper()):
            config.html_theme_options[option] = value


def remove_thebe(app, config):
    """Disconnect thebe from all but its style sheet: the book does not use it."""
    for event, entries in app.events.listeners.items():
        if event != "builder-inited":
            kept = [entry for entry in entries if entry.handler.__module__ != "sphinx_thebe"]
            app.events.listeners[event] = kept


def name_folded_cells(app, doctree):
    """Let a fold say `Solution 1, in code` where its cell begins with `# @title Solution 1`."""
    for cell in doctree.findall(nodes.container):
        source = next((code.astext() for code in cell.findall(nodes.literal_block)), "")
        if cell.get("hide_mode") and source.startswith("# @title "):
            title = source.split("\n")[0].removeprefix("# @title ")
            cell["prompt_show"] = cell["prompt_hide"] = f"{title}, in code"


def _authors_and_year(entry):
    """`Ho et al. (2020)`: the text of a link that has none of its own."""
    people = entry.persons.get("author", [])
    names = [" ".join(person.prelast_names + person.last_names) for person in people]
    if len(names) > 2:
        names = [f"{names[0]} et al."]
    return f"{' and '.join(names)} ({entry.fields['year']})"


def register_link_targets(app, env):
    """Make every bibliography key and glossary term a label that `[text](#label)` finds."""
    std = env.get_domain("std")
    for citation in env.get_domain("cite").citations:
        place = (citation.bibliography_key.docname, citation.citation_id)
        std.anonlabels[citation.key.lower()] = place
        std.labels[citation.key.lower()] = (*place, _authors_and_year(citation.entry))
    for (kind, name), place in list(std.objects.items()):
        if kind == "term":
            std.anonlabels[place[1].lower()] = place
            std.labels[place[1].lower()] = (*place, name)


def copy_mathjax(app, error):
    """Put the 2 MB of MathJax that the pages use beside them."""
    if error or app.builder.format != "html":
        return
    package = importlib.util.find_spec("sphinx-mathjax-offline")
    source = Path(package.origin).parent / "static" / "mathjax"
    target = Path(app.outdir) / "_static" / "mathjax"
    for part in MATHJAX_PARTS:
        (target / part).parent.mkdir(parents=True, exist_ok=True)
        if (source / part).is_dir():
            shutil.copytree(source / part, target / part, dirs_exist_ok=True)
        else:
            shutil.copy2(source / part, target / part)


def setup(app):
    """Connect the above; link targets wait until sphinxcontrib-bibtex has its citations."""
    app.connect("config-inited", set_theme_options)
    app.connect("config-inited", remove_thebe)
    app.connect("doctree-read", name_folded_cells)
    app.connect("env-updated", register_link_targets, priority=900)
    app.connect("build-finished", copy_mathjax)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
