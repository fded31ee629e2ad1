"""Base models: where their files are, how they are loaded, what their modules are called."""
