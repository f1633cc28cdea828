// Signed notes, keys, checkpoints and policies (C2SP signed-note, tlog-cosignature, tlog-checkpoint, tlog-policy).
// A hybrid key signs a second line with ML-DSA-65. Here that line must be there, and its signature is not checked.

const LOG = 1, WITNESS = 4, ML_DSA_KEY = 1952, ML_DSA_SIGNATURE = 3309, MOST_SIGNERS = 100;
const HYBRID = new Map([
  [LOG, joined(Uint8Array.of(255), utf8("privet ed25519+ml-dsa-65 log\n"))],
  [WITNESS, joined(Uint8Array.of(255), utf8("privet ed25519+ml-dsa-65 cosignature\n"))],
]);
const MOST = 2 ** 53;

const keyId = async (name, material) => (await sha256(joined(utf8(name + "\n"), material))).subarray(0, 4);

function checkName(name) {
  if (!name || /[+\p{C}\p{Z}]/u.test(name)) throw new Fault("the name of a key", "printable characters without spaces and +", shown(name));
}

const parsedKeys = new Map();

/** Read a public key (vkey). Each is read once. */
function parseKey(text) {
  if (!parsedKeys.has(text)) parsedKeys.set(text, readKey(text));
  return parsedKeys.get(text);
}

async function readKey(text) {
  const match = /^([^+]+)\+([0-9a-f]{8})\+([A-Za-z0-9+/]+={0,2})$/.exec(text);
  if (!match) throw new Fault("a public key (vkey)", "name+id+base64", shown(text.slice(0, 80)));
  const name = match[1], material = decodeBase64(match[3], `public key (vkey) of ${name}`);
  checkName(name);
  let kind = material[0], key = material.subarray(1), pq = new Uint8Array();
  for (const [of, label] of HYBRID) {
    if (equalBytes(material.subarray(0, label.length), label) && material.length === label.length + 32 + ML_DSA_KEY) {
      [kind, key, pq] = [of, material.subarray(label.length, label.length + 32), material.subarray(label.length + 32)];
    }
  }
  if (![LOG, WITNESS].includes(kind) || key.length !== 32) {
    throw new Fault(`public key of ${name}`, "type 1 (log) or 4 (witness) and 32 bytes", `type ${kind} and ${key.length} bytes`);
  }
  const ids = [hex(await keyId(name, joined(Uint8Array.of(kind), key)))];
  if (pq.length) ids.push(hex(await keyId(name, material)));
  if (new Set(ids).size < ids.length) throw new Fault(`public key of ${name}: its two signatures have one id`);
  if (ids.at(-1) !== match[2]) throw new Fault(`public key (vkey) of ${name}: its id`, ids.at(-1), match[2]);
  return { name, kind, key, pq, ids, text, publics: pq.length ? [hex(key), hex(pq)] : [hex(key)] };
}

async function parseKeyOf(text, kind) {
  const key = await parseKey(text);
  if (key.kind !== kind) throw new Fault(`public key of ${key.name}`, `type ${kind}`, `type ${key.kind}`);
  return key;
}

/** Take a note apart without verifying it. Exactly the bytes that privet writes are read. */
function parseNote(data) {
  if (data.length > 1_000_000) throw new Fault("checkpoint", "at most 1000000 bytes", `${data.length}`);
  let whole;
  try {
    whole = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(data);
  } catch {
    throw new Fault("checkpoint", "text in UTF-8", "other bytes");
  }
  const cut = whole.lastIndexOf("\n\n");
  if (cut < 0 || cut + 2 >= whole.length || !whole.endsWith("\n")) {
    throw new Fault("checkpoint", "a text, an empty line and signature lines", "another form");
  }
  const text = whole.slice(0, cut + 1), lines = whole.slice(cut + 2).split("\n").slice(0, -1);
  if (/[\x00-\x09\x0b-\x1f]/.test(text)) throw new Fault("checkpoint: its text holds control characters");
  if (lines.length > 2 * MOST_SIGNERS) throw new Fault("checkpoint", `at most ${2 * MOST_SIGNERS} signatures`, lines.length);
  const signatures = lines.map(parseSignature);
  if (new Set(signatures.map((each) => `${each.name} ${each.id}`)).size !== signatures.length) {
    throw new Fault("checkpoint", "one signature by each key", "two");
  }
  return { text, signatures };
}

function parseSignature(line) {
  const match = /^\u2014 ([^ ]*) (.*)$/su.exec(line);
  if (!match) throw new Fault("checkpoint: a signature line", "an em dash, a name and base64", shown(line.slice(0, 80)));
  checkName(match[1]);
  const data = decodeBase64(match[2], `checkpoint: signature by ${match[1]}`);
  if (data.length < 5) throw new Fault(`checkpoint: signature by ${match[1]}`, "a key id and a signature", `${data.length} bytes`);
  return { name: match[1], id: hex(data.subarray(0, 4)), data: data.subarray(4) };
}

const cosignedAt = (signature) => new DataView(signature.data.buffer, signature.data.byteOffset, 8).getBigUint64(0);

/** Those of the keys that signed a note. A wrong Ed25519 signature by one of them refuses the whole note. */
async function signersOf(note, keys) {
  const known = new Map(keys.flatMap((key) => key.ids.map((id) => [`${key.name} ${id}`, key])));
  const found = new Map();
  for (const signature of note.signatures) {
    const key = known.get(`${signature.name} ${signature.id}`);
    if (!key) continue;
    await checkSignature(key, note.text, signature);
    if (!found.has(key)) found.set(key, []);
    found.get(key).push(signature);
  }
  for (const [key, lines] of found) {
    if (key.kind === WITNESS && new Set(lines.map(cosignedAt)).size > 1) {
      throw new Fault(`checkpoint: the two cosignatures by ${key.name} are of different times`);
    }
  }
  return [...found].filter(([key, lines]) => lines.length === key.ids.length).map(([key]) => key);
}

async function checkSignature(key, text, signature) {
  const second = signature.id !== key.ids[0], before = key.kind === LOG ? 0 : 8;
  const length = before + (second ? ML_DSA_SIGNATURE : 64);
  if (signature.data.length !== length) {
    throw new Fault(`checkpoint: the signature by ${key.name}`, `${length} bytes`, signature.data.length);
  }
  if (before && cosignedAt(signature) >= 2n ** 63n) throw new Fault(`checkpoint: the time of the cosignature by ${key.name} is too large`);
  if (isWeak(key.publics[0])) throw new Fault(`checkpoint: the key of ${key.name} is a weak one: it signs everything`);
  if (second) return;
  const message = before ? `cosignature/v1\ntime ${cosignedAt(signature)}\n${text}` : text;
  if (!(await signedBy(key.publics[0], signature.data.subarray(before), utf8(message)))) {
    throw new Fault(`checkpoint: the signature by ${key.name} does not match the text`);
  }
}

function parseNumber(text, what) {
  if (!/^(0|[1-9][0-9]{0,15})$/.test(text) || BigInt(text) > BigInt(MOST)) {
    throw new Fault(what, "a whole number up to 2^53 without leading zeros", shown(text.slice(0, 40)));
  }
  return Number(text);
}

/** Read the text of a checkpoint: the log's name, the number of leaves and the root hash. */
function parseHead(text) {
  const lines = text.split("\n");
  if (lines.length !== 4 || lines[3] || !lines[0]) throw new Fault("checkpoint: its text", "three lines", `${lines.length - 1}`);
  const root = decodeBase64(lines[2], "checkpoint: root");
  if (root.length !== 32) throw new Fault("checkpoint: root hash", "32 bytes", root.length);
  return { origin: lines[0], size: parseNumber(lines[1], "checkpoint: size"), root };
}

/** Read a checkpoint that the log with this key has signed. */
async function openHead(note, log) {
  if (!(await signersOf(note, [log])).length) {
    const others = note.signatures.filter((each) => each.name === log.name).map((each) => each.id);
    throw new Fault(`checkpoint: signatures by the log ${log.name}`, log.ids.join(" and "), others.join(" and ") || "none");
  }
  const head = parseHead(note.text);
  if (head.origin !== log.name) throw new Fault("checkpoint: name of the log", log.name, shown(head.origin));
  return head;
}

/** Check that q of n witnesses are more than half. */
function checkQuorum(witnesses, needed) {
  if (!(2 * needed - witnesses - 1 >= 0 && needed <= Math.min(witnesses, MOST_SIGNERS - 1))) {
    throw new Fault("quorum: number of witnesses that must cosign",
      `more than half of ${witnesses}, and at most ${Math.min(witnesses, MOST_SIGNERS - 1)}`, needed);
  }
}

/** Read a policy file: the log, its witnesses, one group of them, and the quorum. */
async function parsePolicy(text) {
  const words = { log: 1, witness: 2, group: 2, quorum: 1 };
  const found = { log: [], witness: [], group: [], quorum: [] };
  for (const [number, line] of text.split(/\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]/).entries()) {
    const [keyword, ...rest] = line.trim().split(/\s+/);
    if (!keyword || keyword.startsWith("#")) continue;
    const expected = Object.hasOwn(words, keyword) ? words[keyword] : -1;
    if (!(rest.length === expected || (keyword === "group" && rest.length > expected))
      || (keyword === "quorum" && !found.group.length)) {
      throw new Fault(`policy: line ${number + 1}`, "log KEY, witness NAME KEY, group NAME NUMBER WITNESS... or quorum GROUP", "another line");
    }
    found[keyword].push(rest);
  }
  for (const keyword of ["log", "group", "quorum"]) {
    if (found[keyword].length !== 1) throw new Fault(`policy: lines that begin with ${keyword}`, 1, found[keyword].length);
  }
  const keys = new Map(found.witness), [[name, needed, ...members]] = found.group;
  if (keys.size !== found.witness.length || !same([...members].sort(), [...keys.keys()].sort())) {
    throw new Fault("policy: the group line must name each witness of the file once, and no other");
  }
  if (found.quorum[0][0] !== name) throw new Fault("policy: group of the quorum line", shown(name), shown(found.quorum[0][0]));
  const log = await parseKeyOf(found.log[0][0], LOG), witnesses = [];
  for (const key of keys.values()) witnesses.push(await parseKeyOf(key, WITNESS));
  const publics = [log, ...witnesses].flatMap((key) => key.publics);
  if (new Set(publics).size !== publics.length || new Set(witnesses.map((key) => key.name)).size !== witnesses.length) {
    throw new Fault("policy: each name and each key must appear once");
  }
  const policy = { log, witnesses, needed: parseNumber(needed, "policy: number of the group") };
  checkQuorum(witnesses.length, policy.needed);
  return policy;
}

/** The twelve words that stand for some bytes (96 bits of SHA-256). */
async function wordsOf(bytes) {
  const sum = await sha256(joined(utf8("privet-words/1\u0000"), bytes));
  return Array.from(sum.subarray(0, 12), (byte) => PRIVET.words[byte]).join(" ");
}
