"""The memory inside other libraries: a module for each, imported by name, with its own extra."""
