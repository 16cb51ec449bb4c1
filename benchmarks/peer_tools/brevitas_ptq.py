"""Quantize with the flow of Brevitas' own PTQ example: equalization, calibration, GPTQ and bias correction.

The result is a simulation in torch. Brevitas' example is the script ``ptq_evaluate.py`` of ``brevitas_examples``.
"""

from __future__ import annotations

import brevitas
import torch
from brevitas.export.inference import quant_inference_mode
from brevitas.graph.quantize import preprocess_for_quantize
from brevitas_examples.imagenet_classification.ptq import ptq_common
from task import Array, Task
from torch import Tensor, nn

LABEL = torch.zeros(1)  # loaders of the example yield images and labels


def main() -> None:
    """Quantize and embed."""
    torch.manual_seed(0)
    task = Task()
    teacher = torch.load(task.torch_teacher, weights_only=False).eval()
    with task.timing():
        network = quantize(teacher, task)

    def embed(images: Array) -> Array:
        return network(torch.from_numpy(images)).numpy()

    with torch.no_grad(), quant_inference_mode(network):
        network(torch.from_numpy(task.calibration[:1]))  # the first call in this mode fixes the scales
        task.finish(embed, {"brevitas": brevitas.__version__, "torch": torch.__version__})


def quantize(teacher: nn.Module, task: Task) -> nn.Module:
    """Return the network with fake quantization, calibrated."""
    settings = task.settings
    calibration = loader(task, settings["calibration_images"])
    equalized = preprocess_for_quantize(
        teacher, equalize_iters=settings["equalize_iterations"], equalize_merge_bias=True, merge_bn=True
    )
    network = ptq_common.quantize_model(
        equalized,
        backend="layerwise",
        weight_bit_width=settings["weight_bits"],
        act_bit_width=settings["activation_bits"],
        bias_bit_width=32,
        weight_quant_granularity="per_channel",
        weight_param_method=settings["weight_ranges"],
        act_param_method=settings["activation_ranges"],
        act_quant_percentile=settings["activation_percentile"],
        act_quant_type="asym",
        scale_factor_type="float_scale",
        quant_format="int",
    ).eval()
    with torch.no_grad():
        network(calibration[0][0])  # initializes scales, as in the example
    ptq_common.calibrate(calibration, network)
    if settings["gptq"]:
        ptq_common.apply_gptq(loader(task, settings["gptq_images"]), network, create_weight_orig=True)
    ptq_common.apply_bias_correction(calibration, network)
    return network


def loader(task: Task, count: int) -> list[tuple[Tensor, Tensor]]:
    """Return the first ``count`` calibration images in batches."""
    images = task.calibration[:count]
    return [(torch.from_numpy(batch), LABEL) for batch in task.batches(images, task.settings["batch_size"])]


if __name__ == "__main__":
    main()
