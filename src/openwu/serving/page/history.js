// The history: pictures and instructions in this browser's database, in bounded number and size.
const MOST = 24;
const MOST_BYTES = 200 * 2 ** 20;

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

async function store(mode) {
  const opening = indexedDB.open("openwu", 1);
  opening.onupgradeneeded = () => opening.result.createObjectStore("edits", { keyPath: "id", autoIncrement: true });
  return (await done(opening)).transaction("edits", mode).objectStore("edits");
}

/** All entries, the newest first. */
export const entries = async () => (await done((await store("readonly")).getAll())).reverse();

export const remove = async (id) => done((await store("readwrite")).delete(id));

export const clear = async () => done((await store("readwrite")).clear());

/** Keep an entry {name, prompt, note, before, after}, blobs included; the oldest make room. */
export async function add(entry) {
  const thumbnail = await small(entry.after);
  await done((await store("readwrite")).add({ ...entry, thumbnail }));
  let bytes = 0;
  for (const [number, each] of (await entries()).entries()) {
    bytes += each.before.size + each.after.size;
    if (number >= MOST || (number && bytes > MOST_BYTES)) await remove(each.id);
  }
}

async function small(blob) {
  const bitmap = await createImageBitmap(blob);
  const scale = Math.min(1, 320 / Math.max(bitmap.width, bitmap.height));
  const canvas = new OffscreenCanvas(Math.max(1, bitmap.width * scale), Math.max(1, bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return canvas.convertToBlob({ type: "image/jpeg" });
}
