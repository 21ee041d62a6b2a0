"""Super Tiny Language Models: a pipeline of reproducible experiments, one room a stage.

Data flows through the rooms in this order: ``study`` (parameters), ``corpora``, ``tokens``, ``model``,
``training``, ``evaluation``, ``report``; imports run the same way. ``cli`` has one verb a stage.
"""

__version__ = "0.1.0"
