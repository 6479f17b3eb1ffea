"""A model as a table."""

import torch
from torch import Tensor

from torch_mlp.nn.linear import LinearAct

_HEADER = ("layer", "kind", "weight", "outputs", "parameters", "")
_ALIGNED_RIGHT = (False, False, True, True, True, False)


def summary(model: torch.nn.Module) -> str:
    r"""List the layers of a model and count its parameters, as a table to be printed.

    A row is a layer: a module that has parameters of its own or no modules within it. It gives its name, its class,
    with the activation where that is part of it, the shape of its weight, :math:`(out, in)` for a linear layer, its
    output features and the number of its parameters, weights and biases: :math:`(in + 1) \cdot out`.

    A parameter that several layers share counts for the first of them, and the others name it.

    Args:
        model: any module.

    Returns:
        The table, its lines separated by newlines.

    Raises:
        ValueError: if a parameter has no shape yet, as those of a ``LazyLinear`` that nothing has gone through.

    Example:
        >>> import torch_mlp
        >>> print(summary(torch_mlp.nn.MLP(2, [1024, 512], 3)))
        layer  kind                      weight  outputs  parameters
        0      LinearAct, sigmoid     (1024, 2)     1024       3,072
        2      LinearAct, sigmoid   (512, 1024)      512     524,800
        4      LinearAct, identity     (3, 512)        3       1,539
        total                                                529,411
    """
    owners: dict[Tensor, str] = {}  # by parameter the name under which it has been counted
    rows = [_HEADER]
    for path, module in model.named_modules(remove_duplicate=False):
        parameters = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        if not parameters and any(module.children()):
            continue
        count, shared = 0, []
        for name, parameter in parameters.items():
            full_name = f"{path}.{name}" if path else name
            if torch.nn.parameter.is_lazy(parameter):
                raise ValueError(f"summary: expected parameters that have a shape, got a lazy one in {full_name}")
            if parameter in owners:
                shared.append(owners[parameter])
            else:
                owners[parameter] = full_name
                count += parameter.numel()
        kind, weight = type(module).__name__, getattr(module, "weight", None)
        rows.append(
            (
                path or "(the model)",
                f"{kind}, {module.activation}" if isinstance(module, LinearAct) else kind,
                str(tuple(weight.shape)) if isinstance(weight, Tensor) else "",
                str(getattr(module, "out_features", "")),
                f"{count:,}",
                f"shares {', '.join(shared)}" if shared else "",
            )
        )
    note = "each shared one counted once" if any(row[-1] for row in rows) else ""
    rows.append(("total", "", "", "", f"{sum(parameter.numel() for parameter in owners):,}", note))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(_line(row, widths) for row in rows)


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    cells = zip(row, widths, _ALIGNED_RIGHT, strict=True)
    return "  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells).rstrip()
