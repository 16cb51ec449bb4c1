// Reads the metadata of files that qface wrote, embeds faces with them and tests the runtime; for browsers and Node.
// `ort` is onnxruntime-web or onnxruntime-node, which hide a file's metadata: they are read from its bytes.

function* fields(bytes) {  // of a protobuf message: number and bytes of those that have a length
  let at = 0;
  const varint = () => {
    for (let value = 0, scale = 1; ; scale *= 128) {
      const byte = bytes[at++];
      value += (byte & 127) * scale;
      if (!(byte >= 128)) return value;  // also where the file ends
    }
  };
  while (at < bytes.length) {
    const tag = varint(), kind = tag & 7;
    if (kind === 0) varint();
    else if (kind === 2) { const size = varint(); yield [tag >>> 3, bytes.subarray(at, at += size)]; }
    else at += kind === 1 ? 8 : 4;
  }
}

export function readMetadata(file) {  // bytes of the .onnx file to {key: text}
  const text = new TextDecoder(), metadata = {};
  for (const [number, entry] of fields(file)) {
    if (number !== 14) continue;  // ModelProto.metadata_props
    const [[, key], [, value]] = fields(entry);
    metadata[text.decode(key)] = text.decode(value);
  }
  return metadata;
}

export function goldenImage(number, height, width) {  // RGB bytes, three planes
  let state = Math.imul(number + 1, 2654435761);
  const draw = () => (state = (Math.imul(state, 1664525) + 1013904223) | 0) >>> 24;
  const image = new Uint8Array(3 * height * width), columns = Math.floor(width / 16) + 2;
  for (let channel = 0, at = 0; channel < 3; channel++) {
    const grid = Array.from({ length: (Math.floor(height / 16) + 2) * columns }, draw);
    for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
      const down = y % 16, right = x % 16, corner = (y >> 4) * columns + (x >> 4);
      const between = (left) => (16 - right) * grid[left] + right * grid[left + 1];
      const smooth = (16 - down) * between(corner) + down * between(corner + columns);
      image[at++] = (15 * smooth >> 12) + (draw() >> 4);
    }
  }
  return image;
}

export function digest(embedding) {  // 32-bit FNV-1a of its bytes
  let found = 2166136261;
  for (const byte of new Uint8Array(embedding.buffer, embedding.byteOffset, embedding.byteLength))
    found = Math.imul(found ^ byte, 16777619);
  return found >>> 0;
}

export function cosine(one, other) {
  let product = 0, first = 0, second = 0;
  one.forEach((a, i) => { const b = other[i]; product += a * b; first += a * a; second += b * b; });
  return product / Math.sqrt(first * second);
}

export async function open(ort, file) {  // bytes of the .onnx file to {session, metadata, height, width}
  const metadata = readMetadata(file), [height, width] = JSON.parse(metadata.preprocessing).size;
  // Weights of 8 bits need a mode that is exact on old x86 processors.
  const options = metadata.weight_bits === '8' ? { extra: { session: { x64quantprecision: '1' } } } : {};
  return { ort, session: await ort.InferenceSession.create(file, options), metadata, height, width };
}

function normalized(pixels, { mean, std, color }) {
  const plane = pixels.length / 3, { fround } = Math;
  return Float32Array.from(pixels, (_, i) => {
    const channel = Math.floor(i / plane), from = color === 'BGR' ? 2 - channel : channel;
    return fround(pixels[from * plane + i % plane] - fround(mean[channel])) / fround(std[channel]);
  });
}

export async function embed({ ort, session, metadata, height, width }, pixels) {  // RGB bytes, three planes
  const data = metadata.input === 'uint8' ? pixels : normalized(pixels, JSON.parse(metadata.preprocessing));
  const images = new ort.Tensor(metadata.input, data, [1, 3, height, width]);
  return (await session.run({ images })).embedding.data;
}

export async function selftest(model) {  // of a file whose metadata have the key golden
  const { embeddings, digests, tolerance } = JSON.parse(model.metadata.golden);
  const images = embeddings.length + digests.length;
  let different = 0, leastCosine = 1;
  for (let number = 0; number < images; number++) {
    const found = await embed(model, goldenImage(number, model.height, model.width));
    let same = digest(found) === digests[number - embeddings.length];
    if (number < embeddings.length) {
      const expected = new Float32Array(Uint8Array.from(atob(embeddings[number]), (c) => c.charCodeAt(0)).buffer);
      const near = cosine(expected, found);
      leastCosine = Math.min(leastCosine, near);
      same = tolerance === 'equal' ? digest(found) === digest(expected) : near >= tolerance;
    }
    different += !same;
  }
  const verdict = different ? 'DIFFERS from what was trained' : 'computes what was trained';
  const cosines = `least cosine of the first ${embeddings.length} is ${leastCosine.toFixed(6)}`;
  const words = `${verdict}: ${different} of ${images} embeddings differ, ${cosines}`;
  return { agrees: !different, different, images, leastCosine, words };
}
