"""docs/homework.md: its blocks of Python, run in order, print what the page says."""

import contextlib
import copy
import io
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "homework.md"
BLOCK = re.compile(r"```python\n(?P<code>.*?)```\n(?:\n```text\n(?P<output>.*?)```\n)?", re.DOTALL)
NUMBER = re.compile(r"\d[\d,]*(?:\.(?P<decimals>\d+))?")


def lines_of(text):
    """The lines without the values of their numbers."""
    return [NUMBER.sub(lambda number: "0" * len(number[0]), line).rstrip() for line in text.splitlines()]


def assert_as_stated(printed, stated):
    """The same lines and whole numbers; others within 5 in their last place, for another processor rounds otherwise."""
    assert lines_of(printed) == lines_of(stated)
    for number, expected in zip(NUMBER.finditer(printed), NUMBER.finditer(stated), strict=True):
        decimals = expected["decimals"]
        tolerance = 5 * 10.0 ** -len(decimals) if decimals else 0
        value, expected_value = (float(match[0].replace(",", "")) for match in (number, expected))
        assert value == pytest.approx(expected_value, abs=tolerance, rel=0), f"{printed}\nbut the page has\n{stated}"


@pytest.fixture(scope="module")
def run(mnist_dir, tmp_path_factory):
    """The folder in which the blocks ran, what each printed beside what the page says, and their names' values."""
    folder, outputs, names = tmp_path_factory.mktemp("homework"), [], {}
    (folder / "data").symlink_to(mnist_dir)
    page = PAGE.read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in BLOCK.finditer(page):
            lines_before = page.count("\n", 0, block.start("code"))
            code = compile("\n" * lines_before + block["code"], PAGE, "exec")  # a traceback then has the page's lines
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(code, names)
            outputs.append((output.getvalue(), block["output"] or ""))
    return folder, outputs, names


def test_the_blocks_print_what_the_page_says(run):
    _, outputs, _ = run
    assert len(outputs) > 10
    for printed, stated in outputs:
        assert_as_stated(printed, stated)


def test_every_block_of_the_page_is_found():
    page = PAGE.read_text()
    blocks = list(BLOCK.finditer(page))
    assert len(blocks) == page.count("```python")
    assert sum(block["output"] is not None for block in blocks) == page.count("```text")


def test_the_network_reads_98_of_100_digits(run):
    _, _, names = run
    mnist, model = names["mnist"], copy.deepcopy(names["model"]).double()
    pixels = mnist.train_images.double()
    input = (mnist.test_images.flatten(1) - pixels.mean()) / pixels.std()
    accuracy = (model.predict(input) == mnist.test_labels).double().mean().item()
    assert 0.975 < accuracy < 0.985
    assert names["evaluation"].accuracy == pytest.approx(accuracy, abs=2e-4)
    assert names["confusion"].sum() == 10000
    assert names["confusion"].diagonal().sum().item() / 10000 == pytest.approx(accuracy, abs=2e-4)


def test_the_loop_learns_too_and_softmax_regression_learns_less(run):
    _, _, names = run
    evaluate, criterion, mnist = names["evaluate"], names["criterion"], names["mnist"]
    assert evaluate(names["network"], criterion, mnist).accuracy > 0.94
    assert 0.9 < evaluate(names["linear"], criterion, mnist).accuracy < 0.935


def test_the_files_are_there(run):
    folder, _, _ = run
    for name in ("digit.png", "report.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert (folder / "digits.safetensors").stat().st_size > 4 * 203_530


@pytest.mark.parametrize(
    ("printed", "is_as_stated"),
    [
        ("loss 0.251, accuracy 96.3 %", True),
        ("loss 0.255, accuracy 96.7 %", True),
        ("loss 0.257, accuracy 96.3 %", False),
        ("loss 0.251, accuracy 97.0 %", False),
        ("loss 0.251, precision 96.3 %", False),
        ("loss 0.251", False),
    ],
)
def test_comparison_with_the_page(printed, is_as_stated):
    with contextlib.nullcontext() if is_as_stated else pytest.raises(AssertionError):
        assert_as_stated(printed, "loss 0.251, accuracy 96.3 %")
