"""Functions of maps that have no layer, and stay in float."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qface.preprocessing import Preprocessing, with_preprocessing

__all__ = ["FUNCTIONS", "SMALL", "network"]

SMALL = Preprocessing(size=(16, 12))


class Function(nn.Module):
    """A convolution, a function of its maps [N, 4, 8, 6], and rows of what that makes."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 4, 3, 2, 1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x)).flatten(1)


def network(function: Callable[[Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return with_preprocessing(Function(function).eval(), SMALL)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean over channels": lambda x: x.mean(1),
    "sum": lambda x: x.sum((1, 2), keepdim=True),
    "variance": lambda x: x.var(dim=1, unbiased=False),
    "standard deviation": lambda x: x.std(dim=(2, 3)),
    "abs": lambda x: x.abs(),
    "exp and log": lambda x: (x.exp() + 1).log(),
    "powers": lambda x: x**2 + x.pow(3),
    "roots": lambda x: (x * x + 1).sqrt() + (x * x + 1).rsqrt(),
    "quotient": lambda x: x / (x * x + 1),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "masked_fill": lambda x: x.masked_fill(x < 0, -2.0),
    "comparison as a factor": lambda x: x * (x > 0).float(),
    "round": lambda x: (3 * x).round() + x.floor() + x.ceil(),
    "sine": lambda x: x.sin() + x.cos(),
    "erf": lambda x: torch.erf(x),
    "softplus": lambda x: F.softplus(x) + F.softmax(x, 1),
    "flip": lambda x: x.flip(3),
    "roll": lambda x: torch.roll(x, (1, 2), (2, 3)),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "tile": lambda x: x.tile(1, 1, 2, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=2),
    "stack": lambda x: torch.stack([x, x.relu()], 2),
    "gather by a constant": lambda x: x[:, torch.tensor([2, 0, 1])],
    "index_select": lambda x: x.index_select(1, torch.tensor([3, 1])),
    "cumsum": lambda x: x.cumsum(1),
    "einsum": lambda x: torch.einsum("nchw,ndhw->ncd", x, x),
    "matmul": lambda x: x @ x.transpose(2, 3),
    "bmm": lambda x: torch.bmm(x.flatten(2), x.flatten(2).transpose(1, 2)),
    "scaled dot product": lambda x: F.scaled_dot_product_attention(x, x, x),
    "masked attention": lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(8, 8).tril().bool()),
    "causal attention": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "layer norm without weights": lambda x: F.layer_norm(x, (6,)),
    "instance norm": lambda x: F.instance_norm(x),
    "transposed convolution": lambda x: F.conv_transpose2d(x, torch.ones(4, 2, 2, 2), stride=2),
    "convolution by images": lambda x: F.conv2d(x, torch.ones(2, 4, 1, 1)) * F.avg_pool2d(x, 1)[:, :2],
    "bilinear": lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear"),
    "bilinear with corners": lambda x: F.interpolate(x, size=(9, 9), mode="bilinear", align_corners=True),
    "bicubic": lambda x: F.interpolate(x, size=(9, 9), mode="bicubic"),
    "nearest, to no multiple": lambda x: F.interpolate(x, size=(9, 9)),
    "adaptive average, uneven": lambda x: F.adaptive_avg_pool2d(x, (3, 4)),
    "adaptive average of a line": lambda x: F.adaptive_avg_pool1d(x.mean(2), 3),
    "unfold": lambda x: F.unfold(x, 2),
    "patches": lambda x: x.unfold(2, 2, 2).unfold(3, 2, 2),
    "maximum of a dimension": lambda x: x.max(1)[0],
    "greatest value": lambda x: x.amax(1),
    "top of a sort by maxima": lambda x: x.max(dim=2, keepdim=True).values,
    "pad with ones": lambda x: F.pad(x, (1, 1), value=1.0),
    "circular padding": lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"),
    "glu": lambda x: F.glu(x, 1),
    "log softmax": lambda x: F.log_softmax(x, 1),
    "hard shrink of a clamp": lambda x: x.clamp(max=1.0) - x.clamp(min=-1.0),
    "selu": lambda x: F.selu(x),
    "celu": lambda x: F.celu(x),
    "softsign": lambda x: F.softsign(x),
    "log sigmoid": lambda x: F.logsigmoid(x),
    "tanh shrink": lambda x: F.tanhshrink(x),
    "square": lambda x: x.square().reciprocal().clamp(max=4),
    "a token for each image": lambda x: torch.cat([torch.ones(1, 1, 8, 6).expand(x.shape[0], -1, -1, -1), x], 1),
    "zeros for each image": lambda x: torch.cat([x.mean(3).mean(1), torch.zeros(x.shape[0], 1, dtype=x.dtype)], 1),
    "numbers for each image": lambda x: torch.cat([x.mean(3).mean(1), torch.full((len(x.mean(1)), 1), 2.0)], 1),
    "place in the batch": lambda x: x.mean(3).mean(1) + 0.0 * torch.arange(x.shape[0]).unsqueeze(1),
    "zeros like": lambda x: torch.cat([torch.zeros_like(x), x.new_zeros(x.shape[0], 1, 8, 6)], 1),
    "positions": lambda x: x + torch.arange(x.shape[2] * x.shape[3], device=x.device).view(8, 6).to(x.dtype) / 48,
    "log sum": lambda x: x.logsumexp(1),
    "product": lambda x: x.prod(1),
    "minimum": lambda x: torch.minimum(x, x.relu() - 1),
    "unsqueezed difference": lambda x: x.unsqueeze(1) - x.unsqueeze(2),
    "rms norm": lambda x: F.rms_norm(x, (6,)),
    "local response": lambda x: F.local_response_norm(x, 3),
    "lp pool": lambda x: F.lp_pool2d(x, 2, 2),
    "generalized mean": lambda x: F.avg_pool2d(x.clamp(min=1e-6).pow(3), x.shape[2:]).pow(1 / 3),
}
