"""Rank and world from what each launcher sets."""

from __future__ import annotations

import pytest

from hermes_dist.errors import UsageError
from hermes_dist.parallel.launchers import Place, read_place


def test_plain_python_is_a_world_of_one() -> None:
    assert read_place({}) == Place(0, 0, 1, 1, "python", None)


def test_torchrun() -> None:
    env = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n0", "MASTER_PORT": "1234"}
    assert read_place({**env, "TORCHELASTIC_RUN_ID": "x"}) == Place(3, 1, 4, 2, "torchrun", ("n0", 1234))


def test_deepspeed() -> None:
    env = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_SIZE": "2", "CROSS_RANK": "0"}
    assert read_place({**env, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}).launcher == "deepspeed"


def test_srun_meets_at_the_first_host_on_a_port_of_its_job() -> None:
    env = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": "gpu[07-08,11]"}
    place = read_place({**env, "SLURM_JOB_ID": "4711", "SLURM_NTASKS_PER_NODE": "4"})
    assert place == Place(5, 1, 8, 4, "srun", ("gpu07", 29500 + 711))


def test_a_batch_script_without_srun_is_a_world_of_one() -> None:
    """sbatch sets SLURM_PROCID and SLURM_NTASKS for the script itself; only a step has SLURM_STEP_NUM_TASKS."""
    assert read_place({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}).world_size == 1


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "x"}, "RANK=2 does not lie"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
        ({"RANK": "zero", "WORLD_SIZE": "2"}, "RANK='zero' is not an integer"),
    ],
)
def test_contradictions_are_named(env: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_place(env)
