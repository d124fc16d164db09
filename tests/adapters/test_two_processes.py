"""Two processes train as one does at the same global batch, and what they save is loaded by one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from torch import Tensor
from torch.testing import assert_close

from adapters import in_two_processes, tiny
from adapters.in_two_processes import BATCHES, WAYS, losses_of, made, optimizer_of
from adapters.table import METHODS
from hf_modular.testing import AdapterCase

# `accelerate launch --cpu` starts several processes by MPI only. What `--multi_gpu` stands for is one process for each
# `--num_processes` by torch.distributed.run, on the CPU as well where the script asks for it; port 0 is any free one.
SETTINGS = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--main_process_port=0"]
SETTINGS += ["--mixed_precision=no", "--dynamo_backend=no"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """All methods in one launch, for starting processes is what takes time."""
    folder, script = tmp_path_factory.mktemp("trained"), Path(in_two_processes.__file__)
    launch = [sys.executable, "-m", "accelerate.commands.launch", *SETTINGS, str(script), str(folder)]
    paths = os.pathsep.join([str(script.parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        launch,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, json.loads((folder / "losses.json").read_text())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", METHODS, ids=str)
def test_the_losses_and_the_adapter_are_those_of_one_process(
    case: AdapterCase, way: str, trained: tuple[Path, dict[str, Any]]
) -> None:
    folder, losses = trained
    model = made(case)
    alone = losses_of(model, optimizer_of(model), BATCHES, Tensor.backward)
    assert alone[-1] < alone[0]
    assert losses[way][str(case)] == pytest.approx([loss.item() for loss in alone], rel=1e-4)
    loaded = PeftModel.from_pretrained(tiny.model("llama"), folder / way / str(METHODS.index(case)))
    assert_close(tiny.run(loaded), tiny.run(model.eval()), rtol=1e-3, atol=1e-4)
