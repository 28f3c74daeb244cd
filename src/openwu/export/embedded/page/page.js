// The page: choose a picture, say what to do, compare, save. Nothing leaves the browser.

const element = (id) => document.getElementById(id);
const worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
const waiting = new Map();
const state = { image: null, reference: null, edited: null, name: "picture", busy: true, decoding: 0 };

worker.onmessage = ({ data }) => {
  const { resolve, reject, progress } = waiting.get(data.id);
  if (data.share !== undefined) return progress(data.share);
  waiting.delete(data.id);
  return data.error === undefined ? resolve(data.result) : reject(Object.assign(new Error(data.error), data));
};
worker.onerror = (event) => tell(`The model does not start here: ${event.message || "this browser has no module workers"}`, true);

// One call of the worker; also what tests use.
window.openwu = {
  call: (call, argument, progress = () => {}) =>
    new Promise((resolve, reject) => {
      const id = crypto.getRandomValues(new Uint32Array(1))[0];
      waiting.set(id, { resolve, reject, progress });
      worker.postMessage({ id, call, argument });
    }),
};

function tell(text, failed = false) {
  element("status").textContent = text;
  element("status").classList.toggle("failed", failed);
}

function show(canvas, image) {
  canvas.width = image.width;
  canvas.height = image.height;
  canvas.getContext("2d").putImageData(new ImageData(image.data, image.width, image.height), 0, 0);
  canvas.hidden = false;
}

async function decoded(file) {
  const bitmap = await createImageBitmap(file, { imageOrientation: "from-image", premultiplyAlpha: "none" });
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const { width, height, data } = context.getImageData(0, 0, bitmap.width, bitmap.height);
  return { width, height, data };
}

async function choose(file, kind) {
  state[kind] = null;
  element(`${kind}-name`).textContent = "";
  if (!file) return ready();
  state.decoding++;
  ready();
  try {
    state[kind] = await decoded(file);
  } catch {
    tell(`${file.name}: this browser cannot read it as a picture; choose a JPEG, PNG or WebP file.`, true);
  }
  state.decoding--;
  if (state[kind]) {
    element(`${kind}-name`).textContent = `${file.name}, ${state[kind].width} x ${state[kind].height}`;
    if (kind === "image") {
      state.name = file.name.replace(/\.[^.]*$/, "");
      show(element("before"), state.image);
      element("after").hidden = true;
      element("save").hidden = true;
    }
  }
  return ready();
}

function ready() {
  element("go").disabled = state.busy || state.decoding > 0 || !state.image || !element("instruction").value.trim();
}

async function edit(event) {
  event.preventDefault();
  const [started, instruction] = [performance.now(), element("instruction").value];
  const options = { strength: Number(element("strength").value), seed: 0, reference: state.reference };
  busy(true);
  tell("Reading the instruction ...");
  try {
    const argument = { image: state.image, instruction, options };
    const result = await window.openwu.call("edit", argument, (share) => {
      tell(`Editing ... ${Math.round(100 * share)}%, ${((performance.now() - started) / 1000).toFixed(0)} s`);
    });
    state.edited = result.image;
    show(element("after"), result.image);
    element("save").hidden = false;
    const wishes = result.understood.map(
      ({ edit: name, probability, strength }) =>
        `${name.replaceAll("_", " ")} (${Math.round(100 * probability)}%${strength === 1 ? "" : `, strength ${strength.toFixed(2)}`})`,
    );
    const megapixels = (state.image.width * state.image.height) / 1e6;
    tell(`Understood: ${wishes.join(", then ")}. ${result.seconds.toFixed(1)} s for ${megapixels.toFixed(2)} megapixels.`);
  } catch (error) {
    tell(error.refused ? error.message : `The edit failed: ${error.message}`, true);
  }
  busy(false);
}

function busy(value) {
  state.busy = value;
  element("form").setAttribute("aria-busy", String(value));
  ready();
}

async function save() {
  const blob = await new Promise((resolve) => element("after").toBlob(resolve, "image/png"));
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: `${state.name}-edited.png` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

element("form").addEventListener("submit", edit);
element("image").addEventListener("change", (event) => choose(event.target.files[0], "image"));
element("reference").addEventListener("change", (event) => choose(event.target.files[0], "reference"));
element("instruction").addEventListener("input", ready);
element("save").addEventListener("click", save);
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  choose(event.dataTransfer.files[0], "image");
});

window.openwu
  .call("load", {}, (share) => tell(`Loading the model ... ${Math.round(100 * share)}%`))
  .then(({ seconds, threads }) => {
    tell(`Ready after ${seconds.toFixed(1)} s, on ${threads === 1 ? "one thread" : `${threads} threads`}.`);
    busy(false);
  })
  .catch((error) => tell(`The model could not be loaded: ${error.message}`, true));
