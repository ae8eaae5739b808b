"""Step through a pickle as data: no name in it is looked up, and nothing that it names is called.

A pickle is a program. Python's `pickle` runs it, and it may ask for any function there is. This machine steps through
the same program with values that are numbers, text, bytes, tuples, lists, dicts and sets, and what a `Vocabulary` adds
to them:

- A name such as `torch._utils._rebuild_tensor_v2` stays a name. Those in the vocabulary come with a function of ours
  that does what is meant; every other one ends the reading and is named.
- An object is a name and a state: what its class would do with the state is up to the vocabulary.
- What a pickle may cost is bounded: steps, digits of an integer, and copies by its own length (`Budget`).
- Keys of dicts and members of sets are plain. Hashing a deep tuple overflows the stack, and integers without bounds can
  be chosen to collide.

Two readers use it: `restricted_pickle.py` for the records of OC20's LMDB files, `launch/torch_file.py` for checkpoints.
Only the standard library is needed.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_MAX_INTEGER_BYTES = 32
#: Integers nearer to zero than this have hashes of their own.
_MAX_KEY = 1 << 60
_MAX_MEMO = 1 << 32
#: What `shown` shows of a value, in characters.
_SHOWN = 60
_SHOWN_NAME = 100
PLAIN_KEYS: tuple[type, ...] = (str, bytes, int, float, bool, type(None))


class PickleError(ValueError):
    """A pickle or a file of pickles cannot be read; the message is one line that says why."""


class RefusedName(PickleError):
    """The pickle names a function or class that is not in the vocabulary."""


class DamagedPickle(PickleError):
    """The bytes are not a pickle, or not one of the values that are expected."""


# ------------------------------------------------------------------------------------------------------------ values


class Name:
    """A function or class that the pickle named, and that the vocabulary knows."""

    __slots__ = ("call", "make", "name")

    def __init__(self, name: str, call: Callable[..., Any] | None, make: Callable[..., Any] | None) -> None:
        self.name = name
        self.call = call
        self.make = make


class Object:
    """An instance of a class in the vocabulary: the class's name, and what the pickle says about it.

    `stand_in` is the value that BUILD put in its place, if it did: the memo still has this object.
    """

    __slots__ = ("name", "stand_in", "state")

    def __init__(self, name: str, state: Any = None) -> None:
        self.name = name
        self.state = state
        self.stand_in: Any = None


class Budget:
    """What reading `size` bytes may cost; shared with the pickles inside them."""

    __slots__ = ("bytes", "max_steps", "size", "steps")

    def __init__(self, size: int, max_steps: int) -> None:
        self.size = size
        self.max_steps = max_steps
        self.steps = max_steps
        # A NumPy array of truths may be copied from text to bytes, to truths, and by its vocabulary once more.
        self.bytes = 4 * size + 4096

    def spend(self, amount: int) -> None:
        """Account for bytes or items that are written out, before they are.

        Raises:
            DamagedPickle: if that makes more than four times what the pickle has, which takes an intention.
        """
        self.bytes -= amount
        if self.bytes < 0:
            raise DamagedPickle("the pickle holds more than its own length")


def shown(value: Any) -> str:
    """A value of a pickle as a short text in one line; of containers the type alone, since they may hold themselves."""
    if isinstance(value, Name):
        return value.name
    if isinstance(value, Object):
        return f"a {value.name}"
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value) if abs(value) < 10**30 else "a huge number"
    if value is None or isinstance(value, str | bytes | bool | float):
        text = repr(value[:_SHOWN] if isinstance(value, str | bytes) else value)
        return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
    return f"a {type(value).__name__}"


def check_keys(values: Iterable[Any], allowed: tuple[type, ...], what: str) -> None:
    """Look at what is to be hashed, without hashing it.

    Raises:
        DamagedPickle: if a value is of another type than those allowed, or an integer of more than 60 bits.
    """
    for value in values:
        kind = type(value)
        if kind not in allowed or (kind is int and not -_MAX_KEY < value < _MAX_KEY):
            raise DamagedPickle(f"a damaged pickle: it has {shown(value)} as {what}")


# -------------------------------------------------------------------------------------------------------- vocabulary

#: Modules by their present names -> what Python 2 and older versions of NumPy wrote.
_OLDER_MODULES = {
    "builtins": "__builtin__",
    "copyreg": "copy_reg",
    "numpy._core.multiarray": "numpy.core.multiarray",
    "numpy._core.numeric": "numpy.core.numeric",
}

_NONE: Mapping[str, Callable[..., Any]] = {}


def refuse_state(budget: Budget, target: Any, state: Any) -> Any:
    """The BUILD of what has no state."""
    raise DamagedPickle(f"a damaged pickle: it changes {shown(target)}")


class Vocabulary:
    """What pickles may say, and what is meant by it. Names are those of today; their older spellings are known too.

    Args:
        purpose: what needs no other name, for messages.
        calls: name -> function of ours for REDUCE. It gets the machine's budget and the pickle's arguments, of which it
            must believe nothing, and raises DamagedPickle, or what Python raises for wrong arguments.
        makes: name -> function of ours for NEWOBJ, likewise.
        mentions: names that stand for nothing, but are passed to those functions.
        build: BUILD: (budget, target, state) -> what stands in the target's place; the target itself if it was changed.
        keys: types that a dict's keys may have; `PLAIN_KEYS` or fewer.
        max_steps: opcodes, with those of pickles inside that share the budget. It bounds memory: an opcode of one byte
            can make a set.
    """

    def __init__(
        self,
        purpose: str,
        *,
        calls: Mapping[str, Callable[..., Any]] = _NONE,
        makes: Mapping[str, Callable[..., Any]] = _NONE,
        mentions: Iterable[str] = (),
        build: Callable[[Budget, Any, Any], Any] = refuse_state,
        keys: tuple[type, ...] = PLAIN_KEYS,
        max_steps: int = 0,
    ) -> None:
        self.purpose = purpose
        self.build = build
        self.keys = keys
        self.max_steps = max_steps
        self.names: dict[str, Name] = {}
        for full in {*calls, *makes, *mentions}:
            module, _, name = full.rpartition(".")
            known = Name(full, calls.get(full), makes.get(full))
            self.names[full] = self.names[f"{_OLDER_MODULES.get(module, module)}.{name}"] = known


# ------------------------------------------------------------------------------------------------------- the machine


class Machine:
    """Reads pickles that stand one after the other in `data`.

    Args:
        data: bytes, or a file mapped into memory, of which no more is read than the pickles take.
        vocabulary: what they may say.
        budget: that of the machine around this one; a new one by default.
        persistent: what a persistent id stands for; without it, there may be none.
        at: where reading starts; later, where it has come to.
    """

    def __init__(
        self,
        data: bytes | mmap.mmap,
        vocabulary: Vocabulary,
        budget: Budget | None = None,
        persistent: Callable[[Any], Any] | None = None,
        at: int = 0,
    ) -> None:
        self.data = data
        self.at = at
        self.vocabulary = vocabulary
        self.budget = Budget(len(data), vocabulary.max_steps) if budget is None else budget
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The value of the next pickle.

        Raises:
            RefusedName: naming the function or class that was asked for.
            DamagedPickle: if the bytes are no pickle, or one that the vocabulary does not cover.
            Exception: what `persistent` raises.
        """
        try:
            return self._run()
        except PickleError:
            raise
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, struct.error) as error:
            # The machine leans on Python's own checks: an empty stack, a memo that is not there, text not in UTF-8.
            raise DamagedPickle(f"a damaged pickle ({type(error).__name__})") from error

    def _run(self) -> Any:
        self.stack, self.marks, self.memo = [], [], {}
        data, budget, steps = self.data, self.budget, _STEPS
        while True:
            code = data[self.at]
            self.at += 1
            if code == _STOP:
                return self.stack.pop()
            budget.steps -= 1
            if budget.steps < 0:
                raise DamagedPickle(f"the pickle takes more than {budget.max_steps:,} steps")
            step = steps.get(code)
            if step is None:
                raise DamagedPickle(f"the pickle has the opcode 0x{code:02x}, which no {self.vocabulary.purpose} needs")
            step(self)

    # what opcodes take out of the data

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        end = self.at + count
        if count < 0 or end > len(self.data):
            raise DamagedPickle("a damaged pickle: it is cut short")
        taken = self.data[self.at : end]
        self.at = end
        return taken

    def byte(self) -> int:
        value = self.data[self.at]
        self.at += 1
        return value

    def number(self, layout: struct.Struct) -> Any:
        (value,) = layout.unpack_from(self.data, self.at)
        self.at += layout.size
        return value

    def line(self, encoding: str = "utf-8") -> str:
        end = self.data.find(b"\n", self.at)
        if end < 0:
            raise DamagedPickle("a damaged pickle: it is cut short")
        taken = self.data[self.at : end]
        self.at = end + 1
        return taken.decode(encoding)

    def written_integer(self) -> int:
        text = self.line().removesuffix("L")
        if len(text) > 2 * _MAX_INTEGER_BYTES:
            raise DamagedPickle(f"a damaged pickle: an integer has {len(text)} digits")
        return int(text)

    # plain values

    def pop(self) -> None:
        # A mark without anything above it is taken off by POP too.
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()

    def integer(self, count: int) -> None:
        if count > _MAX_INTEGER_BYTES:
            raise DamagedPickle(f"a damaged pickle: an integer has {count} bytes")
        self.stack.append(int.from_bytes(self.take(count), "little", signed=True))

    def integer_or_truth(self) -> None:
        """Protocol 0 writes True as the integer 01."""
        truth = {b"00\n": False, b"01\n": True}.get(self.data[self.at : self.at + 3])
        value = self.written_integer()
        self.stack.append(value if truth is None else truth)

    # containers

    def since_mark(self) -> list[Any]:
        """Everything above the last mark, which is taken off with it."""
        mark = self.marks.pop()
        if mark > len(self.stack):
            raise DamagedPickle("a damaged pickle: it takes what is below a mark")
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise DamagedPickle("a damaged pickle: a tuple lacks its items")
        values = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.stack.append(values)

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise DamagedPickle(f"a damaged pickle: it adds items to {shown(target)}")
        target.extend(items)

    def set_since_mark(self) -> None:
        items = self.since_mark()
        self.stack.append(set())
        self.add(items)

    def add(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not set:
            raise DamagedPickle(f"a damaged pickle: it adds members to {shown(target)}")
        check_keys(items, PLAIN_KEYS, "a set's member")
        target.update(items)

    def dict_since_mark(self) -> None:
        items = self.since_mark()
        self.stack.append({})
        self.set_items(items)

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict:
            raise DamagedPickle(f"a damaged pickle: it sets an item of {shown(target)}")
        keys = items[::2]
        check_keys(keys, self.vocabulary.keys, "a dictionary's key")
        target.update(zip(keys, items[1::2], strict=True))

    # the memo

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def written_index(self) -> int:
        """Protocol 0 writes places in the memo in decimals; of any size, they could be chosen to collide."""
        index = self.written_integer()
        if not 0 <= index < _MAX_MEMO:
            raise DamagedPickle("a damaged pickle: a place in the memo that cannot be")
        return index

    def recall(self, index: int) -> None:
        value = self.memo[index]
        if type(value) is Object and value.stand_in is not None:
            value = value.stand_in
        self.stack.append(value)

    # names and objects

    def name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise DamagedPickle("a damaged pickle: a name is not text")
        full = f"{module}.{name}"
        known = self.vocabulary.names.get(full)
        if known is None:
            text = "".join(c if c.isprintable() else "?" for c in full[:_SHOWN_NAME])
            purpose = self.vocabulary.purpose
            raise RefusedName(f"the pickle asks for {text}, which no {purpose} needs; nothing was run")
        self.stack.append(known)

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.name(module, name)

    def instance(self) -> None:
        self.name(self.line(), self.line())
        raise DamagedPickle(f"the pickle makes {shown(self.stack[-1])} as Python 2 made old classes")

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not Name or function.call is None or type(arguments) is not tuple:
            raise DamagedPickle(f"the pickle asks for a call of {shown(function)}")
        self.stack.append(function.call(self.budget, *arguments))

    def make(self) -> None:
        arguments, class_ = self.stack.pop(), self.stack.pop()
        if type(class_) is not Name or class_.make is None or type(arguments) is not tuple:
            raise DamagedPickle(f"the pickle asks for an instance of {shown(class_)}")
        self.stack.append(class_.make(self.budget, *arguments))

    def make_with_keywords(self) -> None:
        keywords = self.stack.pop()
        if type(keywords) is not dict or keywords:
            raise DamagedPickle("the pickle makes an object with keywords")
        self.make()

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        built = self.vocabulary.build(self.budget, target, state)
        if built is not target:
            self.stack[-1] = target.stand_in = built

    def refer(self) -> None:
        if self.persistent is None:
            raise DamagedPickle("the pickle refers to objects outside it")
        self.stack.append(self.persistent(self.stack.pop()))


_U2, _U4, _U8 = (struct.Struct(f"<{letter}") for letter in "HIQ")
_I4 = struct.Struct("<i")
_F8 = struct.Struct(">d")
_STOP = ord(".")

#: The opcodes by the names of `pickletools`. Left out: Python 2's strings of protocol 0, old classes, extension codes,
#: persistent ids in text, out-of-band buffers.
_STEPS: dict[int, Callable[[Machine], Any]] = {
    0x80: lambda m: m.take(1),  # PROTO
    0x95: lambda m: m.take(8),  # FRAME: a hint for reading ahead
    ord("("): lambda m: m.marks.append(len(m.stack)),  # MARK
    ord("0"): Machine.pop,  # POP
    ord("1"): Machine.since_mark,  # POP_MARK
    ord("2"): lambda m: m.stack.append(m.stack[-1]),  # DUP
    # plain values
    ord("N"): lambda m: m.stack.append(None),  # NONE
    0x88: lambda m: m.stack.append(True),  # NEWTRUE
    0x89: lambda m: m.stack.append(False),  # NEWFALSE
    ord("I"): Machine.integer_or_truth,  # INT
    ord("L"): lambda m: m.stack.append(m.written_integer()),  # LONG
    ord("J"): lambda m: m.stack.append(m.number(_I4)),  # BININT
    ord("K"): lambda m: m.stack.append(m.byte()),  # BININT1
    ord("M"): lambda m: m.stack.append(m.number(_U2)),  # BININT2
    0x8A: lambda m: m.integer(m.byte()),  # LONG1
    0x8B: lambda m: m.integer(m.number(_U4)),  # LONG4
    ord("F"): lambda m: m.stack.append(float(m.line())),  # FLOAT
    ord("G"): lambda m: m.stack.append(m.number(_F8)),  # BINFLOAT
    ord("V"): lambda m: m.stack.append(m.line("raw_unicode_escape")),  # UNICODE
    0x8C: lambda m: m.stack.append(m.take(m.byte()).decode("utf-8")),  # SHORT_BINUNICODE
    ord("X"): lambda m: m.stack.append(m.take(m.number(_U4)).decode("utf-8")),  # BINUNICODE
    0x8D: lambda m: m.stack.append(m.take(m.number(_U8)).decode("utf-8")),  # BINUNICODE8
    ord("U"): lambda m: m.stack.append(
        m.take(m.byte()).decode("latin-1")
    ),  # SHORT_BINSTRING: Python 2's, text or bytes
    ord("T"): lambda m: m.stack.append(m.take(m.number(_U4)).decode("latin-1")),  # BINSTRING
    ord("C"): lambda m: m.stack.append(m.take(m.byte())),  # SHORT_BINBYTES
    ord("B"): lambda m: m.stack.append(m.take(m.number(_U4))),  # BINBYTES
    0x8E: lambda m: m.stack.append(m.take(m.number(_U8))),  # BINBYTES8
    0x96: lambda m: m.stack.append(m.take(m.number(_U8))),  # BYTEARRAY8
    # containers; a frozenset is a set
    ord(")"): lambda m: m.stack.append(()),  # EMPTY_TUPLE
    ord("t"): lambda m: m.stack.append(tuple(m.since_mark())),  # TUPLE
    0x85: lambda m: m.tuple_of(1),  # TUPLE1
    0x86: lambda m: m.tuple_of(2),  # TUPLE2
    0x87: lambda m: m.tuple_of(3),  # TUPLE3
    ord("]"): lambda m: m.stack.append([]),  # EMPTY_LIST
    ord("l"): lambda m: m.stack.append(m.since_mark()),  # LIST
    ord("a"): lambda m: m.extend([m.stack.pop()]),  # APPEND
    ord("e"): lambda m: m.extend(m.since_mark()),  # APPENDS
    0x8F: lambda m: m.stack.append(set()),  # EMPTY_SET
    0x90: lambda m: m.add(m.since_mark()),  # ADDITEMS
    0x91: Machine.set_since_mark,  # FROZENSET
    ord("}"): lambda m: m.stack.append({}),  # EMPTY_DICT
    ord("d"): Machine.dict_since_mark,  # DICT
    ord("s"): Machine.set_item,  # SETITEM
    ord("u"): lambda m: m.set_items(m.since_mark()),  # SETITEMS
    # the memo
    ord("p"): lambda m: m.remember(m.written_index()),  # PUT
    ord("q"): lambda m: m.remember(m.byte()),  # BINPUT
    ord("r"): lambda m: m.remember(m.number(_U4)),  # LONG_BINPUT
    0x94: lambda m: m.remember(len(m.memo)),  # MEMOIZE
    ord("g"): lambda m: m.recall(m.written_index()),  # GET
    ord("h"): lambda m: m.recall(m.byte()),  # BINGET
    ord("j"): lambda m: m.recall(m.number(_U4)),  # LONG_BINGET
    # names and objects
    ord("c"): lambda m: m.name(m.line(), m.line()),  # GLOBAL
    0x93: Machine.stack_global,  # STACK_GLOBAL
    ord("i"): Machine.instance,  # INST
    ord("R"): Machine.call,  # REDUCE
    0x81: Machine.make,  # NEWOBJ
    0x92: Machine.make_with_keywords,  # NEWOBJ_EX
    ord("b"): Machine.build,  # BUILD
    ord("Q"): Machine.refer,  # BINPERSID
}
