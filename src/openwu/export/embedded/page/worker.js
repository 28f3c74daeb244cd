// Runs the model beside the page, so that the page stays responsive.

import * as ort from "./ort.wasm.min.mjs";
import { Editor } from "./editor.js";
import { Refusal } from "./rules.js";

ort.env.wasm.wasmPaths = new URL("./", import.meta.url).href;
// Several threads need a page that is isolated from other origins (two headers of the host); one thread works anywhere.
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(8, navigator.hardwareConcurrency) : 1;

let editor;

const calls = {
  async load(_, progress) {
    const started = performance.now();
    editor = await Editor.load(ort, new URL("./", import.meta.url), (loaded, total) => progress(loaded / total));
    return { seconds: (performance.now() - started) / 1000, threads: ort.env.wasm.numThreads };
  },
  async understand({ instruction, hasReference }) {
    return (await editor.understand(instruction, hasReference)).map(told);
  },
  async edit({ image, instruction, options }, progress) {
    const started = performance.now();
    const { image: edited, understood } = await editor.edit(image, instruction, { ...options, progress });
    return { image: edited, understood: understood.map(told), seconds: (performance.now() - started) / 1000 };
  },
};

function told({ text, reading, strength }) {
  const { edit, probability, degree } = reading;
  return { edit, probability, degree, strength, text };
}

self.onmessage = async ({ data: { id, call, argument } }) => {
  try {
    const result = await calls[call](argument, (share) => self.postMessage({ id, share }));
    self.postMessage({ id, result });
  } catch (error) {
    self.postMessage({ id, refused: error instanceof Refusal, error: String(error.message ?? error) });
  }
};
