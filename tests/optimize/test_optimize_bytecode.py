"""optimize(): forwards without a graph, judged by their instructions, of Python 3.10 to 3.14."""

import dis
import sys

import pytest
import torch
from support.opcodes import OPCODES
from support.optimize import Chain, branches, formats_of_last, same
from torch import nn as stock

import advdl_ops
from advdl_ops._optimize import bytecode

pytestmark = pytest.mark.usefixtures("one_thread", "formats_unwatched")

KNOWN = bytecode.HARMLESS | bytecode.LOADS | set(bytecode.HARMLESS_ARGUMENTS)
# All other instructions of Python 3.10 to 3.14, by what forbids them.
REFUSED = {
    "write what is no local variable": """
        DELETE_ATTR DELETE_DEREF DELETE_GLOBAL DELETE_NAME DELETE_SUBSCR STORE_ATTR STORE_DEREF STORE_GLOBAL STORE_NAME
        STORE_SLICE STORE_SUBSCR SETUP_ANNOTATIONS IMPORT_FROM IMPORT_NAME IMPORT_STAR
        """,
    "may write their operand": """
        DICT_MERGE DICT_UPDATE INPLACE_ADD INPLACE_AND INPLACE_FLOOR_DIVIDE INPLACE_LSHIFT INPLACE_MATRIX_MULTIPLY
        INPLACE_MODULO INPLACE_MULTIPLY INPLACE_OR INPLACE_POWER INPLACE_RSHIFT INPLACE_SUBTRACT INPLACE_TRUE_DIVIDE
        INPLACE_XOR LIST_APPEND MAP_ADD SET_ADD SET_UPDATE
        """,
    "load what their name does not tell": """
        LOAD_BUILD_CLASS LOAD_CLASSDEREF LOAD_CLOSURE LOAD_DEREF LOAD_FAST_AND_CLEAR LOAD_FROM_DICT_OR_DEREF
        LOAD_FROM_DICT_OR_GLOBALS LOAD_LOCALS LOAD_NAME LOAD_SPECIAL LOAD_SUPER_ATTR COPY_FREE_VARS MAKE_CELL
        """,
    "call, or make, what nobody has seen": """
        CALL_FUNCTION_EX CALL_INTRINSIC_2 MAKE_FUNCTION SET_FUNCTION_ATTRIBUTE BUILD_INTERPOLATION BUILD_TEMPLATE
        PRINT_EXPR
        """,
    "match patterns": "COPY_DICT_WITHOUT_KEYS GET_LEN MATCH_CLASS MATCH_KEYS MATCH_MAPPING MATCH_SEQUENCE",
    "enter a context, or catch an error": """
        BEFORE_ASYNC_WITH BEFORE_WITH CHECK_EG_MATCH CHECK_EXC_MATCH JUMP_IF_NOT_EXC_MATCH POP_BLOCK POP_EXCEPT
        PREP_RERAISE_STAR PUSH_EXC_INFO RERAISE SETUP_ASYNC_WITH SETUP_FINALLY SETUP_WITH WITH_EXCEPT_START
        """,
    "are of generators, coroutines and the interpreter": """
        ASYNC_GEN_WRAP CLEANUP_THROW END_ASYNC_FOR END_SEND ENTER_EXECUTOR EXIT_INIT_CHECK GEN_START GET_AITER GET_ANEXT
        GET_AWAITABLE GET_YIELD_FROM_ITER INTERPRETER_EXIT JUMP_BACKWARD_NO_INTERRUPT RESERVED RETURN_GENERATOR SEND
        YIELD_FROM YIELD_VALUE
        """,
}
NAMES_REFUSED = {name for names in REFUSED.values() for name in names.split()}

# What `fits` compiles to.
NEEDED = {
    (3, 10): """
        BINARY_MULTIPLY BINARY_SUBSCR BINARY_SUBTRACT BUILD_LIST BUILD_SLICE BUILD_TUPLE CALL_FUNCTION CALL_FUNCTION_KW
        CALL_METHOD LOAD_ATTR LOAD_CONST LOAD_FAST LOAD_GLOBAL LOAD_METHOD POP_JUMP_IF_FALSE POP_JUMP_IF_TRUE
        RETURN_VALUE STORE_FAST
        """,
    (3, 11): """
        BINARY_OP BINARY_SUBSCR BUILD_LIST BUILD_SLICE BUILD_TUPLE CALL KW_NAMES LOAD_ATTR LOAD_CONST LOAD_FAST
        LOAD_GLOBAL LOAD_METHOD POP_JUMP_FORWARD_IF_FALSE POP_JUMP_FORWARD_IF_TRUE PRECALL RESUME RETURN_VALUE
        STORE_FAST
        """,
    (3, 12): """
        BINARY_OP BINARY_SUBSCR BUILD_LIST BUILD_SLICE BUILD_TUPLE CALL KW_NAMES LOAD_ATTR LOAD_CONST LOAD_FAST
        LOAD_GLOBAL POP_JUMP_IF_FALSE POP_JUMP_IF_TRUE RESUME RETURN_VALUE STORE_FAST
        """,
    (3, 13): """
        BINARY_OP BINARY_SUBSCR BUILD_LIST BUILD_SLICE BUILD_TUPLE CALL CALL_KW LOAD_ATTR LOAD_CONST LOAD_FAST
        LOAD_FAST_LOAD_FAST LOAD_GLOBAL POP_JUMP_IF_FALSE POP_JUMP_IF_TRUE RESUME RETURN_VALUE STORE_FAST
        STORE_FAST_LOAD_FAST TO_BOOL
        """,
    (3, 14): """
        BINARY_OP BUILD_LIST BUILD_SLICE BUILD_TUPLE CALL CALL_KW LOAD_ATTR LOAD_CONST LOAD_FAST_BORROW
        LOAD_FAST_BORROW_LOAD_FAST_BORROW LOAD_GLOBAL LOAD_SMALL_INT NOT_TAKEN POP_JUMP_IF_FALSE POP_JUMP_IF_TRUE
        RESUME RETURN_VALUE STORE_FAST STORE_FAST_LOAD_FAST TO_BOOL
        """,
}  # fmt: skip


def fits(self, x):
    y = self.up(self.down(x))
    rows, columns = x.size(2) - y.size(2), x.shape[3] - y.shape[3]
    if rows or columns:
        y = torch.nn.functional.pad(y, [0, columns, 0, rows])
    return torch.cat((x, y), dim=1)[:, max(0, rows) : 12] * 2


@pytest.mark.parametrize("version", OPCODES)
def test_every_instruction_is_known_or_refused(version):
    """So that nobody adds a version of Python without a look at each instruction."""
    names = OPCODES[version]
    assert names & KNOWN == names - NAMES_REFUSED
    assert all(bytecode.why_not_harmless(name, "") for name in names & NAMES_REFUSED)
    accepted = names & (bytecode.HARMLESS | bytecode.LOADS)
    assert not any(bytecode.why_not_harmless(name, "") for name in accepted)


def test_no_name_is_misspelt():
    assert set().union(*OPCODES.values()) == KNOWN | NAMES_REFUSED
    assert not KNOWN & NAMES_REFUSED


@pytest.mark.skipif(sys.version_info[:2] not in OPCODES, reason="a later Python")
def test_the_table_of_this_python():
    # From 256 on are names that the compiler alone uses.
    names = {name for name, code in dis.opmap.items() if code < 256}
    assert {n for n in names if not n.startswith("INSTRUMENTED_")} == OPCODES[sys.version_info[:2]]


def test_unknown_instructions_are_refused():
    assert bytecode.why_not_harmless("LOAD_SOMETHING_NEW", "") == "it does a LOAD_SOMETHING_NEW"
    assert bytecode.why_not_harmless("CALL_INTRINSIC_1", "INTRINSIC_PRINT") is not None
    assert bytecode.why_not_harmless("CALL_INTRINSIC_1", "INTRINSIC_LIST_TO_TUPLE") is None


@pytest.mark.parametrize(
    "operator", ["+", "-", "*", "/", "//", "%", "**", "@", "&", "|", "^", "<<", ">>"]
)
def test_operators_in_place_are_refused(operator):
    assert bytecode.why_not_harmless("BINARY_OP", operator) is None
    assert bytecode.why_not_harmless("BINARY_OP", f"{operator}=") == "it may write what it is given"


@pytest.mark.parametrize("version", NEEDED)
def test_what_a_unet_needs_is_known(version):
    needed = set(NEEDED[version].split())
    assert needed <= OPCODES[version]
    assert needed <= KNOWN


@pytest.mark.skipif(sys.version_info[:2] not in NEEDED, reason="a later Python")
def test_what_a_unet_needs_is_what_it_compiles_to():
    found = {instruction.opname for instruction in dis.get_instructions(fits)}
    ignored = {"CACHE", "COPY", "POP_TOP", "PUSH_NULL", "RETURN_CONST", "ROT_TWO", "SWAP"}
    assert found - ignored == set(NEEDED[sys.version_info[:2]].split())


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("x = x.view(x.shape)", "uses view"),
        ("x = x.flatten(1).unflatten(1, x.shape[1:])", "uses flatten"),
        ("x = torch.reshape(x, x.shape)", "uses reshape"),
        ("x = F.dropout(x, 0.0)", "uses dropout"),
        ("x.add_(1)", "uses add_"),
        ("x = F.relu(x, inplace=True)", "it may write what it is given"),
        ("torch.mul(x, 2, out=x)", "it may write what it is given"),
        ("x += 1", "it may write what it is given"),
        ("x[0] = 1", "it does a STORE_SUBSCR"),
        ("self.y = 1", "it does a STORE_ATTR"),
        ("self.helps(1)", "it may call its own helps"),
        ("self.child.run(x)", "uses child"),
        ("x.to(memory_format=torch.channels_last)", "uses channels_last"),
        ("x = users(x)", "it calls users"),
        ("same(x, x)", "it calls same"),
        ("print()", "it calls print"),
        ("y = [v for v in x]", "it "),
        ("import math", "it does a IMPORT_NAME"),
        ("x = F.relu(x, True)", "it may write what it is given"),
        ("x = torch.cat(*([x, x],))", "it does a CALL_FUNCTION_EX"),
        ("x = torch.mul(x, 2, **{'out': x})", "it does a "),
        ("self.__class__", "uses __class__"),
        ("del x[0]", "it does a DELETE_SUBSCR"),
    ],
)
def test_code_without_a_graph_that_forbids_channels_last(source, why):
    fast = advdl_ops.optimize(Chain(branches(source)).eval())
    assert f"between: its forward has no graph, and {why}" in str(advdl_ops.explain(fast)).replace(
        "it uses", "uses"
    )


@pytest.mark.parametrize(
    "source",
    [
        "x = F.relu(x)",
        "x.name",  # of torch.ops.aten, too, but no operator there
        "x = -x if x.dim() == 4 and x.shape[1] > 2 else x",
        "assert x.dim() == 4, f'{x.dim()} dimensions'",
        "a, *rest = x.chunk(2, 1); x = torch.cat([a, *rest], 1)",
        "for i in range(2): x = torch.nn.functional.pad(x, (0, i))",
    ],
)
def test_code_without_a_graph_that_allows_channels_last(source):
    model = Chain(branches(source)).double().eval()
    fast = advdl_ops.optimize(model)
    seen = formats_of_last(fast)
    x = torch.randn(2, 8, 9, 10, dtype=torch.float64)
    with torch.no_grad():
        same(fast(x)["x"], model(x)["x"])
    assert seen == [True]


def test_the_code_of_a_unet_allows_channels_last():
    kind = type("Fits", (stock.Module,), {"forward": fits})
    layer = kind()
    layer.down, layer.up = stock.Conv2d(8, 8, 3, stride=2), stock.ConvTranspose2d(8, 8, 2, 2)
    assert bytecode.why_format_may_matter(layer, lambda name: False) is None
