// The history of a log, replayed leaf by leaf: who may state what, and when. `common/log/replay.py` has the same rules.

const STATES = ["released", "superseded", "retired", "revoked"];
const minus = (a, b) => [...a].filter((each) => !b.has(each));
const meet = (a, b) => [...a].filter((each) => b.has(each));
const within = (a, b) => [...a].every((each) => b.has(each));

/** Who spoils masked sums, from the sums of the rounds so far. `common/masking/isolation.py` explains it. */
class Isolation {
  suspects = new Set();
  cleared = new Set();
  benched = [];
  proven = new Set();
  leftOut = [];

  after(spoiled, usable) {
    const found = Object.assign(new Isolation(), this);
    for (const sites of spoiled) found.spoiledSum(new Set(minus(sites, new Set(found.leftOut))));
    for (const sites of usable) found.usableSum(new Set(sites));
    return found;
  }

  spoiledSum(sites) {
    const tried = meet(sites, new Set(this.benched));
    if (this.proven.size && tried.length === 1 && within(minus(sites, new Set(tried)), this.proven)) {
      this.endTrial(tried[0], true);
      return;
    }
    this.proven = new Set();
    const rest = minus(sites, new Set(this.benched)), common = new Set(meet(this.suspects, new Set(rest)));
    [this.suspects, this.cleared] = [common.size ? common : new Set(rest), new Set(meet(this.cleared, common))];
    if (this.suspects.size === 1) {
      this.benched = [...this.benched, ...this.suspects];
      this.suspects = new Set();
      this.cleared = new Set();
    }
  }

  usableSum(sites) {
    const tried = meet(sites, new Set(this.benched));
    if (this.proven.size && tried.length === 1) this.endTrial(tried[0], false);
    else if (this.benched.length && !tried.length && !this.suspects.size) {
      this.proven = sites;
      if (this.benched.length === 1) this.endTrial(this.benched[0], true);
    }
    this.cleared = new Set([...this.cleared, ...meet(this.suspects, sites)]);
    if (this.cleared.size === this.suspects.size) this.cleared = new Set();
  }

  endTrial(site, guilty) {
    this.benched = this.benched.filter((other) => other !== site);
    if (guilty) this.leftOut = [...this.leftOut, site];
    if (!this.benched.length) this.proven = new Set();
  }
}

const CLOCKS = 300; // seconds by which two clocks may differ

/** What the log says of a candidate, and its rules. `common/log/gate.py` has the same, and the bound of canaries. */
class Gate {
  candidate = null;
  answered = new Set(); // sites that answered a round and have not left since
  made = new Set(); // adapters that its rounds led to
  spent = null;
  measured = null;
  reviews = new Map(); // the last of each site
  decision = null;
  exported = false;

  constructor(run) {
    this.run = run;
    this.terms = run.gate;
  }

  ended(run, said) {
    this.spent = said.epsilon;
    if (said.metrics && Object.keys(said.metrics).length) this.measured = said.metrics;
    const left = run.said.rounds - run.next + 1 - (run.skips ? 1 : 0);
    this.candidate = run.published.size && (run.ended || left <= 0) ? run.adapter : null;
  }

  leave(site) {
    this.answered.delete(site);
    if (this.reviews.get(site)?.verdict === "signed") this.reviews.delete(site);
  }

  state(time) {
    if (!this.decision) return this.candidate === null ? "running" : "candidate";
    if (this.decision.expires === null) return "refused";
    return time < this.decision.expires ? "accepted" : "expired";
  }

  checkCandidate(where, said) {
    if (this.candidate === null) throw new Fault(`${where}: the run has not ended, so it has no candidate`);
    expectEqual(`${where}: digest of the study`, this.run.study, said.study);
    expectEqual(`${where}: digest of the adapter`, this.candidate, said.adapter);
  }

  review(said) {
    const where = `run ${said.run}, review of site ${said.site}`, earlier = this.reviews.get(said.site);
    this.checkCandidate(where, said);
    if (!this.answered.has(said.site)) throw new Fault(`${where}: the site answered no round of the run, and so reviews nothing of it`);
    if (["accepted", "refused"].includes(this.state(said.time)) || this.exported) throw new Fault(`${where}: the candidate was decided about already`);
    if (earlier && said.time < earlier.expires && !(earlier.verdict === "signed" && said.verdict === "refused")) {
      throw new Fault(`${where}: the site has ${earlier.verdict} already; a signature may be followed by a refusal alone`);
    }
    if (said.expires > said.time + this.terms.days * 86400) throw new Fault(`${where}: the gate lets a review count for at most ${this.terms.days} days`);
    const lacking = ["membership", "repeated"].filter((each) => this.terms[each] !== null && !said.tested.includes(each));
    if (said.verdict === "signed" && lacking.length) throw new Fault(`${where}: the site signs without a test of ${lacking.join(", ")}`);
    this.reviews.set(said.site, said);
  }

  facts(time) {
    const standing = [...this.reviews.values()].filter((each) => each.verdict === "refused" || (each.time - CLOCKS <= time && time < each.expires));
    const signers = standing.filter((each) => each.verdict === "signed");
    const value = this.terms.metric === null ? undefined : this.measured?.[this.terms.metric];
    const quality = value === undefined ? null : this.terms.metric.endsWith("_loss") ? -value : value;
    const spent = this.spent ?? {}, stated = [...this.answered].every((site) => Object.hasOwn(spent, site));
    return {
      signers, quality, standing,
      epsilon: stated && Object.keys(spent).length ? Math.max(...Object.values(spent)) : null,
      signed: signers.map((each) => each.site).sort(),
      refused: standing.filter((each) => each.verdict === "refused").map((each) => each.site).sort(),
      expires: signers.length ? Math.min(...signers.map((each) => each.expires)) : null,
    };
  }

  decide(leaf, said) {
    const where = `run ${said.run}, egress decision`, { terms } = this;
    this.checkCandidate(where, said);
    if (["accepted", "refused"].includes(this.state(said.time)) || this.exported) throw new Fault(`${where}: the candidate was decided about already`);
    const facts = this.facts(said.time);
    for (const name of ["epsilon", "quality", "signed", "refused"]) expectEqual(`${where}: ${name}`, facts[name], said[name]);
    if ((said.bound === null) !== facts.standing.every((each) => each.canaries === null)) throw new Fault(`${where}: bound: there is one exactly where canaries were audited`);
    if (said.verdict === "accepted") {
      const fails = (name, holds) => {
        if (!holds) throw new Fault(`${where}: it accepts a candidate that fails the condition ${name}`);
      };
      const promise = this.run.privacy;
      fails("privacy", promise === null || facts.epsilon !== null && facts.epsilon <= Math.ceil(promise.epsilon * 10_000 - 1e-6) / 10_000);
      fails("canary", terms.canaries === null || facts.signers.some((each) => each.canaries && each.canaries.planted >= terms.canaries));
      fails("quality", terms.least === null || (facts.quality !== null && facts.quality >= terms.least));
      for (const each of facts.standing) fails(each.failed[0] ?? "", !each.failed.length);
      fails("signatures", facts.signed.length >= terms.signatures);
      expectEqual(`${where}: expires`, facts.expires, said.expires);
    }
    this.decision = said;
    this.leaf = leaf.hash;
  }

  export(said) {
    if (this.state(said.time) !== "accepted" && !this.exported) throw new Fault(`run ${said.run}: the export: no egress decision that holds has accepted the candidate`);
    expectEqual(`run ${said.run}: digest of the exported candidate`, this.candidate, said.adapter);
    this.exported = true;
  }
}

class History {
  genesis = null;
  members = new Map(); // by name
  left = []; // [member, leaf] of those that left
  joined = new Map(); // leaf, by name
  revoked = new Set(); // public keys of members that left
  quorum = 0;
  runs = new Map(); // by name
  epochs = []; // keys of log and coordinator, and the number of leaves from which they count
  accounts = new Map(); // by site and account: what its last statement says
  refusals = [];
  witnesses = new Set(); // vkeys that a member ever had
  keys = new Set(); // all public keys that there ever were
  owners = new Map(); // who may sign statements now, by public key; "" is the coordinator
  second = new Map(); // ML-DSA-65 keys, by public key of statements
  standing = new Map(); // checkpoint size and ledger in each site's last statement

  epochAt(number) {
    return this.epochs.findLast((epoch) => epoch.since <= number);
  }

  /** Check one leaf from its bytes up, and add it. `prepared` is what `prepareLeaf` found about its bytes. */
  async admit(index, prepared, tree) {
    if (prepared.fault) throw prepared.fault;
    const { envelope } = prepared;
    let said;
    if (this.genesis === null) {
      said = await parseStatement(envelope.payload);
      await checkSecond(envelope, said.type === "genesis" ? (await parseKey(said.log)).pq : new Uint8Array());
    } else {
      await checkSecond(envelope, this.second.get(envelope.key) ?? new Uint8Array());
      said = await parseStatement(envelope.payload);
    }
    const leaf = { index, hash: "sha256:" + hex(tree.levels[0][index]), key: envelope.key, said };
    await this.rule(leaf, said, tree);
    return leaf;
  }

  async rule(leaf, said, tree) {
    if (said.type === "genesis") return this.begin(leaf, said);
    if (this.genesis === null) throw new Fault("type of leaf 0", "genesis", said.type);
    const author = ["site-round", "refusal", "egress-review"].includes(said.type) ? said.site : "";
    if (this.owners.get(leaf.key) !== author) {
      throw new Fault(`the statement of type ${said.type}: its signer`,
        author ? `the current identity key of site ${author}` : "the coordinator's key", `key ${leaf.key.slice(0, 16)}`);
    }
    switch (said.type) {
      case "join": return this.join(leaf, said);
      case "revoke": return this.revoke(leaf, said);
      case "renew": return this.renew(said);
      case "rotate": return this.rotate(leaf, said, tree);
      case "run-open": return this.runOpen(leaf, said);
      case "round-open": return this.roundOpen(leaf, said);
      case "site-round": return this.siteRound(leaf, said, tree);
      case "round-close": return this.roundClose(leaf, said);
      case "round-abort": return this.roundAbort(leaf, said);
      case "refusal": return this.refusal(leaf, said);
      case "export": return this.export(leaf, said);
      case "egress-review": return this.gateOf(said.run).review(said);
      case "egress-decision":
        this.gateOf(said.run).decide(leaf, said);
        return this.runOf(said.run).proved.push([leaf.index, said.type]);
      default: return this.adapterState(leaf, said);
    }
  }

  // Members

  async begin(leaf, said) {
    if (leaf.index !== 0 || this.genesis) throw new Fault("place of a statement of type genesis", "leaf 0", `leaf ${leaf.index}`);
    if (leaf.key !== said.coordinator) throw new Fault("signer of the genesis", `the coordinator's key ${said.coordinator.slice(0, 16)}`, `key ${leaf.key.slice(0, 16)}`);
    const log = await parseKey(said.log);
    this.genesis = said;
    this.quorum = said.quorum;
    this.keys = new Set([...log.publics, leaf.key]);
    this.owners.set(leaf.key, "");
    this.second.set(leaf.key, log.pq);
    this.epochs = [{ since: 0, log, coordinator: leaf.key }];
    for (const member of said.members) await this.enter(member, leaf.index);
  }

  async enter(member, index) {
    for (const key of await publicsOf(member)) this.keys.add(key);
    this.members.set(member.site, member);
    this.owners.set(member.key, member.site);
    if (!this.joined.has(member.site)) this.joined.set(member.site, index);
    if (member.witness !== null) {
      this.witnesses.add(member.witness);
      this.second.set(member.key, (await parseKey(member.witness)).pq);
    }
  }

  async join(leaf, said) {
    const { member } = said;
    if (this.members.has(member.site)) throw new Fault(`join: site ${member.site} is a member already`);
    if ((await publicsOf(member)).some((key) => this.keys.has(key))) throw new Fault(`join: a key of site ${member.site} was used before in this log`);
    if (member.witness !== null) {
      const names = (await witnessesOf(this.members.values())).map((key) => key.name);
      if (names.includes((await parseKey(member.witness)).name)) throw new Fault(`join: site ${member.site} has the same witness name as another member`);
    }
    this.changeQuorum([...this.members.values(), member], said.quorum);
    this.joined.set(member.site, leaf.index);
    await this.enter(member, leaf.index);
  }

  async revoke(leaf, said) {
    const member = this.members.get(said.site);
    if (member?.key !== said.key) throw new Fault(`revoke: no member has the name ${said.site} and the identity key ${said.key.slice(0, 16)}`);
    this.changeQuorum([...this.members.values()].filter((other) => other !== member), said.quorum);
    this.members.delete(said.site);
    this.left.push([member, leaf.index, this.joined.get(said.site)]);
    for (const key of await publicsOf(member)) this.revoked.add(key);
    this.owners.delete(member.key);
    for (const run of this.runs.values()) run.gate?.leave(said.site);
  }

  async renew(said) {
    const present = this.members.get(said.member.site), renewed = said.member;
    if (!present) throw new Fault(`renew: the log has no member ${renewed.site}`);
    const was = present.witness && (await parseKey(present.witness)), now = renewed.witness && (await parseKey(renewed.witness));
    if (!was || !now || was.pq.length || !now.pq.length || present.key !== renewed.key) {
      throw new Fault(`renewal of ${present.site}: its keys`, "its present keys with an ML-DSA-65 key besides", "others");
    }
    if (was.name !== now.name || was.publics[0] !== now.publics[0]) throw new Fault(`renewal of ${present.site}: its cosigning key with Ed25519 must stay the same`);
    const text = joined(utf8("privet-renew/1\u0000"), utf8(canonical({ consortium: this.genesis.consortium, present, renewed })));
    if (!(await provesFirst(present.key, said.proof, text, true))) throw new Fault(`renewal of ${present.site}: its identity key and the new key have not both signed it`);
    if (this.keys.has(now.publics[1])) throw new Fault(`renew: the new key of site ${present.site} was used before in this log`);
    await this.enter(renewed);
  }

  async rotate(leaf, said, tree) {
    const present = this.epochs.at(-1), log = await parseKey(said.log);
    expectEqual("rotate: name of the log", present.log.name, log.name);
    if (present.log.pq.length && !log.pq.length) throw new Fault("rotate: the new key of the log lacks ML-DSA-65, which the present one has");
    const opened = [...this.runs.values()].find((run) => run.open !== null);
    if (opened) throw new Fault(`rotate: a round of run ${opened.said.run} is open; keys change between rounds`);
    if ([...log.publics, said.coordinator].some((key) => this.keys.has(key))) throw new Fault("rotate: a new key was used before in this log");
    const text = joined(utf8("privet-rotate/1\u0000"), utf8(canonical({
      consortium: this.genesis.consortium,
      index: leaf.index,
      root: hex(await tree.rootAt(leaf.index)),
      present: { log: present.log.text, coordinator: present.coordinator },
      new: { log: said.log, coordinator: said.coordinator },
      charter: said.charter,
    })));
    for (const [what, key, proof, both] of [["log", log.publics[0], said.log_proof, log.pq.length > 0], ["coordinator", said.coordinator, said.coordinator_proof, false]]) {
      if (!(await provesFirst(key, proof, text, both))) throw new Fault(`rotate: the new key of the ${what} has not signed for this place in this log`);
    }
    this.epochs.push({ since: leaf.index + 1, log, coordinator: said.coordinator });
    for (const key of [...log.publics, said.coordinator]) this.keys.add(key);
    this.owners.delete(present.coordinator);
    this.owners.set(said.coordinator, "");
    this.second.set(said.coordinator, log.pq);
  }

  changeQuorum(members, needed) {
    checkQuorum(members.filter((member) => member.witness !== null).length, needed);
    this.quorum = needed;
  }

  // Runs and rounds

  runOpen(leaf, said) {
    if (this.runs.has(said.run)) throw new Fault(`run-open: the log has a run named ${said.run} already`);
    const { floor } = this.genesis, promise = said.privacy;
    for (const [what, most, given] of [["epsilon", floor.max_epsilon, promise?.epsilon], ["delta", floor.max_delta, promise?.delta]]) {
      if (most !== null && !(given <= most)) throw new Fault(`run ${said.run}: ${what}, by the genesis (leaf 0)`, `at most ${most}`, given ?? "no privacy");
    }
    if (said.min_sites < floor.min_sites) throw new Fault(`run ${said.run}: sites in a sum, by the genesis (leaf 0)`, `at least ${floor.min_sites}`, said.min_sites);
    this.checkWithheld(`run ${said.run} begins`, said.adapter, null);
    this.runs.set(said.run, {
      gate: said.gate ? new Gate(said) : null, said, index: leaf.index, adapter: said.adapter, next: 1, skips: false, published: new Map(), rounds: new Map(), nonces: new Map(),
      open: null, ended: false, releases: [], isolation: new Isolation(), proved: [[leaf.index, said.type]], ends: new Map(), change: null,
    });
  }

  runOf(name) {
    const run = this.runs.get(name);
    if (!run) throw new Fault(`run ${name}: the log has no run-open statement that opens this run`);
    return run;
  }

  async roundOpen(leaf, said) {
    const run = this.runOf(said.run), where = `run ${said.run}, round ${said.round}`;
    if (run.ended || said.round > run.said.rounds) throw new Fault(`${where}: the round was opened after the run had ended`);
    if (run.open !== null) throw new Fault(`${where}: the round was opened while round ${run.rounds.get(run.open).said.round} was still open`);
    if (!(run.skips && said.round === run.next + 1)) expectEqual(`${where}: number of the opened round`, run.next, said.round);
    expectEqual(`${where}: digest of the adapter with which the round was opened`, run.adapter, said.adapter);
    if (run.nonces.has(said.nonce)) throw new Fault(`${where}: an earlier round of the run had the same nonce, which must be new in every round`);
    const stranger = (said.participants ?? said.cohort).find((site) => !this.members.has(site));
    if (stranger !== undefined) throw new Fault(`${where}: ${stranger} takes part, but is not a member of the consortium`);
    const out = said.cohort.find((site) => run.isolation.leftOut.includes(site));
    if (out !== undefined) throw new Fault(`${where}: ${out} is in the cohort, but was left out, as it spoiled sums of the run`);
    if (said.cohort.length < run.said.min_sites) throw new Fault(`${where}: sites in the cohort`, `at least ${run.said.min_sites}`, said.cohort.length);
    const plain = run.said.secure_aggregation === "plain";
    if ((said.parameters === null) !== plain) throw new Fault(`${where}: parameters of secure aggregation`, plain ? "none" : "some", plain ? "some" : "none");
    if (!plain) {
      const identities = Object.fromEntries(said.cohort.map((site) => [site, this.members.get(site).key]));
      expectEqual(`${where}: parameters, the digest of the cohort's identity keys`, await digestOf(utf8(canonical(identities))), said.parameters);
    }
    run.rounds.set(leaf.hash, { said, index: leaf.index, answered: new Set() });
    run.nonces.set(said.nonce, leaf.hash);
    if (run.gate) {
      if (run.gate.reviews.size || run.gate.decision) throw new Fault(`${where}: the round was opened after sites had reviewed the candidate`);
      run.gate.candidate = null;
    }
    [run.next, run.skips, run.open] = [said.round, false, leaf.hash];
  }

  async siteRound(leaf, said, tree) {
    const run = this.runOf(said.run), where = `run ${said.run}, round ${said.round}, site ${said.site}`, opened = run.rounds.get(said.opened);
    if (opened?.said.round !== said.round) throw new Fault(`${where}: the site's statement names a round-open statement that the log does not have for this round`);
    if (!opened.said.cohort.includes(said.site) || opened.answered.has(said.site)) {
      throw new Fault(`${where}: the site is not in the round's cohort, or the log has its statement about this round already`);
    }
    const standing = this.standing.get(said.site) ?? { checkpoint: 0, ledger: null }, seen = said.checkpoint;
    const least = Math.max(opened.index + 1, standing.checkpoint);
    if (!(least <= seen.size && seen.size <= leaf.index)) {
      throw new Fault(`${where}: leaves of the checkpoint that the site quotes`, `at least ${least} and at most ${leaf.index}`, seen.size);
    }
    expectEqual(`${where}: root hash of the checkpoint of ${seen.size} leaves that the site quotes`, hex(await tree.rootAt(seen.size)), seen.root);
    const ledger = this.ledgerAfter(where, standing, said);
    if (said.charge !== null) this.checkCharge(where, run, said);
    else if (run.said.privacy !== null) throw new Fault(`${where}: the run is private, but the site's statement has no privacy cost`);
    opened.answered.add(said.site);
    run.gate?.answered.add(said.site);
    this.standing.set(said.site, { checkpoint: seen.size, ledger });
    if (said.charge !== null) this.accounts.set(`${said.site} ${said.charge.account}`, { site: said.site, index: leaf.index, ...said.charge });
  }

  ledgerAfter(where, standing, said) {
    if (said.ledger === null) {
      if (standing.ledger !== null) throw new Fault(`${where}: the site's last statement named the state of its ledger, but this statement does not`);
      return null;
    }
    const before = standing.ledger ?? { sequence: 0, head: null };
    expectEqual(`${where}: hash of the newest ledger entry in the site's last statement`, before.head, said.ledger.previous);
    if (said.ledger.sequence < before.sequence || (said.ledger.sequence === before.sequence && said.ledger.head !== before.head && standing.ledger !== null)) {
      throw new Fault(`${where}: the site's ledger is an older copy: its last entry`, `one after entry ${before.sequence}`, `entry ${said.ledger.sequence} of a different history`);
    }
    return { sequence: said.ledger.sequence, head: said.ledger.head };
  }

  checkCharge(where, run, said) {
    const { charge } = said, promise = run.said.privacy;
    if (promise === null) throw new Fault(`${where}: the site's statement has a privacy cost, but the run is not private`);
    const training = said.round === 1 && promise.head ? promise.head : promise.training;
    expectEqual(`${where}: mechanism (noise, sampling rate, steps) in the site's statement`, [training, promise.validation], [charge.training, charge.validation]);
    const before = this.accounts.get(`${said.site} ${charge.account}`) ?? { epsilon: 0, delta: charge.delta };
    expectEqual(`${where}: delta of the site's ledger account ${charge.account}`, before.delta, charge.delta);
    if (charge.epsilon < before.epsilon) throw new Fault(`${where}: epsilon spent in the site's ledger, which cannot fall`, `at least ${before.epsilon}`, charge.epsilon);
    if (charge.limit !== null && charge.epsilon > charge.limit) throw new Fault(`${where}: epsilon spent by the site`, `at most its limit of ${charge.limit}`, charge.epsilon);
  }

  openRound(said) {
    const run = this.runOf(said.run), round = run.rounds.get(run.open);
    if (run.open === null || run.open !== said.opened || round.said.round !== said.round) {
      throw new Fault(`run ${said.run}, round ${said.round}: the statement of type ${said.type} is about a round that is not open`);
    }
    return [run, round];
  }

  roundClose(leaf, said) {
    const [run, opened] = this.openRound(said), where = `run ${said.run}, round ${said.round}`;
    expectEqual(`${where}: digest of the adapter before the round, in its round-close`, opened.said.adapter, said.adapter_before);
    const cohort = new Set(opened.said.cohort), survivors = new Set(said.survivors), failed = Object.keys(said.failures);
    if (!within([...survivors, ...failed], cohort) || failed.some((site) => survivors.has(site))) {
      throw new Fault(`${where}: each survivor and each failed site must be in the cohort, and no site may be both`);
    }
    if (said.survivors.length < run.said.min_sites) throw new Fault(`${where}: survivors (sites in the sum)`, `at least ${run.said.min_sites}`, said.survivors.length);
    const silent = said.survivors.find((site) => !opened.answered.has(site));
    if (silent !== undefined) throw new Fault(`${where}: ${silent} is a survivor, but the log has no site-round statement of it for this round`);
    const plain = run.said.secure_aggregation === "plain";
    if ((said.transcript === null) !== plain) throw new Fault(`${where}: transcript of secure aggregation`, plain ? "none" : "one", plain ? "one" : "none");
    const earlier = [...run.rounds.values()].some((round) => round.said.adapter === said.adapter_published);
    if (said.adapter_published !== said.adapter_after && !said.average && !earlier) {
      throw new Fault(`${where}: published adapter`, "the round's new adapter, or one from which a round of the run started", said.adapter_published);
    }
    this.endRound(where, run, opened, said);
    run.adapter = said.adapter_published;
    run.published.set(said.round, said.adapter_published);
    [run.next, run.open, run.ended] = [said.round + 1, null, said.ended];
    run.gate?.ended(run, said);
    run.gate?.made.add(said.adapter_after).add(said.adapter_published);
    run.proved.push([leaf.index, said.type]);
  }

  roundAbort(leaf, said) {
    const [run, opened] = this.openRound(said), where = `run ${said.run}, round ${said.round}`;
    expectEqual(`${where}: digest of the adapter in its round-abort`, opened.said.adapter, said.adapter);
    const stranger = Object.keys(said.failures).find((site) => !opened.said.cohort.includes(site));
    if (stranger !== undefined) throw new Fault(`${where}: site ${stranger} failed, but is not in the round's cohort`);
    this.endRound(where, run, opened, said);
    if (run.said.secure_aggregation === "masked") run.next = said.round + 1;
    else run.skips = true;
    run.open = null;
    run.gate?.ended(run, said);
  }

  /** Check costs, spoiled sums and who is left out for them; all checks have passed where it returns. */
  endRound(where, run, opened, said) {
    if ((said.epsilon === null) !== (run.said.privacy === null)) {
      throw new Fault(`${where}: the end of a round must state each site's epsilon if the run is private, and none if it is not`);
    }
    const cohort = new Set(opened.said.cohort), spoiled = said.spoiled ?? [], survivors = said.survivors ?? [];
    if (spoiled.some((names) => !within(names, cohort))) throw new Fault(`${where}: a spoiled sum names a site that is not in the cohort`);
    if (spoiled.length && run.said.secure_aggregation === "plain") throw new Fault(`${where}: only a masked sum can be spoiled without a name, and the run masks nothing`);
    if (spoiled.some((names) => names.some((name) => survivors.includes(name)))) throw new Fault(`${where}: a survivor is said to be in a sum that could not be used`);
    const sums = spoiled.map((names) => (names.length ? names : opened.said.cohort));
    const isolation = run.isolation.after(sums, said.type === "round-close" ? [survivors] : []);
    const news = minus(new Set(isolation.leftOut), new Set(run.isolation.leftOut)).sort();
    expectEqual(`${where}: sites that are left out from here on, as the sums of the run say`, news.length ? news : null, said.left_out ?? null);
    run.isolation = isolation;
    run.ends.set(said.opened, said);
  }

  refusal(leaf, said) {
    const run = this.runOf(said.run).said, where = `${said.site} refuses run ${said.run}`;
    expectEqual(`${where}: digest of the study`, run.study, said.study);
    if (said.round > run.rounds) throw new Fault(`${where}: round`, `at most ${run.rounds}`, said.round);
    this.refusals.push(said);
  }

  // Releases

  gateOf(name) {
    const { gate } = this.runOf(name);
    if (!gate) throw new Fault(`run ${name}: its study has no gate, so its adapter is no candidate`);
    return gate;
  }

  checkWithheld(where, adapter, own) {
    const gated = [...this.runs].filter(([, run]) => run.gate);
    if (gated.some(([, run]) => run.gate.exported && run.gate.candidate === adapter)) return;
    for (const [name, run] of gated) {
      if (adapter !== run.said.adapter && run !== own && run.gate.made.has(adapter)) throw new Fault(`${where}: the gate of run ${name} withholds adapter ${adapter}`);
    }
  }

  export(leaf, said) {
    const run = this.runOf(said.run);
    if (!run.published.has(said.round)) throw new Fault(`run ${said.run}: the export names round ${said.round}, but the log has no round-close of it`);
    expectEqual(`run ${said.run}: digest of the exported adapter of round ${said.round}`, run.published.get(said.round), said.adapter);
    this.checkWithheld(`run ${said.run}`, said.adapter, run);
    run.gate?.export(said);
    let change = null;
    for (const [name, other] of this.runs) {
      for (const each of other.releases) {
        if (each.said.adapter !== said.adapter || !(name === said.run || stateOf(each) === "revoked") || !each.change) continue;
        if (!change || STATES.indexOf(each.change.state) > STATES.indexOf(change.state)) change = each.change;
      }
    }
    run.releases.push({ said, index: leaf.index, change });
    run.proved.push([leaf.index, said.type]);
  }

  adapterState(leaf, said) {
    const run = this.runOf(said.run), where = `run ${said.run}, adapter ${said.adapter}`;
    const released = run.releases.findLast((each) => each.said.adapter === said.adapter);
    if (!released) throw new Fault(`${where}: the log has no export statement of it`);
    if (STATES.indexOf(said.state) <= STATES.indexOf(stateOf(released))) throw new Fault(`${where}: it is ${stateOf(released)}, so it does not become ${said.state}`);
    if (said.by !== null) {
      if (said.by === said.run) throw new Fault(`${where}: what supersedes it`, "the release of another run", "its own run");
      if (!this.runOf(said.by).releases.some((each) => STATES.indexOf(stateOf(each)) < 2)) throw new Fault(`${where}: run ${said.by} has no release that is in use`);
    }
    for (const [name, other] of this.runs) {
      for (const each of other.releases) {
        if (each.said.adapter === said.adapter && (name === said.run || said.state === "revoked")) each.change = said;
      }
    }
    run.change = said;
    run.proved.push([leaf.index, said.type]);
  }
}

const stateOf = (release) => release.change?.state ?? STATES[0];

/** Whether the Ed25519 half of a proof of possession matches, and the half with ML-DSA-65 is there where it must be. */
async function provesFirst(key, proof, text, both) {
  const bytes = unhex(proof);
  return bytes.length === 64 + (both ? ML_DSA_SIGNATURE : 0) && signedBy(key, bytes.subarray(0, 64), text);
}

/** What can be found about a leaf's bytes without the history. */
async function prepareLeaf(data) {
  try {
    const envelope = parseEnvelope(data);
    await checkAuthor(envelope);
    return { envelope };
  } catch (fault) {
    return { fault };
  }
}
