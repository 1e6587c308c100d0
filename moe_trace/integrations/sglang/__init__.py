"""Integration with SGLang: a hook for its server, and files of its expert distribution recorder."""
