"""Remove a fifth of the channels, repair without labels, train, quantize, train again, export.

python examples/prune_then_quantize.py mobilefacenet_112x96.safetensors faces/
"""

import sys

import qface
from qface.pruning import cost_of

weights, faces = sys.argv[1:]
teacher = qface.load(weights)

# Integer kernels reach their full speed at numbers of channels that are multiples of 16. A compact network keeps more
# of what it knows where channels are compared across layers.
config = qface.PruningConfig(global_pruning=True, round_to=16)
pruned = qface.prune(teacher, 0.2, faces, config, identities="first-half", progress=True)
print(f"{cost_of(teacher)} -> {cost_of(pruned)}")
qface.distill(pruned, teacher, faces, identities="first-half")

student = qface.calibrate(qface.quantize(pruned, bits=6), faces, identities="first-half")
# The teacher is still the network that it all came from.
qface.distill(student, teacher, faces, identities="first-half")
qface.export(student, "pruned_w6a6.onnx")
print(qface.evaluate("pruned_w6a6.onnx", faces, identities="second-half").tpr_at_fpr)
