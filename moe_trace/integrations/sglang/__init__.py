"""moe_trace in SGLang: the hook that its server takes, and the files of its expert distribution recorder."""
