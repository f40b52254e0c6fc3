"""Telemetry: rows become lines and metrics; ports, discovery, push, TensorBoard; and what it costs."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hermes_dist.config import MonitorConfig, validate
from hermes_dist.errors import ConfigError
from hermes_dist.tasks import TaskTable
from hermes_dist.telemetry import prometheus
from hermes_dist.telemetry.jsonl import encode, read_rows
from hermes_dist.telemetry.metrics import METRICS
from hermes_dist.telemetry.rows import scalars
from hermes_dist.telemetry.telemetry import Telemetry

ROW: dict[str, Any] = {
    "step": 7,
    "position": 128,
    "loss": 0.9,
    "loss_bce": 0.4,
    "loss_dice": 0.45,
    "loss_modality": 1.6,
    "lr": 2e-3,
    "grad_norm": 0.8,
    "skipped": 0,
    "step_s": 1.5,
    "data_wait_s": 0.1,
    "data_stall_s": 0.25,
    "samples_per_s": 10.7,
    "order_hash": "ab12",
    "samples": 8,
    "patches": 8,
    "voxels": 8 * 64**3,
    "flops": 1e12,
    "mfu": 0.31,
    "parts_s": {"forward": 0.5, "backward": 0.8, "optimizer": 0.1},
    "wait_parts_s": {"storage": 0.06, "decode": 0.04},
    "dataset_loss": {"lits": {"bce": 0.3, "dice": 0.5}, "kits": {"total": 0.7}},
    "task_loss": {"lits/liver": {"bce": 0.2, "dice": 0.4}, "kits/kidney": {"bce": float("nan")}},
    "task_pairs": {"lits/liver": 5, "kits/kidney": 3},
    "task_foreground": {"lits/liver": 4},
    "dataset_samples": {"lits": 5, "kits": 3},
}


def open_telemetry(run_dir: Path, **settings: Any) -> Telemetry:
    ranks = {k: settings.pop(k) for k in ("rank", "world_size") if k in settings}
    return Telemetry(run_dir, MonitorConfig(**{"prometheus_port": 0, **settings}), run_name="demo", **ranks)


@pytest.fixture
def telemetry(tmp_path: Path) -> Iterator[Telemetry]:
    telemetry = open_telemetry(tmp_path)
    yield telemetry
    telemetry.close()


def scrape(telemetry: Telemetry) -> dict[tuple[str, ...], float]:
    """Sample name and sorted label values (without run and rank) → value."""
    with urllib.request.urlopen(f"http://{telemetry.address}/metrics", timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples: dict[tuple[str, ...], float] = {}
    for sample in (s for family in families for s in family.samples):
        assert sample.labels["run"] == "demo"
        key = (sample.name, *(v for k, v in sorted(sample.labels.items()) if k not in ("run", "rank")))
        samples[key] = sample.value
    return samples


def test_a_row_reaches_the_file_and_the_endpoint(tmp_path: Path, telemetry: Telemetry) -> None:
    telemetry.step(ROW)
    assert list(read_rows(tmp_path / "metrics.jsonl")) == [json.loads(encode(ROW))]
    values = scrape(telemetry)
    expected = {
        ("hermes_step",): 7,
        ("hermes_steps_total",): 1,
        ("hermes_loss", "total"): 0.9,
        ("hermes_loss", "modality"): 1.6,
        ("hermes_learning_rate",): 2e-3,
        ("hermes_last_gradient_norm",): 0.8,
        ("hermes_samples_total",): 8,
        ("hermes_mfu_ratio",): 0.31,
        ("hermes_step_duration_seconds_sum",): 1.5,
        ("hermes_step_part_seconds_sum", "data_wait"): 0.1,
        ("hermes_step_part_seconds_sum", "backward"): 0.8,
        ("hermes_data_wait_seconds_total", "storage"): 0.06,
        ("hermes_data_stall_seconds_total",): 0.25,
        ("hermes_busy_seconds_total",): 0.6,
        ("hermes_dataset_loss", "lits", "dice"): 0.5,
        ("hermes_dataset_loss", "kits", "total"): 0.7,
        ("hermes_task_loss", "lits", "liver", "bce"): 0.2,
        ("hermes_pairs_total", "kits", "kidney"): 3,
        ("hermes_foreground_pairs_total", "lits", "liver"): 4,
        ("hermes_dataset_samples_total", "lits"): 5,
    }
    assert {key: values.get(key) for key in expected} == pytest.approx(expected)
    assert values[("hermes_memory_bytes", "rss")] > 1e7
    assert values[("hermes_disk_free_bytes",)] > 0


def test_a_scrape_sees_all_steps_since_the_last_one(telemetry: Telemetry) -> None:
    """Series of datasets and classes are brought up to date when somebody looks: counts add up, the last loss counts."""
    values = telemetry._meters.registry.get_sample_value
    labels = {"run": "demo", "rank": "0", "dataset": "liver", "task": "tumour"}
    for scrape in (1, 2):
        for step, loss in enumerate((0.5, 0.25, float("nan"))):
            telemetry.step({"step": step, "task_loss": {"liver/tumour": {"dice": loss}}, "task_pairs": {"liver/tumour": 2}})
        telemetry.step({"step": 3, "task_pairs": {"liver/liver": 1}})
        assert values("hermes_pairs_total", labels) == 6 * scrape
    telemetry.step({"step": 4, "task_loss": {"liver/tumour": {"dice": 0.125}}})
    assert values("hermes_task_loss", {**labels, "term": "dice"}) == 0.125


def test_nan_steps_count_as_skipped_and_leave_the_gauges(telemetry: Telemetry) -> None:
    telemetry.step(ROW)
    telemetry.step({"step": 8, "loss": float("nan"), "grad_norm": float("inf"), "skipped": True})
    values = scrape(telemetry)
    assert values[("hermes_skipped_steps_total",)] == 1
    assert values[("hermes_loss", "total")] == 0.9
    assert values[("hermes_gradient_norm_count",)] == 1


def test_events_are_written_and_counted_by_dataset(tmp_path: Path, telemetry: Telemetry) -> None:
    telemetry.event({"kind": "quarantine", "dataset": "lits", "case_id": "c1", "message": "checksum"})
    telemetry.event({"kind": "retry", "dataset": "kits"})
    rows = list(read_rows(tmp_path / "stream.jsonl"))
    assert [(r["kind"], r["dataset"], r["rank"]) for r in rows] == [("quarantine", "lits", 0), ("retry", "kits", 0)]
    values = scrape(telemetry)
    assert values[("hermes_quarantined_cases_total", "lits")] == 1
    assert values[("hermes_storage_retries_total", "kits")] == 1
    assert values[("hermes_stream_events_total", "quarantine")] == 1


def test_resume_leaves_each_step_once(tmp_path: Path) -> None:
    for start in (0, 3):
        telemetry = open_telemetry(tmp_path)
        telemetry.resume(start)
        for step in range(start, 5):
            telemetry.step({"step": step})
        telemetry.close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4]


def test_rows_can_be_extended(tmp_path: Path, telemetry: Telemetry) -> None:
    telemetry.extend(lambda row: {"mfu": 0.5 / row["step_s"]})
    telemetry.step({"step": 0, "step_s": 2.0})
    assert next(read_rows(tmp_path / "metrics.jsonl"))["mfu"] == 0.25
    assert scrape(telemetry)[("hermes_mfu_ratio",)] == 0.25


def test_other_ranks_write_no_metrics_lines(tmp_path: Path) -> None:
    telemetry = open_telemetry(tmp_path, rank=1, world_size=2)
    telemetry.step(ROW)
    telemetry.close()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_unknown_metrics_and_labels_are_refused(telemetry: Telemetry) -> None:
    with pytest.raises(KeyError, match="Did you mean 'hermes_step'"):
        telemetry.set("hermes_stepp", 1)
    with pytest.raises(ValueError, match=r"has labels \('dataset',\)"):
        telemetry.add("hermes_substitutions_total", task="x")


def test_a_port_in_use_gives_the_next_free_one_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        telemetry = open_telemetry(tmp_path, prometheus_port=port)
    assert telemetry.address != f"127.0.0.1:{port}"
    telemetry.close()
    assert f"port {port} is in use, metrics are at http://" in capsys.readouterr().err


def test_every_rank_is_in_the_discovery_file_until_it_closes(tmp_path: Path) -> None:
    stale = [{"targets": ["127.0.0.1:9"], "labels": {"target_rank": "5"}}]
    (tmp_path / "prometheus_targets.json").write_text(json.dumps(stale))
    ranks = [open_telemetry(tmp_path, rank=r, world_size=2) for r in range(2)]
    entries = json.loads((tmp_path / "prometheus_targets.json").read_text())
    assert [(e["targets"], e["labels"]) for e in entries] == [([t.address], {"target_rank": str(r)}) for r, t in enumerate(ranks)]
    link = tmp_path.parent / ".prometheus" / f"{tmp_path.name}.json"
    assert json.loads(link.read_text()) == entries
    ranks[0].close()
    assert len(json.loads((tmp_path / "prometheus_targets.json").read_text())) == 1
    ranks[1].close()
    assert json.loads((tmp_path / "prometheus_targets.json").read_text()) == []


def test_the_first_of_two_processes_to_end_leaves_the_entry_of_the_other(tmp_path: Path) -> None:
    first, second = open_telemetry(tmp_path), open_telemetry(tmp_path)
    first.close()
    (entry,) = json.loads((tmp_path / "prometheus_targets.json").read_text())
    assert entry["targets"] == [second.address]
    second.close()
    assert json.loads((tmp_path / "prometheus_targets.json").read_text()) == []


def test_what_only_a_training_has_is_left_to_it(telemetry: Telemetry) -> None:
    """The table of a sweep never steps and writes no checkpoint: alerts that ask for these series must not see one."""
    assert (
        not {("hermes_world_size",), ("hermes_checkpoint_timestamp_seconds",), ("hermes_evaluating",)} & scrape(telemetry).keys()
    )


def test_members_of_a_sweep_are_linked_where_prometheus_looks(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    sweep = open_telemetry(runs / "study")
    member = open_telemetry(runs / "study" / "seed0")
    link = runs / ".prometheus" / "study.seed0.json"
    assert json.loads(link.read_text())[0]["targets"] == [member.address]
    assert {path.name for path in link.parent.iterdir()} == {"study.json", "study.seed0.json"}
    member.close()
    sweep.close()


def test_on_several_hosts_the_address_names_the_host(tmp_path: Path) -> None:
    telemetry = open_telemetry(tmp_path, prometheus_host="0.0.0.0")
    entries = json.loads((tmp_path / "prometheus_targets.json").read_text())
    assert entries[0]["targets"][0].split(":")[0] == socket.gethostname()
    telemetry.close()


def test_links_of_deleted_runs_go(tmp_path: Path) -> None:
    for name in ("gone", "here"):
        open_telemetry(tmp_path / name).close()
        shutil.rmtree(tmp_path / "gone", ignore_errors=True)
    assert [link.name for link in (tmp_path / ".prometheus").iterdir()] == ["here.json"]


def test_declared_classes_start_at_zero(telemetry: Telemetry) -> None:
    telemetry.declare(TaskTable.build([("lits", "CT", "abdomen", [("liver", [1]), ("tumour", [2])], None)]).datasets)
    values = scrape(telemetry)
    assert values[("hermes_pairs_total", "lits", "tumour")] == 0
    assert values[("hermes_foreground_pairs_total", "lits", "tumour")] == 0
    assert values[("hermes_dataset_samples_total", "lits")] == 0
    # An alert on `increase` would not see the first fault of a series that begins with it.
    assert values[("hermes_quarantined_cases_total", "lits")] == 0
    assert values[("hermes_checkpoint_failures_total",)] == 0


def test_an_evaluation_report_becomes_scores(telemetry: Telemetry) -> None:
    per_class = [
        {"dataset": "lits", "task": "liver", "n": 3, "dice": 0.9, "nsd": 0.8, "hd95_mm": 2.5},
        {"dataset": "lits", "task": "tumour", "n": 0, "dice": None, "nsd": float("nan"), "hd95_mm": float("inf")},
    ]
    telemetry.evaluation("val", {"mean": {"dice": 0.9}, "per_class": per_class})
    values = scrape(telemetry)
    assert values[("hermes_hd95_meters", "lits", "val", "liver")] == pytest.approx(2.5e-3)
    assert values[("hermes_mean_dice_ratio", "val")] == 0.9
    assert not [key for key in values if "tumour" in key]


def test_minus_one_turns_the_endpoint_off(tmp_path: Path) -> None:
    telemetry = open_telemetry(tmp_path, prometheus_port=-1)
    telemetry.step(ROW)
    assert telemetry.address is None
    telemetry.close()
    assert not (tmp_path / "prometheus_targets.json").exists()


@contextmanager
def gateway(status: bytes = b"200 OK") -> Iterator[tuple[str, list[tuple[str, str, bytes]]]]:
    """(address, requests) of a server that takes what is pushed: method, path and body of each."""
    seen: list[tuple[str, str, bytes]] = []

    class Gateway(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            seen.append((self.command, self.path, self.rfile.read(int(self.headers["Content-Length"] or 0))))
            self.wfile.write(b"HTTP/1.0 " + status + b"\r\n\r\n")

        do_DELETE = do_PUT

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Gateway)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    server.server_close()


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_pushgateway_gets_the_state_and_loses_it_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus, "PUSH_EVERY_S", 0.05)
    with gateway() as (url, seen):
        telemetry = open_telemetry(tmp_path, pushgateway=url, rank=1, world_size=2)
        telemetry.step(ROW)
        wait_until(lambda: any(b'hermes_step{rank="1",run="demo"} 7.0' in body for _, _, body in seen))
        telemetry.close()
    assert {path for _, path, _ in seen} == {"/metrics/job/hermes/rank/1/run/demo"}
    assert [method for method, _, _ in seen].index("DELETE") == len(seen) - 1


def test_a_silent_pushgateway_does_not_stop_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    telemetry = open_telemetry(tmp_path, pushgateway="http://127.0.0.1:1")
    telemetry.step(ROW)
    telemetry.close()
    assert capsys.readouterr().err.count("training goes on") == 1


@pytest.mark.parametrize("status", [b"500 Out of order", b"what is this"])
def test_nothing_that_a_pushgateway_answers_stops_the_run(
    status: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prometheus, "PUSH_EVERY_S", 0.05)
    with gateway(status) as (url, seen):
        telemetry = open_telemetry(tmp_path, pushgateway=url)
        wait_until(lambda: len(seen) > 1)
        errors = scrape(telemetry)[("hermes_telemetry_errors_total",)]
        telemetry.close()
    assert errors >= 1
    assert capsys.readouterr().err.count("training goes on") == 1


def test_an_address_that_no_pushgateway_can_have_is_refused_at_the_start() -> None:
    for url in ("http://host:port", "http://host :9091", "host:9091 ", "ftp://host", "http://", "http://me:secret@host:9091"):
        with pytest.raises(ConfigError, match=r"monitor\.pushgateway"):
            validate({"monitor": {"pushgateway": url}})
    for url in ("http://host:9091", "https://a.b/push/", "host:9091", "http://[::1]:9091", None):
        assert validate({"monitor": {"pushgateway": url}}).monitor.pushgateway == url


def test_tensorboard_events_hold_nested_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    telemetry = open_telemetry(tmp_path, tensorboard=True)
    telemetry.step(ROW)
    telemetry.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("dataset_loss/lits/dice")[0].value == pytest.approx(0.5)
    assert set(events.Tags()["scalars"]) == {name for name, _ in scalars(ROW)}


def test_a_watched_gauge_is_asked_at_the_scrape(telemetry: Telemetry) -> None:
    depth = [3.0]
    telemetry.watch("hermes_ready_samples", lambda: depth[0])
    assert scrape(telemetry)[("hermes_ready_samples",)] == 3
    depth[0] = 5
    assert scrape(telemetry)[("hermes_ready_samples",)] == 5


def test_every_metric_of_the_table_can_be_made(telemetry: Telemetry) -> None:
    call = {"counter": telemetry.add, "gauge": telemetry.set, "histogram": telemetry.observe}
    for metric in METRICS.values():
        call[metric.kind](metric.name, 1.0, **dict.fromkeys(metric.labels, "x"))
    assert len({key[0] for key in scrape(telemetry)}) >= len(METRICS)
