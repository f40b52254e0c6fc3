"""Which type and codec: bytes per voxel and decoding time of real scans, prepared as for training, in 64³ chunks.

`blosc2 float32` is nnU-Net's way of storing the same prepared volume (LZ4HC level 5, byte shuffle, 32³ blocks), for comparison.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import blosc2
import nibabel
import numpy as np
import pytest
from numcodecs import blosc

from hermes_dist.shards.quantise import quantise
from hermes_dist.volume.geometry import Grid
from hermes_dist.volume.preprocess import Preprocessing, preprocess_image

SCANS = {
    "CT trunk": ("CT", "totalseg_ct/**/*ct*.nii.gz"),
    "CT leg": ("CT", "Dataset011_SarcomaCT/imagesTr/*.nii.gz"),
    "T1 leg": ("T1", "Dataset012_SarcomaT1/imagesTr/*.nii.gz"),
    "T1 brain": ("T1", "Dataset022_BrainTissueT1/imagesTr/*.nii.gz"),
    "PET": ("PET", "Dataset013_SarcomaPET/imagesTr/*.nii.gz"),
}
CHUNK = 64
SLICE_BYTES = 16384
CODECS = [("lz4", blosc.SHUFFLE), ("lz4hc", blosc.SHUFFLE), ("lz4hc", blosc.BITSHUFFLE), ("zstd", blosc.SHUFFLE)]
SHUFFLES = {blosc.SHUFFLE: "byte", blosc.BITSHUFFLE: "bit"}


def prepared(root: Path, modality: str, pattern: str) -> np.ndarray:
    scan = nibabel.load(sorted(p for p in root.glob(pattern) if "label" not in p.as_posix().lower())[0])
    image = np.ascontiguousarray(np.asarray(scan.dataobj, np.float32).transpose(2, 1, 0))
    return preprocess_image(image, Grid(scan.affine, image.shape), modality, Preprocessing()).image_zyx


def chunks(volume: np.ndarray) -> Iterator[np.ndarray]:
    for z, y, x in np.ndindex(*(-(-n // CHUNK) for n in volume.shape)):
        part = volume[z * CHUNK :, y * CHUNK :, x * CHUNK :][:CHUNK, :CHUNK, :CHUNK]
        block = np.full((CHUNK,) * 3, volume.min(), volume.dtype)
        block[tuple(slice(n) for n in part.shape)] = part
        if (block != block.flat[0]).any():
            yield block


@pytest.mark.bench
def test_table_of_codecs(real_data: Path) -> None:
    volumes = {name: prepared(real_data, *where) for name, where in SCANS.items()}
    print("\nbytes per voxel and decoding speed (GB of float32 a CPU second)")
    print(f"  {'type':<9}{'codec':<18}" + "".join(f"{name:>18}" for name in volumes))
    sizes: dict[str, list[float]] = {}
    for dtype in ("float16", "int16"):
        for cname, shuffle in CODECS:
            cells: list[str] = []
            for volume in volumes.values():
                stored, step = quantise(volume, dtype)
                size, spent, decoded = 0, 0.0, 0
                for block in chunks(stored):
                    data = bytes(blosc.compress(block, cname.encode(), 5, shuffle, SLICE_BYTES))
                    out, floats = np.empty_like(block), np.empty(block.shape, np.float32)
                    began = time.process_time()
                    blosc.decompress(data, out)
                    np.multiply(out, np.float32(step), out=floats)
                    spent += time.process_time() - began
                    size += len(data)
                    decoded += floats.nbytes
                cells.append(f"{size / volume.size:9.2f} B{decoded / spent / 1e9:5.1f} GB/s")
                sizes.setdefault(f"{dtype} {cname} {SHUFFLES[shuffle]}", []).append(size / volume.size)
            print(f"  {dtype:<9}{cname + ' ' + SHUFFLES[shuffle] + ' shuffle':<18}" + "".join(cells))
    params = {"codec": blosc2.Codec.LZ4HC, "clevel": 5, "filters": [blosc2.Filter.SHUFFLE]}
    peer = [
        blosc2.asarray(v, chunks=(96,) * 3, blocks=(32,) * 3, cparams=params).schunk.cbytes / v.size for v in volumes.values()
    ]
    print(f"  {'float32':<9}{'blosc2 (nnU-Net)':<18}" + "".join(f"{n:9.2f} B         " for n in peer))
    ours = sizes["int16 lz4hc byte"]
    assert all(a <= b for a, b in zip(ours, peer, strict=True))
    assert all(a <= b for a, b in zip(ours, sizes["float16 lz4hc byte"], strict=True))
