"""Prune a fifth of the channels, repair without labels, distill, quantize, distill again, export.

python examples/prune_then_quantize.py mobilefacenet_112x96.safetensors faces/
"""

import sys

import qface
from qface.pruning import cost_of

weights, faces = sys.argv[1:]
teacher = qface.load(weights)

# Integer kernels are fastest if numbers of channels are multiples of 16. Compact networks lose less accuracy if
# channels are ranked across all layers.
config = qface.PruningConfig(global_pruning=True, round_to=16)
pruned = qface.prune(teacher, 0.2, faces, config, identities="first-half", progress=True)
print(f"{cost_of(teacher)} -> {cost_of(pruned)}")
qface.distill(pruned, teacher, faces, identities="first-half")

student = qface.calibrate(qface.quantize(pruned, bits=6), faces, identities="first-half")
# The teacher is the original network, not the pruned one.
qface.distill(student, teacher, faces, identities="first-half")
qface.export(student, "pruned_w6a6.onnx")
print(qface.evaluate("pruned_w6a6.onnx", faces, identities="second-half").tpr_at_fpr)
