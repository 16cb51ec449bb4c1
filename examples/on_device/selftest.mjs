// Test that onnxruntime on this device gives the trained embeddings.
//   npm install onnxruntime-web  (or onnxruntime-node)
//   node selftest.mjs student.onnx [onnxruntime-web | onnxruntime-node]
import { readFile } from 'node:fs/promises';
import { open, selftest } from './qface.mjs';

const [file, runtime = 'onnxruntime-web'] = process.argv.slice(2);
const ort = await import(runtime);
const model = await open(ort.default ?? ort, await readFile(file));
if (!model.metadata.golden) {
  console.error(`${file} holds no golden values: export it again`);
  process.exit(2);
}
const { agrees, words } = await selftest(model);
console.log(`${words}, ${runtime}`);
process.exit(agrees ? 0 : 1);
