"""Models, arrays and settings come in and go out here: nothing else reads or writes a model's bytes."""
