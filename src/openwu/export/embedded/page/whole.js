// What the sentence reader makes of a whole sentence, and whether that stands in place of what was read by parts; the
// same as openwu/backbones/embedded/words/whole.py, whose constants are the table.

// places: [[label, share], ...] of every place -> { edits, probability }
export function likeliestEdits(places, { ALIKE, NOTHING }, outOfScope) {
  const edits = [];
  let probability = 1;
  for (const place of places) {
    const [label] = place.reduce((best, each) => (each[1] > best[1] ? each : best));
    const alike = new Set([label, ...ALIKE.filter((together) => together.includes(label)).flat()]);
    probability *= Math.min(1, place.reduce((sum, [name, share]) => (alike.has(name) ? sum + share : sum), 0));
    if (label === NOTHING || label === outOfScope) break;
    if (!edits.includes(label)) edits.push(label);
  }
  return { edits, probability };
}

// Whether two answers name the same edits, in any order; edits of which either is right are the same.
export function same(one, other, { ALIKE }) {
  const left = [...other];
  const alike = (a, b) => a === b || ALIKE.some((together) => together.includes(a) && together.includes(b));
  for (const edit of one) {
    const at = left.findIndex((each) => alike(edit, each));
    if (at < 0) return false;
    left.splice(at, 1);
  }
  return !left.length;
}

// "whole", "parts" or "neither"; found: the edits by rules and cuts, none where nothing is clear; negated: whether the
// sentence may say what is not to be done, of which the whole then read the other clauses alone, where something was
// found; cured: whether a rule read a complaint or a name;
// guessed: what rules and cuts found without being clear
export function stands(whole, found, isWithdrawn, { guessed, negated, cured }, table) {
  const { edits, probability } = whole;
  if ([...edits, ...found].some(isWithdrawn)) return "parts";
  const among = (some, others) => some.every((one) => others.some((other) => same([one], [other], table)));
  if (!found.length) {
    const bar = guessed.length && edits.length > 1 && among(guessed, edits) ? table.AGREED : table.TAKEN;
    return edits.length && probability >= bar ? "whole" : "parts";
  }
  if (same(found, edits, table)) return "parts";
  if (negated) {
    // What was found beyond the clauses that deny nothing is the repair that a denial names, or what it forbids.
    const more = among(found, edits);
    if (!edits.length || probability < (more ? table.MORE : table.OTHER)) return "parts";
    if (more || !found.some((edit) => table.REPAIRS.includes(edit) && !among([edit], edits))) return "whole";
    return among(edits, found) ? "parts" : "neither";
  }
  const within = (fewer, more) => fewer.length < more.length && among(fewer, more);
  if (within(found, edits)) return probability >= table.MORE ? "whole" : "parts";
  if (cured || (edits.length && within(edits, found))) return "parts";
  if (edits.length && probability >= table.OTHER) return "whole";
  return probability >= table.DOUBT ? "neither" : "parts";
}
