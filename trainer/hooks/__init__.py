"""The hooks that come with Regrow, one file each; `trainer.hook` is what they implement."""
