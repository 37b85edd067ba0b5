"""A hook of mkdocs: what stands in the project's root is on the site too, and is written once.

CONTRIBUTING.md, CHANGELOG.md and CITATION.cff become pages. The address of the repository comes
from pyproject.toml: with a `Repository` among its URLs, pages link to their source.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]


def text(name: str) -> str:
    """A file of the root."""
    return (ROOT / name).read_text(encoding="utf-8")


def citation() -> str:
    """How to cite: README's entry for BibTeX, and the file that tools read."""
    _, _, entry = text("README.md").partition("\n## Cite\n")
    fence = "```"
    return f"# Citation\n{entry}\nTools read `CITATION.cff`:\n\n{fence}yaml\n{text('CITATION.cff')}{fence}\n"


def on_config(config: MkDocsConfig) -> None:
    project = tomllib.loads(text("pyproject.toml"))["project"]
    if repository := project.get("urls", {}).get("Repository"):
        config.repo_url, config.repo_name = repository, project["name"]
        config.edit_uri = "edit/main/docs/"


def on_files(files: Files, config: MkDocsConfig) -> None:
    pages = {name: text(f"{name.upper()}.md") for name in ("contributing", "changelog")}
    pages = {name: page.replace("](docs/", "](") for name, page in pages.items()}
    for name, page in {**pages, "citation": citation()}.items():
        files.append(File.generated(config, f"{name}.md", content=page))
