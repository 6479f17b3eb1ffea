#!/usr/bin/env python3
"""Logistic regression of classes that a line separates: without a prior the weights grow for ever, with one they stay.

Once every sample lies on its side of the line, longer weights make each of them more probable, so that maximum
likelihood has no optimum: ||w|| grows, in the end as the logarithm of the steps. Maximum a posteriori (MAP) adds
lambda / 2 ||w||^2 to the sum of log(1 + exp(-y w.x)), which then has one. Gradient descent from weights of 0, for
several lambdas.
"""

import argparse

import torch
from options import demo_parser, positive, run_demo, save_picture
from tqdm import tqdm

from torch_mlp import nn, plot
from torch_mlp.descent import gradient_descent

LAMBDAS = (0.0, 0.01, 0.1, 1.0)
SAMPLES = 40
LR = 1.0


def parse_arguments() -> argparse.Namespace:
    """The options of the script."""
    parser = demo_parser(__doc__, "logistic_regression.png")
    parser.add_argument("--steps", type=positive, default=3000, metavar="N", help="of gradient descent")
    return parser.parse_args()


def separable_data(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of the plane on both sides of a strip around a line, with labels of -1 and +1."""
    points = torch.randn(4 * SAMPLES, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    distance = points @ torch.tensor([0.8, 0.6], dtype=torch.float64)
    apart = (distance.abs() > 0.3).nonzero().flatten()[:SAMPLES]
    return points[apart], distance[apart].sign()


def main() -> int:
    """Descend for each lambda, print a table, draw the norms; returns the exit code."""
    arguments = parse_arguments()
    input, target = separable_data(arguments.seed)
    print(f"{len(input)} points, a line separates their classes; {arguments.steps:,} steps of gradient descent\n")
    print("lambda   ||w||, half way   ||w|| at the end   loss at the end   least p(y|x)   right")
    histories: dict[float, list[float]] = {}
    for prior in LAMBDAS:
        # The mean over the samples, not their sum, is descended, and so lambda is divided by their number.
        model = nn.LogisticRegression(2, weight_decay=prior / len(input), dtype=torch.float64)
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
        norms = histories[prior] = []
        for _ in tqdm(range(arguments.steps), f"lambda {prior:g}", unit=" steps", leave=False, disable=None):
            gradient_descent(model, input, target, lr=LR, max_passes=1)
            norms.append(model.weight.norm().item())
        positive_class = model.predict_proba(input)
        probability = torch.where(target > 0, positive_class, 1 - positive_class)
        right = (probability > 0.5).double().mean().item()
        loss = len(input) * model.loss(input, target).item()
        half = norms[len(norms) // 2]
        print(
            f"{prior:6g}   {half:15.3f}   {norms[-1]:16.3f}   {loss:15.4f}   {probability.min():12.4f}   {right:5.0%}"
        )
    print()
    save_picture(plot.weight_norms(histories), arguments.output)
    return 0


if __name__ == "__main__":
    run_demo(main)
