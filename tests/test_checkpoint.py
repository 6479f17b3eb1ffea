"""torch_mlp/checkpoint.py."""

import pytest
import torch
from safetensors.torch import save_file

from torch_mlp import checkpoint
from torch_mlp.nn import MLP


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
