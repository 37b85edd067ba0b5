"""Opens every page of the built site in a browser, as a reader would: `nox -s site` runs it.

Wide and narrow, light and dark: nothing overflows the page, code fits its column, tables scroll,
nothing is asked of another host, all links and anchors are there, and the search finds what a
newcomer looks for.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

from playwright.sync_api import Browser, Page, TimeoutError, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = {"wide": 1280, "narrow": 390}
SCHEMES = ("light", "dark")
RESULT = ".md-search-result__link"
WAIT = 20_000  # milliseconds: the browser builds the index first
SEARCHES = {  # what is typed -> a page that must be among the results
    "install": "install/",
    "QLoRA": "faq/",
    "OOM": "troubleshooting/",
    "merge": "merging/",
    "LoraConfig": "from-peft/",
}

# What is wrong with the layout of a page, as a list of sentences.
LAYOUT = r"""
() => {
  const wrong = [], width = document.documentElement.clientWidth
  const wide = document.documentElement.scrollWidth
  if (wide > width) wrong.push(`the page is ${wide} wide on ${width}`)
  const startOf = node => node.textContent.trim().replace(/\s+/g, " ").slice(0, 40)
  const scrolls = node => ["auto", "scroll"].includes(getComputedStyle(node).overflowX)
  const held = node => {
    for (let box = node; box && box.tagName != "ARTICLE"; box = box.parentElement)
      if (scrolls(box) && box.getBoundingClientRect().right <= width + 1) return true
    return false
  }
  for (const code of document.querySelectorAll("article pre > code")) {
    const start = startOf(code)
    if (!held(code)) wrong.push(`code leaves its column: ${start}`)
    const program = code.closest(".language-python, .language-bash")
    if (width > 1000 && program && code.scrollWidth > code.clientWidth + 1)
      wrong.push(`code is wider than its column: ${start}`)
  }
  for (const table of document.querySelectorAll("article table")) {
    const right = table.getBoundingClientRect().right
    if (right > width && !held(table.parentElement))
      wrong.push(`a table hides columns: ${startOf(table)}`)
  }
  return wrong
}
"""


class Document(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {given[name] or "" for name in ("id", "name") if name in given}
        self.links += [given[name] or "" for name in ("href", "src") if name in given]


def broken_links(site: Path) -> Iterator[str]:
    """Links that lead nowhere on the site, and files that come from elsewhere."""
    documents = {
        f"/{page.relative_to(site).as_posix()}".removesuffix("index.html"): Document(
            page.read_text(encoding="utf-8")
        )
        for page in site.rglob("*.html")
    }
    for address, document in documents.items():
        for link in document.links:
            path, anchor = urldefrag(urljoin(address, link))
            if "://" in path or path.startswith(("mailto:", "data:")):
                continue
            if path in documents:
                if unquote(anchor) not in documents[path].anchors:
                    yield f"{address}: {link} has no such anchor"
            elif not (site / path.lstrip("/")).is_file():
                yield f"{address}: {link} is not there"


@contextmanager
def served(site: Path) -> Iterator[str]:
    """The address of the site, as long as the block runs."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    handler = functools.partial(Handler, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def opened(browser: Browser, width: int, scheme: str, address: str, left: list[str]) -> Page:
    """An empty tab; requests to other hosts are refused, and added to `left`."""
    size = {"width": width, "height": 900}
    tab = browser.new_page(viewport=size, color_scheme=scheme)  # pyright: ignore

    def watch(route, request):
        if request.url.startswith((address, "data:", "blob:")):
            return route.continue_()
        left.append(request.url)
        return route.abort()

    tab.route("**/*", watch)
    return tab


def check_layout(browser: Browser, address: str, pages: list[str], out: Path) -> Iterator[str]:
    """What is wrong with a page in any width and scheme. Screenshots of all go to `out`."""
    for name, width in WIDTHS.items():
        for scheme in SCHEMES:
            left: list[str] = []
            tab = opened(browser, width, scheme, address, left)
            for page in pages:
                tab.goto(f"{address}/{page}", wait_until="load")
                for sentence in tab.evaluate(LAYOUT):
                    yield f"/{page} ({name}, {scheme}): {sentence}"
                file = (page.strip("/").replace("/", "-") or "index") + f"-{name}-{scheme}.png"
                tab.screenshot(path=out / file)
            yield from (f"{name}, {scheme}: asked another host for {url}" for url in left)
            tab.close()


def check_search(browser: Browser, address: str) -> Iterator[str]:
    """Which searches do not find their page."""
    tab = opened(browser, 1280, "light", address, [])
    for words, expected in SEARCHES.items():
        tab.goto(address, wait_until="load")  # anew: the last results are gone
        tab.focus("input.md-search__input")
        tab.type("input.md-search__input", words)  # the page listens to keys
        try:
            tab.wait_for_selector(f"{RESULT}[href*='/{expected}']", state="attached", timeout=WAIT)
        except TimeoutError:
            found = tab.eval_on_selector_all(RESULT, "links => links.map(link => link.pathname)")
            yield f"the search for {words!r} finds {found}, and not {expected}"


def main() -> None:
    """Exits with a list of what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("site", type=Path, help="folder with the built site")
    parser.add_argument("--out", type=Path, default=Path("outputs/site"), help="screenshots")
    given = parser.parse_args()
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        sys.exit("no browser: install chromium, as by `apt-get install chromium`")
    given.out.mkdir(parents=True, exist_ok=True)
    pages = sorted(
        str(page.parent.relative_to(given.site).as_posix()).removeprefix(".") + "/"
        for page in given.site.rglob("index.html")
    )
    pages = [page.lstrip("/") for page in pages]
    wrong = list(broken_links(given.site))
    with served(given.site) as address, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        wrong += check_layout(browser, address, pages, given.out)
        wrong += check_search(browser, address)
        browser.close()
    if wrong:
        sys.exit("\n".join([*wrong, f"{len(wrong)} things are wrong; screenshots: {given.out}"]))
    print(f"{len(pages)} pages in {len(WIDTHS) * len(SCHEMES)} views: nothing is wrong")


if __name__ == "__main__":
    main()
