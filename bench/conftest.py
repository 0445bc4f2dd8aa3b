"""The comparison is a command of its own, which pytest must not import."""

collect_ignore = ["compare.py", "peers.py"]
