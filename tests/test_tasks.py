from __future__ import annotations

import pytest

from hermes_dist.errors import TaskError
from hermes_dist.tasks import TaskTable

ROWS = [
    ("amos_ct", "CT", "abdomen", [("liver", [1]), ("spleen", [2])], None),
    ("amos_mr", "MR", "abdomen", [("liver", [1])], None),
    ("lits", "CT", "abdomen", [("liver", [1, 2]), ("tumour", [2])], 3),
]


def test_equal_names_stay_separate_tasks_unless_shared():
    separate, shared = TaskTable.build(ROWS), TaskTable.build(ROWS, [["amos_ct/liver", "amos_mr/liver"]])
    assert [d.task_ids for d in separate.datasets] == [(0, 1), (2,), (3, 4)]
    assert [d.task_ids for d in shared.datasets] == [(0, 1), (0,), (2, 3)]
    assert (separate.n_tasks, shared.n_tasks, shared.max_classes) == (5, 4, 2)


def test_json_round_trip_and_digest():
    table = TaskTable.build(ROWS, [["amos_ct/liver", "amos_mr/liver"]])
    assert TaskTable.from_json(table.to_json()) == table
    assert table.digest != TaskTable.build(ROWS).digest


def test_merge_keeps_sharing_inside_a_store_and_shares_nothing_across():
    first = TaskTable.build(ROWS[:2], [["amos_ct/liver", "amos_mr/liver"]])
    merged = TaskTable.merge([first, TaskTable.build(ROWS[2:])])
    assert [d.task_ids for d in merged.datasets] == [(0, 1), (0,), (2, 3)]


def test_modality_without_a_stated_sequence_has_a_token_but_no_target():
    table = TaskTable.build(ROWS)
    assert table.modality_id("MR") == 1
    assert table.modality_target("MR") == -1
    assert table.modality_target("CT") == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.dataset("amos_cT"), "Did you mean 'amos_ct'"),
        (lambda t: t.modality_id("PET"), "was not trained"),
        (lambda t: t.find_tasks("tumor"), "Did you mean 'tumour'"),
        (lambda t: TaskTable.build(ROWS, [["amos_ct/livr", "amos_mr/liver"]]), "amos_ct/liver"),
        (lambda t: TaskTable.build(ROWS[:1] * 2), "declared twice"),
    ],
)
def test_unknown_names_are_errors_that_name_the_nearest(call, message):
    with pytest.raises(TaskError, match=message):
        call(TaskTable.build(ROWS))
