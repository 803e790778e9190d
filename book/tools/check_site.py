"""Check the built book: all that a page loads lies in it, every link within it leads somewhere.

    python book/tools/check_site.py [_build/html]

A page may *link* to other hosts; it may not *load* anything from them, so that the book works
offline and nobody learns who reads it.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

LOADED = {
    "audio": ("src",), "embed": ("src",), "iframe": ("src",), "image": ("href", "xlink:href"),
    "img": ("src", "srcset"), "input": ("src",), "object": ("data",), "script": ("src",),
    "source": ("src", "srcset"), "track": ("src",), "use": ("href",), "video": ("src", "poster"),
}  # fmt: skip
LOADING_RELATIONS = {"icon", "manifest", "modulepreload", "preload", "preconnect", "stylesheet"}
IN_STYLE = re.compile(r"""url\(\s*["']?([^"')]+)|@import\s+["']([^"']+)""")
ELSEWHERE = re.compile(r"(?i)(?:[a-z][a-z0-9+.-]*:)?//")
IN_SCRIPT = re.compile(r"""(?:fetch|import|\.src\s*=)\s*\(?\s*["'`](https?:[^"'`]+)""")


class Page(HTMLParser):
    """What a page loads, what it links to, and the ids that it offers."""

    def __init__(self, text: str):
        super().__init__()
        self.loads, self.links, self.ids, self.inside = [], [], set(), None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = {name: value or "" for name, value in attributes}
        self.inside = tag
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        self.loads += [values[name] for name in LOADED.get(tag, ()) if name in values]
        self.loads += _style_urls(values.get("style", ""))
        if tag == "link" and LOADING_RELATIONS & set(values.get("rel", "").split()):
            self.loads.append(values["href"])
        if tag == "a" and "href" in values:
            self.links.append(values["href"])

    def handle_data(self, data):
        if self.inside == "style":
            self.loads += _style_urls(data)
        elif self.inside == "script":
            self.loads += IN_SCRIPT.findall(data)

    def handle_endtag(self, tag):
        self.inside = None


def _style_urls(text: str) -> list[str]:
    return [first or second for first, second in IN_STYLE.findall(text)]


def problems(site: Path) -> list[str]:
    """One line for each thing loaded from another host and each link that leads nowhere."""
    site = site.resolve()
    files = [path for path in sorted(site.rglob("*.html")) if "_static" not in path.parts]
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in files}
    found = [] if pages else [f"{site} holds no page: run make book first."]
    for path, page in pages.items():
        where = path.relative_to(site)
        found += _bad_loads(where, path, page.loads)
        found += [f"{where} links to {link}" for link in page.links if _is_dead(path, link, pages)]
    for path in sorted(site.rglob("*.css")):
        found += _bad_loads(path.relative_to(site), path, _style_urls(path.read_text("utf-8")))
    return found


def _bad_loads(where: Path, path: Path, loads: list[str]) -> list[str]:
    bad = []
    for target in loads:
        file = unquote(re.split(r"[?#]", target)[0])
        if ELSEWHERE.match(target):
            bad.append(f"{where} loads {target}")
        elif file and not target.startswith("data:") and not (path.parent / file).exists():
            bad.append(f"{where} misses {target}")
    return bad


def _is_dead(path: Path, link: str, pages: dict) -> bool:
    """Whether a link within the site has no file, or no such place in it."""
    if re.match(r"(?i)[a-z][a-z0-9+.-]*:|//", link):
        return False
    file, fragment = urldefrag(link)
    target = (path.parent / unquote(file.split("?")[0])).resolve() if file else path
    if not target.is_file():
        return True
    return bool(fragment) and target in pages and unquote(fragment) not in pages[target].ids


def main(arguments: list[str]) -> int:
    """Print the problems; 1 if there are any."""
    found = problems(Path(arguments[0] if arguments else "_build/html"))
    print("\n".join(found) or "The site is whole, and loads nothing from another host.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
