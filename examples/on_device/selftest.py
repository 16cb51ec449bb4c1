"""Test that onnxruntime here gives the trained embeddings: ``python selftest.py student.onnx``."""

import base64
import json
import sys
import zlib

import numpy as np
import onnxruntime


def golden_image(number: int, height: int, width: int) -> np.ndarray:
    """Return a test image, uint8 `[3, height, width]`: interpolated random bytes, and noise."""

    def random(plane: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        word = (plane << 20) + (y << 10) + x  # uint32 arithmetic wraps around
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
    """Open the file in onnxruntime, and return the session and the metadata.

    8-bit weights need x64quantprecision: without it, int8 kernels of old x86 processors saturate.
    """
    options = onnxruntime.SessionOptions()
    for key, value in config.items():
        options.add_session_config_entry(f"session.{key}", value)
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    exact = config or metadata.get("weight_bits") != "8"
    return (session, metadata) if exact else open_session(file, x64quantprecision="1")


def embed(session: onnxruntime.InferenceSession, metadata: dict[str, str], pixels: np.ndarray) -> np.ndarray:
    """Return the embedding, float32 `[dimensions]`, of RGB bytes `[3, height, width]`."""
    if metadata["input"] == "float32":
        reads = json.loads(metadata["preprocessing"])
        mean, std = (np.array(reads[key], np.float32)[:, None, None] for key in ("mean", "std"))
        pixels = ((pixels[::-1] if reads["color"] == "BGR" else pixels) - mean) / std
    return session.run(["embedding"], {"images": pixels[None]})[0][0]


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Return the cosine of two embeddings."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    return float(one @ other / np.sqrt((one @ one) * (other @ other)))


def main(file: str) -> int:
    """Print the verdict; return 0 if the embeddings agree, 1 if not, 2 if the file has no golden values."""
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
    least = f"minimum cosine of the first {len(expected)} is {min(cosines):.6f}"
    print(f"{verdict}: {different} of {images} embeddings differ, {least}, onnxruntime {onnxruntime.__version__}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
