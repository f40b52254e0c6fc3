"""Compiled loop of label resampling: the class with the largest interpolated share, whatever the number of classes.

Interpolating one mask a class costs a pass over the volume for each. Here every output voxel looks at its own neighbourhood:
where that holds a single value (nearly everywhere) this is the answer, else the shares of the few values in it are added up.
Compiled with numba and cached on disk; `no_type_check` keeps the run-time shape checks of the tests out of compiled code.
"""

# numba publishes no types for its decorators; the kernel itself is annotated.
# pyright: reportUntypedFunctionDecorator=false

from __future__ import annotations

from typing import no_type_check

import numpy as np
import numpy.typing as npt
from numba import njit

TIE = 1e-6
"""Shares closer than this are equal; the lowest value then wins, so that rounding decides nothing."""


@njit(cache=True, nogil=True, error_model="numpy")
@no_type_check
def largest_share(
    label: npt.NDArray[np.integer],
    starts_z: npt.NDArray[np.intp],
    starts_y: npt.NDArray[np.intp],
    starts_x: npt.NDArray[np.intp],
    weights_z: npt.NDArray[np.float32],
    weights_y: npt.NDArray[np.float32],
    weights_x: npt.NDArray[np.float32],
    out: npt.NDArray[np.integer],
):
    """out[z, y, x] = value with the largest Σ wz·wy·wx over label[starts + taps]; taps of weight 0 are not looked at.

    `starts_*`: first tap per output voxel; `weights_*`: (outputs, taps), rows padded with zeros where they are shorter.
    """
    most = weights_z.shape[1] * weights_y.shape[1] * weights_x.shape[1]
    values = np.empty(most, np.int64)
    shares = np.empty(most, np.float64)
    for z in range(out.shape[0]):
        for y in range(out.shape[1]):
            for x in range(out.shape[2]):
                sz, sy, sx = starts_z[z], starts_y[y], starts_x[x]
                first = label[sz, sy, sx]
                same = True
                for a in range(weights_z.shape[1]):
                    if weights_z[z, a] == 0:
                        continue
                    for b in range(weights_y.shape[1]):
                        if weights_y[y, b] == 0:
                            continue
                        for c in range(weights_x.shape[1]):
                            if weights_x[x, c] != 0 and label[sz + a, sy + b, sx + c] != first:
                                same = False
                    if not same:
                        break
                if same:
                    out[z, y, x] = first
                    continue
                n = 0
                for a in range(weights_z.shape[1]):
                    for b in range(weights_y.shape[1]):
                        for c in range(weights_x.shape[1]):
                            weight = weights_z[z, a] * weights_y[y, b] * weights_x[x, c]
                            if weight == 0:
                                continue
                            value = np.int64(label[sz + a, sy + b, sx + c])
                            k = 0
                            while k < n and values[k] < value:
                                k += 1
                            if k == n or values[k] != value:
                                for j in range(n, k, -1):
                                    values[j], shares[j] = values[j - 1], shares[j - 1]
                                values[k], shares[k] = value, 0.0
                                n += 1
                            shares[k] += weight
                best = 0
                for k in range(1, n):
                    if shares[k] > shares[best] + TIE:
                        best = k
                out[z, y, x] = values[best]
