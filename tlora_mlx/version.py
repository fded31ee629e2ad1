"""The package's version, which can be imported without anything heavy."""

__version__ = "0.1.0"
