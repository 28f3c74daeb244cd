// The embedded model in a browser: words -> tokens -> adapter -> edited picture, by onnxruntime-web.

import { Canvas, conditionView, enlarged, factorOf, finished, noisePlane, reduced, tileInputs, tilesOf } from "./picture.js";
import { Refusal, Rules } from "./rules.js";
import { Words } from "./words.js";

const GRAPHS = ["words", "sentence", "adapter", "edit"];
const SMALLEST = 16;

export class Editor {
  // ort: onnxruntime-web; folder: URL of the folder with model.json; progress(bytes loaded, bytes in all)
  static async load(ort, folder, progress = () => {}) {
    const json = async (name) => (await fetched(new URL(name, folder))).json();
    const [model, tables] = await Promise.all([json("model.json"), json("rules.json")]);
    const loaded = {};
    const report = (name, bytes) => {
      loaded[name] = bytes;
      progress(Object.values(loaded).reduce((sum, each) => sum + each, 0), model.bytes);
    };
    const sessions = {};
    for (const name of GRAPHS.filter((each) => each !== "sentence" || model.sentence)) {
      const bytes = await read(new URL(`${name}.onnx`, folder), (count) => report(name, count));
      sessions[name] = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
    }
    return new Editor(ort, model, tables, sessions);
  }

  constructor(ort, model, tables, sessions) {
    Object.assign(this, { ort, model, tables, sessions });
    this.words = new Words(tables.instruction, model.instruction);
    const encode = (sentences) => this.encode(sentences);
    const places = model.sentence ? (sentence) => this.places(sentence) : null;
    this.rules = new Rules(tables, model.edits, model.instruction.labels, model.accepted, encode, places);
  }

  tensor(values, dims) {
    const type = values instanceof BigInt64Array ? "int64" : values instanceof Uint8Array ? "bool" : "float32";
    return new this.ort.Tensor(type, values, dims);
  }

  async tokens(sentence) {
    const [words, phrases] = [this.words.rows(sentence), this.words.phraseRows(sentence)];
    const inputs = { rows: this.tensor(words.rows, words.dims), phrases: this.tensor(phrases.rows, phrases.dims) };
    return this.sessions.words.run(inputs);
  }

  // What the encoder takes sentences for, without any rules.
  async encode(sentences) {
    const readings = [];
    for (const sentence of sentences) {
      const { edits, degrees } = await this.tokens(sentence);
      const ranked = this.model.instruction.labels.map((label, i) => [label, edits.data[i]]);
      ranked.sort((one, other) => other[1] - one[1]);
      const degree = this.tables.instruction.DEGREES[degrees.data.indexOf(Math.max(...degrees.data))];
      readings.push({ edit: ranked[0][0], probability: ranked[0][1], degree, ranked, sentence: "" });
    }
    return readings;
  }

  // Probabilities of every label at each place in the order of wishes, by the sentence reader: [[label, share], ...].
  async places(sentence) {
    const { rows, dims } = this.words.rows(sentence, this.model.sentence);
    const { places } = await this.sessions.sentence.run({ rows: this.tensor(rows, dims) });
    const labels = [...this.model.instruction.labels, this.tables.whole.NOTHING];
    return Array.from({ length: places.dims[1] }, (_, place) =>
      labels.map((label, at) => [label, places.data[place * labels.length + at]]),
    );
  }

  // The wishes of an instruction; throws a Refusal for what the model does not serve.
  understand(instruction, hasReference = false) {
    return this.rules.understand(instruction, hasReference);
  }

  // image, reference: {width, height, data: RGBA}; -> {image, understood}
  async edit(image, instruction, { strength = 1, seed = 0, reference = null, progress = () => {} } = {}) {
    if (!(strength >= 0 && strength <= 2)) throw new Refusal(`Expected a strength from 0 to 2, got ${strength}.`);
    for (const each of [image, reference]) {
      if (each && Math.min(each.width, each.height) < SMALLEST) {
        throw new Refusal(`Expected pictures of at least ${SMALLEST} pixels a side, got ${each.width} x ${each.height}.`);
      }
    }
    const understood = await this.understand(instruction, reference !== null);
    if (strength === 0) return { image, understood };
    let edited = image;
    for (const [index, wish] of understood.entries()) {
      const report = (share) => progress((index + share) / understood.length);
      // The strength is the share of the finished picture's change; the adapter itself is the full one.
      const after = await this.pass(edited, wish, { seed, reference, report });
      edited = finished(edited, after, wish, strength, this.tables.guarantees);
    }
    return { image: edited, understood };
  }

  // One adapter for one picture and sentence: name -> tensor.
  async adapter(image, tokens, reference) {
    const view = conditionView(image, this.model.condition_side);
    const blank = { values: new Float32Array(3 * SMALLEST ** 2), dims: [1, 3, SMALLEST, SMALLEST] };
    const second = reference ? conditionView(reference, this.model.condition_side) : blank;
    return this.sessions.adapter.run({
      picture: this.tensor(view.values, view.dims),
      tokens,
      reference: this.tensor(second.values, second.dims),
      present: this.tensor(Uint8Array.of(reference ? 1 : 0), [1]),
    });
  }

  async pass(photo, wish, { seed, reference, report }) {
    const { tokens } = await this.tokens(wish.text);
    const factors = await this.adapter(photo, tokens, reference);
    const by = factorOf(wish.reading.edit, photo, this.tables.scale);
    const image = by === 1 ? photo : reduced(photo, by);
    const { cell, margin } = this.model.tiles;
    const grid = tilesOf(image.width, image.height, this.model.tiles);
    const noise = noisePlane(image.width, image.height, seed);
    const canvas = new Canvas(image, margin, grid.length === 1);
    for (const [index, tile] of grid.entries()) {
      const { picture, planes, dims } = tileInputs(image, noise, tile, cell);
      const inputs = { picture: this.tensor(picture, dims), planes: this.tensor(planes, dims), tokens, ...factors };
      const { edited } = await this.sessions.edit.run({ ...inputs, strength: this.tensor(Float32Array.of(1), [1]) });
      canvas.add(tile, edited.data, dims);
      edited.dispose();
      report((index + 1) / grid.length);
    }
    const detail = this.tables.scale.DETAILED.includes(wish.reading.edit) ? image : null;
    return by === 1 ? canvas.pixels() : enlarged(canvas.pixels(), photo, by, detail, this.tables.scale);
  }
}

async function fetched(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: the server answered ${response.status}; is the folder complete?`);
  return response;
}

async function read(url, report) {
  const response = await fetched(url);
  const parts = [];
  let count = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    report((count += value.length));
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}
