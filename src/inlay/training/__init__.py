"""Training runs: from text files and a pretrained model to an adapter folder.

``inlay train`` is a thin layer over :func:`inlay.training.run.train`. Tasks and data formats are tables
(``inlay.training.tasks``, ``inlay.training.formats``), one file for each entry.
"""
