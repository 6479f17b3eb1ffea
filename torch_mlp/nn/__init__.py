"""Layers and models as ``torch.nn.Module``s: drop-in twins of torch's own, over :mod:`torch_mlp.functional`."""

from torch_mlp.nn.linear import LinearAct, LinearSigmoid
from torch_mlp.nn.logistic_regression import LogisticRegression
from torch_mlp.nn.loss import BCEWithLogitsLoss, CrossEntropyLoss, LinearCrossEntropyLoss
from torch_mlp.nn.mlp import MLP
from torch_mlp.nn.perceptron import Perceptron

__all__ = [
    "MLP",
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "LinearAct",
    "LinearCrossEntropyLoss",
    "LinearSigmoid",
    "LogisticRegression",
    "Perceptron",
]
