"""A summary as text, JSON, CSV or HTML: functions from figures to strings, which compute nothing."""
