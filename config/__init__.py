"""The configurations that the distribution carries, as package data."""
