"""The shape of the house: package roots, arrows, file sizes."""

import ast
import configparser
import pathlib
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCES = [p for d in ("kernels", "reflow", "bench", "scripts") for p in sorted((ROOT / d).rglob("*.py"))]


def imports(path: pathlib.Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
    return names


def room(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).parts[0]


def test_kernels_is_a_plain_folder():
    # A package called `kernels` shadows the Hugging Face kernel hub client and breaks `import transformers`.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_arrows_run_one_way():
    forbidden = {"kernels": ("reflow", "bench", "scripts"), "reflow": ("bench", "scripts"), "bench": ("scripts",)}
    for path in SOURCES:
        tops = {name.split(".")[0] for name in imports(path)}
        assert not tops & set(forbidden.get(room(path), ())), path


def test_flow_imports_only_torch_and_the_ops():
    for path in (ROOT / "reflow" / "flow").rglob("*.py"):
        tops = {name.split(".")[0] for name in imports(path)}
        assert not tops & {"diffusers", "deepspeed", "transformers", "numpy"}, path
        assert all(name.startswith("reflow.flow") for name in imports(path) if name.split(".")[0] == "reflow"), path


def test_deepspeed_is_imported_in_one_place():
    users = [p for p in SOURCES if any(name.split(".")[0] == "deepspeed" for name in imports(p))]
    assert {p.relative_to(ROOT).as_posix() for p in users} <= {"reflow/training/engine.py"}


def test_files_stay_short():
    for path in SOURCES:
        lines = len(path.read_text().splitlines())
        assert lines <= (300 if path.name == "loop.py" else 400), f"{path} has {lines} lines"


def test_no_file_of_reflow_imports_in_a_circle():
    # Imports inside functions and for type checkers count: they tie files together as well.
    files = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in SOURCES if room(p) == "reflow"}
    arrows = {}
    for name, path in files.items():
        said = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                said |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                # `from package import module` leads to the module; a package's face only passes names on.
                said |= {f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in files else node.module for alias in node.names}
        arrows[name] = said & files.keys() - {name}
    assert arrows["reflow.training.loop"] >= {"reflow.training.engine", "reflow.training.solves"}
    while True:
        ends = [name for name, to in arrows.items() if not to & arrows.keys()]
        if not ends:
            break
        for name in ends:
            del arrows[name]
    assert not arrows, f"these files import each other in circles, or lead into one: {', '.join(sorted(arrows))}"


def test_setup_cfg_lists_every_package():
    cfg = configparser.ConfigParser()
    cfg.read(ROOT / "setup.cfg")
    listed = set(cfg["options"]["packages"].split())
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "reflow").rglob("__init__.py")}
    found |= {".".join(p.parent.relative_to(ROOT / "kernels").parts) for p in (ROOT / "kernels").rglob("__init__.py")}
    assert listed == found


def test_nothing_stands_in_both_config_files():
    cfg = configparser.ConfigParser()
    cfg.read(ROOT / "setup.cfg")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "metadata" not in cfg and "install_requires" not in cfg["options"]
    assert "setuptools" not in project.get("tool", {}) and "pytest" not in project.get("tool", {})


def test_constraints_pin_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["test"]
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert {w.split(">=")[0] for w in wanted} <= pinned
