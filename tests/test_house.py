"""The project's rules for style, imports and requirements."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = {"planner", "qa", "ipu_options", "runtime", "poptorch_host", "train", "infer"}
# These come with the Poplar SDK, or an error message asks for them where they are needed.
OPTIONAL = {"popdist", "poptorch", "libpvti", "pva", "matplotlib", "wandb", "dash", "plotly",
            "flask", "werkzeug"}
PACKAGES = {"yaml": "pyyaml"}  # {imported name: name of its package}, where the two differ


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


def test_the_scripts_are_documents():
    for name, most in (("train.py", 170), ("infer.py", 130)):
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        assert len(lines) <= most and max(map(len, lines)) <= 100, name
