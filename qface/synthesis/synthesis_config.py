"""Settings of :func:`qface.synthesize`."""

from __future__ import annotations

from dataclasses import dataclass

from qface.checks import check_not_negative, check_positive, check_seed, check_whole

__all__ = ["SynthesisConfig"]


@dataclass(frozen=True)
class SynthesisConfig:
    """Settings of :func:`qface.synthesize`.

    Args:
        num_images: number of images (default 256).
        num_steps: optimizer steps of each batch (default 120).
        batch_size: images whose common statistics approach those of the network (default 64).
        learning_rate: first learning rate of Adam, for the logits of the pixels (default 0.1); it falls linearly to 0.
        smoothness: weight of the pixels' total variation, which keeps noise out of the images (default 0.5).
        seed: random seed (default 0).

    Raises:
        ConfigError: a field is out of range.

    Example:
        >>> SynthesisConfig(num_images=64).num_steps
        120
    """

    num_images: int = 256
    num_steps: int = 120
    batch_size: int = 64
    learning_rate: float = 0.1
    smoothness: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole(1, num_images=self.num_images, num_steps=self.num_steps)
        check_whole(2, batch_size=self.batch_size)
        check_seed(self.seed)
        check_positive(learning_rate=self.learning_rate)
        check_not_negative(smoothness=self.smoothness)
