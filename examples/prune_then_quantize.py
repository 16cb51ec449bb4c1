"""Remove a fifth of the channels, repair without labels, train, quantize, train again, export.

python examples/prune_then_quantize.py mobilefacenet_112x96.safetensors faces/
"""

import sys

import qface
from qface.pruning import cost_of

weights, faces = sys.argv[1:]
teacher = qface.load(weights)

# Integer kernels reach their full speed at widths that are multiples of 16. A compact network keeps more of what it
# knows where channels are compared across layers.
config = qface.PruningConfig(scope="network", round_to=16)
pruned = qface.prune(teacher, 0.2, faces, config, people="first-half", progress=True)
print(f"{cost_of(teacher)} -> {cost_of(pruned)}")
qface.distill(pruned, teacher, faces, people="first-half")

student = qface.calibrate(qface.quantize(pruned, bits=6), faces, people="first-half")
qface.distill(student, teacher, faces, people="first-half")  # the teacher is still the network that it all came from
qface.export(student, "pruned_w6a6.onnx")
print(qface.evaluate("pruned_w6a6.onnx", faces, people="second-half").tpr_at_fpr)
