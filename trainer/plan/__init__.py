"""What a run will need, before it starts: memory, bytes of checkpoints, time, and layouts that fit."""
