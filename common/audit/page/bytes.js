// Bytes, hashes and signatures. WebCrypto computes all of them.

/** What is wrong, with what was expected and what was found. `where` names a file of the bundle. */
class Fault extends Error {
  constructor(what, expected = "", found = "", where = "") {
    super(what + (expected || found ? `: expected ${expected}, found ${found}` : ""));
    Object.assign(this, { what, expected: String(expected), found: String(found), where });
  }
}

const utf8 = (text) => new TextEncoder().encode(text);
const HEX = Array.from({ length: 256 }, (_, byte) => byte.toString(16).padStart(2, "0"));

function hex(bytes) {
  let text = "";
  for (const byte of bytes) text += HEX[byte];
  return text;
}

const unhex = (text) => Uint8Array.from({ length: text.length / 2 }, (_, at) => parseInt(text.slice(2 * at, 2 * at + 2), 16));
const equalBytes = (a, b) => a.length === b.length && a.every((byte, at) => byte === b[at]);

function joined(...parts) {
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

const singleBytes = new TextDecoder("latin1");

/** Text of bytes, one character each. Only ASCII is the same in every browser, and what is read must be ASCII. */
const latin = (bytes) => singleBytes.decode(bytes);

// Browsers before 2025 have no base64 of bytes, but one of strings, which is slower.
const encodeBase64 = Uint8Array.prototype.toBase64 ? (bytes) => bytes.toBase64() : (bytes) => btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
const looseBase64 = Uint8Array.fromBase64 ? (text) => Uint8Array.fromBase64(text) : (text) => Uint8Array.from(atob(text), (each) => each.charCodeAt(0));

/** Decode standard base64 (RFC 4648, section 4). Every form but the canonical one is refused. */
function decodeBase64(text, what) {
  let bytes;
  try {
    bytes = looseBase64(text);
  } catch {
    throw new Fault(what, "base64", "other characters");
  }
  if (encodeBase64(bytes) !== text) throw new Fault(what, "canonical base64", "another form");
  return bytes;
}

const sha256 = async (bytes) => new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
const digestOf = async (bytes) => "sha256:" + hex(await sha256(bytes));

// Ed25519 points of small order. Under such a key, one signature is valid for many messages.
const WEAK = new Set([
  "00".repeat(32),
  "01" + "00".repeat(31),
  "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
  "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
  "ec" + "ff".repeat(30) + "7f",
  "ed" + "ff".repeat(30) + "7f",
  "ee" + "ff".repeat(30) + "7f",
]);

/** Whether a public key in hexadecimal is such a point; either sign. */
function isWeak(key) {
  return WEAK.has(key.slice(0, 62) + HEX[parseInt(key.slice(62), 16) & 0x7f]);
}

const importedKeys = new Map();

/** Whether an Ed25519 signature (RFC 8032) over a message matches. The key is in hexadecimal. */
async function signedBy(key, signature, message) {
  if (!importedKeys.has(key)) {
    importedKeys.set(key, crypto.subtle.importKey("raw", unhex(key), { name: "Ed25519" }, false, ["verify"]));
  }
  try {
    return await crypto.subtle.verify({ name: "Ed25519" }, await importedKeys.get(key), signature, message);
  } catch {
    return false; // not a point of the curve
  }
}

/** Whether this browser has what the page needs. */
async function canVerify() {
  try {
    await crypto.subtle.importKey("raw", unhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"),
      { name: "Ed25519" }, false, ["verify"]);
    return true;
  } catch {
    return false;
  }
}

/** Canonical JSON (RFC 8785). ECMAScript's own numbers and strings are the canonical ones. */
function canonical(value) {
  if (Array.isArray(value)) return `[${value.map(canonical).join(",")}]`;
  if (value !== null && typeof value === "object") {
    return `{${Object.keys(value).sort().map((key) => `${JSON.stringify(key)}:${canonical(value[key])}`).join(",")}}`;
  }
  return JSON.stringify(value) ?? "undefined";
}

const same = (a, b) => canonical(a) === canonical(b);

function expectEqual(what, expected, found) {
  if (!same(expected, found)) throw new Fault(what, shown(expected), shown(found));
}

/** A value as text for a message. */
function shown(value) {
  const text = typeof value === "string" ? value : canonical(value);
  return text.length > 300 ? text.slice(0, 297) + "..." : text;
}
