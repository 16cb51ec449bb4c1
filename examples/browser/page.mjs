// The page: each new file or face is a job; jobs run one at a time and update everything that depends on them.
import * as ort from './ort.wasm.bundle.min.mjs';
import { asModelReads, drawFace, readFace, SIDE } from './faces.mjs';
import { advice, measure } from './measure.mjs';
import { cosine, embed, goldenImage, open, selftest } from './qface.mjs';

const KINDS = ['student', 'float'];
const DEFAULT_FPR = '1e-4';
const models = {};  // by kind: the result of `open` in qface.mjs, and the size in bytes
const faces = [];  // {pixels, isTest}: RGB bytes [3, SIDE, SIDE]; true if the page drew them
let drawn = 0;  // number of the first test image shown

const find = (id) => document.getElementById(id);
const say = (id, words) => { find(id).textContent = words; };

function judge(id, words, good) {
  say(id, words);
  find(id).className = `verdict ${good === undefined ? '' : good ? 'good' : 'bad'}`;
}

// ---- files

async function openFile(kind, file) {
  say('state', `Opening ${file.name} …`);
  await painted();
  const bytes = new Uint8Array(await file.arrayBuffer());
  const model = await openModel(bytes, file.name);
  await models[kind]?.session.release();
  models[kind] = { ...model, size: bytes.length };
  say(`${kind}-name`, file.name);
  say(`${kind}-size`, `${(bytes.length / 1e6).toFixed(2)} MB`);
  say('state', `Testing ${file.name} …`);
  await painted();
  if (model.metadata.golden) {
    const { agrees, words } = await selftest(model);
    judge(`${kind}-verdict`, words, agrees);
  } else {
    judge(`${kind}-verdict`, 'no golden values: export it again');
  }
  if (kind === 'student') offerRates();
  await compare();
}

async function openModel(bytes, name) {
  if (bytes[0] !== 8) throw new Error(`${name} is no ONNX file`);  // the tag of ModelProto.ir_version
  try {
    return await open(ort, bytes);
  } catch (error) {
    if (error instanceof SyntaxError) throw new Error(`${name} does not say what it reads: write it by qface export`);
    throw new Error(`${name} cannot be run here: ${firstLine(error)}`);
  }
}

async function openBeside(kind) {  // opens a file next to the page, if there is one
  const answer = await fetch(`${kind}.onnx`);
  if (answer.ok) await openFile(kind, new File([await answer.blob()], `${kind}.onnx`));
}

// ---- faces

async function takeFaces(place, files) {  // a second file goes to the other place
  for (const [number, file] of [...files].slice(0, 2).entries()) show((place + number) % 2, { pixels: await readFace(file) }, file.name);
  await compare();
}

async function drawTests() {
  for (const place of [0, 1]) {
    show(place, { pixels: goldenImage(drawn + place, SIDE, SIDE), isTest: true }, `test image ${drawn + place}`);
  }
  await compare();
}

function show(place, face, name) {
  faces[place] = face;
  drawFace(find(`face-${place}`), face.pixels);
  find(`face-${place}`).setAttribute('aria-label', name);
  say(`face-name-${place}`, name);
}

// ---- match

const thresholds = () => JSON.parse(models.student?.metadata.thresholds ?? 'null');

function offerRates() {
  const rates = Object.keys(thresholds()?.by_fpr ?? {}), wanted = find('fpr').value || DEFAULT_FPR;
  find('fpr').replaceChildren(...rates.map((rate) => new Option(rate)));
  find('fpr').value = rates.includes(wanted) ? wanted : rates.at(-1);
  find('rates').hidden = !rates.length;
}

async function similarityBy(model) {
  const embeddings = [];
  for (const { pixels } of faces) embeddings.push(Float32Array.from(await embed(model, asModelReads(model, pixels))));
  return cosine(...embeddings);
}

async function compare() {
  if (!models.student) return;
  if (faces.some(({ isTest }) => isTest)) say('remark', 'Test images are not faces, and their embeddings are similar: choose two faces.');
  else if (models.float) say('remark', `The float32 file finds a cosine of ${(await similarityBy(models.float)).toFixed(4)}.`);
  else say('remark', '');
  const similarity = await similarityBy(models.student), found = thresholds(), rate = find('fpr').value;
  say('cosine', similarity.toFixed(4));
  mark('cosine', similarity);
  find('mark-threshold').hidden = !found;
  if (!found) {
    judge('verdict', 'no threshold');
    say('threshold', 'The packed file holds no thresholds: qface thresholds … --write measures them and writes them into it.');
    return;
  }
  const threshold = found.by_fpr[rate], matches = similarity > threshold;
  mark('threshold', threshold);
  judge('verdict', matches ? 'match' : 'no match', matches);
  say('threshold', `Two faces match above a cosine of ${threshold.toFixed(4)}. ${percent(rate)} of pairs of two people exceed it, `
    + `measured on ${count(found.images)} images of ${count(found.identities)} people.`);
}

function mark(name, value) {
  find(`mark-${name}`).hidden = false;
  find(`mark-${name}`).style.left = `${50 + 50 * value}%`;
}

const count = (number) => number.toLocaleString('en');
const percent = (rate) => `${+(100 * rate).toPrecision(6)} %`;

// ---- latency

async function measureAll() {
  const kinds = KINDS.filter((kind) => models[kind]);
  if (!kinds.length) return;
  const runs = kinds.map((kind) => {
    const pixels = asModelReads(models[kind], faces[0].pixels);
    return () => embed(models[kind], pixels);
  });
  say('state', 'Measuring latency …');
  find('progress').hidden = false;
  const { medians, calls } = await measure(runs, (share) => { find('progress').value = share; })
    .finally(() => { find('progress').hidden = true; });
  kinds.forEach((kind, place) => say(`${kind}-latency`, `${medians[place].toFixed(medians[place] < 10 ? 2 : 1)} ms`));
  say('method', `Median of ${calls} calls${kinds.length > 1 ? ' of each file, alternately' : ''}.`);
  if (kinds.length < 2) return;
  const sizeRatio = models.student.size / models.float.size, latencyRatio = medians[0] / medians[1];
  say('size-ratio', sizeRatio.toFixed(2));
  say('latency-ratio', latencyRatio.toFixed(2));
  say('advice', advice(sizeRatio, latencyRatio));
}

// ---- jobs

let queue = Promise.resolve();

function enqueue(...jobs) {  // runs jobs after those in the queue; an error ends only its own job
  queue = queue.then(async () => {
    setBusy(true);
    find('error').hidden = true;
    for (const job of jobs) await job().catch(showError);
    setBusy(false);
  });
}

function setBusy(busy) {
  document.querySelector('main').setAttribute('aria-busy', busy);
  find('measure').disabled = busy || !KINDS.some((kind) => models[kind]);
  if (!busy) say('state', `onnxruntime-web ${ort.env.versions.web}, WebAssembly, one thread.`);
}

function showError(error) {
  say('error', firstLine(error));
  find('error').hidden = false;
}

const firstLine = (error) => String(error.message ?? error).split('\n', 1)[0];
const painted = () => new Promise((resume) => requestAnimationFrame(() => setTimeout(resume)));

// ---- user input

async function take(target, files) {  // target: a name in KINDS, or the place of a face
  if (!KINDS.includes(target)) return takeFaces(Number(target), files);
  await openFile(target, files[0]);
  return measureAll();
}

for (const card of document.querySelectorAll('[data-drop]')) {
  const { drop } = card.dataset, over = (event) => card.classList.toggle('over', event.type === 'dragover');
  for (const type of ['dragover', 'dragleave', 'drop']) card.addEventListener(type, over);
  card.addEventListener('drop', ({ dataTransfer }) => {
    const files = [...dataTransfer.files];
    if (files.length) enqueue(() => take(drop, files));
  });
  card.querySelector('input').addEventListener('change', ({ target }) => {
    const files = [...target.files];
    enqueue(() => take(drop, files));
    target.value = '';  // so that the same file can be chosen again
  });
}
for (const type of ['dragover', 'drop']) document.addEventListener(type, (event) => event.preventDefault());

find('fpr').addEventListener('change', () => enqueue(compare));
find('measure').addEventListener('click', () => enqueue(measureAll));
find('draw').addEventListener('click', () => { drawn += 2; enqueue(drawTests); });

ort.env.wasm.numThreads = 1;
enqueue(drawTests, ...KINDS.map((kind) => () => openBeside(kind)), measureAll);
