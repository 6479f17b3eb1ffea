"""Writes what works where, as the tests of tests/subsystems show: into README.md in short, into docs/limits.md in full.

A test marked ``support("export")`` and parametrized over the ops makes the cell of its op in the column "export" of the
table named after its file: yes, or no where the mark has ``works=False``, for then the test asserts the error.

Usage: python scripts/support_table.py [--check]
    runs these tests and writes the tables if all of them pass; --check only compares the tables with the tests' marks
"""

import argparse
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests" / "subsystems"
BEGIN, END = "<!-- made by scripts/support_table.py: begin -->\n", "<!-- end -->\n"

Cells = dict[str, dict[str, dict[str, bool]]]  # test file -> column -> row -> whether it works


class Collector:
    """A plugin of pytest: the tests there are, and the devices on which some of them passed."""

    def __init__(self) -> None:
        self.items: list[pytest.Item] = []
        self.devices: set[str] = set()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Keep the tests."""
        self.items = session.items

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the device of a test that passed."""
        if report.when == "call" and report.passed:
            self.devices |= {name for name in ("cpu", "cuda") if f"[{name}" in report.nodeid}


def cells_of(items: list[pytest.Item]) -> tuple[Cells, dict[str, list[str]]]:
    """The cells, and the options with which each row is tested."""
    import samples  # tests/subsystems is on the path once pytest has collected it

    cells: Cells = {}
    options: dict[str, list[str]] = {row: [] for row in samples.OPS | samples.LAYERS}
    for row, variants in (samples.OPS | samples.LAYERS).items():
        for variant in variants:
            options[row] += [word for word in variant.split(", ") if word and word not in options[row]]
    for item in items:
        for mark in item.iter_markers("support"):
            given = item.callspec.params if hasattr(item, "callspec") else {}
            rows = mark.kwargs.get("rows") or [samples.name_of(given.get("op") or given["layer"])[0]]
            column = cells.setdefault(item.path.stem.removeprefix("test_"), {}).setdefault(mark.args[0], {})
            for row in rows:
                column[row] = mark.kwargs.get("works", True) and column.get(row, True)
    return cells, options


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def in_short(cells: Cells, options: dict[str, list[str]]) -> str:
    """A row for each op and layer, a column for each test file."""
    rows = []
    for row, words in options.items():
        line = [f"`{row}`", ", ".join(words)]
        for columns in cells.values():
            known = {column: works[row] for column, works in columns.items() if row in works}
            no = ", ".join(column for column, works in known.items() if not works)
            if any(known.values()):
                line.append(f"yes, but no {no}" if no else "yes")
            else:
                line.append(f"no {no}" if no else "")
        rows.append(line)
    names = [f"[{name.replace('_', ' ')}](tests/subsystems/test_{name}.py)" for name in cells]
    return table(["", "options", *names], rows)


def in_full(cells: Cells, options: dict[str, list[str]]) -> str:
    """A table for each test file, with a column for each thing it shows."""
    parts = []
    for name, columns in cells.items():
        rows = [
            [f"`{row}`", *("" if row not in works else "yes" if works[row] else "no" for works in columns.values())]
            for row in options
            if any(row in works for works in columns.values())
        ]
        title = f"[`test_{name}.py`](../tests/subsystems/test_{name}.py)"
        parts.append(f"{title}\n\n" + table(["", *columns], rows))
    return "\n".join(parts)


def main() -> None:
    """Run the tests, or only collect them, and write or compare the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the tables with the tests' marks")
    check = parser.parse_args().check
    collector = Collector()
    arguments = ["-q", "--rootdir", str(ROOT), "--ignore", str(TESTS / "test_support_table.py"), str(TESTS)]
    status = pytest.main([*arguments, *(["--collect-only", "-qq"] if check else [])], [collector])
    if status != 0:
        sys.exit("support_table: no tables, for not every test passed")
    cells, options = cells_of(collector.items)
    devices = " and ".join(sorted(device.upper() for device in collector.devices))
    for path, text in (("README.md", in_short(cells, options)), ("docs/limits.md", in_full(cells, options))):
        page = (ROOT / path).read_text()
        match = re.search(f"{BEGIN}\n(.*?)\n\n(.*?)\n{END}", page, re.DOTALL)
        if match is None:
            sys.exit(f"support_table: expected the lines {BEGIN!r} and {END!r} in {path}")
        if check and match[2] != text:
            sys.exit(f"support_table: {path} is not up to date, type `python scripts/support_table.py`")
        if not check:
            caption = f"Every test behind this passed on: {devices}."
            (ROOT / path).write_text(page.replace(match[0], f"{BEGIN}\n{caption}\n\n{text}\n{END}"))
            print(f"support_table: {path} written")


if __name__ == "__main__":
    main()
