// Leaves: DSSE envelopes of in-toto statements. `PRIVET.schema` is made from the classes of privet itself.

const PAYLOAD_TYPE = "application/vnd.in-toto+json";
const ENVELOPE = new RegExp(
  '^\\{"payload":"([A-Za-z0-9+/]+={0,2})","payloadType":"application/vnd\\.in-toto\\+json","signatures":\\[' +
  '\\{"keyid":"([0-9a-f]{64})","sig":"([A-Za-z0-9+/]{86}==)"\\}' +
  '(?:,\\{"keyid":"mldsa65:([0-9a-f]{64})","sig":"[A-Za-z0-9+/]{4412}"\\})?\\]\\}$');
const MOST_LEAF_BYTES = 65_535;

/**
 * Take an envelope apart. Exactly one form is read, so nobody but the signer can vary a byte. The letters of a signature
 * with ML-DSA-65 stand for 3,309 bytes without a rest, so they have one form, and need no decoding here.
 */
function parseEnvelope(data) {
  const match = data.length <= MOST_LEAF_BYTES ? ENVELOPE.exec(latin(data)) : null;
  if (!match) throw new Fault("the leaf", "a signed envelope (DSSE) in canonical form", "other bytes");
  const [, payload, key, signature, second] = match;
  return {
    payload: decodeBase64(payload, "envelope: payload"),
    key,
    signature: decodeBase64(signature, "envelope: signature"),
    second: second ?? null,
  };
}

/** DSSE's pre-authentication encoding. */
function preAuthentication(payload) {
  return joined(utf8(`DSSEv1 ${PAYLOAD_TYPE.length} ${PAYLOAD_TYPE} ${payload.length} `), payload);
}

async function checkAuthor(envelope) {
  if (isWeak(envelope.key)) throw new Fault(`the key ${envelope.key.slice(0, 16)} of a statement is a weak one: it signs everything`);
  if (!(await signedBy(envelope.key, envelope.signature, preAuthentication(envelope.payload)))) {
    throw new Fault(`the signature of a statement by key ${envelope.key.slice(0, 16)} does not match`);
  }
}

/** Check that a second signature is there exactly if the author has an ML-DSA-65 key, and names this key. */
async function checkSecond(envelope, pq) {
  const who = `a statement by key ${envelope.key.slice(0, 16)}: signatures`;
  if ((envelope.second !== null) !== (pq.length > 0)) {
    throw new Fault(who, pq.length ? "one with Ed25519 and one with ML-DSA-65" : "one with Ed25519 alone", envelope.second === null ? "one" : "two");
  }
  if (envelope.second !== null && envelope.second !== hex(await sha256(pq))) {
    throw new Fault(`the ML-DSA-65 signature of a statement by key ${envelope.key.slice(0, 16)} is of another key`);
  }
}

/** Return the path at which a value breaks a schema, or null. The schema is the part of JSON Schema that is needed. */
function misfit(schema, value, path) {
  if (schema.$ref) return misfit(PRIVET.schema.$defs[schema.$ref.split("/").at(-1)], value, path);
  if (schema.anyOf) return schema.anyOf.some((each) => misfit(each, value, path) === null) ? null : path;
  if (Object.hasOwn(schema, "const") && value !== schema.const) return path;
  if (schema.enum && !schema.enum.includes(value)) return path;
  switch (schema.type) {
    case "null": return value === null ? null : path;
    case "boolean": return typeof value === "boolean" ? null : path;
    case "string": return fitsString(schema, value) ? null : path;
    case "integer":
    case "number": return fitsNumber(schema, value) ? null : path;
    case "array": return Array.isArray(value) ? firstOf(value.map((each, at) => misfit(schema.items, each, `${path}.${at}`))) : path;
    default: return misfitObject(schema, value, path);
  }
}

const firstOf = (found) => found.find((each) => each !== null) ?? null;
const patterns = new Map();

function matches(pattern, text) {
  if (!patterns.has(pattern)) patterns.set(pattern, new RegExp(pattern, "u"));
  return patterns.get(pattern).test(text);
}

function fitsString(schema, value) {
  return typeof value === "string" && value.length <= (schema.maxLength ?? Infinity)
    && value.length >= (schema.minLength ?? 0) && (!schema.pattern || matches(schema.pattern, value));
}

function fitsNumber(schema, value) {
  return typeof value === "number" && Number.isFinite(value) && (schema.type === "number" || Number.isInteger(value))
    && value >= (schema.minimum ?? -Infinity) && value <= (schema.maximum ?? Infinity)
    && value > (schema.exclusiveMinimum ?? -Infinity) && value < (schema.exclusiveMaximum ?? Infinity);
}

function misfitObject(schema, value, path) {
  if (value === null || typeof value !== "object" || Array.isArray(value)) return path;
  const keys = Object.keys(value);
  if (schema.properties) {
    const missing = schema.required.find((key) => !Object.hasOwn(value, key));
    if (missing) return `${path}.${missing}`;
    const strange = keys.find((key) => !Object.hasOwn(schema.properties, key));
    if (strange !== undefined) return `${path}.${shown(strange)}`;
    return firstOf(keys.map((key) => misfit(schema.properties[key], value[key], `${path}.${key}`)));
  }
  const [[pattern, inner]] = Object.entries(schema.patternProperties);
  if (keys.length < (schema.minProperties ?? 0)) return path;
  return firstOf(keys.map((key) => (matches(pattern, key) ? misfit(inner, value[key], `${path}.${key}`) : path)));
}

/** Read a statement. Its bytes must be exactly those that encoding it again gives. */
async function parseStatement(payload) {
  const text = latin(payload);
  let document;
  try {
    document = JSON.parse(text);
  } catch {
    throw new Fault("statement", "JSON", "other bytes");
  }
  const said = document?.predicate, schema = PRIVET.schema.kinds[said?.type];
  if (!Object.hasOwn(PRIVET.schema.kinds, said?.type ?? "")) throw new Fault("statement: type", "a known type", shown(said?.type ?? null));
  const wrong = misfit({ $ref: schema }, said, "predicate");
  if (wrong !== null) throw new Fault(`statement: it is not valid: field ${wrong}`);
  await checkParts(said);
  const subject = await subjectOf(said);
  const again = canonical({
    _type: "https://in-toto.io/Statement/v1",
    subject: [...subject].sort(([a], [b]) => (a < b ? -1 : 1)).map(([name, sum]) => ({ name, digest: { sha256: sum.slice(7) } })),
    predicateType: `urn:privet:statement:${said.type}:${said.format}`,
    predicate: said,
  });
  if (again !== text) throw new Fault(`the statement of type ${said.type} is not in canonical form, or is about another subject`);
  return said;
}

/** The artifacts that a statement is about: digests by name. */
async function subjectOf(said) {
  const keyDigest = async (key) => [key[0], await digestOf(key[1])];
  const ofLog = async () => keyDigest(["log", (await parseKey(said.log)).key]);
  switch (said.type) {
    case "genesis": return [await ofLog()];
    case "join":
    case "renew": return [await keyDigest([said.member.site, unhex(said.member.key)])];
    case "revoke": return [await keyDigest([said.site, unhex(said.key)])];
    case "rotate": return [await keyDigest(["coordinator", unhex(said.coordinator)]), await ofLog()];
    case "run-open": return [["study", said.study], ["adapter", said.adapter]];
    case "site-round": return [["upload", said.upload]];
    case "round-close": return [["adapter", said.adapter_published]];
    case "refusal": return [["policy", said.policy]];
    case "export": return Object.entries(said.files);
    default: return [["adapter", said.adapter]];
  }
}

function ascend(names, what) {
  if (names.some((name, at) => at && !(names[at - 1] < name))) throw new Fault(`${what}: names must be in ascending order, each once`);
}

/** The public keys of a member in hexadecimal: that of statements, then those of its witness. */
async function publicsOf(member) {
  return [member.key, ...(member.witness === null ? [] : (await parseKeyOf(member.witness, WITNESS)).publics)];
}

async function checkMember(member) {
  if (member.witness !== null && (await parseKeyOf(member.witness, WITNESS)).publics[0] === member.key) {
    throw new Fault(`${member.site}: the keys of statements and of cosignatures must differ`);
  }
}

/** Check what the parts of one statement owe to each other. */
async function checkParts(said) {
  switch (said.type) {
    case "genesis": return checkGenesis(said);
    case "join":
    case "renew": return checkMember(said.member);
    case "rotate": {
      const [log] = (await parseKeyOf(said.log, LOG)).publics;
      if (log === said.coordinator) throw new Fault("the keys of log and coordinator must differ");
      if (isWeak(log) || isWeak(said.coordinator)) throw new Fault("rotate", "keys that are not of small order", "one");
      return;
    }
    case "round-open":
      ascend(said.cohort, "cohort");
      if (said.participants) {
        ascend(said.participants, "participants");
        const all = new Set(said.participants);
        if (!(said.cohort.every((site) => all.has(site)) && all.size > said.cohort.length)) {
          throw new Fault("participants", "the cohort and others, or nothing", shown(said.participants));
        }
      }
      return;
    case "round-close":
      ascend(said.survivors, "survivors");
      if (said.adapter_published !== said.adapter_after && !said.ended) throw new Fault("adapter_published: only a run that ends publishes an earlier adapter");
      if (said.average && !said.ended) throw new Fault("average: only a run that ends publishes one");
      return checkSpoiledNames(said);
    case "round-abort": return checkSpoiledNames(said);
    case "adapter-state":
      if ((said.state === "superseded") !== (said.by !== null)) throw new Fault("by: the name of a run must be there exactly where the state is superseded");
      return;
    case "run-open":
      if (said.gate && ((said.gate.canaries === null) !== (said.gate.epsilon === null) || (said.gate.metric === null) !== (said.gate.least === null))) {
        throw new Fault("gate: expected canaries with an epsilon, and a metric with its least value");
      }
      return;
    case "egress-review": return checkReview(said);
    case "egress-decision": {
      ascend(said.signed, "signed");
      ascend(said.refused, "refused");
      const accepted = said.verdict === "accepted";
      if (accepted !== (said.expires !== null) || accepted !== (said.reason === "")) throw new Fault("expires, reason: expected an expiry if accepted, and a reason if refused");
      return;
    }
    default:
  }
}

function checkReview(said) {
  ascend(said.tested, "tested");
  ascend(said.failed, "failed");
  const { canaries } = said, signed = said.verdict === "signed";
  if (said.failed.some((each) => !said.tested.includes(each))) throw new Fault("failed: expected conditions that were tested");
  if (said.tested.includes("canary") !== (canaries !== null)) throw new Fault("canaries: expected counts exactly where canaries were tested");
  if (canaries && !(canaries.right <= canaries.guesses && canaries.guesses <= canaries.planted)) throw new Fault("expected right <= guesses <= planted");
  if ((said.test === null) !== (said.tested.length === 0)) throw new Fault("test: expected a commitment exactly where something was tested");
  if (signed ? said.failed.length || said.reason : !said.reason) throw new Fault("failed, reason: expected none with a signature, and a reason with a refusal");
  if (said.expires <= said.time) throw new Fault("expires: expected a time after `time`");
}

function checkSpoiledNames({ spoiled, left_out: leftOut }) {
  if (spoiled?.length === 0 || leftOut?.length === 0) throw new Fault("spoiled, left_out", "names, or nothing", "an empty list");
  for (const names of spoiled ?? []) ascend(names, "spoiled");
  ascend(leftOut ?? [], "left_out");
}

async function checkGenesis(said) {
  ascend(said.members.map((member) => member.site), "members");
  for (const member of said.members) await checkMember(member);
  const keys = [...(await parseKeyOf(said.log, LOG)).publics, said.coordinator];
  for (const member of said.members) keys.push(...(await publicsOf(member)));
  if (new Set(keys).size !== keys.length) throw new Fault("each key of the consortium must have one purpose and one owner; a key is named twice");
  const witnesses = await witnessesOf(said.members);
  if (new Set(witnesses.map((key) => key.name)).size !== witnesses.length) throw new Fault("each witness must have its own name; a name is used twice");
  checkQuorum(witnesses.length, said.quorum);
}

async function witnessesOf(members) {
  const found = [];
  for (const member of members) if (member.witness !== null) found.push(await parseKey(member.witness));
  return found;
}
