"""Run by test_distributed.py in two processes, whose training must give what one process alone gets, in float64.

Usage: python -m torch.distributed.run --standalone --nproc-per-node=2 distributed_training.py

Prints a line of JSON for each check, with the traceback where it failed.
"""

import datetime
import functools
import json
import traceback

import pytest
import samples
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import torch_mlp
from torch_mlp import functional, nn

ROWS = 8  # of which each of two processes has a half
CROSS_ENTROPY = torch.nn.functional.cross_entropy


def data():
    generator = torch.Generator().manual_seed(7)
    input = torch.randn(ROWS, 5, dtype=torch.float64, generator=generator)
    return input, torch.randint(4, (ROWS,), generator=generator)


def my_half():
    half = slice(dist.get_rank() * ROWS // 2, (dist.get_rank() + 1) * ROWS // 2)
    return tuple(tensor[half] for tensor in data())


def network():
    torch.manual_seed(3)
    return nn.MLP(5, [6, 6], 4, "tanh", dtype=torch.float64)


def layers():
    """Layers and a loss of our own in a model of somebody else."""
    torch.manual_seed(3)
    return torch.nn.Sequential(
        nn.LinearSigmoid(5, 6), nn.LinearAct(6, 6, activation="tanh"), nn.LinearAct(6, 4)
    ).double()


def train(model, loss_of, arguments):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(model, *arguments).backward()
        optimizer.step()


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_trained_as_by_one(model, make, wrapped=None):
    """The model's parameters are those that stock layers get from all rows in one process."""
    alone = make()
    before = [parameter.detach().clone() for parameter in alone.parameters()]
    train(alone, lambda m, input, target: CROSS_ENTROPY(eager(m, input), target), data())
    for parameter, expected, first in zip(model.parameters(), alone.parameters(), before, strict=True):
        torch.testing.assert_close(full(parameter.detach()), expected.detach())
        assert not torch.equal(expected, first)


def eager(model, input):
    """The model by torch's own functions."""
    for layer in model.children():
        output = torch.nn.functional.linear(input, layer.weight, layer.bias)
        input = {"identity": lambda z: z, "tanh": torch.tanh, "sigmoid": torch.sigmoid}[layer.activation](output)
    return input


def by_forward(model, input, target):
    return functional.cross_entropy(model(input), target)


def by_loss(model, input, target):
    return model.loss(input, target)


class LossOf(torch.nn.Module):
    """A model whose forward is the loss of another: what DDP is to wrap, for it synchronizes forward only."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input, target):
        return self.model.loss(input, target)


def ddp():
    for make, wrap, loss_of in (
        (network, lambda model: model, by_forward),
        (layers, lambda model: model, by_forward),
        (network, LossOf, lambda model, *arguments: model(*arguments)),
    ):
        model = DistributedDataParallel(wrap(make()))
        train(model, loss_of, my_half())
        assert_trained_as_by_one(model, make)


def ddp_loss_is_no_attribute():
    with pytest.raises(AttributeError, match="'DistributedDataParallel' object has no attribute 'loss'"):
        DistributedDataParallel(network()).loss(*my_half())


def fsdp():
    mesh = init_device_mesh("cpu", (2,))
    for make, loss_of, parts in (
        (network, by_forward, False),
        (network, by_forward, True),
        (network, by_loss, False),
        (network, by_loss, True),
        (layers, by_forward, True),
    ):
        model = make()
        for layer in model.children() if parts else []:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert all(parameter.to_local().numel() < parameter.numel() for parameter in model.parameters())
        train(model, loss_of, my_half())
        assert_trained_as_by_one(model, make)


def dtensor(make):
    """Rows over the processes, or everything in both: values, gradients, placements and errors of torch's functions."""
    mesh = init_device_mesh("cpu", (2,))
    for rows in (Shard(0), Replicate()):
        torch.manual_seed(5)
        sample = make("cpu", torch.float64, ROWS)
        tensors = [
            distribute_tensor(tensor.detach(), mesh, [rows if place in sample.rows else Replicate()])
            for place, tensor in enumerate((*sample.inputs, *sample.others))
        ]
        inputs = [tensor.requires_grad_() for tensor in tensors[: len(sample.inputs)]]
        results = []
        for function in (sample.torchs, sample.ours):
            try:
                output = function(*tensors)
            except (RuntimeError, NotImplementedError) as error:
                results.append(type(error))
                continue
            grads = torch.autograd.grad((1.7 * output.square()).sum(), inputs)
            results.append((output.placements, [full(tensor) for tensor in (output, *grads)]))
        if isinstance(results[0], type):  # torch cannot either
            assert results[0] == results[1]
        else:
            assert results[0][0] == results[1][0]
            try:
                torch.testing.assert_close(results[1][1], results[0][1])
            except AssertionError:  # torch 2.10 averages the processes' means, of however many rows: ours may be right
                output = sample.torchs(*sample.inputs, *sample.others)
                grads = torch.autograd.grad((1.7 * output.square()).sum(), sample.inputs)
                torch.testing.assert_close(results[1][1], [output.detach(), *grads])


def dtensor_mixed():
    """A DTensor among plain tensors: an error that names the op, as torch's own."""
    mesh = init_device_mesh("cpu", (2,))
    input, target = data()
    model = network()
    distribute_module(model, mesh)
    for op, call in {
        "mlp": lambda: model(input),
        "linear_act": lambda: model.get_submodule("0")(input),
        "cross_entropy": lambda: functional.cross_entropy(input, distribute_tensor(target, mesh, [Shard(0)])),
    }.items():
        # torch 2.10 says for lists of tensors that it finds no device mesh, in a ValueError.
        sentence = f"torch_mlp.{op}.default got mixed torch.Tensor and DTensor|for op : torch_mlp::{op}"
        with pytest.raises((RuntimeError, ValueError), match=sentence):
            call()


def tensor_parallel():
    """The first layer's features over the processes, and the second layer's sums."""
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    for loss_of in (by_forward, by_loss):
        model = parallelize_module(network(), init_device_mesh("cpu", (2,)), plan)
        train(model, loss_of, data())
        assert_trained_as_by_one(model, network)


def epoch(model, images, labels, **options):
    """Four times all of the images as one minibatch, as train() does."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for _ in range(4):
        torch_mlp.train_epoch(model, images, labels, batch_size=len(images), optimizer=optimizer, scale=1.0, **options)


def train_epoch():
    """Of DDP, FSDP and tensor-parallel models, each step being one of autograd."""
    mesh = init_device_mesh("cpu", (2,))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    for wrap, arguments in (
        (DistributedDataParallel, my_half()),
        (lambda model: fully_shard(model, mesh=mesh), my_half()),
        (lambda model: parallelize_module(model, mesh, plan), data()),
    ):
        model = wrap(network())
        epoch(model, *arguments)
        assert_trained_as_by_one(model, network)


def train_epoch_compiled():
    """The compiled engine says why it cannot."""
    mesh = init_device_mesh("cpu", (2,))

    def distributed(model):
        distribute_module(model, mesh)
        return model

    for wrap, sentence in (
        (DistributedDataParallel, "expected an MLP or a Sequential of linear layers, got DistributedDataParallel"),
        (lambda model: fully_shard(model, mesh=mesh), "expected an MLP or a Sequential of linear layers, got FSDPMLP"),
        (distributed, "expected parameters that are plain tensors, got a DTensor in 0.weight"),
    ):
        with pytest.raises(ValueError, match=f"train_epoch: {sentence}; use the engine autograd"):
            epoch(wrap(network()), *my_half(), engine="epoch")


def checks():
    for function in (
        ddp,
        ddp_loss_is_no_attribute,
        fsdp,
        dtensor_mixed,
        tensor_parallel,
        train_epoch,
        train_epoch_compiled,
    ):
        yield function.__name__, function
    for row, variants in samples.OPS.items():
        for options, make in variants.items():
            yield f"dtensor {row}: {options}", functools.partial(dtensor, make)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    for name, check in checks():
        try:
            check()
            outcome = None
        except Exception:
            outcome = traceback.format_exc()
        if dist.get_rank() == 0:
            print(json.dumps({"check": name, "error": outcome}), flush=True)
    dist.destroy_process_group()
