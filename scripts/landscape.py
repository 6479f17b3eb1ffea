#!/usr/bin/env python3
"""The loss of a multilayer perceptron is not convex: its landscape, and a barrier between two trained networks.

Around a trained network the loss is taken on a plane of two random directions, in which the weights of each neuron
move by as much as they are long (Li et al., Visualizing the Loss Landscape of Neural Nets, 2018). Then it is taken on
the straight line to a network that was trained from other weights. A convex function lies nowhere above the chord
between the ends of a line; softmax regression, the network without a hidden layer, shows that beside it.
"""

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported, see train_mnist.py

import torch
from options import add_data_options, demo_parser, fail, load_demo_data, positive, run_demo, save_picture

from torch_mlp import nn, plot, training
from torch_mlp.descent import minibatch_sgd
from torch_mlp.landscape import filter_normalized_direction, height_above_chord, losses_between, losses_on_plane

MODELS = {"multilayer perceptron": [32], "softmax regression": []}  # the hidden layers
IMAGES = 2000  # over which the landscape is taken
REACH = 1.5  # of the plane; at 1 the weights have moved by as much as they are long


def parse_arguments() -> argparse.Namespace:
    """The options of the script."""
    parser = demo_parser(__doc__, "landscape.png")
    add_data_options(parser)
    parser.add_argument("--points", type=positive, default=41, metavar="N", help="of the plane in each direction")
    parser.add_argument("--passes", type=positive, default=3, metavar="N", help="of training over the data")
    return parser.parse_args()


def main() -> int:
    """Train, take the losses, say whether they are convex, draw; returns the exit code."""
    arguments = parse_arguments()
    if arguments.points < 2:
        fail("--points: expected at least 2, got 1")
    dataset = load_demo_data(arguments)
    input, target = training.to_input(dataset.train_images, dataset, torch.float32), dataset.train_labels
    print(f"{dataset.name}: {len(input):,} images")
    pairs: dict[str, list[nn.MLP]] = {}
    for name, hidden in MODELS.items():
        pairs[name] = []
        for seed in (arguments.seed, arguments.seed + 1):
            generator = torch.Generator().manual_seed(seed)
            model = nn.MLP(dataset.num_features, hidden, dataset.num_classes, "tanh").init_gaussian_(0.1, generator)
            records = minibatch_sgd(
                model,
                input,
                target,
                batch_size=min(32, len(input)),
                lr=0.05 if hidden else 0.01,
                max_passes=arguments.passes,
                generator=generator,
                progress=True,
            )
            pairs[name].append(model)
            print(f"{name}, seed {seed}: loss {records[0].loss:.4f}, trained {records[-1].loss:.4f}", flush=True)

    input, target = input[:IMAGES], target[:IMAGES]
    model = pairs["multilayer perceptron"][0]
    generator = torch.Generator().manual_seed(arguments.seed)
    directions = [filter_normalized_direction(model, generator) for _ in range(2)]
    steps = torch.linspace(-REACH, REACH, arguments.points)
    plane = losses_on_plane(model, input, target, *directions, steps, progress=True)

    print(f"\nOn the straight line between the two, over {len(input):,} images:")
    lines: dict[str, torch.Tensor] = {}
    for name, (first, last) in pairs.items():
        # In float64, so that no rounding is taken for a bump.
        lines[name] = losses_between(first.double(), last.double(), input.double(), target)
        begin, middle, end = lines[name][[0, len(lines[name]) // 2, -1]].tolist()
        height = height_above_chord(lines[name])
        print(
            f"{name:22s} {begin:.4f} and {end:.4f} at the ends, mean {(begin + end) / 2:.4f}, {middle:.4f} midway; "
            + (f"not convex: up to {height:.4f} above the chord" if height > 1e-9 else "nowhere above the chord")
        )
    save_picture(plot.loss_landscape(steps, plane, lines), arguments.output)
    return 0


if __name__ == "__main__":
    run_demo(main)
