"""Untrusted programs and parsers, in processes of their own."""
