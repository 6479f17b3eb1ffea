"""torch.export and AOTInductor: models that go to a file and run from it, in a process of its own too."""

import subprocess
import sys

import pytest
import torch
from samples import every_layer, every_op

from torch_mlp import nn

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


class Op(torch.nn.Module):
    """An op as a module, which is what is exported."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


def exported(module, arguments, rows, strict=False):
    """With a batch size that is free."""
    batch = torch.export.Dim("batch", min=2, max=1024)
    shapes = tuple({0: batch} if place in rows else None for place in range(len(arguments)))
    shapes = (shapes,) if isinstance(module, Op) else shapes
    return torch.export.export(module, tuple(arguments), dynamic_shapes=shapes, strict=strict)


@pytest.mark.support("export, save, load")
@pytest.mark.parametrize("strict", [False, True])
@every_op
def test_op(device, op, strict, tmp_path):
    """Saved and loaded, for another batch size; strict export traces the Python code, the other runs it."""
    sample = op(device, torch.float32, 7)
    program = exported(Op(sample.ours), [t.detach() for t in (*sample.inputs, *sample.others)], sample.rows, strict)
    assert any("torch_mlp." in str(node.target) for node in program.graph.nodes)
    torch.export.save(program, tmp_path / "op.pt2")
    loaded = torch.export.load(tmp_path / "op.pt2").module()
    other = op(device, torch.float32, 19)
    torch.testing.assert_close(loaded(*other.inputs, *other.others), other.torchs(*other.inputs, *other.others))


@pytest.mark.support("export, save, load")
@every_layer
def test_layer(device, layer, tmp_path):
    ours, torchs, arguments = layer(device, torch.float32)
    torch.export.save(exported(ours, arguments, range(len(arguments))), tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    more = [torch.cat([argument, argument]) for argument in arguments]
    torch.testing.assert_close(loaded(*more), torchs(*more))


class Everything(torch.nn.Module):
    """Every layer in one model."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(nn.LinearSigmoid(5, 6), nn.LinearAct(6, 4, activation="relu"))
        self.head = nn.MLP(4, [6], 3, "tanh")
        self.criterion = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]), label_smoothing=0.1)

    def forward(self, input, target):
        hidden = self.body(input)
        return self.criterion(self.head(hidden), target), self.head.loss(hidden, target)


def everything(device, batch):
    return torch.randn(batch, 5, device=device), torch.randint(3, (batch,), device=device)


LOAD = """
import sys, torch, torch_mlp
folder = sys.argv[1]
arguments = torch.load(folder + "/arguments.pt")
program = torch.export.load(folder + "/model.pt2").module()
torch.save(program(*arguments), folder + "/exported.pt")
"""


def test_in_a_process_of_its_own(device, tmp_path):
    """Which needs `import torch_mlp`, for the ops' sake, but not the model's source."""
    model, arguments = Everything().to(device), everything(device, 9)
    torch.export.save(exported(model, everything(device, 7), (0, 1)), tmp_path / "model.pt2")
    torch.save(arguments, tmp_path / "arguments.pt")
    subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "exported.pt"), model(*arguments))

    without = LOAD.replace(", torch_mlp", "")
    finished = subprocess.run([sys.executable, "-c", without, str(tmp_path)], capture_output=True, text=True)
    assert finished.returncode != 0
    assert "torch_mlp" in finished.stderr


LOAD_PACKAGE = """
import sys, torch, torch_mlp
import torch._inductor.codecache  # torch 2.10 forgets to
folder = sys.argv[1]
compiled = torch._inductor.aoti_load_package(folder + "/package.pt2")
results = [compiled(*arguments) for arguments in torch.load(folder + "/arguments.pt")]
torch.save(results, folder + "/results.pt")
"""


def test_aot_inductor_package(device, tmp_path):
    """Every layer compiled ahead of time to a shared library, loaded, and run for another batch size."""
    model = Everything().to(device)
    program = exported(model, everything(device, 7), (0, 1))
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "package.pt2"))
    batches = [everything(device, batch) for batch in (9, 64)]
    torch.save(batches, tmp_path / "arguments.pt")
    # A crash, as torch 2.11 once had on CUDA while it loaded the package, is a failure that tells where.
    subprocess.run([sys.executable, "-X", "faulthandler", "-c", LOAD_PACKAGE, str(tmp_path)], check=True)
    for result, arguments in zip(torch.load(tmp_path / "results.pt"), batches, strict=True):
        torch.testing.assert_close(result, model(*arguments))
