"""The project's rules for style, imports, requirements and size, and the maps in its documents."""
import ast
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = {"planner", "qa", "ipu_options", "runtime", "poptorch_host", "train", "infer"}
# These come with the Poplar SDK, or an error message asks for them where they are needed.
OPTIONAL = {"popdist", "poptorch", "libpvti", "pva", "wandb", "dash", "plotly",
            "flask", "werkzeug"}
PACKAGES = {"yaml": "pyyaml"}  # {imported name: name of its package}, where the two differ
# Most lines of Python in a folder, blank ones and comments too; CONTRIBUTING says how one rises.
BUDGET = {"planner": 4622, "qa": 6227, "ipu_options": 1326, "runtime": 1237, "poptorch_host": 3264,
          "benchmarks": 1035, "train.py": 175, "infer.py": 100}
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "poptorch_host/README.md",
             *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").glob("*.md"))))
# Flags of torchrun, poprun, Slurm, docker and pytest that the documents name.
FOREIGN = {"nnodes", "node-rank", "master-addr", "nproc-per-node", "rdzv-backend", "rdzv-endpoint",
           "host", "num-instances", "num-replicas", "ipus-per-replica", "mpi-global-args",
           "executable-cache-path", "vipu-server-host", "vipu-partition", "ntasks-per-node",
           "nodes", "exclusive", "signal", "rm", "dist", "help"}


def run(*command):
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True)


def test_ruff_finds_nothing():
    done = run("ruff", "check", ".")
    assert done.returncode == 0, done.stdout


def test_imports_keep_the_layers_and_make_no_circle():
    """Check pyproject.toml's contracts; the import-linter that knows them all needs Python 3.10."""
    pytest.importorskip("importlinter.contracts.acyclic_siblings")
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(sys.version_info < (3, 10), reason="needs sys.stdlib_module_names")
def test_requirements_name_every_package_that_is_imported():
    imported = set()
    files = [ROOT / "train.py", ROOT / "infer.py",
             *(path for name in OURS for path in (ROOT / name).rglob("*.py"))]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    imported -= OURS | OPTIONAL | set(sys.stdlib_module_names) | {"__future__"}
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = {re.split(r"[^\w-]", line)[0].lower() for line in lines if not line.startswith("#")}
    assert {PACKAGES.get(name, name).lower() for name in imported} == required


# ---- Size and maps ----


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def modules(folder):
    """The paths of a folder's Python files, of a file its own, without the marks of packages."""
    files = sorted((ROOT / folder).rglob("*.py")) or [ROOT / folder]
    return [path.relative_to(ROOT).as_posix() for path in files
            if path.name not in ("__init__.py", "__main__.py")]


def test_no_folder_has_more_lines_than_its_budget(capsys):
    lines = {folder: sum(len(path.read_text(encoding="utf-8").splitlines())
                         for path in (sorted((ROOT / folder).rglob("*.py")) or [ROOT / folder]))
             for folder in BUDGET}
    with capsys.disabled():
        print(f"\nlines: {', '.join(f'{folder} {count:,}' for folder, count in lines.items())}; "
              f"{sum(lines.values()):,} in all")
    over = {folder: (count, BUDGET[folder]) for folder, count in lines.items()
            if count > BUDGET[folder]}
    assert not over, f"{{folder: (lines, budget)}} {over}"


def in_tree(text, root=""):
    """The modules that an indented tree in a document names, as paths.

    A line has names, two or more spaces, and a description. A name that ends with / is a folder,
    with its modules indented below it.
    """
    folders, paths = [(-1, root)], []
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        names = re.split(r" {2,}", line.strip())[0].split()
        while folders[-1][0] >= indent:
            folders.pop()
        if names and names[0].endswith("/"):
            folders.append((indent, folders[-1][1] + names[0]))
        else:
            paths += [folders[-1][1] + name.replace(".py", "") + ".py" for name in names]
    return paths


def test_each_module_is_in_exactly_one_map():
    """CONTRIBUTING's tree, the planner's docstring or the table in poptorch_host's README."""
    tree, = re.findall(r"(?m)^## Where things are\n\n((?: {4}.*\n)+)", read("CONTRIBUTING.md"))
    planner, = re.findall(r"(?m)((?:^ {4}\w[\w ]* {3,}\w.*\n)+)", read("planner/__init__.py"))
    table = "".join(re.findall(r"(?m)^\|.*\|$", read("poptorch_host/README.md")))
    named = [*in_tree(tree), *in_tree(planner, "planner/"),
             *(f"poptorch_host/{name}" for name in re.findall(r"`(\w+\.py)`", table))]
    assert sorted(named) == sorted(path for folder in BUDGET for path in modules(folder))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_each_path_and_link_in_a_document_exists(name):
    text = read(name)
    tops = "|".join(re.escape(path.name) for path in ROOT.iterdir() if path.is_dir())
    paths = [ROOT / path.split("::")[0] for span in re.findall(r"`([^`\n]+)`", text)
             for path in re.findall(rf"(?<![\w/.-])((?:{tops})/[\w./*-]*\w)", span)
             if not path.startswith("output")]
    paths += [(ROOT / name).parent / link.split("#")[0]
              for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [path for path in paths if not any(ROOT.glob(str(path.resolve().relative_to(ROOT))))]
    assert not missing


def test_each_name_in_how_to_add_is_defined():
    code = "\n".join(read(path) for folder in ("qa", "planner", "ipu_options", "tests")
                     for path in modules(folder))
    how = read("CONTRIBUTING.md").partition("## How to add")[2]
    names = set(re.findall(r"`([A-Za-z_]\w*)(?:\(\))?`", how))
    assert {name for name in names if not re.search(rf"\b{name}\b", code)} <= {"poptorch_host"}


def all_flags():
    """All flags of the project's programs, with the names of a dataclass's fields or arguments."""
    import planner.commands  # noqa: F401
    from benchmarks.__main__ import HIDDEN, MODULE_OF
    from runtime.flags import Settings
    names, groups = set(FOREIGN), [Settings]
    for group in groups:  # grows
        groups += group.__subclasses__()
        for field in group.__dataclass_fields__.values():
            names |= {field.name, *field.metadata.get("aliases", ())}
    for benchmark, module in {**MODULE_OF, **HIDDEN}.items():
        function = getattr(importlib.import_module(f"benchmarks.{module}"), benchmark)
        names |= set(inspect.signature(function).parameters)
    for path in (ROOT / "tests/conftest.py", ROOT / "qa/settings.py",
                 *(ROOT / "tests/tools").glob("*.py")):
        names |= set(re.findall(r'"--(\w+)"', path.read_text(encoding="utf-8")))
    return names


def test_each_flag_and_command_in_the_documents_exists():
    text = "".join(map(read, DOCUMENTS))
    assert set(re.findall(r"(?<![\w-])--([a-zA-Z][\w-]*)", text)) - all_flags() == set()
    commands = {name: read(f"{name}/{file}") for name, file in (
        ("planner", "commands.py"), ("benchmarks", "__main__.py"))}
    for module, command in re.findall(r"python -m ([\w.]+)(?:[ \n]+([a-z_]+)\b(?![./=]))?", text):
        assert importlib.util.find_spec(module), module
        assert not command or module not in commands or f'"{command}"' in commands[module], command
    scripts = set(re.findall(r"python (\w+\.py)", text))
    assert all((ROOT / script).exists() for script in scripts)
