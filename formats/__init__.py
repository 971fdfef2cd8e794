"""Where bytes live: the structures of FORMAT.md, file headers, names, sources and safe files. Never calls a codec."""
