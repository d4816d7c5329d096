"""The documents are true: their code runs, and what they name exists.

A python block after the line `<!-- runs -->` is run in a process of its own, in a folder with a few files; what it prints
must be the block after the next `<!-- prints -->`, in which `...` stands for anything.
"""

import builtins
import dataclasses
import datetime
import doctest
import importlib
import inspect
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import compart
from compart.backend.linux import filters
from compart.policy import WAIVABLE, WALLS

ROOT = Path(__file__).parents[2]
TOP = ("README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text() for path in (*(ROOT / name for name in TOP), *ROOT.glob("docs/*.md"))
}

BLOCK = re.compile(r"<!-- runs -->\n```python\n(.*?)```(?:\s*<!-- prints -->\n```text\n(.*?)```)?", re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
README = PAGES["README.md"]


class Example(NamedTuple):
    page: str
    line: int
    source: str
    output: str


EXAMPLES = [
    Example(page, text.count("\n", 0, found.start(1)) + 1, found[1], found[2] or "")
    for page, text in PAGES.items()
    for found in BLOCK.finditer(text)
]


class RunsACommand:
    def __reduce__(self):
        return os.system, ("touch it-ran",)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "order.pickle").write_bytes(pickle.dumps({"id": 7, "due": datetime.date(2026, 1, 2)}))
    (tmp_path / "hostile.pickle").write_bytes(pickle.dumps(RunsACommand()))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.txt").write_text("some text")
    (tmp_path / "data/b.txt").write_text("more text")
    return tmp_path


NEEDS = {
    "namespaces": ("Directory(", "grant.directory", "SystemExit"),
    "landlock": ("SystemExit",),
    "listener": ("ViolationError", "on_violation", "SystemExit"),
}
"""What an example cannot do without, by words that are in it."""


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: f"{example.page}:{example.line}")
def test_an_example_prints_what_it_says(example, folder):
    for wall in compart.enforcement().missing & NEEDS.keys():
        if any(word in example.source for word in NEEDS[wall]):
            pytest.skip(f"this machine has no {wall}")
    (folder / "example.py").write_text(example.source)
    done = subprocess.run(
        # A file that is left to the collector is no fault in a short example.
        [sys.executable, "-W", "error", "-W", "ignore::ResourceWarning", "example.py"],
        cwd=folder, env={"PYTHONPATH": str(ROOT), "PATH": os.defpath}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    checker = doctest.OutputChecker()
    assert checker.check_output(example.output, done.stdout, doctest.ELLIPSIS), done.stdout
    assert not (folder / "it-ran").exists()


def test_there_are_examples_and_they_say_what_they_print():
    assert sum(example.page == "README.md" for example in EXAMPLES) >= 5
    assert sum(bool(example.output) for example in EXAMPLES) >= 5


def test_every_python_block_compiles():
    for page, text in PAGES.items():
        for source in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            compile(source, page, "exec")


# Tables


def rows(text, heading):
    """The table under a heading: a list of the cells of each row."""
    section = re.split(r"\n## ", text.split(f"\n## {heading}\n", 1)[1])[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def names(cells):
    return [CODE.match(cell)[1] for cell in cells]


def test_the_policy_table_has_every_field_with_its_default():
    table = {CODE.match(row[0])[1]: CODE.match(row[1])[1] for row in rows(README, "Policy")}
    defaults = {}
    for field in dataclasses.fields(compart.Policy):
        made = field.default if field.default is not dataclasses.MISSING else dict(field.default_factory())
        defaults[field.name] = repr(made).replace("'", '"')
    assert table == defaults


def test_the_table_of_walls_has_every_wall():
    assert names(row[0] for row in rows(README, "Walls")) == list(WALLS)


def test_what_can_be_waived_is_told():
    for wall in WALLS:
        section = re.split(r"^## ", PAGES["docs/walls.md"].split(f"## `{wall}`\n")[1], flags=re.MULTILINE)[0]
        assert ("cannot be waived" in section) == (wall not in WAIVABLE), wall
        assert (f'waive={{"{wall}"}}' in section) == (wall in WAIVABLE), wall


def test_every_wall_has_a_section_in_the_order_they_go_up():
    assert re.findall(r"^## `(\w+)`$", PAGES["docs/walls.md"], re.MULTILINE) == list(WALLS)


def test_the_readme_lists_every_error():
    errors = {
        name
        for name in compart.__all__
        if inspect.isclass(found := getattr(compart, name)) and issubclass(found, Exception)
    }
    table = {
        name for row in rows(README, "Errors, by whose fault it is") for cell in row for name in CODE.findall(cell)
    }
    assert errors - {"CompartError"} <= table


def test_every_constructor_of_grants_is_documented():
    made = {
        f"grant.{name}" for name, found in vars(compart.grant).items() if inspect.isfunction(found) and name[0] != "_"
    }
    made -= {"grant.path_text"}
    assert made == {name.split("(")[0] for name in names(row[0] for row in rows(README, "Grants"))}


# Names


def quoted(pattern):
    """(page, match) for each piece of inline code that is matched from its start."""
    return [
        (page, found)
        for page, text in PAGES.items()
        for code in CODE.findall(text)
        if (found := re.match(pattern, code))
    ]


def resolve(dotted):
    """The object of a dotted name; AttributeError or ModuleNotFoundError when there is none."""
    found = importlib.import_module(dotted.split(".")[0])
    for name in dotted.split(".")[1:]:
        try:
            found = getattr(found, name)
        except AttributeError:
            found = importlib.import_module(f"{found.__name__}.{name}")
    return found


def test_dotted_names_exist():
    planned = {"compart.capsicum"}  # said to be missing
    found = quoted(r"(compart(?:\.\w+)+)(?!\.\w)")
    assert len(found) > 8
    for page, match in found:
        if match[1] not in planned and "/" not in match.string:
            assert resolve(match[1]) is not None, (page, match[1])
    for page, match in quoted(r"(grant|rights)\.(\w+)"):
        if f"{match[1]}.{match[2]}" not in ("grant.connect", "grant.resolve"):
            assert hasattr(getattr(compart, match[1]), match[2]), (page, match[0])


def test_attributes_exist():
    for page, match in quoted(r"(Outcome|Violation|Enforcement|Directory|Policy)\.(\w+)$"):
        kind = getattr(compart, match[1])
        fields = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
        assert match[2] in fields or hasattr(kind, match[2]), (page, match[0])


def test_attributes_of_errors_exist():
    made = {
        "UnsupportedError": compart.UnsupportedError("seccomp", "why", "what to do"),
        "RemoteError": compart.RemoteError("zipfile.BadZipFile", "text"),
        "ViolationError": compart.ViolationError([compart.Violation("openat", {}, 1)]),
        "CompartmentDied": compart.CompartmentDied("text"),
    }
    for _, error, when in rows(README, "Errors, by whose fault it is"):
        for name in re.findall(r"`\.(\w+)`", when):
            assert hasattr(made[CODE.match(error)[1]], name), (error, name)


def test_names_of_errors_exist():
    found = {match[0] for _, match in quoted(r"[A-Z]\w*(?:Error|Died|Timeout|Traceback)$")}
    assert len(found) > 10
    for name in found:
        assert hasattr(compart, name) or hasattr(builtins, name), name


def test_keywords_are_fields_of_a_policy():
    known = {field.name for field in dataclasses.fields(compart.Policy)}
    others = {"dir"}  # tempfile's
    for page, match in quoted(r"(?:Policy\()?(\w+)=[^=]"):
        if match[1].islower() and not match[1].startswith("_"):
            assert match[1] in known | others, (page, match.string)
    for page, match in quoted(r"waive=\{\"(\w+)\"\}"):
        assert match[1] in WAIVABLE, page


def test_constants_have_the_values_that_are_told():
    modules = {
        "filters": filters,
        **{name: importlib.import_module(f"compart.{where}") for name, where in {
            "notify": "backend.linux.notify", "decorator": "host.decorator", "arena": "host.arena", "message": "message",
            "worker": "guest.worker",
        }.items()},
    }  # fmt: skip
    written = [match for text in PAGES.values() for match in re.finditer(r"`(\w+)\.([A-Z_]+)`(?: \((\d+)\))?", text)]
    found = [match for match in written if match[1] in modules]
    assert len(found) >= 10
    for match in found:
        value = getattr(modules[match[1]], match[2])
        assert match[3] is None or value == int(match[3]), match[0]


def test_files_that_are_named_exist():
    found = quoted(r"((?:\.\./)?(?:compart|tests|examples|docs|benchmarks|\.ci)/[\w./-]*)(?:::(\w+))?$")
    assert len(found) > 20
    for page, match in found:
        path = ROOT / match[1]
        assert path.exists(), (page, match[0])
        if match[2]:
            assert re.search(rf"\bdef {match[2]}\(|name=\"{match[2]}\"", path.read_text()), (page, match[0])


def test_links_lead_somewhere():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)]+)\)", text):
            if "://" not in target:
                assert ((ROOT / page).parent / target.partition("#")[0]).exists(), (page, target)


def test_commands_are_in_the_makefile():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    found = {name for text in PAGES.values() for name in re.findall(r"(?:^    |`)make ([\w-]+)", text, re.MULTILINE)}
    assert {"demo", "test"} <= found
    assert found <= targets


def test_modules_that_are_run_exist():
    for page, text in PAGES.items():
        for module in re.findall(r"python -m (\w[\w.]*)", text):
            assert importlib.util.find_spec(module), (page, module)


def test_the_changelog_has_this_version():
    assert re.search(rf"^## {re.escape(compart.__version__)}\b", PAGES["CHANGELOG.md"], re.MULTILINE)
