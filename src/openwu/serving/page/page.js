// The page: a form, the pictures that come back, and the history.
import * as history from "./history.js";
import { Refused, edit, key, knownEdits, models } from "./service.js";
import { TEXTS } from "./texts.js";

const $ = (id) => document.getElementById(id);
const DROPS = ["photo", "reference", "example-before", "example-after"];
const files = {}; // slot -> File
let language = localStorage.getItem("openwu-language") ?? (navigator.language.startsWith("zh") ? "zh" : "en");
let running = null; // the AbortController of the edits that run
let shown = []; // what the cards show, to say it again in another language
let links = []; // object URLs of the cards and of the history, given back when they are drawn again
let historyLinks = [];

function text(name, ...values) {
  return TEXTS[language][name].replace(/\{(\d)\}/g, (_, at) => String(values[at]));
}

function speak() {
  document.documentElement.lang = language === "zh" ? "zh-Hans" : "en";
  for (const each of document.querySelectorAll("[data-text]")) each.textContent = text(each.dataset.text);
  for (const each of document.querySelectorAll("[data-label]")) each.setAttribute("aria-label", text(each.dataset.label));
  $("language").textContent = text("other");
  $("language").lang = language === "zh" ? "en" : "zh";
  drawCards();
  drawHistory();
  suggest();
}

function say(words) {
  $("status").textContent = words;
}

// Pictures that enter: by the file dialogue, dropped or pasted.

function take(slot, file) {
  if (!file) return;
  if (file.type && !file.type.startsWith("image/")) return complain(text("notPicture", file.name));
  files[slot] = file;
  const preview = $(slot).closest(".drop").querySelector("img");
  URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(file);
  preview.hidden = false;
  $("error").hidden = true;
  if (slot === "photo") $("photo-name").textContent = file.name;
}

function leave(slot) {
  delete files[slot];
  $(slot).value = "";
  const preview = $(slot).closest(".drop").querySelector("img");
  URL.revokeObjectURL(preview.src);
  preview.removeAttribute("src");
  preview.hidden = true;
}

function listenForPictures() {
  for (const slot of DROPS) {
    $(slot).addEventListener("change", () => take(slot, $(slot).files[0]));
    $(slot).closest(".drop").querySelector("img").addEventListener("error", (event) => {
      event.target.hidden = true;
      if (slot === "photo") $("photo-name").textContent = `${files.photo?.name}: ${text("noPreview")}`;
    });
  }
  const zone = (event) => event.target.closest?.("[data-drop]");
  const mark = (found) => document.querySelectorAll(".drop").forEach((each) => each.classList.toggle("over", each === found));
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    mark(zone(event) ?? $("photo").closest(".drop"));
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget ?? mark(null));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    mark(null);
    take(zone(event)?.dataset.drop ?? "photo", event.dataTransfer.files[0]);
  });
  document.addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find((each) => each.type.startsWith("image/"));
    if (!file) return;
    event.preventDefault();
    take("photo", file);
  });
}

// Errors say what to do, and offer it.

function complain(words, actions = []) {
  $("error-text").textContent = words;
  $("error-actions").replaceChildren(...actions.map(([label, act]) => button(label, act)));
  $("error").hidden = false;
}

function button(label, act) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = label;
  made.addEventListener("click", act);
  return made;
}

async function explain(error, field) {
  if (!(error instanceof Refused)) return complain(text("unreachable"));
  if (error.status === 401) {
    document.querySelector("details").open = true;
    complain(text("needKey"));
    return $("key").focus();
  }
  if (error.status === 429) return complain(text("busy", error.retryAfter ?? 5));
  if (error.code === "lost") return complain(text("lost"));
  if (error.code === "unknown_example") return complain(text("notShown"), [[text("anyway"), () => start(true)]]);
  if (error.code !== "unknown_instruction") return complain(error.message);
  const edits = await knownEdits("").catch(() => []);
  const meant = error.suggestions.flatMap((id) => edits.filter((each) => each.id === id));
  const actions = meant.map((each) => [
    sentence(each),
    () => {
      field.value = sentence(each);
      start();
    },
  ]);
  complain(`${error.message} ${meant.length ? text("meant") : ""}`, [...actions, [text("anyway"), () => start(true)]]);
}

// Known edits.

const sentence = (edit) => edit.examples[language] ?? edit.examples.en ?? edit.id.replaceAll("_", " ");
let asking = null;

async function suggest() {
  asking?.abort();
  asking = new AbortController();
  const found = await knownEdits($("prompt").value.trim(), asking.signal).catch(() => null);
  if (!found) return;
  const items = found.slice(0, 6).map((each) => {
    const item = document.createElement("li");
    item.append(button(sentence(each), () => {
      $("prompt").value = sentence(each);
      $("prompt").focus();
    }));
    return item;
  });
  $("suggestions").replaceChildren(...items);
  $("suggestions-label").hidden = !items.length;
}

// One or two edits.

function wrong() {
  const pair = [files["example-before"], files["example-after"]].filter(Boolean).length;
  if (!files.photo) return [text("noPhoto"), "photo"];
  if (pair === 1) return [text("noPair"), files["example-before"] ? "example-after" : "example-before"];
  if (!$("prompt").value.trim() && !pair) return [text("noPrompt"), "prompt"];
  if ($("compare").checked && !$("second").value.trim()) return [text("noSecond"), "second"];
  return null;
}

function fieldsOf(prompt, anyway) {
  const fields = [["image[]", files.photo], ["prompt", prompt], ["strength", $("strength").value], ["seed", $("seed").value || "0"]];
  if (files.reference) fields.push(["image[]", files.reference]);
  if (files["example-before"]) fields.push(["example_before", files["example-before"]], ["example_after", files["example-after"]]);
  if (anyway) fields.push(["allow_out_of_scope", "true"]);
  return [...fields, ["output_format", $("format").value]];
}

async function start(anyway = false) {
  const problem = wrong();
  if (problem) {
    complain(problem[0]);
    return $(problem[1]).focus();
  }
  running?.abort();
  const own = new AbortController();
  running = own;
  busy(true);
  say(text("sending"));
  const began = performance.now();
  const before = files.photo;
  const inputs = $("compare").checked ? [$("prompt"), $("second")] : [$("prompt")];
  const states = inputs.map(() => ({ share: 0 }));
  const made = inputs.map(async (input, at) => {
    const prompt = input.value.trim();
    const result = await edit(fieldsOf(prompt, anyway), own.signal, (kind, done, total) => {
      states[at] = { kind, ahead: done, share: kind === "editing" ? done / total : 0 };
      report(states);
    }).catch((error) => {
      error.field ??= input;
      throw error;
    });
    states[at] = { share: 1 };
    report(states);
    return { before, after: result.blob, prompt, about: { ...result.about, strength: $("strength").value }, name: before.name };
  });
  try {
    const results = await Promise.all(made);
    if (running !== own) return;
    shown = results;
    drawCards();
    say(text("done", ((performance.now() - began) / 1000).toFixed(1)));
    await keep(results);
  } catch (error) {
    own.abort(); // of two edits, the other one stops, too
    if (running !== own) return;
    if (error.name === "AbortError") say(text("stopped"));
    else {
      say("");
      await explain(error, error.field);
    }
  } finally {
    await Promise.allSettled(made);
    if (running === own) busy(false);
  }
}

/** Say how far the first of the edits is that are not done; one that runs goes before one that waits. */
function report(states) {
  const ahead = states.filter((each) => each.kind === "queued").map((each) => each.ahead);
  if (states.some((each) => each.kind === "editing")) say(text("editing"));
  else if (ahead.length) say(text("queued", Math.min(...ahead)));
  $("progress").value = states.reduce((sum, each) => sum + each.share, 0) / states.length;
}

function busy(is) {
  const focused = document.activeElement;
  if (!is) running = null;
  $("run").disabled = is;
  $("stop").hidden = $("progress").hidden = !is;
  $("results").setAttribute("aria-busy", String(is));
  if (is) $("error").hidden = true;
  $("progress").value = 0;
  if (is && focused === $("run")) $("stop").focus(); // a button that goes must not take the focus with it
  if (!is && focused === $("stop")) $("run").focus();
}

// Pictures that come back.

function drawCards() {
  links.forEach(URL.revokeObjectURL);
  links = [];
  $("no-results").hidden = shown.length > 0;
  $("results").replaceChildren(...shown.map(card));
}

function linked(blob, kept) {
  const url = URL.createObjectURL(blob);
  kept.push(url);
  return url;
}

function card(result) {
  const made = $("card").content.cloneNode(true).firstElementChild;
  const find = (selector) => made.querySelector(selector);
  const words = result.prompt || text("byExample");
  find("h3").textContent = words;
  find(".before").alt = text("before");
  find(".after").alt = text("after", words);
  find(".before").addEventListener("error", (event) => (event.target.hidden = true)); // a format that only the service reads
  find(".before").src = linked(result.before, links);
  find(".after").src = linked(result.after, links);
  const slider = find("input");
  const show = (share) => find(".viewer").style.setProperty("--at", `${share}%`);
  const moved = () => {
    show(slider.value);
    slider.setAttribute("aria-valuetext", text("sliderValue", slider.value));
  };
  slider.setAttribute("aria-label", `${text("slider")}: ${words}`);
  slider.addEventListener("input", moved);
  moved();
  find(".note").textContent = [
    text("understood", result.about.edit?.replaceAll("_", " ") ?? words, result.about.strength, result.about.seed),
    ...shownBy(result.about),
  ].join(" ");
  const hold = find(".hold");
  hold.textContent = text("hold");
  for (const name of ["pointerdown", "keydown"]) {
    hold.addEventListener(name, (event) => {
      if (name === "pointerdown" || event.key === " " || event.key === "Enter") show(100);
    });
  }
  for (const name of ["pointerup", "pointerleave", "pointercancel", "keyup", "blur"]) hold.addEventListener(name, moved);
  const link = find(".download");
  link.textContent = text("download");
  link.href = find(".after").src;
  link.download = fileName(result);
  find(".use").textContent = text("use");
  find(".use").addEventListener("click", () => use(result));
  return made;
}

/** Say how far the example of a result is understood, if it has one. */
function shownBy({ example }) {
  if (!example) return [];
  const share = text("reproduced", Math.round(100 * Math.max(0, example.reproduced)));
  return example.partly ? [share, text("partly")] : [share];
}

function fileName(result) {
  return `${result.name.replace(/\.[^.]*$/, "")}.edited.${result.after.type.split("/")[1].replace("jpeg", "jpg")}`;
}

function use(result) {
  take("photo", new File([result.after], fileName(result), { type: result.after.type }));
  $("prompt").focus();
}

// History.

async function keep(results) {
  try {
    for (const result of results) await history.add(result);
  } catch {
    return void (document.querySelector("#history-section .note").textContent = text("noHistory"));
  }
  await drawHistory();
}

async function drawHistory() {
  const entries = await history.entries().catch(() => []);
  historyLinks.forEach(URL.revokeObjectURL);
  historyLinks = [];
  $("history-clear").hidden = !entries.length;
  $("history").replaceChildren(...entries.map(past));
}

function past(entry) {
  const item = document.createElement("li");
  const words = entry.prompt || text("byExample");
  const open = button("", () => {
    shown = [entry];
    drawCards();
    $("results-title").focus();
  });
  open.className = "open";
  open.setAttribute("aria-label", text("open", words));
  const picture = document.createElement("img");
  picture.src = linked(entry.thumbnail, historyLinks);
  picture.alt = "";
  open.append(picture, words);
  const row = document.createElement("div");
  row.className = "row";
  const remove = button(text("remove"), async () => {
    await history.remove(entry.id);
    await drawHistory();
    $("history-title").focus();
  });
  const again = button(text("use"), () => use(entry));
  again.setAttribute("aria-label", `${text("use")}: ${words}`);
  remove.setAttribute("aria-label", `${text("remove")}: ${words}`);
  row.append(again, remove);
  item.append(open, row);
  return item;
}

// The start.

async function learn() {
  const found = await models().catch((error) => {
    explain(error, $("prompt"));
    return [];
  });
  $("example").hidden = found[0]?.reads_examples !== true;
  await suggest();
}

listenForPictures();
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  start();
});
$("stop").addEventListener("click", () => running?.abort());
$("compare").addEventListener("change", () => ($("second-field").hidden = !$("compare").checked));
$("strength").addEventListener("input", () => ($("strength-value").value = Number($("strength").value).toFixed(1)));
$("example-clear").addEventListener("click", () => ["example-before", "example-after"].forEach(leave));
$("reference-clear").addEventListener("click", () => leave("reference"));
$("key").value = key.get();
$("key").addEventListener("change", () => {
  key.set($("key").value.trim());
  $("error").hidden = true;
  learn();
});
let typing = 0;
$("prompt").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(suggest, 250);
});
$("language").addEventListener("click", () => {
  language = language === "zh" ? "en" : "zh";
  localStorage.setItem("openwu-language", language);
  speak();
});
$("history-clear").addEventListener("click", async () => {
  await history.clear();
  await drawHistory();
  $("history-title").focus();
});
speak();
learn();
