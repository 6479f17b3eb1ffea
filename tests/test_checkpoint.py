"""torch_mlp/checkpoint.py."""

import json

import pytest
import torch
from safetensors.torch import save_file

from torch_mlp import checkpoint
from torch_mlp.nn import MLP
from torch_mlp.nn.mlp import HEADS


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("hidden", "bias"), [([], True), ([7], False), ([7, 6], True)])
def test_a_saved_model_comes_back(device, tmp_path, dtype, hidden, bias):
    model = MLP(5, hidden, 3, "tanh", bias, device, dtype)
    checkpoint.save(model, tmp_path / "model.safetensors")
    loaded = checkpoint.load(tmp_path / "model.safetensors", device)
    assert repr(loaded) == repr(model)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
        assert loaded.state_dict()[name].dtype == dtype
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("head", HEADS)
def test_the_head_comes_back(tmp_path, head):
    checkpoint.save(MLP(5, [4], 3, head=head), tmp_path / "model.safetensors")
    assert checkpoint.load(tmp_path / "model.safetensors").head == head


def test_a_file_of_before_there_were_heads(tmp_path):
    model = MLP(5, [4], 3, "tanh")
    architecture = {"in_features": 5, "hidden_features": [4], "out_features": 3, "activation": "tanh", "bias": True}
    metadata = {"torch_mlp.MLP": json.dumps(architecture)}
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata)
    loaded = checkpoint.load(tmp_path / "model.safetensors")
    assert repr(loaded) == repr(model)
    assert loaded.head == "multiclass"


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    model = MLP(5, 4, 3)
    checkpoint.save(model, path)
    before = path.read_bytes()

    def interrupted(tensors, partial, metadata):
        partial.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(model.init_gaussian_(), path)
    assert path.read_bytes() == before


def test_files_of_others(tmp_path):
    save_file({"0.weight": torch.zeros(3, 5)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("not safetensors")
    for name in ("other", "text"):
        with pytest.raises(ValueError, match=rf"load: expected a safetensors file written by torch_mlp, got .*{name}"):
            checkpoint.load(tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "none.safetensors")
