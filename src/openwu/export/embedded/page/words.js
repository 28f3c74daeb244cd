// Sentences -> rows of the tables of instruction encoder and sentence reader; the same as
// openwu/backbones/embedded/instruction.py and sentence.py.

const utf8 = new TextEncoder();
const CRC = Uint32Array.from({ length: 256 }, (_, byte) => {
  for (let bit = 0; bit < 8; bit++) byte = byte & 1 ? 0xedb88320 ^ (byte >>> 1) : byte >>> 1;
  return byte >>> 0;
});

export function crc32(text) {
  let sum = 0xffffffff;
  for (const byte of utf8.encode(text)) sum = CRC[(sum ^ byte) & 255] ^ (sum >>> 8);
  return (sum ^ 0xffffffff) >>> 0;
}

const isAscii = (text) => /^[\x00-\x7f]*$/.test(text);

export class Words {
  // tables: the constants of instruction.py; config: the encoder's sizes
  constructor(tables, config) {
    this.word = new RegExp(tables._WORD.pattern, tables._WORD.flags + "g");
    this.marks = new RegExp(tables._MARKS.pattern, tables._MARKS.flags + "g");
    this.config = config;
  }

  // Lower-case English words, single Chinese characters, single marks.
  split(sentence) {
    return sentence.toLowerCase().replace(this.marks, "").match(this.word) ?? [];
  }

  // A word and its letter n-grams (3 to 5); a Chinese character: the pair with the next.
  grams(words, at) {
    const word = words[at];
    if (!isAscii(word)) return [word, word + (words[at + 1] ?? "$")];
    const marked = [...`<${word}>`];
    const grams = [`=${word}`];
    for (const size of [3, 4, 5]) {
      for (let start = 0; start + size <= marked.length; start++) grams.push(marked.slice(start, start + size).join(""));
    }
    return grams;
  }

  // Rows of the table for one sentence: { rows: BigInt64Array, dims: [1, words, grams] }, 0 where there is nothing.
  // sizes: of which table, the encoder's where none are given.
  rows(sentence, sizes = this.config) {
    const { max_words: most, max_grams: widestAllowed, buckets } = sizes;
    let words = this.split(sentence).slice(0, most);
    if (!words.length) words = ["$"];
    const hashed = words.map((_, at) =>
      this.grams(words, at).slice(0, widestAllowed).map((gram) => 1 + (crc32(gram) % (buckets - 1))),
    );
    const widest = Math.max(...hashed.map((row) => row.length));
    const rows = new BigInt64Array(words.length * widest);
    hashed.forEach((row, t) => row.forEach((index, g) => (rows[t * widest + g] = BigInt(index))));
    return { rows, dims: [1, words.length, widest] };
  }

  // Words, groups to four, gapped pairs and letter n-grams (2 to 5): what the linear reader knows a sentence by.
  phrasesOf(words) {
    const found = new Set();
    for (const size of [1, 2, 3, 4]) {
      for (let at = 0; at + size <= words.length; at++) found.add(`${size}${words.slice(at, at + size).join(" ")}`);
    }
    for (let at = 0; at + 2 < words.length; at++) found.add(`s${words[at]} ${words[at + 2]}`);
    for (const word of words) {
      if (word.length <= 2 || !isAscii(word)) continue;
      const marked = `<${word}>`;
      for (const size of [2, 3, 4, 5]) {
        for (let at = 0; at + size <= marked.length; at++) found.add(marked.slice(at, at + size));
      }
    }
    return [...found];
  }

  // Rows of the phrase table for one sentence, in any order: { rows: BigInt64Array, dims: [1, phrases] }.
  phraseRows(sentence) {
    const phrases = this.phrasesOf(this.split(sentence).slice(0, this.config.max_words));
    const rows = new BigInt64Array(Math.max(1, phrases.length));
    phrases.forEach((each, m) => (rows[m] = BigInt(1 + (crc32(each) % (this.config.phrase_buckets - 1)))));
    return { rows, dims: [1, rows.length] };
  }
}
