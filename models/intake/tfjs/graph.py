"""Writes the SavedModel that graph/ was made of: `python graph.py FOLDER && tensorflowjs_converter FOLDER graph` (tensorflowjs 4.22.0).

It has what TF.js's converter fuses: biases and activations with convolutions, plain and depthwise, and with products, and PReLU.
"""

import sys

import keras
import numpy as np

layers = keras.layers
image = keras.Input((8, 8, 3), name="image")
x = layers.Conv2D(8, 3, padding="same", activation="relu6", name="stem")(image)
x = layers.DepthwiseConv2D(3, padding="same", activation="relu6", name="depth")(x)
x = layers.PReLU(shared_axes=[1, 2], name="slope")(layers.Conv2D(12, 1, name="point")(x))
x = layers.GlobalAveragePooling2D(name="pool")(x)
x = layers.Dense(16, activation="relu", name="hidden")(x)
network = keras.Model(image, layers.Dense(5, activation="softmax", name="scores")(x))
rng = np.random.default_rng(0)
for weight in network.weights:
    weight.assign(rng.normal(0, 0.4, weight.shape))
network.export(sys.argv[1], verbose=False)
