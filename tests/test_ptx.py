"""The interpreter of PTX itself: what instructions compute, what is refused, and faults planted in nvcc's PTX."""

import math
import re
import struct

import numpy as np
import ptx
import pytest
import torch
from ptx import build

HEADER = ".version 9.0\n.target sm_90\n.address_size 64\n"
REGISTERS = """
.reg .pred %p<20>; .reg .b16 %h<20>; .reg .b32 %r<20>; .reg .f32 %f<20>; .reg .b64 %d<20>; .reg .f64 %g<20>;
mov.u32 %r0, %tid.x;
mov.u32 %r1, %ctaid.x;
"""


def run(
    body, *tensors, blocks=1, threads=32, dynamic_shared=0, variables="", order=0, pointer=".u64"
):
    """Executes PTX statements; %d0, %d1, ... hold the addresses of the tensors, %r0 is the thread, %r1 the block."""
    parameters = ", ".join(f".param {pointer} p{i}" for i in range(len(tensors)))
    loads = "".join(f"ld.param.u64 %d{i}, [p{i}];\n" for i in range(len(tensors)))
    text = f"{HEADER}{variables}\n.visible .entry kernel({parameters})\n{{{REGISTERS}{loads}{body}\nret;\n}}\n"
    library = ptx.library()
    library.focalops_emulation_set_order(order, 1)  # forgets what earlier calls could access
    for tensor in tensors:
        library.focalops_ptx_allow_access(tensor.data_ptr(), tensor.nbytes)
    values = struct.pack(f"{len(tensors)}Q", *(tensor.data_ptr() for tensor in tensors))
    said = library.focalops_ptx_run(
        text.encode(), b"kernel", blocks, threads, dynamic_shared, values, len(values)
    )
    if said:
        raise RuntimeError(said.decode())


# What loads and stores an element of a register's type.
REGISTER_OF = {"f32": "f", "f64": "g", "b16": "h", "u16": "h", "s16": "h"}
BYTES = {"f32": 4, "f64": 8, "b16": 2, "u16": 2, "s16": 2, "u64": 8, "s64": 8, "b64": 8}
DTYPES = {
    "f32": np.float32, "f64": np.float64, "u32": np.uint32, "s32": np.int32, "b32": np.uint32,
    "u64": np.uint64, "s64": np.int64, "b64": np.uint64,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16,
}  # fmt: skip


def register(kind, i):
    return f"%{REGISTER_OF.get(kind, 'd' if BYTES.get(kind) == 8 else 'r')}{i}"


def compute(instruction, result, *operands):
    """The result of `name.modifiers` of each row of operands, which are pairs of a type and values."""
    count = len(operands[0][1])
    arrays = [np.array(values, dtype=DTYPES[kind]) for kind, values in operands]
    out = np.zeros(count, dtype=DTYPES[result])
    kinds = [result, *(kind for kind, _ in operands)]
    body = ""
    for i, kind in enumerate(kinds):
        body += f"mad.wide.u32 %d{10 + i}, %r0, {BYTES.get(kind, 4)}, %d{i};\n"
        if i > 0:
            body += f"ld.global.{kind} {register(kind, 10 + i)}, [%d{10 + i}];\n"
    names = ", ".join(register(kind, 10 + i) for i, kind in enumerate(kinds) if i > 0)
    target = register(result, 5)
    body += f"{instruction} {target}, {names};\nst.global.{result} [%d10], {target};"
    run(body, *map(torch.from_numpy, [out, *arrays]), threads=count)
    return out


EXACT = [
    ("add.s32", "s32", [("s32", [2**31 - 1, -5]), ("s32", [1, 3])], [-(2**31), -2]),
    ("mul.wide.s32", "s64", [("s32", [-(2**31), 7]), ("s32", [2**31 - 1, -3])], [-(2**31) * (2**31 - 1), -21]),
    ("mul.hi.u64", "u64", [("u64", [2**64 - 1]), ("u64", [2**64 - 1])], [2**64 - 2]),
    ("mul.hi.s32", "s32", [("s32", [-(2**31), 5]), ("s32", [2, -1])], [-1, -1]),
    ("mad.lo.s32", "s32", [("s32", [-3]), ("s32", [5]), ("s32", [-2])], [-17]),
    ("div.s32", "s32", [("s32", [-7, -(2**31)]), ("s32", [2, -1])], [-3, -(2**31)]),
    ("rem.s32", "s32", [("s32", [-7, 7]), ("s32", [2, -2])], [-1, 1]),
    ("shl.b32", "b32", [("b32", [1, 1]), ("u32", [31, 32])], [2**31, 0]),
    ("shr.s32", "s32", [("s32", [-8, -8]), ("u32", [1, 40])], [-4, -1]),
    ("shr.u32", "u32", [("u32", [2**31, 8]), ("u32", [31, 40])], [1, 0]),
    ("shf.l.wrap.b32", "b32", [("b32", [0x80000001] * 2), ("b32", [0x2] * 2), ("u32", [1, 32])], [5, 2]),
    ("shf.r.wrap.b32", "b32", [("b32", [0x80000001] * 2), ("b32", [0x3] * 2), ("u32", [1, 32])], [0xC0000000, 0x80000001]),
    ("shf.r.clamp.b32", "b32", [("b32", [7]), ("b32", [9]), ("u32", [32])], [9]),
    ("bfi.b32", "b32", [("b32", [0xF, 0xF]), ("b32", [0, 0]), ("u32", [4, 30]), ("u32", [4, 8])], [0xF0, 0xC0000000]),
    ("bfe.s32", "s32", [("s32", [0xF0, 0x70]), ("u32", [4, 4]), ("u32", [4, 4])], [-1, 7]),
    ("bfe.u32", "u32", [("u32", [0xF0]), ("u32", [4]), ("u32", [4])], [15]),
    ("bfind.u32", "u32", [("u32", [0, 1, 2**31])], [2**32 - 1, 0, 31]),
    ("bfind.shiftamt.u32", "u32", [("u32", [0, 1, 2**31])], [2**32 - 1, 31, 0]),
    ("bfind.s32", "u32", [("s32", [-1, -2, 4])], [2**32 - 1, 0, 2]),
    ("brev.b32", "b32", [("b32", [1, 0x80000000, 6])], [0x80000000, 1, 0x60000000]),
    ("popc.b64", "u32", [("b64", [2**64 - 1, 5])], [64, 2]),
    ("clz.b32", "u32", [("b32", [0, 1])], [32, 31]),
    ("prmt.b32", "b32", [("b32", [0x03020180]), ("b32", [0x07060504]), ("u32", [0x8765])], [0xFF070605]),
    ("lop3.b32", "b32", [("b32", [0b1100]), ("b32", [0b1010]), ("b32", [0b1111]), ("u32", [0x96])], [0b1001]),
    ("min.f32", "f32", [("f32", [math.nan, 0.0, -1]), ("f32", [2, -0.0, 3])], [2, -0.0, -1]),
    ("max.f32", "f32", [("f32", [math.nan, -0.0, -1]), ("f32", [2, 0.0, 3])], [2, 0.0, 3]),
    ("copysign.f32", "f32", [("f32", [-1, 1]), ("f32", [2, -3])], [-2, 3]),
    ("add.rz.f32", "f32", [("f32", [1, -1]), ("f32", [2**-30, -(2**-30)])], [1, -1]),
    ("add.rp.f32", "f32", [("f32", [1]), ("f32", [2**-30])], [1 + 2**-23]),
    ("add.f32", "f32", [("f32", [1, 1 + 2**-23]), ("f32", [2**-24, 2**-24])], [1, 1 + 2**-22]),
    ("fma.rn.f32", "f32", [("f32", [1 + 2**-12]), ("f32", [1 + 2**-12]), ("f32", [-(1 + 2**-11)])], [2**-24]),
    ("fma.rm.f32", "f32", [("f32", [2**-20]), ("f32", [2**-20]), ("f32", [-1])], [-1]),
    ("fma.rn.f64", "f64", [("f64", [1 + 2**-30]), ("f64", [1 + 2**-30]), ("f64", [-(1 + 2**-29)])], [2**-60]),
    ("add.ftz.f32", "f32", [("f32", [2**-127, 1]), ("f32", [2**-127, 1])], [0, 2]),
    ("add.f32", "f32", [("f32", [2**-127]), ("f32", [2**-127])], [2**-126]),
    ("mul.rn.ftz.f32", "f32", [("f32", [-(2**-100)]), ("f32", [2**-40])], [-0.0]),
    ("cvt.rni.s32.f32", "s32", [("f32", [0.5, 1.5, -2.5, 3e9, -3e9, math.nan])], [0, 2, -2, 2**31 - 1, -(2**31), 0]),
    ("cvt.rzi.s64.f64", "s64", [("f64", [-1.9, 1e30, math.nan])], [-1, 2**63 - 1, -(2**63)]),
    ("cvt.rzi.u32.f32", "u32", [("f32", [-5.0, 2.9, 1e20])], [0, 2, 2**32 - 1]),
    ("cvt.rmi.f32.f32", "f32", [("f32", [-1.5, 1.5])], [-2, 1]),
    ("cvt.s32.s8", "s32", [("s32", [0xFF, 0x7F])], [-1, 127]),
    ("cvt.u64.u32", "u64", [("u32", [2**32 - 1])], [2**32 - 1]),
    ("cvt.s64.s32", "s64", [("s32", [-1])], [-1]),
    ("cvt.rn.f32.s64", "f32", [("s64", [2**24 + 1, 2**24 + 3])], [2**24, 2**24 + 4]),
    ("cvt.sat.f32.f32", "f32", [("f32", [-1, 0.5, 2, math.nan])], [0, 0.5, 1, 0]),
    ("cvt.rn.bf16.f32", "b16", [("f32", [1 + 2**-8, 1 + 3 * 2**-8, math.nan, 3.4e38])], [0x3F80, 0x3F82, 0x7FFF, 0x7F80]),
    ("cvt.rn.f16.f32", "b16", [("f32", [1 + 2**-11, 70000, 2**-25, math.nan])], [0x3C00, 0x7C00, 0, 0x7FFF]),
    ("cvt.f32.bf16", "f32", [("b16", [0x3F80, 0xC000])], [1, -2]),
    ("cvt.f32.f16", "f32", [("b16", [0x3C00, 1])], [1, 2**-24]),
]  # fmt: skip


@pytest.mark.parametrize(("instruction", "result", "operands", "expected"), EXACT)
def test_an_instruction_computes_what_the_manual_says(instruction, result, operands, expected):
    out = compute(instruction, result, *operands)
    wanted = np.array(expected, dtype=DTYPES[result])
    assert out.tobytes() == wanted.tobytes(), (out, wanted)


@pytest.mark.parametrize(
    ("name", "with_numbers", "with_nan"),
    [
        *[
            ("eq", "010", 0),
            ("ne", "101", 0),
            ("lt", "100", 0),
            ("leu", "110", 1),
            ("gtu", "001", 1),
        ],
        *[("equ", "010", 1), ("neu", "101", 1), ("num", "111", 0), ("nan", "000", 1)],
    ],
)
def test_comparisons_of_a_number_with_nan(name, with_numbers, with_nan):
    a = torch.tensor([1.0, 2.0, 3.0, math.nan])
    out = torch.zeros(4, dtype=torch.int32)
    run(
        f"""mad.wide.u32 %d2, %r0, 4, %d0; ld.global.f32 %f0, [%d2];
        setp.{name}.f32 %p0, %f0, 0f40000000;
        selp.u32 %r2, 1, 0, %p0;
        mad.wide.u32 %d3, %r0, 4, %d1; st.global.u32 [%d3], %r2;""",
        *(a, out),
        threads=4,
    )
    assert out.tolist() == [*map(int, with_numbers), with_nan]


def exact_of(instruction, *operands):
    x, *rest = (np.asarray(values, dtype=np.float64) for _, values in operands)
    return {
        "ex2": lambda: np.exp2(x),
        "lg2": lambda: np.log2(x),
        "rcp": lambda: 1 / x,
        "div": lambda: x / rest[0],
        "sqrt": lambda: np.sqrt(x),
        "rsqrt": lambda: 1 / np.sqrt(x),
    }[instruction.split(".")[0]]()


def ulp(exact):
    return np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)


POSITIVE = np.random.default_rng(0).uniform(0.01, 30, 100).astype(np.float32)
# The largest error that the manual allows, and the least that "at its edge" means: an ulp less.
BOUNDS = {
    "ex2.approx.f32": lambda exact: 2.5 * ulp(exact),
    "lg2.approx.f32": lambda exact: 2.0**-22 * np.maximum(np.abs(exact), np.abs(exact) < 1),
    "rcp.approx.f32": ulp,
    "div.approx.f32": lambda exact: 2 * ulp(exact),
    "div.full.f32": lambda exact: 2 * ulp(exact),
    "sqrt.approx.f32": lambda exact: 2.0**-23 * exact,
    "rsqrt.approx.f32": lambda exact: 2.0**-22.9 * exact,
}


@pytest.mark.parametrize("seed", [ptx.NEAREST, ptx.LOWEST, ptx.HIGHEST, ptx.MIXED, 4])
@pytest.mark.parametrize("instruction", BOUNDS)
def test_approximations_are_at_the_edge_of_their_error(instruction, seed):
    x = ("f32", POSITIVE - (15 if "ex2" in instruction else 0))
    operands = [x, ("f32", POSITIVE[::-1])] if "div" in instruction else [x]
    with ptx.approximation(seed):
        out = compute(instruction, "f32", *operands)
        again = compute(instruction, "f32", *operands)
    assert out.tobytes() == again.tobytes()  # a machine has one result for one operand
    exact = exact_of(instruction, *operands)
    error, bound = out - exact, BOUNDS[instruction](exact)
    assert (np.abs(error) <= bound).all()
    if seed == ptx.NEAREST:
        assert (out == exact.astype(np.float32)).all()
    else:
        assert (np.abs(error) > bound - ulp(exact)).all()
        signs = set(np.sign(error))
        assert signs == {ptx.LOWEST: {-1.0}, ptx.HIGHEST: {1.0}}.get(seed, {-1.0, 1.0})


def test_special_values_of_approximations():
    with ptx.approximation(ptx.HIGHEST):
        exponents = [0, -0.0, -math.inf, math.inf, -149, -160]
        special = compute("ex2.approx.f32", "f32", ("f32", exponents))
        assert special.tolist() == [1, 1, 0, math.inf, 3 * 2.0**-149, 0]
        flushed = compute("ex2.approx.ftz.f32", "f32", ("f32", [2**-140, -127]))
        assert flushed.tolist() == [1, 0]
        far = compute(
            "div.approx.f32", "f32", ("f32", [1, math.inf]), ("f32", [2.0**127, 2.0**127])
        )
        assert far[0] == 0
        assert np.isnan(far[1])
        half = compute("rcp.approx.ftz.f64", "f64", ("f64", [3.0]))
        assert abs(half[0] * 3 - 1) < 2**-18
        assert half.view(np.uint64)[0] & 0xFFFFFFFF == 0


# ---- lanes that go different ways ---------------------------------------------------------------


in_every_order = pytest.mark.parametrize("order", range(3))


def test_pointers_say_how_what_they_lead_to_is_aligned():
    """As nvcc has them for compute capability 10.0 and later."""
    flag, out = torch.ones(1, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32)
    body = "ld.global.u8 %r3, [%d0]; st.global.u32 [%d1], %r3;"
    run(body, flag, out, threads=1, pointer=".u64 .ptr .align 1")
    assert out.item() == 1


LANE = "and.b32 %r2, %r0, 31; mad.wide.u32 %d9, %r0, 4, %d0;"


@in_every_order
def test_lanes_that_part_vote_among_themselves_and_meet_again(order):
    out = torch.zeros(32, dtype=torch.int32)
    run(
        LANE
        + """setp.lt.u32 %p0, %r2, 16;
        @%p0 bra LOW;
        setp.ge.u32 %p1, %r2, 20;
        vote.sync.ballot.b32 %r3, %p1, 0xffff0000;
        bra.uni BOTH;
        LOW:
        setp.ge.u32 %p1, %r2, 8;
        vote.sync.ballot.b32 %r3, %p1, 0x0000ffff;
        BOTH:
        shfl.sync.bfly.b32 %r4|%p2, %r3, 16, 31, -1;
        or.b32 %r3, %r3, %r4;
        st.global.u32 [%d9], %r3;""",
        out,
        order=order,
    )
    assert {value & 0xFFFFFFFF for value in out.tolist()} == {0xFFF0FF00}


@in_every_order
def test_a_lane_may_wait_for_another_of_its_warp(order):
    """As since Volta: lanes that parted all make progress."""
    flag, out = torch.zeros(1, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    run(
        """setp.ne.u32 %p0, %r0, 0;
        @%p0 bra OTHERS;
        WAIT: ld.volatile.global.u32 %r3, [%d0];
        setp.eq.u32 %p1, %r3, 0;
        @%p1 bra WAIT;
        bra.uni DONE;
        OTHERS: setp.ne.u32 %p1, %r0, 5;
        @%p1 bra DONE;
        atom.global.exch.b32 %r4, [%d0], 1;
        DONE: mad.wide.u32 %d9, %r0, 4, %d1;
        st.global.u32 [%d9], 1;""",
        *(flag, out),
        order=order,
    )
    assert out.sum() == 32


@in_every_order
def test_threads_that_have_exited_are_not_waited_for(order):
    out = torch.zeros(96, dtype=torch.int32)
    run(
        """setp.ge.u32 %p0, %r0, 40;
        @%p0 ret;
        bar.sync 0;
        setp.lt.u32 %p1, %r0, 7;
        bar.red.popc.u32 %r3, 0, %p1;
        mad.wide.u32 %d9, %r0, 4, %d0;
        st.global.u32 [%d9], %r3;""",
        *(out,),
        threads=96,
        order=order,
    )
    assert out.tolist() == [7] * 40 + [0] * 56


@in_every_order
def test_shuffles_matches_and_reductions(order):
    out = torch.zeros(4, 32, dtype=torch.int32)
    run(
        LANE
        + """shfl.sync.up.b32 %r3|%p0, %r2, 1, 0x1800, -1;
        shfl.sync.idx.b32 %r4|%p0, %r2, 9, 31, -1;
        and.b32 %r5, %r2, 3;
        match.any.sync.b32 %r6, %r5, -1;
        redux.sync.max.s32 %r7, %r2, -1;
        st.global.u32 [%d9], %r3; st.global.u32 [%d9+128], %r4;
        st.global.u32 [%d9+256], %r6; st.global.u32 [%d9+384], %r7;""",
        out,
        order=order,
    )
    up, index, alike, most = out
    assert up.tolist() == [lane - 1 if lane % 8 else lane for lane in range(32)]
    assert set(index.tolist()) == {9}
    assert [a & 0xFFFFFFFF for a in alike.tolist()] == [
        (0x11111111 << lane % 4) & 0xFFFFFFFF for lane in range(32)
    ]
    assert set(most.tolist()) == {31}


def test_shared_local_constant_and_generic_addresses():
    out = torch.zeros(64, dtype=torch.int32)
    run(
        """.shared .align 8 .b8 values[256];
        .local .align 8 .b8 depot[16];
        mad.lo.u32 %r3, %r0, 4, 0; mov.u32 %r4, values; add.u32 %r4, %r4, %r3;
        st.shared.u32 [%r4], %r0;
        bar.sync 0;
        mov.u32 %r5, values; xor.b32 %r6, %r3, 4; add.u32 %r5, %r5, %r6;
        cvt.u64.u32 %d3, %r5; cvta.shared.u64 %d4, %d3; ld.u32 %r7, [%d4];
        mov.u64 %d5, depot; st.local.u32 [%d5+8], %r7;
        cvta.local.u64 %d6, %d5; ld.u32 %r8, [%d6+8];
        mov.u64 %d7, table; ld.const.u32 %r9, [%d7+4];
        add.u32 %r8, %r8, %r9;
        mad.wide.u32 %d9, %r0, 4, %d0; st.global.u32 [%d9], %r8;""",
        *(out,),
        threads=64,
        variables=".const .align 4 .u32 table[2] = {5, 1000};",
    )
    assert out.tolist() == [1000 + (thread ^ 1) for thread in range(64)]


# ---- what is refused ----------------------------------------------------------------------------

SHARED = ".shared .align 4 .b8 values[256];\nmov.u32 %r4, values; mad.lo.u32 %r4, %r0, 4, %r4;\n"
MINE = "mad.wide.u32 %d9, %r0, 4, %d0;\n"
REFUSED = {
    "is unknown": ("tanh.approx.f32 %f0, %f1;", r"unknown instruction `tanh.approx.f32 %f0, %f1`"),
    "is unknown in a modifier": ("add.sat.f32 %f0, %f1, %f1;", "unknown instruction `add.sat.f32"),
    "is misaligned": ("ld.global.v4.u32 {%r3, %r4, %r5, %r6}, [%d0+8];", "misaligned access to 16"),
    "is beyond a tensor": (
        MINE + "ld.global.u32 %r3, [%d9+4];",
        "outside all tensors .*thread .31,",
    ),
    "is before a tensor": (
        MINE + "st.global.u32 [%d9-4], %r0;",
        r"outside all tensors .*thread \(0,",
    ),
    "is beyond shared memory": (
        SHARED + "st.shared.u32 [%r4+252], %r0;",
        "beyond the shared memory",
    ),
    "is unwritten": (
        SHARED + "ld.shared.u32 %r5, [%r4];",
        "read of shared memory that nobody in the",
    ),
    "lacks a barrier": (
        SHARED + "st.shared.u32 [%r4], %r0; xor.b32 %r5, %r4, 4; ld.shared.u32 %r6, [%r5];",
        "race on shared memory .*this thread reads what thread .* writes",
    ),
    "races": ("st.global.u32 [%d0], %r0;", "race on global memory .*this thread writes what"),
    "is not in its mask": ("vote.sync.any.pred %p0, %p1, 0xffff;", "the lane is not in its mask"),
    "brings another mask": (
        "setp.lt.u32 %p0, %r0, 16; selp.b32 %r3, -1, 0xffff0000, %p0; vote.sync.any.pred %p1, %p0, %r3;",
        "lanes bring different masks",
    ),
    "shuffles from nobody": (
        "setp.ge.u32 %p0, %r0, 16; @%p0 ret; shfl.sync.idx.b32 %r3|%p1, %r0, 16, 31, 0xffff;",
        "reads lane 16, which takes no part",
    ),
    "waits at two barriers": (
        "setp.lt.u32 %p0, %r0, 16; @%p0 bra L; bar.sync 0; ret; L: bar.sync 0;",
        "threads of a warp wait at two barriers",
    ),
    "waits for nobody": (
        "setp.lt.u32 %p0, %r0, 16; @%p0 bra L; bar.sync 0; ret; L: bar.warp.sync -1;",
        "threads wait for each other",
    ),
    "does not end": ("L: bra.uni L;", "the block does not end"),
    "traps": ("trap;", "trap, at"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_fault_is_refused_and_named(fault):
    body, said = REFUSED[fault]
    with pytest.raises(RuntimeError, match=re.compile(said, re.DOTALL)) as raised:
        run(body, torch.zeros(32, dtype=torch.int32))
    if "unknown" not in fault:
        assert re.search(r"thread \(\d+, 0, 0\) of block|on wait at", str(raised.value))


# ---- faults planted in what nvcc made -----------------------------------------------------------

needs_nvcc = pytest.mark.skipif(ptx.no_ptx_reason() is not None, reason=str(ptx.no_ptx_reason()))


def planted(folder, file, pattern, replacement):
    """A folder with that PTX file, in which every match is replaced."""
    text = (build.folder() / f"{file}.ptx").read_text()
    faulty, count = re.subn(pattern, replacement, text)
    assert count > 0, "there is nothing to replace"
    (folder / f"{file}.ptx").write_text(faulty)
    return folder


def boxes(n):
    corners = torch.rand(n, 2) * 100
    return torch.cat((corners, corners + torch.rand(n, 2) * 30), dim=1)


def focal_loss(logits):
    labels = torch.arange(len(logits)) % (logits.shape[1] + 1)
    return torch.ops.focalops.sigmoid_focal_loss_sum(
        *(logits, labels, 0.25, 2.0, None, -100, None, 1.0, True)
    )


PLANTED = {
    "a shuffle whose mask lacks half of the warp": (
        *("focal_loss", r"(shfl\.sync\.down\.b32 [^;]*), %r\d+;", r"\1, 65535;"),
        lambda: focal_loss(torch.randn(40, 7)),
        "the lane is not in its mask",
    ),
    "a vector load of 16 bytes at an address aligned to 8": (
        *("focal_loss", r"(ld\.global\.v4\.u32 [^\[]*\[%rd\d+)[^\]]*\]", r"\1+8]"),
        lambda: focal_loss(torch.randn(40, 32)),
        "misaligned access to 16 bytes",
    ),
    "a store beyond its tensor": (
        *("boxes", r"(st\.global\.(?:v4\.)?f32 \s*\[%rd\d+)\]", r"\1+65536]"),
        lambda: torch.ops.focalops.box_iou(boxes(9), boxes(8), 0),
        "outside all tensors",
    ),
    "no barriers": (
        *("nms", r"bar\.sync \t?0;", ""),
        lambda: torch.ops.focalops.nms(boxes(300), torch.rand(300), None, 0.5),
        "race on shared memory|nobody in the block has written",
    ),
}


@needs_nvcc
@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_caught(fault, tmp_path):
    file, pattern, replacement, call, said = PLANTED[fault]
    with ptx.compiled_cuda():
        call()
    with (
        ptx.compiled_cuda(planted(tmp_path, file, pattern, replacement)),
        pytest.raises(RuntimeError, match=said),
    ):
        call()


@needs_nvcc
def test_a_planted_approximate_division_is_caught(tmp_path):
    """An IoU has the same bits on every machine; one with a division of 2 ulp has not."""
    a, b = boxes(40), boxes(40)
    expected = torch.ops.focalops.box_iou(a, b, 0)
    with ptx.compiled_cuda():
        assert torch.equal(torch.ops.focalops.box_iou(a, b, 0), expected)
    with ptx.compiled_cuda(planted(tmp_path, "boxes", r"div\.rn\.f32", "div.full.f32")):
        assert not torch.equal(torch.ops.focalops.box_iou(a, b, 0), expected)
