"""An imported checkpoint beside stores that `hermes-shard convert` made of the recipe's datasets, with nothing set by hand."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from data_tools.collection import read_collection_file
from data_tools.convert import Settings, convert
from hermes_dist.models import build_model
from hermes_dist.models.release import paper_tasks
from hermes_dist.train import transfer
from hermes_dist.train.evaluate import Job, evaluate
from hermes_dist.train.finetune import finetune_config
from hermes_dist.train.predict import load_run
from hermes_dist.train.run_directory import open_stores
from hermes_dist.train.transfer import check_preprocessing
from launch.import_published import import_checkpoint
from tests.models.published_state import published_state

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "collections" / "hermes_upstream.json"
CASES = {"lits": ["0"], "mnm": ["A1_0", "A1_1"], "brain_structure": ["7"]}


def default_store(folder: Path) -> Path:
    """One person of three of the recipe's datasets, converted."""
    rng = np.random.default_rng(0)
    image = rng.integers(-900, 400, (18, 20, 16)).astype(np.int16)
    label = np.zeros(image.shape, np.uint8)
    label[4:14, 4:14, 3:12] = 1
    label[6:10, 6:10, 5:9] = 2
    cine, frames = np.stack([image + t for t in range(3)], axis=3), np.stack([label, label * 0, label], axis=3)
    files = {
        "LiTS/volume-0.nii": image,
        "LiTS/segmentation-0.nii": label,
        "OpenDataset/A1/A1_sa.nii.gz": cine,
        "OpenDataset/A1/A1_sa_gt.nii.gz": frames,
        "DLBS_nifti/images/7.nii.gz": image,
        "DLBS_nifti/labels/7.nii.gz": label,
    }
    for name, array in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, np.diag([1.5, 1.5, 1.5, 1.0])), folder / name)
    recipe = json.loads(RECIPE.read_text())
    entries = [{k: v for k, v in d.items() if k not in ("parts", "held_out")} for d in recipe["datasets"] if d["name"] in CASES]
    splits = {name: {"test": cases} for name, cases in CASES.items()}
    collection = {"name": "three", "version": 1, "datasets": entries, "splits": splits}
    (folder / "collection.json").write_text(json.dumps(collection))
    report = convert(read_collection_file(folder / "collection.json"), str(folder / "store"), Settings(), say=lambda _: None)
    assert report.counts == {"converted": 4}
    return folder / "store"


def test_a_default_store_is_scored_and_learnt_by_an_imported_run(tmp_path: Path) -> None:
    state = published_state()
    torch.save(state, tmp_path / "latest.pth")
    imported = tmp_path / "runs" / "imported"
    import_checkpoint(tmp_path / "latest.pth", imported)
    store = default_store(tmp_path / "data")

    run = load_run(
        imported,
        torch.device("cpu"),
        [f'data.stores=["{store}"]', "evaluate.window_vox_zyx=[32,32,32]", "evaluate.bootstrap=0"],
    )
    stores, tasks, preprocessing = open_stores(run.config)
    result = evaluate(run.model, Job(imported, run.config, stores, run.tasks, "test", run.weights_digest, pictures=False))
    assert result is not None
    assert result["failed"] == []
    assert {(row["dataset"], row["case_id"]) for row in result["cases"]} == {(d, c) for d, cases in CASES.items() for c in cases}

    check_preprocessing(imported, preprocessing.model_dump(mode="json"))
    config = finetune_config(imported, "transfer", stores=[str(store)], name="next")
    model = build_model(config.model, tasks)
    transfer.initialise(model, config, tasks)
    own, paper = model.state_dict(), paper_tasks()
    for dataset in tasks.datasets:
        published_ids = list(paper.dataset(dataset.name).task_ids)
        learnt = own["pools.enc4.task"][list(dataset.task_ids)]
        torch.testing.assert_close(learnt, state["prior_init_fuse_2.task_prior"][published_ids])
    modality = own["pools.enc4.modality"]
    torch.testing.assert_close(modality[tasks.modality_id("cineMRI")], state["prior_init_fuse_2.modality_prior"][4])
