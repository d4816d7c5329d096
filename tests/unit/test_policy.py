"""A policy is checked where it is written: each mistake is told with its value and its remedy, before anything is forked."""

import dataclasses
import math
import re

import pytest

from compart import CompartError, Policy, PolicyError, grant, rights, sandboxed
from compart.policy import WALLS, parse_size

pytestmark = pytest.mark.usefixtures("no_fork")


def test_the_defaults_grant_nothing_and_limit_everything():
    policy = Policy()
    assert (policy.grants, policy.env, policy.preload, policy.waive) == ((), {}, (), frozenset())
    assert (policy.timeout, policy.memory_bytes, policy.result_limit) == (60.0, 1 << 30, 256 << 20)
    assert (policy.processes, policy.on_violation, policy.isolation) == (0, "raise", "call")
    assert (policy.stdout, policy.stderr) == ("capture", "capture")


# ------------------------------------------------------------------------------------------------------- each field, mistaken

MISTAKES = [
    ("timeout", -1, "must be positive and finite; give seconds, or None"),
    ("timeout", 0, "must be positive and finite"),
    ("timeout", math.inf, "must be positive and finite"),
    ("timeout", math.nan, "is no number of seconds"),
    ("timeout", "5", "is no number of seconds; give a positive number, or None for no limit"),
    ("timeout", True, "is no number of seconds"),
    ("timeout", [5], "is no number of seconds"),
    ("cpu", -0.5, "must be positive and finite"),
    ("cpu", "1s", "is no number of seconds"),
    ("memory", -1, "is less than 1048576; give at least 1048576 bytes"),
    ("memory", 0, "is less than 1048576"),
    ("memory", "12 parsecs", "is no size; give bytes or text such as '256M'"),
    ("memory", 1.5, "is no size"),
    ("memory", True, "is no size"),
    ("memory", "", "is no size"),
    ("memory", "-1M", "is no size"),
    ("memory", "1e9", "is no size"),
    ("result_bytes", 0, "is less than 1"),
    ("result_bytes", None, "is no size"),
    ("output_bytes", -1, "is less than 0"),
    ("open_files", 7, "is out of range; give from 8 to 480"),
    ("open_files", 481, "is out of range; give from 8 to 480"),
    ("open_files", 64.0, "is no count; give an integer"),
    ("open_files", None, "is no count"),
    ("processes", -1, "is out of range; give at least 0"),
    ("processes", "none", "is no count"),
    ("threads", 0, "is out of range; give at least 1"),
    ("threads", True, "is no count"),
    ("stdout", "file", "is unknown; choose 'capture', 'inherit', 'null'"),
    ("stderr", None, "is unknown; choose 'capture', 'inherit', 'null'"),
    ("isolation", "none", "is unknown"),
    ("start", "spawn", "is unknown; choose 'auto', 'fork'"),
    ("on_violation", "ignore", "is unknown; choose 'raise', 'deny', 'kill'"),
    ("on_violation", ["raise"], "is unknown"),
    ("grants", "/etc/passwd", "is no list of grants; write grants=[grant.file(path, 'r')]"),
    ("grants", {"/etc/passwd": "r"}, "is no list of grants"),
    ("grants", None, "is no list of grants"),
    ("env", ["A=1"], "is no mapping; give a dictionary of strings"),
    ("preload", "json", "is one string; give a list: preload=['json']"),
    ("preload", 3, "is no list of module names"),
    ("warm", "warm", "cannot be called; give a function, such as warm=Image.init"),
    ("waive", 3, "is no set of wall names"),
]


@pytest.mark.parametrize(("field", "value", "told"), MISTAKES, ids=lambda part: f"{part!r:.30}")
def test_a_mistake_is_told_with_its_field_its_value_and_its_remedy(field, value, told):
    with pytest.raises(PolicyError) as caught:
        Policy(**{field: value})
    assert str(caught.value).startswith(f"{field}={value!r} ")
    assert told in str(caught.value)
    assert isinstance(caught.value, (CompartError, ValueError))


def test_every_field_has_a_mistake_of_its_own():
    assert {field for field, _, _ in MISTAKES} == {field.name for field in dataclasses.fields(Policy)}


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("grants", ["/etc/passwd"], "grants holds '/etc/passwd', which is no grant; make grants with compart.grant"),
        ("grants", [("file", "/etc/passwd")], "which is no grant"),
        ("preload", ["json", 3], "preload holds 3, which is no module name"),
        ("preload", ["json; import os"], "preload holds 'json; import os', which is no module name"),
        ("preload", ["a..b"], "is no module name; write it as in 'import a..b'"),
        ("preload", [""], "is no module name"),
        ("env", {"A=B": "1"}, "env holds 'A=B': '1'; names and values are strings without NUL, names without '='"),
        ("env", {"": "1"}, "names and values are strings"),
        ("env", {"A": 1}, "names and values are strings"),
        ("env", {1: "A"}, "names and values are strings"),
        ("env", {"A": "b\0c"}, "without NUL"),
        ("waive", ["secomp"], "waive holds 'secomp', which is no wall; the walls are "),
        ("waive", "firewall", "waive holds 'firewall', which is no wall"),
        ("waive", {3}, "waive holds 3, which is no wall"),
        ("waive", [["seccomp"]], "which is no wall"),
    ],
)
def test_a_mistake_within_a_field_is_told(field, value, told):
    with pytest.raises(PolicyError, match=re.escape(told)):
        Policy(**{field: value})


@pytest.mark.parametrize("form", [sandboxed, lambda **changes: sandboxed(len, **changes), Policy().replace])
def test_the_same_is_told_wherever_it_is_written(form):
    with pytest.raises(PolicyError, match=r"timeout=-1 must be positive and finite"):
        form(timeout=-1)
    with pytest.raises(PolicyError, match=r"a policy has no 'time_out'; did you mean 'timeout'\?"):
        form(time_out=1)
    with pytest.raises(PolicyError, match="a policy has no 'colour'; the fields are grants, timeout, cpu"):
        form(colour="red")


def test_fields_have_names():
    with pytest.raises(TypeError):
        Policy([grant.file("/etc/passwd")])


# ------------------------------------------------------------------------------------------------------------ what is accepted


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1024, 1024),
        ("1024", 1024),
        ("1024B", 1024),
        ("64K", 64 << 10),
        ("64 KB", 64 << 10),
        ("64KiB", 64 << 10),
        ("256M", 256 << 20),
        ("256m", 256 << 20),
        (" 1G ", 1 << 30),
        ("1.5G", 3 << 29),
        ("2T", 2 << 40),
    ],
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "M", "1X", "1 000", "-1", "+1", "1.", ".5G", "0x10", "1MM", "1IB1", None, 1.0, True, b"1M"]
)
def test_what_is_no_size_is_a_value_error(text):
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


def test_fields_are_put_into_one_form():
    policy = Policy(
        grants=[grant.file("/etc/passwd")],
        timeout=5,
        memory="64M",
        preload=["json", "xml.dom"],
        env={"A": "1"},
        waive={"landlock"},
    )
    assert policy == Policy(
        grants=(grant.file("/etc/passwd", "r"),),
        timeout=5.0,
        memory=64 << 20,
        preload=("json", "xml.dom"),
        env={"A": "1"},
        waive=["landlock"],
    )
    assert isinstance(policy.timeout, float)
    assert isinstance(policy.grants, tuple)
    assert isinstance(policy.waive, frozenset)


def test_one_grant_and_one_wall_may_stand_alone():
    single = grant.file("/etc/passwd")
    assert Policy(grants=single).grants == (single,)
    assert Policy(waive="landlock").waive == {"landlock"}


@pytest.mark.parametrize("wall", WALLS)
def test_a_wall_can_be_waived_by_name_or_it_is_told_that_it_cannot(wall):
    if wall in ("landlock", "seccomp", "listener"):
        assert Policy(waive={wall}).waive == {wall}
    else:
        with pytest.raises(
            PolicyError, match=f"the wall '{wall}' cannot be waived; only landlock, seccomp, listener can"
        ):
            Policy(waive={wall})


def test_no_limit_is_none():
    policy = Policy(timeout=None, cpu=None, memory=None, threads=None)
    assert (policy.timeout, policy.cpu, policy.memory_bytes, policy.threads) == (None, None, None, None)


# --------------------------------------------------------------------------------------------------------------- as a value


def test_it_is_frozen():
    policy = Policy()
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.timeout = 1
    with pytest.raises(TypeError):
        policy.env["A"] = "1"


def test_what_it_was_made_of_can_change_without_it():
    grants, env, preload = [grant.file("/etc/passwd")], {"A": "1"}, ["json"]
    policy = Policy(grants=grants, env=env, preload=preload)
    before = hash(policy)
    grants.clear()
    env.clear()
    preload.clear()
    assert (len(policy.grants), dict(policy.env), policy.preload) == (1, {"A": "1"}, ("json",))
    assert hash(policy) == before


def test_equal_policies_are_one_key():
    one, other = Policy(timeout=5, env={"A": "1"}), Policy(timeout=5.0, env={"A": "1"})
    assert one == other
    assert hash(one) == hash(other)
    assert len({one, other, Policy(timeout=5, env={"A": "2"}), Policy(timeout=6)}) == 3


def test_replacing_changes_a_copy():
    policy = Policy(timeout=5, memory="64M")
    other = policy.replace(timeout=6)
    assert (policy.timeout, other.timeout, other.memory) == (5, 6, 64 << 20)
    assert policy.replace() == policy


def test_policies_with_descriptors_are_told_apart_by_what_they_grant():
    one, two = (
        Policy(grants=[grant.descriptor(0, rights.CAP_READ)]),
        Policy(grants=[grant.descriptor(1, rights.CAP_READ)]),
    )
    assert one != two
    assert one == Policy(grants=[grant.descriptor(0, rights.CAP_READ)])
    assert one != Policy(grants=[grant.descriptor(0, rights.CAP_WRITE)])


def test_it_shows_what_it_is():
    shown = repr(Policy(timeout=5, grants=[grant.file("/etc/passwd")]))
    assert "timeout=5.0" in shown
    assert "/etc/passwd" in shown
