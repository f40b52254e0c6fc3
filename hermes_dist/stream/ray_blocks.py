"""Samples and errors as Ray's blocks, the form in which they move between processes: a row a sample, bytes as they lie in memory.

Nothing is copied to make a block, nor to take it apart: Ray's copy into the object store is the only one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from hermes_dist import errors
from hermes_dist.errors import HermesError, StreamError
from hermes_dist.stream.reader import Sample
from hermes_dist.volume.augment import Draw

_BYTES = pa.large_binary()


def encode_block(samples: Sequence[Sample]) -> pa.Table:
    """A block of samples: a JSON header, image and label for each."""
    headers = [_header(sample) for sample in samples]
    return _block(headers, [s.image for s in samples], [s.label for s in samples])


def _header(sample: Sample) -> dict[str, Any]:
    numbers = None if sample.numbers is None else asdict(sample.numbers)
    if numbers is not None and sample.numbers is not None and sample.numbers.affine is not None:
        numbers["affine"] = sample.numbers.affine.tolist()
    return {
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


def encode_error(error: HermesError) -> pa.Table:
    """An error as a block of one row."""
    header = {"error": type(error).__name__, "message": str(error), "events": list(error.events)}
    return _block([header], [np.zeros(1, np.float32)], [np.zeros(1, np.uint8)])


def decode_block(block: pa.Table) -> Iterator[Sample]:
    """Samples of a block, as views of the object store. Raises the error that a worker sent instead."""
    for text, image, label in zip(*(block.column(name) for name in ("header", "image", "label")), strict=True):
        header = json.loads(text.as_py())
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
            image=np.frombuffer(image.as_buffer(), np.float32).reshape(shape),
            label=np.frombuffer(label.as_buffer(), np.dtype(header.pop("label_dtype"))).reshape(shape),
            numbers=numbers,
            **header,
        )


def _block(headers: list[dict[str, Any]], images: list[np.ndarray], labels: list[np.ndarray]) -> pa.Table:
    texts = pa.array([json.dumps(header) for header in headers], pa.string())
    return pa.table({"header": texts, "image": _column(images), "label": _column(labels)})


def _column(arrays: list[np.ndarray]) -> Any:
    chunks: list[Any] = []
    for array in arrays:
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        offsets = pa.py_buffer(np.asarray([0, data.nbytes], np.int64))
        chunks.append(pa.Array.from_buffers(_BYTES, 1, [None, offsets, pa.py_buffer(data)]))
    return pa.chunked_array(chunks, _BYTES)
