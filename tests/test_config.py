"""show_config, and the ops that tell about the processor."""

import os
import subprocess
import sys

import pytest
import torch

import torch_mlp

FIRST_USE = {
    "show_config": "torch_mlp.show_config()",
    "float32": "torch_mlp.functional.linear_act(torch.ones(2, 3), torch.ones(4, 3))",
    "bfloat16": "torch_mlp.functional.linear_act(torch.ones(2, 3).bfloat16(), torch.ones(4, 3).bfloat16())",
    "cross_entropy": "torch_mlp.functional.cross_entropy(torch.ones(2, 3), torch.tensor([0, 1]))",
}


def test_show_config(capsys):
    torch_mlp.show_config()
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.replace("cpu kernels", "cpu").splitlines())
    assert lines["torch_mlp"] == torch_mlp.__version__
    assert lines["torch"] == torch.__version__
    assert lines["threads"] == str(torch.get_num_threads())
    assert lines["cpu"].split()[0] in ("default", "avx2", "avx512", "avx512_bf16", "amx")
    assert lines["cuda"].startswith("kernels")


@pytest.mark.parametrize("use", FIRST_USE)
def test_unknown_capability_is_an_error(use):
    environment = {**os.environ, "TORCH_MLP_CPU_CAPABILITY": "avx3"}
    code = f"import torch, torch_mlp\n{FIRST_USE[use]}"
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: torch_mlp: expected TORCH_MLP_CPU_CAPABILITY to be one of default"), last
    assert last.endswith("got 'avx3'")


@pytest.mark.parametrize("name", ["_cpu_multiply_adds", "_cpu_split_multiply_adds"])
def test_multiply_adds_are_counted(name):
    multiply_adds = getattr(torch.ops.torch_mlp, name)
    count = multiply_adds(2, 1000)
    assert (count > 0) == (name == "_cpu_multiply_adds" or torch_mlp.ops.cpu_capability() == "amx")
    assert multiply_adds(1, 4000) == 2 * count
