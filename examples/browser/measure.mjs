// Measure latency and recommend a file. Calls alternate between files, so that load affects all of them equally.

const CALLS = 50, MILLISECONDS = 4000, LEAST = 5;  // slow files get fewer calls

export async function measure(runs, onProgress) {  // returns the median milliseconds of each function
  await takeTurns(runs, 1, (share) => onProgress(share / 2));  // warm-up: browsers recompile after many calls
  const times = await takeTurns(runs, LEAST, (share) => onProgress((1 + share) / 2));
  return { medians: times.map(median), calls: times[0].length };
}

async function takeTurns(runs, least, onProgress) {
  const times = runs.map(() => []), start = performance.now();
  for (let turn = 0; turn < least || (turn < CALLS && performance.now() - start < MILLISECONDS); turn++) {
    for (const [place, run] of runs.entries()) {
      const before = performance.now();
      await run();
      times[place].push(performance.now() - before);
    }
    onProgress(Math.max(turn / CALLS, Math.min(1, (performance.now() - start) / MILLISECONDS)));
    await new Promise((resume) => setTimeout(resume));  // keeps the page responsive
  }
  return times;
}

function median(values) {
  const sorted = values.toSorted((a, b) => a - b), half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

export function advice(sizeRatio, latencyRatio) {  // packed / float32
  if (sizeRatio >= 1) return 'The packed file is not smaller than the float32 file: are the two files swapped?';
  const size = `the packed file is ${(1 / sizeRatio).toFixed(1)} x smaller`;
  if (latencyRatio > 1.1)
    return `Here ${size}, but takes ${latencyRatio.toFixed(2)} x as long: take it if embeddings must equal those of all other devices; qface export --target float32 writes a file as small as this and as fast as float32.`;
  const speed = latencyRatio < 0.9 ? `${(1 / latencyRatio).toFixed(2)} x faster` : 'about as fast';
  return `Here ${size} and ${speed}: take the packed file.`;
}
