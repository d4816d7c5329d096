# cython: cdivision=True, boundscheck=False, wraparound=False
"""Move bytes and descriptors between a host and its compartment: values, frames, SCM_RIGHTS.

Runs on both sides. In the host, every byte that is decoded here was written by an attacker: a length
is compared with what is really there before anything is allocated by it, the memory that the objects
will take is counted before it is taken, and no code of a registered class runs. There is no policy in
here, and nothing of compart is imported.

A value is one tag byte and what the tag says; a size is one byte below 253, or 253, 254, 255 and two,
four, eight bytes. Numbers are in the byte order of the machine: both ends run on it. Strings that may
come again (dictionary keys above all) are numbered as they pass and travel as REF afterwards.
"""

cimport cython
from cpython cimport datetime as times
from cpython.buffer cimport (
    PyBUF_FORMAT, PyBUF_FULL_RO, PyBUF_ND, PyBUF_SIMPLE, PyBUF_STRIDES, PyBUF_WRITABLE, PyBuffer_IsContiguous,
    PyBuffer_Release, PyBuffer_ToContiguous, PyObject_CheckBuffer, PyObject_GetBuffer,
)
from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_FromStringAndSize, PyByteArray_Resize
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_Realloc
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF, Py_XDECREF
from libc.errno cimport EAGAIN, EINTR, EPIPE, errno
from libc.stdint cimport int16_t, int32_t, int64_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memmove, memset

import datetime as _datetime
import decimal as _decimal
import enum as _enum
import os as _os
import re as _re
import struct as _struct
import sys as _sys
import types as _types
import uuid as _uuid

times.import_datetime()


class FastError(Exception):
    """The base of what encode, decode and the frame functions raise about a value or a message."""


class Unencodable(FastError, TypeError):
    """encode met a value outside the closed set. `reason` says why; where it lies, the caller finds out."""

    def __init__(self, reason):
        super().__init__(reason)
        self.reason = reason


class Malformed(FastError, ValueError):
    """The bytes or descriptors of a peer were refused; the message says why."""


class TooLarge(FastError, ValueError):
    """encode passed its limit: `size` is how many bytes it had come to (at least), `limit` the bound."""

    def __init__(self, size, limit):
        super().__init__(f"{size} bytes or more do not fit the limit of {limit} bytes")
        self.size = size
        self.limit = limit


# ---------------------------------------------------------------------------------------------- the wire

cdef enum:
    T_NONE = 0
    T_TRUE = 1
    T_FALSE = 2
    T_UINT8 = 3
    T_INT16 = 4
    T_INT32 = 5
    T_INT64 = 6
    T_INT = 7  # size, two's complement
    T_FLOAT = 8
    T_COMPLEX = 9
    T_STR = 10
    T_NAME = 11  # a string that gets the next number
    T_REF = 12  # the string of that number
    T_BYTES = 13
    T_BYTES_OUT = 14  # size; the content is the next out-of-band buffer
    T_BYTEARRAY = 15
    T_BYTEARRAY_OUT = 16
    T_LIST = 17
    T_TUPLE = 18
    T_DICT = 19
    T_SET = 20
    T_FROZENSET = 21
    T_DATE = 22
    T_TIME = 23
    T_DATETIME = 24
    T_TIMEDELTA = 25
    T_TIMEZONE = 26
    T_ZONE = 27
    T_DECIMAL = 28
    T_UUID = 29
    T_ENUM = 30
    T_NAMEDTUPLE = 31
    T_DATACLASS = 32
    T_BUFFER = 33
    T_CAPABILITY = 34

    FROM_NUMPY = 1  # flags of T_BUFFER
    OUT_OF_BAND = 2

    DEPTH = 256
    NAMES = 4096  # numbered strings in one message
    SCRATCH = 1024  # bytes encoded on the C stack before the heap is asked
    SLOTS = 128  # of the first table of numbered strings
    SLACK = 16  # what one `room` may ask for beyond what it uses; the end is checked exactly
    DIGITS = 65536  # of a Decimal: parsing and hashing stay fast
    CALM = 32  # tables up to this many entries are too small to flood
    SAME = 32  # keys of one hash in one table
    SAME_NESTED = 4  # the same for a frozenset that is itself a key
    SET_LEVELS = 3  # frozensets in each other that are a key
    PROBES = 256  # that building a table may take, on average for a key
    MAX_NDIM = 32

    NO_KEY = 0  # where a value lies: in the open,
    KEY = 1  # as a key or a member of a set, and one more for every frozenset around it

HEADER = 16
cdef uint32_t MAGIC = 0x31747063  # b"cpt1"

cdef extern from "Python.h":
    PyObject *Py_None
    PyObject *Py_True
    PyObject *Py_False
    ctypedef struct PyTypeObject:
        pass
    PyTypeObject PyUnicode_Type, PyLong_Type, PyFloat_Type, PyBool_Type, PyComplex_Type, PyBytes_Type
    PyTypeObject PyByteArray_Type, PyList_Type, PyTuple_Type, PyDict_Type, PySet_Type, PyFrozenSet_Type
    PyTypeObject *type_of "Py_TYPE"(PyObject *)
    Py_ssize_t references "Py_REFCNT"(PyObject *)

    bint PyUnicode_IS_ASCII(PyObject *)
    Py_ssize_t PyUnicode_GET_LENGTH(PyObject *)
    int PyUnicode_KIND(PyObject *)
    void *PyUnicode_DATA(PyObject *)
    PyObject *PyUnicode_DecodeUTF8(const char *, Py_ssize_t, const char *) except NULL
    bytes PyUnicode_AsEncodedString(PyObject *, const char *, const char *)
    int64_t PyLong_AsLongLongAndOverflow(PyObject *, int *) except? -1
    PyObject *PyLong_FromLongLong(int64_t) except NULL
    double PyFloat_AS_DOUBLE(PyObject *)
    PyObject *PyFloat_FromDouble(double) except NULL
    double PyComplex_RealAsDouble(object)
    double PyComplex_ImagAsDouble(object)
    PyObject *PyComplex_FromDoubles(double, double) except NULL

    Py_ssize_t bytes_size "PyBytes_GET_SIZE"(PyObject *)
    char *bytes_data "PyBytes_AS_STRING"(PyObject *)
    Py_ssize_t bytearray_size "PyByteArray_GET_SIZE"(PyObject *)
    char *bytearray_data "PyByteArray_AS_STRING"(PyObject *)
    PyObject *new_bytes "PyBytes_FromStringAndSize"(const char *, Py_ssize_t) except NULL
    int _PyBytes_Resize(PyObject **, Py_ssize_t) except -1

    list PyList_New(Py_ssize_t)
    Py_ssize_t list_size "PyList_GET_SIZE"(PyObject *)
    PyObject *list_item "PyList_GET_ITEM"(PyObject *, Py_ssize_t)
    void PyList_SET_ITEM(PyObject *, Py_ssize_t, PyObject *)
    tuple PyTuple_New(Py_ssize_t)
    Py_ssize_t tuple_size "PyTuple_GET_SIZE"(PyObject *)
    PyObject *tuple_item "PyTuple_GET_ITEM"(PyObject *, Py_ssize_t)
    void PyTuple_SET_ITEM(PyObject *, Py_ssize_t, PyObject *)
    Py_ssize_t dict_size "PyDict_GET_SIZE"(PyObject *)
    bint dict_next "PyDict_Next"(PyObject *, Py_ssize_t *, PyObject **, PyObject **)
    int PyDict_SetItem(dict, object, object) except -1
    Py_ssize_t set_size "PySet_GET_SIZE"(PyObject *)
    Py_hash_t PyObject_Hash(PyObject *) except -1
    int PyObject_GenericSetAttr(object, object, object) except -1


cdef class _Entry:
    """A registered type, taken apart once."""

    cdef int tag
    cdef Py_ssize_t index
    cdef object cls
    cdef tuple fields  # dataclass and NamedTuple
    cdef dict members  # Enum: name -> member, aliases too
    cdef bint flags  # an enum.Flag whose combinations are made by the standard library alone
    cdef bint key  # hashing and comparing it runs no code of the class


cdef class Registry:
    """The types of one function that may leave as themselves: `Registry(types, ndarray=None)`.

    Each is an Enum, a NamedTuple or a dataclass, else TypeError. Both sides must name the same types in
    the same order. `ndarray` builds what the caller gets for a Buffer that was a numpy array.
    """

    cdef list entries
    cdef dict by_type
    cdef object ndarray

    def __cinit__(self, types=(), *, ndarray=None):
        self.entries = []
        self.by_type = {}
        self.ndarray = ndarray
        for cls in types:
            if cls not in self.by_type:
                self.by_type[cls] = _entry(cls, len(self.entries))
                self.entries.append(self.by_type[cls])


_FLAG_MISSING = _enum.Flag._missing_.__func__


cdef object _combined(cls, value):
    try:
        made = cls(value)
    except ValueError:
        made = None
    if type(made) is not cls:
        raise Malformed(f"no combination of {_name(cls)}")
    return made


cdef _Entry _entry(cls, Py_ssize_t index):
    cdef _Entry entry = _Entry()
    if not isinstance(cls, type):
        raise TypeError(f"{cls!r} is not a type")
    entry.index = index
    entry.cls = cls
    # A slot wrapper is C code of a builtin type; a plain function could be anybody's.
    entry.key = type(cls.__eq__) is _SLOT and (type(cls.__hash__) is _SLOT or cls.__hash__ is _enum.Enum.__hash__)
    if issubclass(cls, _enum.Enum):
        entry.tag = T_ENUM
        entry.members = dict(cls.__members__)
        entry.flags = issubclass(cls, _enum.Flag) and getattr(cls._missing_, "__func__", None) is _FLAG_MISSING
    elif issubclass(cls, tuple) and isinstance(getattr(cls, "_fields", None), tuple):
        entry.tag = T_NAMEDTUPLE
        entry.fields = cls._fields
    elif "__dataclass_fields__" in vars(cls):
        import dataclasses

        entry.tag = T_DATACLASS
        entry.fields = tuple(field.name for field in dataclasses.fields(cls))
        entry.key = False
        _refuse_own_machinery(cls, entry.fields)
    else:
        raise TypeError(f"{_name(cls)} is neither an Enum nor a NamedTuple nor a dataclass")
    return entry


cdef _refuse_own_machinery(cls, tuple fields):
    # object.__new__ on a subclass of, say, dict would leave the C struct of the dict unset.
    for base in cls.__mro__[1:]:
        if base is not object and not base.__flags__ & (1 << 9):  # Py_TPFLAGS_HEAPTYPE: written in Python
            raise TypeError(f"{_name(cls)} derives from {base.__name__} and cannot be rebuilt field by field")
    # A property in the place of a field would run its setter on what a compartment sent.
    for name in fields:
        for base in cls.__mro__:
            if name in vars(base):
                found = type(vars(base)[name])
                if hasattr(found, "__set__") and found is not _MEMBER:
                    raise TypeError(f"{_name(cls)}.{name} is set by code of the class")
                break


_SLOT = _types.WrapperDescriptorType
_MEMBER = _types.MemberDescriptorType  # what __slots__ makes
_new_object = object.__new__
_new_tuple = tuple.__new__
_Decimal = _decimal.Decimal
_UUID = _uuid.UUID
_timezone = _datetime.timezone
_SAFE = (_uuid.SafeUUID.unknown, _uuid.SafeUUID.safe, _uuid.SafeUUID.unsafe)
_DECIMAL = _re.compile(r"-?(?:[0-9]+(?:\.[0-9]+)?(?:E[+-][0-9]+)?|Infinity|s?NaN[0-9]*)", _re.ASCII)
_ZONE = _re.compile(r"[A-Za-z0-9_+-]+(?:/[A-Za-z0-9_+-]+){0,3}", _re.ASCII)


cdef str _name(cls):
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


# ---------------------------------------------------------------------------------------------- encode

cdef struct Slot:
    PyObject *string  # owned: a freed string's address may name another one later
    size_t number

cdef struct Writer:
    unsigned char *base
    size_t used
    size_t size
    size_t outside  # bytes that travel in `buffers`
    size_t limit
    size_t inline_below
    PyObject *heap  # owned bytes that `base` points into, or NULL while the scratch is enough
    PyObject *buffers  # borrowed from the caller, as are the next two
    PyObject *describe
    PyObject *registry
    Slot *slots
    Slot *first_slots
    size_t mask
    size_t names


def encode(
    value,
    Registry registry not None,
    Py_ssize_t limit,
    *,
    Py_ssize_t inline=65536,
    list buffers=None,
    describe=None,
):
    """Return `value` as bytes; only the closed set passes, and `describe(obj)` may name others by kind.

    With a list in `buffers`, contents of `inline` bytes or more are appended to it (as bytes-like objects)
    instead of being copied. Raises Unencodable, and TooLarge when both together pass `limit` bytes.
    """
    cdef unsigned char scratch[SCRATCH]
    cdef Slot slots[SLOTS]
    cdef Writer w
    cdef Py_ssize_t kept = 0 if buffers is None else len(buffers)
    w.base = scratch
    w.used = 0
    w.size = SCRATCH
    w.outside = 0
    w.limit = min(max(limit, 0), <Py_ssize_t>1 << 60)
    w.inline_below = max(inline, 0)
    w.heap = NULL
    w.buffers = NULL if buffers is None else <PyObject *>buffers
    w.describe = NULL if describe is None else <PyObject *>describe
    w.registry = <PyObject *>registry
    w.slots = NULL
    w.first_slots = slots
    w.mask = 0
    w.names = 0
    try:
        put(&w, <PyObject *>value, 0, NO_KEY)
        if w.used + w.outside > w.limit:
            raise TooLarge(w.used + w.outside, w.limit)
        return finished(&w)
    except:
        if buffers is not None:
            del buffers[kept:]
        raise
    finally:
        Py_XDECREF(w.heap)
        forget_names(&w)


cdef bytes finished(Writer *w):
    if w.heap == NULL:
        return PyBytes_FromStringAndSize(<char *>w.base, w.used)
    _PyBytes_Resize(&w.heap, w.used)
    return <bytes>w.heap


cdef int put(Writer *w, PyObject *value, int depth, int key) except -1:
    """Write one value. `value` may be borrowed: a leaf is written before any other code can run."""
    cdef PyTypeObject *kind = type_of(value)
    if kind == &PyUnicode_Type:
        # With one reference it cannot come again.
        return put_name(w, value) if references(value) > 1 else put_str(w, value, T_STR)
    if kind == &PyLong_Type:
        return put_int(w, value)
    if kind == &PyFloat_Type:
        return put_float(w, PyFloat_AS_DOUBLE(value))
    if value == Py_None:
        return put_tag(w, T_NONE)
    if kind == &PyBool_Type:
        return put_tag(w, T_TRUE if value == Py_True else T_FALSE)
    if kind == &PyDict_Type:
        return put_dict(w, <object>value, depth)
    if kind == &PyList_Type:
        return put_list(w, <object>value, depth)
    if kind == &PyTuple_Type:
        return put_tuple(w, <object>value, depth, key)
    if kind == &PyBytes_Type:
        return put_content(w, T_BYTES, value, bytes_data(value), bytes_size(value))
    return put_other(w, <object>value, depth, key)


cdef inline unsigned char *room(Writer *w, size_t n) except NULL:
    """Where the next `n` bytes go. The caller adds to `used` what it really wrote."""
    if n > w.size - w.used:
        grow(w, n)
    return w.base + w.used


cdef int grow(Writer *w, size_t n) except -1:
    cdef size_t most = w.limit - min(w.outside, w.limit) + SLACK
    cdef size_t size = w.used + n
    if size > most:
        raise TooLarge(size - SLACK + w.outside, w.limit)
    size = max(size, min(2 * w.size, most))
    if w.heap == NULL:
        w.heap = new_bytes(NULL, size)
        memcpy(bytes_data(w.heap), w.base, w.used)
    else:
        _PyBytes_Resize(&w.heap, size)
    w.base = <unsigned char *>bytes_data(w.heap)
    w.size = size
    return 0


cdef inline int put_tag(Writer *w, int tag) except -1:
    room(w, 1)[0] = tag
    w.used += 1
    return 0


cdef inline int put_size(Writer *w, int tag, size_t n) except -1:
    """Write a tag and a size."""
    cdef unsigned char *to = room(w, 10)
    to[0] = tag
    w.used += 1 + size_at(to + 1, n)
    return 0


cdef inline int put_bare_size(Writer *w, size_t n) except -1:
    w.used += size_at(room(w, 9), n)
    return 0


cdef inline int size_at(unsigned char *to, size_t n) noexcept:
    """Write a size and return how many bytes it took, nine at most."""
    cdef uint16_t two
    cdef uint32_t four
    if n < 253:
        to[0] = <unsigned char>n
        return 1
    if n < 0x10000:
        to[0] = 253
        two = <uint16_t>n
        memcpy(to + 1, &two, 2)
        return 3
    if n <= <size_t>0xFFFFFFFF:
        to[0] = 254
        four = <uint32_t>n
        memcpy(to + 1, &four, 4)
        return 5
    to[0] = 255
    memcpy(to + 1, &n, 8)
    return 9


cdef int put_raw(Writer *w, int tag, const void *data, size_t n) except -1:
    """Write a tag, a size and that many bytes."""
    put_size(w, tag, n)
    memcpy(room(w, n), data, n)
    w.used += n
    return 0


cdef int put_str(Writer *w, PyObject *text, int tag) except -1:
    cdef bytes encoded
    if PyUnicode_IS_ASCII(text):
        return put_raw(w, tag, PyUnicode_DATA(text), PyUnicode_GET_LENGTH(text))
    # Not PyUnicode_AsUTF8: that would leave the encoded form attached to the caller's string.
    encoded = PyUnicode_AsEncodedString(text, "utf-8", "surrogatepass")
    return put_raw(w, tag, PyBytes_AS_STRING(encoded), len(encoded))


cdef int put_name(Writer *w, PyObject *text) except -1:
    """Write a string that may come again: its number if it has one, else itself, numbering it."""
    cdef size_t at
    if w.slots == NULL:
        memset(w.first_slots, 0, SLOTS * sizeof(Slot))
        w.slots = w.first_slots
        w.mask = SLOTS - 1
    at = slot_of(text, w.mask)
    while w.slots[at].string != NULL:
        if w.slots[at].string == text:
            return put_size(w, T_REF, w.slots[at].number)
        at = (at + 1) & w.mask
    if w.names == NAMES:
        return put_str(w, text, T_STR)
    put_str(w, text, T_NAME)
    Py_INCREF(<object>text)
    w.slots[at].string = text
    w.slots[at].number = w.names
    w.names += 1
    if 2 * w.names > w.mask:
        widen_names(w)
    return 0


cdef inline size_t slot_of(PyObject *text, size_t mask) noexcept:
    return ((<uint64_t><uintptr_t>text >> 4) * <uint64_t>0x9E3779B97F4A7C15 >> 32) & mask


cdef int widen_names(Writer *w) except -1:
    cdef size_t mask = 4 * (w.mask + 1) - 1
    cdef size_t i, at
    cdef Slot *slots = <Slot *>calloc(mask + 1, sizeof(Slot))
    if slots == NULL:
        raise MemoryError
    for i in range(w.mask + 1):
        if w.slots[i].string != NULL:
            at = slot_of(w.slots[i].string, mask)
            while slots[at].string != NULL:
                at = (at + 1) & mask
            slots[at] = w.slots[i]
    if w.slots != w.first_slots:
        free(w.slots)
    w.slots = slots
    w.mask = mask
    return 0


cdef int forget_names(Writer *w) except -1:
    cdef size_t i
    if w.slots == NULL:
        return 0
    for i in range(w.mask + 1):
        Py_XDECREF(w.slots[i].string)
    if w.slots != w.first_slots:
        free(w.slots)
    return 0


cdef int put_int(Writer *w, PyObject *number) except -1:
    cdef int overflow = 0
    cdef int64_t value = PyLong_AsLongLongAndOverflow(number, &overflow)
    cdef unsigned char *to
    cdef int16_t two
    cdef int32_t four
    cdef bytes data
    if overflow:
        data = (<object>number).to_bytes((<object>number).bit_length() // 8 + 1, _sys.byteorder, signed=True)
        return put_raw(w, T_INT, PyBytes_AS_STRING(data), len(data))
    to = room(w, 9)
    if 0 <= value < 256:
        to[0] = T_UINT8
        to[1] = <unsigned char>value
        w.used += 2
    elif -0x8000 <= value < 0x8000:
        to[0] = T_INT16
        two = <int16_t>value
        memcpy(to + 1, &two, 2)
        w.used += 3
    elif -<int64_t>0x80000000 <= value < <int64_t>0x80000000:
        to[0] = T_INT32
        four = <int32_t>value
        memcpy(to + 1, &four, 4)
        w.used += 5
    else:
        to[0] = T_INT64
        memcpy(to + 1, &value, 8)
        w.used += 9
    return 0


cdef inline int put_float(Writer *w, double value) except -1:
    cdef unsigned char *to = room(w, 9)
    to[0] = T_FLOAT
    memcpy(to + 1, &value, 8)
    w.used += 9
    return 0


cdef int put_content(Writer *w, int tag, PyObject *owner, const char *data, size_t n) except -1:
    """Write bytes or a bytearray, in the body or beside it (the tag after its own)."""
    if w.buffers == NULL or n < w.inline_below:
        return put_raw(w, tag, data, n)
    put_size(w, tag + 1, n)
    # Held through a Buffer, a bytearray cannot be resized before it has been sent.
    return put_outside(w, <object>owner if type_of(owner) == &PyBytes_Type else Buffer(<object>owner), n)


cdef int put_outside(Writer *w, object buffer, size_t n) except -1:
    w.outside += n
    if w.used + w.outside > w.limit:
        raise TooLarge(w.used + w.outside, w.limit)
    (<list>w.buffers).append(buffer)
    return 0


cdef inline int deeper(int depth) except -1:
    if depth >= DEPTH:
        raise Unencodable(f"nested deeper than {DEPTH} levels")
    return 0


cdef int put_list(Writer *w, object value, int depth) except -1:
    cdef PyObject *items = <PyObject *>value
    cdef Py_ssize_t n = list_size(items)
    cdef Py_ssize_t i
    deeper(depth)
    put_size(w, T_LIST, n)
    for i in range(n):
        # `describe`, or another thread while it runs, may change the list under us.
        if list_size(items) != n:
            raise Unencodable("it changed while it was encoded")
        put(w, list_item(items, i), depth + 1, NO_KEY)
    return 0


cdef int put_tuple(Writer *w, object value, int depth, int key) except -1:
    cdef PyObject *items = <PyObject *>value
    cdef Py_ssize_t i
    deeper(depth)
    put_size(w, T_TUPLE, tuple_size(items))
    for i in range(tuple_size(items)):
        put(w, tuple_item(items, i), depth + 1, key)
    return 0


cdef int put_dict(Writer *w, object value, int depth) except -1:
    cdef PyObject *items = <PyObject *>value
    cdef PyObject *name
    cdef PyObject *item
    cdef object held
    cdef Py_ssize_t at = 0
    cdef Py_ssize_t n = dict_size(items)
    cdef Py_ssize_t written = 0
    deeper(depth)
    put_size(w, T_DICT, n)
    while dict_next(items, &at, &name, &item):
        if type_of(name) == &PyUnicode_Type:
            put_name(w, name)
            put(w, item, depth + 1, NO_KEY)
        else:
            # Writing the key may run code that drops the entry.
            held = <object>item
            put(w, name, depth + 1, KEY)
            put(w, <PyObject *>held, depth + 1, NO_KEY)
        written += 1
        if dict_size(items) != n or written > n:
            raise Unencodable("it changed while it was encoded")
    if written != n:
        raise Unencodable("it changed while it was encoded")
    return 0


cdef int put_set(Writer *w, int tag, object value, int depth, int key) except -1:
    cdef list members = list(value)  # it may change while a member is written
    deeper(depth)
    if key > SET_LEVELS:
        raise Unencodable(f"more than {SET_LEVELS} frozensets in each other, within a key or a member of a set")
    put_size(w, tag, len(members))
    for member in members:
        put(w, <PyObject *>member, depth + 1, key + 1)
    return 0


cdef int put_other(Writer *w, object value, int depth, int key) except -1:
    """Write what is rare enough to be looked for one by one."""
    cdef PyObject *plain = <PyObject *>value
    cdef PyTypeObject *kind = type_of(plain)
    cdef double parts[2]
    cdef _Entry entry
    if kind == &PyByteArray_Type:
        return put_content(w, T_BYTEARRAY, plain, bytearray_data(plain), bytearray_size(plain))
    if kind == &PySet_Type:
        return put_set(w, T_SET, value, depth, key)
    if kind == &PyFrozenSet_Type:
        return put_set(w, T_FROZENSET, value, depth, key)
    if kind == &PyComplex_Type:
        parts[0] = PyComplex_RealAsDouble(value)
        parts[1] = PyComplex_ImagAsDouble(value)
        put_tag(w, T_COMPLEX)
        return put_fixed(w, parts, 16)
    if times.PyDateTime_CheckExact(value):
        return put_datetime(w, value, depth)
    if times.PyDate_CheckExact(value):
        put_tag(w, T_DATE)
        return put_date(w, value)
    if times.PyTime_CheckExact(value):
        return put_time(w, value, depth)
    if times.PyDelta_CheckExact(value):
        put_tag(w, T_TIMEDELTA)
        return put_delta(w, value)
    if type(value) is _timezone:
        return put_timezone(w, value)
    if type(value) is _Decimal:
        return put_decimal(w, value)
    if type(value) is _UUID:
        put_tag(w, T_UUID)
        put_fixed(w, PyBytes_AS_STRING(value.bytes), 16)
        return put_tag(w, _SAFE.index(value.is_safe))
    entry = (<Registry>w.registry).by_type.get(type(value))
    if entry is not None:
        return put_registered(w, entry, value, depth, key)
    if type(value).__module__ == "zoneinfo" and type(value) is getattr(_sys.modules.get("zoneinfo"), "ZoneInfo", None):
        return put_zone(w, value)
    if PyObject_CheckBuffer(value) and not isinstance(value, (bytes, bytearray)) and _why_not_numpy(value) is None:
        if key:
            raise Unencodable("a buffer cannot be a dictionary key or a member of a set here")
        return put_buffer(w, value)
    if w.describe != NULL and not key and put_capability(w, value, depth):
        return 0
    raise Unencodable(_why_not(value))


cdef int put_fixed(Writer *w, const void *data, size_t n) except -1:
    memcpy(room(w, n), data, n)
    w.used += n
    return 0


cdef int put_date(Writer *w, object value) except -1:
    cdef uint16_t year = times.date_year(value)
    cdef unsigned char *to = room(w, 4)
    memcpy(to, &year, 2)
    to[2] = times.date_month(value)
    to[3] = times.date_day(value)
    w.used += 4
    return 0


cdef int put_clock(Writer *w, int hour, int minute, int second, int fold, uint32_t microsecond) except -1:
    cdef unsigned char *to = room(w, 8)
    to[0] = hour
    to[1] = minute
    to[2] = second
    to[3] = fold
    memcpy(to + 4, &microsecond, 4)
    w.used += 8
    return 0


cdef int put_datetime(Writer *w, object value, int depth) except -1:
    put_tag(w, T_DATETIME)
    put_date(w, value)
    put_clock(
        w,
        times.datetime_hour(value),
        times.datetime_minute(value),
        times.datetime_second(value),
        times.datetime_fold(value),
        times.datetime_microsecond(value),
    )
    return put_tzinfo(w, times.datetime_tzinfo(value), depth)


cdef int put_time(Writer *w, object value, int depth) except -1:
    put_tag(w, T_TIME)
    put_clock(
        w,
        times.time_hour(value),
        times.time_minute(value),
        times.time_second(value),
        times.time_fold(value),
        times.time_microsecond(value),
    )
    return put_tzinfo(w, times.time_tzinfo(value), depth)


cdef int put_tzinfo(Writer *w, object zone, int depth) except -1:
    cdef size_t at = w.used
    put(w, <PyObject *>zone, depth, KEY)
    if w.base[at] != T_NONE and w.base[at] != T_TIMEZONE and w.base[at] != T_ZONE:
        raise Unencodable(f"its time zone is a {_name(type(zone))}")
    return 0


cdef int put_delta(Writer *w, object value) except -1:
    cdef int32_t parts[3]
    parts[0] = times.timedelta_days(value)
    parts[1] = times.timedelta_seconds(value)
    parts[2] = times.timedelta_microseconds(value)
    return put_fixed(w, parts, 12)


cdef int put_timezone(Writer *w, object value) except -1:
    cdef tuple parts = value.__getinitargs__()  # (offset,) or (offset, name)
    put_tag(w, T_TIMEZONE)
    put_delta(w, parts[0])
    if len(parts) == 1:
        return put_tag(w, T_NONE)
    return put_str(w, <PyObject *>parts[1], T_STR)


cdef int put_zone(Writer *w, object value) except -1:
    cdef object key = value.key
    if type(key) is not str or len(key) > 64 or _ZONE.fullmatch(key) is None:
        raise Unencodable(f"a ZoneInfo of key {key!r} cannot be found again by name")
    return put_str(w, <PyObject *>key, T_ZONE)


cdef int put_decimal(Writer *w, object value) except -1:
    cdef str text = str(value).replace("e", "E")  # the context decides which one str writes
    if len(text) > DIGITS:
        raise Unencodable(f"a Decimal of more than {DIGITS} characters")
    return put_str(w, <PyObject *>text, T_DECIMAL)


cdef int put_registered(Writer *w, _Entry entry, object value, int depth, int key) except -1:
    if key and not entry.key:
        raise Unencodable(f"{_name(entry.cls)} hashes with code of its own: no dictionary key or set member here")
    put_size(w, entry.tag, entry.index)
    if entry.tag == T_ENUM:
        name = value._name_
        if type(name) is not str or entry.members.get(name) is not value:
            if entry.flags and type(value._value_) is int:
                combined = value._value_
                return put_int(w, <PyObject *>combined)
            raise Unencodable(f"{value!r} is not a named member of {_name(entry.cls)}")
        return put_name(w, <PyObject *>name)
    if entry.tag == T_NAMEDTUPLE:
        value = tuple(tuple.__iter__(value))
    else:
        try:
            value = tuple([getattr(value, name) for name in entry.fields])
        except AttributeError as missing:
            raise Unencodable(f"a field of {_name(entry.cls)} is not set: {missing}") from None
    if len(value) != len(entry.fields):
        raise Unencodable(f"{_name(entry.cls)} with {len(value)} fields")
    return put_tuple(w, value, depth, key)


cdef int put_buffer(Writer *w, object value) except -1:
    cdef Py_buffer view
    cdef object content
    cdef int i
    cdef bint out
    try:
        PyObject_GetBuffer(value, &view, PyBUF_FULL_RO)
    except Exception as refused:
        raise Unencodable(f"{_name(type(value))} does not export its memory: {refused}") from None
    try:
        format: bytes = b"B" if view.format == NULL else <bytes>view.format
        known = _FORMATS.get(format.decode("latin-1"))
        if known is None or known[1] != view.itemsize or view.ndim > MAX_NDIM:
            raise Unencodable(f"{_name(type(value))} of format {format.decode('latin-1')!r} is not plain numbers")
        out = w.buffers != NULL and <size_t>view.len >= w.inline_below
        put_tag(w, T_BUFFER)
        put_tag(w, (OUT_OF_BAND if out else 0) | (FROM_NUMPY if type(value).__module__ == "numpy" else 0))
        put_tag(w, view.ndim)
        put_bare_size(w, len(format))
        put_fixed(w, PyBytes_AS_STRING(format), len(format))
        for i in range(view.ndim):
            put_bare_size(w, view.shape[i])
        put_bare_size(w, view.len)
        if not PyBuffer_IsContiguous(&view, b"C"):
            content = PyBytes_FromStringAndSize(NULL, view.len)
            PyBuffer_ToContiguous(PyBytes_AS_STRING(content), &view, view.len, b"C")
            if out:
                return put_outside(w, content, view.len)
            return put_fixed(w, PyBytes_AS_STRING(content), view.len)
        if out:
            return put_outside(w, Buffer(value), view.len)
        return put_fixed(w, view.buf, view.len)
    finally:
        PyBuffer_Release(&view)


cdef bint put_capability(Writer *w, object value, int depth) except -1:
    cdef PyObject *describe = w.describe
    described = (<object>describe)(value)
    if described is None:
        return False
    kind, meta = described
    if type(kind) is not str or not 0 < len(kind) <= 64:
        raise TypeError("describe must return (kind, meta) with a short kind")
    deeper(depth)
    put_str(w, <PyObject *>kind, T_CAPABILITY)
    w.describe = NULL  # the meta is a plain value
    try:
        put(w, <PyObject *>meta, depth + 1, NO_KEY)
    finally:
        w.describe = describe
    return True


cdef str _why_not_numpy(object value):
    """Why something of numpy is not sent as a Buffer; None if it is, or is not numpy's."""
    for base in type(value).__mro__:
        if base.__module__ == "numpy" and base.__name__ == "generic":
            return f"a numpy scalar ({type(value).__name__}); use .item()"
        if base.__module__ == "numpy" and base.__name__ == "ndarray" and type(value).__module__ != "numpy":
            return f"{_name(type(value))} is more than its array; use numpy.asarray()"
    return None


cdef str _why_not(object value):
    cdef str numpy = _why_not_numpy(value)
    if numpy is not None:
        return numpy
    for base in _PLAIN:
        if isinstance(value, base):
            return f"{_name(type(value))} is not {base.__name__} itself, and the function's annotation does not name it"
    if isinstance(value, _enum.Enum) or hasattr(type(value), "__dataclass_fields__"):
        return f"a {_name(type(value))} can be sent only if the function's annotation names it"
    return f"a value of type {_name(type(value))} cannot be sent"


_PLAIN = (int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset)


# ---------------------------------------------------------------------------------------------- decode

cdef struct Reader:
    const unsigned char *at
    const unsigned char *end
    size_t memory  # what the objects may take together
    size_t left  # of it
    int depth
    PyObject *registry  # borrowed from the caller, as are the next two
    PyObject *attach
    PyObject *buffers
    Py_ssize_t next_buffer
    PyObject **names  # owned, each
    size_t numbered
    size_t names_room


def decode(
    body,
    Registry registry not None,
    *,
    Py_ssize_t memory,
    buffers=(),
    attach=None,
    int depth=DEPTH,
):
    """Return the value in `body`, which a stranger wrote; anything that is not exactly a value is Malformed.

    `memory` bounds the bytes that the objects take. `buffers` are the out-of-band contents: those of bytes and
    bytearrays are copied, those of Buffers referred to. `attach(kind, meta)` builds capabilities; without it they
    are refused. Raises Malformed for whatever goes wrong, MemoryError when the machine has no more.
    """
    cdef Reader r
    cdef size_t i
    cdef bytes held = body if type(body) is bytes else bytes(memoryview(body))  # nobody else can write to it
    cdef tuple outside = tuple(buffers)
    r.at = <const unsigned char *>PyBytes_AS_STRING(held)
    r.end = r.at + len(held)
    r.memory = max(memory, 0)
    r.left = r.memory
    r.depth = min(depth, DEPTH)
    r.registry = <PyObject *>registry
    r.attach = NULL if attach is None else <PyObject *>attach
    r.buffers = <PyObject *>outside
    r.next_buffer = 0
    r.names = NULL
    r.numbered = 0
    r.names_room = 0
    try:
        value = owned(take(&r, 0, NO_KEY))
        if r.at != r.end:
            raise Malformed(f"{r.end - r.at} bytes after the value")
        if r.next_buffer != len(outside):
            raise Malformed(f"{len(outside) - r.next_buffer} buffers that the value does not use")
        return value
    except (Malformed, MemoryError):
        raise
    except Exception as error:
        raise Malformed(f"not a value: {error}") from error
    finally:
        for i in range(r.numbered):
            Py_DECREF(<object>r.names[i])
        PyMem_Free(r.names)


cdef inline object owned(PyObject *reference):
    """Hand a new reference over to Cython's counting."""
    value = <object>reference
    Py_DECREF(value)
    return value


cdef inline PyObject *given(object value) noexcept:
    """The other way: a reference that the caller owns."""
    Py_INCREF(value)
    return <PyObject *>value


cdef inline const unsigned char *advance(Reader *r, size_t n) except NULL:
    # The only place that compares a length with what is left.
    cdef const unsigned char *start = r.at
    if n > <size_t>(r.end - r.at):
        raise Malformed("the message ends early")
    r.at += n
    return start


cdef inline int charge(Reader *r, size_t n) except -1:
    # The only place that compares memory with what is left of it.
    if n > r.left:
        raise Malformed(f"the value takes more than {r.memory} bytes of memory")
    r.left -= n
    return 0


cdef inline Py_ssize_t take_size(Reader *r) except -1:
    cdef unsigned char first = advance(r, 1)[0]
    cdef uint16_t two
    cdef uint32_t four
    cdef uint64_t eight
    if first < 253:
        return first
    if first == 253:
        memcpy(&two, advance(r, 2), 2)
        eight = two
    elif first == 254:
        memcpy(&four, advance(r, 4), 4)
        eight = four
    else:
        memcpy(&eight, advance(r, 8), 8)
    if eight < 253 or (first == 254 and eight < 0x10000) or (first == 255 and eight <= 0xFFFFFFFF) or eight >> 62:
        raise Malformed("a size in the wrong form")
    return eight


cdef inline Py_ssize_t take_count(Reader *r, size_t least) except -1:
    """Read how many items follow, each of at least `least` bytes: no more than there are bytes for."""
    cdef const unsigned char *here
    cdef Py_ssize_t n = take_size(r)
    here = r.at
    advance(r, n * least)
    r.at = here
    return n


cdef inline int into(Reader *r, int depth) except -1:
    if depth >= r.depth:
        raise Malformed(f"nested deeper than {r.depth} levels")
    return 0


cdef PyObject *take(Reader *r, int depth, int key) except NULL:
    """Read one value; the caller owns it. As a `key` it must be hashable by code of builtin types alone."""
    cdef unsigned char tag = advance(r, 1)[0]
    cdef int16_t two
    cdef int32_t four
    cdef int64_t eight
    cdef double real
    # One form for each int: the shortest.
    if tag == T_STR:
        return take_str(r)
    elif tag == T_REF:
        return take_ref(r)
    elif tag == T_NAME:
        return take_name(r)
    elif tag == T_UINT8:
        return PyLong_FromLongLong(advance(r, 1)[0])
    elif tag == T_INT16:
        memcpy(&two, advance(r, 2), 2)
        charge(r, 32)
        if 0 <= two < 256:
            raise Malformed("an int in the wrong form")
        return PyLong_FromLongLong(two)
    elif tag == T_INT32:
        memcpy(&four, advance(r, 4), 4)
        charge(r, 32)
        if four == <int16_t>four:
            raise Malformed("an int in the wrong form")
        return PyLong_FromLongLong(four)
    elif tag == T_INT64:
        memcpy(&eight, advance(r, 8), 8)
        charge(r, 48)
        if eight == <int32_t>eight:
            raise Malformed("an int in the wrong form")
        return PyLong_FromLongLong(eight)
    elif tag == T_FLOAT:
        memcpy(&real, advance(r, 8), 8)
        charge(r, 32)
        return PyFloat_FromDouble(real)
    elif tag == T_NONE:
        return given(None)
    elif tag == T_TRUE:
        return given(True)
    elif tag == T_FALSE:
        return given(False)
    elif tag == T_TUPLE:
        return take_tuple(r, depth, key)
    elif tag == T_LIST and not key:
        return take_list(r, depth)
    elif tag == T_DICT and not key:
        return take_dict(r, depth)
    return given(take_other(r, tag, depth, key))


cdef PyObject *take_str(Reader *r) except NULL:
    cdef Py_ssize_t n = take_size(r)
    cdef const unsigned char *data = advance(r, n)
    cdef PyObject *text
    charge(r, 64 + n)
    text = PyUnicode_DecodeUTF8(<const char *>data, n, "surrogatepass")
    if not PyUnicode_IS_ASCII(text):
        # One character outside Latin-1 makes all of them two or four bytes wide.
        try:
            charge(r, PyUnicode_GET_LENGTH(text) * PyUnicode_KIND(text))
        except:
            Py_DECREF(<object>text)
            raise
    return text


cdef PyObject *take_name(Reader *r) except NULL:
    cdef PyObject *text
    if r.numbered == r.names_room:
        more_names(r)
    text = take_str(r)
    Py_INCREF(<object>text)
    r.names[r.numbered] = text
    r.numbered += 1
    return text


cdef int more_names(Reader *r) except -1:
    cdef size_t wanted = 4 * r.names_room if r.names_room else 64
    cdef PyObject **names
    if wanted > NAMES:
        raise Malformed(f"more than {NAMES} numbered strings")
    names = <PyObject **>PyMem_Realloc(r.names, wanted * sizeof(PyObject *))
    if names == NULL:
        raise MemoryError
    r.names = names
    r.names_room = wanted
    return 0


cdef PyObject *take_ref(Reader *r) except NULL:
    cdef size_t number = take_size(r)
    if number >= r.numbered:
        raise Malformed("a reference to no string")
    Py_INCREF(<object>r.names[number])
    return r.names[number]


cdef PyObject *take_list(Reader *r, int depth) except NULL:
    cdef Py_ssize_t n = take_count(r, 1)
    cdef Py_ssize_t i
    cdef list items
    into(r, depth)
    charge(r, 72 + 8 * n)
    items = PyList_New(n)
    for i in range(n):
        PyList_SET_ITEM(<PyObject *>items, i, take(r, depth + 1, NO_KEY))
    return given(items)


cdef PyObject *take_tuple(Reader *r, int depth, int key) except NULL:
    cdef Py_ssize_t n = take_count(r, 1)
    cdef Py_ssize_t i
    cdef tuple items
    into(r, depth)
    charge(r, 56 + 8 * n)
    items = PyTuple_New(n)
    for i in range(n):
        PyTuple_SET_ITEM(<PyObject *>items, i, take(r, depth + 1, key))
    return given(items)


cdef PyObject *take_dict(Reader *r, int depth) except NULL:
    cdef Py_ssize_t n = take_count(r, 2)
    cdef Py_ssize_t i
    cdef dict items = {}
    into(r, depth)
    charge(r, table_memory(n, 24))
    if n > CALM:
        return given(take_large_dict(r, n, depth))
    for i in range(n):
        name = owned(take(r, depth + 1, KEY))
        PyDict_SetItem(items, name, owned(take(r, depth + 1, NO_KEY)))
    if dict_size(<PyObject *>items) != n:
        raise Malformed("a dictionary key comes twice")
    return given(items)


cdef dict take_large_dict(Reader *r, Py_ssize_t n, int depth):
    cdef dict items = {}
    cdef Py_ssize_t i
    cdef list pairs
    charge(r, 16 * n)
    pairs = PyList_New(2 * n)
    for i in range(n):
        PyList_SET_ITEM(<PyObject *>pairs, 2 * i, take(r, depth + 1, KEY))
        PyList_SET_ITEM(<PyObject *>pairs, 2 * i + 1, take(r, depth + 1, NO_KEY))
    refuse_flood(r, pairs, 2, False, SAME)
    for i in range(n):
        PyDict_SetItem(
            items, <object>list_item(<PyObject *>pairs, 2 * i), <object>list_item(<PyObject *>pairs, 2 * i + 1)
        )
    if dict_size(<PyObject *>items) != n:
        raise Malformed("a dictionary key comes twice")
    r.left += 16 * n
    return items


cdef object take_set(Reader *r, int depth, int key, bint frozen):
    cdef Py_ssize_t n = take_count(r, 1)
    cdef Py_ssize_t i
    cdef list members
    into(r, depth)
    if key > SET_LEVELS:
        raise Malformed(f"more than {SET_LEVELS} frozensets in each other as a key")
    charge(r, 8 * n + set_memory(n))
    members = PyList_New(n)
    for i in range(n):
        PyList_SET_ITEM(<PyObject *>members, i, take(r, depth + 1, key + 1))
    if n <= (SAME_NESTED if key else CALM):
        items = frozenset(members) if frozen else set(members)
    else:
        refuse_flood(r, members, 1, False, SAME)
        refuse_flood(r, members, 1, True, SAME_NESTED if key else SAME)
        # A set made from a dict gets its final table at once: the one whose probes were counted.
        unique = dict.fromkeys(members)
        items = frozenset(unique) if frozen else set(unique)
    if set_size(<PyObject *>items) != n:
        raise Malformed("a member of a set comes twice")
    r.left += 8 * n
    return items


cdef size_t table_memory(size_t n, size_t entry) noexcept:
    """What a dict of `n` entries takes when it grew to hold them, headers included."""
    cdef size_t slots = 8
    if n == 0:
        return 80
    while slots * 2 / 3 < n:
        slots *= 2
    return 112 + slots * 2 / 3 * entry + slots * (1 if slots <= 128 else 2 if slots <= 0x8000 else 4)


cdef size_t set_memory(size_t n) noexcept:
    cdef size_t slots = 32 if n < 19 else 128
    while slots <= 2 * n:
        slots *= 2
    return 216 + (16 * slots if n > 4 else 0)


cdef int refuse_flood(Reader *r, list items, Py_ssize_t step, bint is_set, int same) except -1:
    """Refuse keys (every `step`th of `items`) that were chosen to collide, or more than `same` of one hash.

    A compartment forked from the host knows the secret behind the hashes of strings, and those of numbers are public.
    Equal hashes are not the only way: the probes of different ones can be steered onto a common path. So the probes
    that CPython will make (Objects/dictobject.c, Objects/setobject.c) are made here first, on bare hashes, for every
    size that the table will pass through, and keys that take too many are refused.

    Equal hashes cost comparisons. Those of tuples and strings take as long as these are, so a few are harmless. Those
    of frozensets multiply with every level of nesting: there fewer are taken, and few levels.
    """
    cdef size_t n = len(items) / step
    cdef size_t slots = 128
    cdef size_t largest = 128
    cdef size_t i
    cdef bint mixed = False
    cdef bint flooded = False
    cdef Py_hash_t *hashes
    cdef uint32_t *table
    if is_set:
        while largest <= 2 * n:
            largest *= 2
        slots = largest
    else:
        while largest * 2 / 3 < n:
            largest *= 2
        for i in range(n):
            mixed = mixed or type_of(list_item(<PyObject *>items, i * step)) != &PyUnicode_Type
        if mixed and type_of(list_item(<PyObject *>items, 0)) == &PyUnicode_Type:
            largest *= 2  # the first key that is no string makes the dict grow once more
    charge(r, 8 * n + 4 * largest)
    hashes = <Py_hash_t *>PyMem_Malloc(8 * n)
    table = <uint32_t *>PyMem_Malloc(4 * largest)
    try:
        if hashes == NULL or table == NULL:
            raise MemoryError
        for i in range(n):
            hashes[i] = PyObject_Hash(list_item(<PyObject *>items, i * step))
        while slots <= largest and not flooded:
            memset(table, 0, 4 * slots)
            flooded = floods(hashes, n if is_set else min(n, slots * 2 / 3), table, slots - 1, 9 if is_set else 0, same)
            slots *= 2
    finally:
        PyMem_Free(hashes)
        PyMem_Free(table)
    if flooded:
        raise Malformed("dictionary keys or set members that were chosen to collide")
    r.left += 8 * n + 4 * largest
    return 0


cdef bint floods(const Py_hash_t *hashes, size_t n, uint32_t *table, size_t mask, size_t linear, int same) noexcept:
    """Insert `n` hashes as CPython would; whether that takes over PROBES each, or one comes more than `same` times.

    Honest keys stay far below: multiples of a large power of two, the worst of them, take some 100 in a set.
    """
    cdef size_t budget = PROBES * n
    cdef size_t i, start, at, stop, perturb
    cdef uint32_t mark
    cdef int found
    for i in range(n):
        perturb = <size_t>hashes[i]
        start = perturb & mask
        mark = <uint32_t>(perturb * <size_t>0x9E3779B97F4A7C15 >> 32) | 1  # of the hash; zero is an empty slot
        found = 0
        while True:
            at = start
            stop = at + linear if at + linear <= mask else at
            while at <= stop and table[at] != 0:
                found += table[at] == mark
                if budget == 0 or found == same:
                    return True
                budget -= 1
                at += 1
            if at <= stop:
                table[at] = mark
                break
            perturb >>= 5
            start = (start * 5 + perturb + 1) & mask
    return False


cdef object take_other(Reader *r, int tag, int depth, int key):
    cdef Py_ssize_t n
    cdef const unsigned char *data
    cdef double parts[2]
    if tag == T_BYTES:
        n = take_size(r)
        data = advance(r, n)
        charge(r, 48 + n)
        return PyBytes_FromStringAndSize(<const char *>data, n)
    elif tag == T_INT:
        return take_int(r)
    elif tag == T_COMPLEX:
        memcpy(parts, advance(r, 16), 16)
        charge(r, 32)
        return owned(PyComplex_FromDoubles(parts[0], parts[1]))
    elif tag == T_FROZENSET:
        return take_set(r, depth, key, True)
    elif tag == T_DATE:
        return take_date(r)
    elif tag == T_TIME:
        return take_time(r)
    elif tag == T_DATETIME:
        return take_datetime(r)
    elif tag == T_TIMEDELTA:
        return take_delta(r)
    elif tag == T_TIMEZONE:
        return take_timezone(r)
    elif tag == T_ZONE:
        return take_zone(r)
    elif tag == T_DECIMAL:
        return take_decimal(r)
    elif tag == T_UUID:
        return take_uuid(r)
    elif tag == T_BYTES_OUT:
        return take_outside_bytes(r, False)
    elif tag == T_ENUM or tag == T_NAMEDTUPLE or tag == T_DATACLASS:
        return take_registered(r, tag, depth, key)
    elif key:
        raise Malformed(f"a key or set member of tag {tag}, which cannot be hashed")
    elif tag == T_SET:
        return take_set(r, depth, key, False)
    elif tag == T_BYTEARRAY:
        n = take_size(r)
        data = advance(r, n)
        charge(r, 64 + n)
        return PyByteArray_FromStringAndSize(<const char *>data, n)
    elif tag == T_BYTEARRAY_OUT:
        return take_outside_bytes(r, True)
    elif tag == T_BUFFER:
        return take_buffer(r)
    elif tag == T_CAPABILITY:
        return take_capability(r, depth)
    raise Malformed(f"unknown tag {tag}")


cdef object take_int(Reader *r):
    cdef Py_ssize_t n = take_size(r)
    cdef const unsigned char *data = advance(r, n)
    charge(r, 32 + n * 16 / 15)
    value = int.from_bytes(PyBytes_FromStringAndSize(<const char *>data, n), _sys.byteorder, signed=True)
    if n < 9 or value.bit_length() // 8 + 1 != n:
        raise Malformed("an int in the wrong form")
    return value


cdef object take_date(Reader *r):
    cdef const unsigned char *data = advance(r, 4)
    cdef uint16_t year
    memcpy(&year, data, 2)
    charge(r, 32)
    return times.date_new(year, data[2], data[3])


cdef object take_time(Reader *r):
    cdef const unsigned char *data = advance(r, 8)
    cdef uint32_t microsecond
    memcpy(&microsecond, data + 4, 4)
    charge(r, 48)
    return times.time_new(data[0], data[1], data[2], clock(microsecond), take_tzinfo(r), data[3])


cdef object take_datetime(Reader *r):
    cdef const unsigned char *data = advance(r, 12)
    cdef uint16_t year
    cdef uint32_t microsecond
    memcpy(&year, data, 2)
    memcpy(&microsecond, data + 8, 4)
    charge(r, 48)
    return times.datetime_new(
        year, data[2], data[3], data[4], data[5], data[6], clock(microsecond), take_tzinfo(r), data[7]
    )


cdef int clock(uint32_t microsecond) except -1:
    if microsecond >= 1000000:
        raise Malformed("microsecond out of range")
    return <int>microsecond


cdef object take_tzinfo(Reader *r):
    cdef unsigned char tag = advance(r, 1)[0]
    if tag == T_NONE:
        return None
    if tag == T_TIMEZONE:
        return take_timezone(r)
    if tag == T_ZONE:
        return take_zone(r)
    raise Malformed("a time zone that is none")


cdef object take_delta(Reader *r):
    cdef int32_t parts[3]
    memcpy(parts, advance(r, 12), 12)
    charge(r, 48)
    if not (0 <= parts[1] < 86400 and 0 <= parts[2] < 1000000):
        raise Malformed("a timedelta in the wrong form")
    return times.timedelta_new(parts[0], parts[1], parts[2])


cdef object take_timezone(Reader *r):
    offset = take_delta(r)
    cdef unsigned char tag = advance(r, 1)[0]
    charge(r, 48)
    if tag == T_NONE:
        return _timezone(offset)
    if tag != T_STR:
        raise Malformed("the name of a time zone is no string")
    return _timezone(offset, owned(take_str(r)))


cdef object take_zone(Reader *r):
    cdef object key = owned(take_str(r))
    if len(key) > 64 or _ZONE.fullmatch(key) is None:
        raise Malformed("not the key of a time zone")
    import zoneinfo

    return zoneinfo.ZoneInfo(key)  # kept and shared by zoneinfo: charged as its key


cdef object take_decimal(Reader *r):
    cdef str text = owned(take_str(r))
    if len(text) > DIGITS or _DECIMAL.fullmatch(text) is None:
        raise Malformed("not a Decimal")
    charge(r, 104)
    value = _Decimal(text)
    # What does not come back as it was lay outside the exponents that decimal can hold.
    if str(value).replace("e", "E") != text:
        raise Malformed("a Decimal in the wrong form")
    return value


cdef object take_uuid(Reader *r):
    cdef const unsigned char *data = advance(r, 17)
    charge(r, 112)
    if data[16] >= 3:
        raise Malformed("a UUID in the wrong form")
    return _UUID(bytes=PyBytes_FromStringAndSize(<const char *>data, 16), is_safe=_SAFE[data[16]])


cdef object next_outside(Reader *r):
    if r.next_buffer >= tuple_size(r.buffers):
        raise Malformed("more out-of-band contents than buffers")
    r.next_buffer += 1
    return <object>tuple_item(r.buffers, r.next_buffer - 1)


cdef object take_outside_bytes(Reader *r, bint mutable):
    cdef Py_ssize_t n = take_size(r)
    cdef Py_buffer view
    cdef char *to
    source = next_outside(r)
    charge(r, 64 + n)
    PyObject_GetBuffer(source, &view, PyBUF_SIMPLE)
    try:
        if view.len != n:
            raise Malformed(f"an out-of-band buffer of {view.len} bytes instead of {n}")
        if mutable:
            value = PyByteArray_FromStringAndSize(NULL, n)
            to = PyByteArray_AS_STRING(value)
        else:
            value = PyBytes_FromStringAndSize(NULL, n)
            to = PyBytes_AS_STRING(value)
        with nogil:
            memcpy(to, view.buf, n)
        return value
    finally:
        PyBuffer_Release(&view)


cdef object take_registered(Reader *r, int tag, int depth, int key):
    cdef size_t index = take_size(r)
    cdef Registry registry = <Registry>r.registry
    cdef _Entry entry
    cdef tuple values
    cdef Py_ssize_t i
    if index >= <size_t>len(registry.entries):
        raise Malformed("a type that is not registered")
    entry = registry.entries[index]
    if entry.tag != tag:
        raise Malformed(f"{_name(entry.cls)} sent as something else")
    if key and not entry.key:
        raise Malformed(f"a {_name(entry.cls)} as a key or set member")
    if tag == T_ENUM:
        name = owned(take(r, depth, KEY))
        if entry.flags and type(name) is int:
            return _combined(entry.cls, name)
        if type(name) is not str or name not in entry.members:
            raise Malformed(f"no member of {_name(entry.cls)}")
        return entry.members[name]
    if advance(r, 1)[0] != T_TUPLE:
        raise Malformed(f"{_name(entry.cls)} without fields")
    values = owned(take_tuple(r, depth, key))
    if len(values) != len(entry.fields):
        raise Malformed(f"{_name(entry.cls)} with {len(values)} fields")
    r.left += 56 + 8 * len(values)  # of the tuple, which does not stay
    if tag == T_NAMEDTUPLE:
        charge(r, 56 + 8 * len(values))
        return _new_tuple(entry.cls, values)
    # Up to 30 names lie once in the class, only the values in the object (SHARED_KEYS_MAX_SIZE of dictobject.c).
    charge(r, 160 + 16 * len(values) if len(values) <= 30 else 160 + table_memory(len(values), 24))
    # All fields are there before the object is: a message that ends early leaves no half of one.
    value = _new_object(entry.cls)
    for i in range(len(values)):
        PyObject_GenericSetAttr(value, entry.fields[i], values[i])
    return value


cdef object take_buffer(Reader *r):
    cdef unsigned char flags = advance(r, 1)[0]
    cdef unsigned char ndim = advance(r, 1)[0]
    cdef Py_ssize_t n = take_size(r)
    cdef bytes format = (<const char *>advance(r, n))[:n]
    cdef Py_ssize_t i
    cdef list shape = []
    if flags & ~(FROM_NUMPY | OUT_OF_BAND) or ndim > MAX_NDIM:
        raise Malformed("a buffer in the wrong form")
    charge(r, 1024)
    for i in range(ndim):
        shape.append(take_size(r))
    n = take_size(r)
    if flags & OUT_OF_BAND:
        content = next_outside(r)
    else:
        charge(r, n)
        content = PyBytes_FromStringAndSize(<const char *>advance(r, n), n)
    value = Buffer(content, format.decode("ascii"), tuple(shape))
    if value.nbytes != n:
        raise Malformed(f"a buffer of {value.nbytes} bytes instead of {n}")
    if flags & FROM_NUMPY and (<Registry>r.registry).ndarray is not None:
        return (<Registry>r.registry).ndarray(value)
    return value


cdef object take_capability(Reader *r, int depth):
    cdef PyObject *attach = r.attach
    cdef object kind = owned(take_str(r))
    into(r, depth)
    if attach == NULL or not 0 < len(kind) <= 64:
        raise Malformed("a capability where none is expected")
    r.attach = NULL  # none inside the meta; a failure ends the whole decoding
    meta = owned(take(r, depth + 1, NO_KEY))
    r.attach = attach
    return (<object>attach)(kind, meta)


# ---------------------------------------------------------------------------------------------- buffers

# format -> (the same without a prefix that says nothing, bytes of one item). No records, pointers, objects.
_FORMATS = {}
for _code in "?bBchHiIlLqQnNefd":
    _FORMATS[_code] = _FORMATS["@" + _code] = (_code, _struct.calcsize(_code))
for _code in "?bBchHiIlLqQefd":
    for _prefix in "=<>!":
        _size = _struct.calcsize(_prefix + _code)
        _same = _size == _FORMATS[_code][1] and (_prefix in "=<") == (_sys.byteorder == "little" or _prefix == "=")
        _FORMATS[_prefix + _code] = (_code if _same else _prefix + _code, _size)
_FORMATS["g"] = _FORMATS["@g"] = ("g", sizeof(long double))
_FORMATS["Zf"] = _FORMATS["@Zf"] = ("Zf", 8)
_FORMATS["Zd"] = _FORMATS["@Zd"] = ("Zd", 16)

_KINDS = dict.fromkeys("bhilqn", "int") | dict.fromkeys("BHILQN", "uint") | dict.fromkeys("efdg", "float")


@cython.no_gc_clear
cdef class Buffer:
    """Memory of numbers, read-only, as the buffer protocol shows it: `Buffer(data, format="B", shape=None)`.

    `data` is any C-contiguous bytes-like object; it is kept alive and not copied. `format` is one number code of
    `struct` (or g, Zf, Zd), `shape` defaults to one dimension. ValueError if they do not describe the data exactly.
    """

    cdef Py_buffer view
    cdef bint held
    cdef readonly str format
    cdef readonly Py_ssize_t itemsize
    cdef readonly int ndim
    cdef bytes c_format
    cdef Py_ssize_t c_shape[MAX_NDIM]
    cdef Py_ssize_t c_strides[MAX_NDIM]

    __hash__ = None

    def __cinit__(self, data, str format="B", shape=None):
        cdef Py_ssize_t total, i
        PyObject_GetBuffer(data, &self.view, PyBUF_SIMPLE)
        self.held = True
        if format not in _FORMATS:
            raise ValueError(f"{format!r} is not the format of plain numbers")
        self.format, self.itemsize = _FORMATS[format]
        self.c_format = self.format.encode()
        if shape is None:
            shape = (self.view.len // self.itemsize,)
        if len(shape) > MAX_NDIM:
            raise ValueError(f"more than {MAX_NDIM} dimensions")
        self.ndim = len(shape)
        for i in range(self.ndim):
            self.c_shape[i] = shape[i]
            if self.c_shape[i] < 0:
                raise ValueError("a dimension below zero")
        # Strides first: they must not overflow either, whatever a dimension of zero makes of the product.
        total = self.itemsize
        for i in range(self.ndim - 1, -1, -1):
            self.c_strides[i] = total
            if self.c_shape[i] > 1:
                if total > (<Py_ssize_t>1 << 62) // self.c_shape[i]:
                    raise ValueError(f"shape {shape} is too large")
                total *= self.c_shape[i]
        if 0 in shape:
            total = 0
        if total != self.view.len:
            raise ValueError(f"{self.view.len} bytes are not shape {tuple(shape)} of {self.itemsize} bytes each")

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        if flags & PyBUF_WRITABLE:
            raise BufferError("a Buffer is read-only")
        if flags & 0x40 and self.ndim > 1:  # the bit of PyBUF_F_CONTIGUOUS alone
            raise BufferError("a Buffer is C-contiguous")
        buffer.buf = self.view.buf
        buffer.obj = self
        buffer.len = self.view.len
        buffer.readonly = 1
        buffer.itemsize = self.itemsize
        buffer.format = PyBytes_AS_STRING(self.c_format) if flags & PyBUF_FORMAT else NULL
        buffer.ndim = self.ndim
        buffer.shape = self.c_shape if flags & PyBUF_ND else NULL
        buffer.strides = self.c_strides if (flags & PyBUF_STRIDES) == PyBUF_STRIDES else NULL
        buffer.suboffsets = NULL
        buffer.internal = NULL

    @property
    def obj(self):
        """What the memory belongs to."""
        return self.view.obj

    @property
    def nbytes(self):
        """Bytes of the whole."""
        return self.view.len

    @property
    def readonly(self):
        """True, always."""
        return True

    @property
    def shape(self):
        """Items along each dimension."""
        return tuple([self.c_shape[i] for i in range(self.ndim)])

    @property
    def strides(self):
        """Bytes from one item to the next, for each dimension."""
        return tuple([self.c_strides[i] for i in range(self.ndim)])

    def tobytes(self):
        """Return a copy of the memory."""
        return PyBytes_FromStringAndSize(<const char *>self.view.buf, self.view.len)

    def tolist(self):
        """Return the numbers, as lists in lists; NotImplementedError for long doubles (format g)."""
        cdef str code = self.format
        cdef Py_ssize_t count = self.view.len // self.itemsize
        if code == "g":
            raise NotImplementedError("Python has no long double")
        if code[0] == "Z":
            parts = _struct.unpack(f"{2 * count}{code[1]}", self.tobytes())
            flat = [complex(parts[i], parts[i + 1]) for i in range(0, 2 * count, 2)]
        else:
            flat = list(_struct.unpack(f"{code[: len(code) - 1]}{count}{code[len(code) - 1]}", self.tobytes()))
        return _nested(flat, self.shape)

    def __len__(self):
        if self.ndim == 0:
            raise TypeError("a Buffer of no dimensions has no length")
        return self.c_shape[0]

    def __getitem__(self, key):
        return memoryview(self)[key]

    def __eq__(self, other):
        cdef Buffer same
        if not isinstance(other, Buffer):
            try:
                view = memoryview(other)
                same = Buffer(view if view.c_contiguous else view.tobytes(), view.format, view.shape)
            except (TypeError, ValueError, BufferError):
                return NotImplemented
        else:
            same = other
        return self.format == same.format and self.shape == same.shape and self.tobytes() == same.tobytes()

    def __repr__(self):
        cdef str code = self.format[len(self.format) - 1]
        kind = _KINDS.get(code, "")
        if self.format[0] == "Z":
            kind = "complex"
        like = f"{kind}{8 * self.itemsize}" if kind else "bool" if code == "?" else "byte"
        return f"<compart.Buffer {like}-like format={self.format!r} shape={self.shape} {self.view.len} bytes>"

    def __reduce__(self):
        return Buffer, (self.tobytes(), self.format, self.shape)


cdef object _nested(list flat, tuple shape):
    if len(shape) == 0:
        return flat[0]
    if len(shape) == 1:
        return flat
    step = len(flat) // shape[0] if shape[0] else 0
    return [_nested(flat[i * step : (i + 1) * step], shape[1:]) for i in range(shape[0])]


# ---------------------------------------------------------------------------------------------- frames

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    Py_ssize_t writev(int, const iovec *, int)

cdef extern from "<unistd.h>" nogil:
    Py_ssize_t read(int, void *, size_t)
    int close(int)

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *, unsigned long, int)
    short POLLIN
    short POLLOUT

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec

cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    ctypedef void (*handler_t)(int) noexcept
    struct sigaction_t "sigaction":
        handler_t sa_handler
    int sigaction(int, const sigaction_t *, sigaction_t *)
    int sigemptyset(sigset_t *)
    int sigaddset(sigset_t *, int)
    int sigismember(const sigset_t *, int)
    int sigpending(sigset_t *)
    int pthread_sigmask(int, const sigset_t *, sigset_t *)
    int sigtimedwait(const sigset_t *, void *, const timespec *)
    handler_t SIG_DFL
    int SIGPIPE, SIG_BLOCK, SIG_SETMASK

cdef extern from "<sys/socket.h>" nogil:
    struct msghdr:
        void *msg_name
        unsigned int msg_namelen
        iovec *msg_iov
        size_t msg_iovlen
        void *msg_control
        size_t msg_controllen
        int msg_flags
    struct cmsghdr:
        size_t cmsg_len
        int cmsg_level
        int cmsg_type
    Py_ssize_t sendmsg(int, const msghdr *, int)
    Py_ssize_t recvmsg(int, msghdr *, int)
    cmsghdr *CMSG_FIRSTHDR(msghdr *)
    cmsghdr *CMSG_NXTHDR(msghdr *, cmsghdr *)
    unsigned char *CMSG_DATA(cmsghdr *)
    size_t CMSG_LEN(size_t)
    size_t CMSG_SPACE(size_t)
    int SOL_SOCKET, SCM_RIGHTS, MSG_CMSG_CLOEXEC, MSG_CTRUNC, MSG_TRUNC, MSG_DONTWAIT, MSG_NOSIGNAL

cdef struct Header:
    uint32_t magic
    uint32_t kind
    uint64_t length

cdef enum:
    PARTS = 64  # of one frame
    CHUNK = 65536  # asked from a descriptor before it is known how much is to come
    PASS = 4 << 20  # bytes that one `fill` reads at most: a peer that never stops must not keep us
    DRAIN = 1 << 20  # the same for `read_into`
    MAX_FDS = 253  # SCM_MAX_FD of Linux, unix(7)
    MAX_DATA = 4096


def write_frame(int fd, uint32_t kind, *parts):
    """Write a frame of `kind` whose body is `parts` one after the other; blocks until all is written.

    OSError (BrokenPipeError too) leaves an unfinished frame: the channel is of no more use. So does an exception of
    a signal handler.
    """
    cdef Header header
    cdef Py_buffer views[PARTS]
    cdef iovec vectors[PARTS + 1]
    cdef int held = 0
    cdef int i
    if len(parts) > PARTS:
        raise ValueError(f"a frame of more than {PARTS} parts")
    header.magic = MAGIC
    header.kind = kind
    header.length = 0
    vectors[0].iov_base = &header
    vectors[0].iov_len = sizeof(Header)
    try:
        for part in parts:
            PyObject_GetBuffer(part, &views[held], PyBUF_SIMPLE)
            held += 1
            vectors[held].iov_base = views[held - 1].buf
            vectors[held].iov_len = views[held - 1].len
            header.length += views[held - 1].len
        write_all(fd, vectors, held + 1)
    finally:
        for i in range(held):
            PyBuffer_Release(&views[i])


cdef int write_all(int fd, iovec *vectors, int n) except -1:
    """Write what `vectors` point to, using them up."""
    cdef sigset_t mask
    cdef bint quiet = hold_sigpipe(&mask)
    cdef Py_ssize_t wrote
    cdef int error = 0
    try:
        while n:
            with nogil:
                wrote = writev(fd, vectors, n)
                error = errno
            if wrote < 0:
                retry(fd, error, POLLOUT)
                continue
            while n and <size_t>wrote >= vectors[0].iov_len:
                wrote -= vectors[0].iov_len
                vectors += 1
                n -= 1
            if n:
                vectors[0].iov_base = <char *>vectors[0].iov_base + wrote
                vectors[0].iov_len -= wrote
    finally:
        if quiet:
            drop_sigpipe(&mask, error == EPIPE)
    return 0


cdef int retry(int fd, int error, short events) except -1:
    """After a failed call: run signal handlers, or wait until `fd` is ready; OSError if neither is the matter."""
    cdef pollfd wanted
    if error == EINTR:
        PyErr_CheckSignals()
    elif error == EAGAIN:
        wanted.fd = fd
        wanted.events = events
        with nogil:
            error = errno if poll(&wanted, 1, -1) < 0 else 0
        if error:
            retry(fd, error, events)
    else:
        fail(error)
    return 0


cdef int fail(int error) except -1:
    raise OSError(error, _os.strerror(error))


cdef bint hold_sigpipe(sigset_t *mask) noexcept:
    """Block SIGPIPE where it would kill: a compartment that closes its end must not end a host that asks for the
    default. Python itself ignores it, so mostly this is one look."""
    cdef sigaction_t action
    cdef sigset_t pipe, pending
    if sigaction(SIGPIPE, NULL, &action) < 0 or action.sa_handler != SIG_DFL:
        return False
    sigpending(&pending)
    if sigismember(&pending, SIGPIPE):
        return False
    sigemptyset(&pipe)
    sigaddset(&pipe, SIGPIPE)
    return pthread_sigmask(SIG_BLOCK, &pipe, mask) == 0


cdef void drop_sigpipe(sigset_t *mask, bint raised) noexcept:
    """Take the SIGPIPE back that our own write raised, if any, and restore the mask."""
    cdef sigset_t pipe
    cdef timespec now
    if raised:
        sigemptyset(&pipe)
        sigaddset(&pipe, SIGPIPE)
        now.tv_sec = 0
        now.tv_nsec = 0
        sigtimedwait(&pipe, NULL, &now)
    pthread_sigmask(SIG_SETMASK, mask, NULL)


cdef class FrameReader:
    """Collects frames from a descriptor as they arrive: `FrameReader(limit)`, the largest body accepted in bytes."""

    cdef unsigned char *data
    cdef size_t start
    cdef size_t used
    cdef size_t size
    cdef size_t limit
    cdef bint reading  # the GIL is away, or a signal handler runs: hands off

    def __cinit__(self, Py_ssize_t limit):
        if limit < 0 or limit >> 60:
            raise ValueError(f"a frame of {limit} bytes")
        self.limit = limit

    def __dealloc__(self):
        free(self.data)

    @property
    def partial(self):
        """Whether bytes of a frame are there that is not whole yet."""
        return self.used > self.start and not self.whole()

    def fill(self, int fd):
        """Read from `fd` (O_NONBLOCK) what is there, until a whole frame is buffered; whether one is.

        False: wait until `fd` is readable and call again. EOFError at the end of the file, Malformed for what is no
        frame or one of a body over the limit, OSError. One call reads a few MiB at most.
        """
        cdef size_t budget = PASS
        cdef Py_ssize_t got
        while not self.whole():
            if budget == 0:
                return False
            self.widen()
            self.reading = True
            try:
                got = read_some(fd, self.data + self.used, min(self.size - self.used, budget))
            finally:
                self.reading = False
            if got == 0:
                raise EOFError("the peer closed the channel")
            if got < 0:
                return False
            self.used += got
            budget -= got
        return True

    def take(self):
        """Return (kind, body) of the next whole frame, or None; what came after it stays."""
        cdef Header header
        if not self.whole():
            return None
        memcpy(&header, self.data + self.start, sizeof(Header))
        body = PyBytes_FromStringAndSize(<char *>self.data + self.start + sizeof(Header), header.length)
        self.start += sizeof(Header) + header.length
        if self.start == self.used:
            self.start = self.used = 0
            if self.size > PASS:  # do not keep the memory of the largest frame for ever
                free(self.data)
                self.data = NULL
                self.size = 0
        return header.kind, body

    cdef bint whole(self) except -1:
        cdef Header header
        if self.reading:
            raise RuntimeError("the reader is reading already")
        if self.used - self.start < sizeof(Header):
            return False
        memcpy(&header, self.data + self.start, sizeof(Header))
        if header.magic != MAGIC:
            raise Malformed("no frame begins here")
        if header.length > self.limit:
            raise Malformed(f"a frame of {header.length} bytes, and {self.limit} are the limit")
        return self.used - self.start - sizeof(Header) >= header.length

    cdef int widen(self) except -1:
        """Make room for more bytes: by what has arrived, never by what a header promises."""
        cdef unsigned char *data
        if self.start:
            memmove(self.data, self.data + self.start, self.used - self.start)
            self.used -= self.start
            self.start = 0
        if self.used < self.size:
            return 0
        data = <unsigned char *>realloc(self.data, 2 * self.size if self.size else CHUNK)
        if data == NULL:
            raise MemoryError
        self.data = data
        self.size = 2 * self.size if self.size else CHUNK
        return 0


cdef Py_ssize_t read_some(int fd, void *to, size_t n) except -2:
    """read(2) of a descriptor that does not wait: bytes read, 0 at the end, -1 when nothing is there now."""
    cdef Py_ssize_t got
    cdef int error
    while True:
        if n > CHUNK:
            with nogil:
                got = read(fd, to, n)
                error = errno
        else:  # giving the GIL away would take longer than the call
            got = read(fd, to, n)
            error = errno
        if got >= 0:
            return got
        if error == EAGAIN:
            return -1
        if error != EINTR:
            fail(error)
        PyErr_CheckSignals()


def read_into(int fd, into not None, Py_ssize_t cap):
    """Read what is there in `fd` (O_NONBLOCK) and append it to the bytearray `into` up to a length of `cap`.

    What does not fit is read and dropped. Returns the bytes read: 0 when nothing is there now, -1 at the end of the
    file. One call reads 1 MiB at most.
    """
    cdef char chunk[CHUNK]
    cdef Py_ssize_t total = 0
    cdef Py_ssize_t got, fits, size
    if type(into) is not bytearray:
        raise TypeError("into must be a bytearray")
    while total < DRAIN:
        got = read_some(fd, chunk, CHUNK)
        if got <= 0:
            return -1 if got == 0 and total == 0 else total
        total += got
        size = len(<bytearray>into)
        fits = min(got, max(cap - size, 0))
        if fits:
            PyByteArray_Resize(into, size + fits)
            memcpy(PyByteArray_AS_STRING(into) + size, chunk, fits)
    return total


# ---------------------------------------------------------------------------------------------- descriptors

def send_fds(int sock, bytes data not None, fds):
    """Send `data` (1 to 4096 bytes) and with its first byte the descriptors `fds` over a Unix socket. Blocks."""
    cdef int numbers[MAX_FDS]
    cdef size_t control[256]  # aligned for a cmsghdr
    cdef msghdr message
    cdef cmsghdr *rights
    cdef iovec vector
    cdef Py_ssize_t sent
    cdef int error
    cdef int n = 0
    if not 0 < len(data) <= MAX_DATA:
        raise ValueError(f"{len(data)} bytes: not 1 to {MAX_DATA}")
    for fd in fds:
        if n == MAX_FDS:
            raise ValueError(f"more than {MAX_FDS} descriptors")
        numbers[n] = fd
        n += 1
    vector.iov_base = PyBytes_AS_STRING(data)
    vector.iov_len = len(data)
    memset(&message, 0, sizeof(message))
    message.msg_iov = &vector
    message.msg_iovlen = 1
    if n:
        memset(control, 0, sizeof(control))
        message.msg_control = control
        message.msg_controllen = CMSG_SPACE(n * sizeof(int))
        rights = CMSG_FIRSTHDR(&message)
        rights.cmsg_level = SOL_SOCKET
        rights.cmsg_type = SCM_RIGHTS
        rights.cmsg_len = CMSG_LEN(n * sizeof(int))
        memcpy(CMSG_DATA(rights), numbers, n * sizeof(int))
    while vector.iov_len:
        with nogil:
            sent = sendmsg(sock, &message, MSG_NOSIGNAL)
            error = errno
        if sent < 0:
            retry(sock, error, POLLOUT)
            continue
        message.msg_control = NULL  # they went with the first byte
        message.msg_controllen = 0
        vector.iov_base = <char *>vector.iov_base + sent
        vector.iov_len -= sent


def recv_fds(int sock, Py_ssize_t max_data, int max_fds, *, bint wait=True):
    """Receive up to `max_data` bytes and `max_fds` descriptors, close-on-exec; the caller owns them.

    Returns (data, fds); (b"", []) when the peer has closed. A message that is cut off or has more descriptors or other
    ancillary data is Malformed, and everything that came with it is closed. Without `wait`, BlockingIOError when
    nothing is there.
    """
    cdef char content[MAX_DATA]
    cdef int numbers[MAX_FDS + 2]
    cdef size_t control[256]  # aligned for a cmsghdr
    cdef msghdr message
    cdef cmsghdr *part
    cdef iovec vector
    cdef Py_ssize_t got
    cdef int flags = MSG_CMSG_CLOEXEC | (0 if wait else MSG_DONTWAIT)
    cdef int error, i
    cdef int n = 0
    cdef bint strange = False
    if not 0 < max_data <= MAX_DATA or not 0 <= max_fds <= MAX_FDS:
        raise ValueError(f"{max_data} bytes and {max_fds} descriptors: not within {MAX_DATA} and {MAX_FDS}")
    while True:
        vector.iov_base = content
        vector.iov_len = max_data
        memset(&message, 0, sizeof(message))
        message.msg_iov = &vector
        message.msg_iovlen = 1
        message.msg_control = control
        message.msg_controllen = CMSG_SPACE(max_fds * sizeof(int)) if max_fds else 0
        with nogil:
            got = recvmsg(sock, &message, flags)
            error = errno
        if got >= 0:
            break
        if not wait and error == EAGAIN:
            fail(error)
        retry(sock, error, POLLIN)
    part = CMSG_FIRSTHDR(&message)
    while part != NULL:
        if part.cmsg_level == SOL_SOCKET and part.cmsg_type == SCM_RIGHTS:
            for i in range(<int>((part.cmsg_len - CMSG_LEN(0)) / sizeof(int))):
                memcpy(&numbers[n], CMSG_DATA(part) + i * sizeof(int), sizeof(int))
                n += 1
        else:
            strange = True
        part = CMSG_NXTHDR(&message, part)
    try:
        if message.msg_flags & (MSG_CTRUNC | MSG_TRUNC) or n > max_fds or strange:
            raise Malformed(f"a message with more than {max_data} bytes and {max_fds} descriptors")
        return PyBytes_FromStringAndSize(content, got), [numbers[i] for i in range(n)]
    except:
        for i in range(n):
            close(numbers[i])
        raise


# ---------------------------------------------------------------------------------------------- shared memory

def copy_into(dest, Py_ssize_t offset, source):
    """Copy the bytes of `source` into the writable `dest` from `offset` on; ValueError if they do not fit."""
    cdef Py_buffer to, origin
    PyObject_GetBuffer(dest, &to, PyBUF_WRITABLE)
    try:
        PyObject_GetBuffer(source, &origin, PyBUF_SIMPLE)
        try:
            if offset < 0 or offset > to.len or origin.len > to.len - offset:
                raise ValueError(f"{origin.len} bytes at {offset} do not fit {to.len}")
            with nogil:
                memmove(<char *>to.buf + offset, origin.buf, origin.len)
        finally:
            PyBuffer_Release(&origin)
    finally:
        PyBuffer_Release(&to)


def zero(dest, Py_ssize_t length):
    """Set the first `length` bytes of the writable `dest` to zero; ValueError if it has fewer."""
    cdef Py_buffer to
    PyObject_GetBuffer(dest, &to, PyBUF_WRITABLE)
    try:
        if length < 0 or length > to.len:
            raise ValueError(f"{to.len} bytes have no {length} to zero")
        with nogil:
            memset(to.buf, 0, length)
    finally:
        PyBuffer_Release(&to)
