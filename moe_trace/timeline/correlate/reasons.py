"""Why a call has no range, no place on the timeline, or its router no time."""

from __future__ import annotations

NO_CPU = "the profiler was not asked for events of the host; add ProfilerActivity.CPU to activities="
NO_HOST_EVENTS = (
    "it holds no event of the host; add ProfilerActivity.CPU to activities=, or, where it is given, start "
    "the profiler on the thread that runs the model"
)
OTHER_THREAD = (
    "the profiler did not record the thread that they ran on; start it there, or give it "
    "experimental_config=torch.profiler._ExperimentalConfig(profile_all_threads=True)"
)
NO_ANNOTATIONS = (
    "it holds operators of their thread and no range of moe_trace, so another tool took the annotations out; "
    "merge into the trace as the profiler wrote it"
)
DROPPED = (
    "it holds those of other calls of the same thread, so theirs were dropped by the profiler or by a tool "
    "that saved the file; record fewer steps, or merge into the trace as the profiler wrote it"
)

# -- of calls inside graphs ------------------------------------------------------------------------------

NO_RANGE = (
    "the trace holds no range round their forward: its code was compiled while the profiler recorded, or the "
    "profiler dropped events; run a step before the profiler starts, and record fewer"
)
NO_LAUNCH = (
    "the trace holds no launch of a CUDA graph in their step, and the host saw no forward: compile the model "
    "itself rather than a function that calls it"
)
NO_MARK = (
    "the host saw neither their forward nor the counts before and after it in this trace: attach the tracer "
    "to the profiler before it starts, and call prof.step() after each replay"
)
OTHER_STREAM = (
    "their graphs ran on another stream than the one that counts them: call prof.step() where the stream of "
    "the replays is current"
)
OTHER_COUNT = (
    "the device counted another number of forwards than there are launches of their graphs in the step: call "
    "prof.step() after each replay"
)
MIXED = (
    "replays and forwards that the host saw are mixed in one step, and some were not kept: call prof.step() "
    "between them"
)
UNKNOWN_GRAPH = (
    "which launches wrote them cannot be told: the graphs were made by torch.compile round a function that "
    "calls the model, and something beside them may have written too; compile the model itself"
)
OTHER_TRACE = "they belong to another trace of the same run"
UNKNOWN_NODES = (
    "their graph was not captured while the tracer was on, holds the router twice, or runs on several streams"
)
FUSED = "compiled code fuses the router with its neighbours"
