"""Each layer imports only what stands below it; what runs between the fork and the wall needs nobody else's code."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import compart

PACKAGE = Path(compart.__file__).parent
ROOT = PACKAGE.parent

SYSTEM = [
    "compart.backend.linux.walls",
    "compart.backend.linux.notify",
    "compart.backend.linux.decode",
    "compart.backend.linux.filters : compart.backend.linux.landlock : compart.backend.linux.mounts : compart.backend.linux.script",
    "compart.backend.linux.bpf",
    "compart.backend.linux.bpf_graph",
    "compart.backend.linux.bpf_code",
    "compart.backend.linux.syscalls",
]
"""The layers of a system's own folder."""


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
NATIVE = {module_of(path): path for path in sorted(PACKAGE.rglob("*.pyx"))}


def imports_of(module, text, *, is_package=False):
    """What a module imports wherever it does, also inside functions; not what only a type checker reads."""
    found = set()
    for node in ast.walk(_without_type_checking(ast.parse(text))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in SOURCES or inner in NATIVE else base)
    return found


def _without_type_checking(tree):
    class Cut(ast.NodeTransformer):
        def visit_If(self, node):
            return None if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING" else node

    return Cut().visit(tree)


IMPORTS = {
    module: imports_of(module, path.read_text(), is_package=path.name == "__init__.py")
    for module, path in SOURCES.items()
}


def heights(layers):
    """{name: height} of layers written from the top down; those on one line stand beside each other."""
    return {
        name.strip(): height
        for height, line in enumerate(reversed(layers))
        for name in line.split(":")
    }  # fmt: skip


def layer_of(module, names):
    """The longest of `names` that is the module or a package around it."""
    around = [name for name in names if module == name or module.startswith(name + ".")]
    return max(around, key=len, default=None)


def climbing(layers, imports):
    """Every import that does not go down: (who, what)."""
    height = heights(layers)
    found = []
    for module, imported in imports.items():
        mine = layer_of(module, height)
        for other in imported:
            theirs = layer_of(other, height)
            if mine is None or theirs is None or mine == theirs:
                continue
            if height[theirs] >= height[mine]:
                found.append((module, other))
    return found


@pytest.fixture(scope="module")
def contracts():
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("an installed package has no pyproject.toml beside it")
    with open(ROOT / "pyproject.toml", "rb") as file:
        return tomllib.load(file)["tool"]["importlinter"]["contracts"]


def layers_of(contracts, name):
    (found,) = [contract["layers"] for contract in contracts if contract["name"] == name]
    return found


def test_imports_go_down(contracts):
    assert climbing(layers_of(contracts, "layers"), IMPORTS) == []


def test_imports_go_down_within_the_folder_of_a_system():
    assert climbing(SYSTEM, IMPORTS) == []


def test_every_module_has_its_layer(contracts):
    height = heights(layers_of(contracts, "layers"))
    without = {module for module in SOURCES if layer_of(module, height) is None}
    assert without <= {"compart", "compart.host", "compart.__main__", "compart.doctor"}
    inside = {module for module in SOURCES if module.startswith("compart.backend.linux.")}
    assert inside == {module for module in inside if layer_of(module, heights(SYSTEM))}


def test_an_import_that_climbs_would_be_seen(contracts):
    layers = layers_of(contracts, "layers")
    for module, text in (
        ("compart.policy", "from compart.host import compartment"),
        ("compart.rights", "def late():\n    import compart.policy"),
        ("compart.backend.linux.walls", "from ...guest import worker"),
        ("compart.host.arena", "from compart.host import remote"),
        ("compart.errors", "from . import _fast, grant"),
    ):
        assert climbing(layers, {module: imports_of(module, text)}), text
    assert climbing(
        SYSTEM, {"compart.backend.linux.bpf_code": imports_of("", "from compart.backend.linux import filters")}
    )
    assert not climbing(
        layers, {"compart.host.decorator": imports_of("", "from compart import policy, rights, message")}
    )
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from compart.host.compartment import Call"
    assert imports_of("compart.errors", typed) == {"typing"}


@pytest.mark.parametrize("folder", ["compart.backend", "compart.guest"])
def test_walls_and_guest_do_not_know_the_host(folder):
    inside = {module: imported for module, imported in IMPORTS.items() if module.startswith(folder)}
    assert inside
    assert {who for who, what in inside.items() if any(name.startswith("compart.host") for name in what)} == set()


def test_words_know_no_system():
    words = (
        "compart.errors",
        "compart.rights",
        "compart.policy",
        "compart.violation",
        "compart.grant",
        "compart.message",
    )
    for word in words:
        assert not any(name.startswith(("compart.backend", "compart.host", "compart.guest")) for name in IMPORTS[word])


def test_native_modules_import_nothing_of_compart():
    assert set(NATIVE) == {"compart._fast", "compart.backend.linux._sys"}
    for module, path in NATIVE.items():
        lines = re.findall(r"^\s*(?:from\s+(\S+)\s+c?import|c?import\s+(\S+))", path.read_text(), re.MULTILINE)
        named = {one or other for one, other in lines}
        assert named, module
        assert {name for name in named if name.split(".")[0] in ("compart", "")} == set(), module


def test_nothing_but_the_standard_library_is_imported():
    named = {name.split(".")[0] for imported in IMPORTS.values() for name in imported}
    assert named <= sys.stdlib_module_names | {"compart", ""}


def test_importing_compart_brings_no_library_along():
    program = (
        "import sys, compart; print(sorted({name.split('.')[0] for name in sys.modules} - sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    loaded = set(ast.literal_eval(done.stdout)) - {"__main__"}
    assert {name for name in loaded if not name.startswith(("compart", "_cython", "cython_runtime"))} == set()


def test_every_file_says_what_it_is():
    for module, path in SOURCES.items():
        if path.read_text().strip():
            assert ast.get_docstring(ast.parse(path.read_text())), module
