"""DDP, FSDP2, DTensor and tensor parallelism in two processes on a CPU; what they do is in distributed_training.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from samples import every_op, name_of

import torch_mlp

SCRIPT = Path(__file__).with_name("distributed_training.py")

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")


@pytest.fixture(scope="module")
def errors():
    """What went wrong in each check, None where nothing did."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT)]
    # The package that is tested here is that of the processes too; samples takes something of conftest.
    folders = [str(Path(torch_mlp.__file__).parents[1]), str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH")]
    path = os.pathsep.join(filter(None, folders))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert finished.returncode == 0, finished.stderr[-6000:]
    lines = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]
    return {line["check"]: line["error"] for line in lines}


def assert_passed(errors, check):
    assert errors[check] is None, errors[check]


@pytest.mark.support("DDP", rows=["LinearAct", "LinearSigmoid", "MLP", "mlp_cross_entropy", "cross_entropy"])
def test_ddp(errors):
    assert_passed(errors, "ddp")
    assert_passed(errors, "ddp_loss_is_no_attribute")


@pytest.mark.support("FSDP2", rows=["LinearAct", "LinearSigmoid", "MLP", "mlp_cross_entropy", "cross_entropy"])
def test_fsdp(errors):
    assert_passed(errors, "fsdp")


@pytest.mark.support("tensor parallel", rows=["LinearAct", "MLP"])
def test_tensor_parallel(errors):
    assert_passed(errors, "tensor_parallel")


@pytest.mark.support("DTensor")
@every_op
def test_dtensor(errors, op):
    assert_passed(errors, "dtensor {}: {}".format(*name_of(op)))


def test_dtensor_among_plain_tensors(errors):
    assert_passed(errors, "dtensor_mixed")


@pytest.mark.parametrize("check", ["train_epoch", "train_epoch_compiled"])
def test_train_epoch(errors, check):
    assert_passed(errors, check)
