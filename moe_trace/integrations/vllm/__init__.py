"""Integration with vLLM: routing in the traces of vLLM's own profiler.

With moe_trace installed next to vLLM there is nothing to call: vLLM finds `plugin`, which records between
`start_profile` and `stop_profile`. `extension` is the alternative without a plugin.
"""
