"""Hostile and unlucky input: fuzzing of every reader, and commands that are killed at random.

python -m fuzz READER --cases N
python -m fuzz.kills COMMAND --times N
"""
