// Read the metadata of qface's files, embed faces with them and test the runtime, in browsers and Node.
// `ort` is onnxruntime-web or onnxruntime-node. Neither gives access to metadata, so the file's bytes are parsed.

function* fields(bytes) {  // yields [number, bytes] of the length-delimited fields of a protobuf message
  let at = 0;
  const varint = () => {
    for (let value = 0, scale = 1; ; scale *= 128) {
      const byte = bytes[at++];
      value += (byte & 127) * scale;
      if (!(byte >= 128)) return value;  // undefined at the end of the file ends the loop, too
    }
  };
  while (at < bytes.length) {
    const tag = varint(), kind = tag & 7;
    if (kind === 0) varint();
    else if (kind === 2) { const size = varint(); yield [tag >>> 3, bytes.subarray(at, at += size)]; }
    else at += kind === 1 ? 8 : 4;
  }
}

export function readMetadata(file) {  // takes the bytes of the .onnx file, returns {key: text}
  const text = new TextDecoder(), metadata = {};
  for (const [number, entry] of fields(file)) {
    if (number !== 14) continue;  // ModelProto.metadata_props
    const [[, key], [, value]] = fields(entry);
    metadata[text.decode(key)] = text.decode(value);
  }
  return metadata;
}

export function goldenImage(number, height, width) {  // returns RGB bytes [3, height, width]
  const random = (plane, y, x) => {
    let word = ((6 * number + plane) << 20) + (y << 10) + x;
    word = Math.imul(word ^ word >>> 16, 0x7feb352d);
    return Math.imul(word ^ word >>> 15, 0x846ca68b) >>> 24;
  };
  const image = new Uint8Array(3 * height * width);
  for (let plane = 0, at = 0; plane < 3; plane++) for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
    const down = y % 16, right = x % 16, column = x >> 4;
    const across = (row) => (16 - right) * random(plane, row, column) + right * random(plane, row, column + 1);
    const smooth = (16 - down) * across(y >> 4) + down * across((y >> 4) + 1);
    image[at++] = (15 * smooth >> 12) + (random(plane + 3, y, x) >> 4);
  }
  return image;
}

export function digest(embedding) {  // returns the CRC-32 of its bytes
  let found = ~0;
  for (const byte of new Uint8Array(embedding.buffer, embedding.byteOffset, embedding.byteLength)) {
    found ^= byte;
    for (let bit = 0; bit < 8; bit++) found = found >>> 1 ^ (found & 1) * 0xedb88320;
  }
  return ~found >>> 0;
}

export function cosine(one, other) {
  let product = 0, first = 0, second = 0;
  one.forEach((a, i) => { const b = other[i]; product += a * b; first += a * a; second += b * b; });
  return product / Math.sqrt(first * second);
}

export async function open(ort, file) {  // takes the bytes of the .onnx file
  const metadata = readMetadata(file), [height, width] = JSON.parse(metadata.preprocessing).size;
  // With 8-bit weights, int8 kernels of old x86 processors saturate without x64quantprecision.
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

export async function embed({ ort, session, metadata, height, width }, pixels) {  // takes RGB bytes [3, height, width]
  const data = metadata.input === 'uint8' ? pixels : normalized(pixels, JSON.parse(metadata.preprocessing));
  const images = new ort.Tensor(metadata.input, data, [1, 3, height, width]);
  return (await session.run({ images })).embedding.data;
}

export async function selftest(model) {  // the metadata must have the key golden
  const { embeddings, digests, tolerance } = JSON.parse(model.metadata.golden);
  const images = digests.length || embeddings.length;
  let different = 0, leastCosine = 1;
  for (let number = 0; number < images; number++) {
    const found = await embed(model, goldenImage(number, model.height, model.width));
    let near = 1;
    if (number < embeddings.length) {
      const bytes = Uint8Array.from(atob(embeddings[number]), (c) => c.charCodeAt(0));
      near = cosine(new Float32Array(bytes.buffer), found);
      leastCosine = Math.min(leastCosine, near);
    }
    different += tolerance === 'equal' ? digest(found) !== digests[number] : !(near >= tolerance);
  }
  const verdict = different ? 'DIFFERS from what was trained' : 'computes what was trained';
  const cosines = `minimum cosine of the first ${embeddings.length} is ${leastCosine.toFixed(6)}`;
  const words = `${verdict}: ${different} of ${images} embeddings differ, ${cosines}`;
  return { agrees: !different, different, images, leastCosine, words };
}
