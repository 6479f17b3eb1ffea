#!/usr/bin/env python3
"""Gradient descent, SGD and minibatch SGD on one network from the same weights: loss against passes and seconds.

Gradient descent looks at all images before each step, though a hundred of them say nearly the same. SGD makes a step
for every image, and most of the time of so small a step is overhead. Minibatch SGD lies between them and gets further
than either in the same time. So that all of them train for some seconds, SGD has a tenth of the passes of minibatch
SGD, and gradient descent ten times as many.
"""

import argparse
import math
import os
import time
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported, see train_mnist.py

import torch
from options import add_data_options, demo_parser, load_demo_data, positive, run_demo, save_picture

from torch_mlp import nn, plot, training
from torch_mlp.descent import Record, minibatch_sgd

HIDDEN = 64
RECORDS = 40  # of each method, about


class Method(NamedTuple):
    """One of the three, with a learning rate at which its loss on MNIST falls fast, and without leaps."""

    name: str
    batch_size: int
    lr: float
    max_passes: float


class WatchedMLP(nn.MLP):
    """A network that counts its steps, and the seconds in which its loss is only measured: no part of training."""

    steps = 0
    measuring = 0.0

    def loss(self, input: torch.Tensor, target: torch.Tensor, **options: Any) -> torch.Tensor:
        """The loss of MLP."""
        start = time.perf_counter()
        loss = super().loss(input, target, **options)
        if torch.is_grad_enabled():
            self.steps += 1
        else:
            self.measuring += time.perf_counter() - start
        return loss


def parse_arguments() -> argparse.Namespace:
    """The options of the script."""
    parser = demo_parser(__doc__, "optimizers.png")
    add_data_options(parser)
    parser.add_argument("--passes", type=positive, default=4, metavar="N", help="of minibatch SGD over the data")
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="of minibatch SGD")
    return parser.parse_args()


def print_comparison(curves: dict[str, list[Record]], seconds_per_pass: dict[str, float]) -> None:
    """What it took each method to come as far as the one that came least far."""
    least = max(min(record.loss for record in records) for records in curves.values())
    print(f"\nTo a loss of {least:.4f}:")
    for name, records in curves.items():
        passes = next(record.passes for record in records if record.loss <= least)
        print(f"{name:16s}  {passes:7.2f} passes  {passes * seconds_per_pass[name]:7.2f} seconds")


def main() -> int:
    """Descend, print a table, draw the curves; returns the exit code."""
    arguments = parse_arguments()
    dataset = load_demo_data(arguments)
    input, target = training.to_input(dataset.train_images, dataset, torch.float32), dataset.train_labels
    torch.manual_seed(arguments.seed)
    widths = (dataset.num_features, HIDDEN, dataset.num_classes)
    start = WatchedMLP(*widths, "tanh").state_dict()
    methods = [
        Method("gradient descent", len(input), 0.3, 10 * arguments.passes),
        Method("SGD", 1, 0.005, max(arguments.passes / 10, 1 / len(input))),
        Method("minibatch SGD", min(arguments.batch_size, len(input)), 0.1, arguments.passes),
    ]
    print(f"{dataset.name}: {len(input):,} images; network {'-'.join(map(str, widths))}, tanh\n")
    print("                  images a step  learning rate     steps  passes  seconds    loss")
    curves: dict[str, list[Record]] = {}
    seconds_per_pass: dict[str, float] = {}
    exit_code = 0
    try:
        for name, batch_size, lr, max_passes in methods:
            model = WatchedMLP(*widths, "tanh")
            model.load_state_dict(start)
            began = time.perf_counter()
            curves[name] = minibatch_sgd(
                model,
                input,
                target,
                batch_size=batch_size,
                lr=lr,
                max_passes=max_passes,
                records_per_pass=math.ceil(RECORDS / max_passes),
                generator=torch.Generator().manual_seed(arguments.seed),
                progress=True,
            )
            seconds = time.perf_counter() - began - model.measuring
            passes, loss = curves[name][-1]
            seconds_per_pass[name] = seconds / passes
            print(
                f"{name:16s}  {batch_size:13,d}  {lr:13g}  {model.steps:8,d}  {passes:6.2f}  {seconds:7.2f}"
                f"  {loss:6.4f}",
                flush=True,
            )
    except KeyboardInterrupt:
        if not curves:
            raise
        print("\nStopped by Ctrl-C; the picture has the methods that had ended.")
        exit_code = 130
    print_comparison(curves, seconds_per_pass)
    labels = {
        name: f"{name}: {batch_size:,d} image{'s' * (batch_size > 1)} a step, learning rate {lr:g}"
        for name, batch_size, lr, _ in methods
    }
    figure = plot.descent_curves(
        {labels[name]: records for name, records in curves.items()},
        {labels[name]: seconds for name, seconds in seconds_per_pass.items()},
    )
    save_picture(figure, arguments.output)
    return exit_code


if __name__ == "__main__":
    run_demo(main)
