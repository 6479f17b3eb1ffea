"""A multilayer perceptron, and its loss."""

from collections.abc import Sequence

from torch import Tensor

from torch_mlp import ops
from torch_mlp.functional.arguments import autocast, check_reduction, check_tensors, is_autocasting
from torch_mlp.functional.cross_entropy import check_classes, cross_entropy
from torch_mlp.ops import ACTIVATIONS


def mlp(
    input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activation: str = "sigmoid"
) -> Tensor:
    r"""Apply all layers of a multilayer perceptron as one op and one autograd node; gives logits.

    Stands for :func:`linear_act` once for each layer, with the activation but for the last. The parameters' gradients
    come as usual, so that any optimizer works.

    Args:
        input: the values to map.
        weights: the weight of each layer.
        biases: the bias of each layer, or None.
        activation: of the hidden layers: "identity", "sigmoid", "tanh", "relu" or "step", see :func:`linear_act`.

    Shape:
        - input: :math:`(*, in\_features)`, any leading dimensions, float64, float32, bfloat16 or float16
        - weights: :math:`(out\_features, in\_features)` of each layer, of the dtype and device of input
        - biases: :math:`(out\_features)` of each layer

    Returns:
        A tensor of shape :math:`(*, out\_features)` of the last layer, of the dtype of input.

    Raises:
        TypeError: if an argument is no tensor.
        ValueError: if the activation is not known, or there are not as many biases as weights, or none.
        RuntimeError: if a shape, dtype or device does not fit, or from ``backward`` through step.

    Example:
        >>> import torch
        >>> input, weights = torch.rand(64, 784), [torch.randn(512, 784), torch.randn(10, 512)]
        >>> mlp(input, weights, [torch.zeros(512), None], "relu").shape
        torch.Size([64, 10])

    Formula: Bishop, Pattern Recognition and Machine Learning, 2006, section 5.1.
    """
    input, parameters = _check_mlp("mlp", input, weights, biases, activation)
    return ops.mlp(input, parameters, activation)


def mlp_cross_entropy(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    target: Tensor,
    activation: str = "sigmoid",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""The loss of a multilayer perceptron as one autograd node: :func:`cross_entropy` of what :func:`mlp` gives.

    Args:
        input: the values to map, :math:`(N, in\_features)`.
        weights: see :func:`mlp`.
        biases: see :func:`mlp`.
        target: for each row the index of its class, or ``ignore_index``, :math:`(N)`; or probabilities :math:`(N, C)`.
        activation: see :func:`mlp`.
        weight: see :func:`cross_entropy`, as all that follow.
        ignore_index: rows with this target have loss 0 and gradient 0.
        reduction: "none", "mean" or "sum".
        label_smoothing: the share of each target that is spread over all classes.

    Returns:
        A tensor of the dtype of input and of shape :math:`(N)` for reduction "none", otherwise :math:`()`.

    Raises:
        The errors of :func:`mlp` and :func:`cross_entropy`.

    Example:
        >>> import torch
        >>> weights = [torch.randn(512, 784), torch.randn(10, 512)]
        >>> mlp_cross_entropy(torch.rand(64, 784), weights, [None, None], torch.randint(10, (64,))).shape
        torch.Size([])

    Formula: Bishop, Pattern Recognition and Machine Learning, 2006, sections 5.1 and 5.2.
    """
    check_tensors("mlp_cross_entropy", "weight", input=input, target=target, weight=weight)
    # Autocast computes the loss in float32, which is another dtype than that of the layers.
    if input.dim() != 2 or target.dim() == 2 or is_autocasting(input):
        logits = mlp(input, weights, biases, activation)
        return cross_entropy(logits, target, weight, None, ignore_index, None, reduction, label_smoothing)
    input, parameters = _check_mlp("mlp_cross_entropy", input, weights, biases, activation)
    check_reduction("mlp_cross_entropy", reduction)
    target = check_classes("mlp_cross_entropy", input, target, weight)
    return ops.mlp_cross_entropy(
        input, parameters, target, activation, weight, reduction, ignore_index, label_smoothing
    )


def _check_mlp(
    op: str, input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activation: str
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The input and the parameters as the ops take them: weight, bias, weight, bias, ..."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: expected activation to be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if not weights or len(weights) != len(biases):
        raise ValueError(
            f"{op}: expected a weight and a bias, or None, for each layer, got {len(weights)} and {len(biases)}"
        )
    check_tensors(op, input=input)
    for weight, bias in zip(weights, biases, strict=True):
        check_tensors(op, "bias", weight=weight, bias=bias)
    parameters = [parameter for layer in zip(weights, biases, strict=True) for parameter in layer]
    if is_autocasting(input):
        input, *parameters = autocast(None, input, *parameters)
    return input, tuple(parameters)
