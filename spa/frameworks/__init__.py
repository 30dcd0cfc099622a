"""The way back: a plan carried over to what a framework holds. `arrays` finds arrays in the file, `torch_module` shrinks a module."""
