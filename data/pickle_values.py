"""What the pickles of torch and NumPy say, for both of our readers: shapes, storages, NumPy's arrays, OrderedDict, ...

Functions that take a budget stand for what `pickle_machine.py` calls; the other arguments are the pickle's, and may be
anything. All raise DamagedPickle.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from egnscale.data.pickle_machine import PLAIN_KEYS, Budget, DamagedPickle, Name, Object, check_keys, shown

_MAX_DIMENSIONS = 8
_MAX_SIZE = 1 << 62
_NUMPY_TYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")

# ----------------------------------------------------------------------------------------------------------- tensors


def sizes(values: Any, what: str) -> tuple[int, ...]:
    """A shape, strides, an offset: few, not negative, and less than 2^62."""
    if not isinstance(values, tuple | list) or len(values) > _MAX_DIMENSIONS:
        raise DamagedPickle(f"{what} has a damaged shape")
    if not all(type(value) is int and 0 <= value < _MAX_SIZE for value in values):
        raise DamagedPickle(f"{what} has a damaged shape")
    return tuple(values)


def layout(offset: Any, size: Any, stride: Any, held: int, most: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Offset, size and stride of a tensor, in elements, as its pickle says.

    Args:
        held: elements of its storage. None beyond them is reached.
        most: elements that the tensor may have. Where strides are zero, few elements make many.
    """
    (offset,), size, stride = sizes((offset,), "a tensor"), sizes(size, "a tensor"), sizes(stride, "a tensor")
    if len(size) != len(stride):
        raise DamagedPickle("a tensor has a damaged shape")
    numel = math.prod(size)
    last = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
    if numel and (numel > most or last >= held):
        raise DamagedPickle(f"a tensor of shape {list(size)} reaches beyond its storage of {held} elements")
    return offset, size, stride


def described_storage(id_: Any) -> tuple[str, str, int]:
    """Type, key and number of elements of the storage that torch.save's persistent id names."""
    if not isinstance(id_, tuple) or len(id_) not in (5, 6) or id_[0] != "storage":
        raise DamagedPickle("a damaged storage: it is not described as torch does")
    kind, key, _, count, *view = id_[1:]
    if not isinstance(kind, Name) or type(key) is not str or type(count) is not int or not 0 <= count < _MAX_SIZE:
        raise DamagedPickle("a damaged storage: it is not described as torch does")
    if any(part is not None for part in view):
        raise DamagedPickle("a storage within a storage, as torch has not written since 0.4")
    return kind.name, key, count


# ------------------------------------------------------------------------------------------------------------- NumPy


def numpy_type(budget: Budget, code: Any, *rest: Any) -> Object:
    """`numpy.dtype`: an Object with a dtype of plain numbers as its state."""
    # Not hashed or compared before it is known to be text.
    if type(code) is not str or code not in _NUMPY_TYPES:
        raise DamagedPickle(f"a NumPy array is of a type that holds no plain numbers ({shown(code)})")
    return Object("numpy.dtype", np.dtype(code))


def empty_array(budget: Budget, type_: Any, *rest: Any) -> Object:
    """`numpy._core.multiarray._reconstruct`: an array that BUILD fills."""
    if not isinstance(type_, Name) or type_.name != "numpy.ndarray":
        raise DamagedPickle("a NumPy array is not an ndarray")
    return Object("numpy.ndarray")


def array_from_buffer(budget: Budget, content: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """`numpy._core.numeric._frombuffer`, since protocol 5."""
    return _array(budget, content, dtype, shape, order == "F")


def scalar(budget: Budget, dtype: Any, content: Any) -> int | float | bool:
    """`numpy._core.multiarray.scalar`."""
    return _array(budget, content, dtype, (), False)[()].item()


def build_numpy(budget: Budget, target: Any, state: Any) -> Any:
    """BUILD for the Objects made above: a dtype with its byte order, an array of the shape in `state`."""
    if isinstance(target, Object) and target.name == "numpy.dtype":
        target.state = _ordered(target.state, state)
        return target
    if isinstance(target, Object) and target.name == "numpy.ndarray":
        _, shape, dtype, fortran, content = state
        return _array(budget, content, dtype, shape, bool(fortran))
    raise DamagedPickle(f"a damaged pickle: it changes {shown(target)}")


def _ordered(dtype: np.dtype, state: Any) -> np.dtype:
    """`state`: version, byte order, and nothing else for plain numbers."""
    if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
        raise DamagedPickle("a NumPy type's byte order is damaged")
    if any(part is not None for part in state[2:5]):
        raise DamagedPickle("a NumPy array is of a type that holds no plain numbers (fields)")
    return dtype.newbyteorder(state[1]) if state[1] in "<>" else dtype


def _array(budget: Budget, content: Any, dtype: Any, shape: Any, fortran: bool) -> np.ndarray:
    """A view of the content where that is possible."""
    if not isinstance(dtype, Object) or dtype.name != "numpy.dtype":
        raise DamagedPickle("a NumPy array has no type")
    plain, shape = dtype.state, sizes(shape, "a NumPy array")
    if type(content) is str:  # of Python 2
        content = encoded(budget, content, "latin1")
    if not isinstance(content, bytes) or len(content) != math.prod(shape) * plain.itemsize:
        raise DamagedPickle(f"a NumPy array of shape {list(shape)} does not have the bytes for it")
    if not content:
        return np.zeros(shape, plain)
    if plain.kind == "b":  # a byte may be something else than 0 and 1
        budget.spend(len(content))
        values = np.frombuffer(content, np.uint8) != 0
    else:
        values = np.frombuffer(content, plain)
    return values.reshape(shape, order="F" if fortran else "C")


# ------------------------------------------------------------------------------------------------------------ Python


def encoded(budget: Budget, text: Any, encoding: Any) -> bytes:
    """`_codecs.encode`: how protocols before 3 write bytes."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise DamagedPickle("bytes are not written as Python writes them")
    budget.spend(len(text))
    return text.encode("latin1")


def dictionary(keys: tuple[type, ...]) -> Callable[..., dict[Any, Any]]:
    """`OrderedDict()`, Python 2's `OrderedDict([[key, value], ...])`, `Counter({...})`; with keys of these types."""

    def made(budget: Budget, items: Any = ()) -> dict[Any, Any]:
        if not isinstance(items, dict | list | tuple):
            raise DamagedPickle("a damaged dictionary")
        budget.spend(len(items))
        pairs = list(items.items()) if isinstance(items, dict) else items
        if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
            raise DamagedPickle("a damaged dictionary")
        check_keys((key for key, _ in pairs), keys, "a dictionary's key")
        return dict(pairs)

    return made


def members(budget: Budget, items: Any = ()) -> set[Any]:
    """`set` and `frozenset`, as protocols before 4 write them."""
    if not isinstance(items, list | tuple | set):
        raise DamagedPickle("a damaged set")
    budget.spend(len(items))
    check_keys(items, PLAIN_KEYS, "a set's member")
    return set(items)


#: Calls that mean the same everywhere; `collections.OrderedDict` depends on the keys that are allowed.
COMMON_CALLS: dict[str, Callable[..., Any]] = {
    "numpy.dtype": numpy_type,
    "numpy._core.multiarray._reconstruct": empty_array,
    "numpy._core.multiarray.scalar": scalar,
    "numpy._core.numeric._frombuffer": array_from_buffer,
    "torch.Size": lambda budget, values=(): sizes(values, "a torch.Size"),
    "collections.defaultdict": lambda budget, factory=None: {},
    "_codecs.encode": encoded,
    "builtins.bytes": lambda budget: b"",
    "builtins.set": members,
    "builtins.frozenset": members,
}
