"""Face networks (IResNet, MobileFaceNet), and loading and saving of model files."""

from qface.models.iresnet import IResNet, iresnet
from qface.models.mobilefacenet import MobileFaceNet
from qface.models.store import MODEL_NAMES, load, save

__all__ = [
    "MODEL_NAMES",
    "IResNet",
    "MobileFaceNet",
    "iresnet",
    "load",
    "save",
]
