"""Configuration: the schema, the presets, and loading from files and --set."""
