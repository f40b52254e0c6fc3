"""The training command as a person starts it: plain python, deepspeed, torchrun; the same samples and losses from all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from data_tools.collection import read_collection_file
from data_tools.convert import Settings, convert
from data_tools.phantom import write_phantoms

ROOT = Path(__file__).resolve().parent.parent.parent
BIN = Path(sys.executable).parent
STEPS = 4
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Three tiny cases of each phantom dataset, as a shard store."""
    folder = tmp_path_factory.mktemp("phantom")
    collection = read_collection_file(write_phantoms(folder / "raw", seed=3, cases=3))
    convert(collection, str(folder / "store"), Settings(workers=0), say=lambda _: None)
    return folder / "store"


def overrides(store: Path, out: Path, name: str, *extra: str) -> list[str]:
    return [
        f'data.stores=["{store}"]', f"run.output_dir={out}", f"run.name={name}", f"train.max_steps={STEPS}",
        "train.global_batch=4", "train.micro_batch=1", "optimizer.eps=1e-3",
        "checkpoint.every_steps=2", "monitor.prometheus_port=0", "monitor.log_every=1", *extra,
    ]  # fmt: skip


def launch(*command: str, limit_s: float = 280) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=limit_s)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def plain(*args: str) -> subprocess.CompletedProcess[str]:
    return launch(sys.executable, "launch/train.py", "--config", "demo.json", *args)


def metrics(out: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_process(store, tmp_path_factory) -> Path:
    """Output folder of the reference run: one plain process, read inline."""
    out = tmp_path_factory.mktemp("runs")
    done = plain(*overrides(store, out, "one", "stream.backend=inline"))
    assert done.returncode == 0, done.stderr
    assert "rank 0 on cpu" in done.stderr
    return out


@pytest.mark.multiproc
@pytest.mark.parametrize(
    ("launcher", "extra"),
    [
        (
            ["deepspeed", "--num_accelerators", "2", "--master_port", "PORT"],
            ["deepspeed.zero_optimization.stage=3", "stream.backend=ray"],
        ),
        (["torchrun", "--standalone", "--nproc-per-node", "2"], ["deepspeed.zero_optimization.stage=0", "stream.backend=inline"]),
    ],
    ids=["deepspeed-zero3-ray", "torchrun-zero0-inline"],
)
def test_launchers_stages_and_backends_change_who_computes_never_what(store, one_process, tmp_path, launcher, extra):
    launcher = [free_port() if part == "PORT" else part for part in launcher]
    done = launch(*launcher, "launch/train.py", "--config", "demo.json", *overrides(store, tmp_path, "two", *extra))
    assert done.returncode == 0, done.stderr[-4000:]
    expected, found = metrics(one_process, "one"), metrics(tmp_path, "two")
    assert [r["order_hash"] for r in found] == [r["order_hash"] for r in expected]
    # Sums over ranks round in another order. With eps 1e-3 (a small one makes Adam follow the signs of gradients near zero)
    # two steps agree to 1e-5, update included; an untrained net then multiplies rounding by about ten a step.
    for key in ("loss", "loss_bce", "loss_dice", "loss_modality", "grad_norm"):
        pairs = [(r[key], e[key]) for r, e in zip(found, expected, strict=True)]
        early, late = (1e-4, 5e-3) if key == "grad_norm" else (1e-5, 1e-3)
        assert all(r == pytest.approx(e, rel=early) for r, e in pairs[:2]), (key, pairs)
        assert all(r == pytest.approx(e, rel=late) for r, e in pairs[2:]), (key, pairs)
    assert sum(r["position"] for r in found) == sum(4 * (s + 1) for s in range(STEPS))


def test_resume_goes_on_bitwise_from_the_newest_checkpoint(store, one_process, tmp_path):
    shutil.copytree(one_process / "one", tmp_path / "one")
    shutil.rmtree(tmp_path / "one" / "checkpoints" / f"step_{STEPS:08d}")
    before = metrics(one_process, "one")
    done = plain(*overrides(store, tmp_path, "one", "stream.backend=inline"))
    assert done.returncode == 0, done.stderr
    assert f"step 2 of {STEPS}" in done.stderr
    after = metrics(tmp_path, "one")
    assert [r["step"] for r in after] == list(range(STEPS))
    for key in ("loss", "grad_norm", "order_hash", "lr"):
        assert [r[key] for r in after] == [r[key] for r in before], key


def test_another_collection_is_refused_or_its_use_recorded(store, one_process, tmp_path):
    shutil.copytree(one_process / "one", tmp_path / "one")
    shutil.rmtree(tmp_path / "one" / "checkpoints" / f"step_{STEPS:08d}")
    collection = read_collection_file(write_phantoms(tmp_path / "raw", seed=4, cases=3))
    convert(collection, str(tmp_path / "other"), Settings(workers=0), say=lambda _: None)
    changed = overrides(tmp_path / "other", tmp_path, "one", "stream.backend=inline")
    refused = plain(*changed)
    assert refused.returncode == 1
    assert "data.allow_changed_collection=true" in refused.stderr
    done = plain(*changed, "data.allow_changed_collection=true")
    assert done.returncode == 0, done.stderr
    assert "goes on with a changed collection" in done.stderr
    events = [json.loads(line) for line in (tmp_path / "one" / "stream.jsonl").read_text().splitlines()]
    (change,) = [e for e in events if e["kind"] == "changed_collection"]
    assert change["step"] == 2
    assert change["from"] != change["to"]


def test_a_signal_to_the_whole_group_leaves_ray_alive_until_the_checkpoint(store, tmp_path):
    """As Slurm and torchrun do it. Without a group of its own Ray ends first, and takes the rank down with it."""
    settings = overrides(store, tmp_path, "one", "stream.backend=ray", "train.max_steps=1000000", "checkpoint.every_steps=0")
    command = [sys.executable, "launch/train.py", "--config", "demo.json", *settings]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not raylets(process.pid) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert raylets(process.pid)
        os.killpg(process.pid, signal.SIGTERM)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 75, said
    assert (tmp_path / "one" / "checkpoints" / "latest").is_file()


def raylets(pid: int) -> list[psutil.Process]:
    return [p for p in psutil.Process(pid).children(recursive=True) if p.name() == "raylet"]


def test_the_run_directory_is_complete(one_process):
    run = one_process / "one"
    for name in ("config.json", "environment.json", "tasks.json", "preprocessing.json", "metrics.jsonl", "checkpoints/latest"):
        assert (run / name).is_file(), name
    config = json.loads((run / "config.json").read_text())
    assert config["loss"]["overlap"] == "dice"
    assert config["model"]["priors"]["padding"] == "masked"


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["train.global_bach=4"], 2, ["train.global_bach", "global_batch"]),
        (['data.stores=["no/such/store"]'], 1, ["no/such/store"]),
        (["data.split=tset"], 2, ["tset"]),
        (["data.mixture.weights={\"phantom_xt\": 1}"], 2, ["phantom_xt"]),
        (["data.foreground.class_weights={\"phantom_ct/livr\": 2}"], 2, ["phantom_ct/livr"]),
        (["deepspeed.train_batch_size=4"], 2, ["train_batch_size", "train.global_batch"]),
        (["train.max_steps"], 2, ["section.key=value"]),
    ],
    ids=lambda v: str(v)[:40],
)  # fmt: skip
def test_bad_input_is_one_clear_message_and_leaves_nothing_behind(store, tmp_path, args, code, words):
    done = plain(*overrides(store, tmp_path, "bad", "stream.backend=inline"), *args)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    for word in words:
        assert word in errors[0]
    assert not (tmp_path / "bad").exists()
