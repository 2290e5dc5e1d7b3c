"""What a program that XLA compiled for TPUs moves, read from its text."""

import math
import re
from typing import NamedTuple

SIZES = {
    "bf16": 2,
    "f16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "s64": 8,
    "u64": 8,
    "pred": 1,
    "u8": 1,
    "s8": 1,
    "s16": 2,
    "u16": 2,
    "f64": 8,
    "token": 0,
}
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+)(?: \(.*\) -> .*)? \{$")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
# What only names buffers, as two custom calls do: new memory, and pieces that lie side by side.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_NEW, _BESIDE = '"AllocateBuffer"', '"ConcatBitcast"'
# What runs other computations once.
_CALLERS = {"fusion", "conditional", "call", "async-start"}


class Array(NamedTuple):
    """An array of a shape: f32[8,128]{1,0:T(8,128)S(1)} in the text."""

    edges: list
    itemsize: int
    layout: str

    @property
    def in_hbm(self):
        """Whether it is in main memory."""
        return "S(" not in self.layout

    @property
    def padded_bytes(self):
        """Its size with the padding of its tiles."""
        edges = list(self.edges)
        order, tile = re.match(r"[\d,]+", self.layout), re.search(r"T\(([\d,]+)\)", self.layout)
        if order and tile and edges:
            minor = [int(axis) for axis in order[0].split(",")]
            tiles = [int(edge) for edge in tile[1].split(",")]
            for axis, edge in zip(minor, reversed(tiles), strict=False):
                edges[axis] = -(-edges[axis] // edge) * edge
        return self.itemsize * math.prod(edges)


class Line(NamedTuple):
    """One operation: `name = arrays kind(operands), rest`; `rest` begins with the operands."""

    arrays: list
    kind: str
    operands: list
    rest: str
    is_root: bool

    @property
    def hbm_bytes(self):
        """Of what it gives, the part in main memory."""
        return _in_hbm(self.arrays)


def collectives(text):
    """(how many, bytes that they give) of the collectives in a compiled program."""
    count = moved = 0
    for _, line in filter(None, map(_line, text.splitlines())):
        if _is_collective(line.kind):
            count += 1
            moved += sum(array.itemsize * math.prod(array.edges) for array in _given(line))
    return [count, moved]


def _is_collective(kind):
    return re.fullmatch(rf"(?:{COLLECTIVES})(?:-start)?", kind)


def _given(line):
    """The arrays that a collective gives; two kinds of starts list their operands before them."""
    if line.kind in ("all-gather-start", "collective-permute-start"):
        return line.arrays[len(line.operands) : 2 * len(line.operands)]
    return line.arrays


def hbm_bytes(text):
    """Bytes that one run reads from and writes to a chip's main memory (HBM).

    XLA's own "bytes accessed" counts the chip's fast memory (VMEM, whose arrays the text marks with
    S(1)) as it does main memory, and an array anew for each use within one fused operation. Here
    every operation reads each of its operands in main memory once, and writes its outputs once:
    of an operand that it only slices the slices, of a buffer that it updates in place the update.
    Arrays count with the padding of their tiles. What an operation reads again by itself, as the
    edges of a convolution's windows, is not in the text and not counted; nor is that a gather reads
    its operand in pieces, which takes far longer than reading it once.

    Args:
      text: of an optimized and scheduled module, `compiled.as_text()`.

    Raises:
      ValueError: it has no entry computation, a loop whose trips it does not say, or operands or
        types that are unknown here.
    """
    computations = _parse(text)
    if "ENTRY" not in computations:
        raise ValueError("the text has no ENTRY computation: give a compiled module's as_text()")
    return _bytes_of(computations["ENTRY"], computations)


def _parse(text):
    """{computation: {name: its line}}."""
    computations, current = {}, None
    for line in text.splitlines():
        if not line.startswith(" "):
            head = _HEAD.match(line)
            current = {} if head else None
            if head:
                computations["ENTRY" if head[1] else head[2]] = current
        elif current is not None and (found := _line(line)):
            current[found[0]] = found[1]
    return computations


def _line(text):
    """(its name, the `Line`) of one line, or None where it is none."""
    found = _LINE.match(text)
    if not found:
        return None
    root, name, shape, kind, rest = found.groups()
    return name, Line(_arrays(shape), kind, _operands(rest), rest, bool(root))


def _operands(rest):
    """The names within the parentheses that a line's `rest` closes; types may stand before them."""
    depth = 1
    for end, letter in enumerate(rest):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if not depth:
            return re.findall(r"%([\w.\-]+)", rest[:end])
    return []


def _arrays(shape):
    """Each `Array` of a shape, which may be a tuple of tuples."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        if dtype not in SIZES:
            raise ValueError(f"type {dtype!r} is unknown: add its bytes to SIZES")
        found.append(Array([int(edge) for edge in dims.split(",") if edge], SIZES[dtype], layout))
    return found


def _in_hbm(arrays):
    return sum(array.padded_bytes for array in arrays if array.in_hbm)


def _bytes_of(computation, computations):
    moved = 0
    for line in computation.values():
        kind, rest = line.kind, line.rest
        if kind in _FREE or kind.endswith("-done") or _NEW in rest or _BESIDE in rest:
            continue
        missing = [name for name in line.operands if name not in computation]
        if missing or (not line.operands and not rest.startswith(")")):
            raise ValueError(f"the operands of {kind} are unknown: {missing or rest[:60]}")
        read = [computation[name].hbm_bytes for name in line.operands]
        called = [computations[name] for name in _called(rest)] if kind in _CALLERS else []
        if kind == "fusion":
            moved += _fusion(called[0], read, line.arrays)
        elif kind in ("slice", "dynamic-slice", "slice-start", "dynamic-slice-start"):
            # A start gives ((operands), result, ...). It reads as much as it gives.
            given = line.arrays[len(read) if kind.endswith("-start") else 0]
            moved += _in_hbm([given]) + (given.padded_bytes if read[0] else 0)
        elif kind == "copy-start":
            moved += line.hbm_bytes  # (target, source, ...)
        elif _is_collective(kind):
            moved += _in_hbm(_given(line)) + sum(read)
        elif kind == "while":
            body = computations[re.search(r"body=%?([\w.\-]+)", rest)[1]]
            moved += _trips(rest, computations) * _bytes_of(body, computations)
        elif kind == "conditional":
            moved += max((_bytes_of(branch, computations) for branch in called), default=0)
        elif kind in ("call", "async-start"):
            moved += sum(_bytes_of(one, computations) for one in called)
        elif kind == "dynamic-update-slice":
            update = computation[line.operands[1]].arrays[0]
            moved += read[1] + (update.padded_bytes if line.hbm_bytes else 0)
        else:
            moved += line.hbm_bytes + sum(read)
    return moved


def _trips(rest, computations):
    """How often a loop runs: as the compiler says, or from 0 by 1 up to what it compares with."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
    if known:
        return int(known[1])
    condition = computations[re.search(r"condition=%?([\w.\-]+)", rest)[1]]
    limits = [line.rest for line in condition.values() if line.kind == "constant"]
    compared = any("direction=LT" in line.rest for line in condition.values())
    if len(limits) != 1 or not compared:
        raise ValueError(f"a loop's trips are not in the text: ...{rest[:100]}")
    return int(limits[0].split(")")[0])


def _called(rest):
    one = re.findall(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", rest)
    many = re.search(r"branch_computations=\{([^}]*)\}", rest)
    return one + (re.findall(r"[\w.\-]+", many[1]) if many else [])


def _fusion(computation, operands, outputs):
    """What a fused operation reads of its `operands` (bytes of each) and writes of its outputs."""
    moved = 0
    for name, line in computation.items():
        if line.kind == "parameter":
            number = int(line.rest.split(")")[0])
            moved += min(operands[number], _read(computation, name))
    (root,) = (name for name, line in computation.items() if line.is_root)
    written = computation[root].operands if computation[root].kind == "tuple" else [root]
    for name, output in zip(written, outputs, strict=True):
        moved += min(_in_hbm([output]), _updated(computation, name))
    return moved


def _named(computation, name):
    """What a bitcast, or several, is another name of."""
    while computation[name].kind == "bitcast":
        name = computation[name].operands[0]
    return computation[name]


def _updated(computation, name):
    """Bytes that an operation writes, at most: an update in place, or all of its output."""
    line = _named(computation, name)
    if line.kind == "dynamic-update-slice":
        buffer = _named(computation, line.operands[0])
        if buffer.kind == "parameter" or _NEW in buffer.rest:
            return computation[line.operands[1]].arrays[0].padded_bytes
    return math.inf


def _read(computation, name):
    """Bytes that a fused computation reads of a parameter, at most: slices, or all of it."""
    moved, names = 0, {name}
    for user, line in computation.items():
        if not names & set(line.operands):
            continue
        if line.kind == "bitcast":
            names.add(user)
        elif line.kind in ("slice", "dynamic-slice") and line.operands[0] in names:
            moved += line.arrays[0].padded_bytes
        elif line.kind != "dynamic-update-slice" or line.operands[0] not in names:
            return math.inf
    return moved
