"""Training rows pass by and none of them stays in memory; what stays of them is an index and a sample."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import ROWS, index, real_rows, write_jsonl
from sizes import sized
from tiny import make_tokenizer

from loralab.data.prompts import Prompt
from loralab.data.splits import TextReservoir
from loralab.data.tokenization import encode
from loralab.errors import DataError


def test_a_file_that_changes_while_it_is_in_use_is_an_error(tmp_path: Path, cache: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    rows = index(tmp_path)
    for changed in (ROWS[:2], [*ROWS[:2], ROWS[2] | {"summary": "other"}]):
        write_jsonl(tmp_path / "train.jsonl", changed)
        with pytest.raises(DataError, match=r"train.jsonl changed while it was in use"):
            encode(rows, make_tokenizer(["x"]), Prompt("{source}"), 9, 9)
    assert [name for name in sorted(os.listdir(cache)) if name.startswith("tokens")] == []


def test_a_sample_is_everything_or_even(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loralab.data.splits.SAMPLE", 100)
    few, many, again = TextReservoir(), TextReservoir(), TextReservoir()
    for i in range(100):
        few.add(str(i))
    for i in range(2000):
        many.add(str(i))
        again.add(str(i))
    assert few.texts == [str(i) for i in range(100)]
    chosen = np.array([int(text) for text in many.texts])
    assert len(set(many.texts)) == 100 and many.texts == again.texts
    assert abs(chosen.mean() - 1000) < 4 * 2000 / np.sqrt(12 * 100)  # four deviations of an even sample's mean


# Memory.

STREAM = """
import json, sys
from folders import index
from tiny import make_tokenizer
from loralab.data.tokenization import encode
from loralab.data.prompts import Prompt

def peak():
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

words = " ".join(json.loads(line)["dialogue"] for line in open(sys.argv[2]))
tokenizer = make_tokenizer([words])
before = peak()
rows = index(sys.argv[1])
encoded = encode(rows, tokenizer, Prompt("summarize: {dialogue}", "dialogue"), 12, 12)
print(json.dumps({
    "rows": len(rows), "repeated": rows.findings["repeated"].count, "tokens": len(encoded.source_ids), "growth": peak() - before,
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell a process's peak")
def test_many_rows_do_not_stay_in_memory(data_folder: Path, tmp_path: Path) -> None:
    """Each real row stands in the file over and over: twice with each number, so that half of them are distinct."""
    real = [
        (" ".join(row["dialogue"].split()[:4]), " ".join(row["summary"].split()[:1]))
        for row in real_rows(data_folder / "dialogsum", "validation")
    ]
    some = write_jsonl(tmp_path / "some.jsonl", [{"dialogue": source} for source, _ in real])

    def measured(count: int) -> dict[str, Any]:
        folder = tmp_path / str(count)
        folder.mkdir()
        with (folder / "train.jsonl").open("w") as file:
            for number in range(count // 2):
                source, target = real[number % len(real)]
                file.write(2 * (json.dumps({"dialogue": f"{source} {number}", "summary": target}) + "\n"))
        environment = os.environ | {"LORALAB_CACHE": str(folder / "cache")}
        command = [sys.executable, "-c", STREAM, str(folder), str(some)]
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout)
        assert (result["rows"], result["repeated"]) == (count, count // 2)
        return result

    count = sized(500_000, 100_000)
    few, many = measured(10_000), measured(count)
    per_row = (many["growth"] - few["growth"]) / (count - 10_000)
    assert per_row < 64, "bytes; a row with its texts takes more than 200"
    assert many["tokens"] > 5 * count
