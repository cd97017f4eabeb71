"""Readers of run folders: tables and what prints them. Nothing here imports torch."""
