"""``moec tune``: schedules by measurement, and the files that remember them (``codegen/tuned.py``)."""
