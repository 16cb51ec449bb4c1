"""Networks, and files of networks: IResNet, MobileFaceNet, checkpoints of others, and graphs saved as data."""

from qface.models.graph_data import register_layer
from qface.models.iresnet import IResNet, iresnet
from qface.models.layers import Add, ChannelAffine, Concat, L2Normalize, Multiply
from qface.models.mobilefacenet import MobileFaceNet
from qface.models.provenance import carry, provenance_of, record_step
from qface.models.store import MODEL_NAMES, load, save
from qface.models.tracing import trace

__all__ = [
    "MODEL_NAMES",
    "Add",
    "ChannelAffine",
    "Concat",
    "IResNet",
    "L2Normalize",
    "MobileFaceNet",
    "Multiply",
    "carry",
    "iresnet",
    "load",
    "provenance_of",
    "record_step",
    "register_layer",
    "save",
    "trace",
]
