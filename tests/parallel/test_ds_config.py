"""One truth per value: what the `deepspeed` section may say, and what is computed."""

from __future__ import annotations

from typing import Any

import pytest

from hermes_dist.config import validate
from hermes_dist.errors import ConfigError
from hermes_dist.parallel.ds_config import STATED, accumulation_steps, build_ds_config, zero_stage


def build(section: dict[str, Any], world_size: int = 2, **train: Any) -> dict[str, Any]:
    return build_ds_config(validate({"deepspeed": section, "train": train}), world_size)


@pytest.mark.parametrize(("world_size", "micro_batch", "steps"), [(1, 1, 6), (1, 4, 2), (2, 2, 2), (4, 1, 2), (8, 1, 1)])
def test_batch_sizes_multiply(world_size: int, micro_batch: int, steps: int) -> None:
    got = build({}, world_size, global_batch=6, micro_batch=micro_batch)
    assert got["gradient_accumulation_steps"] == steps
    assert got["train_batch_size"] == steps * micro_batch * world_size >= 6
    assert accumulation_steps(validate({"train": {"global_batch": 6, "micro_batch": micro_batch}}), world_size) == steps


@pytest.mark.parametrize("key", sorted(STATED))
def test_keys_that_we_state_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"deepspeed.{key} is stated by"):
        build({key: 1})


def test_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'zero_optimization'"):
        build({"zero_optimisation": {"stage": 2}})


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": 4}, "stage = 4: expected 0, 1, 2 or 3"),
        ({"stage": True}, "stage = True"),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, "offload_param.*not supported"),
        ({"stage": 2, "offload_optimizer": {"device": "nvme"}}, "expected 'cpu' or 'none'"),
        ({"stage": 0, "offload_optimizer": {"device": "cpu"}}, "needs stage 1, 2 or 3"),
        ({"stage": 3, "zero_quantized_weights": True}, "change the result"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "only 1.0 is supported"),
    ],
)
def test_what_cannot_work_is_refused(zero: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build({"zero_optimization": zero})


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"reduce_bucket_sise": 1}, "reduce_bucket_sise'. Did you mean 'reduce_bucket_size'"),
        ({"reduce_bucket_size": "many"}, "reduce_bucket_size = 'many'"),
        ({"compute_grad_norm": False}, "compute_grad_norm = False: the norm is what finds NaN"),
    ],
)
def test_what_deepspeed_would_refuse_is_one_clear_error(zero: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build({"zero_optimization": {"stage": 2, **zero}})


def test_zero_section_must_be_an_object() -> None:
    with pytest.raises(ConfigError, match="expected an object"):
        zero_stage(validate({"deepspeed": {"zero_optimization": 2}}))


def test_other_keys_pass_through() -> None:
    got = build({"zero_optimization": {"stage": 2, "overlap_comm": True}, "wall_clock_breakdown": True})
    assert got["zero_optimization"] == {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 20_000_000}
    assert got["wall_clock_breakdown"] is True
    assert "bf16" not in got


def test_compiling_is_refused_where_weights_are_gathered_by_hooks() -> None:
    assert build({"zero_optimization": {"stage": 2}}, compile=True)
    with pytest.raises(ConfigError, match=r"train.compile with ZeRO stage 3"):
        build({"zero_optimization": {"stage": 3}}, compile=True)


def test_buffers_are_of_this_family_of_models_unless_the_user_says_otherwise() -> None:
    assert build({"zero_optimization": {"stage": 0}})["zero_optimization"] == {"stage": 0}
    got = build({"zero_optimization": {"stage": 3, "reduce_bucket_size": 7}})["zero_optimization"]
    assert got["reduce_bucket_size"] == 7
    assert got["stage3_max_live_parameters"] < 10**8
