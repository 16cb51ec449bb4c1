// Embed with onnxruntime-web in Node: WebAssembly on one thread. The folder and its files are those of exchange.py.
const fs = require('fs')
const path = require('path')
const ort = require('onnxruntime-web')

const WARM_UP = 50 // V8 compiles a function a second time, for speed, only after many calls

async function open(model) {
  const session = await ort.InferenceSession.create(fs.readFileSync(model.path), { executionProviders: ['wasm'] })
  const shape = [1, ...model.shape.slice(1)]
  return async (image) => {
    const outputs = await session.run({ [session.inputNames[0]]: new ort.Tensor(model.dtype, image, shape) })
    return outputs[session.outputNames[0]].data
  }
}

async function takeTurns(models, images, runs) {
  const times = models.map(() => [])
  for (let run = 0; run < WARM_UP + runs; run++) {
    for (const [number, embed] of models.entries()) {
      const start = performance.now()
      await embed(images[number][0])
      times[number].push(performance.now() - start)
    }
  }
  return times.map((measured) => measured.slice(WARM_UP))
}

function readImages(file, { dtype, shape }) {
  const bytes = new Uint8Array(fs.readFileSync(file))
  const values = dtype === 'uint8' ? bytes : new Float32Array(bytes.buffer)
  const size = shape[1] * shape[2] * shape[3]
  return Array.from({ length: shape[0] }, (_, place) => values.slice(place * size, (place + 1) * size))
}

async function main(folder) {
  ort.env.wasm.numThreads = 1
  const request = JSON.parse(fs.readFileSync(path.join(folder, 'request.json'), 'utf8'))
  const models = []
  for (const model of request.models) models.push(await open(model))
  const images = request.models.map((model, number) => readImages(path.join(folder, `${number}.in`), model))
  let milliseconds = []
  if (request.runs) {
    milliseconds = await takeTurns(models, images, request.runs)
  } else {
    for (const [number, embed] of models.entries()) {
      const output = fs.openSync(path.join(folder, `${number}.out`), 'w')
      for (const image of images[number]) fs.writeSync(output, new Uint8Array((await embed(image)).slice().buffer))
      fs.closeSync(output)
    }
  }
  const response = { version: ort.env.versions.web, milliseconds }
  fs.writeFileSync(path.join(folder, 'response.json'), JSON.stringify(response))
}

main(process.argv[2])
