"""WHAT happens next: pure and synchronous. Events in, commands out."""
