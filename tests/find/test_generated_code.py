"""Tests of launches in generated code, written by hand for GPUs; test_launch_lists has real CPU code."""

from __future__ import annotations

import pytest

from moe_trace.find.private.generated_code import (
    BRANCHES,
    LEFT_OUT,
    NO_SOURCE,
    NOT_MADE,
    OTHER_ORDER,
    REGIONS,
    problem_of,
)

HEAD = """
import torch
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.runtime.runtime_utils import assert_tensor_metadata
assert_size_stride = torch._C._dynamo.guards.assert_size_stride
assert_size_stride_grouped = torch._C._dynamo.guards.assert_size_stride_grouped
reinterpret_tensor = torch._C._dynamo.guards._reinterpret_tensor
aten = torch.ops.aten
extern_kernels = select_algorithm.extern_kernels
empty_strided_cuda = torch._C._dynamo.guards._empty_strided_cuda
async_compile = AsyncCompile()
triton_poi_fused_0 = async_compile.triton('triton_poi_fused_0', '''
def triton_poi_fused_0(in_ptr0, xnumel): tl.load(in_ptr0)
''', device_str='cuda')
triton_red_fused_1 = async_compile.triton('triton_red_fused_1', '''...''', device_str='cuda')
async_compile.wait(globals())

def partition_0(args):
    arg0_1, s0 = args
    args.clear()
    with torch.cuda._DeviceGuard(0):
        torch.cuda.set_device(0)
        buf0 = empty_strided_cuda((s0, 8), (8, 1), torch.float32)
        # [Provenance debug handles] extern_kernels.mm:1
        extern_kernels.mm(arg0_1, reinterpret_tensor(arg0_1, (8, 8), (1, 8), 0), out=buf0)
        # [Provenance debug handles] triton_poi_fused_0:2
        triton_poi_fused_0_xnumel = max(1, s0 * 8)
        stream0 = get_raw_stream(0)
        triton_poi_fused_0.run(buf0, triton_poi_fused_0_xnumel, stream=stream0)
        BODY
        del arg0_1
    return (buf0, )

def partition_1(args):
    buf0, = args
    args.clear()
    with torch.cuda._DeviceGuard(0):
        # [Provenance debug handles] torch.ops.aten.topk.default:3
        buf1 = torch.ops.aten.topk.default(buf0, 2)
        buf2 = buf1[0]
        assert_size_stride(buf2, (8, 2), (2, 1), 'torch.ops.aten.topk.default')
        assert_tensor_metadata(buf2, (8, 2), (2, 1), torch.float32, 'torch.ops.aten.topk.default')
        assert_size_stride_grouped((buf0, buf2), ((8, 2), (8, 8)), ((2, 1), (8, 1)), 'input')
        stream0 = get_raw_stream(0)
        # [Provenance debug handles] triton_red_fused_1:4
        triton_red_fused_1.run(buf2, 16, 8, stream=stream0)
    return (buf2, )

class Runner:
    def __init__(self, partitions):
        self.partitions = partitions

    def recursively_apply_fns(self, fns):
        self.partitions = [fn(c) for fn, c in zip(fns, self.partitions)]

    def call(self, args):
        arg0_1, s0 = args
        args.clear()
        arg0_1.copy_(arg0_1, False)
        partition0_args = [arg0_1, s0]
        (buf0,) = self.partitions[0](partition0_args)
        (buf2,) = self.partitions[1]([buf0])
        if not s0 > 0:
            raise RuntimeError('s0 > 0')
        return (buf2, )

runner = Runner(partitions=[partition_0, partition_1])
call = runner.call
"""
NOTED = ["extern_kernels.mm", "triton_poi_fused_0", "torch.ops.aten.topk.default", "triton_red_fused_1"]


def source(body: str = "pass") -> str:
    return HEAD.replace("BODY", body)


def test_a_provenance_of_all_launches_is_right() -> None:
    assert problem_of(source(), NOTED) == ""


@pytest.mark.parametrize("at", range(4))
def test_any_other_provenance_is_not_and_says_in_what(at: int) -> None:
    name, before = NOTED[at], NOTED[at - 1]
    assert problem_of(source(), NOTED[:at] + NOTED[at + 1 :]) == LEFT_OUT.format(name)
    assert problem_of(source(), [*NOTED[:at], name, *NOTED[at:]]) == NOT_MADE.format(name)
    assert problem_of(source(), [f"{one}_" if one == name else one for one in NOTED]) == LEFT_OUT.format(name)
    swapped = {name: before, before: name}
    assert problem_of(source(), [swapped.get(one, one) for one in NOTED]) == OTHER_ORDER


def test_code_without_any_launch_is_read() -> None:
    """Unlike that of C++: another setting would help nobody."""
    nothing = "def call(args):\n    arg0_1, = args\n    args.clear()\n    return (arg0_1, )"
    assert problem_of(nothing, []) == ""
    assert problem_of(nothing, NOTED) == NOT_MADE.format(NOTED[0])


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ("aten.index_put_(buf0, [buf1], buf2, True)", "aten.index_put_"),
        ("workspace_0.zero_()", "workspace_0.zero_"),
        ("buf3 = workspace_0[0:s0].view(8, 8).sum(dim=0)", ".sum"),
        ("other_kernel_0.run(buf0, stream=stream0)", "other_kernel_0"),
        ("buf3 = torch.add(buf0, 1)", "torch.add"),
        ("unknown(out=buf0)", "unknown"),
    ],
)
def test_a_call_that_the_provenance_leaves_out_is_named(call: str, name: str) -> None:
    assert name in problem_of(source(call), NOTED)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (source("if u0: extern_kernels.mm(buf0, buf0, out=buf0)"), BRANCHES),
        (source("while u0: triton_poi_fused_0.run(buf0)"), BRANCHES),
        (source("buf0 = partition_1([buf0])"), REGIONS),
        (source().replace("[partition_0, partition_1]", "[partition_0]"), NO_SOURCE),
        (source().replace("def call", "def another"), NO_SOURCE),
        ("call = CppWrapperCodeCache.load_pybinding(arguments)", NO_SOURCE),
        ("it is not Python", NO_SOURCE),
        (source().replace(":2", ":9"), OTHER_ORDER),
    ],
)
def test_what_cannot_be_told_has_its_reason(source: str, problem: str) -> None:
    assert problem_of(source, NOTED) == problem
