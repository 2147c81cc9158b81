"""What the scripts stand on."""

VERSION = "1.0.0.dev0"  # of the scripts, as CHANGELOG.md counts
