"""Communication volumes, the throughput fit, the data path's needs and its simulation."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from hermes_dist.errors import ConfigError
from hermes_dist.scaling.communication import Cluster, step_bytes, step_seconds
from hermes_dist.scaling.data_path import DataPath, data_need, read_bytes, simulate
from hermes_dist.scaling.devices import DEVICES, find_device, measured_peak, peak_of
from hermes_dist.scaling.throughput import TERMS, WAIT, Measured, ThroughputFit, TooFewRuns, efficiency, fit_throughput


def test_bytes_of_the_stages() -> None:
    """ZeRO paper: stages 0–2 send 2Ψ, stage 3 sends 3Ψ (here in float32, for many ranks)."""
    psi = 4e9
    assert step_bytes(10**9, 0, 1000) == pytest.approx(2 * psi, rel=2e-3)
    assert step_bytes(10**9, 1, 1000) == step_bytes(10**9, 2, 1000) == step_bytes(10**9, 0, 1000)
    assert step_bytes(10**9, 3, 1000) == pytest.approx(3 * psi, rel=2e-3)
    assert step_bytes(10**9, 2, 1000, micro_steps=4) == pytest.approx(5 * psi, rel=2e-3)
    assert step_bytes(10**9, 3, 1) == 0


def test_a_second_node_makes_the_slower_link_count() -> None:
    cluster = Cluster(8, 450e9, 50e9)
    inside, across = (step_seconds(10**8, 1, w, cluster) for w in (8, 16))
    assert 4 < across / inside < 10


def test_devices_are_found_by_table_and_driver_name() -> None:
    assert peak_of("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_of("NVIDIA A100-SXM4-80GB", "fp32") == 156e12
    assert peak_of("NVIDIA GeForce RTX 4090", "bf16") == 165e12
    assert peak_of("some new card", "bf16") is None
    assert {"A100-80G", "H100", "H200", "B200", "RTX4090"} <= set(DEVICES)
    with pytest.raises(ConfigError, match="Did you mean 'H100'"):
        find_device("H10")


def test_a_measured_peak_is_a_plausible_rate() -> None:
    assert 1e8 < measured_peak(0.05, side=128) < 1e13


TRUTH = (0.02, 0.1, 0.01, 1e-4, 0.05, 0.03)


def synthetic(noise: float = 0.0) -> list[Measured]:
    truth = ThroughputFit(dict(zip(TERMS, TRUTH, strict=True)), 0, 0)
    rng = np.random.default_rng(0)
    runs = [
        Measured(w, stage, batch, 60_000_000, truth.step_s(w, stage, batch, 60_000_000) * (1 + noise * rng.normal()))
        for w in (1, 2, 4, 8)
        for stage in (1, 3)
        for batch in (8, 2 * w)
    ]
    return list(dict.fromkeys(runs))


def test_the_fit_recovers_its_terms_and_extrapolates() -> None:
    fit = fit_throughput(synthetic())
    assert isinstance(fit, ThroughputFit)
    assert [fit.terms[name] for name in TERMS] == pytest.approx(TRUTH, rel=1e-3)
    noisy = fit_throughput(synthetic(0.02))
    assert isinstance(noisy, ThroughputFit)
    assert noisy.relative_error < 0.04
    assert noisy.held_out_error is not None
    assert noisy.held_out_error < 0.15
    assert noisy.samples_per_s(64, 1, 128, 60_000_000) == pytest.approx(fit.samples_per_s(64, 1, 128, 60_000_000), rel=0.1)


def test_waiting_for_data_is_a_term_of_its_own() -> None:
    waiting = [dataclasses.replace(r, wait_s=0.03 * r.global_batch / r.ranks) for r in synthetic()]
    fit, without = fit_throughput(waiting), fit_throughput(synthetic())
    assert isinstance(fit, ThroughputFit)
    assert isinstance(without, ThroughputFit)
    assert fit.terms[WAIT] == pytest.approx(0.03)
    assert fit.step_s(4, 1, 8, 10**6) == pytest.approx(without.step_s(4, 1, 8, 10**6) + 0.06)


def test_ranks_that_share_a_device_take_turns() -> None:
    """Four ranks on two cores: the fit sees it, the extrapolation is for a device a rank, and efficiency is per device."""
    truth = fit_throughput(synthetic())
    assert isinstance(truth, ThroughputFit)
    shared = [
        dataclasses.replace(r, devices=2, step_s=truth.step_s(r.ranks, r.stage, r.global_batch, r.parameters, 2))
        for r in synthetic()
    ]
    fit = fit_throughput(shared)
    assert isinstance(fit, ThroughputFit)
    assert [fit.terms[name] for name in TERMS] == pytest.approx(TRUTH, rel=1e-3)
    assert fit.step_s(8, 1, 16, 10**6) < 0.5 * fit.step_s(8, 1, 16, 10**6, devices=2)
    pair = [Measured(1, 1, 2, 10**6, 0.5, devices=2), Measured(4, 1, 8, 10**6, 1.0, devices=2)]
    assert [weak for _, weak, _ in efficiency(pair)] == pytest.approx([1, 1])


def test_runs_without_stage_three_need_none_of_its_terms() -> None:
    """Five runs are enough for four terms; its own are zero."""
    plain = [r for r in synthetic() if r.stage == 1][:7]
    assert len({r.ranks for r in plain}) >= 3
    fit = fit_throughput(plain[:2] + plain[-3:])
    assert isinstance(fit, ThroughputFit)
    assert [fit.terms[name] for name in TERMS] == pytest.approx([*TRUTH[:4], 0, 0], rel=1e-3, abs=1e-12)
    few = fit_throughput([r for r in synthetic() if r.stage == 3][:6])
    assert isinstance(few, TooFewRuns)
    assert "6 runs for 6 terms" in few.reason


def test_two_world_sizes_are_not_enough() -> None:
    fit = fit_throughput([r for r in synthetic() if r.ranks <= 2])
    assert isinstance(fit, TooFewRuns)
    assert "world sizes" in fit.reason


def test_efficiency_is_one_for_perfect_scaling() -> None:
    weak = [Measured(w, 1, 2 * w, 10**6, 0.5) for w in (1, 2, 4)]
    strong = [Measured(w, 1, 8, 10**6, 2.0 / w) for w in (1, 2, 4)]
    assert [e for _, e, _ in efficiency(weak)] == pytest.approx([1, 1, 1])
    assert [e for _, _, e in efficiency(strong)] == pytest.approx([1, 1, 1])
    assert efficiency([*strong, Measured(8, 1, 8, 10**6, 0.5)])[-1][1:] == (None, pytest.approx(0.5))


def test_weak_and_strong_efficiency_have_peers_of_their_own() -> None:
    """One rank is slower for a batch of one than for four: the run on two ranks is compared with each, apart."""
    one, four = Measured(1, 1, 1, 10**6, 0.4), Measured(1, 1, 4, 10**6, 1.0)
    wide = Measured(4, 1, 4, 10**6, 0.5)
    shares = {run: (weak, strong) for run, weak, strong in efficiency([one, four, wide])}
    assert shares[wide] == (pytest.approx(0.8), pytest.approx(0.5))
    assert efficiency([wide]) == [(wide, None, None)]
    assert efficiency([one, Measured(2, 1, 2, 2 * 10**6, 0.4)])[1][1:] == (None, None), "another model"


def test_samples_of_a_rank_are_whole() -> None:
    one, half, most = Measured(1, 1, 1, 10**6, 0.5), Measured(8, 1, 4, 10**6, 0.5), Measured(8, 1, 12, 10**6, 1.0)
    assert (half.samples_per_rank, most.samples_per_rank) == (1, 2)
    two = Measured(1, 1, 2, 10**6, 1.0)
    assert [weak for _, weak, _ in efficiency([one, two, half, most])] == pytest.approx([1, 1, 0.5, 0.75])


def test_a_peer_has_the_same_micro_batch_and_as_many_passes_as_it_needs() -> None:
    one = Measured(1, 1, 4, 10**6, 2.0, micro_steps=4, micro_batch=1)
    whole = Measured(1, 1, 4, 10**6, 1.0, micro_steps=1, micro_batch=4)
    wide = Measured(4, 1, 4, 10**6, 0.5, micro_steps=1, micro_batch=1)
    assert efficiency([one, whole, wide]) == [(one, 1, 1), (whole, 1, 1), (wide, None, 1)]


def test_accumulation_sends_more_in_stages_two_and_three() -> None:
    truth = ThroughputFit(dict(zip(TERMS, (0.02, 0.1, 0.01, 1e-3, 0.05, 0.03), strict=True)), 0, 0)
    runs = [
        Measured(w, s, 2 * w * m, 10**8, truth.step_s(w, s, 2 * w * m, 10**8, micro_steps=m), micro_steps=m)
        for w in (1, 2, 4)
        for s in (1, 2, 3)
        for m in (1, 4)
    ]
    fit = fit_throughput(runs)
    assert isinstance(fit, ThroughputFit)
    assert [fit.terms[name] for name in TERMS] == pytest.approx([0.02, 0.1, 0.01, 1e-3, 0.05, 0.03], rel=1e-3)
    assert fit.held_out_error == pytest.approx(0, abs=1e-6)
    assert fit.step_s(4, 3, 8, 10**8, micro_steps=4) > fit.step_s(4, 3, 8, 10**8) + 2


def test_a_crop_reads_whole_chunks() -> None:
    one_chunk = 64**3 * 3 / 2.4
    assert read_bytes((1, 1, 1)) == pytest.approx(one_chunk)
    assert read_bytes((65, 65, 65)) == pytest.approx(8 * one_chunk)
    need = data_need(100.0, (128, 128, 128), cpu_s_per_sample=0.3)
    assert need.cpu_cores_per_node == pytest.approx(30)
    assert need.bytes_per_s_per_node == pytest.approx(100 * need.read_bytes_per_sample)


PATH = DataPath(
    ranks=64,
    samples_per_step=2,
    compute_s=0.5,
    workers=4,
    prefetch=8,
    cpu_s_per_sample=0.3,
    bytes_per_sample=8e6,
    storage_bytes_per_s=50e9,
)


def test_an_ample_data_path_does_not_stall_and_a_thin_one_does() -> None:
    assert simulate(PATH).stall_fraction < 0.01
    thin = simulate(dataclasses.replace(PATH, workers=1))
    assert thin.stall_fraction == pytest.approx(1 - 0.5 / 0.6, abs=0.12)  # 2 × 0.3 s of work in 0.5 s
    assert thin.samples_per_s < simulate(PATH).samples_per_s


def test_more_ranks_jitter_failures_and_slow_storage_stall_more() -> None:
    base = dataclasses.replace(PATH, cpu_s_per_sample=0.7)
    stall = simulate(base).stall_fraction
    assert simulate(dataclasses.replace(base, ranks=1024), steps=100).stall_fraction >= stall
    assert simulate(dataclasses.replace(base, jitter=1.5)).stall_fraction > stall
    assert simulate(dataclasses.replace(base, failure_probability=1e-3)).stall_fraction > stall
    assert simulate(dataclasses.replace(base, storage_bytes_per_s=1e9)).stall_fraction > 0.4


def test_prefetch_bounds_finished_samples_not_workers() -> None:
    """Eight workers with a queue of two: all eight work, as those of the real stream do."""
    busy = dataclasses.replace(PATH, ranks=4, workers=8, prefetch=2, compute_s=0.2, cpu_s_per_sample=0.6, jitter=0.0)
    assert simulate(busy).stall_fraction < 0.02  # 0.6 s of work for each of 10 samples a second: six workers


def test_throughput_meets_the_storage_limit_without_a_jump() -> None:
    """Bound by storage, the ranks get its rate, whatever the workers; just below the limit they get nearly as much."""
    path = dataclasses.replace(PATH, ranks=16, workers=8, jitter=0.0, cpu_s_per_sample=0.4, compute_s=0.5)
    demand = 16 * 2 / 0.5
    for share, expected in ((0.25, 0.25), (0.5, 0.5), (0.99, 0.99), (1.0, 1.0), (1.01, 1.0), (4.0, 1.0)):
        rate = simulate(dataclasses.replace(path, storage_bytes_per_s=share * demand * path.bytes_per_sample)).samples_per_s
        assert rate == pytest.approx(expected * demand, rel=0.03), share


def test_the_simulation_is_reproducible() -> None:
    assert simulate(PATH, seed=3) == simulate(PATH, seed=3)
