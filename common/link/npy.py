"""What an Array off the wire may hold: the ``.npy`` bytes of a plain, small-dimensional tensor."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from common.errors import WireError

__all__ = ["DTYPES", "Header", "check_npy", "read_header"]

DTYPES = frozenset(
    (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64"),
    )
)
_STYPE = "numpy.ndarray"
_MAX_DIMENSIONS = 8
_MAX_HEADER = 1024  # bytes; np.save writes 118, and more only for many dimensions
_MAGIC = b"\x93NUMPY"
_HEADER = re.compile(
    rb"\{'descr': '([<>|=]?[a-zO]{1,2}[0-9]{0,2})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:[0-9]{1,19}, ?){0,8}(?:[0-9]{1,19})?)\), \} *\n"
)
_BY_DESCR = {np.dtype(name).str: np.dtype(name) for name in DTYPES}


@dataclass(frozen=True)
class Header:
    """What a ``.npy`` file says about itself.

    Args:
        start: where the elements begin, in bytes.
        dtype: their type; one of :data:`DTYPES`.
        shape: of the array.
        fortran: elements lie in the order of columns.
    """

    start: int
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    fortran: bool


def check_npy(data: bytes, *, name: str, dtype: str, shape: tuple[int, ...], stype: str) -> None:
    """Make sure that the bytes of an array are what its description says.

    Args:
        data: the bytes: a ``.npy`` file.
        name: the array's name, for the message of an error.
        dtype: the element type that is claimed.
        shape: the shape that is claimed.
        stype: the serialization that is claimed.

    Raises:
        WireError: they are not.
    """
    label = f"array {name[:64]!r}"
    if stype != _STYPE:
        raise WireError(f"{label}: serialization {stype[:64]!r} is not known, only {_STYPE!r} is")
    if dtype not in DTYPES:
        raise WireError(
            f"{label}: element type {dtype[:64]!r} is not allowed; allowed: {sorted(DTYPES)}"
        )
    if len(shape) > _MAX_DIMENSIONS:
        raise WireError(f"{label}: {len(shape)} dimensions, at most {_MAX_DIMENSIONS} are allowed")
    found = read_header(data, label)
    if (found.dtype, found.shape) != (np.dtype(dtype), shape):
        raise WireError(
            f"{label}: described as {dtype} {list(shape)}, but its data say {found.dtype} "
            f"{list(found.shape)}"
        )
    needed, given = math.prod(shape) * found.dtype.itemsize, len(data) - found.start
    if given != needed:
        raise WireError(f"{label}: {given} bytes of elements, its shape needs {needed}")


def read_header(data: bytes, label: str) -> Header:
    """Read the header of a ``.npy`` file as ``np.save`` writes it, and no other.

    NumPy's own reader evaluates the header as a Python literal, which takes many forms of garbage
    and time to refuse them; this is one match of a regular expression against a few bytes.

    Args:
        data: the file, or its beginning.
        label: names the array in the message of an error.

    Raises:
        WireError: it does not begin with such a header.
    """
    if data[:6] != _MAGIC:
        raise WireError(f"{label}: its data are not an npy array as NumPy writes it")
    if data[6:8] != b"\x01\x00":
        raise WireError(f"{label}: only version 1.0 of the npy format is allowed")
    start = 10 + int.from_bytes(data[8:10], "little")
    found = _HEADER.fullmatch(data[10 : min(start, 10 + _MAX_HEADER)])
    if found is None:
        raise WireError(f"{label}: its data are not an npy array as NumPy writes it")
    descr, fortran, numbers = (group.decode() for group in found.groups())
    if descr not in _BY_DESCR:
        raise WireError(f"{label}: its data say {descr!r}, which is no element type of ours")
    shape = tuple(int(number) for number in numbers.split(",") if number.strip())
    return Header(start, _BY_DESCR[descr], shape, fortran == "True")
