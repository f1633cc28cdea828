// What a person sees. Every text from the bundle enters the page as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";
const at = (id) => document.getElementById(id);
const plain = new Intl.NumberFormat("en");
const short = (digest) => digest.replace("sha256:", "").slice(0, 12);
const count = (number, noun) => `${plain.format(number)} ${noun}${number === 1 ? "" : "s"}`;

const rounded = (number) => Number(number.toPrecision(5));

/** The author chose the time: one beyond the year 9999 is shown as the last one before. */
const clock = (seconds) => new Date(1000 * Math.min(seconds, 253_402_300_799)).toISOString().replace("T", " ").slice(0, 19);

/** Make an element with attributes and children; a child that is no element becomes text. */
function make(tag, attributes = {}, ...children) {
  const element = ["svg", "g", "rect", "circle", "line", "text", "title"].includes(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null).map((child) => (child instanceof Node ? child : String(child))));
  return element;
}

function table(target, heads, rows) {
  const head = make("tr", {}, ...heads.map((each) => make("th", { scope: "col", ...(each.number ? { class: "number" } : {}) }, each.text ?? each)));
  const body = rows.map((cells) => make("tr", {}, ...cells.map((cell, n) => {
    const attributes = { ...(heads[n].number ? { class: "number" } : heads[n].code ? { class: "code" } : {}), ...(n ? {} : { scope: "row" }) };
    return make(n ? "td" : "th", attributes, ...[cell].flat());
  })));
  target.replaceChildren(...target.querySelectorAll("caption"), make("thead", {}, head), make("tbody", {}, ...body));
}

// Data and state

function readBundle() {
  const data = JSON.parse(at("bundle").textContent);
  const files = new Map(Object.entries(data.files).map(([name, text]) => [name, looseBase64(text)]));
  return { title: data.title, files, absent: new Map(Object.entries(data.absent)) };
}

let bundle, report;
// true: compared and equal; false: different; null: not compared. The head commits to all leaves, and so to all keys.
const told = { head: null, policy: null };
let policyFault = "";

async function start() {
  if (!(await canVerify())) {
    return setVerdict("even", "Could not check", "This browser has no Ed25519 in WebCrypto, so nothing was checked. Open the file in Chrome 137, Firefox 129, Safari 17, or a later version.");
  }
  bundle = readBundle();
  at("title").textContent = `Audit of ${bundle.title}`;
  setVerdict("even", "Checking", "Hashes, signatures and the order of statements are checked in this browser.");
  at("progress").hidden = false;
  report = await verifyBundle(bundle.files, { absent: [...bundle.absent.keys()], progress: showProgress });
  at("progress").hidden = true;
  try {
    await showAll();
  } catch (error) { // the verdict stands, whatever cannot be drawn
    at("subtitle").textContent = `This page cannot show all of the bundle (${error.name}).`;
  }
  showVerdict();
}

async function showProgress(done, all) {
  at("progress").value = all ? done / all : 1;
  at("verdict-text").textContent = `${plain.format(done)} of ${leafCount(all)} checked.`;
  await new Promise((resume) => setTimeout(resume)); // lets the browser paint
}

// The verdict

/** The verdict that is easily taken for a pass, in the languages of the consoles: the first that the reader asks for. */
const OPEN = {
  en: ["Not yet verified: consistent with itself", "Every check of this page passed, but a log that was made up for you would pass them as well. Compare the log below with a site."],
  de: ["Noch nicht gepr\u00fcft: in sich stimmig", "Alle Pr\u00fcfungen dieser Seite sind bestanden. Ein Protokoll, das f\u00fcr Sie erfunden wurde, best\u00fcnde sie aber auch. Vergleichen Sie das Protokoll unten mit einem Standort."],
  zh: ["\u5c1a\u672a\u9a8c\u8bc1\uff1a\u4ec5\u81ea\u8eab\u4e00\u81f4", "\u672c\u9875\u7684\u68c0\u67e5\u5168\u90e8\u901a\u8fc7\uff0c\u4f46\u4e13\u4e3a\u60a8\u4f2a\u9020\u7684\u65e5\u5fd7\u4e5f\u80fd\u901a\u8fc7\u3002\u8bf7\u5728\u4e0b\u65b9\u4e0e\u4e00\u4e2a\u7ad9\u70b9\u6838\u5bf9\u65e5\u5fd7\u3002"],
};
const language = () => navigator.languages.map((each) => each.slice(0, 2)).find((each) => each in OPEN) ?? "en";

function setVerdict(mood, word, text, rest = "", lang = "en") {
  at("verdict").className = mood;
  at("verdict-word").textContent = { good: "\u2713 ", bad: "\u2717 ", open: "", even: "" }[mood] + word;
  at("verdict-text").replaceChildren(make("span", { lang }, text), ...(rest ? [" ", rest] : []));
  at("verdict-word").lang = lang;
}

const leafCount = (number) => (number === 1 ? "1 leaf" : `${plain.format(number)} leaves`);

function showVerdict() {
  const { fault, leaf, where } = report;
  if (fault) {
    const place = leaf !== null ? `at leaf ${plain.format(leaf)}` : where ? `at ${where}` : "at the checkpoint";
    const before = leaf ? ` The ${leafCount(report.told.length)} before it passed their own checks.` : "";
    setVerdict("bad", `Fails ${place}`, `Do not rely on this bundle.${leaf !== null && report.told.length === leaf ? before : ""}`);
    const rows = [["What", fault.what], ["Where", leaf !== null ? `leaf ${leaf}` : where || "checkpoint"], ["Expected", fault.expected], ["Found", fault.found]];
    at("fault").replaceChildren(...rows.filter(([, text]) => text).flatMap(([name, text]) => [make("dt", {}, name), make("dd", {}, text)]));
    if (leaf < report.leaves.length && leaf !== null) at("fault").append(make("dt", {}, "Leaf as found"), make("dd", {}, foundLeaf(report.leaves[leaf])));
    at("fault").hidden = false;
  } else if (Object.values(told).includes(false)) {
    setVerdict("bad", "Differs from what you compared", policyFault || "The words are not those of this log. Do not rely on this bundle until you know why.");
  } else if (told.policy || told.head) {
    const by = told.policy ? "your policy file" : "the site that you compared with";
    setVerdict("good", "Consistent, and compared", `Every check of this page passed, and the log is the one of ${by}. ${notChecked()}`);
  } else {
    setVerdict("open", ...OPEN[language()], notChecked(), language());
  }
  document.title = `${at("verdict-word").textContent}: ${bundle.title}`;
}

/** The content of a leaf that failed, as text. It is nobody's statement. */
function foundLeaf(data) {
  let text = latin(data);
  try {
    text = JSON.stringify(JSON.parse(latin(decodeBase64(JSON.parse(text).payload, ""))).predicate, null, 1);
  } catch {} // then its bytes
  return make("details", {}, make("summary", {}, "Show it; do not believe it"), make("pre", {}, text.slice(0, 20_000)));
}

function notChecked() {
  const missing = elsewhere(report, bundle.absent).length;
  return `${report.alone ? "There is a log alone, without the files of a run. " : ""}${count(missing, "thing")} could not be checked here, and ${missing === 1 ? "is" : "are"} listed.`;
}

// Comparing

const lettersOf = (text) => (text.toLowerCase().match(/[a-z]+/g) ?? []).join(" ");

async function showCompare() {
  if (report.fault) return;
  const expected = await wordsOf(utf8(report.note.text));
  at("head-words").textContent = expected;
  at("site-command").textContent = `privet site head SITE --size ${report.head.size}`;
  at("head-told").addEventListener("input", () => compareWords(expected));
  at("own-file").addEventListener("change", compareFile);
  at("compare").hidden = false;
}

function compareWords(expected) {
  const heard = lettersOf(at("head-told").value), words = heard ? heard.split(" ") : [];
  told.head = words.length < 12 ? null : heard === expected;
  const strange = words.slice(0, -1).find((word) => !PRIVET.words.includes(word));
  const sofar = strange === undefined ? `${words.length} of 12 words` : `${strange.slice(0, 20)} is no word of the list`;
  const different = "Different. The site must read out the words for the same number of leaves.";
  say("head-result", told.head, !words.length ? "" : told.head === null ? sofar : told.head ? "Equal." : different);
  showVerdict();
}

function say(id, good, text) {
  at(id).className = good === null ? "waiting" : good ? "passed" : "failed";
  at(id).textContent = text ? (good === null ? "" : good ? "\u2713 " : "\u2717 ") + text : "";
}

async function compareFile() {
  const [file] = at("own-file").files;
  if (!file) return;
  const data = new Uint8Array(await file.arrayBuffer()), text = new TextDecoder().decode(data.subarray(0, 1_000_000));
  if (/^\s*log\s/m.test(text) && /^\s*quorum\s/m.test(text)) await comparePolicy(text);
  else if (text.includes("\n\n\u2014 ")) await compareCheckpoint(data);
  else await compareReleased(await digestOf(data));
  showVerdict();
}

async function comparePolicy(text) {
  const found = await verifyBundle(bundle.files, { policy: text, absent: [...bundle.absent.keys()] });
  told.policy = found.ok;
  policyFault = found.ok ? "" : found.fault.message;
  say("own-result", found.ok, found.ok ? `The log is the one of this policy. Cosigned by ${found.cosigners.map((key) => key.name).join(", ")}.` : found.fault.message);
}

/** A checkpoint that the reader has from elsewhere: is this log the same, or a longer one? */
async function compareCheckpoint(data) {
  try {
    const note = parseNote(data), head = parseHead(note.text), { tree, history } = report;
    if (head.size > tree.size) return say("own-result", null, `That checkpoint has ${leafCount(head.size)}, this log ${plain.format(tree.size)}: this copy is older.`);
    await openHead(note, history.epochAt(head.size).log);
    const good = equalBytes(head.root, await tree.rootAt(head.size));
    if (head.size === tree.size) told.head = good;
    else if (!good) told.head = false;
    const grown = head.size < tree.size ? `It grew from the checkpoint of ${leafCount(head.size)}.` : "It is the log of this checkpoint.";
    say("own-result", good, good ? grown : `The log is not the one of this checkpoint: at ${leafCount(head.size)} it has another root hash.`);
  } catch (error) {
    say("own-result", false, error instanceof Fault ? error.message : "The file cannot be read.");
  }
}

async function compareReleased(digest) {
  const found = [];
  for (const run of report.history.runs.values()) {
    for (const { said, index } of run.releases) {
      for (const [name, sum] of Object.entries(said.files)) if (sum === digest) found.push(`${name} of run ${said.run} (leaf ${index})`);
    }
  }
  say("own-result", found.length > 0, found.length ? `The log exports this file: ${found.join(", ")}.` : `No release in this log has a file with SHA-256 ${digest.slice(7)}.`);
}

// The rest of the page

async function showAll() {
  const { genesis, runs } = report.history, { head } = report;
  const parts = [genesis && `consortium ${genesis.consortium}`, report.run && `run ${report.run.said.run}`, head && leafCount(head.size),
    report.cosigners.length && `cosigned by ${report.cosigners.map((key) => key.name).join(", ")}`];
  at("subtitle").textContent = parts.filter(Boolean).join(" \u00b7 ");
  showChecks();
  if (runs.size) showRuns(runs);
  if (genesis) showMembers();
  await showFiles();
  if (report.told.length) showLeaves();
  await showCompare();
}

function showChecks() {
  const rows = PRIVET.checks.here.map((check) => {
    const passed = report.reached.includes(check.name), failed = report.failed === check.name && report.fault;
    const state = passed ? ["passed", "\u2713 passed"] : failed ? ["failed", "\u2717 failed"] : ["waiting", report.alone ? "\u2013 no file" : "\u2013 not reached"];
    return make("tr", {}, make("td", { class: `state ${state[0]}` }, state[1]), make("td", {}, check.text));
  });
  at("checks-table").append(make("tbody", {}, ...rows));
  at("elsewhere").replaceChildren(...elsewhere(report, bundle.absent).map((check) => make("li", {}, check.text)));
  at("checks").hidden = false;
}

function showRuns(runs) {
  for (const run of runs.values()) {
    at("runs").append(make("h3", {}, `Run ${run.said.run}`), make("p", { class: "quiet" }, promiseOf(run.said)));
    const attempts = [...run.rounds].map(([leaf, round]) => ({ ...round, end: run.ends.get(leaf) ?? null }));
    if (attempts.length) at("runs").append(roundsFigure(run, attempts), roundsTable(run, attempts));
    at("chains").append(make("h3", {}, `Run ${run.said.run}`), chainOf(run, runs));
  }
  at("timeline").hidden = at("lineage").hidden = false;
}

function promiseOf(said) {
  const terms = `${count(said.rounds, "round")} planned, ${said.secure_aggregation} updates, at least ${said.min_sites} sites in a sum, study ${short(said.study)}. `;
  const { privacy } = said;
  if (!privacy) return `${terms}The run promises no privacy.`;
  return `${terms}It promises epsilon at most ${privacy.epsilon} at delta ${privacy.delta} for each ${privacy.training.unit}, with noise multiplier ${rounded(privacy.training.noise_multiplier)}.`;
}

/** Sites down, rounds across: who was in a sum, who was asked and is missing, who was not asked. */
function roundsFigure(run, attempts) {
  const sites = [...new Set(attempts.flatMap((each) => each.said.cohort))].sort();
  const step = attempts.length > 150 ? 7 : 18, row = 20, left = 9 * Math.min(Math.max(...sites.map((site) => site.length)), 24) + 10;
  const width = left + step * attempts.length + 10, height = row * sites.length + 26;
  const drawing = make("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Sites in the rounds of run ${run.said.run}. The table below says the same.` });
  sites.forEach((site, n) => drawing.append(make("text", { x: 0, y: row * n + 15 }, site.length > 24 ? `${site.slice(0, 23)}\u2026` : site)));
  attempts.forEach((attempt, column) => {
    const x = left + step * column + step / 2, every = step < 10 ? 20 : attempts.length > 20 ? 5 : 1;
    if (attempt.end?.type === "round-abort") drawing.append(make("rect", { class: "aborted", x: x - step / 2, y: 0, width: step, height: row * sites.length }));
    sites.forEach((site, n) => drawing.append(markOf(attempt, site, x, row * n + 11, Math.min(step / 2 - 1, 6))));
    if (attempt.said.round % every === 0 || every === 1) drawing.append(make("text", { x, y: row * sites.length + 18, "text-anchor": "middle" }, attempt.said.round));
  });
  const legend = [["sent", "in the sum"], ["silent", "asked, and missing"], ["rest", "not asked"]].map(([name, text]) => {
    const key = make("svg", { width: 14, height: 14, "aria-hidden": "true" });
    key.append(mark(name, 7, 7, 5));
    return make("span", {}, key, text);
  });
  return make("figure", {}, make("div", { class: "wide", tabindex: "0", role: "region", "aria-label": `Rounds of run ${run.said.run}` }, drawing),
    make("figcaption", { class: "legend" }, ...legend, "A shaded round was aborted."));
}

function markOf(attempt, site, x, y, size) {
  const { said, end, answered } = attempt;
  if (!said.cohort.includes(site)) return mark("rest", x, y, size, `${site}, round ${said.round}: not asked`);
  if (end?.survivors?.includes(site)) return mark("sent", x, y, size, `${site}, round ${said.round}: in the sum`);
  const why = end?.failures[site] ?? (answered.has(site) ? "stated its part" : "no statement in the log");
  return mark(end ? "silent" : "asked", x, y, size, `${site}, round ${said.round}: ${end ? "not in a sum" : "round not ended"}; ${why}`);
}

function mark(name, x, y, size, title = "") {
  const shape = name === "sent" ? make("rect", { class: name, x: x - size, y: y - size, width: 2 * size, height: 2 * size, rx: 2 })
    : make("circle", { class: name, cx: x, cy: y, r: name === "rest" ? 1.5 : size - 1 });
  if (title) shape.append(make("title", {}, title));
  return shape;
}

function roundsTable(run, attempts) {
  const rows = attempts.map(({ said, index, end }) => {
    const missing = end ? Object.entries(end.failures).map(([site, why]) => `${site}: ${why}`).join("; ") : "";
    const costs = end?.epsilon ? Object.values(end.epsilon) : [];
    const how = !end ? "not ended" : end.type === "round-abort" ? `aborted: ${end.reason}` : end.ended ? "closed, run ended" : "closed";
    return [said.round, clock(said.time), how, end?.survivors ? end.survivors.join(", ") : "", missing, costs.length ? rounded(Math.max(...costs)) : "", index];
  });
  const found = make("table", {});
  table(found, [{ text: "Round" }, "Opened (UTC, coordinator's clock)", "End", "In the sum", "Missing", { text: "Epsilon stated", number: true }, { text: "Leaf", number: true }], rows);
  return make("details", {}, make("summary", {}, `Table of ${count(attempts.length, "round")}`), make("div", { class: "wide", tabindex: "0", role: "region", "aria-label": `Table of rounds of run ${run.said.run}` }, found));
}

/** From the adapter that a run started with to what it released. */
function chainOf(run, runs) {
  const source = [...runs.values()].flatMap((other) => [...other.published].map(([round, adapter]) => ({ other, round, adapter })))
    .find((each) => each.other !== run && each.adapter === run.said.adapter && each.other.index < run.index);
  const items = [["", `starts from adapter ${short(run.said.adapter)}${source ? `, which run ${source.other.said.run} published in round ${source.round}` : ""}`]];
  for (const end of run.ends.values()) {
    if (end.type !== "round-close") continue;
    const kept = end.adapter_published === end.adapter_after ? "" : end.average ? ` (${end.average} average of the rounds' adapters)` : " (of an earlier round)";
    items.push(["", `round ${end.round} publishes adapter ${short(end.adapter_published)}${kept}, a sum of ${count(end.survivors.length, "site")}`]);
  }
  const middle = items.length > 9 ? items.splice(4, items.length - 7) : [];
  for (const release of run.releases) {
    items.push(["released", `released: adapter ${short(release.said.adapter)} of round ${release.said.round}, in ${count(Object.keys(release.said.files).length, "file")} (leaf ${release.index})`]);
    if (release.change) items.push([release.change.state, `${release.change.state}${release.change.by ? ` by the release of run ${release.change.by}` : ""}: ${release.change.reason}`]);
  }
  const list = (all) => make("ol", { class: "chain" }, ...all.map(([state, text]) => make("li", state ? { class: state } : {}, text)));
  if (!middle.length) return list(items);
  return make("div", {}, list(items.slice(0, 4)), make("details", {}, make("summary", {}, `${count(middle.length, "round")} between`), list(middle)), list(items.slice(4)));
}

function showMembers() {
  const { history, cosigners } = report, signed = new Map(cosigners.map((key) => [key.text, key]));
  const times = new Map(report.note.signatures.map((each) => [each.name, each]));
  const cosigned = (key) => (key ? `cosigned ${clock(Number(cosignedAt(times.get(key.name))))}` : report.fault ? "not reached" : "did not cosign");
  const row = (member, joined, left) => [member.site, member.key.slice(0, 16), member.witness === null ? "no witness" : cosigned(signed.get(member.witness)),
    history.second.get(member.key)?.length ? "Ed25519 and ML-DSA-65" : "Ed25519", joined, left];
  const rows = [...history.left.map(([member, left, joined]) => row(member, joined, `left at leaf ${left}`)),
    ...[...history.members.values()].map((member) => row(member, history.joined.get(member.site), "member"))];
  for (const [n, epoch] of history.epochs.entries()) {
    rows.push([n ? "coordinator, rotated" : "coordinator", epoch.coordinator.slice(0, 16), `log key ${hex(epoch.log.key).slice(0, 16)}`, epoch.log.pq.length ? "Ed25519 and ML-DSA-65" : "Ed25519", epoch.since, ""]);
  }
  table(at("members-table"), ["Name", { text: "Key (first 16 digits)", code: true }, "Checkpoint", "Signs with", { text: "From leaf", number: true }, "State"], rows);
  const costs = [...history.accounts.values()].map((each) => [each.site, short(each.account), rounded(each.epsilon), each.limit ?? "none", each.delta, each.index]);
  at("costs-title").hidden = at("costs-table").hidden = !costs.length;
  table(at("costs-table"), ["Site", { text: "Account", code: true }, { text: "Epsilon stated", number: true }, { text: "Limit", number: true }, { text: "Delta", number: true }, { text: "Leaf", number: true }], costs);
  at("members").hidden = false;
}

async function showFiles() {
  const rows = [];
  for (const [name, data] of bundle.files) rows.push([name, plain.format(data.length), (await digestOf(data)).slice(7)]);
  for (const [name, size] of bundle.absent) rows.push([name, plain.format(size), "not in this page"]);
  at("files-count").textContent = `${count(bundle.files.size, "file")}${bundle.absent.size ? `, and ${count(bundle.absent.size, "file")} of weights left out` : ""}`;
  table(at("files-table"), ["Name", { text: "Bytes", number: true }, { text: "SHA-256", code: true }], rows);
  at("files").hidden = false;
}

// Leaves, a page of them at a time

const PAGE = 50;

function showLeaves() {
  let first = report.leaf !== null ? Math.max(0, report.leaf - 5) : 0;
  const draw = () => {
    const rows = report.told.slice(first, first + PAGE).map((leaf) => [leaf.index, clock(leaf.said.time), report.history.genesis && (leaf.said.site ?? "coordinator"), leaf.said.type,
      make("details", {}, make("summary", {}, `leaf ${leaf.index}`), make("pre", {}, JSON.stringify(leaf.said, null, 1)), make("p", { class: "quiet code" }, leaf.hash))]);
    const found = make("table", {}, make("caption", {}, `Leaves ${first} to ${first + rows.length - 1} of ${report.told.length} that passed`));
    table(found, ["Leaf", "Time (UTC, author's clock)", "About or by", "Statement", "Content"], rows);
    at("leaf-list").replaceChildren(make("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Leaves" }, found));
    at("leaf-before").disabled = first === 0;
    at("leaf-after").disabled = first + PAGE >= report.told.length;
    at("leaf-number").value = first;
  };
  const go = (number) => {
    first = Math.min(Math.max(0, number || 0), report.told.length - 1);
    draw();
  };
  at("leaf-number").max = report.told.length - 1;
  at("leaf-form").addEventListener("submit", (event) => {
    event.preventDefault();
    go(Number(at("leaf-number").value));
  });
  at("leaf-before").addEventListener("click", () => go(first - PAGE));
  at("leaf-after").addEventListener("click", () => go(first + PAGE));
  draw();
  at("leaves").hidden = false;
}

if (typeof document !== "undefined") start();
