"""Images made from the statistics of a network, for users who have no faces."""

from qface.synthesis.synthesis_config import SynthesisConfig
from qface.synthesis.synthesize import synthesize

__all__ = ["SynthesisConfig", "synthesize"]
