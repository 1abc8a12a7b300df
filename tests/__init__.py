"""The tests of moec: one folder for each of its parts."""
