"""The ops with the signatures of ``torch.nn.functional``: values, gradients of any order, ``torch.compile``."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction as torch_reduction

from torch_mlp import ops
from torch_mlp.ops import ACTIVATIONS
from torch_mlp.ops.transforms import in_transform

__all__ = [
    "ACTIVATIONS",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "linear_act",
    "linear_binary_cross_entropy",
    "linear_sigmoid",
    "mlp",
    "mlp_cross_entropy",
]


def linear_act(input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "sigmoid") -> Tensor:
    r"""Apply a linear map and an activation in one op: ``activation(input @ weight.T + bias)``.

    Stands for ``torch.sigmoid(torch.nn.functional.linear(input, weight, bias))`` and the like. The backward pass needs
    the output, not the pre-activation, so the latter is never stored.

    Args:
        input: the values to map.
        weight: the matrix of the linear map.
        bias: added to every row of the product, if given.
        activation: "identity", "sigmoid", "tanh" or "relu" (whose derivative at 0 is 0, as in torch).

    Shape:
        - input: :math:`(*, in\_features)`, any leading dimensions, float64, float32, bfloat16 or float16
        - weight: :math:`(out\_features, in\_features)`, of the dtype and device of input
        - bias: :math:`(out\_features)`, of the dtype and device of input

    Returns:
        A tensor of shape :math:`(*, out\_features)`, of the dtype of input. 16-bit dtypes are accumulated in float32.

    Raises:
        ValueError: if the activation is not known.
        RuntimeError: if a shape, dtype or device does not fit.

    Example:
        >>> input, weight, bias = torch.randn(64, 784), torch.randn(512, 784), torch.randn(512)
        >>> linear_act(input, weight, bias, "tanh").shape
        torch.Size([64, 512])

    Formula: Bishop, Pattern Recognition and Machine Learning, 2006, section 5.1.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"linear_act: expected activation to be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if _is_autocasting(input):
        input, weight, bias = _autocast(None, input, weight, bias)
    return ops.linear_act(input, weight, bias, activation)


def linear_sigmoid(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear map and the sigmoid in one op: :func:`linear_act` with ``activation="sigmoid"``.

    Example:
        >>> linear_sigmoid(torch.zeros(1, 3), torch.ones(2, 3))
        tensor([[0.5000, 0.5000]])
    """
    return linear_act(input, weight, bias, "sigmoid")


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
        activation: of the hidden layers: "identity", "sigmoid", "tanh" or "relu".

    Shape:
        - input: :math:`(*, in\_features)`, any leading dimensions, float64, float32, bfloat16 or float16
        - weights: :math:`(out\_features, in\_features)` of each layer, of the dtype and device of input
        - biases: :math:`(out\_features)` of each layer

    Returns:
        A tensor of shape :math:`(*, out\_features)` of the last layer, of the dtype of input.

    Raises:
        ValueError: if the activation is not known, or there are not as many biases as weights, or none.
        RuntimeError: if a shape, dtype or device does not fit.

    Example:
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
        target: for each row the index of its class, or ``ignore_index``, :math:`(N)`.
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
        >>> weights = [torch.randn(512, 784), torch.randn(10, 512)]
        >>> mlp_cross_entropy(torch.rand(64, 784), weights, [None, None], torch.randint(10, (64,))).shape
        torch.Size([])

    Formula: Bishop, Pattern Recognition and Machine Learning, 2006, sections 5.1 and 5.2.
    """
    # Autocast computes the loss in float32, which is another dtype than that of the layers.
    if input.dim() != 2 or _is_autocasting(input):
        logits = mlp(input, weights, biases, activation)
        return cross_entropy(logits, target, weight, None, ignore_index, None, reduction, label_smoothing)
    input, parameters = _check_mlp("mlp_cross_entropy", input, weights, biases, activation)
    target = _check_cross_entropy("mlp_cross_entropy", target, weight, reduction)
    return ops.mlp_cross_entropy(
        input, parameters, target, activation, weight, reduction, ignore_index, label_smoothing
    )


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Softmax cross-entropy of logits and class indices: ``torch.nn.functional.cross_entropy`` in one op.

    Softmax and loss are computed in one visit of each row and the gradient in another; the probabilities are never
    stored. Logits of any size are handled, since each row is shifted by its maximum.

    Args:
        input: logits.
        target: for each row the index of its class, or ``ignore_index``.
        weight: a factor for each class, if given.
        size_average: deprecated, see ``reduction``.
        ignore_index: rows with this target have loss 0 and gradient 0.
        reduce: deprecated, see ``reduction``.
        reduction: "none" gives each row's loss, "sum" their sum, "mean" their sum divided by the sum of the weights of
            the targets (which is NaN where every row is ignored, as in torch).
        label_smoothing: the share, from 0 to 1, of each target that is spread evenly over all classes.

    Shape:
        - input: :math:`(N, C)`, batch and classes, or :math:`(C)`, or :math:`(N, C, d_1, \ldots)`, which is copied so
          that the classes of a row lie side by side; float64, float32, bfloat16 or float16
        - target: :math:`(N)`, or :math:`()`, or :math:`(N, d_1, \ldots)`; int64, int32, int16 or uint8, values in
          :math:`[0, C)`
        - weight: :math:`(C)`, of the dtype and device of input

    Returns:
        A tensor of the dtype of input and of the shape of target for reduction "none", otherwise of shape :math:`()`.

    Raises:
        IndexError: if a target is neither a class nor ``ignore_index`` (on CUDA a device-side assertion, as in torch).
        NotImplementedError: for class probabilities as target.
        RuntimeError: if a dtype, a device, the shape of weight or of a target (N, d1, ...) does not fit.
        ValueError: if the reduction is not known or target and input differ in batch size.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, 0.0]], requires_grad=True)
        >>> loss = cross_entropy(logits, torch.tensor([0]))
        >>> loss.backward()
        >>> loss.detach(), logits.grad
        (tensor(0.2395), tensor([[-0.2130,  0.1065,  0.1065]]))

    Formula: Bishop, Pattern Recognition and Machine Learning, 2006, section 4.3.4; label smoothing: Szegedy et al.,
    2015, arXiv:1512.00567.
    """
    if size_average is not None or reduce is not None:
        reduction = torch_reduction.legacy_get_string(size_average, reduce)
    target = _check_cross_entropy("cross_entropy", target, weight, reduction)
    if _is_autocasting(input):
        input, weight = _autocast(torch.float32, input, weight)
    if input.dim() == 2:
        return ops.cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing)
    if input.dim() == 0:
        raise RuntimeError("cross_entropy: expected input of shape (C), (N, C) or (N, C, d1, ...), got ()")
    # Rows of classes, from (C) or (N, C, d1, ...), and their targets in the same order.
    classes = 0 if input.dim() == 1 else 1
    shape = input.shape[:classes] + input.shape[classes + 1 :]
    if target.shape != shape and not (input.dim() == 1 and target.shape == (1,)):
        # As in torch, another batch size is a ValueError, another shape behind it is not.
        error = ValueError if input.dim() == 1 or target.shape[:1] != shape[:1] else RuntimeError
        raise error(f"cross_entropy: expected target of shape {tuple(shape)}, got {tuple(target.shape)}")
    rows = input.movedim(classes, -1).reshape(-1, input.shape[classes])
    loss = ops.cross_entropy(rows, target.reshape(-1), weight, reduction, ignore_index, label_smoothing)
    return loss.reshape(shape) if reduction == "none" else loss


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    r"""Sigmoid and binary cross-entropy: ``torch.nn.functional.binary_cross_entropy_with_logits`` in one op.

    Loss and gradient are each computed in one visit of the logits; the sigmoid is never stored, and weights are not
    written out to the shape of the logits. Logits of any size are handled, and losses near 0 to all their digits.

    Args:
        input: logits.
        target: for each logit the probability of the positive class, which is differentiated too where it requires
            grad.
        weight: a factor for each logit, if given.
        size_average: deprecated, see ``reduction``.
        reduce: deprecated, see ``reduction``.
        reduction: "none" gives each logit's loss, "sum" their sum, "mean" their sum divided by their number (which is
            NaN where there is none, as in torch).
        pos_weight: a factor for the positive class of each logit, if given.

    Shape:
        - input: :math:`(*)`, any shape, float64, float32, bfloat16 or float16
        - target: :math:`(*)`, of the shape and device of input, floating-point
        - weight, pos_weight: any that broadcast to :math:`(*)`, such as :math:`(C)` for :math:`(N, C)`

    Returns:
        A tensor of the dtype of target, as in torch, and of the shape of input for reduction "none", otherwise
        :math:`()`. Where dtypes differ, the wider one of input and target is computed in.

    Raises:
        NotImplementedError: if input is not floating-point or target or pos_weight are of dtype bool.
        RuntimeError: if another dtype, a device or the shape of a weight does not fit, or a weight requires grad.
        ValueError: if the reduction is not known or target and input differ in shape.

    Example:
        >>> logits = torch.tensor([2.0, -1.0], requires_grad=True)
        >>> loss = binary_cross_entropy_with_logits(logits, torch.tensor([1.0, 0.0]))
        >>> loss.backward()
        >>> loss.detach(), logits.grad
        (tensor(0.2201), tensor([-0.0596,  0.1345]))

    Formula: Bishop, Pattern Recognition and Machine Learning, 2006, section 4.3.2.
    """
    if size_average is not None or reduce is not None:
        reduction = torch_reduction.legacy_get_string(size_average, reduce)
    op = "binary_cross_entropy_with_logits"
    _check_reduction(op, reduction)
    if target.shape != input.shape:
        raise ValueError(f"{op}: expected target of shape {tuple(input.shape)}, got {tuple(target.shape)}")
    _check_binary_cross_entropy(op, input, target, weight, pos_weight)
    if _is_autocasting(input):
        input, target, weight, pos_weight = _autocast(torch.float32, input, target, weight, pos_weight)
    if target.dtype is input.dtype and weight is None and pos_weight is None:
        return ops.binary_cross_entropy(input, target, None, None, reduction)
    input, same, weight, pos_weight = _in_one_dtype(input, target, weight, pos_weight)
    return ops.binary_cross_entropy(input, same, weight, pos_weight, reduction).to(target.dtype)


def linear_binary_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""The loss of a binary or multi-label classifier's last layer as one autograd node.

    Stands for :func:`binary_cross_entropy_with_logits` of ``torch.nn.functional.linear(input, linear_weight,
    linear_bias)``: logistic regression for one output, as many independent ones for several.

    Args:
        input: the values to map.
        linear_weight: the matrix of the linear map.
        target: for each logit the probability of the positive class.
        linear_bias: added to every row of the product, if given.
        weight: a factor for each logit, if given.
        pos_weight: a factor for the positive class of each logit, if given.
        reduction: "none", "mean" or "sum".

    Shape:
        - input: :math:`(*, in\_features)`, any leading dimensions, float64, float32, bfloat16 or float16
        - linear_weight: :math:`(out\_features, in\_features)`, of the dtype and device of input
        - target: :math:`(*, out\_features)`, or just :math:`(*)` where there is one output
        - linear_bias: :math:`(out\_features)`, of the dtype and device of input
        - weight, pos_weight: any that broadcast to the shape of target

    Returns:
        A tensor of the dtype of target, and of its shape for reduction "none", otherwise of shape :math:`()`.

    Raises:
        The errors of :func:`linear_act` and :func:`binary_cross_entropy_with_logits`.

    Example:
        >>> input, target = torch.randn(64, 784), torch.randint(2, (64,)).float()
        >>> linear_binary_cross_entropy(input, torch.zeros(1, 784), target, linear_bias=torch.zeros(1))
        tensor(0.6931)

    Formula: Bishop, Pattern Recognition and Machine Learning, 2006, section 4.3.2.
    """
    op = "linear_binary_cross_entropy"
    _check_reduction(op, reduction)
    if linear_weight.dim() != 2:
        shape = tuple(linear_weight.shape)
        raise RuntimeError(f"{op}: expected linear_weight of shape (out_features, in_features), got {shape}")
    rows, out_features = input.shape[:-1], linear_weight.shape[0]
    if target.shape != (*rows, out_features) and not (out_features == 1 and target.shape == rows):
        raise ValueError(f"{op}: expected target of shape {(*rows, out_features)}, got {tuple(target.shape)}")
    _check_binary_cross_entropy(op, input, target, weight, pos_weight)
    # Where dtypes differ, as in autocast, the loss is computed in another one than the linear map.
    if _is_autocasting(input) or any(
        t is not None and (t.dtype != input.dtype or t.is_cuda != input.is_cuda) for t in (target, weight, pos_weight)
    ):
        logits = linear_act(input, linear_weight, linear_bias, "identity").reshape(target.shape)
        return binary_cross_entropy_with_logits(logits, target, weight, reduction=reduction, pos_weight=pos_weight)
    return ops.linear_binary_cross_entropy(input, linear_weight, linear_bias, target, weight, pos_weight, reduction)


def _check_reduction(op: str, reduction: str) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{op}: expected reduction to be one of none, mean, sum, got {reduction!r}")


def _check_binary_cross_entropy(
    op: str, input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None
) -> None:
    """What the op itself does not check, and where torch's error is of another class."""
    if not input.is_floating_point():
        raise NotImplementedError(f"{op}: expected input of a floating-point dtype, got {input.dtype}")
    for name, self in (("target", target), ("weight", weight), ("pos_weight", pos_weight)):
        if self is None:
            continue
        if self.dtype is torch.bool and self is not weight:
            raise NotImplementedError(f"{op}: expected {name} of a floating-point dtype, got {self.dtype}")
        # Within torch.func the composed op is differentiated by weights too.
        if self is not target and self.requires_grad and torch.is_grad_enabled() and not in_transform():
            raise RuntimeError(f"{op}: expected {name} not to require grad, for the loss has no gradient by it")


def _in_one_dtype(input: Tensor, target: Tensor, *weights: Tensor | None) -> list[Any]:
    """Tensors that torch takes together, as an op takes them: in one dtype, scalars on the device of the others."""
    dtype = input.dtype
    if target.is_floating_point():  # what is not, the op refuses, and so complex weights
        dtype = torch.promote_types(dtype, target.dtype)
        target = target.to(dtype)
    factors = [
        w if w is None or w.is_complex() else w.to(w.device if w.dim() else input.device, dtype) for w in weights
    ]
    return [input.to(dtype), target, *factors]


def _check_cross_entropy(op: str, target: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """The target as the ops take it."""
    _check_reduction(op, reduction)
    if target.is_floating_point():
        raise NotImplementedError(
            f"{op}: expected class indices of dtype torch.int64 as target, got {target.dtype}: class probabilities are "
            "not supported yet, use torch.nn.functional.cross_entropy"
        )
    if weight is not None and weight.requires_grad:
        raise RuntimeError(f"{op}: expected weight not to require grad, for the loss has no gradient by it")
    return target.long() if target.dtype in (torch.int32, torch.int16, torch.uint8) else target


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
    parameters = [parameter for layer in zip(weights, biases, strict=True) for parameter in layer]
    if _is_autocasting(input):
        input, *parameters = _autocast(None, input, *parameters)
    return input, tuple(parameters)


def _is_autocasting(input: Tensor) -> bool:
    # What input.device.type would say takes as long as all the rest of a call.
    return torch.is_autocast_enabled("cuda" if input.is_cuda else "cpu") and not input.is_meta


def _autocast(dtype: torch.dtype | None, input: Tensor, *others: Tensor | None) -> list[Any]:
    """The tensors as torch.autocast hands them to an op: float32 and below in dtype, None being autocast's own."""
    dtype = dtype or torch.get_autocast_dtype(input.device.type)
    eligible = (torch.float32, torch.bfloat16, torch.float16)
    return [t if t is None or t.dtype not in eligible else t.to(dtype) for t in (input, *others)]
