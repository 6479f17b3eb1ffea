"""Saving and loading a multilayer perceptron: weights and architecture in one safetensors file."""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from torch_mlp.nn import MLP


def save(model: MLP, path: str | Path) -> None:
    """Write the weights of a model, with its architecture in the file's metadata.

    The file is complete or not there at all, even if the program is stopped while it writes.

    Example:
        >>> import tempfile, torch_mlp
        >>> path = Path(tempfile.mkdtemp(), "mlp.safetensors")
        >>> save(torch_mlp.nn.MLP(784, [512], 10, activation="tanh"), path)
        >>> load(path).activation
        'tanh'
    """
    architecture = {
        "in_features": model.in_features,
        "hidden_features": model.hidden_features,
        "out_features": model.out_features,
        "activation": model.activation,
        "bias": "0.bias" in model.state_dict(),
        "head": model.head,
    }
    path = Path(path)
    partial = path.with_name(path.name + ".part")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, partial, metadata={"torch_mlp.MLP": json.dumps(architecture)})
    os.replace(partial, path)


def load(path: str | Path, device: torch.device | str = "cpu") -> MLP:
    """Make the model that :func:`save` wrote, on the given device and in the dtype it had.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file was not written by :func:`save`.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            architecture = (file.metadata() or {}).get("torch_mlp.MLP")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"load: expected a safetensors file written by torch_mlp, got {path} ({error})") from error
    if architecture is None:
        raise ValueError(f"load: expected a safetensors file written by torch_mlp, got {path} without an architecture")
    dtype = next(iter(state.values())).dtype
    # Files of before there were heads name none, and mean the default.
    model = MLP(**json.loads(architecture), device=device, dtype=dtype)
    model.load_state_dict(state)
    return model
