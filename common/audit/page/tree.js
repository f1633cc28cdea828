// The Merkle tree of RFC 6962, and the files of C2SP tlog-tiles that hold it.

const leafHash = (leaf) => sha256(joined(Uint8Array.of(0), leaf));
const nodeHash = (left, right) => sha256(joined(Uint8Array.of(1), left, right));
const log2 = (count) => 31 - Math.clz32(count);

/** All hashes of a tree: `levels[L][N]` is over leaves N * 2^L to (N + 1) * 2^L, exclusive. */
class Tree {
  static async of(leaves) {
    const tree = new Tree();
    tree.levels = [leaves];
    tree.size = leaves.length;
    tree.roots = new Map();
    for (let row = leaves; row.length > 1; tree.levels.push(row)) {
      const below = row;
      row = await Promise.all(Array.from({ length: below.length >> 1 }, (_, n) => nodeHash(below[2 * n], below[2 * n + 1])));
    }
    return tree;
  }

  /** The root of the tree of the first `size` leaves (RFC 6962, section 2.1). */
  rootAt(size) {
    if (!this.roots.has(size)) this.roots.set(size, size ? this.over(0, size) : sha256(new Uint8Array()));
    return this.roots.get(size);
  }

  /** The root over leaves low to high, a subtree of RFC 6962: perfect subtrees, folded from the right. */
  async over(low, high) {
    const parts = [];
    while (low < high) {
      const level = log2(high - low);
      parts.push(this.levels[level][low / 2 ** level]);
      low += 2 ** level;
    }
    let root = parts.pop();
    while (parts.length) root = await nodeHash(parts.pop(), root);
    return root;
  }

  /** The inclusion proof of a leaf (RFC 6962, section 2.1.1), from its sibling up. */
  async inclusion(index) {
    const path = [];
    let [low, high] = [0, this.size];
    while (high - low > 1) {
      const middle = low + 2 ** log2(high - low - 1);
      path.unshift(index < middle ? this.over(middle, high) : this.over(low, middle));
      if (index < middle) high = middle;
      else low = middle;
    }
    return Promise.all(path);
  }
}

const WIDTH = 256;

/** A file of the log: up to 256 hashes of level 8L, or, where `level` is null, up to 256 leaves. */
function tilePath({ level, number, width }) {
  let path = String(number % 1000).padStart(3, "0");
  for (let rest = Math.floor(number / 1000); rest; rest = Math.floor(rest / 1000)) {
    path = `x${String(rest % 1000).padStart(3, "0")}/${path}`;
  }
  return `tile/${level ?? "entries"}/${path}${width === WIDTH ? "" : `.p/${width}`}`;
}

/** Read the path of a tile. Each has exactly one; null if it is none. */
function parseTile(path) {
  const match = /^tile\/(entries|0|[1-9][0-9]?)\/((?:x[0-9]{3}\/)*[0-9]{3})(?:\.p\/([1-9][0-9]{0,2}))?$/.exec(path);
  if (!match) return null;
  const level = match[1] === "entries" ? null : Number(match[1]);
  const tile = { level, number: Number(match[2].replace(/[x/]/g, "")), width: Number(match[3] ?? WIDTH) };
  return tilePath(tile) === path && (level ?? 0) <= 63 ? tile : null;
}

function* tileRow(level, count) {
  const full = Math.floor(count / WIDTH);
  for (let number = 0; number < full; number++) yield { level, number, width: WIDTH };
  if (count % WIDTH) yield { level, number: full, width: count % WIDTH };
}

/** Every file of a log of `size` leaves but the checkpoint. */
function* tilesOf(size) {
  yield* tileRow(null, size);
  for (let level = 0, count = size; count; level++, count = Math.floor(count / WIDTH)) yield* tileRow(level, count);
}

/** Take a bundle of leaves apart: each is behind its length in two bytes. */
function readEntries(tile, data) {
  const leaves = [];
  for (let at = 0; at < data.length && leaves.length <= tile.width; ) {
    const end = at + 2 + data[at] * 256 + data[at + 1];
    if (!(end > at + 2 && end <= data.length)) {
      throw new Fault(`the log file ${tilePath(tile)}: leaf ${leaves.length} in it is empty or cut off`);
    }
    leaves.push(data.subarray(at + 2, end));
    at = end;
  }
  if (leaves.length !== tile.width) {
    throw new Fault(`the log file ${tilePath(tile)}`, `${tile.width} leaves`, `${leaves.length} or more`);
  }
  return leaves;
}

function entryBytes(leaves) {
  return joined(...leaves.flatMap((leaf) => [Uint8Array.of(leaf.length >> 8, leaf.length & 255), leaf]));
}

/** The hashes of all leaves as the tiles of level 0 state them; null if one is missing or damaged. */
function statedHashes(files, size) {
  const hashes = [];
  for (const tile of tileRow(0, size)) {
    const data = files.get(tilePath(tile));
    if (!data || data.length !== 32 * tile.width) return null;
    for (let at = 0; at < data.length; at += 32) hashes.push(data.subarray(at, at + 32));
  }
  return hashes;
}
