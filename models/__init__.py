"""Model intake and the zoo: the networks that tests, benchmarks and the tools run on.

``weightless``
    Graphs of real architectures small enough for git: weights are left out and drawn again on loading.
``inputs``
    Seeded example feeds for any model.
``packages``
    Pretrained models and labelled samples that live inside packages of the Python index, pinned and cached.
``networks``, ``export_zoo``
    The networks of the zoo, and the script that wrote ``models/zoo`` with both of PyTorch's exporters.
``extras``
    The import of optional packages; PyTorch and friends come with the ``models`` extra.
"""
