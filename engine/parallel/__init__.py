"""Parallelism: what each rank holds, and how ranks communicate."""
