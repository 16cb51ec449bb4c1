// Convert image files to the input of a network, by the rules of docs/on_device.md, "Crop".

export const SIDE = 112;  // of an aligned crop, in pixels

export async function readFace(file) {  // takes an image file, returns RGB bytes [3, SIDE, SIDE]
  const image = await createImageBitmap(file, { colorSpaceConversion: 'none', premultiplyAlpha: 'none' }).catch(() => {
    throw new Error(`${file.name} is no image that this browser reads`);
  });
  const { width, height } = image;
  if (width !== SIDE || height !== SIDE)
    throw new Error(`${file.name} has ${width}x${height} pixels: align it to ${SIDE}x${SIDE} first (qface align)`);
  const context = new OffscreenCanvas(SIDE, SIDE).getContext('2d');
  context.drawImage(image, 0, 0);
  const { data } = context.getImageData(0, 0, SIDE, SIDE), plane = SIDE * SIDE;
  return Uint8Array.from({ length: 3 * plane }, (_, i) => data[4 * (i % plane) + Math.floor(i / plane)]);
}

export function drawFace(canvas, pixels) {
  const image = new ImageData(SIDE, SIDE), plane = SIDE * SIDE;
  for (let at = 0; at < plane; at++)
    image.data.set([pixels[at], pixels[plane + at], pixels[2 * plane + at], 255], 4 * at);
  canvas.getContext('2d').putImageData(image, 0, 0);
}

export function asModelReads({ metadata, height, width }, pixels) {  // crops, then resizes bilinearly if sizes differ
  const [top, left, bottom, right] = JSON.parse(metadata.preprocessing).crop;
  const rows = neighbors(top, bottom, height), columns = neighbors(left, right, width);
  const found = new Float32Array(3 * height * width);
  let at = 0;
  for (let plane = 0; plane < pixels.length; plane += SIDE * SIDE) {
    const between = (row, [first, second, part]) =>
      (1 - part) * pixels[plane + SIDE * row + first] + part * pixels[plane + SIDE * row + second];
    for (const [above, below, part] of rows)
      for (const column of columns) found[at++] = (1 - part) * between(above, column) + part * between(below, column);
  }
  return metadata.input === 'uint8' ? new Uint8Array(Uint8ClampedArray.from(found).buffer) : found;  // rounds to even
}

function neighbors(start, end, length) {  // per output pixel: both source pixels, weight of the second
  return Array.from({ length }, (_, place) => {
    const exact = Math.max(0, (place + 0.5) * (end - start) / length - 0.5), first = Math.floor(exact);
    return [start + first, Math.min(start + first + 1, end - 1), exact - first];
  });
}
