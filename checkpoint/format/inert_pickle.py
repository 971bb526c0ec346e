"""Pickles read as data: their instructions are followed without ever importing, calling or making what they name.

A pickle is a small program (https://peps.python.org/pep-0307, https://peps.python.org/pep-3154). Here it ends in
plain values, and in inert records of what it would have called; whoever asked for it looks at those by a schema.
Mappings stay lists of pairs, since keys can be records, and hashes of chosen keys can be made to collide.
"""

import gc
import struct
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, final

from regrow.checkpoint.documents import DocumentError

__all__ = ["Global", "Pairs", "PickleReader", "Record", "Reference", "describe", "shortened"]

# What a pickle's values may take of memory: so much, and so many bytes for each byte of it. DCP's descriptions of
# large models take about 16.
_BASE_BYTES = 64 << 20
_BYTES_PER_BYTE = 32
# Python's own pickler nests no deeper than its recursion limit.
_MOST_MARKS = 10_000
_LONGEST_NAME = 512
_LONGEST_INTEGER = 64
_LAST_PROTOCOL = 5


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function that a pickle names; nothing but its name."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@final
class Record:
    """What a pickle would have made by calling something.

    Attributes:
        what: the class or function.
        args: of the call.
        state: what the object would have been given then; None without.
    """

    __slots__ = ("args", "state", "what")

    def __init__(self, what: Global, args: tuple[Any, ...]) -> None:
        self.what = what
        self.args = args
        self.state: Any = None


@final
class Pairs:
    """A mapping as it lies in the pickle: pairs of key and value, in order; keys can repeat.

    Attributes:
        items: the pairs.
        is_ordered: it is an OrderedDict, which can bear attributes besides (they are dropped).
    """

    __slots__ = ("is_ordered", "items")

    def __init__(self, *, is_ordered: bool = False) -> None:
        self.items: list[tuple[Any, Any]] = []
        self.is_ordered = is_ordered


@final
class Reference:
    """What the pickle says lies outside of it."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


_ORDERED = Global("collections", "OrderedDict")
_MARK = object()
_NOTHING = object()


def describe(value: Any) -> str:
    """A value's kind in a few words, however large or deep it is."""
    if isinstance(value, Record):
        return f"a {value.what}"
    if isinstance(value, Global):
        return f"the name {value}"
    if isinstance(value, Pairs):
        return "a mapping"
    if isinstance(value, int | float | str | bytes) and not isinstance(value, bool):
        return shortened(value)
    return "None" if value is None else f"a {type(value).__name__}"


def shortened(value: int | float | str | bytes) -> str:
    """A value for a message: on one line, of bounded length."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, str | bytes) and len(value) > 80:
        return f"{value[:80]!a}…"
    return ascii(value)


@contextmanager
def _without_collections() -> Iterator[None]:
    """No garbage arises here, and Python would look at all that there is again and again: eight times as slow."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@final
class PickleReader:
    """Follows a pickle's instructions.

    Args:
        body: the file's bytes.
        known: what the pickle may name.
        start: where the pickle begins.

    Attributes:
        position: behind the last instruction read.
        references: what has come up that lies outside of the pickle.
    """

    def __init__(self, body: bytes, known: Container[Global], start: int = 0) -> None:
        self.position = start
        self.references: list[Reference] = []
        self._body = body
        self._known = known
        self._left = _BASE_BYTES + _BYTES_PER_BYTE * (len(body) - start)
        self._stack: list[Any] = []
        self._memo: list[Any] = []
        self._marks = 0

    def load(self) -> Any:
        """The value.

        Raises:
            DocumentError: it is no pickle, names or does what it may not, or needs too much memory.
        """
        try:
            with _without_collections():
                self._run()
            return self._pop()
        except IndexError:
            self._fail("it takes what was never put there")
        except UnicodeDecodeError:
            self._fail("it holds text that is not UTF-8")

    def _run(self) -> None:
        body, size, stack = self._body, len(self._body), self._stack
        while self.position < size:
            code = body[self.position]
            self.position += 1
            if code == _STOP:
                return
            handler = _HANDLERS[code]
            if handler is None:
                self._fail(f"it has an instruction ({code:#04x}) that torch does not write")
            handler(self)
            if len(stack) * 8 > self._left:
                self._fail("it needs too much memory")
        self._fail("it ends too early")

    def _fail(self, reason: str) -> NoReturn:
        raise DocumentError(reason)

    def _charge(self, nbytes: int) -> None:
        self._left -= nbytes
        if self._left < 0:
            self._fail("it needs too much memory")

    def _take(self, count: int) -> bytes:
        start, stop = self.position, self.position + count
        if stop > len(self._body):
            self._fail("it ends too early")
        self.position = stop
        return self._body[start:stop]

    def _number(self, layout: struct.Struct) -> int:
        return int(layout.unpack(self._take(layout.size))[0])

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            self._fail("it takes what was never put there")
        return value

    def _top(self) -> Any:
        value = self._stack[-1]
        if value is _MARK:
            self._fail("it takes what was never put there")
        return value

    def _pop_mark(self) -> list[Any]:
        stack = self._stack
        # The mark is near the top: batches are of 1,000 items, tuples of a few.
        index = len(stack) - 1
        while stack[index] is not _MARK:
            index -= 1
            if index < 0:
                self._fail("it takes what was never put there")
        items = stack[index + 1 :]
        del stack[index:]
        self._marks -= 1
        return items

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    # What ends up on the stack.

    def _mark(self) -> None:
        self._marks += 1
        if self._marks > _MOST_MARKS:
            self._fail("it is nested too deeply")
        self._stack.append(_MARK)

    def _protocol(self) -> None:
        if self._take(1)[0] > _LAST_PROTOCOL:
            self._fail("it is of a protocol that is not known")

    def _frame(self) -> None:
        if self._number(_U64) > len(self._body) - self.position:
            self._fail("it ends too early")

    def _none(self) -> None:
        self._stack.append(None)

    def _true(self) -> None:
        self._stack.append(True)

    def _false(self) -> None:
        self._stack.append(False)

    def _int32(self) -> None:
        self._charge(32)
        self._stack.append(self._number(_I32))

    def _int8(self) -> None:
        self._stack.append(self._take(1)[0])

    def _int16(self) -> None:
        self._charge(32)
        self._stack.append(self._number(_U16))

    def _long(self, count: int) -> None:
        if count > _LONGEST_INTEGER:
            self._fail(f"it holds an integer of {count} bytes")
        self._charge(96)
        self._stack.append(int.from_bytes(self._take(count), "little", signed=True))

    def _float(self) -> None:
        self._charge(24)
        self._stack.append(_F64.unpack(self._take(8))[0])

    def _text(self, count: int) -> None:
        raw = self._take(count)
        # A character beyond the first plane makes all of them four bytes wide.
        self._charge(64 + (count if raw.isascii() else 4 * count))
        self._stack.append(raw.decode("utf-8", "surrogatepass"))

    def _old_text(self, count: int) -> None:
        self._charge(64 + count)
        self._stack.append(self._take(count).decode("latin-1"))

    def _bytes(self, count: int) -> None:
        self._charge(64 + count)
        self._stack.append(self._take(count))

    def _global(self) -> None:
        lines = []
        for _ in range(2):
            end = self._body.find(b"\n", self.position, self.position + _LONGEST_NAME)
            if end < 0:
                self._fail("it names something without an end")
            lines.append(self._body[self.position : end].decode())
            self.position = end + 1
        self._find(lines[0], lines[1])

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if not (isinstance(module, str) and isinstance(name, str)):
            self._fail("it names something by what is not text")
        self._find(module, name)

    def _find(self, module: str, name: str) -> None:
        found = Global(module, name)
        if found not in self._known:
            self._fail(f"it names {shortened(module)[1:-1]}.{shortened(name)[1:-1]}, which no such file needs")
        self._charge(64)
        self._stack.append(found)

    def _reduce(self) -> None:
        args, what = self._pop(), self._pop()
        if not isinstance(what, Global) or not isinstance(args, tuple):
            self._fail("it calls what is not a known name")
        self._charge(96)
        self._push(Pairs(is_ordered=True) if what == _ORDERED and not args else Record(what, args))

    def _new(self) -> None:
        args, what = self._pop(), self._pop()
        if not isinstance(what, Global) or not isinstance(args, tuple):
            self._fail("it makes an object of what is not a known name")
        self._charge(96)
        self._push(Record(what, args))

    def _build(self) -> None:
        state, target = self._pop(), self._top()
        if isinstance(target, Pairs) and target.is_ordered:
            return
        if not isinstance(target, Record) or target.state is not None:
            self._fail(f"it changes {describe(target)}")
        target.state = state

    def _reference(self) -> None:
        self._charge(64)
        self.references.append(Reference(self._pop()))
        self._push(self.references[-1])

    # Containers.

    def _list(self) -> None:
        self._charge(64)
        self._stack.append([])

    def _append(self) -> None:
        value, target = self._pop(), self._top()
        self._extend(target, [value])

    def _appends(self) -> None:
        items = self._pop_mark()
        self._extend(self._top(), items)

    def _extend(self, target: Any, items: list[Any]) -> None:
        if not isinstance(target, list):
            self._fail(f"it appends to {describe(target)}")
        self._charge(9 * len(items))
        target.extend(items)

    def _mapping(self) -> None:
        self._charge(128)
        self._stack.append(Pairs())

    def _set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._set(self._top(), [key, value])

    def _set_items(self) -> None:
        items = self._pop_mark()
        self._set(self._top(), items)

    def _set(self, target: Any, items: list[Any]) -> None:
        if not isinstance(target, Pairs) or len(items) % 2:
            self._fail(f"it sets an item of {describe(target)}")
        self._charge(36 * len(items))
        target.items.extend(zip(items[::2], items[1::2], strict=True))

    def _empty_tuple(self) -> None:
        self._stack.append(())

    def _tuple(self, count: int) -> None:
        values = tuple(reversed([self._pop() for _ in range(count)]))
        self._charge(48 + 8 * count)
        self._stack.append(values)

    def _marked_tuple(self) -> None:
        values = tuple(self._pop_mark())
        self._charge(48 + 8 * len(values))
        self._stack.append(values)

    def _drop(self) -> None:
        if self._stack.pop() is _MARK:
            self._marks -= 1

    def _drop_to_mark(self) -> None:
        self._pop_mark()

    # The memo.

    def _memoize(self) -> None:
        self._charge(9)
        self._memo.append(self._top())

    def _put(self, index: int) -> None:
        # Every pickler numbers one after the other, an old one from 1.
        for _ in range(min(index - len(self._memo) + 1, 2)):
            self._charge(9)
            self._memo.append(_NOTHING)
        if index >= len(self._memo):
            self._fail("it numbers its values as no pickle does")
        self._memo[index] = self._top()

    def _get(self, index: int) -> None:
        value = self._memo[index]
        if value is _NOTHING:
            self._fail("it takes what was never put there")
        self._stack.append(value)


_U8, _U16, _U32, _U64 = struct.Struct("<B"), struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<Q")
_I32, _F64 = struct.Struct("<i"), struct.Struct(">d")
_STOP = ord(".")
_Handler = Callable[[PickleReader], None]


def _counted(method: Callable[[PickleReader, int], None], layout: struct.Struct) -> _Handler:
    """An instruction whose argument is a number in front of its data."""
    return lambda reader: method(reader, reader._number(layout))


def _fixed(method: Callable[[PickleReader, int], None], count: int) -> _Handler:
    return lambda reader: method(reader, count)


def _handlers() -> list[_Handler | None]:
    """By instruction; None for those that are refused: INST, OBJ, EXT1 to EXT4, NEWOBJ_EX, PERSID, sets and more."""
    r = PickleReader
    table: dict[bytes, _Handler] = {
        b"\x80": r._protocol, b"\x95": r._frame, b"(": r._mark, b"0": r._drop, b"1": r._drop_to_mark,
        b"N": r._none, b"\x88": r._true, b"\x89": r._false,
        b"J": r._int32, b"K": r._int8, b"M": r._int16, b"G": r._float,
        b"\x8a": _counted(r._long, _U8), b"\x8b": _counted(r._long, _U32),
        b"X": _counted(r._text, _U32), b"\x8c": _counted(r._text, _U8), b"\x8d": _counted(r._text, _U64),
        b"T": _counted(r._old_text, _U32), b"U": _counted(r._old_text, _U8),
        b"B": _counted(r._bytes, _U32), b"C": _counted(r._bytes, _U8), b"\x8e": _counted(r._bytes, _U64),
        b"c": r._global, b"\x93": r._stack_global, b"R": r._reduce, b"\x81": r._new, b"b": r._build,
        b"Q": r._reference,
        b"]": r._list, b"a": r._append, b"e": r._appends, b"}": r._mapping, b"s": r._set_item, b"u": r._set_items,
        b")": r._empty_tuple, b"t": r._marked_tuple,
        b"\x85": _fixed(r._tuple, 1), b"\x86": _fixed(r._tuple, 2), b"\x87": _fixed(r._tuple, 3),
        b"\x94": r._memoize, b"q": _counted(r._put, _U8), b"r": _counted(r._put, _U32),
        b"h": _counted(r._get, _U8), b"j": _counted(r._get, _U32),
    }  # fmt: skip
    return [table.get(bytes([code])) for code in range(256)]


_HANDLERS = _handlers()
