"""Local counts of what adapters answer: drift, published figures, files, threads, and the alerts in `deploy/`."""

from __future__ import annotations

import json
import math
import random
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from privet.client.network.telemetry import SiteMetrics
from privet.client.release.applied import NO_TEXT, characters, count
from privet.client.release.counts import (
    CHARACTERS,
    CONFIDENCE,
    LEAST,
    NO_SPAN,
    WINDOW,
    Counts,
    Outcome,
    State,
    by_chance,
    classes_of,
    divergence,
    stability,
)
from privet.client.release.monitoring import Monitor, keep_reference
from privet.common.errors import StateError
from privet.server.studies import RunMetrics
from tests.conftest import Run
from tests.layout.survey import imports, sources
from tests.support.pages import ROOT
from tests.support.released import run_of
from tests.support.tiny import tiny_study, write_rows

CLASSES = ("asthma", "flu")
ADAPTER = "sha256:" + "0" * 64


def monitor(directory: Path | None = None, adapter: str = ADAPTER) -> Monitor:
    return Monitor({"one": (adapter, CLASSES)}, directory)


def answer(counts: Counts, times: int, label: str = "flu", size: int = 20, sure: float = 0.9) -> None:
    for _ in range(times):
        counts.answered(Outcome(size, (label,), (sure,)))


def published(source: Monitor) -> dict[str, float]:
    text = generate_latest(source.registry).decode()
    return {
        f"{sample.name}{sorted(value for key, value in sample.labels.items() if key != 'model')}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_indices_of_known_histograms() -> None:
    assert divergence([3, 1], [6, 2]) == pytest.approx(0)
    assert divergence([5, 0], [0, 9]) == pytest.approx(1)
    # Lin 1991, eq. 3.1: the entropy of the mean less the mean of the entropies.
    p, q = (0.75, 0.25), (0.25, 0.75)

    def entropy(shares: tuple[float, ...]) -> float:
        return -sum(x * math.log2(x) for x in shares)

    assert divergence([3, 1], [1, 3]) == pytest.approx(entropy((0.5, 0.5)) - (entropy(p) + entropy(q)) / 2)
    assert stability([300, 100], [100, 300]) == pytest.approx(2 * 0.5 * math.log(3), rel=0.01)
    assert stability([10, 10, 0], [10, 10, 0]) == 0


def test_chance_exceeds_its_bound_about_once_in_a_thousand() -> None:
    drawn = random.Random(7)

    def sample(size: int) -> list[int]:
        found = [0] * 6
        for _ in range(size):
            found[min(int(drawn.expovariate(0.5)), 5)] += 1
        return found

    pairs = [(sample(500), sample(200)) for _ in range(1500)]
    beyond = sum(stability(now, then) > by_chance(now, then) for now, then in pairs)
    assert beyond <= 10  # 1.5 are expected; 11 or more have a probability below 1e-6


def test_drift_is_measured_over_recent_inputs_and_beyond_chance(tmp_path: Path) -> None:
    reference = monitor()["one"]
    answer(reference, 400, "flu")
    answer(reference, 400, "asthma", size=200)
    file = keep_reference(tmp_path, "one", reference)
    assert file.stat().st_mode & 0o077 == 0
    with pytest.raises(StateError, match=r"one\.reference\.json"):
        keep_reference(tmp_path, "one", reference)

    watched = monitor(tmp_path)
    for _ in range(WINDOW // 2):
        answer(watched["one"], 1, "flu")
        answer(watched["one"], 1, "asthma", size=200)
    figures = published(watched)
    assert figures["privet_model_drift['classes', 'psi']"] == 0 <= figures["privet_model_drift_by_chance['classes']"]
    answer(watched["one"], 3 * WINDOW, "flu", size=40_000, sure=0.3)
    figures = published(watched)
    assert figures["privet_model_recent_inputs[]"] == 2 * WINDOW  # the old ones are forgotten
    assert figures["privet_model_inputs_total[]"] == 4 * WINDOW
    for part in ("classes", "characters", "confidence"):
        assert figures[f"privet_model_drift['{part}', 'psi']"] > 2 * figures[f"privet_model_drift_by_chance['{part}']"]
        assert 0 < figures[f"privet_model_drift['{part}', 'js']"] <= 1
    with watched.kept():
        pass
    with pytest.raises(StateError, match="counts the answers of another adapter") as caught:
        monitor(tmp_path, "sha256:" + "1" * 64)
    assert "mv " in str(caught.value.hint)


def test_counts_have_no_way_out() -> None:
    """What counts imports nothing that could send, and nothing that sends imports what counts."""
    counting = {"privet.client.release.counts", "privet.client.release.monitoring"}
    sending = re.compile(r"(socket|ssl|http|urllib|requests|grpc|flwr|privet\.client\.(network|rounds))\b")
    for module in counting:
        file = module.removeprefix("privet.").replace(".", "/") + ".py"
        assert not [name for name in imports(file) if sending.match(name)]
    others = sources("client/network", "client/rounds", "client/budget", "common", "server")
    for file in others:
        assert not [name for name in imports(file) if name.startswith(tuple(counting))], file


def test_no_step_of_a_published_figure_is_one_input_s() -> None:
    assert LEAST == 10  # as docs/use.md promises
    watched = monitor()
    answer(watched["one"], LEAST - 1)
    assert published(watched)["privet_model_inputs_total[]"] == 0
    answer(watched["one"], 1, "asthma", sure=0.2)
    before = published(watched)
    assert before["privet_model_inputs_total[]"] == LEAST
    assert before["privet_model_predictions_total['flu']"] == before["privet_model_predictions_total['asthma']"] == 0
    answer(watched["one"], LEAST - 1, "asthma")
    assert published(watched) == before
    drawn = random.Random(1)
    for _ in range(200):
        answer(watched["one"], drawn.randrange(1, 15), drawn.choice(CLASSES), drawn.randrange(9000), drawn.random())
        now = published(watched)
        moved = {name for name, value in now.items() if value != before[name]}
        assert not moved or now["privet_model_inputs_total[]"] - before["privet_model_inputs_total[]"] >= LEAST
        assert all(value % LEAST == 0 for name, value in now.items() if "predictions" in name or "bucket" in name)
        before = now


def test_counts_survive_a_restart_and_one_process_keeps_them(tmp_path: Path) -> None:
    first = monitor(tmp_path)
    with pytest.raises(StateError, match="another process counts the answers of one"):
        monitor(tmp_path)
    with first.kept():
        answer(first["one"], 25)
        first["one"].refused("no_text")
    again = monitor(tmp_path)
    with again.kept():
        assert again["one"].state() == first["one"].state()
        assert published(again) == published(first)
        answer(again["one"], 5)
    last = json.loads((tmp_path / "one.counts.json").read_text())
    assert (last["total"]["inputs"], last["refused"]["no_text"]) == (30, 1)
    assert (tmp_path / "one.counts.json").stat().st_mode & 0o077 == 0
    text = (tmp_path / "one.prom").read_text()
    assert 'privet_model_inputs_total{model="one"} 25.0' in text
    assert text == generate_latest(again.registry).decode()
    failing = monitor(tmp_path)
    answer(failing["one"], 50)
    with pytest.raises(ZeroDivisionError), failing.kept(always=False):
        raise ZeroDivisionError
    assert json.loads((tmp_path / "one.counts.json").read_text()) == last
    failing.save()  # it has left the directory
    assert json.loads((tmp_path / "one.counts.json").read_text()) == last
    (tmp_path / "one.counts.json").write_text('{"format": 1}')
    with pytest.raises(StateError, match="cannot be read"):
        monitor(tmp_path)


def test_threads_lose_no_count_and_memory_is_bounded() -> None:
    watched = monitor()["one"]
    size = len(watched.state().model_dump_json())
    threads = [threading.Thread(target=answer, args=(watched, 2000, label)) for label in CLASSES * 2]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    found = watched.state()
    assert (found.total.inputs, found.total.classes) == (8000, [4000, 4000])
    assert WINDOW <= found.window.inputs + found.before.inputs <= 2 * WINDOW
    assert len(found.model_dump_json()) < size + 500


def test_counting_takes_less_than_a_hundredth_of_a_prediction() -> None:
    watched, outcome = monitor()["one"], Outcome(500, ("flu",), (0.7,))

    def spent() -> float:
        began = time.thread_time()
        for _ in range(1000):
            watched.answered(outcome)
        return (time.thread_time() - began) / 1000

    assert min(spent() for _ in range(5)) < 20e-6  # a text takes the demo's base, of 22 million parameters, 2.2 ms


def test_results_of_each_task_are_counted(bert: Path) -> None:
    tags = tiny_study(bert, **{"task.kind": "token-classification"})
    classes = classes_of(tags)
    assert classes[-1] == NO_SPAN
    watched = Counts(State.new(ADAPTER, classes))
    span = {"label": classes[0], "probability": 0.97}
    count(watched, ["a", "bc"], {"spans": [span, span]})
    count(watched, "a b", {"spans": []})
    count(watched, None, {"reason": NO_TEXT})
    count(watched, 5, {"reason": "not text, but int"})
    count(watched, [], {"reason": "the prompt has 9000 tokens, and the model has room for 4096"})
    found = watched.state()
    assert found.total.classes == [2, *([0] * (len(classes) - 2)), 1]
    assert sum(found.total.confidence) == found.total.confidence[CONFIDENCE.index(1.0)] == 2
    assert found.total.characters[0] == 2
    assert CHARACTERS[0] == 8
    assert [found.refused[each] for each in ("no_text", "malformed", "too_long")] == [1, 1, 1]
    answers = Counts(State.new(ADAPTER, ("finished", "cut")))
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "ab"}]
    count(answers, chat, {"answer": "x", "finished": False, "tokens": 3})
    assert answers.state().total.classes == [0, 1]
    assert answers.state().total.tokens[2] == 1
    assert [characters(each) for each in ("abc", ["a", "bc"], chat)] == [3, 4, 7]


def test_predictions_of_files_are_counted_and_compared(privet: Run, tmp_path: Path, bert: Path) -> None:
    run, study = run_of(tmp_path / "run", bert, "text-classification")
    secret = "man chest pain since monday"
    file = write_rows(tmp_path / "in.jsonl", [{"text": secret if n else None} for n in range(31)])
    where = tmp_path / "counts"
    assert privet("predict", run, "--data", file, "--reference")[0] == 2
    assert privet("predict", run, "--text", "a", "--counts", where)[0] == 2
    code, _, err = privet("predict", run, "--data", file, "--counts", where, "--reference")
    assert code == 0, err
    assert f"reference: {where / 'run.reference.json'}" in err
    assert {path.name for path in where.iterdir()} == {"run.reference.json"}
    for _ in range(2):
        assert privet("predict", run, "--data", file, "--counts", where)[0] == 0
    text = (where / "run.prom").read_text()
    assert 'privet_model_inputs_total{model="run"} 60.0' in text
    assert 'privet_model_refused_total{model="run",reason="no_text"} 2.0' in text
    assert 'privet_model_drift{measure="psi",model="run",of="classes"} 0.0' in text
    assert sum(f'class="{label}",model="run"}} 60.0' in text for label in study.task.labels) == 1
    for path in where.iterdir():
        assert not any(part in path.read_text() for part in (secret, "chest", "monday"))


def test_every_metric_of_an_alert_exists() -> None:
    yaml: Any = pytest.importorskip("yaml")
    document = yaml.safe_load((ROOT / "deploy/privet-alerts.yml").read_text(encoding="utf-8"))
    rules = [rule for group in document["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules) >= 8
    watched = monitor()
    own = (SiteMetrics().registry, RunMetrics().registry, watched.registry)
    known = set()
    for family in (family for registry in own for family in registry.collect()):
        ending = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}.get(family.type, ("",))
        known |= {family.name + end for end in ending}
    known |= set(re.findall(r'Gauge\(\s*"(privet_coordinator_\w+)"', (ROOT / "server/network/service.py").read_text()))
    for rule in rules:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("warning", "critical")
        named = set(re.findall(r"\bprivet_\w+", rule["expr"]))
        assert named, rule["alert"]
        assert named <= known, named - known
        assert rule["expr"].count("(") == rule["expr"].count(")")
        assert not re.search(r"[\d.]+ [*+-] (on|ignoring)\b", rule["expr"])  # only vectors are matched
