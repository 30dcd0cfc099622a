"""What reads frameworks' models: each file stands alone and needs numpy and its own framework, nothing of spa's (see `serve.py`)."""
