"""Say whether onnxruntime computes on this device what was trained; needs onnxruntime and numpy only.

python selftest.py student.onnx
"""

import base64
import json
import sys

import numpy as np
import onnxruntime


def golden_image(number: int, height: int, width: int) -> np.ndarray:
    """Test image, uint8 [3, height, width]: a grid of random bytes, interpolated in steps of 16 pixels, and noise."""
    state = (number + 1) * 2654435761

    def draw() -> int:
        nonlocal state
        state = (state * 1664525 + 1013904223) & 0xFFFFFFFF
        return state >> 24

    image = np.empty((3, height, width), np.uint8)
    for channel in image:
        grid = [[draw() for _ in range(width // 16 + 2)] for _ in range(height // 16 + 2)]
        for y, x in np.ndindex(height, width):
            (row, down), (column, right) = divmod(y, 16), divmod(x, 16)
            upper = (16 - right) * grid[row][column] + right * grid[row][column + 1]
            lower = (16 - right) * grid[row + 1][column] + right * grid[row + 1][column + 1]
            channel[y, x] = (15 * ((16 - down) * upper + down * lower) >> 12) + (draw() >> 4)
    return image


def digest(embedding: np.ndarray) -> int:
    """32-bit FNV-1a of the bytes of a float32 embedding."""
    found = 2166136261
    for byte in embedding.astype("<f4").tobytes():
        found = ((found ^ byte) * 16777619) & 0xFFFFFFFF
    return found


def open_session(file: str) -> tuple[onnxruntime.InferenceSession, dict[str, str]]:
    """The file in onnxruntime, and its metadata; weights of 8 bits need a mode that is exact on old x86 processors."""
    options = onnxruntime.SessionOptions()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    if metadata.get("weight_bits") == "8":
        options.add_session_config_entry("session.x64quantprecision", "1")
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return session, metadata


def embed(session: onnxruntime.InferenceSession, metadata: dict[str, str], pixels: np.ndarray) -> np.ndarray:
    """The embedding, float32 [dimensions], of RGB bytes [3, height, width]."""
    if metadata["input"] == "float32":
        reads = json.loads(metadata["preprocessing"])
        mean, std = (np.array(reads[key], np.float32)[:, None, None] for key in ("mean", "std"))
        pixels = (pixels[::-1] if reads["color"] == "BGR" else pixels) - mean
        pixels /= std
    return session.run(["embedding"], {"images": pixels[None]})[0][0]


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Between two embeddings."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    return float(one @ other / np.sqrt((one @ one) * (other @ other)))


def selftest(session: onnxruntime.InferenceSession, metadata: dict[str, str]) -> tuple[bool, str]:
    """Whether the embeddings of the test images are those in the metadata, and that in words."""
    golden, size = json.loads(metadata["golden"]), json.loads(metadata["preprocessing"])["size"]
    expected = [np.frombuffer(base64.b64decode(text), "<f4") for text in golden["embeddings"]]
    images = len(expected) + len(golden["digests"])
    found = [embed(session, metadata, golden_image(number, *size)) for number in range(images)]
    cosines = [cosine(one, found[number]) for number, one in enumerate(expected)]
    if golden["tolerance"] == "equal":
        same = [digest(one) for one in expected] + golden["digests"]
        different = sum(one != digest(other) for one, other in zip(same, found, strict=True))
    else:
        different = sum(not each >= golden["tolerance"] for each in cosines)
    verdict = "DIFFERS from what was trained" if different else "computes what was trained"
    counts = (
        f"{different} of {images} embeddings differ, least cosine of the first {len(expected)} is {min(cosines):.6f}"
    )
    return not different, f"{verdict}: {counts}"


def main(file: str) -> int:
    """Print the verdict; 0 if the runtime computes what was trained, else 1, or 2 where nobody can tell."""
    session, metadata = open_session(file)
    if "golden" not in metadata:
        print(f"{file} holds no golden values: export it again", file=sys.stderr)
        return 2
    agrees, words = selftest(session, metadata)
    print(f"{words}, onnxruntime {onnxruntime.__version__}")
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
