"""The llama.cpp beside us: fetched, built, located and called. Never needed to make a file."""
