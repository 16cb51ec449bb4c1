"""ArcFace classification head, for distillation that also uses identities."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ArcFaceHead"]

_INITIAL_STD = 0.01  # InsightFace arcface_torch
_MIN_SQUARED_SINE = 1e-12  # keeps the gradient of the square root finite


class ArcFaceHead(nn.Module):
    """ArcFace, the additive angular margin loss (Deng et al., CVPR 2019).

    It is ``L_Arcface`` in equation 3 of Ef-QuantFace. The logit of class c is ``scale cos(theta_c)``, and that of the
    image's own class y is ``scale cos(theta_y + margin)``. If ``theta_y + margin > pi``, where the cosine would rise
    again, it is ``scale (cos(theta_y) - margin sin(margin))``, as in InsightFace's arcface_torch.

    Args:
        embedding_size: embedding dimension D.
        num_identities: number of classes.
        margin: angular margin in radians.
        scale: factor on the cosines.
        generator: generator of the initial weights; None means torch's global one.
    """

    def __init__(
        self,
        embedding_size: int,
        num_identities: int,
        margin: float = 0.4,
        scale: float = 64.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.margin = margin
        self.scale = scale
        self.weight = nn.Parameter(torch.randn(num_identities, embedding_size, generator=generator) * _INITIAL_STD)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross entropy, a scalar.

        Args:
            embeddings: [N, D], normalized or not.
            labels: identities, int64 [N].
        """
        cosines = F.linear(F.normalize(embeddings), F.normalize(self.weight))
        own = F.one_hot(labels, len(self.weight)).bool()
        return F.cross_entropy(self.scale * torch.where(own, self._with_margin(cosines), cosines), labels)

    def _with_margin(self, cosines: Tensor) -> Tensor:
        sines = (1 - cosines.square()).clamp_min(_MIN_SQUARED_SINE).sqrt()
        shifted = cosines * math.cos(self.margin) - sines * math.sin(self.margin)
        return torch.where(
            cosines > math.cos(math.pi - self.margin), shifted, cosines - self.margin * math.sin(self.margin)
        )
