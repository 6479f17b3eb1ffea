#!/usr/bin/env python3
"""XOR, which no line separates: what a perceptron, a linear network and a multilayer perceptron make of it.

The perceptron never stops making mistakes, and a linear network of however many layers is a linear map: neither gets
more than three of the four points right. (The best that a linear network can do is a probability of 1/2 for each of
them, so that a trace of its first weights decides which.) A hidden layer does it: of tanh units, trained, or of two
step units (OR and NAND, and AND of them) with weights by hand, since a step cannot be trained.

The trained network has four tanh units and torch's initialisation, and goes 300 steps of gradient descent over all four
points at a learning rate of 1: 199 of 200 seeds get all four right. Two units are enough for XOR, but with --hidden 2 a
third of the seeds get stuck with two points right. Sigmoid units take ten times the steps.
"""

import argparse
import warnings

import torch
from options import demo_parser, positive, run_demo, save_picture

from torch_mlp import nn, plot
from torch_mlp.descent import gradient_descent
from torch_mlp.nn.perceptron import NotSeparableWarning

INPUT = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
TARGET = torch.tensor([0, 1, 1, 0])
LR = 1.0
PASSES = 300


def parse_arguments() -> argparse.Namespace:
    """The options of the script."""
    parser = demo_parser(__doc__, "xor.png")
    parser.add_argument("--hidden", type=positive, default=4, metavar="WIDTH", help="hidden units of the networks")
    return parser.parse_args()


def trained_perceptron() -> nn.Perceptron:
    """As good as its learning rule makes it."""
    model = nn.Perceptron(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotSeparableWarning)  # which is what is to be seen
        model.fit(INPUT, TARGET)
    return model


def trained_network(hidden: int, activation: str) -> nn.MLP:
    """As good as gradient descent makes it."""
    model = nn.MLP(2, hidden, 1, activation, head="binary")
    gradient_descent(model, INPUT, TARGET, lr=LR, max_passes=PASSES)
    return model


def step_network() -> nn.MLP:
    """XOR is (x1 OR x2) AND (x1 NAND x2); every unit fires where its sum is at least 0."""
    model = nn.MLP(2, 2, 1, "step", head="binary")
    weights = {
        "0.weight": [[1.0, 1.0], [-1.0, -1.0]],  # OR, NAND
        "0.bias": [-0.5, 1.5],
        "2.weight": [[1.0, 1.0]],  # AND
        "2.bias": [-1.5],
    }
    model.load_state_dict({name: torch.tensor(values) for name, values in weights.items()})
    return model


def print_truth_table(name: str, output: torch.Tensor) -> None:
    """What a model gives for each input, and whether it is right."""
    right = output == TARGET
    print(f"{name}: {100 * right.double().mean():.0f} % right")
    print("  x1  x2  target  output")
    for (x1, x2), target, value, is_right in zip(
        INPUT.int().tolist(), TARGET.tolist(), output.tolist(), right.tolist(), strict=True
    ):
        print(f"  {x1:2d}  {x2:2d}  {target:6d}  {value:6d}  {'right' if is_right else 'wrong'}")
    print()


def main() -> int:
    """Train, print, draw; returns the exit code."""
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    models: dict[str, nn.Perceptron | nn.MLP] = {
        "perceptron": trained_perceptron(),
        "linear network": trained_network(arguments.hidden, "identity"),
        "MLP, tanh": trained_network(arguments.hidden, "tanh"),
        "MLP, step, by hand": step_network(),
    }
    for name, model in models.items():
        print_truth_table(name, model.predict(INPUT))
    figure = plot.decision_regions({name: model.predict for name, model in models.items()}, INPUT, TARGET)
    save_picture(figure, arguments.output)
    return 0


if __name__ == "__main__":
    run_demo(main)
