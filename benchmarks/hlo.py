"""What a program that XLA compiled for TPUs moves, read from its text."""

import math
import re
from typing import NamedTuple

SIZES = {"bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "s64": 8, "u64": 8,
         "pred": 1, "u8": 1, "s8": 1, "s16": 2, "u16": 2, "f64": 8, "token": 0}  # fmt: skip
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"

_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+)(?: \(.*\) -> .*)? \{$")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
# What only names buffers, as two custom calls do: new memory, and pieces that lie side by side.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_NEW, _BESIDE = '"AllocateBuffer"', '"ConcatBitcast"'
# What runs other computations once.
_CALLERS = {"fusion", "conditional", "call", "async-start"}


class Line(NamedTuple):
    """One operation: `name = shape kind(operands), rest`; `rest` begins with the operands."""

    shape: str
    kind: str
    operands: list
    rest: str
    is_root: bool


def collectives(text):
    """(how many, bytes that they give) of the collectives in a compiled program."""
    count = moved = 0
    for line in text.splitlines():
        found = _LINE.match(line)
        if found and _is_collective(found[4]):
            count += 1
            for array in _given(found[3], found[4], len(_operands(found[5]))):
                dtype, edges, _ = _parts(array)
                moved += SIZES[dtype] * math.prod(edges)
    return [count, moved]


def _is_collective(kind):
    return re.fullmatch(rf"(?:{COLLECTIVES})(?:-start)?", kind)


def _given(shape, kind, operands):
    """The arrays that a collective gives; two kinds of starts list their operands before them."""
    arrays = _arrays(shape)
    if kind in ("all-gather-start", "collective-permute-start"):
        return arrays[operands : 2 * operands]
    return arrays


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
        elif current is not None and (found := _LINE.match(line)):
            root, name, shape, kind, rest = found.groups()
            current[name] = Line(shape, kind, _operands(rest), rest, bool(root))
    return computations


def _operands(rest):
    """The names within the parentheses that a line's `rest` closes; types may stand before them."""
    depth = 1
    for end, letter in enumerate(rest):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if not depth:
            return re.findall(r"%([\w.\-]+)", rest[:end])
    return []


def _arrays(shape):
    """Each array of a shape, which may be a tuple of tuples."""
    return [found[0] for found in _ARRAY.finditer(shape)]


def _parts(array):
    """f32[8,128]{1,0:T(8,128)} -> ("f32", [8, 128], "1,0:T(8,128)")."""
    dtype, dims, layout = _ARRAY.match(array).groups(default="")
    if dtype not in SIZES:
        raise ValueError(f"type {dtype!r} is unknown: add its bytes to SIZES")
    return dtype, [int(edge) for edge in dims.split(",") if edge], layout


def _whole(shape):
    """Bytes of all arrays of a shape, with the padding of their tiles."""
    total = 0
    for array in _arrays(shape):
        dtype, edges, layout = _parts(array)
        order, tile = re.match(r"[\d,]+", layout), re.search(r"T\(([\d,]+)\)", layout)
        if order and tile and edges:
            minor = [int(axis) for axis in order[0].split(",")]
            tiles = [int(edge) for edge in tile[1].split(",")]
            for axis, edge in zip(minor, reversed(tiles), strict=False):
                edges[axis] = -(-edges[axis] // edge) * edge
        total += SIZES[dtype] * math.prod(edges)
    return total


def _size(shape):
    """The same of those that are in main memory."""
    return sum(_whole(array) for array in _arrays(shape) if "S(" not in _parts(array)[2])


def _bytes_of(computation, computations):
    moved = 0
    for line in computation.values():
        shape, kind, operands, rest, _ = line
        if kind in _FREE or kind.endswith("-done") or _NEW in rest or _BESIDE in rest:
            continue
        missing = [name for name in operands if name not in computation]
        if missing or (not operands and not rest.startswith(")")):
            raise ValueError(f"the operands of {kind} are unknown: {missing or rest[:60]}")
        shapes = [computation[name].shape for name in operands]
        called = [computations[name] for name in _called(rest)] if kind in _CALLERS else []
        if kind == "fusion":
            moved += _fusion(called[0], shapes, shape)
        elif kind in ("slice", "dynamic-slice", "slice-start", "dynamic-slice-start"):
            # A start gives ((operands), result, ...). It reads as much as it gives.
            given = _arrays(shape.rpartition("), ")[2])[0]
            moved += _size(given) + (_whole(given) if _size(shapes[0]) else 0)
        elif kind == "copy-start":
            moved += _size(shape)  # (target, source, ...)
        elif _is_collective(kind):
            moved += sum(map(_size, shapes + _given(shape, kind, len(operands))))
        elif kind == "while":
            body = computations[re.search(r"body=%?([\w.\-]+)", rest)[1]]
            moved += _trips(rest, computations) * _bytes_of(body, computations)
        elif kind == "conditional":
            moved += max((_bytes_of(branch, computations) for branch in called), default=0)
        elif kind in ("call", "async-start"):
            moved += sum(_bytes_of(one, computations) for one in called)
        elif kind == "dynamic-update-slice":
            moved += 2 * _size(shapes[1])
        else:
            moved += _size(shape) + sum(map(_size, shapes))
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


def _fusion(computation, shapes, given):
    """What a fused operation reads of its operands' `shapes` and writes of what it has `given`."""
    moved = 0
    for name, line in computation.items():
        if line.kind == "parameter":
            number = int(line.rest.split(")")[0])
            moved += min(_size(shapes[number]), _read(computation, name))
    (root,) = (name for name, line in computation.items() if line.is_root)
    written = computation[root].operands if computation[root].kind == "tuple" else [root]
    for name, output in zip(written, _arrays(given), strict=True):
        line = computation[_named(computation, name)]
        moved += min(_size(output), _updated(computation, line))
    return moved


def _named(computation, name):
    """What a bitcast, or several, is another name of."""
    while computation[name].kind == "bitcast":
        name = computation[name].operands[0]
    return name


def _updated(computation, line):
    """Bytes that an operation writes, at most: an update in place, or all of its output."""
    if line.kind == "dynamic-update-slice":
        buffer = computation[_named(computation, line.operands[0])]
        if buffer.kind == "parameter" or _NEW in buffer.rest:
            return _whole(computation[line.operands[1]].shape)
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
            moved += _whole(line.shape)
        elif line.kind != "dynamic-update-slice" or line.operands[0] not in names:
            return math.inf
    return moved
