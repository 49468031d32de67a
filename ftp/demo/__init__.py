"""The demo: fine-tune a small network on handwritten digits, and see what survives under shifts. Run it by `python -m ftp demo`."""
