"""The bundled plugins, installed as `chatd_plugins`: one file, or one folder, is one plugin."""
