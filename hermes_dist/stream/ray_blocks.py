"""Samples and errors as blocks of one row, the form in which Ray moves them between processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
from ray.data.block import Block, BlockAccessor

from hermes_dist import errors
from hermes_dist.errors import HermesError, StreamError
from hermes_dist.stream.reader import Sample
from hermes_dist.volume.augment import Draw


def encode_block(sample: Sample) -> Block:
    """One sample as a block of one row: two byte columns and a JSON header."""
    numbers = None if sample.numbers is None else asdict(sample.numbers)
    if numbers is not None and sample.numbers is not None and sample.numbers.affine is not None:
        numbers["affine"] = sample.numbers.affine.tolist()
    header = {
        "position": sample.position,
        "dataset": sample.dataset,
        "case": sample.case,
        "identity": sample.identity,
        "shape": sample.image.shape,
        "label_dtype": sample.label.dtype.str,
        "numbers": numbers,
        "patch_start": sample.patch_start,
        "parts_s": sample.parts_s,
        "io": sample.io,
        "events": sample.events,
    }
    return _block(header, sample.image, sample.label)


def encode_error(error: HermesError) -> Block:
    """An error as a block of one row."""
    header = {"error": type(error).__name__, "message": str(error), "events": list(error.events)}
    return _block(header, np.zeros(1, np.float32), np.zeros(1, np.uint8))


def decode_block(block: dict[str, Any]) -> Iterator[Sample]:
    """Samples of a block, as views of the object store. Raises the error that a worker sent instead."""
    for text, image, label in zip(block["header"], block["image"], block["label"], strict=True):
        header = json.loads(str(text))
        if "error" in header:
            error: HermesError = getattr(errors, header["error"], StreamError)(header["message"])
            error.events = header["events"]
            raise error
        shape, numbers = tuple(header.pop("shape")), header.pop("numbers")
        if numbers is not None:
            affine = numbers.pop("affine")
            numbers = Draw(affine=None if affine is None else np.asarray(affine), **numbers)
        header["patch_start"] = tuple(header["patch_start"])
        yield Sample(
            image=np.ascontiguousarray(image).view(np.float32).reshape(shape),
            label=np.ascontiguousarray(label).view(np.dtype(header.pop("label_dtype"))).reshape(shape),
            numbers=numbers,
            **header,
        )


def _block(header: dict[str, Any], image: np.ndarray[Any, Any], label: np.ndarray[Any, Any]) -> Block:
    columns = {
        "header": np.asarray([json.dumps(header)]),
        "image": np.ascontiguousarray(image).reshape(-1).view(np.uint8)[None],
        "label": np.ascontiguousarray(label).reshape(-1).view(np.uint8)[None],
    }
    return BlockAccessor.batch_to_block(columns)
