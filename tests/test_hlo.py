"""Memory traffic and collectives counted in the text of compiled programs."""

import textwrap

import jax
import jax.numpy as jnp
import pytest

from maknet_jax.planning import hlo

FUSED = """HloModule fused

%double (param_0: f32[8,128]) -> f32[8,128] {
  %param_0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %add.1 = f32[8,128]{1,0:T(8,128)} add(%param_0, %param_0)
}

%slices (param_0: f32[64,128]) -> f32[16,128] {
  %param_0 = f32[64,128]{1,0:T(8,128)} parameter(0)
  %bitcast.1 = f32[64,128]{1,0:T(8,128)} bitcast(%param_0)
  %slice.1 = f32[16,128]{1,0:T(8,128)} slice(%bitcast.1), slice={[0:16], [0:128]}
  %slice.2 = f32[16,128]{1,0:T(8,128)} slice(%param_0), slice={[16:32], [0:128]}
  ROOT %add.2 = f32[16,128]{1,0:T(8,128)} add(%slice.1, %slice.2)
}

%update (param_0: f32[64,128], param_1: f32[8,128], param_2: s32[]) -> f32[64,128] {
  %param_0 = f32[64,128]{1,0:T(8,128)} parameter(0)
  %param_1 = f32[8,128]{1,0:T(8,128)} parameter(1)
  %param_2 = s32[]{:T(128)S(6)} parameter(2)
  ROOT %dus = f32[64,128]{1,0:T(8,128)} dynamic-update-slice(%param_0, %param_1, %param_2, %param_2)
}

%fill (param_0: f32[8,128]) -> f32[64,128] {
  %param_0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %zeros = f32[64,128]{1,0:T(8,128)} broadcast(%zero), dimensions={}
  ROOT %dus.2 = f32[64,128]{1,0:T(8,128)} dynamic-update-slice(%zeros, %param_0, %zero, %zero)
}

%first (param_0: f32[8,128]) -> f32[64,128] {
  %param_0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %new = f32[64,128]{1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %dus.3 = f32[64,128]{1,0:T(8,128)} dynamic-update-slice(%new, %param_0, %zero, %zero)
}

%pair (param_0: f32[8,128]) -> (f32[8,128], f32[8,128]) {
  %param_0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %both = (f32[8,128]{1,0}, f32[8,128]{1,0}) custom-call(%param_0), custom_call_target="two"
}

%sliced (param_0: f32[64,128]) -> f32[16,128] {
  %param_0 = f32[64,128]{1,0:T(8,128)} parameter(0)
  ROOT %slice.3 = f32[16,128]{1,0:T(8,128)} slice(%param_0), slice={[0:16], [0:128]}
}

%body (state: f32[8,128]) -> f32[8,128] {
  %state = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %twice = f32[8,128]{1,0:T(8,128)} multiply(%state, %state)
}

%five (state.1: s32[]) -> pred[] {
  %state.1 = s32[] parameter(0)
  %limit = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%state.1, %limit), direction=LT
}

%never (state.2: pred[]) -> pred[] {
  ROOT %state.2 = pred[] parameter(0)
}

ENTRY %main (a: f32[8,128], b: f32[64,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %near = f32[8,128]{1,0:T(8,128)S(1)} parameter(1)
  %b = f32[64,128]{1,0:T(8,128)} parameter(2)
  %i = s32[]{:T(128)S(6)} parameter(3)
  %far = f32[64,128]{1,0:T(8,128)S(1)} parameter(4)
  OPERATION
}
"""
ROW = 4 * 8 * 128  # bytes of f32[8,128]
CASES = {
    "%f = f32[8,128]{1,0:T(8,128)} fusion(%a), kind=kLoop, calls=%double": 2 * ROW,
    "%f = f32[8,128]{1,0:T(8,128)S(1)} fusion(%a), kind=kLoop, calls=%double": ROW,
    "%f = f32[8,128]{1,0:T(8,128)S(1)} fusion(%near), kind=kLoop, calls=%double": 0,
    "%f = f32[16,128]{1,0:T(8,128)} fusion(%b), kind=kLoop, calls=%slices": 6 * ROW,
    "%f = f32[64,128]{1,0:T(8,128)} fusion(%b, %a, %i), kind=kLoop, calls=%update": 2 * ROW,
    "%f = f32[64,128]{1,0:T(8,128)} fusion(%b, %near, %i), kind=kLoop, calls=%update": ROW,
    "%f = f32[64,128]{1,0:T(8,128)} fusion(%a), kind=kLoop, calls=%fill": 9 * ROW,
    "%f = (f32[8,128]{1,0}, f32[8,128]{1,0}) fusion(%a), kind=kCustom, calls=%pair": 3 * ROW,
    "%c = f32[8,128]{1,0:T(8,128)} add(%a, %near)": 2 * ROW,
    "%g = f32[8,128]{1,0:T(8,128)} bitcast(%a)": 0,
    "%c = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) "
    "copy-start(%a)": ROW,
    "%c = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%start)": 0,
    "%s = ((f32[64,128]{1,0:T(8,128)}), f32[8,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) "
    "slice-start(%b), slice={[0:8], [0:128]}": ROW,
    '%c = f32[8,128]{1,0:T(8,128)} custom-call(%a), custom_call_target="ConcatBitcast"': 0,
    '%n = f32[64,128]{1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"': 0,
    "%f = f32[64,128]{1,0:T(8,128)} fusion(%a), kind=kLoop, calls=%first": 2 * ROW,
    "%t = f32[8,128]{1,0:T(8,128)} add(f32[8,128]{1,0:T(8,128)} %a, f32[8,128]{1,0} %near)": 2
    * ROW,
    "%g = (f32[8,128]{1,0:T(8,128)}, f32[32,128]{1,0:T(8,128)}) all-gather-start(%a)": 5 * ROW,
    "%y = ((f32[64,128]), f32[16,128]{1,0:T(8,128)}) async-start(%b), calls=%sliced": 4 * ROW,
    "%r = f32[8,128]{1,0:T(8,128)} all-reduce(%a), to_apply=%double": 2 * ROW,
    "%u = f32[64,128]{1,0:T(8,128)} dynamic-update-slice(%b, %a, %i, %i)": 2 * ROW,
    "%u = f32[64,128]{1,0:T(8,128)} dynamic-update-slice(%b, %near, %i, %i)": ROW,
    "%u = f32[64,128]{1,0:T(8,128)S(1)} dynamic-update-slice(%far, %a, %i, %i)": ROW,
    "%s = f32[8,128]{1,0:T(8,128)} dynamic-slice(%b, %i, %i)": 2 * ROW,
    # Channels of 3 are padded to 8 and images of 100 to 128: what the memory holds.
    "%c = bf16[100,4,3]{0,2,1:T(8,128)(2,1)} convert(%near)": 2 * 128 * 4 * 8,
    "%w = f32[8,128]{1,0:T(8,128)} while(%a), condition=%cond, body=%body, "
    'backend_config={"known_trip_count":{"n":"3"}}': 3 * 3 * ROW,
    "%w = f32[8,128]{1,0:T(8,128)} while(%a), condition=%five, body=%body": 5 * 3 * ROW,
    "%k = f32[8,128]{1,0:T(8,128)} conditional(%i, %a, %b), branch_computations={%body, %sliced}": 4
    * ROW,
    "%k = f32[8,128]{1,0:T(8,128)} conditional(%i, %a, %b), true_computation=%sliced, "
    "false_computation=%body": 4 * ROW,
    "%k = f32[8,128]{1,0:T(8,128)} call(%a), to_apply=%body": 3 * ROW,
}


@pytest.mark.parametrize("operation", CASES, ids=range(len(CASES)))
def test_bytes_of_main_memory(operation):
    assert hlo.hbm_bytes(FUSED.replace("OPERATION", operation)) == CASES[operation]


def test_bytes_of_a_compiled_program():
    x = jnp.ones((1000, 100))
    text = jax.jit(lambda x, y: jnp.sin(x) * y + x).lower(x, x).compile().as_text()
    assert hlo.hbm_bytes(text) == 3 * 4 * x.size


def test_operations_name_their_source_and_the_memory_of_their_outputs():
    far = '%c = f32[8,100]{1,0:T(8,128)} add(%a, %near), metadata={op_name="jit(f)/block/add"}'
    text = FUSED.replace("OPERATION", far)
    operations = {each.name: each for each in hlo.operations(text)}
    assert "a" not in operations  # a parameter
    assert sum(each.moved for each in operations.values()) == hlo.hbm_bytes(text)
    assert operations["c"] == hlo.Operation(
        "c",
        "jit(f)/block/add",
        2 * ROW,
        [hlo.Buffer("jit(f)/block/add", [8, 100], ROW, "HBM")],
    )
    near = {"{1,0:T(8,128)S(1)}": "VMEM", "{1,0:T(8,128)S(5)}": "S(5)", "{1,0}": "HBM"}
    for layout, memory in near.items():
        changed = FUSED.replace("OPERATION", f"%c = f32[8,128]{layout} add(%a, %near)")
        (found,) = (each for each in hlo.operations(changed) if each.name == "c")
        assert [each.memory for each in found.outputs] == [memory]
    started = "%c = (f32[8,128]{1,0:S(1)}, f32[8,128]{1,0}, u32[]) copy-start(%a)"
    (start,) = (e for e in hlo.operations(FUSED.replace("OPERATION", started)) if e.name == "c")
    assert start.outputs == []  # those of its end


def test_incomplete_text_is_rejected():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.hbm_bytes("HloModule empty")
    for wrong, value in {
        "%c = f32[8,128]{1,0} add(a, near)": "add .*near",
        "%c = f32[8,128]{1,0} add(%a, %nothing)": "'nothing'",
        "%c = q7[8,128]{1,0} negate(%a)": "'q7'",
        "%c = f8e4m3fn[8,128]{1,0} negate(%a)": "'f8e4m3fn'",
    }.items():
        with pytest.raises(ValueError, match=value):
            hlo.hbm_bytes(FUSED.replace("OPERATION", wrong))
    endless = "%w = f32[8,128]{1,0} while(%a), condition=%never, body=%body"
    with pytest.raises(ValueError, match="%never"):
        hlo.hbm_bytes(FUSED.replace("OPERATION", endless))


def test_collectives_and_their_bytes():
    text = """
    ENTRY %main (x: f32[64]) -> f32[64] {
      %a = f32[64]{0} all-reduce(f32[64]{0} %x), to_apply=%sum
      %b = (f32[8,2]{1,0}, bf16[4]{0}) all-reduce-start(f32[8,2]{1,0} %y, bf16[4]{0} %z)
      %g = (f32[8]{0:T(256)}, f32[32]{0}) all-gather-start(f32[8]{0:T(256)} %y), dimensions={0}
      %e = (f32[3]{0:T(256)}, f32[5]{0:T(256)}, /*index=2*/f32[7]{0:T(256)}) all-reduce(%x, %y, %z)
      %c = f32[9]{0} fusion(f32[9]{0} %all-reduce)
      %d = bf16[2,3]{1,0:T(8,128)(2,1)} all-gather(bf16[1,3]{1,0} %w)
    }
    """
    expected = [5, 64 * 4 + 16 * 4 + 4 * 2 + 32 * 4 + 6 * 2 + 15 * 4]
    assert hlo.collectives(textwrap.dedent(text)) == expected


def test_collectives_in_a_loop_count_once_per_iteration():
    reducing = FUSED.replace("multiply(%state, %state)", "all-reduce(%state), to_apply=%double")
    loop = "%w = f32[8,128]{1,0:T(8,128)} while(%a), condition=%five, body=%body"
    assert hlo.collectives(reducing.replace("OPERATION", loop)) == [5, 5 * ROW]
    without = loop.replace("%five", "%never")  # the trip count is not needed
    assert hlo.collectives(FUSED.replace("OPERATION", without)) == [0, 0]
