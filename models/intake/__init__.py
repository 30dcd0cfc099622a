"""The same small networks written in torch, Keras, Flax and Paddle, each with weights that are given as numpy arrays.

`weights` makes them, in torch's layout: (out, in, *kernel) and (out, in). Each other module has the builders `resnet(weights)` and
`mlp(weights)`, and `save(name, weights, folder)`, which writes what `spa convert` reads and returns how it is named on the command line.
The frameworks are imported by the builders alone; `python -m models.intake.keras_nets NAME WEIGHTS.npz FOLDER` saves in a Python that has
one.
"""
