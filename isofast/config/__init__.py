"""Configuration: its schema, presets, and how files and --set make one."""
