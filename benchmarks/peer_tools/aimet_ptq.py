"""Quantize with AIMET: cross-layer equalization, then ranges from calibration images. The result is a simulation."""

from __future__ import annotations

from pathlib import Path

import aimet_torch
import torch
from aimet_torch.common import quantsim_config
from aimet_torch.cross_layer_equalization import equalize_model
from aimet_torch.model_preparer import prepare_model
from aimet_torch.quantsim import QuantizationSimModel
from task import Array, Task
from torch import nn

CONFIGS = Path(quantsim_config.__file__).parent


def main() -> None:
    """Quantize and embed."""
    torch.manual_seed(0)
    task = Task()
    teacher = torch.load(task.torch_teacher, weights_only=False).eval()
    with task.timing():
        network = quantize(teacher, task)

    def embed(images: Array) -> Array:
        with torch.no_grad():
            return network(torch.from_numpy(images)).numpy()

    task.finish(embed, {"aimet-torch": aimet_torch.__version__, "torch": torch.__version__})


def quantize(teacher: nn.Module, task: Task) -> nn.Module:
    """Return the network with fake quantization, calibrated."""
    settings = task.settings
    example = torch.from_numpy(task.calibration[:1])
    prepared = prepare_model(teacher).eval()
    equalize_model(prepared, dummy_input=example)
    simulation = QuantizationSimModel(
        prepared,
        example,
        quant_scheme=settings["quant_scheme"],
        default_output_bw=settings["activation_bits"],
        default_param_bw=settings["weight_bits"],
        config_file=str(CONFIGS / settings["config"]),
    )

    def calibrate(network: nn.Module) -> None:
        with torch.no_grad():
            for batch in task.batches(task.calibration, settings["batch_size"]):
                network(torch.from_numpy(batch))

    simulation.compute_encodings(calibrate)
    return simulation.model


if __name__ == "__main__":
    main()
