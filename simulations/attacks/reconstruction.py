"""Reconstruction: recover the tokens of a record from the update of a site.

With A frozen, the gradient of B in a layer y = W x + s B A x is s Σ_t dy_t (A x_t)ᵀ. Every row of it lies in the span
of the projected inputs A x_t. In the first block, x_t depends only on one token and its position. A coordinator can
therefore project every token of the vocabulary at every position, and keep the tokens in the span (the span check of
DAGER, Petrov et al. 2024, arXiv:2405.15586, on the projections that LoRA leaves of it). If an update holds fewer token
positions than the rank, other tokens lie outside the span, and the kept tokens are those of the record. If it holds
more, every vector lies in the span, and the check separates nothing. SGD keeps the span over any number of steps. A sum
over sites keeps it too: the sum hides words only if it holds more token positions than the rank, or noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from privet.client.release.separation import clopper_pearson
from privet.client.training.data import Records
from privet.client.training.features import Feature, encode_records
from privet.client.training.host import ModelHost
from privet.common.errors import StudyError
from privet.common.privacy.noise import SeededRandomness
from privet.common.progress import Say
from privet.common.study.adapter import Adapter
from privet.common.study.study import Study
from privet.simulations.attacks.arms import Workshop, at_epsilon, in_the_clear

_Array = NDArray[np.floating[Any]]

ROUND = 2
"""The round whose update is attacked. In round 1 the head is zero, so no gradient reaches the adapter."""
# Directions of an update that are weaker than this, relative to the strongest, are rounding errors.
_TOLERANCE = 1e-6
# Fractions of the directions that an attacker keeps if none is a rounding error.
_PARTS = (3 / 4, 1 / 2, 1 / 4)
_CHUNK = 256


@dataclass(frozen=True)
class ObservedUpdate:
    """One update as its receiver sees it.

    Attributes:
        before: The adapter at the start of the round.
        after: The adapter that the round released. The difference is the update.
        records: The records behind the update, to score the attack; the attacker knows only their number.
    """

    before: Adapter
    after: Adapter
    records: Sequence[Feature]


class _Captured(Exception):  # noqa: N818 - not an error: it ends a forward pass once the input is known
    """Carries a layer's input out of a forward pass."""


def exposed_study(study: Study, rank: int) -> Study:
    """Return the study for the attack: the worst case for the update of one site.

    Base, task, data and LoRA targets stay. All layers are adapted at the given rank, a round is one small step of SGD
    on all records of a site, and the coordinator adds the mean update to the adapter unchanged.
    """
    lora = study.lora.model_copy(update={"layers": None, "dropout": 0.0, "rank": rank, "rank_pattern": {}})
    document = study.document()
    document["training"] = {
        "optimizer": "sgd",
        "rounds": ROUND,
        "local_steps": 1,
        "sampling_rate": 1.0,
        # Small steps: a head that has already learnt its one record would let no gradient through.
        "learning_rate": 0.01,
        "head_learning_rate": 0.1,
    }
    document["aggregation"] = {"method": "ffa"}
    document["data"]["validation_fraction"] = 0.0
    document["lora"] = lora.model_dump(mode="json")
    document["privacy"] = {"mode": "none"}
    document["cohort"] = {"min_sites": 3}
    document["secure_aggregation"] = {"mode": "masked"}
    return Study.parse(document)


def draw(records: Records, sites: int, seed: int) -> tuple[dict[str, Records], Records]:
    """Return one record for each site, and as many others that no site has, drawn at random.

    Raises:
        StudyError: There are fewer than 3 sites, or fewer than two records for each site.
    """
    if sites < 3 or len(records) < 2 * sites:
        raise StudyError(
            "reconstruction attack: expected 3 sites or more and at least 2 records per site, "
            f"got {sites} sites and {len(records)} records in all",
            "set --sites to 3 or more, or give the study more records",
        )
    order = [int(i) for i in np.argsort(SeededRandomness(seed, "secrets").uniform(len(records)))]
    secrets = {f"site-{number}": records.select([order[number]]) for number in range(sites)}
    return secrets, records.select(order[sites : 2 * sites])


def first_layers(host: ModelHost, adapter: Adapter) -> list[str]:
    """Return the names of adapted layers whose input at a position depends only on the token at that position.

    Raises:
        StudyError: There is no such layer.
    """
    names = [a.removesuffix(".lora_A.weight") for a, _ in adapter.spec.pairs()]
    # Two texts that differ in the first token: a layer whose second input stays the same sees single tokens.
    changed = torch.tensor([[5, 7], [6, 7]], device=host.device)
    found = []
    for name in names:
        seen = _inputs(host, name, changed)
        if torch.equal(seen[0, 1], seen[1, 1]):
            found.append(name)
    if not found:
        raise StudyError(
            "reconstruction attack: lora.targets of the study names no layer whose input depends on one token only; "
            "the attack reads tokens from the gradients of such a layer",
            "name the query, key or value projections of the base model in lora.targets of the study",
        )
    return found


def _inputs(host: ModelHost, layer: str, ids: torch.Tensor) -> torch.Tensor:
    """Return a layer's inputs [n, t, width] for token ids [n, t]."""
    module = host.model.get_submodule(layer)
    caught: list[torch.Tensor] = []

    def stop(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        caught.append(inputs[0].detach())
        raise _Captured

    handle = module.register_forward_pre_hook(stop)
    try:
        with torch.no_grad(), host.computing():
            host.model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except _Captured:
        pass
    finally:
        handle.remove()
    return caught[0].float()


def residuals(host: ModelHost, updates: Sequence[ObservedUpdate], positions: int) -> list[list[_Array]]:
    """Return the distance of each token at each position from the span of each update, relative to its length.

    Args:
        host: The model.
        updates: The updates to attack.
        positions: Number of tokens of the longest record.

    Returns:
        For each update, one array [positions, vocabulary] for each cut of its directions (`_spans`).

    Raises:
        StudyError: The input of no adapted layer depends on a single token.
    """
    host.model.eval()
    try:
        layers = first_layers(host, updates[0].before)
        size = len(host.tokenizer)
        spans = [_spans([_difference(seen, f"{layer}.lora_B.weight") for layer in layers]) for seen in updates]
        found = [[np.zeros((positions, size), np.float32) for _ in cuts] for cuts in spans]
        for start in range(0, size, _CHUNK):
            tokens = torch.arange(start, min(start + _CHUNK, size), device=host.device)
            # These layers all read the same input, so one forward pass serves all of them.
            inputs = _inputs(host, layers[0], tokens.unsqueeze(1).expand(-1, positions).contiguous())
            for number, layer in enumerate(layers):
                for seen, cuts, arrays in zip(updates, spans, found, strict=True):
                    a = torch.from_numpy(seen.before.values[f"{layer}.lora_A.weight"]).to(host.device)  # [r, in]
                    projected = inputs @ a.T  # [chunk, t, r]
                    lengths = projected.norm(dim=-1)
                    for cut, array in zip(cuts, arrays, strict=True):
                        outside = torch.from_numpy(cut[number]).float().to(host.device)  # [r - k, r]
                        left = ((projected @ outside.T).norm(dim=-1) / lengths).T.cpu().numpy()  # [t, chunk]
                        # A token of the record lies in the span of every layer, so the largest distance counts.
                        part = array[:, start : start + len(tokens)]
                        np.maximum(part, left, out=part)
    finally:
        host.model.train()
    return found


def _difference(seen: ObservedUpdate, name: str) -> _Array:
    return seen.after.values[name].astype(np.float64) - seen.before.values[name].astype(np.float64)


def _spans(updates: Sequence[_Array]) -> list[list[_Array]]:
    """Return, for each cut, the directions [r - k, r] outside the k kept directions of each layer's update [out, r].

    The first cut drops the directions that are rounding errors. If there is none, every vector lies in the span. An
    attacker can then still guess that the strongest directions belong to words: the other cuts keep a fraction of them.
    """
    decomposed = [np.linalg.svd(update)[1:] for update in updates]
    kept = [int((s > _TOLERANCE * max(s[0], np.finfo(np.float64).tiny)).sum()) for s, _ in decomposed]
    cuts = [kept]
    if all(k == len(rows) for k, (_, rows) in zip(kept, decomposed, strict=True)):
        cuts = [[int(part * k) for k in kept] for part in _PARTS]
    return [[rows[k:] for k, (_, rows) in zip(cut, decomposed, strict=True)] for cut in cuts]


def count_recovered(
    host: ModelHost, arrays: Sequence[_Array], secrets: Sequence[Feature], allowed: int
) -> tuple[int, int, int]:
    """Return the number of recovered tokens, the number of all tokens, and the number of secrets recovered in full.

    A token is recovered if at most `allowed` tokens at its position, itself included, are as near to the span: one for
    each record in the update. Special tokens are not secret and do not count. The best of several cuts counts.
    """
    special = set(host.tokenizer.all_special_ids)
    places = [(p, token, n) for n, s in enumerate(secrets) for p, token in enumerate(s.ids) if token not in special]
    best = (-1, 0)
    for array in arrays:
        hits = [int((array[p] <= array[p, token]).sum()) <= allowed for p, token, _ in places]
        missed = {n for (_, _, n), hit in zip(places, hits, strict=True) if not hit}
        best = max(best, (sum(hits), len(secrets) - len(missed)))
    return best[0], len(places), best[1]


def run_reconstruction(
    workshop: Workshop,
    study: Study,
    secrets: Mapping[str, Records],
    others: Records,
    *,
    epsilon: float,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Try to recover one record of each site from its update, from an update with privacy, and from the secure sum.

    Args:
        workshop: Runs the studies. Its precision must be fp32, or rounding errors hide the span.
        study: The study that `exposed_study` returns.
        secrets: One record for each site.
        others: Records that no site has; they show what the attack finds by chance.
        epsilon: Epsilon of the update with privacy.
        say: Receives a line for each result.

    Raises:
        PrivetError: A round failed, or the attack cannot be tried on the base model.
    """
    host = workshop.host(study)
    features = {site: encode_records(study, host.tokenizer, records) for site, records in secrets.items()}
    absent = encode_records(study, host.tokenizer, others)
    positions = max(len(f.ids) for rows in [*features.values(), absent] for f in rows)
    alone = in_the_clear(study)
    arms: dict[str, list[ObservedUpdate]] = {}
    for name, arm in (
        ("one site, no protection", alone),
        (f"one site, epsilon {epsilon:g}", at_epsilon(alone, epsilon)),
    ):
        trails = {site: workshop.run(f"{name} {site}", arm, {site: secrets[site]}) for site in secrets}
        arms[name] = [_seen(trails[site].adapters, features[site]) for site in secrets]
    # The coordinator of a masked round sees only this: the sum, as the difference of two adapters.
    together = workshop.run("sum", study, secrets)
    every = [feature for rows in features.values() for feature in rows]
    arms[f"secure sum of {len(secrets)} sites"] = [_seen(together.adapters, every)]
    flat = [seen for updates in arms.values() for seen in updates]
    found = iter(residuals(host, flat, positions))
    results = []
    for name, updates in arms.items():
        counts = np.zeros(3, int)
        control = np.zeros(3, int)
        for seen in updates:
            arrays = next(found)
            # Each record has its own token at a position, so as many tokens are in the span there.
            allowed = len(seen.records)
            counts += count_recovered(host, arrays, seen.records, allowed)
            control += count_recovered(host, arrays, absent, allowed)
        recovered, tokens, whole = (int(value) for value in counts)
        low, high = clopper_pearson(recovered, tokens)
        chance = float(control[0] / control[1])
        results.append(
            {
                "arm": name,
                "tokens": tokens,
                "recovered": recovered / tokens,
                "interval": (low, high),
                "records": sum(len(seen.records) for seen in updates),
                "records_exact": whole,
                "control": chance,
                "at_chance": low <= clopper_pearson(int(control[0]), int(control[1]))[1],
            }
        )
        say(
            f"{name}: recovered {recovered} of {tokens} tokens, and {whole} whole records; "
            f"chance alone recovers {100 * chance:.1f} % of tokens"
        )
    return {
        "attack": "reconstruction",
        "study": study.name,
        "study_digest": study.digest,
        "seed": study.seed,
        "rank": study.lora.rank,
        "vocabulary": len(host.tokenizer),
        "positions": positions,
        "arms": results,
    }


def _seen(adapters: Sequence[Adapter], records: Sequence[Feature]) -> ObservedUpdate:
    return ObservedUpdate(adapters[ROUND - 1], adapters[ROUND], records)
