"""Facts written as TOML, one record a file, and the one reader."""
