"""Where a fault of a configuration stands: file, line and JSON pointer."""

from __future__ import annotations

import pytest

from fastdist.config import load, pointer
from fastdist.errors import ConfigError, Fault
from fastdist.ipc import MAX_PROBLEM, MAX_PROBLEMS, shorten_faults

TEXT = """\
[server]
port = -1
prot = 3

[zzz]

[[analyzers]]
id = "one"
endpoint = "ftp://one"
weight = 1

[[analyzers]]
id = "two"
endpoint = "http://two:9000/in"
weight = -3
"a b" = 1

[security]
tokens = [
  "good",
  "not good",
]

[[analyzers]]
id = "three"
weight = 1
"""


@pytest.fixture
def file(tmp_path):
    return tmp_path / "fastdist.toml"


def faults_of(file, text, environ=None, flags=None):
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(file, environ or {}, flags or {})
    assert [fault.detail for fault in caught.value.faults] == caught.value.problems
    return caught.value.faults


def test_each_fault_has_its_place(file):
    faults = faults_of(file, TEXT)
    assert {(fault.line, fault.pointer) for fault in faults} == {
        (2, "/server/port"),
        (3, "/server/prot"),
        (5, "/zzz"),
        (9, "/analyzers/0/endpoint"),
        (15, "/analyzers/1/weight"),
        (16, "/analyzers/1/a b"),
        (24, "/analyzers/2/endpoint"),  # which is missing: the line of its table
        (21, "/security/tokens/1"),
    }
    assert {fault.file for fault in faults} == {str(file)}
    assert "not good" not in "".join(map(str, faults))


def test_text_of_a_fault_names_its_line(file):
    (fault,) = faults_of(file, "\n\n[limits]\nrate = -1\n")
    assert str(fault) == f"limits.rate: must be >= 0 ({file}:4)"


def test_flags_and_variables_are_in_no_file(file):
    text = "[server]\nport = 1\nworkers = 1\n"
    (fault,) = faults_of(file, text, flags={"port": 65536})
    assert (str(fault), fault.pointer) == ("server.port: must be <= 65535 (flag --port)", "/server/port")
    (fault,) = faults_of(file, text, {"FASTDIST_SERVER__WORKERS": "-1"})
    assert (fault.file, fault.line, fault.pointer) == ("", 0, "/server/workers")
    (fault,) = faults_of(file, text, {"FASTDIST_SERVER__PROT": "1"})
    assert (fault.file, fault.line, fault.pointer) == ("", 0, "")


def test_fault_of_the_syntax_has_its_line(file):
    (fault,) = faults_of(file, "[server]\nport = 1\nhost = = 2\n")
    assert (fault.file, fault.line, fault.pointer) == (str(file), 3, "")
    assert str(fault) == fault.detail, "which begins with the file and the line"


def test_what_is_left_out_is_pointed_at(file):
    file.write_text('[[analyzers]]\nid = "one"\nendpoint = "http://h/"\nweight = 1\n')
    loaded = load(file, {}, {})
    file.write_text("")
    with pytest.raises(ConfigError) as caught:
        loaded.reload()
    (fault,) = caught.value.faults
    assert (fault.file, fault.line, fault.pointer) == (str(file), 0, "/analyzers")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("server", "/server"),
        ("analyzers[12].weight", "/analyzers/12/weight"),
        ('server."a.b/~"', "/server/a.b~1~0"),
        ("security.tokens[0]", "/security/tokens/0"),
        ('analyzers[0]."a[1] \\" x"', '/analyzers/0/a[1] " x'),
    ],
)
def test_a_path_as_a_pointer(path, expected):
    assert pointer(path) == expected


def test_many_faults_are_cut_for_a_message():
    faults = [Fault("x" * 1000, "/" + "y" * 1000, "z" * 1000, number) for number in range(1, MAX_PROBLEMS + 9)]
    *few, last = shorten_faults(faults)
    assert len(few) == MAX_PROBLEMS
    assert {(len(each.pointer), len(each.file)) for each in few} == {(MAX_PROBLEM, MAX_PROBLEM)}
    assert [each.line for each in few] == list(range(1, MAX_PROBLEMS + 1))
    assert (last.file, "8 more problems" in last.detail) == ("", True)
    assert shorten_faults(faults[:1])[0].line == 1
