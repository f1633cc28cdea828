"""A wrong name, path, lock or column is said before the libraries of models are loaded, which takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from privet.client.network.lock import exclusive, lock_of
from privet.client.site import load_site

SITE = """\
name = "berlin"
train = ["train.csv"]
[coordinator]
address = "127.0.0.1:9445"
root = "root.pem"
key = "node"
"""
CODE = """\
import json, sys
from privet.common.cli import build_command
from privet.common.errors import PrivetError
said = []
for words in json.loads(sys.argv[1]):
    try:
        build_command(words)(words)
    except PrivetError as error:
        said.append([error.message, sorted({"torch", "transformers", "peft"} & set(sys.modules))])
print(json.dumps(said))
"""


def test_cheap_mistakes_are_said_before_slow_imports(tmp_path: Path) -> None:
    file, data = tmp_path / "site.toml", tmp_path / "train.csv"
    file.write_text(SITE)
    data.write_text("patient,note\n1,text\n")
    (tmp_path / "run").mkdir()
    missing, lost = str(tmp_path / "nowhere"), str(tmp_path / "none.csv")
    mistakes = [
        (["predict", missing, "--text", "a"], "neither a run directory nor a release"),
        (["predict", str(tmp_path / "run"), "--text", "a"], "neither a run directory nor a release"),
        (["predict", missing, "--data", lost], "there is no file"),
        (["export", missing, lost], "neither a run directory nor a release"),
        (["evaluate", missing, "--data", str(data)], "neither a run directory nor a release"),
        (["serve", missing], "neither a run directory nor a release"),
        (["site", "serve", str(file)], "another process serves this site"),
        (["site", "evaluate", str(file), "copd", "--data", lost], "there is no file"),
        (["site", "evaluate", str(file), "copd", "--data", str(data)], "has not received the adapter of run copd"),
        (["site", "personalise", str(file), "copd"], "has not received the adapter of run copd"),
        (["site", "setup", str(file), "--train", lost], "there is no file"),
        (["site", "setup", str(file), "--patient-column", "pid"], "has no column 'pid'; found patient, note"),
    ]
    lock = lock_of(load_site(file))
    assert lock is not None
    with exclusive(lock):
        words = json.dumps([line for line, _ in mistakes])
        done = subprocess.run([sys.executable, "-c", CODE, words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert len(said) == len(mistakes)
    for (line, expected), (message, loaded) in zip(mistakes, said, strict=True):
        assert expected in message, line
        assert loaded == [], line
