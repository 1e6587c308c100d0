"""moe_trace inside other libraries' training loops."""
