"""Say whether onnxruntime computes on this device what was trained: ``python selftest.py student.onnx``."""

import base64
import json
import sys
import zlib

import numpy as np
import onnxruntime


def golden_image(number: int, height: int, width: int) -> np.ndarray:
    """Test image, uint8 [3, height, width]: random bytes 16 pixels apart, interpolated, and noise."""

    def random(plane: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        word = (plane << 20) + (y << 10) + x  # all in 32 bits
        word = (word ^ word >> 16) * 0x7FEB352D
        word = (word ^ word >> 15) * 0x846CA68B
        return word >> 24

    plane, y, x = np.indices((3, height, width), np.uint32)
    plane, row, down, column, right = plane + np.uint32(6 * number), y // 16, y % 16, x // 16, x % 16
    upper = (16 - right) * random(plane, row, column) + right * random(plane, row, column + 1)
    lower = (16 - right) * random(plane, row + 1, column) + right * random(plane, row + 1, column + 1)
    smooth = (16 - down) * upper + down * lower
    return ((15 * smooth >> 12) + (random(plane + 3, y, x) >> 4)).astype(np.uint8)


def open_session(file: str, **config: str) -> tuple[onnxruntime.InferenceSession, dict[str, str]]:
    """The file in onnxruntime, and its metadata; weights of 8 bits need a mode that is exact on old x86 processors."""
    options = onnxruntime.SessionOptions()
    for key, value in config.items():
        options.add_session_config_entry(f"session.{key}", value)
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    exact = config or metadata.get("weight_bits") != "8"
    return (session, metadata) if exact else open_session(file, x64quantprecision="1")


def embed(session: onnxruntime.InferenceSession, metadata: dict[str, str], pixels: np.ndarray) -> np.ndarray:
    """The embedding, float32 [dimensions], of RGB bytes [3, height, width]."""
    if metadata["input"] == "float32":
        reads = json.loads(metadata["preprocessing"])
        mean, std = (np.array(reads[key], np.float32)[:, None, None] for key in ("mean", "std"))
        pixels = ((pixels[::-1] if reads["color"] == "BGR" else pixels) - mean) / std
    return session.run(["embedding"], {"images": pixels[None]})[0][0]


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Between two embeddings."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    return float(one @ other / np.sqrt((one @ one) * (other @ other)))


def main(file: str) -> int:
    """Print the verdict; 0 if the runtime computes what was trained, else 1, or 2 where nobody can tell."""
    session, metadata = open_session(file)
    if "golden" not in metadata:
        print(f"{file} holds no golden values: export it again", file=sys.stderr)
        return 2
    golden, size = json.loads(metadata["golden"]), json.loads(metadata["preprocessing"])["size"]
    expected = [np.frombuffer(base64.b64decode(text), "<f4") for text in golden["embeddings"]]
    images = len(golden["digests"] or expected)
    found = [embed(session, metadata, golden_image(number, *size)) for number in range(images)]
    cosines = [cosine(one, other) for one, other in zip(expected, found, strict=False)]
    if golden["tolerance"] == "equal":
        different = sum(zlib.crc32(one) != digest for one, digest in zip(found, golden["digests"], strict=True))
    else:
        different = sum(not each >= golden["tolerance"] for each in cosines)
    verdict = "DIFFERS from what was trained" if different else "computes what was trained"
    least = f"least cosine of the first {len(expected)} is {min(cosines):.6f}"
    print(f"{verdict}: {different} of {images} embeddings differ, {least}, onnxruntime {onnxruntime.__version__}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
