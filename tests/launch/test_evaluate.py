"""`launch/evaluate.py` as a person runs it: a table, a file, an exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hermes_dist.errors import CorruptShardError
from hermes_dist.shards.store import ShardStore
from hermes_dist.train import evaluate as library
from launch import evaluate
from tests.train.tiny_run import add_checkpoints, make_run, make_store

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    make_store(folder / "store")
    return make_run(folder, data={"patch_vox_zyx": [32, 32, 32], "stores": [str(folder / "store")]})


@pytest.fixture
def command(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """The command in this process → (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments), "--device", "cpu", "--threads", "1"])
        try:
            code = evaluate.main()
        except SystemExit as end:
            code = int(end.code or 0)
        output = capsys.readouterr()
        return code, output.out, output.err

    return call


def test_table_and_file(command, run):
    code, out, err = command("--run", run, "--split", "test")
    assert code == 0, err
    result = json.loads((run / "evaluation" / "test.json").read_text())
    for row in result["per_class"]:
        line = next(x for x in out.splitlines() if row["dataset"] in x and f" {row['task']} " in x)
        assert f"{row['dice']:.3f}" in line
    assert f"{result['mean']['dice']:.3f}" in out
    assert "empty references: count" in out
    assert str(run / "evaluation" / "test.json") in out


def test_a_table_says_which_checkpoint_it_is_about(command, tmp_path):
    make_store(tmp_path / "store")
    run = make_run(tmp_path, data={"patch_vox_zyx": [32, 32, 32], "stores": [str(tmp_path / "store")]})
    add_checkpoints(run, [10, 20], best=10)
    file, about = run / "evaluation" / "test.json", {}
    for asked, step in (("newest", 20), ("best", 10), ("20", 20), ("10", 10)):
        code, out, err = command("--run", run, *([] if asked == "newest" else ["--checkpoint", asked]))
        assert code == 0, err
        result = json.loads(file.read_text())
        assert (result["checkpoint"], result["chosen"]) == (f"step_{step:08d}", asked)
        assert f"checkpoint: step_{step:08d} ({asked}), weights {result['weights']}" in " ".join(out.split())
        assert ("in place of the scores of step_" in out) == bool(about), "each differs from the one before"
        about.setdefault(step, result["weights"])
        assert about[step] == result["weights"]
    assert about[10] != about[20]
    code, _, err = command("--run", run, "--checkpoint", "15")
    assert code == 1
    assert "no checkpoint '15'; there are checkpoints of the steps 10 (best), 20." in err
    code, out, err = command("--run", run, "--checkpoint", "best", "--loss", "4", "--split", "train")
    assert code == 0, err
    held_out = json.loads((run / "evaluation" / "train_loss.json").read_text())
    assert (held_out["checkpoint"], held_out["chosen"], held_out["weights"]) == ("step_00000010", "best", about[10])
    assert "step_00000010 (best)" in out


def test_overrides_change_the_policy(command, run):
    code, out, _ = command("--run", run, "evaluate.empty_reference=nnunet", "evaluate.max_cases=1")
    assert code == 0
    assert "empty references: nnunet" in out
    assert json.loads((run / "evaluation" / "test.json").read_text())["n_cases"] == 2


def test_a_corrupt_case_ends_with_one(command, run, monkeypatch):
    read = ShardStore.read_case

    def broken(self, row):
        if row.case_id == "b0":
            raise CorruptShardError("brains/b0: checksum does not match")
        return read(self, row)

    monkeypatch.setattr(ShardStore, "read_case", broken)
    code, out, _ = command("--run", run)
    assert code == 1
    assert "not scored: brains/b0: brains/b0: checksum" in out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--split", "tset"], 2, "Did you mean 'test'"),
        (["evaluate.overlpa=0.5"], 2, "unknown key 'evaluate.overlpa'. Did you mean 'overlap'"),
        (['data.stores=["nowhere"]'], 1, "nowhere"),
        (["data.stores=[]"], 2, "data.stores is empty"),
        (["--raw", "no/collection.json"], 1, "no/collection.json"),
        (["--device", "gpu0"], 2, "device 'gpu0' is unknown; expected cpu, cuda or cuda:1"),
        (["--loss", "0"], 2, "'0': expected a whole number, 1 or more"),
    ],
)
def test_bad_use(command, run, arguments, code, words):
    got, out, err = command("--run", run, *arguments)
    assert got == code, out + err
    assert words in err
    assert "Traceback" not in err


def test_asked_to_stop_it_keeps_what_is_done_and_goes_on(command, run, monkeypatch):
    class Session:
        rank, signalled = 0, False

        def barrier(self):
            pass

        def close(self):
            pass

        def say(self, line):
            print(line, file=sys.stderr)

    session, scored, plain = Session(), [], library.score_scan

    def stops(model, job, case):
        scored.append(case.row.case_id)
        session.signalled = len(scored) == 3
        return plain(model, job, case)

    monkeypatch.setattr(library, "score_scan", stops)
    monkeypatch.setattr(evaluate.runtime, "start", lambda config: session)
    (run / "evaluation" / "test.json").unlink(missing_ok=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, out, err = command("--run", run, "--split", "test")
    assert (code, out) == (75, "")
    assert "asked to stop: 3 of 4 scans are evaluated; the same command goes on with the others" in err
    assert not (run / "evaluation" / "test.json").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    code, _, _ = command("--run", run, "--split", "test")
    assert code == 0
    assert sorted(scored) == ["a0", "a1", "b0", "b2"]


@pytest.mark.multiproc
@pytest.mark.slow
def test_two_processes_give_the_same_file(command, run):
    command("--run", run)
    alone = json.loads((run / "evaluation" / "test.json").read_text())
    launcher = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "127.0.0.1:0",
    ]
    line = [sys.executable, *launcher, "--", "launch/evaluate.py", "--run", str(run), "--device", "cpu"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "evaluation" / "test.json").read_text()) == alone
