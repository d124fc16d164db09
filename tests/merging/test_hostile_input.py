"""Two thousand damaged inputs: each is merged or refused in our words, in time and in little memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COUNT = 2000


@pytest.mark.timeout(400)  # seconds on the clock; it takes some fifteen of the processor
def test_damaged_inputs_are_refused(tmp_path):
    command = [sys.executable, Path(__file__).with_name("hostile.py"), tmp_path, str(COUNT)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *otherwise, summary = done.stdout.splitlines()
    assert otherwise == []
    found = json.loads(summary)
    assert found["cases"] == sum(found["ends"].values()) == COUNT
    assert not [kind for kind in found["ends"] if kind.endswith("other")]
    kinds = {"header", "index", "recipe", "settings", "whole", "links", "shapes"}
    assert {kind.split()[0] for kind in found["ends"]} == kinds
    assert sum(n for kind, n in found["ends"].items() if kind.endswith("refused")) > COUNT / 2
