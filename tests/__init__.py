"""Tests: what a client, an operator or a plugin's author sees."""
