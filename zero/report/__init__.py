"""What a run tells its user: progress, metrics, tables and the memory-map picture.

Everything here takes plain data (dataclasses, dicts, strings) and imports no engine code, so that it can be tested
alone.

- ``record``: the figures of one step, and the line that shows them.
- ``console``: progress on a terminal (live) or elsewhere (one line per logged step).
- ``logs``: where log messages go.
- ``metrics``: ``metrics.jsonl`` and accelerate's trackers.
- ``tables``: "who needs what" and the run summary, as rich tables or plain text.
- ``memory_map``: the picture of a step's memory, as PNG.
- ``energy``: energy and CO2e, from ``meters`` (with ``nvml`` and ``codecarbon``) and ``grid``.
- ``timeline``: the predicted schedule of a step, as PNG and for Perfetto.
"""
