"""`hermes-shard`: raw datasets → checked, compact, streamable shards."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from data_tools import convert as conversion
from data_tools import inspect_store
from data_tools.collection import ResolvedCollection, collection_of_sources, preprocessing_of, read_collection_file
from data_tools.files import write_json
from data_tools.report import print_findings, severity_line, summary
from data_tools.sources import SOURCES
from hermes_dist.errors import UsageError, exit_on_error, nearest
from hermes_dist.shards import STORES

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)

Sources = Annotated[list[Path] | None, typer.Argument(help="Raw datasets (folders or datalist files).")]
CollectionOption = Annotated[Path | None, typer.Option("--collection", help="Collection file (JSON) instead of SRC.")]
LayoutOption = Annotated[str, typer.Option(help=f"auto, {', '.join(SOURCES)}.")]
ModalityOption = Annotated[str | None, typer.Option(help="Modality of SRC where they do not state it: CT, PET, T1, …")]
WorkersOption = Annotated[int, typer.Option(min=0, help="Ray workers; 0 = in this process.")]
RayOption = Annotated[str, typer.Option("--ray-address", help="`local`, or a Ray cluster's address.")]
StoreUrl = Annotated[str, typer.Argument(metavar="URL", help="A shard store: path or URL.")]


@app.callback()
def _root() -> None:
    """From any raw dataset to checked, compact, streamable shards; resumable and incremental.

    Exit codes: 0 done, 1 something was rejected or damaged, 2 wrong use.
    """


@app.command("convert")
def _convert(
    src: Sources = None,
    *,
    out: Annotated[str, typer.Option(help="Store to write: path or URL (s3://…, gs://…, az://…).")],
    collection: CollectionOption = None,
    format: Annotated[str, typer.Option(help="zarr or webdataset.")] = "zarr",
    layout: LayoutOption = "auto",
    modality: ModalityOption = None,
    workers: WorkersOption = 0,
    ray_address: RayOption = "local",
    part: Annotated[str | None, typer.Option(help="i/n: convert only this part; `merge` publishes all.")] = None,
    spacing: Annotated[str | None, typer.Option(help="Spacing z,y,x in mm, or `original`.")] = None,
    prune: Annotated[bool, typer.Option("--prune", help="Drop datasets of the store that are not named.")] = False,
    no_forecast: Annotated[bool, typer.Option("--no-forecast", help="Do not estimate disk space first.")] = False,
) -> None:
    """Convert raw datasets into a shard store. The same command again goes on where it was.

    Examples:
      hermes-shard convert --collection data/collection.json --out stores/all --workers 8
      hermes-shard convert Dataset011_Liver --modality CT --out stores/liver
      hermes-shard convert --collection c.json --out s3://bucket/store --part 1/4    (then: hermes-shard merge s3://bucket/store)
    """
    if format not in STORES:
        raise UsageError(f"--format {format!r} is not one of {', '.join(STORES)}.{nearest(format, list(STORES))}")
    resolved = _collection(src, collection, layout, modality, out)
    if spacing:
        resolved.preprocessing = _with_spacing(resolved, spacing)
    settings = conversion.Settings(format, workers, ray_address, _part(part), prune, not no_forecast)
    report = conversion.convert(resolved, out, settings)
    _finish(report)


@app.command("merge")
def _merge(url: StoreUrl) -> None:
    """Publish what the parts of a conversion (`convert --part i/n`) have written.

    Example: hermes-shard merge s3://bucket/store
    """
    _finish(conversion.merge(url))


@app.command("check")
def _check(
    src: Sources = None,
    *,
    collection: CollectionOption = None,
    layout: LayoutOption = "auto",
    modality: ModalityOption = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the findings here.")] = None,
    workers: WorkersOption = 0,
    ray_address: RayOption = "local",
) -> None:
    """Integrity report of raw data; nothing is converted. Exit code 1 if a case would be rejected.

    Example: hermes-shard check Dataset011_Liver --json integrity.json
    """
    resolved = _collection(src, collection, layout, modality or "unknown", None)
    report = conversion.check(resolved, workers=workers, ray_address=ray_address)
    print_findings(report.findings)
    print(f"{len(report.status_of)} cases checked: {severity_line(report.findings)}")
    if json_file:
        write_json(json_file, [f.to_json() for f in report.findings])
        print(f"wrote {json_file}")
    if report.rejected:
        raise SystemExit(1)


@app.command("verify")
def _verify(url: StoreUrl, workers: Annotated[int, typer.Option(min=1, help="Threads that read and check.")] = 2) -> None:
    """Read every byte of a store and compare every checksum. Exit code 1 if anything is damaged.

    Example: hermes-shard verify stores/all
    """
    if inspect_store.verify(url, workers=workers):
        raise SystemExit(1)


@app.command("info")
def _info(url: StoreUrl) -> None:
    """What is inside: cases, classes, voxels, sizes, modalities, splits.

    Example: hermes-shard info stores/all
    """
    inspect_store.info(url)


@app.command("export")
def _export(
    url: StoreUrl,
    case: Annotated[str, typer.Option(help="Case id, or dataset/case.")],
    out: Annotated[Path, typer.Option(help="NIfTI file to write.")],
    what: Annotated[str, typer.Option(help="label or image.")] = "label",
) -> None:
    """Write a case back to NIfTI on its original grid.

    Example: hermes-shard export stores/all --case sarcoma_ct/STS_001 --out label.nii.gz
    """
    inspect_store.export(url, case, out, what=what)


@app.command("stats")
def _stats(
    url: StoreUrl,
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("stats.html"),
    montage: Annotated[int, typer.Option(min=0, help="Cases shown per dataset.")] = 4,
) -> None:
    """Histograms and montages per dataset, as one HTML file.

    Example: hermes-shard stats stores/all --out stats.html
    """
    from data_tools import stats  # matplotlib takes a second to load

    stats.write_html(url, out, montage=montage)
    print(f"wrote {out}")


@app.command("phantom")
def _phantom(
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    seed: Annotated[int, typer.Option(help="Equal seeds write equal bytes.")] = 7,
    cases: Annotated[int, typer.Option(min=3, help="Cases per dataset, split 60 / 10 / 30 %.")] = 20,
) -> None:
    """Write four synthetic datasets with partial, conflicting labels.

    Example: hermes-shard phantom --out demo_data --seed 7
    """
    from data_tools import phantom  # scipy takes half a second to load

    collection = phantom.write_phantoms(out, seed=seed, cases=cases)
    print(phantom.describe(collection))
    print(f"wrote 4 datasets of {cases} cases and {collection}")


def _collection(
    src: list[Path] | None, collection: Path | None, layout: str, modality: str | None, out: str | None
) -> ResolvedCollection:
    if bool(src) == bool(collection):
        raise UsageError("name either raw datasets (SRC …) or --collection FILE; see --help")
    if layout not in ("auto", *SOURCES):
        raise UsageError(f"--layout {layout!r} is not one of auto, {', '.join(SOURCES)}.{nearest(layout, list(SOURCES))}")
    known = conversion.existing_splits(out) if out else {}
    if collection:
        return read_collection_file(collection, known)
    return collection_of_sources(src or [], layout=layout, modality=modality, known_splits=known)


def _part(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--part {text!r}: expected i/n with 1 ≤ i ≤ n, e.g. 1/4")
    return int(match[1]), int(match[2])


def _with_spacing(collection: ResolvedCollection, text: str):
    try:
        value = None if text == "original" else [float(v) for v in text.split(",")]
    except ValueError:
        raise UsageError(f"--spacing {text!r}: expected z,y,x in mm, e.g. 1.5,1.5,1.5, or `original`") from None
    return preprocessing_of(collection.preprocessing.model_dump() | {"spacing_mm_zyx": value}, "--spacing")


def _finish(report: conversion.ConversionReport) -> None:
    if report.findings:
        print_findings([f for f in report.findings if f.severity != "note"] or report.findings)
    print(summary(report))
    if report.rejected:
        raise SystemExit(1)


def main() -> None:
    """Entry point of `hermes-shard`."""
    with exit_on_error():
        app()
