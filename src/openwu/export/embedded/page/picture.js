// Pixels, noise and tiles; the same as openwu/backbones/embedded/{network,condition,guarantees,scale,base}.py and
// openwu/export/embedded/tiles.py.

const ROWS_AT_ONCE = 128;

// Mersenne Twister, seeded as torch's generator is.
class Random {
  constructor(seed) {
    this.state = new Uint32Array(624);
    this.state[0] = seed >>> 0;
    for (let i = 1; i < 624; i++) {
      const before = this.state[i - 1] ^ (this.state[i - 1] >>> 30);
      this.state[i] = Math.imul(1812433253, before) + i;
    }
    this.next = 624;
  }

  bits() {
    const s = this.state;
    if (this.next === 624) {
      for (let i = 0; i < 624; i++) {
        const y = (s[i] & 0x80000000) | (s[(i + 1) % 624] & 0x7fffffff);
        s[i] = s[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      this.next = 0;
    }
    let y = s[this.next++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }

  uniform() {
    return (this.bits() & 0xffffff) / 0x1000000;
  }

  // Standard normal numbers as torch.randn draws 16 and more of them.
  normal(values) {
    for (let i = 0; i < values.length; i++) values[i] = this.uniform();
    for (let i = 0; i + 16 <= values.length; i += 16) boxMuller(values, i);
    if (values.length % 16) {
      const last = values.length - 16;
      for (let i = last; i < values.length; i++) values[i] = this.uniform();
      boxMuller(values, last);
    }
  }
}

function boxMuller(values, at) {
  for (let i = at; i < at + 8; i++) {
    const radius = Math.sqrt(-2 * Math.log(1 - values[i]));
    const angle = 2 * Math.PI * values[i + 8];
    values[i] = radius * Math.cos(angle);
    values[i + 8] = radius * Math.sin(angle);
  }
}

// Round to float16, as the noise is kept.
function toHalf(values) {
  const bits = new Uint32Array(values.buffer, values.byteOffset, values.length);
  for (let i = 0; i < values.length; i++) {
    if (Math.abs(values[i]) < 2 ** -14) values[i] = halfEven(values[i] * 2 ** 24) / 2 ** 24;
    else bits[i] = (bits[i] + 0xfff + ((bits[i] >>> 13) & 1)) & ~0x1fff;
  }
}

export function halfEven(value) {
  const floor = Math.floor(value);
  const rest = value - floor;
  return rest < 0.5 || (rest === 0.5 && floor % 2 === 0) ? floor : floor + 1;
}

// Noise [h, w], the same for one seed and size, and the same as Python's but for rounding.
export function noisePlane(width, height, seed) {
  const plane = new Float32Array(width * height);
  const random = new Random(seed);
  for (let top = 0; top < height; top += ROWS_AT_ONCE) {
    random.normal(plane.subarray(top * width, Math.min(height, top + ROWS_AT_ONCE) * width));
  }
  toHalf(plane);
  return plane;
}

// Every step-th pixel of an ImageData as floats [3, h, w]: what the condition is read from.
export function conditionView(image, side) {
  const step = Math.max(1, halfEven(Math.max(image.width, image.height) / side));
  const [height, width] = [Math.ceil(image.height / step), Math.ceil(image.width / step)];
  const values = new Float32Array(3 * height * width);
  for (let y = 0, at = 0; y < height; y++) {
    for (let x = 0; x < width; x++, at++) {
      const from = 4 * (y * step * image.width + x * step);
      for (let c = 0; c < 3; c++) values[c * height * width + at] = image.data[from + c] / 255;
    }
  }
  return { values, dims: [1, 3, height, width] };
}

// By how much a picture is reduced for an edit whose effect follows its size; 1 for none.
export function factorOf(edit, image, tables) {
  const side = tables.SIDES[edit];
  return side ? Math.max(1, halfEven(Math.max(image.width, image.height) / side)) : 1;
}

// Means of by x by pixels; at the far edges means of fewer.
export function reduced(image, by) {
  const [width, height] = [Math.ceil(image.width / by), Math.ceil(image.height / by)];
  const data = new Uint8ClampedArray(4 * width * height);
  for (let y = 0, at = 0; y < height; y++) {
    const bottom = Math.min((y + 1) * by, image.height);
    for (let x = 0; x < width; x++) {
      const right = Math.min((x + 1) * by, image.width);
      const count = (bottom - y * by) * (right - x * by);
      for (let c = 0; c < 4; c++, at++) {
        let sum = 0;
        for (let row = y * by; row < bottom; row++) {
          for (let column = x * by; column < right; column++) sum += image.data[4 * (row * image.width + column) + c];
        }
        data[at] = Math.floor((sum + Math.floor(count / 2)) / count);
      }
    }
  }
  return { width, height, data };
}

// The edit of a reduced picture at the size of the picture, by a cubic; transparency is the picture's.
// `small`: the reduced picture, for edits that leave detail: rows get as much of the picture's as they kept of its.
export function enlarged(edited, image, by, small = null, tables = null) {
  const columns = cubics(image.width, edited.width, by);
  const rows = cubics(image.height, edited.height, by);
  const wide = widened(edited, columns);
  const plain = small && widened(small, columns);
  const left = small && keptDetail(edited, small, tables);
  const data = new Uint8ClampedArray(image.data);
  for (let y = 0, at = 0; y < image.height; y++) {
    let kept = 0;
    if (left) for (const [row, weight] of rows[y]) kept += weight * left[row];
    kept = Math.min(1, Math.max(0, kept));
    for (let x = 0; x < image.width; x++, at += 4) {
      for (let c = 0; c < 3; c++) {
        let value = 0;
        for (const [row, weight] of rows[y]) {
          const from = 3 * (row * image.width + x) + c;
          value += weight * (plain ? wide[from] - kept * plain[from] : wide[from]);
        }
        if (plain) value += kept * image.data[at + c];
        data[at + c] = halfEven(Math.min(255, Math.max(0, value)));
      }
    }
  }
  return { width: image.width, height: image.height, data };
}

// A small picture as wide as the large one: [h', w, 3].
function widened(small, columns) {
  const wide = new Float32Array(3 * small.height * columns.length);
  for (let y = 0, at = 0; y < small.height; y++) {
    for (const taps of columns) {
      for (let c = 0; c < 3; c++, at++) {
        for (const [x, weight] of taps) wide[at] += weight * small.data[4 * (y * small.width + x) + c];
      }
    }
  }
  return wide;
}

// How much of its detail, steps between neighbours, every row of a reduced picture has after its edit, 0 to 1.
function keptDetail(edited, small, { ROWS, FLAT }) {
  const sums = Array.from({ length: small.height }, (_, y) => {
    const sum = { power: 0, common: 0 };
    for (let x = 1; x < small.width; x++) {
      for (let c = 0, at = 4 * (y * small.width + x); c < 3; c++, at++) {
        const step = (small.data[at] - small.data[at - 4]) / 255;
        sum.power += step * step;
        sum.common += (step * (edited.data[at] - edited.data[at - 4])) / 255;
      }
    }
    return sum;
  });
  const steps = Math.max(1, 3 * (small.width - 1));
  return sums.map((_, y) => {
    const near = sums.slice(Math.max(0, y - ROWS), y + ROWS + 1);
    const [power, common] = ["power", "common"].map((name) => near.reduce((total, each) => total + each[name], 0));
    const count = near.length * steps;
    return Math.min(1, Math.max(0, common / count / (power / count + FLAT)));
  });
}

// For each of `length` pixels the [place, weight] of those of `small` that it is made of, `by` times larger.
function cubics(length, small, by) {
  return Array.from({ length }, (_, i) => {
    const centre = (i + 0.5) / by;
    const [first, last] = [Math.max(0, Math.trunc(centre - 1.5)), Math.min(small, Math.trunc(centre + 2.5))];
    const taps = Array.from({ length: last - first }, (_, k) => [first + k, cubic(first + k + 0.5 - centre)]);
    const sum = taps.reduce((total, [, weight]) => total + weight, 0);
    return taps.map(([at, weight]) => [at, weight / sum]);
  });
}

function cubic(x) {
  const d = Math.abs(x);
  if (d < 1) return (1.5 * d - 2.5) * d * d + 1;
  return d < 2 ? ((-0.5 * d + 2.5) * d - 4) * d + 2 : 0;
}

// Rectangles [top, left, height, width]: the whole picture, or overlapping tiles row by row.
export function tilesOf(width, height, { whole, core, margin }) {
  if (width * height <= whole) return [[0, 0, height, width]];
  const spans = (side) => {
    const found = [];
    for (let start = 0; start < side; start += core) {
      const last = start + core + margin >= side;
      const first = Math.max(0, start - margin);
      found.push([first, (last ? side : start + core + margin) - first]);
      if (last) break;
    }
    return found;
  };
  return spans(height).flatMap(([top, h]) => spans(width).map(([left, w]) => [top, left, h, w]));
}

function ramp(start, length, side, margin) {
  const weights = new Float32Array(length).fill(1);
  const overlap = Math.min(2 * margin, length);
  const rise = (i) => (i + 0.5) / (2 * margin);
  for (let i = 0; i < overlap; i++) {
    if (start > 0) weights[i] = rise(i);
  }
  for (let i = 0; i < overlap; i++) {
    const at = length - overlap + i;
    if (start + length < side) weights[at] = Math.min(weights[at], rise(overlap - 1 - i));
  }
  return weights;
}

// Which source row (or column) every padded one shows: mirrored at the end, also more than once.
function mirrored(length, cell) {
  const index = Array.from({ length }, (_, i) => i);
  let missing = (cell - (length % cell)) % cell;
  while (missing) {
    const step = Math.min(missing, index.length - 1);
    const last = index.length - 1;
    for (let i = 1; i <= step; i++) index.push(index[last - i]);
    missing -= step;
  }
  return index;
}

// Picture and planes of a tile, [1, 3, H, W] each with H and W multiples of `cell`.
export function tileInputs(image, noise, [top, left, height, width], cell) {
  const rows = mirrored(height, cell);
  const columns = mirrored(width, cell);
  const area = rows.length * columns.length;
  const picture = new Float32Array(3 * area);
  const planes = new Float32Array(3 * area);
  let at = 0;
  for (const row of rows) {
    const y = Math.fround(Math.fround((2 * (top + row) + 1) / image.height) - 1);
    for (const column of columns) {
      const pixel = (top + row) * image.width + left + column;
      for (let c = 0; c < 3; c++) picture[c * area + at] = image.data[4 * pixel + c] / 255;
      planes[at] = noise[pixel];
      planes[area + at] = y;
      planes[2 * area + at] = Math.fround((2 * (left + column) + 1) / image.width) - 1;
      at++;
    }
  }
  return { picture, planes, dims: [1, 3, rows.length, columns.length] };
}

// Collects edited tiles of one picture.
export class Canvas {
  constructor(image, margin, single) {
    this.image = image;
    this.margin = single ? 0 : margin;
    this.sums = new Float32Array(3 * image.width * image.height);
  }

  // edited: [1, 3, H, W], of which the tile is the upper left part
  add([top, left, height, width], edited, [, , paddedHeight, paddedWidth]) {
    const { width: w, height: h } = this.image;
    const rows = ramp(top, height, h, this.margin);
    const columns = ramp(left, width, w, this.margin);
    for (let c = 0; c < 3; c++) {
      for (let y = 0; y < height; y++) {
        const from = (c * paddedHeight + y) * paddedWidth;
        const to = (c * h + top + y) * w + left;
        for (let x = 0; x < width; x++) this.sums[to + x] += rows[y] * columns[x] * edited[from + x];
      }
    }
  }

  // The picture with its new pixels; transparency stays.
  pixels() {
    const area = this.image.width * this.image.height;
    const data = new Uint8ClampedArray(this.image.data);
    for (let c = 0; c < 3; c++) {
      for (let i = 0; i < area; i++) {
        const value = this.sums[c * area + i];
        if (!Number.isFinite(value)) throw new Error("The result holds numbers that are not finite; ask for less.");
        data[4 * i + c] = halfEven(255 * Math.min(1, Math.max(0, value)));
      }
    }
    return { width: this.image.width, height: this.image.height, data };
  }
}

export function isGrey(image) {
  const { data } = image;
  for (let i = 0; i < data.length; i += 4) if (data[i] !== data[i + 1] || data[i] !== data[i + 2]) return false;
  return true;
}

// An edited picture with exact colours, and of the change what a number in the sentence and the strength ask for.
export function finished(before, after, wish, strength, tables) {
  const share = strength * wish.strength;
  const complete = tables._COMPLETE.includes(wish.reading.edit);
  const whole = guaranteed(after, wish.reading, isGrey(before), tables);
  return blended(before, whole, complete ? Math.min(share, 1) : share);
}

// What an edited picture has by construction: grey stays grey, black and white is neutral, sepia has one tone.
function guaranteed(image, reading, grey, tables) {
  const full = reading.degree !== "little";
  if (reading.edit === "sepia") return full ? toned(image, tables) : image;
  if (tables._COLOURING.includes(reading.edit)) return image;
  const neutral = grey || (reading.edit === "black_and_white" && full);
  return neutral && !isGrey(image) ? mapped(image, (r, g, b) => Array(3).fill(luma(r, g, b, tables.LUMA))) : image;
}

const luma = (r, g, b, weights) => weights[0] * r + weights[1] * g + weights[2] * b;

function toned(image, tables) {
  const tone = tables.SEPIA_TONE;
  const floor = tables.SEPIA_FLOOR;
  const unit = luma(...tone, tables.LUMA);
  return mapped(image, (r, g, b) => {
    const level = (luma(r, g, b, tables.LUMA) / 255 - floor) / unit;
    return tone.map((part) => 255 * (level * part + floor));
  });
}

function mapped(image, change) {
  const data = new Uint8ClampedArray(image.data);
  for (let i = 0; i < data.length; i += 4) {
    change(data[i], data[i + 1], data[i + 2]).forEach((value, c) => (data[i + c] = halfEven(Math.min(255, Math.max(0, value)))));
  }
  return { ...image, data };
}

// A share of the change that an edit made; above 1 more of it.
function blended(before, after, share) {
  if (share === 1) return after;
  const data = new Uint8ClampedArray(after.data);
  for (let i = 0; i < data.length; i++) {
    if (i % 4 < 3) data[i] = halfEven(Math.min(255, Math.max(0, before.data[i] + share * (after.data[i] - before.data[i]))));
  }
  return { ...after, data };
}
