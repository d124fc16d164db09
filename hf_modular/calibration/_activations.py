"""How large the inputs of linear layers are: ‖xⱼ‖ for each input feature j, for masks in the manner of WANDA.

WANDA (Sun et al., arXiv 2306.11695) compares |Wₖⱼ| ‖xⱼ‖₂ within a row; the root mean square, which does not grow with
the number of examples, gives the same order.
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_modular._batches import Rows
from hf_modular.calibration._layers import run_through
from hf_modular.checkpoints import CheckpointWriter, TensorInfo, refuse_occupied

CONFIG = "activations_config.json"


def activation_norms(
    model: nn.Module,
    dataset: Rows,
    output_dir: str | Path | None = None,
    *,
    batch_size: int = 8,
    overwrite: bool = False,
) -> dict[str, Tensor]:
    """The root mean squares of what goes into the linear layers, by the names of their weights.

    Each is of a shape that broadcasts to its weight's. Saved in a folder, it is what a recipe names as the model's
    `activations`, for `DAREConfig(mask="wanda")`.

    Args:
        model: Any model with linear layers.
        dataset: Examples without padding: what the model takes, without a batch axis. Labels are passed over.
        output_dir: A folder that is absent or empty.
        batch_size: How many examples are taken at once.
        overwrite: Replace a checkpoint that is in the folder.
    """
    if output_dir is not None:
        refuse_occupied(Path(output_dir), overwrite=overwrite)
    squares: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def see(path: str, layer: nn.Module, x: Tensor) -> None:
        squares[path] = squares.get(path, 0) + x.double().square().sum(0)
        counts[path] = counts.get(path, 0) + len(x)

    run_through(model, dataset, batch_size, see)
    layers = dict(model.named_modules())
    norms = {
        f"{path}.weight": _laid_out(layers[path], (total / counts[path]).sqrt().float().cpu())
        for path, total in squares.items()
    }
    if bad := [name for name, tensor in norms.items() if not bool(tensor.isfinite().all())]:
        raise ValueError(f"the inputs of {bad[0].removesuffix('.weight')} must be finite, but are not")
    if output_dir is not None:
        _save(norms, Path(output_dir), len(dataset), overwrite)
    return norms


def _laid_out(layer: nn.Module, norms: Tensor) -> Tensor:  # (in,) -> what broadcasts to the weight
    return norms[:, None] if isinstance(layer, Conv1D) else norms[None]


def _save(norms: dict[str, Tensor], folder: Path, examples: int, overwrite: bool) -> None:
    plan = {name: TensorInfo(torch.float32, tuple(tensor.shape)) for name, tensor in norms.items()}
    with CheckpointWriter(folder, plan, overwrite=overwrite) as writer:
        for name, tensor in norms.items():
            writer.write(name, tensor.contiguous())
        (writer.staging / CONFIG).write_text(json.dumps({"examples": examples}, indent=2) + "\n", "utf-8")
        writer.commit()
