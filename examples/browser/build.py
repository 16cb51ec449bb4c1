"""Copy the page, qface.mjs and onnxruntime-web into a folder that any web server can serve.

python build.py SITE [student.onnx [float.onnx]]

onnxruntime-web comes from --modules, by default node_modules next to this script; npm installs it there if missing.
"""

import argparse
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = [HERE / name for name in ("index.html", "style.css", "page.mjs", "faces.mjs", "measure.mjs")]
RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("site", type=Path, help="output folder; it is created if missing, and its files are replaced")
parser.add_argument("models", nargs="*", type=Path, help="the packed file, then the float32 file")
parser.add_argument("--modules", type=Path, default=HERE / "node_modules", help="node_modules with onnxruntime-web")
arguments = parser.parse_args()

package = arguments.modules / "onnxruntime-web"
if not package.is_dir():
    options = ("--no-save", "--ignore-scripts", "--no-audit", "--no-fund")
    subprocess.run(["npm", "install", *options, "--prefix", arguments.modules.parent, package.name], check=True)

arguments.site.mkdir(parents=True, exist_ok=True)
for file in (*PAGE, HERE.parent / "on_device" / "qface.mjs", *(package / "dist" / name for name in RUNTIME)):
    shutil.copyfile(file, arguments.site / file.name)
for model, name in zip(arguments.models, ("student.onnx", "float.onnx"), strict=False):
    shutil.copyfile(model, arguments.site / name)
print(f"python -m http.server --directory {arguments.site}")
