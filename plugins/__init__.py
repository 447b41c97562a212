"""The bundled plugins, installed as `chatd_plugins`: one file, one plugin."""
