"""scripts/support_table.py: its tables are made of the tests of this folder, and up to date."""

import os
import subprocess
import sys
from pathlib import Path

import torch_mlp

ROOT = Path(__file__).parents[2]


def test_tables_are_up_to_date():
    path = os.pathsep.join(filter(None, [str(Path(torch_mlp.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    finished = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "support_table.py"), "--check"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr
