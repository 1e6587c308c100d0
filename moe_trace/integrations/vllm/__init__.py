"""moe_trace inside vLLM: the routing in the traces that vLLM's own profiler writes.

With moe_trace installed beside vLLM there is nothing to call: `plugin` is found by vLLM, and records while
`start_profile` is in force. `extension` is the door for those who want no plugin.
"""
