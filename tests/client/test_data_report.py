"""`privet data`: all files at once, no contents, and lines that mend the site file when they are pasted."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.client.test_data import SECRET
from tests.conftest import Run

ID = "73190"
"""How the ids of patients begin; must never be seen outside."""
STUDY = f"""
name = "s"
[model]
base = "absent"
sha256 = {{ "model.safetensors" = "{"0" * 64}" }}
[task]
kind = "text-classification"
labels = ["no", "yes"]
[data]
columns = {{ text = "text", label = "label" }}
unit = "patient"
[lora]
targets = ["query"]
[training]
learning_rate = 0.1
rounds = 1
local_steps = 1
sampling_rate = 0.1
[aggregation]
largest_count = 1000
[privacy]
mode = "local"
epsilon = 8.0
delta = 1e-5
clip_norm = 1.0
unit = "patient"
"""


def rows(count: int = 40, first: int = 0, labels: tuple[str, ...] = ("J", "N")) -> list[tuple[str, str, str]]:
    return [(f"{SECRET} für {n}", labels[n % len(labels)], f"{ID}{n // 2:03},0") for n in range(first, first + count)]


def table(found: list[tuple[str, str, str]], separator: str = ",") -> str:
    lines = [("text", "label", "patient"), *found]
    return "".join(separator.join(f'"{value}"' for value in row) + "\n" for row in lines)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "study.toml"
    path.write_text(STUDY)
    return path


def site_file(folder: Path, more: str = "") -> Path:
    path = folder / "site.toml"
    path.write_text(
        'name = "north"\ntrain = ["a.csv", "b.csv"]\ntest = ["c.csv"]\npatient_column = "patient"\n'
        f'patient_ids = "text"\n{more}'
    )
    return path


def lines_after(out: str, beginning: str) -> list[str]:
    """Return the indented lines after the line that begins so."""
    lines = out.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith(beginning))
    found = []
    for line in lines[at + 1 :]:
        if not line.startswith("  "):
            break
        found.append(line.strip())
    return found


def test_the_proposal_mends_the_site_file(tmp_path: Path, study: Path, privet: Run) -> None:
    (tmp_path / "a.csv").write_bytes(table(rows(), ";").encode("latin-1"))
    (tmp_path / "b.csv").write_text(table(rows(40, 40), "|"))
    (tmp_path / "c.csv").write_text(table(rows(8, 80, ("yes", "no"))))
    site = site_file(tmp_path)
    code, out, err = privet("data", study, "--site", site)
    assert code == 2
    assert not [secret for secret in (SECRET, ID) if secret in out + err]
    for name in ("a.csv", "b.csv"):
        assert f"site north: {tmp_path / name}" in err
        assert f"{tmp_path / name}: does not fit the study" in out
    assert f"{tmp_path / 'c.csv'} (csv): 8 of 8 rows kept, units: 4" in out
    assert "its most frequent letters beyond ASCII are: ü" in out
    proposed = [line for line in lines_after(out, "site file (in a simulation") if not line.startswith("(")]
    files = tomllib.loads("\n".join(proposed))["format"]["files"]
    labels = {"J": "?", "N": "?"}
    assert files == {
        str(tmp_path / "a.csv"): {
            "encoding": "latin-1",
            "delimiter": "semicolon",
            "decimal": "comma",
            "labels": labels,
        },
        str(tmp_path / "b.csv"): {"delimiter": "pipe", "decimal": "comma", "labels": labels},
        str(tmp_path / "c.csv"): {"decimal": "comma"},
    }
    # A mapping that nobody has completed is refused.
    site_file(tmp_path, "\n".join(proposed))
    assert privet("data", study, "--site", site)[0] == 2
    site_file(tmp_path, "\n".join(proposed).replace('J = "?"', 'J = "yes"').replace('N = "?"', 'N = "no"'))
    code, out, err = privet("data", study, "--site", site)
    assert code == 0, err
    assert "all files: 80 records, 40 units of privacy" in out
    count = next(line for line in out.splitlines() if line.startswith("declared_count"))
    assert tomllib.loads(count) == {"declared_count": 40}
    assert "declared_count" not in privet("data", study, tmp_path / "c.csv")[1]  # a researcher has no site file
    assert "settings that fit" not in out


def test_where_the_site_file_has_the_table_only_its_lines_are_proposed(
    tmp_path: Path, study: Path, privet: Run
) -> None:
    for name, first in (("a.csv", 0), ("b.csv", 40), ("c.csv", 80)):
        (tmp_path / name).write_text(table(rows(40, first)))
    site = site_file(tmp_path, '[format]\ndecimal = "comma"\n')
    out = privet("data", study, "--site", site)[1]
    assert "add them below the line [format]" in out
    (line,) = [line for line in lines_after(out, "site file, in place") if not line.startswith("(")]
    site.write_text(site.read_text() + line.replace('J = "?"', 'J = "yes"').replace('N = "?"', 'N = "no"') + "\n")
    assert privet("data", study, "--site", site)[0] == 0


def test_labels_are_shown_where_they_look_like_codes_alone(tmp_path: Path, study: Path, privet: Run) -> None:
    found = rows(60, labels=("Yes ", "nein", "1.0"))
    found += [("t", f"{SECRET} {n}", "p") for n in range(3)]  # the text in the wrong column
    found += [("t", "rare", "p")] * 20 + [("t", "x" * 30, f"{n}") for n in range(20)]
    # An id of a patient, or what one patient's records hold, is of one unit, however many rows it has.
    found += [("t", ID, ID)] * 20
    (tmp_path / "a.csv").write_text(table(found))
    code, out, err = privet("data", study, tmp_path / "a.csv")
    assert code == 2
    assert not [secret for secret in (SECRET, ID, "rare", "xxx") if secret in out + err]
    assert 'labels = { "Yes " = "yes", nein = "?", "1.0" = "?" }' in out
    (tmp_path / "a.csv").write_text(table([("t", f"code {n}", f"{n * m}") for n in range(13) for m in range(20)]))
    assert "code" not in privet("data", study, tmp_path / "a.csv")[1]


def test_counts_that_a_site_declares(tmp_path: Path, study: Path, privet: Run) -> None:
    for name, first in (("a.csv", 0), ("b.csv", 40), ("c.csv", 60)):
        (tmp_path / name).write_text(table(rows(40, first, ("yes", "no"))))
    settings = '[format]\ndecimal = "comma"\n'
    code, out, _ = privet("data", study, "--site", site_file(tmp_path, f"declared_count = 2000\n{settings}"))
    assert code == 0
    assert "the site file declares 2000 units; its files hold about 40. Keep the declared count" in out
    assert "add this line" not in out
    assert "WARNING: the site file declares 2000, more than 2 times away from its files." in out
    assert "WARNING: the study allows at most 1000 (aggregation.largest_count)." in out
    assert "WARNING: 20 of 40 test records are equal to training records, at north." in out
    assert "WARNING: 10 values of patient are in training and in test files, at north." in out
    assert not [secret for secret in (SECRET, ID) if secret in out]


def test_one_document_with_every_problem(tmp_path: Path, study: Path, privet: Run) -> None:
    (tmp_path / "a.csv").write_text(table(rows(), ";"))
    (tmp_path / "b.csv").write_text(table(rows(labels=("yes", "no"))))
    code, out, err = privet("data", study, tmp_path / "a.csv", tmp_path / "b.csv", tmp_path / "none.csv", "--json")
    document: dict[str, Any] = json.loads(out)
    assert code == 2
    assert [len(document[name]) for name in ("files", "problems")] == [1, 2]
    assert document["total"]["declared_count"] == 20
    assert document["files"][0]["path"] == str(tmp_path / "b.csv")
    assert "it does not exist" in document["problems"][1]["message"]
    assert document["proposal"][0].startswith("[format.files.")
    assert not [secret for secret in (SECRET, ID) if secret in out + err]


def test_without_files_the_simulated_sites_are_examined(tmp_path: Path, study: Path, privet: Run) -> None:
    assert privet("data", study)[0] == 2
    for name, separator in (("a", ";"), ("b", ",")):
        (tmp_path / f"{name}.csv").write_text(table(rows(labels=("yes", "no")), separator))
    tables = '[simulation]\npatient_ids = "text"\n[simulation.sites.a]\ntrain = ["a.csv"]\n'
    study.write_text(f'{STUDY}{tables}[simulation.sites.b]\ntrain = ["b.csv"]\n')
    code, out, err = privet("data", study)
    assert code == 2
    assert f"site a: {tmp_path / 'a.csv'}" in err
    proposed = [line.strip() for line in out.splitlines() if line.startswith("  [simulation") or " = " in line]
    study.write_text(f'{STUDY}{tables}[simulation.sites.b]\ntrain = ["b.csv"]\n' + "\n".join(proposed))
    assert privet("data", study)[0] == 0
    code, out, _ = privet("data", study, tmp_path / "a.csv")  # read as the study's simulated site says
    assert (code, "40 of 40 rows kept" in out) == (0, True)


def test_a_file_is_predicted_on_as_a_site_file_says(tmp_path: Path, privet: Run) -> None:
    code, _, err = privet("predict", tmp_path, "--text", "a", "--format", tmp_path / "site.toml")
    assert code == 2
    assert "--format: expected --data beside it" in err
    assert "--counts" not in err  # which was not given
    # A site's directory means its file, as with every other SITE.
    err = privet("evaluate", tmp_path, "--data", tmp_path / "rows.csv", "--format", tmp_path)[2]
    assert f"{tmp_path / 'site.toml'}" in err
