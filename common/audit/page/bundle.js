// A whole bundle: first its log, then all other files against the log. `common/audit/verify.py` and `bundle.py` do the same.

const SERVED = ["log.policy", "log.vkey", "root.pem"];
const PARTS = ["tile/", "rounds/", "averaged/", "release/", "proofs/"];
// Fields that a run's statement of a round has, if it closed and if it was aborted.
const BOTH_ENDS = ["adapter_before", "cohort", "failures", "nonce", "privacy", "round"];
const END_FIELDS = {
  "round-close": [...BOTH_ENDS, "adapter_after", "adapter_published", "aggregation", "masking", "metrics", "secure_aggregation", "survivors"],
  "round-abort": [...BOTH_ENDS, "reason"],
};
const WEIGHTS = "adapter_model.safetensors";
const AT_ONCE = 256;

/**
 * Verify a bundle.
 *
 * @param {Map<string, Uint8Array>} files The files, by name; without those of `absent`.
 * @param {object} options `policy`: text of a policy file that the reader brings. `absent`: names of files of the bundle
 *   that the page does not hold. `progress`: called with done and all leaves.
 * @returns {Promise<object>} `ok`; `leaf` and `where` of what is wrong, and `fault`; `alone` if there is only a log; all
 *   that was read. No content makes it throw.
 */
async function verifyBundle(files, { policy = null, absent = [], progress = async () => {} } = {}) {
  const report = { ok: false, fault: null, leaf: null, where: "", alone: false, head: null, note: null, tree: null, leaves: [], told: [],
    history: new History(), run: null, cosigners: [], reached: [], failed: "" };
  try {
    await verifyLog(files, policy, report, progress);
    await verifyFiles(files, new Set(absent), report);
    report.ok = true;
  } catch (error) {
    // An error that nobody foresaw is a failure, never a pass.
    report.fault = error instanceof Fault ? error : new Fault(`cannot be read (${error.name})`);
    report.where ||= report.fault.where;
  }
  return report;
}

/** Note which check is under way, by its name in `PRIVET.checks`. It has passed once the next one begins. */
function begin(report, name) {
  if (report.failed) report.reached.push(report.failed);
  report.failed = name;
}

async function verifyLog(files, policyText, report, progress) {
  begin(report, "checkpoint");
  const note = (report.note = parseNote(fetched(files, "checkpoint")));
  const policy = policyText === null ? null : await parsePolicy(policyText);
  const head = (report.head = parseHead(note.text));
  if (policy) {
    await openHead(note, policy.log);
    report.cosigners = await signersOf(note, policy.witnesses);
    needCosigners(policy.needed, report.cosigners, "your policy");
  }
  begin(report, "tree");
  await readTree(files, head, report);
  begin(report, "history");
  await replay(report, progress);
  report.leaf = null;
  begin(report, "quorum");
  await checkKeys(policy, report);
}

function needCosigners(needed, found, by) {
  if (found.length < needed) throw new Fault(`checkpoint: cosignatures that count, by ${by}`, `at least ${needed}`, found.length);
}

/** Hash the leaves, and compare the root with the checkpoint's. If it differs, name the first leaf that is wrong. */
async function readTree(files, head, report) {
  const hashes = [];
  for (const tile of tileRow(null, head.size)) {
    report.leaf = report.leaves.length;
    const leaves = readEntries(tile, fetched(files, tilePath(tile)));
    report.leaves.push(...leaves);
    hashes.push(...(await Promise.all(leaves.map(leafHash))));
  }
  report.leaf = null;
  report.tree = await Tree.of(hashes);
  const root = await report.tree.rootAt(head.size);
  if (equalBytes(root, head.root)) return;
  // The tiles are not trusted, unless they give the signed root: then they are the hashes that were committed.
  const stated = statedHashes(files, head.size);
  if (stated && equalBytes(await (await Tree.of(stated)).rootAt(head.size), head.root)) {
    const wrong = hashes.findIndex((hash, at) => !equalBytes(hash, stated[at]));
    await replay(report, async () => {}, wrong).catch(() => {}); // for the reader: what the log says up to there
    report.leaf = wrong;
    throw new Fault("hash of the leaf: it was changed after the log signed the checkpoint over it", hex(stated[wrong]), hex(hashes[wrong]));
  }
  // Without such hashes, a leaf that breaks the history is the best one to name.
  await replay(report, async () => {});
  report.leaf = null;
  throw new Fault("root hash: a leaf was changed, or the leaves are of another branch of the log", hex(head.root), hex(root));
}

async function replay(report, progress, last = report.leaves.length) {
  const prepare = (first) => Promise.all(report.leaves.slice(first, Math.min(first + AT_ONCE, last)).map(prepareLeaf));
  // The browser verifies the signatures of the next leaves on other threads meanwhile.
  for (let first = 0, next = prepare(0); first < last; first += AT_ONCE) {
    const prepared = await next;
    next = prepare(first + AT_ONCE);
    for (const [at, each] of prepared.entries()) {
      report.leaf = first + at;
      report.told.push(await report.history.admit(first + at, each, report.tree));
    }
    await progress(first + prepared.length, report.leaves.length);
  }
  report.leaf = report.leaves.length;
}

/** Check that the checkpoint is signed by the log's key of its size, and cosigned by a quorum of present members. */
async function checkKeys(policy, report) {
  const { history, note, head } = report;
  const epoch = history.epochs.length ? history.epochAt(head.size) : null;
  if (policy && epoch?.log.text !== policy.log.text) {
    const ended = history.epochs.findIndex((each) => each.log.text === policy.log.text);
    report.leaf = ended >= 0 && ended + 1 < history.epochs.length ? history.epochs[ended + 1].since - 1 : 0;
    throw new Fault("key of the log, which your policy trusts", epoch?.log.publics[0] ?? "one in the log", policy.log.publics[0]);
  }
  if (policy) {
    const stranger = policy.witnesses.find((key) => !history.witnesses.has(key.text));
    if (stranger) throw new Fault(`your policy lists the witness ${stranger.name}, but no member of the log ever had this cosigning key`);
    needCosigners(policy.needed, report.cosigners.filter((key) => !history.revoked.has(key.publics[0])), "your policy");
  }
  if (!epoch) throw new Fault("the log has no leaf, so nobody has signed it");
  await openHead(note, epoch.log);
  const members = await signersOf(note, await witnessesOf(history.members.values()));
  needCosigners(history.quorum, members, "the log's own quorum of members");
  if (!policy) report.cosigners = members;
}

// The other files

async function verifyFiles(files, absent, report) {
  const names = [...files.keys(), ...absent].sort(), held = (name) => files.has(name) || absent.has(name);
  begin(report, "tiles");
  await checkTiles(files, names, report);
  report.alone = names.every((name) => name === "checkpoint" || SERVED.includes(name) || name.startsWith("tile/"));
  if (report.alone) return begin(report, "");
  begin(report, "manifest");
  report.where = "bundle.json";
  const manifest = readJson(files, "bundle.json");
  if (!same(Object.keys(manifest).sort(), ["format", "run"]) || manifest.format !== 1) throw new Fault("bundle.json", "format 1 and the name of a run", shown(manifest));
  const run = (report.run = report.history.runs.get(manifest.run));
  if (!run) throw new Fault("bundle.json: run", "a run of the log", shown(manifest.run));
  const stranger = names.find((name) => !["bundle.json", "checkpoint", "study.json", "software.json"].includes(name) && !PARTS.some((part) => name.startsWith(part)));
  if (stranger !== undefined) throw Object.assign(new Fault("a bundle has no file of this name"), { where: (report.where = stranger) });
  const needless = names.find((name) => name.startsWith("averaged/") && ![...run.ends.values()].some((end) => end.type === "round-close" && name === averagedName(end)));
  if (needless !== undefined) throw Object.assign(new Fault(`${needless}: the log closed no round of which this is the adapter`), { where: (report.where = "averaged/") });
  for (const [check, where, work] of [
    ["study", "study.json", () => checkDigest(files, "study.json", run.said.study)],
    ["software", "software.json", () => checkDigest(files, "software.json", run.said.software)],
    ["rounds", "rounds/", () => checkRounds(files, names, run)],
    ["release", "release/", () => checkRelease(files, names, held, run)],
    ["proofs", "proofs/", () => checkProofs(files, names, run, report)],
  ]) {
    begin(report, check);
    report.where = where;
    await work();
  }
  report.where = "";
  begin(report, "");
}

const averagedName = (end) => `averaged/${String(end.round).padStart(4, "0")}.safetensors`;

function fetched(files, name) {
  const data = files.get(name);
  if (!data) throw new Fault(`${name} is missing in the bundle`);
  return data;
}

/** Read a JSON object in canonical form. A line may end. */
function readJson(files, name) {
  const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(fetched(files, name));
  const document = JSON.parse(text);
  if (document === null || typeof document !== "object" || Array.isArray(document) || canonical(document) !== text.replace(/\n$/, "")) {
    throw new Fault(`${name} is not a JSON object in canonical form`);
  }
  return document;
}

async function checkTiles(files, names, report) {
  const current = new Map([...tilesOf(report.head.size)].map((tile) => [`${tile.level} ${tile.number}`, tile]));
  const wrong = (where) => {
    report.where = where;
    throw new Fault("the file is missing, or is not what the log's leaves give, or no file of the log");
  };
  for (const tile of current.values()) if (!files.has(tilePath(tile))) wrong(tilePath(tile));
  for (const name of names.filter((each) => each.startsWith("tile/"))) {
    const tile = parseTile(name), now = tile && current.get(`${tile.level} ${tile.number}`);
    if (!now || tile.width > now.width) wrong(name);
    const first = tile.number * WIDTH, last = first + tile.width;
    const right = tile.level === null ? entryBytes(report.leaves.slice(first, last)) : joined(...report.tree.levels[8 * tile.level].slice(first, last));
    if (!equalBytes(right, files.get(name))) wrong(name);
  }
}

async function checkDigest(files, name, expected) {
  const data = fetched(files, name);
  // A study may end with a newline, which its digest does not cover.
  const bare = name === "study.json" && data.at(-1) === 10 ? data.subarray(0, -1) : data;
  expectEqual(`SHA-256 of ${name}`, expected, await digestOf(bare));
}

/** Check that each end of a round in the log is an extract of one statement of the run, and the other way round. */
async function checkRounds(files, names, run) {
  const held = new Map(run.ends);
  for (const name of names.filter((each) => each.startsWith("rounds/"))) {
    const statement = readJson(files, name), where = `round ${shown(statement.round ?? null)}`;
    if (!Number.isInteger(statement.round) || name !== `rounds/${String(statement.round).padStart(4, "0")}.json`) {
      throw new Fault(`${name}: the file is not named by the number of its round`);
    }
    const leaf = run.nonces.get(statement.nonce), end = held.get(leaf);
    held.delete(leaf);
    if (!end) throw new Fault(`${where}: the log has no round-close or round-abort for the bundle's statement`);
    expectEqual(`${where}: type of the bundle's statement`, end.type, statement.type ?? null);
    const absent = END_FIELDS[end.type].find((field) => !Object.hasOwn(statement, field));
    if (absent) throw new Fault(`${where}: the bundle's statement has no field ${absent}`);
    if (Array.isArray(statement.failures)) throw new Fault(`${where}: failures in the bundle's statement`, "reasons by site", "a list");
    expectEqual(`${where}: cohort in the bundle's statement, against the log's round-open`, run.rounds.get(leaf).said.cohort, statement.cohort);
    const extract = await roundEnded(run.said.run, leaf, statement, end);
    for (const field of new Set([...Object.keys(end), ...Object.keys(extract)])) {
      expectEqual(`${where}: ${field} in the bundle's statement, against the log's ${end.type}`, end[field] ?? null, extract[field] ?? null);
    }
  }
  if ([...held.values()].some((end) => end.type === "round-close" || run.said.secure_aggregation === "masked")) {
    throw new Fault(`the log has ${held.size} ended rounds of which rounds/ in the bundle has no statement`);
  }
}

/** The log's statement of a round that has ended, from the run's own (`common/log/agreement.py`, `round_ended`). */
async function roundEnded(run, opened, statement, end) {
  const named = (statement.spoiled ?? []).flat().reduce((sum, name) => sum + name.length + 3, 0);
  const room = Math.floor((10_000 - named) / Math.max(Object.keys(statement.failures).length, 1));
  const oneLine = (text) => [...text].map((each) => (/[ -~]/.test(each) ? each : "?")).slice(0, 300).join("");
  const failures = Object.fromEntries(Object.entries(statement.failures).map(
    ([site, reason]) => [site, oneLine(reason).replaceAll('"', "'").replaceAll("\\", "/").slice(0, room)]));
  const costs = statement.privacy === null ? null : Object.fromEntries(Object.entries(statement.privacy.epsilon).map(([site, spent]) => [site, upwards(spent)]));
  const both = {
    type: statement.type, format: 1, time: end.time, run, round: statement.round, opened, failures, epsilon: costs,
    spoiled: statement.spoiled?.length ? statement.spoiled : null,
    left_out: statement.left_out?.length ? statement.left_out : null,
  };
  if (statement.type === "round-abort") return { ...both, adapter: statement.adapter_before, reason: oneLine(statement.reason) };
  const masking = { masking: statement.masking };
  return {
    ...both, type: "round-close", survivors: statement.survivors, adapter_before: statement.adapter_before, adapter_after: statement.adapter_after,
    adapter_published: statement.adapter_published, aggregation: statement.aggregation,
    transcript: statement.secure_aggregation === "masked" ? await digestOf(utf8(canonical(masking))) : null,
    metrics: statement.metrics, ended: end.type === "round-close" && end.ended, average: statement.average ?? null,
  };
}

/** An epsilon with four places, rounded up. */
function upwards(epsilon) {
  const places = epsilon < 10_000 ? 10_000 : 1, found = Math.ceil(epsilon * places);
  return (found / places >= epsilon ? found : found + 1) / places;
}

async function checkRelease(files, names, held, run) {
  const released = names.filter((name) => name.startsWith("release/")).map((name) => name.slice(8)), said = run.releases.at(-1)?.said;
  if (!said) {
    if (released.length) throw new Fault("the bundle has released files in release/, but the log has no export statement of the run");
    return;
  }
  for (const [name, expected] of Object.entries(said.files)) {
    if (!held(`release/${name}`)) {
      if (name !== WEIGHTS) throw new Fault(`${name}: the log's export statement lists this file, but the bundle does not have it`);
    } else if (files.has(`release/${name}`)) expectEqual(`SHA-256 of release/${name}`, expected, await digestOf(files.get(`release/${name}`)));
  }
  const stranger = released.find((name) => !Object.hasOwn(said.files, name));
  if (stranger !== undefined) throw new Fault(`${stranger}: the log's export statement does not list this file`);
  const egress = files.get("release/egress_decision.json"), { gate } = run;
  if (!egress !== !gate) throw new Fault("egress_decision.json: a release has it exactly where the study has a gate");
  if (egress && "sha256:" + hex(await leafHash(egress)) !== gate.leaf) throw new Fault("egress_decision.json: it is not the egress decision in the log");
  const study = files.get("release/study.json");
  if (study && !equalBytes(study, files.get("study.json"))) throw new Fault("release/study.json: the released study differs from the run's study");
  expectEqual(`${WEIGHTS}: digest in the log's export statement, against the adapter of its round`, said.adapter, said.files[WEIGHTS] ?? null);
}

/** Check that the proofs are the inclusion proofs of the run's leaves that a coordinator packs, byte by byte. */
async function checkProofs(files, names, run, report) {
  const right = new Map();
  for (const [index, kind] of run.proved) {
    const path = await report.tree.inclusion(index);
    const head = ["c2sp.org/tlog-proof@v1", `index ${index}`, ...path.map(encodeBase64), "", ""].join("\n");
    right.set(`proofs/${String(index).padStart(6, "0")}-${kind}.tlog-proof`, joined(utf8(head), files.get("checkpoint")));
  }
  for (const name of new Set([...names.filter((each) => each.startsWith("proofs/")), ...right.keys()])) {
    if (!right.has(name) || !files.has(name) || !equalBytes(right.get(name), files.get(name))) {
      throw new Fault(`${name}: it is missing, or is not the proof of a leaf of run ${run.said.run}`);
    }
  }
}

/** The checks that this page did not make, of those that concern the bundle. */
function elsewhere(found, absent) {
  const runs = [...found.history.runs.values()], ends = runs.flatMap((run) => [...run.ends.values()]), { run } = found;
  const concerns = {
    "ml-dsa": [...found.history.second.values()].some((key) => key.length) || found.history.epochs.some((epoch) => epoch.log.pq.length),
    epsilon: runs.some((each) => each.said.privacy !== null),
    terms: run !== null,
    draws: run !== null,
    counts: run !== null,
    average: run !== null && (ends.some((end) => end.average) || [...absent.keys()].some((name) => name.startsWith("averaged/"))),
    weights: run !== null,
    "privacy-statement": run !== null && run.releases.length > 0,
    canaries: runs.some((each) => [...(each.gate?.reviews.values() ?? [])].some((said) => said.canaries)),
    receipts: true,
  };
  return PRIVET.checks.elsewhere.filter((check) => found.fault || concerns[check.name]);
}
