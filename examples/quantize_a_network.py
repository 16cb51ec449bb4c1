"""Quantize, distill and export a network in Python, step by step.

    python examples/quantize_a_network.py mobilefacenet_112x96.safetensors faces/ lfw_pairs.txt

``faces/`` holds 112x112 crops, one folder per person. Half of the people tune the student, the other half evaluates it.
"""

import sys

import qface

weights, faces, pairs = sys.argv[1:]

teacher = qface.load(weights)
student = qface.quantize(teacher, bits=6)  # a new model; the teacher does not change
qface.calibrate(student, faces, identities="first-half")
qface.distill(student, teacher, faces, qface.DistillConfig(), identities="first-half")

qface.save(student, "student.safetensors")
student = qface.load("student.safetensors")
qface.export(student, "student.onnx")

for name, model in (("teacher", teacher), ("student.onnx", "student.onnx")):
    result = qface.evaluate(model, faces, pairs=pairs, identities="second-half")
    print(f"{name}: accuracy {result.accuracy:.4f}, TPR by FPR {result.tpr_at_fpr}")  # None: too few pairs
