"""The engine in a world of one: precision, skipping, weights, times. Several ranks: tests/multiproc/test_engine.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hermes_dist.errors import ConfigError
from hermes_dist.parallel import engine as engine_module
from hermes_dist.parallel.engine import Engine
from hermes_dist.parallel.lamb import Lamb
from hermes_dist.parallel.runtime import Runtime
from tests.multiproc import toy
from tests.parallel.conftest import make_config, make_engine, train_steps


@pytest.fixture
def emulated_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 wherever it is asked for: the toy model is small enough for a CPU that has to emulate it."""
    monkeypatch.setattr(engine_module, "has_fast_bf16", lambda _: True)


def test_without_bf16_arithmetic_fp32_is_used_and_said(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine_module, "has_fast_bf16", lambda _: False)
    low, full = make_engine(runtime, train={"precision": "bf16"}), make_engine(runtime)
    assert train_steps(low, 0, 2) == train_steps(full, 0, 2)
    assert "train.precision=bf16: this cpu has no bf16 arithmetic; computing in fp32" in capsys.readouterr().err


@pytest.mark.usefixtures("emulated_bf16")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_computes_in_bf16_and_keeps_fp32_masters(stage: int, runtime: Runtime) -> None:
    seen: list[torch.dtype] = []
    low, full = make_engine(runtime, stage, train={"precision": "bf16"}), make_engine(runtime, stage)
    handle = low.module.mix.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    losses = train_steps(low, 0, 4)
    handle.remove()
    assert set(seen) == {torch.bfloat16}
    assert {b.master.dtype for b in low.partition.buffers} == {torch.float32}
    np.testing.assert_allclose(losses, train_steps(full, 0, 4), rtol=0.02)


@pytest.mark.usefixtures("emulated_bf16")
def test_unlike_bf16_weights_small_updates_are_not_lost(runtime: Runtime) -> None:
    engine = make_engine(runtime, train={"precision": "bf16"})
    before = engine.gather_weights(averaged=False)["tasks"]
    samples = toy.make_samples(0, 4)
    engine.step(toy.split(samples, 0, 1, 2), toy.make_loss(6), lr=1e-5)
    change = (engine.gather_weights(averaged=False)["tasks"] - before).abs().max()
    assert 0 < change < 1e-4


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_bad_loss_is_skipped_even_where_its_gradient_is_finite(stage: int, runtime: Runtime) -> None:
    engine = make_engine(runtime, stage)
    before = engine.gather_weights(averaged=False)
    batches = toy.split(toy.make_samples(0, 4), 0, 1, 2)
    stats = engine.step(batches, lambda m, b: toy.make_loss(6)(m, b) + torch.tensor(float("inf")), lr=0.1)
    assert stats.skipped
    assert stats.grad_norm == float("inf")
    assert all(torch.equal(v, before[n]) for n, v in engine.gather_weights(averaged=False).items())
    assert (engine.steps, engine.skipped_steps) == (1, 1)
    assert not engine.step(batches, toy.make_loss(6), lr=0.1).skipped


def test_micro_batches_whose_loss_is_not_finite_are_told(runtime: Runtime) -> None:
    batches = toy.split(toy.make_samples(0, 4), 0, 1, 2)
    batches[1].image[:] = float("nan")
    stats = make_engine(runtime).step(batches, toy.make_loss(6), lr=0.1)
    assert stats.bad_micro_batches == (1,)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_vectors_without_decay_and_a_limit_of_the_ratios(stage: int, runtime: Runtime) -> None:
    options = {"weight_decay": 0.1, "decay_exclude": "vectors", "max_trust_ratio": 0.5}
    engine = make_engine(runtime, stage, optimizer=options)
    train_steps(engine, 0, 2)
    optimizer = engine.optimizer
    assert isinstance(optimizer, Lamb)
    assert optimizer.ratios is not None
    ratio_of = dict(zip(engine.partition.trainable_names, optimizer.ratios.tolist(), strict=True))
    vectors = {name for name in ratio_of if len(engine.partition.shapes[name]) <= 1}
    assert vectors
    assert {ratio_of[name] for name in vectors} == {1.0}
    assert max(ratio_of[name] for name in ratio_of.keys() - vectors) == 0.5


def test_options_of_lamb_are_refused_elsewhere(runtime: Runtime) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.max_trust_ratio .* lamb"):
        make_engine(runtime, optimizer={"name": "adamw", "max_trust_ratio": 10.0})


def test_parts_of_a_step_are_timed(runtime: Runtime) -> None:
    stats = make_engine(runtime).step(toy.split(toy.make_samples(0, 4), 0, 1, 2), toy.make_loss(6), lr=0.1)
    assert stats.parts_s.keys() == {"forward", "backward", "communication", "optimizer"}
    assert all(0 <= s < 60 for s in stats.parts_s.values())


def test_learning_rate_zero_changes_nothing(runtime: Runtime) -> None:
    engine = make_engine(runtime, train={"ema": {"enabled": False}})
    before = engine.gather_weights(averaged=False)
    stats = engine.step(toy.split(toy.make_samples(0, 4), 0, 1, 2), toy.make_loss(6), lr=0.0)
    assert stats.grad_norm > 0
    assert all(torch.equal(v, before[n]) for n, v in engine.averaged_weights().items())


def test_contradicting_section_is_refused_before_anything_starts(runtime: Runtime) -> None:
    config = make_config().model_copy(update={"deepspeed": {"train_batch_size": 4}})
    with pytest.raises(ConfigError, match="train_batch_size is stated by train.global_batch"):
        Engine(toy.make_model(), config, runtime)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("used_in", ["all", "none", "first", "last"])
def test_offload_refuses_a_branch_that_only_some_micro_batches_take(stage: int, used_in: str, runtime: Runtime) -> None:
    """DeepSpeed would lose its gradient under stages 2 and 3, without a word."""
    zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    engine = Engine(toy.make_model(), make_config(optimizer={"name": "adamw"}, deepspeed={"zero_optimization": zero}), runtime)
    samples = toy.make_samples(0, 4)
    batches = toy.split(samples, 0, 1, 2)
    for index, batch in enumerate(batches):
        batch.branch = used_in == "all" or index == {"first": 0, "last": len(batches) - 1}.get(used_in)
    loss_fn = toy.make_loss(toy.pair_count(samples))
    if stage == 1 or used_in in ("all", "none"):
        assert not engine.step(batches, loss_fn, lr=0.02).skipped
        return
    with pytest.raises(ConfigError, match=f"'sometimes.*in 1 of a step's {len(batches)} micro-batches"):
        engine.step(batches, loss_fn, lr=0.02)


def test_the_vote_on_stopping_comes_after_the_passes(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal during the last micro-batch stops after this very step."""
    engine, order = make_engine(runtime), list[str]()
    monkeypatch.setattr(runtime, "begin_vote", lambda: order.append("vote"))
    samples = toy.make_samples(0, 4)
    plain = toy.make_loss(toy.pair_count(samples))

    def loss_fn(module: Any, batch: Any) -> Any:
        order.append("pass")
        return plain(module, batch)

    engine.step(toy.split(samples, 0, 1, 2), loss_fn, lr=0.02)
    assert order == ["pass", "pass", "vote"]
