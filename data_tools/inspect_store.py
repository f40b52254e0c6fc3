"""Looking into a finished store: verify, info, export."""

from __future__ import annotations

import json
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from rich.table import Table

from data_tools.progress import ProgressReport, size_text, wide_console
from data_tools.sources.nifti import write_nifti
from data_tools.sources.volumes import suffix_of
from hermes_dist.errors import UsageError, nearest
from hermes_dist.shards.manifest import ManifestRow
from hermes_dist.shards.store import ShardStore, open_store
from hermes_dist.shards.verify import case_problems, store_problems
from hermes_dist.volume.geometry import Placement
from hermes_dist.volume.preprocess import restore_label, restore_probability

CLASSES_SHOWN = 6


def verify(url: str, *, workers: int) -> list[str]:
    """Check sizes and checksums of every file, decode every voxel and compare with the manifest; returns the problems found."""
    store = open_store(url)
    problems = [f"{url}: {text}" for text in store_problems(store)]
    for text in problems:
        print(f"damaged {text}", file=sys.stderr, flush=True)
    total = len(store.manifest)

    def one(i: int) -> tuple[int, list[str]]:
        row = store.manifest.row(i)
        return sum(row.file_bytes), [f"{row.name}: {text}" for text in case_problems(store, row)]

    size = sum(sum(store.manifest.row(i).file_bytes) for i in range(total))
    with ProgressReport("verify", total, size) as progress, ThreadPoolExecutor(workers) as pool:
        for count, found in pool.map(one, range(total)):
            progress.advance(count)
            problems += found
            for text in found:
                print(f"damaged {text}", file=sys.stderr, flush=True)
    print(f"{total} cases, {size_text(size)}: {'every checksum matches' if not problems else f'{len(problems)} problems'}")
    return problems


def info(url: str) -> None:
    """Print what a store holds."""
    store = open_store(url)
    collection, manifest = store.collection, store.manifest
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("dataset", "modality", "region", "train/val/test", "Mvoxel", "stored", "bits/voxel", "classes (cases)"):
        table.add_column(column, no_wrap=column == "dataset")
    total_bytes = total_voxels = 0
    for dataset in collection.tasks.datasets:
        numbers = manifest.rows(dataset.name)
        rows = [manifest.row(int(i)) for i in numbers]
        split = Counter(r.split for r in rows)
        voxels, size = sum(int(np.prod(r.shape_vox_zyx)) for r in rows), sum(sum(r.file_bytes) for r in rows)
        total_bytes, total_voxels = total_bytes + size, total_voxels + voxels
        cases_with = [sum(r.class_voxels[c] > 0 for r in rows) for c in range(len(dataset.classes))]
        shown = [f"{c.name} ({n})" for c, n in zip(dataset.classes, cases_with, strict=True)]
        classes = ", ".join(shown[:CLASSES_SHOWN]) + (f" … {len(shown)} in all" if len(shown) > CLASSES_SHOWN else "")
        parts = f"{split['train']}/{split['val']}/{split['test']}"
        bits = f"{8 * size / voxels:.2f}" if voxels else "–"
        table.add_row(
            dataset.name, dataset.modality, dataset.region, parts, f"{voxels / 1e6:.2f}", size_text(size), bits, classes
        )
    wide_console().print(table)
    p = collection.preprocessing
    spacing = "original spacing" if p.spacing_mm_zyx is None else f"{' × '.join(f'{s:g}' for s in p.spacing_mm_zyx)} mm"
    ratio = 3 * total_voxels / total_bytes if total_bytes else 0
    tasks = collection.tasks
    print(
        f"{url}: {len(manifest)} cases, {len(tasks.datasets)} datasets, {tasks.n_tasks} tasks, {len(tasks.modalities)} modalities"
    )
    print(f"{total_voxels / 1e6:.1f} Mvoxel at {spacing} in {size_text(total_bytes)} ({ratio:.2f} : 1 against int16 + uint8)")
    print(f"format {collection.format}, version {collection.version}, digest {collection.digest}")


def find_case(store: ShardStore, case: str) -> ManifestRow:
    """The row of `case` or `dataset/case`. Raises UsageError if there is none, or several of that name."""
    manifest = store.manifest
    names = [(d, case) for d in manifest.dataset_names] + [
        (d, case[len(d) + 1 :]) for d in manifest.dataset_names if case.startswith(f"{d}/")
    ]
    found = [i for d, c in names if (i := manifest.find(d, c)) is not None]
    if len(found) > 1:
        options = ", ".join(manifest.row(i).name for i in found)
        raise UsageError(f"case {case!r} is in several datasets; name one of {options}")
    if not found:
        ids = manifest.case_ids[:100_000]
        raise UsageError(f"{store.url} has no case {case!r}.{nearest(case.split('/')[-1], ids)}")
    return manifest.row(found[0])


def export(url: str, case: str, out: Path, *, what: str) -> None:
    """Write a case's label or image on its original grid; see `restore`."""
    if what not in ("label", "image"):
        raise UsageError(f"--what {what!r}: expected label or image")
    if suffix_of(out) not in (".nii", ".nii.gz"):
        raise UsageError(f"--out {out}: expected a name that ends in .nii or .nii.gz")
    store = open_store(url)
    row = find_case(store, case)
    volume, placement = restore(store, row, what)
    write_nifti(out, volume, placement.original)
    z, y, x = volume.shape
    print(f"wrote {what} of {row.name} to {out}: {x} × {y} × {z} voxels on its original grid")


def restore(store: ShardStore, row: ManifestRow, what: str) -> tuple[np.ndarray, Placement]:
    """A stored label (nearest) or image (linear, in the scan's own units, clipped as stored) on the original grid."""
    placement = Placement.from_json(json.loads(row.placement))
    image, label = store.read_case(row)
    if what == "label":
        return restore_label(label, placement), placement
    restored = restore_probability(image - row.air, placement) + np.float32(row.air)
    return restored * np.float32(row.stats["std"] or 1) + np.float32(row.stats["mean"]), placement
