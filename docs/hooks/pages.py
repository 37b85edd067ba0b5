"""A hook of mkdocs: what stands in the project's root is on the site too, and is written once.

CONTRIBUTING.md and CHANGELOG.md become pages. The pages of examples follow their list in the
navigation. The address of the repository comes from pyproject.toml: with a `Repository` among its
URLs, pages link to their source.
"""

from __future__ import annotations

from importlib.metadata import metadata
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]


def text(name: str) -> str:
    """A file of the root."""
    return (ROOT / name).read_text(encoding="utf-8")


def on_config(config: MkDocsConfig) -> None:
    (research,) = (part["Research"] for part in config.nav or () if "Research" in part)
    pages = sorted(Path(config.docs_dir, "examples").glob("*.md"))
    research += [f"examples/{page.name}" for page in pages]
    urls = dict(url.split(", ") for url in metadata("lora_func").get_all("Project-URL") or ())
    if "Repository" in urls:
        config.repo_url, config.repo_name = urls["Repository"], config.site_name
        config.edit_uri = "edit/main/docs/"


def on_files(files: Files, config: MkDocsConfig) -> None:
    pages = {name: text(f"{name.upper()}.md") for name in ("contributing", "changelog")}
    pages = {name: page.replace("](docs/", "](") for name, page in pages.items()}
    for name, page in pages.items():
        files.append(File.generated(config, f"{name}.md", content=page))
