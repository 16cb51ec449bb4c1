"""Make images that give the activations of a network the statistics of its training set."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from qface.data.crops import write_crop
from qface.data.synthetic import synthetic_crops
from qface.errors import TrainingError
from qface.files import as_path
from qface.kept_memory import memory_kept
from qface.model_digest import digests_of_network
from qface.models.resolve import NetworkLike, as_network
from qface.preprocessing import preprocessing_of
from qface.progress import shows_progress, stage
from qface.run_folder import run_folder
from qface.synthesis.statistics_loss import StatisticsLoss, recorded_statistics
from qface.synthesis.synthesis_config import SynthesisConfig
from qface.training_mode import eval_mode

__all__ = ["synthesize"]

_DARKEST = 0.02  # of the first images, in shares of the range: the logits of black and white are infinite
_SHIFT = 4  # pixels by which a step moves the images at most, so that no pixel is fitted alone


@shows_progress
@memory_kept()
def synthesize(
    model: NetworkLike, folder: str | Path, config: SynthesisConfig | None = None, *, progress: bool = False
) -> Path:
    """Write images made from ``model`` alone, to calibrate and distill its student where there are no faces.

    Noise is optimized until the inputs of the BatchNorm layers have the means and deviations that the layers stored in
    training (ZeroQ, Cai et al., CVPR 2020; DeepInversion, Yin et al., CVPR 2020). Does not change ``model``, and runs
    on its device. Images that are in ``folder`` already are kept, so that a stopped run continues.

    Args:
        model: a float network with BatchNorm layers: a module, the path of its file, or ``package.module:factory``.
        folder: folder to write to; created if missing. It takes the images of one run only.
        config: settings. None: the defaults.
        progress: True to display progress.

    Returns:
        ``folder``, with 112x112 images ``00000.png``, ``00001.png`` and so on, for any function that takes images.

    Raises:
        CheckpointError: the file is missing or damaged, or the record of the run is damaged.
        ConfigError: the folder belongs to a run with another network or other settings, or another run is using it.
        ExportError: the folder cannot be written to.
        TrainingError: pixels became NaN or infinite.
        UnsupportedLayerError: the network has no BatchNorm with running statistics.

    Example:
        >>> images = qface.synthesize(teacher, "made", SynthesisConfig(num_images=2, num_steps=1, batch_size=2))
        >>> sorted(path.name for path in images.glob("*.png"))
        ['00000.png', '00001.png']
    """
    config = SynthesisConfig() if config is None else config
    folder, network = as_path(folder), as_network(model)
    inputs = {**digests_of_network(network), "settings": asdict(config)}
    with recorded_statistics(network) as statistics, run_folder(folder, inputs):
        for start in range(0, config.num_images, config.batch_size):
            end = min(start + config.batch_size, config.num_images)
            files = [folder / f"{number:05d}.png" for number in range(start, end)]
            if not all(file.exists() for file in files):
                images = _batch(network, statistics, config, start).permute(0, 2, 3, 1).numpy()
                for pixels, file in zip(images, files, strict=False):  # of the last batch, as many as are wanted
                    write_crop(Image.fromarray(pixels), file)
    return folder


def _batch(network: nn.Module, statistics: StatisticsLoss, config: SynthesisConfig, start: int) -> Tensor:
    """Return a batch of images, uint8 [batch_size, 3, 112, 112]; ``start`` is the number of the first one."""
    device = next(network.parameters()).device
    reads, draw = preprocessing_of(network), torch.Generator().manual_seed(config.seed + start)
    noise = synthetic_crops(config.batch_size, config.seed + start).to(device) / 255
    logits = torch.logit(noise, _DARKEST).requires_grad_(True)
    optimizer = torch.optim.Adam([logits], lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, config.num_steps)
    with eval_mode(network), stage(f"images from {start}", config.num_steps) as advance:
        for _ in range(config.num_steps):
            pixels = torch.sigmoid(logits)
            network(reads(255 * _moved(pixels, draw)))
            loss = statistics.take() + config.smoothness * _total_variation(pixels)
            (logits.grad,) = torch.autograd.grad(loss, [logits])  # of the pixels only, not of the weights
            optimizer.step()
            schedule.step()
            advance()
    if not logits.isfinite().all():
        raise TrainingError(
            "the images of this network became NaN or infinite: check its BatchNorm statistics, or set a lower "
            "learning_rate"
        )
    return (255 * torch.sigmoid(logits.detach())).round().byte().cpu()


def _moved(pixels: Tensor, draw: torch.Generator) -> Tensor:
    """Return the images shifted, each one mirrored or not."""
    mirrored = torch.rand(len(pixels), 1, 1, 1, generator=draw) < 0.5
    down, right = torch.randint(-_SHIFT, _SHIFT + 1, (2,), generator=draw).tolist()
    pixels = torch.where(mirrored.to(pixels.device), pixels.flip(-1), pixels)
    return torch.roll(pixels, (down, right), (2, 3))


def _total_variation(pixels: Tensor) -> Tensor:
    """Return the mean difference of neighboring pixels, vertical plus horizontal."""
    return pixels.diff(dim=2).abs().mean() + pixels.diff(dim=3).abs().mean()
