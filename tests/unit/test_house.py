"""The layout: imports run one way, and tests lie where their modules do."""

import ast
import re
import subprocess
import sys

from helpers import REPOSITORY

MODULES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path
    for path in sorted((REPOSITORY / "moco").rglob("*.py"))
    if path.name != "__init__.py"
}
FLOORS = (  # a module imports from its own floor and those after it
    {"moco.plot"}, {"moco.evaluation"}, {"moco.training"}, {"moco.options"}, {"moco.data"}, {"moco.processes"},
    {"moco.builder", "moco.views", "moco.negatives", "moco.augment", "moco.encoders"},
    {"moco.distributed", "moco.errors"},
)  # fmt: skip
WITHOUT_TORCH = {
    "moco.errors", "moco.processes.environment", "moco.processes.signals", "moco.processes.exits",
    "moco.training.files", "moco.data.folders", "moco.data.rgb",
}  # fmt: skip


def imported(path):
    """The modules of moco, and the packages, that a file imports, also within functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in names if name in MODULES or "." not in name and name != "moco")


IMPORTS = {name: set(imported(path)) for name, path in MODULES.items()}


def floor(name):
    package = ".".join(name.split(".")[:2])
    return next(number for number, names in enumerate(FLOORS) if package in names)


def reached(name):
    """All that a module imports, and what these import."""
    found, ahead = set(), [name]
    while ahead:
        new = IMPORTS.get(ahead.pop(), set()) - found
        found |= new
        ahead += new
    return found


def test_nothing_from_a_socket_a_store_or_a_file_is_unpickled():
    programs = [path for pattern in ("*.py", "moco/**/*.py", "preprocess/*.py") for path in REPOSITORY.glob(pattern)]
    unpickling = r"\bpickle\b|_object(_list)?\(|weights_only=False\b(?!\))|allow_pickle=True|marshal|shelve|joblib"
    found = {path.name for path in programs if re.search(unpickling, path.read_text())}
    assert found == {"launch.py"}  # for processes that it started itself, over its own pipes


def test_imports_run_one_way_down_without_a_circle():
    down = {name: {other for other in names if other in MODULES} for name, names in IMPORTS.items()}
    up = [(name, other) for name, names in down.items() for other in names if floor(other) < floor(name)]
    assert not up
    assert not [name for name in MODULES if name in reached(name)]


def test_what_preprocess_builds_on_needs_no_pytorch():
    assert not {name: found for name in WITHOUT_TORCH if (found := reached(name) & {"torch", "torchvision"})}
    light = "import sys, moco.errors; assert 'torch' not in sys.modules; assert moco.__version__"
    names = "from moco import MoCo, contrastive_logits, patch_negatives; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", f"{light}; {names}"], cwd=REPOSITORY, check=True)


def test_every_module_has_its_file_of_tests_and_every_file_its_module():
    unit = REPOSITORY / "tests" / "unit"
    expected = {path.relative_to(REPOSITORY / "moco").with_name(f"test_{path.name}") for path in MODULES.values()}
    others = {"preprocess", "test_house.py"}
    found = {path.relative_to(unit) for path in unit.rglob("*.py") if path.relative_to(unit).parts[0] not in others}
    assert found == expected
