"""What a program that XLA compiled for TPUs moves, read from its text."""

import math
import re

SIZES = {"bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "s64": 8, "u64": 8,
         "pred": 1, "u8": 1, "s8": 1, "s16": 2, "u16": 2, "f64": 8, "token": 0}  # fmt: skip
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"

_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+)(?: \(.*\) -> .*)? \{$")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
# What only names buffers, as two custom calls do: new memory, and pieces that lie side by side.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_NEW, _BESIDE = '"AllocateBuffer"', '"ConcatBitcast"'


_CALLERS = ("fusion", "conditional", "call", "async-start")


def collectives(text):
    """(how many, bytes that they give) of the collectives in a compiled program."""
    count = moved = 0
    for line in text.splitlines():
        found = _LINE.match(line)
        if found and re.fullmatch(rf"(?:{COLLECTIVES})(?:-start)?", found[4]):
            count += 1
            for dtype, dims, _ in _given(found[3], found[4], len(_operands(found[5]))):
                edges = (int(edge) for edge in dims.split(",") if edge)
                moved += _bytes_each(dtype) * math.prod(edges)
    return [count, moved]


def _given(shape, operation, operands):
    """The arrays that a collective gives; two kinds of starts list their operands before them."""
    arrays = _ARRAY.findall(shape)
    if operation in ("all-gather-start", "collective-permute-start"):
        return arrays[operands : 2 * operands]
    return arrays


def _bytes_each(dtype):
    if dtype not in SIZES:
        raise ValueError(f"type {dtype!r} is unknown: add its bytes to SIZES")
    return SIZES[dtype]


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
    """{computation: {name: (shape, operation, operands, the line's rest, is root)}}."""
    computations, current = {}, None
    for line in text.splitlines():
        if not line.startswith(" "):
            head = _HEAD.match(line)
            current = {} if head else None
            if head:
                computations["ENTRY" if head[1] else head[2]] = current
        elif current is not None and (found := _LINE.match(line)):
            root, name, shape, operation, rest = found.groups()
            current[name] = (shape, operation, _operands(rest), rest, bool(root))
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
    """Bytes of each array of a shape, 0 for those that are not in main memory."""
    for dtype, dims, layout in _ARRAY.findall(shape):
        edges = [int(edge) for edge in dims.split(",") if edge]
        order = re.match(r"\{([\d,]+)", layout or "")
        tile = re.search(r"T\(([\d,]+)\)", layout or "")
        if order and tile and edges:
            minor = [int(axis) for axis in order[1].split(",")]
            tiles = [int(edge) for edge in tile[1].split(",")]
            for axis, edge in zip(minor, reversed(tiles), strict=False):
                edges[axis] = -(-edges[axis] // edge) * edge
        yield 0 if "S(" in (layout or "") else _bytes_each(dtype) * math.prod(edges)


def _size(shape):
    return sum(_arrays(shape))


def _whole(shape):
    """As if all of it were in main memory."""
    return _size(re.sub(r"S\(\d+\)", "", shape))


def _bytes_of(computation, computations):
    moved = 0
    for shape, operation, operands, rest, _ in computation.values():
        if operation in _FREE or operation.endswith("-done") or _NEW in rest or _BESIDE in rest:
            continue
        missing = [name for name in operands if name not in computation]
        if missing or (not operands and not rest.startswith(")")):
            raise ValueError(f"the operands of {operation} are unknown: {missing or rest[:60]}")
        shapes = [computation[name][0] for name in operands]
        called = [computations[name] for name in _called(rest)] if operation in _CALLERS else []
        if operation == "fusion":
            moved += _fusion(called[0], shapes, shape)
        elif operation in ("slice-start", "dynamic-slice-start"):
            # ((operands), what it gives, ...): it reads as much as it gives.
            given = _ARRAY.findall(shape.partition("), ")[2])[0]
            given = f"{given[0]}[{given[1]}]{given[2]}"
            moved += _size(given) + (_whole(given) if _size(shapes[0]) else 0)
        elif operation == "copy-start":
            moved += sum(list(_arrays(shape))[:2])  # (target, source, ...)
        elif re.fullmatch(rf"(?:{COLLECTIVES})-start", operation):
            given = _given(shape, operation, len(operands))
            moved += sum(map(_size, shapes)) + sum(_size(f"{a}[{b}]{c}") for a, b, c in given)
        elif operation == "while":
            body = computations[re.search(r"body=%?([\w.\-]+)", rest)[1]]
            moved += _trips(rest, computations) * _bytes_of(body, computations)
        elif operation == "conditional":
            moved += max((_bytes_of(branch, computations) for branch in called), default=0)
        elif operation in ("call", "async-start"):
            moved += sum(_bytes_of(one, computations) for one in called)
        elif operation == "dynamic-update-slice":
            moved += 2 * _size(shapes[1])
        elif operation in ("slice", "dynamic-slice"):
            moved += _size(shape) + (_whole(shape) if _size(shapes[0]) else 0)
        else:
            moved += _size(shape) + sum(map(_size, shapes))
    return moved


def _trips(rest, computations):
    """How often a loop runs: as the compiler says, or from 0 by 1 up to what it compares with."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
    if known:
        return int(known[1])
    condition = computations[re.search(r"condition=%?([\w.\-]+)", rest)[1]]
    limits = [line[3] for line in condition.values() if line[1] == "constant"]
    compared = any("direction=LT" in line[3] for line in condition.values())
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
    for name, (_, operation, _, rest, _) in computation.items():
        if operation == "parameter":
            number = int(rest.split(")")[0])
            moved += min(_size(shapes[number]), _read(computation, name))
    root = next(line for line in computation.values() if line[4])
    written = root[2] if root[1] == "tuple" else [None]
    outputs = [f"{a}[{b}]{c}" for a, b, c in _ARRAY.findall(given)]
    for name, output in zip(written, outputs, strict=True):
        line = root if name is None else computation[name]
        while line[1] == "bitcast":
            line = computation[line[2][0]]
        in_place = line[1] == "dynamic-update-slice" and _base(computation, line[2][0])
        update = _whole(computation[line[2][1]][0]) if in_place else math.inf
        moved += min(_size(output), update)
    return moved


def _base(computation, name):
    """Whether it is a parameter or new memory, by whatever name."""
    while computation[name][1] == "bitcast":
        name = computation[name][2][0]
    return computation[name][1] == "parameter" or _NEW in computation[name][3]


def _read(computation, name):
    """Bytes that a fused computation reads of a parameter, at most: slices, or all of it."""
    moved, names = 0, {name}
    for user, (shape, operation, operands, _, _) in computation.items():
        if not names & set(operands):
            continue
        if operation == "bitcast":
            names.add(user)
        elif operation in ("slice", "dynamic-slice") and operands[0] in names:
            moved += _whole(shape)
        elif operation != "dynamic-update-slice" or operands[0] not in names:
            return math.inf
    return moved
