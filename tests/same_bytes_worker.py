"""Run by test_same_bytes.py in processes of their own: writes one file of each kind into the working directory."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from pathlib import Path

import torch

import qface
from qface.cli import main
from qface.quantization import QuantizationConfig
from qface.reporting.figures import sensitivity_figure
from tests.networks import random_faces, tiny_face_net


def command(name: str, *arguments: str) -> None:
    with open(f"{name}.json", "w", encoding="utf-8") as file, redirect_stdout(file):
        main([name, *arguments, "--json"], standalone_mode=False)


def write() -> None:
    faces, network = random_faces(16), tiny_face_net()
    config = QuantizationConfig(6, 6, ignored_layers=("block2.*",))
    student = qface.calibrate(qface.quantize(network, config), faces)
    run = qface.DistillConfig(batch_size=8, max_steps=3, checkpoint_every=2, device="cpu")
    qface.distill(student, network, faces, run, "run", progress=False)
    qface.save(network, "network.safetensors")
    qface.save(student, "student.safetensors")
    qface.save(qface.load("student.safetensors"), "again.safetensors")
    qface.save(qface.prune(network, 0.3, faces), "pruned.safetensors")
    qface.export(network, "network.onnx")
    for target in ("cpu", "cuda", "float32"):
        qface.export(student, f"{target}.onnx", target=target)
    qface.export(student, "bytes.onnx", "int8", input="uint8")
    Path("cpu.md").write_text(qface.model_card("cpu.onnx"), encoding="utf-8")
    command("inspect", "network.safetensors")
    command("size", "student.safetensors")
    result = qface.sensitivity(network, faces, activation_bits=())
    Path("sensitivity.json").write_text(json.dumps(result.to_dict()), encoding="utf-8")
    for kind in ("svg", "pdf", "png"):
        sensitivity_figure(result, f"sensitivity.{kind}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    write()
