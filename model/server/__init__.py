"""A model behind OpenAI's HTTP interface: `python -m model serve`.

command -> running (socket, signals) -> application (paths) -> service (requests become sequences) -> worker (the one
thread that drives the batch).
"""
