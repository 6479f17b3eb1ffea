#!/usr/bin/env python3
"""Back-propagation on a small network, number by number, as it is done by hand in the lecture.

Prints the computation graph of one sample, forward from the inputs to the loss and backward to every weight, with the
step of gradient descent that follows, and draws it. The weights are random numbers of one decimal, to be followed with
pencil and paper. Values and gradients are those of the fused ops; the chain rule is then gone through by hand, and how
far the two are apart is printed.
"""

import argparse
import math
import sys

import torch
from options import demo_parser, fail, not_negative, positive, run_demo, save_picture

from torch_mlp import backprop, functional, plot
from torch_mlp.nn import MLP


def finite(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text}")
    return value


def parse_arguments() -> argparse.Namespace:
    """The options of the script."""
    activations = [name for name, activation in functional.ACTIVATIONS.items() if activation.derivative is not None]
    parser = demo_parser(__doc__, "backprop.png")
    parser.add_argument("--input", type=finite, nargs="+", default=[1.0, 0.5], metavar="X", help="one sample")
    parser.add_argument("--target", type=finite, default=1.0, metavar="Y", help="for binary from 0 to 1")
    parser.add_argument("--hidden", type=positive, nargs="*", default=[2], metavar="WIDTH", help="hidden layers")
    parser.add_argument("--activation", choices=activations, default="sigmoid", help="of the hidden layers")
    parser.add_argument(
        "--head",
        choices=("binary", "regression"),
        default="binary",
        help="sigmoid and cross-entropy, or identity and squared error",
    )
    parser.add_argument("--lr", type=not_negative, default=0.5, help="learning rate of the step")
    return parser.parse_args()


def print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Columns as wide as what is in them: a name and how it is computed to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        texts, numbers = row[:2], row[2:]
        cells = [text.ljust(width) for text, width in zip(texts, widths[:2], strict=True)]
        cells += [text.rjust(width) for text, width in zip(numbers, widths[2:], strict=True)]
        print("  " + "   ".join(cells))


def number(value: float) -> str:
    """As many digits as one wants to follow."""
    return f"{value:.5g}"


def print_forward(graph: backprop.Graph) -> None:
    """Every node in the order in which they are computed."""
    print("\nforward: every node from those before it")
    rows = [(node.name, node.formula or "input", number(node.value)) for node in graph.nodes.values()]
    print_table(("node", "formula", "value"), rows)


def print_backward(graph: backprop.Graph, lr: float) -> float:
    """Every node and weight by the chain rule; returns how far that is from what the fused ops gave."""
    nodes = graph.nodes
    distances, rows = [], []
    for node in reversed(nodes.values()):
        factors = [(edge.derivative, nodes[edge.target].gradient) for edge in graph.edges if edge.source == node.name]
        rule = " + ".join(f"{number(derivative)} * {number(gradient)}" for derivative, gradient in factors)
        rows.append((node.name, rule or "1", number(node.gradient)))
        by_hand = sum(derivative * gradient for derivative, gradient in factors) if factors else 1.0
        distances.append(abs(by_hand - node.gradient))
    print("\nbackward: d loss / d node, the sum over its edges of (d target / d node) * (d loss / d target)")
    print_table(("node", "chain rule", "gradient"), rows)

    rows = []
    for edge in graph.edges:
        if edge.weight:
            gradient, value = (
                nodes[edge.target].gradient,
                1.0 if edge.source == backprop.ONE else nodes[edge.source].value,
            )
            step = edge.derivative - lr * edge.gradient
            rows.append(
                (
                    edge.weight,
                    f"{number(gradient)} * {number(value)}",
                    *map(number, (edge.gradient, edge.derivative, step)),
                )
            )
            distances.append(abs(gradient * value - edge.gradient))
    print(
        "\nweights: d loss / d weight = (d loss / d target) * source, and a step of gradient descent, lr " + number(lr)
    )
    print_table(("weight", "chain rule", "gradient", "value", "value after the step"), rows)
    return max(distances)


def main() -> int:
    """Compute, print, check, draw; returns the exit code."""
    arguments = parse_arguments()
    generator = torch.Generator().manual_seed(arguments.seed)
    input = torch.tensor(arguments.input, dtype=torch.float64)
    model = MLP(len(input), arguments.hidden, 1, arguments.activation, dtype=torch.float64, head=arguments.head)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator).mul_(10).round_().div_(10)
    try:
        graph = backprop.trace(model, input, arguments.target)
    except ValueError as error:
        fail(str(error))

    widths = "-".join(map(str, [model.in_features, *model.hidden_features, model.out_features]))
    print(f"{widths} {arguments.activation} network, {graph.columns[-1].title}")
    print_forward(graph)
    difference = print_backward(graph, arguments.lr)
    z, y_hat = graph.columns[-3].nodes[0], graph.nodes["y_hat"]
    rule, factor = {"binary": ("y_hat - y", 1), "regression": ("2 (y_hat - y)", 2)}[model.head]
    at_once = factor * (y_hat.value - arguments.target)
    print(f"\nfrom the loss to {z.name} at once: d loss / d {z.name} = {rule} = {number(at_once)}")

    loss = model.loss(input, torch.tensor(arguments.target, dtype=torch.float64).unsqueeze(0)).item()
    difference = max(difference, abs(at_once - z.gradient), abs(loss - graph.nodes["loss"].value))
    scale = max(1.0, *(abs(node.gradient) for node in graph.nodes.values()))
    if not difference <= 1e-9 * scale:
        print(f"backprop.py: the chain rule and the fused ops are {difference:.2g} apart", file=sys.stderr)
        return 1
    print(
        f"\nValues and gradients are those of the fused ops. Chain rule by hand: largest difference {difference:.2g}."
    )
    save_picture(plot.computation_graph(graph), arguments.output)
    return 0


if __name__ == "__main__":
    run_demo(main)
