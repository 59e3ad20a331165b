"""The process with torch in it; nothing outside this package imports torch."""
