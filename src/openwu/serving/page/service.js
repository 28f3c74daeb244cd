// Talk to the service: its public API, as any other client does.

export class Refused extends Error {
  constructor(status, error, retryAfter) {
    super(error.message ?? `HTTP ${status}`);
    this.status = status;
    this.code = error.code ?? "";
    this.suggestions = error.suggestions ?? [];
    this.retryAfter = retryAfter;
  }
}

/** The key lives in this tab alone. */
export const key = {
  get: () => sessionStorage.getItem("openwu-key") ?? "",
  set: (value) => sessionStorage.setItem("openwu-key", value),
};

async function call(path, options = {}) {
  const headers = key.get() ? { authorization: `Bearer ${key.get()}` } : {};
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  throw new Refused(response.status, body.error ?? {}, response.headers.get("retry-after"));
}

export const models = async () => (await (await call("/v1/models")).json()).data;

export async function knownEdits(query, signal) {
  return (await (await call(`/v1/edits?q=${encodeURIComponent(query)}`, { signal })).json()).data;
}

/**
 * Edit one picture. `tell(kind, done, total)` hears "queued" (done: jobs before this one) and "editing".
 * Returns {blob, about}; throws Refused, or AbortError after a stop.
 */
export async function edit(fields, signal, tell) {
  const form = new FormData();
  for (const [name, value] of fields) form.append(name, value);
  form.append("stream", "true");
  const response = await call("/v1/images/edits", { method: "POST", body: form, signal });
  for await (const event of events(response.body)) {
    const state = /^: (queued|editing) (\d+)(?:\/(\d+))?/.exec(event);
    if (state) tell(state[1], Number(state[2]), Number(state[3] ?? 1));
    const data = /^data: (.*)$/m.exec(event);
    if (!data) continue;
    const body = JSON.parse(data[1]);
    if (body.error) throw new Refused(0, body.error, null);
    if (body.type !== "image_edit.completed") continue;
    const bytes = Uint8Array.from(atob(body.b64_json), (letter) => letter.charCodeAt(0));
    return { blob: new Blob([bytes], { type: `image/${body.output_format}` }), about: body.openwu };
  }
  throw new Refused(0, { code: "lost" }, null);
}

/** Yield the blocks of a stream of events; a large block is joined once, when it is whole. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let parts = [];
  let last = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    parts.push(value);
    const whole = (last + value).includes("\n\n");
    last = value.slice(-1);
    if (!whole) continue;
    const blocks = parts.join("").split("\n\n");
    parts = [blocks.pop()];
    last = parts[0].slice(-1);
    yield* blocks;
  }
}
