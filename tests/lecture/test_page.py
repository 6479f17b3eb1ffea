"""docs/lecture.md: what its rows name is there, each row has a test of its own, and each file of tests has rows."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

import torch_mlp
from torch_mlp import backprop, data, descent, landscape, plot, training

TESTS = Path(__file__).parent
PAGE = TESTS.parents[1] / "docs" / "lecture.md"
LINK = re.compile(r"\[([^\]]*)\]\(([^)]*)\)")
NOT_OF_A_SLIDE = {"test_page.py", "test_scripts_demos.py", "test_scripts_descent.py"}
MODULES = {
    "functional": torch_mlp.functional,
    "nn": torch_mlp.nn,
    "train_epoch": torch_mlp.train_epoch,
    **{module.__name__.rpartition(".")[2]: module for module in (backprop, data, descent, landscape, plot, training)},
}


def rows():
    """The cells of each row of the table."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def names_of_tests(path):
    return {node.name for node in ast.parse(path.read_text()).body if getattr(node, "name", "").startswith("test_")}


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0].strip("*"))
def test_row(row):
    slide, _, names, test, to_watch = row
    assert slide
    found = re.findall(r"`([^`]+)`", names)
    assert found, "an API"
    for name in found:
        module, *attributes = name.split(".")
        value = MODULES[module]
        for attribute in attributes:
            value = getattr(value, attribute)
    ((name, path),) = LINK.findall(test)
    assert name in names_of_tests((PAGE.parent / path).resolve())
    for _, path in LINK.findall(to_watch):
        assert (PAGE.parent / path).is_file()


def test_every_row_has_a_test_of_its_own():
    named = Counter((Path(path).name, name) for row in rows() for name, path in LINK.findall(row[3]))
    assert max(named.values()) == 1
    assert len(named) > 80
    files = {path.name for path in TESTS.glob("test_*.py")} - NOT_OF_A_SLIDE
    assert {file for file, _ in named} == files


def test_links_of_the_page():
    links = [path for _, path in LINK.findall(PAGE.read_text())]
    assert len(links) > 60
    for path in links:
        assert (PAGE.parent / path).is_file(), path
