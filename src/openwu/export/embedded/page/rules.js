// What a sentence asks for: the same rules as openwu/backbones/embedded/words/*.py and ../catalogue.py.
// Their patterns and tables come from rules.json, which the export writes; only the order of the steps is here.

import { likeliestEdits, stands } from "./whole.js";

export class Refusal extends Error {}

// An instruction that may ask for one of several edits, or for all of them.
class Unclear extends Refusal {
  // edits: those that it may ask for
  constructor(message, edits) {
    super(message);
    this.edits = edits;
  }
}

const PUNCTUATION = " ,.;:!?，。；：！？";
const has = (table, key) => Object.hasOwn(table, key);

export function strip(text, characters) {
  if (characters === undefined) return text.trim();
  let start = 0;
  let end = text.length;
  while (start < end && characters.includes(text[start])) start++;
  while (end > start && characters.includes(text[end - 1])) end--;
  return text.slice(start, end);
}

const spaced = (text) => text.split(/\s+/u).filter(Boolean).join(" ");
const isChinese = (text) => /[一-鿿]/u.test(text);
const isAscii = (text) => /^[\x00-\x7f]*$/.test(text);
const plain = (edit) => edit.replaceAll("_", " ");
const removeSuffix = (text, suffix) => (text.endsWith(suffix) ? text.slice(0, -suffix.length) : text);

// Every {pattern, flags} of a table becomes a RegExp; lists of words become sets where sets are asked for.
function compiled(value) {
  if (Array.isArray(value)) return value.map(compiled);
  if (value !== null && typeof value === "object") {
    if (typeof value.pattern === "string") return new RegExp(value.pattern, value.flags);
    return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, compiled(each)]));
  }
  return value;
}

const fullmatch = (pattern, text) => new RegExp(`^(?:${pattern.source})$`, pattern.flags).exec(text);
const match = (pattern, text) => new RegExp(`^(?:${pattern.source})`, pattern.flags).exec(text);
const all = (pattern) => new RegExp(pattern.source, pattern.flags + "g");

export class Rules {
  // tables: rules.json; examples: known_edits.json; labels: the encoder's; accepted: probability from which it is sure;
  // encode: async sentences -> readings {edit, probability, degree, ranked}; places: async sentence -> probabilities of
  // labels at each place, by the sentence reader; null without one
  constructor(tables, examples, labels, accepted, encode, places = null) {
    Object.assign(this, compiled(tables));
    this.places = places;
    this.examples = examples;
    this.labels = labels;
    this.accepted = accepted;
    this.encode = encode;
    this.outOfScope = this.wishes.OUT_OF_SCOPE;
    this.certain = this.wishes.CERTAIN;
    this.isRegion = new RegExp(`(?<![\\p{L}\\p{N}_])${this.restrictions.REGION}(?![\\p{L}\\p{N}_])`, "iu");
  }

  isWish(reading, probability = this.certain) {
    return reading.edit !== this.outOfScope && reading.probability >= probability;
  }

  // The wishes of a sentence, in order; throws a Refusal for what no sub-task serves in full.
  async understand(instruction, hasReference) {
    const text = checkInstruction(instruction);
    const found = await this.readWishes(text);
    for (const wish of found) {
      if (!this.isWish(wish.reading, wish.settled ? 0 : this.accepted)) throw this.refusal(wish.text, wish.reading);
      if (this.examples[wish.reading.edit]?.withdrawn) {
        const edit = plain(wish.reading.edit);
        throw new Refusal(`“${wish.text}” asks for ${edit}, which this model does too badly to offer it.`);
      }
      if (!hasReference && this.examples[wish.reading.edit]?.reference) {
        throw new Refusal(`“${wish.text}” asks for the look of a second picture; add one.`);
      }
    }
    return found;
  }

  // What each sentence is taken for: by the encoder, or as a complaint, a name or a single word.
  async read(sentences) {
    const readings = await this.encode(sentences);
    for (const [index, sentence] of sentences.entries()) {
      const text = this.instead(sentence, readings[index]);
      if (text === null) continue;
      const [reading] = await this.encode([text]);
      if (this.isWish(reading, this.accepted)) readings[index] = { ...reading, sentence: text };
    }
    return readings;
  }

  // Wishes by rules and cuts, and by the sentence reader where that is surer.
  async readWishes(text) {
    let [found, unclear] = [[], null];
    try {
      found = await this.wishesOf(text);
    } catch (error) {
      if (!(error instanceof Unclear)) throw error;
      unclear = error;
    }
    if (this.places !== null) {
      const edits = unclear === null ? found.map((each) => each.reading.edit) : unclear.edits;
      const sure = unclear === null && found.every((each) => this.isWish(each.reading, this.accepted));
      const [clear, guessed] = sure ? [edits, []] : [[], edits];
      const negated = this.whole.NEGATES.test(text);
      const said = negated && clear.length ? this.affirmed(text) : text;
      const none = { edits: [], probability: 0 };
      const whole = said ? likeliestEdits(await this.places(said), this.whole, this.outOfScope) : none;
      const given = { guessed, negated, cured: found.some((each) => each.reading.sentence) };
      const withdrawn = (edit) => Boolean(this.examples[edit]?.withdrawn);
      const standing = stands(whole, clear, withdrawn, given, { ...this.whole, REPAIRS: this.wishes.REPAIRS });
      const taken = standing === "whole" ? await this.wishesOfWhole(whole, said) : null;
      if (taken !== null) return taken;
      if (standing !== "parts") {
        const [one, other] = [clear, whole.edits].map((edits) => edits.map(plain).join(" and "));
        const meant = one ? `${one}, or ${other || "none"}` : other;
        throw new Unclear(`This may ask for ${meant}, and it is not clear which; say it in other words.`, [
          ...clear,
          ...whole.edits,
        ]);
      }
    }
    if (unclear !== null) throw unclear;
    return found;
  }

  // A sentence without the clauses that may say what is not to be done; "" where all of them may.
  affirmed(sentence) {
    const clauses = sentence.split(this.wishes.CLAUSES).map((clause) => clause.split(this.whole.BESIDE)[0].trim());
    const { EXCESS, NEGATES } = this.whole;
    return clauses.filter((clause) => clause && (!NEGATES.test(clause) || EXCESS.test(clause))).join(", ");
  }

  async wishesOfWhole(whole, sentence) {
    const parts = await this.partsOf(whole.edits, sentence);
    const found = [];
    for (const [at, edit] of whole.edits.entries()) found.push(await this.wholeWish(edit, parts[at], whole));
    return this.amount(sentence) === null || found.some((each) => each.number) ? found : null;
  }

  async partsOf(edits, sentence) {
    if (edits.length === 1) return [sentence];
    const every = edits.length === 2 ? this.cutsOf(sentence) : [];
    const sides = [...new Set(every.flatMap((cut) => [cut.left, cut.right]))];
    const readings = new Map((sides.length ? await this.read(sides) : []).map((each, at) => [sides[at], each]));
    let [best, parts] = [0, edits.map(() => "")];
    const shareOf = (side, edit) => readings.get(side).ranked.find(([label]) => label === edit)?.[1] ?? 0;
    for (const { left, right } of every) {
      const score = shareOf(left, edits[0]) * shareOf(right, edits[1]);
      if (score > best) [best, parts] = [score, [left, right]];
    }
    return parts;
  }

  async wholeWish(edit, part, whole) {
    const reading = part ? (await this.read([part]))[0] : null;
    if (reading?.edit === edit && this.isWish(reading, this.cuts.SIDE)) {
      const own = await this.withNumber(part, reading);
      if (own.reading.edit === edit) {
        const probability = Math.max(own.reading.probability, whole.probability);
        return { ...own, reading: { ...own.reading, probability }, settled: true };
      }
    }
    const language = isChinese(part) ? "zh" : "en";
    let said = this.phrase(edit, language);
    const frame = this.whole.FRAMES[reading?.degree]?.[language];
    let again = null;
    if (frame !== undefined) {
      const framed = frame.replace("{}", said);
      [again] = await this.read([framed]);
      if (again.edit === edit) said = framed;
      else again = null;
    }
    again ??= (await this.read([said]))[0];
    const amount = this.amounts.MEASURED.includes(edit) ? this.amount(part) : null;
    const usable = amount !== null && (!amount.stops || this.amounts.LIGHT.includes(edit));
    const strength = usable ? this.strengthOf(amount, edit) : 1;
    const settled = { ...again, edit, probability: whole.probability, sentence: said };
    return { ...asWish(said, settled, strength, usable ? amount.text : ""), settled: true };
  }

  async wishesOf(sentence) {
    this.checkLanguage(sentence);
    this.checkRequest(sentence);
    this.checkAmounts(sentence);
    const instruction = await this.withoutIdle(sentence);
    let [whole] = await this.read([instruction]);
    if (whole.sentence) return [asWish(instruction, whole)];
    let text = await this.withoutNegations(instruction, whole);
    text = await this.withoutRestrictions(text);
    if (text !== instruction) [whole] = await this.read([text]);
    const several = (await this.several(text, whole)) ?? (await this.byCuts(text, whole));
    const found = several ?? [await this.withNumber(text, whole)];
    for (const [pattern, edits] of this.restrictions.DENIED) {
      const said = pattern.exec(instruction);
      if (said && found.some((each) => edits.includes(each.reading.edit))) throw onlyDenied(said[0].trim(), edits[0]);
    }
    return found;
  }

  // A sentence without what it does not ask for: what is not wanted, what is good as it is, how it was taken, how far.
  async withoutIdle(instruction) {
    const { REJECTED, CONTENT, TOLD, UNWANTED, LIMIT } = this.restrictions;
    for (const pattern of [REJECTED, CONTENT, TOLD, UNWANTED, LIMIT]) {
      const sure = pattern === CONTENT ? this.certain : this.accepted;
      const rest = instruction.replace(all(pattern), pattern === LIMIT ? ", but not too much" : " ").trim();
      if (!rest || rest === instruction.trim() || (pattern === TOLD && !this.isCommand(rest))) continue;
      if (this.isWish((await this.read([rest]))[0], sure)) instruction = rest;
    }
    return instruction;
  }

  // Languages

  checkLanguage(instruction) {
    const language = this.language._SCRIPTS.test(instruction) ? "a language with another script" : this.foreign(instruction);
    if (language) throw new Refusal(`Expected English or Chinese, got ${language}.`);
  }

  checkRequest(instruction) {
    if (this.language._NO_REQUEST.some((pattern) => pattern.test(instruction.trim()))) {
      throw new Refusal("This reads as a question or another matter, not as an edit of this picture; say what shall become of it.");
    }
  }

  checkAmounts(sentence) {
    for (const pattern of [this.amounts._SIGNED, this.amounts._FACTOR]) {
      const found = pattern.exec(sentence);
      if (found) throw new Refusal(`Expected an amount in words, such as “30% less saturation”, got “${found[0].trim()}”.`);
    }
  }

  foreign(instruction) {
    const words = instruction.toLowerCase().match(all(this.language._WORDS)) ?? [];
    let [best, most] = [null, 0];
    for (const [language, listed] of Object.entries(this.language._FUNCTION_WORDS)) {
      const own = new Set(listed.split(" "));
      const count = (test) => words.filter(test).length;
      const english = (word) => this.language._ENGLISH.includes(word) && !own.has(word);
      const found = count((word) => own.has(word)) - 2 * count(english);
      if (found > most) [best, most] = [language, found];
    }
    return most >= 2 ? best : null;
  }

  // Complaints, names and single words

  instead(sentence, reading) {
    const clear = this.isWish(reading, this.accepted);
    const cure = this.cures(sentence);
    let edit = null;
    if (cure.length) {
      edit = clear && cure.includes(reading.edit) ? null : (cure.find((each) => this.labels.includes(each)) ?? null);
    } else if (!clear) {
      const word = this.singleWord(sentence);
      edit = this.named(sentence) ?? (this.labels.includes(word) ? word : null);
    }
    return edit === null ? null : this.phrase(edit, isChinese(sentence) ? "zh" : "en");
  }

  phrase(edit, language) {
    return has(this.examples, edit) ? this.examples[edit][language] : plain(edit);
  }

  named(instruction) {
    const lower = instruction.toLowerCase().replaceAll("-", " ").replaceAll("_", " ");
    const words = strip(removeSuffix(lower, "please"), " .!,");
    return this.labels.find((name) => plain(name) === words && has(this.examples, name)) ?? null;
  }

  singleWord(sentence) {
    const word = removeSuffix(strip(sentence, " .,!?。，！？").toLowerCase(), " please");
    return has(this.complaints._WORDS, word) ? this.complaints._WORDS[word] : null;
  }

  cures(sentence) {
    let text = strip(sentence, " .,!?。，！？~～…");
    for (let turn = 0; turn < 2; turn++) text = text.replace(all(this.complaints._POLITE), "").trim();
    const english = this.englishCure(spaced(text.toLowerCase()));
    return english.length ? english : this.chineseCure(text);
  }

  englishCure(text) {
    const c = this.complaints;
    const of = (table, word) => (has(table, word) ? table[word] : []);
    if (c._UNWANTED.includes(text)) return c._TOO[text];
    if (fullmatch(c._OFF_EN, text)) return c._BALANCED;
    let found = fullmatch(c._MUCH_EN, text);
    if (found) return of(c._MUCH, found.groups.word);
    found = fullmatch(c._LITTLE_EN, text);
    if (found) return of(c._LITTLE, found.groups.noun || found.groups.word || found.groups.lack);
    for (const pattern of c._MADE_EN) {
      found = fullmatch(pattern, text);
      const goal = found ? of(c._GOAL, found.groups.goal) : [];
      const made = found ? of(c._TOO, found.groups.fault).filter((edit) => goal.includes(edit)) : [];
      if (made.length) return made;
      if (found && c._STATES.includes(found.groups.fault) && has(c._BECOME, found.groups.goal)) return c._BECOME[found.groups.goal];
    }
    const known = [[c._NOT_SO_EN, Object.keys(c._TOO)], [c._TOO_EN, Object.keys(c._TOO)], [c._IS_EN, c._FAULTY]];
    for (const [pattern, words] of known) {
      found = fullmatch(pattern, text);
      if (found && words.includes(found.groups.word)) return of(c._TOO, found.groups.word);
      const both = found ? found.groups.word.split(" and ") : [];
      if (both.length === 2 && both.every((word) => words.includes(word))) {
        return of(c._TOO, both[0]).filter((edit) => of(c._TOO, both[1]).includes(edit));
      }
    }
    return [];
  }

  chineseCure(text) {
    const c = this.complaints;
    for (const [pattern, cure] of c._PATTERNS_ZH) if (fullmatch(pattern, text)) return cure;
    let found = fullmatch(c._MUCH_ZH, text);
    if (found) return c._NOUN_ZH[found.groups.noun][0];
    found = fullmatch(c._LITTLE_ZH, text);
    if (found) return c._NOUN_ZH[found.groups.noun || found.groups.lack][1];
    found = fullmatch(c._NOT_ENOUGH_IN_ZH, text);
    if (found && has(c._NOT_ENOUGH_ZH, found.groups.word)) return c._NOT_ENOUGH_ZH[found.groups.word];
    found = fullmatch(c._TOO_IN_ZH, text);
    return found && has(c._TOO_ZH, found.groups.word) ? c._TOO_ZH[found.groups.word] : [];
  }

  // Negations

  isCommand(text) {
    return Boolean(match(this.wishes._COMMAND, text)) && !this.wishes._NO_COMMAND.test(text);
  }

  negated(clause) {
    const found = match(this.wishes._NEGATED_EN, clause) ?? match(this.wishes._NEGATED_ZH, clause);
    const rest = found ? found.groups.rest.trim() : "";
    return rest && !this.wishes._COMPLAINT.test(rest) ? rest : null;
  }

  async withoutNegations(instruction, whole) {
    const clauses = instruction.split(this.wishes.CLAUSES).map((clause) => this.trimmed(clause)).filter(Boolean);
    const rests = clauses.map((clause) => this.negated(clause));
    const negated = rests.filter((rest) => rest !== null);
    if (!negated.length) return instruction;
    const others = clauses.filter((_, index) => rests[index] === null);
    const alone = !others.length && !/^(?:not|no)(?![\p{L}\p{N}_])(?! too(?![\p{L}\p{N}_]))/iu.test(clauses[0]);
    const readings = await this.read(negated);
    const unwanted = readings.filter((reading) => this.isWish(reading, 0.5)).map((reading) => reading.edit);
    const left = others.join(", ");
    if (left && (unwanted.includes(whole.edit) || !this.isWish(whole, this.accepted))) {
      const [wanted] = await this.read([left]);
      if (this.isWish(wanted, this.accepted) && !unwanted.includes(wanted.edit)) return left;
    }
    const found = (others.length ? await this.read(others) : []).map((reading) => reading.edit);
    for (const [index, reading] of readings.entries()) {
      const repaired = found.includes(whole.edit) || this.wishes.REPAIRS.includes(whole.edit);
      const ignored = reading.edit === whole.edit && !repaired;
      if (this.isWish(reading, 0.5) && (ignored || (alone && this.isCommand(negated[index])))) {
        throw onlyDenied(negated[index], reading.edit);
      }
    }
    return instruction;
  }

  // Restrictions

  async withoutRestrictions(instruction) {
    const [whole] = await this.read([instruction]);
    const local = this.restrictions.LOCAL.includes(whole.edit) && this.isWish(whole, this.accepted);
    for (const pattern of this.restrictions.PARTS) {
      const found = local ? null : pattern.exec(instruction);
      if (found) this.refusePart(whole, found[0]);
    }
    for (const pattern of this.restrictions.KEEPING) {
      const found = pattern.exec(instruction);
      if (!found) continue;
      const end = found.index + found[0].length;
      const left = this.trimmed(instruction.slice(0, found.index) + instruction.slice(end));
      let [wanted] = await this.read([left || "$"]);
      const sure = this.isWish(whole, this.accepted);
      if (!this.isWish(wanted, sure ? Math.max(this.certain, this.accepted) : this.accepted)) wanted = whole;
      if (local && this.restrictions.LOCAL.includes(wanted.edit)) continue;
      const kept = this.restrictions.KEEPS.find(([test]) => test.test(found.groups.kept));
      const changed = kept ? kept[1] : null;
      const part = changed !== null && !changed.length && this.isRegion.test(left);
      if (part || changed === null || changed.includes(wanted.edit)) this.refusePart(wanted, found[0]);
      else if (wanted.edit !== whole.edit || !sure) return wanted !== whole ? left : instruction;
    }
    return instruction;
  }

  refusePart(whole, found) {
    if (this.restrictions.LOCAL.includes(whole.edit)) return;
    throw new Refusal(
      `This asks for a part of the picture, or to spare one (“${found.trim()}”), but this model edits whole pictures.`,
    );
  }

  // Several wishes

  async several(instruction, whole) {
    const w = this.wishes;
    const pieces = this.pieces(instruction);
    if (pieces.length === 1) return null;
    const later = pieces.slice(1);
    const explicit = later.some(([, word]) => word === "then" || word === "and");
    if (later.some(([text, word]) => word === "," && match(w._COMPARATIVE, text))) return null;
    const texts = await this.withVerbs(this.withContent(pieces.map(([text]) => text)));
    const readings = await this.read(texts);
    const found = [];
    for (const [index, text] of texts.entries()) found.push(await this.withNumber(text, readings[index]));
    const clear = found.filter((each) => this.isWish(each.reading, this.accepted));
    const edits = new Set(clear.map((each) => each.reading.edit));
    const sure = this.isWish(whole, this.accepted);
    if (edits.size === found.length && found.length <= w.MOST_WISHES && found.every((each) => this.standsAlone(each))) {
      return edits.has(whole.edit) || !sure ? found : null;
    }
    const parts = this.joinedParts(found, later.some(([, word]) => word === "then"));
    if (parts && (!sure || parts.some((each) => each.reading.edit === whole.edit))) {
      const missing = found.find((each) => this.isLost(each, parts.map((part) => part.reading.edit)));
      if (missing) throw this.notUnderstood(parts[0], missing);
      return parts;
    }
    const lost = found.filter(
      ({ text, reading }) =>
        this.isCommand(text) &&
        !match(w._COMPARATIVE, text) &&
        (whole.edit === this.outOfScope ||
          (reading.ranked.find(([label]) => label === whole.edit)?.[1] ?? 0) < w._SAME_WISH) &&
        ((reading.edit === this.outOfScope && reading.probability >= this.certain) ||
          (explicit && !this.isWish(reading, this.accepted))),
    );
    const wanted = clear.filter((each) => this.standsAlone(each));
    const shown = !sure || wanted.some((each) => each.reading.edit === whole.edit);
    if (lost.length && wanted.length && shown && !this.restrictions.LOCAL.includes(whole.edit)) {
      throw this.notUnderstood(wanted[0], lost[0]);
    }
    return null;
  }

  // Whether a part is a command for something else than the edits that were found.
  isLost({ text, reading }, edits) {
    const said = reading.ranked.some(([label, chance]) => edits.includes(label) && chance >= this.wishes._SAME_WISH);
    return !said && this.isCommand(text) && !match(this.wishes._COMPARATIVE, text);
  }

  notUnderstood(wanted, lost) {
    return new Refusal(`This asks for more than ${plain(wanted.reading.edit)}, but “${lost.text}” was not understood; leave it out.`);
  }

  // Parts that name edits without commanding them; null for fewer than two.
  joinedParts(found, ordered) {
    const j = this.joined;
    const chance = (part, edit) => part.reading.ranked.find(([label]) => label === edit)?.[1] ?? 0;
    const same = (one, other) =>
      one.reading.edit === other.reading.edit ||
      chance(one, other.reading.edit) >= j._SAME ||
      chance(other, one.reading.edit) >= j._SAME;
    const wishes = [];
    for (const part of found) {
      const counts = this.isWish(part.reading, j.SURE) && (ordered || this.counts(part));
      if (counts && !wishes.some((each) => same(part, each))) wishes.push(part);
    }
    const edits = wishes.map((each) => each.reading.edit);
    const oneWish = !ordered && this.near(edits);
    return wishes.length >= 2 && wishes.length <= j._MOST && !oneWish ? wishes : null;
  }

  counts(part) {
    const j = this.joined;
    const word = isAscii(part.text) && spaced(part.text).split(" ").length < 2;
    if (fullmatch(j.POINTS_BACK, part.text) || (word && (part.reading.sentence || !this.standsAlone(part)))) return false;
    return Boolean(part.reading.sentence) || !(j.DESCRIBES.test(part.text) || j.DENIES.test(part.text));
  }

  // Wishes whose parts no rule tells apart, by the learned judge of cuts; null for one wish.
  // `inner`: for the side of a cut, which is cut again only where that is clear.
  async byCuts(text, whole, inner = false) {
    const judged = await this.judge(text, whole);
    if (judged === null || judged.sides.some(({ side }) => this.negated(side) !== null)) return null;
    const c = this.cuts;
    const alike = this.near(judged.sides.map(({ reading }) => reading.edit));
    const [bar, possible] = alike ? [c.CLEAR_NEAR, c.POSSIBLE_NEAR] : [c.CLEAR, c.POSSIBLE];
    if (judged.probability < (inner ? bar : possible)) return null;
    const found = [];
    for (const { side, part, reading } of judged.sides) {
      const [again] = await this.read([side]);
      const more = (await this.several(side, again)) ?? (await this.byCuts(side, again, true));
      found.push(...(more ?? [await this.withNumber(part, reading)]));
    }
    const clear = judged.probability >= bar && found.every((each) => this.isWish(each.reading, this.accepted));
    const [left, right] = judged.sides.map(({ part }) => part);
    const repeated = this.cures(left).length && !this.cures(right).length && !this.isCommand(right);
    if (!clear || repeated || found.length > this.wishes.MOST_WISHES) {
      const named = found.map((each) => `${plain(each.reading.edit)} (“${each.text}”)`).join(" and ");
      throw new Unclear(`This may ask for more than one edit, ${named}, and it is not clear which; ask for one of them.`,
        found.map((each) => each.reading.edit),
      );
    }
    return found.filter((each, at) => found.findIndex((other) => other.reading.edit === each.reading.edit) === at);
  }

  // The likeliest cut between two wishes and the probability of two; null where no cut has two different edits.
  async judge(text, whole) {
    const cuts = this.cutsOf(text);
    const texts = [...new Set(cuts.flatMap((cut) => [cut.left, cut.leftClause, cut.right, cut.rightClause]))];
    const readings = new Map((texts.length ? await this.read(texts) : []).map((each, at) => [texts[at], each]));
    const sure = (side) => this.likeliest(readings.get(side))[1];
    let [best, most, total] = [null, -Infinity, 0];
    for (const cut of cuts) {
      const left = sure(cut.leftClause) > sure(cut.left) ? cut.leftClause : cut.left;
      const right = sure(cut.rightClause) > sure(cut.right) ? cut.rightClause : cut.right;
      const numbers = this.cutNumbers(cut, whole, readings.get(left), readings.get(right));
      if (numbers === null) continue;
      const score = this.cutScore(cut, numbers);
      total += Math.exp(Math.min(score, 30));
      if (Math.min(score, 30) <= most) continue;
      most = Math.min(score, 30);
      const sides = [
        { side: cut.left, part: left, reading: readings.get(left) },
        { side: cut.right, part: right, reading: readings.get(right) },
      ];
      best = { sides };
    }
    return best && { ...best, probability: total / (1 + total) };
  }

  cutsOf(sentence) {
    const c = this.cuts;
    const spans = [...sentence.matchAll(all(c._TOKEN))].map((found) => [found.index, found.index + found[0].length]);
    const without = (joining, side) => strip(side.replace(joining, ""), c.MARKS) || side;
    const words = (side) => side.toLowerCase().replaceAll("’", "'").match(all(c._WORD)) ?? [];
    const found = new Map();
    for (let at = 1; at < spans.length; at++) {
      const [before, after] = [sentence.slice(0, spans[at - 1][1]), sentence.slice(spans[at][0])];
      const left = without(c._TRAILING, strip(before, c.MARKS));
      const right = without(c._LEADING, strip(after, c.MARKS));
      const key = JSON.stringify([left, right]);
      if (!c._LETTER.test(left) || !c._LETTER.test(right) || found.has(key)) continue;
      const leftClause = strip(left.split(c._CLAUSE).at(-1), c.MARKS) || left;
      const rightClause = strip(right.split(c._CLAUSE)[0], c.MARKS) || right;
      const mark = [before.at(-1), after[0]].find((each) => c._CLAUSE.test(each)) ?? "";
      found.set(key, { left, right, leftClause, rightClause, before: words(before), after: words(after), mark });
    }
    return [...found.values()];
  }

  likeliest(reading) {
    return reading.ranked.find(([label]) => label !== this.outOfScope);
  }

  // What the readings and the rules' patterns say of a cut; null where its sides name no two different edits.
  cutNumbers(cut, whole, left, right) {
    const [c, j] = [this.cuts, this.joined];
    const [[one, sureOne], [other, sureOther]] = [this.likeliest(left), this.likeliest(right)];
    if (one === other || Math.min(sureOne, sureOther) < c.SIDE) return null;
    const logit = (probability) => {
      const bounded = Math.min(Math.max(probability, c.LIMIT), 1 - c.LIMIT);
      return Math.log(bounded / (1 - bounded)) / c.LOGIT_SCALE;
    };
    const of = (reading, edit) => logit(reading.ranked.find(([label]) => label === edit)?.[1] ?? 0);
    const [likeliest, sure] = this.likeliest(whole);
    const [first, second] = [logit(sureOne), logit(sureOther)];
    const crossed = [of(right, one), of(left, other)];
    const shown = [of(whole, one), of(whole, other)];
    const lengths = [cut.before.length, cut.after.length];
    const numbers = [1, first, second, Math.min(first, second)];
    numbers.push(...[left, right, whole].map((reading) => of(reading, this.outOfScope)));
    numbers.push(...shown, Math.min(...shown), logit(sure), likeliest === one, likeliest === other);
    numbers.push(...crossed, Math.max(...crossed), this.near([one, other]));
    numbers.push(...lengths.map((length) => Math.log(Math.max(1, length))), ...lengths.map((length) => length < 2));
    numbers.push(isChinese(cut.left + cut.right), Boolean(left.sentence), Boolean(right.sentence));
    const sides = [cut.left, cut.right];
    for (const pattern of [j.DESCRIBES, j.DENIES]) numbers.push(...sides.map((side) => pattern.test(side)));
    numbers.push(...sides.map((side) => Boolean(fullmatch(j.POINTS_BACK, side))));
    return numbers.map(Number);
  }

  cutScore(cut, numbers) {
    const { numbers: weights, words } = this.cuts.MODEL;
    const found = this.cutPhrases(cut).map((each) => (has(words, each) ? words[each] : 0));
    const linear = numbers.reduce((sum, number, at) => sum + weights[at] * number, 0);
    return linear + (this.cuts.PHRASE_FACTOR * found.reduce((sum, each) => sum + each, 0)) / Math.sqrt(found.length);
  }

  // What the linear model knows the words around a cut by.
  cutPhrases({ before, after, left, right, mark }) {
    const chinese = isChinese(left + right);
    const found = new Set([`mark ${mark}`, `last ${before.slice(-1).join(" ")}`, `next ${after.slice(0, 1).join(" ")}`]);
    found.add(`last two ${before.slice(-2).join(" ")}`).add(`next two ${after.slice(0, 2).join(" ")}`);
    for (const [side, words] of [["before", before], ["after", after]]) {
      for (const [at, word] of words.entries()) {
        found.add(`${side} ${word}`);
        if (chinese && at) found.add(`${side} ${words[at - 1]}${word}`);
      }
    }
    return [...found].map((each) => `${chinese ? "z" : "e"} ${each}`);
  }

  // Whether people often name some of these edits together when they ask for one of them.
  near(edits) {
    return this.joined.NEAR.some((together) => edits.filter((edit) => together.includes(edit)).length > 1);
  }

  standsAlone(wish) {
    const name = wish.text.toLowerCase() === plain(wish.reading.edit);
    return this.isCommand(wish.text) || Boolean(wish.reading.sentence) || name;
  }

  async withVerbs(pieces) {
    let verb = "";
    const whole = [];
    for (let piece of pieces) {
      if (/^(?:up|down) the /i.test(piece)) piece = `turn ${piece}`;
      const found = match(this.wishes._VERB_OF, piece);
      const made = verb.toLowerCase() !== "make" || match(this.wishes._MADE, piece);
      const shares = made && !match(this.wishes._TELLS, piece);
      if (verb && !this.isCommand(piece) && spaced(piece).split(" ").length <= this.wishes._SHORT && shares) {
        const [reading] = await this.read([`${verb} ${piece}`]);
        if (this.isWish(reading, Math.max(this.certain, this.accepted))) piece = `${verb} ${piece}`;
      }
      if (found) verb = found.groups.verb;
      whole.push(piece);
    }
    return whole;
  }

  // [piece, what stands before it: "then", "and" or ","] of a sentence, fixed phrases left whole.
  pieces(instruction) {
    const fixed = [...instruction.matchAll(all(this.wishes._FIXED))].map((each) => [each.index, each.index + each[0].length]);
    const found = [];
    let [start, word, verb] = [0, "", ""];
    for (const each of instruction.matchAll(all(this.wishes._SPLIT))) {
      if (fixed.some(([begin, end]) => begin <= each.index && each.index < end)) continue;
      const piece = this.trimmed(instruction.slice(start, each.index));
      if (piece) {
        found.push([verb + piece, word]);
        verb = each.groups.adding ? "add " : "";
        word = each.groups.then ? "then" : strip(each[0], " ,，、") ? "and" : ",";
      }
      start = each.index + each[0].length;
    }
    const piece = this.trimmed(instruction.slice(start));
    if (piece) found.push([verb + piece, word]);
    return found;
  }

  trimmed(piece) {
    return strip(piece.replace(all(this.wishes._FIRST), ""), PUNCTUATION);
  }

  withContent(pieces) {
    const left = pieces.filter((piece) => !fullmatch(this.wishes._EMPTY, piece));
    return left.length ? left : pieces;
  }

  // Numbers

  async withNumber(text, reading) {
    const amount = this.amount(text);
    if (amount === null) return asWish(text, reading);
    const [without] = await this.read([amount.plain || "$"]);
    const light = !amount.stops || this.amounts.LIGHT.includes(without.edit);
    const measurable = this.isWish(without, this.accepted) && light;
    const other = reading.edit !== without.edit && !this.amounts.MEASURED.includes(without.edit);
    if (this.isWish(reading, this.accepted) && (other || !measurable)) return asWish(text, reading);
    if (!measurable) {
      return asWish(text, { ...reading, probability: Math.min(reading.probability, without.probability) });
    }
    return asWish(amount.plain, without, this.strengthOf(amount, without.edit), amount.text);
  }

  amount(sentence) {
    const a = this.amounts;
    let found = a._PERCENT.exec(sentence);
    if (found) {
      const value = found.groups.value ? Number(found.groups.value) : this.chineseNumber(found.groups.zh);
      const absolute = Boolean(found.groups.to);
      return { text: found[0].trim(), plain: without(sentence, found), value: value / 100, stops: false, absolute };
    }
    found = a._STOPS.exec(sentence);
    if (!found) return null;
    const written = spaced(found.groups.value.toLowerCase());
    const value = has(a._NAMED, written) ? a._NAMED[written] : Number(written);
    return { text: found[0].trim(), plain: without(sentence, found), value, stops: true, absolute: false };
  }

  strengthOf(amount, edit) {
    const a = this.amounts;
    const full = has(a._FULL, edit) ? a._FULL[edit] : 1;
    let share = amount.value;
    if (amount.stops) {
      const ratio = 2 ** (amount.value / 2.2);
      share = edit === "brighten" ? ratio - 1 : 1 - 1 / ratio;
    } else if (amount.absolute && has(a._FULL, edit)) {
      share = a._FALLING.includes(edit) ? 1 - share : share - 1;
    }
    const strength = share / full;
    if (!(strength > 0 && strength <= a.MAX_STRENGTH)) {
      const most = Math.trunc(100 * a.MAX_STRENGTH * full);
      throw new Refusal(`“${amount.text}” is out of range for ${plain(edit)}: expected a change of up to ${most}%.`);
    }
    return strength;
  }

  chineseNumber(text) {
    if (isAscii(text)) return Number(text);
    if (text === "百" || text === "一百") return 100;
    const digit = (character) => this.amounts._DIGITS[character] ?? 0;
    const ten = text.lastIndexOf("十");
    if (ten < 0) return Number([...text].map(digit).join(""));
    const [tens, ones] = [text.slice(0, ten), text.slice(ten + 1)];
    return 10 * (tens ? (this.amounts._DIGITS[tens] ?? 1) : 1) + (ones ? digit(ones) : 0);
  }

  // Refusals that name known edits

  refusal(instruction, reading) {
    const offered = reading.ranked.filter(([label]) => label !== this.outOfScope && !this.examples[label]?.withdrawn);
    const labels = offered.map(([label]) => label);
    const likely = offered.filter(([, probability]) => probability >= this.catalogue._LIKELY).map(([label]) => label);
    const alike = this.alike(instruction, labels).filter(([, score]) => score >= this.catalogue._ALIKE);
    const near = [...new Set([...likely.slice(0, 2), ...alike.map(([name]) => name), ...likely])];
    const percent = (share) => `${Math.round(100 * share)}%`;
    const head =
      reading.edit === this.outOfScope
        ? `This model does not know how to “${instruction}”.`
        : `“${instruction}” was not understood (${plain(reading.edit)} at ${percent(reading.probability)}, ` +
          `expected ${percent(this.accepted)}).`;
    const language = isChinese(instruction) ? "zh" : "en";
    const shown = near.slice(0, this.catalogue.NEAREST).map((name) => `${plain(name)} (“${this.phrase(name, language)}”)`);
    return new Refusal(shown.length ? `${head} The nearest edits it knows: ${shown.join(", ")}.` : head);
  }

  alike(text, names) {
    const own = this.wordGrams(text);
    const score = (name) => {
      const { en, zh } = this.examples[name] ?? {};
      return Math.max(...[plain(name), en, zh].filter(Boolean).map((each) => overlap(own, this.wordGrams(each))));
    };
    return names.map((name) => [name, score(name)]).sort((one, other) => other[1] - one[1]);
  }

  // How often each n-gram occurs: letter trigrams of English content words, Chinese characters in pairs.
  wordGrams(text) {
    const pieces = [];
    for (const word of spaced(text.toLowerCase()).split(" ")) {
      if (!isAscii(word) || this.catalogue._STOP.includes(word)) continue;
      const marked = `<${strip(word, ".,!?")}>`;
      for (let at = 0; at + 3 <= marked.length; at++) pieces.push(marked.slice(at, at + 3));
    }
    let chinese = (text.match(/[一-鿿]/gu) ?? []).join("");
    for (const filler of ["照片", "图片", "一下", "效果", "一点", "帮我"]) chinese = chinese.replaceAll(filler, "");
    for (let at = 0; at + 2 <= chinese.length; at++) pieces.push(chinese.slice(at, at + 2));
    if (chinese.length === 1) pieces.push(chinese);
    const counts = new Map();
    for (const piece of pieces) counts.set(piece, (counts.get(piece) ?? 0) + 1);
    return counts;
  }
}

function onlyDenied(said, edit) {
  return new Refusal(`This says what not to do (“${said}” reads as ${plain(edit)}); say what to do.`);
}

// number: as it was written; empty for none
function asWish(text, reading, strength = 1, number = "") {
  return { text: reading.sentence || text, reading, strength, number, settled: false };
}

function without(sentence, found) {
  const rest = spaced(`${sentence.slice(0, found.index)} ${sentence.slice(found.index + found[0].length)}`);
  return isAscii(sentence) ? rest : rest.replaceAll(" ", "");
}

function overlap(one, other) {
  const size = (counts) => [...counts.values()].reduce((sum, count) => sum + count, 0);
  const [first, second] = [size(one), size(other)];
  let shared = 0;
  for (const [piece, count] of one) shared += Math.min(count, other.get(piece) ?? 0);
  return shared ? (shared / Math.min(first, second) + (2 * shared) / (first + second)) / 2 : 0;
}

const MAX_LENGTH = 500;

// The instruction with single spaces, in NFC; a Refusal for what is no text.
export function checkInstruction(instruction) {
  const visible = [...spaced(instruction)].filter((each) => !/\p{Cf}/u.test(each) || "\u200c\u200d".includes(each));
  const text = spaced(visible.join("")).normalize("NFC");
  if (/[\p{Cc}\p{Cs}]/u.test(text)) throw new Refusal("Expected text without control characters.");
  if (!text) throw new Refusal("Say what to change in the picture.");
  if ([...text].length > MAX_LENGTH) throw new Refusal(`Expected at most ${MAX_LENGTH} characters; shorten it.`);
  if (!/\p{L}/u.test(text)) throw new Refusal(`Expected words, got “${text.slice(0, 20)}”.`);
  return text;
}
