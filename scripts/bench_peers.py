"""What bench_train.py measures: one network in one way of training it after the other.

Each peer is a function from a Task to what trains for an epoch in a given order, and the parameters that this moves.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from torch_mlp import data, epoch, nn

LR = 0.1

Peer = Callable[[Tensor], None]  # trains for one epoch in the given order
Parameters = list[Tensor]  # weight, bias, weight, bias, ...


class Task:
    """A network, the data it learns, and the options all peers share."""

    def __init__(
        self, dataset: data.Dataset, data_dir: str, widths: tuple[int, ...], batch_size: int, dense: bool
    ) -> None:
        self.data_dir, self.widths, self.batch_size, self.dense = data_dir, widths, batch_size, dense
        self.scale, self.shift = dataset.scale, dataset.shift
        self.images = dataset.train_images.flatten(1).contiguous()
        self.test_images = dataset.test_images.flatten(1)
        if dense:  # no pixel is 0, else the same
            self.images, self.test_images = self.images.clamp(min=1), self.test_images.clamp(min=1)
        self.labels, self.test_labels = dataset.train_labels, dataset.test_labels
        self.input = self.images.float() * self.scale + self.shift
        torch.manual_seed(0)
        start = nn.MLP(widths[0], widths[1:-1], widths[-1])
        self.start = [parameter.detach() for parameter in start.parameters()]
        self.label = f"{'-'.join(map(str, widths))}, batch {batch_size}{', no zero pixels' if dense else ''}"

    def stock(self) -> torch.nn.Sequential:
        """The network of stock torch layers."""
        layers: list[torch.nn.Module] = []
        for ins, outs in pairwise(self.widths):
            layers += [torch.nn.Linear(ins, outs), torch.nn.Sigmoid()]
        model = torch.nn.Sequential(*layers[:-1])
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), self.start, strict=True):
                parameter.copy_(value)
        return model

    def fused(self) -> nn.MLP:
        """The network of ours."""
        model = nn.MLP(self.widths[0], self.widths[1:-1], self.widths[-1])
        model.load_state_dict(self.stock().state_dict())
        return model

    def operations(self) -> int:
        """Floating-point operations of an epoch: three products for each layer, but for the first no grad_input."""
        products = [ins * outs for ins, outs in pairwise(self.widths)]
        return 2 * len(self.labels) * (3 * sum(products) - products[0])

    @torch.no_grad()
    def accuracy(self, parameters: Parameters) -> float:
        """The share of the test images that these parameters get right."""
        hidden = self.test_images.float() * self.scale + self.shift
        for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
            logits = torch.nn.functional.linear(hidden, weight, bias)
            hidden = torch.sigmoid(logits)
        return (logits.argmax(1) == self.test_labels).double().mean().item()


# --- the peers: each gives what trains for an epoch, and its parameters ---


def ours(task: Task) -> tuple[Peer, Parameters]:
    """torch_mlp.train_epoch."""
    return _ours(task, "full")


def ours_bfloat16(task: Task) -> tuple[Peer, Parameters]:
    """The same with products in bfloat16."""
    return _ours(task, "bf16")


def _ours(task: Task, precision: str) -> tuple[Peer, Parameters]:
    model = task.fused()
    options: dict[str, Any] = {"batch_size": task.batch_size, "lr": LR, "scale": task.scale, "shift": task.shift}

    def run(order: Tensor) -> None:
        epoch.train_epoch(model, task.images, task.labels, order=order, engine="epoch", precision=precision, **options)

    return run, list(model.parameters())


def ours_autograd(task: Task) -> tuple[Peer, Parameters]:
    """Our network and loss as one autograd node, torch.optim.SGD; the normalised images are in memory."""
    model = task.fused()
    return _steps(task, model, model.loss)


def torch_eager(task: Task) -> tuple[Peer, Parameters]:
    """Stock layers, autograd, torch.optim.SGD; the normalised images are in memory."""
    model = task.stock()
    return _steps(task, model, _loss_of(model))


def torch_compiled(task: Task) -> tuple[Peer, Parameters]:
    """The same, with forward pass and loss compiled."""
    model = task.stock()
    return _steps(task, model, torch.compile(_loss_of(model)))


def _loss_of(model: torch.nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda input, target: torch.nn.functional.cross_entropy(model(input), target)


def _steps(task: Task, model: torch.nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor]) -> tuple[Peer, Parameters]:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)

    def run(order: Tensor) -> None:
        for index in order.split(task.batch_size):
            loss = loss_of(task.input[index], task.labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run, list(model.parameters())


@torch.no_grad()
def _manual_epoch(task: Task, parameters: Parameters, order: Tensor) -> None:
    weights, biases = parameters[::2], parameters[1::2]
    for index in order.split(task.batch_size):
        hidden = [task.input[index]]
        for weight, bias in zip(weights, biases, strict=True):
            hidden.append(torch.addmm(bias, hidden[-1], weight.mT).sigmoid_())
            if weight is weights[-1]:
                hidden[-1] = torch.addmm(bias, hidden[-2], weight.mT)
        grad = torch.softmax(hidden.pop(), 1)
        grad[torch.arange(len(index)), task.labels[index]] -= 1
        grad /= len(index)
        for weight, bias in zip(reversed(weights), reversed(biases), strict=True):
            output = hidden.pop()
            below = grad @ weight * output * (1 - output) if hidden else grad
            weight.addmm_(grad.mT, output, alpha=-LR)
            bias.sub_(grad.sum(0), alpha=LR)
            grad = below


def torch_manual(task: Task) -> tuple[Peer, Parameters]:
    """torch without autograd, the backward pass by hand."""
    parameters = [value.clone() for value in task.start]
    return lambda order: _manual_epoch(task, parameters, order), parameters


def numpy_manual(task: Task) -> tuple[Peer, Parameters]:
    """numpy, the backward pass by hand."""
    weights = [value.clone().numpy() for value in task.start[::2]]
    biases = [value.clone().numpy() for value in task.start[1::2]]
    images, labels = task.input.numpy(), task.labels.numpy()

    def run(order: Tensor) -> None:
        for index in np.split(order.numpy(), range(task.batch_size, len(order), task.batch_size)):
            hidden = [images[index]]
            for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
                hidden.append(1 / (1 + np.exp(-(hidden[-1] @ weight.T + bias))))
            grad = hidden[-1] @ weights[-1].T + biases[-1]
            grad = np.exp(grad - grad.max(1, keepdims=True))
            grad /= grad.sum(1, keepdims=True)
            grad[np.arange(len(index)), labels[index]] -= 1
            grad /= len(index)
            for place in reversed(range(len(weights))):
                output = hidden[place]
                below = grad @ weights[place] * output * (1 - output) if place else grad
                weights[place] -= LR * (grad.T @ output)
                biases[place] -= LR * grad.sum(0)
                grad = below

    return run, [torch.from_numpy(value) for pair in zip(weights, biases, strict=True) for value in pair]


def jax_scan(task: Task) -> tuple[Peer, Parameters]:
    """JAX, a whole epoch as one jitted scan over the minibatches; what is left of the images is not used.

    Its number of threads is fixed when it starts: it takes all cores, whatever the others are held to.
    """
    import jax
    import jax.numpy as jnp

    images, labels = jnp.asarray(task.input.numpy()), jnp.asarray(task.labels.numpy())
    state = [jnp.asarray(value.numpy()) for value in task.start]
    final = [value.clone() for value in task.start]

    def loss_of(parameters: list, input: Any, target: Any) -> Any:
        for place in range(0, len(parameters), 2):
            logits = input @ parameters[place].T + parameters[place + 1]
            input = jax.nn.sigmoid(logits)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), target[:, None], 1).mean()

    def step(parameters: list, index: Any) -> tuple[list, None]:
        grads = jax.grad(loss_of)(parameters, images[index], labels[index])
        return [value - LR * grad for value, grad in zip(parameters, grads, strict=True)], None

    scan = jax.jit(lambda parameters, order: jax.lax.scan(step, parameters, order)[0], donate_argnums=0)

    def run(order: Tensor) -> None:
        nonlocal state
        batches = len(order) // task.batch_size
        order = order[: batches * task.batch_size].reshape(batches, task.batch_size)
        state = jax.block_until_ready(scan(state, jnp.asarray(order.numpy())))
        for target, value in zip(final, state, strict=True):
            target.copy_(torch.from_numpy(np.array(value)))

    return run, final


def scikit_learn(task: Task) -> tuple[Peer, Parameters]:
    """scikit-learn's MLPClassifier."""
    from sklearn.neural_network import MLPClassifier

    model = MLPClassifier(
        task.widths[1:-1],
        activation="logistic",
        solver="sgd",
        alpha=0.0,
        batch_size=task.batch_size,
        learning_rate_init=LR,
        momentum=0.0,
        nesterovs_momentum=False,
        shuffle=False,
    )
    images, labels = task.input.numpy(), task.labels.numpy()
    classes = np.arange(task.widths[-1])
    model.partial_fit(
        images[: task.batch_size], labels[: task.batch_size], classes=classes
    )  # which makes its parameters
    final = [value.clone() for value in task.start]
    for place, (weight, bias) in enumerate(zip(model.coefs_, model.intercepts_, strict=True)):
        weight[:], bias[:] = task.start[2 * place].mT.numpy(), task.start[2 * place + 1].numpy()

    def run(order: Tensor) -> None:
        index = order.numpy()
        model.partial_fit(images[index], labels[index])
        for place, (weight, bias) in enumerate(zip(model.coefs_, model.intercepts_, strict=True)):
            final[2 * place].copy_(torch.from_numpy(weight.T))
            final[2 * place + 1].copy_(torch.from_numpy(bias))

    return run, final


class _Order(Sampler):
    """A sampler in the order of the epoch."""

    def __init__(self) -> None:
        self.order: list[int] = []

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


def usual_script(task: Task) -> tuple[Peer, Parameters]:
    """What tutorials do: torchvision's data set and transforms in a DataLoader, stock layers, torch.optim.SGD."""
    from torchvision import datasets, transforms

    model = torch.nn.Sequential(torch.nn.Flatten(), *task.stock())
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    sampler = _Order()
    std = 1 / (255 * task.scale)
    normalise = transforms.Compose([transforms.ToTensor(), transforms.Normalize(-task.shift * std, std)])
    loader = DataLoader(datasets.MNIST(task.data_dir, transform=normalise), task.batch_size, sampler=sampler)

    def run(order: Tensor) -> None:
        sampler.order = order.tolist()
        for input, target in loader:
            loss = torch.nn.functional.cross_entropy(model(input), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run, list(model.parameters())


PEERS: dict[str, Callable[[Task], tuple[Peer, Parameters]]] = {
    "train_epoch": ours,
    "train_epoch, bf16": ours_bfloat16,
    "MLP.loss, autograd": ours_autograd,
    "torch eager": torch_eager,
    "torch.compile": torch_compiled,
    "torch, by hand": torch_manual,
    "numpy, by hand": numpy_manual,
    "JAX, all cores": jax_scan,
    "scikit-learn": scikit_learn,
    "DataLoader": usual_script,
}
SLOW = ("scikit-learn", "DataLoader")  # one turn only
